import math
import re
import shlex

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_tuner.adapters import model_card
from lora_tuner.adapters.adapter import MANIFEST_FILE, load_adapter_folder
from lora_tuner.adapters.library import rename_in_card

from .. import adapter_files


def based_on(**changes):
    """A manifest with another base than distilgpt2 on the Hub."""
    base = adapter_files.manifest().base.model_copy(update=changes)
    return adapter_files.manifest(base=base.model_dump())


LOCAL = {"revision": None, "weights": "a local folder"}


@pytest.fixture
def card(tmp_path):
    """Write an adapter with a manifest and return its model card."""

    def write(manifest=None, prompts=(), **config):
        adapter = load_adapter_folder(
            adapter_files.write(tmp_path / "imdb", config, facts=manifest or adapter_files.manifest())
        )
        return model_card.model_card(adapter, "imdb", prompts)

    return write


def with_data(**changes):
    """A manifest with other data."""
    data = adapter_files.manifest().data.model_copy(update=changes)
    return adapter_files.manifest(data=data.model_dump())


def table(card):
    """Rows of the summary table."""
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    return dict(line.removeprefix("| ").removesuffix(" |").split(" | ", 1) for line in lines[2:])


# The model card


def test_card_metadata(card):
    text = card()
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "base_model": "distilbert/distilgpt2",
        "datasets": ["stanfordnlp/imdb"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora_tuner"],
    }
    parsed = ModelCard(text)
    assert parsed.data.base_model == "distilbert/distilgpt2"
    assert parsed.data.library_name == "peft"
    assert parsed.data.pipeline_tag == "text-generation"
    assert parsed.data.tags == ["lora", "lora_tuner"]
    assert parsed.text.strip().startswith("# imdb\n\nA LoRA adapter for distilgpt2, trained on imdb.\n")


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [
        (
            with_data(where=["label=1"]),
            "It was trained on 10,000 rows of text from stanfordnlp/imdb with label=1; 200 other rows measured it.",
        ),
        (
            with_data(format="messages", eval_dataset="mine.csv"),
            "It was trained on the answers of 10,000 conversations from stanfordnlp/imdb; "
            "200 rows of mine.csv measured it.",
        ),
        (
            with_data(format="template", answer_column="summary", held_out_rows=0),
            "It was trained on the column summary of 10,000 rows from stanfordnlp/imdb.",
        ),
        (adapter_files.manifest(data=None, run=None), "Its training data is not known."),
        (
            adapter_files.manifest(
                run=None,
                made_by="blend a=1 b=1",
                parents=[{"name": "a", "sha256": "ab" * 32}, {"name": "b", "sha256": "cd" * 32}],
            ),
            "It was made from a and b by `blend a=1 b=1`, without further training.",
        ),
    ],
)
def test_card_says_what_was_learned(card, manifest, sentence):
    assert f"\n{sentence}\n" in card(manifest)


@pytest.mark.parametrize(
    ("gain", "error", "limit"),
    [
        (0.25, 0.01, "It predicts held-out rows of its data better than distilgpt2; other text was not measured"),
        (0.015, 0.01, "On the held-out rows it is not measurably better than distilgpt2."),
        (-0.25, 0.01, "On the held-out rows it is worse than distilgpt2: each token is 0.78 times as likely."),
    ],
)
def test_card_names_limitations(card, gain, error, limit):
    result = adapter_files.manifest().result.model_copy(update={"gain": gain, "standard_error": error})
    limits = (
        card(adapter_files.manifest(result=result.model_dump())).split("## Limitations\n")[1].split("## Use")[0]
    )
    assert f"- {limit}" in limits
    assert "Truth, bias and safety of its text were not measured." in limits
    assert "- It was not evaluated: no held-out rows were measured." in card(adapter_files.manifest(result=None))


def test_card_has_fields_to_fill(card):
    """Filled in they are metadata; until then the Hub takes the card as it is."""
    text = card()
    filled = text.replace("\n# license: ", "\nlicense: ").replace("\n# language: ", "\nlanguage: ")
    assert {"license", "language"} & yaml.safe_load(text.split("---\n")[1]).keys() == set()
    assert (ModelCard(filled).data.license, ModelCard(filled).data.language) == ("apache-2.0", "en")


