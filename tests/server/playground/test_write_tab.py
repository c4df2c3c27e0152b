"""The tab Write in a real browser."""

import re

import pytest
from playwright.sync_api import expect

from lora_tuner import SamplingParams
from lora_tuner.errors import QueueFullError

from .browser import (
    PROMPT,
    open_settings,
    open_tab,
    outputs,
    printable,
    prompt_of,
    set_greedy,
    wait_for_outputs,
    watch_text,
)


def test_generate_tab_equals_generate_batch(visit, generator):
    page = visit()
    prompt_of(page).fill(PROMPT)
    set_greedy(page, 110)
    watch_text(page)
    page.get_by_role("button", name="Generate").click()
    wait_for_outputs(page)
    expected = generator.generate_batch(
        [(PROMPT, None), (PROMPT, "noir"), (PROMPT, "verse")],
        SamplingParams(greedy=True, max_new_tokens=110),
    )
    names = ["gpt2", "noir", "verse"]
    texts = [printable(output.text) for output in expected]
    assert outputs(page) == dict(zip(names, texts, strict=True))
    lengths = [len(text) for text in page.evaluate("window.seen")]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3, "the text is not streamed"


@pytest.mark.slow
def test_enter_generates_and_seed_repeats(visit):
    page = visit()
    prompt_of(page).fill(PROMPT)
    prompt_of(page).press("Enter")
    wait_for_outputs(page)
    first = outputs(page)
    seed = re.search(r"Seed (\d+)", page.locator(".note:visible").inner_text())[1]
    open_settings(page)
    page.get_by_label("Seed").fill(seed)
    page.get_by_role("button", name="Generate").click()
    page.wait_for_timeout(300)
    wait_for_outputs(page)
    assert outputs(page) == first
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Temperature").fill("0.1")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".note:visible")).to_contain_text("Seed 7")
    wait_for_outputs(page)
    assert outputs(page) != first


def test_settings_have_cli_defaults(page):
    open_tab(page, "Write")
    open_settings(page)
    for name, value in {
        "Temperature": "0.8",
        "Top p": "0.95",
        "Top k": "50",
        "Repetition penalty": "1.1",
    }.items():
        expect(page.get_by_label(name)).to_have_value(value)
    expect(page.get_by_label("Seed")).to_have_attribute("placeholder", "random")
    page.get_by_label("Greedy").check()
    expect(page.get_by_label("Temperature")).to_be_disabled()
    page.get_by_label("Greedy").uncheck()
    expect(page.get_by_label("Temperature")).to_be_enabled()


@pytest.mark.slow
def test_invalid_settings_show_one_line(visit, served, monkeypatch):
    page = visit()
    prompt_of(page).fill("word " * 300)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("has a context of 128: shorten it.")
    prompt_of(page).fill(PROMPT)
    open_settings(page)
    for label, wrong, right, line in (
        ("Top p", "0", "1", "top_p: input should be greater than 0 (got 0)"),
        (
            "Temperature",
            "11",
            "1",
            "temperature: input should be less than or equal to 10 (got 11)",
        ),
        (
            "Top k",
            "1.5",
            "1",
            "top_k: input should be a valid integer, got a number with a fractional part (got 1.5)",
        ),
        ("Max new tokens", "501", "5", "max_new_tokens: the limit of this server is 500."),
    ):
        page.get_by_label(label).fill(wrong)
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("alert")).to_have_text(line)
        page.get_by_label(label).fill(right)

    def reject(request):
        raise QueueFullError("The queue is full.", 3)

    monkeypatch.setattr(served.scheduler, "submit", reject)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_have_text(["The queue is full."] * 3)


@pytest.mark.slow
def test_stop_or_leave_cancels_generation(visit, served):
    page = visit()
    with served.held_steps(pause=0.05):  # like a large model
        for leave in (lambda: page.get_by_role("button", name="Stop").click(), page.close):
            page.get_by_role("button", name="Generate").click()
            expect(page.locator("[aria-busy=true] .writing .facts").first).to_have_text(
                re.compile("[1-9]\\d* tokens")
            )
            assert not served.scheduler.idle
            leave()
            served.wait(lambda: served.scheduler.idle)
            if not page.is_closed():
                wait_for_outputs(page)
                assert int(page.locator(".facts").first.inner_text().split()[0]) < 120
        served.wait(lambda: served.app.state.metrics.streams == 0)
