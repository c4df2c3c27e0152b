"""The command `report`: what an adapter has learned."""

import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import atomic_io
from ..adapters.adapter import Adapter
from ..adapters.library import Library
from ..adapters.report import TITLES
from ..config import ModelOptions
from ..errors import ConfigError, Interrupted
from ..text import PROGRAM, as_typed, format_duration, one_line
from .data import check_page
from .display import print_table, print_wrapped, show_json
from .options import (
    DEFAULT_ADAPTERS_DIR,
    AdapterArgument,
    AdaptersDirOption,
    JsonOption,
    OverwriteOption,
    eval_sets_from,
    model_options,
)

if TYPE_CHECKING:
    from ..analysis.report import Report
    from ..data.eval_sets import EvalSet

GUARD_ROWS = 100  # of each --guard that are measured


@model_options()
def report(
    adapter: AdapterArgument,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar=f"[{'|'.join(TITLES)}]", help="Leave out a part. May be repeated.", show_default="none"
        ),
    ] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Measure forgetting on this dataset too, on its first {GUARD_ROWS} rows in hash order. May be repeated.",
            show_default="none",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write the page to this file.",
            show_default="NAME.report.html in this folder; none with --json",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    *,
    options: ModelOptions,
) -> None:
    """Report on what an adapter has learned: style, memorization, forgetting, and what more data would bring.

    python cli.py report poems

    Docs: docs/measuring.md
    """
    if unknown := [name for name in skip or [] if name not in TITLES]:
        raise ConfigError(f"--skip {unknown[0]}: choose from {', '.join(TITLES)}.")
    loaded = Library(adapters_dir).get(adapter)
    page = html or (None if as_json else Path(f"{loaded.name}.report.html"))
    from ..analysis import report_page

    if page is not None:
        check_page(page, overwrite, report_page.is_report_page)
    guards = [
        rows
        for name in guard or []
        for rows in eval_sets_from({"eval_dataset": name}, GUARD_ROWS, [loaded]) or []
    ]
    chosen: list[tuple[str, object]] = [("skip", name) for name in skip or []]
    chosen += [("guard", name) for name in guard or []] + ([("html", html)] if html else [])
    made = measure(loaded, adapters_dir, options, chosen, skip=skip or [], guards=guards)
    if page is not None:
        atomic_io.atomic_write_text(page, report_page.render_page(made))
    if as_json:
        show_json(made.to_dict() | ({"page": str(page)} if page else {}))
        return
    show_report(made)
    if page is not None:
        print(f"\npage: {page}")


def measure(
    adapter: Adapter,
    adapters_dir: Path,
    options: ModelOptions,
    chosen: Sequence[tuple[str, object]] = (),
    *,
    skip: Sequence[str] = (),
    guards: "Sequence[EvalSet]" = (),
) -> "Report":
    """Make a report and keep its figures with the adapter.

    Args:
        chosen: names and values of the options of the command, for the one that goes on after Ctrl-C.
    """
    from ..analysis.report import keep_report, make_report

    try:
        made = make_report(adapter, options, skip=skip, guards=guards)
    except KeyboardInterrupt as error:
        command = _command(adapter, adapters_dir, options, chosen)
        raise Interrupted(f"Stopped. What is finished is kept; go on with: {command}") from error
    keep_report(adapter, made, options.notify)
    return made


def _command(
    adapter: Adapter,
    adapters_dir: Path,
    options: ModelOptions,
    chosen: Sequence[tuple[str, object]],
) -> str:
    """Return the command that makes a report."""
    is_in_library = adapter.path == adapters_dir / adapter.name
    given = [*chosen]
    if is_in_library and adapters_dir != DEFAULT_ADAPTERS_DIR:
        given.append(("adapters_dir", adapters_dir))
    for option in fields(ModelOptions):
        value = getattr(options, option.name)
        if value != option.default and option.name != "notify":
            given.append((option.name, value))
    words = ["report", adapter.name if is_in_library else str(adapter.path)]
    for name, value in given:
        words += [f"--{name.replace('_', '-')}"] + ([str(value)] if value is not True else [])
    return as_typed(f"{PROGRAM} {shlex.join(words)}")


def show_report(report: "Report") -> None:
    """Print each part: sentences, tables, and excerpts of rows."""
    from ..analysis.report import sections

    print_wrapped(one_line(f"{report.adapter} on {report.base}, measured in {format_duration(report.seconds)}"))
    for section in sections(report):
        print(f"\n{section.title}")
        for text in [*section.sentences, *section.notes]:
            print_wrapped(one_line(text))
        if section.missing:
            print_wrapped(one_line(f"not measured: {section.missing}"))
        for heading, rows in section.tables.items():
            print(f"\n{heading}")
            print_table(rows[1:], rows[0])
        for heading, texts in section.texts.items():
            print(f"\n{heading}")
            for place, named in texts:
                print_wrapped(one_line(place), "  ")
                for name, text in named.items():
                    print_wrapped(one_line(text), f"    {name}: " if name else "    ")
