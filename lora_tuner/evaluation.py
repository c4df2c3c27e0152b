"""Held-out loss of the base and of adapters, and the gain of each adapter on each set of rows.

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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from . import atomic_io, distributed
from .adapters import plots, summaries
from .adapters.adapter import RUN_FILE, WEIGHTS_FILE, Adapter
from .adapters.gains import HeldOutLoss, LossPair, paired_gain
from .adapters.library import check_distinct_names
from .adapters.manifest import EvalResult
from .adapters.peft_config import SCALING_KEYS
from .config import HELD_OUT_MAX_TOKENS, ModelOptions
from .data import eval_sets, packing, tokenization
from .data.eval_sets import EvalSet
from .data.tokenization import TokenIds
from .errors import AdapterError, BaseModelError, EventHandler, Notice, Progress, ignore_events
from .inference.multi_lora import MultiLora
from .models import fsdp, fused_blocks, loading, lora, memory, packing_checks
from .models.loading import LoadedBase
from .models.tokenizer import load_adapter_tokenizer

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


@dataclass(frozen=True)
class GainMatrix:
    """Gain of each adapter over the base on each set of rows.

    `cells[adapter][set]` is None where rows are missing. A negative gain on the rows of another
    adapter means that this one has forgotten such text.
    """

    base: str  #: name of the base
    adapters: list[str]  #: names of the adapters
    sets: list[EvalSet]
    cells: list[list[EvalResult | None]]  #: a row for each adapter

    def to_dict(self) -> dict[str, object]:
        """All results for JSON, without the texts of the rows."""
        return {
            "base": self.base,
            "sets": [{"name": rows.name, "rows": len(rows.texts), "missing": rows.missing} for rows in self.sets],
            "adapters": [
                {"name": name, "results": [cell and cell.to_dict() for cell in cells]}
                for name, cells in zip(self.adapters, self.cells, strict=True)
            ],
        }

    def summary(self) -> summaries.Summary:
        """Tables of losses and of gains, and the reasons why sets have no column."""
        columns = [f"{rows.name}\n{rows.format_rows()}" for rows in self.sets]
        missing = [f"{rows.name} has no column: {rows.missing}." for rows in self.sets if rows.missing]
        return [*summaries.gain_tables(self.base, self.adapters, columns, self.cells), *missing]

    def plot(self, to: Path | IO[bytes]) -> None:
        """Write a heat map of the gains as a PNG file."""
        plots.plot_gains(self.base, self.adapters, [rows.name for rows in self.sets], self.cells, to)

    def _repr_html_(self) -> str:
        return summaries.to_html(self.summary())


def evaluate(
    adapters: Sequence[Adapter],
    sets: Sequence[EvalSet] | None = None,
    *,
    eval_rows: int | None = None,
    options: ModelOptions = ModelOptions(),
) -> GainMatrix:
    """Evaluate every adapter on every set of rows.

    Price: one pass over the rows for each cell, and one for the base. Results are kept in the
    user's cache.

    Examples:
        >>> evaluate(Library().get_all(["noir", "verse"]), eval_rows=5).adapters
        ['noir', 'verse']

    Args:
        sets: by default, for each adapter, the rows that it was evaluated on when it was trained.
        eval_rows: use only the first rows of each set.

    Raises:
        AdapterError: the adapters do not share one base, or there are no rows.
    """
    sets = _select_sets(adapters, sets, eval_rows, options.notify)
    return evaluate_on(open_base_of(adapters, options), adapters, sets, options=options)


def open_base_of(adapters: Sequence[Adapter], options: ModelOptions) -> LoadedBase:
    """Load the base of several adapters to measure them, quantized as for training if one was trained so."""
    runs = [adapter.manifest.run for adapter in adapters if adapter.manifest]
    as_trained = any(run is not None and run.load_in == options.load_in for run in runs)
    return open_base(adapters[0], options, training=as_trained)


def open_base(adapter: Adapter, options: ModelOptions, *, training: bool = True) -> LoadedBase:
    """Load the base of an adapter to measure it, in the dtype and with the fast paths of training.

    Args:
        training: quantized as for training, not as for generation.
    """
    files = loading.base_for_adapter(adapter, options)
    dtype = memory.training_dtype(files, loading.choose_device(options.device), options)
    base = loading.load_base(files, replace(options, dtype=dtype), training=training)
    if training or base.load_in == "full":  # weights quantized for generation give no gradients to check with
        packing_checks.enable_fast_paths(base)
    return base


def evaluate_on(
    base: LoadedBase,
    adapters: Sequence[Adapter],
    sets: Sequence[EvalSet] | None = None,
    *,
    eval_rows: int | None = None,
    options: ModelOptions = ModelOptions(),
    access: ModelAccess = direct_access,
) -> GainMatrix:
    """`evaluate` on a base in memory.

    `access` lets something else use the base between batches.
    """
    sets = _select_sets(adapters, sets, eval_rows, options.notify)
    for adapter in adapters:
        lora.check_base(adapter, base, options)
    notify_eval_rows(adapters, options.notify)
    named_adapters = {adapter.name: adapter for adapter in adapters}
    cells = []
    for pairs in held_out_losses(base, named_adapters, sets, options.notify, access, options):
        cells.append([paired_gain(*pair) if pair else None for pair in pairs])
    return GainMatrix(base.files.name, list(named_adapters), sets, cells)


def held_out_losses(
    base: LoadedBase,
    adapters: Mapping[str, Adapter],
    sets: Sequence[EvalSet],
    notify: EventHandler = ignore_events,
    access: ModelAccess = direct_access,
    options: ModelOptions = ModelOptions(),
    max_tokens: int = HELD_OUT_MAX_TOKENS,
) -> list[list[LossPair | None]]:
    """Measure the base and each adapter on each set of rows.

    Args:
        adapters: display name -> adapter.
        options: `force` ignores a tokenizer that is not the base's.
        max_tokens: of a row; fewer than those of a held-out loss where training cuts rows shorter.

    Returns:
        Loss of the base and of the adapter: `losses[adapter][set]`, None where there are no rows.

    Raises:
        AdapterError: an adapter is damaged or replaced meanwhile, or its loss is not finite.
    """
    encode = partial(_encode_and_measure, sets=sets, notify=notify, access=access, max_tokens=max_tokens)
    base_rows = None
    multi_lora = MultiLora(base)
    losses: list[list[LossPair | None]] = []
    for number, (name, adapter) in enumerate(adapters.items(), 1):
        key = weights_key(adapter)
        loaded = multi_lora.load(adapter)
        adapter_context = partial(multi_lora.apply_hooks, multi_lora.hooks([loaded]))
        if weights_key(adapter) != key:
            raise AdapterError(f"{name} was replaced while it was loaded: evaluate it again.")
        tokenizer = load_adapter_tokenizer(adapter, base, replace(options, notify=notify))
        # The base is measured on the adapter's rows, so that losses can be paired.
        if tokenizer is not None:
            base_hooks = multi_lora.hooks([multi_lora.untrained(loaded)])
            encoded_sets, base_losses = encode(
                replace(base, tokenizer=tokenizer),
                vocab_size=loaded.vocab_size,
                context=partial(multi_lora.apply_hooks, base_hooks),
            )
        else:
            encoded_sets, base_losses = base_rows = base_rows or encode(base)
        pairs: list[LossPair | None] = []
        for rows, encoded, base_loss in zip(sets, encoded_sets, base_losses, strict=True):
            if base_loss is None:
                pairs.append(None)
                continue
            adapter_loss = measure_cached(
                base,
                encoded,
                key,
                partial(
                    measure_loss,
                    base.model,
                    base,
                    encoded,
                    notify,
                    stage=f"{name} on {rows.name} (adapter {number} of {len(adapters)})",
                    context=adapter_context,
                    access=access,
                ),
                notify,
            )
            if not math.isfinite(adapter_loss.loss):
                raise AdapterError(
                    f"{name} has a held-out loss of {adapter_loss.loss} on {rows.name}: its "
                    "weights are too large for this base. Train it with a lower --learning-rate, "
                    "or leave it out."
                )
            pairs.append((base_loss, replace(adapter_loss, groups=base_loss.groups)))
        losses.append(pairs)
    return losses


def _encode_and_measure(
    base: LoadedBase,
    sets: Sequence[EvalSet],
    notify: EventHandler,
    access: ModelAccess,
    max_tokens: int,
    vocab_size: int = 0,
    context: Context = contextlib.nullcontext,
) -> tuple[list[list[TokenIds]], list[HeldOutLoss | None]]:
    """The rows of each set as tokens, and the loss of the base on them; None without rows.

    Args:
        vocab_size: token ids of an adapter that has others than the base.
        context: entered around each forward pass: gives the base untrained rows for these.
    """
    encoded_sets, groups = [], []
    for rows in sets:
        invalid: tokenization.InvalidRows = {}
        encoded = access(partial(encode_measured, base, rows.texts, invalid, vocab_size, max_tokens))
        encoded_sets.append([*encoded.values()])
        groups.append([rows.groups[row] for row in encoded] if rows.groups else [])
        if invalid:
            reason = next(iter(invalid.values()))
            notify(
                Notice(
                    f"Left out {len(invalid):,} of {len(rows.texts):,} rows of {rows.name}, such as one with {reason}."
                )
            )
    losses = [
        replace(measure_base_loss(base, encoded, notify, access, context), groups=numbers) if encoded else None
        for encoded, numbers in zip(encoded_sets, groups, strict=True)
    ]
    return encoded_sets, losses


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


def pooled_gain(losses: Sequence[LossPair | None]) -> EvalResult | None:
    """`paired_gain` on the rows of several sets; None without rows.

    Args:
        losses: loss of base and adapter on each set.
    """
    pairs = [pair for pair in losses if pair]
    if not pairs:
        return None
    base_losses, adapter_losses = zip(*pairs, strict=True)
    return paired_gain(concatenate(base_losses), concatenate(adapter_losses))


def concatenate(losses: Sequence[HeldOutLoss]) -> HeldOutLoss:
    """The loss of the rows of several sets, of which each has groups of its own."""
    return HeldOutLoss(
        [value for loss in losses for value in loss.nll],
        [count for loss in losses for count in loss.predictions],
        eval_sets.join_groups([(loss.groups, len(loss.nll)) for loss in losses]),
        [values for loss in losses for values in loss.tokens] if all(loss.tokens for loss in losses) else [],
    )


def cache_adapter_loss(base: LoadedBase, rows: Sequence[TokenIds], adapter: Adapter, loss: HeldOutLoss) -> None:
    """Keep the loss that training has measured, so that evaluation need not measure it again."""
    measure_cached(base, rows, weights_key(adapter), lambda: loss)


def cached_rows(adapter: Adapter, notify: EventHandler = ignore_events, *, all_rows: bool = True) -> EvalSet:
    """Rows from the user's cache that were held out to evaluate an adapter on when it was trained.

    Args:
        all_rows: if unset, only those that its result is of, where fewer were enough.
    """
    data = adapter.manifest.data if adapter.manifest else None
    if data is None:
        return EvalSet(adapter.name, [], "it was trained by another tool, so its held-out rows are unknown")
    if data.held_out_hash is None:
        return EvalSet(adapter.name, [], "it was made from adapters whose held-out rows were missing")
    rows = eval_sets.read_rows(adapter.name, data.held_out_hash, adapter.path / RUN_FILE, notify)
    result = adapter.manifest.result if adapter.manifest else None
    return rows if all_rows or result is None or result.of_rows is None else rows.first_rows(result.rows)


def notify_eval_rows(adapters: Sequence[Adapter], notify: EventHandler) -> None:
    """Warn about rows that are held out for one adapter and maybe not for another."""
    datasets = [adapter.manifest.data for adapter in adapters if adapter.manifest and adapter.manifest.data]
    for name in dict.fromkeys(data.eval_dataset for data in datasets if data.eval_dataset):
        notify(eval_sets.eval_dataset_notice(name))
    differences = ["--split-salt"] if len({data.split_salt for data in datasets}) > 1 else []
    groups = {(data.name, data.group_by) for data in datasets}
    if len(groups) > len({name for name, _ in groups}):
        differences.append("--group-by")
    for name in differences:
        notify(
            Notice(f"The adapters differ in {name}, so one may have been trained on rows that another holds out.")
        )


def _select_sets(
    adapters: Sequence[Adapter], sets: Sequence[EvalSet] | None, eval_rows: int | None, notify: EventHandler
) -> list[EvalSet]:
    """The sets to evaluate on. Raises AdapterError where none has rows."""
    check_distinct_names(adapters)
    if sets is None:
        sets = [cached_rows(adapter, notify, all_rows=eval_rows is not None) for adapter in adapters]
    selected = eval_sets.select_rows(sets, eval_rows)
    if all(rows.missing for rows in selected):
        reasons = "; ".join(f"{rows.name}: {rows.missing}" for rows in selected)
        raise AdapterError(f"There are no rows to evaluate on. {reasons}. Name other data with --eval-dataset.")
    return selected


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


def cached_base_loss(
    base: LoadedBase, rows: Sequence[TokenIds], notify: EventHandler = ignore_events
) -> HeldOutLoss | None:
    """The loss of the plain base from the user's cache; None if it is not there."""
    return distributed.run_on_rank_zero(partial(_cached_loss, _loss_path(base, rows, None), notify))


def _cached_loss(path: Path, notify: EventHandler) -> HeldOutLoss | None:
    """The loss in a cache file; None where the file is missing or, with a notice, damaged."""
    cached = atomic_io.read_cache(path, notify)
    return cached if cached is None else HeldOutLoss(cached["nll"], cached["predictions"])


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
