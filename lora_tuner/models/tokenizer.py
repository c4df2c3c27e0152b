"""Tokenizers of bases, and of adapters that bring their own template, end of text or added tokens.

TRL, axolotl and LLaMA-Factory save the tokenizer beside an adapter. Its token ids must be those of
the base, because the weights were trained on ids. Nothing in these files is executed: transformers
renders templates in jinja's sandbox. Limit: of a SentencePiece model only its equality is checked.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..adapters.adapter import Adapter
from ..adapters.manifest import SCHEMA_VERSION, BaseInfo
from ..config import ModelOptions
from ..errors import AdapterError, BaseModelError, Notice, first_line
from . import identity
from .base_files import BaseModelFiles, loading_errors, quiet_transformers

TEMPLATE_FILE, SETTINGS_FILE, VOCABULARY_FILE = "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"
_MAX_BYTES = 64_000_000  # of a file; tokenizers have up to 35 MB
ChatTemplate = str | dict[str, str]


@dataclass
class TokenizedBase:
    """A base of which only the tokenizer is in memory."""

    files: BaseModelFiles
    tokenizer: PreTrainedTokenizerBase

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the input embedding has rows for."""
        return self.files.vocab_size or len(self.tokenizer)

    @cached_property
    def tokenizer_hash(self) -> str:
        """sha256 over all that decides token ids."""
        names = type(self.tokenizer).vocab_files_names.values()
        return self.files.tokenizer_hash(names, is_fast=self.tokenizer.is_fast)

    @cached_property
    def _schema_1_tokenizer_hash(self) -> str:
        special = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        return identity.hash_json([sorted(self.tokenizer.get_vocab().items()), special])

    def info(self, *, with_template: bool, schema_version: int = SCHEMA_VERSION) -> BaseInfo:
        """Describe this base and its tokenizer for a manifest.

        Args:
            with_template: of an adapter that is trained on conversations, so that the chat template
                counts.
            schema_version: schema of the manifest.
        """
        if schema_version == 1:
            return self.files.base_info(self._schema_1_tokenizer_hash, schema_version=1)
        template = identity.hash_json(self.tokenizer.chat_template) if with_template else None
        return self.files.base_info(self.tokenizer_hash, template)


def load_tokenizer(files: BaseModelFiles) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with the end-of-text token as pad token.

    Raises:
        BaseModelError: the tokenizer cannot be loaded, or has no end-of-text token.
    """
    from transformers import AutoTokenizer  # imports torch

    with quiet_transformers(), loading_errors(files):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise BaseModelError(f"The tokenizer of {files.name} has no end-of-text token, so no text could end.")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_adapter_tokenizer(
    adapter: Adapter,
    base: TokenizedBase,
    options: ModelOptions = ModelOptions(),
    load: Callable[[Path], PreTrainedTokenizerBase] | None = None,
) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of an adapter; None where it equals the base's or there is none.

    A chat template of its own is said in a notice. `options.force` turns the error into a notice.
    `load` reads a folder in place of transformers' AutoTokenizer, which imports torch.

    Raises:
        AdapterError: its token ids are not those of the base, or its files are invalid.
    """
    settings = _read_object(adapter.path / SETTINGS_FILE)
    template = _chat_template(adapter.path, settings)
    vocabulary = _vocabulary(adapter.path, settings)
    rows = adapter.replaced.vocab_size(base.vocab_size)
    known = base.tokenizer.get_vocab() | vocabulary
    if lacking := [token for token, number in adapter.added_tokens.items() if known.get(token) != number]:
        raise AdapterError(
            f"{adapter.name} has added {lacking[0]} to the tokenizer, and its tokenizer files lack it: restore them."
        )
    if problem := _compare_ids(vocabulary, base, rows) or _compare_sentencepiece(adapter.path, base):
        problem = f"{adapter.name} brings another tokenizer than that of {base.files.name}: {problem}"
        if not options.force:
            raise AdapterError(
                f"{problem}. Name the base that it was trained on with --base, or use --force to ignore its tokenizer."
            )
        options.notify(Notice(f"FORCED: {problem}. Its tokenizer is ignored."))
        return None
    base_vocabulary = base.tokenizer.get_vocab()
    eos = _token_text(settings.get("eos_token"))
    if eos is None or not ({eos} & {*vocabulary, *base_vocabulary}):
        eos = base.tokenizer.eos_token
    has_own_template = template not in (None, base.tokenizer.chat_template)
    if vocabulary.keys() - base_vocabulary:
        tokenizer = _load_tokenizer(adapter.path, load)
        tokenizer.chat_template = template or base.tokenizer.chat_template
    elif has_own_template or eos != base.tokenizer.eos_token:
        tokenizer = copy.deepcopy(base.tokenizer)
        tokenizer.chat_template = template or tokenizer.chat_template
    else:
        return None
    tokenizer.eos_token = tokenizer.pad_token = eos
    if has_own_template:
        options.notify(Notice(f"{adapter.name} has its own chat template: its conversations use it."))
    return tokenizer


