"""Continuous batching: between two decode steps sequences join and leave a batch (Yu et al., Orca,
OSDI 2022).

The output of a sequence does not depend on the others. While sequences are decoding, long prompts
are prefilled in chunks and take turns, so that no sequence waits for all of a long prompt. A prompt
that begins like an earlier one of the same adapter is prefilled from where they differ, if the
decoder has a prefix cache.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from ..errors import EventHandler, Notice, ignore_events
from ..models.loading import LoadedBase
from .cpu_decoder import CpuDecoder
from .hf_decoder import HFDecoder
from .interface import Cache, DecoderInterface, LoraForBatch
from .kv_cache import BLOCK_TOKENS, Block, KVCache
from .multi_lora import LoadedAdapter, MultiLora
from .sequence import Sequence

PREFILL_TOKENS = 4096  # prompt tokens per prefill pass
PREFILL_CHUNK = 256  # the same while other sequences wait for their next token


class GenerationEngine:
    """Generates for all sequences of one base. Sequences that cannot share a batch run in several,
    which take turns."""

    def __init__(self, base: LoadedBase, notify: EventHandler = ignore_events) -> None:
        self.base = base
        self.multi_lora = MultiLora(base)
        self.notify = notify
        self.cpu_decoder = CpuDecoder.for_base(base)
        self._batches: dict[tuple[DecoderInterface, LoadedAdapter | None], RunningBatch] = {}
        self._notified = False  # that each adapter has its own batch

    @cached_property
    def hf_decoder(self) -> HFDecoder:
        decoder = HFDecoder(self.base, self.multi_lora)
        if not decoder.has_cache:
            self.notify(
                Notice(
                    f"{self.base.files.name} has no standard KV cache: "
                    "the whole sequence is recomputed for every token."
                )
            )
        return decoder

    @property
    def kv_bytes_per_token(self) -> int:
        """KV-cache bytes per token (an estimate for custom caches). CpuDecoder has float32."""
        config = self.base.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) or 1
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        itemsize = self.base.dtype.itemsize if self.cpu_decoder is None else torch.float32.itemsize
        return int(config.num_hidden_layers * 2 * kv_heads * head_dim * itemsize)

    def keep_prefixes(self, max_tokens: int) -> None:
        """Keep keys and values of prompts for prompts that begin alike; a decoder of transformers keeps
        none."""
        if self.cpu_decoder is not None:
            self.cpu_decoder.prefix_cache.max_tokens = max_tokens

    def cache_tokens(self, sequences: Iterable[Sequence]) -> int:
        """KV-cache tokens that sequences take together at their full lengths: the sum of these, but
        all are as long as the longest in a cache of transformers."""
        total = rows = longest = 0
        for sequence in sequences:
            if self._runs_on_cpu_decoder(sequence.lora):
                total += sequence.max_length
            else:
                rows, longest = rows + 1, max(longest, sequence.max_length)
        return total + rows * longest

    def _runs_on_cpu_decoder(self, lora: LoadedAdapter | None) -> bool:
        return self.cpu_decoder is not None and (lora is None or lora.is_additive)

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for batch in self._batches.values() for sequence in batch.sequences]

    def add(self, sequences: list[Sequence]) -> None:
        """Generate for these sequences from the next step on."""
        for sequence in sequences:
            key = self.batch_key(sequence.lora)
            if key not in self._batches:
                self._batches[key] = RunningBatch(key[0], self.multi_lora)
            self._batches[key].waiting.append(sequence)
        if not self._notified and sum(decoder is not self.cpu_decoder for decoder, _ in self._batches) > 1:
            why = "This base flattens the rows of a batch"
            if any(loaded is not None and loaded.adapts_experts for _, loaded in self._batches):
                why = "Experts get the tokens of all rows of a batch at once"
            self.notify(Notice(f"{why}, so each adapter runs in its own batch."))
            self._notified = True

    def batch_key(self, lora: LoadedAdapter | None) -> tuple[DecoderInterface, LoadedAdapter | None]:
        """Return the decoder for rows with an adapter, and the adapter itself if only its rows can share a batch."""
        decoder: DecoderInterface = (self._runs_on_cpu_decoder(lora) and self.cpu_decoder) or self.hf_decoder
        alone = lora is not None and lora.adapts_experts
        return decoder, lora if alone or not decoder.mixed_batches else None

    @torch.inference_mode()
    def step(self) -> None:
        """Run one step of each batch: at least one token for each decoding sequence. Complete
        sequences leave.

        An exception ends the sequences of its batch only, as their `error`.
        """
        for key, batch in list(self._batches.items()):
            try:
                batch.step()
            except Exception as error:
                for sequence in batch.sequences:
                    if not sequence.complete:
                        sequence.fail(error)
                del self._batches[key]
        self._drop_empty_batches()

    @torch.inference_mode()  # as the caches were created
    def cancel(self, sequence: Sequence) -> None:
        """Stop generating for a sequence."""
        for batch in self._batches.values():
            batch.cancel(sequence)
        self._drop_empty_batches()

    def _drop_empty_batches(self) -> None:
        self._batches = {key: batch for key, batch in self._batches.items() if batch.sequences}

    def clear(self) -> None:
        self._batches.clear()


class RunningBatch:
    """Sequences that run on one decoder: waiting, in prefill, or decoding."""

    def __init__(self, decoder: DecoderInterface, multi_lora: MultiLora) -> None:
        self.decoder = decoder
        self.multi_lora = multi_lora
        self.lora = decoder.new_lora(multi_lora)
        self.decoding: list[Sequence] = []
        self.cache: Cache | None = None  # of the decoding sequences, all tokens but the last
        self.waiting: list[Sequence] = []
        self.prefills: deque[PrefillBatch] = deque()  # the first is next

    @property
    def sequences(self) -> list[Sequence]:
        prefilling = [sequence for prefill in self.prefills for sequence in prefill.sequences]
        return [*self.decoding, *prefilling, *self.waiting]

    def cancel(self, sequence: Sequence) -> None:
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.decoding:
            self._keep_sequences([other is not sequence for other in self.decoding])
        for prefill in [prefill for prefill in self.prefills if sequence in prefill.sequences]:
            sequence.max_new_tokens = len(sequence.output_ids)  # its row stays meanwhile
            if all(other.done for other in prefill.sequences):
                self.prefills.remove(prefill)

    def step(self) -> None:
        """Run one prefill pass over the next prompts, then one decode pass over the decoding
        sequences."""
        # Few prompt tokens while other sequences wait for their next token or prefill.
        exclusive = not self.decoding and len(self.prefills) + bool(self.waiting) == 1
        budget = PREFILL_TOKENS if exclusive else PREFILL_CHUNK
        if self.waiting:
            self._start_prefill(budget)
        if self.prefills:
            self._run_prefill(self.prefills[0], budget)
        if self.cache is not None:
            self._decode(self.cache)

    def _start_prefill(self, budget: int) -> None:
        """Schedule the first waiting sequence, and those after it that fit into the budget
        together."""
        sequences: list[Sequence] = []
        prefixes: list[list[Block]] = []
        scored, longest = self.waiting[0].score_prompt, 0
        if scored:  # (tokens, vocabulary) logits take much memory
            budget = min(budget, PREFILL_CHUNK)
        for sequence in self.waiting:
            prefix = self._find_prefix(sequence)
            longest_with_it = max(longest, len(sequence.prompt_ids) - BLOCK_TOKENS * len(prefix))
            too_many = longest_with_it * (len(sequences) + 1) > budget
            if sequences and (too_many or sequence.score_prompt != scored):
                break
            sequence.cached_tokens, longest = BLOCK_TOKENS * len(prefix), longest_with_it
            sequences.append(sequence)
            prefixes.append(prefix)
        del self.waiting[: len(sequences)]
        new_ids = [
            sequence.token_ids[0, sequence.cached_tokens : len(sequence.prompt_ids)] for sequence in sequences
        ]
        padding = [longest - len(ids) for ids in new_ids]
        prompts = [F.pad(ids, (columns, 0)) for ids, columns in zip(new_ids, padding, strict=True)]
        lora = self.decoder.new_lora(self.multi_lora)
        lora.set_rows([sequence.lora for sequence in sequences])
        cache = self.decoder.new_cache(padding, prefixes)
        self.prefills.append(PrefillBatch(sequences, torch.stack(prompts), cache, lora))

    def _find_prefix(self, sequence: Sequence) -> list[Block]:
        prefix_cache = self.decoder.prefix_cache
        if prefix_cache is None or sequence.score_prompt:  # the logits of all tokens are needed
            return []
        return prefix_cache.find(sequence.lora, sequence.prompt_ids)

    def _run_prefill(self, prefill: "PrefillBatch", budget: int) -> None:
        """Run the next chunk of a prefill. Unless it was the last chunk, the other prefills come
        first next time."""
        rows, longest = prefill.prompts.shape
        scored = prefill.sequences[0].score_prompt
        if scored:
            budget = min(budget, PREFILL_CHUNK)
        chunk = max(1, budget // rows) if self.decoder.chunked_prefill else longest
        start = prefill.columns
        token_ids = prefill.prompts[:, start : start + chunk]
        logits = self.decoder.forward(token_ids, prefill.cache, prefill.lora, last_only=not scored)
        for sequence, row_logits in zip(prefill.sequences, logits, strict=True) if scored else ():
            padding = longest - len(sequence.prompt_ids)
            skipped = max(padding - start, 0)
            sequence.append_prompt_logits(start + skipped - padding, row_logits[skipped:])
        prefill.columns += chunk
        if prefill.columns < longest:
            self.prefills.rotate(-1)
        else:
            self._finish_prefill(prefill, logits[:, -1])

    def _finish_prefill(self, prefill: "PrefillBatch", logits: torch.Tensor) -> None:
        """Choose the first tokens from logits (rows, vocabulary), and move the sequences to the
        decoding ones."""
        self._keep_prefixes(prefill)
        for sequence, row_logits in zip(prefill.sequences, logits, strict=True):
            if not sequence.done:
                sequence.append_token(row_logits[: sequence.vocab_size])
        rows = [row for row, sequence in enumerate(prefill.sequences) if not sequence.done]
        if rows:
            prefill.cache.keep_rows(rows)
            if self.cache is None:
                self.cache = prefill.cache
            else:
                self.cache.append_rows(prefill.cache)
            self.decoding += [prefill.sequences[row] for row in rows]
        self.prefills.popleft()

    def _keep_prefixes(self, prefill: "PrefillBatch") -> None:
        if self.decoder.prefix_cache is None or not isinstance(prefill.cache, KVCache):
            return
        for sequence, blocks in zip(prefill.sequences, prefill.cache.blocks, strict=True):
            if not sequence.complete:  # then it has no adapter any more
                self.decoder.prefix_cache.add(sequence.lora, sequence.prompt_ids, blocks)

    def _decode(self, cache: Cache) -> None:
        """Run the decoder over the last tokens, and append the tokens that the sequences choose."""
        self.lora.set_rows([sequence.lora for sequence in self.decoding])
        last = [sequence.token_ids[:, sequence.length - 1 : sequence.length] for sequence in self.decoding]
        logits = self.decoder.forward(torch.cat(last), cache, self.lora)
        for sequence, row_logits in zip(self.decoding, logits[:, -1], strict=True):
            sequence.append_token(row_logits[: sequence.vocab_size])
        self._keep_sequences([not sequence.done for sequence in self.decoding])

    def _keep_sequences(self, keep: list[bool]) -> None:
        """Remove decoding sequences; the last rows move into the rows that become free."""
        if all(keep):
            return
        rows = [row for row, kept in enumerate(keep) if kept]
        for free in [row for row in range(len(rows)) if not keep[row]]:
            rows.insert(free, rows.pop())
        self.decoding = [self.decoding[row] for row in rows]
        if rows and self.cache is not None:
            self.cache.keep_rows(rows)
        else:
            self.cache = None
            self.lora.set_rows([None])


@dataclass(eq=False)
class PrefillBatch:
    """Sequences whose prompts are prefilled together into a cache. `prompts` (rows, longest), without
    what the prefix cache has, is padded on the left; its first `columns` are done."""

    sequences: list[Sequence]
    prompts: torch.Tensor
    cache: Cache
    lora: LoraForBatch
    columns: int = 0
