"""Data that is not what it should be: refused in one line that names it, or read with each of its rows accounted for."""

import ctypes
import datetime
import functools
import gzip
import io
import json
import os
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lora_tuner.config import TrainConfig
from lora_tuner.data import tokenization
from lora_tuner.data.dataset import load_dataset
from lora_tuner.models.loading import load_tokenizer
from lora_tuner.models.resolve import find_base

from .. import tiny_models
from .process import contents

TEXTS = tiny_models.reviews(60)
WAYS = [
    (option, *how)
    for option in ("--dataset", "--eval-dataset")
    for how in (("--preview", "1"), ("--plan",), ("--max-steps", "1"))
]


def table(texts=TEXTS, header="text,label"):
    return "\n".join([header, *(f"{text},{number % 2}" for number, text in enumerate(texts))]) + "\n"


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def parquet(**columns):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


DAY = datetime.datetime(2020, 1, 1)
NO_TEXT = "not text: name another with --text-column."
TWO_FIELDS = "cannot be read: its header has 2 fields, line 4 has"
QUOTES = "; a field that begins with a quote must end with one."
REFUSED = {
    "empty": ("x.csv", "", "x.csv has no rows."),
    "a header alone": ("x.csv", "text,label\n", "x.csv has no rows."),
    "one row": ("x.csv", table(TEXTS[:1]), "1 usable rows of 1 (0 empty, 0 duplicates) leave"),
    "one row, often": ("x.csv", table(TEXTS[:1] * 50), "1 usable rows of 50 (0 empty, 49 duplicates) leave"),
    "nothing but space": ("x.csv", table([" ", "<br>", "\u200b"] * 9), "0 usable rows of 27 (27 empty, 0 duplicates)"),
    "no such column": ("x.csv", table(header="a,b"), "which column is the text? Name one with --text-column: a, b."),
    "Latin-1": (
        "x.csv",
        table().encode() + b"caf\xe9,1\n",
        f"byte {len(table()) + 3} is not UTF-8: save it as UTF-8 text.",
    ),
    "UTF-16": (
        "x.csv",
        table().encode("utf-16"),
        "byte 3 is null, as in UTF-16 or a binary file: save it as UTF-8 text.",
    ),
    "UTF-16 without its mark": ("x.csv", table().encode("utf-16-le"), "byte 1 is null, as in UTF-16"),
    "UTF-16 without null bytes": ("x.txt", "映画".encode("utf-16"), "byte 0 is not UTF-8: save it as UTF-8 text."),
    "null bytes": ("x.jsonl", jsonl(TEXTS).encode() + b'"a\0b"\n', f"byte {len(jsonl(TEXTS)) + 2} is null"),
    "an open quote": ("x.csv", table() + '"open,1\n', f"line 62: unexpected end of data{QUOTES}"),
    "a quote too many": ("x.csv", 'text,label\n"so" she said,1\n', f"line 2: ',' expected after '\"'{QUOTES}"),
    "a field too many": ("x.csv", "text,label\nx,1\ny,1\nz,z,1\n", f"{TWO_FIELDS} 3."),
    "a field too few": ("x.csv", "text,label\nx,1\ny,1\nz\n", f"{TWO_FIELDS} 1."),
    "lists": ("x.jsonl", jsonl([{"text": ["a"]}] * 9), f"column 'text' holds a list, {NO_TEXT}"),
    "objects": ("x.jsonl", jsonl([{"text": {"a": 1}}] * 9), f"column 'text' holds a dict, {NO_TEXT}"),
    "truth": ("x.jsonl", jsonl([{"text": "a"}, {"text": True}]), f"column 'text' holds a bool, {NO_TEXT}"),
    "NaN": ("x.jsonl", '{"text": "a"}\n{"text": NaN}\n', f"column 'text' holds nan, {NO_TEXT}"),
    "infinity": ("x.json", '[{"text": "a"}, {"text": -Infinity}]', f"column 'text' holds -inf, {NO_TEXT}"),
    "a name twice": (
        "x.jsonl",
        '"a"\n{"text": "a", "n": {"m": 1, "m": 2}}\n',
        "line 2 is not a JSON object: 'm' is given twice in an object.",
    ),
    "a comma too many": ("x.json", '[{"text": "a",}]', "x.json cannot be read: Expecting property name"),
    "a line cut short": (
        "x.jsonl",
        '{"text": "a"}\n{"te',
        "line 2 is not a JSON object: Unterminated string starting at: line 1 column 2",
    ),
    "too deep": ("x.jsonl", '{"text": "a", "n": ' + "[" * 100_000, "maximum recursion depth exceeded"),
    "rows of two kinds": ("x.jsonl", '{"text": "a"}\n["a"]\n', "line 2 is neither a JSON object nor a string."),
    "compressed": (
        "x.csv",
        gzip.compress(table().encode(), mtime=1),
        "cannot be read: it is compressed: unpack it first.",
    ),
    "a workbook": ("x.csv", b"PK\x03\x04\x14\0\x06\0", "byte 5 is null, as in UTF-16 or a binary file"),
    "no Parquet": ("x.parquet", table(), "x.parquet cannot be read: "),
    "half of a Parquet": ("x.parquet", parquet(text=TEXTS)[:-40], "x.parquet cannot be read: "),
    "Parquet of lists": ("x.parquet", parquet(text=[["a"]] * 9), f"column 'text' holds a list, {NO_TEXT}"),
    "Parquet of bytes": ("x.parquet", parquet(text=[b"a"] * 9), f"column 'text' holds a bytes, {NO_TEXT}"),
    "Parquet of days": ("x.parquet", parquet(text=[DAY] * 9), f"column 'text' holds a datetime, {NO_TEXT}"),
    "Parquet of NaN": ("x.parquet", parquet(text=[1.5, float("nan")]), f"column 'text' holds nan, {NO_TEXT}"),
}


