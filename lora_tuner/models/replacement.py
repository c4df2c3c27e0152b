"""Forward hooks for the parts of an adapter that replace the base's: rows of tokens, whole copies.

Each row of a batch has its own. Surprise: an adapter may have tokens beyond the rows of the base,
which does not grow for it: ids are clamped for the base's own look-up, and the logits of such an
adapter have more columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import MixedBatchError

if TYPE_CHECKING:
    from peft import PeftModel

Rows = tuple[torch.Tensor, torch.Tensor]  # ids (rows,), ascending, and values (rows, size)


@dataclass(frozen=True, eq=False)
class Replacement:
    """In place of one module of the base: a copy with other weights, other rows, or both.

    Args:
        kind: embedding and head have one row for each token id.
        vocab_size: number of token ids that the adapter has rows for; 0 for other modules.
        module: the copy; None for the module of the base.
        rows: ids and values of single tokens.
        is_active: False while the base runs alone, in training.
    """

    kind: str  # embedding, head, other
    vocab_size: int = 0
    module: nn.Module | None = None
    rows: Rows | None = None
    is_active: Callable[[], bool] = lambda: True

    def apply(self, layer: nn.Module, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Output in place of the one that a module of the base has given."""
        if self.kind == "embedding":
            return self._embed(layer, inputs[0], output)
        if self.kind == "head":
            return self._logits(inputs[0], output)
        assert self.module is not None
        replaced: torch.Tensor = self.module(*inputs)
        return replaced

    def _embed(self, layer: nn.Module, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.module is not None:
            output = self.module(ids.clamp(max=len(self.module.get_parameter("weight")) - 1))
        if self.rows is None:
            return output
        own_ids, values = self.rows
        slots = torch.searchsorted(own_ids, ids).clamp(max=len(own_ids) - 1)
        embedded = F.embedding(slots, values.to(output.dtype))
        if (scale := getattr(layer, "embed_scale", None)) is not None:  # Gemma's, as PEFT applies it
            embedded = embedded * torch.as_tensor(scale).to(embedded)
        return torch.where((own_ids[slots] == ids)[..., None], embedded, output)

    def _logits(self, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.module is not None:
            output = self.module(hidden)
        if self.vocab_size > output.shape[-1]:
            output = F.pad(output, (0, self.vocab_size - output.shape[-1]))
        if self.rows is not None:
            ids, values = self.rows
            output = output.index_copy(-1, ids, F.linear(hidden, values.to(hidden.dtype)).to(output.dtype))
        return output[..., : self.vocab_size]


Replacements = dict[str, Replacement]  # full name of a module in the base -> what is in its place


@dataclass(eq=False)
class ReplacedHook:
    """Forward hook that applies `batch[i]` to row i of a batch, None for the plain base.

    A single entry, or the same one in all rows, applies to batches of any size. Logits of rows with
    fewer columns are filled with minus infinity.
    """

    batch: Sequence[Replacement | None]
    ids: torch.Tensor | None = field(default=None, init=False)  # before they were clamped

    @property
    def single(self) -> Replacement | None:
        """The replacement of all rows; None if they differ or it is not active."""
        first = self.batch[0]
        return first if first is not None and len(set(self.batch)) == 1 and first.is_active() else None

    def clamp(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Give the embedding of the base ids that it has rows for."""
        self.ids = inputs[0]
        return inputs[0].clamp(max=len(layer.get_parameter("weight")) - 1), *inputs[1:]

    def __call__(
        self, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        if output is inputs[0]:  # the head is skipped, and the loss applies the rows (`lm_head`)
            return None
        if self.ids is not None:
            inputs, self.ids = (self.ids, *inputs[1:]), None
        if len(set(self.batch)) == 1:
            single = self.single
            return None if single is None else single.apply(layer, inputs, output)
        if output.dim() < 2 or any(len(each) != len(self.batch) for each in (*inputs, output)):
            raise MixedBatchError(
                "This base flattens the rows of a batch, so all rows of a batch must share one adapter."
            )
        parts = []
        for replacement in dict.fromkeys(self.batch):
            index = [row for row, each in enumerate(self.batch) if each is replacement]
            part = output[index]
            if replacement is not None:
                part = replacement.apply(layer, [each[index] for each in inputs], part)
            parts.append((index, part))
        widest = max(part.shape[-1] for _, part in parts)
        mixed = output.new_full((*output.shape[:-1], widest), -torch.inf)
        for index, part in parts:
            mixed[index, ..., : part.shape[-1]] = part
        return mixed


def replacement_of(layer: nn.Module) -> Replacement | None:
    """The replacement that all rows of the next batch have for a module; None without one."""
    hooks = [hook for hook in layer._forward_hooks.values() if isinstance(hook, ReplacedHook)]
    return hooks[-1].single if hooks else None


def remove_hooks(layer: nn.Module) -> None:
    """Remove the hooks of an earlier adapter in training."""
    for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, ReplacedHook) or isinstance(getattr(hook, "__self__", None), ReplacedHook):
                del hooks[key]


def peft_rows(model: PeftModel) -> dict[str, torch.Tensor]:
    """Rows of trained tokens in a PEFT model, by their names on disk."""
    from peft.utils.other import TrainableTokensWrapper

    return {
        f"{name}.token_adapter.trainable_tokens_delta": wrapper.token_adapter.trainable_tokens_delta[
            each
        ].detach()
        for name, wrapper in model.named_modules()
        for each in model.peft_config
        if isinstance(wrapper, TrainableTokensWrapper) and not wrapper.token_adapter.tied_adapter
    }
