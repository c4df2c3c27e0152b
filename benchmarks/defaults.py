"""Reasons for the defaults: held-out loss after the same seconds of training, with one setting changed.

Embedded base, real reviews; initializations that this tool lacks are PEFT's own. Settings with equally
long steps share one measured pace, so that a slow moment of the machine costs none of them steps.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, initialize_lora_eva_weights
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer

from lora_tuner import TrainConfig
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.evaluation import held_out_loss
from lora_tuner.models import lora
from lora_tuner.models.base_files import quiet_transformers
from lora_tuner.training.setup import TrainingSetup, prepare_training
from lora_tuner.training.trainer import LoraTrainer

from .measure import Figure, figure, seconds

SECONDS, HELD_OUT, CALIBRATION, PROBED = 40.0, 50, 4, 6
LONGER = ("batch_size", "max_length", "target_modules")  # what changes how long a step takes
Initialise = Callable[[TrainingSetup], None]


def _layers(setup: TrainingSetup) -> list[Any]:
    return [layer for layer in setup.model.modules() if isinstance(layer, LoraLayer)]


def _each_layer(how: str, *details: Any) -> Initialise:
    def initialise(setup: TrainingSetup) -> None:
        for layer in _layers(setup):
            getattr(layer, how)(lora.ADAPTER_NAME, *details)
            for part in (layer.lora_A, layer.lora_B):  # some make them in the base's numbers
                part[lora.ADAPTER_NAME].weight = torch.nn.Parameter(
                    part[lora.ADAPTER_NAME].weight.detach().float()
                )

    return initialise


def _eva(setup: TrainingSetup) -> None:
    """Initialize by EVA: the directions in which the inputs of each layer vary most."""
    settings: Any = setup.model.peft_config[lora.ADAPTER_NAME]
    settings.init_lora_weights, settings.eva_config = "eva", EvaConfig(rho=1.0, adjust_scaling_factors=False)
    batches = []
    for number in range(CALIBRATION):
        batch = setup.collate([setup.sequences[number]])
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        del batch["labels"]
        batches.append(batch)
    initialize_lora_eva_weights(setup.model, batches, show_progress_bar=False)
    settings.init_lora_weights, settings.eva_config = True, None  # a saved adapter names no initialiser


LORA_PLUS = "LoRA+, B at {} x the rate of A"
SETTINGS: dict[str, tuple[dict[str, Any], Initialise | None, float | None]] = {
    "the defaults": ({}, None, None),
    "learning rate 1e-3": ({"learning_rate": 1e-3}, None, None),
    "learning rate 4e-3": ({"learning_rate": 4e-3}, None, None),
    "no warm-up": ({"warmup": 0.0}, None, None),
    "warm-up 0.2": ({"warmup": 0.2}, None, None),
    "learning rate constant": ({"schedule": "constant"}, None, None),
    "2 sequences a step": ({"batch_size": 2}, None, None),
    "4 sequences a step, 4e-3": ({"batch_size": 4, "learning_rate": 4e-3}, None, None),
    "sequences of 256": ({"max_length": 256}, None, None),
    "attention alone, 4e-3": ({"target_modules": "attention", "learning_rate": 4e-3}, None, None),
    "rsLoRA's scale (alpha 45)": ({"alpha": 45}, None, None),
    "rsLoRA's scale, 7e-4": ({"alpha": 45, "learning_rate": 7e-4}, None, None),
    f"{LORA_PLUS.format(4)}, 1e-3": ({"learning_rate": 1e-3}, None, 4.0),
    f"{LORA_PLUS.format(16)}, 5e-4": ({"learning_rate": 5e-4}, None, 16.0),
    "orthogonal": ({}, _each_layer("orthogonal_init"), None),
    "OLoRA, 2e-4": ({"learning_rate": 2e-4}, _each_layer("olora_init"), None),
    "PiSSA, 2e-3": ({}, _each_layer("pissa_init", "pissa_niter_4"), None),
    "PiSSA, 5e-4": ({"learning_rate": 5e-4}, _each_layer("pissa_init", "pissa_niter_4"), None),
    "EVA, 2e-3": ({}, _eva, None),
    "EVA, 5e-4": ({"learning_rate": 5e-4}, _eva, None),
}


def run(rounds: int) -> list[Figure]:
    """Train with each setting. Takes about twenty minutes per round; each round has its own seed."""
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in SETTINGS}
    for seed in range(rounds):
        pace: dict[Any, float] = {}
        for name, (changes, initialise, ratio) in SETTINGS.items():
            settings = {"batch_size": 1, "max_length": 512, "long_rows": "truncate", "seed": seed} | changes
            kind = tuple(settings.get(name) for name in LONGER)
            if kind not in pace:
                pace[kind] = statistics.median(_trained(_prepare(settings, PROBED))[1:])
            found[name].append(_train(settings, pace[kind], initialise, ratio))
            print(seed, name, *found[name][-1], file=sys.stderr, flush=True)
    figures = []
    for name, runs in found.items():
        loss, gain, steps = (statistics.median(each) for each in zip(*runs, strict=True))
        spread = max(run[0] for run in runs) - min(run[0] for run in runs)
        figures.append(
            figure(name, loss, "nats", f"gain {gain:.4f}, {steps:.0f} steps; seeds differ by {spread:.4f}")
        )
    return figures


def _prepare(settings: dict[str, Any], steps: int) -> TrainingSetup:
    with quiet_transformers():
        return prepare_training(
            TrainConfig(base=EMBEDDED_BASE, dtype="bfloat16", max_steps=steps, eval_rows=HELD_OUT, **settings)
        )


def _trained(setup: TrainingSetup, ratio: float | None = None) -> list[float]:
    """Train. Returns the seconds of each step."""
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        trainer = LoraTrainer(setup, Path(folder))
        if ratio:
            trainer.optimizer = create_loraplus_optimizer(
                setup.model,
                torch.optim.AdamW,
                lr=setup.learning_rate,
                loraplus_lr_ratio=ratio,
                weight_decay=0.0,
            )
        trainer.train()
        return [entry["seconds"] for entry in trainer.state.log_history if "loss" in entry]


def _train(
    settings: dict[str, Any], pace: float, initialise: Initialise | None, ratio: float | None
) -> tuple[float, float, int]:
    """Train for the same time. Returns held-out loss, gain over the base, and steps.

    The time that the initialization takes counts.
    """
    setup, left = _prepare(settings, 1), SECONDS
    if initialise:
        left -= seconds(partial(initialise, setup))
    steps = max(1, round(left / pace))
    setup = replace(setup, config=setup.config.model_copy(update={"max_steps": steps}))
    with setup.model.disable_adapter():
        before = held_out_loss.measure_base_loss(setup.base, setup.held_out).loss
    _trained(setup, ratio)
    loss = held_out_loss.measure_loss(setup.model, setup.base, setup.held_out).loss
    return loss, before - loss, steps
