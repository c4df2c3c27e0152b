"""Access log and Prometheus metrics: one line of JSON for each request, and counters.

Errors and warnings of one kind are logged once a minute: clients can cause as many as they like.
Metrics are labelled with models that exist, never with the name that a request asked for: clients
cannot fill the memory with labels. Prompts and outputs are logged only with `log_prompts`, and then
in full.
"""

import collections
import json
import logging
import secrets
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..inference.sequence import Sequence
from .error_responses import API_ENDPOINTS, error_response
from .middleware import is_api_path
from .scheduler import Request
from .service import ModelService

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left before the response
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds
REPEAT_SECONDS = 60.0
log = logging.getLogger("lora_tuner.server")


@dataclass
class RequestRecord:
    """One HTTP request, or one output on the page."""

    id: str = field(default_factory=lambda: secrets.token_hex(12))
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    code: str | None = None  # of the error
    model: str | None = None  # once it was found
    auto: bool = False  # the server has chosen it
    stream: bool = False
    user: str | None = None
    request: Request | None = None  # once it was queued
    prompts: object = None  # as the client sent them

    def log_failure(self, error: Exception) -> str:
        """Log an unexpected error with its traceback, and return a message without details."""
        self.code = type(error).__name__
        log.error("request %s", self.id, exc_info=error)
        return f"Internal error; the server's log has it as request {self.id}."

    @property
    def sequences(self) -> list[Sequence]:
        return [] if self.request is None else self.request.sequences

    @property
    def _prompts(self) -> list[Sequence]:
        """The first sequence of each prompt."""
        first: dict[int, Sequence] = {}
        for sequence in self.sequences:
            first.setdefault(id(sequence.prompt_ids), sequence)
        return list(first.values())

    @property
    def prompt_tokens(self) -> int:
        """The number of prompt tokens, each prompt counted once whatever `n` is."""
        return sum(len(sequence.prompt_ids) for sequence in self._prompts)

    @property
    def cached_tokens(self) -> int:
        """The number of prompt tokens that came from the prefix cache."""
        return sum(sequence.cached_tokens for sequence in self._prompts)

    @property
    def new_tokens(self) -> int:
        return sum(len(sequence.output_ids) for sequence in self.sequences)


class Metrics:
    """Metrics of one server.

    `open` is the number of API requests in progress, `streams` the number of event streams to
    pages.
    """

    def __init__(self, service: ModelService) -> None:
        self.open = self.streams = 0
        self.log_prompts = service.config.log_prompts
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "lora_tuner_requests",
            "Completed requests.",
            ("endpoint", "model", "status"),
            registry=registry,
        )
        self.tokens = Counter(
            "lora_tuner_tokens",
            "Prompt tokens and generated tokens.",
            ("model", "kind"),
            registry=registry,
        )
        self.cached_tokens = Counter(
            "lora_tuner_cached_prompt_tokens",
            "Prompt tokens that came from the prefix cache.",
            ("model",),
            registry=registry,
        )
        self.seconds = Histogram(
            "lora_tuner_request_seconds",
            "Time from a request to the end of its output.",
            ("model",),
            registry=registry,
            buckets=BUCKETS,
        )
        self.first_token_seconds = Histogram(
            "lora_tuner_first_token_seconds",
            "Time from a request to its first token.",
            ("model",),
            registry=registry,
            buckets=BUCKETS,
        )
        self.chosen = Counter(
            "lora_tuner_auto_chosen",
            "Models that were chosen for requests of model auto.",
            ("model",),
            registry=registry,
        )
        Gauge("lora_tuner_answers_waiting", "Sequences in the queue.", registry=registry).set_function(
            lambda: service.scheduler.waiting
        )
        Gauge("lora_tuner_answers_running", "Sequences in the batch.", registry=registry).set_function(
            lambda: service.scheduler.running
        )
        Gauge("lora_tuner_adapters_resident", "Adapters in memory.", registry=registry).set_function(
            lambda: len(service.generator.loaded_adapters)
        )

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def record(
        self,
        endpoint: str,
        record: RequestRecord,
        path: str,
        client: str | None = None,
        method: str | None = None,
    ) -> None:
        """Count a request and write its log line."""
        request, model = record.request, record.model or ""
        seconds = time.monotonic() - record.started
        self.requests.labels(endpoint, model, str(record.status)).inc()
        line: dict[str, object] = {
            "id": record.id,
            "client": client,
            "method": method,
            "path": path,
            "status": record.status,
            "code": record.code,
            "model": record.model,
            "auto": record.auto,
            "stream": record.stream,
            "user": record.user,
            "seconds": round(seconds, 3),
        }
        if request is not None:
            self.tokens.labels(model, "prompt").inc(record.prompt_tokens)
            self.tokens.labels(model, "completion").inc(record.new_tokens)
            self.cached_tokens.labels(model).inc(record.cached_tokens)
            self.seconds.labels(model).observe(seconds)
            line |= {
                "first_token_seconds": None,
                "answers": len(request.sequences),
                "complete": request.complete and not request.error,
                "prompt_tokens": record.prompt_tokens,
                "cached_tokens": record.cached_tokens,
                "completion_tokens": record.new_tokens,
            }
            if request.first_token is not None:
                first_token_seconds = request.first_token - record.started
                self.first_token_seconds.labels(model).observe(first_token_seconds)
                line["first_token_seconds"] = round(first_token_seconds, 3)
        if self.log_prompts:
            outputs = [sequence.settled_text for sequence in record.sequences] if request else None
            line |= {"prompts": record.prompts, "outputs": outputs}
        log.info(line)


