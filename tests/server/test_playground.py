"""The page of the server, in a real browser: what people do with it, what strangers' adapters cannot do, where it goes."""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio.queueing import Queue
from playwright.sync_api import Error, expect, sync_playwright
from safetensors.numpy import load_file

from lora_tuner import Generator, Library, ModelOptions, SamplingParams, evaluate, evaluation
from lora_tuner.adapters import adapter
from lora_tuner.errors import Interrupted, QueueFullError
from lora_tuner.inference.multi_lora import blend_loaded
from lora_tuner.inference.sequence import Sequence
from lora_tuner.server.metrics import Metrics
from lora_tuner.server.playground.page import BLEND_TOKENS, Page, _SliderState

from .. import adapter_files
from ..api_server import serving
from ..test_evaluation import train_in

PROMPT = "12: the actor"
DEBIAN = Path("/usr/bin/chromium")
QUIETLY = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIETLY += ["--disable-component-update", "--disable-sync"]
EVIL = (
    '<img src="http://elsewhere.example/x.png" onerror="window.run=1"><script>window.run=1</script>${window.run=1}{{1}}'
)
KEY = "a key of the tests"
CONTRASTS = """() => {
    const numbers = text => {
        const [r, g, b, alpha] = text.match(/[\\d.]+/g).map(Number);
        return text.startsWith("color(srgb") ? [r * 255, g * 255, b * 255, alpha ?? 1] : [r, g, b, alpha ?? 1];
    };
    const light = rgb => [0.2126, 0.7152, 0.0722].reduce((sum, part, place) => {
        const value = rgb[place] / 255;
        return sum + part * (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    }, 0);
    const behind = it => {
        for (; it; it = it.parentElement) {
            const found = numbers(getComputedStyle(it).backgroundColor);
            if (found[3] > 0.5) return found;
        }
        return [255, 255, 255, 1];
    };
    const all = document.querySelectorAll("h1, h2, .text, .prompt, .note, .facts, td, th, dt, dd, pre, summary");
    return [...all].filter(it => it.offsetParent && it.innerText.trim()).map(it => {
        const [less, more] = [light(numbers(getComputedStyle(it).color)), light(behind(it))].sort((x, y) => x - y);
        return [(more + 0.05) / (less + 0.05), it.className || it.tagName];
    });
}"""
ENVIRONMENT = dict(os.environ)  # as it was before each test got a home of its own
SCREENSHOT = ENVIRONMENT.get("LORA_TUNER_SCREENSHOT")


@pytest.fixture(scope="module")
def adapters(gpt2, tmp_path_factory):
    """Two that are well, one of a stranger who means harm, one that is broken. Each test has the cache of their training."""
    place = train_in(tmp_path_factory.mktemp("playground"), gpt2, ["noir", "verse"])
    folder = place / "adapters"
    good = adapter.load_adapter_folder(folder / "noir")
    data = good.manifest.data.model_copy(update={"name": EVIL, "source": EVIL, "where": [EVIL]})
    (folder / "wicked").mkdir()
    for name in (adapter.WEIGHTS_FILE, adapter.CONFIG_FILE):
        (folder / "wicked" / name).write_bytes((folder / "noir" / name).read_bytes())
    manifest = good.manifest.model_copy(update={"data": data, "created": EVIL, "made_by": EVIL})
    (folder / "wicked" / adapter.MANIFEST_FILE).write_text(manifest.to_json())
    (folder / "wicked" / adapter.CARD_FILE).write_text(f"# {EVIL}\n![x](http://elsewhere.example/y.png)")
    (folder / "wicked" / adapter.METRICS_FILE).write_text(json.dumps({"step": EVIL, "loss": EVIL}) + "\n")
    adapter_files.write(folder / "broken", {"peft_type": EVIL})
    return folder


@pytest.fixture(autouse=True)
def _cache(adapters, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(adapters.parent / "cache"))


