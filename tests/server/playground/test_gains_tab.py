"""The tab Gains in a real browser."""

import re

import pytest
from playwright.sync_api import expect

from lora_tuner import Library, ModelOptions, evaluate, evaluation
from lora_tuner.errors import Interrupted

from .browser import open_tab


def test_heat_map_equals_evaluate(visit, adapters, served, monkeypatch):
    encode, tokenizers = evaluation.encode_measured, []
    monkeypatch.setattr(
        evaluation,
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


def test_invalid_evaluation_shows_error(visit):
    page = visit()
    open_tab(page, "Gains")
    page.get_by_label("Rows").fill("some")
    page.get_by_role("button", name="Evaluate").click()
    expect(page.get_by_role("alert")).to_contain_text("eval_rows: input should be a valid integer")
    for key in ("Backspace", "Backspace", "Tab"):
        page.get_by_role("combobox", name="Adapters").press(key)
    page.get_by_role("button", name="Evaluate").click()
    expect(page.get_by_role("alert")).to_have_text("Choose at least one adapter to evaluate.")


@pytest.mark.slow
def test_stop_or_leave_cancels_evaluation(visit, served, monkeypatch):
    ended = []
    evaluate_on = evaluation.evaluate_on

    def watched(*arguments, **settings):
        try:
            return evaluate_on(*arguments, **settings)
        except Interrupted:
            ended.append(True)
            raise

    # About 30 seconds of work.
    monkeypatch.setattr(evaluation, "_length_batches", lambda rows, _: [[0]] * 10_000)
    monkeypatch.setattr(evaluation, "evaluate_on", watched)
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
