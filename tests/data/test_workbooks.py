"""Excel workbooks and SQLite databases: rows of one table as texts; nothing in them is executed or written."""

import datetime
import io
import sqlite3
import zipfile

import openpyxl
import pytest

from lora_tuner.config import TrainConfig
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.readers import read_file

from ..data_files import TEXTS, jsonl, rows
from ..document_files import zip_file


def workbook(**sheets):
    """Return the bytes of a workbook with these sheets, each a list of rows."""
    book, buffer = openpyxl.Workbook(), io.BytesIO()
    book.remove(book.active)
    for name, lines in sheets.items():
        sheet = book.create_sheet(name)
        for line in lines:
            sheet.append(line)
    book.save(buffer)
    return buffer.getvalue()


def database(path, script, *rows, insert=""):
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.executemany(insert, rows) if rows else None
    connection.commit()
    connection.close()
    return path


def read_rows(path, **options):
    table = read_file(path, **options)
    streamed = read_file(path, streaming=True, **options)
    assert list(table.rows) == list(streamed.rows) == list(streamed.rows)
    return list(table.rows)


SHEET = [["id", "body", "stars"], *([number, text, number % 5 + 0.5] for number, text in enumerate(TEXTS))]
TABLE = "CREATE TABLE reviews (id INTEGER PRIMARY KEY, body TEXT, stars REAL)"


@pytest.fixture
def reviews(tmp_path):
    """Files of the same rows: a workbook and a database."""
    (tmp_path / "a.xlsx").write_bytes(workbook(Reviews=SHEET))
    database(tmp_path / "a.sqlite", TABLE, *SHEET[1:], insert="INSERT INTO reviews VALUES (?, ?, ?)")
    return ["a.xlsx", "a.sqlite"]


def test_workbook_and_database_are_read(load, reviews):
    for name in reviews:
        dataset = load(name)  # the only column of text is taken: numbers are none
        assert rows(dataset) == sorted(TEXTS)
        assert dataset.layout == "column 'body'"
        assert load.notices == []
        assert rows(load(name, where=["stars=0.5"])) == sorted(TEXTS[::5])
        config = TrainConfig(dataset=name, streaming=True, max_steps=1)
        assert rows(load_dataset(config)) == sorted(TEXTS)


def test_cells_are_texts_as_shown(tmp_path):
    day, time = datetime.datetime(2020, 1, 2), datetime.datetime(2020, 1, 2, 10, 30)
    lines = [
        [],
        ["text", None, "text 2", 7],
        [None, None],
        [1, 1.5, 3.0, True],
        [day.date(), time, datetime.time(10, 30), False],
        ["007", "=1+1", None, "NA", "beyond"],
        [1e20, -0.25, "two\nlines", "_x0041_\r"],
    ]
    (tmp_path / "a.xlsx").write_bytes(workbook(a=lines))
    header = ["text", "B", "text 2", "7"]
    assert [[*row.values()] for row in read_rows(tmp_path / "a.xlsx")] == [
        ["1", "1.5", "3", "true"],
        ["2020-01-02", "2020-01-02T10:30:00", "10:30:00", "false"],
        ["007", "", "", "NA", "beyond"],  # a formula has no value before a program has computed it
        ["100000000000000000000", "-0.25", "two\nlines", "A\r", ""],
    ]
    assert [*read_rows(tmp_path / "a.xlsx")[2]] == [*header, "E"]


def test_saved_value_of_formula_is_read(tmp_path):
    content = workbook(a=[["text"], ["=1+1"]])
    with zipfile.ZipFile(io.BytesIO(content)) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    parts["xl/worksheets/sheet1.xml"] = (
        parts["xl/worksheets/sheet1.xml"].replace(b"<v></v>", b"<v>2</v>").replace(b"<v />", b"<v>2</v>")
    )
    (tmp_path / "a.xlsm").write_bytes(zip_file(parts))
    assert read_rows(tmp_path / "a.xlsm") == [{"text": "2"}]


