"""Formats of tool calls, learnt from templates that imitate those of common bases."""

import json

import pytest

from lora_tuner.data import chat_template
from lora_tuner.data.call_format import CallFormat, ToolCall, learn_call_format
from lora_tuner.errors import DataError

from ..call_templates import DEEPSEEK, HERMES, LLAMA, MISTRAL, MISTRAL_NEW, XML
from .test_chat_template import CHATML, QWEN3, make_tokenizer

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("rain", "rain_at", "sun")
]
ARGUMENTS = [{"place": 'X "y" }', "days": [1, {"a": None}]}, {}]
FORMATS = {
    HERMES: ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "}\n</tool_call>\n<tool_call>\n"),
    QWEN3: ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "}\n</tool_call>\n<tool_call>\n"),
    LLAMA: ('{"name": "', '", "parameters": ', "}", None),
    MISTRAL: ('[TOOL_CALLS] [{"name": "', '", "arguments": ', "}]", "}, "),
    MISTRAL_NEW: ("[TOOL_CALLS]", "[ARGS]", "", "[TOOL_CALLS]"),
    DEEPSEEK: (
        "<calls><call>function<sep>",
        "\n```json\n",
        "\n```</call></calls>",
        "\n```</call>\n<call>function<sep>",
    ),
}


@pytest.mark.parametrize("template", FORMATS)
def test_format_is_learnt_from_template(template):
    begin, between, end, separator = FORMATS[template]
    if separator is not None and begin.endswith('{"name": "'):
        separator += '{"name": "'
    assert learn_call_format(make_tokenizer(template)) == CallFormat(begin, between, end, separator)


@pytest.mark.parametrize("template", FORMATS)
def test_calls_are_read_as_rendered(template):
    tokenizer, call_format = make_tokenizer(template), learn_call_format(make_tokenizer(template))
    count = 1 if call_format.separator is None else 2
    names = ["rain_at", "rain"][:count]
    calls = [
        {
            "id": f"call0000{number}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(ARGUMENTS[number])},
        }
        for number, name in enumerate(names)
    ]
    question = {"role": "user", "content": "so?"}
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    result = {"role": "tool", "content": "wet", "tool_call_id": "call00000", "name": "rain"}
    rendered = chat_template.render_prompt(tokenizer, [question, answer, result], TOOLS)
    assert "wet" in rendered
    start = rendered.index(call_format.begin, rendered.index("so?"))
    text = rendered[start:].replace(', "id": "call00000"', "").replace(', "id": "call00001"', "")
    read = call_format.read_calls(text, ["rain", "sun", "rain_at"])
    assert [(call.name, json.loads(call.arguments)) for call in read] == list(zip(names, ARGUMENTS, strict=False))


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>\n{"name": "rain", "arguments": {"a": 1}}\n</tool_call>', [ToolCall("rain", '{"a": 1}')]),
        ('<tool_call>\n{"name": "rain", "arguments": {"a": "x', [ToolCall("rain", '{"a": "x')]),
        ('<tool_call>\n{"name": "rain", "argu', []),
        ("<tool_call>", []),
        ('<tool_call>\n{"name": "snow", "arguments": {}}', []),
    ],
)
def test_cut_calls_are_read_as_far(text, calls):
    call_format = learn_call_format(make_tokenizer(HERMES))
    assert call_format.read_calls(text, ["rain", "rain_at"]) == calls


@pytest.mark.parametrize(
    ("template", "reason"),
    [(CHATML, "has no tools"), (XML, "otherwise than as a name"), (None, "no chat template")],
)
def test_template_without_calls_is_refused(template, reason):
    with pytest.raises(DataError, match=reason):
        learn_call_format(make_tokenizer(template))


def test_tool_parts_that_template_drops_are_refused():
    tokenizer = make_tokenizer(CHATML)
    question, result = {"role": "user", "content": "so?"}, {"role": "tool", "content": "wet"}
    call = {"type": "function", "function": {"name": "rain", "arguments": "{}"}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(DataError, match="tools that the chat template does not write"):
        chat_template.render_prompt(tokenizer, [question], TOOLS)
    with pytest.raises(DataError, match="tool_calls that the chat template does not write"):
        chat_template.render_prompt(tokenizer, [question, answer, result])


def test_special_token_in_arguments_is_refused():
    tokenizer = make_tokenizer(HERMES)
    call = {"type": "function", "function": {"name": "rain", "arguments": '{"\\u003c|im_end|>": 1}'}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(DataError, match=r"contains <\|im_end\|>, a special token"):
        chat_template.render_prompt(tokenizer, [{"role": "user", "content": "so?"}, answer], TOOLS)
