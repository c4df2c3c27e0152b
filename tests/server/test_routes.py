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
from lora_tuner.server import routes, service
from lora_tuner.server.responses import token_text

from .. import adapter_files, api_server
from ..api_server import PROMPT, TEMPLATE, greedy, read, write_adapter

GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20}


@pytest.fixture(scope="module")
def base(gpt2, tmp_path_factory):
    """The tiny GPT-2, with a chat template."""
    folder = tmp_path_factory.mktemp("served") / "talker"
    shutil.copytree(gpt2, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def shelf(base, tmp_path_factory):
    """A library with two adapters."""
    shelf = tmp_path_factory.mktemp("shelf")
    for seed, name in enumerate(("a", "b")):
        write_adapter(shelf, name, base, seed)
    return shelf


@pytest.fixture(scope="module")
def served(base, shelf):
    with api_server.serving(base, shelf) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    return served.client()


@pytest.fixture(scope="module")
def alone(base, shelf):
    """What `generate` writes greedily, by model."""
    return {name or "talker": greedy(base, shelf, name).text for name in (None, "a", "b")}


@pytest.fixture
def own(base, tmp_path):
    """A library of its own for a test, and a server over it with its own settings."""
    shelf = tmp_path / "own"
    for seed, name in enumerate(("a", "b")):
        write_adapter(shelf, name, base, seed)

    def start(**settings):
        return api_server.serving(base, shelf, **settings)

    start.shelf = shelf
    return start


def error_of(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def events(text):
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line and "[DONE]" not in line]


# Models


def test_models_are_the_base_and_the_adapters_with_their_facts(client, served, shelf):
    listed = client.models.list().data
    assert [it.id for it in listed] == ["talker", "a", "b"]
    assert [it.parent for it in listed] == [None, "talker", "talker"]
    facts = listed[1].lora_tuner
    assert (facts["rank"], facts["dataset"], facts["rows"]["train"]) == (4, "imdb", 10_000)
    assert (facts["result"]["gain"], facts["result"]["loss"]) == (0.25, 3.5)
    assert facts["bytes"] == adapter.load_adapter_folder(shelf / "a").bytes
    assert listed[1].created == 1735787045  # 2025-01-02T03:04:05Z
    assert client.models.retrieve("b").id == "b"
    with pytest.raises(openai.NotFoundError, match="There is no model 'c'"):
        client.models.retrieve("c")
    assert str(shelf) not in served.get("/v1/models").text


@pytest.mark.parametrize("name", ["../a", "..%2Fa", "%2Fetc%2Fpasswd", "a/", "A", "", "a\0b", "a" * 300, "adapters/a"])
def test_a_name_is_looked_up_and_never_a_path(served, name):
    assert served.get(f"/v1/models/{name}" if "\0" not in name else "/v1/models/a%00b").status_code == 404
    response = served.post("/v1/completions", model=name, prompt="x")
    assert response.status_code == (400 if "\0" in name or len(name) > 256 else 404)


def test_adapters_come_go_and_break_while_it_runs(own, base):
    with own() as served:
        client = served.client()
        write_adapter(own.shelf, "new", base, 7)
        assert [it.id for it in client.models.list()] == ["talker", "a", "b", "new"]
        assert client.completions.create(model="new", **GREEDY).choices[0].text == greedy(base, own.shelf, "new").text
        shutil.rmtree(own.shelf / "new")
        with pytest.raises(openai.NotFoundError) as gone:
            client.completions.create(model="new", **GREEDY)
        assert (gone.value.code, gone.value.param) == ("model_not_found", "model")
        (own.shelf / "b" / adapter.WEIGHTS_FILE).write_bytes(b"nothing")
        broken = client.models.retrieve("b").broken
        assert (
            broken == f"b/{adapter.WEIGHTS_FILE}: it is cut off, or no safetensors file. Copy it again from its source."
        )
        with pytest.raises(openai.NotFoundError, match="it is cut off") as error:
            client.completions.create(model="b", **GREEDY)
        assert error.value.code == "model_broken"
        assert str(own.shelf) not in str(error.value)
        assert client.models.retrieve("a").broken is None


def test_adapters_of_another_base_and_misfits_are_listed_with_the_reason(own, gpt2, tmp_path):
    facts = {"name": "/home/someone/models/other", "repo": "other", "revision": None, "weights": "a local folder"}
    facts |= {"fingerprint": "ab" * 32, "tokenizer": None}
    with own() as served:
        write_adapter(own.shelf, "foreign", gpt2, 1, facts)
        config = json.loads((own.shelf / "a" / adapter.CONFIG_FILE).read_text())
        adapter_files.write(own.shelf / "misfit", config, adapter_files.tensors())
        listed = {it["id"]: it["broken"] for it in served.get("/v1/models").json()["data"]}
        assert listed["foreign"].startswith("foreign was trained on other (fingerprint abababababab")
        assert "/home" not in listed["foreign"]
        assert "misfit does not fit the base: transformer.h.0.attn.c_attn is 32 -> 96 in the base" in listed["misfit"]
        assert error_of(served.post("/v1/completions", model="foreign", prompt="x"), 404)["code"] == "model_broken"


def test_a_replaced_adapter_serves_new_requests_and_lets_running_ones_end(own, base, alone):
    with own() as served:
        client = served.client()
        with served.braked() as let:
            let(5)
            stream = client.completions.create(model="a", stream=True, **GREEDY)
            first = next(iter(stream)).choices[0].text
            write_adapter(own.shelf, "a", base, 99)
            renewed = greedy(base, own.shelf, "a").text
            assert renewed != alone["a"]
            with concurrent.futures.ThreadPoolExecutor() as pool:
                new = pool.submit(client.completions.create, model="a", **GREEDY)
                served.wait(lambda: served.worker.waiting + served.worker.running == 2)
                let(100)
                assert first + "".join(it.choices[0].text for it in stream) == alone["a"]
                assert new.result().choices[0].text == renewed


def test_a_link_that_leads_elsewhere_is_a_replaced_adapter(own, base):
    for seed, name in ((1, "one"), (2, "two")):
        write_adapter(own.shelf / "versions", name, base, seed)
    os.symlink("versions/one", own.shelf / "live")
    with own() as served:
        client = served.client()
        texts = [client.completions.create(model="live", **GREEDY).choices[0].text]
        os.symlink("versions/two", own.shelf / "next")
        os.rename(own.shelf / "next", own.shelf / "live")
        texts.append(client.completions.create(model="live", **GREEDY).choices[0].text)
        assert texts == [greedy(base, own.shelf / "versions", name).text for name in ("one", "two")]


def test_those_not_used_for_longest_leave_memory(own, alone):
    with own(max_resident=1) as served:
        client = served.client()
        for name in ("a", "b", "a"):
            assert client.completions.create(model=name, **GREEDY).choices[0].text == alone[name]
            assert served.generator.loaded == [name]


def test_only_the_adapters_that_are_named(base, own, alone):
    with api_server.serving(base, own.shelf, only=[own.shelf / "a"]) as served:
        assert [it.id for it in served.client().models.list()] == ["talker", "a"]
        assert error_of(served.post("/v1/completions", model="b", **GREEDY), 404)["code"] == "model_not_found"
        assert served.post("/v1/completions", model="a", **GREEDY).json()["choices"][0]["text"] == alone["a"]


def test_an_adapter_in_memory_that_has_not_changed_is_not_looked_for(own, alone, monkeypatch):
    with own() as served:
        asked = [served.client().completions.create(model="a", **GREEDY)]
        monkeypatch.setattr(Library, "names", None)
        monkeypatch.setattr(library, "load_adapter_folder", None)
        asked.append(served.client().completions.create(model="a", **GREEDY))
    assert [it.choices[0].text for it in asked] == [alone["a"]] * 2


def test_of_one_model_no_other_is_read(served, monkeypatch):
    read = []
    monkeypatch.setattr(
        service, "read_consistently", lambda path, look: read.append(path.name) or library.read_consistently(path, look)
    )
    assert served.get("/v1/models/b").json()["id"] == "b"
    assert served.get("/v1/models/talker").json()["parent"] is None
    assert read == ["b"]


# Text


@pytest.mark.parametrize("model", ["talker", "a", "b"])
def test_the_answer_is_what_generate_gives(client, alone, model):
    answer = client.completions.create(model=model, **GREEDY)
    assert answer.choices[0].text == alone[model]
    assert (answer.object, answer.model, answer.choices[0].index) == ("text_completion", model, 0)
    assert answer.id.startswith("cmpl-")
    assert answer.system_fingerprint.startswith("fp_")
    assert abs(answer.created - time.time()) < 60


@pytest.mark.parametrize("model", ["talker", "a"])
def test_the_pieces_of_a_stream_add_up(client, alone, model):
    stream = list(client.completions.create(model=model, stream=True, stream_options={"include_usage": True}, **GREEDY))
    *pieces, last = stream
    assert "".join(it.choices[0].text for it in pieces) == alone[model]
    assert [it.choices[0].finish_reason for it in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len({it.id for it in stream}) == 1
    assert (last.choices, last.usage.completion_tokens) == ([], 20)
    assert all(it.usage is None for it in pieces)


def test_it_stays_so_among_twenty_others(client, served, alone):
    """Different adapters, lengths and ways to draw, all in one batch."""

    def other(number):
        return client.completions.create(
            model=("talker", "a", "b")[number % 3],
            prompt="this film " * (1 + number % 12),
            max_tokens=3 + number % 7,
            seed=number,
            n=1 + number % 2,
        )

    with concurrent.futures.ThreadPoolExecutor(40) as pool, served.braked() as let:
        asked = {name: pool.submit(client.completions.create, model=name, **GREEDY) for name in alone}
        others = [pool.submit(other, number) for number in range(20)]
        served.wait(lambda: served.worker.waiting + served.worker.running == 33)
        let(1000)
        assert {name: it.result().choices[0].text for name, it in asked.items()} == alone
        again = [other(number) for number in range(20)]
    assert [[it.text for it in one.result().choices] for one in others] == [
        [it.text for it in it.choices] for it in again
    ]


def test_several_answers_are_those_of_generate_with_that_seed(client, base, shelf):
    sampling = {"temperature": 0.9, "top_p": 0.9, "top_k": 30, "repetition_penalty": 1.2, "seed": 11}
    generator = Generator(shelf / "a", options=ModelOptions(base=str(base), device="cpu"))
    expected = generator.generate_all(PROMPT, SamplingParams(n=3, max_new_tokens=12, **sampling))
    more = {"top_k": sampling.pop("top_k"), "repetition_penalty": sampling.pop("repetition_penalty")}
    asked = {"model": "a", "prompt": PROMPT, "n": 3, "max_tokens": 12, "extra_body": more, **sampling}
    for _ in range(2):
        found = client.completions.create(**asked).choices
        assert [it.text for it in found] == [it.text for it in expected]
    assert len({it.text for it in found}) == 3
    texts = ["", "", ""]
    for piece in client.completions.create(stream=True, **asked):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [it.text for it in expected]


def test_seeds_of_any_sign_and_none(client):
    asked = {"model": "a", "prompt": PROMPT, "max_tokens": 12}
    texts = {
        seed: {client.completions.create(seed=seed, **asked).choices[0].text for _ in range(2)}
        for seed in (-1, 2**63 - 1, -(2**63), 0)
    }
    assert all(len(found) == 1 for found in texts.values())
    assert texts[-1] == texts[2**63 - 1]  # modulo 2**63
    assert texts[-(2**63)] == texts[0] != texts[-1]
    assert len({client.completions.create(**asked).choices[0].text for _ in range(3)}) > 1


def test_greedy_answers_are_all_the_same(client, alone):
    found = client.completions.create(model="a", n=3, seed=4, **GREEDY).choices
    assert [it.text for it in found] == [alone["a"]] * 3


def test_every_kind_of_prompt(client, base, alone):
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = {"model": "a", "temperature": 0, "max_tokens": 20}
    ids = tokenizer(PROMPT)["input_ids"]
    for prompt, count in ((PROMPT, 1), ([PROMPT], 1), (ids, 1), ([ids], 1), ([PROMPT, PROMPT], 2), ([ids, ids], 2)):
        answer = client.completions.create(prompt=prompt, **settings)
        assert [it.text for it in answer.choices] == [alone["a"]] * count
        assert answer.usage.prompt_tokens == count * len(ids)
    both = client.completions.create(prompt=[PROMPT, "this film"], n=2, **settings).choices
    assert [it.index for it in both] == [0, 1, 2, 3]
    assert both[0].text == both[1].text != both[2].text == both[3].text
    assert client.completions.create(prompt="", **settings).usage.prompt_tokens == 1


def test_stop_strings_end_the_text_and_are_not_in_it(client, alone, base, shelf):
    whole = alone["a"]
    stop, expected = two_tokens(client, whole)
    for wanted in (stop, ["never written", stop]):
        answer = client.completions.create(model="a", stop=wanted, **GREEDY)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
        pieces = list(client.completions.create(model="a", stop=wanted, stream=True, **GREEDY))
        assert "".join(it.choices[0].text for it in pieces) == expected
        assert pieces[-1].choices[0].finish_reason == "stop"
    assert greedy(base, shelf, "a", stop=[stop]).text == expected


def two_tokens(client, whole):
    """A stop string that two tokens of the text make up, and the text before it."""
    found = client.completions.create(model="a", logprobs=0, **GREEDY).choices[0].logprobs
    for first, second in itertools.pairwise(found.tokens):
        if "bytes:" not in first + second and (end := whole.find(first + second)) in found.text_offset[2:]:
            return first + second, whole[:end]
    raise AssertionError(found.tokens)


def test_usage_counts_tokens(client, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    usage = client.completions.create(model="a", n=2, **GREEDY).usage
    before = len(tokenizer(PROMPT)["input_ids"])
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (before, 40, before + 40)


def test_logprobs_are_those_of_the_model(client, base):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    asked = {"model": "talker", "prompt": PROMPT, "max_tokens": 15, "seed": 5, "logprobs": 4}
    choice = client.completions.create(**asked).choices[0]
    found = choice.logprobs
    ids = tokenizer(PROMPT)["input_ids"]
    assert len(found.tokens) == 15  # with this seed none of them ends the text
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        (chosen,) = [it for it in range(len(expected)) if token_text(tokenizer, it)[0] == token and it != 0] or [0]
        assert logprob == pytest.approx(float(expected[chosen]), abs=1e-4)
        best = expected.topk(4)
        assert sorted(top.values(), reverse=True)[:4] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert set(top) == {token_text(tokenizer, it)[0] for it in best.indices.tolist()} | {token}
        ids.append(chosen)
    whole = [place for place in range(1, 15) if not "".join(found.tokens[place - 1 : place + 1]).count("bytes:")]
    assert whole
    assert all(choice.text[found.text_offset[place] :].startswith(found.tokens[place]) for place in whole)
    none = client.completions.create(**asked | {"logprobs": 0}).choices[0].logprobs
    assert [set(it) for it in none.top_logprobs] == [{token} for token in none.tokens]
    streamed = [it.choices[0] for it in client.completions.create(stream=True, **asked)]
    assert [token for it in streamed for token in it.logprobs.tokens] == found.tokens
    assert [start for it in streamed for start in it.logprobs.text_offset] == found.text_offset
    assert "".join(it.text for it in streamed) == choice.text


def test_logprobs_end_where_the_text_is_cut(client, alone):
    stop, expected = two_tokens(client, alone["a"])
    choice = client.completions.create(model="a", stop=stop, logprobs=0, **GREEDY).choices[0]
    assert choice.text == expected == "".join(choice.logprobs.tokens)
    pieces = list(client.completions.create(model="a", stop=stop, logprobs=0, stream=True, **GREEDY))
    assert [token for it in pieces for token in it.choices[0].logprobs.tokens] == choice.logprobs.tokens


def test_tokens_are_spelt_with_the_bytes_that_they_stand_for(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = " the actor ☕ naïve 日本 \t\n"
    spelt = [token_text(tokenizer, token) for token in tokenizer(text)["input_ids"]]
    assert b"".join(bytes(data) for _, data in spelt).decode() == text
    assert ("bytes:\\xe2", [0xE2]) in spelt


def test_a_token_is_spelt_once_and_beside_the_connections(own, monkeypatch):
    spelt = []
    monkeypatch.setattr(
        routes,
        "token_text",
        lambda *what: spelt.append((what[1], threading.current_thread().name)) or token_text(*what),
    )
    with own() as served:
        for _ in range(2):
            assert served.post("/v1/completions", model="a", logprobs=5, **GREEDY).status_code == 200
    tokens = [token for token, _ in spelt]
    assert len(tokens) == len(set(tokens)) > 5
    assert all(thread.startswith("asyncio_") for _, thread in spelt)


# Chats


def test_a_chat_is_the_completion_of_its_template(client, base, shelf):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "so?"}]
    text = "system: be brief\nuser: so?\nassistant:"
    expected = greedy(base, shelf, "a", text).text
    settings = {"model": "a", "temperature": 0, "max_tokens": 20}
    answer = client.chat.completions.create(messages=messages, **settings)
    assert (answer.choices[0].message.content, answer.choices[0].message.role) == (expected, "assistant")
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 20)
    assert answer.id.startswith("chatcmpl-")
    pieces = list(client.chat.completions.create(messages=messages, stream=True, **settings))
    assert "".join(it.choices[0].delta.content for it in pieces) == expected
    assert [it.choices[0].delta.role for it in pieces] == ["assistant", *[None] * (len(pieces) - 1)]
    parts = [{"role": "user", "content": [{"type": "text", "text": "so"}, {"type": "text", "text": "?"}]}]
    assert (
        client.chat.completions.create(messages=parts, **settings).choices
        == client.chat.completions.create(messages=messages[1:], **settings).choices
    )
    newer = [{"role": "developer", "content": "be brief"}, messages[1]]
    assert client.chat.completions.create(messages=newer, **settings).choices == answer.choices
    turn = [*messages, answer.choices[0].message, {"role": "user", "content": "and?"}]
    assert client.chat.completions.create(messages=turn, **settings).usage.prompt_tokens > answer.usage.prompt_tokens


def test_a_chat_writes_as_much_as_there_is_room_for(client):
    messages = [{"role": "user", "content": "so?"}]
    settings = {"model": "a", "messages": messages, "temperature": 0}
    usage = client.chat.completions.create(**settings).usage
    assert usage.total_tokens == 128
    assert client.chat.completions.create(max_completion_tokens=3, **settings).usage.completion_tokens == 3
    assert (
        client.chat.completions.create(max_tokens=3, max_completion_tokens=3, **settings).usage.completion_tokens == 3
    )
    with pytest.raises(openai.BadRequestError, match="max_tokens is another number"):
        client.chat.completions.create(max_tokens=4, max_completion_tokens=3, **settings)


def test_logprobs_of_a_chat(client, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = {"model": "a", "messages": [{"role": "user", "content": "so?"}], "seed": 2, "max_tokens": 12}
    asked = settings | {"logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**asked).choices[0]
    assert len(choice.logprobs.content) == 12
    data = b"".join(bytes(it.bytes) for it in choice.logprobs.content)
    assert data.decode(errors="replace").replace("\ufffd", "") == choice.message.content.replace("\ufffd", "")
    for it in choice.logprobs.content:
        assert [best.logprob for best in it.top_logprobs] == sorted((b.logprob for b in it.top_logprobs), reverse=True)
        assert len(it.top_logprobs) == 3
        assert it.logprob <= it.top_logprobs[0].logprob
    streamed = [
        it for piece in client.chat.completions.create(stream=True, **asked) for it in piece.choices[0].logprobs.content
    ]
    assert streamed == choice.logprobs.content
    plain = client.chat.completions.create(logprobs=True, **settings).choices[0].logprobs.content
    assert [it.top_logprobs for it in plain] == [[]] * 12
    assert tokenizer.decode(tokenizer(choice.message.content)["input_ids"]) == choice.message.content


def test_a_base_without_a_chat_template_says_so(gpt2, shelf):
    with api_server.serving(gpt2, shelf) as served:
        error = error_of(
            served.post("/v1/chat/completions", model="gpt2", messages=[{"role": "user", "content": "so?"}]), 400
        )
    assert error["message"] == "gpt2 has no chat template: ask for a completion instead."


@pytest.mark.parametrize("parts", [["so <|endoftext|>?"], ["so <|endof", "text|>?"]])
def test_a_message_is_text_and_holds_no_special_token(served, parts):
    """The template's own are read in the text that it makes, so one in a message would be taken for one of these."""
    content = [{"type": "text", "text": part} for part in parts]
    error = error_of(
        served.post("/v1/chat/completions", model="a", messages=[{"role": "user", "content": content}]), 400
    )
    assert error["param"] == "messages"
    assert error["message"] == "A message has <|endoftext|> in it, a special token of talker: leave that out."


# Refusals

CHAT = {"messages": [{"role": "user", "content": "so?"}]}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": None}, "prompt", "Field required"),
        ({"prompt": 5}, "prompt", "valid string"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": [[]]}, "prompt", "at least 1"),
        ({"prompt": ["x", 1]}, "prompt", "valid string"),
        ({"prompt": [320]}, None, "each from 0 to 319"),
        ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
        ({"prompt": [2**80]}, "prompt", "less than or equal"),
        ({"prompt": "a\0b"}, "prompt", "null bytes are no text"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1.5}, "n", "valid integer"),
        ({"n": 128, "prompt": ["x", "y", "z"]}, "n", "384 answers are asked for, and 320 fit in at once."),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": ["a", ""]}, "stop", "at least 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 127}, None, "The prompt has 3 tokens and max_tokens is 127, and talker looks back on 128 in all."),
        ({"max_tokens": 3000}, "max_tokens", "max_tokens is 3,000, and this server writes 2,048 at the most."),
        ({"prompt": "so " * 200}, None, "tokens, and talker looks back on 128: cut it."),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "it is for a stream"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options", "no such setting"),
        ({"echo": True}, "echo", "False"),
        ({"best_of": 2}, "best_of", "it must be n"),
        ({"suffix": "x"}, "suffix", "there is no such setting here"),
        ({"logit_bias": {"1": 1}}, "logit_bias", "there is no such setting here"),
        ({"presence_penalty": 0.5}, "presence_penalty", "less than or equal to 0"),
        ({"frequency_penalty": -0.5}, "frequency_penalty", "greater than or equal to 0"),
        ({"nonsense": 1}, "nonsense", "there is no such setting here"),
        ({"user": 5}, "user", "valid string"),
        ({"model": 5}, "model", "valid string"),
        (CHAT | {"tools": []}, "tools", "there is no such setting here"),
        (CHAT | {"response_format": {"type": "json_object"}}, "response_format", "there is no such setting here"),
        (CHAT | {"top_logprobs": 2}, "top_logprobs", "it needs logprobs"),
        (CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages", "Field required"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages", "no such setting"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages", "'text'"),
        ({"messages": [{"role": "user", "content": "so " * 200}]}, None, "looks back on 128: cut it."),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(served, body, param, message):
    chat = "messages" in body
    usual = {"model": "talker"} | ({} if chat else {"prompt": PROMPT})
    error = error_of(served.post("/v1/chat/completions" if chat else "/v1/completions", **usual | body), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]
    if "looks back" in message:
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "field",
    [
        "n",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "user",
        "max_tokens",
        "logprobs",
        "best_of",
        "echo",
        "presence_penalty",
        "frequency_penalty",
    ],
)
def test_null_is_as_left_out(served, field):
    assert served.post("/v1/completions", model="a", prompt=PROMPT, **{field: None}).status_code == 200


def test_neutral_values_are_taken(served, alone):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1, "echo": False, "n": 1}
    assert served.post("/v1/completions", model="a", **GREEDY, **neutral).json()["choices"][0]["text"] == alone["a"]


