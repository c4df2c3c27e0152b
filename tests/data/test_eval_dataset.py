"""Rows to measure on that are of another dataset."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from lora_tuner.config import TrainConfig
from lora_tuner.data import splitting
from lora_tuner.data.dataset import RowCounts, load_dataset, load_eval_dataset
from lora_tuner.errors import ConfigError, DataError, HubError, InvalidRowError
from lora_tuner.settings_files import resolve_settings

from .. import tiny_models
from ..data_files import TEXTS, jsonl, table
from ..hub_server import Hub


@pytest.mark.parametrize("text", ["row 1", "row 8"])
def test_eval_dataset_frees_every_row(load, tmp_path, text):
    (tmp_path / "eval.json").write_text(json.dumps(["row 3", "row 2"]))
    dataset = load("a.json", json.dumps([text]), eval_dataset=str(tmp_path / "eval.json"))
    assert dataset.train == [text]
    assert sorted(dataset.held_out) == ["row 2", "row 3"]


def test_unwritable_eval_row_stays_in_counts(load, tmp_path):
    """A conversation that is trained on and measured, and that the template cannot write."""
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
        for text in tiny_models.reviews(40)
    ]
    (tmp_path / "eval.jsonl").write_text(jsonl(rows[:20]))
    dataset = load("a.jsonl", jsonl(rows), eval_dataset=str(tmp_path / "eval.jsonl"), near_duplicates="keep")
    alone = load("a.jsonl", jsonl(rows), near_duplicates="keep")
    before = str(dataset.counts)
    both = [text for text in dataset.held_out if text in alone.train][:1]
    train = dataset.train[:1]
    dataset.leave_out({text: InvalidRowError("a reason") for text in both}, 0.1, load.notices.append)
    assert (str(dataset.counts), len(dataset.held_out)) == (before, 19)
    assert load.notices[-1].text.startswith(
        "1 of 20 rows of --eval-dataset cannot be read, such as one with a reason"
    )
    dataset.leave_out({text: InvalidRowError("a reason") for text in train}, 0.1, load.notices.append)
    assert (dataset.counts.invalid, dataset.counts.read) == (1, 40)


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
    assert [
        row.text for row in load_eval_dataset(TrainConfig(eval_dataset=str(tmp_path / "eval.json"))).values()
    ] == dataset.held_out


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
        == "a.csv has no column 'body': its columns are 'text' (text, 125 characters on average), 'label' (numbers, 1). "
        "'text' looks like text."
    )
    assert eval_refusal("b.csv", table(header=("body", "n"))) == (
        "b.csv: which column is the text? Name one with --text-column: "
        "'body' (text, 125 characters on average), 'n' (numbers, 1). 'body' looks like "
        "text. Or make a text of several with --template."
    )
    assert eval_refusal("b.csv", text_column="text").startswith(
        "b.csv has no column 'text': its columns are 'body' ("
    )
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
        print(json.dumps([dataset.description, sorted(dataset.held_out), dataset.counts.in_eval_dataset]))
    except LoraTunerError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.slow
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
    with pytest.raises(DataError, match=r"0 duplicates, 2\d in --eval-dataset\), that is 0 to train on"):
        load_dataset(TrainConfig(dataset="a.json", eval_dataset="a.json"))
