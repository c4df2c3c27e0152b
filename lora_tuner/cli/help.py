"""Help of commands: an example first, options in sections, types in words. For a terminal of any width."""

import inspect
import textwrap
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from ..text import PROGRAM, SCRIPT
from .display import color_system

_MOST_USED = {"train": ("dataset", "name", "minutes", "base", "preview")}  # they come first
MAX_WIDTH = 120  # longer lines are hard to read
_Parameter = TyperOption | TyperArgument
_COLUMN = 26  # where help texts begin; after a longer option they begin on the next line
_TYPES = {
    "int": "<number>",
    "int range": "<number>",
    "float": "<number>",
    "float range": "<number>",
    "path": "<file>",
    "file": "<file>",
    "dir": "<folder>",
    "str": "<text>",
}
# Words for options whose type says less than their name.
_WORDS = {
    "base": "<model>",
    "dataset": "<data>",
    "eval_dataset": "<data>",
    "host": "<address>",
    "allow_origin": "<address>",
    "max_shard_size": "<size>",
    "out": "<path>",
    "parent_sha256": "<hash>",
    "where": "<column>=<value>",
}
_NAMES = {
    "adapter",
    "answer_column",
    "device",
    "encoding",
    "eval_split",
    "group_by",
    "name",
    "parent",
    "report_to",
    "resume",
    "revision",
    "split",
    "subset",
    "table",
    "target_modules",
    "text_column",
}


class HelpMixin:
    """Formats the help of a command or a group.

    In a docstring lines that begin with `python cli.py` are examples, a line `Docs: docs/tour.md`
    names documents, and all else says what the command does; its first paragraph is the summary.
    """

    name: str | None
    help: str | None
    commands: dict[str, Any]

    def get_short_help_str(self, limit: int = 45) -> str:
        """First paragraph of the help, whole."""
        return help_parts(self)[0][0]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        texts, examples, _ = help_parts(self)
        program = SCRIPT if ctx.find_root().info_name == SCRIPT else PROGRAM
        for text in texts:
            formatter.write("\n" + _wrap(text, formatter.width, "  "))
        if examples:
            _write_heading(formatter, "Example" if len(examples) == 1 else "Examples")
            for example in examples:
                formatter.write(f"  {example.replace(PROGRAM, program, 1)}\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for command in getattr(self, "commands", {}).values():
            panel = panels.setdefault(getattr(command, "rich_help_panel", None) or "Commands", [])
            panel.append((command.name, command.get_short_help_str()))
        for title, params in sections(self, ctx).items():
            panels[title] = [(option_usage(param, ctx), describe(param)) for param in params]
        for title, rows in panels.items():
            _write_heading(formatter, title)
            _write_rows(formatter, rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if documents := help_parts(self)[2]:
            formatter.write("\n" + _wrap(documents, formatter.width))


class HelpGroup(HelpMixin, TyperGroup):  # type: ignore[misc]
    """A group of commands with this help."""


class HelpCommand(HelpMixin, TyperCommand):
    """A command with this help."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [param for param in self.get_params(ctx) if isinstance(param, TyperArgument)]
        return ["[OPTIONS]", *map(argument_usage, arguments)]


def help_parts(command: HelpMixin) -> tuple[list[str], list[str], str]:
    """Return what a command does, in paragraphs; its examples; and the line that names documents."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    examples = [line for text in paragraphs for line in text.splitlines() if line.startswith(PROGRAM)]
    documents = [text for text in paragraphs if text.startswith("Docs: ")]
    texts = [" ".join(text.split()) for text in paragraphs if not text.startswith((PROGRAM, "Docs: "))]
    return texts, examples, "".join(documents)


def sections(command: Any, ctx: typer.Context) -> dict[str, list[_Parameter]]:
    """Return arguments and options by their heading, in the order in which help shows them."""
    params = {param.name: param for param in command.get_params(ctx)}
    most_used = [params.pop(name) for name in _MOST_USED.get(command.name, ())]
    found: dict[str, list[_Parameter]] = {"Arguments": [], "Most used": most_used}
    for param in params.values():
        is_argument = param.param_type_name == "argument"
        found.setdefault("Arguments" if is_argument else param.rich_help_panel or "Options", []).append(param)
    return {title: params for title, params in found.items() if params}


def argument_usage(param: _Parameter) -> str:
    """Return an argument as in the usage line, such as `ADAPTER` or `[PROMPT]`."""
    name = _argument_name(param)
    return name if param.required else f"[{name}]"


def _argument_name(param: _Parameter) -> str:
    return str(param.metavar or param.name.upper() + "..." * (param.nargs != 1))


def option_usage(param: _Parameter, ctx: typer.Context) -> str:
    """Return an argument, or the names of an option and the kind of its value."""
    if isinstance(param, TyperArgument):
        return _argument_name(param)
    names = ", ".join(sorted(param.opts, key=len))
    if param.secondary_opts:
        names += f", {param.secondary_opts[0]}"
    return names if param.is_flag else f"{names} {_value_word(param, ctx)}"


def _value_word(param: _Parameter, ctx: typer.Context) -> str:
    if param.metavar is not None:
        return str(param.metavar)
    if param.name in _WORDS:
        return _WORDS[param.name]
    kind = param.display_type(ctx).removeprefix("<").removesuffix(">")
    kind = kind.removeprefix("list[").removesuffix("]")
    return "<name>" if kind == "str" and param.name in _NAMES else _TYPES.get(kind, kind)


def default_text(param: _Parameter) -> str:
    """Return the default of an option in words; empty without one, and for a flag that is off."""
    if isinstance(param.show_default, str):
        return str(param.show_default)
    return str(param.default) if param.show_default and param.default not in (None, False) else ""


def describe(param: _Parameter) -> str:
    """Return the help of an argument or option, with its default."""
    default = default_text(param)
    text = (param.help or "") + (f" [default: {default}]" if default else "")
    return f"{text} [required]" if param.required and param.param_type_name == "option" else text


def _write_heading(formatter: Any, title: str) -> None:
    formatter.write(f"\n{_style(title, bold=True)}\n")


def _write_rows(formatter: Any, rows: Iterable[tuple[str, str]]) -> None:
    for name, text in rows:
        formatter.write(f"  {_style(name, fg='cyan')}")
        body = _wrap(text, formatter.width, " " * _COLUMN)
        fits = len(name) + 4 <= _COLUMN
        formatter.write(body[len(name) + 2 :] if fits and body else "\n" + body)


def _style(text: str, **styles: Any) -> str:
    return typer.style(text, **styles) if color_system() else text


def _wrap(text: str, width: int, indent: str = "") -> str:
    """Return lines of at most `width` characters that end in line breaks; words stay whole."""
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return "".join(f"{line}\n" for line in lines)
