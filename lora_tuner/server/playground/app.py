"""The playground: Gradio's application at `/`, with the page in it, and without what the page does not need.

No uploads, no files of this machine, no proxy, no other host, no endpoints of its own: those that a later Gradio adds are not
there either, for what is there is listed. Limit: Gradio's own scripts need `unsafe-inline` and `unsafe-eval`, so what keeps
strangers' words from running is that `panels` escapes them.
"""

import hmac
import re
from functools import partial
from pathlib import Path

import gradio as gr
from fastapi import FastAPI, HTTPException
from gradio.routes import App
from starlette.requests import Request
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

from ..metrics import Metrics
from ..service import ModelService
from .page import Page

KEPT_ROUTES = re.compile(  # what the page asks for; all else that Gradio would answer is not there
    r"/|/(assets|static)/.+|/(theme\.css|favicon\.ico|manifest\.json|login|logout|config)/?"
    r"|/gradio_api/(queue/join|queue/data|cancel|reset|startup-events|app_id|heartbeat/\w+)/?"
)
BLOCKED_ROUTES = re.compile(
    rb'\s*<meta\s[^>]*"(og|twitter):[^>]*>'
)  # Gradio's picture and addresses, for social networks
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data:; font-src 'self' data:; object-src 'none'; base-uri 'self'; frame-ancestors 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def mount(app: FastAPI, desk: ModelService, api_key: str | None) -> FastAPI:
    """Put the page at `/` of what `create_app` made; routes that it has already come first. With a key, visitors log in with
    that."""
    app = gr.mount_gradio_app(
        app,
        Page(desk, app.state.metrics).blocks(),
        "/",
        auth=partial(_is_key, api_key) if api_key else None,
        auth_message="Any name, and the API key of this server as the password." if api_key else None,
        css_paths=Path(__file__).with_name("playground.css"),
        enable_monitoring=False,
        footer_links=[],
        mcp_server=False,
        pwa=False,
        run_history=False,
        show_error=False,
        ssr_mode=False,
        theme=gr.themes.Default(
            primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ).set(  # Gradio's own greys are too pale to be read by all
            body_text_color_subdued="*neutral_600",
            body_text_color_subdued_dark="*neutral_400",
            block_info_text_color="*neutral_600",
            block_info_text_color_dark="*neutral_400",
        ),
    )
    (page,) = (route for route in app.routes if isinstance(route, Mount) and route.path == "")
    assert isinstance(page.app, App)
    page.app = _RestrictedRoutes(page.app, app.state.metrics)
    return app


def _is_key(api_key: str, _name: str, password: str) -> bool:
    return hmac.compare_digest(password.encode(), api_key.encode())


class _RestrictedRoutes:
    """Gradio's application without what the page does not need, and what it does only for who has logged in. The page names no
    other host, and a browser asks none."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or not KEPT_ROUTES.fullmatch(path):
            raise HTTPException(404)
        if path.startswith("/gradio_api/") and not self._is_visitor(scope):  # Gradio itself asks at some of them alone
            raise HTTPException(401, "Log in first.")
        start: Message = {}
        body = bytearray()

        async def rewritten(message: Message) -> None:
            """The page itself, as a whole."""
            if message["type"] == "http.response.start":
                start.update(message)
                return
            body.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            page = BLOCKED_ROUTES.sub(b"", bytes(body))
            kept = [header for header in start["headers"] if header[0] != b"content-length"]
            await guarded({**start, "headers": [*kept, (b"content-length", b"%d" % len(page))]})
            await send({"type": "http.response.body", "body": page})

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Gradio lets pages of any origin read its answers.
                own = [header for header in message["headers"] if not header[0].startswith(b"access-control-")]
                message = {**message, "headers": own + HEADERS}
            await send(message)

        if path == "/":  # it is changed, so it must not come compressed
            plain = [header for header in scope["headers"] if header[0] != b"accept-encoding"]
            await self.app({**scope, "headers": plain}, receive, rewritten)
            return
        stream = path.startswith("/gradio_api/queue/data")  # of answers: it ends when the last of them has been sent
        self.metrics.streams += stream
        try:
            await self.app(scope, receive, guarded)
        finally:
            self.metrics.streams -= stream

    def _is_visitor(self, scope: Scope) -> bool:
        """Whether there is no login, or its cookie is there."""
        cookies = Request(scope).cookies
        names = (f"access-token-{self.app.cookie_id}", f"access-token-unsecure-{self.app.cookie_id}")
        return self.app.auth is None or any(cookies.get(name) in self.app.tokens for name in names)
