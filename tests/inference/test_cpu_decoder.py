"""CpuDecoder gives the logits of transformers."""

import copy

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.inference import cpu_decoder
from lora_tuner.inference.cpu_decoder import CpuDecoder
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import tiny_models
from .test_multi_lora import save_opt

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def base(model_folder):
    return load_base(find_base(str(model_folder)), ModelOptions(device="cpu", dtype="float32"))


def test_prefill_and_decode_match_transformers(base):
    ids = torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    decoder = CpuDecoder.for_base(base)
    with torch.inference_mode():
        expected = base.model(ids, use_cache=False).logits
        cache = decoder.new_cache([0, 0, 0])
        found = [
            decoder.forward(ids[:, :7], cache),
            *(decoder.forward(ids[:, i : i + 1], cache) for i in range(7, 20)),
        ]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=1e-5)
    assert cache.lengths == [20] * 3


def test_bfloat16_is_closer_to_float32_than_transformers(model_folder):
    base = load_base(find_base(str(model_folder)), ModelOptions(device="cpu", dtype="bfloat16"))
    exact = copy.deepcopy(base.model).float()
    ids = torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    decoder = CpuDecoder.for_base(base)
    cache = decoder.new_cache([0, 0, 0])
    with torch.inference_mode():
        expected, theirs = (model(ids, use_cache=False).logits for model in (exact, base.model))
        found = [
            decoder.forward(ids[:, :7], cache),
            *(decoder.forward(ids[:, i : i + 1], cache) for i in range(7, 20)),
        ]
    assert (torch.cat(found, 1) - expected).norm() <= (theirs.float() - expected).norm()


def test_left_padding_keeps_logits(base):
    ids = torch.randint(1, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    decoder = CpuDecoder.for_base(base)
    padded = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids[:, :7]], 1), ids])
    with torch.inference_mode():
        both, alone = decoder.new_cache([5, 0]), decoder.new_cache([0])
        found = [decoder.forward(padded, both)[:1, -1], decoder.forward(ids[:1, 7:8].repeat(2, 1), both)[:1, -1]]
        expected = [decoder.forward(ids[:, :7], alone)[:, -1], decoder.forward(ids[:, 7:8], alone)[:, -1]]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=2e-5, rtol=1e-5)


def test_single_row_matches_batch(base):
    """A single token uses a separate implementation of RMSNorm."""
    decoder = CpuDecoder.for_base(base)
    with torch.inference_mode():
        together, single = decoder.new_cache([0, 0]), decoder.new_cache([0])
        for token in (5, 17, 230):
            both = decoder.forward(torch.tensor([[token], [token]]), together)
            torch.testing.assert_close(
                decoder.forward(torch.tensor([[token]]), single)[0], both[0], atol=2e-5, rtol=1e-5
            )


def test_decoder_leaves_base_unchanged(model_folder, base):
    """Fused layers share memory with the layers of the model."""
    ids = torch.arange(10)[None]
    before = base.model(ids).logits
    CpuDecoder.for_base(base)
    torch.testing.assert_close(base.model(ids).logits, before, atol=0, rtol=0)
    fresh = load_base(
        find_base(str(model_folder)), ModelOptions(device="cpu", dtype="float32")
    ).model.state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in base.model.state_dict().items())


def test_biases_and_grouped_query_attention(tmp_path):
    torch.manual_seed(0)
    size = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 128}
    model = Qwen2ForCausalLM(Qwen2Config(**size, **heads))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "qwen")
    tiny_models.tokenizer().save_pretrained(tmp_path / "qwen")
    base = load_base(find_base(str(tmp_path / "qwen")), ModelOptions(device="cpu", dtype="float32"))
    decoder = CpuDecoder.for_base(base)
    ids = torch.arange(1, 15)[None]
    with torch.inference_mode():
        found = decoder.forward(ids, decoder.new_cache([0]))
        torch.testing.assert_close(found, base.model(ids).logits, atol=2e-5, rtol=1e-5)


def test_last_only_gives_last_logits(base):
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    decoder = CpuDecoder.for_base(base)
    with torch.inference_mode():
        whole = decoder.forward(ids, decoder.new_cache([0, 0]))
        last = decoder.forward(ids, decoder.new_cache([0, 0]), last_only=True)
    assert last.shape == (2, 1, 320)
    torch.testing.assert_close(last[:, 0], whole[:, -1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"sliding_window": 4}, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}],
)
def test_sliding_window_and_dynamic_rope_unsupported(tmp_path, changes):
    """A short probe would not detect the difference."""
    size = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    for settings, expected in (({"sliding_window": None}, True), ({"sliding_window": None} | changes, False)):
        model = MistralForCausalLM(MistralConfig(**size, **heads, **settings))
        model.save_pretrained(tmp_path / "mistral")
        tiny_models.tokenizer().save_pretrained(tmp_path / "mistral")
        base = load_base(find_base(str(tmp_path / "mistral")), ModelOptions(device="cpu", dtype="float32"))
        assert (CpuDecoder.for_base(base) is not None) == expected


def test_unsupported_bases_use_transformers(tmp_path, base, model_folder, monkeypatch):
    assert CpuDecoder.for_base(base) is not None
    assert (
        CpuDecoder.for_base(load_base(find_base(str(model_folder)), ModelOptions(device="cpu", dtype="float16")))
        is None
    )
    assert (
        CpuDecoder.for_base(
            load_base(find_base(str(save_opt(tmp_path / "opt"))), ModelOptions(device="cpu", dtype="float32"))
        )
        is None
    )
    monkeypatch.setattr(
        CpuDecoder,
        "forward",
        lambda self, ids, cache, lora=None, last_only=False: torch.zeros(1, ids.shape[1], 320),
    )
    assert CpuDecoder.for_base(base) is None  # different logits
    assert (
        Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
        .generate("so", SamplingParams(max_new_tokens=2))
        .tokens
        <= 2
    )


def test_prompt_lengths_share_products(monkeypatch):
    """In bfloat16 oneDNN compiles and keeps a product for each shape."""
    weight, shapes, linear = torch.randn(48, 64).bfloat16(), set(), cpu_decoder.F.linear
    bias = torch.randn(48).bfloat16()
    expected = linear(torch.ones(64, 64).bfloat16(), weight, bias)
    monkeypatch.setattr(cpu_decoder.F, "linear", lambda x, *others: (shapes.add(x.shape), linear(x, *others))[1])
    for tokens in range(33, 65):
        found = cpu_decoder._float_linear(torch.ones(tokens, 64), weight, bias)
        torch.testing.assert_close(found, expected[:tokens])
    assert shapes == {(64, 64)}
