"""Choose the precision in which a base model fits into the free memory of a device.

Limit: estimates of the weights alone come from the headers of their files; training steps are
measured (`training/profiling`).
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from ..config import ModelOptions
from ..errors import BaseModelError, EventHandler, Notice
from . import fsdp
from .base_files import BaseModelFiles, loading_errors

Precision = tuple[torch.dtype, str]  # dtype of the weights, and full, 8bit or 4bit

_CGROUPS, _CGROUP_LIMITS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_CGROUP_V1_FILES = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_CGROUP_V2_FILES = ("memory.max", "memory.current", ("inactive_file", "active_file"))
FUSED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")  # see models/fused_blocks.py
FAST_BFLOAT16 = 1.5  # speedup from which training in bfloat16 pays
_EMBEDDING = re.compile(r"embed|wte|wpe|lm_head")
_EXPERT = re.compile(r"\.experts\.")
_WEIGHT_SHARE = {"8bit": 1.01, "4bit": 0.52}  # bytes per weight, with scales


def choose_precision(
    files: BaseModelFiles, device: torch.device, dtype: str, load_in: str, notify: EventHandler
) -> Precision:
    """Choose dtype and quantization of the weights.

    A setting that is not `auto` is kept. `auto` is the most precise one that fits into the free
    memory; a notice says so when that is not the first choice.

    Returns:
        dtype of the weights, or of computation where they are quantized; and full, 8bit or 4bit.

    Raises:
        BaseModelError: nothing fits, or the settings cannot be combined here.
    """
    sharded = fsdp.shard_count() > 1
    if files.quantization is not None:
        _check_saved_quantization(files, dtype, load_in, sharded=sharded)
        load_in = files.quantization
    if load_in not in ("auto", "full") and sharded:
        raise BaseModelError(f"--load-in {load_in} cannot be combined with FSDP: choose one.")
    dtypes = [choose_dtype(dtype, device)]
    if dtype == "auto" and dtypes == [torch.float32]:
        dtypes.append(torch.bfloat16)
    candidates = [(candidate, "full" if load_in == "auto" else load_in) for candidate in dtypes]
    can_quantize = device.type in ("cuda", "cpu") and find_spec("bitsandbytes") is not None
    if load_in == "auto" and dtype != "int8" and not sharded and can_quantize:
        candidates += [(dtypes[-1], "8bit"), (dtypes[-1], "4bit")]
    elif load_in not in ("auto", "full") and not can_quantize:
        reason = (
            "is for CUDA and CPUs"
            if find_spec("bitsandbytes")
            else "needs bitsandbytes: pip install bitsandbytes"
        )
        raise BaseModelError(f"--load-in {load_in} {reason}; or leave it out.")
    free = free_memory(device)
    for candidate in candidates:
        if _weight_bytes(files, *candidate) <= free:
            if candidate != candidates[0]:
                notify(
                    Notice(
                        f"{_too_large(files, candidates[0], free)}, so it is loaded in "
                        f"{_precision_name(*candidate)}."
                    )
                )
            return candidate
    if sharded:
        advice = "choose --dtype bfloat16, more processes or a smaller base"
    elif "4bit" in candidates[-1]:
        advice = "choose a smaller base"
    else:
        advice = "choose --dtype bfloat16, --load-in 4bit (needs bitsandbytes) or a smaller base"
    raise BaseModelError(f"{_too_large(files, candidates[-1], free)}: {advice}.")


def _check_saved_quantization(files: BaseModelFiles, dtype: str, load_in: str, *, sharded: bool) -> None:
    """Raise BaseModelError unless quantized weights can be loaded here, with these settings."""
    saved = f"The weights of {files.name} are saved in {files.quantization}"
    if files.quantization not in ("8bit", "4bit"):
        raise BaseModelError(
            f"{saved}, and only those of bitsandbytes (8bit, 4bit) can be loaded: use the model "
            "from which they were quantized, with --load-in 4bit if it is too large."
        )
    if load_in not in ("auto", files.quantization):
        raise BaseModelError(f"{saved}, so they cannot be loaded with --load-in {load_in}: leave it out.")
    if dtype == "int8":
        raise BaseModelError(f"{saved}, so they cannot be loaded with --dtype int8: leave it out.")
    if sharded:
        raise BaseModelError(f"{saved}, which cannot be combined with FSDP: use one process, or another base.")
    if find_spec("bitsandbytes") is None:
        raise BaseModelError(f"{saved}, which needs bitsandbytes: pip install bitsandbytes; or use another base.")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve the name of a dtype.

    `auto` is bfloat16 on GPUs that support it natively, else float32. int8 is float32 too: only the
    weights of linear layers are quantized, after loading.
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    dtypes = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "int8": torch.float32,
    }
    return dtypes[name]


def training_dtype(files: BaseModelFiles, device: torch.device, options: ModelOptions) -> str:
    """Choose the dtype to load a base in for training, in place of `auto` on a CPU.

    It is bfloat16, with a notice, where products are much faster in it and the blocks are fused.
    """
    is_open = options.dtype == "auto" and options.load_in in ("auto", "full")
    if not is_open or device.type != "cpu" or files.quantization is not None:
        return options.dtype
    with loading_errors(files):
        is_fused = files.config().get("model_type") in FUSED_MODEL_TYPES
    if not is_fused or (speedup := bfloat16_speedup()) < FAST_BFLOAT16:
        return options.dtype
    options.notify(
        Notice(
            f"The base is in bfloat16, whose matrix products are {speedup:.1f} times as fast as "
            "those of float32 on this CPU (--dtype float32 to choose otherwise)."
        )
    )
    return "bfloat16"


@cache
def bfloat16_speedup() -> float:
    """Speed of a matrix product in bfloat16 as a multiple of that in float32, measured once per process."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        rows, columns = torch.ones(256, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(rows, columns)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return seconds[0] / seconds[1]


