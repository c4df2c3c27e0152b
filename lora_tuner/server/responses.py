"""Response schemas of OpenAI's two endpoints, filled with the output of sequences.

A response is whole or a delta of a stream.

Sequences are read while the scheduler's thread extends them. A token may be part of a character: it
is then spelled by its bytes, and the text follows with the token that completes the character. All
tokens of one character share its text offset.
"""

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, Field
from transformers import PreTrainedTokenizerBase

from ..data.call_format import ToolCall
from ..inference import sequence
from ..inference.detokenizer import IncrementalDetokenizer
from ..inference.detokenizer import token_text as token_text
from ..inference.routing import Choice
from ..inference.sequence import TokenLogprobs

MIN_LOGPROB = -9999.0  # OpenAI's value for a probability of zero
FinishReason = sequence.FinishReason | Literal["tool_calls"]
TokenSpeller = Callable[[int], tuple[str, list[int] | None]]  # see `token_text`


# Schemas


class PromptTokensDetails(BaseModel):
    """`cached_tokens` of the prompt were not computed again: it begins like an earlier one."""

    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Logprobs(BaseModel):
    """One entry for each token. `text_offset` is where the token begins in the text.

    Null for the first token of a prompt, which nothing comes before.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class ResponseFields(BaseModel):
    """Fields that a response and all chunks of a stream share. `routing` is for model "auto"; of a stream it is in
    the first chunk."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | None = None
    routing: Choice | None = Field(None, exclude_if=lambda value: value is None)