@pytest.fixture(scope="module")
def served(gpt2, adapters):
    with serving(gpt2, adapters, page=True, max_tokens=500) as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium or, where that is not there, Playwright's own. Where tests must run, so must it."""
    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=DEBIAN if DEBIAN.exists() else None, args=QUIETLY)
        except Error:
            if os.environ.get("CI"):
                raise
            pytest.skip("there is no browser: `apt install chromium`, or `playwright install chromium`")
        yield found
        found.close()


@pytest.fixture(scope="module")
def context(browser, served):
    """One for all, which keeps the scripts of the page."""
    return browser.new_context(base_url=served.url)


@pytest.fixture
def visit(context, served):
    """Opens the page; in the end nobody may have complained, and nobody else may have been asked."""
    address = served.url
    pages, complaints = [], []

    def watch(request):
        if not request.url.startswith((f"{address}/", "data:")):
            complaints.append(f"asked {request.url}")

    def failed(request):
        if request.failure != "net::ERR_ABORTED":  # what the page itself has left
            complaints.append(f"{request.url}: {request.failure}")

    def load():
        page = new_page(context)
        pages.append(page)
        page.on("console", lambda it: complaints.append(it.text) if it.type in ("error", "warning") else None)
        page.on("pageerror", lambda it: complaints.append(str(it)))
        page.on("request", watch)
        page.on("requestfailed", failed)
        page.on("response", lambda it: complaints.append(f"{it.url}: {it.status}") if it.status >= 400 else None)
        with asking(page):
            page.goto("/")
        return page

    yield load
    for page in pages:
        page.close()
    assert complaints == []


def new_page(context, **options):
    page = context.new_page(**options)
    page.set_default_timeout(10_000)
    page.asked = set()
    page.on("request", lambda it: page.asked.add(it) if "/queue/" in it.url else None)
    for ended in ("requestfinished", "requestfailed"):
        page.on(ended, lambda it: page.asked.discard(it))
    return page


def rest(page):
    """Until the stream of answers has closed: Gradio's script loses what is asked while it closes. Now and then it stays open."""
    quiet, deadline = 0, time.monotonic() + 2
    while quiet < 3 and time.monotonic() < deadline:
        page.wait_for_timeout(10)
        quiet = 0 if page.asked else quiet + 1


@contextlib.contextmanager
def asking(page):
    """Within it the page asks for something, by the end it has it."""
    with page.expect_response("**/queue/join*"):
        yield
    rest(page)


def tab(page, name):
    with asking(page) if name == "Library" else contextlib.nullcontext():
        page.get_by_role("tab", name=name).click()


def prompt_of(page):
    """That of the tab which is open."""
    return page.get_by_label("Prompt").locator("visible=true")


def watch_text(page):
    """What stands in the answers from now on, each time that it changes."""
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const it = [...document.querySelectorAll(".answers")].find(it => it.offsetParent);
            if (it) window.seen.push(it.textContent);
        }).observe(document.body, {subtree: true, childList: true, characterData: true}) }"""
    )


def settle(page):
    """Until all is written."""
    expect(page.locator(".answers:visible")).to_have_attribute("aria-busy", "false")
    rest(page)


def answers(page):
    """What stands in the columns, by the names above them, the prompt left out."""
    page.wait_for_function("document.querySelector('.answers') !== null")
    found = page.locator(".answers:visible article").evaluate_all(
        """all => all.map(it => [it.querySelector('h2').textContent, it.querySelector('.text').lastChild.textContent])"""
    )
    return {name: plain(text) for name, text in found}


def plain(text):
    """Without what a page shows otherwise than as it is."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ufffd]", "", text)


def open_settings(page):
    """What is typed while a part of the page is still being built, is lost."""
    page.get_by_role("button", name="How the text is drawn").click()
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


