"""Routes: /v1/responses in its plain text form."""

import json

import openai
import pytest

from lora_tuner.inference.sequence import Sequence

from ..api_server import error_of

SETTINGS = {"model": "a", "temperature": 0, "max_output_tokens": 12}
OPENING = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "so?"}]}


def chat(client, *messages, **settings):
    """Return the answer of the other endpoint."""
    response = client.chat.completions.create(
        model="a", temperature=0, max_tokens=12, messages=[*messages], **settings
    )
    return response.choices[0].message.content


@pytest.mark.parametrize(
    ("request_fields", "messages"),
    [
        ({"input": "so?"}, [{"role": "user", "content": "so?"}]),
        (
            {"input": "so?", "instructions": "be brief"},
            [{"role": "system", "content": "be brief"}, {"role": "user", "content": "so?"}],
        ),
        (
            {"input": [{"role": "developer", "content": "be brief"}, OPENING]},
            [{"role": "system", "content": "be brief"}, {"role": "user", "content": "so?"}],
        ),
    ],
)
def test_response_equals_chat(client, request_fields, messages):
    expected = chat(client, *messages)
    response = client.responses.create(**SETTINGS, **request_fields, metadata={"run": "1"}, store=True)
    assert response.output_text == expected
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.object, response.model, response.metadata) == ("response", "a", {"run": "1"})
    assert (response.usage.output_tokens, response.usage.total_tokens) == (12, response.usage.input_tokens + 12)
    assert response.id.startswith("resp_")
    stream = list(client.responses.create(**SETTINGS, **request_fields, stream=True))
    kinds = [event.type.removeprefix("response.") for event in stream]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert [event.sequence_number for event in stream] == [*range(len(stream))]
    assert "".join(event.delta for event in stream[4:-4]) == stream[-4].text == expected
    assert stream[-1].response.output_text == expected
    assert stream[-1].response.usage == response.usage
    with client.responses.stream(**SETTINGS, **request_fields) as helper:
        assert "".join(event.delta for event in helper if event.type == "response.output_text.delta") == expected


def test_output_goes_back_as_input(client):
    first = client.responses.create(**SETTINGS, input=[OPENING])
    question = {"role": "user", "content": "and?"}
    second = client.responses.create(**SETTINGS, input=[OPENING, *first.output, question])
    answer = {"role": "assistant", "content": first.output_text}
    assert second.output_text == chat(client, {"role": "user", "content": "so?"}, answer, question)
    assert second.status == "incomplete"


def test_ended_response_is_completed(served, client, monkeypatch):
    monkeypatch.setattr(Sequence, "finish_reason", "stop")
    response = client.responses.create(**SETTINGS, input="so?")
    assert (response.status, response.incomplete_details, response.output[0].status) == (
        "completed",
        None,
        "completed",
    )
    *_, last = client.responses.create(**SETTINGS, input="so?", stream=True)
    assert (last.type, last.response.status) == ("response.completed", "completed")
    with client.responses.stream(**SETTINGS, input="so?") as helper:
        assert helper.get_final_response().output_text == response.output_text


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not supported: leave it out"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"background": True}, "background", "or send false"),
        ({"tools": [{"type": "web_search"}]}, "tools", "or send []"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format.type", "'text'"),
        ({"truncation": "auto"}, "truncation", 'or send "disabled"'),
        ({"input": None}, "input", "Field required"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "'message'"),
        ({"input": [OPENING, {"role": "user", "content": []}]}, "input[1].content", "parts of type input_text"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "'input_text'",
        ),
        ({"max_tokens": 5}, "max_tokens", "unknown field"),
        ({"max_output_tokens": 3000}, "max_output_tokens", "max_output_tokens is 3,000: the limit"),
        ({"max_output_tokens": 127}, None, "tokens and max_output_tokens is 127, but the context length"),
        ({"input": "<|endoftext|>"}, "input", "input contains <|endoftext|>, a special token of talker"),
        ({"instructions": "<|endoftext|>"}, "instructions", "instructions contains <|endoftext|>"),
        (
            {"instructions": "x", "input": [OPENING, {"role": "user", "content": "<|endoftext|>"}]},
            "input[1].content",
            "input[1].content contains <|endoftext|>",
        ),
    ],
)
def test_unsupported_response_field_is_named(served, body, param, message):
    error = error_of(served.post("/v1/responses", **{"model": "a", "input": "so?"} | body), 400)
    assert error["param"] == param
    assert message in error["message"]


def test_failed_response_is_an_event(start_server):
    with start_server() as served:
        served.generator.engine.step = lambda: 1 / 0
        *_, last = list(served.client().responses.create(**SETTINGS, input="so?", stream=True))
        assert (last.type, last.response.status) == ("response.failed", "failed")
        assert "Internal error" in last.response.error.message
        with pytest.raises(openai.InternalServerError):
            served.client().responses.create(**SETTINGS, input="so?")


def test_events_are_server_sent(served):
    text = served.post("/v1/responses", input="so?", stream=True, **SETTINGS).text
    for event in text.removesuffix("\n\n").split("\n\n"):
        kind, data = event.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == kind.removeprefix("event: ")
