"""Invalid data fails with one line that names it; unusual data is read, and every row is counted."""

import ctypes
import datetime
import functools
import gzip
import io
import json
import lzma
import os
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lora_tuner.config import TrainConfig
from lora_tuner.data import tokenization
from lora_tuner.data.dataset import load_dataset
from lora_tuner.models.resolve import find_base
from lora_tuner.models.tokenizer import load_tokenizer

from .. import tiny_models
from .process import contents

TEXTS = tiny_models.reviews(60)
MODES = [
    (option, *arguments)
    for option in ("--dataset", "--eval-dataset")
    for arguments in (("--preview", "1"), ("--plan",), ("--max-steps", "1"))
]


def table(texts=TEXTS, header="text,label"):
    return "\n".join([header, *(f"{text},{number % 2}" for number, text in enumerate(texts))]) + "\n"


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def parquet(**columns):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


DAY = datetime.datetime(2020, 1, 1)
NO_TEXT = "in column 'text' (first: "
TWO_FIELDS = "cannot be read: its header has 2 fields, line 4 has"
QUOTES = "; a field that begins with a quote must end with one."
INVALID = {
    "empty": ("x.csv", "", "x.csv has no rows."),
    "a header alone": ("x.csv", "text,label\n", "x.csv has no rows."),
    "one row": ("x.csv", table(TEXTS[:1]), "1 usable row of 1 (0 empty, 0 duplicates), that is"),
    "one row, often": ("x.csv", table(TEXTS[:1] * 50), "1 usable row of 50 (0 empty, 49 duplicates), that is"),
    "nothing but space": (
        "x.csv",
        table([" ", "<br>", "\u200b"] * 9),
        "0 usable rows of 27 (27 empty, 0 duplicates)",
    ),
    "no such column": (
        "x.csv",
        table(header="a,b"),
        "which column is the text? Name one with --text-column: 'a' (text, ",
    ),
    "an unknown encoding": (
        "x.csv",
        table().encode() + b"caf\x81,1\n",
        f"byte {len(table()) + 3} is not UTF-8: name its encoding with --encoding, such as cp1252",
    ),
    "UTF-16 without its mark": ("x.csv", table().encode("utf-16-le"), "byte 1 is null, as in UTF-16"),
    "null bytes": ("x.jsonl", jsonl(TEXTS).encode() + b'"a\0b"\n', f"byte {len(jsonl(TEXTS)) + 2} is null"),
    "an open quote": ("x.csv", table() + '"open,1\n', f"line 62: unexpected end of data{QUOTES}"),
    "a quote too many": ("x.csv", 'text,label\n"so" she said,1\n', f"line 2: ',' expected after '\"'{QUOTES}"),
    "a field too many": ("x.csv", "text,label\nx,1\ny,1\nz,z,1\n", f"{TWO_FIELDS} 3: correct that line"),
    "a field too few": ("x.csv", "text,label\nx,1\ny,1\nz\n", f"{TWO_FIELDS} 1: correct that line"),
    "lists": ("x.jsonl", jsonl([{"text": ["a"]}] * 9), f"with a list {NO_TEXT}"),
    "objects": ("x.jsonl", jsonl([{"text": {"a": 1}}] * 9), f"with a dict {NO_TEXT}"),
    "truth": ("x.jsonl", jsonl([{"text": "a"}, {"text": True}]), f"with a bool {NO_TEXT}"),
    "NaN": ("x.jsonl", '{"text": "a"}\n{"text": NaN}\n', f"with nan {NO_TEXT}"),
    "infinity": ("x.json", '[{"text": "a"}, {"text": -Infinity}]', f"with -inf {NO_TEXT}"),
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
    "too deep": ("x.jsonl", '{"text": "a", "n": ' + "[" * 100_000, "it is nested too deeply."),
    "rows of two kinds": ("x.jsonl", '{"text": "a"}\n["a"]\n', "line 2 is neither a JSON object nor a string."),
    "compressed and cut short": (
        "x.csv.gz",
        gzip.compress(table().encode(), mtime=1)[:-9],
        "its compressed data is damaged or cut short (Compressed file ended before the end-of-stream marker was reached).",
    ),
    "compressed twice": (
        "x.csv.gz",
        gzip.compress(gzip.compress(table().encode())),
        "it is compressed twice: unpack it first.",
    ),
    "compressed and damaged": (
        "x.csv.xz",
        lzma.compress(table().encode())[:60] + b"x" * 60,
        "is damaged or cut short (",
    ),
    "a workbook": (
        "x.csv",
        b"PK\x03\x04\x14\0\x06\0",
        "it is a zip file: of documents and workbooks the extension is",
    ),
    "a PDF": ("x.txt", b"%PDF-1.7 text", "it is a PDF file: extract its text, as with `pdftotext`."),
    "no Parquet": ("x.parquet", table(), "x.parquet cannot be read: "),
    "half of a Parquet": ("x.parquet", parquet(text=TEXTS)[:-40], "x.parquet cannot be read: "),
    "Parquet of lists": ("x.parquet", parquet(text=[["a"]] * 9), f"with a list {NO_TEXT}"),
    "Parquet of bytes": ("x.parquet", parquet(text=[b"a"] * 9), f"with a bytes {NO_TEXT}"),
    "Parquet of days": ("x.parquet", parquet(text=[DAY] * 9), f"with a datetime {NO_TEXT}"),
    "Parquet of NaN": ("x.parquet", parquet(text=[1.5, float("nan")]), f"with nan {NO_TEXT}"),
}


