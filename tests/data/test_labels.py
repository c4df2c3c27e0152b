"""Texts with labels: how they are read, counted, balanced and shortened."""

import json
from collections import Counter

import numpy as np
import pytest

from lora_tuner import TrainConfig
from lora_tuner.config import MAX_LABELS
from lora_tuner.data import chat, labels, tokenization
from lora_tuner.data.labels import split_label
from lora_tuner.data.readers import Table
from lora_tuner.data.row_readers import Layout, text_reader
from lora_tuner.data.row_template import RowTemplate, fill_question, read_template
from lora_tuner.data.rows import Source
from lora_tuner.data.streaming import StreamingDataset
from lora_tuner.errors import ConfigError, InvalidRowError
from lora_tuner.settings_files import resolve_settings

from .. import tiny_models
from ..data_files import TEXTS, jsonl, table

LABEL = {"label_column": "label"}


def pairs(dataset):
    """Text and label of each row."""
    rows = [split_label(row) for row in dataset.train + dataset.held_out]
    return {text.partition("\n\nLabel: ")[0]: label for text, label in rows}


def test_label_is_answer_of_its_text(load):
    dataset = load("a.csv", table(), **LABEL)
    assert pairs(dataset) == {text: str(number % 2) for number, text in enumerate(TEXTS)}
    assert dataset.label_template == "{text}\n\nLabel: {label}"
    assert all(map(chat.keeps_answer, dataset.train))
    assert dataset.labels == dict(sorted(labels.count_labels(dataset.train).items()))
    assert any(notice.startswith("Labels: 0 ") for notice in load.notices)


def test_columns_may_have_other_names(load):
    rows = [{"id": f"x{number}", "Review": text, "tone": "dull"} for number, text in enumerate(TEXTS)]
    rows[::2] = [row | {"tone": "fine"} for row in rows[::2]]
    dataset = load("a.jsonl", jsonl(rows), label_column="Tone", text_column="Review")
    assert dataset.label_template == "{Review}\n\nTone: {tone}"
    assert dataset.train[0].startswith(chat.CHAT_MARK)


@pytest.mark.parametrize("values", [(0, 1), ("0", "1"), (0.0, 1.0), (False, True)])
def test_values_get_names(load, values):
    rows = [{"text": text, "label": values[number % 2]} for number, text in enumerate(TEXTS)]
    names = ["false=bad", "true=good"] if values[0] is False else ["0=bad", "1=good"]
    if isinstance(values[0], float):
        names = ["0.0=bad", "1.0=good"]
    dataset = load("a.json", json.dumps(rows), **LABEL, label_names=names)
    assert pairs(dataset) == {text: ("bad", "good")[number % 2] for number, text in enumerate(TEXTS)}


def test_names_of_classes_are_read():
    shown = Table("a", [], ["text", "label"], ["text"], label_names={"label": ["bad", "good"]})
    layout = Layout(
        "template",
        template=RowTemplate((("", "text"), (": ", ""), ("", "label")), "label"),
        has_labels=True,
    )
    read = text_reader(shown, layout, TrainConfig(**LABEL), "full")
    assert split_label(read({"text": "so", "label": 1})[1]) == ("so: ", "good")
    named = text_reader(shown, layout, TrainConfig(**LABEL, label_names=["1=praise"]), "full")
    assert split_label(named({"text": "so", "label": 1})[1]) == ("so: ", "praise")
    with pytest.raises(InvalidRowError, match="no label in 'label'"):
        read({"text": "so", "label": -1})


def test_other_labels_are_counted(load):
    rows = [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(TEXTS)]
    rows += [
        {"text": "one", "label": "c"},
        {"text": "two", "label": None},
        {"text": " ", "label": "a"},
    ]
    rows += [{"text": "three", "label": ["a"]}]
    dataset = load("a.jsonl", jsonl(rows), **LABEL, labels=["a", "b"], max_invalid=0.2)
    assert (dataset.counts.invalid, dataset.counts.empty) == (3, 1)
    assert [*dataset.labels] == ["a", "b"]
    (notice,) = [notice for notice in load.notices if notice.startswith("Left out 3 of 34 rows")]
    assert "1 with a label that --labels does not name (first: " in notice
    assert "1 with no label in 'label' (first: " in notice
    assert "1 with a label of over 200 characters, or a list, in 'label'" in notice


