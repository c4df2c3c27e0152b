"""`train --add-tokens`: new tokens are trained through PEFT, and work in every command."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import (
    Generator,
    Library,
    ModelOptions,
    SamplingParams,
    TrainConfig,
    evaluate,
    merge,
    plan,
    resume,
    train,
)
from lora_tuner.adapters.adapter import CARD_FILE, TOKENIZER_FILES, load_adapter_folder, verify_adapter
from lora_tuner.errors import AdapterError, ConfigError
from lora_tuner.inference.multi_lora import MultiLora
from lora_tuner.models import added_tokens, lora
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.settings_files import resolve_settings
from lora_tuner.training.preview import preview
from lora_tuner.training.setup import prepare_training
from lora_tuner.training.sweep import run_sweep

from .. import model_families, tiny_models
from ..parameters import sampled

NOTE, END = "<|note|>", "<|end_note|>"
QUICK = {
    "dataset": "notes.json",
    "add_tokens": f"{NOTE},{END}",
    "max_steps": 4,
    "max_length": 40,
    "batch_size": 2,
    "rank": 2,
    "learning_rate": 0.02,
    "eval_rows": 6,
    "device": "cpu",
    "name": "notes",
}
GREEDY = SamplingParams(greedy=True, max_new_tokens=8, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def bases(gpt2, llama, tmp_path_factory):
    """GPT-2 without spare rows, an untied Llama with one, and a tied one with enough."""
    folder = tmp_path_factory.mktemp("bases")
    untied = model_families.save_family(folder / "untied", "llama", tie_word_embeddings=False, vocab_size=321)
    spare = model_families.save_family(folder / "spare", "llama", tie_word_embeddings=True, vocab_size=325)
    return {"gpt2": gpt2, "llama": llama, "untied": untied, "spare": spare}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("notes")
    rows = [f"{NOTE}{text}{END} {text[:20]}" for text in tiny_models.reviews(60)]
    (place / "notes.json").write_text(json.dumps(rows))
    return place


@pytest.fixture(scope="module")
def trained(bases, place, caches):
    """An adapter with two tokens on each base, trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_TUNER_CACHE", str(caches / "own"))
        patch.chdir(place)
        for name in ("gpt2", "untied", "spare"):
            train(TrainConfig(**QUICK | {"base": str(bases[name]), "name": name}))
    return place


