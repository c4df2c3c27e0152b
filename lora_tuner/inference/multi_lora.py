"""Many adapters beside one base: each row of a batch goes through its own.

PEFT does this too, but what it costs to load and to swap grows with all that is loaded (benchmarks/RESULTS.md). Here an
adapter is no part of the model: its tensors lie beside it, and B A x is added while a batch runs, by our own decoder or by a
hook on each layer, so that the hundredth loads like the first. Surprise: the base is never changed, not even wrapped. Limit:
where rows of different adapters share a batch, their tensors are there twice.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from ..adapters.adapter import Adapter
from ..errors import AdapterError, MixedBatchError
from ..models.delta import load_deltas
from ..models.loading import LoadedBase
from ..models.lora import layer_sizes, linear_layers


@dataclass(frozen=True)
class _LayerLora:
    """The update of one layer as it is applied: `down` (rank, in), `up` (out, rank). With DoRA the base's own output is
    stretched as well, by 1 + `stretch` (out,)."""

    A: torch.Tensor
    B: torch.Tensor
    dora_scale: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter in memory, by layer. It never changes: one that is replaced on disk is loaded anew, beside what still runs."""

    layers: dict[str, _LayerLora]
    stacked: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )  # made when asked for

    @property
    def is_additive(self) -> bool:
        """Whether all that it does is to add; DoRA stretches."""
        return all(update.dora_scale is None for update in self.layers.values())


def blend_loaded(parts: Sequence[tuple[float, LoadedAdapter]]) -> LoadedAdapter:
    """The weighted sum of adapters in memory, exactly. Raises AdapterError for DoRA, whose update is no sum."""
    if not all(loaded.is_additive for _, loaded in parts):
        raise AdapterError(
            "A DoRA adapter also rescales the base's weights, so it is no part of a sum: merge it instead."
        )
    layers = {}
    for module in dict.fromkeys(module for _, loaded in parts for module in loaded.layers):
        own = [(weight, loaded.layers[module]) for weight, loaded in parts if module in loaded.layers]
        layers[module] = _LayerLora(
            torch.cat([update.A for _, update in own]), torch.cat([weight * update.B for weight, update in own], 1)
        )
    return LoadedAdapter(layers)


LayerHook = tuple[Any, Callable[..., torch.Tensor | None]]  # a layer, and what it does to its output


