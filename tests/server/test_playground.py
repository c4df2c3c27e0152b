"""The playground in a real browser: its tabs, hostile adapters, and the requests it makes. See test_page_requests.py."""

import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from playwright.sync_api import Error, expect, sync_playwright
from safetensors.numpy import load_file

from lora_tuner import Generator, Library, ModelOptions, SamplingParams, evaluate, evaluation
from lora_tuner.adapters import adapter, plots
from lora_tuner.adapters.plots import plot_loss  # the session leaves it empty elsewhere
from lora_tuner.errors import Interrupted, QueueFullError
from lora_tuner.inference.multi_lora import blend_loaded
from lora_tuner.inference.sequence import Sequence

from .. import adapter_files
from ..api_server import HOSTILE, KEY, add_hostile_adapters, serving
from ..test_evaluation import train_in

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
ENVIRONMENT = dict(os.environ)  # before fixtures change it
SCREENSHOT = ENVIRONMENT.get("LORA_TUNER_SCREENSHOT")


@pytest.fixture(scope="module")
def adapters(gpt2, tmp_path_factory):
    """Two good adapters, a hostile one and a broken one."""
    root = train_in(tmp_path_factory.mktemp("playground"), gpt2, ["noir", "verse"])
    folder = root / "adapters"
    add_hostile_adapters(folder, "noir")
    return folder


@pytest.fixture(autouse=True)
def _training_cache(adapters, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(adapters.parent / "cache"))


@pytest.fixture(scope="module")
def served(gpt2, adapters):
    with serving(gpt2, adapters, page=True, max_tokens=500) as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, else Playwright's own. CI requires one of them."""
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM if CHROMIUM.exists() else None, args=BROWSER_OPTIONS
            )
        except Error:
            if os.environ.get("CI"):
                raise
            pytest.skip("there is no browser: `apt install chromium`, or `playwright install chromium`")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser, served):
    """One context for all tests, which caches the scripts of the page."""
    return browser.new_context(base_url=served.url)


def open_page(context, url, problems):
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

    page = new_page(context)
    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", on_request)
    page.on("requestfailed", on_failure)
    page.on("response", on_response)
    with waiting_for_events(page):
        page.goto("/")
    return page


@pytest.fixture
def visit(context, served):
    """Return a function that opens the page. Fails on problems."""
    pages, problems = [], []

    def visit():
        pages.append(open_page(context, served.url, problems))
        return pages[-1]

    yield visit
    for page in pages:
        page.close()
    assert problems == []


@pytest.fixture(scope="module")
def shared_page(context, served):
    problems = []
    page = open_page(context, served.url, problems)
    yield page, problems
    page.close()


@pytest.fixture
def page(shared_page):
    """One page for the tests that change nothing another one reads. Fails on problems."""
    page, problems = shared_page
    problems.clear()
    yield page
    assert problems == []


def new_page(context, **options):
    page = context.new_page(**options)
    page.set_default_timeout(10_000)
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
    with waiting_for_events(page) if name == "Library" else contextlib.nullcontext():
        page.get_by_role("tab", name=name).click()


def prompt_of(page):
    """Return the prompt field of the open tab."""
    return page.get_by_label("Prompt").locator("visible=true")


def watch_text(page):
    """Record the text of the outputs from now on, at each change."""
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const outputs = [...document.querySelectorAll(".answers")].find(div => div.offsetParent);
            if (outputs) window.seen.push(outputs.textContent);
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
    page.get_by_role("button", name="Sampling settings").click()
    expect(page.get_by_label("Top p")).to_have_value("0.95")
    page.wait_for_timeout(300)


def set_greedy(page, tokens):
    open_settings(page)
    page.get_by_label("Greedy").check()
    page.get_by_label("Max new tokens").fill(str(tokens))
    page.get_by_label("Max new tokens").press("Tab")


@pytest.fixture
def generator(gpt2, adapters):
    return Generator(adapters_dir=adapters, options=ModelOptions(base=str(gpt2), device="cpu"))


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


def blend_sampling():
    from lora_tuner.server.playground.page import BLEND_TOKENS  # with Gradio, which takes seconds to import

    return SamplingParams(greedy=True, max_new_tokens=BLEND_TOKENS)


def blend_text(generator, prompt, *parts):
    """Return the greedy output of a weighted sum of adapters."""
    loaded = blend_loaded([(weight, generator.get_or_load(name)[1]) for name, weight in parts])
    prompt_ids = generator.encode_prompt(prompt).token_ids
    sequence = Sequence(generator.base, prompt_ids, blend_sampling(), lora=loaded)
    generator.engine.add([sequence])
    while generator.engine.sequences:
        generator.engine.step()
    return printable(sequence.settled_text)


def choose(page, label, name):
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=name).click()


