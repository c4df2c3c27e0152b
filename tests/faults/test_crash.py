"""A crash at every write, sync and rename: what is there afterwards is the old or the new, and the next run cleans up."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from lora_tuner import Adapter, Library, TrainConfig, train
from lora_tuner.store import verify

from . import process
from .process import Command, Ended, Fault

QUICK = 4  # points of each command that are tried by default; `slow` tries all
TRAIN = ["--max-steps=4", "--save-every=2", "--max-length=64", "--batch-size=2", "--rank=4", "--eval-rows=4"]
COMMANDS: dict[str, list[str]] = {
    "train": ["train", "--name", "new", *TRAIN],
    "train over another": ["train", "--name", "one", "--overwrite", *TRAIN],
    "merge": ["merge", "one", "--out", "merged/one"],
    "merge over another": ["merge", "one", "--out", "whole", "--overwrite"],
    "blend": ["blend", "one=0.5", "two=0.5", "--name", "new"],
    "blend over another": ["blend", "one=0.5", "two=0.5", "--name", "two", "--overwrite"],
    "slim": ["slim", "one", "--name", "new", "--energy", "0.5"],
    "adopt": ["adapters", "adopt", "foreign", "--name", "new"],
    "adopt in place": ["adapters", "adopt", "stranger"],
    "rename": ["adapters", "rename", "one", "new"],
    "remove": ["adapters", "remove", "one", "--yes"],
    "export": ["export", "one", "--to", "gguf", "--out", "one.gguf"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> Path:
    """A folder with two adapters, one of another tool in and one beside the library, a merged model, data and a cache."""
    root = tmp_path_factory.mktemp("world")
    lines = [f"{number}: the story {'works well' if number % 3 else 'drags on and on'}." for number in range(60)]
    (root / "reviews.txt").write_text("\n".join(lines))
    settings = {
        "base": str(gpt2),
        "dataset": str(root / "reviews.txt"),
        "max_steps": 2,
        "max_length": 64,
        "rank": 4,
        "eval_rows": 4,
        "txt_rows": "line",
        "adapters_dir": root / "adapters",
        "runs_dir": root / "runs",
    }
    for seed, name in enumerate(("one", "two")):
        train(TrainConfig.model_validate(settings | {"name": name, "seed": seed}))
    for target in (root / "foreign", root / "adapters" / "stranger"):
        shutil.copytree(root / "adapters" / "one", target)
        (target / "manifest.json").unlink()
    ended = Command("merge", "one", "--out", "whole", cwd=root, cache=root / "cache").end()
    assert ended.status == 0, ended.err
    shutil.rmtree(root / "cache")
    shutil.rmtree(root / "runs")
    return root


def arguments(name: str, world: Path, gpt2: Path) -> list[str]:
    data = ["--base", str(gpt2), "--dataset", str(world / "reviews.txt"), "--txt-rows", "line"]
    if name.startswith("adopt"):
        return [*COMMANDS[name], "--base", str(gpt2)]
    return COMMANDS[name] + (data if name.startswith("train") else [])


def run(root: Path, *words: str, fault: Fault | None = None) -> Ended:
    own = {"LORA_TUNER_CACHE": str(root / "cache")}
    return Command(*words, cwd=root, cache=root.parent / "processes", env=own, fault=fault).end()


def state(root: Path) -> dict[str, object]:
    """What is of value: each adapter, whole, by the hash of its weights; models and exported files by their bytes."""
    found: dict[str, object] = {}
    for name, it in Library(root / "adapters").entries():
        assert isinstance(it, Adapter), it
        assert verify(it) == []
        found[name] = (it.sha256, it.manifest is not None)
    for path in [*root.glob("whole/*"), *root.glob("merged/**/*"), *root.glob("*.gguf")]:
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


def litter(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.name.startswith("."))


def old_or_new(now: dict[str, object], old: dict[str, object], new: dict[str, object]) -> bool:
    """Whether each thing is as it was or as it should become, and a model folder is so as a whole."""
    models = [
        {name: it for name, it in facts.items() if name.startswith(("whole", "merged"))} for facts in (now, old, new)
    ]
    return models[0] in models[1:] and all(
        now.get(name, "none") in (old.get(name, "none"), new.get(name, "none")) for name in {*now, *old, *new}
    )


def crash_and_go_on(name: str, words: list[str], world: Path, root: Path, at: int, new: dict[str, object]) -> None:
    shutil.copytree(world, root, symlinks=True)
    old = state(root)
    ended = run(root, *words, fault=Fault(root, at))
    assert ended.status == -signal.SIGKILL, ended.err
    assert old_or_new(state(root), old, new)
    after_a_crash(name, words, root, new)


def after_a_crash(name: str, words: list[str], root: Path, new: dict[str, object]) -> None:
    """What a user does next: go on with the run, or the same again; and then nothing is left of the crash."""
    done = state(root) == new
    run_name = words[words.index("--name") + 1] if words[0] == "train" else None
    if run_name and (root / "runs" / run_name / "run.yaml").exists():
        ended = run(root, "train", "--resume", run_name)
        assert ended.status == 0 or f"The run {run_name} has finished" in ended.line, ended.err
    elif not done:
        ended = run(root, *words)
        assert ended.status == 0, ended.err
    assert state(root) == new
    if litter(root):  # what has come to its place before the crash is cleaned up after by the next that writes there
        run(root, "adapters", "adopt", "foreign", "--name", "next", "--base", str(root / "whole"))
        if words[0] not in ("adapters", "blend", "slim"):
            assert run(root, *words, *(["--overwrite"] * ("--overwrite" not in words))).status == 0
    assert litter(root) == []
    assert not list((root / "runs").glob("*"))


def becomes(words: list[str], world: Path, root: Path) -> tuple[dict[str, object], list[str]]:
    """What a command makes when nothing goes wrong, and what it does to files on its way."""
    shutil.copytree(world, root, symlinks=True)
    ended = run(root, *words, fault=Fault(root))
    assert ended.status == 0, ended.err
    assert litter(root) == []
    return state(root), ended.events


@pytest.mark.parametrize("name", COMMANDS)
def test_a_crash_leaves_the_old_or_the_new(name: str, world: Path, gpt2: Path, tmp_path: Path) -> None:
    words = arguments(name, world, gpt2)
    new, events = becomes(words, world, tmp_path / "clean")
    draw = random.Random(0)
    around = [it for it, event in enumerate(events) if event.startswith(("os.rename", "sync adapters"))][-2:]
    for at in sorted({*around, *draw.sample(range(len(events)), min(QUICK - len(around), len(events)))}):
        crash_and_go_on(name, words, world, tmp_path / str(at), at, new)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_crash_at_any_point_leaves_the_old_or_the_new(name: str, world: Path, gpt2: Path, tmp_path: Path) -> None:
    words = arguments(name, world, gpt2)
    new, events = becomes(words, world, tmp_path / "clean")
    for at in range(len(events)):
        crash_and_go_on(name, words, world, tmp_path / str(at), at, new)
        shutil.rmtree(tmp_path / str(at))


@pytest.mark.slow
def test_kill_9_at_twenty_moments(world: Path, gpt2: Path, tmp_path: Path) -> None:
    names = ["train", "train over another", "blend over another", "merge over another", "slim"]
    clean = {name: becomes(arguments(name, world, gpt2), world, tmp_path / name)[0] for name in names}
    draw, killed = random.Random(0), 0
    for number in range(200):
        name = names[number % len(names)]
        root, words = tmp_path / f"{number}", arguments(name, world, gpt2)
        shutil.copytree(world, root, symlinks=True)
        old = state(root)
        own = {"LORA_TUNER_CACHE": str(root / "cache")}
        command = Command(*words, cwd=root, cache=tmp_path / "processes", env=own)
        time.sleep(draw.uniform(0.05, 1.0))
        os.kill(command.pid, signal.SIGKILL)
        if command.end().status != -signal.SIGKILL:
            continue  # it was faster
        killed += 1
        assert old_or_new(state(root), old, clean[name])
        after_a_crash(name, words, root, clean[name])
        shutil.rmtree(root)
        if killed == 20:
            return
    raise AssertionError(f"only {killed} were killed")


def test_the_crash_itself_tears_what_is_not_synced(tmp_path: Path) -> None:
    """A fault that did nothing would prove nothing."""
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
