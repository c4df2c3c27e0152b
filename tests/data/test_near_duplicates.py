"""Near duplicates: which rows are some, and what becomes of training rows that nearly copy a held-out row."""

import itertools
import json
import random
import re

import pytest

from lora_tuner.config import TrainConfig
from lora_tuner.data import chat, near_duplicates
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.near_duplicates import NearDuplicates, clusters
from lora_tuner.data.rows import RowCounts
from lora_tuner.data.splitting import is_held_out, row_hash

from ..data_files import jsonl, rows

_WORDS = [
    "".join(syllables) for syllables in itertools.product(("ba", "ko", "ri", "tu", "se", "ma", "lo"), repeat=3)
]


def sentences(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(6, 14))).capitalize() + "." for _ in range(count)]


def texts(count, length=6, seed=0):
    """Texts of so many sentences."""
    return [" ".join(part) for part in zip(*[iter(sentences(count * length, seed))] * length, strict=True)]


ROWS = texts(40)


def replace_words(text, share, seed=1):
    draw, words = random.Random(seed), text.split()
    for index in draw.sample(range(len(words)), round(share * len(words))):
        words[index] = draw.choice(_WORDS).upper()
    return " ".join(words)


COPIES = {
    "words replaced": lambda text: replace_words(text, 0.15),
    "typing errors": lambda text: re.sub(r"(\w{40}.*?)(\w)(\w)", r"\1\3\2", text),
    "sentence dropped": lambda text: text.partition(". ")[2],
    "sentence added": lambda text: f"{text} {sentences(1, seed=5)[0]}",
    "sentences moved": lambda text: ". ".join(reversed(text.rstrip(".").split(". "))),
    "case and marks": lambda text: text.upper().replace(".", " !!"),
    "markup": lambda text: f"<p>{text.replace('. ', '.<br /><br />')}</p>",
    "white space": lambda text: text.replace(" ", " \t\n"),
    "prefix and suffix": lambda text: f"Update: {text} (edited)",
    "two thirds": lambda text: text[: len(text) * 2 // 3],
    "quoted": lambda text: f"{texts(1, 9, seed=6)[0]} They wrote: {text} {texts(1, 9, seed=7)[0]}",
    "names swapped": lambda text: text.replace(text.split()[3], "Anna").replace(text.split()[20], "Ben"),
}


@pytest.mark.parametrize("kind", COPIES)
def test_near_duplicates_are_found(kind):
    copies = [COPIES[kind](text) for text in ROWS]
    assert NearDuplicates(ROWS).find(copies) == list(range(40))
    assert NearDuplicates(copies).find(ROWS) == list(range(40))


def test_short_near_duplicates_are_found():
    """Of 8 to 14 words, one of them replaced, or another sentence behind it."""
    short = [text for text in sentences(60) if len(text.split()) >= 8]
    index, numbers = NearDuplicates(short), list(range(len(short)))
    assert index.find([text.replace(text.split()[2], "xyz") for text in short]) == numbers
    assert index.find([f"{text} Thanks again." for text in short]) == numbers
    assert index.find([f"{texts(1, seed=9)[0]} {text}" for text in short]) == numbers


def test_other_rows_are_no_copies():
    assert not any(NearDuplicates(ROWS).find_all(texts(300, seed=1)))
    assert not any(NearDuplicates(texts(200, 1, seed=2)).find_all(texts(1000, 1, seed=3)))
    half = [f"{first[: len(first) // 3]} {other}" for first, other in zip(ROWS, texts(40, seed=1), strict=True)]
    assert not any(NearDuplicates(ROWS).find_all(half))


def test_rows_under_five_words_are_no_copies():
    index = NearDuplicates(["Yes.", "I do not know", "", "?!", "I really do not know"])
    assert index.find(["yes", "i do not know!", "", ":)", "I REALLY do not know..."]) == [None] * 4 + [4]


def test_rows_of_one_form_are_no_copies():
    form = "Dear team, order {} has not arrived yet, please tell me when it will be here. Regards, {}"
    numbers = random.Random(0).sample(range(10_000, 99_999), 200)
    filled = [form.format(number, name) for number, name in zip(numbers, _WORDS, strict=False)]
    assert not any(NearDuplicates(filled[:50]).find_all(filled[50:]))
    assert not any(NearDuplicates(filled[:2]).find_all(filled[2:]))  # also in a few rows
    header = "You are a helpful agent of a shop. Answer in two sentences and never promise a date. "
    bodies = texts(60, 2)
    index = NearDuplicates([header + text for text in bodies[:50]])
    assert not any(index.find_all([header + text for text in texts(60, 2, seed=1)]))
    copies = [header + replace_words(text, 0.1) for text in bodies[:50]]
    assert index.find(copies) == list(range(50))


def test_characters_without_spaces_are_words():
    draw = random.Random(0)
    signs = [chr(draw.randrange(0x4E00, 0x5E00)) for _ in range(800)]
    lines = ["".join(draw.choices(signs, k=60)) + "。" for _ in range(60)]
    index = NearDuplicates(lines[:30])
    edited = [f"{line[:20]}猫犬{line[22:45]}鳥{line[46:]}" for line in lines[:30]]
    assert index.find(edited) == list(range(30))
    assert index.find([line[:40] for line in lines[:30]]) == list(range(30))
    assert not any(index.find_all(lines[30:]))
    thai = "ภาพยนตร์เรื่องนี้ดีมากและนักแสดงเล่นได้ยอดเยี่ยมจนฉันอยากดูอีกครั้ง"
    assert NearDuplicates([thai, *ROWS]).find([thai.replace("ดีมาก", "แย่มาก")]) == [0]


def test_conversations_are_compared_by_what_is_said():
    def row(system, question, answer):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return chat.encode_messages([{"role": "system", "content": system}, *messages], str.strip)

    rules = texts(1, 20, seed=8)[0]
    index = NearDuplicates([row(rules, *pair) for pair in zip(ROWS[:20], ROWS[20:], strict=True)])
    assert index.find([row("Other.", replace_words(ROWS[3], 0.1), ROWS[23])]) == [3]
    assert index.find([row(rules, *texts(2, seed=1))]) == [None]
    pair = chat.encode_pair(ROWS[3], replace_words(ROWS[23], 0.1), str.strip)
    assert index.find([pair]) == [3]
    assert index.find([chat.encode_answer(f"{ROWS[3]} {ROWS[23]}", (0, 9))]) == [3]


def test_result_depends_on_text_and_rows_alone(monkeypatch):
    copies = [*(COPIES["words replaced"](text) for text in ROWS), *texts(20, seed=1), *ROWS[:5]]
    expected = NearDuplicates(ROWS).find_all(copies)
    assert [NearDuplicates(ROWS).find_all([text])[0] for text in reversed(copies)] == expected[::-1]
    monkeypatch.setattr(near_duplicates, "_BATCH_CHARS", 500)
    monkeypatch.setattr(near_duplicates, "_BATCH_PAIRS", 100)
    monkeypatch.setattr(near_duplicates, "_MAX_CACHED_WORDS", 5)
    assert NearDuplicates(ROWS).find_all(copies) == expected
    assert near_duplicates._word_hashes["film"] == 2185543202  # as in every process and on every machine


def test_nearest_row_comes_first():
    index = NearDuplicates([replace_words(ROWS[0], 0.2), *ROWS[1:], ROWS[0]])
    assert index.find_all([replace_words(ROWS[0], 0.05)]) == [[40, 0]]


def test_no_rows_have_no_copies():
    assert NearDuplicates([]).find(["one two three four five six", ""]) == [None, None]
    assert NearDuplicates(["", "?"]).find(["one two three four five six", ""]) == [None, None]
    assert NearDuplicates(["one two three four five \ud800"]).find(["ONE two three four five \udc00"]) == [0]
    assert NearDuplicates(ROWS).find([]) == []
    assert clusters([]) == []


def test_clusters_are_found_in_order():
    spread = [ROWS[7], *ROWS[:7], *(replace_words(ROWS[7], 0.08, seed) for seed in range(9)), *texts(200, seed=1)]
    spread += [ROWS[2].lower(), replace_words(ROWS[2], 0.1)]
    assert clusters(spread) == [[0, *range(8, 17)], [3, 217, 218]]


# In a dataset


@pytest.fixture
def seeded():
    """300 rows, near duplicates of 30 of them behind these, and the copies of held-out rows that are not held out."""
    originals = texts(300)
    copies = {text: replace_words(text, 0.1) for text in random.Random(0).sample(originals, 30)}
    sides = {text: is_held_out(row_hash(text, "lora_tuner")) for text in [*originals, *copies.values()]}
    leaks = {copy for text, copy in copies.items() if sides[text] and not sides[copy]}
    leaks |= {text for text, copy in copies.items() if sides[copy] and not sides[text]}
    assert 5 <= len(leaks) < 15
    return [*originals, *copies.values()], leaks


def test_many_copies_say_why(load):
    copies = [replace_words(row, 0.05, seed) for row in ROWS[:12] for seed in range(6)]
    load("a.json", json.dumps([*copies, *texts(40, seed=1)]))
    assert load.notices[0].endswith(
        "; left out, as they would flatter the gain (--near-duplicates keep trains on them)."
    )


def test_training_copies_of_held_out_rows_are_left_out(load, seeded):
    records, leaks = seeded
    dataset = load("a.json", json.dumps(records))
    share = len(leaks) / (dataset.counts.train + len(leaks))
    assert len(leaks) > 1
    assert load.notices == [f"{len(leaks)} training rows nearly copy held-out ones ({share:.1%}); left out."]
    assert dataset.counts == RowCounts(
        read=330, near_duplicates=len(leaks), train=len(dataset.train), held_out=len(dataset.held_out)
    )
    assert set(records) - set(rows(dataset)) == leaks
    kept = load("a.json", near_duplicates="keep")
    assert load.notices == [
        f"{len(leaks)} training rows nearly copy held-out ones ({share:.1%}); they stay, as --near-duplicates keep says, and "
        "the gain is too good."
    ]
    assert (kept.counts.read, kept.counts.near_duplicates, rows(kept)) == (330, 0, sorted(records))
    assert dataset.held_out == kept.held_out
    assert {text for _, text in kept.previews} - {text for _, text in dataset.previews} <= leaks


def test_held_out_rows_stay_in_a_sample(load, seeded):
    records, leaks = seeded
    load("a.json", json.dumps(records))
    for size in (100, 200):
        dataset = load("a.json", max_rows=size)
        kept = load("a.json", max_rows=size, near_duplicates="keep")
        assert dataset.held_out == kept.held_out
        assert leaks >= set(kept.train) - set(dataset.train)


def test_copies_of_eval_dataset_are_left_out(load, tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps([COPIES["quoted"](text) for text in ROWS[:10]]))
    dataset = load("a.json", json.dumps(ROWS), eval_dataset=str(tmp_path / "eval.json"))
    alone = load("a.json")
    assert set(alone.train) - set(dataset.train) == set(alone.train) & set(ROWS[:10])
    assert dataset.counts.near_duplicates == len(alone.train) - len(dataset.train) > 4


def test_rows_that_all_copy_are_an_error(refusal, load):
    near = [replace_words(ROWS[0], 0.05, seed) for seed in range(8)]
    held_out = [text for text in near if is_held_out(row_hash(text, "lora_tuner"))]
    records = [text for text in near if text not in held_out] + held_out[:1]
    left = len(records) - 1
    assert refusal("a.json", json.dumps(records)) == (
        f"a.json: {left + 1} usable rows of {left + 1} (0 empty, 0 duplicates, {left} near duplicates of held-out rows), that is "
        "0 to train on and 1 held out: at least one of each is needed, so add rows, or give rows to measure on with "
        "--eval-dataset, or keep near duplicates with --near-duplicates keep."
    )
    assert len(load("a.json", near_duplicates="keep").train) == left


def test_stream_is_compared_with_measured_rows(load, seeded):
    records, leaks = seeded
    dataset = load("a.jsonl", jsonl({"text": text} for text in records), streaming=True, eval_rows=20)
    measured = dataset.held_out[:20]
    assert [row.text for row in dataset.compared] == measured
    copies = len(
        set(load_dataset(TrainConfig(dataset="a.jsonl", near_duplicates="keep")).train) - set(dataset.train)
    )
    assert 0 < dataset.counts.near_duplicates == copies < len(leaks)
    assert load.notices[-1] == (
        f"The rows of the stream are compared with the 20 held-out rows that are measured. Of the first "
        f"{dataset.counts.train + copies} training rows {copies} nearly copy one of these "
        f"({copies / (dataset.counts.train + copies):.1%}); left out, as are later ones."
    )
    kept = load("a.jsonl", streaming=True, eval_rows=20, near_duplicates="keep")
    assert kept.held_out == dataset.held_out
    assert f"{copies} nearly copy one of these" in load.notices[-1]
    assert load.notices[-1].endswith("; they stay, as --near-duplicates keep says, and the gain is too good.")


def test_rule_is_validated():
    with pytest.raises(ValueError, match="near_duplicates"):
        TrainConfig(near_duplicates="maybe")
