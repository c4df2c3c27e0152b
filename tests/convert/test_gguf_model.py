"""Whole models as GGUF, and adapters over them: llama.cpp computes what transformers computes."""

import json
import shutil

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lora_tuner.adapters.adapter import load_adapter_folder
from lora_tuner.adapters.llama_cpp import ARCHITECTURES
from lora_tuner.convert.export_gguf import to_gguf
from lora_tuner.convert.gguf_model import write_model_gguf
from lora_tuner.errors import BaseModelError, ConfigError

from .. import gguf_base, gguf_models, tiny_models
from ..parameters import sampled

PROMPT, TOKENS = [5, 77, 200, 31, 9, 120, 300, 44, 260, 7, 19, 88, 140, 222, 33], 20
TOLERANCE = 3e-3  # of log-probabilities: llama.cpp looks GELU up in a table in float16
STEP = 10  # of these cases one is quick


def write(folder, out, dtype="float32"):
    """The notices of writing a folder as GGUF."""
    notices = []
    write_model_gguf(folder, out, dtype, notify=lambda notice: notices.append(notice.text))
    return notices


def assert_same_greedy_ids(model, llama, printable):
    """All log-probabilities agree, and each id is the likeliest, up to near ties."""
    ids, top = llama.greedy_ids(PROMPT, TOKENS, printable)
    assert len(ids) == TOKENS
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1].double()
    expected = torch.log_softmax(logits, -1)
    assert (expected - torch.tensor(top)).abs().max() < TOLERANCE
    allowed = expected[:, printable]
    assert (allowed.max(-1).values - expected[range(TOKENS), ids] < TOLERANCE).all()
    return expected


@pytest.mark.parametrize("name", sampled(gguf_models.MODELS, STEP))
def test_gguf_model_and_adapter_match_transformers(tmp_path, name):
    pytest.importorskip("xllamacpp")
    folder = gguf_models.save(tmp_path / "base", name)
    notices = write(folder, tmp_path / "base.gguf")
    assert ("sliding window" in "".join(notices)) == (name == "mistral with a window")
    printable = gguf_base.printable_ids()
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    without = assert_same_greedy_ids(plain, gguf_base.LlamaCpp(tmp_path / "base.gguf"), printable)
    adapter = load_adapter_folder(gguf_base.adapt(folder, tmp_path / "adapter"))
    exported = to_gguf(adapter, tmp_path / "adapter.gguf", dtype="float32")
    assert exported.tensors == len(adapter.tensors)
    adapted = PeftModel.from_pretrained(plain, adapter.path)
    with_adapter = assert_same_greedy_ids(
        adapted, gguf_base.LlamaCpp(tmp_path / "base.gguf", exported.path), printable
    )
    assert (with_adapter[0] - without[0]).abs().max() > 10 * TOLERANCE


def test_each_exported_architecture_is_proven():
    proven = {model_type for model_type, _ in gguf_models.MODELS.values()}
    assert proven == ARCHITECTURES.keys() - {"gemma3"}  # the text model of that one is gemma3_text


# What llama.cpp would compute otherwise, without an error: model, settings, the reason.
REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "llama.cpp's llama does not compute hidden_act = gelu"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
        "of the type dynamic",
    ),
    (
        "qwen2",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, **gguf_models.LLAMA3}},
        "rotary positions of the type llama3",
    ),
    ("phi3", {"head_dim": 16}, "head_dim = 16 with 4 heads and hidden_size = 32"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("qwen3", {"attention_bias": True}, "attention_bias = True"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping = None"),
    ("gemma2", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar = 8, only 16"),
    ("gemma2", {"num_hidden_layers": 46}, "query_pre_attn_scalar = 16, only 8"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    (
        "gemma3",
        {"num_hidden_layers": 4, "layer_types": ["full_attention", *["sliding_attention"] * 3]},
        "layer_types = full_attention, sliding_attention",
    ),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1]}, "no_rope_layers = [1, 0, 1, 1, 1]"),
    ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings = True"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm = True"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "connection_post_layernorm = True"),
    ("falcon", {"alibi": True}, "alibi = True"),
    ("falcon", {"parallel_attn": False}, "parallel_attn = False"),
    ("gpt_neox", {"hidden_act": "relu"}, "hidden_act = relu"),
]


@pytest.mark.parametrize(("name", "changes", "reason"), REFUSED)
def test_settings_unknown_to_llama_cpp_are_refused(tmp_path, name, changes, reason):
    """Of a config alone; the weights are not read."""
    model_type, settings = gguf_models.MODELS[name]
    config = AutoConfig.for_model(model_type, **settings | changes)
    config.save_pretrained(tmp_path)
    with pytest.raises(BaseModelError) as error:
        write(tmp_path, tmp_path / "base.gguf")
    assert str(error.value).startswith(f"{tmp_path} cannot be written as GGUF: llama.cpp's ")
    assert reason in str(error.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return gguf_models.save(tmp_path_factory.mktemp("models") / "llama", "llama")


def change_config(folder, **settings):
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))


