"""LoRA goes where PEFT takes it and text runs; the rest is said by name, with its share."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_tuner import ModelOptions, TrainConfig, resume, train
from lora_tuner.adapters.adapter import CARD_FILE, CONFIG_FILE, load_adapter_folder
from lora_tuner.adapters.manifest import Manifest
from lora_tuner.errors import AdapterError, ConfigError, TrainingError
from lora_tuner.models import lora
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.models.targets import resolve_target_modules
from lora_tuner.text import describe_coverage

from ..model_families import make_family, save_family


def load(folder):
    return load_base(find_base(str(folder)), ModelOptions(device="cpu"))


GPT2 = {"auto": ["c_attn", "c_fc", "c_proj"], "attention": ["attn.c_proj", "c_attn"]}
LLAMA = {
    "auto": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "attention": ["k_proj", "o_proj", "q_proj", "v_proj"],
}


@pytest.mark.parametrize("group", ["auto", "all-linear", "attention"])
def test_target_modules_by_group(gpt2, llama, group):
    for folder, expected in ((gpt2, GPT2), (llama, LLAMA)):
        targets = resolve_target_modules(load(folder).model, group).names
        assert targets == expected["attention" if group == "attention" else "auto"]


def test_target_modules_by_name(gpt2):
    model = load(gpt2).model
    assert resolve_target_modules(model, "c_attn, mlp.c_proj").names == ["c_attn", "mlp.c_proj"]
    assert resolve_target_modules(model, "transformer.h.1.attn.c_attn").names == ["1.attn.c_attn"]


REFUSAL = (
    "target_modules: {} cannot be adapted; choose auto, attention, all-linear, or any of {} (embeddings and the output "
    "head cannot be adapted: where they share weights, an update would not survive a merge)."
)


@pytest.mark.parametrize(
    "name", ["lm_head", "wte", "q_proj", "embed_tokens", "", "attn", "C_ATTN", "h.9.attn.c_attn", ".*"]
)
def test_unknown_target_lists_valid_names(gpt2, name):
    with pytest.raises(ConfigError) as error:
        resolve_target_modules(load(gpt2).model, name)
    assert str(error.value) == REFUSAL.format(name, "c_attn, c_fc, c_proj")


def test_only_invalid_targets_are_named(llama):
    with pytest.raises(ConfigError) as error:
        resolve_target_modules(load(llama).model, "q_proj, lm_head,wte ,v_proj")
    names = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert str(error.value) == REFUSAL.format("lm_head, wte", names)


# Families


ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
LLAMA_NAMES = [*ATTENTION, "down_proj", "gate_proj", "up_proj"]
LATENT = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]
EXPERTS = ["down_proj", "gate_up_proj"]


@pytest.mark.parametrize(
    ("family", "expected", "not_adapted"),
    [
        ("mamba", ["in_proj", "x_proj"], "out_proj (28%, not supported by PEFT in mamba)"),
        ("mamba2", ["in_proj"], "out_proj (29%, not supported by PEFT in mamba2)"),
        ("falcon_h1", [*LLAMA_NAMES, "in_proj"], "out_proj (9%, not supported by PEFT in falcon_h1)"),
        ("gemma3", LLAMA_NAMES, "vision_tower (never run on text)"),
        ("bart", ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"], "encoder_attn (never run on text)"),
        ("mixtral", [*ATTENTION, *EXPERTS], "router (under 1%, chooses the experts)"),
        ("qwen2_moe", [*LLAMA_NAMES, "gate_up_proj"], "router, shared_expert_gate (1%, chooses the experts)"),
        ("llama4_text", [*LLAMA_NAMES, "gate_up_proj"], "router (under 1%, takes or gives more than one tensor)"),
        (
            "deepseek_v3",
            [*LATENT, *EXPERTS],
            "down_proj, gate_proj, up_proj (33%, not supported by PEFT in deepseek_v3)",
        ),
    ],
)
def test_auto_takes_what_can_be_adapted(family, expected, not_adapted):
    targets = resolve_target_modules(make_family(family), "auto")
    assert {name.rpartition(".")[2] for name in targets.modules} == set(expected)
    assert not_adapted in targets.not_adapted
    assert not any("vision" in name or "encoder_attn" in name for name in targets.modules)


def test_everything_adapted_leaves_nothing_named():
    for group in ("auto", "all-linear"):
        targets = resolve_target_modules(make_family("qwen3"), group)
        assert (targets.coverage, targets.not_adapted, targets.warning) == (1.0, [], None)


@pytest.mark.parametrize(
    ("family", "setting", "warning"),
    [
        ("llama", "q_proj", "a new adapter with --target-modules auto covers 100%."),
        ("llama", "mlp.up_proj,mlp.down_proj", "a new adapter with --target-modules auto covers 100%."),
        ("gpt2", "c_attn", "a new adapter with --target-modules auto covers 100%."),
        ("mamba", "auto", None),
        ("gpt_neox", "dense", "a new adapter with --target-modules auto covers 100%."),
    ],
)
def test_under_half_of_weights_is_warned_about(family, setting, warning):
    targets = resolve_target_modules(make_family(family), setting)
    assert (targets.coverage < 0.5) == (warning is not None)
    start = "WARNING: less than half of the block weights are adapted: "
    assert targets.warning == (warning and start + warning)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0%"), (0.004, "under 1%"), (0.01, "1%"), (0.966, "97%"), (0.999, "99%"), (1, "100%")],
)
def test_coverage_is_rounded_between_none_and_all(share, text):
    assert describe_coverage(share, []) == f"{text} of the block weights"
    assert describe_coverage(share, ["a (2%)", "b"]) == f"{text} of the block weights; not: a (2%), b"


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("group", ["auto", "all-linear", "attention"])
def test_coverage_is_share_of_block_weights(family, group):
    model = make_family(family)
    targets = resolve_target_modules(model, group)
    blocks = {name: p for name, p in model.named_parameters() if p.dim() > 1 and ".layers." in name}
    covered = sum(p.numel() for name, p in blocks.items() if name.removesuffix(".weight") in targets.modules)
    assert targets.coverage == pytest.approx(covered / sum(p.numel() for p in blocks.values()))
    assert (targets.coverage < 0.5) == (group == "attention")
    experts = sum(p.numel() for name, p in blocks.items() if ".experts." in name and p.dim() == 3)
    assert experts > 0.2 * sum(p.numel() for p in blocks.values())
    kinds = [text.split(" (")[0].split(", ") for text in targets.not_adapted]
    assert any("experts" in names for names in kinds) == (group == "attention")


def test_routers_need_their_name_or_all_linear():
    model = make_family("qwen2_moe")
    gates = [f"model.layers.{block}.mlp.shared_expert_gate" for block in (0, 1)]
    assert resolve_target_modules(model, "shared_expert_gate").modules == gates
    assert set(gates) <= set(resolve_target_modules(model, "all-linear").modules)
    assert set(gates).isdisjoint(resolve_target_modules(model, "auto").modules)


def test_layers_as_wide_as_experts_are_adapted():
    """As in Qwen3-Next: 512 experts, keys and values of 512 numbers, shared experts of 512."""
    targets = resolve_target_modules(
        make_family("qwen2_moe", num_experts=16, shared_expert_intermediate_size=16), "auto"
    )
    assert {name.rpartition(".")[2] for name in targets.modules} == {*LLAMA_NAMES, "gate_up_proj"}
    assert len(targets.not_adapted) == 1
    assert targets.not_adapted[0].startswith("router, shared_expert_gate (")


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("mamba", "in_proj, out_proj", "out_proj cannot be adapted (not supported by PEFT in mamba)"),
        ("mamba", "conv1d", "conv1d cannot be adapted"),
        ("bart", "encoder_attn.q_proj", "encoder_attn.q_proj cannot be adapted (never run on text)"),
        ("gemma3", "fc1", "fc1 cannot be adapted (never run on text)"),
        ("llama4_text", "router", "router cannot be adapted (takes or gives more than one tensor)"),
        ("deepseek_v3", "gate_proj", "gate_proj cannot be adapted (not supported by PEFT in deepseek_v3)"),
        ("mixtral", "expert", "expert cannot be adapted"),
    ],
)
def test_unadaptable_target_is_refused(family, name, reason):
    with pytest.raises(ConfigError) as error:
        resolve_target_modules(make_family(family), name)
    assert str(error.value).startswith(
        f"target_modules: {reason}; choose auto, attention, all-linear, or any of "
    )


def test_name_shared_with_tower_means_text():
    model = make_family("gemma3")
    targets = resolve_target_modules(model, "q_proj")
    assert targets.modules == [f"model.language_model.layers.{block}.self_attn.q_proj" for block in (0, 1)]
    rest = "down_proj, gate_proj, k_proj, o_proj, up_proj, v_proj (87%)"
    assert targets.not_adapted == [rest, "vision_tower (never run on text)"]


def test_base_without_attention_is_refused():
    with pytest.raises(ConfigError) as error:
        resolve_target_modules(make_family("mamba"), "attention")
    assert str(error.value) == "This base has no layer named attention; its layers are in_proj, x_proj."


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "gemma3"])
def test_peft_adapts_exactly_chosen_layers(family, tmp_path):
    """PEFT's table for experts of transformers 4 changes no name of what is saved."""
    base = load(save_family(tmp_path / "base", family))
    model = lora.add_lora(base, TrainConfig(rank=2))
    tensors = {name: torch.randn_like(tensor) for name, tensor in lora.adapter_state_dict(model).items()}
    lora.save_adapter_files(tensors, model.peft_config["default"], tmp_path / "saved")
    model.unload()
    saved = load_adapter_folder(tmp_path / "saved")
    assert saved.modules == resolve_target_modules(base.model, "auto").modules
    parameters = ["experts.down_proj", "experts.gate_up_proj"] if saved.experts else None
    assert json.loads((saved.path / CONFIG_FILE).read_text())["target_parameters"] == parameters
    token_ids = torch.arange(20)[None]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), saved.path)
    ours = lora.load_lora(base.model, saved, "slot")
    torch.testing.assert_close(ours(token_ids).logits, plain.eval()(token_ids).logits, atol=1e-4, rtol=0)


