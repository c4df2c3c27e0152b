import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lora_tuner import Generator, Library, ModelOptions, Notice, atomic_io, train
from lora_tuner.adapters.adapter import RUN_FILE
from lora_tuner.cli.app import app
from lora_tuner.errors import BaseModelError, HubError
from lora_tuner.models import base_files, layers, loading, lora, resolve
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.settings_files import read_settings

from .. import adapter_files, gguf_base, tiny_models

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


def test_default_base_falls_back_with_notice(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path))
    embedded = base_files.BaseModelFiles("smollm2-135m", "owner/name", Path(), None, "a file")
    monkeypatch.setattr(resolve.embedded, "open_embedded", lambda notify: embedded)
    events = []
    assert find_base(None, notify=events.append) is embedded
    assert events == [
        Notice(
            "Using base smollm2-135m instead of distilgpt2: distilbert/distilgpt2 is not cached, and the Hub is out of reach: "
            "HF_HUB_OFFLINE is set. Choose one with --base."
        )
    ]
    (tmp_path / "bases" / "smollm2-135m-0123").mkdir(parents=True)
    find_base(None, notify=events.append)
    assert events[1:] == [Notice("Using base smollm2-135m: HF_HUB_OFFLINE is set.")]
    with pytest.raises(HubError):  # a revision belongs to the default base
        find_base(None, "v1")


def test_incomplete_folders_are_refused(tmp_path, gpt2):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelError, match=r"The folder empty is not a model: it has no config\.json\."):
        find_base("empty")
    shutil.copytree(gpt2, tmp_path / "pickled")
    (tmp_path / "pickled" / WEIGHTS).rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(
        BaseModelError,
        match=r"The folder pickled is not a model: it has no safetensors weights\. Pickled ones",
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


def test_fingerprint_ignores_split_into_files(tmp_path, gpt2):
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
    hash_again = base_files.stored_weights.tensor_hashes
    monkeypatch.setattr(base_files.stored_weights, "tensor_hashes", lambda path: pytest.fail("hashed again"))
    assert find_base("base").fingerprint == first
    monkeypatch.setattr(base_files.stored_weights, "tensor_hashes", hash_again)
    tiny_models.save_model(tmp_path / "base", "gpt2", seed=3)
    assert find_base("base").fingerprint != first


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data.replace(b"0", b"1"), lambda data: b""]
)
def test_damaged_fingerprint_cache_is_made_again(gpt2, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    first, notices = find_base(str(gpt2)).fingerprint, []
    (cache,) = (tmp_path / "cache" / "fingerprints").iterdir()
    cache.write_bytes(damage(cache.read_bytes()))
    for _ in range(2):
        assert find_base(str(gpt2), notify=notices.append).fingerprint == first
    assert notices == [Notice(f"{cache} is damaged: what it held is made again.")]


@pytest.fixture(scope="session")
def tiny_gguf(llama, tmp_path_factory):
    return gguf_base.convert(llama, tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf")


@pytest.fixture
def embedded(tiny_gguf, tmp_path, monkeypatch):
    """Put a package with a tiny base in the place of the embedded one; returns its unpacked folder."""
    path = Path(shutil.copyfile(tiny_gguf, tmp_path / tiny_gguf.name))
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(resolve.embedded, "embedded_gguf", lambda _: (path, "1.0"))
    return find_base("smollm2-135m").folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "whole.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_damaged_unpacked_base_is_made_again(embedded, name, how):
    path, notices, first = embedded / name, [], find_base("smollm2-135m").fingerprint
    data, times = path.read_bytes(), path.stat()
    middle = len(data) // 2
    path.write_bytes(
        data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if how == "flipped" else data[:middle]
    )
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    if how == "missing":
        path.unlink()
    base = find_base("smollm2-135m", notify=notices.append)
    assert (base.folder, base.fingerprint, path.read_bytes()) == (embedded, first, data)
    assert notices[0].text == f"{embedded} is damaged, or of an older version: it is made again."
    notices.clear()
    find_base("smollm2-135m", notify=notices.append)
    assert notices == []


def test_fingerprint_of_unpacked_base_is_of_its_source(embedded, tmp_path):
    """Not of what the installed transformers writes."""
    before = find_base("smollm2-135m")
    (embedded / "config.json").write_text((embedded / "config.json").read_text().replace("{", '{"new": 1,', 1))
    (embedded / "whole.json").unlink()
    atomic_io.write_hashes(embedded)
    after = find_base("smollm2-135m")
    assert (before.fingerprint, before.tokenizer_hash((), is_fast=True)) == (
        after.fingerprint,
        after.tokenizer_hash((), is_fast=True),
    )
    path = tmp_path / "tiny.Q4_1.gguf"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert find_base("smollm2-135m").fingerprint != before.fingerprint


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


def add_side_files(folder, module, size):
    """Put files beside the weights of a base that are not part of it: an adapter that would change every logit, other
    weights, code, state of a training run, tokenizers of another kind."""
    factors = {"A": np.full((4, size[0]), 0.1, np.float32), "B": np.full((size[1], 4), 0.1, np.float32)}
    adapter = {f"base_model.model.{module}.lora_{part}.weight": values for part, values in factors.items()}
    adapter_files.write(folder, {"target_modules": [module.rpartition(".")[2]]}, adapter)
    tensors = load_file(folder / WEIGHTS)
    twice = {name: 2 * tensor for name, tensor in tensors.items()}
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "model-00001-of-00001.safetensors"):
        save_file(twice, folder / name, metadata={"format": "pt"})
    torch.save(twice, folder / "pytorch_model.bin")
    names = [*twice]
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")})
    )
    for name in (
        "adapter_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "tokenizer.model",
        "tekken.json",
        "vocab.txt",
    ):
        (folder / name).write_text("{}")
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    (folder / "vocab.json").write_text('{"a": 0, "b": 1}')
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "generation_config.json").write_text('{"cache_implementation": "none of these"}')
    for name in ("modeling_llama.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise SystemExit('the code of a base was run')")


