"""Encode preferences as rows: a chosen and a rejected answer to a prompt, or one that is desired or not.

Such a row is one text that begins with the mark of `chat`. Each of its sides is an ordinary row,
a conversation, a prompt with its completion or a text: so chat templates, labels, reasoning, tools
and truncation are those of all rows. The assistant's earlier answers in the prompt are not learned.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import regex

from ..errors import InvalidRowError
from . import chat, tokenization
from .chat import CHAT_MARK, Clean, Fields, FullMessage
from .splitting import group_hash, row_hash
from .tokenization import InvalidRows, TextUse, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Part = str | list[FullMessage]  # a prompt or an answer
# Columns of the better and the worse answer, as TRL and OpenAI name them.
PAIR_COLUMNS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
LABEL_COLUMNS = ("label", "kto_tag")  # whether an answer is desired
# The first key tells a row from that of a conversation.
_PAIR, _LABELLED = f'{CHAT_MARK}{{"chosen":', f'{CHAT_MARK}{{"label":'
_TRUTH_VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
# Chinese and Japanese, with their punctuation; a clause of them may end with that of ASCII.
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\u3000-\u303f\uff00-\uffef]")
_CLAUSE_MARKS = frozenset("。！？：；，、．…」』）】》”’!?:;,.)")
_WORD_BREAK = regex.compile(r"(?w)\b")
_NOTHING: tuple[object, ...] = (None, "", [])


def is_preference(row: str) -> bool:
    return row.startswith((_PAIR, _LABELLED))


def is_pair(row: str) -> bool:
    return row.startswith(_PAIR)


def is_desired(row: str) -> bool:
    """Return whether the answer of a row with a label is desired."""
    return row.startswith(f"{_LABELLED} true")


def answer_texts(row: str) -> dict[str, str]:
    """Return the text of each answer, by a name for its side, in the order of `sides`."""
    value = chat.decode_row(row)
    if "label" in value:
        return {"desired" if value["label"] else "undesired": _plain_text(value["completion"])}
    return {name: _plain_text(value[name]) for name in ("chosen", "rejected")}


def sides(row: str) -> list[str]:
    """Return the sides of a preference as ordinary rows: chosen and rejected, or the one answer.

    A row without preferences is its only side.
    """
    if not is_preference(row):
        return [row]
    value = chat.decode_row(row)
    value.pop("label", None)
    prompt = value.pop("prompt")
    answers = [value.pop(name) for name in ("chosen", "rejected", "completion") if name in value]
    return [_ordinary_row(prompt, answer, value) for answer in answers]


def _ordinary_row(prompt: _Part, answer: _Part, parts: Fields) -> str:
    if isinstance(prompt, list) and isinstance(answer, list):
        messages = [*prompt, *answer]
        return chat.to_row({"messages": messages, **parts} if parts else messages)
    return chat.to_row({"prompt": prompt, "completion": answer, **parts}) if prompt else str(answer)


def first_side(row: str) -> str:
    """Return the chosen or only side of a row."""
    return sides(row)[0]


def learned_texts(rows: Iterable[str]) -> list[str]:
    """Return the sides that are to become more likely: chosen and desired ones, and rows without preferences."""
    return [first_side(row) for row in rows if is_desired(row) or not row.startswith(_LABELLED)]


def unlearned_texts(rows: Iterable[str]) -> list[str]:
    """Return the sides that are to become less likely: rejected and undesired ones."""
    return [sides(row)[-1] for row in rows if is_preference(row) and not is_desired(row)]


def first_rows(rows: Iterable[str], count: int) -> list[str]:
    """Return the first `count` rows, and of answers with labels so many of each label."""
    taken, first = Counter[bool](), list[str]()
    for row in rows:
        taken[is_desired(row)] += 1
        if taken[is_desired(row)] <= count:
            first.append(row)
    return first


def invalid_rows(rows: Iterable[str], errors: InvalidRows) -> InvalidRows:
    """Return the rows of which a side has an error, with the first one."""
    found: InvalidRows = {}
    for row in rows if errors else ():
        reasons = [errors[side] for side in sides(row) if side in errors]
        if reasons:
            found[row] = reasons[0]
    return found


def prompt_of(row: str) -> str:
    """Return the text of the prompt of a preference, without system messages."""
    return _plain_text(chat.decode_row(row)["prompt"])


def _plain_text(part: _Part) -> str:
    if isinstance(part, str):
        return part
    return "\n".join(message["content"] for message in part if message["role"] != "system")


def side_hash(row: str, salt: str) -> bytes:
    """Return the hash that decides on which side of the split a preference is: that of its prompt, so
    that no prompt is on both sides; without a prompt, that of its first answer."""
    prompt = " ".join(prompt_of(row).split())
    return group_hash(prompt, salt) if prompt else row_hash(first_side(row), salt)


def unpair(row: str) -> list[str]:
    """Return a pair as two rows with labels; another row as it is."""
    if not is_pair(row):
        return [row]
    value = chat.decode_row(row)
    answers = ((True, value.pop("chosen")), (False, value.pop("rejected")))
    return [chat.to_row({"label": label, "completion": answer, **value}) for label, answer in answers]


def encode_pair(
    prompt: object,
    answers: Mapping[str, object],
    clean: Clean,
    parts: Mapping[str, object] | None = None,
) -> str:
    """Return a prompt and two answers as a row; an answer alone as one with a label; "" if all is empty.

    Prompt and answers are texts or lists of messages. Without a prompt it is what both answers
    begin with: whole messages, or words.

    Args:
        answers: The better one and the worse one, by the names of their columns.

    Raises:
        InvalidRowError: An answer is empty or neither, or the two are equal or of different kinds.
    """
    better, worse = answers
    given = {name: answer for name, answer in answers.items() if answer is not None}
    if not given:
        if prompt in _NOTHING:
            return ""
        raise InvalidRowError(f"neither {better} nor {worse}")
    if len(given) == 1:
        return _encode(prompt, given, clean, parts, label=better in given)
    return _encode(prompt, given, clean, parts)


def encode_labelled(
    prompt: object,
    answer: Mapping[str, object],
    label: object,
    clean: Clean,
    parts: Mapping[str, object] | None = None,
) -> str:
    """Return a prompt, an answer and whether it is desired as a row; "" if all is empty.

    Args:
        answer: The answer, by the name of its column.
        label: True or false, also as 1 or 0 or as text.

    Raises:
        InvalidRowError: The answer is empty or neither a text nor a list, or the label is another.
    """
    ((name, value),) = answer.items()
    if value is None and prompt in _NOTHING:
        return ""
    if value is None:
        raise InvalidRowError(f"no {name}")
    if label in _NOTHING or label != label:  # NaN, as of pandas
        raise InvalidRowError("no label")
    truth = _TRUTH_VALUES.get(str(label).strip().lower())
    if truth is None:
        raise InvalidRowError("a label other than true and false", f"{str(label)[:40]!r}")
    return _encode(prompt, answer, clean, parts, label=truth)


def _encode(
    prompt: object,
    answers: Mapping[str, object],
    clean: Clean,
    parts: Mapping[str, object] | None,
    label: bool | None = None,
) -> str:
    """Return the row of one answer with a label, or of two without."""
    question: _Part
    read: Mapping[str, _Part]
    for name, answer in answers.items():
        if not isinstance(answer, str | list):
            raise InvalidRowError(f"{name} that is neither a text nor a list of messages")
        if answer in _NOTHING or (isinstance(answer, str) and not clean(answer)):
            raise InvalidRowError(f"nothing in {name}")
    if len({isinstance(answer, list) for answer in answers.values()}) > 1:
        raise InvalidRowError(f"{' and '.join(answers)} of two kinds: a text and a list of messages")
    if not isinstance(prompt, str | list | None):
        raise InvalidRowError("a prompt that is neither a text nor a list of messages")
    if isinstance(prompt, list) or any(isinstance(answer, list) for answer in answers.values()):
        question, read, beside = _read_messages(prompt, answers, clean, parts)
    else:
        question, read, beside = _read_texts(prompt, answers, clean, parts)
    if label is not None:
        return chat.to_row(
            {"label": label, "completion": next(iter(read.values())), "prompt": question, **beside}
        )
    chosen, rejected = read.values()
    if chat.strip_texts(chat.to_row({"chosen": chosen})) == chat.strip_texts(chat.to_row({"chosen": rejected})):
        raise InvalidRowError(f"equal {' and '.join(answers)}")
    return chat.to_row({"chosen": chosen, "rejected": rejected, "prompt": question, **beside})


def _read_texts(
    prompt: object, answers: Mapping[str, object], clean: Clean, parts: Mapping[str, object] | None
) -> tuple[str, dict[str, str], Fields]:
    """Return prompt, answers and what else belongs to them; a prompt of None is found in two answers."""
    texts = {name: clean(str(answer)) for name, answer in answers.items()}
    if prompt is not None:
        question = clean(str(prompt))
        if not question:
            raise InvalidRowError("no prompt")
    else:
        end = _common_words(*texts.values()) if len(texts) == 2 else 0
        question = clean(next(iter(texts.values()))[:end])
        texts = {name: clean(text[end:]) for name, text in texts.items()} if question else texts
    beside = chat.read_parts(parts, clean)
    if "reasoning_content" in beside:
        raise InvalidRowError("reasoning beside the answers")
    if beside and not question:
        raise InvalidRowError(f"{next(iter(beside))} without a prompt")
    return question, texts, beside


def _common_words(one: str, other: str) -> int:
    """Return the characters of the words with which two texts begin, so that each has others then.

    Chinese and Japanese have no spaces: there it ends with a clause or, without one, at a boundary
    of words as Unicode has them (UAX 29), which is never inside of a grapheme.
    """
    pairs = enumerate(zip(one, other, strict=False))
    length = next((index for index, pair in pairs if pair[0] != pair[1]), min(len(one), len(other)))
    for ends in (_ends_words, _ends_unspaced_word):
        for end in range(length, 0, -1):
            if ends(one, end) and ends(other, end) and one[end:].strip() and other[end:].strip():
                return end
    return 0


def _ends_words(text: str, end: int) -> bool:
    """Return whether a word before white space ends here, or a clause of Chinese or Japanese."""
    if text[end : end + 1].isspace():
        return not text[end - 1].isspace()
    is_unspaced = _UNSPACED.match(text, end - 1) or _UNSPACED.match(text, end)
    return bool(is_unspaced and text[end - 1] in _CLAUSE_MARKS and _WORD_BREAK.match(text, end))


def _ends_unspaced_word(text: str, end: int) -> bool:
    return bool(_UNSPACED.match(text, end - 1) and _WORD_BREAK.match(text, end))


def _read_messages(
    prompt: object, answers: Mapping[str, object], clean: Clean, parts: Mapping[str, object] | None
) -> tuple[list[FullMessage], dict[str, list[FullMessage]], Fields]:
    """Return prompt, answers and what else belongs to them, all as lists of messages.

    Answers may begin with the messages of the prompt. Without a list these are what both begin with;
    of one answer, all up to the last question.
    """
    read = {
        name: chat.read_messages(answer, clean)
        if isinstance(answer, list)
        else [{"role": "assistant", "content": clean(str(answer))}]
        for name, answer in answers.items()
    }
    if isinstance(prompt, list) and prompt:
        before = chat.read_messages(prompt, clean)
        if before[-1]["role"] == "assistant":
            raise InvalidRowError("a prompt that ends with an answer")
        count = len(before)
        repeated = all(answer[:count] == before and len(answer) > count for answer in read.values())
        shared = count if repeated else 0
    else:
        shared = _common_messages([*read.values()])
        before = next(iter(read.values()))[:shared]
        asked = clean(prompt) if isinstance(prompt, str) else ""
        questions = [message["content"].strip() for message in before if message["role"] == "user"]
        if asked and questions and questions[-1] != asked.strip():
            raise InvalidRowError("a prompt that is not the question in front of its answers")
        if asked and not questions:
            before = [*before, {"role": "user", "content": asked}]
    read = {name: answer[shared:] for name, answer in read.items()}
    for name, answer in read.items():
        if not any(map(chat.is_learned, answer)):
            raise InvalidRowError(f"no answer in {name}")
        if answer[-1]["role"] == "user":
            raise InvalidRowError(f"{name} that ends with a question")
    beside = chat.read_parts_beside([*before, *next(iter(read.values()))], parts, clean)
    before = [message | {"weight": 0} if message["role"] == "assistant" else message for message in before]
    return before, read, beside


def _common_messages(answers: Sequence[Sequence[FullMessage]]) -> int:
    """Return how many messages are the prompt of answers without one: those that two begin with, or
    of one those up to the last question."""
    if len(answers) == 1:
        asked = [number for number, message in enumerate(answers[0], 1) if message["role"] in ("user", "system")]
        return max(asked, default=0)
    longest = min(map(len, answers)) - 1
    return next((number for number in range(longest) if answers[0][number] != answers[1][number]), longest)


def encode_rows(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[str], max_length: int, invalid: InvalidRows | None = None
) -> tuple[list[TokenIds], TextUse, list[int]]:
    """Tokenize preferences for training: the sides of each row, truncated to `max_length` tokens.

    A row is left out if one of its sides has nothing to learn, or both are the same tokens; it
    counts as skipped.

    Args:
        invalid: Receives the rows that the chat template cannot write.

    Returns:
        The sides, those of a row one after another; the share of the text in them; and of each row
        that is kept its index.
    """
    of_rows = [sides(row) for row in rows]
    errors: InvalidRows = {}
    texts = [side for row_sides in of_rows for side in row_sides]
    encoded, use = tokenization.encode_rows(tokenizer, texts, max_length, "truncate", errors)
    if invalid is not None:
        invalid |= invalid_rows(rows, errors)
    pieces, kept, indices, use.skipped_rows = iter(encoded), list[TokenIds](), list[int](), 0
    for index, row_sides in enumerate(of_rows):
        unit = [next(pieces) for side in row_sides if side not in errors]
        if len(unit) < len(row_sides):
            continue
        if is_comparable(unit):
            kept += unit
            indices.append(index)
        else:
            use.skipped_rows += 1
    return kept, use, indices


def is_comparable(unit: Sequence[TokenIds]) -> bool:
    """Return whether each side has something to learn, and the sides differ."""
    differ = len({side.tobytes() for side in unit}) == len(unit)
    return differ and all(map(tokenization.count_predictions, unit))
