"""Merging: the saved model equals base and adapter, or nothing is kept."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import (
    Generator,
    Library,
    ModelOptions,
    SamplingParams,
    blend,
    compress,
    merge,
    to_gguf,
    train,
)
from lora_tuner.adapters.adapter import load_adapter_folder
from lora_tuner.convert import verify
from lora_tuner.errors import AdapterError, ConfigError, WrongBaseError, ignore_events
from lora_tuner.models import lora
from lora_tuner.models.delta import load_deltas
from lora_tuner.models.layers import adaptable_layers
from lora_tuner.models.loading import open_base
from lora_tuner.models.resolve import find_base

from .. import tiny_models
from ..parameters import sampled
from .conftest import IDS, VARIANTS, peft_logits


def test_merged_model_reloads_with_equal_logits(settings, train_once, model_folder, tmp_path):
    adapter = train_once(settings(base=str(model_folder)))
    merged = merge(adapter, tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(merged.path)
    with torch.no_grad():
        logits = reloaded(IDS).logits
    torch.testing.assert_close(logits, peft_logits(model_folder, adapter), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, peft_logits(model_folder, None), atol=1e-2)


def test_merged_model_ends_at_turn_end(settings, gpt2, tmp_path):
    shutil.copytree(gpt2, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    end = tokenizer.convert_ids_to_tokens(300)
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = (
        "{% for m in messages %}" + f"{{{{ m.role }}}}: {{{{ m.content }}}}{end}" + "{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    merged = merge(train(settings(base="chat", max_steps=1)), tmp_path / "merged")
    ends = AutoModelForCausalLM.from_pretrained(merged.path).generation_config.eos_token_id
    assert ends == sorted([tokenizer.eos_token_id, 300])


def test_merge_reports_comparison(settings, train_once, model_folder, tmp_path):
    adapter = train_once(settings(base=str(model_folder)))
    comparison = merge(adapter, tmp_path / "merged").comparison
    assert 0 < comparison.max_logit_difference < 1e-4
    assert comparison.top1_agreement == 1
    assert comparison.rows == 8
    assert comparison.losses == pytest.approx((adapter.manifest.result.loss,) * 2, abs=1e-5)
    rounded = merge(adapter, tmp_path / "rounded", dtype="bfloat16").comparison
    assert rounded.max_logit_difference > 1e-3
    assert rounded.losses[1] == pytest.approx(rounded.losses[0], abs=0.02)


@pytest.mark.parametrize("variant", sampled(VARIANTS, 2))
@pytest.mark.parametrize("dora", [False, True])
def test_merge_every_lora_variant(make, model_folder, tmp_path, variant, dora):
    adapter = make("one", variant, use_dora=dora)
    merged = merge(adapter, tmp_path / "merged", options=ModelOptions(base=str(model_folder)))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(merged.path)(IDS).logits
    torch.testing.assert_close(logits, peft_logits(model_folder, adapter), atol=1e-4, rtol=1e-4)
    assert merged.comparison.losses is None


def test_merged_model_generates_same_text(adapter, tmp_path):
    out = merge(adapter, tmp_path / "merged").path
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("the actor", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(out)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=20, pad_token_id=0)
    sampling = SamplingParams(greedy=True, max_new_tokens=20, repetition_penalty=1.0)
    answer = Generator(adapter.path, options=ModelOptions(device="cpu")).generate("the actor", sampling)
    assert tokenizer.decode(output[0], skip_special_tokens=True) == "the actor" + answer.text


def test_merge_keeps_base_files(adapter, gpt2, tmp_path):
    before = {path.name: path.read_bytes() for path in gpt2.iterdir()}
    merge(adapter, tmp_path / "merged", dtype="bfloat16")
    assert {path.name: path.read_bytes() for path in gpt2.iterdir()} == before
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


@pytest.fixture
def own_base(settings, gpt2, tmp_path):
    """An adapter on a base of its own, in a folder that itself looks like a model."""
    base = tmp_path / "models" / "base"
    shutil.copytree(gpt2, base)
    shutil.copytree(base, tmp_path / "copy")
    shutil.copy(gpt2 / "config.json", base.parent)
    (tmp_path / "link").symlink_to(base, target_is_directory=True)
    return train(settings(base=str(base), max_steps=1))


@pytest.mark.parametrize("out", ["models/base", "link", "link/../../models/base/", "models", "models/base/new"])
def test_merge_over_own_base_is_refused(own_base, tmp_path, out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for options in (ModelOptions(), ModelOptions(base="copy")):
        with pytest.raises(AdapterError, match=r"would replace or change its base, .*: choose another --out"):
            merge(own_base, Path(out), overwrite=True, options=options)
    assert sorted(tmp_path.rglob("*")) == before


def test_results_over_own_base_are_refused(own_base, tmp_path):
    base, library = tmp_path / "models" / "base", Library(tmp_path)
    (base / "old.gguf").write_bytes(b"GGUF")
    shutil.copy(own_base.path / "adapter_config.json", base)  # so that an adapter may replace it
    shutil.copy(own_base.path / "adapter_config.json", base.parent)
    with pytest.raises(AdapterError, match="choose another --out"):
        to_gguf(own_base, base / "old.gguf", overwrite=True)
    with pytest.raises(AdapterError, match="choose another --name"):
        compress(own_base, "models", library, overwrite=True)
    with pytest.raises(AdapterError, match="choose another --name"):
        blend([(own_base, 0.5)], "base", Library(base.parent), overwrite=True)
    assert blend([(own_base, 0.5)], "half", Library(base / "adapters")).adapter.path == base / "adapters" / "half"


def test_merge_keeps_adapter_within_out(adapter, tmp_path):
    shutil.copytree(adapter.manifest.base.name, tmp_path / "other", dirs_exist_ok=True)
    inside = load_adapter_folder(shutil.copytree(adapter.path, tmp_path / "other" / "inside"))
    with pytest.raises(
        AdapterError, match=r"other would replace .*other/inside, which lies in it: choose another --out"
    ):
        merge(inside, tmp_path / "other", overwrite=True)


def test_merge_shards_weights(adapter, tmp_path):
    merged = merge(adapter, tmp_path / "merged", shard_size="40KB")
    assert len(list(merged.path.glob("*.safetensors"))) > 1
    assert merged.comparison.max_logit_difference < 1e-4


def test_merge_rejects_bad_targets(adapter, tmp_path):
    merge(adapter, tmp_path / "merged")
    with pytest.raises(AdapterError) as error:
        merge(adapter, tmp_path / "merged")
    assert str(error.value) == f"{tmp_path}/merged exists: choose another --out, or replace it with --overwrite."
    (tmp_path / "notes").mkdir()
    with pytest.raises(AdapterError) as error:
        merge(adapter, tmp_path / "notes", overwrite=True)
    assert (
        str(error.value)
        == f"{tmp_path}/notes is not a model folder, so it is not replaced: choose another --out."
    )
    merge(adapter, tmp_path / "merged", overwrite=True)
    other = tiny_models.save_model(tmp_path / "other", "gpt2", seed=5)
    with pytest.raises(WrongBaseError) as error:
        merge(adapter, tmp_path / "wrong", options=ModelOptions(base=str(other)))
    theirs, ours = adapter.manifest.base.fingerprint[:12], find_base(str(other)).fingerprint[:12]
    assert str(error.value) == (
        f"reviews was trained on {adapter.base} (fingerprint {theirs}, a local folder), not on {other} (fingerprint {ours}, a "
        "local folder). Name the right base with --base, or use --force to try it anyway."
    )
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(ConfigError, match="'5XB' is not a valid shard size: use a size such as 5GB or 500MB"):
        merge(adapter, tmp_path / "deep" / "er", shard_size="5XB")
    assert not (tmp_path / "deep").exists()


@pytest.fixture
def wrong_merge(monkeypatch):
    """A merge that forgets a part of the update, as PEFT's has done."""
    attach = lora.load_lora

    def half(model, adapter, slot, **settings):
        return attach(model, adapter, slot, lora_alpha=1)

    monkeypatch.setattr(lora, "load_lora", half)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_merge_is_not_kept(make, model_folder, tmp_path, wrong_merge, dtype):
    adapter, before = make("one", lora_alpha=64), sorted(tmp_path.iterdir())
    with pytest.raises(
        AdapterError, match="merged is not kept: the merged model differs from base and adapter: "
    ):
        merge(adapter, tmp_path / "merged", dtype=dtype, options=ModelOptions(base=str(model_folder)))
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_merge_keeps_old_model(make, model_folder, tmp_path, request):
    adapter = make("one")
    merge(adapter, tmp_path / "merged", options=ModelOptions(base=str(model_folder)))
    before = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    request.getfixturevalue("wrong_merge")
    with pytest.raises(AdapterError):
        merge(adapter, tmp_path / "merged", overwrite=True, options=ModelOptions(base=str(model_folder)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == before


@pytest.mark.parametrize(
    ("changed", "by", "mismatch"),
    [
        (15, 0.01, None),
        (15, 0.1, "logits differ by 0.1 (tolerance 0.02)"),
        (25, 0.01, "logits differ by 0.01 (tolerance 0.0005)"),
        (1, float("nan"), "nan"),
    ],
)
def test_few_positions_may_amplify_rounding(changed, by, mismatch):
    logits = torch.linspace(-10, 10, 2000).reshape(200, 10)
    other = logits.clone()
    other[:changed, 3] += by
    found = verify.exact_mismatch(logits, other)
    assert (found is None) if mismatch is None else (mismatch in found)


def rotate_rows(delta):
    """The rows of a layer of 4 heads in the order of llama.cpp."""
    return delta.view(4, 2, -1, delta.shape[1]).transpose(1, 2).reshape(delta.shape)


MISTAKES = {
    "missing": torch.zeros_like,
    "twice": lambda delta: 2 * delta,
    "scale": lambda delta: 1.02 * delta,
    "transposed": lambda delta: delta.T if delta.shape[0] == delta.shape[1] else None,
    "rows": rotate_rows,
}


def test_wrong_update_of_one_layer_is_seen(settings, llama):
    """A merge that is wrong in a single layer, or by 2% in all, of an adapter of a few steps."""
    adapter = train(settings(base=str(llama), max_steps=3))
    base = open_base(adapter, ModelOptions(device="cpu", dtype="float32"))
    layers, rows = adaptable_layers(base.model), base.probe_sequences()
    deltas = load_deltas(adapter, layers)

    def logits(wrong=None, modules=()):
        updates = {module: update.B.double() @ update.A.double() for module, update in deltas.items()}
        changed = {module: wrong(updates[module]) for module in modules}
        before = {module: layers[module].weight.data.clone() for module in deltas}
        for module, update in (updates | changed).items():
            layers[module].weight.data += update.float()
        outputs = verify.forward_outputs(base.model, rows, ignore_events, "running")
        for module, weight in before.items():
            layers[module].weight.data.copy_(weight)
        return outputs.logits

    expected = verify.forward_with_adapter(base, adapter, rows, ignore_events).logits
    assert verify.exact_mismatch(expected, logits()) is None
    assert verify.exact_mismatch(expected, logits(MISTAKES["scale"], deltas))
    for name, wrong in MISTAKES.items():
        seen = {
            module: verify.exact_mismatch(expected, logits(wrong, [module])) is not None
            for module in deltas
            if name != "scale" and wrong(deltas[module].B.double() @ deltas[module].A.double()) is not None
        }
        assert all(seen.values()), (name, seen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_wrong_by_two_percent_is_refused(make, model_folder, tmp_path, monkeypatch, dtype):
    attach = lora.load_lora
    monkeypatch.setattr(lora, "load_lora", lambda *of: attach(*of, lora_alpha=8.16))
    adapter = make("one", lora_alpha=8)
    with pytest.raises(AdapterError, match="the merged model differs from base and adapter: logits differ by"):
        merge(adapter, tmp_path / "merged", dtype=dtype, options=ModelOptions(base=str(model_folder)))
