"""The interactive prompt of `generate`: a session of prompts and commands."""

import contextlib
import signal
import sys
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from ..adapters.adapter import Adapter
from ..config import INVALID_TEXT, SamplingParams
from ..errors import ConfigError, LoraTunerError
from ..settings_files import resolve_settings
from ..text import format_names
from ..training.signals import handle_signals
from .display import BASE_LABEL, describe_template, print_outputs, print_stderr, show_text
from .line_editor import input_reader, is_terminal
from .options import Overrides

if TYPE_CHECKING:
    from ..data.chat import Message
    from ..data.row_template import Template
    from ..inference.generator import GenerationOutput, Generator

ANSWER = "Generated text: "
COMMANDS = {
    "/help": "list these commands",
    "/adapters": "list the adapters",
    "/adapter NAME": "use another adapter",
    "/base": "use the base without an adapter",
    "/temperature [X]": "show or set it; 0: always the most likely token",
    "/seed [N|random]": "show or set the seed of what is sampled",
    "/retry": "generate for the last prompt again",
    "/new": "begin a new conversation",
    "/quit": "quit",
}
KEYS = """Pasted lines are one input; so are lines that end in \\ or with Alt-Enter.
The arrow keys recall earlier inputs; Ctrl-C clears the line, or stops a text.
An empty line or Ctrl-D quits."""


def run_interactive(
    generator: "Generator", settings: Overrides, chat: bool | None, opening: "list[Message]"
) -> None:
    """Read prompts and commands until an empty line or the end of the input.

    Args:
        settings: sampling settings of the command line.
        chat: treat inputs as messages of a conversation; None: as the current adapter has learned.
        opening: first messages of every conversation.
    """
    session = _Session(generator, settings, chat, opening)
    print_stderr(session.describe_model())
    print_stderr("/help lists the commands; an empty line quits.")
    read = input_reader(session.completions)
    with handle_signals((signal.SIGINT,) if is_terminal() else (), _stop):
        while True:
            try:
                text = read()
                if not text.strip():
                    return
                session.handle(text)
            except EOFError:
                return
            except LoraTunerError as error:
                print_stderr(f"Error: {error}")
            except _Stopped:
                show_text("\n")
                print_stderr("Stopped: this turn is left out." if session.is_chat else "Stopped.")