def test_other_models_and_tensors_are_refused(llama_folder, tmp_path):
    folder, out = shutil.copytree(llama_folder, tmp_path / "base"), tmp_path / "base.gguf"
    with pytest.raises(ConfigError, match="dtype is q4_0: use one of float32, float16, bfloat16"):
        write(folder, out, "q4_0")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.extra.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"llama\.cpp has no place for model\.layers\.0\.mlp\.extra\.weight"):
        write(folder, out)
    head = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"its weights have no lm_head, which config\.json does not tie"):
        write(folder, out)
    save_file(tensors | {"lm_head.weight": head * 1e6}, folder / "model.safetensors")
    with pytest.raises(
        BaseModelError, match=r"output\.weight has values out of the range of float16: use bfloat16 or float32"
    ):
        write(folder, out, "float16")
    change_config(folder, model_type="opt")
    with pytest.raises(
        BaseModelError, match=f"opt models are not exported, only those of {', '.join(ARCHITECTURES)}"
    ):
        write(folder, out)
    assert not out.exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gguf_matrices_have_the_dtype(llama_folder, tmp_path, dtype):
    write(llama_folder, tmp_path / "base.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "base.gguf")
    types = {(len(tensor.shape), tensor.tensor_type.name) for tensor in reader.tensors}
    assert types == {(1, "F32"), (2, "F16" if dtype == "float16" else "BF16")}
    stored = next(tensor for tensor in reader.tensors if tensor.name == "output.weight")
    expected = load_file(llama_folder / "model.safetensors")["lm_head.weight"].to(getattr(torch, dtype)).float()
    assert (gguf.quants.dequantize(stored.data, stored.tensor_type) == expected.numpy()).all()


def test_gguf_names_all_end_tokens(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "base")
    tokenizer = tiny_models.tokenizer()
    ends = ["!", "?", "9"]
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    tokenizer.save_pretrained(folder)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ends]
    for generation_ends, notices in (
        ([ids[1], 0], []),
        ([0, *ids[1:]], ["A GGUF file names three end tokens; llama.cpp may not stop at 9."]),
    ):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_ends}))
        assert write(folder, tmp_path / "base.gguf") == notices
        fields = gguf.GGUFReader(tmp_path / "base.gguf").fields
        ends = [fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("eos", "eot", "eom")]
        assert ends == [0, *ids[:2]]
        assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    write(llama_folder, tmp_path / "base.gguf")
    assert "tokenizer.ggml.eot_token_id" not in gguf.GGUFReader(tmp_path / "base.gguf").fields


def test_failed_gguf_keeps_the_old_file(llama_folder, tmp_path, monkeypatch):
    out = tmp_path / "base.gguf"
    out.write_bytes(b"GGUF old")
    monkeypatch.setattr(gguf.GGUFWriter, "close", lambda self: self.fout[0].truncate(1000))
    with pytest.raises(BaseModelError, match="is not kept: the file is incomplete on disk"):
        write(llama_folder, out)
    assert (out.read_bytes(), list(tmp_path.iterdir())) == (b"GGUF old", [out])


def assert_same_content(path, other):
    fields = [
        {name: field.contents() for name, field in gguf.GGUFReader(each).fields.items() if name != "general.name"}
        for each in (path, other)
    ]
    assert fields[0] == fields[1]
    tensors = [{tensor.name: tensor.data for tensor in gguf.GGUFReader(each).tensors} for each in (path, other)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all((tensors[0][name] == tensors[1][name]).all() for name in tensors[0])


def rename_tensors(folder, rename, extra):
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()} | extra, folder / "model.safetensors")


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_gguf_of_text_and_images_has_the_text(tmp_path, prefix):
    """The text model of Gemma 3, under the names that its weights have in the model of both."""
    folder = gguf_models.save(tmp_path / "text", "gemma3")
    both = shutil.copytree(folder, tmp_path / "both")
    vision = {"vision_tower.embeddings.weight": torch.ones(2, 2), "multi_modal_projector.weight": torch.ones(2)}
    if prefix.startswith("model."):
        vision = {f"model.{name}": tensor for name, tensor in vision.items()}
    rename_tensors(both, lambda name: name.replace("model.", prefix), vision)
    text = json.loads((folder / "config.json").read_text())
    settings = {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": True}
    (both / "config.json").write_text(json.dumps(settings))
    assert write(folder, tmp_path / "text.gguf") == []
    told = ["The file has the text model alone, without the parts for images."]
    assert write(both, tmp_path / "both.gguf") == told
    assert_same_content(tmp_path / "text.gguf", tmp_path / "both.gguf")


def test_gguf_reads_names_of_old_checkpoints(tmp_path):
    """GPT-2 without a prefix, with the masks that old versions of transformers saved."""
    folder = gguf_models.save(tmp_path / "new", "gpt2")
    old = shutil.copytree(folder, tmp_path / "old")
    masks = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    rename_tensors(old, lambda name: name.removeprefix("transformer."), masks)
    for each in (folder, old):
        write(each, tmp_path / f"{each.name}.gguf")
    assert_same_content(tmp_path / "new.gguf", tmp_path / "old.gguf")


def test_adapter_of_text_part_exports_like_text_model(tmp_path):
    """The config.json of the base leaves out what transformers has as defaults, as those of Gemma 3 do."""
    folder = gguf_models.save(
        tmp_path / "text", "gemma3", head_dim=256, num_attention_heads=8, num_key_value_heads=4
    )
    adapter = load_adapter_folder(gguf_base.adapt(folder, tmp_path / "adapters" / "text"))
    both = shutil.copytree(folder, tmp_path / "both")
    rename_tensors(both, lambda name: name.replace("model.", "model.language_model."), {})
    text = json.loads((folder / "config.json").read_text())
    for name in ("head_dim", "num_attention_heads", "num_key_value_heads"):
        del text[name]
    (both / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    part = shutil.copytree(adapter.path, tmp_path / "adapters" / "part")
    tensors = load_file(part / "adapter_model.safetensors")
    save_file(
        {
            name.replace(".model.layers", ".model.language_model.layers"): tensor
            for name, tensor in tensors.items()
        },
        part / "adapter_model.safetensors",
    )
    settings = json.loads((part / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(both)}
    (part / "adapter_config.json").write_text(json.dumps(settings))
    files = [
        to_gguf(load_adapter_folder(tmp_path / "adapters" / name), tmp_path / f"{name}.gguf").path
        for name in ("text", "part")
    ]
    assert_same_content(*files)
