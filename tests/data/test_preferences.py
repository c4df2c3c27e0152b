"""Rows of preferences: layouts, their sides, the split by prompt, and malformed rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_tuner.config import TrainConfig, is_conversation
from lora_tuner.data import chat, chat_template, preferences, tokenization
from lora_tuner.data.readers import Table
from lora_tuner.data.row_readers import PREFERENCES, Layout, text_reader
from lora_tuner.data.rows import Source, iter_rows
from lora_tuner.data.splitting import row_hash
from lora_tuner.errors import InvalidRowError
from lora_tuner.server.playground.conversation import Answer, Turn

from .. import tiny_models
from ..data_files import TEXTS, jsonl
from .test_chat_template import CHATML, make_tokenizer

ASKED = [{"role": "user", "content": "so?"}]
YES, NO = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
PAIRS = [
    {"prompt": f"Is {n} so?", "chosen": f"yes {text}", "rejected": f"no {n}"} for n, text in enumerate(TEXTS)
]
SPOKEN = {"prompt": ASKED, "chosen": YES, "rejected": NO}
ORDINARY = [chat.to_row([*ASKED, *YES]), chat.to_row([*ASKED, *NO])]


def rows_of(dataset):
    return dataset.train + dataset.held_out_rows


def sides_of(row, **settings):
    """The sides of the only row of a file."""
    Path("one.jsonl").write_text(jsonl([row]), encoding="utf-8")
    config = TrainConfig(dataset="one.jsonl", **{"objective": "dpo"} | settings)
    (read,) = iter_rows(config, Source("one.jsonl"))
    return preferences.sides(read.text)


# Layouts


@pytest.mark.parametrize(
    "row",
    [
        SPOKEN,
        SPOKEN | {"prompt": "so?"},
        SPOKEN | {"chosen": YES[0], "rejected": NO[0]},
        SPOKEN | {"chosen": "yes", "rejected": "no"},
        SPOKEN | {"chosen": [*ASKED, *YES], "rejected": [*ASKED, *NO]},
        {"prompt": "so?", "chosen": [*ASKED, *YES], "rejected": [*ASKED, *NO]},
    ],
)
def test_pair_of_messages_gives_conversations(row):
    assert sides_of(row) == ORDINARY


def test_answers_alone_share_their_prompt():
    assert sides_of({"chosen": [*ASKED, *YES], "rejected": [*ASKED, *NO]}) == ORDINARY
    longer = [*ASKED, *YES, {"role": "user", "content": "why?"}, *YES]
    answers = [
        chat.decode_row(side)["messages"] for side in sides_of({"chosen": longer, "rejected": [*ASKED, *YES]})
    ]
    assert answers == [[*ASKED, *longer[1:]], [*ASKED, *YES]]
    prompt = {"prompt": "Is it so?\n\nAnswer:"}
    texts = {"chosen": "Is it so?\n\nAnswer: yes", "rejected": "Is it so?\n\nAnswer: no"}
    assert sides_of(texts) == [chat.to_row(prompt | {"completion": answer}) for answer in (" yes", " no")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "sides"),
    [
        ("the cat sat", "the cat ran", ["the cat", " sat", " ran"]),
        ("the cat", "the cats", ["the", " cat", " cats"]),
        ("the cat", "the cat sat", ["the", " cat", " cat sat"]),
        ("a\n\nb: c d", "a\n\nb: c\ne", ["a\n\nb: c", " d", "\ne"]),
        ("one", "two", ["", "one", "two"]),
        ("onyx", "one", ["", "onyx", "one"]),
        # Without spaces: a clause, else a word; kana of one word stay together, as do graphemes.
        ("日本の首都は？東京です。", "日本の首都は？京都です。", ["日本の首都は？", "東京です。", "京都です。"]),
        ("今天怎么样？今天很好", "今天怎么样？今天不好", ["今天怎么样？", "今天很好", "今天不好"]),
        ("问:好吗?答:好", "问:好吗?答:不", ["问:好吗?答:", "好", "不"]),
        ("日本は美しい", "日本は小さい", ["日本は", "美しい", "小さい"]),
        ("カタカナ", "カタログ", ["", "カタカナ", "カタログ"]),
        ("答えは。\u3099あ", "答えは。\u3099い", ["答えは", "。\u3099あ", "。\u3099い"]),
        ("葛\U000e0100城", "葛\U000e0101城", ["", "葛\U000e0100城", "葛\U000e0101城"]),
        ("か\u3099く", "かく", ["", "か\u3099く", "かく"]),
    ],
)
def test_common_beginning_ends_at_word(chosen, rejected, sides):
    answers = {"chosen": chosen, "rejected": rejected}
    value = chat.decode_row(preferences.encode_pair(None, answers, str))
    assert [value["prompt"], value["chosen"], value["rejected"]] == sides


def test_answers_without_prompt_are_texts(load):
    rows = [{"chosen": f"{n} {text}", "rejected": f"x{n} {text}"} for n, text in enumerate(TEXTS)]
    dataset = load("a.jsonl", jsonl(rows), objective="orpo", clean="lines")
    assert not is_conversation(dataset.format)
    assert is_conversation(load("b.jsonl", jsonl(PAIRS), objective="orpo").format)
    assert sorted(side for row in rows_of(dataset) for side in preferences.sides(row)) == sorted(
        text for row in rows for text in row.values()
    )


def test_openai_layout_is_read(load):
    tool = {"type": "function", "function": {"name": "f"}}
    row = {"input": {"messages": ASKED, "tools": [tool], "parallel_tool_calls": True}}
    row |= {"preferred_output": YES, "non_preferred_output": NO}
    expected = [chat.to_row({"messages": [*ASKED, *answer], "tools": [tool]}) for answer in (YES, NO)]
    assert sides_of(row) == expected
    table = {name: json.dumps(value) for name, value in row.items()}
    assert sides_of(table) == expected  # as a csv file has it
    rows = [row | {"input": {"messages": [{"role": "user", "content": f"{n}?"}]}} for n in range(20)]
    layout = load("a.jsonl", jsonl(rows), objective="dpo").layout
    assert layout == "preferences in 'input', 'preferred_output', 'non_preferred_output'"


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.parquet"])
def test_pairs_of_any_file_are_alike(load, tmp_path, name):
    import pandas as pd

    spoken = [
        {column: [{"role": role, "content": f"{column} {n}"}] for column, role in
         (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))}
        for n in range(30)
    ]  # fmt: skip
    for rows in (PAIRS, spoken):
        frame = pd.DataFrame(rows)
        if name == "a.csv":
            frame.to_csv(tmp_path / name, index=False)
        elif name == "a.json":
            frame.to_json(tmp_path / name, orient="records")
        else:
            frame.to_parquet(tmp_path / name)
        read, expected = load(name, objective="dpo"), load("b.jsonl", jsonl(rows), objective="dpo")
        assert read.hash() == expected.hash()


def test_other_prompt_columns_are_read():
    row = {"instruction": "Sum up", "input": "a b", "chosen": "yes", "rejected": "no", "system": "Be brief."}
    expected = {"prompt": "Sum up\na b", "system": "Be brief."}
    assert [chat.decode_row(side) for side in sides_of(row)] == [
        expected | {"completion": answer} for answer in ("yes", "no")
    ]
    talk = {"conversations": [{"from": "human", "value": "so?"}]}
    answers = {"chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}}
    assert sides_of(talk | answers) == ORDINARY


def test_earlier_answers_are_no_labels():
    tokenizer = make_tokenizer(CHATML)
    asked = [*ASKED, *NO, {"role": "user", "content": "why?"}]
    row = preferences.encode_pair(asked, {"chosen": YES, "rejected": NO}, str)
    sides = preferences.sides(row)
    labels = [tokenizer.decode(side[side >= 0]) for side in tokenization.encode_texts(tokenizer, sides)]
    assert [text.strip().removesuffix("<|im_end|>") for text in labels] == ["yes", "no"]
    rendered = [chat_template.render_with_spans(tokenizer, side).text for side in sides]
    assert rendered[0].replace("yes", "no") == rendered[1]


# KTO

LABELLED = [
    {"prompt": f"Is {n} so?", "completion": f"yes {text}", "label": n % 2 == 0} for n, text in enumerate(TEXTS)
]


@pytest.mark.parametrize("spelling", [bool, int, float, str, lambda label: str(label).lower()])
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_labels_of_answers_are_read(load, spelling, column):
    rows = [{**row, "label": None, column: spelling(row["label"])} for row in LABELLED]
    dataset = load("a.jsonl", jsonl(rows), objective="kto")
    assert dataset.layout == f"preferences in 'prompt', 'completion', '{column}'"
    assert sum(map(preferences.is_desired, rows_of(dataset))) == 15
    assert len(rows_of(dataset)) == 30
    row = next(text for text in rows_of(dataset) if preferences.prompt_of(text) == "Is 1 so?")
    assert list(preferences.answer_texts(row)) == ["undesired"]
    assert preferences.sides(row) == [chat.to_row({"prompt": "Is 1 so?", "completion": f"yes {TEXTS[1]}"})]


def test_kto_reads_pairs_as_two_rows(load):
    dataset = load("a.jsonl", jsonl(PAIRS), objective="kto")
    counts = dataset.counts
    assert (counts.read, counts.train + counts.held_out) == (60, 60)
    desired = [text for text in rows_of(dataset) if preferences.is_desired(text)]
    assert sorted(preferences.answer_texts(text)["desired"] for text in desired) == sorted(
        row["chosen"] for row in PAIRS
    )
    assert len(dataset.held_out) == counts.held_out / 2  # the desired ones are measured as text


def test_messages_with_label_are_read(load):
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, *YES], "label": n % 3 > 0} for n in range(30)]
    dataset = load("a.jsonl", jsonl(rows), objective="kto")
    assert {preferences.prompt_of(text) for text in rows_of(dataset)} == {f"{n}?" for n in range(30)}


# Thumbs of the page


def thumbs():
    """Rows of feedback: a pair, a lone thumb up, and a lone thumb down."""
    turns = []
    for number in range(30):
        turn = Turn(f"{number}?")
        messages = ({"role": "user", "content": turn.question},)
        given = {0: (True, False), 1: (True,), 2: (False,)}[number % 3]
        turn.answers = [Answer("praise", messages, f"it {thumb} {number}", thumb=thumb) for thumb in given]
        turns += turn.feedback("smollm2-135m")
    return jsonl(turns)


def test_feedback_is_read_as_it_is(load):
    dataset = load("feedback.jsonl", thumbs(), objective="dpo")
    counts = dataset.counts
    assert (counts.read, counts.unpaired, counts.invalid, counts.train + counts.held_out) == (30, 20, 0, 10)
    assert any("Left out 20 rows of" in text and "one answer alone" in text for text in load.notices)
    assert not any("Not read" in text and "chosen_by" in text for text in load.notices)
    dataset = load("feedback.jsonl", objective="kto")
    counts = dataset.counts
    assert (counts.read, counts.unpaired, counts.train + counts.held_out) == (40, 0, 40)
    assert sum(map(preferences.is_desired, rows_of(dataset))) == 20


def test_lone_thumbs_alone_name_kto(refusal):
    rows = [{**SPOKEN, "rejected": None, "prompt": [{"role": "user", "content": f"{n}"}]} for n in range(9)]
    message = refusal("a.jsonl", jsonl(rows), objective="dpo")
    assert "9 with one answer alone" in message
    assert "--objective kto" in message


# Split


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_no_prompt_is_on_both_sides(load, objective):
    rows = [row | {"chosen": f"{row['chosen']} {n}"} for row in PAIRS for n in range(3)]
    dataset = load("a.jsonl", jsonl(rows), objective=objective, near_duplicates="keep")
    train, held_out = ({*map(preferences.prompt_of, rows)} for rows in (dataset.train, dataset.held_out_rows))
    assert train
    assert held_out
    assert not train & held_out
    assert len(set(dataset.groups_of(dataset.held_out))) == len(held_out)  # of a prompt several
    again = load("b.jsonl", jsonl([{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]),
                 objective=objective, near_duplicates="keep")  # fmt: skip
    assert {*map(preferences.prompt_of, again.train)} == train


def test_prompt_of_eval_dataset_is_not_trained(load, tmp_path):
    others = [row | {"chosen": "of course", "rejected": "never"} for row in PAIRS[:7]]
    (tmp_path / "eval.jsonl").write_text(jsonl(others))
    dataset = load("a.jsonl", jsonl(PAIRS), objective="dpo", eval_dataset="eval.jsonl")
    assert len(dataset.held_out) == 7
    assert not {*map(preferences.prompt_of, dataset.train)} & {row["prompt"] for row in others}


def test_group_overrides_prompt(load):
    rows = [row | {"user": f"u{n % 7}"} for n, row in enumerate(PAIRS)]
    dataset = load("a.jsonl", jsonl(rows), objective="dpo", group_by="user")
    users = {row["prompt"]: row["user"] for row in rows}
    train, held_out = (
        {users[preferences.prompt_of(text)] for text in texts} for texts in (dataset.train, dataset.held_out_rows)
    )
    assert not train & held_out


def test_copies_of_pairs_are_dropped(load):
    spaced = {**PAIRS[0], "chosen": f" {PAIRS[0]['chosen']}\n"}
    dataset = load(
        "a.jsonl", jsonl([*PAIRS, PAIRS[0], spaced, PAIRS[0] | {"rejected": "never"}]), objective="dpo"
    )
    assert (dataset.counts.duplicates, len(rows_of(dataset)) + dataset.counts.near_duplicates) == (2, 31)


def test_near_duplicates_of_pairs_are_dropped(load):
    texts = [" ".join(f"{word}{n * 7 % 11}{n}" for word in "abcdefghijklmnop") for n in range(60)]
    rows = [{"prompt": prompt, "chosen": text, "rejected": "no"} for text in texts for prompt in ("so", "why")]
    rows = [row | {"prompt": f"{row['prompt']} {number}"} for number, row in enumerate(rows)]
    dataset = load("a.jsonl", jsonl(rows), objective="dpo")
    assert dataset.counts.near_duplicates > 5
    held_out = {chat.decode_row(text)["completion"] for text in dataset.held_out}
    assert not held_out & {chat.decode_row(text)["chosen"] for text in dataset.train}


def test_held_out_rows_are_chosen_answers(load):
    dataset = load("a.jsonl", jsonl(PAIRS), objective="dpo")
    pairs = {row["prompt"]: row["chosen"] for row in PAIRS}
    for text, row in zip(dataset.held_out, dataset.held_out_rows, strict=True):
        value = chat.decode_row(text)
        assert value == {"prompt": preferences.prompt_of(row), "completion": pairs[value["prompt"]]}


# Malformed rows


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": ""}, "no prompt"),
        ({"prompt": None}, "no prompt"),
        ({"chosen": None, "rejected": None}, "neither chosen nor rejected"),
        ({"chosen": " "}, "nothing in chosen"),
        ({"rejected": []}, "nothing in rejected"),
        ({"rejected": {"a": 1}}, "rejected that is neither a text nor a list of messages"),
        ({"chosen": "no", "rejected": " no "}, "equal chosen and rejected"),
        ({"chosen": YES, "rejected": YES}, "equal chosen and rejected"),
        ({"chosen": YES, "rejected": "no"}, "chosen and rejected of two kinds: a text and a list of messages"),
        ({"chosen": YES, "rejected": ASKED}, "no answer in rejected"),
        ({"prompt": ASKED, "chosen": YES, "rejected": [*NO, *ASKED]}, "rejected that ends with a question"),
        ({"prompt": [*ASKED, *YES], "chosen": YES, "rejected": NO}, "a prompt that ends with an answer"),
        ({"prompt": "why?", "chosen": [*ASKED, *YES], "rejected": [*ASKED, *NO]},
         "a prompt that is not the question in front of its answers"),
        ({"prompt": [{"role": "ghost", "content": "x"}], "chosen": YES, "rejected": NO}, "an unknown role"),
        ({"thinking": "hm"}, "reasoning beside the answers"),
    ],
)  # fmt: skip
def test_malformed_pair_is_counted(load, changes, reason):
    dataset = load("a.jsonl", jsonl([*PAIRS, PAIRS[0] | changes]), objective="dpo", max_invalid=0.1)
    (source,) = dataset.sources
    assert {text: count for text, (count, _) in source.invalid.items()} == {reason: 1}
    assert source.invalid[reason][1].startswith(f"{source.name} line 31")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": "maybe"}, "a label other than true and false"),
        ({"label": 2}, "a label other than true and false"),
        ({"label": "good"}, "a label other than true and false"),
        ({"label": None}, "no label"),
        ({"label": float("nan")}, "no label"),
        ({"completion": ""}, "nothing in completion"),
        ({"completion": None}, "no completion"),
        ({"prompt": None}, "no prompt"),
    ],
)
def test_malformed_label_is_counted(load, changes, reason):
    dataset = load("a.jsonl", jsonl([*LABELLED, LABELLED[0] | changes]), objective="kto", max_invalid=0.1)
    assert {text: count for text, (count, _) in dataset.sources[0].invalid.items()} == {reason: 1}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("[{")
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "weight", "tool_calls", "thinking", "x"]),
        SCALARS | st.sampled_from(["user", "assistant", "system", "tool", "yes", "no"]),
        max_size=3,
    ),
    max_size=3,
)
VALUES = (
    SCALARS
    | MESSAGES
    | st.dictionaries(st.sampled_from(["messages", "tools", "role", "content"]), SCALARS | MESSAGES)
)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    values=st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "label", "system", "tools"]), VALUES)
)
def test_fuzzed_row_is_read_or_invalid(values):
    answers = {"prompt": "x", "chosen": "yes"}
    for layout in (
        Layout(PREFERENCES, "prompt", "chosen", rejected="rejected"),
        Layout(PREFERENCES, "", "chosen", rejected="rejected"),
        Layout(PREFERENCES, "prompt", "chosen", label="label"),
        Layout(PREFERENCES, "prompt", "preferred_output", rejected="chosen"),
    ):
        for row in (values, answers | values):
            try:
                _, text = text_reader(Table("x", [], [], []), layout, TrainConfig(objective="kto"), "none")(row)
            except InvalidRowError:
                continue
            for part in preferences.unpair(text) if text else ():
                assert preferences.sides(part)
                assert preferences.side_hash(part, "x")
                assert row_hash(part, "x")
                assert all(preferences.answer_texts(part))


def test_many_malformed_pairs_stop_the_run(refusal):
    rows = [*PAIRS, *({**row, "chosen": row["rejected"]} for row in PAIRS[:9])]
    message = refusal("a.jsonl", jsonl(rows), objective="dpo")
    assert message.startswith(
        "a.jsonl: 9 of 39 rows cannot be read, and --max-invalid 0.05 allows no more than that fraction of them: "
        "9 with equal chosen and rejected (first: a.jsonl line 31)"
    )


@pytest.mark.parametrize(
    ("content", "objective", "text"),
    [
        (jsonl(LABELLED), "dpo", "label says which answers are desired: --objective kto learns from that."),
        (
            jsonl({"text": text} for text in TEXTS),
            "orpo",
            "a.jsonl: --objective orpo needs chosen and rejected, or",
        ),
        (jsonl({"text": text} for text in TEXTS), "kto", "or prompt, completion and label or kto_tag"),
        (jsonl({"text": text, "label": 1} for text in TEXTS), "kto", "its columns are text, label.\n"),
        (jsonl(PAIRS), "sft", "give --objective dpo (or orpo, kto) to learn to prefer chosen"),
        (jsonl(LABELLED), "sft", "--objective kto learns from all of them, and --where label=True keeps these."),
    ],
)
def test_columns_of_another_objective_are_refused(refusal, content, objective, text):
    assert text in refusal("a.jsonl", content, objective=objective) + "\n"


def test_plain_text_has_no_preferences(refusal):
    assert refusal("a.txt", "\n".join(TEXTS), objective="dpo").startswith(
        "a.txt is plain text: --objective dpo needs the columns chosen and rejected"
    )


# Tokens


def test_sides_are_ordinary_rows_as_tokens():
    tokenizer = tiny_models.tokenizer()
    rows = [preferences.encode_pair(row["prompt"], answers_of(row), str) for row in PAIRS]
    encoded, use, kept = preferences.encode_rows(tokenizer, rows, 512)
    texts = [side for row in rows for side in preferences.sides(row)]
    ordinary, ordinary_use = tokenization.encode_rows(tokenizer, texts, 512, "truncate")
    assert kept == [*range(len(rows))]
    assert all(np.array_equal(one, other) for one, other in zip(encoded, ordinary, strict=True))
    assert (use.tokens, use.answer_tokens, use.skipped_rows) == (
        ordinary_use.tokens,
        ordinary_use.answer_tokens,
        0,
    )


def answers_of(row):
    return {name: row[name] for name in ("chosen", "rejected")}


def test_pairs_without_labels_are_left_out():
    tokenizer = tiny_models.tokenizer()
    long = "word " * 90
    rows = [
        preferences.encode_pair("so", {"chosen": "yes", "rejected": "no"}, str),
        preferences.encode_pair(long, {"chosen": "yes", "rejected": "no"}, str),
        preferences.encode_pair(
            "so", {"chosen": f"{long} a", "rejected": f"{long} b"}, str
        ),  # alike where it is cut
    ]
    encoded, use, kept = preferences.encode_rows(tokenizer, rows, 16)
    assert (kept, len(encoded), use.skipped_rows) == ([0], 2, 2)


def test_row_that_template_rejects_is_invalid():
    tokenizer = make_tokenizer(CHATML)
    rows = [
        preferences.encode_pair("so", {"chosen": "yes <|im_end|>", "rejected": "no"}, str),
        preferences.encode_pair("so", {"chosen": "yes", "rejected": "no"}, str),
    ]
    invalid = {}
    encoded, _, kept = preferences.encode_rows(tokenizer, rows, 64, invalid)
    assert (kept, len(encoded), [*invalid]) == ([1], 2, rows[:1])
    assert "<|im_end|>" in str(invalid[rows[0]])


def test_preference_is_told_from_conversation():
    row = preferences.encode_pair("so?", {"chosen": "yes", "rejected": "no"}, str)
    others = [*ORDINARY, chat.encode_pair("label", "chosen", str), "text", '{"chosen": "x"}', chat.to_row([])]
    assert preferences.is_preference(row)
    assert not any(map(preferences.is_preference, others))
    assert json.loads(row.removeprefix(chat.CHAT_MARK)) == {"prompt": "so?", "chosen": "yes", "rejected": "no"}
    assert [preferences.unpair(text) for text in others] == [[text] for text in others]
