"""Less memory: quantized bases, lower precision, and gradient checkpointing."""

import gc
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lora_tuner import (
    Generator,
    Library,
    ModelOptions,
    SamplingParams,
    TrainConfig,
    evaluate,
    plan,
    resume,
    train,
)
from lora_tuner.cli.display import print_parts
from lora_tuner.errors import BaseModelError, Notice, TrainingError
from lora_tuner.models import lora, memory
from lora_tuner.models.layers import layer_sizes, linear_layers
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.training import profiling
from lora_tuner.training.setup import prepare_training

from .. import model_families, tiny_models
from ..parameters import sampled

BITS = ["8bit", "4bit"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Layers wide enough for 4-bit blocks of 64 weights."""
    root = tmp_path_factory.mktemp("wide")
    return {kind: tiny_models.save_model(root / kind, kind, width=64) for kind in ("gpt2", "llama")}


@pytest.fixture(params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def folder(request, wide):
    return wide[request.param]


@pytest.mark.parametrize("bits", BITS)
def test_quantized_base_trains_and_generates(folder, settings, bits):
    adapter = train(settings(base=str(folder), load_in=bits))
    manifest = adapter.manifest
    assert manifest.run.load_in == bits
    assert manifest.result.gain > 2 * manifest.result.standard_error
    assert all(
        tensor.dtype == torch.float32 for tensor in load_file(adapter.path / "adapter_model.safetensors").values()
    )
    again = evaluate([adapter], options=ModelOptions(device="cpu", load_in=bits)).cells[0][0]
    assert again.loss == pytest.approx(manifest.result.loss, abs=1e-3)
    full = evaluate([adapter], options=ModelOptions(device="cpu")).cells[0][0]
    assert full.base_loss != pytest.approx(again.base_loss, abs=1e-7)  # cached apart
    assert full.gain > 0
    generator = Generator("reviews", options=ModelOptions(device="cpu", load_in=bits))
    greedy = SamplingParams(greedy=True, max_new_tokens=6)
    outputs = generator.generate_batch([("the actor", None), ("the actor", "reviews")], greedy)
    assert outputs[1].text == generator.generate("the actor", greedy).text


@pytest.mark.parametrize("bits", BITS)
def test_only_linear_layers_are_quantized(folder, bits):
    base = load_base(
        find_base(str(folder)), ModelOptions(device="cpu", dtype="bfloat16", load_in=bits), training=True
    )
    assert base.load_in == bits
    layer_class = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[bits]
    layers = linear_layers(base.model)
    assert {type(layer).__name__ for layer in layers.values()} == {layer_class}
    full_base = load_base(find_base(str(folder)), ModelOptions(device="cpu"))
    assert layer_sizes(layers) == layer_sizes(linear_layers(full_base.model))
    full = lora.add_lora(full_base, TrainConfig(rank=2))
    assert lora.count_parameters(lora.add_lora(base, TrainConfig(rank=2))) == lora.count_parameters(full)
    for embeddings in (base.model.get_input_embeddings(), base.model.get_output_embeddings()):
        assert embeddings.weight.dtype == torch.bfloat16


def test_experts_stay_unquantized_and_are_counted(tmp_path):
    """transformers 5 has them as one parameter, and their files each layer of each expert."""
    folder, notices = model_families.save_family(tmp_path / "base", "mixtral"), []
    options = ModelOptions(device="cpu", dtype="bfloat16", load_in="8bit", notify=notices.append)
    base = load_base(find_base(str(folder)), options, training=True)
    assert Notice("The experts (74 kB) stay as they are: 8bit is for linear layers.") in notices
    loaded = sum(parameter.numel() * parameter.itemsize for parameter in base.model.parameters())
    assert memory._weight_bytes(base.files, torch.bfloat16, "8bit") == pytest.approx(loaded, rel=0.05)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_flow_after_quantized_generation(folder, settings, bits):
    """On CPUs with AVX-512 bitsandbytes repacks 4-bit weights at the first forward pass without gradients, and later
    passes have none."""
    base = load_base(find_base(str(folder)), ModelOptions(device="cpu", load_in=bits), training=True)
    ids = torch.arange(1, 20)[None]
    with torch.inference_mode():
        before = base.model(ids).logits
    model = lora.add_lora(base, settings()).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model(ids).logits.float().logsumexp(-1).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    with torch.inference_mode(), model.eval().disable_adapter():
        torch.testing.assert_close(model(ids).logits, before)


@pytest.mark.parametrize("method", sampled(["dora", "pissa", "eva"], 3))
def test_methods_dequantize_weights(folder, settings, method):
    adapter = train(settings(base=str(folder), load_in="4bit", method=method))
    again = evaluate([adapter], options=ModelOptions(device="cpu", load_in="4bit")).cells[0][0]
    assert again.loss == pytest.approx(adapter.manifest.result.loss, abs=2e-3)
    assert again.gain > 0


def test_resumed_4bit_run_equals_uninterrupted_run(settings, wide, stop_at):
    settings_4bit = {"base": str(wide["llama"]), "load_in": "4bit", "save_every": 2}
    whole = train(settings(name="whole", **settings_4bit))

    with stop_at(3):
        train(settings(name="half", **settings_4bit))
    assert resume("half").sha256 == whole.sha256


def limit_memory(monkeypatch, folder, share):
    """Make this share of the base's size in float32 the free memory."""
    shapes = find_base(str(folder)).shapes.values()
    free_bytes = int(share * 4 * sum(torch.Size(shape).numel() for shape in shapes))
    monkeypatch.setattr(memory, "free_memory", lambda device: free_bytes)


@pytest.mark.parametrize(
    ("share", "dtype", "bits"),
    [
        (1.01, torch.float32, "full"),
        (0.51, torch.bfloat16, "full"),
        (0.4, torch.bfloat16, "8bit"),
        (0.3, torch.bfloat16, "4bit"),
    ],
)
def test_auto_precision_takes_largest_that_fits(wide, monkeypatch, share, dtype, bits):
    limit_memory(monkeypatch, wide["gpt2"], share)
    notices = []
    options = ModelOptions(device="cpu", notify=lambda notice: notices.append(notice.text))
    base = load_base(find_base(str(wide["gpt2"])), options)
    assert (base.dtype, base.load_in) == (dtype, bits)
    if share > 1:
        assert notices == []
    else:
        precision = bits if bits != "full" else "bfloat16"
        (text,) = notices
        assert text.endswith(f"GB of memory are free, so it is loaded in {precision}.")


def test_chosen_precision_is_in_run_yaml(settings, wide, monkeypatch):
    limit_memory(monkeypatch, wide["gpt2"], 0.3)
    adapter = train(settings(base=str(wide["gpt2"])))
    text = (adapter.path / "run.yaml").read_text()
    assert "dtype: bfloat16\nload_in: 4bit\n" in text
    monkeypatch.undo()
    assert adapter.manifest.run.load_in == "4bit"


def test_explicit_precision_is_never_reduced(wide, monkeypatch):
    limit_memory(monkeypatch, wide["gpt2"], 0.3)
    files = find_base(str(wide["gpt2"]))
    with pytest.raises(BaseModelError) as error:
        load_base(files, ModelOptions(device="cpu", dtype="float32", load_in="full"))
    assert str(error.value).endswith(
        "GB of memory are free: choose --dtype bfloat16, --load-in 4bit (needs bitsandbytes) or a smaller base."
    )
    limit_memory(monkeypatch, wide["gpt2"], 0.01)
    with pytest.raises(BaseModelError) as error:
        load_base(files, ModelOptions(device="cpu"))
    assert " GB in 4bit, and " in str(error.value)
    assert str(error.value).endswith("GB of memory are free: choose a smaller base.")


def test_impossible_quantization_is_refused(gpt2, monkeypatch):
    files = find_base(str(gpt2))
    with pytest.raises(BaseModelError, match="both quantize the base: choose one"):
        load_base(files, ModelOptions(device="cpu", dtype="int8", load_in="4bit"))
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError) as error:
        load_base(files, ModelOptions(device="cpu", load_in="4bit"), training=True)
    assert str(error.value) == "--load-in 4bit needs bitsandbytes: pip install bitsandbytes; or leave it out."


