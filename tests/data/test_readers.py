"""Readers of all file types: rows, columns, filters, and errors."""

import csv
import json
import os

import datasets
import pyarrow.parquet
import pytest

from lora_tuner.config import TrainConfig
from lora_tuner.data.dataset import load_dataset
from lora_tuner.errors import DataError

from .. import tiny_models
from ..data_files import TEXTS, jsonl, rows, table

# File types


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", table()),
        ("A.CSV", table()),
        ("a.tsv", table(separator="\t")),
        ("a.json", json.dumps([{"text": text, "label": 1} for text in TEXTS])),
        ("texts.json", json.dumps(TEXTS)),
        ("lines.json", jsonl({"text": text} for text in TEXTS)),
        ("a.jsonl", jsonl({"label": None, "text": text} for text in TEXTS)),
        ("a.txt", "\n".join(TEXTS)),
        ("windows.txt", "\r\n".join(TEXTS) + "\r\n"),
        ("windows.csv", table().replace("\n", "\r\n")),
        ("mark.csv", "\ufeff" + table()),
        ("mark.jsonl", "\ufeff" + jsonl({"text": text} for text in TEXTS)),
        ("mark.txt", "\ufeff" + "\n".join(TEXTS)),
        ("pandas.csv", table(header=("", "text", "label")).replace("\n", "\n0,").removesuffix("0,")),
        ("gaps.csv", table().replace("\n", "\n\n")),
        ("a[1]*?.csv", table()),  # a path, not a glob
        ("a::b%20.jsonl", jsonl({"text": text} for text in TEXTS)),
    ],
)
def test_all_file_types_give_same_rows(load, name, content):
    dataset = load(name, content)
    assert rows(dataset) == sorted(TEXTS)
    assert dataset.counts.read == len(TEXTS)


def test_parquet_loads(load, tmp_path):
    folder = tmp_path / "label=1"  # not a Hive partition
    folder.mkdir()
    datasets.Dataset.from_dict({"text": TEXTS, "stars": [1.5] * 30}).to_parquet(str(folder / "a.parquet"))
    assert rows(load("label=1/a.parquet")) == sorted(TEXTS)
    with pytest.raises(DataError, match=r"no column 'label' to choose rows by: its columns are text, stars\."):
        load("label=1/a.parquet", where=["label=1"])


def test_txt_without_blank_lines_splits_lines(load):
    dataset = load("a.txt", "\n\n" + "\n".join(TEXTS) + "\n\n\n")
    assert rows(dataset) == sorted(TEXTS)
    assert [notice.rpartition("/")[2] for notice in load.notices] == [
        "a.txt: one row per line, as the first 1,000 lines have no blank line among them. Use --txt-rows to change this."
    ]


@pytest.mark.parametrize("blank", ["\n\n", "\n \t\n", "\n\n\n\n", "\r\n\r\n"])
def test_txt_with_blank_lines_splits_paragraphs(load, blank):
    dataset = load("a.txt", "\n" + blank.join(f"{text}\nsecond line" for text in TEXTS) + "\n\n")
    assert rows(dataset) == sorted(f"{text} second line" for text in TEXTS)
    assert [notice.rpartition("/")[2] for notice in load.notices] == [
        "a.txt: blank lines separate rows. Use --txt-rows to change this.",
        "a.txt have line breaks, which become spaces (--clean full). --clean lines keeps them, as in poems.",
    ]


# Columns


def test_column_text_is_default(load):
    records = [{"title": f"title {number}", "text": text} for number, text in enumerate(TEXTS)]
    assert rows(load("a.jsonl", jsonl(records))) == sorted(TEXTS)


def test_only_text_column_is_default(load):
    records = [{"id": number, "body": text, "stars": 1.5} for number, text in enumerate(TEXTS)]
    assert rows(load("a.jsonl", jsonl(records))) == sorted(TEXTS)


