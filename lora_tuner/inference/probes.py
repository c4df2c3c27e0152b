"""Short prompts with the likeliest next tokens of base and adapter, for the manifest.

`adapters check --url` sends them to a server, and tells by its log-probabilities which weights it
uses. Price: four forward passes over a few hundred tokens, twice for
conversations.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..adapters.adapter import Adapter
from ..adapters.manifest import SCALES, Probe
from ..config import ModelOptions
from ..data import chat_template, packing, tokenization
from ..data.prompts import held_out_prompts
from ..data.tokenization import TokenIds
from ..errors import DataError
from ..models import fused_blocks
from ..models.loading import LoadedBase
from ..models.tokenizer import load_adapter_tokenizer
from .detokenizer import token_text
from .multi_lora import MultiLora
from .routing import AtScale, measure_routing

if TYPE_CHECKING:
    from peft import PeftModel

PROBES = 8  # half of them in a conversation, where conversations were learned
CANDIDATES = 32
TOP_TOKENS = 10  # a server gives five, in another order where its rounding decides
MAX_TOKENS = 128  # of a prompt, with its template
BATCH_TOKENS = 256  # whose logits exist at once
NEUTRAL_PROMPTS = (
    "Once upon a time", "The most important thing is", "Dear Sir or Madam,", "In this article we",
    "What is the capital of", "I have never seen such a", "The weather today is", "def main(",
    "She opened the door and", "Chapter 1", "First of all,", "According to the report,",
)  # fmt: skip


def measured_fields(
    base: LoadedBase, texts: Sequence[str], *, is_chat: bool, at_scale: AtScale
) -> dict[str, object]:
    """Measure what a manifest holds of base and adapter beside their losses.

    Args:
        base: the base, with the tokenizer of the adapter.
        texts: held-out rows; without any, neutral prompts are taken.
        is_chat: the adapter has learned conversations.
        at_scale: enters the adapter at a scale, 0 for the plain base.
    """
    return {
        "probes": measure_probes(base, texts, is_chat=is_chat, at_scale=at_scale),
        "routing": measure_routing(base, texts, at_scale),
    }


def measure_stored(
    base: LoadedBase, adapter: Adapter, texts: Sequence[str], *, is_chat: bool, options: ModelOptions
) -> dict[str, object]:
    """`measured_fields` of an adapter on disk."""
    tokenizer = load_adapter_tokenizer(adapter, base, options)
    of_adapter = base if tokenizer is None else replace(base, tokenizer=tokenizer)
    at_scale = scales_of_stored(base, adapter)
    return measured_fields(of_adapter, texts, is_chat=is_chat, at_scale=at_scale)


def measure_probes(
    base: LoadedBase, texts: Sequence[str], *, is_chat: bool, at_scale: AtScale
) -> list[Probe] | None:
    """Choose the prompts after which base and adapter differ most, and measure both there.

    Arguments are those of `measured_fields`. Returns None where no prompt gives finite logits.
    """
    prompts = held_out_prompts(texts, conversations=is_chat, count=CANDIDATES)
    if len(prompts) < PROBES:
        prompts += NEUTRAL_PROMPTS
    encoded = tokenization.encode_texts(base.tokenizer, prompts, add_eos=False)
    text_rows = dict(zip(prompts, encoded, strict=True))
    chat_rows = _encode_chats(base, prompts) if is_chat and base.tokenizer.chat_template else {}
    count = PROBES // 2 if chat_rows else PROBES
    probes = _choose(base, text_rows, at_scale, count, chat=False)
    probes += _choose(base, chat_rows, at_scale, PROBES - count, chat=True)
    return probes or None


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


def _choose(
    base: LoadedBase, rows: dict[str, TokenIds], at_scale: AtScale, count: int, *, chat: bool
) -> list[Probe]:
    """Probes of the prompts that tell the adapter best from the base and from its other scales."""
    longest = min(MAX_TOKENS, base.max_context - 1)
    rows = {prompt: row for prompt, row in rows.items() if 0 < len(row) <= longest}
    if not rows or not count:
        return []
    tables = {}
    for name, scale in SCALES.items():
        tables[name] = _next_logprobs(base, [*rows.values()], at_scale(scale))
    of_adapter = tables["adapter"]
    divergences = []
    for name in SCALES.keys() - {"adapter"}:  # Jeffreys: both directions of Kullback and Leibler
        terms = (of_adapter.exp() - tables[name].exp()) * (of_adapter - tables[name])
        divergences.append(terms.nansum(-1))
    score = torch.stack(divergences).amin(0)
    ends = torch.tensor([*base.eos_token_ids, *chat_template.turn_end_ids(base.tokenizer)])
    for logprobs in tables.values():  # some servers say nothing about an end of text
        score[torch.isin(logprobs.argmax(-1), ends)] *= 0.01
    prompts, probes = [*rows], list[Probe]()
    for index in score.argsort(descending=True, stable=True).tolist():
        of_prompt = {name: _top_tokens(base, table[index]) for name, table in tables.items()}
        if all(of_prompt.values()) and len(probes) < count:
            probes.append(Probe(prompt=prompts[index], chat=chat, **of_prompt))
    return probes


def _top_tokens(base: LoadedBase, logprobs: torch.Tensor) -> dict[str, float]:
    """The likeliest tokens by their text, without those that are part of a character."""
    best = logprobs.nan_to_num(-torch.inf).topk(min(TOP_TOKENS, len(logprobs)))
    tokens: dict[str, float] = {}
    for token, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        text, data = token_text(base.tokenizer, token)
        if text and data == list(text.encode()) and logprob > -torch.inf:
            tokens.setdefault(text, round(min(logprob, 0.0), 4))
    return tokens


def _next_logprobs(
    base: LoadedBase, rows: Sequence[TokenIds], context: AbstractContextManager[None]
) -> torch.Tensor:
    """Log-probabilities of the token after each row, (rows, vocabulary) in float32 on the CPU."""
    model, result = base.model, []
    with contextlib.ExitStack() as stack, torch.no_grad(), context:
        stack.callback(model.train, model.training)
        model.eval()
        for batch in _batches(rows):
            packed = fused_blocks.packs_rows(model)
            sequences = [batch] if packed else [[row] for row in batch]
            inputs = packing.collate(sequences, base.tokenizer.pad_token_id, cu_seqlens=packed)
            del inputs["labels"]
            inputs = {name: tensor.to(base.device) for name, tensor in inputs.items()}
            logits = model(**inputs, use_cache=False).logits
            lengths = torch.tensor([len(row) for row in batch])
            rows_of_batch = torch.arange(len(batch))
            last = logits[0, lengths.cumsum(0) - 1] if packed else logits[rows_of_batch, lengths - 1]
            result.append(last.float().log_softmax(-1).cpu())
    return torch.cat(result)


def _batches(rows: Sequence[TokenIds]) -> Iterator[list[TokenIds]]:
    """Rows in batches of at most BATCH_TOKENS positions, padding included, or of one row."""
    batch: list[TokenIds] = []
    for row in rows:
        longest = max(map(len, [*batch, row]))
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
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
