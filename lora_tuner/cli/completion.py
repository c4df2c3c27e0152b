"""Shell completion: its installation, and run names, bases and data. None of it loads torch."""

import contextlib
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import typer

from ..config import TrainConfig
from ..errors import ConfigError, LoraTunerError
from ..text import CODE_EXTENSIONS, DATA_EXTENSIONS, PROGRAM, SCRIPT, data_extension
from .display import print_stderr

INSTALL_OPTIONS = {"--install-completion", "--show-completion"}


def completed_command(called: str | None) -> str:
    """Return the command that a shell completes. It completes no `python cli.py`, and a line says so.

    Raises:
        ConfigError: the command is not installed.
    """
    if shutil.which(SCRIPT) is None:
        raise ConfigError(
            f"A shell completes the command {SCRIPT}, not `{PROGRAM}`, and {SCRIPT} is not on the PATH: run "
            f"`pip install -e .`, activate the environment, and repeat this."
        )
    if called == PROGRAM:
        print_stderr(f"The command {SCRIPT} is completed, not `{PROGRAM}`: it does the same.")
    return SCRIPT


def complete_run_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of unfinished runs and sweeps with this prefix."""
    from ..training.unfinished import unfinished_runs

    with contextlib.suppress(LoraTunerError, OSError):
        runs = unfinished_runs(ctx.params.get("runs_dir") or TrainConfig().runs_dir)
        return [run.name for run in runs if run.name.startswith(incomplete)]
    return []


def complete_bases(incomplete: str) -> list[str]:
    """Bases that need no download, and folders and GGUF files, with this prefix."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from ..models.resolve import available_bases

    names = []
    with contextlib.suppress(LoraTunerError, OSError):
        names += available_bases()
    cached = sorted(Path(HF_HUB_CACHE).glob("models--*/snapshots/*/config.json"))
    names += [path.parents[2].name.removeprefix("models--").replace("--", "/") for path in cached]
    paths = _complete_paths(incomplete, lambda path: path.suffix.lower() == ".gguf")
    return list(dict.fromkeys([*(name for name in names if name.startswith(incomplete)), *paths]))


def complete_data(incomplete: str) -> list[str]:
    """Folders and data files with this prefix, and the demo data."""
    demo = [name for name in TrainConfig().dataset_names if name.startswith(incomplete)]
    return demo + _complete_paths(
        incomplete, lambda path: data_extension(path) in DATA_EXTENSIONS + CODE_EXTENSIONS
    )


def _complete_paths(incomplete: str, is_offered: Callable[[Path], bool]) -> list[str]:
    """Folders, which end in a slash, and the files that are offered; hidden ones after a dot alone.

    A folder alone is offered with its entries, as bash would put a space behind it. Names that
    have to be quoted are left to the shell, which quotes them.
    """
    parent, prefix = os.path.split(incomplete)
    try:
        entries = sorted(Path(os.path.expanduser(parent) or ".").iterdir())
    except OSError:  # there is no such folder
        return []
    paths = [
        os.path.join(parent, f"{entry.name}/" if entry.is_dir() else entry.name)
        for entry in entries
        if entry.name.startswith(prefix)
        and (prefix or not entry.name.startswith("."))
        and (entry.is_dir() or is_offered(entry))
        and shlex.quote(entry.name) == entry.name
    ]
    if len(paths) == 1 and paths[0].endswith("/"):
        paths += _complete_paths(paths[0], is_offered)
    return paths
