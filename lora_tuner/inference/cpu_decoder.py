"""Fast forward pass for common models on a CPU: few operations between the matrix products.

Decoding a token takes at least as long as reading all weights once; transformers' layers spend a
third of the time on other operations. A layer is four products here. The architectures are
implemented a second time, so the logits of a few tokens are compared with the model's own, and a
base with different logits is left to HFDecoder. Limits: a CPU; float32, bfloat16, 8 or 4 bits;
Llama-like models and GPT-2. Sums over layers, norms and attention are in float32 whatever the
weights are."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from ..data.packing import LENGTH_STEP, round_up
from ..models.kernels import has_full_attention
from ..models.layers import LinearLayer
from ..models.loading import LoadedBase
from ..models.native import NativeKernels, few_rows_product, native_for
from ..models.quantization import (
    INT4_BLOCK,
    Int4Linear,
    Int8Linear,
    int4_linear,
    int8_linear,
)
from .kv_cache import BLOCK_TOKENS, Block, KVCache, PrefixCache
from .multi_lora import BatchedLora, LoraPart, MultiLora

_LLAMA_TYPES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


class FusedLinear:
    """Linear layers that share their input, as one product. `modules` are the names of the layers,
    in output order."""

    def __init__(self, layers: dict[str, LinearLayer]) -> None:
        parts: list[Any] = list(layers.values())
        self.modules = list(layers)
        self.bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        kinds = {type(part) for part in parts}
        self.is_float32 = False
        self.multiply: Callable[[torch.Tensor], torch.Tensor]
        if kinds == {Int8Linear}:
            int8_weight, scale = _fuse_tensors(parts, "int8_weight"), _fuse_tensors(parts, "scale")
            self.multiply = partial(int8_linear, int8_weight=int8_weight, scale=scale, bias=self.bias)
        elif kinds == {Int4Linear} and (len(parts) == 1 or not any(it.out_features % INT4_BLOCK for it in parts)):
            packed, scales = _fuse_tensors(parts, "packed"), _fuse_tensors(parts, "scales", dim=1)
            self.multiply = partial(int4_linear, packed=packed, scales=scales, bias=self.bias)
        elif Int4Linear in kinds:  # sizes whose packed weights cannot be concatenated
            self.multiply = partial(_multiply_each, parts)
        else:
            if isinstance(parts[0], Conv1D):
                parts[0].weight.data = parts[0].weight.data.T.contiguous().T
                weight = parts[0].weight.detach().T
            else:
                weight = _fuse_tensors(parts, "weight")
            self.is_float32 = weight.dtype == torch.float32
            self.multiply = partial(_float_linear, weight=weight, bias=self.bias)

    def __call__(self, x: torch.Tensor, lora: LoraPart | None = None) -> torch.Tensor:
        """(tokens, in) -> (tokens, out), the rows one after another; bfloat16 unless weights are float32."""
        out = self.multiply(x)
        if lora is None:
            return out
        down, up, groups = lora
        if groups is not None:
            return groups.add_delta(out, x, down, up)
        inner = x.float() @ down
        return out.addmm_(inner, up) if out.dtype == torch.float32 else out.add_(inner @ up)


def _float_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = few_rows_product(x, weight)
    if out is not None:
        return out if bias is None else out.add_(bias)
    if weight.dtype == torch.float32 or len(x) <= LENGTH_STEP:
        return F.linear(x.to(weight.dtype), weight, bias)
    padded = weight.new_zeros(round_up(len(x)), x.shape[1])
    padded[: len(x)] = x
    return F.linear(padded, weight, bias)[: len(x)]


def _multiply_each(parts: Sequence[Any], x: torch.Tensor) -> torch.Tensor:
    return torch.cat([part(x.bfloat16()) for part in parts], -1)


def _fuse_tensors(parts: Sequence[LinearLayer], name: str, dim: int = 0) -> torch.Tensor:
    """Concatenate a tensor of several layers. Each layer then keeps a view of the result, so
    nothing is in memory twice."""
    tensors: list[torch.Tensor] = [getattr(part, name) for part in parts]
    if len(tensors) == 1:
        return tensors[0].detach()
    fused = torch.cat([tensor.detach() for tensor in tensors], dim)
    sizes = [tensor.shape[dim] for tensor in tensors]
    for tensor, view in zip(tensors, fused.split(sizes, dim), strict=True):
        tensor.data = view
    return fused


@dataclass
class _Layer:
    attention_norm: Callable[[torch.Tensor], torch.Tensor]
    qkv: FusedLinear
    attention_out: FusedLinear
    mlp_norm: Callable[[torch.Tensor], torch.Tensor]
    mlp_up: FusedLinear
    mlp_down: FusedLinear

    @property
    def linears(self) -> list[FusedLinear]:
        """Fused layers in the order in which `forward` applies them."""
        return [self.qkv, self.attention_out, self.mlp_up, self.mlp_down]


class CpuDecoder:
    """Forward pass of a Llama-like base or GPT-2 on a CPU. See `DecoderInterface`."""

    chunked_prefill = True
    mixed_batches = True

    def __init__(self, base: LoadedBase) -> None:
        model = base.model
        config, names = model.config, {module: name for name, module in model.named_modules()}
        self.llama = type(model).__name__ in _LLAMA_TYPES
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", self.heads)
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.lm_head = FusedLinear({"head": model.get_output_embeddings()})
        self.prefix_cache = PrefixCache()
        self._rotary_cache = torch.empty(0)

        def fuse(*layers: LinearLayer) -> FusedLinear:
            return FusedLinear({names[layer]: layer for layer in layers})

        if self.llama:
            inner: Any = model.model
            self.embed, self.norm, self.rotary = inner.embed_tokens, _Norm(inner.norm), inner.rotary_emb
            self.layers = [
                _Layer(
                    _Norm(layer.input_layernorm),
                    fuse(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                    fuse(layer.self_attn.o_proj),
                    _Norm(layer.post_attention_layernorm),
                    fuse(layer.mlp.gate_proj, layer.mlp.up_proj),
                    fuse(layer.mlp.down_proj),
                )
                for layer in inner.layers
            ]
        else:
            inner = model.transformer
            self.embed, self.norm = inner.wte, _in_float32(inner.ln_f)
            self.position_embeddings = inner.wpe.weight.float()
            self.activation = inner.h[0].mlp.act
            self.layers = [
                _Layer(
                    _in_float32(layer.ln_1),
                    fuse(layer.attn.c_attn),
                    fuse(layer.attn.c_proj),
                    _in_float32(layer.ln_2),
                    fuse(layer.mlp.c_fc),
                    fuse(layer.mlp.c_proj),
                )
                for layer in inner.h
            ]

    @classmethod
    def for_base(cls, base: LoadedBase) -> "CpuDecoder | None":
        """Create the decoder of a base. None for other architectures, devices or dtypes, or if its
        logits are different."""
        supported = type(base.model).__name__ in (*_LLAMA_TYPES, "GPT2LMHeadModel")
        is_own = base.load_in == "full" or isinstance(base.model.get_output_embeddings(), Int8Linear)
        rotary = getattr(base.model.base_model, "rotary_emb", None)
        if (
            not supported
            or base.device.type != "cpu"
            or base.dtype not in (torch.float32, torch.bfloat16)
            or not is_own  # weights of bitsandbytes
            or not has_full_attention(base.model)
            or getattr(rotary, "rope_type", "default") in ("dynamic", "longrope")  # depends on the length
        ):
            return None
        decoder = cls(base)
        token_ids = torch.arange(6)[None] + base.model.config.vocab_size // 2
        with torch.inference_mode():
            expected = base.model(input_ids=token_ids, use_cache=False).logits[0]
            cache = decoder.new_cache([0])
            logits = torch.cat([decoder.forward(chunk, cache)[0] for chunk in token_ids.split(4, 1)])
        tolerance = 1e-3 if decoder.lm_head.is_float32 else 5e-2
        return decoder if (logits - expected).abs().max() <= tolerance * expected.abs().max() else None

    def new_lora(self, multi_lora: MultiLora) -> BatchedLora:
        return BatchedLora(multi_lora, [linear.modules for layer in self.layers for linear in layer.linears])

    def new_cache(self, padding: Sequence[int], prefixes: Sequence[Sequence[Block]] = ()) -> KVCache:
        shape = (len(self.layers), 2, self.kv_heads, BLOCK_TOKENS, self.head_dim)
        return KVCache(shape, padding, prefixes)

    def rotary_table(self, length: int) -> torch.Tensor:
        """Return the rotation per position, (at least length, head_dim / 2) complex."""
        if len(self._rotary_cache) < length:
            cos, sin = self.rotary(torch.empty(1), torch.arange(2 * length)[None])
            half = self.head_dim // 2
            self._rotary_cache = torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())
        return self._rotary_cache

    def forward(
        self, token_ids: torch.Tensor, cache: KVCache, lora: BatchedLora | None = None, *, last_only: bool = False
    ) -> torch.Tensor:
        """(rows, new tokens) -> logits (rows, new tokens, vocabulary), or (rows, 1, vocabulary)
        with `last_only`."""
        rows, count = token_ids.shape
        starts, skipped = cache.lengths.copy(), cache.extend(count)
        first = torch.tensor([start - skip for start, skip in zip(starts, skipped, strict=True)])
        positions = (first[:, None] + torch.arange(count)).clamp_(min=0)
        parts: Iterator[LoraPart | None] = iter(lora.parts if lora is not None else [None] * 4 * len(self.layers))
        hidden, rotation = self.embed(token_ids).float(), None
        if self.llama:
            # (rows, tokens, 1, half).
            rotation = self.rotary_table(max(cache.lengths))[positions].unsqueeze(-2)
        else:
            hidden = hidden + self.position_embeddings[positions]
        hidden = hidden.view(-1, hidden.shape[-1])
        kernels = native_for(hidden) if count == 1 and not any(skipped) else None
        new: torch.Tensor | None = None
        if kernels is not None:
            attend = self._decode_attention(kernels, cache, rotation)
        else:
            new = torch.empty(len(self.layers), 2, self.kv_heads, rows, count, self.head_dim)
            attend = self._prefill_attention(cache, new, starts, skipped, rotation)
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.attention_norm(hidden), next(parts)).float()
            hidden = hidden + layer.attention_out(attend(qkv, number), next(parts))
            inner = layer.mlp_up(layer.mlp_norm(hidden), next(parts))
            inner = _swiglu(inner) if self.llama else self.activation(inner)
            hidden = hidden + layer.mlp_down(inner, next(parts))
        if new is not None:
            cache.write(new, skipped)
        if last_only:
            hidden = hidden.view(rows, count, -1)[:, -1]
        return self.lm_head(self.norm(hidden)).float().view(rows, len(hidden) // rows, -1)

    def _decode_attention(
        self, kernels: NativeKernels, cache: KVCache, rotation: torch.Tensor | None
    ) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Make the attention of one new token in each row, which also writes its keys and values:
        qkv and number of a layer -> (rows, heads)."""
        rows, longest, blocks = len(cache.lengths), max(cache.lengths), cache.addresses()
        lengths, scores = torch.tensor(cache.lengths), torch.empty(rows * self.heads * longest)
        turn = None if rotation is None else torch.view_as_real(rotation).contiguous()
        sizes = (rows, self.heads, self.kv_heads, self.head_dim, BLOCK_TOKENS, blocks.shape[1], longest)
        layer_size = 2 * self.kv_heads * BLOCK_TOKENS * self.head_dim

        def attend(qkv: torch.Tensor, layer: int) -> torch.Tensor:
            out = qkv.new_empty(rows, self.heads * self.head_dim)
            kernels.call(
                "decode_attention", qkv.dtype, qkv, turn, blocks, lengths, scores, out, *sizes, layer * layer_size
            )
            return out

        return attend

    def _prefill_attention(
        self,
        cache: KVCache,
        new: torch.Tensor,
        starts: Sequence[int],
        skipped: Sequence[int],
        rotation: torch.Tensor | None,
    ) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Make the attention by torch: qkv and number of a layer -> (tokens, heads).

        Keys and values are written into `new`. Rows have `starts` tokens in the cache; the first
        `skipped` new ones of each are padding.
        """
        rows, count = new.shape[3:5]
        width = -(-max(starts) // BLOCK_TOKENS)
        unused = Block(cache.shape)
        past = [(blocks[:width] + [unused] * (width - len(blocks))) for blocks in cache.blocks]
        mask = _attention_mask(starts, skipped, width * BLOCK_TOKENS, count)

        def attend(qkv: torch.Tensor, layer: int) -> torch.Tensor:
            heads = qkv.view(rows, count, -1, self.head_dim)
            query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], 2)
            if rotation is not None:
                rotated = _rotate(heads[:, :, : -self.kv_heads], rotation)
                query, key = rotated.split([self.heads, self.kv_heads], 2)
            own = new[layer]
            own[0], own[1] = key.permute(2, 0, 1, 3), value.permute(2, 0, 1, 3)
            if width:
                pieces: list[torch.Tensor] = []
                for row, blocks in enumerate(past):
                    pieces += [*(block.layers[layer] for block in blocks), own[:, :, row]]
                own = torch.cat(pieces, 2).view(2, self.kv_heads, rows, -1, self.head_dim)
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                own[0].transpose(0, 1),
                own[1].transpose(0, 1),
                mask,
                is_causal=mask is None and count > 1,
                enable_gqa=self.heads != self.kv_heads,
            )
            return attended.transpose(1, 2).reshape(rows * count, -1)

        return attend


class _Norm:
    """RMSNorm (arXiv:1910.07467), in one pass where there are kernels in C."""

    def __init__(self, norm: Any) -> None:
        self.norm, self.weight, self.eps = _in_float32(norm), norm.weight.float(), float(norm.eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        kernels = native_for(x)
        if kernels is None:
            normalized: torch.Tensor = self.norm(x)
            return normalized
        x, size = x.contiguous(), x.shape[1]
        out, stats = torch.empty_like(x), x.new_empty(len(x))
        kernels.call("rms_norm", x.dtype, x, self.weight, out, stats, len(x), size, size, self.eps)
        return out


def _swiglu(inner: torch.Tensor) -> torch.Tensor:
    kernels, size = native_for(inner), inner.shape[1] // 2
    if kernels is None:
        gate, up = inner.chunk(2, -1)
        return F.silu(gate).mul_(up)
    out = inner.new_empty(len(inner), size)
    kernels.call("swiglu", inner.dtype, inner, out, len(inner), size, size)
    return out


def _in_float32(norm: Any) -> Any:
    return norm if norm.weight.dtype == torch.float32 else copy.deepcopy(norm).float()


def _rotate(heads: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv:2104.09864). Pairs come out adjacent; queries and keys
    alike, so products agree."""
    pairs = torch.complex(*heads.float().chunk(2, -1)).mul_(rotation)
    return torch.view_as_real(pairs).flatten(-2)


def _attention_mask(
    starts: Sequence[int], skipped: Sequence[int], columns: int, count: int
) -> torch.Tensor | None:
    """Return the mask of `count` new tokens over `columns` columns of the cache and the new tokens,
    (rows, 1, new tokens, columns + new tokens), True: attend.

    None for plain causal attention over new tokens, and for a single token that attends to
    everything.
    """
    if not any(skipped) and all(start == columns for start in starts) and (count == 1 or not columns):
        return None
    new = torch.arange(count)
    cached = torch.arange(columns) < torch.tensor(starts)[:, None, None]  # (rows, 1, columns)
    real = (new >= torch.tensor(skipped)[:, None, None]) & (new <= new[:, None])
    real = real | (new == new[:, None])  # padding attends to itself, else NaN
    return torch.cat([cached.expand(-1, count, -1), real], -1)[:, None]
