"""Shell completion of options whose values are runs, bases or data."""

import pytest
import typer

from lora_tuner import TrainConfig
from lora_tuner.adapters.adapter import RUN_FILE
from lora_tuner.cli.app import app
from lora_tuner.settings_files import config_to_yaml


def offered(command, option, text):
    command = typer.main.get_command(app).commands[command]
    parameter = next(each for each in command.params if option in each.opts)
    context = command.context_class(command, resilient_parsing=True)
    return [item.value for item in parameter.shell_complete(context, text)]


def test_resume_completes_unfinished_runs(tmp_path):
    for name in ("noir", "notes", "poems"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / RUN_FILE).write_text(config_to_yaml(TrainConfig(name=name, max_steps=2)))
    (tmp_path / "runs" / "poems" / RUN_FILE).unlink()
    assert offered("train", "--resume", "") == ["noir", "notes"]
    assert offered("train", "--resume", "note") == ["notes"]


@pytest.mark.parametrize("command", ["train", "generate"])
def test_base_completes_cached_and_folders(tmp_path, monkeypatch, command):
    monkeypatch.setattr("lora_tuner.models.resolve.available_bases", lambda: ["smollm2-135m"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--smol--tiny-lm" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "smol").mkdir()
    (tmp_path / "smol.gguf").touch()
    (tmp_path / "smol.txt").touch()
    assert offered(command, "--base", "smol") == ["smollm2-135m", "smol/tiny-lm", "smol/", "smol.gguf"]


@pytest.mark.parametrize("option", ["--dataset", "--eval-dataset"])
def test_dataset_completes_data_and_folders(tmp_path, option):
    (tmp_path / "texts").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("poems.txt", "poems.csv.gz", "poems.png"):
        (tmp_path / "texts" / name).touch()
    assert offered("train", option, "t") == ["texts/"]
    assert offered("train", option, "texts/p") == ["texts/poems.csv.gz", "texts/poems.txt"]
    assert offered("train", option, "im") == ["imdb"]
    assert offered("train", option, "") == ["imdb", "texts/"]
    assert offered("train", option, "nowhere/") == []
