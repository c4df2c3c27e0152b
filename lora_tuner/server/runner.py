"""Start the server, and shut it down when a signal arrives.

The port is bound before the model is loaded, so that a port in use is reported at once. During
shutdown the server keeps listening, to answer 503, until the last response was sent. One process
only: several would share no batches.
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

import uvicorn
from starlette.types import ASGIApp

from ..adapters.adapter import Adapter
from ..adapters.library import Library
from ..config import ModelOptions, ServerConfig
from ..errors import ConfigError, EventHandler, Interrupted, Notice
from ..inference.generator import Generator
from ..signals import HANGUP, TERMINATION, handle_signals
from .metrics import JsonLines, Metrics
from .middleware import is_loopback
from .playground.app import mount
from .routes import create_app
from .service import ModelService

POLL_SECONDS = 0.05  # between two checks for running requests
DRAIN_SECONDS = 2.0  # for the last output to reach the page


def serve(
    adapters: Sequence[str | Path],
    settings: ServerConfig,
    *,
    options: ModelOptions = ModelOptions(),
    adapters_dir: Path = Path("adapters"),
    browse: bool = False,
) -> None:
    """Serve the base and adapters until SIGINT, SIGTERM or SIGHUP.

    Args:
        adapters: names or paths; empty means all of the library, as it is at each request.
        settings: address and limits.
        options: base model; by default the one that most adapters name.
        adapters_dir: the library.
        browse: open the playground in a browser.

    Raises:
        ConfigError: the address cannot be used, or needs an API key.
        Interrupted: a second signal ended the server before all requests were complete.
    """
    if settings.api_key is None and not is_loopback(settings.host):
        raise ConfigError(
            f"--host {settings.host} can be reached from other machines: set --api-key or LORA_TUNER_API_KEY."
        )
    if settings.api_key is not None and not re.fullmatch("[!-~]+", settings.api_key):
        raise ConfigError("--api-key: use printable ASCII characters without spaces, as it is sent in a header.")
    if settings.api_key is None and "*" in settings.allow_origin:
        options.notify(
            Notice(
                "--allow-origin * without --api-key: any web page that is open on this machine can use the models."
            )
        )
    library = Library(adapters_dir)
    library.names()  # report a folder that cannot be read at once
    only = [adapter.path for adapter in library.get_all(adapters)]
    if not only and options.base is None:
        options = _with_most_common_base(library, options)
    with _bind_socket(settings.host, settings.port) as listener:
        generator = Generator(
            *only, options=options, adapters_dir=adapters_dir, max_resident=settings.max_resident
        )
        generator.set_adapter(None)  # the adapter in use never leaves memory
        service = ModelService(generator, settings, [Path(os.path.abspath(path)) for path in only])
        app = create_app(service)
        url = _url(settings.host, listener)

        def on_listening() -> None:
            count = sum(model.broken is None for model in service.list_models()) - 1
            plural = "" if count == 1 else "s"
            options.notify(
                Notice(
                    f"Listening on {url}: base {service.name} and {count:,} adapter{plural}. "
                    f"OpenAI-compatible API: {url}/v1"
                )
            )
            if browse:
                threading.Thread(target=_open_browser, args=(url, options.notify), daemon=True).start()

        _configure_logging()
        service.start()
        try:
            server = _Server(mount(app, service, settings.api_key), service, app.state.metrics, on_listening)
            with handle_signals(TERMINATION, server.handle_exit):  # uvicorn does not handle SIGHUP
                server.run(sockets=[listener])
        finally:
            service.stop()
    if server.interrupted:
        raise Interrupted("Stopped at once: running requests were cut off.")


def _with_most_common_base(library: Library, options: ModelOptions) -> ModelOptions:
    """Select the base that most adapters of the library were trained on."""
    adapters = [adapter for _, adapter in library.entries() if isinstance(adapter, Adapter) and adapter.base]
    counts = Counter((adapter.base, adapter.revision) for adapter in adapters)
    if not counts:
        return options
    (base, revision), count = counts.most_common(1)[0]
    text = f"Using base {base}, which {count:,} of {len(adapters):,} adapters in {library.path} were trained on"
    if count < len(adapters):
        text += "; the others are not served. Use --base to select another"
    options.notify(Notice(f"{text}."))
    return replace(options, base=base, revision=options.revision or revision)


def _bind_socket(host: str, port: int) -> socket.socket:
    """Listen on an address. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (")[0]
        raise ConfigError(
            f"Cannot listen on {host}, port {port}: {reason}. Use another --port, or 0 for any free one."
        ) from error


def _url(host: str, listener: socket.socket) -> str:
    """Return the URL for a browser on this machine, which cannot open a wildcard address."""
    address, port = listener.getsockname()[:2]
    if ipaddress.ip_address(address).is_unspecified:
        host = "::1" if ":" in address else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _open_browser(url: str, notify: EventHandler) -> None:
    if not webbrowser.open(url):
        notify(Notice(f"No browser found: open {url} yourself."))


def _configure_logging() -> None:
    """Log as JSON lines on stderr: requests, and warnings of libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)
    logging.getLogger("lora_tuner.server").setLevel(logging.INFO)


class _Server(uvicorn.Server):
    """uvicorn's server with a graceful shutdown.

    Running and waiting requests are completed, within the timeout of a request; a second signal
    cuts them off.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: ModelService,
        metrics: Metrics,
        on_listening: Callable[[], None],
    ) -> None:
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
        self.service = service
        self.metrics = metrics
        self.on_listening = on_listening
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's: that would raise the signal again after a graceful shutdown.
        if sig != HANGUP:  # a terminal that is closed sends several
            self.interrupted = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        scheduler = self.service.scheduler
        scheduler.close()
        await self._wait_while(lambda: bool(self.metrics.open) or not scheduler.idle, self.service.config.timeout)
        await self._wait_while(lambda: bool(self.metrics.streams), DRAIN_SECONDS)
        for connection in list(self.server_state.connections):  # pages keep event streams open
            connection.transport.close()
        await super().shutdown(sockets)

    async def _wait_while(self, busy: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.interrupted and time.monotonic() < deadline and busy():
            await asyncio.sleep(POLL_SECONDS)