def labelled(*names):
    """A table in which rows have labels in turn."""
    return "text,label\n" + "\n".join(f"{text},{names[number % len(names)]}" for number, text in enumerate(TEXTS))


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (labelled("a"), {}, "all rows have the label 'a': two labels or more are needed."),
        (labelled("a", "A"), {}, "the labels 'A', 'a' differ by case or spaces alone"),
        (
            labelled("a", "b"),
            {"labels": ["a", "b", "c"]},
            "the label 'c' has no row to train on: add rows of it",
        ),
        (
            labelled("0", "1"),
            {"label_names": ["0=a", "2=b"]},
            "the label 'b' (--label-names 2=b) has no row to train on",
        ),
        (
            labelled("a", "b"),
            {"label_column": "tone"},
            "has no column 'tone', which --label-column names",
        ),
        (
            labelled("a", "b"),
            {"template": "{label}: {text}"},
            "--template must have a column of text, and end with",
        ),
        (
            labelled("a", "b"),
            {"template": "Label: {label}"},
            "--template must have a column of text, and end with",
        ),
        (
            labelled("a", "b"),
            {"template": "{text}{label}"},
            "--template must have a column of text, and end with",
        ),
    ],
)
def test_wrong_labels_are_refused(refusal, content, settings, message):
    error = refusal("a.csv", content, **LABEL | settings)
    assert message in error
    assert "\n" not in error


def test_too_many_labels_are_refused(refusal):
    texts = tiny_models.reviews(MAX_LABELS + 1)
    content = "text,label\n" + "\n".join(f"{text},id {number}" for number, text in enumerate(texts))
    assert f"has {MAX_LABELS + 1} different labels, such as id 0, id 1, id 2" in refusal(
        "a.csv", content, **LABEL
    )


def test_plain_text_has_no_labels(refusal):
    assert "plain text without columns: --label-column needs a table." in refusal("a.txt", "a\nb\n", **LABEL)


def test_label_of_measured_rows_alone_is_refused(refusal, tmp_path):
    (tmp_path / "b.csv").write_text("text,label\nso,c\nno,a\n")
    error = refusal("a.csv", labelled("a", "b"), **LABEL, eval_dataset=str(tmp_path / "b.csv"))
    assert "the label 'c' has no row to train on, only 1 held-out row" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "a,b"}, "labels needs label_column"),
        ({"balance": True}, "balance needs label_column"),
        (LABEL | {"labels": "a"}, "a is the only label"),
        (LABEL | {"labels": "a,,b"}, "a label is empty"),
        (LABEL | {"label_names": "negative"}, "'negative' is not of the form VALUE=NAME"),
        (LABEL | {"long_rows": "truncate"}, "long_rows truncate would lose labels"),
        (LABEL | {"long_rows": "chunk"}, "long_rows chunk would lose labels"),
        (
            LABEL | {"streaming": True},
            "streaming does not know the labels before it has read all rows: give labels",
        ),
        (
            LABEL | {"streaming": True, "labels": "a,b", "balance": True},
            "streaming cannot count labels",
        ),
        (
            LABEL | {"template": "{text}: {label}", "answer_column": "label"},
            "label_column and answer_column both name",
        ),
        (
            LABEL | {"format": "messages"},
            "label_column reads texts and format messages conversations",
        ),
        (
            LABEL | {"objective": "dpo"},
            "objective dpo learns from preferences: leave label_column out",
        ),
    ],
)
def test_contradicting_settings_are_named(settings, message):
    with pytest.raises(ConfigError) as error:
        resolve_settings(TrainConfig, settings)
    assert message in str(error.value)


