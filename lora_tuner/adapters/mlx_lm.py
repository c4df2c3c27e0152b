"""Names of layers in mlx-lm, by model type of transformers, and the config of its adapters.

From mlx-lm 0.32.2: `mlx_lm/models/*.py` (layers and their names), `mlx_lm/utils.py` (model types,
`MODEL_REMAPPING`) and `mlx_lm/tuner/utils.py` (`linear_to_lora_layers`, `load_adapters`). Each
entry is tested in mlx-lm itself on a random model (`tests/convert/test_export_mlx.py`). Models of
which mlx-lm changes weights on loading are left out, as are layers that it divides.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_SHARED = tuple(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down"))
_LINEAR_ATTENTION = tuple(f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj"))
_EXPERTS = {"mlp.experts.gate_up_proj": ("gate_proj", "up_proj"), "mlp.experts.down_proj": ("down_proj",)}
_TEXT_PARTS = re.compile(r"language_model\.")  # in the names of a wrapper's layers


Place = tuple[int, str] | None  # number of a block and name in it; None for a layer outside of blocks


@dataclass(frozen=True)
class MlxModel:
    """Layers that mlx-lm can adapt in models of one type.

    Args:
        layers: linear layers of a block, by the names that transformers and mlx-lm have for them.
        blocks: name of the list of blocks in the text model of transformers.
        mlx_blocks: its name in mlx-lm.
        head: name of the output head in mlx-lm, where that is not tied to the embeddings.
        nested_rope: reads `rope_parameters` of config.json, as transformers 5 writes it.
        experts: name in a block of mlx-lm of the experts, which are `mlp.experts` in transformers.
        interleaved: the rows of gate and up alternate in the experts of transformers.
    """

    layers: tuple[str, ...]
    blocks: str = "model.layers"
    mlx_blocks: str = "model.layers"
    head: str = "lm_head"
    nested_rope: bool = False
    experts: str = ""
    interleaved: bool = False

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        names = "|".join(map(re.escape, (*self.layers, *(_EXPERTS if self.experts else ()))))
        return re.compile(rf"{re.escape(self.blocks)}\.(\d+)\.({names})")

    def layers_of(self, module: str) -> dict[str, Place]:
        """Full name in mlx-lm -> place, for the layers that an adapted layer of transformers is;
        empty if there is none. The experts' gate_up_proj is two of them."""
        module = _TEXT_PARTS.sub("", module)
        if module == "lm_head":
            return {self.head: None} if self.head else {}
        if (match := self._pattern.fullmatch(module)) is None:
            return {}
        layer = match[2]
        names = [f"{self.experts}.{part}" for part in _EXPERTS[layer]] if layer in _EXPERTS else [layer]
        return {f"{self.mlx_blocks}.{match[1]}.{name}": (int(match[1]), name) for name in names}


def _wrapper(layers: tuple[str, ...], *, nested_rope: bool = False) -> MlxModel:
    return MlxModel(
        layers,
        mlx_blocks="language_model.model.layers",
        head="language_model.lm_head",
        nested_rope=nested_rope,
    )


_PLAIN = MlxModel(_GATED)
_SWITCH, _SPARSE = "mlp.switch_mlp", "block_sparse_moe.switch_mlp"
MODELS: dict[str, MlxModel] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3"), _PLAIN),
    **dict.fromkeys(("granite", "stablelm", "cohere", "cohere2"), _PLAIN),
    "qwen3": MlxModel(_GATED, nested_rope=True),
    "phi3": MlxModel(_FUSED),
    "glm4": MlxModel((*_ATTENTION, "mlp.gate_up_proj", "mlp.down_proj")),
    "phi": MlxModel((*_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")),
    "starcoder2": MlxModel((*_ATTENTION, "mlp.c_fc", "mlp.c_proj")),
    "gpt2": MlxModel(_CONV1D, "transformer.h", "model.h", head=""),
    "gpt_bigcode": MlxModel(_CONV1D, "transformer.h", "transformer.h"),
    "gptj": MlxModel(
        (*(f"attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc_in", "mlp.fc_out"),
        "transformer.h",
        "model.h",
    ),
    "gpt_neox": MlxModel(
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        "gpt_neox.layers",
        "model.h",
        head="",
    ),
    "mamba": MlxModel(("mixer.in_proj", "mixer.x_proj"), "backbone.layers", "backbone.layers"),
    **dict.fromkeys(("mixtral", "phimoe"), MlxModel(_ATTENTION, experts=_SPARSE)),
    "granitemoe": MlxModel(_ATTENTION),
    "gpt_oss": MlxModel(_ATTENTION, experts="mlp.experts", interleaved=True),
    "olmoe": MlxModel(_ATTENTION, experts=_SWITCH),
    "qwen3_moe": MlxModel(_GATED, experts=_SWITCH),
    "qwen2_moe": MlxModel((*_GATED, *_SHARED), experts=_SWITCH),
    "deepseek_v3": MlxModel(
        (
            *(f"self_attn.{name}" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")),
            *(f"{part}.{name}_proj" for part in ("mlp", "mlp.shared_experts") for name in ("gate", "up", "down")),
        ),
        experts=_SWITCH,
    ),
    "gemma3": _wrapper(_GATED),
    "mistral3": _wrapper(_GATED, nested_rope=True),
    "qwen3_5": _wrapper(
        (*_GATED, *_LINEAR_ATTENTION, "linear_attn.in_proj_b", "linear_attn.in_proj_a"), nested_rope=True
    ),
}


def lora_config(layers: Mapping[str, Place], blocks: int, parameters: Mapping[str, float]) -> dict[str, object]:
    """`num_layers` and `lora_parameters` of adapter_config.json.

    `num_layers` counts blocks from the last one, and `keys` are names in a block. mlx-lm compares
    them with the full names of layers as well, which name any other choice of layers.

    Args:
        layers: full name in mlx-lm -> place, of all adapted layers.
        blocks: number of blocks in the model, 0 where that is unknown.
        parameters: rank, scale and dropout.
    """
    by_block: dict[int, set[str]] = {}
    for place in layers.values():
        if place is not None:
            by_block.setdefault(place[0], set()).add(place[1])
    adapted = sorted(by_block)
    blocks = blocks or max(adapted, default=0) + 1
    is_regular = adapted == list(range(blocks - len(adapted), blocks))
    is_regular = is_regular and all(found == by_block[adapted[0]] for found in by_block.values())
    keys = {place[1] if is_regular and place is not None else name for name, place in layers.items()}
    return {
        "num_layers": len(adapted) if is_regular else blocks,
        "lora_parameters": {**parameters, "keys": sorted(keys)},
    }
