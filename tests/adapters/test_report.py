"""report.json: kept for the weights that it was measured on, handed on, and told in the model card."""

import json

import pytest

from lora_tuner.adapters import hub_sync, model_card
from lora_tuner.adapters.adapter import load_adapter_folder, verify_adapter
from lora_tuner.adapters.archive import open_public_files
from lora_tuner.adapters.library import Library
from lora_tuner.adapters.manifest import EvalResult
from lora_tuner.adapters.report import (
    CARD_HEADING,
    REPORT_FILE,
    AdapterReport,
    ForgettingFigures,
    StyleFigures,
    card_section,
    update_card,
)
from lora_tuner.errors import AdapterError

from .. import adapter_files

CREATED = "2026-01-02T03:04:05+00:00"
GAIN = {"rows": 3, "tokens": 9, "loss": 3.0, "base_loss": 3.5, "gain": 0.5, "standard_error": 0.1}
SIDE = {"continued": 9, "verbatim": 1, "longest": 4, "measured": 9, "gain": 0.1, "gain_error": 0.02}
MEMORIZATION = dict.fromkeys(("verbatim_p", "excess_error", "excess_p", "groups", "unequal")) | {
    "sentences": ["It knows no row."],
    "verbatim_tokens": 16,
    "training": SIDE,
    "unseen": SIDE,
    "excess": 0.0,
    "memorized": 0,
}


@pytest.fixture
def folder(tmp_path):
    return adapter_files.write(tmp_path / "adapters" / "imdb", facts=adapter_files.manifest())


def write_report(folder, **changes):
    weights = load_adapter_folder(folder).sha256
    facts = {"created": CREATED, "weights": weights} | changes
    (folder / REPORT_FILE).write_text(json.dumps(facts))
    return load_adapter_folder(folder)


def told(*sentences):
    """A report of one part, whose other figures do not matter here."""
    style = StyleFigures.model_construct(sentences=[*sentences])
    return AdapterReport.model_construct(created=CREATED, weights="0" * 64, style=style)


def test_report_is_of_its_weights(folder):
    assert load_adapter_folder(folder).report is None
    assert write_report(folder).report == AdapterReport(
        created=CREATED, weights=load_adapter_folder(folder).sha256
    )
    assert write_report(folder, weights="0" * 64).report is None


def test_old_report_is_read(folder):
    """Of before "near copies" and "memory" were renamed; names of texts stay as they are."""
    forgetting = {"sentences": ["It forgets."], "general": GAIN, "kinds": {"memory": GAIN}}
    memory = MEMORIZATION | {"near_copies": 3, "near_copies_verbatim": 2}
    report = write_report(folder, memory=memory, forgetting=forgetting).report
    assert (report.memorization.near_duplicates, report.memorization.near_duplicates_verbatim) == (3, 2)
    assert report.forgetting.kinds.keys() == {"memory"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"weights": "x"}, "weights String should match pattern"),
        ({"style": {"sentences": []}}, "style"),
        ({"advice": "none"}, "advice Extra inputs are not permitted"),
        ({"growth": {"sentences": ["x" * 2_000]}}, "growth"),
    ],
)
def test_damaged_report_is_named(folder, changes, problem):
    adapter = write_report(folder, **changes)
    with pytest.raises(AdapterError) as error:
        adapter.report  # noqa: B018
    assert str(error.value).startswith(f"{folder / REPORT_FILE} is no report: {problem}")
    assert verify_adapter(adapter)[-1] == str(error.value).rstrip(".")


def test_report_is_handed_on(folder):
    adapter = write_report(folder)
    assert REPORT_FILE in hub_sync.SYNCED_FILES
    files = open_public_files(adapter)
    assert f"imdb/{REPORT_FILE}" in [name for name, _ in files]
    for _, file in files:
        file.close()
    renamed = Library(folder.parent).rename("imdb", "films")
    assert renamed.report is not None


def test_card_tells_what_was_learned():
    section = card_section(
        told("62% of the way\x1b from <b>the base</b> to you.", "It was told apart (p 0.001).")
    )
    assert section.startswith(f"\n{CARD_HEADING}\n\n")
    assert (
        "\n- Style: 62% of the way\ufffd from &lt;b>the base&lt;/b> to you. It was told apart (p 0.001).\n"
        in section
    )
    assert (
        card_section(None) == card_section(AdapterReport.model_construct(created=CREATED, weights="0" * 64)) == ""
    )


def test_card_keeps_own_words(folder):
    card = model_card.model_card(load_adapter_folder(folder), "imdb")
    card = card.replace("# license: apache-2.0", "license: mine")
    first = update_card(card, told("One."))
    assert first.index("- Style: One.") < first.index("## Limitations")
    second = update_card(first, told("Two."))
    assert second == first.replace("- Style: One.", "- Style: Two.")
    assert update_card(second, AdapterReport(created=CREATED, weights="0" * 64)) == card
    own = update_card("# mine\n\nMy words.\n", told("One."))
    assert own.startswith("# mine\n\nMy words.\n")
    assert own.endswith("- Style: One.\n")


def test_card_no_longer_denies_what_is_measured(folder):
    card = model_card.model_card(load_adapter_folder(folder), "imdb")
    general = EvalResult(base_loss=3.0, loss=3.1, gain=-0.1, standard_error=0.01, rows=320, tokens=9_000)
    forgetting = ForgettingFigures(sentences=["It has forgotten some."], general=general, kinds={})
    assert "other text was not measured" in card
    updated = update_card(card, AdapterReport(created=CREATED, weights="0" * 64, forgetting=forgetting))
    assert "other text was not measured" not in updated
    assert "on general text its loss changed by +0.100 ± 0.010 nats per token." in updated


def test_parts_have_an_order():
    report = AdapterReport.model_construct(
        created=CREATED,
        weights="0" * 64,
        forgetting=ForgettingFigures.model_construct(sentences=["B."]),
        style=StyleFigures.model_construct(sentences=["A."]),
    )
    assert [name for name, _ in report.parts()] == ["style", "forgetting"]
