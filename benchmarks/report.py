"""Seconds that `report` takes, beside those that it tells before: an adapter of the embedded base on real reviews."""

import re
import tempfile
import time

from lora_tuner import ModelOptions, TrainConfig, make_report, train
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.errors import Notice, Progress

from .measure import Figure, figure

STEPS, LENGTH, ROWS = 20, 256, 2_000
UNITS = {"s": 1.0, "min": 60.0}


def run(rounds: int) -> list[Figure]:
    """Takes about four minutes on two cores. There is one round, as a repeated report measures nothing again."""
    told: list[float] = []

    def listen(event: Notice | Progress) -> None:
        if isinstance(event, Notice) and (found := re.search(r"takes about ([\d.]+) (s|min)", event.text)):
            told.append(float(found[1]) * UNITS[found[2]])

    with tempfile.TemporaryDirectory() as folder:
        places = {"adapters_dir": f"{folder}/adapters", "runs_dir": f"{folder}/runs", "name": "told"}
        settings = {"base": EMBEDDED_BASE, "max_steps": STEPS, "max_length": LENGTH, "max_rows": ROWS}
        settings["seed"] = int(time.time())  # what is measured of an earlier adapter is cached
        adapter = train(TrainConfig.model_validate(places | settings), notify=None)
        start = time.perf_counter()
        make_report(adapter, ModelOptions(notify=listen))
        taken = time.perf_counter() - start
    return [figure("report", taken, "s", f"told before: {told[0]:.0f} s (must be within a factor of two)")]
