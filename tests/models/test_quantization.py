import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_tuner import Generator, ModelOptions, SamplingParams, evaluation
from lora_tuner.errors import BaseModelError
from lora_tuner.models.loading import load_base
from lora_tuner.models.quantization import MAX_INT8_ROWS, Int8Linear
from lora_tuner.models.resolve import find_base

from .. import tiny_models

GREEDY = SamplingParams(greedy=True, max_new_tokens=20, repetition_penalty=1.0)


@pytest.mark.parametrize(
    "make_layer", [lambda: nn.Linear(64, 48), lambda: nn.Linear(64, 48, bias=False), lambda: Conv1D(48, 64)]
)
@pytest.mark.parametrize("rows", [1, MAX_INT8_ROWS, MAX_INT8_ROWS + 1, 100])
def test_int8_linear_is_within_rounding(make_layer, rows):
    torch.manual_seed(0)
    layer = make_layer()
    with torch.no_grad():
        layer.weight.normal_(std=0.1)
    x = torch.randn(2, rows, 64) if rows > MAX_INT8_ROWS else torch.randn(rows, 64)
    quantized = Int8Linear(layer)
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    assert (quantized.in_features, quantized.out_features) == (64, 48)
    assert quantized.weight.shape == (48, 64)
    # Half a step of rounding, and the scale in bfloat16.
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((quantized.weight - weight).abs() <= 1.05 * steps).all()
    difference = (quantized(x) - layer(x)).norm() / layer(x).norm()
    assert 0 < difference < 0.02


@pytest.mark.parametrize("size", [4, 8, 24, 40])
def test_int8_takes_any_size(size):
    """torch's product reads past the end of such weights, which crashes or gives other numbers."""
    layer, x = nn.Linear(size, 12), torch.randn(7, 3, size).transpose(0, 1)
    torch.testing.assert_close(Int8Linear(layer)(x), layer(x), atol=0.05, rtol=0)


def test_int8_zeros_stay_zero():
    layer = nn.Linear(32, 16, bias=False)
    nn.init.zeros_(layer.weight)
    assert not Int8Linear(layer)(torch.randn(3, 32)).any()


def test_int8_loss_is_close_to_float32(model_folder):
    exact, quantized = (
        load_base(find_base(str(model_folder)), ModelOptions(device="cpu", dtype=dtype))
        for dtype in ("float32", "int8")
    )
    rows = evaluation.encode_held_out(exact, tiny_models.reviews(20))
    losses = [evaluation.measure_loss(base.model, base, rows).loss for base in (exact, quantized)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)  # random weights quantize worse than trained ones


def test_adapters_on_int8_match_float32(adapter, gpt2):
    """Text in a mixed batch equals solo text, and logits are close to those of the float32 base."""
    int8 = Generator("reviews", options=ModelOptions(device="cpu", dtype="int8"))
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
        assert 0 < (quantized - expected).norm() / expected.norm() < 0.1


def test_int8_on_other_devices_is_refused(gpt2, monkeypatch):
    monkeypatch.setattr("lora_tuner.models.loading.choose_device", lambda name: torch.device("meta"))
    with pytest.raises(BaseModelError, match=r"^int8 is for generation on a CPU, not on meta: leave --dtype"):
        load_base(find_base(str(gpt2)), ModelOptions(device="auto", dtype="int8"))
