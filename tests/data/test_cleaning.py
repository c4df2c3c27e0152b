"""Cleaning of texts: what is removed, kept as written, and how long it takes."""

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tuner.data.cleaning import clean_text
from lora_tuner.data.dataset import MAX_PREVIEWS

from .. import tiny_models
from ..data_files import TEXTS, jsonl, rows, table


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


HAVE_LINES = ("paragraphs", "verse", "play", "posts")


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
    assert ["--clean lines keeps them" in notice for notice in load.notices] == [True] * (kind in HAVE_LINES)
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
    assert rows(load("code")) == sorted([*TEXTS, contents["deep/b.md"]])  # data files and documents come first
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
