import concurrent.futures
import contextlib
import itertools
import json
import logging
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import Generator, Library, ModelOptions, SamplingParams
from lora_tuner.adapters import adapter, library
from lora_tuner.server import neutral, routes, service
from lora_tuner.server.responses import token_text

from .. import adapter_files, api_server
from ..api_server import PROMPT, TEMPLATE, greedy, read_all, write_adapter

ROOT = Path(__file__).parents[2]
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20}


@pytest.fixture(scope="module")
def base(gpt2, tmp_path_factory):
    """The tiny GPT-2, with a chat template."""
    folder = tmp_path_factory.mktemp("served") / "talker"
    shutil.copytree(gpt2, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def adapters_dir(base, tmp_path_factory):
    """A library with two adapters."""
    adapters_dir = tmp_path_factory.mktemp("adapters_dir")
    for seed, name in enumerate(("a", "b")):
        write_adapter(adapters_dir, name, base, seed)
    return adapters_dir


@pytest.fixture(scope="module")
def served(base, adapters_dir):
    with api_server.serving(base, adapters_dir) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    return served.client()


@pytest.fixture(scope="module")
def expected_texts(base, adapters_dir):
    """Return the greedy output of a generator of its own, by model."""
    return {name or "talker": greedy(base, adapters_dir, name).text for name in (None, "a", "b")}


@pytest.fixture
def start_server(base, tmp_path):
    """Return a function that starts a server with its own settings and library."""
    adapters_dir = tmp_path / "adapters"
    for seed, name in enumerate(("a", "b")):
        write_adapter(adapters_dir, name, base, seed)

    def start(**settings):
        return api_server.serving(base, adapters_dir, **settings)

    start.adapters_dir = adapters_dir
    return start


def error_of(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def events(text):
    return [
        json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line and "[DONE]" not in line
    ]


# Models


def test_models_lists_base_and_adapters(client, served, adapters_dir):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["talker", "a", "b"]
    assert [model.parent for model in listed] == [None, "talker", "talker"]
    info = listed[1].lora_tuner
    assert (info["rank"], info["dataset"], info["rows"]["train"]) == (4, "imdb", 10_000)
    assert (info["result"]["gain"], info["result"]["loss"]) == (0.25, 3.5)
    assert info["bytes"] == adapter.load_adapter_folder(adapters_dir / "a").bytes
    assert listed[1].created == 1735787045  # 2025-01-02T03:04:05Z
    assert client.models.retrieve("b").id == "b"
    with pytest.raises(openai.NotFoundError, match="There is no model 'c'"):
        client.models.retrieve("c")
    assert str(adapters_dir) not in served.get("/v1/models").text


@pytest.mark.parametrize(
    "name", ["../a", "..%2Fa", "%2Fetc%2Fpasswd", "a/", "A", "/", "a\0b", "a" * 300, "adapters/a"]
)
def test_model_name_is_never_a_path(served, name):
    assert served.get(f"/v1/models/{name}" if "\0" not in name else "/v1/models/a%00b").status_code == 404
    response = served.post("/v1/completions", model=name, prompt="x")
    assert response.status_code == (400 if "\0" in name or len(name) > 256 else 404)


def test_library_changes_are_served_at_once(start_server, base):
    with start_server() as served:
        client = served.client()
        write_adapter(start_server.adapters_dir, "new", base, 7)
        assert [model.id for model in client.models.list()] == ["talker", "a", "b", "new"]
        assert (
            client.completions.create(model="new", **GREEDY).choices[0].text
            == greedy(base, start_server.adapters_dir, "new").text
        )
        shutil.rmtree(start_server.adapters_dir / "new")
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="new", **GREEDY)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        (start_server.adapters_dir / "b" / adapter.WEIGHTS_FILE).write_bytes(b"nothing")
        broken = client.models.retrieve("b").broken
        assert (
            broken
            == f"b/{adapter.WEIGHTS_FILE}: it is cut off, or no safetensors file. Copy it again from its source."
        )
        with pytest.raises(openai.NotFoundError, match="it is cut off") as error:
            client.completions.create(model="b", **GREEDY)
        assert error.value.code == "model_broken"
        assert str(start_server.adapters_dir) not in str(error.value)
        assert client.models.retrieve("a").broken is None


def test_models_reports_incompatible_adapters(start_server, gpt2, tmp_path):
    base_info = {
        "name": "/home/someone/models/other",
        "repo": "other",
        "revision": None,
        "weights": "a local folder",
    }
    base_info |= {"fingerprint": "ab" * 32, "tokenizer": None}
    with start_server() as served:
        write_adapter(start_server.adapters_dir, "foreign", gpt2, 1, base_info)
        config = json.loads((start_server.adapters_dir / "a" / adapter.CONFIG_FILE).read_text())
        adapter_files.write(start_server.adapters_dir / "misfit", config, adapter_files.tensors())
        listed = {model["id"]: model["broken"] for model in served.get("/v1/models").json()["data"]}
        assert listed["foreign"].startswith("foreign was trained on other (fingerprint abababababab")
        assert "/home" not in listed["foreign"]
        assert (
            "misfit does not fit the base: transformer.h.0.attn.c_attn is 32 -> 96 in the base"
            in listed["misfit"]
        )
        assert (
            error_of(served.post("/v1/completions", model="foreign", prompt="x"), 404)["code"] == "model_broken"
        )


def test_replaced_adapter_keeps_running_requests(start_server, base, expected_texts):
    with start_server() as served:
        client = served.client()
        with served.held_steps() as release:
            release(5)
            stream = client.completions.create(model="a", stream=True, **GREEDY)
            first = next(iter(stream)).choices[0].text
            write_adapter(start_server.adapters_dir, "a", base, 99)
            renewed = greedy(base, start_server.adapters_dir, "a").text
            assert renewed != expected_texts["a"]
            with concurrent.futures.ThreadPoolExecutor() as pool:
                new = pool.submit(client.completions.create, model="a", **GREEDY)
                served.wait(lambda: served.scheduler.waiting + served.scheduler.running == 2)
                release(100)
                assert first + "".join(chunk.choices[0].text for chunk in stream) == expected_texts["a"]
                assert new.result().choices[0].text == renewed


def test_changed_symlink_replaces_adapter(start_server, base):
    for seed, name in ((1, "one"), (2, "two")):
        write_adapter(start_server.adapters_dir / "versions", name, base, seed)
    os.symlink("versions/one", start_server.adapters_dir / "live")
    with start_server() as served:
        client = served.client()
        texts = [client.completions.create(model="live", **GREEDY).choices[0].text]
        os.symlink("versions/two", start_server.adapters_dir / "next")
        os.rename(start_server.adapters_dir / "next", start_server.adapters_dir / "live")
        texts.append(client.completions.create(model="live", **GREEDY).choices[0].text)
        assert texts == [
            greedy(base, start_server.adapters_dir / "versions", name).text for name in ("one", "two")
        ]


def test_least_recently_used_adapter_is_unloaded(start_server, expected_texts):
    with start_server(max_resident=1) as served:
        client = served.client()
        for name in ("a", "b", "a"):
            assert client.completions.create(model=name, **GREEDY).choices[0].text == expected_texts[name]
            assert served.generator.loaded_adapters == [name]


def test_only_named_adapters_are_served(base, start_server, expected_texts):
    with api_server.serving(base, start_server.adapters_dir, only=[start_server.adapters_dir / "a"]) as served:
        assert [model.id for model in served.client().models.list()] == ["talker", "a"]
        assert error_of(served.post("/v1/completions", model="b", **GREEDY), 404)["code"] == "model_not_found"
        assert (
            served.post("/v1/completions", model="a", **GREEDY).json()["choices"][0]["text"]
            == expected_texts["a"]
        )


def test_resident_adapter_is_not_read_again(served, expected_texts, monkeypatch):
    client = served.client()
    responses = [client.completions.create(model="a", **GREEDY)]
    monkeypatch.setattr(Library, "names", None)
    monkeypatch.setattr(library, "load_adapter_folder", None)
    responses.append(client.completions.create(model="a", **GREEDY))
    texts = [response.choices[0].text for response in responses]
    assert texts == [expected_texts["a"]] * 2


def test_get_model_reads_one_adapter(served, monkeypatch):
    names = []
    monkeypatch.setattr(
        service,
        "read_consistently",
        lambda path, read: names.append(path.name) or library.read_consistently(path, read),
    )
    assert served.get("/v1/models/b").json()["id"] == "b"
    assert served.get("/v1/models/talker").json()["parent"] is None
    assert names == ["b"]


# Text


@pytest.mark.parametrize("model", ["talker", "a", "b"])
def test_completion_equals_generate(client, expected_texts, model):
    response = client.completions.create(model=model, **GREEDY)
    assert response.choices[0].text == expected_texts[model]
    assert (response.object, response.model, response.choices[0].index) == (
        "text_completion",
        model,
        0,
    )
    assert response.id.startswith("cmpl-")
    assert response.system_fingerprint.startswith("fp_")
    assert abs(response.created - time.time()) < 60


@pytest.mark.parametrize("model", ["talker", "a"])
def test_stream_deltas_add_up(client, expected_texts, model):
    stream = list(
        client.completions.create(model=model, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected_texts[model]
    finish_reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert finish_reasons == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in stream}) == 1
    assert (last.choices, last.usage.completion_tokens) == ([], 20)
    assert all(chunk.usage is None for chunk in chunks)


def test_mixed_batch_keeps_each_output(client, served, expected_texts):
    """Adapters, lengths and sampling differ within one batch."""

    def other(number):
        return client.completions.create(
            model=("talker", "a", "b")[number % 3],
            prompt="this film " * (1 + number % 12),
            max_tokens=3 + number % 7,
            seed=number,
            n=1 + number % 2,
        )

    with concurrent.futures.ThreadPoolExecutor(40) as pool, served.held_steps() as release:
        greedy = {name: pool.submit(client.completions.create, model=name, **GREEDY) for name in expected_texts}
        others = [pool.submit(other, number) for number in range(20)]
        served.wait(lambda: served.scheduler.waiting + served.scheduler.running == 33)
        release(1000)
        assert {name: future.result().choices[0].text for name, future in greedy.items()} == expected_texts
        again = [other(number) for number in range(20)]
    for future, repeated in zip(others, again, strict=True):
        texts = [choice.text for choice in future.result().choices]
        assert texts == [choice.text for choice in repeated.choices]


def test_n_outputs_equal_generate_with_seed(client, base, adapters_dir):
    sampling = {
        "temperature": 0.9,
        "top_p": 0.9,
        "top_k": 30,
        "repetition_penalty": 1.2,
        "seed": 11,
    }
    generator = Generator(adapters_dir / "a", options=ModelOptions(base=str(base), device="cpu"))
    expected = generator.generate_all(PROMPT, SamplingParams(n=3, max_new_tokens=12, **sampling))
    expected = [output.text for output in expected]
    extra = {
        "top_k": sampling.pop("top_k"),
        "repetition_penalty": sampling.pop("repetition_penalty"),
    }
    body = {
        "model": "a",
        "prompt": PROMPT,
        "n": 3,
        "max_tokens": 12,
        "extra_body": extra,
        **sampling,
    }
    for _ in range(2):
        texts = [choice.text for choice in client.completions.create(**body).choices]
        assert texts == expected
    assert len(set(texts)) == 3
    texts = ["", "", ""]
    for chunk in client.completions.create(stream=True, **body):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_seed_wraps_to_63_bits(client):
    def text(**seed):
        response = client.completions.create(model="a", prompt=PROMPT, max_tokens=12, **seed)
        return response.choices[0].text

    texts = {}
    for seed in (-1, 2**63 - 1, -(2**63), 0):
        texts[seed] = text(seed=seed)
        assert text(seed=seed) == texts[seed]
    assert texts[-1] == texts[2**63 - 1]
    assert texts[-(2**63)] == texts[0] != texts[-1]
    assert len({text() for _ in range(3)}) > 1


def test_greedy_outputs_are_equal(client, expected_texts):
    choices = client.completions.create(model="a", n=3, seed=4, **GREEDY).choices
    assert [choice.text for choice in choices] == [expected_texts["a"]] * 3


def test_prompt_takes_text_and_token_ids(client, base, expected_texts):
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = {"model": "a", "temperature": 0, "max_tokens": 20}
    ids = tokenizer(PROMPT)["input_ids"]
    for prompt, count in (
        (PROMPT, 1),
        ([PROMPT], 1),
        (ids, 1),
        ([ids], 1),
        ([PROMPT, PROMPT], 2),
        ([ids, ids], 2),
    ):
        response = client.completions.create(prompt=prompt, **settings)
        assert [choice.text for choice in response.choices] == [expected_texts["a"]] * count
        assert response.usage.prompt_tokens == count * len(ids)
    choices = client.completions.create(prompt=[PROMPT, "this film"], n=2, **settings).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    first, same, second, same_as_second = [choice.text for choice in choices]
    assert first == same != second == same_as_second
    assert client.completions.create(prompt="", **settings).usage.prompt_tokens == 1


def test_stop_sequence_ends_text(client, expected_texts, base, adapters_dir):
    stop, expected = find_stop(client, expected_texts["a"])
    for sequences in (stop, ["never generated", stop]):
        response = client.completions.create(model="a", stop=sequences, **GREEDY)
        assert (response.choices[0].text, response.choices[0].finish_reason) == (expected, "stop")
        chunks = list(client.completions.create(model="a", stop=sequences, stream=True, **GREEDY))
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    assert greedy(base, adapters_dir, "a", stop=[stop]).text == expected


def find_stop(client, text):
    """Return a stop sequence of two tokens, and the text before it."""
    logprobs = client.completions.create(model="a", logprobs=0, **GREEDY).choices[0].logprobs
    for first, second in itertools.pairwise(logprobs.tokens):
        stop = first + second
        if "bytes:" not in stop and (end := text.find(stop)) in logprobs.text_offset[2:]:
            return stop, text[:end]
    raise AssertionError(logprobs.tokens)


def test_usage_counts_tokens(client, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    usage = client.completions.create(model="a", n=2, **GREEDY).usage
    prompt_tokens = len(tokenizer(PROMPT)["input_ids"])
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt_tokens, 40)
    assert usage.total_tokens == prompt_tokens + 40


def test_logprobs_equal_transformers(client, base):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base),
        AutoTokenizer.from_pretrained(base),
    )
    body = {"model": "talker", "prompt": PROMPT, "max_tokens": 15, "seed": 5, "logprobs": 4}
    choice = client.completions.create(**body).choices[0]
    logprobs = choice.logprobs
    ids = tokenizer(PROMPT)["input_ids"]
    spelled = [token_text(tokenizer, token)[0] for token in range(model.config.vocab_size)]
    assert len(logprobs.tokens) == 15  # with this seed none of them ends the text
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        (chosen,) = [number for number, text in enumerate(spelled) if text == token and number != 0] or [0]
        assert logprob == pytest.approx(float(expected[chosen]), abs=1e-4)
        best = expected.topk(4)
        assert sorted(top.values(), reverse=True)[:4] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert set(top) == {spelled[number] for number in best.indices.tolist()} | {token}
        ids.append(chosen)
    whole = [index for index in range(1, 15) if "bytes:" not in "".join(logprobs.tokens[index - 1 : index + 1])]
    assert whole
    for index in whole:
        assert choice.text[logprobs.text_offset[index] :].startswith(logprobs.tokens[index])
    alone = client.completions.create(**body | {"logprobs": 0}).choices[0].logprobs
    assert [set(top) for top in alone.top_logprobs] == [{token} for token in alone.tokens]
    chunks = [chunk.choices[0] for chunk in client.completions.create(stream=True, **body)]
    assert [token for chunk in chunks for token in chunk.logprobs.tokens] == logprobs.tokens
    assert [offset for chunk in chunks for offset in chunk.logprobs.text_offset] == logprobs.text_offset
    assert "".join(chunk.text for chunk in chunks) == choice.text


