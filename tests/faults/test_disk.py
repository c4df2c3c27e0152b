"""A full disk, read-only folders, files in place of folders: refused early if possible, and nothing is lost."""

import ctypes
import os
import random
import re
import resource
import shutil
import struct
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from lora_tuner import atomic_io
from lora_tuner.errors import TrainingError
from lora_tuner.training import trainer
from lora_tuner.training.run import train

from ..parameters import sampled
from . import workspaces
from .process import Fault, contents
from .workspaces import COMMANDS, arguments, litter, old_or_new, points, run, state, unfinished

QUICK = 2
READ_ONLY = "is not writable: choose another"


def go_on(words: list[str], root: Path) -> None:
    """Continue when there is room again: resume the run, or repeat the command."""
    name = unfinished(words, root)
    result = run(root, *(["train", "--resume", name] if name else words))
    assert result.status == 0, result.err


def full_at(name: str, words: list[str], world: Path, root: Path, at: int, new: dict[str, object]) -> None:
    shutil.copytree(world, root, symlinks=True)
    old = state(root)
    result = run(root, *words, fault=Fault(root, at, "full"))
    if result.status == 0:  # the full disk affected only a cache
        assert state(root) == new
        return
    assert result.status == 1
    assert "No space left on device" in result.line, result.err
    assert old_or_new(state(root), old, new)
    if state(root) != new:
        go_on(words, root)
    assert state(root) == new
    assert litter(root) == []


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in workspaces.QUICK
        if name not in ("train over another", "sweep over another", "adopt in place", "export")
    ],
)
def test_full_disk_changes_nothing(name: str, expected, world: Path, gpt2: Path, tmp_path: Path) -> None:
    words = arguments(name, world, gpt2)
    new, events = expected(name)
    writes = [number for number, event in enumerate(events) if not event.startswith(("os.remove", "os.rmdir"))]
    for at in sorted({writes[-1], *random.Random(0).sample(writes, min(QUICK - 1, len(writes)))}):
        full_at(name, words, world, tmp_path / str(at), at, new)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk_at_any_write(name: str, expected, world: Path, gpt2: Path, tmp_path: Path) -> None:
    words = arguments(name, world, gpt2)
    new, events = expected(name)
    for at in points(name, events):
        full_at(name, words, world, tmp_path / str(at), at, new)
        shutil.rmtree(tmp_path / str(at))


def no_file_over(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("train", 2_000),
        pytest.param("train over another", 12_000, marks=pytest.mark.slow),
        pytest.param("sweep", 4_000, marks=pytest.mark.slow),
        pytest.param("merge over another", 12_000, marks=pytest.mark.slow),
        ("blend", 12_000),
        pytest.param("compress", 4_000, marks=pytest.mark.slow),
        ("adopt", 12_000),
        ("export", 2_000),
    ],
)
def test_library_write_failure_is_one_line(
    name: str, size: int, expected, world: Path, gpt2: Path, tmp_path: Path
) -> None:
    """Compiled libraries write files without Python, and report errors in their own words."""
    words = arguments(name, world, gpt2)
    new, _ = expected(name)
    shutil.copytree(world, tmp_path / "it", symlinks=True)
    old = state(tmp_path / "it")
    result = run(tmp_path / "it", *words, before=partial(no_file_over, size))
    assert result.status == 1, result.err
    assert re.search("File too large|failed writing|incomplete on disk", result.line), result.line
    assert old_or_new(state(tmp_path / "it"), old, new)
    go_on(words, tmp_path / "it")
    assert state(tmp_path / "it") == new
    assert litter(tmp_path / "it") == []


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_small_real_disk_full(name: str, expected, world: Path, gpt2: Path, tmp_path: Path, tmpfs: Path) -> None:
    words = arguments(name, world, gpt2)
    new, _ = expected(name)
    for room in (0, 4_096, 16_384, 40_000, 80_000, 160_000, 320_000):
        root = tmpfs / "it"
        shutil.copytree(world, root, symlinks=True)
        old = state(root)
        ballast = tmpfs / "ballast"
        free = shutil.disk_usage(tmpfs).free
        ballast.write_bytes(b"\0" * max(0, free - room))
        result = run(root, *words, cache=tmp_path)  # stdout and stderr are on another disk
        assert result.status in (0, 1), result.err
        assert old_or_new(state(root), old, new)
        ballast.unlink()
        if result.status:
            assert result.line
            if state(root) != new:
                go_on(words, root)
        assert state(root) == new
        assert litter(root) == []
        shutil.rmtree(root)
        shutil.rmtree(tmpfs / "processes", ignore_errors=True)


