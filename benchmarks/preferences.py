"""Preferences of real reviews: the own continuation of an opening against that of another review.

Embedded base. A prompt is the opening of a review, 24 words, and both answers are the next 16 words, of it and of another
review. Accuracy is the share of held-out pairs of which the own continuation has the higher mean log-probability per token.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_tuner import TrainConfig, train
from lora_tuner.adapters.adapter import Adapter
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.data.dataset import load_dataset
from lora_tuner.errors import DivergedError, ignore_events
from lora_tuner.training.learning_rate import RATE_SHARES
from lora_tuner.training.setup import prepare_training

from .measure import Figure, figure

OPENING, ANSWER = 24, 16  # words
PAIRS, HELD_OUT = 4_000, 300
MINUTES = 2.0  # of training steps; with all measurements at most five on two idle cores
ERRORS = 3.0  # accuracy above the base's by so many
WORST_LOSS = 0.02  # text loss worse by this share at most
SHARES, STEPS = (0.03, 0.1, 0.3, 1.0), 60  # of the learning rate for text


def run(rounds: int) -> list[Figure]:
    """Takes up to five minutes per round; each round has its own seed."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_pairs(Path(folder, "pairs.jsonl"))
        for seed in range(rounds):
            start = time.perf_counter()
            adapter = _train(folder, data, objective="dpo", minutes=MINUTES, seed=seed)
            seconds = time.perf_counter() - start
            change, worse, note = _describe(adapter)
            reached = change >= ERRORS and worse <= WORST_LOSS and seconds <= 300
            verdict = "reached" if reached else "not reached"
            note += f"; {seconds:.0f} s in all; text loss {worse:+.2%} (at most {WORST_LOSS:.0%}): {verdict}"
            figures.append(
                figure(f"dpo, seed {seed}: accuracy above the base's", change, "standard errors", note)
            )
            print(figures[-1], file=sys.stderr, flush=True)
    return figures


def rates(rounds: int) -> list[Figure]:
    """Takes about an hour per round: each objective at several shares of the rate for text, 60 steps each."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_pairs(Path(folder, "pairs.jsonl"))
        config = _config(folder, data, objective="dpo", max_steps=STEPS)
        rate = prepare_training(config).learning_rate / RATE_SHARES["dpo"]
        for objective in ("dpo", "orpo", "kto"):
            for share in SHARES:
                settings = {"objective": objective, "max_steps": STEPS, "learning_rate": share * rate}
                found, notes = [], []
                for seed in range(rounds):
                    try:
                        adapter = _train(folder, data, seed=seed, **settings)
                    except DivergedError:
                        found.append(-math.inf)
                        continue
                    change, worse, note = _describe(adapter)
                    found.append(change)
                    notes.append(f"{note}; text loss {worse:+.2%}")
                name = f"{objective}, {share:g} of the rate for text"
                figures.append(figure(name, statistics.median(found), "standard errors", " | ".join(notes)))
                print(figures[-1], file=sys.stderr, flush=True)
    return figures


def write_pairs(path: Path, count: int = PAIRS) -> Path:
    """Write pairs of reviews; no review is in two of them, so that no answer is once chosen and once rejected."""
    reviews = [text.split() for text in load_dataset(TrainConfig(max_rows=3 * count)).train]
    reviews = [words for words in reviews if len(words) >= OPENING + ANSWER][: 2 * count]
    with path.open("w", encoding="utf-8") as file:
        for words, other in zip(reviews[::2], reviews[1::2], strict=False):
            texts = words[:OPENING], words[OPENING : OPENING + ANSWER], other[OPENING : OPENING + ANSWER]
            names = ("prompt", "chosen", "rejected")
            row = dict(zip(names, map(" ".join, texts), strict=True))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def _config(folder: str, data: Path, **settings: Any) -> TrainConfig:
    common = {"dataset": str(data), "base": EMBEDDED_BASE, "eval_rows": HELD_OUT}
    places = {"adapters_dir": f"{folder}/adapters", "runs_dir": f"{folder}/runs", "name": "pairs"}
    return TrainConfig.model_validate(common | places | {"overwrite": True} | settings)


def _train(folder: str, data: Path, **settings: Any) -> Adapter:
    return train(_config(folder, data, **settings), ignore_events)


def _describe(adapter: Adapter) -> tuple[float, float, str]:
    """Return the change of accuracy in standard errors, that of the text loss as a share, and both in words."""
    manifest = adapter.manifest
    assert manifest is not None
    info, result, trained = manifest.preference, manifest.result, manifest.run
    assert info is not None
    assert result is not None
    assert trained is not None
    note = f"accuracy {info.accuracy.format_change()}, {trained.steps} steps in {trained.seconds:.0f} s"
    return info.accuracy.change / (info.accuracy.change_error or math.nan), -result.gain / result.base_loss, note
