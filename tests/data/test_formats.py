"""Detection of the text column and of layouts of conversations; no column is trained on by elimination."""

import json
import uuid

import datasets
import pytest

from lora_tuner.config import TrainConfig
from lora_tuner.data import chat
from lora_tuner.data.dataset import load_dataset
from lora_tuner.errors import DataError

from ..data_files import TEXTS, jsonl, rows, table

LAYOUTS = (
    "of such layouts these are read: messages; prompt and completion; conversations (ShareGPT); instruction and output as "
    "texts (Alpaca)."
)


def conversations(dataset):
    return [json.loads(row.removeprefix(chat.CHAT_MARK)) for row in dataset.train + dataset.held_out]


def turns(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(contents)]


# The text column

NESTED = {
    "answers": lambda number, text: {"question": text, "answers": [f"answer {number}"]},
    "output": lambda number, text: {"instruction": text, "output": {"answer": number}},
    "mapping": lambda number, text: {"title": text, "mapping": {"a": {"message": {"content": text}}}},
    "data": lambda number, text: {"source": f"s{number}", "data": {"text": text}},
    "turns": lambda number, text: {"id": f"c{number}", "turns": [text, text]},
    "tags": lambda number, text: {"body": text, "tags": ["a"]},
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_column_stops_text_guess(refusal, name):
    records = [NESTED[name](number, text) for number, text in enumerate(TEXTS)]
    message = refusal("a.jsonl", jsonl(records))
    assert message.startswith(
        f"a.jsonl: which column is the text? Name one with --text-column: '{next(iter(records[0]))}' ("
    )
    assert f"'{name}' (lists, objects or bytes)" in message
    assert message.endswith(f"Lists, objects or bytes are in {name}; {LAYOUTS}")


def test_nested_column_stops_guess_everywhere(refusal, load, tmp_path):
    data = datasets.Dataset.from_list([{"title": text, "answers": [text]} for text in TEXTS])
    data.to_parquet(str(tmp_path / "a.parquet"))
    quoted = "".join(
        f'"{text}","[\'{number}\']"\n' for number, text in enumerate(TEXTS)
    )  # as pandas writes lists
    assert f"Lists, objects or bytes are in answers; {LAYOUTS}" in refusal("a.parquet")
    assert f"Lists, objects or bytes are in answers; {LAYOUTS}" in refusal("a.csv", "title,answers\n" + quoted)
    late = [{"title": text} for text in TEXTS * 5] + [{"title": "x", "turns": ["y"]}]
    assert refusal("late.jsonl", jsonl(late), streaming=True) == (
        "late.jsonl: a row has a list or object in 'turns', and the first rows in 'title': name one with --text-column."
    )
    assert rows(load("a.parquet", text_column="title")) == sorted(TEXTS)


CODES = {
    "uuids": [str(uuid.UUID(int=number * 7**40 % 2**128)) for number in range(30)],
    "hashes": [f"{number * 7**20:040x}" for number in range(30)],
    "numbered": [f"sample-{number}" for number in range(30)],
    "files": [f"my photo {number}.jpg" for number in range(30)],
    "urls": [f"https://example.org/articles/{number}?long={'x' * 200}" for number in range(30)],
    "times": [f"2024-01-{number + 1:02} 12:00:00" for number in range(30)],
}


@pytest.mark.parametrize("kind", CODES)
def test_column_of_codes_is_no_text(refusal, load, kind):
    records = [{"key": code, "score": number} for number, code in enumerate(CODES[kind])]
    length = round(sum(map(len, CODES[kind])) / 30)
    assert refusal("a.jsonl", jsonl(records)) == (
        f"a.jsonl: which column is the text? Name one with --text-column: 'key' (codes, {length} "
        "characters on average), 'score' (numbers, 2). There are only codes in key, such as "
        f"{CODES[kind][0][:60]}."
    )
    records = [{"key": code, "body": text} for code, text in zip(CODES[kind], TEXTS, strict=True)]
    dataset = load("b.jsonl", jsonl(records))
    assert (dataset.layout, rows(dataset)) == ("column 'body'", sorted(TEXTS))


def test_csv_columns_of_codes_are_refused(refusal, load):
    content = "id,stars\n" + "".join(f"r{number},{number}\n" for number in range(30))
    assert "There are only codes in id, stars, such as r0." in refusal("a.csv", content)
    assert load("a.csv", text_column="id").layout == "column 'id'"


@pytest.mark.parametrize("name", ["text", "content"])
def test_column_named_text_may_hold_codes(load, name):
    records = [{"id": number, name: code, "more": {"a": 1}} for number, code in enumerate(CODES["uuids"])]
    dataset = load("a.jsonl", jsonl(records))
    assert (dataset.layout, rows(dataset)) == (f"column '{name}'", sorted(CODES["uuids"]))


def test_short_texts_are_no_codes(load):
    words = ["你好。", "今天天气很好。", "Hi there!", "Is it 5.30?", "No.", "Да, да", "Wow"]
    words += [
        "emma",
        "olivia",
        "ava",
        "isabella",
        "sophia",
        "mia",
        "amelia",
        "harper",
        "abigail",
        "emily",
        "ella",
    ]
    assert rows(load("a.jsonl", jsonl({"name": word} for word in words))) == sorted(words)


def test_message_per_row_is_refused(refusal):
    records = [message for text in TEXTS for message in turns(text, "Yes.")]
    assert refusal("a.jsonl", jsonl(records)) == (
        "a.jsonl: which column is the text? Name one with --text-column: 'role' (labels, 6 characters on average), "
        "'content' (text, 64). 'content' looks like text. To read conversations, put the messages of each into one list, "
        "`messages`."
    )


def test_text_column_of_plain_text_is_refused(refusal, load, tmp_path):
    assert refusal("a.txt", "one\ntwo\n", text_column="body") == (
        "a.txt is plain text without columns: leave --text-column out."
    )
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "some" / "b.csv").write_text(table(header=("body", "n")))
    assert load("some", text_column="body").layout == "plain text, column 'body'"


