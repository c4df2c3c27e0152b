"""Pack tokenized rows into sequences and collate them into batches."""

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch

from .mixing import mix
from .tokenization import TokenIds

IGNORE_INDEX = -100
# oneDNN compiles and keeps a product for each shape, in bfloat16 half a megabyte: lengths that recur save a gigabyte.
LENGTH_STEP = 32


def round_up(length: int, step: int = LENGTH_STEP) -> int:
    """Return the first multiple of a step that is not below a length."""
    return -(-length // step) * step


def pack_rows(rows: Sequence[TokenIds], capacity: int, unit: int = 1) -> list[list[int]]:
    """Group whole rows into sequences of at most `capacity` tokens: best fit, longest row first.

    On IMDb at 512 tokens 0.6% of the positions are padding; one padded row per sequence would have
    48%.

    Args:
        unit: So many neighbouring rows lie in one sequence.

    Returns:
        The indices of the rows of each sequence.
    """
    lengths = [sum(map(len, rows[first : first + unit])) for first in range(0, len(rows), unit)]
    by_free_tokens: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        free = next((free for free in range(length, capacity) if by_free_tokens[free]), capacity)
        sequence = by_free_tokens[free].pop() if by_free_tokens[free] else []
        sequence += range(unit * index, unit * (index + 1))
        by_free_tokens[free - length].append(sequence)
    return [sequence for sequences in by_free_tokens for sequence in sequences]


class PackedRows(list[TokenIds]):
    """Rows of one sequence, and their numbers among all rows: -1 for those that are none of them."""

    def __init__(self, rows: Iterable[TokenIds], numbers: Sequence[int] = ()) -> None:
        super().__init__(rows)
        self.numbers = [*numbers] or [-1] * len(self)


class PackedSequences(torch.utils.data.Dataset[PackedRows]):
    """Training items: each is the list of rows in one sequence, a single row or unit without packing.

    An index past the end returns an item without labels: filler for processes that share an uneven
    number of items.

    Args:
        source_rows: Number of rows of each source, if no sequence may have rows of two.
        unit: So many neighbouring rows lie in one sequence, such as both answers of a pair; it has
            room for as many rows of `max_length`.
    """

    def __init__(
        self,
        rows: Sequence[TokenIds],
        max_length: int,
        *,
        packing: bool,
        source_rows: Sequence[int] = (),
        unit: int = 1,
    ) -> None:
        self.rows, self.unit = rows, unit
        self.groups: list[list[int]] = []
        self.source_sizes: list[int] = []  # sequences of each source
        start = 0
        for count in source_rows or [len(rows)]:
            part = rows[start : start + count]
            groups = [[*range(first, first + unit)] for first in range(0, count, unit)]
            if packing:
                groups = pack_rows(part, unit * max_length, unit)
            self.groups += [[start + index for index in group] for group in groups]
            self.source_sizes.append(len(groups))
            start += count

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> PackedRows:
        if index >= len(self.groups):
            return PackedRows([self.rows[0][:1]] * self.unit)
        return PackedRows([self.rows[row] for row in self.groups[index]], self.groups[index])

    def epoch_order(self, epoch: int, seed: int, weights: Sequence[float]) -> Iterator[int]:
        """Yield the shuffled sequences of an epoch.

        Of sources with weights, an epoch has as many sequences as there are in all, mixed by the
        weights; a source continues in the next epoch where it stopped, and begins anew after its
        last sequence.
        """
        if not weights:
            yield from torch.randperm(len(self), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
            return
        numbers = list(itertools.islice(mix(weights), len(self)))
        shares = Counter(numbers)
        draws = [self._draw(number, epoch * shares[number], seed) for number in range(len(self.source_sizes))]
        starts = [0, *itertools.accumulate(self.source_sizes)]
        for number in numbers:
            yield starts[number] + next(draws[number])

    def _draw(self, number: int, taken: int, seed: int) -> Iterator[int]:
        """Yield sequences of a source after the first `taken`: each pass is shuffled anew."""
        size = self.source_sizes[number]
        passed, skip = divmod(taken, size)
        for number_of_pass in itertools.count(passed):
            order = list(range(size))
            random.Random(f"{seed} {number} {number_of_pass}").shuffle(order)
            yield from order[skip:]
            skip = 0

    def rows_in_steps(self, steps: int, per_step: int, seed: int, weights: Sequence[float]) -> list[int]:
        """Return the indices of the rows that a run has seen after some steps of `per_step` sequences."""
        per_epoch = -(-len(self) // per_step)
        seen: set[int] = set()
        for epoch in range(-(-steps // per_epoch)):
            taken = min(steps - epoch * per_epoch, per_epoch) * per_step
            seen.update(itertools.islice(self.epoch_order(epoch, seed, weights), taken))
            if len(seen) == len(self):
                break
        return sorted(row for sequence in seen for row in self.groups[sequence])

    def longest_first(self) -> list[PackedRows]:
        items = [self[index] for index in range(len(self))]
        return sorted(items, key=lambda item: -sum(map(len, item)))


def collate(
    items: Sequence[Sequence[TokenIds]], pad_id: int, *, cu_seqlens: bool = False, pad_to_step: bool = False
) -> dict[str, torch.Tensor]:
    """Collate items into a batch padded on the right.

    The first token of a row has no label, as nothing predicts it. So Trainer, which counts labels
    before they are shifted, divides the loss by the true number of predictions (for GPT-2 it would
    not).

    Args:
        cu_seqlens: Add `cu_seq_lens_q`: the starts of all rows in the flattened batch, and its
            length.
        pad_to_step: Padding ends at a multiple of LENGTH_STEP, which may be beyond the context of the base.

    Returns:
        `input_ids`, `position_ids` and `labels`, each int64 of shape (items, longest item);
        `cu_seq_lens_q` has shape (rows + 1,).
    """
    longest = max(sum(map(len, item)) for item in items)
    if pad_to_step:
        longest = round_up(longest)
    values = torch.full((len(items), longest), ~pad_id)  # below zero: no label
    positions = torch.zeros_like(values)
    starts = []
    for index, item in enumerate(items):
        start = 0
        for row in item:
            values[index, start : start + len(row)] = torch.tensor(row)
            positions[index, start:] = torch.arange(longest - start)  # also padding
            starts.append(index * longest + start)
            start += len(row)
    # Behind a short row padding may be longer than the context of the base.
    positions.clamp_(max=max(1, *(len(row) - 1 for item in items for row in item)))
    batch = {
        "input_ids": values.where(values >= 0, ~values),
        "position_ids": positions,
        "labels": values.where((values >= 0) & (positions > 0), IGNORE_INDEX),
    }
    if cu_seqlens:
        batch["cu_seq_lens_q"] = torch.tensor([*starts, values.numel()])
    return batch


def split_rows(values: torch.Tensor, rows: Sequence[TokenIds], *, packed: bool) -> list[torch.Tensor]:
    """Return the part (row length,) of each row of a batch's values (items, length), without padding.

    Args:
        packed: All rows are one sequence; else each is one.
    """
    lengths = [len(row) for row in rows]
    by_row = values[0, : sum(lengths)].split(lengths) if packed else values
    return [of_row[:length] for of_row, length in zip(by_row, lengths, strict=True)]
