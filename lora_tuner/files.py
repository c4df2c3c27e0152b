"""Safe writing: a folder or file appears whole or not at all, and survives a power cut once it has appeared.

What is being written lies beside its place as `.NAME.*.lora_tuner-new`, locked; what a process that was killed has left has
no lock any more, and the next writer there removes it (`sweep`). Surprise: a rename cannot replace a folder that is not
empty. Linux and macOS swap two names in one step; elsewhere it takes two renames, and in the moment between them the old
folder waits as `.NAME.lora_tuner-old`: whoever next lists, reads or writes puts it back (`recover`).
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl

_OLD, WORK = ".lora_tuner-old", ".lora_tuner-new"  # no ending that anyone else gives to a folder of theirs
_ABANDONED = 24 * 3600.0  # seconds, where there are no locks
DATA_FILES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet")
LFS = b"version https://git-lfs"  # so begins what lies in a clone where git-lfs has not fetched the file
_HEADER = 5_000_000  # bytes: 15,000 adapted layers; in memory it can become thirty times as much
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "U8": 1, "BOOL": 1}


def cache_dir() -> Path:
    """The user's cache folder of this tool (`LORA_TUNER_CACHE`, else XDG's or the system's place)."""
    if own := os.environ.get("LORA_TUNER_CACHE"):
        return Path(own)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "lora_tuner" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_tuner"


def shown(name: str) -> str:
    """A name for strangers: of a path on this machine, its last part. Of `a + b` each by itself."""

    def last(part: str) -> str:
        path = Path(os.path.expanduser(part))
        # An id on the Hub has two parts at the most, and begins with no dot: what looks otherwise was a path once.
        local = path.is_absolute() or len(path.parts) > 2 or part.startswith((".", "~")) or os.path.exists(path)
        return os.path.basename(os.path.abspath(path)) if part and (local or path.suffix in DATA_FILES) else part

    return " + ".join(last(part) for part in name.split(" + "))


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safetensors_header(path: Path) -> tuple[dict[str, tuple[str, list[int], int, int]], int]:
    """What a safetensors file says of itself, read without its tensors: name -> (dtype, shape, begin, end), and where the
    tensors start. Offsets are in bytes from that start; the tensors fill the file, and each is as large as its shape says.

    Raises ValueError for anything that is no whole safetensors file.
    """
    total = path.stat().st_size
    if not path.is_file():  # a pipe would never end
        raise ValueError("it is no file")
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix == LFS[:8] and file.read(len(LFS) - 8) == LFS[8:]:
            raise ValueError("it is a pointer of Git LFS, and `git lfs pull` fetches the file")
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else total
        if size > total - 8:
            raise ValueError("it is cut off, or no safetensors file")
        if size > _HEADER:
            raise ValueError(f"its header has {size:,} bytes, and {_HEADER:,} are read")
        try:
            entries = _tensor_entries(file.read(size))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("its header is no safetensors header") from error
    start = 8 + size
    filled = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if end > total - start:
            raise ValueError(f"it is cut off: {name} ends beyond the file")
        if begin != filled or (dtype in _BYTES and end - begin != math.prod(shape) * _BYTES[dtype]):
            raise ValueError(f"its header is wrong about {name}")
        filled = end
    if filled != total - start:
        raise ValueError("it holds more than its header says")
    return entries, start


def _tensor_entries(data: bytes) -> dict[str, tuple[str, list[int], int, int]]:
    """As strict as safetensors, which loads the file later: JSON in UTF-8, each name once, text alone as metadata."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is given twice")
        return found

    if not data.startswith(b"{"):
        raise ValueError("it is no JSON object")
    header = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    for key, value in (header.pop("__metadata__", None) or {}).items():
        f"{key}{value + ''}".encode()  # half a character is none
    return {name: _tensor_entry(entry) for name, entry in header.items()}


def _tensor_entry(entry: Any) -> tuple[str, list[int], int, int]:
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (begin, end, *shape)):
        raise ValueError("a size is no whole number")
    return str(entry["dtype"]), list(shape), begin, end


def _nearest(place: Path) -> Path:
    """The place itself or, where it is not there yet, what it will be made in."""
    places = (place.absolute(), *place.absolute().parents)
    return next((it for it in places if os.path.lexists(it)), places[-1])  # of a drive that is not there the drive


def free_space(place: Path) -> int:
    """Bytes that can be written there."""
    return shutil.disk_usage(_nearest(place)).free


def unwritable(folder: Path) -> str | None:
    """Why nothing can be put into a folder, which need not be there yet; None where it can."""
    there = _nearest(folder)
    if not there.is_dir():
        return f"{there} is no folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written to"


def sync(path: Path) -> None:
    """Have the disk keep a file, or what is in a folder under which name, before anything else is done."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot sync a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
        if sys.platform == "darwin":  # where fsync leaves it to the drive
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; its folder is made where it is missing."""
    with new_file(path) as work:
        work.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield an empty sibling file to fill; at the end it is synced and renamed to `target`, replacing what is there.

    When the block raises, the sibling is removed and `target` is as it was. Its folder is made where it is missing.
    """
    with _sibling(target, _empty_file) as work:
        yield work
        work.chmod(0o644)  # mkstemp's are for their owner alone
        sync(work)
        os.replace(work, target)
        sync(target.parent)


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; at the end it is synced and becomes `target`, replacing what is there.

    When the block raises, the sibling is removed and `target` is as it was. Without `overwrite`, a folder that is there by
    then raises OSError.
    """
    with _sibling(target, tempfile.mkdtemp) as work:
        yield work
        for path in sorted(work.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only the owner can read
            sync(path)
        work.chmod(0o755)
        sync(work)
        recover(target.parent)
        if not (overwrite and os.path.lexists(target)):
            os.rename(work, target)
        elif not _exchange(work, target):
            _replace(work, target)
        sync(target.parent)


def as_os_error(error: Exception, path: Path) -> OSError:
    """What torch and safetensors say in words of their own when a file cannot be written."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number) if found else " ".join(str(error).split())[:200], str(path))


