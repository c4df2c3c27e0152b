"""Rows that are written together: between two tokens some join and others leave, so a long answer holds up no short one.

What a row writes does not depend on the others (continuous batching: Yu et al., Orca, OSDI 2022). Two ways lead through a
base, our own on a CPU (`decoder`) and transformers' (`stock`). Surprise: a prompt is read beside others in pieces, and prompts
take turns, so that nobody waits for the whole of a long one. Limit: all rows end in one column of the cache, so a short one
beside a long one takes as much memory.
"""

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import EventHandler, Notice, ignore_events
from ..models.loading import LoadedBase
from .cpu_decoder import CpuDecoder
from .hf_decoder import HFDecoder
from .multi_lora import MultiLora
from .sequence import Sequence
from .speculative import DraftDecoder

PREFILL_TOKENS = 4096  # tokens of prompts that are read in one pass
PREFILL_CHUNK = 256  # the same where others wait for their next token
MIN_DRAFT_TOKENS = 24  # tokens; for fewer, the draft is not worth making


class GenerationEngine:
    """All that is being written beside one base. Rows that cannot share a batch make several, which take turns."""

    def __init__(self, base: LoadedBase, notify: EventHandler = ignore_events) -> None:
        self.base = base
        self.multi_lora = MultiLora(base)
        self.notify = notify
        self.cpu_decoder = CpuDecoder.for_base(base)
        self._batches: dict[Any, RunningBatch] = {}
        self._told = False  # that adapters have batches of their own

    @cached_property
    def hf_decoder(self) -> "HFDecoder":
        stock = HFDecoder(self.base, self.multi_lora)
        if not stock.cached:
            self.notify(Notice(f"{self.base.files.name} keeps its past in a way of its own, so each token is slow."))
        return stock

    @property
    def kv_bytes_per_token(self) -> int:
        """What a token of a row takes in the cache, about that where a base keeps its past in a way of its own."""
        config = self.base.model.config.get_text_config()
        queries = getattr(config, "num_attention_heads", None) or 1
        heads = getattr(config, "num_key_value_heads", None) or queries
        size = getattr(config, "head_dim", None) or config.hidden_size // queries
        return int(config.num_hidden_layers * 2 * heads * size * self.base.dtype.itemsize)

    @property
    def sequences(self) -> list[Sequence]:
        return [row for batch in self._batches.values() for row in batch.sequences]

    def add(self, rows: list[Sequence]) -> None:
        """Rows that are written from now on."""
        for row in rows:
            way: CpuDecoder | HFDecoder
            if self.cpu_decoder is not None and (row.lora is None or row.lora.is_additive):
                way, alone = self.cpu_decoder, None
            else:
                way, alone = self.hf_decoder, None if self.hf_decoder.mixes else row.lora
            if (way, alone) not in self._batches:
                self._batches[way, alone] = RunningBatch(way, self.multi_lora)
            self._batches[way, alone].add(row)
        if not self._told and sum(way is not self.cpu_decoder for way, _ in self._batches) > 1:
            text = "This base does not keep the rows of a batch apart, so each adapter has a batch of its own."
            self.notify(Notice(text))
            self._told = True

    def step(self) -> None:
        """A token more for each row, or several; those that are done leave. What goes wrong ends the rows of its batch alone, as
        their `error`."""
        with torch.inference_mode():
            for key, batch in list(self._batches.items()):
                try:
                    batch.step()
                except Exception as error:
                    for row in batch.sequences:
                        if not row.complete:
                            row.fail(error)
                    del self._batches[key]
                    continue
                if not batch.sequences:
                    del self._batches[key]

    def cancel(self, row: Sequence) -> None:
        """A row that nobody waits for any more."""
        with torch.inference_mode():  # as the caches were made
            for key, batch in list(self._batches.items()):
                batch.cancel(row)
                if not batch.sequences:
                    del self._batches[key]

    def clear(self) -> None:
        self._batches.clear()


