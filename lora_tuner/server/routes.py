"""The routes of the API: models, completions, chat completions, health and metrics.

A broken adapter is reported as a model that was not found (404, with the reason), so that clients
do not retry. An error within a stream is sent as an event, since the status is already out.
"""

import asyncio
import datetime
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import lru_cache, partial

from fastapi import APIRouter, FastAPI, Security
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..adapters.adapter import Adapter
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
from ..text import display_name
from .metrics import CLIENT_CLOSED_REQUEST, CONTENT_TYPE, Metrics, RequestLog, RequestRecord
from .middleware import SecurityMiddleware
from .protocol import (
    AdapterInfo,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    ResponseFields,
    Usage,
    error_body,
    error_response,
)
from .responses import (
    CHAT,
    COMPLETION,
    EndpointFormat,
    OutputDelta,
    OutputReader,
    TokenSpeller,
    token_text,
)
from .scheduler import Request
from .service import ModelService, ServedModel

TOKEN_TEXT_CACHE = 16_384  # tokens whose text is cached; a few MB
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
    )
    metrics = app.state.metrics = Metrics(service)
    app.add_middleware(SecurityMiddleware, settings=service.config)
    app.add_middleware(RequestLog, metrics=metrics)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(LoraTunerError, partial(_lora_tuner_error, service))
    spell = lru_cache(TOKEN_TEXT_CACHE)(partial(token_text, service.base.tokenizer))
    routes = APIRouter(dependencies=[Security(HTTPBearer(auto_error=False))] if service.config.api_key else [])
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
        return Response(await service.run_in_thread(metrics.text), media_type=CONTENT_TYPE)

    @routes.get("/v1/models")
    async def models() -> ModelList:
        """List the base and every adapter, broken ones with the reason."""
        served = await service.run_in_thread(service.list_models)
        return ModelList(object="list", data=[_model_card(service, model) for model in served])

    @routes.get("/v1/models/{id:path}")
    async def model(id: str) -> ModelCard:
        """Describe one model."""
        return _model_card(service, await service.run_in_thread(partial(service.get_model, id)))

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


async def _not_found(routes: Sequence[BaseRoute], scope: Scope, receive: Receive, send: Send) -> None:
    """Raise 405 for a path that takes another method, else 404."""
    full_scope = dict(scope, root_path=scope.get("app_root_path", ""))
    matches = [route for route in routes if route.matches(full_scope)[0] is Match.PARTIAL]
    methods = sorted({method for route in matches for method in getattr(route, "methods", ())})
    raise (HTTPException(405, headers={"Allow": ", ".join(methods)}) if methods else HTTPException(404))


