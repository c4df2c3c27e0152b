"""Sweeps: each trial equals its single run, and a stopped sweep resumes."""

import json
import math
import re
import shutil

import pytest

from lora_tuner import Library, ModelOptions, TrainConfig, evaluate, resume, train
from lora_tuner.adapters.growth import find_growth
from lora_tuner.data.dataset import load_dataset
from lora_tuner.errors import (
    AdapterError,
    ConfigError,
    DivergedError,
    Interrupted,
    TrainingError,
    WrongBaseError,
)
from lora_tuner.evaluation import gain_matrix
from lora_tuner.models import loading
from lora_tuner.models.resolve import find_base
from lora_tuner.settings_files import expand_sweep, resolve_settings
from lora_tuner.training import inputs, sweep, trainer

from .. import tiny_models
from ..cli.test_commands import quick, run  # noqa: F401 - a fixture


def configs_of(settings, *ranks, **changes):
    return [settings(rank=rank, **changes) for rank in ranks]


def test_expand_sweep_combines_all_values():
    assert expand_sweep({"rank": 4, "seed": 1}) == [{"rank": 4, "seed": 1}]
    assert expand_sweep({"rank": [2, 4], "learning_rate": [1e-3, 2e-3]}) == [
        {"rank": rank, "learning_rate": rate} for rank in (2, 4) for rate in (1e-3, 2e-3)
    ]


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_trial_equals_its_single_run(settings, request, kind):
    model_folder = request.getfixturevalue(kind)
    result = sweep.run_sweep(configs_of(settings, 2, 4, 8, base=str(model_folder)))
    assert (
        [trial.name for trial in result.trials] == ["reviews-r2", "reviews-r4", "reviews-r8"] == Library().names()
    )
    for rank, trial in zip((2, 4, 8), result.trials, strict=True):
        alone = train(settings(rank=rank, base=str(model_folder), name="alone", overwrite=True))
        adapter = Library().get(trial.name)
        assert adapter.sha256 == alone.sha256
        assert adapter.manifest.run.method == "lora"
        assert (trial.rank, trial.bytes, trial.seconds) == (rank, adapter.bytes, adapter.manifest.run.seconds)
        assert trial.loss == pytest.approx(adapter.manifest.result.loss)
        assert result.base_loss == pytest.approx(adapter.manifest.result.base_loss)


def test_sweep_never_selects_on_test(settings, tmp_path):
    (tmp_path / "data").mkdir()
    texts = tiny_models.reviews(60)
    (tmp_path / "data" / "train.csv").write_text("text\n" + "".join(f"{text}\n" for text in texts))
    (tmp_path / "data" / "test.csv").write_text("not read")
    notices = []
    result = sweep.run_sweep(
        configs_of(settings, 2, 4, dataset="data", max_steps=1), lambda event: notices.append(str(event))
    )
    assert sum("as a sweep selects a trial" in notice for notice in notices) == 1
    for trial in result.trials:
        adapter = Library().get(trial.name)
        assert adapter.manifest.data.eval_dataset is None
        assert set(gain_matrix.cached_rows(adapter).texts) <= set(texts)
        config = resolve_settings(TrainConfig, {"name": "again", "overwrite": True}, adapter.path / "run.yaml")
        assert train(config).manifest.data == adapter.manifest.data
    with pytest.raises(ConfigError, match=r"data is a test split \(test\), and a sweep selects"):
        sweep.run_sweep(
            configs_of(settings, 2, 4, name="other", dataset="data", eval_dataset="data", eval_split="test")
        )


@pytest.fixture
def sweep_rows(settings):
    """Run a sweep over rows, of two steps unless others are given."""

    def run_sweep(*sizes, **changes):
        given = {"max_steps": 2} | changes
        return sweep.run_sweep([settings(max_rows=size, **given) for size in sizes])

    return run_sweep


