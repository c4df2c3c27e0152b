"""Standard streams that never end a command, and that show no advice of libraries to programmers.

The reader of a pipe may leave (`| head`), a terminal may be closed, the disk of a log may be full,
and a stream may be closed before the command starts. What cannot be shown then is dropped.
"""

import contextlib
import errno
import io
import logging
import os
import select
import stat
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _LossyWriter(io.RawIOBase):
    """Raw file that drops what it cannot write, and keeps the first error."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, data: "ReadableBuffer") -> int:
        try:
            while (written := self._raw.write(data)) is None:  # a pipe that does not block is full
                select.select([], [self._raw], [])
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes
        return written


@contextlib.contextmanager
def reliable_streams() -> Iterator[None]:
    """Replace the standard streams during the block, so that no write to them raises.

    They are UTF-8 on every system. A stream that was closed at the start reads or writes nothing.
    """
    for descriptor in range(3):  # a file that is opened later must not get the number of a stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    previous = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - open until exit
    sys.stdout, sys.stderr = _lossy(sys.stdout), _lossy(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = previous


def _lossy(stream: TextIO | None) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw: Any = getattr(stream.buffer, "raw", stream.buffer)  # with `python -u` there is no buffer
    return io.TextIOWrapper(
        io.BufferedWriter(_LossyWriter(raw)),
        encoding="utf-8",
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Drop warnings and log messages below errors: libraries address them to programmers.

    `python -W` shows warnings. The server logs again, but for what these libraries advise.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def stdout_error() -> OSError | None:
    """Return the first error of a write to stdout, if output was dropped."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _LossyWriter) else None


def is_reader_gone(error: OSError) -> bool:
    """Return whether an error of stdout means that nobody reads it any more.

    Else a file was cut off, as by a full disk.
    """
    if isinstance(error, ConnectionError):
        return True
    # A closed terminal; on Windows a closed pipe.
    return error.errno in (errno.EIO, errno.EINVAL) and not stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode)
