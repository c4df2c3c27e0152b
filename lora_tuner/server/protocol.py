"""Schemas of requests and models in OpenAI's API: https://platform.openai.com/docs/api-reference.

As there, null stands for an omitted field. Values that would change the output in a way that this
server does not support are rejected by name; `neutral` has those that change nothing.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ..adapters.manifest import EvalResult
from ..config import (
    MAX_COUNT,
    MAX_SETTING_CHARS,
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
    SamplingParams,
)
from ..data.chat import FullMessage
from ..errors import RequestError
from . import neutral
from .fields import (
    OBJECT,
    TEXT,
    TEXTS,
    TOKEN_LISTS,
    TOKENS,
    Name,
    RequestModel,
    Text,
    text_or_list,
    text_or_object,
)
from .forms import Choice, NamedTool, RequestToolCall, ResponseFormat, SchemaOrText, StructuredOutputs, Tool


def _token_bias(value: dict[str, float]) -> dict[str, float]:
    for key, bias in value.items():
        if not _TOKEN_KEY.fullmatch(key) or not -100 <= bias <= 100:
            text = 'give token ids with a value from -100 to 100, such as {"42": -100}'
            raise PydanticCustomError("logit_bias", text)
    return value


_TOKEN_KEY = re.compile("0|[1-9][0-9]{0,8}")
MAX_BIASED_TOKENS = 1024
MAX_STOPS = 64  # OpenAI's limit is 4, but tools for local models send more
Stop = Annotated[Text, Field(max_length=MAX_SETTING_CHARS)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
TokenId = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _alternative(value: object) -> str:
    if not isinstance(value, list):
        return TEXT
    first = value[0] if value else None
    if isinstance(first, list):
        return TOKEN_LISTS
    return TOKENS if isinstance(first, int) else TEXTS


class StreamOptions(RequestModel):
    """Usage in the last chunk; with `continuous_usage_stats`, which is vLLM's, in each."""

    neutral_values = neutral.STREAM_OPTIONS

    include_usage: bool = False
    continuous_usage_stats: bool = False


_PLAIN_TEXT = ResponseFormat(type="text")


class _GenerationRequest(RequestModel):
    """Fields that both endpoints share, those of vLLM after `logit_bias`."""

    model: Name
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: (
        Annotated[dict[str, float], Field(max_length=MAX_BIASED_TOKENS), AfterValidator(_token_bias)] | None
    ) = None
    top_k: int = Field(0, ge=0, le=MAX_COUNT)
    repetition_penalty: float = Field(1.0, ge=MIN_REPETITION_PENALTY, le=10)
    min_p: float = Field(0.0, ge=0, le=1)
    min_tokens: int = Field(0, ge=0, le=MAX_COUNT)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[
            Annotated[Stop, Tag(TEXT)] | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag(TEXTS)],
            Discriminator(text_or_list),
        ]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Name | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: Text | None = None
    guided_choice: Choice | None = None
    guided_grammar: Text | None = None

    @field_validator(
        "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"
    )
    @classmethod
    def _is_only_form(cls, value: object, info: ValidationInfo) -> object:
        if value not in (None, _PLAIN_TEXT) and info.data.get("min_tokens"):
            raise PydanticCustomError(
                "contradiction", "such an output ends where it is complete: leave out min_tokens"
            )
        for name in ("response_format", *(name for name in info.data if name.startswith(("struct", "guided")))):
            other = info.data.get(name)
            if value is not None and other not in (None, _PLAIN_TEXT):
                raise PydanticCustomError(
                    "contradiction", "{name} is given too: give one of them", {"name": name}
                )
        return value

    @field_validator("stream_options", "top_logprobs", check_fields=False)
    @classmethod
    def _requires_flag(cls, value: object, info: ValidationInfo) -> object:
        flag = "stream" if isinstance(value, StreamOptions) else "logprobs"
        if value != StreamOptions() and not info.data.get(flag):
            raise PydanticCustomError("contradiction", f"only allowed with {flag}: true")
        return value

    @property
    def candidates(self) -> int:
        """The number of outputs that are generated for each prompt."""
        return self.n

    def sampling(self, max_tokens: int) -> SamplingParams:
        """Return the settings of a request. Raises RequestError if min_tokens is more than max_tokens."""
        if self.min_tokens > max_tokens:
            text = f"min_tokens is {self.min_tokens:,}: more than max_tokens, which is {max_tokens:,}."
            raise RequestError(text, "min_tokens")
        seed = None if self.seed is None or self.temperature < MIN_TEMPERATURE else self.seed % 2**63
        stop = self.stop if isinstance(self.stop, list) else [self.stop]
        return SamplingParams(
            max_new_tokens=max(max_tokens, 1),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
            stop=[text for text in stop if text],
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            min_new_tokens=self.min_tokens,
            stop_token_ids=self.stop_token_ids or [],
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
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
    echo: bool = False
    max_tokens: int = Field(16, ge=0, le=MAX_COUNT)
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=1, le=128)

    @field_validator("max_tokens")
    @classmethod
    def _has_output(cls, value: int, info: ValidationInfo) -> int:
        if not (value or info.data.get("echo")):
            raise PydanticCustomError("contradiction", "0 leaves nothing to answer without echo: true")
        return value

    @field_validator("best_of")
    @classmethod
    def _at_least_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < info.data.get("n", 1):
            raise PydanticCustomError("contradiction", "must be at least n")
        if value is not None and value > info.data.get("n", value) and info.data.get("stream"):
            text = "outputs that are chosen at the end cannot be streamed: leave out best_of or stream"
            raise PydanticCustomError("contradiction", text)
        return value

    @property
    def candidates(self) -> int:
        return self.best_of or self.n

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


