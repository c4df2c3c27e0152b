"""Model "auto": the server, or `generate`, chooses the adapter that fits the prompt."""

import json
import random
import shutil

import pytest
from typer.testing import CliRunner

from lora_tuner import Library, TrainConfig, train
from lora_tuner.adapters.adapter import MANIFEST_FILE
from lora_tuner.adapters.manifest import why_never_chosen
from lora_tuner.cli.app import app

from .. import api_server
from ..api_server import TEMPLATE, error_of, events, write_adapter
from .test_metrics import samples

PROMPTS = {
    "sums": "17 + 25 = 42; 9 + 31 = 40; 88 + 2 =",
    "shouts": "THE ACTOR WORKS! THE CAMERA",
    "talker": "\u0431\u0435\u0440\u0435\u0433 \u0438 \u0440\u0435\u043a\u0430",  # of neither adapter
}


def write_texts(folder):
    draw = random.Random(0)
    words = ["THE ACTOR", "WORKS", "THE CAMERA", "DRAGS", "HER VOICE", "FAILS", "NEVER"]
    texts = {"sums": [], "shouts": []}
    for _ in range(60):
        pairs = [(draw.randrange(90), draw.randrange(90)) for _ in range(8)]
        texts["sums"].append("; ".join(f"{one} + {two} = {one + two}" for one, two in pairs))
        texts["shouts"].append("! ".join(" ".join(draw.choices(words, k=3)) for _ in range(6)))
    for name, rows in texts.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def library(gpt2, tmp_path_factory):
    """Two adapters trained on different text, and one that nothing is known of, on a base with a chat template."""
    folder = tmp_path_factory.mktemp("auto")
    base = folder / "talker"
    shutil.copytree(gpt2, base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    write_texts(folder)
    quick = {
        "max_steps": 25,
        "max_length": 64,
        "batch_size": 4,
        "rank": 4,
        "learning_rate": 2e-2,
        "eval_rows": 10,
        "eval_every": 25,  # fewer measurements and samples
        "sample_prompt": ["a"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_TUNER_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        for name in ("sums", "shouts"):
            train(TrainConfig(dataset=f"{name}.json", base=str(base), device="cpu", **quick), notify=None)
    write_adapter(folder / "adapters", "unknown", base, 1)
    return folder / "adapters"


@pytest.fixture(scope="module")
def served(library):
    with api_server.serving(library.parent / "talker", library) as served:
        yield served


@pytest.mark.parametrize("expected", PROMPTS)
def test_prompt_goes_to_fitting_model(served, expected):
    request = {"model": "auto", "prompt": PROMPTS[expected], "temperature": 0, "max_tokens": 4}
    response = served.post("/v1/completions", **request)
    body = response.json()
    assert response.headers["x-adapter"] == body["model"] == expected
    routing = body["routing"]
    assert routing["adapter"] == (None if expected == "talker" else expected)
    assert {score["adapter"] for score in routing["scores"]} == {"sums", "shouts"}
    assert routing["margin"] > 0
    assert routing["kept"] is False
    named = served.post("/v1/completions", **request | {"model": expected})
    assert named.json()["choices"] == body["choices"]
    assert "routing" not in named.json()
    assert "x-adapter" not in named.headers
    ids = served.service.base.tokenizer(PROMPTS[expected])["input_ids"]
    assert served.post("/v1/completions", **request | {"prompt": ids}).json()["routing"] == routing


def test_stream_has_choice_at_once(served):
    request = {"model": "auto", "prompt": PROMPTS["sums"], "temperature": 0, "max_tokens": 4, "stream": True}
    response = served.post("/v1/completions", **request)
    assert response.headers["x-adapter"] == "sums"
    first, *others = events(response.text)
    assert first["routing"]["adapter"] == first["model"] == "sums"
    assert not any("routing" in chunk for chunk in others)


def ask(served, *messages, model="auto"):
    roles = ["user", "assistant"] * len(messages)
    conversation = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    return served.post("/v1/chat/completions", model=model, messages=conversation, max_tokens=2).json()


def test_conversation_keeps_its_adapter(served):
    assert ask(served, PROMPTS["sums"])["model"] == "sums"
    later = ask(served, PROMPTS["sums"], "42", PROMPTS["shouts"])
    assert (later["model"], later["routing"]["kept"]) == ("sums", True)
    assert ask(served, PROMPTS["sums"], "42", "so?", model="shouts")["model"] == "shouts"
    assert ask(served, PROMPTS["sums"], "42", "so?")["model"] == "sums"
    unknown = ask(served, PROMPTS["shouts"], "", PROMPTS["shouts"])
    assert (unknown["model"], unknown["routing"]["kept"]) == ("shouts", False)


def test_models_say_what_auto_chooses(served):
    models = {model["id"]: model for model in served.get("/v1/models").json()["data"]}
    assert list(models) == ["talker", "shouts", "sums", "unknown", "auto"]
    assert models["sums"]["lora_tuner"]["never_chosen"] is None
    assert "--probes" in models["unknown"]["lora_tuner"]["never_chosen"]
    assert served.get("/v1/models/auto").json() == models["auto"]


def test_several_prompts_are_refused(served):
    error = error_of(served.post("/v1/completions", model="auto", prompt=["a", "b"]), 400)
    assert (error["param"], "one prompt" in error["message"]) == ("prompt", True)


def test_choices_are_counted(served):
    before = samples(served).get(("lora_tuner_auto_chosen_total", "sums"), 0)
    served.post("/v1/completions", model="auto", prompt=PROMPTS["sums"], max_tokens=1)
    assert samples(served)["lora_tuner_auto_chosen_total", "sums"] == before + 1


def test_library_without_scores_is_refused(library, tmp_path):
    shutil.copytree(library / "unknown", tmp_path / "adapters" / "unknown")
    base = library.parent / "talker"
    with api_server.serving(base, tmp_path / "adapters") as served:
        error = error_of(served.post("/v1/completions", model="auto", prompt="x"), 400)
        assert (error["param"], "--probes" in error["message"]) == ("model", True)
        assert served.get("/v1/models/auto").status_code == 404
        write_adapter(tmp_path / "adapters", "auto", base, 1)
        broken = served.get("/v1/models/auto").json()["broken"]
        assert "rename" in broken


def test_older_manifest_has_no_scores(library, tmp_path):
    folder = shutil.copytree(library / "sums", tmp_path / "adapters" / "sums")
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert manifest["routing"]["gain"][0] > manifest["routing"].pop("general")["gain"][0]
    for older in (manifest, manifest | {"routing": None}):
        (folder / MANIFEST_FILE).write_text(json.dumps(older))
        assert "--probes" in why_never_chosen(Library(tmp_path / "adapters").get("sums").manifest)


@pytest.mark.parametrize("expected", PROMPTS)
def test_generate_chooses_for_prompt(library, expected):
    options = ["--adapter", "auto", "--adapters-dir", str(library), "--greedy", "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, ["generate", PROMPTS[expected], *options, "--json"])
    assert result.exit_code == 0, result.output
    (output,) = json.loads(result.stdout)
    assert output["adapter"] == output["routing"]["adapter"] == (None if expected == "talker" else expected)
    assert "auto never chooses unknown" in result.stderr
    assert f"auto: {'the base' if expected == 'talker' else expected}" in result.stderr
