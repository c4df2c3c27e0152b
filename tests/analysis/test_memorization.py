"""What an adapter has learned by heart: verbatim text, losses, and what they say."""

import dataclasses
import json

import numpy as np
import pytest

from lora_tuner import EvalSet, Generator, SamplingParams, train
from lora_tuner.analysis import membership, memorization, verbatim
from lora_tuner.analysis.compared_rows import ComparedRow, ComparedRows, choose_rows
from lora_tuner.analysis.membership import RowLoss, find_known_rows
from lora_tuner.analysis.memorization import measure_losses, measure_memorization
from lora_tuner.analysis.verbatim import Continuations, continue_rows, split_row
from lora_tuner.config import HELD_OUT_MAX_TOKENS
from lora_tuner.data import chat, tokenization
from lora_tuner.data.splitting import is_held_out, row_hash
from lora_tuner.evaluation import gain_matrix

from .. import tiny_models
from .test_compared_rows import SALT, write_rows
from .test_membership import binomial_bound
from .test_report import OPTIONS, read_subject


def measure(subject):
    generator = Generator(subject.adapter.path, options=OPTIONS)
    continuations = continue_rows(subject, generator)
    base = gain_matrix.open_base_of([subject.adapter], OPTIONS)
    return measure_memorization(subject, continuations, base)


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
    base = gain_matrix.open_base_of([adapter], OPTIONS)
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
    """Training rows 0 to 19 are made known, one of which has near duplicates, and one personal data."""
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
    assert (figures.memorized, figures.near_duplicates, figures.near_duplicates_verbatim) == (19, 1, 1)
    first, second, third = figures.sentences
    assert "17 of 49 training rows" in first
    assert first.endswith("(p = 0.0001): it copies text that it was trained on.")
    assert second.endswith("(p = 0.0001): 19 of the 49 measured are memorized.")
    assert third.startswith("1 training row with near duplicates")
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
    assert report.figures.unseen.measured + report.figures.near_duplicates == 8


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
