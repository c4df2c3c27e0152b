"""The command line. Each command turns options into settings, calls the library, and shows what comes back.

Options that set something are made from the fields of config.py, so that a default, a bound or a help text has one home.
What loads torch is imported inside the command that needs it.
"""

import dataclasses
import functools
import inspect
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from typer.core import TyperGroup

from . import __version__, store
from .config import Dtype, ReadDtype, Sampling, TrainConfig, resolve
from .errors import AdapterError, ConfigError, Interrupted, LoraTunerError
from .library import Library
from .terminal import (
    Display,
    one_line,
    say,
    show_adapter_card,
    show_adapters,
    show_compared,
    show_facts,
    show_gains,
    show_json,
    show_plan,
    show_preview,
    show_trained,
)

show = Display()
PROMPT = "Enter a prompt for text generation: "
ANSWER = "Generated text: "


class _Commands(TyperGroup):
    """Turns this package's errors into one line and an exit status: 1 an error, 130 interrupted."""

    def invoke(self, ctx: Any) -> Any:
        cause: BaseException
        try:
            return super().invoke(ctx)
        except LoraTunerError as error:
            text, status, cause = f"Error: {error}", 1, error
        except BrokenPipeError:  # the reader has seen enough, as `head` does
            raise
        except OSError as error:
            text, status, cause = f"Error: {error.filename or 'A file'}: {error.strerror or error}.", 1, error
        except (Interrupted, KeyboardInterrupt) as stopped:
            text, status, cause = str(stopped) or "Interrupted.", 130, stopped
        finally:
            show.close()
        say(text)
        raise typer.Exit(status) from cause


