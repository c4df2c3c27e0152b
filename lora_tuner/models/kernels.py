"""Faster equivalents of transformers and PEFT operations for training.

- LoRA: the delta and its gradient are added in place to those of the base layer.
- Packed sequences: attention is computed per row, so nothing is computed only to be masked.
- Norms and activations: torch's fused modules replace those of transformers.

Surprise: models may compute more than these operations cover. So each one is tried on the model
first and left out where outputs differ; LoRA is fused on plain linear layers only. Limit: written
for the forward passes of transformers' own models.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLinear

VARLEN_ATTENTION = "lora_tuner_by_row"  # name of `_varlen_attention` inside transformers
_DROPOUT_ATTRIBUTES = ("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "layerdrop")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MAX_MMAP_THRESHOLD = 2**25  # bytes; glibc accepts no more


def fuse_modules(model: PreTrainedModel) -> None:
    """Use torch's own norms and activations where outputs are the same, and turn dropout off.

    A frozen base does not learn, so its dropout would only add noise to what LoRA layers see.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in _DROPOUT_ATTRIBUTES:
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
        if (fused := _fused_module(module)) is not None:
            model.set_submodule(name, fused)


def fuse_lora_add(layer: LoraLinear, adapter_name: str) -> None:
    """Replace the forward pass of a PEFT layer on a CPU by one that adds the delta in place.

    For plain LoRA without dropout on a plain linear layer; other layers stay as they are. On a
    bfloat16 base the delta is computed in bfloat16, where PEFT uses float32.
    """
    base = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D) or adapter_name in layer.lora_variant:
        return
    weight = base.get_parameter("weight")
    if (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and isinstance(layer.lora_dropout[adapter_name], nn.Identity)
    ):
        layer.forward = partial(  # type: ignore[method-assign]
            _fused_lora_forward, layer, type(layer).forward, adapter_name
        )


def has_full_attention(model: PreTrainedModel) -> bool:
    """True where every token attends to all before it, through torch's SDPA."""
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        config._attn_implementation == "sdpa"
        and layer_types == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and not getattr(config, "attention_chunk_size", None)
    )


def enable_varlen_attention(model: PreTrainedModel, *, on: bool = True) -> bool:
    """Make each packed row attend to itself alone; `on=False` undoes it.

    Batches must then have `cu_seq_lens_q` (`data.packing.collate`).

    Returns:
        False, with the model unchanged, where attention has windows or is not torch's own.
    """
    if on and not has_full_attention(model):
        return False
    model.config.get_text_config()._attn_implementation = VARLEN_ATTENTION if on else "sdpa"
    return on


@cache
def tune_malloc() -> None:
    """Make glibc keep freed memory. Call it once before training; further calls do nothing.

    By default large buffers go back to the system and return with a page fault per 4 kB in every
    step. Price: memory that was once used is held until the process ends. Other C libraries are
    left alone.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD)


class _FusedLora(torch.autograd.Function):
    """x W + b + scale (x A^T) B^T for a frozen W (in, out), A (rank, in), B (out, rank).

    The result is (tokens, out), whatever the shape of x (..., in).

    Operands of the low-rank products are laid out with the long side contiguous, which is twice as
    fast (the order of products is that of RunLoRA, arXiv:2312.03415).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        output = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        inner = lora_a @ flat.T  # (rank, tokens)
        output.addmm_(inner.T, lora_b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, lora_a, lora_b, inner)
        ctx.shape = x.shape
        ctx.scale = scale
        return output  # not a view: some models change it in place

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight, lora_a, lora_b, inner = ctx.saved_tensors
        grad_inner = (lora_b.T.contiguous() @ grad_output.T).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_output @ weight.T).addmm_(grad_inner.T, lora_a).view(ctx.shape)
        grad_b = (inner @ grad_output).mul_(ctx.scale).T.float()
        return grad_x, None, None, (grad_inner @ flat).float(), grad_b, None


def _fused_lora_forward(
    layer: LoraLinear,
    peft_forward: Callable[..., torch.Tensor],
    adapter_name: str,
    x: torch.Tensor,
    *args: object,
    **kwargs: object,
) -> torch.Tensor:
    if layer.disable_adapters or layer.merged or layer.active_adapters != [adapter_name] or args or kwargs:
        return peft_forward(layer, x, *args, **kwargs)
    base = layer.base_layer
    weight = base.weight if isinstance(base, Conv1D) else base.weight.T
    lora_a, lora_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    output = _FusedLora.apply(x, weight, base.bias, lora_a, lora_b, layer.scaling[adapter_name])
    return cast(torch.Tensor, output).view(*x.shape[:-1], -1)


def _fused_module(module: nn.Module) -> nn.Module | None:
    """A fused module of torch with the same outputs, or None."""
    if isinstance(module, NewGELUActivation):
        return nn.GELU(approximate="tanh")
    eps, weight = getattr(module, "variance_epsilon", None), getattr(module, "weight", None)
    if eps is None or weight is None or weight.dim() != 1:  # norms over heads have other shapes
        return None
    # Gated norms have more parameters or inputs.
    if [*dict(module.named_parameters())] != ["weight"] or len(signature(module.forward).parameters) != 1:
        return None
    norm = nn.RMSNorm(weight.shape, eps, device="meta")
    norm.weight = weight
    sample = torch.linspace(-2, 3, weight.numel(), device=weight.device, dtype=weight.dtype).expand(2, -1)
    return norm.eval() if same_outputs(norm(sample), module(sample)) else None


def same_outputs(outputs: torch.Tensor, expected: torch.Tensor) -> bool:
    """True where outputs differ by rounding at most."""
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2e-2
    difference = (outputs.float() - expected.float()).abs().max()
    return bool(difference <= tolerance * expected.float().abs().max())


def _varlen_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attention within rows that `cu_seq_lens_q` (rows + 1,) delimits in the batch laid end to end.

    Query, key and value are (batch, heads, length, head size).

    Returns:
        (batch, length, heads, head size), and None for the attention weights.
    """
    boundaries = kwargs.pop("cu_seq_lens_q", None)
    dtype = query.dtype
    if dtype == torch.bfloat16:  # twice as slow backward on a CPU as float32
        query, key, value = query.float(), key.float(), value.float()
    if boundaries is None:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)[0].to(dtype), None
    length = query.shape[2]
    outputs: list[list[torch.Tensor]] = [[] for _ in query]
    for start, end in pairwise(boundaries.tolist()):
        sequence, first = divmod(start, length)
        row = slice(sequence, sequence + 1), slice(None), slice(first, first + end - start)
        outputs[sequence].append(
            sdpa_attention_forward(module, query[row], key[row], value[row], None, **kwargs)[0]
        )
    return torch.cat([torch.cat(rows, 1) for rows in outputs]).to(dtype), None


def _skip_mask(**kwargs: object) -> None:
    """No mask: rows are delimited by `cu_seq_lens_q`.

    Padding is on the right, where causal rows never attend.
    """


AttentionInterface.register(VARLEN_ATTENTION, _varlen_attention)
AttentionMaskInterface.register(VARLEN_ATTENTION, _skip_mask)
