"""runs: unfinished runs and sweeps are listed, and removed."""

import json
import os
import re

import pytest

from lora_tuner import TrainConfig, atomic_io, resume
from lora_tuner.adapters.adapter import CONFIG_FILE, METRICS_FILE, RUN_FILE
from lora_tuner.errors import TrainingError
from lora_tuner.settings_files import config_to_yaml
from lora_tuner.training import sweep, tickets
from lora_tuner.training.paths import run_lock
from lora_tuner.training.unfinished import SweepState, write_sweep

from .test_commands import error, run


@pytest.fixture
def stopped(tmp_path):
    """Write the folder of a stopped run: settings, a complete checkpoint and a newer incomplete one."""

    def write(name="noir", **changes):
        folder = tmp_path / "runs" / name
        for step in (20, 30):
            (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / "checkpoint-20" / atomic_io.HASHES_FILE).write_text("{}")
        config = TrainConfig(name=name, dataset="texts/noir.csv", max_steps=1200, **changes)
        (folder / RUN_FILE).write_text(config_to_yaml(config))
        return folder

    return write


def rows_of(result):
    """Words of each line, the age as none: it differs from run to run."""
    return [re.sub(r" \d+ s ", " ", line).split() for line in result.stdout.splitlines()]


def test_runs_lists_step_age_data(stopped, tmp_path):
    stopped()
    stopped("poems")
    finished = stopped("kept")
    (finished / RUN_FILE).unlink()
    (stopped("an-adapter") / CONFIG_FILE).write_text("{}")
    with run_lock(tmp_path / "runs", "poems"):
        listed = run("runs")
    assert re.search(r"  \d+ s +noir.csv  stopped", listed.stdout)
    assert rows_of(listed) == [
        ["name", "step", "age", "data", "state"],
        ["poems", "20", "of", "1,200", "noir.csv", "starting"],
        ["noir", "20", "of", "1,200", "noir.csv", "stopped"],
    ]
    poems, noir = sorted(json.loads(run("runs", "--json").stdout), key=lambda job: job["name"], reverse=True)
    assert (noir["name"], noir["kind"], noir["step"], noir["total"]) == ("noir", "run", 20, 1200)
    assert (noir["data"], noir["state"], noir["folder"]) == (["texts/noir.csv"], "stopped", "runs/noir")
    assert (poems["state"], poems["pid"]) == ("stopped", None)


def test_runs_lists_waiting_and_running(stopped, tmp_path):
    (stopped("poems") / METRICS_FILE).write_text('{"step": 24, "loss": 2.0}\n')
    with run_lock(tmp_path / "runs", "poems"), tickets.ticket(tmp_path / "runs", "later", 1):
        listed = json.loads(run("runs", "--json").stdout)
        poems, later = rows_of(run("runs"))[1:]
    assert poems == ["poems", "24", "of", "1,200", "noir.csv", "running"]
    assert (later[0], later[-1]) == ("later", "starting")
    assert [(job["name"], job["state"], job["pid"]) for job in listed] == [
        ("poems", "running", os.getpid()),
        ("later", "starting", os.getpid()),
    ]


def test_runs_without_any_says_so(tmp_path):
    result = run("runs", "--runs-dir", "elsewhere")
    assert (result.stdout, result.stderr) == ("", "No unfinished runs in elsewhere.\n")
    assert run("runs", "--json").stdout == "[]\n"


def test_broken_run_is_named_and_removable(stopped):
    (stopped() / RUN_FILE).write_text("rank: [")
    result = run("runs")
    assert rows_of(result)[1] == ["noir", "?", "?", "stopped"]
    assert result.stderr.startswith("noir is broken: runs/noir/run.yaml cannot be read as YAML")
    run("runs", "remove", "noir", "--yes")
    assert run("runs").stderr == "No unfinished runs in runs.\n"


def test_run_is_removed_after_question(stopped):
    folder = stopped()
    refused = run("runs", "remove", "noir", stdin="n\n", exit_code=1)
    assert "Delete runs/noir permanently?" in refused.stderr
    assert folder.is_dir()
    assert json.loads(run("runs", "remove", "noir", "--yes", "--json").stdout) == {"removed": "noir"}
    assert not folder.exists()


def test_running_run_is_not_removed(stopped, tmp_path):
    folder = stopped()
    with run_lock(tmp_path / "runs", "noir"):
        assert error("runs", "remove", "noir", "--yes") == (
            "Error: runs/noir is running: stop its process (Ctrl-C), or wait for it, then remove it."
        )
    with tickets.ticket(tmp_path / "runs", "noir", 1):
        assert error("runs", "remove", "noir", "--yes").startswith("Error: runs/noir is waiting: stop its")
    assert folder.is_dir()


def test_missing_run_is_refused_before_question(stopped):
    stopped()
    assert error("runs", "remove", "nope") == "Error: There is no unfinished run 'nope' in runs (noir)."


@pytest.mark.parametrize("link", [False, True])
def test_run_with_other_files_is_kept(stopped, tmp_path, link):
    folder = stopped()
    if link:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        (folder / "notes.txt").write_text("mine")
    assert error("runs", "remove", "noir", "--yes") == (
        "Error: runs/noir is a link, or holds files that are not of a run, so it is not removed: move them elsewhere."
    )
    assert (folder / RUN_FILE).is_file()


def test_sweep_is_listed_and_removed(settings, stop_at, tmp_path):
    with stop_at(2, "-r4"):
        sweep.run_sweep([settings(rank=rank) for rank in (2, 4)])
    assert sorted(row[:4] for row in rows_of(run("runs"))[1:]) == [
        ["reviews", "1", "of", "2"],
        ["reviews-r4", "2", "of", "6"],
    ]
    assert any("trials" in row for row in rows_of(run("runs")))
    with run_lock(tmp_path / "runs", "reviews-r4"):
        assert error("runs", "remove", "reviews", "--yes").startswith("Error: runs/reviews-r4 is running")
    run("runs", "remove", "reviews", "--yes")
    assert [path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")] == []
    assert (tmp_path / "adapters" / "reviews-r2").is_dir()


def test_sweep_keeps_runs_of_others(stopped, tmp_path):
    other = stopped("noir-r2")
    trial = TrainConfig(name="noir-r2", runs_dir=tmp_path / "runs")
    write_sweep(SweepState(id="a", trials=[trial], facts={}, diverged=[]), tmp_path / "runs" / "noir.sweep")
    assert ["noir", "0", "of", "1", "trials"] in [row[:5] for row in rows_of(run("runs"))]
    run("runs", "remove", "noir", "--yes")
    assert other.is_dir()
    assert not (tmp_path / "runs" / "noir.sweep").exists()


def test_wrong_resume_lists_unfinished_runs(stopped):
    stopped()
    stopped("poems")
    with pytest.raises(TrainingError) as refused:
        resume("niro")
    assert str(refused.value).endswith(
        "Train without --resume, or resume one of these (`runs` shows them): noir, poems."
    )
