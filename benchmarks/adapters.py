"""Many adapters with the embedded base: list, load, switch, mixed batches; compared with PEFT."""

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
from lora_tuner.models.base_files import quiet_transformers
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .measure import Figure, figure, median_seconds, seconds

CLI = Path(__file__).parents[1] / "cli.py"
RESIDENT = (1, 10, 20, 100)
RANKS, BATCHES = (2, 32, 128), (1, 2, 16, 32)
ROWS, NEW_TOKENS = 8, 24
GREEDY = SamplingParams(greedy=True, max_new_tokens=NEW_TOKENS, repetition_penalty=1.0)
PROMPT = "This film is about a man who"


def run(rounds: int) -> list[Figure]:
    """Takes some minutes, and 1 GB of disk for a hundred adapters."""
    parts = (_list_command, _load_and_switch, _peft_load_and_switch, _mixed_batches, _scaling)
    with tempfile.TemporaryDirectory() as folder:
        adapters_dir = Path(folder) / "adapters"
        save_random_adapters(adapters_dir, max(RESIDENT) + rounds)
        return [result for measure in parts for result in measure(adapters_dir, rounds)]


def save_random_adapters(adapters_dir: Path, count: int, seed: int = 0, rank: int = 8) -> None:
    """Save adapters on all linear layers, with random weights and a manifest."""
    base = load_base(find_base(EMBEDDED_BASE))
    model: Any = lora.add_lora(base, TrainConfig(rank=rank))
    tensors = lora.adapter_state_dict(model)
    for number in range(count):
        torch.manual_seed(seed * count + number)
        folder = adapters_dir / f"a{number}"
        weights = {name: torch.randn_like(tensor) * 0.02 for name, tensor in tensors.items()}
        lora.save_adapter_files(weights, model.peft_config[lora.ADAPTER_NAME], folder)
        path = folder / adapter.WEIGHTS_FILE
        info = WeightsInfo(sha256=atomic_io.sha256_file(path), bytes=path.stat().st_size, parameters=1)
        manifest = Manifest(created=utc_timestamp(), base=base.info(with_template=False), weights=info)
        (folder / adapter.MANIFEST_FILE).write_text(manifest.to_json())


def _list_command(adapters_dir: Path, rounds: int) -> list[Figure]:
    twenty = adapters_dir.parent / "twenty"
    twenty.mkdir()
    for number in range(20):
        (twenty / f"a{number}").symlink_to(adapters_dir / f"a{number}")
    command = [sys.executable, str(CLI), "adapters", "list", "--adapters-dir", str(twenty)]
    env = os.environ | {"PYTHONPATH": str(CLI.parent)}
    times = [
        seconds(lambda: subprocess.run(command, check=True, capture_output=True, env=env)) for _ in range(rounds)
    ]
    return [figure("cli.py adapters list, 20 adapters", statistics.median(times), "s", "entire process")]


def _load_and_switch(adapters_dir: Path, rounds: int) -> list[Figure]:
    figures = []
    generator = Generator(adapters_dir=adapters_dir, options=ModelOptions(base=EMBEDDED_BASE))
    for resident in RESIDENT:
        for number in range(len(generator.loaded_adapters), resident):
            generator.set_adapter(f"a{number}")
        loads: list[float] = []
        first_switches: list[float] = []
        switches: list[float] = []
        for number in range(rounds):
            extra = f"a{max(RESIDENT) + number}"
            loads.append(seconds(partial(generator.set_adapter, extra)))
            generator.unload(extra)
            name = f"a{number % resident}"
            _, loaded = generator.get_or_load(name)
            assert loaded is not None
            loaded.fused.clear()  # fused weights are cached
            for times in (first_switches, switches):
                _switch(generator, None)
                times.append(seconds(partial(_switch, generator, name)))
        beside = f"{resident} resident"
        figures += [
            figure(f"load an adapter, {beside}", statistics.median(loads) * 1e3, "ms", "read, hash, check, copy"),
            figure(
                f"switch to a resident adapter, {beside}",
                statistics.median(first_switches) * 1e3,
                "ms",
                f"fuses its tensors; {statistics.median(switches) * 1e3:.2g} ms when fused",
            ),
        ]
    return figures


def _switch(generator: Generator, name: str | None) -> None:
    """Do what is done between outputs of two adapters."""
    _, loaded = generator.get_or_load(name)
    assert generator.engine.cpu_decoder is not None
    generator.engine.cpu_decoder.new_lora(generator.engine.multi_lora).set_rows([loaded])


