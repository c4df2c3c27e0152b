"""Render conversations through the chat template, with the spans of the answers.

Only the template knows where an answer begins and ends, so a conversation is rendered up to each
answer and past it. A row is refused if the template does not write a part of it. Limits: rendering
more messages must extend what was rendered before, but for the thinking of an answer, and the
tokenizer must return character offsets.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from ..errors import DataError, InvalidRowError
from . import tool_calls
from .chat import REASONING_FIELDS, FullMessage, decode_row, is_learned, iter_texts
from .tool_calls import Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIXED_DATE = "26 Jul 2024"  # Llama 3's default: today's date would change rows every day
_NO_SPANS = "messages that the chat template renders differently as the conversation grows"
THINKING_TAG = re.compile(r"([<\[]/?[^<>\[\]\s/]*(?:think|thought|reason)[^<>\[\]\s/]*[>\]])", re.IGNORECASE)
# The end of a generation prompt such as "<think>\n", or an empty "<think>\n\n</think>\n\n".
THINKING_START = re.compile(rf"{THINKING_TAG.pattern}(\s*)(?:{THINKING_TAG.pattern}\s*)?$", re.IGNORECASE)

_ROLE = "(?:system|user|assistant|tool|model|developer|human|ipython|function|observation|environment)"
# <|user|>, <｜User｜>, <|USER_TOKEN|>; [INST]; <|im_start|>user, <start_of_turn>user.
_TURN = re.compile(
    rf"<[|｜]{_ROLE}(?:_TOKEN)?[|｜]>|\[\|{_ROLE}\|\]|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS)\]"
    rf"|<(?:[|｜][^<>\s]{{1,40}}|start_of_turn)>\s?{_ROLE}(?=[\s<:])",
    re.IGNORECASE,
)
_RENDERED_START = re.compile(
    rf"\s*(?:<s>|<bos>|\[gMASK\]|<[|｜][^<>\s]{{1,40}}[|｜]>|{_TURN.pattern})", re.IGNORECASE
)


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as the model reads it.

    `answer_spans` are the (start, end) of the answers, in characters. If `by_template`, the text
    has all the special tokens it needs; else the tokenizer may add those at the front.
    """

    text: str
    answer_spans: list[tuple[int, int]]
    by_template: bool


def render_with_spans(
    tokenizer: "PreTrainedTokenizerBase", text: str, max_chars: int | None = None
) -> RenderedChat:
    """Render a row through the chat template.

    Without a template, a prompt and its completion are joined.

    Args:
        max_chars: Answers that begin after so many characters may be missing from `answer_spans`.

    Raises:
        DataError: There is no template for a list of messages.
        InvalidRowError: The template rejects the messages, or does not write a part of them.
    """
    row = decode_row(text)
    if "prompt" in row and not getattr(tokenizer, "chat_template", None):
        return _render_pair(tokenizer, row)
    messages: list[FullMessage] = row.get("messages") or [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    if "reasoning_content" in row:
        messages[-1]["reasoning_content"] = row["reasoning_content"]
    if "system" in row:
        messages.insert(0, {"role": "system", "content": row["system"]})
    while messages[-1]["role"] != "assistant":  # no loss after the last answer
        messages.pop()
    tools = row.get("tools")
    _require_template(tokenizer)
    _refuse_special_tokens(tokenizer, iter_texts([messages, tools]))
    messages, tools = tool_calls.choose_functions(partial(_try_template, tokenizer), messages, tools)
    render = partial(_render, tokenizer, tools=tools)
    messages = tool_calls.choose_arguments(render, messages)
    rendered = render(messages)
    before = render(messages[:-1], add_generation_prompt=True) if len(messages) > 1 else ""
    thinking = ""
    if not rendered.startswith(before):
        messages[-1], thinking = _open_thinking(before, messages[-1])
        rendered = render(messages)
    _refuse_dropped(tokenizer, messages, tools)
    spans = _find_answers(tokenizer, render, messages, rendered, max_chars)
    if thinking and spans and spans[-1][1] == len(rendered):
        start, _ = spans.pop()
        rendered = rendered[:start] + thinking + rendered[start:]
        spans.append((len(before), len(rendered)))
    if spans:
        start, end = spans[-1]
        if end == len(rendered) and not any(token in rendered[start:] for token in special_tokens(tokenizer)):
            rendered += tokenizer.eos_token
            spans[-1] = start, len(rendered)
    return RenderedChat(rendered, spans, by_template=True)


def _render_pair(tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, str]) -> RenderedChat:
    """Join a prompt and its completion, by a space if neither has white space there, for a base
    without a chat template."""
    for name in row.keys() - {"prompt", "completion"}:
        raise InvalidRowError(f"{name}, which a base without a chat template cannot be given")
    prompt, completion = row["prompt"], row["completion"]
    _refuse_special_tokens(tokenizer, [prompt, completion])
    separator = "" if prompt[-1].isspace() or completion[0].isspace() else " "
    rendered = f"{prompt}{separator}{completion}{tokenizer.eos_token}"
    return RenderedChat(rendered, [(len(prompt), len(rendered))], by_template=False)


