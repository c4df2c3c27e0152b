"""Adapters on tiny models, and the logits that PEFT computes with them."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_tuner import Library
from lora_tuner.data.eval_sets import EvalSet

from .. import tiny_models
from ..inference.test_multi_lora import ALL, ALPHAS, RANKS, SOME, save_peft_adapter

IDS = torch.arange(7, 307).reshape(15, 20)
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": RANKS, "alpha_pattern": ALPHAS, "target_modules": ALL},
    "few layers": {"target_modules": SOME, "r": 7, "lora_alpha": 3},
}


@pytest.fixture
def kind(model_folder):
    return model_folder.name


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path / "adapters")


@pytest.fixture
def make(model_folder, kind, library):
    """Write an adapter with random weights through PEFT."""

    def write(name, variant="plain", **settings):
        config = {"target_modules": ALL} | VARIANTS[variant] | settings
        config = {key: value[kind] if isinstance(value, dict) else value for key, value in config.items()}
        return save_peft_adapter(model_folder, library.path / name, **config)

    return write


@pytest.fixture
def rows():
    return [EvalSet("some reviews", tiny_models.reviews(12, seed=7))]


@pytest.fixture
def two(settings, train_once):
    """Two adapters trained on different rows of the same file."""
    praise = train_once(settings(name="praise", where=["label=1"]))
    return praise, train_once(settings(name="pan", where=["label=0"], rank=2, target_modules="attention"))


def peft_logits(folder, adapter):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter.path).eval()
    with torch.no_grad():
        return model(IDS).logits


def adapter_deltas(folder, adapter):
    """The update that PEFT adds to each weight."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter.path)
    deltas = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and layer.lora_A:
            deltas[name] = layer.get_delta_weight("default").detach().double()
    return deltas


def file_names(library):
    return sorted(path.name for path in library.path.iterdir())
