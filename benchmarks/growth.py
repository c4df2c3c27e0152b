"""Time per step by parameters of the base, and speed by number of processes.

Llamas with random weights, rank 8 on all linear layers, one sequence of 512 tokens per step and process, float32. Growth
with rows, tokens and rank is in `data`, with adapters in `adapters`. FSDP is refused on CPUs; `split.py` allows it here.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from . import larger
from .measure import Figure, figure

CLI, SPLIT = Path(__file__).parents[1] / "cli.py", Path(__file__).with_name("split.py")
SHAPES = ((384, 1024, 6, 6, 6), (768, 2048, 12, 12, 12), (1024, 2816, 24, 16, 16))
PROCESSES = ((1, 1, CLI), (1, 2, CLI), (2, 1, CLI), (2, 1, SPLIT))  # processes, threads of each, script


def run(rounds: int) -> list[Figure]:
    """Takes about ten minutes."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for number, shape in enumerate(SHAPES):
            base = f"{folder}/{number}"
            larger.make(base, shape)
            runs = [
                larger.step(base, {"dtype": "float32", "gradient_checkpointing": "off"}) for _ in range(rounds)
            ]
            seconds, peak = (statistics.median(run[name] for run in runs) for name in ("seconds", "peak"))
            note = f"{peak / 1e9:.2f} GB at most"
            figures.append(
                figure(f"{runs[0]['parameters'] / 1e6:.0f} million parameters", seconds, "s per step", note)
            )
            print(figures[-1], file=sys.stderr, flush=True)
        for processes, threads, script in PROCESSES:
            plans = [_plan(f"{folder}/0", processes, threads, script) for _ in range(rounds)]
            speed, size = (
                statistics.median(plan[name] for plan in plans) for name in ("tokens_per_second", "adapter_bytes")
            )
            note = f"a step exchanges {size / 1e6:.1f} MB of gradients" if processes > 1 else ""
            sharded = ", sharded base" if script == SPLIT else ""
            figures.append(
                figure(f"{processes} processes, {threads} threads each{sharded}", speed, "tokens/s", note)
            )
            print(figures[-1], file=sys.stderr, flush=True)
    return figures


def _plan(base: str, processes: int, threads: int, script: Path) -> dict[str, float]:
    options = [
        "--base",
        base,
        "--device",
        "cpu",
        "--max-rows",
        "300",
        "--eval-rows",
        "2",
        "--batch-size",
        "1",
        "--max-steps",
        "4",
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(CLI.parent)}
    if script == SPLIT:
        env |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    command = [sys.executable, *launcher, str(script), "train", "--plan", "--json", *options]
    plan: dict[str, float] = json.loads(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
    return plan
