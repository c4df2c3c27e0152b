import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import Generator, Library, Sampling, merge, train
from lora_tuner.base_model import find_base
from lora_tuner.errors import AdapterError, WrongBaseError

from . import tiny


def test_merged_saved_and_reloaded_agree(settings, model_folder, tmp_path):
    adapter = train(settings(base=str(model_folder)))
    out = merge(adapter, tmp_path / "merged")
    ids = torch.arange(30)[None]
    merged = AutoModelForCausalLM.from_pretrained(out)
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    base_logits = plain(ids).logits
    tuned = PeftModel.from_pretrained(plain, adapter.path)
    torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged(ids).logits, base_logits, atol=1e-2)


def test_the_merged_model_is_plain_and_writes_the_same(adapter, tmp_path):
    out = merge(adapter, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("the actor", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(out)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=20, pad_token_id=0)
    sampling = Sampling(greedy=True, max_new_tokens=20, repetition_penalty=1.0)
    answer = Generator(adapter.path, device="cpu").generate("the actor", sampling)
    assert tokenizer.decode(output[0], skip_special_tokens=True) == "the actor" + answer.text


def test_the_base_on_disk_stays(adapter, gpt2, tmp_path):
    before = {path.name: path.read_bytes() for path in gpt2.iterdir()}
    merge(adapter, tmp_path / "merged", dtype="bfloat16")
    assert {path.name: path.read_bytes() for path in gpt2.iterdir()} == before
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_nothing_is_replaced_or_half_written(adapter, tmp_path, monkeypatch):
    merge(adapter, tmp_path / "merged")
    with pytest.raises(AdapterError) as error:
        merge(adapter, tmp_path / "merged")
    assert str(error.value) == f"{tmp_path}/merged exists: choose another --out, or replace it with --overwrite."
    (tmp_path / "notes").mkdir()
    with pytest.raises(AdapterError) as error:
        merge(adapter, tmp_path / "notes", overwrite=True)
    assert str(error.value) == f"{tmp_path}/notes is no model folder, so it is not replaced: choose another --out."
    merge(adapter, tmp_path / "merged", overwrite=True)
    other = tiny.save_model(tmp_path / "other", "gpt2", seed=5)
    with pytest.raises(WrongBaseError) as error:
        merge(adapter, tmp_path / "wrong", base=str(other))
    theirs, ours = adapter.manifest.base.fingerprint[:12], find_base(str(other)).fingerprint[:12]
    assert str(error.value) == (
        f"reviews was trained on {adapter.base} (fingerprint {theirs}, a local folder), not on {other} (fingerprint {ours}, a "
        "local folder). Give the right one with --base, or try all the same with --force."
    )
    assert not (tmp_path / "wrong").exists()


def test_merging_is_the_same_from_a_name(adapter, tmp_path):
    assert merge(Library().get("reviews"), tmp_path / "merged") == tmp_path / "merged"
