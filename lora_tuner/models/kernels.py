"""The same sums with fewer passes over memory: what a training step takes beyond its bare matrix products.

- The head: loss and gradient of the hidden states come from one pass over chunks of positions, so that the logits, by far
  the largest tensor of a step, never exist as a whole (as Liger does, arXiv:2410.10989, and Cut Cross-Entropy, 2411.09009).
- The update of a layer is added into the layer's own output, and its gradient likewise, in place.
- Packed rows attend within themselves alone, so that nothing is computed only to be masked.
- Norms and activations that transformers computes in many passes are replaced by torch's own.

Surprise: what a model does beyond these is not known here, so each is tried on the model first and left out where the
figures are not the same; but for the updates, which are for plain layers alone. Limit: every path is written for the
forward pass of transformers' own models.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

from ..data.packing import IGNORE_INDEX

CHUNK = 512  # positions whose logits exist at once
VARLEN_ATTENTION = "lora_tuner_by_row"  # name of our attention inside transformers


def fuse_modules(model: Any) -> None:
    """Give a base torch's own norms and activations where they say the same, and take its dropout away.

    A frozen base learns nothing, so its dropout would only blur what the update sees.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for dropout in ("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, dropout, None), float):
                setattr(module, dropout, 0.0)
        if (better := _fused_module(module)) is not None:
            model.set_submodule(name, better)


def _fused_module(module: nn.Module) -> nn.Module | None:
    """A module of torch's that does the same in one pass, or None."""
    if isinstance(module, NewGELUActivation):
        return nn.GELU(approximate="tanh")
    eps, weight = getattr(module, "variance_epsilon", None), getattr(module, "weight", None)
    alone = [name for name, _ in module.named_parameters()] == ["weight"] and len(
        signature(module.forward).parameters
    ) == 1
    if eps is None or weight is None or not alone or weight.dim() != 1:  # gated norms, and norms of each head
        return None
    norm = nn.RMSNorm(weight.shape, eps, device="meta")
    norm.weight = weight
    sample = torch.linspace(-2, 3, weight.numel(), device=weight.device, dtype=weight.dtype).expand(2, -1)
    return norm.eval() if _same_outputs(norm(sample), module(sample)) else None


def _same_outputs(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether they differ by rounding alone."""
    tolerance = 1e-5 if theirs.dtype == torch.float32 else 2e-2
    return bool((ours.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max())


class ChunkedLMHead:
    """The output head of a model, and the loss of the next tokens through it.

    Inside `left_out()` the model's `logits` are the hidden states that its head would have got, and `nll` takes them as such.
    A model whose logits are more than the product of hidden states and weights keeps its head, at the usual price.
    """

    def __init__(self, model: Any) -> None:
        self.module = model.get_output_embeddings()
        self._space = torch.empty(0)
        self.skipped = type(self.module) is nn.Linear and self.module.bias is None
        if self.skipped:
            ids = torch.arange(3, device=self.module.weight.device)[None] + len(self.module.weight) // 2
            training = model.training
            model.eval()  # dropout would change the figures, and use up random numbers
            with torch.no_grad():  # what a split base gathers in inference mode could not be trained on
                logits = model(input_ids=ids, use_cache=False).logits
                with self.skip_lm_head():
                    hidden = model(input_ids=ids, use_cache=False).logits
                self.skipped = _same_outputs(self.module(hidden.to(self.module.weight.dtype)), logits)
            model.train(training)

    @contextlib.contextmanager
    def skip_lm_head(self) -> Iterator[None]:
        """In the block, the model stops before its head."""
        if not self.skipped:
            yield
            return
        self.module.forward = _identity
        try:
            yield
        finally:
            del self.module.forward

    def nll(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of each next token, (batch, length), 0 where there is no label.

        `output` is what the model gave as logits within `left_out()`; `labels` is (batch, length), not shifted.
        """
        # The labels are shifted, not what predicts them: slicing that would copy the largest tensor of the step.
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        flat = output.flatten(0, 1)
        if self.skipped:
            flat = flat.to(self.module.weight.dtype)  # some models widen what comes out of their head
            nll: torch.Tensor = ChunkedCrossEntropy.apply(flat, self.module.weight, following, self._room(flat))
        else:
            nll = F.cross_entropy(flat.float(), following, ignore_index=IGNORE_INDEX, reduction="none")
        return nll.view(labels.shape)

    def _room(self, hidden: torch.Tensor) -> torch.Tensor:
        """Room for the logits of a chunk, kept: to get this much memory anew takes as long as to fill it."""
        if len(self._space) < min(CHUNK, len(hidden)):
            with torch.inference_mode(False):  # what is made in that mode could not be used outside it
                self._space = hidden.new_empty(min(CHUNK, len(hidden)), len(self.module.weight), dtype=torch.float32)
        return self._space


def _identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T`, per position, for a frozen weight. The gradient is made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, space: torch.Tensor
    ) -> torch.Tensor:
        known = labels != IGNORE_INDEX
        labels = labels.clamp(min=0)
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), len(space)):
            part = slice(start, start + len(space))
            likely = space[: len(hidden[part])]
            if hidden.dtype == likely.dtype:
                torch.mm(hidden[part], weight.T, out=likely)
            else:
                likely.copy_(hidden[part] @ weight.T)
            likely = torch.softmax(likely, 1, out=likely)
            nll[part] = -likely.gather(1, labels[part, None]).squeeze(1).log()
            if gradient is not None:
                torch.mm(likely.to(hidden.dtype), weight, out=gradient[part]).sub_(weight[labels[part]])
        lost = (nll > 60) & known  # float32 has few digits, and then none, for a probability this small
        if lost.any():
            nll[lost] = F.cross_entropy((hidden[lost] @ weight.T).float(), labels[lost], reduction="none")
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(known[:, None]))
        return nll.masked_fill_(~known, 0)

    @staticmethod
    def backward(ctx: Any, *of_nll: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * of_nll[0][:, None].to(gradient.dtype), None, None, None


def fuse_lora_add(layer: Any, adapter: str) -> None:
    """Let a PEFT layer on a CPU add its update into its output. Only for a plain update without dropout on a plain layer;
    others stay as they are. On a bfloat16 base the update is computed in bfloat16, where PEFT takes float32."""
    base = layer.base_layer
    plain = type(base) in (nn.Linear, Conv1D) and adapter not in layer.lora_variant
    known = plain and base.weight.device.type == "cpu" and base.weight.dtype in (torch.float32, torch.bfloat16)
    if known and isinstance(layer.lora_dropout[adapter], nn.Identity):
        layer.forward = partial(_fused_lora_forward, layer, type(layer).forward, adapter)


def _fused_lora_forward(
    layer: Any, theirs: Any, adapter: str, x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    if layer.disable_adapters or layer.merged or layer.active_adapters != [adapter] or args or kwargs:
        output: torch.Tensor = theirs(layer, x, *args, **kwargs)
        return output
    base = layer.base_layer
    weight = base.weight if isinstance(base, Conv1D) else base.weight.T
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    output = _LoraProduct.apply(x, weight, base.bias, down, up, layer.scaling[adapter])
    return output


class _LoraProduct(torch.autograd.Function):
    """x W + b + scale (x A^T) B^T for a frozen W (in, out), A (rank, in), B (out, rank).

    The narrow products stand so that their long side is contiguous, which the libraries are twice as fast at (the choice of
    graphs is that of RunLoRA, arXiv:2312.03415).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        down, up = down.to(x.dtype), up.to(x.dtype)
        output = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        inner = down @ flat.T
        output.addmm_(inner.T, up.T, alpha=scale)
        ctx.save_for_backward(flat, weight, down, up, inner)
        ctx.scale = scale
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *of_output: Any) -> Any:
        flat, weight, down, up, inner = ctx.saved_tensors
        g = of_output[0].reshape(-1, of_output[0].shape[-1])
        of_inner = (up.T.contiguous() @ g.T).mul_(ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (g @ weight.T).addmm_(of_inner.T, down).view(*of_output[0].shape[:-1], -1)
        return of_x, None, None, (of_inner @ flat).float(), (inner @ g).mul_(ctx.scale).T.float(), None


def dense_attention(model: Any) -> bool:
    """Whether every token looks back on all before it, by torch's own attention."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return config._attn_implementation == "sdpa" and kinds == {"full_attention"} and not any(windows)


def enable_varlen_attention(model: Any, *, on: bool = True) -> bool:
    """Let packed rows attend within themselves, told apart by `cu_seq_lens_q`, or no more. False, and nothing done, for a
    model that attends through windows or by means other than torch's own."""
    if on and not dense_attention(model):
        return False
    model.config._attn_implementation = VARLEN_ATTENTION if on else "sdpa"
    return on


def _varlen_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """(batch, heads, length, size) each; gives (batch, length, heads, size)."""
    bounds = kwargs.pop("cu_seq_lens_q", None)
    dtype = query.dtype
    if dtype == torch.bfloat16:  # torch's own is twice as slow backward in it on a CPU as in float32
        query, key, value = query.float(), key.float(), value.float()
    if bounds is None:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)[0].to(dtype), None
    length = query.shape[2]
    lines: list[list[torch.Tensor]] = [[] for _ in query]
    ends = bounds.tolist()
    for start, end in pairwise(ends):
        line, first = divmod(start, length)
        part = slice(line, line + 1), slice(None), slice(first, first + end - start)
        lines[line].append(sdpa_attention_forward(module, query[part], key[part], value[part], None, **kwargs)[0])
    return torch.cat([torch.cat(parts, 1) for parts in lines]).to(dtype), None


def _skip_mask(**kwargs: Any) -> None:
    """Rows are told apart by where they begin, and padding stands on the right, where no row looks."""


AttentionInterface.register(VARLEN_ATTENTION, _varlen_attention)
AttentionMaskInterface.register(VARLEN_ATTENTION, _skip_mask)


def tune_malloc() -> None:
    """Let glibc keep what is freed: it would give it back and get it again, a page fault for each 4 kB, in every step."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library, which does as it does
            libc = ctypes.CDLL("libc.so.6")
            trim_threshold, mmap_threshold = -1, -3
            libc.mallopt(trim_threshold, 2**31 - 1)
            libc.mallopt(mmap_threshold, 2**25)  # the most that it takes
