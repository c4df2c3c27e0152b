"""The routes of the API: models, completions, chat completions, health and metrics.

A broken adapter is reported as a model that was not found (404, with the reason), so that clients
do not retry. An error within a stream is sent as an event, since the status is already out.
"""

import asyncio
import datetime
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from functools import lru_cache, partial
from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..adapters.adapter import Adapter
from ..data.readers import unique_keys
from ..errors import (
    AdapterError,
    ContextLengthError,
    LoraTunerError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
    ServerClosingError,
    UnknownModelError,
)
from ..text import display_name, format_count
from . import neutral
from .metrics import CLIENT_CLOSED_REQUEST, Metrics, RequestLog, RequestRecord
from .middleware import API_ENDPOINTS, CrossOriginMiddleware, SecurityMiddleware
from .protocol import (
    ALTERNATIVES,
    AdapterInfo,
    ChatRequest,
    CompletionRequest,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    StreamOptions,
    error_response,
)
from .responses import (
    CHAT,
    COMPLETION,
    ChatCompletion,
    Completion,
    EndpointFormat,
    OutputDelta,
    OutputReader,
    ResponseFields,
    TokenSpeller,
    Usage,
    token_text,
)
from .scheduler import Request
from .service import ModelService, ServedModel

TOKEN_TEXT_CACHE = 16_384  # tokens whose text is cached; a few MB
MAX_LOGPROBS = 100_000  # of a request: one takes about 1 KB while the response is formatted
CLOSING_RETRY_SECONDS = 5  # by then another server may answer

_STATUS: tuple[tuple[type[LoraTunerError], int, str | None], ...] = (  # the first match counts
    (UnknownModelError, 404, "model_not_found"),
    (AdapterError, 404, "model_broken"),
    (QueueFullError, 429, "rate_limit_exceeded"),
    (ServerClosingError, 503, "stopping"),
    (RequestTimeoutError, 504, "timeout"),
    (ContextLengthError, 400, "context_length_exceeded"),
    (LoraTunerError, 400, None),
)


def create_app(service: ModelService) -> FastAPI:
    """Create the API. The service may be started later."""
    metrics = Metrics(service)
    app = FastAPI(
        title="lora_tuner",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={
            "4XX": {"model": ErrorResponse, "description": "Error in the request."},
            "5XX": {"model": ErrorResponse, "description": "Error of the server, or shutdown."},
        },
        middleware=[
            Middleware(CrossOriginMiddleware, settings=service.config),
            Middleware(RequestLog, metrics=metrics),
            Middleware(SecurityMiddleware, settings=service.config),
        ],
        exception_handlers={
            HTTPException: _http_error,
            RequestValidationError: _validation_error,
            LoraTunerError: partial(_lora_tuner_error, service),
        },
    )
    app.state.metrics = metrics
    spell = lru_cache(TOKEN_TEXT_CACHE)(partial(token_text, service.base.tokenizer))
    routes = APIRouter(
        dependencies=[Security(HTTPBearer(auto_error=False))] if service.config.api_key else [],
        route_class=_StrictJSONRoute,
    )
    event_stream = partial(
        routes.post,
        responses={200: {"content": {"text/event-stream": {}}, "description": "The output."}},
    )

    @app.get("/health", response_model=Health)
    async def health() -> Response | Health:
        """Report that requests are accepted."""
        if not service.scheduler.accepting:
            return error_response(503, "The server is shutting down.", code="stopping")
        return Health(status="ok", base=service.name)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Counters, queue length and latencies for Prometheus."""
        return Response(await service.run_in_thread("metrics", metrics.text), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @lru_cache(1)
    def format_list(models: tuple[ServedModel, ...]) -> str:
        return ModelList(data=[_model_card(service, model) for model in models]).model_dump_json()

    @routes.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """List the base and every adapter, broken ones with the reason."""
        listed = await service.run_in_thread("list", lambda: format_list(service.list_models()))
        return Response(listed, media_type="application/json")

    @routes.get("/v1/models/{id:path}")
    async def model(id: str) -> ModelCard:
        """Describe one model."""
        return _model_card(service, await service.run_in_thread("list", partial(service.get_model, id)))

    @event_stream("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, http_request: HTTPRequest) -> Response:
        """Continue one or several prompts; as server-sent events with `stream`."""
        http_request.state.record.prompts = body.prompt
        return await _generate(service, COMPLETION, spell, body, http_request)

    @event_stream("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, http_request: HTTPRequest) -> Response:
        """Answer a conversation, if the base has a chat template."""
        http_request.state.record.prompts = body.prompts[0]
        return await _generate(service, CHAT, spell, body, http_request)

    app.include_router(routes)
    app.mount("/v1", partial(_not_found, routes.routes))  # else the playground at / would answer
    return app


class _StrictJSONRequest(HTTPRequest):
    async def json(self) -> object:
        try:
            return json.loads(await self.body(), object_pairs_hook=unique_keys)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"The body is not valid JSON: {error}.") from error


class _StrictJSONRoute(APIRoute):
    """Refuses a body in which an object names a key twice: readers of JSON differ in which they take."""

    def get_route_handler(self) -> Callable[[HTTPRequest], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: HTTPRequest) -> Response:
            return await handle(_StrictJSONRequest(request.scope, request.receive))

        return handle_strictly


async def _not_found(routes: Sequence[BaseRoute], scope: Scope, receive: Receive, send: Send) -> None:
    """Raise 405 for a path that takes another method, else 404."""
    full_scope = dict(scope, root_path=scope.get("app_root_path", ""))
    matches = [route for route in routes if route.matches(full_scope)[0] is Match.PARTIAL]
    methods = sorted({method for route in matches for method in getattr(route, "methods", ())})
    raise (HTTPException(405, headers={"Allow": ", ".join(methods)}) if methods else HTTPException(404))


async def _http_error(request: HTTPRequest, error: HTTPException) -> Response:
    status, path = error.status_code, request.url.path[:200]
    messages = {
        404: f"There is nothing at {path}: the API has {', '.join(API_ENDPOINTS)}.",
        405: f"{path} does not support {request.method}.",
    }
    return error_response(status, messages.get(status, str(error.detail)), error.headers)


async def _validation_error(request: HTTPRequest, error: RequestValidationError) -> Response:
    """Report all problems of a request, grouped by field."""
    known_fields = neutral.CHAT if request.url.path.startswith("/v1/chat/") else neutral.COMPLETION
    problems: dict[str, dict[str, None]] = {}  # the inner one is an ordered set of texts
    for problem in error.errors()[:50]:
        location, kind = problem["loc"][1:], problem["type"]
        field, text = _field_path(location), problem["msg"]
        if kind == "json_invalid":
            field, text = "", f"The body is not valid JSON: {problem['ctx']['error']}, at character {location[0]}"
        elif kind == "extra_forbidden":
            text = neutral.refusal(known_fields if len(location) == 1 else neutral.NESTED, str(location[-1]))
        elif not field:
            text = "The body should be a JSON object, sent with the header Content-Type: application/json"
        problems.setdefault(field, {})[text] = None
    lines = [
        f"{field}: {', or '.join(texts)}" if field else next(iter(texts)) for field, texts in problems.items()
    ]
    return error_response(400, f"{'; '.join(lines)}.", param=next(iter(problems)) or None)


def _field_path(location: Sequence[int | str]) -> str:
    """Write a location in a request as OpenAI does: `messages[2].content`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in ALTERNATIVES:
            path += f".{part[:100]}" if path else part[:100]
    return path


