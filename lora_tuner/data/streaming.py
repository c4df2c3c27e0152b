"""Stream training sequences, without end and in bounded memory.


`config.shuffle_buffer` training rows are read, shuffled, tokenized and packed together, then the
next ones. After the last row a new pass begins with another order. The sequences depend on the
settings and the position alone, so a resumed run continues exactly, and several processes take
turns in the same order without communication. Each process reads all rows. Duplicates are not
removed; they are on the same side of the split.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..config import TrainConfig
from ..errors import TrainingError
from . import tokenization
from .dataset import Dataset, RowCounts, iter_rows
from .packing import PackedSequences
from .splitting import is_held_out
from .tokenization import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StreamState:
    """Position of a stream: the sequences taken, and where the buffer of the last one begins.

    Attributes:
        taken: Sequences taken from the stream.
        first: Number of the first sequence of the current buffer.
        epoch: Current pass, from 0.
        row: Rows of the pass before the current buffer.
        counts: `RowCounts` before the current buffer.
        read: `RowCounts` of all rows read so far.
        reasons: Invalid rows by reason before the current buffer.
        read_reasons: Invalid rows by reason among all rows read so far.
    """

    taken: int = 0
    first: int = 0
    epoch: int = 0
    row: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    read_reasons: dict[str, int] = field(default_factory=dict)


class StreamingDataset(torch.utils.data.IterableDataset[list[TokenIds]]):
    """Training items, as those of `PackedSequences`, from a position on.

    Args:
        eval_hashes: Hashes of the rows of the evaluation dataset, which are not trained on.
        counts: Updated as rows are read.
        state: Position to continue from.
        reasons: Invalid rows by reason, updated as rows are read.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: "PreTrainedTokenizerBase",
        eval_hashes: frozenset[bytes],
        counts: RowCounts,
        state: StreamState,
        reasons: dict[str, int] | None = None,
    ) -> None:
        self.config, self.tokenizer, self.eval_hashes, self.counts = config, tokenizer, eval_hashes, counts
        self.reasons = {} if reasons is None else reasons
        self.states = [state]  # the beginning of each buffer, newest last

    def state_at(self, taken: int) -> StreamState:
        """Return the position after `taken` sequences; more may have been read ahead."""
        while len(self.states) > 1 and self.states[1].first <= taken:
            del self.states[0]
        return replace(self.states[0], taken=taken, read=asdict(self.counts), read_reasons=dict(self.reasons))

    def restore_counts(self) -> None:
        """Set the counts to those of the position, for a run that reads no more rows."""
        self._set_counts(self.states[0].read, self.states[0].read_reasons, Dataset("", ""))

    def __iter__(self) -> Iterator[list[TokenIds]]:
        state = self.states[-1]
        skip = state.taken - state.first
        while True:
            is_full_pass, sequence_count = state.row == 0, 0
            for texts, row in self._read_buffers(state):
                sequences = self._make_sequences(texts, state)
                sequence_count += len(sequences)
                yield from sequences[skip:]
                skip, first = 0, state.first + len(sequences)
                state = StreamState(first, first, state.epoch, row, asdict(self.counts), {}, dict(self.reasons))
                self.states.append(state)
            if is_full_pass and not sequence_count:
                raise TrainingError(f"No row of {self.config.dataset} has a token to learn.")
            state = replace(
                state, epoch=state.epoch + 1, row=0, counts=asdict(self.counts), reasons=dict(self.reasons)
            )
            self.states.append(state)

    def _read_buffers(self, state: StreamState) -> Iterator[tuple[list[str], int]]:
        """Yield the training texts of each buffer, and the rows read in the pass, until its end."""
        dataset = Dataset(self.config.dataset, "")
        texts: list[str] = []
        for digest, text, _ in iter_rows(self.config, dataset, skip=state.row):
            if is_held_out(digest):
                dataset.counts.held_out += 1
            elif digest in self.eval_hashes:
                dataset.counts.in_eval_dataset += 1
            else:
                dataset.counts.train += 1
                texts.append(text)
            if len(texts) == self.config.shuffle_buffer:
                self._set_counts(state.counts, state.reasons, dataset)
                yield texts, state.row + dataset.counts.read
                texts = []
        self._set_counts(state.counts, state.reasons, dataset)
        if texts:
            yield texts, state.row + dataset.counts.read

    def _set_counts(self, counts: dict[str, int], reasons: dict[str, int], since: Dataset) -> None:
        """Set the counts to those before the buffer, and those of the rows read since."""
        for name, count in asdict(since.counts).items():
            setattr(self.counts, name, counts.get(name, 0) + count)
        self.reasons.clear()
        self.reasons.update(Counter(reasons) + Counter(since.invalid_reasons))

    def _make_sequences(self, texts: list[str], state: StreamState) -> list[list[TokenIds]]:
        max_length = self.config.max_length
        rows, _ = tokenization.encode_rows(self.tokenizer, texts, max_length, self.config.long_rows)
        rows = [row for row in rows if tokenization.count_predictions(row)]
        packed = PackedSequences(rows, max_length, packing=self.config.packing)
        sequences = [packed[index] for index in range(len(packed))]
        random.Random(f"{self.config.seed} {state.epoch} {state.row}").shuffle(sequences)
        return sequences
