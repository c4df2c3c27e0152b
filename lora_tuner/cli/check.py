"""The command `adapters check`: of what a tool supports, and of what a server uses. No torch."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from ..adapters import compatibility
from ..adapters.adapter import Adapter
from ..adapters.library import Library
from ..convert.model_check import check_export
from ..errors import ConfigError
from ..text import as_typed, one_line
from ..training.progress import display
from .display import print_stderr, print_table, print_wrapped, show_json
from .options import DEFAULT_ADAPTERS_DIR, AdapterArgument, AdaptersDirOption, JsonOption

if TYPE_CHECKING:
    from ..analysis.server_check import ServerCheck

API_KEY_VARIABLES = ("LORA_TUNER_API_KEY", "OPENAI_API_KEY")
_LABELS = {
    "base": "base",
    "half": "adapter, half the scale",
    "adapter": "adapter",
    "double": "adapter, twice the scale",
}


def check_adapter(
    adapter: AdapterArgument,
    tool: Annotated[
        compatibility.Tool | None, typer.Option("--for", help="The tool to check for.", show_default=False)
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Address of a server, with /v1: is it using this adapter?", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The adapter's name on that server.", show_default="its name here")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key of that server.", show_default=", else ".join(API_KEY_VARIABLES)),
    ] = None,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    as_json: JsonOption = False,
) -> None:
    """Check whether another tool can load an adapter (--for), or whether a server uses it (--url).

    gguf is the adapter for llama.cpp; gguf-merged and ollama are whole models. --url asks any
    server of OpenAI's API for a few next tokens. Exit status 1, with a remedy, unless it does.

    python cli.py adapters check poems --for vllm

    python cli.py adapters check poems --url http://localhost:8000/v1

    Docs: docs/other-tools.md
    """
    library = Library(adapters_dir)
    if (tool is None) == (url is None):
        raise ConfigError("Give one of --for TOOL and --url ADDRESS.")
    if tool is not None:
        if model or api_key:
            raise ConfigError("--model and --api-key belong to --url: leave them out.")
        _check_for_tool(library.get(adapter), tool, as_json=as_json)
        return
    from ..analysis.server_check import ADAPTER, check_server

    keys = [api_key, *map(os.environ.get, API_KEY_VARIABLES)]
    key = next(filter(None, keys), None)
    others = [entry for _, entry in library.entries() if isinstance(entry, Adapter)]
    checked = library.get(adapter)
    check = check_server(checked, str(url), model=model, api_key=key, others=others, notify=display)
    show_json(check.to_dict()) if as_json else _show_server_check(check)
    if check.verdict != ADAPTER:
        raise typer.Exit(1)


def _check_for_tool(checked: Adapter, tool: compatibility.Tool, *, as_json: bool) -> None:
    report = check_export(checked, tool)
    if as_json:
        fields = {"notes": report.notes, "accepted": report.accepted, "base_examined": report.base_examined}
        show_json({"tool": tool, "obstacles": report.errors, **fields})
    else:
        verdict = "compatible with" if report.accepted else "not compatible with"
        if report.accepted and tool != "peft" and not report.base_examined:
            verdict = "no obstacle found for"
        print(one_line(f"{checked.name}: {verdict} {tool}"))
        for line in [*report.errors, *report.notes]:
            print_wrapped(one_line(as_typed(line)), "- ")
    if not report.accepted:
        raise typer.Exit(1)


def _show_server_check(check: "ServerCheck") -> None:
    from ..analysis.server_check import NOISE

    print(one_line(f"{check.adapter} at {check.url}: {check.verdict}"))
    print_wrapped(one_line(check.reason), "- ")
    endpoints = {"text": check.text, "messages": check.chat}
    columns = {name: each for name, each in endpoints.items() if each}
    if not columns:
        return
    rows = [
        (f"from the {label}", *(f"{each.distances[name]:.3f}" for each in columns.values()))
        for name, label in _LABELS.items()
    ]
    rows += [
        ("base from adapter", *(f"{each.span:.3f}" for each in columns.values())),
        ("closest scale", *(f"{each.scale:g}" for each in columns.values())),
        ("probes", *(str(each.probes) for each in columns.values())),
    ]
    print_table(rows, ("distance of its answers (nats)", *columns))
    print_stderr(f"The same weights are within {NOISE:g} nats in float32, bfloat16 and 8 bits.")