def test_numbers_have_fifteen_digits(tmp_path):
    values = [1, -7, 2**62, 1.5, 100.0, 0.1 + 0.2, 1e20, 1.5e-9, float("inf"), "007", "NA", None]
    path = database(
        tmp_path / "a.db", "CREATE TABLE t (v)", *([value] for value in values), insert="INSERT INTO t VALUES (?)"
    )
    written = [
        "1",
        "-7",
        "4611686018427387904",
        "1.5",
        "100.0",
        "0.3",
        "1.0e+20",
        "1.5e-09",
        "Inf",
        "007",
        "NA",
        None,
    ]
    assert [row["v"] for row in read_rows(path)] == written


def test_blobs_are_not_text(refusal, tmp_path):
    path = tmp_path / "a.db"
    database(
        path, "CREATE TABLE t (text)", *([text.encode()] for text in TEXTS), insert="INSERT INTO t VALUES (?)"
    )
    assert "30 with a bytes in column 'text'" in refusal("a.db")
    assert read_file(path).nested_columns == ["text"]


# Choice of the table


def several(tmp_path, name):
    lines = [["text"], *([text] for text in TEXTS)]
    if name.endswith("xlsx"):
        (tmp_path / name).write_bytes(
            workbook(first=lines, empty=[["text"]], other=[["text"], ["x"], ["y"]], none=[])
        )
        return "sheet"
    script = (
        "CREATE TABLE first (text); CREATE TABLE empty (text); CREATE TABLE other (text); CREATE TABLE none (a);"
    )
    script += "INSERT INTO other VALUES ('x'), ('y'); CREATE VIEW computed AS SELECT * FROM first;"
    database(tmp_path / name, script, *lines[1:], insert="INSERT INTO first VALUES (?)")
    return "table"


@pytest.mark.parametrize("name", ["a.xlsx", "a.db"])
def test_table_is_chosen_by_name(load, refusal, tmp_path, name):
    kind = several(tmp_path, name)
    assert refusal(name) == (
        f"{name} cannot be read: it has several {kind}s with rows: choose one with --table: first, other."
    )
    assert rows(load(name, table="first")) == sorted(TEXTS)
    assert refusal(name, table="empty") == f"{name} has no rows."
    assert f"it has no {kind} 'Last': choose one with --table: " in refusal(name, table="Last")


def test_only_table_with_rows_is_said(load, tmp_path):
    (tmp_path / "a.xlsx").write_bytes(workbook(notes=[["about"]], data=SHEET))
    assert rows(load("a.xlsx")) == sorted(TEXTS)
    assert load.notices == [
        f"{tmp_path / 'a.xlsx'}: the rows are those of the sheet 'data', the only one with rows."
    ]


def test_table_without_workbook_is_refused(load, refusal, tmp_path):
    content = jsonl({"body": text} for text in TEXTS)
    assert (
        refusal("a.jsonl", content, table="x")
        == "a.jsonl: no Excel workbook or SQLite database, so leave --table out."
    )
    several(tmp_path, "a.db")
    assert refusal("a.jsonl", content, table="x", eval_dataset=str(tmp_path / "a.db")).startswith(
        "a.db cannot be read: "
    )
    (tmp_path / "b.jsonl").write_text(jsonl([{"body": "one"}, {"body": "two"}]))
    dataset = load("a.db", table="first", eval_dataset=str(tmp_path / "b.jsonl"))
    assert (sorted(dataset.held_out), dataset.counts.read) == (["one", "two"], 30)


# Safety


def test_view_of_database_is_not_computed(refusal, tmp_path):
    several(tmp_path, "a.db")
    assert refusal("a.db", table="computed") == (
        "a.db cannot be read: 'computed' is a view table, which the database would have to compute: choose a table with "
        "--table: empty, first, none, other."
    )


def test_database_is_not_written(load, tmp_path):
    path = tmp_path / "a.db"
    database(
        path, f"PRAGMA journal_mode = WAL; {TABLE}", *SHEET[1:], insert="INSERT INTO reviews VALUES (?, ?, ?)"
    )
    before = path.read_bytes()
    assert rows(load("a.db")) == sorted(TEXTS)
    assert [*tmp_path.glob("a.db*")] == [path]
    assert path.read_bytes() == before