@pytest.mark.parametrize("from_hub", [False, True])
def test_side_files_of_a_base_change_nothing(tmp_path, model_folder, monkeypatch, from_hub):
    plain = load_base(find_base(str(model_folder)), ModelOptions(device="cpu"))
    if from_hub:
        cached = tmp_path / "models--owner--name"
        folder = cached / "snapshots" / ("0" * 40)
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    else:
        folder = tmp_path / "base"
    shutil.copytree(model_folder, folder)
    add_side_files(folder, *next(iter(layers.layer_sizes(layers.linear_layers(plain.model)).items())))
    name, notices = "owner/name" if from_hub else "base", []
    options = ModelOptions(base=name, device="cpu", notify=lambda notice: notices.append(notice.text))
    base = loading.open_base(None, options)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, plain.model(ids).logits)
    assert not hasattr(base.model, "peft_config")
    assert base.files.fingerprint == plain.files.fingerprint
    assert (base.tokenizer_hash, base.eos_token_ids) == (plain.tokenizer_hash, plain.eos_token_ids)
    assert (
        notices[0] == f"The adapter files in the base {name} are ignored: --adapter or --from names an adapter."
    )
    assert notices[1].startswith(f"The generation_config.json of {name} is ignored, because it is not valid: ")
    assert len(notices) == 2


def test_folder_with_only_an_adapter_is_no_base(tmp_path, gpt2):
    adapter_files.write(tmp_path / "lora")
    advice = "it holds an adapter. Name that with --adapter or --from, and its base with --base."
    with pytest.raises(BaseModelError) as error:
        find_base("lora")
    assert str(error.value) == f"The folder lora is not a model: it has no config.json, {advice}"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # some tools add these
        shutil.copyfile(gpt2 / name, tmp_path / "lora" / name)
    with pytest.raises(BaseModelError) as error:
        find_base("lora")
    assert str(error.value) == f"The folder lora is not a model: it has no safetensors weights, {advice}"


