"""Layers are what a base does with them: some have their weights used without being called."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_tuner import ModelOptions
from lora_tuner.errors import BaseModelError
from lora_tuner.models.layers import has_transposed_layers, linear_layers
from lora_tuner.models.loading import load_base
from lora_tuner.models.quantization import dense_weight
from lora_tuner.models.resolve import find_base
from lora_tuner.models.targets import resolve_target_modules

from ..model_families import make_family, save_family

IDS = torch.arange(100, 110)[None]


def load(folder, **precision):
    options = ModelOptions(device="cpu", **precision)
    return load_base(find_base(str(folder)), options, training="load_in" in precision).model  # by bitsandbytes


BITS_8, BITS_4, INT8 = {"load_in": "8bit"}, {"load_in": "4bit"}, {"dtype": "int8"}


@pytest.mark.parametrize(
    ("family", "precision", "changes"),
    [
        ("gpt2", BITS_8, {}),
        ("mamba", BITS_4, {}),  # multiplies by a weight
        ("jamba", BITS_8, {}),  # calls that layer only where transformers says that the model is quantized
        ("rwkv", BITS_4, {"num_hidden_layers": 4, "rescale_every": 1}),  # halves weights in place
        ("deepseek_v3", BITS_8, {}),  # inputs of four dimensions
        ("hy_v4", BITS_4, {}),  # casts inputs to the dtype of a weight
        ("mamba", INT8, {}),
        ("rwkv", INT8, {"num_hidden_layers": 4, "rescale_every": 1}),
    ],
)
def test_quantized_model_has_values_of_its_weights(tmp_path, family, precision, changes):
    folder = save_family(tmp_path, family, **changes)
    quantized, plain = load(folder, **precision), load(folder)
    for name, layer in linear_layers(quantized).items():
        weight = dense_weight(layer).detach().float()
        plain.get_submodule(name).weight.data = weight.T if has_transposed_layers(plain) else weight
    expected = plain(IDS).logits
    error = (quantized(IDS).logits - expected).abs().mean() / expected.abs().mean()
    assert error < (1e-4 if precision == BITS_4 else 0.1)  # others round inputs too


def test_rwkv_equals_transformers(tmp_path):
    folder = save_family(tmp_path, "rwkv", num_hidden_layers=4, rescale_every=2)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    torch.testing.assert_close(load(folder)(IDS).logits, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("tied", "its weights are used elsewhere too"),
        ("read", "its weights are used elsewhere too"),
        ("read in training", "its weights are used elsewhere too"),
        ("read, and replaced when the block begins", "its weights are used elsewhere too"),  # as FSDP does
        ("named input", "takes or gives more than one tensor"),
        ("tuple", "takes or gives more than one tensor"),
    ],
)
def test_layer_that_lora_cannot_follow_is_left_out(case, reason):
    model = make_family("llama")
    mlp = model.model.layers[0].mlp
    gate, gate_forward = mlp.gate_proj, mlp.gate_proj.forward
    if case == "tied":
        gate.weight = mlp.up_proj.weight
    elif case == "named input":
        mlp.forward = lambda x: mlp.down_proj(gate(input=x) * mlp.up_proj(x))
    elif case == "tuple":
        gate.forward = lambda x: (gate_forward(x), None)
        mlp.forward = lambda x: mlp.down_proj(gate(x)[0] * mlp.up_proj(x))
    else:
        if "replaced" in case:
            model.model.layers[0].register_forward_pre_hook(
                lambda *_: setattr(gate, "weight", torch.nn.Parameter(gate.weight.detach().clone()))
            )
        reads = [case != "read in training", True]
        mlp.forward = lambda x: mlp.down_proj(
            gate(x) * mlp.up_proj(x) + (x @ gate.weight.T if reads[mlp.training] else 0)
        )
    targets = resolve_target_modules(model, "auto")
    assert "model.layers.0.mlp.gate_proj" not in targets.modules
    assert "model.layers.1.mlp.gate_proj" in targets.modules
    assert len(targets.not_adapted) == 1
    assert reason in targets.not_adapted[0]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_passes_probe(monkeypatch, error):
    model = make_family("llama")

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(type(error), match=str(error)):
        resolve_target_modules(model, "auto")


def test_rwkv_in_float16_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match=r"overflows in float16: choose --dtype bfloat16 or float32"):
        load(save_family(tmp_path, "rwkv"), dtype="float16")
