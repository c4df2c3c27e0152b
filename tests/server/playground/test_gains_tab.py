"""The tab Gains: its heat map, and in a real browser."""

import base64
import csv
import re
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from playwright.sync_api import expect

from lora_tuner import Library, ModelOptions, evaluate
from lora_tuner.adapters.manifest import EvalResult
from lora_tuner.data.eval_sets import EvalSet
from lora_tuner.errors import Interrupted
from lora_tuner.evaluation import gain_matrix, held_out_loss
from lora_tuner.evaluation.gain_matrix import GainMatrix
from lora_tuner.server.metrics import Metrics
from lora_tuner.server.playground.gain_matrix import show_gains
from lora_tuner.server.playground.requests import PageRequests

from ...api_server import HOSTILE
from .browser import open_tab, run_async


def result(gain, error=0.01):
    return EvalResult(base_loss=3.0, loss=3.0 - gain, gain=gain, standard_error=error, rows=40, tokens=900)


def matrix_of(first, second, names=("noir", "verse")):
    """Return the matrix of two adapters, with these cells."""
    return GainMatrix("gpt2", list(names), [EvalSet(name, [name, "b"]) for name in names], [first, second])


def headline_of(shown):
    return ElementTree.fromstring(f"<div>{shown}</div>").find("p").text


def test_headline_names_best_and_worst():
    shown = show_gains(matrix_of([result(0.5), result(-0.2)], [result(0.0), result(0.1)]))
    assert headline_of(shown) == (
        "noir gains most on its own held-out rows: each token is 1.65 times as likely as with gpt2. "
        "noir is worse than the base on the rows of verse: each token is 0.82 times as likely."
    )
    unclear = show_gains(matrix_of([result(0.01), result(-0.01)], [None, result(0.005)]))
    assert headline_of(unclear) == "No adapter is clearly better than the base on its own held-out rows."


def test_cells_have_all_figures():
    shown = show_gains(matrix_of([result(0.5), None], [result(-0.25, None), result(0.1)]))
    root = ElementTree.fromstring(f"<div>{shown}</div>")
    cells = [(cell.get("class"), cell.get("title")) for cell in root.iter("td")]
    assert cells[0] == (
        "helps",
        "noir on the held-out rows of noir: gain +0.500 ± 0.010 nats per token, so that each token is "
        "1.65 times as likely as with the base. Loss 2.500, of the base 3.000, over 40 rows of 900 tokens.",
    )
    assert cells[1] == ("missing", "noir on the held-out rows of verse: not measured.")
    assert cells[2][0] == "forgot"
    assert "-0.250 (no error: one row or group)" in cells[2][1]
    assert [header.text for header in root.iter("th")][:2] == ["adapter", "held-out rows of"]


def test_same_rows_are_one_column():
    matrix = matrix_of([result(0.5), result(0.5)], [result(0.1), result(0.1)])
    rows = [EvalSet("noir", ["a", "b"]), EvalSet("verse", ["a", "b"])]
    shown = show_gains(GainMatrix(matrix.base, matrix.adapters, rows, matrix.cells))
    root = ElementTree.fromstring(f"<div>{shown}</div>")
    assert [header.text for header in root.iter("th")] == [
        "adapter", "held-out rows of", "noir and 1 more", "noir", "verse",
    ]  # fmt: skip
    assert len(list(root.iter("td"))) == 2
    assert saved(shown, "csv").count("\n") == 5


def saved(shown, kind):
    return base64.b64decode(re.search(f'download="gains.{kind}" href="[^"]*;base64,([^"]*)"', shown)[1]).decode()


def test_downloads_have_the_figures():
    cells = [[result(0.5), None], [result(-0.25, None), result(1 / 3)]]
    shown = show_gains(matrix_of(*cells, names=("noir", HOSTILE)))
    header, *rows = csv.reader(StringIO(saved(shown, "csv")))
    assert header[:4] == ["adapter", "held-out rows of", "gain", "standard error"]
    assert rows == [
        ["noir", "noir", "0.5", "0.01", "2.5", "3.0", "40", "900"],
        [HOSTILE, "noir", "-0.25", "", "3.25", "3.0", "40", "900"],
        [HOSTILE, HOSTILE, str(1 / 3), "0.01", str(3 - 1 / 3), "3.0", "40", "900"],
    ]
    picture = ElementTree.fromstring(saved(shown, "svg"))
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"+0.500", "± 0.010", "-0.250", "missing", "noir", "held-out rows of", "adapter"} <= set(texts)
    tags = {found.tag.rpartition("}")[2] for found in picture.iter()}
    assert tags == {"svg", "title", "style", "rect", "text", "g"}


