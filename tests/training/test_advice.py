"""Advice at the end of a run, on made-up curves of each kind."""

import math
import random

import pytest

from lora_tuner import Notice, train
from lora_tuner.adapters.manifest import EvalResult
from lora_tuner.config import TrainConfig
from lora_tuner.training.advice import describe_length, higher_rate, lower_rate, rate_advice
from lora_tuner.training.setup import TrainingSetup, prepare_training

GOOD = (0.1, 0.01)


def curve(shape, steps=100, noise=0.2, seed=0):
    """Log entries of a curve from 0 to 1, with the noise of batches that differ in size."""
    draw = random.Random(seed)
    entries = []
    for step in range(steps):
        tokens = draw.choice((50, 300, 500))
        loss = 3.5 + shape(step / (steps - 1)) + draw.gauss(0, noise * math.sqrt(300 / tokens))
        entries.append({"step": step + 1, "loss": loss, "tokens": tokens})
    return entries


def result(gain, error, rows=100, groups=None):
    return EvalResult(
        base_loss=3.5, loss=3.5 - gain, gain=gain, standard_error=error, rows=rows, tokens=1000, groups=groups
    )


def advice(shape, measured=GOOD, rate=2e-3, steps_per_epoch=1000, **options):
    return rate_advice(curve(shape, **options), result(*measured), rate, "lora", steps_per_epoch)


SHAPES = {
    "falls": lambda at: -0.5 * at,
    "falls, then flat": lambda at: -0.5 * min(5 * at, 1),
    "flat": lambda at: 0.0,
    "rises, then recovers": lambda at: 4 * at * (1 - at) - 0.4 * at,
    "spike": lambda at: 3.0 * (0.45 < at < 0.55),
}


@pytest.mark.parametrize("steps", [4, 10, 25, 100, 400])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_good_gain_gives_no_advice(shape, steps):
    assert sum(advice(shape, steps=steps, seed=seed) is not None for seed in range(20)) == 0


def test_flat_curves_seldom_seem_to_rise():
    told = [
        advice(SHAPES["flat"], steps=steps, noise=0.5, seed=seed) for steps in (10, 20, 50) for seed in range(300)
    ]
    assert sum(text is not None for text in told) <= 5


def test_waves_of_loss_are_no_rise():
    """Neighbouring steps are alike, as where rows come in an order."""
    assert not any(
        advice(lambda at, phase=phase: 0.2 * math.sin(30 * at + phase), noise=0.05, steps=200)
        for phase in range(6)
    )


@pytest.mark.parametrize("measured", [GOOD, (-0.5, 0.01)])
@pytest.mark.parametrize(
    "shape",
    [lambda at: at, lambda at: -0.5 * min(4 * at, 1) + 2 * max(at - 0.4, 0), lambda at: 3 * at**2],
    ids=["rises", "falls, then rises", "diverges"],
)
@pytest.mark.parametrize("steps", [40, 400])
def test_rising_loss_names_lower_rate(shape, measured, steps):
    text = advice(shape, measured, steps=steps)
    assert text.startswith("The training loss rose by ")
    assert text.endswith("the learning rate 0.002 is too high. Try --learning-rate 0.0002.")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_negative_gain_names_lower_rate(shape):
    text = advice(shape, (-0.05, 0.01))
    assert text == (
        "The adapter is worse than its base: held-out loss 3.500 -> 3.550. Try a lower learning rate than "
        "0.002, such as 0.0002 (--learning-rate), or fewer steps."
    )


def test_moved_rows_without_gain_name_lower_rate():
    text = advice(SHAPES["flat"], (0.017, 0.009), steps=25)
    assert text.startswith("The gain 0.017 ± 0.009 is within its error of nothing, while losses of rows moved")
    assert text.endswith("Try --learning-rate 0.0007.")


@pytest.mark.parametrize(("gain", "error"), [(1e-6, 1e-6), (-1e-6, 1e-6), (0.0, 0.0), (1e-4, 1e-4)])
def test_loss_that_hardly_moved_names_higher_rate(gain, error):
    text = advice(SHAPES["flat"], (gain, error), rate=1e-6)
    assert "as the loss hardly moved: the learning rate 1e-06 is too low. Try --learning-rate 1e-05." in text


def test_falling_loss_without_gain_tells_why():
    fresh, repeated = (
        advice(SHAPES["falls"], (0.01, 0.01), steps_per_epoch=count, noise=0.05) for count in (1000, 20)
    )
    assert "although the training loss fell: 100 rows may be too few to measure it (--eval-rows)" in fresh
    assert "although the training loss fell: the rows are learned by heart." in repeated
    assert fresh.endswith("try --learning-rate 0.0007.")
    assert repeated.endswith("Try --learning-rate 0.0007, or fewer steps.")


@pytest.mark.parametrize(("gain", "expected"), [(0.01, None), (-0.5, "The adapter is worse than its base")])
def test_single_row_counts_only_if_worse(gain, expected):
    text = rate_advice(curve(SHAPES["flat"]), result(gain, None, rows=1), 2e-3, "lora", None)
    assert text is None if expected is None else text.startswith(expected)


@pytest.mark.parametrize(("parent_loss", "is_worse"), [(None, False), (3.2, False), (2.99, False), (2.9, True)])
def test_worse_than_parent_names_rate(parent_loss, is_worse):
    measured = result(0.5, 0.02)  # a loss of 3.0
    text = rate_advice(curve(SHAPES["flat"]), measured, 2e-3, "lora", None, parent_loss)
    expected = (
        "The adapter is worse than the one it continues: held-out loss 2.900 -> 3.000. Try --learning-rate 0.0007, "
        "or keep that one."
    )
    assert text == (expected if is_worse else None)


