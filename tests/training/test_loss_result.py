"""Held-out losses of a run are measured when they are needed: in one pass after its steps, on as many rows as it takes."""

from types import SimpleNamespace

import pytest

from lora_tuner import ModelOptions, Notice, Progress, TrainConfig, evaluate, resume, train
from lora_tuner.adapters.adapter import CARD_FILE
from lora_tuner.adapters.manifest import EvalResult
from lora_tuner.cli.display import format_result
from lora_tuner.convert.remeasure import remeasure
from lora_tuner.data.general_text import general_texts
from lora_tuner.errors import BaseModelError
from lora_tuner.evaluation import held_out_loss
from lora_tuner.inference import probes
from lora_tuner.training import loss_result, profiling, sweep
from lora_tuner.training.setup import TrainingSetup, prepare_training

from .. import tiny_models
from .test_run import history, weights

CPU = ModelOptions(device="cpu")


@pytest.fixture
def passes(monkeypatch, tmp_path):
    """Rows of each forward pass that measures losses, with the context; None at each step. The cache is empty."""
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    nll, seen = held_out_loss._nll, []

    def watch(model, base, rows, context):
        seen.append(([row.tobytes() for row in rows], getattr(context, "__name__", "")))
        return nll(model, base, rows, context)

    monkeypatch.setattr(held_out_loss, "_nll", watch)
    return seen


@pytest.fixture
def few_are_enough(monkeypatch):
    monkeypatch.setattr(loss_result, "MIN_ROWS", 6)
    monkeypatch.setattr(loss_result, "ENOUGH", 0.9)


def rows_of(config):
    return [row.tobytes() for row in prepare_training(config).held_out]


@pytest.mark.parametrize("changes", [{}, {"max_steps": 32, "batch_size": 4}, {"eval_every": 3}])
def test_held_out_rows_follow_first_step(settings, passes, changes):
    def notify(event):
        if isinstance(event, Progress) and event.stage == "training":
            passes.append(None)

    train(settings(**changes), notify)
    first, held_out = passes.index(None), set(rows_of(settings()))
    before = {row for rows, _ in passes[:first] for row in rows}
    after = {row for rows, _ in filter(None, passes[first:]) for row in rows}
    assert before
    assert not before & held_out
    assert held_out <= after


