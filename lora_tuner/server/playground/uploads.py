"""Files that visitors upload: `PUT /uploads/ID/NAME`, streamed to `runs_dir/.uploads/ID/upload/NAME`.

Those of an adapter are sent to `/uploads/adapter/ID/NAME`; `library_actions` adds them to the library.

Uploads that no run reads are removed after a day.
"""

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope

from ... import atomic_io
from ...adapters.adapter import WEIGHTS_FILE
from ...adapters.archive import UPLOADED_FILES
from ...config import ServerConfig
from ...text import CODE_EXTENSIONS, DATA_EXTENSIONS, data_extension, format_bytes
from ...training.jobs import JobState, list_jobs
from ..error_responses import error_response
from ..middleware import MAX_SECONDS, UPLOAD_PATH, is_loopback

MAX_FILE_BYTES = 500_000_000
MAX_FILES = 200  # of an upload
MAX_TOTAL_BYTES = 5_000_000_000  # of all uploads
SPARE_BYTES = 1_000_000_000  # of the disk
KEPT_SECONDS = 24 * 3600
MAX_NAME_CHARS = 100
OFF = "Training and uploads are off: start the server with --allow-training."
_ID = re.compile("[0-9a-f]{32}")
_FOLDER = "upload"  # so that several files are a dataset of that name
_CLOSE = {"Connection": "close"}  # the rest of the request stays unread


class RefusedUploadError(Exception):
    """An upload that is refused: status, and the reason in a sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def may_train(settings: ServerConfig) -> bool:
    """Return whether visitors may upload files and train."""
    return settings.allow_training or is_loopback(settings.host)


@dataclass(frozen=True)
class Uploads:
    """The uploaded files of a server."""

    settings: ServerConfig

    @property
    def folder(self) -> Path:
        return self.settings.runs_dir / ".uploads"

    def dataset(self, upload: str) -> Path | None:
        """Return the only file of an upload, or its folder; None if there is no such upload."""
        files = self.files(upload)
        return files[0] if len(files) == 1 else files[0].parent if files else None

    def files(self, upload: str) -> list[Path]:
        """Return the files of an upload; none if there is no such upload."""
        folder = self.folder / upload / _FOLDER
        if not _ID.fullmatch(upload) or not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))

    def remove(self, upload: str) -> None:
        """Remove an upload that has been read."""
        if _ID.fullmatch(upload):
            atomic_io.delete(self.folder / upload)

    async def respond(self, scope: Scope, receive: Receive) -> Response:
        """Store the body of a request, in a thread, and return the response to it."""
        try:
            upload, name = self._check_request(scope)
            size = await self._store(upload, name, Request(scope, receive))
        except RefusedUploadError as error:
            return error_response(error.status, str(error), _CLOSE)
        except TimeoutError:
            return error_response(408, f"No more bytes came in {MAX_SECONDS:g} seconds.", _CLOSE)
        except ClientDisconnect:
            return Response()  # nobody reads it
        return JSONResponse({"name": name, "bytes": size}, 201)

    def _check_request(self, scope: Scope) -> tuple[str, str]:
        """Return upload and name of the file in a request."""
        if not may_train(self.settings):
            raise RefusedUploadError(403, OFF)
        if scope["method"] != "PUT":
            raise RefusedUploadError(405, "Send a file with PUT.")
        match = UPLOAD_PATH.fullmatch(scope["path"].removeprefix(scope.get("root_path", "")))
        if match is None or not _ID.fullmatch(match["id"]):
            raise RefusedUploadError(404, "There is nothing at this path.")
        name = safe_name(match["name"])
        if match["adapter"]:
            if name not in UPLOADED_FILES and Path(name).suffix.lower() != ".zip":
                raise RefusedUploadError(
                    415,
                    f"{name} is no file of an adapter: choose a zip file, or {WEIGHTS_FILE} and what is beside it.",
                )
        elif data_extension(Path(name)) not in DATA_EXTENSIONS + CODE_EXTENSIONS:
            kinds = ", ".join(extension.lstrip(".") for extension in DATA_EXTENSIONS)
            raise RefusedUploadError(415, f"{name} cannot be trained on: choose {kinds}, or program code.")
        return match["id"], name

    async def _store(self, upload: str, name: str, request: Request) -> int:
        """Write the body to its file, and return its size."""
        length = request.headers.get("content-length", "")
        expected = int(length[:20]) if length.isdecimal() else 0
        path = await asyncio.to_thread(self._make_room, upload, name, expected)
        part, size, body = path.with_name(f".{secrets.token_hex(8)}"), 0, request.stream()
        try:
            with part.open("xb") as file:
                while True:
                    async with asyncio.timeout(MAX_SECONDS):
                        chunk = await anext(body, None)
                    if chunk is None:
                        break
                    size += len(chunk)
                    _check_size(name, size)
                    await asyncio.to_thread(file.write, chunk)
            part.rename(path)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise RefusedUploadError(507, f"{name} cannot be stored: {error.strerror}.") from error
        finally:
            part.unlink(missing_ok=True)
        return size

    def _make_room(self, upload: str, name: str, expected: int) -> Path:
        """Remove old uploads, check all limits, and return the path of a new file."""
        _check_size(name, expected)
        folder = self.folder / upload / _FOLDER
        try:
            self.remove_old()
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / name).exists():
                raise RefusedUploadError(409, f"There are two files {name}: rename one.")
            if len([*folder.iterdir()]) >= MAX_FILES:
                raise RefusedUploadError(413, f"At most {MAX_FILES} files are taken at once.")
            total = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
            if total + expected > MAX_TOTAL_BYTES or atomic_io.free_space(folder) < SPARE_BYTES + expected:
                raise RefusedUploadError(
                    507, "There is no room for more uploads: try again tomorrow, or remove runs."
                )
        except OSError as error:
            raise RefusedUploadError(507, f"{name} cannot be stored: {error.strerror}.") from error
        return folder / name

    def remove_old(self) -> None:
        """Remove uploads of more than a day ago that no unfinished run reads."""
        if not self.folder.is_dir():
            return
        for folder in [*self.folder.iterdir()]:
            is_old = time.time() - folder.stat().st_mtime > KEPT_SECONDS
            if is_old and folder.name not in self._used():
                with contextlib.suppress(OSError):
                    atomic_io.delete(folder)

    def _used(self) -> Collection[str]:
        """Return the uploads that runs read which wait, train, or have not finished."""
        jobs = [job for job in list_jobs(self.settings.runs_dir) if job.state != JobState.FINISHED]
        names = (Path(name).parts for job in jobs for name in job.data)
        return {part for parts in names for part in parts}


def safe_name(name: str) -> str:
    """Return the name of an uploaded file as it is stored: no path, and not hidden."""
    kept = re.sub(r"[^\w.()+ -]", "_", name).strip(". ")
    stem, dot, extension = kept.partition(".")
    return f"{stem[: MAX_NAME_CHARS - len(dot + extension)]}{dot}{extension}"[-MAX_NAME_CHARS:] or "file"


def _check_size(name: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise RefusedUploadError(413, f"{name} is too large: at most {format_bytes(MAX_FILE_BYTES)} are taken.")
