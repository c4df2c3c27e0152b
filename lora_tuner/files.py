"""Safe writing: a folder or file appears whole or not at all, and survives a power cut once it has appeared.

Surprise: a rename cannot replace a folder that is not empty, so replacing one takes two renames. In the moment between
them the old folder waits as `.NAME.lora_tuner-old`; whoever next lists, reads or writes puts it back (`recover`).
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OLD = ".lora_tuner-old"  # no ending that anyone else gives to a folder of theirs
DATA_FILES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet")
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
    with path.open("rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else total
        if size > min(total - 8, 100_000_000):
            raise ValueError("it is cut off, or no safetensors file")
        try:
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            entries = {name: _tensor_entry(entry) for name, entry in header.items()}
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


def _tensor_entry(entry: Any) -> tuple[str, list[int], int, int]:
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("a size is no whole number")
    return str(entry["dtype"]), list(shape), begin, end


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot sync a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
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
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    work = Path(temporary)
    try:
        yield work
        work.chmod(0o644)  # mkstemp's are for their owner alone
        _sync(work)
        os.replace(work, target)
        _sync(target.parent)
    finally:
        work.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; at the end it is synced and renamed to `target`, replacing what is there.

    When the block raises, the sibling is removed and `target` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    old = target.with_name(f".{target.name}{_OLD}")
    try:
        yield work
        for path in sorted(work.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only the owner can read
            _sync(path)
        work.chmod(0o755)
        _sync(work)
        recover(target.parent)
        if os.path.lexists(target):
            os.rename(target, old)
        try:
            os.rename(work, target)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, target)
            raise
        _sync(target.parent)
        remove(old)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def recover(parent: Path) -> None:
    """Finish what a replacement that was cut off between its two renames has left: the old folder comes back."""
    for old in parent.glob(f".*{_OLD}"):
        target = parent / old.name[1 : -len(_OLD)]
        if os.path.lexists(target):
            remove(old)
        else:
            with contextlib.suppress(OSError):  # another process was faster, or nobody may write here
                os.rename(old, target)


def remove(path: Path) -> None:
    """Remove a folder or, where it was a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
