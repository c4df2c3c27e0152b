"""The command `demo`: a short training run, then a text of its adapter beside that of the base."""

import shlex
from typing import Any

import typer

from ..adapters.library import Library, adapter_name
from ..config import TrainConfig
from ..text import PROGRAM
from ..training.unfinished import unfinished_runs
from .display import print_stderr

TRAINING = ("--rank", "8", "--minutes", "1.25")
PROMPT = "Acting"


def demo(ctx: typer.Context) -> None:
    """Train a short adapter on film reviews, then generate with it and with the base.

    The adapter is written to adapters/imdb in the current folder. If it is there already, it only
    generates; an unfinished run in runs/imdb is resumed.

    python cli.py demo

    Docs: docs/tour.md
    """
    config = TrainConfig()
    name = adapter_name(config)
    if name not in Library(config.adapters_dir).names():
        runs = unfinished_runs(config.runs_dir)
        is_unfinished = any((run.name, run.kind) == (name, "run") for run in runs)
        _run(ctx, "train", *(("--resume", name) if is_unfinished else TRAINING))
    _run(ctx, "compare", PROMPT, "--adapter", name)


def _run(ctx: Any, name: str, *arguments: str) -> None:
    """Run another command as if it had been typed, and show it."""
    print_stderr(f"$ {PROGRAM} {name} {shlex.join(arguments)}")
    command = ctx.parent.command.commands[name]
    with command.make_context(name, [*arguments], parent=ctx.parent) as called:
        command.invoke(called)
