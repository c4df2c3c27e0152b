"""Names of columns that differ by case or spaces alone, and columns as an error shows them."""

import pytest

from lora_tuner.data.columns import describe_columns, likely_text, match_column

from .. import tiny_models
from ..data_files import TEXTS, jsonl, rows


@pytest.mark.parametrize(
    ("name", "columns", "match"),
    [
        ("body", ["Body", "id"], "Body"),
        (" Ticket text", ["ticket  TEXT"], "ticket  TEXT"),
        ("tickettext", ["Ticket Text\u00a0"], "Ticket Text\u00a0"),
        ("Body", ["body", "Body"], "Body"),
        ("BODY", ["body", "Body"], None),
        ("body", ["bodies", "body_"], None),
    ],
)
def test_column_is_matched_by_letters(name, columns, match):
    assert match_column(name, columns) == match


RECORDS = [
    {"Ticket Text": text, "Answer ": f"yes {number}", "Kind": "a" if number % 2 else "b", "n": number}
    for number, text in enumerate(TEXTS)
]
SETTINGS = {
    "text column": ({"text_column": "ticket text"}, {"ticket text": "Ticket Text"}),
    "where": ({"text_column": "Ticket Text", "where": ["kind=a"]}, {"kind": "Kind"}),
    "group": ({"text_column": "Ticket Text", "group_by": "N"}, {"N": "n"}),
    "template": ({"template": "{ticket text}: {answer}"}, {"ticket text": "Ticket Text", "answer": "Answer "}),
    "answer": (
        {"template": "{Ticket Text}: {Answer }", "answer_column": "answer"},
        {"answer": "Answer "},
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("streaming", [False, True])
def test_other_case_or_spaces_is_read(load, tmp_path, case, streaming):
    settings, matched = SETTINGS[case]
    exact = {
        name: [v.replace("kind", "Kind") for v in value] if isinstance(value, list) else value
        for name, value in settings.items()
    }
    for wanted, column in matched.items():
        exact = {n: v.replace(wanted, column) if isinstance(v, str) else v for n, v in exact.items()}
    dataset = load("a.jsonl", jsonl(RECORDS), streaming=streaming, **settings)
    told = [f"{tmp_path / 'a.jsonl'}: '{wanted}' is read as its column '{column}', as only case or spaces differ."
            for wanted, column in matched.items()]  # fmt: skip
    assert [notice for notice in load.notices if "is read as" in notice] == told
    assert rows(load("a.jsonl", streaming=streaming, **exact)) == rows(dataset)


def test_columns_of_one_spelling_stay_apart(load, refusal):
    records = [{"body": text, "Body": f"other {text}", "n": "a"} for text in TEXTS]
    assert rows(load("a.jsonl", jsonl(records), text_column="Body")) == sorted(f"other {text}" for text in TEXTS)
    message = refusal("a.jsonl", text_column="BODY")
    assert (
        message
        == "a.jsonl has no column 'BODY'; by case or spaces alone differ 'body', 'Body': name one of them exactly."
    )
    message = refusal("a.jsonl", template="{bodY}")
    assert (
        "has no column 'bodY', which --template names; by case or spaces alone differ 'body', 'Body'" in message
    )


def test_default_column_may_be_capitalized(load):
    assert rows(load("a.jsonl", jsonl({"Title": f"{text}", "Text": text} for text in TEXTS))) == sorted(TEXTS)
    assert "'text' is read as its column 'Text'" in load.notices[0]
    talks = [{"Question": f"why {text}", "Answer": f"because {text}"} for text in TEXTS]
    assert load("b.jsonl", jsonl(talks)).layout == "prompt and completion in 'Question' and 'Answer'"


def test_column_kinds_are_described():
    texts = tiny_models.reviews(40)
    records = [
        {"id": f"x-{n}", "stars": f"{n % 5},5", "kind": "ab"[n % 2], "done": n > 5, "none": None, "tags": ["a"], "body": text}
        for n, text in enumerate(texts)
    ]  # fmt: skip
    described = describe_columns([*records[0]], records)
    assert described.startswith(
        "'id' (codes, 4 characters on average), 'stars' (numbers, 3), 'kind' (labels, 1), 'done' (true or false, "
    )
    assert "'none' (empty), 'tags' (lists, objects or bytes), 'body' (text, " in described
    assert likely_text([*records[0]], records) == "body"
    assert likely_text(["a", "b"], [{"a": f"one {n} two", "b": f"two {n} one"} for n in range(9)]) == ""
