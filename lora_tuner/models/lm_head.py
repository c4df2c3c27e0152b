"""Output head and loss, computed in chunks of positions.

The logits, by far the largest tensor of a step, never exist as a whole (as in Liger,
arXiv:2410.10989, and Cut Cross-Entropy, arXiv:2411.09009). Rows of single tokens that an adapter
has in place of the head's own (`replaced`) are trained without a gradient for the whole head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..data.packing import IGNORE_INDEX
from .kernels import same_outputs
from .native import native_for
from .replacement import Rows, replacement_of

CHUNK = 512  # positions whose logits exist at once
VOCABULARY_SLICE = 1536


class ChunkedLMHead:
    """Output head of a model, with a next-token loss that never holds all logits at once.

    Inside `skip_lm_head()` the `logits` of the model are the hidden states before its head, and
    `nll` expects those. A model whose logits are more than hidden states times weights keeps its
    head and computes all logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        self.module: nn.Linear = getattr(head, "original_module", head)  # in PEFT's wrapper
        self.skipped = type(self.module) is nn.Linear and self.module.bias is None
        self._buffer = torch.empty(0)
        if self.skipped:
            ids = torch.arange(3, device=self.module.weight.device)[None] + len(self.module.weight) // 2
            training = model.training
            model.eval()  # dropout would change outputs and consume random numbers
            with torch.no_grad():  # FSDP could not train on parameters gathered in inference mode
                logits = model(input_ids=ids, use_cache=False).logits
                with self.skip_lm_head():
                    hidden = model(input_ids=ids, use_cache=False).logits
                self.skipped = same_outputs(self.module(hidden.to(self.module.weight.dtype)), logits)
            model.train(training)

    @contextlib.contextmanager
    def skip_lm_head(self) -> Iterator[None]:
        """Make the model return hidden states as `logits` inside the block."""
        if self.skipped:
            self.module.forward = nn.Identity().forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            if self.skipped:
                del self.module.forward

    def nll(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the negative log-likelihood of each next token.

        Args:
            output: `logits` of the model inside `skip_lm_head()`, (batch, length, hidden size or
                vocabulary).
            labels: (batch, length), not shifted; IGNORE_INDEX where there is nothing to predict.

        Returns:
            Nats, (batch, length), 0 where there is no label.
        """
        # Labels are shifted instead of outputs: slicing would copy the largest tensor of the step.
        next_tokens = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        flat = output.flatten(0, 1)
        if self.skipped:
            weight, rows, width = self.module.weight, None, len(self.module.weight)
            if (replacement := replacement_of(self.module)) is not None:
                rows, width = replacement.rows, replacement.vocab_size
                if replacement.module is not None:
                    weight = replacement.module.get_parameter("weight")
                weight = weight[:width]
            flat = flat.to(weight.dtype)  # some models upcast the output of their head
            ids, values = rows if rows else (None, None)
            nll: torch.Tensor = ChunkedCrossEntropy.apply(
                flat, weight, next_tokens, self._logits(flat, width), ids, values
            )
        else:
            nll = F.cross_entropy(flat.float(), next_tokens, ignore_index=IGNORE_INDEX, reduction="none")
        return nll.view(labels.shape)

    def _logits(self, hidden: torch.Tensor, width: int) -> torch.Tensor:
        """Buffer for the logits of a chunk, kept: allocating it takes as long as filling it."""
        if len(self._buffer) < min(CHUNK, len(hidden)) or self._buffer.shape[1] != width:
            with torch.inference_mode(False):  # else usable in that mode alone
                self._buffer = hidden.new_empty(
                    min(CHUNK, len(hidden)),
                    width,
                    dtype=hidden.dtype if native_for(hidden) else torch.float32,
                )
        return self._buffer


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T` per position, for a frozen weight but for single rows.

    The gradient is computed in the forward pass, chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        buffer: torch.Tensor,
        ids: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy in nats.

        Args:
            ctx: autograd context.
            hidden: (positions, hidden size).
            weight: (rows, hidden size).
            labels: (positions,), IGNORE_INDEX where the result is 0.
            buffer: (chunk, vocabulary) in float32 or that of hidden, overwritten.
            ids: rows of the vocabulary that are not those of `weight`, or that it lacks; (k,).
            values: these rows, (k, hidden size).

        Returns:
            (positions,) in float32.
        """
        rows = (ids, values.to(hidden.dtype)) if ids is not None and values is not None else None
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        columns = hidden.new_empty(len(hidden), len(rows[0])) if rows and any(ctx.needs_input_grad) else None
        has_label = labels != IGNORE_INDEX
        native = native_for(hidden) if buffer.dtype == hidden.dtype else None
        for start in range(0, len(hidden), len(buffer)):
            chunk = slice(start, start + len(buffer))
            logits = _write_logits(hidden[chunk], weight, rows, buffer[: len(hidden[chunk])])
            chunk_labels = labels[chunk]
            if native is not None:
                with_gradient = int(any(ctx.needs_input_grad))
                native.call(
                    "cross_entropy", hidden.dtype, logits, chunk_labels, nll[chunk], *logits.shape, with_gradient
                )
            else:
                chunk_labels = chunk_labels.clamp(min=0)
                torch.softmax(logits, 1, out=logits)
                nll[chunk] = -logits.gather(1, chunk_labels[:, None]).squeeze(1).log()
            if columns is not None and rows is not None:
                if native is None:  # the native kernel has subtracted 1 at the label
                    logits[torch.arange(len(logits), device=logits.device), chunk_labels] -= 1
                columns[chunk] = logits[:, rows[0]].to(hidden.dtype)
                logits[:, rows[0]] = 0
            if gradient is None:
                continue
            if native is not None:
                gradient[chunk] = _sum_over_vocabulary(logits[:, : len(weight)], weight)
            else:
                torch.mm(logits[:, : len(weight)].to(hidden.dtype), weight, out=gradient[chunk])
                if columns is None:
                    gradient[chunk].sub_(weight[chunk_labels])
            if columns is not None and rows is not None:
                gradient[chunk] += columns[chunk] @ rows[1]
        if native is None:
            imprecise = (nll > 60) & has_label  # too small for the precision of float32
            if imprecise.any():
                exact = hidden.new_empty(int(imprecise.sum()), buffer.shape[1], dtype=torch.float32)
                _write_logits(hidden[imprecise], weight, rows, exact)
                nll[imprecise] = F.cross_entropy(exact, labels[imprecise], reduction="none")
            if gradient is not None:
                gradient.mul_(has_label[:, None])
            if columns is not None:
                columns.mul_(has_label[:, None])
            nll = nll.masked_fill_(~has_label, 0)
        ctx.save_for_backward(gradient, columns, hidden if columns is not None else None)
        return nll

    @staticmethod
    def backward(
        ctx: Any, grad_nll: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None, None, None, torch.Tensor | None]:
        gradient, columns, hidden = ctx.saved_tensors
        grad_values = None
        if columns is not None and ctx.needs_input_grad[5]:
            grad_values = ((columns * grad_nll[:, None].to(columns.dtype)).T @ hidden).float()
        if gradient is not None:
            gradient = gradient * grad_nll[:, None].to(gradient.dtype)
        return gradient, None, None, None, None, grad_values


def _write_logits(
    hidden: torch.Tensor, weight: torch.Tensor, rows: Rows | None, out: torch.Tensor
) -> torch.Tensor:
    """Write `hidden @ weight.T`, with the columns of single rows, into (positions, vocabulary)."""
    whole = out if out.shape[1] == len(weight) else out[:, : len(weight)]
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=whole)
    else:
        whole.copy_(hidden @ weight.T)
    if rows is not None:
        ids, values = rows
        out[:, ids] = (hidden @ values.T).to(out.dtype)
    return out


def _sum_over_vocabulary(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`gradient @ weight`, (positions, vocabulary) @ (vocabulary, hidden size).

    In slices of the vocabulary in bfloat16, where one product takes 1.6 times as long.
    """
    if gradient.dtype == torch.float32:
        return gradient @ weight
    total = torch.zeros(len(gradient), weight.shape[1])
    for slice_of_gradient, slice_of_weight in zip(
        gradient.split(VOCABULARY_SLICE, 1), weight.split(VOCABULARY_SLICE), strict=True
    ):
        total += slice_of_gradient @ slice_of_weight
    return total
