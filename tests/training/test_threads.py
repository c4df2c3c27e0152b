"""Runs and sweeps with a number of threads: recorded, refused when changed, accepted by name."""

import pytest
import torch
import yaml

from lora_tuner import Interrupted, Library, Notice, resume, train
from lora_tuner.adapters.adapter import RUN_FILE, read_manifest
from lora_tuner.errors import ConfigError, TrainingError
from lora_tuner.models import threads
from lora_tuner.training import arguments, sweep

from ..cli.test_commands import error, quick, run  # noqa: F401 - a fixture
from .test_run import StopAt


@pytest.fixture(autouse=True)
def same_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "busy_warning", lambda: None)
    yield
    torch.set_num_threads(before)


def stopped(settings):
    with pytest.raises(Interrupted):
        train(settings(threads=1, max_steps=5), StopAt(2))


def test_threads_of_a_run_are_kept(settings):
    stopped(settings)
    torch.set_num_threads(2)
    resumed = resume("reviews", accept=["threads"])  # with those of run.yaml: nothing changes
    assert torch.get_num_threads() == 1
    assert (resumed.manifest.run.threads, resumed.manifest.run.inexact) == (1, [])
    assert yaml.safe_load((resumed.path / RUN_FILE).read_text())["threads"] == 1


def test_changed_threads_are_accepted_by_name(settings, tmp_path):
    stopped(settings)
    with pytest.raises(
        TrainingError,
        match=r"threads \(was 1, is 2\)\. Resume with --threads 1; or with --accept threads, and the manifest",
    ):
        resume("reviews", threads=2)
    with pytest.raises(ConfigError, match=r"^accept: 'data' is no change that a resume accepts: give threads\.$"):
        resume("reviews", accept=["data"])
    with pytest.raises(Interrupted):
        resume("reviews", notify=StopAt(4), threads=2, accept=["threads"])
    assert read_manifest(tmp_path / "runs" / "reviews" / "checkpoint-4").run.inexact == ["threads"]
    torch.set_num_threads(1)
    resumed = resume("reviews")  # the number and its acceptance are kept
    assert (resumed.manifest.run.threads, resumed.manifest.run.inexact) == (2, ["threads"])
    assert "resumed with other threads: not exactly repeatable" in " ".join(
        run("adapters", "show", "reviews").stdout.split()
    )


@pytest.mark.slow
def test_sweep_accepts_changed_threads(settings):
    configs = [settings(rank=rank, threads=1, max_steps=4) for rank in (2, 4)]
    with pytest.raises(Interrupted):
        sweep.run_sweep(configs, StopAtTrial(2))
    with pytest.raises(TrainingError, match=r"threads \(was 1, is 2\)"):
        sweep.resume_sweep("reviews", threads=2)
    sweep.resume_sweep("reviews", threads=2, accept=["threads"])
    first, second = (Library().get(f"reviews-r{rank}").manifest.run for rank in (2, 4))
    assert (first.threads, first.inexact) == (1, [])
    assert (second.threads, second.inexact) == (2, ["threads"])


class StopAtTrial(StopAt):
    """Presses Ctrl-C in the second trial of two."""

    def __call__(self, event):
        if getattr(event, "stage", "") == "trial 2 of 2: training" and event.done == self.step - 1:
            StopAt.__call__(self, type(event)("training", event.done, event.total))


def test_busy_machine_is_named_once(settings, monkeypatch):
    monkeypatch.setattr(arguments, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(threads, "SAID_AGAIN", 0)
    monkeypatch.setattr(threads, "busy_warning", lambda: "2 threads are slow.")
    notices = []
    train(settings(max_steps=3), lambda event: notices.append(event.text) if isinstance(event, Notice) else None)
    assert [text for text in notices if "slow" in text] == [
        "2 threads are slow.",  # as the base is loaded
        "2 threads are slow. Press Ctrl-C, then: python cli.py train --resume reviews --threads 1 --accept threads",
    ]


def test_more_steps_are_from_the_adapter(settings, quick):  # noqa: F811
    stopped(settings)
    advice = (
        "A run keeps its number of steps; a new adapter continues from the finished one: python cli.py train "
        "--config adapters/reviews/run.yaml --from reviews --name reviews-2 --max-steps {}"
    )
    assert error("train", "--resume", "reviews", "--max-steps", 9).endswith(
        advice.format(4)
    )  # 5 of 9 are in the run
    assert error("train", "--resume", "reviews", "--minutes", 3).endswith(" --name reviews-2 --minutes 3")
    assert "A run keeps" not in error("train", "--resume", "reviews", "--rank", 2)
    assert error("train", "--accept", "threads") == (
        "Error: --accept is for a run that is resumed: give --resume NAME too."
    )
    run("train", "--resume", "reviews", "--accept", "threads", "--threads", 1)
    assert advice.format("N") in error("train", "--resume", "reviews")
    run("train", *advice.format(2).split("cli.py train ")[1].split())
    child = Library().get("reviews-2").manifest
    assert (child.run.steps, child.parents[0].name) == (2, "reviews")
