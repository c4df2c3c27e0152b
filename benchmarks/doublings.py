"""Coverage of the 80% intervals for what twice the rows, steps or rank would add to the gain (adapters/growth.py).

Tiny real runs of the embedded base on short rows of two texts. Each curve has five trials; the fourth is predicted
from the first three, and the fifth from the first four. The losses of each run are appended to runs.jsonl beside the
user's cache, and runs that are in it are not repeated.
"""

import contextlib
import json
import math
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_tuner import TrainConfig, atomic_io
from lora_tuner.adapters import growth
from lora_tuner.adapters.gains import HeldOutLoss, gain_covariance, paired_gain
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.data.dataset import load_dataset
from lora_tuner.errors import ignore_events
from lora_tuner.evaluation import held_out_loss
from lora_tuner.models.base_files import quiet_transformers
from lora_tuner.training.inputs import TrainingInputs, load_inputs, reload_rows
from lora_tuner.training.setup import prepare_training
from lora_tuner.training.trainer import LoraTrainer

from .measure import Figure, figure

ROWS, ROW_CHARS = 4_000, 240  # of each text; about 60 tokens
SIZES = (25, 50, 100, 200, 400)  # rows, of which a fifth is held out
LARGEST, HELD_OUT = 400, 80
SETTINGS: dict[str, object] = {
    "max_length": 128,
    "batch_size": 1,
    "learning_rate": 1e-3,
    "clean": "none",
    "save_every": 10_000,
}
FEWEST = growth.FEWEST_TRIALS


class Trial(NamedTuple):
    rows: int
    steps: int
    rank: int


