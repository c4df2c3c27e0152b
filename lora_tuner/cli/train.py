"""The commands `train` and `methods`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import distributed
from ..config import METHODS, TrainConfig, expand_sweep, resolve_settings
from ..errors import ConfigError
from .display import print_table, show_json, show_plan, show_preview, show_sweep, show_trained
from .options import (
    JsonOption,
    display,
    settings_options,
)


@settings_options(TrainConfig)
def train(
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="A YAML file of settings; options here come last.", show_default=False)
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on with the unfinished run of that name.", show_default=False)
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Measure a few steps, say what the run costs, train nothing.")
    ] = False,
    preview: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Show N rows as the model sees them, train nothing.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter on your text."""
    if resume is not None and (given.keys() - {"runs_dir"} or config or plan or preview):
        raise ConfigError(
            "--resume takes its settings from the run it goes on with: leave all others but --runs-dir out."
        )
    if plan and preview:
        raise ConfigError("--plan and --preview are two questions: ask one at a time.")
    runs = [resolve_settings(TrainConfig, it, config) for it in expand_sweep(given)]
    if len(runs) > 1 and (plan or preview):
        raise ConfigError("--plan and --preview are for one run: give one rank and one learning rate.")
    settings = runs[0]
    from ..training import run, sweep

    if distributed.expected_world_size() > 1 and preview:
        raise ConfigError("--preview is for one process: leave torchrun out.")
    if len(runs) > 1 or (resume and sweep.is_unfinished(resume, settings.runs_dir)):
        climbed = sweep.resume_sweep(resume, settings.runs_dir, display) if resume else sweep.run_sweep(runs, display)
        show_json(climbed.to_dict()) if as_json else show_sweep(climbed)
    elif preview:
        rows = run.preview(settings, preview, display)
        show_json([dataclasses.asdict(row) for row in rows]) if as_json else show_preview(rows)
    elif plan:
        cost = run.plan(settings, display)
        if distributed.rank() == 0:
            show_json(dataclasses.asdict(cost)) if as_json else show_plan(cost)
    else:
        adapter = run.train(settings, display) if resume is None else run.resume(resume, settings.runs_dir, display)
        if distributed.rank() == 0:
            show_json(adapter.to_dict()) if as_json else show_trained(adapter)
    distributed.destroy_process_group()


def methods(as_json: JsonOption = False) -> None:
    """What `train --method` can be, and when to choose which."""
    if as_json:
        show_json([{"name": name, **dataclasses.asdict(method)} for name, method in METHODS.items()])
    else:
        rows = [(name, f"{method.learning_rate:g}", method.when) for name, method in METHODS.items()]
        print_table(rows, ("method", "learning rate", "when to choose it"))
