"""What requests came to: a line of JSON each in the log, and figures for Prometheus.

Surprise: the label of a request is a model that was found, never the name that it asked for, so that no client fills the
memory with labels. Limit: prompts and answers are in the log only where that was asked for, and then in full.
"""

import datetime
import json
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .middleware import is_api_path
from .protocol import error_response
from .scheduler import Request
from .service import ModelService

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # that of `generate_latest`
CLIENT_CLOSED_REQUEST = 499  # as nginx calls it: the client left before there was an answer
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # bounds of what is counted together
log = logging.getLogger("lora_tuner.server")


@dataclass
class RequestRecord:
    """One request, or one answer on the page. `model` is set when it was found, `job` when work has begun."""

    id: str = field(default_factory=lambda: secrets.token_hex(12))
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    code: str | None = None  # of the error
    model: str | None = None
    stream: bool = False
    user: str | None = None
    request: Request | None = None
    prompts: Any = None  # the prompts or messages

    def failed(self, error: Exception) -> str:
        """Logs what nobody foresaw. All that a client is told of it."""
        self.code = type(error).__name__
        log.error("request %s", self.id, exc_info=error)
        return f"Something went wrong here; the log has it as request {self.id}."

    @property
    def prompt_tokens(self) -> int:
        """Of each prompt once, however many answers it gets."""
        return (
            sum({id(row.prompt_ids): len(row.prompt_ids) for row in self.request.sequences}.values())
            if self.request
            else 0
        )

    @property
    def new_tokens(self) -> int:
        return sum(len(row.output_ids) for row in self.request.sequences) if self.request else 0


class Metrics:
    """The figures of one server. `open` is how many requests to the API are being answered, `streams` in how many the page gets
    its answers."""

    def __init__(self, desk: ModelService) -> None:
        self.open = self.streams = 0
        self.log_prompts = desk.config.log_prompts
        self.registry = CollectorRegistry()
        self.requests = self._of(Counter, "requests", "Requests that were answered.", ("endpoint", "model", "status"))
        self.tokens = self._of(Counter, "tokens", "Tokens read and written.", ("model", "kind"))
        self.seconds = self._of(
            Histogram, "request_seconds", "From request to the end of its answer.", ("model",), BUCKETS
        )
        self.first = self._of(Histogram, "first_token_seconds", "From request to its first token.", ("model",), BUCKETS)
        self._of(Gauge, "answers_waiting", "Answers that wait.").set_function(lambda: desk.scheduler.waiting)
        self._of(Gauge, "answers_running", "Answers that are being written.").set_function(
            lambda: desk.scheduler.running
        )
        self._of(Gauge, "adapters_resident", "Adapters in memory.").set_function(
            lambda: len(desk.generator.loaded_adapters)
        )

    def _of(self, kind: Any, name: str, text: str, labels: tuple[str, ...] = (), bounds: Any = None) -> Any:
        return kind(
            f"lora_tuner_{name}", text, labels, registry=self.registry, **({"buckets": bounds} if bounds else {})
        )

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)

    def record(
        self, endpoint: str, record: RequestRecord, path: str, client: str | None = None, method: str | None = None
    ) -> None:
        """Count it, and write its line."""
        self._count(endpoint, record)
        log.info(self._line(record, {"client": client, "method": method, "path": path}))

    def _count(self, endpoint: str, record: RequestRecord) -> None:
        model = record.model or ""
        self.requests.labels(endpoint, model, str(record.status)).inc()
        if record.request is None:
            return
        self.tokens.labels(model, "prompt").inc(record.prompt_tokens)
        self.tokens.labels(model, "completion").inc(record.new_tokens)
        self.seconds.labels(model).observe(time.monotonic() - record.started)
        if record.request.first_token is not None:
            self.first.labels(model).observe(record.request.first_token - record.started)

    def _line(self, record: RequestRecord, request: Mapping[str, Any]) -> Mapping[str, Any]:
        job = record.request
        facts = {
            "id": record.id,
            **request,
            "status": record.status,
            "code": record.code,
            "model": record.model,
            "stream": record.stream,
            "user": record.user,
            "seconds": round(time.monotonic() - record.started, 3),
        }
        if job is not None:
            first = round(job.first_token - record.started, 3) if job.first_token is not None else None
            facts |= {
                "first_token_seconds": first,
                "answers": len(job.sequences),
                "complete": job.complete and not job.error,
            }
            facts |= {"prompt_tokens": record.prompt_tokens, "completion_tokens": record.new_tokens}
        if self.log_prompts:
            facts |= {"asked": record.prompts, "answered": [row.settled_text for row in job.sequences] if job else None}
        return facts


class RequestLog:
    """Around the app: keeps a `Record` of each request to the API, which what answers fills in as `request.state.record`, and
    says where one has failed."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_api_path(scope["path"]):
            await self.app(scope, receive, send)
            return
        record = scope.setdefault("state", {})["record"] = RequestRecord()

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        self.metrics.open += 1
        try:
            await self.app(scope, receive, seen)
        except Exception as error:
            begun, record.status = bool(record.status), 500
            failure = error_response(500, record.failed(error))
            if begun:  # it can only break off
                raise
            await failure(scope, receive, seen)
        finally:
            record.status = record.status or CLIENT_CLOSED_REQUEST
            self.metrics.open -= 1
            route = scope.get("route")  # absent where none fits
            client, _ = scope.get("client") or (None, None)
            endpoint = getattr(route, "path", "") or "other"
            self.metrics.record(endpoint, record, scope["path"][:200], client, scope["method"])


class JsonLines(logging.Formatter):
    """A line of JSON for each record, whoever it is from; so what clients send begins no line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        facts |= record.msg if isinstance(record.msg, Mapping) else {"message": record.getMessage().strip()}
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        return json.dumps(facts)
