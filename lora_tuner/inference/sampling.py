"""Logits to tokens: repetition penalty, temperature, top-k, top-p, sampling.

Each sequence has its own random generator, so other sequences of its batch do not change it.
Sampling adds Gumbel noise to the logits and takes the maximum, which is equivalent to sampling from
their softmax.
"""

import secrets
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


def make_logits_processors(sampling: SamplingParams, seed: int | None) -> LogitsProcessorList:
    """Build the processors of one sequence; the argmax of their result is its token. `seed` None:
    greedy."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if seed is not None:
        processors += [
            TemperatureLogitsWarper(sampling.temperature),
            TopKTopPWarper(sampling.top_k, sampling.top_p),
            GumbelSampler(seed),
        ]
    return processors


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
