"""The command line. Each command turns options into settings, calls the library, and shows what comes back.

Options that commands share are in options.py; `adapters ...` is in cli_adapters.py, `merge` to `pull` in cli_combine.py,
`serve` in cli_serve.py. What loads torch is imported inside the command that needs it.
"""

import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__, cli_combine, cli_serve, distributed, files
from .cli_adapters import adapters_app
from .config import METHODS, NO_TEXT, Sampling, TrainConfig, resolve, rungs
from .errors import ConfigError, Elsewhere, GenerationError, Interrupted, LoraTunerError, reason
from .library import Library
from .options import LIBRARY, ROWS, AdapterArguments, AsJson, Strict, known, on_a_base, options_of, rows_given, show
from .terminal import (
    say,
    show_compared,
    show_facts,
    show_gains,
    show_json,
    show_ladder,
    show_plan,
    show_preview,
    show_text,
    show_trained,
    table,
)

PROMPT = "Enter a prompt for text generation: "
ANSWER = "Generated text: "
OUT_OF_MEMORY = (
    "Out of memory: lower --batch-size or --max-length to train, --answers to write, or choose --dtype bfloat16."
)


_NO_MEMORY = (
    "out of memory|can't allocate|[Cc]annot allocate|not enough memory|bad_alloc"  # as torch says it, by device
)
_UsageError: Any = typer.BadParameter.__base__  # Typer brings its own, and does not name it


class _Commands(TyperGroup):
    """Turns errors into one line and an exit status: 1 an error, 2 wrong usage, 130 interrupted."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _one_line(), _terminated():
            return super().invoke(ctx)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    cause: BaseException
    try:
        yield
        return
    except LoraTunerError as error:
        text, status, cause = f"Error: {error}", 1, error
    except Elsewhere as error:
        raise typer.Exit(1) from error
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        raise
    except OSError as error:
        text, status, cause = f"Error: {reason(error)}", 1, error
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
        show.close()
    if text := distributed.signed(text):
        say(text)
    raise typer.Exit(status) from cause


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
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


@app.command(cls=Strict)
@options_of(TrainConfig)
def train(
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="A YAML file of settings; options here come last.", show_default=False)
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on with the unfinished run of that name.", show_default=False)
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Measure a few steps, say what the run costs, train nothing.")
    ] = False,
    preview: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Show N rows as the model sees them, train nothing.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter on your text."""
    if resume is not None and (given.keys() - {"runs_dir"} or config or plan or preview):
        raise ConfigError(
            "--resume takes its settings from the run it goes on with: leave all others but --runs-dir out."
        )
    if plan and preview:
        raise ConfigError("--plan and --preview are two questions: ask one at a time.")
    runs = [resolve(TrainConfig, it, config) for it in rungs(given)]
    if len(runs) > 1 and (plan or preview):
        raise ConfigError("--plan and --preview are for one run: give one rank and one learning rate.")
    settings = runs[0]
    from . import fast, ladder, training

    if distributed.announced() > 1 and preview:
        raise ConfigError("--preview is for one process: leave torchrun out.")
    fast.keep_memory()
    if len(runs) > 1 or (resume and ladder.waits(resume, settings.runs_dir)):
        climbed = ladder.resume(resume, settings.runs_dir, show) if resume else ladder.climb(runs, show)
        show_json(climbed.facts()) if as_json else show_ladder(climbed)
    elif preview:
        rows = training.preview(settings, preview, show)
        show_json([dataclasses.asdict(row) for row in rows]) if as_json else show_preview(rows)
    elif plan:
        cost = training.plan(settings, show)
        if distributed.rank() == 0:
            show_json(dataclasses.asdict(cost)) if as_json else show_plan(cost)
    else:
        adapter = training.train(settings, show) if resume is None else training.resume(resume, settings.runs_dir, show)
        if distributed.rank() == 0:
            show_json(adapter.facts()) if as_json else show_trained(adapter)
    distributed.leave()


Talk = Annotated[bool, typer.Option("--chat", help="Speak through the base's chat template; asked for, with history.")]
System = Annotated[
    str | None,
    typer.Option(help="With --chat: the message of the system that comes first.", show_default="the template's"),
]


