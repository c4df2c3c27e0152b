"""Continue the openings of training rows and of unseen rows, as long as the text is that of the row."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import atomic_io
from ..config import SamplingParams
from ..data import tokenization
from ..data.tokenization import TokenIds
from ..errors import Progress
from ..inference.constraints import end_token_ids
from ..inference.generator import Generator
from ..inference.sequence import Sequence as TokenSequence
from .compared_rows import ComparedRows, choose_rows
from .subject import BATCH, ReportSubject, generate_steps, generator_identity

OPENING_TOKENS, ANSWER_OPENING_TOKENS = 32, 8  # of a text; of an answer, after its question
CONTINUED_TOKENS, VERBATIM_TOKENS = 48, 12  # at most; a verbatim continuation is longer than the latter
CONTINUED_ROWS = 128  # of each side

_Opening = tuple[list[int], list[int]]  # tokens of a row that are given, and those that follow


@dataclass(frozen=True)
class Continuations:
    """Rows of both sides, and the text for which the greedy continuation of each is the row itself.

    `tokens` are those of the `texts`; None for a row that was not continued.
    """

    rows: ComparedRows
    tokens: list[int | None]
    texts: list[str]

    @property
    def are_verbatim(self) -> list[bool | None]:
        """True for each row that is continued verbatim for more than 12 tokens."""
        return [None if tokens is None else tokens > VERBATIM_TOKENS for tokens in self.tokens]


def continue_rows(subject: ReportSubject, generator: Generator) -> Continuations:
    """Continue the openings of training rows and of held-out rows greedily.

    Price: the data is read once more, and each opening is read once; most continuations leave their
    row at once, and end there.

    Raises:
        DataError: the rows of either kind are unknown, or too few.
    """
    tokenizer = generator.tokenizer_of(subject.adapter.name)
    rows = choose_rows(subject, tokenizer)
    assert subject.config is not None
    limit = min(rows.seen_tokens, subject.config.max_length, generator.base.max_context - 1)
    ends = end_token_ids(generator.base, tokenizer)
    openings: dict[int, _Opening] = {}
    for is_train in (True, False):
        numbers = [number for number, row in enumerate(rows.rows) if row.is_train is is_train]
        texts = [rows.rows[number].text for number in numbers[:CONTINUED_ROWS]]
        encoded = tokenization.encode_texts(tokenizer, texts, max_tokens=limit, invalid={})
        for number, row in zip(numbers, encoded, strict=False):
            opening, following = split_row(row[:limit], ends)
            if opening and following:
                openings[number] = opening, following
    lengths = _verbatim_lengths(subject, generator, [*openings.values()])
    tokens: list[int | None] = [None] * len(rows.rows)
    verbatim = [""] * len(rows.rows)
    for (number, (_, following)), length in zip(openings.items(), lengths, strict=True):
        tokens[number] = length
        verbatim[number] = str(tokenizer.decode(following[:length], skip_special_tokens=True))
    return Continuations(rows, tokens, verbatim)


def split_row(row: TokenIds, ends: frozenset[int]) -> _Opening:
    """Split a row into its opening and the tokens that follow, without those that end a text.

    The opening of a text is at most half of it. Of a row of which answers alone are learned, it is
    all up to the first tokens of the longest answer. Either may be empty for a very short row.
    """
    ids, is_learned = tokenization.token_ids(row).tolist(), row >= 0
    edges = np.flatnonzero(np.diff(is_learned, prepend=False, append=False)).tolist()
    spans = [*zip(edges[::2], edges[1::2], strict=True)]
    start, stop = max(spans, key=lambda span: span[1] - span[0], default=(0, 0))
    while stop > start and ids[stop - 1] in ends:
        stop -= 1
    most = ANSWER_OPENING_TOKENS if start else OPENING_TOKENS
    first = start + min(most, (stop - start) // 2)
    following = ids[first : min(first + CONTINUED_TOKENS, stop)]
    inner_ends = [index for index, token in enumerate(following) if token in ends]
    return ids[:first], following[: inner_ends[0]] if inner_ends else following


def _verbatim_lengths(subject: ReportSubject, generator: Generator, openings: Sequence[_Opening]) -> list[int]:
    """Return for each opening the number of tokens for which greedy decoding follows the row.

    They are kept in the user's cache, batch by batch.
    """
    name, notify = subject.adapter.name, subject.options.notify
    identity, lengths = generator_identity(generator, name), list[int]()
    stage = "memorization: verbatim continuations"
    for first in range(0, len(openings), BATCH):
        notify(Progress(stage, first, len(openings)))
        batch = openings[first : first + BATCH]
        digest = hashlib.sha256(json.dumps([*identity, batch]).encode()).hexdigest()
        path = atomic_io.cache_dir() / "verbatim" / f"{digest}.json"
        found: list[int] | None = atomic_io.read_cache(path, notify)
        if found is None:
            found = _follow(generator, name, batch)
            atomic_io.write_cache(path, found)
        lengths += found
    notify(Progress(stage, len(openings), len(openings)))
    return lengths


def _follow(generator: Generator, name: str, batch: Sequence[_Opening]) -> list[int]:
    """Decode greedily after each opening, until the text is not what follows in the row."""
    _, lora = generator.get_or_load(name)
    sequences = []
    for opening, following in batch:
        sampling = SamplingParams(greedy=True, max_new_tokens=len(following))
        sequences.append(TokenSequence(generator.base, opening, sampling, adapter=name, lora=lora))
    lengths = [0] * len(batch)
    for _ in generate_steps(generator, sequences):
        for number, (sequence, (_, following)) in enumerate(zip(sequences, batch, strict=True)):
            written = sequence.output_ids
            while lengths[number] < len(written):
                if written[lengths[number]] != following[lengths[number]]:
                    if not sequence.done:
                        generator.engine.cancel(sequence)
                    break
                lengths[number] += 1
    return lengths
