"""Forward pass of transformers over a KV cache whose rows come and go; without a cache for bases
that have a custom one.

Each base is probed first: rows that join and leave must get the logits that they have alone. Price:
adding rows copies the whole cache.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from ..models.base_files import quiet_transformers
from ..models.experts import ExpertWeights
from ..models.loading import LoadedBase
from .kv_cache import Block
from .multi_lora import LayerHook, LoadedAdapter, MultiLora


class HFDecoder:
    """Forward pass of any transformers model. See `DecoderInterface`."""

    prefix_cache = None

    def __init__(self, base: LoadedBase, multi_lora: MultiLora) -> None:
        self.base = base
        self.multi_lora = multi_lora
        parameters = inspect.signature(base.model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.last_logits = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.has_cache = self.chunked_prefill = True
        if not self._matches_solo_logits():  # linear attention: several tokens only at once
            self.chunked_prefill = False
            self.has_cache = self._matches_solo_logits()
        self.mixed_batches = not self.has_cache or self._keeps_rows_apart()

    def new_lora(self, multi_lora: MultiLora) -> "HookedLora":
        return HookedLora(multi_lora)

    def new_cache(self, padding: Sequence[int], prefixes: Sequence[Sequence[Block]] = ()) -> "HFCache | NoCache":
        return HFCache(self.base, padding) if self.has_cache else NoCache(padding)

    def forward(
        self,
        token_ids: torch.Tensor,
        cache: "HFCache | NoCache",
        lora: "HookedLora | None" = None,
        *,
        last_only: bool = False,
    ) -> torch.Tensor:
        """(rows, new tokens) -> logits (rows, new tokens, vocabulary), or (rows, 1, vocabulary)
        with `last_only`."""
        if isinstance(cache, NoCache):
            return self._forward_without_cache(token_ids, cache, lora)
        count = token_ids.shape[1]
        cache.used += count
        columns = torch.arange(cache.used, device=token_ids.device)
        padding = torch.tensor(cache.padding, device=token_ids.device)[:, None]
        options: dict[str, Any] = dict(self.last_logits) if last_only else {}
        if self.takes_positions:
            options["position_ids"] = (columns[-count:] - padding).clamp(min=0)
        with quiet_transformers(), self.multi_lora.apply_hooks(lora.hooks if lora else []):
            output = self.base.model(
                input_ids=token_ids,
                attention_mask=(columns >= padding).long(),
                past_key_values=cache.kv,
                use_cache=True,
                **options,
            )
        logits: torch.Tensor = output.logits[:, -1:] if last_only else output.logits
        return logits.float()

    def _forward_without_cache(
        self, token_ids: torch.Tensor, cache: "NoCache", lora: "HookedLora | None"
    ) -> torch.Tensor:
        """Recompute each row from its first token. Returns the logits of the last token, (rows, 1,
        vocabulary)."""
        cache.used += token_ids.shape[1]
        logits = []
        for row, padding in enumerate(cache.padding):
            cache.rows[row] = torch.cat([cache.rows[row].to(token_ids.device), token_ids[row]])
            hooks = self.multi_lora.hooks([lora.rows[row % len(lora.rows)]]) if lora else []
            with quiet_transformers(), self.multi_lora.apply_hooks(hooks):
                output = self.base.model(input_ids=cache.rows[row][None, padding:], use_cache=False)
            logits.append(output.logits[0, -1:])
        widest = max(row_logits.shape[-1] for row_logits in logits)  # adapters may have tokens of their own
        padded = [F.pad(each, (0, widest - each.shape[-1]), value=-torch.inf) for each in logits]
        return torch.stack(padded).float()

    def _keeps_rows_apart(self) -> bool:
        """Check that each layer gets a batch as (rows, tokens, in). OPT, for one, flattens rows and
        tokens."""
        shapes: list[tuple[int, ...]] = []

        def record(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            shapes.append(tuple(inputs[0].shape[:-1]))

        layers = [layer for layer in self.multi_lora.layers.values() if not isinstance(layer, ExpertWeights)]
        hooks: list[LayerHook] = [(layer, record) for layer in layers]
        with quiet_transformers(), torch.inference_mode(), self.multi_lora.apply_hooks(hooks):
            self.base.model(input_ids=self._probe_tokens().view(2, 3), use_cache=False)
        return all(shape == (2, 3) for shape in shapes)

    def _probe_tokens(self) -> torch.Tensor:
        """Return six ordinary tokens, from the middle of the vocabulary."""
        middle = self.base.vocab_size // 2
        return torch.arange(middle, middle + 6, device=self.base.device)

    def _matches_solo_logits(self) -> bool:
        """Check that rows that join and leave a cache get the logits that they have alone."""
        ids = self._probe_tokens()
        prompts = torch.stack([ids[:4], F.pad(ids[:2], (2, 0))])
        try:
            with quiet_transformers(), torch.inference_mode():
                expected = self.base.model(input_ids=ids[None], use_cache=False).logits[0].float()
                cache, added = HFCache(self.base, [0, 2]), HFCache(self.base, [0])
                for chunk in prompts.split(2 if self.chunked_prefill else 4, 1):
                    self.forward(chunk, cache)
                two_rows = self.forward(ids[[4, 2], None], cache)[:, -1]
                cache.keep_rows([1])
                self.forward(ids[None, :5], added)
                cache.append_rows(added)
                logits = torch.cat([two_rows, self.forward(ids[[3, 5], None], cache)[:, -1]])
        except Exception:  # any error: this base does not support such a cache
            return False
        tolerance = 1e-3 if self.base.dtype == torch.float32 else 5e-2
        return bool((logits - expected[[4, 2, 3, 5]]).abs().max() <= tolerance * expected.abs().max())


class HookedLora:
    """LoRA weights of the rows of a batch, as forward hooks."""

    def __init__(self, multi_lora: MultiLora) -> None:
        self.multi_lora = multi_lora
        self.rows: list[LoadedAdapter | None] = [None]
        self.hooks: list[LayerHook] = []

    def set_rows(self, rows: Sequence[LoadedAdapter | None]) -> None:
        """Apply `rows[i]` to row i, None for the plain base. A single entry applies to all rows of
        any batch."""
        if list(rows) != self.rows:
            self.rows, self.hooks = list(rows), self.multi_lora.hooks(rows)


class HFCache:
    """Cache of transformers. All rows end in column `used`; row i starts after `padding[i]`
    columns."""

    def __init__(self, base: LoadedBase, padding: Sequence[int]) -> None:
        self.kv: Any = DynamicCache(config=base.model.config)
        # A sliding-window layer cannot take in rows; the attention mask applies the window.
        self.kv.layers = [
            DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in self.kv.layers
        ]
        self.padding = list(padding)
        self.used = 0

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Make old row `rows[i]` row i, and drop the others."""
        self.padding = [self.padding[row] for row in rows]
        first = min(self.padding)
        for layer in self.kv.layers:
            indices: Any = torch.tensor(rows, device=layer.device)
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                LinearAttentionCacheLayerMixin.reorder_cache(layer, indices)
            if getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = layer.keys[indices, :, first:], layer.values[indices, :, first:]
        self.used, self.padding = self.used - first, [padding - first for padding in self.padding]

    def append_rows(self, other: "HFCache") -> None:
        """Add the rows of another cache after the present ones."""
        used = max(self.used, other.used)
        old_shift, new_shift = used - self.used, used - other.used
        for layer, added in zip(self.kv.layers, other.kv.layers, strict=True):
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for states, added_states in (
                    (layer.conv_states, added.conv_states),
                    (layer.recurrent_states, added.recurrent_states),
                ):
                    for index, state in states.items():
                        if state is not None:
                            states[index] = torch.cat([state, added_states[index]])
            if getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = (
                    torch.cat([F.pad(old, (0, 0, old_shift, 0)), F.pad(new, (0, 0, new_shift, 0))])
                    for old, new in ((layer.keys, added.keys), (layer.values, added.values))
                )
        self.used = used
        old_padding = [padding + old_shift for padding in self.padding]
        self.padding = old_padding + [padding + new_shift for padding in other.padding]

    def fork(self, rows: Sequence[int]) -> "HFCache":
        """Return a cache that goes on from copies of rows, which may repeat."""
        fork = copy.copy(self)
        fork.kv = copy.deepcopy(self.kv)
        fork.keep_rows(rows)
        return fork


class NoCache:
    """Token ids of the rows, padding included, in place of a cache."""

    def __init__(self, padding: Sequence[int]) -> None:
        self.rows = [torch.empty(0, dtype=torch.int64)] * len(padding)
        self.padding = list(padding)
        self.used = 0

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.rows, self.padding = [self.rows[row] for row in rows], [self.padding[row] for row in rows]

    def append_rows(self, other: "NoCache") -> None:
        self.rows, self.padding = self.rows + other.rows, self.padding + other.padding

    def fork(self, rows: Sequence[int]) -> "NoCache":
        fork = copy.copy(self)
        fork.keep_rows(rows)
        return fork
