"""The commands `generate` and `compare`, and the interactive prompt."""

import contextlib
import dataclasses
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from ..inference.generator import EncodedPrompt, Generator, Prompt

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
    encoded_prompts = _encode_prompts(generator, prompts, opening)
    if as_json:
        outputs = [output for encoded in encoded_prompts for output in generator.generate_all(encoded, sampling)]
        show_json([dataclasses.asdict(output) for output in outputs])
    else:
        for encoded in encoded_prompts:
            _print_answer(generator, encoded, sampling, chat=chat)


def _opening_messages(chat: bool, system: str | None) -> list[dict[str, str]] | None:
    """What a conversation begins with; None for plain text."""
    if system is not None and not chat:
        raise ConfigError("--system is for conversations: give --chat too.")
    return ([{"role": "system", "content": system}] if system else []) if chat else None


def _as_conversation(text: str, messages: list[dict[str, str]] | None) -> "Prompt":
    """The text as it is, or as the next question of a conversation."""
    return text if messages is None else [*messages, {"role": "user", "content": text}]


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


def _encode_prompts(
    generator: "Generator", prompts: list[str], opening: list[dict[str, str]] | None
) -> "list[EncodedPrompt]":
    """Tokenize all prompts before the first is answered. Raises GenerationError for one that is too long."""
    encoded_prompts = []
    for number, prompt in enumerate(prompts, 1):
        try:
            encoded_prompts.append(generator.encode_prompt(_as_conversation(prompt, opening)))
        except LoraTunerError as error:
            prefix = f"Prompt {number:,} of {len(prompts):,}: " if len(prompts) > 1 else ""
            raise GenerationError(f"{prefix}{error}") from error
    return encoded_prompts


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
    names = (None, *(it.name for it in found))
    compared = []
    for encoded in _encode_prompts(generator, prompts, opening):
        compared.append(generator.generate_batch([(encoded, name) for name in names], sampling))
    if as_json:
        show_json([dataclasses.asdict(answer) for answers in compared for answer in answers])
    else:
        for answers in compared:
            show_compared(answers)


def _print_answer(generator: "Generator", prompt: "EncodedPrompt", sampling: SamplingParams, *, chat: bool) -> str:
    """Print prompt and text on stdout, of a conversation the answer alone; a single answer is streamed. Returns its text."""
    prefix = "" if chat else prompt.text
    if sampling.n == 1:
        show_text(prefix)
        output = generator.generate(prompt, sampling, on_text=show_text)
        print()
        return output.text
    outputs = generator.generate_all(prompt, sampling)
    for output in outputs:
        show_text(f"{prefix}{output.text}\n\n")
    return outputs[0].text


def _interactive(generator: "Generator", sampling: SamplingParams, opening: list[dict[str, str]] | None) -> None:
    """Ask, answer, ask again, until an empty line. `/adapter NAME` and `/base` choose who answers. With an `opening`, it is one
    conversation, until `/new`."""
    again = " /new: a new conversation." if opening is not None else ""
    messages = None if opening is None else list(opening)
    print_stderr(
        f"{generator.current_adapter or 'The plain base'} answers. /adapter NAME or /base: another does.{again} "
        "An empty line: the end."
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
                messages = list(opening)
                print_stderr("A new conversation begins.")
            elif command.startswith("/"):
                new = ", /new" if opening is not None else ""
                raise ConfigError(
                    f"There is no {line.strip()}: /adapter NAME ({', '.join(generator.library.names())}), /base{new}, or an "
                    "empty line to end."
                )
            else:
                encoded = generator.encode_prompt(_as_conversation(line, messages))
                print(ANSWER, end="", flush=True)
                answer = _print_answer(generator, encoded, sampling, chat=messages is not None)
                if messages is not None:
                    messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
        except LoraTunerError as error:
            print_stderr(f"Error: {error}")