def test_card_prompt_is_of_held_out_row(card):
    text = card(prompts=['The film\'s "end"', "Nobody"])
    assert "The prompt comes from a held-out row, which was not trained on: its beginning." in text
    assert """tokenizer('The film\\'s "end"', return_tensors="pt")""" in text
    assert ModelCard(text).data.widget == [{"text": 'The film\'s "end"'}, {"text": "Nobody"}]
    commands = [
        shlex.split(line) for line in text.splitlines() if line.startswith(("python cli.py gen", "llama-comp"))
    ]
    assert [command[-1] for command in commands] == ['The film\'s "end"'] * 2
    assert "Once" not in text


def test_chat_card_asks_through_template(card):
    text = card(with_data(format="messages"), prompts=["Who is it?"])
    messages = [{"role": "user", "content": "Who is it?"}]
    assert f"messages = {messages!r}\ninputs = tokenizer.apply_chat_template(\n" in text
    assert ModelCard(text).data.widget == [{"messages": messages}]
    assert "which was not trained on: its first question." in text
    assert "-cnv -st -n 60 -p 'Who is it?'" in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_card_without_prompts_asks_for_one(card):
    text = card()
    assert "Replace the prompt by text as in the data." in text
    assert "tokenizer('Write your prompt here', " in text


def test_card_summary_table(card):
    assert table(card()) == {
        "Base": "distilgpt2 (distilbert/distilgpt2 on the Hub)",
        "Adapter": "LoRA, rank 4, alpha 8, on c_attn",
        "Size": "192 parameters, 1 kB",
        "Data": "stanfordnlp/imdb",
        "Rows": "25,000 read, 12,500 filtered, 98 duplicates, 10,000 train, 2,402 held out",
        "Run": "lora, 40 steps, 20,480 tokens, 1.5 min on cpu in float32",
        "Held-out loss": "3.500 (base: 3.750)",
        "Gain": "0.250 ± 0.013 (standard error, 200 rows, paired): each token is 1.28 times as likely",
        "Perplexity": f"{math.exp(3.5):.2f} (base: {math.exp(3.75):.2f})",
    }


def test_card_tells_general_text(card):
    general = {
        "base_loss": 3.2,
        "loss": 3.221,
        "gain": -0.021,
        "standard_error": 0.006,
        "rows": 40,
        "tokens": 2_000,
    }
    text = card(adapter_files.manifest(general=general))
    change = "+0.021 ± 0.006 (change of loss on 40 rows; above zero is worse)"
    assert table(text)["General text"] == change
    assert "on general text its loss changed by +0.021 ± 0.006 nats per token." in text


def test_card_without_result(card):
    rows = table(card(adapter_files.manifest(result=None)))
    assert {"Held-out loss", "Gain", "Perplexity"} & rows.keys() == set()
    assert "Run" in rows


def test_card_of_embedded_base(card):
    text = card(based_on(name="smollm2-135m", repo="HuggingFaceTB/SmolLM2-135M-Instruct", revision=None))
    assert ModelCard(text).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "AutoModelForCausalLM.from_pretrained('HuggingFaceTB/SmolLM2-135M-Instruct')" in text


def test_card_of_base_without_owner(card):
    assert ModelCard(card(based_on(name="gpt2", repo="gpt2"))).data.base_model == "gpt2"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_card_hides_local_base(card, tmp_path, there, kind):
    """The folder may be missing: a card can be rewritten on another machine."""
    if there:
        (tmp_path / "models" / "mine").mkdir(parents=True)
    path = str(tmp_path / "models" / "mine") if kind == "absolute" else "models/mine"
    text = card(based_on(name=path, repo=path, **LOCAL))
    assert ModelCard(text).data.base_model is None
    assert str(tmp_path) not in text
    assert "AutoModelForCausalLM.from_pretrained('path/to/" in text


def test_card_hides_local_dataset_path(card, tmp_path):
    path = str(tmp_path / "my|reviews.csv")
    facts = adapter_files.manifest().data.model_copy(update={"name": path, "source": path})
    text = card(adapter_files.manifest(data=facts.model_dump()))
    assert str(tmp_path) not in text
    assert "A LoRA adapter for distilgpt2, trained on my|reviews.csv." in text
    assert table(text)["Data"] == r"my\|reviews.csv"


def test_card_table_escapes_pipes(card):
    facts = adapter_files.manifest().data.model_copy(update={"source": "a|b\\|c"})
    for line in card(adapter_files.manifest(data=facts.model_dump())).splitlines():
        if line.startswith("|"):
            assert line.replace(r"\|", "").count("|") == 3, line


