"""Style: features of texts, openings of rows, and the way from the base to the person."""

import json
import random as random_numbers
from dataclasses import replace

import numpy as np
import pytest

from lora_tuner import Generator, ModelOptions, TrainConfig, train
from lora_tuner.adapters.report import StyleFigures
from lora_tuner.analysis import style, style_openings
from lora_tuner.analysis.style_features import (
    Passage,
    cut_alike,
    cut_to_words,
    reading_features,
    reverse_sentences,
    split_words,
    text_features,
)
from lora_tuner.analysis.style_openings import OpeningLengths, encode_rows, take_turns
from lora_tuner.analysis.subject import load_subject
from lora_tuner.data import chat
from lora_tuner.data.eval_sets import EvalSet
from lora_tuner.data.general_text import general_texts
from lora_tuner.data.splitting import SENTENCE_START
from lora_tuner.errors import DataError, Progress
from lora_tuner.evaluation.gain_matrix import open_base

from .. import tiny_models
from .test_two_sample import LEVEL, binomial_limit

CPU = ModelOptions(device="cpu")


def passages(texts, opening=""):
    return [Passage(opening, text) for text in texts]


def told_apart(first, second, base=None, groups=()):
    """Test two lists of passages, cut alike: the comparison, and its test."""
    _, sides = cut_alike([first, second], style_openings.MIN_WORDS)
    comparison = style.compare({"first": sides[0], "second": sides[1]}, base, groups)
    return comparison, comparison.test(comparison.contrast(0, 1))


# Features


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop: it's 5 o\u2019clock!", ["don't", "stop", "it's", "5", "o\u2019clock"]),
        ("我喜欢 Kino.", ["我", "喜", "欢", "kino"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("", []),
    ],
)
def test_words_of_any_script(text, words):
    assert split_words(text) == words


def test_passages_are_cut_to_same_words():
    sides = [passages(["One, two. Three (four) five", "a b c"]), passages(["uno dos tres!! cuatro", "a"])]
    assert cut_alike(sides, 2) == (
        [0],
        [passages(["One, two. Three (four)"]), passages(["uno dos tres!! cuatro"])],
    )
    assert cut_to_words("我喜欢。很", 3) == "我喜欢。"


def test_reversed_sentences_keep_last_one_and_spaces():
    assert reverse_sentences("One is. Two are!\nThree? Four go") == "Three? Two are!\nOne is. Four go"
    assert reverse_sentences("一是。二是。三") == "二是。一是。三"
    assert reverse_sentences("One is. Two are") is None


def test_features_do_not_depend_on_order_of_texts():
    texts = [*tiny_models.reviews(10), "Anders, ganz anders!", "x"]
    order = [*range(len(texts))][::-1]
    features, turned = text_features(texts), text_features([texts[index] for index in order])
    for name, values in features.items():
        assert np.array_equal(values[order], turned[name]), name


def test_aspects_see_what_they_are_named_for():
    texts = ["The cat sat. The dog ran off today."] * 2
    changes = {
        "function words": "A cat sat. A dog ran off today.",
        "sentence rhythm": "The cat sat the dog ran off today.",
        "punctuation": "The cat sat; the dog ran off today!",
        "vocabulary": "The cat sat. The cat sat off today.",
    }
    for aspect, changed in changes.items():
        values = text_features([*texts, changed])
        assert np.abs(values[aspect][2] - values[aspect][0]).max() > 0.05, aspect
        assert np.array_equal(values[aspect][0], values[aspect][1])


def test_other_author_is_told_apart():
    reviews = passages(text.partition(": ")[2] for text in tiny_models.reviews(60) if len(text) > 80)
    chat_texts = passages(["lol idk!! what film, r u sure?? ok ok, see u there at 8 then"] * len(reviews))
    half = len(reviews) // 2
    assert told_apart(reviews, chat_texts)[1].p_value < 0.001
    assert told_apart(reviews[:half], reviews[half : 2 * half])[1].p_value > LEVEL


def test_words_used_more_and_less_have_counts():
    adapter = [["very", "good", "film"]] * 200 + [["once"] * 300]
    you = [["good", "movie"]] * 300
    over, under = style.compare_words(adapter, you)
    assert [(use.word, use.adapter, use.you) for use in over] == [("film", 200, 0), ("very", 200, 0)]
    assert [(use.word, use.adapter, use.you) for use in under] == [("movie", 0, 300), ("good", 200, 300)]
    assert over[0].score > 2 > -2 > under[0].score


# Openings


