"""Held-out loss, always measured the same way, so that any two figures of this tool can be compared.

Each row alone, cut at `HELD_OUT_LENGTH` tokens whatever the training length was, its end of text included; the loss is
the sum of the negative log-likelihoods over the number of predictions, in nats. Surprise: a mean of batch means, which
Trainer reports, changes with the batch size; this does not.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from . import atomic_io, distributed
from .adapters.adapter import SCALING_KEYS, WEIGHTS_FILE, Adapter
from .adapters.library import check_distinct_names
from .adapters.manifest import EvalResult
from .config import HELD_OUT_MAX_TOKENS, ModelOptions, TrainConfig
from .data import packing, tokenization
from .data.dataset import load_eval_dataset
from .data.splitting import content_hash
from .errors import AdapterError, BaseModelError, EventHandler, Notice, Progress, ignore_events
from .inference.multi_lora import MultiLora
from .models import fsdp, loading, lora
from .models.loading import LoadedBase

BATCH_TOKENS_CPU, BATCH_TOKENS_GPU = 512, 8192  # positions computed at once; only speed and memory depend on it
T = TypeVar("T")


class ModelAccess(Protocol):
    """Does a piece of work on the base, when nothing else is done with it: between two pieces others may have theirs."""

    def __call__(self, work: Callable[[], T], /) -> T: ...


def direct_access(work: Callable[[], T], /) -> T:
    """The turn of who has the base alone."""
    return work()


@dataclass(frozen=True)
class HeldOutLoss:
    """Per row: summed negative log-likelihood in nats, and number of predictions."""

    nll: list[float]
    predictions: list[int]

    @property
    def loss(self) -> float:
        return math.fsum(self.nll) / sum(self.predictions)


def encode_held_out(base: LoadedBase, texts: Sequence[str]) -> list[tokenization.TokenIds]:
    """Rows as they are measured, without those that have nothing to predict before they are cut, as long questions have."""
    most = min(HELD_OUT_MAX_TOKENS, base.max_context)
    rows = tokenization.truncate(tokenization.encode_texts(base.tokenizer, texts, most=most), most)[0]
    return [row for row in rows if tokenization.count_predictions(row)]


def measure_loss(
    model: Any,
    base: LoadedBase,
    rows: Sequence[tokenization.TokenIds],
    notify: EventHandler = ignore_events,
    *,
    batch_tokens: int | None = None,
    stage: str = "held-out loss",
    within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    turn: ModelAccess = direct_access,
) -> HeldOutLoss:
    """The loss of `model`, which is `base.model` or that with an adapter, on rows of tokens. Leaves its mode as it was.

    Each batch is a turn of its own, and is read `within` what is to hold for it alone. Of several processes each reads its
    share, and all get the whole.
    """
    share = rows[distributed.rank() :: distributed.world_size()]
    nll = [0.0] * len(share)
    batch_tokens = batch_tokens or (BATCH_TOKENS_CPU if base.device.type == "cpu" else BATCH_TOKENS_GPU)
    done = 0
    idle = 0
    if fsdp.shard_count() > 1:  # a block is gathered by all or by none, so who is done reads on
        own = sum(1 for _ in _length_batches(share, batch_tokens))
        idle = int(distributed.all_reduce_max(own)) - own
    for batch in _length_batches(share, batch_tokens):
        each = turn(partial(_nll, model, base, [share[index] for index in batch], within))
        for index, value in zip(batch, each, strict=True):
            nll[index] = value
        done += len(batch)
        notify(Progress(stage, done, len(share)))
    for _ in range(idle):
        _nll(model, base, rows[:1], within)
    whole = [0.0] * len(rows)
    for first, part in enumerate(distributed.all_gather(nll)):
        whole[first :: distributed.world_size()] = part
    return HeldOutLoss(whole, [tokenization.count_predictions(row) for row in rows])


def _nll(
    model: Any,
    base: LoadedBase,
    rows: Sequence[tokenization.TokenIds],
    within: Callable[[], contextlib.AbstractContextManager[None]],
) -> list[float]:
    """Of each row, all read as one batch."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), base.lm_head.skip_lm_head(), within():
            inputs = packing.collate([[row] for row in rows], base.tokenizer.pad_token_id)
            labels = inputs.pop("labels").to(base.device)
            output = model(**{name: tensor.to(base.device) for name, tensor in inputs.items()}, use_cache=False)
            each: list[float] = base.lm_head.nll(output.logits, labels).cpu().double().sum(1).tolist()
            return each
    finally:
        model.train(training)


