"""Model "auto" with eight adapters of different text on the embedded base: the share of the gain that the best choice
would have had, and text of none of them; `routing_times` is the time to the first token, on a quiet machine.

The adapters are trained once, in some minutes, and kept beside the user's cache; the rest takes minutes. The rule was
chosen on one half of the rows and of the other texts (`chosen_on=True`); the figures are of the other half.
"""

import gzip
import json
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lora_tuner import Generator, ModelOptions, SamplingParams, TrainConfig, atomic_io, train
from lora_tuner.adapters.library import Library
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.data.dataset import load_dataset
from lora_tuner.inference import routing
from lora_tuner.inference.sequence import Sequence

from .measure import Figure, figure, median_seconds

ADAPTERS, ROWS, TEST_ROWS, ROW_CHARS = 8, 240, 40, 1_800
STEPS, TRAIN_TOKENS, TRAIN_CHARS, EVAL_ROWS = 60, 256, 900, 20
LENGTHS, CONTINUATION = (8, 16, 32, 64, 128, 256), 48  # tokens
PROMPTS = 6  # of each half, of each adapter and of each kind of other text
LIBRARY = f"adapters-{STEPS}"
TIMED = (16, 64, 256, 1024)  # tokens
Gains = npt.NDArray[np.float64]

# What people ask a model of their own: text of none of the adapters.
ASKED = (
    "Dear Ms. Okafor, thank you for your letter of the third of March. We are sorry to hear that the parcel",
    "Preheat the oven to 180 degrees. Whisk the eggs with the sugar until pale, then fold in the flour and",
    "The mitochondria of a cell produce most of its chemical energy. They have two membranes, of which the inner",
    "Once upon a time there lived a fisherman by the sea who had never caught a single fish. One morning",
    "What is the difference between a simile and a metaphor? Give an example of each and explain when",
    "LONDON - Shares fell sharply on Tuesday after the central bank raised interest rates for the third time",
    "In the second half the home side pressed forward, and after seventy minutes the captain headed the ball",
    "The patient is a 54-year-old woman who presents with three days of chest pain and shortness of breath",
    "Take the second road on the left after the church and go on until you reach the bridge over the river",
    "Translate the following sentence into Spanish: The library is closed on Mondays and public holidays",
    "The treaty was signed in 1648 and ended a war that had lasted thirty years. The powers of Europe",
    "Q: How many legs has a spider? A: Eight. Q: What is the capital of Norway? A: Oslo. Q: What is",
    "Let n be an even integer greater than two. We show that the sum of the first n odd numbers is",
    "Hi Tom, are we still on for Friday? I can bring the salad if you take care of the drinks. Let me",
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate: Rough winds do shake",
    "For sale: bicycle, three years old, 21 gears, new tyres, light and lock included. Pick up in the",
    "Le chat est assis sur le mur et regarde les oiseaux qui volent au-dessus du jardin. Il fait beau et",
    "El tren sale a las ocho de la mañana y llega a la costa al mediodía. Los viajeros esperan en el",
    "The minutes of the meeting of the parents' council: present were nine members. The chair opened the",
    "Water the plant twice a week and keep it out of direct sunlight. In winter it needs less water, and",
    "Good evening, and welcome to tonight's programme. We begin with the storm that has reached the coast",
    "I was born in a small village in the north, the youngest of five children. My father worked in the",
    "Ingredients: wheat flour, sugar, palm oil, cocoa powder (5%), glucose syrup, whey powder, raising agents",
    "Knit two, purl two to the end of the row. Repeat until the work measures ten centimetres from the",
)


def run(rounds: int) -> list[Figure]:
    """Choose for openings of rows that no adapter has seen, and for other text."""
    generator, names = _load(folder := train_adapters())
    return [*_share_of_gain(generator, names, folder.parent), *_left_to_base(generator, names)]


def run_times(rounds: int) -> list[Figure]:
    """Measure the time to the first token with a named adapter and with a chosen one: under three minutes, once the
    adapters are trained."""
    return _times(*_load(train_adapters()), rounds)


def _load(adapters_dir: Path) -> tuple[Generator, list[str]]:
    names = Library(adapters_dir).names()
    paths = [adapters_dir / name for name in names]
    options = ModelOptions(base=EMBEDDED_BASE)
    return Generator(*paths, adapters_dir=adapters_dir, options=options), names


