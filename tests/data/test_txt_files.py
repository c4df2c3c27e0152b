"""Txt files as lists of rows and as documents, and line breaks that cleaning removes."""

import pytest

from lora_tuner.config import TrainConfig
from lora_tuner.data.dataset import load_dataset

from .. import tiny_models
from ..data_files import TEXTS, jsonl, rows

POEMS = [f"{text}\nsecond line {number}" for number, text in enumerate(TEXTS)]


def write(folder, texts, ending=".txt"):
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}{ending}").write_text(text)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("verses", [1, 3])
def test_folder_of_documents_has_row_per_file(load, tmp_path, verses, streaming):
    texts = ["\n\n".join(f"{poem} {verse}" for verse in range(verses)) for poem in POEMS]
    write(tmp_path / "notes", texts[:12])
    write(tmp_path / "notes", texts[12:], ".md")
    dataset = load(tmp_path / "notes", streaming=streaming)
    assert dataset.counts.read == 30
    assert set(dataset.train) <= {*texts}
    assert "12 txt files: one row per file, as of documents. Use --txt-rows to change this." in load.notices
    assert load(tmp_path / "notes", txt_rows="line").counts.read > 30


@pytest.mark.parametrize(
    ("count", "text", "expected"),
    [
        (6, "one line\n" * 150, 6 * 150),  # a list
        (3, "a line\nanother\n", 6),  # few files of lines
        (1, "a\n\nb\n\nc\n", 3),  # one file
        (3, "a poem\n\nof verses\n", 3),
    ],
)
def test_lists_of_lines_stay_rows(load, tmp_path, count, text, expected):
    write(tmp_path / "some", [text] * count)
    (tmp_path / "some" / "rows.csv").write_text("text,n\n" + "".join(f"{text},1\n" for text in TEXTS))
    assert load(tmp_path / "some").counts.read == expected + len(TEXTS)


def test_split_files_are_no_documents(load, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    for name in ("train-1.txt", "train-2.txt", "test.txt"):
        (folder / name).write_text("\n\n".join(f"{name} {text}" for text in TEXTS))
    assert load(folder, eval_dataset="held-out").counts.read == 60


def test_large_files_are_collections(load, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_tuner.data.txt_files._MAX_DOCUMENT_BYTES", 100)
    write(tmp_path / "some", ["\n\n".join(TEXTS)] * 2)
    assert load(tmp_path / "some").counts.read == 60


def test_long_documents_are_measured_in_parts(tmp_path):
    texts = ["\n\n".join(tiny_models.reviews(60, seed=number)) for number in range(8)]
    write(tmp_path / "some", texts)
    dataset = load_dataset(TrainConfig(dataset=str(tmp_path / "some")))
    assert dataset.counts.read == 8
    assert len(dataset.held_out) > dataset.counts.held_out


def test_line_breaks_of_template_are_told(load, tmp_path):
    """Be they in one of its columns."""
    records = [{"poem": poem, "title": f"poem {number}"} for number, poem in enumerate(POEMS)]
    load("a.jsonl", jsonl(records), template="{title}: {poem}")
    assert "have line breaks, which become spaces (--clean full)" in load.notices[0]
    load("a.jsonl", template="{title}: {poem}", clean="lines")
    assert load.notices == []


def test_lost_line_breaks_are_told(load, tmp_path):
    told = f"Most rows of {tmp_path / 'a.jsonl'} have line breaks, which become spaces (--clean full). --clean lines keeps "
    told += "them, as in poems."
    load("a.jsonl", jsonl({"text": poem} for poem in POEMS))
    assert load.notices == [told]
    for settings in ({"clean": "lines"}, {"clean": "full"}):
        load("a.jsonl", **settings)
        assert load.notices == []
    load(
        "a.jsonl",
        jsonl({"text": poem if number < 10 else f"one line {number}\n"} for number, poem in enumerate(POEMS)),
    )
    assert load.notices == []
    assert all(
        "\n" in text for text in rows(load("b.jsonl", jsonl({"text": poem} for poem in POEMS), clean="lines"))
    )
