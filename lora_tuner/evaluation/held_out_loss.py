"""Held-out loss of the base and of adapters, and its cache.

Loss is always measured the same way, so that any two values can be compared: each row alone,
truncated to `HELD_OUT_MAX_TOKENS` whatever the training length was, its end of text included. It is
the sum of the negative log-likelihoods over the number of predicted tokens, in nats. Surprise: a
mean of batch means, as Trainer reports it, changes with the batch size; this does not.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from .. import atomic_io, distributed
from ..adapters.adapter import WEIGHTS_FILE, Adapter
from ..adapters.gains import HeldOutLoss
from ..adapters.peft_config import SCALING_KEYS
from ..config import HELD_OUT_MAX_TOKENS
from ..data import packing, tokenization
from ..data.tokenization import TokenIds
from ..errors import AdapterError, BaseModelError, EventHandler, Progress, ignore_events
from ..models import fsdp, fused_blocks
from ..models.loading import LoadedBase

# Positions per batch; packed rows have no padding, and their attention needs no more memory for more of them.
BATCH_TOKENS_CPU, BATCH_TOKENS_PACKED, BATCH_TOKENS_GPU = 512, 2048, 8192
T = TypeVar("T")
Context = Callable[[], AbstractContextManager[None]]  # entered around each forward pass


class ModelAccess(Protocol):
    """Runs work on the base while nothing else uses it. Others may use it between two calls."""

    def __call__(self, work: Callable[[], T], /) -> T:
        """Call `work` and return its result."""


def direct_access(work: Callable[[], T], /) -> T:
    """Access for callers that share the base with nobody."""
    return work()


def encode_held_out(
    base: LoadedBase,
    texts: Sequence[str],
    invalid: tokenization.InvalidRows | None = None,
    vocab_size: int = 0,
) -> list[TokenIds]:
    """`encode_measured`, without the indices."""
    return [*encode_measured(base, texts, invalid, vocab_size).values()]


def encode_measured(
    base: LoadedBase,
    texts: Sequence[str],
    invalid: tokenization.InvalidRows | None = None,
    vocab_size: int = 0,
    max_tokens: int = HELD_OUT_MAX_TOKENS,
) -> dict[int, TokenIds]:
    """Tokenize and truncate rows for evaluation.

    Rows in which truncation leaves nothing to predict, such as chats with a long question, are left
    out. So are conversations that the chat template cannot write, if `invalid` receives them.

    Returns:
        The token ids of each measured row, by the index of its text.
    """
    max_tokens = min(max_tokens, base.max_context)
    rows = tokenization.encode_truncated(base.tokenizer, texts, max_tokens, invalid)
    base.check_token_ids(rows, vocab_size)
    return {index: row for index, row in enumerate(rows) if tokenization.count_predictions(row)}


def measure_loss(
    model: torch.nn.Module,
    base: LoadedBase,
    rows: Sequence[TokenIds],
    notify: EventHandler = ignore_events,
    *,
    batch_tokens: int | None = None,
    stage: str = "held-out loss",
    context: Context = contextlib.nullcontext,
    access: ModelAccess = direct_access,
) -> HeldOutLoss:
    """Measure the loss of a model on tokenized rows. Its training mode is restored.

    With several processes each measures a share of the rows, and all return the whole result.

    Args:
        model: `base.model`, or the PEFT model around it.
        batch_tokens: positions per batch, padding included.
        stage: name of the progress that `notify` receives.
        context: entered around each forward pass.
        access: runs each batch.
    """
    (loss,) = measure_losses(
        model, base, rows, [context], notify, batch_tokens=batch_tokens, stage=stage, access=access
    )
    return loss


def measure_losses(
    model: torch.nn.Module,
    base: LoadedBase,
    rows: Sequence[TokenIds],
    contexts: Sequence[Context],
    notify: EventHandler = ignore_events,
    *,
    batch_tokens: int | None = None,
    stage: str = "held-out loss",
    access: ModelAccess = direct_access,
) -> list[HeldOutLoss]:
    """`measure_loss` in each of several contexts, such as without and with an adapter: one pass in
    which each batch is read in all of them."""
    local_rows = rows[distributed.rank() :: distributed.world_size()]
    batch_tokens = batch_tokens or _default_batch_tokens(base)
    batches = list(_length_batches(local_rows, batch_tokens))
    # A sharded forward pass is collective: all processes run equally many.
    passes = int(distributed.all_reduce_max(len(batches))) if fsdp.shard_count() > 1 else len(batches)
    nll: list[dict[int, npt.NDArray[np.float64]]] = [{} for _ in contexts]
    for batch in batches:
        batch_rows = [local_rows[index] for index in batch]
        for context, nll_of_rows in zip(contexts, nll, strict=True):
            batch_nll = access(partial(_nll, model, base, batch_rows, context))
            nll_of_rows.update(zip(batch, batch_nll, strict=True))
        notify(Progress(stage, len(nll[0]), len(local_rows)))
    for context in [*contexts] * (passes - len(batches)):
        _nll(model, base, rows[:1], context)
    return [_gather(nll_of_rows, rows) for nll_of_rows in nll]


def _gather(nll: Mapping[int, npt.NDArray[np.float64]], rows: Sequence[TokenIds]) -> HeldOutLoss:
    """The loss of all rows, from the negative log-likelihoods of those of this process."""
    tokens = [np.empty(0)] * len(rows)
    for rank, rank_nll in enumerate(distributed.all_gather([nll[index] for index in sorted(nll)])):
        tokens[rank :: distributed.world_size()] = rank_nll
    predictions = [tokenization.count_predictions(row) for row in rows]
    return HeldOutLoss([math.fsum(values) for values in tokens], predictions, tokens=tokens)


def _default_batch_tokens(base: LoadedBase) -> int:
    if base.device.type != "cpu":
        return BATCH_TOKENS_GPU
    return BATCH_TOKENS_PACKED if fused_blocks.packs_rows(base.model) else BATCH_TOKENS_CPU


def _nll(
    model: torch.nn.Module, base: LoadedBase, rows: Sequence[TokenIds], context: Context
) -> list[npt.NDArray[np.float64]]:
    """Negative log-likelihood of each token but the first of each row in nats, as one batch."""
    with contextlib.ExitStack() as stack, torch.no_grad(), base.lm_head.skip_lm_head(), context():
        stack.callback(model.train, model.training)
        model.eval()
        packed = fused_blocks.packs_rows(base.model)
        sequences = [rows] if packed else [[row] for row in rows]
        inputs = packing.collate(sequences, base.tokenizer.pad_token_id, cu_seqlens=packed, pad_to_step=packed)
        labels = inputs.pop("labels").to(base.device)
        output = model(**{name: tensor.to(base.device) for name, tensor in inputs.items()}, use_cache=False)
        nll = base.lm_head.nll(output.logits, labels).cpu().double()
        return [values[:-1].numpy() for values in packing.split_rows(nll, rows, packed=packed)]


def _length_batches(rows: Sequence[TokenIds], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, longest first.

    A batch has at most `batch_tokens` positions, padding included, or one row.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    while order:
        size = max(1, batch_tokens // len(rows[order[0]]))
        yield order[:size]
        order = order[size:]


def measure_base_loss(
    base: LoadedBase,
    rows: Sequence[TokenIds],
    notify: EventHandler = ignore_events,
    access: ModelAccess = direct_access,
    context: Context = contextlib.nullcontext,
) -> HeldOutLoss:
    """`measure_loss` of the plain base, kept in the user's cache.

    `context` may give it rows for the tokens of an adapter, which follow from its own.

    Raises:
        BaseModelError: the loss is not finite.
    """
    base_loss = measure_cached(
        base,
        rows,
        None,
        partial(
            measure_loss,
            base.model,
            base,
            rows,
            notify,
            stage="held-out loss of the base",
            context=context,
            access=access,
        ),
        notify,
    )
    check_base_loss(base, base_loss)
    return base_loss


def check_base_loss(base: LoadedBase, loss: HeldOutLoss, name: str = "held-out loss") -> None:
    """Raise BaseModelError for a loss of the base that is not finite."""
    if not math.isfinite(loss.loss):
        dtype = str(base.dtype).removeprefix("torch.")
        why = "" if dtype == "float32" else ", or too large for this dtype; try --dtype float32"
        raise BaseModelError(
            f"{base.files.name} has a {name} of {loss.loss} in {dtype}: its weights are damaged{why}. "
            "Choose another --base."
        )


def cached_base_loss(
    base: LoadedBase, rows: Sequence[TokenIds], notify: EventHandler = ignore_events
) -> HeldOutLoss | None:
    """The loss of the plain base from the user's cache; None if it is not there."""
    return distributed.run_on_rank_zero(partial(_cached_loss, _loss_path(base, rows, None), notify))


