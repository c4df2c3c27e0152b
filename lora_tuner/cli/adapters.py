"""The commands of `adapters`: what is in the library. None of them loads torch."""

from typing import Annotated

import typer

from ..adapters import compatibility
from ..adapters.adapter import Adapter, verify_adapter
from ..adapters.library import Library
from ..convert.adopt import adopt
from ..errors import AdapterError, os_error_message
from ..text import one_line
from .display import print_stderr, show_adapter_card, show_adapters, show_compatibility, show_json
from .options import (
    DEFAULT_ADAPTERS_DIR,
    AdapterArgument,
    AdaptersDirOption,
    BaseOption,
    JsonOption,
    LibraryArgument,
    RevisionOption,
    StrictCommand,
    complete_adapter_names,
    display,
)

adapters_app = typer.Typer(help="The adapters in the library.", no_args_is_help=True)


@adapters_app.command("list", cls=StrictCommand)
def list_adapters(adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR, as_json: JsonOption = False) -> None:
    """All adapters: base, rank, targets, data, size, held-out gain, age, parent."""
    found = list(Library(adapters_dir).entries())
    if as_json:
        show_json(
            [{"name": name} | (it.to_dict() if isinstance(it, Adapter) else {"broken": str(it)}) for name, it in found]
        )
    elif found:
        show_adapters(found)
    else:
        print_stderr(f"No adapters in {adapters_dir} yet: train one.")


@adapters_app.command("show", cls=StrictCommand)
def show_adapter(
    adapter: AdapterArgument, adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR, as_json: JsonOption = False
) -> None:
    """One adapter: what it was made from, and what it gives."""
    library = Library(adapters_dir)
    found = library.get(adapter)
    ancestors = library.ancestors(found)
    if as_json:
        show_json(found.to_dict() | {"ancestors": [vars(ancestor) for ancestor in ancestors]})
    else:
        show_adapter_card(found, ancestors)


@adapters_app.command("verify", cls=StrictCommand)
def verify_adapters(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapters, by name or path; all when none is named.", autocompletion=complete_adapter_names
        ),
    ] = None,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Read every byte: hashes, shapes, settings, finite numbers. Proves that it is whole, not that it is good."""
    library = Library(adapters_dir)
    found = {name: _weight_problems(library, name) for name in names or library.names()}
    if as_json:
        show_json([{"name": name, "problems": problems} for name, problems in found.items()])
    else:
        for name, problems in found.items():
            print(one_line(f"{name}: {'; '.join(problems) or 'whole'}"))
        if not all(found.values()):
            print_stderr(
                "Whole: well-formed, finite and, where there is a manifest, the weights and settings it was written for. How "
                "good it is, only `evaluate` can say."
            )
        if not found:
            print_stderr(f"No adapters in {adapters_dir} yet: train one.")
    if any(found.values()):
        raise typer.Exit(1)


def _weight_problems(library: Library, name: str) -> list[str]:
    try:
        return library.inspect(name, verify_adapter)
    except AdapterError as error:
        return [str(error)]
    except OSError as error:
        return [os_error_message(error)]


@adapters_app.command("rename", cls=StrictCommand)
def rename_adapter(
    old: LibraryArgument,
    new: Annotated[str, typer.Argument(help="Its new name.", show_default=False)],
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Give an adapter another name. Its card and run.yaml keep the old one."""
    renamed = Library(adapters_dir).rename(old, new)
    show_json(renamed.to_dict()) if as_json else print(renamed.path)


@adapters_app.command("remove", cls=StrictCommand)
def remove_adapter(
    name: LibraryArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Delete an adapter for good."""
    if not yes:
        typer.confirm(f"Delete {adapters_dir / name} for good?", abort=True, err=True)
    Library(adapters_dir).remove(name)
    if as_json:
        show_json({"removed": name})


@adapters_app.command("adopt", cls=StrictCommand)
def adopt_adapter(
    folder: Annotated[str, typer.Argument(help="The folder of an adapter that another tool made.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Its name here.", show_default="the folder's")] = None,
    base: BaseOption = None,
    revision: RevisionOption = None,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Take in an adapter of another tool: check it against its base, and give it a manifest that holds it to that."""
    adopted = adopt(Library(adapters_dir), folder, name, base=base, revision=revision, notify=display)
    show_json(adopted.to_dict()) if as_json else print(adopted.path)


@adapters_app.command("check", cls=StrictCommand)
def check_adapter(
    adapter: AdapterArgument,
    tool: Annotated[compatibility.Tool, typer.Option("--for", help="The tool that is to take it.", show_default=False)],
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Will another tool take it? Judged by its settings and sizes; with what to change where not, and exit status 1."""
    checked = Library(adapters_dir).get(adapter)
    report = compatibility.check_compatibility(checked, tool)
    if as_json:
        result = {"tool": tool, "obstacles": report.errors, "notes": report.notes, "accepted": report.accepted}
        show_json(result)
    else:
        show_compatibility(checked.name, report)
    if not report.accepted:
        raise typer.Exit(1)
