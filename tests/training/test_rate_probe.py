"""`--learning-rate probe`: short runs choose the rate, and the run is as with that rate given."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lora_tuner import Interrupted, Library, Notice, plan, resume, train
from lora_tuner.adapters.gains import HeldOutLoss
from lora_tuner.adapters.model_card import model_card
from lora_tuner.errors import ConfigError, DivergedError
from lora_tuner.evaluation import held_out_loss
from lora_tuner.training import learning_rate, rate_probe, sweep
from lora_tuner.training.learning_rate import plan_probe
from lora_tuner.training.profiling import StepProfile
from lora_tuner.training.setup import prepare_training

from .. import tiny_models
from ..cli.test_commands import quick, run  # noqa: F401 - a fixture
from .test_distributed import run_two
from .test_run import weights

PROFILE = StepProfile(
    seconds_per_step=2.0, tokens_per_second=100.0, seconds_per_held_out_token=0.01, peak_memory_bytes=1
)


@pytest.fixture(autouse=True)
def default(monkeypatch):
    """Take the default rate of the method, which is not measured."""
    of_method = 2e-3, "from the method lora"
    monkeypatch.setattr("lora_tuner.training.setup.default_learning_rate", lambda *of: of_method)


@pytest.fixture
def short(settings, monkeypatch):
    """Settings of a run with a probe of few and short runs."""
    monkeypatch.setattr(learning_rate, "MIN_STEPS", 2)
    monkeypatch.setattr(learning_rate, "MIN_ROWS", 3)
    monkeypatch.setattr(learning_rate, "PROBE_SHARE", 2)

    def make(**changes):
        return settings(**{"learning_rate": "probe", "max_steps": 10, "eval_rows": 8} | changes)

    return make


def lists(rows):
    return [list(row) for row in rows]


def saved(adapter):
    return yaml.safe_load((adapter.path / "run.yaml").read_text())


def test_probed_run_equals_run_with_rate(short, settings, stop_at):
    told = []
    with stop_at(5, "/reviews"):
        train(short(dropout=0.1, save_every=3), told.append)
    first = [event.text for event in told if isinstance(event, Notice)]
    assert sum("Learning rates around 0.002 are tried first" in text for text in first) == 1
    told.clear()
    adapter = resume("reviews", notify=told.append)
    assert not [event for event in told if isinstance(event, Notice) and "robe" in event.text]
    probe, rate = adapter.manifest.run.probe, saved(adapter)["learning_rate"]
    losses = {trial.learning_rate: trial.loss for trial in probe.trials}
    assert {0.00063, 0.002, 0.0063} <= losses.keys()
    assert probe.learning_rate == rate == min(losses, key=losses.get) != 0.002
    assert [trial.gap for trial in probe.trials] == pytest.approx(
        [loss - losses[rate] for loss in losses.values()]
    )
    assert sum(f"Learning rate {rate:g} (--learning-rate), from the probe." in text for text in first) == 1
    alone = train(settings(dropout=0.1, max_steps=10, learning_rate=rate, name="alone"))
    assert weights(alone) == weights(adapter)
    assert alone.manifest.result == adapter.manifest.result
    assert alone.manifest.run.probe is None
    assert f"| Learning rate | {rate:g}, the best of {len(losses)} runs of {probe.steps} steps" in model_card(
        adapter, "reviews"
    )
    assert [path.name for path in Path("runs").iterdir()] == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora+", "pissa", "dora"])
def test_probe_of_each_method_restores_weights(short, settings, method):
    adapter = train(short(method=method, patience=1, eval_every=5))
    rate = saved(adapter)["learning_rate"]
    changes = {"method": method, "patience": 1, "eval_every": 5, "max_steps": 10}
    assert weights(train(settings(learning_rate=rate, name="alone", **changes))) == weights(adapter)


@pytest.mark.slow
def test_probe_of_stream_and_parent_restores_all(short, settings):
    train(settings(max_steps=2, name="parent"))
    changes = {"parent": "parent", "streaming": True, "shuffle_buffer": 30, "max_steps": 10}
    adapter = train(short(**changes, eval_rows=4))
    rate = saved(adapter)["learning_rate"]
    alone = train(settings(learning_rate=rate, name="alone", eval_rows=4, **changes))
    assert weights(alone) == weights(adapter)
    assert alone.manifest.data == adapter.manifest.data


@pytest.fixture
def inputs(settings):
    return prepare_training(settings(max_steps=1, eval_rows=5))


@pytest.mark.parametrize("max_steps", [200, 350, 500, 1000, 3333, 100_000])
@pytest.mark.parametrize("share", [1 / 5, 1 / 6])
def test_probe_costs_its_share(inputs, max_steps, share):
    found = plan_probe(inputs, PROFILE, max_steps, share)
    if isinstance(found, str):
        assert max_steps < 500
        return
    tokens = found.runs * sum(map(len, found.rows))
    per_step = sum(map(len, inputs.sequences.rows)) / len(inputs.sequences) * 2
    assert found.runs * found.steps + tokens / per_step + 4 <= found.cost <= max_steps * share
    assert found.seconds == pytest.approx((found.runs * found.steps + 4) * 2.0 + tokens * 0.01)
    assert 3 <= found.runs <= 5
    assert 20 <= found.steps <= 200
    assert max_steps < 1000 or found.runs == 5


def test_short_run_takes_the_default(settings):
    told = []
    adapter = train(settings(learning_rate="probe"), told.append)
    assert saved(adapter)["learning_rate"] == 2e-3
    assert adapter.manifest.run.probe is None
    texts = [event.text for event in told if isinstance(event, Notice)]
    assert "Learning rate 0.002 (--learning-rate), from the method lora." in texts
    (text,) = [text for text in texts if text.startswith("No probe of the learning rate: ")]
    assert "20% of 6 steps is too little to try learning rates (" in text
    needed = int(text.split("(")[1].split()[0])
    inputs = prepare_training(settings(max_steps=1))
    assert isinstance(plan_probe(inputs, PROFILE, needed - 1), str)
    assert not isinstance(plan_probe(inputs, PROFILE, needed), str)


def test_choosing_rows_are_not_reported(inputs, settings):
    base = inputs.base
    found = plan_probe(inputs, PROFILE, 5000)
    texts = inputs.dataset.held_out
    assert lists(inputs.held_out) == lists(held_out_loss.encode_held_out(base, texts[:5]))
    assert lists(found.rows) == lists(held_out_loss.encode_held_out(base, texts[5:]))
    assert not found.reported
    many = prepare_training(settings(max_steps=1, eval_rows=len(texts)))
    found = plan_probe(many, PROFILE, 5000)
    assert lists(found.rows) == lists(many.held_out)
    assert found.reported
    assert "so these choose the rate too: the gain will be slightly too good" in found.describe(2e-3, 5000)
    few = replace(many, held_out=many.held_out[:7], measured_texts=many.measured_texts[:7])
    assert plan_probe(few, PROFILE, 5000).startswith("7 held-out rows cannot choose a learning rate")


def test_choosing_rows_are_of_other_groups(settings, tmp_path):
    texts = tiny_models.reviews(300)
    lines = [json.dumps({"text": text, "author": f"a{number // 4}"}) for number, text in enumerate(texts)]
    (tmp_path / "grouped.jsonl").write_text("\n".join(lines))
    setup = prepare_training(settings(dataset="grouped.jsonl", group_by="author", eval_rows=6, max_steps=1))
    found = plan_probe(setup, PROFILE, 5000)
    of = setup.dataset.held_out_groups
    reported = {of[text] for text in setup.held_out_texts}
    others = [text for text in setup.dataset.held_out if of[text] not in reported]
    assert len(others) + 6 < len(setup.dataset.held_out)
    assert lists(found.rows) == lists(held_out_loss.encode_held_out(setup.base, others[: len(found.rows)]))
    assert found.groups == setup.dataset.groups_of(others[: len(found.rows)])


def test_probe_never_selects_on_test(settings, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        (tmp_path / "data" / f"{name}.csv").write_text("text\n" + "\n".join(tiny_models.reviews(60)) + "\n")
    with pytest.raises(ConfigError, match="--learning-rate probe selects a rate by the rows that are measured"):
        train(settings(learning_rate="probe", dataset="data", eval_dataset="data", eval_split="test"))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({0.01: 3.0}, 0.0032),
        ({0.01: 3.0, 0.0032: 3.1}, 0.032),
        ({0.01: 3.0, 0.0032: 3.1, 0.032: 3.1}, None),
        ({0.01: 3.0, 0.0032: 2.9, 0.032: 3.1}, 0.001),
        ({0.01: 3.0, 0.0032: 3.1, 0.032: 2.9}, 0.1),
        ({0.01: None, 0.0032: None, 0.032: None}, 0.001),
        ({0.01: None, 0.0032: 3.1, 0.032: None}, 0.001),
        ({0.01: 3.0, 0.0032: 3.0, 0.032: 3.0}, 0.001),
    ],
)
def test_next_rate_is_beside_the_best(losses, expected):
    measured = {rate: loss and HeldOutLoss([loss], [1]) for rate, loss in losses.items()}
    assert rate_probe.next_rate(0.01, measured) == expected


@pytest.mark.slow
def test_diverged_rates_are_never_chosen(short, monkeypatch):
    monkeypatch.setattr(learning_rate, "RATE_FACTOR", 1e15)
    monkeypatch.setattr(rate_probe, "RATE_FACTOR", 1e15)
    monkeypatch.setattr("lora_tuner.training.setup.default_learning_rate", lambda *of: (1e15, "from here"))
    adapter = train(short(max_grad_norm=1e20, warmup=0))
    probe = adapter.manifest.run.probe
    assert probe.learning_rate == 1.0
    assert [trial.loss is None for trial in probe.trials if trial.learning_rate > 1] == [True, True]
    monkeypatch.setattr("lora_tuner.training.setup.default_learning_rate", lambda *of: (1e36, "from here"))
    monkeypatch.setattr(rate_probe, "RATE_FACTOR", 10.0)
    with pytest.raises(DivergedError, match=r"The runs diverged at all learning rates tried, 1e\+3\d the lowest"):
        train(short(max_grad_norm=1e30, warmup=0, name="other"))
    assert Library().names() == ["reviews"]


def test_minutes_include_the_probe(settings, monkeypatch):
    monkeypatch.setattr("lora_tuner.training.profiling.profile_steps", lambda *of: PROFILE)
    told = []
    estimate = plan(settings(learning_rate="probe", max_steps=None, minutes=20), told.append)
    assert estimate.steps + estimate.probe_steps == 600
    assert 0 < estimate.probe_steps <= estimate.steps / 5
    assert (estimate.learning_rate, estimate.learning_rate_origin) == (2e-3, "from the method lora")
    assert [event for event in told if isinstance(event, Notice) and event.text.endswith("take --minutes 20.")]
    whole = plan(settings(learning_rate="probe", max_steps=600))
    assert whole.steps == 600
    assert 0 < whole.probe_steps <= 120
    assert plan(settings(learning_rate=3e-3)).probe_steps == 0


def test_interrupted_probe_leaves_nothing(short, monkeypatch):
    def stop(*of):
        raise KeyboardInterrupt

    monkeypatch.setattr(rate_probe, "_train_and_measure", stop)
    with pytest.raises(Interrupted, match="Stopped while learning rates were tried: nothing is saved"):
        train(short())
    assert [path.name for path in Path("runs").iterdir()] == []
    assert Library().names() == []


@pytest.mark.slow
def test_sweep_of_ranks_probes_each(short, settings):
    result = sweep.run_sweep([short(rank=rank) for rank in (2, 4)])
    for trial in result.trials:
        adapter = Library().get(trial.name)
        assert adapter.manifest.run.probe.learning_rate == trial.learning_rate
        changes = {"learning_rate": trial.learning_rate, "max_steps": 10, "rank": trial.rank}
        assert weights(train(settings(**changes, name="alone", overwrite=True))) == weights(adapter)


SHORT_PROBE = """
from lora_tuner.training import learning_rate
learning_rate.MIN_STEPS = learning_rate.MIN_ROWS = 3
learning_rate.PROBE_SHARE = 3
"""


@pytest.mark.slow
def test_two_processes_choose_same_rate(gpt2, reviews_csv, settings):
    both = {"base": str(gpt2), "dataset": str(reviews_csv), "max_steps": 10, "max_length": 64, "rank": 4}
    both |= {"eval_rows": 8, "device": "cpu", "dtype": "float32"}
    done = run_two(both | {"batch_size": 1, "learning_rate": "probe"}, "--json", "--name=two", code=SHORT_PROBE)
    assert done.status == 0, done.err
    assert done.err.count("are tried first") == 1, done.err
    shown = json.loads(done.out)["run"]["probe"]
    adapter = Library().get("two")
    assert shown["learning_rate"] == saved(adapter)["learning_rate"]
    rate = shown["learning_rate"]
    again = run_two(both | {"batch_size": 1, "learning_rate": rate}, "--name=again")
    assert again.status == 0, again.err
    assert weights(Library().get("again")) == weights(adapter)


@pytest.mark.slow
def test_command_shows_the_probe(quick, short):  # noqa: F811
    shown = run("train", *quick[:4], *quick[6:-2], "--learning-rate", "probe", "--max-steps", 10)
    assert "are tried first (--learning-rate probe): at most" in shown.stderr
    assert "gap to the best" in shown.stdout
    assert "held-out rows, in" in shown.stdout


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("probe,1e-3", "probe chooses one rate: give it alone, or numbers"),
        ("prob", "separated by commas, or probe"),
    ],
)
def test_wrong_rate_beside_probe_is_refused(option, text):
    assert text in run("train", "--learning-rate", option, exit_code=2).stderr
