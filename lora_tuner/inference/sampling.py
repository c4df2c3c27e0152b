"""Logits to tokens: bias, penalties, temperature, min-p, top-k, top-p, sampling.

The order is that of vLLM.

Each sequence has its own random generator, so other sequences of its batch do not change it.
Sampling adds Gumbel noise to the logits and takes the maximum, which is equivalent to sampling from
their softmax.
"""

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from ..config import SamplingParams


def choose_seed(sampling: SamplingParams) -> int | None:
    """Return the seed of a request, random if the settings give none; None for greedy decoding."""
    if sampling.is_greedy:
        return None
    return sampling.seed if sampling.seed is not None else secrets.randbits(48)


def sequence_seed(seed: int | None, number: int) -> int | None:
    """Return the seed of output `number` of a prompt; output 0 has `seed`."""
    return None if seed is None else (seed + number) % 2**63


def make_logits_processors(
    sampling: SamplingParams, seed: int | None, prompt_length: int = 0, end_token_ids: Iterable[int] = ()
) -> LogitsProcessorList:
    """Build the processors of one sequence; the argmax of their result is its token.

    Args:
        seed: None for greedy decoding.
        prompt_length: tokens that are no output.
        end_token_ids: tokens that end the output.
    """
    processors = LogitsProcessorList()
    if sampling.logit_bias:
        processors.append(LogitBias(sampling.logit_bias))
    if sampling.min_new_tokens:
        processors.append(MinNewTokens(prompt_length + sampling.min_new_tokens, list(end_token_ids)))
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        penalties = sampling.presence_penalty, sampling.frequency_penalty
        processors.append(OutputPenalty(prompt_length, *penalties))
    if seed is not None:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.min_p:
            processors.append(MinPWarper(sampling.min_p))
        processors += [
            TopKTopPWarper(sampling.top_k, sampling.top_p),
            GumbelSampler(seed),
        ]
    return processors


class LogitBias(LogitsProcessor):
    """Add to the logits of some tokens."""

    def __init__(self, bias: dict[int, float]) -> None:
        self.token_ids, self.values = torch.tensor([*bias]), torch.tensor([*bias.values()])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_add(-1, self.token_ids.to(scores.device), self.values.to(scores)[None])


@dataclass
class MinNewTokens(LogitsProcessor):
    """Allow no token that ends the output before the sequence has `min_length` tokens."""

    min_length: int
    end_token_ids: list[int]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[-1] >= self.min_length:
            return scores
        present = [token for token in self.end_token_ids if token < scores.shape[-1]]
        token_ids = torch.tensor(present, dtype=torch.int64, device=scores.device)
        return scores.index_fill(-1, token_ids, -torch.inf)


@dataclass
class OutputPenalty(LogitsProcessor):
    """Lower the logits of the tokens after the prompt: by `presence` each, and by `frequency` for
    each time that a token occurs."""

    prompt_length: int
    presence: float
    frequency: float

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token_ids, counts = input_ids[0, self.prompt_length :].unique(return_counts=True)
        penalties = self.presence + self.frequency * counts
        return scores.index_add(-1, token_ids, -penalties.to(scores)[None])


@dataclass
class MinPWarper(LogitsProcessor):
    """Keep the tokens with at least `min_p` of the probability of the most likely one.

    The result is that of transformers' MinPLogitsWarper, without its sort of the whole vocabulary.
    """

    min_p: float

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        lowest = scores.amax(-1, keepdim=True) + math.log(self.min_p)
        return scores.masked_fill(scores < lowest, -torch.inf)


_SORTED_FIRST = 256  # top tokens sorted first; usually they hold the probability `top_p`


@dataclass
class TopKTopPWarper(LogitsProcessor):
    """Keep the `top_k` most likely tokens (0: all), and of these the fewest with a total
    probability of `top_p`; at least one.

    The result is that of transformers' TopKLogitsWarper and TopPLogitsWarper, which sort the whole
    vocabulary: that takes as long as a small layer. Here the whole vocabulary is sorted only if the
    top tokens hold too little probability.
    """

    top_k: int
    top_p: float

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.top_k and self.top_p == 1:
            return scores
        logits, token_ids, tail = self._top_tokens(scores, self.top_k or _SORTED_FIRST)
        if not self.top_k and bool((tail[:, -1] > 1 - self.top_p).any()):
            logits, token_ids, tail = self._top_tokens(scores, scores.shape[-1])
        removed = tail <= 1 - self.top_p
        removed[:, 0] = False
        logits = logits.masked_fill(removed, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token_ids, logits)

    def _top_tokens(self, scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits, ids and tail probabilities (of a token and all less likely ones) of the
        top tokens, (rows, count)."""
        logits, token_ids = scores.topk(min(count, scores.shape[-1]))
        normalizer = (logits if self.top_k else scores).logsumexp(-1, keepdim=True)
        probabilities = (logits - normalizer).double().exp()
        return logits, token_ids, 1 - (probabilities.cumsum(-1) - probabilities)


class GumbelSampler(LogitsProcessor):
    """Add Gumbel noise, so that the argmax is a sample (Gumbel, 1954; Maddison et al., 2014,
    arXiv:1411.0030)."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: device-independent

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        exponential = torch.empty(scores.shape).exponential_(generator=self.generator)
        noise = exponential.clamp_(min=torch.finfo(torch.float32).tiny).log_()
        return scores.float() - noise.to(scores.device)
