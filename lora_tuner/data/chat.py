"""Encode conversations as rows of text, and render them with the spans of the answers.

A row of `messages`, or of `prompt` and `completion`, becomes one text that begins with a mark which
no cleaned text has. So it is split, counted, stored and evaluated as any other row. Only the
template knows where an answer begins and ends, so the conversation is rendered up to each answer
and past it. Limits: rendering more messages must extend what was rendered before, and the tokenizer
must return character offsets.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from ..errors import DataError, InvalidRowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_MARK = "\x02"
Message = dict[str, str]  # keys role and content, as in TRL and OpenAI's API
_ROLES = ("system", "developer", "user", "assistant", "tool")
_FIXED_DATE = "26 Jul 2024"  # Llama 3's default: today's date would change rows every day
_NO_SPANS = (
    "The chat template renders earlier messages differently as the conversation grows, "
    "so the tokens of an answer cannot be found."
)


def is_chat(text: str) -> bool:
    return text.startswith(CHAT_MARK)


def encode_messages(value: object, clean: Callable[[str], str]) -> str:
    """Return a list of messages as a row; "" if the assistant says nothing.

    Raises:
        InvalidRowError: The value is not a valid list of messages.
    """
    if not isinstance(value, list) or not value:
        raise InvalidRowError("messages that are no list")
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if role not in _ROLES:
            raise InvalidRowError(f"a role other than {', '.join(_ROLES)}", f"message {number} has {role!r:.60}")
        if not isinstance(content, str):
            raise InvalidRowError("content that is no text", f"message {number}")
        if fields.get("tool_calls"):
            raise InvalidRowError("tool calls", f"message {number}")
        if str(fields.get("weight", 1)) not in ("1", "1.0", "None"):
            raise InvalidRowError("a weight", f"message {number}")
        messages.append({"role": "system" if role == "developer" else str(role), "content": clean(content)})
    has_answer = any(message["role"] == "assistant" and message["content"] for message in messages)
    return CHAT_MARK + json.dumps(messages, ensure_ascii=False) if has_answer else ""


def encode_pair(prompt: object, completion: object, clean: Callable[[str], str]) -> str:
    """Return a prompt and its completion as a row; "" if either is empty.

    Each is a string, or each is a list of messages.

    Raises:
        InvalidRowError: The two are of other types.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        pair = {"prompt": clean(prompt), "completion": clean(completion)}
        return CHAT_MARK + json.dumps(pair, ensure_ascii=False) if all(pair.values()) else ""
    if isinstance(prompt, list) and isinstance(completion, list):
        return encode_messages([*prompt, *completion], clean)
    raise InvalidRowError("prompt and completion that are neither two texts nor two lists of messages")


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as the model reads it.

    `answer_spans` are the (start, end) of the answers, in characters. If `by_template`, the text
    has all the special tokens it needs; else the tokenizer may add those at the front.
    """

    text: str
    answer_spans: list[tuple[int, int]]
    by_template: bool


def render_with_spans(
    tokenizer: "PreTrainedTokenizerBase", text: str, max_chars: int | None = None
) -> RenderedChat:
    """Render a row through the chat template.

    Without a template, a prompt and its completion are joined by a space.

    Args:
        max_chars: Answers that begin after so many characters may be missing from `answer_spans`.

    Raises:
        DataError: The template rejects the messages, or there is none for a list of messages.
    """
    row = json.loads(text.removeprefix(CHAT_MARK))
    if isinstance(row, dict):
        prompt, completion = row["prompt"], row["completion"]
        if not getattr(tokenizer, "chat_template", None):
            _refuse_special_tokens(tokenizer, [prompt, completion])
            rendered = f"{prompt} {completion}{tokenizer.eos_token}"
            return RenderedChat(rendered, [(len(prompt), len(rendered))], by_template=False)
        row = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    while row[-1]["role"] != "assistant":  # no loss after the last answer
        row.pop()
    render = partial(render_prompt, tokenizer, date_string=_FIXED_DATE)
    rendered, spans = render(row), []
    for number, message in enumerate(row):
        # Templates need a question first.
        if number == 0 or message["role"] != "assistant" or not message["content"]:
            continue
        before = render(row[:number], add_generation_prompt=True)
        if not rendered.startswith(before):
            raise DataError(_NO_SPANS)
        if max_chars is not None and len(before) > max_chars:
            break
        after = render(row[: number + 1])
        end = (
            len(after)
            if rendered.startswith(after)
            else _find_answer_end(tokenizer, rendered, len(before), message["content"])
        )
        spans.append((len(before), end))
    if spans:
        start, _ = spans[-1]
        if not any(token in rendered[start:] for token in special_tokens(tokenizer)):
            rendered += tokenizer.eos_token
            spans[-1] = start, len(rendered)
    return RenderedChat(rendered, spans, by_template=True)


def _find_answer_end(tokenizer: "PreTrainedTokenizerBase", rendered: str, start: int, content: str) -> int:
    """Find the end of an answer if the template renders the last message unlike the others."""
    rest = rendered[start:].partition(content)[2]  # empty if the content is not found
    ends = [rest.index(token) + len(token) for token in special_tokens(tokenizer) if token in rest]
    if not ends:
        raise DataError(_NO_SPANS)
    return len(rendered) - len(rest) + min(ends)


@lru_cache(maxsize=4)
def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    return sorted({str(token) for token in added if token.special} | set(tokenizer.all_special_tokens))


def _refuse_special_tokens(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> None:
    """Raise DataError if a text spells a special token, which would be encoded as such."""
    for text in texts:
        for token in special_tokens(tokenizer):
            if token in text:
                raise DataError(f"A message contains {token}, a special token of this base: remove it.")


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    **template_kwargs: Any,
) -> str:
    """Render a conversation through the chat template.

    Args:
        add_generation_prompt: End with the beginning of the assistant's next answer.

    Raises:
        DataError: There is no template, it rejects the messages, or a message spells a special
            token.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("This base has no chat template: use an instruction-tuned base, such as smollm2-135m.")
    texts = [message.get(key, "") for message in messages for key in ("content", "name")]
    _refuse_special_tokens(tokenizer, texts)
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
            )
        )
    except Exception as error:  # templates raise errors of any type
        raise DataError(f"The chat template rejects these messages: {' '.join(str(error).split())}") from error
