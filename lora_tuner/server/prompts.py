"""Prompts of requests to token ids, with errors that name their field."""

import contextlib
import json
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from ..data.chat import FullMessage, iter_texts
from ..data.chat_template import render_prompt, special_tokens
from ..errors import DataError, GenerationError, RequestError
from ..inference.generator import Generator
from .tools import ToolUse

Prompt = str | list[int] | tuple[FullMessage, ...]  # text, token ids, or a conversation


class PromptEncoder:
    """Turns prompts into token ids. Works in any thread that has a tokenizer of its own.

    Args:
        generator: knows the base and its context.
        name: of the base, for errors.
    """

    def __init__(self, generator: Generator, name: str) -> None:
        self.generator = generator
        self.name = name

    def encode(
        self,
        prompt: Prompt,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int = 0,
        tools: ToolUse | None = None,
    ) -> list[int]:
        """Return the token ids of one prompt; `vocab_size` is that of the adapter, 0 for the base's.

        Raises GenerationError when it leaves no room in the context, holds invalid token ids, or
        the base has no chat template; RequestError when a message spells a special token, which the
        template would take for its own.
        """
        if isinstance(prompt, str):
            return self.generator.encode_prompt(prompt, tokenizer, vocab_size).token_ids
        if isinstance(prompt, tuple):
            template_tools = tools.for_template() if tools else None
            with self._field_of_error(prompt, tools, tokenizer):
                prompt = self.generator.encode_prompt(prompt, tokenizer, vocab_size, template_tools).token_ids
        count = vocab_size or self.generator.base.vocab_size
        if not prompt or not all(0 <= token < count for token in prompt):
            raise GenerationError(f"prompt: give at least one token id, each from 0 to {count - 1:,}.")
        return self.generator.check_fits_context(prompt, vocab_size)

    def render(
        self, messages: tuple[FullMessage, ...], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool
    ) -> str:
        """Return a conversation as the model reads it. Raises what `encode` raises, but for lengths."""
        with self._field_of_error(messages, None, tokenizer):
            return render_prompt(tokenizer, messages, add_generation_prompt=add_generation_prompt)

    @contextlib.contextmanager
    def _field_of_error(
        self, messages: tuple[FullMessage, ...], tools: ToolUse | None, tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[None]:
        """Name the field of a conversation that the chat template cannot take."""
        if not tokenizer.chat_template:
            raise GenerationError(f"{self.name} has no chat template: use the completions endpoint instead.")
        try:
            yield
        except DataError as error:
            field = _find_special_token(messages, tools, tokenizer)
            text = str(error).replace("A message", field).replace("this base", self.name)
            raise RequestError(text, field) from error


def prompt_size(prompt: Prompt) -> int:
    """Return the characters of a text or conversation, or the number of token ids."""
    if isinstance(prompt, tuple):
        return sum(map(len, iter_texts(list(prompt))))
    return len(prompt)


def _find_special_token(
    messages: Sequence[FullMessage], tools: ToolUse | None, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return the field of a request whose text spells a special token, else "messages"."""
    fields = {
        f"messages[{number}].{key}": value
        for number, message in enumerate(messages)
        for key, value in message.items()
    }
    fields |= {"tools": tools.for_template()} if tools else {}
    for field, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if any(token in text for token in special_tokens(tokenizer)):
            return field
    return "messages"
