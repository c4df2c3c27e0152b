"""Read txt files: rows by lines or paragraphs, or a row of each file, as of documents."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..text import DOCUMENT_EXTENSIONS, MAIL_EXTENSIONS, data_extension
from .encodings import find_encoding
from .folders import split_of
from .opening import UnreadableFileError, open_file, text_lines
from .splitting import MIN_DOCUMENTS

AUTO_LINES = 1000  # lines that determine how a txt file is split into rows
_MAX_POEM_LINES = 100  # of a document without blank lines; more are a list
_MAX_DOCUMENT_BYTES = 5_000_000  # of a document; a larger file is a collection


def choose_txt_rows(path: Path, txt_rows: str, encoding: str, rules: list[str]) -> str:
    """Return how a txt file is split into rows: by its first lines, if the setting does not say it.

    Args:
        rules: Gets a line that says what was chosen.
    """
    if txt_rows not in ("auto", "blank"):
        return txt_rows
    chosen, _ = _look(path, encoding)
    rule = "blank lines separate rows"
    if chosen == "line":
        rule = f"one row per line, as the first {AUTO_LINES:,} lines have no blank line among them"
    rules.append(f"{rule}. Use --txt-rows to change this")
    return chosen


def _look(path: Path, encoding: str) -> tuple[str, int]:
    """Return "paragraph" if a blank line separates text in the first `AUTO_LINES`, else "line", and
    how many lines there are, up to that number."""
    with open_file(path) as file:
        lines = list(itertools.islice(text_lines(file, encoding), AUTO_LINES))
    return "paragraph" if re.search(r"\n\s*\n", "".join(lines).strip()) else "line", len(lines)


def read_txt(path: Path, txt_rows: str, encoding: str) -> Iterator[dict[str, object]]:
    """Yield the rows of a txt or code file: its lines, its paragraphs, or the file."""
    with open_file(path) as file:
        texts: Iterable[str] = text_lines(file, encoding)
        if txt_rows == "paragraph":
            texts = ("".join(lines) for is_blank, lines in itertools.groupby(texts, str.isspace) if not is_blank)
        elif txt_rows == "file":
            texts = ["".join(texts)]
        for text in texts:
            if text.strip():
                yield {"text": text if txt_rows == "file" else text.removesuffix("\n")}


def are_documents(files: Sequence[Path], encoding: str) -> bool:
    """Return whether the txt files among those of a folder are documents, so that each is one row.

    Most of them have paragraphs, or few lines, as poems have. Files that are named after splits,
    large ones, and long lists of lines are none.
    """
    txt_files = [file for file in files if data_extension(file) == ".txt"]
    others = [file for file in files if data_extension(file) in DOCUMENT_EXTENSIONS]
    others = [file for file in others if data_extension(file) not in MAIL_EXTENSIONS]
    count = len(txt_files) + len(others)
    if (
        not txt_files
        or count < 2
        or 2 * sum(split_of(file.name) is not None for file in txt_files) > len(txt_files)
    ):
        return False
    documents = sum(_is_document(file, encoding, allow_lines=count >= MIN_DOCUMENTS) for file in txt_files)
    return 2 * documents > len(txt_files)


def _is_document(path: Path, encoding: str, *, allow_lines: bool) -> bool:
    try:
        if path.stat().st_size > _MAX_DOCUMENT_BYTES:
            return False
        chosen, lines = _look(path, find_encoding(path, encoding)[0])
    except (OSError, UnreadableFileError):  # reading it says so
        return True
    return chosen == "paragraph" or (allow_lines and lines <= _MAX_POEM_LINES)
