"""Tokenize texts and conversations, and chunk or truncate long rows.

Labels are masked by position, never by token id: the pad token often is the end-of-text token, and
masking by id would unlearn the end of a text (transformers#23530). A batch has no attention mask:
padding is on the right, where a causal model never looks, and packed rows have position ids that
restart at 0, which transformers turns into isolated attention as long as there is neither mask nor
cache. A token that has no label, such as those of a question, is stored as its complement ~id,
below zero.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from itertools import filterfalse
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..config import LongRows
from ..errors import DataError, InvalidRowError
from . import chat, chat_template
from .splitting import GOES_ON, PARAGRAPH_START, SENTENCE_START, WORD_START

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKEN_CHARS = 256  # upper bound of the characters per token: the longest of GPT-2 has 128
_WINDOW_CHARS = 64  # characters per token of a row that are tokenized at once for its chunks
_UNSURE_TOKENS = 16  # tokens at the end of a window that may change when more text follows
TokenIds = npt.NDArray[np.int32]  # shape (tokens,)
InvalidRows = dict[str, InvalidRowError]  # row -> why the chat template cannot write it


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    *,
    add_eos: bool = True,
    max_tokens: int | None = None,
    invalid: InvalidRows | None = None,
) -> list[TokenIds]:
    """Return the token ids of each text, with the tokenizer's prefix and one end-of-text token.

    Text that spells a special token is encoded as plain text, unless a chat template has rendered
    it (`chat_template.is_rendered`): then these are its special tokens, and an end of text is added
    if it ends with none. Of conversations (`chat`) only the answers are labels. A text that goes on
    (`splitting.GOES_ON`) has no end-of-text token.

    Args:
        add_eos: End each row with the end-of-text token. If unset, every text is a plain prompt.
        max_tokens: Rows will be truncated to so many tokens, so skip most of a longer text: a
            tokenizer takes over a hundred times the memory of its text.
        invalid: Receives each conversation that the chat template cannot write, whose row is empty.

    Raises:
        DataError: There is no chat template for conversations.
        InvalidRowError: The chat template cannot write a conversation, and `invalid` is None.
    """
    if add_eos and any(chat.is_chat(text) for text in texts):
        plain = iter(encode_texts(tokenizer, [*filterfalse(chat.is_chat, texts)], max_tokens=max_tokens))
        return [
            _encode_chat(tokenizer, text, max_tokens, invalid) if chat.is_chat(text) else next(plain)
            for text in texts
        ]
    if not texts:
        return []
    if add_eos and any(chat_template.is_rendered(tokenizer, text) for text in texts):
        is_rendered = partial(chat_template.is_rendered, tokenizer)
        plain = iter(encode_texts(tokenizer, [*filterfalse(is_rendered, texts)], max_tokens=max_tokens))
        return [
            _encode_rendered(tokenizer, text, max_tokens) if is_rendered(text) else next(plain) for text in texts
        ]
    ends = [add_eos and not text.endswith(GOES_ON) for text in texts]
    if add_eos:
        texts = [text.removesuffix(GOES_ON) for text in texts]
    if max_tokens is not None:
        texts = [text[: max_tokens * MAX_TOKEN_CHARS] for text in texts]
    eos = tokenizer.eos_token_id
    rows = []
    encoded = tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]
    for ids, add_end in zip(encoded, ends, strict=True):
        while len(ids) > 1 and ids[-1] == eos:
            ids = ids[:-1]
        rows.append(np.array([*ids, eos] if add_end else ids, dtype=np.int32))
    return rows


def _encode_rendered(tokenizer: "PreTrainedTokenizerBase", text: str, max_tokens: int | None) -> TokenIds:
    """Return the token ids of a text that a chat template has rendered."""
    text, end = _rendered_parts(tokenizer, text)
    if max_tokens is not None:
        text = text[: max_tokens * MAX_TOKEN_CHARS]
    ids = tokenizer(text, split_special_tokens=False, verbose=False)["input_ids"]
    while len(ids) > 1 and ids[-1] == ids[-2] == tokenizer.eos_token_id:  # the tokenizer adds one
        ids = ids[:-1]
    return np.array([*ids, *end], dtype=np.int32)


def _rendered_parts(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[str, list[int]]:
    """Return a rendered text without the prefix that the tokenizer adds again, and the tokens to
    end it with."""
    prefix = str(tokenizer.decode(tokenizer("")["input_ids"]))
    goes_on = text.endswith(GOES_ON)
    text = text.removesuffix(GOES_ON).removeprefix(prefix)
    has_end = text.rstrip().endswith(tuple(chat_template.special_tokens(tokenizer)))
    return text, [] if goes_on or has_end else [tokenizer.eos_token_id]


def _encode_chat(
    tokenizer: "PreTrainedTokenizerBase", text: str, max_tokens: int | None, invalid: InvalidRows | None
) -> TokenIds:
    if not tokenizer.is_fast:
        raise DataError(
            "The tokenizer of this base gives no character offsets, so the tokens of an answer "
            "cannot be found: use a base with a fast tokenizer."
        )
    max_chars = max_tokens * MAX_TOKEN_CHARS if max_tokens is not None else None
    if (answer := chat.read_answer(text)) is not None:
        if chat.keeps_answer(text):
            answer = _leave_out_chars(*answer, max_chars)
        return _encode_answer(tokenizer, *answer, max_chars)
    try:
        rendered = chat_template.render_with_spans(tokenizer, text, max_chars)
    except InvalidRowError as error:
        if invalid is None:
            raise
        invalid[text] = error
        return np.array([], dtype=np.int32)
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
    return _mask_labels(row, offsets, rendered.answer_spans)


def _mask_labels(row: TokenIds, offsets: npt.NDArray[np.int64], spans: Iterable[tuple[int, int]]) -> TokenIds:
    """Return token ids of which those in some spans of characters alone are labels."""
    is_label = np.zeros(len(row), dtype=bool)
    for start, end in spans:
        is_label |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
    return np.where(is_label, row, ~row)


def _encode_answer(
    tokenizer: "PreTrainedTokenizerBase", text: str, span: tuple[int, int], max_chars: int | None
) -> TokenIds:
    """Return the token ids of a plain text, with labels in a span and at the end."""
    is_rendered = chat_template.is_rendered(tokenizer, text)
    body, end = _rendered_parts(tokenizer, text) if is_rendered else (text, [tokenizer.eos_token_id])
    start = len(text) - len(body)
    encoded = tokenizer(
        body[:max_chars], split_special_tokens=not is_rendered, return_offsets_mapping=True, verbose=False
    )
    row = np.array(encoded["input_ids"], dtype=np.int32)
    offsets = np.array(encoded["offset_mapping"]).reshape(-1, 2) + start
    spans = [span]
    if not end:  # the template has the end
        last = max(text.rindex(token) for token in chat_template.special_tokens(tokenizer) if token in text)
        spans.append((last, last + 1))
    elif len(row) > 1 and row[-1] == end[0]:  # the tokenizer adds one
        row, offsets = row[:-1], offsets[:-1]
    return np.concatenate([_mask_labels(row, offsets, spans), np.array(end, dtype=np.int32)])


def _leave_out_chars(text: str, span: tuple[int, int], max_chars: int | None) -> tuple[str, tuple[int, int]]:
    """Return a text without the middle of what is too long to be tokenized, and the span in it."""
    excess = max(len(text) - (max_chars or len(text)), 0)
    half = (len(text) - excess) // 2
    return text[:half] + text[half + excess :], (span[0] - excess, span[1] - excess)


def leave_out_middle(row: TokenIds, max_length: int) -> TokenIds:
    """Return the first and last tokens of a row, `max_length` in all."""
    half = max_length // 2
    return row if len(row) <= max_length else np.concatenate([row[:half], row[half - max_length :]])


def token_ids(row: TokenIds) -> TokenIds:
    """Return the token ids of a row with and without labels."""
    return np.where(row < 0, ~row, row)


def encoded_hash(rows: Iterable[TokenIds]) -> str:
    """Return the sha256 of rows as token ids with their labels, in this order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.astype("<i4").tobytes())
    return digest.hexdigest()


