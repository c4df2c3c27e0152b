"""Checkpoints of a text model in a multimodal wrapper: the text model trains, under the wrapper's names."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from lora_tuner import Library, ModelOptions, merge, train
from lora_tuner.adapters.compatibility import check_compatibility
from lora_tuner.convert.adopt import adopt
from lora_tuner.convert.export_vllm import to_vllm
from lora_tuner.errors import AdapterError
from lora_tuner.models import lora
from lora_tuner.models.layers_in_files import coverage_in_folder
from lora_tuner.models.loading import load_base, open_base
from lora_tuner.models.resolve import find_base
from lora_tuner.models.targets import resolve_target_modules

from .. import tiny_models
from ..tiny_models import CONTEXT

_IDS = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_TEXT = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "head_dim": 8,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
_MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
WRAPPERS = {
    "gemma3": {"text_config": {**_TEXT, "sliding_window": 16}, "vision_config": _VISION, "mm_tokens_per_image": 1},
    "gemma4": {
        "text_config": {
            **_TEXT,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "sliding_window": 16,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 320,
        },
        "vision_config": {**_VISION, "head_dim": 8, "num_key_value_heads": 2},
        "audio_config": None,
    },
    "qwen3_5": {
        "text_config": {
            **_TEXT,
            "num_hidden_layers": 4,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0},
        },
        "vision_config": _QWEN_VISION,
    },
    "qwen2_5_vl": {"text_config": {**_TEXT, "rope_parameters": _MROPE}, "vision_config": {**_QWEN_VISION, "window_size": 8}},
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
    "mistral3": {"text_config": {"model_type": "mistral", **_TEXT}, "vision_config": {"model_type": "pixtral", **_VISION}},
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", **_VISION, "projection_dim": 16},
    },
    "llama4": {
        "text_config": {
            **_TEXT,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
        },
        "vision_config": {**_VISION, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16},
    },
    "idefics3": {"text_config": {"model_type": "llama", **_TEXT}, "vision_config": _VISION},
}  # fmt: skip


@pytest.fixture(scope="session")
def wrapper(tmp_path_factory):
    """Model type -> folder of a tiny random wrapper."""
    root = tmp_path_factory.mktemp("wrappers")

    def make(kind):
        folder = root / kind
        if not folder.exists():
            torch.manual_seed(0)
            model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(kind, **WRAPPERS[kind]))
            tiny_models.save(model, folder)
        return folder

    return make


IDS = torch.arange(1, 40)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    "kind", [kind if kind == "qwen3_5" else pytest.param(kind, marks=pytest.mark.slow) for kind in WRAPPERS]
)
def test_adapter_of_wrapper_loads_in_peft(wrapper, settings, kind):
    folder = wrapper(kind)
    adapter = train(settings(base=str(folder), max_steps=2, learning_rate=0.1))
    base = load_base(find_base(str(folder)), ModelOptions(device="cpu"))
    plain = logits(base.model)
    expected = logits(lora.load_lora(base.model, adapter, "one"))
    assert (expected - plain).abs().max() > 0.01
    whole = PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(folder), adapter.path)
    torch.testing.assert_close(logits(whole), expected, atol=1e-4, rtol=0)
    assert not [module for module in adapter.modules if "vision" in module or "visual" in module]
    assert any("never run on text" in part for part in adapter.manifest.run.not_adapted)
    errors = check_compatibility(adapter, "vllm").errors
    assert errors == [] or (kind == "llama4" and "experts" in errors[0])
    (note,) = check_compatibility(adapter, "peft").notes
    assert note == (
        "its layers are named as in the whole model: load the base with AutoModelForMultimodalLM. On that of "
        "AutoModelForCausalLM, where it is another, PEFT would apply nothing, without an error"
    )
    assert "AutoModelForMultimodalLM.from_pretrained" in (adapter.path / "README.md").read_text()


@pytest.mark.parametrize("kind", ["qwen3_5", pytest.param("llama4", marks=pytest.mark.slow)])
def test_adapter_of_text_model_is_renamed_for_vllm(wrapper, tmp_path, kind):
    """One of another tool, trained on what AutoModelForCausalLM loads."""
    folder = wrapper(kind)
    text_model = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trained = get_peft_model(text_model, config)
    trained.peft_config["default"].base_model_name_or_path = str(folder)
    trained.save_pretrained(tmp_path / "adapters" / "other")
    adapter = Library().get("other")
    base = open_base(adapter, ModelOptions(device="cpu"))
    assert type(base.model) is type(trained.get_base_model())
    loaded = lora.load_lora(base.model, adapter, "one")
    torch.testing.assert_close(logits(loaded), logits(trained), atol=1e-4, rtol=0)
    (note,) = check_compatibility(adapter, "peft").notes
    assert note.startswith(
        "its layers are named as in the text model alone: load the base with AutoModelForCausalLM."
    )
    (error,) = check_compatibility(adapter, "vllm").errors
    assert error.startswith(
        f"vLLM mounts the text model of {kind} under language_model, so it would load model.layers."
    )
    whole = load_base(find_base(str(folder)), ModelOptions(device="cpu"))
    with pytest.raises(
        AdapterError, match=r"`python cli\.py export NAME --to vllm`, and use the result"
    ) as refusal:
        lora.load_lora(whole.model, adapter, "one")
    assert f"has no linear layer {adapter.modules[0]} (here it is " in str(refusal.value)
    to_vllm(adapter, tmp_path / "adapters" / "renamed", options=ModelOptions(base=str(folder)))
    renamed = lora.load_lora(whole.model, Library().get("renamed"), "one")
    torch.testing.assert_close(logits(renamed), logits(trained), atol=1e-4, rtol=0)
    assert check_compatibility(Library().get("renamed"), "vllm").errors == []
    with pytest.raises(
        AdapterError, match=r"^renamed has the names that vLLM expects on .*: give it as it is\.$"
    ):
        to_vllm(Library().get("renamed"), tmp_path / "again")
    (adapter.path / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(AdapterError, match="other is damaged"):
        to_vllm(adapter, tmp_path / "damaged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters"]


@pytest.mark.parametrize("kind", ["gemma3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in WRAPPERS)])
def test_adapter_on_wrapper_is_adopted(wrapper, tmp_path, kind):
    """Files name the layers of some wrappers otherwise than the model in memory."""
    base = load_base(find_base(str(wrapper(kind))), ModelOptions(device="cpu"))
    targets = resolve_target_modules(base.model, "q_proj,v_proj")
    model = get_peft_model(base.model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets.linear))
    model.save_pretrained(tmp_path / "other", save_embedding_layers=False)
    adapter = adopt(Library(), tmp_path / "other", base=str(wrapper(kind)))
    assert adapter.modules == targets.modules
    assert coverage_in_folder(wrapper(kind), adapter) == pytest.approx(targets.coverage, abs=0.01)


def test_merged_wrapper_keeps_its_processor(wrapper, settings, tmp_path):
    folder = shutil.copytree(wrapper("qwen3_5"), tmp_path / "base")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    adapter = train(settings(base=str(folder), max_steps=1))
    merge(adapter, tmp_path / "merged")
    name = "preprocessor_config.json"
    assert (tmp_path / "merged" / name).read_text() == (folder / name).read_text()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "qwen3_5"