def choose(generator: Generator, names: list[str], token_ids: list[int]) -> routing.Choice:
    """Choose an adapter for the tokens of a prompt."""
    candidates = []
    for name in names:
        _, lora = generator.get_or_load(name)
        assert lora is not None
        candidates.append(routing.Candidate(name, lora, token_ids))
    return routing.choose(routing.score_prompt(generator.engine, candidates))


def token_gains(generator: Generator, names: list[str], token_ids: list[int]) -> Gains:
    """Gain of each adapter on each token but the first, (adapters, tokens)."""
    decoder, _ = generator.engine.batch_key(None)
    lora, rows = decoder.new_lora(generator.engine.multi_lora), len(names) + 1
    lora.set_rows([None, *(generator.get_or_load(name)[1] for name in names)])
    cache, parts = decoder.new_cache([0] * rows), []
    ids = torch.tensor([token_ids] * rows)
    with torch.inference_mode():
        for start in range(0, len(token_ids) - 1, 64):
            targets = ids[:, start + 1 : start + 65, None]
            logits = decoder.forward(ids[:, start : start + targets.shape[1]], cache, lora)
            parts.append(logits.gather(-1, targets)[..., 0] - logits.logsumexp(-1))
    logprobs = torch.cat(parts, 1).double().numpy()
    return np.asarray(logprobs[1:] - logprobs[:1])


