"""Routes: completions, whole and streamed."""

import concurrent.futures
import itertools
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.server import routes
from lora_tuner.server.responses import token_text

from ..api_server import (
    GREEDY,
    PROMPT,
    events,
    greedy,
)

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({"presence_penalty": 1.5}, {}),
        ({"frequency_penalty": 0.7}, {}),
        ({"logit_bias": {"42": 100, "43": 99.5}}, {"logit_bias": {42: 100.0, 43: 99.5}}),
        ({"min_p": 0.3, "temperature": 1.0, "seed": 3}, {}),
        ({"stop_token_ids": [42], "logit_bias": {"42": 3}}, {"logit_bias": {42: 3.0}}),
        ({"min_tokens": 10, "stop": ["e", "a"]}, {"min_new_tokens": 10}),
        ({"ignore_eos": True, "logit_bias": {"0": 100}}, {"logit_bias": {0: 100.0}}),
        ({"include_stop_str_in_output": True, "stop": ["e", "a"]}, {}),
    ],
    ids=str,
)
def test_sampling_field_equals_generate(served, base, adapters_dir, settings, sampling):
    body = {"model": "a", **GREEDY, **settings}
    response = served.post("/v1/completions", **body).json()
    plain = served.post("/v1/completions", model="a", **GREEDY).json()
    settings = {"temperature": 0.0, "repetition_penalty": 1.0, "top_p": 1.0, "top_k": 0} | settings | sampling
    settings.pop("min_tokens", None)
    generator = Generator(adapters_dir / "a", options=ModelOptions(base=str(base), device="cpu"))
    expected = generator.generate(PROMPT, SamplingParams(max_new_tokens=20, **settings))
    (choice,) = response["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
    assert response["usage"]["completion_tokens"] == expected.tokens
    assert choice != plain["choices"][0]
    chunks = events(served.post("/v1/completions", stream=True, **body).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text


def test_usage_in_each_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = client.completions.create(model="a", stream=True, stream_options=options, **GREEDY)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert last.usage.completion_tokens == counts[-1] == 20
    assert all(chunk.usage.prompt_tokens == last.usage.prompt_tokens for chunk in chunks)


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


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_prompt_first(served, base, expected_texts, stream):
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(PROMPT)["input_ids"]
    for prompt in (PROMPT, ids):
        body = GREEDY | {"prompt": [prompt, prompt], "n": 2, "echo": True, "stream": stream}
        texts = choice_texts(served.post("/v1/completions", model="a", **body), 4)
        assert texts == [PROMPT + expected_texts["a"]] * 4
        alone = GREEDY | {"prompt": prompt, "max_tokens": 0, "echo": True, "stream": stream}
        assert choice_texts(served.post("/v1/completions", model="a", **alone), 1) == [PROMPT]


def choice_texts(response, count):
    """Return the text of each choice of a response or a stream."""
    assert response.status_code == 200, response.text
    texts = [""] * count
    for part in events(response.text) if "data:" in response.text else [response.json()]:
        for choice in part["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


@pytest.mark.parametrize("prompt", [PROMPT, "☕ naïve so?", "this film never drags. " * 4])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_echoed_logprobs_equal_transformers(client, base, prompt, max_tokens):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    body = {"model": "talker", "prompt": prompt, "max_tokens": max_tokens, "logprobs": 2, "echo": True, "seed": 5}
    response = client.completions.create(**body)
    (choice,) = response.choices
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    logprobs = choice.logprobs
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    scored = [float(expected[index, token]) for index, token in enumerate(ids[1:])]
    assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(scored, abs=1e-4)
    for index, top in enumerate(logprobs.top_logprobs[1 : len(ids)]):
        best = expected[index].topk(2).values.tolist()
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(best, abs=1e-4)
    assert len(logprobs.tokens) == len(ids) + response.usage.completion_tokens
    assert response.usage.completion_tokens == max_tokens
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert "bytes:" in token or choice.text[offset:].startswith(token) or "\ufffd" in choice.text[offset:]
    plain = client.completions.create(**body | {"echo": False, "max_tokens": 5})
    if max_tokens:
        assert choice.text == prompt + plain.choices[0].text
        assert logprobs.token_logprobs[len(ids) :] == pytest.approx(plain.choices[0].logprobs.token_logprobs)
        chunks = [chunk.choices[0] for chunk in client.completions.create(stream=True, **body)]
        assert [offset for chunk in chunks for offset in chunk.logprobs.text_offset] == logprobs.text_offset


def test_echoed_prompts_share_prefill(client, monkeypatch):
    """Short and long ones, in chunks, beside a sequence without echo."""
    monkeypatch.setattr("lora_tuner.inference.batch.PREFILL_CHUNK", 8)
    prompts = ["so", "this film never drags. " * 4, PROMPT]
    body = {"model": "a", "max_tokens": 0, "logprobs": 0, "echo": True}
    together = client.completions.create(prompt=prompts, **body).choices
    for prompt, choice in zip(prompts, together, strict=True):
        alone = client.completions.create(prompt=prompt, **body).choices[0]
        assert (choice.text, choice.logprobs.tokens) == (prompt, alone.logprobs.tokens)
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(alone.logprobs.token_logprobs[1:], abs=1e-4)


def test_best_of_has_highest_mean_logprob(client):
    body = {"model": "a", "prompt": [PROMPT, "so"], "max_tokens": 8, "seed": 3, "logprobs": 0}
    all_outputs = client.completions.create(n=6, **body)
    best = client.completions.create(n=2, best_of=6, **body)
    assert best.usage == all_outputs.usage

    def mean(choice):
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    for prompt in (0, 1):
        candidates = sorted(all_outputs.choices[6 * prompt : 6 * prompt + 6], key=mean, reverse=True)
        chosen = best.choices[2 * prompt : 2 * prompt + 2]
        assert [choice.text for choice in chosen] == [choice.text for choice in candidates[:2]]
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    without = client.completions.create(n=2, best_of=6, **body | {"logprobs": None})
    assert [choice.text for choice in without.choices] == [choice.text for choice in best.choices]
    assert without.choices[0].logprobs is None


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
