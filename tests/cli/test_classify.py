"""The command `classify`: a text, a table, and what is refused."""

import csv
import json
from pathlib import Path

import pytest

from .. import adapter_files, api_server
from .test_commands import run

TABLE = 'id,text,note\n1,the actor never works,a\n2,,b\n3,"this film, drags",c\n'


@pytest.fixture(scope="module")
def library(gpt2, tmp_path_factory):
    """An adapter with labels, one with two columns of text, and one without labels."""
    folder = tmp_path_factory.mktemp("library")
    api_server.write_adapter(
        folder,
        "told",
        gpt2,
        0,
        labels=adapter_files.labels(fitted_rows=20, temperature=2.0),
    )
    two = adapter_files.labels(template="{title}: {text}\n\nLabel: {label}")
    api_server.write_adapter(folder, "two", gpt2, 1, labels=two)
    api_server.write_adapter(folder, "plain", gpt2, 2)
    return folder


@pytest.fixture
def classify(library, gpt2, tmp_path):
    def call(*arguments, adapter="told", **settings):
        options = (
            "--adapter",
            adapter,
            "--adapters-dir",
            library,
            "--base",
            gpt2,
            "--device",
            "cpu",
        )
        return run("classify", *arguments, *options, **settings)

    (tmp_path / "new.csv").write_text(TABLE)
    return call


def test_text_gets_probability_of_each_label(classify):
    lines = [line.split() for line in classify("the actor never works").stdout.splitlines()]
    assert sorted(label for label, _ in lines) == ["bad", "good"]
    assert sum(float(probability) for _, probability in lines) == pytest.approx(1, abs=2e-3)
    assert float(lines[0][1]) >= float(lines[1][1])
    (facts,) = json.loads(classify("the actor never works", "--json").stdout)
    assert facts["text"] == "the actor never works"
    assert facts["label"] == lines[0][0]
    assert [*facts["probabilities"]] == ["bad", "good"]
    assert f"{facts['probabilities'][facts['label']]:.3f}" == lines[0][1]


def test_lines_of_stdin_are_texts(classify):
    for arguments in (["-"], ["--file", "-"]):
        lines = classify(*arguments, stdin="so\n\nthe film\n").stdout.splitlines()
        assert lines[0].split() == ["label", "probability", "text"]
        assert [line.split(maxsplit=2)[2].strip() for line in lines[1:]] == [
            "so",
            "the film",
        ]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_table_comes_back_with_labels(classify, suffix):
    done = classify("--file", "new.csv", "--output", f"told.{suffix}")
    assert done.stdout.startswith(f"told.{suffix}  2 rows: ")
    assert "1 row without a text: these get no label." in done.stderr
    with Path(f"told.{suffix}").open(newline="") as file:
        rows = [*csv.DictReader(file)] if suffix == "csv" else [json.loads(line) for line in file]
    assert [[row["id"], row["text"] or "", row["note"]] for row in rows] == [
        ["1", "the actor never works", "a"],
        ["2", "", "b"],
        ["3", "this film, drags", "c"],
    ]
    assert [bool(row["predicted_label"]) for row in rows] == [True, False, True]
    for row in (rows[0], rows[2]):
        shares = {name: float(row[f"probability_{name}"]) for name in ("bad", "good")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert row["predicted_label"] == max(shares, key=shares.__getitem__)
    (alone,) = json.loads(classify("this film, drags", "--json").stdout)
    assert float(rows[2]["probability_good"]) == pytest.approx(alone["probabilities"]["good"], abs=1e-4)


def test_nested_values_stay_json(classify, tmp_path):
    source = {"text": "so", "tags": ["a", {"é": None, "n": 1}]}
    (tmp_path / "nested.jsonl").write_text(json.dumps(source))
    classify("--file", "nested.jsonl", "--output", "told.csv")
    with Path("told.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert json.loads(row["tags"]) == ["a", {"n": 1}]


def test_json_has_rows_without_text_too(classify):
    facts = json.loads(classify("--file", "new.csv", "--json").stdout)
    assert [each["text"] for each in facts] == ["the actor never works", "", "this film, drags"]
    assert (facts[1]["label"], facts[1]["probabilities"]) == (None, None)
    assert all(facts[number]["label"] for number in (0, 2))


def test_text_file_has_a_text_per_line(classify, tmp_path):
    (tmp_path / "new.txt").write_text("so, what\nthe film\n")
    facts = json.loads(classify("--file", "new.txt", "--json").stdout)
    assert [each["text"] for each in facts] == ["so, what", "the film"]


def test_columns_of_template_are_read(classify, tmp_path):
    (tmp_path / "two.csv").write_text("title,text,other\na,b,c\n")
    assert json.loads(classify("--file", "two.csv", "--json", adapter="two").stdout)[0]["text"] == "a b"
    assert "column 'title'" in classify("--file", "new.csv", adapter="two", exit_code=1).stderr


def test_text_column_is_chosen(classify, tmp_path):
    (tmp_path / "other.csv").write_text("body,text_id\nso,1\n")
    refused = classify("--file", "other.csv", exit_code=1).stderr
    assert (
        "other.csv has no column 'text', of which the adapter has learned: name the text with --text-column"
        in refused
    )
    facts = json.loads(classify("--file", "other.csv", "--text-column", "body", "--json").stdout)
    assert facts[0]["text"] == "so"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "There is no text: give one, or --file."),
        (["so", "--file", "new.csv"], "A text and --file exclude each other: give one."),
        (["so", "--output", "x.csv"], "--output is for a table: give one with --file."),
        (
            ["so", "--text-column", "x"],
            "--text-column is for a table: give one with --file.",
        ),
        (["--file", "none.csv"], "--file none.csv: there is no such file."),
        (
            ["--file", "new.csv", "--output", "x.txt"],
            "--output x.txt: choose a name that ends in .csv or .jsonl.",
        ),
        (
            ["--file", "new.csv", "--output", "new.csv"],
            "--output new.csv exists: choose another name, or use --overwrite.",
        ),
        (
            ["--file", "new.csv", "--output", "new.csv", "--overwrite"],
            "--output new.csv exists, and is --file",
        ),
        (["so", "--overwrite"], "--overwrite is for --output: give both."),
        ([" "], "a text is empty"),
    ],
)
def test_unfit_arguments_are_refused(classify, arguments, message):
    error = classify(*arguments, exit_code=1).stderr
    assert message in error
    assert error.count("Error: ") == 1
    assert Path("new.csv").read_text() == TABLE


def test_adapter_without_labels_is_refused(classify):
    error = classify("so", adapter="plain", exit_code=1).stderr
    assert error == "Error: plain tells no labels: only an adapter that was trained with --label-column does.\n"


def test_columns_that_are_taken_are_refused(classify, tmp_path):
    (tmp_path / "again.csv").write_text("text,predicted_label\nso,bad\n")
    error = classify("--file", "again.csv", "--output", "x.csv", exit_code=1).stderr
    assert "again.csv has a column 'predicted_label' already: rename it." in error
    assert not Path("x.csv").exists()


def test_quantized_base_tells_labels(classify):
    (facts,) = json.loads(classify("so", "--load-in", "8bit", "--json").stdout)
    (full,) = json.loads(classify("so", "--json").stdout)
    assert facts["probabilities"]["good"] == pytest.approx(full["probabilities"]["good"], abs=0.2)
