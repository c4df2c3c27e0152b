"""From settings to a server that listens, and its end.

The address is taken before the model is read, so that a port in use is said at once. Surprise: when it is asked to stop it
still listens, to say 503, until the last answer has been sent. Limit: one process; several share no batches.
"""

import asyncio
import ipaddress
import logging
import os
import re
import socket
import threading
import time
import webbrowser
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from ..adapters.adapter import Adapter
from ..adapters.library import Library
from ..config import ModelOptions, ServerConfig
from ..errors import ConfigError, EventHandler, Interrupted, Notice
from ..inference.generator import Generator
from .metrics import JsonLines, Metrics
from .middleware import is_loopback
from .playground.app import mount
from .routes import create_app
from .service import ModelService

POLL_SECONDS = 0.05  # seconds between looks at what is left
DRAIN_SECONDS = 2.0  # seconds for what is written to reach the page


def serve(
    adapters: Sequence[str | Path],
    settings: ServerConfig,
    *,
    options: ModelOptions = ModelOptions(),
    adapters_dir: Path = Path("adapters"),
    browse: bool = False,
) -> None:
    """Serve these adapters or, with none, all of the library, until a signal says to stop. With `browse` a browser opens.

    Raises ConfigError when the address is not to be had, or may not be without a key; Interrupted where a second signal has cut
    answers off.
    """
    _check_address(settings)
    notify = options.notify
    library = Library(adapters_dir)
    library.names()  # a place that cannot be read is said at once
    only = [adapter.path for adapter in library.get_all(adapters)]
    if not only and options.base is None:
        options = _with_most_common_base(library, options)
    with _bind_socket(settings.host, settings.port) as listener:
        generator = Generator(*only, options=options, adapters_dir=adapters_dir, max_resident=settings.max_resident)
        generator.set_adapter(None)  # else the first would never leave memory
        desk = ModelService(generator, settings, [Path(os.path.abspath(path)) for path in only])
        app = create_app(desk)
        url = _url(settings.host, listener)

        def listening() -> None:
            served = sum(not it.broken for it in desk.list_models()) - 1
            what = f"the base {desk.name} and {served:,} adapter{'s' if served != 1 else ''}"
            notify(Notice(f"Listening on {url}: {what}. {url}/v1 is for OpenAI's clients."))
            if browse:
                threading.Thread(target=_open, args=(url, notify), daemon=True).start()

        _configure_logging()
        desk.start()
        try:
            server = _Server(mount(app, desk, settings.api_key), desk, app.state.metrics, listening)
            server.run(sockets=[listener])
        finally:
            desk.stop()
    if server.cut_off:
        raise Interrupted("Stopped at once: answers that were being written are cut off.")


def _check_address(settings: ServerConfig) -> None:
    if settings.api_key is None and not is_loopback(settings.host):
        raise ConfigError(
            f"--host {settings.host}: others can reach it there, so it needs --api-key, or LORA_TUNER_API_KEY."
        )
    if settings.api_key is not None and not re.fullmatch("[!-~]+", settings.api_key):
        raise ConfigError(
            "--api-key: it is sent in a header, so it has letters, digits and signs of ASCII, and no spaces."
        )


def _with_most_common_base(library: Library, options: ModelOptions) -> ModelOptions:
    """Select the base that most adapters of the library name."""
    named = Counter((it.base, it.revision) for _, it in library.entries() if isinstance(it, Adapter) and it.base)
    if not named:
        return options
    (base, commit), count = named.most_common(1)[0]
    others = named.total() - count
    text = f"The base is {base}, as {count:,} of {named.total():,} adapters in {library.path} name it"
    options.notify(Notice(f"{text}; {others:,} are not served. --base chooses another." if others else f"{text}."))
    return replace(options, base=base, revision=options.revision or commit)


def _bind_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ConfigError."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        why = str(error.strerror or error).partition(" (")[0]
        raise ConfigError(
            f"{host}, port {port}, is not to be had: {why}. Choose another --port, or 0 for any that is free."
        ) from error


def _url(host: str, listener: socket.socket) -> str:
    """Where a browser of this machine finds it: what stands for all addresses is none of them."""
    address, port = listener.getsockname()[:2]
    if ipaddress.ip_address(address).is_unspecified:
        host = "::1" if ":" in address else "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _open(url: str, notify: EventHandler) -> None:
    if not webbrowser.open(url):
        notify(Notice(f"There is no browser to open here: visit {url} with one."))


def _configure_logging() -> None:
    """What is logged goes to stderr as lines of JSON: requests, and what went wrong in libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)
    logging.getLogger("lora_tuner.server").setLevel(logging.INFO)


class _Server(uvicorn.Server):
    """uvicorn's, but for its end: what runs and waits is finished, in the time that a request may take, unless a second signal
    cuts it off."""

    def __init__(self, app: Any, desk: ModelService, metrics: Metrics, listening: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=5,
            )
        )
        self.desk = desk
        self.metrics = metrics
        self.listening = listening
        self.cut_off = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.cut_off, self.should_exit = self.should_exit, True  # the signal is not raised again: it was obeyed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.desk.scheduler.close()
        late = time.monotonic() + self.desk.config.timeout
        while not self.cut_off and time.monotonic() < late and (self.metrics.open or not self.desk.scheduler.idle):
            await asyncio.sleep(POLL_SECONDS)
        late = time.monotonic() + DRAIN_SECONDS
        while not self.cut_off and time.monotonic() < late and self.metrics.streams:
            await asyncio.sleep(POLL_SECONDS)
        for connection in list(self.server_state.connections):  # pages hold streams of events open for ever
            connection.transport.close()
        await super().shutdown(sockets)
