"""Adapters that bring their own chat template or tokenizer, as TRL, axolotl and LLaMA-Factory save them."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import Generator, Library, ModelOptions, SamplingParams, compress, evaluate
from lora_tuner.adapters.adapter import TOKENIZER_FILES
from lora_tuner.convert.adopt import adopt
from lora_tuner.convert.merge import merge
from lora_tuner.data import chat
from lora_tuner.data.eval_sets import EvalSet
from lora_tuner.errors import AdapterError, DataError
from lora_tuner.inference.sequence import Sequence

from .. import api_server, tiny_models
from ..api_server import PROMPT, TEMPLATE
from ..cli.test_commands import run

OTHER = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
CHAT = [{"role": "user", "content": PROMPT}]
GREEDY = SamplingParams(greedy=True, max_new_tokens=8, repetition_penalty=1.0)


@pytest.fixture
def library(gpt2, tmp_path):
    """Two adapters, `a` and `b`, on a base without a chat template."""
    for seed, name in enumerate("ab"):
        api_server.write_adapter(tmp_path / "adapters", name, gpt2, seed)
    return Library(tmp_path / "adapters")


def save_tokenizer(library, name, base, template=TEMPLATE, **tokens):
    """Save the tokenizer of the base beside an adapter, with another template."""
    tokenizer = AutoTokenizer.from_pretrained(base, **tokens)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(library.path / name)
    return tokenizer


def open_generator(library, base, *names, **options):
    return Generator(*names, options=ModelOptions(base=str(base), **options), adapters_dir=library.path)


def template_file(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def template_in_config(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": None}))


def named_templates(folder):
    templates = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))


def template_json(folder):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


@pytest.mark.parametrize("write", [template_file, template_in_config, named_templates, template_json])
def test_own_chat_template_is_used(library, gpt2, write):
    write(library.path / "a")
    notices = []
    generator = open_generator(library, gpt2, "a", notify=lambda event: notices.append(event.text))
    text = f"user: {PROMPT}\nassistant:"
    assert generator.encode_prompt(CHAT).token_ids == generator.encode_prompt(text).token_ids
    assert "a has its own chat template: its conversations use it." in notices
    assert generator.generate(CHAT, GREEDY).text == generator.generate(text, GREEDY).text
    generator.set_adapter(None)
    with pytest.raises(DataError, match="This base has no chat template"):
        generator.encode_prompt(CHAT)


def test_same_tokenizer_changes_nothing(library, gpt2):
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    tokenizer.save_pretrained(library.path / "a")
    notices = []
    generator = open_generator(library, gpt2, "a", notify=lambda event: notices.append(event.text))
    assert generator.tokenizer_of("a") is generator.base.tokenizer
    assert not [text for text in notices if "template" in text]


def test_batch_renders_each_adapters_template(library, gpt2):
    save_tokenizer(library, "a", gpt2)
    save_tokenizer(library, "b", gpt2, OTHER)
    generator = open_generator(library, gpt2, "a", "b")
    outputs = generator.generate_batch([(CHAT, "a"), (CHAT, "b")], GREEDY)
    texts = {"a": f"user: {PROMPT}\nassistant:", "b": f"<user>{PROMPT}\n"}
    for output in outputs:
        alone = open_generator(library, gpt2, output.adapter).generate(texts[output.adapter], GREEDY)
        assert output.text == alone.text


def test_replaced_template_is_read_again(library, gpt2):
    template_file(library.path / "a")
    generator = open_generator(library, gpt2, "a")
    before = generator.generate(CHAT, GREEDY)
    (library.path / "a" / "chat_template.jinja").write_text(OTHER)
    generator.set_adapter("a")
    assert generator.encode_prompt(CHAT).token_ids == generator.encode_prompt(f"<user>{PROMPT}\n").token_ids
    assert before.prompt == PROMPT


def test_own_end_of_text_ends_output(library, gpt2):
    generator = open_generator(library, gpt2, "a")
    prompt = generator.encode_prompt(f"user: {PROMPT}\nassistant:")
    sequence = Sequence(generator.base, prompt.token_ids, GREEDY, None, "a", generator.get_loaded("a"))
    generator.engine.add([sequence])
    while not sequence.complete:
        generator.engine.step()
    token = sequence.output_ids[3]
    save_tokenizer(library, "a", gpt2, eos_token=generator.base.tokenizer.convert_ids_to_tokens(token))
    cut = open_generator(library, gpt2, "a").generate(CHAT, GREEDY)
    assert cut.finished
    assert cut.tokens == sequence.output_ids.index(token)


def swap_ids(folder):
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(data))


def add_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)


def break_file(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            swap_ids,
            r"a brings another tokenizer than that of .*: the token '.' has the id \d+, and \d+ in the base\. ",
        ),
        (add_tokens, "2 of its tokens, such as '<|im_end|>', are beyond the 320 rows of the base's embeddings"),
        (break_file("vocab.json", '{"a": 1}'), "the token 'a' has the id 1, and "),
        (break_file("tokenizer.json", "{}"), "tokenizer.json is no valid tokenizer: "),
        (break_file("tokenizer_config.json", "{"), "tokenizer_config.json is not readable as JSON: "),
        (break_file("tokenizer_config.json", "[]"), "tokenizer_config.json: it is not a JSON object."),
        (
            break_file("tokenizer_config.json", '{"chat_template": 3}'),
            "chat_template is neither a text nor a list",
        ),
    ],
)
def test_unsuitable_tokenizer_is_refused(library, gpt2, change, said):
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(library.path / "a")
    (library.path / "a" / "chat_template.jinja").unlink(missing_ok=True)
    change(library.path / "a")
    with pytest.raises(AdapterError, match=said.replace("|", r"\|")):
        open_generator(library, gpt2, "a")
    stderr = run("generate", "--adapter", "a", "--base", str(gpt2), PROMPT, exit_code=1).stderr
    assert stderr.splitlines()[-1].startswith("Error: ")


def test_forced_tokenizer_is_ignored(library, gpt2):
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(library.path / "a")
    add_tokens(library.path / "a")
    notices = []
    generator = open_generator(library, gpt2, "a", force=True, notify=lambda event: notices.append(event.text))
    assert generator.tokenizer_of("a") is generator.base.tokenizer
    assert notices[-1].endswith("Its tokenizer is ignored.")


def test_added_tokens_with_embeddings_are_used(library, gpt2, tmp_path):
    base = tmp_path / "padded"
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    model.resize_token_embeddings(328, mean_resizing=False)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(base)
    api_server.write_adapter(library.path, "a", base, 0)
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(library.path / "a")
    add_tokens(library.path / "a")
    (library.path / "a" / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    generator = open_generator(library, base, "a")
    ids = generator.encode_prompt(CHAT).token_ids
    assert (ids[0], ids[-1]) == (320, 321)
    assert generator.generate(CHAT, GREEDY).tokens > 0


def test_server_renders_each_adapters_template(library, gpt2):
    save_tokenizer(library, "a", gpt2)
    save_tokenizer(library, "b", gpt2, OTHER)
    texts = {"a": f"user: {PROMPT}\nassistant:", "b": f"<user>{PROMPT}\n"}
    with api_server.serving(gpt2, library.path) as served:
        for name, text in texts.items():
            chats = served.post(
                "/v1/chat/completions", model=name, messages=CHAT, temperature=0, max_tokens=8
            ).json()
            plain = served.post("/v1/completions", model=name, prompt=text, temperature=0, max_tokens=8).json()
            assert chats["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
            assert chats["usage"] == plain["usage"]
        base = served.post("/v1/chat/completions", model=served.service.name, messages=CHAT)
        assert "has no chat template" in base.json()["error"]["message"]


def test_evaluation_equals_base_with_template(library, gpt2, tmp_path):
    rows = [
        chat.encode_messages([*CHAT, {"role": "assistant", "content": text}], lambda content: content)
        for text in tiny_models.reviews(6)
    ]
    sets = [EvalSet("talk", rows)]
    base = shutil.copytree(gpt2, tmp_path / "talker")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    expected = evaluate([library.get("a")], sets, options=ModelOptions(base=str(base)))
    save_tokenizer(library, "a", gpt2)
    save_tokenizer(library, "b", gpt2, OTHER)
    own = {}
    for name in "ab":
        own[name] = evaluate([library.get(name)], sets, options=ModelOptions(base=str(base)))
    assert own["a"].cells == expected.cells
    assert own["b"].cells[0][0].base_loss != expected.cells[0][0].base_loss


def test_conversions_keep_template(library, gpt2, tmp_path):
    save_tokenizer(library, "a", gpt2)
    options = ModelOptions(base=str(gpt2))
    merge(library.get("a"), tmp_path / "merged", sets=[], options=options)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE
    small = compress(library.get("a"), "small", library, sets=[], options=options).adapter
    assert (small.path / "chat_template.jinja").read_text() == TEMPLATE
    foreign = shutil.copytree(library.path / "a", tmp_path / "foreign")
    (foreign / "manifest.json").unlink()
    copied = adopt(library, foreign, "theirs", base=str(gpt2))
    assert {file.name for file in copied.path.iterdir()} >= set(TOKENIZER_FILES[:1])
    assert open_generator(library, gpt2, "theirs").encode_prompt(CHAT).text == PROMPT


def test_compare_encodes_for_each_adapter(library, gpt2, tmp_path):
    base = shutil.copytree(gpt2, tmp_path / "talker")
    (base / "chat_template.jinja").write_text(OTHER)
    save_tokenizer(library, "a", gpt2)
    arguments = ["--base", str(base), PROMPT, "--chat", "--greedy", "--max-new-tokens", "4", "--json"]
    compared = json.loads(run("compare", "--adapter", "a", "--adapter", "b", *arguments).stdout)
    for output in compared[1:]:
        (alone,) = json.loads(run("generate", "--adapter", output["adapter"], *arguments).stdout)
        assert alone["text"] == output["text"]
