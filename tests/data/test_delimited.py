"""Delimiters and encodings of text files: told by their first lines and bytes, or named by options."""

import csv
import gzip

import pytest
from pydantic import ValidationError

from lora_tuner.config import TrainConfig
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.encodings import find_encoding
from lora_tuner.errors import DataError
from lora_tuner.settings_files import config_to_yaml, read_settings

from .. import tiny_models
from ..data_files import TEXTS, rows, table

# Delimiters


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.csv.gz"])
def test_first_lines_tell_delimiter(load, tmp_path, name, streaming):
    usual = {"a.tsv": "\t", "a.txt": ""}.get(name, ",")
    for delimiter, shown in ((";", "';'"), ("\t", "a tab"), ("|", "'|'"), (",", "','")):
        content = table(separator=delimiter).encode()
        dataset = load(name, gzip.compress(content) if name.endswith("gz") else content, streaming=streaming)
        assert (rows(dataset), dataset.layout) == (sorted(TEXTS), "column 'text'")
        told = [notice for notice in load.notices if f"divided at {shown}" in notice]
        assert len(told) == (delimiter != usual)


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ('text;kind\n"one; two";a\n"three";b\n', ["text", "kind"]),
        ("text;price\nan apple;1,50\na pear;2,75\n", ["text", "price"]),
        ('"text;more",kind\none,a\ntwo,b\n', ["text;more", "kind"]),
        ('text;note\n"one,\ntwo; three";"a\n\nb"\nfour;c\n', ["text", "note"]),
        ("text\nHello; you\nWell; yes; no\n", ["text"]),
        ('text\n"Hello, you"\n"Well, yes"\n', ["text"]),
        ("text, cleaned\nHello\nWell\n", None),
        ("sep=;\ntext;kind\none;a\ntwo;b\n", ["text", "kind"]),
        ("sep=|\r\ntext|kind\r\none;1,5|a\r\n", ["text", "kind"]),
        ("id;text, cleaned;n\n1;a, b;2\n2;c;3\n", ["id", "text, cleaned", "n"]),
    ],
)
def test_delimiters_within_fields_divide_nothing(tmp_path, content, columns):
    from lora_tuner.data.readers import read_file

    name = "a.tsv" if columns is None else "a.csv"
    (tmp_path / name).write_text(content)
    table = read_file(tmp_path / name)
    assert table.columns == (columns or ["text, cleaned"])
    assert all(len(row) == len(table.columns) for row in table.rows)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.csv",
            "name, first;price\nAnna;1,50\nBert;2,75\n",
            "',' gives the columns 'name', ' first;price'; ';' gives",
        ),
        ("a.tsv", "text, cleaned\none, two\nthree, four\n", "',' gives the columns 'text', ' cleaned'"),
        (
            "a.csv",
            "text;kind\none\ntwo; three; four\n",
            "';' gives the columns 'text', 'kind', but not in line 2",
        ),
    ],
)
def test_doubtful_delimiter_names_option(refusal, load, name, content, said):
    message = refusal(name, content)
    assert message.startswith(f"{name} cannot be read: its first lines do not tell its delimiter ({said}")
    assert message.endswith("name it with --delimiter, such as --delimiter ';' or --delimiter tab; one that is nowhere in "
                            "the file makes each line one field.")  # fmt: skip
    assert load(name, delimiter="^", format="text", text_column=content.partition("\n")[0]).counts.read == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text;kind\none;a\ntwo;b\nthree;c;d\nfour;e\n", "its header has 2 fields, line 4 has 3"),
        (
            "text\nHello, you\n",
            "its header has 1 fields, line 2 has 2, divided at ',': delete lines above the header, name another --delimiter, "
            "or read each line as one field: --delimiter tab",
        ),
        ("sep=;\ntext;kind\none;a\ntwo;b\nthree\n", "its header has 2 fields, line 5 has 1"),
        (
            'text;kind\none;a\ntwo;b\n"three;c\n',
            "line 4: unexpected end of data; a field that begins with a quote must end",
        ),
    ],
)
def test_wrong_row_is_named_with_line(refusal, content, reason):
    assert refusal("a.csv", content).startswith(f"a.csv cannot be read: {reason}")


def test_lines_above_header_are_named(refusal, load):
    content = f"Export of 1 May\n\n{table(separator=';')}"
    assert refusal("a.csv", content) == (
        "a.csv cannot be read: its first lines do not tell its delimiter (from line 3 on ';' gives the columns 'text', 'label', "
        "not in line 1): delete the lines above the header, or name it with --delimiter."
    )
    assert load("a.csv", content, delimiter="^").layout == "column 'Export of 1 May'"


