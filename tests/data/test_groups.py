"""All rows of a group are on one side of the split; several datasets are mixed by their weights."""

import csv
import json
from collections import Counter
from itertools import islice

import pytest

from lora_tuner.config import TrainConfig
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.mixing import mix, mix_lists
from lora_tuner.errors import ConfigError, DataError
from lora_tuner.settings_files import config_to_yaml, resolve_settings

from .. import tiny_models


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "author"])
        writer.writerows(rows)


def write_authors(path, authors=40, rows=5):
    """Write rows of several authors, in turn."""
    texts = tiny_models.reviews(authors * rows)
    write_csv(path, [(text, f"author {number % authors}") for number, text in enumerate(texts)])
    return {text: f"author {number % authors}" for number, text in enumerate(texts)}


@pytest.mark.parametrize("streaming", [False, True])
def test_group_is_on_one_side(streaming):
    authors = write_authors("rows.csv")
    dataset = load_dataset(TrainConfig(dataset="rows.csv", group_by="author", streaming=streaming))
    train, held_out = ({authors[text] for text in texts} for texts in (dataset.train, dataset.held_out))
    assert not train & held_out
    assert len(train | held_out) == 40
    assert 2 <= len(held_out) <= 16
    groups = dataset.groups_of(dataset.held_out)
    assert len(set(zip(groups, (authors[text] for text in dataset.held_out), strict=True))) == len(held_out)


def test_side_of_group_ignores_rest_of_file():
    authors = write_authors("rows.csv")
    before = set(load_dataset(TrainConfig(dataset="rows.csv", group_by="author")).held_out)
    few = {text: author for text, author in authors.items() if author in {"author 1", "author 7", *before}}
    few |= {text: author for text, author in authors.items() if text in before}
    write_csv("few.csv", [*few.items(), ("another text", "author 99"), ("one more text", "somebody")])
    assert before <= set(load_dataset(TrainConfig(dataset="few.csv", group_by="author")).held_out)


def test_row_without_group_is_its_own():
    texts = tiny_models.reviews(60)
    write_csv("rows.csv", [(text, "") for text in texts])
    notices = []
    dataset = load_dataset(TrainConfig(dataset="rows.csv", group_by="author"), notices.append)
    assert set(dataset.held_out) == set(load_dataset(TrainConfig(dataset="rows.csv")).held_out)
    assert "60 rows of rows.csv have no author, so each is a group of its own." in [note.text for note in notices]


def test_group_by_file_keeps_files_whole(tmp_path):
    (tmp_path / "notes").mkdir()
    files = {}
    for number in range(30):
        texts = tiny_models.reviews(4, seed=number)
        (tmp_path / "notes" / f"{number}.txt").write_text("\n".join(texts), encoding="utf-8")
        files |= dict.fromkeys(texts, number)
    dataset = load_dataset(TrainConfig(dataset="notes", group_by="file", txt_rows="line"))
    assert not {files[text] for text in dataset.train} & {files[text] for text in dataset.held_out}
    assert len(dataset.held_out) % 4 == 0


def test_group_of_eval_dataset_is_not_trained():
    authors = write_authors("rows.csv", authors=10)
    write_csv("eval.csv", [("a new text", "author 3"), ("one more text", "nobody")])
    config = TrainConfig(dataset="rows.csv", eval_dataset="eval.csv", group_by="author")
    dataset = load_dataset(config)
    assert "author 3" not in {authors[text] for text in dataset.train}
    assert dataset.counts.in_eval_dataset == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"group_by": "writer"},
            "rows.csv has no column 'writer' to group rows by: its columns are text, author",
        ),
        ({"group_by": "author", "where": ["author=author 1"]}, "5 usable rows in 1 groups of 200 .* add groups"),
    ],
)
def test_wrong_group_is_refused(settings, message):
    write_authors("rows.csv")
    with pytest.raises(DataError, match=message):
        load_dataset(TrainConfig(dataset="rows.csv", **settings))


# Several datasets