def test_adapter_that_peft_redirects_is_refused(tmp_path):
    """Of a dense layer in DeepSeek-V3, which PEFT takes for an expert."""
    folder = save_family(tmp_path / "base", "deepseek_v3")
    model = lora.add_lora(load(folder), TrainConfig(rank=2, target_modules="o_proj"))
    layer = "base_model.model.model.layers.0.mlp.down_proj"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 48), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    config = model.peft_config["default"]
    config.target_modules = {"down_proj"}
    lora.save_adapter_files(tensors, config, tmp_path / "saved")
    base = load(folder)
    before = [name for name, _ in base.model.named_modules()]
    with pytest.raises(AdapterError, match="does not fit the base as PEFT reads it: it adapts other layers"):
        lora.load_lora(base.model, load_adapter_folder(tmp_path / "saved"), "slot")
    assert [name for name, _ in base.model.named_modules()] == before


def test_train_says_what_is_not_adapted(tmp_path, settings):
    notices = []
    folder = save_family(tmp_path / "mixtral", "mixtral")
    adapter = train(
        settings(base=str(folder), max_steps=1, max_length=32),
        lambda event: notices.append(getattr(event, "text", "")),
    )
    rest = ["router (under 1%, chooses the experts)"]
    text = f"99% of the block weights; not: {rest[0]}"
    assert f"LoRA is added to 12 layers: the adapter covers {text}." in notices
    assert adapter.manifest.run.coverage == pytest.approx((3072 + 18432) / 21632)
    assert adapter.manifest.run.not_adapted == rest
    assert f"| Coverage | {text} |" in (adapter.path / CARD_FILE).read_text()