def count_predictions(row: TokenIds) -> int:
    """Return the number of labels in a row. The first token has none: nothing predicts it."""
    return int((row[1:] >= 0).sum())


@dataclass
class TextUse:
    """Tokens of the training rows, and those of them that are trained on; the same of answers.

    Attributes:
        truncated_rows: Rows that have lost their end; of those with a label the middle.
        skipped_rows: Rows of which nothing is left to learn.
        answer_tokens: Tokens of the answers in conversations.
        row_tokens: Tokens of each row; 0 for a conversation that is left out.
        row_pieces: Rows that each text has become: several if it is chunked, 0 if it is left out.
    """

    truncated_rows: int = 0
    skipped_rows: int = 0
    tokens: int = 0
    used_tokens: int = 0
    answer_tokens: int = 0
    used_answer_tokens: int = 0
    row_tokens: list[int] = field(default_factory=list)
    row_pieces: list[int] = field(default_factory=list)

    def __add__(self, other: "TextUse") -> "TextUse":
        return TextUse(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    @property
    def share(self) -> float:
        """Share of the tokens that is trained on."""
        return self.used_tokens / max(self.tokens, 1)

    @property
    def answer_share(self) -> float | None:
        """Share of the answer tokens that is trained on; None without conversations."""
        return self.used_answer_tokens / self.answer_tokens if self.answer_tokens else None


def encode_rows(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    max_length: int,
    long_rows: LongRows = "auto",
    invalid: InvalidRows | None = None,
) -> tuple[list[TokenIds], TextUse]:
    """Tokenize rows for training. Rows over `max_length` tokens are chunked or truncated.

    Price: a long text is tokenized in windows, so memory does not grow with its length. Of a
    conversation over `MAX_TOKEN_CHARS` characters per token the cut tokens are an estimate.

    Args:
        long_rows: With `auto` plain texts are chunked and conversations truncated.
        invalid: Receives the conversations that are left out, as the chat template cannot write
            them.

    Returns:
        The rows, also those without labels, and the share of the text in those with labels.
    """
    use, rows = TextUse(), list[TokenIds]()
    clip = max_length * MAX_TOKEN_CHARS
    chunk_chats, chunk_texts = long_rows == "chunk", long_rows != "truncate"
    # Only the beginning: chunks are tokenized from the text itself.
    heads = [
        text[: max_length * _WINDOW_CHARS] if chunk_texts and not chat.is_chat(text) else text for text in texts
    ]
    encoded = encode_texts(tokenizer, heads, max_tokens=None if chunk_chats else max_length, invalid=invalid)
    for text, head, row in zip(texts, heads, encoded, strict=True):
        if not len(row):  # invalid
            use.row_tokens.append(0)
            use.row_pieces.append(0)
            continue
        is_chat = chat.is_chat(text)
        total = len(row)
        if len(head) == len(text) and len(row) <= max_length:
            pieces = [row]
        elif is_chat and chat.keeps_answer(text):
            pieces = [leave_out_middle(row, max_length)]
            total = int(total * max(1.0, len(text) / clip))
            use.truncated_rows += 1
        elif chunk_texts and not is_chat:
            pieces = list(_chunk_text(tokenizer, text, max_length))
            total = sum(map(len, pieces))
        elif chunk_chats:
            pieces = truncate([row], max_length, chunk=True)
        else:
            pieces = [row[:max_length]]
            total = int(total * max(1.0, len(text) / clip))
            use.truncated_rows += 1
        rows += pieces
        use.row_pieces.append(len(pieces))
        labels = [count_predictions(piece) for piece in pieces]
        use.skipped_rows += not any(labels)
        use.tokens += total
        use.row_tokens.append(total)
        use.used_tokens += sum(len(piece) for piece, count in zip(pieces, labels, strict=True) if count)
        if is_chat:
            use.answer_tokens += count_predictions(row) * total // len(row)
            use.used_answer_tokens += sum(labels)
    return rows, use


def truncate(rows: Sequence[TokenIds], max_length: int, *, chunk: bool = False) -> list[TokenIds]:
    """Return rows of at most `max_length` tokens.

    A truncated row has no end of text, as its text goes on. A last chunk of one token has no label
    and is dropped.

    Args:
        chunk: Keep the rest of a long row as rows of its own.
    """
    pieces: list[TokenIds] = []
    for row in rows:
        starts = range(0, len(row), max_length) if chunk else (0,)
        pieces.extend(row[start : start + max_length] for start in starts if start == 0 or len(row) - start > 1)
    return pieces


def encode_truncated(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    max_length: int,
    invalid: InvalidRows | None = None,
) -> list[TokenIds]:
    """`encode_texts`, truncated to `max_length` tokens; of a text with a label without its middle."""
    rows = encode_texts(tokenizer, texts, max_tokens=max_length, invalid=invalid)
    return [
        leave_out_middle(row, max_length) if chat.keeps_answer(text) else row[:max_length]
        for text, row in zip(texts, rows, strict=True)
    ]


def _chunk_text(tokenizer: "PreTrainedTokenizerBase", text: str, max_length: int) -> Iterator[TokenIds]:
    """Yield a text as rows of at most `max_length` tokens, each with the tokenizer's prefix.

    A chunk begins where a sentence or a line begins, else where a word does, if there is such a
    place within the limit. Only the last one has an end-of-text token.
    """
    if not tokenizer.is_fast:  # without character offsets
        yield from truncate(encode_texts(tokenizer, [text]), max_length, chunk=True)
        return
    is_rendered = chat_template.is_rendered(tokenizer, text)
    if is_rendered:
        text, end = _rendered_parts(tokenizer, text)
    else:
        end = [] if text.endswith(GOES_ON) else [tokenizer.eos_token_id]
        text = text.removesuffix(GOES_ON)
    begin, window = 0, max_length * _WINDOW_CHARS
    while True:
        part = text[begin : begin + window]
        is_last = begin + window >= len(text)
        encoded = tokenizer(
            part,
            split_special_tokens=not is_rendered,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        ids, special = (
            np.array(encoded["input_ids"], dtype=np.int32),
            np.array(encoded["special_tokens_mask"]) > 0,
        )
        prefix = ids[: int(np.argmin(special))] if not special.all() else ids[:0]
        ids, offsets = ids[~special], np.array(encoded["offset_mapping"]).reshape(-1, 2)[~special]
        first, room = 0, max(max_length - len(prefix), 2)
        while len(ids) - first > (room - len(end) if is_last else room + _UNSURE_TOKENS):
            cut = _find_cut(part, offsets, first, min(first + room, len(ids) - 1))
            yield np.concatenate([prefix, ids[first:cut]])
            first = cut
        if is_last:
            yield np.concatenate([prefix, ids[first:], np.array(end, dtype=np.int32)])
            return
        if first and offsets[first - 1, 1]:
            begin, window = begin + int(offsets[first - 1, 1]), max_length * _WINDOW_CHARS
        else:  # few tokens for many characters
            window *= 2


def _find_cut(text: str, offsets: npt.NDArray[np.int64], first: int, limit: int) -> int:
    """Return the last token up to `limit` with which a paragraph begins, else a sentence, a line,
    or a word.

    A paragraph counts in the second half of the chunk alone.

    Args:
        offsets: Of shape (tokens, 2): the first character of each token, and the one after it.
        first: First token of the chunk. It gets two tokens or more: one has no label.
    """
    ends = offsets[:, 1]
    for pattern in (PARAGRAPH_START, SENTENCE_START, WORD_START):
        begin = (first + limit) // 2 if pattern is PARAGRAPH_START else first
        gaps = list(pattern.finditer(text, int(ends[begin]), int(ends[limit])))
        for gap in reversed(gaps):
            token = int(np.searchsorted(ends, gap.end(), side="right"))
            if first + 1 < token <= limit and offsets[token, 0] >= gap.start():
                return token
    cut = limit
    while cut > first + 2 and offsets[cut, 0] < ends[cut - 1]:  # inside a character
        cut -= 1
    return cut
