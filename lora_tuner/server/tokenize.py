"""Prompts to token ids and back, with the endpoints of vLLM: /tokenize and /detokenize.

The ids are those that a request for a completion or an answer would have, of any length.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from transformers import PreTrainedTokenizerBase

from ..data import tokenization
from ..errors import RequestError
from ..inference.multi_lora import LoadedAdapter
from . import neutral
from .fields import Name, RequestModel, Text
from .prompts import Prompt
from .protocol import MessageList, RequestMessage, TokenId
from .responses import EchoedPrompt
from .service import ModelService, PreparedRequest

DECODE_COST = 32  # a token that is decoded alone takes as long as so many that are encoded


class TokenizeRequest(RequestModel):
    """A text or a conversation. Without a model the tokenizer is that of the base."""

    neutral_values = neutral.TOKENIZE

    model: Name | None = None
    prompt: Text | None = None
    messages: MessageList | None = Field(None, validate_default=True)
    add_special_tokens: bool | None = Field(None, description="Of a prompt alone; default: true.")
    add_generation_prompt: bool | None = Field(None, description="Of messages alone; default: true.")
    return_token_strs: bool = False

    @field_validator("messages")
    @classmethod
    def _is_alternative(
        cls, value: list[RequestMessage] | None, info: ValidationInfo
    ) -> list[RequestMessage] | None:
        if (value is None) == (info.data.get("prompt") is None):
            raise PydanticCustomError("contradiction", "give prompt or messages: one of them")
        return value

    @field_validator("add_special_tokens", "add_generation_prompt")
    @classmethod
    def _belongs_to_kind(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        is_chat = info.data.get("messages") is not None
        if value and is_chat == (info.field_name == "add_special_tokens"):
            other = "prompt" if is_chat else "messages"
            raise PydanticCustomError("contradiction", "only allowed with {other}", {"other": other})
        return value


class TokenizeResponse(BaseModel):
    """`max_model_len` is the context length, in tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestModel):
    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class DetokenizeResponse(BaseModel):
    prompt: str


async def tokenize(service: ModelService, body: TokenizeRequest) -> TokenizeResponse:
    """Return token ids. Raises what `ModelService.find_adapter` and `PromptEncoder.render` raise."""
    _, lora = await service.find_adapter(body.model or service.name)
    text, messages = body.prompt or "", tuple(message.message for message in body.messages or ())

    def encode(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[str] | None]:
        if body.messages is not None:
            rendered = service.prompts.render(messages, tokenizer, body.add_generation_prompt is not False)
            token_ids = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        elif body.add_special_tokens is False:
            settings = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            token_ids = tokenizer(text, **settings)["input_ids"]
        else:
            token_ids = tokenization.encode_texts(tokenizer, [text], add_eos=False)[0].tolist()
        return token_ids, list(tokenizer.convert_ids_to_tokens(token_ids)) if body.return_token_strs else None

    size = len(text) + sum(len(part) for message in messages for part in message.values())
    token_ids, token_strs = await service.run_with_tokenizer(size, lora, encode)
    return TokenizeResponse(
        count=len(token_ids), max_model_len=service.base.max_context, tokens=token_ids, token_strs=token_strs
    )


async def detokenize(service: ModelService, body: DetokenizeRequest) -> DetokenizeResponse:
    """Return the text of token ids, special ones included. Raises RequestError for unknown ids, and
    what `ModelService.find_adapter` raises."""
    _, lora = await service.find_adapter(body.model or service.name)
    check_token_ids(service, lora, tokens=body.tokens)

    def decode(tokenizer: PreTrainedTokenizerBase) -> str:
        return str(tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False))

    return DetokenizeResponse(prompt=await service.run_with_tokenizer(len(body.tokens), lora, decode))


def check_token_ids(service: ModelService, lora: LoadedAdapter | None, **fields: Iterable[int]) -> None:
    """Raise RequestError for a field with a token id that the model lacks."""
    count = (lora and lora.vocab_size) or service.base.vocab_size
    for field, token_ids in fields.items():
        if unknown := [token for token in token_ids if token >= count]:
            problem = f"there is no token {unknown[0]}: give ids from 0 to {count - 1}"
            raise RequestError(f"{field}: {problem}.", field)


async def echo_all(
    service: ModelService, prompts: Sequence[Prompt], prepared: PreparedRequest
) -> list[EchoedPrompt]:
    """Return prompts as text; of token ids without the special ones, as in outputs."""

    def echo(tokenizer: PreTrainedTokenizerBase) -> list[EchoedPrompt]:
        return [
            EchoedPrompt.of_tokens(tokenizer, ids, prompt if isinstance(prompt, str) else None)
            for prompt, ids in zip(prompts, prepared.prompts, strict=True)
        ]

    size = DECODE_COST * sum(map(len, prepared.prompts))
    return await service.run_with_tokenizer(size, prepared.lora, echo)