async def _lora_tuner_error(service: ModelService, request: HTTPRequest, error: Exception) -> JSONResponse:
    """Describe an error. The text of an unexpected one goes into the log alone."""
    record: RequestRecord = request.state.record
    matches = ((status, code) for kind, status, code in _STATUS if isinstance(error, kind))
    status, code = next(matches, (500, None))
    if status == 500:
        text = record.log_failure(error)
    else:
        text = str(error) if isinstance(error, UnknownModelError) else service.hide_paths(str(error))
        record.code = code or type(error).__name__
    seconds = error.seconds if isinstance(error, QueueFullError) else CLOSING_RETRY_SECONDS
    headers = {"Retry-After": str(seconds)} if status in (429, 503) else None
    param = "model" if isinstance(error, AdapterError) else getattr(error, "param", None)
    return error_response(status, text, headers, param=param, code=code)


def _model_card(service: ModelService, model: ServedModel) -> ModelCard:
    info = _adapter_info(service, model.adapter) if model.adapter is not None else None
    created = _timestamp(info.created) if info is not None else None
    return ModelCard(
        id=model.id,
        created=service.created if created is None else created,
        parent=service.name if model.path else None,
        broken=service.hide_paths(model.broken) if model.broken else None,
        lora_tuner=info,
    )


def _adapter_info(service: ModelService, adapter: Adapter) -> AdapterInfo:
    info = AdapterInfo(
        rank=adapter.rank,
        alpha=adapter.config["lora_alpha"],
        targets=adapter.targets,
        parameters=adapter.parameters,
        bytes=adapter.bytes,
    )
    manifest = adapter.manifest
    if manifest is not None:
        info.parents = [parent.name for parent in manifest.parents]
        info.result = manifest.result
        info.made_by = service.hide_paths(manifest.made_by) if manifest.made_by else None
        info.created = None if _timestamp(manifest.created) is None else manifest.created
        if manifest.data:
            info.dataset, info.rows = display_name(manifest.data.name), manifest.data.counts
    return info


def _timestamp(created: str | None) -> int | None:
    try:
        return int(datetime.datetime.fromisoformat(created or "").timestamp())
    except (ValueError, OverflowError):  # missing, or edited by hand
        return None


