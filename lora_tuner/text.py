"""Text for users: sizes, durations, lists. Names of adapters and datasets; extensions of files."""

import datetime
import difflib
import itertools
import math
import os
import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

WORKBOOK_EXTENSIONS, DATABASE_EXTENSIONS = (".xlsx", ".xlsm"), (".db", ".sqlite", ".sqlite3")
TABLE_EXTENSIONS = WORKBOOK_EXTENSIONS + DATABASE_EXTENSIONS  # files of several tables
MARKDOWN_EXTENSIONS = (".md", ".markdown")
MAIL_EXTENSIONS = (".eml", ".mbox")
DOCUMENT_EXTENSIONS = (*MARKDOWN_EXTENSIONS, ".html", ".htm", ".docx", ".epub", *MAIL_EXTENSIONS)
DATA_EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet", *TABLE_EXTENSIONS, *DOCUMENT_EXTENSIONS)
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_COMPRESSIBLE = {*DATA_EXTENSIONS} - {".parquet", *TABLE_EXTENSIONS, ".docx", ".epub"}
_CODE_FILES = (
    ".py .pyi .js .mjs .jsx .ts .tsx .java .kt .scala .c .h .cc .cpp .hpp .cs .rs .go .rb .php "
    ".swift .lua .pl .r .jl .hs .ml .ex .exs .clj .sh .bash .zsh .ps1 .sql .yaml .yml .toml .ini "
    ".cfg .rst .tex .css .vue .tf .proto"
)
CODE_EXTENSIONS = tuple(_CODE_FILES.split())  # files that are one row each, as written
# Names of adapters; names of Windows devices are excluded.
NAME_PATTERN = re.compile(r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)$)[A-Za-z][A-Za-z0-9_-]{0,63}")
MAX_MESSAGE_CHARS = 20_000
PROGRAM, SCRIPT = "python cli.py", "lora-tuner"  # the latter is installed as a command
GAIN_SCALE = "0.69: each token twice as likely"  # ln 2, as a gain is in nats per token
# With lone surrogates.
CONTROL_CHARACTERS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")


def as_typed(text: str) -> str:
    """Return a text whose commands begin as this process did: a wheel has no cli.py."""
    return text.replace(PROGRAM, SCRIPT) if Path(*sys.argv[:1]).stem == SCRIPT else text


def display_name(name: str) -> str:
    """Shorten a local path to its last part, so that it can be published; `a + b` part by part."""
    return " + ".join(_without_folders(part) for part in name.split(" + "))


def _without_folders(name: str) -> str:
    path = Path(os.path.expanduser(name))
    # A Hub id has at most two parts and does not begin with a dot; everything else was a path.
    is_local = path.is_absolute() or len(path.parts) > 2 or name.startswith((".", "~")) or os.path.exists(path)
    is_local = is_local or data_extension(path) in DATA_EXTENSIONS + CODE_EXTENSIONS
    return os.path.basename(os.path.abspath(path)) if name and is_local else name


def data_extension(path: Path) -> str:
    """Return the extension of a file in lower case; of compressed text the one before, as in a.csv.gz."""
    extension, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    return inner if extension in _COMPRESSED and inner in _COMPRESSIBLE else extension


def split_weight(entry: str) -> tuple[str, float | None]:
    """Split `name=0.7` into the name of a dataset and its weight, None without one."""
    name, equals, number = entry.rpartition("=")
    if not equals or os.path.lexists(os.path.expanduser(entry)):
        return entry, None
    try:
        return name, float(number)
    except ValueError:
        return entry, None


def default_adapter_name(*datasets: str) -> str:
    """Derive an adapter's name from its datasets: the last part of each path or id, made valid."""
    stems = []
    for dataset in datasets:
        path = Path(dataset)
        is_file = data_extension(path) in DATA_EXTENSIONS + CODE_EXTENSIONS
        if path.suffix.lower() in _COMPRESSED:
            path = Path(path.stem)
        stems.append(path.stem if is_file else dataset.rstrip("/").rpartition("/")[2])
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(stems)).strip("-")[:64]
    return name if NAME_PATTERN.fullmatch(name) else f"data-{name}"[:64].rstrip("-")


def escape_control(text: str) -> str:
    """Replace the characters that a terminal would interpret, in text of unknown origin."""
    return CONTROL_CHARACTERS.sub("\ufffd", text)


def one_line(text: str) -> str:
    """Escape control characters and replace newlines by spaces."""
    return escape_control(text).replace("\n", " ")


def shorten(text: str, most: int = MAX_MESSAGE_CHARS) -> str:
    """Leave out the middle of a text that is longer than `most` characters."""
    if len(text) <= most:
        return text
    return f"{text[: most * 3 // 4]} ... {text[-most // 4 :]}"


