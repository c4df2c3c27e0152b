"""Rows as the usual tools write them, read as conversations; parts that cannot be read are named."""

import json

import datasets
import pandas
import pytest

from lora_tuner.config import TrainConfig
from lora_tuner.data import chat
from lora_tuner.data.dataset import load_dataset

from ..data_files import TEXTS, jsonl

USER, ANSWER = {"role": "user", "content": "so?"}, {"role": "assistant", "content": "yes"}
WEATHER = {"name": "rain", "description": "Rain", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"place": "X"}}}
CALL_TEXT = json.dumps({"name": "rain", "arguments": {"place": "X"}})
SHAREGPT_PAIR = [{"from": "human", "value": "so?"}, {"from": "gpt", "value": "yes"}]


def read(row):
    """Return the messages and the other parts of a row, as they are stored."""
    stored = json.loads(row.removeprefix(chat.CHAT_MARK))
    return {"messages": stored} if isinstance(stored, list) else stored


@pytest.fixture
def load_row(load):
    """Load a file of copies of one row, each with its number in the first question."""

    def call(row, count=12, name="a.jsonl", **settings):
        rows = [json.loads(json.dumps(row).replace("so?", f"so {number}?")) for number in range(count)]
        dataset = load(name, jsonl(rows), **settings)
        assert dataset.counts.invalid == 0, dataset.sources[0].invalid
        texts = [text.replace("\n", "\\n") for text in dataset.train + dataset.held_out]
        stored = {
            json.dumps(read(text.replace(f"so {number}?", "so?"))) for text in texts for number in _number(text)
        }
        (only,) = stored
        return dataset, json.loads(only)

    return call


def _number(text):
    return [text.partition("so ")[2].partition("?")[0]]


AS_WRITTEN = {
    "LLaMA-Factory tools": (
        {
            "conversations": [
                {"from": "human", "value": "so?"},
                {"from": "function_call", "value": CALL_TEXT},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "yes"},
            ],
            "system": "be brief",
            "tools": json.dumps([WEATHER]),
        },
        "ShareGPT",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "rain"},
                ANSWER,
            ],
            "tools": [WEATHER],
            "system": "be brief",
        },
    ),
    "LLaMA-Factory parallel calls": (
        {
            "conversations": [
                SHAREGPT_PAIR[0],
                {"from": "function_call", "value": f"<think>hm</think>\n[{CALL_TEXT}, {CALL_TEXT}]"},
            ]
        },
        "ShareGPT",
        {"messages": [USER, {"role": "assistant", "content": "<think>hm</think>", "tool_calls": [CALL, CALL]}]},
    ),
    "FastChat": ({"id": "identity_0", "conversations": SHAREGPT_PAIR}, "ShareGPT", {"messages": [USER, ANSWER]}),
    "ShareGPT52K": (
        {"id": "x", "conversations": [message | {"markdown": None, "text": None} for message in SHAREGPT_PAIR]},
        "ShareGPT",
        {"messages": [USER, ANSWER]},
    ),
    "Axolotl weights": (
        {
            "conversations": [
                *({"from": "human", "value": "so?"}, {"from": "gpt", "value": "no", "weight": 0}),
                *({"from": "human", "value": "well?"}, {"from": "gpt", "value": "yes", "train": True}),
            ]
        },
        "ShareGPT",
        {"messages": [USER, ANSWER | {"content": "no", "weight": 0}, USER | {"content": "well?"}, ANSWER]},
    ),
    "OpenAI tools": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": "{}"}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "rain"},
                ANSWER | {"weight": 1},
            ],
            "tools": [{"type": "function", "function": WEATHER}],
            "parallel_tool_calls": False,
        },
        "messages",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": "{}"}}
                    ],
                },
                {"role": "tool", "content": "rain", "tool_call_id": "c1"},
                ANSWER,
            ],
            "tools": [{"type": "function", "function": WEATHER}],
        },
    ),
    "OpenAI functions": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": {"name": "rain", "arguments": "{}"}},
                {"role": "function", "name": "rain", "content": "wet"},
                ANSWER,
            ],
            "functions": [WEATHER],
        },
        "messages",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "rain", "arguments": "{}"}}],
                },
                {"role": "tool", "content": "wet", "name": "rain"},
                ANSWER,
            ],
            "tools": [WEATHER],
        },
    ),
    "Hugging Face conversation": (
        {"conversation": [USER, ANSWER], "language": "English", "turn": 1},
        "messages in 'conversation'",
        {"messages": [USER, ANSWER]},
    ),
    "dialogue": ({"dialogue": SHAREGPT_PAIR}, "ShareGPT in 'dialogue'", {"messages": [USER, ANSWER]}),
    "role and value": (
        {"conversations": [{"role": "user", "value": "so?"}, {"role": "assistant", "value": "yes"}]},
        "ShareGPT",
        {"messages": [USER, ANSWER]},
    ),
    "role and text": (
        {"messages": [{"role": "user", "text": "so?"}, {"role": "assistant", "text": "yes"}]},
        "messages",
        {"messages": [USER, ANSWER]},
    ),
    "parts as JSON": (
        {
            "messages": [
                USER | {"content": '[{"type": "text", "text": "so?"}]'},
                ANSWER | {"content": [{"type": "text", "text": "ye"}, {"type": "text", "text": "s"}]},
            ]
        },
        "messages",
        {"messages": [USER, ANSWER]},
    ),
    "sequence of objects": (
        {"conversations": {"from": ["human", "gpt"], "value": ["so?", "yes"]}},
        "ShareGPT",
        {"messages": [USER, ANSWER]},
    ),
    "OpenOrca": (
        {"id": "t0.1", "system_prompt": "be brief", "question": "so?", "response": "yes"},
        "prompt and completion in 'question' and 'response'",
        {"prompt": "so?", "completion": "yes", "system": "be brief"},
    ),
    "Dolly": (
        {"instruction": "so?", "context": "It rains.", "response": "yes", "category": "closed_qa"},
        "Alpaca in 'instruction' and 'response'",
        {"prompt": "so?\nIt rains.", "completion": "yes"},
    ),
    "question and number": (
        {"question": "so?", "answer": 42},
        "prompt and completion in 'question' and 'answer'",
        {"prompt": "so?", "completion": "42"},
    ),
    "TRL lists as JSON": (
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        "prompt and completion",
        {"messages": [USER, ANSWER]},
    ),
}


