"""Tiny random models of many families, which differ in layers, caches and names in their configs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, PreTrainedModel

from lora_tuner.models.loading import auto_class

from .tiny_models import tokenizer

CONTEXT = 48
_IDS = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
_LLAMA = {**_WIDE, **_HEADS}
_HEAD_DIM = {**_LLAMA, "head_dim": 8}
_NEOX = {**_WIDE, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
_LAYERS = {"num_hidden_layers": 2, "hidden_size": 32}
_SSM = {**_LAYERS, "state_size": 4}
_MAMBA2 = {**_SSM, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 8}
_LATENT_MOE = {  # DeepSeek's attention and experts
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
_DECODER = {
    **_IDS,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "max_position_embeddings": CONTEXT,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
_ENCODER = {**_NEOX, "is_decoder": True, "type_vocab_size": 1}
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_QWEN35 = {
    **_HEAD_DIM,
    **_LINEAR_ATTENTION,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 1.0,
    },
}
_SHARED_MOE = {**_MOE, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
_MAMBA_OF_HYBRID = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 4,
    "mamba_chunk_size": 8,
}
_GEMMA = {**_HEAD_DIM, "sliding_window": 16, "query_pre_attn_scalar": 8}  # of Gemma 2 and 3
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN35_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}

# Model type -> settings of its config. The token ids are added to it, and to a `text_config`.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": CONTEXT},
    "gptj": {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": CONTEXT, "rotary_dim": 4},
    "gpt_neo": {
        **_LAYERS,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": CONTEXT,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 16},
    "qwen2": _LLAMA,
    "qwen3": _HEAD_DIM,
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "gemma": _HEAD_DIM,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": _LLAMA,
    "smollm3": {**_LLAMA, "num_hidden_layers": 4},  # each fourth layer has no rotary positions
    "glm4": _HEAD_DIM,
    "granite": _LLAMA,
    "starcoder2": _LLAMA,
    "stablelm": _LLAMA,
    "cohere2": {**_LLAMA, "sliding_window": 16},
    "ernie4_5": _HEAD_DIM,
    "ministral3": _HEAD_DIM,
    "opt": {**_LAYERS, "ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 16},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT, "expansion_ratio": 2},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT},
    "gpt_neox": _NEOX,
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": CONTEXT},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": CONTEXT},
    "mamba": _SSM,
    "falcon_mamba": {**_SSM, "intermediate_size": 48},
    "mamba2": _MAMBA2,
    "bamba": {**_LLAMA, **_MAMBA_OF_HYBRID, "attn_layer_indices": [1]},
    "falcon_h1": {**_HEAD_DIM, **_MAMBA_OF_HYBRID, "mamba_d_ssm": 32, "mamba_n_heads": 4},
    "granitemoehybrid": {
        **_LLAMA,
        **_MAMBA_OF_HYBRID,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"],
    },
    "nemotron_h": {
        **_LLAMA,
        "head_dim": 8,
        "layers_block_type": ["mamba", "attention", "mlp"],
        "num_hidden_layers": 3,
        "ssm_state_size": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "use_mamba_kernels": False,
    },
    "lfm2": {**_LLAMA, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "jamba": {
        **_LLAMA,
        **_MOE,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "rwkv": {**_LAYERS, "attention_hidden_size": 32, "intermediate_size": 48, "context_length": CONTEXT},
    "recurrent_gemma": {**_LLAMA, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "head_dim": 8},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**_LLAMA, **_MOE},
    "qwen2_moe": {**_LLAMA, **_SHARED_MOE},
    "qwen3_moe": {**_HEAD_DIM, **_MOE, "moe_intermediate_size": 24},
    "gpt_oss": {**_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "llama4_text": {
        **_HEAD_DIM,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 32,
    },
    "deepseek_v3": {
        **_LLAMA,
        **_LATENT_MOE,
        "first_k_dense_replace": 1,
    },
    "glm4_moe": {**_HEAD_DIM, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {**_HEAD_DIM, **_SHARED_MOE, **_LINEAR_ATTENTION, "num_hidden_layers": 4},
    "qwen3_5_text": _QWEN35,
    "hy_v4": {
        **_HEAD_DIM,
        **_LATENT_MOE,
        "index_n_heads": 4,
        "index_head_dim": 8,
        "index_topk": 4,
        "layer_types": ["indexed_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "laguna": {**_HEAD_DIM, **_SHARED_MOE, "sliding_window": 16},
    "granitemoe": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "bart": _DECODER,
    "roberta": _ENCODER,
    "bert": _ENCODER,
    "gemma3": {"text_config": _GEMMA, "vision_config": _VISION, "mm_tokens_per_image": 1},
    "qwen3_5": {"text_config": _QWEN35, "vision_config": _QWEN35_VISION},
    "qwen3_5_moe": {"text_config": {**_QWEN35, **_SHARED_MOE}, "vision_config": _QWEN35_VISION},
    "mistral3": {
        "text_config": {"model_type": "mistral", **_HEAD_DIM},
        "vision_config": {"model_type": "pixtral", **_VISION},
    },
    "gemma4": {
        "text_config": {
            **_HEAD_DIM,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "sliding_window": 16,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 320,
        },
        "vision_config": {**_VISION, "head_dim": 8, "num_key_value_heads": 2},
        "audio_config": None,
    },
}  # fmt: skip


def make_family(family: str, **changes: Any) -> PreTrainedModel:
    """Make a random model of a family, in evaluation mode."""
    torch.manual_seed(0)
    settings: Mapping[str, Any] = FAMILIES[family] | changes
    if "text_config" in settings:
        settings = {**settings, "text_config": {**_IDS, **settings["text_config"]}}
    config = AutoConfig.for_model(family, **{**_IDS, **settings})
    model = auto_class(config).from_config(config)
    with torch.no_grad():  # so that rounding does not decide greedy text
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "weight" in name:
                parameter.mul_(4)
    return cast(PreTrainedModel, model.eval())


def save_family(folder: Path, family: str, **changes: Any) -> Path:
    """Save a random model of a family with a tokenizer, as a folder that transformers loads."""
    make_family(family, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