def test_checkpoint_with_other_layers_is_refused(tmp_path, settings, stop_at, monkeypatch):
    """An earlier version adapted routers too."""
    config = settings(base=str(save_family(tmp_path / "base", "qwen2_moe")), max_length=32, max_steps=1)
    with monkeypatch.context() as earlier, stop_at(1):
        earlier.setattr("lora_tuner.models.targets._routers", lambda *_: set())
        train(config)
    with pytest.raises(TrainingError) as error:
        resume("reviews")
    assert str(error.value) == (
        "runs/reviews/checkpoint-1 adapts other layers than this version does for target_modules auto: train again with "
        "--overwrite."
    )


def test_manifest_without_coverage_is_read(adapter):
    fields = json.loads(adapter.manifest.to_json())
    del fields["run"]["coverage"], fields["run"]["not_adapted"]
    assert Manifest.model_validate(fields).run.coverage is None


def test_layers_that_peft_renames_are_left_out():
    """PEFT looks for the weights of `shared_experts` as those of `shared_experts.`, without an error."""
    found = resolve_target_modules(make_family("laguna"), "auto")
    assert not [name for name in found.modules if "shared_experts" in name]
    assert any(name.endswith("layers.0.mlp.down_proj") for name in found.modules)
    assert any("not loaded again by PEFT in laguna" in text for text in found.not_adapted)
