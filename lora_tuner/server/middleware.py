"""What a request must pass before anything reads it: who it thinks we are, who it is, how large it is.

Without a key the Host header must name this machine, for a page elsewhere can have its own name lead here (DNS rebinding);
such a page has no key, so with one any name will do, as a proxy may pass it on. Surprise: a body is read as a whole before
anything acts on it, so that a slow sender holds up nobody. Limit: how long a client takes over its headers is not bounded.
"""

import asyncio
import hmac
import ipaddress
import re

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config import ServerConfig
from .protocol import error_response

MAX_BODY = 1_000_000  # bytes
MAX_SECONDS = 30.0  # for the whole of a body
_NAMES = ("127.0.0.1", "localhost", "::1")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CLOSE = {"Connection": "close"}  # what is left of the request is not read


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_api_path(path: str) -> bool:
    """Whether a path belongs to the API; others belong to the playground."""
    return path.startswith("/v1/") or path in ("/metrics", "/openapi.json", "/health")


class SecurityMiddleware:
    """Around the whole app. The key is asked for by the API alone: the playground has its own login with the same key."""

    def __init__(self, app: ASGIApp, settings: ServerConfig) -> None:
        self.app = app
        self.key = settings.api_key.encode() if settings.api_key else None
        self.names = {*_NAMES, settings.host} if self.key is None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body = self._refused(scope["path"], headers) or await _buffer_body(headers, receive)
        if isinstance(body, Response):
            await body(scope, receive, send)
        elif body is not None:
            first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def again() -> Message:
                return first.pop() if first else await receive()

            await self.app(scope, again, send)

    def _refused(self, path: str, headers: Headers) -> Response | None:
        if self.names and _name(headers.get("host", "")) not in self.names:
            text = f"This server is called {' or '.join(sorted(self.names))}, and the request is for another."
            return error_response(403, text, _CLOSE, code="wrong_host")
        if _CONTROL.search(path):  # a route takes a line end after its path, and `is_api` does not
            return error_response(404, "There is nothing at this path.", _CLOSE)
        given = headers.get("authorization", "").encode("latin-1")
        if (
            self.key
            and is_api_path(path)
            and path != "/health"
            and not hmac.compare_digest(given, b"Bearer " + self.key)
        ):
            text = "The API key is missing or wrong: send it as `Authorization: Bearer KEY`."
            return error_response(401, text, _CLOSE | {"WWW-Authenticate": "Bearer"}, code="invalid_api_key")
        return None


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    match = re.fullmatch(r"(?:\[(?P<six>[^\]]*)\]|(?P<name>[^:]*))(?::\d*)?", host)
    return (match["six"] or match["name"] or "").lower() if match else ""


async def _buffer_body(headers: Headers, receive: Receive) -> bytes | Response | None:
    """The whole body, or why it is not taken; None where the client has gone."""
    length = headers.get("content-length", "0")
    too_large = error_response(413, f"The body has more than {MAX_BODY:,} bytes.", _CLOSE, code="request_too_large")
    if length.isdecimal() and int(length[:20]) > MAX_BODY:
        return too_large
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    return too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        return error_response(
            408, f"The body took longer than {MAX_SECONDS:g} seconds.", _CLOSE, code="request_timeout"
        )