def test_text_stays_on_one_side(load):
    rows = [{"text": text, "label": label} for text in TEXTS for label in "ab"]
    dataset = load("a.jsonl", jsonl(rows), **LABEL, near_duplicates="keep")
    sides = [{split_label(row)[0] for row in rows} for rows in (dataset.train, dataset.held_out)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_separator_in_text_is_text(load):
    text = "so\n\nLabel: bad\n\nLabel: "
    rows = [{"text": f"{text}{number}", "label": "good" if number % 2 else "bad"} for number in range(20)]
    dataset = load("a.jsonl", jsonl(rows), **LABEL, clean="none", near_duplicates="keep")
    for row in dataset.train + dataset.held_out:
        before, label = split_label(row)
        number = int(before.removeprefix(text).partition("\n")[0])
        assert (before, label) == (
            f"{text}{number}\n\nLabel: ",
            "good" if number % 2 else "bad",
        )
    tokenizer = tiny_models.tokenizer()
    (encoded,) = tokenization.encode_texts(tokenizer, dataset.train[:1])
    assert tokenizer.decode(encoded[encoded >= 0]).strip() == split_label(dataset.train[0])[1] + tiny_models.END


def test_imbalance_is_said(load):
    content = labelled("a", *"bbbbb")
    load("a.csv", content, **LABEL)
    assert any(
        "times as many rows as a: --balance trains on all labels equally often" in text for text in load.notices
    )
    load("a.csv", content, **LABEL, balance=True)
    assert any(text.startswith("--balance repeats rows until each label has") for text in load.notices)
    load("a.csv", labelled("a", "b"), **LABEL)
    assert not any("--balance" in text for text in load.notices)


@pytest.mark.parametrize("name", ["nan", "None", "N/A"])
def test_name_of_nothing_is_said(load, name):
    load("a.csv", labelled("a", "b", name), **LABEL)
    assert f"If {name} means that a row has no label, --labels a,b leaves out such rows." in load.notices
    # The other one of two would be refused alone.
    for content, named in ((labelled("a", "b", name), ["a", "b", name]), (labelled("a", name), [])):
        load("a.csv", content, **LABEL, labels=named)
        assert not any(" means that a row has no label" in text for text in load.notices)


def test_balance_repeats_rows_evenly():
    def row(text, label):
        return chat.encode_answer(text + label, (len(text), len(text) + len(label)), keep=True)

    sources = [
        [row(f"{number} ", "abbbbbb"[number % 7]) for number in range(70)],
        [row("x ", "b"), row("y ", "c")],
    ]
    balanced = labels.balance_rows(sources)
    counts = labels.count_labels(balanced[0] + balanced[1])
    assert counts == dict.fromkeys("abc", 61)
    assert [{*rows} for rows in balanced] == [{*rows} for rows in sources]
    assert balanced[0][:70] == sources[0]
    copies = Counter(balanced[0])
    assert {copies[each] for each in sources[0] if split_label(each)[1] == "a"} == {6, 7}


def test_middle_of_long_text_is_left_out():
    tokenizer = tiny_models.tokenizer()
    text = "the actor works. " * 40 + "\n\nLabel: "
    row = chat.encode_answer(f"{text}good", (len(text), len(text) + 4), keep=True)
    (whole,) = tokenization.encode_texts(tokenizer, [row])
    (piece,), use = tokenization.encode_rows(tokenizer, [row], 64)
    assert piece.tolist() == [*whole[:32], *whole[-32:]]
    assert (use.truncated_rows, use.used_tokens, use.tokens) == (1, 64, len(whole))
    assert tokenizer.decode(piece[piece >= 0]).strip() == f"good{tiny_models.END}"
    assert np.array_equal(tokenization.encode_truncated(tokenizer, [row, "so"], 64)[0], piece)
    (clipped,) = tokenization.encode_texts(tokenizer, [row], max_tokens=2)  # of 512 characters
    assert clipped[-10:].tolist() == whole[-10:].tolist()
    assert len(clipped) < len(whole)


def test_template_is_read_back():
    template = RowTemplate((("{a} \\n ", ""), ("", "b"), ("\n\nC: ", ""), ("", "c")), "c")
    again = read_template(template.to_text(), "c")
    assert again.fill({"b": "x", "c": "y"}) == template.fill({"b": "x", "c": "y"}) == "{a} \\n x\n\nC: y"
    assert again.columns == ["b", "c"]
    assert fill_question("{text}\n\nLabel: {label}", "label", "so") == "so\n\nLabel:"


def test_stream_of_labels_is_read(gpt2, tmp_path):
    (tmp_path / "a.csv").write_text(labelled("a", "b", "c"))
    config = TrainConfig(
        dataset="a.csv",
        **LABEL,
        labels=["a", "b"],
        streaming=True,
        max_length=64,
        max_invalid=0.5,
        max_steps=1,
    )
    stream = StreamingDataset(config, tiny_models.tokenizer(), frozenset(), [Source("a.csv")])
    rows = [row for _, sequence in zip(range(20), stream, strict=False) for row in sequence]
    told = {tiny_models.tokenizer().decode(row[row >= 0]).strip() for row in rows}
    assert told == {f"a{tiny_models.END}", f"b{tiny_models.END}"}
