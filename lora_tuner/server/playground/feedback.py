"""Thumbs on answers, stored in `runs_dir/feedback.jsonl`: a row for each pair or lone thumb."""

import json
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from ... import atomic_io
from ...errors import DataError, os_error_message
from ...text import format_bytes
from .conversation import Row

FILE = "feedback.jsonl"
MAX_BYTES = 20_000_000
LOCK_SECONDS = 10.0


def save(folder: Path, turn: str, rows: Sequence[Row]) -> None:
    """Replace the rows of a turn, whose id they have. Other lines stay as they are.

    Raises:
        DataError: the file has reached its limit, is locked, or cannot be written.
    """
    path, mark = folder / FILE, json.dumps({"id": turn})[1:-1].encode()
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{FILE}.lock", timeout=LOCK_SECONDS):
            before = path.read_bytes().splitlines() if path.exists() else []
            # In texts the quotes are escaped, so only the field is found.
            kept = [line for line in before if line and mark not in line]
            data = b"".join(line + b"\n" for line in [*kept, *lines])
            if rows and len(data) > MAX_BYTES:
                raise DataError(f"{FILE} has reached {format_bytes(MAX_BYTES)}: move it elsewhere to store more.")
            with atomic_io.atomic_file(path) as work:
                work.write_bytes(data)
    except OSError as error:  # Timeout is one
        raise DataError(f"{FILE} cannot be written: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return "another process has locked it." if isinstance(error, Timeout) else os_error_message(error)