def test_ambiguous_text_column_fails(refusal):
    content = jsonl({"title": "a", "body": text} for text in TEXTS)
    assert refusal("a.jsonl", content) == (
        "a.jsonl: which column is the text? Name one with --text-column: 'title' (labels, 1 character on average), 'body' "
        "(text, 125). 'body' looks like text. Or make a text of several with --template."
    )
    assert refusal("a.csv", table(header=("body", "label"))) == (
        "a.csv: which column is the text? Name one with --text-column: 'body' (text, 125 characters on average), 'label' "
        "(numbers, 1). 'body' looks like text. Or make a text of several with --template."
    )
    asked = jsonl({"Kunde": "a", "my body": text, "Answer": text[:20]} for text in TEXTS)
    assert refusal("q.jsonl", asked).endswith(
        r' Or make a text of several with --template "Question: {my body}\nAnswer: {Answer}" --answer-column Answer.'
    )
    assert refusal("n.jsonl", jsonl({"a": 1, "b": 2} for _ in TEXTS)) == (
        "n.jsonl: which column is the text? Name one with --text-column: 'a' (numbers, 1 character on average), 'b' (numbers, 1)."
    )


def test_text_column_option_selects_column(load, refusal):
    content = table(header=("text", "body")).replace(",0", ",zero").replace(",1", ",one")
    assert rows(load("a.csv", content, text_column="text")) == sorted(TEXTS)
    assert rows(load("a.csv", content, text_column="body")) == ["one", "zero"]
    assert refusal("a.csv", content, text_column="txt") == (
        "a.csv has no column 'txt': its columns are 'text' (text, 125 characters on average), 'body' (labels, 4). 'text' looks "
        "like text."
    )


def test_text_column_of_other_type_fails(refusal, tmp_path):
    for value, kind in ((["a"], "list"), ({"a": 1}, "dict")):
        assert f"30 with a {kind} in column 'text'" in refusal("a.jsonl", jsonl([{"text": value}] * 30))
    data = datasets.Dataset.from_dict({"text": [text.encode() for text in TEXTS]})
    data.to_parquet(str(tmp_path / "b.parquet"))
    assert "30 with a bytes in column 'text'" in refusal("b.parquet")


# Filters


def test_where_filters_by_value(load):
    dataset = load("a.csv", table(), where=["label=1"])
    assert rows(dataset) == sorted(TEXTS[1::2])
    assert dataset.counts.filtered == 15


def test_where_filters_numbers_and_dates(load):
    records = [{"text": text, "n": i % 3, "when": f"2020-01-0{i % 3 + 1}"} for i, text in enumerate(TEXTS)]
    for condition in ("n=0", "when=2020-01-01"):
        assert rows(load("a.jsonl", jsonl(records), where=[condition])) == sorted(TEXTS[::3])


def test_where_conditions_are_combined(load, refusal):
    records = [{"text": text, "a": i % 2, "b": i % 3} for i, text in enumerate(tiny_models.reviews(60))]
    dataset = load("a.jsonl", jsonl(records), where=["a=0", "b=0"])
    assert rows(dataset) == sorted(record["text"] for record in records if not record["a"] and not record["b"])
    both = load("a.jsonl", where=["b=0", "a=0", "b=2"])
    assert rows(both) == sorted(record["text"] for record in records if not record["a"] and record["b"] != 1)
    assert (
        refusal("a.jsonl", where=["a=2", "b=0", "a=3"])
        == "a.jsonl: no row has a=2 or a=3 and b=0; a has 0, 1; b has 0, 1, 2."
    )


def test_where_value_may_contain_equals_sign(load):
    records = [{"text": text, "k": "a=b" if i % 2 else "c"} for i, text in enumerate(TEXTS)]
    assert rows(load("a.jsonl", jsonl(records), where=["k=a=b"])) == sorted(TEXTS[1::2])


def test_where_with_unknown_column_fails(refusal):
    assert refusal("a.csv", table(), where=["star=1"]) == (
        "a.csv has no column 'star' to choose rows by: its columns are text, label."
    )