def test_logprobs_end_at_stop_sequence(client, expected_texts):
    stop, expected = find_stop(client, expected_texts["a"])
    choice = client.completions.create(model="a", stop=stop, logprobs=0, **GREEDY).choices[0]
    assert choice.text == expected == "".join(choice.logprobs.tokens)
    chunks = list(client.completions.create(model="a", stop=stop, logprobs=0, stream=True, **GREEDY))
    assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens] == choice.logprobs.tokens


def test_token_text_has_bytes(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = " the actor ☕ naïve 日本 \t\n"
    spelled = [token_text(tokenizer, token) for token in tokenizer(text)["input_ids"]]
    assert b"".join(bytes(data) for _, data in spelled).decode() == text
    assert ("bytes:\\xe2", [0xE2]) in spelled


def test_token_text_is_cached_off_loop(start_server, monkeypatch):
    calls = []

    def traced(tokenizer, token):
        calls.append((token, threading.current_thread().name))
        return token_text(tokenizer, token)

    monkeypatch.setattr(routes, "token_text", traced)
    with start_server() as served:
        for _ in range(2):
            assert served.post("/v1/completions", model="a", logprobs=5, **GREEDY).status_code == 200
    tokens = [token for token, _ in calls]
    assert len(tokens) == len(set(tokens)) > 5
    assert all(thread.startswith("lora_tuner-format") for _, thread in calls)


# Chats


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


# Invalid requests

CHAT = {"messages": [{"role": "user", "content": "so?"}]}
TEXT = {"type": "text", "text": "so?"}


def turn(**message):
    """A conversation with this message at its end."""
    return {"messages": [*CHAT["messages"], message]}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": None}, "prompt", "Field required"),
        ({"prompt": 5}, "prompt", "valid string"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": [[]]}, "prompt[0]", "at least 1"),
        ({"prompt": ["x", 1]}, "prompt[1]", "valid string"),
        ({"prompt": [320]}, None, "each from 0 to 319"),
        ({"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
        ({"prompt": [2**80]}, "prompt[0]", "less than or equal"),
        ({"prompt": "a\0b"}, "prompt", "text cannot contain null bytes"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1.5}, "n", "valid integer"),
        ({"n": 128, "prompt": ["x", "y", "z"]}, "n", "n: 384 outputs were requested, the limit of this server is 320."),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"stop": ["a", 1]}, "stop[1]", "valid string"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        (
            {"max_tokens": 127},
            None,
            "The prompt has 3 tokens and max_tokens is 127, but the context length of talker is 128 tokens.",
        ),
        ({"max_tokens": 3000}, "max_tokens", "max_tokens is 3,000: the limit of this server is 2,048."),
        ({"prompt": "so " * 200}, None, "tokens, but talker has a context of 128: shorten it."),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream: true"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what", "unknown field"),
        ({"echo": True}, "echo", "echo: not supported: leave it out, or send false."),
        ({"best_of": 2}, "best_of", "must equal n"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"logit_bias": {"1": 1}}, "logit_bias", "or send {}"),
        ({"presence_penalty": 0.5}, "presence_penalty", "or send 0"),
        ({"frequency_penalty": -0.5}, "frequency_penalty", "or send 0"),
        ({"add_special_tokens": False}, "add_special_tokens", "or send true"),
        ({"min_p": False}, "min_p", "or send 0"),
        ({"nonsense": 1}, "nonsense", "unknown field"),
        ({"user": 5}, "user", "valid string"),
        ({"model": 5}, "model", "valid string"),
        (CHAT | {"tools": [{"type": "function"}]}, "tools", "tools: not supported: leave it out, or send []."),
        (CHAT | {"tool_choice": "required"}, "tool_choice", 'or send "none" or "auto"'),
        (CHAT | {"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
        (CHAT | {"modalities": ["text", "audio"]}, "modalities", 'or send ["text"]'),
        (CHAT | {"reasoning_effort": "low"}, "reasoning_effort", 'or send "none"'),
        (CHAT | {"service_tier": "flex"}, "service_tier", 'or send "auto" or "default"'),
        (CHAT | {"audio": {"voice": "alloy"}}, "audio", "audio: not supported: leave it out."),
        (CHAT | {"top_logprobs": 2}, "top_logprobs", "only allowed with logprobs: true"),
        (CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"messages": []}, "messages", "at least 1"),
        (turn(role="tool", content="x"), "messages[1].role", "'system', 'developer', 'user' or 'assistant'"),
        (turn(role="user"), "messages[1].content", "give a string, or a list of parts of type text"),
        (turn(role="system", content=None), "messages[1].content", "give a string"),
        (turn(role="assistant", content=None, tool_calls=[{}]), "messages[1].tool_calls", "or send []"),
        (turn(role="assistant", content="x", reasoning_content="y"), "messages[1].reasoning_content", 'or send ""'),
        (turn(role="user", content="x", agent="cli"), "messages[1].agent", "unknown field"),
        (turn(role="user", content={"a": 1}), "messages[1].content", "valid string"),
        (
            turn(role="user", content=[TEXT, {"type": "image_url", "image_url": {}}]),
            "messages[1].content[1].type",
            "messages[1].content[1].image_url: not supported: leave it out",
        ),
        ({"messages": [{"role": "user", "content": "so " * 200}]}, None, "has a context of 128: shorten it."),
    ],
)  # fmt: skip
def test_invalid_field_is_named(served, body, param, message):
    chat = "messages" in body
    path, required = "/v1/completions", {"model": "talker", "prompt": PROMPT}
    if chat:
        path, required = "/v1/chat/completions", {"model": "talker"}
    error = error_of(served.post(path, **required | body), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]
    if "has a context of" in message or "context length" in message:
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("field", ["n", "stop", "logprobs", "best_of", "guided_json", "of_some_other_tool"])
def test_null_equals_omitted_field(served, field):
    assert served.post("/v1/completions", model="a", prompt=PROMPT, **{field: None}).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/completions", neutral.COMPLETION), ("/v1/chat/completions", neutral.CHAT)],
)
def test_neutral_values_are_accepted(served, path, fields):
    long = turn(role="user", content="so? " * 25)  # leaves little room for output
    prompt = long if "chat" in path else {"prompt": PROMPT}
    request = {"model": "a", "temperature": 0, "top_k": 5, **prompt}
    limit = {} if "chat" in path else {"max_tokens": 20}
    first = {name: values[0] if values else "anything" for name, values in fields.items() if values != ()}
    last = {name: values[-1] if values else {"any": 1} for name, values in fields.items() if values != ()}
    other = {"stop": "", "n": 1, "best_of": 1, "response_format": {"type": "text", "json_schema": None}}
    other = other if "chat" not in path else other | {"best_of": None, "stop": [], "stream_options": {}}
    expected = served.post(path, **request, **limit).json()
    for values in (first, last, other | {"stop": ["", ""]}, other):
        response = served.post(path, **request | limit | values)
        assert response.status_code == 200, response.text
        assert (response.json()["choices"], response.json()["usage"]) == (expected["choices"], expected["usage"])


