"""Free memory, and the precision in which a base model fits into it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BaseModelError, EventHandler, Notice
from . import fsdp
from .resolve import BaseModelFiles

if TYPE_CHECKING:
    import torch

_CGROUPS, _CGROUP_LIMITS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_CGROUP_FILES = (  # of the second version, and of the first
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)
_EMBEDDING = re.compile(r"embed|wte|wpe|lm_head")


def choose_precision(
    source: BaseModelFiles, place: torch.device, dtype: str, load_in: str, notify: EventHandler
) -> tuple[torch.dtype, str]:
    """Numbers and bits as they were asked for or, where that was left open, the first that fit into the free memory."""
    import torch

    if load_in not in ("auto", "full") and fsdp.shard_count() > 1:
        raise BaseModelError(f"--load-in {load_in} and a split base (FSDP) are two ways to hold less: choose one.")
    first = choose_dtype(dtype, place)
    kinds = [first, torch.bfloat16] if dtype == "auto" and first == torch.float32 else [first]
    ways = [(kind, "full" if load_in == "auto" else load_in) for kind in kinds]
    fewer = load_in == "auto" and dtype != "int8" and fsdp.shard_count() == 1
    if fewer and place.type in ("cuda", "cpu") and find_spec("bitsandbytes"):
        ways += [(kinds[-1], "8bit"), (kinds[-1], "4bit")]
    elif load_in not in ("auto", "full") and (place.type not in ("cuda", "cpu") or not find_spec("bitsandbytes")):
        why = "is for CUDA and CPUs" if find_spec("bitsandbytes") else "needs bitsandbytes: pip install bitsandbytes"
        raise BaseModelError(f"--load-in {load_in} {why}; or leave it out.")
    free = free_memory(place)
    for kind, bits in ways:
        if _weight_bytes(source, kind, bits) <= free:
            if (kind, bits) != ways[0]:
                notify(Notice(f"{_too_large(source, ways[0], free)}, so it is read in {_precision_name(kind, bits)}."))
            return kind, bits
    advice = "" if "4bit" in ways[-1] else "choose --dtype bfloat16, or --load-in 4bit (bitsandbytes), or "
    if fsdp.shard_count() > 1:
        advice = "choose --dtype bfloat16, or more processes, or "
    raise BaseModelError(f"{_too_large(source, ways[-1], free)}: {advice}take a smaller base.")


def _too_large(source: BaseModelFiles, way: tuple[torch.dtype, str], free: int) -> str:
    needed = _weight_bytes(source, *way) / 1e9
    return f"The base {source.name} takes {needed:.1f} GB in {_precision_name(*way)}, and {free / 1e9:.1f} GB of memory are free"


def _precision_name(kind: torch.dtype, bits: str) -> str:
    return str(kind).removeprefix("torch.") if bits == "full" else bits


def _weight_bytes(source: BaseModelFiles, kind: torch.dtype, bits: str) -> int:
    """What the weights take in memory; in 8 and 4 bits, or split, all but the embeddings and the head (a scale a block)."""
    share = {"full": float(kind.itemsize), "8bit": 1.01, "4bit": 0.52}[bits] / fsdp.shard_count()
    total = 0.0
    for name, shape in source.shapes.items():
        block = not _EMBEDDING.search(name) and (bits == "full" or len(shape) == 2)
        total += math.prod(shape) * (share if block else kind.itemsize)
    return int(total)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device without anything being put out; on a CPU within the limit of a container too."""
    import psutil
    import torch

    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reusable
    return max(min([int(psutil.virtual_memory().available), *_free_in_cgroups()]), 0)


def _free_in_cgroups() -> Iterator[int]:
    """Bytes that are free in each control group of Linux that this process is in and that has a limit, as a container has."""
    try:
        groups = _CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in groups:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = _CGROUP_LIMITS / "memory" if kinds else _CGROUP_LIMITS
        limit, used, cached = _CGROUP_FILES[bool(kinds)]
        place = root / path.lstrip("/")
        for group in (place, *place.parents):
            with contextlib.suppress(OSError, ValueError, KeyError):  # the root has no limit, and others need none
                facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                taken = int((group / used).read_text()) - sum(int(facts[name]) for name in cached)
                yield int((group / limit).read_text()) - taken
            if group == root:
                break


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name != "auto":
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}
        return kinds[name]
    return (
        torch.bfloat16
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float32
    )