def test_base_and_adapters_answer_side_by_side_as_they_would_alone(visit, generator):
    page = visit()
    prompt_of(page).fill(PROMPT)
    set_greedy(page, 60)
    watch_text(page)
    page.get_by_role("button", name="Write").click()
    settle(page)
    expected = generator.generate_batch(
        [(PROMPT, None), (PROMPT, "noir"), (PROMPT, "verse")], SamplingParams(greedy=True, max_new_tokens=60)
    )
    names = ["gpt2", "noir", "verse"]
    assert answers(page) == {name: plain(it.text) for name, it in zip(names, expected, strict=True)}
    lengths = [len(text) for text in page.evaluate("window.seen")]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3, "the text does not come bit by bit"


def test_enter_writes_and_the_seed_that_is_said_writes_the_same_again(visit):
    page = visit()
    prompt_of(page).fill(PROMPT)
    prompt_of(page).press("Enter")
    settle(page)
    first = answers(page)
    seed = re.search(r"Seed (\d+)", page.locator(".note:visible").inner_text())[1]
    open_settings(page)
    page.get_by_label("Seed").fill(seed)
    page.get_by_role("button", name="Write").click()
    page.wait_for_timeout(300)
    settle(page)
    assert answers(page) == first
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Temperature").fill("0.1")
    page.get_by_role("button", name="Write").click()
    expect(page.locator(".note:visible")).to_contain_text("Seed 7")
    settle(page)
    assert answers(page) != first


def test_settings_have_the_defaults_of_the_command_line(visit):
    page = visit()
    open_settings(page)
    for name, value in {"Temperature": "0.8", "Top p": "0.95", "Top k": "50", "Repetition penalty": "1.1"}.items():
        expect(page.get_by_label(name)).to_have_value(value)
    expect(page.get_by_label("Seed")).to_have_attribute("placeholder", "random")
    page.get_by_label("Greedy").check()
    expect(page.get_by_label("Temperature")).to_be_disabled()
    page.get_by_label("Greedy").uncheck()
    expect(page.get_by_label("Temperature")).to_be_enabled()


def test_what_cannot_be_written_is_said_in_a_line(visit, served, monkeypatch):
    page = visit()
    prompt_of(page).fill("word " * 300)
    page.get_by_role("button", name="Write").click()
    expect(page.get_by_role("alert")).to_contain_text("looks back on 128: cut it.")
    prompt_of(page).fill(PROMPT)
    open_settings(page)
    for label, wrong, right, line in (
        ("Top p", "0", "1", "top_p: input should be greater than 0 (got 0)"),
        ("Temperature", "11", "1", "temperature: input should be less than or equal to 10 (got 11)"),
        ("Top k", "1.5", "1", "top_k: input should be a valid integer, got a number with a fractional part (got 1.5)"),
        ("Max new tokens", "501", "5", "max_new_tokens: this server writes 500 at the most."),
    ):
        page.get_by_label(label).fill(wrong)
        page.get_by_role("button", name="Write").click()
        expect(page.get_by_role("alert")).to_have_text(line)
        page.get_by_label(label).fill(right)

    def busy(job):
        raise QueueFullError("9 answers are waiting already: try again in 3 seconds.", 3)

    monkeypatch.setattr(served.worker, "submit", busy)
    page.get_by_role("button", name="Write").click()
    expect(page.get_by_role("alert")).to_have_text(["9 answers are waiting already: try again in 3 seconds."] * 3)


def test_who_stops_or_leaves_is_not_written_for_any_more(visit, served):
    page = visit()
    with served.braked(pause=0.05):  # as a large model writes
        for leave in (lambda: page.get_by_role("button", name="Stop").click(), page.close):
            page.get_by_role("button", name="Write").click()
            expect(page.locator("[aria-busy=true] .writing .facts").first).to_have_text(re.compile("[1-9]\\d* tokens"))
            assert not served.worker.idle
            leave()
            served.wait(lambda: served.worker.idle)
            if not page.is_closed():
                settle(page)
                assert int(page.locator(".facts").first.inner_text().split()[0]) < 120
        served.wait(lambda: served.app.state.metrics.streams == 0)