async def _http_error(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, path = str(error.detail), request.url.path[:200]
    if error.status_code == 404:
        message = f"There is nothing at {path}."
    elif error.status_code == 405:
        message = f"{path} does not support {request.method}."
    return error_response(error.status_code, message, error.headers)


async def _validation_error(request: HTTPRequest, error: Exception) -> Response:
    """Report all problems of a request, grouped by field."""
    assert isinstance(error, RequestValidationError)
    problems: dict[str, list[str]] = {}
    for problem in error.errors()[:50]:
        location, text = problem["loc"], problem["msg"]
        field = location[1] if len(location) > 1 and problem["type"] != "json_invalid" else ""
        if problem["type"] == "extra_forbidden":
            text = "unknown field"
        texts = problems.setdefault(str(field)[:100], [])
        if text not in texts:
            texts.append(text)
    lines = [f"{field}: {', or '.join(texts)}" if field else texts[0] for field, texts in problems.items()]
    return error_response(400, f"{'; '.join(lines)}.", param=next(iter(problems)) or None)


async def _lora_tuner_error(service: ModelService, request: HTTPRequest, error: Exception) -> Response:
    status, failure, headers = _describe_error(service, error, request.state.record)
    return error_response(status, failure.error.message, headers, **failure.error.model_dump(exclude={"message"}))


def _describe_error(
    service: ModelService, error: Exception, record: RequestRecord
) -> tuple[int, ErrorResponse, dict[str, str]]:
    """Return status, body and headers. The text of an unexpected error goes into the log alone."""
    status, code = next(((status, code) for kind, status, code in _STATUS if isinstance(error, kind)), (500, None))
    headers: dict[str, str] = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(error.seconds)
    elif isinstance(error, ServerClosingError):
        headers["Retry-After"] = str(CLOSING_RETRY_SECONDS)
    if status == 500:
        text = record.log_failure(error)
    else:
        text = str(error) if isinstance(error, UnknownModelError) else service.hide_paths(str(error))
        record.code = code or type(error).__name__
    param = "model" if isinstance(error, AdapterError) else getattr(error, "param", None)
    error_type = "rate_limit_error" if status == 429 else None
    return status, error_body(status, text, type=error_type, param=param, code=code), headers


def _model_card(service: ModelService, model: ServedModel) -> ModelCard:
    info = _adapter_info(service, model.adapter) if model.adapter is not None else None
    created = _timestamp(info.created) if info is not None else None
    return ModelCard(
        id=model.id,
        object="model",
        created=service.created if created is None else created,
        owned_by="lora_tuner",
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
    if manifest is None:
        return info
    info.parents = [parent.name for parent in manifest.parents]
    info.result = manifest.result
    if manifest.made_by:
        info.made_by = service.hide_paths(manifest.made_by)
    if manifest.data:
        info.dataset, info.rows = display_name(manifest.data.name), manifest.data.counts
    if _timestamp(manifest.created) is not None:
        info.created = manifest.created
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
    count, capacity = (
        body.n * len(body.prompts),
        service.config.max_batch + service.config.max_waiting,
    )
    if count > capacity:
        raise RequestError(f"n: {count:,} outputs were requested, the limit of this server is {capacity:,}.", "n")
    prepared = await service.prepare(body.model, body.prompts, body.n)
    record.model = body.model  # only now, so that no client fills the metrics with labels
    max_tokens = service.max_new_tokens(prepared.prompts, body.requested_tokens)
    request = record.request = service.submit(
        prepared,
        body.sampling(max_tokens),
        started=record.started,
        n=body.n,
        top_logprobs=body.num_top_logprobs,
    )
    fields: ResponseFields = {
        "id": f"{endpoint.id_prefix}{record.id}",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": f"fp_{service.base.files.fingerprint[:12]}",
    }
    if body.stream:
        events = _server_sent_events(service, endpoint, spell, request, fields, record, body.include_usage)
        return _EventStream(events, service, request)
    if not await _wait_for(service, request, http_request):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if request.error is not None:
        raise request.error

    def to_json() -> str:
        outputs = _next_deltas([OutputReader(sequence) for sequence in request.sequences])
        return endpoint.response({**fields, "usage": _usage(record)}, outputs, spell).model_dump_json()

    # Many log-probabilities take long to format, which would hold up other connections.
    return Response(await asyncio.to_thread(to_json), media_type="application/json")


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
    record: RequestRecord,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Yield an event for each delta, then the usage if it is wanted, then [DONE]."""

    def event(outputs: dict[int, OutputDelta]) -> str:
        chunk = endpoint.chunk(fields, outputs, spell)
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"

    if include_usage:
        fields["usage"] = None  # in every chunk but the last
    readers = [OutputReader(sequence) for sequence in request.sequences]
    try:
        async with aclosing(service.watch(request)) as updates:
            async for _ in updates:
                if request.error is not None:
                    raise request.error
                for index, delta in _next_deltas(readers).items():
                    yield event({index: delta})
    except Exception as error:
        _, failure, _ = _describe_error(service, error, record)
        yield f"data: {failure.model_dump_json()}\n\n"
        return
    if include_usage:
        fields["usage"] = _usage(record)
        yield event({})
    yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events for one client; its request is cancelled when the client disconnects."""

    def __init__(self, events: AsyncIterator[str], service: ModelService, request: Request) -> None:
        headers = {
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }  # nginx would buffer them
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.cancel = partial(service.scheduler.cancel, request)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.cancel()


def _usage(record: RequestRecord) -> Usage:
    prompt_tokens, new_tokens = record.prompt_tokens, record.new_tokens
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=new_tokens,
        total_tokens=prompt_tokens + new_tokens,
    )