def test_changes_beside_database_are_refused(refusal, tmp_path):
    path = database(tmp_path / "a.db", f"PRAGMA journal_mode = WAL; {TABLE}")
    connection = sqlite3.connect(path)
    connection.execute("INSERT INTO reviews VALUES (1, 'text', 1)")
    connection.commit()
    assert refusal("a.db").startswith(
        "a.db cannot be read: changes of it are in a.db-wal beside it: close the program"
    )
    connection.close()
    (tmp_path / "a.db-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7")
    assert refusal("a.db").startswith("a.db cannot be read: changes of it are in a.db-journal beside it: open it")


LAUGHS = (
    b'<!DOCTYPE x [<!ENTITY a "'
    + b"lol" * 1000
    + b'"><!ENTITY b "'
    + b"&a;" * 1000
    + b'"><!ENTITY c "'
    + b"&b;" * 1000
    + b'">]>'
)


def changed_sheet(*changes):
    with zipfile.ZipFile(io.BytesIO(workbook(a=[["text"], ["x"]]))) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    sheet = parts["xl/worksheets/sheet1.xml"]
    for old, new in changes:
        assert old in sheet
        sheet = sheet.replace(old, new)
    parts["xl/worksheets/sheet1.xml"] = sheet
    return zip_file(parts)


BROKEN = {
    "no zip": ("x.xlsx", b"text,label", "it is no zip file, as documents and workbooks of this type are"),
    "old or encrypted": (
        "x.xlsx",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 99,
        "it is an Office file that is encrypted or of an old",
    ),
    "a document": (
        "x.xlsx",
        zip_file({"[Content_Types].xml": "<Types/>"}),
        "File contains no valid workbook part",
    ),
    "entities": (
        "x.xlsx",
        changed_sheet((b"<worksheet", LAUGHS + b"<worksheet"), (b"<t>x</t>", b"<t>&c;</t>")),
        "it is damaged (ParseError: limit on input amplification factor",
    ),
    "a far row": (
        "x.xlsx",
        changed_sheet((b'<row r="2"', b'<row r="99999999999"')),
        "it has a row beyond 1,048,576",
    ),
    "a far column": ("x.xlsx", changed_sheet((b'"A2"', b'"AAAAAAAA2"')), "'AAAAAAAA' is not a valid column name"),
    "no string": (
        "x.xlsx",
        changed_sheet((b't="inlineStr"', b't="s"'), (b"<is><t>x</t></is>", b"<v>99</v>")),
        "it is damaged (IndexError: ",
    ),
    "two names": ("x.xlsx", workbook(a=[["a", "b", "a"], [1, 2, 3]]), "its header names a column twice: a, a"),
    "cut short": ("x.xlsx", workbook(a=SHEET)[:-300], "File is not a zip file"),
    "no database": ("x.db", b"text", "it is no SQLite database, or an encrypted one"),
    "a workbook": ("x.sqlite", workbook(a=SHEET), "it is a zip file: "),
    "a cut database": ("x.db", b"SQLite format 3\0" + b"\0" * 84, "file is not a database"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_table_file_is_one_line(refusal, case):
    name, content, reason = BROKEN[case]
    message = refusal(name, content)
    assert message.startswith(f"{name} cannot be read: ")
    assert reason in message
    assert "\n" not in message


def test_damaged_database_is_one_line(refusal, tmp_path):
    path = database(tmp_path / "a.db", TABLE, *SHEET[1:], insert="INSERT INTO reviews VALUES (?, ?, ?)")
    content = path.read_bytes()
    assert (
        refusal("a.db", content[: len(content) // 2]) == "a.db cannot be read: database disk image is malformed."
    )
    connection = sqlite3.connect(tmp_path / "b.db")
    connection.execute("CREATE TABLE t (text)")
    connection.execute("INSERT INTO t VALUES (CAST(x'ff' AS TEXT))")
    connection.commit()
    connection.close()
    assert refusal("b.db") == "b.db cannot be read: a text in it is not UTF-8."


@pytest.mark.parametrize("name", ["a.xlsx", "a.db", "a.sqlite3"])
def test_empty_table_file_has_no_rows(refusal, tmp_path, name):
    if name == "a.xlsx":
        (tmp_path / name).write_bytes(workbook(a=[["text"]], b=[]))
    elif name == "a.db":
        database(tmp_path / name, TABLE)
    assert refusal(name, b"" if name == "a.sqlite3" else None) == f"{name} has no rows."
