"""Openings of rows, and how the rows go on: of plain texts the first tokens, of conversations the
question."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..config import HELD_OUT_MAX_TOKENS
from ..data import tokenization
from ..data.tokenization import TokenIds
from ..inference.detokenizer import IncrementalDetokenizer
from ..inference.generator import EncodedPrompt
from .style_features import Passage, split_words

# Of texts of usual length; of shorter ones more are compared, with as many new tokens in all.
OPENINGS, NEW_TOKENS, MAX_OPENINGS = 48, 96, 192
OPENING_TOKENS, MAX_PROMPT_TOKENS = 24, 256  # of plain texts; of conversations
MIN_OPENING_TOKENS, MIN_NEW_TOKENS, MIN_WORDS = 4, 16, 8


@dataclass(frozen=True)
class Opening:
    """Opening of row number `row`, and how the row goes on."""

    row: int
    prompt: EncodedPrompt
    passage: Passage


@dataclass(frozen=True)
class OpeningLengths:
    """Tokens of an opening and of what follows, and the number of openings to compare."""

    opening: int
    new: int
    count: int
    context: int

    @classmethod
    def suiting(cls, rows: Sequence[TokenIds], context: int) -> "OpeningLengths":
        """Choose lengths for most of some rows."""
        spans = [_learned_span(row) for row in rows]
        plain = [end for start, end in spans if start == 0 < end]
        opening = int(np.clip(np.median(plain or [0]) // 4, MIN_OPENING_TOKENS, OPENING_TOKENS))
        rest = [end - (start or opening) for start, end in spans if end > start]
        new = int(np.clip(np.quantile(rest or [0], 0.9), MIN_NEW_TOKENS, NEW_TOKENS))
        new = min(new, max(context // 2, 1))
        return cls(opening, new, min(MAX_OPENINGS, OPENINGS * NEW_TOKENS // new), context)

    def divide(
        self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenIds], order: Sequence[int]
    ) -> list[Opening]:
        """Divide rows in an order into opening and rest, as many as are to be compared. Rows that
        have a long question, or do not go on for some words, are left out."""
        divided = (self._divide(tokenizer, rows[number], number) for number in order)
        return [*itertools.islice(filter(None, divided), self.count)]

    def _divide(self, tokenizer: PreTrainedTokenizerBase, row: TokenIds, number: int) -> Opening | None:
        start, end = _learned_span(row)
        is_plain = start == 0
        start = self.opening if is_plain else start
        if not 0 < start <= min(MAX_PROMPT_TOKENS, self.context - self.new, end):
            return None
        ids = tokenization.token_ids(row).tolist()
        prompt, rest = ids[:start], ids[start : min(end, start + self.new)]
        before = _decode_rest(tokenizer, [], prompt)
        passage = Passage(before if is_plain else "", _decode_rest(tokenizer, prompt, rest))
        if len(split_words(passage.text)) < MIN_WORDS:
            return None
        return Opening(number, EncodedPrompt(before.strip(), prompt, chat=not is_plain), passage)


def encode_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[TokenIds]:
    """Return the token ids of rows as training has them; empty for a conversation that the template
    cannot write."""
    return tokenization.encode_truncated(tokenizer, texts, HELD_OUT_MAX_TOKENS, {})


def take_turns(parts: Sequence[int], count: int) -> list[int]:
    """Return the numbers of rows in their order; of a blend, one row of each part after the
    other."""
    seen, turns = Counter[int](), list[int]()
    for part in parts or [0] * count:
        turns.append(seen[part])
        seen[part] += 1
    return sorted(range(count), key=turns.__getitem__)


def match_lengths(openings: Sequence[Opening], others: Sequence[Opening]) -> list[Passage]:
    """Return a passage of the others for each opening: the longest for the one whose row goes on
    longest, and so on."""

    def by_length(some: Sequence[Opening]) -> list[int]:
        words = [len(split_words(opening.passage.text)) for opening in some]
        return sorted(range(len(some)), key=words.__getitem__)

    matched = dict(zip(by_length(openings), by_length(others), strict=True))
    return [others[matched[index]].passage for index in range(len(openings))]


def _learned_span(row: TokenIds) -> tuple[int, int]:
    """Start and end of the first tokens of a row that are learned; both 0 without any."""
    is_learned = np.append(row >= 0, False)
    start = int(is_learned.argmax())
    return start, start + int((~is_learned[start:]).argmax())


def _decode_rest(tokenizer: PreTrainedTokenizerBase, prompt: list[int], rest: list[int]) -> str:
    """Return the text of the tokens after a prompt, as generation decodes them."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    for token in rest:
        detokenizer.append(token)
    detokenizer.finish()
    return detokenizer.text
