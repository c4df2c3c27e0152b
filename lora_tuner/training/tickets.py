"""The queue of a folder of runs: a file for each process that trains there or waits. No torch.

The process holds the lock of its file until it ends. The name of the file has all there is to say:
number in the queue, process, run. That of a killed process has no lock; the next look removes it.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from .. import atomic_io
from ..errors import EventHandler, Notice, TrainingError
from ..text import format_count, format_names

POLL_SECONDS = 0.5  # between two looks at those ahead
_SUFFIX = f".ticket{atomic_io.WORK_SUFFIX}"
_MUTEX = f".queue.mutex.lock{atomic_io.WORK_SUFFIX}"  # names of runs have no dot


@dataclass(frozen=True, order=True)
class Ticket:
    """A process that trains or waits. With number 0 it trains; others have their turns in order.

    `name` is that of the folder of its run or sweep. `started` is the time at which the process
    began, in milliseconds, which tells it from a later one with its `pid`. A process in the queue
    keeps its ticket while it trains, and has a second one then.
    """

    number: int
    name: str
    pid: int
    started: int
    path: Path = field(compare=False)


def process_start(pid: int | None = None) -> int:
    """Return when a process began, by default this one, in milliseconds.

    Raises psutil.Error if there is none.
    """
    return round(psutil.Process(pid).create_time() * 1000)


def live_tickets(runs_dir: Path) -> list[Ticket]:
    """Return the tickets of processes that live, in order; remove the others."""
    tickets = []
    for path in runs_dir.glob(f".*{_SUFFIX}"):
        parts = path.name.removeprefix(".").removesuffix(_SUFFIX).split("-", 3)
        if len(parts) == 4 and all(part.isdigit() for part in parts[:3]) and _is_held(path):
            number, pid, started = map(int, parts[:3])
            tickets.append(Ticket(number, parts[3], pid, started, path))
    return sorted(tickets)


def _is_held(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0), contextlib.suppress(OSError):
            path.unlink()
        _delete_on_windows(path)
        return False
    except Timeout:
        return True
    except OSError:  # of another user
        return path.exists()


def ahead_of(ticket: Ticket, tickets: Sequence[Ticket]) -> list[Ticket]:
    """Return the tickets of other processes that must end before this one has its turn."""
    ahead = [other for other in tickets if other.number < ticket.number]
    return sorted({other.pid: other for other in ahead if other.pid != ticket.pid}.values())


@contextlib.contextmanager
def ticket(runs_dir: Path, name: str, number: int = 0) -> Iterator[Ticket]:
    """Hold a ticket during the block."""
    pid, started = os.getpid(), process_start()
    path = runs_dir / f".{number}-{pid}-{started}-{name}{_SUFFIX}"
    lock = FileLock(path, timeout=10)  # a look holds it for a moment
    lock.acquire()
    try:
        yield Ticket(number, name, pid, started, path)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
        _delete_on_windows(path)


def _delete_on_windows(path: Path) -> None:
    """Delete the file of a lock where that was not possible as long as it was open."""
    if os.name == "nt":
        with contextlib.suppress(OSError):
            path.unlink()


def already_there(name: str, runs_dir: Path) -> TrainingError:
    """Make the error of a name that has a ticket."""
    where = f"'{name}' is training or waiting in {runs_dir} already"
    return TrainingError(f"{where}: choose another --name, or wait for it.")


@contextlib.contextmanager
def turn(runs_dir: Path, name: str, notify: EventHandler) -> Iterator[None]:
    """Wait until no run trains in the folder and none is ahead; those behind wait during the block.

    Raises:
        TrainingError: a run of this name is waiting or training.
    """
    if why := atomic_io.why_not_writable(runs_dir):
        raise TrainingError(f"{why}: choose another --runs-dir.")
    runs_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with _mutex(runs_dir):
            tickets = live_tickets(runs_dir)
            if any(other.name == name for other in tickets):
                raise already_there(name, runs_dir)
            number = 1 + max((other.number for other in tickets), default=0)
            own = stack.enter_context(ticket(runs_dir, name, number))
        told: list[str] = []
        while names := [other.name for other in ahead_of(own, live_tickets(runs_dir))]:
            if names != told:
                told, count = names, format_count(len(names), "run")
                notify(Notice(f"Waiting for {count} in {runs_dir}: {format_names(names)}."))
            time.sleep(POLL_SECONDS)
        yield


@contextlib.contextmanager
def _mutex(runs_dir: Path) -> Iterator[None]:
    """Let one process at a time draw a number."""
    path = runs_dir / _MUTEX
    with FileLock(path, timeout=60):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
