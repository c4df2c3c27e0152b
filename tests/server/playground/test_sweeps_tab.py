"""The tab Sweeps: finished and unfinished sweeps, damaged ones, and in a real browser."""

import base64
import csv
import json
import os
import re
import shutil
from io import StringIO

import pytest
from playwright.sync_api import expect

from lora_tuner.server.metrics import Metrics
from lora_tuner.server.playground.requests import PageRequests

from ...api_server import HOSTILE
from .browser import open_tab, run_async, tab_to, waiting_for_events


@pytest.fixture
def tab(served, tmp_path, monkeypatch):
    """The tab over an empty folder of runs."""
    from lora_tuner.server.playground.sweeps_tab import SweepsTab  # Gradio takes seconds to import

    config = served.service.config.model_copy(update={"runs_dir": tmp_path / "runs"})
    monkeypatch.setattr(served.service, "config", config)
    return SweepsTab(served.service, PageRequests(served.service, Metrics(served.service)))


@pytest.fixture
def copied(tab, sweep, tmp_path):
    """A copy of the finished sweep in the folder of the tab."""
    return shutil.copytree(sweep, tmp_path / "runs" / sweep.name)


def change(folder, **values):
    file = folder / "sweep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_without_sweeps_says_what_to_do(tab):
    choices, shown, unfinished = run_async(tab.update(None))
    assert (choices["choices"], choices["value"], unfinished) == ([], None, "")
    assert "No sweeps yet." in shown
    assert "train --dataset DATA --name NAME --rank 4,16,64" in shown


def test_newest_sweep_is_shown_first(tab, copied):
    older = shutil.copytree(copied, copied.with_name("older.sweep"))
    os.utime(older / "sweep.json", (1, 1))
    shutil.copytree(copied, copied.with_name("no name.sweep"))
    choices, shown, _ = run_async(tab.update(None))
    assert (choices["choices"], choices["value"]) == (["rates", "older"], "rates")
    assert "Recommended: <b>verse</b>" in shown
    assert run_async(tab.update("older"))[0]["value"] == "older"


def test_chart_and_table_have_the_trials(tab, copied):
    shown = run_async(tab.show("rates"))
    saved = re.search('download="sweep-rates.csv" href="[^"]*;base64,([^"]*)"', shown)[1]
    header, *rows = csv.reader(StringIO(base64.b64decode(saved).decode()))
    assert header[2:] == ["learning rate", "held-out loss (nats per token)", "standard error"]
    assert [(name, x, y) for _, name, x, y, _ in rows] == [
        ("noir", "0.001", "3.0"),
        ("verse", "0.004", "2.8"),
        ("high", "0.016", "nan"),
        ("gone", "0.064", "3.25"),
    ]
    assert "1 point left out" in shown
    assert "base 3.5" in shown
    assert "learning rate 0.001\nnoir: 3 ± 0.05" in shown
    table = re.sub(r"(\s|<[^>]*>)+", " ", shown[shown.index("<tbody>") :])
    assert "noir 4 0.001 3.000 0.200 ± 0.050 +0.500 1 kB 3 s" in table
    assert "high not in this library 4 0.016 diverged" in table
    assert re.findall('data-name="([^"]*)"', shown) == ["noir", "verse"]


def test_ranks_are_the_axis(tab, copied):
    trials = [
        {"name": f"r{rank}", "rank": rank, "learning_rate": 0.01, "loss": 3.0, "standard_error": None}
        for rank in (16, 4)
    ]
    change(copied, trials=trials)
    shown = run_async(tab.show("rates"))
    assert 'text-anchor="middle">rank</text>' in shown
    assert "a single held-out row, group or document gives no standard error" in shown


def test_rows_are_the_axis_with_what_more_brings(tab, copied):
    trials = [
        {"name": f"n{rows}", "rank": 4, "learning_rate": 0.01, "loss": 3 - rows / 1000, "rows": rows, "steps": 9}
        for rows in (20, 40)
    ]
    facts = {"quantity": "rows", "values": [20, 40], "gains": [0.1, 0.2], "gain": 0.1, "standard_error": 0.01}
    growth = {"sentences": ["Twice the <rows>."], "doublings": [facts | {"low": 0.05, "high": 0.2}]}
    change(copied, trials=trials, growth=growth, id="x")
    shown = run_async(tab.show("rates"))
    assert 'text-anchor="middle">training rows</text>' in shown
    assert "Twice the &lt;rows&gt;." in shown
    table = re.sub(r"(\s|<[^>]*>)+", " ", shown[shown.index("<tbody>") :])
    assert "4 0.01 20 9 2.980" in table


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"base_loss": "much"}, "base_loss: Input should be a valid number"),
        ({"trials": [{"name": "a"}]}, "trials.0.rank: Field required"),
        (None, "is damaged: Invalid JSON"),
    ],
)
def test_damaged_sweep_shows_one_line(tab, copied, values, problem):
    if values:
        change(copied, **values)
    else:
        (copied / "sweep.json").write_text("{")
    shown = run_async(tab.show("rates"))
    assert 'role="alert"' in shown
    assert problem in shown
    assert str(copied.parent) not in shown