@pytest.fixture
def library(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return Library()


def config(base, **changes):
    return TrainConfig(**QUICK | {"base": str(base)} | changes)


def plain_peft(base, adapter):
    """Load an adapter as its model card says."""
    model = AutoModelForCausalLM.from_pretrained(base)
    size = max(adapter.added_tokens.values()) + 1
    if model.get_input_embeddings().num_embeddings < size:
        model.resize_token_embeddings(size)
    return PeftModel.from_pretrained(model, adapter.path).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", sampled(["untied", "gpt2", "spare"], 3))
def test_added_tokens_equal_plain_peft_and_merge(name, library, bases, tmp_path):
    adapter = library.get(name)
    tokenizer = AutoTokenizer.from_pretrained(adapter.path)
    ids = torch.tensor([tokenizer(f"{NOTE}the actor{END} fails")["input_ids"]])
    assert adapter.added_tokens == {NOTE: 320, END: 321}
    assert {320, 321} <= set(ids[0].tolist())
    expected = logits_of(plain_peft(bases[name], adapter), ids)
    base = load_base(find_base(str(bases[name])), ModelOptions(device="cpu"))
    inference = MultiLora(base)
    with inference.apply_hooks(inference.hooks([inference.load(adapter)])):
        found = logits_of(base.model, ids)
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=1e-4, rtol=1e-4)
    merged = merge(adapter, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(merged.path)
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(merged.path).encode(NOTE) == [320]
    row = evaluate([adapter]).cells[0][0]
    assert row.loss == pytest.approx(adapter.manifest.result.loss, abs=1e-5)
    assert row.base_loss == pytest.approx(adapter.manifest.result.base_loss, abs=1e-5)
    assert row.gain > 0.1


def test_trained_rows_have_gradient_of_peft(bases, place, monkeypatch):
    """The hooks and the loss in chunks give the rows the gradient of PEFT's own forward pass."""
    monkeypatch.chdir(place)
    for name in ("gpt2", "untied"):
        setup = prepare_training(config(bases[name]))
        batch = setup.collate([setup.sequences[0]])
        setup.model.train()
        loss = setup.loss(setup.model, batch, 10)
        loss.backward()
        rows = {n: p for n, p in setup.model.named_parameters() if "trainable_tokens" in n}
        found = {n: p.grad.clone() for n, p in rows.items()}
        setup.model.zero_grad()
        for module in ("get_input_embeddings", "get_output_embeddings"):
            wrapper = getattr(setup.base.model, module)()
            del wrapper.forward
            added_tokens.remove_hooks(wrapper.original_module)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = setup.model(**inputs, use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(
            logits[0, :-1], batch["labels"][0, 1:], ignore_index=-100, reduction="sum"
        )
        (expected / 10).backward()
        assert float(loss) == pytest.approx(float(expected / 10), rel=1e-5)
        assert len(rows) == (1 if name == "gpt2" else 2)
        for key, parameter in rows.items():
            assert parameter.grad.abs().max() > 0
            torch.testing.assert_close(found[key], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eva", "dora", "pissa", "lora+"])
def test_method_trains_added_tokens(method, bases, place, monkeypatch):
    monkeypatch.chdir(place)
    setup = prepare_training(config(bases["llama"], method=method))
    before = {name: tensor.clone() for name, tensor in lora.adapter_state_dict(setup.model).items()}
    setup.loss(setup.model, setup.collate([setup.sequences[0]]), 10).backward()
    (name,) = [name for name in before if name.endswith("trainable_tokens_delta")]
    (rows,) = [p for key, p in setup.model.named_parameters() if "trainable_tokens" in key]
    assert torch.equal(before[name], rows)
    assert rows.grad.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["mamba", "bart", "opt", "gemma3_text", "falcon", "gpt_neox", "qwen3_moe", "gemma3"]
)
def test_family_trains_added_tokens(family, tmp_path, place, monkeypatch):
    base = model_families.save_family(tmp_path / "base", family)
    monkeypatch.chdir(place)
    adapter = train(config(base, name=family, adapters_dir=tmp_path, runs_dir=tmp_path / "runs"))
    ids = torch.tensor([[320, 5, 7, 321, 40, 9, 320, 60]])
    inference = MultiLora(model := load_base(find_base(str(base)), ModelOptions(device="cpu")))
    with inference.apply_hooks(inference.hooks([inference.load(adapter)])):
        found = logits_of(model.model, ids)
    expected = logits_of(plain_peft(base, adapter), ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    merge(adapter, tmp_path / "merged")  # compared, or not kept
    generator = Generator(family, adapters_dir=tmp_path)
    prompts = [(f"{NOTE}the", family), ("the actor", None)]
    mixed = [output.text for output in generator.generate_batch(prompts, GREEDY)]
    assert mixed == [generator.generate_batch([prompt], GREEDY)[0].text for prompt in prompts]


def test_new_rows_begin_with_mean(bases, place, monkeypatch):
    monkeypatch.chdir(place)
    setup = prepare_training(config(bases["spare"]))
    weight = AutoModelForCausalLM.from_pretrained(bases["spare"]).get_input_embeddings().weight
    (rows,) = [p for n, p in setup.model.named_parameters() if "trainable_tokens" in n]
    torch.testing.assert_close(rows, weight.mean(0).expand(2, -1))
    assert setup.base.vocab_size == 325
    assert setup.model.peft_config["default"].trainable_token_indices == [320, 321]


def test_resumed_run_with_tokens_is_bitwise(bases, library, stop_at):
    expected = library.get("gpt2").sha256
    with stop_at(2):
        train(config(bases["gpt2"], name="again", save_every=1))
    assert resume("again").sha256 == expected


@pytest.mark.slow
def test_child_continues_and_adds_tokens(library, bases):
    parent = library.get("gpt2")
    setup = prepare_training(config(bases["gpt2"], parent="gpt2", add_tokens=[], name="child"))
    started = lora.adapter_state_dict(setup.model)
    stored = added_tokens.load_replaced(
        parent, load_base(find_base(str(bases["gpt2"])), ModelOptions(device="cpu"))
    )
    name = "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"
    torch.testing.assert_close(started[name], stored["transformer.wte"].rows[1])
    child = train(config(bases["gpt2"], parent="gpt2", add_tokens="fails", name="child", rank=2))
    assert child.added_tokens == {NOTE: 320, END: 321, "fails": 322}
    assert child.manifest.result.base_loss > child.manifest.result.loss
    again = resolve_settings(TrainConfig, {}, child.path / "run.yaml")
    assert again.add_tokens == ["fails"]


@pytest.mark.slow
def test_sweep_measures_added_tokens(library, bases):
    rates = (0.02, 0.01)
    result = run_sweep([config(bases["gpt2"], name="sweep", max_steps=1, learning_rate=rate) for rate in rates])
    for trial in result.trials:
        adapter = library.get(trial.name)
        assert trial.loss == pytest.approx(adapter.manifest.result.loss, abs=1e-5)
        assert evaluate([adapter]).cells[0][0].loss == pytest.approx(trial.loss, abs=1e-5)


def test_generation_shows_added_tokens(library, bases):
    """In a mixed batch too: each row equals its solo run."""
    generator = Generator("gpt2")
    prompts = [(f"{NOTE}the", "gpt2"), ("the actor", None), (f"{NOTE}the actor", "gpt2")]
    sampling = SamplingParams(seed=1, max_new_tokens=30, temperature=1.5, repetition_penalty=1.0)
    mixed = [output.text for output in generator.generate_batch(prompts, sampling)]
    assert mixed == [generator.generate_batch([prompt], sampling)[0].text for prompt in prompts]
    base = Generator(options=ModelOptions(base=str(bases["gpt2"])))
    assert base.generate("the actor", sampling).text == mixed[1]
    assert generator.tokenizer_of("gpt2").decode([321], skip_special_tokens=True) == END


@pytest.mark.slow
def test_preview_and_plan_have_added_tokens(bases, place, monkeypatch):
    monkeypatch.chdir(place)
    (row,) = preview(config(bases["gpt2"]), 1)
    assert {NOTE, END} <= set(row.tokens)
    assert (
        plan(config(bases["gpt2"])).trained_parameters
        > plan(config(bases["gpt2"], add_tokens=[])).trained_parameters
    )


def test_adapter_has_tokenizer_and_says_so(library, bases):
    adapter = library.get("gpt2")
    card = (adapter.path / CARD_FILE).read_text()
    assert "    base.resize_token_embeddings(322, mean_resizing=False)\n" in card
    assert "The prompt comes from a held-out row, which was not trained on: its beginning." in card
    assert 'tokenizer = AutoTokenizer.from_pretrained("path/to/gpt2")' in card.replace("'", '"')
    assert ("Added tokens", f"{NOTE} (320), {END} (321)") in adapter.summary_rows()
    assert ("In place of the base's", "2 rows of wte") in adapter.summary_rows()
    assert adapter.to_dict()["run"]["added_tokens"] == {NOTE: 320, END: 321}
    for name in TOKENIZER_FILES:
        (adapter.path / name).unlink(missing_ok=True)
    assert verify_adapter(adapter) == ["the tokenizer with its added tokens is missing"]
    with pytest.raises(
        AdapterError, match=r"gpt2 has added <\|note\|> to the tokenizer, and its tokenizer files lack it"
    ):
        Generator("gpt2")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("a,,b", "a token is empty: separate tokens by single commas"),
        ("a,b,a", "a is given twice"),
        (["x" * 101], "a token has 101 characters: at most 100 are taken"),
        ([f"<{number}>" for number in range(1001)], "1,001 tokens are too many: at most 1,000 are added"),
        ("a\tb", r"'a\tb' has white space other than single spaces"),
        (7, "input should be a valid list"),
    ],
)  # fmt: skip
def test_invalid_tokens_are_refused(tokens, message):
    with pytest.raises(ConfigError) as error:
        resolve_settings(TrainConfig, {"add_tokens": tokens})
    assert str(error.value).startswith(f"add_tokens: {message}")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            "<|endoftext|>",
            r"some exist already, so leave them out: <\|endoftext\|> in the tokenizer of .*gpt2\.",
        ),
        ("<absent>", "add_tokens: no training row has <absent>, as --preview shows them"),
        ("«note»", "does not read and write «note» as one token: use others"),
    ],
)
def test_tokens_that_base_or_data_refuse(tokens, message, bases, place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError, match=message):
        prepare_training(config(bases["gpt2"], add_tokens=tokens))


