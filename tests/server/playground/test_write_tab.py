"""The tab Write in a real browser."""

import re

import pytest
from playwright.sync_api import expect

from lora_tuner import SamplingParams
from lora_tuner.errors import QueueFullError
from lora_tuner.server.metrics import Metrics

from ...api_server import HOSTILE
from .browser import (
    PROMPT,
    choose,
    format_token,
    generate,
    new_page,
    open_settings,
    open_tab,
    outputs,
    printable,
    prompt_of,
    run_async,
    set_greedy,
    token_probabilities,
    wait_for_outputs,
    waiting_for_events,
    watch_text,
)


@pytest.mark.slow
def test_generate_tab_equals_generate_batch(visit, served, generator):
    page = visit()
    prompt_of(page).fill(PROMPT)
    set_greedy(page, 110)
    watch_text(page)
    with served.held_steps(0.03):  # else the texts may be there before the page is drawn
        generate(page)
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
    generate(page)
    page.wait_for_timeout(300)
    wait_for_outputs(page)
    assert outputs(page) == first
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Temperature").fill("0.1")
    generate(page)
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


def problem_of(page, label):
    """Return the problem at a field, which has the focus."""
    field = page.get_by_label(label).and_(page.locator("[aria-invalid]"))
    expect(field).to_be_focused()
    return page.locator(f"[id='{field.get_attribute('aria-describedby')}']").inner_text()


@pytest.mark.slow
def test_error_stands_at_field(visit, served, monkeypatch):
    page = visit()
    open_settings(page)
    page.get_by_label("Max new tokens").fill("5")
    generate(page)
    wait_for_outputs(page)
    answers = outputs(page)
    prompt_of(page).fill(" ")
    generate(page)
    assert problem_of(page, "Prompt") == "Enter a prompt"
    prompt_of(page).fill("word " * 300)
    generate(page)
    expect(page.get_by_text("has a context of 128: shorten it.")).to_be_visible()
    prompt_of(page).fill(PROMPT)
    for label, wrong, right, problem in (
        ("Top p", "0", "1", "Input should be greater than 0 (got 0)"),
        ("Temperature", "11", "1", "Input should be less than or equal to 10 (got 11)"),
        ("Top k", "1.5", "1", "Input should be a valid integer, got a number with a fractional part (got 1.5)"),
        ("Stop sequences", "x\n" * 65, "x", "At most 64 lines"),
        ("Max new tokens", "501", "5", "The limit of this server is 500"),
    ):
        page.get_by_label(label).fill(wrong)
        page.get_by_role("button", name="Sampling settings").click()  # it opens where an error is
        generate(page)
        expect(page.get_by_text(problem)).to_be_visible()
        assert problem_of(page, label) == problem
        page.get_by_label(label).fill(right)
    assert outputs(page) == answers

    def reject(request):
        raise QueueFullError("The queue is full.", 3)

    monkeypatch.setattr(served.scheduler, "submit", reject)
    generate(page)
    expect(page.get_by_role("alert")).to_have_text(["The queue is full."] * 3)
    expect(page.locator("[aria-invalid]")).to_have_count(0)


@pytest.mark.slow
def test_link_shows_the_same(visit, context, served):
    """Without generating by itself; what is wrong in an address is named and not used."""
    page = visit()
    open_settings(page)
    page.get_by_label("Temperature").fill("1.5")
    page.get_by_label("Max new tokens").fill("7")
    page.get_by_label("Stop sequences").fill("\\n\n#")
    prompt_of(page).fill(HOSTILE)
    generate(page)
    wait_for_outputs(page)
    expect(page).to_have_url(re.compile(r"tab=write&prompt=.*&adapter=verse&adapter=noir&.*seed=\d"))
    other = visit(page.url.removeprefix(served.url))
    expect(prompt_of(other)).to_have_value(HOSTILE)
    expect(other.locator(".answers")).to_have_count(0)
    generate(other)
    wait_for_outputs(other)
    assert outputs(other) == outputs(page)
    wrong = visit("/?tab=write&adapter=noir&adapter=gone&temperature=11&seed=%3Cb%3E&top_k=3&greedy=true&x=1")
    expect(wrong.get_by_text("Not used of this address:")).to_have_text(
        re.compile("adapter gone: not in the library; Temperature: .*10.*; Seed: .*valid integer")
    )
    expect(wrong.get_by_text("noir", exact=True)).to_be_visible()
    wrong.get_by_role("button", name="Sampling settings").click()
    expect(wrong.get_by_label("Temperature")).to_have_value("0.8")
    expect(wrong.get_by_label("Temperature")).to_be_disabled()
    for opened in (other, wrong):  # a page holds two of the six connections that a browser has
        opened.close()
    bare = visit("/?tab=write")
    expect(bare.get_by_role("tabpanel").get_by_text("noir", exact=True)).to_be_visible()  # among the newest
    none = visit("/?tab=write&adapter=")
    generate(none)
    wait_for_outputs(none)
    assert list(outputs(none)) == ["gpt2"]
    page.get_by_role("tab", name="Gains").click()
    expect(page).to_have_url(re.compile("tab=gains$"))
    page.get_by_role("tab", name="Write").click()
    expect(page).to_have_url(re.compile("temperature=1.5"))


