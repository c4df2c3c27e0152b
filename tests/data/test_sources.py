"""Split files of a local folder: which are read, which are measured, and that test selects nothing."""

import json

import datasets
import pytest

from lora_tuner.config import HELD_OUT, TrainConfig
from lora_tuner.data.dataset import RowCounts, load_dataset, load_eval_dataset
from lora_tuner.data.sources import local_splits, resolve_eval_dataset, split_of
from lora_tuner.errors import ConfigError, DataError
from lora_tuner.settings_files import resolve_settings

from .. import tiny_models
from ..data_files import jsonl

TRAIN, VALIDATION, TEST, OTHER = (tiny_models.reviews(count, seed=count) for count in (40, 21, 22, 23))
ROWS = {"train": TRAIN, "validation": VALIDATION, "test": TEST, "other": OTHER, "eval": VALIDATION}


@pytest.fixture
def folder(tmp_path):
    """Write files of texts, by a name in the folder and the rows that they hold."""

    def write(**files):
        for name, kind in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("parquet"):
                datasets.Dataset.from_dict({"text": ROWS[kind]}).to_parquet(str(path))
            elif name.endswith(".csv"):
                path.write_text("text\n" + "\n".join(ROWS[kind]) + "\n")
            else:
                path.write_text(jsonl({"text": text} for text in ROWS[kind]))
        return "data"

    return write


def trained(dataset):
    return {name for name, texts in ROWS.items() if set(dataset.train) & set(texts)}