def test_card_example_compiles(card):
    program = card().split("```python\n")[1].split("```")[0]
    compile(program, "card", "exec")
    assert 'PeftModel.from_pretrained(base, "path/to/imdb")' in program


# Usage section


def use(text):
    return text.split("## Use\n")[1]


MERGE = "merge it (`python cli.py merge imdb --out merged/imdb`)"
LLAMA = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def used(tmp_path, config=None, weights=None):
    """Usage section of a card; for Llama layers if no weights are given."""
    weights = adapter_files.tensors(modules=LLAMA) if weights is None else weights
    folder = adapter_files.write(tmp_path / ".work.tmp", config, weights, adapter_files.manifest())
    return use(model_card.model_card(load_adapter_folder(folder), "imdb"))


@pytest.mark.parametrize(("rank", "largest"), [(1, 8), (8, 8), (12, 16), (321, 512)])
def test_card_shows_commands_of_other_tools(tmp_path, rank, largest):
    text = used(tmp_path, {"r": rank, "target_modules": ["q_proj"]}, adapter_files.tensors(rank, LLAMA))
    request = '{"model": "imdb", "prompt": "Write your prompt here", "max_tokens": 60}'
    assert (
        f"curl http://localhost:8000/v1/completions -H \"Content-Type: application/json\" \\\n  -d '{request}'"
        in text
    )
    assert (
        "vllm serve distilbert/distilgpt2 --enable-lora "
        f"--max-lora-rank {largest} --lora-modules imdb=path/to/imdb\n" in text
    )
    assert "python cli.py export path/to/imdb --to gguf --out imdb.gguf\n" in text
    assert MERGE not in text


def test_card_vllm_rank_is_largest(tmp_path):
    weights = adapter_files.tensors(4, LLAMA) | {
        name: tensor for name, tensor in adapter_files.tensors(20, LLAMA).items() if LLAMA[1] in name
    }
    assert "--max-lora-rank 32 " in used(tmp_path, {"rank_pattern": {"layers.1.self_attn.q_proj": 20}}, weights)


@pytest.mark.parametrize("prompts", [(), ("About imdb or imdb-2: path",)])
@pytest.mark.parametrize("chat", ["auto", "messages"])
def test_renamed_card_is_card_of_name(tmp_path, prompts, chat):
    config = {"target_modules": ["q_proj"]}
    weights = adapter_files.tensors(4, LLAMA)
    folder = adapter_files.write(tmp_path / "imdb", config, weights, facts=with_data(format=chat))
    adapter = load_adapter_folder(folder)
    before, after = (model_card.model_card(adapter, name, prompts) for name in ("first", "second"))
    assert "--lora first.gguf" in before
    assert rename_in_card(before, "first", "second") == after
    assert rename_in_card(before, "firs", "second") == before


def test_card_names_incompatible_tools(tmp_path):
    gpt2 = used(tmp_path, {"fan_in_fan_out": True}, adapter_files.tensors())
    assert gpt2.endswith(f"```\n\nvLLM does not support LoRA on GPT-2: {MERGE}.\n")
    assert "vllm serve" not in gpt2
    assert "cli.py export" in gpt2
    magnitudes = {f"base_model.model.{module}.lora_magnitude_vector": np.ones(18, np.float32) for module in LLAMA}
    dora = used(tmp_path, {"use_dora": True}, adapter_files.tensors(modules=LLAMA) | magnitudes)
    assert dora.endswith(
        f"```\n\nvLLM does not support DoRA: {MERGE}.\n\nllama.cpp does not support DoRA: {MERGE}.\n"
    )
    assert "cli.py export" not in dora


def test_card_of_adapter_without_run(card):
    facts = adapter_files.manifest(run=None, data=None, result=None, made_by="compress imdb --energy 0.9")
    rows = table(card(facts))
    assert list(rows) == ["Base", "Adapter", "Size", "Command"]
    assert rows["Command"] == "`compress imdb --energy 0.9`"
    assert "run.yaml" not in card(facts)


def test_card_escapes_untrusted_text(card):
    facts = adapter_files.manifest().data.model_copy(update={"name": "x" * 300, "source": "a\n\n# b <script>"})
    text = card(adapter_files.manifest(data=facts.model_dump()))
    assert table(text)["Data"] == "a # b &lt;script>"


