"""Losses and samples of a run so far, which arguments.LiveLog writes into its folder. No torch."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from ..adapters.adapter import METRICS_FILE, RUN_FILE
from ..adapters.plots import MAX_METRICS_BYTES
from ..adapters.samples import SAMPLES_FILE, Sample
from ..errors import ConfigError
from ..settings_files import read_settings

LogEntry = dict[str, Any]  # of numbers, or of samples
_RECENT_STEPS = 50  # of which the pace is that of now
_LAST_BYTES = 4_096  # of a file, which have its last line


@dataclass(frozen=True)
class LiveRun:
    """A run so far. The pace is that of its latest steps; what cannot be told yet is None.

    Attributes:
        metrics: Log entries: `step` with `loss`, `tokens`, `seconds`, `peak_memory_bytes`, with
            `eval_loss` or with `eval_subset_loss`.
        total: Steps of the whole run.
        memory_bytes: The most that the run has held.
        objective: The setting.
    """

    metrics: list[LogEntry]
    samples: list[Sample]
    total: int | None
    memory_bytes: int | None
    tokens_per_second: float | None
    seconds_left: float | None
    objective: str = "sft"


def read_live(folder: Path) -> LiveRun:
    """Read the files of a run, be it while it writes them: a torn or damaged line is left out."""
    metrics = _points(_read_lines(folder / METRICS_FILE))
    samples = []
    for entry in _read_lines(folder / SAMPLES_FILE):
        with contextlib.suppress(ValidationError):
            samples.append(Sample.model_validate(entry))
    settings: dict[str, object] = {}
    with contextlib.suppress(ConfigError):
        settings = read_settings(folder / RUN_FILE)
    steps = settings.get("max_steps")
    total = steps if isinstance(steps, int) else None
    trained = [entry for entry in metrics if {"loss", "tokens", "seconds"} <= entry.keys()]
    recent = trained[-_RECENT_STEPS:]  # of which a median leaves out a step with a pause
    paces = [entry["tokens"] / entry["seconds"] for entry in recent if entry["seconds"]]
    left = None
    if recent and total is not None:
        step_seconds = median(entry["seconds"] for entry in recent)
        left = step_seconds * max(0, total - recent[-1]["step"])
    return LiveRun(
        metrics=metrics,
        samples=samples,
        total=total,
        memory_bytes=recent[-1].get("peak_memory_bytes") if recent else None,
        tokens_per_second=median(paces) if paces else None,
        seconds_left=left,
        objective=str(settings.get("objective", "sft")),
    )


def last_step(folder: Path) -> int | None:
    """Return the last step that a run has logged; None if there is none."""
    path = folder / METRICS_FILE
    try:
        if not path.is_file():  # a pipe would block
            return None
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _LAST_BYTES))
            entries = _parse(file.read())
    except OSError:
        return None
    steps = [entry["step"] for entry in _points(entries)]
    return steps[-1] if steps else None


def _points(entries: list[LogEntry]) -> list[LogEntry]:
    """Return the entries of a log that have a step, and numbers alone."""
    numbers = [entry for entry in entries if all(type(value) in (int, float) for value in entry.values())]
    return [entry for entry in numbers if isinstance(entry.get("step"), int)]


def _read_lines(path: Path) -> list[LogEntry]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_METRICS_BYTES:  # a pipe would block
            return []
        return _parse(path.read_bytes())
    except OSError:
        return []


def _parse(text: bytes) -> list[LogEntry]:
    entries = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(entry := json.loads(line), dict):
                entries.append(entry)
    return entries
