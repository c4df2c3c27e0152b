import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_tuner import Library, TrainConfig, lora, store
from lora_tuner.base_model import find_base, load_base
from lora_tuner.errors import AdapterError, ConfigError, WrongBaseError

from . import tiny


def load(folder):
    return load_base(find_base(str(folder)), "cpu")


GPT2 = {"auto": ["c_attn", "c_fc", "c_proj"], "attention": ["attn.c_proj", "c_attn"]}
LLAMA = {
    "auto": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "attention": ["k_proj", "o_proj", "q_proj", "v_proj"],
}


@pytest.mark.parametrize("wanted", ["auto", "all-linear", "attention"])
def test_targets_by_kind(gpt2, llama, wanted):
    for folder, expected in ((gpt2, GPT2), (llama, LLAMA)):
        assert (
            lora.resolve_targets(load(folder).model, wanted)
            == expected["attention" if wanted == "attention" else "auto"]
        )


def test_targets_by_name(gpt2):
    model = load(gpt2).model
    assert lora.resolve_targets(model, "c_attn, mlp.c_proj") == ["c_attn", "mlp.c_proj"]
    assert lora.resolve_targets(model, "transformer.h.1.attn.c_attn") == ["1.attn.c_attn"]


@pytest.mark.parametrize("name", ["lm_head", "wte", "q_proj", "embed_tokens", ""])
def test_what_cannot_be_adapted_is_refused_with_the_names_that_can(gpt2, name):
    with pytest.raises(ConfigError, match="any of c_attn, c_fc, c_proj can") as error:
        lora.resolve_targets(load(gpt2).model, name)
    assert f"targets: {name} cannot be adapted" in str(error.value)


def test_only_the_update_is_trained_and_it_starts_as_nothing(model_folder):
    base = load(model_folder)
    ids = torch.arange(12)[None]
    before = base.model(ids).logits
    model = lora.wrap(base, TrainConfig(rank=3))
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    torch.testing.assert_close(model(ids).logits, before, atol=0, rtol=0)
    trained, frozen = lora.counts(model)
    assert trained == sum(t.numel() for t in lora.weights(model).values())
    assert frozen == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model_folder).parameters())


def test_alpha_is_twice_the_rank_unless_given(gpt2):
    assert lora.wrap(load(gpt2), TrainConfig(rank=3)).peft_config["default"].lora_alpha == 6
    assert lora.wrap(load(gpt2), TrainConfig(rank=3, alpha=5)).peft_config["default"].lora_alpha == 5


@pytest.fixture
def stored(model_folder, tmp_path):
    """An adapter with random weights, as a folder, on each kind of base."""
    base = load(model_folder)
    model = lora.wrap(base, TrainConfig(rank=3))
    torch.manual_seed(1)
    tensors = {name: torch.randn_like(tensor) * 0.1 for name, tensor in lora.weights(model).items()}
    lora.save(tensors, model.peft_config["default"], tmp_path / "stored")
    return store.read(tmp_path / "stored")


def test_a_saved_adapter_gives_plain_peft_the_same_logits(model_folder, stored):
    ids = torch.arange(20)[None]
    ours = lora.attach(load(model_folder).model, stored, "slot0")
    ours.set_adapter("slot0")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), stored.path)
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, atol=0, rtol=0)


def test_the_config_names_the_base_and_no_initialiser(model_folder, stored):
    config = json.loads((stored.path / store.CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(model_folder)
    assert config["init_lora_weights"] is True
    assert config["target_modules"] == sorted(config["target_modules"])


def test_an_adapter_of_another_shape_is_refused_and_the_base_stays(tmp_path, stored, model_folder):
    kind = "gpt2" if "gpt2" in str(model_folder) else "llama"
    wider = load(tiny.save_model(tmp_path / "wider", kind, width=48))
    names = [name for name, _ in wider.model.named_modules()]
    with pytest.raises(AdapterError, match=r"does not fit the base: .* in the base, .* in the adapter; .* more"):
        lora.attach(wider.model, stored, "slot0")
    assert [name for name, _ in wider.model.named_modules()] == names


def test_an_adapter_with_more_layers_than_the_base_is_refused(tmp_path, stored, model_folder):
    kind = "gpt2" if "gpt2" in str(model_folder) else "llama"
    shallow = load(tiny.save_model(tmp_path / "shallow", kind, layers=1))
    with pytest.raises(AdapterError, match="is no linear layer of the base"):
        lora.attach(shallow.model, stored, "slot0")
    assert not any("lora" in name for name, _ in shallow.model.named_modules())


def test_the_wrong_base_is_refused_unless_forced(adapter, tmp_path):
    other = load(tiny.save_model(tmp_path / "other", "gpt2", seed=7))
    with pytest.raises(WrongBaseError) as error:
        lora.check_base(adapter, other)
    assert "reviews was trained on" in str(error.value)
    assert "Give the right one with --base, or try all the same with --force." in str(error.value)
    notices = []
    lora.check_base(adapter, other, force=True, notify=notices.append)
    assert [notice.text[:30] for notice in notices] == ["FORCED: reviews was trained on"]


def test_the_base_is_found_from_the_manifest(adapter, gpt2):
    assert lora.open_base(Library().get("reviews"), device="cpu").source.folder == gpt2
