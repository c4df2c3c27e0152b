"""Architectures that are exported to GGUF: names, layers, order of rows, settings.

One table for adapters and for whole models. Each entry is tested in llama.cpp itself on a random
model (`tests/convert/test_gguf_architectures.py`). llama.cpp reads settings that a file lacks as
its defaults, and has no place for some: a model with such settings is refused by name. The rules
come from llama.cpp's sources of November 2026 (`conversion/*.py`, `src/models/*.cpp`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gguf import TensorNameMap

Config = Mapping[str, Any]  # config.json of a base, or the settings of its text model with all defaults
Settings = Mapping[str, tuple[object, ...]]
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FUSED = ("query_key_value", "dense")  # of attention
_FOUR = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture of llama.cpp, for one model type of transformers.

    Args:
        name: `general.architecture`.
        layers: linear layers of a block, by their names in transformers.
        settings: setting of the config -> the values that llama.cpp computes.
        blocks: name of the list of blocks in transformers.
        rotary: layers whose rows llama.cpp has in another order: rotary pairs are adjacent there,
            half a head apart in transformers.
        fused: layer whose rows are query, key and value of each head in transformers, and all
            queries, all keys, all values in llama.cpp.
        transposed: weights are stored (in, out).
        norm_offset: added to the weights of norms.
        rope: types of rotary positions that are computed.
        windowed: attention is limited to the sliding window, in the layers that have one.
        any_head_size: a head may have another size than hidden size / heads.
        wide_scale_at: number of layers at which llama.cpp scales attention by hidden size / heads
            in place of the size of a head; None where it reads no such setting.
        defaults: settings that a config.json may leave out, by the defaults of transformers.
    """

    name: str
    layers: tuple[str, ...]
    settings: Settings = field(default_factory=dict)
    blocks: str = "model.layers"
    rotary: tuple[str, ...] = ()
    fused: str = ""
    transposed: bool = False
    norm_offset: float = 0.0
    rope: tuple[str, ...] = ("default", "linear", "yarn")
    windowed: bool = False
    any_head_size: bool = True
    wide_scale_at: int | None = None
    defaults: Config = field(default_factory=dict)

    @cached_property
    def _layer_pattern(self) -> re.Pattern[str]:
        names = "|".join(re.escape(layer) for layer in self.layers)
        return re.compile(rf"{re.escape(self.blocks)}\.\d+\.({names})")

    def has_layer(self, module: str) -> bool:
        """Check that a linear layer, by its full name, has a place in llama.cpp."""
        return self._layer_pattern.fullmatch(module.replace("language_model.", "")) is not None

    def tensor_names(self, config: Config) -> "TensorNameMap":
        """The names of llama.cpp for the tensors of a model."""
        import gguf

        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        return gguf.get_tensor_name_map(number, int(config.get("num_hidden_layers") or config["n_layer"]))

    def row_order(self, module: str, config: Config) -> NDArray[np.intp] | None:
        """Rows of a layer's weight and bias in the order of llama.cpp; None if that is the same."""
        heads, groups, size = head_sizes(config)
        if module.endswith(self.rotary):
            count = groups if module.endswith("k_proj") else heads
            return np.arange(count * size).reshape(count, 2, size // 2).swapaxes(1, 2).reshape(-1)
        if self.fused and module.endswith(self.fused):
            rows = np.arange((heads + 2 * groups) * size).reshape(groups, heads // groups + 2, size)
            parts = (rows[:, :-2], rows[:, -2], rows[:, -1])
            return np.concatenate([part.reshape(-1) for part in parts])
        return None


def _rotary(
    name: str, settings: Settings, rope: tuple[str, ...] = ("default", "linear", "yarn")
) -> GgufArchitecture:
    return GgufArchitecture(name, _GATED, settings, rotary=("q_proj", "k_proj"), rope=rope)


def _gemma(name: str, settings: Settings, wide_scale_at: int | None) -> GgufArchitecture:
    windowed = wide_scale_at is not None
    activation = {"hidden_act": _TANH_GELU, "hidden_activation": (*_TANH_GELU, None)}
    settings = {**activation, "attention_bias": (False,), "tie_word_embeddings": (True,), **settings}
    return GgufArchitecture(
        name,
        _GATED,
        settings,
        norm_offset=1.0,
        rope=("default", "linear"),
        windowed=windowed,
        wide_scale_at=wide_scale_at,
        defaults={"head_dim": 256, "num_attention_heads": 8, "query_pre_attn_scalar": 256},
    )


_LLAMA_ROPE = ("default", "linear", "llama3", "yarn", "longrope")
_SILU: dict[str, tuple[object, ...]] = {"hidden_act": ("silu", "swish")}
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_GELU = (*_TANH_GELU, "gelu")  # llama.cpp computes the approximation by tanh; it differs by 5e-4 at most
_GIVEN = (float,)  # any number, but not None
_UNTIED: dict[str, tuple[object, ...]] = {"tie_word_embeddings": (False,)}
_NO_BIAS: dict[str, tuple[object, ...]] = {"attention_bias": (False,)}
_GEMMA3 = _gemma(
    "gemma3",
    {
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    62,
)
# model_type -> architecture
ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": _rotary("llama", _SILU, _LLAMA_ROPE),
    "mistral": _rotary("llama", _SILU, _LLAMA_ROPE),
    "gpt2": GgufArchitecture(
        "gpt2",
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        {
            "activation_function": _GELU,
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        blocks="transformer.h",
        transposed=True,
    ),
    "qwen2": GgufArchitecture("qwen2", _GATED, _SILU, any_head_size=False),
    "qwen3": GgufArchitecture("qwen3", _GATED, _SILU | _NO_BIAS),
    "gemma": _gemma("gemma", {}, None),
    "gemma2": _gemma("gemma2", {"attn_logit_softcapping": _GIVEN, "final_logit_softcapping": _GIVEN}, 46),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "phi3": GgufArchitecture(
        "phi3",
        ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        _SILU,
        rope=("default", "longrope"),
        any_head_size=False,
    ),
    "olmo2": GgufArchitecture("olmo2", _GATED, _SILU | _NO_BIAS | _UNTIED, any_head_size=False),
    "smollm3": _rotary("smollm3", _SILU),
    "granite": _rotary("granite", _SILU, ("default", "linear", "llama3", "yarn")),
    "starcoder2": GgufArchitecture(
        "starcoder2",
        (*_ATTENTION, "mlp.c_fc", "mlp.c_proj"),
        {"hidden_act": _GELU, "use_bias": (True,)},
        any_head_size=False,
    ),
    "stablelm": GgufArchitecture(
        "stablelm", _GATED, _SILU | _UNTIED | {"qk_layernorm": (False,)}, any_head_size=False
    ),
    "glm4": GgufArchitecture("glm4", (*_ATTENTION, "mlp.gate_up_proj", "mlp.down_proj"), _SILU),
    "gpt_neox": GgufArchitecture(
        "gptneox",
        (*(f"attention.{name}" for name in _FUSED), *_FOUR),
        {"hidden_act": _GELU, "attention_bias": (True,)} | _UNTIED,
        blocks="gpt_neox.layers",
        fused=_FUSED[0],
        any_head_size=False,
    ),
    "bloom": GgufArchitecture(
        "bloom",
        (*(f"self_attention.{name}" for name in _FUSED), *_FOUR),
        {"apply_residual_connection_post_layernorm": (False,)},
        blocks="transformer.h",
        fused=_FUSED[0],
        any_head_size=False,
    ),
    "falcon": GgufArchitecture(
        "falcon",
        (*(f"self_attention.{name}" for name in _FUSED), *_FOUR),
        {"activation": _GELU, "alibi": (False,), "bias": (False,), "parallel_attn": (True,)},
        blocks="transformer.h",
        fused=_FUSED[0],
        any_head_size=False,
    ),
}


def find_architecture(config: Config) -> GgufArchitecture | None:
    """The architecture of a base, by its config.json; None if it is not exported."""
    return ARCHITECTURES.get(str(config.get("model_type")))


def unknown_type(config: Config) -> str:
    """Reason why a model of another type is not exported, from its config.json."""
    return f"{config.get('model_type')} models are not exported, only those of {', '.join(ARCHITECTURES)}"


def tensor_name(names: "TensorNameMap", module: str) -> str | None:
    """The name of a module's tensors in llama.cpp; None if it has no place for them."""
    # Parts of a text model in a model of text and images; names of BLOOM in the table have no prefix.
    module = module.replace("language_model.", "")
    return names.get_name(module) or names.get_name(module.removeprefix("transformer."))


def has_sizes(config: Config) -> bool:
    """True where a config tells the width and the number of heads; a config.json may not."""
    return bool(config.get("hidden_size") or config.get("n_embd")) and bool(
        config.get("num_attention_heads") or config.get("n_head")
    )


def hidden_size(config: Config) -> int:
    """Width of the model."""
    return int(config.get("hidden_size") or config["n_embd"])


def head_sizes(config: Config) -> tuple[int, int, int]:
    """Numbers of query heads and of key heads, and the size of a head."""
    heads = int(config.get("num_attention_heads") or config["n_head"])
    width = hidden_size(config)
    groups = int(config.get("num_key_value_heads") or heads)
    if config.get("model_type") == "falcon":
        several = int(config.get("num_kv_heads") or heads) if config.get("new_decoder_architecture") else heads
        groups = 1 if config.get("multi_query", True) and not config.get("new_decoder_architecture") else several
    return heads, groups, int(config.get("head_dim") or width // heads)


def model_problems(architecture: GgufArchitecture, config: Config) -> list[str]:
    """Reasons why a model cannot be written as GGUF, from the settings of its text model; those
    that are left out are taken to be computed, as all defaults of transformers are."""
    problems = [
        f"{name} = {config[name]}"
        for name, values in architecture.settings.items()
        if name in config and config[name] not in values and not (values == _GIVEN and config[name])
    ]
    if (kind := rope_settings(config)["rope_type"]) not in architecture.rope:
        problems.append(f"rotary positions of the type {kind}")
    if architecture.windowed and (kind := rope_settings(config, "sliding_attention")["rope_type"]) != "default":
        problems.append(f"rotary positions of the type {kind} in sliding windows")
    if has_sizes(config):
        problems += _size_problems(architecture, config)
    if architecture.windowed and window_period(config) is None:
        problems.append(f"layer_types = {', '.join(config['layer_types'])}")
    if "no_rope_layers" in config and config["no_rope_layers"] != _rope_layers(config):
        problems.append(f"no_rope_layers = {config['no_rope_layers']}")
    return [f"llama.cpp's {architecture.name} does not compute {problem}" for problem in problems]


def _size_problems(architecture: GgufArchitecture, config: Config) -> list[str]:
    heads, _, size = head_sizes(config)
    width, problems = hidden_size(config), []
    if not architecture.any_head_size and heads * size != width:
        problems.append(f"head_dim = {size} with {heads} heads and hidden_size = {width}")
    if architecture.wide_scale_at is not None:
        scale = width // heads if config.get("num_hidden_layers") == architecture.wide_scale_at else size
        if config.get("query_pre_attn_scalar", scale) != scale:
            problems.append(f"query_pre_attn_scalar = {config['query_pre_attn_scalar']}, only {scale}")
    return problems


def _rope_layers(config: Config) -> list[int]:
    """SmolLM3's layers with rotary positions: all but each fourth."""
    return [int((layer + 1) % 4 != 0) for layer in range(len(config["no_rope_layers"]))]


def window_period(config: Config) -> int | None:
    """The period at which a layer has no sliding window; None where there is none.

    A period of 1 stands for no window at all, one beyond the number of layers for one in each.
    """
    types = config.get("layer_types") or []
    for period in range(1, len(types) + 2):
        if types == ["sliding_attention" if (at + 1) % period else "full_attention" for at in range(len(types))]:
            return period
    return None


def rope_settings(config: Config, attention: str = "full_attention") -> Config:
    """Settings of the rotary positions, of one kind of attention where the kinds differ."""
    settings: Config = config.get("rope_parameters") or {}
    return {"rope_type": "default", **settings.get(attention, settings)}
