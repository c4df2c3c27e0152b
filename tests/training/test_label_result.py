"""Runs that learn labels: their figures on held-out rows, in the manifest, the card and at the end."""

import json
import math
import random
from statistics import fmean, stdev

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from lora_tuner import (
    Generator,
    Library,
    ModelOptions,
    TrainConfig,
    classify,
    compress,
    resume,
    run_sweep,
    train,
)
from lora_tuner.adapters.adapter import CARD_FILE, CONFUSION_FILE, MANIFEST_FILE, RUN_FILE
from lora_tuner.adapters.growth import find_growth
from lora_tuner.adapters.label_info import LabelFigures, LabelInfo
from lora_tuner.analysis.report import LEARNS_LABELS, make_report, sections
from lora_tuner.cli.options import eval_sets_from
from lora_tuner.data.labels import split_label
from lora_tuner.errors import TrainingError
from lora_tuner.models import fsdp
from lora_tuner.settings_files import resolve_settings
from lora_tuner.training import label_result
from lora_tuner.training.learning_rate import HIGHEST_RATE, LABEL_RATE_SHARE
from lora_tuner.training.paths import SWEEP_RESULT_FILE
from lora_tuner.training.setup import prepare_training

from .. import tiny_models
from ..cli.test_commands import run
from ..faults.runs import slow
from .preferences import perturb

WORDS = {"good": ("works", "shines"), "bad": ("drags", "fails")}


