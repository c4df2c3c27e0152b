"""Conversations as rows of text: `messages`, or `prompt` and `completion`, and through a chat template to what is learnt.

A conversation is a row like any other, a text that begins with a mark no cleaned text has, so that it is split, counted, kept
and measured in the same way. Surprise: what an answer is, only the template knows, so the text is rendered up to each
answer and past it. Limit: the template must write on from what it wrote before, and the tokenizer must say where tokens lie.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from ..errors import DataError

CHAT_MARK = "\x02"
Message = dict[str, str]  # role and content, as TRL and OpenAI have them
_ROLES = ("system", "developer", "user", "assistant", "tool")
_PROBE_ANSWER = "assistant"
_FIXED_DATE = "26 Jul 2024"  # what Llama 3's template falls back on; with today's, a row would be another one tomorrow


def is_chat(text: str) -> bool:
    return text.startswith(CHAT_MARK)


def encode_messages(value: Any, clean: Callable[[str], str]) -> str:
    """A row of a list of messages; empty where nobody answers. Raises ValueError with what is wrong with it."""
    messages = _check_messages(value, clean)
    answered = any(it["role"] == _PROBE_ANSWER and it["content"] for it in messages)
    return CHAT_MARK + json.dumps(messages, ensure_ascii=False) if answered else ""


def encode_pair(values: Sequence[Any], clean: Callable[[str], str]) -> str:
    """A row of a prompt and its completion, each a text or a list of messages; empty where either is."""
    prompt, completion = values
    if isinstance(prompt, str) and isinstance(completion, str):
        pair = {"prompt": clean(prompt), "completion": clean(completion)}
        return CHAT_MARK + json.dumps(pair, ensure_ascii=False) if all(pair.values()) else ""
    if isinstance(prompt, list) and isinstance(completion, list):
        return encode_messages([*prompt, *completion], clean)
    raise ValueError("prompt and completion are not two texts, nor two lists of messages")


def _check_messages(value: Any, clean: Callable[[str], str]) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages is no list of messages")
    found = []
    for number, message in enumerate(value, 1):
        facts = message if isinstance(message, dict) else {}
        role, content = facts.get("role"), facts.get("content")
        if role not in _ROLES:
            raise ValueError(f"message {number} has no role out of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {number} has no text as its content")
        if facts.get("tool_calls"):
            raise ValueError(f"message {number} calls a tool, which is no text: leave such conversations out")
        if str(facts.get("weight", 1)) not in ("1", "1.0", "None"):
            raise ValueError(f"message {number} has a weight, and every answer counts alike here: leave it out")
        found.append({"role": "system" if role == "developer" else str(role), "content": clean(content)})
    return found


@dataclass(frozen=True)
class RenderedChat:
    """A row as the model reads it, and where in it the answers stand, (start, end) each. `by_template`: it is written out, with
    all special tokens that belong there; else it is text, with an end."""

    text: str
    answer_spans: list[tuple[int, int]]
    by_template: bool


def render_with_spans(tokenizer: Any, text: str, most: int | None = None) -> RenderedChat:
    """A row by the tokenizer's chat template; without one a prompt and its completion are joined by a space. Of a row of more
    than `most` characters answers beyond these may be missing.

    Raises DataError for what the template does not take, and where there is none for messages.
    """
    row = json.loads(text.removeprefix(CHAT_MARK))
    if isinstance(row, dict):
        if not getattr(tokenizer, "chat_template", None):
            _refuse_special(tokenizer, row.values())
            whole = f"{row['prompt']} {row['completion']}{tokenizer.eos_token}"
            return RenderedChat(whole, [(len(row["prompt"]), len(whole))], by_template=False)
        row = [{"role": "user", "content": row["prompt"]}, {"role": _PROBE_ANSWER, "content": row["completion"]}]
    while row[-1]["role"] != _PROBE_ANSWER:  # nothing after the last answer is learnt
        row.pop()
    say = partial(render_prompt, tokenizer, date_string=_FIXED_DATE)
    whole, answers = say(row), []
    for number, message in enumerate(row):
        if (
            message["role"] != _PROBE_ANSWER or not message["content"] or number == 0
        ):  # templates ask for a question first
            continue
        before = say(row[:number], ask=True)
        if not whole.startswith(before):
            raise DataError(
                "The chat template writes a conversation anew as it grows, so what an answer is cannot be told."
            )
        if most is not None and len(before) > most:
            break
        after = say(row[: number + 1])
        end = (
            len(after) if whole.startswith(after) else _end_of_answer(tokenizer, whole, len(before), message["content"])
        )
        answers.append((len(before), end))
    if answers and not any(it in whole[answers[-1][0] :] for it in special_tokens(tokenizer)):
        whole, answers[-1] = whole + tokenizer.eos_token, (answers[-1][0], len(whole) + len(tokenizer.eos_token))
    return RenderedChat(whole, answers, by_template=True)


def _end_of_answer(tokenizer: Any, whole: str, start: int, content: str) -> int:
    """Where an answer ends in a template that writes more behind the last one than behind others."""
    found = whole.find(content, start)
    after = found + len(content)
    ends = [place + len(it) for it in special_tokens(tokenizer) if (place := whole.find(it, after)) >= 0]
    if found < 0 or not ends:
        raise DataError(
            "The chat template writes a conversation anew as it grows, so what an answer is cannot be told."
        )
    return min(ends)


@lru_cache(maxsize=4)
def special_tokens(tokenizer: Any) -> list[str]:
    """The special tokens, as they are spelled."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted({str(it) for it in added if it.special} | set(tokenizer.all_special_tokens))


def _refuse_special(tokenizer: Any, said: Iterable[str]) -> None:
    """Special tokens mean something, and those in a message would be taken for these."""
    if special := next((it for text in said for it in special_tokens(tokenizer) if it in text), None):
        raise DataError(f"A message has {special} in it, a special token of this base: leave that out.")


def render_prompt(tokenizer: Any, messages: Sequence[Message], *, ask: bool = False, **more: str) -> str:
    """A conversation as the model reads it; with `ask` up to where its next answer begins. `more` is for the template.

    Raises DataError where there is no template, where it does not take these messages, and for messages that spell a special
    token.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("This base has no chat template: take one that was taught to talk, such as smollm2-135m.")
    _refuse_special(tokenizer, [message["content"] for message in messages])
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask, **more))
    except Exception as error:  # a template says what it does not take with errors of its own
        raise DataError(f"The chat template does not take these messages: {' '.join(str(error).split())}") from error
