"""The default learning rate: measured on the base, without a trace in weights or random numbers."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_tuner import Notice, plan, train
from lora_tuner.training import learning_rate
from lora_tuner.training.inputs import load_inputs
from lora_tuner.training.setup import prepare_training

from .. import tiny_models
from .test_run import weights

SCALED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@pytest.fixture
def measured(settings, monkeypatch):
    """Settings of a run whose default rate has no bounds."""
    monkeypatch.setattr(learning_rate, "HIGHEST_RATE", 1.0)
    return lambda **changes: settings(**{"learning_rate": None, "dtype": "float32"} | changes)


def scale_inputs(folder, out, factor):
    """Save a base that computes the same with larger inputs to its layers and smaller weights."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.mul_(factor)
            if any(layer in name for layer in SCALED):
                parameter.div_(factor)
    shutil.copytree(folder, out)
    model.save_pretrained(out)
    return out


def test_rate_follows_size_of_inputs(measured, tmp_path):
    base = tiny_models.save_model(tmp_path / "base", "llama")
    rates = []
    for factor in (1, 16):
        folder = scale_inputs(base, tmp_path / f"scaled{factor}", factor)
        setup = prepare_training(measured(base=str(folder), target_modules=",".join(SCALED)))
        rates.append(setup.learning_rate)
    assert rates[0] / rates[1] == pytest.approx(16, rel=0.05)


def test_rate_of_lora_plus_is_half(measured):
    rates = [prepare_training(measured(method=method)).learning_rate for method in ("lora", "lora+")]
    assert rates[1] / rates[0] == pytest.approx(0.5, rel=0.05)


def test_measured_run_equals_run_with_rate(measured):
    told = []
    adapter = train(measured(dropout=0.1, name="a"), told.append)
    (text,) = [event.text for event in told if isinstance(event, Notice) and "Learning rate" in event.text]
    rate = float(text.split()[2])
    assert text.endswith("measured on the base with the first sequences.")
    assert weights(adapter) == weights(train(measured(dropout=0.1, name="b", learning_rate=rate)))


def test_measuring_leaves_model_as_it_was(measured):
    config = measured(learning_rate=1e-3)
    inputs = load_inputs(config, print)
    setup = prepare_training(config, inputs=inputs)
    trained = {name: p.detach().clone() for name, p in setup.model.named_parameters() if p.requires_grad}
    state = torch.get_rng_state()
    learning_rate.default_learning_rate(setup, setup.model)
    assert torch.equal(state, torch.get_rng_state())
    after = dict(setup.model.named_parameters())
    assert all(torch.equal(before, after[name]) and after[name].grad is None for name, before in trained.items())


def test_rate_without_second_sequence(settings, monkeypatch):
    monkeypatch.setattr(learning_rate, "_two_samples", lambda inputs: ([], []))
    estimate = plan(settings(learning_rate=None))
    assert (estimate.learning_rate, estimate.learning_rate_origin) == (2e-3, "from the method lora")


def test_lowest_point_of_parabola():
    for lowest in (0.6, 1.0, 1.9, 3.0):
        values = [(length - lowest) ** 2 for length in (0.5, 1.0, 2.0)]
        assert learning_rate._lowest_point(*values) == pytest.approx(min(lowest, 2.0))
    assert learning_rate._lowest_point(1.0, 1.0, 1.0) == 1.0
    assert learning_rate._lowest_point(1.0, 0.5, float("inf")) == 1.0