def test_neutral_values_are_documented():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for fields in (neutral.COMPLETION, neutral.CHAT, neutral.NESTED):
        assert [name for name, values in fields.items() if values != () and f"`{name}`" not in page] == []


ANSWER = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER | {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
        ANSWER | {"tool_calls": [], "reasoning_content": "", "reasoning": None, "reasoning_details": []},
        ANSWER | {"id": "msg_1", "provider_specific_fields": {"refusal": None}, "thinking_blocks": []},
        ANSWER
        | {
            "content": [
                {"type": "text", "text": "yes", "annotations": [], "cache_control": {"type": "ephemeral"}}
            ]
        },
    ],
)
def test_answer_is_accepted_as_it_came(served, answer):
    def prompt_tokens(answer):
        response = served.post("/v1/chat/completions", model="a", max_tokens=1, **turn(**answer))
        assert response.status_code == 200, response.text
        return response.json()["usage"]["prompt_tokens"]

    assert prompt_tokens(answer) == prompt_tokens(ANSWER)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": None, "tool_calls": []}, {"content": []}])
def test_missing_answer_equals_empty_one(served, content):
    usages = [
        served.post(
            "/v1/chat/completions", model="a", max_tokens=1, temperature=0, **turn(role="assistant", **message)
        )
        for message in (content, {"content": ""})
    ]
    assert usages[0].json()["usage"] == usages[1].json()["usage"]