LAYOUTS = {  # files -> the split that is measured
    "hub clone": (
        {
            "data/train-00000-of-00001.parquet": "train",
            "data/test-00000-of-00001.parquet": "test",
            "README.md": "other",
        },
        "test",
    ),
    "three files": ({"train.jsonl": "train", "valid.jsonl": "validation", "test.jsonl": "test"}, "validation"),
    "names": ({"my_train.csv": "train", "my-dev.csv": "validation", "my.test2.csv": "test"}, "validation"),
    "folders": (
        {"Train/a.jsonl": "train", "testing/x/b.jsonl": "test", "val/c.jsonl": "validation"},
        "validation",
    ),
    "evaluation": ({"training.jsonl": "train", "evaluation.jsonl": "eval", "test.jsonl": "test"}, "eval"),
    "no train": ({"reviews.jsonl": "train", "test/part1.csv": "test"}, "test"),
    "rest": ({"train.jsonl": "train", "test.jsonl": "test", "old.jsonl": "other"}, "test"),
    "no measure": ({"train-1.jsonl": "train", "old.jsonl": "other"}, None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_files_are_kept_apart(folder, layout):
    files, measured = LAYOUTS[layout]
    dataset = load_dataset(TrainConfig(dataset=folder(**files)))
    assert trained(dataset) == {"train"}
    assert (dataset.eval_dataset, dataset.eval_split) == (measured and "data", measured)
    expected = set(ROWS[measured]) if measured else set(TRAIN) - set(dataset.train)
    assert set(dataset.held_out) == expected
    assert dataset.counts.read == 40


def test_split_choice_is_said(folder):
    notices = []
    name = folder(**{"train.csv": "train", "dev.csv": "validation", "test.csv": "test", "a/old.csv": "other"})
    dataset = load_dataset(TrainConfig(dataset=name), lambda notice: notices.append(notice.text))
    assert notices == [
        "data has splits: train is trained on, and validation is measured; not read: test. Use --eval-dataset held-out to "
        "measure rows held out of the training data.",
        "Skipped 1 data file in data not named after a split, such as a/old.csv.",
        "Evaluation on data (validation): 21 usable rows of 21.",
    ]
    assert dataset.splits == "train, measured: validation, not read: test"


def test_option_split_chooses_files(folder):
    name = folder(**{"train.csv": "train", "dev.csv": "validation", "test.csv": "test"})
    assert trained(load_dataset(TrainConfig(dataset=name, split="train"))) == {"train"}
    dataset = load_dataset(TrainConfig(dataset=name, split="test"))
    assert (trained(dataset), set(dataset.held_out)) == ({"test"}, set(VALIDATION))
    with pytest.raises(DataError) as error:
        load_dataset(TrainConfig(dataset=name, split="extra"))
    assert str(error.value) == (
        "data has no files that are named after a split 'extra': choose one with --split: validation, test, train."
    )


def test_copies_of_measured_rows_are_not_trained_on(folder):
    name = folder(**{"train.jsonl": "train", "test.jsonl": "test"})
    alone = load_dataset(TrainConfig(dataset="data/train.jsonl"))
    with open("data/test.jsonl", "a") as file:
        file.write(jsonl({"text": text} for text in alone.train[:5]))
    dataset = load_dataset(TrainConfig(dataset=name))
    assert dataset.train == alone.train[5:]
    assert dataset.counts == RowCounts(
        read=40, in_eval_dataset=5, train=len(dataset.train), held_out=len(alone.held_out)
    )


def test_single_file_ignores_its_siblings(folder):
    folder(**{"train.jsonl": "train", "test.jsonl": "test", "validation.jsonl": "validation"})
    dataset = load_dataset(TrainConfig(dataset="data/train.jsonl"))
    assert set(dataset.train + dataset.held_out) == set(TRAIN)
    assert (dataset.splits, dataset.eval_dataset) == ("", None)


def test_eval_dataset_wins_over_split_files(folder, tmp_path):
    name = folder(**{"train.jsonl": "train", "validation.jsonl": "validation"})
    (tmp_path / "other.json").write_text(json.dumps(OTHER))
    assert set(load_dataset(TrainConfig(dataset=name, eval_dataset="other.json")).held_out) == set(OTHER)
    dataset = load_dataset(TrainConfig(dataset=name, eval_dataset=HELD_OUT))
    assert set(dataset.train + dataset.held_out) == set(TRAIN)


def test_eval_dataset_folder_has_splits(folder, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(OTHER))
    name = folder(**{"train.jsonl": "train", "dev.jsonl": "validation", "test.jsonl": "test"})
    for split, texts in ((None, VALIDATION), ("test", TEST), ("train", TRAIN)):
        config = TrainConfig(dataset="own.json", eval_dataset=name, eval_split=split)
        assert set(load_dataset(config).held_out) == set(texts)
        assert {row.text for row in load_eval_dataset(config).values()} == set(texts)
    with pytest.raises(DataError) as error:
        load_eval_dataset(TrainConfig(eval_dataset=name, eval_split="extra"))
    assert str(error.value) == (
        "data has no files that are named after a split 'extra'; choose one of its splits: validation, test, train."
    )
    with pytest.raises(DataError, match="--eval-dataset held-out means rows of the training data"):
        load_eval_dataset(TrainConfig(eval_dataset=HELD_OUT))


def test_folder_without_train_files_is_refused(folder):
    notices = []
    name = folder(**{"test-1.jsonl": "test", "dev.jsonl": "validation"})
    with pytest.raises(
        DataError, match=r"no files that are named after a split 'train': choose one with --split: "
    ):
        load_dataset(TrainConfig(dataset=name), lambda notice: notices.append(notice.text))
    assert notices == []


# Nothing is selected on test


@pytest.mark.parametrize("given", [None, "data"])
def test_patience_never_selects_on_test(folder, tmp_path, given):
    notices = []
    name = folder(**{"train.jsonl": "train", "test.jsonl": "test"})
    (tmp_path / "data" / "test.jsonl").write_text("not read\n")
    config = TrainConfig(dataset=name, eval_dataset=given, eval_every=1, patience=1)
    dataset = load_dataset(config, lambda notice: notices.append(notice.text))
    assert set(dataset.train + dataset.held_out) == set(TRAIN)
    assert (dataset.eval_dataset, dataset.splits) == (HELD_OUT, "train, not read: test")
    assert notices == [
        "data has a test split and none for validation: as --patience selects a step by the rows that are measured, test is "
        "not read, and rows held out of the training data are measured."
    ]


def test_patience_selects_on_validation(folder):
    name = folder(**{"train.jsonl": "train", "valid.jsonl": "validation", "test.jsonl": "test"})
    dataset = load_dataset(TrainConfig(dataset=name, eval_every=1, patience=1))
    assert set(dataset.held_out) == set(VALIDATION)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"eval_dataset": "data", "eval_split": "test"}, "data is a test split (test)"),
        ({"eval_dataset": "data/test.jsonl"}, "data/test.jsonl is a test split"),
        ({"eval_dataset": "owner/name", "eval_split": "test"}, "owner/name is a test split (test)"),
    ],
)
def test_selection_on_named_test_is_refused(folder, options, what):
    name = folder(**{"train.jsonl": "train", "test.jsonl": "test", "dev.jsonl": "validation"})
    config = TrainConfig(dataset=name, **options)
    for changes, selection in (({"eval_every": 1, "patience": 1}, None), ({}, "a sweep selects a trial")):
        with pytest.raises(ConfigError) as error:
            resolve_eval_dataset(config.model_copy(update=changes), print, selection)
        reason = selection or "--patience selects a step"
        assert str(error.value) == (
            f"{what}, and {reason} by the rows that are measured: measure a validation split, or held-out rows "
            "with --eval-dataset held-out."
        )