def test_where_accepts_class_label_names(load, refusal, tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    labels = [number % 2 for number in range(30)]
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": labels}, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    for value in ("1", "pos"):
        assert rows(load("a.parquet", where=[f"label={value}"])) == sorted(TEXTS[1::2])
    assert refusal("a.parquet", where=["label=good"]) == "a.parquet: no row has label=good; label has 0, 1."


# CSV


def test_csv_text_is_read_verbatim(load):
    traps = ["NA", "None", "null", "NaN", "nan", "007", "1.50", "1e5", "TRUE", "2020-01-01", "-"]
    dataset = load("a.csv", "text\n" + "\n".join(traps + TEXTS))
    assert rows(dataset) == sorted(traps + TEXTS)


def test_csv_labels_are_read_verbatim(load):
    content = table().replace(",0", ",NA").replace(",1", ",007")
    assert rows(load("a.csv", content, where=["label=NA"])) == sorted(TEXTS[::2])
    assert rows(load("a.csv", content, where=["label=007"])) == sorted(TEXTS[1::2])


def test_csv_quoted_fields_are_read(load, tmp_path):
    texts = [f'{text}, she said "so",\nand left' for text in TEXTS]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    assert rows(load("a.csv")) == sorted(" ".join(text.split()) for text in texts)


def test_csv_long_field_is_read(load):
    dataset = load("a.csv", table([*TEXTS, "long " * 40_000]))
    assert max(map(len, rows(dataset))) == 199_999


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "text,label\na,b,c\n" + "x,1\n" * 9, "its header has 2 fields, line 2 has 3"),
        ("a.csv", "text,label\n" + "x,1\n" * 9 + "a,b,c\n", "its header has 2 fields, line 11 has 3"),
        ("a.csv", "text,label\n" + "x,1\n" * 12_000 + "a,b,c\n", "its header has 2 fields, line 12002 has 3"),
        ("a.csv", "text,label\nx,1\nlonely\n", "its header has 2 fields, line 3 has 1"),
        ("a.tsv", "text\tlabel\nx\t1\t2\n", "its header has 2 fields, line 2 has 3"),
        ("a.csv", "text,text\nx,1\n", "its header names a column twice: text, text"),
        (
            "a.csv",
            'text,label\n"open,1\nx,1\n',
            "line 2: unexpected end of data; a field that begins with a quote must end with one",
        ),
        (
            "a.csv",
            'text,label\nx,1\n"so" she said,1\n',
            "line 3: ',' expected after '\"'; a field that begins with a quote must end with one",
        ),
        (
            "a.tsv",
            'label\ttext\n0\tone\n1\t"two\n' + "0\tthree\n" * 60,
            "line 3: unexpected end of data; a field that begins with a quote must end with one",
        ),
        (
            "a.tsv",
            'text\tn\n"a\nb"\t1\n"one\nline"\t"two\n\nthree\tfour\n"five" six\t1\n',
            "line 5: a tab expected after '\"'; a field that begins with a quote must end with one",
        ),
        (
            "a.csv",
            'text,n\nx,1\n"one,1\ntwo,2\nthree"\n',
            "its header has 2 fields, line 3 has 1, with a quote that ends in line 5",
        ),
        (
            "a.json",
            '{\n "train": ["a"],\n "test": ["b"]\n}',
            "it is one JSON object with the lists train, test: write a file for each",
        ),
        (
            "a.json",
            '{"text": {"0": "a", "1": "b"}}',
            "it is one JSON object without a list of rows: write an array, or one object per line",
        ),
        ("a.json", '{\n "data": [{"text": "a"} 5]\n}', "Expecting ',' delimiter: line 2 column 25 (char 26)"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": \n',
            "line 3 is not a JSON object: Expecting value: line 1 column 10 (char 9)",
        ),
        ("a.json", '[{"text": "a"}, {"te', "Unterminated string starting at: line 1 column 18 (char 17)"),
        (
            "a.json",
            "[" * 1_000_000,
            "it is nested too deeply",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n' + '{"text": ' + "[" * 100_000,
            "line 2 is not a JSON object: it is nested too deeply",
        ),
        ("a.json", '["a", 5]', "row 2 is neither a JSON object nor a string"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2 is neither a JSON object nor a string"),
    ],
)
def test_invalid_file_fails_with_line(refusal, name, content, reason):
    if "its header has" in reason:
        delimiter = "a tab" if name.endswith(".tsv") else "','"
        reason += f": correct that line; a field with {delimiter} in it needs quotes"
    assert refusal(name, content) == f"{name} cannot be read: {reason}."


