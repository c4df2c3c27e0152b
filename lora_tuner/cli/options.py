"""Options that commands share. Options for settings are made from the fields of config.py: default,
bounds and help."""

import contextlib
import functools
import inspect
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..adapters.adapter import RUN_FILE, Adapter
from ..adapters.library import Library
from ..atomic_io import is_too_long
from ..config import (
    COMMA_SEPARATED,
    DEFAULT_BASE,
    DELIMITER_NAMES,
    FILE_SETTINGS,
    INVALID_TEXT,
    MAX_THREADS,
    PROBE,
    SWEEPABLE,
    InferenceDtype,
    LoadIn,
    ModelOptions,
    TrainConfig,
)
from ..errors import ConfigError, DataError, LoraTunerError, Notice, Progress
from ..settings_files import read_settings, resolve_settings
from ..text import format_names
from ..training.progress import display
from .completion import complete_bases, complete_data
from .help import HelpCommand

if TYPE_CHECKING:
    from ..data.eval_sets import EvalSet

Command = Callable[..., None]
Overrides = dict[str, Any]  # settings that were set on the command line
DEFAULT_ADAPTERS_DIR = TrainConfig().adapters_dir
EVAL_SET_FIELDS = (
    "eval_dataset",
    "eval_split",
    "text_column",
    "format",
    "template",
    "answer_column",
    "objective",
    "label_column",
    "labels",
    "label_names",
    "where",
    "group_by",
    "table",
    "delimiter",
    "encoding",
    "txt_rows",
    "clean",
)
DEFAULT_PREVIEWS = "3"
SEVERAL_VALUES = " Several values, separated by commas: one run each."
_IN_MANIFEST = ("text_column", "template", "answer_column")
# Of the columns of a dataset.
_LAYOUT_SETTINGS = (*_IN_MANIFEST, "format", "objective", "label_column", "labels", "label_names")


def _help(setting: str) -> str | None:
    return TrainConfig.model_fields[setting].description


def check_folder(value: object) -> object:
    """Refuse a path that is too long. To pathlib it does not exist, from Python 3.14 on."""
    if isinstance(value, Path) and is_too_long(value):
        raise typer.BadParameter("it is too long for a path")
    return value


def complete_adapter_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Shell completion: names of adapters with this prefix."""
    with contextlib.suppress(LoraTunerError, OSError):  # nothing to offer without a library
        names = Library(ctx.params.get("adapters_dir") or DEFAULT_ADAPTERS_DIR).names()
        return [name for name in names if name.startswith(incomplete)]
    return []


_COMPLETIONS: dict[str, Callable[..., list[str]]] = {
    "parent": complete_adapter_names,
    "base": complete_bases,
    "dataset": complete_data,
    "eval_dataset": complete_data,
}
AdapterArgument = Annotated[
    str,
    typer.Argument(help="Adapter, by name or path.", show_default=False, autocompletion=complete_adapter_names),
]
LibraryArgument = Annotated[
    str,
    typer.Argument(
        help="Adapter in the library, by name.", show_default=False, autocompletion=complete_adapter_names
    ),
]
AdapterArguments = Annotated[
    list[str],
    typer.Argument(help="Adapters, by name or path.", show_default=False, autocompletion=complete_adapter_names),
]
AdaptersDirOption = Annotated[
    Path, typer.Option(help=_help("adapters_dir"), file_okay=False, callback=check_folder)
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
BaseOption = Annotated[
    str | None,
    typer.Option(
        help=_help("base"),
        show_default=f"the adapter's, else {DEFAULT_BASE}",
        autocompletion=complete_bases,
    ),
]
RevisionOption = Annotated[str | None, typer.Option(help=_help("revision"), show_default=False)]

ThreadsOption = Annotated[
    int | None,
    typer.Option(help=_help("threads"), min=1, max=MAX_THREADS, show_default="OMP_NUM_THREADS, else the cores"),
]


class StrictCommand(HelpCommand):
    """A command that rejects repeated options, which would lose a value, and empty values except
    for a prompt."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if any(parameter.name == "preview" for parameter in self.params):
            args = _with_preview_count(args)
        try:
            parsed, extra, order = self.make_parser(ctx).parse_args(args=list(args))
        except Exception as error:  # the class NoSuchOption is one of Typer's own copy of Click
            self._name_argument(ctx, getattr(error, "option_name", ""), error)
            raise
        if extra and "help" not in parsed:
            self._refuse_extra(ctx, extra)
        for option in () if "help" in parsed else order:
            parameter: Any = option
            value = parsed.get(parameter.name)
            values = value if isinstance(value, list | tuple) else [value]
            if order.count(parameter) > 1 and value is not values:
                raise typer.BadParameter("it is given twice", ctx, parameter)
            if any(isinstance(text, str) and INVALID_TEXT.search(text) for text in values):
                raise typer.BadParameter("it is not valid UTF-8 text", ctx, parameter)
            if "" in values and parameter.name != "prompt":
                raise typer.BadParameter("it is empty: give a value, or leave it out", ctx, parameter)
        return super().parse_args(ctx, args)

    def _refuse_extra(self, ctx: typer.Context, extra: list[str]) -> None:
        """Say how to give a prompt of several words, or data, which `data` takes without an option."""
        kinds = {parameter.name: parameter.param_type_name for parameter in self.params}
        if "prompt" in kinds:
            ctx.fail(f"Unexpected argument {shlex.join(extra)}: put a prompt of several words in quotes.")
        if kinds.get("dataset") == "option":
            ctx.fail(f"Unexpected argument {shlex.join(extra)}: give data with --dataset.")

    def _name_argument(self, ctx: typer.Context, option: str, error: Any) -> None:
        """Let the error of an unknown option say that its value is given without it, as `evaluate NAME`."""
        for parameter in self.params:
            name = str(parameter.name)
            if parameter.param_type_name == "argument" and option.strip("-") in (name, name.rstrip("s")):
                usage = f"{ctx.command_path} {name.upper()}"
                error.message = f"No such option: {option}. Give {name} without it: {usage}"
                error.possibilities = []


def _with_preview_count(args: list[str]) -> list[str]:
    """Return arguments in which `--preview` has a value; Typer 0.29 has no option with an optional one."""
    for index, argument in enumerate(args):
        if argument == "--preview" and (index + 1 == len(args) or args[index + 1].startswith("-")):
            return [*args[: index + 1], DEFAULT_PREVIEWS, *args[index + 1 :]]
    return args


def is_given(ctx: typer.Context, option: str) -> bool:
    """Return whether an option is on the command line, be it with its default value."""
    source = ctx.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def settings_options(kind: type[BaseModel], *names: str) -> Callable[[Command], Command]:
    """Give a command an option for each field of a settings class that has a panel, or for some; it
    receives those set as `overrides`."""

    def collect_overrides(values: dict[str, Any]) -> Overrides:
        given = {name: value for name, value in values.items() if value not in (None, [])}
        return given | {name: ",".join(given[name]) for name in COMMA_SEPARATED if name in given}

    fields = [(name, field) for name, field in kind.model_fields.items() if field.json_schema_extra]
    added = [_option(name, field, sweeps=not names) for name, field in fields if name in names or not names]
    return _replace_parameter("overrides", added, collect_overrides)


