"""Compress an adapter: in each layer, keep the smallest rank with a share of its energy."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..adapters import plots
from ..adapters.adapter import SPECTRUM_FILE, Adapter
from ..adapters.library import Library
from ..adapters.manifest import EvalResult
from ..config import ModelOptions
from ..data.eval_sets import EvalSet
from ..errors import AdapterError, ConfigError
from ..evaluation import gain_matrix
from ..models import delta
from ..models.delta import Deltas
from ..models.layers import adaptable_layers
from ..text import format_number
from .common import distinct_eval_sets, open_shared_base, write_adapter
from .verify import OutputComparison

DEFAULT_ENERGY = 0.99


@dataclass(frozen=True)
class CompressResult:
    """A compressed adapter. Pairs are values before and after.

    Args:
        adapter: the new adapter.
        ranks: rank of each layer.
        bytes: size on disk.
        lost_energy: share of each layer's energy that was lost.
        total_lost_energy: share over all layers.
        comparison: the saved adapter compared with the exact result.
        results: evaluations on the same held-out rows; None without any.
    """

    adapter: Adapter
    ranks: dict[str, tuple[int, int]] = field(repr=False)
    bytes: tuple[int, int]
    lost_energy: dict[str, float] = field(repr=False)
    total_lost_energy: float
    comparison: OutputComparison
    results: tuple[EvalResult, EvalResult] | None


def compress(
    adapter: Adapter,
    name: str,
    library: Library,
    *,
    energy: float | None = None,
    max_bytes: int | None = None,
    sets: Sequence[EvalSet] | None = None,
    eval_rows: int | None = None,
    overwrite: bool = False,
    options: ModelOptions = ModelOptions(),
) -> CompressResult:
    """Create an adapter with the smallest rank in each layer that keeps a share of its energy
    (squared norm).

    Held-out loss is measured before and after.

    Examples:
        >>> compress(Library().get("noir"), "small", Library(), energy=0.9).adapter.name
        'small'

    Args:
        adapter: the adapter.
        name: name of the new adapter.
        library: the library it is saved to.
        energy: share to keep, from 0 to 1; 0.99 by default.
        max_bytes: instead of `energy`, keep as much as fits into this size of weights.
        sets: held-out sets; None means those of the adapter.
        eval_rows: largest number of rows of each set, and of each part of a blend in it; None
            means those of training.
        overwrite: replace an existing adapter.
        options: the base model; always loaded in float32.

    Raises:
        AdapterError: the adapter is DoRA or all zero, or rank 1 everywhere is larger than
            `max_bytes`.
        ConfigError: both or invalid limits.
    """
    if energy is not None and max_bytes is not None:
        raise ConfigError("energy and max_bytes exclude each other: give one.")
    energy = DEFAULT_ENERGY if energy is None else energy
    if not 0 <= energy <= 1:
        raise ConfigError(f"energy is {energy}: it must be a share from 0 to 1.")
    library.check_name_free(name, overwrite=overwrite)
    delta.check_summable(adapter)
    base = open_shared_base([adapter], options, library.path / name)
    layers = adaptable_layers(base.model)
    exact = delta.load_deltas(adapter, layers)
    spectra = {module: delta.singular_values(update).square() for module, update in exact.items()}
    spectra = {module: squares for module, squares in spectra.items() if float(squares.sum()) > 0}
    if not spectra:
        raise AdapterError(f"{adapter.name} cannot be compressed: all its updates are zero.")
    command = f"compress {adapter.name} --energy {format_number(energy)}"
    if max_bytes is not None:
        command = f"compress {adapter.name} --max-bytes {max_bytes}"
        energy = _largest_energy(exact, spectra, max_bytes)
    ranks = _ranks_for_energy(spectra, energy)
    kept = {module: delta.truncate_rank(exact[module], rank) for module, rank in ranks.items()}
    parents_sets, sets = sets is None, distinct_eval_sets([adapter], sets, eval_rows, options.notify)
    losses_before = gain_matrix.held_out_losses(base, {adapter.name: adapter}, sets, options.notify)[0]
    bytes_before = adapter.bytes  # the adapter may be overwritten
    with library.create(name, overwrite=overwrite) as folder:
        plots.plot_spectra(
            {module: squares.tolist() for module, squares in spectra.items()}, ranks, folder / SPECTRUM_FILE
        )
        written, losses_after, comparison = write_adapter(
            folder, name, base, kept, [adapter], command, sets, parents_sets, options.notify
        )
        lost_energy = delta.lost_energy(exact, delta.load_deltas(written, layers))
    compressed = library.get(name)
    before, after = gain_matrix.pooled_gain(losses_before), gain_matrix.pooled_gain(losses_after)
    return CompressResult(
        adapter=compressed,
        ranks={module: (update.rank, ranks.get(module, 0)) for module, update in exact.items()},
        bytes=(bytes_before, compressed.bytes),
        lost_energy=lost_energy,
        total_lost_energy=delta.total_lost_energy(exact, lost_energy),
        comparison=comparison,
        results=(before, after) if before and after else None,
    )


def _energy_shares(squares: torch.Tensor) -> torch.Tensor:
    """Share of a layer's energy that each rank keeps, (rank,)."""
    return squares.cumsum(0) / squares.sum()


def _ranks_for_energy(spectra: dict[str, torch.Tensor], energy: float) -> dict[str, int]:
    """The smallest rank of each layer that keeps a share of its energy."""
    # The factor allows for rounding, so that the true rank keeps all of the energy.
    return {
        module: min(int((_energy_shares(squares) < energy * (1 - 1e-12)).sum()) + 1, len(squares))
        for module, squares in spectra.items()
    }


def _largest_energy(exact: Deltas, spectra: dict[str, torch.Tensor], max_bytes: int) -> float:
    """The largest share of energy whose weights fit into `max_bytes`."""

    def weights_bytes(energy: float) -> int:
        """Upper bound of the weights file: float32 values and header entries."""
        ranks = _ranks_for_energy(spectra, energy)
        return sum(4 * rank * sizes[module] + 2 * (len(module) + 140) for module, rank in ranks.items())

    sizes = {module: update.size for module, update in exact.items()}
    if weights_bytes(0.0) > max_bytes:
        raise AdapterError(
            f"Rank 1 in every layer takes about {weights_bytes(0.0):,} bytes, more than --max-bytes {max_bytes:,}."
        )
    all_shares = torch.cat([_energy_shares(squares) for squares in spectra.values()])
    shares: list[float] = [0.0, *all_shares.unique().tolist()]  # sorted; the first one fits
    return shares[bisect.bisect_right(shares, max_bytes, key=weights_bytes) - 1]
