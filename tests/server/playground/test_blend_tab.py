"""The tab Blend in a real browser."""

import pytest
from playwright.sync_api import expect

from lora_tuner import SamplingParams
from lora_tuner.inference.multi_lora import blend_loaded
from lora_tuner.inference.sequence import Sequence

from .browser import PROMPT, open_tab, outputs, printable, prompt_of, wait_for_outputs, watch_text


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
