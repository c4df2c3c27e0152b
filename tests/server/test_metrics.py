import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lora_tuner.server.metrics import JsonLines

from .. import api_server
from ..api_server import PROMPT, write_adapter

SECRET = "the actor never told"


@pytest.fixture
def shelf(gpt2, tmp_path):
    write_adapter(tmp_path / "shelf", "a", gpt2, 1)
    return tmp_path / "shelf"


@pytest.fixture
def lines(caplog):
    """What the server has logged, as it would be written."""
    caplog.set_level(logging.INFO, "lora_tuner.server")
    return lambda: [json.loads(JsonLines().format(it)) for it in caplog.records if it.name == "lora_tuner.server"]


def samples(served):
    response = served.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (it.name, *sorted(it.labels.values())): it.value
        for family in text_string_to_metric_families(response.text)
        for it in family.samples
    }


def test_the_figures_add_up(gpt2, shelf):
    with api_server.serving(gpt2, shelf) as served:
        before = len(served.desk.encode_prompt(PROMPT))
        for model, count in (("a", 2), ("gpt2", 1)):
            for _ in range(count):
                served.post("/v1/completions", model=model, prompt=PROMPT, n=2, temperature=0, max_tokens=5)
        served.post("/v1/completions", model="a", prompt=PROMPT, temperature=0, max_tokens=5, stream=True)
        for name in ("nobody", "x" * 200, 'b\n"}'):
            assert served.post("/v1/completions", model=name, prompt="x").status_code == 404
        served.post("/v1/completions", model="a", prompt=5)
        served.get("/v1/nothing")
        found = samples(served)
    assert found["lora_tuner_requests_total", "/v1/completions", "200", "a"] == 3
    assert found["lora_tuner_requests_total", "/v1/completions", "200", "gpt2"] == 1
    assert found["lora_tuner_requests_total", "", "/v1/completions", "404"] == 3
    assert found["lora_tuner_requests_total", "", "/v1/completions", "400"] == 1
    assert found["lora_tuner_requests_total", "", "404", "other"] == 1
    assert found["lora_tuner_tokens_total", "a", "prompt"] == 3 * before
    assert found["lora_tuner_tokens_total", "a", "completion"] == 25
    assert found["lora_tuner_tokens_total", "completion", "gpt2"] == 10
    assert found["lora_tuner_request_seconds_count", "a"] == found["lora_tuner_first_token_seconds_count", "a"] == 3
    assert 0 < found["lora_tuner_first_token_seconds_sum", "a"] <= found["lora_tuner_request_seconds_sum", "a"]
    assert found["lora_tuner_answers_waiting",] == found["lora_tuner_answers_running",] == 0
    assert found["lora_tuner_adapters_resident",] == 1
    assert not any("nobody" in label or "xxx" in label for labels in found for label in labels)


def test_the_queue_is_seen(gpt2, shelf):
    with api_server.serving(gpt2, shelf, max_batch=1) as served, served.braked() as let:
        client = served.client()
        streams = [client.completions.create(model="a", prompt=PROMPT, max_tokens=5, n=3, stream=True)]
        served.wait(lambda: served.worker.running == 1)
        found = samples(served)
        assert (found["lora_tuner_answers_waiting",], found["lora_tuner_answers_running",]) == (2, 1)
        let(100)
        assert [len(list(it)) > 0 for it in streams] == [True]


def test_a_line_for_each_request_without_what_was_asked(gpt2, shelf, lines):
    with api_server.serving(gpt2, shelf) as served:
        asked = {"model": "a", "prompt": SECRET, "temperature": 0, "max_tokens": 5}
        answer = served.post("/v1/completions", user="u1", **asked)
        served.post("/v1/completions", stream=True, **asked)
        served.post("/v1/completions", **asked | {"n": 0})
        served.post("/v1/completions", **asked | {"model": "nobody"})
        tokens = len(served.desk.encode_prompt(SECRET))
    good, streamed, bad, unknown = lines()
    assert good["id"] == answer.headers["x-request-id"] == answer.json()["id"].removeprefix("cmpl-")
    expected = {"method": "POST", "path": "/v1/completions", "status": 200, "model": "a", "stream": False, "user": "u1"}
    expected |= {"prompt_tokens": tokens, "completion_tokens": 5, "answers": 1, "complete": True, "client": "127.0.0.1"}
    assert expected.items() <= good.items()
    assert 0 < good["first_token_seconds"] <= good["seconds"]
    assert (streamed["stream"], streamed["complete"]) == (True, True)
    assert (bad["status"], bad["model"]) == (400, None)
    assert (unknown["status"], unknown["code"], unknown["model"]) == (404, "model_not_found", None)
    said = json.dumps(lines())
    assert SECRET not in said
    assert answer.json()["choices"][0]["text"] not in said


def test_prompts_and_answers_where_that_was_asked_for(gpt2, shelf, lines):
    with api_server.serving(gpt2, shelf, log_prompts=True) as served:
        answer = served.post("/v1/completions", model="a", prompt=SECRET, temperature=0, max_tokens=5).json()
    (line,) = lines()
    assert (line["asked"], line["answered"]) == (SECRET, [answer["choices"][0]["text"]])


def test_what_clients_send_begins_no_line():
    record = logging.LogRecord("x", logging.INFO, "", 0, {"path": "/\n{\x1b[2J\u2028"}, (), None)
    text = JsonLines().format(record)
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text)["path"] == "/\n{\x1b[2J\u2028"


def test_one_that_left_is_told_from_one_that_was_answered(gpt2, shelf, lines):
    with api_server.serving(gpt2, shelf) as served, served.braked() as let:
        let(2)
        stream = served.client().completions.create(model="a", stream=True, prompt=PROMPT, temperature=0, max_tokens=50)
        next(iter(stream))
        stream.close()
        served.wait(lambda: served.app.state.metrics.open == 0)
    (line,) = lines()
    assert (line["status"], line["complete"]) == (200, False)
