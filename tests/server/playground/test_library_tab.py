"""The tab Library in a real browser."""

import contextlib
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
from playwright.sync_api import expect
from safetensors.numpy import load_file

from lora_tuner.adapters import adapter
from lora_tuner.adapters.library import Library

from ... import adapter_files
from .browser import choose, open_tab, run_async, wait_for_outputs


def test_library_shows_adapters_and_cards(page, adapters, tmp_path):
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
    expect(card.get_by_role("heading", level=2)).to_have_text("noir")
    expect(card).to_contain_text(f"{noir.result.loss:.3f} (base: {noir.result.base_loss:.3f})")
    expect(card.get_by_role("img", name="Loss by training step")).to_be_visible()
    spectrum = page.get_by_role("img", name="Spectrum: share of")
    assert spectrum.evaluate("image => image.naturalWidth") == 960
    card.get_by_text("Model card").click()
    assert card.locator("pre").text_content() == (adapters / "noir" / adapter.CARD_FILE).read_text()
    with page.expect_download() as download:
        card.get_by_role("link", name="Download as zip").click()
    assert download.value.suggested_filename == "noir.zip"
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extractall(tmp_path)
    assert adapter.verify_adapter(adapter.load_adapter_folder(tmp_path / "noir")) == []
    page.get_by_role("button", name="broken").click()
    expect(page.get_by_role("alert")).to_contain_text("broken cannot be used.")


@pytest.mark.slow
def test_table_is_sorted_and_filtered(visit, adapters):
    page = visit()
    open_tab(page, "Library")
    names = page.locator("tbody tr:visible th")
    expect(names).to_have_text(["broken", "noir", "verse", "xss"])
    header = page.get_by_role("columnheader", name="gain")
    expect(header).to_have_attribute("aria-sort", "none")
    header.get_by_role("button").click()
    expect(header).to_have_attribute("aria-sort", "ascending")
    gains = {
        name: adapter.load_adapter_folder(adapters / name).manifest.result.gain for name in ("noir", "verse")
    }
    rising = sorted([*gains, "xss"], key=lambda name: gains.get(name, gains["noir"]))
    expect(names).to_have_text([*rising, "broken"])
    header.get_by_role("button").press("Enter")
    expect(header).to_have_attribute("aria-sort", "descending")
    expect(names).to_have_text([*sorted(rising, key=lambda name: -gains.get(name, gains["noir"])), "broken"])
    page.get_by_label("Filter by name, data or base").fill("NOIR.json")  # its data
    expect(names).to_have_text(["noir"])
    expect(page.get_by_role("status").filter(has_text="1 of 4")).to_be_visible()
    page.get_by_role("button", name="Refresh").click()
    page.get_by_label("Filter by name, data or base").fill("")
    expect(names).to_have_count(4)


@pytest.mark.slow
def test_library_changes_appear(visit, adapters):
    page = visit()
    (adapters / "later").symlink_to(adapters / "noir")
    try:
        open_tab(page, "Library")
        page.get_by_role("button", name="later").wait_for()
        open_tab(page, "Blend")
        choose(page, "Left adapter", "later")
        expect(page.locator(".answers h2:visible").nth(1)).to_have_text(re.compile("^0.5 later"))
        wait_for_outputs(page)
    finally:
        (adapters / "later").unlink()
    page.get_by_role("combobox", name="Right adapter").press("Tab")
    page.locator("input[type=range]:visible").press("ArrowRight")
    expect(page.get_by_role("alert").first).to_contain_text("There is no model 'later'")
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
        expect(card.locator(".note")).to_have_text("No loss curve: this adapter was not trained by lora_tuner.")
        expect(
            page.get_by_text(re.compile("^rescaled is a DoRA adapter, .*: merge it instead.$"))
        ).to_be_visible()
        assert card.locator("img").count() == 0
        assert card.locator("pre").text_content() == "This adapter has no model card."
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_adapter_is_uploaded_renamed_removed(visit, served, adapters, tmp_path):
    (tmp_path / "mine.zip").write_bytes(served.get("/downloads/adapters/noir.zip").content)
    page = visit()
    open_tab(page, "Library")
    page.get_by_role("button", name="Upload an adapter").click()
    page.get_by_label("Files of an adapter").set_input_files(tmp_path / "mine.zip")
    expect(page.get_by_text("Uploaded: mine.zip.")).to_be_visible()
    page.get_by_role("button", name="Add to the library").click()
    expect(page.get_by_text("mine is in the library.")).to_be_visible()
    page.get_by_role("button", name="mine", exact=True).click()
    card = page.locator(".card")
    expect(card.get_by_role("heading", level=2)).to_have_text("mine")
    page.get_by_role("button", name="Verify").click()
    expect(page.get_by_text("mine is intact")).to_be_visible()
    page.get_by_role("button", name=re.compile("^Rename")).first.click()
    page.get_by_label("New name").fill("noir")
    page.get_by_label("New name").press("Enter")
    expect(page.get_by_role("alert")).to_have_text("There is an adapter noir: choose another name.")
    page.get_by_label("New name").fill("ours")
    page.get_by_label("New name").press("Enter")
    expect(card.get_by_role("heading", level=2)).to_have_text("ours")
    expect(page.get_by_role("button", name="ours", exact=True)).to_be_visible()
    page.get_by_role("button", name=re.compile("^Remove")).first.click()
    page.get_by_role("button", name="Remove ...").click()
    expect(page.get_by_text("This deletes ours for ever")).to_be_visible()
    page.get_by_role("button", name="Remove for ever").click()
    expect(page.get_by_text("ours was removed.")).to_be_visible()
    expect(page.get_by_role("button", name="ours", exact=True)).to_have_count(0)
    expect(page.get_by_role("img", name="Spectrum: share of")).to_have_count(0)
    assert not (adapters / "ours").exists()


def test_unreadable_library_is_named(tmp_path, served, monkeypatch):
    """A file in place of the folder: the tab says so, and the page stays."""
    from lora_tuner.server.playground.library_tab import LibraryTab, ShownAdapter

    (tmp_path / "adapters").write_text("no folder")
    library = Library(tmp_path / "adapters")
    monkeypatch.setattr(served.service.generator, "library", library)
    tab = LibraryTab(served.service, None)
    assert "adapters is not a folder" in run_async(tab.library())

    async def first(updates):
        async with contextlib.aclosing(updates):
            return await anext(updates)

    card, *_ = run_async(first(tab.show(shown := ShownAdapter("noir"), "noir")))
    assert shown.name == ""
    assert "adapters is not a folder" in card


def test_late_spectrum_replaces_no_other(served):
    """An event that ends after the next one has begun leaves what that one shows."""
    from lora_tuner.server.playground.library_tab import LibraryTab, ShownAdapter

    tab, shown = LibraryTab(served.service, None), ShownAdapter()

    async def click_twice():
        first, second = tab.show(shown, "noir"), tab.show(shown, "verse")
        async with contextlib.aclosing(first), contextlib.aclosing(second):
            await anext(first)
            await anext(second)
            return [update async for update in first], [update async for update in second]

    late, last = run_async(click_twice())
    assert late == []
    assert "Spectrum" in str(last[0][-1])
    assert shown.name == "verse"
