"""Stream training sequences, without end and in bounded memory.


`config.shuffle_buffer` training rows are read, shuffled, tokenized and packed together, then the
next ones. After the last row a new pass begins with another order. Of several sources each is a
stream of its own; their sequences are mixed by the weights. The sequences depend on the settings
and the position alone, so a resumed run continues exactly, and several processes take turns in the
same order without communication. Each process reads all rows. Duplicates are not removed; they are
on the same side of the split."""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..config import TrainConfig
from ..errors import TrainingError
from . import tokenization
from .mixing import mix
from .near_duplicates import NearDuplicates
from .packing import PackedRows, PackedSequences
from .rows import MIN_ROWS_TO_STOP, RowCounts, Source, iter_rows
from .splitting import content_hash, is_held_out
from .tokenization import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StreamState:
    """Position in the stream of a source: the sequences taken, and where the buffer of the last one begins.

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
        eval_hashes: Hashes of the rows and groups of the evaluation dataset, which are not trained on.
        sources: Mixed by their weights, or equally without; their counts are updated as rows are read.
        states: Position in each source to continue from; by default the beginning.
        compared: Rows whose near duplicates are not trained on, if `config` says so.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: "PreTrainedTokenizerBase",
        eval_hashes: frozenset[bytes],
        sources: Sequence[Source],
        states: Sequence[StreamState] = (),
        compared: Sequence[str] = (),
    ) -> None:
        near_duplicates = NearDuplicates(compared if config.near_duplicates == "drop" else [])
        states = states or [StreamState()] * len(sources)
        self.weights = [source.weight or 1.0 for source in sources]
        self.streams = [
            _SourceStream(config, tokenizer, eval_hashes, near_duplicates, source, state)
            for source, state in zip(sources, states, strict=True)
        ]
        self.taken = sum(state.taken for state in states)
        self.shares, self.counted, self.order = [0] * len(sources), 0, mix(self.weights)  # of the sources so far

    def position(self, taken: int) -> str:
        """Format the state of each source after `taken` sequences, no fewer than last time, as JSON.

        More may have been read ahead.
        """
        for number in itertools.islice(self.order, taken - self.counted):
            self.shares[number] += 1
        self.counted = taken
        pairs = zip(self.streams, self.shares, strict=True)
        return json.dumps([asdict(stream.state_at(share)) for stream, share in pairs])

    def restore_counts(self) -> None:
        """Set the counts to those of the position, for a run that reads no more rows."""
        for stream in self.streams:
            stream.restore_counts()

    def knows_passed_rows(self) -> bool:
        """Return whether the position tells the rows before it; those of older versions do not."""
        return any(stream.states[0].buffer_hash or stream.states[0].pass_hash for stream in self.streams)

    def has_changed(self) -> bool:
        """Return whether rows before the position are no longer those that have passed.

        Price: they are read and tokenized again, once for all passes.
        """
        return any(stream.has_changed() for stream in self.streams)

    def __iter__(self) -> Iterator[list[TokenIds]]:
        sequences = [iter(stream) for stream in self.streams]
        for number in itertools.islice(mix(self.weights), self.taken, None):
            yield next(sequences[number])


class _SourceStream:
    """Training items of one source, without end."""

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: "PreTrainedTokenizerBase",
        eval_hashes: frozenset[bytes],
        near_duplicates: NearDuplicates,
        source: Source,
        state: StreamState,
    ) -> None:
        self.config, self.tokenizer, self.eval_hashes = config, tokenizer, eval_hashes
        self.near_duplicates = near_duplicates
        self.name, self.counts = source.name, source.counts
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
                raise TrainingError(f"No row of {self.name} has a token to learn.")
            state = replace(state, epoch=state.epoch + 1, row=0, counts=asdict(self.counts))
            state = replace(state, pass_hash=state.encoded_hash, encoded_hash="")
            self.states.append(state)

    def _read_buffers(self, state: StreamState) -> Iterator[tuple[list[TokenIds], int]]:
        """Yield the training rows of each buffer, and the rows read in the pass, until its end."""
        source = Source(self.name)
        before, texts, compared = RowCounts(**state.counts), list[str](), 0
        for row in iter_rows(self.config, source, skip=state.row):
            if is_held_out(row.side):
                source.counts.held_out += 1
            elif row.digest in self.eval_hashes or row.side in self.eval_hashes:
                source.counts.in_eval_dataset += 1
            else:
                source.counts.train += 1
                texts.append(row.text)
            if len(texts) == self.config.shuffle_buffer:
                texts = self._leave_out_copies(texts, compared, source.counts)
                compared = len(texts)
            if len(texts) == self.config.shuffle_buffer:
                rows = self._encode(texts, source)
                self._set_counts(before, source.counts)
                yield rows, state.row + source.counts.read
                texts, compared = [], 0
        texts = self._leave_out_copies(texts, compared, source.counts)
        rows = self._encode(texts, source)
        self._set_counts(before, source.counts)
        if texts:
            yield rows, state.row + source.counts.read

    def _leave_out_copies(self, texts: list[str], compared: int, counts: RowCounts) -> list[str]:
        """Return the texts without near duplicates of held-out rows; the first ones are compared already."""
        matches = self.near_duplicates.find(texts[compared:])
        kept = [text for text, match in zip(texts[compared:], matches, strict=True) if match is None]
        copies = len(matches) - len(kept)
        counts.train -= copies
        counts.near_duplicates += copies
        return texts[:compared] + kept

    def _encode(self, texts: list[str], source: Source) -> list[TokenIds]:
        """Tokenize the rows of a buffer. Raises DataError if too many rows are invalid."""
        invalid: tokenization.InvalidRows = {}
        max_length, long_rows = self.config.max_length, self.config.long_rows
        rows, _ = tokenization.encode_rows(self.tokenizer, texts, max_length, long_rows, invalid)
        for text in texts:
            if text in invalid:
                source.counts.train -= 1
                source.add_invalid(source.places[text], invalid[text])
        source.places.clear()
        if source.counts.read >= MIN_ROWS_TO_STOP:
            source.report_invalid(self.config.max_invalid)
        return [row for row in rows if tokenization.count_predictions(row)]

    def _set_counts(self, before: RowCounts, since: RowCounts) -> None:
        for name, count in asdict(since).items():
            setattr(self.counts, name, getattr(before, name) + count)

    def _make_sequences(self, rows: list[TokenIds], state: StreamState) -> list[PackedRows]:
        packed = PackedSequences(rows, self.config.max_length, packing=self.config.packing)
        sequences = [packed[index] for index in range(len(packed))]
        random.Random(f"{self.config.seed} {state.epoch} {state.row}").shuffle(sequences)
        return sequences


def _next_buffer(state: StreamState) -> StreamState:
    """Return the state with the rows of the current buffer among those before it."""
    passed = content_hash([state.encoded_hash, state.buffer_hash]) if state.buffer_hash else ""
    return replace(state, encoded_hash=passed, buffer_hash="")
