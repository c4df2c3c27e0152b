"""The commands `generate` and `compare`."""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..adapters.adapter import Adapter
from ..adapters.library import Library
from ..config import AUTO_MODEL, ModelOptions, SamplingParams
from ..errors import ConfigError, GenerationError, LoraTunerError, Notice
from ..settings_files import resolve_settings
from ..text import escape_control, format_names
from ..training.progress import display
from .auto import adapters_to_choose
from .display import (
    BASE_LABEL,
    color_system,
    describe_template,
    heading,
    print_outputs,
    print_stderr,
    quote,
    show_json,
    show_text,
)
from .interactive import run_interactive
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
    from ..inference.routing import Choice

MIN_COLUMN_WIDTH = 36  # characters; with less, texts are not shown side by side

FileOption = Annotated[Path | None, typer.Option(help="File with one prompt per line.", show_default=False)]
_CHAT_HELP = (
    "Ask through the chat template of the adapter, else of the base. --no-chat: continue the bare text, "
    "which is not filled into the --template of an adapter either."
)
ChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help=f"{_CHAT_HELP} The interactive prompt keeps the history of a chat.",
        show_default="chat, if the adapter has learned conversations",
    ),
]
CompareChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help=_CHAT_HELP,
        show_default="chat with each adapter that has learned conversations, and with the base if all have",
    ),
]
SystemOption = Annotated[
    str | None, typer.Option(help="System message of a chat.", show_default="the template's")
]


@settings_options(SamplingParams)
@model_options()
def generate(
    ctx: typer.Context,
    overrides: Overrides,
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Text to continue, or in a chat the question. - reads prompts from stdin, one per line. Without it, an "
            "interactive prompt starts.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Adapter, by name or path; auto: the one of the library that fits the prompt, or the base.",
            show_default="the base",
            autocompletion=complete_adapter_names,
        ),
    ] = None,
    file: FileOption = None,
    chat: ChatOption = None,
    system: SystemOption = None,
    as_json: JsonOption = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    *,
    options: ModelOptions,
) -> None:
    """Generate text from a prompt, or ask a question, with an adapter or with the base alone.

    python cli.py generate "The sea" --adapter poems
    python cli.py generate --adapter poems

    Docs: docs/tour.md, docs/chat.md
    """
    sampling, prompts = resolve_settings(SamplingParams, overrides), read_prompts(prompt, file)
    if prompts is None and as_json:
        raise ConfigError("--json needs prompts: give one as an argument, --file, or - for stdin.")
    if options.force and adapter is None:
        raise ConfigError("--force needs an adapter: name one with --adapter.")
    if is_given(ctx, "adapters_dir") and adapter is None and prompts is not None:
        raise ConfigError("--adapters-dir needs an adapter: name one with --adapter.")
    if adapter == AUTO_MODEL and prompts is None:
        raise ConfigError(
            f"--adapter {AUTO_MODEL} needs prompts: give one as an argument, --file, or - for stdin."
        )
    library = Library(adapters_dir)
    named = library.get_all([adapter] if adapter and adapter != AUTO_MODEL else [])
    adapters = adapters_to_choose(library) if adapter == AUTO_MODEL else named
    chat, opening = _check_chat(chat, system, adapters), _opening_messages(system)
    from ..inference.generator import Generator

    generator = Generator(*(loaded.path for loaded in adapters), options=options, adapters_dir=adapters_dir)
    if prompts is None:
        run_interactive(generator, overrides, chat, opening)
        return
    if adapter == AUTO_MODEL:
        asked = [_choose_and_encode(generator, text, chat, opening) for text in prompts]
    else:
        asked = [(encoded, None) for encoded in _encode_for_current(generator, prompts, chat, opening)]
    results: list[dict[str, object]] = []
    for number, (encoded, choice) in enumerate(asked, 1):
        if choice is not None:
            generator.set_adapter(choice.adapter)
            print_stderr(choice.describe())
        if as_json:
            routing = {"routing": choice.to_dict()} if choice is not None else {}
            results += [output.to_dict() | routing for output in generator.generate_all(encoded, sampling)]
        else:
            print_outputs(generator, encoded, sampling, number, len(asked))
    if as_json:
        show_json(results)


