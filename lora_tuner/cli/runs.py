"""The `runs` commands: unfinished runs and sweeps. They never load torch."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import TrainConfig
from ..text import format_age
from .completion import complete_run_names
from .display import print_stderr, print_table, show_json
from .help import HelpGroup
from .options import JsonOption, StrictCommand, check_folder

DEFAULT_RUNS_DIR = TrainConfig().runs_dir
RunsDirOption = Annotated[
    Path,
    typer.Option(help=TrainConfig.model_fields["runs_dir"].description, file_okay=False, callback=check_folder),
]


class _ListsByDefault(HelpGroup):
    """A group that lists when no command is given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


runs_app = typer.Typer(
    cls=_ListsByDefault, help="List or remove unfinished runs, which `train --resume NAME` continues."
)


@runs_app.command("list", cls=StrictCommand)
def list_runs(runs_dir: RunsDirOption = DEFAULT_RUNS_DIR, as_json: JsonOption = False) -> None:
    """List unfinished runs and sweeps: steps done, age, data, state. `runs` alone does the same.

    Waiting ones are those of `train --queue`, with the number of runs before them.

    python cli.py runs list

    Docs: docs/tour.md
    """
    from ..training.jobs import list_jobs

    unfinished = [job for job in list_jobs(runs_dir) if job.state != "finished"]
    jobs = [job for job in unfinished if job.state.is_alive or job.folder.exists()]
    if as_json:
        show_json([job.to_dict() for job in jobs])
        return
    rows = []
    for job in jobs:
        if job.problem:
            print_stderr(f"{job.name} {'is broken' if job.total is None else job.state}: {job.problem}")
        step = "?" if job.total is None else f"{job.step:,} of {job.total:,}"
        rows.append(
            (
                job.name,
                f"{step} trials" if job.kind == "sweep" else step,
                format_age(job.created),
                ", ".join(Path(name).name for name in job.data) or "?",
                f"{job.state} for {job.ahead}" if job.ahead else str(job.state),
            )
        )
    if rows:
        print_table(rows, ("name", "step", "age", "data", "state"))
    else:
        print_stderr(f"No unfinished runs in {runs_dir}.")


@runs_app.command("remove", cls=StrictCommand)
def remove_run(
    name: Annotated[
        str,
        typer.Argument(
            help="Unfinished run or sweep, by name.", show_default=False, autocompletion=complete_run_names
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    runs_dir: RunsDirOption = DEFAULT_RUNS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Delete an unfinished run permanently, or a sweep with the runs of its trials. Adapters are kept.

    python cli.py runs remove poems

    Docs: docs/tour.md
    """
    from ..training.unfinished import find_removable, remove_unfinished

    found = find_removable(name, runs_dir)
    if not yes:
        typer.confirm(f"Delete {found.folder} permanently?", abort=True, err=True)
    remove_unfinished(found)
    show_json({"removed": name}) if as_json else print_stderr(f"Removed {found.folder}.")
