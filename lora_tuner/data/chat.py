"""Encode conversations as rows of text.

A row of `messages`, or of `prompt` and `completion`, becomes one text that begins with a mark which
no cleaned text has; so does a plain text of which a part alone is learned. So it is split, counted,
stored and evaluated as any other row. A message keeps all its fields but metadata, such as a time:
the chat template of the base decides which of them are read (`chat_template`).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import InvalidRowError
from .workbooks import NumberText, number_value

CHAT_MARK = "\x02"
Message = dict[str, str]  # keys role and content, as in TRL and OpenAI's API
Fields = dict[str, Any]
FullMessage = Fields  # role and content, and maybe reasoning_content, tool_calls, weight, ...
Clean = Callable[[str], str]
_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "chatbot", "ai", "model"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "function_response", "tool_result"),
}
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")  # an assistant whose text is a call, as JSON
_ROLE_NAMES = {spelling: role for role, spellings in _ROLES.items() for spelling in spellings}
REASONING_FIELDS = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # one thing under the names of several templates
_SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
_TOOL_COLUMNS = ("tools", "functions")  # the latter as OpenAI had them before tools
# Columns that belong to the conversation beside them.
PARTS = (*_SYSTEM_COLUMNS, *_TOOL_COLUMNS, *REASONING_FIELDS)
_CONTENTS = ("content", "value", "text")  # fields of a message that may hold its text
_TEXT_PARTS = ("text", "input_text", "output_text")  # types of parts of a content
_OTHER_PARTS = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file")
_CLEANED = ("content", "prompt", "completion", "chosen", "rejected", "system", "reasoning_content")
# Fields of a prompt with its answers, be they those of `preferences`.
_DECISIVE = ("prompt", "completion", "chosen", "rejected", "label")
# 0 or false: an answer that is not learned.
_LEARN = ("weight", "train", "training", "trainable", "loss")
_MESSAGE = (*_CONTENTS, "tool_calls", "function_call")
_PARTIAL = ("train_detail", "training_detail")  # Axolotl: which characters of an answer are learned
# A field is no part of the conversation if one of these words is in its name.
_METADATA = re.compile(
    "at|country|created|date|datetime|hash|hashed|header|id|identifier|ids|index|ip|lang|language|meta|metadata|model|rating|score|source|state|status|time|timestamp|tokens|toxic|turn|updated|usage|uuid"
)


def is_chat(text: str) -> bool:
    return text.startswith(CHAT_MARK)


def encode_messages(value: object, clean: Clean, parts: Mapping[str, object] | None = None) -> str:
    """Return a list of messages as a row; "" if it is empty.

    Args:
        parts: What else belongs to the conversation: `system`, a text, and `tools`, a list.

    Raises:
        InvalidRowError: The value is not a valid list of messages, or has no answer to learn.
    """
    if value is None or value == []:
        return ""
    messages = read_messages(value, clean)
    if not any(map(is_learned, messages)):
        raise InvalidRowError("no answer")
    beside = read_parts_beside(messages, parts, clean)
    return to_row({"messages": messages, **beside} if beside else messages)


def read_messages(value: object, clean: Clean) -> list[FullMessage]:
    """Return a list of messages with the usual names of roles and fields. Raises InvalidRowError."""
    if not isinstance(value, list):
        raise InvalidRowError("messages that are no list")
    return [_read_message(f"message {number}", message, clean) for number, message in enumerate(value, 1)]


def read_parts_beside(messages: list[FullMessage], parts: Mapping[str, object] | None, clean: Clean) -> Fields:
    """Read what belongs to a conversation beside its messages. Raises InvalidRowError."""
    read = read_parts(parts, clean)
    if "reasoning_content" in read:
        raise InvalidRowError("reasoning beside a list of messages")
    first = messages[0]
    if first["role"] == "system" and read.pop("system", first["content"]) != first["content"]:
        raise InvalidRowError("a system text beside another system message")
    return read


def encode_pair(
    prompt: object,
    completion: object,
    clean: Clean,
    parts: Mapping[str, object] | None = None,
    names: tuple[str, str] = ("prompt", "completion"),
) -> str:
    """Return a prompt and its completion as a row; "" if both are empty.

    Each is a string, or each is a list of messages.

    Args:
        parts: As for `encode_messages`; with two strings also the reasoning before the completion.
        names: Names of the two in an error.

    Raises:
        InvalidRowError: The two are of other types, or one is empty.
    """
    if isinstance(prompt, list) and isinstance(completion, list):
        return encode_messages([*prompt, *completion], clean, parts)
    prompt, completion = "" if prompt is None else prompt, "" if completion is None else completion
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise InvalidRowError(f"{' and '.join(names)} that are neither two texts nor two lists of messages")
    pair = {"prompt": clean(prompt), "completion": clean(completion)}
    if not any(pair.values()):
        return ""
    for name, text in zip(names, pair.values(), strict=True):
        if not text:
            raise InvalidRowError(f"no {name}")
    return to_row(pair | read_parts(parts, clean))


def are_messages(values: list[object]) -> bool:
    """Return whether values have the fields of messages. Their types may be others."""
    return bool(values) and all(
        isinstance(value, dict)
        and ("role" in value or "from" in value)
        and any(name in value for name in _MESSAGE)
        for value in values
    )


def encode_answer(text: str, span: tuple[int, int], *, keep: bool = False) -> str:
    """Return a plain text as a row of which only the characters of a span are learned, and the end.

    Args:
        keep: The end is never cut off: of a long text the middle is left out, as where it has a label.
    """
    return to_row({"text": text, "answer": span} | ({"keep": True} if keep else {}))


def keeps_answer(row: str) -> bool:
    """Return whether the middle of a row is left out, not its end, if it is too long."""
    return read_answer(row) is not None and bool(decode_row(row).get("keep"))


def read_answer(row: str) -> tuple[str, tuple[int, int]] | None:
    """Return text and span of a row of `encode_answer`; None for another one."""
    if not row.startswith(f'{CHAT_MARK}{{"text":'):
        return None
    value = decode_row(row)
    start, end = value["answer"]
    return value["text"], (start, end)


def plain_text(row: str) -> str:
    """Return a row without the span of its answer, as the text that it is."""
    answer = read_answer(row)
    return row if answer is None else answer[0]


def strip_texts(row: str) -> str:
    """Return a row without the outer white space of its texts: with it, it is the same row."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: field.strip() if name in _CLEANED and isinstance(field, str) else strip(field)
                for name, field in value.items()
            }
        return [strip(item) for item in value] if isinstance(value, list) else value

    return to_row(strip(json.loads(row.removeprefix(CHAT_MARK))))


