"""Check on the loaded base that no token sees a later one, or one of another row in its sequence;
and that faster forward passes compute the same.

The gradient of logits in the embeddings of tokens that they do not depend on is exactly zero, in
any dtype and quantization. It does not see a discrete dependence, such as routing by argmax or by
the capacity of experts: only logits do, which rounding changes a little. Those of a few tokens are
compared with fewer tokens after them in float32 alone; alone and packed with others, for position
ids, in any dtype.
"""

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from ..data import packing, tokenization
from ..errors import BaseModelError
from . import fsdp, fused_blocks, kernels, native
from .fused_linear import Lora
from .loading import LoadedBase


@dataclass(frozen=True)
class FastPaths:
    """Fast paths that a model takes for packed rows: rows give what they would give alone
    (`isolated`), each attends to itself alone by `cu_seq_lens_q` (`varlen_attention`), blocks are
    fused (`kernels`, their build)."""

    isolated: bool
    varlen_attention: bool
    kernels: str | None


def enable_fast_paths(base: LoadedBase) -> FastPaths:
    """Enable on a base what computes the same faster on a CPU, for training and measuring.

    Raises:
        BaseModelError: it is not a causal language model.
    """
    isolated = packing_is_isolated(base)
    varlen_attention = base.device.type == "cpu" and isolated and try_varlen_attention(base)
    return FastPaths(isolated, varlen_attention, try_fused_blocks(base) if varlen_attention else None)


def _run_packed(base: LoadedBase, *rows: tokenization.TokenIds, cu_seqlens: bool = False) -> torch.Tensor:
    """Return the logits of rows in one sequence: (tokens, vocabulary)."""
    batch = packing.collate([rows], base.tokenizer.pad_token_id, cu_seqlens=cu_seqlens)
    inputs = {name: tensor.to(base.device) for name, tensor in batch.items() if name != "labels"}
    return cast("torch.Tensor", base.model(**inputs, use_cache=False).logits[0])


def _packed_logits(base: LoadedBase, *rows: tokenization.TokenIds, cu_seqlens: bool = False) -> torch.Tensor:
    """Return `_run_packed` in float32, on the CPU, without gradients."""
    with torch.no_grad():
        return _run_packed(base, *rows, cu_seqlens=cu_seqlens).float().cpu()


def _is_exact(base: LoadedBase) -> bool:
    return base.dtype == torch.float32 and base.load_in != "8bit"  # 8 bits round activations too


def _logits_differ(base: LoadedBase, logits: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = (1e-3 if _is_exact(base) else 5e-2) * float(expected.abs().max())
    return bool((logits - expected).abs().max() > tolerance)


def _depends(base: LoadedBase, rows: list[tokenization.TokenIds], logits: slice, tokens: slice) -> bool:
    """Return whether logits of packed rows have a gradient in the embeddings of other tokens."""
    embeddings: list[torch.Tensor] = []

    def track(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # models scale it in place

    handle = base.model.get_input_embeddings().register_forward_hook(track)
    try:
        with torch.enable_grad():
            selected = _run_packed(base, *rows)[logits].float()
            # Weights differ, since the sum of normalized logits might be constant.
            weights = torch.linspace(-1, 1, selected.numel(), device=selected.device).view_as(selected)
            (gradient,) = torch.autograd.grad((selected * weights).sum(), embeddings[:1])
    finally:
        handle.remove()
    return bool((gradient[0, tokens].abs() > 0).any())  # not for NaN, which is reported later


def packing_is_isolated(base: LoadedBase) -> bool:
    """Return whether packed rows have the logits they have alone. Some models ignore position ids.

    Raises:
        BaseModelError: the model sees tokens that come later, or how many there are, so a loss
            would be meaningless. Their number is not tried where rounding might look like it.
    """
    first, second = base.probe_sequences()
    if _depends(base, [second], slice(-1), slice(-1, None)):
        raise BaseModelError(f"{base.files.name} sees tokens that come later: it is not a causal language model.")
    alone = _packed_logits(base, second)
    half = len(second) // 2
    if _is_exact(base) and _logits_differ(base, _packed_logits(base, second[:half]), alone[:half]):
        raise BaseModelError(
            f"{base.files.name} gives the first tokens of a longer row other logits: it is not a causal language model."
        )
    start = len(first)
    if _depends(base, [first, second], slice(start, None), slice(start)):
        return False
    return not _logits_differ(base, _packed_logits(base, first, second)[start:], alone)


def try_varlen_attention(base: LoadedBase) -> bool:
    """Compute the attention of packed rows row by row, if the logits stay the same."""
    rows = base.probe_sequences()
    before = _packed_logits(base, *rows)
    if not kernels.enable_varlen_attention(base.model):
        return False
    with contextlib.suppress(TypeError):  # a model without `cu_seq_lens_q`
        if not _logits_differ(base, _packed_logits(base, *rows, cu_seqlens=True), before):
            return True
    kernels.enable_varlen_attention(base.model, on=False)
    return False


def try_fused_blocks(base: LoadedBase) -> str | None:
    """Fuse the decoder blocks, if outputs and gradients of each stay the same, with LoRA.

    Blocks are compared one by one: over many, gradients of rounding errors grow without bounds.

    Args:
        base: the base, with varlen attention.

    Returns:
        The build of the kernels; None, with the model unchanged, where there are none or they differ.
    """
    if fsdp.shard_count() > 1 or not fused_blocks.enable_fused_blocks(base.model):
        return None
    batch = packing.collate([base.probe_sequences()], base.tokenizer.pad_token_id, cu_seqlens=True)
    del batch["labels"]
    generator = torch.Generator().manual_seed(0)
    blocks, same = fused_blocks.fused_blocks(base.model), list[bool]()
    with contextlib.ExitStack() as stack:
        for block in blocks:
            for group, layers in zip(block.groups, block.linear_groups(), strict=True):
                for layer, size_out in zip(layers, group.outs, strict=True):
                    sizes = ((2, group.size_in), (size_out, 2))
                    a, b = (torch.randn(size, generator=generator).div_(10).requires_grad_() for size in sizes)
                    stack.enter_context(layer.register_forward_hook(Lora(a, b)))
            block.layer.forward = partial(_compare, block, same)
            stack.callback(setattr, block.layer, "forward", block)
        base.model(**batch, use_cache=False)
    fused_blocks.update_fused_blocks(base.model)
    if len(same) < len(blocks) or not all(same):
        fused_blocks.disable_fused_blocks(base.model)
        return None
    kernels = native.native_kernels()
    return kernels.build if kernels else None


def _compare(
    block: fused_blocks.Block, same: list[bool], hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Run both forward passes of a layer, note whether they agree, and return the layer's own output."""
    outputs: list[list[torch.Tensor]] = []
    for forward in (block, block.own):
        with torch.enable_grad():
            x = hidden.detach().requires_grad_()
            output = forward(x, *args, **kwargs)
            weights = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
            gradients = torch.autograd.grad((output * weights).sum(), [x, *block.parameters()])
        outputs.append([output.detach(), *gradients])
    tolerance = 1e-3 if hidden.dtype == torch.float32 else 0.2
    same.append(
        all((one - other).norm() <= tolerance * other.norm() for one, other in zip(*outputs, strict=True))
    )
    return outputs[1][0]
