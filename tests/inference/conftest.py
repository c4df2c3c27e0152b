"""Random adapters on tiny bases, and both decoders."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_tuner import ModelOptions, TrainConfig
from lora_tuner.inference.cpu_decoder import CpuDecoder
from lora_tuner.models import lora
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.models.targets import resolve_target_modules


@pytest.fixture(params=["cpu_decoder", "transformers"])
def decoder_kind(request, monkeypatch):
    if request.param == "transformers":
        monkeypatch.setattr(CpuDecoder, "for_base", lambda base: None)


def save_random_adapter(base_folder, name, rank=4, targets="auto", seed=0, dora=False, folder="adapters"):
    """Save an adapter with random weights. Returns its folder."""
    base = load_base(find_base(str(base_folder)), ModelOptions(device="cpu"))
    if dora:
        names = resolve_target_modules(base.model, targets).names
        kind = {"task_type": "CAUSAL_LM", "use_dora": True, "fan_in_fan_out": "gpt2" in str(base_folder)}
        model = get_peft_model(base.model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, **kind))
    else:
        model = lora.add_lora(base, TrainConfig(rank=rank, target_modules=targets))
    torch.manual_seed(seed)
    tensors = {
        name: tensor * (torch.rand_like(tensor) + 0.5) if "magnitude" in name else torch.randn_like(tensor) * 0.3
        for name, tensor in lora.adapter_state_dict(model).items()
    }
    path = Path(folder) / name
    lora.save_adapter_files(tensors, model.peft_config["default"], path)
    return path


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """Folder of the adapters that several tests use."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def eight_adapters(model_folder, shared_folder):
    """Names of eight_adapters adapters in `adapters` that differ in rank or target modules, one with DoRA."""
    two_layers, one_layer = {"gpt2": ("c_attn,c_fc", "mlp.c_proj"), "llama": ("q_proj,up_proj", "down_proj")}[
        model_folder.name
    ]
    settings = {
        "one": (1, "auto"),
        "two": (2, "attention"),
        "three": (3, two_layers),
        "four": (4, one_layer),
        "five": (5, "all-linear"),
        "six": (6, "attention"),
        "eight": (8, two_layers),
        "nine": (9, "auto"),
    }
    folder = shared_folder / model_folder.name
    if not folder.exists():
        for name, (rank, targets) in settings.items():
            save_random_adapter(model_folder, name, rank, targets, seed=rank, dora=name == "six", folder=folder)
    shutil.copytree(folder, "adapters")
    return list(settings)
