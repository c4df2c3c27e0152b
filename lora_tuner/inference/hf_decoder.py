"""The forward pass of transformers, over a cache whose rows come and go; for a base that keeps its past in a way of its own,
without a cache.

Surprise: it is tried on the base first, rows joining and leaving, against the logits that they have alone. Limit: rows that
come are copied together with those that are there, which takes time with a large cache.
"""

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

from ..models.loading import LoadedBase
from ..models.resolve import quiet_transformers
from .multi_lora import LoadedAdapter, MultiLora


class HFDecoder:
    """The model's own forward pass, in transformers. `step` takes tokens and gives logits, as the decoder does."""

    def __init__(self, base: LoadedBase, bank: MultiLora) -> None:
        self.base = base
        self.bank = bank
        takes = inspect.signature(base.model.forward).parameters
        self.takes_positions = "position_ids" in takes
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.cached = self.in_pieces = True
        if not self._right():  # linear attention, for one, takes several tokens at once in the beginning alone
            self.in_pieces = False
            self.cached = self._right()
        self.mixes = not self.cached or self._keeps_rows_apart()

    def new_lora(self, bank: MultiLora) -> "HookedLora":
        return HookedLora(bank)

    def new_cache(self, rows: int, length: int, padding: Sequence[int]) -> "HFCache | NoCache":
        return HFCache(self.base, padding) if self.cached else NoCache(padding)

    def forward(
        self, ids: torch.Tensor, cache: "HFCache | NoCache", hooks: "HookedLora | None" = None, *, last: bool = False
    ) -> torch.Tensor:
        """(rows, new tokens) -> logits (rows, new tokens, vocabulary), or with `last` those of the last token alone, (rows, 1,
        vocabulary). The cache grows by them."""
        if isinstance(cache, NoCache):
            return self._anew(ids, cache, hooks)
        count = ids.shape[1]
        cache.used += count
        columns = torch.arange(cache.used, device=ids.device)
        padding = torch.tensor(cache.padding, device=ids.device)[:, None]
        more: dict[str, Any] = dict(self.last_only) if last else {}
        if self.takes_positions:
            more["position_ids"] = (columns[-count:] - padding).clamp(min=0)
        with quiet_transformers(), self.bank.apply_hooks(hooks.all if hooks else []):
            output = self.base.model(
                input_ids=ids,
                attention_mask=(columns >= padding).long(),
                past_key_values=cache.kv,
                use_cache=True,
                **more,
            )
        logits: torch.Tensor = output.logits[:, -1:] if last else output.logits
        return logits.float()

    def _anew(self, ids: torch.Tensor, cache: "NoCache", hooks: "HookedLora | None") -> torch.Tensor:
        """Each row for itself and from its beginning: as slow as it is general."""
        cache.used += ids.shape[1]
        logits = []
        for line, padding in enumerate(cache.padding):
            cache.rows[line] = torch.cat([cache.rows[line].to(ids.device), ids[line]])
            with quiet_transformers(), self.bank.apply_hooks(hooks.of(line) if hooks else []):
                whole = self.base.model(input_ids=cache.rows[line][None, padding:], use_cache=False).logits
            logits.append(whole[0, -1:])
        return torch.stack(logits).float()

    def _keeps_rows_apart(self) -> bool:
        """Whether each layer sees a batch as (rows, tokens, in). OPT, for one, strings its rows together."""
        seen: list[Any] = []
        probe = [
            (layer, lambda layer, inputs, output: seen.append(inputs[0].shape[:-1]))
            for layer in self.bank.layers.values()
        ]
        with quiet_transformers(), torch.inference_mode(), self.bank.apply_hooks(probe):
            self.base.model(input_ids=self._probe().view(2, 3), use_cache=False)
        return all(tuple(shape) == (2, 3) for shape in seen)

    def _probe(self) -> torch.Tensor:
        """Six plain tokens, from the middle of the vocabulary."""
        middle = self.base.vocab_size // 2
        return torch.arange(middle, middle + 6, device=self.base.device)

    def _right(self) -> bool:
        """Whether rows that join and leave get the logits that they have alone."""
        ids = self._probe()
        try:
            with quiet_transformers(), torch.inference_mode():
                expected = self.base.model(input_ids=ids[None], use_cache=False).logits[0].float()
                cache: Any = self.new_cache(2, 6, [0, 2])
                later: Any = self.new_cache(1, 6, [0])
                for part in torch.stack([ids[:4], F.pad(ids[:2], (2, 0))]).split(2 if self.in_pieces else 4, 1):
                    self.forward(part, cache)
                found = self.forward(ids[[4, 2], None], cache)[:, -1]
                cache.keep_rows([1])
                self.forward(ids[None, :5], later)
                cache.append_rows(later)
                found = torch.cat([found, self.forward(ids[[3, 5], None], cache)[:, -1]])
        except Exception:  # whatever it is that this base does not take
            return False
        tolerance = 1e-3 if self.base.dtype == torch.float32 else 5e-2
        return bool((found - expected[[4, 2, 3, 5]]).abs().max() <= tolerance * expected.abs().max())


class HookedLora:
    """The updates of a batch's rows, as hooks."""

    def __init__(self, bank: MultiLora) -> None:
        self.bank = bank
        self.rows: list[LoadedAdapter | None] = [None]
        self.all: list[Any] = []

    def set_rows(self, rows: Sequence[LoadedAdapter | None]) -> None:
        """Put row i of each batch through `rows[i]`, or the plain base."""
        if list(map(id, rows)) != list(map(id, self.rows)):
            self.rows, self.all = list(rows), self.bank.hooks(rows)

    def of(self, line: int) -> list[Any]:
        return self.bank.hooks([self.rows[line]])


class HFCache:
    """What transformers keeps of rows of text, all ending in one column, each beginning after its padding."""

    def __init__(self, base: LoadedBase, padding: Sequence[int]) -> None:
        self.kv: Any = DynamicCache(config=base.model.config)
        # One that keeps a window alone cannot take in rows; the mask says what is looked at.
        self.kv.layers = [
            DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in self.kv.layers
        ]
        self.padding = list(padding)
        self.used = 0

    def keep_rows(self, lines: Sequence[int]) -> None:
        """Row i is what row `lines[i]` was; rows that are not named go."""
        self.padding = [self.padding[line] for line in lines]
        first = min(self.padding)
        for layer in self.kv.layers:
            rows: Any = torch.tensor(lines, device=layer.device)
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                LinearAttentionCacheLayerMixin.reorder_cache(layer, rows)
            if getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = layer.keys[rows, :, first:], layer.values[rows, :, first:]
        self.used, self.padding = self.used - first, [padding - first for padding in self.padding]

    def append_rows(self, other: "HFCache") -> None:
        """Take in the rows of another cache, after those that are here."""
        used = max(self.used, other.used)
        here, new = used - self.used, used - other.used

        def both(own: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
            return torch.cat([F.pad(own, (0, 0, here, 0)), F.pad(more, (0, 0, new, 0))])

        for layer, more in zip(self.kv.layers, other.kv.layers, strict=True):
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for states, others in (
                    (layer.conv_states, more.conv_states),
                    (layer.recurrent_states, more.recurrent_states),
                ):
                    for number, state in states.items():
                        if state is not None:
                            states[number] = torch.cat([state, others[number]])
            if getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = both(layer.keys, more.keys), both(layer.values, more.values)
        self.used = used
        self.padding = [padding + here for padding in self.padding] + [padding + new for padding in other.padding]


class NoCache:
    """The rows themselves, padding included."""

    def __init__(self, padding: Sequence[int]) -> None:
        self.rows = [torch.empty(0, dtype=torch.int64)] * len(padding)
        self.padding = list(padding)
        self.used = 0

    def keep_rows(self, lines: Sequence[int]) -> None:
        self.rows, self.padding = [self.rows[line] for line in lines], [self.padding[line] for line in lines]

    def append_rows(self, other: "NoCache") -> None:
        self.rows, self.padding = self.rows + other.rows, self.padding + other.padding
