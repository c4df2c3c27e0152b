"""Other data to evaluate on is read with the settings of the adapters, or it is said that it is not."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from lora_tuner import TrainConfig, train
from lora_tuner.adapters.adapter import RUN_FILE
from lora_tuner.cli import options
from lora_tuner.cli.options import eval_sets_from
from lora_tuner.data import chat
from lora_tuner.errors import DataError

from ..data_files import TEXTS, jsonl, table


@pytest.fixture(scope="module")
def adapter(gpt2, caches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "reviews.csv").write_text(table())
    config = TrainConfig(
        base=str(gpt2),
        dataset=str(folder / "reviews.csv"),
        adapters_dir=folder / "adapters",
        runs_dir=folder / "runs",
        max_steps=1,
        max_length=32,
        eval_rows=2,
        learning_rate=0.01,
        device="cpu",
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LORA_TUNER_CACHE", str(caches / "own"))
        return train(config)


@pytest.fixture
def told(monkeypatch):
    notices = []
    monkeypatch.setattr(options, "display", lambda event: notices.append(event.text))
    return notices


def trained_with(adapter, name="reviews", **changes):
    """The adapter as if its data had been read with other settings."""
    folder = Path(name)
    folder.mkdir()
    run = yaml.safe_load((adapter.path / RUN_FILE).read_text()) | changes
    (folder / RUN_FILE).write_text(yaml.safe_dump(run))
    known = {key: value for key, value in changes.items() if key not in ("format", "objective")}
    data = adapter.manifest.data.model_copy(update={"clean": None} | known)
    return dataclasses.replace(adapter, path=folder, manifest=adapter.manifest.model_copy(update={"data": data}))


def test_objective_reads_other_preferences(adapter, told, tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": text, "rejected": "no"} for n, text in enumerate(TEXTS)]
    (tmp_path / "b.jsonl").write_text(jsonl(rows))
    preferring = trained_with(adapter, objective="dpo", clean="none")
    (eval_set,) = eval_sets_from({"eval_dataset": "b.jsonl"}, 200, [preferring])
    assert sorted(chat.decode_row(text)["completion"] for text in eval_set.texts) == sorted(TEXTS)
    assert told[0] == "b.jsonl is read as the data of reviews was: --objective dpo --clean none."
    (tmp_path / "c.csv").write_text(table())
    assert eval_sets_from({"eval_dataset": "c.csv"}, 200, [preferring])[0].texts  # as text


POEMS = [f"{text}\nsecond line" for text in TEXTS]


def test_trained_settings_read_other_data(adapter, told, tmp_path):
    (tmp_path / "b.csv").write_text("Body;kind\n" + "".join(f'"{poem}";x\n' for poem in POEMS))
    lines = trained_with(adapter, clean="lines", text_column="body", delimiter=",")
    (eval_set,) = eval_sets_from({"eval_dataset": "b.csv"}, None, [lines])
    assert sorted(eval_set.texts) == sorted(POEMS)
    assert told[0] == "b.csv is read as the data of reviews was: --text-column body --clean lines."
    (eval_set,) = eval_sets_from(
        {"eval_dataset": "b.csv", "clean": "full", "template": "{kind} {Body}"}, None, [lines]
    )
    assert sorted(eval_set.texts) == sorted(f"x {' '.join(poem.split())}" for poem in POEMS)


def test_template_and_file_settings_are_those_of_training(adapter, told, tmp_path):
    template = {"template": "Q: {q}\nA: {a}", "answer_column": "a"}
    (tmp_path / "b.csv").write_bytes(b"q^a\n" + b"".join(f"\u0442 {n}^{n}\n".encode("cp1251") for n in range(9)))
    chosen = trained_with(adapter, **template, delimiter="^", encoding="cp1251")
    (eval_set,) = eval_sets_from({"eval_dataset": "b.csv"}, None, [chosen])
    assert all("Q: \u0442 " in text and '"answer": [' in text for text in eval_set.texts)
    assert "--delimiter '^' --encoding cp1251" in told[0]
    (tmp_path / "c.csv").write_text("q;a\n" + "".join(f"\u0442 {n};{n}\n" for n in range(9)))
    chosen = trained_with(adapter, "other", **template, delimiter="tab", encoding="cp1251")
    (eval_set,) = eval_sets_from({"eval_dataset": "c.csv"}, None, [chosen])
    assert all("Q: \u0442 " in text for text in eval_set.texts)


def test_settings_that_do_not_fit_are_told(adapter, told, tmp_path):
    (tmp_path / "b.jsonl").write_text(jsonl({"text": poem} for poem in POEMS))
    chosen = trained_with(adapter, clean="lines", text_column="body")
    (eval_set,) = eval_sets_from({"eval_dataset": "b.jsonl"}, None, [chosen])
    assert sorted(eval_set.texts) == sorted(POEMS)
    assert told[0] == "b.jsonl is read as the data of reviews was: --clean lines."
    assert told[1].startswith(
        "Not read so, as b.jsonl has other columns: --text-column body. b.jsonl has no column 'body': its columns are 'text' ("
    )
    (tmp_path / "c.txt").write_text("\n".join(TEXTS))
    assert len(eval_sets_from({"eval_dataset": "c.txt"}, None, [chosen])[0].texts) == len(TEXTS)
    with pytest.raises(DataError, match=r"There is no dataset 'd\.csv'"):
        eval_sets_from({"eval_dataset": "d.csv"}, None, [chosen])


def test_adapters_that_differ_are_told(adapter, told, tmp_path):
    (tmp_path / "b.jsonl").write_text(jsonl({"text": poem} for poem in POEMS))
    two = [trained_with(adapter, clean="lines"), trained_with(adapter, "other", clean="full")]
    (eval_set,) = eval_sets_from({"eval_dataset": "b.jsonl"}, None, two)
    assert sorted(eval_set.texts) == sorted(" ".join(poem.split()) for poem in POEMS)
    assert told[0] == (
        "The adapters' data was read in several ways (reviews: --clean lines; other: --clean full), b.jsonl in none of them: "
        "give --clean."
    )
