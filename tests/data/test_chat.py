"""Conversations in the formats of TRL and OpenAI: encoding, labels of the answers, and training."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from lora_tuner import Generator, ModelOptions, TrainConfig, resume, train
from lora_tuner.data import chat, packing, tokenization
from lora_tuner.data.dataset import load_dataset
from lora_tuner.errors import DataError, TrainingError
from lora_tuner.evaluation import gain_matrix, held_out_loss
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.models.tokenizer import load_tokenizer
from lora_tuner.training.preview import preview
from lora_tuner.training.setup import prepare_training

from .. import tiny_models
from ..cli.test_commands import run

TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def save_chat_base(folder, template=TEMPLATE):
    """Save a tiny Llama with a chat template whose turns end with the EOS token."""
    tiny_models.save_model(folder, "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    tokenizer.chat_template = template.replace("<|end|>", tiny_models.END)
    tokenizer.save_pretrained(folder)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory):
    return save_chat_base(tmp_path_factory.mktemp("talk") / "talker")


@pytest.fixture
def tokenizer(chat_base):
    return load_tokenizer(find_base(str(chat_base)))


def conversation(question, *replies):
    """Messages of a user and an assistant in turn."""
    return [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate((question, *replies))
    ]


def conversations(count=60):
    return [conversation(f"what of {text[:12]}", text) for text in tiny_models.reviews(count)]


def write_talks(folder):
    """Write conversations to a file, and return the settings of a short run on them."""
    file = folder / "talks.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations()))
    quick = {"dataset": str(file), "max_steps": 6, "max_length": 128, "batch_size": 2}
    return quick | {"rank": 4, "learning_rate": 1e-2, "eval_rows": 8, "device": "cpu"}


@pytest.fixture
def chat_config(chat_base, tmp_path):
    """Make the configuration of a short run on conversations."""
    quick = write_talks(tmp_path) | {"base": str(chat_base), "dataset": "talks.jsonl"}
    return lambda **changes: TrainConfig.model_validate(quick | changes)


def decode_labels(tokenizer, text):
    """Decode a row, and each part of it that has labels."""
    (row,) = tokenization.encode_texts(tokenizer, [text])
    parts, in_label = [], False
    for token in row.tolist():
        if token >= 0:
            if not in_label:
                parts.append([])
            parts[-1].append(token)
        in_label = token >= 0
    return tokenizer.decode(tokenization.token_ids(row)), [tokenizer.decode(part) for part in parts]


def unchanged(text):
    return text


# Labels


def test_only_answers_have_labels(tokenizer):
    row = chat.encode_messages(conversation("so?", "yes", "really?", "the actor\nworks"), unchanged)
    read, parts = decode_labels(tokenizer, row)
    end = tiny_models.END
    assert read == (
        f"<|start|>user\nso?{end}\n<|start|>assistant\nyes{end}\n<|start|>user\nreally?{end}\n<|start|>assistant\n"
        f"the actor\nworks{end}\n"
    )
    assert parts == [f"yes{end}\n", f"the actor\nworks{end}\n"]


def test_chat_tokens_equal_template_tokens(tokenizer):
    messages = [{"role": "system", "content": "be brief"}, *conversation("so?", "yes", "and?", "no")]
    (row,) = tokenization.encode_texts(tokenizer, [chat.encode_messages(messages, unchanged)])
    assert tokenization.token_ids(row).tolist() == tokenizer.apply_chat_template(messages, return_dict=False)


def test_chat_batch_masks_questions(tokenizer):
    (row,) = tokenization.encode_texts(tokenizer, [chat.encode_messages(conversation("so?", "yes"), unchanged)])
    batch = packing.collate([[row, row]], tokenizer.pad_token_id)
    labels, inputs = batch["labels"][0], batch["input_ids"][0]
    assert inputs.tolist() == [*tokenization.token_ids(row).tolist()] * 2
    assert [label for label in labels.tolist() if label != packing.IGNORE_INDEX] == 2 * [
        token for token in row.tolist() if token >= 0
    ]
    assert int((labels != packing.IGNORE_INDEX).sum()) == 2 * tokenization.count_predictions(row)
    assert inputs.min() >= 0


def test_mixed_rows_encode_as_alone(tokenizer):
    texts = ["one two", chat.encode_messages(conversation("so?", "yes"), unchanged), "three"]
    mixed = tokenization.encode_texts(tokenizer, texts)
    for text, row in zip(texts, mixed, strict=True):
        np.testing.assert_array_equal(tokenization.encode_texts(tokenizer, [text])[0], row)


def test_answer_without_end_gets_eos(chat_base, tmp_path):
    folder = save_chat_base(
        tmp_path / "endless",
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )
    read, parts = decode_labels(
        load_tokenizer(find_base(str(folder))), chat.encode_messages(conversation("so?", "yes"), unchanged)
    )
    assert read == f"user: so?\nassistant: yes\n{tiny_models.END}"
    assert "".join(parts).endswith(f"yes\n{tiny_models.END}")
    assert "so" not in "".join(parts)


def test_prompt_completion_uses_chat_template(tokenizer, gpt2):
    row = chat.encode_pair("so?", "yes", unchanged)
    assert (
        decode_labels(tokenizer, row)[0]
        == f"<|start|>user\nso?{tiny_models.END}\n<|start|>assistant\nyes{tiny_models.END}\n"
    )
    read, parts = decode_labels(load_tokenizer(find_base(str(gpt2))), row)
    assert read == f"so? yes{tiny_models.END}"
    assert parts == [f" yes{tiny_models.END}"]


def test_prompt_completion_accepts_message_lists(tokenizer):
    both = conversation("so?", "yes")
    assert chat.encode_pair(both[:1], both[1:], unchanged) == chat.encode_messages(both, unchanged)


PHI = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN = (  # only the last answer has a thinking block
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(("template", "last"), [(PHI, "no{}\n{}"), (QWEN, "<think>\n\n</think>\n\nno{}\n")])
def test_template_with_suffix_finds_answers(tmp_path, template, last):
    tokenizer = load_tokenizer(find_base(str(save_chat_base(tmp_path / "talker", template))))
    end = tiny_models.END
    row = chat.encode_messages(conversation("so?", "yes", "and?", "no"), unchanged)
    parts = decode_labels(tokenizer, row)[1]
    assert parts[0].rstrip("\n") == f"yes{end}"
    assert parts[1] == last.format(end, end)
    assert "and" not in "".join(parts)


def test_template_date_is_fixed(chat_base, tmp_path):
    template = "{{ date_string if date_string is defined else 'today' }}" + TEMPLATE
    tokenizer = load_tokenizer(find_base(str(save_chat_base(tmp_path / "dated", template))))
    assert decode_labels(tokenizer, chat.encode_messages(conversation("so?", "yes"), unchanged))[0].startswith(
        "26 Jul 2024<|start|>"
    )


def test_greeting_and_last_question_have_no_labels(tokenizer, chat_base, tmp_path):
    greeting = [{"role": "assistant", "content": "hello"}, *conversation("so?", "yes", "thanks")]
    assert decode_labels(tokenizer, chat.encode_messages(greeting, unchanged))[1] == [f"yes{tiny_models.END}\n"]
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    folder = save_chat_base(tmp_path / "endless", endless)
    parts = decode_labels(
        load_tokenizer(find_base(str(folder))),
        chat.encode_messages(conversation("so?", "yes", "thanks"), unchanged),
    )[1]
    assert "".join(parts) == f" yes\n{tiny_models.END}"


def test_pair_without_template_keeps_prefix(llama):
    from tokenizers import processors

    tokenizer = load_tokenizer(find_base(str(llama)))
    first = tokenizer.convert_tokens_to_ids("a")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="a $A", special_tokens=[("a", first)]
    )
    (row,) = tokenization.encode_texts(tokenizer, [chat.encode_pair("so?", "yes", unchanged)])
    assert row[0] == ~first
    asked = tokenization.encode_texts(tokenizer, ["so?"], add_eos=False)[0].tolist()
    assert tokenization.token_ids(row)[: len(asked)].tolist() == asked
    with pytest.raises(DataError, match="a message that contains"):
        tokenization.encode_texts(tokenizer, [chat.encode_pair(f"so {tiny_models.END}", "yes", unchanged)])


def test_prompt_with_chat_mark_is_text(chat_base):
    generator = Generator(options=ModelOptions(base=str(chat_base), device="cpu"))
    for prompt in ("\x02hello", "\x02[1]", '\x02{"prompt": "a", "completion": "b"}'):
        assert min(generator.encode_prompt(prompt).token_ids) >= 0


def test_long_conversation_tokenizes_only_its_beginning(tokenizer, monkeypatch):
    lengths = []
    real = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, text, **kwargs: lengths.append(len(text)) or real(self, text, **kwargs),
    )
    row = chat.encode_messages(conversation("so?", "yes " * 100_000), unchanged)
    tokenization.encode_texts(tokenizer, [row], max_tokens=16)
    assert lengths == [16 * tokenization.MAX_TOKEN_CHARS]


def test_conversations_differing_in_indents_are_kept(tmp_path):
    rows = [{"messages": conversation("so?", f"if x:\n{' ' * number}y")} for number in range(1, 30)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_dataset(TrainConfig(dataset="talks.jsonl")).counts.duplicates == 0


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ("def f():\n", "    return 1", "def f():\n    return 1"),
        ("key:\n  - a\n", "  - b\n", "key:\n  - a\n  - b\n"),
        ("a: ", "b", "a: b"),
        ("a:", "\tb", "a:\tb"),
        ("so?", "yes", "so? yes"),
    ],
)
def test_pair_keeps_white_space_between(gpt2, tmp_path, prompt, completion, text):
    pairs = [{"prompt": f"{number} {prompt}", "completion": completion} for number in range(12)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    dataset = load_dataset(TrainConfig(dataset="pairs.json"))
    tokenizer = load_tokenizer(find_base(str(gpt2)))
    for row in tokenization.encode_texts(tokenizer, dataset.train + dataset.held_out):
        whole, learned = (tokenizer.decode(ids) for ids in (tokenization.token_ids(row), row[row >= 0]))
        assert whole.partition(" ")[2] == text + tokenizer.eos_token
        assert learned.lstrip() == completion.lstrip() + tokenizer.eos_token
    flat = load_dataset(TrainConfig(dataset="pairs.json", clean="full"))
    for exact, stripped in ((dataset.train, flat.train), (dataset.held_out, flat.held_out)):
        assert list(map(chat.strip_texts, exact)) == stripped  # no row changes sides


@pytest.mark.parametrize("clean", ["none", "lines", "full"])
def test_message_keeps_outer_space_with_clean_none(tmp_path, clean):
    answer = " <b>yes</b>\n  it is\n"
    rows = [{"messages": conversation(f"so {number}?", answer)} for number in range(12)]
    (tmp_path / "talks.json").write_text(json.dumps([*rows, {"messages": conversation("so 3?", answer.strip())}]))
    dataset = load_dataset(TrainConfig(dataset="talks.json", clean=clean))
    expected = answer if clean == "none" else answer.strip()
    contents = [json.loads(text.removeprefix(chat.CHAT_MARK))[1]["content"] for text in dataset.train]
    assert contents == [expected] * len(contents)
    assert dataset.counts.duplicates == 1


def test_template_rewriting_history_fails(chat_base, tmp_path):
    folder = save_chat_base(
        tmp_path / "counts", "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="the chat template renders differently as the conversation grows"):
        tokenization.encode_texts(
            load_tokenizer(find_base(str(folder))), [chat.encode_messages(conversation("so?", "yes"), unchanged)]
        )


def test_messages_without_template_fail(gpt2):
    with pytest.raises(DataError) as error:
        tokenization.encode_texts(
            load_tokenizer(find_base(str(gpt2))), [chat.encode_messages(conversation("so?", "yes"), unchanged)]
        )
    assert str(error.value) == (
        "This base has no chat template: use an instruction-tuned base, such as smollm2-135m."
    )


def test_special_token_in_message_fails(tokenizer):
    with pytest.raises(DataError) as error:
        tokenization.encode_texts(
            tokenizer, [chat.encode_messages(conversation("so <|start|>?", "yes"), unchanged)]
        )
    assert str(error.value) == "a message that contains <|start|>, a special token of this base"


# Rows


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": conversation("so?", "yes <b>it</b> is\nso")}, "messages"),
        ({"prompt": "so?", "completion": "yes it is\nso"}, "prompt and completion"),
        (
            {"prompt": conversation("so?"), "completion": [{"role": "assistant", "content": "yes"}]},
            "prompt and completion",
        ),
    ],
)
def test_conversations_are_detected_by_columns(tmp_path, row, format):
    rows = [row] * 3 + [json.loads(json.dumps(row).replace("so?", f"so {number}?")) for number in range(30)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notices = []
    dataset = load_dataset(TrainConfig(dataset="talks.jsonl"), lambda notice: notices.append(notice.text))
    assert dataset.format == format
    assert dataset.counts.duplicates == 2
    assert all(chat.is_chat(text) for text in dataset.train + dataset.held_out)
    assert notices[0] == (
        f"Reading conversations ({format}): only the answers are trained on. Use --text-column to train on plain text."
    )
    datasets.Dataset.from_list(rows).to_parquet("talks.parquet")
    assert load_dataset(TrainConfig(dataset="talks.parquet")).hash() == dataset.hash()


def test_message_cleaning_keeps_code_and_html(tmp_path):
    """Code needs its indents, and some answers are about HTML."""
    answer = "  \nfor x in y:\r\n    print('<b>')\n\n\n\tno\x07 bell\ufeff\rand\x0b\x0cso "
    rows = [{"messages": conversation(f"so {number}?", answer)} for number in range(30)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(TrainConfig(dataset="talks.jsonl"))
    answers = {
        json.loads(text.removeprefix(chat.CHAT_MARK))[1]["content"] for text in dataset.train + dataset.held_out
    }
    assert answers == {"for x in y:\n    print('<b>')\n\n\n\tno bell\nand\n\nso"}


def test_text_column_overrides_conversation_columns(tmp_path):
    rows = [{"prompt": f"so {number}?", "completion": f"yes {number}"} for number in range(30)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(TrainConfig(dataset="talks.jsonl", text_column="completion"))
    assert dataset.format == "text"
    assert sorted(dataset.train + dataset.held_out) == sorted(f"yes {number}" for number in range(30))


def test_conversations_without_answer_are_invalid(tmp_path):
    rows = [{"messages": messages} for messages in conversations(60)] + [
        {"messages": conversation("hm?")},
        {"messages": conversation("hm?", "  ")},
        {"messages": None},
        {"messages": []},
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(TrainConfig(dataset="talks.jsonl"))
    assert (dataset.counts.empty, dataset.counts.invalid) == (2, 2)
    assert dataset.sources[0].invalid == {"no answer": (2, "talks.jsonl line 61")}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": "hello"}, "messages that are no list (first: talks.jsonl line 31)"),
        ({"messages": [{"role": "user"}]}, "null content (first: talks.jsonl line 31, message 1)"),
        (
            {"messages": [{"role": "boss", "content": "go"}]},
            "an unknown role (first: talks.jsonl line 31, message 1 has 'boss')",
        ),
        (
            {"messages": [*conversation("a"), "b"]},
            "a message that is no object (first: talks.jsonl line 31, message 2)",
        ),
        (
            {"messages": [*conversation("a"), {"role": "assistant", "content": [{"type": "image_url"}]}]},
            "content of type 'image_url' (first: talks.jsonl line 31, message 2)",
        ),
        (
            {"messages": [*conversation("a"), {"role": "assistant", "content": "b", "weight": 0.5}]},
            "weight other than 0 and 1 (first: talks.jsonl line 31, message 2)",
        ),
        (
            {"messages": conversation("a", "b"), "images": ["a.png"]},
            "images beside the conversation (first: talks.jsonl line 31)",
        ),
        (
            {"messages": conversation("a", "b"), "context": "c"},
            "context beside the conversation (first: talks.jsonl line 31)",
        ),
        (
            {"messages": [{"role": "assistant", "content": "b", "weight": 0}]},
            "no answer (first: talks.jsonl line 31)",
        ),
    ],
)
def test_invalid_row_is_left_out_and_named(tmp_path, row, text):
    """Up to a twentieth of the rows; beyond, the same reasons stop the run."""
    rows = [{"messages": conversation(f"so {number}?", "yes")} for number in range(30)]
    path, notices = tmp_path / "talks.jsonl", []
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, row]))
    dataset = load_dataset(TrainConfig(dataset="talks.jsonl"), lambda notice: notices.append(notice.text))
    counts = vars(dataset.counts)
    assert (counts["invalid"], counts["read"]) == (1, sum(counts.values()) - counts["read"])
    assert f"Left out 1 of 31 rows that cannot be read: 1 with {text}." in notices
    with pytest.raises(DataError) as error:
        load_dataset(TrainConfig(dataset="talks.jsonl", max_invalid=0.01))
    assert str(error.value) == (
        "talks.jsonl: 1 of 31 rows cannot be read, and --max-invalid 0.01 allows no more than that fraction of them: "
        f"1 with {text}. Correct or remove these rows, or read another column."
    )


def test_text_prompt_with_message_completion_fails(tmp_path):
    (tmp_path / "talks.jsonl").write_text(json.dumps({"prompt": "so?", "completion": conversation("a")}) + "\n")
    with pytest.raises(DataError, match="prompt and completion that are neither two texts nor two lists of"):
        load_dataset(TrainConfig(dataset="talks.jsonl"))


def test_folder_of_text_and_conversations_fails(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.jsonl").write_text(json.dumps({"messages": conversation("so?", "yes")}) + "\n")
    (tmp_path / "some" / "b.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError) as error:
        load_dataset(TrainConfig(dataset="some"))
    assert str(error.value) == (
        "some has files of two formats: some/a.jsonl has messages, and some/b.txt has plain text: use files of one format, "
        "or choose one with --format."
    )


# Runs


def test_run_trains_and_evaluates_answers(chat_config, chat_base):
    adapter = train(chat_config())
    data = adapter.manifest.data
    assert data.format == "messages"
    job = prepare_training(chat_config())
    assert adapter.manifest.result.tokens == sum(tokenization.count_predictions(row) for row in job.held_out)
    assert adapter.manifest.result.gain > 0
    nll, count = 0.0, 0
    model = load_base(find_base(str(chat_base)), ModelOptions(device="cpu")).model
    for row in job.held_out:  # with transformers only
        ids = torch.from_numpy(tokenization.token_ids(row)).long()
        with torch.inference_mode():
            each = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        answers = torch.from_numpy(row[1:] >= 0)
        nll, count = nll + each[answers].sum().item(), count + int(answers.sum())
    assert adapter.manifest.result.base_loss == pytest.approx(nll / count, abs=1e-5)
    again = gain_matrix.evaluate([adapter], options=ModelOptions(device="cpu")).cells[0][0]
    assert again.loss == pytest.approx(adapter.manifest.result.loss, abs=1e-5)


def test_question_tokens_have_no_loss(chat_config):
    """Only labels have a loss."""
    job = prepare_training(chat_config(packing=False))
    batch = job.collate([job.sequences[0], job.sequences[1]])
    with torch.inference_mode(), job.base.lm_head.skip_lm_head():
        labels = batch.pop("labels")
        nll = job.base.lm_head.nll(job.model(**batch, use_cache=False).logits, labels)
    assert ((nll != 0).sum(1) == (labels != packing.IGNORE_INDEX).sum(1)).all()
    assert (labels == packing.IGNORE_INDEX).sum() > 10


def test_interrupted_chat_run_resumes_exactly(chat_config, stop_at):
    whole = train(chat_config(name="whole"))

    with stop_at(3):
        train(chat_config(name="half"))
    assert resume("half").sha256 == whole.sha256


def test_merge_verifies_on_answers(chat_config):
    train(chat_config())
    assert "perplexity" in run("merge", "talks", "--out", "merged/talks").stdout


def test_rows_truncated_before_answer_are_dropped(chat_config, tmp_path):
    rows = [conversation(" ".join(tiny_models.reviews(12)), "yes"), *conversations(40)]
    rows += [conversation(f"{number} " + " ".join(tiny_models.reviews(12)), "yes") for number in range(20)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    notices = []
    job = prepare_training(chat_config(), lambda event: notices.append(getattr(event, "text", "")))
    assert all(tokenization.count_predictions(row) for row in job.sequences.rows)
    assert [text for text in notices if text.endswith("with nothing to learn in the first 128 tokens.")]
    assert len(job.held_out) < 8
    assert [text for text in notices if text.endswith("with nothing to predict in the first 512 tokens.")]
    assert math.isfinite(held_out_loss.measure_loss(job.model, job.base, job.held_out).loss)
    with pytest.raises(TrainingError, match="No row has anything to learn:"):
        prepare_training(chat_config(max_length=8))


@pytest.mark.parametrize("streaming", [False, True])
def test_row_rejected_by_template_is_left_out(chat_config, tmp_path, streaming):
    """Whether a template writes a row is known after tokenization: of training and held-out rows alike."""
    odd = [conversation("so <|start|>?", f"yes {number}") for number in range(1, 7)]
    rows = [*conversations(130), *odd]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    notices = []
    stream = {"streaming": True, "shuffle_buffer": 200} if streaming else {}
    config = chat_config(eval_rows=100, **stream)
    adapter = train(config, lambda event: notices.append(getattr(event, "text", "")))
    counts = adapter.manifest.data.counts
    assert counts["invalid"] == 6 - streaming  # a stream tokenizes its first held-out rows alone
    assert counts["read"] == sum(counts.values()) - counts["read"]
    reason = (
        "6 with a message that contains <|start|>, a special token of this base (first: talks.jsonl line 131)"
    )
    assert f"Left out 6 of 136 rows that cannot be read: {reason}." in notices
    with pytest.raises(
        DataError, match=r"^talks.jsonl: 6 of 136 rows cannot be read, and --max-invalid 0.01 allows"
    ):
        train(config.model_copy(update={"max_invalid": 0.01, "name": "other"}))


def test_preview_marks_labels(chat_config):
    rows = preview(chat_config(), 2)
    for row in rows:
        text = "".join(token for token, label in zip(row.tokens, row.labels, strict=True) if label)
        answer = json.loads(row.after)[1]["content"]
        assert text.startswith(answer[:-1])
        assert text.endswith(f"{tiny_models.END}\n")
    shown = run("train", "--base", chat_config().base, "--dataset", "talks.jsonl", "--preview", "1").stdout
    assert "[<|start|>]|" in shown
