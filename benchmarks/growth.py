"""How a step grows with the parameters of the base, and what a second process gives: Llamas with random weights, rank 8 on all
linear layers, one sequence of 512 tokens a step and process, float32. With rows, tokens and rank: `data`; with
adapters: `adapters`. A split base is refused on a CPU, and let here for the sake of the figure (`split.py`).
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
PROCESSES = ((1, 1, CLI), (1, 2, CLI), (2, 1, CLI), (2, 1, SPLIT))  # threads of each, and how they begin


def run(rounds: int) -> list[Figure]:
    """Takes some ten minutes."""
    figures = []
    with tempfile.TemporaryDirectory() as place:
        for number, shape in enumerate(SHAPES):
            base = f"{place}/{number}"
            larger.make(base, shape)
            found = [larger.step(base, {"dtype": "float32", "gradient_checkpointing": "off"}) for _ in range(rounds)]
            seconds, peak = (statistics.median(it[name] for it in found) for name in ("seconds", "peak"))
            note = f"{peak / 1e9:.2f} GB at the most"
            figures.append(figure(f"{found[0]['parameters'] / 1e6:.0f} million parameters", seconds, "s a step", note))
            print(figures[-1], file=sys.stderr, flush=True)
        for many, threads, script in PROCESSES:
            plans = [_plan(f"{place}/0", many, threads, script) for _ in range(rounds)]
            speed, size = (
                statistics.median(it[name] for it in plans) for name in ("tokens_per_second", "adapter_bytes")
            )
            note = f"a step exchanges {size / 1e6:.1f} MB of gradients" if many > 1 else ""
            split = ", base split" if script == SPLIT else ""
            figures.append(figure(f"processes {many}, threads of each {threads}{split}", speed, "tokens/s", note))
            print(figures[-1], file=sys.stderr, flush=True)
    return figures


def _plan(base: str, many: int, threads: int, script: Path) -> dict[str, float]:
    given = [
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
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(many)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(CLI.parent)}
    if script == SPLIT:
        env |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    asked = [sys.executable, *start, str(script), "train", "--plan", "--json", *given]
    found: dict[str, float] = json.loads(subprocess.run(asked, env=env, capture_output=True, check=True).stdout)
    return found
