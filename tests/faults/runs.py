"""Settings of runs that are stopped, and their results."""

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_tuner.adapters.adapter import METRICS_FILE, WEIGHTS_FILE, read_manifest

from .process import CommandResult

HARD = (
    "--dropout",
    "0.1",
    "--gradient-accumulation",
    "2",
    "--max-steps",
    "9",
    "--save-every",
    "2",
    "--schedule",
    "cosine",
)
# With the best evaluation at step 6 (`best_at`) it ends at step 10.
PATIENT = ("--dropout", "0.1", "--max-steps", "20", "--eval-every", "2", "--patience", "2", "--max-rows", "40")
STEP_END, MICRO_BATCH = (
    "lora_tuner.training.trainer:StopOnSignal.on_step_end",
    "lora_tuner.training.trainer:LoraTrainer.training_step",
)
RUN, ADAPTER = Path("runs/reviews"), Path("adapters/reviews")
slow = partial(pytest.param, marks=pytest.mark.slow)


def cases(quick: list[Any], all_of_them: list[Any]) -> list[Any]:
    """Return all cases as parameters, those not in `quick` marked as slow."""
    return [pytest.param(*case) if case in quick else slow(*case) for case in all_of_them]


def outcome(adapter: Path) -> Any:
    """Return what a run decides: weights, all losses, steps and tokens."""
    curve = [json.loads(line) for line in (adapter / METRICS_FILE).read_text().splitlines()]
    run = read_manifest(adapter).run
    assert run is not None
    names = ("step", "loss", "eval_loss", "eval_subset_loss")
    losses = [[entry.get(name) for name in names] for entry in curve]
    return (adapter / WEIGHTS_FILE).read_bytes(), losses, (run.steps, run.kept_step, run.tokens)


def resume_arguments(ended: CommandResult) -> list[str]:
    """Return the arguments of the resume command in the last line, parsed as by a shell."""
    python, cli, *rest = shlex.split(ended.err.splitlines()[-1].partition("Resume with: ")[2])
    assert (python, cli) == ("python", "cli.py")
    return rest


def leftovers() -> set[str]:
    """Return all paths in the library and in the folder of the runs, hidden ones too."""
    return {str(path) for place in ("adapters", "runs") for path in Path(place).glob("*")}
