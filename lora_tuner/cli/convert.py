"""The commands `merge`, `blend` and `compress`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..adapters.adapter import SPECTRUM_FILE
from ..adapters.library import Library
from ..adapters.summaries import format_ranks
from ..config import MAX_RANK, Dtype, ModelOptions, TrainConfig
from ..errors import ConfigError
from ..text import format_bytes, format_count, format_gain, one_line
from .display import print_picture, print_result, print_wrapped, show_json
from .options import (
    DEFAULT_ADAPTERS_DIR,
    EVAL_SET_FIELDS,
    AdapterArgument,
    AdapterArguments,
    AdaptersDirOption,
    JsonOption,
    Overrides,
    OverwriteOption,
    complete_adapter_names,
    eval_sets_from,
    model_options,
    settings_options,
)

if TYPE_CHECKING:
    from ..convert.blend import BlendResult
    from ..convert.compress import CompressResult
    from ..convert.verify import OutputComparison

# The comparison has no standard error, which alone depends on groups.
_MERGE_FIELDS = [name for name in EVAL_SET_FIELDS if name != "group_by"]
EvalRowsOption = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Maximum number of rows of each held-out set, and of each part of a blend.",
        show_default="all",
    ),
]


@settings_options(TrainConfig, *_MERGE_FIELDS)
@model_options("base", "revision", "threads", "force")
def merge(
    overrides: Overrides,
    adapters: AdapterArguments,
    out: Annotated[
        Path,
        typer.Option(
            help="Model folder to write. With several adapters, each gets a subfolder.", show_default=False
        ),
    ],
    dtype: Annotated[
        Dtype, typer.Option(help="Precision of the merged model. The merge is in float32.")
    ] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a weights file.")] = "5GB",
    eval_rows: Annotated[
        int, typer.Option(min=2, help="Held-out rows for the comparison, of each part of a blend.")
    ] = 50,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    *,
    options: ModelOptions,
) -> None:
    """Merge adapters into their base: plain model folders, verified against base and adapter.

    python cli.py merge poems --out merged/poems

    Docs: docs/other-tools.md
    """
    loaded = Library(adapters_dir).get_all(adapters)
    from ..convert import merge as convert_merge

    folders = [out if len(loaded) == 1 else out / adapter.name for adapter in loaded]
    for folder in folders:
        convert_merge.check_model_folder(folder, overwrite=overwrite)
    sets = eval_sets_from(overrides, eval_rows, loaded)
    results = []
    for adapter, folder in zip(loaded, folders, strict=True):
        merged = convert_merge.merge(
            adapter,
            folder,
            dtype=dtype,
            shard_size=max_shard_size,
            sets=sets,
            eval_rows=eval_rows,
            overwrite=overwrite,
            options=options,
        )
        results.append({"path": str(folder), "comparison": _comparison_dict(merged.comparison)})
        if not as_json:
            _show_merge(folder, merged.comparison)
    if as_json:
        show_json(results)


def _comparison_dict(comparison: "OutputComparison") -> dict[str, object]:
    return {
        "difference": comparison.max_logit_difference,
        "agreement": comparison.top1_agreement,
        "losses": comparison.losses,
        "rows": comparison.rows,
    }


def _show_merge(folder: Path, comparison: "OutputComparison") -> None:
    print(folder)
    print(
        "verified against base and adapter: largest logit difference "
        f"{comparison.max_logit_difference:.2g}, same top token at {comparison.top1_agreement:.2%} "
        "of positions"
    )
    if comparison.losses:
        before, after = (math.exp(min(loss, 700.0)) for loss in comparison.losses)
        print(f"perplexity {before:.2f} -> {after:.2f} ({format_count(comparison.rows, 'held-out row')})")


@settings_options(TrainConfig, *EVAL_SET_FIELDS)
@model_options("base", "revision", "device", "threads", "force")
def blend(
    overrides: Overrides,
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME[=WEIGHT]...",
            help="Adapters and their weights. Without weights: equal parts. A negative weight subtracts.",
            autocompletion=complete_adapter_names,
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the new adapter.", show_default=False)],
    rank: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_RANK, help="Truncate the sum to this rank.", show_default="the exact sum"),
    ] = None,
    eval_rows: EvalRowsOption = None,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    *,
    options: ModelOptions,
) -> None:
    """Create an adapter that is the weighted sum of others.

    python cli.py blend poems=0.7 tickets=0.3 --name both

    Docs: docs/tour.md
    """
    library = Library(adapters_dir)
    weighted = [(library.get(adapter), weight) for adapter, weight in _parse_weights(parts)]
    folders = [adapter.path.resolve() for adapter, _ in weighted]
    if len({*folders}) < len(folders) and not any("=" in part for part in parts):
        repeated = next(adapter.name for adapter, _ in weighted if folders.count(adapter.path.resolve()) > 1)
        raise ConfigError(f"'{repeated}' is given twice: give each adapter once, or weights.")
    library.check_name_free(name, overwrite=overwrite)
    from ..convert import blend as convert_blend

    blended = convert_blend.blend(
        weighted,
        name,
        library,
        rank=rank,
        sets=eval_sets_from(overrides, eval_rows, [adapter for adapter, _ in weighted]),
        eval_rows=eval_rows,
        overwrite=overwrite,
        options=options,
    )
    details = {
        "full_rank": blended.exact_rank,
        "lost": blended.lost_energy,
        "lost_in_all": blended.total_lost_energy,
        "comparison": _comparison_dict(blended.comparison),
        "sets": {name: result.model_dump() for name, result in blended.results.items()},
    }
    show_json(blended.adapter.to_dict() | {"blend": details}) if as_json else _show_blend(blended)


def _parse_weights(parts: list[str]) -> list[tuple[str, float]]:
    """Return adapters and weights; without any weight the adapters are equal parts of 1 in all."""
    bare = [part for part in parts if "=" not in part]
    if not bare:
        return [_parse_weight(part) for part in parts]
    if len(parts) == 1:
        raise ConfigError(
            f"'{bare[0]}' is one adapter alone: name two or more, or give a weight "
            "(1 rewrites it, others scale it)."
        )
    if len(bare) < len(parts):
        raise ConfigError(
            f"'{bare[0]}' has no weight, and others have: give each one, such as {bare[0]}=0.5, or none for equal parts."
        )
    return [(part, 1 / len(bare)) for part in bare]


def _parse_weight(part: str) -> tuple[str, float]:
    name, equals, weight = part.rpartition("=")
    try:
        if equals and name:
            return name, float(weight)
    except ValueError:
        pass
    raise ConfigError(f"'{part}' is not of the form NAME=WEIGHT, such as imdb=0.7.")


def _show_blend(blended: "BlendResult") -> None:
    adapter = blended.adapter
    assert adapter.manifest is not None
    ranks = format_ranks(map(adapter.rank_of, adapter.modules))
    print(one_line(f"{adapter.path}  {format_bytes(adapter.bytes)}, {ranks}: {adapter.manifest.made_by}"))
    print(
        "verified against the exact result: largest logit difference "
        f"{blended.comparison.max_logit_difference:.2g}"
    )
    if any(blended.lost_energy.values()):
        print(
            f"rank truncated from {blended.exact_rank}: "
            f"{_format_lost(blended.total_lost_energy, blended.lost_energy)}"
        )
    print_result(adapter.manifest.result)
    if len(blended.results) > 1:
        for name, result in blended.results.items():
            gain = format_gain(result.gain, result.standard_error)
            print(one_line(f"  on {name}: gain {gain}, {result.format_rows()}"))


def _format_lost(total: float, layers: dict[str, float]) -> str:
    worst = sorted(layers, key=lambda module: -layers[module])[:3]
    listed = ", ".join(f"{module} ({layers[module]:.2%})" for module in worst)
    return f"{total:.2%} of the energy is lost, most in {listed}; --json lists every layer"


@settings_options(TrainConfig, *EVAL_SET_FIELDS)
@model_options("base", "revision", "device", "threads", "force")
def compress(
    overrides: Overrides,
    adapter: AdapterArgument,
    name: Annotated[
        str | None, typer.Option(help="Name of the new adapter.", show_default="NAME-compressed")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of each layer's energy to keep.", show_default="0.99"),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Instead of --energy: size limit of the weights, in bytes.", show_default=False),
    ] = None,
    eval_rows: EvalRowsOption = None,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    *,
    options: ModelOptions,
) -> None:
    """Create a smaller adapter: the smallest rank in each layer that keeps a share of its energy.

    python cli.py compress poems --energy 0.95

    Docs: docs/tour.md
    """
    library = Library(adapters_dir)
    original = library.get(adapter)
    from ..convert import compress as convert_compress

    compressed = convert_compress.compress(
        original,
        name or f"{original.name}-compressed",
        library,
        energy=energy,
        max_bytes=max_bytes,
        sets=eval_sets_from(overrides, eval_rows, [original]),
        eval_rows=eval_rows,
        overwrite=overwrite,
        options=options,
    )
    details = {
        "ranks": compressed.ranks,
        "bytes": compressed.bytes,
        "lost": compressed.lost_energy,
        "lost_in_all": compressed.total_lost_energy,
        "comparison": _comparison_dict(compressed.comparison),
        "results": [result.model_dump() for result in compressed.results or ()],
    }
    picture = str(compressed.adapter.path / SPECTRUM_FILE)
    facts = compressed.adapter.to_dict() | {"compress": details, "picture": picture}
    show_json(facts) if as_json else _show_compress(compressed)


def _show_compress(compressed: "CompressResult") -> None:
    before, after = compressed.bytes
    old_ranks, new_ranks = zip(*compressed.ranks.values(), strict=True)
    size = f"{format_bytes(after)} of {format_bytes(before)} ({after / before:.0%})"
    print(f"{compressed.adapter.path}  {size}, rank {_format_range(old_ranks)} -> {_format_range(new_ranks)}")
    print_wrapped(_format_lost(compressed.total_lost_energy, compressed.lost_energy))
    if compressed.results:
        full, reduced = compressed.results
        print(
            f"held-out loss {full.loss:.3f} -> {reduced.loss:.3f} (base: {full.base_loss:.3f}, {full.format_rows()})"
        )
    else:
        print("not evaluated")
    print_picture(compressed.adapter.path / SPECTRUM_FILE, "singular values of each kind of layer")


def _format_range(numbers: tuple[int, ...]) -> str:
    smallest, largest = min(numbers), max(numbers)
    return f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
