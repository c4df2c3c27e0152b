import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_tuner import Library, Manifest, ModelOptions, TrainConfig, atomic_io
from lora_tuner.adapters.adapter import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    load_adapter_folder,
    verify_adapter,
)
from lora_tuner.adapters.manifest import WeightsInfo, utc_timestamp
from lora_tuner.errors import AdapterError, ConfigError, Notice, WrongBaseError
from lora_tuner.models import loading, lora
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import adapter_files, tiny_models


def load(folder):
    return load_base(find_base(str(folder)), ModelOptions(device="cpu"))


def test_peft_value_error_becomes_config_error(gpt2, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("Target module Linear()\n  is not   supported.")

    monkeypatch.setattr("peft.get_peft_model", refuse)
    with pytest.raises(ConfigError) as error:
        lora.add_lora(load(gpt2), TrainConfig())
    assert str(error.value) == "target_modules: Target module Linear() is not supported."


def test_new_lora_changes_nothing(model_folder):
    base = load(model_folder)
    ids = torch.arange(12)[None]
    before = base.model(ids).logits
    model = lora.add_lora(base, TrainConfig(rank=3))
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    torch.testing.assert_close(model(ids).logits, before, atol=0, rtol=0)
    trained, frozen = lora.count_parameters(model)
    assert trained == sum(t.numel() for t in lora.adapter_state_dict(model).values())
    assert frozen == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model_folder).parameters())


def test_alpha_defaults_to_twice_the_rank(gpt2):
    assert lora.add_lora(load(gpt2), TrainConfig(rank=3)).peft_config["default"].lora_alpha == 6
    assert lora.add_lora(load(gpt2), TrainConfig(rank=3, alpha=5)).peft_config["default"].lora_alpha == 5


@pytest.fixture
def stored(model_folder, tmp_path):
    """An adapter folder with random weights, on each kind of base."""
    base = load(model_folder)
    model = lora.add_lora(base, TrainConfig(rank=3))
    torch.manual_seed(1)
    tensors = {name: torch.randn_like(tensor) * 0.1 for name, tensor in lora.adapter_state_dict(model).items()}
    lora.save_adapter_files(tensors, model.peft_config["default"], tmp_path / "stored")
    return load_adapter_folder(tmp_path / "stored")


def test_saved_adapter_matches_plain_peft(model_folder, stored):
    ids = torch.arange(20)[None]
    ours = lora.load_lora(load(model_folder).model, stored, "slot0")
    ours.set_adapter("slot0")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), stored.path)
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, atol=1e-5, rtol=0)


def test_saved_config_names_base(model_folder, stored):
    config = json.loads((stored.path / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == str(model_folder)
    assert config["init_lora_weights"] is True
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # names of the other base
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "alpha_pattern": {"c_attn": 5, "q_proj": 5}},
        {
            "rank_pattern": {
                r"^transformer\.h\.0\.mlp\.c_fc": 7,
                "c_fc": 2,
                r"layers.\d.mlp.up_proj": 6,
                "k_proj": 1,
            }
        },
        {"alpha_pattern": {"attn.c_attn": 1, "h.1.mlp.c_proj": 16, "0.self_attn.v_proj": 0, "v_proj": 9}},
    ],
)
def test_plain_peft_adapter_loads_identically(model_folder, tmp_path, settings):
    torch.manual_seed(2)
    transposed = "gpt2" in str(model_folder)
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    settings = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "target_modules": "all-linear",
        "init_lora_weights": False,
    } | settings
    plain = get_peft_model(plain, LoraConfig(**settings, fan_in_fan_out=transposed)).eval()
    plain.save_pretrained(tmp_path / "plain")
    adapter = load_adapter_folder(tmp_path / "plain")
    assert verify_adapter(adapter) == []
    ours = lora.load_lora(load(model_folder).model, adapter, "slot0")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, atol=1e-5, rtol=0)
    scales = {
        name.removeprefix("base_model.model."): layer.scaling["slot0"]
        for name, layer in ours.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert {module: adapter.scale_of(module) for module in adapter.modules} == scales


def damage(adapter, count):
    """Put NaN into some of the tensors; returns the names of all."""
    tensors = load_file(adapter.path / WEIGHTS_FILE)
    for name in sorted(tensors)[:count]:
        tensors[name][0, 0] = float("nan")
    save_file(tensors, adapter.path / WEIGHTS_FILE)
    return sorted(tensors)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_damaged_adapter_leaves_base_unchanged(stored, model_folder, count):
    names = damage(stored, count)
    base = load(model_folder)
    before = [name for name, _ in base.model.named_modules()]
    problems = "; ".join(f"{name} has values that are not finite" for name in names[: min(count, 3)])
    for load_adapter in (
        lambda: lora.load_lora(base.model, stored, "slot0"),
        lambda: lora.add_lora(base, TrainConfig(), stored),
    ):
        with pytest.raises(AdapterError) as error:
            load_adapter()
        assert str(error.value) == f"{stored.path} is damaged: {problems}."
    assert [name for name, _ in base.model.named_modules()] == before


def test_weights_with_wrong_hash_are_refused(with_manifest, model_folder):
    tensors = load_file(with_manifest.path / WEIGHTS_FILE)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, with_manifest.path / WEIGHTS_FILE)
    with pytest.raises(AdapterError) as error:
        lora.load_lora(load(model_folder).model, load_adapter_folder(with_manifest.path), "slot0")
    assert str(error.value) == (
        f"{with_manifest.path} is damaged: adapter_model.safetensors does not match its hash in manifest.json."
    )


