"""Steps measured before the run, and the stop rules that become steps."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_tuner import Notice, Progress, plan, train
from lora_tuner.adapters import adapter as adapters_adapter
from lora_tuner.errors import ignore_events
from lora_tuner.training import profiling
from lora_tuner.training.setup import prepare_training

from .test_run import weights


def test_minutes_become_steps(settings, monkeypatch):
    told = []
    config = settings(max_steps=None, minutes=0.02)
    adapter = train(config, told.append)
    assert Progress("measuring speed", 4, 4) in told
    text = f"The run takes {adapter.manifest.run.steps} steps; one epoch is {plan(config).steps_per_epoch}."
    assert any(isinstance(event, Notice) and event.text.startswith(text) for event in told)


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


@pytest.mark.slow
def test_profiling_does_not_change_result(settings):
    measured = train(settings(max_steps=None, minutes=0.01, dropout=0.1))
    counted = train(settings(max_steps=measured.manifest.run.steps, dropout=0.1, name="counted"))
    assert weights(measured) == weights(counted)


def test_curve_takes_few_percent(settings, monkeypatch):
    setup = prepare_training(settings(eval_rows=100))
    assert setup.curve is None  # it would be measured after each step
    monkeypatch.setattr(profiling, "SHORT_CURVE_TOKENS", 500)
    sizes = []
    for steps in (80, 120, 250, 10_000):
        curve = profiling.plan_curve(setup, steps)
        assert 5 <= len(range(curve.every, steps, curve.every)) <= 7  # beside one after the last step
        assert curve_tokens(setup, curve, steps) <= 0.03 * steps * profiling.tokens_per_step(setup) / 0.5
        sizes.append(len(curve.rows))
    assert sizes == sorted(sizes)
    assert curve.rows == [*range(len(setup.held_out))]
    monkeypatch.setattr(profiling, "CURVE_ROWS", (2, 5))
    assert profiling.plan_curve(setup, 10_000).rows == [0, 1, 2, 3, 4]


def curve_tokens(setup, curve, steps):
    return math.ceil(steps / curve.every) * sum(len(setup.held_out[row]) for row in curve.rows)


def test_short_run_has_curve(settings, monkeypatch):
    """Of at most so many tokens, and a fifth of the run; of long rows it has fewer points."""
    setup = prepare_training(settings(eval_rows=100))
    monkeypatch.setattr(profiling, "SHORT_CURVE_TOKENS", 2000)
    for steps in (9, 30, 100):
        curve = profiling.plan_curve(setup, steps)
        tokens = curve_tokens(setup, curve, steps)
        assert len(curve.rows) >= 2
        assert 5 <= math.ceil(steps / curve.every) <= 8
        assert tokens <= min(2000, 0.2 * steps * profiling.tokens_per_step(setup) / profiling.HELD_OUT_COST)
        before = profiling.plan_curve(setup, steps, is_short_allowed=False)
        assert before is None or len(before.rows) < len(curve.rows)
    longest = max(setup.held_out, key=len)
    monkeypatch.setattr(profiling, "SHORT_CURVE_TOKENS", 2 * len(longest) * 5)
    monkeypatch.setitem(vars(setup), "held_out", [longest] * 4)
    assert math.ceil(30 / profiling.plan_curve(setup, 30).every) == 5


def test_general_text_takes_small_share():
    """In tokens: of steps, each as two measured ones, and of the held-out rows, before and after."""
    held_out = SimpleNamespace(held_out=[range(250)] * 200)
    assert profiling.general_budget(held_out, 0) == 0.03 * 2 * 50_000
    assert profiling.general_budget(held_out, 100_000) == 0.03 * (2 * 50_000 + 2 * 100_000)


def test_tokens_per_step_follow_weights(settings):
    for name, words in (("long", 16), ("short", 2)):
        rows = "".join(json.dumps({"text": f"{number} {'word ' * words}"}) + "\n" for number in range(20))
        Path(f"{name}.jsonl").write_text(rows)
    datasets = [["long.jsonl=0.9", "short.jsonl=0.1"], ["long.jsonl=0.1", "short.jsonl=0.9"]]
    setups = [prepare_training(settings(dataset=dataset, packing=False, max_length=128)) for dataset in datasets]
    long, short = (profiling.tokens_per_step(setup) for setup in setups)
    lengths = [len(row) for row in setups[0].sequences.rows]
    assert long == pytest.approx(2 * (0.9 * max(lengths) + 0.1 * min(lengths)), rel=0.1)
    assert short == pytest.approx(2 * (0.1 * max(lengths) + 0.9 * min(lengths)), rel=0.1)


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


def test_plan_tells_many_passes(settings):
    advice = plan(settings(max_rows=20, max_steps=50)).advice
    assert "passes over the same rows may learn them by heart: --epochs 3 ends earlier" in advice


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
