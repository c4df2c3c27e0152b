import itertools
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

from lora_tuner import Interrupted, Library, ModelOptions, Notice, Progress, evaluation, plan, resume, train
from lora_tuner.adapters import adapter as adapters_adapter
from lora_tuner.config import TrainConfig
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.splitting import content_hash
from lora_tuner.errors import AdapterError, BaseModelError, DataError, DivergedError, TrainingError, ignore_events
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.settings_files import resolve_settings
from lora_tuner.training import checkpoints, profiling
from lora_tuner.training.preview import preview
from lora_tuner.training.setup import prepare_training

from .. import tiny_models


def weights(adapter):
    return (adapter.path / adapters_adapter.WEIGHTS_FILE).read_bytes()


def history(adapter):
    return [json.loads(line) for line in (adapter.path / adapters_adapter.METRICS_FILE).read_text().splitlines()]


def test_run_leaves_only_the_adapter(adapter, tmp_path):
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
    rows = evaluation.encode_held_out(base, corpus.held_out[:20])
    assert result.base_loss == pytest.approx(evaluation.measure_loss(base.model, base, rows).loss, abs=1e-6)
    assert (result.rows, result.tokens) == (len(rows), sum(len(row) - 1 for row in rows))


@pytest.mark.parametrize("packing", [True, False])
def test_logged_loss_equals_measured_loss(settings, model_folder, tmp_path, packing):
    """Trainer's own figure is too low for GPT-2: it divides by labels that nothing predicts."""
    shutil.copytree(model_folder, tmp_path / "base")
    config = json.loads((model_folder / "config.json").read_text())
    still = dict.fromkeys(
        ("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0
    )  # else the loss in training is another one
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | still))
    # One step over all rows, in micro-batches of unequal length: there is one true figure for it.
    setup = prepare_training(settings(base="base", max_rows=40, packing=packing))
    accumulation = -(-len(setup.sequences) // 3)
    logged = history(
        train(
            setup.config.model_copy(
                update={"batch_size": 3, "gradient_accumulation": accumulation, "max_steps": 1}
            )
        )
    )
    base = load_base(find_base("base"), ModelOptions(device="cpu"))
    true = evaluation.measure_loss(base.model, base, setup.sequences.rows)
    assert len(logged) == 1
    assert logged[0]["tokens"] == sum(true.predictions)
    assert logged[0]["loss"] == pytest.approx(true.loss, abs=1e-4)


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
    assert [entry["loss"] for entry in history(resumed)] == [entry["loss"] for entry in history(whole)]
    assert resumed.manifest.run.tokens == whole.manifest.run.tokens
    assert not (Library().path.parent / "runs" / "reviews").exists()


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
        patch.setattr(evaluation, "paired_gain", interrupted)
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


def test_non_finite_loss_keeps_last_good(settings):
    with pytest.raises(DivergedError) as error:
        train(settings(learning_rate=1e20, max_grad_norm=1e20, warmup=0, max_steps=20))
    assert "The last good adapter is in runs/reviews/last-good. Try a lower learning rate than 1e+20" in str(
        error.value
    )
    kept = adapters_adapter.load_adapter_folder(Path("runs/reviews/last-good"))
    from safetensors.torch import load_file

    assert all(
        torch.isfinite(tensor).all() for tensor in load_file(kept.path / adapters_adapter.WEIGHTS_FILE).values()
    )
    assert not (Library().path / "reviews").exists()


def test_non_finite_gradient_stops_run(settings, monkeypatch):
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    forward = GPT2LMHeadModel.forward

    def poison(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if output.logits.requires_grad:
            output.logits.register_hook(lambda gradient: gradient * float("nan"))
        return output

    monkeypatch.setattr(GPT2LMHeadModel, "forward", poison)
    with pytest.raises(DivergedError, match="A gradient is not finite in step 1"):
        train(settings())


def test_patience_keeps_best_step(settings):
    notices = []
    adapter = train(
        settings(learning_rate=0.2, schedule="constant", max_steps=60, eval_every=2, patience=2, max_rows=40),
        notices.append,
    )
    run, measured = (
        adapter.manifest.run,
        {e["step"]: e["eval_loss"] for e in history(adapter) if "eval_loss" in e},
    )
    best = min(measured, key=measured.get)
    assert run.steps == best + 4 < 60
    assert run.kept_step == best
    assert adapter.manifest.result.loss == pytest.approx(measured[best], abs=1e-6)


def test_minutes_become_steps(settings, monkeypatch):
    told = []
    config = settings(max_steps=None, minutes=0.02)
    adapter = train(config, told.append)
    assert Progress("measuring speed", 4, 4) in told
    assert (
        Notice(f"The run takes {adapter.manifest.run.steps} steps; one epoch is {plan(config).steps_per_epoch}.")
        in told
    )


def test_no_stop_rule_limits_the_epoch(settings, monkeypatch):
    told = []
    assert profiling.steps_for_stop_rule(settings(max_steps=None), 50, 0.001, told.append) == 50
    assert told == []
    assert profiling.steps_for_stop_rule(settings(max_steps=None), 50, 600.0, told.append) == 1
    assert "One epoch would take" in told[0].text
    assert "training is limited to 10 minutes" in told[0].text


def test_epochs_become_steps(settings):
    adapter = train(settings(max_steps=None, epochs=1.5, batch_size=4))
    per_epoch = -(-adapter.manifest.run.sequences // 4)
    assert adapter.manifest.run.steps == -(-3 * per_epoch // 2)


def test_plan_writes_nothing(settings, tmp_path):
    cost = plan(settings(max_steps=None, epochs=3, eval_every=5))
    assert cost.steps == 3 * cost.steps_per_epoch
    assert cost.training_seconds == pytest.approx(cost.steps * cost.seconds_per_step)
    assert min(cost.held_out_seconds, cost.peak_memory_bytes, cost.tokens_per_second) > 0
    adapter = train(settings())
    assert abs(adapter.path.joinpath(adapters_adapter.WEIGHTS_FILE).stat().st_size - cost.adapter_bytes) < 4096
    assert cost.trained_parameters == adapter.parameters
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "reviews.csv", "runs"]


def test_profiling_does_not_change_result(settings):
    measured = train(settings(max_steps=None, minutes=0.01, dropout=0.1))
    counted = train(settings(max_steps=measured.manifest.run.steps, dropout=0.1, name="counted"))
    assert weights(measured) == weights(counted)


def test_profile_ignores_one_slow_step(settings, monkeypatch):
    setup = prepare_training(settings())
    times = iter(itertools.accumulate([0, 5, 0, 1, 0, 30, 0, 1, 0, 1]))  # of four steps and a held-out batch
    with monkeypatch.context() as patched:
        patched.setattr(profiling.time, "perf_counter", lambda: next(times))
        profile = profiling.profile_steps(setup, setup.model, setup.learning_rate, 1.0, ignore_events)
    assert profile.seconds_per_step == pytest.approx(1, rel=0.5)
    requested = settings(max_steps=None, minutes=1)
    steps = profiling.steps_for_stop_rule(
        requested, setup.steps_per_epoch, profile.seconds_per_step, ignore_events
    )
    assert steps * profile.seconds_per_step == pytest.approx(60, rel=0.05)


def test_held_out_rows_are_not_trained(settings, monkeypatch):
    config = settings()
    setup = prepare_training(config)
    trained = {setup.base.tokenizer.decode(row[:-1]) for row in setup.sequences.rows}
    held_out = {setup.base.tokenizer.decode(row[:-1]) for row in setup.held_out}
    assert trained
    assert held_out
    assert not trained & held_out


def test_long_rows_are_chunked(settings, tmp_path):
    (tmp_path / "long.csv").write_text("text\n" + "\n".join(f"{i} " + "word " * 60 for i in range(40)))
    run = {"dataset": "long.csv", "max_length": 32, "packing": False, "max_steps": 1}
    cut = train(settings(**run, name="cut", long_rows="truncate")).manifest
    chunked = train(settings(**run, name="chunked")).manifest
    assert cut.run.truncated_rows == cut.data.counts["train"] == cut.run.sequences
    assert chunked.run.sequences > 2 * cut.run.sequences
    assert (chunked.run.truncated_rows, chunked.run.used_share) == (0, 1)
    assert cut.run.used_share < 0.5


def test_default_max_length_fits_the_context(settings):
    config = settings()
    told = []
    adapter = train(TrainConfig(**config.model_dump(exclude_unset=True, exclude={"max_length"})), told.append)
    assert f"max_length: {tiny_models.CONTEXT}" in (adapter.path / adapters_adapter.RUN_FILE).read_text()
    assert any(
        f"Rows have at most {tiny_models.CONTEXT} tokens" in event.text
        for event in told
        if isinstance(event, Notice)
    )


def test_max_length_beyond_context_is_refused(settings):
    with pytest.raises(
        TrainingError, match=f"max_length is 512, but the context length of .* is {tiny_models.CONTEXT} tokens"
    ):
        train(settings(max_length=512))


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


def test_preview_shows_learned_tokens(settings):
    (row,) = preview(settings(max_length=tiny_models.CONTEXT), 1)
    assert row.tokens[-1] == tiny_models.END
    assert row.labels == [False] + [True] * (len(row.tokens) - 1)
    assert "".join(row.tokens[:-1]) == row.after == row.before


@pytest.mark.parametrize(("batch_size", "gradient_accumulation"), [(2, 4), (8, 2), (1, 8)])
def test_plan_with_few_rows(settings, batch_size, gradient_accumulation):
    cost = plan(
        settings(
            max_rows=20,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            minutes=0.01,
            max_steps=None,
        )
    )
    assert cost.steps >= 1


def test_first_step_learns(settings):
    assert train(settings(max_steps=1)).manifest.result.gain != 0


def test_learning_rate_schedules(settings):
    rates = [entry["learning_rate"] for entry in history(train(settings(max_steps=8, warmup=0.3)))]
    assert rates == pytest.approx(
        [1e-2 * share for share in (1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]
    )
    rates = [
        entry["learning_rate"] for entry in history(train(settings(max_steps=3, schedule="constant", name="c")))
    ]
    assert rates == pytest.approx([1e-2] * 3)
    rates = [
        entry["learning_rate"] for entry in history(train(settings(max_steps=2, schedule="cosine", name="d")))
    ]
    assert rates == pytest.approx([1e-2, 5e-3])


def test_diverged_last_step_makes_no_adapter(settings):
    with pytest.raises(DivergedError):
        train(settings(learning_rate=1e30, max_grad_norm=1e30, warmup=0, max_steps=2))
    assert Library().names() == []
    with pytest.raises(DivergedError):
        train(settings(learning_rate=1e30, max_grad_norm=1e30, warmup=0, max_steps=6, eval_every=1, name="b"))
    assert Library().names() == []


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


def other_model(folder, kind):
    from transformers import OPTConfig, OPTForCausalLM, RobertaConfig, RobertaForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 320, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    if kind == "opt":
        extra = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
        model = OPTForCausalLM(OPTConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1, **size, **extra))
    else:
        model = RobertaForCausalLM(RobertaConfig(intermediate_size=64, max_position_embeddings=130, **size))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def test_base_without_position_ids_is_padded(settings, tmp_path):
    base = other_model(tmp_path / "opt", "opt")
    told = []
    adapter = train(settings(base=str(base), long_rows="truncate"), told.append)
    assert any("Rows are padded, not packed" in event.text for event in told if isinstance(event, Notice))
    assert "packing: false" in (adapter.path / adapters_adapter.RUN_FILE).read_text()
    assert adapter.manifest.run.sequences == adapter.manifest.data.counts["train"]
    with pytest.raises(TrainingError, match="does not isolate packed rows: leave out --packing"):
        train(settings(base=str(base), packing=True, name="b"))


def test_bidirectional_model_is_refused(settings, tmp_path):
    base = other_model(tmp_path / "roberta", "roberta")
    with pytest.raises(
        BaseModelError, match="roberta sees tokens that come later: it is not a causal language model"
    ):
        train(settings(base=str(base)))


# Rows to measure on that are not its own


@pytest.fixture
def films(tmp_path):
    """Twenty rows to measure on; four of them are rows of the training data too."""
    texts = [*tiny_models.reviews(120)[:4], *tiny_models.reviews(16, seed=3)]
    (tmp_path / "films.csv").write_text("text,label\n" + "".join(f"{text},1\n" for text in texts))
    return texts


def test_eval_dataset_is_not_trained_on(settings, films, tmp_path):
    alone, setup = prepare_training(settings()), prepare_training(settings(eval_dataset="films.csv"))
    assert alone.manifest.data.eval_dataset is None
    measured, held_out = set(films), set(alone.dataset.held_out)
    trained = {setup.base.tokenizer.decode(row[:-1]) for row in setup.sequences.rows}
    assert set(alone.dataset.train) & measured
    assert set(setup.dataset.train) == set(alone.dataset.train) - measured
    assert not set(setup.dataset.train) & (measured | held_out)
    assert not trained & measured
    assert set(setup.dataset.held_out) == measured
    assert setup.held_out_texts == setup.dataset.held_out[:8]
    adapter = train(settings(eval_dataset="films.csv"))
    facts, result = adapter.manifest.data, adapter.manifest.result
    assert facts.eval_dataset == "films.csv"
    assert facts.held_out_hash == content_hash(setup.held_out_texts) != alone.manifest.data.held_out_hash
    assert facts.held_out_rows == result.rows == 8
    assert facts.counts["in_eval_dataset"] == len(set(alone.dataset.train) & measured)
    assert facts.counts["held_out"] == len(held_out)
    assert facts.counts["read"] == sum(facts.counts.values()) - facts.counts["read"]
    assert evaluation.cached_rows(adapter) == evaluation.EvalSet("reviews", setup.held_out_texts)
    assert result.base_loss == pytest.approx(
        evaluation.measure_loss(setup.base.model, setup.base, setup.held_out).loss, abs=1e-6
    )
    assert "\neval_dataset: films.csv\n" in (adapter.path / adapters_adapter.RUN_FILE).read_text()
    assert "| Evaluated on | films.csv |" in (adapter.path / adapters_adapter.CARD_FILE).read_text()
    again = train(resolve_settings(TrainConfig, {"name": "again"}, adapter.path / adapters_adapter.RUN_FILE))
    assert weights(again) == weights(adapter)


def test_measured_split_file_is_recorded_and_repeated(settings, tmp_path):
    texts = tiny_models.reviews(80)
    (tmp_path / "data").mkdir()
    for name, rows in (("train", texts[49::-1]), ("dev", texts[45:70]), ("test", texts[70:])):
        (tmp_path / "data" / f"{name}.csv").write_text("text\n" + "".join(f"{text}\n" for text in rows))
    adapter = train(settings(dataset="data", eval_rows=100))
    facts = adapter.manifest.data
    assert (facts.eval_dataset, facts.eval_split, facts.held_out_rows) == ("data", "validation", 25)
    assert set(evaluation.cached_rows(adapter).texts) == set(texts[45:70])
    assert facts.counts["read"] == 50
    assert "| Evaluated on | data (validation) |" in (adapter.path / adapters_adapter.CARD_FILE).read_text()
    again = train(resolve_settings(TrainConfig, {"name": "again"}, adapter.path / adapters_adapter.RUN_FILE))
    assert (weights(again), again.manifest.data) == (weights(adapter), facts)
    stream = train(settings(dataset="data", streaming=True, shuffle_buffer=20, name="stream"))
    assert (stream.manifest.data.eval_split, stream.manifest.data.held_out_rows) == ("validation", 8)
    assert stream.manifest.data.counts["in_eval_dataset"] > 0


def test_run_of_local_file_repeats_with_explicit_defaults(settings):
    adapter = train(settings())
    written = yaml.safe_load((adapter.path / adapters_adapter.RUN_FILE).read_text())
    assert not {"split", "eval_split", "shuffle_buffer"} & written.keys()
    old = adapter.path / "old.yaml"
    old.write_text(yaml.safe_dump(written | {"split": "train", "shuffle_buffer": 10_000, "name": "old"}))
    assert weights(train(resolve_settings(TrainConfig, {}, old))) == weights(adapter)


def test_resume_with_changed_eval_dataset_is_refused(settings, films, tmp_path):
    text = (tmp_path / "films.csv").read_text()
    with pytest.raises(Interrupted):
        train(settings(eval_dataset="films.csv", eval_rows=100), StopAt(2))
    (tmp_path / "films.csv").write_text(text + "one more row,1\n")
    with pytest.raises(TrainingError, match=r"changed since it stopped: data \(was .*\), held-out rows \(was "):
        resume("reviews")
    (tmp_path / "films.csv").write_text(text)
    assert resume("reviews").manifest.result.rows == 20


def test_wrong_eval_dataset_leaves_no_run(settings, tmp_path):
    (tmp_path / "empty.csv").write_text("text,label\n")
    for name, why in (
        ("empty.csv", r"^empty\.csv has no rows\.$"),
        ("none.csv", r"^There is no dataset 'none\.csv'"),
    ):
        with pytest.raises(DataError, match=why):
            train(settings(eval_dataset=name))
    assert list((tmp_path / "runs").iterdir()) == []
    assert Library().names() == []