# Conversations


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
def test_sharegpt_is_read_as_conversations(load, tmp_path, name):
    values = [
        [{"from": "human", "value": text}, {"from": "gpt", "value": f"Answer {number}."}]
        for number, text in enumerate(TEXTS)
    ]
    records = [{"id": f"c{number}", "conversations": value} for number, value in enumerate(values)]
    content = json.dumps(records) if name == "a.json" else jsonl(records)
    if name == "a.csv":
        quoted = [json.dumps(value).replace('"', '""') for value in values]
        content = "id,conversations\n" + "".join(f'c{number},"{text}"\n' for number, text in enumerate(quoted))
    if name == "a.parquet":
        content = None
        datasets.Dataset.from_list(records).to_parquet(str(tmp_path / name))
    dataset = load(name, content)
    assert (dataset.format, dataset.layout, dataset.counts.read) == ("ShareGPT", "ShareGPT", 30)
    expected = [turns(text, f"Answer {number}.") for number, text in enumerate(TEXTS)]
    assert sorted(conversations(dataset), key=str) == sorted(expected, key=str)
    assert load.notices == [
        "Reading conversations (ShareGPT): only the answers are trained on. Use --text-column to train on plain text."
    ]


@pytest.mark.parametrize(
    ("message", "role"),
    [
        ({"from": "human", "value": "a"}, "user"),
        ({"from": "User", "value": "a"}, "user"),
        ({"from": "chatgpt", "value": "a"}, "assistant"),
        ({"from": "bing", "value": "a"}, "assistant"),
        ({"from": "bard", "value": "a"}, "assistant"),
        ({"from": "assistant", "value": "a"}, "assistant"),
        ({"from": "system", "value": "a"}, "system"),
        ({"from": "tool", "value": "a"}, "tool"),
        ({"role": "user", "content": "a"}, "user"),
    ],
)
def test_sharegpt_roles_are_renamed(load, message, role):
    records = [{"conversations": [message, {"from": "gpt", "value": f"answer {number}"}]} for number in range(20)]
    for first, _ in conversations(load("a.jsonl", jsonl(records))):
        assert first == {"role": role, "content": "a"}


def test_sharegpt_system_column_comes_first(load):
    turn = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    records = [{"system": f"Rule {number}.", "conversations": turn} for number in range(20)]
    assert sorted(row["system"] for row in conversations(load("a.jsonl", jsonl(records)))) == sorted(
        f"Rule {number}." for number in range(20)
    )


def test_alpaca_is_read_as_conversations(load):
    records = [
        {
            "instruction": f"Translate {number}.",
            "input": "" if number % 2 else "Haus",
            "output": f"house {number}",
        }
        for number in range(20)
    ]
    dataset = load("a.json", json.dumps(records))
    assert (dataset.format, dataset.layout) == ("Alpaca", "Alpaca")
    expected = [
        {"prompt": f"Translate {number}." + ("" if number % 2 else "\nHaus"), "completion": f"house {number}"}
        for number in range(20)
    ]
    assert sorted(conversations(dataset), key=str) == sorted(expected, key=str)


def test_alpaca_system_and_history_are_kept(load):
    records = [
        {
            "instruction": f"And {number}?",
            "input": "",
            "output": "Yes.",
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
        }
        for number in range(20)
    ]
    for row in conversations(load("a.json", json.dumps(records))):
        messages = turns("Hi", "Hello", row["messages"][2]["content"], "Yes.")
        assert row == {"messages": messages, "system": "Be brief."}


def test_hub_features_stop_text_guess():
    from lora_tuner.data import formats, readers

    data = datasets.Dataset.from_list(
        [{"title": text, "turns": [{"speaker": "a", "said": text}]} for text in TEXTS]
    )
    for source in (data, data.to_iterable_dataset()):
        with pytest.raises(DataError, match="Lists, objects or bytes are in turns"):
            formats.detect_layout(readers.table_from_dataset("owner/name", source), TrainConfig(), True)


