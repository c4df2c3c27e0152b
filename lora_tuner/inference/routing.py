"""Model "auto": the adapter that fits a prompt, or the base where none clearly does.

The base and the adapters read the prompt in one mixed batch. An adapter's score is its gain, in nats per token: the
tokens' log-probability with it minus that of the base. It is compared with what openings of the adapter's own held-out
rows score (`RoutingInfo` in its manifest). Price: at most `MAX_ROW_TOKENS` tokens are read, rows times length,
whatever the prompt. All adapters read the beginning of a long prompt; then the best two read on, and read its end.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..adapters.manifest import RoutingInfo
from ..data import packing, tokenization
from ..data.tokenization import TokenIds
from ..errors import GenerationError
from ..models import fused_blocks
from ..models.loading import LoadedBase
from .batch import GenerationEngine
from .generator import Generator, Prompt
from .interface import DecoderInterface
from .multi_lora import LoadedAdapter

MAX_TOKENS = 256  # of a prompt: the first and the last half of them
MAX_ROW_TOKENS = 576  # in all rows; fewer than three prompts of 256 tokens have
MIN_TOKENS = 8  # that each of many adapters reads, beyond `MAX_ROW_TOKENS` if need be
FINALISTS = 2
MEASURED_TOKENS = (4, 8, 16, 32, 64, 128)  # of own rows, whose mean gains are kept
MEASURED_ROWS, MIN_ROWS, MEASURED_BATCH = 32, 4, 8
# Of the gain on its own rows. Plain text of any kind gains with most adapters, so a gain alone says little.
LEAD_SHARE = 0.3

AtScale = Callable[[float], AbstractContextManager[None]]  # inside, the adapter has that scale


@dataclass(frozen=True, eq=False)
class Candidate:
    """An adapter in memory, and the prompt as it is asked it."""

    name: str
    lora: LoadedAdapter
    token_ids: list[int]


@dataclass(frozen=True)
class Score:
    """Gain of an adapter on the prompt, in nats per token, and the lead that it needs to be chosen.

    `expected` is the mean of its own rows with as many tokens; `data` names what it was trained on.
    """

    adapter: str
    gain: float
    needed: float
    expected: float
    tokens: int
    data: str | None = None


@dataclass(frozen=True)
class Choice:
    """The adapter for a prompt, or None for the base.

    `margin` is its lead: its gain minus that of the next one of other data, or of the base, which has 0; of the base
    what the best adapter lacks. `scores` are those of all adapters, the best first; none if the conversation has
    `kept` its adapter.
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
                return f"auto: {self.adapter}, {gain}, {score.needed:+.2f} ahead needed{after}."
        return f"auto: the base, as no adapter leads by what it needs{after}."


def choose(scores: Sequence[Score]) -> Choice:
    """Choose the adapter with the highest gain, if it leads the base and the adapters of other data by what it
    needs."""
    ranked = sorted(scores, key=lambda score: (-score.gain, score.adapter))
    if not ranked:
        return Choice(None)
    best = ranked[0]
    rivals = [score.gain for score in ranked[1:] if score.data is None or score.data != best.data]
    lead = best.gain - max([0.0, *rivals])
    if lead < best.needed or lead <= 0:
        return Choice(None, round(best.needed - lead, 4), tuple(ranked))
    return Choice(best.adapter, round(lead, 4), tuple(ranked))


def make_score(candidate: Candidate, gain: float, tokens: int) -> Score:
    """Compare a gain with that of the adapter's own rows."""
    info = candidate.lora.routing
    assert info is not None
    expected = expected_gain(info, tokens)
    needed, data = round(LEAD_SHARE * expected, 4), candidate.lora.data
    return Score(candidate.name, round(gain, 4), needed, round(expected, 4), tokens, data)


def expected_gain(info: RoutingInfo, tokens: int) -> float:
    """Return the mean gain of the adapter's own rows after so many tokens."""
    return float(np.interp(np.log(tokens), np.log(info.tokens), info.gain))


def measure_routing(base: LoadedBase, texts: Sequence[str], at_scale: AtScale) -> RoutingInfo | None:
    """Measure what an adapter gains on the first tokens of some of its held-out rows.

    Of a row that begins with what is not learned, such as a question, this part counts alone. None where too few rows
    have tokens enough. Price: two passes over at most 4,096 tokens.

    Args:
        base: the base, with the tokenizer of the adapter.
        texts: held-out rows.
        at_scale: enters the adapter at a scale, 0 for the plain base.
    """
    texts = texts[:: math.ceil(len(texts) / MEASURED_ROWS) or 1]
    limit = min(MEASURED_TOKENS[-1], base.max_context)
    encoded = tokenization.encode_texts(base.tokenizer, texts, max_tokens=limit, invalid={})
    rows = [row for row in (_opening(row)[:limit] for row in encoded) if len(row) >= MEASURED_TOKENS[0]]
    batches = [rows[start : start + MEASURED_BATCH] for start in range(0, len(rows), MEASURED_BATCH)]
    with at_scale(0.0):
        before = [values for batch in batches for values in _token_nll(base, batch)]
    with at_scale(1.0):
        after = [values for batch in batches for values in _token_nll(base, batch)]
    gains = [base_nll - nll for base_nll, nll in zip(before, after, strict=True)]
    figures = []
    for tokens in MEASURED_TOKENS:
        scores = [row[: tokens - 1].mean() for row in gains if len(row) >= tokens - 1]
        if len(scores) >= MIN_ROWS and np.isfinite(scores).all():
            figures.append((tokens, round(float(np.mean(scores)), 4), round(float(np.std(scores, ddof=1)), 4)))
    if not figures:
        return None
    lengths, means, deviations = zip(*figures, strict=True)
    return RoutingInfo(tokens=lengths, gain=means, deviation=deviations)


def _opening(row: TokenIds) -> TokenIds:
    """Return the tokens of a row before what is learned or, where all of it is learned, the first ones."""
    learned = np.flatnonzero(row >= 0)
    question = int(learned[0]) if len(learned) else 0
    row = row[:question] if question >= MEASURED_TOKENS[0] else row
    return tokenization.token_ids(row)


def _token_nll(base: LoadedBase, rows: Sequence[TokenIds]) -> list[npt.NDArray[np.float64]]:
    """Negative log-likelihood of each token of each row but the first, in nats."""
    model, packed = base.model, fused_blocks.packs_rows(base.model)
    with contextlib.ExitStack() as stack, torch.no_grad(), base.lm_head.skip_lm_head():
        stack.callback(model.train, model.training)
        model.eval()
        sequences = [rows] if packed else [[row] for row in rows]
        inputs = packing.collate(sequences, base.tokenizer.pad_token_id, cu_seqlens=packed)
        inputs = {name: tensor.to(base.device) for name, tensor in inputs.items()}
        labels = inputs.pop("labels")
        nll = base.lm_head.nll(model(**inputs, use_cache=False).logits, labels).double().cpu()
    by_row = nll[0].split([len(row) for row in rows]) if packed else nll
    return [values[: len(row) - 1].numpy() for values, row in zip(by_row, rows, strict=True)]


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