RAW = [
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
@pytest.mark.parametrize("data", RAW, ids=[str(number) for number in range(len(RAW))])
def test_what_is_no_request_is_refused_in_openais_shape(served, path, data):
    response = httpx.post(f"{served.url}{path}", content=data, headers={"Content-Type": "application/json"}, timeout=30)
    error_of(response, 400)
    assert len(response.content) < 5000


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_a_form_of_a_page_elsewhere_is_no_request(served, kind):
    """A browser sends these without asking first."""
    data = json.dumps({"model": "a", "prompt": "x"}).encode()
    error_of(
        httpx.post(f"{served.url}/v1/completions", content=data, headers={"Content-Type": kind} if kind else {}), 400
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
def test_no_route(served, method, path, status):
    response = httpx.request(method, f"{served.url}{path}")
    error_of(response, status)
    if status == 405:
        assert response.headers["allow"] == ("GET" if "models" in path or "health" in path else "POST")


def test_a_page_at_the_root_answers_for_nothing_of_the_api(own):
    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"page"})

    with own() as served:
        served.app.mount("/", page)
        assert served.get("/nothing").text == "page"
        error_of(served.get("/v1/nothing"), 404)
        error_of(served.post("/v1/models"), 405)
        assert served.get("/v1/models/a").json()["id"] == "a"


