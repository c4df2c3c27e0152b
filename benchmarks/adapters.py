"""Many adapters beside the embedded base: list, load, swap, and batches that mix them; PEFT's own way beside ours."""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from lora_tuner import Generator, ModelOptions, SamplingParams, TrainConfig, atomic_io
from lora_tuner.adapters import adapter
from lora_tuner.adapters.manifest import Manifest, WeightsInfo, utc_timestamp
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.models import lora
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base, quiet_transformers

from .measure import Figure, figure, in_turns, seconds

CLI = Path(__file__).parents[1] / "cli.py"
RESIDENT = (1, 10, 20, 100)
RANKS, BATCHES = (2, 32, 128), (1, 2, 16, 32)
ROWS, NEW_TOKENS = 8, 24
GREEDY = SamplingParams(greedy=True, max_new_tokens=NEW_TOKENS, repetition_penalty=1.0)
PROMPT = "This film is about a man who"


def run(rounds: int) -> list[Figure]:
    """Takes some minutes, and 1 GB of disk for a hundred adapters."""
    with tempfile.TemporaryDirectory() as place:
        shelf = Path(place) / "adapters"
        make(shelf, max(RESIDENT) + rounds)
        return [part for measure in (_listing, _loading, _peft, _batches, _growth) for part in measure(shelf, rounds)]


def make(shelf: Path, count: int, seed: int = 0, rank: int = 8) -> None:
    """Adapters on all linear layers with random weights, each with its manifest."""
    base = load_base(find_base(EMBEDDED_BASE))
    model: Any = lora.add_lora(base, TrainConfig(rank=rank))
    tensors = lora.adapter_state_dict(model)
    for number in range(count):
        torch.manual_seed(seed * count + number)
        folder = shelf / f"a{number}"
        own = {name: torch.randn_like(tensor) * 0.02 for name, tensor in tensors.items()}
        lora.save_adapter_files(own, model.peft_config[lora.ADAPTER_NAME], folder)
        weights = folder / adapter.WEIGHTS_FILE
        facts = WeightsInfo(sha256=atomic_io.sha256_file(weights), bytes=weights.stat().st_size, parameters=1)
        manifest = Manifest(created=utc_timestamp(), base=base.files.base_info(base.tokenizer_hash), weights=facts)
        (folder / adapter.MANIFEST_FILE).write_text(manifest.to_json())


def _listing(shelf: Path, rounds: int) -> list[Figure]:
    twenty = shelf.parent / "twenty"
    twenty.mkdir()
    for number in range(20):
        (twenty / f"a{number}").symlink_to(shelf / f"a{number}")
    command = [sys.executable, str(CLI), "adapters", "list", "--adapters-dir", str(twenty)]
    env = os.environ | {"PYTHONPATH": str(CLI.parent)}
    times = [seconds(lambda: subprocess.run(command, check=True, capture_output=True, env=env)) for _ in range(rounds)]
    return [figure("cli.py adapters list, 20 adapters", statistics.median(times), "s", "the whole process")]


def _loading(shelf: Path, rounds: int) -> list[Figure]:
    figures = []
    generator = Generator(adapters_dir=shelf, options=ModelOptions(base=EMBEDDED_BASE))
    for resident in RESIDENT:
        for number in range(len(generator.loaded_adapters), resident):
            generator.set_adapter(f"a{number}")
        loads: list[float] = []
        firsts: list[float] = []
        swaps: list[float] = []
        for turn in range(rounds):
            extra = f"a{max(RESIDENT) + turn}"
            loads.append(seconds(partial(generator.set_adapter, extra)))
            generator.unload(extra)
            name = f"a{turn % resident}"
            _, loaded = generator.get_or_load(name)
            assert loaded is not None
            loaded.fused.clear()  # what was joined stays for the next time
            for times in (firsts, swaps):
                _swap(generator, None)
                times.append(seconds(partial(_swap, generator, name)))
        beside = f"{resident} resident"
        figures += [
            figure(f"load an adapter, {beside}", statistics.median(loads) * 1e3, "ms", "read, hash, check, copy"),
            figure(
                f"swap to a resident one, {beside}",
                statistics.median(firsts) * 1e3,
                "ms",
                f"its tensors joined for the layers; {statistics.median(swaps) * 1e3:.2g} ms from the second time on",
            ),
        ]
    return figures


def _swap(generator: Generator, name: str | None) -> None:
    """All that changes between the answers of two adapters."""
    _, loaded = generator.get_or_load(name)
    assert generator.engine.cpu_decoder is not None
    generator.engine.cpu_decoder.new_lora(generator.engine.multi_lora).set_rows([loaded])