def written(generator, prompt, *parts):
    """What the weighted sum of adapters writes, greedily."""
    loaded = blend_loaded([(weight, generator.find(name)[1]) for name, weight in parts])
    sampling = SamplingParams(greedy=True, max_new_tokens=BLEND_TOKENS)
    row = Sequence(generator.base, generator.encode_prompt(prompt).token_ids, sampling, lora=loaded)
    generator.engine.join([row])
    while generator.engine.rows:
        generator.engine.step()
    return plain(row.settled_text)


def choose(page, label, name):
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=name).click()


def test_the_text_follows_the_slider(visit, generator, served):
    page = visit()
    tab(page, "Blend")
    expect(page.get_by_role("combobox", name="First adapter")).to_have_value("noir")
    expect(page.get_by_role("combobox", name="Second adapter")).to_have_value("verse")
    prompt_of(page).fill(PROMPT)
    slider = page.locator("input[type=range]:visible")
    seen = set()
    for key, share in (("Home", 0.0), ("ArrowRight", 0.05), ("End", 1.0), ("ArrowLeft", 0.95)):
        slider.press(key)
        title = f"{round(1 - share, 2):g} noir + {share:g} verse"
        expect(page.locator(".answers h2:visible")).to_have_text(title)
        settle(page)
        text = written(generator, PROMPT, ("noir", 1 - share), ("verse", share))
        assert answers(page) == {title: text}
        seen.add(text)
    alone = [
        generator.generate_batch([(PROMPT, name)], SamplingParams(greedy=True, max_new_tokens=BLEND_TOKENS))[0].text
        for name in ("noir", "verse")
    ]
    assert {plain(text) for text in alone} <= seen
    expect(page.locator(".command")).to_have_text("python cli.py blend noir=0.05 verse=0.95 --name NAME")
    # While one is written the slider goes on: there is always something to see, and in the end what belongs to its place.
    watch_text(page)
    with served.braked(pause=0.02):
        for _ in range(12):
            slider.press("ArrowLeft")
            page.wait_for_timeout(60)
        expect(page.locator(".answers h2:visible")).to_have_text("0.65 noir + 0.35 verse")
        settle(page)
    assert answers(page) == {"0.65 noir + 0.35 verse": written(generator, PROMPT, ("noir", 0.65), ("verse", 0.35))}
    assert len(set(page.evaluate("window.seen.map(it => it.split('verse')[0])"))) > 4
    served.wait(lambda: served.worker.idle)
    expect(page.locator("input[type=number]:visible")).to_have_count(0)  # what is typed there could be out of bounds


def test_the_library_shows_each_adapter_and_its_card(visit, adapters):
    page = visit()
    tab(page, "Library")
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
        "made",
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
    expect(card).to_contain_text(f"{noir.result.loss:.4f} nats a token; the base has {noir.result.base_loss:.4f}")
    for name in ("Loss over the steps", "Spectrum: what share"):
        picture = card.get_by_role("img", name=name)
        assert picture.evaluate("it => it.naturalWidth") == 840
    card.get_by_text("Model card").click()
    assert card.locator("pre").text_content() == (adapters / "noir" / adapter.CARD_FILE).read_text()
    page.get_by_role("button", name="broken").click()
    expect(page.get_by_role("alert")).to_contain_text("broken does not answer.")


def test_new_adapters_appear(visit, adapters):
    page = visit()
    (adapters / "later").symlink_to(adapters / "noir")
    try:
        tab(page, "Library")
        page.get_by_role("button", name="later").wait_for()
        tab(page, "Blend")
        choose(page, "First adapter", "later")
        expect(page.locator(".answers h2:visible")).to_have_text("0.5 later + 0.5 verse")
        settle(page)
    finally:
        (adapters / "later").unlink()
    page.get_by_role("combobox", name="Second adapter").press("Tab")
    page.locator("input[type=range]:visible").press("ArrowRight")
    expect(page.get_by_role("alert")).to_contain_text("There is no model 'later'")
    tab(page, "Library")
    page.get_by_role("button", name="Refresh").click()
    expect(page.get_by_role("button", name="later")).to_have_count(0)


