"""Measure what a manifest holds of base and adapter beside their losses.

Probes are short prompts with the likeliest next tokens: `adapters check --url` sends them to a server, and tells by
its log-probabilities which weights it uses. Gains on openings are for model `auto` (routing.py). Price: four forward
passes over a few hundred tokens, and two over at most 5,400, without those just read in training.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from ..adapters.adapter import Adapter
from ..adapters.manifest import SCALES, Manifest, OpeningGains, Probe, RoutingInfo
from ..config import ModelOptions
from ..data import chat_template, general_text, packing, tokenization
from ..data.prompts import held_out_prompts
from ..data.row_template import Template, fill_question
from ..data.tokenization import TokenIds
from ..errors import DataError
from ..models import fused_blocks
from ..models.loading import LoadedBase
from ..models.tokenizer import load_adapter_tokenizer
from .detokenizer import token_text
from .multi_lora import MultiLora

if TYPE_CHECKING:
    from peft import PeftModel

PROBES = 8  # half of them in a conversation, where conversations were learned
CANDIDATES = 32
TOP_TOKENS = 10  # a server gives five, in another order where its rounding decides
MAX_TOKENS = 128  # of a prompt, with its template
OPENING_TOKENS = (4, 8, 16, 32, 64, 128)  # after which gains are measured
OPENINGS, MIN_OPENINGS = 32, 4  # own rows
GENERAL_TOKENS = 32  # that most rows of general text have, outside of a conversation
LOGITS_TOKENS, NLL_TOKENS = 256, 2048  # of a forward pass; of the first kind all logits exist at once
NEUTRAL_PROMPTS = (
    "Once upon a time", "The most important thing is", "Dear Sir or Madam,", "In this article we",
    "What is the capital of", "I have never seen such a", "The weather today is", "def main(",
    "She opened the door and", "Chapter 1", "First of all,", "According to the report,",
)  # fmt: skip

AtScale = Callable[[float], AbstractContextManager[None]]  # inside, the adapter has that scale
_Nats = npt.NDArray[np.float64]
TokenGains = tuple[TokenIds, _Nats]  # a row, and the gain of each of its tokens but the first
_Prompt = tuple[str, bool]  # prompt, asked in a conversation


def measured_fields(
    base: LoadedBase,
    texts: Sequence[str],
    *,
    is_chat: bool,
    template: Template | None,
    at_scale: AtScale,
    read: Sequence[TokenGains] = (),
) -> dict[str, object]:
    """Measure probes and gains on openings.

    Args:
        base: the base, with the tokenizer of the adapter.
        texts: held-out rows; without any, the probes are neutral prompts, and no gains are measured.
        is_chat: the adapter has learned conversations.
        template: of the texts that it has learned.
        at_scale: enters the adapter at a scale, 0 for the plain base.
        read: rows whose gains are known, be they longer than their openings.
    """
    prompts = _encode_prompts(base, texts, is_chat=is_chat)
    openings = _own_openings(base, texts)
    general = _general_openings(base, is_chat=is_chat, template=template) if openings else []
    limits = OPENING_TOKENS[-1], GENERAL_TOKENS
    known = {row[:limit].tobytes(): gain[: limit - 1] for row, gain in read for limit in limits}
    unread = [row for row in [*openings, *general] if row.tobytes() not in known]
    tables, nll = dict[str, torch.Tensor](), dict[str, list[_Nats]]()
    for name, scale in SCALES.items():
        with at_scale(scale), _evaluating(base):
            if prompts:
                tables[name] = _next_logprobs(base, [*prompts.values()])
            if scale in (0.0, 1.0):
                nll[name] = _token_nll(base, unread)
    for row, before, after in zip(unread, nll["base"], nll["adapter"], strict=True):
        known[row.tobytes()] = before - after
    gains = [known[row.tobytes()] for row in [*openings, *general]]
    own = _opening_gains(gains[: len(openings)], MIN_OPENINGS)
    of_general = _opening_gains(gains[len(openings) :], len(general) // 2)  # else of some kinds alone
    routing = RoutingInfo(**own.model_dump(), general=of_general) if own and of_general else None
    return {"probes": _choose_probes(base, [*prompts], tables) or None, "routing": routing}


def measure_stored(
    base: LoadedBase, adapter: Adapter, manifest: Manifest, texts: Sequence[str], options: ModelOptions
) -> dict[str, object]:
    """`measured_fields` of an adapter on disk, whose manifest may not be there yet."""
    tokenizer = load_adapter_tokenizer(adapter, base, options)
    of_adapter = base if tokenizer is None else replace(base, tokenizer=tokenizer)
    at_scale = scales_of_stored(base, adapter)
    return measured_fields(
        of_adapter, texts, is_chat=manifest.is_chat, template=manifest.template, at_scale=at_scale
    )


def _encode_prompts(base: LoadedBase, texts: Sequence[str], *, is_chat: bool) -> dict[_Prompt, TokenIds]:
    """Token ids of the prompts that may become probes."""
    prompts = held_out_prompts(texts, conversations=is_chat, count=CANDIDATES)
    if len(prompts) < PROBES:
        prompts += NEUTRAL_PROMPTS
    encoded = tokenization.encode_texts(base.tokenizer, prompts, add_eos=False)
    rows = {(prompt, False): row for prompt, row in zip(prompts, encoded, strict=True)}
    if is_chat and base.tokenizer.chat_template:
        rows |= {(prompt, True): row for prompt, row in _encode_chats(base, prompts).items()}
    longest = min(MAX_TOKENS, base.max_context - 1)
    return {prompt: row for prompt, row in rows.items() if 0 < len(row) <= longest}


def _encode_chats(base: LoadedBase, prompts: Sequence[str]) -> dict[str, TokenIds]:
    """Token ids of each prompt as the question of a conversation that the template accepts."""
    rows = {}
    for prompt in prompts:
        with contextlib.suppress(DataError):
            messages = [{"role": "user", "content": prompt}]
            text = chat_template.render_prompt(base.tokenizer, messages)
            encoded = base.tokenizer(text, add_special_tokens=False, return_tensors="np")
            rows[prompt] = encoded["input_ids"][0]
    return rows


def _choose_probes(
    base: LoadedBase, prompts: Sequence[_Prompt], tables: Mapping[str, torch.Tensor]
) -> list[Probe]:
    """Probes of the prompts that tell the adapter best from the base and from its other scales: half of them in a
    conversation, if there are such.

    Args:
        prompts: the prompts.
        tables: of each scale, log-probabilities of the token after each prompt.
    """
    if not prompts:
        return []
    of_adapter = tables["adapter"]
    divergences = []
    for name in SCALES.keys() - {"adapter"}:  # Jeffreys: both directions of Kullback and Leibler
        terms = (of_adapter.exp() - tables[name].exp()) * (of_adapter - tables[name])
        divergences.append(terms.nansum(-1))
    score = torch.stack(divergences).amin(0)
    ends = torch.tensor([*base.eos_token_ids, *chat_template.turn_end_ids(base.tokenizer)])
    for logprobs in tables.values():  # some servers say nothing about an end of text
        score[torch.isin(logprobs.argmax(-1), ends)] *= 0.01
    chats = PROBES // 2 if any(chat for _, chat in prompts) else 0
    left, probes = {False: PROBES - chats, True: chats}, list[Probe]()
    for index in score.argsort(descending=True, stable=True).tolist():
        prompt, chat = prompts[index]
        if left[chat]:
            of_prompt = {name: _top_tokens(base, table[index]) for name, table in tables.items()}
            if all(of_prompt.values()):
                left[chat] -= 1
                probes.append(Probe(prompt=prompt, chat=chat, **of_prompt))
    return sorted(probes, key=lambda probe: probe.chat)


def _own_openings(base: LoadedBase, texts: Sequence[str]) -> list[TokenIds]:
    """Token ids of the beginnings of held-out rows: before what is learned or, where all of it is, the first ones."""
    texts = texts[:: math.ceil(len(texts) / OPENINGS) or 1]
    limit, openings = min(OPENING_TOKENS[-1], base.max_context), list[TokenIds]()
    for row in tokenization.encode_texts(base.tokenizer, texts, max_tokens=limit, invalid={}):
        learned = np.flatnonzero(row >= 0)
        question = int(learned[0]) if len(learned) else 0
        opening = row[:question] if question >= OPENING_TOKENS[0] else row
        openings.append(tokenization.token_ids(opening)[:limit])
    return [row for row in openings if len(row) >= OPENING_TOKENS[0]]


def _general_openings(base: LoadedBase, *, is_chat: bool, template: Template | None) -> list[TokenIds]:
    """Token ids of general text, in the form in which the adapter is asked."""
    texts = [text for kind in general_text.general_texts(subset=True) for text in kind.texts]
    if is_chat and base.tokenizer.chat_template:
        rows, most = [*_encode_chats(base, texts).values()], OPENING_TOKENS[-1]
    else:
        filled = [(template and fill_question(*template, text)) or text for text in texts]
        rows, most = tokenization.encode_texts(base.tokenizer, filled, add_eos=False), GENERAL_TOKENS
    return [row[: min(most, base.max_context)] for row in rows if len(row) >= OPENING_TOKENS[0]]


def _opening_gains(gains: Sequence[_Nats], min_rows: int) -> OpeningGains | None:
    """Mean and deviation of the gain after each number of tokens that `min_rows` have, from the gains of each token
    but the first; None without any."""
    figures = []
    for tokens in OPENING_TOKENS:
        values = [row[: tokens - 1].mean() for row in gains if len(row) >= tokens - 1]
        if len(values) >= max(min_rows, 2) and np.isfinite(values).all():
            figures.append((tokens, round(float(np.mean(values)), 4), round(float(np.std(values, ddof=1)), 4)))
    if not figures:
        return None
    lengths, means, deviations = zip(*figures, strict=True)
    return OpeningGains(tokens=lengths, gain=means, deviation=deviations)


def _top_tokens(base: LoadedBase, logprobs: torch.Tensor) -> dict[str, float]:
    """The likeliest tokens by their text, without those that are part of a character."""
    best = logprobs.nan_to_num(-torch.inf).topk(min(TOP_TOKENS, len(logprobs)))
    tokens: dict[str, float] = {}
    for token, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        text, data = token_text(base.tokenizer, token)
        if text and data == list(text.encode()) and logprob > -torch.inf:
            tokens.setdefault(text, round(min(logprob, 0.0), 4))
    return tokens


@contextlib.contextmanager
def _evaluating(base: LoadedBase) -> Iterator[None]:
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.callback(base.model.train, base.model.training)
        base.model.eval()
        yield


def _next_logprobs(base: LoadedBase, rows: Sequence[TokenIds]) -> torch.Tensor:
    """Log-probabilities of the token after each row, (rows, vocabulary) in float32 on the CPU."""
    result = []
    for batch in _batches(rows, LOGITS_TOKENS):
        logits, _, packed = _forward(base, batch)
        lengths = torch.tensor([len(row) for row in batch])
        last = logits[0, lengths.cumsum(0) - 1] if packed else logits[torch.arange(len(batch)), lengths - 1]
        result.append(last.float().log_softmax(-1).cpu())
    return torch.cat(result)


def _token_nll(base: LoadedBase, rows: Sequence[TokenIds]) -> list[_Nats]:
    """Negative log-likelihood of each token of each row but the first, in nats."""
    result: list[_Nats] = []
    size = NLL_TOKENS if base.lm_head.skipped else LOGITS_TOKENS
    for batch in _batches(rows, size):
        with base.lm_head.skip_lm_head():
            output, labels, packed = _forward(base, batch)
            nll = base.lm_head.nll(output, labels).double().cpu()
        result += [values[:-1].numpy() for values in packing.split_rows(nll, batch, packed=packed)]
    return result


def _forward(base: LoadedBase, rows: Sequence[TokenIds]) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Run the model on rows in one batch, or packed into one sequence where it isolates them.

    Returns its `logits`, the labels, and True if the rows are packed.
    """
    packed = fused_blocks.packs_rows(base.model)
    sequences = [rows] if packed else [[row] for row in rows]
    inputs = packing.collate(sequences, base.tokenizer.pad_token_id, cu_seqlens=packed, pad_to_step=packed)
    inputs = {name: tensor.to(base.device) for name, tensor in inputs.items()}
    labels = inputs.pop("labels")
    return base.model(**inputs, use_cache=False).logits, labels, packed


