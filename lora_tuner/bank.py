"""Many adapters beside one base: each row of a batch goes through its own.

PEFT does this too, but what it costs to load and to swap grows with all that is loaded (benchmarks/RESULTS.md). Here an
adapter is no part of the model: its tensors lie beside it, and a hook on each layer adds B A x while a batch runs, so that
the hundredth loads like the first. Surprise: the base is never changed, not even wrapped. Limits: one batch at a time; rows
of different adapters copy their tensors once a call.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from .base_model import Base
from .errors import MixedBatchError
from .lora import layer_sizes, linear_layers
from .store import Adapter
from .updates import read


@dataclass(frozen=True)
class _Update:
    """The update of one layer as it is applied: `down` (rank, in), `up` (out, rank). With DoRA the base's own output is
    stretched as well, by 1 + `stretch` (out,)."""

    down: torch.Tensor
    up: torch.Tensor
    stretch: torch.Tensor | None = None


class AdapterBank:
    """The adapters that are in memory beside a base."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._layers = linear_layers(base.model)
        self.updates: dict[str, dict[str, _Update]] = {}  # adapter -> layer -> update

    def add(self, name: str, adapter: Adapter) -> None:
        """Read an adapter into memory, in place of one of that name. Raises AdapterError, and changes nothing, if it is
        damaged or does not fit."""
        self.updates[name] = self.read(adapter)

    def read(self, adapter: Adapter) -> "dict[str, _Update]":
        """The updates of an adapter, to be put into `updates`."""
        updates, device = {}, self._base.device
        for module, update in read(adapter, self._layers).items():
            down, up = update.down.to(device), update.up.to(device)
            if update.magnitude is None:
                updates[module] = _Update(down, up)
            else:
                factor = update.magnitude.to(device) / (_weight(self._layers[module]).float() + up @ down).norm(dim=1)
                updates[module] = _Update(down, factor[:, None] * up, factor - 1)
        return updates

    def remove(self, name: str) -> None:
        del self.updates[name]

    @contextlib.contextmanager
    def applied(self, rows: Sequence[str | None]) -> Iterator[None]:
        """In the block, row i of each batch goes through the adapter `rows[i]`, or through the plain base for None.

        One entry stands for all rows of batches of any size. A batch raises MixedBatchError where a layer cannot tell which
        row is which.
        """
        hooks = []
        try:
            for module, layer in self._layers.items():
                updates = [self.updates[name].get(module) if name is not None else None for name in rows]
                if hook := _hook(updates):
                    hooks.append(layer.register_forward_hook(hook))
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def joined(
        self, modules: Sequence[str], rows: Sequence[str | None]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The updates of layers that share their input as one, for a batch whose rows go through these adapters.

        Of one adapter for all rows (in, ranks) and (ranks, outs), of several (rows, in, ranks) and (rows, ranks, outs);
        None for both where there is nothing to add. Raises MixedBatchError for DoRA, whose update is no sum.
        """
        each = {name: self._joined(modules, self.updates[name] if name is not None else {}) for name in set(rows)}
        if all(len(down) == 0 for down, _ in each.values()):
            return None, None
        if len(each) == 1:
            ((down, up),) = each.values()
            return down.T, up
        ranks = max(len(down) for down, _ in each.values())
        filled = {name: [F.pad(part, (0, 0, 0, ranks - len(part))) for part in parts] for name, parts in each.items()}
        return (
            torch.stack([filled[name][0] for name in rows]).transpose(1, 2),
            torch.stack([filled[name][1] for name in rows]),
        )

    def _joined(self, modules: Sequence[str], updates: dict[str, _Update]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ranks, in) and (ranks, outs): each layer's update reaches its own outputs alone."""
        sizes = layer_sizes({module: self._layers[module] for module in modules})
        outs = [out for _, out in sizes.values()]
        downs, ups, start = [torch.empty(0, sizes[modules[0]][0])], [torch.empty(0, sum(outs))], 0
        for module, out in zip(modules, outs, strict=True):
            if (update := updates.get(module)) is not None:
                if update.stretch is not None:
                    raise MixedBatchError("DoRA stretches what the base puts out.")
                downs.append(update.down)
                ups.append(F.pad(update.up.T, (start, sum(outs) - start - out)))
            start += out
        return torch.cat(downs), torch.cat(ups)


def _weight(layer: Any) -> torch.Tensor:
    """(out, in)."""
    weight: torch.Tensor = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    return weight


def _hook(updates: Sequence[_Update | None]) -> Callable[..., torch.Tensor] | None:
    """What a layer does for rows with these updates; None when there is nothing to do."""
    first = updates[0]
    if all(update is first for update in updates):
        return partial(_all_rows, first) if first is not None else None
    some = [update for update in updates if update is not None]
    rank = max(len(update.down) for update in some)
    down = some[0].down.new_zeros(len(updates), rank, some[0].down.shape[1])
    up = some[0].up.new_zeros(len(updates), len(some[0].up), rank)
    stretch = some[0].up.new_zeros(len(updates), 1, len(some[0].up))
    for row, update in enumerate(updates):
        if update is not None:  # of the plain base, and beyond an update's rank, the zeros add nothing
            down[row, : len(update.down)] = update.down
            up[row, :, : len(update.down)] = update.up
            if update.stretch is not None:
                stretch[row] = update.stretch
    stretched = any(update.stretch is not None for update in some)
    return partial(_own_rows, down.transpose(1, 2), up.transpose(1, 2), stretch if stretched else None)


def _all_rows(update: _Update, layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    added = F.linear(F.linear(inputs[0].to(update.down.dtype), update.down), update.up)
    return _sum(layer, output, added, update.stretch)


def _own_rows(
    down: torch.Tensor, up: torch.Tensor, stretch: torch.Tensor | None, layer: Any, inputs: Any, output: torch.Tensor
) -> torch.Tensor:
    tokens = inputs[0].to(down.dtype)
    if tokens.dim() != 3 or len(tokens) != len(down):  # OPT, for one, strings the rows of a batch together
        raise MixedBatchError("This base does not keep the rows of a batch apart, so each adapter needs its own.")
    return _sum(layer, output, torch.bmm(torch.bmm(tokens, down), up), stretch)


def _sum(layer: Any, output: torch.Tensor, added: torch.Tensor, stretch: torch.Tensor | None) -> torch.Tensor:
    if stretch is not None:
        added = added + stretch * (output if layer.bias is None else output - layer.bias)
    return (output + added).to(output.dtype)
