"""Training sequences from rows that are read when they are needed: without end, in memory that does not grow.

So many rows (`config.buffer`) are read, shuffled, tokenised and packed together, then the next ones; behind the last row the
first comes again, shuffled otherwise. Surprise: what a stream gives depends on nothing but its settings and its place, so a run
goes on exactly, and several processes take turns in one order without a word. Price: each of them reads all rows. Limit: a copy
of a row stays in, on its side of the split.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..config import TrainConfig
from ..errors import TrainingError
from . import tokenization
from .dataset import Dataset, RowCounts, iter_rows
from .packing import PackedSequences
from .splitting import is_held_out
from .tokenization import TokenIds


@dataclass(frozen=True)
class StreamState:
    """Where a stream is: `taken` sequences have been given. The rows that the last of them came from begin behind row `row` of
    the pass `epoch`, and their first sequence is number `first`; `counts` is of all rows before,
    `read` of those that had been read by then."""

    taken: int = 0
    first: int = 0
    epoch: int = 0
    row: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)


class StreamingDataset(torch.utils.data.IterableDataset[list[TokenIds]]):
    """Training items, as `tokens.Sequences` has them, from a place on. `measured` are hashes of rows that must not be trained on;
    `counts` is kept up to date."""

    def __init__(
        self, config: TrainConfig, tokenizer: Any, measured: frozenset[bytes], counts: RowCounts, place: StreamState
    ) -> None:
        self.config, self.tokenizer, self.measured, self.counts = config, tokenizer, measured, counts
        self.begun = [place]  # where rows were begun to be read, newest last

    def state_at(self, taken: int) -> StreamState:
        """Where it was when it had given so many sequences, which may be fewer than it has given by now."""
        while len(self.begun) > 1 and self.begun[1].first <= taken:
            del self.begun[0]
        return replace(self.begun[0], taken=taken, read=asdict(self.counts))

    def restore_counts(self) -> None:
        """The counts as they were at its place, where nothing more is going to be read."""
        self._count(RowCounts(**self.begun[0].read), RowCounts())

    def __iter__(self) -> Iterator[list[TokenIds]]:
        place = self.begun[-1]
        skip = place.taken - place.first
        while True:
            found, whole = 0, place.row == 0
            for texts, behind in self._texts(place):
                sequences = self._sequences(texts, place)
                found += len(sequences)
                yield from sequences[skip:]
                skip, first = 0, place.first + len(sequences)
                place = StreamState(first, first, place.epoch, behind, asdict(self.counts))
                self.begun.append(place)
            if whole and not found:
                raise TrainingError(f"No row of {self.config.dataset} has anything to learn in it.")
            place = replace(place, epoch=place.epoch + 1, row=0, counts=asdict(self.counts))
            self.begun.append(place)

    def _texts(self, place: StreamState) -> Iterator[tuple[list[str], int]]:
        """So many training rows, and the number of the row behind the last of them, again and again to the end of a pass."""
        corpus = Dataset(self.config.dataset, "")
        before, texts = RowCounts(**place.counts), list[str]()
        for digest, text, _ in iter_rows(self.config, corpus, after=place.row):
            if is_held_out(digest):
                corpus.counts.held_out += 1
            elif digest in self.measured:
                corpus.counts.in_eval_dataset += 1
            else:
                corpus.counts.train += 1
                texts.append(text)
            if len(texts) == self.config.shuffle_buffer:
                self._count(before, corpus.counts)
                yield texts, place.row + corpus.counts.read
                texts = []
        self._count(before, corpus.counts)
        if texts:
            yield texts, place.row + corpus.counts.read

    def _count(self, before: RowCounts, since: RowCounts) -> None:
        for name, count in asdict(since).items():
            setattr(self.counts, name, getattr(before, name) + count)

    def _sequences(self, texts: list[str], place: StreamState) -> list[list[TokenIds]]:
        config = self.config
        chunk = config.long_rows == "chunk"
        encoded = tokenization.encode_texts(self.tokenizer, texts, most=None if chunk else config.max_length)
        rows = [
            row
            for row in tokenization.truncate(encoded, config.max_length, chunk=chunk)[0]
            if tokenization.count_predictions(row)
        ]
        packed = PackedSequences(rows, config.max_length, packing=config.packing)
        order = list(range(len(packed)))
        random.Random(f"{config.seed} {place.epoch} {place.row}").shuffle(order)
        return [packed[index] for index in order]
