"""One continuation in the making: its tokens so far, its own luck, its text, and when it ends.

A row knows nothing of the batch that it is in, so that it is what it would be alone. Surprise: text comes later than tokens,
for a character may need several, and a stop string may have begun. Limit: text is made from the last tokens alone, so a
tokenizer whose text depends on what was long before would be read wrongly.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import SamplingParams
from ..errors import GenerationError
from .detokenizer import IncrementalDetokenizer
from .multi_lora import LoadedAdapter
from .sampling import make_logits_processors


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, in nats, and the likeliest ones in its place, as (token, log-probability)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    text_offset: int  # where it begins in the text


@dataclass(eq=False)
class Sequence:
    """One continuation. `adapter` is the name, `loaded` the adapter itself; both None for the plain base."""

    base: Any
    prompt_ids: list[int]
    sampling: SamplingParams
    seed: int | None = None  # None: greedy
    adapter: str | None = None
    lora: LoadedAdapter | None = None
    on_text: Callable[[str], None] | None = None
    top_logprobs: int | None = None  # keep the log-probabilities of tokens, and of so many of the likeliest
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    hit_eos: bool = False  # by an end of text
    complete: bool = False  # nothing follows, and all is said; set last, so that another thread may go by it
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.max_new_tokens = min(self.sampling.max_new_tokens, self.base.max_context - len(self.prompt_ids))
        self.detokenizer = IncrementalDetokenizer(self.base.tokenizer, self.prompt_ids, self.sampling.stop)
        self.ids: Any = torch.tensor([self.prompt_ids], device=self.base.device)  # with room for what comes
        self.logits_processors = make_logits_processors(self.sampling, self.seed)
        self._shown = 0

    @property
    def finished(self) -> bool:
        """The model ended the text, or a stop string did; else it was cut off."""
        return self.hit_eos or self.detokenizer.stopped

    @property
    def done(self) -> bool:
        return self.finished or len(self.output_ids) == self.max_new_tokens or self.error is not None

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    def set_token(self, place: int, token: int) -> None:
        """What stands there, for sure or as a guess."""
        if place == self.ids.shape[1]:
            self.ids = torch.cat([self.ids, torch.empty_like(self.ids)], 1)
        self.ids[0, place] = token

    def choose_token(self, place: int, logits: torch.Tensor) -> int:
        """The token that stands there, given its logits (vocabulary,) and all before it."""
        return int(self.logits_processors(self.ids[:, :place], logits[None]).argmax())

    def append_token(self, logits: torch.Tensor) -> int:
        """Choose the next token by its logits (vocabulary,), and keep it. With `done` set, nothing follows it."""
        token = self.choose_token(self.length, logits)
        if not logits[token].isfinite():  # of logits that are no numbers the first would be taken, without a word
            who = self.adapter or "The base"
            text = (
                f"{who} gives logits that are not finite, so it writes nothing: its numbers are too large, or it needs"
            )
            self.fail(GenerationError(f"{text} --dtype float32."))
            return token
        if token in self.base.eos_token_ids:
            self.hit_eos = True
        else:
            self.set_token(self.length, token)
            self.output_ids.append(token)
            if self.top_logprobs is not None:  # before its text, so that who reads both finds no text without
                self.logprobs.append(self._chance(token, logits))
            self.detokenizer.append(token)
        if self.done:
            self.detokenizer.finish()
            self._end()
        if self.on_text and len(text := self.settled_text) > self._shown:
            shown, self._shown = self._shown, len(text)
            self.on_text(text[shown:])
        return token

    def fail(self, error: Exception) -> None:
        """It comes to nothing more. Who reads it finds the error before it is complete."""
        self.error = error
        self._end()

    def _end(self) -> None:
        """What it needed to go on leaves memory: a row may be kept until its last reader has it."""
        self.lora, self.logits_processors = None, make_logits_processors(self.sampling, None)
        self.complete = True

    @property
    def settled_text(self) -> str:
        """The text as far as it is certain."""
        return self.detokenizer.text if self.complete else self.detokenizer.stable_text

    def _chance(self, token: int, logits: torch.Tensor) -> TokenLogprobs:
        found = logits.float().log_softmax(-1)
        best = found.topk(min(self.top_logprobs or 0, len(found)))
        likeliest = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenLogprobs(token, float(found[token]), likeliest, len(self.detokenizer.text))
