"""A base sharded over two processes gives the adapter of an unsharded base. FSDP is refused on CPUs; tests allow it."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_tuner import Library, ModelOptions, TrainConfig, distributed, resume, train
from lora_tuner.adapters import adapter
from lora_tuner.errors import BaseModelError, ConfigError, TrainingError
from lora_tuner.models import fsdp
from lora_tuner.models.loading import load_base
from lora_tuner.models.memory import _weight_bytes
from lora_tuner.models.resolve import find_base

from ..training import preferences
from ..training.test_distributed import ENDING_PROCESS, SHORT, curve, finish, run_two, start

ON_A_CPU = """
import sys
from lora_tuner.evaluation import held_out_loss
from lora_tuner.cli import app as cli
from lora_tuner.models import fsdp, fused_blocks, memory
from lora_tuner.training import profiling

models = []

def place_or_shard(model, device, place_or_shard=fsdp.place_or_shard):
    place_or_shard(model, device)
    report(model)
    models.append(model)

def app(app=cli.app):
    try:
        app()
    finally:
        report(*models)

def step_memory(inputs, model, step_memory=profiling.step_memory):
    sys.stderr.write(f"gathered bytes {fsdp.gathered_bytes(model)}\\n")
    return step_memory(inputs, model)

def report(model):
    local_size = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local_size += local.numel()
    sys.stderr.write(f"local parameters {local_size}\\n")  # in one write: there are two processes

