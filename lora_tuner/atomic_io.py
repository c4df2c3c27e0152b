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
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl

_OLD_SUFFIX, WORK_SUFFIX = (
    ".lora_tuner-old",
    ".lora_tuner-new",
)  # no ending that anyone else gives to a folder of theirs
_ABANDONED_SECONDS = 24 * 3600.0  # seconds, where there are no locks


def cache_dir() -> Path:
    """The user's cache folder of this tool (`LORA_TUNER_CACHE`, else XDG's or the system's place)."""
    if own := os.environ.get("LORA_TUNER_CACHE"):
        return Path(own)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "lora_tuner" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_tuner"


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _nearest_existing(place: Path) -> Path:
    """The place itself or, where it is not there yet, what it will be made in."""
    places = (place.absolute(), *place.absolute().parents)
    return next((it for it in places if os.path.lexists(it)), places[-1])  # of a drive that is not there the drive


def free_space(place: Path) -> int:
    """Bytes that can be written there."""
    return shutil.disk_usage(_nearest_existing(place)).free


def why_not_writable(folder: Path) -> str | None:
    """Why nothing can be put into a folder, which need not be there yet; None where it can."""
    there = _nearest_existing(folder)
    if not there.is_dir():
        return f"{there} is no folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written to"


def fsync_path(path: Path) -> None:
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


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; its folder is made where it is missing."""
    with atomic_file(path) as work:
        work.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield an empty sibling file to fill; at the end it is synced and renamed to `target`, replacing what is there.

    When the block raises, the sibling is removed and `target` is as it was. Its folder is made where it is missing.
    """
    with _working_sibling(target, _empty_file) as work:
        yield work
        work.chmod(0o644)  # mkstemp's are for their owner alone
        fsync_path(work)
        os.replace(work, target)
        fsync_path(target.parent)


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; at the end it is synced and becomes `target`, replacing what is there.

    When the block raises, the sibling is removed and `target` is as it was. Without `overwrite`, a folder that is there by
    then raises OSError.
    """
    with _working_sibling(target, tempfile.mkdtemp) as work:
        yield work
        for path in sorted(work.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only the owner can read
            fsync_path(path)
        work.chmod(0o755)
        fsync_path(work)
        finish_replacement(target.parent)
        if not (overwrite and os.path.lexists(target)):
            os.rename(work, target)
        elif not _swap_names(work, target):
            _replace_in_two_renames(work, target)
        fsync_path(target.parent)


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
def _working_sibling(target: Path, make: Callable[..., str]) -> Iterator[Path]:
    """A new file or folder beside `target`, held by a lock for as long as this process works on it, and then gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent)
    while True:
        work = Path(make(prefix=f".{target.name}.", suffix=WORK_SUFFIX, dir=target.parent))
        with _file_lock(work) as held:
            if held is False or not os.path.lexists(work):
                continue  # in the moment before the lock another process took it for one that was left
            try:
                yield work
            except Exception as error:
                if type(error).__name__ == "SafetensorError":  # its writer's, for a full disk; importing it loads much
                    raise as_os_error(error, target) from error
                raise
            finally:
                delete(work)  # after an exchange this is what was there before
            return


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[bool | None]:
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


def _swap_names(one: Path, other: Path) -> bool:
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


def _replace_in_two_renames(work: Path, target: Path) -> None:
    """The same in two steps; `recover` finishes what is cut off between them."""
    old = target.with_name(f".{target.name}{_OLD_SUFFIX}")
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
    delete(old)


def finish_replacement(parent: Path) -> None:
    """Finish what a replacement that was cut off between its two renames has left: the old folder comes back."""
    for old in parent.glob(f".*{_OLD_SUFFIX}"):
        target = parent / old.name[1 : -len(_OLD_SUFFIX)]
        if os.path.lexists(target):
            delete(old)
        else:
            with contextlib.suppress(OSError):  # another process was faster, or nobody may write here
                os.rename(old, target)


def remove_abandoned(parent: Path) -> None:
    """Remove what processes that are no more have left half-written in a folder."""
    finish_replacement(parent)
    for left in parent.glob(f".*{WORK_SUFFIX}"):
        with contextlib.suppress(OSError):  # another process was faster
            if left.is_symlink():
                delete(left)
            elif sys.platform == "win32":
                if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                    delete(left)
            else:
                with _file_lock(left) as dead:
                    if dead:
                        delete(left)


def delete_atomically(path: Path) -> None:
    """Delete a folder that others may be reading: it is gone from its name at once. Raises OSError where it cannot be."""
    gone = path.with_name(f".{path.name}.{os.getpid()}-{time.time_ns()}{WORK_SUFFIX}")
    os.rename(path, gone)
    try:
        fsync_path(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):  # whoever sweeps here helps
            gone.unlink() if gone.is_symlink() else _delete(gone)


def delete(path: Path) -> None:
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
