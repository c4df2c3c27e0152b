"""Prompts of model cards: the beginnings of held-out rows."""

import pytest

from lora_tuner.data import chat
from lora_tuner.data.prompts import held_out_prompts


def pair(question):
    return chat.encode_pair(question, "yes", str)


def prompts(*rows, conversations=False):
    return held_out_prompts(rows, conversations=conversations)


LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (LONG, "one two three four five six"),
        ("The end of it", "The end"),
        ("Night falls\nand the moon", "Night"),
        ("Word", "Wo"),
        ("# Rain in the north", "# Rain in"),
        ("# Rain\n\nIt falls.", "# Rain"),
        ("\u732b" * 200, "\u732b" * 80),
        (chat.encode_answer("Question: who?\nAnswer: he", (23, 25)), "Question: who?\nAnswer:"),
    ],
)
def test_prompt_of_text_is_its_beginning(row, prompt):
    assert prompts(row) == [prompt]


@pytest.mark.parametrize(
    "text",
    [
        "Mail anna@example.org now please",
        "Call 030 1234 56 now",
        "See https://x.org/y for it",
        "Run `rm` or not",
        "-x is it",
        "",
    ],
)
def test_unfit_row_is_no_prompt(text):
    """It may hold personal data, or would break a command or Markdown."""
    assert prompts(f"{text} " * 2 if text else text, "The end of it") == ["The end"]
    assert prompts(pair(text or " "), conversations=True) == []


def test_conversation_prompt_is_first_question():
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model."},
        {"role": "user", "content": "And you?"},
        {"role": "assistant", "content": "Too."},
    ]
    rows = ["Plain text beside it", chat.encode_messages(messages, str), pair("What is it?")]
    assert prompts(*rows, conversations=True) == ["Who are you?", "What is it?"]


def test_short_questions_come_before_long():
    """None is cut: an answer follows the whole question."""
    rows = [pair(LONG), pair("Why?"), pair(f"{LONG} or not")]
    assert prompts(*rows, conversations=True) == ["Why?", LONG, f"{LONG} or not"]


def test_prompt_reaches_to_answer():
    asked = f"Question: {LONG}\n{LONG}\nAnswer:"
    row = chat.encode_answer(f"{asked} he", (len(asked) + 1, len(asked) + 3))
    assert prompts(row) == [asked]


def test_personal_end_is_left_out():
    assert prompts(pair(f"{LONG} 0301234"), conversations=True) == [LONG.removesuffix(" thirteen")]


def test_prompts_are_distinct_and_three():
    assert prompts(*["The end of it"] * 3) == ["The end"]
    assert len(prompts(*(f"word{letter} and more of it" for letter in "abcdef"))) == 3