@dataclass
class RequestLog:
    """ASGI middleware that records each API request, and answers 500 to unexpected errors.

    Routes fill in the record, which is `request.state.record`. HEAD is routed as GET, and a slash
    at the end of an endpoint is dropped."""

    app: ASGIApp
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_api_path(scope["path"]):
            await self.app(scope, receive, send)
            return
        record = scope.setdefault("state", {})["record"] = RequestRecord()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        routed = dict(scope)
        if scope["path"].removesuffix("/") in API_ENDPOINTS:
            routed["path"] = scope["path"].removesuffix("/")
        if scope["method"] == "HEAD":  # uvicorn leaves the body out
            routed["method"] = "GET"
        self.metrics.open += 1
        try:
            await self.app(routed, receive, send_with_id)
        except Exception as error:
            begun, record.status = bool(record.status), 500
            failure = error_response(500, record.log_failure(error))
            if begun:  # too late for another status: break the connection
                raise
            await failure(scope, receive, send_with_id)
        finally:
            record.status = record.status or CLIENT_CLOSED_REQUEST
            self.metrics.open -= 1
            client, _ = scope.get("client") or (None, None)
            # No route is set where none matched.
            endpoint = getattr(routed.get("route"), "path", "") or "other"
            self.metrics.record(endpoint, record, scope["path"][:200], client, scope["method"])


class JsonLines(logging.Formatter):
    """Formats each log record as one line of JSON, so that nothing a client sent can begin a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        line |= record.msg if isinstance(record.msg, Mapping) else {"message": record.getMessage().strip()}
        if repeated := getattr(record, "repeated", 0):
            line["repeated"] = repeated
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class RepeatFilter(logging.Filter):
    """Passes one warning or error of a kind each `REPEAT_SECONDS`, and counts the others.

    The kind is the place in the code that logs and the place that raised, never a text, so that
    clients cannot make new kinds. The next one that passes has the count as `repeated`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[object, float] = {}  # kind -> time of the last one that passed
        self._repeated: collections.Counter[object] = collections.Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        kind: object = (record.pathname, record.lineno, _raised_at(record))
        if record.created - self._passed.get(kind, -REPEAT_SECONDS) < REPEAT_SECONDS:
            self._repeated[kind] += 1
            return False
        self._passed[kind] = record.created
        record.repeated = self._repeated.pop(kind, 0)
        return True


def _raised_at(record: logging.LogRecord) -> tuple[object, ...]:
    """Return type and place of the exception of a log record."""
    if not record.exc_info or record.exc_info[2] is None:
        return ()
    *_, (frame, line) = traceback.walk_tb(record.exc_info[2])
    return record.exc_info[0], frame.f_code.co_filename, line
