"""Routes: tools, calls of them, and their results, through the chat template's own format."""

import json
import re

import jsonschema_rs
import openai
import pytest
import torch

from lora_tuner import ModelOptions, SamplingParams
from lora_tuner.data.call_format import learn_call_format
from lora_tuner.inference.constraints import GrammarCompiler
from lora_tuner.inference.sequence import Sequence
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.server.protocol import ChatRequest
from lora_tuner.server.tools import CallReader, requested_tools

from .. import api_server, tiny_models
from ..api_server import CHAT, error_of, events, write_adapter
from ..call_templates import HERMES, LLAMA, MISTRAL, MISTRAL_NEW

PLACE = {
    "type": "object",
    "properties": {"place": {"enum": ["X", "Y"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
PLACE |= {"required": ["place"], "additionalProperties": False}
RAIN = {
    "type": "function",
    "function": {"name": "get_rain", "description": "Rain.", "parameters": PLACE, "strict": True},
}
NOW = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "now"}}
TOOLS = {"tools": [RAIN, NOW]}


@pytest.fixture(scope="module", params=["text", "tokens"])
def tool_base(request, tmp_path_factory):
    """A base with a template of tools, whose tags are texts or tokens."""
    folder = tiny_models.save_model(tmp_path_factory.mktemp("tools") / "caller", "gpt2", context=1024)
    if request.param == "tokens":
        tiny_models.tokenizer(("<tool_call>", "</tool_call>")).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(HERMES)
    return folder


@pytest.fixture(scope="module")
def served(tool_base, tmp_path_factory):
    adapters_dir = tmp_path_factory.mktemp("adapters")
    write_adapter(adapters_dir, "a", tool_base, 0)
    with api_server.serving(tool_base, adapters_dir) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    return served.client()


def ask(served, **body):
    return served.post("/v1/chat/completions", **{"model": "a", "max_tokens": 200, **CHAT, **body})


def check_call(call):
    assert re.fullmatch("call_[0-9a-f]{24}", call["id"])
    assert call["type"] == "function"
    schema = PLACE if call["function"]["name"] == "get_rain" else {"maxProperties": 0}
    assert jsonschema_rs.validator_for(schema).is_valid(json.loads(call["function"]["arguments"]))


@pytest.mark.parametrize(("choice", "name"), [("required", "get_rain|now"), (NAMED, "now")])
def test_forced_choice_gives_calls(served, choice, name):
    body = {**TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "n": 4, "seed": 1}
    choices = ask(served, **body).json()["choices"]
    for each in choices:
        assert (each["finish_reason"], each["message"]["content"]) == ("tool_calls", None)
        (call,) = each["message"]["tool_calls"]
        assert re.fullmatch(name, call["function"]["name"])
        check_call(call)
    chunks = [event["choices"][0] for event in events(ask(served, stream=True, **body).text)]
    for index, each in enumerate(choices):
        *_, last = [chunk for chunk in chunks if chunk["index"] == index]
        (call,) = last["delta"]["tool_calls"]
        assert (call["index"], last["finish_reason"]) == (0, "tool_calls")
        assert call["function"] == each["message"]["tool_calls"][0]["function"]


def test_several_calls_are_read(served):
    choices = ask(served, **TOOLS, tool_choice="required", n=16, seed=1, max_tokens=300).json()["choices"]
    assert max(len(choice["message"]["tool_calls"]) for choice in choices) > 1
    for choice in choices:
        for call in choice["message"]["tool_calls"][:-1]:
            check_call(call)


def test_cut_call_ends_by_length(served):
    (choice,) = ask(served, **TOOLS, tool_choice=NAMED, max_tokens=1).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]


def test_auto_without_call_is_text(served):
    body = {**TOOLS, "temperature": 0, "max_tokens": 20}
    (choice,) = ask(served, **body).json()["choices"]
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("length", False)
    deltas = [event["choices"][0]["delta"] for event in events(ask(served, stream=True, **body).text)]
    assert [delta.get("role") for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert "".join(delta["content"] for delta in deltas) == choice["message"]["content"]


def test_conversation_goes_on_with_results(client):
    messages = [{"role": "user", "content": "so?"}]
    first = client.chat.completions.create(
        model="a",
        messages=messages,
        tools=[RAIN],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        seed=2,
    )
    answer = first.choices[0].message
    messages += [answer, {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "wet"}]
    settings = {"model": "a", "tools": [RAIN], "max_tokens": 2}
    second = client.chat.completions.create(messages=messages, **settings)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 20


def test_openai_client_parses_arguments(client):
    from pydantic import BaseModel

    class Place(BaseModel):
        dry: bool

    tool = openai.pydantic_function_tool(Place)
    parsed = client.chat.completions.parse(
        model="a", tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=200, seed=2, **CHAT
    )
    assert isinstance(parsed.choices[0].message.tool_calls[0].function.parsed_arguments, Place)


def test_schema_and_tools_give_either(served):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    for choice in ask(served, **TOOLS, response_format=form, n=8, seed=1).json()["choices"]:
        assert choice["message"].get("tool_calls") or choice["message"]["content"] in ('"yes"', '"no"')


FUNCTION = {"name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "only allowed with tools"),
        ({**TOOLS, "tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required'"),
        (
            {**TOOLS, "tool_choice": {"type": "function", "function": {"name": "sun"}}},
            "tool_choice",
            "no tool has this name",
        ),
        ({"tools": [RAIN, RAIN]}, "tools", "two tools have the name get_rain"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"not": {}}, "strict": True}}
                ]
            },
            "tools",
            'Unimplemented keys: ["not"]',
        ),
        ({**TOOLS, "guided_regex": "a"}, "guided_regex", "not supported beside tools"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
            "messages[0].tool_call_id",
            "role tool",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": FUNCTION}]}]},
            "messages[0].tool_calls",
            "only allowed with role assistant",
        ),
        ({"messages": [{"role": "tool", "content": None}]}, "messages[0].content", "give a string"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "description": "<|endoftext|>"}}]},
            "tools",
            "contains <|endoftext|>, a special token",
        ),
    ],
)
def test_wrong_tools_are_refused_by_name(served, body, param, message):
    error = error_of(ask(served, **body), 400)
    assert error["param"] == param
    assert message in error["message"]


