"""Training speed and peak memory of this tool, the plain recipes and TRL, one process each, taking turns.

The floor is the time of the bare matrix products of the same step.
"""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lora_tuner import ModelOptions, TrainConfig, train
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.data.dataset import load_dataset
from lora_tuner.evaluation import held_out_loss
from lora_tuner.models import kernels, packing_checks
from lora_tuner.models.base_files import quiet_transformers
from lora_tuner.models.layers import layer_sizes
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.models.tokenizer import load_tokenizer
from lora_tuner.training.arguments import LiveLog
from lora_tuner.training.samples import RunSamples
from lora_tuner.training.setup import prepare_training
from lora_tuner.training.trainer import LoraTrainer

from . import recipes
from .measure import Figure, figure

LENGTH, BATCH, STEPS, ROWS, HELD_OUT = 512, 8, 2, 600, 60
PROMPTS = ["Acting", "The plot", "This film"]
SHAPES = ("distilgpt2", EMBEDDED_BASE)
WAYS = {
    "ours": "rank 8 on all linear layers, float32, 8 x 512 a step in micro-batches of 1",
    "ours, bfloat16": "the same with --dtype bfloat16",
    "ours, one sequence": "float32, 1 x 512 a step",
    "ours, bfloat16, one sequence": "the same with --dtype bfloat16",
    "ours, bfloat16, one sequence, no kernels": "the same without a C compiler: transformers' layers",
    "plain": "stock Trainer and PEFT, the same update, every review padded to 512, batch 8",
    "trl": "TRL's SFTTrainer, packing, the same update, batch 8",
    "trl, micro-batches": "the same in micro-batches of 1",
    "full": "full fine-tuning at 128 tokens, as in tutorials",
}
MEASURED = ("held-out loss, bfloat16", "held-out loss, float32, transformers' layers")


def run(rounds: int) -> list[Figure]:
    """Takes ten minutes a round on two cores, most of it TRL's, and ten more."""
    figures = []
    for shape in SHAPES:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in (*WAYS, "floor", "floor, bfloat16")}
        for turn in range(rounds):
            for way, results in found.items():
                if turn == 0 or way != "trl" or shape == SHAPES[0]:  # five minutes a step, so it takes one turn
                    results.append(_in_a_process(way, shape))
        speed = {way: statistics.median(it["speed"] for it in results) for way, results in found.items()}
        memory = {way: statistics.median(it["peak"] for it in results) for way, results in found.items()}
        for way, what in WAYS.items():
            beside = f"{speed['ours'] / speed[way]:.2f} x of it is ours" if not way.startswith("ours") else what
            figures += [
                figure(f"{shape}: {way}", speed[way], "tokens/s", beside),
                figure(f"{shape}: {way}, peak memory", memory[way] / 1e9, "GB", what),
            ]
        for floor, ours in (("floor", "ours, one sequence"), ("floor, bfloat16", "ours, bfloat16, one sequence")):
            share = speed[ours] / speed[floor]
            name = floor.replace("floor", "bare products")
            figures.append(
                figure(f"{shape}: {name}", speed[floor], "tokens/s", f"one sequence gets {share:.2f} of it")
            )
        share = speed["ours, bfloat16, one sequence"] / speed["ours, bfloat16, one sequence, no kernels"]
        figures.append(figure(f"{shape}: with kernels of without, bfloat16", share, "x", "must be at least 2"))
        share = memory["ours"] / memory["plain"]
        figures.append(figure(f"{shape}: memory, ours of plain", share, "", "must be at most 0.25"))
    return figures


def measuring(rounds: int) -> list[Figure]:
    """Speed of the held-out loss of the embedded base, beside transformers' layers in float32, which were used before."""
    found: dict[str, list[float]] = {way: [] for way in MEASURED}
    for _ in range(rounds):
        for way, speeds in found.items():
            speeds.append(_in_a_process(way, EMBEDDED_BASE)["speed"])
    ours, before = (statistics.median(speeds) for speeds in found.values())
    note = f"{ours / before:.2f} x (must be 4)"
    return [
        figure(way, speed, "tokens/s", note)
        for way, speed, note in zip(MEASURED, (ours, before), (note, ""), strict=True)
    ]


