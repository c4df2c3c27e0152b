"""Blend adapters: one adapter whose update is the weighted sum of others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .. import evaluation
from ..adapters.adapter import Adapter
from ..adapters.library import Library, check_distinct_names
from ..adapters.manifest import EvalResult
from ..config import MAX_RANK, ModelOptions
from ..errors import AdapterError, ConfigError
from ..evaluation import EvalSet
from ..models import delta, lora
from .common import (
    distinct_eval_sets,
    format_number,
    open_shared_base,
    verify_written,
    write_adapter,
    write_manifest_and_card,
)
from .verify import OutputComparison


@dataclass(frozen=True)
class BlendResult:
    """A blend. `lost` is the share of the energy (the squared norm of the exact sum) that a cut rank cost, for each layer;
    `sets` the gains on the held-out rows of each part."""

    adapter: Adapter
    exact_rank: int  # of the exact sum, in the layer where it is largest
    lost_energy: dict[str, float]
    total_lost_energy: float
    comparison: OutputComparison
    results: dict[str, EvalResult]


def blend(
    parts: Sequence[tuple[Adapter, float]],
    name: str,
    library: Library,
    *,
    rank: int | None = None,
    sets: Sequence[EvalSet] | None = None,
    eval_rows: int | None = None,
    overwrite: bool = False,
    options: ModelOptions = ModelOptions(),
) -> BlendResult:
    """An adapter whose update is the weighted sum of others' updates; a negative weight takes away.

    The sum is exact, its rank in each layer the sum of theirs; `rank` cuts that to the nearest update of the rank. Read
    back by PEFT, it must say what the base says with the update added to its weights. Raises AdapterError when the adapters
    do not share a base, one is DoRA, or the two disagree.
    """
    if not parts:
        raise ConfigError("There is nothing to blend: name adapters with their weights.")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"rank is {rank}: it is a whole number from 1 to {MAX_RANK}.")
    library.check_name_free(name, overwrite=overwrite)
    if wrong := [f"{it.name}={weight:g}" for it, weight in parts if not weight or not math.isfinite(weight)]:
        raise ConfigError(f"{', '.join(wrong)}: a weight is a number other than 0.")
    adapters = list({it.path.resolve(): it for it, _ in parts}.values())
    check_distinct_names(adapters)
    for it in adapters:
        delta.check_summable(it)
    opened = open_shared_base(adapters, options)
    layers = lora.linear_layers(opened.model)
    read = {it.path.resolve(): delta.load_deltas(it, layers) for it in adapters}
    exact = delta.sum_deltas([(weight, read[it.path.resolve()]) for it, weight in parts])
    full = max(update.rank for update in exact.values())
    if rank is None and full > MAX_RANK:
        raise AdapterError(f"The exact sum has rank {full}, and {MAX_RANK} is accepted: cut it with --rank.")
    is_cut = rank is not None and rank < full
    kept = {module: delta.truncate_rank(update, rank or full) for module, update in exact.items()}
    command = " ".join(["blend", *(f"{it.name}={format_number(weight)}" for it, weight in parts)])
    command += f" --rank {rank}" if is_cut else ""
    own, sets = sets is None, distinct_eval_sets(adapters, sets, eval_rows, options.notify)
    with library.create(name, overwrite=overwrite) as work:
        written = write_adapter(opened, kept, work)
        lost = delta.lost_energy(exact, delta.load_deltas(written, layers)) if is_cut else dict.fromkeys(exact, 0.0)
        measured = evaluation.held_out_losses(opened, {name: written}, sets, options.notify)[0]
        found = verify_written(opened, written, kept, name, sets, options.notify)
        write_manifest_and_card(written, name, opened, adapters, command, sets, own, measured)
    each = {it.name: evaluation.paired_gain(*pair) for it, pair in zip(sets, measured, strict=True) if pair}
    return BlendResult(library.get(name), full, lost, delta.total_lost_energy(exact, lost), found, each)
