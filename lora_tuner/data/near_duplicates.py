"""Find rows that are nearly copies of other rows, by the sequences of words that they share.

A row is compared as the set of its sequences of 3 words, without case, punctuation and white space.
In scripts without spaces (Chinese, Japanese, Thai, ...) characters are words, and 5 are a sequence.
Two rows are near duplicates if they share at least 3 sequences, and these hold 55% of the words of each
row; or half of the words of the shorter row, if that is 20 words; or nine tenths of them, if that
is 8 words. So are copies with replaced words or typing errors, with a sentence added, dropped or
moved, a part of a text, and a text that is quoted in a longer one. Rows of the same 5 or more words
are always near duplicates, shorter ones never.

Sequences that more than 2% of the compared rows have count on neither side: they are a header, a
form or a phrase. So two rows of a common form are near duplicates only if what is filled in agrees. The
words that agree must be half of all words of the shorter row, or 12.

All sequences are looked up, not a sample of them as by MinHash (Broder, On the resemblance and
containment of documents, 1997): short quotations are found in long rows, and nothing by chance.
Price: 30 bytes for each word of the compared rows; other rows pass in batches, a million words/s.
"""

import itertools
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import TrainConfig
from ..errors import EventHandler, Notice, Progress
from . import chat
from .preferences import first_side

