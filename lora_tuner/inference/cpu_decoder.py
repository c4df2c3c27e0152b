"""Fast forward pass for common models on a CPU: few operations between the matrix products, one
block of keys and values.

Decoding a token takes at least as long as reading all weights once; transformers' layers spend a
third of the time on other operations. A layer is four products here. The architectures are
implemented a second time, so the logits of a few tokens are compared with the model's own, and a
base with different logits is left to HFDecoder. Limits: a CPU, float32, bfloat16 or int8, Llama-like
models and GPT-2. Sums over layers, norms and attention are in float32 whatever the weights are.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from ..models.kernels import has_full_attention
from ..models.loading import LoadedBase
from ..models.quantization import Int8Linear, int4_linear, int8_linear, pack_int4, pack_int8
from ..models.targets import LinearLayer
from .multi_lora import BatchedLora, LoraPart, MultiLora

MIN_DRAFT_HEAD = 10_000_000  # weights of the LM head; drafting does not pay off below
_LLAMA_TYPES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


class FusedLinear:
    """Linear layers that share their input, as one product. `modules` are the names of the layers,
    in output order."""

    def __init__(self, layers: dict[str, LinearLayer]) -> None:
        parts = list(layers.values())
        self.modules = list(layers)
        self.bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        self.int8 = isinstance(parts[0], Int8Linear)
        if self.int8:
            self.weight, scale = (_fuse_tensors(parts, name) for name in ("int8_weight", "scale"))
            self.multiply = partial(int8_linear, int8_weight=self.weight, scale=scale, bias=self.bias)
        else:
            self.weight = parts[0].weight.T if isinstance(parts[0], Conv1D) else _fuse_tensors(parts, "weight")
            multiply = F.linear if self.weight.dtype == torch.float32 else _bfloat16_linear
            self.multiply = partial(multiply, weight=self.weight, bias=self.bias)

    def __call__(self, x: torch.Tensor, lora: LoraPart | None = None) -> torch.Tensor:
        """(tokens, in) -> (tokens, out), the rows one after another; bfloat16 unless weights are float32."""
        out = self.multiply(x)
        if lora is None:
            return out
        down, up, groups = lora
        if groups is not None:
            return groups.add_delta(out, x, down, up)
        is_float = out.dtype == torch.float32
        return out.addmm_(x @ down, up) if is_float else out.add_((x.float() @ down) @ up)

    def quantize(self, *, int4: bool = True) -> "FusedLinear":
        """Copy with int4 weights; with int8 weights if `int4` is off or the sizes do not allow it."""
        quantized = copy.copy(self)
        weight = self.weight * self.multiply.keywords["scale"][:, None] if self.int8 else self.weight
        if int4 and (packed := pack_int4(weight)) is not None:
            quantized.multiply = partial(int4_linear, packed=packed[0], scales=packed[1], bias=self.bias)
        elif not self.int8:
            int8_weight, scale = pack_int8(weight)
            quantized.multiply = partial(int8_linear, int8_weight=int8_weight, scale=scale, bias=self.bias)
        return quantized


def _bfloat16_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x.bfloat16(), weight, bias)


def _fuse_tensors(parts: Sequence[LinearLayer], name: str) -> torch.Tensor:
    """Concatenate a tensor of several layers. Each layer then keeps a view of the result, so
    nothing is in memory twice."""
    tensors: list[torch.Tensor] = [getattr(part, name) for part in parts]
    if len(tensors) == 1:
        return tensors[0].detach()
    fused = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, view in zip(tensors, fused.split([len(tensor) for tensor in tensors]), strict=True):
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


class KVCache:
    """Keys and values of a batch. All rows end in column `used`; row i starts after `padding[i]`
    columns."""

    def __init__(self, decoder: "CpuDecoder", rows: int, length: int, padding: Sequence[int]) -> None:
        self.decoder = decoder
        self.kv = decoder.allocate_kv(rows, length)
        self.padding = list(padding)
        self.used = 0

    @property
    def first(self) -> int:
        """Column in which the longest row starts."""
        return min(self.padding)

    def reserve(self, columns: int, rows: int = 0) -> None:
        """Make room for that many more columns and rows."""
        rows, length = rows + len(self.padding), self.used - self.first + columns
        _, _, allocated_rows, _, allocated_length, _ = self.kv.shape
        if rows <= allocated_rows and self.used + columns <= allocated_length:
            return
        first, used = self.first, self.used
        kept = self.kv[:, :, : len(self.padding), :, first:used]
        if rows > allocated_rows or length > allocated_length:  # grow by a quarter more
            self.kv = self.decoder.allocate_kv(rows + rows // 4, length + length // 4)
        else:
            kept = kept.clone()
        self.kv[:, :, : len(self.padding), :, : used - first] = kept
        self.used, self.padding = used - first, [padding - first for padding in self.padding]

    def append_rows(self, other: "KVCache") -> None:
        """Add the rows of another cache after the present ones."""
        old_rows, new_rows = len(self.padding), len(other.padding)
        other_length = other.used - other.first
        self.reserve(max(other_length - (self.used - self.first), 0), new_rows)
        shift = max(other_length - self.used, 0)  # to the right, if the new rows are longer
        if shift:
            moved = self.kv[:, :, :old_rows, :, : self.used].clone()
            self.kv[:, :, :old_rows, :, shift : self.used + shift] = moved
            self.kv[:, :, :old_rows, :, :shift] = 0
            self.used, self.padding = self.used + shift, [padding + shift for padding in self.padding]
        start = self.used - other_length
        added = self.kv[:, :, old_rows : old_rows + new_rows]
        added[..., :start, :] = 0  # masked values must be finite
        added[..., start : self.used, :] = other.kv[:, :, :new_rows, :, other.first : other.used]
        self.padding += [padding - other.first + start for padding in other.padding]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Make old row `rows[i]` row i, and drop the others. Rows may only move to the front."""
        for new, old in enumerate(rows):
            if new != old:
                self.kv[:, :, new, :, : self.used] = self.kv[:, :, old, :, : self.used]
        self.padding = [self.padding[row] for row in rows]


