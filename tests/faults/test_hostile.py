"""Adapters of strangers: every command that opens one, and what is wrong with them, by hand and by chance."""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_tuner import Generator
from lora_tuner.errors import LoraTunerError

from .. import tiny
from . import strangers
from .process import Command
from .strangers import BY_HAND, NAME, Stranger

MEMORY = 200_000_000  # bytes that a stranger may cost more than a good one does
SECONDS = 5.0  # of the processor
HANGS = 20.0  # seconds by the clock
PROMPT = ["the actor", "--greedy", "--max-new-tokens", "3"]
ROWS = ["--eval-dataset", "rows.txt", "--eval-rows", "2"]
LONG = 1_500_000  # characters of what it says that are kept
BASE = ["--base", "base"]
CHEAP: dict[str, list[str]] = {
    "list": ["adapters", "list"],
    "list --json": ["adapters", "list", "--json"],
    "show": ["adapters", "show", NAME],
    "show --json": ["adapters", "show", NAME, "--json"],
    "verify": ["adapters", "verify", NAME],
    "check vllm": ["adapters", "check", NAME, "--for", "vllm"],
    "check llama.cpp": ["adapters", "check", NAME, "--for", "llama.cpp"],
    "check peft": ["adapters", "check", NAME, "--for", "peft"],
    "adopt": ["adapters", "adopt", f"adapters/{NAME}", "--adapters-dir", "other", *BASE],
    "rename": ["adapters", "rename", NAME, "renamed"],
    "push": ["push", NAME, "me/mine", "--dry-run"],
}
ON_A_BASE: dict[str, list[str]] = {
    "generate": ["generate", *PROMPT, "--adapter", NAME, *BASE],
    "compare": ["compare", *PROMPT, "--adapter", NAME, *BASE],
    "evaluate": ["evaluate", NAME, *ROWS, *BASE],
    "merge": ["merge", NAME, "--out", "merged", *ROWS, *BASE],
    "blend": ["blend", f"{NAME}=0.5", "--name", "blended", *ROWS, *BASE],
    "slim": ["slim", NAME, "--name", "slimmed", *ROWS, *BASE],
    "export": ["export", NAME, "--out", "out.gguf", *BASE],
    "train": [
        *("train", "--from", NAME, "--name", "trained", "--dataset", "rows.csv", "--max-steps", "1"),
        *("--max-length", "32", "--eval-rows", "2", *BASE),
    ],
}
ALL = CHEAP | ON_A_BASE


@dataclass
class Outcome:
    """What a command did with an adapter: `grown` in bytes, `wrote` outside its folder, `left` beside what was there."""

    stranger: str
    command: str
    status: int
    out: str
    err: str
    broke: str
    seconds: float
    grown: int
    wrote: list[str]
    left: list[str]

    @property
    def text(self) -> str:
        return self.out + self.err


class _HangError(BaseException):
    pass


def _hang(*_: Any) -> None:
    raise _HangError


