"""Compress an adapter: the smallest rank in each layer that keeps a share of its energy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import evaluation
from ..adapters import plots
from ..adapters.adapter import SPECTRUM_FILE, Adapter
from ..adapters.library import Library
from ..adapters.manifest import EvalResult
from ..config import ModelOptions
from ..errors import AdapterError, ConfigError
from ..evaluation import EvalSet
from ..models import delta, lora
from ..models.delta import Deltas
from .common import (
    combined_result,
    distinct_eval_sets,
    format_number,
    open_shared_base,
    verify_written,
    write_adapter,
    write_manifest_and_card,
)
from .verify import OutputComparison

DEFAULT_ENERGY = 0.99  # of a layer that compress keeps


@dataclass(frozen=True)
class CompressResult:
    """A compressed adapter. Before and after: the ranks of its layers, its bytes, and the results on the same held-out rows, None
    where there are none. `lost` is the share of each layer's energy that is gone."""

    adapter: Adapter
    ranks: dict[str, tuple[int, int]]
    bytes: tuple[int, int]
    lost_energy: dict[str, float]
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
    """The same adapter with the smallest rank in each layer that keeps `energy` (0.99 unless said), a share of that layer's
    squared norm.

    With `max_bytes`, the largest share whose weights fit into so many bytes. The held-out loss is measured before and
    after. Raises AdapterError for DoRA, for an adapter that does nothing, and when rank 1 everywhere is too large.
    """
    if energy is not None and max_bytes is not None:
        raise ConfigError("energy and max_bytes are two rules: give one.")
    energy = DEFAULT_ENERGY if energy is None else energy
    if not 0 <= energy <= 1:
        raise ConfigError(f"energy is {energy}: it is a share, from 0 to 1.")
    library.check_name_free(name, overwrite=overwrite)
    delta.check_summable(adapter)
    opened = open_shared_base([adapter], options)
    layers = lora.linear_layers(opened.model)
    exact = delta.load_deltas(adapter, layers)
    spectra = {module: delta.singular_values(update).square() for module, update in exact.items()}
    spectra = {module: squares for module, squares in spectra.items() if float(squares.sum()) > 0}
    if not spectra:
        raise AdapterError(f"{adapter.name} does nothing: there is nothing to keep of it.")
    command = f"compress {adapter.name} --energy {format_number(energy)}"
    if max_bytes is not None:
        command = f"compress {adapter.name} --max-bytes {max_bytes}"
        energy = _largest_energy(exact, spectra, max_bytes)
    ranks = _ranks_for_energy(spectra, energy)
    kept = {module: delta.truncate_rank(exact[module], rank) for module, rank in ranks.items()}
    own, sets = sets is None, distinct_eval_sets([adapter], sets, eval_rows, options.notify)
    before = evaluation.held_out_losses(opened, {adapter.name: adapter}, sets, options.notify)[0]
    was = adapter.bytes
    with library.create(name, overwrite=overwrite) as work:
        written = write_adapter(opened, kept, work)
        lost = delta.lost_energy(exact, delta.load_deltas(written, layers))
        after = evaluation.held_out_losses(opened, {name: written}, sets, options.notify)[0]
        found = verify_written(opened, written, kept, name, sets, options.notify)
        plots.plot_spectra({module: each.tolist() for module, each in spectra.items()}, ranks, work / SPECTRUM_FILE)
        write_manifest_and_card(written, name, opened, [adapter], command, sets, own, after)
    compressed, once, since = library.get(name), combined_result(before), combined_result(after)
    return CompressResult(
        compressed,
        {module: (update.rank, ranks.get(module, 0)) for module, update in exact.items()},
        (was, compressed.bytes),
        lost,
        delta.total_lost_energy(exact, lost),
        found,
        (once, since) if once and since else None,
    )


def _ranks_for_energy(spectra: dict[str, torch.Tensor], energy: float) -> dict[str, int]:
    """The smallest rank of each layer whose squared singular values make that share of their sum."""
    ranks = {}
    for module, squares in spectra.items():
        shares = squares.cumsum(0) / squares.sum()
        # What float32 has rounded is none of it, so that all of the energy can be had by the true rank.
        ranks[module] = min(int((shares < energy * (1 - 1e-12)).sum()) + 1, len(squares))
    return ranks


def _weights_bytes(exact: Deltas, ranks: dict[str, int]) -> int:
    """What the weights take on disk at the most: each tensor's numbers, and its entry in the header."""
    sizes = {module: update.A.shape[1] + len(update.B) for module, update in exact.items()}
    return sum(4 * rank * sizes[module] + 2 * (len(module) + 140) for module, rank in ranks.items())


def _largest_energy(exact: Deltas, spectra: dict[str, torch.Tensor], most: int) -> float:
    """The largest share of energy whose ranks fit into so many bytes."""
    if (least := _weights_bytes(exact, _ranks_for_energy(spectra, 0.0))) > most:
        raise AdapterError(f"Rank 1 in every layer takes about {least:,} bytes, more than --max-bytes {most:,}.")
    shares = torch.cat([squares.cumsum(0) / squares.sum() for squares in spectra.values()]).unique().tolist()
    low, high = 0, len(shares)  # the answer is the last that fits: more energy never takes fewer bytes
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high)
            if _weights_bytes(exact, _ranks_for_energy(spectra, shares[middle])) <= most
            else (low, middle)
        )
    return float(shares[low]) if _weights_bytes(exact, _ranks_for_energy(spectra, shares[low])) <= most else 0.0
