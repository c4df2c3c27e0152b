"""State of one generation request: token ids, random generator, text, stop conditions.

A sequence does not depend on the batch that it runs in. Its text lags behind its tokens: a
character may need several tokens, and a stop string may have begun. Limit: text is decoded from the
last tokens only, which is wrong for a tokenizer whose text depends on tokens far back.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import LogitsProcessorList

from ..config import SamplingParams
from ..errors import GenerationError
from ..models.loading import LoadedBase
from .constraints import Constraint, end_token_ids
from .detokenizer import IncrementalDetokenizer
from .multi_lora import LoadedAdapter
from .sampling import make_logits_processors

FinishReason = Literal["stop", "length"]  # as in OpenAI's API


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of a token, in nats, and the most likely tokens at its position as
    (token, logprob)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    text_offset: int  # where its text begins in the output; 0 in the prompt


@dataclass(eq=False)
class Sequence:
    """One generation request. `adapter` is the name of `lora`; both are None for the plain base.

    With a `constraint` the text follows a grammar, and has the special tokens that this asks for;
    log-probabilities stay those of the model.
    """

    base: LoadedBase
    prompt_ids: list[int]
    sampling: SamplingParams
    seed: int | None = None  # None: greedy
    adapter: str | None = None
    lora: LoadedAdapter | None = None
    on_text: Callable[[str], None] | None = None
    top_logprobs: int | None = None  # alternatives recorded per token; None: no log-probabilities
    constraint: Constraint | None = None
    score_prompt: bool = False  # record the log-probabilities of the prompt's tokens too
    prompt_only: bool = False  # end with the prompt, without output
    ranked: bool = False  # count `mean_logprob`
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of all tokens but the first
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int = 0  # of the prompt, whose keys and values an earlier one had left
    hit_eos: bool = False
    complete: bool = False  # tokens and text are final; set last, because other threads rely on it
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.max_new_tokens = min(self.sampling.max_new_tokens, self.base.max_context - len(self.prompt_ids))
        tokenizer = (self.lora and self.lora.tokenizer) or self.base.tokenizer
        self.detokenizer = IncrementalDetokenizer(
            tokenizer,
            self.prompt_ids,
            self.sampling.stop,
            skip_special_tokens=self.constraint is None,
            include_stop=self.sampling.include_stop_str_in_output,
            min_tokens=self.sampling.min_new_tokens,
        )
        # Number of its logits: beside a row whose adapter has more tokens it gets more.
        self.vocab_size = (self.lora and self.lora.vocab_size) or self.base.head_size
        self._end_token_ids = set(self.sampling.stop_token_ids)
        if self.constraint is not None or not self.sampling.ignore_eos:  # a form has an end
            self._end_token_ids |= end_token_ids(self.base, tokenizer)
        # (1, capacity).
        self.token_ids: Any = torch.tensor([self.prompt_ids], device=self.base.device)
        self.logits_processors = make_logits_processors(
            self.sampling, self.seed, len(self.prompt_ids), self._end_token_ids
        )
        self._streamed = 0  # characters passed to `on_text`
        self._logprob_sum = 0.0

    @property
    def finished(self) -> bool:
        """True if the model ended the text or a stop string did; otherwise the output is cut off."""
        return self.hit_eos or self.detokenizer.stopped

    @property
    def finish_reason(self) -> FinishReason:
        """The reason for the end of a complete output."""
        return "stop" if self.finished else "length"

    @property
    def done(self) -> bool:
        """True if no token may follow."""
        return self.complete or self.finished or len(self.output_ids) == self.max_new_tokens

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def max_length(self) -> int:
        """The largest number of tokens, prompt included."""
        return len(self.prompt_ids) + int(self.max_new_tokens)

    def append_token(self, logits: torch.Tensor) -> int:
        """Choose the next token from its logits (vocabulary,) and append it. With `done` set, no
        token follows. Returns -1 where an error or a prompt alone ends the sequence before."""
        if self.prompt_only:
            self._release()
            return -1
        try:
            scores = logits if self.constraint is None else self.constraint.mask(logits)
        except GenerationError as error:
            self.fail(error)
            return -1
        token = int(self.logits_processors(self.token_ids[:, : self.length], scores[None]).argmax())
        if not scores[token].isfinite():  # argmax of NaN would be the first token
            self._fail_not_finite()
            return token
        wanted = self.ranked or self.top_logprobs is not None
        logprobs = self._token_logprobs([token], logits[None]) if wanted else []
        self._logprob_sum += sum(each.logprob for each in logprobs)
        if token in self._end_token_ids:
            self.hit_eos = True
        else:
            if self.length == self.token_ids.shape[1]:
                self.token_ids = torch.cat([self.token_ids, torch.empty_like(self.token_ids)], 1)
            self.token_ids[0, self.length] = token
            self.output_ids.append(token)
            if self.top_logprobs is not None:  # before its text, for concurrent readers
                self.logprobs += logprobs
            self.detokenizer.append(token)
            if self.constraint is not None and self.constraint.advance(token):
                self.hit_eos = True  # nothing else may follow
        if self.done:
            self.detokenizer.finish()
            self._release()
        if self.on_text and len(text := self.settled_text) > self._streamed:
            start, self._streamed = self._streamed, len(text)
            self.on_text(text[start:])
        return token

    def append_prompt_logits(self, start: int, logits: torch.Tensor) -> None:
        """Record the log-probabilities of prompt tokens.

        Args:
            start: index of the token of the first logits, which are of the token after it.
            logits: (tokens, vocabulary).
        """
        following = self.prompt_ids[start + 1 : start + 1 + len(logits)]
        if following and not self.done:
            self.prompt_logprobs += self._token_logprobs(following, logits[: len(following), : self.vocab_size])
            if any(math.isnan(token.logprob) for token in self.prompt_logprobs[-len(following) :]):
                self._fail_not_finite()

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the tokens of a `ranked` output, in nats, one that ends it included."""
        return self._logprob_sum / max(1, len(self.output_ids) + self.hit_eos)

    def _fail_not_finite(self) -> None:
        model = self.adapter or "The base"
        causes = "its weights are too large, or it needs --dtype float32"
        self.fail(GenerationError(f"{model} produces logits that are not finite: {causes}."))

    def fail(self, error: Exception) -> None:
        """End with an error, which readers find before the sequence is complete."""
        self.error = error
        self._release()

    def _release(self) -> None:
        """Free adapter, random generator and grammar: a sequence may be kept until its last reader is
        done."""
        self.lora, self.logits_processors = None, LogitsProcessorList()
        self.constraint = None
        self.complete = True

    @property
    def settled_text(self) -> str:
        """Text that no later token or stop string changes."""
        return self.detokenizer.text if self.complete else self.detokenizer.stable_text

    def _token_logprobs(self, tokens: list[int], logits: torch.Tensor) -> list[TokenLogprobs]:
        """Return those of the tokens that follow in text, by their logits (tokens, vocabulary)."""
        logprobs = logits.float().log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
        best = logprobs.topk(min(self.top_logprobs or 0, logprobs.shape[1]))
        return [
            TokenLogprobs(token, logprob, list(zip(ids, values, strict=True)), len(self.detokenizer.text))
            for token, logprob, ids, values in zip(
                tokens, chosen[:, 0].tolist(), best.indices.tolist(), best.values.tolist(), strict=True
            )
        ]
