"""Features of the style of short texts: how they are written, more than what they are about.

Nothing is chosen by language: function words are the most frequent words of all compared texts, as
in Burrows' Delta (Literary and Linguistic Computing 17, 2002), and so are character sequences and
punctuation marks. All sides choose alike, so a test that exchanges texts between sides stays exact.
In scripts without spaces a character is a word.
"""

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..config import HELD_OUT_MAX_TOKENS
from ..data import tokenization
from ..data.near_duplicates import UNSPACED, WORD
from ..data.splitting import SENTENCE_START
from ..errors import EventHandler, Notice, Progress, ignore_events

if TYPE_CHECKING:
    from ..models.loading import LoadedBase

# The most frequent ones in all texts.
FUNCTION_WORDS, CHARACTER_SEQUENCES, MARKS, COMMON_WORDS = 60, 150, 16, 300
SHORT_SENTENCE, LONG_SENTENCE = 5, 25  # words, at most and at least
Array = npt.NDArray[np.float64]
_LETTER = f"(?:(?!{UNSPACED.pattern}){WORD.pattern.removesuffix('+')})"
_STYLE_WORD = re.compile(f"{UNSPACED.pattern}|{_LETTER}+(?:['\u2019]{_LETTER}+)*")
_MARK = re.compile(r"[^\w\s]")
_MARKS_AFTER = re.compile(r"[^\w\s]*")
_DIGIT = re.compile(r"\d")