def test_sizes_are_nested_and_measured_alike(sweep_rows, monkeypatch):
    """Each trial trains on the rows of `--max-rows` alone, and its run.yaml repeats it."""
    loaded = []
    monkeypatch.setattr(
        inputs.loading, "open_base", lambda *of, **how: loaded.append("base") or real_base(*of, **how)
    )
    result = sweep_rows(30, 60, 100)
    assert loaded == ["base"]
    names = ["reviews-n30", "reviews-n60", "reviews-n100"]
    assert [trial.name for trial in result.trials] == names
    adapters = [Library().get(name) for name in names]
    configs = [resolve_settings(TrainConfig, {}, adapter.path / "run.yaml") for adapter in adapters]
    trained = [set(load_dataset(config).train) for config in configs]
    assert trained[0] < trained[1] < trained[2]
    assert [trial.rows for trial in result.trials] == [*map(len, trained)]
    assert {trial.steps for trial in result.trials} == {2}
    for config, rows, adapter in zip(configs, trained, adapters, strict=True):
        alone = load_dataset(config.model_copy(update={"eval_max_rows": None}))
        assert rows == set(alone.train)
        data = adapter.manifest.data
        assert data.held_out_hash == adapters[-1].manifest.data.held_out_hash
        assert data.counts["not_drawn"] > 0
        assert not rows & set(gain_matrix.cached_rows(adapter).texts)
    again = train(configs[0].model_copy(update={"name": "again"}))
    assert (again.sha256, again.manifest.data) == (adapters[0].sha256, adapters[0].manifest.data)
    figures = result.growth.doublings
    assert [(doubling.quantity, doubling.values) for doubling in figures] == [("rows", [*map(len, trained)])]
    assert find_growth(adapters[1], Library()) == result.growth
    (result.folder / "sweep.json").unlink()
    unpaired = find_growth(adapters[1], Library()).doublings[0]
    assert unpaired.gains == pytest.approx(figures[0].gains)
    assert unpaired.standard_error > figures[0].standard_error


def test_sizes_take_equal_epochs_or_steps(settings):
    """Without a stop rule all take the steps of the largest."""
    configs = [settings(max_rows=size, max_steps=None, epochs=1, batch_size=4) for size in (30, 60, 100)]
    result = sweep.run_sweep(configs)
    for trial in result.trials:
        assert trial.steps == math.ceil(Library().get(trial.name).manifest.run.sequences / 4)
    assert [doubling.quantity for doubling in result.growth.doublings] == ["rows and steps"]
    configs = [settings(max_rows=size, max_steps=None, minutes=0.002, name="timed") for size in (30, 60)]
    notices = []
    result = sweep.run_sweep(configs, lambda event: notices.append(str(event)))
    assert len({trial.steps for trial in result.trials}) == 1
    assert any("Trial 1 of 2: timed-n60." in notice for notice in notices)
    assert result.growth is None


def test_steps_and_epochs_are_swept(settings):
    result = sweep.run_sweep([settings(max_steps=steps) for steps in (1, 2, 4)])
    assert [(trial.name, trial.steps) for trial in result.trials] == [
        ("reviews-s1", 1),
        ("reviews-s2", 2),
        ("reviews-s4", 4),
    ]
    assert [doubling.quantity for doubling in result.growth.doublings] == ["steps"]
    assert train(settings(max_steps=2, name="alone")).sha256 == Library().get("reviews-s2").sha256
    configs = [settings(max_steps=None, epochs=epochs, name="epochs") for epochs in (0.05, 0.1)]
    assert [trial.name for trial in sweep.run_sweep(configs).trials] == ["epochs-e0p05", "epochs-e0p1"]


def test_stopped_sweep_over_rows_resumes_bitwise(settings, sweep_rows, stop_at, reviews_csv):
    whole = sweep_rows(30, 60, 100, max_steps=4, name="whole")
    with stop_at(2, "-n60"):
        sweep_rows(30, 60, 100, max_steps=4)
    text, (row, *_) = reviews_csv.read_text(), load_dataset(settings(max_rows=30, eval_max_rows=100)).train
    reviews_csv.write_text(text.replace(row, f"{row} Again."))
    with pytest.raises(TrainingError, match="changed since it stopped: data"):
        sweep.resume_sweep("reviews")
    reviews_csv.write_text(text)
    result = sweep.resume_sweep("reviews")
    for one, other in zip(result.trials, whole.trials, strict=True):
        assert Library().get(one.name).sha256 == Library().get(other.name).sha256
        assert one.loss == pytest.approx(other.loss)
    assert [doubling.gains for doubling in result.growth.doublings] == [
        pytest.approx(doubling.gains) for doubling in whole.growth.doublings
    ]


def test_wrong_sizes_are_refused(sweep_rows, settings):
    with pytest.raises(ConfigError) as error:
        sweep_rows(60, 500, 1000)
    assert re.fullmatch(
        r"--max-rows 500 and 1000 train on the same \d+ rows: the data has no more, so give smaller numbers\.",
        str(error.value),
    )
    with pytest.raises(ConfigError, match="One trial has no max_rows"):
        sweep_rows(60, None)
    with pytest.raises(ConfigError, match="eval_max_rows is 20, but max_rows 30"):
        resolve_settings(TrainConfig, {"max_rows": 30, "eval_max_rows": 20})
    assert Library().names() == []
    assert not sweep.is_unfinished("reviews", settings().runs_dir)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pissa", "eva", "dora", "lora+"])
def test_trials_of_each_method(settings, method):
    sweep.run_sweep(configs_of(settings, 2, 4, method=method))
    for rank in (2, 4):
        alone = train(settings(rank=rank, method=method, name="alone", overwrite=True))
        assert Library().get(f"reviews-r{rank}").sha256 == alone.sha256


@pytest.mark.slow
def test_sweep_loads_inputs_once(settings, monkeypatch):
    read = []
    monkeypatch.setattr(inputs, "load_dataset", lambda *of: read.append("rows") or real_corpus(*of))
    monkeypatch.setattr(
        inputs.loading, "open_base", lambda *of, **how: read.append("base") or real_base(*of, **how)
    )
    sweep.run_sweep(configs_of(settings, 2, 4, 8))
    assert sorted(read) == ["base", "rows"]


real_corpus, real_base = inputs.load_dataset, inputs.loading.open_base


@pytest.mark.slow
def test_timed_trials_take_same_steps(settings):
    result = sweep.run_sweep(configs_of(settings, 2, 4, max_steps=None, minutes=0.004))
    steps = {Library().get(trial.name).manifest.run.steps for trial in result.trials}
    assert len(steps) == 1


def test_smallest_good_trial_is_recommended(settings):
    result = sweep.run_sweep(configs_of(settings, 1, 4, 16, learning_rate=3e-2, max_steps=20, eval_rows=20))
    best = min(result.trials, key=lambda trial: trial.loss)
    assert best.gap == best.standard_error == 0
    good = [trial for trial in result.trials if trial.gap <= trial.standard_error]
    assert result.recommended == min(good, key=lambda trial: trial.bytes).name
    pair = evaluate([Library().get(trial.name) for trial in result.trials], options=ModelOptions(device="cpu"))
    for trial, line in zip(result.trials, pair.cells, strict=True):
        assert trial.loss == pytest.approx(line[0].loss, abs=1e-6)
        assert trial.gap == pytest.approx(trial.loss - best.loss, abs=1e-9)
    facts = json.loads((result.folder / "sweep.json").read_text())
    assert facts == json.loads(json.dumps(result.to_dict()))
    assert (result.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in result.folder.iterdir()) == ["sweep.json", "sweep.png"]


@pytest.fixture
def stopped_at(stop_at, settings):
    """Run a sweep, stop it in that trial and step, and return the message."""

    def run_and_stop(trial, step, **changes):
        with stop_at(step, f"-r{trial}") as stopped:
            sweep.run_sweep(configs_of(settings, 2, 4, 8, **changes))
        return str(stopped.value)

    return run_and_stop


@pytest.mark.parametrize(
    "trial", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
def test_stopped_sweep_resumes_bitwise(settings, trial, stopped_at):
    whole = sweep.run_sweep(configs_of(settings, 2, 4, 8, name="whole"))
    text = stopped_at(trial, 3)
    assert text == "Stopped at step 3 of 6, saved. Resume with: python cli.py train --resume reviews"
    assert sweep.is_unfinished("reviews", settings().runs_dir)
    before = {name: Library().get(name).manifest.created for name in Library().names()}
    result = sweep.resume_sweep("reviews")
    assert not sweep.is_unfinished("reviews", settings().runs_dir)
    for one, other in zip(result.trials, whole.trials, strict=True):
        assert Library().get(one.name).sha256 == Library().get(other.name).sha256
        assert one.loss == pytest.approx(other.loss)
    for name, created in before.items():
        assert Library().get(name).manifest.created == created  # not trained again
    assert result.recommended.removeprefix("reviews") == whole.recommended.removeprefix("whole")


@pytest.mark.slow
def test_sweep_stopped_while_measuring_resumes(settings, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "measure_trials", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Interrupted) as stopped:
            sweep.run_sweep(configs_of(settings, 2, 4))
    assert str(stopped.value) == "Stopped immediately. Resume with: python cli.py train --resume reviews"
    monkeypatch.setattr(inputs, "load_dataset", None)
    result = sweep.resume_sweep("reviews")
    assert [trial.name for trial in result.trials] == ["reviews-r2", "reviews-r4"]
    assert all(trial.loss < result.base_loss for trial in result.trials)


@pytest.mark.parametrize("rate", [2e-3, None])
def test_diverged_trial_has_rate_if_given(settings, monkeypatch, rate):
    """That of another trial is not its own: each rank has a measured rate of its own."""
    run_real = trainer.run_trainer

    def run_trainer(setup, *places):
        if setup.config.rank == 2:
            raise DivergedError("The loss is nan")
        return run_real(setup, *places)

    monkeypatch.setattr(trainer, "run_trainer", run_trainer)
    result = sweep.run_sweep([settings(rank=rank, learning_rate=rate, max_steps=1) for rank in (2, 4)])
    bad, good = result.trials
    assert (bad.loss, bad.learning_rate) == (None, rate)
    assert good.learning_rate > 0


def test_diverged_trial_does_not_stop_sweep(settings):
    notices = []
    configs = [settings(rank=4, learning_rate=rate) for rate in (1e-2, 1e30)]
    result = sweep.run_sweep(configs, lambda event: notices.append(getattr(event, "text", "")))
    good, bad = result.trials
    assert bad.name == "reviews-lr1e30"
    assert bad.loss is None
    assert result.recommended == good.name == "reviews-lr0p01"
    assert [text for text in notices if "so the run has stopped" in text]


@pytest.mark.slow
def test_sweep_from_parent_keeps_rank(settings, adapter):
    given = {"dataset": "reviews.csv", "parent": "reviews", "max_steps": 2, "eval_rows": 8, "name": "more"}
    result = sweep.run_sweep([TrainConfig(**given, learning_rate=rate) for rate in (1e-3, 1e-2)])
    assert [Library().get(trial.name).manifest.parents[0].name for trial in result.trials] == [
        "reviews",
        "reviews",
    ]
    with pytest.raises(ConfigError) as error:
        sweep.run_sweep([TrainConfig(**given, rank=rank) for rank in (2, 4)])
    assert str(error.value) == "--from keeps the rank of the parent: give several learning rates, not ranks."


def test_sweep_with_taken_name_is_refused(settings, adapter):
    Library().rename("reviews", "reviews-r4")
    with pytest.raises(AdapterError, match="reviews-r4"):
        sweep.run_sweep(configs_of(settings, 2, 4))
    assert Library().names() == ["reviews-r4"]
    assert not (settings().runs_dir / "reviews.sweep").exists()


@pytest.mark.slow
def test_overwritten_sweep_starts_from_scratch(settings):
    """Adapters of an earlier sweep are trained again."""
    sweep.run_sweep(configs_of(settings, 2, 4, max_steps=None, minutes=0.002, seed=7))
    before = {name: Library().get(name).sha256 for name in Library().names()}
    sweep.run_sweep(configs_of(settings, 2, 4, overwrite=True))
    for rank in (2, 4):
        alone = train(settings(rank=rank, name="alone", overwrite=True))
        assert Library().get(f"reviews-r{rank}").sha256 == alone.sha256 != before[f"reviews-r{rank}"]


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_only_the_stopped_trial_resumes(settings, overwrite, stopped_at):
    whole = sweep.run_sweep(configs_of(settings, 2, 4, 8, name="whole"))
    if overwrite:  # an earlier stopped run of this trial's name, with other settings
        stopped_at(8, 2, seed=5)
    stopped_at(4, 3, overwrite=overwrite)
    steps = []
    sweep.resume_sweep("reviews", notify=lambda event: steps.append(getattr(event, "done", None)))
    for one in whole.trials:
        assert Library().get(one.name.replace("whole", "reviews")).sha256 == Library().get(one.name).sha256
    done = [step for step in steps if step is not None]
    assert done.count(1) <= 3  # trial 4 began with its fourth step


def test_sweep_with_unfinished_trial_is_refused(settings, stop_at):
    with stop_at(1):
        train(settings(name="reviews-r4", seed=9))
    with pytest.raises(TrainingError, match="runs/reviews-r4 holds an unfinished run"):
        sweep.run_sweep(configs_of(settings, 2, 4))
    assert Library().names() == []


@pytest.mark.slow
def test_sweep_with_changed_data_is_refused(settings, reviews_csv, stopped_at):
    stopped_at(2, 6)
    text = reviews_csv.read_text()
    reviews_csv.write_text(text + "another review,1\n")
    with pytest.raises(TrainingError, match="changed since it stopped: data"):
        sweep.resume_sweep("reviews")
    reviews_csv.write_text(text)
    assert len(sweep.resume_sweep("reviews").trials) == 3


@pytest.mark.slow
def test_sweep_with_replaced_adapter_is_refused(settings, stopped_at):
    stopped_at(4, 2)
    train(settings(rank=2, seed=3, name="reviews-r2", overwrite=True))
    with pytest.raises(TrainingError) as error:
        sweep.resume_sweep("reviews")
    assert str(error.value) == (
        "adapters/reviews-r2 is not the adapter that the sweep trained: restore it, or rename or remove it "
        "(`adapters rename`, `adapters remove`), and it is trained again."
    )
    Library().rename("reviews-r2", "own")
    assert len(sweep.resume_sweep("reviews").trials) == 3


@pytest.mark.slow
def test_removed_trial_is_trained_again(settings, stopped_at):
    stopped_at(8, 1, keep_checkpoints=True, max_steps=2)
    before = {name: Library().get(name).sha256 for name in Library().names()}
    Library().remove("reviews-r2")
    Library().rename("reviews-r4", "mine")
    kept = sorted(settings().runs_dir.glob("reviews-r[24]/checkpoint-2"))
    with pytest.raises(TrainingError) as error:
        sweep.resume_sweep("reviews")
    assert str(error.value) == (
        "runs/reviews-r2 holds the checkpoints of a finished run, whose adapter is gone: rename or remove that folder."
    )
    assert len(kept) == 2
    assert all(path.is_dir() for path in kept)
    for path in kept:
        path.parent.rename(path.parent.with_name(f"old-{path.parent.name}"))
    assert len(sweep.resume_sweep("reviews").trials) == 3
    assert Library().names() == ["mine", "reviews-r2", "reviews-r4", "reviews-r8"]
    assert {name: Library().get(name).sha256 for name in before} == before


@pytest.mark.slow
def test_trial_finished_alone_is_not_trained_again(settings, stopped_at):
    stopped_at(4, 3)
    created = resume("reviews-r4").manifest.created
    assert len(sweep.resume_sweep("reviews").trials) == 3
    assert Library().get("reviews-r4").manifest.created == created


@pytest.mark.slow
def test_foreign_run_in_place_of_trial_is_kept(settings, stopped_at, stop_at):
    stopped_at(4, 3)
    with stop_at(1):
        train(settings(name="reviews-r8", seed=9))
    with pytest.raises(TrainingError) as error:
        sweep.resume_sweep("reviews")
    assert str(error.value) == "runs/reviews-r8 is not of the sweep reviews: rename or remove it."
    (settings().runs_dir / "reviews-r8").rename(settings().runs_dir / "mine")
    assert len(sweep.resume_sweep("reviews").trials) == 3
    assert (settings().runs_dir / "mine" / "run.yaml").is_file()


@pytest.mark.slow
def test_repeated_sweep_resumes_its_own_trial(settings, stopped_at):
    """The adapters of an earlier sweep with the same settings are not those of this one."""
    sweep.run_sweep(configs_of(settings, 2, 4))
    stopped_at(2, 3, overwrite=True)
    created = Library().get("reviews-r4").manifest.run.sweep
    sweep.resume_sweep("reviews")
    assert {Library().get(f"reviews-r{rank}").manifest.run.sweep for rank in (2, 4, 8)} != {created}


@pytest.fixture
def stopped_measuring(settings, monkeypatch):
    """Run a sweep and stop it when all its trials have finished."""
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "measure_trials", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Interrupted):
            sweep.run_sweep(configs_of(settings, 2, 4, max_steps=1))


def test_renamed_trial_is_not_another_one(stopped_measuring):
    Library().rename("reviews-r4", "own")
    Library().rename("reviews-r2", "reviews-r4")
    with pytest.raises(TrainingError, match="adapters/reviews-r4 is not the adapter that the sweep trained"):
        sweep.resume_sweep("reviews")


def test_finished_trials_are_measured_on_their_base(stopped_measuring, gpt2, llama, monkeypatch):
    files = find_base(str(llama))
    monkeypatch.setattr(loading, "base_for_adapter", lambda adapter, options: files)
    with pytest.raises(WrongBaseError):
        sweep.resume_sweep("reviews")


@pytest.mark.slow
def test_other_files_in_sweep_folder_are_kept(settings, stopped_measuring, monkeypatch):
    mine = settings().runs_dir / "reviews.sweep" / "mine"
    measure = sweep.measure_trials
    monkeypatch.setattr(sweep, "measure_trials", lambda *of: mine.write_text("x") and measure(*of))
    for command in (" and resume with: python cli.py train --resume reviews", "m elsewhere."):
        with pytest.raises(TrainingError, match=rf"holds files that are not of a sweep.*{command}$"):
            sweep.resume_sweep("reviews")
        assert mine.is_file()
    mine.unlink()
    monkeypatch.setattr(sweep, "measure_trials", measure)
    assert len(sweep.resume_sweep("reviews").trials) == 2


def test_outputs_in_sweep_folder_are_refused(settings, monkeypatch):
    with pytest.raises(
        TrainingError, match=r"its sweep runs/reviews.sweep would be one folder, or one in the other"
    ):
        sweep.run_sweep(configs_of(settings, 2, 4, adapters_dir="runs/reviews.sweep"))
    monkeypatch.setenv("LORA_TUNER_CACHE", "runs/reviews.sweep/cache")
    with pytest.raises(TrainingError, match=r"runs/reviews.sweep would be in the cache .*, or hold it"):
        sweep.run_sweep(configs_of(settings, 2, 4))


def test_only_places_of_trials_are_compared(settings, reviews_csv, monkeypatch):
    """The sweep `notes` of a folder `notes` writes no adapter `notes`."""
    monkeypatch.setattr(sweep, "prepare_training", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    (reviews_csv.parent / "notes").mkdir()
    reviews_csv.rename(reviews_csv.parent / "notes" / "reviews.csv")
    with pytest.raises(KeyboardInterrupt):  # from loading
        sweep.run_sweep(configs_of(settings, 2, 4, dataset="notes", adapters_dir="."))


def test_run_and_sweep_of_one_name_are_refused(settings, stop_at, stopped_measuring):
    for overwrite in (False, True):
        with pytest.raises(TrainingError, match=r"runs/reviews.sweep is an unfinished sweep of this name"):
            train(settings(overwrite=overwrite))
    with stop_at(1):
        train(settings(name="other"))
    with pytest.raises(TrainingError, match="runs/other is an unfinished run of this name"):
        sweep.run_sweep(configs_of(settings, 2, 4, name="other"))


@pytest.mark.slow
def test_sweep_with_emptied_cache_resumes(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "measure_trials", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Interrupted):
            sweep.run_sweep(configs_of(settings, 2, 4))
    shutil.rmtree(tmp_path / "cache")
    assert len(sweep.resume_sweep("reviews").trials) == 2


def test_foreign_folder_in_place_of_sweep_is_kept(settings):
    folder = settings().runs_dir / "reviews.sweep"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError) as error:
        sweep.run_sweep(configs_of(settings, 2, 4, overwrite=True))
    assert str(error.value) == (
        "runs/reviews.sweep holds files that are not of a sweep, so it is not replaced: choose another --runs-dir or --name."
    )
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_close_rates_have_different_names(settings):
    configs = [settings(learning_rate=rate) for rate in (1e-3, 1.0000001e-3, 1.0, 1e30)]
    names = [sweep._trial_name("a", config, configs) for config in configs]
    assert names == ["a-lr0p001", "a-lr0p0010000001", "a-lr1", "a-lr1e30"]


@pytest.mark.slow
def test_wrong_sweep_leaves_no_state(settings, tmp_path):
    with pytest.raises(ConfigError, match="pissa allows at most"):
        sweep.run_sweep(configs_of(settings, 2, 64, method="pissa"))
    with pytest.raises(ConfigError, match="target_modules"):
        sweep.run_sweep(configs_of(settings, 2, 4, target_modules="nothing"))
    assert not sweep.is_unfinished("reviews", settings().runs_dir)
    assert Library().names() == []
    sweep.run_sweep(configs_of(settings, 2, 4))
    with pytest.raises(TrainingError) as error:
        sweep.run_sweep(configs_of(settings, 8, 16))
    assert str(error.value) == (
        "runs/reviews.sweep holds the result of a sweep: replace it with --overwrite, or choose another --name."
    )
    sweep.run_sweep(configs_of(settings, 8, 16, overwrite=True))  # more trials, beside those that are there
    assert Library().names() == [f"reviews-r{rank}" for rank in (16, 2, 4, 8)]


@pytest.mark.slow
def test_trials_from_parent_repeat_bitwise(settings):
    train(settings(name="wide", rank=16))
    given = {
        "dataset": "reviews.csv",
        "parent": "wide",
        "max_steps": 2,
        "max_length": 64,
        "eval_rows": 8,
        "name": "more",
    }
    result = sweep.run_sweep([TrainConfig(**given, batch_size=2, learning_rate=rate) for rate in (1e-3, 1e-2)])
    assert [trial.rank for trial in result.trials] == [16, 16]
    for trial in result.trials:
        adapter = Library().get(trial.name)
        again = resolve_settings(TrainConfig, {"name": "again", "overwrite": True}, adapter.path / "run.yaml")
        assert train(again).sha256 == adapter.sha256


@pytest.mark.slow
def test_stopped_sweep_names_runs_dir(settings, tmp_path, stopped_at):
    text = stopped_at(2, 2, runs_dir=tmp_path / "elsewhere")
    assert text.endswith(f"Resume with: python cli.py train --resume reviews --runs-dir {tmp_path / 'elsewhere'}")
    assert len(sweep.resume_sweep("reviews", tmp_path / "elsewhere").trials) == 3


def test_unfinished_sweep_needs_resume_or_overwrite(settings, stopped_at):
    stopped_at(2, 2)
    with pytest.raises(TrainingError) as error:
        sweep.run_sweep(configs_of(settings, 2, 4, 8))
    assert str(error.value) == (
        "runs/reviews.sweep holds an unfinished sweep: resume it (python cli.py train --resume reviews), discard it with "
        "--overwrite, or choose another --name."
    )
    result = sweep.run_sweep(configs_of(settings, 2, 4, overwrite=True))
    assert [trial.name for trial in result.trials] == ["reviews-r2", "reviews-r4"]


@pytest.mark.parametrize(
    "content",
    [
        "trials: 3\nfacts: {}\n",
        "id: [",
        "id: a\ntrials: []\nfacts: {}\ndiverged: []\n",
        "id: a\ntrials:\n- rank: many\nfacts: {}\ndiverged: []\n",
        "trials:\n- rank: 2\nfacts: {}\ndone: {}\nstarted: reviews-r2\n",  # as before sweeps had an id
    ],
)
def test_unreadable_sweep_state_is_refused(settings, content, stopped_at):
    stopped_at(2, 2)
    (settings().runs_dir / "reviews.sweep" / "sweep.yaml").write_text(content)
    with pytest.raises(TrainingError) as error:
        sweep.resume_sweep("reviews")
    assert (
        str(error.value)
        == "runs/reviews.sweep/sweep.yaml is damaged, or of another version: start the sweep again with --overwrite."
    )


def test_old_sweep_state_is_refused(settings):
    folder = settings().runs_dir / "reviews.ladder"
    folder.mkdir(parents=True)
    (folder / "ladder.yaml").write_text("rungs: []\n")
    with pytest.raises(TrainingError) as error:
        sweep.is_unfinished("reviews", settings().runs_dir)
    assert str(error.value) == (
        "runs/reviews.ladder is an unfinished sweep of an earlier version and cannot be resumed: remove it and start the "
        "sweep again."
    )


def test_sweep_command_output(quick, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "120")
    options = [option for option in quick if option not in ("--learning-rate", 0.01)]
    done = run("train", *options, "--rank", "2,4", "--learning-rate", "1e-3,1e-2")
    names = [f"reviews-r{rank}-lr{rate}" for rank in (2, 4) for rate in ("0p001", "0p01")]
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["adapter", "rank"]
    assert [line.split()[0] for line in lines if line.startswith("reviews-r")] == names
    assert lines[-1].startswith("recommended: reviews-r")
    name = lines[-1].split()[1].rstrip(",")
    assert f"Next:\n  python cli.py generate --adapter {name}\n" in done.stderr
    again = run("train", *options, "--rank", "2,8", "--overwrite", "--json")
    assert [trial["name"] for trial in json.loads(again.stdout)["trials"]] == ["reviews-r2", "reviews-r8"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            ["--rank", "2,,4"],
            "Error: Invalid value for '--rank': '2,,4' is not a whole number or a list separated by commas",
        ),
        (["--rank", "2,2"], "Error: Invalid value for '--rank': '2,2' has a number twice."),
        (["--rank", "0,2"], "Error: rank: input should be greater than or equal to 1 (got 0)"),
        (
            ["--learning-rate", "fast"],
            "Error: Invalid value for '--learning-rate': 'fast' is not a number or a list separated by commas",
        ),
        (
            ["--rank", "2,4", "--plan"],
            "Error: --plan and --preview are for a single run: give one value of each setting.",
        ),
    ],
)
def test_invalid_sweep_options_are_refused(quick, given, text):  # noqa: F811
    done = run("train", *quick[:-2], *given, exit_code=2 if "Invalid" in text else 1)
    assert done.stderr.startswith(text), done.stderr


@pytest.mark.slow
def test_resume_command_resumes_sweep(settings, stopped_at):
    stopped_at(4, 3)
    done = run("train", "--resume", "reviews")
    assert done.stdout.splitlines()[-1].startswith("recommended: reviews-r")
    assert "Trial 2 of 3: reviews-r4." in done.stderr
