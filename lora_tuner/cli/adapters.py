"""The `adapters` commands, `push` and `pull`. None of them loads torch."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ..adapters.adapter import CARD_FILE, Adapter, verify_adapter
from ..adapters.library import Ancestor, Library, describe_entries
from ..adapters.report import TITLES, AdapterReport
from ..convert.adopt import adopt
from ..errors import AdapterError, Notice, os_error_message
from ..models.layers_in_files import known_coverage
from ..text import format_bytes, format_count, format_counts, format_created, format_duration, one_line
from ..training.progress import display
from .check import check_adapter
from .display import format_result, print_parts, print_stderr, print_table, show_fields, show_json
from .help import HelpGroup
from .options import (
    DEFAULT_ADAPTERS_DIR,
    AdapterArgument,
    AdaptersDirOption,
    BaseOption,
    JsonOption,
    LibraryArgument,
    OverwriteOption,
    RevisionOption,
    StrictCommand,
    complete_adapter_names,
)

if TYPE_CHECKING:
    from ..adapters.hub_sync import TransferResult

RepoArgument = Annotated[str, typer.Argument(help="A model repo on the Hub, owner/name.", show_default=False)]
adapters_app = typer.Typer(cls=HelpGroup, help="Manage the adapters in the library.", no_args_is_help=True)


@adapters_app.command("list", cls=StrictCommand)
def list_adapters(adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR, as_json: JsonOption = False) -> None:
    """List all adapters: base, rank, data, size, held-out gain, age, parents.

    python cli.py adapters list

    Docs: docs/tour.md
    """
    entries = list(Library(adapters_dir).entries())
    if as_json:
        show_json([_entry_dict(name, entry) for name, entry in entries])
    elif entries:
        show_adapters(entries)
    else:
        print_stderr(f"No adapters in {adapters_dir} yet: train one.")


def _entry_dict(name: str, entry: Adapter | AdapterError) -> dict[str, object]:
    return entry.to_dict() if isinstance(entry, Adapter) else {"name": name, "broken": str(entry)}


def show_adapters(entries: Iterable[tuple[str, Adapter | AdapterError]]) -> None:
    for part in describe_entries([*entries]):
        print_stderr(part) if isinstance(part, str) else print_parts([part])


@adapters_app.command("show", cls=StrictCommand)
def show_adapter(
    adapter: AdapterArgument, adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR, as_json: JsonOption = False
) -> None:
    """Show an adapter: its origin, its training and its held-out gain.

    python cli.py adapters show poems

    Docs: docs/tour.md
    """
    library = Library(adapters_dir)
    loaded = library.get(adapter)
    ancestors = library.ancestors(loaded)
    coverage = known_coverage(loaded)
    details = loaded.to_dict() | {
        "ancestors": [vars(ancestor) for ancestor in ancestors],
        "covers": coverage or None,
        "report": (report := _report_of(loaded)) and report.model_dump(),
    }
    show_json(details) if as_json else show_details(loaded, ancestors, coverage)


def show_details(adapter: Adapter, ancestors: Sequence[Ancestor], coverage: str = "") -> None:
    """Print one adapter; `--json` has all of its metadata."""
    manifest = adapter.manifest
    fields: dict[str, object] = {
        "adapter": adapter.name,
        "path": str(adapter.path),
        "card": str(adapter.path / CARD_FILE) if (adapter.path / CARD_FILE).is_file() else None,
        "rank": f"{adapter.rank}, alpha {adapter.config['lora_alpha']}",
        "targets": ", ".join(adapter.targets),
        "size": f"{format_bytes(adapter.bytes)}, {adapter.parameters:,} parameters",
        "replaces": str(adapter.replaced) or None,
        "added tokens": ", ".join(f"{token} ({number})" for token, number in adapter.added_tokens.items())
        or None,
        "covers": coverage or None,
    }
    if manifest is None:
        fields |= {
            "base": adapter.base or "unknown",
            "created": "by another tool, without a manifest (run `adapters adopt` to write one)",
        }
    else:
        fields |= {
            "gain": "\n".join(format_result(manifest.result, manifest.data.sources if manifest.data else ())),
            **(dict(manifest.preference.lines()) if manifest.preference else {}),
            **({name.lower(): text for name, text in manifest.labels.card_rows()} if manifest.labels else {}),
            "general text": manifest.general.describe_change() if manifest.general else None,
            "base": f"{manifest.base.name}: {manifest.base.weights}",
            "revision": manifest.base.revision,
            "fingerprint": manifest.base.fingerprint,
            "parent": "\n".join(format_ancestor(ancestor) for ancestor in ancestors) or None,
        }
        if manifest.data is not None:
            fields |= {
                "data": manifest.data.source,
                "where": manifest.data.where,
                "template": manifest.data.template,
                "rows": format_counts(manifest.data.counts) or None,
                "held out by": manifest.data.group_by,
                "evaluated on": manifest.data.eval_dataset,
                "its split": manifest.data.eval_split,
            }
        if run := manifest.run:
            steps = f"{format_count(run.steps, 'step')}, {format_count(run.tokens, 'token')}, {format_duration(run.seconds)}"
            changed = (
                f", resumed with other {', '.join(run.inexact)}: not exactly repeatable" if run.inexact else ""
            )
            fields["run"] = f"{run.method}, {steps} on {run.device} in {run.dtype}{changed}"
        versions = ", ".join(f"{package} {version}" for package, version in manifest.versions.items())
        age = format_created(manifest.created)
        created = manifest.created if age == "?" else f"{manifest.created} ({age})"
        fields |= {
            "command": manifest.made_by,
            "created": f"{created} with {versions}" if versions else f"by another tool, adopted {created}",
        }
    if report := _report_of(adapter):
        fields |= {TITLES[name].lower(): " ".join(part.sentences) for name, part in report.parts()}
    show_fields(fields)


def _report_of(adapter: Adapter) -> AdapterReport | None:
    """Return the report that lies beside an adapter; a damaged one is told, and left out."""
    try:
        return adapter.report
    except AdapterError as error:
        display(Notice(str(error)))
        return None


def format_ancestor(ancestor: Ancestor) -> str:
    """One line of the lineage, indented by generation."""
    location = "" if ancestor.here == ancestor.name else f", now named {ancestor.here}"
    if ancestor.here is None:
        location = ", not in this library"
    return f"{'  ' * (ancestor.generation - 1)}from {ancestor.name} ({ancestor.sha256[:12]}{location})"


@adapters_app.command("verify", cls=StrictCommand)
def verify_adapters(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapters, by name or path.", show_default="all", autocompletion=complete_adapter_names
        ),
    ] = None,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of adapters: hashes, shapes, settings, finite values; not their quality.

    python cli.py adapters verify

    Docs: docs/tour.md
    """
    library = Library(adapters_dir)
    problems = {name: _find_problems(library, name) for name in names or library.names()}
    if as_json:
        show_json([{"name": name, "problems": messages} for name, messages in problems.items()])
    else:
        for name, messages in problems.items():
            print(one_line(f"{name}: {'; '.join(messages) or 'OK'}"))
        if not problems:
            print_stderr(f"No adapters in {adapters_dir} yet: train one.")
        if not all(problems.values()):
            print_stderr(
                "OK: files are valid, values finite, hashes as in the manifest if there is one. "
                "Use `evaluate` to measure quality."
            )
    if any(problems.values()):
        raise typer.Exit(1)


