"""Speed from raw reviews to packed sequences, and of training by rank, length and batch size."""

import statistics
import tempfile
import time
from pathlib import Path

from lora_tuner import TrainConfig
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.data import packing, tokenization
from lora_tuner.data.dataset import load_dataset
from lora_tuner.models.resolve import find_base
from lora_tuner.models.tokenizer import load_tokenizer

from .measure import Figure, figure
from .training import _ours, base_of

LENGTH = 512
GROWTH: dict[str, tuple[int, ...]] = {
    "rank": (4, 8, 32, 128),
    "max_length": (128, 256, 512, 1024),
    "batch_size": (1, 2, 4, 8),
}


def run(rounds: int) -> list[Figure]:
    """Measure both, in about ten minutes."""
    return [*_data_speed(rounds), *_training_speed(rounds)]


def _data_speed(rounds: int) -> list[Figure]:
    """Measure the reviews per second of each stage, for several numbers of reviews."""
    tokenizer = load_tokenizer(find_base(EMBEDDED_BASE))
    figures = []
    for count in (1_000, 5_000, 25_000):
        rates: dict[str, list[float]] = {"cleaning and splitting": [], "tokenising": [], "packing": []}
        for _ in range(rounds):
            start = time.perf_counter()
            texts = load_dataset(TrainConfig(max_rows=count)).train
            rates["cleaning and splitting"].append(count / (time.perf_counter() - start))
            start = time.perf_counter()
            rows = tokenization.truncate(tokenization.encode_texts(tokenizer, texts), LENGTH)
            rates["tokenising"].append(len(texts) / (time.perf_counter() - start))
            start = time.perf_counter()
            packing.pack_rows(rows, LENGTH)
            rates["packing"].append(len(texts) / (time.perf_counter() - start))
        for stage, speeds in rates.items():
            figures.append(figure(f"{stage}, {count:,} reviews", statistics.median(speeds), "reviews/s"))
    return figures


def _training_speed(rounds: int) -> list[Figure]:
    """Measure training on distilgpt2's shape, from rank 8, length 512, batch 1, one change each."""
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = base_of("distilgpt2", work / "base")
        for _ in range(rounds):
            for setting, values in GROWTH.items():
                for value in values:
                    seconds, predictions = _ours(
                        base, work, "float32", steps=5, gradient_accumulation=1, **{setting: value}
                    )
                    speed = sum(predictions[1:]) / sum(seconds[1:])
                    speeds.setdefault(f"training, {setting} {value}", []).append(speed)
    return [figure(name, statistics.median(values), "tokens/s") for name, values in speeds.items()]
