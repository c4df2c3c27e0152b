"""Held-out loss, always measured the same way, so that any two figures of this tool can be compared.

Each row alone, cut at `HELD_OUT_LENGTH` tokens whatever the training length was, its end of text included; the loss is
the sum of the negative log-likelihoods over the number of predictions, in nats. Surprise: a mean of batch means, which
Trainer reports, changes with the batch size; this does not.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from . import files, tokens
from .base_model import Base
from .config import HELD_OUT_LENGTH
from .errors import Listener, Progress, ignore
from .manifest import Result

BATCH_TOKENS_CPU, BATCH_TOKENS_GPU = 512, 8192  # positions computed at once; only speed and memory depend on it


@dataclass(frozen=True)
class HeldOut:
    """Per row: summed negative log-likelihood in nats, and number of predictions."""

    nll: list[float]
    predictions: list[int]

    @property
    def loss(self) -> float:
        return math.fsum(self.nll) / sum(self.predictions)


def causal_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each next token, (batch, length), 0 where there is no label.

    `logits` is (batch, length, vocabulary), `labels` (batch, length), not shifted.
    """
    # The labels are shifted, not the logits: slicing those would copy the largest tensor of the step.
    following = F.pad(labels[:, 1:], (0, 1), value=tokens.NO_LABEL)
    flat = F.cross_entropy(
        logits.flatten(0, 1).float(), following.flatten(), ignore_index=tokens.NO_LABEL, reduction="none"
    )
    return flat.view(labels.shape)


def encode_held_out(base: Base, texts: Sequence[str]) -> list[tokens.Row]:
    return tokens.cut(tokens.encode(base.tokenizer, texts), min(HELD_OUT_LENGTH, base.context))[0]


def measure(
    model: Any,
    base: Base,
    rows: Sequence[tokens.Row],
    notify: Listener = ignore,
    *,
    batch_tokens: int | None = None,
    stage: str = "held-out loss",
) -> HeldOut:
    """The loss of `model`, which is `base.model` or that with an adapter, on rows of tokens. Leaves its mode as it was."""
    nll, predictions = [0.0] * len(rows), [len(row) - 1 for row in rows]
    batch_tokens = batch_tokens or (BATCH_TOKENS_CPU if base.device.type == "cpu" else BATCH_TOKENS_GPU)
    done, training = 0, model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in _batches(rows, batch_tokens):
                inputs = tokens.collate([[rows[index]] for index in batch], base.tokenizer.pad_token_id)
                labels = inputs.pop("labels").to(base.device)
                logits = model(
                    **{name: tensor.to(base.device) for name, tensor in inputs.items()}, use_cache=False
                ).logits
                for index, value in zip(batch, causal_nll(logits, labels).cpu().double().sum(1).tolist(), strict=True):
                    nll[index] = value
                done += len(batch)
                notify(Progress(stage, done, len(rows)))
    finally:
        model.train(training)
    return HeldOut(nll, predictions)


def _batches(rows: Sequence[tokens.Row], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of like length, longest first, so many that padding included they make `batch_tokens`."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    while order:
        size = max(1, batch_tokens // len(rows[order[0]]))
        yield order[:size]
        order = order[size:]


def measure_base(base: Base, rows: Sequence[tokens.Row], notify: Listener = ignore) -> HeldOut:
    """`measure` on the plain base, kept in the user's cache: it costs as much as the adapter's and never changes."""
    facts = [
        base.source.fingerprint,
        base.tokenizer_hash,
        str(base.dtype),
        base.device.type,
        [row.tolist() for row in rows],
    ]
    path = files.cache_dir() / "losses" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no cache, or a broken one: measure again
        known = json.loads(path.read_text(encoding="utf-8"))
        held = HeldOut([float(value) for value in known["nll"]], [int(value) for value in known["predictions"]])
        if held.predictions == [len(row) - 1 for row in rows] and len(held.nll) == len(rows):
            return held
    held = measure(base.model, base, rows, notify, stage="held-out loss of the base")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
        files.write_text(path, json.dumps({"nll": held.nll, "predictions": held.predictions}))
    return held


def keep_rows(texts: Sequence[str], content_hash: str) -> None:
    """Keep measured rows in the user's cache under their hash, so that they can be measured when the data has moved."""
    path = files.cache_dir() / "held-out" / f"{content_hash}.json"
    if not path.exists():
        with contextlib.suppress(OSError):  # a full cache must not end a run
            files.write_text(path, json.dumps(list(texts), ensure_ascii=False))


def compare(base: HeldOut, adapter: HeldOut) -> Result:
    """The fall in loss with its paired standard error.

    The gain is a ratio of sums, Σ(difference) / Σ(predictions); its error is the usual one of a ratio estimator over rows
    (Cochran, Sampling Techniques, 1977, section 6.3). With one row there is none: it is given as 0.
    """
    total, n = sum(base.predictions), len(base.nll)
    differences = [b - a for b, a in zip(base.nll, adapter.nll, strict=True)]
    gain = math.fsum(differences) / total
    squares = math.fsum((d - gain * t) ** 2 for d, t in zip(differences, base.predictions, strict=True))
    error = math.sqrt(squares * n / (n - 1)) / total if n > 1 else 0.0
    return Result(base_loss=base.loss, loss=adapter.loss, gain=gain, standard_error=error, rows=n, tokens=total)
