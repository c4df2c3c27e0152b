"""Why the defaults are what they are: the same number of tokens with one setting changed, and the held-out loss after it. The
embedded base, real reviews; what this tool has no setting for (LoRA+, other initialisations) is PEFT's own."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, initialize_lora_eva_weights
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer

from lora_tuner import TrainConfig, evaluation, lora
from lora_tuner.base_model import quiet
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.job import Job, prepare
from lora_tuner.trainer import _LoraTrainer

from .measure import Figure, figure, seconds

TOKENS, HELD_OUT, CALIBRATION = 32 * 512, 50, 4
Initialise = Callable[[Job], None]


def _layers(job: Job) -> list[Any]:
    return [layer for layer in job.model.modules() if isinstance(layer, LoraLayer)]


def _each_layer(how: str, *details: Any) -> Initialise:
    def initialise(job: Job) -> None:
        for layer in _layers(job):
            getattr(layer, how)(lora.TRAINED, *details)
            for part in (layer.lora_A, layer.lora_B):  # some make them in the base's numbers
                part[lora.TRAINED].weight = torch.nn.Parameter(part[lora.TRAINED].weight.detach().float())

    return initialise


def _eva(job: Job) -> None:
    """From the directions in which the inputs of each layer vary most, on a few sequences."""
    settings = job.model.peft_config[lora.TRAINED]
    settings.init_lora_weights, settings.eva_config = "eva", EvaConfig(rho=1.0, adjust_scaling_factors=False)
    batches = []
    for number in range(CALIBRATION):
        batch = job.collate([job.sequences[number]])
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        del batch["labels"]
        batches.append(batch)
    initialize_lora_eva_weights(job.model, batches, show_progress_bar=False)
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
    "attention alone, 4e-3": ({"targets": "attention", "learning_rate": 4e-3}, None, None),
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
    """Takes about twenty minutes; each setting once, whatever `rounds` says."""
    figures = []
    for name, (changes, initialise, ratio) in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder, quiet():
            figures.append(_train(name, Path(folder), changes, initialise, ratio))
        print(name, figures[-1]["value"], figures[-1]["note"], file=sys.stderr, flush=True)
    return figures


def _train(
    name: str, folder: Path, changes: dict[str, Any], initialise: Initialise | None, ratio: float | None
) -> Figure:
    settings: dict[str, Any] = {"batch_size": 1, "max_length": 512} | changes
    steps = TOKENS // (settings["batch_size"] * settings["max_length"])
    job = prepare(TrainConfig(base=EMBEDDED_BASE, dtype="bfloat16", max_steps=steps, eval_rows=HELD_OUT, **settings))
    with job.model.disable_adapter():
        before = evaluation.measure_base(job.base, job.held_out).loss
    preparing = seconds(lambda: initialise(job)) if initialise else 0.0
    trainer = _LoraTrainer(job, folder)
    if ratio:
        rate = job.config.learning_rate
        trainer.optimizer = create_loraplus_optimizer(
            job.model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio, weight_decay=0.0
        )
    trainer.train()
    loss = evaluation.measure(job.model, job.base, job.held_out).loss
    taken = sum(entry["seconds"] for entry in trainer.state.log_history if "loss" in entry)
    note = f"gain {before - loss:.4f}, {taken:.0f} s of training" + (f" after {preparing:.0f} s" if initialise else "")
    return figure(name, loss, "nats", note)
