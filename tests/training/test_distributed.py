"""One run on several processes: same adapter as one process, one set of messages.

`start` runs a launcher such as torchrun; `run_two` forks both processes, in a fraction of the time."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from safetensors.torch import load_file

from lora_tuner import Library, TrainConfig, distributed, resume, run_sweep, train
from lora_tuner.adapters.adapter import METRICS_FILE, RUN_FILE, WEIGHTS_FILE
from lora_tuner.data.packing import PackedSequences
from lora_tuner.errors import ConfigError, RaisedOnRankZero, TrainingError
from lora_tuner.settings_files import resolve_settings
from lora_tuner.training import checkpoints, learning_rate, run, sweep
from lora_tuner.training.arguments import EpochOrder

from .. import tiny_models
from ..faults.process import Command
from . import preferences

CLI = Path(__file__).parents[2] / "cli.py"
SHORT = {"rank": 4, "max_length": 64, "batch_size": 2, "eval_rows": 9, "learning_rate": 5e-3, "device": "cpu"}
ENDING_PROCESS = """
import os
from lora_tuner.training import trainer

if os.environ["RANK"] == "1":
    step = trainer.LoraTrainer.training_step
    def die(self, *arguments):
        if self.state.global_step == {at}:
            os._exit(9)
        return step(self, *arguments)
    trainer.LoraTrainer.training_step = die
