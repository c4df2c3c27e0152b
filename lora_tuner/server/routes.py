"""The routes of the API: models, generation, token ids, adapters in memory, health and metrics.

A broken adapter is reported as a model that was not found (404, with the reason), so that clients
do not retry.
"""

import datetime
import json
import os
from collections.abc import Callable, Coroutine, Sequence
from functools import lru_cache, partial
from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..adapters.adapter import Adapter
from ..adapters.manifest import why_never_chosen
from ..config import AUTO_MODEL
from ..data.readers import unique_keys
from ..errors import LoraTunerError, RequestError, UnknownModelError
from ..text import display_name
from .auto import AutoModel
from .classify import ClassifyRequest, ClassifyResponse, classify
from .error_responses import ErrorResponse, error_response, http_error, validation_error
from .generate import TOKEN_TEXT_CACHE, generate, lora_tuner_error
from .metrics import Metrics, RequestLog
from .middleware import CrossOriginMiddleware, SecurityMiddleware
from .protocol import (
    AdapterInfo,
    ChatRequest,
    CompletionRequest,
    Health,
    LoadAdapterRequest,
    ModelCard,
    ModelList,
    UnloadAdapterRequest,
)
from .responses import CHAT, COMPLETION, ChatCompletion, Completion, token_text
from .responses_endpoint import ResponsesRequest, ResponsesResponse, create_response
from .service import ModelService, ServedModel
from .tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    detokenize,
    tokenize,
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
            HTTPException: http_error,
            RequestValidationError: validation_error,
            LoraTunerError: partial(lora_tuner_error, service),
        },
    )
    auto = AutoModel(service, metrics)
    app.state.metrics, app.state.auto = metrics, auto
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
        cards = [_model_card(service, model) for model in models]
        return ModelList(data=[*cards, *_auto_card(service, cards)]).model_dump_json()

    @routes.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """List the base and every adapter, broken ones with the reason."""
        listed = await service.run_in_thread("list", lambda: format_list(service.list_models()))
        return Response(listed, media_type="application/json")

    @routes.get("/v1/models/{id:path}")
    async def model(id: str) -> ModelCard:
        """Describe one model."""
        if auto.is_asked(id):
            listed = await service.run_in_thread("list", service.list_models)
            if card := _auto_card(service, [_model_card(service, model) for model in listed]):
                return card[0]
        return _model_card(service, await service.run_in_thread("list", partial(service.get_model, id)))

    @event_stream("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, http_request: HTTPRequest) -> Response:
        """Continue one or several prompts; as server-sent events with `stream`."""
        http_request.state.record.prompts = body.prompt
        return await generate(service, COMPLETION, spell, body, http_request)

    @event_stream("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, http_request: HTTPRequest) -> Response:
        """Answer a conversation, if the base has a chat template."""
        http_request.state.record.prompts = body.prompts[0]
        return await generate(service, CHAT, spell, body, http_request)

    @event_stream("/v1/responses", response_model=ResponsesResponse)
    async def responses(body: ResponsesRequest, http_request: HTTPRequest) -> Response:
        """Answer a text or a conversation, if the base has a chat template."""
        http_request.state.record.prompts = body.chat().prompts[0]
        return await create_response(service, spell, body, http_request)

    @routes.post("/v1/classify", response_model=ClassifyResponse)
    async def classify_texts(body: ClassifyRequest, http_request: HTTPRequest) -> Response:
        """Tell which label a text has, or each of several, with calibrated probabilities."""
        return await classify(service, body, http_request)

    @routes.post("/tokenize")
    async def tokenize_prompt(body: TokenizeRequest) -> TokenizeResponse:
        """Return the token ids of a text or a conversation."""
        return await tokenize(service, body)

    @routes.post("/detokenize")
    async def detokenize_tokens(body: DetokenizeRequest) -> DetokenizeResponse:
        """Return the text of token ids."""
        return await detokenize(service, body)

    @routes.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapterRequest) -> dict[str, str]:
        """Load an adapter of the library into memory before it is asked for."""
        await service.run_in_thread("list", partial(_check_adapter, service, body))
        await service.find_adapter(body.lora_name)
        return {"message": f"The adapter {body.lora_name} is in memory."}

    @routes.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> dict[str, str]:
        """Drop an adapter from memory. The next request for it loads it again."""
        if body.lora_name not in service.generator.loaded_adapters:
            raise UnknownModelError(f"The adapter '{body.lora_name}' is not in memory.")
        await service.run_in_thread("load", partial(service.generator.unload, body.lora_name))
        return {"message": f"The adapter {body.lora_name} is no longer in memory."}

    @routes.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> Response:
        text = "This server generates text: its models give no embeddings. Ask a server of an embedding model."
        return error_response(400, text, code="unsupported_endpoint")

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
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise HTTPException(400, f"The body is not valid JSON: {reason}.") from error


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


def _check_adapter(service: ModelService, body: LoadAdapterRequest) -> None:
    """Raise RequestError for anything but an adapter of the library; its path is only compared."""
    name, path = body.lora_name, service.get_model(body.lora_name).path
    if path is None:
        raise RequestError(f"lora_name: {name} is the base, which is always in memory.", "lora_name")
    if body.lora_path not in (None, name) and os.path.abspath(body.lora_path) != os.path.abspath(path):
        problem = f"only adapters of this server's library can be loaded: leave it out, or send {name}"
        raise RequestError(f"lora_path: {problem}.", "lora_path")


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


def _auto_card(service: ModelService, cards: Sequence[ModelCard]) -> list[ModelCard]:
    """Describe "auto", if there is an adapter that it may choose, and no model of that name."""
    is_choosable = any(card.lora_tuner and card.lora_tuner.never_chosen is None for card in cards)
    if not is_choosable or any(card.id == AUTO_MODEL for card in cards):
        return []
    return [ModelCard(id=AUTO_MODEL, created=service.created, parent=service.name, broken=None, lora_tuner=None)]


def _adapter_info(service: ModelService, adapter: Adapter) -> AdapterInfo:
    info = AdapterInfo(
        rank=adapter.rank,
        alpha=adapter.config["lora_alpha"],
        targets=adapter.targets,
        parameters=adapter.parameters,
        bytes=adapter.bytes,
        never_chosen=why_never_chosen(adapter.manifest),
    )
    manifest = adapter.manifest
    if manifest is not None:
        info.parents = [parent.name for parent in manifest.parents]
        info.result = manifest.result
        info.labels = manifest.labels.names if manifest.labels else None
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
