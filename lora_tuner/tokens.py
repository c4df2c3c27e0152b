"""Text to tensors: tokenise with the end of text, cut, pack, collate.

Two surprises. Labels are masked by length, never by token id: the pad token is the end of text, and masking by id would
unlearn where a text ends (transformers#23530). And a batch has no attention mask: padding stands on the right, where a
causal model never looks, and packed rows are told apart by position ids that start again at 0, which transformers turns
into isolated attention as long as there is no mask and no cache. In a row a token that is read and not learnt, such as one of a
question, stands as its complement, ~id, below zero.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import chat
from .errors import DataError

NO_LABEL = -100
LONGEST = 256  # characters that a token stands for at the most, with room: GPT-2's longest has 128
Row = np.ndarray[Any, np.dtype[np.int32]]  # (tokens,)


def encode(tokenizer: Any, texts: Sequence[str], *, end: bool = True, most: int | None = None) -> list[Row]:
    """Token ids of each text, with what the tokenizer puts at the front and, unless `end` is off, one end of text.

    Text that spells a special token is read as text, so that no row can end itself. A row that is going to be cut at `most`
    tokens is not read much further: a tokenizer takes more than a hundred times the memory of its text. Of conversations
    (`chat`) the answers alone are learnt; raises DataError for those that the chat template does not take.
    """
    if end and any(chat.is_chat(text) for text in texts):  # a prompt is text, whatever it begins with
        talks = iter(_talks(tokenizer, [text for text in texts if chat.is_chat(text)], most))
        plain = iter(encode(tokenizer, [text for text in texts if not chat.is_chat(text)], end=end, most=most))
        return [next(talks if chat.is_chat(text) else plain) for text in texts]
    if not texts:
        return []
    if most is not None:
        texts = [text[: most * LONGEST] for text in texts]
    encoded = tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    rows = []
    for ids in encoded:
        while ids and ids[-1] == eos and len(ids) > 1:
            ids = ids[:-1]
        rows.append(np.array([*ids, eos] if end else ids, dtype=np.int32))
    return rows


def _talks(tokenizer: Any, texts: Sequence[str], most: int | None) -> list[Row]:
    """Conversations, their answers learnt."""
    if not tokenizer.is_fast:
        raise DataError(
            "The tokenizer of this base does not say where tokens lie, so no answer can be told: take another."
        )
    characters = most * LONGEST if most is not None else None
    rows = []
    for text in texts:
        try:
            said = chat.spoken(tokenizer, text, characters)
        except DataError as error:
            raise DataError(f"{error} It is in: {text[1:200]}") from error
        found = tokenizer(
            said.text[:characters],
            add_special_tokens=not said.by_template,
            return_offsets_mapping=True,
            verbose=False,
        )
        row = np.array(found["input_ids"], dtype=np.int32)
        places = found["offset_mapping"]
        if not said.by_template and len(row) > 1 and row[-1] == row[-2] == tokenizer.eos_token_id:
            row, places = row[:-1], places[:-1]  # the tokenizer has put one more behind it
        learnt = [any(last > start and first < end for start, end in said.answers) for first, last in places]
        rows.append(np.where(learnt, row, ~row))
    return rows


def ids(row: Row) -> Row:
    """The tokens of a row, learnt or not."""
    return np.where(row < 0, ~row, row)


def predictions(row: Row) -> int:
    """How many tokens of a row are learnt: all but the first, which nothing predicts, and those that are only read."""
    return int((row[1:] >= 0).sum())


def cut(rows: Sequence[Row], max_length: int, *, chunk: bool = False) -> tuple[list[Row], int]:
    """Rows of at most `max_length` tokens, and how many were longer. The rest of a long row is dropped, or chunked.

    A cut row has lost its end of text, rightly: it does not end there. A last chunk of one token has nothing to predict
    and is dropped.
    """
    out: list[Row] = []
    longer = 0
    for row in rows:
        longer += len(row) > max_length
        starts = range(0, len(row), max_length) if chunk else (0,)
        out.extend(row[start : start + max_length] for start in starts if start == 0 or len(row) - start > 1)
    return out, longer


def pack(rows: Sequence[Row], capacity: int) -> list[list[int]]:
    """Indices of rows that share a sequence of `capacity` tokens: best fit, longest first. No row is cut.

    Price: on IMDb at 512 tokens 0.6% of the positions stay padding; one row a sequence, all padded, would leave 48%.
    """
    by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    for index in sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i)):
        need = len(rows[index])
        room = next((room for room in range(need, capacity) if by_room[room]), capacity)
        sequence = by_room[room].pop() if by_room[room] else []
        sequence.append(index)
        by_room[room - need].append(sequence)
    return [sequence for room in by_room for sequence in room]


class Sequences(torch.utils.data.Dataset[list[Row]]):
    """Training items: each a list of rows that share one sequence (one row alone without packing). The item after the last
    has nothing to learn in it: it stands in where several processes share what cannot be divided."""

    def __init__(self, rows: Sequence[Row], max_length: int, *, packing: bool) -> None:
        self.rows = rows
        self.groups = pack(rows, max_length) if packing else [[index] for index in range(len(rows))]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[Row]:
        return [self.rows[row] for row in self.groups[index]] if index < len(self.groups) else [self.rows[0][:1]]

    def longest_first(self) -> list[list[Row]]:
        lengths = [sum(len(self.rows[row]) for row in group) for group in self.groups]
        return [self[index] for index in sorted(range(len(lengths)), key=lambda i: -lengths[i])]


def probe(vocabulary: int) -> tuple[Row, Row]:
    """Two different rows of 16 plain tokens, from the middle of the vocabulary: special ones stand at its ends."""
    ids = np.arange(vocabulary // 2 - 8, vocabulary // 2 + 8, dtype=np.int32)
    return ids, ids[::-1].copy()


def collate(items: Sequence[Sequence[Row]], pad_id: int, *, bounds: bool = False) -> dict[str, torch.Tensor]:
    """`input_ids`, `position_ids` and `labels`, each (items, longest), int64.

    With `bounds` also `cu_seq_lens_q` (rows + 1,), where rows begin in the items laid end to end, and the end of all.

    The first token of a row has no label: nothing predicts it, and so Trainer, which counts labels before they are
    shifted, divides the loss by the number of real predictions (for GPT-2 it would not).
    """
    longest = max(sum(map(len, item)) for item in items)
    shape = len(items), longest
    inputs = torch.full(shape, pad_id, dtype=torch.int64)
    positions = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, NO_LABEL, dtype=torch.int64)
    starts = []
    for line, item in enumerate(items):
        start = 0
        for row in item:
            end = start + len(row)
            values = torch.from_numpy(row.astype(np.int64))
            inputs[line, start:end] = torch.where(values < 0, ~values, values)
            labels[line, start + 1 : end] = values[1:].where(values[1:] >= 0, NO_LABEL)
            positions[line, start:] = torch.arange(longest - start)  # padding counts on as part of the last row
            starts.append(line * longest + start)
            start = end
    batch = {"input_ids": inputs, "position_ids": positions, "labels": labels}
    return batch | {"cu_seq_lens_q": torch.tensor([*starts, inputs.numel()])} if bounds else batch