CURVES = {
    "rows at equal steps": [Trial(rows, 64, 8) for rows in SIZES],
    "rows at equal epochs": [Trial(rows, rows * 2 // 5, 8) for rows in SIZES],  # a sequence has about two rows
    "steps": [Trial(LARGEST, steps, 8) for steps in (8, 16, 32, 64, 128)],
    "rank": [Trial(LARGEST, 32, rank) for rank in (1, 2, 4, 8, 16)],
}
BASE = Trial(0, 0, 0)
Run = tuple[str, int, Trial]  # text, seed, trial
Losses = dict[Run, HeldOutLoss]


class Case(NamedTuple):
    """A doubling: the trials before it, and how much more the trial after it gains than the last of them."""

    text: str
    seed: int
    curve: str
    values: list[int]
    gains: list[float]
    covariance: list[list[float]]
    added: float


def run(rounds: int) -> list[Figure]:
    """Takes about 15 minutes a round on two cores. Each round has its own seed, rows and held-out rows."""
    return summarize([*cases(measure(rounds))])


def measure(rounds: int) -> Losses:
    """Return the losses of all runs. Those that are missing are trained."""
    folder = atomic_io.cache_dir().with_name("lora_tuner-benchmarks") / "doublings"
    folder.mkdir(parents=True, exist_ok=True)
    losses, file = read_runs(folder), folder / "runs.jsonl"
    inputs: dict[tuple[str, int, int], TrainingInputs] = {}
    for seed, text in product(range(rounds), TEXTS):
        for trial in dict.fromkeys([BASE, *(trial for curve in CURVES.values() for trial in curve)]):
            if (text, seed, trial) in losses:
                continue
            start = time.perf_counter()
            loss = _train(_write_rows(folder, text), (text, seed, trial), inputs)
            losses[text, seed, trial] = loss
            with file.open("a", encoding="utf-8") as opened:
                opened.write(
                    json.dumps({"run": [text, seed, trial], "loss": asdict(replace(loss, tokens=[]))}) + "\n"
                )
            print(
                text,
                seed,
                *trial,
                f"{loss.loss:.4f}",
                f"{time.perf_counter() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return losses


def read_runs(folder: Path) -> Losses:
    """Return the losses that have been measured."""
    file = folder / "runs.jsonl"
    entries = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    )
    return {
        (text, seed, Trial(*trial)): HeldOutLoss(**entry["loss"])
        for entry in entries
        for text, seed, trial in [entry["run"]]
    }


def _train(data: Path, run: Run, inputs: dict[tuple[str, int, int], TrainingInputs]) -> HeldOutLoss:
    """Return the held-out loss of a trial, or of the base.

    Args:
        inputs: base and rows of the runs before, by text, seed and number of rows; this one adds its own.
    """
    text, seed, trial = run
    rows = trial.rows or LARGEST
    config = TrainConfig.model_validate(
        SETTINGS
        | {"dataset": str(data), "base": EMBEDDED_BASE, "seed": seed, "split_salt": f"doublings {seed}"}
        | {"max_rows": rows, "eval_max_rows": LARGEST, "eval_rows": HELD_OUT}
        | {"max_steps": trial.steps or 1, "rank": trial.rank or 8}
    )
    key = text, seed, rows
    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        if key not in inputs and inputs:
            inputs[key] = reload_rows(next(iter(inputs.values())), config, ignore_events)
        elif key not in inputs:
            inputs[key] = load_inputs(config, ignore_events)
        if trial == BASE:
            return held_out_loss.measure_base_loss(inputs[key].base, inputs[key].held_out)
        setup = replace(prepare_training(config, inputs=inputs[key]), curve=None)
        try:
            LoraTrainer(setup, Path(folder)).train()
            return held_out_loss.measure_loss(setup.model, setup.base, setup.held_out)
        finally:
            setup.remove_lora()


def cases(losses: Losses) -> Iterator[Case]:
    """Yield the doublings of curves, as far as their trials are measured."""
    for (text, seed), (curve, trials) in product(sorted({run[:2] for run in losses}), CURVES.items()):
        base = losses.get((text, seed, BASE))
        known = [losses[text, seed, trial] for trial in trials if (text, seed, trial) in losses]
        if (
            base is None
            or not known
            or known != [losses.get((text, seed, trial)) for trial in trials[: len(known)]]
        ):
            continue
        gains = [paired_gain(base, loss).gain for loss in known]
        covariance = gain_covariance(base, known)
        assert covariance is not None
        values = [getattr(trial, curve.split()[0]) for trial in trials]
        for count in range(FEWEST, len(known)):
            part = [line[:count] for line in covariance[:count]]
            yield Case(text, seed, curve, values[:count], gains[:count], part, gains[count] - gains[count - 1])


def summarize(found: Sequence[Case]) -> list[Figure]:
    """Return the coverage of all intervals, of each curve's and text's, and with constants of the other text."""
    figures = [_coverage("all doublings", found)]
    for curve in CURVES:
        figures.append(_coverage(curve, [case for case in found if case.curve == curve]))
    for text in TEXTS:
        own, others = ([case for case in found if (case.text == text) == is_own] for is_own in (True, False))
        figures.append(_coverage(text, own))
        if others:
            constants = fit_constants(others)
            with using(constants):
                name = f"{text}, with the constants of the other text ({', '.join(f'{c:g}' for c in constants)})"
                figures.append(_coverage(name, own))
    kept, change, noise = fit_constants(found)
    figures.append(figure("KEPT, CHANGE and RUN_NOISE of all", kept, "", f"{change:g}, {noise:g}"))
    return [each for each in figures if each]


def _coverage(name: str, found: Sequence[Case]) -> Figure:
    """Return the share of the doublings in their interval, with the bounds of 95% of binomials of 80%."""
    if not found:
        return {}
    predicted = [growth.predict_doubling(case.values, case.gains, case.covariance) for case in found]
    errors = [case.added - gain for case, (gain, _) in zip(found, predicted, strict=True)]
    widths = [growth.INTERVAL * error for _, error in predicted]
    inside = sum(abs(error) <= width for error, width in zip(errors, widths, strict=True))
    least, most = binomial_bounds(len(found), 0.8)
    note = (
        f"{inside} of {len(found)}, must be {least} to {most}; error {np.mean(np.abs(errors)):.4f} at a gain of "
    )
    note += f"{np.mean([case.added for case in found]):+.4f}, half an interval {np.mean(widths):.4f}"
    return figure(name, 100 * inside / len(found), "% covered", note)


def binomial_bounds(count: int, chance: float, level: float = 0.95) -> tuple[int, int]:
    """Return the least and the most hits of so many, leaving out at most half of 1 - `level` at either end."""
    chances = [
        math.comb(count, hits) * chance**hits * (1 - chance) ** (count - hits) for hits in range(count + 1)
    ]
    tail = (1 - level) / 2
    least = next(hits for hits in range(count + 1) if sum(chances[: hits + 1]) > tail)
    most = next(hits for hits in range(count, -1, -1) if sum(chances[hits:]) > tail)
    return least, most


@contextlib.contextmanager
def using(constants: tuple[float, float, float]) -> Iterator[None]:
    """Use other constants of the model in a block."""
    before = growth.KEPT, growth.CHANGE, growth.RUN_NOISE
    growth.KEPT, growth.CHANGE, growth.RUN_NOISE = constants
    try:
        yield
    finally:
        growth.KEPT, growth.CHANGE, growth.RUN_NOISE = before


def fit_constants(found: Iterable[Case]) -> tuple[float, float, float]:
    """Return the constants under which the doublings are likeliest."""
    found = list(found)

    def likelihood(constants: tuple[float, float, float]) -> float:
        total = 0.0
        with using(constants):
            for case in found:
                gain, error = growth.predict_doubling(case.values, case.gains, case.covariance)
                total -= math.log(error) + 0.5 * ((case.added - gain) / error) ** 2
        return total

    grid = product(
        np.arange(0.3, 1.05, 0.05), np.arange(0.1, 1.05, 0.05), (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04)
    )
    kept, change, noise = max(((float(k), float(c), n) for k, c, n in grid), key=likelihood)
    return round(kept, 2), round(change, 2), noise


# The texts


def _write_rows(folder: Path, text: str) -> Path:
    """Write the rows of a text, if they are not there, and return the file."""
    file = folder / f"{text}.jsonl"
    if not file.is_file():
        rows = [*dict.fromkeys(TEXTS[text]())]
        rows = random.Random(0).sample(rows, min(ROWS, len(rows)))
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return file


def _reviews() -> Iterator[str]:
    for review in load_dataset(TrainConfig(max_rows=6_000)).train:
        yield review[:ROW_CHARS].rpartition(" ")[0]


def _code() -> Iterator[str]:
    """Yield the functions and classes of Python's library, from where they begin."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = str(path.relative_to(library))
        if not name.startswith(("test", "site-packages", "idlelib/idle_test", "lib2to3/tests")):
            for block in path.read_text(encoding="utf-8", errors="ignore").split("\n\n"):
                if len(block) >= ROW_CHARS:
                    yield block.strip("\n")[:ROW_CHARS].rpartition("\n")[0] or block[:ROW_CHARS]


TEXTS = {"reviews": _reviews, "code": _code}
