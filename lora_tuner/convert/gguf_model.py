"""Write a model folder as one GGUF file for llama.cpp: weights, settings, tokenizer, template.

Tensors are read, changed and written one at a time, so the memory needed is that of the largest.
The architectures are those of `adapters.llama_cpp`; whatever llama.cpp would not compute as
transformers does is refused by name. Vectors and position embeddings stay in float32, as in
llama.cpp's own converter.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PretrainedConfig

from .. import atomic_io
from ..adapters import llama_cpp
from ..adapters.llama_cpp import GgufArchitecture
from ..errors import BaseModelError, ConfigError, EventHandler, Notice, ignore_events
from ..models.base_files import quiet_transformers
from ..models.stored_weights import read_stored_tensors, weight_files
from . import gguf_settings
from .gguf_tokenizer import add_tokenizer, model_name, tokenizer_spec

GGUF_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TENSOR_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}
_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
}
# Tensors of old checkpoints that are computed from the config, and parts that are not text.
_COMPUTED = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its name, shape, and the function that reads it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    def stored_dtype(self, dtype: str) -> torch.dtype:
        """Dtype in the file: for matrices the one that is asked for."""
        is_matrix = len(self.shape) > 1 and self.name != "position_embd.weight"
        return GGUF_DTYPES[dtype] if is_matrix else torch.float32


def write_model_gguf(
    folder: Path,
    out: Path,
    dtype: str = "float16",
    *,
    name: str | None = None,
    notify: EventHandler = ignore_events,
) -> None:
    """Write a model folder of transformers as one GGUF file, which appears complete or not at all.

    Args:
        folder: the model: config.json, safetensors weights, tokenizer.
        out: the file to write; one that exists is replaced.
        dtype: dtype of the matrices: float32, float16 or bfloat16.
        name: name of the model in the file; None means that of the folder.
        notify: gets a notice for each thing that llama.cpp does otherwise.

    Raises:
        BaseModelError: llama.cpp does not compute such a model, or has no such tokenizer, or values
            are out of the range of the dtype.
        ConfigError: the dtype is unknown.
    """
    if dtype not in GGUF_DTYPES:
        raise ConfigError(f"dtype is {dtype}: use one of {', '.join(GGUF_DTYPES)}.")
    architecture, config = _read_config(folder)
    tensors = _plan_tensors(folder, architecture, config, notify)
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    spec = tokenizer_spec(tokenizer, folder)
    with atomic_io.atomic_file(out) as file:
        writer = gguf.GGUFWriter(file, architecture.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(model_name(name or folder.resolve().name, spec))
        writer.add_file_type(_FILE_TYPES[dtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        gguf_settings.add_settings(writer, architecture, config, notify)
        writer.add_vocab_size(rows)
        add_tokenizer(writer, tokenizer, spec, rows, folder, notify)
        for key, factors in gguf_settings.rope_factors(config).items():
            tensors.append(_Tensor(key, factors.shape, partial(torch.from_numpy, factors)))
        for tensor in tensors:
            kind = tensor.stored_dtype(dtype)
            size = math.prod(tensor.shape) * kind.itemsize
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=_TENSOR_TYPES[kind]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            values = tensor.read().to(tensor.stored_dtype(dtype)).contiguous()
            if not values.isfinite().all():
                raise BaseModelError(
                    f"{folder}: {tensor.name} has values out of the range of {dtype}: use bfloat16 or float32."
                )
            # NumPy has no bfloat16.
            writer.write_tensor_data(
                (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()
            )
        end = writer.fout[0].tell() if writer.fout else 0
        writer.close()
        if file.stat().st_size != end:  # the writer does not report every failed write
            raise BaseModelError(f"{out} is not kept: the file is incomplete on disk. Free some space.")


def _read_config(folder: Path) -> tuple[GgufArchitecture, PretrainedConfig]:
    """The architecture, and the settings of the text model with all their defaults."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (architecture := llama_cpp.find_architecture(raw)) is None:
        raise BaseModelError(f"{folder} cannot be written as GGUF: {llama_cpp.unknown_type(raw)}.")
    config = gguf_settings.load_text_config(folder)
    if problems := llama_cpp.model_problems(architecture, config.to_dict()):
        raise BaseModelError(f"{folder} cannot be written as GGUF: {'; '.join(problems)}.")
    return architecture, config


def _plan_tensors(
    folder: Path, architecture: GgufArchitecture, config: PretrainedConfig, notify: EventHandler
) -> list[_Tensor]:
    """All tensors of the file that are read from the folder.

    Raises BaseModelError for quantized weights, and for tensors that llama.cpp has no place for.
    """
    paths = weight_files(folder)
    if read_stored_tensors(paths).bits:
        raise BaseModelError(f"{folder}: its weights are quantized: merge an adapter into it first, in float32.")
    settings = config.to_dict()
    names = architecture.tensor_names(settings)
    tensors, other_parts = [], 0
    for path in paths:
        stored = safe_open(path, framework="pt")
        for key in stored.keys():  # noqa: SIM118 (no mapping)
            module, _, part = key.rpartition(".")
            if key.removeprefix("model.").startswith(_OTHER_PARTS):
                other_parts += 1
                continue
            if key.endswith(_COMPUTED) or (module.endswith("lm_head") and config.tie_word_embeddings):
                continue
            name = llama_cpp.tensor_name(names, module)
            if name is None:
                raise BaseModelError(f"{folder} cannot be written as GGUF: llama.cpp has no place for {key}.")
            tensors.append(_plan_tensor(stored, key, f"{name}.{part}", architecture, settings))
    if not config.tie_word_embeddings and all(tensor.name != "output.weight" for tensor in tensors):
        raise BaseModelError(
            f"{folder}: its weights have no lm_head, which config.json does not tie to the embeddings."
        )
    if other_parts:
        notify(Notice("The file has the text model alone, without the parts for images."))
    return tensors


def _plan_tensor(
    stored: safe_open, key: str, name: str, architecture: GgufArchitecture, settings: llama_cpp.Config
) -> _Tensor:
    module = key.rpartition(".")[0]
    shape = tuple(stored.get_slice(key).get_shape())
    # Old checkpoints of GPT-2 have no prefix before the blocks.
    is_layer = module.endswith(tuple(f".{layer}" for layer in architecture.layers))
    transposed = architecture.transposed and len(shape) == 2 and is_layer
    order = architecture.row_order(module, settings)
    offset = architecture.norm_offset if module.endswith("norm") else 0.0

    def read() -> torch.Tensor:
        tensor: torch.Tensor = stored.get_tensor(key)
        if offset:
            tensor = tensor.float() + offset
        tensor = tensor.T if transposed else tensor
        return tensor if order is None else tensor[torch.from_numpy(order)]

    return _Tensor(name, shape[::-1] if transposed else shape, read)
