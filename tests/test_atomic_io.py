import contextlib
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from lora_tuner import atomic_io, text
from lora_tuner.adapters import safetensors_header
from lora_tuner.cli.app import app
from lora_tuner.errors import ConfigError

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


def content(folder):
    """Return relative path -> text for everything under a folder; None for folders."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_text()
        for path in sorted(folder.rglob("*"))
    }


def raise_after_writing(work, error):
    (work / "new").write_text("new")
    raise error


# atomic_folder


def test_atomic_folder_appears_complete(tmp_path):
    with atomic_io.atomic_folder(tmp_path / "deep" / "new") as work:
        (work / "sub").mkdir()
        (work / "sub" / "a").write_text("1")
        assert not (tmp_path / "deep" / "new").exists()
        assert work.parent == tmp_path / "deep"  # on the same disk, so that a rename is enough
    assert content(tmp_path) == {"deep": None, "deep/new": None, "deep/new/sub": None, "deep/new/sub/a": "1"}


def test_atomic_folder_replaces_old_folder(tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "old").write_text("old")
    with atomic_io.atomic_folder(tmp_path / "it") as work:
        (work / "new").write_text("new")
        assert (tmp_path / "it" / "old").read_text() == "old"
    assert content(tmp_path) == {"it": None, "it/new": "new"}


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [{}, {"it": None, "it/old": "old"}])
def test_atomic_folder_error_changes_nothing(tmp_path, kind, before):
    if before:
        (tmp_path / "it").mkdir()
        (tmp_path / "it" / "old").write_text("old")
    with pytest.raises(kind), atomic_io.atomic_folder(tmp_path / "it") as work:
        raise_after_writing(work, kind)
    assert content(tmp_path) == before


@pytest.fixture
def no_swap(monkeypatch):
    """Simulate Windows and file systems that cannot exchange two names in one step."""
    monkeypatch.setattr(atomic_io, "_swap_names", lambda one, other: False)


@pytest.mark.usefixtures("no_swap")
def test_two_renames_replace_folder(tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "old").write_text("old")
    with atomic_io.atomic_folder(tmp_path / "it") as work:
        (work / "new").write_text("new")
    assert content(tmp_path) == {"it": None, "it/new": "new"}


@pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin")), reason="the system cannot swap names")
def test_swap_never_removes_folder(tmp_path, monkeypatch):
    (tmp_path / "it").mkdir()
    monkeypatch.setattr(os, "rename", None)  # no rename is used, so `it` always exists
    with atomic_io.atomic_folder(tmp_path / "it") as work:
        (work / "new").write_text("new")
    assert content(tmp_path) == {"it": None, "it/new": "new"}


def test_concurrent_folder_kept_without_overwrite(tmp_path):
    with pytest.raises(OSError, match="it"), atomic_io.atomic_folder(tmp_path / "it", overwrite=False):
        atomic_io.atomic_write_text(tmp_path / "it" / "other", "1")
    assert content(tmp_path) == {"it": None, "it/other": "1"}


@pytest.mark.usefixtures("no_swap")
def test_reader_between_renames_keeps_new_folder(tmp_path, monkeypatch):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "old").write_text("old")
    rename, read = os.rename, []

    def read_between(source, target):
        rename(source, target)
        if str(target).endswith(".lora_tuner-old") and not read:
            read.append(target)
            atomic_io.finish_replacement(tmp_path)

    monkeypatch.setattr(os, "rename", read_between)
    with atomic_io.atomic_folder(tmp_path / "it") as work:
        (work / "new").write_text("new")
    assert content(tmp_path) == {"it": None, "it/new": "new"}


@pytest.mark.usefixtures("no_swap")
def test_failed_rename_restores_old_folder(tmp_path, monkeypatch):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "old").write_text("old")
    rename = os.rename

    def fail_once(source, target):
        if str(source).endswith(".lora_tuner-new"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="no"), atomic_io.atomic_folder(tmp_path / "it") as work:
        (work / "new").write_text("new")
    assert content(tmp_path) == {"it": None, "it/old": "old"}


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o027], ids=oct)
def umask(request):
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


def test_written_files_keep_the_umask(tmp_path, umask):
    with atomic_io.atomic_folder(tmp_path / "it") as work:
        (work / "weights").write_text("")
        (work / "weights").chmod(0o600)  # as safetensors leaves its files
        (work / "sub").mkdir(0o700)
    atomic_io.atomic_write_text(tmp_path / "new" / "rows.json", "[]")
    with atomic_io.atomic_file(tmp_path / "plot.png") as work:
        work.unlink()
        work.touch(0o600)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in content(tmp_path)}
    folders = dict.fromkeys(("it", "it/sub", "new"), 0o777 & ~umask)
    assert modes == folders | dict.fromkeys(("it/weights", "new/rows.json", "plot.png"), 0o666 & ~umask)


def test_folder_of_a_group_keeps_it(tmp_path):
    tmp_path.chmod(0o2775)
    with atomic_io.atomic_folder(tmp_path / "it"):
        pass
    assert (tmp_path / "it").stat().st_mode & 0o2000


def test_atomic_folder_syncs_before_rename(tmp_path, monkeypatch):
    synced, sync = [], atomic_io.fsync_path
    monkeypatch.setattr(atomic_io, "fsync_path", lambda path: (synced.append(path), sync(path)))
    with atomic_io.atomic_folder(tmp_path / "it") as work:
        (work / "sub").mkdir()
        (work / "sub" / "a").write_text("1")
    assert synced == [work / "sub", work / "sub" / "a", work, tmp_path]


def test_atomic_folder_replaces_link_only(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("1")
    (tmp_path / "it").symlink_to(tmp_path / "elsewhere")
    with atomic_io.atomic_folder(tmp_path / "it") as work:
        (work / "new").write_text("new")
    assert not (tmp_path / "it").is_symlink()
    assert content(tmp_path) == {"elsewhere": None, "elsewhere/a": "1", "it": None, "it/new": "new"}


# finish_replacement


@pytest.fixture
def cut_off(tmp_path, monkeypatch, no_swap):
    """Kill a replacement between its two renames: `it` is missing, and its content has another name."""
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "old").write_text("old")
    with monkeypatch.context() as patch:
        rename = os.rename

        def only_the_first(source, target):
            if str(source).endswith(".lora_tuner-new"):
                raise SystemExit
            rename(source, target)

        patch.setattr(os, "rename", only_the_first)
        with pytest.raises(SystemExit), atomic_io.atomic_folder(tmp_path / "it"):
            pass
    assert not (tmp_path / "it").exists()
    return tmp_path


def test_finish_replacement_restores_old_folder(cut_off):
    atomic_io.finish_replacement(cut_off)
    assert content(cut_off) == {"it": None, "it/old": "old"}
    atomic_io.finish_replacement(cut_off)
    assert content(cut_off) == {"it": None, "it/old": "old"}


def test_finish_replacement_deletes_replaced_folder(cut_off):
    (cut_off / "it").mkdir()
    (cut_off / "it" / "new").write_text("new")
    atomic_io.finish_replacement(cut_off)
    assert content(cut_off) == {"it": None, "it/new": "new"}


def test_next_writer_finishes_replacement(cut_off):
    with atomic_io.atomic_folder(cut_off / "other"):
        pass
    assert content(cut_off) == {"it": None, "it/old": "old", "other": None}


def test_finish_replacement_keeps_other_files(tmp_path):
    for name in (".config.old", "config", ".lost.old", ".it.abc.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    before = content(tmp_path)
    atomic_io.finish_replacement(tmp_path)
    assert content(tmp_path) == before


def test_finish_replacement_missing_folder(tmp_path):
    atomic_io.finish_replacement(tmp_path / "none")
    assert content(tmp_path) == {}


# contains, why_not_replaceable


@pytest.mark.parametrize(
    ("folder", "path", "ignores_case", "expected"),
    [
        ("a", "a", False, True),
        ("a", "a/b/c", False, True),
        ("a/b", "a", False, False),
        ("missing/x", "link/x/y", False, True),
        ("Missing", "missing/y", False, False),
        ("Missing", "missing/y", True, True),
        ("e\u0301", "\u00e9", False, True),
        ("loop", "a", False, False),
    ],
)
def test_contains_compares_places(tmp_path, monkeypatch, folder, path, ignores_case, expected):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("missing")
    (tmp_path / "loop").symlink_to("loop")
    assert atomic_io._ignores_case(tmp_path) is False
    monkeypatch.setattr(atomic_io, "_ignores_case", lambda folder: ignores_case)
    assert atomic_io.contains(tmp_path / folder, tmp_path / path) is expected


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (".", "does not end in a name"),
        ("a/..", "does not end in a name"),
        ("a/" + "x" * 240, "is too long for a name"),
        ("x" * 300 + "/a", "is too long for a path"),
        ("file/a", "file is not a folder"),
        ("/proc", "is a mount point, so it is not replaced"),
    ],
)
def test_unusable_path_is_named(tmp_path, monkeypatch, path, why):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("file").touch()
    assert why in atomic_io.why_not_replaceable(Path(path))


# remove_abandoned, delete_atomically


def abandoned_work(folder, killed_in):
    """Kill a process while it writes, and return the work that it leaves."""
    script = "import os; from pathlib import Path; from lora_tuner import atomic_io\n"
    script += f"with atomic_io.{killed_in}: os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script], cwd=folder, env=ENVIRONMENT).returncode == -9
    (work,) = folder.glob(".it.*")
    return work


@pytest.mark.parametrize("killed_in", ["atomic_folder(Path('it'))", "atomic_file(Path('it'))"])
def test_next_writer_removes_abandoned_work(tmp_path, killed_in):
    work = abandoned_work(tmp_path, killed_in)
    assert work.exists()
    atomic_io.atomic_write_text(tmp_path / "other", "text")
    assert content(tmp_path) == {"other": "text"}


def test_remove_abandoned_keeps_locked_work(tmp_path):
    with atomic_io.atomic_folder(tmp_path / "it") as work:
        atomic_io.atomic_write_text(tmp_path / "other", "text")
        script = "from pathlib import Path; from lora_tuner import atomic_io; atomic_io.remove_abandoned(Path())"
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=ENVIRONMENT, check=True)
        (work / "new").write_text("new")
    assert content(tmp_path) == {"it": None, "it/new": "new", "other": "text"}


def test_work_deleted_before_lock_is_recreated(tmp_path, monkeypatch):
    lock, locked_paths = atomic_io._file_lock, []

    @contextlib.contextmanager
    def delete_before_lock(path):
        locked_paths.append(path)
        with lock(path) as held:
            if len(locked_paths) == 1:
                path.rmdir()
            yield held

    monkeypatch.setattr(atomic_io, "_file_lock", delete_before_lock)
    with atomic_io.atomic_folder(tmp_path / "it") as work:
        (work / "new").write_text("new")
    assert len(locked_paths) == 2
    assert content(tmp_path) == {"it": None, "it/new": "new"}


def test_work_locked_by_other_is_recreated(tmp_path, monkeypatch):
    lock, locked_paths = atomic_io._file_lock, []

    @contextlib.contextmanager
    def lock_fails_once(path):
        locked_paths.append(path)
        with lock(path) as held:
            yield held and len(locked_paths) > 1  # the first one is locked by another process

    monkeypatch.setattr(atomic_io, "_file_lock", lock_fails_once)
    with atomic_io.atomic_folder(tmp_path / "it") as work:
        assert work == locked_paths[1]
    assert (tmp_path / "it").is_dir()


def test_delete_atomically_with_concurrent_removal(tmp_path, monkeypatch):
    (tmp_path / "it").mkdir()
    monkeypatch.setattr(atomic_io, "fsync_path", atomic_io.remove_abandoned)
    atomic_io.delete_atomically(tmp_path / "it")
    assert content(tmp_path) == {}


def test_delete_atomically_reports_failure(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError("not yours")

    (tmp_path / "it").mkdir()
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError, match="not yours"):
        atomic_io.delete_atomically(tmp_path / "it")
    assert not (tmp_path / "it").exists()


# atomic_write_text


def test_write_text_creates_parent_folder(tmp_path):
    atomic_io.atomic_write_text(tmp_path / "a" / "b.txt", "кино\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "кино\n".encode()
    atomic_io.atomic_write_text(tmp_path / "a" / "b.txt", "other")
    assert content(tmp_path) == {"a": None, "a/b.txt": "other"}


def test_write_text_error_keeps_old(tmp_path):
    atomic_io.atomic_write_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_io.atomic_write_text(tmp_path / "a", "x" * 100_000 + "\ud83d")
    assert content(tmp_path) == {"a": "old"}


def test_write_text_failed_replace_leaves_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="a"):
        atomic_io.atomic_write_text(tmp_path / "a", "text")
    assert content(tmp_path) == {"a": None}


def test_write_text_syncs_file_and_folder(tmp_path, monkeypatch):
    events, replace, sync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    atomic_io.atomic_write_text(tmp_path / "a", "text")
    assert events == ["sync", "replace", "sync"]


# safetensors_header


def written(path, header, payload=b""):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + payload)
    return path


def entry(begin, end, shape=None, dtype="F32"):
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def test_safetensors_header_of_real_file(tmp_path):
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.zeros((4, 0), np.float16),
        "c": np.int64(7),
    }
    tensors = {name: np.asarray(value) for name, value in tensors.items()}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header, start = safetensors_header.read_safetensors_header(path)
    raw = path.read_bytes()[start:]
    assert {name: (dtype, shape) for name, (dtype, shape, _, _) in header.items()} == {
        "a": ("F16", [4, 0]),
        "b": ("F32", [2, 3]),
        "c": ("I64", []),
    }
    for name, (_, _, begin, end) in header.items():
        assert raw[begin:end] == tensors[name].tobytes()


CUT = "it is cut off, or no safetensors file"
NO_HEADER = "its header is no safetensors header"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", CUT),
        (b"\x10\0\0", CUT),
        (struct.pack("<Q", 3), CUT),
        (struct.pack("<Q", 2**63) + b"{}", CUT),
        (struct.pack("<Q", 5_000_000_000) + b"{}" * 50, CUT),
        (b"<!DOCTYPE html><html></html>", CUT),
        (struct.pack("<Q", 2) + b"[]", NO_HEADER),
        (struct.pack("<Q", 2) + b"{x", NO_HEADER),
        (struct.pack("<Q", 2) + b"\xff\xff", NO_HEADER),
        (struct.pack("<Q", 4) + b"null", NO_HEADER),
    ],
)
def test_safetensors_header_invalid_file(tmp_path, data, why):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=f"^{why}$"):
        safetensors_header.read_safetensors_header(tmp_path / "x")


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"a": entry(0, 12)}, "it is cut off: a ends beyond the file"),
        ({"a": entry(0, 2**62)}, "it is cut off: a ends beyond the file"),
        ({"a": entry(0, 8, [2**40, 2**40])}, "its header is wrong about a"),
        ({"a": entry(0, 8, [3])}, "its header is wrong about a"),
        ({"a": entry(0, 8, dtype="F16")}, "its header is wrong about a"),
        ({"a": entry(0, 4), "b": entry(0, 8)}, "its header is wrong about b"),
        ({"a": entry(4, 8)}, "its header is wrong about a"),
        ({"a": entry(8, 4, [1])}, "its header is wrong about a"),
        ({"a": entry(0, 4)}, "it holds more than its header says"),
        ({}, "it holds more than its header says"),
        ({"a": entry(-8, 0)}, NO_HEADER),
        ({"a": entry(0, 8, [-2])}, NO_HEADER),
        ({"a": entry(0, 8, [2.0])}, NO_HEADER),
        ({"a": entry(0, 8, ["2"])}, NO_HEADER),
        ({"a": entry(0, 8, 2)}, NO_HEADER),
        ({"a": {"dtype": "F32", "shape": [2]}}, NO_HEADER),
        ({"a": {"shape": [2], "data_offsets": [0, 8]}}, NO_HEADER),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, NO_HEADER),
        ({"a": [1]}, NO_HEADER),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1e999]}}', NO_HEADER),
        (b'{"a":' * 20_000, NO_HEADER),
    ],
)
def test_safetensors_header_inconsistent(tmp_path, header, why):
    path = written(tmp_path / "x", header, b"\0" * 8)
    with pytest.raises(ValueError, match=f"^{why}$"):
        safetensors_header.read_safetensors_header(path)


def test_safetensors_header_truncated_file(tmp_path):
    save_file({"a": np.ones((3, 5), np.float32), "b": np.ones(7, np.float16)}, tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    safetensors_header.read_safetensors_header(tmp_path / "x")
    for length in range(len(content)):
        (tmp_path / "x").write_bytes(content[:length])
        with pytest.raises(ValueError, match="it is cut off"):
            safetensors_header.read_safetensors_header(tmp_path / "x")


def test_safetensors_header_unknown_dtype(tmp_path):
    path = written(tmp_path / "x", {"a": entry(0, 8, [16], "F4")}, b"\0" * 8)
    assert safetensors_header.read_safetensors_header(path)[0]["a"] == ("F4", [16], 0, 8)


# Hashes, cache folder, names


def test_sha256_file(tmp_path):
    (tmp_path / "x").write_bytes(b"text" * 100_000)
    assert atomic_io.sha256_file(tmp_path / "x") == hashlib.sha256(b"text" * 100_000).hexdigest()


def test_cache_dir_from_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "own"))
    assert atomic_io.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LORA_TUNER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if os.name != "nt":
        assert atomic_io.cache_dir() == tmp_path / "xdg" / "lora_tuner"


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("/home/me/reviews.csv", "reviews.csv"),
        ("~/films", "films"),
        ("../private/x.parquet", "x.parquet"),
        ("some/where/else", "else"),
        ("owner/reviews.jsonl", "reviews.jsonl"),
        ("stanfordnlp/imdb", "stanfordnlp/imdb"),
        ("imdb", "imdb"),
        ("imdb + /home/me/reviews.csv", "imdb + reviews.csv"),
        ("x" * 5000, "x" * 5000),
        ("", ""),
    ],
)
def test_display_name_hides_folders(name, last):
    assert text.display_name(name) == last


def test_sibling_deleted_before_lock_is_made_again(tmp_path, monkeypatch):
    mkdir, made = Path.mkdir, []

    def vanish_once(path):
        mkdir(path)
        made.append(path)
        if len(made) == 1:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", lambda path, **how: mkdir(path, **how) if how else vanish_once(path))
    with atomic_io.atomic_folder(tmp_path / "it") as work:
        (work / "new").write_text("new")
    assert len(made) == 2
    assert content(tmp_path) == {"it": None, "it/new": "new"}


@pytest.fixture
def homeless(monkeypatch):
    """Be a user without a home folder, as in a container that runs under a number."""
    for name in ("HOME", "LORA_TUNER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")


@pytest.mark.skipif(sys.platform == "win32", reason="home folders of POSIX")
def test_missing_home_is_named(homeless, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="no home folder: set HOME, or LORA_TUNER_CACHE"):
        atomic_io.cache_dir()
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["cache"].startswith("none. There is no place for the cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert atomic_io.cache_dir() == tmp_path / "lora_tuner"
