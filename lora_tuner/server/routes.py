"""The routes: models, completions, chats, health and figures, as OpenAI's clients call them.

A stream is read from the row that is being written, as far as it has come. Surprise: an adapter that is broken is a model
that was not found (404), with its reason, for asking again does not help. Limit: an error within a stream comes as an event,
since its status has been sent.
"""

import asyncio
import datetime
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import lru_cache, partial
from typing import Any

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
    Usage,
    error_body,
    error_response,
)
from .responses import CHAT, COMPLETION, EndpointFormat, OutputReader, TokenSpeller, token_text
from .scheduler import Request
from .service import ModelService, ServedModel

TOKEN_TEXT_CACHE = 16_384  # tokens whose spelling is kept; a few MB
STOPPING_SECONDS = 5  # after which another server may answer

_STATUS: tuple[tuple[type[LoraTunerError], int, str | None], ...] = (  # the first that fits
    (UnknownModelError, 404, "model_not_found"),
    (AdapterError, 404, "model_broken"),
    (QueueFullError, 429, "rate_limit_exceeded"),
    (ServerClosingError, 503, "stopping"),
    (RequestTimeoutError, 504, "timeout"),
    (ContextLengthError, 400, "context_length_exceeded"),
    (LoraTunerError, 400, None),
)
_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request is at fault."},
    "5XX": {"model": ErrorResponse, "description": "The server is at fault, or stops."},
}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}, "description": "The answer."}}


def create_app(desk: ModelService) -> FastAPI:
    """The API over a desk that has been started, or will be."""
    app = FastAPI(
        title="lora_tuner",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERROR_RESPONSES,
    )
    metrics = app.state.metrics = Metrics(desk)
    app.add_middleware(SecurityMiddleware, settings=desk.config)
    app.add_middleware(RequestLog, metrics=metrics)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(LoraTunerError, partial(_lora_tuner_error, desk))
    spelt = lru_cache(TOKEN_TEXT_CACHE)(partial(token_text, desk.base.tokenizer))
    routes = APIRouter(dependencies=[Security(HTTPBearer(auto_error=False))] if desk.config.api_key else [])

    @app.get("/health", response_model=Health)
    async def health() -> Response | Health:
        """Whether requests are taken."""
        if not desk.scheduler.accepting:
            return error_response(503, "The server is stopping.", code="stopping")
        return Health(status="ok", base=desk.name)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def figures() -> Response:
        """Counts, queue and times, for Prometheus."""
        return Response(await desk.run_in_thread(metrics.text), media_type=CONTENT_TYPE)

    @routes.get("/v1/models")
    async def models() -> ModelList:
        """The base and every adapter, with what is known of it; also those that are broken, and why."""
        return ModelList(
            object="list", data=[_model_card(desk, it) for it in await desk.run_in_thread(desk.list_models)]
        )

    @routes.get("/v1/models/{id:path}")
    async def model(id: str) -> ModelCard:
        """One of them."""
        return _model_card(desk, await desk.run_in_thread(lambda: desk.get_model(id)))

    @routes.post("/v1/completions", response_model=Completion, responses=_STREAM)
    async def completions(ask: CompletionRequest, request: HTTPRequest) -> Response:
        """What follows a text, once or several times; as a stream with `stream`."""
        request.state.record.prompts = ask.prompt
        return await _complete(desk, COMPLETION, spelt, ask, [*ask.prompts], ask.max_tokens, request)

    @routes.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAM)
    async def chats(ask: ChatRequest, request: HTTPRequest) -> Response:
        """What follows a conversation, where the base has a chat template."""
        messages = request.state.record.prompts = [message.said for message in ask.messages]
        return await _complete(desk, CHAT, spelt, ask, [messages], ask.max_completion_tokens or ask.max_tokens, request)

    app.include_router(routes)
    app.mount("/v1", partial(_not_found, routes.routes))  # else the playground would answer for what is not there
    return app


async def _not_found(routes: Sequence[BaseRoute], scope: Scope, receive: Receive, send: Send) -> None:
    """No route fits: 405 where another method would, else 404."""
    asked = dict(scope, root_path=scope.get("app_root_path", ""))
    near = [it for it in routes if it.matches(asked)[0] is Match.PARTIAL]
    methods = sorted({method for route in near for method in getattr(route, "methods", ())})
    raise HTTPException(405, headers={"Allow": ", ".join(methods)}) if methods else HTTPException(404)