def test_a_card_without_a_picture_says_why(visit, adapters, tmp_path):
    """And a link in place of a card is not followed: it might lead to any file."""
    (tmp_path / "secret").write_text("nobody's business")
    weights = load_file(adapters / "noir" / adapter.WEIGHTS_FILE)
    for name, tensor in list(weights.items()):
        if name.endswith("lora_B.weight"):
            weights[name.replace("lora_B.weight", "lora_magnitude_vector")] = np.ones(len(tensor), "f4")
    config = json.loads((adapters / "noir" / adapter.CONFIG_FILE).read_text()) | {"use_dora": True}
    folder = adapter_files.write(adapters / "rescaled", config, weights)
    (folder / adapter.CARD_FILE).symlink_to(tmp_path / "secret")
    try:
        page = visit()
        tab(page, "Library")
        page.get_by_role("button", name="rescaled").click()
        card = page.locator(".card")
        expect(card.locator("figcaption")).to_have_text(
            [
                "No loss curve: it comes from no training run of this tool.",
                re.compile("^rescaled is a DoRA adapter, .*: merge it instead.$"),
            ]
        )
        assert card.locator("img").count() == 0
        assert card.locator("pre").text_content() == "It has none."
    finally:
        shutil.rmtree(folder)


def test_a_strangers_words_are_words(visit):
    page = visit()
    tab(page, "Library")
    page.get_by_role("button", name="wicked").click()
    card = page.locator(".card")
    expect(card).to_contain_text(EVIL[:60])
    expect(card).to_contain_text("has no loss curve: could not convert string to float: '<img")
    card.get_by_text("Model card").click()
    expect(card.locator("pre")).to_contain_text("![x](http://elsewhere.example/y.png)")
    tab(page, "Write")
    prompt_of(page).fill(EVIL)
    set_greedy(page, 5)
    page.get_by_role("button", name="Write").click()
    settle(page)
    expect(page.locator(".prompt").first).to_have_text(EVIL)
    assert page.locator("img[src*=elsewhere], .card script, .answers script").count() == 0
    assert page.evaluate("window.run") is None


def test_gains_are_a_heat_map_of_what_evaluate_measures(visit, adapters, served, monkeypatch):
    encode, tokenizers = evaluation.encode_held_out, []
    monkeypatch.setattr(
        evaluation, "encode_held_out", lambda base, texts: (tokenizers.append(base.tokenizer), encode(base, texts))[1]
    )
    page = visit()
    tab(page, "Gains")
    page.get_by_label("Rows").fill("4")  # not measured yet
    page.get_by_role("button", name="Measure").click()
    table = page.get_by_role("table", name=re.compile("^Gain over"))
    table.wait_for()
    assert tokenizers
    assert not any(it is served.desk.base.tokenizer for it in tokenizers)  # others write with that meanwhile
    matrix = evaluate(
        [Library(adapters).get(name) for name in ("noir", "verse")], eval_rows=4, options=ModelOptions(device="cpu")
    )
    shown = table.locator("tbody tr").evaluate_all(
        "all => all.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert shown == [
        [name, *(f"{cell.gain:+.3f}± {cell.standard_error:.3f}" for cell in line)]
        for name, line in zip(matrix.adapters, matrix.cells, strict=True)
    ]
    best = max((cell.gain, place) for place, cell in enumerate(matrix.cells[0] + matrix.cells[1]))[1]
    shares = table.locator("td[style]").evaluate_all(
        "all => all.map(it => it.style.getPropertyValue('--share').trim())"
    )
    assert shares[best] == "100%"


