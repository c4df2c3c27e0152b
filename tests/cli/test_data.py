"""data: the report on the terminal, as JSON and as a page, and the redacted copy."""

import json
import re

import pytest

from lora_tuner.analysis import phones
from lora_tuner.analysis.redact import FORMATS

from ..analysis.conftest import SECRETS, write_dirty
from .test_commands import run


@pytest.fixture
def dirty(tmp_path):
    return write_dirty(tmp_path / "dirty.csv")


def data(gpt2, *arguments, exit_code=0):
    return run("data", *arguments, "--base", gpt2, "--loss-rows", 4, "--device", "cpu", exit_code=exit_code)


def test_data_shows_report_and_writes_page(dirty, gpt2, tmp_path):
    shown = data(gpt2, "dirty.csv", "--clean", "none").stdout
    assert shown.startswith("dirty.csv: column 'text' (--clean none)\n60 read, 1 empty, 1 duplicate, ")
    for heading in (
        "lengths in tokens",
        "near duplicates",
        "languages",
        "personal data and keys",
        "encoding",
        "loss of",
    ):
        assert f"\n{heading}" in shown
    assert re.search(r"\n  dirty\.csv line \d+ copies dirty\.csv line \d+: ", shown)
    assert shown.endswith("\npage: dirty.data.html\n")
    page = (tmp_path / "dirty.data.html").read_text(encoding="utf-8")
    for secret, masked in SECRETS.values():
        assert secret not in shown + page
        assert masked in shown
        assert masked in page
    assert "\x1b" not in shown
    assert "\u202e" not in shown


def test_data_json_needs_no_page(dirty, gpt2, tmp_path):
    facts = json.loads(data(gpt2, "dirty.csv", "--json").stdout)
    assert facts["counts"]["read"] == 60
    assert facts["losses"]["rows"] == 4
    assert facts["dropped"][0]["place"].startswith("dirty.csv line ")
    assert {kind["kind"]: kind["rows"] for kind in facts["personal_data"]} == dict.fromkeys(SECRETS, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["dirty.csv"]


def test_data_reads_settings_of_run(dirty, gpt2, tmp_path):
    """The base of the file counts tokens; its loss is measured for --base alone. Options override the file."""
    (tmp_path / "run.yaml").write_text(f"dataset: dirty.csv\nbase: {gpt2}\nmax_length: 16\nepochs: 2\n")
    facts = json.loads(run("data", "--config", "run.yaml", "--json").stdout)
    assert (facts["dataset"], facts["counts"]["read"], facts["losses"]) == ("dirty.csv", 60, None)
    assert (facts["lengths"]["unit"], facts["lengths"]["max_length"]) == ("tokens", 16)
    facts = json.loads(run("data", "--config", "run.yaml", "--max-length", 32, "--json").stdout)
    assert facts["lengths"]["max_length"] == 32
    assert "Error: No dataset is named: give one, or --config" in run("data", exit_code=1).stderr


def test_data_page_replaces_reports_only(dirty, gpt2, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("mine")
    refused = data(gpt2, "dirty.csv", "--html", page, exit_code=1)
    assert (
        "page.html exists and is no report: choose another name with --html, or use --overwrite."
        in refused.stderr
    )
    assert page.read_text() == "mine"
    data(gpt2, "dirty.csv", "--html", page, "--overwrite")
    first = page.read_text(encoding="utf-8")
    data(gpt2, "dirty.csv", "--html", page, "--max-rows", 20)
    assert page.read_text(encoding="utf-8") != first


def test_region_without_library_is_refused(dirty, gpt2, monkeypatch):
    monkeypatch.setattr(phones, "_phonenumbers", lambda: None)
    refused = run("data", "dirty.csv", "--region", "DE", exit_code=1)
    assert "--region needs the package phonenumbers: pip install 'lora_tuner[report]'" in refused.stderr
    shown = data(gpt2, "dirty.csv", "--redact", "copy.csv").stdout
    assert "This is not complete: names, addresses, phone numbers and what is written" in shown


def test_help_lists_types_of_redacted_copy():
    shown = run("data", "--help").stdout
    assert all(extension in shown for extension in FORMATS)


def test_data_redacts_to_new_file(dirty, gpt2, tmp_path):
    shown = data(gpt2, "dirty.csv", "--redact", "copy.csv").stdout
    assert (
        "copy.csv: 60 rows; replaced 1 email, 1 phone, 1 card, 1 iban, 1 key, in 1 row (1 GitHub token)" in shown
    )
    assert "This is not complete" in shown
    copy = (tmp_path / "copy.csv").read_text(encoding="utf-8")
    assert "I am [EMAIL]; [PHONE]; [CARD]; [IBAN]; [KEY]." in copy
    refused = data(gpt2, "dirty.csv", "--redact", "copy.csv", exit_code=1)
    assert "copy.csv exists: choose another name, or use --overwrite." in refused.stderr
    written = ("--redact", "again.jsonl", "--html", "page.html")
    facts = json.loads(data(gpt2, "copy.csv", "--json", *written).stdout)
    assert facts["page"] == "page.html"
    assert facts["redacted"] | {"path": ""} == facts["redacted"] | {"rows": 60, "replaced": {}, "path": ""}
    assert not any(kind["rows"] for kind in facts["personal_data"])


def test_data_reads_several_datasets(dirty, gpt2, tmp_path):
    (tmp_path / "more.jsonl").write_text("".join(f'{{"text": "by b{n}@b.de number {n}"}}\n' for n in range(9)))
    shown = data(gpt2, "dirty.csv", "more.jsonl", "--redact", "copy.jsonl").stdout
    assert "  more.jsonl: 9 read, " in shown
    assert "row 1 of more.jsonl b***@***.de" in " ".join(shown.split())
    assert len((tmp_path / "copy.jsonl").read_text().splitlines()) == 69


def test_labels_with_comma_are_given_in_quotes(gpt2, tmp_path):
    labels = ["Berlin, Mitte", "Bonn", "Rome"]
    rows = [{"text": f"row {n} of {labels[n % 3]}", "label": labels[n % 3]} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--label-column", "label", "--labels", '"Berlin, Mitte",Bonn', "--labels", "Rome")
    shown = data(gpt2, "rows.jsonl", *options).stdout
    assert "Berlin, Mitte 10" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dirty.csv", "--device", "cpu"], "--device is for the loss of a base: give --base, or leave it out."),
        (["dirty.csv", "--loss-rows", 5], "--loss-rows is for the loss of a base: give --base, or leave it out."),
        (["dirty.csv", "--region", "XY"], "--region XY is unknown: give two letters such as DE, GB or US."),
        (["missing.csv"], "There is no dataset 'missing.csv'"),
        (["dirty.csv", "--html", "no/such/../"], "The page cannot be written"),
    ],
)
def test_data_refuses_in_one_line(dirty, arguments, message):
    refused = run("data", *arguments, exit_code=1)
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
