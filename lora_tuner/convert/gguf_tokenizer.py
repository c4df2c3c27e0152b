"""Write a tokenizer into a GGUF file: vocabulary, pre-tokenizer, special tokens, chat template.

Everything is read from the tokenizer as transformers loads it, never from its name, so the file
gives the token ids that this tool gives. llama.cpp knows a fixed list of pre-tokenizers, by regular
expressions (llama.cpp, `src/llama-vocab.cpp`, November 2026); one that is not among them is
refused. Limit: llama.cpp normalizes no text, which a notice says where it matters.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..data.chat_template import turn_end_ids
from ..errors import BaseModelError, EventHandler, Notice
from ..text import format_names

if TYPE_CHECKING:
    from gguf import GGUFWriter

_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_CASED_TAIL = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_UPPER, _LOWER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
_WORD = "[^\\r\\n\\p{L}\\p{N}]?"
_CL100K = f"{_CONTRACTIONS}|{_WORD}\\p{{L}}+|\\p{{N}}{{1,3}}{_TAIL}"
_PUNCTUATION, _DIGIT = "punctuation", "\\p{N}"
# (regular expressions, merges are ignored for whole words) -> `tokenizer.ggml.pre`
_PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_CL100K,), False): "dbrx",
    ((_CL100K,), True): "llama-bpe",
    ((f"{_CONTRACTIONS}|{_WORD}\\p{{L}}+|\\p{{N}}{_TAIL}",), False): "qwen2",
    (
        (f"{_CONTRACTIONS}|{_WORD}[\\p{{L}}\\p{{M}}]+|\\p{{N}}| ?[^\\s\\p{{L}}\\p{{M}}\\p{{N}}]+[\\r\\n]*"
         "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",), False,
    ): "qwen35",
    ((f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\\p{{N}}{_CASED_TAIL}",), True): "tekken",
    (
        (f"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
         f"|\\p{{N}}{{1,3}}{_CASED_TAIL}",), False,
    ): "gpt-4o",
    ((" ?[^(\\s|[.,!?…。，、।۔،])]+",), False): "bloom",
    ((_PUNCTUATION, _GPT2, "[0-9][0-9][0-9]"), False): "falcon",
}  # fmt: skip
_STRIPPED = re.compile("phi-?3", re.IGNORECASE)  # in the name of a model
_KEPT = ("<unk>", "<s>", "<|endoftext|>")
Spec = Mapping[str, Any]  # a part of tokenizer.json
_SPACE = "▁"  # in SentencePiece's tokens


def add_tokenizer(
    writer: "GGUFWriter",
    tokenizer: PreTrainedTokenizerBase,
    spec: Spec,
    rows: int,
    folder: Path,
    notify: EventHandler,
) -> None:
    """Add the tokenizer to a file that is being written.

    Args:
        writer: the writer of the file.
        tokenizer: the tokenizer, as transformers loads it.
        spec: its tokenizer.json, as it stands in memory.
        rows: rows of the embeddings; ids that the tokenizer lacks become unused tokens.
        folder: the model folder, whose generation_config.json may name more ends of text.
        notify: gets a notice for each difference that is left.

    Raises:
        BaseModelError: llama.cpp has no such tokenizer.
    """
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        raise BaseModelError(
            f"{folder}: the tokenizer has ids up to {max(vocabulary.values()):,}, and the model {rows:,} embeddings."
        )
    tokens = _tokens_by_id(spec, vocabulary, rows)
    if spec["model"].get("type") == "BPE" and spec["model"].get("byte_fallback"):
        _add_sentencepiece(writer, spec, tokens, tokenizer, folder, notify)
    else:
        _add_byte_level(writer, spec, folder, notify)
    writer.add_token_list(tokens)
    writer.add_token_types(_token_types(spec, tokens, vocabulary, tokenizer))
    _add_special_tokens(writer, tokenizer, folder, notify)
    _add_template(writer, tokenizer)
    _notify_added_tokens(spec, notify)


def tokenizer_spec(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Spec:
    """tokenizer.json of a tokenizer, as it stands in memory. Raises BaseModelError if it has none."""
    if not tokenizer.is_fast:
        raise BaseModelError(f"{folder}: its tokenizer has no tokenizer.json, so it cannot be written as GGUF.")
    spec: Spec = json.loads(tokenizer.backend_tokenizer.to_str())
    return spec


def _notify_added_tokens(spec: Spec, notify: EventHandler) -> None:
    """Say that tokens are found otherwise in a text than by llama.cpp, which looks for them as they
    are, before all else."""
    prefixed = "Prepend" in _kinds(spec["normalizer"])
    others = [
        token["content"]
        for token in spec["added_tokens"]
        if token["lstrip"] or token["rstrip"] or token["single_word"] or (prefixed and token["normalized"])
    ]
    if others and not _strips_like_phi3(spec):
        notify(
            Notice(
                f"The tokenizer finds {format_names(others)} in a text only with or without white "
                "space beside them; llama.cpp finds them anywhere, and keeps the white space."
            )
        )


def model_name(name: str, spec: Spec) -> str:
    """The name of a model in the file, from which llama.cpp tells the tokenizer of Phi-3: for each
    name with "phi-3" it drops white space after special tokens, but for some."""
    if _strips_like_phi3(spec) == bool(_STRIPPED.search(name)):
        return name
    return f"Phi-3 {name}" if _strips_like_phi3(spec) else _STRIPPED.sub("phi 3", name)


def _strips_like_phi3(spec: Spec) -> bool:
    added = {token["content"]: token for token in spec["added_tokens"]}
    strips = all(token["rstrip"] == (text not in _KEPT) and not token["lstrip"] for text, token in added.items())
    return strips and {"</s>", *_KEPT} <= added.keys()


def _tokens_by_id(spec: Spec, vocabulary: Mapping[str, int], rows: int) -> list[str]:
    tokens = [f"[PAD{number}]" for number in range(rows)]
    for token, number in sorted(vocabulary.items(), key=lambda item: _is_byte(item[0])):
        tokens[number] = token  # a byte's name wins over the character (Gemma has both for a tab)
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
    return tokens


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _is_found_first(added: Spec) -> bool:
    """Check that llama.cpp is to find an added token in the text itself. Runs of spaces in a
    SentencePiece vocabulary (Gemma's) are merged like other tokens; as added ones llama.cpp would
    write them as ▁."""
    return bool(added["special"]) or _SPACE not in added["content"]


def _token_types(
    spec: Spec, tokens: list[str], vocabulary: Mapping[str, int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    from gguf import TokenType

    byte_fallback = spec["model"].get("byte_fallback")
    types: list[int] = [TokenType.NORMAL if token in vocabulary else TokenType.UNUSED for token in tokens]
    for number, token in enumerate(tokens):
        if byte_fallback and _is_byte(token):
            types[number] = TokenType.BYTE
    for added in spec["added_tokens"]:
        if not byte_fallback or _is_found_first(added):
            types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if byte_fallback and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return types


def _add_byte_level(writer: "GGUFWriter", spec: Spec, folder: Path, notify: EventHandler) -> None:
    model = spec["model"]
    if model.get("type") != "BPE":
        raise BaseModelError(
            f"{folder}: its tokenizer is of the type {model.get('type')}, and only BPE is written as GGUF."
        )
    steps = tuple(_pre_tokenizer_steps(spec["pre_tokenizer"]))
    name = _PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        raise BaseModelError(
            f"{folder}: llama.cpp has no pre-tokenizer like that of its tokenizer "
            f"({', '.join(steps) or 'none'}{', whole words first' if model.get('ignore_merges') else ''})."
        )
    if (kinds := _kinds(spec["normalizer"])) == "NFC":
        notify(
            Notice(
                "llama.cpp does not normalize text to NFC, as this tokenizer does: other text gets other tokens."
            )
        )
    elif kinds:
        raise BaseModelError(f"{folder}: llama.cpp does not normalize text as its tokenizer does ({kinds}).")
    if name in ("tekken", "gpt-4o"):
        notify(
            Notice(
                "llama.cpp splits words at combining marks (those of Hindi, e.g.), where this tokenizer does not."
            )
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges(merges)


def _pre_tokenizer_steps(spec: Spec | None) -> Iterator[str]:
    """Regular expressions that split a text, one after the other; what llama.cpp has not gets a
    name that it does not know."""
    if spec is None:
        return
    kind = spec["type"]
    if kind == "Sequence":
        for part in spec["pretokenizers"]:
            yield from _pre_tokenizer_steps(part)
    elif kind == "ByteLevel":
        if spec["add_prefix_space"]:
            yield "a space before the text"
        if spec.get("use_regex", True):
            yield _GPT2
    elif kind == "Digits" and spec["individual_digits"]:
        yield _DIGIT
    elif kind == "Punctuation" and spec.get("behavior") == "Contiguous":
        yield _PUNCTUATION
    elif kind == "Split" and (spec["behavior"], spec["invert"]) in (("Isolated", False), ("Removed", True)):
        yield next(iter(spec["pattern"].values()))
    else:
        yield kind


def _kinds(spec: Spec | None) -> str:
    if spec is None:
        return ""
    return ", ".join(_kinds(part) for part in spec["normalizers"]) if spec["type"] == "Sequence" else spec["type"]


def _add_sentencepiece(
    writer: "GGUFWriter",
    spec: Spec,
    tokens: list[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    notify: EventHandler,
) -> None:
    prefix = _space_prefix(spec, folder)
    if prefix == "first" and tokenizer.chat_template:
        prefix = "never"  # conversations begin with a special token
        notify(Notice("llama.cpp puts no space before a text, as this tokenizer does outside of conversations."))
    elif prefix in ("first", "unless there is one"):
        places = "before a text that begins with one" + (" and after special tokens" if prefix == "first" else "")
        notify(Notice(f"llama.cpp puts a space {places}, as this tokenizer does not."))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    added = {token["content"] for token in spec["added_tokens"] if _is_found_first(token)}
    writer.add_token_scores(_scores(spec["model"], tokens, added, folder))
    writer.add_add_space_prefix(prefix != "never")


def _space_prefix(spec: Spec, folder: Path) -> str:
    """The places where a space is put before a text: always, unless there is one, first (before the
    first piece, unless there is one), never."""
    prefix, escaped = "never", False
    for step in _parts(spec["normalizer"], "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = "always"
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
            escaped = True
        else:
            raise BaseModelError(
                f"{folder}: llama.cpp does not normalize text as its tokenizer does ({step['type']})."
            )
    for step in _parts(spec["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == _SPACE and not step["split"]:
            prefix = step["prepend_scheme"].replace("always", "unless there is one")
            escaped = True
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and escaped):
            raise BaseModelError(
                f"{folder}: llama.cpp does not split text as its tokenizer does ({step['type']})."
            )
    if not escaped:
        raise BaseModelError(
            f"{folder}: its tokenizer does not write spaces as {_SPACE}, as those of llama.cpp do."
        )
    return prefix


def _parts(spec: Spec | None, name: str) -> list[Spec]:
    if spec is None:
        return []
    return list(spec[name]) if spec["type"] == "Sequence" else [spec]


def _scores(model: Spec, tokens: list[str], added: set[str], folder: Path) -> list[float]:
    """Score of each token: llama.cpp merges the two neighbours whose union has the highest.

    SentencePiece's merges are all the ways to make a token of two others, in the order of its
    score; only such lists have the same effect as scores.
    """
    ranks: dict[str, int] = {}
    pairs = set()
    for pair in model["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        pairs.add((left, right))
        ranks.setdefault(left + right, len(ranks))
    for token in model["vocab"].keys() - added:
        wrong = [token] if any(character not in model["vocab"] for character in token) else []
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in model["vocab"] and right in model["vocab"] and (left, right) not in pairs:
                wrong = [left, right]
        if wrong and not _is_byte(token):
            raise BaseModelError(
                f"{folder}: its tokenizer has not the merges of a SentencePiece model ({' and '.join(wrong)})."
            )
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _add_special_tokens(
    writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, folder: Path, notify: EventHandler
) -> None:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise BaseModelError(f"{folder}: its tokenizer has no end-of-text token, so no text could end.")
    writer.add_eos_token_id(eos)
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    # llama.cpp has three keys for ends; the turn end comes first.
    ends = [*sorted(turn_end_ids(tokenizer)), *generation_ends(folder)]
    others = [number for number in dict.fromkeys(ends) if number != eos]
    for number, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(number)
    if len(others) > 2:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(others[2:])))
        notify(Notice(f"A GGUF file names three end tokens; llama.cpp may not stop at {names}."))
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    added = tokenizer("a")["input_ids"]
    start = next((at for at in range(len(added)) if added[at : at + len(plain)] == plain), len(added))
    before, after = added[:start], added[start + len(plain) :]
    writer.add_add_bos_token(before == [tokenizer.bos_token_id])
    writer.add_add_eos_token(after == [eos])
    for ids, known in ((before, tokenizer.bos_token_id), (after, eos)):
        if ids and ids != [known]:
            names = " ".join(map(str, tokenizer.convert_ids_to_tokens(ids)))
            notify(Notice(f"llama.cpp does not put {names} beside each text, as this tokenizer does."))


def generation_ends(folder: Path) -> list[int]:
    """The token ids at which transformers ends a generated text, in a model folder that names some."""
    path = folder / "generation_config.json"
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _add_template(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase) -> None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)