def _compare_ids(vocabulary: Mapping[str, int], base: TokenizedBase, rows: int) -> str | None:
    """The first difference between an adapter's tokens and the base's; None if they agree.

    `rows` is the number of token ids that base and adapter have embeddings for.
    """
    base_vocabulary = base.tokenizer.get_vocab()
    for token, number in vocabulary.items():
        if base_vocabulary.get(token, number) != number:
            return f"the token {token!r} has the id {number:,}, and {base_vocabulary[token]:,} in the base"
    without_row = sorted(token for token, number in vocabulary.items() if number >= rows)
    if without_row:
        return (
            f"{len(without_row):,} of its tokens, such as {without_row[0]!r}, are beyond the "
            f"{rows:,} rows of the base's embeddings, which were resized for it"
        )
    return None


def _compare_sentencepiece(folder: Path, base: TokenizedBase) -> str | None:
    own, other = folder / "tokenizer.model", base.files.folder / "tokenizer.model"
    if (folder / VOCABULARY_FILE).is_file() or not own.is_file() or not other.is_file():
        return None
    return None if _read_bytes(own) == _read_bytes(other) else "tokenizer.model differs"


def has_chat_template(folder: Path) -> bool:
    """Return whether an adapter brings a chat template; False for one that cannot be read."""
    try:
        return _chat_template(folder, _read_object(folder / SETTINGS_FILE)) is not None
    except AdapterError:
        return False


def _chat_template(folder: Path, settings: Mapping[str, object]) -> ChatTemplate | None:
    """The chat template, by its name where there are several, as transformers reads it."""
    if (folder / TEMPLATE_FILE).is_file():
        return _decode(folder / TEMPLATE_FILE)
    template = _read_object(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = {str(entry.get("name")): str(entry.get("template")) for entry in entries}
    if template is not None and not isinstance(template, str | dict):
        raise AdapterError(f"{folder / SETTINGS_FILE}: chat_template is neither a text nor a list of texts.")
    return template or None


def _vocabulary(folder: Path, settings: Mapping[str, object]) -> dict[str, int]:
    """Token -> id of all files that the adapter has."""
    vocabulary: dict[str, int] = {}
    if (folder / VOCABULARY_FILE).is_file():
        try:
            tokenizer = Tokenizer.from_str(_decode(folder / VOCABULARY_FILE))
        except Exception as error:  # the library raises plain exceptions
            raise AdapterError(f"{folder / VOCABULARY_FILE} is no valid tokenizer: {error}.") from error
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for name in ("vocab.json", "added_tokens.json"):
        vocabulary |= {
            token: number for token, number in _read_object(folder / name).items() if type(number) is int
        }
    added = settings.get("added_tokens_decoder")
    for number, token in (added if isinstance(added, dict) else {}).items():
        if (text := _token_text(token)) is not None and str(number).isdecimal():
            vocabulary[text] = int(number)
    return vocabulary


def _token_text(token: object) -> str | None:
    """A token in tokenizer_config.json: its text, or an object with it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _load_tokenizer(
    folder: Path, load: Callable[[Path], PreTrainedTokenizerBase] | None
) -> PreTrainedTokenizerBase:
    try:
        with quiet_transformers():
            if load is not None:
                return load(folder)
            from transformers import AutoTokenizer

            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            return tokenizer
    except Exception as error:  # a stranger's files may fail in any way
        raise AdapterError(f"The tokenizer in {folder} cannot be loaded: {first_line(error)}") from error


def _read_object(path: Path) -> dict[str, object]:
    """A JSON object; empty without the file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_decode(path))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not readable as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: it is not a JSON object.")
    return value


def _decode(path: Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8")
    except ValueError as error:
        raise AdapterError(f"{path} is not valid UTF-8.") from error


def _read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise AdapterError(f"{path} is too large: at most {_MAX_BYTES:,} bytes are read.")
        return path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}.") from error
