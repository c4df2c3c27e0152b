"""Training time until the held-out loss that the tutorial recipe reaches after eight minutes.

Embedded base, real reviews, the same held-out rows for both.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lora_tuner import TrainConfig
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.data.dataset import load_dataset
from lora_tuner.evaluation import held_out_loss
from lora_tuner.models.base_files import quiet_transformers
from lora_tuner.models.loading import LoadedBase
from lora_tuner.models.resolve import find_base

from . import recipes
from .measure import Figure, figure

SECONDS, ROWS = 480, 100
CLI = Path(__file__).parents[1] / "cli.py"
WAYS = [("float32", 2.0), ("bfloat16", 0.4), ("bfloat16", 2.0)]  # type of numbers and minutes


def run(rounds: int) -> list[Figure]:
    """Compare both. Takes about eight minutes per round, and eight for the tutorial, which runs once."""
    loss, seconds, steps = _tutorial()
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for dtype, minutes in WAYS:
            found[dtype, minutes].append(_ours(minutes, dtype))
    note = f"held-out loss after {seconds:.0f} s of training, {steps:.0f} steps"
    figures = [figure("tutorial recipe", loss, "nats", note)]
    for (dtype, minutes), runs in found.items():
        reached, training, whole = (statistics.median(each) for each in zip(*runs, strict=True))
        share = f"{seconds / training:.1f} x less training" if reached <= loss else "not yet"
        note = f"{training:.0f} s of training, {whole:.0f} s in all: {share}"
        figures.append(figure(f"ours, {dtype}, --minutes {minutes}", reached, "nats", note))
    return figures


def _tutorial() -> tuple[float, float, int]:
    """Return held-out loss, seconds and steps. The learning rate falls to 0 in exactly this time, its best case."""
    corpus = load_dataset(TrainConfig())
    with quiet_transformers():
        model, tokenizer = recipes.stock(EMBEDDED_BASE)
        probe = recipes.tutorial(model, tokenizer, corpus.train[:400], 6)
        steps = int(SECONDS / statistics.median(probe.seconds[1:]))
        model, tokenizer = recipes.stock(EMBEDDED_BASE)
        clock = recipes.tutorial(model, tokenizer, corpus.train, steps)
    base = LoadedBase(find_base(EMBEDDED_BASE), tokenizer, model, torch.device("cpu"), torch.float32)
    rows = held_out_loss.encode_held_out(base, corpus.held_out[:ROWS])
    return held_out_loss.measure_loss(model, base, rows).loss, sum(clock.seconds), steps


def _ours(minutes: float, dtype: str) -> tuple[float, float, float]:
    """Return held-out loss, seconds of training, and seconds of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(CLI), "train", "--base", EMBEDDED_BASE, "--minutes", str(minutes)]
        command += ["--eval-rows", str(ROWS), "--long-rows", "truncate", "--name", "quality"]
        command += ["--adapters-dir", f"{folder}/adapters", "--runs-dir", f"{folder}/runs"]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--dtype", dtype, "--json"], check=True, stdout=subprocess.PIPE, text=True
        )
        whole = time.perf_counter() - start
        facts = json.loads(done.stdout)
    return facts["result"]["loss"], facts["run"]["seconds"], whole