def _find_answers(
    tokenizer: "PreTrainedTokenizerBase",
    render: Callable[..., str],
    messages: list[FullMessage],
    rendered: str,
    max_chars: int | None,
) -> list[tuple[int, int]]:
    spans = []
    for number, message in enumerate(messages):
        if number == 0 or not is_learned(message):  # templates need a question first
            continue
        before = render(messages[:number], add_generation_prompt=True)
        if not rendered.startswith(before) and (opening := THINKING_START.search(before)):
            before = before[: opening.start()]  # the template takes thinking out of earlier answers
        if not rendered.startswith(before):
            raise InvalidRowError(_NO_SPANS)
        if max_chars is not None and len(before) > max_chars:
            break
        is_last = number == len(messages) - 1
        end = len(rendered) if is_last else _find_answer_end(tokenizer, render, messages, rendered, number)
        spans.append((len(before), end))
    return spans


def _find_answer_end(
    tokenizer: "PreTrainedTokenizerBase",
    render: Callable[..., str],
    messages: list[FullMessage],
    rendered: str,
    number: int,
) -> int:
    """Return the end of an answer, also if the template renders a last message unlike the others."""
    after = render(messages[: number + 1])
    if rendered.startswith(after):
        return len(after)
    marked = [*messages[:number], {"role": "assistant", "content": _mark(0)}, *messages[number + 1 :]]
    rest = render(marked).partition(_mark(0))[2]
    closing = _common_start(rest, render(marked[: number + 1]).partition(_mark(0))[2])
    ends = [closing.rindex(token) + len(token) for token in special_tokens(tokenizer) if token in closing]
    if not ends or not rendered.endswith(rest[max(ends) :]):
        raise InvalidRowError(_NO_SPANS)
    return len(rendered) - len(rest) + max(ends)


def _common_start(one: str, other: str) -> str:
    """Return the text that both begin with."""
    length = next(
        (index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one)
    )
    return one[: min(length, len(other))]


def _open_thinking(before: str, answer: FullMessage) -> tuple[FullMessage, str]:
    """Move the thinking out of the last answer if generation begins within it and the template
    would drop it, as those of DeepSeek-R1 and QwQ do.

    Args:
        before: The conversation before the answer, with the generation prompt.

    Returns:
        The answer, and the thinking with its tags, to be written before it: empty if there is none
        in the answer, "" if generation begins elsewhere.
    """
    opening = THINKING_START.search(before)
    if opening is None:
        return answer, ""
    tag, space, closing = opening.groups()
    if closing or tag[1] == "/":
        return answer, opening.group()
    closing = f"{tag[0]}/{tag[1:]}"
    reasoning, content = answer.get("reasoning_content", ""), answer["content"]
    if closing in content and not reasoning:
        inline, _, content = content.partition(closing)
        reasoning = inline.strip().removeprefix(tag)
    newline = "\n" if "\n" in space else ""
    rest = {name: field for name, field in answer.items() if name != "reasoning_content"}
    return rest | {"content": content.strip()}, f"{tag}{space}{reasoning.strip()}{newline}{closing}{newline * 2}"


def _mark(number: int) -> str:
    """Return a text that no template changes."""
    return f"Qz{number}zQ"


def _try_template(tokenizer: "PreTrainedTokenizerBase", messages: list[FullMessage], tools: Tools) -> None:
    """Raise InvalidRowError if the template rejects a conversation, or does not write a part of it."""
    _render(tokenizer, messages, tools=tools)
    _refuse_dropped(tokenizer, messages, tools)


def _refuse_dropped(tokenizer: "PreTrainedTokenizerBase", messages: list[FullMessage], tools: Tools) -> None:
    """Raise InvalidRowError if the template does not write a part of a conversation: of another
    one, with marks for the texts, each mark is looked for in what is rendered."""
    names: list[str] = []  # the part that each mark stands for

    def mark(name: str) -> str:
        names.append(name)
        return _mark(len(names) - 1)

    def mark_texts(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: mark_texts(item, name) for key, item in value.items()}
        if isinstance(value, list):
            return [mark_texts(item, name) for item in value]
        return mark(name) if isinstance(value, str) and value.strip() else value

    marked_messages, marked_tools = json.loads(json.dumps([messages, tools]))
    for message in marked_messages:
        role = message["role"]
        pieces = THINKING_TAG.split(message["content"])
        pieces[::2] = [mark_texts(piece, f"{role} text") for piece in pieces[::2]]
        message["content"] = "".join(pieces)
        for function in tool_calls.functions(message.get("tool_calls")):
            function["name"] = mark("tool_calls")
        links = {"name", "tool_call_id"} if role == "tool" else set()
        for name in message.keys() - {"role", "content", "tool_calls", "weight"} - links:
            message[name] = mark_texts(message[name], name)
    for function in tool_calls.functions(marked_tools):
        function["name"] = mark("tools")
    rendered = _render_marked(
        tokenizer, json.dumps([marked_messages, marked_tools]), str(tokenizer.chat_template)
    )
    for number, name in enumerate(names):
        if rendered and _mark(number) not in rendered:
            raise InvalidRowError(f"{name} that the chat template does not write")


