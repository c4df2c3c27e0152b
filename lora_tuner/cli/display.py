"""Terminal output: data to stdout, messages to stderr. Untrusted text is escaped."""

import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..adapters import summaries
from ..adapters.manifest import EvalResult, SourceInfo
from ..adapters.preference_info import PreferenceInfo
from ..config import SamplingParams
from ..text import CONTROL_CHARACTERS, as_typed, describe_gain, escape_control, format_gain, one_line, shorten
from .streams import is_reader_gone, stdout_error

if TYPE_CHECKING:
    from ..inference.generator import EncodedPrompt, GenerationOutput, Generator

BASE_LABEL = summaries.BASE_LABEL


def print_stderr(text: str) -> None:
    print(shorten(one_line(as_typed(text))), file=sys.stderr)


def describe_template(name: str, template: tuple[str, str | None], prompts: Iterable[str]) -> list[str]:
    """Return notices: through which template an adapter is asked, or how a prompt is to be typed for
    it; none where all prompts are typed so.

    Args:
        template: the text of the template, and the column of the answer.
        prompts: as they were typed.
    """
    from ..data.row_template import fill_question, question_form

    form, notices = question_form(*template), list[str]()
    start = form.partition("...")[0].rstrip()
    line_breaks = " in bash; when asked, Alt-Enter is a line break" if "\n" in form else ""
    if not all(start and prompt.startswith(start) for prompt in prompts):
        learned = f"{name} has learned texts of the form " + template[0].replace("\n", "\\n")
        if fill_question(*template, "") is not None:
            notices.append(f"{learned}: asking through it (--no-chat: bare text).")
        else:
            notices.append(
                f"{learned}: write prompts so up to the answer, as {quote_argument(form)}{line_breaks}."
            )
    if "\n" in form and any(r"\n" in prompt and "\n" not in prompt for prompt in prompts):
        notices.append(
            r"The prompt has \n as two characters, which is no line break: write "
            f"{quote_argument(form)}{line_breaks}."
        )
    return notices


def quote_argument(text: str) -> str:
    r"""Return a text as an argument of a command; with line breaks as bash reads it, such as $'a\nb'."""
    if "\n" not in text:
        return shlex.quote(text)
    escaped = text.replace("\\", r"\\").replace("'", r"\'").replace("\n", r"\n")
    return f"$'{escaped}'"


def color_system() -> Literal["auto"] | None:
    """Argument of rich's Console: with NO_COLOR, text is printed without bold and dim too."""
    return None if os.environ.get("NO_COLOR") else "auto"


def show_text(text: str, style: Literal["", "bold", "dim"] = "") -> None:
    """Print generated text unchanged; on a terminal, escape control characters, and show the style.

    Ends the command when nobody reads its text any more.
    """
    shown = escape_control(text) if sys.stdout.isatty() else text
    if style and text and sys.stdout.isatty() and stdout_console().color_system not in (None, "windows"):
        shown = typer.style(shown, bold=style == "bold" or None, dim=style == "dim" or None)
    print(shown, end="", flush=True)
    if error := stdout_error():
        raise typer.Exit(1) if is_reader_gone(error) else OSError(error.errno, error.strerror, "stdout")


