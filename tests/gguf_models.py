"""Random models of all architectures that are exported to GGUF, with settings that llama.cpp could get wrong."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from . import tiny_models

_IDS = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_HEADS = {"num_attention_heads": 4, "max_position_embeddings": 64}
_PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, **_HEADS}
_NEOX = {**_PLAIN, "intermediate_size": 48}
_LLAMA = {**_NEOX, "num_key_value_heads": 2}
_WIDE = {**_LLAMA, "head_dim": 16}
_GEMMA = {**_WIDE, "num_hidden_layers": 4, "query_pre_attn_scalar": 16, "sliding_window": 8}
_GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_LONG = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0, 8.0]}


def _rope(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **settings}}


# Name -> model type, settings.
MODELS = {
    "llama": ("llama", {**_LLAMA, **_rope("default")}),
    "llama with biases, wide heads": ("llama", {**_WIDE, "attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "llama with rope of Llama 3": ("llama", {**_LLAMA, **_rope("llama3", factor=8.0, **LLAMA3)}),
    "llama with linear rope": ("llama", {**_LLAMA, **_rope("linear", factor=3.0)}),
    "llama with yarn": ("llama", {**_LLAMA, "rope_parameters": _YARN}),
    "llama with yarn of its own": (
        "llama",
        {**_LLAMA, "rope_parameters": {**_YARN, "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0}},
    ),
    "mistral": ("mistral", {**_WIDE, "sliding_window": None}),
    "mistral with a window": ("mistral", {**_WIDE, "sliding_window": 48}),
    "gpt2": ("gpt2", _GPT2),
    "gpt2 with a narrow MLP": ("gpt2", {**_GPT2, "n_inner": 40, "layer_norm_epsilon": 1e-2}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2 with yarn": ("qwen2", {**_LLAMA, "rope_parameters": _YARN}),
    "qwen3": ("qwen3", _WIDE),
    "gemma": ("gemma", _WIDE),
    "gemma2": ("gemma2", _GEMMA),
    "gemma2 with tight caps": (
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": ("gemma3_text", {**_GEMMA, "num_hidden_layers": 7}),
    "gemma3 with two kinds of rope": (
        "gemma3_text",
        {
            **_GEMMA,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 999.0, "factor": 8.0},
            },
        },
    ),
    "phi3": ("phi3", _LLAMA),
    "phi3 with partial rope": ("phi3", {**_LLAMA, **_rope("default", partial_rotary_factor=0.5)}),
    "phi3 with longrope": (
        "phi3",
        {**_LLAMA, "original_max_position_embeddings": 32, **_rope("longrope", **_LONG)},
    ),
    "olmo2": ("olmo2", _LLAMA),
    "smollm3": ("smollm3", {**_LLAMA, "num_hidden_layers": 5}),
    "granite": (
        "granite",
        {
            **_LLAMA,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "starcoder2": ("starcoder2", _LLAMA),
    "stablelm": ("stablelm", {**_LLAMA, "use_qkv_bias": True}),
    "stablelm in parallel": ("stablelm", {**_LLAMA, "use_parallel_residual": True}),
    "glm4": ("glm4", {**_LLAMA, "head_dim": 8}),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox in sequence": (
        "gpt_neox",
        {**_NEOX, "use_parallel_residual": False, "rotary_pct": 0.5, "rotary_emb_base": 500},
    ),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", _PLAIN),
    "falcon with groups": ("falcon", {**_PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon with one norm": (
        "falcon",
        {**_PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon with all heads": ("falcon", {**_PLAIN, "multi_query": False, "ffn_hidden_size": 40}),
}


def save(folder, name, **changes):
    """Save a random model with a tokenizer. Norms and biases are random too, and no logits are near ties."""
    model_type, settings = MODELS[name]
    tied = {"tie_word_embeddings": False} if model_type in ("olmo2", "llama") else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_IDS, **tied, **settings, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder
