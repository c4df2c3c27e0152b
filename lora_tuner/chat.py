"""Conversations as rows of text: `messages`, or `prompt` and `completion`, and through a chat template to what is learnt.

A conversation is a row like any other, a text that begins with a mark no cleaned text has, so that it is split, counted, kept
and measured in the same way. Surprise: what an answer is, only the template knows, so the text is rendered up to each
answer and past it. Limit: the template must write on from what it wrote before, and the tokenizer must say where tokens lie.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from .errors import DataError

MARK = "\x02"
Message = dict[str, str]  # role and content, as TRL and OpenAI have them
_ROLES = ("system", "developer", "user", "assistant", "tool")
ANSWERING = "assistant"


def is_chat(text: str) -> bool:
    return text.startswith(MARK)


def of_messages(value: Any, clean: Callable[[str], str]) -> str:
    """A row of a list of messages; empty where nobody answers. Raises ValueError with what is wrong with it."""
    messages = _messages(value, clean)
    answered = any(it["role"] == ANSWERING and it["content"] for it in messages)
    return MARK + json.dumps(messages, ensure_ascii=False) if answered else ""


def of_pair(values: Sequence[Any], clean: Callable[[str], str]) -> str:
    """A row of a prompt and its completion, each a text or a list of messages; empty where either is."""
    prompt, completion = values
    if isinstance(prompt, str) and isinstance(completion, str):
        pair = {"prompt": clean(prompt), "completion": clean(completion)}
        return MARK + json.dumps(pair, ensure_ascii=False) if all(pair.values()) else ""
    if isinstance(prompt, list) and isinstance(completion, list):
        return of_messages([*prompt, *completion], clean)
    raise ValueError("prompt and completion are not two texts, nor two lists of messages")


def _messages(value: Any, clean: Callable[[str], str]) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages is no list of messages")
    found = []
    for number, message in enumerate(value, 1):
        role, content = (
            (message.get(name) for name in ("role", "content")) if isinstance(message, dict) else (None, None)
        )
        if role not in _ROLES:
            raise ValueError(f"message {number} has no role out of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {number} has no text as its content")
        found.append({"role": str(role), "content": clean(content)})
    return found


def pieces(tokenizer: Any, text: str) -> tuple[str, list[tuple[int, int]]]:
    """A row as the model reads it, and where in it the answers stand, (start, end) each.

    By the tokenizer's chat template; without one a prompt and its completion are joined by a space. Raises DataError for what
    the template does not take, and where there is none for messages.
    """
    row = json.loads(text.removeprefix(MARK))
    if isinstance(row, dict):
        if not getattr(tokenizer, "chat_template", None):
            whole = f"{row['prompt']} {row['completion']}{tokenizer.eos_token}"
            return whole, [(len(row["prompt"]), len(whole))]
        row = [{"role": "user", "content": row["prompt"]}, {"role": ANSWERING, "content": row["completion"]}]
    whole, answers = render(tokenizer, row), []
    for number, message in enumerate(row):
        if message["role"] != ANSWERING:
            continue
        before, after = render(tokenizer, row[:number], ask=True), render(tokenizer, row[: number + 1])
        if not whole.startswith(before) or not whole.startswith(after):
            raise DataError(
                "The chat template writes a conversation anew as it grows, so what an answer is cannot be told."
            )
        answers.append((len(before), len(after)))
    if answers and not any(end in whole[answers[-1][0] :] for end in specials(tokenizer)):
        whole, answers[-1] = whole + tokenizer.eos_token, (answers[-1][0], len(whole) + len(tokenizer.eos_token))
    return whole, answers


@lru_cache(maxsize=4)
def specials(tokenizer: Any) -> list[str]:
    """The special tokens, as they are spelled."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted({str(it) for it in added if it.special} | set(tokenizer.all_special_tokens))


def render(tokenizer: Any, messages: Sequence[Message], *, ask: bool = False) -> str:
    """A conversation as the model reads it; with `ask` up to where its next answer begins.

    Raises DataError where there is no template, where it does not take these messages, and for messages that spell a special
    token: those of the template mean something, and theirs would be taken for these.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("This base has no chat template: take one that was taught to talk, such as smollm2-135m.")
    said = "".join(message["content"] for message in messages)
    if special := next((it for it in specials(tokenizer) if it in said), None):
        raise DataError(f"A message has {special} in it, a special token of this base: leave that out.")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # a template says what it does not take with errors of its own
        raise DataError(f"The chat template does not take these messages: {' '.join(str(error).split())}") from error