def test_parts_of_distributed_checkpoint_are_refused(tmp_path, gpt2):
    """transformers would load them instead of the weights."""
    shutil.copytree(gpt2, tmp_path / "base")
    shutil.copyfile(gpt2 / WEIGHTS, tmp_path / "base" / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(
        BaseModelError, match=r"shard-00000-model-00001-of-00001\.safetensors belongs to a distributed"
    ):
        load_base(find_base("base"), ModelOptions(device="cpu"))


def test_weights_that_contradict_config_are_named(tmp_path, model_folder):
    """Tokens were added, and config.json is the one of before."""
    shutil.copytree(model_folder, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.resize_token_embeddings(322)
    model.save_pretrained(tmp_path / "base")
    base = load_base(find_base("base"), ModelOptions(device="cpu"))
    assert base.vocab_size == 322
    shutil.copyfile(model_folder / "config.json", tmp_path / "base" / "config.json")
    with pytest.raises(BaseModelError) as error:
        load_base(find_base("base"), ModelOptions(device="cpu"))
    assert str(error.value).startswith("The weights of base contradict its config.json: ")
    assert " is 322 x 32, not 320 x 32. Restore the config.json that was saved with them" in str(error.value)


@pytest.fixture
def unresized(tmp_path, model_folder):
    """A base with more tokens in its tokenizer than rows in its embeddings."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "unresized"))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["<rare>", "actor"])
    tokenizer.save_pretrained(folder)
    return folder


def test_token_without_embedding_is_named(unresized, settings):
    expected = (
        f"The token actor has the id 321, but the embeddings of {unresized} have 320 rows: tokens were added to its "
        "tokenizer, and the model was not resized."
    )
    generator = Generator(options=ModelOptions(base=str(unresized), device="cpu"))
    with pytest.raises(BaseModelError) as error:
        generator.generate("the actor")
    assert str(error.value).startswith(expected)
    with pytest.raises(BaseModelError) as error:
        train(settings(base=str(unresized)))
    assert str(error.value).startswith(expected)


@pytest.mark.slow
def test_unused_tokens_without_embeddings_are_harmless(unresized, settings, tmp_path):
    rows = [text.replace("actor", "writer") for text in tiny_models.reviews(40)]
    (tmp_path / "rows.txt").write_text("\n".join(rows))
    adapter = train(settings(base=str(unresized), dataset="rows.txt", max_steps=2))
    assert adapter.manifest.run.steps == 2


@pytest.mark.parametrize(
    "base", ["/nowhere/base", "~/nowhere/base", "../base", "models/base", "gone", "C:\\models\\base", "a/b/c"]
)
@pytest.mark.parametrize("manifest", [True, False])
def test_missing_base_is_named_with_its_adapter(tmp_path, base, manifest):
    facts = adapter_files.manifest()
    facts = facts.model_copy(update={"base": facts.base.model_copy(update={"name": base, "revision": None})})
    config = {"base_model_name_or_path": base}
    adapter_files.write(tmp_path / "adapters" / "mine", config, facts=facts if manifest else None)
    adapter = Library().get("mine")
    with pytest.raises((BaseModelError, HubError)) as error:
        loading.open_base(adapter, ModelOptions(device="cpu"))
    source = "manifest.json" if manifest else "adapter_config.json"
    assert str(error.value).startswith(
        f"mine was trained on the base {base} (named in its {source}), which cannot be used here: "
    )
    assert base in str(error.value).partition(": ")[2]
    assert str(error.value).endswith(" Name a copy of it with --base.")


def test_local_base_is_never_looked_up_on_hub(tmp_path, gpt2, settings, monkeypatch):
    """Another folder, where only a Hub repository could have that name."""
    shutil.copytree(gpt2, tmp_path / "models" / "base")
    adapter = train(settings(base="models/base", max_steps=1))
    requests = []
    monkeypatch.setattr(resolve.hub, "cached_snapshot", lambda repo, _: requests.append(repo))
    monkeypatch.setattr(resolve.hub, "ensure_reachable", lambda *_: None)
    monkeypatch.setattr(resolve.hub, "download_model", lambda *_: gpt2)
    assert read_settings(Path(adapter.path, RUN_FILE))["base"] == "./models/base"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(
        BaseModelError, match=r"It is not looked for on the Hub\. Name a copy of it with --base\.$"
    ):
        loading.open_base(adapter)
    assert requests == []
    with pytest.raises(BaseModelError, match=r"^There is no folder \./models/base\.$"):
        find_base("./models/base")
    assert requests == []


def test_missing_base_is_replaced_by_a_copy(tmp_path, gpt2, settings):
    shutil.copytree(gpt2, tmp_path / "first")
    adapter = train(settings(base="first", max_steps=1))
    (tmp_path / "first").rename(tmp_path / "second")
    for arguments in (
        ["generate", "the actor", "--adapter", "reviews"],
        ["compare", "the actor", "--adapter", "reviews"],
        ["evaluate", "reviews"],
        ["merge", "reviews", "--out", "merged"],
        ["export", "reviews", "--out", "out.gguf"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        line = result.stderr.splitlines()[-1]
        assert line.startswith(
            "Error: reviews was trained on the base first (named in its manifest.json), which"
        ), line
    base = loading.open_base(adapter, ModelOptions(base="second", device="cpu"))
    lora.check_base(adapter, base)


def test_local_folder_with_name_of_embedded_base(gpt2, tmp_path):
    shutil.copytree(gpt2, tmp_path / "smollm2-135m")
    assert find_base("smollm2-135m").fingerprint == find_base(str(gpt2)).fingerprint
