"""The default learning rate: measured on the base, without a trace in weights or random numbers."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_tuner import Notice, Progress, plan, resume, train
from lora_tuner.models import lora
from lora_tuner.training import learning_rate
from lora_tuner.training.inputs import TrainingInputs, load_inputs
from lora_tuner.training.setup import prepare_training

from .. import tiny_models
from ..data_files import jsonl
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


def test_measured_run_equals_run_with_rate(measured, monkeypatch):
    monkeypatch.setattr(learning_rate, "MAX_TRIES", 40)  # more than it needs
    told = []
    adapter = train(measured(dropout=0.1, name="a"), told.append)
    (text,) = [event.text for event in told if isinstance(event, Notice) and "Learning rate" in event.text]
    bars = [
        event for event in told if isinstance(event, Progress) and event.stage == "choosing the learning rate"
    ]
    assert bars[-1].done == bars[-1].total
    rate = float(text.split()[2])
    assert re.search(r" \(--learning-rate\), measured on the base in \d+ s\.$", text)
    assert weights(adapter) == weights(train(measured(dropout=0.1, name="b", learning_rate=rate)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        *({"method": method} for method in ("rslora", "dora", "pissa", "eva")),
        {"rank": 256},
        {"rank": 1, "target_modules": "transformer.h.1.attn.c_attn"},
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": "on"},
        {"streaming": True},
    ],
    ids=str,
)
def test_rate_of_each_kind_is_measured(measured, changes):
    """And the run begins as with a given rate."""
    states = []
    for rate in (None, 1e-3):
        setup = prepare_training(measured(learning_rate=rate, **changes))
        assert setup.learning_rate_origin.startswith("as given" if rate else "measured on the base")
        states.append(lora.adapter_state_dict(setup.model))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_resumed_run_is_not_measured_anew(measured, stop_at, monkeypatch):
    with stop_at(2, "/reviews"):
        train(measured(save_every=1))
    monkeypatch.setattr(learning_rate, "_best_step", None)
    assert resume("reviews").manifest.run.steps == 6


def test_measuring_leaves_model_as_it_was(measured, monkeypatch):
    config = measured(learning_rate=1e-3)
    inputs = load_inputs(config, print)
    setup = prepare_training(config, inputs=inputs)
    trained = {name: p.detach().clone() for name, p in setup.model.named_parameters() if p.requires_grad}
    state = torch.get_rng_state()
    learning_rate.default_learning_rate(setup, setup.model)
    assert torch.equal(state, torch.get_rng_state())
    loss = TrainingInputs.text_loss
    monkeypatch.setattr(TrainingInputs, "text_loss", lambda *of: loss(*of) * float("nan"))
    rate, origin = learning_rate.default_learning_rate(setup, setup.model)
    assert (rate, origin) == (2e-3, "from the method lora, as no step on the base lowers its loss")
    after = dict(setup.model.named_parameters())
    assert all(torch.equal(before, after[name]) and after[name].grad is None for name, before in trained.items())


def test_sample_mixes_datasets_by_weights(settings):
    for name, count in (("a", 300), ("b", 8), ("c", 3)):
        texts = [f"{name} {text[:50]}" for text in tiny_models.reviews(count, seed=ord(name))]
        Path(f"{name}.jsonl").write_text(jsonl({"text": text} for text in texts))
    datasets = ["a.jsonl=0.3", "b.jsonl=0.5", "c.jsonl=0.2"]
    setup = prepare_training(settings(dataset=datasets, packing=False, batch_size=20))
    samples = [
        [setup.base.tokenizer.decode(ids).strip() for batch in half for ids in batch["input_ids"]]
        for half in learning_rate._two_samples(setup)
    ]
    for sample in samples:
        share = {name: sum(text.startswith(name) for text in sample) / len(sample) for name in "abc"}
        assert share == pytest.approx({"a": 0.3, "b": 0.5, "c": 0.2}, abs=0.05)
    assert {text[0] for text in set(samples[0]) & set(samples[1])} <= {"c"}


def test_sample_counts_learned_tokens(settings, monkeypatch):
    rows = [
        {"prompt": f"{text} {text}", "completion": f" {text.split(':')[0]}"} for text in tiny_models.reviews(200)
    ]
    Path("chat.jsonl").write_text(jsonl(rows))
    monkeypatch.setattr(learning_rate, "MIN_TOKENS", 100)
    setup = prepare_training(settings(dataset="chat.jsonl", max_length=128))
    for most, enough in ((100_000, True), (500, False)):
        monkeypatch.setattr(learning_rate, "MAX_TOKENS", most)
        for half in learning_rate._two_samples(setup):
            learned = sum(int((batch["labels"] >= 0).sum()) for batch in half)
            assert (learned >= 100) is enough
            assert sum(batch["input_ids"].numel() for batch in half) > (learned * 3 if enough else 499)


def test_limit_of_measured_rate_is_said(settings, monkeypatch):
    for method, share in (("lora", 1), ("lora+", 0.5)):
        for best, limit, rate in ((0.02, "at most", 4e-3), (1e-5, "at least", 1e-5)):
            monkeypatch.setattr(learning_rate, "_best_step", lambda *of, best=best: best)
            estimate = plan(settings(learning_rate=None, method=method))
            assert estimate.learning_rate == pytest.approx(rate * share)
            text = f" ({0.4 * best * share:.2g}, but a default is {limit} {rate * share:g})"
            assert estimate.learning_rate_origin.endswith(text)
    monkeypatch.setattr(learning_rate, "_best_step", lambda *of: 5e-3)
    assert plan(settings(learning_rate=None)).learning_rate_origin.endswith(" s")


@pytest.mark.parametrize(
    ("name", "result", "why"),
    [
        ("_two_samples", ([], []), "measuring one takes two sequences"),
        ("_best_step", None, "no step on the base lowers its loss"),
    ],
)
def test_unmeasured_rate_is_of_method(settings, monkeypatch, name, result, why):
    monkeypatch.setattr(learning_rate, name, lambda *of: result)
    estimate = plan(settings(learning_rate=None))
    assert (estimate.learning_rate, estimate.learning_rate_origin) == (2e-3, f"from the method lora, as {why}")


def test_lowest_point_of_parabola():
    for lowest in (0.6, 1.0, 1.9, 3.0):
        values = [(length - lowest) ** 2 for length in (0.5, 1.0, 2.0)]
        assert learning_rate._lowest_point(*values) == pytest.approx(min(lowest, 2.0))
    assert learning_rate._lowest_point(1.0, 1.0, 1.0) == 1.0
    assert learning_rate._lowest_point(1.0, 0.5, float("inf")) == 1.0