@pytest.mark.slow
def test_answers_are_copied_and_regenerated(visit):
    page = visit()
    open_settings(page)
    page.get_by_label("Max new tokens").fill("7")
    page.get_by_label("Seed").fill("3")
    expect(page.get_by_role("button", name="Regenerate")).to_be_disabled()
    generate(page)
    wait_for_outputs(page)
    first = outputs(page)
    page.evaluate("navigator.clipboard.writeText = async text => { window.copied = text; }")
    page.get_by_role("button", name="Copy the text of noir").click()
    expect(page.get_by_role("button", name="Copy the text of noir")).to_have_text("Copied")
    assert printable(page.evaluate("window.copied")) == first["noir"]
    page.evaluate(  # as a page has it over plain http from another machine
        """() => { Object.defineProperty(navigator, "clipboard", {value: undefined});
            document.addEventListener("copy", () => { window.copied = document.activeElement.value; }); }"""
    )
    page.get_by_role("button", name="Copy the text of gpt2").click()
    expect(page.get_by_role("button", name="Copy the text of gpt2")).to_have_text("Copied")
    assert printable(page.evaluate("window.copied")) == first["gpt2"]
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".note:visible")).not_to_contain_text("Seed 3:")
    wait_for_outputs(page)
    assert outputs(page) != first
    expect(page.get_by_label("Seed")).to_have_value("")


@pytest.mark.slow
def test_earlier_prompts_are_kept(visit):
    page = visit()
    set_greedy(page, 2)
    for prompt in ("the first", "<b>two</b>\nlines"):
        prompt_of(page).fill(prompt)
        generate(page)
        wait_for_outputs(page)
    with waiting_for_events(page):
        page.reload()
    choose(page, "Earlier prompts", "<b>two</b> lines")
    expect(prompt_of(page)).to_have_value("<b>two</b>\nlines")
    page.get_by_role("button", name="Forget earlier prompts").click()
    expect(page.get_by_label("Earlier prompts")).to_have_count(0)
    with waiting_for_events(page):
        page.reload()
    expect(page.get_by_label("Earlier prompts")).to_have_count(0)


def test_newest_adapters_are_chosen(served):
    from lora_tuner.server.playground.page import Page  # gradio takes seconds to import

    names = Page(served.service, Metrics(served.service)).write.usable_names()
    assert names == ["verse", "noir", "xss"], "one without a date is the last"


@pytest.mark.slow
def test_lost_server_is_said(browser, served):
    page = new_page(browser, base_url=served.url)
    with waiting_for_events(page):
        page.goto("/")
    with served.held_steps() as release:
        release(5)
        generate(page)
        expect(page.locator("[aria-busy=true] .writing .facts").first).to_have_text(re.compile("[1-9] tokens"))
        expect(page.get_by_role("button", name="Stop")).to_be_enabled()
        page.context.set_offline(True)
        expect(page.get_by_role("alert").filter(has_text="The server does not answer.")).to_be_visible()
        expect(page.locator("[aria-busy=true]")).to_have_count(0)
        expect(page.get_by_role("button", name="Stop")).to_be_disabled()
        expect(page.locator(".answers article")).to_have_count(3)
        page.context.set_offline(False)
        expect(page.get_by_text("The server is back.")).to_be_visible()
        page.close()


@pytest.mark.slow
def test_stop_or_leave_cancels_generation(visit, served):
    page = visit()
    with served.held_steps(pause=0.05):  # like a large model
        for leave in (lambda: page.get_by_role("button", name="Stop").click(), page.close):
            generate(page)
            expect(page.get_by_role("button", name="Stop")).to_be_enabled()
            expect(page.locator("[aria-busy=true] .writing .facts").first).to_have_text(
                re.compile("[1-9]\\d* tokens")
            )
            assert not served.scheduler.idle
            leave()
            served.wait(lambda: served.scheduler.idle)
            if not page.is_closed():
                wait_for_outputs(page)
                expect(page.get_by_role("button", name="Stop")).to_be_disabled()
                assert int(page.locator(".facts").first.inner_text().split()[0]) < 120
        served.wait(lambda: served.app.state.metrics.streams == 0)


def test_auto_writes_with_one_model(served):
    from lora_tuner.server.playground.page import Page  # gradio takes seconds to import

    page = Page(served.service, Metrics(served.service))
    assert page.write.choices() == [*page.write.usable_names(), "auto"]
    settings = (2, 0.8, 0.95, 50, 0.0, 1.0, 0.0, 0.0, "", "", True)

    async def last():
        return [update async for update in page.write.generate(PROMPT, ["auto"], False, False, *settings)][-1]

    shown = str(run_async(last())[0])
    (chosen,) = re.findall("auto: (noir|verse|the base),", shown)
    headings = re.findall("<h2>(.*?)</h2>", shown)
    assert headings == ["gpt2", *([] if chosen == "the base" else [chosen])]


def test_token_probabilities_equal_api(served):
    from lora_tuner.server.playground.page import Page  # gradio takes seconds to import

    page = Page(served.service, Metrics(served.service))
    settings = (12, 0.8, 0.95, 50, 0.0, 1.0, 0.0, 0.0, "", "", True)

    async def last():
        return [update async for update in page.write.generate(PROMPT, ["noir"], False, True, *settings)][-1]

    articles = re.findall("<article.*?</article>", str(run_async(last())[0]), re.S)
    for model, article in zip(("gpt2", "noir"), articles, strict=True):
        body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "logprobs": 1}
        (choice,) = served.post("/v1/completions", **body).json()["choices"]
        spans, listed = token_probabilities(article)
        assert "".join(text for _, text in spans) == choice["text"]
        logprobs = choice["logprobs"]
        tokens = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
        expected = [format_token({"token": token, "logprob": logprob}) for token, logprob in tokens]
        assert [chosen for chosen, _ in listed] == expected
