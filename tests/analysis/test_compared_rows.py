"""Training rows and unseen rows that are compared."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from lora_tuner import EvalSet, TrainConfig
from lora_tuner.adapters.adapter import load_adapter_folder
from lora_tuner.adapters.manifest import RunInfo
from lora_tuner.analysis import compared_rows
from lora_tuner.analysis.compared_rows import choose_rows
from lora_tuner.analysis.subject import ReportSubject
from lora_tuner.config import HELD_OUT_MAX_TOKENS
from lora_tuner.data import tokenization
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.splitting import is_held_out, row_hash
from lora_tuner.errors import DataError

from .. import adapter_files, tiny_models
from .test_report import OPTIONS

SALT = "lora_tuner"


def subject_of(tmp_path, seen=None, **settings):
    """An adapter of a configuration whose run has seen all rows, or these."""
    config = TrainConfig(max_steps=1, batch_size=1, **settings)
    dataset = load_dataset(config)
    facts = adapter_files.manifest()
    run = RunInfo.model_validate(
        facts.run.model_dump() | {"kept_step": 10 if seen is None else 1, "sequences": 10}
    )
    counts = {"train": len(dataset.train)}
    data = facts.data.model_copy(update={"counts": counts, "eval_dataset": config.other_eval_dataset})
    facts = facts.model_copy(update={"run": run, "data": data})
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "made", facts=facts))
    held_out = dataset.held_out[: config.eval_rows]
    rows = EvalSet("made", held_out, groups=dataset.groups_of(held_out))
    return ReportSubject(adapter, rows, dataset.train if seen is None else seen, None, config, OPTIONS)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_models.tokenizer()


def write_rows(path, texts, **columns):
    rows = [
        {"text": text} | {name: values[number] for name, values in columns.items()}
        for number, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_compared_rows_have_their_places(tmp_path, tokenizer):
    texts = tiny_models.reviews(300)
    subject = subject_of(tmp_path, dataset=write_rows(tmp_path / "rows.jsonl", texts))
    chosen = choose_rows(subject, tokenizer)
    assert chosen.unequal is None
    assert chosen.seen_tokens == HELD_OUT_MAX_TOKENS
    for row in chosen.rows:
        number = int(row.place.removeprefix("rows.jsonl line "))
        assert texts[number - 1] == row.text
        assert row.is_train is not is_held_out(row_hash(row.text, SALT))
    training = [row for row in chosen.rows if row.is_train]
    assert len(training) == compared_rows.MAX_TRAINING_ROWS
    assert len(chosen.rows) - len(training) == len(subject.held_out.texts)
    assert len({row.unit for row in chosen.rows}) == len(chosen.rows)
    assert choose_rows(subject, tokenizer) == chosen


def test_groups_have_equal_rates(tmp_path, tokenizer):
    """Of 15 rows a group, of which held-out groups have measured rows alone."""
    texts = tiny_models.reviews(1_500)
    authors = [f"author {number % 100}" for number in range(1_500)]
    data = write_rows(tmp_path / "rows.jsonl", texts, author=authors)
    subject = subject_of(tmp_path, dataset=data, group_by="author", eval_rows=100)
    chosen = choose_rows(subject, tokenizer)
    author_of = dict(zip(texts, authors, strict=True))
    units = {}
    for row in chosen.rows:
        units.setdefault(row.unit, []).append(row)
    for rows in units.values():
        assert len({author_of[row.text] for row in rows}) == len({row.is_train for row in rows}) == 1
    sizes = [[len(rows) for rows in units.values() if rows[0].is_train is side] for side in (True, False)]
    assert np.mean(sizes[0]) == pytest.approx(np.mean(sizes[1]), rel=0.35)
    assert np.mean(sizes[0]) < 9  # of 15


def test_documents_are_compared_in_parts(tmp_path, tokenizer):
    (tmp_path / "notes").mkdir()
    for number in range(40):
        text = " ".join(f"word{number}x{position} is here." for position in range(400))
        (tmp_path / "notes" / f"{number}.md").write_text(text)
    subject = subject_of(tmp_path, dataset=str(tmp_path / "notes"), eval_rows=30)
    chosen = choose_rows(subject, tokenizer)
    assert chosen.unequal is None
    lengths = {side: [len(row.text) for row in chosen.rows if row.is_train is side] for side in (True, False)}
    assert np.mean(lengths[True]) == pytest.approx(np.mean(lengths[False]), rel=0.2)
    assert max(lengths[True]) < 4_000
    documents = {side: {row.place for row in chosen.rows if row.is_train is side} for side in (True, False)}
    assert not documents[True] & documents[False]
    assert len(documents[True]) == len({row.unit for row in chosen.rows if row.is_train})


def test_unfinished_epoch_compares_single_chunks(tmp_path, tokenizer):
    """The long rows of both sides are left out, of which a run sees a part more often."""
    texts = tiny_models.reviews(300)
    data = write_rows(tmp_path / "rows.jsonl", texts)
    seen = [text for text in texts if not is_held_out(row_hash(text, SALT))][:150]
    subject = subject_of(tmp_path, seen, dataset=data, max_length=48)
    chosen = choose_rows(subject, tokenizer)
    lengths = [len(row) for row in tokenization.encode_texts(tokenizer, [row.text for row in chosen.rows])]
    assert max(lengths) <= 48
    assert {row.text for row in chosen.rows if row.is_train} <= {*seen}
    strata = {}
    for row, length in zip(chosen.rows, lengths, strict=True):
        strata.setdefault(row.stratum, []).append(length)
    ranges = sorted((min(each), max(each)) for each in strata.values())
    assert len(ranges) == 5
    assert all(first[1] < second[0] for first, second in itertools.pairwise(ranges))
    whole = dataclasses.replace(subject, config=subject.config.model_copy(update={"long_rows": "truncate"}))
    chosen = choose_rows(whole, tokenizer)
    lengths = [len(row) for row in tokenization.encode_texts(tokenizer, [row.text for row in chosen.rows])]
    assert max(lengths) > 48
    assert chosen.seen_tokens == 48  # what is cut was not seen
    none = dataclasses.replace(subject, train_texts=[max(texts, key=len)])
    with pytest.raises(DataError, match="two training rows that it has seen as a whole and two"):
        choose_rows(none, tokenizer)


def test_near_duplicates_are_not_compared(tmp_path, tokenizer):
    texts = [" ".join(f"w{number}x{position}" for position in range(30)) for number in range(80)]
    held_out = next(text for text in texts if is_held_out(row_hash(text, SALT)))
    trained = next(text for text in texts if not is_held_out(row_hash(text, SALT)))
    copies = [
        next(copy for copy in copies if not is_held_out(row_hash(copy, SALT)))
        for text in (held_out, trained)
        for copies in [(f"{text} again {number}" for number in range(50))]
    ]
    subject = subject_of(tmp_path, dataset=write_rows(tmp_path / "rows.jsonl", texts + copies))
    assert copies[0] not in subject.train_texts  # training leaves it out
    rows = {row.text: row.copies for row in choose_rows(subject, tokenizer).rows}
    expected = {held_out: 1, trained: 1, copies[1]: 1}
    assert rows == {text: expected.get(text, 0) for text in rows}
    assert expected.keys() <= rows.keys()


def test_other_data_has_no_test(tmp_path, tokenizer):
    data = write_rows(tmp_path / "rows.jsonl", tiny_models.reviews(60))
    other = write_rows(tmp_path / "other.jsonl", tiny_models.reviews(40, seed=9))
    chosen = choose_rows(subject_of(tmp_path, dataset=data, eval_dataset=other), tokenizer)
    assert chosen.unequal == "the unseen rows are of other.jsonl, which is other data"
    (tmp_path / "novel.txt").write_text(" ".join(tiny_models.reviews(600)))
    subject = subject_of(tmp_path, dataset=str(tmp_path / "novel.txt"), txt_rows="file")
    chosen = choose_rows(subject, tokenizer)
    assert "blocks of a text" in chosen.unequal
    assert {row.place for row in chosen.rows if row.is_train} == {"novel.txt"}
    assert max(len(row.text) for row in chosen.rows) < 4_000
