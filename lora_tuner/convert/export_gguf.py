"""Export an adapter as a GGUF LoRA for llama.cpp and Ollama.

llama.cpp scales each layer by alpha / rank, so other scales are multiplied into the tensors. The
names of layers and the order of their rows come from the table in `adapters.llama_cpp`, as for
whole models (`gguf_model`); each architecture there is tested in llama.cpp.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import atomic_io
from ..adapters import llama_cpp
from ..adapters.adapter import Adapter
from ..config import ModelOptions
from ..data.chat_template import turn_end_ids
from ..errors import AdapterError, ConfigError
from ..models import lora
from ..models.base_files import loading_errors
from ..models.tokenizer import TokenizedBase, load_adapter_tokenizer
from . import gguf_settings
from .common import base_for_export, check_output_path, is_gguf

if TYPE_CHECKING:
    from gguf import ReaderTensor

_ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative error
_Array = NDArray[np.float32]
_GGUF_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class ExportResult:
    """The exported file.

    Args:
        path: the file.
        bytes: its size.
        tensors: number of tensors in it.
        error: largest rounding error, relative to a tensor's maximum.
        turn_end: the token that ends an answer, where that is not the end of text of the base; it
            is `tokenizer.ggml.eot_token_id` in the file.
        turn_end_id: its id.
    """

    path: Path
    bytes: int
    tensors: int
    error: float
    turn_end: str | None
    turn_end_id: int | None

    @property
    def modelfile(self) -> str:
        """Modelfile for Ollama, with the base as `base.gguf`."""
        lines = ["FROM ./base.gguf", f"ADAPTER ./{self.path.name}"]
        if self.turn_end is not None:
            lines.append(stop_instruction(self.turn_end))
        return "\n".join(lines) + "\n"


def stop_instruction(text: str) -> str:
    """Line of a Modelfile that ends answers at a text. Ollama takes quotation marks off, and
    unescapes nothing (ollama/ollama, parser/parser.go: unquote)."""
    quotes = '"""' if '"' in text else '"'
    return f"PARAMETER stop {quotes}{text}{quotes}"


def to_gguf(
    adapter: Adapter,
    out: Path,
    *,
    dtype: str = "float16",
    overwrite: bool = False,
    options: ModelOptions = ModelOptions(),
) -> ExportResult:
    """Write the adapter as a GGUF LoRA, read it back and compare it. The base's weights are not
    loaded.

    Raises AdapterError for DoRA, for an unsupported architecture, for a base of other sizes, and
    for values out of the range of the dtype.
    """
    import gguf

    options.require_default("device", "dtype", "load_in", why="the base is not loaded for an export")
    check_output_path(out, "GGUF file", valid=is_gguf(out), overwrite=overwrite)
    if dtype not in _ROUNDING:
        raise ConfigError(f"dtype is {dtype}: use one of {', '.join(_ROUNDING)}.")
    base = base_for_export(adapter, out, "gguf", options)
    architecture = llama_cpp.ARCHITECTURES[base.files.config()["model_type"]]
    with loading_errors(base.files):
        text_config = gguf_settings.load_text_config(base.files.folder)
    tensors = _gguf_tensors(adapter, architecture, text_config.to_dict())
    turn_end, turn_end_id = find_turn_end(adapter, base, options)
    gguf_type = gguf.GGMLQuantizationType[_GGUF_TYPES[dtype]]
    with atomic_io.atomic_file(out) as file:
        writer = gguf.GGUFWriter(file, architecture.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _gguf_alpha(adapter))
        writer.add_name(adapter.name)
        if turn_end_id is not None:  # llama.cpp reads it in the base, where --override-kv can put it
            writer.add_eot_token_id(turn_end_id)
        for name, values in tensors.items():
            with np.errstate(over="ignore"):  # checked below, on the file
                writer.add_tensor(name, gguf.quants.quantize(values, gguf_type), raw_dtype=gguf_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        try:
            rounding_errors = [
                _rounding_error(tensors[tensor.name], tensor) for tensor in gguf.GGUFReader(file).tensors
            ]
        except (ValueError, IndexError) as error:  # the writer does not report every failed write
            raise AdapterError(f"{out} is not kept: the file is incomplete on disk. Free some space.") from error
        if not all(error <= _ROUNDING[dtype] for error in rounding_errors):  # NaN fails too
            raise AdapterError(f"{adapter.name} has values out of the range of {dtype}: use bfloat16 or float32.")
    size = out.stat().st_size
    return ExportResult(out, size, len(tensors), max(rounding_errors), turn_end, turn_end_id)


def find_turn_end(adapter: Adapter, base: TokenizedBase, options: ModelOptions) -> tuple[str | None, int | None]:
    """The token that ends an answer, and its id; None where it is the end of text of the base."""
    tokenizer = load_adapter_tokenizer(adapter, base, options) or base.tokenizer
    ends = turn_end_ids(tokenizer) | {tokenizer.eos_token_id}
    other = sorted(ends - {base.tokenizer.eos_token_id})
    return (str(tokenizer.convert_ids_to_tokens(other[0])), other[0]) if other else (None, None)


def _gguf_alpha(adapter: Adapter) -> float:
    """The alpha that llama.cpp divides by each layer's rank. It would read 0 as a scale of 1."""
    return float(adapter.config["lora_alpha"]) or 1.0


def _rounding_error(exact: _Array, tensor: "ReaderTensor") -> float:
    """Largest error of a tensor in the file, relative to its largest value."""
    import gguf

    written = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(exact.shape)
    largest = float(np.abs(exact).max())
    return float(np.abs(written - exact).max()) / largest if largest else float(np.abs(written).max())


def _gguf_tensors(
    adapter: Adapter, architecture: llama_cpp.GgufArchitecture, config: llama_cpp.Config
) -> dict[str, _Array]:
    """Tensors under llama.cpp's names, in float32: `lora_a` (rank, in), `lora_b` (out, rank)."""
    names = architecture.tensor_names(config)
    weights = {name: tensor.float().numpy() for name, tensor in lora.read_weights_file(adapter).items()}
    tensors: dict[str, _Array] = {}
    for module in adapter.modules:
        name = llama_cpp.tensor_name(names, module)
        if name is None:
            raise AdapterError(f"llama.cpp has no layer for {module}.")
        lora_a, lora_b = (weights[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        lora_b = lora_b * np.float32(adapter.scale_of(module) * len(lora_a) / _gguf_alpha(adapter))
        order = architecture.row_order(module, config)
        lora_b = np.ascontiguousarray(lora_b if order is None else lora_b[order])
        tensors |= {f"{name}.weight.lora_a": lora_a, f"{name}.weight.lora_b": lora_b}
    return tensors
