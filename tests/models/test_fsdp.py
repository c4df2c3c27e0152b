"""A base that two processes hold together: the adapter is that of a whole base. On a CPU it is refused; here it is let."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

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

from ..training.test_distributed import ENDING_PROCESS, SHORT, curve, finish, start

ON_A_CPU = """
import atexit
import sys
from lora_tuner import evaluation
from lora_tuner.models import fsdp
from lora_tuner.training import profiling

def place_or_shard(model, place, place_or_shard=fsdp.place_or_shard):
    place_or_shard(model, place)
    tell(model)
    atexit.register(tell, model)

def step_memory(inputs, model, count=profiling.step_memory):
    sys.stderr.write(f"It gathers {fsdp.gathered_bytes(model)}\\n")
    return count(inputs, model)

def tell(model):
    frozen = [it for it in model.parameters() if not it.requires_grad]
    held = sum(getattr(it, "to_local", lambda it=it: it)().numel() for it in frozen)
    sys.stderr.write(f"It holds {held}\\n")  # at once: there are two

fsdp.DEVICES, fsdp.place_or_shard, profiling.step_memory = ("cpu",), place_or_shard, step_memory
evaluation.BATCH_TOKENS_CPU = 64
"""
SPLIT = ON_A_CPU + "from lora_tuner.cli.app import app\napp()\n"
PLAN = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture
def settings(model_folder, reviews_csv):
    return SHORT | {"base": str(model_folder), "dataset": str(reviews_csv)}


@pytest.fixture
def split(tmp_path, monkeypatch):
    """Start a command on two processes with a split base."""
    path = tmp_path / "split.py"

    def run(settings, *more, script=SPLIT, **plan):
        path.write_text(script)
        with monkeypatch.context() as patch:
            for name, value in (PLAN | plan).items():
                patch.setenv(name, value)
            return finish(start(settings, *more, script=path))

    return run


def check_shares(done, settings):
    """Each process holds half of the blocks when it begins, and when it ends. Gives the parameters of one block."""
    model = load_base(find_base(settings["base"]), ModelOptions(device="cpu")).model
    blocks = sum(it.numel() for name, it in model.named_parameters() if re.search(r"\.(h|layers)\.", name))
    held = sum(it.numel() for it in model.parameters()) - blocks // 2
    assert re.findall(r"It holds (\d+)", done.err) == [str(held)] * 4
    return blocks // model.config.num_hidden_layers


def test_sharded_training_matches_unsharded(settings, split):
    """The same 50 steps. Of nine held-out rows one process has fewer batches, and must read on with the other."""
    done = split(settings, "--max-steps=50", "--eval-every=20", "--name=two", "--json")
    assert done.status == 0, done.err
    assert "Warning" not in done.err
    block = check_shares(done, settings)
    assert re.findall(r"It gathers (\d+)", done.err) == [str(3 * 4 * block)] * 2
    two = Library().get("two")
    assert json.loads(done.out)["weights"]["sha256"] == two.sha256
    given = {"max_steps": 50, "gradient_accumulation": 2, "eval_every": 20, "name": "one"}
    one = train(TrainConfig.model_validate(settings | given))
    assert max(abs(a - b) for a, b in zip(curve(one), curve(two), strict=True)) < 1e-5
    ours, theirs = (load_file(it.path / adapter.WEIGHTS_FILE) for it in (one, two))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
    for figure in ("base_loss", "loss", "gain", "standard_error"):
        assert getattr(two.manifest.result, figure) == pytest.approx(getattr(one.manifest.result, figure), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["split", "whole"])
def test_run_resumes_sharded_or_unsharded(settings, split, first):
    """One process dies, and the other leaves a checkpoint; what goes on is the other kind."""
    script, plan = ON_A_CPU + ENDING_PROCESS.format(at=7), {} if first == "split" else {"ACCELERATE_USE_FSDP": "false"}
    done = split(settings, "--max-steps=12", "--name=cut", script=script, **plan)
    assert done.status != 0
    assert "It was after step 7 of 12. Go on with: python cli.py train --resume cut" in done.err
    if first == "split":
        resume("cut")
    else:
        done = split({}, "--resume=cut")
        assert done.status == 0, done.err
        check_shares(done, settings)
    cut = Library().get("cut")
    whole = train(TrainConfig.model_validate(settings | {"max_steps": 12, "gradient_accumulation": 2, "name": "whole"}))
    assert max(abs(a - b) for a, b in zip(curve(whole), curve(cut), strict=True)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--method=pissa"],
        ["--method=lora+", "--gradient-accumulation=2"],
        ["--method=rslora", "--dropout=0.1"],
        ["--gradient-checkpointing=on", "--dtype=bfloat16"],
        ["--eval-every=5", "--patience=2"],
        ["--streaming", "--shuffle-buffer=20"],
        ["--save-every=4", "--target-modules=attention"],
    ],
    ids=lambda more: more[0],
)
def test_sharded_training_supports_option(settings, split, more):
    done = split(settings, "--max-steps=12", "--name=two", *more)
    assert done.status == 0, done.err
    assert Library().get("two").manifest.result.gain > 0
    check_shares(done, settings)


@pytest.mark.slow
def test_configured_block_names_are_sharded(settings, split, gpt2):
    """With spaces, and as `accelerate config` writes a name that was not given."""
    names = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    for number, asked in enumerate(("", " GPT2Block" if settings["base"] == str(gpt2) else " LlamaDecoderLayer , ")):
        plan = names | {"FSDP_TRANSFORMER_CLS_TO_WRAP": asked}
        done = split(settings, "--epochs=1", "--plan", f"--name=n{number}", **plan)
        assert done.status == 0, done.err
        check_shares(done, settings)


@pytest.mark.slow
def test_documented_accelerate_config_shards(settings, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    plan = re.search(r"```yaml\n(distributed_type: FSDP.*?)```", text, re.DOTALL)[1]
    (tmp_path / "fsdp.yaml").write_text(plan.replace("num_processes: 8", "num_processes: 2"))
    script = tmp_path / "split.py"
    script.write_text(SPLIT)
    how = ("accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp.yaml"))
    done = finish(start(settings, "--max-steps=5", "--name=two", script=script, launcher=how))
    assert done.status == 0, done.err
    check_shares(done, settings)
    assert Library().get("two").manifest.run.processes == 2


@pytest.mark.slow
def test_sharded_training_continues_from_adapter(settings, split):
    train(TrainConfig.model_validate(settings | {"max_steps": 5, "name": "one"}))
    done = split(settings, "--from=one", "--max-steps=5", "--name=two")
    assert done.status == 0, done.err
    assert Library().get("two").manifest.parents[0].name == "one"


# What is refused


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(fsdp, "_plugin", None)
    for name, value in PLAN.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_fsdp_on_cpu_is_refused(planned, device):
    planned.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(TrainingError) as error:
        fsdp.read_settings(device)
    assert str(error.value) == (
        "ACCELERATE_USE_FSDP shards the base over GPUs, but these processes run on the CPU: unset it, and each process "
        "holds the whole base."
    )


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("WORLD_SIZE", "1", "ACCELERATE_USE_FSDP shards the base over processes, but there is only one: unset it."),
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
            "accelerate's FSDP settings have fsdp_activation_checkpointing: set it to false, and use --gradient-checkpointing on.",
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
def test_unsupported_fsdp_settings_are_refused(planned, name, value, problem):
    planned.setenv(name, value)
    with pytest.raises(TrainingError) as error:
        fsdp.read_settings("auto")
    assert problem in str(error.value)
    assert fsdp.shard_count() == 1


def test_read_settings_hides_fsdp_from_trainer(planned):
    fsdp.read_settings("auto")
    planned.setattr(distributed, "world_size", lambda: 2)
    assert fsdp.shard_count() == 2
    assert "ACCELERATE_USE_FSDP" not in os.environ


def test_missing_block_class_is_refused(planned, gpt2):
    planned.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    fsdp.read_settings("auto")
    planned.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(TrainingError, match="This base has no blocks of class LlamaDecoderLayer to shard it by"):
        load_base(find_base(str(gpt2)), ModelOptions(device="cpu"))


@pytest.fixture
def blocks(monkeypatch):
    """Find the blocks of a model under a plan that names these."""

    def find(model, *names):
        monkeypatch.setattr(fsdp, "_plugin", SimpleNamespace(transformer_cls_names_to_wrap=list(names)))
        return fsdp._decoder_blocks(model)

    return find


def test_nested_blocks_give_the_outermost(gpt2, blocks):
    model = load_base(find_base(str(gpt2)), ModelOptions(device="cpu")).model
    assert blocks(model, "GPT2MLP", "GPT2Block") == [*model.transformer.h] == blocks(model, "")
    model._no_split_modules = None
    with pytest.raises(TrainingError, match="This base does not name its blocks"):
        blocks(model)


def test_blocks_with_shared_weights_are_refused(planned, gpt2):
    fsdp.read_settings("auto")
    planned.setattr(distributed, "world_size", lambda: 2)
    model = torch.nn.ModuleDict({name: torch.nn.Sequential(torch.nn.Linear(2, 2)) for name in "ab"})
    model["a"][0].weight = model["b"][0].weight
    model._no_split_modules = ["Sequential"]
    with pytest.raises(TrainingError, match="The blocks of this base share weights, so it cannot be sharded"):
        fsdp.place_or_shard(model, torch.device("cpu"))


def test_weight_bytes_with_experts_are_sharded(gpt2, monkeypatch):
    """Experts of a mixture have three dimensions, and are split with their blocks."""
    source = find_base(str(gpt2))
    source.__dict__["shapes"] = {"h.0.experts": (8, 16, 4), "h.0.norm": (16,), "wte.weight": (100, 16)}
    assert _weight_bytes(source, torch.float32, "full") == 4 * (512 + 16 + 1600)
    monkeypatch.setattr(fsdp, "shard_count", lambda: 2)
    assert _weight_bytes(source, torch.float32, "full") == 4 * ((512 + 16) // 2 + 1600)


@pytest.mark.parametrize(
    ("more", "kind", "problem"),
    [
        ({"method": "dora"}, ConfigError, "dora looks at all of the base before it begins"),
        ({"method": "eva"}, ConfigError, "eva looks at all of the base before it begins"),
        ({"load_in": "4bit"}, BaseModelError, "--load-in 4bit cannot be combined with FSDP: choose one"),
    ],
)
def test_options_needing_whole_base_are_refused(settings, monkeypatch, more, kind, problem):
    monkeypatch.setattr(fsdp, "shard_count", lambda: 2)
    monkeypatch.setattr(fsdp, "place_or_shard", lambda model, place: None)
    with pytest.raises(kind) as error:
        train(TrainConfig.model_validate(settings | more))
    assert problem in str(error.value)
