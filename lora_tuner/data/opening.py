"""Open data files: compressed ones are unpacked within limits, and each error names the file.

The first bytes tell the compression, not the name: browsers unpack some files and keep the name.
The limits count bytes that came out, not those that a header claims.
"""

import bz2
import contextlib
import csv
import gzip
import io
import lzma
import os
import sqlite3
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, cast

from ..errors import DataError
from ..text import format_bytes

MAX_UNPACKED, MAX_RATIO = 100_000_000, 200  # more bytes at a higher ratio are a bomb
MAX_DOCUMENT = 500_000_000  # bytes of one document
TOO_LARGE = f"it has more than {MAX_DOCUMENT // 10**6} MB, the most of one document: divide it"
_MAX_XZ_MEMORY = 2**28  # xz -9 needs 2**26; zstd has a limit of its own
_CHUNK = 2**16
CHANGED = "it changed while it was read: try again when it is complete"
_OTHER_TYPES = {  # first bytes -> a type that its extension does not tell
    b"PK\3\4": "a zip file: of documents and workbooks the extension is .docx, .xlsx or .epub; unpack other ones",
    b"\xd0\xcf\x11\xe0": "an Office file that is encrypted or of an old type: save it as .docx, .xlsx or .csv",
    b"SQLite format 3\0": "an SQLite database: name it .sqlite",
    b"%PDF-": "a PDF file: extract its text, as with `pdftotext`",
    b"PAR1\x15": "a Parquet file: name it .parquet",
}


_ERRORS = (
    ValueError,
    TypeError,
    NotImplementedError,
    OSError,
    RecursionError,
    csv.Error,
    sqlite3.Error,
    zipfile.BadZipFile,
)


class UnreadableFileError(DataError):
    """A file cannot be read, for a reason."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[io.FileIO]:
    """Open a file for one pass. An error in the block, or a change of it, is an UnreadableFileError."""
    changed = False
    try:
        if not path.is_file():  # opening a pipe would block
            raise ValueError("it is a link to nothing" if not path.exists() else "it is not a regular file")
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            try:
                yield file
            finally:  # a change explains any other error
                after = os.fstat(file.fileno())
                changed = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
        if changed:
            raise ValueError(CHANGED)
    except _ERRORS as error:
        if isinstance(error, RecursionError):  # its text depends on the version of Python
            error = ValueError("it is nested too deeply")
        reason = (
            CHANGED if changed else getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
        )
        raise UnreadableFileError(f"{path} cannot be read: {reason}.", reason) from error


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _XzStream:
    """The bytes of an xz file. Python's own reader has no limit on the memory that it may claim."""

    def __init__(self, file: io.FileIO) -> None:
        self._file, self._decoder = file, lzma.LZMADecompressor(memlimit=_MAX_XZ_MEMORY)

    def read(self, size: int, /) -> bytes:
        while True:
            packed = b""
            if self._decoder.eof:
                packed = self._decoder.unused_data.lstrip(b"\0")  # zeros may stand between streams
                while not packed and (chunk := self._file.read(_CHUNK)):
                    packed = chunk.lstrip(b"\0")
                if not packed:
                    return b""
                self._decoder = lzma.LZMADecompressor(memlimit=_MAX_XZ_MEMORY)
            elif self._decoder.needs_input and not (packed := self._file.read(_CHUNK) or b""):
                raise EOFError("it ends within a stream")
            if unpacked := self._decoder.decompress(packed, size):
                return unpacked


