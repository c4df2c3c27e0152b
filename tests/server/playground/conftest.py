"""A server with a small library and a browser, for all tests of the page."""

import json
import os
import shutil

import pytest
from playwright.sync_api import Error, sync_playwright

from lora_tuner import Generator, ModelOptions

from ...api_server import TEMPLATE, add_hostile_adapters, serving
from ...evaluation.test_gain_matrix import train_in
from .browser import BROWSER_OPTIONS, CHROMIUM, open_page


@pytest.fixture(scope="package")
def adapters(gpt2, tmp_path_factory):
    """Two good adapters, a hostile one and a broken one."""
    root = train_in(tmp_path_factory.mktemp("playground"), gpt2, ["noir", "verse"])
    folder = root / "adapters"
    add_hostile_adapters(folder, "noir")
    return folder


@pytest.fixture(autouse=True)
def _training_cache(adapters, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(adapters.parent / "cache"))


@pytest.fixture(scope="package")
def sweep(adapters):
    """A finished sweep, whose third trial diverged and whose fourth is not in the library."""
    folder = adapters.parent / "runs" / "rates.sweep"
    folder.mkdir(parents=True)
    losses = {"noir": 3.0, "verse": 2.8, "high": None, "gone": 3.25}
    trials = [
        {"name": name, "rank": 4, "learning_rate": 0.001 * 4**number, "loss": loss}
        | ({} if loss is None else {"bytes": 1200, "seconds": 3.0, "gap": loss - 2.8, "standard_error": 0.05})
        for number, (name, loss) in enumerate(losses.items())
    ]
    result = {"name": "rates", "base_loss": 3.5, "trials": trials, "recommended": "verse"}
    places = {"path": "adapters/verse", "folder": "runs/rates.sweep"}
    (folder / "sweep.json").write_text(json.dumps(result | places))
    return folder


@pytest.fixture(scope="package")
def chat_base(gpt2, tmp_path_factory):
    """The base of the adapters, with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / gpt2.name
    shutil.copytree(gpt2, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="package")
def served(chat_base, adapters):
    with serving(chat_base, adapters, page=True, max_tokens=500, runs_dir=adapters.parent / "runs") as served:
        yield served


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
def context(browser, served):
    """One context for all tests, which caches the scripts of the page."""
    return browser.new_context(base_url=served.url)


@pytest.fixture
def visit(context, served):
    """Return a function that opens the page. Fails on problems."""
    pages, problems = [], []

    def visit(path="/"):
        pages.append(open_page(context, served.url, problems, path))
        return pages[-1]

    yield visit
    for page in pages:
        page.close()
    assert problems == []


@pytest.fixture(scope="package")
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


@pytest.fixture
def generator(gpt2, adapters):
    return Generator(adapters_dir=adapters, options=ModelOptions(base=str(gpt2), device="cpu"))
