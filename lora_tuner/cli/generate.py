"""The commands `generate` and `compare`, and the interactive prompt."""

import contextlib
import dataclasses
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..adapters.library import Library
from ..config import INVALID_TEXT, ModelOptions, SamplingParams
from ..errors import ConfigError, GenerationError, LoraTunerError
from ..settings_files import resolve_settings
from ..text import escape_control, format_names
from .display import BASE_LABEL, print_stderr, show_json, show_text
from .options import (
    DEFAULT_ADAPTERS_DIR,
    AdaptersDirOption,
    JsonOption,
    Overrides,
    complete_adapter_names,
    is_given,
    model_options,
    settings_options,
)

if TYPE_CHECKING:
    from ..data.chat import Message
    from ..inference.generator import EncodedPrompt, GenerationOutput, Generator, Prompt

PROMPT = "Enter a prompt for text generation: "
ANSWER = "Generated text: "
MIN_COLUMN_WIDTH = 36  # characters; with less, texts are not shown side by side

FileOption = Annotated[Path | None, typer.Option(help="File with one prompt per line.", show_default=False)]
ChatOption = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Apply the chat template of the adapter, else of the base. The interactive prompt keeps the history.",
    ),
]
SystemOption = Annotated[
    str | None, typer.Option(help="With --chat: the system message.", show_default="the template's")
]


@settings_options(SamplingParams)
@model_options()
def generate(
    ctx: typer.Context,
    overrides: Overrides,
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Text to continue. - reads prompts from stdin, one per line. Without it, an interactive prompt starts.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Adapter, by name or path.", show_default="the base", autocompletion=complete_adapter_names
        ),
    ] = None,
    file: FileOption = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    as_json: JsonOption = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    *,
    options: ModelOptions,
) -> None:
    """Generate text from a prompt, with an adapter or with the base alone."""
    sampling, opening = resolve_settings(SamplingParams, overrides), _opening_messages(chat, system)
    prompts = _read_prompts(prompt, file)
    if prompts is None and as_json:
        raise ConfigError("--json needs prompts: give one as an argument, --file, or - for stdin.")
    if options.force and adapter is None:
        raise ConfigError("--force needs an adapter: name one with --adapter.")
    if is_given(ctx, "adapters_dir") and adapter is None and prompts is not None:
        raise ConfigError("--adapters-dir needs an adapter: name one with --adapter.")
    from ..inference.generator import Generator

    generator = Generator(*([adapter] if adapter else []), options=options, adapters_dir=adapters_dir)
    if prompts is None:
        _run_interactive(generator, sampling, opening)
        return
    encoded_prompts = _encode_prompts(generator, prompts, opening, generator.current_adapter)
    if as_json:
        outputs = [output for encoded in encoded_prompts for output in generator.generate_all(encoded, sampling)]
        show_json([dataclasses.asdict(output) for output in outputs])
    else:
        for encoded in encoded_prompts:
            _print_generated(generator, encoded, sampling, chat=chat)


def _opening_messages(chat: bool, system: str | None) -> "list[Message] | None":
    """First messages of every conversation; None without --chat."""
    if system is not None and not chat:
        raise ConfigError("--system needs --chat.")
    if not chat:
        return None
    return [{"role": "system", "content": system}] if system else []


def _as_conversation(text: str, messages: "list[Message] | None") -> "Prompt":
    """The text itself or, after `messages`, the next user message."""
    return text if messages is None else [*messages, {"role": "user", "content": text}]


def _read_prompts(prompt: str | None, file: Path | None) -> list[str] | None:
    """Prompts from the argument, a file or stdin; None for the interactive prompt."""
    if prompt is not None and file is not None:
        raise ConfigError("A prompt and --file exclude each other: give one.")
    if prompt is None and file is None:
        return None
    if prompt is not None and prompt != "-":
        return [prompt]
    source, data = file or "stdin", b""
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        lines = [line for line in text.split("\n") if line.strip()]
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {file}.") from error
    except UnicodeDecodeError as error:
        line_number = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{source} is not valid UTF-8 in line {line_number:,}: save it as UTF-8.") from error
    if "\0" in text:
        line_number = text[: text.index("\0")].count("\n") + 1
        raise ConfigError(f"{source} has null bytes in line {line_number:,}, as in UTF-16: save it as UTF-8.")
    if not lines:
        raise ConfigError(f"{source} has no prompts: write one per line.")
    return lines


