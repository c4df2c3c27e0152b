import json
import math
import warnings

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from lora_tuner import report, store

from . import stored

HISTORY = [
    {"step": 1, "loss": 4.0, "learning_rate": 1e-3},
    {"step": 2, "loss": 3.5, "learning_rate": 5e-4},
    {"step": 2, "eval_loss": 3.625},
    {"step": 3, "loss": 3.25, "learning_rate": 0.0},
]


def based_on(**changes):
    """A manifest whose base differs from distilgpt2 on the Hub."""
    base = stored.manifest().base.model_copy(update=changes)
    return stored.manifest(base=base.model_dump())


LOCAL = {"revision": None, "weights": "a local folder"}


@pytest.fixture
def card(tmp_path):
    """The model card of an adapter with this manifest."""

    def write(manifest=None, **config):
        adapter = store.read(stored.write(tmp_path / "imdb", config, facts=manifest or stored.manifest()))
        return report.model_card(adapter, "imdb")

    return write


def table(card):
    """The rows of the card's table."""
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    return dict(line.removeprefix("| ").removesuffix(" |").split(" | ", 1) for line in lines[2:])


# Metrics


def test_metrics_are_one_json_object_a_line(tmp_path):
    report.write_metrics(HISTORY, tmp_path / "metrics.jsonl")
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith('{"step": 1, "loss": 4.0, "learning_rate": 0.001}\n')
    assert text.endswith("}\n")
    assert [json.loads(line) for line in text.splitlines()] == HISTORY