def free_memory(device: torch.device) -> int:
    """Free bytes on a device; on a CPU those of main memory, within the limits of a container.

    Counts what torch has reserved on a GPU and not allocated.
    """
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return max(min([int(psutil.virtual_memory().available), *_free_in_cgroups()]), 0)


def check_full_weights_fit(files: BaseModelFiles, device: torch.device) -> None:
    """Raise BaseModelError unless all weights fit into the free memory in float32."""
    precision = (torch.float32, "full")
    if _weight_bytes(files, *precision) > (free := free_memory(device)):
        raise BaseModelError(f"{_too_large(files, precision, free)}: choose a smaller base.")


def _free_in_cgroups() -> Iterator[int]:
    """Free bytes in each Linux control group that this process belongs to and that has a limit."""
    try:
        lines = _CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUP_LIMITS / "memory" if controllers else _CGROUP_LIMITS
        limit_file, usage_file, cache_keys = _CGROUP_V1_FILES if controllers else _CGROUP_V2_FILES
        process_group = root / path.lstrip("/")
        for group in (process_group, *process_group.parents):
            with contextlib.suppress(OSError, ValueError, KeyError):  # no limit is set here
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                usage = int((group / usage_file).read_text()) - sum(int(stat[key]) for key in cache_keys)
                yield int((group / limit_file).read_text()) - usage
            if group == root:
                break


def _weight_bytes(files: BaseModelFiles, dtype: torch.dtype, load_in: str) -> int:
    """Bytes of the weights per process.

    Quantization and FSDP leave embeddings and head as they are, and quantization all but linear
    layers: in memory the experts of a mixture are none, though files may have them so.
    """
    saved = load_in == files.quantization
    block_itemsize = (
        dtype.itemsize if saved else _WEIGHT_SHARE.get(load_in, dtype.itemsize)
    ) / fsdp.shard_count()
    total = 0.0
    for name, shape in files.shapes.items():
        if saved and name in files.quantized_bytes:
            total += files.quantized_bytes[name]
            continue
        is_linear = len(shape) == 2 and not _EXPERT.search(name)
        in_block = not _EMBEDDING.search(name) and (load_in == "full" or is_linear)
        total += math.prod(shape) * (block_itemsize if in_block else dtype.itemsize)
    return int(total)


def _too_large(files: BaseModelFiles, precision: Precision, free: int) -> str:
    return (
        f"The base {files.name} takes {_weight_bytes(files, *precision) / 1e9:.1f} GB in "
        f"{_precision_name(*precision)}, and {free / 1e9:.1f} GB of memory are free"
    )


def _precision_name(dtype: torch.dtype, load_in: str) -> str:
    return str(dtype).removeprefix("torch.") if load_in == "full" else load_in