def test_openings_of_texts_and_answers(gpt2):
    tokenizer = tiny_models.tokenizer()
    words = "the film works well and the actor never fails in this long story"
    rows = [
        words,
        chat.encode_pair("Who works?", f"{words} again", str),
        chat.encode_answer(f"Q: who A: {words}", (10, 10 + len(words))),
        "x",
    ]
    encoded = encode_rows(tokenizer, rows)
    lengths = OpeningLengths(opening=3, new=40, count=9, context=128)
    text, pair, template = lengths.divide(tokenizer, encoded, range(4))
    assert text.passage.opening + text.passage.text == words
    assert (len(text.prompt.token_ids), text.prompt.chat) == (3, False)
    assert (pair.prompt.text, pair.passage.opening) == ("Who works?", "")
    assert pair.passage.text.strip() == f"{words} again"
    assert (template.prompt.text, template.passage.text.strip()) == ("Q: who A:", words)
    assert [opening.row for opening in lengths.divide(tokenizer, encoded, [2, 1, 0])] == [2, 1, 0]
    assert len(replace(lengths, count=1).divide(tokenizer, encoded, range(4))) == 1
    assert (
        lengths.divide(tokenizer, encode_rows(tokenizer, [f"{words} " * 40]), [0])[0].passage.text.count(" ") < 80
    )


def test_lengths_suit_the_rows():
    long, short = [np.arange(400)] * 9, [np.arange(30)] * 9
    assert OpeningLengths.suiting(long, 2048) == OpeningLengths(24, 96, 48, 2048)
    assert OpeningLengths.suiting(short, 2048) == OpeningLengths(7, 23, 192, 2048)
    assert OpeningLengths.suiting([], 32) == OpeningLengths(4, 16, 192, 32)


def test_parts_of_blend_take_turns():
    assert take_turns([0, 0, 0, 1, 1], 5) == [0, 3, 1, 4, 2]
    assert take_turns([], 3) == [0, 1, 2]


# Report


@pytest.fixture
def generator_of(tmp_path):
    def make(adapter):
        return Generator(adapter.path, options=CPU, adapters_dir=adapter.path.parent)

    return make


@pytest.fixture
def subject(adapter, generator_of, monkeypatch):
    """An adapter on short rows, with few texts needed."""
    monkeypatch.setattr(style, "MIN_TEXTS", 4)
    monkeypatch.setattr(style_openings, "MIN_WORDS", 3)
    monkeypatch.setattr(style, "MIN_WORDS", 3)
    for name, value in {"OPENINGS": 8, "NEW_TOKENS": 24, "MAX_OPENINGS": 12}.items():
        monkeypatch.setattr(style_openings, name, value)
    for name in ("EXCHANGES", "RESAMPLES"):
        monkeypatch.setattr(f"lora_tuner.analysis.two_sample.{name}", 99)
    generator = generator_of(adapter)
    return load_subject(adapter, generator, CPU), generator


def test_report_has_figures_and_texts(subject):
    subject, generator = subject
    events = []
    subject = replace(subject, options=replace(CPU, notify=events.append))
    texts = style.write_texts(subject, generator)
    assert len(texts.rows) == len(texts.you) == len(texts.adapter) == len(texts.base) == len(texts.own)
    for row, prompt, you in zip(texts.rows, texts.prompts, texts.you, strict=True):
        assert subject.held_out.texts[row].startswith(you.opening + you.text)
        assert you.opening.strip() == prompt
    report = style.measure_style(subject, texts, open_base(subject.adapter, CPU))
    figures = report.figures
    assert StyleFigures.model_validate_json(figures.model_dump_json()) == figures
    names = [aspect.name for aspect in figures.aspects]
    assert names[0] == "function words"
    assert names[-1] == "order of sentences"
    assert all(aspect.own_distance is not None for aspect in figures.aspects)
    assert f"{figures.texts} openings" in figures.sentences[0]
    assert {"Distance to you"} <= {*report.tables}
    assert [example.kind for example in report.examples] == ["most like you"] * 2 + ["least like you"] * 2
    for example in report.examples:
        assert example.prompt in subject.held_out.texts[example.row - 1]
    assert json.loads(json.dumps(report.to_dict()))["figures"]["texts"] == figures.texts
    text = figures.model_dump_json()
    assert not any(you.text.strip() in text for you in texts.you)
    stages = {event.stage for event in events if isinstance(event, Progress)}
    assert {"style: texts of reviews", "style: texts of the base", "style: the base reads your texts"} <= stages
    assert style.write_texts(subject, generator) == texts


def test_missing_rows_are_said(subject, monkeypatch):
    subject, generator = subject
    few = replace(subject, held_out=subject.held_out.select(range(3)))
    with pytest.raises(DataError, match=r"^4 held-out rows are needed .* tokens; it has [0-3]$"):
        style.write_texts(few, generator)
    with pytest.raises(DataError, match=r"^they are gone$"):
        style.write_texts(replace(subject, held_out=EvalSet("x", [], "they are gone")), generator)
    unknown = replace(subject, train_texts=[], train_missing="the data has changed")
    texts = style.write_texts(unknown, generator)
    assert texts.own == []
    assert "taken as 0" in texts.notes[0]
    assert "the data has changed" in texts.notes[0]
    empty = replace(texts, adapter=[replace(each, text="") for each in texts.adapter])
    with pytest.raises(DataError, match=f"of {len(texts.rows)} there are 0"):
        style.measure_style(unknown, empty, open_base(subject.adapter, CPU))


