"""Stream training sequences, without end and in bounded memory.


`config.shuffle_buffer` training rows are read, shuffled, tokenized and packed together, then the
next ones. After the last row a new pass begins with another order. The sequences depend on the
settings and the position alone, so a resumed run continues exactly, and several processes take
turns in the same order without communication. Each process reads all rows. Duplicates are not
removed; they are on the same side of the split.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..config import TrainConfig
from ..errors import TrainingError
from . import tokenization
from .dataset import MIN_ROWS_TO_STOP, Dataset, RowCounts, iter_rows
from .packing import PackedSequences
from .splitting import content_hash, is_held_out
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
        encoded_hash: Hash of the training rows of the pass as token ids, before the current buffer.
        buffer_hash: Hash of those in the current buffer; empty before they are read.
        pass_hash: Hash of those of a whole pass; empty in the first one.
    """

    taken: int = 0
    first: int = 0
    epoch: int = 0
    row: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    encoded_hash: str = ""
    buffer_hash: str = ""
    pass_hash: str = ""


class StreamingDataset(torch.utils.data.IterableDataset[list[TokenIds]]):
    """Training items, as those of `PackedSequences`, from a position on.

    Args:
        eval_hashes: Hashes of the rows of the evaluation dataset, which are not trained on.
        counts: Updated as rows are read.
        state: Position to continue from.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: "PreTrainedTokenizerBase",
        eval_hashes: frozenset[bytes],
        counts: RowCounts,
        state: StreamState,
    ) -> None:
        self.config, self.tokenizer, self.eval_hashes, self.counts = config, tokenizer, eval_hashes, counts
        self.states = [state]  # the beginning of each buffer, newest last

    def state_at(self, taken: int) -> StreamState:
        """Return the position after `taken` sequences; more may have been read ahead."""
        while len(self.states) > 1 and self.states[1].first <= taken:
            del self.states[0]
        return replace(self.states[0], taken=taken, read=asdict(self.counts))

    def restore_counts(self) -> None:
        """Set the counts to those of the position, for a run that reads no more rows."""
        self._set_counts(RowCounts(**self.states[0].read), RowCounts())

    def has_changed(self) -> bool:
        """Return whether rows before the position are no longer those that have passed.

        Price: they are read and tokenized again, once for all passes.
        """
        state, again = self.states[0], StreamState()
        reached = not state.buffer_hash  # of an older version, or before the first row
        if reached and not state.pass_hash:
            return False
        for rows, row in self._read_buffers(again):
            again = _next_buffer(replace(again, buffer_hash=tokenization.encoded_hash(rows)))
            if not reached and row > state.row:
                reached = True
                if again.encoded_hash != _next_buffer(state).encoded_hash:
                    return True
                if not state.pass_hash:
                    return False
        return not reached or again.encoded_hash != state.pass_hash

    def __iter__(self) -> Iterator[list[TokenIds]]:
        state = self.states[-1]
        skip = state.taken - state.first
        while True:
            is_full_pass, sequence_count = state.row == 0, 0
            for rows, row in self._read_buffers(state):
                if state.row == 0 or state.encoded_hash:  # else it goes on from one of an older version
                    state = self.states[-1] = replace(state, buffer_hash=tokenization.encoded_hash(rows))
                sequences = self._make_sequences(rows, state)
                sequence_count += len(sequences)
                yield from sequences[skip:]
                skip, first = 0, state.first + len(sequences)
                state = replace(
                    _next_buffer(state), taken=first, first=first, row=row, counts=asdict(self.counts)
                )
                self.states.append(state)
            if is_full_pass and not sequence_count:
                raise TrainingError(f"No row of {self.config.dataset} has a token to learn.")
            state = replace(state, epoch=state.epoch + 1, row=0, counts=asdict(self.counts))
            state = replace(state, pass_hash=state.encoded_hash, encoded_hash="")
            self.states.append(state)

    def _read_buffers(self, state: StreamState) -> Iterator[tuple[list[TokenIds], int]]:
        """Yield the training rows of each buffer, and the rows read in the pass, until its end."""
        dataset = Dataset(self.config.dataset, "")
        before, texts = RowCounts(**state.counts), list[str]()
        for digest, text, _ in iter_rows(self.config, dataset, skip=state.row):
            if is_held_out(digest):
                dataset.counts.held_out += 1
            elif digest in self.eval_hashes:
                dataset.counts.in_eval_dataset += 1
            else:
                dataset.counts.train += 1
                texts.append(text)
            if len(texts) == self.config.shuffle_buffer:
                rows = self._encode(texts, dataset)
                self._set_counts(before, dataset.counts)
                yield rows, state.row + dataset.counts.read
                texts = []
        rows = self._encode(texts, dataset)
        self._set_counts(before, dataset.counts)
        if texts:
            yield rows, state.row + dataset.counts.read

    def _encode(self, texts: list[str], dataset: Dataset) -> list[TokenIds]:
        """Tokenize the rows of a buffer. Raises DataError if too many rows are invalid."""
        invalid: tokenization.InvalidRows = {}
        max_length, long_rows = self.config.max_length, self.config.long_rows
        rows, _ = tokenization.encode_rows(self.tokenizer, texts, max_length, long_rows, invalid)
        for text in texts:
            if text in invalid:
                dataset.counts.train -= 1
                dataset.add_invalid(dataset.places[text], invalid[text])
        dataset.places.clear()
        if dataset.counts.read >= MIN_ROWS_TO_STOP:
            dataset.report_invalid(self.config.max_invalid)
        return [row for row in rows if tokenization.count_predictions(row)]

    def _set_counts(self, before: RowCounts, since: RowCounts) -> None:
        for name, count in asdict(since).items():
            setattr(self.counts, name, getattr(before, name) + count)

    def _make_sequences(self, rows: list[TokenIds], state: StreamState) -> list[list[TokenIds]]:
        packed = PackedSequences(rows, self.config.max_length, packing=self.config.packing)
        sequences = [packed[index] for index in range(len(packed))]
        random.Random(f"{self.config.seed} {state.epoch} {state.row}").shuffle(sequences)
        return sequences


def _next_buffer(state: StreamState) -> StreamState:
    """Return the state with the rows of the current buffer among those before it."""
    passed = content_hash([state.encoded_hash, state.buffer_hash]) if state.buffer_hash else ""
    return replace(state, encoded_hash=passed, buffer_hash="")