@pytest.mark.parametrize("tool", AS_WRITTEN)
def test_row_is_read_as_its_tool_writes_it(load_row, tool):
    row, layout, expected = AS_WRITTEN[tool]
    dataset, stored = load_row(row)
    assert (dataset.layout, stored) == (layout, expected)


@pytest.mark.parametrize(
    "columns",
    [
        *(("prompt", "response"), ("instruction", "response"), ("question", "answer"), ("query", "response")),
        *(("input", "output"), ("prompt", "answer"), ("question", "completion")),
    ],
)
def test_pair_of_columns_is_prompt_and_completion(load_row, columns):
    dataset, stored = load_row(dict(zip(("id", *columns), (7, "so?", "yes"), strict=True)))
    assert (dataset.format, stored) == ("prompt and completion", {"prompt": "so?", "completion": "yes"})


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "pandas.csv"])
def test_nested_values_of_tables_are_read(load, tmp_path, name):
    rows = [{"instruction": f"so {n}?", "output": "yes", "history": [["Hi", "Hello"]]} for n in range(12)]
    if name == "a.parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / name))
    else:
        import pandas as pd

        dump = str if name == "pandas.csv" else json.dumps
        pd.DataFrame([row | {"history": dump(row["history"])} for row in rows]).to_csv(
            tmp_path / name, index=False
        )
    dataset = load(name)
    for text in dataset.train + dataset.held_out:
        assert [message["content"] for message in read(text)["messages"]][:2] == ["Hi", "Hello"]
    assert dataset.counts.invalid == 0


def test_conversations_of_pandas_csv_are_read(load, tmp_path):
    """pandas writes lists as Python does."""
    import pandas as pd

    rows = [{"messages": [USER | {"content": f'so "{n}"?'}, ANSWER | {"content": "it's"}]} for n in range(12)]
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "b.csv")
    assert load("a.csv").hash() == load("a.jsonl", jsonl(rows)).hash()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"system": "a", "system_prompt": "b"}, "two system texts beside the conversation"),
        ({"tools": [WEATHER], "functions": [WEATHER]}, "tools beside functions"),
        ({"tools": "rain"}, "tools that are no JSON"),
        ({"tools": ["[1]"]}, "tools that are no objects"),
        ({"weight": 0}, "weight 0, which leaves nothing to learn: choose rows with --where weight=..."),
        ({"train": False}, "train False, which leaves nothing to learn: choose rows with --where train=..."),
        ({"weight": 0.5}, "weight other than 0 and 1 beside the conversation"),
        ({"documents": [{"text": "a"}]}, "documents beside the conversation"),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [{"function": {}}]}]},
            "tool_calls that are no functions with",
        ),
        ({"messages": [USER, {"role": "function_call", "content": "rain()"}]}, "tool_calls that are no JSON"),
        (
            {
                "messages": [
                    USER,
                    ANSWER | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
                ]
            },
            "train_detail: an answer is learned as a whole",
        ),
        (
            {"messages": [USER, ANSWER | {"content": '[{"type": "image", "image": "a"}]'}]},
            "content of type 'image'",
        ),
    ],
)
def test_part_that_is_not_read_is_refused(load, row, reason):
    good = [
        {"messages": [USER | {"content": f"so {number}?"}, ANSWER], "weight": 1, "train": True}
        for number in range(30)
    ]
    dataset = load("a.jsonl", jsonl([*good, {"messages": [USER, ANSWER]} | row]))
    (found,) = dataset.sources[0].invalid
    assert found.startswith(reason)
    assert dataset.sources[0].invalid[found][1].startswith(f"{dataset.description} line 31")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a", "output": ""}, "no output"),
        ({"instruction": "", "output": "b"}, "no instruction"),
        ({"instruction": ["a"], "output": "b"}, "a list in column 'instruction'"),
        ({"instruction": "a", "output": {"b": 1}}, "a dict in column 'output'"),
        ({"instruction": "a", "output": "b", "history": "c"}, "a history that is no list of pairs of texts"),
        ({"instruction": "a", "output": "b", "input": "c", "context": "d"}, "input beside context"),
    ],
)
def test_alpaca_row_names_its_column(load, row, reason):
    good = [{"instruction": f"so {number}?", "output": "yes"} for number in range(30)]
    (found,) = load("a.jsonl", jsonl([*good, row])).sources[0].invalid
    assert found.startswith(reason)