_WORDS, _CHARS = 3, 5  # in a sequence
_MIN_SHARED = 3  # sequences
_MIN_EVIDENCE_SHARE, _MIN_EVIDENCE = 0.5, 12  # of all words of the shorter row, common ones too, or words
_MIN_WORDS = 5  # of rows that are compared
_MIN_SHARE = 0.55  # of the words of both rows
_MIN_PART_SHARE, _MIN_PART = 0.5, 20  # of the words of the shorter row, and words
_MIN_QUOTED_SHARE, _MIN_QUOTED = 0.9, 8  # the same, for nearly the whole row
_COMMON_SHARE, _COMMON_ROWS = 0.02, 2  # rows with a sequence; it counts in no more than these
# Rows to which a sequence leads. Further ones are copies of these, or share a mere phrase.
_MAX_POSTINGS = 64
_BATCH_CHARS, _BATCH_PAIRS = 1_000_000, 2_000_000
_BUCKETS = 4_194_301  # a prime
_HIGH_BITS = np.uint64(0xFFFFFFFF00000000)
_REPORTED_ROWS = 20_000  # between two reports of progress
_MANY_SHARE = 0.2  # of the training rows that are copies: why they are left out is said
_MAX_CACHED_WORDS = 500_000
UNSPACED = re.compile(  # a character of a script without spaces
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
# Letters and digits with accents and vowel signs, which \w does not have.
WORD = re.compile(r"[\w\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff]+")


class NearDuplicates:
    """Rows to compare others with. A result depends on one text and these rows alone.

    Args:
        texts: Rows, as `dataset` has them.
        common_rows: A sequence in so many of them counts, even if that is more than 2%.
    """

    def __init__(self, texts: Sequence[str], common_rows: int = _COMMON_ROWS) -> None:
        parts, sequences, first = list[_Rows](), list[NDArray[np.uint64]](), 0
        for batch in _batches(texts):
            parts.append(_split_rows(batch))
            sequences.append(parts[-1].sequences() + np.uint64(first))
            first += len(parts[-1].words)
        self.rows = rows = _Rows.concatenate(parts)
        del parts
        self.keys, self.starts, self.positions = _group(sequences)
        limit = max(common_rows, int(_COMMON_SHARE * len(texts)))
        self.limit = max(1, min(limit, len(texts) - 1))  # what all rows have is a form
        counts = np.diff(self.starts)
        self.words = rows.count_words(self.positions[np.repeat(counts <= self.limit, counts)])
        self.whole: dict[int, list[int]] = {}
        for number, key in enumerate(rows.whole):
            if key is not None:
                self.whole.setdefault(key, []).append(number)

    def find(self, texts: Sequence[str]) -> list[int | None]:
        """Return for each text the compared row that it copies most of, if there is one."""
        return [matches[0] if matches else None for matches in self.find_all(texts)]

    def find_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return for each text the compared rows of which it is a near duplicate, the nearest first.

        Of many copies of one another, the first 64 or so are named.
        """
        if not len(self.rows.words):
            return [[] for _ in texts]
        return [matches for batch in _batches(texts) for matches in self._find_batch(batch)]

    def _find_batch(self, texts: Sequence[str]) -> list[list[int]]:
        rows = _split_rows(texts)
        hashes, positions = _unpack(rows.sequences())
        slots = np.minimum(np.searchsorted(self.keys, hashes), max(len(self.keys) - 1, 0))
        counts = np.zeros(len(hashes), dtype=np.int64)
        if len(self.keys):
            counts = np.where(self.keys[slots] == hashes, self.starts[slots + 1] - self.starts[slots], 0)
        words = rows.count_words(positions[counts <= self.limit])
        is_shared = (counts > 0) & (counts <= self.limit)
        slots, positions = slots[is_shared], positions[is_shared]
        counts = np.minimum(counts[is_shared], _MAX_POSTINGS)
        if counts.sum() > _BATCH_PAIRS and len(texts) > 1:
            half = len(texts) // 2
            return self._find_batch(texts[:half]) + self._find_batch(texts[half:])
        # A pair of positions for each shared sequence: in a text, and in a compared row.
        positions = np.repeat(positions, counts)
        others = self.positions[np.repeat(self.starts[slots], counts) + _count_up(counts)].astype(np.int64)
        keys = rows.row[positions].astype(np.int64) * len(self.rows.whole) + self.rows.row[others]
        # Most pairs of rows share a single sequence; they are left out before the rest is sorted.
        buckets = keys % _BUCKETS
        checked = (np.bincount(buckets, minlength=1)[buckets] >= _MIN_SHARED).nonzero()
        keys, positions, others = keys[checked], positions[checked], others[checked]
        pairs, pair_of, shared = np.unique(keys, return_inverse=True, return_counts=True)
        text, other = np.divmod(pairs, max(len(self.rows.whole), 1))
        length, other_length = words[text], self.words[other]
        possible = (shared >= _MIN_SHARED) & (
            _CHARS * shared >= _MIN_PART_SHARE * np.minimum(length, other_length)
        )
        checked = possible[pair_of]
        pair_of = pair_of[checked]
        covered = rows.count_covered(positions[checked], pair_of, len(pairs))
        other_covered = self.rows.count_covered(others[checked], pair_of, len(pairs))
        is_shorter = length <= other_length
        least = np.where(is_shorter, covered, other_covered)  # words of the shorter row in shared sequences
        near = _are_near(
            least,
            np.where(is_shorter, other_covered, covered),
            np.minimum(length, other_length),
            np.maximum(length, other_length),
            np.where(is_shorter, rows.lengths()[text], self.rows.lengths()[other]),
        )
        found = np.flatnonzero(possible & near)
        found = found[np.lexsort((other[found], -least[found], text[found]))]
        matches = [[] if key is None else self.whole.get(key, [])[:_MAX_POSTINGS] for key in rows.whole]
        for number, match in zip(text[found].tolist(), other[found].tolist(), strict=True):
            if match not in matches[number]:
                matches[number].append(match)
        return matches


def clusters(texts: Sequence[str]) -> list[list[int]]:
    """Return the rows that are near duplicates of one another, in groups of two or more, largest first.

    Sequences in more than 2% of the rows do not count, so a larger group is found only as far as
    its rows have the same words. Price: as `NearDuplicates` of all rows.
    """
    index = NearDuplicates(texts, common_rows=5 * _COMMON_ROWS)
    leaders = list(range(len(texts)))

    def leader(row: int) -> int:
        while leaders[row] != row:
            leaders[row] = row = leaders[leaders[row]]
        return row

    for number, matches in enumerate(index.find_all(texts)):
        for match in matches:
            first, second = sorted((leader(number), leader(match)))
            leaders[second] = first
    groups: dict[int, list[int]] = {}
    for number in range(len(texts)):
        groups.setdefault(leader(number), []).append(number)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group))


def find_copies(
    train: Sequence[str], held_out: Sequence[str], config: TrainConfig, notify: EventHandler
) -> dict[str, str]:
    """Return the training rows that nearly copy a held-out row, each with that, and report what
    becomes of them."""
    index, copies = NearDuplicates(held_out), dict[str, str]()
    for first in range(0, len(train), _REPORTED_ROWS):
        texts = train[first : first + _REPORTED_ROWS]
        matches = zip(texts, index.find(texts), strict=True)
        copies.update((text, held_out[match]) for text, match in matches if match is not None)
        if len(train) > _REPORTED_ROWS:
            notify(Progress("looking for near duplicates", first + len(texts), len(train)))
    count, share = f"{len(copies):,}", f"({len(copies) / max(len(train), 1):.1%})"
    why = ""
    if config.near_duplicates == "drop":
        rule = "left out"
        if len(copies) > _MANY_SHARE * len(train):
            why = ", as they would flatter the gain (--near-duplicates keep trains on them)"
    else:
        rule = "they stay, as --near-duplicates keep says, and the gain is too good"
    if config.streaming and train and held_out:
        later = ", as are later ones" if config.near_duplicates == "drop" else ""
        notify(
            Notice(
                f"The rows of the stream are compared with the {len(held_out):,} held-out rows "
                f"that are measured. Of the first {len(train):,} training rows {count} nearly "
                f"copy one of these {share}; {rule}{later}{why}."
            )
        )
    elif copies:
        rows = "1 training row nearly copies" if len(copies) == 1 else f"{count} training rows nearly copy"
        notify(Notice(f"{rows} held-out ones {share}; {rule}{why}."))
    return copies


def _are_near(
    covered: NDArray[np.int64],
    longer_covered: NDArray[np.int64],
    words: NDArray[np.int64],
    longer_words: NDArray[np.int64],
    all_words: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return for each pair of rows with enough shared sequences whether they are near duplicates.

    Args:
        covered: Words of the shorter row in sequences that both have; `longer_covered` those of the
            longer one.
        words: Words of the shorter row in sequences that count; `longer_words` those of the longer one.
        all_words: Words of the shorter row.
    """
    near: NDArray[np.bool_] = (covered >= _MIN_SHARE * words) & (longer_covered >= _MIN_SHARE * longer_words)
    near |= (covered >= _MIN_PART_SHARE * words) & (covered >= _MIN_PART)
    near |= (covered >= _MIN_QUOTED_SHARE * words) & (covered >= _MIN_QUOTED)
    evidence = np.minimum(_MIN_EVIDENCE_SHARE * all_words, _MIN_EVIDENCE)
    near &= covered >= evidence
    return near


@dataclass
class _Rows:
    """Words of several rows, one row after the other.

    Attributes:
        words: Hash of each word, odd for a character of a script without spaces.
        row: Number of the row of each word.
        whole: All words of a row as one hash; None for fewer than 5 words.
    """

    words: NDArray[np.uint32]
    row: NDArray[np.int32]
    whole: list[int | None]

    @staticmethod
    def concatenate(parts: Sequence["_Rows"]) -> "_Rows":
        firsts = np.cumsum([0, *(len(part.whole) for part in parts)])
        return _Rows(
            np.concatenate([np.empty(0, np.uint32), *(part.words for part in parts)]),
            np.concatenate(
                [
                    np.empty(0, np.int32),
                    *(part.row + np.int32(first) for part, first in zip(parts, firsts, strict=False)),
                ]
            ),
            [key for part in parts for key in part.whole],
        )

    def lengths(self) -> NDArray[np.int64]:
        """Words of each row."""
        return np.bincount(self.row, minlength=len(self.whole)).astype(np.int64)

    def sizes(self, positions: NDArray[np.integer]) -> NDArray[np.int8]:
        """Words in the sequences that begin at these positions."""
        return np.where(self.words[positions] & 1, np.int8(_CHARS), np.int8(_WORDS))

    def sequences(self) -> NDArray[np.uint64]:
        """All sequences, each once in a row: 32 bits of its hash, and 32 bits of its position."""
        count = len(self.words)
        mixed = self.words.astype(np.uint64) + np.uint64(0x9E3779B9)  # as in splitmix64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed = np.append(mixed ^ (mixed >> np.uint64(31)), np.zeros(_CHARS, np.uint64))
        hashes, short = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
        for offset in range(_CHARS):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + mixed[offset : offset + count]
            if offset == _WORDS - 1:
                short = hashes
        positions = np.arange(count)
        lasts = positions + self.sizes(positions) - 1
        is_whole = (lasts < count) & (self.row[np.minimum(lasts, count - 1)] == self.row)
        hashes = np.where(self.words & 1, hashes, short) & _HIGH_BITS | positions.astype(np.uint64)
        sequences: NDArray[np.uint64] = np.sort(hashes[is_whole])
        row = self.row[_unpack(sequences)[1]]
        is_copy = ((sequences[1:] ^ sequences[:-1]) <= ~_HIGH_BITS) & (row[1:] == row[:-1])
        is_first: NDArray[np.bool_] = np.append(True, ~is_copy)[: len(sequences)]
        return sequences[is_first]

    def count_words(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Count the words of each row that lie in the sequences at these positions."""
        covered, sizes = np.zeros(len(self.words), dtype=bool), self.sizes(positions)
        for offset in range(_CHARS):
            covered[positions[sizes > offset] + offset] = True
        return np.bincount(self.row[covered], minlength=len(self.whole)).astype(np.int64)

    def count_covered(
        self, positions: NDArray[np.integer], pair_of: NDArray[np.integer], pairs: int
    ) -> NDArray[np.int64]:
        """Count for each pair of rows the words that lie in its sequences at these positions."""
        order = np.lexsort((positions, pair_of))
        positions, pair_of = positions[order], pair_of[order]
        counts = self.sizes(positions).astype(np.int64)
        gaps = np.where(pair_of[1:] == pair_of[:-1], positions[1:] - positions[:-1], _CHARS)
        counts[:-1] = np.minimum(counts[:-1], gaps)
        return np.bincount(pair_of, counts, minlength=pairs).astype(np.int64)


def _group(
    parts: list[NDArray[np.uint64]],
) -> tuple[NDArray[np.uint32], NDArray[np.int32], NDArray[np.int32]]:
    """Return the different hashes in order, where the positions of each begin and end, and the positions.

    `parts` is emptied, as all this takes much memory.
    """
    sequences = np.concatenate([np.empty(0, np.uint64), *parts])
    parts.clear()
    sequences.sort()
    hashes, positions = _unpack(sequences)
    del sequences
    starts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]).astype(np.int32)
    return hashes[starts], np.append(starts, np.int32(len(hashes))), positions


def _unpack(sequences: NDArray[np.uint64]) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
    """Return hashes and positions."""
    return (sequences >> np.uint64(32)).astype(np.uint32), (sequences & ~_HIGH_BITS).astype(np.int32)


def _count_up(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0, 1, ... up to each count: 2, 3 -> 0, 1, 0, 1, 2."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


class _WordHashes(dict[str, int]):
    """Hash of each word, the same in every process; odd for a character of a script without spaces."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_CACHED_WORDS:
            self.clear()
        self[word] = number = zlib.crc32(word.encode(errors="surrogatepass")) & ~1 | bool(UNSPACED.match(word))
        return number


_word_hashes = _WordHashes()


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    first = size = 0
    for number, text in enumerate(texts):
        if size and size + len(text) > _BATCH_CHARS:
            yield texts[first:number]
            first, size = number, 0
        size += len(text)
    if first < len(texts):
        yield texts[first:]


def _split_rows(texts: Sequence[str]) -> _Rows:
    rows, whole = [], list[int | None]()
    for text in texts:
        text = _compared_text(text)
        spaced = text if text.isascii() else UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text))
        words = list(map(_word_hashes.__getitem__, WORD.findall(spaced)))
        rows.append(words)
        whole.append(hash(tuple(words)) if len(words) >= _MIN_WORDS else None)
    lengths = list(map(len, rows))
    hashes = np.fromiter(itertools.chain.from_iterable(rows), np.uint32, sum(lengths))
    return _Rows(hashes, np.repeat(np.arange(len(rows), dtype=np.int32), lengths), whole)


def _compared_text(text: str) -> str:
    """Return a row without case; of a conversation the texts of user and assistant, of a preference
    those of its first side."""
    text = first_side(text)
    return (chat.spoken_text(text) if chat.is_chat(text) else text).casefold()