def test_card_links_existing_plots(tmp_path):
    folder = adapter_files.write(tmp_path / "imdb", facts=adapter_files.manifest())
    for name, picture in (
        ("loss.png", "![Loss](loss.png)"),
        ("spectrum.png", "![Singular values](spectrum.png)"),
    ):
        assert picture not in model_card.model_card(load_adapter_folder(folder), "imdb")
        (folder / name).touch()
        assert picture in model_card.model_card(load_adapter_folder(folder), "imdb")


def test_card_of_child_names_parents(card, tmp_path):
    grandparent = {"name": "old", "sha256": "12" * 32}
    parents = [
        {"name": "noir", "sha256": "ab" * 32, "parents": [grandparent]},
        {"name": "verse", "sha256": "cd" * 32},
    ]
    facts = adapter_files.manifest().data.model_copy(update={"eval_dataset": "owner/films"})
    rows = table(card(adapter_files.manifest(parents=parents, data=facts.model_dump())))
    assert rows["Parents"] == "noir (abababababab), verse (cdcdcdcdcdcd)"
    assert rows["Evaluated on"] == "owner/films"
    assert list(rows)[2:6] == ["Size", "Parents", "Data", "Rows"]
    facts = facts.model_copy(update={"eval_dataset": str(tmp_path / "films.csv")})
    assert table(card(adapter_files.manifest(data=facts.model_dump())))["Evaluated on"] == "films.csv"
    assert {"Parents", "Evaluated on"} & table(card()).keys() == set()


def peft_folder(folder, base, **settings):
    """Write an adapter with random weights through PEFT."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", lora_alpha=7, **settings)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
        ("llama", {"r": 12, "target_modules": ["q_proj", "down_proj"]}),
        (
            "llama",
            {
                "r": 4,
                "target_modules": ["q_proj"],
                "use_rslora": True,
                "rank_pattern": {"0.self_attn.q_proj": 1000},
            },
        ),
        ("llama", {"r": 4, "target_modules": ["v_proj"], "use_dora": True}),
    ],
)
def test_card_examples_run_and_agree(tmp_path, capsys, request, kind, settings):
    base = request.getfixturevalue(kind)
    folder = peft_folder(tmp_path / "path" / "to" / "noir", base, **settings)
    (tmp_path / "path" / "to" / kind).symlink_to(base)
    facts = based_on(name=str(base), repo=str(base), **LOCAL)
    (folder / MANIFEST_FILE).write_text(facts.to_json())
    text = model_card.model_card(load_adapter_folder(folder), "noir", ["The film"])
    assert ModelCard(text).data.library_name == "peft"
    by_peft, by_transformers = {}, {}
    peft_program, transformers_program = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(peft_program, by_peft)
    assert capsys.readouterr().out.startswith("The film")
    exec(transformers_program, by_transformers)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        first, second = (program["model"].eval()(ids).logits for program in (by_peft, by_transformers))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    assert (first - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("base", "repo"),
    [
        ({}, "distilbert/distilgpt2"),
        ({"name": "a/b", "repo": "a/b"}, "a/b"),
        ({"name": "m", "repo": "m", **LOCAL}, None),
    ],
)
def test_card_metadata_of_child(card, base, repo):
    facts = based_on(**base).model_copy(
        update={"parents": adapter_files.manifest(parents=[{"name": "noir", "sha256": "ab" * 32}]).parents}
    )
    parsed = ModelCard(card(facts))
    assert parsed.data.to_dict() == {
        **({"base_model": repo} if repo else {}),
        "datasets": ["stanfordnlp/imdb"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora_tuner"],
    }


def test_card_shows_row_filter(card):
    facts = adapter_files.manifest().data.model_copy(update={"where": ["label=1"]})
    assert table(card(adapter_files.manifest(data=facts.model_dump())))["Filter"] == "label=1"


def test_card_names_text_beside_conversations(card):
    facts = adapter_files.manifest().data.model_copy(update={"format": "text + messages"})
    shown = table(card(adapter_files.manifest(data=facts.model_dump())))["Format"]
    assert shown == "conversations (messages), trained on the answers alone; other rows as text"


def test_summary_without_manifest(tmp_path):
    found = dict(load_adapter_folder(adapter_files.write(tmp_path / "other")).summary_rows())
    assert found == {
        "Base": "distilbert/distilgpt2",
        "Adapter": "LoRA, rank 4, alpha 8, on c_attn",
        "Size": "192 parameters, 1 kB",
        "Origin": "another tool (no manifest)",
    }
