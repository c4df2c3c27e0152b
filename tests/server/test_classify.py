"""POST /v1/classify: labels with probabilities, equal to those of completions' log-probabilities."""

import math

import httpx
import pytest

from .. import adapter_files, api_server
from ..api_server import KEY, error_of
from .test_metrics import samples

COUNTED = ("lora_tuner_tokens_total", "prompt", "told")
TEXTS = ["the actor never works", "this film drags. her voice shines"]


@pytest.fixture(scope="module")
def library(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    info = adapter_files.labels(names=["works", "drags"], temperature=2.0, fitted_rows=20)
    api_server.write_adapter(folder, "told", base, 0, labels=info)
    two = adapter_files.labels(template="{title}: {text}\n\nLabel: {label}")
    api_server.write_adapter(folder, "two", base, 1, labels=two)
    api_server.write_adapter(folder, "bad", base, 1, labels=adapter_files.labels(template="{label}"))
    api_server.write_adapter(folder, "a", base, 2)
    return folder


@pytest.fixture(scope="module")
def served(base, library):
    with api_server.serving(base, library) as served:
        yield served


def test_response_is_that_of_vllm(served):
    body = served.post("/v1/classify", model="told", input=TEXTS, user="me", priority=0).json()
    assert body["id"].startswith("classify-")
    assert (body["object"], body["model"], body["labels"]) == (
        "list",
        "told",
        ["works", "drags"],
    )
    assert [item["index"] for item in body["data"]] == [0, 1]
    for item in body["data"]:
        assert item["num_classes"] == len(item["probs"]) == 2
        assert sum(item["probs"]) == pytest.approx(1)
        assert item["label"] == body["labels"][item["probs"].index(max(item["probs"]))]
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 20
    single = served.post("/v1/classify", model="told", input=TEXTS[1]).json()
    assert single["data"][0]["probs"] == pytest.approx(body["data"][1]["probs"], abs=1e-4)


def test_probabilities_equal_completion_logprobs(served):
    (item,) = served.post("/v1/classify", model="told", input=TEXTS[0]).json()["data"]
    scores = []
    for label in ("works", "drags"):
        prompt = f"{TEXTS[0]}\n\nLabel: {label}"
        request = {
            "model": "told",
            "prompt": prompt,
            "echo": True,
            "logprobs": 0,
            "max_tokens": 0,
        }
        logprobs = served.post("/v1/completions", **request).json()["choices"][0]["logprobs"]
        start = prompt.rindex(f" {label}")
        places = zip(logprobs["text_offset"], logprobs["token_logprobs"], strict=True)
        told = sum(value for offset, value in places if offset >= start)
        end = {
            "model": "told",
            "prompt": prompt,
            "max_tokens": 1,
            "logprobs": 0,
            "logit_bias": {"0": 100},
        }
        end |= {"ignore_eos": True, "temperature": 0}
        (of_end,) = served.post("/v1/completions", **end).json()["choices"][0]["logprobs"]["token_logprobs"]
        scores.append(told + of_end)
    shares = [math.exp(score / 2.0) for score in scores]
    assert item["probs"] == pytest.approx([share / sum(shares) for share in shares], abs=1e-4)


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (
            {"model": "a", "input": "so"},
            400,
            "model",
            "a tells no labels: only an adapter that was trained with",
        ),
        ({"model": "talker", "input": "so"}, 400, "model", "talker tells no labels"),
        ({"model": "none", "input": "so"}, 404, "model", "There is no model 'none'"),
        ({"model": "told", "input": ["so", " "]}, 400, "input", "a text is empty"),
        ({"model": "told", "input": []}, 400, "input", "at least 1 item"),
        ({"model": "told"}, 400, "input", "Field required"),
        ({"model": "told", "input": [1]}, 400, "input[0]", "valid string"),
        (
            {"model": "told", "input": "so", "softmax": False},
            400,
            "softmax",
            "not supported: leave it out, or send true",
        ),
        ({"model": "told", "input": "so", "what": 1}, 400, "what", "unknown field"),
        ({"model": "two", "input": "so"}, 400, "input", "several columns (title, text)"),
        (
            {"model": "bad", "input": "so"},
            404,
            "model",
            "its template does not end with its label behind a text",
        ),
        (
            {"model": "told", "input": ["so"] * 400},
            400,
            "input",
            "400 texts, the limit of this server is 320.",
        ),
    ],
)
def test_unfit_request_is_named(served, body, status, param, message):
    error = error_of(served.post("/v1/classify", **body), status)
    assert error["param"] == param
    assert message in error["message"]


def test_labels_are_told_beside_generation(served):
    with served.held_steps(0.01):
        client = served.client()
        stream = client.completions.create(
            model="a",
            prompt="so",
            max_tokens=60,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        assert served.post("/v1/classify", model="told", input=TEXTS).status_code == 200
        assert len([*stream]) > 1


def test_texts_are_counted_and_listed(served):
    before = samples(served).get(COUNTED, 0)
    usage = served.post("/v1/classify", model="told", input=TEXTS).json()["usage"]
    after = samples(served)[COUNTED]
    assert after - before == usage["prompt_tokens"]
    assert served.get("/v1/models/told").json()["lora_tuner"]["labels"] == [
        "works",
        "drags",
    ]
    assert served.get("/v1/models/a").json()["lora_tuner"]["labels"] is None


def test_limits_and_key_hold(base, library):
    with api_server.serving(base, library, api_key=KEY, timeout=1e-6) as served:
        error_of(served.post("/v1/classify", model="told", input="so"), 401)
        headers = {"Authorization": f"Bearer {KEY}"}
        late = httpx.post(
            f"{served.url}/v1/classify",
            json={"model": "told", "input": "so"},
            headers=headers,
        )
        assert error_of(late, 504)["code"] == "timeout"
