"""New tokens of an adapter: in the tokenizer, in embedding and output head, trained through PEFT.

A token takes the next id of the tokenizer. Where embedding and head have spare rows it takes one,
else both are resized for training; wherever the adapter is used, its rows lie beside the base
(`replaced`). Surprise: the forward pass of PEFT's trainable tokens (peft 0.21.2,
tuners/trainable_tokens) copies all of the embedding and the head in each step, and its backward
pass computes a gradient for all of them. So PEFT keeps the parameters, and hooks compute with them.
A token is no special token in the sense of transformers: that would be read as plain text in data
and prompts, and left out of what is generated. It is what Qwen's <think> is: never split, visible.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn
from transformers import AddedToken, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.adapter import Adapter
from ..data.tokenization import TokenIds, token_ids
from ..errors import AdapterError, ConfigError, EventHandler, Notice
from ..text import format_names
from .base_files import BaseModelFiles, quiet_transformers
from .loading import LoadedBase
from .lora import ADAPTER_NAME
from .replaced import is_tied, load_replaced, mean_row, other_token_tables, vocabulary_modules
from .replacement import ReplacedHook, Replacement, Rows, remove_hooks
from .tokenizer import TokenizedBase, load_adapter_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.utils.other import TrainableTokensWrapper


@dataclass(frozen=True)
class AddedTokens:
    """Tokens of a run that are not the base's, and the rows that it trains.

    Args:
        new: tokens that this run adds -> their ids.
        inherited: those of the parent -> their ids.
        trained: ids of the rows that are trained, ascending; the parent may have rows of other
            tokens too.
        tokenizer: is saved with the adapter.
        rows: rows of the parent by module.
    """

    new: dict[str, int]
    inherited: dict[str, int]
    trained: list[int]
    tokenizer: PreTrainedTokenizerBase
    rows: dict[str, Rows] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, int]:
        return self.inherited | self.new


def extend_tokenizer(
    base: TokenizedBase, tokens: Sequence[str], parent: Adapter | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Add tokens to the tokenizer of a base: those of a parent adapter, then others.

    Returns:
        The others and the parent's, each token -> id.

    Raises:
        ConfigError: a token exists, or the tokenizer cannot read or write it as one.
        AdapterError: the parent has rows of tokens that its tokenizer does not have.
    """
    tokenizer, name = base.tokenizer, base.files.name
    inherited = _tokens_of(parent, base) if parent is not None and parent.replaced.rows else {}
    owners = dict.fromkeys(tokenizer.get_vocab(), f"the tokenizer of {name}")
    owners |= {token.content: f"the adapter {parent and parent.name}" for token in inherited.values()}
    if existing := [f"{token} in {owners[token]}" for token in tokens if token in owners]:
        raise ConfigError(f"add_tokens: some exist already, so leave them out: {format_names(existing)}.")
    if single := [token for token in tokens if len(_encode(tokenizer, token)) == 1]:
        raise ConfigError(f"add_tokens: {format_names(single)} is one token of {name} already: leave it out.")
    tokenizer.add_tokens([*inherited.values()])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    vocabulary = tokenizer.get_vocab()
    for number, token in inherited.items():
        if vocabulary[token.content] != number:
            raise AdapterError(
                f"{parent and parent.name} has the id {number:,} for {token.content}, which "
                f"{name} does not give it: merge it, and train on the result."
            )
    new = {token: vocabulary[token] for token in tokens}
    for text, number in new.items():
        written = str(tokenizer.decode([number], clean_up_tokenization_spaces=False)).strip()
        if _encode(tokenizer, f"a{text}b").count(number) != 1 or written != text:
            raise ConfigError(
                f"add_tokens: the tokenizer of {name} does not read and write {text} as one "
                "token: use others, such as <|note|>."
            )
    return new, {token.content: number for number, token in inherited.items()}


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, read as rows and prompts are."""
    encoded: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]
    return encoded


def _tokens_of(parent: Adapter, base: TokenizedBase) -> dict[int, AddedToken]:
    """Tokens with rows in an adapter that the base's tokenizer lacks, by their ids, ascending."""
    own = load_adapter_tokenizer(parent, base)
    known = own.added_tokens_decoder if own is not None else {}
    trained = sorted({number for ids in parent.replaced.rows.values() for number in ids})
    vocabulary = base.tokenizer.get_vocab()
    ids = set(vocabulary.values())
    if missing := [number for number in trained if number not in ids and number not in known]:
        raise AdapterError(
            f"{parent.name} has a row for the token {missing[0]:,}, but no tokenizer that tells "
            "which token it is: merge it, and train on the result."
        )
    return {number: known[number] for number in trained if number not in ids}