def test_name_reaches_the_chat_template(base, adapters_dir, tmp_path):
    folder = shutil.copytree(base, tmp_path / "named")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: {{ m.content }}\n{% endfor %}"
    )
    with api_server.serving(folder, adapters_dir) as served:

        def post(**message):
            return served.post("/v1/chat/completions", model="a", max_tokens=1, **turn(**message))

        named, plain = post(role="user", name="ada", content="x"), post(role="user", content="x")
        assert named.json()["usage"]["prompt_tokens"] > plain.json()["usage"]["prompt_tokens"]
        error = error_of(post(role="user", name="<|endoftext|>", content="x"), 400)
    assert error["message"].startswith("messages[1].name contains <|endoftext|>, a special token")


# In the manner of the documentation of each tool.
CLIENTS = {
    "openai curl": CHAT | {"store": True, "metadata": {"run": "1"}, "service_tier": "auto", "top_p": 1, "n": 1},
    "openai legacy curl": {
        "prompt": "Say this", "max_tokens": 7, "temperature": 0, "stream": False, "logprobs": None, "stop": "\n",
    },
    "lm studio": CHAT | {"temperature": 0.7, "max_tokens": -1, "stream": True},
    "librechat": CHAT | {
        "temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "user": "id", "stream": True,
    },
    "open webui": CHAT | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 4},
    "sillytavern chat": CHAT | {"max_tokens": 4, "stop": [], "logit_bias": {}, "seed": 1, "n": 1, "reasoning_effort": None},
    "sillytavern vllm": {
        "prompt": PROMPT, "max_tokens": 4, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "ignore_eos": False,
        "spaces_between_special_tokens": True, "skip_special_tokens": True, "stop": ["\nYou:", "\n***"] * 4, "best_of": 1,
        "echo": False, "suffix": "", "use_beam_search": False, "length_penalty": 1, "early_stopping": False,
        "stop_token_ids": [], "min_tokens": 0, "guided_grammar": None, "include_stop_str_in_output": False,
    },
    "langchain": CHAT | {"max_completion_tokens": 4, "stream": False, "parallel_tool_calls": False, "seed": None},
    "litellm proxy": CHAT | {"max_tokens": 4, "tools": None, "tool_choice": None, "response_format": None, "extra_headers": None},
    "continue": {"prompt": PROMPT, "max_tokens": 4, "stop": ["<fim>", "\n\n", "```", "/src/", "<|end|>"], "suffix": None},
    "garak": CHAT | {
        "frequency_penalty": 0.0, "max_tokens": 4, "n": 1, "presence_penalty": 0.0, "stop": ["#", ";"], "top_p": 1.0,
    },
    "llama.cpp": CHAT | {
        "cache_prompt": True, "n_predict": -1, "samplers": None, "mirostat": 0, "mirostat_tau": 5, "typical_p": 1,
        "dry_multiplier": 0, "dry_base": 1.75, "xtc_probability": 0, "xtc_threshold": 0.1, "repeat_penalty": 1.0,
        "repeat_last_n": 64, "max_tokens": 4, "timings_per_token": False, "grammar": "",
    },
}  # fmt: skip