@lru_cache(maxsize=1024)  # most conversations have the form of another one
def _render_marked(tokenizer: "PreTrainedTokenizerBase", marked: str, template: str) -> str:
    messages, tools = json.loads(marked)
    try:
        return _render(tokenizer, messages, tools=tools)
    except InvalidRowError:  # the template checks the texts themselves
        return ""


def turn_end_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Return the id of the special token with which the chat template ends an answer; often it is
    not the end-of-text token. Empty without such a token."""
    return _turn_end_ids(tokenizer, str(tokenizer.chat_template or ""))


@lru_cache(maxsize=16)
def _turn_end_ids(tokenizer: "PreTrainedTokenizerBase", template: str) -> frozenset[int]:
    messages = json.dumps([{"role": "user", "content": _mark(0)}, {"role": "assistant", "content": _mark(1)}])
    rest = _render_marked(tokenizer, f"[{messages}, null]", template) if template else ""
    closing = rest.rpartition(_mark(1))[2].lstrip()
    ends = [token for token in special_tokens(tokenizer) if closing.startswith(token)]
    return frozenset({tokenizer.get_vocab()[max(ends, key=len)]} if ends else ())


def looks_rendered(text: str) -> bool:
    """Return whether a chat template has rendered a text: it begins with a turn, or with a token
    such as <s>, and has two turns or more."""
    return bool(_RENDERED_START.match(text)) and len(list(itertools.islice(_TURN.finditer(text), 2))) == 2


def is_rendered(tokenizer: "PreTrainedTokenizerBase", text: str) -> bool:
    """Return whether a chat template with special tokens of this base has rendered a text."""
    return looks_rendered(text) and bool(_find_special_token(tokenizer, [text]))


@lru_cache(maxsize=4)
def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    return sorted({str(token) for token in added if token.special} | set(tokenizer.all_special_tokens))


def _find_special_token(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> str:
    """Return a special token that a text spells, and that would be encoded as such; "" if none does."""
    return next((token for text in texts for token in special_tokens(tokenizer) if token in text), "")


def _refuse_special_tokens(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> None:
    if token := _find_special_token(tokenizer, texts):
        raise InvalidRowError(f"a message that contains {token}, a special token of this base")


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[FullMessage],
    *,
    tools: Tools,
    add_generation_prompt: bool = False,
) -> str:
    """Render the messages of a row, with the reasoning under each name that a template may know."""
    complete = []
    for message in messages:
        complete.append({name: field for name, field in message.items() if name != "weight"})
        if "reasoning_content" in message:
            complete[-1] |= dict.fromkeys(REASONING_FIELDS, message["reasoning_content"])
    try:
        return apply_template(
            tokenizer, complete, add_generation_prompt=add_generation_prompt, tools=tools, date_string=FIXED_DATE
        )
    except TemplateError as error:
        raise InvalidRowError(f"messages that the chat template rejects ({str(error)[:200]})") from error


class TemplateError(Exception):
    """The chat template rejects the messages."""


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[FullMessage],
    tools: Tools = None,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render a conversation through the chat template, up to the assistant's next answer.

    Raises:
        DataError: There is no template, it rejects the messages, it does not write tools or their
            calls and results, or a message spells a special token.
    """
    _require_template(tokenizer)
    has_tools = tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages)
    try:
        texts = list(iter_texts(list(messages)))
        if has_tools:
            messages = tool_calls.choose_arguments(partial(_render, tokenizer, tools=tools), list(messages))
            texts.append(json.dumps([messages, tools], ensure_ascii=False))  # with the names of arguments
        if token := _find_special_token(tokenizer, texts):
            raise DataError(f"A message contains {token}, a special token of this base: remove it.")
        if has_tools:
            _refuse_dropped(tokenizer, list(messages), tools)
        return apply_template(tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=tools)
    except InvalidRowError as error:
        raise DataError(f"The conversation has {error}.") from error
    except TemplateError as error:
        raise DataError(f"The chat template rejects these messages: {error}") from error


def _require_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("This base has no chat template: use an instruction-tuned base, such as smollm2-135m.")


def apply_template(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, Any]], **template_kwargs: Any
) -> str:
    """Render messages through the chat template. Raises TemplateError if it rejects them."""
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, **template_kwargs
            )
        )
    except Exception as error:  # templates raise errors of any type
        raise TemplateError(" ".join(str(error).split())) from error
