"""What clients ask and what they get, in OpenAI's words: https://platform.openai.com/docs/api-reference.

Surprise: null means left out, as it does there. Limit: what OpenAI has and this server has not is refused by name; nothing is
accepted and ignored, but for `user`, which goes into the log.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..adapters.manifest import EvalResult
from ..config import INVALID_TEXT, MAX_COUNT, MAX_SETTING_CHARS, SamplingParams
from ..text import escape_control


def _valid_text(value: str) -> str:
    if INVALID_TEXT.search(value):
        raise PydanticCustomError("no_text", "null bytes are no text")
    return value


Text = Annotated[str, AfterValidator(_valid_text)]
Name = Annotated[Text, Field(max_length=256)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_SETTING_CHARS)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, le=MAX_COUNT)]], Field(min_length=1, fail_fast=True)]
Zero = Annotated[float, Field(ge=0, le=0)]


class _RequestModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> Any:
        described = handler.resolve_ref_schema(handler(schema))
        for name, field in described["properties"].items():
            if name not in described.get("required", ()):
                described["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        return described


class StreamOptions(_RequestModel):
    include_usage: bool = False


class _GenerationRequest(_RequestModel):
    """What completions and chats share. `top_k` and `repetition_penalty` are called as in vLLM."""

    model: Name
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=MAX_COUNT)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(min_length=1, max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Name | None = None
    presence_penalty: Zero = 0.0
    frequency_penalty: Zero = 0.0

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, value: StreamOptions | None, info: Any) -> StreamOptions | None:
        if not info.data.get("stream"):
            raise PydanticCustomError("contradiction", "it is for a stream: give stream as well")
        return value

    def sampling(self, max_tokens: int) -> SamplingParams:
        drawn = self.temperature > 0
        return SamplingParams(
            max_new_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed % 2**63 if drawn and self.seed is not None else None,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or [],
        )

    @property
    def usage_at_the_end(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_GenerationRequest):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
    ) = Field(description="A text, several, its tokens, or those of several.")
    max_tokens: Count = 16
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=1, le=128)
    echo: Literal[False] = False

    @field_validator("best_of")
    @classmethod
    def _all_of_them(cls, value: int | None, info: Any) -> int | None:
        if value != info.data.get("n"):
            raise PydanticCustomError("contradiction", "it must be n: all answers are given")
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        one: Any = self.prompt
        return one if isinstance(one, list) and isinstance(one[0], str | list) else [one]

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class ContentPart(_RequestModel):
    type: Literal["text"]
    text: Text


class RequestMessage(_RequestModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(min_length=1, fail_fast=True)]

    @property
    def said(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content
        role = "system" if self.role == "developer" else self.role  # as OpenAI calls it by now; templates do not
        return {"role": role, "content": parts if isinstance(parts, str) else "".join(it.text for it in parts)}


class ChatRequest(_GenerationRequest):
    messages: Annotated[list[RequestMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: Count | None = Field(None, description="What there is room for, when it is left out.")
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("max_completion_tokens")
    @classmethod
    def _once(cls, value: int | None, info: Any) -> int | None:
        if info.data.get("max_tokens") not in (None, value):
            raise PydanticCustomError("contradiction", "max_tokens is another number: give one of them")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _of_logprobs(cls, value: int | None, info: Any) -> int | None:
        if not info.data.get("logprobs"):
            raise PydanticCustomError("contradiction", "it needs logprobs")
        return value

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length"]


class Logprobs(BaseModel):
    """Of each token of a completion. `text_offset` counts from the beginning of the answer's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class _ResponseModel(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | None = None


class Completion(_ResponseModel):
    """An answer, and a piece of one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class TopLogprob(BaseModel):
    """`bytes` is null for a token that stands for none."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(_ResponseModel):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(_ResponseModel):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class AdapterInfo(BaseModel):
    """Of an adapter, from its manifest, without where it lies."""

    rank: int
    alpha: float
    targets: list[str]
    parameters: int
    bytes: int
    created: str | None = None
    dataset: str | None = None
    rows: dict[str, int] | None = None
    made_by: str | None = None
    parents: list[str] = []
    result: EvalResult | None = None


class ModelCard(BaseModel):
    """`broken` says why a model does not answer; `parent` is the base of an adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lora_tuner"] = "lora_tuner"
    parent: str | None
    broken: str | None
    lora_tuner: AdapterInfo | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"]
    base: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


def error_body(
    status: int, message: str, *, type: str | None = None, param: str | None = None, code: str | None = None
) -> ErrorResponse:
    """An error in OpenAI's shape. What clients sent may be repeated in it, so it is made fit to be written again."""
    kind = type or ("invalid_request_error" if status < 500 else "server_error")
    return ErrorResponse(
        error=ErrorDetail(
            message=escape_control(message), type=kind, param=escape_control(param) if param else None, code=code
        )
    )


def error_response(
    status: int, message: str, headers: Mapping[str, str] | None = None, **facts: str | None
) -> JSONResponse:
    return JSONResponse(error_body(status, message, **facts).model_dump(), status, headers)
