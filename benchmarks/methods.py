"""Loss, time and size of each LoRA method at several learning rates.

All methods take the same steps on film reviews and on program code (Python's own library): embedded base in float32, one
sequence of 512 tokens per step. Losses do not depend on the load of the machine; seconds do.
"""

import statistics
import sys
import sysconfig
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from lora_tuner import TrainConfig
from lora_tuner.config import EMBEDDED_BASE, METHODS
from lora_tuner.evaluation import held_out_loss
from lora_tuner.models import initialization, lora
from lora_tuner.models.base_files import quiet_transformers
from lora_tuner.training.setup import prepare_training
from lora_tuner.training.trainer import LoraTrainer

from .measure import Figure, figure, seconds

STEPS, HELD_OUT = 30, 40
FACTORS = (0.5, 1.0, 2.0)  # of the method's default learning rate
REVIEWS: dict[str, Any] = {"dataset": "imdb", "max_rows": 2_000}


def program_code(folder: Path) -> dict[str, Any]:
    """Settings for a dataset of the modules of Python's library, one row each."""
    library = Path(sysconfig.get_paths()["stdlib"])
    folder.mkdir(exist_ok=True)
    for path in sorted(library.rglob("*.py")):
        name = str(path.relative_to(library))
        if not name.startswith(("test", "site-packages", "idlelib/idle_test", "lib2to3/tests")):
            (folder / f"{name.replace('/', '.')}.txt").write_bytes(path.read_bytes())
    return {"dataset": str(folder), "txt_rows": "file", "clean": "lines"}


def run(rounds: int) -> list[Figure]:
    """Takes an hour per round; each round has its own seed."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for text, data in (("reviews", REVIEWS), ("code", program_code(Path(folder)))):
            for method, defaults in METHODS.items():
                factors = FACTORS if text == "reviews" or method == "lora" else (1.0,)
                for factor in factors:
                    settings = data | {"method": method, "learning_rate": defaults.learning_rate * factor}
                    runs = [train_once(settings, seed) for seed in range(rounds)]
                    medians = (statistics.median(values) for values in zip(*runs, strict=True))
                    loss, gain, step_seconds, init_seconds, size = medians
                    name = f"{text}, {method}, {settings['learning_rate']:g}"
                    note = f"gain {gain:.4f}; {step_seconds:.2f} s per step, {init_seconds:.1f} s to initialize, "
                    note += f"{size / 1e6:.1f} MB"
                    figures.append(figure(name, loss, "nats", note))
                    print(name, loss, note, file=sys.stderr, flush=True)
    return figures


def train_once(settings: dict[str, Any], seed: int) -> tuple[float, float, float, float, int]:
    """Held-out loss, gain over the base, seconds per step, seconds of initialization, bytes."""
    common = {
        "base": EMBEDDED_BASE,
        "max_length": 512,
        "long_rows": "truncate",
        "batch_size": 1,
        "eval_rows": HELD_OUT,
    }
    initialize = initialization.initialize
    init_seconds: list[float] = []
    with quiet_transformers():
        initialization.initialize = lambda *arguments: init_seconds.append(
            seconds(partial(initialize, *arguments))
        )
        setup = prepare_training(
            TrainConfig.model_validate(common | settings | {"max_steps": STEPS, "seed": seed})
        )
        initialization.initialize = initialize
    with setup.model.disable_adapter():
        base_loss = held_out_loss.measure_base_loss(setup.base, setup.held_out).loss
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        trainer = LoraTrainer(setup, Path(folder))
        trainer.train()
        step_seconds = [entry["seconds"] for entry in trainer.state.log_history if "loss" in entry]
    loss = held_out_loss.measure_loss(setup.model, setup.base, setup.held_out).loss
    size = lora.count_parameters(setup.model)[0] * 4
    return loss, base_loss - loss, statistics.median(step_seconds), init_seconds[0], size
