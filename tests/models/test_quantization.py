import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.errors import BaseModelError
from lora_tuner.evaluation import held_out_loss
from lora_tuner.models.loading import load_base
from lora_tuner.models.quantization import quantize
from lora_tuner.models.resolve import find_base

from .. import tiny_models

GREEDY = SamplingParams(greedy=True, max_new_tokens=20, repetition_penalty=1.0)


LAYERS = [lambda: nn.Linear(64, 48), lambda: nn.Linear(64, 48, bias=False), lambda: Conv1D(48, 64)]


def quantized(layer, load_in):
    model = nn.Sequential(layer)
    model.get_output_embeddings = lambda: None
    quantize(model, load_in)
    return model[0]


@pytest.mark.parametrize("make_layer", LAYERS)
@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize(("load_in", "levels", "tolerance"), [("8bit", 127, 0.02), ("4bit", 7.5, 0.15)])
def test_quantized_linear_is_within_rounding(kernels, make_layer, rows, load_in, levels, tolerance):
    torch.manual_seed(0)
    layer = make_layer()
    with torch.no_grad():
        layer.weight.normal_(std=0.1)
    weight = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().clone()
    x = torch.randn(2, rows, 64) if rows > 5 else torch.randn(rows, 64)
    expected, layer = layer(x), quantized(layer, load_in)
    assert (layer.in_features, layer.out_features) == (64, 48)
    assert layer.weight.shape == (48, 64)
    # Half a step of rounding, and the scale in bfloat16.
    assert ((layer.weight - weight).abs() <= 1.1 * weight.abs().amax(1, keepdim=True) / levels).all()
    assert 0 < (layer(x) - expected).norm() / expected.norm() < tolerance
    assert torch.allclose(layer(x)[:1], layer(x[:1]), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
@pytest.mark.parametrize("size", [4, 8, 24, 40])
def test_quantized_layers_take_any_size(kernels, size, load_in):
    """Those that torch's int4 product does not support get 8 bits."""
    layer, x = nn.Linear(size, 12), torch.randn(7, 3, size).transpose(0, 1)
    torch.testing.assert_close(quantized(layer, load_in)(x), layer(x), atol=0.05, rtol=0)


def test_int4_keeps_weights_of_four_bits():
    """Weights that were in 4 bits in groups of 32 with a scale, as those of GGUF files, stay as they are."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 4, 32), generator=generator)
    codes[..., :2] = torch.tensor([0, 15])
    weight = (codes * torch.rand(32, 4, 1, generator=generator) - 0.5).view(32, 128)
    layer = nn.Linear(128, 32, bias=False)
    layer.weight.data = weight
    assert (quantized(layer, "4bit").weight - weight).abs().max() < 0.01 * weight.abs().max()


def test_zeros_stay_zero():
    layer = nn.Linear(32, 16, bias=False)
    nn.init.zeros_(layer.weight)
    for load_in in ("8bit", "4bit"):
        assert not quantized(layer, load_in)(torch.randn(3, 32)).any()


def test_quantized_loss_is_close_to_float32(model_folder):
    exact, *quantized_bases = (
        load_base(find_base(str(model_folder)), ModelOptions(device="cpu", load_in=load_in))
        for load_in in ("full", "8bit", "4bit")
    )
    rows = held_out_loss.encode_held_out(exact, tiny_models.reviews(20))
    expected = held_out_loss.measure_loss(exact.model, exact, rows).loss
    for base, tolerance in zip(quantized_bases, (0.05, 0.4), strict=True):
        loss = held_out_loss.measure_loss(base.model, base, rows).loss
        assert loss != expected
        assert loss == pytest.approx(expected, abs=tolerance)  # random weights quantize worse than trained ones


@pytest.mark.parametrize(
    ("options", "tolerance"), [({"load_in": "8bit"}, 0.1), ({"dtype": "int8"}, 0.1), ({"load_in": "4bit"}, 0.5)]
)
def test_adapters_on_quantized_base_match_float32(adapter, gpt2, options, tolerance):
    """Text in a mixed batch equals solo text, and logits are close to those of the float32 base."""
    int8 = Generator("reviews", options=ModelOptions(device="cpu", **options))
    assert int8.engine.cpu_decoder is not None
    exact = Generator("reviews", options=ModelOptions(device="cpu"))
    outputs = int8.generate_batch([("the actor", "reviews"), ("this film", None), ("the actor", None)], GREEDY)
    assert [output.text for output in outputs] == [
        int8.generate_batch([(prompt, name)], GREEDY)[0].text
        for prompt, name in (("the actor", "reviews"), ("this film", None), ("the actor", None))
    ]
    assert outputs[0].text != outputs[2].text
    ids = torch.arange(12)[None]
    for name in ("reviews", None):
        logits = []
        for generator in (exact, int8):
            multi_lora = generator.engine.multi_lora
            hooks = multi_lora.hooks([generator.get_or_load(name)[1]])
            with multi_lora.apply_hooks(hooks), torch.inference_mode():
                logits.append(generator.base.model(ids).logits)
        expected, quantized = logits
        assert 0 < (quantized - expected).norm() / expected.norm() < tolerance


def test_int8_on_other_devices_is_refused(gpt2, monkeypatch):
    monkeypatch.setattr("lora_tuner.models.loading.choose_device", lambda name: torch.device("meta"))
    with pytest.raises(BaseModelError, match=r"^int8 is for generation on a CPU, not on meta: leave --dtype"):
        load_base(find_base(str(gpt2)), ModelOptions(device="auto", dtype="int8"))
