"""Time that a report takes, estimated before it begins from the pace of this machine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..adapters.adapter import Adapter
from ..config import SamplingParams
from ..data.eval_sets import EvalSet
from ..data.general_text import general_texts
from ..evaluation import held_out_loss
from ..inference.generator import EncodedPrompt, Generator
from ..models.loading import LoadedBase
from .memorization import LOSS_TOKENS
from .style_openings import NEW_TOKENS, OPENINGS
from .subject import BATCH
from .verbatim import CONTINUED_ROWS, OPENING_TOKENS

_PACE_TOKENS = 8  # that each text of a batch gets to find the pace
_SECONDS_PER_ROW = 0.0012  # of the data: read twice, tokenized, compared
_READING_SHARE = 0.5  # time of a token of a row, in tokens of a short prompt: those are slower
_TOKEN_CHARS = 4.0  # characters of a token, about
_STYLE_READINGS = 9  # of each text: of four sides as they are and reversed, and of their openings


@dataclass(frozen=True)
class Pace:
    """Seconds that a token takes on this machine: one of `BATCH` texts that are generated at once,
    and one of a row whose loss is measured."""

    generated: float
    measured: float


def measure_pace(generator: Generator) -> Pace:
    """Generate a few tokens with the current adapter. Price: seconds."""
    ids = np.concatenate(generator.base.probe_sequences()).tolist()
    requests = [(EncodedPrompt("", ids), generator.current_adapter)] * BATCH

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        sampling = SamplingParams(greedy=True, max_new_tokens=tokens, ignore_eos=True)
        generator.generate_batch(requests, sampling, chat=False)
        return time.perf_counter() - start

    seconds(1)  # the first call prepares the decoder
    first, all_tokens = seconds(1), seconds(1 + _PACE_TOKENS)
    generated = max(all_tokens - first, 0.0) / (_PACE_TOKENS * BATCH)
    return Pace(generated, _READING_SHARE * first / (BATCH * len(ids)))


def seconds_per_measured_token(base: LoadedBase) -> float:
    """Measure the loss of a few tokens."""
    rows = [*base.probe_sequences()] * _PACE_TOKENS

    def seconds() -> float:
        start = time.perf_counter()
        held_out_loss.measure_loss(base.model, base, rows)
        return time.perf_counter() - start

    seconds()  # the first call is slower
    return seconds() / sum(map(len, rows))


def estimate_seconds(adapter: Adapter, pace: Pace, guards: Sequence[EvalSet] = ()) -> dict[str, float]:
    """Estimate how long each part takes, without what is in the cache: within a factor of two on the
    machines where it was tried."""
    counts = adapter.manifest.data.counts if adapter.manifest and adapter.manifest.data else {}
    reading = _SECONDS_PER_ROW * counts.get("read", 0)
    tokens, openings = OPENINGS * NEW_TOKENS, 2 * CONTINUED_ROWS * OPENING_TOKENS
    texts = sum(len(text) for rows in [*general_texts(), *guards] for text in rows.texts) / _TOKEN_CHARS
    return {
        "style": reading / 2 + 2 * tokens * pace.generated + _STYLE_READINGS * tokens * pace.measured,
        "memorization": reading / 2 + (openings + 2 * LOSS_TOKENS) * pace.measured,
        "forgetting": 2 * texts * pace.measured,
    }
