"""The command `evaluate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import atomic_io
from ..adapters.library import Library
from ..cli.options import DEFAULT_ADAPTERS_DIR, AdaptersDirOption
from ..config import ModelOptions, TrainConfig
from ..errors import ConfigError
from .display import show_gains, show_json
from .options import (
    EVAL_SET_FIELDS,
    AdapterArguments,
    JsonOption,
    eval_sets_from,
    model_options,
    settings_options,
)


@settings_options(TrainConfig, *EVAL_SET_FIELDS)
@model_options()
def evaluate(
    given: dict[str, Any],
    adapters: AdapterArguments,
    eval_rows: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="So many of each set of rows.",
            show_default=f"those of training; {TrainConfig().eval_rows} of --eval-dataset",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the gains into this PNG file.", show_default=False)] = None,
    as_json: JsonOption = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    *,
    options: ModelOptions,
) -> None:
    """Held-out loss of the base and of each adapter, on its own rows and on those of the others."""
    if plot and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot {plot}: the picture is a .png file.")
    if plot and not plot.parent.is_dir():
        raise ConfigError(f"--plot {plot}: there is no folder {plot.parent}.")
    if plot and (why := atomic_io.why_not_writable(plot.parent)):
        raise ConfigError(f"--plot {plot}: {why}.")
    found = Library(adapters_dir).get_all(adapters)
    sets = eval_sets_from(given, eval_rows)
    from .. import evaluation
    from ..adapters import plots

    matrix = evaluation.evaluate(
        found,
        sets,
        eval_rows=eval_rows,
        options=options,
    )
    if plot:
        with atomic_io.atomic_file(plot) as work:
            plots.plot_gains(matrix.base, matrix.adapters, [rows.name for rows in matrix.sets], matrix.cells, work)
    show_json(matrix.to_dict()) if as_json else show_gains(matrix)
