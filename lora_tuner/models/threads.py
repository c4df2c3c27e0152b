"""The threads that compute on a CPU: their number, and how a busy machine slows them down.

Surprise: after each product the threads wait for the last one. Where other programs take the cores,
that one is often not running: two threads may then be many times as slow as one.
"""

import contextlib
import statistics
import time

import torch

from ..atomic_io import cache_dir
from ..config import MAX_THREADS
from ..errors import ConfigError

SLOWER = 1.5  # times as slow as one thread, before it is said
MAX_RUNNING = 0.8  # share of their time in which threads run on a busy machine, at most
SAID_AGAIN = 3600  # seconds after a command has said it
ROUNDS, PRODUCTS = 5, 10
ROWS, WIDTH = 64, 576  # of a product, as in a step of a small base


def set_threads(count: int | None) -> None:
    """Set the number of threads of this process; None leaves it: OMP_NUM_THREADS, else the cores."""
    if count is not None:
        if not 1 <= count <= MAX_THREADS:  # with too many, torch crashes at its next product
            raise ConfigError(f"threads is {count:,}: give a number from 1 to {MAX_THREADS:,}.")
        torch.set_num_threads(count)


def busy_warning() -> str | None:
    """Return a line for a machine so busy that all threads are slower than one would be.

    Takes 50 ms, on a busy machine a second or two. The threads must both be slow and be kept from running,
    so that a quiet machine on which they do not help gets no warning.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return None
    slowdown, running = _measure(threads)
    if slowdown < SLOWER or running > MAX_RUNNING:
        return None
    digits = 0 if slowdown >= 10 else 1
    return (
        f"This machine is busy: {threads} threads are {slowdown:.{digits}f} times as slow as one, and stay in use, as "
        "their number changes rounding. One is faster: --threads 1, or OMP_NUM_THREADS=1."
    )


def hourly_warning() -> str | None:
    """Return the line of `busy_warning`, unless a command has said it within the last hour."""
    marker = cache_dir() / "busy"
    with contextlib.suppress(OSError):
        if 0 <= time.time() - marker.stat().st_mtime < SAID_AGAIN:
            return None
    warning = busy_warning()
    if warning:
        with contextlib.suppress(OSError):
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    return warning


def _measure(threads: int) -> tuple[float, float]:
    """Return how many times as slow all threads are as one, and the share of their time that they run."""
    alone, together, cpu_seconds = [], [], 0.0
    try:
        for _ in range(ROUNDS):
            alone.append(_time_products(1)[0])
            seconds, used = _time_products(threads)
            together.append(seconds)
            cpu_seconds += used
    finally:
        torch.set_num_threads(threads)
    # The clock of the process may be coarse, so that it tells nothing about a single round.
    return statistics.median(together) / statistics.median(alone), cpu_seconds / sum(together) / threads


def _time_products(threads: int) -> tuple[float, float]:
    """Return the seconds that some products take, and those of all cores."""
    torch.set_num_threads(threads)
    rows, weight = torch.ones(ROWS, WIDTH), torch.ones(WIDTH, WIDTH)
    torch.mm(rows, weight)  # starts the threads
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(PRODUCTS):
        torch.mm(rows, weight)
    return time.perf_counter() - start, time.process_time() - cpu_start