class CpuDecoder:
    """Forward pass of a Llama-like base or GPT-2 on a CPU. See `Decoder` for the interface."""

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
        self._rotary_cache = torch.empty(0)
        # A float32 product of four rows costs 1.5 times that of three; in int8 hardly more.
        self.draft_tokens = 3 if self.lm_head.int8 else 2

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
        has_float_weights = base.dtype in (torch.float32, torch.bfloat16) and base.load_in == "full"
        rotary = getattr(base.model.base_model, "rotary_emb", None)
        if (
            not supported
            or base.device.type != "cpu"
            or not has_float_weights
            or not has_full_attention(base.model)
            or getattr(rotary, "rope_type", "default") in ("dynamic", "longrope")  # depends on the length
        ):
            return None
        decoder = cls(base)
        token_ids = torch.arange(6)[None] + base.model.config.vocab_size // 2
        with torch.inference_mode():
            expected = base.model(input_ids=token_ids, use_cache=False).logits[0]
            cache = KVCache(decoder, 1, 6, [0])
            logits = torch.cat([decoder.forward(chunk, cache)[0] for chunk in token_ids.split(4, 1)])
        tolerance = 1e-3 if decoder.lm_head.weight.dtype == torch.float32 else 5e-2
        return decoder if (logits - expected).abs().max() <= tolerance * expected.abs().max() else None

    @cached_property
    def draft_model(self) -> "CpuDecoder | None":
        """Same base with int4 weights, over the same cache, for speculative decoding (Leviathan et
        al., 2022, arXiv:2211.17192).

        None where drafting would cost more than it saves. Price: 0.6 bytes per weight.
        """
        is_bfloat16 = self.lm_head.weight.dtype == torch.bfloat16
        if (
            is_bfloat16
            or self.lm_head.weight.numel() < MIN_DRAFT_HEAD
            or torch.backends.cpu.get_cpu_capability() != "AVX512"
        ):
            return None
        draft = copy.copy(self)
        draft.lm_head = self.lm_head.quantize(int4=False)  # int4 changes too many tokens
        draft.layers = [
            replace(
                layer,
                qkv=layer.qkv.quantize(),
                attention_out=layer.attention_out.quantize(),
                mlp_up=layer.mlp_up.quantize(),
                mlp_down=layer.mlp_down.quantize(),
            )
            for layer in self.layers
        ]
        return draft

    def new_lora(self, multi_lora: MultiLora) -> BatchedLora:
        return BatchedLora(multi_lora, [linear.modules for layer in self.layers for linear in layer.linears])

    def new_cache(self, rows: int, length: int, padding: Sequence[int]) -> KVCache:
        return KVCache(self, rows, length, padding)

    def allocate_kv(self, rows: int, length: int) -> torch.Tensor:
        """Return uninitialized keys and values (layers, 2, rows, heads, length, head_dim)."""
        return torch.empty(len(self.layers), 2, rows, self.kv_heads, length, self.head_dim)

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
        cache.reserve(count)
        first, start, end = cache.first, cache.used, cache.used + count
        positions, mask = _positions_and_mask(cache, start, end)
        parts: Iterator[LoraPart | None] = iter(lora.parts if lora is not None else [None] * 4 * len(self.layers))
        causal = mask is None and count > 1
        hidden = self.embed(token_ids).float()
        if self.llama:
            # ([rows,] tokens, 1, half).
            rotation = self.rotary_table(end - first)[positions].unsqueeze(-2)
        else:
            hidden = hidden + self.position_embeddings[positions]
        hidden = hidden.view(-1, hidden.shape[-1])
        new_kv = cache.kv[:, :, :rows, :, start:end].unbind()
        all_kv = cache.kv[:, :, :rows, :, first:end].unbind()
        for layer, (new_keys, new_values), (keys, values) in zip(self.layers, new_kv, all_kv, strict=True):
            heads = layer.qkv(layer.attention_norm(hidden), next(parts)).view(rows, count, -1, self.head_dim)
            query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], 2)
            if self.llama:
                rotated = _rotate(heads[:, :, : -self.kv_heads], rotation)
                query, key = rotated.split([self.heads, self.kv_heads], 2)
            new_keys.copy_(key.transpose(1, 2))
            new_values.copy_(value.transpose(1, 2))
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2).float(),
                keys,
                values,
                mask,
                is_causal=causal,
                enable_gqa=self.heads != self.kv_heads,
            )
            hidden = hidden + layer.attention_out(attended.transpose(1, 2).reshape(len(hidden), -1), next(parts))
            inner = layer.mlp_up(layer.mlp_norm(hidden), next(parts))
            if self.llama:
                gate, up = inner.chunk(2, -1)
                inner = F.silu(gate).mul_(up)
            else:
                inner = self.activation(inner)
            hidden = hidden + layer.mlp_down(inner, next(parts))
        cache.used = end
        if last_only:
            hidden = hidden.view(rows, count, -1)[:, -1]
        return self.lm_head(self.norm(hidden)).float().view(rows, len(hidden) // rows, -1)


class _Norm:
    """RMSNorm (arXiv:1910.07467); a single token takes four cheap operations in place of torch's
    many passes."""

    def __init__(self, norm: Any) -> None:
        self.norm, self.weight, self.eps = _in_float32(norm), norm.weight.float(), norm.eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            normalized: torch.Tensor = self.norm(x)
        else:
            mean_square = float(x[0].dot(x[0])) / x.shape[1]
            normalized = (x * self.weight).mul_((mean_square + self.eps) ** -0.5)
        return normalized


def _in_float32(norm: Any) -> Any:
    return norm if norm.weight.dtype == torch.float32 else copy.deepcopy(norm).float()


def _rotate(heads: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv:2104.09864). Pairs come out adjacent; queries and keys
    alike, so products agree."""
    pairs = torch.complex(*heads.float().chunk(2, -1)).mul_(rotation)
    return torch.view_as_real(pairs).flatten(-2)


def _positions_and_mask(cache: KVCache, start: int, end: int) -> tuple[slice | torch.Tensor, torch.Tensor | None]:
    """Return positions of the new tokens, and the attention mask over the columns from
    `cache.first` on (True: attend).

    The mask is None for plain causal attention over new tokens, and for a single token that attends
    to everything.
    """
    first = cache.first
    new, columns = torch.arange(start, end), torch.arange(first, end)
    mask = None if end - start == 1 else columns <= new[:, None]
    if max(cache.padding) == first:
        return slice(start - first, end - first), mask if start > first else None
    padding = torch.tensor(cache.padding)
    real = columns >= padding[:, None, None]  # (rows, 1, columns)
    mask = real if mask is None else real & mask
    mask = mask | (columns == new[:, None])  # padding attends to itself, else NaN
    return (new - padding[:, None]).clamp(min=0), mask[:, None]
