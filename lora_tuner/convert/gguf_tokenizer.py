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
_Spec = Mapping[str, Any]  # a part of tokenizer.json
_SPACE = "▁"  # in SentencePiece's tokens


def add_tokenizer(
    writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path, notify: EventHandler
) -> None:
    """Add the tokenizer to a file that is being written.

    Args:
        writer: the writer of the file.
        tokenizer: the tokenizer, as transformers loads it.
        rows: rows of the embeddings; ids that the tokenizer lacks become unused tokens.
        folder: the model folder, whose generation_config.json may name more ends of text.
        notify: gets a notice for each difference that is left.

    Raises:
        BaseModelError: llama.cpp has no such tokenizer.
    """
    if not tokenizer.is_fast:
        raise BaseModelError(f"{folder}: its tokenizer has no tokenizer.json, so it cannot be written as GGUF.")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
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
    stripped = [token["content"] for token in spec["added_tokens"] if token["lstrip"] or token["rstrip"]]
    if stripped and not _strips_like_phi3(tokenizer):
        notify(
            Notice(
                f"The tokenizer drops white space beside {len(stripped)} special tokens, such as {stripped[0]}; "
                "llama.cpp keeps it."
            )
        )


def model_name(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of a model in the file, from which llama.cpp tells the tokenizer of Phi-3: for each
    name with "phi-3" it drops white space after special tokens, but for some."""
    if not tokenizer.is_fast or _strips_like_phi3(tokenizer) == bool(_STRIPPED.search(name)):
        return name
    return f"Phi-3 {name}" if _strips_like_phi3(tokenizer) else _STRIPPED.sub("phi 3", name)


def _strips_like_phi3(tokenizer: PreTrainedTokenizerBase) -> bool:
    added = {
        token["content"]: token for token in json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
    }
    strips = all(token["rstrip"] == (text not in _KEPT) and not token["lstrip"] for text, token in added.items())
    return strips and {"</s>", *_KEPT} <= added.keys()


def _tokens_by_id(spec: _Spec, vocabulary: Mapping[str, int], rows: int) -> list[str]:
    tokens = [f"[PAD{number}]" for number in range(rows)]
    for token, number in sorted(vocabulary.items(), key=lambda item: _is_byte(item[0])):
        tokens[number] = token  # a byte's name wins over the character (Gemma has both for a tab)
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
    return tokens


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _token_types(
    spec: _Spec, tokens: list[str], vocabulary: Mapping[str, int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    from gguf import TokenType

    byte_fallback = spec["model"].get("byte_fallback")
    types: list[int] = [TokenType.NORMAL if token in vocabulary else TokenType.UNUSED for token in tokens]
    for number, token in enumerate(tokens):
        if byte_fallback and _is_byte(token):
            types[number] = TokenType.BYTE
    for added in spec["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if byte_fallback and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return types


def _add_byte_level(writer: "GGUFWriter", spec: _Spec, folder: Path, notify: EventHandler) -> None:
    model = spec["model"]
    if model.get("type") != "BPE":
        raise BaseModelError(
            f"{folder}: its tokenizer is of the type {model.get('type')}, and only BPE is written as GGUF."
        )
    steps = tuple(_pre_tokenizer_steps(spec["pre_tokenizer"]))
    name = _PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        raise BaseModelError(
            f"{folder}: llama.cpp has no pre-tokenizer like that of its tokenizer ({', '.join(steps) or 'none'}"
            f"{', whole words first' if model.get('ignore_merges') else ''})."
        )
    if spec["normalizer"] is not None:
        notify(
            Notice(
                f"llama.cpp does not normalize text ({_kinds(spec['normalizer'])}), as this tokenizer does: text in "
                "another form gets other tokens there."
            )
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges(merges)


def _pre_tokenizer_steps(spec: _Spec | None) -> Iterator[str]:
    """Regular expressions that split a text, one after the other; what llama.cpp has not gets a name
    that it does not know."""
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


def _kinds(spec: _Spec) -> str:
    return ", ".join(_kinds(part) for part in spec["normalizers"]) if spec["type"] == "Sequence" else spec["type"]


def _add_sentencepiece(
    writer: "GGUFWriter",
    spec: _Spec,
    tokens: list[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    notify: EventHandler,
) -> None:
    prefix = _space_prefix(spec, folder)
    if prefix == "first":
        # llama.cpp also adds it after each special token, which is wrong for conversations.
        chat = bool(tokenizer.chat_template)
        prefix = "never" if chat else "always"
        where = "puts no space before a text" if chat else "puts a space after special tokens too"
        notify(Notice(f"llama.cpp {where}, which this tokenizer does {'at its start' if chat else 'not'}."))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(_scores(spec["model"], tokens, folder))
    writer.add_add_space_prefix(prefix == "always")


def _space_prefix(spec: _Spec, folder: Path) -> str:
    """Where a space is put before a text: always, first (before the first piece only) or never."""
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
            prefix, escaped = step["prepend_scheme"], True
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and escaped):
            raise BaseModelError(
                f"{folder}: llama.cpp does not split text as its tokenizer does ({step['type']})."
            )
    if not escaped:
        raise BaseModelError(
            f"{folder}: its tokenizer does not write spaces as {_SPACE}, as those of llama.cpp do."
        )
    return prefix


def _parts(spec: _Spec | None, name: str) -> list[_Spec]:
    if spec is None:
        return []
    return list(spec[name]) if spec["type"] == "Sequence" else [spec]


def _scores(model: _Spec, tokens: list[str], folder: Path) -> list[float]:
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
    vocabulary = model["vocab"]
    for token in vocabulary:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocabulary and pair[1] in vocabulary and (pair in pairs) != (token in ranks):
                raise BaseModelError(
                    f"{folder}: its tokenizer has not the merges of a SentencePiece model ({pair[0]} and {pair[1]})."
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
    ends = [*sorted(turn_end_ids(tokenizer)), *_generation_ends(folder)]
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


def _generation_ends(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _add_template(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase) -> None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)