def test_base_and_adapter_share_one_pass(settings, passes):
    """Batch by batch; a second run on the same rows reads the base's losses from the cache."""
    result = train(settings()).manifest.result
    held_out = rows_of(settings())
    measured = [(rows, name) for rows, name in passes if set(rows) <= set(held_out)]
    assert [name for _, name in measured] == ["disable_adapter", "nullcontext"] * (len(measured) // 2)
    for (of_base, _), (of_adapter, _) in zip(measured[::2], measured[1::2], strict=True):
        assert of_base == of_adapter
    assert sorted(row for rows, _ in measured[::2] for row in rows) == sorted(held_out)
    passes.clear()
    again = train(settings(name="again")).manifest.result
    assert {name for rows, name in passes if set(rows) <= set(held_out)} == {"nullcontext"}
    assert again == result


def test_result_equals_evaluate(settings, few_are_enough):
    """On the same rows, which it reads from the cache; all of them are there too."""
    events, config = [], settings(eval_rows=None)
    adapter = train(config, events.append)
    result, held_out = adapter.manifest.result, len(rows_of(config))
    assert (result.rows, result.of_rows, adapter.manifest.data.held_out_rows) == (6, held_out, held_out)
    assert result.standard_error < 0.9 * abs(result.gain)
    text = f"6 of {held_out} held-out rows were measured: the standard error is below 90% of the gain"
    assert [event.text for event in events if isinstance(event, Notice) and event.text.startswith(text)]
    assert f", the first 6 of {held_out} rows)" in format_result(result)[0]
    card = (adapter.path / CARD_FILE).read_text()
    assert f"; 6 of {held_out} other rows measured it." in card
    assert f"the first 6 of {held_out} rows, paired)" in card
    ((cell,),) = evaluate([adapter], options=CPU).cells
    assert cell == result.model_copy(update={"of_rows": None})
    ((cell,),) = evaluate([adapter], eval_rows=1000, options=CPU).cells
    assert cell.rows == held_out
    everything = train(settings(eval_rows=100, name="all"))
    assert weights(everything) == weights(adapter)
    assert everything.manifest.result.model_dump() == pytest.approx(cell.model_dump(), abs=1e-5)


def test_rows_grow_until_error_is_small(settings, few_are_enough, monkeypatch):
    looked_at = []

    def is_enough(result):
        looked_at.append(result.rows)
        return len(looked_at) == 3

    monkeypatch.setattr(loss_result, "is_enough", is_enough)
    result = train(settings(eval_rows=None)).manifest.result
    assert looked_at == [6, 9, 13]
    assert (result.rows, result.of_rows) == (13, len(rows_of(settings(eval_rows=None))))
    monkeypatch.setattr(loss_result, "is_enough", lambda result: False)
    assert train(settings(eval_rows=None, name="all")).manifest.result.of_rows is None


def test_looks_are_cached_as_one(settings, few_are_enough, passes, monkeypatch):
    """`evaluate` measures nothing again."""
    monkeypatch.setattr(loss_result, "is_enough", lambda result: False)
    adapter = train(settings(eval_rows=None))
    passes.clear()
    ((cell,),) = evaluate([adapter], options=CPU).cells
    assert cell == adapter.manifest.result
    assert passes == []


def test_resumed_run_measures_same_rows(settings, few_are_enough, stop_at):
    config = settings(eval_rows=None, max_steps=32, batch_size=4)
    whole = train(config)
    with stop_at(9):
        train(config.model_copy(update={"name": "stopped"}))
    resumed = resume("stopped")
    assert resumed.manifest.result == whole.manifest.result
    assert [entry for entry in history(resumed) if "loss" not in entry] == [
        entry for entry in history(whole) if "loss" not in entry
    ]


def test_child_has_rows_of_parent(settings, few_are_enough):
    """So that both can be compared."""
    parent = train(settings(eval_rows=None))
    events, child = [], settings(eval_rows=None, parent="reviews", name="child")
    result = train(child, events.append).manifest.result
    assert (result.rows, result.of_rows) == (6, parent.manifest.result.of_rows)
    assert result.base_loss == parent.manifest.result.base_loss
    assert [event for event in events if isinstance(event, Notice) and "they are those of reviews" in event.text]
    assert prepare_training(child).parent_loss == parent.manifest.result.loss
    assert prepare_training(child.model_copy(update={"eval_rows": 200})).parent_loss is None


def test_error_is_small_against_gain():
    result = EvalResult(base_loss=3.0, loss=2.8, gain=0.2, standard_error=0.0099, rows=64, tokens=900)
    assert loss_result.is_enough(result)
    assert loss_result.is_enough(result.model_copy(update={"gain": -0.2}))
    for changes in ({"rows": 63}, {"standard_error": 0.0101}, {"standard_error": None}, {"gain": 0.1}):
        assert not loss_result.is_enough(result.model_copy(update=changes))
    assert not loss_result.is_enough(result.model_copy(update={"groups": 63}))
    assert loss_result.is_enough(result.model_copy(update={"groups": 64}))


@pytest.mark.parametrize(
    "changes",
    [
        {"config": TrainConfig(eval_rows=200)},
        {"config": TrainConfig(eval_every=5)},
        {"objective": "dpo"},
        {"dataset": SimpleNamespace(labels={"good": 3}, sources=[1])},
        {"dataset": SimpleNamespace(labels={}, sources=[1, 2])},
        {"held_out": ["a"]},  # a row has nothing to predict
    ],
)
def test_other_runs_measure_all_rows(changes):
    plain = {
        "config": TrainConfig(),
        "objective": None,
        "dataset": SimpleNamespace(labels={}, sources=[1]),
        "held_out": ["a", "b"],
        "held_out_texts": ["a", "b"],
    }
    measures_all = TrainingSetup.measures_all_rows.fget
    assert not measures_all(SimpleNamespace(**plain))
    assert measures_all(SimpleNamespace(**plain | changes))


def test_trials_of_sweep_measure_all_rows():
    trials = [TrainConfig(rank=rank, max_rows=rows) for rank, rows in ((2, 50), (4, 90))]
    for same in (trials, [trial.model_copy(update={"max_rows": 90}) for trial in trials]):
        assert {trial.eval_rows for trial in sweep._with_shared_held_out_rows(same)} == {200}


def test_base_is_blamed_in_first_step(settings, model_folder, monkeypatch):
    """A base may be sound on the rows that are looked at before."""
    monkeypatch.setattr(loss_result, "check_base", lambda setup: None)
    prepare = prepare_training

    def damaged(*args):
        setup = prepare(*args)
        next(setup.base.model.parameters()).data.fill_(float("nan"))
        return setup

    with pytest.raises(
        BaseModelError, match=r"^.* has a held-out loss of nan in float32: its weights are damaged"
    ):
        train(settings(base=str(model_folder)), prepare=damaged)


def test_general_text_is_read_once(settings, tmp_path, monkeypatch):
    """What forgetting is measured on, and the beginnings of held-out rows, are not read again for routing."""
    monkeypatch.setattr(profiling, "GENERAL_SHARE", 100.0)
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    read, token_nll = [], probes._token_nll

    def watch(base, rows):
        read.extend(rows)
        return token_nll(base, rows)

    monkeypatch.setattr(probes, "_token_nll", watch)
    adapter = train(settings(base=str(tiny_models.save_model(tmp_path / "roomy", "gpt2", context=1024))))
    assert adapter.manifest.general.rows == len(
        [text for kind in general_texts(subset=True) for text in kind.texts]
    )
    assert read == []
    (again,) = remeasure([adapter], CPU)
    assert read
    for own, other in zip(*(routing_figures(each.manifest.routing) for each in (adapter, again)), strict=True):
        assert own == pytest.approx(other, abs=2e-3)


def routing_figures(routing):
    return [
        figures for part in (routing, routing.general) for figures in (part.tokens, part.gain, part.deviation)
    ]