def _encode_for_current(
    generator: "Generator", prompts: list[str], chat: bool | None, opening: "list[Message]"
) -> "list[EncodedPrompt]":
    """Tokenize prompts in the form that the current adapter has learned, unless `chat` says which."""
    name = generator.current_adapter
    if chat is None and generator.is_chat(name):
        chat = True
        display(
            Notice(f"{name} has learned conversations: asking through its chat template (--no-chat: bare text).")
        )
    elif chat is None:
        prompts = _fill_prompts(generator, prompts, [name])[name]
    return _encode_prompts(generator, prompts, opening if chat else None, name)


def _choose_and_encode(
    generator: "Generator", prompt: str, chat: bool | None, opening: "list[Message]"
) -> "tuple[EncodedPrompt, Choice | None]":
    """Choose an adapter for a prompt, which becomes the current one, and tokenize the prompt for it."""
    from ..data.row_template import fill_questions
    from ..inference.routing import choose_adapter

    asked: dict[str, Prompt] = {}
    for name in generator.loaded_adapters:
        is_chat = generator.is_chat(name) if chat is None else chat
        filled = fill_questions(prompt, {name: generator.template_of(name)})[name] if chat is None else prompt
        asked[name] = _as_conversation(prompt, opening) if is_chat else filled
    choice = choose_adapter(generator, asked)
    generator.set_adapter(choice.adapter)
    return _encode_for_current(generator, [prompt], chat, opening)[0], choice


def _fill_prompts(
    generator: "Generator", prompts: list[str], names: Sequence[str | None]
) -> dict[str | None, list[str]]:
    """Return the prompts for each adapter in the template that it has learned; notices say so."""
    from ..data.row_template import fill_questions

    templates = {name: generator.template_of(name) for name in names if name}
    filled: dict[str | None, list[str]] = {}
    for prompt in prompts:
        for name, text in fill_questions(prompt, templates).items():
            filled.setdefault(name, []).append(text)
    for name, template in templates.items():
        for text in describe_template(name, template, prompts) if template else ():
            display(Notice(text))
    if None in names and filled[None] != prompts:
        display(Notice("The base is asked alike."))
    return filled


def _check_chat(chat: bool | None, system: str | None, adapters: Sequence[Adapter]) -> bool | None:
    """Return --chat or --no-chat, if one of them is given; a system message makes a chat of it.

    Raises ConfigError for a system message where text is to be continued.
    """
    if system is None or chat:
        return chat
    if chat is None and adapters and all(adapter.is_chat for adapter in adapters):
        return True
    raise ConfigError("--system needs --chat.")


def _opening_messages(system: str | None) -> "list[Message]":
    """First messages of every conversation."""
    return [{"role": "system", "content": system}] if system else []


def _as_conversation(text: str, messages: "list[Message] | None") -> "Prompt":
    """The text itself or, after `messages`, the next user message."""
    return text if messages is None else [*messages, {"role": "user", "content": text}]


