"""The command line. Each command turns options into settings, calls the library, and shows what comes back.

Options that commands share are in options.py; `adapters ...` is in cli_adapters.py, `merge` to `pull` in cli_combine.py,
`serve` in cli_serve.py. What loads torch is imported inside the command that needs it.
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
from . import convert, doctor, evaluate, generate, serve, train
from .adapters import adapters_app
from .display import (
    print_stderr,
)
from .options import (
    StrictCommand,
    display,
)

OUT_OF_MEMORY = "Out of memory: lower --batch-size or --max-length to train, --n to write, or choose --dtype bfloat16."


_NO_MEMORY = (
    "out of memory|can't allocate|[Cc]annot allocate|not enough memory|bad_alloc"  # as torch says it, by device
)
_UsageError: Any = typer.BadParameter.__base__  # Typer brings its own, and does not name it


class _Commands(TyperGroup):
    """Turns errors into one line and an exit status: 1 an error, 2 wrong usage, 130 interrupted."""

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
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        raise
    except OSError as error:
        text, status, cause = f"Error: {os_error_message(error)}", 1, error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(_NO_MEMORY, str(error)):
            raise
        text, status, cause = f"Error: {OUT_OF_MEMORY}", 1, error
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        where = f" {error.ctx.command_path} --help lists what there is." if error.ctx else ""
        text, status, cause = f"Error: {' '.join(error.format_message().split()).rstrip('.')}.{where}", 2, error
    except (Interrupted, KeyboardInterrupt) as stopped:
        text, status, cause = str(stopped) or "Interrupted.", 130, stopped
    finally:
        display.close()
    if text := distributed.with_rank_prefix(text):
        print_stderr(text)
    raise typer.Exit(status) from cause


@contextlib.contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: what is half-written goes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


app = typer.Typer(
    cls=_Commands,
    help="Train small LoRA adapters on your own text, keep many beside one base model, and write with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # a pipe on Windows is not, and text of models holds anything
    if sys.stdin is None:  # closed: there is nothing to read
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - until the process ends
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
    convert.push,
    convert.pull,
    serve.serve,
):
    app.command(cls=StrictCommand)(command)
app.add_typer(adapters_app, name="adapters")
for command in (train.methods, doctor.doctor):
    app.command(cls=StrictCommand)(command)
