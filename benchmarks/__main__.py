"""Run benchmarks and print a table: `make bench`, or `python -m benchmarks adapters --json
figures.json`.

Each figure is a median over rounds in which the candidates alternate, because machines are noisy.
Compare figures of one run only.
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

from . import (
    adapters,
    data,
    defaults,
    doublings,
    generation,
    growth,
    labels,
    larger,
    methods,
    near_duplicates,
    page,
    preferences,
    quality,
    rates,
    report,
    routing,
    serving,
    sizes,
    stream,
    training,
)

PARTS = {
    "training": training.run,
    "measuring": training.measuring,
    "overhead": training.overhead,
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
    "near_duplicates": near_duplicates.run,
    "rates": rates.run,
    "page": page.run,
    "report": report.run,
    "routing": routing.run,
    "routing_times": routing.run_times,
    "doublings": doublings.run,
    "preferences": preferences.run,
    "preference_rates": preferences.rates,
    "labels": labels.run,
    "vllm": serving.beside_vllm,
}
STUDIES = (
    "overhead",
    "defaults",
    "methods",
    "sizes",
    "larger",
    "stream",
    "growth",
    "near_duplicates",
    "rates",
    "page",
    "report",
    "routing",
    "routing_times",
    "doublings",
    "preferences",
    "preference_rates",
    "labels",
    "vllm",
)  # slow, so they run only when named
PACKAGES = ("lora_tuner", "torch", "transformers", "peft", "trl", "xllamacpp")


def machine() -> dict[str, object]:
    """Describe the machine and the package versions."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {
            dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name in PACKAGES
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure lora_tuner and other tools."
    )
    parts = f"benchmarks to run: {', '.join(PARTS)} (default: all except the studies {', '.join(STUDIES)})"
    parser.add_argument("parts", nargs="*", metavar="PART", help=parts)
    parser.add_argument("--json", type=Path, help="also write figures and machine to this file")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; figures are medians over them")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    facts = machine()
    figures = {}
    for name in options.parts or [name for name in PARTS if name not in STUDIES]:
        figures[name] = PARTS[name](options.rounds)
        grid = Table("what", "figure", "unit", "note", title=name, box=None, title_justify="left")
        for figure in figures[name]:
            grid.add_row(figure["what"], f"{figure['value']:,.4g}", figure["unit"], figure.get("note", ""))
        Console(width=120 if sys.stdout.isatty() else 200, highlight=False).print(grid)
        if options.json:  # after each part, because all take two hours
            options.json.write_text(
                json.dumps({"machine": facts, "figures": figures}, indent=2) + "\n", encoding="utf-8"
            )
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