@pytest.mark.parametrize("client", CLIENTS)
def test_request_of_known_client_is_accepted(served, client):
    request = {"max_tokens": 4} | CLIENTS[client] | {"model": "a"}
    response = served.post("/v1/chat/completions" if "messages" in request else "/v1/completions", **request)
    assert response.status_code == 200, response.text
    assert "data: [DONE]" in response.text or response.json()["choices"]


def test_body_without_json_header_is_explained(served):
    response = httpx.post(f"{served.url}/v1/completions", content=json.dumps({"model": "a", "prompt": "x"}))
    error = error_of(response, 400)
    assert (
        error["message"]
        == "The body should be a JSON object, sent with the header Content-Type: application/json."
    )


MALFORMED = [
    b"", b"{", b"null", b"[]", b'"x"', b"{}", b"\xff\xfe", b"\x00", b'{"model": "a", "prompt": "x", "temperature": NaN}',
    b'{"model": "a", "prompt": "x", "temperature": Infinity}', b'{"model": "a", "prompt": "x", "temperature": 1e999}',
    b'{"model": "a", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b'{"model": "a", "prompt": "x", "n": ' + b"9" * 400 + b"}",
    b"[" * 100_000, b'{"a":' * 100_000, b'{"model": "a", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b'{"model": "a", "prompt": "\\ud800"}', b'{"model": "\\ud800", "prompt": "x"}', b'{"\\ud800": 1}',
    b'{"model": "a", "prompt": "x", "user": "\\udfff"}', b'{"model": "a", "prompt": "x", "stop": ["\\ud800"]}',
    b'{"model": "a", "prompt": [' + b"{}," * 100_000 + b"{}]}", b'{"' + b"k" * 900_000 + b'": 1}',
    b'{"model": "a", "prompt": "x"} trailing',
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("data", MALFORMED, ids=[str(number) for number in range(len(MALFORMED))])
def test_malformed_body_gives_openai_error(served, path, data):
    response = httpx.post(
        f"{served.url}{path}",
        content=data,
        headers={"Content-Type": "application/json"},
        timeout=30,
    )
    error_of(response, 400)
    assert len(response.content) < 5000


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_browser_form_is_rejected(served, kind):
    """Browsers send these across origins without a preflight request."""
    data = json.dumps({"model": "a", "prompt": "x"}).encode()
    error_of(
        httpx.post(
            f"{served.url}/v1/completions",
            content=data,
            headers={"Content-Type": kind} if kind else {},
        ),
        400,
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1", 404),
        ("GET", "/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/models/a", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("POST", "/health", 405),
    ],
)
def test_unknown_route_gives_404_or_405(served, method, path, status):
    response = httpx.request(method, f"{served.url}{path}")
    error_of(response, status)
    if status == 405:
        assert response.headers["allow"] == ("GET" if "models" in path or "health" in path else "POST")


def test_broken_json_names_its_place(served):
    headers = {"Content-Type": "application/json"}
    error = error_of(httpx.post(f"{served.url}/v1/completions", content=b'{"model": "a",}', headers=headers), 400)
    assert error["message"].startswith("The body is not valid JSON: ")
    assert error["message"].endswith(", at character 14.")


def test_wrong_base_url_names_the_endpoints(served):
    error = error_of(served.post("/chat/completions", model="a", **CHAT), 404)
    assert error["message"] == (
        "There is nothing at /chat/completions: the API has /v1/models, /v1/completions, /v1/chat/completions."
    )


def test_slash_at_the_end_is_accepted(served):
    assert served.get("/v1/models/").json() == served.get("/v1/models").json()
    assert served.post("/v1/chat/completions/", model="a", max_tokens=1, **CHAT).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/a", "/v1/models/c", "/v1/completions"])
def test_head_equals_get_without_body(served, path):
    get, head = served.get(path), httpx.head(f"{served.url}{path}")
    assert (head.status_code, head.headers["content-length"]) == (get.status_code, get.headers["content-length"])
    assert head.content == b""


def test_page_at_root_leaves_api_alone(start_server):
    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"page"})

    with start_server() as served:
        served.app.mount("/", page)
        assert served.get("/nothing").text == "page"
        error_of(served.get("/v1/nothing"), 404)
        error_of(served.post("/v1/models"), 405)
        assert served.get("/v1/models/a").json()["id"] == "a"


