"""Training in a real browser, with a server that is a process of its own: from a file to an adapter."""

import contextlib
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from playwright.sync_api import expect

from lora_tuner import Library
from lora_tuner.adapters.adapter import load_adapter_folder, verify_adapter
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.training import jobs

from .browser import generate, open_page, prompt_of

ROOT = Path(__file__).parents[3]
WAIT = 500_000  # milliseconds, as other tests may run beside
WORDS = ["the", "film", "was", "good", "bad", "slow", "funny", "warm", "cold", "long", "actor", "plot", "never"]


@pytest.fixture(params=["tiny", pytest.param(EMBEDDED_BASE, marks=pytest.mark.real)])
def base(request, gpt2):
    """The base of a server, and settings of a run by their labels."""
    settings = {"Name": "mine", "Max steps": "30", "Learning rate": "2e-3"}
    return (gpt2, settings | {"Max length": "16"}) if request.param == "tiny" else (request.param, settings)


@pytest.fixture
def start_server(base, tmp_path):
    """Return a function that starts a server on a port which stays the same, and returns its process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    processes = []

    def start():
        command = [sys.executable, str(ROOT / "cli.py"), "serve", "--base", str(base[0]), "--port", str(port)]
        with (tmp_path / "server.log").open("ab") as log:
            processes.append(subprocess.Popen(command, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)}))
        end = time.monotonic() + WAIT / 1000
        while time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    return processes[-1]
            time.sleep(0.2)
        raise AssertionError((tmp_path / "server.log").read_text())

    start.url = f"http://127.0.0.1:{port}"
    yield start
    for process in processes:
        process.kill()
        process.wait()
    for job in jobs.list_jobs(tmp_path / "runs"):
        with contextlib.suppress(psutil.Error):
            if job.pid:
                psutil.Process(job.pid).kill()


@pytest.fixture
def reviews(tmp_path):
    choose = random.Random(1)
    rows = [f"{' '.join(choose.choices(WORDS, k=choose.randint(8, 30)))} {number}." for number in range(200)]
    (tmp_path / "reviews.csv").write_text("text\n" + "\n".join(rows) + "\n")
    return tmp_path / "reviews.csv"


def visit(browser, url, problems):
    """Open the tab Train as a visitor of their own."""
    return open_page(browser.new_context(base_url=url), url, problems, timeout=WAIT)


def drop(page, file, settings):
    """Upload a file and fill in settings by their labels."""
    page.get_by_label("Files to train on").set_input_files(str(file))
    page.get_by_text(f"Uploaded: {file.name}.").wait_for()
    page.get_by_role("button", name="All settings").click()
    for label, value in settings.items():
        field = page.get_by_role("textbox", name=re.compile(f"^{label}"))
        field.wait_for()
        page.wait_for_timeout(300)
        field.fill(value)
    page.get_by_role("button", name="All settings").click()


def wait_for_state(page, text):
    expect(page.locator(".run h2")).to_contain_text(re.compile(text), timeout=WAIT)


def wait_until(condition):
    end = time.monotonic() + WAIT / 1000
    while not condition():
        assert time.monotonic() < end, jobs.find_job("mine", Path("runs")).log.read_text()
        time.sleep(0.02)


def pause_at(step):
    """Pause the run as soon as it has taken so many steps, so that it is looked at in the middle."""

    def has_come():
        job = jobs.find_job("mine", Path("runs"))
        return job.state == jobs.JobState.RUNNING and job.step >= step

    wait_until(has_come)
    jobs.pause_job(jobs.find_job("mine", Path("runs")))


@pytest.mark.slow
def test_file_becomes_adapter_in_browser(browser, base, start_server, reviews, tmp_path):
    """Reloaded, and with the server killed in the middle, twice; a second visitor's run waits."""
    (name, settings), server, problems = base, start_server(), []
    page = visit(browser, start_server.url, problems)
    drop(page, reviews, settings)
    page.get_by_role("button", name="Preview").click()
    page.get_by_role("heading", name="Row 5").wait_for()
    expect(page.get_by_role("table", name=re.compile("^Length in tokens"))).to_be_visible()
    page.frame_locator("iframe.report").get_by_text("200 rows read").wait_for()
    page.get_by_role("button", name="Train", exact=True).click()
    wait_for_state(page, "mine: (starting|running)")
    pause_at(5)
    wait_for_state(page, r"mine: paused, step \d+ of 30")
    for reloaded in (False, True):
        if reloaded:
            page.reload()
            page.get_by_role("tab", name="Train").click()
            wait_for_state(page, r"mine: paused, step \d+ of 30")
        assert page.locator(".run .dot").count() >= 5
        expect(page.locator("table.samples thead th")).to_have_count(4)  # three prompts

    other = visit(browser, start_server.url, problems)
    other.get_by_role("button", name="New run").click()  # closed, as a run lives
    drop(other, reviews, settings | {"Name": "second"})
    other.get_by_role("button", name="Train", exact=True).click()
    wait_for_state(other, "second: waiting for 1 run")
    other.get_by_role("button", name="Remove", exact=True).click()
    other.get_by_role("button", name="Remove permanently").click()
    wait_for_state(other, "mine: paused")
    assert problems == []
    other.close()
    shown = page.locator(".run h2").inner_text()
    page.close()

    server.kill()
    server.wait()
    server = start_server()
    page = visit(browser, start_server.url, problems)
    expect(page.locator(".run h2")).to_have_text(shown, timeout=WAIT)
    page.get_by_role("button", name="Continue").click()
    wait_for_state(page, "mine: (running|finished)")
    page.close()

    server.kill()
    server.wait()
    wait_until(lambda: "mine" in Library().names())  # the run goes on without a server
    start_server()
    page = visit(browser, start_server.url, problems)
    page.get_by_role("tab", name="Train").click()
    wait_for_state(page, "mine: finished, step 30 of 30")
    assert Library().get("mine").manifest.run.steps == 30
    page.get_by_role("button", name="Write with it").click()
    prompt_of(page).fill("the film")
    generate(page)
    expect(page.locator(".answers:visible h2")).to_have_text([Path(name).name, "mine"], timeout=WAIT)
    page.get_by_role("tab", name="Library").click()
    page.get_by_role("button", name="mine").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download as zip").click()
    shutil.unpack_archive(download.value.path(), tmp_path / "downloaded", "zip")
    assert verify_adapter(load_adapter_folder(tmp_path / "downloaded" / "mine")) == []
    assert problems == []


@pytest.mark.slow
def test_run_is_stopped_and_resumed_in_browser(browser, base, start_server, reviews):
    start_server()
    page = visit(browser, start_server.url, problems := [])
    drop(page, reviews, base[1])
    page.get_by_role("button", name="Train", exact=True).click()
    wait_for_state(page, "mine: (starting|running)")
    pause_at(2)
    page.get_by_role("button", name="Stop and save").click()
    wait_for_state(page, "mine: stopped")
    page.get_by_role("button", name="Resume").click()
    wait_for_state(page, "mine: finished, step 30 of 30")
    page.get_by_role("button", name="Remove", exact=True).click()
    page.get_by_role("button", name="Remove permanently").click()
    page.get_by_text("No runs yet").wait_for()
    assert Library().names() == ["mine"]  # the run alone is forgotten
    assert problems == []
