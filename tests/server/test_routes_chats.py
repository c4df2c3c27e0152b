"""Routes: chat completions."""

from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer

from .. import api_server
from ..api_server import error_of, greedy

ROOT = Path(__file__).parents[2]


def test_chat_equals_rendered_completion(client, base, adapters_dir):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "so?"}]
    text = "system: be brief\nuser: so?\nassistant:"
    expected = greedy(base, adapters_dir, "a", text).text
    settings = {"model": "a", "temperature": 0, "max_tokens": 20}
    response = client.chat.completions.create(messages=messages, **settings)
    assert (response.choices[0].message.content, response.choices[0].message.role) == (
        expected,
        "assistant",
    )
    assert (response.choices[0].finish_reason, response.usage.completion_tokens) == ("length", 20)
    assert response.id.startswith("chatcmpl-")
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **settings))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected
    roles = [chunk.choices[0].delta.role for chunk in chunks]
    assert roles == ["assistant", *[None] * (len(chunks) - 1)]
    parts = [{"role": "user", "content": [{"type": "text", "text": "so"}, {"type": "text", "text": "?"}]}]
    assert (
        client.chat.completions.create(messages=parts, **settings).choices
        == client.chat.completions.create(messages=messages[1:], **settings).choices
    )
    newer = [{"role": "developer", "content": "be brief"}, messages[1]]
    assert client.chat.completions.create(messages=newer, **settings).choices == response.choices
    turn = [*messages, response.choices[0].message, {"role": "user", "content": "and?"}]
    assert (
        client.chat.completions.create(messages=turn, **settings).usage.prompt_tokens
        > response.usage.prompt_tokens
    )


def test_chat_fills_context_by_default(client):
    messages = [{"role": "user", "content": "so?"}]
    settings = {"model": "a", "messages": messages, "temperature": 0}
    usage = client.chat.completions.create(**settings).usage
    assert usage.total_tokens == 128
    assert client.chat.completions.create(max_completion_tokens=3, **settings).usage.completion_tokens == 3
    assert (
        client.chat.completions.create(max_tokens=3, max_completion_tokens=3, **settings).usage.completion_tokens
        == 3
    )
    with pytest.raises(openai.BadRequestError, match="differs from max_tokens"):
        client.chat.completions.create(max_tokens=4, max_completion_tokens=3, **settings)


def test_chat_logprobs(client, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = {
        "model": "a",
        "messages": [{"role": "user", "content": "so?"}],
        "seed": 2,
        "max_tokens": 12,
    }
    body = settings | {"logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**body).choices[0]
    assert len(choice.logprobs.content) == 12
    data = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert data.decode(errors="replace").replace("\ufffd", "") == choice.message.content.replace("\ufffd", "")
    for token in choice.logprobs.content:
        top = [alternative.logprob for alternative in token.top_logprobs]
        assert top == sorted(top, reverse=True)
        assert len(top) == 3
        assert token.logprob <= top[0]
    chunks = client.chat.completions.create(stream=True, **body)
    streamed = [token for chunk in chunks for token in chunk.choices[0].logprobs.content]
    assert streamed == choice.logprobs.content
    plain = client.chat.completions.create(logprobs=True, **settings).choices[0].logprobs.content
    assert [token.top_logprobs for token in plain] == [[]] * 12
    assert tokenizer.decode(tokenizer(choice.message.content)["input_ids"]) == choice.message.content


def test_chat_without_template_is_rejected(gpt2, adapters_dir):
    with api_server.serving(gpt2, adapters_dir) as served:
        error = error_of(
            served.post("/v1/chat/completions", model="gpt2", messages=[{"role": "user", "content": "so?"}]),
            400,
        )
    assert error["message"] == "gpt2 has no chat template: use the completions endpoint instead."


@pytest.mark.parametrize("parts", [["so <|endoftext|>?"], ["so <|endof", "text|>?"]])
def test_special_token_in_message_is_rejected(served, parts):
    """It would be tokenized like the special tokens of the template."""
    content = [{"type": "text", "text": part} for part in parts]
    error = error_of(
        served.post("/v1/chat/completions", model="a", messages=[{"role": "user", "content": content}]),
        400,
    )
    assert error["param"] == "messages[0].content"
    assert error["message"] == "messages[0].content contains <|endoftext|>, a special token of talker: remove it."