def test_what_cannot_be_measured_is_said(visit):
    page = visit()
    tab(page, "Gains")
    page.get_by_label("Rows").fill("some")
    page.get_by_role("button", name="Measure").click()
    expect(page.get_by_role("alert")).to_contain_text("eval_rows: input should be a valid integer")
    for key in ("Backspace", "Backspace", "Tab"):
        page.get_by_role("combobox", name="Adapters").press(key)
    page.get_by_role("button", name="Measure").click()
    expect(page.get_by_role("alert")).to_have_text("Choose adapters: there is nothing to measure yet.")


def test_who_stops_or_leaves_is_not_measured_for_any_more(visit, served, monkeypatch):
    end, ended = time.monotonic() + 30, []
    evaluate_on = evaluation.evaluate_on

    def endless(rows, _):
        while time.monotonic() < end:
            yield [0]

    def watched(*arguments, **settings):
        try:
            return evaluate_on(*arguments, **settings)
        except Interrupted:
            ended.append(True)
            raise

    monkeypatch.setattr(evaluation, "_length_batches", endless)
    monkeypatch.setattr(evaluation, "evaluate_on", watched)
    page = visit()
    tab(page, "Gains")
    page.get_by_label("Rows").fill("3")  # not measured yet
    for count, leave in enumerate((lambda: page.get_by_role("button", name="Stop").click(), page.close), 1):
        page.get_by_role("button", name="Measure").click()
        page.locator("[aria-busy=true] progress").wait_for()
        assert len(ended) < count
        leave()
        served.wait(lambda count=count: len(ended) == count)
        if not page.is_closed():
            expect(page.locator("progress")).to_be_hidden()


def focused(page):
    return page.evaluate(
        """() => { const it = document.activeElement; return (it.getAttribute('aria-label')
            || (it.labels && it.labels[0] && it.labels[0].innerText) || it.innerText || it.tagName).trim().split('\\n')[0] }"""
    )


def walk(page, until):
    """Press Tab until that has the focus; what was passed."""
    passed = []
    while not passed or not passed[-1].startswith(until):
        page.keyboard.press("Tab")
        passed.append(focused(page))
        assert len(passed) < 60, passed
    return passed


def test_a_keyboard_is_enough(visit):
    page = visit()
    assert walk(page, "Prompt")[0] == "Write"  # the tab
    page.keyboard.type(PROMPT)
    page.keyboard.press("Enter")
    settle(page)
    passed = walk(page, "Stop")
    expected = ["Adapters", "How the text is drawn", "Write", "Stop"]
    assert [name for name in passed if name in expected] == expected
    first = page.locator(".note:visible").inner_text()  # with its seed
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".note:visible")).not_to_have_text(first)
    settle(page)
    page.get_by_role("tab", name="Library").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="noir").wait_for()
    rest(page)
    walk(page, "noir")
    page.keyboard.press("Enter")
    expect(page.locator(".card h2")).to_have_text("noir")
    walk(page, "Model card")
    page.keyboard.press("Enter")
    expect(page.locator(".card pre")).to_be_visible()


def test_every_control_has_a_name(visit):
    page = visit()
    for name in ("Write", "Blend", "Library", "Gains"):
        tab(page, name)
        nameless = page.locator("button:visible, input:visible, textarea:visible, select:visible").evaluate_all(
            """all => all.filter(it => !(it.getAttribute('aria-label') || it.title || it.innerText.trim()
                || (it.labels && it.labels.length && it.labels[0].innerText.trim()))).map(it => it.outerHTML)"""
        )
        assert nameless == []


def everything(page):
    """Each tab in turn, with something in it."""
    prompt_of(page).fill(f"{PROMPT} {'x' * 60}")
    open_settings(page)
    page.get_by_role("button", name="Write").click()
    settle(page)
    yield "write"
    tab(page, "Blend")
    settle(page)
    yield "blend"
    tab(page, "Library")
    page.get_by_role("button", name="noir").click()
    page.get_by_text("Model card").click()
    yield "library"
    tab(page, "Gains")
    page.get_by_role("button", name="Measure").click()
    page.get_by_role("table", name=re.compile("^Gain over")).wait_for()
    yield "gains"


