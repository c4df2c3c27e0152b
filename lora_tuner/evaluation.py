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

from . import distributed, files, lora, sharding, store, tokens
from .bank import AdapterBank
from .base_model import Base
from .config import HELD_OUT_LENGTH, TrainConfig
from .data import content_hash, load_held_out
from .errors import AdapterError, BaseModelError, Listener, Notice, Progress, ignore
from .library import check_distinct
from .manifest import Result
from .store import Adapter

BATCH_TOKENS_CPU, BATCH_TOKENS_GPU = 512, 8192  # positions computed at once; only speed and memory depend on it
Found = TypeVar("Found")


class Turn(Protocol):
    """Does a piece of work on the base, when nothing else is done with it: between two pieces others may have theirs."""

    def __call__(self, work: Callable[[], Found], /) -> Found: ...


def at_once(work: Callable[[], Found], /) -> Found:
    """The turn of who has the base alone."""
    return work()


@dataclass(frozen=True)
class HeldOut:
    """Per row: summed negative log-likelihood in nats, and number of predictions."""

    nll: list[float]
    predictions: list[int]

    @property
    def loss(self) -> float:
        return math.fsum(self.nll) / sum(self.predictions)


def encode_held_out(base: Base, texts: Sequence[str]) -> list[tokens.Row]:
    """Rows as they are measured, without those that have nothing to predict before they are cut, as long questions have."""
    most = min(HELD_OUT_LENGTH, base.context)
    rows = tokens.cut(tokens.encode(base.tokenizer, texts, most=most), most)[0]
    return [row for row in rows if tokens.predictions(row)]


def measure(
    model: Any,
    base: Base,
    rows: Sequence[tokens.Row],
    notify: Listener = ignore,
    *,
    batch_tokens: int | None = None,
    stage: str = "held-out loss",
    within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    turn: Turn = at_once,
) -> HeldOut:
    """The loss of `model`, which is `base.model` or that with an adapter, on rows of tokens. Leaves its mode as it was.

    Each batch is a turn of its own, and is read `within` what is to hold for it alone. Of several processes each reads its
    share, and all get the whole.
    """
    share = rows[distributed.rank() :: distributed.size()]
    nll = [0.0] * len(share)
    batch_tokens = batch_tokens or (BATCH_TOKENS_CPU if base.device.type == "cpu" else BATCH_TOKENS_GPU)
    done = 0
    idle = 0
    if sharding.parts() > 1:  # a block is gathered by all or by none, so who is done reads on
        own = sum(1 for _ in _batches(share, batch_tokens))
        idle = int(distributed.most(own)) - own
    for batch in _batches(share, batch_tokens):
        each = turn(partial(_nll, model, base, [share[index] for index in batch], within))
        for index, value in zip(batch, each, strict=True):
            nll[index] = value
        done += len(batch)
        notify(Progress(stage, done, len(share)))
    for _ in range(idle):
        _nll(model, base, rows[:1], within)
    whole = [0.0] * len(rows)
    for first, part in enumerate(distributed.gather(nll)):
        whole[first :: distributed.size()] = part
    return HeldOut(whole, [tokens.predictions(row) for row in rows])


def _nll(
    model: Any,
    base: Base,
    rows: Sequence[tokens.Row],
    within: Callable[[], contextlib.AbstractContextManager[None]],
) -> list[float]:
    """Of each row, all read as one batch."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), base.head.left_out(), within():
            inputs = tokens.collate([[row] for row in rows], base.tokenizer.pad_token_id)
            labels = inputs.pop("labels").to(base.device)
            output = model(**{name: tensor.to(base.device) for name, tensor in inputs.items()}, use_cache=False)
            each: list[float] = base.head.nll(output.logits, labels).cpu().double().sum(1).tolist()
            return each
    finally:
        model.train(training)


def _batches(rows: Sequence[tokens.Row], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of like length, longest first, so many that padding included they make `batch_tokens`."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    while order:
        size = max(1, batch_tokens // len(rows[order[0]]))
        yield order[:size]
        order = order[size:]


def measure_base(base: Base, rows: Sequence[tokens.Row], notify: Listener = ignore, turn: Turn = at_once) -> HeldOut:
    """`measure` on the plain base, kept in the user's cache: it costs as much as the adapter's and never changes.

    Raises BaseModelError when that is no number.
    """
    now = partial(measure, base.model, base, rows, notify, stage="held-out loss of the base", turn=turn)
    held = _once(base, rows, None, now)
    if not math.isfinite(held.loss):
        raise BaseModelError(
            f"{base.source.name} has a held-out loss of {held.loss} in {str(base.dtype).removeprefix('torch.')}: its weights are "
            "damaged, or too large for that. Try --dtype float32, or another --base."
        )
    return held


def _once(base: Base, rows: Sequence[tokens.Row], adapter: Any, now: Callable[[], HeldOut]) -> HeldOut:
    """What was measured before for these rows and this `adapter` (its hash and settings, None for the base), from the user's
    cache; else it is measured now."""
    facts: list[Any] = [
        base.source.fingerprint,
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
    path = files.cache_dir() / "losses" / f"{key}.json"
    if (known := distributed.once(partial(_known, path, rows))) is not None:
        return known
    held = now()
    if distributed.rank() == 0:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
            files.write_text(path, json.dumps({"nll": held.nll, "predictions": held.predictions}))
    return held


def _known(path: Path, rows: Sequence[tokens.Row]) -> HeldOut | None:
    """What was kept there of these rows; None where nothing was, or it is broken."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        known = json.loads(path.read_text(encoding="utf-8"))
        held = HeldOut([float(value) for value in known["nll"]], [int(value) for value in known["predictions"]])
        if held.predictions == [tokens.predictions(row) for row in rows] and len(held.nll) == len(rows):
            return held
    return None