def test_no_metrics_are_an_empty_file(tmp_path):
    report.write_metrics([], tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


# The picture


def plot(tmp_path, history=HISTORY, manifest=None):
    path = tmp_path / "loss.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.plot_loss(history, manifest or stored.manifest(), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return np.asarray(image.convert("RGB")).astype(int)


def share(pixels, colour):
    """How much of the picture is about this colour."""
    return (np.abs(pixels - colour).max(axis=-1) < 40).mean()


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def test_the_picture_is_a_png_with_both_curves(tmp_path):
    pixels = plot(tmp_path)
    assert pixels.shape == (480, 840, 3)
    assert share(pixels, BLUE) > 0.0003
    assert share(pixels, ORANGE) > 0.0003


def test_a_run_without_a_held_out_loss_has_a_picture(tmp_path):
    pixels = plot(tmp_path, [HISTORY[0], HISTORY[1]], stored.manifest(result=None))
    assert share(pixels, BLUE) > 0.0003
    assert share(pixels, ORANGE) == 0


def test_a_run_without_steps_has_a_picture(tmp_path):
    pixels = plot(tmp_path, [], stored.manifest(result=None))
    assert share(pixels, BLUE) == share(pixels, ORANGE) == 0


def test_held_out_losses_before_and_after_are_in_the_picture(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines, draw = {}, Axes.plot

    def record(self, x, y, *rest, label, **style):
        lines[label] = list(zip(x, y, strict=True))
        return draw(self, x, y, *rest, label=label, **style)

    monkeypatch.setattr(Axes, "plot", record)
    plot(tmp_path)
    assert lines["held out"] == [(0, 3.75), (2, 3.625), (30, 3.5)]  # base, evaluation, the step that was kept
    assert lines["training, each step"] == [(1, 4.0), (2, 3.5), (3, 3.25)]
    assert [loss for _, loss in lines["training, smoothed"]] == pytest.approx([4.0, 3.95, 3.88])


@pytest.mark.parametrize("name", ["$a$.csv", "a_$b.csv", r"$\frac$.csv", "{x}^2.csv"])
def test_the_name_of_the_data_is_no_formula(tmp_path, name):
    facts = stored.manifest().data.model_copy(update={"name": name})
    plot(tmp_path, manifest=stored.manifest(data=facts.model_dump()))


def test_the_same_run_gives_the_same_picture(tmp_path):
    plot(tmp_path)
    first = (tmp_path / "loss.png").read_bytes()
    plot(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == first


# The model card


def test_the_metadata_is_what_the_hub_reads(card):
    text = card()
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "base_model": "distilbert/distilgpt2",
        "datasets": ["stanfordnlp/imdb"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora_tuner"],
    }
    parsed = ModelCard(text)
    assert parsed.data.base_model == "distilbert/distilgpt2"
    assert parsed.data.library_name == "peft"
    assert parsed.data.pipeline_tag == "text-generation"
    assert parsed.data.tags == ["lora", "lora_tuner"]
    assert parsed.text.strip().startswith("# imdb\n\nA LoRA adapter: it makes distilgpt2 write like imdb.\n")


def test_the_figures(card):
    assert table(card()) == {
        "Base": "distilgpt2 (distilbert/distilgpt2 on the Hub)",
        "Update": "LoRA, rank 4, alpha 8, on c_attn",
        "Size": "192 parameters, 0.0 MB",
        "Data": "stanfordnlp/imdb",
        "Rows": "25,000 read, 12,500 filtered, 98 duplicates, 10,000 train, 2,402 held out",
        "Run": "40 steps, 20,480 tokens, 1.5 minutes on cpu in float32",
        "Held-out loss": "3.5000 nats a token; the base has 3.7500",
        "Gain": "0.2500 ± 0.0125 (standard error, 200 rows, paired)",
        "Perplexity": f"{math.exp(3.5):.2f}; the base has {math.exp(3.75):.2f}",
    }


def test_a_card_without_a_result_says_nothing_of_it(card):
    rows = table(card(stored.manifest(result=None)))
    assert {"Held-out loss", "Gain", "Perplexity"} & rows.keys() == set()
    assert "Run" in rows


def test_the_embedded_base_is_named_as_on_the_hub(card):
    text = card(based_on(name="smollm2-135m", repo="HuggingFaceTB/SmolLM2-135M-Instruct", revision=None))
    assert ModelCard(text).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "AutoModelForCausalLM.from_pretrained('HuggingFaceTB/SmolLM2-135M-Instruct')" in text


def test_a_base_without_an_owner_is_named_when_it_is_on_the_hub(card):
    assert ModelCard(card(based_on(name="gpt2", repo="gpt2"))).data.base_model == "gpt2"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_a_local_base_is_no_base_on_the_hub(card, tmp_path, there, kind):
    """Whether the folder is still there or not: a card may be written again elsewhere."""
    if there:
        (tmp_path / "models" / "mine").mkdir(parents=True)
    path = str(tmp_path / "models" / "mine") if kind == "absolute" else "models/mine"
    text = card(based_on(name=path, repo=path, **LOCAL))
    assert ModelCard(text).data.base_model is None
    assert str(tmp_path) not in text
    assert "AutoModelForCausalLM.from_pretrained('path/to/" in text


def test_a_local_dataset_is_called_by_its_last_part(card, tmp_path):
    path = str(tmp_path / "my|reviews.csv")
    facts = stored.manifest().data.model_copy(update={"name": path, "source": path})
    text = card(stored.manifest(data=facts.model_dump()))
    assert str(tmp_path) not in text
    assert "it makes distilgpt2 write like my|reviews.csv." in text
    assert table(text)["Data"] == r"my\|reviews.csv"


def test_every_row_of_the_table_has_two_cells(card):
    facts = stored.manifest().data.model_copy(update={"source": "a|b\\|c"})
    for line in card(stored.manifest(data=facts.model_dump())).splitlines():
        if line.startswith("|"):
            assert line.replace(r"\|", "").count("|") == 3, line


def test_the_program_in_the_card_is_python(card):
    program = card().split("```python\n")[1].split("```")[0]
    compile(program, "card", "exec")
    assert 'PeftModel.from_pretrained(base, "path/to/imdb")' in program
