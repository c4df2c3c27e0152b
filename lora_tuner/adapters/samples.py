"""Texts of base and adapter for the same prompts (samples.jsonl), generated in training."""

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from ..errors import AdapterError
from ..text import escape_control, shorten

COLUMNS = ["Prompt", "Base", "Adapter"]
SAMPLES_FILE = "samples.jsonl"
_SHOWN_CHARS = 300  # of a prompt, at most
_MAX_BYTES = 10_000_000


class Sample(BaseModel, extra="forbid", frozen=True):
    """A prompt continued by the base and by the adapter after `step` steps, with the same seed.

    `chat`: it was asked through the chat template. `base_cut`, `adapter_cut`: a limit ended the text.
    """

    step: int
    prompt: str
    base: str
    adapter: str
    chat: bool = False
    base_cut: bool = False
    adapter_cut: bool = False

    @property
    def shown(self) -> tuple[str, str, str]:
        """Prompt, which is shortened if it is long, and both texts, with a mark where a limit ended them."""
        base, adapter = self.base + "\u2026" * self.base_cut, self.adapter + "\u2026" * self.adapter_cut
        return shorten(self.prompt, _SHOWN_CHARS), base, adapter


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(sample.model_dump_json() + "\n" for sample in samples), encoding="utf-8")


def read_samples(path: Path) -> list[Sample]:
    """Read the samples in a file; none where there is no file. Raises AdapterError for a damaged one."""
    if not path.exists():
        return []
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:  # a pipe would block
            raise ValueError("it is no regular file, or too large")
        return [Sample.model_validate_json(line) for line in path.read_bytes().splitlines()]
    except ValidationError as error:
        first = error.errors()[0]
        problem = " ".join([*map(str, first["loc"]), first["msg"]])
        raise AdapterError(f"{path} has a line that is no sample: {problem}.") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}.") from error


def samples_table(samples: Sequence[Sample]) -> str:
    """Format prompts with the texts of base and adapter as a table in Markdown."""
    rows = [[*map(_format_cell, sample.shown)] for sample in samples]
    return "".join(f"| {' | '.join(row)} |\n" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows])


def _format_cell(text: str) -> str:
    """Write a text into a cell of a table as it is, with its line breaks."""
    lines = re.sub(r"([\\`*_\[\]|~#$&<>]|:(?=//))", r"\\\1", escape_control(text).strip()).splitlines()
    return "<br>".join(line.strip() for line in lines)
