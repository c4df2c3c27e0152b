"""The forward pass of writing, for the commonest kinds of model on a CPU, with as little as possible between its products.

To write a token takes as long as to read the weights once, if nothing else takes time; in transformers' layers a third of
the time is other things. Here a layer is four products and a dozen small operations over one block of keys and values. Surprise:
it is a second description of what transformers knows already, so it asks the model itself, for a few tokens, and steps back
where the figures differ. Limits: a CPU, float32 or int8, Llama's and GPT-2's kind; all else is left to transformers.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from ..models.kernels import has_full_attention
from ..models.loading import LoadedBase
from ..models.quantization import Int8Linear, int4_linear, int8_linear, pack_int4, pack_int8
from .multi_lora import BatchedLora, LoraPart, MultiLora

DRAFT_TOKENS = 10_000_000  # weights of the head; below, reading them takes no time that guessing could save
_LLAMA_TYPES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


class FusedLinear:
    """Linear layers that share their input, as one. `names` are those of its layers, in the order of their outputs."""

    def __init__(self, layers: dict[str, Any]) -> None:
        parts = list(layers.values())
        self.names = list(layers)
        self.bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        self.int8 = isinstance(parts[0], Int8Linear)
        self.exact = not self.int8
        if self.int8:
            self.weight, scale = (_fuse_linears(parts, name) for name in ("int8_weight", "scale"))
            self.multiply = partial(int8_linear, int8_weight=self.weight, scale=scale, bias=self.bias)
        else:
            self.weight = parts[0].weight.T if isinstance(parts[0], Conv1D) else _fuse_linears(parts, "weight")
            self.multiply = partial(F.linear, weight=self.weight, bias=self.bias)

    def __call__(self, x: torch.Tensor, update: LoraPart | None = None) -> torch.Tensor:
        """(tokens, in) -> (tokens, out), texts one after another; bfloat16 where the weights are rounded."""
        out = self.multiply(x)
        if update is None:
            return out
        down, up, own = update
        if own is not None:
            return own.add(out, x, down, up)
        return out.addmm_(x @ down, up) if self.exact else out.add_((x.float() @ down) @ up)

    def draft(self, *, int4: bool = True) -> "FusedLinear":
        """The same with int4 weights, or int8 for sizes that have no int4, and where it is not wanted."""
        other = copy.copy(self)
        other.exact = False
        weight = self.weight * self.multiply.keywords["scale"][:, None] if self.int8 else self.weight
        if int4 and (found := pack_int4(weight)) is not None:
            other.multiply = partial(int4_linear, packed=found[0], scales=found[1], bias=self.bias)
        elif not self.int8:
            int8_weight, scale = pack_int8(weight)
            other.multiply = partial(int8_linear, int8_weight=int8_weight, scale=scale, bias=self.bias)
        return other


def _fuse_linears(parts: list[Any], name: str) -> torch.Tensor:
    """The tensors of that name as one; each layer keeps its share of it, so that nothing is in memory twice."""
    tensors = [getattr(part, name) for part in parts]
    if len(tensors) == 1:
        only: torch.Tensor = tensors[0].detach()
        return only
    whole = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, share in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = share
    return whole


@dataclass
class _Layer:
    before_attention: Any
    attention: FusedLinear
    out: FusedLinear
    before_mlp: Any
    up: FusedLinear
    down: FusedLinear


class KVCache:
    """Keys and values of `rows` texts. All end in the same column; what is shorter begins later, after `padding` columns."""

    def __init__(self, decoder: "CpuDecoder", rows: int, length: int, padding: Sequence[int]) -> None:
        self.decoder = decoder
        self.kv = decoder.kv(rows, length)
        self.padding = list(padding)
        self.used = 0

    @property
    def first(self) -> int:
        """The column in which the longest text begins."""
        return min(self.padding)

    def reserve(self, count: int, rows: int = 0) -> None:
        """So that `count` columns more, and so many rows more, can be written."""
        rows, length = rows + len(self.padding), self.used - self.first + count
        _, _, has_rows, _, has_length, _ = self.kv.shape
        if rows <= has_rows and self.used + count <= has_length:
            return
        old, first, used = self.kv, self.first, self.used
        if rows > has_rows or length > has_length:  # with room for some more, so that this is rare
            self.kv = self.decoder.kv(rows + rows // 4, length + length // 4)
        kept = old[:, :, : len(self.padding), :, first:used]
        if self.kv is old:
            kept = kept.clone()
        self.kv[:, :, : len(self.padding), :, : used - first] = kept
        self.used, self.padding = used - first, [padding - first for padding in self.padding]

    def append_rows(self, other: "KVCache") -> None:
        """Take in the rows of another cache, after those that are here."""
        here, new = len(self.padding), len(other.padding)
        self.reserve(max(other.used - other.first - (self.used - self.first), 0), new)
        shift = max(other.used - other.first - self.used, 0)  # to the right, where the new ones are longer
        if shift:
            moved = self.kv[:, :, :here, :, : self.used].clone()
            self.kv[:, :, :here, :, shift : self.used + shift] = moved
            self.kv[:, :, :here, :, :shift] = 0
            self.used, self.padding = self.used + shift, [padding + shift for padding in self.padding]
        start = self.used - (other.used - other.first)
        lines = self.kv[:, :, here : here + new]
        lines[..., :start, :] = 0  # what is masked must be numbers all the same
        lines[..., start : self.used, :] = other.kv[:, :, :new, :, other.first : other.used]
        self.padding += [padding - other.first + start for padding in other.padding]

    def keep_rows(self, lines: Sequence[int]) -> None:
        """Row i is what row `lines[i]` was; rows that are not named go. Rows may move to the front alone."""
        for place, line in enumerate(lines):
            if place != line:
                self.kv[:, :, place, :, : self.used] = self.kv[:, :, line, :, : self.used]
        self.padding = [self.padding[line] for line in lines]


class CpuDecoder:
    """Another way through the layers of a base. `step` takes tokens and gives logits, as the model does."""

    in_pieces = True  # a prompt may be read in several passes

    def __init__(self, base: LoadedBase) -> None:
        model = base.model
        config, names = model.config, {module: name for name, module in model.named_modules()}
        self.llama = type(model).__name__ in _LLAMA_TYPES
        self.heads = config.num_attention_heads
        self.key_heads = getattr(config, "num_key_value_heads", self.heads)
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.head = FusedLinear({"head": model.get_output_embeddings()})
        self.table = torch.empty(0)
        # A float32 product of four rows takes half as long again as one of three; of int8 hardly longer.
        self.guesses = 3 if self.head.int8 else 2

        def one(*layers: Any) -> FusedLinear:
            return FusedLinear({names[layer]: layer for layer in layers})

        if self.llama:
            inner: Any = model.model
            self.embed, self.norm, self.rotary = inner.embed_tokens, _Norm(inner.norm), inner.rotary_emb
            self.layers = [
                _Layer(
                    _Norm(it.input_layernorm),
                    one(it.self_attn.q_proj, it.self_attn.k_proj, it.self_attn.v_proj),
                    one(it.self_attn.o_proj),
                    _Norm(it.post_attention_layernorm),
                    one(it.mlp.gate_proj, it.mlp.up_proj),
                    one(it.mlp.down_proj),
                )
                for it in inner.layers
            ]
        else:
            inner = model.transformer
            self.embed, self.norm, self.places = inner.wte, inner.ln_f, inner.wpe.weight
            self.layers = [
                _Layer(it.ln_1, one(it.attn.c_attn), one(it.attn.c_proj), it.ln_2, one(it.mlp.c_fc), one(it.mlp.c_proj))
                for it in inner.h
            ]
            self.activation = inner.h[0].mlp.act

    @classmethod
    def for_base(cls, base: LoadedBase) -> "CpuDecoder | None":
        """A decoder for this base, or None where transformers must do it: other kinds, other devices, other figures."""
        known = type(base.model).__name__ in (*_LLAMA_TYPES, "GPT2LMHeadModel")
        exact = base.dtype == torch.float32 and base.load_in == "full"
        if not known or base.device.type != "cpu" or not exact or not has_full_attention(base.model):
            return None
        rotary = getattr(base.model.base_model, "rotary_emb", None)
        if getattr(rotary, "rope_type", "default") in ("dynamic", "longrope"):  # which turn by the length of the text
            return None
        decoder = cls(base)
        ids = torch.arange(6)[None] + base.model.config.vocab_size // 2
        with torch.inference_mode():
            expected = base.model(input_ids=ids, use_cache=False).logits[0]
            cache = KVCache(decoder, 1, 6, [0])
            found = torch.cat([decoder.forward(ids[:, :4], cache)[0], decoder.forward(ids[:, 4:], cache)[0]])
        tolerance = 5e-2 if decoder.head.int8 else 1e-3
        return decoder if (found - expected).abs().max() <= tolerance * expected.abs().max() else None

    @cached_property
    def draft(self) -> "CpuDecoder | None":
        """The same base with int4 weights, over the same cache, to guess what this one will say (speculative decoding, Leviathan
        et al., 2022, arXiv:2211.17192). None where a guess would cost more than it saves. Price: 0.6 bytes a weight."""
        if self.head.weight.numel() < DRAFT_TOKENS or torch.backends.cpu.get_cpu_capability() != "AVX512":
            return None
        other = copy.copy(self)
        other.head = self.head.draft(int4=False)  # what it rounds away decides between tokens
        other.layers = [
            replace(
                it,
                attention=it.attention.draft(),
                out=it.out.draft(),
                up=it.up.draft(),
                down=it.down.draft(),
            )
            for it in self.layers
        ]
        return other

    def new_lora(self, bank: MultiLora) -> BatchedLora:
        """Room for the updates of a batch's rows, as `step` takes them."""
        return BatchedLora(
            bank, [it.names for layer in self.layers for it in (layer.attention, layer.out, layer.up, layer.down)]
        )

    def new_cache(self, rows: int, length: int, padding: Sequence[int]) -> KVCache:
        return KVCache(self, rows, length, padding)

    def kv(self, rows: int, length: int) -> torch.Tensor:
        return torch.empty(len(self.layers), 2, rows, self.key_heads, length, self.size)

    def rotary_table(self, length: int) -> torch.Tensor | None:
        """(length, size / 2) complex: by how much each place turns a pair of a head's numbers. None without rotation."""
        if not self.llama:
            return None
        if len(self.table) < length:
            cos, sin = self.rotary(torch.empty(1), torch.arange(2 * length)[None])
            half = self.size // 2
            self.table = torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())
        return self.table

    def forward(
        self, ids: torch.Tensor, cache: KVCache, mix: BatchedLora | None = None, *, last: bool = False
    ) -> torch.Tensor:
        """(rows, new tokens) -> logits (rows, new tokens, vocabulary), or with `last` those of the last token alone, (rows, 1,
        vocabulary). The cache grows by them."""
        rows, count = ids.shape
        cache.reserve(count)
        first, start, end = cache.first, cache.used, cache.used + count
        places, mask = _position_ids(cache, start, end)
        table = self.rotary_table(end - first)
        updates: Iterator[LoraPart | None] = iter(mix.parts if mix is not None else [None] * 4 * len(self.layers))
        causal = mask is None and count > 1
        hidden = self.embed(ids)
        if not self.llama:
            hidden = hidden + self.places[places]
        hidden = hidden.view(-1, hidden.shape[-1])
        turns = table[places].unsqueeze(-2) if table is not None else None  # ([rows,] new tokens, 1, half)
        new, known = (
            cache.kv[:, :, :rows, :, start:end].unbind(),
            cache.kv[:, :, :rows, :, first:end].unbind(),
        )
        for layer, (new_keys, new_values), (keys, values) in zip(self.layers, new, known, strict=True):
            heads = layer.attention(layer.before_attention(hidden), next(updates)).view(rows, count, -1, self.size)
            query, key, value = heads.split([self.heads, self.key_heads, self.key_heads], 2)
            if turns is not None:
                both = _rotate(heads[:, :, : -self.key_heads], turns)
                query, key = both.split([self.heads, self.key_heads], 2)
            new_keys.copy_(key.transpose(1, 2))
            new_values.copy_(value.transpose(1, 2))
            query = query.transpose(1, 2)
            attended = F.scaled_dot_product_attention(
                query.float(), keys, values, mask, is_causal=causal, enable_gqa=self.heads != self.key_heads
            )
            hidden = hidden + layer.out(attended.transpose(1, 2).reshape(len(hidden), -1), next(updates))
            inner = layer.up(layer.before_mlp(hidden), next(updates))
            if self.llama:
                gate, up = inner.chunk(2, -1)
                inner = F.silu(gate).mul_(up)
            else:
                inner = self.activation(inner)
            hidden = hidden + layer.down(inner, next(updates))
        cache.used = end
        if last:
            hidden = hidden.view(rows, count, -1)[:, -1]
        logits: torch.Tensor = self.head(self.norm(hidden)).view(rows, len(hidden) // rows, -1)
        return logits


class _Norm:
    """RMSNorm (arXiv:1910.07467). For a single token, in four light steps in place of torch's one of many passes."""

    def __init__(self, norm: Any) -> None:
        self.norm, self.weight, self.eps = norm, norm.weight, norm.eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            whole: torch.Tensor = self.norm(x)
            return whole
        flat = x.view(-1)
        single: torch.Tensor = (x * self.weight).mul_((float(flat.dot(flat)) / len(flat) + self.eps) ** -0.5)
        return single


def _rotate(heads: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv:2104.09864). Pairs come out side by side: in a product of two, order is the same."""
    half = heads.shape[-1] // 2
    heads = heads.float()
    pairs = torch.complex(heads[..., :half], heads[..., half:]).mul_(turns)
    turned: torch.Tensor = torch.view_as_real(pairs).flatten(-2)
    return turned


def _position_ids(cache: KVCache, start: int, end: int) -> tuple[Any, torch.Tensor | None]:
    """The places of the new tokens in their texts, and which of the columns from the first on each may look at (True); None
    where that is all before it, the first tokens included."""
    first = cache.first
    now, known = torch.arange(start, end), torch.arange(first, end)
    mask = None if end - start == 1 else known <= now[:, None]
    if max(cache.padding) == first:
        return slice(start - first, end - first), mask if start > first else None
    padding = torch.tensor(cache.padding)
    real = known >= padding[:, None, None]  # (rows, 1, all)
    mask = real if mask is None else real & mask
    # A row's padding may look at itself, for to look at nothing gives no numbers.
    mask = mask | (known == now[:, None])
    return (now - padding[:, None]).clamp(min=0), mask[:, None]