@pytest.mark.parametrize(
    ("gain", "points", "said"),
    [
        (
            -0.3,
            [3.5, 3.0, 3.4, 3.8],
            "The adapter is worse than its base: held-out loss 3.500 -> 3.800. The held-out",
        ),
        (0.2, [3.5, 3.0, 3.4, 3.3], "The run was too long. The held-out curve was lowest at step 10, and then"),
        (0.4, [3.5, 3.0, 3.1, 3.1], None),
        (0.4, [3.5, 3.4, 3.2, 3.1], None),
        (
            -0.3,
            [3.5, 3.6, 3.7, 3.8],
            "The adapter is worse than its base: held-out loss 3.500 -> 3.800. After 8 passes over the same rows",
        ),
    ],
)
@pytest.mark.parametrize("name", ["eval_subset_loss", "eval_loss"])
def test_curve_beyond_its_minimum_names_step(gain, points, said, name):
    entries = curve(SHAPES["falls"], steps=30)
    entries += [
        {"step": 10 * number, name: loss} for number, loss in enumerate(points) if number or "subset" in name
    ]
    text = rate_advice(entries, result(gain, 0.01), 2e-3, "lora", 4)
    assert text is None if said is None else text.startswith(said)
    is_named = text is not None and "take --max-steps 10, or --eval-every 10 --patience 2" in text
    assert is_named == (min(points) == 3.0 and said is not None)


def test_worse_after_many_passes_ends_earlier():
    """Few rows are noisy, but not the loss of all beyond that of the base."""
    losses = [3.50, 3.45, 3.60, 3.9]
    entries = [
        {"step": 10 * number, "eval_subset_loss": loss, "eval_subset_rows": 2}
        for number, loss in enumerate(losses)
    ]
    steps = curve(SHAPES["falls"], steps=30)
    text = rate_advice([*steps, *entries], result(-0.3, 0.1), 2e-3, "lora", 2)
    assert "lowest at step 10, and then the rows were learned by heart: take --max-steps 10" in text
    text = rate_advice(steps, result(-0.3, 0.1), 2e-3, "lora", 2)
    assert "take --epochs 1, or --eval-every 2 --patience 2 to keep the best step. If that is worse too" in text
    assert "Try a lower learning rate" in rate_advice(steps, result(-0.3, 0.1), 2e-3, "lora", 20)


def test_noise_of_few_rows_is_no_minimum():
    entries = [
        {"step": 4 * number, "eval_subset_loss": loss, "eval_subset_rows": 4}
        for number, loss in enumerate([3.50, 3.49, 3.46, 3.51])
    ]
    assert rate_advice(entries, result(0.1, 0.01), 2e-3, "lora", 4) is None


def test_kept_best_step_is_not_too_late():
    entries = [{"step": 10 * number, "eval_loss": loss} for number, loss in enumerate([3.0, 3.4, 3.8], 1)]
    assert rate_advice(entries, result(0.5, 0.01), 2e-3, "lora", 4) is None


def test_many_passes_are_told():
    assert describe_length(TrainConfig(minutes=2), 16, 4) == "The run takes 16 steps; one epoch is 4."
    assert describe_length(TrainConfig(minutes=2), 63, 4) == (
        "The run takes 63 steps; one epoch is 4. 16 passes over the same rows may learn them by heart: --epochs 3 ends "
        "earlier, --eval-every 4 --patience 2 keeps the best step."
    )
    for given in ({"epochs": 16}, {"minutes": 2, "patience": 2, "eval_every": 4}):
        assert describe_length(TrainConfig(**given), 63, 4) == "The run takes 63 steps; one epoch is 4."
    assert describe_length(TrainConfig(streaming=True, max_steps=1), 1, None) == "The run takes 1 step."


def test_parent_loss_needs_same_rows(settings, monkeypatch):
    parent = train(settings(max_steps=12))
    child = settings(parent="reviews", name="child", learning_rate=1e-6, max_steps=1)
    setup = prepare_training(child)
    assert setup.parent_loss == parent.manifest.result.loss
    setup.remove_lora()
    assert prepare_training(child.model_copy(update={"eval_rows": 4})).parent_loss is None
    monkeypatch.setattr(TrainingSetup, "parent_loss", 0.5)
    assert train(child).manifest.run.advice.startswith("The adapter is worse than the one it continues")


def test_named_rates_lead_to_those_of_method():
    assert [lower_rate(rate, 10, "lora") for rate in (1e20, 1.0, 2e-3, 3e-4)] == [2e-3, 2e-3, 2e-4, 3e-5]
    assert [higher_rate(rate, "lora") for rate in (1e-8, 1e-4, 1e-3, 2e-3)] == [1e-7, 1e-3, 3e-3, 6e-3]


def test_advice_is_in_notice_manifest_card(settings):
    told = []
    adapter = train(settings(learning_rate=1e-12), told.append)
    text = adapter.manifest.run.advice
    assert text.startswith("The gain ")
    assert text.endswith(
        "as the loss hardly moved: the learning rate 1e-12 is too low. Try --learning-rate 1e-11."
    )
    assert [event.text for event in told if isinstance(event, Notice)][-1] == text
    assert f"| Advice | {text} |" in (adapter.path / "README.md").read_text()
