"""The command line: all commands, and the translation of errors into one line and an exit status.

Commands import torch inside their functions, so that `--help` and `adapters` start fast.
"""

import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__, distributed
from ..errors import Interrupted, LoraTunerError, RaisedOnRankZero, os_error_message
from . import adapters, convert, doctor, evaluate, generate, serve, train
from .display import print_stderr
from .options import StrictCommand, display

OUT_OF_MEMORY = (
    "Out of memory: for training lower --batch-size or --max-length, for generation --n; or use --dtype bfloat16."
)
_OUT_OF_MEMORY_PATTERN = "out of memory|can't allocate|[Cc]annot allocate|not enough memory|bad_alloc"
_UsageError: Any = typer.BadParameter.__base__  # Typer has a copy of its own and does not export it


class _Commands(TyperGroup):
    """Turn errors into one line and an exit status: 1 error, 2 wrong usage, 130 interrupted."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _report_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _report_errors(), _interrupt_on_sigterm():
            return super().invoke(ctx)


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
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        raise
    except OSError as error:
        text, status, cause = f"Error: {os_error_message(error)}", 1, error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(_OUT_OF_MEMORY_PATTERN, str(error)):
            raise
        text, status, cause = f"Error: {OUT_OF_MEMORY}", 1, error
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        advice = f" See {error.ctx.command_path} --help." if error.ctx else ""
        text, status, cause = f"Error: {' '.join(error.format_message().split()).rstrip('.')}.{advice}", 2, error
    except (Interrupted, KeyboardInterrupt) as stopped:
        text, status, cause = str(stopped) or "Interrupted.", 130, stopped
    finally:
        display.close()
    if text := distributed.with_rank_prefix(text):
        print_stderr(text)
    raise typer.Exit(status) from cause


@contextlib.contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end a command like Ctrl-C, so that incomplete files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


app = typer.Typer(
    cls=_Commands,
    help="Train LoRA adapters on your own text, and generate, evaluate, merge, export and serve with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # pipes on Windows have another encoding
    if sys.stdin is None:  # it was closed
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - open until exit
    if version:
        print(f"lora_tuner {__version__}")
        raise typer.Exit


for command in (
    train.train,
    generate.generate,
    generate.compare,
    evaluate.evaluate,
    convert.merge,
    convert.blend,
    convert.compress,
    convert.export,
    adapters.push,
    adapters.pull,
    serve.serve,
    train.methods,
    doctor.doctor,
):
    app.command(cls=StrictCommand)(command)
app.add_typer(adapters.adapters_app, name="adapters")