def decisive_text(row: str) -> str:
    """Return the text of a row that decides its side of the split: roles and contents."""
    value = decode_row(row)
    if "messages" not in value:
        return to_row({name: value[name] for name in value if name in _DECISIVE})
    messages = value["messages"]
    return to_row([{"role": message["role"], "content": message["content"]} for message in messages])


def decode_row(row: str) -> Fields:
    """Return the fields of a row: `messages`, or `prompt` and `completion`, and what belongs to them."""
    value = json.loads(row.removeprefix(CHAT_MARK))
    return {"messages": value} if isinstance(value, list) else value


def to_row(value: object) -> str:
    """Return the row of the fields that `decode_row` returns, or of a list of messages."""
    return CHAT_MARK + json.dumps(value, ensure_ascii=False)


def is_learned(message: FullMessage) -> bool:
    has_text = message["content"] or message.get("tool_calls")
    return message["role"] == "assistant" and bool(has_text) and message.get("weight", 1) != 0


def read_parts(parts: Mapping[str, object] | None, clean: Clean) -> Fields:
    """Read what belongs to a prompt and its answer, without what is empty. Raises InvalidRowError."""
    read = {name: value for name, value in json_value(dict(parts or {})).items() if value}
    reasoning = _read_reasoning("the row", read, clean)
    tools = _read_tools([read.pop(name) for name in _TOOL_COLUMNS if name in read])
    systems = [read.pop(name) for name in _SYSTEM_COLUMNS if name in read]
    if not all(isinstance(system, str) for system in systems) or read:
        raise InvalidRowError("system that is no text")
    texts = {clean(system) for system in systems} - {""}
    if len(texts) > 1:
        raise InvalidRowError("two system texts beside the conversation")
    read |= {"tools": tools} if tools else {}
    read |= {"reasoning_content": reasoning} if reasoning else {}
    return read | ({"system": texts.pop()} if texts else {})