def test_unused_token_is_named(bases, place, monkeypatch):
    monkeypatch.chdir(place)
    notices = []
    prepare_training(
        config(bases["gpt2"], add_tokens=f"{NOTE},<absent>"), lambda event: notices.append(str(event))
    )
    assert any("<absent>: no training row has this token" in notice for notice in notices)
    assert any("<|note|> (320), <absent> (321)" in notice for notice in notices)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gptj", {"tie_word_embeddings": False}, "its output head has a bias, which PEFT leaves out"),
        ("gemma4", {}, ".*embed_tokens_per_layer has a row for each token too"),
        ("llama", {"vocab_size": 310}, "its tokenizer has tokens beyond the 310 rows of its embedding"),
    ],
)
def test_base_without_room_is_refused(family, changes, message, tmp_path, place, monkeypatch):
    base = model_families.save_family(tmp_path / "base", family, **changes)
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError, match=f"add_tokens: .*base cannot have more tokens: {message}"):
        prepare_training(config(base))


def test_base_that_cannot_be_resized_is_refused(bases, place, monkeypatch):
    def fail(*args, **kwargs):
        raise NotImplementedError("no resizing")

    monkeypatch.chdir(place)
    monkeypatch.setattr("transformers.PreTrainedModel.resize_token_embeddings", fail)
    with pytest.raises(ConfigError, match=r"cannot have more tokens: it cannot be resized \(no resizing\)"):
        prepare_training(config(bases["gpt2"]))