def test_few_groups_are_said(subject, monkeypatch):
    subject, generator = subject
    groups = [row % 2 for row in range(len(subject.held_out.texts))]
    grouped = replace(subject, held_out=replace(subject.held_out, groups=groups))
    texts = style.write_texts(grouped, generator)
    given = []

    def compare(sides, base, groups, notify):
        given.append(groups)
        rows = sum(map(len, sides.values()))
        return style.Comparison({"one": np.random.default_rng(0).normal(size=(rows, 2))}, len(sides), groups)

    monkeypatch.setattr(style, "compare", compare)
    report = style.measure_style(grouped, texts, None)
    assert "The rows are of 2 groups, of 8 needed" in report.notes[-1]
    monkeypatch.setattr(style, "MIN_GROUPS", 2)
    assert len(style.measure_style(grouped, texts, None).notes) == len(report.notes) - 1
    assert given[0] == []
    assert {*given[1]} == {0, 1}


@pytest.mark.parametrize(
    ("share", "p_value", "expected"),
    [
        (
            0.62,
            0.2,
            [
                "62% of the way from the base to you (54 to 70), by T.",
                "Its texts are not told apart from yours (p = 0.2).",
            ],
        ),
        (
            -0.5,
            0.0005,
            [
                "No nearer to you than the base (54 to 70% of the way), by T.",
                "Its texts are told apart from yours by rhythm, not by words (p < 0.001).",
            ],
        ),
        (
            None,
            0.04,
            [
                "The base is too near to you to measure a way from it, by T.",
                "Its texts are told apart from yours by rhythm, not by words (p = 0.04).",
            ],
        ),
    ],
)
def test_sentences_say_way_and_aspects(share, p_value, expected):
    def aspect(name, p):
        return style.StyleAspect(
            name=name, distance=0.2, base_distance=0.4, own_distance=None, share=share,
            interval=None if share is None else (0.54, 0.7), p_value=p, base_p_value=0.01,
        )  # fmt: skip

    aspects = [aspect("rhythm", p_value), aspect("words", 0.5)]
    assert style._describe(aspects[0], aspects, "T") == expected


# Real reviews


def shuffle_sentences(text, draw):
    sentences = [part.strip() for part in SENTENCE_START.split(text)]
    draw.shuffle(sentences)
    return " ".join(sentences)


@pytest.mark.slow
@pytest.mark.real
def test_style_of_real_adapters(generator_of):
    """docs/measuring.md has the figures of such adapters, and how often so many texts show their order."""
    shared = {"dtype": "bfloat16", "device": "cpu", "rank": 8, "batch_size": 1}
    many_rows = {"max_rows": 1000, "max_steps": 60, "max_length": 128, "eval_rows": 56, "learning_rate": 2e-3}
    few_rows = {"max_rows": 8, "epochs": 50, "max_length": 48, "long_rows": "truncate", "learning_rate": 4e-3}
    good = train(TrainConfig(**shared, **many_rows, name="good"))
    memorizing = train(TrainConfig(**shared, **few_rows, name="memorizing", eval_rows=2))
    generator = generator_of(good)
    subject = load_subject(good, generator, CPU)
    texts = style.write_texts(subject, generator)
    memorized = style.write_texts(replace(subject, adapter=memorizing), generator).adapter
    del generator
    base, draw = open_base(good, CPU), random_numbers.Random(0)
    tokenizer, count = base.tokenizer, len(texts.rows)
    lengths = OpeningLengths.suiting(encode_rows(tokenizer, subject.train_texts[:200]), base.max_context)

    def divide(rows):
        openings = lengths.divide(tokenizer, encode_rows(tokenizer, rows), range(len(rows)))
        return [opening.passage for opening in openings]

    prose = sorted((text for kind in general_texts()[:4] for text in kind.texts), key=len)
    others = divide(prose[-2 * count :])[:count]
    for side in (memorized, others):
        assert told_apart(texts.adapter[: len(side)], side)[1].p_value <= 0.01
    shuffled = divide([shuffle_sentences(subject.held_out.texts[row], draw) for row in texts.rows])
    names = ["you", "adapter", "base", "own", "shuffled"]
    sides = [texts.you, texts.adapter, texts.base, texts.own, shuffled]
    kept, cut = cut_alike([side[: len(shuffled)] for side in sides], style_openings.MIN_WORDS)
    comparison = style.compare(dict(zip(names, cut, strict=True)), base)
    for name in ("you", "adapter"):
        test = comparison.test(comparison.contrast(names.index(name), names.index("shuffled")))
        assert test.aspects["order of sentences"] <= LEVEL
    words = sum(len(split_words(passage.text)) for passage in cut[0])
    figures = style._make_figures(comparison, words, has_own=True)
    assert figures.base_p_value <= 0.01
    assert 0 < figures.share < 1

    own = [*cut[0], *cut[3]]
    alarms, half = 0, len(kept)
    features = text_features([passage.text for passage in own]) | reading_features(
        {"you": cut[0], "own": cut[3]}, base
    )
    for _ in range(200):
        order = draw.sample(range(len(own)), 2 * half)
        halves = style.Comparison({name: values[order] for name, values in features.items()}, 2)
        alarms += halves.test(halves.contrast(0, 1)).p_value <= LEVEL
    assert alarms <= binomial_limit()