class MultiLora:
    """Puts adapters beside a base, for the time of a batch."""

    def __init__(self, base: LoadedBase) -> None:
        self._base = base
        self.layers = linear_layers(base.model)

    def load(self, adapter: Adapter) -> LoadedAdapter:
        """An adapter into memory. Raises AdapterError if it is damaged or does not fit."""
        updates, device = {}, self._base.device
        for module, update in load_deltas(adapter, self.layers).items():
            down, up = update.A.to(device), update.B.to(device)
            if update.magnitude is None:
                updates[module] = _LayerLora(down, up)
            else:
                factor = update.magnitude.to(device) / (_dense_weight(self.layers[module]).float() + up @ down).norm(
                    dim=1
                )
                updates[module] = _LayerLora(down, factor[:, None] * up, factor - 1)
        return LoadedAdapter(updates)

    def hooks(self, rows: Sequence[LoadedAdapter | None]) -> list[LayerHook]:
        """Layers, each with what it does in a batch whose row i goes through the adapter `rows[i]`, or through the plain base
        for None. One entry stands for all rows of batches of any size."""
        found: list[LayerHook] = []
        for module, layer in self.layers.items():
            if hook := _make_hook([loaded.layers.get(module) if loaded is not None else None for loaded in rows]):
                found.append((layer, hook))
        return found

    @contextlib.contextmanager
    def apply_hooks(self, hooks: Sequence[LayerHook]) -> Iterator[None]:
        """In the block, each batch goes through these `hooks`. It raises MixedBatchError where a layer cannot tell which row
        is which."""
        handles = []
        try:
            for layer, hook in hooks:
                handles.append(layer.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def stacked(self, modules: Sequence[str], loaded: LoadedAdapter | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The updates of layers that share their input as one: (ranks, in) and (ranks, outs), each reaching its own layer's
        outputs alone; no ranks for the plain base."""
        known = loaded.stacked.get(tuple(modules)) if loaded is not None else None
        if known is not None:
            return known
        sizes = layer_sizes({module: self.layers[module] for module in modules})
        outs = [out for _, out in sizes.values()]
        downs, ups, start = [torch.empty(0, sizes[modules[0]][0])], [torch.empty(0, sum(outs))], 0
        for module, out in zip(modules, outs, strict=True):
            if loaded is not None and (update := loaded.layers.get(module)) is not None:
                downs.append(update.A)
                ups.append(F.pad(update.B.T, (start, sum(outs) - start - out)))
            start += out
        both = torch.cat(downs), torch.cat(ups)
        if loaded is not None:
            loaded.stacked[tuple(modules)] = both
        return both


class _RowGroups:
    """Which rows of a batch go through which of the adapters that it has: those of each are multiplied together. None is the
    plain base."""

    def __init__(self, rows: Sequence[LoadedAdapter | None], places: Sequence[LoadedAdapter]) -> None:
        groups = [[row for row, loaded in enumerate(rows) if loaded is place] for place in places]
        most = max(map(len, groups))
        self.count, self.adapters = len(rows), len(places)
        self.taken = torch.tensor([row for group in groups for row in group + group[:1] * (most - len(group))])
        where = {row: place * most + i for place, group in enumerate(groups) for i, row in enumerate(group)}
        self.back = torch.tensor([where.get(row, 0) for row in range(len(rows))])
        self.plain = torch.tensor([[[loaded is None]] for loaded in rows])

    def add(self, out: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """To `out` (tokens, out), for each row its own part of `down` (adapters, ranks, in) and `up` (adapters, ranks, out) of
        `x` (tokens, in)."""
        each = x.float().view(self.count, -1, x.shape[1])
        grouped = each.index_select(0, self.taken).view(self.adapters, -1, x.shape[1])
        added = torch.bmm(torch.bmm(grouped, down.transpose(1, 2)), up).view(len(self.taken), -1, up.shape[2])
        return out.add_(added.index_select(0, self.back).masked_fill_(self.plain, 0).view(out.shape))


# (in, ranks) and (ranks, outs) of one adapter; of several (adapters, ranks, in) and (adapters, ranks, outs), and whose rows
LoraPart = tuple[torch.Tensor, torch.Tensor, _RowGroups | None]


class BatchedLora:
    """The updates of a batch's rows, as the products of a decoder add them; `names` are the layers of each product. Where rows
    come and go, only adapters that were not there are copied."""

    def __init__(self, bank: MultiLora, names: Sequence[Sequence[str]]) -> None:
        self.bank = bank
        self.names = list(names)
        self.rows: list[LoadedAdapter | None] = [None]
        self.parts: list[LoraPart | None] = [None] * len(self.names)
        self._stacks: list[tuple[torch.Tensor, torch.Tensor]] = []  # (places, ranks, in) and (places, ranks, outs)
        self._places: list[LoadedAdapter] = []  # whose updates lie there

    def set_rows(self, rows: Sequence[LoadedAdapter | None]) -> None:
        """Put row i of each batch through `rows[i]`, or the plain base. One entry stands for all rows of batches of any size."""
        rows = list(rows)
        if len(rows) == len(self.rows) and all(new is old for new, old in zip(rows, self.rows, strict=True)):
            return
        self.rows = rows
        if all(loaded is rows[0] for loaded in rows):
            self.parts, self._stacks, self._places = [self._single(names, rows[0]) for names in self.names], [], []
            return
        self._stack([loaded for loaded in dict.fromkeys(rows) if loaded is not None])
        own, count = _RowGroups(rows, self._places), len(self._places)
        self.parts = [(downs[:count], ups[:count], own) if downs.shape[1] else None for downs, ups in self._stacks]

    def _single(self, names: Sequence[str], loaded: LoadedAdapter | None) -> LoraPart | None:
        if loaded is None:
            return None
        down, up = self.bank.stacked(names, loaded)
        return (down.T, up, None) if len(down) else None

    def _stack(self, wanted: list[LoadedAdapter]) -> None:
        """Their updates one above the other; who is there already stays where it is, if that is within their number."""
        joined = {loaded: [self.bank.stacked(names, loaded) for names in self.names] for loaded in wanted}
        ranks = [max(len(parts[number][0]) for parts in joined.values()) for number in range(len(self.names))]
        if not self._stacks or any(
            len(downs) < len(wanted) or downs.shape[1] < rank
            for rank, (downs, _) in zip(ranks, self._stacks, strict=True)
        ):
            room = max(len(wanted), 2 * len(self._places))
            sizes = [(down.shape[1], up.shape[1]) for down, up in joined[wanted[0]]]
            self._stacks = [
                (torch.zeros(room, rank, into), torch.zeros(room, rank, out))
                for rank, (into, out) in zip(ranks, sizes, strict=True)
            ]
            self._places = []
        here = self._places[: len(wanted)]
        new = [loaded for loaded in wanted if loaded not in here]
        self._places = [loaded if loaded in wanted else new.pop(0) for loaded in here] + new
        for place, loaded in enumerate(self._places):
            if place < len(here) and here[place] is loaded:
                continue
            for stacks, parts in zip(self._stacks, joined[loaded], strict=True):
                for stack, part in zip(stacks, parts, strict=True):
                    stack[place, : len(part)] = part
                    stack[place, len(part) :] = 0


def _dense_weight(layer: Any) -> torch.Tensor:
    """(out, in)."""
    if type(layer.weight).__name__ in ("Params4bit", "Int8Params"):  # bitsandbytes'
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(layer)
    weight: torch.Tensor = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    return weight


def _make_hook(updates: Sequence[_LayerLora | None]) -> Callable[..., torch.Tensor] | None:
    """What a layer does for rows with these updates; None when there is nothing to do."""
    first = updates[0]
    if all(update is first for update in updates):
        return partial(_single_lora_hook, first) if first is not None else None
    some = [update for update in updates if update is not None]
    rank = max(len(update.A) for update in some)
    down = some[0].A.new_zeros(len(updates), rank, some[0].A.shape[1])
    up = some[0].B.new_zeros(len(updates), len(some[0].B), rank)
    stretch = some[0].B.new_zeros(len(updates), 1, len(some[0].B))
    for row, update in enumerate(updates):
        if update is not None:  # of the plain base, and beyond an update's rank, the zeros add nothing
            down[row, : len(update.A)] = update.A
            up[row, :, : len(update.A)] = update.B
            if update.dora_scale is not None:
                stretch[row] = update.dora_scale
    stretched = any(update.dora_scale is not None for update in some)
    return partial(_per_row_hook, down.transpose(1, 2), up.transpose(1, 2), stretch if stretched else None)


def _single_lora_hook(update: _LayerLora, layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    added = F.linear(F.linear(inputs[0].to(update.A.dtype), update.A), update.B)
    return _add_delta(layer, output, added, update.dora_scale)


def _per_row_hook(
    down: torch.Tensor, up: torch.Tensor, stretch: torch.Tensor | None, layer: Any, inputs: Any, output: torch.Tensor
) -> torch.Tensor:
    tokens = inputs[0].to(down.dtype)
    if tokens.dim() != 3 or len(tokens) != len(down):  # OPT, for one, strings the rows of a batch together
        raise MixedBatchError("This base does not keep the rows of a batch apart, so each adapter needs its own.")
    return _add_delta(layer, output, torch.bmm(torch.bmm(tokens, down), up), stretch)


def _add_delta(layer: Any, output: torch.Tensor, added: torch.Tensor, stretch: torch.Tensor | None) -> torch.Tensor:
    if stretch is not None:
        added = added + stretch * (output if layer.bias is None else output - layer.bias)
    return (output + added).to(output.dtype)