def test_lists_as_numpy_writes_them_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    question = [{"type": "text", "text": 'so "{0}" } {\n array(\\ it\'s'}]
    rows = [
        {"messages": [USER | {"content": question}, ANSWER | {"content": f"yes {number}"}]} for number in range(9)
    ]
    for row in rows:
        row["messages"][1]["content"] = [{"type": "text", "text": row["messages"][1]["content"]}]
    data = datasets.Dataset.from_list(rows)
    data.to_csv("a.csv")
    data.to_json("a.jsonl")
    texts = [
        set(dataset.train)
        for dataset in (load_dataset(TrainConfig(dataset=name)) for name in ("a.csv", "a.jsonl"))
    ]
    assert texts[0] == texts[1] != set()


def test_history_as_numpy_writes_it_is_read(load, tmp_path):
    rows = [
        {"instruction": f"so {number}?", "output": "yes", "history": [["a", f"b {number}"], ["c", "d"]]}
        for number in range(9)
    ]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "b.csv")
    read_csv, read_json = load("b.csv", (tmp_path / "b.csv").read_bytes()), load("b.jsonl", jsonl(rows))
    assert read_csv.train == read_json.train
    assert '"content": "c"}' in read_csv.train[0]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_alpaca_with_numbers_as_output_is_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    frame = pandas.DataFrame(
        {"instruction": [f"double {number}" for number in range(9)], "output": range(0, 18, 2)}
    )
    if name == "a.csv":
        frame.to_csv(name, index=False)
    elif name == "a.parquet":
        frame.to_parquet(name)
    else:
        frame.to_json(name, orient="records", lines=True)
    dataset = load_dataset(TrainConfig(dataset=name))
    assert dataset.format == "Alpaca"
    assert {text[1:] for text in dataset.train + dataset.held_out} == {
        json.dumps({"prompt": f"double {number}", "completion": str(2 * number)}) for number in range(9)
    }


def test_unread_columns_are_named(load):
    rows = [
        {
            "messages": [USER | {"content": text}, ANSWER],
            "title": text,
            "model": "x y",
            "tool_choice": "auto",
            "score": 1,
        }
        for text in TEXTS
    ]
    load("a.jsonl", jsonl(rows))
    assert load.notices[0] == (
        "Reading conversations (messages): only the answers are trained on. Not read: title, tool_choice. Use "
        "--text-column to train on plain text."
    )


def test_text_beside_conversation_is_named(load):
    rows = [{"instruction": text, "output": "yes", "text": f"Q: {text}"} for text in TEXTS]
    dataset = load("a.jsonl", jsonl(rows))
    assert (dataset.format, dataset.layout) == ("text", "column 'text'")
    assert load.notices == ["Reading column 'text', and not instruction, output: --format alpaca reads these."]
    assert load("a.jsonl", format="alpaca").format == "Alpaca"


def test_streamed_layout_is_that_of_all(load_row):
    for tool in ("LLaMA-Factory tools", "Dolly", "OpenAI functions"):
        row, layout, expected = AS_WRITTEN[tool]
        dataset, stored = load_row(row, streaming=True, shuffle_buffer=4, eval_rows=2)
        assert (dataset.layout, stored) == (layout, expected)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", '\n{"messages": 5}\n', "line 4"),
        ("a.json", None, "row 2"),
        ("a.csv", '"a\nb",5\n\n', "line 5"),
    ],
)
def test_place_of_row_is_line_of_file(load, name, content, place):
    row = {"messages": [USER, ANSWER]}
    start = jsonl([row]) + "\n"
    if name == "a.csv":
        quoted = json.dumps(row["messages"]).replace('"', '""')
        start, content = (
            f'id,messages\n"x\ny","{quoted}"\n\n',
            '5,5\n"' + f'z","{quoted.replace("so?", "so 2?")}"\n',
        )
        place = "line 5"
    if name == "a.json":
        start, content = json.dumps([row, {"messages": 5}, {"messages": [USER | {"content": "a"}, ANSWER]}]), ""
    more = jsonl([{"messages": [USER | {"content": "a"}, ANSWER]}]) if name == "a.jsonl" else ""
    dataset = load(name, start + content + more, max_invalid=1)
    assert dataset.sources[0].invalid == {"messages that are no list": (1, f"{dataset.description} {place}")}
