"""Timing helpers and the record of one measurement, shared by all benchmarks."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Figure = dict[str, Any]


def figure(what: str, value: float, unit: str, note: str = "") -> Figure:
    """Make one row of the table of results."""
    return {"what": what, "value": value, "unit": unit, "note": note}


def seconds(work: Callable[[], Any]) -> float:
    """Return the duration of a call, in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median duration of each candidate, in seconds.

    Candidates alternate, so that noise of the machine affects all alike. A first round warms up and
    is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, candidate in candidates.items():
            duration = seconds(candidate)
            if number:
                times[name].append(duration)
    return {name: statistics.median(durations) for name, durations in times.items()}
