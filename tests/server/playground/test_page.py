"""The page in a real browser: keyboard, phone, contrast, hostile adapters, key. See test_page_requests.py."""

import re
import signal

import httpx
import pytest
from playwright.sync_api import expect

from ...api_server import HOSTILE, KEY, serving
from .browser import (
    CONTRAST_SCRIPT,
    PROMPT,
    message_of,
    new_page,
    open_settings,
    open_tab,
    prompt_of,
    set_greedy,
    tab_to,
    wait_for_answer,
    wait_for_outputs,
    wait_for_stream_end,
    waiting_for_events,
)


def test_hostile_text_is_escaped(visit):
    page = visit()
    open_tab(page, "Library")
    page.get_by_role("button", name="xss").click()
    card = page.locator(".card")
    expect(card).to_contain_text(HOSTILE[:60])
    expect(card).to_contain_text("has no loss curve: could not convert string to float: '<img")
    card.get_by_text("Model card").click()
    expect(card.locator("pre")).to_contain_text("![x](http://elsewhere.example/y.png)")
    open_tab(page, "Write")
    prompt_of(page).fill(HOSTILE)
    set_greedy(page, 5)
    page.get_by_role("button", name="Generate", exact=True).click()
    wait_for_outputs(page)
    expect(page.locator(".prompt").first).to_have_text(HOSTILE)
    assert page.locator("img[src*=elsewhere], .card script, .answers script").count() == 0
    assert page.evaluate("window.run") is None


@pytest.mark.slow
def test_page_works_by_keyboard(visit):
    page = visit()
    assert tab_to(page, "Prompt")[0] == "Train"  # the first tab
    page.keyboard.type(PROMPT)
    page.keyboard.press("Enter")
    wait_for_outputs(page)
    passed = tab_to(page, "Sampling settings")
    expected = ["Adapters", "Generate", "Regenerate", "Copy the text of noir", "Sampling settings"]
    assert [name for name in passed if name in expected] == expected
    first = page.locator(".note:visible").inner_text()  # with its seed
    page.get_by_role("button", name="Regenerate").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".note:visible")).not_to_have_text(first)
    wait_for_outputs(page)
    page.get_by_role("tab", name="Library").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="noir").wait_for()
    wait_for_stream_end(page)
    tab_to(page, "noir")
    page.keyboard.press("Enter")
    expect(page.locator(".card h2")).to_have_text("noir")
    tab_to(page, "Model card")
    page.keyboard.press("Enter")
    expect(page.locator(".card pre")).to_be_visible()


@pytest.mark.slow
def test_every_control_has_a_name(page):
    for name in ("Train", "Write", "Chat", "Blend", "Library", "Gains", "Sweeps"):
        open_tab(page, name)
        nameless = page.locator("button:visible, input:visible, textarea:visible, select:visible").evaluate_all(
            """controls => controls.filter(control => !(control.getAttribute('aria-label') || control.title
                || control.innerText.trim() || (control.labels && control.labels.length
                && control.labels[0].innerText.trim()))).map(control => control.outerHTML)"""
        )
        assert nameless == []