def _open_zstd(file: io.FileIO) -> _Stream:
    import pyarrow  # type: ignore[import-untyped]

    return cast(_Stream, pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"))


_COMPRESSIONS: dict[bytes, Callable[[io.FileIO], _Stream]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": _XzStream,
    b"\x28\xb5\x2f\xfd": _open_zstd,
    b"\x50\x2a\x4d\x18": _open_zstd,  # as pzstd writes it
}


_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # first and last


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed file. Too many of them, or a damaged file, raise ValueError."""

    def __init__(self, file: io.FileIO, open_stream: Callable[[io.FileIO], _Stream]) -> None:
        self._stream, self._size, self._produced = open_stream(file), os.fstat(file.fileno()).st_size, 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._produced

    def readinto(self, buffer: bytearray, /) -> int:  # type: ignore[override]
        try:
            chunk = self._stream.read(min(len(buffer), _CHUNK))
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if "memory" in str(error).lower():
                raise ValueError("it needs too much memory to be unpacked: unpack it first") from error
            raise ValueError(f"its compressed data is damaged or cut short ({error})") from error
        self._produced += len(chunk)
        check_size(self._produced, self._size)
        buffer[: len(chunk)] = chunk
        return len(chunk)


def check_size(unpacked: int, packed: int) -> None:
    """Raise ValueError if so many bytes out of so few are a decompression bomb."""
    if unpacked > MAX_UNPACKED and unpacked > MAX_RATIO * packed:
        raise ValueError(
            f"its {format_bytes(packed)} unpack to more than {format_bytes(MAX_UNPACKED)} and "
            f"{MAX_RATIO} times its size, as of a decompression bomb: unpack it first if it is "
            "none"
        )


def unpack(file: io.FileIO) -> io.RawIOBase:
    """Return the bytes of a file from its beginning, unpacked if it is compressed."""
    file.seek(0)
    start = file.read(16)
    file.seek(0)
    raw = io.FileIO(file.fileno(), closefd=False)
    opener = _find_opener(start)
    return raw if opener is None else _Unpacked(raw, opener)


def _find_opener(start: bytes) -> Callable[[io.FileIO], _Stream] | None:
    if start.startswith(b"BZh") and start[4:10] not in _BZIP2_BLOCKS:
        return None  # text that begins so
    return next((opener for magic, opener in _COMPRESSIONS.items() if start.startswith(magic)), None)


def read_document(file: io.FileIO) -> bytes:
    """Return all bytes of a document, unpacked. More than `MAX_DOCUMENT` raise ValueError."""
    buffer = io.BufferedReader(unpack(file))
    content = buffer.read(MAX_DOCUMENT + 1)
    if len(content) > MAX_DOCUMENT:
        raise ValueError(TOO_LARGE)
    check_type(content[:16])
    return content


class Container:
    """Parts of a zip file, as docx, epub and xlsx are; nothing is written to disk.

    Raises:
        ValueError: A part is encrypted, missing, outside of the file, or too large when unpacked.
    """

    def __init__(self, file: io.FileIO) -> None:
        file.seek(0)
        start = file.read(16)
        if not start.startswith(b"PK"):
            check_type(start)
            raise ValueError("it is no zip file, as documents and workbooks of this type are")
        self._zip, self._size, self._produced = zipfile.ZipFile(file), os.fstat(file.fileno()).st_size, 0
        for part in self._zip.infolist():
            folders = part.filename.replace("\\", "/").split("/")
            if ".." in folders or part.filename.startswith(("/", "\\")) or ":" in folders[0]:
                raise ValueError(f"its part {part.filename[:100]!r} lies outside of it")
            if part.flag_bits & 1:
                raise ValueError(f"its part {part.filename[:100]!r} is encrypted: save it without a password")

    def names(self) -> list[str]:
        return self._zip.namelist()

    def read_chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a part. Those of all parts that are read count for the limit."""
        try:
            part = self._zip.getinfo(name)
            if part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"its part {name[:100]!r} is compressed by a method that such files do not have")
            with self._zip.open(part) as stream:
                while chunk := stream.read(_CHUNK):
                    self._produced += len(chunk)
                    check_size(self._produced, self._size)
                    if self._produced > MAX_DOCUMENT:
                        raise ValueError(TOO_LARGE)
                    yield chunk
        except KeyError:
            raise ValueError(f"it has no part {name[:100]!r}") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"its part {name[:100]!r} is damaged ({error})") from error

    def read(self, name: str) -> bytes:
        return b"".join(self.read_chunks(name))


def check_type(start: bytes) -> None:
    """Raise ValueError if a file of text begins as one of another type does."""
    if _find_opener(start):
        raise ValueError("it is compressed twice: unpack it first")
    for magic, kind in _OTHER_TYPES.items():
        if start.startswith(magic):
            raise ValueError(f"it is {kind}")


UTF8 = "utf-8-sig"  # maybe with a mark


class _TextBytes(io.BufferedReader):
    """The bytes of a text file. A null byte raises ValueError."""

    def read1(self, size: int = -1) -> bytes:
        start = self.tell()
        chunk = super().read1(size)
        if b"\0" in chunk:
            raise ValueError(
                f"byte {start + chunk.index(0)} is null, as in UTF-16 or a binary file: name its encoding with --encoding, "
                "such as utf-16-le, or save it as UTF-8 text"
            )
        return chunk


def _open_text(file: io.FileIO, encoding: str = UTF8) -> io.TextIOWrapper:
    """Return the text of a file from its beginning, with newline characters as its line breaks."""
    kind = (
        io.BufferedReader if encoding.lower().startswith(("utf-16", "utf-32", "utf_16", "utf_32")) else _TextBytes
    )
    buffer = kind(unpack(file), _CHUNK)
    check_type(buffer.peek(16)[:16])
    return io.TextIOWrapper(buffer, encoding=encoding)


def text_lines(file: io.FileIO, encoding: str = UTF8) -> Iterator[str]:
    """Yield the lines of a file from its beginning, each with a newline character as its break."""
    text = _open_text(file, encoding)
    with _decoding(text, encoding):
        for number, line in enumerate(text):
            yield line if number else line.removeprefix("\ufeff")


def read_start(file: io.FileIO, encoding: str, size: int) -> str:
    """Return the first characters of a file."""
    text = _open_text(file, encoding)
    with _decoding(text, encoding):
        return text.read(size).removeprefix("\ufeff")


@contextlib.contextmanager
def _decoding(text: io.TextIOWrapper, encoding: str) -> Iterator[None]:
    """Raise ValueError that names the option, for bytes that are not of the encoding."""
    try:
        yield
    except UnicodeError as error:
        if isinstance(error, UnicodeDecodeError) and "BOM" not in error.reason:  # of Python 3.13, without a mark
            position = cast("io.BufferedReader", text.buffer).tell() - len(error.object) + error.start
            raise ValueError(not_encoded(position, encoding)) from error
        raise ValueError(
            f"it has no byte order mark, which {encoding} needs: name its encoding with --encoding, such as {encoding}-le, "
            "or leave that out"
        ) from error


def not_encoded(position: int, encoding: str = UTF8) -> str:
    """Return the reason for an error of a byte that is not of an encoding."""
    name = "UTF-8" if encoding == UTF8 else encoding
    return (
        f"byte {position} is not {name}: name its encoding with --encoding, such as cp1252 (Western European), cp1250 "
        "(Central European), cp1251 (Cyrillic), mac_roman, shift_jis or gb18030, or save it as UTF-8 text"
    )
