"""Pictures of the page for README and docs, with adapters of the embedded base: `make screenshots`."""

import os
import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

from lora_tuner import TrainConfig
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.training import jobs

from ...api_server import serving
from .browser import generate, message_of, new_page, open_settings, open_tab, prompt_of, waiting_for_events

ENVIRONMENT = dict(os.environ)  # before fixtures change it
FOLDER = ENVIRONMENT.get("LORA_TUNER_SCREENSHOTS")
SIZES = {"": (1200, 800), "-phone": (390, 844)}
WAIT = 300_000  # milliseconds


def start_run(name, label):
    settings = {"base": EMBEDDED_BASE, "where": [f"label={label}"], "max_rows": 2000, "eval_rows": 50}
    jobs.start_job(TrainConfig(name=name, max_steps=60, **settings))


def wait_for_run(name, is_ready):
    end = time.monotonic() + WAIT / 1000
    while not is_ready(job := jobs.find_job(name, Path("runs"))):
        assert job.problem is None, job.problem
        assert time.monotonic() < end
        time.sleep(0.5)


def take_pictures(page, name):
    for suffix, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(500)
        page.screenshot(path=Path(FOLDER, f"{name}{suffix}.png"), full_page=name == "train")
    width, height = SIZES[""]
    page.set_viewport_size({"width": width, "height": height})


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="`make screenshots` takes them")
def test_screenshots(browser, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("LORA_TUNER_CACHE", "HF_HOME"):
        monkeypatch.delenv(name)
        if name in ENVIRONMENT:
            monkeypatch.setenv(name, ENVIRONMENT[name])
    start_run("pan", 0)
    wait_for_run("pan", lambda job: job.state == jobs.JobState.FINISHED)
    with serving(EMBEDDED_BASE, "adapters", page=True) as served:
        page = new_page(browser, WAIT, base_url=served.url, color_scheme="light")
        start_run("praise", 1)
        wait_for_run("praise", lambda job: job.step >= 40)
        with waiting_for_events(page):
            page.goto("/?tab=train")
        page.get_by_role("table", name=re.compile("same prompts")).wait_for()
        take_pictures(page, "train")
        wait_for_run("praise", lambda job: job.state == jobs.JobState.FINISHED)
        with waiting_for_events(page):
            page.goto("/?tab=write")
        page.get_by_role("tabpanel").get_by_text("praise", exact=True).wait_for()
        prompt_of(page).fill("This film")
        open_settings(page)
        page.get_by_label("Seed").locator("visible=true").fill("1")
        page.get_by_label("Max new tokens").locator("visible=true").fill("66")
        page.get_by_role("button", name="Sampling settings").locator("visible=true").click()
        generate(page)
        expect(page.locator(".answers:visible")).to_have_attribute("aria-busy", "false")
        take_pictures(page, "write")
        open_tab(page, "Chat")
        message_of(page).fill("Name one thing that makes a film worth watching.")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".chat:visible").last).to_have_attribute("aria-busy", "false")
        take_pictures(page, "chat")
        open_tab(page, "Library")
        page.get_by_role("button", name="praise", exact=True).click()
        page.locator(".card").wait_for()
        take_pictures(page, "library")
        open_tab(page, "Gains")
        page.get_by_role("button", name="Evaluate").click()
        page.get_by_role("table", name=re.compile("^Gain over")).wait_for()
        take_pictures(page, "gains")
        page.close()