def test_allowed_origin_reads_streams_and_errors(start_server):
    origin = {"Origin": "http://localhost:3000"}
    with start_server(allow_origin=["http://localhost:3000"], api_key="12345678") as served:
        key = {"Authorization": "Bearer 12345678"}
        url, body = f"{served.url}/v1/completions", {"model": "a", "stream": True, **GREEDY}
        stream = httpx.post(url, json=body, headers=origin | key)
        assert "data: [DONE]" in stream.text
        wrong = httpx.post(url, json=body | {"model": "c"}, headers=origin | key)
        refused = httpx.post(url, json=body, headers=origin)
        served.service.list_models = None  # an unexpected error
        failed = httpx.get(f"{served.url}/v1/models", headers=origin | key)
        assert [r.status_code for r in (stream, wrong, refused, failed)] == [200, 404, 401, 500]
        for response in (stream, wrong, refused, failed):
            assert response.headers["access-control-allow-origin"] == "http://localhost:3000"
            assert response.headers["vary"] == "Origin"
            assert "access-control-allow-credentials" not in response.headers


# Load, disconnects, timeouts


def test_full_queue_gives_429_with_retry(start_server):
    with start_server(max_batch=1, max_waiting=2) as served, served.held_steps() as release:
        client = served.client()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            futures = []
            for count in (1, 2, 3):
                futures.append(pool.submit(client.completions.create, model="a", **GREEDY))
                served.wait(lambda count=count: served.scheduler.waiting + served.scheduler.running == count)
            with pytest.raises(openai.RateLimitError) as full:
                client.completions.create(model="b", **GREEDY)
            assert full.value.code == "rate_limit_exceeded"
            assert int(full.value.response.headers["retry-after"]) >= 1
            assert "The queue is full, with 2 sequences waiting: try again in" in str(full.value)
            release(1000)
            assert len({future.result().choices[0].text for future in futures}) == 1
        # The client's own retries get through.
        assert served.client(max_retries=2).completions.create(model="b", **GREEDY).choices


@contextlib.contextmanager
def held_loading(served):
    """Hold the loading of adapters until the yielded function is called."""
    get_or_load, released = served.generator.get_or_load, threading.Event()
    served.generator.get_or_load = lambda path: released.wait(10) and get_or_load(path)
    try:
        yield released.set
    finally:
        released.set()
        served.generator.get_or_load = get_or_load