@app.command(cls=Strict)
@options_of(Sampling)
@on_a_base
def generate(
    given: dict[str, Any],
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The text to go on from; - reads standard input, a prompt a line; asked for when missing.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="An adapter, by name or path.", show_default="the plain base", autocompletion=known),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with a prompt on each line.", show_default=False)] = None,
    chat: Talk = False,
    system: System = None,
    as_json: AsJson = False,
    *,
    place: dict[str, Any],
) -> None:
    """Write on from a prompt, with an adapter or with the plain base."""
    sampling, opening = resolve(Sampling, given), _opening(chat, system)
    prompts = _prompts(prompt, file)
    if prompts is None and as_json:
        raise ConfigError("--json needs its prompts at once: as an argument, in --file, or - for standard input.")
    if place["force"] and adapter is None:
        raise ConfigError("--force is for an adapter on another base: name one with --adapter.")
    if place["adapters_dir"] != LIBRARY and adapter is None and prompts is not None:
        raise ConfigError("--adapters-dir is where adapters are: name one with --adapter.")
    from .generation import Generator

    generator = Generator(
        *([adapter] if adapter else []),
        **place,
        notify=show,
    )
    if prompts is None:
        _converse(generator, sampling, opening)
        return
    asked = _asked(prompts, opening)
    _check(generator, asked)
    if as_json:
        show_json([dataclasses.asdict(answer) for it in asked for answer in generator.generate_all(it, sampling)])
    else:
        for it in asked:
            _answer(generator, it, sampling)


def _opening(chat: bool, system: str | None) -> list[dict[str, str]] | None:
    """What a conversation begins with; None for plain text."""
    if system is not None and not chat:
        raise ConfigError("--system is for conversations: give --chat too.")
    return ([{"role": "system", "content": system}] if system else []) if chat else None


def _asked(prompts: list[str], opening: list[dict[str, str]] | None) -> list[Any]:
    """The prompts as they are, or each as the one question of a conversation."""
    return prompts if opening is None else [[*opening, {"role": "user", "content": text}] for text in prompts]


def _prompts(prompt: str | None, file: Path | None) -> list[str] | None:
    """The prompts, or None when they are to be asked for one after another."""
    if prompt is not None and file is not None:
        raise ConfigError("A prompt and --file are two sources: give one.")
    if prompt is None and file is None:
        return None
    if prompt is not None and prompt != "-":
        return [prompt]
    data = b""
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        lines = [line for line in text.split("\n") if line.strip()]
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {file}.") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file or 'Standard input'} is not UTF-8 in line {line:,}: save it as UTF-8.") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ConfigError(
            f"{file or 'Standard input'} holds null bytes in line {line:,}, as UTF-16 does: save it as UTF-8."
        )
    if not lines:
        raise ConfigError(f"{file or 'Standard input'} holds no prompt: one a line is expected.")
    return lines


def _check(generator: Any, prompts: list[Any]) -> None:
    """Before the first of many is answered: none of them may be too long."""
    for number, prompt in enumerate(prompts, 1):
        try:
            generator.check(prompt)
        except LoraTunerError as error:
            raise GenerationError(
                f"Prompt {number:,} of {len(prompts):,}: {error}" if len(prompts) > 1 else str(error)
            ) from error


@app.command(cls=Strict)
@options_of(Sampling)
@on_a_base
def compare(
    given: dict[str, Any],
    adapter: Annotated[
        list[str],
        typer.Option(help="An adapter, by name or path. May be repeated.", show_default=False, autocompletion=known),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to go on from; - reads standard input, a prompt a line.", show_default=False),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with a prompt on each line.", show_default=False)] = None,
    chat: Talk = False,
    system: System = None,
    as_json: AsJson = False,
    *,
    place: dict[str, Any],
) -> None:
    """The same prompt answered by the base and by adapters, in one batch and with the same luck."""
    sampling, opening = resolve(Sampling, given), _opening(chat, system)
    prompts = _prompts(prompt, file)
    if prompts is None:
        raise ConfigError("There is nothing to go on from: give a prompt, --file, or - for standard input.")
    found = Library(place["adapters_dir"]).several(adapter)
    from .generation import Generator

    generator = Generator(
        *(it.path for it in found),
        **place,
        notify=show,
    )
    asked = _asked(prompts, opening)
    _check(generator, asked)
    answering = (None, *(it.name for it in found))
    compared = [generator.generate_batch([(it, name) for name in answering], sampling) for it in asked]
    if as_json:
        show_json([dataclasses.asdict(answer) for answers in compared for answer in answers])
    else:
        for answers in compared:
            show_compared(answers)


