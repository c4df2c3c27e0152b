"""Memory after each million synthetic rows that are read, cleaned, tokenized and packed."""

import itertools
import json
import random
import tempfile
import time
from pathlib import Path

import psutil

from lora_tuner import TrainConfig
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.data.rows import Source
from lora_tuner.data.streaming import StreamingDataset
from lora_tuner.models.resolve import find_base
from lora_tuner.models.tokenizer import load_tokenizer

from .measure import Figure, figure

ROWS, REPORT_EVERY = 10_000_000, 1_000_000


def run(rounds: int) -> list[Figure]:
    """Measure one pass, in half an hour; `rounds` is ignored. The temporary file takes 1 GB."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        _write_rows(path)
        config = TrainConfig(dataset=str(path), streaming=True)
        source, process = Source(str(path)), psutil.Process()
        stream = StreamingDataset(config, load_tokenizer(find_base(EMBEDDED_BASE)), frozenset(), [source])
        start, next_report = time.perf_counter(), REPORT_EVERY
        for taken, _ in enumerate(stream, 1):
            stream.position(taken)  # as each checkpoint does
            if source.counts.read >= next_report:
                rate = source.counts.read / (time.perf_counter() - start)
                figures.append(
                    figure(
                        f"after {next_report:,} rows",
                        process.memory_info().rss / 1e6,
                        "MB",
                        f"{rate:,.0f} rows/s",
                    )
                )
                next_report += REPORT_EVERY
            if next_report > ROWS or stream.streams[0].states[-1].epoch:
                break
    return figures


def _write_rows(path: Path) -> None:
    """Write different rows of 3 to 30 words."""
    generator = random.Random(0)
    words = ["".join(syllables) for syllables in itertools.product(("ba", "ko", "ri", "tu", "se"), repeat=3)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            text = " ".join(generator.choices(words, k=generator.randint(3, 30)))
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