class ContentPart(RequestModel):
    neutral_values = neutral.CONTENT_PART

    type: Literal["text"]
    text: Text


class RequestMessage(RequestModel):
    neutral_values = neutral.MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[Text, Tag(TEXT)] | Annotated[list[ContentPart], Field(fail_fast=True), Tag(TEXTS)],
            Discriminator(text_or_list),
        ]
        | None
    ) = Field(None, validate_default=True, description="Null and [] from the assistant alone.")
    name: Name | None = Field(None, description="For the chat template, which may show it.")
    tool_calls: list[RequestToolCall] | None = Field(None, description="Of the assistant.")
    tool_call_id: Name | None = Field(None, description="Of role tool: the call that this answers.")

    @field_validator("tool_calls", "tool_call_id")
    @classmethod
    def _has_its_role(cls, value: object, info: ValidationInfo) -> object:
        role = "assistant" if info.field_name == "tool_calls" else "tool"
        if value is not None and info.data.get("role") not in (None, role):
            raise PydanticCustomError("contradiction", "only allowed with role {role}", {"role": role})
        return value

    @field_validator("content")
    @classmethod
    def _requires_content(
        cls, value: str | list[ContentPart] | None, info: ValidationInfo
    ) -> str | list[ContentPart] | None:
        if value in (None, []) and info.data.get("role") != "assistant":
            raise PydanticCustomError("missing", "give a string, or a list of parts of type text")
        return value

    @property
    def message(self) -> FullMessage:
        """The message as chat templates take it."""
        # OpenAI's newer name for it, which templates do not know.
        role = "system" if self.role == "developer" else self.role
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        message: FullMessage = {"role": role, "content": content} | ({"name": self.name} if self.name else {})
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        return message | ({"tool_call_id": self.tool_call_id} if self.tool_call_id else {})


MessageList = Annotated[list[RequestMessage], Field(min_length=1, fail_fast=True)]


class ChatRequest(_GenerationRequest):
    neutral_values = neutral.CHAT

    messages: MessageList
    max_tokens: Count | None = Field(None, description="Default: as many as fit in the context.")
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field([], max_length=128)
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag(TEXT)] | Annotated[NamedTool, Tag(OBJECT)],
            Discriminator(text_or_object),
        ]
        | None
    ) = Field(None, description="Default: auto with tools.")
    parallel_tool_calls: bool = True

    @field_validator("tools")
    @classmethod
    def _have_own_names(cls, tools: list[Tool]) -> list[Tool]:
        names = [tool.function.name for tool in tools]
        for name in names:
            if names.count(name) > 1:
                raise PydanticCustomError("contradiction", "two tools have the name {name}", {"name": name})
        return tools

    @field_validator("tool_choice")
    @classmethod
    def _is_among_tools(cls, value: str | NamedTool | None, info: ValidationInfo) -> str | NamedTool | None:
        names = [tool.function.name for tool in info.data.get("tools", [])]
        if value == "required" and not names:
            raise PydanticCustomError("contradiction", "only allowed with tools")
        if isinstance(value, NamedTool) and value.function.name not in names:
            raise PydanticCustomError("contradiction", "no tool has this name")
        return value

    @field_validator("max_completion_tokens")
    @classmethod
    def _equals_max_tokens(cls, value: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("max_tokens") not in (None, value):
            raise PydanticCustomError("contradiction", "differs from max_tokens: give one of them")
        return value

    @property
    def prompts(self) -> list[tuple[FullMessage, ...]]:
        return [tuple(message.message for message in self.messages)]

    @property
    def requested_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """The number of alternatives for each token; None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class LoadAdapterRequest(RequestModel):
    """The body of vLLM. An adapter has the name that it has in the library."""

    neutral_values = neutral.LOAD_ADAPTER

    lora_name: Name
    lora_path: Text | None = Field(None, description="The name again, or the path in the library.")


class UnloadAdapterRequest(RequestModel):
    neutral_values = neutral.UNLOAD_ADAPTER

    lora_name: Name


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
    labels: list[str] | None = None
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