def test_invalid_parquet_fails(refusal):
    message = refusal("a.parquet", b"PAR1 garbage PAR1")
    assert message.startswith("a.parquet cannot be read: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "start"),
    [("a.csv", table()), ("a.jsonl", jsonl([{"text": "x"}])), ("a.txt", "a\n\nb\n"), ("a.tsv", "")],
)
def test_invalid_utf8_fails_with_byte_position(refusal, name, start):
    before = start.encode() * 3000
    assert refusal(name, before + b"caf\x81\n") == (
        f"{name} cannot be read: byte {len(before) + 3} is not UTF-8: name its encoding with --encoding, such as cp1252 "
        "(Western European), cp1250 (Central European), cp1251 (Cyrillic), mac_roman, shift_jis or gb18030, or save it as "
        "UTF-8 text."
    )


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.txt"])
def test_file_without_rows_fails(refusal, name):
    for content in ("", "\n \n" if name not in ("a.csv", "a.tsv") else "\n\n", "\ufeff"):
        assert refusal(name, content) == f"{name} has no rows."


def test_file_with_empty_table_fails(refusal, tmp_path):
    assert refusal("header.csv", "text,label\n", where=["label=1"]) == "header.csv has no rows."
    assert refusal("a.json", "[]") == "a.json has no rows."
    datasets.Dataset.from_dict({"text": []}).to_parquet(str(tmp_path / "a.parquet"))
    assert refusal("a.parquet") == "a.parquet has no rows."


# JSON


def test_json_lone_surrogate_is_replaced(load):
    dataset = load("a.jsonl", '{"text": "half \\ud83d pair"}\n' + jsonl({"text": text} for text in TEXTS))
    assert "half ? pair" in rows(dataset)


def test_json_mixed_types_are_read(load):
    records = [{"text": text, "id": i if i % 2 else str(i)} for i, text in enumerate(TEXTS)]
    records += [{"text": 5}, {"text": None}, {"other": 1}]
    dataset = load("a.jsonl", jsonl(records))
    assert rows(dataset) == sorted([*TEXTS, "5"])
    assert dataset.counts.empty == 2


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"data": [{"text": text} for text in TEXTS]}, "data"),
        ({"version": "1.1", "rows": [{"text": text, "n": 1} for text in TEXTS], "tags": ["a", "b"]}, "rows"),
        ({"texts": TEXTS, "count": 30}, "texts"),
    ],
)
def test_list_in_json_object_is_read(load, tmp_path, value, name):
    for indent in (None, 2):
        assert rows(load("a.json", json.dumps(value, indent=indent))) == sorted(TEXTS)
        assert load.notices == [
            f"{tmp_path / 'a.json'}: the rows are those of the list '{name}' in its JSON object."
        ]