@pytest.fixture
def refusal(run, gpt2, tmp_path, reviews_csv):
    """Run a command on data in one of the modes. Return its error line, after checking that it wrote nothing."""

    def call(data, mode=MODES[0], **kwargs):
        data = Path(os.path.relpath(data, tmp_path))
        option, *arguments = mode
        options = {"--dataset": reviews_csv.name} | {option: data}
        before = files_in(tmp_path)
        result = run(
            "train",
            "--base",
            gpt2,
            "--name",
            "x",
            "--max-length",
            64,
            *arguments,
            *sum(options.items(), ()),
            **kwargs,
        )
        assert (result.status, result.out) == (1, ""), result.err
        assert str(data) in result.line
        assert files_in(tmp_path) == before
        return result.line

    return call


def files_in(folder):
    """Return the contents of regular files: a pipe would block, and a device has no end."""
    others = [path for path in folder.rglob("*") if not path.is_file() and not path.is_dir()]
    files = contents(folder, skip=[".cache", *(str(path.relative_to(folder)) for path in others)])
    return {name: content for name, content in files.items() if content is not None}


def cases_by_mode(cases):
    """Yield every second case in one mode, and mark all other combinations as slow.

    An evaluation dataset may have few rows.
    """
    for number, (case, (_, _, reason)) in enumerate(cases.items()):
        modes = MODES[:3] if "usable row" in reason else MODES
        for mode in modes:
            quick = number % 2 == 0 and mode == modes[number // 2 % len(modes)]
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(case, mode, marks=marks, id=f"{case}-{mode[0][2:]}-{mode[1][2:]}")


@pytest.mark.parametrize(("case", "mode"), [*cases_by_mode(INVALID)])
def test_invalid_data_fails_with_one_line(refusal, tmp_path, case, mode):
    name, content, reason = INVALID[case]
    assert reason in refusal(write(tmp_path / name, content), mode)


@pytest.mark.parametrize("case", ["empty", pytest.param("a header alone", marks=pytest.mark.slow)])
def test_sweep_with_invalid_data_leaves_nothing(refusal, tmp_path, case):
    name, content, reason = INVALID[case]
    assert reason in refusal(write(tmp_path / name, content), ("--dataset", "--max-steps", "1", "--rank", "2,4"))


def test_eval_dataset_without_text_fails(refusal, tmp_path):
    _, content, _ = INVALID["nothing but space"]
    assert "x.csv has no usable row to evaluate on." in refusal(write(tmp_path / "x.csv", content), MODES[3])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_invalid_file_in_folder_is_named(refusal, tmp_path, mode):
    write(tmp_path / "some" / "a.csv", table())
    for name, content in (("b.csv", table() + "a,b,c\n"), ("deep/b.jsonl", '"a"\n{'), ("b.txt", b"\xff")):
        broken = write(tmp_path / "some" / name, content)
        assert f"some/{name} " in refusal(tmp_path / "some", mode)
        broken.unlink()


def drop_root_access():
    """Drop the capabilities by which root reads any file."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0


@pytest.mark.parametrize(
    ("kind", "where", "reason"),
    [
        *(
            (kind, where, reason)
            for where in ("", "some/")
            for kind, reason in (
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
def test_unreadable_path_fails_without_blocking(refusal, tmp_path, kind, where, reason):
    path = tmp_path / where / "x.csv"
    write(tmp_path / "some" / "a.csv", table())
    if kind == "pipe":
        os.mkfifo(path)
    elif kind in ("device", "link"):
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere.csv")
    elif "directory" in kind:
        path.mkdir()
    else:
        write(path, table())
    if kind.startswith("unreadable"):
        path.chmod(0)
    mode = MODES[0] if where else MODES[5]
    assert reason in refusal(path.parent if where else path, mode, before=drop_root_access)
    if kind.startswith("unreadable"):
        path.chmod(0o755)


def change_on_open(path, how):
    """Change the file right after the command has opened it."""
    real = os.fstat

    def fstat(descriptor):
        status = real(descriptor)
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
                        file.truncate(status.st_size // 2)
                    else:
                        file.write(b"other words, 1\n")
        return status

    os.fstat = fstat


@pytest.mark.parametrize("how", ["longer", "shorter", "written over"])
@pytest.mark.parametrize(
    ("option", "name"),
    [("--dataset", "x.csv"), pytest.param("--eval-dataset", "x.parquet", marks=pytest.mark.slow)],
)
def test_file_changed_while_read_fails(run, gpt2, tmp_path, reviews_csv, option, name, how):
    path = write(tmp_path / name, parquet(text=TEXTS) if name.endswith("parquet") else table())
    os.utime(path, (1e9, 1e9))
    options = {"--dataset": reviews_csv.name} | {option: name}
    change = functools.partial(change_on_open, path, how)
    result = run("train", "--base", gpt2, "--preview", 1, *sum(options.items(), ()), before=change)
    reason = "it changed while it was read: try again when it is complete."
    assert (result.status, result.out, result.line) == (1, "", f"Error: {name} cannot be read: {reason}")


def test_file_replaced_while_read_gives_rows_of_one(run, gpt2, tmp_path):
    path = write(tmp_path / "x.csv", table())
    change = functools.partial(change_on_open, path, "replaced")
    result = run("train", "--base", gpt2, "--preview", 50, "--dataset", "x.csv", "--json", before=change)
    assert result.status == 0, result.err
    shown = {row["after"] for row in json.loads(result.out)["rows"]}
    assert shown <= set(TEXTS) or shown <= {text.upper() for text in TEXTS}
    assert path.read_text() == table().upper()


UNUSUAL_WORDS = [
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
NUMBERS = UNUSUAL_WORDS[5:6] + UNUSUAL_WORDS[7:9] + UNUSUAL_WORDS[10:]
UNUSUAL = {  # name, content, rows, empty rows, duplicates
    "odd words": ("x.csv", "text\n" + "\n".join(UNUSUAL_WORDS), UNUSUAL_WORDS, 0, 0),
    "odd words in JSON": ("x.jsonl", jsonl({"text": text} for text in UNUSUAL_WORDS), UNUSUAL_WORDS, 0, 0),
    "odd words in Parquet": ("x.parquet", parquet(text=UNUSUAL_WORDS), UNUSUAL_WORDS, 0, 0),
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
        jsonl(
            [{"text": text, "a": number} for number, text in enumerate(TEXTS)] + [{"b": "c"}, {"text": None}] * 3
        ),
        TEXTS,
        6,
        0,
    ),
    "NaN beside the text": (
        "x.jsonl",
        jsonl({"text": text, "score": float("nan")} for text in TEXTS),
        TEXTS,
        0,
        0,
    ),
    "what is cleaned away": ("x.csv", table([*TEXTS, "", "<br>", "\u200b\u00ad", "&nbsp;"]), TEXTS, 4, 0),
    "copies but for space and markup": (
        "x.csv",
        table([*TEXTS, *(f"<p> {text}\t</p>" for text in TEXTS)]),
        TEXTS,
        0,
        60,
    ),
    "a mark at the front": ("x.jsonl", "\ufeff" + jsonl(TEXTS), TEXTS, 0, 0),
    "lines of an old Mac": ("x.csv", table().replace("\n", "\r"), TEXTS, 0, 0),
    "escaped null bytes": ("x.jsonl", jsonl([*TEXTS, "a\0b"]), [*TEXTS, "a b"], 0, 0),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_data_is_read_and_counted(run, gpt2, tmp_path, case):
    name, content, rows, empty, copies = UNUSUAL[case]
    write(tmp_path / name, content)
    dataset = load_dataset(TrainConfig(dataset=name))
    assert sorted(dataset.train + dataset.held_out) == sorted(rows)
    counts = vars(dataset.counts)
    assert (counts["empty"], counts["duplicates"]) == (empty, copies)
    assert counts["read"] == sum(counts.values()) - counts["read"] == len(rows) + empty + copies
    result = run("train", "--base", gpt2, "--dataset", name, "--preview", 50, "--json")
    assert [row["after"] for row in json.loads(result.out)["rows"]] == dataset.train[:50]
    assert f"; {dataset.counts}." in result.err


def test_folder_reports_skipped_files(run, gpt2, tmp_path):
    write(tmp_path / "some" / "a.csv", table(TEXTS[:30]))
    write(tmp_path / "some" / "deep" / "B.TXT", "\n".join(TEXTS[20:]))
    for name in ("empty.csv", "deep/readme.md", "more.py.gz", ".hidden.csv", ".git/x.csv"):
        write(tmp_path / "some" / name, "")
    write(tmp_path / "elsewhere" / "x.csv", table(["not this"]))
    (tmp_path / "some" / "link").symlink_to("../elsewhere")
    result = run("train", "--base", gpt2, "--dataset", "some", "--preview", 1)
    assert result.status == 0, result.err
    assert "Skipped 1 file without rows, such as some/empty.csv." in result.err
    assert (
        "Skipped 3 other files in some, such as deep/readme.md: 1 about the data, 1 linked, 1 .gz." in result.err
    )
    counts = re.search(r"; 70 read, 10 duplicates, (\d+) train, (\d+) held out\.", result.err)
    assert counts, result.err
    assert int(counts[1]) + int(counts[2]) == 60


def test_trained_tokens_equal_file_tokens(run, gpt2, tmp_path):
    """Check that one epoch trains on each token of the training rows once."""
    write(tmp_path / "x.csv", table([*TEXTS, *TEXTS[:7], " "]))
    result = run("train", "--base", gpt2, "--dataset", "x.csv", "--epochs", 1, "--max-length", 128, "--json")
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    dataset = load_dataset(TrainConfig(dataset="x.csv"))
    assert sorted(dataset.train + dataset.held_out) == sorted(TEXTS)
    assert facts["data"]["hash"] == dataset.hash()
    assert facts["data"]["counts"] == vars(dataset.counts)
    assert dataset.counts.read == 68
    rows = tokenization.truncate(
        tokenization.encode_texts(load_tokenizer(find_base(str(gpt2))), dataset.train), 128
    )
    assert facts["run"]["tokens"] == sum(len(row) - 1 for row in rows)  # the first has no label
    assert facts["run"]["sequences"] < len(rows)


@pytest.mark.parametrize("text", ["the actor never works. " * 2000, "works" * 9000, "\U0001f600" * 20_000])
def test_partial_tokenization_equals_truncated_full(text):
    tokenizer = tiny_models.tokenizer()
    (whole,), (read,) = (
        tokenization.encode_texts(tokenizer, [text], max_tokens=max_tokens) for max_tokens in (None, 64)
    )
    assert len(read) < len(whole)
    (one,) = tokenization.truncate([read], 64)
    assert len(read) > 64
    assert one.tolist() == whole[:64].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "long_rows"), [("txt", "auto"), ("csv", "truncate"), ("jsonl", "truncate")])
def test_line_of_50_megabytes_bounds_memory(start, gpt2, tmp_path, ending, long_rows):
    long = "the actor never works. " * 2_200_000
    header = {"csv": "text\n"}.get(ending, "")
    line = json.dumps if ending == "jsonl" else str
    write(tmp_path / f"x.{ending}", header + "".join(f"{line(text)}\n" for text in (*TEXTS, long)))
    command = start(
        *("train", "--base", gpt2, "--dataset", f"x.{ending}", "--max-length", 64, "--max-steps", 1, "--json"),
        *("--long-rows", long_rows),
    )
    result = command.end(400)  # 250,000 sequences
    assert result.status == 0, result.err
    facts = json.loads(result.out)
    assert facts["data"]["counts"]["read"] == 61
    assert (facts["run"]["truncated_rows"] >= 1) == (long_rows == "truncate")
    assert (facts["run"]["used_share"] == 1) == (long_rows == "auto")
    assert result.peak < 2e9
