"""The held-out split and the rows that are drawn: by the hash of each row, whatever else is in the file."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tuner.config import TrainConfig
from lora_tuner.data import splitting
from lora_tuner.data.cleaning import clean_text
from lora_tuner.data.dataset import load_dataset

from .. import tiny_models
from ..data_files import jsonl, rows


def write_json(folder, name, texts):
    path = folder / name
    path.write_text(json.dumps(texts))
    return str(path)


@pytest.fixture(scope="module")
def reviews():
    return tiny_models.reviews(4000)


def test_split_holds_out_a_fifth(load):
    texts = [f"row {number}" for number in range(4000)]
    dataset = load("a.json", json.dumps(texts))
    assert (dataset.counts.train, dataset.counts.held_out) == (3221, 779)
    train = set(dataset.train)
    assert dataset.train == [text for text in texts if text in train]  # in the order of the source
    assert train | set(dataset.held_out) == set(texts)


def test_split_ignores_order_and_seed(reviews, tmp_path):
    def held_out(name, texts, **options):
        return set(load_dataset(TrainConfig(dataset=write_json(tmp_path, name, texts), **options)).held_out)

    whole = held_out("a.json", reviews)
    assert held_out("b.json", reviews[::-1], seed=7) == whole
    assert held_out("c.json", [f"<b>{text}</b>\n" for text in reviews[:500]], rank=2) == whole & set(
        reviews[:500]
    )
    assert held_out("d.json", reviews, max_rows=1000) < whole


def test_split_matches_earlier_versions(load):
    """Adapters of earlier versions must stay comparable."""
    dataset = load("a.txt", "\n".join(f"row {number}" for number in range(20)))
    assert dataset.held_out == [f"row {number}" for number in (8, 16, 3, 7, 11, 12, 14)]


def test_held_out_order_ignores_file_order(reviews, tmp_path):
    first = load_dataset(TrainConfig(dataset=write_json(tmp_path, "a.json", reviews)))
    second = load_dataset(TrainConfig(dataset=write_json(tmp_path, "b.json", reviews[::-1])))
    assert first.held_out == second.held_out
    assert first.train != second.train
    assert first.hash() != second.hash()


def test_split_salt_changes_split(reviews, tmp_path):
    path = write_json(tmp_path, "a.json", reviews)
    first, second = (
        set(load_dataset(TrainConfig(dataset=path, split_salt=salt)).held_out) for salt in ("x", "y")
    )
    assert len(first & second) / len(first) == pytest.approx(0.2, abs=0.05)


def test_max_rows_samples_are_nested(reviews, tmp_path):
    path = write_json(tmp_path, "a.json", reviews)
    shuffled = write_json(tmp_path, "b.json", random.Random(1).sample(reviews, len(reviews)))
    smaller = load_dataset(TrainConfig(dataset=path, max_rows=1000))
    larger = load_dataset(TrainConfig(dataset=shuffled, max_rows=2000, seed=5))
    assert len(rows(smaller)) == 1000
    assert len(rows(larger)) == 2000
    assert set(smaller.train) < set(larger.train)
    assert set(smaller.held_out) < set(larger.held_out)
    assert smaller.counts.not_drawn == 3000
    for dataset in (smaller, larger):
        assert len(dataset.held_out) / len(rows(dataset)) == pytest.approx(0.2, abs=0.03)


def test_too_few_rows_fail(refusal):
    advice = "at least one of each is needed, so add rows, or give rows to measure on with --eval-dataset."
    assert refusal("a.txt", "row 8\n") == (
        f"a.txt: 1 usable row of 1 (0 empty, 0 duplicates), that is 0 to train on and 1 held out: {advice}"
    )
    assert refusal("a.json", json.dumps(["row 1", "row 1", ""])) == (
        f"a.json: 1 usable row of 3 (1 empty, 1 duplicate), that is 1 to train on and 0 held out: {advice}"
    )
    talk = {"prompt": "so? " * 500, "completion": "yes " * 500}
    assert refusal("a.jsonl", jsonl([talk])).endswith(advice)
    streamed = refusal("b.jsonl", jsonl({"text": f"row {number}"} for number in (1, 2)), streaming=True)
    assert streamed.endswith("that is 2 to train on and 0 held out: " + advice)


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1), (0, 1, 2, 4, 5)])
def test_unsplit_rows_hold_out_lowest_hash(load, numbers):
    texts = [f"row {number}" for number in numbers]
    dataset = load("a.json", json.dumps(texts))
    lowest = min(texts, key=lambda text: splitting.row_hash(text, "lora_tuner"))
    assert dataset.held_out == [lowest]
    assert dataset.train == [text for text in texts if text != lowest]
    assert "holds out none of" in load.notices[-1]
    assert (dataset.counts.train, dataset.counts.held_out) == (len(texts) - 1, 1)


def test_all_held_out_trains_highest_hash(load):
    texts = [f"row {number}" for number in (8, 16, 3)]  # in hash order
    dataset = load("a.json", json.dumps(texts))
    assert (dataset.train, dataset.held_out) == (["row 3"], ["row 8", "row 16"])
    assert "the highest hash is trained on" in load.notices[-1]


NOVELS = {
    "prose": " ".join(f"Sentence {number} is here." for number in range(3000)),
    "short": " ".join(f"Sentence {number} is here." for number in range(50)),
    "no spaces": "字" * 20_000,
    "CJK": "".join(f"第{number}句话。" for number in range(4000)),
}


@pytest.mark.parametrize("kind", NOVELS)
def test_single_text_holds_out_blocks(load, kind):
    novel = NOVELS[kind]
    dataset = load("a.json", json.dumps([novel]))
    train, held_out = (
        [text.removesuffix(splitting.GOES_ON) for text in texts] for texts in (dataset.train, dataset.held_out)
    )
    assert sum(map(len, held_out)) == pytest.approx(len(novel) / 5, rel=0.2)
    assert sum(map(len, train)) > 0.7 * len(novel)
    assert len(held_out) >= 2
    if kind != "no spaces":  # each place of the text is known by its number
        places = sorted((novel.index(text), text in train, len(text)) for text in train + held_out)
        for (place, side, length), (next_place, next_side, _) in itertools.pairwise(places):
            assert (next_place - place - length >= 100) if side != next_side else (next_place >= place + length)
        assert all(novel[place - 1] in " 。" for place, _, _ in places if place)
    assert load("a.json").held_out == dataset.held_out
    assert [text[-1] for text in dataset.train + dataset.held_out].count(splitting.GOES_ON) == len(
        train + held_out
    ) - 1
    assert "is one text" in load.notices[-1]
    assert dataset.counts.read == sum(vars(dataset.counts).values()) - dataset.counts.read


@given(
    st.text(alphabet=st.characters(), max_size=60)
    | st.text("ab \n\r\t\x0b\x1c\x85\u2028\u0301<br>&;#10", max_size=60)
)
@settings(max_examples=200, deadline=None)
def test_row_hash_ignores_kept_lines(text):
    flat, lines = clean_text(text), clean_text(text, "lines")
    assert splitting.row_hash(flat, "x") == splitting.row_hash(lines, "x")
    assert flat == " ".join(lines.split())


def test_split_ignores_kept_lines(load):
    content = jsonl({"text": text.replace(". ", ".\n")} for text in tiny_models.reviews(80))
    flat, lines = load("a.jsonl", content), load("a.jsonl", clean="lines")
    assert [" ".join(text.split()) for text in lines.train] == flat.train
    assert [" ".join(text.split()) for text in lines.held_out] == flat.held_out
    assert sum("\n" in text for text in rows(lines)) > 40
    assert not any("\n" in text for text in rows(flat))
