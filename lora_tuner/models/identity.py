"""Hashes that tell a base, its tokenizer and its chat template from any other.

Everything in their files counts but for two short lists of settings that change no result. Files
count as they are, not as a version of transformers completes them. Manifests of schema 1 have
hashes by an older rule, a list of the settings that counted; they are compared by that rule.
Nothing here imports torch.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .. import atomic_io
from ..errors import EventHandler
from . import stored_weights

# config.json, at any depth: the writer of the file and its place; the dtype, which is chosen on
# loading and recorded by itself; the cache, which each call turns on or off.
_NEUTRAL_CONFIG = frozenset(
    {"transformers_version", "_name_or_path", "_commit_hash", "torch_dtype", "dtype", "use_cache"}
)
# tokenizer_config.json and special_tokens_map.json: the place; padding and truncation, which are
# this tool's own; decoding; the chat template, which has its own hash.
_NEUTRAL_TOKENIZER = frozenset(
    {
        *("name_or_path", "tokenizer_file", "special_tokens_map_file", "is_local", "processor_class", "auto_map"),
        *("model_max_length", "max_length", "pad_token", "padding_side", "truncation_side", "stride"),
        *("pad_to_multiple_of", "pad_token_type_id", "truncation_strategy"),
        *("clean_up_tokenization_spaces", "chat_template"),
    }
)
_NEUTRAL_VOCABULARY = frozenset({"version", "padding", "truncation"})  # tokenizer.json
# Without a tokenizer.json transformers looks for these, whatever the class of the tokenizer names.
_VOCABULARY_FILES = (
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "added_tokens.json"),
)
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_SCHEMA_1_CONFIG = re.compile(r"head|act|eps|rope|rotary|window|tie_word|attn|attention|scale|scaling|multiplier")


def hash_json(value: object) -> str:
    """sha256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def effective_config(config: object) -> object:
    """A config without the settings that change no result, at any depth."""
    if isinstance(config, list):
        return [effective_config(value) for value in config]
    if not isinstance(config, dict):
        return config
    return {key: effective_config(value) for key, value in config.items() if key not in _NEUTRAL_CONFIG}


def schema_1_config(config: Mapping[str, object]) -> dict[str, object]:
    """The settings that counted in manifests of schema 1."""
    return {key: value for key, value in config.items() if _SCHEMA_1_CONFIG.search(key)}


def weights_hash(folder: Path, notify: EventHandler) -> str:
    """sha256 over name, dtype, shape and bytes of all tensors that are loaded.

    Their split into files does not count. It comes from the user's cache where the files are
    unchanged.
    """
    paths = stored_weights.weight_files(folder)

    def compute() -> str:
        tensors = {name: digest for path in paths for name, digest in stored_weights.tensor_hashes(path)}
        return hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()

    return _cached_hash(folder, paths, compute, notify)


def file_hash(path: Path, notify: EventHandler) -> str:
    """sha256 of a large file, from the user's cache where it is unchanged."""
    return _cached_hash(path, [path], lambda: atomic_io.sha256_file(path), notify)


def _cached_hash(place: Path, paths: list[Path], compute: Callable[[], str], notify: EventHandler) -> str:
    """The hash of the files at a place, computed again if their size, time or inode has changed."""
    files = [(path.name, path.stat()) for path in paths]
    identity = [[name, file.st_size, file.st_mtime_ns, file.st_ino] for name, file in files]
    place_hash = hashlib.sha256(str(place.resolve()).encode()).hexdigest()
    cache = atomic_io.cache_dir() / "fingerprints" / f"{place_hash}-2.json"
    cached = atomic_io.read_cache(cache, notify)
    if isinstance(cached, dict) and cached["identity"] == identity:
        return str(cached["weights"])
    weights = compute()
    atomic_io.write_cache(cache, {"identity": identity, "weights": weights})
    return weights


def tokenizer_hash(folder: Path, vocabulary_files: Iterable[str], *, is_fast: bool) -> str:
    """sha256 over all that decides token ids: vocabulary, merges, normalizer, pre-tokenizer,
    post-processor, added tokens, and the settings beside them.

    Args:
        vocabulary_files: names of the files of this kind of tokenizer.
        is_fast: a tokenizer.json takes the place of all others, with those for other versions of
            transformers that tokenizer_config.json lists.
    """
    parts: dict[str, object] = {
        name: _read_object(folder / name, _NEUTRAL_TOKENIZER)
        for name in _SETTINGS_FILES
        if (folder / name).is_file()
    }
    if is_fast and (folder / "tokenizer.json").is_file():
        settings = parts.get("tokenizer_config.json")
        by_version = settings.get("fast_tokenizer_files", []) if isinstance(settings, dict) else []
        for name in {"tokenizer.json", *by_version}:
            parts[name] = _read_object(folder / name, _NEUTRAL_VOCABULARY)
    else:
        for name in {*vocabulary_files, *_VOCABULARY_FILES} - {*_SETTINGS_FILES}:
            if (folder / name).is_file():
                parts[name] = atomic_io.sha256_file(folder / name)
    return hash_json(parts)


def _read_object(path: Path, neutral: frozenset[str]) -> dict[str, object]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in neutral}