def test_layout_names_each_column(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text("\n".join(TEXTS[:10]))
    (tmp_path / "a" / "2.csv").write_text(table(TEXTS[10:20]))
    (tmp_path / "a" / "3.jsonl").write_text(jsonl({"body": text} for text in TEXTS[20:]))
    assert load_dataset(TrainConfig(dataset="a")).layout == "plain text, column 'text', column 'body'"


# The setting `format`

CONVERSATION = turns("so?", "yes")


@pytest.mark.parametrize(
    ("format", "row", "layout"),
    [
        ("messages", {"talk": CONVERSATION, "title": "a b"}, "messages in 'talk'"),
        ("sharegpt", {"messages": CONVERSATION, "conversations": CONVERSATION}, "ShareGPT"),
        ("alpaca", {"instruction": "so?", "output": "yes", "prompt": "x y", "completion": "z"}, "Alpaca"),
        (
            "prompt-completion",
            {"question": "so?", "answer": "yes", "topic": "a b"},
            "prompt and completion in 'question' and 'answer'",
        ),
        ("text", {"body": "so?", "score": 1}, "column 'body'"),
        ("text", {"content": "so?", "messages": CONVERSATION}, "column 'content'"),
    ],
)
def test_format_reads_what_it_names(load, format, row, layout):
    rows = [json.loads(json.dumps(row).replace("so?", f"so {number}?")) for number in range(20)]
    assert load("a.jsonl", jsonl(rows), format=format).layout == layout


@pytest.mark.parametrize(
    ("format", "needs"),
    [
        ("messages", "a list of messages, in a column such as messages"),
        ("sharegpt", "a list of messages, in a column such as conversations"),
        ("alpaca", "instruction, and output or response"),
        (
            "prompt-completion",
            "one of prompt, instruction, question, query, input, and one of completion, response, answer, output",
        ),
    ],
)
def test_format_without_its_columns_lists_columns(refusal, format, needs):
    rows = jsonl({"body": text, "prompt": "a", "question": "b", "answer": "c"} for text in TEXTS)
    assert refusal("a.jsonl", rows, format=format) == (
        f"a.jsonl: --format {format} needs {needs}: its columns are body, prompt, question, answer."
    )
    assert (
        refusal("a.txt", "one\ntwo\n", format=format) == f"a.txt is plain text: --format {format} needs {needs}."
    )


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (
            {"question": "a", "answer": "b", "topic": "c d"},
            "--format prompt-completion reads prompt and completion in",
        ),
        ({"few_shot": CONVERSATION, "title": "a b"}, "--format messages reads messages in 'few_shot'"),
        ({"talk": CONVERSATION, "thread": CONVERSATION}, "of such layouts these are read"),
        (
            {"prompt": "a", "question": "b", "answer": "c"},
            "Name one with --text-column: 'prompt' (labels, 1 character on average), 'question' (labels, 1), 'answer'",
        ),
        (
            {"question": "a", "context": "b", "answer": "c"},
            "Name one with --text-column: 'question' (labels, 1 character on average), 'context' (labels, 1), 'answer'",
        ),
    ],
)
def test_doubtful_columns_name_the_option(refusal, row, hint):
    text = refusal("a.jsonl", jsonl(row | {"n": number} for number in range(20)))
    assert hint in text
    assert ("--format" in text) == ("--format" in hint)


def test_empty_lists_beside_conversations_are_ignored(load):
    """As pandas writes them into csv files."""
    lines = [
        f"\"[{{'role': 'user', 'content': 'q{n}'}}, {{'role': 'assistant', 'content': 'a{n}'}}]\",[]"
        for n in range(20)
    ]
    assert load("a.csv", "\n".join(["conversation,images", *lines])).layout == "messages in 'conversation'"
    lines = [f"say {n} now,it is {n} then,[]" for n in range(20)]
    dataset = load("b.csv", "\n".join(["question,answer,images", *lines]))
    assert dataset.layout == "prompt and completion in 'question' and 'answer'"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": CONVERSATION, "rejected": CONVERSATION},
        {"conversations": CONVERSATION[:1], "chosen": CONVERSATION[1], "rejected": CONVERSATION[1]},
        {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
    ],
)
def test_preference_data_is_refused_by_name(refusal, load, row):
    assert refusal("a.jsonl", jsonl([row] * 9)).startswith(
        "a.jsonl: chosen and rejected are preference data: give --objective dpo (or orpo, kto) to learn to prefer chosen."
    )


def test_labels_of_wanted_answers_need_filter(refusal, load):
    rows = jsonl({"prompt": f"so {n}?", "completion": "yes", "label": n % 2 == 0} for n in range(40))
    assert refusal("a.jsonl", rows) == (
        "a.jsonl: 'label' says which answers are wanted: --objective kto learns from all of them, and --where label=True "
        "keeps these."
    )
    assert load("a.jsonl", rows, where=["label=True"]).counts.filtered == 20