def test_parent_with_whole_modules_is_refused(library, bases):
    adapter = library.get("gpt2")
    shutil.copytree(adapter.path, "adapters/whole")
    from safetensors.torch import load_file, save_file

    path = Library().path / "whole" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.transformer.ln_f.weight": torch.ones(32)}, path)
    settings = json.loads((path.parent / "adapter_config.json").read_text()) | {"modules_to_save": ["ln_f"]}
    (path.parent / "adapter_config.json").write_text(json.dumps(settings))
    (path.parent / "manifest.json").unlink()
    assert str(load_adapter_folder(path.parent).replaced) == "2 rows of wte; whole ln_f"
    with pytest.raises(
        AdapterError, match=r"whole has weights in place of the base's .*which training does not continue"
    ):
        prepare_training(config(bases["gpt2"], parent="whole", add_tokens=[]))


def test_parent_with_rows_of_tied_head_is_refused(bases, place, tmp_path, monkeypatch):
    """PEFT trains rows of a tied base as one, and the embedding would get those of the head."""
    monkeypatch.chdir(tmp_path)
    settings = LoraConfig("CAUSAL_LM", r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [7]})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases["spare"]), settings)
    model.save_pretrained("adapters/head", save_embedding_layers=False)
    with pytest.raises(AdapterError) as error:
        prepare_training(config(bases["spare"], parent="head", add_tokens=[], dataset=str(place / "notes.json")))
    assert str(error.value) == (
        f"head has other rows for the output head than for the embedding, which {bases['spare']} ties: merge it, and train on "
        "the result."
    )
