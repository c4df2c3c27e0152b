"""Labels of texts with probabilities, by an adapter that has learned them as the end of a template.

A label scores the log-probability of its tokens and of the end of text behind the text. All labels
of a text are scored in one pass over copies of its cache, so the text itself is read once. Price: a
few tokens for each label, and with transformers' cache a copy of it for each.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..adapters.adapter import Adapter
from ..adapters.label_info import LabelInfo
from ..adapters.summaries import Table, to_html
from ..data import chat, tokenization
from ..data.cleaning import clean_text
from ..data.row_template import read_template
from ..errors import (
    AdapterError,
    EventHandler,
    GenerationError,
    Progress,
    RequestError,
    ignore_events,
)
from ..models.loading import LoadedBase
from ..text import format_names
from .batch import PREFILL_TOKENS, GenerationEngine
from .generator import Generator
from .interface import DecoderInterface, LoraForBatch
from .multi_lora import LoadedAdapter

LABEL_ROWS = 32  # labels, of one text or several, that are scored in one pass
BATCH_TEXTS = 16  # texts that are read in one pass
MAX_TEMPERATURE = 20.0
NO_LABELS = "tells no labels: only an adapter that was trained with --label-column does."


@dataclass(frozen=True)
class Classification:
    """The likeliest label of a text, and the probability of each, in the order of the manifest."""

    label: str
    probabilities: dict[str, float]

    @classmethod
    def of_logprobs(cls, info: LabelInfo, logprobs: torch.Tensor) -> "Classification":
        """Return the calibrated probabilities for the log-probabilities (labels,) of one text."""
        probabilities = (logprobs / info.temperature).softmax(-1).tolist()
        by_label = dict(zip(info.names, probabilities, strict=True))
        return cls(max(by_label, key=by_label.__getitem__), by_label)

    def summary(self) -> list[Table]:
        """A table of all labels, the likeliest first."""
        ranked = sorted(self.probabilities.items(), key=lambda item: -item[1])
        return [Table([(label, f"{probability:.3f}") for label, probability in ranked])]

    def _repr_html_(self) -> str:
        return to_html(self.summary())


class LabelPrompts:
    """Token ids of texts up to the label, and those of the labels.

    `columns` are those of the text in the template. `endings` are the tokens of each label and the
    end of text; they follow the tokens with which all labels begin alike. `least_tokens` are those
    of a text of one letter and the longest label.

    Args:
        name: of the adapter, for errors.
        info: its labels.
        tokenizer: its tokenizer, or that of the base.
        max_context: of the base, in tokens.

    Raises:
        AdapterError: the template does not end with the label, or no text fits beside the labels.
    """

    def __init__(
        self,
        name: str,
        info: LabelInfo,
        tokenizer: PreTrainedTokenizerBase,
        max_context: int,
    ) -> None:
        self.name, self.info, self.tokenizer = name, info, tokenizer
        self.template = read_template(info.template, info.column)
        self.columns, self.limit = text_columns(info), min(info.max_length, max_context)
        pieces = self.template.pieces
        if (
            not self.columns
            or pieces[-1] != ("", info.column)
            or pieces.count(pieces[-1]) > 1
            or not pieces[-2][0]
        ):
            raise AdapterError(
                f"{name}: its template does not end with its label behind a text: {info.template!r}."
            )
        rows = [self._encode(dict.fromkeys(self.columns, "x"), label) for label in info.names]
        ids = [tokenization.token_ids(row) for row in rows]
        shared = min(int(np.argmax(row >= 0)) for row in rows)  # tokens before the first one of a label
        while shared and any(row[:shared].tolist() != ids[0][:shared].tolist() for row in ids):
            shared -= 1
        self.endings: list[list[int]] = [row[shared:].tolist() for row in ids]
        self.least_tokens = max(map(len, rows))
        self.max_tokens = self.limit - max(map(len, self.endings))
        if self.max_tokens < 2 or not shared:
            longest = max(info.names, key=len)
            raise AdapterError(f"{name}: no text fits beside the label {longest!r} within {self.limit} tokens.")

    def encode(self, values: Mapping[str, str]) -> list[int]:
        """Return the token ids of a text up to its label; of a long one the first and last.

        Args:
            values: text of each of `columns`.
        """
        return self._up_to_label(self._encode(values, self.info.names[0]))

    def encode_filled(self, text: str) -> list[int]:
        """`encode` of a clean text that stands in the template, up to the label."""
        return self._up_to_label(self._encode_row(text, self.info.names[0]))

    def _up_to_label(self, row: tokenization.TokenIds) -> list[int]:
        prefix = tokenization.token_ids(row)[: len(row) - len(self.endings[0])]
        token_ids: list[int] = tokenization.leave_out_middle(prefix, self.max_tokens).tolist()
        return token_ids

    def _encode(self, values: Mapping[str, str], label: str) -> tokenization.TokenIds:
        cleaned = {column: clean_text(values[column], self.info.clean) for column in self.columns}
        return self._encode_row(self.template.fill(cleaned | {self.info.column: ""}), label)

    def _encode_row(self, text: str, label: str) -> tokenization.TokenIds:
        row = chat.encode_answer(text + label, (len(text), len(text) + len(label)), keep=True)
        return tokenization.encode_texts(self.tokenizer, [row], max_tokens=self.limit)[0]


def text_columns(info: LabelInfo) -> list[str]:
    """Return the columns of the text in the template."""
    return [column for column in read_template(info.template, info.column).columns if column != info.column]


def text_values(name: str, info: LabelInfo, text: str | Mapping[str, str]) -> dict[str, str]:
    """Return the values of the columns for a bare text, or for what is given of each column.

    Args:
        name: of the adapter, for errors.

    Raises:
        RequestError: there is no text, it is bare and the template has several columns, or they are
            others than those of the template.
    """
    columns = text_columns(info)
    if not isinstance(text, str):
        if {*text} != {*columns}:
            raise RequestError(
                f"{name} reads {format_names(columns)}: a text has {format_names(text) or 'nothing'}.", "input"
            )
        values = dict(text)
    elif len(columns) > 1:
        raise RequestError(
            f"{name} tells labels from several columns ({format_names(columns)}): use `classify --file` with a table.",
            "input",
        )
    else:
        values = dict.fromkeys(columns, text)
    if is_empty(info, values):
        raise RequestError("input: a text is empty: give one with a word in it.", "input")
    return values


def is_empty(info: LabelInfo, values: Mapping[str, str]) -> bool:
    """Return whether nothing is left of a text when it is cleaned."""
    return not any(clean_text(text, info.clean) for text in values.values())


def labels_of(adapter: Adapter) -> LabelInfo:
    """Return the labels of an adapter. Raises AdapterError if it has none."""
    if adapter.manifest is None or adapter.manifest.labels is None:
        raise AdapterError(f"{adapter.name} {NO_LABELS}")
    return adapter.manifest.labels


def batches(prefixes: Sequence[Sequence[int]], most: int = PREFILL_TOKENS) -> Iterator[list[int]]:
    """Yield the numbers of the texts that are read in one pass, of similar length, longest first.

    Args:
        prefixes: token ids of the texts.
        most: tokens of a pass, padding included; a longer text is read alone.
    """
    order = sorted(range(len(prefixes)), key=lambda number: -len(prefixes[number]))
    while order:
        size = max(1, min(most // len(prefixes[order[0]]), BATCH_TEXTS))
        yield order[:size]
        order = order[size:]


@torch.inference_mode()
def label_logprobs(
    base: LoadedBase,
    decoder: DecoderInterface,
    lora: LoraForBatch | None,
    prefixes: Sequence[Sequence[int]],
    endings: Sequence[Sequence[int]],
    vocab_size: int = 0,
) -> torch.Tensor:
    """Return the log-probability of each ending after each prefix, (prefixes, endings) in float64.

    Args:
        base: the base.
        decoder: forward pass of the base.
        lora: weights of the rows; None for those that are in the base.
        prefixes: token ids of the texts, in one batch.
        endings: token ids of the labels.
        vocab_size: token ids of an adapter that has others than the base.

    Raises:
        GenerationError: the log-probabilities are not finite.
    """
    longest, width = max(map(len, prefixes)), max(map(len, endings)) - 1
    padding = [longest - len(prefix) for prefix in prefixes]
    pad = base.tokenizer.pad_token_id or 0
    rows = [[pad] * count + [*prefix] for count, prefix in zip(padding, prefixes, strict=True)]
    cache = decoder.new_cache(padding)
    first = decoder.forward(torch.tensor(rows, device=base.device), cache, lora, last_only=True)[:, -1:]
    scores = torch.zeros(len(prefixes), len(endings), dtype=torch.float64)
    pairs = [(text, label) for text in range(len(prefixes)) for label in range(len(endings))]
    for start in range(0, len(pairs), LABEL_ROWS):
        part = pairs[start : start + LABEL_ROWS]
        labels = [[*endings[label], *[pad] * (width + 1 - len(endings[label]))] for _, label in part]
        targets = torch.tensor(labels, device=base.device)
        fork = cache.fork([text for text, _ in part])
        # Without chunked prefill a cache takes one more token at a time.
        read = targets[:, :-1].split(width if decoder.chunked_prefill else 1, 1)
        logits = torch.cat(
            [
                first[[text for text, _ in part]],
                *(decoder.forward(ids, fork, lora) for ids in read),
            ],
            1,
        )
        logits[..., vocab_size or base.head_size or logits.shape[-1] :] = -torch.inf
        logprobs = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
        for (text, label), row in zip(part, logprobs.cpu().double(), strict=True):
            scores[text, label] = row[: len(endings[label])].sum()
    if not scores.isfinite().all():
        raise GenerationError("The log-probabilities of the labels are not finite: the weights are damaged.")
    return scores


def score_texts(
    engine: GenerationEngine,
    loaded: LoadedAdapter,
    prefixes: Sequence[Sequence[int]],
    endings: Sequence[Sequence[int]],
) -> torch.Tensor:
    """`label_logprobs` with an adapter of an engine: call it between two steps of that."""
    decoder, _ = engine.batch_key(loaded)
    with torch.inference_mode():
        lora = decoder.new_lora(engine.multi_lora)
        lora.set_rows([loaded])
    return label_logprobs(engine.base, decoder, lora, prefixes, endings, loaded.vocab_size)


def classify(
    generator: Generator,
    texts: Sequence[str | Mapping[str, str]],
    notify: EventHandler = ignore_events,
) -> list[Classification]:
    """Tell the labels of texts with the current adapter of a generator.

    Examples:
        >>> team = train(TrainConfig(dataset="tickets.csv", label_column="team", name="team", max_steps=20))
        >>> (told,) = classify(Generator("team"), ["The lamp does not light."])
        >>> sorted(told.probabilities)
        ['billing', 'repairs']

    Args:
        generator: the generator.
        texts: texts, or the text of each column in the template.
        notify: receives progress.

    Raises:
        AdapterError: the adapter tells no labels, or is broken.
        RequestError: a text is empty, or has other columns than the template.
        GenerationError: the log-probabilities are not finite.
    """
    name, loaded = generator.get_or_load(generator.current_adapter)
    if name is None or loaded is None or loaded.labels is None:
        raise AdapterError(f"{name or 'The base'} {NO_LABELS}")
    info, found = loaded.labels, dict[int, Classification]()
    prompts = LabelPrompts(name, info, generator.tokenizer_of(name), generator.base.max_context)
    rows = [text_values(name, info, text) for text in texts]
    prefixes = [prompts.encode(values) for values in rows]
    for batch in batches(prefixes):
        logprobs = score_texts(
            generator.engine,
            loaded,
            [prefixes[number] for number in batch],
            prompts.endings,
        )
        for number, row in zip(batch, logprobs, strict=True):
            found[number] = Classification.of_logprobs(info, row)
        notify(Progress("classifying", len(found), len(rows)))
    return [found[number] for number in range(len(rows))]


def fit_temperature(logprobs: torch.Tensor, labels: Sequence[int]) -> float:
    """Return the temperature of the least log-loss of labels (Guo et al., 2017, arXiv:1706.04599).

    As few rows may all be told right, the targets are those of one row more for each label (Platt,
    1999). The loss is convex in the inverse temperature, so its slope has one zero.

    Args:
        logprobs: (rows, labels), in nats.
        labels: number of the label of each row.
    """
    count, classes = logprobs.shape
    targets = torch.full_like(logprobs, 1 / (count + classes))
    targets[torch.arange(count), torch.tensor(labels)] = (count + 1) / (count + classes)

    def slope(inverse: float) -> float:
        return float(((logprobs * inverse).softmax(-1) - targets).mul(logprobs).sum())

    low, high = math.log(1 / MAX_TEMPERATURE), math.log(MAX_TEMPERATURE)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return round(math.exp(-(low + high) / 2), 4)
