"""What cannot be saved is found before training, and what fails after the last step can be gone on from."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from lora_tuner import Library, Progress, resume, train
from lora_tuner.adapters import model_card, plots
from lora_tuner.adapters.adapter import WEIGHTS_FILE
from lora_tuner.adapters.gains import HeldOutLoss
from lora_tuner.errors import BaseModelError, DivergedError, LoraTunerError, TrainingError
from lora_tuner.models import targets
from lora_tuner.training import checkpoints, loss_result, run, trainer

from ..faults.runs import slow
from ..model_families import save_family


def trained_steps(events):
    return [event for event in events if isinstance(event, Progress) and event.stage == "training"]


# The adapter


def test_adapter_that_peft_renames_is_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "_renamed_by_peft", lambda model, layers: set())
    config = settings(base=str(save_family(tmp_path / "laguna", "laguna")), max_length=32, eval_rows=2)
    events = []
    with pytest.raises(TrainingError) as error:
        train(config, events.append)
    assert str(error.value).startswith(
        f"An adapter of {tmp_path / 'laguna'} could not be saved, so nothing is trained: "
    )
    assert (
        "tensors otherwise, such as base_model.model.model.layers.1.mlp.shared_experts.down_proj.lora_A"
        in str(error.value)
    )
    assert trained_steps(events) == list(Path("runs").iterdir()) == []
    assert not Path("adapters").exists()


def test_adapter_is_not_blamed_for_its_base(settings, gpt2):
    shutil.copytree(gpt2, "base")
    tensors = load_file("base/model.safetensors")
    damaged = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items() if "c_attn" in name}
    save_file(tensors | damaged, "base/model.safetensors", {"format": "pt"})
    with pytest.raises(
        BaseModelError, match=r"^base has a training loss of nan in float32: its weights are damaged"
    ):
        train(settings(base="base", method="dora"))


@pytest.mark.parametrize("method", ["lora", slow("dora"), slow("pissa")])
def test_check_before_training_changes_nothing(settings, method, monkeypatch):
    checked = train(settings(name="checked", method=method, max_steps=2))
    monkeypatch.setattr("lora_tuner.training.checkpoints.check_can_be_saved", lambda setup: None)
    assert train(settings(name="unchecked", method=method, max_steps=2)).sha256 == checked.sha256


# Places


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adapters_dir": "all", "runs_dir": "all"},
            "its run all/reviews would be one folder, or one in the other",
        ),
        ({"runs_dir": "adapters/reviews"}, "would be one folder, or one in the other: choose another --runs-dir"),
        ({"adapters_dir": "runs/reviews/results"}, "would be one folder, or one in the other"),
        ({"adapters_dir": "link", "runs_dir": "missing"}, "would be one folder, or one in the other"),
        ({"adapters_dir": "Out", "runs_dir": "out"}, "would be one folder, or one in the other"),
        ({"runs_dir": "cache/runs"}, "would be in the cache .*: choose another --runs-dir"),
        ({"adapters_dir": ".", "name": "cache"}, "would be in the cache .*: choose another --adapters-dir"),
        ({"name": "Tensorboard"}, "is for the logs of --report-to tensorboard: choose another --name"),
        ({"adapters_dir": "x" * 300}, "is too long for a path: choose another --adapters-dir"),
        ({"runs_dir": "new/" + "x" * 300}, "is too long for a path: choose another --runs-dir"),
        ({"adapters_dir": "reviews.csv"}, "reviews.csv is not a folder: choose another --adapters-dir"),
        ({"adapters_dir": "loop"}, "loop is not a folder: choose another --adapters-dir"),
    ],
)
def test_places_in_conflict_are_refused_first(settings, tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("LORA_TUNER_CACHE", "cache")
    monkeypatch.setattr("lora_tuner.atomic_io._ignores_case", lambda folder: True)
    Path("link").symlink_to("missing")
    Path("loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(LoraTunerError, match=message):
        train(settings(base="nowhere/nothing", **changes))
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "runs"] == before
    assert not any(Path("runs").glob("*"))


def test_folders_in_each_other_are_used(settings):
    adapter = train(settings(max_steps=1, adapters_dir="out", runs_dir="out/runs", name="one"))
    assert Library(Path("out")).get("one").sha256 == adapter.sha256


def test_input_in_replaced_folder_is_refused(settings, stop_at):
    with stop_at(2):
        train(settings(max_steps=3))
    data = shutil.copy("reviews.csv", "runs/reviews/checkpoint-2/more.csv")
    for changes in (
        {"dataset": data, "name": "reviews"},
        {"eval_dataset": data},
        {"parent": "runs/reviews/checkpoint-2"},
    ):
        config = settings(overwrite=True, **changes)
        config = config.model_copy(update={"rank": 8}) if config.parent is None else config
        with pytest.raises(TrainingError, match="runs/reviews would replace runs/reviews/checkpoint-2"):
            train(config)
    resume("reviews")


def test_run_in_data_folder_resumes(settings, stop_at):
    Path("notes").mkdir()
    Path("reviews.csv").rename("notes/reviews.csv")
    places = {"dataset": "notes", "adapters_dir": "notes/adapters", "runs_dir": "notes/runs"}
    train(settings(name="before", max_steps=2, **places))
    with stop_at(2):
        train(settings(name="whole", max_steps=3, **places))
    adapter = resume("whole", runs_dir=Path("notes/runs"))
    assert adapter.manifest.data.hash == Library(Path("notes/adapters")).get("before").manifest.data.hash


def test_stopped_run_with_its_cache_inside_resumes(settings, stop_at, monkeypatch):
    with stop_at(1):
        train(settings(max_steps=2))
    with monkeypatch.context() as patch:
        patch.setenv("LORA_TUNER_CACHE", "runs/reviews/cache")
        with pytest.raises(TrainingError, match="or hold it: set LORA_TUNER_CACHE to another folder"):
            resume("reviews")
    resume("reviews")


def test_stream_of_older_version_is_not_compared(monkeypatch):
    notices = []
    stream = SimpleNamespace(knows_passed_rows=lambda: False)
    monkeypatch.setattr(checkpoints, "open_stream", lambda *of: stream)
    setup = SimpleNamespace(notify=notices.append, dataset=SimpleNamespace(sources=[]))
    checkpoints.check_stream(setup, Path("checkpoint-3"))
    assert [notice.text for notice in notices] == [
        "checkpoint-3 is of an older version: the rows that its stream has passed are not compared."
    ]


def test_run_among_adapters_can_be_moved(settings, stop_at):
    """A run of before, whose adapter would have had its name, can be moved."""
    with stop_at(1):
        train(settings(max_steps=2))
    settled = Path("runs/reviews/run.yaml")
    settled.write_text(settled.read_text().replace("adapters_dir: adapters", "adapters_dir: runs"))
    with pytest.raises(TrainingError, match="move runs/reviews elsewhere, and add its new --runs-dir"):
        resume("reviews")
    Path("other").mkdir()
    Path("runs/reviews").rename("other/reviews")
    assert resume("reviews", runs_dir=Path("other")).path == Path("runs/reviews")


# After the last step


def fail_after_training(name, patch):
    """Make something fail that comes after the last step."""

    def fail(*args, **kwargs):
        raise ValueError("it is\nbroken")

    if name == "plot":
        patch.setattr(plots, "plot_loss", fail)
    elif name == "card":
        patch.setattr(model_card, "model_card", fail)
    elif name == "evaluation":
        patch.setattr(loss_result, "measure_result", fail)
    elif name == "tracker":
        patch.setattr(TrainerCallback, "on_train_end", fail)
    elif name == "weights":
        patch.setattr(
            run, "save_adapter", lambda setup, tensors, manifest, folder: (folder / WEIGHTS_FILE).mkdir()
        )


@pytest.mark.parametrize("name", ["plot", "evaluation", "tracker", slow("card"), slow("weights")])
def test_failure_after_training_is_resumed(settings, monkeypatch, name):
    with monkeypatch.context() as patch:
        fail_after_training(name, patch)
        with pytest.raises(TrainingError) as error:
            train(settings(max_steps=2))
    text = str(error.value)
    assert text.startswith("The adapter could not be written, but the run is kept, with all its steps. ")
    assert text.endswith(" Then resume with: python cli.py train --resume reviews")
    assert "\n" not in text
    events = []
    assert resume("reviews", notify=events.append).manifest.run.steps == 2
    assert trained_steps(events) == list(Path("runs").iterdir()) == []


def test_bad_held_out_loss_is_measured_again(settings, monkeypatch):
    measure = loss_result.measure_pair

    def damaged(*args):
        before, after = measure(*args)
        return before, HeldOutLoss([float("nan")] * len(after.nll), after.predictions)

    with monkeypatch.context() as patch:
        patch.setattr(loss_result, "measure_pair", damaged)
        with pytest.raises(DivergedError) as error:
            train(settings(max_steps=2))
    assert str(error.value).endswith(
        "All steps are kept: measure again with python cli.py train --resume reviews, or discard them with --overwrite."
    )
    events = []
    assert resume("reviews", notify=events.append).manifest.run.steps == 2
    assert trained_steps(events) == []


def test_weights_that_are_not_finite_are_not_measured_again(settings, monkeypatch):
    def damage(self, args, state, control, model, **kwargs):
        for parameter in model.parameters():
            parameter.detach().fill_(float("nan") if parameter.requires_grad else 0)

    monkeypatch.setattr(trainer.StopOnSignal, "on_step_end", damage)
    for problem, command in (
        ("A weight is not finite", lambda: train(settings(max_steps=1))),
        ("The held-out loss is nan", lambda: resume("reviews")),
    ):
        with pytest.raises(DivergedError, match=rf"^{problem} .*, or a lower --max-grad-norm\.$"):
            command()


def test_tracker_out_of_disk_after_the_last_step(settings, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device", "events")

    monkeypatch.setattr(TrainerCallback, "on_train_end", fail)
    with pytest.raises(TrainingError) as error:
        train(settings(max_steps=1))
    assert str(error.value).startswith("events: No space left on device")
    assert str(error.value).endswith(
        " The last step was 1 of 1. Resume with: python cli.py train --resume reviews"
    )


@pytest.mark.parametrize("where", ["peft.load_peft_weights", "lora_tuner.adapters.plots.plot_loss"])
def test_out_of_memory_is_said_as_such(settings, monkeypatch, where):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(where, fail)
    with pytest.raises(torch.OutOfMemoryError):
        train(settings(max_steps=1))


def test_tracker_out_of_disk_saves_checkpoint(settings, monkeypatch):
    whole = train(settings(name="whole"))

    def fail(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise OSError(28, "No space left on device", "events")

    with monkeypatch.context() as patch:
        patch.setattr(TrainerCallback, "on_log", fail)
        with pytest.raises(
            TrainingError, match=r"events: No space left .* The last step was 3 of 6\. Resume with"
        ):
            train(settings())
    events = []
    assert resume("reviews", notify=events.append).sha256 == whole.sha256
    assert len(trained_steps(events)) == 3


def test_run_folder_that_stays_is_said(settings, monkeypatch):
    events = []

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("lora_tuner.atomic_io.delete_atomically", refuse)
    adapter = train(settings(max_steps=1), events.append)
    assert adapter.path.is_dir()
    assert [event.text for event in events if "could not be removed" in getattr(event, "text", "")]
    with pytest.raises(TrainingError, match="has finished: its adapter is adapters/reviews"):
        resume("reviews")
