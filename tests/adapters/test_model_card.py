import io
import json
import math
import re
import warnings

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM

from lora_tuner import EvalSet, GainMatrix
from lora_tuner.adapters import model_card, plots
from lora_tuner.adapters.adapter import MANIFEST_FILE, load_adapter_folder
from lora_tuner.adapters.manifest import EvalResult
from lora_tuner.adapters.plots import plot_loss  # the session leaves it empty elsewhere
from lora_tuner.errors import AdapterError

from .. import adapter_files

HISTORY = [
    {"step": 1, "loss": 4.0, "learning_rate": 1e-3},
    {"step": 2, "loss": 3.5, "learning_rate": 5e-4},
    {"step": 2, "eval_loss": 3.625},
    {"step": 3, "loss": 3.25, "learning_rate": 0.0},
]


def based_on(**changes):
    """A manifest with another base than distilgpt2 on the Hub."""
    base = adapter_files.manifest().base.model_copy(update=changes)
    return adapter_files.manifest(base=base.model_dump())


LOCAL = {"revision": None, "weights": "a local folder"}


@pytest.fixture
def card(tmp_path):
    """Write an adapter with a manifest and return its model card."""

    def write(manifest=None, **config):
        adapter = load_adapter_folder(
            adapter_files.write(tmp_path / "imdb", config, facts=manifest or adapter_files.manifest())
        )
        return model_card.model_card(adapter, "imdb")

    return write


def table(card):
    """Rows of the summary table."""
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    return dict(line.removeprefix("| ").removesuffix(" |").split(" | ", 1) for line in lines[2:])


# Metrics


def test_write_metrics_as_jsonl(tmp_path):
    plots.write_metrics(HISTORY, tmp_path / "metrics.jsonl")
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith('{"step": 1, "loss": 4.0, "learning_rate": 0.001}\n')
    assert text.endswith("}\n")
    assert [json.loads(line) for line in text.splitlines()] == HISTORY