def overhead(rounds: int) -> list[Figure]:
    """Share of a run of six minutes that is spent to watch it. `rounds` is ignored."""
    parts = {
        "samples": (RunSamples, ("on_train_begin", "on_log", "finish")),
        "held-out curve": (LoraTrainer, ("evaluate",)),
        "live files": (LiveLog, ("on_train_begin", "on_log")),
    }
    spent = dict.fromkeys(parts, 0.0)

    def timed(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                spent[part] += time.perf_counter() - start

        return call

    with contextlib.ExitStack() as patches, tempfile.TemporaryDirectory() as folder:
        for part, (owner, names) in parts.items():
            for name in names:
                method = timed(part, getattr(owner, name))
                patches.enter_context(mock.patch.object(owner, name, method))
        config = TrainConfig(
            base=EMBEDDED_BASE,
            minutes=6,
            eval_rows=64,
            sample_prompt=PROMPTS,
            adapters_dir=Path(folder, "adapters"),
            runs_dir=Path(folder, "runs"),
        )
        adapter = train(config)
    assert adapter.manifest is not None
    assert adapter.manifest.run is not None
    run = adapter.manifest.run
    whole = run.seconds + sum(spent.values())
    figures = []
    for part in parts:
        figures.append(figure(part, 100 * spent[part] / whole, "%", f"{spent[part]:.1f} s"))
    note = f"{run.steps:,} steps, {whole:.0f} s; at most 3 for the curve, 3 for the others"
    return [*figures, figure("all", 100 * sum(spent.values()) / whole, "%", note)]


def _in_a_process(way: str, shape: str) -> dict[str, Any]:
    env = os.environ | ({"CC": "no-compiler"} if way.endswith("no kernels") else {})
    done = subprocess.run(
        [sys.executable, "-m", __name__, way, shape], check=True, stdout=subprocess.PIPE, text=True, env=env
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def base_of(shape: str, place: Path) -> str:
    """The embedded base; or distilgpt2's shape with random weights, made on the spot."""
    if shape == EMBEDDED_BASE:
        return shape
    torch.manual_seed(0)
    with quiet_transformers():
        GPT2LMHeadModel(GPT2Config(n_layer=6)).save_pretrained(place)
        load_tokenizer(find_base(EMBEDDED_BASE)).save_pretrained(place)
    return str(place)


def _ours(
    name: str, place: Path, dtype: str, steps: int = STEPS, **changes: Any
) -> tuple[list[float], list[int]]:
    """Train. Returns seconds and predictions of each step."""
    settings: dict[str, Any] = {
        "batch_size": 1,
        "gradient_accumulation": BATCH,
        "max_length": LENGTH,
        "max_rows": ROWS,
        "long_rows": "truncate",
    } | changes
    config = TrainConfig(
        base=name,
        dtype=dtype,
        max_steps=steps,
        eval_rows=2,
        name="speed",
        adapters_dir=place / "adapters",
        runs_dir=place / "runs",
        overwrite=True,
        **settings,
    )
    adapter = train(config)
    lines = [json.loads(line) for line in (adapter.path / "metrics.jsonl").read_text().splitlines()]
    return [it["seconds"] for it in lines if "loss" in it], [it["tokens"] for it in lines if "loss" in it]


def _theirs(way: str, name: str) -> tuple[list[float], list[int]]:
    texts = load_dataset(TrainConfig(max_rows=ROWS)).train
    known: dict[str, Callable[..., recipes.Clock]] = {
        "plain": recipes.plain,
        "trl": recipes.with_trl,
        "trl, micro-batches": partial(recipes.with_trl, accumulation=8),
        "full": recipes.tutorial,
    }
    kernels.tune_malloc()  # for the recipes too: training does it by itself
    recipe = known[way]
    clock = recipe(*recipes.stock(name), texts, STEPS)
    return clock.seconds, clock.tokens


def _floor(name: str, dtype: str) -> tuple[list[float], list[int]]:
    """Time the matrix products of one packed sequence, forward and backward, with nothing between them.

    Real weights, so that the caches are as cold as in a step.
    """
    setup = prepare_training(
        TrainConfig(
            base=name,
            max_length=LENGTH,
            max_steps=1,
            max_rows=ROWS,
            eval_rows=2,
            dtype=dtype,
            long_rows="truncate",
        )
    )
    model: Any = setup.base.model
    config, rank = model.config, setup.config.rank
    rows = max((setup.sequences[i] for i in range(len(setup.sequences))), key=lambda it: sum(map(len, it)))
    count = sum(map(len, rows))
    heads = config.num_attention_heads
    layers = [layer.base_layer for layer in model.modules() if hasattr(layer, "base_layer")]
    sizes = layer_sizes({str(number): layer for number, layer in enumerate(layers)}).values()
    head = model.get_output_embeddings().weight
    products: list[Callable[[], Any]] = []

    filled = lru_cache(None)(partial(torch.randn, dtype=setup.base.dtype))
    room = lru_cache(None)(partial(torch.empty, dtype=setup.base.dtype))

    def product(a: tuple[int, ...], b: tuple[int, ...] | torch.Tensor) -> None:
        left, right = filled(a), b if isinstance(b, torch.Tensor) else filled(b)
        products.append(partial(torch.matmul, left, right, out=room((*a[:-1], right.shape[-1]))))

    for number, (layer, (into, out)) in enumerate(zip(layers, sizes, strict=True)):
        weight = layer.weight if layer.weight.shape == (into, out) and into != out else layer.weight.T
        product((count, into), weight)
        if number:  # nothing below the first layer learns
            product((count, out), weight.T)
        for left, right in (
            ((rank, into), (into, count)),
            ((count, rank), (rank, out)),
            ((rank, out), (out, count)),
            ((rank, count), (count, into)),
            ((rank, count), (count, out)),
            ((count, rank), (rank, into)),
        ):
            product(left, right)
    for row in map(len, rows):
        size = config.hidden_size // heads
        for _ in range(config.num_hidden_layers):
            for _ in range(2):  # scores forward and backward; then the other four
                product((heads, row, size), (heads, size, row))
            for _ in range(4):
                product((heads, row, row), (heads, row, size))
    product((count, head.shape[1]), head.T)
    product((count, head.shape[0]), head)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        with torch.inference_mode():
            for it in products:
                it()
        times.append(time.perf_counter() - start)
    return times, [count] * len(times)


def _held_out(name: str, way: str, dtype: str) -> tuple[list[float], list[int]]:
    """Measure the loss of the base on reviews, twice."""
    base = load_base(find_base(name), ModelOptions(dtype=dtype))
    if way == MEASURED[0]:
        packing_checks.enable_fast_paths(base)
    rows = held_out_loss.encode_held_out(base, load_dataset(TrainConfig(max_rows=ROWS)).held_out[:HELD_OUT])
    times = []
    for _ in range(2):
        start = time.perf_counter()
        held_out_loss.measure_loss(base.model, base, rows)
        times.append(time.perf_counter() - start)
    return times, [sum(map(len, rows))] * 2


def _worker(way: str, shape: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        name = base_of(shape, place / "base")
        with quiet_transformers():
            dtype = "bfloat16" if "bfloat16" in way else "float32"
            if way.startswith("floor"):
                seconds, tokens = _floor(name, dtype)
            elif way in MEASURED:
                seconds, tokens = _held_out(name, way, dtype)
            elif "one sequence" in way:
                seconds, tokens = _ours(name, place, dtype, steps=8, gradient_accumulation=1)
            elif way.startswith("ours"):
                seconds, tokens = _ours(name, place, dtype)
            else:
                seconds, tokens = _theirs(way, name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"speed": sum(tokens[1:]) / sum(seconds[1:]), "peak": peak}))  # the first step warms up


if __name__ == "__main__":
    _worker(*sys.argv[1:])