def add_tokens(base: LoadedBase, tokens: Sequence[str], parent: Adapter | None) -> AddedTokens | None:
    """Give tokenizer, embedding and output head of a base the tokens of a run; None without any.

    Raises:
        ConfigError: a token exists, or the base cannot have more tokens.
        AdapterError: the tokens of the parent cannot be trained further.
    """
    if parent is not None and parent.replaced.modules:
        raise AdapterError(
            f"{parent.name} has weights in place of the base's ({parent.replaced}), which "
            f"training does not continue: merge it (`python cli.py merge {parent.name} --out "
            f"merged/{parent.name}`), and train on the result."
        )
    if not tokens and not (parent and parent.replaced.rows):
        return None
    rows = {}
    if parent is not None:
        replaced = load_replaced(parent, base)
        rows = {module: replacement.rows for module, replacement in replaced.items() if replacement.rows}
        if is_tied(base.model) and len({id(rows.get(module)) for module in vocabulary_modules(base.model)}) > 1:
            raise AdapterError(
                f"{parent.name} has other rows for the output head than for the embedding, which "
                f"{base.files.name} ties: merge it, and train on the result."
            )
    tokenizer = _original_tokenizer(base.files)
    original = TokenizedBase(base.files, tokenizer)
    new, inherited = extend_tokenizer(original, tokens, parent)
    extend_tokenizer(base, tokens, parent)
    trained = sorted({*new.values(), *(number for ids, _ in rows.values() for number in ids.tolist())})
    _make_room(base, trained)
    return AddedTokens(new, inherited, trained, tokenizer, rows)


