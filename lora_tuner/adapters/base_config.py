"""Find the base of an adapter on this machine, and tell from its config.json how it is built.

No weights are read and no request is sent.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import atomic_io, hub
from ..config import EMBEDDED_BASE
from ..errors import LoraTunerError
from .adapter import Adapter
from .safetensors_header import read_json

BaseConfig = Mapping[str, Any]  # content of config.json
# Where config.json of a wrapper has the settings of its text model.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
_TEXT_PARTS = {"language_model", "text_model"}  # names of the text model in a wrapper
_GGUF_SOURCE = re.compile(r"\(sha256 ([0-9a-f]{12})\)$")  # of a base that was converted from a GGUF file


def find_base_config(adapter: Adapter) -> BaseConfig | None:
    """config.json of the base that an adapter names; None if it is not on this machine. Sends no
    request."""
    if folder := find_base_folder(adapter):
        with contextlib.suppress(LoraTunerError):
            config = read_json(folder / "config.json")
            return config if isinstance(config, dict) else None
    return None


def find_base_folder(adapter: Adapter) -> Path | None:
    """Folder on this machine of the base that an adapter names, if there is one. Sends no request."""
    repo = adapter.manifest.base.repo if adapter.manifest else adapter.base
    folders: list[Path | None] = [Path(os.path.expanduser(adapter.base))] if adapter.base else []
    if adapter.base == EMBEDDED_BASE:
        folders += (atomic_io.cache_dir() / "bases").glob(f"{EMBEDDED_BASE}-*")
    if adapter.manifest and (source := _GGUF_SOURCE.search(adapter.manifest.base.weights)):
        folders.append(atomic_io.cache_dir() / "bases" / f"gguf-{source[1]}")
    with contextlib.suppress(LoraTunerError, ValueError):  # no valid name, such as a path
        folders.append(hub.cached_snapshot(repo, adapter.revision) if repo else None)
    return next((folder for folder in folders if folder and os.path.isfile(folder / "config.json")), None)


def is_in_wrapper(module: str) -> bool:
    """True for a layer of the text model in a multimodal wrapper, by its full name."""
    return not _TEXT_PARTS.isdisjoint(module.split("."))


def is_wrapper(base_config: BaseConfig) -> bool:
    """True for the config of a checkpoint in which a text model is one part."""
    return any(isinstance(base_config.get(key), dict) for key in _TEXT_CONFIGS)


def text_settings(base_config: BaseConfig) -> BaseConfig:
    """Settings of the text model: in a wrapper a part of its config."""
    parts = (base_config.get(key) for key in _TEXT_CONFIGS)
    return next((part for part in parts if isinstance(part, dict)), base_config)
