"""Rows that are written together: between two tokens some join and others leave, so a long answer holds up no short one.

What a row writes does not depend on the others (continuous batching: Yu et al., Orca, OSDI 2022). Two ways lead through a
base, our own on a CPU (`decoder`) and transformers' (`stock`). Surprise: a prompt is read beside others in pieces, so that
they need not wait for the whole of it. Limit: all rows end in one column of the cache, so a short one beside a long one
takes as much memory.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from .bank import AdapterBank, Mix
from .base_model import Base, quiet
from .decoder import Cache, Decoder
from .errors import Listener, Notice, ignore
from .row import Row
from .stock import Stock

AT_ONCE = 4096  # tokens of prompts that are read in one pass
BESIDE = 256  # the same where others wait for their next token
WORTH_GUESSING = 24  # tokens; for fewer, the draft is not worth making


class Writer:
    """All that is being written beside one base. Rows that cannot share a batch make several, which take turns."""

    def __init__(self, base: Base, notify: Listener = ignore) -> None:
        self.base = base
        self.bank = AdapterBank(base)
        self.notify = notify
        self.decoder = Decoder.of(base)
        self._batches: dict[Any, Batch] = {}

    @cached_property
    def stock(self) -> "Stock":
        stock = Stock(self.base, self.bank)
        if not stock.cached:
            self.notify(Notice(f"{self.base.source.name} keeps its past in a way of its own, so each token is slow."))
        return stock

    @property
    def bytes_a_token(self) -> int:
        """What a token of a row takes in the cache."""
        config = self.base.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(config.num_hidden_layers * 2 * heads * size * self.base.dtype.itemsize)

    @property
    def rows(self) -> list[Row]:
        return [row for batch in self._batches.values() for row in batch.rows]

    def join(self, rows: Sequence[Row]) -> None:
        """Rows that are written from now on."""
        before = len(self._batches)
        for row in rows:
            way: Decoder | Stock
            if self.decoder is not None and (row.loaded is None or row.loaded.is_sum):
                way, alone = self.decoder, None
            else:
                way, alone = self.stock, None if self.stock.mixes else row.loaded
            if (way, alone) not in self._batches:
                self._batches[way, alone] = Batch(way, self.bank)
            self._batches[way, alone].join(row)
        if len(self._batches) > before and sum(way is not self.decoder for way, _ in self._batches) > 1:
            text = "This base does not keep the rows of a batch apart, so each adapter has a batch of its own."
            self.notify(Notice(text))

    def step(self) -> None:
        """A token more for each row, or several; those that are done leave."""
        with quiet(), torch.inference_mode():
            for key, batch in list(self._batches.items()):
                batch.step()
                if not batch.rows:
                    del self._batches[key]

    def leave(self, row: Row) -> None:
        """A row that nobody waits for any more."""
        with torch.inference_mode():  # as the caches were made
            for key, batch in list(self._batches.items()):
                batch.leave(row)
                if not batch.rows:
                    del self._batches[key]

    def clear(self) -> None:
        self._batches.clear()


class Batch:
    """Rows on one way through a base."""

    def __init__(self, way: Decoder | Stock, bank: AdapterBank) -> None:
        self.way: Any = way
        self.mix: Any = way.mix(bank)
        self.mix_of_new: Any = way.mix(bank)
        self.writing: list[Row] = []
        self.cache: Any = None  # of the rows that are written, without their last tokens
        self.waiting: list[Row] = []
        self.reading: list[Row] = []  # rows whose prompts are being read, into a cache of their own
        self.prompts = torch.empty(0, 0)
        self.new_cache: Any = None
        self.guesser: _Guesser | None = None

    @property
    def rows(self) -> list[Row]:
        return self.writing + self.reading + self.waiting

    def join(self, row: Row) -> None:
        self.waiting.append(row)

    def leave(self, row: Row) -> None:
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.reading:  # its line is read on, to nothing
            self.reading[self.reading.index(row)].limit = len(row.new)
        elif row in self.writing:
            self._keep([it is not row for it in self.writing])

    def step(self) -> None:
        self._read()
        if not self.writing:
            return
        self.mix.use([row.loaded for row in self.writing])
        guessed = self._guess()
        places = [row.length - 1 for row in self.writing]
        ids = torch.cat(
            [row.ids[:, place : place + 1 + guessed] for row, place in zip(self.writing, places, strict=True)]
        )
        logits = self.way.step(ids, self.cache, self.mix)
        number = 0
        for line, row in enumerate(self.writing):
            for number in range(guessed + 1):
                guess = int(ids[line, number + 1]) if number < guessed else None
                if row.take(logits[line, number]) != guess or row.done:
                    break
        if guessed:
            self.cache.used -= guessed - number
            if self.guesser is not None:
                self.guesser.taken += number + 1
        self._keep([not row.done for row in self.writing])

    def _keep(self, stay: list[bool]) -> None:
        """Rows that go give their lines to the last ones."""
        if all(stay):
            return
        lines = [line for line, it in enumerate(stay) if it]
        holes = [line for line in range(len(lines)) if not stay[line]]
        moved = [lines.pop() for _ in holes]
        for hole, line in zip(holes, moved, strict=True):
            lines.insert(hole, line)
        self.writing = [self.writing[line] for line in lines]
        self.guesser = None
        if lines:
            self.cache.keep(lines)
        else:
            self.cache = None
            self.mix.use([None])

    def _read(self) -> None:
        """Read prompts of rows that wait: as many tokens as one pass may have, the rest in the next step."""
        most = BESIDE if self.writing else AT_ONCE
        if not self.reading:
            self._begin(most)
        if not self.reading:
            return
        rows, longest = self.prompts.shape
        count = max(1, most // rows) if self.way.in_pieces else longest
        part = self.prompts[:, self.new_cache.used : self.new_cache.used + count]
        logits = self.way.step(part, self.new_cache, self.mix_of_new, last=True)
        if self.new_cache.used < longest:
            return
        ready, self.reading = self.reading, []
        for row, each in zip(ready, logits[:, -1], strict=True):
            if not row.done:
                row.take(each)
        lines = [line for line, row in enumerate(ready) if not row.done]
        if lines:
            self.new_cache.keep(lines)
            if self.writing:
                self.cache.join(self.new_cache)
            else:
                self.cache = self.new_cache
            self.writing += [ready[line] for line in lines]
            self.guesser = None
        self.new_cache = None
        self.mix_of_new.use([None])

    def _begin(self, most: int) -> None:
        """The next rows to be read: the first that waits, and others while there is room beside it."""
        longest = 0
        while self.waiting:
            both = max(longest, len(self.waiting[0].prompt))
            if self.reading and both * (len(self.reading) + 1) > most:
                break
            longest = both
            self.reading.append(self.waiting.pop(0))
        if not self.reading:
            return
        padding = [longest - len(row.prompt) for row in self.reading]
        self.prompts = torch.stack(
            [F.pad(row.ids[0, : len(row.prompt)], (room, 0)) for row, room in zip(self.reading, padding, strict=True)]
        )
        limit = 0 if self.writing else min(max(row.limit for row in self.reading), 1024)
        self.new_cache = self.way.cache(len(self.reading), longest + limit, padding)
        self.mix_of_new.use([row.loaded for row in self.reading])

    def _guess(self) -> int:
        """Guesses of what comes, where one row alone is written; how many."""
        if len(self.writing) != 1 or self.waiting or self.reading or not isinstance(self.way, Decoder):
            return 0
        (row,) = self.writing
        if self.guesser is None:
            if row.limit < WORTH_GUESSING:
                return 0
            self.guesser = _Guesser(self.way, self.mix, row)
        return self.guesser.guess(self.cache)


class _Guesser:
    """Writes ahead with the draft of a decoder, for one row. The decoder has the last word on every token, so the text is its
    own; it only reads its weights once for several tokens. Stops for good where it guesses badly."""

    def __init__(self, decoder: Decoder, mix: Mix, row: Row) -> None:
        self.decoder = decoder
        self.mix = mix
        self.row = row
        self.rounds, self.taken = 0, 0

    def guess(self, cache: Cache) -> int:
        """Put guesses behind the tokens of the row, and say how many."""
        draft = self.decoder.draft  # made when it is first asked for, so after the first token
        if draft is None or (self.rounds > 8 and self.taken < 2 * self.rounds):
            return 0
        self.rounds += 1
        end = self.row.length
        count: int = min(self.decoder.guesses, self.row.limit - len(self.row.new) - 1)
        for place in range(end, end + count):
            logits = draft.step(self.row.ids[:, place - 1 : place], cache, self.mix)[0, -1]
            self.row.put(place, self.row.best(place, logits))
        cache.used -= count
        return count
