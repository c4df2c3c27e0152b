"""Safe writing: a folder or file appears whole or not at all, and survives a power cut once it has appeared.

Surprise: a rename cannot replace a folder that is not empty, so replacing one takes two renames. In the moment between
them the old folder waits as `.NAME.old`; whoever next lists or writes puts it back (`recover`).
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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


def safetensors_header(path: Path) -> tuple[dict[str, tuple[str, list[int], int, int]], int]:
    """What a safetensors file says of itself, read without its tensors: name -> (dtype, shape, begin, end), and where the
    tensors start. Offsets are in bytes from that start, and lie inside the file.

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
    for name, (_, _, begin, end) in entries.items():
        if not 0 <= begin <= end <= total - start:
            raise ValueError(f"it is cut off: {name} ends beyond the file")
    return entries, start


def _tensor_entry(entry: Any) -> tuple[str, list[int], int, int]:
    begin, end = entry["data_offsets"]
    return str(entry["dtype"]), [int(length) for length in entry["shape"]], int(begin), int(end)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; at the end it is synced and renamed to `target`, replacing what is there.

    When the block raises, the sibling is removed and `target` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    old = target.with_name(f".{target.name}.old")
    try:
        yield work
        for path in sorted(work.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only the owner can read
            _sync(path)
        work.chmod(0o755)
        _sync(work)
        recover(target.parent)
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(work, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def recover(parent: Path) -> None:
    """Finish what a replacement that was cut off between its two renames has left: the old folder comes back."""
    for old in parent.glob(".*.old"):
        target = parent / old.name[1 : -len(".old")]
        if target.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, target)
