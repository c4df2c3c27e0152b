"""train --preview on a terminal and in a pipe: texts, turns, tokens, lengths and dropped copies."""

import json

import pytest

from .. import tiny_models
from ..data.test_chat import save_chat_base
from ..data_files import TEXTS, jsonl
from .test_commands import run


@pytest.fixture
def preview(gpt2, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")

    def show(*arguments, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        base = () if "--base" in arguments else ("--base", gpt2)
        length = () if "--max-length" in arguments else ("--max-length", 32)
        return run("train", *base, *length, *arguments).stdout

    return show


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory):
    return save_chat_base(tmp_path_factory.mktemp("talk") / "talker")


@pytest.fixture
def talks(tmp_path):
    turns = [("system", "Be kind."), ("user", "the actor?"), ("assistant", "the film:\nit drags.")]
    rows = [
        {"messages": [{"role": role, "content": f"{text} {number}"} for role, text in turns]}
        for number in range(20)
    ]
    (tmp_path / "talks.jsonl").write_text(jsonl(rows))
    return "talks.jsonl"


def test_document_is_shown_once(preview, tmp_path):
    (tmp_path / "poems").mkdir()
    for number in range(20):
        (tmp_path / "poems" / f"{number}.txt").write_text(f"zz {number}\n\nand {number * 7}\n")
    shown = preview("--dataset", "poems", "--preview", 1).partition("\n\nlengths")[0]
    assert "before" not in shown
    assert all(line and line == line.rstrip() for line in shown.splitlines())


def test_text_is_shown_with_line_marks(preview, tmp_path):
    poems = [f"{text[:40]}\n\n  don't 'quote' \u00e9 \x1b[31m" for text in TEXTS]
    (tmp_path / "a.jsonl").write_text(jsonl({"text": poem} for poem in poems), encoding="utf-8")
    shown = preview("--dataset", "a.jsonl", "--preview", 1, "--clean", "lines")
    first = shown.partition("\n\nlengths")[0]
    assert "\u21b5\n          \u21b5\n            don't 'quote' \u00e9 \ufffd[31m" in first
    assert "\\n" not in first
    assert "\u00ab" not in shown
    assert first.startswith("row 1\n  before  ")
    assert not any(line != line.rstrip() for line in first.splitlines())


@pytest.mark.parametrize(
    ("variables", "is_coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_turns_show_learned_parts(preview, chat_base, talks, variables, is_coloured):
    shown = preview(
        "--base", chat_base, "--dataset", talks, "--preview", 1, "--max-length", 128, COLUMNS="80", **variables
    )
    if is_coloured:
        assert shown.startswith("What is learned is green.\n\nrow 1\n  system     \x1b[2mBe kind.")
        assert "\x1b[32mthe film:\u21b5" in shown
        assert "\u00ab" not in shown
    else:
        assert shown.startswith("What is learned is between \u00ab and \u00bb.\n\nrow 1\n  system     Be kind. ")
        number = shown.partition("Be kind. ")[2].partition("\n")[0]
        assert f"\n  user       the actor? {number}\n" in shown
        assert f"\n  assistant  \u00abthe film:\u21b5\n             it drags. {number}\u00bb\n" in shown
        assert "\x1b[3" not in shown
    assert max(map(len, shown.split("\nlengths")[0].splitlines())) <= 80 or is_coloured


def test_both_sides_of_pair_are_shown(preview, tmp_path):
    rows = [
        {"prompt": f"so {n}?", "chosen": f"yes {text[:20]}", "rejected": f"no {n}"}
        for n, text in enumerate(TEXTS)
    ]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    line = ("--dataset", "a.jsonl", "--objective", "dpo", "--preview", 2)
    shown = preview(*line)
    assert shown.startswith("What is compared is between \u00ab and \u00bb.\n\nrow 1, chosen\n  prompt      so ")
    first = shown.partition("row 2, chosen")[0]
    number = first.partition("so ")[2].partition("?")[0]
    assert f"\n  completion  \u00abyes {TEXTS[int(number)][:20].strip()}" in first
    assert f"\nrow 1, rejected\n  prompt      so {number}?\n  completion  \u00abno {number}\u00bb\n" in first
    assert "row 3" not in shown
    data = json.loads(preview(*line, "--json"))
    assert [(row["number"], row["side"]) for row in data["rows"]] == [
        (number, side) for number in (1, 2) for side in ("chosen", "rejected")
    ]
    assert data["measured_rows"] == data["train_rows"] == sum(bar["rows"] for bar in data["lengths"]["histogram"])
    assert any(data["rows"][1]["labels"])
    assert not all(data["rows"][1]["labels"])


def test_answer_column_is_marked_in_text(preview, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        jsonl({"q": f"why {text[:30]}", "a": f"so {n}"} for n, text in enumerate(TEXTS))
    )
    line = ("--dataset", "a.jsonl", "--template", "{q} | {a}!", "--answer-column", "a", "--preview", 1)
    assert " | \u00abso " in preview(*line)
    assert "\u00bb!" in preview(*line)


@pytest.mark.parametrize("arguments", [["--preview"], ["--preview", "--clean", "lines"], ["--preview", "3"]])
def test_preview_without_number_gives_three(preview, reviews_csv, arguments):
    shown = preview("--dataset", reviews_csv.name, *arguments)
    assert [line for line in shown.splitlines() if line.startswith("row ")] == ["row 1", "row 2", "row 3"]


def test_preview_shows_lengths_and_cuts(preview, tmp_path):
    texts = [*TEXTS, "the actor drags. " * 40]
    (tmp_path / "a.jsonl").write_text(jsonl({"text": text} for text in texts))
    shown = preview("--dataset", "a.jsonl", "--preview", 1, "--long-rows", "truncate")
    assert "lengths in tokens of " in shown
    assert "--max-length 32 cuts " in shown
    assert "; --max-length 32 cuts " in shown.partition("\nlengths")[0]
    assert f"tokens, a.jsonl line {len(texts)}: the actor drags. the actor drags." in shown
    shown = preview("--dataset", "a.jsonl", "--preview", 1)
    assert " rows of at most --max-length 32\n" in shown.partition("\nlengths")[0]
    shown = json.loads(preview("--dataset", "a.jsonl", "--preview", 2, "--json", "--long-rows", "truncate"))
    fields = {"before", "after", "tokens", "labels", "parts", "pieces", "cut_tokens", "number", "side"}
    assert {*shown["rows"][0]} == fields
    lengths = shown["lengths"]
    assert (lengths["max_length"], lengths["truncated_rows"] > 0) == (32, True)
    assert sum(bar["rows"] for bar in lengths["histogram"]) == shown["measured_rows"] == shown["train_rows"]
    assert shown["longest"]["place"] == f"a.jsonl line {len(texts)}"
    assert (shown["duplicates"], shown["dropped"]) == (0, [])


def test_many_rows_are_measured_in_part(preview, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_tuner.training.preview._MEASURED_ROWS", 10)
    monkeypatch.setattr("lora_tuner.training.preview._LONGEST", 1)
    texts = [*tiny_models.reviews(90), "the actor drags. " * 40]
    (tmp_path / "a.jsonl").write_text(jsonl({"text": text} for text in texts))
    shown = preview("--dataset", "a.jsonl", "--preview", 1)
    assert "The lengths are those of 1" in shown
    assert "a.jsonl line 91: the actor drags." in shown


def test_dropped_copies_are_shown_with_places(preview, tmp_path):
    near = tiny_models.reviews(60, seed=3)
    texts = [*near, near[4], near[7], *(f"{text} the end" for text in near)]
    (tmp_path / "a.csv").write_text("text;n\n" + "".join(f"{text};1\n" for text in texts))
    shown = preview("--dataset", "a.csv", "--preview", 1).partition("\nleft out as copies: 2 rows of which")[2]
    assert f"\n  a.csv line 62 copies a.csv line 6: {near[4][:50]}" in shown
    assert f"\n  a.csv line 63 copies a.csv line 9: {near[7][:50]}" in shown
    assert " nearly copies the held-out a.csv line " in shown
