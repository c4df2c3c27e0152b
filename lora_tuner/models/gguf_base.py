"""GGUF files of llama.cpp as bases: converted once, to safetensors in the user's cache.

transformers reads weights and tokenizer. Surprise: it takes many settings from the defaults of a
model type in place of those in the file, skips tensors that it does not know, and fills missing
ones at random (transformers 5.23, integrations/ggml.py and modeling_gguf_pytorch_utils.py). So
settings are completed here, and what is left over in the file is an error that names it. Price: the
weights are kept in float32, several times the size of the file. Nothing here imports torch on
import."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from .. import atomic_io
from ..errors import BaseModelError, ConfigError, EventHandler, Notice, first_line, is_out_of_memory
from ..text import format_names
from . import gguf_config, identity
from .base_files import BaseModelFiles, link_or_copy, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SPLIT_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)
_LFS_POINTER = b"version https://git-lfs"
# Architectures of llama.cpp that are no causal language models.
_OTHER_KINDS = {
    "clip": "the image or audio part (mmproj) of a multimodal model: name the file with its text model",
    **dict.fromkeys(("t5", "t5encoder"), "an encoder-decoder, and only causal language models are trained here"),
    **dict.fromkeys(
        ("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "eurobert",
         "gemma-embedding"),
        "an embedding model, and only causal language models are trained here",
    ),
    **dict.fromkeys(
        ("wavtokenizer-dec", "flux", "sd1", "sdxl", "sd3", "wan", "ltxv", "hidream", "aura", "cosmos"),
        "a model of sound or images, and only causal language models are trained here",
    ),
}  # fmt: skip
_TOKEN_STRINGS = ("tokenizer.ggml.tokens", "tokenizer.chat_templates")
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, a turn, a message to a tool
# Byte-level pre-tokenizers of llama.cpp that split as GPT-2's does, or at digits in addition, which
# changes no token where the merges were learnt on split digits.
_LIKE_GPT2 = (
    "gpt-2",
    "default",
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "phi-2",
    "olmo",
    "mpt",
    "codeshell",
)


def is_gguf_name(name: str) -> bool:
    """True for a name that can only be that of a GGUF file."""
    return name.lower().endswith(".gguf")


def open_gguf(name: str, notify: EventHandler) -> BaseModelFiles:
    """A GGUF file as a base, converted if the cache does not have it.

    Raises:
        BaseModelError: it is not there, or not a causal language model that can be read in full.
    """
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        raise BaseModelError(_explain_missing(name))
    _check_kind(path)
    digest = identity.file_hash(path, notify)
    folder = cache_folder("gguf", digest)
    source = f"converted from the GGUF file {path.name} (sha256 {digest[:12]})"
    unpack(path, folder, f"Converting {name} to safetensors in the cache, once.", notify)
    return BaseModelFiles(name, name, folder, None, source, notify, path)


def converted_files() -> list[str]:
    """The GGUF files on this machine that the cache holds a conversion of."""
    try:
        sources = [*(atomic_io.cache_dir() / "bases").glob(f"gguf-*/{gguf_config.SOURCE_FILE}")]
    except ConfigError:  # there is no place for a cache
        return []
    paths = {source.read_text(encoding="utf-8").strip() for source in sources}
    return sorted(path for path in paths if os.path.isfile(path))


def cache_folder(name: str, digest: str) -> Path:
    return atomic_io.cache_dir() / "bases" / f"{name}-{digest[:12]}"


def unpack(path: Path, folder: Path, notice: str, notify: EventHandler) -> None:
    """Convert a file unless the folder has the result, undamaged."""
    is_new = not folder.is_dir()
    if not is_new and atomic_io.matches_hashes(folder):
        return
    if not is_new:
        notify(Notice(f"{folder} is damaged, or of an older version: it is made again."))
    notify(Notice(notice))
    try:
        _convert(path, folder, notify, overwrite=not is_new)
    except OSError:
        if not is_new or not folder.is_dir():  # else another process has finished first
            raise


def _explain_missing(name: str) -> str:
    repo, _, file = name.replace(":", "/").rpartition("/")
    if repo.count("/") == 1 and not name.startswith((".", "/", "~")) and "\\" not in name:
        return (
            f"There is no file {name}. A GGUF file on the Hub is downloaded first: `hf download "
            f"{repo} {file} --local-dir .`, then --base ./{file}."
        )
    return f"There is no file {name}."


def _check_kind(path: Path) -> None:
    """Raise BaseModelError for files that are none of GGUF, or parts of a model."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise BaseModelError(f"{path} cannot be read: {error.strerror}.") from error
    if begin == _LFS_POINTER:
        raise BaseModelError(f"{path} is a pointer of git-lfs, not the file itself: run `git lfs pull`.")
    if not begin.startswith(b"GGUF"):
        raise BaseModelError(f"{path} is not a GGUF file: it does not begin with the letters GGUF.")
    if match := _SPLIT_NAME.fullmatch(path.name):
        raise BaseModelError(_split_advice(path, match[1]))


