"""Default learning rate beside the best one, on several bases, texts and lengths of a run.

The bases are the embedded one and those that LORA_TUNER_BENCH_BASES names (folders, GGUF files or Hub ids,
separated by spaces). All take the same steps of one sequence of 512 tokens. Rates that are far from the best
with the first seed are not repeated with others. The losses of each run are appended to rates.jsonl in the
current folder, and runs that are in it are not repeated: a base takes hours.
"""

import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lora_tuner import TrainConfig
from lora_tuner.adapters.gains import HeldOutLoss, paired_gain
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.errors import DivergedError, ignore_events
from lora_tuner.evaluation import held_out_loss
from lora_tuner.models.base_files import quiet_transformers
from lora_tuner.training.inputs import TrainingInputs, load_inputs
from lora_tuner.training.setup import prepare_training
from lora_tuner.training.trainer import LoraTrainer

from .measure import Figure, figure
from .methods import REVIEWS, program_code

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
LENGTHS, HELD_OUT = (25, 100), 200
HOPEFUL_SHARE = 0.8  # of the best gain with the first seed: other rates are not repeated with more seeds
BASE, DEFAULT = "base", "default"
RESULTS = Path("rates.jsonl")
Losses = dict[float | str, list[HeldOutLoss]]  # of each rate, for each seed


def run(rounds: int) -> list[Figure]:
    """Takes an hour or more per base, text and round; each round has its own seed."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for base in [EMBEDDED_BASE, *os.environ.get("LORA_TUNER_BENCH_BASES", "").split()]:
            for text, data in (("reviews", REVIEWS), ("code", program_code(Path(folder, "code")))):
                common = data | {"base": base, "max_length": 512, "long_rows": "truncate", "batch_size": 1}
                settings = common | {"dtype": "bfloat16", "eval_rows": HELD_OUT}
                for steps, losses in _measure(f"{Path(base).stem}, {text}", settings, rounds).items():
                    figures.append(_compare(f"{Path(base).stem}, {text}, {steps} steps", losses))
    return figures


def _measure(name: str, settings: dict[str, Any], seeds: int) -> dict[int, Losses]:
    """Return the losses of each length of run, with those of the base, which no seed changes."""
    losses: dict[int, Losses] = {steps: {} for steps in LENGTHS}
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    known = {tuple(entry["run"]): HeldOutLoss(**entry["loss"]) for entry in done}
    for seed in range(seeds):
        inputs: TrainingInputs | None = None
        for steps in LENGTHS:
            rates: list[float | str] = [BASE, DEFAULT, *_hopeful(losses[steps])]
            for rate in rates:
                key = (name, 0, 0, BASE) if rate == BASE else (name, seed, steps, rate)
                if key not in known:
                    settings |= {"max_steps": steps, "seed": seed}
                    given = {"learning_rate": rate} if rate in RATES else {}
                    config = TrainConfig.model_validate(settings | given)
                    inputs = inputs or load_inputs(config, ignore_events)
                    known[key] = _train(config, inputs, is_base=rate == BASE)
                    entry = {"run": key, "loss": asdict(replace(known[key], tokens=[]))}
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(entry) + "\n")
                    print(*key, known[key].loss, file=sys.stderr, flush=True)
                losses[steps].setdefault(rate, []).append(known[key])
    return losses


def _hopeful(losses: Losses) -> list[float]:
    """Return the rates whose gain with the first seed was not far below the best one's; at first all."""
    if not losses:
        return [*RATES]
    gains = {rate: losses[BASE][0].loss - losses[rate][0].loss for rate in RATES}
    return [rate for rate, gain in gains.items() if gain >= HOPEFUL_SHARE * max(gains.values())]


def _train(config: TrainConfig, inputs: TrainingInputs, *, is_base: bool) -> HeldOutLoss:
    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        setup = prepare_training(config, inputs=inputs)
        print(config.seed, setup.learning_rate, setup.learning_rate_origin, file=sys.stderr, flush=True)
        try:
            if not is_base:
                LoraTrainer(setup, Path(folder)).train()
            return held_out_loss.measure_loss(setup.model, setup.base, setup.held_out)
        except DivergedError:
            return HeldOutLoss([float("inf")] * len(setup.held_out), [1] * len(setup.held_out))
        finally:
            setup.remove_lora()


def _compare(name: str, losses: Losses) -> Figure:
    """Return the share of the best rate's gain that the default has, with both in the note."""
    seeds = len(losses[DEFAULT])
    means = {
        rate: statistics.fmean(loss.loss for loss in runs) for rate, runs in losses.items() if len(runs) == seeds
    }
    gains = {rate: means[BASE] - loss for rate, loss in means.items()}
    best = max(gains.keys() & {*RATES}, key=lambda rate: gains[rate])
    gaps = [paired_gain(*pair) for pair in zip(losses[DEFAULT], losses[best], strict=True)]
    # Rows are the same for all seeds, so their errors do not average out.
    error = statistics.fmean(gap.standard_error or 0.0 for gap in gaps)
    gap = gains[best] - gains[DEFAULT]
    note = f"default {gains[DEFAULT]:.4f}, best {best:g} {gains[best]:.4f}, difference {gap:.4f} ± {error:.4f}; "
    note += ", ".join(f"{rate:g} {losses[BASE][0].loss - losses[rate][0].loss:.4f}" for rate in RATES)
    return figure(name, gains[DEFAULT] / gains[best], "of the best rate's gain", note + " with the first seed")
