"""From raw reviews to packed sequences, and how data and training grow with rank, length, batch and number of rows."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_tuner import TrainConfig
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.data import packing, tokenization
from lora_tuner.data.dataset import load_dataset
from lora_tuner.models.loading import load_tokenizer
from lora_tuner.models.resolve import find_base

from .measure import Figure, figure
from .training import _ours, base_of

LENGTH = 512
GROWTH: dict[str, tuple[Any, ...]] = {
    "rank": (4, 8, 32, 128),
    "max_length": (128, 256, 512, 1024),
    "batch_size": (1, 2, 4, 8),
}


def run(rounds: int) -> list[Figure]:
    """Takes about ten minutes."""
    return [*_rows(rounds), *_growth(rounds)]


def _rows(rounds: int) -> list[Figure]:
    """Cleaning with split, tokenising, packing: reviews a second, for more and more of them."""
    tokenizer = load_tokenizer(find_base(EMBEDDED_BASE))
    figures = []
    for count in (1_000, 5_000, 25_000):
        times: dict[str, list[float]] = {"cleaning and splitting": [], "tokenising": [], "packing": []}
        for _ in range(rounds):
            start = time.perf_counter()
            texts = load_dataset(TrainConfig(max_rows=count)).train
            times["cleaning and splitting"].append(count / (time.perf_counter() - start))
            start = time.perf_counter()
            rows, _ = tokenization.truncate(tokenization.encode_texts(tokenizer, texts), LENGTH)
            times["tokenising"].append(len(texts) / (time.perf_counter() - start))
            start = time.perf_counter()
            packing.pack_rows(rows, LENGTH)
            times["packing"].append(len(texts) / (time.perf_counter() - start))
        for what, speeds in times.items():
            figures.append(figure(f"{what}, {count:,} reviews", statistics.median(speeds), "reviews/s"))
    return figures


def _growth(rounds: int) -> list[Figure]:
    """Training speed on distilgpt2's shape, one setting changed at a time from rank 8, length 512, batch 1."""
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        name = base_of("distilgpt2", place / "base")
        for _ in range(rounds):
            for setting, values in GROWTH.items():
                for value in values:
                    seconds, predictions = _ours(
                        name, place, "float32", steps=5, gradient_accumulation=1, **{setting: value}
                    )
                    speed = sum(predictions[1:]) / sum(seconds[1:])
                    speeds.setdefault(f"training, {setting} {value}", []).append(speed)
    return [figure(what, statistics.median(found), "tokens/s") for what, found in speeds.items()]
