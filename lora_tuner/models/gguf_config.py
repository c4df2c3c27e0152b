"""Settings of a GGUF file that transformers leaves at the defaults of a model type.

transformers 5.23 copies a list of settings for each architecture (integrations/ggml.py). Others
change the results too: sizes of heads and experts, windows, caps, rotary positions. They are set
here, by the meaning that they have in llama.cpp (its src/llama-model.cpp and src/models, of
November 2026). A setting that neither of the two reads is an error, never a default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import BaseModelError

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor
    from transformers import PreTrainedConfig

Metadata = Mapping[str, Any]  # of a GGUF file: numbers, texts, flags or lists of them, by name
SOURCE_FILE = "source.txt"  # in a converted folder: the path of the GGUF file
# Tensors that are settings: scales of rotary positions.
_LLAMA3_FACTORS, _LONG_FACTORS, _SHORT_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
TENSORS_IN_CONFIG = (_LLAMA3_FACTORS, _LONG_FACTORS, _SHORT_FACTORS)
# Setting in the file -> in a config, by the first of these names that it has.
_COPIED = {
    "context_length": ("max_position_embeddings",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "logit_scale": ("logit_scale",),
    "use_parallel_residual": ("use_parallel_residual",),
}
# Tensor of a block that some models have -> the setting that says so.
_BIASES = {"attn_q.bias": "attention_bias", "ffn_down.bias": "mlp_bias"}
# Read below, or of no effect beside the sizes of the tensors.
_ACCOUNTED = frozenset((
    "vocab_size", "block_count", "embedding_length", "feed_forward_length", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.value_length", "attention.causal",
    "attention.sliding_window_pattern", "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa",
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
))  # fmt: skip
# Number of layers of the models whose attention is scaled by width / heads, not by the head size.
_SCALED_BY_WIDTH = (("gemma2", 46), ("gemma3", 62))
_LLAMA3_RANGE = (1.0, 4.0)  # low and high frequency factor of every Llama since 3.1
_LLAMA3_CONTEXT = 8192
_TOLERANCE = 1e-3


def complete(
    config: PreTrainedConfig, path: Path, metadata: Metadata, tensors: Mapping[str, ReaderTensor]
) -> None:
    """Set in a config, as transformers made it from a file, the settings that it lacks.

    Args:
        tensors: those of the file, as the package gguf reads them, by name.

    Raises:
        BaseModelError: a setting has no place in the config.
    """
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    architecture = str(metadata["general.architecture"])
    if architecture in GGUF_CONFIG_ARCHS:  # read in full
        return
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if unknown := sorted(values.keys() - _COPIED.keys() - _ACCOUNTED - _copied_by_transformers(config)):
        raise _unread(path, prefix + unknown[0], values[unknown[0]])
    heads = getattr(config, "num_attention_heads", None)
    width = config.hidden_size // heads if heads else 0
    for key, names in _COPIED.items():
        if (value := values.get(key)) is None:
            continue
        if name := next((name for name in names if hasattr(config, name)), None):
            if getattr(config, name) != value:  # some are computed from others
                setattr(config, name, value)
        elif key == "context_length" or (key == "attention.key_length" and value == width):
            pass  # positions without a table have no limit
        elif value:
            raise _unread(path, prefix + key, value)
    head_size = getattr(config, "head_dim", None) or width
    if (value := values.get("attention.value_length", head_size)) != head_size:
        raise _unread(path, f"{prefix}attention.value_length", value)
    if values.get("attention.causal") is False:
        raise BaseModelError(f"{path} is a model whose attention looks ahead, so it is no causal language model.")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, metadata.get(f"tokenizer.ggml.{name.replace('pad_', 'padding_')}"))
    for ending, name in _BIASES.items():
        if hasattr(config, name) and any(tensor.endswith(ending) for tensor in tensors):
            setattr(config, name, True)
    _set_feed_forward(config, values.get("feed_forward_length"))
    if hasattr(config, "query_pre_attn_scalar"):
        by_width = (architecture, values.get("block_count")) in _SCALED_BY_WIDTH
        config.query_pre_attn_scalar = width if by_width else head_size
    _set_pattern(config, values.get("attention.sliding_window_pattern"))
    if rope := getattr(config, "rope_parameters", None):
        _set_rope(config, rope, path, prefix, values, tensors, head_size)
    config.architectures = None  # written on saving


def _copied_by_transformers(config: PreTrainedConfig) -> set[str]:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    kind = config.model_type.removesuffix("_text")
    names = cast(dict[str, dict[str, str | None]], GGUF_CONFIG_MAPPING).get(kind, {})
    return {key for key, name in names.items() if name is not None}


def _unread(path: Path, setting: str, value: object) -> BaseModelError:
    return BaseModelError(
        f"{path} cannot be read in full: transformers has no place for its setting {setting} = "
        f"{value}. Use the model that it was made from."
    )


def _set_feed_forward(config: PreTrainedConfig, size: object) -> None:
    """Set the width of the hidden layer; one for each block is left to the check of shapes."""
    for name in ("intermediate_size", "n_inner"):
        if isinstance(size, int) and hasattr(config, name):
            setattr(config, name, size)


def _set_pattern(config: PreTrainedConfig, pattern: list[bool] | int | None) -> None:
    """Set which layers attend to a window: one flag for each, or each n-th does not."""
    if pattern is None or not hasattr(config, "layer_types"):
        return
    count = config.num_hidden_layers
    flags = pattern if isinstance(pattern, list) else [bool((layer + 1) % pattern) for layer in range(count)]
    config.layer_types = ["sliding_attention" if flag else "full_attention" for flag in flags[:count]]


def _set_rope(
    config: PreTrainedConfig,
    rope: dict[str, Any],
    path: Path,
    prefix: str,
    values: Metadata,
    tensors: Mapping[str, ReaderTensor],
    head_size: int,
) -> None:
    """Set the rotary positions. Layers with a window have their own, which are not scaled."""
    full = rope.get("full_attention", rope)
    if (base := values.get("rope.freq_base")) is not None:
        full["rope_theta"] = float(base)
    if (base := values.get("rope.freq_base_swa")) is not None and "sliding_attention" in rope:
        rope["sliding_attention"]["rope_theta"] = float(base)
    rotated = values.get("rope.dimension_count", head_size)
    if rotated != head_size or "partial_rotary_factor" in full:
        if "partial_rotary_factor" not in full and not hasattr(config, "partial_rotary_factor"):
            raise _unread(path, f"{prefix}rope.dimension_count", rotated)
        full["partial_rotary_factor"] = rotated / head_size
    kind, factor = values.get("rope.scaling.type", "none"), values.get("rope.scaling.factor")
    factor = factor or values.get("rope.scale_linear")
    original = values.get("rope.scaling.original_context_length")
    if _LLAMA3_FACTORS in tensors:
        factors = tensors[_LLAMA3_FACTORS].data.tolist()
        if (settings := _llama3_settings(factors, full["rope_theta"], original)) is None:
            raise _unread(path, _LLAMA3_FACTORS, "of an unknown form")
        full |= settings
    elif _LONG_FACTORS in tensors and _SHORT_FACTORS in tensors:
        original = original or config.max_position_embeddings
        full |= {
            "rope_type": "longrope",
            "long_factor": tensors[_LONG_FACTORS].data.tolist(),
            "short_factor": tensors[_SHORT_FACTORS].data.tolist(),
            "original_max_position_embeddings": original,
        }
        config.original_max_position_embeddings = original
    elif kind == "yarn" and factor and original:
        full |= {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original}
        for name in ("beta_fast", "beta_slow"):
            if (value := values.get(f"rope.scaling.yarn_{name}")) is not None:
                full[name] = float(value)
    elif kind == "linear" or (kind == "none" and factor not in (None, 0, 1)):
        full |= {"rope_type": "linear", "factor": float(factor or 1)}
    elif kind not in ("none", "linear"):
        raise _unread(path, f"{prefix}rope.scaling.type", kind)
    attention = float(values.get("rope.scaling.attn_factor", 1))
    if full.get("rope_type") == "longrope":
        full["attention_factor"] = attention
    elif full.get("rope_type") == "yarn":  # llama.cpp multiplies with YaRN's own
        full["attention_factor"] = attention * (1 + 0.1 * math.log(full["factor"]))
    elif attention != 1:
        raise _unread(path, f"{prefix}rope.scaling.attn_factor", attention)


def _llama3_settings(factors: list[float], theta: float, original: int | None) -> dict[str, object] | None:
    """The settings of Llama 3's rotary positions that lead to these factors; None if none do.

    A frequency is divided by 1 where its waves are short, by the largest factor where they are
    long, and by a mean of the two between (transformers, modeling_rope_utils.py; llama.cpp stores
    the divisors alone)."""
    low, high = _LLAMA3_RANGE
    largest, count = max(factors), len(factors)
    waves = [2 * math.pi * theta ** (index / count) for index in range(count)]
    if largest <= 1:
        return {} if all(abs(factor - 1) < _TOLERANCE for factor in factors) else None
    if original is None:
        between = [
            index for index, factor in enumerate(factors) if 1 + _TOLERANCE < factor < largest - _TOLERANCE
        ]
        if between:
            smooth = (1 / factors[between[0]] - 1 / largest) / (1 - 1 / largest)
            original = round(waves[between[0]] * (smooth * (high - low) + low))
        else:  # any length does, if its waves are between those of the two factors
            original = min(_LLAMA3_CONTEXT, round(waves[factors.index(largest)] * low))
    for wave, factor in zip(waves, factors, strict=True):
        smooth = min(max((original / wave - low) / (high - low), 0.0), 1.0)
        expected = 1 / ((1 - smooth) / largest + smooth)
        if abs(expected / factor - 1) > _TOLERANCE:
            return None
    return {
        "rope_type": "llama3",
        "factor": float(largest),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