def _replace_parameter(
    replaced: str, added: Sequence[inspect.Parameter], collect: Callable[[dict[str, Any]], object]
) -> Callable[[Command], Command]:
    """Replace a parameter of a command by options, for Typer to read. The command receives what
    `collect` makes of their values."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            chosen = {parameter.name: values.pop(parameter.name) for parameter in added}
            command(**{replaced: collect(chosen)}, **values)

        kept = [p for p in inspect.signature(command).parameters.values() if p.name != replaced]
        call.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in [*kept, *added]}
        return call

    return decorate


def _option(name: str, field: FieldInfo, *, sweeps: bool) -> inspect.Parameter:
    """A field as an option. It defaults to None, so that a config file can set it.

    Args:
        sweeps: the command takes several values of the settings of a sweep.
    """
    extra: Any = field.json_schema_extra
    default = extra["shown"] if field.default in (None, []) else field.default
    if isinstance(default, bool):
        default = "on" if default else "off"
    number = None
    if name in SWEEPABLE and sweeps:
        number = float if name in ("learning_rate", "epochs", "beta") else int
    option = typer.Option(
        *([extra["flag"]] if extra["flag"] else []),
        help=field.description if sweeps else str(field.description).replace(SEVERAL_VALUES, ""),
        show_default=False if default is None else str(default),
        rich_help_panel=extra["panel"],
        file_okay=False,  # all path settings are folders
        callback=check_folder,
        autocompletion=_COMPLETIONS.get(name),
        parser=functools.partial(_parse_sweep_values, number, name == "learning_rate") if number else None,
        metavar=f"<number>[,...]{f'|{PROBE}' * (name == 'learning_rate')}" if number else None,
    )
    value_type: Any = str if number else field.annotation
    if value_type == str | list[str]:
        value_type = list[str]
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[value_type | None, option],
    )


def _parse_sweep_values(number: type[int] | type[float], is_rate: bool, text: str) -> str | float | list[float]:
    """Parse a number, or a list separated by commas; of learning rates also `probe`."""
    if is_rate and text == PROBE:
        return text
    if is_rate and PROBE in text.split(","):
        raise typer.BadParameter(f"{PROBE} chooses one rate: give it alone, or numbers")
    try:
        values = [number(part) for part in text.split(",")]
    except ValueError as error:
        kind, others = "a whole number" if number is int else "a number", f", or {PROBE}" if is_rate else ""
        raise typer.BadParameter(f"{text!r} is not {kind} or a list separated by commas{others}") from error
    if len(set(values)) < len(values):
        raise typer.BadParameter(f"{text!r} has a number twice")
    return values if len(values) > 1 else values[0]


def _model_arguments(
    base: BaseOption = None,
    revision: RevisionOption = None,
    device: Annotated[str, typer.Option(help=_help("device"))] = "auto",
    dtype: Annotated[
        InferenceDtype,
        typer.Option(
            help="Precision of the base model. auto: bfloat16 on CUDA, else float32. int8: --load-in 8bit on a CPU."
        ),
    ] = "auto",
    load_in: Annotated[LoadIn, typer.Option(help=_help("load_in"))] = "auto",
    threads: ThreadsOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Accept an adapter that was trained on another base.")
    ] = False,
) -> None:
    """Signature with the options of `ModelOptions`."""


def model_options(*names: str) -> Callable[[Command], Command]:
    """Give a command some or all options of `_model_arguments`; it receives `options`."""
    parameters = inspect.signature(_model_arguments).parameters
    added = [parameters[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in names or parameters]
    return _replace_parameter("options", added, lambda chosen: ModelOptions(**chosen, notify=display))


def eval_sets_from(
    overrides: Overrides, eval_rows: int | None, adapters: Sequence[Adapter]
) -> "list[EvalSet] | None":
    """Held-out set of --eval-dataset, read as the adapters' data was; None without that option."""
    if not overrides:
        return None
    if "eval_dataset" not in overrides:
        raise ConfigError(f"{', '.join(overrides)}: only valid with --eval-dataset.")
    from ..data import eval_sets
    from ..data.delimited import DELIMITERS

    name = str(overrides["eval_dataset"])
    trained = _trained_settings(name, overrides, adapters)
    layout = [setting for setting in _LAYOUT_SETTINGS if setting in trained]
    is_told = DELIMITER_NAMES.get(str(trained.get("delimiter")), trained.get("delimiter")) in DELIMITERS
    of_file = ["delimiter"] * is_told + ["encoding"] * ("encoding" in trained)
    # Files may differ in what their bytes tell, and data in its columns: these are tried in turn.
    attempts: list[list[str]] = [of_file, []] if of_file else [[]]
    attempts += [[*layout, *left_out] for left_out in attempts] if layout else []
    errors: list[DataError] = []
    for left_out in attempts:
        used = {setting: value for setting, value in trained.items() if setting not in left_out}
        settings = resolve_settings(
            TrainConfig, used | overrides | ({"eval_rows": eval_rows} if eval_rows else {})
        )
        notices: list[Notice | Progress] = []
        try:
            eval_set = eval_sets.load_eval_set(settings, notices.append)
        except DataError as error:
            errors.append(error)
            continue
        if used:
            options = " ".join(_format_option(setting, value) for setting, value in used.items())
            display(Notice(f"{name} is read as the data of {format_names(_names(adapters))} was: {options}."))
        if {*layout} & {*left_out}:
            options = " ".join(_format_option(setting, trained[setting]) for setting in layout)
            display(Notice(f"Not read so, as {name} has other columns: {options}. {errors[0]}"))
        for notice in notices:
            display(notice)
        return [eval_set]
    raise errors[0]


