"""A redacted copy has the same rows, is read in the same way, and replaces no other file."""

import datetime
import json

import pytest

from lora_tuner.analysis.redact import check_target, redact
from lora_tuner.config import TrainConfig
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.readers import read_file
from lora_tuner.errors import ConfigError, DataError

from ..data.test_workbooks import database, workbook
from ..data_files import jsonl

ROWS = [{"body": f"the story number {n} works", "label": n % 2, "note": f"n{n}@example.com"} for n in range(12)]


@pytest.fixture
def copy(tmp_path):
    """Write files, redact them, and return the rows of the copy."""

    def call(name, content, out="out.jsonl", **settings):
        path = tmp_path / name
        if content is not None:
            path.write_text(content, encoding="utf-8", newline="")
        config = TrainConfig.model_validate({"dataset": str(path)} | settings)
        target = check_target(tmp_path / out, config, overwrite=False)
        call.result = redact(config, target)
        return [dict(row) for row in read_file(target).rows]

    return call


def test_copy_keeps_rows_columns_and_order(copy):
    invalid, repeated = {"body": ["x"], "label": 1, "note": None}, ROWS[3]
    rows = copy("rows.jsonl", jsonl([*ROWS, invalid, repeated]), text_column="body")
    assert [row["body"] for row in rows] == [*(row["body"] for row in ROWS), ["x"], ROWS[3]["body"]]
    assert [row.get("note") for row in rows] == [*["[EMAIL]"] * 12, None, "[EMAIL]"]
    assert copy.result.rows == 14
    assert (copy.result.changed_rows, copy.result.replaced) == (13, {"email": 13})


def test_nested_texts_and_names_are_redacted(copy):
    messages = [
        {"role": "user", "content": "I am ann@example.com"},
        {"role": "assistant", "content": "ok", "tool_calls": [{"password": "tR7$kkP02q", "n": 1.50}]},
    ]
    rows = copy("chat.jsonl", jsonl([{"messages": messages, "by": {"a@b.co": 1, "c@d.co": 2}}] * 3))
    assert rows[0] == {
        "messages": [
            {"role": "user", "content": "I am [EMAIL]"},
            {"role": "assistant", "content": "ok", "tool_calls": [{"password": "[KEY]", "n": "1.5"}]},
        ],
        "by": {"[EMAIL]": "1", "[EMAIL]'": "2"},
    }
    assert copy.result.keys == {"password or key": 3}


def test_numbers_stay_as_written(copy, tmp_path):
    copy("rows.jsonl", '{"text": "a b", "x": 1.50, "y": 12345678901234567890}\n{"text": "c \\ud800", "x": 1e3}\n')
    assert (tmp_path / "out.jsonl").read_text() == (
        '{"text": "a b", "x": 1.50, "y": 12345678901234567890}\n{"text": "c \\ud800", "x": 1e3}\n'
    )


@pytest.mark.parametrize("out", ["out.csv", "out.tsv", "out.jsonl", "out.json", "out.parquet"])
def test_training_reads_copy_alike(copy, tmp_path, out):
    lines = [f'"the story, number {n},\nis by a{n}@b.de",{n % 2}' for n in range(12)]
    copy("rows.csv", "text,label\n" + "\n".join(lines) + "\n", out)
    before, after = (load_dataset(TrainConfig(dataset=str(tmp_path / name))) for name in ("rows.csv", out))
    expected = sorted(f"the story, number {n}, is by [EMAIL]" for n in range(12))
    assert sorted(after.train + after.held_out) == expected
    assert (after.layout, after.clean, after.counts.read) == (before.layout, before.clean, before.counts.read)


@pytest.mark.parametrize("gap", ["\n", "\n\n"])
def test_txt_copy_keeps_its_rows(copy, gap):
    texts = ["one a@b.de", "two", "three" if gap == "\n" else "three\nlines"]
    rows = copy("rows.txt", gap.join(texts), "out.txt")
    assert [row["text"] for row in rows] == ["one [EMAIL]", *texts[1:]]


