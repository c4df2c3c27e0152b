"""Lengths of rows: a histogram, quantiles, what `--max-length` cuts, and outliers."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BINS = 24  # about so many bars
_NICE = (1, 2, 4, 5, 8, 10)  # widths of bars, times a power of ten
_OUTLIER_RANGES = 2.0  # interquartile ranges of the logarithm beyond the quartiles
_MIN_RANGE = math.log(1.5)  # of rows of nearly one length
_OTHER_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Bar:
    """Rows of a length from `start` up to but without `end`; the last bar has no end."""

    start: int
    end: int | None
    rows: int


@dataclass(frozen=True)
class CutAt:
    """Rows longer than a length, and the share of all tokens that is beyond it."""

    length: int
    longer_rows: int
    share_beyond: float


@dataclass(frozen=True)
class Lengths:
    """Lengths of the rows in tokens, or in words where there is no tokenizer.

    Attributes:
        unit: "tokens" or "words".
        tokenizer: Name of the base whose tokenizer counted; None for words.
        truncated_rows: Rows that training cuts at `max_length`, so that their end is lost.
        chunked_rows: Rows that training divides at `max_length` into several.
        used_share: Share of the tokens that is trained on.
        cuts: Rows longer than `max_length`, and than other lengths; empty for words.
    """

    unit: str
    tokenizer: str | None
    max_length: int
    total: int
    mean: float
    shortest: int
    median: int
    percentile_95: int
    longest: int
    truncated_rows: int
    chunked_rows: int
    used_share: float | None
    cuts: list[CutAt]
    histogram: list[Bar]


def describe_lengths(
    lengths: Sequence[int],
    max_length: int,
    *,
    tokenizer: str | None,
    truncated_rows: int = 0,
    used_share: float | None = None,
) -> Lengths:
    """Summarize the lengths of at least one row."""
    values = np.asarray(lengths)
    cuts = []
    if tokenizer is not None:
        for length in sorted({max_length, *(other for other in _OTHER_LENGTHS if other < 2 * values.max())}):
            beyond = np.maximum(values - length, 0)
            share = float(beyond.sum() / max(values.sum(), 1))
            cuts.append(CutAt(length, int((beyond > 0).sum()), share))
    longer_rows = int((values > max_length).sum()) if tokenizer is not None else 0
    return Lengths(
        unit="words" if tokenizer is None else "tokens",
        tokenizer=tokenizer,
        max_length=max_length,
        total=int(values.sum()),
        mean=round(float(values.mean()), 1),
        shortest=int(values.min()),
        median=int(np.median(values)),
        percentile_95=int(np.percentile(values, 95)),
        longest=int(values.max()),
        truncated_rows=truncated_rows,
        chunked_rows=longer_rows - truncated_rows,
        used_share=used_share,
        cuts=cuts,
        histogram=_histogram(values),
    )


def _histogram(values: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> list[Bar]:
    """Return bars of one width up to the 99th percentile, and one for all longer rows."""
    limit, least = int(np.percentile(values, 99)), int(values.min())
    width = _nice_width((limit - least) / _BINS)
    first = least // width
    count = limit // width + 1 - first
    rows = np.bincount(np.minimum(values // width - first, count), minlength=count + 1)
    edges = [(first + index) * width for index in range(count + 1)]
    bars = [Bar(*edge, int(rows[index])) for index, edge in enumerate(itertools.pairwise(edges))]
    return [*bars, Bar(edges[-1], None, int(rows[count]))] if rows[count] else bars


def _nice_width(least: float) -> int:
    power = int(10 ** math.floor(math.log10(max(least, 1))))
    return next(step * power for step in _NICE if step * power >= least)


def describe_span(start: int, end: int | None) -> str:
    """Describe lengths from `start` up to but without `end`."""
    if end is None:
        return f"{start:,} or more"
    return f"{start:,}" if end == start + 1 else f"{start:,} to {end - 1:,}"


def find_outliers(lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the positions of rows that are far longer than others, longest first, and far shorter,
    shortest first.

    Their logarithm is further from the quartiles than two interquartile ranges.
    """
    logs = np.log(np.maximum(np.asarray(lengths), 1))
    low, high = np.percentile(logs, [25, 75])
    reach = _OUTLIER_RANGES * max(high - low, _MIN_RANGE)
    order = np.argsort(logs, kind="stable")
    long = [int(index) for index in order[::-1] if logs[index] > high + reach]
    short = [int(index) for index in order if logs[index] < low - reach]
    return long, short
