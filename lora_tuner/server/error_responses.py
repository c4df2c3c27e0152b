"""Errors in OpenAI's shape, and those of requests that no endpoint can read."""

from collections.abc import Mapping, Sequence

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..text import escape_control
from . import neutral
from .fields import ALTERNATIVES

API_ENDPOINTS = (
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/classify",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/tokenize",
    "/detokenize",
)
_NEUTRAL = {
    "/v1/completions": neutral.COMPLETION,
    "/v1/chat/completions": neutral.CHAT,
    "/v1/responses": neutral.RESPONSES,
    "/v1/classify": neutral.CLASSIFY,
    "/v1/load_lora_adapter": neutral.LOAD_ADAPTER,
    "/v1/unload_lora_adapter": neutral.UNLOAD_ADAPTER,
    "/tokenize": neutral.TOKENIZE,
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail


def error_response(
    status: int,
    message: str,
    headers: Mapping[str, str] | None = None,
    *,
    param: str | None = None,
    code: str | None = None,
) -> JSONResponse:
    """Create an error in OpenAI's shape. Control characters are escaped: it may quote input."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    param = escape_control(param) if param else None
    detail = ErrorDetail(message=escape_control(message), type=kind, param=param, code=code)
    return JSONResponse(ErrorResponse(error=detail).model_dump(), status, headers)


async def http_error(request: Request, error: HTTPException) -> Response:
    status, path = error.status_code, request.url.path[:200]
    messages = {
        404: f"There is nothing at {path}: the API has {', '.join(API_ENDPOINTS)}.",
        405: f"{path} does not support {request.method}.",
    }
    return error_response(status, messages.get(status, str(error.detail)), error.headers)


async def validation_error(request: Request, error: RequestValidationError) -> Response:
    """Report all problems of a request, grouped by field."""
    known_fields = _NEUTRAL.get(request.url.path, {})
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
