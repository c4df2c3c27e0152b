"""Atomic writes: a file or folder appears complete or not at all, and then survives a power failure.

Work in progress lies beside its target as `.NAME.*.lora_tuner-new`, with a lock. What a killed
process left behind has no lock, and the next writer in that folder deletes it (`remove_abandoned`).
Surprise: a rename cannot replace a folder that is not empty. Linux and macOS can exchange two names
in one step. Elsewhere two renames are needed; between them the old folder is named
`.NAME.lora_tuner-old`, and the next list, read or write restores it (`finish_replacement`).
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigError, EventHandler, Notice, ignore_events

if sys.platform != "win32":
    import fcntl

_OLD_SUFFIX, WORK_SUFFIX = ".lora_tuner-old", ".lora_tuner-new"  # no file of others has these
HASHES_FILE = "whole.json"  # in a folder: sha256 of each of its other files
_LONG_NAME = "x" * 120  # as long as what is written below a folder
_ABANDONED_SECONDS = 24 * 3600.0  # age at which work counts as abandoned where there are no locks


def cache_dir() -> Path:
    """Return the cache folder: `LORA_TUNER_CACHE`, else that of XDG or of the system.

    Raises:
        ConfigError: none is set, and this user has no home folder, as in some containers.
    """
    if folder := os.environ.get("LORA_TUNER_CACHE"):
        return Path(folder)
    variable, default = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    try:
        system_folder = Path(os.environ.get(variable) or Path.home() / default)
    except RuntimeError as error:
        raise ConfigError(
            "There is no place for the cache, because this user has no home folder: set HOME, or LORA_TUNER_CACHE."
        ) from error
    return system_folder / ("lora_tuner/cache" if os.name == "nt" else "lora_tuner")


def sha256_file(path: Path) -> str:
    """Compute the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_hashes(folder: Path) -> None:
    """Write the hash of each file in a folder."""
    hashes = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
    atomic_write_text(folder / HASHES_FILE, json.dumps(hashes, indent=2))