def fill_tabs(page):
    """Fill each tab in turn, and yield its name."""
    prompt_of(page).fill(f"{PROMPT} {'x' * 60}")
    open_settings(page)
    page.get_by_role("button", name="Generate", exact=True).click()
    wait_for_outputs(page)
    yield "generate"
    open_tab(page, "Chat")
    page.get_by_role("checkbox", name="Token probabilities").check()
    message_of(page).fill(f"{PROMPT} {'x' * 60}")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Token probabilities", exact=True).last.click()
    wait_for_answer(page)
    yield "chat"
    open_tab(page, "Blend")
    wait_for_outputs(page)
    yield "blend"
    open_tab(page, "Library")
    page.get_by_role("button", name="noir").click()
    page.get_by_text("Model card").click()
    yield "library"
    open_tab(page, "Gains")
    page.get_by_role("button", name="Evaluate").click()
    page.get_by_role("table", name=re.compile("^Gain over")).wait_for()
    yield "evaluate"
    open_tab(page, "Sweeps")
    page.get_by_role("img", name=re.compile("^Held-out loss of the trials")).wait_for()
    yield "sweeps"
    open_tab(page, "Train")
    rows = "".join(f"{PROMPT} {number} drags on\n" for number in range(40))
    file = {"name": "rows.csv", "mimeType": "text/csv", "buffer": f"text\n{rows}".encode()}
    page.get_by_label("Files to train on").set_input_files(file)
    page.get_by_text("Uploaded: rows.csv.").wait_for()
    page.get_by_role("button", name="Preview").click()
    page.locator("iframe.report").wait_for(timeout=60_000)
    page.get_by_role("textbox", name="Rank").fill("0")
    page.get_by_role("button", name="Train", exact=True).click()
    page.get_by_text("Not started: see Rank.").wait_for()
    page.get_by_role("button", name="All settings").click()
    page.get_by_label("Max steps").wait_for()
    yield "train"


@pytest.mark.slow
def test_page_fits_phone_with_enough_contrast(visit, sweep):
    """Contrast ratio of WCAG 2, section 1.4.3."""
    page = visit()
    desktop_size = page.viewport_size
    for name in fill_tabs(page):
        page.set_viewport_size({"width": 375, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, name
        page.set_viewport_size(desktop_size)
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(
                "name => document.body.classList.contains('dark') == (name == 'dark')", arg=scheme
            )
            ratios = page.evaluate(CONTRAST_SCRIPT)
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(255, 255, 255)") == (scheme == "light")
            assert ratios
            assert min(ratio for ratio, _ in ratios) >= 4.5, (name, scheme, min(ratios))


@pytest.mark.slow
def test_page_requires_key_and_drains_on_shutdown(browser, gpt2, adapters):
    with serving(gpt2, adapters, page=True, api_key=KEY) as served:
        url = served.url
        for path in ("/config", "/gradio_api/queue/data?session_hash=x"):
            assert httpx.get(f"{url}{path}").status_code == 401
        for method, path in (
            ("GET", "startup-events"), ("GET", "app_id"), ("GET", "app_id/"), ("GET", "heartbeat/x"), ("POST", "cancel"),
            ("POST", "reset"),
        ):  # fmt: skip
            for cookies in (
                {},
                {f"access-token{kind}": "x" for kind in ("", "-unsecure-", "-unsecure-x")},
            ):
                response = httpx.request(method, f"{url}/gradio_api/{path}", cookies=cookies, json={})
                assert response.status_code == 401, path
        body = {"data": [], "fn_index": 0, "session_hash": "x"}
        assert httpx.post(f"{url}/gradio_api/queue/join", json=body).status_code == 401
        assert "noir" not in httpx.get(url).text
        page = new_page(browser)
        page.goto(url)
        expect(page.get_by_text("the API key of this server as the password")).to_be_visible()
        for password, response in (
            ("wrong", page.expect_response("**/login")),
            (KEY, waiting_for_events(page)),
        ):
            page.get_by_label("username").fill("anybody")
            page.get_by_label("password").fill(password)
            with response:
                page.get_by_role("button", name="Login").click()
        with served.held_steps() as release:
            release(5)
            page.get_by_role("button", name="Generate", exact=True).click()
            expect(page.locator(".facts").first).to_have_text(re.compile("[1-9] tokens"))
            served.server.handle_exit(signal.SIGTERM, None)
            served.wait(lambda: not served.scheduler.accepting)
            release(1000)
            served.wait(lambda: not served.thread.is_alive())
        assert served.scheduler.idle
        wait_for_outputs(page)
        expect(page.locator(".facts")).to_have_text([re.compile("cut off|finished")] * 3)
        page.close()
