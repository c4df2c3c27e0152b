"""Blend adapters: a new adapter whose update is the weighted sum of others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..adapters.adapter import Adapter
from ..adapters.gains import paired_gain
from ..adapters.library import Library, check_distinct_names
from ..adapters.manifest import EvalResult
from ..config import MAX_RANK, ModelOptions
from ..data.eval_sets import EvalSet
from ..errors import AdapterError, ConfigError
from ..models import delta
from ..models.layers import adaptable_layers
from ..text import format_names, format_number
from .common import distinct_eval_sets, open_shared_base, write_adapter
from .verify import OutputComparison


@dataclass(frozen=True)
class BlendResult:
    """A blend.

    Args:
        adapter: the new adapter.
        exact_rank: rank of the exact sum in its largest layer.
        lost_energy: share of each layer's energy (squared norm) lost by truncation.
        total_lost_energy: share over all layers.
        comparison: the saved adapter compared with the exact result.
        results: gain on each held-out set.
    """

    adapter: Adapter
    exact_rank: int
    lost_energy: dict[str, float] = field(repr=False)
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
    """Create an adapter that is the weighted sum of others.

    The sum is exact: its rank in each layer is the sum of theirs, unless `rank` truncates it. The
    saved adapter is loaded by PEFT and compared with the base plus the exact sum.

    Examples:
        >>> noir, verse = Library().get_all(["noir", "verse"])
        >>> blend([(noir, 0.7), (verse, 0.3)], "both", Library()).adapter.name
        'both'

    Args:
        parts: adapters and weights; a negative weight subtracts.
        name: name of the new adapter.
        library: the library it is saved to.
        rank: truncate each layer to this rank.
        sets: held-out sets; None means those of the adapters.
        eval_rows: largest number of rows of each set, and of each part of a blend in it; None
            means those of training.
        overwrite: replace an existing adapter.
        options: the base model; always loaded in float32.

    Raises:
        AdapterError: the adapters do not share a base, one is DoRA, or the outputs differ.
        ConfigError: a weight or the rank is invalid.
    """
    if not parts:
        raise ConfigError("There is nothing to blend: give adapters and weights.")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"rank is {rank}: it must be a whole number from 1 to {MAX_RANK}.")
    library.check_name_free(name, overwrite=overwrite)
    if invalid := [
        f"{part.name}={weight:g}" for part, weight in parts if not weight or not math.isfinite(weight)
    ]:
        raise ConfigError(f"{format_names(invalid)}: a weight must be a number other than 0.")
    adapters = list({part.path.resolve(): part for part, _ in parts}.values())
    check_distinct_names(adapters)
    for adapter in adapters:
        delta.check_summable(adapter)
    base = open_shared_base(adapters, options, library.path / name)
    layers = adaptable_layers(base.model)
    deltas = {adapter.path.resolve(): delta.load_deltas(adapter, layers) for adapter in adapters}
    exact = delta.sum_deltas([(weight, deltas[part.path.resolve()]) for part, weight in parts])
    exact_rank = max(update.rank for update in exact.values())
    if rank is None and exact_rank > MAX_RANK:
        raise AdapterError(
            f"The exact sum has rank {exact_rank}, above the limit of {MAX_RANK}: truncate it with --rank."
        )
    truncated = rank is not None and rank < exact_rank
    kept = {module: delta.truncate_rank(update, rank or exact_rank) for module, update in exact.items()}
    command = " ".join(["blend", *(f"{part.name}={format_number(weight)}" for part, weight in parts)])
    command += f" --rank {rank}" if truncated else ""
    parents_sets, sets = sets is None, distinct_eval_sets(adapters, sets, eval_rows, options.notify)
    with library.create(name, overwrite=overwrite) as folder:
        written, losses, comparison = write_adapter(
            folder, name, base, kept, adapters, command, sets, parents_sets, options.notify
        )
        lost_energy = dict.fromkeys(exact, 0.0)
        if truncated:
            lost_energy = delta.lost_energy(exact, delta.load_deltas(written, layers))
    results = {eval_set.name: paired_gain(*pair) for eval_set, pair in zip(sets, losses, strict=True) if pair}
    return BlendResult(
        adapter=library.get(name),
        exact_rank=exact_rank,
        lost_energy=lost_energy,
        total_lost_energy=delta.total_lost_energy(exact, lost_energy),
        comparison=comparison,
        results=results,
    )