app = typer.Typer(
    cls=_Commands,
    help="Train small LoRA adapters on your own text, keep many beside one base model, and write with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
adapters_app = typer.Typer(help="The adapters in the library.", no_args_is_help=True)
app.add_typer(adapters_app, name="adapters")

AdapterArgument = Annotated[str, typer.Argument(help="An adapter, by name or path.", show_default=False)]
OwnArgument = Annotated[str, typer.Argument(help="An adapter of the library, by name.", show_default=False)]
AdaptersDir = Annotated[Path, typer.Option(help="Where adapters are kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Answer with JSON on stdout.")]
Base = Annotated[str | None, typer.Option(help="Another base than the one that the adapter names.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the base on the Hub.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Put an adapter on a base that it was not trained on.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Numbers = Annotated[
    ReadDtype,
    typer.Option(help="Numbers of the base. auto: bfloat16 on CUDA, else float32; int8: least to read, on a CPU."),
]
LIBRARY = TrainConfig().adapters_dir


def _settings(kind: type[BaseModel], *only: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
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
    option = typer.Option(
        *([flag] if flag else []),
        help=field.description,
        show_default=False if default is None else str(default),
        rich_help_panel=field.json_schema_extra["panel"],
    )
    annotation = Annotated[field.annotation | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _place(
    base: Base = None,
    revision: Revision = None,
    adapters_dir: AdaptersDir = LIBRARY,
    device: Device = "auto",
    dtype: Numbers = "auto",
    force: Force = False,
) -> None:
    """The options of a command that puts adapters on a base."""


def _on_a_base(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `_place`; it receives them as `place`."""
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "place"]
    added = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(_place).parameters.values()]

    @functools.wraps(command)
    def wrapper(**options: Any) -> None:
        command(place={p.name: options.pop(p.name) for p in added}, **options)

    wrapper.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    return wrapper


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # a pipe on Windows is not, and text of models holds anything
    if version:
        print(f"lora_tuner {__version__}")
        raise typer.Exit


@app.command()
@_settings(TrainConfig)
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
    settings = resolve(TrainConfig, given, config)
    from . import fast, training

    fast.keep_memory()
    if preview:
        rows = training.preview(settings, preview, show)
        show_json([dataclasses.asdict(row) for row in rows]) if as_json else show_preview(rows)
    elif plan:
        cost = training.plan(settings, show)
        show_json(dataclasses.asdict(cost)) if as_json else show_plan(cost)
    else:
        adapter = training.train(settings, show) if resume is None else training.resume(resume, settings.runs_dir, show)
        show_json(adapter.facts()) if as_json else show_trained(adapter)


@app.command()
@_settings(Sampling)
@_on_a_base
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
        str | None, typer.Option(help="An adapter, by name or path.", show_default="the plain base")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with a prompt on each line.", show_default=False)] = None,
    as_json: AsJson = False,
    *,
    place: dict[str, Any],
) -> None:
    """Write on from a prompt, with an adapter or with the plain base."""
    sampling = resolve(Sampling, given)
    prompts = _prompts(prompt, file)
    if prompts is None and as_json:
        raise ConfigError("--json needs its prompts at once: as an argument, in --file, or - for standard input.")
    if place["force"] and adapter is None:
        raise ConfigError("--force is for an adapter on another base: name one with --adapter.")
    from .generation import Generator

    generator = Generator(
        *([adapter] if adapter else []),
        **place,
        notify=show,
    )
    if prompts is None:
        _converse(generator, sampling)
    elif as_json:
        show_json([dataclasses.asdict(answer) for text in prompts for answer in generator.generate_all(text, sampling)])
    else:
        for text in prompts:
            _answer(generator, text, sampling)


def _prompts(prompt: str | None, file: Path | None) -> list[str] | None:
    """The prompts, or None when they are to be asked for one after another."""
    if prompt is not None and file is not None:
        raise ConfigError("A prompt and --file are two sources: give one.")
    if prompt is None and file is None:
        return None
    if prompt is not None and prompt != "-":
        return [prompt]
    try:
        text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {file}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file or 'Standard input'} cannot be read as UTF-8 text: {error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{file or 'Standard input'} holds no prompt: one a line is expected.")
    return lines


@app.command()
@_settings(Sampling)
@_on_a_base
def compare(
    given: dict[str, Any],
    adapter: Annotated[
        list[str], typer.Option(help="An adapter, by name or path. May be repeated.", show_default=False)
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to go on from; - reads standard input, a prompt a line.", show_default=False),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with a prompt on each line.", show_default=False)] = None,
    as_json: AsJson = False,
    *,
    place: dict[str, Any],
) -> None:
    """The same prompt answered by the base and by adapters, in one batch and with the same luck."""
    sampling = resolve(Sampling, given)
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
    answering = (None, *(it.name for it in found))
    compared = [generator.generate_batch([(text, name) for name in answering], sampling) for text in prompts]
    if as_json:
        show_json([dataclasses.asdict(answer) for answers in compared for answer in answers])
    else:
        for answers in compared:
            show_compared(answers)


@app.command()
@_settings(TrainConfig, "eval_dataset", "eval_split", "text_column", "where", "txt_rows", "keep_lines")
@_on_a_base
def evaluate(
    given: dict[str, Any],
    adapters: Annotated[list[str], typer.Argument(help="Adapters, by name or path.", show_default=False)],
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
    if given and "eval_dataset" not in given:
        raise ConfigError(f"{', '.join(given)}: only --eval-dataset is read with that.")
    settings = resolve(TrainConfig, given | ({"eval_rows": eval_rows} if eval_rows else {}))
    if plot and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot {plot}: the picture is a .png file.")
    if plot and not plot.parent.is_dir():
        raise ConfigError(f"--plot {plot}: there is no folder {plot.parent}.")
    found = Library(place.pop("adapters_dir")).several(adapters)
    from . import evaluation, report

    matrix = evaluation.evaluate(
        found,
        [evaluation.rows_of(settings, show)] if settings.eval_dataset else None,
        eval_rows=eval_rows,
        **place,
        notify=show,
    )
    if plot:
        report.plot_gains(matrix, plot)
    show_json(matrix.facts()) if as_json else show_gains(matrix)


def _answer(generator: Any, prompt: str, sampling: Sampling) -> None:
    """Prompt and text on stdout; a single answer as it is made."""
    if sampling.answers == 1:
        print(prompt, end="", flush=True)
        generator.generate(prompt, sampling, on_text=lambda text: print(text, end="", flush=True))
        print()
    else:
        for answer in generator.generate_all(prompt, sampling):
            print(f"{prompt}{answer.text}\n")


def _converse(generator: Any, sampling: Sampling) -> None:
    """Ask, answer, ask again, until an empty line. `/adapter NAME` and `/base` choose who answers."""
    say(
        f"{generator.current or 'The plain base'} answers. /adapter NAME or /base: another does. An empty line: the end."
    )
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            line = ""
        if not line.strip():
            return
        command, _, name = line.strip().partition(" ")
        try:
            if command == "/base":
                generator.use(None)
                say("The plain base answers now.")
            elif command == "/adapter" and name.strip():
                say(f"{generator.use(name.strip())} answers now.")
            elif command.startswith("/"):
                raise ConfigError(
                    f"There is no {line.strip()}: /adapter NAME ({', '.join(generator.library.names())}), /base, or an empty "
                    "line to end."
                )
            else:
                print(ANSWER, end="", flush=True)
                _answer(generator, line, sampling)
        except LoraTunerError as error:
            say(f"Error: {error}")


@app.command()
def merge(
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Option(help="The model folder to write.", show_default=False)],
    base: Base = None,
    revision: Revision = None,
    dtype: Annotated[Dtype, typer.Option(help="Numbers of the merged model; it is merged in float32.")] = "float32",
    adapters_dir: AdaptersDir = LIBRARY,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model of that name.")] = False,
    force: Force = False,
) -> None:
    """Write base and adapter as one plain model, for tools that know no adapters."""
    found = Library(adapters_dir).get(adapter)
    from . import combine

    print(
        combine.merge(
            found, out, base=base, revision=revision, dtype=dtype, overwrite=overwrite, force=force, notify=show
        )
    )


@adapters_app.command("list")
def list_adapters(adapters_dir: AdaptersDir = LIBRARY, as_json: AsJson = False) -> None:
    """All adapters: base, rank, targets, data, size, held-out gain, age, parent."""
    found = list(Library(adapters_dir).entries())
    if as_json:
        show_json(
            [
                {"name": name} | (it.facts() if isinstance(it, store.Adapter) else {"broken": str(it)})
                for name, it in found
            ]
        )
    elif found:
        show_adapters(found)
    else:
        say(f"No adapters in {adapters_dir} yet: train one.")


@adapters_app.command("show")
def show_adapter(adapter: AdapterArgument, adapters_dir: AdaptersDir = LIBRARY, as_json: AsJson = False) -> None:
    """One adapter: what it was made from, and what it gives."""
    library = Library(adapters_dir)
    found = library.get(adapter)
    ancestors = library.ancestors(found)
    show_json(found.facts() | {"ancestors": ancestors}) if as_json else show_adapter_card(found, ancestors)


@adapters_app.command("verify")
def verify_adapters(
    names: Annotated[
        list[str] | None, typer.Argument(help="Adapters, by name or path; all when none is named.")
    ] = None,
    adapters_dir: AdaptersDir = LIBRARY,
    as_json: AsJson = False,
) -> None:
    """Read every byte: hashes, shapes, settings, finite numbers. Proves that it is whole, not that it is good."""
    library = Library(adapters_dir)
    found = {name: _problems(library, name) for name in names or library.names()}
    if as_json:
        show_json([{"name": name, "problems": problems} for name, problems in found.items()])
    else:
        for name, problems in found.items():
            print(one_line(f"{name}: {'; '.join(problems) or 'whole'}"))
        if not all(found.values()):
            say(
                "Whole: well-formed, finite and, where there is a manifest, the weights and settings it was written for. How "
                "good it is, only `evaluate` can say."
            )
        if not found:
            say(f"No adapters in {adapters_dir} yet: train one.")
    if any(found.values()):
        raise typer.Exit(1)


def _problems(library: Library, name: str) -> list[str]:
    try:
        return store.verify(library.get(name))
    except AdapterError as error:
        return [str(error)]


@adapters_app.command("rename")
def rename_adapter(
    old: OwnArgument,
    new: Annotated[str, typer.Argument(help="Its new name.", show_default=False)],
    adapters_dir: AdaptersDir = LIBRARY,
    as_json: AsJson = False,
) -> None:
    """Give an adapter another name. Its card and run.yaml keep the old one."""
    renamed = Library(adapters_dir).rename(old, new)
    show_json(renamed.facts()) if as_json else print(renamed.path)


@adapters_app.command("remove")
def remove_adapter(
    name: OwnArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    adapters_dir: AdaptersDir = LIBRARY,
    as_json: AsJson = False,
) -> None:
    """Delete an adapter for good."""
    if not yes:
        typer.confirm(f"Delete {adapters_dir / name} for good?", abort=True, err=True)
    Library(adapters_dir).remove(name)
    if as_json:
        show_json({"removed": name})


@adapters_app.command("adopt")
def adopt_adapter(
    folder: Annotated[str, typer.Argument(help="The folder of an adapter that another tool made.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Its name here.", show_default="the folder's")] = None,
    base: Base = None,
    revision: Revision = None,
    adapters_dir: AdaptersDir = LIBRARY,
    as_json: AsJson = False,
) -> None:
    """Take in an adapter of another tool: check it against its base, and give it a manifest that holds it to that."""
    adopted = Library(adapters_dir).adopt(folder, name, base=base, revision=revision, notify=show)
    show_json(adopted.facts()) if as_json else print(adopted.path)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine has, and what to do about what is missing."""
    from .doctor import examine

    facts = dataclasses.asdict(examine())
    show_json(facts) if as_json else show_facts(facts)
