import json
import os
import signal
import threading

import pytest
import torch
import yaml
from filelock import FileLock

from lora_tuner import EvalSet, Interrupted, Library, ModelOptions, Notice, Progress, resume, train
from lora_tuner.adapters import adapter as adapters_adapter
from lora_tuner.config import TrainConfig
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.general_text import general_texts
from lora_tuner.errors import AdapterError, BaseModelError, DataError, TrainingError
from lora_tuner.evaluation import gain_matrix, held_out_loss
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.settings_files import resolve_settings
from lora_tuner.training import checkpoints, loss_result, profiling

from .. import tiny_models


def weights(adapter):
    return (adapter.path / adapters_adapter.WEIGHTS_FILE).read_bytes()


def history(adapter):
    return [json.loads(line) for line in (adapter.path / adapters_adapter.METRICS_FILE).read_text().splitlines()]


def test_run_leaves_only_the_adapter(settings, tmp_path):
    adapter = train(settings())
    assert {path.name for path in adapter.path.iterdir()} == {
        adapters_adapter.WEIGHTS_FILE, adapters_adapter.CONFIG_FILE, adapters_adapter.MANIFEST_FILE,
        adapters_adapter.RUN_FILE, adapters_adapter.METRICS_FILE, adapters_adapter.LOSS_PLOT_FILE, adapters_adapter.CARD_FILE,
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["reviews"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_training_lowers_held_out_loss(settings, model_folder):
    adapter = train(settings(base=str(model_folder), max_steps=40, eval_rows=20))
    result = adapter.manifest.result
    assert result.gain > 3 * result.standard_error > 0
    assert result.gain == pytest.approx(result.base_loss - result.loss)
    base = load_base(find_base(str(model_folder)), ModelOptions(device="cpu"))
    corpus = load_dataset(settings())
    rows = held_out_loss.encode_held_out(base, corpus.held_out[:20])
    assert result.base_loss == pytest.approx(held_out_loss.measure_loss(base.model, base, rows).loss, abs=1e-6)
    assert (result.rows, result.tokens) == (len(rows), sum(len(row) - 1 for row in rows))


@pytest.fixture
def roomy(monkeypatch, tmp_path):
    """A base in whose context the general text fits, and runs that have the time for it."""
    monkeypatch.setattr(profiling, "GENERAL_SHARE", 100.0)
    return str(tiny_models.save_model(tmp_path / "roomy", "gpt2", context=1024))


def test_run_measures_general_text(settings, roomy, monkeypatch):
    """As `evaluate` would, and in a run that is the same without."""
    adapter = train(settings(base=roomy))
    general = adapter.manifest.general
    texts = [text for kind in general_texts(subset=True) for text in kind.texts]
    rows = EvalSet("general", texts)
    ((cell,),) = gain_matrix.evaluate([adapter], [rows], options=ModelOptions(device="cpu")).cells
    assert general.model_dump() == pytest.approx(cell.model_dump(), abs=1e-5)
    assert general.rows == 8 * 5
    assert abs(general.gain) > general.standard_error > 0
    monkeypatch.setattr(profiling, "GENERAL_SHARE", 0.0)
    without = train(settings(base=roomy, name="without"))
    assert without.manifest.general is None
    assert weights(without) == weights(adapter)
    assert without.manifest.result == adapter.manifest.result
    assert history(without)[-1]["loss"] == history(adapter)[-1]["loss"]


def test_short_context_has_no_general_text(settings, roomy):
    assert train(settings()).manifest.general is None


def test_failed_general_text_keeps_run(settings, roomy, monkeypatch):
    def fail(*args):
        raise BaseModelError("its loss is nan.")

    monkeypatch.setattr(held_out_loss, "encode_held_out", fail)
    told = []
    assert train(settings(base=roomy), told.append).manifest.general is None
    assert Notice("General text was not measured: its loss is nan.") in told


def test_same_config_repeats_bitwise(settings):
    first = train(settings(dropout=0.1, gradient_accumulation=2))
    again = train(settings(dropout=0.1, gradient_accumulation=2, name="again"))
    other = train(settings(dropout=0.1, gradient_accumulation=2, name="other", seed=1))
    assert weights(first) == weights(again) != weights(other)


def test_run_yaml_repeats_timed_run(settings):
    first = train(settings(max_steps=None, minutes=0.01))
    saved = yaml.safe_load((first.path / adapters_adapter.RUN_FILE).read_text())
    assert saved["max_steps"] == first.manifest.run.steps
    assert "minutes" not in saved
    again = train(resolve_settings(TrainConfig, {"name": "again"}, first.path / adapters_adapter.RUN_FILE))
    assert weights(first) == weights(again)


class StopAt:
    """Presses Ctrl-C just before a step is computed."""

    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number = step, number

    def __call__(self, event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == self.step - 1:
            os.kill(os.getpid(), self.number)


HARD = {"dropout": 0.1, "gradient_accumulation": 2, "max_steps": 30, "max_rows": 60, "schedule": "cosine"}


@pytest.mark.parametrize(
    ("step", "number"),
    [(13, signal.SIGTERM), *(pytest.param(step, signal.SIGINT, marks=pytest.mark.slow) for step in (2, 16))],
)
def test_resumed_run_is_bitwise_equal(settings, step, number):
    """Over several epochs, with dropout and accumulation, at a checkpoint's step and between two."""
    whole = train(settings(**HARD, name="whole"))
    assert whole.manifest.run.sequences * 3 < 30 * 4  # more than three epochs
    with pytest.raises(
        Interrupted, match=rf"Stopped at step {step} of 30, saved\. Resume with: python cli\.py train --resume r"
    ):
        train(settings(**HARD, save_every=8), StopAt(step, number))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (Library().path / "reviews").exists()
    resumed = resume("reviews")
    assert weights(resumed) == weights(whole)
    measured = {"seconds": 0, "peak_memory_bytes": 0}
    curves = [[entry | measured for entry in history(adapter)] for adapter in (resumed, whole)]
    assert curves[0] == curves[1]
    assert resumed.manifest.run.tokens == whole.manifest.run.tokens
    assert not (Library().path.parent / "runs" / "reviews").exists()


@pytest.mark.slow
def test_second_sigint_stops_immediately_resumable(settings):
    whole = train(settings(name="whole"))

    def twice(event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"Stopped immediately\. Resume with: python cli\.py train --resume"):
        train(settings(save_every=2), twice)
    assert weights(resume("reviews")) == weights(whole)


@pytest.mark.parametrize(
    "how",
    [
        {"schedule": "constant"},
        pytest.param(
            {
                "schedule": "constant",
                "learning_rate": 0.2,
                "max_steps": 60,
                "eval_every": 2,
                "patience": 2,
                "max_rows": 40,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_interrupt_after_training_resumes_without_steps(settings, monkeypatch, how):
    """Trainer, resumed at its last step, would take one more."""
    whole = train(settings(name="whole", **how))

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loss_result, "paired_gain", interrupted)
        with pytest.raises(Interrupted, match=r"Stopped immediately\. Resume with"):
            train(settings(**how))
    told = []
    resumed = resume("reviews", notify=told.append)
    assert not [event for event in told if isinstance(event, Progress) and event.stage == "training"]
    assert weights(resumed) == weights(whole)
    assert resumed.manifest.run.model_copy(update={"seconds": 0}) == whole.manifest.run.model_copy(
        update={"seconds": 0}
    )


@pytest.mark.slow  # quick in faults/test_resume.py
def test_broken_checkpoint_is_skipped(settings, tmp_path):
    whole = train(settings(name="whole", max_steps=9))
    with pytest.raises(Interrupted):
        train(settings(save_every=2, max_steps=9), StopAt(5))
    run = tmp_path / "runs" / "reviews"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    (run / "checkpoint-5" / "optimizer.pt").write_bytes(b"half")
    (run / "checkpoint-99").mkdir()
    notices = []
    resumed = resume("reviews", notify=notices.append)
    said = [event.text for event in notices if isinstance(event, Notice)]
    assert "runs/reviews/checkpoint-99 is skipped: whole.json is missing." in said
    assert "runs/reviews/checkpoint-5 is skipped: optimizer.pt does not match its hash." in said
    assert weights(resumed) == weights(whole)


def test_resume_with_changed_data_is_refused(settings, reviews_csv, gpt2, tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        train(settings(), StopAt(2))
    text = reviews_csv.read_text()
    reviews_csv.write_text(text + "one more row,1\n")
    with pytest.raises(
        TrainingError, match=r"runs/reviews cannot be resumed exactly: changed since it stopped: data \(was "
    ):
        resume("reviews")
    reviews_csv.write_text(text)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(TrainingError, match=rf"threads \(was {threads}, is {threads + 1}\)"):
            resume("reviews")
    finally:
        torch.set_num_threads(threads)
    resume("reviews")


def test_resume_without_run_is_refused(settings):
    with pytest.raises(
        TrainingError,
        match=r"There is no unfinished run runs/reviews: it has finished \(into another --adapters-dir\?\), or never started",
    ):
        resume("reviews")


def test_unfinished_run_needs_resume_or_overwrite(settings):
    with pytest.raises(Interrupted):
        train(settings(), StopAt(2))
    with pytest.raises(
        TrainingError, match="runs/reviews holds an unfinished run: resume it with --resume reviews"
    ):
        train(settings())
    assert train(settings(overwrite=True)).manifest.run.steps == 6


def test_existing_adapter_needs_overwrite(adapter, settings):
    before = weights(adapter)
    with pytest.raises(
        AdapterError, match="adapters/reviews exists: choose another --name, or replace it with --overwrite"
    ):
        train(settings(seed=4))
    assert weights(adapter) == before
    replaced = train(settings(seed=4, overwrite=True))
    assert weights(replaced) != before
    assert "overwrite: false" in (replaced.path / adapters_adapter.RUN_FILE).read_text()


def test_concurrent_run_of_name_is_refused(settings, tmp_path):
    (tmp_path / "runs").mkdir()
    with (
        FileLock(tmp_path / "runs" / ".reviews.lock.lora_tuner-new"),
        pytest.raises(TrainingError, match="Another process is training 'reviews'"),
    ):
        train(settings())


def test_unwritable_folders_are_refused(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="file is not a folder: choose another --adapters-dir"):
        train(settings(adapters_dir="file"))
    with pytest.raises(TrainingError, match="file is not a folder: choose another --runs-dir"):
        train(settings(runs_dir="file"))


def test_foreign_folder_is_never_replaced(settings, tmp_path):
    (tmp_path / "work" / "docs").mkdir(parents=True)
    (tmp_path / "work" / "docs" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(
            TrainingError, match="work/docs is not a run, so it is not replaced: choose another --runs-dir or"
        ):
            train(settings(name="docs", runs_dir="work", overwrite=overwrite))
    assert (tmp_path / "work" / "docs" / "thesis.txt").read_text() == "mine"


def test_runs_dir_among_adapters_is_refused(settings, tmp_path):
    before = weights(train(settings(name="one")))
    with pytest.raises(
        TrainingError, match="adapters/one would be one folder, or one in the other: choose another --runs-dir"
    ):
        train(settings(name="one", runs_dir="adapters", overwrite=True))
    assert weights(adapters_adapter.load_adapter_folder(tmp_path / "adapters" / "one")) == before


def test_kept_checkpoints_need_overwrite(settings, tmp_path):
    train(settings(keep_checkpoints=True))
    (tmp_path / "adapters" / "reviews").rename(tmp_path / "adapters" / "other")
    with pytest.raises(TrainingError, match="runs/reviews holds the checkpoints of a finished run: discard them"):
        train(settings())
    assert list((tmp_path / "runs" / "reviews").glob("checkpoint-*"))
    (tmp_path / "runs" / "reviews" / ".last-good.0a.lora_tuner-new").mkdir()  # of a killed process
    train(settings(overwrite=True))
    assert not (tmp_path / "runs" / "reviews").exists()


def test_missing_dataset_leaves_no_run(settings, tmp_path):
    with pytest.raises(DataError):
        train(settings(dataset="nothing.csv"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_keep_checkpoints_keeps_them(settings, tmp_path):
    train(settings(keep_checkpoints=True, save_every=3))
    checkpoint = tmp_path / "runs" / "reviews" / "checkpoint-6"
    assert adapters_adapter.load_adapter_folder(checkpoint).rank == 4
    assert (checkpoint / checkpoints.HASHES_FILE).is_file()


def test_train_in_another_thread(settings):
    done = []
    thread = threading.Thread(target=lambda: done.append(train(settings())))
    thread.start()
    thread.join()
    assert done[0].manifest.run.steps == 6


def test_kept_checkpoints_are_not_resumable(settings):
    train(settings(keep_checkpoints=True))
    with pytest.raises(TrainingError, match="There is no unfinished run"):
        resume("reviews")
    assert train(settings(overwrite=True)).manifest.run.steps == 6


def test_resume_with_other_versions_is_refused(settings, monkeypatch):
    with pytest.raises(Interrupted):
        train(settings(), StopAt(2))
    monkeypatch.setattr("peft.__version__", "0.0.1")
    with pytest.raises(TrainingError, match=r"changed since it stopped: peft \(was .*, is 0\.0\.1\)"):
        resume("reviews")


@pytest.mark.slow
def test_moved_run_resumes_bitwise(settings, tmp_path):
    how = {
        "learning_rate": 0.2,
        "schedule": "constant",
        "eval_every": 2,
        "patience": 2,
        "max_rows": 40,
        "max_steps": 20,
    }
    whole = train(settings(name="whole", **how))
    with pytest.raises(Interrupted):
        train(settings(**how), StopAt(4))
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert weights(resume("reviews", tmp_path / "moved")) == weights(whole)


# Rows to measure on that are not its own