def test_wrong_shapes_leave_base_unchanged(tmp_path, stored, model_folder):
    gpt2 = "gpt2" in str(model_folder)
    wider = load(tiny_models.save_model(tmp_path / "wider", "gpt2" if gpt2 else "llama", width=48))
    names = [name for name, _ in wider.model.named_modules()]
    with pytest.raises(AdapterError) as error:
        lora.load_lora(wider.model, stored, "slot0")
    problems = (
        "transformer.h.0.attn.c_attn is 48 -> 144 in the base, 32 -> 96 in the adapter; "
        "transformer.h.0.attn.c_proj is 48 -> 48 in the base, 32 -> 32 in the adapter; "
        "transformer.h.0.mlp.c_fc is 48 -> 192 in the base, 32 -> 128 in the adapter, and 5 more"
        if gpt2
        else "model.layers.0.mlp.down_proj is 96 -> 48 in the base, 64 -> 32 in the adapter; "
        "model.layers.0.mlp.gate_proj is 48 -> 96 in the base, 32 -> 64 in the adapter; "
        "model.layers.0.mlp.up_proj is 48 -> 96 in the base, 32 -> 64 in the adapter, and 11 more"
    )
    assert str(error.value) == f"{stored.path} does not fit the base: {problems}."
    assert [name for name, _ in wider.model.named_modules()] == names


def test_missing_base_layers_are_refused(tmp_path, stored, model_folder):
    gpt2 = "gpt2" in str(model_folder)
    shallow = load(tiny_models.save_model(tmp_path / "shallow", "gpt2" if gpt2 else "llama", layers=1))
    with pytest.raises(AdapterError) as error:
        lora.load_lora(shallow.model, stored, "slot0")
    missing = [module for module in stored.modules if ".1." in module]
    problems = "; ".join(f"the base has no linear layer {module}" for module in missing[:3])
    assert str(error.value) == f"{stored.path} does not fit the base: {problems}, and {len(missing) - 3} more."
    assert not any("lora" in name for name, _ in shallow.model.named_modules())


# The base that an adapter was trained on


@pytest.fixture
def with_manifest(stored, model_folder):
    """The stored adapter with a manifest of its base."""
    base = load(model_folder)
    weights = stored.path / WEIGHTS_FILE
    manifest = Manifest(
        created=utc_timestamp(),
        base=base.files.base_info(base.tokenizer_hash),
        weights=WeightsInfo(
            sha256=atomic_io.sha256_file(weights), bytes=weights.stat().st_size, parameters=stored.parameters
        ),
    )
    (stored.path / MANIFEST_FILE).write_text(manifest.to_json())
    return load_adapter_folder(stored.path)


@pytest.fixture
def other_weights(model_folder, tmp_path):
    kind = "gpt2" if "gpt2" in str(model_folder) else "llama"
    return load(tiny_models.save_model(tmp_path / "other", kind, seed=7))


@pytest.fixture
def other_tokenizer(model_folder, tmp_path):
    """The same base with one more token."""
    folder = shutil.copytree(model_folder, tmp_path / "retokenised")
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder)
    return load(folder)


