"""An adapter as a zip archive, streamed to others. Never imports torch."""

import io
import os
import stat
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from .adapter import WEIGHTS_FILE, Adapter
from .hub_sync import SYNCED_FILES, copy_public

_CHUNK = 1 << 18


def open_public_files(adapter: Adapter) -> list[tuple[str, BinaryIO]]:
    """Open the files of an adapter that others may have, with their names in an archive.

    They stay as they are when the adapter is removed or replaced. Links are not followed, but for
    config and weights, which were checked. Price: all but the weights are in memory.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_public(adapter, folder, [name for name in SYNCED_FILES if name != WEIGHTS_FILE])
        files: list[tuple[str, BinaryIO]] = [
            (f"{adapter.name}/{path.name}", io.BytesIO(path.read_bytes())) for path in sorted(folder.iterdir())
        ]
    return [*files, (f"{adapter.name}/{WEIGHTS_FILE}", (adapter.path / WEIGHTS_FILE).open("rb"))]


def stream_zip(files: Sequence[tuple[str, BinaryIO]]) -> Iterator[bytes]:
    """Yield an archive of open files in parts, not compressed; close the files at the end."""
    parts = _Parts()
    try:
        with zipfile.ZipFile(parts, "w") as archive:
            for name, file in files:
                entry = zipfile.ZipInfo(name, time.localtime()[:6])
                entry.external_attr = (stat.S_IFREG | 0o644) << 16
                entry.file_size = file.seek(0, os.SEEK_END)  # a large one needs another format
                file.seek(0)
                with archive.open(entry, "w") as target:
                    while chunk := file.read(_CHUNK):
                        target.write(chunk)
                        yield parts.take()
        yield parts.take()
    finally:
        for _, file in files:
            file.close()


class _Parts(io.RawIOBase):
    """A file that is written to and read at the same time, and cannot seek."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.data += data
        return len(data)

    def take(self) -> bytes:
        data = bytes(self.data)
        self.data.clear()
        return data