def test_it_fits_a_phone_and_text_stands_out_in_light_and_dark(visit):
    """By the ratio of WCAG 2, section 1.4.3."""
    page = visit()
    wide = page.viewport_size
    for name in everything(page):
        page.set_viewport_size({"width": 375, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, name
        page.set_viewport_size(wide)
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function("name => document.body.classList.contains('dark') == (name == 'dark')", arg=scheme)
            ratios = page.evaluate(CONTRASTS)
            assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") == (
                scheme == "light"
            )
            assert ratios
            assert min(ratio for ratio, _ in ratios) >= 4.5, (name, scheme, min(ratios))


# What is asked of the server beside the page


def test_what_the_page_does_not_need_is_not_there(served):
    address = served.url
    with httpx.Client(base_url=address) as client:
        for path in (
            "upload",
            "file=/etc/passwd",
            "file/etc/passwd",
            "proxy=http://x.hf.space/",
            "info",
            "openapi.json",
        ):
            assert client.get(f"/gradio_api/{path}").status_code == 404, path
            assert client.post(f"/gradio_api/{path}").status_code == 404, path
        for path in (
            "run/write",
            "api/write",
            "call/write",
            "component_server",
            "vibe-edit",
            "deep_link",
            "run-history/connect",
        ):
            assert client.post(f"/gradio_api/{path}", json={"data": []}).status_code == 404, path
        for path in (
            "/monitoring",
            "/monitoring/summary",
            "/gradio_api/mcp/",
            "/gradio_api/deep_link",
            "/v1/nothing",
            "/robots.txt",
        ):
            assert client.get(path).status_code == 404, path
        assert client.get("/health").status_code == 200


def test_the_page_names_no_other_host_and_lets_browsers_ask_none(served):
    address = served.url
    found = httpx.get(address, headers={"Origin": "http://elsewhere.example", "Accept-Encoding": "br"})
    assert found.status_code == 200
    assert set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w./-]*", found.text)) <= {address.rpartition(":")[0]}
    assert "default-src 'self'" in found.headers["content-security-policy"]
    assert not [name for name in found.headers if name.startswith("access-control")]
    assert httpx.head(address).status_code == 200


def test_what_the_page_writes_is_counted_and_logged(served, caplog):
    """And who leaves, is seen as one that did."""
    caplog.set_level(logging.INFO, "lora_tuner.server")
    metrics = Metrics(served.desk)
    page = Page(served.desk, metrics)

    async def look(frames, at_most):
        async with contextlib.aclosing(frames):
            async for _ in frames:
                if not (at_most := at_most - 1):
                    break

    settings = [5, 0.8, 0.95, 50, 1.1, "", False]
    with ThreadPoolExecutor(1) as pool:  # Playwright has a loop in this thread
        pool.submit(asyncio.run, look(page.write(PROMPT, ["noir", "verse"], *settings), 1000)).result()
        pool.submit(asyncio.run, look(page.blend(PROMPT, "noir", "verse", 0.5, _SliderState()), 1000)).result()
        with served.braked():
            pool.submit(asyncio.run, look(page.write(PROMPT, [], *settings), 1)).result()
    text = metrics.text().decode()
    for model, count in (("gpt2", 2), ("noir", 1), ("verse", 1), ("", 1)):
        assert f'lora_tuner_requests_total{{endpoint="page",model="{model}",status="200"}} {count}.0' in text
    assert 'lora_tuner_tokens_total{kind="completion",model="noir"} 5.0' in text
    lines = [it.msg for it in caplog.records if it.name == "lora_tuner.server"]
    assert {it["path"] for it in lines} == {"page"}
    assert sorted((it["model"] or "", it["completion_tokens"], it["complete"]) for it in lines) == [
        ("", BLEND_TOKENS, True),
        ("gpt2", 0, False),
        ("gpt2", 5, True),
        ("noir", 5, True),
        ("verse", 5, True),
    ]
    assert PROMPT not in str(lines)