def _encode_prompts(
    generator: "Generator", prompts: list[str], opening: "list[Message] | None", adapter: str | None
) -> "list[EncodedPrompt]":
    """Tokenize all prompts for an adapter before generation starts. Raises GenerationError for a
    long prompt."""
    encoded_prompts = []
    for number, prompt in enumerate(prompts, 1):
        try:
            conversation = _as_conversation(prompt, opening)
            encoded_prompts.append(
                generator.encode_prompt(
                    conversation, generator.tokenizer_of(adapter), generator.vocab_size_of(adapter)
                )
            )
        except LoraTunerError as error:
            prefix = f"Prompt {number:,} of {len(prompts):,}: " if len(prompts) > 1 else ""
            raise GenerationError(f"{prefix}{error}") from error
    return encoded_prompts


@settings_options(SamplingParams)
@model_options()
def compare(
    overrides: Overrides,
    adapter: Annotated[
        list[str],
        typer.Option(
            help="Adapter, by name or path. May be repeated.",
            show_default=False,
            autocompletion=complete_adapter_names,
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to continue. - reads prompts from stdin, one per line.", show_default=False),
    ] = None,
    file: FileOption = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    as_json: JsonOption = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    *,
    options: ModelOptions,
) -> None:
    """Run one prompt on the base and several adapters with the same seed, in one batch."""
    sampling, opening = resolve_settings(SamplingParams, overrides), _opening_messages(chat, system)
    prompts = _read_prompts(prompt, file)
    if prompts is None:
        raise ConfigError("There is no prompt: give one as an argument, --file, or - for stdin.")
    adapters = Library(adapters_dir).get_all(adapter)
    from ..inference.generator import Generator

    generator = Generator(*(loaded.path for loaded in adapters), options=options, adapters_dir=adapters_dir)
    names = [None, *(loaded.name for loaded in adapters)]
    results = []
    encoded_by_name = [_encode_prompts(generator, prompts, opening, name) for name in names]
    for encoded in zip(*encoded_by_name, strict=True):
        results.append(generator.generate_batch(list(zip(encoded, names, strict=True)), sampling))
    if as_json:
        show_json([dataclasses.asdict(output) for outputs in results for output in outputs])
    else:
        for outputs in results:
            show_comparison(outputs)


def show_comparison(outputs: Sequence["GenerationOutput"]) -> None:
    """Print the outputs for one prompt side by side or, on a narrow terminal, one after another."""
    console, prompt = Console(highlight=False), outputs[0].prompt
    columns: dict[str, list[str]] = {}
    for output in outputs:
        columns.setdefault(output.adapter or BASE_LABEL, []).append(escape_control(prompt + output.text))
    if console.width >= MIN_COLUMN_WIDTH * len(columns):
        grid = Table(box=None, padding=(0, 3, 1, 0), pad_edge=False, header_style="bold", expand=True)
        for name in columns:
            grid.add_column(Text(escape_control(name)), ratio=1)
        for row in zip(*columns.values(), strict=True):
            grid.add_row(*(Text(text) for text in row))
        console.print(grid)
    else:
        for name, texts in columns.items():
            for text in texts:
                console.print(Text(f"--- {escape_control(name)}", "bold"))
                print(f"{text}\n")


def _print_generated(
    generator: "Generator", prompt: "EncodedPrompt", sampling: SamplingParams, *, chat: bool
) -> str:
    """Print prompt and text, or only the text of a conversation; a single sample is streamed.
    Returns the first text."""
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


def _run_interactive(generator: "Generator", sampling: SamplingParams, opening: "list[Message] | None") -> None:
    """Prompt for input until an empty line. With `opening`, inputs are turns of a conversation."""
    commands = "/adapter NAME, /base" if opening is None else "/adapter NAME, /base, /new"
    messages = None if opening is None else list(opening)
    print_stderr(f"{_active_model(generator)} Commands: {commands}; an empty line quits.")
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # if it has been read from
            sys.stdin.reconfigure(errors="surrogateescape")  # invalid UTF-8 becomes an error below
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
                raise ConfigError("The input is not valid UTF-8 text: type it again.")
            if command == "/base" or (command == "/adapter" and name.strip()):
                adapter = None if command == "/base" else name.strip()
                generator.set_adapter(adapter)
                print_stderr(_active_model(generator))
            elif command == "/new" and opening is not None:
                messages = list(opening)
                print_stderr("New conversation.")
            elif command.startswith("/"):
                adapters = format_names(generator.library.names()) or "none"
                raise ConfigError(
                    f"Unknown command {line.strip()}. Commands: {commands}; an empty line quits. "
                    f"Adapters: {adapters}."
                )
            else:
                encoded = generator.encode_prompt(_as_conversation(line, messages))
                print(ANSWER, end="", flush=True)
                answer = _print_generated(generator, encoded, sampling, chat=messages is not None)
                if messages is not None:
                    messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
        except LoraTunerError as error:
            print_stderr(f"Error: {error}")


def _active_model(generator: "Generator") -> str:
    name = generator.current_adapter
    return f"Using adapter {name}." if name else "Using the base without an adapter."
