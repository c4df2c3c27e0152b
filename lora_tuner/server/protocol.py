"""Schemas of requests and models in OpenAI's API: https://platform.openai.com/docs/api-reference.

As there, null stands for an omitted field. Values that would change the output in a way that this
server does not support are rejected by name; `neutral` has those that change nothing.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from ..adapters.manifest import EvalResult
from ..config import (
    INVALID_TEXT,
    MAX_COUNT,
    MAX_SETTING_CHARS,
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
    SamplingParams,
)
from ..data.chat import Message
from . import neutral


def _valid_text(value: str) -> str:
    if INVALID_TEXT.search(value):
        raise PydanticCustomError("invalid_text", "text cannot contain null bytes or lone surrogates")
    return value


MAX_STOPS = 64  # OpenAI's limit is 4, but tools for local models send more
Text = Annotated[str, AfterValidator(_valid_text)]
Name = Annotated[Text, Field(max_length=256)]
Stop = Annotated[Text, Field(max_length=MAX_SETTING_CHARS)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, le=MAX_COUNT)]], Field(min_length=1, fail_fast=True)]
# Alternatives of a field. Named by its tag, only the one that was meant reports its problems.
TEXT, TEXTS, TOKENS, TOKEN_LISTS = ALTERNATIVES = "(text)", "(texts)", "(tokens)", "(token lists)"


def _alternative(value: object) -> str:
    if not isinstance(value, list):
        return TEXT
    first = value[0] if value else None
    if isinstance(first, list):
        return TOKEN_LISTS
    return TOKENS if isinstance(first, int) else TEXTS


def _text_or_list(value: object) -> str:
    return TEXTS if isinstance(value, list) else TEXT


class _RequestModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    neutral_values: ClassVar[neutral.Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: object) -> object:
        if isinstance(data, dict):
            data = {
                name: value
                for name, value in data.items()
                if not neutral.is_neutral(cls.neutral_values, name, value)
            }
        return data

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Declare that optional fields, and unknown ones, may be null, and the neutral values."""
        json_schema = handler.resolve_ref_schema(handler(schema))
        properties = json_schema["properties"]
        for name in properties.keys() - json_schema.get("required", ()):
            properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
        json_schema["properties"] = neutral.json_schema(cls.neutral_values, properties)
        json_schema["additionalProperties"] = {"type": "null"}
        return json_schema


class StreamOptions(_RequestModel):
    neutral_values = neutral.STREAM_OPTIONS

    include_usage: bool = False


class ResponseFormat(_RequestModel):
    neutral_values = neutral.RESPONSE_FORMAT

    type: Literal["text"]


class _GenerationRequest(_RequestModel):
    """Fields that both endpoints share. `top_k` and `repetition_penalty` have the names of vLLM."""

    model: Name
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=MAX_COUNT)
    repetition_penalty: float = Field(1.0, ge=MIN_REPETITION_PENALTY, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[
            Annotated[Stop, Tag(TEXT)] | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag(TEXTS)],
            Discriminator(_text_or_list),
        ]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Name | None = None
    response_format: ResponseFormat | None = None

    @field_validator("stream_options", "top_logprobs", check_fields=False)
    @classmethod
    def _requires_flag(cls, value: object, info: ValidationInfo) -> object:
        flag = "stream" if isinstance(value, StreamOptions) else "logprobs"
        if value != StreamOptions() and not info.data.get(flag):
            raise PydanticCustomError("contradiction", f"only allowed with {flag}: true")
        return value

    def sampling(self, max_tokens: int) -> SamplingParams:
        seed = None if self.seed is None or self.temperature < MIN_TEMPERATURE else self.seed % 2**63
        stop = self.stop if isinstance(self.stop, list) else [self.stop]
        return SamplingParams(
            max_new_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
            stop=[text for text in stop if text],
        )


class CompletionRequest(_GenerationRequest):
    neutral_values = neutral.COMPLETION

    prompt: Annotated[
        Annotated[Text, Tag(TEXT)]
        | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag(TEXTS)]
        | Annotated[Tokens, Tag(TOKENS)]
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True), Tag(TOKEN_LISTS)],
        Discriminator(_alternative),
    ] = Field(description="Text, token ids, or a list of either.")
    max_tokens: Count = 16
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=1, le=128)

    @field_validator("best_of")
    @classmethod
    def _equals_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value != info.data.get("n"):
            raise PydanticCustomError("contradiction", "must equal n: all n outputs are returned")
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        several = [part for part in self.prompt if not isinstance(part, int)]
        return several or [[token for token in self.prompt if isinstance(token, int)]]

    @property
    def requested_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """The number of alternatives for each token; None without log-probabilities."""
        return self.logprobs


class ContentPart(_RequestModel):
    neutral_values = neutral.CONTENT_PART

    type: Literal["text"]
    text: Text


class RequestMessage(_RequestModel):
    neutral_values = neutral.MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[
            Annotated[Text, Tag(TEXT)] | Annotated[list[ContentPart], Field(fail_fast=True), Tag(TEXTS)],
            Discriminator(_text_or_list),
        ]
        | None
    ) = Field(None, validate_default=True, description="Null and [] from the assistant alone.")
    name: Name | None = Field(None, description="For the chat template, which may show it.")

    @field_validator("content")
    @classmethod
    def _requires_content(
        cls, value: str | list[ContentPart] | None, info: ValidationInfo
    ) -> str | list[ContentPart] | None:
        if value in (None, []) and info.data.get("role") != "assistant":
            raise PydanticCustomError("missing", "give a string, or a list of parts of type text")
        return value

    @property
    def message(self) -> Message:
        """The message as chat templates take it."""
        # OpenAI's newer name for it, which templates do not know.
        role = "system" if self.role == "developer" else self.role
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": role, "content": content} | ({"name": self.name} if self.name else {})


class ChatRequest(_GenerationRequest):
    neutral_values = neutral.CHAT

    messages: Annotated[list[RequestMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: Count | None = Field(None, description="Default: as many as fit in the context.")
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("max_completion_tokens")
    @classmethod
    def _equals_max_tokens(cls, value: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("max_tokens") not in (None, value):
            raise PydanticCustomError("contradiction", "differs from max_tokens: give one of them")
        return value

    @property
    def prompts(self) -> list[tuple[Message, ...]]:
        return [tuple(message.message for message in self.messages)]

    @property
    def requested_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """The number of alternatives for each token; None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class AdapterInfo(BaseModel):
    """Facts from an adapter's manifest, without its path. `never_chosen` is the reason why model "auto" does not choose
    the adapter; null if it may."""

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
    never_chosen: str | None = None


class ModelCard(BaseModel):
    """`broken` is the reason why a model cannot be used; `parent` is the base of an adapter."""

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
