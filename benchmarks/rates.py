"""Default learning rate beside the best one, on several bases, texts and lengths of a run.

The bases are the embedded one and those that LORA_TUNER_BENCH_BASES names (folders, GGUF files or Hub ids,
separated by spaces). All take the same steps of one sequence of 512 tokens. Rates are tried upwards and
downwards from the default, until the gain has fallen well below the best one. Each comparison is appended to
rates.jsonl in the current folder when it is done, and is not repeated.
"""

import json
import math
import os
import sys
import tempfile
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
HOPEFUL_SHARE = 0.9  # of the best gain so far; at less, rates beyond are not tried
RESULTS = Path("rates.jsonl")


def run(rounds: int) -> list[Figure]:
    """Takes an hour or more per base and round; each round has its own seed."""
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    comparisons = {entry["run"]: entry for entry in done}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(rounds):
            for base in [EMBEDDED_BASE, *os.environ.get("LORA_TUNER_BENCH_BASES", "").split()]:
                for text, data in (("reviews", REVIEWS), ("code", program_code(Path(folder, "code")))):
                    settings = data | {"base": base, "seed": seed, "max_length": 512, "long_rows": "truncate"}
                    settings |= {"batch_size": 1, "eval_rows": HELD_OUT}
                    inputs: TrainingInputs | None = None
                    for steps in LENGTHS:
                        name = f"{Path(base).stem}, {text}, {steps} steps, seed {seed}"
                        if name not in comparisons:
                            config = TrainConfig.model_validate(settings | {"max_steps": steps})
                            inputs = inputs or load_inputs(config, ignore_events)
                            comparisons[name] = {"run": name, **_compare(config, inputs)}
                            with RESULTS.open("a") as file:
                                file.write(json.dumps(comparisons[name]) + "\n")
    return [_figure(entry) for entry in comparisons.values()]


def _compare(config: TrainConfig, inputs: TrainingInputs) -> dict[str, Any]:
    """Return the gain of the default and of each rate tried, and the paired difference from the best."""
    base, default_rate, default = _train(config, inputs)
    losses: dict[float, HeldOutLoss] = {}

    def gain(rate: float) -> float:
        return base.loss - losses[rate].loss

    higher = [rate for rate in RATES if rate > default_rate]
    lower = [rate for rate in reversed(RATES) if rate <= default_rate]
    for rates in (lower, higher):
        for rate in rates:
            _, _, losses[rate] = _train(config.model_copy(update={"learning_rate": rate}), inputs)
            if gain(rate) < HOPEFUL_SHARE * max(base.loss - default.loss, *map(gain, losses)):
                break
    best = max(losses, key=gain)
    gap = paired_gain(default, losses[best])
    return {
        "dtype": str(inputs.base.dtype).removeprefix("torch."),
        "default": default_rate,
        "gain": base.loss - default.loss,
        "gains": {f"{rate:g}": gain(rate) for rate in sorted(losses)},
        "best": best,
        "best_gain": gain(best),
        "gap": gap.gain,
        "error": gap.standard_error,
    }


def _train(config: TrainConfig, inputs: TrainingInputs) -> tuple[HeldOutLoss, float, HeldOutLoss]:
    """Return the loss of the base, the learning rate and the loss of the adapter, infinite if training diverged."""
    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        setup = prepare_training(config, inputs=inputs)
        print(
            config.seed,
            config.max_steps,
            setup.learning_rate,
            setup.learning_rate_origin,
            file=sys.stderr,
            flush=True,
        )
        try:
            base = held_out_loss.measure_base_loss(setup.base, setup.held_out)
            LoraTrainer(setup, Path(folder)).train()
            return base, setup.learning_rate, held_out_loss.measure_loss(setup.model, setup.base, setup.held_out)
        except DivergedError:
            rows = len(setup.held_out)
            return base, setup.learning_rate, HeldOutLoss([math.inf] * rows, [1] * rows)
        finally:
            setup.remove_lora()


def _figure(entry: dict[str, Any]) -> Figure:
    """Return the share of the best rate's gain that the default has, with both in the note."""
    gains = ", ".join(f"{rate} {gain:.4f}" for rate, gain in entry["gains"].items())
    note = f"{entry['dtype']}; default {entry['default']:g} {entry['gain']:.4f}; {gains}; the best is better by "
    note += f"{entry['gap']:.4f} ± {entry['error']:.4f} (must be at most two errors, or the share at least 0.9)"
    return figure(entry["run"], entry["gain"] / entry["best_gain"], "of the best rate's gain", note)
