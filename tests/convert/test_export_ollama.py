"""A folder for Ollama: its template and GGUF file give the text that this tool gives."""

import json
import shutil

import gguf
import pytest
from transformers import AutoTokenizer

from lora_tuner import Generator, ModelOptions, SamplingParams, export_ollama
from lora_tuner.adapters.adapter import load_adapter_folder
from lora_tuner.convert.go_template import example_conversations
from lora_tuner.convert.llama_runtime import LlamaModel
from lora_tuner.data.chat_template import apply_template
from lora_tuner.errors import AdapterError, ConfigError, Notice

from .. import gguf_base, ollama
from ..cli.test_commands import run
from .test_go_template import add_bos

GREEDY = SamplingParams(greedy=True, max_new_tokens=8, repetition_penalty=1.0)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "the actor"}]


@pytest.fixture(scope="module", autouse=True)
def _library():
    pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return gguf_base.save(tmp_path_factory.mktemp("bases") / "llama", "llama")


@pytest.fixture(scope="module")
def chat_base(plain, tmp_path_factory):
    """A base with a chat template whose answers end with a token of their own."""
    folder = shutil.copytree(plain, tmp_path_factory.mktemp("chat") / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["!"]})
    tokenizer.chat_template = TEMPLATE.replace("<|end|>", "!")
    tokenizer.save_pretrained(folder)
    settings = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True} | settings))
    return folder


@pytest.fixture(scope="module")
def adapter(chat_base, tmp_path_factory):
    return load_adapter_folder(gguf_base.adapt(chat_base, tmp_path_factory.mktemp("adapters") / "random"))


@pytest.fixture(scope="module")
def exported(adapter, tmp_path_factory):
    notices = []
    out = tmp_path_factory.mktemp("out") / "ollama"
    options = ModelOptions(notify=lambda event: notices.append(getattr(event, "text", "")))
    return export_ollama(adapter, out, dtype="float32", options=options), [text for text in notices if text]


def read_modelfile(folder):
    return ollama.parse_modelfile((folder / "Modelfile").read_text())


def test_modelfile_has_template_stops_and_parameters(exported):
    folder, _ = exported
    modelfile = read_modelfile(folder.path)
    assert sorted(path.name for path in folder.path.iterdir()) == ["Modelfile", "model.gguf"]
    assert modelfile.pop("TEMPLATE") == [folder.template]
    assert modelfile == {
        "FROM": ["./model.gguf"],
        "num_ctx": ["128"],
        "temperature": ["0.6"],
        "top_k": ["20"],
        "top_p": ["0.9"],
        "repeat_penalty": ["1.1"],
        "stop": ["<|endoftext|>", "!"],
    }


def test_ollama_prompt_gives_same_tokens(exported, chat_base):
    folder, notices = exported
    assert [text for text in notices if "llama.cpp" in text] == []
    template = read_modelfile(folder.path)["TEMPLATE"][0]
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    with LlamaModel(folder.path / "model.gguf", 128) as model:
        assert all(model.is_end(number) for number in tokenizer.convert_tokens_to_ids(["!", "<|endoftext|>"]))
        for messages in example_conversations(takes_system=True):
            rendered = apply_template(tokenizer, messages, add_generation_prompt=True)
            expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            assert model.tokenize(ollama.render(template, messages)) == expected


def test_ollama_chat_generates_same_text(exported, adapter):
    folder, _ = exported
    prompt = ollama.render(read_modelfile(folder.path)["TEMPLATE"][0], CHAT)
    text, _ = gguf_base.LlamaCpp(folder.path / "model.gguf").greedy(prompt, 8)
    generator = Generator(adapter.path, options=ModelOptions(device="cpu"))
    assert text == generator.generate(CHAT, GREEDY).text


def test_stop_that_modelfile_cannot_hold_is_said(plain, tmp_path):
    base = shutil.copytree(plain, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    newline = tokenizer("\n")["input_ids"][0]
    ends = {"eos_token_id": [tokenizer.eos_token_id, newline]}
    (base / "generation_config.json").write_text(json.dumps(ends))
    notices = []
    options = ModelOptions(base=str(base), notify=notices.append)
    folder = export_ollama(None, tmp_path / "out", options=options)
    assert folder.stops == ["<|endoftext|>"]
    texts = [event.text for event in notices if isinstance(event, Notice)]
    assert "Text does not end at '\\n' in Ollama: a Modelfile cannot hold it as a stop." in texts


def test_base_without_chat_template_takes_prompt(plain, tmp_path):
    folder = export_ollama(None, tmp_path / "base", options=ModelOptions(base=str(plain)))
    modelfile = read_modelfile(folder.path)
    assert modelfile["TEMPLATE"] == [folder.template] == ["{{ .Prompt }}"]
    assert modelfile["stop"] == ["<|endoftext|>"]
    assert gguf.GGUFReader(folder.path / "model.gguf").fields["general.file_type"].contents() == 1


@pytest.mark.parametrize(
    ("template", "stops"),
    [
        ("### {{ m.role }}:\n{{ m.content }}\n\n", ["### user:"]),
        ('---\n<{{ m.role }} says="\\">\n{{ m.content }}\n', ["---"]),
        ("{{ m.content }}\n", []),
    ],
)
def test_answers_without_end_token_stop_at_question(plain, tmp_path, template, stops):
    base = shutil.copytree(plain, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}" + template + "{% endfor %}{% if add_generation_prompt %}> {% endif %}"
    )
    tokenizer.save_pretrained(base)
    folder = export_ollama(None, tmp_path / "out", options=ModelOptions(base=str(base)))
    assert read_modelfile(folder.path)["stop"] == folder.stops == ["<|endoftext|>", *stops]


