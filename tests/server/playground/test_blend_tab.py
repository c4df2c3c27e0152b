"""The tab Blend in a real browser."""

import re
import shutil

import pytest
from playwright.sync_api import expect

from lora_tuner import SamplingParams
from lora_tuner.adapters.adapter import load_adapter_folder
from lora_tuner.config import ServerConfig
from lora_tuner.inference.multi_lora import blend_loaded
from lora_tuner.inference.sequence import Sequence
from lora_tuner.server.metrics import Metrics
from lora_tuner.text import format_gain

from .browser import (
    PROMPT,
    choose,
    open_tab,
    outputs,
    printable,
    prompt_of,
    run_async,
    wait_for_outputs,
    watch_text,
)


def blend_sampling():
    from lora_tuner.server.playground.blend_tab import BLEND_TOKENS  # with Gradio, which takes seconds to import

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


@pytest.mark.slow
def test_blend_follows_slider(visit, generator, served, caplog):
    page = visit()
    open_tab(page, "Blend")
    expect(page.get_by_role("combobox", name="Left adapter")).to_have_value("verse")  # the newest
    choose(page, "Right adapter", "xss")
    choose(page, "Left adapter", "noir")
    choose(page, "Right adapter", "verse")
    prompt_of(page).fill(PROMPT)
    slider = page.locator("input[type=range]:visible")
    alone = {name: blend_text(generator, PROMPT, (name, 1.0)) for name in ("noir", "verse")}
    for key, share in (("Home", 0.0), ("ArrowRight", 0.05), ("End", 1.0), ("ArrowLeft", 0.95)):
        slider.press(key)
        title = f"{round(1 - share, 2):g} noir + {share:g} verse"
        expect(page.locator(".answers h2:visible")).to_have_text(["noir", title, "verse"])
        wait_for_outputs(page)
        text = blend_text(generator, PROMPT, ("noir", 1 - share), ("verse", share))
        assert outputs(page) == {"noir": alone["noir"], title: text, "verse": alone["verse"]}
    expect(page.locator(".ends")).to_have_text("← noirverse →")
    expect(slider).to_have_accessible_name(re.compile("Weight of the right adapter"))
    assert alone["noir"] != alone["verse"]
    # During generation the slider moves on: outputs keep appearing, and the last one fits its position.
    watch_text(page)
    with served.held_steps(pause=0.02):
        for _ in range(12):
            slider.press("ArrowLeft")
            page.wait_for_timeout(60)
        title = "0.65 noir + 0.35 verse"
        expect(page.locator(".answers h2:visible")).to_have_text(["noir", title, "verse"])
        wait_for_outputs(page)
    assert outputs(page)[title] == blend_text(generator, PROMPT, ("noir", 0.65), ("verse", 0.35))
    assert len(set(page.evaluate("window.seen"))) > 4
    served.wait(lambda: served.scheduler.idle)
    expect(page.locator("input[type=number]:visible")).to_have_count(0)  # a typed number could be out of bounds
    expect(page).to_have_url(re.compile(r"tab=blend&prompt=.*&left=noir&right=verse&weight=0\.35$"))
    choose(page, "Right adapter", "noir")
    expect(page.get_by_text("Choose another one than on the left")).to_be_visible()
    assert len(outputs(page)) == 3, "what was written stays"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def last_update(updates):
    """Return the last update of a generator."""

    async def last():
        return [update async for update in updates][-1]

    return run_async(last())


@pytest.fixture
def blend_tab(served):
    from lora_tuner.server.playground.page import Page  # gradio takes seconds to import

    return Page(served.service, Metrics(served.service)).blend


@pytest.mark.slow
def test_blend_is_saved_as_command_saves(blend_tab, adapters):
    """With its gain on the held-out rows of both; then it can be chosen."""
    try:
        text, _ = last_update(blend_tab.save(" both ", "noir", "verse", 0.25))
        manifest = load_adapter_folder(adapters / "both").manifest
        assert manifest.made_by == "blend noir=0.75 verse=0.25"
        assert (
            f"Gain over {blend_tab.service.name}: {format_gain(manifest.result.gain, manifest.result.standard_error)}"
            in text
        )
        assert re.search("On noir: .* On verse: ", text)
        assert blend_tab.usable_names()[0] == "both"
    finally:
        shutil.rmtree(adapters / "both")


def test_refused_blend_says_why_at_name(blend_tab, adapters, monkeypatch):
    for arguments, problem in (
        ((" ", "noir", "verse", 0.5), "Enter a name"),
        (("noir", "noir", "verse", 0.5), "noir exists: choose another name."),
        (("../both", "noir", "verse", 0.5), "'both' is not a valid adapter name"),
        (("both", "noir", "noir", 0.5), "This is one adapter alone"),
        (("both", "noir", "verse", 1), "This is one adapter alone"),
        (("both", "noir", "gone", 0.5), "gone cannot be used: choose another adapter."),
        (("both", None, "verse", 0.5), "This is one adapter alone"),
    ):
        _, update = last_update(blend_tab.save(*arguments))
        assert update["info"].startswith(problem), update
    monkeypatch.setattr(blend_tab.service, "config", ServerConfig(host="192.0.2.1", api_key="a key of tests"))
    _, update = last_update(blend_tab.save("both", "noir", "verse", 0.5))
    assert "--allow-training" in update["info"]
    assert not (adapters / "both").exists()
