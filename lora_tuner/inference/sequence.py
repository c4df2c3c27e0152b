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
    likeliest: list[tuple[int, float]]
    start: int  # where it begins in the text


@dataclass(eq=False)
class Sequence:
    """One continuation. `adapter` is the name, `loaded` the adapter itself; both None for the plain base."""

    base: Any
    prompt: list[int]
    sampling: SamplingParams
    seed: int | None = None  # None: greedy
    adapter: str | None = None
    loaded: LoadedAdapter | None = None
    on_text: Callable[[str], None] | None = None
    likeliest: int | None = None  # keep the log-probabilities of tokens, and of so many of the likeliest
    new: list[int] = field(default_factory=list)
    chances: list[TokenLogprobs] = field(default_factory=list)
    ended: bool = False  # by an end of text
    complete: bool = False  # nothing follows, and all is said; set last, so that another thread may go by it
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.limit = min(self.sampling.max_new_tokens, self.base.context - len(self.prompt))
        self.text = IncrementalDetokenizer(self.base.tokenizer, self.prompt, self.sampling.stop)
        self.ids: Any = torch.tensor([self.prompt], device=self.base.device)  # with room for what comes
        self.drawing = make_logits_processors(self.sampling, self.seed)
        self._shown = 0

    @property
    def finished(self) -> bool:
        """The model ended the text, or a stop string did; else it was cut off."""
        return self.ended or self.text.stopped

    @property
    def done(self) -> bool:
        return self.finished or len(self.new) == self.limit or self.error is not None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.new)

    def put(self, place: int, token: int) -> None:
        """What stands there, for sure or as a guess."""
        if place == self.ids.shape[1]:
            self.ids = torch.cat([self.ids, torch.empty_like(self.ids)], 1)
        self.ids[0, place] = token

    def best(self, place: int, logits: torch.Tensor) -> int:
        """The token that stands there, given its logits (vocabulary,) and all before it."""
        return int(self.drawing(self.ids[:, :place], logits[None]).argmax())

    def take(self, logits: torch.Tensor) -> int:
        """Choose the next token by its logits (vocabulary,), and keep it. With `done` set, nothing follows it."""
        token = self.best(self.length, logits)
        if not logits[token].isfinite():  # of logits that are no numbers the first would be taken, without a word
            who = self.adapter or "The base"
            text = (
                f"{who} gives logits that are not finite, so it writes nothing: its numbers are too large, or it needs"
            )
            self.fail(GenerationError(f"{text} --dtype float32."))
            return token
        if token in self.base.ends:
            self.ended = True
        else:
            self.put(self.length, token)
            self.new.append(token)
            if self.likeliest is not None:  # before its text, so that who reads both finds no text without
                self.chances.append(self._chance(token, logits))
            self.text.take(token)
        if self.done:
            self.text.finish()
            self._end()
        if self.on_text and len(text := self.said) > self._shown:
            shown, self._shown = self._shown, len(text)
            self.on_text(text[shown:])
        return token

    def fail(self, error: Exception) -> None:
        """It comes to nothing more. Who reads it finds the error before it is complete."""
        self.error = error
        self._end()

    def _end(self) -> None:
        """What it needed to go on leaves memory: a row may be kept until its last reader has it."""
        self.loaded, self.drawing = None, make_logits_processors(self.sampling, None)
        self.complete = True

    @property
    def said(self) -> str:
        """The text as far as it is certain."""
        return self.text.whole if self.complete else self.text.sure

    def _chance(self, token: int, logits: torch.Tensor) -> TokenLogprobs:
        found = logits.float().log_softmax(-1)
        best = found.topk(min(self.likeliest or 0, len(found)))
        likeliest = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenLogprobs(token, float(found[token]), likeliest, len(self.text.whole))
