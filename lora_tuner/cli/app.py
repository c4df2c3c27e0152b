"""The command line: all commands, and the translation of errors into one line and an exit status.

Commands import torch inside their functions, so that `--help` and `adapters` start fast.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from .. import __version__, distributed
from ..errors import Interrupted, LoraTunerError, RaisedOnRankZero, is_out_of_memory, os_error_message
from ..text import PROGRAM
from ..training.progress import display
from ..training.signals import HANGUP, TERMINATION, handle_signals
from . import (
    adapters,
    classify,
    convert,
    data,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    report,
    runs,
    serve,
    train,
)
from .completion import INSTALL_OPTIONS, completed_command
from .display import print_stderr
from .help import MAX_WIDTH, HelpGroup
from .options import StrictCommand
from .streams import is_reader_gone, quiet_libraries, reliable_streams, stdout_error

OUT_OF_MEMORY = (
    "Out of memory: for training lower --batch-size or --max-length, for generation --n; or use --dtype bfloat16."
)
_UsageError: Any = typer.BadParameter.__base__  # Typer has a copy of its own and does not export it


class _Commands(HelpGroup):
    """Turn errors into one line and an exit status: 1 error, 2 wrong usage, 130 interrupted."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with reliable_streams(), quiet_libraries():
            return super().main(*args, **kwargs)

    def make_context(self, info_name: Any, args: list[str], *rest: Any, **kwargs: Any) -> Any:
        with _report_errors():
            name = PROGRAM if info_name == "cli.py" else info_name
            if INSTALL_OPTIONS & {*args}:
                name = completed_command(name)
            return super().make_context(name, args, *rest, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _report_errors(), handle_signals(TERMINATION, _interrupt):
            result = super().invoke(ctx)
            sys.stdout.flush()
            if (error := stdout_error()) and not is_reader_gone(error):
                raise OSError(error.errno, error.strerror, "stdout")
            return result


@contextlib.contextmanager
def _report_errors() -> Iterator[None]:
    cause: BaseException
    try:
        yield
        return
    except LoraTunerError as error:
        text, status, cause = f"Error: {error}", 1, error
    except RaisedOnRankZero as error:
        raise typer.Exit(1) from error
    except OSError as error:
        text, status, cause = f"Error: {os_error_message(error)}", 1, error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text, status, cause = f"Error: {OUT_OF_MEMORY}", 1, error
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
            raise typer.Exit(2) from error
        advice = f" See {error.ctx.command_path} --help." if error.ctx else ""
        message = " ".join(error.format_message().split()).replace("Value error, ", "").rstrip(".")  # of pydantic
        text, status, cause = f"Error: {message}.{advice}", 2, error
    except (Interrupted, KeyboardInterrupt) as stopped:
        text, status, cause = str(stopped) or "Interrupted.", 130, stopped
    finally:
        display.close()
    if text := distributed.with_rank_prefix(text):
        print_stderr(text)
    raise typer.Exit(status) from cause


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """End a command like Ctrl-C, so that incomplete files are removed."""
    if number == HANGUP:
        signal.signal(number, signal.SIG_IGN)  # it is sent again while they are removed
    raise KeyboardInterrupt


app = typer.Typer(
    cls=_Commands,
    help="Train LoRA adapters on your own text, and generate, evaluate, merge, export and serve with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MAX_WIDTH},
)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        print(f"lora_tuner {__version__}")
        raise typer.Exit


LIBRARY = "Library"
for panel, commands in {
    "Train and write": (
        demo.demo,
        doctor.doctor,
        data.data,
        train.train,
        train.methods,
        generate.generate,
        classify.classify,
    ),
    "Compare and measure": (generate.compare, evaluate.evaluate, report.report),
    "Combine and convert": (convert.merge, convert.blend, convert.compress, export.export),
    LIBRARY: (adapters.push, adapters.pull),
    "Serve": (serve.serve,),
}.items():
    for command in commands:
        app.command(cls=StrictCommand, rich_help_panel=panel)(command)
app.add_typer(adapters.adapters_app, name="adapters", rich_help_panel=LIBRARY)
app.add_typer(runs.runs_app, name="runs", rich_help_panel=LIBRARY)