def remember(base: Base, rows: Sequence[tokens.Row], adapter: Adapter, held: HeldOut) -> None:
    """Keep what was measured when an adapter was trained, so that it need not be measured again."""
    _once(base, rows, _identity(adapter), lambda: held)


@dataclass(frozen=True)
class RowSet:
    """Held-out rows under the name of the adapter, or of the data, that they belong to; `missing` says why there are none."""

    name: str
    texts: list[str]
    missing: str | None = None


def _place(content_hash: str) -> Path:
    return files.cache_dir() / "held-out" / f"{content_hash}.json"


def keep_rows(texts: Sequence[str]) -> None:
    """Keep measured rows in the user's cache under their hash, so that they can be measured when the data has moved."""
    with contextlib.suppress(OSError):  # a full cache must not end a run
        files.write_text(_place(content_hash(list(texts))), json.dumps(list(texts), ensure_ascii=False))


def kept_rows(adapter: Adapter) -> RowSet:
    """The rows that an adapter was measured on when it was trained, from the user's cache."""
    data = adapter.manifest.data if adapter.manifest else None
    if data is None:
        return RowSet(adapter.name, [], "it was trained by another tool, so nobody knows its held-out rows")
    if data.held_out_hash is None:
        return RowSet(adapter.name, [], "it was made of adapters whose held-out rows were missing")
    try:
        texts = json.loads(_place(data.held_out_hash).read_text(encoding="utf-8"))
        if content_hash(texts) == data.held_out_hash:
            return RowSet(adapter.name, texts)
        why = "its held-out rows in the cache have changed"
    except FileNotFoundError:
        why = "its held-out rows are not in the cache: it was trained elsewhere, or the cache was emptied"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        why = f"its held-out rows in the cache cannot be read ({error})"
    return RowSet(adapter.name, [], why)


def as_held_out(name: str) -> Notice:
    """What is to be said of data that is measured as a whole: no adapter remembers its training rows."""
    return Notice(f"Rows of {name} that an adapter was trained on count as held out here.")


def rows_of(config: TrainConfig, notify: Listener = ignore) -> RowSet:
    """The rows of `config.eval_dataset`, the first `config.eval_rows` by their hash."""
    texts = list(load_held_out(config, notify).values())
    notify(as_held_out(str(config.eval_dataset)))
    return RowSet(str(config.eval_dataset), texts[: config.eval_rows])


@dataclass(frozen=True)
class GainMatrix:
    """What each adapter gains over the base on each set of held-out rows: `cells[adapter][set]`, None where rows are missing.

    On its own rows a gain is what training was for; below zero on another's, the adapter has forgotten how that is written.
    """

    base: str
    adapters: list[str]
    sets: list[RowSet]
    cells: list[list[Result | None]]

    def facts(self) -> dict[str, Any]:
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
    sets: Sequence[RowSet] | None = None,
    *,
    base: str | None = None,
    revision: str | None = None,
    eval_rows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    load_in: str = "auto",
    force: bool = False,
    notify: Listener = ignore,
) -> GainMatrix:
    """Every adapter on every set of rows, by default those that each was measured on when it was trained.

    Price: one pass over the rows for each cell, and one for the base; what was measured once is kept in the user's cache.
    `eval_rows` takes the first so many of each set. Raises AdapterError when the adapters do not share one base.
    """
    sets = _measurable(adapters, sets, eval_rows)
    opened = lora.open_base(adapters[0], base, revision, device=device, dtype=dtype, load_in=load_in, notify=notify)
    return evaluate_on(opened, adapters, sets, force=force, notify=notify)