@app.command(cls=Strict)
@options_of(TrainConfig, *ROWS)
@on_a_base
def evaluate(
    given: dict[str, Any],
    adapters: AdapterArguments,
    eval_rows: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="So many of each set of rows.",
            show_default=f"those of training; {TrainConfig().eval_rows} of --eval-dataset",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the gains into this PNG file.", show_default=False)] = None,
    as_json: AsJson = False,
    *,
    place: dict[str, Any],
) -> None:
    """Held-out loss of the base and of each adapter, on its own rows and on those of the others."""
    if plot and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot {plot}: the picture is a .png file.")
    if plot and not plot.parent.is_dir():
        raise ConfigError(f"--plot {plot}: there is no folder {plot.parent}.")
    if plot and (why := files.unwritable(plot.parent)):
        raise ConfigError(f"--plot {plot}: {why}.")
    found = Library(place.pop("adapters_dir")).several(adapters)
    sets = rows_given(given, eval_rows)
    from . import evaluation, report

    matrix = evaluation.evaluate(
        found,
        sets,
        eval_rows=eval_rows,
        **place,
        notify=show,
    )
    if plot:
        with files.new_file(plot) as work:
            report.plot_gains(matrix, work)
    show_json(matrix.facts()) if as_json else show_gains(matrix)


def _answer(generator: Any, prompt: Any, sampling: Sampling) -> str:
    """Prompt and text on stdout, of a conversation the answer alone; a single answer as it is made. Gives that."""
    shown = prompt if isinstance(prompt, str) else ""
    if sampling.answers == 1:
        show_text(shown)
        answer = generator.generate(prompt, sampling, on_text=show_text)
        print()
        return str(answer.text)
    answers = generator.generate_all(prompt, sampling)
    for answer in answers:
        show_text(f"{shown}{answer.text}\n\n")
    return str(answers[0].text)


def _converse(generator: Any, sampling: Sampling, opening: list[dict[str, str]] | None) -> None:
    """Ask, answer, ask again, until an empty line. `/adapter NAME` and `/base` choose who answers. With an `opening`, it is one
    conversation, until `/new`."""
    again = " /new: a new conversation." if opening is not None else ""
    said = list(opening or [])
    say(
        f"{generator.current or 'The plain base'} answers. /adapter NAME or /base: another does.{again} An empty line: the end."
    )
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # where it has been read from already
            sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is a line to be refused like others
    while True:
        try:
            line = input(PROMPT).removeprefix("\ufeff")
        except EOFError:
            line = ""
        if not line.strip():
            return
        command, _, name = line.strip().partition(" ")
        try:
            if NO_TEXT.search(line):
                raise ConfigError("What was typed is no text in UTF-8: type it anew.")
            if command == "/base":
                generator.use(None)
                say("The plain base answers now.")
            elif command == "/adapter" and name.strip():
                say(f"{generator.use(name.strip())} answers now.")
            elif command == "/new" and opening is not None:
                said = list(opening)
                say("A new conversation begins.")
            elif command.startswith("/"):
                new = ", /new" if opening is not None else ""
                raise ConfigError(
                    f"There is no {line.strip()}: /adapter NAME ({', '.join(generator.library.names())}), /base{new}, or an "
                    "empty line to end."
                )
            else:
                question: Any = line if opening is None else [*said, {"role": "user", "content": line}]
                generator.check(question)
                print(ANSWER, end="", flush=True)
                answer = _answer(generator, question, sampling)
                if opening is not None:
                    said = [*question, {"role": "assistant", "content": answer}]
        except LoraTunerError as error:
            say(f"Error: {error}")


for command in (
    cli_combine.merge,
    cli_combine.blend,
    cli_combine.slim,
    cli_combine.export,
    cli_combine.push,
    cli_combine.pull,
    cli_serve.serve,
):
    app.command(cls=Strict)(command)
app.add_typer(adapters_app, name="adapters")


@app.command(cls=Strict)
def methods(as_json: AsJson = False) -> None:
    """What `train --method` can be, and when to choose which."""
    if as_json:
        show_json([{"name": name, **dataclasses.asdict(method)} for name, method in METHODS.items()])
    else:
        rows = [(name, f"{method.learning_rate:g}", method.when) for name, method in METHODS.items()]
        table(rows, ("method", "learning rate", "when to choose it"))


@app.command(cls=Strict)
def doctor(as_json: AsJson = False) -> None:
    """What this machine has, and what to do about what is missing."""
    from .doctor import examine

    facts = dataclasses.asdict(examine())
    show_json(facts) if as_json else show_facts(facts)
