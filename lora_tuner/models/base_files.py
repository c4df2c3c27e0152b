"""Files of a base model on this machine: its config, weights, hashes and errors.

Surprise: a name identifies nothing. Two models of the same shape accept each other's adapters, so a
base is identified by a hash of its tensors and config (`identity`). Price: about one second per
gigabyte, once; the hash is then cached for as long as the size, time and inode of the files stay
the same. Nothing here imports torch on import. Limit: weights must be safetensors; pickled files
are never opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters.manifest import SCHEMA_VERSION, BaseInfo
from ..errors import BaseModelError, EventHandler, LoraTunerError, first_line, ignore_events
from . import identity, stored_weights

LOCAL_FOLDER = "a local folder"  # origin of weights that are not from the Hub


@dataclass(frozen=True)
class BaseModelFiles:
    """Files of a base model on this machine, and its names for users and other tools."""

    name: str
    repo: str  # a Hub id, or the local folder as the user spelled it
    folder: Path
    revision: str | None  # the commit on the Hub
    weights_source: str  # origin of the weights, in words
    notify: EventHandler = field(default=ignore_events, compare=False, repr=False)
    gguf: Path | None = None  # the file that the folder was made from

    @property
    def locations(self) -> list[Path]:
        """Its folder and the GGUF file that the folder was made from."""
        return [self.folder, self.gguf] if self.gguf else [self.folder]

    @property
    def as_setting(self) -> str:
        """The name for a settings file: a relative folder begins with ./, so it is never a Hub id."""
        is_path = self.weights_source == LOCAL_FOLDER or (self.gguf is not None and self.name == self.repo)
        is_relative = is_path and not self.name.startswith(("/", ".", "~"))
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
        """sha256 of the GGUF file; None for a base that was not made from one.

        Its other files depend on the version of transformers that has written them.
        """
        return identity.file_hash(self.gguf, self.notify) if self.gguf else None

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
                f"The weights of {self.name} are {_in_words(stored)}, but its config.json says "
                f"that they are {_in_words(kind)}: restore the config.json that was saved with "
                "them."
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


@contextlib.contextmanager
def loading_errors(files: BaseModelFiles) -> Iterator[None]:
    """Raise BaseModelError, with the first line of the cause, for errors of other libraries."""
    try:
        yield
    except (LoraTunerError, MemoryError):
        raise
    except Exception as error:  # a wrong config or a damaged file may fail in any way
        raise BaseModelError(f"The base {files.name} cannot be loaded: {first_line(error)}") from error


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


def _in_words(quantization: str | None) -> str:
    return f"quantized to {quantization}" if quantization else "not quantized"


def link_or_copy(source: Path, target: Path) -> None:
    """Make a link to a file, or a copy where this user or the disk may make none, as on Windows."""
    try:
        target.symlink_to(source.absolute())
    except OSError:
        shutil.copyfile(source, target)