def _length_batches(rows: Sequence[tokenization.TokenIds], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of like length, longest first, so many that padding included they make `batch_tokens`."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    while order:
        size = max(1, batch_tokens // len(rows[order[0]]))
        yield order[:size]
        order = order[size:]


def measure_base_loss(
    base: LoadedBase,
    rows: Sequence[tokenization.TokenIds],
    notify: EventHandler = ignore_events,
    turn: ModelAccess = direct_access,
) -> HeldOutLoss:
    """`measure` on the plain base, kept in the user's cache: it costs as much as the adapter's and never changes.

    Raises BaseModelError when that is no number.
    """
    now = partial(measure_loss, base.model, base, rows, notify, stage="held-out loss of the base", turn=turn)
    held = _measure_cached(base, rows, None, now)
    if not math.isfinite(held.loss):
        raise BaseModelError(
            f"{base.files.name} has a held-out loss of {held.loss} in {str(base.dtype).removeprefix('torch.')}: its weights are "
            "damaged, or too large for that. Try --dtype float32, or another --base."
        )
    return held


def _measure_cached(
    base: LoadedBase, rows: Sequence[tokenization.TokenIds], adapter: Any, now: Callable[[], HeldOutLoss]
) -> HeldOutLoss:
    """What was measured before for these rows and this `adapter` (its hash and settings, None for the base), from the user's
    cache; else it is measured now."""
    facts: list[Any] = [
        base.files.fingerprint,
        base.tokenizer_hash,
        str(base.dtype),
        type(base.model.get_output_embeddings()).__name__,  # int8 weights compute in float32 too
        base.device.type,
        [row.tolist() for row in rows],
    ]
    if base.load_in != "full":
        facts.append(base.load_in)
    if adapter is not None:
        facts.append(adapter)
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    path = atomic_io.cache_dir() / "losses" / f"{key}.json"
    if (known := distributed.run_on_rank_zero(partial(_cached_loss, path, rows))) is not None:
        return known
    held = now()
    if distributed.rank() == 0:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
            atomic_io.atomic_write_text(path, json.dumps({"nll": held.nll, "predictions": held.predictions}))
    return held


def _cached_loss(path: Path, rows: Sequence[tokenization.TokenIds]) -> HeldOutLoss | None:
    """What was kept there of these rows; None where nothing was, or it is broken."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        known = json.loads(path.read_text(encoding="utf-8"))
        held = HeldOutLoss([float(value) for value in known["nll"]], [int(value) for value in known["predictions"]])
        if held.predictions == [tokenization.count_predictions(row) for row in rows] and len(held.nll) == len(rows):
            return held
    return None


def cache_adapter_loss(
    base: LoadedBase, rows: Sequence[tokenization.TokenIds], adapter: Adapter, held: HeldOutLoss
) -> None:
    """Keep what was measured when an adapter was trained, so that it need not be measured again."""
    _measure_cached(base, rows, _loss_key(adapter), lambda: held)


@dataclass(frozen=True)
class EvalSet:
    """Held-out rows under the name of the adapter, or of the data, that they belong to; `missing` says why there are none."""

    name: str
    texts: list[str]
    missing: str | None = None


def _cache_path(content_hash: str) -> Path:
    return atomic_io.cache_dir() / "held-out" / f"{content_hash}.json"


def cache_rows(texts: Sequence[str]) -> None:
    """Keep measured rows in the user's cache under their hash, so that they can be measured when the data has moved."""
    with contextlib.suppress(OSError):  # a full cache must not end a run
        atomic_io.atomic_write_text(_cache_path(content_hash(list(texts))), json.dumps(list(texts), ensure_ascii=False))


def cached_rows(adapter: Adapter) -> EvalSet:
    """The rows that an adapter was measured on when it was trained, from the user's cache."""
    data = adapter.manifest.data if adapter.manifest else None
    if data is None:
        return EvalSet(adapter.name, [], "it was trained by another tool, so nobody knows its held-out rows")
    if data.held_out_hash is None:
        return EvalSet(adapter.name, [], "it was made of adapters whose held-out rows were missing")
    try:
        texts = json.loads(_cache_path(data.held_out_hash).read_text(encoding="utf-8"))
        if content_hash(texts) == data.held_out_hash:
            return EvalSet(adapter.name, texts)
        why = "its held-out rows in the cache have changed"
    except FileNotFoundError:
        why = "its held-out rows are not in the cache: it was trained elsewhere, or the cache was emptied"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        why = f"its held-out rows in the cache cannot be read ({error})"
    return EvalSet(adapter.name, [], why)


def eval_dataset_notice(name: str) -> Notice:
    """What is to be said of data that is measured as a whole: no adapter remembers its training rows."""
    return Notice(f"Rows of {name} that an adapter was trained on count as held out here.")


def load_eval_set(config: TrainConfig, notify: EventHandler = ignore_events) -> EvalSet:
    """The rows of `config.eval_dataset`, the first `config.eval_rows` by their hash."""
    texts = list(load_eval_dataset(config, notify).values())
    notify(eval_dataset_notice(str(config.eval_dataset)))
    return EvalSet(str(config.eval_dataset), texts[: config.eval_rows])


@dataclass(frozen=True)
class GainMatrix:
    """What each adapter gains over the base on each set of held-out rows: `cells[adapter][set]`, None where rows are missing.

    On its own rows a gain is what training was for; below zero on another's, the adapter has forgotten how that is written.
    """

    base: str
    adapters: list[str]
    sets: list[EvalSet]
    cells: list[list[EvalResult | None]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: the texts of the rows stay out."""
        return {
            "base": self.base,
            "sets": [{"name": it.name, "rows": len(it.texts), "missing": it.missing} for it in self.sets],
            "adapters": [
                {
                    "name": name,
                    "results": [
                        None if cell is None else cell.model_dump() | {"perplexity": cell.perplexities[1]}
                        for cell in line
                    ],
                }
                for name, line in zip(self.adapters, self.cells, strict=True)
            ],
        }


def evaluate(
    adapters: Sequence[Adapter],
    sets: Sequence[EvalSet] | None = None,
    *,
    eval_rows: int | None = None,
    options: ModelOptions = ModelOptions(),
) -> GainMatrix:
    """Every adapter on every set of rows, by default those that each was measured on when it was trained.

    Price: one pass over the rows for each cell, and one for the base; what was measured once is kept in the user's cache.
    `eval_rows` takes the first so many of each set. Raises AdapterError when the adapters do not share one base.
    """
    sets = _eval_sets(adapters, sets, eval_rows)
    return evaluate_on(loading.open_base(adapters[0], options), adapters, sets, options=options)


def evaluate_on(
    base: LoadedBase,
    adapters: Sequence[Adapter],
    sets: Sequence[EvalSet] | None = None,
    *,
    eval_rows: int | None = None,
    options: ModelOptions = ModelOptions(),
    turn: ModelAccess = direct_access,
) -> GainMatrix:
    """`evaluate` on a base that is in memory. Who uses it for something else as well gives the `turn` that parts the two."""
    sets = _eval_sets(adapters, sets, eval_rows)
    for adapter in adapters:
        lora.check_base(adapter, base, options)
    notify_eval_rows(adapters, options.notify)
    measured = held_out_losses(base, {it.name: it for it in adapters}, sets, options.notify, turn)
    cells = [[paired_gain(*pair) if pair else None for pair in line] for line in measured]
    return GainMatrix(base.files.name, [adapter.name for adapter in adapters], sets, cells)


def _eval_sets(
    adapters: Sequence[Adapter], sets: Sequence[EvalSet] | None, eval_rows: int | None = None
) -> list[EvalSet]:
    """The sets as they are measured. Raises AdapterError where there is nothing in any of them."""
    check_distinct_names(adapters)
    found = select_rows([cached_rows(adapter) for adapter in adapters] if sets is None else sets, eval_rows)
    if all(it.missing for it in found):
        reasons = "; ".join(f"{it.name}: {it.missing}" for it in found)
        raise AdapterError(f"There is nothing to measure on. {reasons}. Name data with --eval-dataset.")
    return found


def select_rows(sets: Sequence[EvalSet], eval_rows: int | None = None) -> list[EvalSet]:
    """The first `eval_rows` of each set; none, with the reason, of a set too small for a standard error."""
    sets = [replace(rows, texts=rows.texts[:eval_rows]) for rows in sets]
    few = "a standard error needs two rows"
    return [it if len(it.texts) > 1 or it.missing else replace(it, texts=[], missing=few) for it in sets]


def notify_eval_rows(adapters: Sequence[Adapter], notify: EventHandler) -> None:
    """Notices of what may have been trained on by one adapter and counts as held out for another."""
    known = [it.manifest.data for it in adapters if it.manifest and it.manifest.data]
    for name in dict.fromkeys(data.eval_dataset for data in known if data.eval_dataset):
        notify(eval_dataset_notice(name))
    if len({data.split_salt for data in known}) > 1:
        notify(
            Notice("The adapters differ in --split-salt, so one may have been trained on rows that another holds out.")
        )


def _loss_key(adapter: Adapter) -> Any:
    """The hash of the weights that lie there now, and the settings that scale them."""
    try:
        digest = atomic_io.sha256_file(adapter.path / WEIGHTS_FILE)
    except OSError as error:
        raise AdapterError(f"{adapter.path / WEIGHTS_FILE} cannot be read: {error.strerror}.") from error
    # In the order that they have: of a pattern's keys the first that matches counts.
    return [digest, [adapter.config.get(key) for key in SCALING_KEYS]]


def held_out_losses(
    base: LoadedBase,
    adapters: Mapping[str, Adapter],
    sets: Sequence[EvalSet],
    notify: EventHandler = ignore_events,
    turn: ModelAccess = direct_access,
) -> list[list[tuple[HeldOutLoss, HeldOutLoss] | None]]:
    """For each adapter, by what it is called, and each set: the loss of the base and that with the adapter; None where there
    are no rows."""
    encoded = [turn(partial(encode_held_out, base, rows.texts)) for rows in sets]
    bases = [measure_base_loss(base, rows, notify, turn) if rows else None for rows in encoded]
    bank = MultiLora(base)
    found: list[list[tuple[HeldOutLoss, HeldOutLoss] | None]] = []
    for number, (name, adapter) in enumerate(adapters.items(), 1):
        identity = _loss_key(adapter)
        within = partial(bank.apply_hooks, bank.hooks([bank.load(adapter)]))
        if _loss_key(adapter) != identity:
            raise AdapterError(f"{name} was replaced while it was read: measure it again.")
        line: list[tuple[HeldOutLoss, HeldOutLoss] | None] = []
        for rows, of_base, it in zip(encoded, bases, sets, strict=True):
            stage = f"{name} on {it.name} (adapter {number} of {len(adapters)})"
            now = partial(measure_loss, base.model, base, rows, notify, stage=stage, within=within, turn=turn)
            measured = (of_base, _measure_cached(base, rows, identity, now)) if of_base is not None else None
            if measured and not math.isfinite(measured[1].loss):
                raise AdapterError(
                    f"{name} has a held-out loss of {measured[1].loss} on {it.name}: its numbers are too large for this base. "
                    "Train it with a lower --learning-rate, or leave it out."
                )
            line.append(measured)
        found.append(line)
    return found


def paired_gain(base: HeldOutLoss, adapter: HeldOutLoss) -> EvalResult:
    """The fall in loss with its paired standard error.

    The gain is a ratio of sums, Σ(difference) / Σ(predictions); its error is the usual one of a ratio estimator over rows
    (Cochran, Sampling Techniques, 1977, section 6.3). With one row there is none: it is given as 0.
    """
    total, n = sum(base.predictions), len(base.nll)
    differences = [b - a for b, a in zip(base.nll, adapter.nll, strict=True)]
    gain = math.fsum(differences) / total
    squares = math.fsum((d - gain * t) ** 2 for d, t in zip(differences, base.predictions, strict=True))
    error = math.sqrt(squares * n / (n - 1)) / total if n > 1 else 0.0
    return EvalResult(base_loss=base.loss, loss=adapter.loss, gain=gain, standard_error=error, rows=n, tokens=total)
