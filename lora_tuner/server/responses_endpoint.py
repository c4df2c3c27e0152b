"""The endpoint /v1/responses in its plain text form: a request for a chat, in other words.

https://platform.openai.com/docs/api-reference/responses. Nothing is stored, so each request has the
whole conversation.
"""

import itertools
import json
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Literal

from fastapi import Request as HTTPRequest
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from ..errors import ContextLengthError, RequestError
from . import neutral
from .fields import TEXT, TEXTS, Name, RequestModel, Text, text_or_list
from .generate import follow, generate, lora_tuner_error, usage_of
from .protocol import ChatRequest, Count, RequestMessage, StreamOptions
from .responses import EndpointFormat, OutputDelta, OutputReader, ResponseFields, TokenSpeller, Usage
from .scheduler import Request
from .service import ModelService

# Requests


class InputPart(RequestModel):
    neutral_values = neutral.INPUT_PART

    type: Literal["input_text", "output_text", "text"]
    text: Text


class InputMessage(RequestModel):
    """A message, also as it came in the output of an earlier response."""

    neutral_values = neutral.INPUT_MESSAGE

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag(TEXT)] | Annotated[list[InputPart], Field(fail_fast=True), Tag(TEXTS)],
        Discriminator(text_or_list),
    ]

    @field_validator("content")
    @classmethod
    def _requires_content(cls, value: str | list[InputPart], info: ValidationInfo) -> str | list[InputPart]:
        if value == [] and info.data.get("role") != "assistant":
            raise PydanticCustomError("missing", "give a string, or a list of parts of type input_text")
        return value

    @property
    def message(self) -> RequestMessage:
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return RequestMessage(role=self.role, content=content)


class TextFormat(RequestModel):
    type: Literal["text"]


class TextSettings(RequestModel):
    neutral_values = neutral.TEXT_SETTINGS

    format: TextFormat = TextFormat(type="text")


class ResponsesRequest(RequestModel):
    neutral_values = neutral.RESPONSES

    model: Name
    input: Annotated[
        Annotated[Text, Tag(TEXT)]
        | Annotated[list[InputMessage], Field(min_length=1, fail_fast=True), Tag(TEXTS)],
        Discriminator(text_or_list),
    ]
    instructions: Text | None = Field(None, description="A system message before the input.")
    max_output_tokens: Count | None = Field(None, description="Default: as many as fit in the context.")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stream: bool = False
    text: TextSettings = TextSettings()
    metadata: Annotated[dict[str, Text], Field(max_length=16)] | None = None
    user: Name | None = None

    def chat(self) -> ChatRequest:
        """Return the request that /v1/chat/completions would get."""
        messages = [] if self.instructions is None else [RequestMessage(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            messages.append(RequestMessage(role="user", content=self.input))
        else:
            messages += [item.message for item in self.input]
        return ChatRequest(
            model=self.model,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            user=self.user,
        )

    def own_names(self, text: str) -> str:
        """Replace the names of the chat's fields in an error by those of this request."""

        def replace(match: re.Match[str]) -> str:
            number = int(match["number"]) - (self.instructions is not None)
            if number < 0:
                return "instructions"
            return "input" if isinstance(self.input, str) else f"input[{number}].{match['key']}"

        text = re.sub(r"messages\[(?P<number>\d+)\]\.(?P<key>\w+)", replace, text)
        return text.replace("max_tokens", "max_output_tokens")


# Responses


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str] = []
    logprobs: list[str] = []


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class ResponsesUsage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int] = {"reasoning_tokens": 0}
    total_tokens: int

    @classmethod
    def of_usage(cls, usage: Usage) -> "ResponsesUsage":
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details={
                "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                "cache_write_tokens": 0,
            },
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )


class ResponsesResponse(BaseModel):
    """One response. The last fields are those of a request without tools, storage and reasoning."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputMessage]
    usage: ResponsesUsage | None
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    metadata: dict[str, str]
    user: str | None
    text: dict[str, dict[str, str]] = {"format": {"type": "text"}}
    store: bool = False
    background: bool = False
    previous_response_id: None = None
    parallel_tool_calls: bool = False
    tool_choice: Literal["none"] = "none"
    tools: list[str] = []
    reasoning: dict[str, None] = {"effort": None, "summary": None}
    truncation: Literal["disabled"] = "disabled"


async def create_response(
    service: ModelService, spell: TokenSpeller, body: ResponsesRequest, http_request: HTTPRequest
) -> Response:
    """Answer a conversation, whole or as events. Raises what `generate` raises, with the names of
    this endpoint's fields."""
    endpoint = EndpointFormat("resp_", partial(_format, body), stream=partial(_events, body))
    try:
        return await generate(service, endpoint, spell, body.chat(), http_request)
    except RequestError as error:
        raise RequestError(body.own_names(str(error)), body.own_names(error.param)) from error
    except ContextLengthError as error:
        raise ContextLengthError(body.own_names(str(error))) from error


def _format(
    body: ResponsesRequest, fields: ResponseFields, outputs: dict[int, OutputDelta], spell: TokenSpeller
) -> ResponsesResponse:
    return _response(body, fields, outputs[0].text, "incomplete" if _is_cut(outputs[0]) else "completed")


def _is_cut(output: OutputDelta) -> bool:
    return output.finish_reason == "length"


def _message(
    fields: ResponseFields, status: Literal["in_progress", "completed", "incomplete"], *text: str
) -> OutputMessage:
    content = [OutputText(text=part) for part in text]
    return OutputMessage(id=f"msg_{fields.id.removeprefix('resp_')}", status=status, content=content)


def _response(
    body: ResponsesRequest,
    fields: ResponseFields,
    text: str | None,
    status: Literal["in_progress", "completed", "incomplete", "failed"],
) -> ResponsesResponse:
    """Create a response; without text it has no output yet."""
    cut = status == "incomplete"
    return ResponsesResponse(
        id=fields.id,
        created_at=fields.created,
        status=status,
        model=fields.model,
        output=[] if text is None else [_message(fields, "incomplete" if cut else "completed", text)],
        usage=None if fields.usage is None else ResponsesUsage.of_usage(fields.usage),
        incomplete_details={"reason": "max_output_tokens"} if cut else None,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        metadata=body.metadata or {},
        user=body.user,
    )


async def _events(
    body: ResponsesRequest,
    service: ModelService,
    spell: TokenSpeller,
    request: Request,
    readers: list[OutputReader],
    fields: ResponseFields,
    http_request: HTTPRequest,
    options: StreamOptions,
) -> AsyncIterator[str]:
    """Yield the events of a response with one message, which has one part."""
    number = itertools.count()
    message = _message(fields, "in_progress")
    place = {"item_id": message.id, "output_index": 0, "content_index": 0}

    def event(kind: str, **data: object) -> str:
        complete = {"type": kind, "sequence_number": next(number), **data}
        return f"event: {kind}\ndata: {json.dumps(complete)}\n\n"

    def response_event(kind: str, response: ResponsesResponse) -> str:
        return event(f"response.{kind}", response=response.model_dump())

    opened = _response(body, fields, None, "in_progress")
    yield response_event("created", opened)
    yield response_event("in_progress", opened)
    yield event("response.output_item.added", output_index=0, item=message.model_dump())
    yield event("response.content_part.added", **place, part=OutputText(text="").model_dump())
    text, cut = "", False
    try:
        async with aclosing(follow(service, request, readers)) as deltas:
            async for _, delta in deltas:
                text, cut = text + delta.text, _is_cut(delta)
                if delta.text:
                    yield event("response.output_text.delta", **place, delta=delta.text, logprobs=[])
    except Exception as error:
        failure = json.loads(bytes((await lora_tuner_error(service, http_request, error)).body))["error"]
        failed = _response(body, fields, text, "failed")
        failed.error = {"code": failure["code"] or "server_error", "message": body.own_names(failure["message"])}
        yield response_event("failed", failed)
        return
    fields.usage = usage_of(http_request.state.record)
    response = _response(body, fields, text, "incomplete" if cut else "completed")
    item = response.output[0]
    yield event("response.output_text.done", **place, text=text, logprobs=[])
    yield event("response.content_part.done", **place, part=item.content[0].model_dump())
    yield event("response.output_item.done", output_index=0, item=item.model_dump())
    yield response_event(response.status, response)