def _batches(rows: Sequence[TokenIds], most: int) -> Iterator[list[TokenIds]]:
    """Yield rows in batches of at most so many positions, padding included, or of one row."""
    batch: list[TokenIds] = []
    for row in rows:
        longest = max(map(len, [*batch, row]))
        if batch and longest * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def scales_of_trained(model: "PeftModel") -> AtScale:
    """Return the contexts of a model in training, with its LoRA at a scale."""
    from peft.tuners.lora import LoraLayer

    @contextlib.contextmanager
    def at_scale(scale: float) -> Iterator[None]:
        if scale == 0:
            with model.disable_adapter():
                yield
            return
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        before = [dict(layer.scaling) for layer in layers]
        try:
            for layer in layers:
                layer.scaling.update({name: scale * value for name, value in layer.scaling.items()})
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)

    return at_scale


def scales_of_stored(base: LoadedBase, adapter: Adapter) -> AtScale:
    """Return the contexts of a plain base, with an adapter on disk whose alpha is scaled."""
    multi_lora = MultiLora(base)

    def at_scale(scale: float) -> AbstractContextManager[None]:
        patterns = adapter.config.get("alpha_pattern") or {}
        alphas = {
            "lora_alpha": scale * adapter.config["lora_alpha"],
            "alpha_pattern": {name: scale * alpha for name, alpha in patterns.items()},
        }
        loaded = multi_lora.load(replace(adapter, config=adapter.config | alphas))
        if scale == 0:
            loaded = multi_lora.untrained(loaded)
        return multi_lora.apply_hooks(multi_lora.hooks([loaded]))

    return at_scale