def tree(root: Path) -> dict[str, Any]:
    """All that is in a folder, links and pipes among it; of what is no plain file, what it is."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        facts = path.lstat()
        plain = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(root))] = (
            facts.st_mode,
            os.readlink(path) if path.is_symlink() else (facts.st_size, facts.st_mtime_ns) if plain else None,
        )
    return found


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def _do_all(jobs: list[tuple[str, Any]], commands: dict[str, list[str]], good: Path, answer: Path) -> None:
    """In a process of its own: all commands on all of these, each in the place of the good one."""
    from typer.testing import CliRunner

    from lora_tuner.cli import app

    wrote: list[str] = []
    here = Path.cwd()

    def watch(event: str, arguments: Any) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link"):
            names = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
            for name in names:
                if isinstance(name, str | bytes | os.PathLike):
                    path = Path(os.path.abspath(os.fsdecode(name)))
                    if not path.is_relative_to(here) and not path.is_relative_to("/dev"):
                        wrote.append(f"{event} {path}")

    sys.dont_write_bytecode = True
    tempfile.tempdir = os.environ["MPLCONFIGDIR"] = str(here / ".tmp")
    (here / ".tmp").mkdir()
    sys.addaudithook(watch)
    signal.signal(signal.SIGALRM, _hang)
    outcomes = []
    for name, spoil in [("warm", None), *jobs]:
        adapter = strangers.copy(good, here / "adapters" / NAME)
        if spoil is not None:
            spoil(adapter)
        for command, arguments in commands.items():
            before = tree(here)
            Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts again from here
            wrote.clear()
            resident, start = _memory("VmRSS"), time.process_time()
            signal.setitimer(signal.ITIMER_REAL, HANGS)
            try:
                result = CliRunner().invoke(app, arguments)
                error = result.exception
                broke = "" if error is None or isinstance(error, SystemExit) else repr(error)[:500]
                status, out, err = result.exit_code, result.stdout, result.stderr
            except _HangError:
                status, out, err, broke = -1, "", "", "it hangs"
            signal.setitimer(signal.ITIMER_REAL, 0)
            seconds, grown = time.process_time() - start, _memory("VmHWM") - resident
            if (renamed := here / "adapters" / "renamed").exists() and not os.path.lexists(adapter):
                renamed.rename(adapter)
            after = tree(here)
            left = [path for path in {*before, *after} if before.get(path) != after.get(path) and path[0] != "."]
            left = [path for path in left if path not in ("adapters", "runs", "other")]
            for path in (here / it for it in left if it not in before):
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.exists():
                    path.unlink()
            if spoil is not None:
                outcomes.append(
                    Outcome(
                        name, command, status, out[:LONG], err[:LONG], broke, seconds, grown, list(wrote), sorted(left)
                    )
                )
        shutil.rmtree(adapter)
    answer.write_text(json.dumps([asdict(it) for it in outcomes]))
    raise SystemExit(0)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> Path:
    return strangers.write_good(tmp_path_factory.mktemp("good") / NAME, gpt2)


@pytest.fixture
def do(tmp_path: Path, gpt2: Path, good: Path) -> Iterator[Callable[..., list[Outcome]]]:
    """All of these commands on all of these strangers. Checks what holds whatever is wrong."""
    place = tmp_path / "place"
    for name in ("adapters", "runs", "other"):
        (place / name).mkdir(parents=True)
    (place / "base").symlink_to(gpt2)
    texts = tiny.reviews(40)
    (place / "rows.txt").write_text("\n".join(texts))
    (place / "rows.csv").write_text("text\n" + "\n".join(texts))

    def work(jobs: list[tuple[str, Any]], commands: dict[str, list[str]]) -> list[Outcome]:
        answer = tmp_path / "answer.json"
        before = Command(
            cwd=place, cache=tmp_path / ".cache", before=partial(_do_all, jobs, commands, good, answer)
        ).end(limit=600)
        assert before.status == 0, before.err
        outcomes = [Outcome(**it) for it in json.loads(answer.read_text())]
        assert len(outcomes) == len(jobs) * len(commands)
        return outcomes

    base = strangers_hash(gpt2)
    yield work
    assert strangers_hash(gpt2) == base


def strangers_hash(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check(it: Outcome) -> None:
    """What holds whatever is wrong with an adapter."""
    where = f"{it.command} of {it.stranger}: {it.err[-800:]}{it.out[-400:]}"
    assert not it.broke, f"{it.broke} {where}"
    assert it.status in (0, 1), where
    assert "Traceback" not in it.text, where
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in it.text), where
    assert it.seconds < SECONDS, where
    assert it.grown < MEMORY, f"{it.grown} {where}"
    assert not it.wrote, f"{it.wrote} {where}"
    errors = [line for line in it.err.splitlines() if line.startswith("Error: ")]
    if it.status == 0:
        assert not errors, where
    else:
        assert not it.left, where
        if it.command == "verify" or it.command.startswith("check") and not errors:
            return
        assert len(errors) == 1, where
        assert len(errors[0]) < 2_000, where
        assert errors[0].endswith("."), where
        assert it.err.splitlines()[-1] == errors[0], where


def check_refused(it: Outcome, stranger: Stranger) -> None:
    """Who has to refuse it does, with the reason."""
    by, name = stranger.refused_by, it.command.partition(" ")[0]
    if name == "list":
        refused = by == "all"
        said = json.loads(it.out)[0].get("broken", "") if "--json" in it.command else it.err
    else:
        refused = {
            "all": True,
            "numbers": name in ("verify", "push", *ON_A_BASE),
            "base": name in ON_A_BASE,
            "push": name == "push",
        }.get(by, False)
        said = it.out if name == "verify" else it.err
        if refused:
            assert it.status == 1, f"{it.command} of {it.stranger}: {it.text[-800:]}"
    if refused:
        assert stranger.why in said or "no manifest" in said, f"{it.command} of {it.stranger}: {said[-800:]}"


def test_what_is_wrong_with_a_stranger_is_said_by_all_who_open_it(do):
    for it in do([(name, it.spoil) for name, it in BY_HAND.items()], CHEAP):
        check(it)
        check_refused(it, BY_HAND[it.stranger])
