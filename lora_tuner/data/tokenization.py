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

from ..errors import DataError
from . import chat

MAX_TOKEN_CHARS = 256  # characters that a token stands for at the most, with room: GPT-2's longest has 128
TokenIds = np.ndarray[Any, np.dtype[np.int32]]  # (tokens,)


def encode_texts(tokenizer: Any, texts: Sequence[str], *, end: bool = True, most: int | None = None) -> list[TokenIds]:
    """Token ids of each text, with what the tokenizer puts at the front and, unless `end` is off, one end of text.

    Text that spells a special token is read as text, so that no row can end itself. A row that is going to be cut at `most`
    tokens is not read much further: a tokenizer takes more than a hundred times the memory of its text. Of conversations
    (`chat`) the answers alone are learnt; raises DataError for those that the chat template does not take.
    """
    if end and any(chat.is_chat(text) for text in texts):  # a prompt is text, whatever it begins with
        talks = iter(_encode_conversations(tokenizer, [text for text in texts if chat.is_chat(text)], most))
        plain = iter(encode_texts(tokenizer, [text for text in texts if not chat.is_chat(text)], end=end, most=most))
        return [next(talks if chat.is_chat(text) else plain) for text in texts]
    if not texts:
        return []
    if most is not None:
        texts = [text[: most * MAX_TOKEN_CHARS] for text in texts]
    encoded = tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    rows = []
    for ids in encoded:
        while ids and ids[-1] == eos and len(ids) > 1:
            ids = ids[:-1]
        rows.append(np.array([*ids, eos] if end else ids, dtype=np.int32))
    return rows


def _encode_conversations(tokenizer: Any, texts: Sequence[str], most: int | None) -> list[TokenIds]:
    """Conversations, their answers learnt."""
    if not tokenizer.is_fast:
        raise DataError(
            "The tokenizer of this base does not say where tokens lie, so no answer can be told: take another."
        )
    characters = most * MAX_TOKEN_CHARS if most is not None else None
    rows = []
    for text in texts:
        try:
            said = chat.render_with_spans(tokenizer, text, characters)
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
        learnt = [any(last > start and first < end for start, end in said.answer_spans) for first, last in places]
        rows.append(np.where(learnt, row, ~row))
    return rows


def token_ids(row: TokenIds) -> TokenIds:
    """The tokens of a row, learnt or not."""
    return np.where(row < 0, ~row, row)


def count_predictions(row: TokenIds) -> int:
    """How many tokens of a row are learnt: all but the first, which nothing predicts, and those that are only read."""
    return int((row[1:] >= 0).sum())


def truncate(rows: Sequence[TokenIds], max_length: int, *, chunk: bool = False) -> tuple[list[TokenIds], int]:
    """Rows of at most `max_length` tokens, and how many were longer. The rest of a long row is dropped, or chunked.

    A cut row has lost its end of text, rightly: it does not end there. A last chunk of one token has nothing to predict
    and is dropped.
    """
    out: list[TokenIds] = []
    longer = 0
    for row in rows:
        longer += len(row) > max_length
        starts = range(0, len(row), max_length) if chunk else (0,)
        out.extend(row[start : start + max_length] for start in starts if start == 0 or len(row) - start > 1)
    return out, longer


def probe_sequences(vocabulary: int) -> tuple[TokenIds, TokenIds]:
    """Two different rows of 16 plain tokens, from the middle of the vocabulary: special ones stand at its ends."""
    ids = np.arange(vocabulary // 2 - 8, vocabulary // 2 + 8, dtype=np.int32)
    return ids, ids[::-1].copy()