def cache_adapter_loss(base: LoadedBase, rows: Sequence[TokenIds], adapter: Adapter, loss: HeldOutLoss) -> None:
    """Keep the loss that training has measured, so that evaluation need not measure it again."""
    measure_cached(base, rows, weights_key(adapter), lambda: loss)


def measure_cached(
    base: LoadedBase,
    rows: Sequence[TokenIds],
    adapter_key: list[object] | None,
    measure: Callable[[], HeldOutLoss],
    notify: EventHandler = ignore_events,
) -> HeldOutLoss:
    """The loss from the user's cache, else from `measure`.

    `adapter_key` is that of `weights_key`, None for the base.
    """
    path = _loss_path(base, rows, adapter_key)
    if (cached := distributed.run_on_rank_zero(partial(_cached_loss, path, notify))) is not None:
        return cached
    loss = measure()
    if distributed.rank() == 0:
        atomic_io.write_cache(path, {"nll": loss.nll, "predictions": loss.predictions})
    return loss


def weights_key(adapter: Adapter) -> list[object]:
    """Cache key of an adapter: sha256 of its weights file as it is now, and its scaling."""
    try:
        digest = atomic_io.sha256_file(adapter.path / WEIGHTS_FILE)
    except OSError as error:
        raise AdapterError(f"{adapter.path / WEIGHTS_FILE} cannot be read: {error.strerror}.") from error
    # Not sorted: in a pattern the first key that matches counts.
    key: list[object] = [digest, [adapter.config.get(key) for key in SCALING_KEYS]]
    replaced = adapter.replaced
    return [*key, [*replaced.rows.items()], sorted(replaced.copies)] if replaced else key


def _loss_path(base: LoadedBase, rows: Sequence[TokenIds], adapter_key: list[object] | None) -> Path:
    """File of a loss in the user's cache. The tokenizer does not count, as its token ids do."""
    identity: list[object] = [
        base.files.fingerprint,
        str(base.dtype),
        type(base.lm_head.module).__name__,  # tells int8 from float32
        base.device.type,
        tokenization.encoded_hash(rows),
    ]
    if base.dtype == torch.bfloat16 and fused_blocks.packs_rows(base.model):
        identity.append("fused blocks")  # they round differently
    if base.load_in != "full":
        identity.append(base.load_in)
    if adapter_key is not None:
        identity.append(adapter_key)
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return atomic_io.cache_dir() / "losses" / f"{digest}.json"


def _cached_loss(path: Path, notify: EventHandler) -> HeldOutLoss | None:
    """The loss in a cache file; None where the file is missing or, with a notice, damaged."""
    cached = atomic_io.read_cache(path, notify)
    return cached if cached is None else HeldOutLoss(cached["nll"], cached["predictions"])