class _Stopped(KeyboardInterrupt):
    """Ctrl-C while a text is generated or an adapter is loaded."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _Stopped


@dataclass
class _Session:
    """Settings and conversation of an interactive prompt."""

    generator: "Generator"
    settings: Overrides
    chat: bool | None
    opening: "list[Message]"
    last_prompt: str | None = None
    last_output: "GenerationOutput | None" = None
    last_choice: tuple[object, ...] = ()  # adapter and settings that the last prompt was answered with
    retries: int = 0  # of the last prompt, with one seed
    messages: "list[Message]" = field(init=False)  # of the conversation
    turn_start: int = 0  # number of `messages` before the last turn

    def __post_init__(self) -> None:
        self.messages = list(self.opening)

    @property
    def sampling(self) -> SamplingParams:
        return resolve_settings(SamplingParams, self.settings)

    @property
    def is_chat(self) -> bool:
        return self.generator.is_chat(self.generator.current_adapter) if self.chat is None else self.chat

    @property
    def template(self) -> "Template | None":
        """The template through which the current adapter is asked."""
        is_bare = self.chat is not None or self.is_chat
        return None if is_bare else self.generator.template_of(self.generator.current_adapter)

    def handle(self, text: str) -> None:
        """Run a command, or generate for a prompt. Raises LoraTunerError, and changes nothing."""
        if INVALID_TEXT.search(text):
            raise ConfigError("The input is not valid UTF-8 text: type it again.")
        if text.startswith("/") and "\n" not in text.strip():
            self.run_command(text.strip())
        else:
            self.answer(text, self.sampling, len(self.messages))

    def run_command(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        match command, argument.strip():
            case "/help", "":
                width = max(map(len, COMMANDS))
                lines = [f"{name:{width}}  {text}" for name, text in COMMANDS.items()]
                print(*lines, KEYS, sep="\n", file=sys.stderr)
            case "/adapters", "":
                self.list_adapters()
            case "/adapter", name if name:
                self.generator.set_adapter(name)
                print_stderr(self.describe_model())
            case "/adapter", _:
                raise ConfigError(f"/adapter needs a name. Adapters: {format_names(self._names()) or 'none'}.")
            case "/base", "":
                self.generator.set_adapter(None)
                print_stderr(self.describe_model())
            case "/temperature", value:
                self.set_temperature(value)
            case "/seed", value:
                self.set_seed(value)
            case "/retry", "":
                self.retry()
            case "/new", "":
                if not self.is_chat:
                    raise ConfigError("There is no conversation: each prompt is continued by itself.")
                self.messages, self.turn_start = list(self.opening), len(self.opening)
                print_stderr("New conversation.")
            case "/quit" | "/exit", "":
                raise EOFError
            case _:
                raise ConfigError(
                    f"Unknown command {line}. Commands: {', '.join(COMMANDS)}; an empty line quits. A prompt may begin "
                    "with a space before its /."
                )

    def answer(self, text: str, sampling: SamplingParams, turn_start: int) -> None:
        """Generate for a prompt; of a chat it replaces the messages from `turn_start` on."""
        history = self.messages[:turn_start]
        question: Message = {"role": "user", "content": text}
        encoded = self.generator.encode_prompt([*history, question] if self.is_chat else self.fill(text))
        self.last_prompt, self.turn_start = text, turn_start
        self.last_choice = self.generator.current_adapter, self.is_chat, self.sampling
        show_text(ANSWER if sampling.n == 1 else f"{ANSWER}\n")
        output = print_outputs(self.generator, encoded, sampling)
        self.last_output = output
        if encoded.chat:
            self.messages = [*history, question, {"role": "assistant", "content": output.text}]

    def fill(self, text: str) -> str:
        """Return a prompt in the template that the current adapter has learned."""
        name = self.generator.current_adapter
        if name is None or (template := self.template) is None:
            return text
        from ..data.row_template import fill_questions

        if r"\n" in text:
            print_stderr(describe_template(name, template, [text])[-1])
        return fill_questions(text, {name: template})[name]

    def retry(self) -> None:
        """Generate for the last prompt again, with the next seed if nothing has changed."""
        if self.last_prompt is None:
            raise ConfigError("There is no prompt to generate for again: enter one first.")
        sampling = self.sampling
        if self.last_choice != (self.generator.current_adapter, self.is_chat, sampling):
            self.retries = 0
        elif sampling.is_greedy:
            raise ConfigError("The most likely tokens are the same again: set /temperature above 0 first.")
        elif sampling.seed is not None:
            self.retries += 1
            seed = (sampling.seed + self.retries * sampling.n) % 2**63
            sampling = sampling.model_copy(update={"seed": seed})
            print_stderr(f"Seed {seed}.")
        self.answer(self.last_prompt, sampling, self.turn_start)

    def set_temperature(self, value: str) -> None:
        if value:
            settings = {
                name: each for name, each in self.settings.items() if name not in ("greedy", "temperature")
            }
            settings["temperature"] = value
            if resolve_settings(SamplingParams, {"temperature": value}).is_greedy:
                settings.pop("seed", None)
            resolve_settings(SamplingParams, settings)
            self.settings = settings
        sampling = self.sampling
        greedy = "Temperature 0: always the most likely token, whatever the seed."
        print_stderr(greedy if sampling.is_greedy else f"Temperature {sampling.temperature:g}.")

    def set_seed(self, value: str) -> None:
        sampling = self.sampling
        if sampling.is_greedy:
            raise ConfigError("The most likely tokens need no seed: set /temperature above 0 first.")
        if value:
            settings = {name: each for name, each in self.settings.items() if name != "seed"}
            if value != "random":
                settings["seed"] = value
            sampling = resolve_settings(SamplingParams, settings)
            self.settings, self.retries = settings, 0
        last = (
            f" The last text had {self.last_output.seed}."
            if self.last_output and self.last_output.seed is not None
            else ""
        )
        print_stderr(f"Seed {'random' if sampling.seed is None else sampling.seed}.{last}")

    def list_adapters(self) -> None:
        """Print the base and each adapter, with what is in use and what cannot be used."""
        entries = dict(self.generator.library.entries())
        for name in [BASE_LABEL, *self._names()]:
            facts, entry = [], entries.get(name)
            if isinstance(entry, Adapter) and entry.is_chat:
                facts.append("chat")
            if isinstance(entry, LoraTunerError):
                facts.append("broken")
            if name == (self.generator.current_adapter or BASE_LABEL):
                facts.append("in use")
            print_stderr(f"{name}{'  ' * bool(facts)}{', '.join(facts)}")

    def _names(self) -> list[str]:
        return sorted({*self.generator.library.names(), *self.generator.loaded_adapters})

    def describe_model(self) -> str:
        name = self.generator.current_adapter
        through = ", through its chat template" if self.is_chat else ""
        if not name:
            return f"Using the base without an adapter{through}."
        learned = describe_template(name, self.template, [""]) if self.template else []
        return " ".join([f"Using adapter {name}{through}.", *learned])

    def completions(self) -> list[str]:
        """Commands that the Tab key completes."""
        with contextlib.suppress(LoraTunerError, OSError):
            names = self._names()
            return [*(name.partition(" ")[0] for name in COMMANDS), *(f"/adapter {name}" for name in names)]
        return []