@pytest.mark.slow
def test_blend_follows_slider(visit, generator, served):
    page = visit()
    open_tab(page, "Blend")
    expect(page.get_by_role("combobox", name="First adapter")).to_have_value("noir")
    expect(page.get_by_role("combobox", name="Second adapter")).to_have_value("verse")
    prompt_of(page).fill(PROMPT)
    slider = page.locator("input[type=range]:visible")
    seen = set()
    for key, share in (("Home", 0.0), ("ArrowRight", 0.05), ("End", 1.0), ("ArrowLeft", 0.95)):
        slider.press(key)
        title = f"{round(1 - share, 2):g} noir + {share:g} verse"
        expect(page.locator(".answers h2:visible")).to_have_text(title)
        wait_for_outputs(page)
        text = blend_text(generator, PROMPT, ("noir", 1 - share), ("verse", share))
        assert outputs(page) == {title: text}
        seen.add(text)
    alone = [generator.generate_batch([(PROMPT, name)], blend_sampling())[0].text for name in ("noir", "verse")]
    assert {printable(text) for text in alone} <= seen
    expect(page.locator(".command")).to_have_text("python cli.py blend noir=0.05 verse=0.95 --name NAME")
    # During generation the slider moves on: outputs keep appearing, and the last one fits its position.
    watch_text(page)
    with served.held_steps(pause=0.02):
        for _ in range(12):
            slider.press("ArrowLeft")
            page.wait_for_timeout(60)
        expect(page.locator(".answers h2:visible")).to_have_text("0.65 noir + 0.35 verse")
        wait_for_outputs(page)
    assert outputs(page) == {
        "0.65 noir + 0.35 verse": blend_text(generator, PROMPT, ("noir", 0.65), ("verse", 0.35))
    }
    assert len(set(page.evaluate("window.seen.map(text => text.split('verse')[0])"))) > 4
    served.wait(lambda: served.scheduler.idle)
    expect(page.locator("input[type=number]:visible")).to_have_count(0)  # a typed number could be out of bounds


def test_library_shows_adapters_and_cards(page, adapters, monkeypatch):
    monkeypatch.setattr(plots, "plot_loss", plot_loss)
    open_tab(page, "Library")
    rows = page.get_by_role("row")
    expect(rows).to_have_count(5)
    assert rows.nth(0).inner_text().split("\t") == [
        "name",
        "gain",
        "held-out loss",
        "rank",
        "size",
        "data",
        "rows",
        "created",
    ]
    noir = adapter.load_adapter_folder(adapters / "noir").manifest
    cells = rows.nth(2).get_by_role("cell").all_inner_texts()
    assert cells[0] == f"{noir.result.gain:.3f} ± {noir.result.standard_error:.3f}"
    assert cells[2] == "4"
    assert cells[4] == "noir.json"
    expect(rows.nth(1)).to_contain_text("peft_type is '<img")
    page.get_by_role("button", name="noir").click()
    card = page.locator(".card")
    expect(card.get_by_role("heading")).to_have_text("noir")
    expect(card).to_contain_text(f"{noir.result.loss:.3f} (base: {noir.result.base_loss:.3f})")
    for name, width in (("Loss by training step", 840), ("Spectrum: share of", 960)):
        picture = card.get_by_role("img", name=name)
        assert picture.evaluate("image => image.naturalWidth") == width
    card.get_by_text("Model card").click()
    assert card.locator("pre").text_content() == (adapters / "noir" / adapter.CARD_FILE).read_text()
    page.get_by_role("button", name="broken").click()
    expect(page.get_by_role("alert")).to_contain_text("broken cannot be used.")


@pytest.mark.slow
def test_library_changes_appear(visit, adapters):
    page = visit()
    (adapters / "later").symlink_to(adapters / "noir")
    try:
        open_tab(page, "Library")
        page.get_by_role("button", name="later").wait_for()
        open_tab(page, "Blend")
        choose(page, "First adapter", "later")
        expect(page.locator(".answers h2:visible")).to_have_text("0.5 later + 0.5 verse")
        wait_for_outputs(page)
    finally:
        (adapters / "later").unlink()
    page.get_by_role("combobox", name="Second adapter").press("Tab")
    page.locator("input[type=range]:visible").press("ArrowRight")
    expect(page.get_by_role("alert")).to_contain_text("There is no model 'later'")
    open_tab(page, "Library")
    page.get_by_role("button", name="Refresh").click()
    expect(page.get_by_role("button", name="later")).to_have_count(0)


@pytest.mark.slow
def test_card_without_plots_gives_reasons(visit, adapters, tmp_path):
    """A symlink in place of the card is not followed."""
    (tmp_path / "secret").write_text("a secret")
    weights = load_file(adapters / "noir" / adapter.WEIGHTS_FILE)
    for name, tensor in list(weights.items()):
        if name.endswith("lora_B.weight"):
            weights[name.replace("lora_B.weight", "lora_magnitude_vector")] = np.ones(len(tensor), "f4")
    config = json.loads((adapters / "noir" / adapter.CONFIG_FILE).read_text()) | {"use_dora": True}
    folder = adapter_files.write(adapters / "rescaled", config, weights)
    (folder / adapter.CARD_FILE).symlink_to(tmp_path / "secret")
    try:
        page = visit()
        open_tab(page, "Library")
        page.get_by_role("button", name="rescaled").click()
        card = page.locator(".card")
        expect(card.locator("figcaption")).to_have_text(
            [
                "No loss curve: this adapter was not trained by lora_tuner.",
                re.compile("^rescaled is a DoRA adapter, .*: merge it instead.$"),
            ]
        )
        assert card.locator("img").count() == 0
        assert card.locator("pre").text_content() == "This adapter has no model card."
    finally:
        shutil.rmtree(folder)


