"""Downloads of the page: `GET /downloads/adapters/NAME.zip`.

The name is looked up in the listing of adapters, and never made into a path.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO
from urllib.parse import quote

from starlette.responses import Response, StreamingResponse

from ...adapters import archive
from ...adapters.library import read_consistently
from ...errors import AdapterError, LoraTunerError
from ..protocol import error_response
from ..service import ModelService
from .common import GONE

DOWNLOAD_PATH = re.compile(r"/downloads/adapters/([^/]+)\.zip")
_CLOSE = {"Connection": "close"}


@dataclass(frozen=True)
class Downloads:
    """The files that visitors may download."""

    service: ModelService

    async def respond(self, name: str, method: str) -> Response:
        """Return an adapter as a zip archive, streamed."""
        if method not in ("GET", "HEAD"):
            return error_response(405, "Fetch a file with GET.", _CLOSE)
        try:
            files = await self._open_adapter(name)
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
