"""Runs benchmarks and prints a table: `make bench`, or `python -m benchmarks adapters --json figures.json`.

Every figure is a median over rounds in which the things compared take turns, for machines are noisy; what counts is the
ratio of two figures of one run.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import adapters, data, defaults, generation, growth, larger, methods, quality, serving, sizes, stream, training

PARTS = {
    "training": training.run,
    "quality": quality.run,
    "generation": generation.run,
    "adapters": adapters.run,
    "data": data.run,
    "serving": serving.run,
    "defaults": defaults.run,
    "methods": methods.run,
    "sizes": sizes.run,
    "stream": stream.run,
    "growth": growth.run,
    "larger": larger.run,
}
STUDIES = ("defaults", "methods", "sizes", "larger", "stream", "growth")  # which take long
PACKAGES = ("lora_tuner", "torch", "transformers", "peft", "trl", "llama_cpp_python")


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {it.name: it.version for it in importlib.metadata.distributions() if it.name in PACKAGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure this tool beside others.")
    what = f"of {', '.join(PARTS)}; all but {' and '.join(STUDIES)}, which are studies of settings, when none is named"
    parser.add_argument("parts", nargs="*", metavar="PART", help=what)
    parser.add_argument("--json", type=Path, help="write the figures and the machine into this file as well")
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns that each thing takes; figures are medians over them"
    )
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    facts = machine()
    figures = {}
    for name in options.parts or [name for name in PARTS if name not in STUDIES]:
        figures[name] = PARTS[name](options.rounds)
        grid = Table("what", "figure", "", "in other words", title=name, box=None, title_justify="left")
        for figure in figures[name]:
            grid.add_row(figure["what"], f"{figure['value']:,.4g}", figure["unit"], figure.get("note", ""))
        Console(width=120 if sys.stdout.isatty() else 200, highlight=False).print(grid)
        if options.json:  # after each part: the whole takes two hours
            options.json.write_text(
                json.dumps({"machine": facts, "figures": figures}, indent=2) + "\n", encoding="utf-8"
            )
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