def show_json(data: object) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False)
    print(CONTROL_CHARACTERS.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def print_table(
    rows: Iterable[Sequence[str]], header: Sequence[str] = (), *, droppable: Sequence[str] = ()
) -> None:
    """Print a table. Of one that is too wide, `droppable` columns are left out before cells are broken."""
    if droppable:
        columns = list(zip(header, *rows, strict=True))
        for name in droppable:
            width = sum(max(map(cell_len, column)) for column in columns) + 2 * (len(columns) - 1)
            if width > stdout_console().width:
                columns = [column for column in columns if column[0] != name]
        header, *rows = zip(*columns, strict=True)
    grid = Table(box=None, pad_edge=False, show_header=bool(header), header_style="bold")
    for name in header:
        grid.add_column(Text(escape_control(name)), overflow="fold")
    for row in rows:
        grid.add_row(*(Text(escape_control(cell), overflow="fold") for cell in row))
    stdout_console().print(grid)


def print_parts(parts: Iterable[summaries.Table | str]) -> None:
    """Print tables, and sentences on lines that fit the terminal."""
    for part in parts:
        if isinstance(part, str):
            print_wrapped(part)
        else:
            print_table(part.rows, part.header, droppable=part.droppable)


def stdout_console() -> Console:
    """Console for stdout; very wide in a pipe, so that each row stays on one line."""
    console = Console(highlight=False, color_system=color_system())
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    return console


def print_wrapped(text: str | Text, label: str = "") -> None:
    """Print a text beside a label, on lines that fit the terminal and break between words.

    No white space ends a line. In a pipe lines are as long as they are.
    """
    console = stdout_console()
    text = Text(text) if isinstance(text, str) else text
    lines = text.wrap(console, max(20, console.width - len(label)), overflow="fold") or [Text()]
    for number, line in enumerate(lines):
        shown = Text.assemble(" " * len(label) if number else label, line)
        shown.rstrip()
        console.print(shown, soft_wrap=True)


def format_result(result: EvalResult | None, sources: Sequence[SourceInfo] = ()) -> list[str]:
    """Held-out loss, gain and perplexity, on two lines; then loss and gain of each source."""
    if result is None:
        return ["not evaluated"]
    before, after = result.perplexities
    lines = [_format_loss(result), f"perplexity    {before:.2f} -> {after:.2f}  ({describe_gain(result.gain)})"]
    if not any(source.result for source in sources):  # measured on other rows
        return lines
    return [*lines, *(f"{one_line(source.name)}: {_format_loss(source.result)}" for source in sources)]


def _format_loss(result: EvalResult | None) -> str:
    if result is None:
        return "no held-out row"
    gain = format_gain(result.gain, result.standard_error)
    return f"held-out loss {result.base_loss:.3f} -> {result.loss:.3f}  (gain {gain}, {result.format_rows()})"


def print_result(result: EvalResult | None, sources: Sequence[SourceInfo] = ()) -> None:
    print(*format_result(result, sources), sep="\n")


def print_preference(preference: PreferenceInfo) -> None:
    """Print what preferences have taught; the held-out loss is that of the chosen answers."""
    for name, text in preference.lines():
        label = name.removeprefix("preference ").removeprefix("accuracy ")
        print_wrapped(text, f"{label:<13} ")


def print_picture(path: Path, shows: str) -> None:
    """Say where the picture of a result is."""
    print(one_line(f"picture: {path} ({shows})"))


def show_fields(fields: Mapping[str, object]) -> None:
    """Print names and values as a table of two columns, without unknown values."""
    print_table((key, _format_value(value)) for key, value in fields.items() if value not in (None, {}, []))


def _format_value(value: object) -> str:
    if isinstance(value, dict):
        present = {key: entry for key, entry in value.items() if entry not in (None, {}, [])}
        return "\n".join(f"{key}: {_format_value(entry)}" for key, entry in present.items())
    texts = [str(entry) for entry in value] if isinstance(value, list | tuple) else [str(value)]
    return ("\n" if any(" " in text for text in texts) else ", ").join(texts)


def heading(*counts: tuple[str, int, int]) -> str:
    """Line that parts outputs, such as `--- prompt 1 of 2, output 3 of 3`; empty for a single one.

    Args:
        counts: name, number and count of a kind; one of which there is a single one is left out.
    """
    parts = [f"{name} {number:,} of {count:,}" for name, number, count in counts if count > 1]
    return f"--- {', '.join(parts)}\n" if parts else ""


def quote(question: str) -> str:
    """Mark the lines of a question, so that it differs from its answer without styles too."""
    return "".join(f"> {line}\n" for line in question.splitlines() or [""])


def print_outputs(
    generator: "Generator", prompt: "EncodedPrompt", sampling: SamplingParams, number: int = 1, count: int = 1
) -> "GenerationOutput":
    """Print the outputs for a prompt, which is `number` of `count`; a single one is streamed.

    A text is printed with its prompt, an answer alone or, of several prompts, after its question.
    Returns the first output.
    """
    outputs = [] if sampling.n == 1 else generator.generate_all(prompt, sampling)
    for index in range(sampling.n):
        parting = heading(("prompt", number, count), ("output", index + 1, sampling.n))
        show_text(parting, "dim")
        if not prompt.chat:
            show_text(prompt.text, "bold")
        elif count > 1 and index == 0:
            show_text(quote(prompt.text), "bold")
        if sampling.n == 1:
            outputs.append(generator.generate(prompt, sampling, on_text=show_text))
        else:
            show_text(outputs[index].text)
        show_text("\n\n" if parting else "\n")
    return outputs[0]