def test_column_without_name_has_letter(load):
    """Excel writes columns without a name for empty ones, and pandas one for its index."""
    texts = tiny_models.reviews(30)
    content = ";text;;\r\n" + "".join(f"{number};{text};;\r\n" for number, text in enumerate(texts))
    dataset = load("a.csv", content, where=["A=3", "A=4", "A=5", "A=6"], eval_dataset="held-out")
    assert dataset.layout == "column 'text'"


def test_delimiter_nowhere_is_told(load, tmp_path):
    load("a.csv", table(separator=";"), delimiter="|")
    assert load.notices == [
        f"{tmp_path / 'a.csv'}: each line is one field, as there is no '|' in the first line."
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.md", "a.json", "a.jsonl"])
def test_wrong_encoding_names_option(refusal, name):
    content = ('{"text": "caf\xe9"}\n' * 20).encode()
    for encoding, reason in (("ascii", "byte 13 is not ascii"), ("utf-16", "it has no byte order mark")):
        message = refusal(name, content, encoding=encoding)
        assert reason in message
        assert "name its encoding with --encoding" in message


def test_delimiter_option_is_taken_and_recorded(load, tmp_path):
    content = table(separator="^")
    assert rows(load("a.csv", content, delimiter="^")) == sorted(TEXTS)
    for value in ("tab", "\t", r"\t"):
        config = TrainConfig(dataset="a.csv", delimiter=value, encoding="latin1")
        (tmp_path / "run.yaml").write_text(config_to_yaml(config))
        settings = read_settings(tmp_path / "run.yaml")
        assert (settings["delimiter"], settings["encoding"]) == ("tab", "iso8859-1")
    for value in ("ab", "x", '"', "\n", "5"):
        with pytest.raises(ValidationError, match="give one character that is no letter, digit or quote"):
            TrainConfig(delimiter=value)
    for value in ("base64", "nothing"):
        with pytest.raises(ValidationError, match="unknown: give one of Python's names"):
            TrainConfig(encoding=value)


def test_options_without_such_file_are_refused(refusal, tmp_path):
    content = '{"text": "a"}\n' * 3
    assert refusal("a.jsonl", content, delimiter=";") == (
        "a.jsonl: no csv, tsv or txt file that is a table, so leave --delimiter out."
    )
    assert (
        refusal("a.txt", "one\ntwo\n", delimiter=";")
        == "a.txt has no ';' in its first line: leave --delimiter out."
    )
    assert "leave --delimiter out" in refusal("b.txt", "a;b\n1;2\n", delimiter=";", txt_rows="line")
    assert refusal("a.eml", "Subject: a\n\nb\n", encoding="cp1252") == (
        "a.eml: no file whose encoding is in question, so leave --encoding out."
    )


def test_txt_that_is_no_table_stays_text(load):
    for lines in (
        [f"{text}, {number}" for number, text in enumerate(TEXTS)],
        [f"Go {number}.\tVa {number}." for number in range(30)],
        [f"I came, I saw {number}" for number in range(30)],
        ["hello\tbonjour", "cat\tchat", "dog\tchien", "house\tmaison"],
    ):
        dataset = load("a.txt", "\n".join(lines), clean="none")
        assert rows(dataset) == sorted(lines)
    content = "text\tkind\n" + "\n".join(f"{text}\tx" for text in TEXTS)
    assert load("b.txt", content, txt_rows="line").counts.read == 31
    assert load("b.txt", where=["kind=x"]).counts.read == 30
    assert "--txt-rows line to read each line as a row" in load.notices[0]


def test_old_run_file_keeps_its_rules(load, tmp_path):
    config = TrainConfig(dataset="a.csv")
    old = "".join(
        line for line in config_to_yaml(config).splitlines(True) if not line.startswith(("delimiter", "enc"))
    )
    (tmp_path / "run.yaml").write_text(old)
    settings = read_settings(tmp_path / "run.yaml")
    assert (settings["delimiter"], settings["txt_rows"]) == ("ending", "blank")
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    assert read_settings(tmp_path / "run.yaml")["txt_rows"] == "auto"
    content = "name, first;price\n" + "".join(f"Anna {number};1,5\n" for number in range(9))
    assert load("a.csv", content, delimiter="ending", text_column="name").counts.read == 9
    assert load("b.txt", table(), delimiter="ending", txt_rows="blank").counts.read == 31
    assert load("c.csv", table(), delimiter="ending", txt_rows="blank").counts.read == 30


# Encodings


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.md", "a.py", "a.csv.gz"])
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16"])
def test_encoding_is_recognized_and_told(tmp_path, name, encoding, streaming):
    quote = "\u2019" if encoding == "cp1252" else "'"
    texts = [f"caf\xe9 {number}, that{quote}s all, na\xefve" for number in range(20)]
    content = {
        "csv": "text;n\n" + "".join(f"{text};1\n" for text in texts),
        "jsonl": "".join(f'{{"text": "{text}"}}\n' for text in texts),
    }
    content = content.get(name.split(".")[1], "\n".join(texts)).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    notices = []
    config = TrainConfig(dataset=str(tmp_path / name), streaming=streaming, eval_dataset=str(tmp_path / name))
    from lora_tuner.data.rows import Source, iter_rows

    found = " ".join(row.text for row in iter_rows(config, Source(config.dataset), notices.append))
    assert all(text in found for text in texts)
    told = (
        "read as UTF-16, as its first bytes say"
        if encoding == "utf-16"
        else "it is not UTF-8, and is read as cp1252"
    )
    assert told in " ".join(notice.text for notice in notices)
    assert (
        "such as 'caf\xe9'. Use --encoding to change this" in " ".join(n.text for n in notices)
        or encoding == "utf-16"
    )


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1251", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043a\u0430\u043a \u0434\u0435\u043b\u0430?"),
        ("cp1250", "Za\u017c\u00f3\u0142\u0107 g\u0119\u015bl\u0105 ja\u017a\u0144"),
        ("mac_roman", "Le caf\u00e9 \u00e9tait ferm\u00e9"),
        ("cp437", "Le caf\u00e9 \u00e9tait ferm\u00e9"),
        ("shift_jis", "\u3053\u308c\u306f\u65e5\u672c\u8a9e\u3067\u3059\u3002"),
        ("gb18030", "\u8fd9\u662f\u4e00\u4e2a\u4e2d\u6587\u6587\u672c\u3002"),
        ("utf-16-le", "plain words"),
    ],
)
def test_other_encoding_needs_option(load, refusal, encoding, text):
    content = "".join(f"{text} {number}\n" for number in range(20)).encode(encoding)
    message = refusal("a.txt", content)
    assert "name its encoding with --encoding" in message
    dataset = load("a.txt", encoding=encoding)
    assert f"{text} 7" in rows(dataset)
    assert not [notice for notice in load.notices if "read as" in notice]