@dataclass(frozen=True)
class Passage:
    """A text to compare; `opening` is what it continues, empty for an answer."""

    opening: str
    text: str


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, such as "don't"."""
    return _STYLE_WORD.findall(text.lower())


def cut_to_words(text: str, count: int) -> str:
    """Return the first words of a text, with the punctuation after the last one."""
    words = [*itertools.islice(_STYLE_WORD.finditer(text), count)]
    end = words[-1].end() if words else 0
    marks = _MARKS_AFTER.match(text, end)
    return text[:end] + (marks[0] if marks else "")


def cut_alike(sides: Sequence[Sequence[Passage]], min_words: int) -> tuple[list[int], list[list[Passage]]]:
    """Cut passage i of each side to the words that all of them have, as many features depend on
    length.

    Returns the indices of those with at least `min_words`, and their passages on each side.
    """
    counts = [[len(split_words(passage.text)) for passage in side] for side in sides]
    words = [*map(min, *counts)]
    kept = [index for index, count in enumerate(words) if count >= min_words]
    cut = [
        [replace(side[index], text=cut_to_words(side[index].text, words[index])) for index in kept]
        for side in sides
    ]
    return kept, cut


def text_features(texts: Sequence[str]) -> dict[str, Array]:
    """Measure all aspects of style that the texts alone show.

    Returns:
        Name of each aspect -> its features, of shape (texts, features).
    """
    words = [split_words(text) for text in texts]
    common = set(_most_frequent(words, COMMON_WORDS))
    return {
        "function words": _rates(words, FUNCTION_WORDS),
        "character sequences": _rates([*map(_character_sequences, texts)], CHARACTER_SEQUENCES),
        "sentence rhythm": np.array([*map(_sentence_features, texts)]),
        "punctuation": _punctuation_features(texts),
        "vocabulary": np.array([_vocabulary_features(each, common) for each in words]),
    }


def _most_frequent(items: Sequence[Sequence[str]], count: int) -> list[str]:
    """The most frequent items of all lists, whatever the order of these: `Counter.most_common`
    takes the first of ties."""
    counts = Counter(itertools.chain(*items))
    return heapq.nsmallest(count, counts, key=lambda item: (-counts[item], item))


def _rates(items: Sequence[Sequence[str]], count: int, totals: Sequence[int] | None = None) -> Array:
    """Square roots of the shares that the most frequent items have in each list: their error is
    about the same for rare and for frequent ones."""
    names = _most_frequent(items, count)
    counters = [*map(Counter, items)]
    counts = np.array([[counter[name] for name in names] for counter in counters], dtype=np.float64)
    sizes = np.maximum([*map(len, items)] if totals is None else totals, 1)
    return np.sqrt(counts.reshape(len(items), len(names)) / sizes[:, None])


def _character_sequences(text: str) -> list[str]:
    """All sequences of two and three characters; a digit is any digit, and white space a space."""
    text = f" {_DIGIT.sub('0', ' '.join(text.lower().split()))} "
    return [text[start : start + size] for size in (2, 3) for start in range(len(text) - size + 1)]


def _sentence_features(text: str) -> list[float]:
    """Mean, spread and autocorrelation of the logarithms of the sentences' lengths in words, and
    the shares of short and of long ones."""
    counts = [len(split_words(sentence)) for sentence in SENTENCE_START.split(text.strip())]
    lengths = np.array([count for count in counts if count] or [1], dtype=np.float64)
    logs = np.log(lengths)
    deviations = logs - logs.mean()
    variance = float((deviations**2).sum())
    rhythm = float((deviations[1:] * deviations[:-1]).sum()) / variance if variance > 1e-9 else 0.0
    short, long = (lengths <= SHORT_SENTENCE).mean(), (lengths >= LONG_SENTENCE).mean()
    return [float(logs.mean()), float(logs.std()), rhythm, float(short), float(long)]


def _punctuation_features(texts: Sequence[str]) -> Array:
    """Rates of the marks, line breaks, capitals and digits in the characters of each text."""
    marks = _rates([_MARK.findall(text) for text in texts], MARKS, [*map(len, texts)])
    tests: list[Callable[[str], bool]] = [lambda each: each == "\n", str.isupper, str.isdigit]
    others = [[sum(map(test, text)) / max(len(text), 1) for test in tests] for text in texts]
    return np.hstack([marks, np.sqrt(others)])


def _vocabulary_features(words: Sequence[str], common: Iterable[str]) -> list[float]:
    """Richness: different words, words used once, the chance that two words are the same, words
    that are not common, and repeated sequences of three words; mean and spread of the words'
    lengths in characters."""
    count, counts = max(len(words), 1), Counter(words)
    lengths = np.array([*map(len, words)] or [0])
    sequences = [*zip(words, words[1:], words[2:], strict=False)]
    return [
        float(np.log(max(len(counts), 1)) / np.log(max(count, 2))),
        sum(number == 1 for number in counts.values()) / count,
        sum(number * (number - 1) for number in counts.values()) / max(count * (count - 1), 1),
        sum(word not in common for word in words) / count,
        1 - len(set(sequences)) / max(len(sequences), 1),
        float(lengths.mean()),
        float(lengths.std()),
    ]


def reverse_sentences(text: str) -> str | None:
    """Return a text with all sentences but the last, which may be cut off, in reverse order; None
    with fewer than two of these."""
    gaps = [match.span() for match in SENTENCE_START.finditer(text)]
    starts, ends = [0, *(end for _, end in gaps)], [*(start for start, _ in gaps), len(text)]
    sentences = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    if len(sentences) < 3:
        return None
    sentences[:-1] = sentences[-2::-1]
    separators = [*(text[start:end] for start, end in gaps), ""]
    return "".join(itertools.chain(*zip(sentences, separators, strict=True)))


def reading_features(
    sides: Mapping[str, Sequence[Passage]], base: "LoadedBase", notify: EventHandler = ignore_events
) -> dict[str, Array]:
    """Measure how a base reads the passages of all sides: their loss, and what the order of their
    sentences is worth.

    The order is worth the rise in loss when the sentences of opening and text are reversed; 0 for
    fewer than three sentences. No other feature sees the order. Price: two passes over the tokens
    of all sides, which are kept in the user's cache.

    Args:
        sides: name of each side, for `notify` -> its passages.

    Returns:
        Features of shape (passages of all sides, 1), in nats per word.
    """
    predictability: list[float] = []
    order: list[float] = []
    for name, passages in sides.items():
        wholes = [(passage.opening + passage.text).strip() for passage in passages]
        reversed_texts = [reverse_sentences(whole) for whole in wholes]
        openings = [passage.opening.strip() for passage in passages]
        texts = [*wholes, *openings, *(text or "" for text in reversed_texts)]
        losses = _losses(texts, base, partial(_notify_stage, notify, f"style: the base reads {name}"))
        whole, before, reverse = np.split(losses, 3)
        words = np.array([max(len(split_words(text)), 1) for text in wholes])
        own_words = np.array([max(len(split_words(passage.text)), 1) for passage in passages])
        has_order = np.array([text is not None for text in reversed_texts])
        predictability += ((whole - before) / own_words).tolist()
        order += (np.where(has_order, reverse - whole, 0.0) / words).tolist()
    return {
        "predictability": np.array(predictability)[:, None],
        "order of sentences": np.array(order)[:, None],
    }


def _losses(texts: Sequence[str], base: "LoadedBase", notify: EventHandler) -> Array:
    """Summed negative log-likelihood of each text in nats; 0 for one without predictions."""
    from ..evaluation import held_out_loss

    encoded = tokenization.encode_texts(base.tokenizer, texts, add_eos=False)
    rows = tokenization.truncate(encoded, min(HELD_OUT_MAX_TOKENS, base.max_context))
    measured = [number for number, row in enumerate(rows) if tokenization.count_predictions(row)]
    losses = np.zeros(len(texts))
    if measured:
        result = held_out_loss.measure_base_loss(base, [rows[number] for number in measured], notify)
        losses[measured] = result.nll
    return losses


def _notify_stage(notify: EventHandler, stage: str, event: Notice | Progress) -> None:
    """Pass an event on, progress under the name of a stage."""
    notify(replace(event, stage=stage) if isinstance(event, Progress) else event)
