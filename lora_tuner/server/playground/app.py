"""Gradio's app at `/`, reduced to the routes that the page uses.

Allowed routes are listed, so routes that a later Gradio adds are blocked too: no uploads (`uploads`
has those of the page), local files, proxy or API of its own. Gradio's scripts need `unsafe-inline` and `unsafe-eval`, so
protection against injected scripts rests on the escaping in `html`.
"""

import hmac
import logging
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gradio as gr
from fastapi import FastAPI, HTTPException
from gradio import queueing
from gradio.routes import App
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

from ..metrics import Metrics
from ..middleware import UPLOAD_PATH
from ..service import ModelService
from .downloads import DOWNLOAD_PATH, Downloads
from .page import Page
from .uploads import Uploads

ALLOWED_ROUTES = re.compile(
    r"/|/(assets|static)/.+|/(theme\.css|favicon\.ico|manifest\.json|login|logout|config)/?"
    r"|/gradio_api/(queue/join|queue/data|cancel|reset|startup-events|app_id|heartbeat/\w+)/?"
)
# What a browser says of requests by the page itself, and by its user: those of other pages are refused.
OWN_SITE = ("same-origin", "none")
# Image and URLs for social networks.
SOCIAL_TAGS = re.compile(rb'\s*<meta\s[^>]*"(og|twitter):[^>]*>')
log = logging.getLogger("lora_tuner.server")
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data:; font-src 'self' data:; object-src 'none'; base-uri 'self'; frame-ancestors 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def mount(app: FastAPI, service: ModelService, api_key: str | None) -> FastAPI:
    """Add the page at `/`, behind the app's own routes. An API key is its password."""
    queueing.traceback = _LoggedTraceback  # type: ignore[attr-defined,assignment] # printed, it would break lines
    pages = Page(service, app.state.metrics)
    app = gr.mount_gradio_app(
        app,
        pages.blocks(),
        "/",
        auth=partial(_is_key, api_key) if api_key else None,
        auth_message="Use any name, and the API key of this server as the password." if api_key else None,
        css_paths=[Path(__file__).with_name(name) for name in ("playground.css", "charts.css")],
        enable_monitoring=False,
        head=f"<script>{Path(__file__).with_name('playground.js').read_text(encoding='utf-8')}</script>",
        footer_links=[],
        mcp_server=False,
        pwa=False,
        run_history=False,
        show_error=False,
        ssr_mode=False,
        theme=gr.themes.Default(
            primary_hue="indigo",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ).set(  # Gradio's greys have too little contrast
            body_text_color_subdued="*neutral_600",
            body_text_color_subdued_dark="*neutral_400",
            block_info_text_color="*neutral_600",
            block_info_text_color_dark="*neutral_400",
            input_placeholder_color="*neutral_500",  # it names defaults
            input_placeholder_color_dark="*neutral_400",
        ),
    )
    (page,) = (route for route in app.routes if isinstance(route, Mount) and route.path == "")
    assert isinstance(page.app, App)
    downloads = Downloads(service, pages.library.exports)
    page.app = _RestrictedRoutes(page.app, app.state.metrics, Uploads(service.config), downloads)
    return app


def _is_key(api_key: str, _name: str, password: str) -> bool:
    return hmac.compare_digest(password.encode(errors="replace"), api_key.encode())


class _LoggedTraceback:
    """Stands for the module `traceback` where Gradio prints the errors of events."""

    @staticmethod
    def print_exc() -> None:
        log.exception("page")


@dataclass
class _RestrictedRoutes:
    """ASGI wrapper: only the page's routes, only after login, and no other host in the browser.

    The routes only read requests, so an unexpected error there is one of the request: status 400.
    """

    app: App
    metrics: Metrics
    uploads: Uploads
    downloads: Downloads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        upload, download = UPLOAD_PATH.fullmatch(path), DOWNLOAD_PATH.fullmatch(path)
        if scope["type"] != "http" or not (upload or download or ALLOWED_ROUTES.fullmatch(path)):
            raise HTTPException(404)
        # Gradio checks some of them only.
        if path.startswith(("/gradio_api/", "/uploads/", "/downloads/")) and not self._is_logged_in(scope):
            raise HTTPException(401, "Log in first.")
        if scope["method"] != "GET" and Headers(scope=scope).get("sec-fetch-site", "none") not in OWN_SITE:
            raise HTTPException(403, "Other web pages may not use this one.")
        start: Message = {}
        body = bytearray()
        failed = False

        async def send_page(message: Message) -> None:
            """Buffer the page, and send it without its social tags."""
            if message["type"] == "http.response.start":
                start.update(message)
                return
            body.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            page = SOCIAL_TAGS.sub(b"", bytes(body))
            kept = [header for header in start["headers"] if header[0] != b"content-length"]
            await send_with_headers({**start, "headers": [*kept, (b"content-length", b"%d" % len(page))]})
            await send_with_headers({"type": "http.response.body", "body": page})

        async def send_with_headers(message: Message) -> None:
            nonlocal failed
            if message["type"] == "http.response.start":
                # An unexpected error, which Gradio raises after its response.
                failed = message["status"] == 500
                # Gradio's CORS headers let pages of any origin read its responses.
                kept = [header for header in message["headers"] if not header[0].startswith(b"access-control-")]
                message = {**message, "headers": kept + HEADERS}
            if not failed:
                await send(message)

        if upload is not None:
            response = await self.uploads.respond(scope, receive)
            return await response(scope, receive, send_with_headers)
        if download is not None:
            response = await self.downloads.respond(download, scope["method"])
            return await response(scope, receive, send_with_headers)
        send_edited = send_with_headers
        if path == "/":  # it is edited, so it must not be compressed
            plain = [header for header in scope["headers"] if header[0] != b"accept-encoding"]
            scope, send_edited = {**scope, "headers": plain}, send_page
        stream = path.startswith("/gradio_api/queue/data")  # ends when the last output was sent
        self.metrics.streams += stream
        try:
            await self.app(scope, receive, send_edited)
        except Exception as error:
            if not failed:
                raise
            log.warning("page", exc_info=error)
        finally:
            self.metrics.streams -= stream
        if failed:
            raise HTTPException(400, "The page does not understand this request: reload it.")

    def _is_logged_in(self, scope: Scope) -> bool:
        """Return True without an API key, or with a valid login cookie."""
        cookies = Request(scope).cookies
        names = (
            f"access-token-{self.app.cookie_id}",
            f"access-token-unsecure-{self.app.cookie_id}",
        )
        return self.app.auth is None or any(cookies.get(name) in self.app.tokens for name in names)