# Names of files


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.csv", "train"),
        ("TRAIN.parquet", "train"),
        ("training-00000-of-00012.parquet", "train"),
        ("squad.dev.json", "validation"),
        ("my validation set.txt", "validation"),
        ("val2.jsonl", "validation"),
        ("eval", "eval"),
        ("01_testing.tsv", "test"),
        ("latest.csv", None),
        ("trained.csv", None),
        ("contest-devices.txt", None),
        ("train_test.csv", None),
        ("evaluate.jsonl", None),
    ],
)
def test_split_name_is_a_whole_word(name, split):
    assert split_of(name) == split


def test_metadata_files_are_no_data(folder, load, tmp_path):
    names = ["dataset_info.json", "dataset_dict.json", "train/state.json", "config.json", "tokenizer_config.json"]
    names += [
        "metadata.csv",
        "README.txt",
        "LICENSE-MIT.txt",
        "package.json",
        "tokenizer.json",
        "train/data.arrow",
    ]
    folder(**dict.fromkeys(names, "other"))
    with pytest.raises(DataError, match=r"The folder data has no \.csv .* Of \.arrow files: they are a cache"):
        load_dataset(TrainConfig(dataset="data"))
    folder(**{"reviews.jsonl": "train", "states.csv": "validation"})
    dataset = load("data")
    assert "Skipped 11 other files in" in load.notices[0]
    assert dataset.counts.read == 61
    assert local_splits("data") == {}


def test_only_own_outputs_are_left_out(folder, load):
    """Other tools have files of the same names."""
    outputs = [
        "adapters/a/adapter_config.json",
        "adapters/a/adapter_model.safetensors",
        "adapters/a/metrics.jsonl",
    ]
    outputs += ["runs/b/run.yaml", "runs/b/manifest.json", "runs/b/c.jsonl", "runs/b.sweep/d.jsonl"]
    folder(**dict.fromkeys(outputs, "other"))
    folder(**dict.fromkeys(["a.jsonl", "sweep.yaml", "more/adapter_config.json"], "train"))
    folder(**{"more/b.jsonl": "validation"})
    assert load("data").counts.read == 61
    assert any("Skipped 5 other files in" in notice for notice in load.notices)


def test_run_yaml_repeats_the_measured_split(folder):
    name = folder(**{"train.jsonl": "train", "dev.jsonl": "validation"})
    resolved = resolve_eval_dataset(TrainConfig(dataset=name), print)
    assert (resolved.eval_dataset, resolved.eval_split) == ("data", "validation")
    assert resolve_eval_dataset(resolved, print) == resolved
    assert resolve_settings(TrainConfig, {"eval_dataset": "x", "eval_split": "dev"}).eval_split == "dev"