def test_loading_requests_hold_queue_slots(start_server, expected_texts):
    with (
        start_server(max_batch=1, max_waiting=2) as served,
        held_loading(served) as release,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        client = served.client()
        futures = [pool.submit(client.completions.create, model="a", n=n, **GREEDY) for n in (1, 2)]
        served.wait(lambda: served.scheduler._reserved == 3)
        error = error_of(served.post("/v1/completions", model="a", **GREEDY), 429)
        assert error["message"].startswith("The queue is full, with 3 sequences waiting: try again in ")
        release()
        assert {choice.text for future in futures for choice in future.result().choices} == {expected_texts["a"]}
    assert not served.scheduler.waiting


def test_loading_time_counts_towards_timeout(start_server):
    with start_server(timeout=0.3) as served, held_loading(served) as release:
        threading.Timer(0.6, release).start()
        assert error_of(served.post("/v1/completions", model="a", **GREEDY), 504)["code"] == "timeout"


@pytest.mark.parametrize("work", ["list", "load", "encode-long", "format", "metrics", "blend", "draw", "measure"])
def test_answers_pass_other_work(served, work):
    """Requests that need no such work are answered while it is stuck."""
    assert served.post("/v1/completions", model="a", **GREEDY).status_code == 200  # it is in memory now
    with held(served, work):
        for model in ("talker", "a"):
            assert served.post("/v1/completions", model=model, **GREEDY).status_code == 200
        assert served.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("work", "body"),
    [
        ("load", {"model": "b", "prompt": PROMPT}),
        ("encode-long", {"model": "talker", "prompt": "x" * (service.SHORT_PROMPT + 1)}),
        ("encode-long", {"model": "talker", "prompt": [PROMPT] * (service.SHORT_PROMPT // len(PROMPT) + 1)}),
        ("format", {"model": "talker", "prompt": PROMPT, "logprobs": 2}),
    ],
    ids=["not in memory", "long prompt", "many prompts", "log-probabilities"],
)
def test_dear_request_waits_in_its_own_thread(start_server, work, body):
    with start_server(max_waiting=5000) as served, concurrent.futures.ThreadPoolExecutor() as pool:
        with held(served, work):
            waiting = served.service._threads[work]._work_queue
            dear = pool.submit(served.post, "/v1/completions", max_tokens=1, **body)
            served.wait(lambda: waiting.qsize() == 1)
            assert served.post("/v1/completions", model="talker", **GREEDY).status_code == 200
            assert not dear.done()
        assert dear.result(30).status_code in (200, 400)


@contextlib.contextmanager
def held(served, work):
    """Keep a thread of the service busy."""
    busy, release = threading.Event(), threading.Event()
    served.service._threads[work].submit(lambda: busy.set() or release.wait(30))
    assert busy.wait(10)
    try:
        yield
    finally:
        release.set()


def test_listing_reads_only_changed_adapters(start_server, base, monkeypatch):
    read = []
    load_adapter_folder = library.load_adapter_folder
    monkeypatch.setattr(
        library, "load_adapter_folder", lambda path: read.append(path.name) or load_adapter_folder(path)
    )
    monkeypatch.setattr(service, "SETTLED_SECONDS", 0)
    (start_server.adapters_dir / "empty").mkdir()
    with start_server() as served:
        first = served.get("/v1/models")
        assert sorted(read) == ["a", "b", "empty"]
        read.clear()
        assert served.get("/v1/models").content == first.content
        assert served.get("/v1/models/b").json() in first.json()["data"]
        assert read == []
        write_adapter(start_server.adapters_dir, "b", base, 5)
        write_adapter(start_server.adapters_dir, "empty2", base, 5)
        shutil.rmtree(start_server.adapters_dir / "a")
        (start_server.adapters_dir / "empty" / adapter.CONFIG_FILE).write_text("{}")
        read.clear()
        listed = {model["id"]: model["broken"] for model in served.get("/v1/models").json()["data"]}
        assert sorted(read) == ["b", "empty", "empty2"]
        assert list(listed) == ["talker", "b", "empty", "empty2"]
        assert "peft_type" in listed["empty"]


def test_fresh_change_is_read_again(start_server, monkeypatch):
    """The next change may have the same size and time."""
    monkeypatch.setattr(service, "SETTLED_SECONDS", 1000)
    with start_server() as served:
        models = [served.service.get_model("a") for _ in range(2)]
    assert models[0] is not models[1]


def test_request_uses_few_threads(served, monkeypatch):
    works, run_in_thread = [], served.service.run_in_thread

    def counted(work, function):
        works.append(work)
        return run_in_thread(work, function)

    served.post("/v1/completions", model="a", **GREEDY)  # loads it
    monkeypatch.setattr(served.service, "run_in_thread", counted)
    for model in ("talker", "a"):
        served.post("/v1/completions", model=model, **GREEDY)
    assert works == ["encode", "find", "encode"]


def test_busy_adapter_does_not_delay_another(start_server):
    with start_server(max_batch=2) as served, served.held_steps() as release:
        client, done = served.client(), []

        def complete(model):
            client.completions.create(model=model, **GREEDY)
            done.append(model)

        threads = [threading.Thread(target=complete, args=["a"]) for _ in range(20)]
        for thread in threads:
            thread.start()
        served.wait(lambda: served.scheduler.waiting + served.scheduler.running == 20)
        threads.append(threading.Thread(target=complete, args=["b"]))
        threads[-1].start()
        served.wait(lambda: served.scheduler.waiting + served.scheduler.running == 21)
        release(5000)
        for thread in threads:
            thread.join()
    assert done.index("b") < 6


def test_short_request_overtakes_long_one(start_server):
    with start_server() as served, served.held_steps() as release:
        client, long = served.client(), "this film " * 25
        with concurrent.futures.ThreadPoolExecutor() as pool:
            first = pool.submit(client.completions.create, model="a", prompt=long, max_tokens=60, temperature=0)
            served.wait(lambda: served.scheduler.running == 1)
            second = pool.submit(client.completions.create, model="b", prompt="x", max_tokens=2, temperature=0)
            served.wait(lambda: served.scheduler.waiting == 1)
            release(10)
            assert second.result(10).usage.completion_tokens == 2
            assert not first.done()
            release(1000)
            assert first.result(10).usage.completion_tokens == 60


def test_disconnect_frees_slot(start_server, expected_texts):
    request = {"model": "a", "prompt": PROMPT, "max_tokens": 100, "temperature": 0}
    with start_server(max_batch=1) as served, served.held_steps() as release:
        for stream in (True, False):
            body = json.dumps(request | {"stream": stream}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                connection.sendall(head.encode() + body)
                served.wait(lambda: served.scheduler.running == 1)
                release(3)
                received = b""
                while stream and b"data: {" not in received:
                    received += connection.recv(65536)
            served.wait(lambda: all(request.cancelled for request in served.scheduler._requests()))
            release(2)
            served.wait(lambda: served.scheduler.idle)
        release(1000)
        assert served.client().completions.create(model="a", **GREEDY).choices[0].text == expected_texts["a"]
        assert not served.generator.engine.sequences


def test_disconnected_waiting_request_never_starts(start_server):
    with (
        start_server(max_batch=1) as served,
        served.held_steps() as release,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(served.client().completions.create, model="a", **GREEDY)
        served.wait(lambda: served.scheduler.running == 1)
        with pytest.raises(openai.APITimeoutError):
            served.client(timeout=0.3).completions.create(model="b", **GREEDY)
        served.wait(lambda: served.app.state.metrics.open == 1)
        release(3)
        served.wait(lambda: served.scheduler.waiting == 0)
        release(1000)
        first.result()


def test_timeout_gives_504_or_event(start_server):
    with start_server(timeout=1) as served:
        client = served.client()
        with served.held_steps(pause=0.05):
            with pytest.raises(openai.InternalServerError) as late:
                client.completions.create(model="a", prompt=PROMPT, max_tokens=100, temperature=0)
            assert (late.value.status_code, late.value.code) == (504, "timeout")
            assert late.value.body["message"] == "The request took longer than 1 seconds."
            stream = client.completions.create(
                model="a", prompt=PROMPT, max_tokens=100, temperature=0, stream=True
            )
            assert next(iter(stream)).choices
            with pytest.raises(openai.APIError, match=r"The request took longer than 1 seconds"):
                list(stream)
        served.wait(lambda: served.scheduler.idle)
        assert client.completions.create(model="a", prompt=PROMPT, max_tokens=2).choices


def test_unexpected_error_fails_its_batch_alone(start_server, expected_texts, caplog):
    with start_server() as served:
        engine = served.generator.engine
        step = engine.step

        def fail():
            engine.step = step
            raise RuntimeError("a secret of this machine")

        caplog.set_level(logging.INFO, "lora_tuner.server")
        for round_number, stream in enumerate((False, True)):
            engine.step = fail
            response = served.post("/v1/completions", model="a", stream=stream, **GREEDY)
            error = events(response.text)[0]["error"] if stream else error_of(response, 500)
            assert (error["type"], error["code"]) == ("server_error", None)
            request = response.headers["x-request-id"]
            assert error["message"] == f"Internal error; the server's log has it as request {request}."
            served.wait(lambda count=2 * round_number + 2: len(caplog.records) >= count)
            failure, line = caplog.records[2 * round_number :]
            assert failure.getMessage() == f"request {request}"
            assert str(failure.exc_info[1]) == "a secret of this machine"
            assert (line.msg["id"], line.msg["code"]) == (request, "RuntimeError")
            assert line.msg["status"] == (200 if stream else 500)
        assert (
            served.post("/v1/completions", model="a", **GREEDY).json()["choices"][0]["text"]
            == expected_texts["a"]
        )


def test_disconnect_in_body_leaves_server_running(served, expected_texts):
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for rest in (
        "Content-Length: 500\r\n\r\n{",
        'Transfer-Encoding: chunked\r\n\r\n5\r\n{"mod\r\n',
        "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall((head + rest).encode())
    body = json.dumps({"model": "a", **GREEDY}).encode()
    halves = b"%x\r\n%s\r\n" % (10, body[:10]) + b"%x\r\n%s\r\n0\r\n\r\n" % (
        len(body) - 10,
        body[10:],
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connection:
        connection.sendall((head + "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n").encode() + halves)
        response = read_all(connection)
    assert json.loads(response.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == expected_texts["a"]
    served.wait(lambda: served.app.state.metrics.open == 0)


def test_slow_reader_delays_nobody(start_server, expected_texts):
    """The buffers between client and server are full, and the server goes on generating."""
    small = (socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
    request = {
        "model": "a",
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": 100,
        "n": 20,
        "logprobs": 5,
    }
    with start_server() as served:
        served.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32_768)
        with (
            httpx.Client(transport=httpx.HTTPTransport(socket_options=[small]), timeout=20) as client,
            client.stream("POST", f"{served.url}/v1/completions", json=request | {"stream": True}) as response,
        ):
            (protocol,) = served.server.server_state.connections
            served.wait(lambda: protocol.flow.write_paused and served.scheduler.idle)
            assert (
                served.post("/v1/completions", model="a", **GREEDY).json()["choices"][0]["text"]
                == expected_texts["a"]
            )
            assert protocol.flow.write_paused
            deltas = [event["choices"][0] for event in events(response.read().decode())]
        for choice in served.post("/v1/completions", **request).json()["choices"]:
            own = [delta for delta in deltas if delta["index"] == choice["index"]]
            assert "".join(delta["text"] for delta in own) == choice["text"]
            tokens = [token for delta in own for token in delta["logprobs"]["tokens"]]
            assert tokens == choice["logprobs"]["tokens"]


# Fuzzing


@pytest.fixture(scope="module")
def schema(served):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def fuzz(schema, mode, examples):
    """Send valid or invalid requests; each response must match the schema, and none may be a 500."""
    for result in schema.get_all_operations():
        operation = result.ok()
        if not (mode.is_positive or list(operation.body)):
            continue  # without a body nothing can be invalid

        @given(case=operation.as_strategy(mode))
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def check(case):
            if mode.is_positive and isinstance(case.body, dict):
                case.body["model"] = "a"
            case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=30)

        check()


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_fuzzed_requests_match_openapi(schema, mode):
    fuzz(schema, mode, 12)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_many_fuzzed_requests_match_openapi(schema, mode):
    fuzz(schema, mode, 1000)


# Limits of one request


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("completions", {"prompt": PROMPT, "n": 128, "logprobs": 5, "max_tokens": 20}, "logprobs"),
        ("completions", {"prompt": [PROMPT] * 40, "n": 8, "logprobs": 0, "max_tokens": 40}, "logprobs"),
        ("chat/completions", {"n": 128, "logprobs": True, "top_logprobs": 20}, "top_logprobs"),
    ],
    ids=["n", "prompts", "default max_tokens"],
)
def test_product_of_logprobs_is_limited(served, monkeypatch, path, body, field):
    monkeypatch.setattr(routes, "MAX_LOGPROBS", 10_000)
    if path != "completions":
        body = body | {"messages": [{"role": "user", "content": "x"}]}
    error = error_of(served.post(f"/v1/{path}", model="talker", **body), 400)
    assert error["param"] == field
    assert error["message"].endswith(f"the limit of this server is 10,000. Lower {field}, n or max_tokens.")


def test_logprobs_within_limit_are_answered(served, monkeypatch):
    monkeypatch.setattr(routes, "MAX_LOGPROBS", 2 * 3 * 6)
    body = {"model": "talker", "prompt": PROMPT, "n": 2, "logprobs": 5}
    assert served.post("/v1/completions", max_tokens=3, **body).status_code == 200
    assert served.post("/v1/completions", max_tokens=4, **body).status_code == 400


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_tiny_temperature_is_greedy(served, expected_texts, temperature):
    body = {"model": "a", **GREEDY, "temperature": temperature, "seed": 3, "top_k": 5}
    (choice,) = served.post("/v1/completions", **body).json()["choices"]
    assert choice["text"] == expected_texts["a"]


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ('{"model": "talker", "prompt": "x", "model": "a"}', "model"),
        ('{"model": "talker", "prompt": "x", "\\u006dodel": "a"}', "model"),
        ('{"model": "talker", "prompt": "x", "stream_options": {"include_usage": true, "include_usage": null}}', "include_usage"),
        ('{"model": "talker", "messages": [{"role": "user", "role": "system", "content": "x"}]}', "role"),
    ],
)  # fmt: skip
def test_repeated_json_key_is_refused(served, body, key):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    headers = {"Content-Type": "application/json"}
    error = error_of(httpx.post(f"{served.url}{path}", content=body, headers=headers), 400)
    assert error["message"] == f"The body is not valid JSON: '{key}' is given twice in an object."
