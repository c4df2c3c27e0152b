"""`generate` and `compare` with an adapter that has learned conversations: asked through the chat template."""

import json
import shutil

import pytest

from lora_tuner import Generator, Library, ModelOptions, SamplingParams, TrainConfig, train

from ..data.test_chat import chat_base, chat_config, conversation, tokenizer, write_talks  # noqa: F401 - fixtures
from .test_commands import run

GREEDY = SamplingParams(greedy=True, max_new_tokens=8)


@pytest.fixture(scope="module")
def speaker(chat_base, tmp_path_factory):  # noqa: F811
    """Folder of an adapter that has learned conversations."""
    folder = tmp_path_factory.mktemp("speaker")
    places = {"adapters_dir": folder / "adapters", "runs_dir": folder / "runs"}
    return train(TrainConfig(base=str(chat_base), name="speaker", **places, **write_talks(folder))).path


@pytest.fixture
def generate_args(speaker):
    shutil.copytree(speaker, "adapters/speaker")
    return ["generate", "--adapter", "speaker", "--greedy", "--max-new-tokens", "8", "--device", "cpu"]


def test_generate_chat_uses_template(generate_args, tokenizer):  # noqa: F811
    messages = [{"role": "system", "content": "be brief"}, *conversation("so?")]
    generator = Generator("speaker", options=ModelOptions(device="cpu"))
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert generator.encode_prompt(messages).token_ids == ids
    answer = generator.generate(messages, GREEDY)
    assert answer.prompt == "so?"
    shown = run(*generate_args, "--chat", "--system", "be brief", "so?").stdout
    assert shown == answer.text + "\n" == run(*generate_args, "--system", "be brief", "so?").stdout
    assert shown != run(*generate_args, "--chat", "so?").stdout
    both = generator.generate_batch([(messages, None), (messages, "speaker")], GREEDY)
    assert both[1].text == answer.text
    compared = run(
        "compare", "--adapter", "speaker", *generate_args[3:], "--chat", "--system", "be brief", "so?", "--json"
    )
    assert [row["text"] for row in json.loads(compared.stdout)] == [row.text for row in both]


def test_interactive_chat_keeps_history_until_new(generate_args):
    generator = Generator("speaker", options=ModelOptions(device="cpu"))
    first = generator.generate(conversation("so?"), GREEDY).text
    second = generator.generate(conversation("so?", first, "and?"), GREEDY).text
    done = run(*generate_args, stdin="so?\nand?\n/new\nso?\n\n")
    answers = [
        part.partition("Enter a prompt")[0].rstrip("\n") for part in done.stdout.split("Generated text: ")[1:]
    ]
    assert answers == [first.rstrip("\n"), second.rstrip("\n"), first.rstrip("\n")]
    assert done.stderr.startswith("Using adapter speaker, through its chat template.\n/help lists the commands; ")
    assert "New conversation." in done.stderr


def test_new_command_without_chat_fails(generate_args):
    done = run(*generate_args, "--no-chat", stdin="/new\n\n")
    assert "Error: There is no conversation: each prompt is continued by itself." in done.stderr
    assert Library().names() == ["speaker"]


def test_system_without_chat_fails(generate_args, gpt2):
    for arguments in ([*generate_args, "--no-chat"], ["generate", "--base", str(gpt2)]):
        assert run(*arguments, "--system", "be brief", "so?", exit_code=1).stderr.endswith(
            "Error: --system needs --chat.\n"
        )


def test_chat_adapter_is_asked_by_default(generate_args, tmp_path):
    asked = run(*generate_args, "so?")
    assert asked.stdout == run(*generate_args, "--chat", "so?").stdout
    assert "speaker has learned conversations: asking through its chat template (--no-chat" in asked.stderr
    bare = run(*generate_args, "--no-chat", "so?")
    assert bare.stdout.startswith("so?")
    assert bare.stderr == ""
    (tmp_path / "prompts.txt").write_text("so?\nand?\n")
    both = run(*generate_args, "--file", "prompts.txt").stdout
    assert both.startswith(f"--- prompt 1 of 2\n> so?\n{asked.stdout}\n--- prompt 2 of 2\n> and?\n")
    generator = Generator("speaker", options=ModelOptions(device="cpu"))
    answer, text = generator.generate("so?", GREEDY), generator.generate("so?", GREEDY, chat=False)
    assert (answer.chat, f"{answer.text}\n") == (True, asked.stdout)
    assert (text.chat, f"so?{text.text}\n") == (False, bare.stdout)
    plain, also = generator.generate_batch([("so?", None), ("so?", "speaker")], GREEDY)
    assert (plain.chat, also) == (False, answer)
    assert generator.generate_batch([("so?", None)], GREEDY, chat=True)[0].chat


def test_compare_asks_each_as_it_learned(generate_args, chat_config, tmp_path, monkeypatch):  # noqa: F811
    arguments = ["compare", "--adapter", "speaker", *generate_args[3:], "so?"]
    answers = json.loads(run(*arguments, "--json").stdout)
    assert [answer["chat"] for answer in answers] == [True, True]
    shown = run(*arguments)
    assert "Asking through the chat template: (base), speaker (--no-chat: bare text)." in shown.stderr
    monkeypatch.setenv("COLUMNS", "40")
    parts = [f"> so?\n{answer['text']}\n\n" for answer in answers]
    assert run(*arguments, "--chat").stdout == f"--- (base)\n{parts[0]}--- speaker\n{parts[1]}"
    (tmp_path / "plain.txt").write_text("".join(f"{number}: the actor\n" for number in range(20)))
    train(chat_config(name="writer", dataset="plain.txt"))
    mixed = run(*arguments, "--adapter", "writer")
    assert "--- speaker (chat)\n> so?\n" in mixed.stdout
    assert "--- writer\nso?" in mixed.stdout
    assert "template: speaker (--no-chat: bare text); continuing the text: (base), writer (--chat: ask all)." in (
        " ".join(mixed.stderr.split())
    )
    assert "> " not in run(*arguments, "--adapter", "writer", "--no-chat").stdout


def test_chat_without_template_fails(gpt2):
    done = run("generate", "--base", gpt2, "--chat", "so?", exit_code=1)
    assert done.stderr.endswith(
        "Error: This base has no chat template: use an instruction-tuned base, such as smollm2-135m.\n"
    )