def unseen_rows(generator: Generator, folder: Path, name: str, *, chosen_on: bool) -> list[list[int]]:
    """Return rows of an adapter's kind that it has not seen, as token ids."""
    texts = [json.loads(line)["text"] for line in (folder / f"{name}.test.jsonl").open(encoding="utf-8")]
    half = texts[: TEST_ROWS // 2] if chosen_on else texts[TEST_ROWS // 2 :]
    rows = [generator.encode_prompt(text, generator.base.tokenizer, 0).token_ids for text in half]
    needed = max(LENGTHS) + CONTINUATION
    return [row[:needed] for row in rows if len(row) >= needed][:PROMPTS]


def _share_of_gain(generator: Generator, names: list[str], folder: Path) -> list[Figure]:
    """Measure gains on what follows a prompt: of the choice, and of the best choice for each."""
    chosen, best = dict.fromkeys(LENGTHS, 0.0), dict.fromkeys(LENGTHS, 0.0)
    own: dict[int, list[bool]] = {length: [] for length in LENGTHS}
    by_adapter = {name: [0.0, 0.0] for name in names}
    for name in names:
        for row in unseen_rows(generator, folder, name, chosen_on=False):
            gains = token_gains(generator, names, row)
            for length in LENGTHS:
                adapter = choose(generator, names, row[:length]).adapter
                following = gains[:, length - 1 : length - 1 + CONTINUATION].mean(1)
                gain = following[names.index(adapter)] if adapter else 0.0
                chosen[length] += gain
                best[length] += max(0.0, following.max())
                own[length].append(adapter == name)
                by_adapter[name][0] += gain
                by_adapter[name][1] += max(0.0, following.max())
    figures = [
        figure(
            f"share of the best choice's gain, prompts of {length} tokens",
            100 * chosen[length] / best[length],
            "%",
            f"{100 * np.mean(own[length]):.0f}% to the adapter of the text",
        )
        for length in LENGTHS
    ]
    figures += [
        figure(f"share of the best choice's gain, texts of {name}", 100 * gain / most, "%")
        for name, (gain, most) in by_adapter.items()
    ]
    share = 100 * sum(chosen.values()) / sum(best.values())
    return [figure("share of the best choice's gain, all prompts", share, "%", "must be 90"), *figures]


def _left_to_base(generator: Generator, names: list[str]) -> list[Figure]:
    """Measure the share of prompts of other kinds that the base gets."""
    left: dict[int, list[bool]] = {length: [] for length in LENGTHS}
    for text in other_texts(chosen_on=False):
        row = generator.encode_prompt(text, generator.base.tokenizer, 0).token_ids
        for length in LENGTHS:
            if length <= len(row):
                left[length].append(choose(generator, names, row[:length]).adapter is None)
    everything = [each for length in LENGTHS for each in left[length]]
    figures = [
        figure(
            f"left to the base of other text, prompts of {length} tokens",
            100 * float(np.mean(left[length])),
            "%",
            f"{len(left[length])} prompts",
        )
        for length in LENGTHS
    ]
    return [
        figure(
            "left to the base of other text, all prompts", 100 * float(np.mean(everything)), "%", "must be 90"
        ),
        *figures,
    ]


def _times(generator: Generator, names: list[str], rounds: int) -> list[Figure]:
    """Measure the time to the first token with a named adapter and with a chosen one."""
    _, lora = generator.get_or_load(names[0])
    text = " ".join(ASKED)
    row = generator.encode_prompt(text * 3, generator.base.tokenizer, 0).token_ids

    def first_token(length: int, auto: bool) -> None:
        if auto:
            choose(generator, names, row[:length])
        sampling = SamplingParams(max_new_tokens=1, greedy=True)
        sequence = Sequence(generator.base, row[:length], sampling, None, names[0], lora)
        generator.engine.add([sequence])
        while generator.engine.sequences:
            generator.engine.step()

    candidates: dict[str, Callable[[], object]] = {
        f"{length} tokens, {'auto' if auto else 'named'}": partial(first_token, length, auto)
        for length in (*TIMED, routing.MAX_TOKENS)
        for auto in (False, True)
    }
    seconds = median_seconds(candidates, rounds)
    named = seconds[f"{routing.MAX_TOKENS} tokens, named"]
    figures = []
    for length in dict.fromkeys((*TIMED, routing.MAX_TOKENS)):
        alone, auto = seconds[f"{length} tokens, named"], seconds[f"{length} tokens, auto"]
        note = f"auto: {auto:.2f} s; the choice: {(auto - alone) / named:.2f} named prefills of "
        note += f"{routing.MAX_TOKENS} tokens (must be at most 3)"
        figures.append(figure(f"first token after {length} tokens, named adapter", alone, "s", note))
    return figures


# The adapters


def train_adapters() -> Path:
    """Train the adapters that are missing, and return their library."""
    folder = atomic_io.cache_dir().with_name("lora_tuner-benchmarks") / "routing"
    folder.mkdir(parents=True, exist_ok=True)
    sources = {name: rows for name, make in SOURCES.items() if len(rows := [*make()]) >= ROWS}
    for name in [*sources][:ADAPTERS]:
        data, test = folder / f"{name}.jsonl", folder / f"{name}.test.jsonl"
        if not test.is_file():
            rows = random.Random(0).sample(sources[name], ROWS)
            shortened = [row[:TRAIN_CHARS] for row in rows[TEST_ROWS:]]
            for file, part in ((data, shortened), (test, rows[:TEST_ROWS])):
                file.write_text("".join(json.dumps({"text": row}) + "\n" for row in part), encoding="utf-8")
        if (folder / LIBRARY / name).is_dir():
            continue
        print(f"training {name}", file=sys.stderr, flush=True)
        config = TrainConfig(
            dataset=str(data),
            name=name,
            base=EMBEDDED_BASE,
            max_steps=STEPS,
            batch_size=1,
            max_length=TRAIN_TOKENS,
            long_rows="truncate",
            clean="none",
            eval_rows=EVAL_ROWS,
            adapters_dir=folder / LIBRARY,
            runs_dir=folder / "runs",
        )
        train(config, notify=None)
    return folder / LIBRARY


def _reviews() -> Iterator[str]:
    yield from (row[:ROW_CHARS] for row in load_dataset(TrainConfig()).train[:2_000])


def _files(folder: Path | str, pattern: str, most: int = 400) -> Iterator[str]:
    """Yield the texts of some files."""
    paths = sorted(Path(folder).glob(pattern))
    for path in random.Random(0).sample(paths, min(most, len(paths))):
        try:
            data = path.read_bytes()
            yield (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        except (OSError, UnicodeDecodeError):
            continue


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    """Yield pieces of about `ROW_CHARS` characters that begin after a blank line."""
    for text in texts:
        piece = ""
        for block in re.split(r"\n\s*\n", text):
            piece = f"{piece}\n\n{block}" if piece else block.lstrip("\n")
            if len(piece) >= 0.8 * ROW_CHARS:
                yield piece[:ROW_CHARS]
                piece = ""


def _readmes() -> Iterator[str]:
    for package in metadata.distributions():
        yield (package.read_text("METADATA") or "").partition("\n\n")[2]


def _licences() -> Iterator[str]:
    yield from _files("/usr/share/common-licenses", "*")
    for package in metadata.distributions():
        for file in package.files or ():
            path = Path(str(package.locate_file(file)))
            if re.search(r"licen[sc]e|copying", path.name, re.IGNORECASE) and path.suffix in ("", ".txt", ".md"):
                yield path.read_text(encoding="utf-8", errors="ignore")


def _reference() -> Iterator[str]:
    """Yield the reference of the language that `help()` shows."""
    from pydoc_data.topics import topics

    yield from topics.values()


def _german() -> Iterator[str]:
    """Yield manual pages in German, without the commands of roff."""
    for text in _files("/usr/share/man/de", "man*/*.gz"):
        yield re.sub(r"^['.].*\n", "\n", re.sub(r"\\f.|\\", "", text), flags=re.MULTILINE)


def _logs() -> Iterator[str]:
    """Make log lines in JSON."""
    draw = random.Random(0)
    for _ in range(2 * ROWS):
        second, lines = draw.randrange(80_000), []
        for _ in range(12):
            second += draw.randrange(1, 30)
            line = {
                "time": f"2026-05-{draw.randrange(1, 29):02}T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}Z",
                "level": draw.choice(["info", "info", "warning", "error"]),
                "service": draw.choice(["checkout", "search", "billing", "login"]),
                "status": draw.choice([200, 200, 201, 404, 500]),
                "path": f"/api/{draw.choice(['items', 'users', 'carts'])}/{draw.randrange(10_000)}",
                "milliseconds": draw.randrange(2, 900),
            }
            lines.append(json.dumps(line))
        yield "\n".join(lines)[:ROW_CHARS]


def _orders() -> Iterator[str]:
    """Make statements in SQL."""
    draw = random.Random(1)
    for _ in range(2 * ROWS):
        rows = [
            f"INSERT INTO orders (id, customer, article, price) VALUES ({draw.randrange(10**6)}, "
            f"'{draw.choice(['Meier', 'Rossi', 'Novak', 'Smith'])}', '{draw.choice(['desk', 'lamp', 'chair'])}', "
            f"{draw.randrange(10_000) / 100});"
            for _ in range(16)
        ]
        yield "\n".join(rows)[:ROW_CHARS]


_PACKAGES = sysconfig.get_path("purelib")
# Name -> rows; the first eight that this machine has.
SOURCES: dict[str, Callable[[], Iterator[str]]] = {
    "reviews": _reviews,
    "python": lambda: _pieces(_files(sysconfig.get_path("stdlib"), "*.py")),
    "cpp": lambda: _pieces(_files(f"{_PACKAGES}/torch/include", "ATen/**/*.h")),
    "licences": lambda: _pieces(_licences()),
    "reference": lambda: _pieces(_reference()),
    "german": lambda: _pieces(_german()),
    "readmes": lambda: _pieces(_readmes()),
    "logs": _logs,
    "orders": _orders,
}


def other_texts(*, chosen_on: bool) -> list[str]:
    """Return texts of none of the adapters: what people ask, and files of other kinds."""
    rare = [
        _files("/usr/share/perl5", "**/*.pm", 20),
        _files("/etc/init.d", "*"),
        _files("/usr/share/man/fr", "man*/*.gz", 20),
        _files(f"{_PACKAGES}/gradio/templates/frontend/assets", "*.css", 20),
        _files(f"{_PACKAGES}/gradio/templates/frontend/assets", "*.js", 20),
        _files(f"{_PACKAGES}/certifi", "*.pem"),
        _files(f"{_PACKAGES}/tzdata/zoneinfo", "tzdata.zi"),
        _files(f"{_PACKAGES}/matplotlib/mpl-data/images", "*.svg", 20),
    ]
    half = slice(0 if chosen_on else 1, None, 2)
    texts = list(ASKED[half])
    for files in map(list, rare):
        starts = range(0, 2 * ROW_CHARS if len(files) > 1 else 2 * PROMPTS * ROW_CHARS, ROW_CHARS)
        by_file = [[text[start : start + ROW_CHARS] for start in starts] for text in files]
        # Both halves share no file, unless there is but one.
        halves = by_file[half] if len(files) > 1 else [pieces[half] for pieces in by_file]
        pieces = [piece for pieces in halves for piece in pieces if len(piece) > 60]
        texts += random.Random(0).sample(pieces, min(PROMPTS, len(pieces)))
    return texts