async def _http_error(request: HTTPRequest, error: Any) -> Response:
    text = {404: "There is nothing at {path}.", 405: "{path} does not answer to {method}."}.get(error.status_code)
    message = text.format(path=request.url.path[:200], method=request.method) if text else str(error.detail)
    return error_response(error.status_code, message, error.headers)


async def _validation_error(request: HTTPRequest, error: Any) -> Response:
    """All problems of a request, a field at a time."""
    problems: dict[str, list[str]] = {}
    for it in error.errors()[:50]:
        where = it["loc"][1] if len(it["loc"]) > 1 and it["type"] != "json_invalid" else ""
        text = "there is no such setting here" if it["type"] == "extra_forbidden" else it["msg"]
        texts = problems.setdefault(str(where)[:100], [])
        if text not in texts:
            texts.append(text)
    message = "; ".join(f"{name}: {', or '.join(texts)}" if name else texts[0] for name, texts in problems.items())
    return error_response(400, f"{message}.", param=next(iter(problems)) or None)


async def _lora_tuner_error(desk: ModelService, request: HTTPRequest, error: Exception) -> Response:
    status, failure, headers = _describe_error(desk, error, request.state.record)
    return error_response(status, failure.error.message, headers, **failure.error.model_dump(exclude={"message"}))


def _describe_error(
    desk: ModelService, error: Exception, record: RequestRecord
) -> tuple[int, ErrorResponse, dict[str, str]]:
    """Status, body and headers. What went wrong in a way that nobody foresaw is in the log alone."""
    status, code = next(((status, code) for kind, status, code in _STATUS if isinstance(error, kind)), (500, None))
    headers: dict[str, str] = {}
    if isinstance(error, QueueFullError | ServerClosingError):
        headers["Retry-After"] = str(getattr(error, "seconds", STOPPING_SECONDS))
    if status == 500:
        text = record.failed(error)
    else:
        text = str(error) if isinstance(error, UnknownModelError) else desk.hide_paths(str(error))
        record.code = code or type(error).__name__
    param = "model" if isinstance(error, AdapterError) else getattr(error, "param", None)
    kind = "rate_limit_error" if status == 429 else None
    return status, error_body(status, text, type=kind, param=param, code=code), headers


def _model_card(desk: ModelService, model: ServedModel) -> ModelCard:
    adapter, manifest = model.adapter, model.adapter.manifest if model.adapter else None
    created = desk.began
    if manifest is not None:
        try:
            created = int(datetime.datetime.fromisoformat(manifest.created).timestamp())
        except (ValueError, OverflowError):  # it was written by hand
            manifest = manifest.model_copy(update={"created": None})
    facts = adapter and AdapterInfo(
        rank=adapter.rank,
        alpha=adapter.config["lora_alpha"],
        targets=adapter.targets,
        parameters=adapter.parameters,
        bytes=adapter.bytes,
        created=manifest.created if manifest else None,
        dataset=display_name(manifest.data.name) if manifest and manifest.data else None,
        rows=manifest.data.counts if manifest and manifest.data else None,
        made_by=desk.hide_paths(manifest.made_by) if manifest and manifest.made_by else None,
        parents=[it.name for it in manifest.parents] if manifest else [],
        result=manifest.result if manifest else None,
    )
    return ModelCard(
        id=model.id,
        object="model",
        created=created,
        owned_by="lora_tuner",
        parent=desk.name if model.path else None,
        broken=desk.hide_paths(model.broken) if model.broken else None,
        lora_tuner=facts,
    )


