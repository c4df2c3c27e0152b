"""Millions of synthetic rows through reading, cleaning, tokenising and packing: how much memory is held after each million."""

import itertools
import json
import random
import tempfile
import time
from pathlib import Path

import psutil

from lora_tuner import TrainConfig
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.data.dataset import RowCounts
from lora_tuner.data.streaming import StreamingDataset, StreamState
from lora_tuner.models.loading import load_tokenizer
from lora_tuner.models.resolve import find_base

from .measure import Figure, figure

ROWS, MARK = 10_000_000, 1_000_000


def run(rounds: int) -> list[Figure]:
    """One pass, whatever the rounds: half an hour. The file takes 1 GB of the temporary folder."""
    figures = []
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "rows.jsonl")
        _write(path)
        config = TrainConfig(dataset=str(path), streaming=True)
        counts, process = RowCounts(), psutil.Process()
        stream = StreamingDataset(config, load_tokenizer(find_base(EMBEDDED_BASE)), frozenset(), counts, StreamState())
        start, mark = time.perf_counter(), MARK
        for taken, _ in enumerate(stream, 1):
            stream.state_at(taken)  # as checkpoints ask
            if counts.read >= mark:
                rate = counts.read / (time.perf_counter() - start)
                figures.append(
                    figure(f"after {mark:,} rows", process.memory_info().rss / 1e6, "MB", f"{rate:,.0f} rows/s")
                )
                mark += MARK
            if mark > ROWS or stream.state_at(taken).epoch:
                break
    return figures


def _write(path: Path) -> None:
    """Rows of a few to thirty words, no two alike."""
    draw = random.Random(0)
    words = [f"{a}{b}{c}" for a, b, c in itertools.product(("ba", "ko", "ri", "tu", "se"), repeat=3)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            text = " ".join(draw.choices(words, k=draw.randint(3, 30)))
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
