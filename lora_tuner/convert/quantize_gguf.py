"""Quantize a GGUF model, with llama.cpp's own code for each tensor.

Which tensor gets which type is llama.cpp's choice too, of which the library that xllamacpp has
exports nothing: the rules here are those of llama.cpp's src/llama-quant.cpp of August 2026
(tensor_allows_quantization, llama_tensor_get_type_impl, tensor_type_fallback) for these three
mixtures, without an importance matrix.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from .. import atomic_io
from ..errors import AdapterError, EventHandler, Progress
from .llama_runtime import quantize_rows

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader

Quantization = Literal["q4_k_m", "q8_0", "f16"]
_TYPES = {"q4_k_m": "Q4_K", "q8_0": "Q8_0", "f16": "F16"}
_NARROW = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "Q5_K": "Q5_1"}  # where rows are no multiple of 256
# Parts of the names of matrices that stay as they are.
_KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "position_embd"),
    *("ssm_conv1d", "shortconv.conv.weight", "token_types"),
)
_VALUES = re.compile(r"attn_(v|qkv|kv_b)\.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.")


def quantize(source: Path, out: Path, kind: Quantization, notify: EventHandler) -> None:
    """Write a quantized copy of a GGUF model, which appears complete or not at all.

    Args:
        source: the model, in float32.
        out: the file to write; one that exists is replaced.
        kind: the mixture of types.
        notify: receives progress events.

    Raises AdapterError for values out of the range of a type.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    types = tensor_types(reader, kind)
    with atomic_io.atomic_file(out) as file:
        writer = gguf.GGUFWriter(file, str(reader.fields["general.architecture"].contents()))
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
                writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1])
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
        for tensor in reader.tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            byte_shape = gguf.quant_shape_to_byte_shape(shape, types[tensor.name])
            size = int(np.prod(byte_shape, dtype=np.int64))
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), size, raw_dtype=types[tensor.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, tensor in enumerate(reader.tensors, 1):
            wanted = types[tensor.name]
            if wanted == tensor.tensor_type:
                writer.write_tensor_data(np.array(tensor.data))
            else:
                columns = int(tensor.shape[0])
                (row_bytes,) = gguf.quant_shape_to_byte_shape((columns,), wanted)
                rows = quantize_rows(np.asarray(tensor.data).reshape(-1, columns), int(wanted), row_bytes)
                if rows is None:
                    raise AdapterError(
                        f"{out} is not kept: {tensor.name} has values out of the range of {wanted.name}."
                    )
                writer.write_tensor_data(rows)
            notify(Progress("quantizing", number, len(reader.tensors)))
        writer.close()


def tensor_types(reader: "GGUFReader", kind: Quantization) -> dict[str, "GGMLQuantizationType"]:
    """Type of each tensor in the quantized file."""
    import gguf

    facts = _Facts(reader)
    types = {}
    for tensor in reader.tensors:
        wanted = _TYPES[kind]
        if len(tensor.shape) < 2 or not tensor.name.endswith("weight") or any(k in tensor.name for k in _KEPT):
            types[tensor.name] = tensor.tensor_type
            continue
        if kind == "q4_k_m":
            wanted = facts.k_quant(tensor.name, int(tensor.shape[0]))
        if wanted in _NARROW and tensor.shape[0] % 256:
            wanted = _NARROW[wanted]
        if wanted != "F16" and tensor.shape[0] % 32:
            wanted = "F16"
        types[tensor.name] = gguf.GGMLQuantizationType[wanted]
    return types


class _Facts:
    """The facts of a model that decide about types."""

    def __init__(self, reader: "GGUFReader") -> None:
        def number(key: str) -> int:
            field = reader.fields.get(f"{self.architecture}.{key}")
            value = field.contents() if field else 0
            return value if isinstance(value, int) else 0

        self.architecture = str(reader.fields["general.architecture"].contents())
        names = [tensor.name for tensor in reader.tensors]
        self.is_tied = "output.weight" not in names
        self.blocks, self.experts = number("block_count"), number("expert_count")
        self.is_70b = self.architecture == "llama" and self.blocks == 80
        self.value_blocks = sorted(_block(name) for name in names if _VALUES.search(name))
        self.down_blocks = sorted({_block(name) for name in names if "ffn_down" in name})

    def k_quant(self, name: str, columns: int) -> str:
        """Type of a matrix in q4_k_m, before its columns are regarded."""
        falcon = self.architecture == "falcon"
        if name == "output.weight" or (name == "token_embd.weight" and self.is_tied):
            return "Q8_0" if falcon or columns % 256 else "Q6_K"
        if _VALUES.search(name):
            if self.experts == 8:
                return "Q8_0"
            if _gets_more_bits(self.value_blocks.index(_block(name)), len(self.value_blocks)):
                return "Q6_K"
            return "Q5_K" if self.is_70b else "Q4_K"
        if "ffn_down" in name:
            block = _block(name) if self.experts > 1 else self.down_blocks.index(_block(name))
            more = _gets_more_bits(block, self.blocks)
            if falcon:
                return "Q6_K" if block < self.blocks // 16 else "Q5_K" if more else "Q4_K"
            return "Q6_K" if more else "Q4_K"
        if self.experts == 8 and "attn_k.weight" in name:
            return "Q8_0"
        if self.experts == 8 and "attn_output.weight" in name:
            return "Q5_K"
        return "Q4_K"


def _block(name: str) -> int:
    match = _BLOCK.match(name)
    return int(match[1]) if match else 0


def _gets_more_bits(block: int, blocks: int) -> bool:
    """The first and the last eighth of the blocks, and every third of the others."""
    return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