def test_folder_becomes_one_file(copy, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.csv").write_text("text,label\nby a@b.de,1\ntwo,2\n")
    (folder / "b.jsonl").write_text('{"text": "three"}\n')
    assert [row["text"] for row in copy("folder", None)] == ["by [EMAIL]", "two", "three"]
    (folder / "c.csv").write_text("content,label\nfour,1\n")
    with pytest.raises(DataError, match=r"is read as column 'text' and .*c\.csv as column 'content'"):
        copy("folder", None, "other.jsonl")


@pytest.mark.parametrize("out", ["out.jsonl", "out.csv", "out.parquet"])
def test_dates_and_infinities_are_copied(copy, tmp_path, out):
    lines = [["body", "day", "stars"]]
    lines += [[f"by a{n}@b.de, number {n}", datetime.date(2020, 1, n + 1), n + 0.5] for n in range(9)]
    (tmp_path / "rows.xlsx").write_bytes(workbook(a=lines))
    rows = copy("rows.xlsx", None, out, text_column="body")
    assert [str(row["day"]) for row in rows] == [f"2020-01-0{n + 1}" for n in range(9)]
    assert [str(row["stars"]) for row in rows] == [f"{n}.5" for n in range(9)]
    if out == "out.parquet":  # a column of it has one type
        return
    database(tmp_path / "rows.db", "CREATE TABLE t (body, n); INSERT INTO t VALUES ('one', 9e999), ('two', 1.5)")
    assert [str(row["n"]) for row in copy("rows.db", None, f"db-{out}", text_column="body")] == ["Inf", "1.5"]


def test_refused_copy_names_no_temporary_file(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_tuner.analysis.redact._json", lambda row: "{")
    with pytest.raises(
        DataError, match=r"be written as \.jsonl: the copy cannot be read: line 1 is not"
    ) as refused:
        copy("rows.jsonl", jsonl(ROWS), text_column="body")
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "out", "reason"),
    [
        (
            jsonl([{"messages": [{"role": "user", "content": "a"}]}] * 3),
            "out.csv",
            "column 'messages' holds a list",
        ),
        (jsonl(ROWS), "out.txt", "it holds texts alone, and the columns are body, label, note"),
        (jsonl([{"text": "a\n\nb"}, {"text": "c"}]), "out.txt", "of 2 rows 3 would be read"),
        (jsonl([{"text": " a"}, {"text": "c", "n": [1, {"a": 2}]}]), "out.parquet", "."),
    ],
)
def test_rows_that_do_not_fit_are_refused(copy, tmp_path, content, out, reason):
    with pytest.raises(DataError, match=r"Use --redact out.jsonl\.") as refused:
        copy("rows.jsonl", content, out, text_column="body" if "body" in content else None)
    assert reason in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_existing_file_and_data_are_kept(copy, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    refused = {
        "out.jsonl": "exists",
        "rows.csv": "in the data itself",
        "out.xml": "ends in",
        "folder.csv": "is a folder",
    }
    for out, reason in refused.items():
        with pytest.raises(ConfigError, match=reason):
            copy("rows.csv", "text\na\nb\nc\n", out)
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    config = TrainConfig(dataset=str(tmp_path / "rows.csv"))
    assert redact(config, check_target(tmp_path / "out.jsonl", config, overwrite=True), overwrite=True).rows == 3


def test_copy_without_extension_is_jsonl(tmp_path):
    config = TrainConfig(dataset="imdb")
    assert check_target(tmp_path / "copy", config, overwrite=False) == tmp_path / "copy.jsonl"


def test_json_objects_stay_valid(copy):
    packed = json.dumps([{"role": "user", "content": 'say "a@b.de"'}, {"role": "assistant", "content": "ok"}])
    rows = copy("rows.csv", 'messages\n"' + packed.replace('"', '""') + '"\n')
    assert json.loads(rows[0]["messages"])[0]["content"] == 'say "[EMAIL]"'


def test_documents_name_their_cleaning(copy, tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.md").write_text("# Title\n\nWritten by a@b.de.\n")
    (folder / "b.md").write_text("# Other\n\nText.\n")
    (folder / "c.md").write_bytes(b"caf\x81")
    rows = copy("notes", None)
    assert [row.get("file") for row in rows] == ["a.md", "b.md", None]
    assert "[EMAIL]" in rows[0]["text"]
    assert copy.result.unreadable == 1
