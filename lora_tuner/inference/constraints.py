"""Constrain outputs to a grammar: a mask over the next token, by llguidance.

A grammar is compiled once for each tokenizer, and every sequence follows it in a copy of its own.
JSON is written compactly, or with one space after commas and colons, so that white space never goes
on. Limits: tokenizers of bytes alone (byte-level BPE, or with byte fallback); keys that a JSON
schema does not name may repeat, so it cannot ask for two of them.
"""

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..data.chat_template import turn_end_ids
from ..errors import GenerationError, RequestError
from ..models.loading import LoadedBase
from ..text import format_count

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

GrammarKind = Literal["json", "regex", "choice", "grammar", "lark"]
MAX_GRAMMAR_CHARS = 131_072
CACHED_GRAMMARS = 16  # of a tokenizer; each may take tens of MB in the worst case
MAX_REASON_CHARS = 300
JSON_OPTIONS: "JsonCompileOptions" = {
    "item_separator": ", ?",
    "key_separator": ": ?",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "coerce_one_of": False,
    "lenient": False,
}
# Bounds of one compilation (about a second) and of one mask (milliseconds), as others wait for both.
MAX_GRAMMAR_SYMBOLS = 100_000
MAX_LEXER_STATES = 50_000  # of 1 to 2 kB each
MAX_STEP_ITEMS = 50_000  # about 20,000 in a millisecond


@dataclass(frozen=True)
class Grammar:
    """The form of an output.

    `text` is a JSON schema, a regular expression in Rust's syntax, a JSON list of texts, a grammar
    as GBNF or in llguidance's Lark, or Lark for certain. `field` of the request is named in errors.
    """

    kind: GrammarKind
    text: str
    field: str


def end_token_ids(base: LoadedBase, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of all tokens that end a text: those of the base, the tokenizer, its template."""
    own = frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})
    return base.eos_token_ids | own | turn_end_ids(tokenizer)


class Constraint:
    """The state of one sequence in its grammar."""

    def __init__(self, matcher: "LLMatcher", end_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._end_ids = end_ids

    def copy(self) -> "Constraint":
        """Return the same state for another sequence."""
        return Constraint(self._matcher.deep_copy(), self._end_ids)

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits (vocabulary,) with -inf for each token that may not follow; a token that
        ends the text may follow exactly where the grammar may end.

        Raises GenerationError where nothing may follow, or a limit is reached.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").view(
            bool
        )  # ids beyond it may not follow
        accepting = self._matcher.is_accepting()
        allowed[[token for token in self._end_ids if token < len(logits)]] = accepting
        if self._matcher.is_error() or not allowed.any():
            reason = _first_line(self._matcher.get_error()) or "no token of this base goes on with it"
            raise GenerationError(f"The grammar of this request cannot be followed any further: {reason}.")
        return torch.where(torch.from_numpy(allowed).to(logits.device), logits, -torch.inf)

    def advance(self, token: int) -> bool:
        """Take the next token of the sequence. Returns True if the grammar ends with it."""
        self._matcher.consume_token(token)
        return self._matcher.is_stopped() and not self._matcher.is_error()


class GrammarCompiler:
    """Compiles grammars for the tokenizers of one base, and keeps the last ones. For one thread."""

    def __init__(self, base: LoadedBase) -> None:
        self.base = base
        self._tokenizers: WeakKeyDictionary[PreTrainedTokenizerBase, LLTokenizer] = WeakKeyDictionary()
        self._compiled: WeakKeyDictionary[PreTrainedTokenizerBase, OrderedDict[Grammar, Constraint]] = (
            WeakKeyDictionary()
        )

    def compile(self, grammar: Grammar, tokenizer: PreTrainedTokenizerBase) -> Constraint:
        """Return a grammar at its beginning, for a tokenizer of this base; each sequence needs a copy.

        Raises RequestError, with the field and the reason, if it is invalid, too large, or has a
        part that is not supported.
        """
        cache = self._compiled.setdefault(tokenizer, OrderedDict())
        if grammar not in cache:
            cache[grammar] = self._compile(grammar, tokenizer)
            if len(cache) > CACHED_GRAMMARS:
                cache.popitem(last=False)
        cache.move_to_end(grammar)
        return cache[grammar]

    def _compile(self, grammar: Grammar, tokenizer: PreTrainedTokenizerBase) -> Constraint:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise RequestError(
                f"{grammar.field}: this server lacks llguidance: pip install 'lora_tuner[serve]'.", grammar.field
            ) from error
        if len(grammar.text) > MAX_GRAMMAR_CHARS:
            raise RequestError(
                f"{grammar.field}: it has {format_count(len(grammar.text), 'character')}; "
                f"the limit is {MAX_GRAMMAR_CHARS:,}.",
                grammar.field,
            )
        ll_tokenizer = self._ll_tokenizer(tokenizer, grammar.field)
        try:
            serialized = _serialize(grammar)
        except Exception as error:  # the converter of GBNF raises errors of several types
            reason = "it is nested too deeply." if isinstance(error, RecursionError) else str(error)
            raise RequestError(f"{grammar.field}: {_first_line(reason)}", grammar.field) from error
        limits = LLParserLimits(
            max_grammar_size=MAX_GRAMMAR_SYMBOLS,
            max_lexer_states=MAX_LEXER_STATES,
            step_max_items=MAX_STEP_ITEMS,
            verbose_errors=False,
        )
        matcher = LLMatcher(ll_tokenizer, serialized, log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(f"{grammar.field}: {_first_line(matcher.get_error())}", grammar.field)
        return Constraint(matcher, end_token_ids(self.base, tokenizer))

    def _ll_tokenizer(self, tokenizer: PreTrainedTokenizerBase, field: str) -> "LLTokenizer":
        if tokenizer not in self._tokenizers:
            from llguidance.hf import from_tokenizer

            end_ids = sorted(end_token_ids(self.base, tokenizer) & set(tokenizer.get_vocab().values()))
            try:
                if not isinstance(tokenizer, PreTrainedTokenizerFast):
                    raise ValueError("it is written in Python")
                self._tokenizers[tokenizer] = from_tokenizer(tokenizer, eos_token=end_ids or None)
            except ValueError as error:
                raise RequestError(
                    f"{field}: not supported for this base, whose tokenizer does not write bytes "
                    f"({_first_line(str(error))}).",
                    field,
                ) from error
        return self._tokenizers[tokenizer]


def _serialize(grammar: Grammar) -> str:
    """Return a grammar as llguidance reads it."""
    from llguidance import LLMatcher, grammar_from

    if grammar.kind == "json":
        _check_key_counts(json.loads(grammar.text))
        return LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_OPTIONS)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text))
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")
    return grammar.text if grammar.kind == "lark" else grammar_from("grammar", grammar.text)


def _check_key_counts(schema: object) -> None:
    """Raise ValueError if a schema, or a part of it, asks for more keys than it names, as they may repeat."""
    if isinstance(schema, list):
        for part in schema:
            _check_key_counts(part)
    if not isinstance(schema, dict):
        return
    count, required = schema.get("minProperties"), schema.get("required")
    named = len(set(map(str, required))) if isinstance(required, list) else 0
    if isinstance(count, int) and count > max(named, 1):
        raise ValueError(f"minProperties is {count}, but only {named} keys are required, and others may repeat.")
    for part in schema.values():
        _check_key_counts(part)


def _first_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON_CHARS else f"{line[:MAX_REASON_CHARS]}..."