def _original_tokenizer(files: BaseModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer of a base as it is saved; the one in memory has another pad token."""
    with quiet_transformers():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False)
    return tokenizer


def _make_room(base: LoadedBase, trained: Sequence[int]) -> None:
    """Give embedding and head rows for these ids, where they have none: the mean of the others."""
    problem = _why_no_room(base, trained)
    if problem is None and trained[-1] >= base.vocab_size:
        problem = _resize(base, trained)
    if problem is not None:
        raise ConfigError(f"add_tokens: {base.files.name} cannot have more tokens: {problem}.")
    base.__dict__.pop("head_size", None)


def _why_no_room(base: LoadedBase, trained: Sequence[int]) -> str | None:
    """The reason for which a base cannot have rows for these ids; None if there is none."""
    embedding, head = base.model.get_input_embeddings(), base.model.get_output_embeddings()
    rows = base.vocab_size
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        return f"its embedding and output head are {type(embedding).__name__} and {type(head).__name__}, not plain layers"
    if head.bias is not None:
        return "its output head has a bias, which PEFT leaves out where single rows are trained"
    if len(head.weight) != rows:
        return f"its embedding has {rows:,} rows, and its output head {len(head.weight):,}"
    if beyond := [number for number in range(rows, trained[-1]) if number not in set(trained)]:
        return (
            f"its tokenizer has tokens beyond the {rows:,} rows of its embedding, such as "
            f"{beyond[0]:,}: resize it first (resize_token_embeddings)"
        )
    if trained[-1] >= rows and (others := other_token_tables(base.model)):
        return f"{others[0]} has a row for each token too, and PEFT would not save the new ones"
    return None


def _resize(base: LoadedBase, trained: Sequence[int]) -> str | None:
    """Resize embedding and head for these ids; the reason, if the base computes something else then."""
    model, rows = base.model, base.vocab_size
    means = {kind: mean_row(model.get_submodule(module)) for module, kind in vocabulary_modules(model).items()}
    probe = torch.arange(6, device=base.device)[None] + rows // 2
    added = torch.tensor([trained[-4:]], device=base.device)
    try:
        with quiet_transformers(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            before = model(input_ids=probe, use_cache=False).logits
            model.resize_token_embeddings(trained[-1] + 1, mean_resizing=False)
            for module, kind in vocabulary_modules(model).items():
                weight = model.get_submodule(module).get_parameter("weight")
                weight[rows:] = means[kind].to(weight)
            after = model(input_ids=torch.cat([probe, added], 1), use_cache=False).logits
        model.requires_grad_(False)
    except Exception as error:  # models raise errors of any type
        return f"it cannot be resized ({' '.join(str(error).split())[:200] or type(error).__name__})"
    largest = float(before.abs().max())
    if after.shape[-1] != trained[-1] + 1 or not torch.allclose(
        after[:, :6, :rows].float(), before.float(), rtol=0.01, atol=0.01 * largest
    ):
        return "resized, it computes something else for its own tokens"
    return None


def token_indices(base: LoadedBase, added: AddedTokens | None) -> list[int] | dict[str, list[int]] | None:
    """`trainable_token_indices` of PEFT: rows of the embedding, and of a head that is not tied to it."""
    if added is None:
        return None
    if is_tied(base.model):
        return added.trained
    return dict.fromkeys(vocabulary_modules(base.model), added.trained)


def train_rows(model: PeftModel, base: LoadedBase, added: AddedTokens) -> None:
    """Give PEFT's rows their first values, and compute with them beside the frozen modules.

    New tokens begin with the mean of all rows, those of the parent with its own.
    """
    from peft.utils.other import TrainableTokensWrapper

    kinds = {"embedding": base.model.get_input_embeddings(), "head": base.model.get_output_embeddings()}
    names = {module: name for name, module in base.model.named_modules()}
    ids, new = torch.tensor(added.trained, device=base.device), set(added.new.values())
    for kind, wrapper in kinds.items():
        if not isinstance(wrapper, TrainableTokensWrapper):
            raise ConfigError(f"add_tokens: PEFT does not train the rows of the {kind} of {base.files.name}.")
        layer = cast(nn.Embedding | nn.Linear, wrapper.token_adapter.base_layer)
        values = wrapper.token_adapter.trainable_tokens_delta[ADAPTER_NAME]
        parent_ids, parent_values = added.rows.get(names[wrapper], (ids[:0], values[:0]))
        with torch.no_grad():
            for index, number in enumerate(added.trained):
                if number in new:
                    values[index] = mean_row(layer)
                elif number in parent_ids.tolist():
                    values[index] = parent_values[parent_ids.tolist().index(number)]
        hook = ReplacedHook([Replacement(kind, len(layer.weight), None, (ids, values), partial(_is_on, wrapper))])
        remove_hooks(layer)
        layer.register_forward_hook(hook)
        wrapper.forward = partial(layer)  # type: ignore[method-assign]


@contextlib.contextmanager
def unwrapped(model: PreTrainedModel) -> Iterator[None]:
    """Take PEFT's wrappers of embedding and head out of a model: its EVA would adapt them as layers."""
    from peft.utils.other import TrainableTokensWrapper

    wrappers = {
        name: module for name, module in model.named_modules() if isinstance(module, TrainableTokensWrapper)
    }
    try:
        for name, wrapper in wrappers.items():
            model.set_submodule(name, wrapper.original_module)
        yield
    finally:
        for name, wrapper in wrappers.items():
            model.set_submodule(name, wrapper)


def _is_on(wrapper: TrainableTokensWrapper) -> bool:
    return not wrapper.disable_adapters


def check_used(
    added: AddedTokens | None, rows: Sequence[Sequence[TokenIds]], notify: EventHandler, *, streaming: bool
) -> None:
    """Report new tokens that training rows lack. Raises ConfigError where they lack all of them."""
    if added is None or not added.new:
        return
    wanted = np.array([*added.new.values()])
    used: set[int] = set()
    for row in (row for source_rows in rows for row in source_rows):
        ids = token_ids(row)
        used.update(ids[np.isin(ids, wanted)].tolist())
    unused = [token for token, number in added.new.items() if number not in used]
    advice = "as --preview shows them: cleaning takes out HTML tags, --clean none does not"
    if len(unused) == len(added.new) and not streaming:
        raise ConfigError(f"add_tokens: no training row has {format_names(unused)}, {advice}.")
    if unused:
        which = "none of the first training rows" if streaming else "no training row"
        notify(Notice(f"{format_names(unused)}: {which} has this token, {advice}."))


def input_notice(added: AddedTokens) -> Notice:
    """Tell the ids of new tokens."""
    listed = format_names([f"{token} ({number:,})" for token, number in added.all.items()])
    return Notice(f"Tokens with rows of their own, trained with the adapter: {listed}.")
