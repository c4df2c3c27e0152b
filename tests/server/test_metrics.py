import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lora_tuner.server.metrics import JsonLines, RepeatFilter

from .. import api_server
from ..api_server import PROMPT, write_adapter

SECRET = "the actor never told"


@pytest.fixture(scope="module")
def adapters_dir(gpt2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder, "a", gpt2, 1)
    return folder


@pytest.fixture(scope="module")
def served(gpt2, adapters_dir):
    """Shared by tests that do not read the counters."""
    with api_server.serving(gpt2, adapters_dir) as served:
        yield served


@pytest.fixture
def lines(caplog):
    """Return the server's log lines."""
    caplog.set_level(logging.INFO, "lora_tuner.server")
    return lambda: [
        json.loads(JsonLines().format(record)) for record in caplog.records if record.name == "lora_tuner.server"
    ]


def samples(served):
    response = served.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_count_requests_and_tokens(gpt2, adapters_dir):
    with api_server.serving(gpt2, adapters_dir) as served:
        prompt_tokens = len(served.service.prompts.encode(PROMPT, served.service.base.tokenizer))
        for model, count in (("a", 2), ("gpt2", 1)):
            for _ in range(count):
                served.post("/v1/completions", model=model, prompt=PROMPT, n=2, temperature=0, max_tokens=5)
        served.post("/v1/completions", model="a", prompt=PROMPT, temperature=0, max_tokens=5, stream=True)
        for name in ("nobody", "x" * 200, 'b\n"}'):
            assert served.post("/v1/completions", model=name, prompt="x").status_code == 404
        served.post("/v1/completions", model="a", prompt=5)
        served.get("/v1/nothing")
        metrics = samples(served)
    assert metrics["lora_tuner_requests_total", "/v1/completions", "200", "a"] == 3
    assert metrics["lora_tuner_requests_total", "/v1/completions", "200", "gpt2"] == 1
    assert metrics["lora_tuner_requests_total", "", "/v1/completions", "404"] == 3
    assert metrics["lora_tuner_requests_total", "", "/v1/completions", "400"] == 1
    assert metrics["lora_tuner_requests_total", "", "404", "other"] == 1
    assert metrics["lora_tuner_tokens_total", "a", "prompt"] == 3 * prompt_tokens
    assert metrics["lora_tuner_tokens_total", "a", "completion"] == 25
    assert metrics["lora_tuner_tokens_total", "completion", "gpt2"] == 10
    assert (
        metrics["lora_tuner_request_seconds_count", "a"]
        == metrics["lora_tuner_first_token_seconds_count", "a"]
        == 3
    )
    assert (
        0 < metrics["lora_tuner_first_token_seconds_sum", "a"] <= metrics["lora_tuner_request_seconds_sum", "a"]
    )
    assert metrics["lora_tuner_answers_waiting",] == metrics["lora_tuner_answers_running",] == 0
    assert metrics["lora_tuner_adapters_resident",] == 1
    assert not any("nobody" in label or "xxx" in label for labels in metrics for label in labels)


def test_cached_prompt_tokens_are_counted(gpt2, adapters_dir, lines):
    """Of prompts that begin like earlier ones of the same model; the answers are those without."""
    opening = "the actor never works. " * 6
    with api_server.serving(gpt2, adapters_dir) as served:
        settings = {"temperature": 0, "max_tokens": 5}
        answers = [
            served.post("/v1/completions", model=model, prompt=opening + end, **settings).json()
            for model, end in (("a", "so"), ("a", "her voice"), ("gpt2", "so"), ("a", "so"))
        ]
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        streamed = served.post("/v1/completions", model="a", prompt=opening + "so", **settings, **stream)
        metrics = samples(served)
        served.wait(lambda: len(lines()) == 6)
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[0] == cached[2] == 0
    assert 16 <= cached[1] <= cached[3]
    assert answers[3]["choices"] == answers[0]["choices"]
    expected = api_server.greedy(gpt2, adapters_dir, "a", opening + "her voice", 5).text
    assert answers[1]["choices"][0]["text"] == expected
    assert f'"cached_tokens":{cached[3]}' in streamed.text
    assert [line["cached_tokens"] for line in lines()[:5]] == [*cached, cached[3]]
    assert metrics["lora_tuner_cached_prompt_tokens_total", "a"] == sum(cached) + cached[3]
    assert metrics["lora_tuner_cached_prompt_tokens_total", "gpt2"] == 0


