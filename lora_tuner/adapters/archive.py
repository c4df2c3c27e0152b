"""An adapter as a zip archive: streamed to others, or a stranger's unpacked. Never imports torch."""

import errno
import io
import os
import shutil
import stat
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO

from ..errors import AdapterError
from ..text import format_bytes, one_line, shorten
from .adapter import CARD_FILE, CONFIG_FILE, MANIFEST_FILE, TOKENIZER_FILES, WEIGHTS_FILE, Adapter
from .hub_sync import SYNCED_FILES, copy_public, max_bytes

UPLOADED_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, MANIFEST_FILE, *TOKENIZER_FILES)
MAX_WEIGHTS_BYTES = 500_000_000
MAX_FILES = 1000  # in an archive
_CHUNK = 1 << 18
_MAX_READ = 1 << 20  # of an archive at once; its list of files is read as a whole


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


def unpack(archive: Path, folder: Path) -> list[str]:
    """Write the files of the adapter in a stranger's archive into a folder; return the others' names.

    Nothing but `UPLOADED_FILES` is written, under these names, each of limited size.

    Raises:
        AdapterError: it is no zip archive or damaged, has links or paths out of its folder, files
            that are too large, or not exactly one adapter.
    """
    try:
        with _SmallReads(archive) as file, zipfile.ZipFile(file) as opened:
            entries = [entry for entry in opened.infolist() if not entry.is_dir()]
            chosen = _choose(archive.name, entries)
            for name, entry in chosen.items():
                with opened.open(entry) as source, (folder / name).open("xb") as target:
                    _copy(source, target, entry)
    except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError, ValueError) as error:
        raise AdapterError(f"{archive.name} is no zip archive, or damaged.") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a place before the beginning of the file
            raise
        raise AdapterError(f"{archive.name} is no zip archive, or damaged.") from error
    return sorted(entry.filename for entry in entries if entry not in chosen.values())


class _SmallReads(io.FileIO):
    """A file of which no caller reads much at once: an archive may claim a list of files of any length."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > _MAX_READ:
            raise zipfile.BadZipFile
        return super().read(size)


def _choose(archive: str, entries: Sequence[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Return the files of the only adapter among the entries of an archive, by name."""
    if len(entries) > MAX_FILES:
        raise AdapterError(f"{archive} has {len(entries):,} files: an adapter has at most {MAX_FILES:,}.")
    folders: dict[str, dict[str, zipfile.ZipInfo]] = {}
    for entry in entries:
        path, shown = entry.orig_filename, shorten(one_line(entry.orig_filename), 100)
        *parents, name = path.split("/")
        if parents[:1] == [""] or ".." in parents or any(character in path for character in "\\:\0"):
            raise AdapterError(f"{archive} is refused: {shown} leads out of its folder.")
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
            raise AdapterError(f"{archive} is refused: {shown} is a link, or no regular file.")
        files = folders.setdefault("/".join(parents), {})
        if name in files:
            raise AdapterError(f"{archive} is refused: it has {shown} twice.")
        files[name] = entry
    adapters = [files for files in folders.values() if CONFIG_FILE in files]
    if len(adapters) != 1:
        count = "no adapter" if not adapters else f"{len(adapters):,} adapters"
        raise AdapterError(f"{archive} holds {count}: give one, a folder with {CONFIG_FILE} and {WEIGHTS_FILE}.")
    chosen = {name: entry for name, entry in adapters[0].items() if name in UPLOADED_FILES}
    for name, entry in chosen.items():
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise AdapterError(f"{archive} is refused: it is encrypted, or compressed in an unusual way.")
        if entry.file_size > (limit := _limit(name)):
            raise AdapterError(f"{archive} is refused: {name} would have more than {format_bytes(limit)}.")
    return chosen


def _limit(name: str) -> int:
    return MAX_WEIGHTS_BYTES if name == WEIGHTS_FILE else max_bytes(name)


def _copy(source: IO[bytes], target: BinaryIO, entry: zipfile.ZipInfo) -> None:
    """Copy what an entry holds. Raises BadZipFile for more than it has announced."""
    size = 0
    while chunk := source.read(_CHUNK):
        size += len(chunk)
        if size > entry.file_size:
            raise zipfile.BadZipFile
        target.write(chunk)


def copy_uploaded(files: Sequence[Path], folder: Path) -> list[str]:
    """Copy the uploaded files of an adapter into a folder; return the names of the others."""
    for path in files:
        if path.name in UPLOADED_FILES:
            if path.stat().st_size > (limit := _limit(path.name)):
                raise AdapterError(f"{path.name} has more than {format_bytes(limit)}.")
            shutil.copyfile(path, folder / path.name)
    return sorted(path.name for path in files if path.name not in UPLOADED_FILES)
