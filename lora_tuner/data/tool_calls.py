"""Give tools, and calls of them, the form that a chat template reads."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import InvalidRowError
from .chat import FullMessage

Tools = list[Any] | None


def choose_functions(
    try_template: Callable[[list[FullMessage], Tools], None], messages: list[FullMessage], tools: Tools
) -> tuple[list[FullMessage], Tools]:
    """Return messages and tools with bare functions as objects of type function, if the template
    does not write them as they are.

    Args:
        try_template: Raises InvalidRowError if the template does not write a conversation.
    """

    def wrap(items: list[Any]) -> list[Any]:
        return [{"type": "function", "function": item} if "name" in item else item for item in items]

    wrapped = [
        message | {"tool_calls": wrap(message["tool_calls"])} if "tool_calls" in message else message
        for message in messages
    ]
    wrapped_tools = wrap(tools) if tools else tools
    if (wrapped, wrapped_tools) == (messages, tools):
        return messages, tools
    try:
        try_template(messages, tools)
    except InvalidRowError:
        return wrapped, wrapped_tools
    return messages, tools


def choose_arguments(render: Callable[..., str], messages: list[FullMessage]) -> list[FullMessage]:
    """Return messages with the arguments of tool calls as objects, or as JSON text if the template
    needs that."""
    if not any("tool_calls" in message for message in messages):
        return messages
    as_objects = _convert_arguments(
        messages, lambda value: _parse_object(value) if isinstance(value, str) else value
    )
    as_text = _convert_arguments(
        messages, lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )
    try:
        rendered = render(as_objects)
    except InvalidRowError:
        return as_text
    reprs: list[str] = []
    _convert_arguments(as_objects, lambda value: reprs.append(str(value)) if value else None)
    return as_text if any(text in rendered for text in reprs if "'" in text) else as_objects


def _convert_arguments(messages: list[FullMessage], convert: Callable[[Any], Any]) -> list[FullMessage]:
    converted = json.loads(json.dumps(messages))
    for message in converted:
        for function in functions(message.get("tool_calls")):
            if "arguments" in function:
                function["arguments"] = convert(function["arguments"])
    return list(converted)


def _parse_object(text: str) -> object:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def functions(items: object) -> Iterator[dict[str, Any]]:
    """Yield the functions of a list of tools or tool calls."""
    for item in items if isinstance(items, list) else []:
        function = item.get("function", item) if isinstance(item, dict) else None
        if isinstance(function, dict):
            yield function
