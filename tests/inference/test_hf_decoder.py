"""HFDecoder with models that have different kinds of caches."""

import pytest
import torch
import transformers

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.inference.cpu_decoder import CpuDecoder
from lora_tuner.inference.sequence import Sequence

from .. import tiny_models
from .test_multi_lora import save_opt

GREEDY = SamplingParams(greedy=True, max_new_tokens=12, repetition_penalty=1.0)
PROMPTS = ["the actor never works", "so", "this film drags somehow. the story", "her"]
SIZE = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = WIDTH | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8}
KINDS = {
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # alibi in place of positions
    "GPTNeoX": WIDTH | {"intermediate_size": 64, "max_position_embeddings": 128},
    "Mistral": LLAMA | {"sliding_window": 5},
    "Gemma2": LLAMA | {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "Lfm2": LLAMA | {"full_attn_idxs": [1], "conv_L_cache": 3, "block_ff_dim": 64},
    "Qwen3Next": LLAMA
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [0, 1],
    },
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def save_model(kind, folder):
    if kind == "OPT":
        return save_opt(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZE | KINDS[kind])
    name = f"{kind}LMHeadModel" if hasattr(transformers, f"{kind}LMHeadModel") else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(config)
    return tiny_models.save(model, folder)


@pytest.fixture(params=["OPT", *KINDS])
def generator(request, tmp_path):
    return Generator(
        options=ModelOptions(base=str(save_model(request.param, tmp_path / request.param)), device="cpu")
    )


def transformers_tokens(generator, prompt):
    """Generate with transformers' own `generate`."""
    inputs = generator.base.tokenizer(prompt, return_tensors="pt")
    model = generator.base.model
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=12, pad_token_id=0
    )
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_batch_matches_transformers(generator):
    assert generator.engine.cpu_decoder is None
    sequences = [
        Sequence(generator.base, generator.encode_prompt(prompt).token_ids, GREEDY) for prompt in PROMPTS
    ]
    for number in range(4):  # each joins while others are decoding
        generator.engine.add([sequences[number]])
        generator.engine.step()
    while generator.engine.sequences:
        generator.engine.step()
    for prompt, sequence in zip(PROMPTS, sequences, strict=True):
        expected = transformers_tokens(generator, prompt)
        assert sequence.output_ids == (expected[: expected.index(0)] if 0 in expected else expected)


def test_unknown_cache_recomputes_sequence(tmp_path):
    notices = []
    folder = save_model("Mistral", tmp_path / "base")
    expected = Generator(options=ModelOptions(base=str(folder), device="cpu")).generate("the actor", GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_tuner.inference.hf_decoder.HFDecoder._matches_solo_logits", lambda self: False)
        generator = Generator(
            options=ModelOptions(base=str(folder), device="cpu", notify=lambda event: notices.append(event.text))
        )
        assert generator.generate("the actor", GREEDY) == expected
    assert notices == [f"{folder} has no standard KV cache: the whole sequence is recomputed for every token."]


def test_all_but_mamba_have_cache(generator):
    decoder = generator.engine.hf_decoder
    assert decoder.has_cache == (type(generator.base.model).__name__ != "MambaForCausalLM")


def test_kv_bytes_per_token_is_positive(generator):
    assert generator.engine.kv_bytes_per_token > 0


def test_probe_detects_broken_cache(tmp_path, monkeypatch):
    folder = tiny_models.save_model(tmp_path / "base", "llama")
    monkeypatch.setattr(CpuDecoder, "for_base", lambda base: None)
    from lora_tuner.inference.hf_decoder import HFCache

    monkeypatch.setattr(HFCache, "keep_rows", lambda self, lines: None)
    assert not Generator(options=ModelOptions(base=str(folder), device="cpu")).engine.hf_decoder.has_cache
