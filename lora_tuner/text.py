"""Text for users: sizes, durations, names without local paths, escaped control characters."""

import itertools
import math
import os
import re
from collections.abc import Collection
from pathlib import Path

from .config import CODE_EXTENSIONS, DATA_EXTENSIONS, data_extension

MAX_MESSAGE_CHARS = 20_000
# With lone surrogates.
CONTROL_CHARACTERS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")


def display_name(name: str) -> str:
    """Shorten a local path to its last part, so that it can be published; `a + b` part by part."""
    return " + ".join(_without_folders(part) for part in name.split(" + "))


def _without_folders(name: str) -> str:
    path = Path(os.path.expanduser(name))
    # A Hub id has at most two parts and does not begin with a dot; everything else was a path.
    is_local = path.is_absolute() or len(path.parts) > 2 or name.startswith((".", "~")) or os.path.exists(path)
    is_local = is_local or data_extension(path) in DATA_EXTENSIONS + CODE_EXTENSIONS
    return os.path.basename(os.path.abspath(path)) if name and is_local else name


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


def format_bytes(count: float) -> str:
    """Format bytes with decimal units."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    if count >= 1e5:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e3:.0f} kB" if count >= 1e3 else f"{count:.0f} bytes"


def format_counts(counts: dict[str, int]) -> str:
    """Format the counts that are not 0, such as "3 read, 1 empty"."""
    return ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in counts.items() if count)


def format_rows(rows: int, groups: int | None = None) -> str:
    """Format a number of rows, and of their groups if they are grouped, as in "12 rows in 3 groups"."""
    text = f"{rows:,} row{'s' * (rows != 1)}"
    return text if groups is None else f"{text} in {groups} group{'s' * (groups != 1)}"


def format_gain(gain: float, standard_error: float | None, digits: str = ".4f") -> str:
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