def _peft_load_and_switch(adapters_dir: Path, rounds: int) -> list[Figure]:
    """The same with PEFT, which neither hashes nor checks files; up to 20 adapters, as each takes
    longer than the last."""
    figures = []
    model = load_base(find_base(EMBEDDED_BASE)).model
    with quiet_transformers():
        wrapped = PeftModel.from_pretrained(model, adapters_dir / "a0", adapter_name="a0")
        for resident in RESIDENT[:-1]:
            for number in range(len(wrapped.peft_config), resident):
                wrapped.load_adapter(adapters_dir / f"a{number}", adapter_name=f"a{number}")
            loads, switches = [], []
            for number in range(rounds):
                extra = f"a{max(RESIDENT) + number}"
                loads.append(seconds(partial(wrapped.load_adapter, adapters_dir / extra, adapter_name=extra)))
                wrapped.delete_adapter(extra)
                switches.append(seconds(partial(wrapped.set_adapter, f"a{number % resident}")))
            beside = f"{resident} resident"
            figures += [
                figure(f"PEFT: load_adapter, {beside}", statistics.median(loads) * 1e3, "ms"),
                figure(f"PEFT: set_adapter, {beside}", statistics.median(switches) * 1e3, "ms"),
            ]
    return figures


def _mixed_batches(adapters_dir: Path, rounds: int) -> list[Figure]:
    """Batches of eight rows: eight adapters, one adapter, plain base, one row at a time; and PEFT's
    `adapter_names`."""
    names = [f"a{number}" for number in range(ROWS)]
    generator = Generator(*names, adapters_dir=adapters_dir, options=ModelOptions(base=EMBEDDED_BASE))
    plain = load_base(find_base(EMBEDDED_BASE))
    with quiet_transformers():
        wrapped = PeftModel.from_pretrained(plain.model, adapters_dir / "a0", adapter_name="a0").eval()
        for name in names[1:]:
            wrapped.load_adapter(adapters_dir / name, adapter_name=name)
    inputs = plain.tokenizer([PROMPT] * ROWS, return_tensors="pt").to(plain.device)

    def peft_generate() -> None:
        with torch.inference_mode(), quiet_transformers():
            wrapped.generate(
                **inputs,
                adapter_names=names,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
            )

    candidates: dict[str, Callable[[], Any]] = {
        f"{ROWS} rows, the plain base": lambda: generator.generate_batch([(PROMPT, None)] * ROWS, GREEDY),
        f"{ROWS} rows, one adapter": lambda: generator.generate_batch([(PROMPT, "a0")] * ROWS, GREEDY),
        f"{ROWS} rows, {ROWS} adapters": lambda: generator.generate_batch(
            [(PROMPT, name) for name in names], GREEDY
        ),
        f"{ROWS} adapters, one after another": lambda: [
            generator.generate_batch([(PROMPT, name)], GREEDY) for name in names
        ],
        f"PEFT: {ROWS} rows, {ROWS} adapters": peft_generate,
    }
    assert not any(output.finished for output in candidates[f"{ROWS} rows, {ROWS} adapters"]()), (
        "an output ended early"
    )
    medians = median_seconds(candidates, rounds)
    one = medians[f"{ROWS} rows, one adapter"]
    return [
        figure(name, ROWS * NEW_TOKENS / duration, "tokens/s", f"{one / duration:.2f} of one adapter's speed")
        for name, duration in medians.items()
    ]


def _scaling(adapters_dir: Path, rounds: int) -> list[Figure]:
    """Mixed batches by rank and by number of rows; loading by rank."""
    names, figures = [f"a{number}" for number in range(ROWS)], []
    candidates: dict[str, Callable[[], Any]] = {}
    rows_of = {}
    for rank in RANKS:
        folder = adapters_dir.parent / f"rank{rank}"
        save_random_adapters(folder, ROWS, rank=rank)
        generator = Generator(adapters_dir=folder, options=ModelOptions(base=EMBEDDED_BASE))
        loads = [seconds(partial(generator.get_or_load, name)) for name in names]
        figures.append(figure(f"load an adapter of rank {rank}", statistics.median(loads) * 1e3, "ms"))
        label = f"{ROWS} rows, {ROWS} adapters of rank {rank}"
        requests = [(PROMPT, name) for name in names]
        candidates[label], rows_of[label] = partial(generator.generate_batch, requests, GREEDY), ROWS
    generator = Generator(adapters_dir=adapters_dir, options=ModelOptions(base=EMBEDDED_BASE))
    for rows in BATCHES:
        label = f"{rows} rows, {min(rows, ROWS)} adapters of rank 8"
        requests = [(PROMPT, names[row % ROWS]) for row in range(rows)]
        candidates[label], rows_of[label] = partial(generator.generate_batch, requests, GREEDY), rows
    medians = median_seconds(candidates, rounds)
    return figures + [
        figure(name, rows_of[name] * NEW_TOKENS / duration, "tokens/s") for name, duration in medians.items()
    ]
