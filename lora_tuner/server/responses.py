"""What rows have written, as OpenAI's two endpoints put it: whole or in pieces, with the chances of tokens.

A row is read while another thread writes it. Surprise: a token can be a part of a character, so it is told by its bytes; its text
comes with the token that completes it. Limit: tokens of one character all begin where the character does.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..inference.sequence import Sequence, TokenLogprobs
from .protocol import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    Delta,
    FinishReason,
    Logprobs,
    TokenLogprob,
    TopLogprob,
)
from .service import ModelService

MIN_LOGPROB = -9999.0  # as OpenAI writes the logarithm of nothing
TokenSpeller = Callable[[int], tuple[str, list[int] | None]]


@dataclass(frozen=True)
class OutputDelta:
    """What is new of an answer: text, the chances of its tokens where they were asked for, and how it ended."""

    text: str
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    first: bool


@dataclass
class OutputReader:
    """How far a row has been told."""

    sequence: Sequence
    characters: int = 0
    tokens: int = 0
    ended: bool = False
    begun: bool = False

    def next_delta(self) -> OutputDelta | None:
        """What is new, if anything is. Another thread writes: the end is looked at first, so that nothing comes after it."""
        if self.ended:
            return None
        complete = self.sequence.complete
        said = self.sequence.settled_text
        text = said[self.characters :]
        chances = None
        if self.sequence.top_logprobs is not None:
            whole = (
                complete and not self.sequence.detokenizer.stopped
            )  # else tokens beyond the end have no place in the text
            chances = [it for it in self.sequence.logprobs[self.tokens :] if whole or it.text_offset < len(said)]
        if not (text or chances or complete):
            return None
        first, self.begun, self.ended = not self.begun, True, complete
        self.characters, self.tokens = len(said), self.tokens + len(chances or ())
        finish: FinishReason | None = ("stop" if self.sequence.finished else "length") if complete else None
        return OutputDelta(text, chances, finish, first)


@dataclass(frozen=True)
class EndpointFormat:
    """How an endpoint puts its answers, whole and in pieces. `prompt` gives the tokens of what was asked."""

    prefix: str
    prompt: Callable[[ModelService, Any], list[int]]
    response: Callable[..., Any]
    choice: Callable[[int, OutputDelta, TokenSpeller], Any]
    chunk: Callable[..., Any]
    chunk_choice: Callable[[int, OutputDelta, TokenSpeller], Any]


def _completion_choice(index: int, piece: OutputDelta, spell: TokenSpeller) -> CompletionChoice:
    return CompletionChoice(
        index=index, text=piece.text, logprobs=_logprobs(piece, spell), finish_reason=piece.finish_reason
    )


def _logprobs(piece: OutputDelta, spell: TokenSpeller) -> Logprobs | None:
    if piece.logprobs is None:
        return None
    best: list[dict[str, float]] = []
    for it in piece.logprobs:
        best.append({})
        for token, logprob in [*it.top, (it.token, it.logprob)]:
            best[-1].setdefault(spell(token)[0], max(logprob, MIN_LOGPROB))
    return Logprobs(
        tokens=[spell(it.token)[0] for it in piece.logprobs],
        token_logprobs=[max(it.logprob, MIN_LOGPROB) for it in piece.logprobs],
        top_logprobs=best,
        text_offset=[it.text_offset for it in piece.logprobs],
    )


def _chat_choice(index: int, piece: OutputDelta, spell: TokenSpeller) -> ChatChoice:
    assert piece.finish_reason is not None
    said = ChatMessage(role="assistant", content=piece.text)
    return ChatChoice(
        index=index, message=said, logprobs=_chat_logprobs(piece, spell), finish_reason=piece.finish_reason
    )


def _chat_chunk_choice(index: int, piece: OutputDelta, spell: TokenSpeller) -> ChatChunkChoice:
    delta = Delta(role="assistant", content=piece.text) if piece.first else Delta(content=piece.text)
    return ChatChunkChoice(
        index=index, delta=delta, logprobs=_chat_logprobs(piece, spell), finish_reason=piece.finish_reason
    )


def _chat_logprobs(piece: OutputDelta, spell: TokenSpeller) -> ChatLogprobs | None:
    if piece.logprobs is None:
        return None

    def facts(token: int, logprob: float) -> dict[str, Any]:
        text, data = spell(token)
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": data}

    return ChatLogprobs(
        content=[
            TokenLogprob(**facts(it.token, it.logprob), top_logprobs=[TopLogprob(**facts(*best)) for best in it.top])
            for it in piece.logprobs
        ]
    )


COMPLETION = EndpointFormat(
    "cmpl-",
    ModelService.encode_prompt,
    *(partial(Completion, object="text_completion"), _completion_choice),
    *(partial(Completion, object="text_completion"), _completion_choice),
)
CHAT = EndpointFormat(
    "chatcmpl-",
    ModelService.encode_chat,
    *(partial(ChatCompletion, object="chat.completion"), _chat_choice),
    *(partial(ChatCompletionChunk, object="chat.completion.chunk"), _chat_chunk_choice),
)


_PRINTABLE_BYTES = [
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
]  # bytes that GPT-2's vocabulary writes as themselves
_OTHER_BYTES = [byte for byte in range(256) if byte not in _PRINTABLE_BYTES]
_BYTE_OF_CHAR = {chr(byte): byte for byte in _PRINTABLE_BYTES} | {
    chr(256 + place): byte for place, byte in enumerate(_OTHER_BYTES)
}


def token_text(tokenizer: Any, token: int) -> tuple[str, list[int] | None]:
    """A token as text, and its bytes; of one that is a part of a character, the bytes in place of text, as OpenAI writes them."""

    def text(*tokens: int) -> str:
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    found = text(token, token)[len(text(token)) :]  # alone, some lose the space before them
    if "\ufffd" not in found:
        return found, list(found.encode())
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        data = [int(match[1], 16)]
    elif all(letter in _BYTE_OF_CHAR for letter in piece):
        data = [_BYTE_OF_CHAR[letter] for letter in piece]
    else:
        return found, None
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data
