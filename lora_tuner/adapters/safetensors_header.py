"""Read small parts of a stranger's files: the header of a safetensors file, without its tensors; JSON."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterError

LFS_POINTER = b"version https://git-lfs"  # start of a file that a clone without git-lfs has instead
# Enough for 15,000 adapted layers; parsed it takes up to 30 times as much memory.
_MAX_HEADER_BYTES = 5_000_000
_MAX_JSON_BYTES = 1_000_000  # of a config or manifest; parsed, it can take thirty times the memory
_DTYPE_BYTES = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F64": 8,
    "I8": 1,
    "I16": 2,
    "I32": 4,
    "I64": 8,
    "U8": 1,
    "BOOL": 1,
}
_WRAPPER_PARTS = frozenset(("model", "language_model", "text_model"))
Shape = tuple[int, ...]
TensorEntry = tuple[str, list[int], int, int]  # dtype, shape, begin, end


def read_safetensors_header(path: Path) -> tuple[dict[str, TensorEntry], int]:
    """Read the header of a safetensors file and check it against the size of the file.

    The tensors must fill the file, and each must be as large as its shape and dtype say.

    Returns:
        name -> (dtype, shape, begin, end), and the position of the tensor data in the file. Begin
        and end are bytes, counted from that position.

    Raises:
        ValueError: it is not a complete safetensors file.
    """
    total = path.stat().st_size
    if not path.is_file():  # reading a pipe would never end
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix == LFS_POINTER[:8] and file.read(len(LFS_POINTER) - 8) == LFS_POINTER[8:]:
            raise ValueError("it is a Git LFS pointer: `git lfs pull` downloads the file")
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else total
        if size > total - 8:
            raise ValueError("it is cut off, or no safetensors file")
        if size > _MAX_HEADER_BYTES:
            raise ValueError(f"its header has {size:,} bytes, more than the limit of {_MAX_HEADER_BYTES:,}")
        try:
            entries = _tensor_entries(file.read(size))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("its header is no safetensors header") from error
    start = 8 + size
    filled = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if end > total - start:
            raise ValueError(f"it is cut off: {name} ends beyond the file")
        if begin != filled or (dtype in _DTYPE_BYTES and end - begin != math.prod(shape) * _DTYPE_BYTES[dtype]):
            raise ValueError(f"its header is wrong about {name}")
        filled = end
    if filled != total - start:
        raise ValueError("it holds more than its header says")
    return entries, start


def bare_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of the weights of a base by their names without the parts of wrappers.

    Files have `language_model.model.layers` or `model.layers` for `model.language_model.layers`."""
    return {bare_name(name): shape for name, shape in shapes.items()}


def find_shape(name: str, bare_shapes: Mapping[str, Shape]) -> Shape | None:
    """Shape in files, from `bare_shapes`, of a weight by its name in memory, of which files may lack
    the first parts. None if they do not tell."""
    parts = bare_name(name).split(".")
    names = (".".join(parts[start:]) for start in range(len(parts)))
    return next((bare_shapes[each] for each in names if each in bare_shapes), None)


def bare_name(name: str) -> str:
    """Name of a weight without the parts of wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def not_finite(path: Path) -> list[str]:
    """Names of the tensors with values that are not finite. Reads the whole file."""
    header, start = read_safetensors_header(path)
    names = []
    with path.open("rb") as file:
        for name, (dtype, _, begin, end) in header.items():
            file.seek(start + begin)
            if not all_finite(file.read(end - begin), dtype):
                names.append(name)
    return names


def all_finite(data: bytes, dtype: str) -> bool:
    """Return whether all values of a float tensor are finite."""
    import numpy as np

    if dtype == "BF16":  # numpy has no bfloat16: test for an exponent of all ones
        return not bool((np.frombuffer(data, np.uint16) & 0x7F80 == 0x7F80).any())
    return bool(np.isfinite(np.frombuffer(data, dtype.replace("F", "float"))).all())


def _tensor_entries(data: bytes) -> dict[str, TensorEntry]:
    """Parse a header as strictly as safetensors: UTF-8 JSON, unique names, text as metadata."""
    if not data.startswith(b"{"):
        raise ValueError("it is no JSON object")
    header = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    for key, value in (header.pop("__metadata__", None) or {}).items():
        # Raises for values that are not text, and for lone surrogates.
        f"{key}{value + ''}".encode()
    return {name: _tensor_entry(entry) for name, entry in header.items()}


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    items = dict(pairs)
    if len(items) < len(pairs):
        raise ValueError("a name is given twice")
    return items


def _tensor_entry(entry: dict[str, Any]) -> TensorEntry:
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (begin, end, *shape)):
        raise ValueError("a size is no whole number")
    return str(entry["dtype"]), list(shape), begin, end


def read_json(path: Path) -> object:
    """Read a small JSON file of a stranger. Raises AdapterError."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block forever
            raise AdapterError(f"{path} is not a regular file.")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise AdapterError(f"{path} is too large: at most {_MAX_JSON_BYTES:,} bytes are read.")
        data = path.read_bytes()
        if data.startswith(LFS_POINTER):
            raise AdapterError(f"{path} is a Git LFS pointer: run `git lfs pull` to fetch the file.")
        value: object = json.loads(data.decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # rejects lone surrogates
        return value
    except FileNotFoundError as error:
        raise AdapterError(f"{path.parent} has no {path.name}: it is incomplete or not an adapter.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not readable as JSON: {error}.") from error
