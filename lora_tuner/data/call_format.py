"""The format in which a chat template writes calls of tools, learnt from calls that it has rendered.

Limit: each call is its name, followed by its arguments as JSON, as most templates have it; not, for
one, the XML of Qwen3-Coder.
"""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ..errors import DataError
from .chat import FullMessage
from .chat_template import THINKING_START, THINKING_TAG, TemplateError, apply_template
from .tool_calls import Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ToolCall:
    """A call in a text. `arguments` are JSON, but for those that the end of the text cuts off."""

    name: str
    arguments: str


@dataclass(frozen=True)
class CallFormat:
    """Texts around the names and JSON arguments of calls, as a chat template writes them.

    `begin` NAME `between` ARGUMENTS, again for each other call after `separator`, then `end`.
    Without a separator there is one call only.
    """

    begin: str
    between: str
    end: str
    separator: str | None

    @property
    def opening(self) -> str:
        """The tag that begins calls anywhere in an answer; "": they are at its start or nowhere."""
        tag = _TAG.match(self.begin)
        return tag.group() if tag else ""

    def find_start(self, text: str) -> int | None:
        """Return where the calls in an answer begin, None without any."""
        position = text.find(self.opening) if self.opening else -1
        if position >= 0:
            return position
        return 0 if not self.opening and text[:1] == self.begin[:1] else None

    def read_calls(self, text: str, names: Sequence[str]) -> list[ToolCall]:
        """Return the calls of a text that begins with them, up to where it is cut off."""
        calls: list[ToolCall] = []
        before, position = self.begin, 0
        while text.startswith(before, position):
            position += len(before)
            matches = [name for name in names if text.startswith(name + self.between, position)]
            if not matches:
                break
            name = max(matches, key=len)
            position += len(name + self.between)
            try:
                _, end = json.JSONDecoder().raw_decode(text, position)
            except (ValueError, RecursionError):
                end = len(text)
            calls.append(ToolCall(name, text[position:end]))
            if self.separator is None:
                break
            before, position = self.separator, end
        return calls


_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s{\"]+\]")
# Nine letters and digits, as some templates need.
_ID = re.compile(r',\s*"id":\s*"Qz\dzQcall"|"id":\s*"Qz\dzQcall",?\s*')
_ARGUMENTS = re.compile(r'\{\s*"Qz5zQ":\s*"Qz6zQ"\s*\}')
_NAME = "Qz1zQ"
_EMPTY_THINKING = re.compile(rf"^\s*{THINKING_TAG.pattern}\s*{THINKING_TAG.pattern}\s*", re.IGNORECASE)
_QUESTION: FullMessage = {"role": "user", "content": "Qz7zQ"}
_ANSWER = "Qz8zQ"
_TOOLS: Tools = [
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


def learn_call_format(tokenizer: "PreTrainedTokenizerBase") -> CallFormat:
    """Return how the chat template writes calls of tools.

    Raises:
        DataError: There is no template, it has no tools, or it writes calls in another way.
    """
    if not tokenizer.chat_template:
        raise DataError("This base has no chat template: use an instruction-tuned base.")
    return _learn(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=16)
def _learn(tokenizer: "PreTrainedTokenizerBase", template: str) -> CallFormat:
    def render(*answers: FullMessage) -> str:
        asked = not answers
        return apply_template(tokenizer, [_QUESTION, *answers], tools=_TOOLS, add_generation_prompt=asked)

    def render_calls(arguments: object, count: int) -> str:
        function = {"name": _NAME, "arguments": arguments}
        calls = [{"id": f"Qz{number}zQcall", "type": "function", "function": function} for number in range(count)]
        rendered, start = render({"role": "assistant", "content": "", "tool_calls": calls}), before
        if not rendered.startswith(start) and (opening := THINKING_START.search(start)):
            start = start[: opening.start()]  # an answer without thinking
        answer = _EMPTY_THINKING.sub("", rendered[len(start) :]).removesuffix(closing)
        return answer.partition(tokenizer.eos_token)[0] if tokenizer.eos_token else answer

    try:
        before = render()
        closing = render({"role": "assistant", "content": _ANSWER}).rpartition(_ANSWER)[2]
    except TemplateError as error:
        raise DataError(f"The chat template of this base rejects tools: {error}") from error
    if _NAME not in before:
        raise DataError("The chat template of this base has no tools.")
    for arguments in ({"Qz5zQ": "Qz6zQ"}, '{"Qz5zQ": "Qz6zQ"}'):
        one = two = ""
        with contextlib.suppress(TemplateError):  # many take one call only
            one = render_calls(arguments, 1)
            two = render_calls(arguments, 2)
        call_format = _read_format(one, two)
        if call_format is not None:
            return call_format
    raise DataError(
        "The chat template of this base writes calls of tools otherwise than as a name, "
        "followed by the arguments as JSON."
    )


def _read_format(one: str, two: str) -> CallFormat | None:
    """Return the format of one and of two calls as rendered ("": a template for one only); None if
    it has other parts."""
    parts = _ARGUMENTS.split(_ID.sub("", one))
    pieces = _ARGUMENTS.split(_ID.sub("", two))
    if len(parts) != 2 or parts[0].count(_NAME) != 1:
        return None
    (begin, between), end = parts[0].split(_NAME), parts[1]
    separator = None
    if len(pieces) == 3 and (pieces[0], pieces[2]) == (parts[0], end):
        separator = pieces[1].removesuffix(_NAME + between)
    is_read = begin.strip() and "zQ" not in f"{begin}{between}{end}{separator}"
    # White space parts the first call from a text before it.
    return CallFormat(begin.lstrip(), between, end, separator) if is_read else None