def test_hostile_text_is_escaped(visit):
    page = visit()
    open_tab(page, "Library")
    page.get_by_role("button", name="xss").click()
    card = page.locator(".card")
    expect(card).to_contain_text(HOSTILE[:60])
    expect(card).to_contain_text("has no loss curve: could not convert string to float: '<img")
    card.get_by_text("Model card").click()
    expect(card.locator("pre")).to_contain_text("![x](http://elsewhere.example/y.png)")
    open_tab(page, "Generate")
    prompt_of(page).fill(HOSTILE)
    set_greedy(page, 5)
    page.get_by_role("button", name="Generate").click()
    wait_for_outputs(page)
    expect(page.locator(".prompt").first).to_have_text(HOSTILE)
    assert page.locator("img[src*=elsewhere], .card script, .answers script").count() == 0
    assert page.evaluate("window.run") is None


def test_heat_map_equals_evaluate(visit, adapters, served, monkeypatch):
    encode, tokenizers = evaluation.encode_measured, []
    monkeypatch.setattr(
        evaluation,
        "encode_measured",
        lambda base, *rows: (tokenizers.append(base.tokenizer), encode(base, *rows))[1],
    )
    page = visit()
    open_tab(page, "Evaluate")
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
    open_tab(page, "Evaluate")
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
    open_tab(page, "Evaluate")
    page.get_by_label("Rows").fill("3")  # not cached
    for count, leave in enumerate((lambda: page.get_by_role("button", name="Stop").click(), page.close), 1):
        page.get_by_role("button", name="Evaluate").click()
        page.locator("[aria-busy=true] progress").wait_for()
        assert len(ended) < count
        leave()
        served.wait(lambda count=count: len(ended) == count)
        if not page.is_closed():
            expect(page.locator("progress")).to_be_hidden()


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


@pytest.mark.slow
def test_page_works_by_keyboard(visit):
    page = visit()
    assert tab_to(page, "Prompt")[0] == "Generate"  # the tab
    page.keyboard.type(PROMPT)
    page.keyboard.press("Enter")
    wait_for_outputs(page)
    passed = tab_to(page, "Stop")
    expected = ["Adapters", "Sampling settings", "Generate", "Stop"]
    assert [name for name in passed if name in expected] == expected
    first = page.locator(".note:visible").inner_text()  # with its seed
    page.keyboard.press("Shift+Tab")
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
    for name in ("Generate", "Blend", "Library", "Evaluate"):
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
    page.get_by_role("button", name="Generate").click()
    wait_for_outputs(page)
    yield "generate"
    open_tab(page, "Blend")
    wait_for_outputs(page)
    yield "blend"
    open_tab(page, "Library")
    page.get_by_role("button", name="noir").click()
    page.get_by_text("Model card").click()
    yield "library"
    open_tab(page, "Evaluate")
    page.get_by_role("button", name="Evaluate").click()
    page.get_by_role("table", name=re.compile("^Gain over")).wait_for()
    yield "evaluate"


@pytest.mark.slow
def test_page_fits_phone_with_enough_contrast(visit):
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
            page.get_by_role("button", name="Generate").click()
            expect(page.locator(".facts").first).to_have_text(re.compile("[1-9] tokens"))
            served.server.handle_exit(signal.SIGTERM, None)
            served.wait(lambda: not served.scheduler.accepting)
            release(1000)
            served.wait(lambda: not served.thread.is_alive())
        assert served.scheduler.idle
        wait_for_outputs(page)
        expect(page.locator(".facts")).to_have_text([re.compile("cut off|finished")] * 3)
        page.close()


@pytest.mark.slow
@pytest.mark.skipif(not SCREENSHOT, reason="`make screenshot` takes the screenshot of the README")
def test_screenshot(browser, monkeypatch):
    """Needs the embedded base, and the adapters praise and pan in the library."""
    monkeypatch.chdir(Path(__file__).parents[2])
    for name in ("LORA_TUNER_CACHE", "HF_HOME"):
        monkeypatch.delenv(name)
        if name in ENVIRONMENT:
            monkeypatch.setenv(name, ENVIRONMENT[name])
    with serving("smollm2-135m", "adapters", page=True) as served:
        page = new_page(
            browser,
            base_url=served.url,
            viewport={"width": 1200, "height": 800},
            color_scheme="light",
        )
        with waiting_for_events(page):
            page.goto("/")
        prompt_of(page).fill("This film")
        open_settings(page)
        page.get_by_label("Seed").fill("1")
        page.get_by_label("Max new tokens").fill("66")
        page.get_by_role("button", name="Sampling settings").click()
        page.get_by_role("button", name="Generate").click()
        expect(page.locator(".answers")).to_have_attribute("aria-busy", "false", timeout=120_000)
        page.screenshot(path=SCREENSHOT)
        page.close()
