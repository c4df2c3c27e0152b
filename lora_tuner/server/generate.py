"""Generation for one request: prompts into the queue, then one response or server-sent events.

Errors get their status, type and code; one within a stream is sent as an event, since the status
is already out.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import lru_cache, partial
from urllib.parse import quote

from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

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
from ..inference.sequence import Sequence
from ..text import format_count
from .constrained import requested_grammar
from .error_responses import error_response
from .metrics import CLIENT_CLOSED_REQUEST, RequestRecord
from .protocol import ChatRequest, CompletionRequest, StreamOptions
from .responses import (
    EndpointFormat,
    OutputDelta,
    OutputReader,
    PromptTokensDetails,
    ResponseFields,
    TokenSpeller,
    Usage,
    token_text,
)
from .scheduler import Request
from .service import ModelService
from .tokenize import check_token_ids, echo_all
from .tools import CallReader, requested_tools

TOKEN_TEXT_CACHE = 16_384  # tokens whose text is cached; a few MB
MAX_LOGPROBS = 100_000  # of a request: one takes about 1 KB while the response is formatted
ADAPTER_HEADER = "X-Adapter"  # the model that was chosen for auto
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


async def generate(
    service: ModelService,
    endpoint: EndpointFormat,
    spell: TokenSpeller,
    body: CompletionRequest | ChatRequest,
    http_request: HTTPRequest,
) -> Response:
    record: RequestRecord = http_request.state.record
    record.user, record.stream = body.user, body.stream
    count = body.candidates * len(body.prompts)
    capacity = service.config.max_batch + service.config.max_waiting
    if count > capacity:
        field = "best_of" if body.candidates > body.n else "n"
        problem = f"{format_count(count, 'output')} requested, the limit of this server is {capacity:,}"
        raise RequestError(f"{field}: {problem}.", field)
    model, auto, choice = body.model, http_request.app.state.auto, None
    if auto.is_asked(model):
        if len(body.prompts) > 1:
            raise RequestError("prompt: auto chooses for one prompt, so send a request for each.", "prompt")
        choice = await auto.choose(body.prompts[0])
        model, record.auto = auto.model_of(choice), True
    tools = requested_tools(body) if isinstance(body, ChatRequest) else None
    grammar, echo = requested_grammar(body), isinstance(body, CompletionRequest) and body.echo
    prepared = await service.prepare_request(model, body.prompts, body.candidates, grammar, tools)
    record.model = model  # only now, so that no client fills the metrics with labels
    if prepared.lora is not None and prepared.lora.tokenizer is not None:
        spell = lru_cache(TOKEN_TEXT_CACHE)(partial(token_text, prepared.lora.tokenizer))
    max_tokens = service.max_new_tokens(prepared.prompts, body.requested_tokens)
    num_logprobs = 0
    if body.num_top_logprobs is not None:
        prompt_tokens = body.candidates * sum(map(len, prepared.prompts)) if echo else 0
        num_logprobs = (count * max_tokens + prompt_tokens) * (1 + body.num_top_logprobs)
    if num_logprobs > MAX_LOGPROBS:
        field = "top_logprobs" if isinstance(body, ChatRequest) else "logprobs"
        outputs = f"{format_count(count, 'output')} of up to {format_count(max_tokens, 'token')}"
        raise RequestError(
            f"{field}: {outputs}{' after their prompts' if echo else ''}, with "
            f"{body.num_top_logprobs} alternatives for each token, have {num_logprobs:,} "
            f"log-probabilities; the limit of this server is {MAX_LOGPROBS:,}. Lower {field}, n "
            "or max_tokens.",
            field,
        )
    sampling = body.sampling(max_tokens)
    check_token_ids(
        service,
        prepared.lora,
        logit_bias=sampling.logit_bias,
        stop_token_ids=sampling.stop_token_ids,
    )
    echoed = await echo_all(service, body.prompts, prepared) if echo else []
    request = record.request = service.submit(
        prepared,
        sampling,
        started=record.started,
        n=body.candidates,
        top_logprobs=body.num_top_logprobs,
        score_prompt=echo and body.num_top_logprobs is not None,
        prompt_only=max_tokens == 0,
        ranked=body.candidates > body.n,
    )
    fields = ResponseFields(
        id=f"{endpoint.id_prefix}{record.id}",
        created=int(time.time()),
        model=model,
        system_fingerprint=f"fp_{service.base.files.fingerprint[:12]}",
    )
    headers = {}
    if choice is not None:
        fields.routing, headers[ADAPTER_HEADER] = choice, quote(model)

    def readers() -> list[OutputReader]:
        chosen = _choose_best(request.sequences, body.candidates, body.n)
        if tools is not None and prepared.call_format is not None:
            call_format = prepared.call_format
            return [CallReader(sequence, tools=tools, call_format=call_format) for sequence in chosen]
        return [
            OutputReader(sequence, echoed[number // body.n] if echo else None)
            for number, sequence in enumerate(chosen)
        ]

    if body.stream:
        stream = endpoint.stream or partial(_server_sent_events, endpoint)
        options = body.stream_options or StreamOptions()
        events = stream(service, spell, request, readers(), fields, http_request, options)
        return _EventStream(events, service, request, headers)
    if not await _wait_for(service, request, http_request):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if request.error is not None:
        raise request.error

    def to_json() -> str:
        fields.usage = usage_of(record)
        outputs = _next_deltas(readers())
        return endpoint.response(fields, outputs, spell).model_dump_json()

    # Many log-probabilities take long to format, which would hold up other connections.
    body_json = to_json() if num_logprobs == 0 else await service.run_in_thread("format", to_json)
    return Response(body_json, media_type="application/json", headers=headers)


def _choose_best(sequences: list[Sequence], candidates: int, n: int) -> list[Sequence]:
    """Return of the candidates of each prompt the `n` with the highest mean log-probability."""
    if candidates == n:
        return sequences
    chosen: list[Sequence] = []
    for start in range(0, len(sequences), candidates):
        best_first = sorted(sequences[start : start + candidates], key=lambda each: -each.mean_logprob)
        chosen += best_first[:n]
    return chosen


def _next_deltas(readers: list[OutputReader]) -> dict[int, OutputDelta]:
    deltas = {index: reader.next_delta() for index, reader in enumerate(readers)}
    return {index: delta for index, delta in deltas.items() if delta is not None}


async def follow(
    service: ModelService, request: Request, readers: list[OutputReader]
) -> AsyncGenerator[tuple[int, OutputDelta], None]:
    """Yield new output with its index until all are complete. Closing the generator cancels the request.

    Raises the error of the request.
    """
    async with aclosing(service.watch(request)) as updates:
        async for _ in updates:
            if request.error is not None:
                raise request.error
            for delta in _next_deltas(readers).items():
                yield delta


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
    endpoint: EndpointFormat,
    service: ModelService,
    spell: TokenSpeller,
    request: Request,
    readers: list[OutputReader],
    fields: ResponseFields,
    http_request: HTTPRequest,
    options: StreamOptions,
) -> AsyncIterator[str]:
    """Yield an event for each delta, then the usage if it is wanted, then [DONE]."""
    record: RequestRecord = http_request.state.record

    to_chunk = endpoint.chunk
    assert to_chunk is not None

    def event(outputs: dict[int, OutputDelta]) -> str:
        chunk = to_chunk(fields, outputs, spell)
        fields.routing = None  # in the first chunk alone
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"

    if options.include_usage:
        fields.usage = None  # in every chunk but the last
    try:
        async with aclosing(follow(service, request, readers)) as deltas:
            async for index, delta in deltas:
                if options.continuous_usage_stats:
                    fields.usage = usage_of(record)
                yield event({index: delta})
    except Exception as error:
        failure = await lora_tuner_error(service, http_request, error)
        yield f"data: {bytes(failure.body).decode()}\n\n"
        return
    if options.include_usage:
        fields.usage = usage_of(record)
        yield event({})
    yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events for one client; its request is cancelled when the client disconnects."""

    def __init__(
        self, events: AsyncIterator[str], service: ModelService, request: Request, headers: dict[str, str]
    ) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",  # nginx would buffer them
                **headers,
            },
        )
        self.cancel = partial(service.scheduler.cancel, request)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.cancel()


def usage_of(record: RequestRecord) -> Usage:
    return Usage(
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.new_tokens,
        total_tokens=record.prompt_tokens + record.new_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=record.cached_tokens),
    )


async def lora_tuner_error(service: ModelService, request: HTTPRequest, error: Exception) -> JSONResponse:
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
