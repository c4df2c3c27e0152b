"""Inputs of the interactive prompt.

On a terminal they are edited by prompt_toolkit, with a history that the next session has too;
elsewhere each line is read by `input`.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..atomic_io import cache_dir
from ..errors import LoraTunerError

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyPressEvent

PROMPT = "Enter a prompt for text generation: "
HISTORY_FILE = "prompts"  # in the cache folder


def is_terminal() -> bool:
    """Return whether inputs can be edited: stdin and stdout are a terminal that moves its cursor."""
    is_dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return sys.stdin.isatty() and sys.stdout.isatty() and not is_dumb


def input_reader(completions: Callable[[], list[str]]) -> Callable[[], str]:
    """Return a function that reads an input, and raises EOFError behind the last one.

    Args:
        completions: texts that the Tab key completes, on a terminal.
    """
    return _open_editor(completions) if is_terminal() else _read_input


def _read_input() -> str:
    """Read a line, and those after it while one ends in a backslash. Raises EOFError."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # if it has been read from
            sys.stdin.reconfigure(errors="surrogateescape")  # invalid UTF-8 becomes an error later
    text = input(PROMPT).removeprefix("\ufeff")
    while text.endswith("\\"):
        text = text[:-1]
        with contextlib.suppress(EOFError):
            text += f"\n{input()}"
    return text


def _open_editor(completions: Callable[[], list[str]]) -> Callable[[], str]:
    """Return a function that reads an input with line editing, history and completion."""
    # Without it, a terminal that does not tell where its cursor is gets a warning.
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.shortcuts import CompleteStyle

    keys, is_input = KeyBindings(), has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=is_input)
    def _enter(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=is_input)
    def _new_line(event: "KeyPressEvent") -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=is_input)
    def _clear(event: "KeyPressEvent") -> None:
        event.current_buffer.reset()

    session: PromptSession[str] = PromptSession(
        [("fg:default", PROMPT)],  # without any style the space at its end would not be written
        multiline=True,  # so that pasted lines are one input
        prompt_continuation="",
        history=_open_history(),
        key_bindings=keys,
        completer=WordCompleter(completions, sentence=True),
        complete_style=CompleteStyle.READLINE_LIKE,
        complete_while_typing=False,
        enable_suspend=True,
    )
    return session.prompt


def _open_history() -> "History":
    """Return the inputs of past sessions, in a file of the cache that others cannot read; where it
    cannot be written, those of this session."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class PrivateHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # such as a full disk
                super().store_string(string)

    try:
        path = cache_dir() / HISTORY_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
    except (OSError, LoraTunerError):
        return InMemoryHistory()
    return PrivateHistory(path)