def test_low_disk_space_refused_before_training(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_io, "free_space", lambda place: 1_000)
    with pytest.raises(
        TrainingError, match="runs has 0 MB free, and the run needs 0 MB: free some space, or choose"
    ):
        train(settings())
    assert not list((tmp_path / "runs").iterdir())
    assert not (tmp_path / "adapters").exists()


# Read-only folders, and files in place of folders


def powerless() -> None:
    """Drop the capabilities by which root ignores the modes of files."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    data = ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    sets = list(struct.unpack("6I", data.raw))
    may_override = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    for index in range(3):
        sets[index] &= ~may_override
    assert libc.capset(header, ctypes.create_string_buffer(struct.pack("6I", *sets))) == 0


@pytest.fixture
def closed(world: Path, tmp_path: Path) -> Iterator[Path]:
    """A workspace whose folders tests make read-only; writable again at the end, so that it can be deleted."""
    root = tmp_path / "it"
    shutil.copytree(world, root, symlinks=True)
    (root / "runs").mkdir()
    (root / "cache").mkdir()
    (root / "out").mkdir()
    yield root
    for path in [root, *root.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)


READ_ONLY_PLACES = {
    "train": "adapters",
    "train over another": "runs",
    "sweep": "adapters",
    "sweep over another": "runs",
    "blend": "adapters",
    "blend over another": "adapters",
    "compress": "adapters",
    "adopt": "adapters",
    "rename": "adapters",
    "remove": "adapters",
    "merge": ".",
    "merge over another": ".",
    "export": ".",
}


@pytest.mark.parametrize("name", sampled(READ_ONLY_PLACES, 3))
def test_read_only_place_refused_early(name: str, closed: Path, world: Path, gpt2: Path) -> None:
    (closed / READ_ONLY_PLACES[name]).chmod(0o555)
    before = contents(closed)
    result = run(closed, *arguments(name, world, gpt2), before=powerless)
    assert result.status == 1
    assert READ_ONLY in result.line
    assert result.err.count("\n") == 1  # nothing was loaded or measured before
    assert contents(closed) == before


@pytest.mark.parametrize(
    "name",
    [
        "adopt in place",
        "train",
        *(pytest.param(it, marks=pytest.mark.slow) for it in ("blend", "compress", "merge", "export")),
    ],
)
def test_read_only_cache_still_works(
    name: str, closed: Path, expected, world: Path, gpt2: Path, tmp_path: Path
) -> None:
    words = arguments(name, world, gpt2)
    (closed / "cache").chmod(0o555)
    assert run(closed, *words, before=powerless).status == 0
    assert state(closed) == expected(name)[0]


@pytest.mark.parametrize("name", sampled(COMMANDS, 4))
def test_output_folder_is_file(name: str, closed: Path, world: Path, gpt2: Path) -> None:
    place = "merged" if name == "merge" else "adapters"
    if (closed / place).is_dir():
        shutil.rmtree(closed / place)
    (closed / place).write_text("a file")
    before = contents(closed)
    result = run(closed, *arguments(name, world, gpt2))
    assert result.status in (1, 2)
    assert f"{place} is not a folder" in result.line or f"dir '{place}' is a file" in result.line
    assert contents(closed) == before


def becomes_a_file(place: Path) -> None:
    """Put a file in place of the adapters folder while the first checkpoint is written."""
    save = trainer.LoraTrainer._save_checkpoint

    def spoil(self, model, trial):
        save(self, model, trial)
        if place.is_dir():
            shutil.rmtree(place)
            place.write_text("a file")

    trainer.LoraTrainer._save_checkpoint = spoil  # type: ignore[method-assign]


def test_folder_becomes_file_while_training(
    closed: Path, expected, world: Path, gpt2: Path, tmp_path: Path
) -> None:
    words = arguments("train", world, gpt2)
    result = run(closed, *words, before=partial(becomes_a_file, closed / "adapters"))
    assert result.status == 1
    assert "adapters is not a folder" in result.line or "adapters: " in result.line
    assert "train --resume new" in result.line
    (closed / "adapters").unlink()
    assert run(closed, "train", "--resume", "new").status == 0
    assert state(closed)["new"] == expected("train")[0]["new"]
