"""The command `evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.cells import cell_len

from .. import atomic_io
from ..adapters.library import Library
from ..adapters.summaries import Table
from ..config import DEFAULT_EVAL_ROWS, ModelOptions, TrainConfig
from ..errors import ConfigError
from ..text import GAIN_SCALE, format_count, format_gain
from .display import print_picture, print_stderr, print_table, show_json, stdout_console
from .options import (
    DEFAULT_ADAPTERS_DIR,
    EVAL_SET_FIELDS,
    AdapterArguments,
    AdaptersDirOption,
    JsonOption,
    Overrides,
    eval_sets_from,
    model_options,
    settings_options,
)

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..analysis.leak import Leak
    from ..evaluation.gain_matrix import GainMatrix


@settings_options(TrainConfig, *EVAL_SET_FIELDS)
@model_options()
def evaluate(
    overrides: Overrides,
    adapters: AdapterArguments,
    eval_rows: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Maximum number of rows of each held-out set, and of each part of a blend.",
            show_default=f"as in training; {DEFAULT_EVAL_ROWS} of --eval-dataset",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Plot the gains to this PNG file.", show_default=False)
    ] = None,
    leak: Annotated[
        bool,
        typer.Option(
            "--leak",
            help="Show how much of each gain comes from held-out rows that have a near duplicate among the training rows.",
        ),
    ] = False,
    probes: Annotated[
        bool,
        typer.Option(
            "--probes",
            help="Measure instead what `adapters check --url` and the adapter auto compare, into the manifests.",
        ),
    ] = False,
    as_json: JsonOption = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    *,
    options: ModelOptions,
) -> None:
    """Measure held-out loss: of the base and each adapter, on the held-out rows of all adapters.

    python cli.py evaluate poems tickets --plot gains.png

    Docs: docs/measuring.md
    """
    if plot and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot {plot}: choose a name that ends in .png.")
    if plot and not plot.parent.is_dir():
        raise ConfigError(f"--plot {plot}: there is no folder {plot.parent}.")
    if plot and (why := atomic_io.why_no_file(plot)):
        raise ConfigError(f"--plot {plot}: {why}.")
    if leak and (plot or overrides):
        names = ["plot"] * bool(plot) + [*overrides]
        raise ConfigError(f"{', '.join(names)}: --leak measures the rows held out in training, so leave it out.")
    if probes and (plot or leak or eval_rows or overrides):
        given = {"plot": plot, "leak": leak, "eval_rows": eval_rows} | overrides
        names = [name for name, value in given.items() if value]
        raise ConfigError(f"{', '.join(names)}: --probes measures prompts alone, so leave it out.")
    loaded = Library(adapters_dir).get_all(adapters)
    if probes:
        from ..convert.remeasure import remeasure

        show_probes(remeasure(loaded, options), as_json=as_json)
        return
    if leak:
        from ..analysis.leak import measure_leak

        leaks = measure_leak(loaded, eval_rows=eval_rows, options=options)
        show_json({"adapters": [each.to_dict() for each in leaks]}) if as_json else show_leaks(leaks)
        return
    sets = eval_sets_from(overrides, eval_rows, loaded)
    from ..evaluation import gain_matrix

    matrix = gain_matrix.evaluate(loaded, sets, eval_rows=eval_rows, options=options)
    if plot:
        with atomic_io.atomic_file(plot) as file:
            matrix.plot(file)
    if as_json:
        show_json(matrix.to_dict() | ({"picture": str(plot)} if plot else {}))
        return
    show_gains(matrix)
    if plot:
        print_picture(plot, "gain of each adapter on each held-out set")


def show_gains(matrix: "GainMatrix") -> None:
    """Print losses and gains, with a row per adapter and a column per held-out set."""
    for number, part in enumerate(matrix.summary()):
        if isinstance(part, str):
            print_stderr(part)
        else:
            print("\n" * (number > 0) + part.title)
            _print_matrix(part)


def show_probes(adapters: Sequence["Adapter"], *, as_json: bool) -> None:
    """Print how far base and adapter are apart on the probes of each adapter."""
    from ..analysis.server_check import own_probes, span_of

    probes = {adapter.name: own_probes(adapter) for adapter in adapters}
    if as_json:
        rows = []
        for name, of in probes.items():
            rows.append({"name": name, "probes": len(of), "difference": span_of(of)})
        show_json(rows)
        return
    for name, of in probes.items():
        difference = f"base and adapter differ by {span_of(of):.3f} nats each"
        print(f"{name}: {len(of)} probes, on which {difference}")


def show_leaks(leaks: Sequence["Leak"]) -> None:
    """Print the gain of each adapter on the held-out rows with and without a near duplicate in training."""
    table, lines = [], []
    for leak in leaks:
        if leak.missing or leak.all_rows is None:
            print_stderr(f"{leak.adapter} has no figures: {leak.missing}.")
            continue
        parts = {"all": leak.all_rows, "with a near duplicate": leak.with_copy, "without one": leak.without_copy}
        for label, part in parts.items():
            gain = format_gain(part.gain, part.standard_error, "+.3f") if part else ""
            table.append([leak.adapter, label, part.format_rows() if part else "0 rows", gain])
        copied = leak.with_copy.rows if leak.with_copy else 0
        share = "there is no gain" if leak.share is None else f"{leak.share:.1%} of the gain comes from these"
        lines.append(
            f"{leak.adapter}: near duplicates of {copied} of {format_count(leak.all_rows.rows, 'held-out row')} among the "
            f"training rows: {leak.copies:,} of {leak.training_rows:,}; {share}"
        )
    if table:
        print(
            "gain over the base (loss, ± standard error) on held-out rows that a training\nrow nearly copies; "
            f"{GAIN_SCALE}"
        )
        print_table(table, ("", "held-out rows", "measured", "gain"))
        print("\n".join(lines))


def _print_matrix(table: Table) -> None:
    """Print a row for each adapter; on a narrow terminal, a line per cell."""
    names, sizes = zip(*(column.partition("\n")[::2] for column in table.header), strict=True)
    widths = [max(map(cell_len, cells)) + 2 for cells in zip(*table.rows, names, sizes, strict=True)]
    if sum(widths) <= stdout_console().width:
        print_table(table.rows, table.header)
    else:
        print_table(
            (row[0], f"on {name}", cell)
            for row in table.rows
            for name, cell in [*zip(names, row, strict=True)][1:]
        )
