"""Which learning rate each method wants, and what it gives for its bytes and seconds: the same steps with each, on film reviews
and on program code (Python's own library). The embedded base in float32, one sequence of 512 tokens a step.

The losses do not depend on how busy the machine is; the seconds do.
"""

import statistics
import sys
import sysconfig
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from lora_tuner import TrainConfig, evaluation
from lora_tuner.config import EMBEDDED_BASE, METHODS
from lora_tuner.models import initialization, lora
from lora_tuner.models.resolve import quiet_transformers
from lora_tuner.training.setup import prepare_training
from lora_tuner.training.trainer import _LoraTrainer

from .measure import Figure, figure, seconds

STEPS, HELD_OUT = 30, 40
FACTORS = (0.5, 1.0, 2.0)  # of the learning rate that is a method's default
REVIEWS: dict[str, Any] = {"dataset": "imdb", "max_rows": 2_000}


def program_code(folder: Path) -> dict[str, Any]:
    """Settings that read the modules of Python's library, each a row."""
    library = Path(sysconfig.get_paths()["stdlib"])
    folder.mkdir(exist_ok=True)
    for path in sorted(library.rglob("*.py")):
        name = str(path.relative_to(library))
        if not name.startswith(("test", "site-packages", "idlelib/idle_test", "lib2to3/tests")):
            (folder / f"{name.replace('/', '.')}.txt").write_bytes(path.read_bytes())
    return {"dataset": str(folder), "txt_rows": "file", "keep_lines": True}


def run(rounds: int) -> list[Figure]:
    """Takes an hour a round; each has a seed of its own."""
    figures = []
    with tempfile.TemporaryDirectory() as place:
        for text, data in (("reviews", REVIEWS), ("code", program_code(Path(place)))):
            for method, facts in METHODS.items():
                for factor in FACTORS if text == "reviews" or method == "lora" else (1.0,):
                    settings = data | {"method": method, "learning_rate": facts.learning_rate * factor}
                    found = [trained(settings, seed) for seed in range(rounds)]
                    loss, gain, pace, start, size = (statistics.median(each) for each in zip(*found, strict=True))
                    name = f"{text}, {method}, {settings['learning_rate']:g}"
                    note = f"gain {gain:.4f}; {pace:.2f} s a step, {start:.1f} s to begin, {size / 1e6:.1f} MB"
                    figures.append(figure(name, loss, "nats", note))
                    print(name, loss, note, file=sys.stderr, flush=True)
    return figures


def trained(settings: dict[str, Any], seed: int) -> tuple[float, float, float, float, int]:
    """Held-out loss, gain over the base, seconds per step, seconds that the start takes, bytes."""
    given = {"base": EMBEDDED_BASE, "max_length": 512, "batch_size": 1, "eval_rows": HELD_OUT}
    begun = initialization.initialize
    taken: list[float] = []
    with quiet_transformers():
        initialization.initialize = lambda *of_job: taken.append(seconds(partial(begun, *of_job)))
        job = prepare_training(TrainConfig.model_validate(given | settings | {"max_steps": STEPS, "seed": seed}))
        initialization.initialize = begun
    with job.model.disable_adapter():
        before = evaluation.measure_base_loss(job.base, job.held_out).loss
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        trainer = _LoraTrainer(job, Path(folder))
        trainer.train()
        paces = [entry["seconds"] for entry in trainer.state.log_history if "loss" in entry]
    loss = evaluation.measure_loss(job.model, job.base, job.held_out).loss
    return loss, before - loss, statistics.median(paces), taken[0], lora.count_parameters(job.model)[0] * 4