async def _generate(
    service: ModelService,
    endpoint: EndpointFormat,
    spell: TokenSpeller,
    body: CompletionRequest | ChatRequest,
    http_request: HTTPRequest,
) -> Response:
    record: RequestRecord = http_request.state.record
    record.user, record.stream = body.user, body.stream
    count = body.n * len(body.prompts)
    capacity = service.config.max_batch + service.config.max_waiting
    if count > capacity:
        raise RequestError(
            f"n: {format_count(count, 'output')} requested, the limit of this server is {capacity:,}.", "n"
        )
    prepared = await service.prepare_request(body.model, body.prompts, body.n)
    record.model = body.model  # only now, so that no client fills the metrics with labels
    if prepared.lora is not None and prepared.lora.tokenizer is not None:
        spell = lru_cache(TOKEN_TEXT_CACHE)(partial(token_text, prepared.lora.tokenizer))
    max_tokens = service.max_new_tokens(prepared.prompts, body.requested_tokens)
    num_logprobs = 0 if body.num_top_logprobs is None else count * max_tokens * (1 + body.num_top_logprobs)
    if num_logprobs > MAX_LOGPROBS:
        field = "top_logprobs" if isinstance(body, ChatRequest) else "logprobs"
        raise RequestError(
            f"{field}: {format_count(count, 'output')} of up to {format_count(max_tokens, 'token')}, with "
            f"{body.num_top_logprobs} alternatives for each token, have {num_logprobs:,} "
            f"log-probabilities; the limit of this server is {MAX_LOGPROBS:,}. Lower {field}, n "
            "or max_tokens.",
            field,
        )
    request = record.request = service.submit(
        prepared,
        body.sampling(max_tokens),
        started=record.started,
        n=body.n,
        top_logprobs=body.num_top_logprobs,
    )
    fields = ResponseFields(
        id=f"{endpoint.id_prefix}{record.id}",
        created=int(time.time()),
        model=body.model,
        system_fingerprint=f"fp_{service.base.files.fingerprint[:12]}",
    )
    if body.stream:
        events = _server_sent_events(
            service,
            endpoint,
            spell,
            request,
            fields,
            http_request,
            (body.stream_options or StreamOptions()).include_usage,
        )
        return _EventStream(events, service, request)
    if not await _wait_for(service, request, http_request):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if request.error is not None:
        raise request.error

    def to_json() -> str:
        fields.usage = _usage(record)
        outputs = _next_deltas([OutputReader(sequence) for sequence in request.sequences])
        return endpoint.response(fields, outputs, spell).model_dump_json()

    # Many log-probabilities take long to format, which would hold up other connections.
    body_json = to_json() if num_logprobs == 0 else await service.run_in_thread("format", to_json)
    return Response(body_json, media_type="application/json")


def _next_deltas(readers: list[OutputReader]) -> dict[int, OutputDelta]:
    deltas = {index: reader.next_delta() for index, reader in enumerate(readers)}
    return {index: delta for index, delta in deltas.items() if delta is not None}


async def _wait_for(service: ModelService, request: Request, http_request: HTTPRequest) -> bool:
    """Wait until the request is complete (True) or the client disconnects, which cancels it."""

    async def follow_output() -> None:
        async with aclosing(service.watch(request)) as updates:
            async for _ in updates:
                pass

    async def wait_for_disconnect() -> None:
        while (await http_request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(follow_output()), asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return request.complete
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _server_sent_events(
    service: ModelService,
    endpoint: EndpointFormat,
    spell: TokenSpeller,
    request: Request,
    fields: ResponseFields,
    http_request: HTTPRequest,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Yield an event for each delta, then the usage if it is wanted, then [DONE]."""

    def event(outputs: dict[int, OutputDelta]) -> str:
        chunk = endpoint.chunk(fields, outputs, spell)
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"

    if include_usage:
        fields.usage = None  # in every chunk but the last
    readers = [OutputReader(sequence) for sequence in request.sequences]
    try:
        async with aclosing(service.watch(request)) as updates:
            async for _ in updates:
                if request.error is not None:
                    raise request.error
                for index, delta in _next_deltas(readers).items():
                    yield event({index: delta})
    except Exception as error:
        failure = await _lora_tuner_error(service, http_request, error)
        yield f"data: {bytes(failure.body).decode()}\n\n"
        return
    if include_usage:
        fields.usage = _usage(http_request.state.record)
        yield event({})
    yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events for one client; its request is cancelled when the client disconnects."""

    def __init__(self, events: AsyncIterator[str], service: ModelService, request: Request) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",  # nginx would buffer them
            },
        )
        self.cancel = partial(service.scheduler.cancel, request)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.cancel()


def _usage(record: RequestRecord) -> Usage:
    return Usage(
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.new_tokens,
        total_tokens=record.prompt_tokens + record.new_tokens,
    )