def read_prompts(prompt: str | None, file: Path | None) -> list[str] | None:
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
    """Tokenize all prompts for an adapter before generation starts; with `opening` as messages.
    Raises GenerationError for a long prompt."""
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
        typer.Argument(
            help="Text to continue, or in a chat the question. - reads prompts from stdin, one per line.",
            show_default=False,
        ),
    ] = None,
    file: FileOption = None,
    chat: CompareChatOption = None,
    system: SystemOption = None,
    as_json: JsonOption = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    *,
    options: ModelOptions,
) -> None:
    """Run one prompt on the base and several adapters with the same seed, in one batch.

    python cli.py compare "The sea" --adapter poems --adapter tickets

    Docs: docs/tour.md, docs/chat.md
    """
    sampling, prompts = resolve_settings(SamplingParams, overrides), read_prompts(prompt, file)
    if prompts is None:
        raise ConfigError("There is no prompt: give one as an argument, --file, or - for stdin.")
    adapters = Library(adapters_dir).get_all(adapter)
    chat, opening = _check_chat(chat, system, adapters), _opening_messages(system)
    from ..inference.generator import Generator

    generator = Generator(*(loaded.path for loaded in adapters), options=options, adapters_dir=adapters_dir)
    names = [None, *(loaded.name for loaded in adapters)]
    results = []
    chats = _choose_chats(generator, names, chat)
    texts = dict.fromkeys(names, prompts)
    if chat is None:
        texts |= _fill_prompts(generator, prompts, names)
    encoded_by_name = [
        _encode_prompts(generator, texts[name], opening if name in chats else None, name) for name in names
    ]
    for encoded in zip(*encoded_by_name, strict=True):
        results.append(generator.generate_batch(list(zip(encoded, names, strict=True)), sampling))
    if as_json:
        show_json([output.to_dict() for outputs in results for output in outputs])
    else:
        for outputs in results:
            show_comparison(outputs, chats)


def _choose_chats(
    generator: "Generator", names: Sequence[str | None], chat: bool | None
) -> Collection[str | None]:
    """Return which of the adapters, and None for the base, are asked through a chat template.

    By default an adapter is asked if it has learned conversations, and the base if all of them
    have; a notice says so.
    """
    if chat is not None:
        return names if chat else ()
    chats = [name for name in names if generator.is_chat(name)]
    if len(chats) == len(names) - 1 and generator.tokenizer_of(None).chat_template:
        chats = list(names)
    if chats:
        asked = format_names([name or BASE_LABEL for name in chats])
        others = format_names([name or BASE_LABEL for name in names if name not in chats])
        rest = f"; continuing the text: {others} (--chat: ask all)" if others else ""
        display(Notice(f"Asking through the chat template: {asked} (--no-chat: bare text){rest}."))
    return chats


def show_comparison(outputs: Sequence["GenerationOutput"], chats: Collection[str | None] = ()) -> None:
    """Print the outputs for one prompt side by side or, on a narrow terminal, one after another.

    Those of `chats`, adapters or None for the base, are answers: the prompt is marked as a question.
    """
    is_mixed = len({output.adapter in chats for output in outputs}) > 1
    columns: dict[str, list[tuple[str, str]]] = {}  # name -> prompt and text of each output
    for output in outputs:
        name, shown_prompt = escape_control(output.adapter or BASE_LABEL), escape_control(output.prompt)
        if output.adapter in chats:
            name, shown_prompt = f"{name} (chat)" if is_mixed else name, quote(shown_prompt)
        columns.setdefault(name, []).append((shown_prompt, escape_control(output.text)))
    show_columns(columns, "output")


def show_columns(columns: dict[str, list[tuple[str, str]]], kind: str) -> None:
    """Print texts side by side or, on a narrow terminal, one after another.

    Args:
        columns: heading -> prompt and text of each row, without control characters.
        kind: what a row is, such as "output"; several are numbered.
    """
    console = Console(highlight=False, color_system=color_system())
    if console.width >= MIN_COLUMN_WIDTH * len(columns):
        grid = Table(box=None, padding=(0, 3, 1, 0), pad_edge=False, header_style="bold", expand=True)
        for name in columns:
            grid.add_column(Text(name), ratio=1)
        rows = list(zip(*columns.values(), strict=True))
        for number, row in enumerate(rows, 1):
            label = heading((kind, number, len(rows)))
            grid.add_row(*(Text.assemble((label, "dim"), (shown, "bold"), text) for shown, text in row))
        console.print(grid)
    else:
        for name, texts in columns.items():
            for shown_prompt, text in texts:
                console.print(Text(f"--- {name}", "bold"))
                show_text(shown_prompt, "bold")
                show_text(f"{text}\n\n")
