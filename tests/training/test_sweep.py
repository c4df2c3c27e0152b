"""Several ranks and learning rates: each rung is the run that it would be alone, and the whole goes on where it stopped."""

import json

import pytest

from lora_tuner import Library, ModelOptions, TrainConfig, evaluate, train
from lora_tuner.config import expand_sweep, resolve_settings
from lora_tuner.errors import AdapterError, ConfigError, Notice, TrainingError
from lora_tuner.training import inputs, sweep

from ..cli.test_commands import quick, run  # noqa: F401 - a fixture


def of(settings, *ranks, **changes):
    return [settings(rank=rank, **changes) for rank in ranks]


def test_every_value_meets_every_other():
    assert expand_sweep({"rank": 4, "seed": 1}) == [{"rank": 4, "seed": 1}]
    assert expand_sweep({"rank": [2, 4], "learning_rate": [1e-3, 2e-3]}) == [
        {"rank": rank, "learning_rate": rate} for rank in (2, 4) for rate in (1e-3, 2e-3)
    ]


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_each_rung_is_what_it_would_be_alone(settings, request, kind):
    model_folder = request.getfixturevalue(kind)
    climbed = sweep.run_sweep(of(settings, 2, 4, 8, base=str(model_folder)))
    assert [it.name for it in climbed.trials] == ["reviews-r2", "reviews-r4", "reviews-r8"] == Library().names()
    for rank, rung in zip((2, 4, 8), climbed.trials, strict=True):
        alone = train(settings(rank=rank, base=str(model_folder), name="alone", overwrite=True))
        adapter = Library().get(rung.name)
        assert adapter.sha256 == alone.sha256
        assert adapter.manifest.run.method == "lora"
        assert (rung.rank, rung.bytes, rung.seconds) == (rank, adapter.bytes, adapter.manifest.run.seconds)
        assert rung.loss == pytest.approx(adapter.manifest.result.loss)
        assert climbed.base_loss == pytest.approx(adapter.manifest.result.base_loss)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pissa", "eva", "dora", "lora+"])
def test_with_every_method(settings, method):
    sweep.run_sweep(of(settings, 2, 4, method=method))
    for rank in (2, 4):
        alone = train(settings(rank=rank, method=method, name="alone", overwrite=True))
        assert Library().get(f"reviews-r{rank}").sha256 == alone.sha256


@pytest.mark.slow
def test_base_and_rows_are_read_once(settings, monkeypatch):
    read = []
    monkeypatch.setattr(inputs, "load_dataset", lambda *of: read.append("rows") or real_corpus(*of))
    monkeypatch.setattr(inputs.loading, "open_base", lambda *of, **how: read.append("base") or real_base(*of, **how))
    sweep.run_sweep(of(settings, 2, 4, 8))
    assert sorted(read) == ["base", "rows"]


real_corpus, real_base = inputs.load_dataset, inputs.loading.open_base


@pytest.mark.slow
def test_minutes_mean_the_same_steps_for_every_rung(settings):
    climbed = sweep.run_sweep(of(settings, 2, 4, max_steps=None, minutes=0.004))
    steps = {Library().get(rung.name).manifest.run.steps for rung in climbed.trials}
    assert len(steps) == 1


def test_the_one_to_keep_is_the_smallest_that_is_not_clearly_worse(settings):
    climbed = sweep.run_sweep(of(settings, 1, 4, 16, learning_rate=3e-2, max_steps=20, eval_rows=20))
    best = min(climbed.trials, key=lambda it: it.loss)
    assert best.gap == best.standard_error == 0
    good = [it for it in climbed.trials if it.gap <= it.standard_error]
    assert climbed.recommended == min(good, key=lambda it: it.bytes).name
    pair = evaluate([Library().get(it.name) for it in climbed.trials], options=ModelOptions(device="cpu"))
    for rung, line in zip(climbed.trials, pair.cells, strict=True):
        assert rung.loss == pytest.approx(line[0].loss, abs=1e-6)
        assert rung.gap == pytest.approx(rung.loss - best.loss, abs=1e-9)
    facts = json.loads((climbed.folder / "sweep.json").read_text())
    assert facts == json.loads(json.dumps(climbed.to_dict()))
    assert (climbed.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(it.name for it in climbed.folder.iterdir()) == ["sweep.json", "sweep.png"]


@pytest.fixture
def stopped_at(stop_at, settings):
    """A ladder that Ctrl-C ends in that rung and step, and what it says."""

    def climb(rung, step, **changes):
        with stop_at(step, f"-r{rung}") as stopped:
            sweep.run_sweep(of(settings, 2, 4, 8, **changes))
        return str(stopped.value)

    return climb


@pytest.mark.parametrize("rung", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)])
def test_stopped_in_the_middle_it_goes_on(settings, rung, stopped_at):
    whole = sweep.run_sweep(of(settings, 2, 4, 8, name="whole"))
    text = stopped_at(rung, 3)
    assert text == "Stopped at step 3 of 6, saved. Go on with: python cli.py train --resume reviews"
    assert sweep.is_unfinished("reviews", settings().runs_dir)
    before = {name: Library().get(name).manifest.created for name in Library().names()}
    trained = []
    climbed = sweep.resume_sweep("reviews", notify=lambda it: trained.append(it) if isinstance(it, Notice) else None)
    assert not sweep.is_unfinished("reviews", settings().runs_dir)
    for one, other in zip(climbed.trials, whole.trials, strict=True):
        assert Library().get(one.name).sha256 == Library().get(other.name).sha256
        assert one.loss == pytest.approx(other.loss)
    for name, created in before.items():
        assert Library().get(name).manifest.created == created  # not trained again
    assert climbed.recommended.removeprefix("reviews") == whole.recommended.removeprefix("whole")


def test_stopped_after_its_last_rung_it_is_only_measured(settings, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "_measure_trials", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sweep.run_sweep(of(settings, 2, 4))
    monkeypatch.setattr(inputs, "load_dataset", None)
    climbed = sweep.resume_sweep("reviews")
    assert [it.name for it in climbed.trials] == ["reviews-r2", "reviews-r4"]
    assert all(it.loss < climbed.base_loss for it in climbed.trials)


def test_a_rung_that_diverges_does_not_end_the_others(settings):
    notices = []
    configs = [settings(rank=4, learning_rate=rate) for rate in (1e-2, 1e30)]
    climbed = sweep.run_sweep(configs, lambda it: notices.append(it.text) if isinstance(it, Notice) else None)
    good, bad = climbed.trials
    assert bad.name == "reviews-lr1e30"
    assert bad.loss is None
    assert climbed.recommended == good.name == "reviews-lr0p01"
    assert [text for text in notices if "so the run has stopped" in text]


@pytest.mark.slow
def test_learning_rates_go_on_from_a_parent_and_ranks_do_not(settings, adapter):
    given = {"dataset": "reviews.csv", "parent": "reviews", "max_steps": 2, "eval_rows": 8, "name": "more"}
    climbed = sweep.run_sweep([TrainConfig(**given, learning_rate=rate) for rate in (1e-3, 1e-2)])
    assert [Library().get(it.name).manifest.parents[0].name for it in climbed.trials] == ["reviews", "reviews"]
    with pytest.raises(ConfigError) as error:
        sweep.run_sweep([TrainConfig(**given, rank=rank) for rank in (2, 4)])
    assert str(error.value) == "--from keeps the rank of its parent: give it several learning rates, not ranks."


def test_nothing_is_begun_where_a_name_is_taken(settings, adapter):
    Library().rename("reviews", "reviews-r4")
    with pytest.raises(AdapterError, match="reviews-r4"):
        sweep.run_sweep(of(settings, 2, 4))
    assert Library().names() == ["reviews-r4"]
    assert not (settings().runs_dir / "reviews.sweep").exists()


def test_anew_is_anew_whatever_was_trained_before(settings):
    """Only what a ladder has trained itself is not trained again."""
    sweep.run_sweep(of(settings, 2, 4, max_steps=None, minutes=0.002, seed=7))
    before = {name: Library().get(name).sha256 for name in Library().names()}
    sweep.run_sweep(of(settings, 2, 4, overwrite=True))
    for rank in (2, 4):
        alone = train(settings(rank=rank, name="alone", overwrite=True))
        assert Library().get(f"reviews-r{rank}").sha256 == alone.sha256 != before[f"reviews-r{rank}"]


@pytest.mark.parametrize("overwrite", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_run_that_was_stopped_goes_on_and_no_other_does(settings, overwrite, stopped_at):
    whole = sweep.run_sweep(of(settings, 2, 4, 8, name="whole"))
    if overwrite:  # an earlier run of a rung's name, stopped, with other settings
        stopped_at(8, 2, seed=5)
    stopped_at(4, 3, overwrite=overwrite)
    steps = []
    sweep.resume_sweep("reviews", notify=lambda it: steps.append(getattr(it, "done", None)))
    for one in whole.trials:
        assert Library().get(one.name.replace("whole", "reviews")).sha256 == Library().get(one.name).sha256
    lines = [it for it in steps if it is not None]
    assert lines.count(1) <= 3  # rung 4 began with its fourth step


def test_a_run_of_a_rungs_name_is_in_the_way(settings, stop_at):
    with stop_at(1):
        train(settings(name="reviews-r4", seed=9))
    with pytest.raises(TrainingError, match="runs/reviews-r4 holds an unfinished run"):
        sweep.run_sweep(of(settings, 2, 4))
    assert Library().names() == []


@pytest.mark.slow
def test_data_that_changed_meanwhile_is_refused(settings, reviews_csv, stopped_at):
    stopped_at(2, 6)
    text = reviews_csv.read_text()
    reviews_csv.write_text(text + "another review,1\n")
    with pytest.raises(TrainingError, match="changed since it stopped: data"):
        sweep.resume_sweep("reviews")
    reviews_csv.write_text(text)
    assert len(sweep.resume_sweep("reviews").trials) == 3


def test_an_adapter_that_was_replaced_meanwhile_is_refused(settings, stopped_at):
    stopped_at(4, 2)
    train(settings(rank=2, seed=3, name="reviews-r2", overwrite=True))
    with pytest.raises(TrainingError) as error:
        sweep.resume_sweep("reviews")
    assert str(error.value) == (
        "adapters/reviews-r2 is not the adapter that its sweep has trained: restore that, or start anew."
    )


def test_a_mistake_leaves_nothing_in_the_way(settings, tmp_path):
    with pytest.raises(ConfigError, match="pissa allows at most"):
        sweep.run_sweep(of(settings, 2, 64, method="pissa"))
    with pytest.raises(ConfigError, match="target_modules"):
        sweep.run_sweep(of(settings, 2, 4, target_modules="nothing"))
    assert not sweep.is_unfinished("reviews", settings().runs_dir)
    assert Library().names() == []
    sweep.run_sweep(of(settings, 2, 4))
    sweep.run_sweep(of(settings, 8, 16))  # more rungs, beside those that are there
    assert Library().names() == [f"reviews-r{rank}" for rank in (16, 2, 4, 8)]


@pytest.mark.slow
def test_rungs_from_a_parent_can_be_repeated(settings):
    train(settings(name="wide", rank=16))
    given = {
        "dataset": "reviews.csv",
        "parent": "wide",
        "max_steps": 2,
        "max_length": 64,
        "eval_rows": 8,
        "name": "more",
    }
    climbed = sweep.run_sweep([TrainConfig(**given, batch_size=2, learning_rate=rate) for rate in (1e-3, 1e-2)])
    assert [it.rank for it in climbed.trials] == [16, 16]
    for rung in climbed.trials:
        adapter = Library().get(rung.name)
        again = resolve_settings(TrainConfig, {"name": "again", "overwrite": True}, adapter.path / "run.yaml")
        assert train(again).sha256 == adapter.sha256


@pytest.mark.slow
def test_the_way_on_names_the_folder_of_the_runs(settings, tmp_path, stopped_at):
    text = stopped_at(2, 2, runs_dir=tmp_path / "elsewhere")
    assert text.endswith(f"Go on with: python cli.py train --resume reviews --runs-dir {tmp_path / 'elsewhere'}")
    assert len(sweep.resume_sweep("reviews", tmp_path / "elsewhere").trials) == 3


def test_a_ladder_that_waits_is_not_begun_again(settings, stopped_at):
    stopped_at(2, 2)
    with pytest.raises(TrainingError) as error:
        sweep.run_sweep(of(settings, 2, 4, 8))
    assert str(error.value) == (
        "runs/reviews.sweep holds an unfinished sweep: go on with it (python cli.py train --resume reviews), drop it with "
        "--overwrite, or choose another --name."
    )
    climbed = sweep.run_sweep(of(settings, 2, 4, overwrite=True))
    assert [it.name for it in climbed.trials] == ["reviews-r2", "reviews-r4"]


@pytest.mark.parametrize("content", ["trials: 3\nfacts: {}\n", "trial: []\n", "trials:\n- rank: many\nfacts: {}\n"])
def test_a_ladder_that_cannot_be_read_is_said(settings, content, stopped_at):
    stopped_at(2, 2)
    (settings().runs_dir / "reviews.sweep" / "sweep.yaml").write_text(content)
    with pytest.raises(TrainingError) as error:
        sweep.resume_sweep("reviews")
    assert str(error.value) == "runs/reviews.sweep/sweep.yaml is not what the sweep was started with: start anew."


def test_sweep_of_an_earlier_version_is_refused(settings):
    folder = settings().runs_dir / "reviews.ladder"
    folder.mkdir(parents=True)
    (folder / "ladder.yaml").write_text("rungs: []\n")
    with pytest.raises(TrainingError) as error:
        sweep.is_unfinished("reviews", settings().runs_dir)
    assert str(error.value) == (
        "runs/reviews.ladder is an unfinished sweep of an earlier version and cannot be resumed: remove it and start the "
        "sweep anew."
    )


def test_the_command(quick, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "120")
    options = [it for it in quick if it not in ("--learning-rate", 0.01)]
    done = run("train", *options, "--rank", "2,4", "--learning-rate", "1e-3,1e-2")
    names = [f"reviews-r{rank}-lr{rate}" for rank in (2, 4) for rate in ("0p001", "0p01")]
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["adapter", "rank"]
    assert [line.split()[0] for line in lines if line.startswith("reviews-r")] == names
    assert lines[-1].startswith("keep reviews-r")
    again = run("train", *options, "--rank", "2,8", "--overwrite", "--json")
    assert [it["name"] for it in json.loads(again.stdout)["trials"]] == ["reviews-r2", "reviews-r8"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            ["--rank", "2,,4"],
            "Error: Invalid value for '--rank': '2,,4' is not a whole number, nor several with commas between",
        ),
        (["--rank", "2,2"], "Error: Invalid value for '--rank': '2,2' has a number twice."),
        (["--rank", "0,2"], "Error: rank: input should be greater than or equal to 1 (got 0)"),
        (
            ["--learning-rate", "fast"],
            "Error: Invalid value for '--learning-rate': 'fast' is not a number, nor several",
        ),
        (
            ["--rank", "2,4", "--plan"],
            "Error: --plan and --preview are for one run: give one rank and one learning rate.",
        ),
    ],
)
def test_what_is_no_ladder_is_refused(quick, given, text):  # noqa: F811
    done = run("train", *quick[:-2], *given, exit_code=2 if "Invalid" in text else 1)
    assert done.stderr.startswith(text), done.stderr


@pytest.mark.slow
def test_the_command_goes_on(settings, stopped_at):
    stopped_at(4, 3)
    done = run("train", "--resume", "reviews")
    assert done.stdout.splitlines()[-1].startswith("keep reviews-r")
    assert "Trial 2 of 3: reviews-r4." in done.stderr
