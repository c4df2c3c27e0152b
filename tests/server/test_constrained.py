"""Routes: outputs in the form that a request asks for."""

import concurrent.futures
import json
import re
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from ..api_server import CHAT, GREEDY, PROMPT, error_of, events

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
OBJECT = r'\{"ok": ?(true|false), ?"kind": ?"[ab]"\}'
FORMS = [
    ({"response_format": FORMAT}, OBJECT),
    ({"guided_json": SCHEMA}, OBJECT),
    ({"guided_json": json.dumps(SCHEMA)}, OBJECT),
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": False}}, OBJECT),
    ({"guided_regex": "x[0-9]{2}"}, "x[0-9]{2}"),
    ({"structured_outputs": {"regex": "x[0-9]{2}"}, "response_format": {"type": "text"}}, "x[0-9]{2}"),
    ({"guided_choice": ["yes", "no"]}, "yes|no"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    ({"guided_grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
    ({"structured_outputs": {"grammar": 'start: "x" /[0-9]/'}}, "x[0-9]"),
]


def ask(served, form, chat, **body):
    path, prompt = ("/v1/chat/completions", CHAT) if chat else ("/v1/completions", {"prompt": PROMPT})
    return served.post(path, **{"model": "a", "max_tokens": 60} | prompt | form | body)


def text_of(choice):
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("form", "pattern"), FORMS)
def test_output_has_requested_form(served, form, pattern, chat):
    response = ask(served, form, chat, n=2, seed=1)
    assert response.status_code == 200, response.text
    for choice in response.json()["choices"]:
        assert re.fullmatch(pattern, text_of(choice))
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("form", [{"type": "json_object"}, None])
def test_json_object_is_object_or_cut(served, form):
    form = {"response_format": form} if form else {"structured_outputs": {"json_object": True}}
    choices = ask(served, form, True, n=8, seed=1).json()["choices"]
    assert all(text_of(choice).startswith("{") for choice in choices)
    for choice in choices:
        assert choice["finish_reason"] == "length" or isinstance(json.loads(text_of(choice)), dict)


def test_cut_output_ends_by_length(served):
    choice = ask(served, {"response_format": FORMAT}, True, max_tokens=3).json()["choices"][0]
    assert (choice["finish_reason"], text_of(choice)[:1]) == ("length", "{")


@pytest.mark.parametrize("chat", [False, True])
def test_stream_has_same_text(served, chat):
    form = {"response_format": FORMAT, "seed": 7}
    (choice,) = ask(served, form, chat).json()["choices"]
    chunks = [event["choices"][0] for event in events(ask(served, form, chat, stream=True).text)]
    assert "".join(
        chunk["text"] if "text" in chunk else chunk["delta"]["content"] for chunk in chunks
    ) == text_of(choice)
    assert chunks[-1]["finish_reason"] == "stop"


def test_requests_beside_forms_are_unchanged(served, expected_texts):
    with concurrent.futures.ThreadPoolExecutor(12) as pool, served.held_steps() as release:
        formed = [pool.submit(ask, served, form, False, n=2) for form, _ in FORMS[:5]]
        plain = {
            name: pool.submit(served.post, "/v1/completions", model=name, **GREEDY) for name in expected_texts
        }
        served.wait(lambda: served.scheduler.waiting + served.scheduler.running == 13)
        release(1000)
        assert {
            name: text_of(future.result().json()["choices"][0]) for name, future in plain.items()
        } == expected_texts
        assert all(future.result().status_code == 200 for future in formed)


def test_openai_client_parses_models(client):
    class Answer(BaseModel):
        ok: bool
        kind: Literal["a", "b"]
        size: int | None

    parsed = client.chat.completions.parse(model="a", response_format=Answer, max_tokens=80, seed=3, **CHAT)
    assert parsed.choices[0].finish_reason == "stop"
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="a", response_format=Answer, max_tokens=2, **CHAT)


@pytest.mark.parametrize(
    ("form", "param", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", 'with type "json_schema"'),
        ({"response_format": FORMAT | {"type": "text"}}, "response_format.json_schema", "with that alone"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "Field required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format.json_schema.schema",
            'Unimplemented keys: ["not"]',
        ),
        ({"guided_json": "{"}, "guided_json", "guided_json: "),
        ({"guided_json": 5}, "guided_json", "valid string"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_choice": ["a", 1]}, "guided_choice[1]", "valid string"),
        ({"structured_outputs": {}}, "structured_outputs", "give one of json, regex"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs",
            "give one of json, regex",
        ),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed group"),
        ({"response_format": FORMAT, "guided_regex": "a"}, "guided_regex", "response_format is given too"),
        ({"guided_json": SCHEMA, "guided_choice": ["a"]}, "guided_choice", "guided_json is given too"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_wrong_form_is_refused_by_name(served, chat, form, param, message):
    error = error_of(ask(served, form, chat), 400)
    assert error["param"] == param
    assert message in error["message"]


def test_deep_schema_is_refused(served):
    schema = {}
    for _ in range(400):
        schema = {"items": schema}
    error_of(ask(served, {"guided_json": schema}, True), 400)


def test_failing_grammar_is_400(served, monkeypatch):
    """The work for one token has a bound; beyond it the request fails alone."""
    from lora_tuner.inference import constraints

    monkeypatch.setattr(constraints, "MAX_STEP_ITEMS", 1)
    form = {
        "guided_json": {
            "type": "object",
            "properties": {"only here": {"type": "array"}},
            "required": ["only here"],
        }
    }
    assert "cannot be followed any further" in error_of(ask(served, form, True), 400)["message"]
