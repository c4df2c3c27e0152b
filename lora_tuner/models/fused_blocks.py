"""Decoder blocks for training on a CPU, forward and backward by hand, of Llama's kind and GPT-2.

In bfloat16 transformers' layers spend two thirds of a step outside matrix products: attention in
float32, norms, rotary embeddings, activations, copies, LoRA's second pass over each output. Here

- layers that share their input are one product, with their LoRA (`fused_linear`);
- attention is one product for each key-value head, within each packed row;
- all else is a few kernels in C (`native`).

Surprise: each block replaces the forward pass of a layer of transformers only where it computes the
same, which is checked on the model itself; with a mask, a cache or hooks the layer's own runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ..data.packing import LENGTH_STEP, round_up
from .fused_linear import LinearGroup, is_plain
from .kernels import VARLEN_ATTENTION
from .native import NativeKernels, native_kernels

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "GPT2Block")
KEPT_LENGTH = 512  # probabilities of longer rows are computed again in the backward pass
UNSUPPORTED_INPUTS = ("attention_mask", "past_key_values", "encoder_hidden_states")

# q, k and v of all tokens, each (tokens * heads * head size,): all heads of a row, then the next row.
_Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def enable_fused_blocks(model: PreTrainedModel) -> bool:
    """Replace the forward pass of all decoder layers. Where it is so already, nothing is done.

    Returns:
        False, with the model unchanged, where there are no kernels or a layer is of another kind.
    """
    kernels = native_kernels()
    layers = _decoder_layers(model)
    if kernels is None or not layers or not all(_is_supported(layer) for layer in layers):
        return False
    if not fused_blocks(model):
        for layer in layers:
            layer.forward = Block(layer, kernels)
    return True


def disable_fused_blocks(model: PreTrainedModel) -> None:
    """Undo `enable_fused_blocks`."""
    for block in fused_blocks(model):
        del block.layer.forward


def fused_blocks(model: PreTrainedModel) -> list[Block]:
    """The blocks of a model; none where they are not enabled."""
    return [vars(layer)["forward"] for layer in _decoder_layers(model) if "forward" in vars(layer)]


def update_fused_blocks(model: PreTrainedModel) -> None:
    """Take over the present LoRA weights, or that there are none, as each forward pass does."""
    for block in fused_blocks(model):
        block.update()


def packs_rows(model: PreTrainedModel) -> bool:
    """Return whether blocks are fused, which keep packed rows apart by their boundaries."""
    is_by_row = model.config.get_text_config()._attn_implementation == VARLEN_ATTENTION
    return is_by_row and bool(fused_blocks(model))


def _decoder_layers(model: PreTrainedModel) -> list[Any]:
    return [layer for layer in model.modules() if type(layer).__name__ in LAYERS]


def _is_gpt2(layer: Any) -> bool:
    return type(layer).__name__ == "GPT2Block"


def _is_supported(layer: Any) -> bool:
    x = torch.linspace(-4, 4, 33)
    if _is_gpt2(layer):
        found, expected = layer.mlp.act(x), F.gelu(x, approximate="tanh")
    else:
        found, expected = layer.mlp.act_fn(x), F.silu(x)
    return (
        torch.allclose(found, expected, atol=1e-5)
        and not hasattr(layer, "crossattention")
        and all(is_plain(module) for group in _linear_groups(layer) for module in group)
    )


def _linear_groups(layer: Any) -> list[list[nn.Module]]:
    """Linear layers that share their input: attention in and out, MLP in and out."""
    if _is_gpt2(layer):
        return [[layer.attn.c_attn], [layer.attn.c_proj], [layer.mlp.c_fc], [layer.mlp.c_proj]]
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


@dataclass(frozen=True)
class _Rows:
    """Rows of a batch laid end to end for attention, each with room for a padded length.

    `ends` are the boundaries of this layout. `table` (tokens, 3) has for each token the start and
    padded length of its row there, and its position in the row.
    """

    ends: list[int]
    table: torch.Tensor


@lru_cache(maxsize=1)  # shared by all layers
def _find_rows(boundaries: torch.Tensor | None, count: int, length: int) -> _Rows:
    """Rows of `count` sequences: those between the boundaries, else each sequence."""
    ends = [*range(0, count * length + 1, length)] if boundaries is None else boundaries.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    padded = [_padded_length(length) for length in lengths]
    padded_ends = [0, *accumulate(padded)]
    columns = torch.tensor([padded_ends[:-1], padded]).repeat_interleave(torch.tensor(lengths), 1)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return _Rows(padded_ends, torch.stack([*columns, positions], 1))


def _padded_length(length: int) -> int:
    """Round the length of a row up, by at most an eighth beyond LENGTH_STEP: see there."""
    return round_up(length, max(LENGTH_STEP, 1 << max(length.bit_length() - 4, 0)))


class Block:
    """Forward pass of a decoder layer: its linear layers in groups, its norms and sizes.

    `own` is the layer's own forward pass.
    """

    def __init__(self, layer: Any, kernels: NativeKernels) -> None:
        self.kernels, self.layer, self.own = kernels, layer, layer.forward
        self.argument_names = [*signature(layer.forward).parameters][1:]
        self.groups = [LinearGroup(group, kernels) for group in _linear_groups(layer)]
        self.llama = not _is_gpt2(layer)
        attention = layer.self_attn if self.llama else layer.attn
        names: tuple[str, ...] = (
            ("input_layernorm", "post_attention_layernorm") if self.llama else ("ln_1", "ln_2")
        )
        self.norms = [getattr(layer, name) for name in names]
        names = ("q_norm", "k_norm") if hasattr(attention, "q_norm") else ()
        self.head_norms = [getattr(attention, name) for name in names]
        self.head_size, self.scaling = attention.head_dim, float(attention.scaling)
        self.dtype, self.hidden_size = self.groups[0].dtype, self.groups[0].size_in
        self.heads = self.groups[1].size_in // self.head_size
        self.kv_heads = (self.groups[0].size_out // self.head_size - self.heads) // 2

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(batch, length, hidden size) -> the same."""
        inputs = dict(zip(self.argument_names, args, strict=False)) | kwargs
        if any(inputs.get(name) is not None for name in UNSUPPORTED_INPUTS) or not self.update():
            output: torch.Tensor = self.own(hidden, *args, **kwargs)
            return output
        count, length, _ = hidden.shape
        rows = _find_rows(inputs.get("cu_seq_lens_q"), count, length)
        cos = sin = None
        if (rotation := inputs.get("position_embeddings")) is not None:
            cos, sin = (part.expand(count, -1, -1).reshape(count * length, -1) for part in rotation)

        def run(hidden: torch.Tensor) -> torch.Tensor:
            return _BlockFunction.apply(hidden, self, rows, cos, sin, *self.parameters())  # type: ignore[no-any-return]

        if self.layer.gradient_checkpointing and self.layer.training:
            return self.layer._gradient_checkpointing_func(run, hidden)  # type: ignore[no-any-return]
        return run(hidden)

    def update(self) -> bool:
        """Take over the present LoRA weights. Returns False where there is more than plain LoRA."""
        modules = self.linear_groups()
        linear = {module for group in modules for module in group}
        others = (module for module in self.layer.modules() if module not in linear)
        has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in others)
        return not has_hooks and all(
            group.update(layers) for group, layers in zip(self.groups, modules, strict=True)
        )

    def linear_groups(self) -> list[list[nn.Module]]:
        """The layers of each group, PEFT's where it has wrapped them."""
        return _linear_groups(self.layer)

    def parameters(self) -> list[torch.Tensor]:
        return [tensor for group in self.groups for tensor in group.parameters()]

    def call(self, name: str, *arguments: torch.Tensor | float | None) -> None:
        self.kernels.call(name, self.dtype, *arguments)

    def norm(self, number: int, x: torch.Tensor, group: LinearGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalized x as input of a group, and what the backward pass needs."""
        module, out = self.norms[number], group.new_input(len(x))
        weight, eps = module.weight.detach(), _eps(module)
        size, ld = x.shape[1], out.shape[1]
        if self.llama:
            stats = torch.empty(len(x))
            self.call("rms_norm", x, weight, out, stats, len(x), size, ld, eps)
        else:
            stats = torch.empty(len(x), 2)
            self.call("layer_norm", x, weight, module.bias.detach(), out, stats, len(x), size, ld, eps)
        return out, stats

    def norm_backward(
        self,
        number: int,
        grad: torch.Tensor,
        x: torch.Tensor,
        stats: torch.Tensor,
        residual: torch.Tensor,
        dx: torch.Tensor,
    ) -> None:
        """Write the gradient through a norm plus that of the residual into the first columns."""
        name = "rms_norm_backward" if self.llama else "layer_norm_backward"
        weight, sizes = self.norms[number].weight.detach(), (*x.shape, residual.stride(0), dx.stride(0))
        self.call(name, grad, x, weight, stats, residual, dx, *sizes)

    def activate(self, up: torch.Tensor) -> torch.Tensor:
        """Activation of the MLP, as input of its last layer."""
        group, name = self.groups[3], "swiglu" if self.llama else "gelu"
        out = group.new_input(len(up))
        self.call(name, up, out, len(up), group.size_in, out.shape[1])
        return out

    def attend(self, heads: _Heads, rows: _Rows) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Attention within rows, laid out as q, and the probabilities of short rows."""
        out, kept = torch.empty_like(heads[0]), []
        for query, key, value, result in self._by_row(rows, *heads, out):
            probabilities = self._probabilities(query, key)
            torch.bmm(probabilities, value, out=result)
            if key.shape[1] <= KEPT_LENGTH:
                kept.append(probabilities)
        return out, kept

    def attend_backward(
        self, grad: torch.Tensor, heads: _Heads, kept: Sequence[torch.Tensor], rows: _Rows
    ) -> list[torch.Tensor]:
        """Gradients of q, k and v."""
        d_heads, kept_of_row = [torch.empty_like(part) for part in heads], iter(kept)
        for views in self._by_row(rows, *heads, grad, *d_heads):
            query, key, value, grad_out, d_query, d_key, d_value = views
            length = key.shape[1]
            is_kept = length <= KEPT_LENGTH
            probabilities = next(kept_of_row) if is_kept else self._probabilities(query, key)
            torch.bmm(probabilities.transpose(1, 2), grad_out, out=d_value)
            d_scores = torch.bmm(grad_out, value.transpose(1, 2))
            self.call("causal_softmax_backward", probabilities, d_scores, self.heads, length)
            torch.bmm(d_scores, key, out=d_query)
            torch.bmm(d_scores.transpose(1, 2), query, out=d_key)
        return d_heads

    def _probabilities(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        scores = torch.bmm(query, key.transpose(1, 2))
        self.call("causal_softmax", scores, self.heads, key.shape[1])
        return scores

    def _by_row(self, rows: _Rows, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Views (kv heads, queries or keys, head size) of each row."""
        per_token = [len(tensor) // rows.ends[-1] for tensor in tensors]
        for start, end in pairwise(rows.ends):
            yield tuple(
                tensor[start * width : end * width].view(self.kv_heads, -1, self.head_size)
                for tensor, width in zip(tensors, per_token, strict=True)
            )


def _eps(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        block: Block,
        rows: _Rows,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        *lora: torch.Tensor,
    ) -> torch.Tensor:
        """(sequences, length, hidden size) -> the same; LoRA weights are inputs for autograd alone."""
        qkv_group, out_group, up_group, down_group = block.groups
        heads, kv_heads, head = block.heads, block.kv_heads, block.head_size
        x = hidden.reshape(-1, block.hidden_size)
        tokens = len(x)
        normed, stats = block.norm(0, x, qkv_group)
        qkv = qkv_group.forward(normed)
        before_norm, head_stats = None, None
        if block.head_norms:
            before_norm, head_stats = qkv.clone(), torch.empty(tokens, heads + kv_heads)
            weights = [norm.weight.detach() for norm in block.head_norms]
            block.call(
                "head_norm", qkv, *weights, head_stats, tokens, heads, kv_heads, head, _eps(block.head_norms[0])
            )
        q, k, v = (qkv.new_zeros(rows.ends[-1] * count * head) for count in (heads, kv_heads, kv_heads))
        block.call(
            "split_heads", qkv, cos, sin, rows.table, q, k, v, tokens, heads, kv_heads, head, block.scaling
        )
        by_row, probabilities = block.attend((q, k, v), rows)
        attended = out_group.new_input(tokens)
        block.call("from_heads", by_row, rows.table, attended, tokens, heads, head, attended.shape[1])
        middle = out_group.forward(attended, x)
        normed_2, stats_2 = block.norm(1, middle, up_group)
        up = up_group.forward(normed_2)
        out = down_group.forward(block.activate(up), middle)
        ctx.block, ctx.rows, ctx.shape = block, rows, hidden.shape
        ctx.save_for_backward(
            x, normed, stats, before_norm, head_stats, cos, sin, q, k, v, attended, middle, normed_2, stats_2, up,
            *probabilities,
        )  # fmt: skip
        return out.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        block, rows = ctx.block, ctx.rows
        (
            x, normed, stats, before_norm, head_stats, cos, sin, q, k, v, attended, middle, normed_2, stats_2, up,
            *probabilities,
        ) = ctx.saved_tensors  # fmt: skip
        qkv_group, out_group, up_group, down_group = block.groups
        heads, kv_heads, head, tokens = block.heads, block.kv_heads, block.head_size, len(x)
        d_out = down_group.new_gradient(tokens)
        d_out[:, : block.hidden_size] = grad.reshape(tokens, -1)
        inner = block.activate(up)  # cheaper to compute than to keep
        down_group.fill_padding(inner)
        d_inner, down_lora = down_group.backward(d_out, inner)
        d_up = up_group.new_gradient(tokens)
        name = "swiglu_backward" if block.llama else "gelu_backward"
        block.call(name, d_inner, up, d_up, tokens, down_group.size_in, d_up.shape[1])
        d_normed, up_lora = up_group.backward(d_up, normed_2)
        d_middle = out_group.new_gradient(tokens)
        block.norm_backward(1, d_normed, middle, stats_2, d_out, d_middle)
        d_attended, out_lora = out_group.backward(d_middle, attended)
        by_row = torch.zeros_like(q)
        block.call("to_heads", d_attended, rows.table, by_row, tokens, heads, head, heads * head)
        d_heads = block.attend_backward(by_row, (q, k, v), probabilities, rows)
        d_qkv = qkv_group.new_gradient(tokens)
        ld = d_qkv.shape[1]
        block.call(
            "split_heads_backward",
            *d_heads,
            cos,
            sin,
            rows.table,
            d_qkv,
            tokens,
            heads,
            kv_heads,
            head,
            ld,
            block.scaling,
        )
        if block.head_norms:
            weights = [norm.weight.detach() for norm in block.head_norms]
            block.call(
                "head_norm_backward", d_qkv, before_norm, *weights, head_stats, tokens, heads, kv_heads, head, ld
            )
        d_normed, qkv_lora = qkv_group.backward(d_qkv, normed, needs_x=ctx.needs_input_grad[0])
        d_x = None
        if d_normed is not None:
            d_x = torch.empty_like(x)
            block.norm_backward(0, d_normed, x, stats, d_middle, d_x)
            d_x = d_x.view(ctx.shape)
        return d_x, None, None, None, None, *qkv_lora, *out_lora, *up_lora, *down_lora