def write_table(path, count=160):
    """Words that tell the label of a text; three texts in five are good."""
    draw, rows = random.Random(0), ["text,label"]
    for number in range(count):
        label = "good" if number % 5 < 3 else "bad"
        rows.append(f"{number} {' '.join(draw.choices(WORDS[label], k=5))},{label}")
    path.write_text("\n".join(rows) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def sure_base(tmp_path_factory):
    """A tiny base that can be sure of a token, so that it learns labels in a second."""
    folder = tiny_models.save_model(tmp_path_factory.mktemp("sure") / "sure", "gpt2", width=64)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"] *= 6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def label_settings(settings, tmp_path):
    """Make a configuration of a run that learns labels."""

    def make(**changes):
        data = write_table(tmp_path / "told.csv")
        quick = {"dataset": data, "label_column": "label", "name": "told", "near_duplicates": "keep"}
        return settings(**quick | {"max_steps": 2} | changes)

    return make


@pytest.fixture
def told(label_settings, sure_base, train_once):
    """An adapter that tells labels well."""
    return train_once(label_settings(base=str(sure_base), max_steps=30, batch_size=4, eval_rows=20))


def test_labels_are_learned_and_told(told):
    info = told.manifest.labels
    assert (info.names, info.template) == (["bad", "good"], "{text}\n\nLabel: {label}")
    assert (sum(info.counts), info.max_length, info.clean) == (
        told.manifest.data.counts["train"],
        64,
        "full",
    )
    assert info.figures.accuracy > 0.9 > info.base.accuracy
    assert info.figures.interval[0] < info.figures.accuracy <= info.figures.interval[1]
    assert info.figures.rows + info.fitted_rows == told.manifest.data.counts["held_out"] > 20
    assert info.figures.rows == info.base.rows
    assert info.fitted_rows >= label_result.MIN_FIT_ROWS
    assert info.temperature != 1.0
    generator = Generator(told.path, options=ModelOptions(device="cpu"))
    results = classify(generator, ["7 works works shines works", "8 drags drags fails fails"])
    assert [result.label for result in results] == ["good", "bad"]


def test_figures_are_shown_and_kept(told):
    info = json.loads((told.path / MANIFEST_FILE).read_text())["labels"]
    shown = f"{info['figures']['accuracy']:.1%}"
    card = (told.path / CARD_FILE).read_text()
    assert f"| Accuracy | {shown} (" in card
    assert "| Base accuracy | " in card
    assert "| Calibration | error " in card
    assert f"![Labels of held-out rows]({CONFUSION_FILE})" in card
    assert (told.path / CONFUSION_FILE).read_bytes().startswith(b"\x89PNG")
    lines = run("adapters", "show", "told").stdout.splitlines()
    assert any(line.startswith("accuracy ") and shown in line for line in lines)
    assert any(line.startswith("labels ") and "training rows of label" in line for line in lines)
    assert json.loads(run("adapters", "show", "told", "--json").stdout)["labels"] == info


def test_end_of_run_shows_figures(label_settings, gpt2):
    config = label_settings()
    options = [
        "--dataset",
        config.dataset,
        "--label-column",
        "label",
        "--base",
        gpt2,
        "--max-steps",
        2,
    ]
    done = run(
        "train",
        *options,
        "--name",
        "shown",
        "--max-length",
        64,
        "--learning-rate",
        0.01,
        "--rank",
        4,
    )
    lines = done.stdout.splitlines()
    assert any(line.startswith("accuracy      ") and "macro F1" in line for line in lines)
    assert any(line.startswith("base accuracy ") for line in lines)
    assert f"picture: adapters/shown/{CONFUSION_FILE} (labels of held-out rows)" in lines
    assert any(line.startswith("calibration   error ") for line in lines)
    assert all(len(line) <= 80 for line in lines if line.startswith(("accuracy", "base accuracy", "calibration")))
    assert "python cli.py classify " in done.stderr
    assert "Labels: bad " in done.stderr


@pytest.mark.slow
def test_balanced_run_resumes_bitwise(label_settings, stop_at):
    whole = train(label_settings(name="whole", balance=True, max_steps=5))
    with stop_at(3):
        train(label_settings(name="stopped", balance=True, max_steps=5))
    resumed = resume("stopped")
    assert resumed.sha256 == whole.sha256
    before, after = (adapter.manifest.labels for adapter in (whole, resumed))
    assert before == after
    assert before.balanced


def test_balanced_rows_are_drawn_evenly(label_settings):
    counts = {}
    for balance in (False, True):
        setup = prepare_training(label_settings(balance=balance))
        first = [row[row >= 0].tolist() for row in setup.sequences.rows]
        counts[balance] = [first.count(label) for label in (min(first), max(first))]
        assert [*setup.dataset.labels.values()] != [len(first) // 2] * 2
    assert counts[False][0] != counts[False][1]
    assert counts[True][0] == counts[True][1]


def test_long_texts_keep_their_ends(label_settings, tmp_path):
    path = tmp_path / "long.csv"
    rows = [f"first {number} {'so '[:3] * 90} last,{'ab'[number % 2]}" for number in range(30)]
    path.write_text("text,label\n" + "\n".join(rows))
    notices = []
    setup = prepare_training(
        label_settings(dataset=str(path)),
        lambda event: notices.append(getattr(event, "text", "")),
    )
    assert any("as the middle of " in text and "over --max-length is left out" in text for text in notices)
    tokenizer = setup.base.tokenizer
    for row in setup.sequences.rows:
        assert len(row) == 64
        text = tokenizer.decode([token if token >= 0 else ~token for token in row.tolist()])
        assert text.startswith("first ")
        assert " last\n\nLabel: " in text
    assert setup.manifest.run.truncated_rows == len(setup.dataset.train)


def test_default_rate_is_lower(label_settings):
    setup = prepare_training(label_settings(learning_rate=None))
    assert setup.learning_rate_origin.endswith(", times 0.25 for labels")
    assert setup.learning_rate <= LABEL_RATE_SHARE * HIGHEST_RATE


def test_label_has_to_fit(label_settings):
    with pytest.raises(TrainingError, match="more than half of --max-length 16: raise it to "):
        prepare_training(label_settings(max_length=16))


def test_sharded_base_tells_same_labels(label_settings, monkeypatch):
    """Its passes are of whole rows, one for each label."""
    setup = prepare_training(label_settings())
    perturb(setup)
    told = []
    infos = []
    for shards in (1, 2):
        monkeypatch.setattr(fsdp, "shard_count", lambda shards=shards: shards)
        infos.append(
            label_result.measure_labels(setup.model, setup.base, setup.config, setup.dataset, told.append)
        )
    assert not any("not measured" in getattr(event, "text", "") for event in told)
    for one, two in ((getattr(info, name) for info in infos) for name in ("figures", "base")):
        assert one.right == two.right
        assert one.calibration_error == pytest.approx(two.calibration_error, abs=1e-4)


def test_evaluate_reads_labels_of_other_data(told, tmp_path):
    rows = write_table(tmp_path / "other.csv", 30)
    (eval_set,) = eval_sets_from({"eval_dataset": rows}, None, [told])
    assert {split_label(row)[1] for row in eval_set.texts} == {"bad", "good"}
    assert run("evaluate", "told", "--eval-dataset", rows, "--eval-rows", 4).stdout


def test_run_of_manifest_is_repeated(told):
    again = run(
        "train",
        "--config",
        told.path / RUN_FILE,
        "--name",
        "again",
        "--max-steps",
        2,
        "--json",
    )
    facts = json.loads(again.stdout)
    assert Library().get("again").manifest.labels.names == ["bad", "good"]
    assert facts["data"]["hash"] == told.manifest.data.hash


def test_compressed_adapter_tells_labels(told):
    compress(told, "small", Library(), energy=0.9, options=ModelOptions(device="cpu"))
    small = Library().get("small")
    assert small.manifest.labels.names == told.manifest.labels.names
    assert small.manifest.labels.figures is None
    assert "| Labels | bad (" in (small.path / CARD_FILE).read_text()
    shown = run("classify", "7 works works shines works", "--adapter", "small")
    assert shown.stdout.split()[0] == "good"
    assert "The probabilities of small are not calibrated" in shown.stderr


@pytest.mark.parametrize("method", ["dora", slow("rslora"), slow("pissa"), slow("eva"), slow("lora+")])
def test_methods_learn_labels(label_settings, method):
    trained = train(label_settings(method=method))
    assert trained.manifest.labels.figures.rows > 0
    assert run("classify", "so", "--adapter", "told", "--json").stdout


# Figures


def test_wilson_interval_is_that_of_tables():
    assert label_result.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert label_result.wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert label_result.wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_macro_f1_counts_labels_alike():
    assert label_result.macro_f1([[90, 0], [10, 0]]) == pytest.approx((2 * 90 / 190 + 0) / 2)
    assert label_result.macro_f1([[5, 0, 0], [0, 5, 0], [0, 0, 0]]) == 1.0


def test_calibration_error_is_mean_gap():
    probabilities = torch.tensor([[0.95, 0.05]] * 10 + [[0.35, 0.65]] * 10)
    assert label_result.calibration_error(probabilities, [0] * 20) == pytest.approx((0.05 + 0.65) / 2)
    assert label_result.calibration_error(torch.tensor([[1.0, 0.0]]), [0]) == 0.0


def test_rows_that_fit_are_not_measured():
    rows = [f"row {number}" for number in range(400)]
    measured, fitted = label_result.choose_rows(rows, 200)
    assert (measured, fitted) == (rows[:200], rows[200:300])
    measured, fitted = label_result.choose_rows(rows[:60], 200)
    assert (len(measured), len(fitted)) == (40, 20)
    assert not {*measured} & {*fitted}
    assert label_result.choose_rows(rows[:12], 200) == (rows[:12], [])


def test_config_of_labels_is_kept_in_run_yaml(told):
    config = resolve_settings(TrainConfig, {}, told.path / RUN_FILE)
    assert (config.label_column, config.template, config.answer_column) == (
        "label",
        None,
        None,
    )


def test_stream_learns_labels(label_settings):
    trained = train(label_settings(streaming=True, labels="bad,good", shuffle_buffer=40))
    info = trained.manifest.labels
    assert info.names == ["bad", "good"]
    assert info.figures.rows == 8
    assert 0 < sum(info.counts) <= 40, "of the first rows"


@pytest.mark.parametrize("load_in", [slow("8bit"), slow("4bit")])
def test_quantized_base_learns_labels(label_settings, load_in):
    trained = train(label_settings(load_in=load_in))
    assert trained.manifest.run.load_in == load_in
    assert trained.manifest.labels.figures.rows == 8


def test_training_goes_on_from_labels(told, label_settings, sure_base):
    settings = label_settings(name="more", learning_rate=1e-4).model_dump(exclude_unset=True)
    more = train(TrainConfig.model_validate(settings | {"base": str(sure_base), "parent": "told"}))
    assert more.manifest.labels.figures.accuracy > 0.9
    assert [parent.name for parent in more.manifest.parents] == ["told"]


@pytest.mark.slow
def test_sweep_recommends_by_label_accuracy(label_settings, sure_base):
    """Not by the loss of the labels; errors are paired, row by row."""
    settings = [
        label_settings(base=str(sure_base), max_steps=steps, learning_rate=0.01, batch_size=4, eval_rows=20)
        for steps in (1, 8, 30)
    ]
    result = run_sweep(settings)
    figures = [Library().get(trial.name).manifest.labels.figures for trial in result.trials]
    assert [trial.accuracy for trial in result.trials] == pytest.approx([each.accuracy for each in figures])
    assert [trial.macro_f1 for trial in result.trials] == [each.macro_f1 for each in figures]
    rights = [[int(right) for right in each.right] for each in figures]
    best = max(range(3), key=lambda number: sum(rights[number]))
    differences = [one - other for one, other in zip(rights[best], rights[0], strict=True)]
    assert result.trials[0].gap == pytest.approx(fmean(differences))
    assert result.trials[0].standard_error == pytest.approx(stdev(differences) / math.sqrt(len(differences)))
    recommended = next(trial for trial in result.trials if trial.name == result.recommended)
    assert recommended.gap <= recommended.standard_error
    assert recommended.accuracy > result.base_accuracy
    assert result.growth.figure == "accuracy"
    assert result.growth.sentences[0].startswith("Twice the steps (30 to 60): accuracy ")
    adapter = Library().get(recommended.name)
    assert find_growth(adapter, Library()) == result.growth
    (result.folder / SWEEP_RESULT_FILE).unlink()
    alone = find_growth(adapter, Library())
    assert alone.figure == "accuracy"
    assert alone.doublings[0].gains == pytest.approx(result.growth.doublings[0].gains)


def test_change_of_accuracy_is_paired():
    def figures(right):
        return LabelFigures(
            accuracy=0, interval=(0, 1), macro_f1=0, calibration_error=0, confusion=[], right=right
        )

    info = LabelInfo(
        column="label",
        names=["a", "b"],
        counts=[1, 1],
        template="",
        max_length=8,
        clean="full",
        figures=figures("1101"),
        base=figures("0100"),
    )
    changes = [1, 0, 0, 1]
    assert info.accuracy_change() == pytest.approx((0.5, stdev(changes) / 2))
    assert info.model_copy(update={"base": None}).accuracy_change() is None
    with pytest.raises(ValidationError, match="of the same rows"):
        LabelInfo.model_validate(info.model_dump() | {"base": figures("1").model_dump()})


def test_report_leaves_texts_of_labels_out(told):
    made = make_report(told, skip=("forgetting", "growth"))
    assert made.missing == dict.fromkeys(("style", "memorization"), LEARNS_LABELS)
    assert [section.missing for section in sections(made)] == [LEARNS_LABELS] * 2
