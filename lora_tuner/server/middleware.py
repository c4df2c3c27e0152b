"""Checks before a request reaches the app: origin, Host header, API key, size of the body.

Without an API key the Host header must name this machine, against DNS rebinding. With a key any
host is accepted: an attacking page does not know it, and a proxy may pass its own name on. Bodies
are buffered, so that a slow client holds up nobody; those of files go to `playground/uploads` as
they come. `runner` limits connections and idle time.

Browsers keep web pages of other origins from reading responses (the same-origin policy), unless
`allow_origin` names their origin (CORS).
"""

import asyncio
import hmac
import ipaddress
import re

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config import ServerConfig
from .error_responses import error_response

MAX_BODY = 1_000_000  # bytes
# For other paths than those of the API: anyone may send them, without the key.
MAX_PAGE_BODY = 200_000
MAX_SECONDS = 30.0  # for a whole body; of a file, for the next part of it
UPLOAD_PATH = re.compile("/uploads/(?P<adapter>adapter/)?(?P<id>[^/]+)/(?P<name>[^/]+)")
_OTHER_API_PATHS = ("/tokenize", "/detokenize", "/metrics", "/openapi.json", "/health")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CLOSE = {"Connection": "close"}  # the rest of the request stays unread


def is_loopback(host: str) -> bool:
    """Return True for an address that only this machine can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_api_path(path: str) -> bool:
    """Return True for a path of the API; all others belong to the playground."""
    return path.startswith("/v1/") or path in _OTHER_API_PATHS


def _check_host(settings: ServerConfig, headers: Headers) -> Response | None:
    """Return an error response for a Host header that is not of this machine, if there is no key."""
    hosts = {"127.0.0.1", "localhost", "::1", settings.host}
    if settings.api_key or _host_name(headers.get("host", "")) in hosts:
        return None
    message = f"Wrong Host header: this server is {' or '.join(sorted(hosts))}."
    return error_response(403, message, _CLOSE, code="wrong_host")


class CrossOriginMiddleware(CORSMiddleware):
    """Answers preflight requests, which have no key, and adds the headers for pages of allowed origins.

    For API paths alone: the playground is for its own origin. No credentials: the key is sent by
    the page, never by the browser itself."""

    def __init__(self, app: ASGIApp, settings: ServerConfig) -> None:
        self.settings = settings
        super().__init__(
            app,
            settings.allow_origin,
            allow_methods=["*"],  # what an endpoint does not support gets its own 405
            allow_headers=["*"],  # clients add headers of their own
            allow_private_network=True,
            expose_headers=["Retry-After", "X-Request-Id"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.settings.allow_origin and scope["type"] == "http" and is_api_path(scope["path"]):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        origin = request_headers["origin"]
        if not self.is_allowed_origin(origin):
            message = (
                f"Pages of {origin[:200]} may not call this server: it names allowed origins by --allow-origin."
            )
            return error_response(403, message, code="wrong_origin")
        return _check_host(self.settings, request_headers) or super().preflight_response(request_headers)


class SecurityMiddleware:
    """ASGI middleware around the whole app. The API key is checked for API paths alone."""

    def __init__(self, app: ASGIApp, settings: ServerConfig) -> None:
        self.app = app
        self.settings = settings
        self.key = settings.api_key.encode() if settings.api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._check_headers(scope["path"], headers)
        if refused is None and UPLOAD_PATH.fullmatch(scope["path"]):
            await self.app(scope, receive, send)
            return
        max_body = MAX_BODY if is_api_path(scope["path"]) else MAX_PAGE_BODY
        body = refused or await _buffer_body(headers, receive, max_body)
        if isinstance(body, Response):
            await body(scope, receive, send)
        elif body is not None:
            buffered: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive_buffered() -> Message:
                return buffered.pop() if buffered else await receive()

            await self.app(scope, receive_buffered, send)

    def _check_headers(self, path: str, headers: Headers) -> Response | None:
        """Return the error response, or None when the request may pass."""
        if wrong_host := _check_host(self.settings, headers):
            return wrong_host
        if _CONTROL.search(path):  # routes match a trailing newline, `is_api_path` does not
            return error_response(404, "There is nothing at this path.", _CLOSE)
        if self.key and is_api_path(path) and path != "/health":
            authorization = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(authorization, b"Bearer " + self.key):
                return error_response(
                    401,
                    "The API key is missing or wrong: send it as `Authorization: Bearer KEY`.",
                    _CLOSE | {"WWW-Authenticate": "Bearer"},
                    code="invalid_api_key",
                )
        return None


def _host_name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    match = re.fullmatch(r"(?:\[(?P<six>[^\]]*)\]|(?P<name>[^:]*))(?::\d*)?", host)
    return (match["six"] or match["name"] or "").lower() if match else ""


async def _buffer_body(headers: Headers, receive: Receive, max_body: int) -> bytes | Response | None:
    """Return the whole body, an error response, or None when the client has disconnected."""
    length = headers.get("content-length", "0")
    too_large = length.isdecimal() and int(length[:20]) > max_body
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_SECONDS):
            while not too_large:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                too_large = len(body) > max_body
                if not (too_large or message.get("more_body")):
                    return bytes(body)
    except TimeoutError:
        return error_response(
            408,
            f"The body took longer than {MAX_SECONDS:g} seconds.",
            _CLOSE,
            code="request_timeout",
        )
    return error_response(413, f"The body is larger than {max_body:,} bytes.", _CLOSE, code="request_too_large")