# Load, and ends before the end


def test_too_many_are_told_when_to_come_back(own):
    with own(max_batch=1, max_waiting=2) as served, served.braked() as let:
        client = served.client()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asked = []
            for count in (1, 2, 3):
                asked.append(pool.submit(client.completions.create, model="a", **GREEDY))
                served.wait(lambda count=count: served.worker.waiting + served.worker.running == count)
            with pytest.raises(openai.RateLimitError) as busy:
                client.completions.create(model="b", **GREEDY)
            assert busy.value.code == "rate_limit_exceeded"
            assert int(busy.value.response.headers["retry-after"]) >= 1
            assert "2 answers are waiting already: try again in" in str(busy.value)
            let(1000)
            assert len({it.result().choices[0].text for it in asked}) == 1
        # With retries, as the client does them by itself, it comes through.
        assert served.client(max_retries=2).completions.create(model="b", **GREEDY).choices


@contextlib.contextmanager
def held_up(served):
    """Within it nothing is found, until what this yields is called."""
    find, go = served.desk.find, threading.Event()
    served.desk.find = lambda model: go.wait(10) and find(model)
    try:
        yield go.set
    finally:
        go.set()
        served.desk.find = find


def test_those_whose_model_is_being_looked_for_have_places_in_the_queue(own, alone):
    with (
        own(max_batch=1, max_waiting=2) as served,
        held_up(served) as go,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        client = served.client()
        asked = [pool.submit(client.completions.create, model="a", n=n, **GREEDY) for n in (1, 2)]
        served.wait(lambda: served.worker._held == 3)
        error = error_of(served.post("/v1/completions", model="a", **GREEDY), 429)
        assert error["message"].startswith("3 answers are waiting already: try again in ")
        go()
        assert {choice.text for it in asked for choice in it.result().choices} == {alone["a"]}
    assert not served.worker.waiting


def test_the_time_in_which_a_model_is_looked_for_counts(own):
    with own(timeout=0.3) as served, held_up(served) as go:
        threading.Timer(0.6, go).start()
        assert error_of(served.post("/v1/completions", model="a", **GREEDY), 504)["code"] == "timeout"


@pytest.mark.parametrize("model", ["talker", "a"])
def test_a_request_waits_once_for_what_is_read(served, monkeypatch, model):
    times, aside = [], served.desk.aside
    monkeypatch.setattr(served.desk, "aside", lambda work: times.append(work) or aside(work))
    served.post("/v1/completions", model=model, **GREEDY)
    assert len(times) == 1


def test_a_flood_on_one_adapter_does_not_hold_up_another(own):
    with own(max_batch=2) as served, served.braked() as let:
        client, done = served.client(), []

        def ask(model):
            client.completions.create(model=model, **GREEDY)
            done.append(model)

        threads = [threading.Thread(target=ask, args=["a"]) for _ in range(20)]
        for thread in threads:
            thread.start()
        served.wait(lambda: served.worker.waiting + served.worker.running == 20)
        threads.append(threading.Thread(target=ask, args=["b"]))
        threads[-1].start()
        served.wait(lambda: served.worker.waiting + served.worker.running == 21)
        let(5000)
        for thread in threads:
            thread.join()
    assert done.index("b") < 6


def test_a_short_request_is_done_before_a_long_one_that_came_first(own):
    with own() as served, served.braked() as let:
        client, long = served.client(), "this film " * 25
        with concurrent.futures.ThreadPoolExecutor() as pool:
            first = pool.submit(client.completions.create, model="a", prompt=long, max_tokens=60, temperature=0)
            served.wait(lambda: served.worker.running == 1)
            second = pool.submit(client.completions.create, model="b", prompt="x", max_tokens=2, temperature=0)
            served.wait(lambda: served.worker.waiting == 1)
            let(10)
            assert second.result(10).usage.completion_tokens == 2
            assert not first.done()
            let(1000)
            assert first.result(10).usage.completion_tokens == 60


def test_a_client_that_leaves_frees_its_place(own, alone):
    request = {"model": "a", "prompt": PROMPT, "max_tokens": 100, "temperature": 0}
    with own(max_batch=1) as served, served.braked() as let:
        for stream in (True, False):
            body = json.dumps(request | {"stream": stream}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                connection.sendall(head.encode() + body)
                served.wait(lambda: served.worker.running == 1)
                let(3)
                received = b""
                while stream and b"data: {" not in received:
                    received += connection.recv(65536)
            served.wait(lambda: all(job.closed for job in served.worker._jobs()))
            let(2)
            served.wait(lambda: served.worker.idle)
        let(1000)
        assert served.client().completions.create(model="a", **GREEDY).choices[0].text == alone["a"]
        assert not served.generator.engine.rows


def test_one_that_waits_and_leaves_is_never_begun(own):
    with own(max_batch=1) as served, served.braked() as let, concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(served.client().completions.create, model="a", **GREEDY)
        served.wait(lambda: served.worker.running == 1)
        with pytest.raises(openai.APITimeoutError):
            served.client(timeout=0.3).completions.create(model="b", **GREEDY)
        served.wait(lambda: served.app.state.metrics.open == 1)
        let(3)
        served.wait(lambda: served.worker.waiting == 0)
        let(1000)
        first.result()


def test_what_takes_too_long_ends_with_504_or_an_event(own):
    with own(timeout=1) as served:
        client = served.client()
        with served.braked(pause=0.05):
            with pytest.raises(openai.InternalServerError) as late:
                client.completions.create(model="a", prompt=PROMPT, max_tokens=100, temperature=0)
            assert (late.value.status_code, late.value.code) == (504, "timeout")
            assert late.value.body["message"] == "It took longer than 1 seconds."
            stream = client.completions.create(model="a", prompt=PROMPT, max_tokens=100, temperature=0, stream=True)
            assert next(iter(stream)).choices
            with pytest.raises(openai.APIError, match=r"It took longer than 1 seconds"):
                list(stream)
        served.wait(lambda: served.worker.idle)
        assert client.completions.create(model="a", prompt=PROMPT, max_tokens=2).choices


def test_a_failure_that_nobody_foresaw_ends_its_batch_alone(own, alone, caplog):
    with own() as served:
        writer = served.generator.engine
        step = writer.step

        def fail():
            writer.step = step
            raise RuntimeError("a secret of this machine")

        caplog.set_level(logging.INFO, "lora_tuner.server")
        for place, stream in enumerate((False, True)):
            writer.step = fail
            response = served.post("/v1/completions", model="a", stream=stream, **GREEDY)
            error = events(response.text)[0]["error"] if stream else error_of(response, 500)
            assert (error["type"], error["code"]) == ("server_error", None)
            request = response.headers["x-request-id"]
            assert error["message"] == f"Something went wrong here; the log has it as request {request}."
            served.wait(lambda count=2 * place + 2: len(caplog.records) >= count)
            failure, line = caplog.records[2 * place :]
            assert failure.getMessage() == f"request {request}"
            assert str(failure.exc_info[1]) == "a secret of this machine"
            assert (line.msg["id"], line.msg["code"]) == (request, "RuntimeError")
            assert line.msg["status"] == (200 if stream else 500)
        assert served.post("/v1/completions", model="a", **GREEDY).json()["choices"][0]["text"] == alone["a"]


def test_one_that_leaves_in_the_middle_of_its_body_harms_nobody(served, alone):
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for rest in (
        "Content-Length: 500\r\n\r\n{",
        'Transfer-Encoding: chunked\r\n\r\n5\r\n{"mod\r\n',
        "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall((head + rest).encode())
    body = json.dumps({"model": "a", **GREEDY}).encode()
    halves = b"%x\r\n%s\r\n" % (10, body[:10]) + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body) - 10, body[10:])
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connection:
        connection.sendall((head + "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n").encode() + halves)
        answer = read(connection)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == alone["a"]
    served.wait(lambda: served.app.state.metrics.open == 0)


def test_a_slow_reader_gets_all_of_its_stream_and_holds_up_nobody(own, alone):
    """Until it reads no more fits between it and the server, which goes on writing."""
    small = (socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
    request = {"model": "a", "prompt": PROMPT, "temperature": 0, "max_tokens": 100, "n": 20, "logprobs": 5}
    with own() as served:
        served.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32_768)
        with (
            httpx.Client(transport=httpx.HTTPTransport(socket_options=[small]), timeout=20) as client,
            client.stream("POST", f"{served.url}/v1/completions", json=request | {"stream": True}) as response,
        ):
            (protocol,) = served.server.server_state.connections
            served.wait(lambda: protocol.flow.write_paused and served.worker.idle)
            assert served.post("/v1/completions", model="a", **GREEDY).json()["choices"][0]["text"] == alone["a"]
            assert protocol.flow.write_paused
            pieces = [event["choices"][0] for event in events(response.read().decode())]
        for choice in served.post("/v1/completions", **request).json()["choices"]:
            its = [piece for piece in pieces if piece["index"] == choice["index"]]
            assert "".join(piece["text"] for piece in its) == choice["text"]
            assert [token for piece in its for token in piece["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]


# Any request


@pytest.fixture(scope="module")
def description(served):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def any_requests(description, mode, examples):
    """Requests made from the description, right and wrong ones: each answer is one that it describes, and none is a 500."""
    for found in description.get_all_operations():
        operation = found.ok()
        if not (mode.is_positive or list(operation.body)):
            continue  # without a body there is nothing to get wrong

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
def test_any_request_gets_an_answer_that_is_described(description, mode):
    any_requests(description, mode, 12)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_very_many_requests_get_answers_that_are_described(description, mode):
    any_requests(description, mode, 1000)