def _peft(shelf: Path, rounds: int) -> list[Figure]:
    """The same with PEFT alone, which neither hashes nor checks; up to 20, for it takes longer with each."""
    figures = []
    model = load_base(find_base(EMBEDDED_BASE)).model
    with quiet_transformers():
        wrapped = PeftModel.from_pretrained(model, shelf / "a0", adapter_name="a0")
        for resident in RESIDENT[:-1]:
            for number in range(len(wrapped.peft_config), resident):
                wrapped.load_adapter(shelf / f"a{number}", adapter_name=f"a{number}")
            loads, swaps = [], []
            for turn in range(rounds):
                extra = f"a{max(RESIDENT) + turn}"
                loads.append(seconds(partial(wrapped.load_adapter, shelf / extra, adapter_name=extra)))
                wrapped.delete_adapter(extra)
                swaps.append(seconds(partial(wrapped.set_adapter, f"a{turn % resident}")))
            beside = f"{resident} resident"
            figures += [
                figure(f"PEFT: load_adapter, {beside}", statistics.median(loads) * 1e3, "ms"),
                figure(f"PEFT: set_adapter, {beside}", statistics.median(swaps) * 1e3, "ms"),
            ]
    return figures


def _batches(shelf: Path, rounds: int) -> list[Figure]:
    """Eight rows: eight adapters, one adapter, the plain base, one after another; and PEFT's `adapter_names`."""
    names = [f"a{number}" for number in range(ROWS)]
    generator = Generator(*names, adapters_dir=shelf, options=ModelOptions(base=EMBEDDED_BASE))
    plain = load_base(find_base(EMBEDDED_BASE))
    with quiet_transformers():
        wrapped = PeftModel.from_pretrained(plain.model, shelf / "a0", adapter_name="a0").eval()
        for name in names[1:]:
            wrapped.load_adapter(shelf / name, adapter_name=name)
    inputs = plain.tokenizer([PROMPT] * ROWS, return_tensors="pt").to(plain.device)

    def with_peft() -> None:
        with torch.inference_mode(), quiet_transformers():
            wrapped.generate(
                **inputs, adapter_names=names, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
            )

    ways: dict[str, Callable[[], Any]] = {
        f"{ROWS} rows, the plain base": lambda: generator.generate_batch([(PROMPT, None)] * ROWS, GREEDY),
        f"{ROWS} rows, one adapter": lambda: generator.generate_batch([(PROMPT, "a0")] * ROWS, GREEDY),
        f"{ROWS} rows, {ROWS} adapters": lambda: generator.generate_batch([(PROMPT, it) for it in names], GREEDY),
        f"{ROWS} adapters, one after another": lambda: [
            generator.generate_batch([(PROMPT, it)], GREEDY) for it in names
        ],
        f"PEFT: {ROWS} rows, {ROWS} adapters": with_peft,
    }
    assert not any(answer.finished for answer in ways[f"{ROWS} rows, {ROWS} adapters"]()), "all rows write to the end"
    medians = in_turns(ways, rounds)
    one = medians[f"{ROWS} rows, one adapter"]
    return [
        figure(name, ROWS * NEW_TOKENS / taken, "tokens/s", f"{one / taken:.2f} of one adapter's speed")
        for name, taken in medians.items()
    ]


def _growth(shelf: Path, rounds: int) -> list[Figure]:
    """Batches of eight adapters with their rank, and of more rows; loading with rank."""
    names, figures = [f"a{number}" for number in range(ROWS)], []
    ways: dict[str, Callable[[], Any]] = {}
    rows_of = {}
    for rank in RANKS:
        place = shelf.parent / f"rank{rank}"
        make(place, ROWS, rank=rank)
        generator = Generator(adapters_dir=place, options=ModelOptions(base=EMBEDDED_BASE))
        loads = [seconds(partial(generator.get_or_load, name)) for name in names]
        figures.append(figure(f"load an adapter of rank {rank}", statistics.median(loads) * 1e3, "ms"))
        what = f"{ROWS} rows, {ROWS} adapters of rank {rank}"
        ways[what], rows_of[what] = partial(generator.generate_batch, [(PROMPT, it) for it in names], GREEDY), ROWS
    generator = Generator(adapters_dir=shelf, options=ModelOptions(base=EMBEDDED_BASE))
    for rows in BATCHES:
        what = f"{rows} rows, {min(rows, ROWS)} adapters of rank 8"
        asked = [(PROMPT, names[row % ROWS]) for row in range(rows)]
        ways[what], rows_of[what] = partial(generator.generate_batch, asked, GREEDY), rows
    medians = in_turns(ways, rounds)
    return figures + [figure(name, rows_of[name] * NEW_TOKENS / taken, "tokens/s") for name, taken in medians.items()]