@pytest.mark.parametrize("bits", sampled(["full", "4bit"], 2))
def test_gradient_checkpointing_is_bitwise_equal(folder, settings, bits):
    stored, recomputed = (
        train(settings(base=str(folder), name=name, gradient_checkpointing=mode, dropout=0.1, load_in=bits))
        for name, mode in (("stored", "off"), ("recomputed", "on"))
    )
    assert stored.sha256 == recomputed.sha256
    assert "checkpointing: 'on'" in (recomputed.path / "run.yaml").read_text()


def test_step_memory_leaks_no_tensors(folder, settings):
    setup = prepare_training(settings(base=str(folder)))

    def count_tensors():
        gc.collect()
        return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())

    profiling.step_memory(setup, setup.model)
    before = count_tensors()
    profiling.step_memory(setup, setup.model)
    assert count_tensors() == before


def test_gradient_checkpointing_saves_memory(folder, settings):
    setup = prepare_training(settings(base=str(folder), max_length=128))
    _, stored = profiling.step_memory(setup, setup.model)
    profiling.enable_gradient_checkpointing(setup, setup.model)
    _, recomputed = profiling.step_memory(setup, setup.model)
    weights = 12 * lora.count_parameters(setup.model)[0]
    assert recomputed - weights < 0.7 * (stored - weights)


def test_auto_checkpointing_when_memory_is_short(settings, monkeypatch):
    setup = prepare_training(settings())
    _, needed = profiling.step_memory(setup, setup.model)
    notices = []
    monkeypatch.setattr(profiling, "free_memory", lambda device: needed - 1)
    adapter = train(settings(), lambda event: notices.append(event.text) if isinstance(event, Notice) else None)
    assert "checkpointing: 'on'" in (adapter.path / "run.yaml").read_text()
    assert [text for text in notices if text.endswith("and is slower (--gradient-checkpointing).")]
    estimate = plan(settings(name="planned"))
    assert estimate.gradient_checkpointing
    assert (estimate.dtype, estimate.load_in) == ("float32", "full")
    with pytest.raises(TrainingError, match="A step with"):
        plan(settings(name="planned", gradient_checkpointing="off"))
    assert Library().names() == ["reviews"]


def test_plan_shows_chosen_precision(settings, capsys):
    estimate = plan(settings())
    assert not estimate.gradient_checkpointing
    reduced = replace(estimate, load_in="4bit", gradient_checkpointing=True)
    for shown, text in ((estimate, "float32"), (reduced, "4bit, gradient checkpointing")):
        print_parts(shown.summary())
        output = capsys.readouterr().out
        assert re.search(rf"^base +{text} *$", output, re.MULTILINE)
        assert re.search(r"^coverage +100% of the block weights *$", output, re.MULTILINE)
    assert json.dumps(vars(estimate))