"""


@pytest.fixture
def settings(gpt2, reviews_csv):
    return SHORT | {"base": str(gpt2), "dataset": str(reviews_csv), "dtype": "float32"}


def command_line(settings, options):
    flags = {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
    return ["train", *(name if value is True else f"{name}={value}" for name, value in flags.items()), *options]


def free_port():
    with socket.create_server(("localhost", 0)) as free:
        return free.getsockname()[1]


def run_two(settings, *options, code="", **env):
    """Run a command on two forked processes, after `code` in each; their output is joined."""
    world = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    both = [
        Command(
            *command_line(settings, options),
            cwd=Path.cwd(),
            cache=Path(os.environ["LORA_TUNER_CACHE"]).parent,
            before=partial(exec, code, {}),
            env=world | env | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]
    ended = [command.end() for command in both]
    return SimpleNamespace(
        status=ended[0].status or ended[1].status,
        out="".join(done.out for done in ended),
        err="".join(done.err for done in ended),
    )


def start(
    settings, *options, script=CLI, launcher=("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
):
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, str(script), *command_line(settings, options)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CLI.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(started):
    out, err = started.communicate(timeout=300)
    return SimpleNamespace(status=started.returncode, out=out, err=err)


def curve(adapter):
    entries = [json.loads(line) for line in (adapter.path / METRICS_FILE).read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def torchrun(*arguments):
    return finish(start(*arguments))


@pytest.mark.parametrize("run_both", [run_two, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_processes_train_same_adapter(settings, run_both):
    """Train the same 50 steps; the sequences are not divisible by 4, so an epoch ends within a batch."""
    done = run_both(
        settings, "--max-steps=50", "--eval-every=20", "--name=two", "--json", "--sample-prompt=Acting"
    )
    assert done.status == 0, done.err
    two = Library().get("two")
    assert json.loads(done.out)["weights"]["sha256"] == two.sha256
    assert done.err.count("The run takes 50 steps") == 1
    assert done.err.count("Step 20 samples") == 1
    assert [(sample.step, sample.prompt) for sample in two.samples] == [
        (step, "Acting") for step in (0, 20, 40, 50)
    ]
    same = {"max_steps": 50, "gradient_accumulation": 2, "eval_every": 20, "name": "one"}
    one = train(TrainConfig.model_validate(settings | same))
    assert one.manifest.run.sequences % 4 != 0
    assert len(curve(two)) == 50
    assert max(abs(a - b) for a, b in zip(curve(one), curve(two), strict=True)) < 1e-5
    weights, weights_of_two = (load_file(adapter.path / WEIGHTS_FILE) for adapter in (one, two))
    assert all(torch.allclose(weights[name], weights_of_two[name], atol=1e-5) for name in weights)
    assert (one.manifest.run.processes, two.manifest.run.processes) == (1, 2)
    assert two.manifest.run.tokens == one.manifest.run.tokens
    for figure in ("base_loss", "loss", "gain", "standard_error"):
        assert getattr(two.manifest.result, figure) == pytest.approx(
            getattr(one.manifest.result, figure), abs=1e-5
        )
    assert two.manifest.data == one.manifest.data
    assert not Path("runs/two").exists()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_two_processes_share_pairs(settings, objective):
    """Also where a process has fewer pairs than the other, or none."""
    settings |= preferences.run_settings(objective)
    done = run_two(settings, "--max-steps=8", "--name=two")
    assert done.status == 0, done.err
    assert done.err.count(f"Objective {objective}") == 1
    two = Library().get("two")
    one = train(
        TrainConfig.model_validate(settings | {"max_steps": 8, "gradient_accumulation": 2, "name": "one"})
    )
    assert one.manifest.run.sequences % 4 != 0
    assert curve(one) == pytest.approx(curve(two), abs=1e-5)
    assert one.manifest.run.tokens == two.manifest.run.tokens
    for figure in ("accuracy", "margin"):
        figures = (getattr(adapter.manifest.preference, figure).model_dump() for adapter in (one, two))
        assert next(figures) == pytest.approx(next(figures), abs=1e-4)


@pytest.mark.slow
def test_two_processes_tell_labels(settings):
    """The figures of labels are shared, though one process has a row more."""
    settings |= {"label_column": "label", "label_names": "0=dull,1=fine", "eval_rows": 15}
    done = run_two(settings, "--max-steps=8", "--name=two", "--balance")
    assert done.status == 0, done.err
    assert done.err.count("Labels: dull ") == 1
    same = {"max_steps": 8, "gradient_accumulation": 2, "name": "one", "balance": True}
    one, two = train(TrainConfig.model_validate(settings | same)), Library().get("two")
    labels = [adapter.manifest.labels for adapter in (one, two)]
    assert [info.names for info in labels] == [["dull", "fine"]] * 2
    assert labels[0].figures.rows == labels[1].figures.rows
    assert labels[0].temperature == pytest.approx(labels[1].temperature, abs=1e-2)
    assert labels[0].uncalibrated_error == pytest.approx(labels[1].uncalibrated_error, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [{}, {"streaming": True, "shuffle_buffer": 20}], ids=["", "stream"])
def test_two_processes_mix_sources_alike(settings, streaming):
    settings = {name: value for name, value in settings.items() if name != "dataset"} | streaming
    for name in "ab":
        texts = tiny_models.reviews(60, seed=ord(name))
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    datasets = ["a.jsonl=0.7", "b.jsonl=0.3"]
    options = [f"--dataset={dataset}" for dataset in datasets]
    done = run_two(settings, *options, "--max-steps=30", "--name=two")
    assert done.status == 0, done.err
    same = {"dataset": datasets, "max_steps": 30, "gradient_accumulation": 2, "name": "one"}
    one, two = train(TrainConfig.model_validate(settings | same)), Library().get("two")
    assert max(abs(a - b) for a, b in zip(curve(one), curve(two), strict=True)) < 1e-5
    assert [source.weight for source in two.manifest.data.sources] == [0.7, 0.3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "streaming", [{}, pytest.param({"streaming": True, "shuffle_buffer": 20}, marks=pytest.mark.slow)]
)
def test_lost_process_resumes_on_one(settings, streaming):
    settings |= streaming
    done = run_two(settings, "--max-steps=12", "--name=cut", code=ENDING_PROCESS.format(at=7))
    assert done.status != 0
    assert (
        "Error: Another process of this run has ended. The last step was 7 of 12. Resume with: python cli.py train --resume cut"
        in done.err
    )
    assert done.err.count("Error: ") == 1
    events = []
    cut = resume("cut", notify=events.append)
    assert (
        "The run was started with 2 processes and resumes with 1: --gradient-accumulation is 2 instead of 1, so that each "
        "step has the same sequences. Rounding and dropout differ."
    ) in [getattr(event, "text", "") for event in events]
    whole = train(
        TrainConfig.model_validate(settings | {"max_steps": 12, "gradient_accumulation": 2, "name": "whole"})
    )
    assert max(abs(a - b) for a, b in zip(curve(whole), curve(cut), strict=True)) < 1e-5
    assert cut.manifest.result.loss == pytest.approx(whole.manifest.result.loss, abs=1e-5)
    assert resolve_settings(TrainConfig, {}, cut.path / RUN_FILE).gradient_accumulation == 2


@pytest.mark.slow
def test_two_processes_resume_later_epoch(settings):
    """Resume in the second epoch: an epoch has 16 steps and its own order."""
    run_two(settings, "--max-steps=40", "--name=cut", code=ENDING_PROCESS.format(at=21))
    assert Path("runs/cut/checkpoint-21").is_dir()
    done = run_two({}, "--resume=cut")
    assert done.status == 0, done.err
    whole = train(
        TrainConfig.model_validate(settings | {"max_steps": 40, "gradient_accumulation": 2, "name": "whole"})
    )
    assert max(abs(a - b) for a, b in zip(curve(whole), curve(Library().get("cut")), strict=True)) < 1e-5


@pytest.mark.slow
def test_lost_process_of_torchrun_keeps_checkpoint(settings, tmp_path):
    """torchrun ends the other process with SIGTERM."""
    script = tmp_path / "dying.py"
    script.write_text(ENDING_PROCESS.format(at=10) + "from lora_tuner.cli.app import app\napp()\n")
    done = finish(
        start(settings, "--max-steps=40", "--name=cut", "--eval-every=5", "--patience=3", script=script)
    )
    assert done.err.count("Error: ") == done.err.count("ChildFailedError: ") + 1
    assert Path("runs/cut/checkpoint-10/whole.json").is_file()
    assert resume("cut").manifest.run.steps == 40


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_all_at_same_step(settings, signum):
    started = start(settings, "--max-steps=20000", "--save-every=20000", "--name=asked")
    while not Path("runs/asked/run.yaml").exists():
        assert started.poll() is None
        time.sleep(0.1)
    time.sleep(3)
    started.send_signal(signum)
    done = finish(started)
    assert done.status != 0
    assert done.err.count("Stopped at step ") == 1
    assert "saved. Resume with: python cli.py train --resume asked" in done.err
    assert len([*Path("runs/asked").glob("checkpoint-*/whole.json")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"method": name} for name in ("dora", "eva", "lora+", "pissa", "rslora")] + [{"dropout": 0.1}]
)
def test_two_processes_train_each_method(settings, changes):
    done = run_two(settings | changes, "--max-steps=20", "--name=two")
    assert done.status == 0, done.err
    assert Library().get("two").manifest.result.gain > 0


@pytest.mark.slow
def test_two_processes_agree_on_stop(settings):
    """Processes that took other steps, or stopped earlier, would leave the others waiting."""
    options = ("--minutes=0.1", "--eval-every=2", "--patience=1", "--name=two")
    done = run_two(settings | {"learning_rate": 0.05}, *options)
    assert done.status == 0, done.err
    assert 0 < Library().get("two").manifest.run.kept_step <= Library().get("two").manifest.run.steps


@pytest.mark.slow
def test_plan_printed_once_counts_all(settings, monkeypatch):
    del settings["learning_rate"]
    monkeypatch.setattr(learning_rate, "HIGHEST_RATE", 1.0)
    unbounded = "from lora_tuner.training import learning_rate; learning_rate.HIGHEST_RATE = 1.0"
    done = run_two(settings, "--epochs=1", "--plan", "--json", code=unbounded)
    assert done.status == 0, done.err
    two = json.loads(done.out)
    alone = run.plan(TrainConfig.model_validate(settings | {"epochs": 1, "gradient_accumulation": 2}))
    assert (two["steps_per_epoch"], two["learning_rate"]) == (alone.steps_per_epoch, alone.learning_rate)


@pytest.mark.slow
def test_accelerate_launch(settings):
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    done = finish(
        start(settings, "--max-steps=5", "--name=two", launcher=("accelerate.commands.launch", *options.split()))
    )
    assert done.status == 0, done.err
    assert Library().get("two").manifest.run.processes == 2


@pytest.mark.slow
def test_two_nodes(settings):
    """Run two launchers on this machine: each process has local rank 0."""
    launcher = "torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d "
    launcher += f"--rdzv-endpoint localhost:{free_port()} --node-rank"
    both = [start(settings, "--max-steps=20", "--name=two", launcher=(*launcher.split(), rank)) for rank in "01"]
    for done in map(finish, both):
        assert done.status == 0, done.err
    one = train(
        TrainConfig.model_validate(settings | {"max_steps": 20, "gradient_accumulation": 2, "name": "one"})
    )
    assert max(abs(a - b) for a, b in zip(curve(one), curve(Library().get("two")), strict=True)) < 1e-5


@pytest.mark.slow
def test_error_reported_once(settings):
    done = run_two(settings | {"dataset": "missing.csv"})
    assert done.status != 0
    assert done.err.count("There is no dataset 'missing.csv'") == 1


# Refused launches and settings


@pytest.fixture
def launched(monkeypatch):
    variables = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def refusal(settings):
    with pytest.raises(TrainingError) as error:
        train(TrainConfig.model_validate(settings))
    assert distributed.world_size() == 1
    assert not Path("runs").exists()
    return str(error.value)


def test_unexpected_world_size_is_refused(settings, launched):
    launched.setattr("accelerate.PartialState", lambda **_: SimpleNamespace(num_processes=1))
    assert refusal(settings) == (
        "WORLD_SIZE announces 2 processes, but this one finds 1, so each would train alone: start all of them with torchrun or "
        "accelerate launch."
    )


def test_dynamo_backend_is_refused(settings, launched):
    launched.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert refusal(settings) == (
        "ACCELERATE_DYNAMO_BACKEND=INDUCTOR is not supported with several processes: set it to no."
    )


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_missing_launcher_variable_is_refused(settings, launched, missing):
    launched.delenv(missing)
    assert refusal(settings).startswith(f"WORLD_SIZE announces 2 processes, but {missing} is not set")


def test_invalid_world_size_is_refused(settings, launched):
    launched.setenv("WORLD_SIZE", "two")
    assert refusal(settings) == "WORLD_SIZE is 'two', and should be a number."


def test_different_base_weights_are_refused(settings, launched):
    launched.setattr(distributed, "init_process_group", lambda device: None)
    launched.setattr(distributed, "world_size", lambda: 2)
    launched.setattr(distributed, "all_gather", lambda value: [value, "other"])
    with pytest.raises(TrainingError, match="The processes loaded different weights for"):
        train(TrainConfig.model_validate(settings))


def test_single_gpu_device_is_refused(settings, launched):
    assert refusal(settings | {"device": "cuda:0"}) == (
        "--device cuda:0 is one GPU for all processes: leave it out, and each process uses its own."
    )


def test_sweep_is_refused(settings, launched):
    with pytest.raises(ConfigError, match="A sweep runs in one process: leave out torchrun"):
        run_sweep([TrainConfig.model_validate(settings | {"rank": rank}) for rank in (2, 4)])
    with pytest.raises(ConfigError, match="A sweep runs in one process: leave out torchrun"):
        sweep.resume_sweep("reviews")


def test_more_processes_than_gpus_refused(settings, launched):
    launched.setattr("torch.cuda.is_available", lambda: True)
    launched.setattr("torch.cuda.device_count", lambda: 1)
    launched.setenv("LOCAL_WORLD_SIZE", "2")
    assert refusal(settings | {"device": "auto"}) == (
        "2 processes would share 1 GPUs on this machine: start one per GPU."
    )


def test_mps_is_refused(settings, launched):
    launched.setattr("torch.cuda.is_available", lambda: False)
    launched.setattr("torch.backends.mps.is_available", lambda: True)
    assert refusal(settings | {"device": "auto"}).startswith("MPS supports one process")


def test_rank_prefix(launched):
    assert distributed.with_rank_prefix("text") == "text"
    launched.setenv("RANK", "1")
    assert distributed.with_rank_prefix("text") == ""  # before the group is formed, rank 0 reports the same
    launched.setattr(distributed, "_group", object())
    assert distributed.with_rank_prefix("text") == "Process 1: text"


def test_indivisible_accumulation_is_refused(settings, monkeypatch):
    config = TrainConfig.model_validate(settings | {"gradient_accumulation": 2, "name": "imdb"})
    then = SimpleNamespace(run=SimpleNamespace(processes=2))
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    assert checkpoints.for_world_size(config, then, lambda event: None).gradient_accumulation == 1
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(
        TrainingError, match="has 4 batches, which 3 processes cannot share evenly: resume with 1 or 2 or 4"
    ):
        checkpoints.for_world_size(config, then, lambda event: None)


# Agreement between processes


def order_setup(sizes, weights, seed):
    rows = [np.array([1, 2])] * sum(sizes)
    return SimpleNamespace(
        sequences=PackedSequences(rows, 8, packing=False, source_rows=sizes),
        dataset=SimpleNamespace(weights=weights),
        config=SimpleNamespace(seed=seed),
    )


@pytest.mark.parametrize("epoch", [0, 3])
def test_epoch_order_matches_one_process(epoch):
    sampler = SeedableRandomSampler(range(11), data_seed=5)
    sampler.set_epoch(epoch)
    expected = [*sampler]
    setup = order_setup([11], [], 5)
    assert [*EpochOrder(setup, 1, lambda: epoch)] == expected
    shared = EpochOrder(setup, 4, lambda: epoch)
    assert [*shared] == [*expected, 11]
    assert len(shared) == 12


def test_single_process_needs_no_group():
    assert (distributed.world_size(), distributed.rank(), distributed.local_world_size()) == (1, 0, 1)
    assert distributed.run_on_rank_zero(lambda: 5) == 5
    assert distributed.all_gather("a") == ["a"]
    assert distributed.all_reduce_max(2) == 2
    assert not distributed.is_process_loss(RuntimeError("Connection closed by peer"))


def test_shared_error_raised_on_rank_zero(monkeypatch):
    error = TrainingError("too large")
    assert distributed.share_error(error) is error
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert isinstance(distributed.share_error(error), RaisedOnRankZero)