def refused(adapter, base):
    with pytest.raises(WrongBaseError) as error:
        lora.check_base(adapter, base, options=ModelOptions(notify=pytest.fail))
    return str(error.value)


def forced(adapter, base):
    notices = []
    lora.check_base(adapter, base, options=ModelOptions(force=True, notify=notices.append))
    return notices


def test_right_base_passes_silently(with_manifest, model_folder):
    lora.check_base(with_manifest, load(model_folder), options=ModelOptions(notify=pytest.fail))
    assert forced(with_manifest, load(model_folder)) == []


def test_wrong_base_is_refused_unless_forced(with_manifest, model_folder, other_weights):
    own, other = load(model_folder).files, other_weights.files
    assert own.fingerprint != other.fingerprint
    problem = (
        f"stored was trained on {model_folder} (fingerprint {own.fingerprint[:12]}, a local folder), not on {other.name} "
        f"(fingerprint {other.fingerprint[:12]}, a local folder)"
    )
    assert refused(with_manifest, other_weights) == (
        f"{problem}. Name the right base with --base, or use --force to try it anyway."
    )
    assert forced(with_manifest, other_weights) == [Notice(f"FORCED: {problem}. Its output may be meaningless.")]


def test_wrong_tokenizer_is_refused_unless_forced(with_manifest, model_folder, other_tokenizer):
    assert other_tokenizer.files.fingerprint == load(model_folder).files.fingerprint
    problem = f"stored was trained with another tokenizer than that of {other_tokenizer.files.name}"
    assert refused(with_manifest, other_tokenizer) == (
        f"{problem}. Name the right base with --base, or use --force to try it anyway."
    )
    assert forced(with_manifest, other_tokenizer) == [
        Notice(f"FORCED: {problem}. Its output may be meaningless.")
    ]


def test_unknown_tokenizer_hash_passes(with_manifest, other_tokenizer):
    manifest = with_manifest.manifest.model_copy(
        update={"base": with_manifest.manifest.base.model_copy(update={"tokenizer": None})}
    )
    (with_manifest.path / MANIFEST_FILE).write_text(manifest.to_json())
    lora.check_base(
        load_adapter_folder(with_manifest.path), other_tokenizer, options=ModelOptions(notify=pytest.fail)
    )


def test_missing_manifest_gives_a_notice(stored, other_weights):
    notice = Notice(
        f"stored has no manifest, so only its shapes can be compared with {other_weights.files.name}."
    )
    assert forced(stored, other_weights) == [notice]
    notices = []
    lora.check_base(stored, other_weights, options=ModelOptions(notify=notices.append))
    assert notices == [notice]


def test_open_base_uses_manifest(adapter, gpt2):
    assert loading.open_base(Library().get("reviews"), options=ModelOptions(device="cpu")).files.folder == gpt2


def test_saving_keeps_pattern_order(gpt2, tmp_path):
    """PEFT uses the first key of a pattern that matches."""
    shapes = {"A": (4, 32), "B": (96, 4)}
    weights = {
        f"base_model.model.transformer.h.{number}.attn.c_attn.lora_{part}.weight": np.ones(shape, np.float32)
        for number in (0, 1)
        for part, shape in shapes.items()
    }
    patterns = {"alpha_pattern": {"h.0.attn.c_attn": 64, "c_attn": 2}}
    parent = load_adapter_folder(adapter_files.write(tmp_path / "parent", patterns, weights))
    model = lora.add_lora(load(gpt2), TrainConfig(rank=4), parent)
    lora.save_adapter_files(lora.adapter_state_dict(model), model.peft_config["default"], tmp_path / "child")
    child = load_adapter_folder(tmp_path / "child")
    assert [child.scale_of(module) for module in child.modules] == [16.0, 0.5]


def test_adapter_changed_on_disk_is_refused(model_folder, stored, tmp_path):
    other = lora.add_lora(load(model_folder), TrainConfig(rank=2))
    lora.save_adapter_files(lora.adapter_state_dict(other), other.peft_config["default"], stored.path)
    with pytest.raises(AdapterError) as error:
        lora.load_lora(load(model_folder).model, stored, "slot0")
    assert str(error.value) == f"{stored.path} has changed since it was opened: open it again."