def _split_advice(path: Path, stem: str) -> str:
    return (
        f"{path} is one part of a split file, which transformers does not read: join the parts "
        f"with llama.cpp's `llama-gguf-split --merge` (the first part, then {stem}.gguf), and "
        "name the result."
    )


@dataclass(frozen=True)
class _GgufModel:
    """Header of a GGUF file with a model. String arrays that are not needed are their lengths."""

    path: Path
    metadata: gguf_config.Metadata
    tensor_names: tuple[str, ...]

    @cached_property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def check(self) -> None:
        """Raise BaseModelError unless transformers may read it as a causal language model."""
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

        kind = self.metadata.get("general.type", "model")
        if kind == "adapter":
            raise BaseModelError(
                f"{self.path} is a LoRA adapter for llama.cpp, not a model: name the GGUF file of "
                "its base with --base. Adapters are read in PEFT's format alone."
            )
        if self.metadata.get("split.count", 1) > 1:
            raise BaseModelError(_split_advice(self.path, self.path.stem))
        if kind not in ("model", "mmproj") or not self.tensor_names:
            raise BaseModelError(f"{self.path} holds no model ({kind}): name the file with the weights.")
        if other := _OTHER_KINDS.get("clip" if kind == "mmproj" else self.architecture):
            raise BaseModelError(f"{self.path} is {other}.")
        known = {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer", "t5", "umt5"}
        if (
            self.architecture.replace("moe", "_moe").replace("-", "_") not in known
            and self.architecture not in known
        ):
            raise BaseModelError(
                f"{self.path} is of the architecture {self.architecture}, which transformers does "
                "not read from GGUF: use the model that it was made from, with safetensors "
                f"weights. It reads {format_names(sorted(known))}."
            )
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens or "tokenizer.ggml.model" not in self.metadata:
            raise BaseModelError(
                f"{self.path} has no tokenizer: convert the model again with its tokenizer files beside it."
            )
        blocks = {name.split(".")[1] for name in self.tensor_names if name.startswith("blk.")}
        if (count := self.metadata.get(f"{self.architecture}.block_count", len(blocks))) != len(blocks):
            raise BaseModelError(
                _not_in_full(self.path, f"its settings say {count:,} blocks, and it has {len(blocks):,}")
            )

    @property
    def end_ids(self) -> list[int]:
        """Token ids that end a text, a turn or a message."""
        ids = {self.metadata.get(f"tokenizer.ggml.{name}") for name in _END_TOKENS}
        return sorted(number for number in ids if isinstance(number, int))


def _convert(path: Path, folder: Path, notify: EventHandler, *, overwrite: bool) -> None:
    try:
        import gguf
    except ImportError as error:
        raise BaseModelError(f"Reading {path.name} needs the package gguf: `pip install gguf`.") from error
    # transformers reads the file several times, and makes the table of names for each module.
    names = ("GGUFReader", "get_tensor_name_map")
    once: dict[str, Any] = {name: cache(getattr(gguf, name)) for name in names}
    # The GGUF reader draws a progress bar that no setting turns off.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()), patch.multiple(gguf, **once):
        with _reading_errors(path):
            from transformers.integrations.gguf.reader import read_gguf_metadata

            source = _GgufModel(path, *read_gguf_metadata(str(path), _TOKEN_STRINGS))
            source.check()
        with atomic_io.temporary_folder(_made(folder.parent)) as alone, _reading_errors(path):
            # Other files beside it would be taken for those of the model.
            link = alone / "model.gguf"
            link_or_copy(path, link)
            model, tokenizer = _load(link, source, notify)
        with atomic_io.atomic_folder(folder, overwrite=overwrite) as work:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            (work / gguf_config.SOURCE_FILE).write_text(f"{path.absolute()}\n", encoding="utf-8")
            atomic_io.write_hashes(work)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _reading_errors(path: Path) -> Iterator[None]:
    """Raise BaseModelError in place of any error but those of memory, and of the disk."""
    try:
        yield
    except BaseModelError:
        raise
    except Exception as error:  # a damaged file may fail in any way
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise BaseModelError(
            f"{path} cannot be read: {first_line(error).rstrip('.')}. It is damaged, was downloaded in part, "
            "or is of a kind that transformers does not read: download it again, or use the model "
            "that it was made from."
        ) from error


def _load(
    link: Path, source: _GgufModel, notify: EventHandler
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in float32 and tokenizer of a file that lies alone in its folder."""
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    from . import memory, quantization

    reader = gguf.GGUFReader(str(link))  # raises ValueError for a file that ends early
    config = AutoConfig.from_pretrained(link.parent, gguf_file=link.name)
    if source.architecture == "llama" and config.model_type != "llama":  # of a file with the name mistral
        settings = config.to_dict() | {"model_type": "llama"}
        config = AutoConfig.for_model(**settings)
    gguf_config.complete(config, source.path, source.metadata, {tensor.name: tensor for tensor in reader.tensors})
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    # Of what the file lacks transformers would make random weights, before it is refused.
    weights = sum(math.prod(tensor.shape.tolist()) for tensor in reader.tensors)
    needed = 4 * max(weights, sum(parameter.numel() for parameter in empty.parameters()))
    space, free = atomic_io.free_space(link), memory.free_memory(torch.device("cpu"))
    for available, place in ((space, f"on the disk of {atomic_io.cache_dir()}"), (free, "of memory")):
        if needed > available:
            raise BaseModelError(
                f"{source.path} takes {needed / 1e9:.1f} GB {place} in float32, and "
                f"{available / 1e9:.1f} GB are free: free some, or use a smaller base."
            )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(link.parent, gguf_file=link.name)
    if len(tokenizer) > len(source.metadata["tokenizer.ggml.tokens"]):  # its class adds tokens
        tokenizer = PreTrainedTokenizerFast.from_pretrained(link.parent, gguf_file=link.name)
    _check_tokenizer(tokenizer, source, notify)
    _check_tensors_used(empty, source)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        link.parent,
        gguf_file=link.name,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model: PreTrainedModel = loaded[0]
    loading_info: dict[str, set[object]] = loaded[1]
    for key, problem in (
        ("missing_keys", "lacks tensors of the model"),
        ("mismatched_keys", "has tensors of other shapes than its settings say"),
        ("unexpected_keys", "has tensors that transformers does not use"),
    ):
        found = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in loading_info[key])
        if found:
            raise BaseModelError(_not_in_full(source.path, f"it {problem}, such as {found[0]}"))
    quantization.mark_dequantized(model)
    if model.generation_config is not None and source.end_ids:
        model.generation_config.eos_token_id = source.end_ids
    return model, tokenizer


def _not_in_full(path: Path, problem: str) -> str:
    return f"{path} cannot be read in full: {problem}. Use the model that it was made from."


def _check_tensors_used(model: PreTrainedModel, source: _GgufModel) -> None:
    """Raise BaseModelError for tensors that transformers would skip in silence."""
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    if source.architecture in GGUF_CONFIG_ARCHS:  # its loader reports what it skips
        return
    processor = TENSOR_PROCESSORS.get(source.architecture, TensorProcessor)(config=model.config.to_dict())
    known = get_gguf_hf_weights_map(model, processor)
    for name in source.tensor_names:
        if name in gguf_config.TENSORS_IN_CONFIG or name == "output.weight":
            continue
        if name not in known and name.removesuffix(".weight") not in known:
            raise BaseModelError(_not_in_full(source.path, f"transformers does not read its tensor {name}"))


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, source: _GgufModel, notify: EventHandler) -> None:
    """Give the tokenizer what transformers leaves out; raise BaseModelError for other token ids."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokens: list[str] = source.metadata["tokenizer.ggml.tokens"]
    if len(tokenizer) > len(tokens):
        added = tokenizer.convert_ids_to_tokens(len(tokens))
        raise BaseModelError(_not_in_full(source.path, f"transformers adds the token {added!r} to its tokenizer"))
    for name in ("bos_token", "eos_token"):
        number = source.metadata.get(f"tokenizer.ggml.{name}_id")
        if number is not None and getattr(tokenizer, f"{name}_id") != number:
            raise BaseModelError(_not_in_full(source.path, f"transformers reads another {name} than {number}"))
    if tokenizer.eos_token is None and source.end_ids:
        tokenizer.eos_token = tokens[source.end_ids[0]]
    pre = str(source.metadata.get("tokenizer.ggml.pre", "default"))
    is_byte_level = source.metadata["tokenizer.ggml.model"] == "gpt2"
    if is_byte_level and pre not in GGUF_PRE_TOKENIZER_SPLITS and pre not in _LIKE_GPT2:
        notify(
            Notice(
                f"{source.path} splits text by the rule {pre}, which transformers does not know: "
                "it is split as for GPT-2, so some token ids may differ from those in llama.cpp."
            )
        )
    names = source.metadata.get("tokenizer.chat_templates")
    named = {name: source.metadata.get(f"tokenizer.chat_template.{name}") for name in names or ()}
    templates = {name: template for name, template in named.items() if isinstance(template, str)}
    if templates and isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = {"default": tokenizer.chat_template, **templates}
