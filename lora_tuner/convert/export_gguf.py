"""An adapter in the format of another program: GGUF, as llama.cpp and Ollama read it.

Surprise: llama.cpp scales each layer by alpha over its own rank and knows no other scales, so scales that differ from
that go into the tensors. It also has Llama's q and k in another order of rows than transformers, and GPT-2's layers the
usual way round, as PEFT has them too. Limit: the kinds of base in `_KINDS`, on each of which this was proven.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import atomic_io
from ..adapters import compatibility
from ..adapters.adapter import Adapter, check_weights_hash
from ..config import ModelOptions
from ..errors import AdapterError, ConfigError
from ..models import loading, lora
from ..models.resolve import layer_sizes_in_files

_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "gpt2": "gpt2",
    "qwen2": "qwen2",
}  # model_type -> llama.cpp's name
PERMUTED_QK = ("llama",)  # those whose q and k llama.cpp stores in another order
_Array = np.ndarray[Any, np.dtype[np.float32]]
_ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class ExportResult:
    """`error` is the largest rounding error of a tensor, as a share of its largest number."""

    path: Path
    bytes: int
    tensors: int
    error: float


def to_gguf(
    adapter: Adapter,
    out: Path,
    *,
    dtype: str = "float16",
    overwrite: bool = False,
    options: ModelOptions = ModelOptions(),
) -> ExportResult:
    """Write the adapter as a GGUF LoRA. It is read back and compared. The base is not loaded: its files' headers are read.

    Raises AdapterError for DoRA, for a kind of base that is not known, for sizes that are not the base's, and for numbers
    that the dtype cannot hold.
    """
    import gguf

    options.require_default("device", "dtype", "load_in", why="the base is not loaded for an export")
    if out.exists() and not overwrite:
        raise AdapterError(f"{out} exists: choose another --out, or replace it with --overwrite.")
    if out.exists() and not _is_gguf(out):
        raise AdapterError(f"{out} is no GGUF file, so it is not replaced: choose another --out.")
    if why := atomic_io.why_not_writable(out.parent):
        raise AdapterError(f"{why}: choose another --out.")
    if obstacles := compatibility.check_compatibility(adapter, "llama.cpp").errors:
        raise AdapterError(f"{adapter.path}: {'; '.join(obstacles)}.")
    check_weights_hash(adapter)
    source = loading.base_for_adapter(adapter, options)
    lora.check_base_files(adapter, source, None, options)
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    kind = _ARCHITECTURES.get(str(config.get("model_type")))
    if kind is None:
        raise AdapterError(
            f"{source.name} is a {config.get('model_type')} model: adapters of {', '.join(_ARCHITECTURES)} can be exported. Merge it "
            f"(`python cli.py merge {adapter.name} --out merged/{adapter.name}`), and convert that with llama.cpp's own script."
        )
    if dtype not in _ROUNDING:
        raise ConfigError(f"dtype is {dtype}: {', '.join(_ROUNDING)} can be written.")
    adapter.check_shapes(layer_sizes_in_files(source, adapter))
    tensors = _tensors(adapter, kind, config)
    number = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    raw = gguf.GGMLQuantizationType[number]
    with atomic_io.atomic_file(out) as work:
        writer = gguf.GGUFWriter(work, kind)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _alpha(adapter))
        writer.add_name(adapter.name)
        for name, values in tensors.items():
            with np.errstate(over="ignore"):  # seen below, when it is read back
                writer.add_tensor(name, gguf.quants.quantize(values, raw), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        try:
            errors = [_error(tensors[it.name], it) for it in gguf.GGUFReader(work).tensors]
        except (ValueError, IndexError) as error:  # the writer does not notice all that a disk refuses
            raise AdapterError(
                f"{out} is not kept: the disk gave back less than was written. Free some space."
            ) from error
        if not all(error <= _ROUNDING[dtype] for error in errors):  # it may be no number
            raise AdapterError(
                f"{adapter.name} has numbers that {dtype} cannot hold: export it as bfloat16 or float32."
            )
    return ExportResult(out, out.stat().st_size, len(tensors), max(errors))


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _alpha(adapter: Adapter) -> float:
    """What llama.cpp divides by each layer's rank; 0 would mean a scale of 1 to it."""
    return float(adapter.config["lora_alpha"]) or 1.0


def _error(meant: _Array, tensor: Any) -> float:
    import gguf

    written = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(meant.shape)
    largest = float(np.abs(meant).max())
    return float(np.abs(written - meant).max()) / largest if largest else float(np.abs(written).max())


def _tensors(adapter: Adapter, kind: str, config: dict[str, Any]) -> dict[str, _Array]:
    """By llama.cpp's names, in float32: `lora_a` (rank, in), `lora_b` (out, rank)."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, config["n_layer"] if kind == "gpt2" else config["num_hidden_layers"])
    loaded = {name: tensor.float().numpy() for name, tensor in lora.read_weights_file(adapter).items()}
    tensors = {}
    for module in adapter.modules:
        name = names.get_name(module)
        if name is None:
            raise AdapterError(f"llama.cpp has no layer for {module}.")
        down, up = (loaded[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        up = up * np.float32(adapter.scale_of(module) * len(down) / _alpha(adapter))
        if kind in PERMUTED_QK and module.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads"]
            if module.endswith("k_proj"):
                heads = config.get("num_key_value_heads") or heads
            # Rotary pairs lie side by side in llama.cpp, half a head apart in transformers.
            up = up.reshape(heads, 2, len(up) // heads // 2, -1).swapaxes(1, 2).reshape(up.shape)
        tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"] = down, np.ascontiguousarray(up)
    return tensors