def test_preferences_are_compared_by_accuracy(tab, copied):
    trial = {"rank": 4, "learning_rate": 1e-3, "loss": 3.0, "bytes": 1000, "seconds": 3.0, "standard_error": 0.01}
    trials = [
        trial | {"name": "verse", "beta": 0.1, "accuracy": 0.7, "gap": 0.1},
        trial | {"name": "noir", "beta": 0.5, "accuracy": 0.8},
    ]
    change(copied, base_accuracy=0.6, trials=trials)
    shown = run_async(tab.show("rates"))
    saved = re.search('download="sweep-rates.csv" href="[^"]*;base64,([^"]*)"', shown)[1]
    header, *rows = csv.reader(StringIO(base64.b64decode(saved).decode()))
    assert header[2:4] == ["beta", "held-out accuracy"]
    assert [(name, x, y) for _, name, x, y, _ in rows] == [("verse", "0.1", "0.7"), ("noir", "0.5", "0.8")]
    assert "base 0.6" in shown
    table = re.sub(r"(\s|<[^>]*>)+", " ", shown[shown.index("<thead>") :])
    assert "held-out loss accuracy gap to the best gain over the base" in table
    assert "verse 4 0.001 3.000 0.700 0.100 ± 0.010 +0.100 1 kB 3 s" in table


def test_hostile_sweep_is_escaped(tab, copied):
    trial = {"name": HOSTILE, "rank": -4, "learning_rate": float("inf"), "loss": float("nan")}
    change(copied, name=HOSTILE, recommended=HOSTILE, trials=[trial, trial | {"rank": 0, "loss": 1e300}])
    shown = run_async(tab.show("rates"))
    assert not re.search("<(img|script)", shown)
    assert "nothing to draw yet" in shown


@pytest.mark.parametrize("name", ["../rates", "/etc", "rates.sweep", "", None])
def test_names_never_become_paths(tab, copied, name):
    shutil.copytree(copied, copied.parent.parent / "rates.sweep")
    assert "This sweep no longer exists" in run_async(tab.show(name))


def test_unfinished_sweeps_have_their_state(tab, tmp_path, settings):
    from lora_tuner.training.unfinished import SweepState, write_sweep

    runs = tmp_path / "runs"
    trials = [settings(rank=rank, name=f"s-r{rank}", runs_dir=runs) for rank in (2, 4)]
    (runs / "s.sweep").mkdir(parents=True)
    write_sweep(SweepState(id="x", trials=trials, facts={}, diverged=["s-r4"]), runs / "s.sweep")
    (runs / "bad.sweep").mkdir()
    (runs / "bad.sweep" / "sweep.yaml").write_text("trials: 3")
    _, shown, unfinished = run_async(tab.update(None))
    assert shown == ""
    assert "s: 1 of 2 trials done, stopped; python cli.py train --resume s resumes it." in unfinished
    assert "bad: " in unfinished
    assert str(tmp_path) not in unfinished


@pytest.mark.slow
def test_trial_opens_in_library(visit, sweep):
    page = visit()
    open_tab(page, "Sweeps")
    chart = page.get_by_role("img", name="Held-out loss of the trials of rates. rank 4: 3 to 3.25; base: 3.5.")
    expect(chart).to_be_visible()
    hovered = chart.locator(".hit").nth(1)
    assert hovered.evaluate("strip => strip.querySelector('title').textContent") == (
        "learning rate 0.004\nverse: 2.8 ± 0.05"
    )
    before = hovered.evaluate("strip => getComputedStyle(strip).fill")
    hovered.hover()
    assert hovered.evaluate("strip => getComputedStyle(strip).fill") != before
    with page.expect_download() as download:
        page.get_by_role("link", name="Download as SVG").click()
    assert download.value.suggested_filename == "sweep-rates.svg"
    tab_to(page, "noir")
    with waiting_for_events(page):
        page.keyboard.press("Enter")
    expect(page.get_by_role("tab", name="Library")).to_have_attribute("aria-selected", "true")
    expect(page.locator(".card h2")).to_have_text("noir")
    expect(page.locator(".card h2")).to_be_in_viewport()
