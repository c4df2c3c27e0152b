"""Cost of the page that follows a run: the run's speed and the processor's time, with the page open and closed.

Three states alternate within one run, as the speed of a machine changes: nobody follows it; a program asks the server
what the page asks, as from a browser on another machine; and a browser on this machine shows it.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from playwright.sync_api import Browser, Request, sync_playwright

from lora_tuner.adapters.adapter import METRICS_FILE
from lora_tuner.config import EMBEDDED_BASE, TrainConfig
from lora_tuner.server.playground.train_runs import POLL_SECONDS
from lora_tuner.training import jobs

from .measure import Figure, figure
from .serving import CLI, find_url, server_process

WINDOW_SECONDS, SETTLE_SECONDS = 60.0, 5.0
ROWS, STEPS = 2_000, 100_000
CHROMIUM = "/usr/bin/chromium"
JOIN = "/gradio_api/queue/join"
WORDS = ["the", "film", "was", "good", "bad", "slow", "funny", "warm", "cold", "long", "actor", "plot", "never"]


def run(rounds: int) -> list[Figure]:
    """Run the benchmark, in about five minutes for each round."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        job = _start_run(root)
        command = [sys.executable, CLI, "serve", "--base", EMBEDDED_BASE, "--port", "0"]
        command += ["--adapters-dir", root / "adapters", "--runs-dir", root / "runs"]
        env = os.environ | {"PYTHONPATH": str(CLI.parent)}
        try:
            with server_process(command, env, find_url) as (url, server), sync_playwright() as playwright:
                _wait_until_running(job)
                asked: dict[str, object] = {}
                windows = []
                for _ in range(rounds):
                    before, (idle,) = _window(job, [[server]])
                    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                    asked |= _show_page(browser, url)
                    programs = psutil.Process().children(recursive=True)
                    chromium = [program for program in programs if "chrom" in program.name()]
                    shown, (busy, drawing) = _window(job, [[server], chromium])
                    browser.close()
                    with _follow(url, asked):
                        followed, (asking,) = _window(job, [[server]])
                    after, _ = _window(job, [[server]])
                    alone = (before + after) / 2
                    pair = followed / alone, shown / alone
                    windows.append((alone, followed, shown, *pair, idle, asking, busy, drawing))
        finally:
            _stop(job)
    alone, followed, shown, *rest = map(statistics.median, zip(*windows, strict=True))
    ratio, ratio_here, idle, asking, busy, drawing = rest
    return [
        figure("run, page closed", alone, "tokens/s"),
        figure("run, page open elsewhere", followed, "tokens/s"),
        figure("slower with the page elsewhere", (1 - ratio) * 100, "%", "median over the rounds (must be 3)"),
        figure("run, page open on this machine", shown, "tokens/s"),
        figure(
            "slower with the page here", (1 - ratio_here) * 100, "%", "the browser takes its share of the cores"
        ),
        figure("server, page closed", idle * 100, "% of a core"),
        figure("server, page open elsewhere", asking * 100, "% of a core"),
        figure("server, page open here", busy * 100, "% of a core"),
        figure("browser", drawing * 100, "% of a core", "all processes of Chromium"),
    ]


def _show_page(browser: Browser, url: str) -> dict[str, object]:
    """Open the page, and return the event that it sends again and again."""
    events: list[dict[str, object]] = []
    page = browser.new_page(base_url=url)

    def take(request: Request) -> None:
        if JOIN in request.url and (event := request.post_data_json):
            events.append(event)

    page.on("request", take)
    page.goto("/")
    page.get_by_role("heading", name="watched: running").wait_for(timeout=120_000)
    page.wait_for_timeout(1000 * 6 * POLL_SECONDS)
    ((number, _),) = Counter(event["fn_index"] for event in events).most_common(1)
    return next(event for event in reversed(events) if event["fn_index"] == number)


@contextmanager
def _follow(url: str, event: dict[str, object]) -> Iterator[None]:
    """Ask what the page asks, as a visitor of its own: events, their answers, and the state of the server."""
    visitor, ended = uuid.uuid4().hex, threading.Event()
    answers: list[str] = []

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not ended.wait(POLL_SECONDS):
                client.get("/health").raise_for_status()
                client.post(JOIN, json=event | {"session_hash": visitor}).raise_for_status()
                answers.append(client.get("/gradio_api/queue/data", params={"session_hash": visitor}).text)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if not any("watched" in answer for answer in answers):
        raise RuntimeError("The server has not answered what the page asks.")


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
