"""The commands `generate` and `compare`, and the interactive prompt."""

import contextlib
import dataclasses
import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..adapters.library import Library
from ..cli.options import AdaptersDirOption
from ..config import INVALID_TEXT, ModelOptions, SamplingParams, resolve_settings
from ..errors import ConfigError, GenerationError, LoraTunerError
from .display import (
    print_stderr,
    show_compared,
    show_json,
    show_text,
)
from .options import (
    DEFAULT_ADAPTERS_DIR,
    JsonOption,
    complete_adapter_names,
    model_options,
    settings_options,
)

PROMPT = "Enter a prompt for text generation: "
ANSWER = "Generated text: "


ChatOption = Annotated[
    bool, typer.Option("--chat", help="Speak through the base's chat template; asked for, with history.")
]
SystemOption = Annotated[
    str | None,
    typer.Option(help="With --chat: the message of the system that comes first.", show_default="the template's"),
]


@settings_options(SamplingParams)
@model_options()
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
        typer.Option(
            help="An adapter, by name or path.", show_default="the plain base", autocompletion=complete_adapter_names
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with a prompt on each line.", show_default=False)] = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    as_json: JsonOption = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    *,
    options: ModelOptions,
) -> None:
    """Write on from a prompt, with an adapter or with the plain base."""
    sampling, opening = resolve_settings(SamplingParams, given), _opening_messages(chat, system)
    prompts = _read_prompts(prompt, file)
    if prompts is None and as_json:
        raise ConfigError("--json needs its prompts at once: as an argument, in --file, or - for standard input.")
    if options.force and adapter is None:
        raise ConfigError("--force is for an adapter on another base: name one with --adapter.")
    if adapters_dir != DEFAULT_ADAPTERS_DIR and adapter is None and prompts is not None:
        raise ConfigError("--adapters-dir is where adapters are: name one with --adapter.")
    from ..inference.generator import Generator

    generator = Generator(
        *([adapter] if adapter else []),
        options=options,
        adapters_dir=adapters_dir,
    )
    if prompts is None:
        _interactive(generator, sampling, opening)
        return
    asked = _as_conversations(prompts, opening)
    _check_prompts(generator, asked)
    if as_json:
        show_json([dataclasses.asdict(answer) for it in asked for answer in generator.generate_all(it, sampling)])
    else:
        for it in asked:
            _print_answer(generator, it, sampling)


def _opening_messages(chat: bool, system: str | None) -> list[dict[str, str]] | None:
    """What a conversation begins with; None for plain text."""
    if system is not None and not chat:
        raise ConfigError("--system is for conversations: give --chat too.")
    return ([{"role": "system", "content": system}] if system else []) if chat else None


def _as_conversations(prompts: list[str], opening: list[dict[str, str]] | None) -> list[Any]:
    """The prompts as they are, or each as the one question of a conversation."""
    return prompts if opening is None else [[*opening, {"role": "user", "content": text}] for text in prompts]


def _read_prompts(prompt: str | None, file: Path | None) -> list[str] | None:
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


def _check_prompts(generator: Any, prompts: list[Any]) -> None:
    """Before the first of many is answered: none of them may be too long."""
    for number, prompt in enumerate(prompts, 1):
        try:
            generator.encode_prompt(prompt)
        except LoraTunerError as error:
            raise GenerationError(
                f"Prompt {number:,} of {len(prompts):,}: {error}" if len(prompts) > 1 else str(error)
            ) from error


@settings_options(SamplingParams)
@model_options()
def compare(
    given: dict[str, Any],
    adapter: Annotated[
        list[str],
        typer.Option(
            help="An adapter, by name or path. May be repeated.",
            show_default=False,
            autocompletion=complete_adapter_names,
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to go on from; - reads standard input, a prompt a line.", show_default=False),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with a prompt on each line.", show_default=False)] = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    as_json: JsonOption = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    *,
    options: ModelOptions,
) -> None:
    """The same prompt answered by the base and by adapters, in one batch and with the same luck."""
    sampling, opening = resolve_settings(SamplingParams, given), _opening_messages(chat, system)
    prompts = _read_prompts(prompt, file)
    if prompts is None:
        raise ConfigError("There is nothing to go on from: give a prompt, --file, or - for standard input.")
    found = Library(adapters_dir).get_all(adapter)
    from ..inference.generator import Generator

    generator = Generator(
        *(it.path for it in found),
        options=options,
        adapters_dir=adapters_dir,
    )
    asked = _as_conversations(prompts, opening)
    _check_prompts(generator, asked)
    answering = (None, *(it.name for it in found))
    compared = [generator.generate_batch([(it, name) for name in answering], sampling) for it in asked]
    if as_json:
        show_json([dataclasses.asdict(answer) for answers in compared for answer in answers])
    else:
        for answers in compared:
            show_compared(answers)


def _print_answer(generator: Any, prompt: Any, sampling: SamplingParams) -> str:
    """Prompt and text on stdout, of a conversation the answer alone; a single answer as it is made. Gives that."""
    shown = prompt if isinstance(prompt, str) else ""
    if sampling.n == 1:
        show_text(shown)
        answer = generator.generate(prompt, sampling, on_text=show_text)
        print()
        return str(answer.text)
    answers = generator.generate_all(prompt, sampling)
    for answer in answers:
        show_text(f"{shown}{answer.text}\n\n")
    return str(answers[0].text)


def _interactive(generator: Any, sampling: SamplingParams, opening: list[dict[str, str]] | None) -> None:
    """Ask, answer, ask again, until an empty line. `/adapter NAME` and `/base` choose who answers. With an `opening`, it is one
    conversation, until `/new`."""
    again = " /new: a new conversation." if opening is not None else ""
    said = list(opening or [])
    print_stderr(
        f"{generator.current_adapter or 'The plain base'} answers. /adapter NAME or /base: another does.{again} An empty line: the end."
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
            if INVALID_TEXT.search(line):
                raise ConfigError("What was typed is no text in UTF-8: type it anew.")
            if command == "/base":
                generator.set_adapter(None)
                print_stderr("The plain base answers now.")
            elif command == "/adapter" and name.strip():
                print_stderr(f"{generator.set_adapter(name.strip())} answers now.")
            elif command == "/new" and opening is not None:
                said = list(opening)
                print_stderr("A new conversation begins.")
            elif command.startswith("/"):
                new = ", /new" if opening is not None else ""
                raise ConfigError(
                    f"There is no {line.strip()}: /adapter NAME ({', '.join(generator.library.names())}), /base{new}, or an "
                    "empty line to end."
                )
            else:
                question: Any = line if opening is None else [*said, {"role": "user", "content": line}]
                generator.encode_prompt(question)
                print(ANSWER, end="", flush=True)
                answer = _print_answer(generator, question, sampling)
                if opening is not None:
                    said = [*question, {"role": "assistant", "content": answer}]
        except LoraTunerError as error:
            print_stderr(f"Error: {error}")
