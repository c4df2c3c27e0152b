"""The training loop: loss, schedules, early stopping, divergence."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lora_tuner import Library, ModelOptions, Notice, atomic_io, resume, train
from lora_tuner.adapters import adapter as adapters_adapter
from lora_tuner.errors import DivergedError
from lora_tuner.evaluation import held_out_loss
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.training.setup import prepare_training

from .test_run import history, weights


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
    true = held_out_loss.measure_loss(base.model, base, setup.sequences.rows)
    assert len(logged) == 1
    assert logged[0]["tokens"] == sum(true.predictions)
    assert logged[0]["loss"] == pytest.approx(true.loss, abs=1e-4)


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


def curve_of(adapter):
    """Points of the held-out curve by step."""
    return {entry["step"]: entry for entry in history(adapter) if "eval_subset_loss" in entry}


def test_curve_is_on_fixed_subset(settings):
    told, config = [], settings(max_steps=32, batch_size=4, eval_rows=100)
    adapter = train(config, told.append)
    points, result = curve_of(adapter), adapter.manifest.result
    assert [*points] == [*range(0, 33, 4)]
    (rows,) = {point["eval_subset_rows"] for point in points.values()}
    assert 2 <= rows < result.rows
    setup = prepare_training(config)
    measured = held_out_loss.measure_base_loss(setup.base, [setup.held_out[row] for row in setup.curve.rows])
    assert points[0]["eval_subset_loss"] == pytest.approx(measured.loss, abs=1e-6)
    notices = [event.text for event in told if isinstance(event, Notice)]
    for step in (4, 28):
        loss = points[step]["eval_subset_loss"]
        base = f" (base: {measured.loss:.3f})" if step == 4 else ""
        assert f"Step {step}: held-out loss {loss:.3f} on the subset of {rows} rows{base}." in notices
    assert f"Every 4 steps: held-out loss on a fixed subset, {rows} of {result.rows} rows." in notices
    everything = train(settings(max_steps=32, batch_size=4, eval_rows=100, eval_every=16, name="all"))
    assert weights(everything) == weights(adapter)
    assert everything.manifest.result == result
    assert [entry["step"] for entry in history(everything) if "eval_loss" in entry] == [0, 16, 32]
    assert not curve_of(everything)


def test_older_run_resumes_its_curve(settings, stop_at):
    """Its manifest tells: short runs had no curve."""
    config = settings(max_steps=12, name="whole")
    whole = train(config)
    assert len(curve_of(whole)) == 1 + 6
    with stop_at(5):
        train(settings(max_steps=12))
    for folder in (Path("runs/reviews"), Path("runs/reviews/checkpoint-5")):
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["run"].pop("curve_rows") > 0
        (folder / "manifest.json").write_text(json.dumps(manifest))
    hashes = Path("runs/reviews/checkpoint-5/whole.json")
    hashes.unlink()
    atomic_io.write_hashes(hashes.parent)
    resumed = resume("reviews")
    assert max(curve_of(resumed), default=0) <= 5
    assert weights(resumed) == weights(whole)


def test_resumed_run_continues_curve(settings, stop_at):
    config = settings(max_steps=30, batch_size=8, dropout=0.1)
    whole = train(config)
    with stop_at(9):
        train(config.model_copy(update={"name": "stopped"}))
    assert curve_of(resume("stopped")) == curve_of(whole)
    assert [*curve_of(whole)] == [*range(0, 29, 4), 30]


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