def write_sources(sizes=(60, 40, 30)):
    """Write a file of rows for each size, each row with its file's name."""
    for name, size in zip("abc", sizes, strict=False):
        rows = [f"{name} {text}" for text in tiny_models.reviews(size, seed=ord(name))]
        with open(f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": row}) + "\n" for row in rows)


def test_mix_keeps_shares_at_every_length():
    weights = [0.5, 0.3, 0.2]
    counts = Counter()
    for length, number in enumerate(islice(mix(weights), 10_000), 1):
        counts[number] += 1
        assert all(abs(counts[source] - weight * length) <= 1 for source, weight in enumerate(weights))


def test_mixed_lists_keep_order_and_all():
    mixed = mix_lists(["aaaa", "bb", ""], [1, 1, 5])
    assert "".join(mixed) == "ababaa"


def test_several_datasets_are_one():
    write_sources()
    dataset = load_dataset(TrainConfig(dataset=["a.jsonl", "b.jsonl"]))
    assert dataset.name == "a.jsonl + b.jsonl"
    assert [source.counts.read for source in dataset.sources] == [60, 40]
    assert dataset.counts.read == 100
    assert {text[0] for text in dataset.sources[1].train} == {"b"}
    alone = [load_dataset(TrainConfig(dataset=f"{name}.jsonl")).held_out for name in "ab"]
    assert set(dataset.held_out) == {text for texts in alone for text in texts}
    assert dataset.held_out_sources == {text: number for number, texts in enumerate(alone) for text in texts}


def test_copy_counts_as_duplicate_across_datasets():
    write_sources()
    with open("b.jsonl", "a", encoding="utf-8") as file, open("a.jsonl", encoding="utf-8") as other:
        file.writelines(islice(other, 7))
    dataset = load_dataset(TrainConfig(dataset=["a.jsonl", "b.jsonl"]))
    assert [source.counts.duplicates for source in dataset.sources] == [0, 7]


def test_measured_rows_have_shares_of_weights():
    write_sources((300, 300, 300))
    dataset = load_dataset(TrainConfig(dataset=["a.jsonl=6", "b.jsonl=3", "c.jsonl=1"]))
    assert Counter(text[0] for text in dataset.held_out[:30]) == {"a": 18, "b": 9, "c": 3}


@pytest.mark.parametrize(
    ("datasets", "expected"),
    [
        (["a.jsonl"], [("a.jsonl", None)]),
        ("a.jsonl", [("a.jsonl", None)]),
        (["a.jsonl=0.7", "b.jsonl=3e-1"], [("a.jsonl", 0.7), ("b.jsonl", 0.3)]),
        (["lang=en/a.jsonl", "owner/name"], [("lang=en/a.jsonl", None), ("owner/name", None)]),
        (["x=1", "b.jsonl"], [("x=1", None), ("b.jsonl", None)]),
    ],
)
def test_weights_are_read(tmp_path, datasets, expected):
    (tmp_path / "x=1").mkdir()
    config = TrainConfig(dataset=datasets)
    assert config.weighted_datasets == expected
    (tmp_path / "run.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert resolve_settings(TrainConfig, {}, tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        (["a.jsonl=0.5", "b.jsonl"], "b.jsonl has no weight: give all a weight, or none"),
        (["a.jsonl=0", "b.jsonl=1"], "a weight is a number above 0"),
        (["a.jsonl=-1", "b.jsonl=1"], "a weight is a number above 0"),
        (["a.jsonl=nan", "b.jsonl=1"], "a weight is a number above 0"),
        (["a.jsonl", "a.jsonl"], "a dataset is named twice"),
        (["=1", "a.jsonl=2"], "a dataset is named twice, or has no name"),
        (["a.jsonl=1"], "a weight needs several datasets"),
        ([], "no dataset is named"),
    ],
)
def test_wrong_weights_are_refused(datasets, message):
    with pytest.raises(ConfigError, match=message):
        resolve_settings(TrainConfig, {"dataset": datasets})