def matches_hashes(folder: Path) -> bool:
    """Return whether a folder has all files that `write_hashes` saw, unchanged."""
    try:
        hashes = json.loads((folder / HASHES_FILE).read_text(encoding="utf-8"))
        return all(sha256_file(folder / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def write_cache(path: Path, value: object) -> None:
    """Write a value that JSON has to a file of the cache, with its hash.

    Errors are ignored: without a cache the next call only takes longer.
    """
    digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    with contextlib.suppress(OSError):
        atomic_write_text(path, json.dumps({"sha256": digest, "value": value}))


def read_cache(path: Path, notify: EventHandler = ignore_events) -> Any:
    """Read what `write_cache` wrote; None if it is missing or, with a notice, damaged."""
    try:
        cached = json.loads(path.read_bytes())
        if hashlib.sha256(json.dumps(cached["value"]).encode()).hexdigest() == cached["sha256"]:
            return cached["value"]
    except OSError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    notify(Notice(f"{path} is damaged: what it held is made again."))
    return None


def _nearest_existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    candidates = (path.absolute(), *path.absolute().parents)
    # The last one is the root, which may be a drive that does not exist.
    return next((candidate for candidate in candidates if os.path.lexists(candidate)), candidates[-1])


def free_space(path: Path) -> int:
    """Return the free bytes of the disk that holds the path, or will hold it."""
    return shutil.disk_usage(_nearest_existing(path)).free


def why_not_writable(folder: Path) -> str | None:
    """Return the reason why a folder, which may not exist yet, is not writable; None if it is."""
    existing = _nearest_existing(folder)
    missing = folder.absolute().relative_to(existing).parts
    if any(is_too_long(path) for path in (folder / _LONG_NAME, *(existing / name for name in missing))):
        return f"{str(folder)[:100]}... is too long for a path"
    if not existing.is_dir():
        return f"{existing} is not a folder"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} is not writable"


def is_too_long(path: Path) -> bool:
    """Return whether the system refuses a path for its length, or that of a name in it."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def why_not_replaceable(path: Path) -> str | None:
    """Return the reason why no file or folder can be written, or replaced, at a path; None if one can."""
    if path.name in ("", ".."):
        return f"{path} does not end in a name"
    if os.path.ismount(path):
        return f"{path} is a mount point, so it is not replaced"
    if is_too_long(_nearest_existing(path.parent) / f".{path.name}.12345678{WORK_SUFFIX}"):
        return f"{path.name[:100]}... is too long for a name"
    return why_not_writable(path.parent)


def why_no_file(path: Path) -> str | None:
    """Return the reason why no file can be written at a path; None if one can."""
    return f"{path} is a folder" if path.is_dir() else why_not_replaceable(path)


def contains(folder: Path, path: Path) -> bool:
    """Return whether a path is this folder, or lies in it. Links are followed; nothing need exist."""
    # Unlike Path.resolve, it takes loops of links.
    folder, path = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    return any(_is_same(folder, parent) for parent in (path, *path.parents))


def _is_same(one: Path, other: Path) -> bool:
    """Return whether two resolved paths are one place, once it exists."""
    if one == other:
        return True
    # Not by name: disks may ignore case, and mounts have two names.
    existing, other_existing = _nearest_existing(one), _nearest_existing(other)
    if not all(map(os.path.exists, (existing, other_existing))) or not existing.samefile(other_existing):
        return False
    name, other_name = (
        unicodedata.normalize("NFC", str(path.relative_to(parent)))
        for path, parent in ((one, existing), (other, other_existing))
    )
    return name == other_name or (name.casefold() == other_name.casefold() and _ignores_case(existing))


def _ignores_case(folder: Path) -> bool:
    """Return whether a folder takes names that differ in case as one; tried with a temporary file."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".case-", suffix=WORK_SUFFIX) as file:
            return Path(file.name).with_name(Path(file.name).name.swapcase()).exists()
    except OSError:  # nothing can be written there
        return False


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot sync a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
        if sys.platform == "darwin":  # there fsync does not flush the cache of the drive
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Missing parent folders are created."""
    with atomic_file(path) as work:
        work.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield an empty sibling file to fill; at the end it is synced and replaces `target`.

    When the block raises, the sibling is deleted and `target` is unchanged. Missing parent folders
    are created.
    """
    with _working_sibling(target, _create_file) as work:
        mode = work.stat().st_mode
        yield work
        work.chmod(mode)  # what has filled it may have changed that
        fsync_path(work)
        os.replace(work, target)
        fsync_path(target.parent)


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; at the end it is synced and replaces `target`.

    When the block raises, the sibling is deleted and `target` is unchanged.

    Raises:
        OSError: `target` exists at the end, and `overwrite` is False.
    """
    with _working_sibling(target, Path.mkdir) as work:
        mode = work.stat().st_mode
        yield work
        for path in sorted(work.rglob("*")):
            # safetensors' files are for the owner alone.
            path.chmod(mode if path.is_dir() else mode & 0o666)
            fsync_path(path)
        fsync_path(work)
        finish_replacement(target.parent)
        if not (overwrite and os.path.lexists(target)):
            os.rename(work, target)
        elif not _swap_names(work, target):
            _replace_in_two_renames(work, target)
        fsync_path(target.parent)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder in `parent`, deleted at the end, or by the next writer after a crash."""
    with _working_sibling(parent / "temporary", Path.mkdir) as work:
        yield work


def as_os_error(error: Exception, path: Path) -> OSError:
    """Convert an exception of torch or safetensors about a failed write to an OSError."""
    match = re.search(r"os error (\d+)", str(error))
    number = int(match[1]) if match else errno.EIO
    return OSError(number, os.strerror(number) if match else " ".join(str(error).split())[:200], str(path))


def _create_file(path: Path) -> None:
    path.open("x").close()


@contextlib.contextmanager
def _working_sibling(target: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Create a file or folder beside `target`, lock it during the block, and delete it at the end.

    Its mode is that of the user's umask.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent)
    while True:
        work = target.with_name(f".{target.name}.{secrets.token_hex(4)}{WORK_SUFFIX}")
        try:
            create(work)
        except FileExistsError:
            continue
        with _file_lock(work) as held:
            if held is False or not os.path.lexists(work):
                continue  # before it was locked, another process took it for abandoned
            try:
                yield work
            except Exception as error:
                # E.g. a full disk; its module is slow to import.
                if type(error).__name__ == "SafetensorError":
                    raise as_os_error(error, target) from error
                raise
            finally:
                delete(work)  # after an exchange of names this is the old content
            return


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[bool | None]:
    """Lock a file or folder until the block or the process ends.

    Yields True, False if another process has the lock, or None where locks are not supported.
    """
    if sys.platform == "win32":  # it cannot lock folders
        yield None
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would block
    except FileNotFoundError:  # another process deleted it in this moment
        yield False
        return
    try:
        held: bool | None = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:  # a file system without locks
            held = None
        yield held
    finally:
        os.close(descriptor)


def _swap_names(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False if the system or the file system cannot."""
    if sys.platform == "win32":
        return False
    libc = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            return bool(libc.renamex_np(*names, 2) == 0)  # RENAME_SWAP
        # AT_FDCWD, RENAME_EXCHANGE.
        return bool(libc.renameat2(-100, names[0], -100, names[1], 2) == 0)
    except AttributeError:
        return False


def _replace_in_two_renames(work: Path, target: Path) -> None:
    """Replace a folder; `finish_replacement` completes it after a crash between the two renames."""
    old = target.with_name(f".{target.name}{_OLD_SUFFIX}")
    for attempts_left in reversed(range(3)):
        os.rename(target, old)
        try:
            os.rename(work, target)
            break
        except OSError:
            if os.path.lexists(old):
                os.rename(old, target)
                raise
            if not attempts_left:  # in each attempt a reader restored the old folder
                raise
    delete(old)


def finish_replacement(parent: Path) -> None:
    """Restore or delete old folders that an interrupted replacement left in `parent`."""
    for old in parent.glob(f".*{_OLD_SUFFIX}"):
        target = parent / old.name[1 : -len(_OLD_SUFFIX)]
        if os.path.lexists(target):
            delete(old)
        else:
            with contextlib.suppress(OSError):  # another process did it, or the folder is read-only
                os.rename(old, target)


def remove_abandoned(parent: Path) -> None:
    """Delete the unfinished work of ended processes in a folder."""
    finish_replacement(parent)
    for work in parent.glob(f".*{WORK_SUFFIX}"):
        with contextlib.suppress(OSError):  # another process deleted it
            if work.is_symlink() or (os.name == "nt" and time.time() - work.stat().st_mtime > _ABANDONED_SECONDS):
                delete(work)
            else:
                with _file_lock(work) as held:  # None on Windows
                    if held:
                        delete(work)


def delete_atomically(path: Path) -> None:
    """Delete a folder that others may be reading: it is renamed first.

    Raises:
        OSError: it cannot be deleted.
    """
    renamed = path.with_name(f".{path.name}.{os.getpid()}-{time.time_ns()}{WORK_SUFFIX}")
    os.rename(path, renamed)
    try:
        fsync_path(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):  # another process may delete it as abandoned
            renamed.unlink() if renamed.is_symlink() else _delete_folder(renamed)


def delete(path: Path) -> None:
    """Delete a file, a folder or a link (not its target); errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        _delete_folder(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _delete_folder(folder: Path, *, ignore_errors: bool = False) -> None:
    """Delete a folder. Ctrl-C takes effect after it is deleted."""
    try:
        shutil.rmtree(folder, ignore_errors=ignore_errors)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise
