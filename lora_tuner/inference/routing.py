"""Model "auto": the adapter that fits a prompt, or the base where none clearly does.

The base and the adapters read the prompt in one mixed batch. An adapter's score is its gain, in nats per token: the
tokens' log-probability with it minus that of the base. It is compared with its gains on general text and on its own
held-out rows (`RoutingInfo` in its manifest), and with those of the other adapters. Price: at most `MAX_ROW_TOKENS`
tokens are read, rows times length, whatever the prompt. All adapters read the beginning of a long prompt; then the best
two read on, and read its end.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from ..adapters.manifest import OpeningGains
from ..errors import GenerationError
from .batch import GenerationEngine
from .generator import Generator, Prompt
from .interface import DecoderInterface
from .multi_lora import LoadedAdapter

MAX_TOKENS = 256  # of a prompt: the first and the last half of them
MAX_ROW_TOKENS = 576  # in all rows; fewer than three prompts of 256 tokens have
MIN_TOKENS = 8  # that each of many adapters reads, beyond `MAX_ROW_TOKENS` if need be
FINALISTS = 2
# How much likelier a gain has to be on an adapter's own text than on general text, as a logarithm, and of the mean gain on
# its own text the share by which it leads the base and the adapters of other data: text of any kind gains with several.
MIN_LOG_RATIO, LEAD_SHARE = 1.0, 0.15
# Least standard deviations, in nats per token and of the mean gain: few rows are measured, and some begin alike.
MIN_DEVIATION, MIN_OWN_DEVIATION = 0.03, 0.15


@dataclass(frozen=True, eq=False)
class Candidate:
    """An adapter in memory, and the prompt as it is asked it."""

    name: str
    lora: LoadedAdapter
    token_ids: list[int]


@dataclass(frozen=True)
class Score:
    """Gain of an adapter on the prompt, in nats per token, and the one that it needs to be chosen.

    `expected` is the mean of its own rows with as many tokens, `general` that of general text; `data` names what it was
    trained on. One that was `left_out` fits the beginning of a long prompt less than the others, and has not read on.
    """

    adapter: str
    gain: float
    needed: float
    expected: float
    general: float
    tokens: int
    data: str | None = None
    left_out: bool = False


@dataclass(frozen=True)
class Choice:
    """The adapter for a prompt, or None for the base.

    `margin` is its gain minus the one that it needs; of the base what the nearest adapter lacks. `scores` are those of
    all adapters, the highest gain first and those left out last; none if the conversation has `kept` its adapter.
    """

    adapter: str | None
    margin: float = 0.0
    scores: tuple[Score, ...] = ()
    kept: bool = False

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def describe(self) -> str:
        """Say what was chosen, and why."""
        if self.kept:
            return f"auto: {self.adapter or 'the base'}, as before in this conversation."
        others = [score for score in self.scores if score.adapter != self.adapter]
        after = f"; next {others[0].adapter}, {others[0].gain:+.2f}" if others else ""
        for score in self.scores:
            if score.adapter == self.adapter:
                gain = f"{score.gain:+.2f} nats per token over the base on {score.tokens} tokens"
                return f"auto: {self.adapter}, {gain}, {score.needed:+.2f} needed{after}."
        return f"auto: the base, as no adapter gains what it needs{after}."


def choose(scores: Sequence[Score]) -> Choice:
    """Choose of the adapters that gain what they need, and lead the others, the one with the highest gain."""
    rated = [replace(score, needed=round(max(score.needed, _lead(score, scores)), 4)) for score in scores]
    ranked = tuple(sorted(rated, key=lambda score: (score.left_out, -score.gain, score.adapter)))
    compared = [score for score in ranked if not score.left_out]
    for score in compared:
        if score.gain >= score.needed:
            return Choice(score.adapter, round(score.gain - score.needed, 4), ranked)
    return Choice(None, round(min((score.needed - score.gain for score in compared), default=0.0), 4), ranked)


def _lead(score: Score, scores: Sequence[Score]) -> float:
    """Return the gain that leads the base and the adapters of other data. Those left out have read fewer tokens, and a
    beginning gains more than the text after it."""
    others = [each for each in scores if each.adapter != score.adapter and not each.left_out]
    rivals = [each.gain for each in others if each.data is None or each.data != score.data]
    return max([0.0, *rivals]) + LEAD_SHARE * max(score.expected, 0.0)


def make_score(candidate: Candidate, gain: float, tokens: int) -> Score:
    """Compare a gain with those on the adapter's own rows and on general text."""
    own = candidate.lora.routing
    assert own is not None
    assert own.general is not None
    return Score(
        adapter=candidate.name,
        gain=round(gain, 4),
        needed=needed_gain(own, own.general, tokens),
        expected=round(gain_after(own, tokens)[0], 4),
        general=round(gain_after(own.general, tokens)[0], 4),
        tokens=tokens,
        data=candidate.lora.data,
    )


def needed_gain(own: OpeningGains, general: OpeningGains, tokens: int) -> float:
    """Return the least gain that speaks for own text rather than general text, both normally distributed.

    One above the mean of own text speaks for it as the mean does, one below that of general text likewise.
    """
    general_mean, general_deviation = gain_after(general, tokens)
    own_mean, own_deviation = gain_after(own, tokens)
    own_mean = max(own_mean, general_mean + MIN_DEVIATION)
    own_deviation = max(own_deviation, MIN_DEVIATION, MIN_OWN_DEVIATION * own_mean)
    general_deviation = max(general_deviation, MIN_DEVIATION)

    def log_ratio(gain: float) -> float:
        above, below = max(gain - general_mean, 0.0), max(own_mean - gain, 0.0)
        squares = (above / general_deviation) ** 2 - (below / own_deviation) ** 2
        return squares / 2 + math.log(general_deviation / own_deviation)

    low, high = general_mean, own_mean
    while log_ratio(high) < MIN_LOG_RATIO:
        high += general_deviation
    for _ in range(30):  # the ratio rises with the gain
        middle = (low + high) / 2
        low, high = (middle, high) if log_ratio(middle) < MIN_LOG_RATIO else (low, middle)
    return round(high, 4)


def gain_after(gains: OpeningGains, tokens: int) -> tuple[float, float]:
    """Return mean and standard deviation of the gain after so many tokens. Beyond those that were measured the
    deviation falls as that of a mean does."""
    lengths = np.log(gains.tokens)
    mean, deviation = (float(np.interp(np.log(tokens), lengths, each)) for each in (gains.gain, gains.deviation))
    return mean, deviation * math.sqrt(min(1.0, gains.tokens[-1] / tokens))