def format_names(names: Collection[str], most: int = 20) -> str:
    """Join names, in a message, by commas. Of many the first are named, and the others counted."""
    listed = ", ".join(shorten(name, 100) for name in itertools.islice(names, most))
    return f"{listed} and {len(names) - most:,} more" if len(names) > most else listed


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a question, after a space, for the most similar of some names; empty without such a one.

    Extensions of files do not count.
    """
    by_stem = {Path(each).stem.lower(): each for each in names}
    matches = difflib.get_close_matches(Path(name).stem.lower(), by_stem, n=1)
    return f" Did you mean '{shorten(by_stem[matches[0]], 100)}'?" if matches else ""


def format_duration(seconds: float) -> str:
    """Format seconds as s, min, h or d."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        count, unit = seconds / 60, "min"
    elif seconds < 48 * 3600:
        count, unit = seconds / 3600, "h"
    else:
        count, unit = seconds / 86400, "d"
    return f"{count:.1f} {unit}" if count < 10 else f"{count:,.0f} {unit}"


def format_age(created: str) -> str:
    """Time since an ISO 8601 timestamp; `?` if it is invalid."""
    try:
        age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(created)
    except (ValueError, TypeError):  # TypeError: without a time zone
        return "?"
    return format_duration(max(age.total_seconds(), 0.0))


def format_created(created: str) -> str:
    """Format a timestamp as in "3 min ago"; `?` if it is invalid."""
    age = format_age(created)
    return age if age == "?" else f"{age} ago"


def format_bytes(count: float) -> str:
    """Format bytes with decimal units."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    if count >= 1e5:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e3:.0f} kB" if count >= 1e3 else f"{count:.0f} bytes"


def format_count(count: int, noun: str) -> str:
    """Format a number of things: "1 step", "2 steps"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def count_name(key: str) -> str:
    """Return the words for a key of row counts; manifests keep the key `not_drawn`."""
    return "not sampled" if key == "not_drawn" else key.replace("_", " ")


def format_counts(counts: dict[str, int]) -> str:
    """Format the counts that are not 0, such as "3 read, 1 duplicate"."""
    texts = []
    for key, count in counts.items():
        name = count_name(key)
        if count == 1 and name.endswith("duplicates"):
            name = name.removesuffix("s")
        if count:
            texts.append(f"{count:,} {name}")
    return ", ".join(texts)


def format_rows(rows: int, groups: int | None = None) -> str:
    """Format a number of rows, and of their groups if they are grouped, as in "12 rows in 3 groups"."""
    text = format_count(rows, "row")
    return text if groups is None else f"{text} in {format_count(groups, 'group')}"


def describe_gain(gain: float) -> str:
    """Say what a gain in nats per token means, as in "each token is 1.52 times as likely"."""
    ratio = math.exp(min(gain, 700.0))  # exp(710) overflows
    digits = ".2g" if ratio < 0.1 or ratio >= 1e6 else ".2f" if ratio < 100 else ",.0f"
    return f"each token is {ratio:{digits}} times as likely"


def format_gain(gain: float, standard_error: float | None, digits: str = ".3f") -> str:
    """Format a gain with its standard error, which is None for a single row, group or document."""
    if standard_error is None:
        return f"{gain:{digits}} (no error: one row or group)"
    error = f"{standard_error:{digits.lstrip('+')}}"
    if standard_error > 0 and float(error) == 0:
        error = f"<{error[:-1]}1"  # too small for the digits, but not nothing
    return f"{gain:{digits}} ± {error}"


def format_share(share: float) -> str:
    """Format a share as a percentage, rounded down, so that 100% is all of it."""
    return f"{math.floor(share * 1000 + 1e-6) / 10:g}%"


def format_coverage(share: float) -> str:
    """Format a share of weights as a whole percentage, 0% and 100% only for none and all of them."""
    if 0 < share < 0.01:
        return "under 1%"
    return f"{min(round(share * 100), 99) if share < 1 else 100}%"


def describe_coverage(coverage: float, not_adapted: Collection[str]) -> str:
    """Describe the share of the block weights in adapted layers, and what is not adapted."""
    rest = f"; not: {', '.join(not_adapted)}" if not_adapted else ""
    return f"{format_coverage(coverage)} of the block weights{rest}"


def format_share_of(part: int, total: int) -> str:
    """Format a part of a total as a percentage; a small one is not 0%."""
    share = part / max(total, 1)
    return "under 0.1%" if 0 < share < 0.001 else format_share(share)


def format_number(value: float) -> str:
    """Return the shortest text that gives the same number."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
