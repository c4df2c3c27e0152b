"""What clients ask and what they get, in OpenAI's words: https://platform.openai.com/docs/api-reference.

Surprise: null means left out, as it does there. Limit: what OpenAI has and this server has not is refused by name; nothing is
accepted and ignored, but for `user`, which goes into the log.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..config import MAX_TEXT, MOST, NO_TEXT, Sampling
from ..manifest import Result
from ..terminal import plain


def _text(value: str) -> str:
    if NO_TEXT.search(value):
        raise PydanticCustomError("no_text", "null bytes are no text")
    return value


Text = Annotated[str, AfterValidator(_text)]
Name = Annotated[Text, Field(max_length=256)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_TEXT)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, le=MOST)]], Field(min_length=1, fail_fast=True)]
Zero = Annotated[float, Field(ge=0, le=0)]


class _Asked(BaseModel):
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


class StreamOptions(_Asked):
    include_usage: bool = False


class _Request(_Asked):
    """What completions and chats share. `top_k` and `repetition_penalty` are called as in vLLM."""

    model: Name
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=MOST)
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

    def sampling(self, max_tokens: int) -> Sampling:
        drawn = self.temperature > 0
        return Sampling(
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


class CompletionRequest(_Request):
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


class Part(_Asked):
    type: Literal["text"]
    text: Text


class Message(_Asked):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, fail_fast=True)]

    @property
    def said(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content
        role = "system" if self.role == "developer" else self.role  # as OpenAI calls it by now; templates do not
        return {"role": role, "content": parts if isinstance(parts, str) else "".join(it.text for it in parts)}


class ChatRequest(_Request):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
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


Ending = Literal["stop", "length"]


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
    finish_reason: Ending | None


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | None = None


class Completion(_Answer):
    """An answer, and a piece of one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class Alternative(BaseModel):
    """`bytes` is null for a token that stands for none."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]


class Said(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: Said
    logprobs: ChatLogprobs | None
    finish_reason: Ending


class Chat(_Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str


class ChatPiece(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Ending | None


class ChatChunk(_Answer):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatPiece]


class Facts(BaseModel):
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
    result: Result | None = None


class ModelCard(BaseModel):
    """`broken` says why a model does not answer; `parent` is the base of an adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lora_tuner"] = "lora_tuner"
    parent: str | None
    broken: str | None
    lora_tuner: Facts | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"]
    base: str


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    """Every answer that is no success."""

    error: Problem


def problem(
    status: int, message: str, *, type: str | None = None, param: str | None = None, code: str | None = None
) -> Failure:
    """An error in OpenAI's shape. What clients sent may be repeated in it, so it is made fit to be written again."""
    kind = type or ("invalid_request_error" if status < 500 else "server_error")
    return Failure(error=Problem(message=plain(message), type=kind, param=plain(param) if param else None, code=code))


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None, **facts: str | None) -> JSONResponse:
    return JSONResponse(problem(status, message, **facts).model_dump(), status, headers)
