"""The commands of `adapters`: what is in the library. None of them loads torch."""

from typing import Annotated

import typer

from . import portable, store
from .errors import AdapterError, reason
from .library import Library
from .options import LIBRARY, AdapterArgument, AdaptersDir, AsJson, Base, OwnArgument, Revision, Strict, known, show
from .terminal import one_line, say, show_adapter_card, show_adapters, show_json, show_verdict

adapters_app = typer.Typer(help="The adapters in the library.", no_args_is_help=True)


@adapters_app.command("list", cls=Strict)
def list_adapters(adapters_dir: AdaptersDir = LIBRARY, as_json: AsJson = False) -> None:
    """All adapters: base, rank, targets, data, size, held-out gain, age, parent."""
    found = list(Library(adapters_dir).entries())
    if as_json:
        show_json(
            [
                {"name": name} | (it.facts() if isinstance(it, store.Adapter) else {"broken": str(it)})
                for name, it in found
            ]
        )
    elif found:
        show_adapters(found)
    else:
        say(f"No adapters in {adapters_dir} yet: train one.")


@adapters_app.command("show", cls=Strict)
def show_adapter(adapter: AdapterArgument, adapters_dir: AdaptersDir = LIBRARY, as_json: AsJson = False) -> None:
    """One adapter: what it was made from, and what it gives."""
    library = Library(adapters_dir)
    found = library.get(adapter)
    ancestors = library.ancestors(found)
    show_json(found.facts() | {"ancestors": ancestors}) if as_json else show_adapter_card(found, ancestors)


@adapters_app.command("verify", cls=Strict)
def verify_adapters(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Adapters, by name or path; all when none is named.", autocompletion=known),
    ] = None,
    adapters_dir: AdaptersDir = LIBRARY,
    as_json: AsJson = False,
) -> None:
    """Read every byte: hashes, shapes, settings, finite numbers. Proves that it is whole, not that it is good."""
    library = Library(adapters_dir)
    found = {name: _problems(library, name) for name in names or library.names()}
    if as_json:
        show_json([{"name": name, "problems": problems} for name, problems in found.items()])
    else:
        for name, problems in found.items():
            print(one_line(f"{name}: {'; '.join(problems) or 'whole'}"))
        if not all(found.values()):
            say(
                "Whole: well-formed, finite and, where there is a manifest, the weights and settings it was written for. How "
                "good it is, only `evaluate` can say."
            )
        if not found:
            say(f"No adapters in {adapters_dir} yet: train one.")
    if any(found.values()):
        raise typer.Exit(1)


def _problems(library: Library, name: str) -> list[str]:
    try:
        return library.look(name, store.verify)
    except AdapterError as error:
        return [str(error)]
    except OSError as error:
        return [reason(error)]


@adapters_app.command("rename", cls=Strict)
def rename_adapter(
    old: OwnArgument,
    new: Annotated[str, typer.Argument(help="Its new name.", show_default=False)],
    adapters_dir: AdaptersDir = LIBRARY,
    as_json: AsJson = False,
) -> None:
    """Give an adapter another name. Its card and run.yaml keep the old one."""
    renamed = Library(adapters_dir).rename(old, new)
    show_json(renamed.facts()) if as_json else print(renamed.path)


@adapters_app.command("remove", cls=Strict)
def remove_adapter(
    name: OwnArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    adapters_dir: AdaptersDir = LIBRARY,
    as_json: AsJson = False,
) -> None:
    """Delete an adapter for good."""
    if not yes:
        typer.confirm(f"Delete {adapters_dir / name} for good?", abort=True, err=True)
    Library(adapters_dir).remove(name)
    if as_json:
        show_json({"removed": name})


@adapters_app.command("adopt", cls=Strict)
def adopt_adapter(
    folder: Annotated[str, typer.Argument(help="The folder of an adapter that another tool made.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Its name here.", show_default="the folder's")] = None,
    base: Base = None,
    revision: Revision = None,
    adapters_dir: AdaptersDir = LIBRARY,
    as_json: AsJson = False,
) -> None:
    """Take in an adapter of another tool: check it against its base, and give it a manifest that holds it to that."""
    adopted = Library(adapters_dir).adopt(folder, name, base=base, revision=revision, notify=show)
    show_json(adopted.facts()) if as_json else print(adopted.path)


@adapters_app.command("check", cls=Strict)
def check_adapter(
    adapter: AdapterArgument,
    tool: Annotated[portable.Tool, typer.Option("--for", help="The tool that is to take it.", show_default=False)],
    adapters_dir: AdaptersDir = LIBRARY,
    as_json: AsJson = False,
) -> None:
    """Will another tool take it? Judged by its settings and sizes; with what to change where not, and exit status 1."""
    found = Library(adapters_dir).get(adapter)
    verdict = portable.check(found, tool)
    show_json(vars(verdict) | {"accepted": verdict.accepted}) if as_json else show_verdict(found.name, verdict)
    if not verdict.accepted:
        raise typer.Exit(1)
