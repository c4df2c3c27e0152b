"""Write the hyperparameters of a model into a GGUF file: sizes, norms, rotary positions, windows.

llama.cpp takes its own default for each key that is missing, so every setting that counts is
written, even where transformers has it from a default of its own.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..adapters import llama_cpp
from ..adapters.llama_cpp import GgufArchitecture
from ..errors import EventHandler, Notice
from ..models.base_files import quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFWriter


def load_text_config(folder: Path) -> PretrainedConfig:
    """The settings of the text model in a folder, with all defaults: config.json may leave many out."""
    with quiet_transformers():
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    return config


def add_settings(
    writer: "GGUFWriter", architecture: GgufArchitecture, config: PretrainedConfig, notify: EventHandler
) -> None:
    """Add all hyperparameters but the size of the vocabulary."""
    heads, groups, size = llama_cpp.head_sizes(config.to_dict())
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context_length(architecture, config, notify))
    writer.add_embedding_length(config.hidden_size)
    inner = _first(config, "intermediate_size", "n_inner", "ffn_hidden_size")
    writer.add_feed_forward_length(inner or 4 * config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(size)
    writer.add_value_length(size)
    if (epsilon := _first(config, "rms_norm_eps")) is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    elif (epsilon := _first(config, "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")) is not None:
        writer.add_layer_norm_eps(epsilon)
    period = llama_cpp.window_period(config.to_dict()) or 1
    if architecture.windowed and period != 1:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(period)
    if getattr(config, "rope_parameters", None):
        _add_rope(writer, config, size)
    for name, add in {
        "use_parallel_residual": writer.add_parallel_residual,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
    }.items():
        if (value := getattr(config, name, None)) is not None:
            add(value)


def _first(config: PretrainedConfig, *names: str) -> Any:
    """The first of some settings that a config has."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def _context_length(architecture: GgufArchitecture, config: PretrainedConfig, notify: EventHandler) -> int:
    """Context length: no longer than a sliding window that llama.cpp does not have for this model,
    so that it computes the same at each position."""
    length = int(_first(config, "max_position_embeddings", "seq_length") or 2048)  # BLOOM names none
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if architecture.windowed or window is None or window >= length or "sliding_attention" not in kinds:
        return length
    notify(
        Notice(
            f"llama.cpp has no sliding window for {config.model_type} models: the context length "
            f"in the file is that of the window, {window:,} in place of {length:,}."
        )
    )
    return int(window)


def _add_rope(writer: "GGUFWriter", config: PretrainedConfig, size: int) -> None:
    from gguf import RopeScalingType

    rope = llama_cpp.rope_settings(config.to_dict())
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if local := config.rope_parameters.get("sliding_attention"):
        writer.add_rope_freq_base_swa(local["rope_theta"])
    original = _first(config, "original_max_position_embeddings")
    original = rope.get("original_max_position_embeddings", original or config.max_position_embeddings)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        _, scale = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(scale / (1 + 0.1 * math.log(rope["factor"])))
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)
    elif rope["rope_type"] == "longrope":
        _, scale = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(scale)


def rope_factors(config: PretrainedConfig) -> dict[str, NDArray[np.float32]]:
    """Divisors of the rotary frequencies, as tensors of the file: for Llama 3 and LongRoPE."""
    if not getattr(config, "rope_parameters", None):
        return {}
    rope = llama_cpp.rope_settings(config.to_dict())
    if rope["rope_type"] == "longrope":
        names = {"rope_factors_long": "long_factor", "rope_factors_short": "short_factor"}
        return {f"{name}.weight": np.array(rope[key], np.float32) for name, key in names.items()}
    if rope["rope_type"] != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = rope["rope_theta"] ** -(np.arange(len(scaled)) / len(scaled))
    return {"rope_freqs.weight": (plain / scaled.double().numpy()).astype(np.float32)}
