"""Interface of the two decoders: CpuDecoder for common models on a CPU, HFDecoder for everything
else."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .kv_cache import Block, PrefixCache
from .multi_lora import LoadedAdapter, MultiLora


class Cache(Protocol):
    """KV cache of a batch."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Make row `rows[i]` row i, and drop the rows that are not listed."""

    def append_rows(self, other: Any) -> None:
        """Add the rows of another cache of the same decoder after the present ones."""

    def fork(self, rows: Sequence[int]) -> "Cache":
        """Return a cache whose row i goes on from row `rows[i]`; rows may repeat, and this cache
        stays as it is."""


class LoraForBatch(Protocol):
    """LoRA weights of the rows of a batch, in the form that a decoder applies."""

    def set_rows(self, rows: Sequence[LoadedAdapter | None]) -> None:
        """Apply `rows[i]` to row i, None for the plain base. A single entry applies to all rows of
        any batch."""


class DecoderInterface(Protocol):
    """Forward pass of a base over a KV cache."""

    chunked_prefill: bool  # a prompt may be prefilled in several passes
    mixed_batches: bool  # rows of one batch may have different adapters

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """Blocks of earlier prompts; None: prompts share nothing."""

    def new_lora(self, multi_lora: MultiLora) -> LoraForBatch:
        """Create LoRA weights for a batch; they are the plain base until `set_rows` is called."""

    def new_cache(self, padding: Sequence[int], prefixes: Sequence[Sequence[Block]] = ()) -> Cache:
        """Create a cache. The first `padding[i]` columns of row i will be no tokens; before them it
        has `prefixes[i]`, from `prefix_cache`."""

    def forward(
        self, token_ids: torch.Tensor, cache: Any, lora: Any = None, *, last_only: bool = False
    ) -> torch.Tensor:
        """Append tokens to each row of the cache and compute their logits.

        Args:
            token_ids: (rows, new tokens).
            cache: from `new_cache` of this decoder; it grows by the new tokens.
            lora: from `new_lora` of this decoder; None for the plain base.
            last_only: compute the logits of the last token only.

        Returns:
            (rows, new tokens, vocabulary), or (rows, 1, vocabulary) with `last_only`.
        """
