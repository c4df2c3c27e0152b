"""Forgetting: the change of the loss on general text and on texts of your own."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import EvalSet, ModelOptions, TrainConfig, train
from lora_tuner.adapters.gains import paired_gain
from lora_tuner.adapters.manifest import EvalResult
from lora_tuner.analysis import forgetting
from lora_tuner.analysis.forgetting import describe_forgetting, measure_forgetting
from lora_tuner.analysis.subject import ReportSubject
from lora_tuner.config import HELD_OUT_MAX_TOKENS
from lora_tuner.data.general_text import general_texts
from lora_tuner.errors import AdapterError, Progress
from lora_tuner.evaluation import gain_matrix, held_out_loss

from .. import tiny_models


@pytest.fixture(autouse=True)
def _subset(monkeypatch):
    """Few rows, which the tiny base reads in no time."""
    monkeypatch.setattr(forgetting, "general_texts", lambda: general_texts(subset=True))


@pytest.fixture
def events():
    return []


@pytest.fixture
def subject(adapter, events):
    options = ModelOptions(device="cpu", notify=events.append)
    return ReportSubject(adapter, EvalSet("reviews", []), [], None, None, options)


@pytest.fixture
def base(subject):
    return gain_matrix.open_base(subject.adapter, subject.options)


def plain_losses(model, tokenizer, texts, most):
    """Summed loss and predictions of all rows by transformers alone, of the base and of the adapter."""
    sums, count = [0.0, 0.0], 0
    for text in texts:
        ids = torch.tensor([(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])[:most]])
        with torch.no_grad():
            after = model(ids, labels=ids).loss.item()
            with model.disable_adapter():
                before = model(ids, labels=ids).loss.item()
        predictions = ids.shape[1] - 1
        sums = [sums[0] + before * predictions, sums[1] + after * predictions]
        count += predictions
    return sums[0] / count, sums[1] / count, count


def check_against_transformers(figures, folder, adapter, kinds, most):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {kind.name: kind.texts for kind in kinds}
    results = figures.kinds | {"all": figures.general}
    texts |= {"all": [text for rows in texts.values() for text in rows]}
    assert results.keys() == texts.keys()
    for name, result in results.items():
        before, after, tokens = plain_losses(model, tokenizer, texts[name], most)
        assert result.base_loss == pytest.approx(before, abs=1e-4)
        assert result.loss == pytest.approx(after, abs=1e-4)
        assert result.gain == pytest.approx(before - after, abs=1e-4)
        assert (result.rows, result.tokens) == (len(texts[name]), tokens)
        assert result.standard_error > 0


def test_change_equals_plain_transformers(subject, base, gpt2):
    figures = measure_forgetting(subject, base).figures
    check_against_transformers(figures, gpt2, subject.adapter, general_texts(subset=True), tiny_models.CONTEXT)
    assert not figures.guards


@pytest.mark.slow
@pytest.mark.real
def test_real_change_equals_plain_transformers(tmp_path, monkeypatch):
    """On the rows that the run has measured; it says the same."""
    (tmp_path / "notes.txt").write_text("\n".join(tiny_models.reviews(60)))
    quick = {"max_steps": 5, "batch_size": 2, "max_length": 128, "eval_rows": 4, "learning_rate": 1e-3}
    monkeypatch.setattr("lora_tuner.training.profiling.GENERAL_SHARE", 100.0)
    adapter = train(TrainConfig(base="smollm2-135m", dataset="notes.txt", dtype="float32", **quick))
    subject = ReportSubject(adapter, EvalSet("notes", []), [], None, None, ModelOptions(dtype="float32"))
    base = gain_matrix.open_base(adapter, subject.options)
    figures = measure_forgetting(subject, base).figures
    check_against_transformers(
        figures, base.files.folder, adapter, general_texts(subset=True), HELD_OUT_MAX_TOKENS
    )
    assert figures.general.model_dump() == pytest.approx(adapter.manifest.general.model_dump(), abs=1e-4)


def test_guards_are_kinds_of_their_own(subject, base):
    texts = tiny_models.reviews(8, seed=5)
    guards = [EvalSet(name, texts[:count]) for name, count in (("a/notes.csv", 8), ("b/notes.csv", 5))]
    guards.append(EvalSet("gone.csv", [], "a standard error needs two rows"))
    report = measure_forgetting(subject, base, guards)
    figures = report.figures
    assert [*figures.guards] == ["notes.csv", "notes.csv (2)"]
    assert [result.rows for result in figures.guards.values()] == [8, 5]
    ((pair, _, _),) = gain_matrix.held_out_losses(base, {"reviews": subject.adapter}, guards)
    assert figures.guards["notes.csv"] == paired_gain(*pair)
    assert report.missing == {"gone.csv": "a standard error needs two rows"}
    assert figures.general.rows == sum(result.rows for result in figures.kinds.values()) == 40
    assert figures.sentences[2].startswith("Your own text: notes.csv ")
    assert [row[0] for row in report.table()] == [
        "text", *figures.kinds, "all of these", "notes.csv", "notes.csv (2)",
    ]  # fmt: skip


def test_progress_is_of_all_rows(subject, base, events):
    measure_forgetting(subject, base)
    progress = [event for event in events if isinstance(event, Progress)]
    assert {(event.stage, event.total) for event in progress} == {("forgetting", 80)}
    done = [event.done for event in progress]
    assert done == sorted(done)
    assert done[-1] == 80
    events.clear()
    measure_forgetting(subject, base)  # from the cache
    assert events == [Progress("forgetting", 80, 80)]


def test_interrupted_measurement_goes_on(subject, base, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    measured, measure_loss = [], held_out_loss.measure_loss

    def count(*args, stage, **kwargs):
        if len(measured) == 11:  # the base on eight kinds, and the adapter on three
            raise KeyboardInterrupt
        measured.append(stage)
        return measure_loss(*args, stage=stage, **kwargs)

    monkeypatch.setattr(held_out_loss, "measure_loss", count)
    with pytest.raises(KeyboardInterrupt):
        measure_forgetting(subject, base)
    before = [*measured]
    measured.clear()
    measure_forgetting(subject, base)
    assert len(before) == 11
    assert len(measured) == 5
    assert not {*before} & {*measured}


def test_too_short_context_is_refused(subject, base, monkeypatch):
    monkeypatch.setattr(gain_matrix, "held_out_losses", lambda *_, **__: [[None] * 8])
    with pytest.raises(AdapterError, match="no text fits into the context"):
        measure_forgetting(subject, base)


def result_of(change, error, rows=40):
    return EvalResult(
        base_loss=3.0, loss=3.0 + change, gain=-change, standard_error=error, rows=rows, tokens=50 * rows
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (0.05, "It has forgotten some general text: over 320 rows of 2 kinds the loss rose by 0.050 ± 0.010 nats per token "
        "(each token is 0.95 times as likely)."),
        (-0.05, "It has not forgotten general text: over 320 rows of 2 kinds the loss fell by 0.050 ± 0.010 nats per token "
        "(each token is 1.05 times as likely)."),
        (0.019, "No forgetting is measurable: over 320 rows of 2 kinds the loss changed by +0.019 ± 0.010 nats per token."),
    ],
)  # fmt: skip
def test_change_is_said_in_words(change, sentence):
    kinds = {"code": result_of(0.029, 0.01), "news": result_of(-0.029, 0.01)}
    first, second = describe_forgetting(result_of(change, 0.01, 320), kinds, {})
    assert first == sentence
    assert second == "No single kind changed measurably."


def test_changed_kinds_are_named():
    kinds = {"code": result_of(0.04, 0.01), "news": result_of(-0.05, 0.01), "letters": result_of(0.2, 0.01)}
    guards = {"a.csv": result_of(0.03, 0.01), "b.csv": result_of(0.1, None, 1)}
    _, second, third = describe_forgetting(result_of(0.1, 0.01, 320), kinds, guards)
    assert second == "Worse on letters (+0.200 ± 0.010), code (+0.040 ± 0.010); better on news (-0.050 ± 0.010)."
    assert third == ("Your own text: a.csv +0.030 ± 0.010 (worse), b.csv +0.100 (no error: one row or group).")