class Completion(ResponseFields):
    """A response of /v1/completions, or a chunk of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class TopLogprob(BaseModel):
    """`bytes` is null for a token whose bytes are unknown."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class CalledFunction(BaseModel):
    """`arguments` are JSON, unless a limit has cut them off."""

    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """`index` is in deltas alone."""

    index: int | None = Field(None, exclude_if=lambda index: index is None)
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """`content` is null for calls of tools without a text before them."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[MessageToolCall] | None = Field(None, exclude_if=lambda calls: calls is None)


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(ResponseFields):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None
    tool_calls: list[MessageToolCall] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(ResponseFields):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


# Output of sequences


@dataclass(frozen=True)
class EchoedPrompt:
    """Text of a prompt, and where each of its tokens begins in it."""

    text: str
    token_ids: list[int]
    offsets: list[int]

    @classmethod
    def of_tokens(
        cls, tokenizer: PreTrainedTokenizerBase, token_ids: list[int], text: str | None
    ) -> "EchoedPrompt":
        """Decode a prompt; `text` if that is known, which the tokenizer may spell otherwise."""
        detokenizer, offsets = IncrementalDetokenizer(tokenizer, []), []
        for token in token_ids:
            offsets.append(len(detokenizer.text))
            detokenizer.append(token)
        detokenizer.finish()
        text = detokenizer.text if text is None else text
        return cls(text, token_ids, [min(offset, len(text)) for offset in offsets])


@dataclass(frozen=True)
class OutputDelta:
    """New output of a sequence. `logprobs` is None where the request asked for none.

    `echo` is the prompt before the first output, if it was asked for.
    """

    text: str
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    first: bool
    tool_calls: Sequence[ToolCall] = ()
    echo: EchoedPrompt | None = None


@dataclass
class OutputReader:
    """Reads a sequence piece by piece; after its prompt, if that is to be echoed."""

    sequence: sequence.Sequence
    echo: EchoedPrompt | None = None
    characters: int = 0  # read so far
    tokens: int = 0
    ended: bool = False

    def next_delta(self) -> OutputDelta | None:
        """Return the output since the last call, or None.

        `complete` is read before the text: another thread sets it last, so no output is missed.
        """
        if self.ended:
            return None
        complete, settled = self.sequence.complete, self.sequence.settled_text
        text = settled[self.characters :]
        logprobs = None
        if self.sequence.top_logprobs is not None:
            logprobs = self.sequence.logprobs[self.tokens :]
            if not complete or self.sequence.detokenizer.stopped:
                # Held back until their text is settled; beyond a stop sequence it never is.
                logprobs = [token for token in logprobs if token.text_offset < len(settled)]
        if not (text or logprobs or complete):
            return None
        first, self.ended = self.characters == self.tokens == 0, complete
        self.characters, self.tokens = len(settled), self.tokens + len(logprobs or ())
        if self.echo is not None:
            if logprobs is not None:
                logprobs = self._after_prompt(self.echo, logprobs, first)
            text = self.echo.text + text if first else text
        reason = self.sequence.finish_reason if complete else None
        return OutputDelta(text, logprobs, reason, first, echo=self.echo if first else None)

    def _after_prompt(
        self, echo: EchoedPrompt, logprobs: list[TokenLogprobs], first: bool
    ) -> list[TokenLogprobs]:
        """Return log-probabilities with offsets in prompt and output; the first ones after those of
        the prompt."""
        start = len(echo.text)
        scored = [replace(token, text_offset=start + token.text_offset) for token in logprobs]
        if not first:
            return scored
        prompt = zip(self.sequence.prompt_logprobs, echo.offsets[1:], strict=True)
        return [*(replace(token, text_offset=offset) for token, offset in prompt), *scored]


@dataclass(frozen=True)
class EndpointFormat:
    """Formats outputs by their index: all as one response, or some as a chunk of a stream.

    `stream` makes the events where they are no chunks; its arguments are those of the generator
    that `generate` has for chunks.
    """

    id_prefix: str
    response: Callable[[ResponseFields, dict[int, OutputDelta], TokenSpeller], BaseModel]
    chunk: Callable[[ResponseFields, dict[int, OutputDelta], TokenSpeller], BaseModel] | None = None
    stream: Callable[..., AsyncIterator[str]] | None = None


def _completion(fields: ResponseFields, outputs: dict[int, OutputDelta], spell: TokenSpeller) -> Completion:
    choices = [
        CompletionChoice(
            index=index,
            text=output.text,
            logprobs=_logprobs(output, spell),
            finish_reason=output.finish_reason,
        )
        for index, output in outputs.items()
    ]
    return Completion(**fields.model_dump(exclude_unset=True), object="text_completion", choices=choices)


def _logprobs(output: OutputDelta, spell: TokenSpeller) -> Logprobs | None:
    if output.logprobs is None:
        return None
    top_logprobs: list[dict[str, float] | None] = []
    for token in output.logprobs:
        by_text: dict[str, float] = {}
        for alternative, logprob in [*token.top, (token.token, token.logprob)]:
            by_text.setdefault(spell(alternative)[0], max(logprob, MIN_LOGPROB))
        top_logprobs.append(by_text)
    logprobs = Logprobs(
        tokens=[spell(token.token)[0] for token in output.logprobs],
        token_logprobs=[max(token.logprob, MIN_LOGPROB) for token in output.logprobs],
        top_logprobs=top_logprobs,
        text_offset=[token.text_offset for token in output.logprobs],
    )
    if output.echo is not None:
        logprobs.tokens.insert(0, spell(output.echo.token_ids[0])[0])
        logprobs.token_logprobs.insert(0, None)
        logprobs.top_logprobs.insert(0, None)
        logprobs.text_offset.insert(0, 0)
    return logprobs


def _chat_completion(
    fields: ResponseFields, outputs: dict[int, OutputDelta], spell: TokenSpeller
) -> ChatCompletion:
    choices = []
    for index, output in outputs.items():
        assert output.finish_reason is not None
        message = ChatMessage(content=output.text)
        if output.tool_calls:
            message = ChatMessage(content=output.text or None, tool_calls=_tool_calls(output.tool_calls))
        choices.append(
            ChatChoice(
                index=index,
                message=message,
                logprobs=_chat_logprobs(output, spell),
                finish_reason=output.finish_reason,
            )
        )
    return ChatCompletion(**fields.model_dump(exclude_unset=True), choices=choices)


def _chat_chunk(
    fields: ResponseFields, outputs: dict[int, OutputDelta], spell: TokenSpeller
) -> ChatCompletionChunk:
    choices = []
    for index, output in outputs.items():
        delta = Delta(role="assistant", content=output.text) if output.first else Delta(content=output.text)
        if output.tool_calls:
            delta.content, delta.tool_calls = output.text or None, _tool_calls(output.tool_calls, indexed=True)
        choices.append(
            ChatChunkChoice(
                index=index,
                delta=delta,
                logprobs=_chat_logprobs(output, spell),
                finish_reason=output.finish_reason,
            )
        )
    return ChatCompletionChunk(
        **fields.model_dump(exclude_unset=True), object="chat.completion.chunk", choices=choices
    )


def _tool_calls(calls: Sequence[ToolCall], *, indexed: bool = False) -> list[MessageToolCall]:
    messages = []
    for number, call in enumerate(calls):
        function = CalledFunction(name=call.name, arguments=call.arguments)
        message = MessageToolCall(id=f"call_{secrets.token_hex(12)}", type="function", function=function)
        if indexed:
            message.index = number
        messages.append(message)
    return messages


def _chat_logprobs(output: OutputDelta, spell: TokenSpeller) -> ChatLogprobs | None:
    if output.logprobs is None:
        return None
    content = []
    for token in output.logprobs:
        chosen = _top_logprob(token.token, token.logprob, spell)
        content.append(
            TokenLogprob(
                **chosen.model_dump(),
                top_logprobs=[_top_logprob(*alternative, spell) for alternative in token.top],
            )
        )
    return ChatLogprobs(content=content)


def _top_logprob(token: int, logprob: float, spell: TokenSpeller) -> TopLogprob:
    text, data = spell(token)
    return TopLogprob(token=text, logprob=max(logprob, MIN_LOGPROB), bytes=data)


COMPLETION = EndpointFormat("cmpl-", _completion, _completion)
CHAT = EndpointFormat("chatcmpl-", _chat_completion, _chat_chunk)
