"""Find the weight files of a base, and read from their headers what they hold.

Limit: of quantized weights only those of bitsandbytes (8 and 4 bits) are understood.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..adapters import safetensors_header

_BLOCK_BYTES = 1 << 24  # read at once
WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# Beside a weight that bitsandbytes has quantized: scales, and in 4 bits its shape.
_QUANTIZED_PART = re.compile(r"\.(weight\.((nested_)?(absmax|quant_map)|quant_state\.\w+)|SCB|weight_format)$")


def weight_files(folder: Path) -> list[Path]:
    """The files whose weights transformers loads. Others beside them are not part of the model."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return []
    return [
        folder / name
        for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    ]


def configured_quantization(config: dict[str, object]) -> str | None:
    """Quantization that a config.json names: 8bit, 4bit, another kind, or None."""
    parts = (config, config.get("text_config"))  # models of text and images have a config for each
    names = ("quantization_config", "compression_config")
    candidates = [part.get(name) for part in parts if isinstance(part, dict) for name in names]
    settings = next((found for found in candidates if isinstance(found, dict) and found), {})
    bits = next((bits for bits in ("8bit", "4bit") if settings.get(f"load_in_{bits}")), None)
    return bits or settings.get("quant_method") or ("an unnamed format" if settings else None)


@dataclass(frozen=True)
class StoredTensors:
    """Tensors of a model in its files. `bits` is 8bit or 4bit where bitsandbytes quantized some."""

    shapes: dict[str, tuple[int, ...]]
    quantized_bytes: dict[str, int]
    bits: str | None


def read_stored_tensors(paths: list[Path]) -> StoredTensors:
    """Read the headers of weight files, and the shapes that 4-bit weights had before quantization."""
    shapes: dict[str, tuple[int, ...]] = {}
    shapes_before: dict[str, tuple[int, ...]] = {}
    tensor_bytes: Counter[str] = Counter()
    quantized = set()
    for path in paths:
        header, start = safetensors_header.read_safetensors_header(path)
        for name, (_, shape, begin, end) in header.items():
            weight = _QUANTIZED_PART.sub(".weight", name)
            tensor_bytes[weight] += end - begin
            if weight == name:
                shapes[name] = tuple(shape)
                continue
            quantized.add(weight)
            if ".quant_state." in name:
                with path.open("rb") as file:
                    file.seek(start + begin)
                    shapes_before[weight] = tuple(json.loads(file.read(end - begin))["shape"])
    bits = ("4bit" if shapes_before else "8bit") if quantized else None
    return StoredTensors(shapes | shapes_before, {name: tensor_bytes[name] for name in quantized}, bits)


def tensor_hashes(path: Path) -> Iterator[tuple[str, str]]:
    """Name and sha256 of each tensor in a file."""
    header, start = safetensors_header.read_safetensors_header(path)
    with path.open("rb") as file:
        for name, (dtype, shape, begin, end) in header.items():
            file.seek(start + begin)
            digest = hashlib.sha256(f"{dtype}{shape}".encode())
            for position in range(begin, end, _BLOCK_BYTES):
                digest.update(file.read(min(end - position, _BLOCK_BYTES)))
            yield name, digest.hexdigest()