@pytest.mark.parametrize(
    ("encoding", "words"), [("cp1252", "schöne Grüße an alle"), ("cp1251", "привет из дома")]
)
def test_large_file_encoding_is_told(tmp_path, encoding, words):
    (tmp_path / "a.csv").write_bytes(
        b"text;n\n" + b"ascii words;1\n" * 100_000 + f"{words};1\n".encode(encoding) * 50_000
    )
    if encoding == "cp1252":
        assert find_encoding(tmp_path / "a.csv", "auto")[::2] == ("cp1252", "schöne")
    else:
        with pytest.raises(DataError, match="byte 1400007 is not UTF-8: name its encoding"):
            find_encoding(tmp_path / "a.csv", "auto")


def test_broken_utf8_is_no_other_encoding(refusal):
    content = "\u00fcber caf\u00e9s\n".encode() * 20 + b"caf\xe9\n"
    assert refusal("a.txt", content) == (
        f"a.txt cannot be read: byte {len(content) - 2} is not UTF-8, though others are: correct it, or save the file as "
        "UTF-8 text."
    )


def test_encoding_holds_for_all_files(load, tmp_path):
    """Of a folder, of several datasets and of other rows to evaluate on."""
    folder = tmp_path / "some"
    folder.mkdir()
    texts = tiny_models.reviews(40)
    for number, text in enumerate(texts):
        with (folder / f"{number}.csv").open("w", newline="", encoding="cp1251") as file:
            csv.writer(file, delimiter=";").writerows(
                [["text", "n"], [f"\u041f\u0440\u0438\u0432\u0435\u0442 {text}", "1"]]
            )
    dataset = load(folder, encoding="cp1251")
    assert all(text.startswith("\u041f\u0440\u0438\u0432\u0435\u0442 ") for text in rows(dataset))
    assert load.notices == ["40 csv files: its fields are divided at ';'."]
    (tmp_path / "b.csv").write_bytes("text;n\n\u041f\u043e\u043a\u0430;1\n\u0414\u0430;2\n".encode("cp1251"))
    config = TrainConfig(
        dataset=str(folder), eval_dataset=str(tmp_path / "b.csv"), encoding="cp1251", delimiter=";"
    )
    assert sorted(load_dataset(config).held_out) == ["\u0414\u0430", "\u041f\u043e\u043a\u0430"]
    both = TrainConfig(dataset=[str(folder), str(tmp_path / "b.csv")], encoding="cp1251")
    assert load_dataset(both).counts.read == 42
