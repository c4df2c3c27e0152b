"""Start the server, limit what clients hold open, and shut down when a signal arrives.

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
import sys
import threading
import time
import webbrowser
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import psutil
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..adapters.adapter import Adapter
from ..adapters.library import Library
from ..config import ModelOptions, ServerConfig
from ..errors import ConfigError, EventHandler, Interrupted, Notice
from ..inference.generator import Generator
from ..training import jobs
from ..training.signals import HANGUP, TERMINATION, handle_signals
from .metrics import JsonLines, Metrics, RepeatFilter
from .middleware import MAX_SECONDS, is_loopback
from .routes import create_app
from .service import ModelService

POLL_SECONDS = 0.05  # between two checks for running requests
MODEL_LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "peft", "torch", "transformers")
DRAIN_SECONDS = 2.0  # for the last output to reach the page
BACKLOG = 32  # connections that the system accepts for the server; asyncio opens as many at once
SPARE_FILES = 16  # for adapters and the like


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
    from .playground.app import mount  # Gradio takes seconds to import

    library = Library(adapters_dir)
    library.names()  # report folders that cannot be read at once
    jobs.list_jobs(settings.runs_dir)
    only = [adapter.path for adapter in library.get_all(adapters)]
    if not only and options.base is None:
        options = _with_most_common_base(library, options)
    with _bind_socket(settings.host, settings.port) as listener:
        generator = Generator(
            *only, options=options, adapters_dir=adapters_dir, max_resident=settings.max_resident
        )
        generator.set_adapter(None)  # the adapter in use never leaves memory
        settings = _fit_connections(settings, options.notify)
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
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
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


def _fit_connections(settings: ServerConfig, notify: EventHandler) -> ServerConfig:
    """Lower `max_connections` to what the limit on open files allows.

    A connection may read a file of the page, so it counts twice. Raises ConfigError.
    """
    if sys.platform == "win32":  # no such limit
        return settings
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return settings
    used = psutil.Process().num_fds() + BACKLOG + SPARE_FILES
    possible, least = (limit - used) // 2, 4
    if possible < least:
        raise ConfigError(
            f"A process may open {limit:,} files here, too few for a server: raise the limit with "
            f"`ulimit -n {used + 2 * settings.max_connections}`."
        )
    if possible >= settings.max_connections:
        return settings
    notify(
        Notice(
            f"A process may open {limit:,} files here, so at most {possible:,} connections are "
            f"open at once, not {settings.max_connections:,}: for more, use `ulimit -n "
            f"{used + 2 * settings.max_connections}`."
        )
    )
    return settings.model_copy(update={"max_connections": possible})


def _configure_logging() -> None:
    """Log as JSON lines on stderr: requests, and warnings of libraries, but for those on models."""
    logging.disable(logging.NOTSET)  # the command line has disabled warnings
    for name in MODEL_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(True)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    handler.addFilter(RepeatFilter())
    logging.getLogger().addHandler(handler)
    logging.getLogger("lora_tuner.server").setLevel(logging.INFO)


class _Connection(H11Protocol):
    """HTTP connection that is closed when its client keeps the server waiting for too long.

    That is `MAX_SECONDS` for sending headers, and for reading the next part of a response. Beyond
    `max_connections` the connection that waits for its client for longest is closed; if there is
    none, uvicorn answers requests with status 503.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # uvicorn's own
        super().connection_made(transport)
        self.changed_at = self.loop.time()
        self.state: tuple[object, ...] = ()
        if self.limit_concurrency is None or len(self.connections) < self.limit_concurrency:
            return
        others = [other for other in self.connections if isinstance(other, _Connection) and other is not self]
        waiting = [other for other in others if other.waits_for_client]
        if waiting:
            min(waiting, key=lambda other: other.changed_at).abort()

    @property
    def has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def waits_for_client(self) -> bool:
        body_missing = self.has_request and self.cycle.more_body
        return not self.has_request or body_missing or self.transport.get_write_buffer_size() > 0

    def check_progress(self) -> None:
        """Close the connection if nothing has changed for too long. To be called about every second."""
        unread = self.transport.get_write_buffer_size()
        state = self.cycle, self.has_request, unread
        if state != self.state:
            self.state, self.changed_at = state, self.loop.time()
        elif (unread or not self.has_request) and self.loop.time() - self.changed_at > MAX_SECONDS:
            self.abort()

    def abort(self) -> None:
        self.connections.discard(self)  # at once, so that its place is free
        self.transport.abort()  # `close` would wait until the client has read everything


class _Server(uvicorn.Server):
    """uvicorn's server with limits on connections and a graceful shutdown.

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
                http=_Connection,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                # uvicorn refuses from there on.
                limit_concurrency=service.config.max_connections + 1,
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

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # every second
            for connection in list(self.server_state.connections):
                assert isinstance(connection, _Connection)
                connection.check_progress()
        return await super().on_tick(counter)

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
