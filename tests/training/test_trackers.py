"""What a run hands on to trackers is what it writes down itself."""

import json

import pytest

from lora_tuner import TrainConfig, resume, train
from lora_tuner.errors import ConfigError
from lora_tuner.settings_files import resolve_settings


def read(folder):
    """Tag -> step -> value, of all files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {it.step: it.value for it in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_tensorboard_matches_metrics_file(settings, tmp_path):
    adapter = train(settings(report_to=["tensorboard"], eval_every=3))
    lines = [json.loads(line) for line in (adapter.path / "metrics.jsonl").read_text().splitlines()]
    found = read(tmp_path / "runs" / "tensorboard" / "reviews")
    for name, tag in (
        ("loss", "train/loss"),
        ("eval_loss", "eval/loss"),
        ("learning_rate", "train/learning_rate"),
    ):
        ours = {line["step"]: line[name] for line in lines if name in line}
        ours.pop(0, None)  # the base's: trackers show the run alone
        assert found[tag] == pytest.approx(ours, rel=1e-6), name
    assert len(found["train/loss"]) == 6
    assert set(found["eval/loss"]) == {3, 6}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tensorboard"]


def test_tensorboard_has_samples(settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    adapter = train(settings(report_to=["tensorboard"], eval_every=3, sample_prompt=["Acting"]))
    events = EventAccumulator(str(tmp_path / "runs" / "tensorboard" / "reviews"))
    events.Reload()
    found = events.Tensors("samples/text_summary")
    assert [event.step for event in found] == [sample.step for sample in adapter.samples] == [0, 3, 6]
    assert all(b"| Acting | " in event.tensor_proto.string_val[0] for event in found)


def test_resumed_run_continues_tensorboard(settings, tmp_path, stop_at):
    with stop_at(2):
        train(settings(report_to=["tensorboard"]))
    assert set(read(tmp_path / "runs" / "tensorboard" / "reviews")["train/loss"]) == {1, 2}
    resume("reviews")
    assert set(read(tmp_path / "runs" / "tensorboard" / "reviews")["train/loss"]) == set(range(1, 7))


def test_tracker_does_not_change_adapter(settings):
    told = train(settings(name="told", report_to=["tensorboard"]))
    assert told.sha256 == train(settings(name="alone")).sha256


def test_missing_tracker_is_refused_first(settings):
    with pytest.raises(ConfigError) as error:
        train(settings(report_to=["tensorboard", "wandb"], base="nowhere/nothing"))
    assert str(error.value) == "report_to: wandb is not installed: pip install wandb."


def test_unknown_tracker_is_refused():
    with pytest.raises(ConfigError) as error:
        resolve_settings(TrainConfig, {"report_to": ["paper"]})
    assert str(error.value) == (
        "report_to: unknown tracker paper: choose from tensorboard, trackio, wandb, mlflow (got ['paper'])"
    )


def test_other_trackers_go_to_trainer(settings, monkeypatch):
    """Trainer's own integrations are asked for, by the names that it knows."""
    from lora_tuner.training import arguments

    asked = []
    monkeypatch.setattr(arguments, "check_trackers", lambda config: None)
    monkeypatch.setattr(
        "transformers.trainer.get_reporting_integration_callbacks", lambda names: asked.append(list(names)) or []
    )
    train(settings(name="one", report_to=["mlflow", "trackio"]))
    assert asked == [["mlflow", "trackio"]]