def evaluate_on(
    base: Base,
    adapters: Sequence[Adapter],
    sets: Sequence[RowSet] | None = None,
    *,
    eval_rows: int | None = None,
    force: bool = False,
    notify: Listener = ignore,
    turn: Turn = at_once,
) -> GainMatrix:
    """`evaluate` on a base that is in memory. Who uses it for something else as well gives the `turn` that parts the two."""
    sets = _measurable(adapters, sets, eval_rows)
    for adapter in adapters:
        lora.check_base(adapter, base, force=force, notify=notify)
    say_what_counts(adapters, notify)
    measured = losses(base, {it.name: it for it in adapters}, sets, notify, turn)
    cells = [[compare(*pair) if pair else None for pair in line] for line in measured]
    return GainMatrix(base.source.name, [adapter.name for adapter in adapters], sets, cells)


def _measurable(
    adapters: Sequence[Adapter], sets: Sequence[RowSet] | None, eval_rows: int | None = None
) -> list[RowSet]:
    """The sets as they are measured. Raises AdapterError where there is nothing in any of them."""
    check_distinct(adapters)
    found = ready([kept_rows(adapter) for adapter in adapters] if sets is None else sets, eval_rows)
    if all(it.missing for it in found):
        reasons = "; ".join(f"{it.name}: {it.missing}" for it in found)
        raise AdapterError(f"There is nothing to measure on. {reasons}. Name data with --eval-dataset.")
    return found


def ready(sets: Sequence[RowSet], eval_rows: int | None = None) -> list[RowSet]:
    """The first `eval_rows` of each set; none, with the reason, of a set too small for a standard error."""
    sets = [replace(rows, texts=rows.texts[:eval_rows]) for rows in sets]
    few = "a standard error needs two rows"
    return [it if len(it.texts) > 1 or it.missing else replace(it, texts=[], missing=few) for it in sets]


def say_what_counts(adapters: Sequence[Adapter], notify: Listener) -> None:
    """Notices of what may have been trained on by one adapter and counts as held out for another."""
    known = [it.manifest.data for it in adapters if it.manifest and it.manifest.data]
    for name in dict.fromkeys(data.eval_dataset for data in known if data.eval_dataset):
        notify(as_held_out(name))
    if len({data.split_salt for data in known}) > 1:
        notify(
            Notice("The adapters differ in --split-salt, so one may have been trained on rows that another holds out.")
        )


def _identity(adapter: Adapter) -> Any:
    """The hash of the weights that lie there now, and the settings that scale them."""
    try:
        digest = files.sha256_file(adapter.path / store.WEIGHTS)
    except OSError as error:
        raise AdapterError(f"{adapter.path / store.WEIGHTS} cannot be read: {error.strerror}.") from error
    # In the order that they have: of a pattern's keys the first that matches counts.
    return [digest, [adapter.config.get(key) for key in store.SCALES]]


def losses(
    base: Base,
    adapters: Mapping[str, Adapter],
    sets: Sequence[RowSet],
    notify: Listener = ignore,
    turn: Turn = at_once,
) -> list[list[tuple[HeldOut, HeldOut] | None]]:
    """For each adapter, by what it is called, and each set: the loss of the base and that with the adapter; None where there
    are no rows."""
    encoded = [turn(partial(encode_held_out, base, rows.texts)) for rows in sets]
    bases = [measure_base(base, rows, notify, turn) if rows else None for rows in encoded]
    bank = AdapterBank(base)
    found: list[list[tuple[HeldOut, HeldOut] | None]] = []
    for number, (name, adapter) in enumerate(adapters.items(), 1):
        identity = _identity(adapter)
        within = partial(bank.applied, bank.hooks([bank.read(adapter)]))
        if _identity(adapter) != identity:
            raise AdapterError(f"{name} was replaced while it was read: measure it again.")
        line: list[tuple[HeldOut, HeldOut] | None] = []
        for rows, of_base, it in zip(encoded, bases, sets, strict=True):
            stage = f"{name} on {it.name} (adapter {number} of {len(adapters)})"
            now = partial(measure, base.model, base, rows, notify, stage=stage, within=within, turn=turn)
            measured = (of_base, _once(base, rows, identity, now)) if of_base is not None else None
            if measured and not math.isfinite(measured[1].loss):
                raise AdapterError(
                    f"{name} has a held-out loss of {measured[1].loss} on {it.name}: its numbers are too large for this base. "
                    "Train it with a lower --learning-rate, or leave it out."
                )
            line.append(measured)
        found.append(line)
    return found


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