def _trained_settings(name: str, overrides: Overrides, adapters: Sequence[Adapter]) -> Overrides:
    """Settings with which the data of all adapters was read, where they are not given and `name` has use for them."""
    from ..data.folders import has_columns, has_delimited_files, has_encoded_files, has_txt_files

    known = {adapter.name: settings for adapter in adapters if (settings := _settings_of(adapter)) is not None}
    trained: Overrides = {}
    for group in (_LAYOUT_SETTINGS, *((setting,) for setting in (*FILE_SETTINGS, "clean"))):
        values = [{setting: each[setting] for setting in group if setting in each} for each in known.values()]
        if overrides.keys() & {*group} or not any(values):
            continue
        if all(value == values[0] for value in values):
            trained |= values[0]
            continue
        differing = [
            f"{adapter}: {' '.join(_format_option(*pair) for pair in value.items()) or 'none'}"
            for adapter, value in zip(known, values, strict=True)
        ]
        options = " or ".join(f"--{setting.replace('_', '-')}" for setting in group)
        display(
            Notice(
                f"The adapters' data was read in several ways ({'; '.join(differing)}), {name} in none of them: give {options}."
            )
        )
    config = TrainConfig(eval_dataset=name)
    unused = {
        "text_column": not has_columns(name, config),
        "txt_rows": not has_txt_files(name),
        "delimiter": not has_delimited_files(name, "auto"),
        "encoding": not has_encoded_files(name),
    }
    return {setting: value for setting, value in trained.items() if not unused.get(setting)}


def _settings_of(adapter: Adapter) -> Overrides | None:
    """Settings that read the data of an adapter: of its manifest, and of its run.yaml; None for one of another tool."""
    data = adapter.manifest.data if adapter.manifest else None
    if data is None:
        return None
    settings: Overrides = {}
    with contextlib.suppress(ConfigError):
        settings = read_settings(adapter.path / RUN_FILE)
    names = [*_IN_MANIFEST, *FILE_SETTINGS, "clean"]
    settings |= {name: value for name in names if (value := getattr(data, name)) is not None}
    known = {name: settings.get(name) for name in (*names, *_LAYOUT_SETTINGS)}
    usual: tuple[object, ...] = (None, [], "auto", "ending", "blank", "sft")
    return {name: value for name, value in known.items() if value not in usual}


def _names(adapters: Sequence[Adapter]) -> list[str]:
    return [adapter.name for adapter in adapters if adapter.manifest and adapter.manifest.data]


def _format_option(setting: str, value: object) -> str:
    text = str(value)
    if isinstance(value, list):
        text = ",".join(f'"{entry}"' if "," in entry else entry for entry in value)
    return f"--{setting.replace('_', '-')} {shlex.quote(text)}"
