"""A crash at each write, sync and rename leaves the old or the new state, and the next command cleans up."""

import contextlib
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from . import process, workspaces
from .injected_signals import signalled
from .process import Command, Fault
from .runs import cases
from .workspaces import COMMANDS, State, arguments, litter, old_or_new, points, run, state, unfinished

QUICK = 2  # points tried per command by default; the slow test tries all


def crash_and_go_on(name: str, words: list[str], world: Path, root: Path, at: int, new: State) -> None:
    shutil.copytree(world, root, symlinks=True)
    old = state(root)
    result = run(root, *words, fault=Fault(root, at))
    assert result.status == -signal.SIGKILL, result.err
    assert old_or_new(state(root), old, new)
    after_a_crash(name, words, root, new)


def after_a_crash(name: str, words: list[str], root: Path, new: State) -> None:
    """Resume the run, or repeat the command, as a user would: nothing is left of the crash."""
    done = state(root) == new
    if run_name := unfinished(words, root):
        result = run(root, "train", "--resume", run_name)
        assert result.status == 0 or f"The run {run_name} has finished" in result.line, result.err
    elif not done:
        result = run(root, *words)
        assert result.status == 0, result.err
    assert state(root) == new
    if litter(root):  # leftovers of a finished swap are removed by the next command that writes there
        run(root, "adapters", "adopt", "foreign", "--name", "next", "--base", str(root / "whole"))
        if words[0] not in ("adapters", "blend", "compress"):
            assert run(root, *words, *(["--overwrite"] * ("--overwrite" not in words))).status == 0
    assert litter(root) == []
    assert [path.name for path in root.glob("runs/*")] == [key for key in new if key.endswith(".sweep")]


@pytest.mark.parametrize(
    "name", [name for name in workspaces.QUICK if name not in ("sweep over another", "adopt in place", "export")]
)
def test_crash_keeps_old_or_new(name: str, expected, world: Path, gpt2: Path, tmp_path: Path) -> None:
    words = arguments(name, world, gpt2)
    new, events = expected(name)
    draw = random.Random(0)
    around = [it for it, event in enumerate(events) if event.startswith(("os.rename", "sync adapters"))][-2:]
    for at in sorted({*around, *draw.sample(range(len(events)), min(QUICK - len(around), len(events)))}):
        crash_and_go_on(name, words, world, tmp_path / str(at), at, new)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_crash_at_any_point_keeps_old_or_new(
    name: str, expected, world: Path, gpt2: Path, tmp_path: Path
) -> None:
    words = arguments(name, world, gpt2)
    new, events = expected(name)
    for at in points(name, events):
        crash_and_go_on(name, words, world, tmp_path / str(at), at, new)
        shutil.rmtree(tmp_path / str(at))


SWEEP_MOMENTS = [
    ("training.run:train", 1),  # before the first trial
    ("training.run:trainer.run_trainer", 1),
    ("training.paths:remove_run_folder", 1),
    # The folder of the first trial, which has its adapter; two others are of checks before training.
    ("atomic_io:shutil.rmtree", 3),
    ("training.run:train", 2),
    ("training.paths:remove_run_folder", 2),
    ("training.sweep:evaluation.held_out_losses", 1),
    ("adapters.plots:plot_sweep", 1),
]


@pytest.mark.parametrize(
    ("name", "moment"),
    cases(
        [("sweep over another", SWEEP_MOMENTS[3])],
        [(name, moment) for name in ("sweep", "sweep over another") for moment in SWEEP_MOMENTS],
    ),
)
def test_killed_sweep_resumes(
    name: str, moment: tuple[str, int], expected, world: Path, gpt2: Path, tmp_path: Path
) -> None:
    words, root = arguments(name, world, gpt2), tmp_path / "it"
    shutil.copytree(world, root, symlinks=True)
    killed = run(root, *words, before=partial(signalled, (f"lora_tuner.{moment[0]}", moment[1], signal.SIGKILL)))
    assert killed.status == -signal.SIGKILL
    result = run(root, "train", "--resume", words[2])
    assert result.status == 0, result.err
    assert state(root) == expected(name)[0]
    assert [path.name for path in root.glob("runs/[!.]*")] == [f"{words[2]}.sweep"]
    ended = run(root, "train", "--resume", words[2])
    assert f"its sweep has finished, with the result runs/{words[2]}.sweep/sweep.json." in ended.line


@pytest.mark.slow
def test_sigkill_keeps_old_or_new(expected, world: Path, gpt2: Path, tmp_path: Path) -> None:
    names = [
        "train",
        "train over another",
        "sweep over another",
        "blend over another",
        "merge over another",
        "compress",
    ]
    clean = {name: expected(name)[0] for name in names}
    draw, killed = random.Random(0), 0
    for number in range(200):
        name = names[number % len(names)]
        root, words = tmp_path / f"{number}", arguments(name, world, gpt2)
        shutil.copytree(world, root, symlinks=True)
        old = state(root)
        own = {"LORA_TUNER_CACHE": str(root / "cache")}
        command = Command(*words, cwd=root, cache=tmp_path / "processes", env=own)
        time.sleep(draw.uniform(0.05, 1.0))
        with contextlib.suppress(ProcessLookupError):
            os.kill(command.pid, signal.SIGKILL)
        if command.end().status != -signal.SIGKILL:
            continue  # the command ended first
        killed += 1
        assert old_or_new(state(root), old, clean[name])
        after_a_crash(name, words, root, clean[name])
        shutil.rmtree(root)
        if killed == 20:
            return
    raise AssertionError(f"only {killed} were killed")


def test_crash_fault_truncates_unsynced_files(tmp_path: Path) -> None:
    """Check that the fault itself works."""
    (tmp_path / "safe").write_text("before")

    child = process.CONTEXT.Process(target=_write_three, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "safe": "before",
        "synced": "12345678",
        "torn": "1234",
    }


def _write_three(root: Path) -> None:
    Fault(root, at=3).install([])
    for name in ("synced", "torn"):
        with (root / name).open("w") as file:
            file.write("12345678")
            file.flush()
            if name == "synced":
                os.fsync(file.fileno())
    (root / "never").write_text("")