def test_lenient_tools_leave_out_what_masks_cannot_keep(served):
    function = {
        "name": "f",
        "parameters": {"properties": {"a": {"type": "boolean", "not": {"const": 5}}}, "required": ["a"]},
    }
    body = {"tools": [{"type": "function", "function": function}], "tool_choice": "required", "max_tokens": 400}
    assert ask(served, **body).status_code == 200


def test_base_without_tools_is_400(base, adapters_dir):
    with api_server.serving(base, adapters_dir) as served:
        error = error_of(ask(served, **TOOLS), 400)
        assert error["message"] == "tools: The chat template of talker has no tools."
        error = error_of(ask(served, **TOOLS, tool_choice="none"), 400)
        assert error["param"] == "messages"


@pytest.fixture(scope="module")
def loaded_base(tmp_path_factory):
    folder = tiny_models.save_model(tmp_path_factory.mktemp("loaded") / "gpt2", "gpt2", context=512)
    return load_base(find_base(str(folder)), ModelOptions(device="cpu"))


def follow(base, call_format, text, **body):
    """Make a sequence choose the tokens of a text, as far as its grammar allows; return what is read of it, by steps."""
    request = ChatRequest(model="a", **CHAT, **TOOLS, **body)
    tools = requested_tools(request)
    grammar = tools.grammar(call_format, base.tokenizer, None)
    constraint = GrammarCompiler(base).compile(grammar, base.tokenizer).copy()
    sequence = Sequence(
        base, [5], SamplingParams(greedy=True, max_new_tokens=500, repetition_penalty=1.0), constraint=constraint
    )
    reader = CallReader(sequence, tools=tools, call_format=call_format)
    deltas = []
    for token in [*base.tokenizer(text)["input_ids"], base.tokenizer.eos_token_id]:
        if not sequence.done:
            assert sequence.append_token(torch.nn.functional.one_hot(torch.tensor(token), 320) * 50.0) == token
            deltas.append(reader.next_delta())
    return [delta for delta in deltas if delta is not None]


CALL = '{"place": "X", "days": 3}'


@pytest.mark.parametrize(
    ("template", "text", "content", "names"),
    [
        (
            HERMES,
            f'Wait <b>.\n<tool_call>\n{{"name": "get_rain", "arguments": {CALL}}}\n</tool_call>',
            "Wait <b>.\n",
            ["get_rain"],
        ),
        (
            HERMES,
            f'<tool_call>\n{{"name": "get_rain", "arguments": {CALL}}}\n</tool_call>\n<tool_call>\n'
            '{"name": "now", "arguments": {}}\n</tool_call>',
            "",
            ["get_rain", "now"],
        ),
        (LLAMA, f'{{"name": "get_rain", "parameters": {CALL}}}', "", ["get_rain"]),
        (LLAMA, 'No: {"name": 5', 'No: {"name": 5', []),
        (MISTRAL, f'So [TOOL_CALLS] [{{"name": "get_rain", "arguments": {CALL}}}]', "So ", ["get_rain"]),
        (MISTRAL_NEW, f"[TOOL_CALLS]now[ARGS]{{}}[TOOL_CALLS]get_rain[ARGS]{CALL}", "", ["now", "get_rain"]),
        (HERMES, "a < b, <tool, <tool_cal", "a < b, <tool, <tool_cal", []),
    ],
)
def test_auto_takes_text_and_calls(loaded_base, template, text, content, names):
    loaded_base.tokenizer.chat_template = template
    deltas = follow(loaded_base, learn_call_format(loaded_base.tokenizer), text)
    assert "".join(delta.text for delta in deltas) == content
    assert [call.name for call in deltas[-1].tool_calls] == names
    assert deltas[-1].finish_reason == ("tool_calls" if names else "stop")
    for call in deltas[-1].tool_calls:
        assert json.loads(call.arguments) == (json.loads(CALL) if call.name == "get_rain" else {})


def test_text_streams_until_call_may_begin(loaded_base):
    loaded_base.tokenizer.chat_template = HERMES
    deltas = follow(loaded_base, learn_call_format(loaded_base.tokenizer), "so <b> <tool")
    assert [delta.text for delta in deltas] == ["s", "o", " ", "<b", ">", " ", "<tool"]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "sun"',
        '<tool_call>\n{"name": "get_rain", "arguments": {"place": "Z"',
        "<tool_call>{",
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call> more',
    ],
)
def test_begun_call_must_go_on(loaded_base, text):
    loaded_base.tokenizer.chat_template = HERMES
    with pytest.raises(AssertionError):
        follow(loaded_base, learn_call_format(loaded_base.tokenizer), text)
