"""Cost of the page that follows a run: the run's speed and the processor's time, with the page open and closed.

Both alternate within one run, as the speed of a machine changes. The browser runs on the same machine.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from playwright.sync_api import sync_playwright

from lora_tuner.adapters.adapter import METRICS_FILE
from lora_tuner.config import EMBEDDED_BASE, TrainConfig
from lora_tuner.training import jobs

from .measure import Figure, figure
from .serving import CLI, find_url, server_process

WINDOW_SECONDS, SETTLE_SECONDS = 60.0, 5.0
ROWS, STEPS = 2_000, 100_000
CHROMIUM = "/usr/bin/chromium"
WORDS = ["the", "film", "was", "good", "bad", "slow", "funny", "warm", "cold", "long", "actor", "plot", "never"]


def run(rounds: int) -> list[Figure]:
    """Run the benchmark, in about two minutes for each round."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        job = _start_run(root)
        command = [sys.executable, CLI, "serve", "--base", EMBEDDED_BASE, "--port", "0"]
        command += ["--adapters-dir", root / "adapters", "--runs-dir", root / "runs"]
        env = os.environ | {"PYTHONPATH": str(CLI.parent)}
        try:
            with server_process(command, env, find_url) as (url, server), sync_playwright() as playwright:
                _wait_until_running(job)
                windows = []
                for _ in range(rounds):
                    closed, (idle,) = _window(job, [[server]])
                    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                    page = browser.new_page(base_url=url)
                    page.goto("/")
                    page.get_by_role("heading", name="watched: running").wait_for(timeout=120_000)
                    programs = psutil.Process().children(recursive=True)
                    chromium = [program for program in programs if "chrom" in program.name()]
                    opened, (busy, shown) = _window(job, [[server], chromium])
                    windows.append((closed, opened, opened / closed, idle, busy, shown))
                    browser.close()
        finally:
            _stop(job)
    closed, opened, ratio, idle, busy, shown = map(statistics.median, zip(*windows, strict=True))
    return [
        figure("run, page closed", closed, "tokens/s"),
        figure("run, page open", opened, "tokens/s"),
        figure("slower with the page", (1 - ratio) * 100, "%", "median of pairs of windows"),
        figure("server, page closed", idle * 100, "% of a core"),
        figure("server, page open", busy * 100, "% of a core"),
        figure("browser", shown * 100, "% of a core", "all processes of Chromium"),
    ]


def _start_run(root: Path) -> jobs.Job:
    choose = random.Random(0)
    rows = [f"{' '.join(choose.choices(WORDS, k=choose.randint(20, 60)))} {number}." for number in range(ROWS)]
    (root / "rows.csv").write_text("text\n" + "\n".join(rows) + "\n")
    config = TrainConfig(
        dataset=str(root / "rows.csv"),
        base=EMBEDDED_BASE,
        name="watched",
        max_steps=STEPS,
        learning_rate=1e-4,
        eval_rows=4,
        adapters_dir=root / "adapters",
        runs_dir=root / "runs",
    )
    return jobs.start_job(config)


def _wait_until_running(job: jobs.Job) -> None:
    while (now := jobs.find_job(job.name, job.folder.parent)).step < 3:
        if not now.state.is_alive:
            raise RuntimeError(now.problem)
        time.sleep(0.5)


def _stop(job: jobs.Job) -> None:
    """Stop the run, and wait until it writes no more."""
    jobs.stop_job(jobs.find_job(job.name, job.folder.parent))
    while jobs.find_job(job.name, job.folder.parent).state.is_alive:
        time.sleep(0.5)


def _window(job: jobs.Job, groups: Sequence[Sequence[psutil.Process]]) -> tuple[float, list[float]]:
    """Return the tokens/s of the run, and the cores that groups of programs take, in a while from now on."""
    time.sleep(SETTLE_SECONDS)
    before, start, used = len(_steps(job)), time.monotonic(), [_cpu_seconds(group) for group in groups]
    time.sleep(WINDOW_SECONDS)
    passed = time.monotonic() - start
    shares = [(_cpu_seconds(group) - then) / passed for group, then in zip(groups, used, strict=True)]
    steps = _steps(job)[before:]
    return sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps), shares


def _cpu_seconds(programs: Sequence[psutil.Process]) -> float:
    seconds = 0.0
    for program in programs:
        try:
            times = program.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds


def _steps(job: jobs.Job) -> list[dict[str, float]]:
    lines = (job.folder / METRICS_FILE).read_bytes().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [entry for entry in entries if "loss" in entry]
