"""Texts made of columns by a template, and labels of the answer column alone."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_tuner import TrainConfig, train
from lora_tuner.adapters.adapter import RUN_FILE
from lora_tuner.cli.display import describe_template
from lora_tuner.data import chat, packing, tokenization
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.row_template import fill_question, fill_questions, find_question
from lora_tuner.data.rows import Source
from lora_tuner.data.streaming import StreamingDataset
from lora_tuner.settings_files import resolve_settings
from lora_tuner.training.preview import preview
from lora_tuner.training.setup import prepare_training

from .. import tiny_models
from ..cli.test_commands import run
from ..data_files import TEXTS, jsonl
from .test_chat_template import CHATML, make_tokenizer

TEMPLATE = r"Question: {question}\nAnswer: {answer}"
QUESTIONS = [
    {"id": n, "question": f"Is <b>{n}</b>\n true?", "answer": f"It is, {text[:20]}"}
    for n, text in enumerate(TEXTS)
]


def filled(row):
    """Fill TEMPLATE by hand, with values that are cleaned."""
    return f"Question: Is {row['id']} true?\nAnswer: {row['answer']}"


def plain(dataset):
    return sorted(map(chat.plain_text, dataset.train + dataset.held_out))


# The text


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet", "a.tsv"])
@pytest.mark.parametrize("answer", [None, "answer"])
def test_template_fills_columns_of_any_file(load, tmp_path, name, answer):
    import pandas as pd

    writers = {
        "a.csv": lambda path: pd.DataFrame(QUESTIONS).to_csv(path, index=False),
        "a.tsv": lambda path: pd.DataFrame(QUESTIONS).to_csv(path, index=False, sep="\t"),
        "a.json": lambda path: path.write_text(json.dumps(QUESTIONS)),
        "a.jsonl": lambda path: path.write_text(jsonl(QUESTIONS)),
        "a.parquet": lambda path: datasets.Dataset.from_list(QUESTIONS).to_parquet(str(path)),
    }
    writers[name](tmp_path / name)
    dataset = load(name, template=TEMPLATE, answer_column=answer)
    assert plain(dataset) == sorted(map(filled, QUESTIONS))
    assert (dataset.format, dataset.clean) == ("template", "full")
    rest = ", of which 'answer' alone is learned" if answer else ""
    assert dataset.layout == f"template of 'question', 'answer'{rest}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a}{b}", "xy"),
        (r"{a}\t{a}\\n{{b}}", "x\tx\\n{b}"),
        ("{{{a}}}\n", "{x}\n"),
        ("<p>  {a} {my column}</p>", "<p>  x 7</p>"),
        ("{a.b}", "z"),
        ("{n}", "7.50"),
    ],
)
def test_template_text_is_kept_as_written(load, template, text):
    row = {"a": " x ", "b": "<i>y</i>", "my column": 7, "a.b": "z", "n": 7.5}
    rows = [row | {"a": f" x{n} ", "a.b": f"z{n}"} for n in range(12)]
    content = jsonl(rows).replace("7.5}", "7.50}").replace("7.5,", "7.50,")
    found = {
        text.replace(f"x{n}", "x").replace(f"z{n}", "z")
        for n in range(12)
        for text in plain(load("a.jsonl", content, template=f"{template} {{a}}"))
    }
    assert f"{text} x" in found


@pytest.mark.parametrize("clean", ["full", "lines", "none"])
@pytest.mark.parametrize("answer", [None, "answer"])
def test_cleaning_of_values_moves_no_row(load, clean, answer):
    sides = [
        {
            side: {
                int(text.split("Is ")[1].replace("<b>", "").split("<")[0].split()[0])
                for text in map(chat.plain_text, getattr(dataset, side))
            }
            for side in ("train", "held_out")
        }
        for dataset in (
            load(
                "a.jsonl",
                jsonl(QUESTIONS),
                template="<b>Q</b>: {question} A: {answer}",
                clean=mode,
                answer_column=chosen,
            )
            for mode, chosen in (("full", None), (clean, answer))
        )
    ]
    assert sides[0] == sides[1]
    assert min(map(len, sides[0].values())) > 2


def test_code_in_one_column_keeps_values_as_written(load):
    code = "def f(x):\n    return [x,\n        {}]\n"
    rows = [{"q": f"Write {n}", "a": "b", "c": "d", "e": "f", "code": code.format(n)} for n in range(20)]
    dataset = load("a.jsonl", jsonl(rows), template="{q}{a}{c}{e}: {code}")
    assert dataset.clean == "none"
    assert f"Write 3bdf: {code.format(3)}" in plain(dataset)


def test_class_label_is_written_by_name(load, tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    data = datasets.Dataset.from_list(
        [{"text": text, "label": n % 2} for n, text in enumerate(TEXTS)], features=features
    )
    data.to_parquet(str(tmp_path / "a.parquet"))
    assert plain(load("a.parquet", template="{text} -> {label}")) == sorted(
        f"{text} -> {('bad', 'good')[n % 2]}" for n, text in enumerate(TEXTS)
    )


def test_empty_values_are_counted_by_what_lacks(load):
    rows = [
        *QUESTIONS,
        {"question": "", "answer": "yes"},
        {"question": "so?", "answer": "  "},
        {"question": None, "answer": ""},
    ]
    rows.append({"question": ["so?"], "answer": "yes"})
    dataset = load("a.jsonl", jsonl(rows), template=TEMPLATE, answer_column="answer", max_invalid=0.1)
    assert (dataset.counts.empty, dataset.counts.invalid) == (1, 2)
    assert dataset.sources[0].invalid == {
        "nothing in the answer column 'answer'": (1, f"{dataset.description} line 32"),
        "a list in column 'question'": (1, f"{dataset.description} line 34"),
    }
    assert "Question: \nAnswer: yes" in plain(dataset)
    whole = load("a.jsonl", template=TEMPLATE)
    assert (whole.counts.empty, whole.counts.invalid) == (1, 1)
    assert "Question: so?\nAnswer: " in plain(whole)


def test_template_selects_rows_and_streams(load):
    content = jsonl(row | {"kind": row["id"] % 2} for row in QUESTIONS)
    settings = {"template": TEMPLATE, "answer_column": "answer"}
    expected = sorted(filled(row) for row in QUESTIONS if row["id"] % 2)
    dataset = load("a.jsonl", content, where=["kind=1"], **settings)
    assert plain(dataset) == expected
    config = TrainConfig(
        dataset=dataset.name, where=["kind=1"], streaming=True, shuffle_buffer=7, eval_rows=2, **settings
    )
    tokenizer = tiny_models.tokenizer()
    stream = iter(StreamingDataset(config, tokenizer, frozenset(), [Source(config.dataset)]))
    streamed, wanted = [], sorted(map(chat.plain_text, dataset.train))
    while len(set(streamed)) < len(wanted):
        for row in next(stream):
            assert tokenizer.decode(row[row >= 0]).startswith("It is, ")
            streamed.append(tokenizer.decode(tokenization.token_ids(row)).removesuffix(tiny_models.END))
    assert sorted(set(streamed)) == wanted


@pytest.mark.parametrize("answer", [None, "answer"])
def test_copies_of_values_are_found_in_template(load, answer):
    """The words of the template itself make no rows alike."""
    form = (
        "Below is a question that someone has asked, and then an answer to it.\n\n{question}\n\nAnswer: {answer}"
    )
    values = [" ".join(f"{word}{number * 7 % 11}{number}" for word in "abcdefghijklm") for number in range(60)]
    rows = [{"question": value, "answer": f"yes {number}"} for number, value in enumerate(values)]
    assert load("a.jsonl", jsonl(rows), template=form, answer_column=answer).counts.near_duplicates == 0
    copies = [row | {"answer": "no"} for row in rows]
    assert (
        load("b.jsonl", jsonl([*rows, *copies]), template=form, answer_column=answer).counts.near_duplicates > 5
    )


# Errors

COLUMNS = "the columns of a.jsonl are id, question, answer."


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"template": "{question} {body}"},
            "a.jsonl has no column 'body', which --template names: its columns are id,",
        ),
        (
            {"template": "{}"},
            f"--template has {{}}: in braces stands the name of a column, and nothing else; {COLUMNS}",
        ),
        (
            {"template": "{0}"},
            f"--template has {{0}}: in braces stands the name of a column, and nothing else; {COLUMNS}",
        ),
        ({"template": "{answer.upper}"}, "--template has {answer.upper}: in braces stands the name of a column"),
        ({"template": "{answer[0]}"}, "--template has {answer[0]}: in braces stands the name of a column"),
        ({"template": "{answer!r}"}, "--template has {answer!r}: in braces stands the name of a column"),
        ({"template": "{answer:>10}"}, "--template has {answer:>10}: in braces stands the name of a column"),
        (
            {"template": "{answer} }"},
            "--template has a single } at character 10: write it twice to have one in the text,",
        ),
        ({"template": "{answer"}, "--template has a single { at character 1: write it twice"),
        ({"template": "{answer {id}}"}, "--template has a single { at character 1: write it twice"),
        ({"template": "so?"}, f"--template names no column, as in {{id}}: {COLUMNS}"),
        ({"template": "a\x02{id}"}, "--template has a control character: remove it."),
        (
            {"answer_column": "body"},
            "a.jsonl has no column 'body', which --answer-column names: its columns are id,",
        ),
        (
            {"answer_column": "id"},
            "--answer-column id is not in --template: write {id} once where the answer stands; the",
        ),
        (
            {"template": "{answer}{answer}", "answer_column": "answer"},
            "--answer-column answer is more than once in --template: write {answer} once",
        ),
    ],
)
def test_bad_template_is_one_line(refusal, settings, text):
    assert refusal("a.jsonl", jsonl(QUESTIONS), **({"template": TEMPLATE} | settings)).startswith(text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--text-column", "answer"], "template and text_column answer contradict each other: give one of them"),
        (["--format", "alpaca"], "template and format alpaca contradict each other: give one of them"),
    ],
)
def test_template_contradicts_other_layouts(options, text):
    done = run("train", "--template", "{question}", *options, exit_code=1)
    assert done.stderr.endswith(f"Error: {text}\n")


def test_answer_column_without_template_fails():
    done = run("train", "--answer-column", "answer", exit_code=1)
    assert "answer_column needs template, which says where in the text the answer stands" in done.stderr


# Labels


def sentencepiece_tokenizer():
    """Train a tokenizer like Llama 2's: words begin with a space mark, and texts with <s>."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        [filled(row) for row in QUESTIONS],
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False),
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def end_adding_tokenizer():
    """Like T5's or OLMo's: the tokenizer adds the end of text itself."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {tiny_models.END}", special_tokens=[(tiny_models.END, tokenizer.eos_token_id)]
    )
    return tokenizer


TOKENIZERS = {
    "gpt2": tiny_models.tokenizer,
    "llama": sentencepiece_tokenizer,
    "adds its end": end_adding_tokenizer,
}
VALUES = [("so?", "yes"), ("Wie heißt 東京?", " «Tōkyō» 🙂\n(yes) "), ("a", "a"), ("<|endoftext|>", "</s> <s>")]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "template", ["Question: {q}\nAnswer: {a}", "{a}", "{q}{a}", "A: {a}\n\nQ: {q}\n", "[{a}]({q}) {{x}}"]
)
def test_labels_are_those_of_template_by_hand(kind, template, tmp_path):
    tokenizer = TOKENIZERS[kind]()
    (tmp_path / "a.json").write_text(json.dumps([{"q": q, "a": a} for q, a in VALUES]))
    dataset = load_dataset(
        TrainConfig(dataset="a.json", template=template, answer_column="a", clean="none"), lambda notice: None
    )
    texts = {chat.plain_text(text): text for text in dataset.train + dataset.held_out}
    assert len(texts) == len(VALUES)
    for question, answer in VALUES:
        text = template.format(q=question, a=answer)
        start = len(template.partition("{a}")[0].replace("{{", "{").replace("}}", "}").format(q=question))
        encoded = tokenizer(text, split_special_tokens=True)
        ids = [*encoded["input_ids"]]
        spans = [encoded.token_to_chars(number) for number in range(len(ids))]
        answer_tokens = {
            number
            for number, span in enumerate(spans)
            if span and span.start < start + len(answer) and span.end > start
        }
        if ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        (row,) = tokenization.encode_texts(tokenizer, [texts[text]])
        assert tokenization.token_ids(row).tolist() == ids
        assert set(np.flatnonzero(row >= 0).tolist()) == answer_tokens | {len(ids) - 1}
        (whole,) = tokenization.encode_texts(tokenizer, [text])
        assert whole.tolist() == ids  # without an answer column, all of the same tokens


def test_answer_row_survives_truncation_and_packing():
    tokenizer = tiny_models.tokenizer()
    text = "Question: " + "so? " * 30 + "Answer: " + "yes " * 30
    row = chat.encode_answer(text, (text.index("yes"), len(text)))
    (whole,) = tokenization.encode_texts(tokenizer, [row])
    for long_rows, count in (("auto", 1), ("truncate", 1), ("chunk", -(-len(whole) // 64))):
        pieces, use = tokenization.encode_rows(tokenizer, [row], 64, long_rows)
        assert len(pieces) == count
        assert np.concatenate(pieces).tolist() == whole[: 64 * count].tolist()
        assert use.answer_tokens == tokenization.count_predictions(whole)
    (short,) = tokenization.encode_texts(tokenizer, [chat.encode_answer("so? yes", (4, 7))])
    labels = packing.collate([[short, short]], 0)["labels"][0]
    assert tokenizer.decode(labels[labels != packing.IGNORE_INDEX]) == f"yes{tiny_models.END}" * 2


def test_template_may_write_turns_of_base():
    """Special tokens of the base in the template are read as such; the token that ends the turn is learned."""
    tokenizer = make_tokenizer(CHATML)
    turns = [{"role": "user", "content": "so?"}, {"role": "assistant", "content": "yes"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    (row,) = tokenization.encode_texts(
        tokenizer, [chat.encode_answer(text, (text.index("yes"), text.index("yes") + 3))]
    )
    assert tokenization.token_ids(row).tolist() == tokenizer.apply_chat_template(turns, return_dict=False)
    assert tokenizer.decode(row[row >= 0]) == "yes<|im_end|>"


# Runs


@pytest.fixture
def template_config(settings, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(
        jsonl({"question": f"what of {text[:12]}", "answer": text} for text in tiny_models.reviews(60))
    )

    def make(**changes):
        quick = {"dataset": "pairs.jsonl", "template": TEMPLATE, "answer_column": "answer", "max_length": 128}
        return settings(**(quick | changes))

    return make


def test_template_run_measures_and_repeats(template_config):
    adapter = train(template_config())
    data = adapter.manifest.data
    assert (data.format, data.template, data.answer_column) == ("template", TEMPLATE, "answer")
    assert adapter.manifest.base.chat_template is None
    job = prepare_training(resolve_settings(TrainConfig, {"name": "again"}, adapter.path / RUN_FILE))
    assert job.manifest.data == data
    assert adapter.manifest.result.tokens == sum(tokenization.count_predictions(row) for row in job.held_out)
    for row in [*job.sequences.rows, *job.held_out]:
        assert job.base.tokenizer.decode(row[row >= 0]).lstrip()[:1].isdigit()
    card = (adapter.path / "README.md").read_text()
    assert r"| Format | template Question: {question}\nAnswer: {answer}, trained on answer alone |" in card
    assert yaml.safe_load((adapter.path / RUN_FILE).read_text())["template"] == TEMPLATE


def test_preview_shows_template_and_labels(template_config):
    (row,) = preview(template_config(), 1)
    question, _, answer = row.after.partition("\nAnswer: ")
    assert question.startswith("Question: what of ")
    learned = [token for token, label in zip(row.tokens, row.labels, strict=True) if label]
    assert "".join(learned).lstrip() == answer + tiny_models.END
    assert all(preview(template_config(answer_column=None), 1)[0].labels[1:])


def test_evaluate_reads_template_of_dataset(template_config):
    train(template_config())
    line = ["evaluate", "pairs", "--eval-dataset", "pairs.jsonl", "--json", "--template", TEMPLATE]
    both = [json.loads(run(*line, *more).stdout) for more in (["--answer-column", "answer"], [])]
    assert json.dumps(both[0]) != json.dumps(both[1])


def test_question_is_filled_in():
    both = r"Question: {question}\nAnswer: {answer}"
    for template, answer, question, filled in (
        (both, "answer", "Why?", "Question: Why?\nAnswer:"),
        (both, None, "Question: Why?", "Question: Why?"),
        ("Poem: {text}", None, "The sea", "Poem: The sea"),
        ("{{x}} {q} -> {a}", "a", "Why?", "{x} Why? ->"),
        ("{a} and {b}: {c}", "c", "Why?", None),
        ("nothing", None, "Why?", None),
    ):
        assert fill_question(template, answer, question) == filled


def test_question_is_found_in_prompt():
    both = r"Question: {question}\nAnswer: {answer}"
    assert find_question(both, "answer", "Question: Why?\nAnswer:") == "Why?"
    assert find_question(both, "answer", "Question: Why") == "Question: Why"
    assert find_question("{a} and {b}: {c}", "c", "x and y:") == "x and y:"


def test_base_is_asked_as_adapters_are():
    template = (r"Q: {q}\nA: {a}", "a")
    assert fill_questions("Why?", {"one": template}) == dict.fromkeys([None, "one"], "Q: Why?\nA:")
    mixed = {None: "Why?", "one": "Q: Why?\nA:", "two": "Why?", "three": "Why?"}
    assert fill_questions("Why?", {"one": template, "two": None, "three": ("{a} {b} {c}", "c")}) == mixed


def test_template_adapter_is_asked_through_it(template_config):
    texts = (text.partition(": ")[2] for text in tiny_models.reviews(60))
    Path("asks.jsonl").write_text(jsonl({"question": f"what of {text[:12]}", "answer": text} for text in texts))
    trained = ["--template", TEMPLATE, "--answer-column", "answer", "--max-length", 128, "--max-steps", 1]
    base = template_config().base
    lines = run(
        *("train", "--base", base, "--dataset", "asks.jsonl", "--name", "pairs", *trained),
        *("--eval-rows", 4, "--device", "cpu", "--learning-rate", 0.01),
    ).stderr.splitlines()
    (compared,) = (line for line in lines if "cli.py compare" in line)
    assert compared.startswith("  python cli.py compare 'what of ")
    greedy = ["--adapter", "pairs", "--greedy", "--max-new-tokens", "4", "--device", "cpu"]
    asked = run("generate", *greedy, "what now")
    assert asked.stdout.startswith("Question: what now\nAnswer:")
    assert "asking through it (--no-chat: bare text)." in asked.stderr
    typed = run("generate", *greedy, "Question: what now\nAnswer:")
    assert (typed.stdout, typed.stderr) == (asked.stdout, "")
    bare = run("generate", *greedy, "--no-chat", "what now")
    assert bare.stdout.startswith("what now")
    assert bare.stderr == ""
    compared = run("compare", *greedy, "what now", "--json")
    assert "The base is asked alike." in compared.stderr
    outputs = json.loads(compared.stdout)
    assert [output["prompt"] for output in outputs] == ["Question: what now\nAnswer:"] * 2
    session = run("generate", *greedy, stdin="what now\n\n")
    assert asked.stdout in session.stdout
    assert "asking through it" in session.stderr


def test_several_columns_show_typed_form():
    template = (r"Subject: {s}\nBody: {b}\nAnswer: {a}", "a")
    (form,) = describe_template("mail", template, ["hello"])
    assert r"as $'Subject: ...\nBody: ...\nAnswer:' in bash; when asked, Alt-Enter is a line break." in form
    (escape,) = describe_template("mail", template, [r"Subject: x\nBody: y\nAnswer:"])
    assert "is no line break: write $'Subject:" in escape
    assert describe_template("mail", template, ["Subject: x\nBody: y\nAnswer:"]) == []
