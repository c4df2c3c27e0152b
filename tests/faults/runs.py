"""Runs to be stopped: how they are trained, and what becomes of them."""

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
# Of its measurements that of step 6 is the best, so that it ends at step 10.
PATIENT = (
    "--dropout", "0.1", "--max-steps", "20", "--eval-every", "2", "--patience", "2", "--schedule", "constant",
    "--learning-rate", "0.5", "--max-rows", "40",
)  # fmt: skip
STEP_END, MICRO_BATCH = (
    "lora_tuner.training.trainer:_StopOnSignal.on_step_end",
    "lora_tuner.training.trainer:_LoraTrainer.training_step",
)
RUN, ADAPTER = Path("runs/reviews"), Path("adapters/reviews")
slow = partial(pytest.param, marks=pytest.mark.slow)


def cases(quick: list[Any], all_of_them: list[Any]) -> list[Any]:
    """All of them, of which the quick ones are always tried."""
    return [pytest.param(*it) if it in quick else slow(*it) for it in all_of_them]


def outcome(adapter: Path) -> Any:
    """Everything that a run decides: the weights, and each loss on the way."""
    curve = [json.loads(line) for line in (adapter / METRICS_FILE).read_text().splitlines()]
    run = read_manifest(adapter).run
    assert run is not None
    return (adapter / WEIGHTS_FILE).read_bytes(), [(it["step"], it.get("loss"), it.get("eval_loss")) for it in curve], (
        run.steps, run.kept_step, run.tokens,
    )  # fmt: skip


def said_to_go_on(ended: CommandResult) -> list[str]:
    """The arguments of the command that the last line gives, as a shell reads them."""
    python, cli, *rest = shlex.split(ended.err.splitlines()[-1].partition("Go on with: ")[2])
    assert (python, cli) == ("python", "cli.py")
    return rest


def left() -> set[str]:
    """What is in the library, and where runs are, hidden things too."""
    return {str(path) for place in ("adapters", "runs") for path in Path(place).glob("*")}
