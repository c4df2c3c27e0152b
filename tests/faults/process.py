"""Run commands in processes of their own, forked from a server that has imported everything once.

A fork takes a fraction of the time of a new interpreter, so tests can run hundreds of commands. A
`Fault` is injected from inside the process, at one of its file operations.
"""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.preload"])
LIMIT = 120.0  # seconds, after which a command counts as hanging


@dataclass(frozen=True)
class CommandResult:
    """Result of a command. `status` is negative for a signal; `peak` is its peak memory in bytes."""

    status: int
    out: str
    err: str
    seconds: float
    peak: int
    events: list[str] = field(default_factory=list)  # its file operations, if a fault counted them

    @property
    def line(self) -> str:
        """The one error line on stderr; notices may stand before it."""
        lines = [line for line in self.err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


@dataclass(frozen=True)
class Fault:
    """A fault at file operation `at` (from 0) of a command below `root`.

    File operations are create, write, rename, remove and sync. Kinds of faults (`what`):

    - crash: the process ends, and files keep half of what was not synced, as after a power cut.
    - full: the disk is full from then on.
    - kill: the process ends, as after kill -9.
    - interrupt: Ctrl-C, once.
    """

    root: Path
    at: int | None = None
    what: str = "crash"

    def install(self, events: list[str]) -> None:
        before = {_state(path) for path in _files(self.root)}
        safe: dict[int, Any] = {}  # inode -> state at the last sync

        def happen(event: str) -> None:
            number = len(events)
            events.append(event)
            if self.at is None or number < self.at:
                return
            if self.what == "full":
                if not event.startswith(("os.remove", "os.rmdir")):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), event.partition(" ")[2])
                return
            if self.what == "interrupt":
                if number == self.at:
                    os.kill(os.getpid(), signal.SIGINT)
                return
            if self.what == "crash":
                for path in _files(self.root):
                    state = _state(path)
                    if state not in before and state != safe.get(state[0]):
                        os.truncate(path, state[1] // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, arguments: Any) -> None:
            writes = (
                event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                path = _path(arguments[0])
                if path and path.is_relative_to(self.root):
                    happen(f"{event} {path.relative_to(self.root)}")

        def fsync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.is_relative_to(self.root):
                happen(f"sync {path.relative_to(self.root)}")
                state = _state(path)
                safe[state[0]] = state
            real(descriptor)

        real, os.fsync = os.fsync, fsync
        sys.addaudithook(hook)


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]


def _state(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _path(name: Any) -> Path | None:
    return Path(os.path.abspath(os.fsdecode(name))) if isinstance(name, str | bytes | os.PathLike) else None


class Command:
    """A running command: `python cli.py ARGUMENTS` in a folder."""

    def __init__(
        self,
        *arguments: str | Path,
        cwd: Path,
        cache: Path,
        fault: Fault | None = None,
        env: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
        stdin: str = "",
    ) -> None:
        self.folder = cache / "processes" / f"{os.getpid()}-{time.monotonic_ns()}"
        self.folder.mkdir(parents=True)
        (self.folder / "in").write_text(stdin, encoding="utf-8")
        self.start = time.monotonic()
        environment = {"LORA_TUNER_CACHE": str(cache / "own"), "COLUMNS": "400"} | (env or {})
        self.process = CONTEXT.Process(
            target=_run,
            args=([str(argument) for argument in arguments], cwd, environment, self.folder, fault, before),
        )
        with pytest.MonkeyPatch.context() as patch:  # the fork server has this environment, but not this sys.path
            patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
            self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def err(self) -> str:
        """Text on stderr so far."""
        return self._read("err")

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait_for(self, condition: Callable[[], Any], seconds: float = LIMIT) -> None:
        """Wait until a condition holds while the command runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), self.err
            assert time.monotonic() < end, self.err
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self, limit: float = LIMIT) -> CommandResult:
        self.process.join(limit)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"timed out: {self.err}")
        report = self.folder / "report"
        peak, events = json.loads(report.read_text()) if report.exists() else (0, [])
        out = self._read("out")
        result = CommandResult(self.process.exitcode, out, self.err, time.monotonic() - self.start, peak, events)
        assert "Traceback" not in result.err + result.out, result.err
        return result


def _run(
    arguments: list[str],
    cwd: Path,
    env: dict[str, str],
    folder: Path,
    fault: Fault | None,
    before: Callable[[], None] | None,
) -> None:
    """Run the command in the forked process, and exit with its status."""
    for number, name in enumerate(("in", "out", "err")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        descriptor = os.open(folder / name, flags, 0o644)
        os.dup2(descriptor, number)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, mode), encoding="utf-8", line_buffering=True, write_through=True)
        if mode == "w"
        else io.TextIOWrapper(io.BufferedReader(io.FileIO(number)), encoding="utf-8")
        for number, mode in enumerate("rww")
    )
    os.environ.update(env)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["cli.py", *arguments]
    events: list[str] = []
    status: Any = 1
    with contextlib.suppress(OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        if before:
            before()
        if fault:
            fault.install(events)
        from lora_tuner.cli.app import app

        app()
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / "report").write_text(json.dumps([peak, events]))
    with contextlib.suppress(AttributeError, OSError):  # closed, or without a reader
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def contents(root: Path, skip: Sequence[str] = ()) -> dict[str, bytes | None]:
    """Read all files below a folder, hidden ones too: relative path -> bytes; None for a folder."""
    files: dict[str, bytes | None] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if not name.startswith(tuple(skip)):
            files[name] = None if path.is_dir() else path.read_bytes()
    return files


@contextlib.contextmanager
def unchanged(root: Path) -> Iterator[None]:
    """Check that the block changes nothing below a folder."""
    before = contents(root)
    yield
    assert contents(root) == before