def _find_problems(library: Library, name: str) -> list[str]:
    try:
        return library.inspect(name, verify_adapter)
    except AdapterError as error:
        return [str(error)]
    except OSError as error:
        return [os_error_message(error)]


@adapters_app.command("rename", cls=StrictCommand)
def rename_adapter(
    old: LibraryArgument,
    new: Annotated[str, typer.Argument(help="The new name.", show_default=False)],
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Rename an adapter, in its model card and run.yaml too.

    python cli.py adapters rename poems verse

    Docs: docs/tour.md
    """
    renamed = Library(adapters_dir).rename(old, new)
    show_json(renamed.to_dict()) if as_json else print(renamed.path)


@adapters_app.command("remove", cls=StrictCommand)
def remove_adapter(
    name: LibraryArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Delete an adapter permanently.

    python cli.py adapters remove poems

    Docs: docs/tour.md
    """
    folder = Library(adapters_dir).find_removable(name)
    if not yes:
        typer.confirm(f"Delete {folder} permanently?", abort=True, err=True)
    Library(adapters_dir).remove(name)
    show_json({"removed": name}) if as_json else print_stderr(f"Removed {folder}.")


@adapters_app.command("adopt", cls=StrictCommand)
def adopt_adapter(
    folder: Annotated[
        str, typer.Argument(help="The folder of an adapter made by another tool.", show_default=False)
    ],
    name: Annotated[str | None, typer.Option(help="Name in the library.", show_default="the folder's")] = None,
    base: BaseOption = None,
    revision: RevisionOption = None,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Add an adapter of another tool: check it against its base, and write its manifest.

    python cli.py adapters adopt downloads/poems --base HuggingFaceTB/SmolLM2-135M

    Docs: docs/other-tools.md
    """
    adopted = adopt(Library(adapters_dir), folder, name, base=base, revision=revision, notify=display)
    if coverage := known_coverage(adopted):
        print_stderr(f"The adapter covers {coverage}.")
    show_json(adopted.to_dict()) if as_json else print(adopted.path)


adapters_app.command("check", cls=StrictCommand)(check_adapter)


def push(
    adapter: AdapterArgument,
    repo: RepoArgument,
    private: Annotated[bool, typer.Option("--private", help="If the repo is created, make it private.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List the files, and check token, owner and repo, without uploading."),
    ] = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Upload an adapter with its model card to the Hugging Face Hub.

    python cli.py push poems my-name/poems --private --dry-run

    Docs: docs/other-tools.md
    """
    loaded = Library(adapters_dir).get(adapter)
    from ..adapters import hub_sync

    pushed = hub_sync.push(loaded, repo, private=private, dry_run=dry_run)
    checks = {"checks": pushed.checks} if dry_run else {}
    summary = {"repo": pushed.repo, "files": pushed.files, "url": pushed.url} | checks
    show_json(summary) if as_json else _show_transfer(pushed)
    if dry_run:
        print_stderr("Dry run: nothing was uploaded.")


def pull(
    repo: RepoArgument,
    name: Annotated[str | None, typer.Option(help="Name in the library.", show_default="the repo's")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files without downloading them.")] = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Download an adapter from the Hugging Face Hub into the library.

    python cli.py pull my-name/poems

    Docs: docs/other-tools.md
    """
    from ..adapters import hub_sync

    pulled = hub_sync.pull(
        repo, Library(adapters_dir), name, revision=revision, overwrite=overwrite, dry_run=dry_run, notify=display
    )
    metadata = pulled.adapter.to_dict() if pulled.adapter else {}
    show_json({"repo": pulled.repo, "files": pulled.files} | metadata) if as_json else _show_transfer(pulled)
    if dry_run:
        print_stderr("Dry run: nothing was downloaded.")


def _show_transfer(transfer: "TransferResult") -> None:
    total = [("in all", format_bytes(sum(transfer.files.values())))]
    print_table([(name, format_bytes(size)) for name, size in transfer.files.items()] + total)
    show_fields(transfer.checks)
    if transfer.url:
        print(transfer.url)
    if transfer.adapter:
        print(transfer.adapter.path)