async def _complete(
    desk: ModelService,
    form: EndpointFormat,
    spelt: TokenSpeller,
    ask: CompletionRequest | ChatRequest,
    prompts: Sequence[Any],
    max_tokens: int | None,
    request: HTTPRequest,
) -> Response:
    record: RequestRecord = request.state.record
    record.user, record.stream = ask.user, ask.stream
    most = desk.config.max_batch + desk.config.max_waiting
    answers = ask.n * len(prompts)
    if answers > most:
        raise RequestError(f"{answers:,} answers are asked for, and {most:,} fit in at once.", "n")

    def look() -> tuple[Any, list[list[int]]]:
        return desk.find_adapter(ask.model), [form.prompt(desk, prompt) for prompt in prompts]

    with desk.scheduler.reserve(answers):
        found, encoded = await desk.run_in_thread(look)
    record.model = ask.model
    sampling = ask.sampling(_max_new_tokens(desk, max(map(len, encoded)), max_tokens))
    job = record.request = desk.submit(
        ask.model, found, encoded, sampling, begun=record.started, answers=ask.n, likeliest=ask.likeliest
    )
    facts = {
        "id": f"{form.prefix}{record.id}",
        "created": int(time.time()),
        "model": ask.model,
        "system_fingerprint": f"fp_{desk.base.files.fingerprint[:12]}",
    }
    if ask.stream:
        return _EventStream(
            _server_sent_events(desk, form, job, facts, spelt, record, usage=ask.usage_at_the_end), desk, job
        )
    if not await _wait_for(desk, job, request):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if job.error is not None:
        raise job.error

    def body() -> str:
        pieces = [piece for row in job.sequences if (piece := OutputReader(row).next_delta())]
        choices = [form.choice(index, piece, spelt) for index, piece in enumerate(pieces)]
        return str(form.response(**facts, choices=choices, usage=_usage(record)).model_dump_json())

    # The chances of many tokens take long to write, and other connections wait for this thread.
    return Response(await asyncio.to_thread(body), media_type="application/json")


def _max_new_tokens(desk: ModelService, longest: int, wanted: int | None) -> int:
    """How many tokens may be written: as many as wanted, or what there is room for. Raises RequestError, TooLongError."""
    most, context = desk.config.max_tokens, desk.base.max_context
    if wanted is None:
        return min(context - longest, most)
    if wanted > most:
        raise RequestError(f"max_tokens is {wanted:,}, and this server writes {most:,} at the most.", "max_tokens")
    if longest + wanted > context:
        raise ContextLengthError(
            f"The prompt has {longest:,} tokens and max_tokens is {wanted:,}, and {desk.name} looks back on {context:,} in all."
        )
    return wanted


async def _wait_for(desk: ModelService, job: Request, request: HTTPRequest) -> bool:
    """Waits until the job is complete, or the client has gone: then it is given up. Whether it is complete."""

    async def follow() -> None:
        async with aclosing(desk.watch(job)) as news:
            async for _ in news:
                pass

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    both = asyncio.create_task(follow()), asyncio.create_task(leave())
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return job.complete
    finally:
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)


async def _server_sent_events(
    desk: ModelService,
    form: EndpointFormat,
    job: Request,
    facts: dict[str, Any],
    spelt: TokenSpeller,
    record: RequestRecord,
    *,
    usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events: pieces of answers as they come, the usage where it is wanted, and [DONE]."""

    def event(choices: list[Any], **more: Any) -> str:
        part = form.chunk(**facts, choices=choices, **({"usage": None} | more if usage else {}))
        return f"data: {part.model_dump_json(exclude_unset=True)}\n\n"

    readers = [OutputReader(row) for row in job.sequences]
    try:
        async with aclosing(desk.watch(job)) as news:
            async for _ in news:
                if job.error is not None:
                    raise job.error
                for index, reader in enumerate(readers):
                    if piece := reader.next_delta():
                        yield event([form.chunk_choice(index, piece, spelt)])
    except Exception as error:
        _, failure, _ = _describe_error(desk, error, record)
        yield f"data: {failure.model_dump_json()}\n\n"
        return
    if usage:
        yield event([], usage=_usage(record))
    yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Events for one client; when it has gone, nobody waits for the job."""

    def __init__(self, events: AsyncIterator[str], desk: ModelService, job: Request) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would keep them back
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.leave = partial(desk.scheduler.cancel, job)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()


def _usage(record: RequestRecord) -> Usage:
    before, after = record.prompt_tokens, record.new_tokens
    return Usage(prompt_tokens=before, completion_tokens=after, total_tokens=before + after)