def test_json_object_may_be_a_row(load, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.json").write_text(json.dumps({"text": text, "links": [{"a": 1}]}, indent=2))
    assert rows(load(folder)) == sorted(TEXTS)


def test_json_dates_stay_text(load):
    days = [f"2020-01-{day:02}" for day in range(1, 31)]
    assert rows(load("a.jsonl", jsonl({"text": day} for day in days))) == days


def test_json_unicode_line_separator_ends_no_line(load):
    records = [json.dumps({"text": f"{text}\u2028next"}, ensure_ascii=False) for text in TEXTS]
    assert rows(load("a.jsonl", "\n".join(records))) == sorted(f"{text} next" for text in TEXTS)


def test_changed_file_is_not_cached(load, tmp_path):
    load("a.csv", table())
    os.utime(tmp_path / "a.csv", (1e9, 1e9))
    load("a.csv")
    (tmp_path / "a.csv").write_text(table([text.replace("the", "thy") for text in TEXTS]))
    os.utime(tmp_path / "a.csv", (1e9, 1e9))
    assert any("thy" in text for text in load("a.csv").train)


def test_txt_rows_without_txt_file_is_refused(load, refusal, tmp_path):
    content = jsonl({"text": text} for text in TEXTS)
    assert refusal("a.jsonl", content, txt_rows="line") == "a.jsonl: no txt file, so leave --txt-rows out."
    (tmp_path / "b.txt").write_text("\n".join(tiny_models.reviews(9, seed=9)))
    paths = {"a": str(tmp_path / "a.jsonl"), "b": str(tmp_path / "b.txt")}
    assert len(load("a.jsonl", txt_rows="file", eval_dataset=paths["b"]).held_out) == 1
    assert len(load("b.txt", txt_rows="file", eval_dataset=paths["a"]).held_out) == len(TEXTS)


def test_txt_rows_file_gives_row_per_file(load, tmp_path):
    folder = tmp_path / "poems"
    folder.mkdir()
    for number, text in enumerate(tiny_models.reviews(30)):
        (folder / f"{number}.txt").write_text(f"{text}\nsecond line\n\nanother verse {number}")
    (folder / "empty.txt").write_text("\n")
    dataset = load(folder, txt_rows="file", clean="lines")
    assert dataset.counts.read == 30
    assert all("\nsecond line\n\nanother verse" in text for text in dataset.train)
    assert load.notices == [f"Skipped 1 file without rows, such as {folder / 'empty.txt'}."]
    load(folder, txt_rows="blank")
    assert load.notices[1:] == ["30 txt files: blank lines separate rows. Use --txt-rows to change this."]


def test_text_column_ignores_txt_files(load, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    texts = tiny_models.reviews(40)
    (folder / "a.txt").write_text("\n".join(texts[:20]))
    (folder / "b.csv").write_text("body,kind\n" + "\n".join(f"{text},x" for text in texts[20:]))
    assert load(folder, text_column="body").counts.read == 40


def test_single_column_name_may_contain_comma(tmp_path):
    (tmp_path / "one.tsv").write_text("text, cleaned\n" + "\n".join(tiny_models.reviews(60)))
    assert load_dataset(TrainConfig(dataset=str(tmp_path / "one.tsv"))).counts.read == 60


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_with_doubled_column_is_refused(refusal, tmp_path, streaming):
    rows = pyarrow.array(["one", "two"])
    pyarrow.parquet.write_table(pyarrow.table([rows] * 3, names=["a", "b", "b"]), tmp_path / "a.parquet")
    message = "a.parquet cannot be read: its header names a column twice: b, b."
    assert refusal("a.parquet", streaming=streaming) == message


@pytest.mark.parametrize("streaming", [False, True])
def test_many_columns_are_cut_in_message(refusal, streaming):
    names = [f"column{number}" for number in range(20_000)]
    text = ",".join(names) + "\n" + ",".join(["two words"] * 20_000) + "\n"
    message = refusal("a.csv", text, text_column="none", streaming=streaming)
    assert message.endswith("'column18' (labels, 9), 'column19' (labels, 9) and 19,980 more.")
    assert refusal("b.csv", text * 3).count("column") < 30
    assert len(refusal("c.csv", "a" * 10**6 + ",b\nx,y\n", text_column="none")) < 300


def test_parquet_dictionary_columns_are_text(load, tmp_path):
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()]
    arrays = [pyarrow.array(["x", "y"] * 15).dictionary_encode(), *(pyarrow.array(TEXTS, kind) for kind in kinds)]
    for array in arrays[1:]:
        columns = pyarrow.table({"kind": arrays[0], "body": array.cast(pyarrow.string()).dictionary_encode()})
        pyarrow.parquet.write_table(columns, tmp_path / "a.parquet")
        assert rows(load("a.parquet", text_column="body", where=["kind=y"])) == sorted(TEXTS[1::2])
        pyarrow.parquet.write_table(pyarrow.table({"n": [1] * 30, "body": array}), tmp_path / "b.parquet")
        assert rows(load("b.parquet")) == sorted(TEXTS)


def test_parquet_nested_columns_are_messages(load, refusal, tmp_path):
    talks = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in TEXTS]
    maps = pyarrow.array([[("a", 1)]] * 30, pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    pyarrow.parquet.write_table(pyarrow.table({"messages": talks, "extra": maps}), tmp_path / "a.parquet")
    assert load("a.parquet").format == "messages"
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "extra": maps}), tmp_path / "b.parquet")
    assert rows(load("b.parquet", text_column="body")) == sorted(TEXTS)
    assert "Lists, objects or bytes are in extra" in refusal("b.parquet")


def test_parquet_bomb_is_refused(refusal, monkeypatch, tmp_path):
    monkeypatch.setattr("lora_tuner.data.opening.MAX_UNPACKED", 10**5)
    texts = [f"{number}" + " " * 10**5 for number in range(30)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", compression="zstd")
    assert "as of a decompression bomb: unpack it first" in refusal("a.parquet")