def test_write_empty_metrics(tmp_path):
    plots.write_metrics([], tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


# Loss plot


def plot(tmp_path, history=HISTORY, manifest=None):
    path = tmp_path / "loss.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_loss(history, manifest or adapter_files.manifest(), path)
    return pixels_of(path)


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return np.asarray(image.convert("RGB")).astype(int)


def share(pixels, color):
    """Share of the pixels with about this color."""
    return (np.abs(pixels - color).max(axis=-1) < 40).mean()


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def test_loss_plot_has_both_curves(tmp_path):
    pixels = plot(tmp_path)
    assert pixels.shape == (480, 840, 3)
    assert share(pixels, BLUE) > 0.0003
    assert share(pixels, ORANGE) > 0.0003


def test_loss_plot_without_held_out_loss(tmp_path):
    pixels = plot(tmp_path, [HISTORY[0], HISTORY[1]], adapter_files.manifest(result=None))
    assert share(pixels, BLUE) > 0.0003
    assert share(pixels, ORANGE) == 0


def test_loss_plot_without_steps(tmp_path):
    pixels = plot(tmp_path, [], adapter_files.manifest(result=None))
    assert share(pixels, BLUE) == share(pixels, ORANGE) == 0


def test_loss_plot_values(tmp_path, monkeypatch):
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
def test_loss_plot_title_is_plain_text(tmp_path, name):
    facts = adapter_files.manifest().data.model_copy(update={"name": name})
    plot(tmp_path, manifest=adapter_files.manifest(data=facts.model_dump()))


def test_loss_plot_is_reproducible(tmp_path):
    plot(tmp_path)
    first = (tmp_path / "loss.png").read_bytes()
    plot(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == first


# The gain matrix


def result(gain):
    return EvalResult(base_loss=4, loss=4 - gain, gain=gain, standard_error=0.01, rows=8, tokens=90)


def gains(*lines, adapters=None, sets=None, base="distilgpt2"):
    """A gain matrix; None is a cell without rows."""
    return GainMatrix(
        base,
        adapters or [f"adapter{number}" for number in range(len(lines))],
        [EvalSet(name, ["a row"]) for name in sets or [f"set{number}" for number in range(len(lines[0]))]],
        [[None if gain is None else result(gain) for gain in line] for line in lines],
    )


def draw(matrix, path):
    plots.plot_gains(matrix.base, matrix.adapters, [rows.name for rows in matrix.sets], matrix.cells, path)


def plot_gains(tmp_path, matrix, name="gains.png"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(matrix, tmp_path / name)
    return pixels_of(tmp_path / name)


# Ends and middle of the color scale, and the background
GAIN, LOSS, ZERO, MISSING = (5, 48, 97), (103, 0, 31), (246, 247, 247), (217, 217, 217)


def center_of(pixels, color):
    """Center (x, y) of all pixels with this color."""
    positions = np.argwhere((np.abs(pixels - color) < 3).all(axis=-1))
    assert len(positions) > 0.05 * pixels[..., 0].size
    y, x = positions.mean(axis=0)
    return x, y


def test_gain_plot_colors(tmp_path):
    pixels = plot_gains(tmp_path, gains([0.5, None], [-0.5, 0.0]))
    gain, loss, zero, missing = (center_of(pixels, color) for color in (GAIN, LOSS, ZERO, MISSING))
    # A row per adapter, a column per held-out set; the color bar shifts the centers a little.
    assert gain[0] == pytest.approx(loss[0], abs=30)
    assert zero[0] == pytest.approx(missing[0], abs=30)
    assert gain[1] == pytest.approx(missing[1], abs=30)
    assert loss[1] == pytest.approx(zero[1], abs=30)
    assert missing[0] - gain[0] > 100
    assert loss[1] - gain[1] > 100


@pytest.mark.parametrize("matrix", [gains([0.0]), gains([0.0, None]), gains([1e-12, 1.0])])
def test_zero_gain_is_neutral(tmp_path, matrix):
    center_of(plot_gains(tmp_path, matrix), ZERO)


def test_gain_plot_cell_texts(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    texts, write = {}, Axes.text

    def record(self, x, y, text, **style):
        texts[y, x] = text
        return write(self, x, y, text, **style)

    monkeypatch.setattr(Axes, "text", record)
    plot_gains(tmp_path, gains([0.5, None], [-0.25, 0.0]))
    assert texts == {
        (0, 0): "+0.500\n± 0.010",
        (0, 1): "missing",
        (1, 0): "-0.250\n± 0.010",
        (1, 1): "+0.000\n± 0.010",
    }


@pytest.mark.parametrize(
    "matrix",
    [
        gains([0.1]),
        gains([-0.1]),
        gains([None]),
        gains([None, None], [None, None]),
        gains([0.0, 0.0], [0.0, 0.0]),
        gains([1e-9, 1e9]),
        gains([0.1], sets=["$_{$"], base="$^{$"),
        gains([0.1, 0.2], sets=["$a_b{c", r"\frac{$"], adapters=["a_b"], base="/models/my_$base$"),
        gains([0.1], [0.2], adapters=["a_b-1", "A" * 12]),
        pytest.param(gains(*[[0.01 * i * j for i in range(12)] for j in range(12)]), marks=pytest.mark.slow),
    ],
    ids=["one", "loss", "missing", "all-missing", "zero", "far", "formula", "names", "column", "many"],
)
def test_gain_plot_of_any_matrix(tmp_path, matrix):
    height, width, _ = plot_gains(tmp_path, matrix).shape
    assert width >= 120 * (2.2 + 1.1 * len(matrix.sets))
    assert height >= 120 * (1.8 + 0.6 * len(matrix.adapters))


def test_gain_plot_is_reproducible(tmp_path):
    for name in ("a.png", "b.png"):
        plot_gains(tmp_path, gains([0.5, None], [-0.5, 0.25]), name)
    plot_gains(tmp_path, gains([0.5, None], [-0.5, 0.24]), "c.png")
    first, second, other = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert first == second != other


def test_gain_plot_hides_local_paths(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    shown = []
    monkeypatch.setattr(Axes, "set_xticks", lambda self, ticks, labels, **_: shown.append(labels))
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **_: shown.append(title))
    plot_gains(tmp_path, gains([0.1], sets=[str(tmp_path / "films.csv")], base=str(tmp_path / "mine")))
    assert shown == [["films.csv"], "Gain over mine (nats per token)"]


# The model card


def test_card_metadata(card):
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
    assert parsed.text.strip().startswith("# imdb\n\nA LoRA adapter for distilgpt2, trained on imdb.\n")


def test_card_summary_table(card):
    assert table(card()) == {
        "Base": "distilgpt2 (distilbert/distilgpt2 on the Hub)",
        "Adapter": "LoRA, rank 4, alpha 8, on c_attn",
        "Size": "192 parameters, 0.0 MB",
        "Data": "stanfordnlp/imdb",
        "Rows": "25,000 read, 12,500 filtered, 98 duplicates, 10,000 train, 2,402 held out",
        "Run": "lora, 40 steps, 20,480 tokens, 1.5 minutes on cpu in float32",
        "Held-out loss": "3.5000 nats per token (base: 3.7500)",
        "Gain": "0.2500 ± 0.0125 (standard error, 200 rows, paired)",
        "Perplexity": f"{math.exp(3.5):.2f} (base: {math.exp(3.75):.2f})",
    }


def test_card_without_result(card):
    rows = table(card(adapter_files.manifest(result=None)))
    assert {"Held-out loss", "Gain", "Perplexity"} & rows.keys() == set()
    assert "Run" in rows


def test_card_of_embedded_base(card):
    text = card(based_on(name="smollm2-135m", repo="HuggingFaceTB/SmolLM2-135M-Instruct", revision=None))
    assert ModelCard(text).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "AutoModelForCausalLM.from_pretrained('HuggingFaceTB/SmolLM2-135M-Instruct')" in text


def test_card_of_base_without_owner(card):
    assert ModelCard(card(based_on(name="gpt2", repo="gpt2"))).data.base_model == "gpt2"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_card_hides_local_base(card, tmp_path, there, kind):
    """The folder may be missing: a card can be rewritten on another machine."""
    if there:
        (tmp_path / "models" / "mine").mkdir(parents=True)
    path = str(tmp_path / "models" / "mine") if kind == "absolute" else "models/mine"
    text = card(based_on(name=path, repo=path, **LOCAL))
    assert ModelCard(text).data.base_model is None
    assert str(tmp_path) not in text
    assert "AutoModelForCausalLM.from_pretrained('path/to/" in text


def test_card_hides_local_dataset_path(card, tmp_path):
    path = str(tmp_path / "my|reviews.csv")
    facts = adapter_files.manifest().data.model_copy(update={"name": path, "source": path})
    text = card(adapter_files.manifest(data=facts.model_dump()))
    assert str(tmp_path) not in text
    assert "A LoRA adapter for distilgpt2, trained on my|reviews.csv." in text
    assert table(text)["Data"] == r"my\|reviews.csv"


def test_card_table_escapes_pipes(card):
    facts = adapter_files.manifest().data.model_copy(update={"source": "a|b\\|c"})
    for line in card(adapter_files.manifest(data=facts.model_dump())).splitlines():
        if line.startswith("|"):
            assert line.replace(r"\|", "").count("|") == 3, line


def test_card_example_compiles(card):
    program = card().split("```python\n")[1].split("```")[0]
    compile(program, "card", "exec")
    assert 'PeftModel.from_pretrained(base, "path/to/imdb")' in program


# Usage section


def use(text):
    return text.split("## Use\n")[1]


MERGE = "merge it (`python cli.py merge imdb --out merged/imdb`)"
LLAMA = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def used(tmp_path, config=None, weights=None):
    """Usage section of a card; for Llama layers if no weights are given."""
    weights = adapter_files.tensors(modules=LLAMA) if weights is None else weights
    folder = adapter_files.write(tmp_path / ".work.tmp", config, weights, adapter_files.manifest())
    return use(model_card.model_card(load_adapter_folder(folder), "imdb"))


@pytest.mark.parametrize(("rank", "largest"), [(1, 8), (8, 8), (12, 16), (321, 512)])
def test_card_shows_commands_of_other_tools(tmp_path, rank, largest):
    text = used(tmp_path, {"r": rank, "target_modules": ["q_proj"]}, adapter_files.tensors(rank, LLAMA))
    assert (
        "vllm serve distilbert/distilgpt2 --enable-lora "
        f"--max-lora-rank {largest} --lora-modules imdb=path/to/imdb\n" in text
    )
    assert "python cli.py export path/to/imdb --to gguf --out imdb.gguf\n" in text
    assert MERGE not in text


def test_card_vllm_rank_is_largest(tmp_path):
    weights = adapter_files.tensors(4, LLAMA) | {
        name: tensor for name, tensor in adapter_files.tensors(20, LLAMA).items() if LLAMA[1] in name
    }
    assert "--max-lora-rank 32 " in used(tmp_path, {"rank_pattern": {"layers.1.self_attn.q_proj": 20}}, weights)


def test_card_names_incompatible_tools(tmp_path):
    gpt2 = used(tmp_path, {"fan_in_fan_out": True}, adapter_files.tensors())
    assert gpt2.endswith(f"```\n\nvLLM does not support LoRA on GPT-2: {MERGE}.\n")
    assert "vllm serve" not in gpt2
    assert "cli.py export" in gpt2
    magnitudes = {f"base_model.model.{module}.lora_magnitude_vector": np.ones(18, np.float32) for module in LLAMA}
    dora = used(tmp_path, {"use_dora": True}, adapter_files.tensors(modules=LLAMA) | magnitudes)
    assert dora.endswith(
        f"```\n\nvLLM does not support DoRA: {MERGE}.\n\nllama.cpp does not support DoRA: {MERGE}.\n"
    )
    assert "cli.py export" not in dora


def test_card_of_adapter_without_run(card):
    facts = adapter_files.manifest(run=None, data=None, result=None, made_by="compress imdb --energy 0.9")
    rows = table(card(facts))
    assert list(rows) == ["Base", "Adapter", "Size", "Command"]
    assert rows["Command"] == "`compress imdb --energy 0.9`"
    assert "run.yaml" not in card(facts)


def test_card_escapes_untrusted_text(card):
    facts = adapter_files.manifest().data.model_copy(update={"name": "x" * 300, "source": "a\n\n# b <script>"})
    text = card(adapter_files.manifest(data=facts.model_dump()))
    assert table(text)["Data"] == "a # b &lt;script>"


def test_card_links_existing_plots(tmp_path):
    folder = adapter_files.write(tmp_path / "imdb", facts=adapter_files.manifest())
    for name, picture in (
        ("loss.png", "![Loss](loss.png)"),
        ("spectrum.png", "![Singular values](spectrum.png)"),
    ):
        assert picture not in model_card.model_card(load_adapter_folder(folder), "imdb")
        (folder / name).touch()
        assert picture in model_card.model_card(load_adapter_folder(folder), "imdb")


def test_spectrum_plot_marks_truncation(tmp_path):
    spectra = {"h.0.c_attn": [4.0, 1.0, 0.0], "h.0.c_fc": [2.0]}
    plots.plot_spectra(spectra, {"h.0.c_attn": 2, "h.0.c_fc": 1}, tmp_path / "spectrum.png")
    pixels = pixels_of(tmp_path / "spectrum.png")
    assert share(pixels, BLUE) > 0.00003
    assert share(pixels, ORANGE) > 0.00001


def test_card_of_child_names_parents(card, tmp_path):
    grandparent = {"name": "old", "sha256": "12" * 32}
    parents = [
        {"name": "noir", "sha256": "ab" * 32, "parents": [grandparent]},
        {"name": "verse", "sha256": "cd" * 32},
    ]
    facts = adapter_files.manifest().data.model_copy(update={"eval_dataset": "owner/films"})
    rows = table(card(adapter_files.manifest(parents=parents, data=facts.model_dump())))
    assert rows["Parents"] == "noir (abababababab), verse (cdcdcdcdcdcd)"
    assert rows["Evaluated on"] == "owner/films"
    assert list(rows)[2:6] == ["Size", "Parents", "Data", "Rows"]
    facts = facts.model_copy(update={"eval_dataset": str(tmp_path / "films.csv")})
    assert table(card(adapter_files.manifest(data=facts.model_dump())))["Evaluated on"] == "films.csv"
    assert {"Parents", "Evaluated on"} & table(card()).keys() == set()


def peft_folder(folder, base, **settings):
    """Write an adapter with random weights through PEFT."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", lora_alpha=7, **settings)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
        ("llama", {"r": 12, "target_modules": ["q_proj", "down_proj"]}),
        (
            "llama",
            {
                "r": 4,
                "target_modules": ["q_proj"],
                "use_rslora": True,
                "rank_pattern": {"0.self_attn.q_proj": 1000},
            },
        ),
        ("llama", {"r": 4, "target_modules": ["v_proj"], "use_dora": True}),
    ],
)
def test_card_examples_run_and_agree(tmp_path, capsys, request, kind, settings):
    base = request.getfixturevalue(kind)
    folder = peft_folder(tmp_path / "path" / "to" / "noir", base, **settings)
    (tmp_path / "path" / "to" / kind).symlink_to(base)
    facts = based_on(name=str(base), repo=str(base), **LOCAL)
    (folder / MANIFEST_FILE).write_text(facts.to_json())
    text = model_card.model_card(load_adapter_folder(folder), "noir")
    assert ModelCard(text).data.library_name == "peft"
    by_peft, by_transformers = {}, {}
    peft_program, transformers_program = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(peft_program, by_peft)
    assert capsys.readouterr().out.startswith("Once")
    exec(transformers_program, by_transformers)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        first, second = (program["model"].eval()(ids).logits for program in (by_peft, by_transformers))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    assert (first - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("base", "repo"),
    [
        ({}, "distilbert/distilgpt2"),
        ({"name": "a/b", "repo": "a/b"}, "a/b"),
        ({"name": "m", "repo": "m", **LOCAL}, None),
    ],
)
def test_card_metadata_of_child(card, base, repo):
    facts = based_on(**base).model_copy(
        update={"parents": adapter_files.manifest(parents=[{"name": "noir", "sha256": "ab" * 32}]).parents}
    )
    parsed = ModelCard(card(facts))
    assert parsed.data.to_dict() == {
        **({"base_model": repo} if repo else {}),
        "datasets": ["stanfordnlp/imdb"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora_tuner"],
    }


@pytest.mark.parametrize("name", ["reviews", "$_{$", "a" * 64])
def test_gain_plot_fits_long_names(tmp_path, monkeypatch, name):
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (save(self, *a, **k), saved.append(self)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(gains([0.1], adapters=[name], sets=[name]), tmp_path / "x.png")
    box, (width, height) = saved[0].get_tightbbox(), saved[0].get_size_inches()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= width
    assert box.y1 <= height


def test_card_shows_row_filter(card):
    facts = adapter_files.manifest().data.model_copy(update={"where": ["label=1"]})
    assert table(card(adapter_files.manifest(data=facts.model_dump())))["Filter"] == "label=1"


def test_metrics_round_trip(tmp_path):
    plots.write_metrics(HISTORY, tmp_path / "metrics.jsonl")
    found = plots.read_metrics(tmp_path / "metrics.jsonl")
    assert found == [{key: it[key] for key in ("step", "loss", "eval_loss") if key in it} for it in HISTORY]
    assert (plot(tmp_path, found) == plot(tmp_path)).all()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "7",
        '"step"',
        "{",
        "{}",
        '{"step": "x"}',
        '{"step": [1]}',
        '{"step": -1}',
        '{"step": 1e300}',
        f'{{"step": 1{"0" * 400}}}',
        '{"step": 1, "loss": NaN}',
        "[" * 100_000,
        None,
    ],
)
def test_read_invalid_metrics_fails(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(AdapterError, match=re.escape(f"{path} has no loss curve: ")):
        plots.read_metrics(path)


def test_summary_without_manifest(tmp_path):
    found = dict(model_card.summary_rows(load_adapter_folder(adapter_files.write(tmp_path / "other"))))
    assert found == {
        "Base": "distilbert/distilgpt2",
        "Adapter": "LoRA, rank 4, alpha 8, on c_attn",
        "Size": "192 parameters, 0.0 MB",
        "Origin": "another tool (no manifest)",
    }


def test_spectrum_plot_without_truncation(tmp_path):
    plots.plot_spectra({"h.0.c_attn": [4.0, 1.0]}, {}, buffer := io.BytesIO())
    plots.plot_spectra({"h.0.c_attn": [4.0, 1.0]}, {"h.0.c_attn": 2}, tmp_path / "cut.png")
    assert share(pixels_of(buffer), BLUE) < share(pixels_of(tmp_path / "cut.png"), BLUE)
