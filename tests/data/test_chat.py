"""Conversations: read by the conventions of TRL and OpenAI, learnt by their answers, spoken through the template."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from lora_tuner import Generator, Library, ModelOptions, SamplingParams, TrainConfig, evaluation, resume, train
from lora_tuner.data import chat, packing, tokenization
from lora_tuner.data.dataset import load_dataset
from lora_tuner.errors import DataError, TrainingError
from lora_tuner.models.loading import load_base, load_tokenizer
from lora_tuner.models.resolve import find_base
from lora_tuner.training.inputs import preview
from lora_tuner.training.setup import prepare_training

from .. import tiny_models
from ..cli.test_commands import run

TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def talker(folder, template=TEMPLATE):
    """A tiny Llama that was taught no conversation, but has a template for one; its turns end with its end of text."""
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
def talking(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("talk") / "talker")


@pytest.fixture
def tokenizer(talking):
    return load_tokenizer(find_base(str(talking)))


def conversation(question, *more):
    """Messages of a user and an assistant in turn."""
    return [
        {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate((question, *more))
    ]


def talks(count=60):
    return [conversation(f"what of {text[:12]}", text) for text in tiny_models.reviews(count)]


@pytest.fixture
def told(talking, tmp_path):
    """A configuration for a run of a second on conversations."""
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": it}) + "\n" for it in talks()))

    def make(**changes):
        quick = {"base": str(talking), "dataset": "talks.jsonl", "max_steps": 6, "max_length": 128, "batch_size": 2}
        quick |= {"rank": 4, "learning_rate": 1e-2, "eval_rows": 8, "device": "cpu"}
        return TrainConfig.model_validate(quick | changes)

    return make


def learnt(tokenizer, text):
    """What a row reads, and the parts of it that are learnt."""
    (row,) = tokenization.encode_texts(tokenizer, [text])
    parts, learning = [], False
    for token in row.tolist():
        if token >= 0:
            if not learning:
                parts.append([])
            parts[-1].append(token)
        learning = token >= 0
    return tokenizer.decode(tokenization.token_ids(row)), [tokenizer.decode(part) for part in parts]


def plain(text):
    return text


# What is learnt


def test_only_answers_have_labels(tokenizer):
    row = chat.encode_messages(conversation("so?", "yes", "really?", "the actor\nworks"), plain)
    read, parts = learnt(tokenizer, row)
    end = tiny_models.END
    assert read == (
        f"<|start|>user\nso?{end}\n<|start|>assistant\nyes{end}\n<|start|>user\nreally?{end}\n<|start|>assistant\n"
        f"the actor\nworks{end}\n"
    )
    assert parts == [f"yes{end}\n", f"the actor\nworks{end}\n"]


def test_chat_tokens_equal_template_tokens(tokenizer):
    messages = [{"role": "system", "content": "be brief"}, *conversation("so?", "yes", "and?", "no")]
    (row,) = tokenization.encode_texts(tokenizer, [chat.encode_messages(messages, plain)])
    assert tokenization.token_ids(row).tolist() == tokenizer.apply_chat_template(messages, return_dict=False)


def test_chat_batch_masks_questions(tokenizer):
    (row,) = tokenization.encode_texts(tokenizer, [chat.encode_messages(conversation("so?", "yes"), plain)])
    batch = packing.collate([[row, row]], tokenizer.pad_token_id)
    labels, inputs = batch["labels"][0], batch["input_ids"][0]
    assert inputs.tolist() == [*tokenization.token_ids(row).tolist()] * 2
    assert [label for label in labels.tolist() if label != packing.IGNORE_INDEX] == 2 * [
        it for it in row.tolist() if it >= 0
    ]
    assert int((labels != packing.IGNORE_INDEX).sum()) == 2 * tokenization.count_predictions(row)
    assert inputs.min() >= 0


def test_mixed_rows_encode_as_alone(tokenizer):
    texts = ["one two", chat.encode_messages(conversation("so?", "yes"), plain), "three"]
    mixed = tokenization.encode_texts(tokenizer, texts)
    for text, row in zip(texts, mixed, strict=True):
        np.testing.assert_array_equal(tokenization.encode_texts(tokenizer, [text])[0], row)


def test_answer_without_end_gets_eos(talking, tmp_path):
    folder = talker(
        tmp_path / "endless",
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )
    read, parts = learnt(
        load_tokenizer(find_base(str(folder))), chat.encode_messages(conversation("so?", "yes"), plain)
    )
    assert read == f"user: so?\nassistant: yes\n{tiny_models.END}"
    assert "".join(parts).endswith(f"yes\n{tiny_models.END}")
    assert "so" not in "".join(parts)


def test_prompt_completion_uses_chat_template(tokenizer, gpt2):
    row = chat.encode_pair("so?", "yes", plain)
    assert (
        learnt(tokenizer, row)[0] == f"<|start|>user\nso?{tiny_models.END}\n<|start|>assistant\nyes{tiny_models.END}\n"
    )
    read, parts = learnt(load_tokenizer(find_base(str(gpt2))), row)
    assert read == f"so? yes{tiny_models.END}"
    assert parts == [f" yes{tiny_models.END}"]


def test_prompt_completion_accepts_message_lists(tokenizer):
    both = conversation("so?", "yes")
    assert chat.encode_pair(both[:1], both[1:], plain) == chat.encode_messages(both, plain)


PHI = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN = (  # it writes thoughts for the last answer alone
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(("template", "last"), [(PHI, "no{}\n{}"), (QWEN, "<think>\n\n</think>\n\nno{}\n")])
def test_template_with_suffix_finds_answers(tmp_path, template, last):
    tokenizer = load_tokenizer(find_base(str(talker(tmp_path / "talker", template))))
    end = tiny_models.END
    row = chat.encode_messages(conversation("so?", "yes", "and?", "no"), plain)
    parts = learnt(tokenizer, row)[1]
    assert parts[0].rstrip("\n") == f"yes{end}"
    assert parts[1] == last.format(end, end)
    assert "and" not in "".join(parts)


def test_template_date_is_fixed(talking, tmp_path):
    template = "{{ date_string if date_string is defined else 'today' }}" + TEMPLATE
    tokenizer = load_tokenizer(find_base(str(talker(tmp_path / "dated", template))))
    assert learnt(tokenizer, chat.encode_messages(conversation("so?", "yes"), plain))[0].startswith(
        "26 Jul 2024<|start|>"
    )


def test_greeting_and_last_question_have_no_labels(tokenizer, talking, tmp_path):
    greeting = [{"role": "assistant", "content": "hello"}, *conversation("so?", "yes", "thanks")]
    assert learnt(tokenizer, chat.encode_messages(greeting, plain))[1] == [f"yes{tiny_models.END}\n"]
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    folder = talker(tmp_path / "endless", endless)
    parts = learnt(
        load_tokenizer(find_base(str(folder))), chat.encode_messages(conversation("so?", "yes", "thanks"), plain)
    )[1]
    assert "".join(parts) == f" yes\n{tiny_models.END}"


def test_pair_without_template_keeps_prefix(llama):
    from tokenizers import processors

    tokenizer = load_tokenizer(find_base(str(llama)))
    first = tokenizer.convert_tokens_to_ids("a")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="a $A", special_tokens=[("a", first)]
    )
    (row,) = tokenization.encode_texts(tokenizer, [chat.encode_pair("so?", "yes", plain)])
    assert row[0] == ~first
    asked = tokenization.encode_texts(tokenizer, ["so?"], add_eos=False)[0].tolist()
    assert tokenization.token_ids(row)[: len(asked)].tolist() == asked
    with pytest.raises(DataError, match="A message contains"):
        tokenization.encode_texts(tokenizer, [chat.encode_pair(f"so {tiny_models.END}", "yes", plain)])


def test_prompt_with_chat_mark_is_text(talking):
    generator = Generator(options=ModelOptions(base=str(talking), device="cpu"))
    for prompt in ("\x02hello", "\x02[1]", '\x02{"prompt": "a", "completion": "b"}'):
        assert min(generator.encode_prompt(prompt).token_ids) >= 0


def test_long_conversation_tokenizes_only_its_beginning(tokenizer, monkeypatch):
    read = []
    real = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **how: read.append(len(text)) or real(self, text, **how)
    )
    row = chat.encode_messages(conversation("so?", "yes " * 100_000), plain)
    tokenization.encode_texts(tokenizer, [row], max_tokens=16)
    assert read == [16 * tokenization.MAX_TOKEN_CHARS]


def test_conversations_differing_in_indents_are_kept(tmp_path):
    rows = [{"messages": conversation("so?", f"if x:\n{' ' * number}y")} for number in range(1, 30)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(it) + "\n" for it in rows))
    assert load_dataset(TrainConfig(dataset="talks.jsonl")).counts.duplicates == 0


def test_keep_lines_with_conversations_fails(tmp_path):
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": conversation("so?", "yes")}) + "\n")
    with pytest.raises(DataError, match="conversations keep their line breaks, so leave --keep-lines out"):
        load_dataset(TrainConfig(dataset="talks.jsonl", keep_lines=True))


def test_template_rewriting_history_fails(talking, tmp_path):
    folder = talker(tmp_path / "counts", "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(DataError, match="renders earlier messages differently as the conversation grows"):
        tokenization.encode_texts(
            load_tokenizer(find_base(str(folder))), [chat.encode_messages(conversation("so?", "yes"), plain)]
        )


def test_messages_without_template_fail(gpt2):
    with pytest.raises(DataError) as error:
        tokenization.encode_texts(
            load_tokenizer(find_base(str(gpt2))), [chat.encode_messages(conversation("so?", "yes"), plain)]
        )
    assert str(error.value).startswith(
        "This base has no chat template: use an instruction-tuned base, such as smollm2-135m. Conversation: ["
    )


def test_special_token_in_message_fails(tokenizer):
    with pytest.raises(DataError) as error:
        tokenization.encode_texts(tokenizer, [chat.encode_messages(conversation("so <|start|>?", "yes"), plain)])
    assert str(error.value).startswith(
        "A message contains <|start|>, a special token of this base: remove it. Conversation: [{"
    )


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
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(it) + "\n" for it in rows))
    notices = []
    corpus = load_dataset(TrainConfig(dataset="talks.jsonl"), lambda it: notices.append(it.text))
    assert corpus.format == format
    assert corpus.counts.duplicates == 2
    assert all(chat.is_chat(text) for text in corpus.train + corpus.held_out)
    assert notices[0] == (
        f"Reading conversations ({format}): only the answers are trained on. Use --text-column to train on plain text."
    )
    datasets.Dataset.from_list(rows).to_parquet("talks.parquet")
    assert load_dataset(TrainConfig(dataset="talks.parquet")).hash() == corpus.hash()


def test_message_cleaning_keeps_code_and_html(tmp_path):
    """Code has indents, and HTML is what some answers are about."""
    said = "  \nfor x in y:\r\n    print('<b>')\n\n\n\tno\x07 bell\ufeff "
    rows = [{"messages": conversation(f"so {number}?", said)} for number in range(30)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(it) + "\n" for it in rows))
    corpus = load_dataset(TrainConfig(dataset="talks.jsonl"))
    answers = {json.loads(text.removeprefix(chat.CHAT_MARK))[1]["content"] for text in corpus.train + corpus.held_out}
    assert answers == {"for x in y:\n    print('<b>')\n\n\n\tno bell"}


def test_text_column_overrides_conversation_columns(tmp_path):
    rows = [{"prompt": f"so {number}?", "completion": f"yes {number}"} for number in range(30)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(it) + "\n" for it in rows))
    corpus = load_dataset(TrainConfig(dataset="talks.jsonl", text_column="completion"))
    assert corpus.format == "text"
    assert sorted(corpus.train + corpus.held_out) == sorted(f"yes {number}" for number in range(30))


def test_conversations_without_answer_are_empty(tmp_path):
    rows = [{"messages": it} for it in talks(20)] + [{"messages": conversation("hm?")}, {"messages": None}]
    rows += [{"messages": conversation("hm?", "  ")}]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(it) + "\n" for it in rows))
    assert load_dataset(TrainConfig(dataset="talks.jsonl")).counts.empty == 3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("hello", "messages is not a list of messages: hello"),
        ([], "messages is not a list of messages: []"),
        ([{"role": "user"}], "the content of message 1 is not a string: [{'role': 'user'}]"),
        (
            [{"role": "boss", "content": "go"}],
            "message 1 needs a role, one of system, developer, user, assistant, tool: [{'role':",
        ),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{}]}],
            "message 1 has tool calls, which are not supported",
        ),
        (
            [{"role": "assistant", "content": "a", "weight": 0}],
            "message 1 has a weight, which is not supported",
        ),
        ([*conversation("a"), "b"], "message 2 needs a role, one of"),
        ([{"role": "user", "content": [{"type": "image"}]}], "the content of message 1 is not a string: "),
    ],
)
def test_invalid_messages_fail_with_number(tmp_path, value, text):
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": value}) + "\n")
    with pytest.raises(DataError) as error:
        load_dataset(TrainConfig(dataset="talks.jsonl"))
    assert str(error.value).startswith(f"talks.jsonl: {text}")


def test_text_prompt_with_message_completion_fails(tmp_path):
    (tmp_path / "talks.jsonl").write_text(json.dumps({"prompt": "so?", "completion": conversation("a")}) + "\n")
    with pytest.raises(DataError, match="prompt and completion must be two strings, or two lists of messages"):
        load_dataset(TrainConfig(dataset="talks.jsonl"))


def test_folder_of_text_and_conversations_fails(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.jsonl").write_text(json.dumps({"messages": conversation("so?", "yes")}) + "\n")
    (tmp_path / "some" / "b.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError) as error:
        load_dataset(TrainConfig(dataset="some"))
    assert str(error.value) == "some: some files contain messages and others text: use files of one format."


# Runs


def test_run_trains_and_evaluates_answers(told, talking):
    adapter = train(told())
    data = adapter.manifest.data
    assert data.format == "messages"
    job = prepare_training(told())
    assert adapter.manifest.result.tokens == sum(tokenization.count_predictions(row) for row in job.held_out)
    assert adapter.manifest.result.gain > 0
    nll, count = 0.0, 0
    model = load_base(find_base(str(talking)), ModelOptions(device="cpu")).model
    for row in job.held_out:  # by hand, with transformers alone
        ids = torch.from_numpy(tokenization.token_ids(row)).long()
        with torch.inference_mode():
            each = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        answers = torch.from_numpy(row[1:] >= 0)
        nll, count = nll + each[answers].sum().item(), count + int(answers.sum())
    assert adapter.manifest.result.base_loss == pytest.approx(nll / count, abs=1e-5)
    again = evaluation.evaluate([adapter], options=ModelOptions(device="cpu")).cells[0][0]
    assert again.loss == pytest.approx(adapter.manifest.result.loss, abs=1e-5)


def test_question_tokens_have_no_loss(told):
    """Other questions of the same length, masked: the same labels, and only they are counted."""
    job = prepare_training(told(packing=False))
    batch = job.collate([job.sequences[0], job.sequences[1]])
    with torch.inference_mode(), job.base.lm_head.skip_lm_head():
        labels = batch.pop("labels")
        nll = job.base.lm_head.nll(job.model(**batch, use_cache=False).logits, labels)
    assert ((nll != 0).sum(1) == (labels != packing.IGNORE_INDEX).sum(1)).all()
    assert (labels == packing.IGNORE_INDEX).sum() > 10


def test_interrupted_chat_run_resumes_exactly(told, stop_at):
    whole = train(told(name="whole"))

    with stop_at(3):
        train(told(name="half"))
    assert resume("half").sha256 == whole.sha256


def test_merge_verifies_on_answers(told):
    train(told())
    assert "perplexity" in run("merge", "talks", "--out", "merged/talks").stdout


def test_rows_truncated_before_answer_are_dropped(told, tmp_path):
    rows = [conversation(" ".join(tiny_models.reviews(12)), "yes"), *talks(40)]
    rows += [conversation(f"{number} " + " ".join(tiny_models.reviews(12)), "yes") for number in range(20)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": it}) + "\n" for it in rows))
    notices = []
    job = prepare_training(told(), lambda it: notices.append(getattr(it, "text", "")))
    assert all(tokenization.count_predictions(row) for row in job.sequences.rows)
    assert [text for text in notices if text.endswith("within 128 tokens there is nothing to learn in them.")]
    assert len(job.held_out) < 8
    assert [text for text in notices if text.endswith("within 512 tokens nothing is learnt in them.")]
    assert math.isfinite(evaluation.measure_loss(job.model, job.base, job.held_out).loss)
    with pytest.raises(TrainingError, match="No row has anything to learn in it"):
        prepare_training(told(max_length=8))


def test_preview_marks_labels(told):
    rows = preview(told(), 2)
    for row in rows:
        text = "".join(token for token, label in zip(row.tokens, row.labels, strict=True) if label)
        answer = json.loads(row.after)[1]["content"]
        assert text.startswith(answer[:-1])
        assert text.endswith(f"{tiny_models.END}\n")
    shown = run("train", "--base", told().base, "--dataset", "talks.jsonl", "--preview", "1").stdout
    assert "[<|start|>]|" in shown


# Speaking


@pytest.fixture
def speaker(told):
    train(told(name="speaker"))
    return ["generate", "--adapter", "speaker", "--greedy", "--max-new-tokens", "8", "--device", "cpu"]


GREEDY = SamplingParams(greedy=True, max_new_tokens=8)


def test_generate_chat_uses_template(speaker, tokenizer):
    messages = [{"role": "system", "content": "be brief"}, *conversation("so?")]
    generator = Generator("speaker", options=ModelOptions(device="cpu"))
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert generator.encode_prompt(messages).token_ids == ids
    answer = generator.generate(messages, GREEDY)
    assert answer.prompt == "so?"
    shown = run(*speaker, "--chat", "--system", "be brief", "so?").stdout
    assert shown == answer.text + "\n"
    assert shown != run(*speaker, "--chat", "so?").stdout
    both = generator.generate_batch([(messages, None), (messages, "speaker")], GREEDY)
    assert both[1].text == answer.text
    compared = run("compare", "--adapter", "speaker", *speaker[3:], "--chat", "--system", "be brief", "so?", "--json")
    assert [it["text"] for it in json.loads(compared.stdout)] == [it.text for it in both]


def test_interactive_chat_keeps_history_until_new(speaker):
    generator = Generator("speaker", options=ModelOptions(device="cpu"))
    first = generator.generate(conversation("so?"), GREEDY).text
    second = generator.generate(conversation("so?", first, "and?"), GREEDY).text
    done = run(*speaker, "--chat", stdin="so?\nand?\n/new\nso?\n\n")
    answers = [part.partition("Enter a prompt")[0].rstrip("\n") for part in done.stdout.split("Generated text: ")[1:]]
    assert answers == [first.rstrip("\n"), second.rstrip("\n"), first.rstrip("\n")]
    assert "/new: a new conversation" in done.stderr


def test_new_command_without_chat_fails(speaker):
    done = run(*speaker, stdin="/new\n\n")
    assert "Error: There is no /new: /adapter NAME (speaker), /base, or an empty line to end." in done.stderr
    assert Library().names() == ["speaker"]


def test_system_without_chat_fails(speaker):
    assert run(*speaker, "--system", "be brief", "so?", exit_code=1).stderr.endswith(
        "Error: --system is for conversations: give --chat too.\n"
    )


def test_chat_without_template_fails(gpt2):
    done = run("generate", "--base", gpt2, "--chat", "so?", exit_code=1)
    assert done.stderr.endswith(
        "Error: This base has no chat template: use an instruction-tuned base, such as smollm2-135m.\n"
    )
