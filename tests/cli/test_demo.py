"""The demo on a tiny base: the commands that it runs, in the current folder."""

import pytest
from typer.testing import CliRunner

from lora_tuner import Library, train
from lora_tuner.cli import demo
from lora_tuner.cli.app import app


@pytest.fixture
def run_demo(gpt2, reviews_csv, monkeypatch):
    """Return a function that runs the demo, with a shorter training on other data."""
    training = (
        f"--base {gpt2} --dataset {reviews_csv} --name imdb --device cpu --max-steps 3 --rank 2 --max-length 64"
    )
    monkeypatch.setattr(demo, "TRAINING", (*training.split(), "--eval-rows", "4"))

    def run():
        result = CliRunner().invoke(app, ["demo"], prog_name="cli.py")
        assert result.exit_code == 0, result.stderr
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


def test_demo_resumes_its_unfinished_run(run_demo, settings, stop_at):
    with stop_at(1):
        train(settings(name="imdb", max_steps=3))
    result = run_demo()
    assert commands(result) == [["train", "--resume"], ["compare", "Acting"]]
    assert "Resuming after step 1." in result.stderr
    assert Library().get("imdb").manifest.run.steps == 3