@pytest.mark.parametrize("bos", ["{{ bos_token }}", ""])
def test_bos_follows_chat_template(plain, tmp_path, bos):
    base = shutil.copytree(plain, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    add_bos(tokenizer)
    tokenizer.chat_template = bos + TEMPLATE.removeprefix("{{ bos_token }}")
    tokenizer.save_pretrained(base)
    notices = []
    options = ModelOptions(base=str(base), notify=lambda event: notices.append(getattr(event, "text", "")))
    folder = export_ollama(None, tmp_path / "out", options=options)
    fields = gguf.GGUFReader(folder.path / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() == bool(bos)
    assert folder.template.startswith("{{ if $.System }}<|system|>")
    assert [text for text in notices if "tokens" in text] == []


def test_adapter_over_base_is_measured(adapter, tmp_path):
    notices = []
    options = ModelOptions(notify=lambda event: notices.append(getattr(event, "text", "")))
    folder = export_ollama(adapter, tmp_path / "two", merged=False, dtype="float32", options=options)
    modelfile = read_modelfile(folder.path)
    assert (modelfile["FROM"], modelfile["ADAPTER"]) == (["./base.gguf"], ["./adapter.gguf"])
    assert modelfile["stop"] == ["<|endoftext|>", "!"]
    assert [text for text in notices if "Ollama" in text] == [
        "Ollama takes adapters up to version 0.34.0, and refuses a Modelfile with ADAPTER since (ollama/ollama#14969): "
        "without --no-merged, all versions take the result."
    ]
    prompt = ollama.render(modelfile["TEMPLATE"][0], CHAT)
    text, _ = gguf_base.LlamaCpp(folder.path / "base.gguf", folder.path / "adapter.gguf").greedy(prompt, 8)
    generator = Generator(adapter.path, options=ModelOptions(device="cpu"))
    assert text == generator.generate(CHAT, GREEDY).text


def test_own_template_counts_over_base(plain, tmp_path):
    """An adapter that brings a chat template and an end of its own, on a base without either."""
    folder = gguf_base.adapt(plain, tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = TEMPLATE.replace("<|end|>", "{{ eos_token }}")
    tokenizer.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in plain.iterdir()}
    result = export_ollama(load_adapter_folder(folder), tmp_path / "out", merged=False)
    assert "<|assistant|>" in result.template
    assert {path.name: path.read_bytes() for path in plain.iterdir()} == before
    fields = gguf.GGUFReader(tmp_path / "out" / "base.gguf").fields
    assert "<|{{ m.role }}|>" in fields["tokenizer.chat_template"].contents()


def test_ollama_export_is_all_or_nothing(adapter, chat_base, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"^quantization is only for a whole model: leave it out, or merge"):
        export_ollama(adapter, out, merged=False, quantization="q8_0")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match="is not a folder with a Modelfile, so it is not replaced"):
        export_ollama(adapter, out, overwrite=True)
    base = shutil.copytree(chat_base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(base)
    with pytest.raises(
        AdapterError, match="The chat template of base cannot be written as a template for Ollama: "
    ):
        export_ollama(None, tmp_path / "new", options=ModelOptions(base=str(base)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_ollama_command_names_what_to_run(chat_base, tmp_path):
    command = f"export --base {chat_base} --to ollama --quantize q8_0 --out chat".split()
    lines = run(*command).stdout.splitlines()
    assert lines[0].startswith("chat/model.gguf  ")
    assert lines[1] == "held-out loss not measured: --eval-dataset names rows to measure it on"
    assert lines[2] == "chat: create it with `ollama create NAME -f chat/Modelfile`"
    assert "exists: choose another --out" in run(*command, exit_code=1).stderr
    printed = json.loads(run(*command, "--overwrite", "--json").stdout)
    assert (printed["path"], printed["model"]["precision"]) == ("chat", "q8_0")
    assert printed["stops"] == ["<|endoftext|>", "!"]