fsdp.DEVICES, fsdp.place_or_shard, profiling.step_memory = ("cpu",), place_or_shard, step_memory
held_out_loss.BATCH_TOKENS_CPU, cli.app = 64, app
fused_blocks.native_kernels, memory.bfloat16_speedup = (lambda: None), (lambda: 1.0)  # as on a GPU
"""
FSDP_ENV = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture
def settings(model_folder, reviews_csv):
    return SHORT | {"base": str(model_folder), "dataset": str(reviews_csv)}


def run_sharded(settings, *options, code=ON_A_CPU, **env):
    """Run a command on two processes that share a base."""
    return run_two(settings, *options, code=code, **FSDP_ENV | env)


def check_shards(done, settings):
    """Check that each process holds half of the blocks, at its start and end; returns the parameters of a block."""
    model = load_base(find_base(settings["base"]), ModelOptions(device="cpu")).model
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    blocks = sum(size for name, size in sizes.items() if re.search(r"\.(h|layers)\.", name))
    local = sum(sizes.values()) - blocks // 2
    assert re.findall(r"local parameters (\d+)", done.err) == [str(local)] * 4
    return blocks // model.config.num_hidden_layers


@pytest.mark.parametrize("model_folder", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)], indirect=True)
def test_sharded_training_matches_unsharded(settings):
    """The same 50 steps. One process has fewer held-out batches, and must run as many as the other."""
    done = run_sharded(settings, "--max-steps=50", "--eval-every=20", "--name=two", "--json")
    assert done.status == 0, done.err
    assert "Warning" not in done.err
    block = check_shards(done, settings)
    assert re.findall(r"gathered bytes (\d+)", done.err) == [str(3 * 4 * block)] * 2
    two = Library().get("two")
    assert json.loads(done.out)["weights"]["sha256"] == two.sha256
    options = {"max_steps": 50, "gradient_accumulation": 2, "eval_every": 20, "name": "one"}
    one = train(TrainConfig.model_validate(settings | options))
    assert max(abs(a - b) for a, b in zip(curve(one), curve(two), strict=True)) < 1e-5
    whole_tensors, sharded_tensors = (load_file(trained.path / adapter.WEIGHTS_FILE) for trained in (one, two))
    torch.testing.assert_close(sharded_tensors, whole_tensors, atol=1e-5, rtol=1e-5)
    for name in ("base_loss", "loss", "gain", "standard_error"):
        assert getattr(two.manifest.result, name) == pytest.approx(getattr(one.manifest.result, name), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_sharded_base_learns_preferences(settings, objective):
    """Losses and held-out figures are those of one process."""
    settings |= preferences.run_settings(objective)
    done = run_sharded(settings, "--max-steps=8", "--name=two")
    assert done.status == 0, done.err
    check_shards(done, settings)
    options = {"max_steps": 8, "gradient_accumulation": 2, "name": "one"}
    one, two = train(TrainConfig.model_validate(settings | options)), Library().get("two")
    assert curve(one) == pytest.approx(curve(two), abs=1e-5)
    for figure in ("accuracy", "margin"):
        figures = [getattr(trained.manifest.preference, figure).model_dump() for trained in (one, two)]
        assert figures[0] == pytest.approx(figures[1], abs=1e-4)


@pytest.mark.slow
def test_sharded_base_tells_labels(settings):
    settings |= {"label_column": "label", "label_names": "0=dull,1=fine", "eval_rows": 15}
    done = run_sharded(settings, "--max-steps=8", "--name=two")
    assert done.status == 0, done.err
    check_shards(done, settings)
    options = {"max_steps": 8, "gradient_accumulation": 2, "name": "one"}
    one, two = train(TrainConfig.model_validate(settings | options)), Library().get("two")
    whole, sharded = (trained.manifest.labels for trained in (one, two))
    assert (sharded.figures.right, sharded.base.right) == (whole.figures.right, whole.base.right)
    assert sharded.uncalibrated_error == pytest.approx(whole.uncalibrated_error, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["sharded", "whole"])
def test_run_resumes_sharded_or_unsharded(settings, first):
    """One process dies, and the other leaves a checkpoint; it resumes the other way."""
    env = {} if first == "sharded" else {"ACCELERATE_USE_FSDP": "false"}
    code = ON_A_CPU + ENDING_PROCESS.format(at=7)
    done = run_sharded(settings, "--max-steps=12", "--name=cut", code=code, **env)
    assert done.status != 0
    assert "The last step was 7 of 12. Resume with: python cli.py train --resume cut" in done.err
    if first == "sharded":
        resume("cut")
    else:
        done = run_sharded({}, "--resume=cut")
        assert done.status == 0, done.err
        check_shards(done, settings)
    cut = Library().get("cut")
    whole = train(
        TrainConfig.model_validate(settings | {"max_steps": 12, "gradient_accumulation": 2, "name": "whole"})
    )
    assert max(abs(a - b) for a, b in zip(curve(whole), curve(cut), strict=True)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--method=pissa"],
        ["--method=lora+", "--gradient-accumulation=2"],
        ["--method=rslora", "--dropout=0.1"],
        ["--gradient-checkpointing=on", "--dtype=bfloat16"],
        ["--eval-every=5", "--patience=2"],
        ["--streaming", "--shuffle-buffer=20"],
        ["--save-every=4", "--target-modules=attention"],
    ],
    ids=lambda options: options[0],
)
def test_sharded_training_supports_option(settings, options):
    done = run_sharded(settings, "--max-steps=12", "--name=two", *options)
    assert done.status == 0, done.err
    assert Library().get("two").manifest.result.gain > 0
    check_shards(done, settings)


@pytest.mark.slow
def test_configured_block_names_are_sharded(settings, gpt2):
    """With spaces, and empty as `accelerate config` writes a missing name."""
    names = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    block_class = " GPT2Block" if settings["base"] == str(gpt2) else " LlamaDecoderLayer , "
    for number, configured in enumerate(("", block_class)):
        env = names | {"FSDP_TRANSFORMER_CLS_TO_WRAP": configured}
        done = run_sharded(settings, "--epochs=1", "--plan", f"--name=n{number}", **env)
        assert done.status == 0, done.err
        check_shards(done, settings)


@pytest.mark.slow
def test_documented_accelerate_config_shards(settings, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    config = re.search(r"```yaml\n(distributed_type: FSDP.*?)```", text, re.DOTALL)[1]
    (tmp_path / "fsdp.yaml").write_text(config.replace("num_processes: 8", "num_processes: 2"))
    script = tmp_path / "sharded.py"
    script.write_text(ON_A_CPU + "app()\n")
    launcher = ("accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp.yaml"))
    done = finish(start(settings, "--max-steps=5", "--name=two", script=script, launcher=launcher))
    assert done.status == 0, done.err
    check_shards(done, settings)
    assert Library().get("two").manifest.run.processes == 2


@pytest.mark.slow
def test_sharded_training_continues_from_adapter(settings):
    train(TrainConfig.model_validate(settings | {"max_steps": 5, "name": "one"}))
    done = run_sharded(settings, "--from=one", "--max-steps=5", "--name=two")
    assert done.status == 0, done.err
    assert Library().get("two").manifest.parents[0].name == "one"


# Unsupported settings


@pytest.fixture
def fsdp_env(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(fsdp, "_plugin", None)
    for name, value in FSDP_ENV.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_fsdp_on_cpu_is_refused(fsdp_env, device):
    fsdp_env.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(TrainingError) as error:
        fsdp.read_settings(device)
    assert str(error.value) == (
        "ACCELERATE_USE_FSDP shards the base over GPUs, but these processes run on the CPU: unset it, and each process "
        "holds the whole base."
    )


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        (
            "WORLD_SIZE",
            "1",
            "ACCELERATE_USE_FSDP shards the base over processes, but there is only one: unset it.",
        ),
        ("FSDP_VERSION", "1", "accelerate's FSDP settings are of version 1: set fsdp_version to 2."),
        ("FSDP_VERSION", "two", "accelerate cannot read its FSDP settings: invalid literal"),
        ("FSDP_STATE_DICT_TYPE", "MADE_UP", "accelerate cannot read its FSDP settings: "),
        (
            "FSDP_RESHARD_AFTER_FORWARD",
            "false",
            "Without fsdp_reshard_after_forward each GPU would gather the whole base",
        ),
        ("FSDP_OFFLOAD_PARAMS", "true", "accelerate's FSDP settings have fsdp_offload_params: set it to false."),
        (
            "FSDP_ACTIVATION_CHECKPOINTING",
            "true",
            "accelerate's FSDP settings have fsdp_activation_checkpointing: set it to false, "
            "and use --gradient-checkpointing on.",
        ),
        ("FSDP_IGNORED_MODULES", ".*mlp", "accelerate's FSDP settings have fsdp_ignored_modules: remove it."),
        ("FSDP_AUTO_WRAP_POLICY", "NO_WRAP", "set fsdp_auto_wrap_policy to TRANSFORMER_BASED_WRAP"),
        (
            "ACCELERATE_USE_DEEPSPEED",
            "true",
            "ACCELERATE_USE_DEEPSPEED is set, but only FSDP2 can shard a base here",
        ),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "ACCELERATE_USE_MEGATRON_LM is set"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "ACCELERATE_USE_PARALLELISM_CONFIG is set"),
    ],
)
def test_unsupported_fsdp_settings_are_refused(fsdp_env, name, value, problem):
    fsdp_env.setenv(name, value)
    with pytest.raises(TrainingError) as error:
        fsdp.read_settings("auto")
    assert problem in str(error.value)
    assert fsdp.shard_count() == 1


def test_read_settings_hides_fsdp_from_trainer(fsdp_env):
    fsdp.read_settings("auto")
    fsdp_env.setattr(distributed, "world_size", lambda: 2)
    assert fsdp.shard_count() == 2
    assert "ACCELERATE_USE_FSDP" not in os.environ


def test_missing_block_class_is_refused(fsdp_env, gpt2):
    fsdp_env.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    fsdp.read_settings("auto")
    fsdp_env.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(TrainingError, match="This base has no blocks of class LlamaDecoderLayer to shard it by"):
        load_base(find_base(str(gpt2)), ModelOptions(device="cpu"))


def test_nested_blocks_give_the_outermost(gpt2):
    def blocks(model, *configured):
        return fsdp._decoder_blocks(model, list(configured))

    model = load_base(find_base(str(gpt2)), ModelOptions(device="cpu")).model
    assert blocks(model, "GPT2MLP", "GPT2Block") == [*model.transformer.h] == blocks(model, "")
    model._no_split_modules = None
    with pytest.raises(TrainingError, match="This base does not name its blocks"):
        blocks(model)


def test_blocks_with_shared_weights_are_refused(fsdp_env, gpt2):
    fsdp.read_settings("auto")
    fsdp_env.setattr(distributed, "world_size", lambda: 2)
    model = torch.nn.ModuleDict({name: torch.nn.Sequential(torch.nn.Linear(2, 2)) for name in "ab"})
    model["a"][0].weight = model["b"][0].weight
    model._no_split_modules = ["Sequential"]
    with pytest.raises(TrainingError, match="The blocks of this base share weights, so it cannot be sharded"):
        fsdp.place_or_shard(model, torch.device("cpu"))


def test_weight_bytes_with_experts_are_sharded(gpt2, monkeypatch):
    """Experts have three dimensions and are sharded with their blocks."""
    files = find_base(str(gpt2))
    files.__dict__["shapes"] = {"h.0.experts": (8, 16, 4), "h.0.norm": (16,), "wte.weight": (100, 16)}
    assert _weight_bytes(files, torch.float32, "full") == 4 * (512 + 16 + 1600)
    monkeypatch.setattr(fsdp, "shard_count", lambda: 2)
    assert _weight_bytes(files, torch.float32, "full") == 4 * ((512 + 16) // 2 + 1600)


@pytest.mark.parametrize(
    ("options", "error_class", "problem"),
    [
        ({"method": "dora"}, ConfigError, "dora needs the whole base to initialize"),
        ({"method": "eva"}, ConfigError, "eva needs the whole base to initialize"),
        ({"load_in": "4bit"}, BaseModelError, "--load-in 4bit cannot be combined with FSDP: choose one"),
    ],
)
def test_options_needing_whole_base_are_refused(settings, monkeypatch, options, error_class, problem):
    monkeypatch.setattr(fsdp, "shard_count", lambda: 2)
    monkeypatch.setattr(fsdp, "place_or_shard", lambda model, device: None)
    with pytest.raises(error_class) as error:
        train(TrainConfig.model_validate(settings | options))
    assert problem in str(error.value)