class RunningBatch:
    """Rows on one way through a base."""

    def __init__(self, way: CpuDecoder | HFDecoder, bank: MultiLora) -> None:
        self.decoder: Any = way
        self.bank = bank
        self.lora: Any = way.new_lora(bank)
        self.decoding: list[Sequence] = []
        self.cache: Any = None  # of the rows that are written, without their last tokens
        self.waiting: list[Sequence] = []
        self.prefills: deque[PrefillBatch] = deque()  # the first is next
        self.draft: DraftDecoder | None = None

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.decoding, *(row for reading in self.prefills for row in reading.sequences), *self.waiting]

    def add(self, row: Sequence) -> None:
        self.waiting.append(row)

    def cancel(self, row: Sequence) -> None:
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.decoding:
            self._keep_sequences([it is not row for it in self.decoding])
        for reading in [it for it in self.prefills if row in it.sequences]:
            row.max_new_tokens = len(row.output_ids)  # its line is read on, to nothing, for the sake of the others
            if all(it.done for it in reading.sequences):
                self.prefills.remove(reading)

    def step(self) -> None:
        self._prefill()
        if not self.decoding:
            return
        self.lora.set_rows([row.lora for row in self.decoding])
        guessed = self._propose()
        places = [row.length - 1 for row in self.decoding]
        ids = torch.cat(
            [row.ids[:, place : place + 1 + guessed] for row, place in zip(self.decoding, places, strict=True)]
        )
        logits = self.decoder.forward(ids, self.cache, self.lora)
        number = 0
        for line, row in enumerate(self.decoding):
            for number in range(guessed + 1):
                guess = int(ids[line, number + 1]) if number < guessed else None
                if row.append_token(logits[line, number]) != guess or row.done:
                    break
        if guessed:
            self.cache.used -= guessed - number
            if self.draft is not None:
                self.draft.accepted += number + 1
        self._keep_sequences([not row.done for row in self.decoding])

    def _keep_sequences(self, stay: list[bool]) -> None:
        """Rows that go give their lines to the last ones."""
        if all(stay):
            return
        lines = [line for line, it in enumerate(stay) if it]
        holes = [line for line in range(len(lines)) if not stay[line]]
        moved = [lines.pop() for _ in holes]
        for hole, line in zip(holes, moved, strict=True):
            lines.insert(hole, line)
        self.decoding = [self.decoding[line] for line in lines]
        self.draft = None
        if lines:
            self.cache.keep_rows(lines)
        else:
            self.cache = None
            self.lora.set_rows([None])

    def _prefill(self) -> None:
        """Read prompts: as many tokens as one pass may have. What is left of them comes after those that wait by then."""
        alone = not self.decoding and len(self.prefills) + bool(self.waiting) == 1
        most = PREFILL_TOKENS if alone else PREFILL_CHUNK
        if self.waiting:
            self._start_prefill(most)
        if not self.prefills:
            return
        reading = self.prefills[0]
        rows, longest = reading.prompts.shape
        count = max(1, most // rows) if self.decoder.in_pieces else longest
        part = reading.prompts[:, reading.cache.used : reading.cache.used + count]
        logits = self.decoder.forward(part, reading.cache, reading.lora, last=True)
        if reading.cache.used < longest:
            self.prefills.rotate(-1)
            return
        for row, each in zip(reading.sequences, logits[:, -1], strict=True):
            if not row.done:
                row.append_token(each)
        lines = [line for line, row in enumerate(reading.sequences) if not row.done]
        if lines:
            reading.cache.keep_rows(lines)
            if self.decoding:
                self.cache.append_rows(reading.cache)
            else:
                self.cache = reading.cache
            self.decoding += [reading.sequences[line] for line in lines]
            self.draft = None
        self.prefills.popleft()

    def _start_prefill(self, most: int) -> None:
        """The next rows to be read: the first that waits, and others while there is room beside it."""
        count, longest = 1, len(self.waiting[0].prompt_ids)
        for row in self.waiting[1:]:
            both = max(longest, len(row.prompt_ids))
            if both * (count + 1) > most:
                break
            count, longest = count + 1, both
        rows = self.waiting[:count]
        padding = [longest - len(row.prompt_ids) for row in rows]
        prompts = [F.pad(row.ids[0, : len(row.prompt_ids)], (room, 0)) for row, room in zip(rows, padding, strict=True)]
        limit = 0 if self.decoding else min(max(row.max_new_tokens for row in rows), 1024)
        mix = self.decoder.new_lora(self.bank)
        mix.set_rows([row.lora for row in rows])
        self.prefills.append(
            PrefillBatch(rows, torch.stack(prompts), self.decoder.new_cache(count, longest + limit, padding), mix)
        )
        del self.waiting[:count]

    def _propose(self) -> int:
        """Guesses of what comes, where one row alone is written; how many."""
        if len(self.decoding) != 1 or self.waiting or self.prefills or not isinstance(self.decoder, CpuDecoder):
            return 0
        (row,) = self.decoding
        if self.draft is None:
            if row.max_new_tokens - len(row.output_ids) < MIN_DRAFT_TOKENS:
                return 0
            self.draft = DraftDecoder(self.decoder, self.lora, row)
        return self.draft.propose(self.cache)


@dataclass(eq=False)
class PrefillBatch:
    """Rows whose prompts are being read together, into a cache of their own. `prompts` is (rows, longest); what is shorter
    begins later."""

    sequences: list[Sequence]
    prompts: torch.Tensor
    cache: Any
    lora: Any
