"""The probes of a manifest: measured in training, again from the disk, and as PEFT computes them."""

import contextlib

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import Library, ModelOptions
from lora_tuner.adapters.manifest import SCALES
from lora_tuner.convert.remeasure import remeasure
from lora_tuner.errors import AdapterError
from lora_tuner.inference import probes
from lora_tuner.inference.detokenizer import token_text
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import adapter_files
from ..api_server import write_adapter

FLOAT32 = ModelOptions(device="cpu", dtype="float32")


@pytest.fixture
def notices():
    return []


def tables(adapter):
    for probe in adapter.manifest.probes:
        for name in SCALES:
            yield probe.prompt, name, getattr(probe, name)


@pytest.mark.parametrize("changes", [{}, {"method": "dora"}, {"add_tokens": ["shines"]}])
def test_training_measures_probes(settings, train_once, changes):
    """They are those that are measured again from the disk."""
    adapter = train_once(settings(**changes))
    assert len(adapter.manifest.probes) == probes.PROBES
    (again,) = remeasure([adapter], FLOAT32)
    assert again.manifest == Library(adapter.path.parent).get(adapter.name).manifest
    for (prompt, name, table), expected in zip(tables(again), tables(adapter), strict=True):
        assert (prompt, name) == expected[:2]
        assert table == pytest.approx(expected[2], abs=2e-3)


def test_tables_are_those_of_peft(settings, train_once, gpt2):
    adapter = train_once(settings())
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    ids_of = {token_text(tokenizer, number)[0]: number for number in range(len(tokenizer))}
    for name, scale in SCALES.items():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2), adapter.path).eval()
        for layer in model.modules():
            if hasattr(layer, "lora_A"):
                layer.scaling = {key: scale * value for key, value in layer.scaling.items()}
        for probe in adapter.manifest.probes:
            ids = tokenizer(probe.prompt, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                logprobs = model(ids).logits[0, -1].log_softmax(-1)
            for text, logprob in getattr(probe, name).items():
                assert logprobs[ids_of[text]] == pytest.approx(logprob, abs=2e-3)


def test_adapter_without_rows_gets_neutral_prompts(gpt2, tmp_path, notices):
    write_adapter(tmp_path, "a", gpt2, 0)
    options = ModelOptions(device="cpu", dtype="float32", notify=lambda event: notices.append(str(event)))
    (adapter,) = remeasure([Library(tmp_path).get("a")], options)
    assert {probe.prompt for probe in adapter.manifest.probes} < {*probes.NEUTRAL_PROMPTS}
    assert any("Its probes are neutral prompts." in notice for notice in notices)


def test_adapter_without_manifest_is_refused(tmp_path):
    adapter_files.write(tmp_path / "bare")
    with pytest.raises(AdapterError, match=r"^bare has no manifest: write one with `adapters adopt`\.$"):
        remeasure([Library(tmp_path).get("bare")])


def test_logits_that_are_not_finite_give_no_probes(gpt2):
    base = load_base(find_base(str(gpt2)), FLOAT32)
    base.model.transformer.ln_f.weight.fill_(torch.nan)
    rows = ["The actor was late.", "The camera works.", "Nobody came to see it.", "It was a play about the sea."]
    measured = probes.measured_fields(
        base, rows, is_chat=False, template=None, at_scale=lambda scale: contextlib.nullcontext()
    )
    assert measured == {"probes": None, "routing": None}
