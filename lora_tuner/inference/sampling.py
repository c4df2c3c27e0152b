"""From the logits of a row to the token it takes, one step after another, the last by chance.

Every row has a generator of its own, so that what else is in its batch does not change it. Surprise: a token is not drawn from
the shares that logits mean, but noise is added to the logits and the best taken, which comes to the same; so one place can
be asked about twice, for a guess and for the decision, with the same luck.
"""

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from ..config import SamplingParams


def make_logits_processors(sampling: SamplingParams, seed: int | None) -> LogitsProcessorList:
    """From a row's logits to those whose best is the token it takes."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if seed is not None:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
        chain.append(TopKTopPWarper(sampling.top_k, sampling.top_p))
        chain.append(GumbelSampler(seed))
    return chain


_SORTED_FIRST = 256  # of the likeliest tokens that are looked at first; most often they make up the share


class TopKTopPWarper(LogitsProcessor):
    """Leaves the `top_k` likeliest tokens (0: all), and of these the fewest that make up the share `top_p`; at least one.

    transformers' own, one after the other, sort the whole vocabulary for the second, which takes as long as a small layer; here
    that is done only where the first few do not make up the share.
    """

    def __init__(self, top_k: int, top_p: float) -> None:
        self.top_k = top_k
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.top_k and self.top_p == 1:
            return scores
        found, places, left = self._first(scores, self.top_k or _SORTED_FIRST)
        if not self.top_k and bool((left[:, -1] > 1 - self.top_p).any()):  # more than these make up the share
            found, places, left = self._first(scores, scores.shape[-1])
        beyond = left <= 1 - self.top_p
        beyond[:, 0] = False
        found = found.masked_fill(beyond, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter_(-1, places, found)

    def _first(self, scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """So many of the likeliest, their places, and for each the share that it and all less likely ones have."""
        found, places = scores.topk(min(count, scores.shape[-1]))
        shares = (found - (found if self.top_k else scores).logsumexp(-1, keepdim=True)).double().exp()
        return found, places, 1 - (shares.cumsum(-1) - shares)


class GumbelSampler(LogitsProcessor):
    """Makes the best token a random one: the Gumbel-max trick (Gumbel, 1954; Maddison et al., 2014, arXiv:1411.0030)."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device
        self.waiting: dict[int, torch.Tensor] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1]
        if place not in self.waiting:  # a place may be asked for again, after a guess
            drawn = torch.empty(scores.shape).exponential_(generator=self.generator)
            self.waiting[place] = drawn.clamp_(min=torch.finfo(torch.float32).tiny).log_()
            self.waiting.pop(place - 4, None)  # further back than any guess
        return scores.float() - self.waiting[place].to(scores.device)