@pytest.fixture
def refused(run, gpt2, tmp_path, reviews_csv):
    """Data in one of the ways of giving it, to a command of its own: the line it ends with, and nothing else happens."""

    def call(data, way=WAYS[0], **more):
        data = Path(os.path.relpath(data, tmp_path))
        option, *how = way
        given = {"--dataset": reviews_csv.name} | {option: data}
        before = files_in(tmp_path)
        ended = run("train", "--base", gpt2, "--name", "x", "--max-length", 64, *how, *sum(given.items(), ()), **more)
        assert (ended.status, ended.out) == (1, ""), ended.err
        assert str(data) in ended.line
        assert files_in(tmp_path) == before
        return ended.line

    return call


def files_in(folder):
    """What is in regular files: a pipe would wait, and a device never end."""
    others = [path for path in folder.rglob("*") if not path.is_file() and not path.is_dir()]
    found = contents(folder, skip=[".cache", *(str(path.relative_to(folder)) for path in others)])
    return {name: content for name, content in found.items() if content is not None}


def in_turn(cases):
    """Every second case in one of the ways and, slowly, all in all others. Few rows are enough to measure on."""
    for number, (case, (_, _, why)) in enumerate(cases.items()):
        ways = WAYS[:3] if "usable rows" in why else WAYS
        for way in ways:
            quick = number % 2 == 0 and way == ways[number // 2 % len(ways)]
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(case, way, marks=marks, id=f"{case}-{way[0][2:]}-{way[1][2:]}")


@pytest.mark.parametrize(("case", "way"), [*in_turn(REFUSED)])
def test_invalid_data_fails_with_one_line(refused, tmp_path, case, way):
    name, content, why = REFUSED[case]
    assert why in refused(written(tmp_path / name, content), way)


def test_eval_dataset_without_text_fails(refused, tmp_path):
    _, content, _ = REFUSED["nothing but space"]
    assert "x.csv has no usable row to evaluate on." in refused(written(tmp_path / "x.csv", content), WAYS[3])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_invalid_file_in_folder_is_named(refused, tmp_path, way):
    written(tmp_path / "some" / "a.csv", table())
    for name, content in (("b.csv", table() + "a,b,c\n"), ("deep/b.jsonl", '"a"\n{'), ("b.txt", b"\xff")):
        broken = written(tmp_path / "some" / name, content)
        assert f"some/{name} " in refused(tmp_path / "some", way)
        broken.unlink()


def no_more_than_others():
    """Root reads what it may not: give that up."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0


@pytest.mark.parametrize(
    ("kind", "where", "why"),
    [
        *(
            (kind, where, why)
            for where in ("", "some/")
            for kind, why in (
                ("pipe", "x.csv cannot be read: it is not a regular file."),
                ("device", "x.csv cannot be read: it is not a regular file."),
                ("link", "x.csv cannot be read: it is a link to nothing."),
                ("unreadable", "x.csv cannot be read: Permission denied."),
                (
                    "unreadable directory",
                    "x.csv: Permission denied: choose another place, or ask its owner for access.",
                ),
            )
        ),
        ("directory", "", "The folder x.csv has no .csv"),
    ],
)
def test_unreadable_path_fails_without_blocking(refused, tmp_path, kind, where, why):
    path = tmp_path / where / "x.csv"
    written(tmp_path / "some" / "a.csv", table())
    if kind == "pipe":
        os.mkfifo(path)
    elif kind in ("device", "link"):
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere.csv")
    elif "directory" in kind:
        path.mkdir()
    else:
        written(path, table())
    if kind.startswith("unreadable"):
        path.chmod(0)
    way = WAYS[0] if where else WAYS[5]
    assert why in refused(path.parent if where else path, way, before=no_more_than_others)
    if kind.startswith("unreadable"):
        path.chmod(0o755)


def changing(path, how):
    """Somebody writes into the file just after the command has first looked at it."""
    real = os.fstat

    def fstat(descriptor):
        found = real(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(path) and os.fstat is fstat:
            os.fstat = real
            if how == "replaced":
                other = path.with_name("other.txt")
                other.write_bytes(path.read_bytes().upper())
                os.replace(other, path)
            else:
                with path.open("r+b") as file:
                    if how == "longer":
                        file.seek(0, 2)
                    if how == "shorter":
                        file.truncate(found.st_size // 2)
                    else:
                        file.write(b"other words, 1\n")
        return found

    os.fstat = fstat


@pytest.mark.parametrize("how", ["longer", "shorter", "written over"])
@pytest.mark.parametrize(
    ("option", "name"),
    [("--dataset", "x.csv"), pytest.param("--eval-dataset", "x.parquet", marks=pytest.mark.slow)],
)
def test_file_changed_while_read_fails(run, gpt2, tmp_path, reviews_csv, option, name, how):
    path = written(tmp_path / name, parquet(text=TEXTS) if name.endswith("parquet") else table())
    os.utime(path, (1e9, 1e9))
    given = {"--dataset": reviews_csv.name} | {option: name}
    change = functools.partial(changing, path, how)
    ended = run("train", "--base", gpt2, "--preview", 1, *sum(given.items(), ()), before=change)
    why = "it changed while it was read: try again when it is complete."
    assert (ended.status, ended.out, ended.line) == (1, "", f"Error: {name} cannot be read: {why}")


def test_file_replaced_while_read_gives_old_rows(run, gpt2, tmp_path):
    path = written(tmp_path / "x.csv", table())
    change = functools.partial(changing, path, "replaced")
    ended = run("train", "--base", gpt2, "--preview", 50, "--dataset", "x.csv", "--json", before=change)
    assert ended.status == 0, ended.err
    assert {row["after"] for row in json.loads(ended.out)} <= set(TEXTS)
    assert path.read_text() == table().upper()


ODD = [
    "NA",
    "None",
    "null",
    "NaN",
    "true",
    "1.50",
    "007",
    "-0",
    "1e400",
    "2020-01-01",
    "9" * 5000,
    "0.1000000000000000055",
]
EMOJI = ["\U0001f600" * count for count in range(1, 40)]
NUMBERS = ODD[5:6] + ODD[7:9] + ODD[10:]
READ = {  # name, content, the rows that are in it, empty ones, copies
    "odd words": ("x.csv", "text\n" + "\n".join(ODD), ODD, 0, 0),
    "odd words in JSON": ("x.jsonl", jsonl({"text": text} for text in ODD), ODD, 0, 0),
    "odd words in Parquet": ("x.parquet", parquet(text=ODD), ODD, 0, 0),
    "numbers as they are written": (
        "x.jsonl",
        "".join(f'{{"text": {number}}}\n' for number in [*NUMBERS, *range(20)]) + '{"text": "a"}\n',
        [*NUMBERS, *map(str, range(20)), "a"],
        0,
        0,
    ),
    "numbers in Parquet": ("x.parquet", parquet(text=range(30)), [str(number) for number in range(30)], 0, 0),
    "nothing but emoji": ("x.txt", "\n".join(EMOJI), EMOJI, 0, 0),
    "rows with other keys": (
        "x.jsonl",
        jsonl([{"text": text, "a": number} for number, text in enumerate(TEXTS)] + [{"b": "c"}, {"text": None}] * 3),
        TEXTS,
        6,
        0,
    ),
    "NaN beside the text": ("x.jsonl", jsonl({"text": text, "score": float("nan")} for text in TEXTS), TEXTS, 0, 0),
    "what is cleaned away": ("x.csv", table([*TEXTS, "", "<br>", "\u200b\u00ad", "&nbsp;"]), TEXTS, 4, 0),
    "copies but for space and markup": ("x.csv", table([*TEXTS, *(f"<p> {it}\t</p>" for it in TEXTS)]), TEXTS, 0, 60),
    "a mark at the front": ("x.jsonl", "\ufeff" + jsonl(TEXTS), TEXTS, 0, 0),
    "lines of an old Mac": ("x.csv", table().replace("\n", "\r"), TEXTS, 0, 0),
    "escaped null bytes": ("x.jsonl", jsonl([*TEXTS, "a\0b"]), [*TEXTS, "a b"], 0, 0),
}


@pytest.mark.parametrize("case", READ)
def test_unusual_data_is_read_and_counted(run, gpt2, tmp_path, case):
    name, content, rows, empty, copies = READ[case]
    written(tmp_path / name, content)
    corpus = load_dataset(TrainConfig(dataset=name))
    assert sorted(corpus.train + corpus.held_out) == sorted(rows)
    counts = vars(corpus.counts)
    assert (counts["empty"], counts["duplicates"]) == (empty, copies)
    assert counts["read"] == sum(counts.values()) - counts["read"] == len(rows) + empty + copies
    ended = run("train", "--base", gpt2, "--dataset", name, "--preview", 50, "--json")
    assert [row["after"] for row in json.loads(ended.out)] == corpus.train[:50]
    assert f"Rows: {corpus.counts}." in ended.err.splitlines()


def test_folder_reports_skipped_files(run, gpt2, tmp_path):
    written(tmp_path / "some" / "a.csv", table(TEXTS[:30]))
    written(tmp_path / "some" / "deep" / "B.TXT", "\n".join(TEXTS[20:]))
    for name in ("empty.csv", "deep/notes.md", "more.csv.gz", ".hidden.csv", ".git/x.csv"):
        written(tmp_path / "some" / name, "")
    written(tmp_path / "elsewhere" / "x.csv", table(["not this"]))
    (tmp_path / "some" / "link").symlink_to("../elsewhere")
    ended = run("train", "--base", gpt2, "--dataset", "some", "--preview", 1)
    assert ended.status == 0, ended.err
    assert "Skipped 1 files without rows, such as some/empty.csv." in ended.err
    assert "Skipped 3 other files in some, such as deep/notes.md." in ended.err
    counts = re.search(r"Rows: 70 read, 10 duplicates, (\d+) train, (\d+) held out\.", ended.err)
    assert counts, ended.err
    assert int(counts[1]) + int(counts[2]) == 60


def test_trained_tokens_equal_file_tokens(run, gpt2, tmp_path):
    """All rows once: the tokens that were trained on are those of the rows that are not held out."""
    written(tmp_path / "x.csv", table([*TEXTS, *TEXTS[:7], " "]))
    ended = run("train", "--base", gpt2, "--dataset", "x.csv", "--epochs", 1, "--max-length", 128, "--json")
    assert ended.status == 0, ended.err
    facts = json.loads(ended.out)
    corpus = load_dataset(TrainConfig(dataset="x.csv"))
    assert sorted(corpus.train + corpus.held_out) == sorted(TEXTS)
    assert facts["data"]["hash"] == corpus.hash()
    assert facts["data"]["counts"] == vars(corpus.counts)
    assert corpus.counts.read == 68
    rows, _ = tokenization.truncate(tokenization.encode_texts(load_tokenizer(find_base(str(gpt2))), corpus.train), 128)
    assert facts["run"]["tokens"] == sum(len(row) - 1 for row in rows)  # nothing predicts the first
    assert facts["run"]["sequences"] < len(rows)


@pytest.mark.parametrize("text", ["the actor never works. " * 2000, "works" * 9000, "\U0001f600" * 20_000])
def test_partial_tokenization_equals_truncated_full(text):
    tokenizer = tiny_models.tokenizer()
    (whole,), (read,) = (tokenization.encode_texts(tokenizer, [text], max_tokens=most) for most in (None, 64))
    assert len(read) < len(whole)
    (one,), cut = tokenization.truncate([read], 64)
    assert cut == 1
    assert one.tolist() == whole[:64].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl"])
def test_line_of_50_megabytes_bounds_memory(run, gpt2, tmp_path, ending):
    long = "the actor never works. " * 2_200_000
    header = {"csv": "text\n"}.get(ending, "")
    line = json.dumps if ending == "jsonl" else str
    written(tmp_path / f"x.{ending}", header + "".join(f"{line(text)}\n" for text in (*TEXTS, long)))
    ended = run("train", "--base", gpt2, "--dataset", f"x.{ending}", "--max-length", 64, "--max-steps", 1, "--json")
    assert ended.status == 0, ended.err
    facts = json.loads(ended.out)
    assert facts["data"]["counts"]["read"] == 61
    assert facts["run"]["truncated_rows"] >= 1
    assert ended.peak < 2e9
