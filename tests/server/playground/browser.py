"""Helpers for tests of the page in a real browser."""

import asyncio
import contextlib
import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path

from playwright.sync_api import expect

from lora_tuner.text import format_share

expect.set_options(timeout=20_000)  # other tests run beside
PROMPT = "12: the actor"
CHROMIUM = Path("/usr/bin/chromium")
BROWSER_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
BROWSER_OPTIONS += ["--disable-component-update", "--disable-sync"]
CONTRAST_SCRIPT = """() => {
    const channels = text => {
        const [r, g, b, alpha] = text.match(/[\\d.]+/g).map(Number);
        return text.startsWith("color(srgb") ? [r * 255, g * 255, b * 255, alpha ?? 1] : [r, g, b, alpha ?? 1];
    };
    const luminance = rgb => [0.2126, 0.7152, 0.0722].reduce((sum, weight, index) => {
        const value = rgb[index] / 255;
        return sum + weight * (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    }, 0);
    const background = element => {
        for (; element; element = element.parentElement) {
            const color = channels(getComputedStyle(element).backgroundColor);
            if (color[3] > 0.5) return color;
        }
        return [255, 255, 255, 1];
    };
    const all = document.querySelectorAll("h1, h2, .text, .prompt, .note, .facts, td, th, dt, dd, pre, summary");
    return [...all].filter(element => element.offsetParent && element.innerText.trim()).map(element => {
        const text = luminance(channels(getComputedStyle(element).color));
        const [dark, light] = [text, luminance(background(element))].sort((x, y) => x - y);
        return [(light + 0.05) / (dark + 0.05), element.className || element.tagName];
    });
}"""


def open_page(context, url, problems, path="/", timeout=30_000):
    """Open the playground. Console errors, failed requests and other hosts are added to `problems`."""

    def on_console(message):
        if message.type in ("error", "warning"):
            problems.append(message.text)

    def on_request(request):
        if not request.url.startswith((f"{url}/", "data:")):
            problems.append(f"requested {request.url}")

    def on_failure(request):
        if request.failure != "net::ERR_ABORTED":  # left by the page itself
            problems.append(f"{request.url}: {request.failure}")

    def on_response(response):
        if response.status >= 400:
            problems.append(f"{response.url}: {response.status}")

    page = new_page(context, timeout)
    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", on_request)
    page.on("requestfailed", on_failure)
    page.on("response", on_response)
    with waiting_for_events(page):
        page.goto(path)
    return page


def new_page(context, timeout=30_000, **options):
    page = context.new_page(**options)
    page.set_default_timeout(timeout)
    page.pending = set()
    page.on("request", lambda request: page.pending.add(request) if "/queue/" in request.url else None)
    for ended in ("requestfinished", "requestfailed"):
        page.on(ended, lambda request: page.pending.discard(request))
    return page


def wait_for_stream_end(page):
    """Wait at most 2 seconds until the event stream has closed: Gradio loses events sent while it closes."""
    quiet, deadline = 0, time.monotonic() + 2
    while quiet < 3 and time.monotonic() < deadline:
        page.wait_for_timeout(10)
        quiet = 0 if page.pending else quiet + 1


@contextlib.contextmanager
def waiting_for_events(page):
    """Wait for the response to an event that the block triggers."""
    with page.expect_response("**/queue/join*"):
        yield
    wait_for_stream_end(page)


def open_tab(page, name):
    with waiting_for_events(page) if name in ("Chat", "Library", "Sweeps") else contextlib.nullcontext():
        page.get_by_role("tab", name=name).click()


def prompt_of(page):
    """Return the prompt field of the open tab."""
    return page.get_by_role("textbox", name="Prompt").locator("visible=true")


def message_of(page):
    """Return the message field of the tab Chat."""
    return page.locator("#message textarea")


def wait_for_answer(page):
    """Wait until the answer of the tab Chat is complete, and its buttons work."""
    expect(page.locator(".chat:visible").last).to_have_attribute("aria-busy", "false")
    wait_for_stream_end(page)


def generate(page):
    page.get_by_role("button", name="Generate", exact=True).click()


def watch_text(page):
    """Record the text of the outputs from now on, at each change."""
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const outputs = [...document.querySelectorAll(".answers")].find(div => div.offsetParent);
            if (outputs) window.seen.push([...outputs.querySelectorAll(".text")].map(text => text.textContent).join(""));
        }).observe(document.body, {subtree: true, childList: true, characterData: true}) }"""
    )


def wait_for_outputs(page):
    """Wait until all outputs are complete."""
    expect(page.locator(".answers:visible")).to_have_attribute("aria-busy", "false")
    wait_for_stream_end(page)


def outputs(page):
    """Return the outputs by title, without the prompt."""
    page.wait_for_function("document.querySelector('.answers') !== null")
    columns = page.locator(".answers:visible article").evaluate_all(
        """articles => articles.map(article => [
            article.querySelector('h2').textContent, article.querySelector('.text').lastChild.textContent
        ])"""
    )
    return {title: printable(text) for title, text in columns}


def printable(text):
    """Remove characters that a page does not show as they are."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ufffd]", "", text)


def open_settings(page):
    """Open the settings and wait: input typed while they are being built is lost."""
    if not page.get_by_label("Top p").is_visible():
        page.get_by_role("button", name="Sampling settings").click()
    expect(page.get_by_label("Top p")).to_be_visible()
    page.wait_for_timeout(300)


def set_greedy(page, tokens):
    open_settings(page)
    page.get_by_label("Greedy").check()
    page.get_by_label("Max new tokens").fill(str(tokens))
    page.get_by_label("Max new tokens").press("Tab")


def choose(page, label, name):
    expect(page.get_by_role("option")).to_have_count(0)  # of another list that closes
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=name).click()


def focused(page):
    return page.evaluate(
        """() => {
            const element = document.activeElement, label = element.labels && element.labels[0];
            const name = element.getAttribute('aria-label') || (label && label.innerText);
            return (name || element.innerText || element.tagName).trim().split('\\n')[0];
        }"""
    )


def tab_to(page, until):
    """Press Tab until that control has the focus. Return the names of those on the way."""
    passed = []
    while not passed or not passed[-1].startswith(until):
        page.keyboard.press("Tab")
        passed.append(focused(page))
        assert len(passed) < 60, passed
    return passed


def token_probabilities(html):
    """Return the spans of tokens as (title, text), and the listed ones as (chosen, others)."""
    spans = re.findall(r'<span class="likely" [^>]*title="(.*?)">(.*?)</span>', html, re.S)
    listed = re.findall(r"<li><b>(.*?)</b> <span>(.*?)</span></li>", html, re.S)
    return [[tuple(map(unescape, pair)) for pair in pairs] for pairs in (spans, listed)]


def format_token(token):
    """Return a token of the API as the page shows it."""
    share = math.exp(token["logprob"])
    probability = format_share(share) if share >= 0.001 else "under 0.1%"
    return f"{json.dumps(token['token'], ensure_ascii=False)} {probability}"


def run_async(coroutine):
    """Run a coroutine in a thread of its own: Playwright has the event loop of this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