def test_gradio_keeps_no_accounts_that_grow(served, monkeypatch):
    """It would go through all that has happened, after each thing that happens."""
    queue = Page(served.desk, Metrics(served.desk)).blocks()._queue
    monkeypatch.setattr(Queue, "_get_df", None)
    queue.events_recorded = 10_000
    assert queue.compute_analytics_summary([{"function": "write"}]) == {"functions": {}}


def test_with_a_key_nobody_comes_in_without_it_and_at_the_end_the_page_gets_all(browser, gpt2, adapters):
    with serving(gpt2, adapters, page=True, api_key=KEY) as served:
        address = served.url
        for path in ("/config", "/gradio_api/queue/data?session_hash=x"):
            assert httpx.get(f"{address}{path}").status_code == 401
        for method, path in (
            ("GET", "startup-events"), ("GET", "app_id"), ("GET", "app_id/"), ("GET", "heartbeat/x"), ("POST", "cancel"),
            ("POST", "reset"),
        ):  # fmt: skip
            for cookies in ({}, {f"access-token{kind}": "x" for kind in ("", "-unsecure-", "-unsecure-x")}):
                response = httpx.request(method, f"{address}/gradio_api/{path}", cookies=cookies, json={})
                assert response.status_code == 401, path
        body = {"data": [], "fn_index": 0, "session_hash": "x"}
        assert httpx.post(f"{address}/gradio_api/queue/join", json=body).status_code == 401
        assert "noir" not in httpx.get(address).text
        page = new_page(browser)
        page.goto(address)
        expect(page.get_by_text("the API key of this server as the password")).to_be_visible()
        for password, then in (("wrong", page.expect_response("**/login")), (KEY, asking(page))):
            page.get_by_label("username").fill("anybody")
            page.get_by_label("password").fill(password)
            with then:
                page.get_by_role("button", name="Login").click()
        with served.braked() as let:
            let(5)
            page.get_by_role("button", name="Write").click()
            expect(page.locator(".facts").first).to_have_text(re.compile("[1-9] tokens"))
            served.server.handle_exit(signal.SIGTERM, None)
            served.wait(lambda: not served.worker.answers)
            let(1000)
            served.wait(lambda: not served.thread.is_alive())
        assert served.worker.idle
        settle(page)
        expect(page.locator(".facts")).to_have_text([re.compile("cut off|the end")] * 3)
        page.close()


@pytest.mark.skipif(not SCREENSHOT, reason="`make screenshot` takes the picture of the README")
def test_a_picture_of_it(browser, monkeypatch):
    """With the embedded base, and the adapters praise and pan of the library."""
    monkeypatch.chdir(Path(__file__).parents[2])
    for name in ("LORA_TUNER_CACHE", "HF_HOME"):
        monkeypatch.delenv(name)
        if name in ENVIRONMENT:
            monkeypatch.setenv(name, ENVIRONMENT[name])
    with serving("smollm2-135m", "adapters", page=True) as served:
        page = new_page(browser, base_url=served.url, viewport={"width": 1200, "height": 800}, color_scheme="light")
        with asking(page):
            page.goto("/")
        prompt_of(page).fill("This film")
        open_settings(page)
        page.get_by_label("Seed").fill("1")
        page.get_by_label("Max new tokens").fill("66")
        page.get_by_role("button", name="How the text is drawn").click()
        page.get_by_role("button", name="Write").click()
        expect(page.locator(".answers")).to_have_attribute("aria-busy", "false", timeout=120_000)
        page.screenshot(path=SCREENSHOT)
        page.close()
