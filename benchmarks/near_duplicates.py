"""Near duplicates: found and false ones among real reviews, time, and memory.

`python -m benchmarks.near_duplicates FILE [REVIEWS COPIES]` writes 5,000 reviews and near duplicates of 500
of them, for a training with `--near-duplicates drop` and one with `keep`.
"""

import json
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lora_tuner import TrainConfig
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.near_duplicates import NearDuplicates

from .measure import Figure, figure

REVIEWS, COPIES = 5_000, 500
ROWS, ROW_WORDS, BATCH = 1_000_000, 60, 10_000
Edit = Callable[[str, random.Random], str]


def run(rounds: int) -> list[Figure]:
    """Measure in five minutes; `rounds` is ignored."""
    million = _million_rows()  # first, as the peak is that of the process
    dataset = load_dataset(TrainConfig(near_duplicates="keep"))
    reviews = dataset.train + dataset.held_out
    return [*_found(reviews), *_speed(dataset.train, dataset.held_out), *million]


def _found(reviews: list[str]) -> list[Figure]:
    """Measure the share of near duplicates of each kind that are found, and of other rows that are taken for some."""
    draw = random.Random(0)
    rows = draw.sample(reviews, REVIEWS)
    index = NearDuplicates(rows)
    figures = []
    for kind, edit in EDITS.items():
        numbers = draw.sample(range(REVIEWS), COPIES)
        matches = index.find_all([edit(rows[number], draw) for number in numbers])
        share = sum(number in found for number, found in zip(numbers, matches, strict=True)) / COPIES
        figures.append(figure(f"found: {kind}", 100 * share, "%"))
    others = sorted(set(reviews).difference(rows))
    false = sum(map(bool, index.find_all(others)))
    note = f"{false} of {len(others):,} other reviews; see RESULTS.md"
    return [*figures, figure("taken for copies", 100 * false / len(others), "%", note)]


def _speed(train: list[str], held_out: list[str]) -> list[Figure]:
    start = time.perf_counter()
    matches = NearDuplicates(held_out).find(train)
    seconds = time.perf_counter() - start
    count = sum(match is not None for match in matches)
    note = f"{len(train):,} against {len(held_out):,}; {count} found"
    return [figure("all IMDb reviews", seconds, "s", note)]


def _million_rows() -> list[Figure]:
    """Measure a million short rows: read, cleaned, deduplicated, split, and without near duplicates."""
    with tempfile.TemporaryDirectory() as folder:
        path, generator = Path(folder, "rows.jsonl"), np.random.default_rng(0)
        with path.open("w", encoding="utf-8") as file:
            for _ in range(ROWS // BATCH):
                file.writelines(json.dumps({"text": row}) + "\n" for row in _make_rows(generator))
        start = time.process_time()
        dataset = load_dataset(TrainConfig(dataset=str(path)))
        seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of Linux, in kB
    start = time.process_time()
    NearDuplicates(dataset.held_out).find(dataset.train)
    near_seconds = time.process_time() - start
    note = f"{ROWS:,} rows of {ROW_WORDS} words"
    return [
        figure("read, cleaned, deduplicated, split: peak memory", peak / 1e6, "MB", note),
        figure("without near duplicates", ROWS / (seconds - near_seconds), "rows/s", "of one core"),
        figure("with near duplicates", ROWS / seconds, "rows/s", "of one core"),
    ]


def _make_rows(generator: np.random.Generator) -> list[str]:
    """Make rows of words whose frequencies are those of a language (Zipf)."""
    words = np.minimum((generator.pareto(0.9, size=(BATCH, ROW_WORDS)) * 20).astype(int), 59_999)
    return [" ".join(f"w{word:x}" for word in row) for row in words.tolist()]


# Edits


def _replace_words(share: float) -> Edit:
    def edit(text: str, draw: random.Random) -> str:
        words = text.split()
        vocabulary = ["house", "water", "green", "table", "window", "money", "doctor", "silver", "river", "happy"]
        for position in draw.sample(range(len(words)), round(share * len(words))):
            words[position] = draw.choice(vocabulary)
        return " ".join(words)

    return edit


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text)


def _drop_sentence(text: str, draw: random.Random) -> str:
    sentences = _sentences(text)
    del sentences[draw.randrange(len(sentences))]
    return " ".join(sentences) or text


def _move_sentences(text: str, draw: random.Random) -> str:
    sentences = _sentences(text)
    draw.shuffle(sentences)
    return " ".join(sentences)


def _mistype(text: str, draw: random.Random) -> str:
    return "".join(draw.choice(("", letter * 2, "e")) if draw.random() < 0.02 else letter for letter in text)


def _add_sentence(text: str, draw: random.Random) -> str:
    return f"{text} I saw it {draw.randint(2, 9)} times with my brother, and we will watch it again next winter."


def _quote(text: str, draw: random.Random) -> str:
    filler = " ".join(f"w{draw.randrange(10_000)}" for _ in range(2 * len(text.split())))
    return f'{filler}. Somebody wrote: "{text}" I do not agree.'


def _swap_names(text: str, draw: random.Random) -> str:
    for name in sorted(set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text))):
        text = re.sub(rf"\b{name}\b", draw.choice(("Kimura", "Anders", "Petra", "Quill")), text)
    return text


EDITS: dict[str, Edit] = {
    "5% of the words replaced": _replace_words(0.05),
    "10% of the words replaced": _replace_words(0.1),
    "15% of the words replaced": _replace_words(0.15),
    "a sentence dropped": _drop_sentence,
    "a sentence added": _add_sentence,
    "sentences in another order": _move_sentences,
    "2% of the letters mistyped": _mistype,
    "capitals, other punctuation": lambda text, draw: re.sub("[.,]", " !", text.upper()),
    "a prefix and a suffix": lambda text, draw: f"Update {draw.randrange(10)}: {text} (edited)",
    "cut to two thirds": lambda text, draw: text[: len(text) * 2 // 3],
    "quoted in a text of three times the length": _quote,
    "names swapped": _swap_names,
}


def main() -> None:
    """Write reviews, and near duplicates of some of them of all kinds in turn, to the file of the argument."""
    path, *counts = sys.argv[1:]
    reviews, copied = map(int, counts or (REVIEWS, COPIES))
    draw = random.Random(0)
    dataset = load_dataset(TrainConfig(near_duplicates="keep"))
    rows = draw.sample(dataset.train + dataset.held_out, reviews)
    edits = [*EDITS.values()]
    copies = [edits[number % len(edits)](text, draw) for number, text in enumerate(draw.sample(rows, copied))]
    lines = [json.dumps({"text": text}) + "\n" for text in rows + copies]
    draw.shuffle(lines)
    Path(path).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
