"""Text for people: sizes, durations, names without local paths, control characters escaped."""

import os
import re
from pathlib import Path

from .config import DATA_EXTENSIONS


def display_name(name: str) -> str:
    """A name for strangers: of a path on this machine, its last part. Of `a + b` each by itself."""

    def last(part: str) -> str:
        path = Path(os.path.expanduser(part))
        # An id on the Hub has two parts at the most, and begins with no dot: what looks otherwise was a path once.
        local = path.is_absolute() or len(path.parts) > 2 or part.startswith((".", "~")) or os.path.exists(path)
        return os.path.basename(os.path.abspath(path)) if part and (local or path.suffix in DATA_EXTENSIONS) else part

    return " + ".join(last(part) for part in name.split(" + "))


CONTROL_CHARACTERS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")  # and halves of characters


def escape_control(text: str) -> str:
    """Text of unknown origin without what a terminal would obey."""
    return CONTROL_CHARACTERS.sub("\ufffd", text)


def one_line(text: str) -> str:
    """The same on one line: nobody's text begins another."""
    return escape_control(text).replace("\n", " ")


def format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    count, unit = (
        (seconds / 60, "min")
        if seconds < 5400
        else (seconds / 3600, "h")
        if seconds < 48 * 3600
        else (seconds / 86400, "d")
    )
    return f"{count:.1f} {unit}" if count < 10 else f"{count:,.0f} {unit}"


def format_bytes(count: float) -> str:
    return (
        f"{count / 1e9:.1f} GB"
        if count >= 1e9
        else f"{count / 1e6:.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:.0f} kB"
        if count >= 1e3
        else f"{count:.0f} bytes"
    )


def format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in counts.items() if count)
