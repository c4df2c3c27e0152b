"""Options that commands share. Those that set something are made from the fields of config.py, so that a default, a bound or
a help text has one home."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from typer.core import TyperCommand

from ..adapters.library import Library
from ..config import INVALID_TEXT, SWEEPABLE, InferenceDtype, LoadIn, ModelOptions, TrainConfig, resolve_settings
from ..errors import ConfigError, LoraTunerError
from .display import Display

display = Display()


def complete_adapter_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """For the shell: the names of adapters that begin so."""
    with contextlib.suppress(LoraTunerError, OSError):  # where there are none, there is nothing to offer
        names = Library(ctx.params.get("adapters_dir") or DEFAULT_ADAPTERS_DIR).names()
        return [name for name in names if name.startswith(incomplete)]
    return []


AdapterArgument = Annotated[
    str, typer.Argument(help="An adapter, by name or path.", show_default=False, autocompletion=complete_adapter_names)
]
LibraryArgument = Annotated[
    str,
    typer.Argument(
        help="An adapter of the library, by name.", show_default=False, autocompletion=complete_adapter_names
    ),
]
AdapterArguments = Annotated[
    list[str],
    typer.Argument(help="Adapters, by name or path.", show_default=False, autocompletion=complete_adapter_names),
]
AdaptersDirOption = Annotated[Path, typer.Option(help="Where adapters are kept.", file_okay=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer with JSON on stdout.")]
BaseOption = Annotated[
    str | None, typer.Option(help="Another base than the one that the adapter names.", show_default=False)
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the base on the Hub.", show_default=False)
]
ForceOption = Annotated[bool, typer.Option("--force", help="Put an adapter on a base that it was not trained on.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[
    InferenceDtype,
    typer.Option(help="Numbers of the base. auto: bfloat16 on CUDA, else float32; int8: least to read, on a CPU."),
]
LoadInOption = Annotated[
    LoadIn, typer.Option(help="Weights of the base in 8 or 4 bits (bitsandbytes); auto: where they do not fit in full.")
]
DEFAULT_ADAPTERS_DIR = TrainConfig().adapters_dir


class StrictCommand(TyperCommand):
    """A command that ignores nothing. An option given twice would lose its first value; an empty one, of a variable that the
    shell does not know, would mean this folder or no adapter. A prompt alone may be empty."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in () if "help" in given else order:
            param: Any = parameter
            value = given.get(param.name)
            values = value if isinstance(value, list | tuple) else [value]
            if order.count(param) > 1 and value is not values:
                raise typer.BadParameter("it is given twice", ctx, param)
            if any(isinstance(text, str) and INVALID_TEXT.search(text) for text in values):
                raise typer.BadParameter("it is no text in UTF-8", ctx, param)
            if "" in values and param.name != "prompt":
                raise typer.BadParameter("it is empty: give a value, or leave it out", ctx, param)
        rest: list[str] = super().parse_args(ctx, args)
        return rest


def settings_options(kind: type[BaseModel], *only: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of `kind`, or for some; it receives those that were set, as `given`."""
    fields = {name: field for name, field in kind.model_fields.items() if name in only or not only}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = [p for p in inspect.signature(command).parameters.values() if p.name != "given"]
        parameters += [_option(name, field) for name, field in fields.items()]

        @functools.wraps(command)
        def wrapper(**options: Any) -> None:
            given = {name: options.pop(name) for name in fields}
            command(given={name: value for name, value in given.items() if value not in (None, [])}, **options)

        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def _option(name: str, field: Any) -> inspect.Parameter:
    """A field as an option that is None until it is given, so that a YAML file can come in between."""
    default = field.json_schema_extra["shown"] if field.default in (None, []) else field.default
    if isinstance(default, bool):
        default = "on" if default else "off"
    flag = field.json_schema_extra["flag"]
    number = (float if name == "learning_rate" else int) if name in SWEEPABLE else None
    option = typer.Option(
        *([flag] if flag else []),
        help=field.description,
        show_default=False if default is None else str(default),
        rich_help_panel=field.json_schema_extra["panel"],
        file_okay=False,  # of those that are paths, all are folders
        autocompletion=complete_adapter_names if name == "parent" else None,
        parser=functools.partial(_parse_sweep_values, number) if number else None,
        metavar=f"{number.__name__.upper()}[,...]" if number else None,
    )
    annotation: Any = Annotated[str | None, option] if number else Annotated[field.annotation | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parse_sweep_values(number: type[int] | type[float], text: str) -> Any:
    """A number, or a list of those that stand with commas between them."""
    try:
        values = [number(part) for part in text.split(",")]
    except ValueError as error:
        kind = "a whole number" if number is int else "a number"
        raise typer.BadParameter(f"{text!r} is not {kind}, nor several with commas between them") from error
    if len(set(values)) < len(values):
        raise typer.BadParameter(f"{text!r} has a number twice")
    return values if len(values) > 1 else values[0]


def _model_arguments(
    base: BaseOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    load_in: LoadInOption = "auto",
    force: ForceOption = False,
) -> None:
    """The options of a command that puts adapters on a base."""


def model_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `_model_arguments`, or those named; it receives them as `options`."""
    parameters = inspect.signature(_model_arguments).parameters
    added = [parameters[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in names or parameters]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "options"]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            chosen = {p.name: values.pop(p.name) for p in added}
            command(options=ModelOptions(**chosen, notify=display), **values)

        wrapper.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        return wrapper

    return decorate


EVAL_SET_FIELDS = (
    "eval_dataset",
    "eval_split",
    "text_column",
    "where",
    "txt_rows",
    "keep_lines",
)  # what `rows_given` reads


def eval_sets_from(given: dict[str, Any], eval_rows: int | None) -> Any:
    """The held-out rows that the user names with --eval-dataset, as sets to measure on; None where they name none."""
    if not given:
        return None
    if "eval_dataset" not in given:
        raise ConfigError(f"{', '.join(given)}: only --eval-dataset is read with that.")
    settings = resolve_settings(TrainConfig, given | ({"eval_rows": eval_rows} if eval_rows else {}))
    from .. import evaluation

    return [evaluation.load_eval_set(settings, display)]
