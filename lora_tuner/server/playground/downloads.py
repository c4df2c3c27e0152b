"""Downloads of the page: `GET /downloads/adapters/NAME.zip`, and `GET /downloads/exports/ID`.

The name is looked up in the listing of adapters, and never made into a path.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from starlette.responses import FileResponse, Response, StreamingResponse

from ...adapters import archive
from ...adapters.library import read_consistently
from ...errors import AdapterError, LoraTunerError
from ..error_responses import error_response
from ..service import ModelService
from .common import GONE
from .exports import Exports

DOWNLOAD_PATH = re.compile(r"/downloads/(?:adapters/(?P<adapter>[^/]+)\.zip|exports/(?P<export>[^/]+))")
_CLOSE = {"Connection": "close"}


@dataclass(frozen=True)
class Downloads:
    """The files that visitors may download."""

    service: ModelService
    exports: Exports

    async def respond(self, match: re.Match[str], method: str) -> Response:
        """Return an adapter, or the folder of an export, as a zip archive, streamed; else the file of an export."""
        if method not in ("GET", "HEAD"):
            return error_response(405, "Fetch a file with GET.", _CLOSE)
        name = match["adapter"] or ""
        try:
            if name:
                files = await self._open_adapter(name)
            else:
                find = partial(self.exports.find, match["export"])
                path = await self.service.run_in_thread("library", find)
                if path is None:
                    raise AdapterError("This export is no longer there: export the adapter again.")
                if path.is_file():
                    return FileResponse(path, filename=path.name, media_type="application/octet-stream")
                name, files = path.name, open_folder(path)
        except (LoraTunerError, OSError) as error:
            return error_response(404, self.service.hide_paths(str(error)), code="not_found")
        headers = {"Content-Disposition": f"attachment; filename*=utf-8''{quote(name)}.zip"}
        if method == "HEAD":
            for _, file in files:
                file.close()
            files = []
        return StreamingResponse(archive.stream_zip(files), media_type="application/zip", headers=headers)

    async def _open_adapter(self, name: str) -> list[tuple[str, BinaryIO]]:
        models = await self.service.run_in_thread("list", self.service.list_models)
        path = next((model.path for model in models if model.id == name and model.path), None)
        if path is None:
            raise AdapterError(GONE.format(name))
        open_files = partial(read_consistently, path, archive.open_public_files)
        return await self.service.run_in_thread("library", open_files)


def open_folder(folder: Path) -> list[tuple[str, BinaryIO]]:
    """Open all files in a folder, with their names in an archive."""
    return [
        (path.relative_to(folder.parent).as_posix(), path.open("rb"))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    ]
