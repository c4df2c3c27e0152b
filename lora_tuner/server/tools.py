"""Tools of a request: a grammar of their calls in the template's own format, and calls read back."""

import json
import re
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from ..data.call_format import CallFormat
from ..errors import RequestError
from ..inference.constraints import JSON_OPTIONS, Grammar
from .forms import NamedTool, Tool
from .protocol import ChatRequest
from .responses import OutputDelta, OutputReader


@dataclass(frozen=True)
class ToolUse:
    """Tools, and which of them the answer calls: "auto", "required", "none", or one by its name."""

    tools: list[Tool]
    choice: str
    several: bool  # calls in one answer

    @property
    def callable(self) -> list[Tool]:
        named = [tool for tool in self.tools if tool.function.name == self.choice]
        return named if self.choice not in ("auto", "required", "none") else self.tools

    def for_template(self) -> list[dict[str, object]]:
        """Return the tools as chat templates take them."""
        return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools]

    def grammar(
        self, call_format: CallFormat, tokenizer: PreTrainedTokenizerBase, answer: Grammar | None
    ) -> Grammar:
        """Return the grammar of the output: calls, or with "auto" calls or an answer: text, which calls may
        end, or what its own grammar gives.

        Raises RequestError for schemas that are nested too deeply, and an answer that is no JSON.
        """
        specials = _special_tokens(tokenizer)
        end = _literals(call_format.end, specials)
        calls = "call"
        if self.several and call_format.separator is not None:
            calls = f"call ({_literals(call_format.separator, specials)} call)*"
        rules = [
            f"calls: {calls} {end}",
            f"call: {' | '.join(f'call{number}' for number in range(len(self.callable)))}",
        ]
        for number, tool in enumerate(self.callable):
            before = _literals(f"{tool.function.name}{call_format.between}", specials)
            rules.append(f"call{number}: {before} {_arguments(tool)}")
        begin = _literals(call_format.begin, specials)
        if self.choice != "auto":
            rules.append(f"start: {begin} calls")
        elif answer is None:
            rules += _text_or_calls(call_format, specials)
        elif answer.kind == "json":
            rules.append(f"start: {_inline(json.loads(answer.text), answer.field)} | {begin} calls")
        else:
            raise RequestError(f"{answer.field}: not supported beside tools, as JSON is.", answer.field)
        return Grammar("lark", "\n".join(rules), "tools")


def requested_tools(body: ChatRequest) -> ToolUse | None:
    if not body.tools:
        return None
    choice = body.tool_choice or "auto"
    name = choice.function.name if isinstance(choice, NamedTool) else choice
    return ToolUse(body.tools, name, body.parallel_tool_calls)


def _arguments(tool: Tool) -> str:
    """Return the Lark expression of a tool's arguments. Of parameters that are not strict, what masks
    cannot keep is left out."""
    schema = tool.function.parameters or {"properties": {}, "additionalProperties": False}
    return _inline({"type": "object", **schema}, "tools", lenient=not tool.function.strict)


def _inline(schema: dict[str, object], field: str, *, lenient: bool = False) -> str:
    try:
        return f"%json {json.dumps({**schema, 'x-guidance': {**JSON_OPTIONS, 'lenient': lenient}})}"
    except RecursionError as error:
        raise RequestError(f"{field}: it is nested too deeply.", field) from error


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, bool]]:
    """Return id and kind (True: shown in texts) of the tokens that llguidance takes for special."""
    tokens = {str(token): (number, not token.special) for number, token in tokenizer.added_tokens_decoder.items()}
    return {
        text: (number, shown)
        for text, (number, shown) in tokens.items()
        if not shown or (text.startswith("<") and text.endswith(">"))
    }


def _literals(text: str, specials: dict[str, tuple[int, bool]]) -> str:
    """Return the Lark expression of a text, in which special tokens are tokens."""
    longest_first = sorted(specials, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    parts = re.split(f"({pattern})", text) if pattern else [text]
    return " ".join(
        f"<[{specials[part][0]}]>" if part in specials else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    )


def _text_or_calls(call_format: CallFormat, specials: dict[str, tuple[int, bool]]) -> list[str]:
    """Return rules of a text that calls may end, or of calls alone if their format has no opening."""
    opening, begin = call_format.opening, call_format.begin
    others = [str(number) for text, (number, shown) in specials.items() if shown and text not in begin]
    text = f"(TEXT <[{','.join(others)}]>)* TEXT" if others else "TEXT"  # with tags such as those of thinking
    rest = f"{_literals(begin.removeprefix(opening), specials)} calls"
    rules = ["TEXT: /(.|\\n)*/"]
    if not opening:
        return [*rules, f"NO_CALL: /([^\\x{{{ord(begin[0]):x}}}](.|\\n)*)?/", f"start: NO_CALL | {rest}"]
    if opening in specials:
        return [*rules, f"start: {text} (<[{specials[opening][0]}]> {rest})?"]
    rules.append(f"opening[lazy]: TEXT {json.dumps(opening, ensure_ascii=False)}")
    return [*rules, f"start: {text} | {text.removesuffix('TEXT')} opening {rest}"]


@dataclass(kw_only=True)
class CallReader(OutputReader):
    """Reads an answer with calls of tools: the text before them piece by piece, then all calls at
    once. The text of calls that end before their name is a part of the text."""

    tools: ToolUse
    call_format: CallFormat
    shown: int = 0  # characters that were returned
    begun: bool = False

    def next_delta(self) -> OutputDelta | None:
        delta = super().next_delta()
        if delta is None:
            return None
        text, complete = self.sequence.settled_text[: self.characters], delta.finish_reason is not None
        start = self.call_format.find_start(text) if self.tools.choice == "auto" else 0
        calls, end = [], len(text)
        if start is not None:
            names = [tool.function.name for tool in self.tools.callable]
            calls = self.call_format.read_calls(text[start:], names) if complete else []
            end = start if calls or not complete else end
        elif not complete:
            end -= _begun_length(text, self.call_format.opening)
        piece, self.shown = text[self.shown : end], max(self.shown, end)
        if not (piece or delta.logprobs or complete):
            return None
        first, self.begun = not self.begun, True
        reason = "tool_calls" if calls and self.sequence.hit_eos else delta.finish_reason
        return replace(delta, text=piece, finish_reason=reason, first=first, tool_calls=calls)


def _begun_length(text: str, opening: str) -> int:
    """Return how many characters at the end of a text may begin the opening of a call."""
    lengths = range(min(len(text), len(opening) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(opening[:length])), 0)
