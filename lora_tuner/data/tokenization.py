"""Tokenize texts and conversations, and truncate or chunk long rows.

Labels are masked by position, never by token id: the pad token often is the end-of-text token, and
masking by id would unlearn the end of a text (transformers#23530). A batch has no attention mask:
padding is on the right, where a causal model never looks, and packed rows have position ids that
restart at 0, which transformers turns into isolated attention as long as there is neither mask nor
cache. A token that has no label, such as those of a question, is stored as its complement ~id,
below zero.
"""

from collections.abc import Iterable, Sequence
from itertools import filterfalse
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from . import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKEN_CHARS = 256  # upper bound of the characters per token: the longest of GPT-2 has 128
TokenIds = npt.NDArray[np.int32]  # shape (tokens,)


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    *,
    add_eos: bool = True,
    max_tokens: int | None = None,
) -> list[TokenIds]:
    """Return the token ids of each text, with the tokenizer's prefix and one end-of-text token.

    Text that spells a special token is encoded as plain text. Of conversations (`chat`) only the
    answers are labels.

    Args:
        add_eos: End each row with the end-of-text token. If unset, every text is a plain prompt.
        max_tokens: Rows will be truncated to so many tokens, so skip most of a longer text: a
            tokenizer takes over a hundred times the memory of its text.

    Raises:
        DataError: The chat template rejects a conversation.
    """
    if add_eos and any(chat.is_chat(text) for text in texts):
        chats = iter(_encode_chats(tokenizer, filter(chat.is_chat, texts), max_tokens))
        plain = iter(encode_texts(tokenizer, [*filterfalse(chat.is_chat, texts)], max_tokens=max_tokens))
        return [next(chats) if chat.is_chat(text) else next(plain) for text in texts]
    if not texts:
        return []
    if max_tokens is not None:
        texts = [text[: max_tokens * MAX_TOKEN_CHARS] for text in texts]
    eos = tokenizer.eos_token_id
    rows = []
    for ids in tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]:
        while len(ids) > 1 and ids[-1] == eos:
            ids = ids[:-1]
        rows.append(np.array([*ids, eos] if add_eos else ids, dtype=np.int32))
    return rows


def _encode_chats(
    tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str], max_tokens: int | None
) -> list[TokenIds]:
    if not tokenizer.is_fast:
        raise DataError(
            "The tokenizer of this base gives no character offsets, so the tokens of an answer cannot be found: "
            "use a base with a fast tokenizer."
        )
    max_chars = max_tokens * MAX_TOKEN_CHARS if max_tokens is not None else None
    rows = []
    for text in texts:
        try:
            rendered = chat.render_with_spans(tokenizer, text, max_chars)
        except DataError as error:
            raise DataError(f"{error} Conversation: {text[1:200]}") from error
        encoded = tokenizer(
            rendered.text[:max_chars],
            add_special_tokens=not rendered.by_template,
            return_offsets_mapping=True,
            verbose=False,
        )
        row = np.array(encoded["input_ids"], dtype=np.int32)
        offsets = np.array(encoded["offset_mapping"]).reshape(-1, 2)
        if not rendered.by_template and len(row) > 1 and row[-1] == row[-2] == tokenizer.eos_token_id:
            row, offsets = row[:-1], offsets[:-1]  # the tokenizer has added a second end of text
        is_label = np.zeros(len(row), dtype=bool)
        for start, end in rendered.answer_spans:
            is_label |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        rows.append(np.where(is_label, row, ~row))
    return rows


def token_ids(row: TokenIds) -> TokenIds:
    """Return the token ids of a row with and without labels."""
    return np.where(row < 0, ~row, row)


def count_predictions(row: TokenIds) -> int:
    """Return the number of labels in a row. The first token has none: nothing predicts it."""
    return int((row[1:] >= 0).sum())


def truncate(rows: Sequence[TokenIds], max_length: int, *, chunk: bool = False) -> tuple[list[TokenIds], int]:
    """Return rows of at most `max_length` tokens, and the number of rows that were longer.

    A truncated row has no end of text, as its text goes on. A last chunk of one token has no label
    and is dropped.

    Args:
        chunk: Keep the rest of a long row as rows of its own.
    """
    pieces: list[TokenIds] = []
    for row in rows:
        starts = range(0, len(row), max_length) if chunk else (0,)
        pieces.extend(row[start : start + max_length] for start in starts if start == 0 or len(row) - start > 1)
    return pieces, sum(len(row) > max_length for row in rows)


def probe_sequences(vocab_size: int) -> tuple[TokenIds, TokenIds]:
    """Return two rows of 16 tokens from the middle of the vocabulary, without special tokens."""
    ids = np.arange(vocab_size // 2 - 8, vocab_size // 2 + 8, dtype=np.int32)
    return ids, ids[::-1].copy()