def test_heat_map_equals_evaluate(visit, adapters, served, monkeypatch):
    encode, tokenizers = held_out_loss.encode_measured, []
    monkeypatch.setattr(
        held_out_loss,
        "encode_measured",
        lambda base, *rows: (tokenizers.append(base.tokenizer), encode(base, *rows))[1],
    )
    page = visit()
    open_tab(page, "Gains")
    page.get_by_label("Rows").fill("4")  # not cached
    page.get_by_role("button", name="Evaluate").click()
    table = page.get_by_role("table", name=re.compile("^Gain over"))
    table.wait_for()
    assert tokenizers
    assert not any(
        tokenizer is served.service.base.tokenizer for tokenizer in tokenizers
    )  # the service uses that one meanwhile
    matrix = evaluate(
        [Library(adapters).get(name) for name in ("noir", "verse")],
        eval_rows=4,
        options=ModelOptions(device="cpu"),
    )
    shown = table.locator("tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert shown == [
        [name, *(f"{cell.gain:+.3f}± {cell.standard_error:.3f}" for cell in line)]
        for name, line in zip(matrix.adapters, matrix.cells, strict=True)
    ]
    largest = max((cell.gain, index) for index, cell in enumerate(matrix.cells[0] + matrix.cells[1]))[1]
    shares = table.locator("td[style]").evaluate_all(
        "cells => cells.map(cell => cell.style.getPropertyValue('--share').trim())"
    )
    assert shares[largest] == "100%"
    page.set_viewport_size({"width": 280, "height": 700})
    table.evaluate("table => table.parentElement.scrollLeft = 60")
    shifts = [
        table.evaluate(
            "(table, part) => table.querySelector(part).getBoundingClientRect().left"
            " - table.parentElement.getBoundingClientRect().left",
            part,
        )
        for part in ("tbody th", "tbody td")
    ]
    assert shifts[0] == 0, "the names of adapters scroll"
    assert shifts[1] < 100
    expect(page.locator(".headline")).to_contain_text("held-out rows")
    for kind in ("CSV", "SVG"):
        with page.expect_download() as download:
            page.get_by_role("link", name=f"Download as {kind}").click()
        assert download.value.suggested_filename == f"gains.{kind.lower()}"
        text = Path(download.value.path()).read_text()
        assert f"{matrix.cells[0][0].gain}" in text or kind == "SVG"
    assert f"{matrix.cells[0][0].gain:+.3f}" in text


def test_invalid_evaluation_shows_error(visit):
    page = visit()
    open_tab(page, "Gains")
    page.get_by_label("Rows").fill("some")
    page.get_by_role("button", name="Evaluate").click()
    expect(page.get_by_role("alert")).to_contain_text("Rows: input should be a valid integer")
    for key in ("Backspace", "Backspace", "Tab"):
        page.get_by_role("combobox", name="Adapters").press(key)
    page.get_by_role("button", name="Evaluate").click()
    expect(page.get_by_role("alert")).to_have_text("Choose at least one adapter to evaluate.")


def test_missing_adapter_is_named(served, monkeypatch):
    from lora_tuner.server.playground.gains_tab import GainsTab  # Gradio takes seconds to import

    async def updates(names):
        tab = GainsTab(served.service, PageRequests(served.service, Metrics(served.service)))
        return [str(shown) async for shown in tab.evaluate(names, "")]

    assert "gone: no longer in the library, or damaged." in run_async(updates(["noir", "gone"]))[-1]
    monkeypatch.setattr(GainsTab, "adapters", lambda tab: [])
    assert "There are no adapters yet. Train one first" in run_async(updates([]))[-1]


@pytest.mark.slow
def test_stop_or_leave_cancels_evaluation(visit, served, monkeypatch):
    ended = []
    evaluate_on = gain_matrix.evaluate_on

    def watched(*arguments, **settings):
        try:
            return evaluate_on(*arguments, **settings)
        except Interrupted:
            ended.append(True)
            raise

    # About 30 seconds of work.
    monkeypatch.setattr(held_out_loss, "_length_batches", lambda rows, _: [[0]] * 10_000)
    monkeypatch.setattr(gain_matrix, "evaluate_on", watched)
    page = visit()
    open_tab(page, "Gains")
    page.get_by_label("Rows").fill("3")  # not cached
    for count, leave in enumerate((lambda: page.get_by_role("button", name="Stop").click(), page.close), 1):
        page.get_by_role("button", name="Evaluate").click()
        page.locator("[aria-busy=true] progress").wait_for()
        assert len(ended) < count
        leave()
        served.wait(lambda count=count: len(ended) == count)
        if not page.is_closed():
            expect(page.locator("progress")).to_be_hidden()
