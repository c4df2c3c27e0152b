"""Read and check the header of a safetensors file without loading its tensors."""

import json
import math
import struct
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs"  # so begins what lies in a clone where git-lfs has not fetched the file
_MAX_HEADER_BYTES = 5_000_000  # bytes: 15,000 adapted layers; in memory it can become thirty times as much
_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "U8": 1, "BOOL": 1}


def read_safetensors_header(path: Path) -> tuple[dict[str, tuple[str, list[int], int, int]], int]:
    """What a safetensors file says of itself, read without its tensors: name -> (dtype, shape, begin, end), and where the
    tensors start. Offsets are in bytes from that start; the tensors fill the file, and each is as large as its shape says.

    Raises ValueError for anything that is no whole safetensors file.
    """
    total = path.stat().st_size
    if not path.is_file():  # a pipe would never end
        raise ValueError("it is no file")
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix == LFS_POINTER[:8] and file.read(len(LFS_POINTER) - 8) == LFS_POINTER[8:]:
            raise ValueError("it is a pointer of Git LFS, and `git lfs pull` fetches the file")
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else total
        if size > total - 8:
            raise ValueError("it is cut off, or no safetensors file")
        if size > _MAX_HEADER_BYTES:
            raise ValueError(f"its header has {size:,} bytes, and {_MAX_HEADER_BYTES:,} are read")
        try:
            entries = _tensor_entries(file.read(size))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("its header is no safetensors header") from error
    start = 8 + size
    filled = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if end > total - start:
            raise ValueError(f"it is cut off: {name} ends beyond the file")
        if begin != filled or (dtype in _DTYPE_BYTES and end - begin != math.prod(shape) * _DTYPE_BYTES[dtype]):
            raise ValueError(f"its header is wrong about {name}")
        filled = end
    if filled != total - start:
        raise ValueError("it holds more than its header says")
    return entries, start


def _tensor_entries(data: bytes) -> dict[str, tuple[str, list[int], int, int]]:
    """As strict as safetensors, which loads the file later: JSON in UTF-8, each name once, text alone as metadata."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is given twice")
        return found

    if not data.startswith(b"{"):
        raise ValueError("it is no JSON object")
    header = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    for key, value in (header.pop("__metadata__", None) or {}).items():
        f"{key}{value + ''}".encode()  # half a character is none
    return {name: _tensor_entry(entry) for name, entry in header.items()}


def _tensor_entry(entry: Any) -> tuple[str, list[int], int, int]:
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (begin, end, *shape)):
        raise ValueError("a size is no whole number")
    return str(entry["dtype"]), list(shape), begin, end