def _read_tools(values: list[Any]) -> list[Any]:
    """Return the definitions of tools, also from JSON in strings."""
    if len(values) > 1:
        raise InvalidRowError("tools beside functions")
    tools = _decode("tools", values[0]) if values else []
    if not isinstance(tools, list):
        raise InvalidRowError("tools that are no list")
    tools = [_decode("tools", tool) for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise InvalidRowError("tools that are no objects")
    return tools


def _decode(name: str, value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise InvalidRowError(f"{name} that are no JSON") from error


def _read_message(place: str, value: object, clean: Clean) -> FullMessage:
    if not isinstance(value, dict):
        raise InvalidRowError("a message that is no object", place)
    fields: Fields = json_value(value)
    spelling = str(fields.pop("role", None) or fields.pop("from", None))
    is_call = spelling.strip().lower() in _CALL_ROLES
    role = "assistant" if is_call else _ROLE_NAMES.get(spelling.strip().lower())
    if role is None:
        raise InvalidRowError("an unknown role", f"{place} has {spelling[:40]!r}")
    name = next((name for name in _CONTENTS if value.get(name) is not None), "content")
    fields.pop(name, None)
    content = _read_content(place, value.get(name))  # as it is written, if it is a number
    if is_call:  # thinking may precede the call
        thinking, tag, call = (content or "").rpartition("</think>")
        content, fields["function_call"] = thinking + tag, call
    _read_calls(place, fields)
    if content is None and not fields.get("tool_calls"):
        raise InvalidRowError("null content", place)
    message: FullMessage = {"role": role, "content": clean(content or "")}
    reasoning = _read_reasoning(place, fields, clean)
    if reasoning:
        message["reasoning_content"] = reasoning
    for name in _LEARN:
        weight = fields.pop(name, 1)
        if weight not in (0, 1):
            raise InvalidRowError(f"{name} other than 0 and 1", place)
        if not weight and role == "assistant":
            message["weight"] = 0
    for name, field in fields.items():
        if name in _PARTIAL and field:
            raise InvalidRowError(f"{name}: an answer is learned as a whole, or by its weight not at all", place)
        has_text = any(text.strip() for text in iter_texts(field))
        if has_text and (name == "tool_call_id" or not is_metadata(name)):
            message[name] = field
    return message


def _read_calls(place: str, fields: Fields) -> None:
    """Set `tool_calls` in the fields of a message to the list of its calls of tools, also from JSON
    in a string, and from `function_call`, OpenAI's older name of one."""
    calls = _decode("tool_calls", fields.get("tool_calls") or [])
    calls = calls if isinstance(calls, list) else [calls]
    old = _decode("tool_calls", fields.pop("function_call", None) or [])
    for function in old if isinstance(old, list) else [old]:
        calls = [*calls, {"type": "function", "function": function}]
    functions = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise InvalidRowError("tool_calls that are no functions with a name", place)
    fields["tool_calls"] = calls


def is_metadata(name: str) -> bool:
    """Return whether a field is no part of the conversation: messageId, created_at, model."""
    words = re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", name)
    return any(_METADATA.fullmatch(word.lower()) for word in words)


def _read_content(place: str, content: object) -> str | None:
    """Return a text, or the texts of a list of parts, which a table may hold as JSON."""
    if isinstance(content, str):
        content = _decode_parts(content)
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRowError("content that is no text", place)
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise InvalidRowError(f"content of type {str(kind)[:40]!r}", place)
        texts.append(text)
    return "".join(texts)


def _decode_parts(content: str) -> object:
    """Return the parts of a content that a string holds as JSON, else the string."""
    if not content.lstrip().startswith("[") or '"type"' not in content:
        return content
    try:
        parts = json.loads(content)
    except (ValueError, RecursionError):
        return content
    are_parts = isinstance(parts, list) and all(
        isinstance(part, dict)
        and (
            (part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str))
            or (part.get("type") in _OTHER_PARTS and part["type"] in part)
        )
        for part in parts
    )
    return parts if are_parts else content


def _read_reasoning(place: str, fields: Fields, clean: Clean) -> str:
    """Take the reasoning out of the fields of a message, whatever its name."""
    texts = [fields.pop(name) for name in REASONING_FIELDS if name in fields]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRowError("reasoning that is no text", place)
    reasonings = {clean(text) for text in texts} - {""}
    if len(reasonings) > 1:
        raise InvalidRowError("two texts of reasoning", place)
    return reasonings.pop() if reasonings else ""


def json_value(value: Any) -> Any:
    """Return a value of a row as JSON has it: numbers as numbers, without nulls, which tables of
    structs are full of."""
    if isinstance(value, dict):
        return {str(name): json_value(field) for name, field in value.items() if field is not None}
    if isinstance(value, list):
        return [json_value(item) for item in value]
    if isinstance(value, NumberText):
        return number_value(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def iter_texts(value: object) -> Iterator[str]:
    """Yield all texts in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from iter_texts(item)


def spoken_text(row: str) -> str:
    """Return the texts of user and assistant in a row, without system, tools and what they return."""
    if (answer := read_answer(row)) is not None:
        return answer[0]
    value = decode_row(row)
    if "messages" not in value:
        return f"{value['prompt']}\n{value['completion']}"
    spoken = [message for message in value["messages"] if message["role"] in ("user", "assistant")]
    return "\n".join(message["content"] for message in spoken)