def test_metrics_show_queue_length(gpt2, adapters_dir):
    with (
        api_server.serving(gpt2, adapters_dir, max_batch=1) as served,
        served.held_steps() as release,
    ):
        client = served.client()
        stream = client.completions.create(model="a", prompt=PROMPT, max_tokens=5, n=3, stream=True)
        served.wait(lambda: served.scheduler.running == 1)
        metrics = samples(served)
        assert (metrics["lora_tuner_answers_waiting",], metrics["lora_tuner_answers_running",]) == (
            2,
            1,
        )
        release(100)
        assert list(stream)


def test_log_line_holds_no_prompt(served, lines):
    body = {"model": "a", "prompt": SECRET, "temperature": 0, "max_tokens": 5}
    response = served.post("/v1/completions", user="u1", **body)
    served.post("/v1/completions", stream=True, **body)
    served.post("/v1/completions", **body | {"n": 0})
    served.post("/v1/completions", **body | {"model": "nobody"})
    tokens = len(served.service.prompts.encode(SECRET, served.service.base.tokenizer))
    served.wait(lambda: len(lines()) == 4)
    good, streamed, bad, unknown = lines()
    assert good["id"] == response.headers["x-request-id"] == response.json()["id"].removeprefix("cmpl-")
    expected = {
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "model": "a",
        "stream": False,
        "user": "u1",
    }
    expected |= {
        "prompt_tokens": tokens,
        "completion_tokens": 5,
        "answers": 1,
        "complete": True,
        "client": "127.0.0.1",
    }
    assert expected.items() <= good.items()
    assert 0 < good["first_token_seconds"] <= good["seconds"]
    assert (streamed["stream"], streamed["complete"]) == (True, True)
    assert (bad["status"], bad["model"]) == (400, None)
    assert (unknown["status"], unknown["code"], unknown["model"]) == (404, "model_not_found", None)
    logged = json.dumps(lines())
    assert SECRET not in logged
    assert response.json()["choices"][0]["text"] not in logged


def test_log_prompts_adds_prompts_and_outputs(gpt2, adapters_dir, lines):
    with api_server.serving(gpt2, adapters_dir, log_prompts=True) as served:
        body = {"model": "a", "prompt": SECRET, "temperature": 0, "max_tokens": 5}
        choices = served.post("/v1/completions", **body).json()["choices"]
    (line,) = lines()
    assert (line["prompts"], line["outputs"]) == (SECRET, [choices[0]["text"]])


def test_log_line_escapes_client_input():
    record = logging.LogRecord("x", logging.INFO, "", 0, {"path": "/\n{\x1b[2J\u2028"}, (), None)
    text = JsonLines().format(record)
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text)["path"] == "/\n{\x1b[2J\u2028"


def test_log_marks_disconnected_client(served, lines):
    with served.held_steps() as release:
        release(2)
        stream = served.client().completions.create(
            model="a", stream=True, prompt=PROMPT, temperature=0, max_tokens=50
        )
        next(iter(stream))
        stream.close()
        served.wait(lambda: len(lines()) == 1)
    (line,) = lines()
    assert (line["status"], line["complete"]) == (200, False)


def test_repeated_error_is_logged_once_a_minute():
    """The kind does not depend on what a client sent."""
    passed, repeat_filter = [], RepeatFilter()

    def log(time, level, line, error=None, text=""):
        info = None if error is None else (type(error), error, error.__traceback__)
        record = logging.LogRecord("x", level, "module.py", line, text, (), info)
        record.created = time
        if repeat_filter.filter(record):
            passed.append((time, json.loads(JsonLines().format(record)).get("repeated", 0)))

    def error(divisor):
        try:
            return 1 / divisor
        except Exception as error:
            return error

    for time in range(59):
        log(time, logging.WARNING, 1, text=f"sent {time}")
        log(time, logging.ERROR, 2, error(0))
        log(time, logging.ERROR, 2, error("other"))
    assert passed == [(0, 0)] * 3
    log(60, logging.WARNING, 1)
    assert passed[3:] == [(60, 58)]
    for _ in range(2):
        log(61, logging.INFO, 3)  # requests
    assert passed[4:] == [(61, 0)] * 2
