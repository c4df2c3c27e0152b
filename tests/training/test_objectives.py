"""Losses of preferences: what they compute, and runs with them."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from lora_tuner import Interrupted, Library, Notice, Progress, atomic_io, plan, resume, train
from lora_tuner.adapters.adapter import CARD_FILE, MANIFEST_FILE
from lora_tuner.adapters.gains import HeldOutLoss
from lora_tuner.adapters.growth import find_growth
from lora_tuner.adapters.manifest import EvalResult
from lora_tuner.adapters.preference_info import PairedFigure, PreferenceInfo
from lora_tuner.config import DEFAULT_BETA
from lora_tuner.data.packing import PackedSequences, collate
from lora_tuner.errors import DivergedError, TrainingError
from lora_tuner.evaluation import gain_matrix, held_out_loss
from lora_tuner.models import lora
from lora_tuner.training import objectives, preference_result, reference, sweep, sweep_result
from lora_tuner.training.learning_rate import RATE_SHARES
from lora_tuner.training.setup import prepare_training

from .. import tiny_models
from .preferences import answers, gradients, log_probabilities, pairs, perturb, plain_model, write_rows
from .test_run import StopAt, history, weights

OBJECTIVES = ["dpo", "orpo", "kto"]
QUICK = {
    "batch_size": 4,
    "max_steps": 4,
    "max_length": 64,
    "dtype": "float32",
    "eval_rows": 100,
    "near_duplicates": "keep",
}


@pytest.fixture
def preferring(settings):
    """Make a configuration for a run on preferences, of single answers with KTO."""

    def make(objective="dpo", rows=None, **changes):
        rows = rows or (answers if objective == "kto" else pairs)(60)
        return settings(dataset=write_rows(rows), objective=objective, **QUICK | changes)

    return make


# What is computed


def rows_in(*lengths):
    return [np.arange(1, length + 1, dtype=np.int32) for length in lengths]


@pytest.mark.parametrize("packing", [True, False])
def test_pairs_stay_in_one_sequence(packing):
    rows = rows_in(5, 9, 30, 2, 8, 8, 20, 20, 3, 4)
    sequences = PackedSequences(rows, 20, packing=packing, source_rows=[6, 4], unit=2)
    assert sorted(row for group in sequences.groups for row in group) == [*range(10)]
    assert sequences.source_sizes == ([2, 2] if packing else [3, 2])
    for index, group in enumerate(sequences.groups):
        assert group[1::2] == [row + 1 for row in group[::2]]
        assert sum(map(len, sequences[index])) <= 40
        assert sequences[index].numbers == group
    filler = sequences[len(sequences)]
    assert [len(row) for row in filler] == [1, 1]
    assert filler.numbers == [-1, -1]


def test_padding_has_places_of_rows():
    """A short pair beside a long one: a base with learned positions has none beyond its context."""
    batch = collate([rows_in(30, 30), rows_in(3, 4)], 0)
    places = batch["position_ids"]
    assert places.max() == 29
    assert places[0].tolist() == [*range(30), *range(30)]
    assert places[1].tolist() == [0, 1, 2, *range(30), *[29] * 27]
    assert collate([rows_in(1), rows_in(1, 1)], 0)["position_ids"].tolist() == [[0, 1], [0, 0]]


def test_rows_as_long_as_context_are_compared(preferring, tmp_path):
    base = tiny_models.save_model(tmp_path / "short", "gpt2", context=64)
    adapter = train(preferring("kto", base=str(base), max_steps=20, batch_size=4))
    assert adapter.manifest.run.steps == 20


def expected_loss(setup, model, base, items):
    """The loss by the formulas of the papers, one row at a time."""
    objective = setup.objective
    beta, total, units, text_total, text_tokens = objective.beta, 0.0, 0, 0.0, 0

    def logp(of, row):
        logps, is_label = log_probabilities(of, row)
        return logps[is_label].sum()

    def kl():
        numbers = [number for item in items for number in item.numbers]
        changes = [logp(model, objective.mismatched[n]) - logp(base, objective.mismatched[n]) for n in numbers]
        return torch.stack(changes).mean().clamp(min=0).detach()

    z = kl() if objective.name == "kto" else 0.0
    for item in items:
        for side in range(0, len(item), objective.unit):
            units += 1
            row = item[side]
            if objective.name == "kto":
                ratio = logp(model, row) - logp(base, row).detach()
                desired = objective.desired[item.numbers[side]]
                value = torch.sigmoid(beta * (ratio - z if desired else z - ratio))
                total = total + objective.weights[0 if desired else 1] * (1 - value)
                continue
            other = item[side + 1]
            if objective.name == "dpo":
                ratios = [logp(model, each) - logp(base, each).detach() for each in (row, other)]
                total = total - F.logsigmoid(beta * (ratios[0] - ratios[1]))
                continue
            means = []
            for each in (row, other):
                logps, is_label = log_probabilities(model, each)
                means.append(logps[is_label].mean())
            odds = [mean.exp() / (1 - mean.exp()) for mean in means]
            total = total - beta * F.logsigmoid((odds[0] / odds[1]).log())
            logps, _ = log_probabilities(model, row)
            text_total, text_tokens = text_total - logps.sum(), text_tokens + len(logps)
    return total / units + (text_total / text_tokens if text_tokens else 0.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_that_of_paper(preferring, model_folder, tmp_path, objective):
    """Loss and gradient of packed rows, with the chunked head, equal those of single rows."""
    setup = prepare_training(preferring(objective, beta=0.3, base=str(model_folder), max_steps=50))
    setup = reference.with_reference(setup)
    base = plain_model(setup, tmp_path / "start")
    perturb(setup)
    model = plain_model(setup, tmp_path / "now")
    items = [setup.sequences[index] for index in range(2)]
    expected = expected_loss(setup, model, base, items)
    expected.backward()
    setup.model.train()
    batch = setup.collate(items)
    loss = setup.loss(setup.model, batch, setup.count([batch]))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    ours, plain = gradients(setup.model, lora.ADAPTER_NAME), gradients(model)
    assert ours.keys() == plain.keys()
    assert max(float(gradient.abs().max()) for gradient in plain.values()) > 1e-3
    for name, gradient in plain.items():
        assert torch.allclose(ours[name], gradient, atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_loss_counts_pairs_of_step(preferring, objective):
    """However many micro-batches share them, of however many pairs each."""
    whole, parts = (
        train(
            preferring(objective, batch_size=size, gradient_accumulation=4 // size, max_steps=2, name=f"by{size}")
        )
        for size in (4, 1)
    )
    for figure in ("loss", "tokens"):
        assert [entry[figure] for entry in history(whole)] == pytest.approx(
            [entry[figure] for entry in history(parts)], abs=1e-5
        )


def test_filler_adds_nothing(preferring):
    for objective in OBJECTIVES:
        setup = reference.with_reference(prepare_training(preferring(objective, max_steps=50)))
        batch = setup.collate([setup.sequences[0]])
        with_filler = setup.collate([setup.sequences[0], setup.sequences[len(setup.sequences)]])
        count, count_with_filler = setup.count([batch]), setup.count([with_filler])
        assert count.tolist() == count_with_filler.tolist()
        losses = [setup.loss(setup.model, each, count).item() for each in (batch, with_filler)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        only_filler = setup.collate([setup.sequences[len(setup.sequences)]])
        loss = setup.loss(setup.model, only_filler, count)
        assert loss.item() == 0
        loss.backward()  # which other processes wait for
        assert all(not gradient.any() for gradient in gradients(setup.model).values())


def test_answers_meet_other_prompts():
    """Each prompt has the answer of the last row before it with another prompt."""
    rows = [
        np.array([~prompt, ~prompt, answer], dtype=np.int32)
        for prompt, answer in ((5, 1), (5, 2), (6, 3), (6, 4), (7, 8))
    ]
    mismatched = objectives.mismatch_rows(rows, 3)
    assert [(~int(row[0]), int(row[2])) for row in mismatched] == [(5, 8), (5, 8), (6, 2), (6, 2), (7, 4)]
    assert objectives.mismatch_rows(rows, 2)[0].tolist() == [~5, ~5]
    same = [rows[0], rows[1]]
    assert [int(row[2]) for row in objectives.mismatch_rows(same, 3)] == [2, 2]


def test_kto_weighs_fewer_answers_more(preferring):
    told = []
    objective = prepare_training(preferring("kto", answers(100, share=0.8)), told.append).objective
    desired = sum(objective.desired)
    undesired = len(objective.desired) - desired
    assert desired > 2 * undesired
    assert objective.weights == (1.0, desired / undesired)
    weight = f"{desired / undesired:.3g}"
    text = f"Objective kto, beta 0.1, on {desired} desired and {undesired} undesired answers: each undesired one"
    assert Notice(f"{text} weighs {weight} times as much, so that both kinds count alike.") in told


def test_kto_needs_both_kinds(preferring):
    encoded = SimpleNamespace(desired=[True] * 3, sequences=PackedSequences(rows_in(3, 4, 5), 8, packing=True))
    with pytest.raises(TrainingError, match="All 3 training rows are desired: kto needs undesired ones too"):
        objectives.make_objective(preferring("kto"), encoded, 8)


# The reference


def test_reference_is_measured_for_seen_rows(preferring):
    setup = prepare_training(preferring(batch_size=1, max_steps=3, packing=False))
    told = []
    shutil.rmtree(atomic_io.cache_dir() / "losses", ignore_errors=True)
    measured = reference.with_reference(replace(setup, notify=told.append))
    (seen,) = reference.rows_to_measure(setup)
    assert len(seen) == 2 * 3
    logps = measured.objective.reference[0]
    assert logps.isfinite().nonzero().flatten().tolist() == seen
    loss = held_out_loss.measure_loss(setup.base.model, setup.base, [setup.sequences.rows[row] for row in seen])
    assert logps[seen].tolist() == pytest.approx([-nll for nll in loss.nll], abs=1e-3)
    stages = [event.stage for event in told if isinstance(event, Progress)]
    assert "reference log-probabilities" in stages
    assert Notice("The reference is the base: its log-probabilities of 3 pairs are measured once.") in told
    told.clear()
    assert reference.with_reference(replace(setup, notify=told.append)).objective.reference[0][seen].tolist() == (
        logps[seen].tolist()
    )
    assert not any(isinstance(event, Progress) for event in told)


def test_reference_is_the_parent(preferring):
    """Else the first loss would not be that of a model that equals its reference."""
    train(preferring(max_steps=6, name="first"))
    second = train(preferring(parent="first", max_steps=2, seed=3, name="second"))
    losses = [entry["loss"] for entry in history(second) if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] != pytest.approx(math.log(2), abs=1e-6)
    assert second.manifest.preference.reference == "parent"


@pytest.mark.parametrize("objective", ["dpo", pytest.param("orpo", marks=pytest.mark.slow), "kto"])
def test_resume_repeats_run_bitwise(preferring, objective):
    """Also when the cache with the reference is gone."""
    whole = train(preferring(objective, max_steps=6, dropout=0.1, name="whole"))
    config = preferring(objective, max_steps=6, dropout=0.1, save_every=2, name="cut")
    with pytest.raises(Interrupted):
        train(config, StopAt(3))
    shutil.rmtree(atomic_io.cache_dir() / "losses")
    cut = resume("cut")
    assert weights(cut) == weights(whole)
    assert cut.manifest.preference == whole.manifest.preference


@pytest.mark.slow
def test_resume_from_parent_keeps_reference(preferring):
    train(preferring(max_steps=4, name="first"))
    settings = {"parent": "first", "max_steps": 6, "seed": 3}
    whole = train(preferring(**settings, name="whole"))
    with pytest.raises(Interrupted):
        train(preferring(**settings, save_every=2, name="cut"), StopAt(3))
    shutil.rmtree(atomic_io.cache_dir() / "losses")
    assert weights(resume("cut")) == weights(whole)


# Runs


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_run_learns_to_prefer(preferring, objective, capsys):
    told = []
    adapter = train(preferring(objective, max_steps=30, learning_rate=5e-3), told.append)
    info = adapter.manifest.preference
    assert (info.objective, info.beta) == (objective, DEFAULT_BETA)
    assert info.accuracy.change > 2 * info.accuracy.change_error > 0
    assert info.accuracy.adapter >= 0.8
    assert info.margin.change > 2 * info.margin.change_error > 0
    assert info.reference == (None if objective == "orpo" else "base")
    assert (info.reward_accuracy is None) == (objective == "orpo")
    if objective == "kto":
        assert (info.rows, info.undesired > 0) == (adapter.manifest.data.held_out_rows, True)
        assert info.shorter is None
    else:
        assert info.rows == adapter.manifest.result.rows
        assert 0 < info.shorter.pairs + info.longer.pairs <= info.rows
    card = (adapter.path / CARD_FILE).read_text()
    for name, text in info.lines():
        assert f"| {name.capitalize()} | {' '.join(text.split())} |" in card
    assert f"| Objective | {objective}, beta 0.1" in card
    assert json.loads((adapter.path / MANIFEST_FILE).read_text())["preference"]["accuracy"]["adapter"] >= 0.8


def test_gain_is_of_chosen_answers(preferring):
    adapter = train(preferring())
    rows = gain_matrix.cached_rows(adapter).texts
    assert len(rows) == adapter.manifest.preference.rows
    ((cell,),) = gain_matrix.evaluate([adapter]).cells
    assert cell == adapter.manifest.result


def test_rejected_answers_may_diverge(preferring, monkeypatch):
    measure = preference_result.measure_pair

    def damaged(*arguments):
        base, adapter = measure(*arguments)
        return base, replace(adapter, nll=[math.nan] * len(adapter.nll))

    monkeypatch.setattr(preference_result, "measure_pair", damaged)
    with pytest.raises(DivergedError, match=r"of the rejected answers is nan\. Try a lower learning rate than"):
        train(preferring(max_steps=2))


def test_plan_tells_time_of_reference(preferring, monkeypatch):
    """Without measuring it."""
    monkeypatch.setattr(held_out_loss, "measure_cached", None)
    cost = plan(preferring(batch_size=1, max_steps=3, packing=False))
    assert cost.reference_seconds > 0
    assert plan(preferring("orpo")).reference_seconds == 0
    longer = plan(preferring(batch_size=1, max_steps=30, packing=False))
    assert longer.reference_seconds / longer.held_out_seconds > 5 * cost.reference_seconds / cost.held_out_seconds
    assert "reference" in dict(cost.summary()[0].rows)


def test_default_rate_is_share_of_text(preferring, settings):
    for objective in OBJECTIVES:
        told = []
        setup = prepare_training(preferring(objective, learning_rate=None), told.append)
        share = RATE_SHARES[objective]
        assert setup.learning_rate_origin.endswith(f", times {share:g} for {objective}")
        assert 0 < setup.learning_rate < 4e-3 * share + 1e-9
        assert any("for " + objective in event.text for event in told if isinstance(event, Notice))


@pytest.mark.parametrize("changes", [{"learning_rate": "probe"}, {"patience": 2, "eval_every": 2}])
def test_what_text_loss_chooses_is_refused(preferring, changes):
    with pytest.raises(ValidationError, match="which objective dpo does not lower: leave it out") as error:
        preferring(**changes)
    assert ("probe" if "learning_rate" in changes else "patience") in str(error.value)


@pytest.mark.slow
def test_sweep_recommends_by_accuracy(preferring):
    rates = (1e-6, 5e-3)
    result = sweep.run_sweep([preferring(max_steps=20, learning_rate=rate) for rate in rates])
    accuracies = [Library().get(trial.name).manifest.preference.accuracy for trial in result.trials]
    assert [trial.accuracy for trial in result.trials] == [figure.adapter for figure in accuracies]
    best = result.trials[1]
    assert result.recommended == best.name
    assert (best.gap, best.standard_error) == (0, 0)
    assert result.trials[0].gap == best.accuracy - result.trials[0].accuracy > 0
    # Paired: one that has hardly learned differs from the best as the base does.
    assert result.trials[0].standard_error == pytest.approx(accuracies[1].change_error, rel=0.3)
    assert result.base_accuracy == accuracies[0].base
    assert result.growth is None


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_sweep_over_steps_tells_growth(preferring, objective):
    """The rejected answers are not measured again, but after the cache is gone."""
    configs = [preferring(objective, max_steps=steps, learning_rate=5e-3) for steps in (1, 8, 30)]
    told = []
    result = sweep.run_sweep(configs, told.append)
    assert not any("not chosen" in event.stage for event in told if isinstance(event, Progress))
    assert result.growth.figure == "accuracy"
    assert result.growth.doublings[0].gains == pytest.approx(
        [trial.accuracy - result.base_accuracy for trial in result.trials]
    )
    adapter = Library().get(result.recommended)
    assert find_growth(adapter, Library()) == result.growth
    shutil.rmtree(result.folder)
    assert find_growth(adapter, Library()).doublings[0].gains == pytest.approx(result.growth.doublings[0].gains)


@pytest.mark.slow
def test_finished_sweep_of_preferences_resumes(preferring, monkeypatch):
    """All trials are done, but not compared; and the cache with what they say is gone."""
    configs = [preferring(max_steps=1, beta=beta) for beta in (0.1, 0.5)]
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "measure_trials", lambda *_: {}["stop"])
        with pytest.raises(KeyError):
            sweep.run_sweep(configs)
    shutil.rmtree(atomic_io.cache_dir() / "losses")
    result = sweep.resume_sweep("pairs")
    assert [trial.beta for trial in result.trials] == [0.1, 0.5]
    assert [trial.name for trial in result.trials] == ["pairs-b0p1", "pairs-b0p5"]
    for trial in result.trials:
        preference = Library().get(trial.name).manifest.preference
        assert (preference.beta, preference.accuracy.adapter) == (trial.beta, trial.accuracy)


def test_trials_share_rows_not_beta(preferring):
    first = prepare_training(preferring(beta=0.1))
    first.remove_lora()
    second = prepare_training(preferring(beta=0.5), inputs=first)
    assert second.sequences is first.sequences
    assert (first.objective.beta, second.objective.beta, second.config.beta) == (0.1, 0.5, 0.5)


@pytest.mark.parametrize("draw_groups", [lambda _: np.arange(40), lambda draw: draw.integers(0, 9, 40)])
def test_covariance_of_accuracies_is_paired(draw_groups):
    draw = np.random.default_rng(0)
    base, one, other = draw.integers(0, 2, (3, 40)).astype(float)
    groups = draw_groups(draw)
    outcomes = sweep_result._Outcomes(
        base, {"a": one, "b": other}, lambda values: preference_result.grouped_mean(values, groups)
    )
    covariance = np.array(outcomes.gain_covariance(["a", "b"]))
    residuals = np.array([np.bincount(groups, gain - gain.mean()) for gain in (one - base, other - base)]) / 40
    count = residuals.shape[1]
    assert covariance == pytest.approx(residuals @ residuals.T * count / (count - 1))


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", ["rslora", "dora", "lora+", "pissa", "eva"])
def test_methods_learn_preferences(preferring, objective, method):
    adapter = train(preferring(objective, method=method, max_steps=3, rank=2))
    assert adapter.manifest.preference.objective == objective
    first = history(adapter)[0]["loss"] if objective == "dpo" else math.log(2)
    assert first == pytest.approx(math.log(2), abs=1e-3)  # the reference is the base, not what is left of it


@pytest.mark.slow
@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_quantized_base_is_its_reference(preferring, llama, load_in):
    adapter = train(preferring(base=str(llama), load_in=load_in, max_steps=3))
    assert history(adapter)[0]["loss"] == pytest.approx(math.log(2), abs=5e-3)
    assert adapter.manifest.run.load_in == load_in


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_checkpointing_keeps_loss(preferring, objective):
    losses = []
    for mode in ("on", "off"):
        adapter = train(preferring(objective, gradient_checkpointing=mode, name=mode))
        losses.append([entry["loss"] for entry in history(adapter) if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_base_dropout_is_disabled(preferring):
    setup = prepare_training(preferring())
    assert {module.p for module in setup.base.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


# Held-out figures


def test_accuracy_errors_are_of_groups():
    values, groups = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 1.0]), np.array([0, 0, 1, 1, 2, 2])
    mean, error = preference_result.grouped_mean(values, groups)
    single = preference_result.grouped_mean(values[::2], np.arange(3))
    assert (mean, error) == pytest.approx(single)
    assert error == pytest.approx(np.std([1, 0, 1], ddof=1) / math.sqrt(3))
    assert preference_result.grouped_mean(values, np.zeros(6, dtype=int))[1] is None


def sides(chosen, rejected, lengths=None):
    lengths = lengths or ([1] * len(chosen), [1] * len(rejected))
    return preference_result.HeldOutSides(
        *(
            HeldOutLoss([-logp * length for logp, length in zip(side, of_side, strict=True)], of_side)
            for side, of_side in zip((chosen, rejected), lengths, strict=True)
        )
    )


@pytest.fixture
def compare(preferring):
    """Compare losses of base and adapter, as a run on other rows does."""

    def of(objective, base, adapter):
        setup = prepare_training(preferring(objective))
        count = len(base.chosen.nll), len(base.rejected.nll)
        row = setup.held_out[0]
        rows = [np.concatenate([[~index], row[1:]]).astype(np.int32) for index in range(sum(count))]
        chosen, rejected = rows[: count[0]], rows[-count[1] :]
        setup = replace(setup, held_out=chosen, rejected=rejected, measured_texts=[""] * count[0])
        return preference_result.compare_sides(setup, base, base, adapter)

    return of


def test_length_bias_is_told(compare):
    lengths = ([2, 2, 5, 5], [4, 4, 3, 3])
    base = sides([-1, -1, -1, -1], [-2, -2, -0.5, -0.5], lengths)
    adapter = sides([-1, -3, -1, -1], [-2, -2, -2, -0.5], lengths)
    info = compare("dpo", base, adapter)
    assert (info.accuracy.base, info.accuracy.adapter) == (0.5, 0.5)
    assert (info.shorter.pairs, info.shorter.accuracy.base, info.shorter.accuracy.adapter) == (2, 1.0, 0.5)
    assert (info.longer.pairs, info.longer.accuracy.base, info.longer.accuracy.adapter) == (2, 0.0, 0.5)
    # By sums since the reference: 0, -4, 0 and 0 of the chosen answers, 0, 0, -4.5 and 0 of the others.
    assert info.reward_accuracy == (0.5 + 0 + 1 + 0.5) / 4
    assert "0.000 -> 0.500 chosen longer (2)" in dict(info.lines())["accuracy by length"]


def test_kto_compares_each_with_each(compare):
    draw = np.random.default_rng(0)
    base = sides([*draw.normal(-1, 1, 30)], [*draw.normal(-1, 1, 20)])
    adapter = sides([*draw.normal(0, 1, 30)], [*draw.normal(-1, 1, 20)])
    info = compare("kto", base, adapter)
    desired, undesired = (-np.array(side.nll) for side in (adapter.chosen, adapter.rejected))
    assert info.accuracy.adapter == pytest.approx(np.mean([d > u for d in desired for u in undesired]))
    assert info.margin.adapter == pytest.approx(desired.mean() - undesired.mean())
    variance = desired.var(ddof=1) / 30 + undesired.var(ddof=1) / 20
    assert info.margin.error == pytest.approx(math.sqrt(variance))
    assert 0 < info.accuracy.change_error < 0.2
    assert (info.rows, info.undesired, info.groups, info.shorter) == (30, 20, None, None)


def test_kto_errors_are_of_prompts():
    """Twice the answers to the same prompts tell no more; of prompts with both kinds one leaves out one."""
    draw = np.random.default_rng(0)
    scores = draw.normal(0.5, 1, 30), draw.normal(0, 1, 20)
    values = (scores[0][:, None] > scores[1]).astype(float)
    groups = np.arange(50)
    once = preference_result.two_sample_mean(values, groups)
    twice = preference_result.two_sample_mean(
        np.repeat(values, 2, 0), np.concatenate([groups[:30].repeat(2), groups[30:]])
    )
    assert twice == pytest.approx(once)
    alone = preference_result.two_sample_mean(np.repeat(values, 2, 0), np.arange(80))
    assert alone[1] < 0.95 * once[1]
    assert preference_result.two_sample_mean(values, np.zeros(50, dtype=int))[1] is None
    shared = draw.normal(0, 1, 40)  # of a prompt, which makes both its answers likelier
    scores = [shared + draw.normal(0, 0.5, 40), shared + draw.normal(-0.3, 0.5, 40)]
    values, groups = (scores[0][:, None] > scores[1]).astype(float), np.tile(np.arange(40), 2)
    left = [np.delete(np.delete(values, out, 0), out, 1).mean() for out in range(40)]
    error = preference_result.two_sample_mean(values, groups)[1]
    assert error == pytest.approx(np.std(left) * math.sqrt(39), rel=0.05)
    assert error < 0.8 * preference_result.two_sample_mean(values, np.arange(80))[1]


def test_kto_of_pairs_counts_prompts(preferring):
    info = train(preferring("kto", pairs(60), max_steps=1)).manifest.preference
    assert info.groups == info.rows == info.undesired
    assert info.describe_rows().endswith(f"undesired held-out answers of {info.rows} prompts")


def info_with(change, error, base=0.5):
    figure = PairedFigure(
        base=base, base_error=0.05, adapter=base + change, error=0.05, change=change, change_error=error
    )
    return PreferenceInfo(objective="dpo", beta=0.1, reference="base", rows=100, accuracy=figure, margin=figure)


@pytest.mark.parametrize(
    ("change", "gain", "advice"),
    [
        (0.3, 0.01, None),
        (0.3, -0.01, None),
        (0.3, -0.4, "The chosen answers themselves have become less likely"),
        (0.05, 0.0, "The held-out preference accuracy has not risen beyond its error"),
    ],
)
def test_advice_follows_figures(change, gain, advice):
    result = EvalResult(base_loss=3.0, loss=3.0 - gain, gain=gain, standard_error=0.01, rows=100, tokens=1000)
    given = preference_result.preference_advice(info_with(change, 0.04), result, 1e-3)
    assert given is None if advice is None else given.startswith(advice)


def test_perfect_accuracy_needs_no_advice():
    result = EvalResult(base_loss=3.0, loss=3.0, gain=0.0, standard_error=0.01, rows=100, tokens=1000)
    assert preference_result.preference_advice(info_with(0.0, 0.0, base=1.0), result, 1e-3) is None
