"""What all parts of the benchmarks share: seconds, medians of turns, a figure."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Figure = dict[str, Any]


def figure(what: str, value: float, unit: str, note: str = "") -> Figure:
    return {"what": what, "value": value, "unit": unit, "note": note}


def seconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each way; they take turns, and a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            taken = seconds(way)
            if turn:
                times[name].append(taken)
    return {name: statistics.median(found) for name, found in times.items()}
