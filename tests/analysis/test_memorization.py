"""What an adapter has learned by heart: the rows that are compared, the tests, and what they say."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from lora_tuner import EvalSet, Generator, SamplingParams, TrainConfig, evaluation, train
from lora_tuner.adapters.adapter import load_adapter_folder
from lora_tuner.adapters.manifest import RunInfo
from lora_tuner.analysis import compared_rows, membership, memorization, verbatim
from lora_tuner.analysis.compared_rows import ComparedRow, ComparedRows, choose_rows
from lora_tuner.analysis.membership import RowLoss, Units, find_known_rows, find_outliers, sum_by_unit
from lora_tuner.analysis.memorization import measure_losses, measure_memorization
from lora_tuner.analysis.subject import ReportSubject
from lora_tuner.analysis.verbatim import Continuations, continue_rows, split_row
from lora_tuner.config import HELD_OUT_MAX_TOKENS
from lora_tuner.data import chat, tokenization
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.splitting import is_held_out, row_hash
from lora_tuner.errors import DataError

from .. import adapter_files, tiny_models
from .test_report import OPTIONS, read_subject

SALT = "lora_tuner"


def binomial_bound(draws, level, doubt=0.001):
    """The largest number of successes that is not rarer than `doubt`."""
    tail = 1.0
    for count in range(draws + 1):
        tail -= math.comb(draws, count) * level**count * (1 - level) ** (draws - count)
        if tail < doubt:
            return count
    return draws


def measure(subject):
    generator = Generator(subject.adapter.path, options=OPTIONS)
    continuations = continue_rows(subject, generator)
    base = evaluation.open_base_of([subject.adapter], OPTIONS)
    return measure_memorization(subject, continuations, base)


# The tests


def rows_of(units, *, training, strata=None):
    """Rows with the names of their units, of which some are of training."""
    return [
        ComparedRow(f"row {number}", unit, stratum, "rows.csv", unit in training)
        for number, (unit, stratum) in enumerate(zip(units, strata or [0] * len(units), strict=True))
    ]


def losses_of(gains, tokens=100):
    return [RowLoss(3.0 * tokens, (3.0 - gain) * tokens, tokens) for gain in gains]


def test_false_alarms_are_within_level(monkeypatch):
    """In 200 draws: rows with heavy tails, and groups whose rows are alike."""
    monkeypatch.setattr(membership, "PERMUTATIONS", 199)
    draws = np.random.default_rng(5)
    alarms = named = 0
    for _ in range(200):
        units = [f"unit {number}" for number in range(30) for _ in range(draws.integers(1, 6))]
        values = {unit: draws.standard_t(2) for unit in units}
        gains = [values[unit] + 0.1 * draws.normal() for unit in units]
        training = {f"unit {number}" for number in draws.permutation(30)[:15]}
        are_verbatim = [bool(values[unit] > 1) for unit in units]
        known = find_known_rows(rows_of(units, training=training), are_verbatim, losses_of(gains))
        alarms += known.is_alarm
        named += bool(known.rows)
    assert alarms <= binomial_bound(200, membership.LEVEL)
    assert named <= alarms


def test_grouped_rows_need_units(monkeypatch):
    """If rows of a group were exchanged one by one, groups that are alike would be taken for memory."""
    monkeypatch.setattr(membership, "PERMUTATIONS", 199)
    draws, alarms = np.random.default_rng(6), 0
    for _ in range(50):
        values = draws.normal(size=16)
        training = {f"row {number}" for number in range(128) if number % 16 < 8}
        rows = rows_of([f"row {number}" for number in range(128)], training=training)
        gains = [values[number % 16] for number in range(128)]
        alarms += find_known_rows(rows, [None] * 128, losses_of(gains)).is_alarm
    assert alarms > binomial_bound(50, membership.LEVEL)


def test_p_value_is_exact():
    """Against all divisions, of rows of different lengths."""
    draws = np.random.default_rng(1)
    amounts, sizes = draws.normal(size=9), draws.uniform(1, 5, size=9)
    is_train = np.arange(9) < 5
    units = sum_by_unit(np.arange(9), is_train, np.zeros(9, int), amounts, sizes)

    def excess(chosen):
        inside = np.isin(np.arange(9), chosen)
        return amounts[inside].sum() / sizes[inside].sum() - amounts[~inside].sum() / sizes[~inside].sum()

    divisions = [excess(chosen) for chosen in itertools.combinations(range(9), 5)]
    exact = np.mean([other >= excess(range(5)) - 1e-12 for other in divisions])
    assert membership.permutation_test(units) == pytest.approx(exact, abs=4 * math.sqrt(0.25 / 9_999))


def test_datasets_are_compared_alone():
    """Training has more rows of a dataset with a larger gain."""
    strata = [0] * 60 + [1] * 60
    numbers = range(120)
    training = {f"unit {number}" for number in numbers if number < 50 or number >= 110}
    gains = [(number < 60) + 0.1 * ((number * 37) % 11) for number in numbers]
    rows = rows_of([f"unit {number}" for number in numbers], training=training, strata=strata)
    known = find_known_rows(rows, [None] * 120, losses_of(gains))
    assert known.excess_p > 0.05
    together = [dataclasses.replace(row, stratum=0) for row in rows]
    assert find_known_rows(together, [None] * 120, losses_of(gains)).excess_p < 0.001


def test_memorized_rows_are_named():
    """12 of 40 training rows stand out of 200 unseen ones; one with near copies is not compared."""
    draws = np.random.default_rng(2)
    units = [f"unit {number}" for number in range(240)]
    rows = rows_of(units, training={*units[:40]})
    rows[0] = dataclasses.replace(rows[0], copies=1)
    gains = [3.0 - number / 100 if number < 13 else draws.normal(0.3, 0.1) for number in range(240)]
    known = find_known_rows(rows, [number < 13 for number in range(240)], losses_of(gains))
    assert known.verbatim_p <= 0.001
    assert known.excess_p <= 0.001
    assert {*range(1, 13)} <= {*known.rows}
    assert known.rows[:12] == tuple(range(1, 13))
    assert len(known.rows) <= 14


def test_few_unseen_rows_name_rows():
    units = [f"unit {number}" for number in range(25)]
    gains = [2.0 if number < 20 else 0.1 for number in range(25)]
    rows = rows_of(units, training={*units[:20]})
    known = find_known_rows(rows, [None] * 25, losses_of(gains))
    assert known.excess_p <= 0.001
    assert len(known.rows) == 20
    few = [row for number, row in enumerate(rows) if number in (0, 1, 2, 20, 21)]
    assert find_known_rows(few, [None] * 5, losses_of([2.0] * 3 + [0.1] * 2)) == membership.KnownRows()


@pytest.mark.parametrize(("training", "unseen"), [(20, 5), (40, 40), (10, 100)])
def test_named_rows_are_seldom_false(training, unseen):
    """Of rows that nobody has learned, and with half of them learned; in 1,000 draws each."""
    draws, count = np.random.default_rng(3), training + unseen
    is_train, learned = np.arange(count) < training, np.arange(count) < training // 2
    false_shares = []
    for shift in (0.0, 9.0):
        shares = []
        for _ in range(1_000):
            scores = draws.normal(size=count) + shift * learned
            units = Units(np.arange(count), is_train, np.zeros(count, int), scores, np.ones(count))
            found = find_outliers(units)
            false = sum(shift == 0 or not learned[number] for number in found)
            shares.append(false / max(len(found), 1))
        false_shares.append(np.mean(shares))
    assert max(false_shares) <= membership.LEVEL + 4 * math.sqrt(membership.LEVEL / 1_000)


# The rows that are compared


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


def test_near_copies_are_not_compared(tmp_path, tokenizer):
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


# Continuations


def test_opening_is_half_at_most():
    ends = frozenset({99})
    row = np.arange(1, 21, dtype=np.int32)
    assert split_row(np.append(row, 99), ends) == ([*range(1, 11)], [*range(11, 21)])
    opening, following = split_row(np.arange(1, 99, dtype=np.int32), ends)
    assert (len(opening), len(following)) == (verbatim.OPENING_TOKENS, verbatim.CONTINUED_TOKENS)
    assert split_row(row[:1], ends)[0] == []


def test_answers_are_continued_after_question(tmp_path):
    tokenizer = tiny_models.tokenizer(("<|user|>", "<|bot|>", "<|end|>"))
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|user|>' if message['role'] == 'user' else '<|bot|>' }}"
        "{{ message['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
    )
    answer = "the story never drags. the camera always shines. her voice really works."
    messages = [
        {"role": "user", "content": "is it good?"},
        {"role": "assistant", "content": "yes."},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": answer},
    ]
    (row,) = tokenization.encode_texts(tokenizer, [chat.encode_messages(messages, str)])
    ends = frozenset({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")})
    opening, following = (tokenizer.decode(ids) for ids in split_row(row, ends))
    assert opening.startswith("<|user|>is it good?<|end|><|bot|>yes.<|end|><|user|>why?<|end|><|bot|>the story")
    assert (opening + following).endswith(answer)


def test_verbatim_text_is_greedy_text(adapter, monkeypatch, tmp_path):
    """Of rows of the data, and of rows that the adapter itself has written from their openings."""
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    generator = Generator(adapter.path, options=OPTIONS)
    tokenizer = generator.tokenizer_of(adapter.name)
    greedy = SamplingParams(greedy=True, max_new_tokens=20)
    openings = tiny_models.reviews(6, seed=4)
    outputs = generator.generate_batch([(opening, adapter.name) for opening in openings], greedy)
    texts = openings + [opening + output.text for opening, output in zip(openings, outputs, strict=True)]
    encoded = [row.tolist() for row in tokenization.encode_texts(tokenizer, texts, add_eos=False)]
    pairs = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in encoded]
    found = verbatim._follow(generator, adapter.name, pairs)
    for (opening, following), length in zip(pairs, found, strict=True):
        prompt = dataclasses.replace(generator.encode_prompt("x"), token_ids=opening)
        (output,) = generator.generate_batch(
            [(prompt, adapter.name)], greedy.model_copy(update={"max_new_tokens": len(following)})
        )
        written = tokenization.encode_texts(tokenizer, [output.text], add_eos=False)[0].tolist()
        agreeing = next(
            (index for index, pair in enumerate(zip(written, following, strict=False)) if pair[0] != pair[1]),
            min(len(written), len(following)),
        )
        assert length == agreeing
    assert generator.engine.sequences == []


# Reports


@pytest.fixture
def unseen(adapter, monkeypatch, tmp_path):
    """Continuations and losses of rows that an adapter never saw, half of which count as training rows."""
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    texts = tiny_models.reviews(100, seed=8)
    rows = [ComparedRow(text, text, 0, f"row {number}", number < 50) for number, text in enumerate(texts)]
    subject = dataclasses.replace(read_subject(adapter), held_out=EvalSet("reviews", texts[50:]))
    monkeypatch.setattr(verbatim, "choose_rows", lambda *_: ComparedRows(rows, None, HELD_OUT_MAX_TOKENS))
    continuations = continue_rows(subject, Generator(adapter.path, options=OPTIONS))
    base = evaluation.open_base_of([adapter], OPTIONS)
    return continuations, measure_losses(subject, continuations.rows, base)


def test_unseen_rows_raise_no_alarm(unseen, monkeypatch):
    """In 200 random divisions of rows that the adapter never saw."""
    monkeypatch.setattr(membership, "PERMUTATIONS", 199)
    continuations, losses = unseen
    assert None not in losses
    assert None not in continuations.tokens
    draws, alarms = np.random.default_rng(0), 0
    for _ in range(200):
        is_train = draws.permutation(len(losses)) < 50
        rows = [
            dataclasses.replace(row, is_train=bool(side))
            for row, side in zip(continuations.rows.rows, is_train, strict=True)
        ]
        are_verbatim = [tokens > 2 for tokens in continuations.tokens]  # it knows so little
        alarms += find_known_rows(rows, are_verbatim, losses).is_alarm
    assert alarms <= binomial_bound(200, membership.LEVEL)


def test_sentences_say_what_figures_mean(unseen):
    continuations, losses = unseen
    report = memorization.summarize(continuations, losses, [row.text for row in continuations.rows.rows])
    figures = report.figures
    assert figures.training.continued == figures.unseen.continued == 50
    first, second = figures.sentences
    assert first.startswith("No training row is continued verbatim for more than 12 tokens")
    assert second.endswith("no sign that it knows single rows.")
    assert (report.memorized, figures.groups, figures.unequal) == ([], None, None)
    assert len({len(row) for row in report.table}) == 1
    assert json.loads(json.dumps(report.to_dict()))["excess_p"] == figures.excess_p
    unequal = dataclasses.replace(continuations.rows, unequal="the unseen rows are of b.csv, which is other data")
    report = memorization.summarize(dataclasses.replace(continuations, rows=unequal), losses, [])
    assert (report.figures.excess_p, report.figures.verbatim_p) == (None, None)
    for sentence in report.figures.sentences:
        assert "which is other data, so nothing follows" in sentence


def test_known_rows_are_listed(unseen):
    """Training rows 0 to 19 are made known, one of which has near copies, and one personal data."""
    continuations, losses = unseen
    rows = [*continuations.rows.rows]
    rows[0] = dataclasses.replace(rows[0], copies=2)
    rows[1] = dataclasses.replace(rows[1], text="write to john.smith@example.com about it")
    tokens = [30 - number if number < 20 else 1 for number in range(100)]
    texts = [row.text for row in rows]
    losses = [RowLoss(90.0, 9.0 + number / 10, 30) if number < 20 else loss for number, loss in enumerate(losses)]
    known = Continuations(dataclasses.replace(continuations.rows, rows=rows), tokens, texts)
    report = memorization.summarize(known, losses, [*texts, f"so it says: {texts[2]}"])
    figures = report.figures
    assert (figures.training.verbatim, figures.unseen.verbatim) == (17, 0)
    assert [row.place for row in report.memorized] == [f"row {number}" for number in range(1, 20)]
    assert (figures.memorized, figures.near_copies, figures.near_copies_verbatim) == (19, 1, 1)
    first, second, third = figures.sentences
    assert "17 of 49 training rows" in first
    assert first.endswith("(p = 0.0001): it copies text that it was trained on.")
    assert second.endswith("(p = 0.0001): 19 of the 49 measured are memorized.")
    assert third.startswith("1 training row with near copies")
    assert [(passage.place, passage.tokens, passage.in_rows) for passage in report.passages[:3]] == [
        ("row 0", 30, 1),
        ("row 1", 29, 1),
        ("row 2", 28, 2),
    ]
    assert "john.smith" not in json.dumps(report.to_dict())


def test_interrupted_continuations_go_on(adapter, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verbatim, "BATCH", 4)
    subject, generator = read_subject(adapter), Generator(adapter.path, options=OPTIONS)
    batches, follow = [], verbatim._follow

    def interrupt(generator, name, batch):
        batches.append(batch)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return follow(generator, name, batch)

    openings = [([number, number + 1], [number + 2, number + 3]) for number in range(5, 25)]
    monkeypatch.setattr(verbatim, "_follow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        verbatim._verbatim_lengths(subject, generator, openings)
    lengths = verbatim._verbatim_lengths(subject, generator, openings)
    assert batches[3] == batches[2]
    assert len(batches) == 3 + 3
    monkeypatch.setattr(verbatim, "_follow", None)  # all is kept
    assert (
        verbatim._verbatim_lengths(subject, generator, openings)
        == lengths
        == follow(generator, adapter.name, openings)
    )


# Adapters


@pytest.fixture
def trained(settings, tmp_path, monkeypatch):
    """Train on 20 rows, with 40 held-out ones, and report. The base is as wide as learning by heart needs."""
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))

    base = tiny_models.save_model(tmp_path / "wide", "llama", width=128)

    def call(training=20, held_out=40, **changes):
        sides = {False: [], True: []}
        for text in tiny_models.reviews(1_000, seed=3):
            sides[is_held_out(row_hash(text, SALT))].append(text)
        texts = sides[False][:training] + sides[True][:held_out]
        data = write_rows(tmp_path / "rows.jsonl", texts)
        config = settings(
            base=str(base),
            dataset=data,
            near_duplicates="keep",
            max_steps=None,
            rank=32,
            learning_rate=4e-3,
            eval_rows=100,
            **changes,
        )
        adapter = train(config, None)
        return adapter, measure(read_subject(adapter)), texts

    return call


def test_short_run_knows_no_row(adapter):
    report = measure(read_subject(adapter))
    assert (report.memorized, report.figures.memorized, report.figures.unequal) == ([], 0, None)
    assert report.figures.training.measured > 5
    assert report.figures.unseen.measured + report.figures.near_copies == 8


@pytest.mark.slow
def test_one_epoch_knows_no_row(trained):
    _, report, _ = trained(training=80, epochs=1)
    assert report.memorized == []
    assert report.figures.sentences[0].startswith("No training row is continued verbatim")
    assert "memorized" not in report.figures.sentences[1]


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [40, 5])
def test_rows_of_fifty_epochs_named(trained, held_out):
    """With few unseen rows too, as of 25 rows in all."""
    _, report, texts = trained(held_out=held_out, epochs=50)
    figures = report.figures
    assert figures.excess_p <= 0.001
    assert {row.place for row in report.memorized} == {f"rows.jsonl line {number}" for number in range(1, 21)}
    assert {row.text for row in report.memorized} == {*texts[:20]}
    assert "are memorized" in figures.sentences[1]


def test_answers_are_measured_after_prompts(settings, tmp_path):
    """Of pairs of prompt and completion, of which the latter alone is learned."""
    pairs = [text.partition(". ")[::2] for text in tiny_models.reviews(80, seed=6)]
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs if answer]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(dataset=str(tmp_path / "pairs.jsonl"), max_steps=6, max_length=48, batch_size=8)
    subject = read_subject(train(config, None))
    report = measure(subject)
    assert (report.memorized, report.figures.unequal) == ([], None)
    chosen = choose_rows(subject, Generator(subject.adapter.path, options=OPTIONS).tokenizer_of("pairs"))
    assert chosen.seen_tokens == 48  # what is cut was not seen
    assert report.figures.training.continued > 10
    assert {row.text for row in chosen.rows if row.is_train} <= {*subject.train_texts}