def _empty_file(**place: Any) -> str:
    descriptor, path = tempfile.mkstemp(**place)
    os.close(descriptor)
    return str(path)


@contextlib.contextmanager
def _sibling(target: Path, make: Callable[..., str]) -> Iterator[Path]:
    """A new file or folder beside `target`, held by a lock for as long as this process works on it, and then gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    while True:
        work = Path(make(prefix=f".{target.name}.", suffix=WORK, dir=target.parent))
        with _locked(work) as held:
            if held is False or not os.path.lexists(work):
                continue  # in the moment before the lock another process took it for one that was left
            try:
                yield work
            except Exception as error:
                if type(error).__name__ == "SafetensorError":  # its writer's, for a full disk; importing it loads much
                    raise as_os_error(error, target) from error
                raise
            finally:
                remove(work)  # after an exchange this is what was there before
            return


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool | None]:
    """Hold a lock on a file or folder, which ends with the process, however that ends. Says whether it could be had: False
    where another process has it, None where there are no locks."""
    if sys.platform == "win32":  # which locks no folders
        yield None
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its other end
    try:
        held: bool | None = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:  # of a file system without locks
            held = None
        yield held
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, so that nobody ever sees neither; False where the system or the disk cannot."""
    if sys.platform == "win32":
        return False
    libc = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            return bool(libc.renamex_np(*names, 2) == 0)  # RENAME_SWAP
        return bool(libc.renameat2(-100, names[0], -100, names[1], 2) == 0)  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:
        return False


def _replace(work: Path, target: Path) -> None:
    """The same in two steps; `recover` finishes what is cut off between them."""
    old = target.with_name(f".{target.name}{_OLD}")
    for left in reversed(range(3)):
        os.rename(target, old)
        try:
            os.rename(work, target)
            break
        except OSError:
            if os.path.lexists(old):
                os.rename(old, target)
                raise
            if not left:  # each time somebody who read has put it back
                raise
    remove(old)


def recover(parent: Path) -> None:
    """Finish what a replacement that was cut off between its two renames has left: the old folder comes back."""
    for old in parent.glob(f".*{_OLD}"):
        target = parent / old.name[1 : -len(_OLD)]
        if os.path.lexists(target):
            remove(old)
        else:
            with contextlib.suppress(OSError):  # another process was faster, or nobody may write here
                os.rename(old, target)


def sweep(parent: Path) -> None:
    """Remove what processes that are no more have left half-written in a folder."""
    recover(parent)
    for left in parent.glob(f".*{WORK}"):
        with contextlib.suppress(OSError):  # another process was faster
            if left.is_symlink():
                remove(left)
            elif sys.platform == "win32":
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    remove(left)
            else:
                with _locked(left) as dead:
                    if dead:
                        remove(left)


def take_away(path: Path) -> None:
    """Delete a folder that others may be reading: it is gone from its name at once. Raises OSError where it cannot be."""
    gone = path.with_name(f".{path.name}.{os.getpid()}-{time.time_ns()}{WORK}")
    os.rename(path, gone)
    try:
        sync(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):  # whoever sweeps here helps
            gone.unlink() if gone.is_symlink() else _delete(gone)


def remove(path: Path) -> None:
    """Remove a folder or, where it was a link, the link alone, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        _delete(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _delete(folder: Path, *, ignore_errors: bool = False) -> None:
    """Delete a folder and all in it; who presses Ctrl-C meanwhile waits for that."""
    try:
        shutil.rmtree(folder, ignore_errors=ignore_errors)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise
