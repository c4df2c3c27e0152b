"""The demo on a tiny base: the commands that it runs, in the current folder."""

import pytest
from typer.testing import CliRunner

from lora_tuner import Library, train
from lora_tuner.cli import demo
from lora_tuner.cli.app import app
from lora_tuner.training.paths import sweep_folder
from lora_tuner.training.unfinished import SweepState, write_sweep


@pytest.fixture
def run_demo(gpt2, reviews_csv, monkeypatch):
    """Return a function that runs the demo, with a shorter training on other data."""
    training = (
        f"--base {gpt2} --dataset {reviews_csv} --name imdb --device cpu --max-steps 3 --rank 2 --max-length 64"
    )
    monkeypatch.setattr(demo, "TRAINING", (*training.split(), "--eval-rows", "4"))

    def run(exit_code=0):
        result = CliRunner().invoke(app, ["demo"], prog_name="cli.py")
        assert result.exit_code == exit_code, result.stderr
        return result

    return run


def commands(result):
    return [line.split()[3:5] for line in result.stderr.splitlines() if line.startswith("$ python cli.py ")]


def test_demo_trains_once_and_compares(run_demo):
    first = run_demo()
    assert commands(first) == [["train", "--base"], ["compare", "Acting"]]
    assert Library().names() == ["imdb"]
    adapter = Library().get("imdb")
    second = run_demo()
    assert commands(second) == [["compare", "Acting"]]
    for result in (first, second):
        *_, shown = result.stdout.rpartition("(base)")
        assert "imdb" in shown
        assert shown.count("Acting") == 2
    assert Library().get("imdb").sha256 == adapter.sha256


def test_demo_leaves_a_sweep_alone(run_demo, settings):
    config = settings(name="imdb", max_steps=3)
    state = SweepState(id="one", trials=[config], facts={}, diverged=[])
    write_sweep(state, sweep_folder(config.runs_dir, "imdb"))
    error = run_demo(exit_code=1).stderr
    assert error.endswith("choose another --name.\n")
    assert "imdb.sweep is an unfinished sweep of this name: finish or remove it (`runs remove imdb`)" in error


def test_demo_resumes_its_unfinished_run(run_demo, settings, stop_at):
    with stop_at(1):
        train(settings(name="imdb", max_steps=3))
    result = run_demo()
    assert commands(result) == [["train", "--resume"], ["compare", "Acting"]]
    assert "Resuming after step 1." in result.stderr
    assert Library().get("imdb").manifest.run.steps == 3
