"""Turn token ids into text one token at a time."""

import re
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTEXT_TOKENS = 6  # decoded before new ones, because some tokenizers drop a leading space
_INCOMPLETE = "\ufffd"  # decoded in place of a character that lacks bytes


class IncrementalDetokenizer:
    """Text of a growing list of tokens.

    `stable_text` excludes what a stop string may still remove; other threads may read it, and
    nothing else.

    Args:
        stop: the text ends before the first of these strings, or after it with `include_stop`.
        min_tokens: a stop string within so many tokens ends nothing.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: list[int],
        stop: Iterable[str] = (),
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.stop = list(stop)
        self.include_stop = include_stop
        self._tokens_left = min_tokens  # that no stop string may end
        self.text = self.stable_text = ""
        self.stopped = False
        self._context = [list(prompt_ids[-CONTEXT_TOKENS:])]  # groups of whole characters
        while len(self._context[0]) < len(prompt_ids) and self._decode(self._context)[:1] in ("", _INCOMPLETE):
            # Began inside a character.
            self._context = [list(prompt_ids[-2 * len(self._context[0]) :])]
        self._context_text = self._decode(self._context)
        self._pending: list[int] = []  # tokens whose last character may lack bytes

    def _decode(self, groups: list[list[int]]) -> str:
        return str(
            self.tokenizer.decode(
                [token for group in groups for token in group],
                skip_special_tokens=self.skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def append(self, token: int) -> None:
        self._pending.append(token)
        self._tokens_left -= 1
        decoded = self._decode([*self._context, self._pending])
        if not decoded.endswith(_INCOMPLETE):
            self._commit(decoded)

    def finish(self) -> None:
        """Flush an incomplete character: no more tokens follow."""
        if self._pending and not self.stopped:
            self._commit(self._decode([*self._context, self._pending]))

    def _commit(self, decoded: str) -> None:
        """Add the text of the pending tokens, given that of context and pending tokens."""
        start, text = len(self.text), self.text + decoded[len(self._context_text) :]
        self._context.append(self._pending)
        self._context_text, self._pending = decoded, []
        while sum(map(len, self._context[1:])) >= CONTEXT_TOKENS and (shorter := self._decode(self._context[1:])):
            self._context_text, self._context = shorter, self._context[1:]
        positions = [(text.find(stop, max(0, start - len(stop) + 1)), stop) for stop in self.stop]
        hits = [(position, stop) for position, stop in positions if position >= 0]
        if hits and self._tokens_left < 0:
            position, stop = min(hits)
            text, self.stopped = text[: position + len(stop) * self.include_stop], True
        held_back = (
            0 if self.stopped or self.include_stop else max((len(stop) - 1 for stop in self.stop), default=0)
        )
        self.text, self.stable_text = text, text[: max(len(text) - held_back, 0)]


# The characters with which GPT-2's vocabulary writes single bytes.
_BYTE_OF_CHAR: dict[str, int] = {char: byte for byte, char in bytes_to_unicode().items()}


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> tuple[str, list[int] | None]:
    """Return the text and the bytes of a token.

    A token that is part of a character is spelled as OpenAI does, such as `bytes:\\xe2`. The bytes
    are None where the tokenizer does not tell them.
    """

    def decode(*ids: int) -> str:
        return str(tokenizer.decode([*ids], clean_up_tokenization_spaces=False))

    # Decoded alone, some tokens lose their leading space.
    text = decode(token, token)[len(decode(token)) :]
    if "\ufffd" not in text:
        return text, list(text.encode())
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        data = [int(match[1], 16)]
    elif all(character in _BYTE_OF_CHAR for character in piece):
        data = [_BYTE_OF_CHAR[character] for character in piece]
    else:
        return text, None
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data