@torch.inference_mode()
def score_prompt(engine: GenerationEngine, candidates: Sequence[Candidate]) -> list[Score]:
    """Read a prompt with all candidates and the base, and return the score of each.

    One whose log-probabilities are not finite is left out. Call it between two steps of the engine.

    Raises:
        GenerationError: the base has no KV cache.
    """
    passes = _make_passes(engine, candidates)
    rows, longest = sum(len(each.rows) for each in passes), max(len(each.token_ids) for each in passes)
    in_parts = rows * longest > MAX_ROW_TOKENS and all(each.decoder.chunked_prefill for each in passes)
    first = min(MAX_TOKENS, max(MIN_TOKENS, MAX_ROW_TOKENS // (2 * rows if in_parts else rows)))
    for each in passes:
        each.read(first)
    scores = _scores(passes, candidates)
    if in_parts:
        best = [score.adapter for score in choose([*scores.values()]).scores[:FINALISTS]]
        forms = [tuple(candidate.token_ids) for candidate in candidates if candidate.name in best]
        passes = [each for each in passes if each.keep(best, forms)]
        kept = max(sum(len(each.rows) for each in passes), 1)
        total = min(first + max(MAX_ROW_TOKENS - rows * first, 0) // kept, MAX_TOKENS)
        for each in passes:
            each.read(total)
        scores = {name: replace(score, left_out=True) for name, score in scores.items()}
        scores |= _scores(passes, candidates)
    return [*scores.values()]


_Rows = dict[str | None, LoadedAdapter | None]  # name -> adapter, None for the base


class _Pass:
    """A prompt in one form, `token_ids`, read by some rows in one batch."""

    def __init__(
        self,
        engine: GenerationEngine,
        decoder: DecoderInterface,
        rows: _Rows,
        token_ids: tuple[int, ...],
    ) -> None:
        self.decoder, self.rows, self.token_ids = decoder, rows, token_ids
        self.device, self.base_size = engine.base.device, engine.base.head_size
        self.lora = decoder.new_lora(engine.multi_lora)
        self.lora.set_rows([*rows.values()])
        self.cache, self.tokens_read = decoder.new_cache([0] * len(rows)), 0
        self.logprobs = torch.empty(len(rows), 0)  # of the tokens, in nats

    def read(self, total: int) -> None:
        """Read on until `total` tokens are read. What follows the first call is as much of the end of the prompt as
        of its beginning, unless more of the beginning has been read."""
        start, length = self.tokens_read, len(self.token_ids)
        head = total if start == 0 or length <= total else max(start, total - total // 2)
        tail = min(max(total - head, 0), max(length - head, 0))
        window = [*self.token_ids[start:head], *self.token_ids[length - tail :]]
        if len(window) < 2:
            return
        ids = torch.tensor([window] * len(self.rows), device=self.device)
        logits = self.decoder.forward(ids, self.cache, self.lora)[:, :-1]
        self.tokens_read += len(window)
        if logits.shape[1] != len(window) - 1:
            raise GenerationError(
                "The base has no standard KV cache, so the texts of adapters are not compared: name an adapter."
            )
        for row, loaded in enumerate(self.rows.values()):  # another row may have more tokens
            size = (loaded and loaded.vocab_size) or self.base_size or logits.shape[-1]
            logits[row, :, size:] = -torch.inf
        chosen = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        self.logprobs = torch.cat([self.logprobs, chosen.cpu()], 1)

    def keep(self, names: Sequence[str], forms: Sequence[Sequence[int]]) -> bool:
        """Keep these adapters, and the base if they are asked in this form; False if nothing is left."""
        kept = [
            row
            for row, name in enumerate(self.rows)
            if name in names or (name is None and self.token_ids in forms)
        ]
        self.rows = {name: loaded for row, (name, loaded) in enumerate(self.rows.items()) if row in kept}
        self.logprobs = self.logprobs[kept]
        if kept:
            self.cache.keep_rows(kept)
            self.lora.set_rows([*self.rows.values()])
        return bool(kept)


def _make_passes(engine: GenerationEngine, candidates: Sequence[Candidate]) -> list[_Pass]:
    """Put rows together that read the same tokens and can share a batch. The base reads the prompt in each form."""
    plain: dict[tuple[int, ...], LoadedAdapter | None] = {}
    groups: dict[tuple[tuple[DecoderInterface, LoadedAdapter | None], tuple[int, ...]], _Rows] = {}
    for candidate in candidates:
        form = tuple(candidate.token_ids)
        if form not in plain:  # of added tokens the base gets rows too
            has_tokens = candidate.lora.vocab_size and max(form) >= engine.base.vocab_size
            plain[form] = engine.multi_lora.untrained(candidate.lora) if has_tokens else None
            groups.setdefault((engine.batch_key(plain[form]), form), {})[None] = plain[form]
        groups.setdefault((engine.batch_key(candidate.lora), form), {})[candidate.name] = candidate.lora
    return [_Pass(engine, key[0], rows, form) for (key, form), rows in groups.items()]


def _scores(passes: Sequence[_Pass], candidates: Sequence[Candidate]) -> dict[str, Score]:
    """Score what the passes have read, by adapter."""
    read = {(name, each.token_ids): each.logprobs[row] for each in passes for row, name in enumerate(each.rows)}
    scores = {}
    for candidate in candidates:
        form = tuple(candidate.token_ids)
        if (candidate.name, form) in read:
            gains = read[candidate.name, form] - read[None, form]
            if len(gains) and gains.isfinite().all():
                scores[candidate.name] = make_score(candidate, float(gains.mean()), len(gains) + 1)
    return scores


def choose_adapter(generator: Generator, prompts: Mapping[str, Prompt]) -> Choice:
    """Choose an adapter of a generator for a prompt, or the base.

    Args:
        prompts: name of each adapter to choose from -> the prompt as it is asked it.
    """
    candidates = []
    for name, prompt in prompts.items():
        _, lora = generator.get_or_load(name)
        assert lora is not None
        encoded = generator.encode_prompt(prompt, generator.tokenizer_of(name), generator.vocab_size_of(name))
        candidates.append(Candidate(name, lora, encoded.token_ids))
    return choose(score_prompt(generator.engine, candidates))
