"""Shell completion of options whose values are runs, bases or data."""

import os
import subprocess
import sys

import pytest
import typer

from lora_tuner import TrainConfig
from lora_tuner.adapters.adapter import RUN_FILE
from lora_tuner.cli.app import app
from lora_tuner.settings_files import config_to_yaml

from .test_commands import ROOT


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
    (tmp_path / "texts" / "my poems.txt").touch()
    assert offered("train", option, "t") == ["texts/", "texts/poems.csv.gz", "texts/poems.txt"]
    assert offered("train", option, "texts/p") == ["texts/poems.csv.gz", "texts/poems.txt"]
    assert offered("train", option, "im") == ["imdb"]
    assert offered("train", option, "") == ["imdb", "texts/", "texts/poems.csv.gz", "texts/poems.txt"]
    assert offered("train", option, "nowhere/") == []


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="needs bash")
@pytest.mark.parametrize("has_script", [True, False])
def test_installed_completion_works_in_bash(tmp_path, has_script):
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "lora-tuner"
    if has_script:
        script.write_text(
            f"#!{sys.executable}\nimport sys\nfrom lora_tuner.cli.app import app\nsys.exit(app())\n"
        )
        script.chmod(0o755)
    install = f"{sys.executable} {ROOT}/cli.py --install-completion"
    complete = """. ~/.bashrc
COMP_WORDS=(lora-tuner train --format mes) COMP_CWORD=3
$(complete -p lora-tuner | sed 's/.*-F \\([^ ]*\\).*/\\1/') lora-tuner
echo "${COMPREPLY[@]}"
"""
    done = subprocess.run(
        ["/bin/bash", "-c", f"{install} && {complete}" if has_script else f"{install}; exit $?"],
        capture_output=True, text=True, cwd=tmp_path, timeout=60,
        env=os.environ | {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if has_script:
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "messages"
        assert "The command lora-tuner is completed, not `python cli.py`" in done.stderr
    else:
        assert done.returncode == 1
        assert done.stderr.startswith("Error: A shell completes the command lora-tuner, not `python cli.py`, and")
        assert not (tmp_path / ".bashrc").exists()
