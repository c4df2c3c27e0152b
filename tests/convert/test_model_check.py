"""`adapters check` says before an export all that the export refuses, in the same words."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from lora_tuner import ModelOptions, export_model, export_ollama
from lora_tuner.adapters import llama_cpp
from lora_tuner.adapters.adapter import load_adapter_folder
from lora_tuner.adapters.compatibility import check_compatibility
from lora_tuner.adapters.compatibility_gguf import find_model_problems
from lora_tuner.convert.export_gguf import to_gguf
from lora_tuner.convert.export_mlx import to_mlx
from lora_tuner.convert.export_vllm import to_vllm
from lora_tuner.convert.model_check import check_export
from lora_tuner.errors import AdapterError, LoraTunerError

from .. import adapter_files
from ..adapter_files import on_base
from ..adapters.test_compatibility import GPT2, LLAMA, MERGE, QUERY
from ..cli.test_commands import run

EXPERTS = {"model.layers.0.mlp.experts": (32, 48)}
DOWN = {"target_parameters": ["experts.down_proj"]}
LLAMA_BASE = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
GEMMA = LLAMA_BASE | {"model_type": "gemma2"}
# Name -> layers, settings of the adapter, config.json of its base.
KINDS = {
    "plain": (LLAMA, {}, LLAMA_BASE),
    "rsLoRA, patterns": (LLAMA, {"use_rslora": True, "rank_pattern": dict.fromkeys(QUERY, 2)}, LLAMA_BASE),
    "DoRA": (LLAMA, {"use_dora": True}, LLAMA_BASE),
    "head": (QUERY | {"lm_head": (32, 320)}, {}, LLAMA_BASE),
    "GPT-2": (GPT2, {}, {"model_type": "gpt2"}),
    "other layers": (GPT2, {}, LLAMA_BASE),
    "trained head": (QUERY, {"modules_to_save": ["lm_head"]}, GEMMA),
    "experts": (EXPERTS, DOWN, {"model_type": "granitemoe"}),
    "experts, turned": (EXPERTS, DOWN, {"model_type": "mixtral", "hidden_size": 32}),
    "attention of a mixture": (QUERY, {}, {"model_type": "mixtral"}),
    "unknown type": (LLAMA, {}, {"model_type": "opt"}),
    "wrapper": (LLAMA, {}, {"model_type": "gemma3", "text_config": {"hidden_size": 32}}),
    "DoRA on a wrapper": (LLAMA, {"use_dora": True}, {"model_type": "qwen3_5", "text_config": {}}),
    "quantized base": (LLAMA, {}, LLAMA_BASE | {"quantization_config": {"quant_method": "bitsandbytes"}}),
    "activation": (LLAMA, {}, LLAMA_BASE | {"hidden_act": "gelu"}),
    "old rope": (LLAMA, {}, LLAMA_BASE | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "scale of attention": (LLAMA, {}, GEMMA | {"query_pre_attn_scalar": 99}),
}
EXPORTS = {
    "gguf": to_gguf,
    "gguf-merged": export_model,
    "ollama": export_ollama,
    "mlx": to_mlx,
    "vllm": to_vllm,
}


def make(tmp_path, kind):
    modules, settings, base = KINDS[kind]
    adapter = adapter_files.write_random(tmp_path / "adapters" / "mine", tmp_path, modules, **settings)
    if "modules_to_save" in settings:
        tensors = {
            name: value.numpy() for name, value in load_file(adapter.path / "adapter_model.safetensors").items()
        }
        tensors["base_model.model.lm_head.weight"] = np.zeros((320, 32), np.float32)
        adapter_files.write(adapter.path, adapter.config, tensors)
    return on_base(load_adapter_folder(adapter.path), tmp_path / "base", **base)


@pytest.mark.parametrize("kind", KINDS)
def test_check_says_what_export_refuses(tmp_path, kind):
    adapter = make(tmp_path, kind)
    for tool, export in EXPORTS.items():
        errors = check_export(adapter, tool).errors
        if tool == "vllm":  # what only hides from vLLM is what this export is for
            errors = [error for error in errors if "--to vllm" not in error]
        with pytest.raises(LoraTunerError) as error:  # the base has no weights
            export(adapter, tmp_path / "out")
        assert (str(error.value) == f"{adapter.path}: {'; '.join(errors)}.") == bool(errors)
        assert not (tmp_path / "out").exists()


ELSEWHERE = f": {MERGE}, for llama.cpp's own script or other tools"
UNTIED = "llama.cpp's gemma2 does not compute tie_word_embeddings = False" + ELSEWHERE
TRAINED = f"does not load what replaces weights of the base (whole lm_head): {MERGE}"
TYPES = ", ".join(llama_cpp.ARCHITECTURES)
REASONS = [
    ("trained head", "gguf-merged", UNTIED),
    ("trained head", "gguf", f"llama.cpp {TRAINED}"),
    ("trained head", "mlx", f"mlx-lm {TRAINED}"),
    ("experts", "mlx", f"mlx-lm's granitemoe has no layer for model.layers.0.mlp.experts.down_proj: {MERGE}"),
    (
        "experts, turned",
        "mlx",
        "A and B of model.layers.0.mlp.experts.down_proj are for weights with sides in the other order, as older "
        f"versions of PEFT have them: {MERGE}",
    ),
    ("unknown type", "ollama", f"opt models are not exported, only those of {TYPES}{ELSEWHERE}"),
    ("activation", "ollama", f"llama.cpp's llama does not compute hidden_act = gelu{ELSEWHERE}"),
    (
        "old rope",
        "gguf-merged",
        f"llama.cpp's llama does not compute rotary positions of the type dynamic{ELSEWHERE}",
    ),
    (
        "scale of attention",
        "gguf-merged",
        f"llama.cpp's gemma2 does not compute query_pre_attn_scalar = 99, only 256{ELSEWHERE}",
    ),
]


@pytest.mark.parametrize(("kind", "tool", "reason"), REASONS)
def test_check_gives_reason_of_tool(tmp_path, kind, tool, reason):
    assert check_export(make(tmp_path, kind), tool).errors == [reason]


@pytest.mark.parametrize("same", [True, False])
def test_check_knows_which_copies_untie(tmp_path, same):
    """Copies of head and embeddings that PEFT has trained; Gemma's are tied."""
    adapter = make(tmp_path, "trained head")
    tensors = {
        name: value.numpy() for name, value in load_file(adapter.path / "adapter_model.safetensors").items()
    }
    head = tensors["base_model.model.lm_head.weight"]
    tensors["base_model.model.model.embed_tokens.weight"] = head if same else head + 1
    adapter_files.write(adapter.path, adapter.config | {"modules_to_save": ["lm_head", "embed_tokens"]}, tensors)
    errors = check_compatibility(load_adapter_folder(adapter.path), "gguf-merged").errors
    assert errors == ([] if same else [UNTIED])


def test_merged_check_accepts_what_merging_takes(tmp_path):
    for number, kind in enumerate(("DoRA", "head", "other layers", "quantized base", "rsLoRA, patterns")):
        report = check_compatibility(make(tmp_path / str(number), kind), "ollama")
        assert report.accepted
        assert any("not with --no-merged" in note for note in report.notes) == (number < 4)


@pytest.mark.parametrize("kind", llama_cpp.ARCHITECTURES)
def test_default_settings_are_computed(kind):
    """A config.json may leave them out, so the check does not see them."""
    settings = AutoConfig.for_model(kind).get_text_config().to_dict()
    assert llama_cpp.model_problems(llama_cpp.ARCHITECTURES[kind], settings) == []
    assert find_model_problems({"model_type": kind}, {}) == []
    assert find_model_problems({"model_type": kind, "hidden_size": 640, "num_attention_heads": 4}, {}) == []


@pytest.fixture
def chat_adapter(tmp_path, llama):
    """Make an adapter on a base with another chat template or tokenizer."""

    def written(template=None, change=None):
        base = shutil.copytree(llama, tmp_path / "base", dirs_exist_ok=True)
        if template is not None:
            tokenizer = AutoTokenizer.from_pretrained(base)
            tokenizer.chat_template = template
            tokenizer.save_pretrained(base)
        if change is not None:
            spec = json.loads((base / "tokenizer.json").read_text())
            (base / "tokenizer.json").write_text(json.dumps(spec | change))
        return adapter_files.write_random(tmp_path / "adapters" / "mine", base, LLAMA)

    return written


LAST_ONLY = "{{ messages[-1].role }}: {{ messages[-1].content }}"


@pytest.mark.parametrize(
    ("settings", "tools", "reason"),
    [
        (
            {"template": LAST_ONLY},
            ("ollama",),
            "The chat template of mine cannot be written as a template for Ollama: it leaves out",
        ),
        (
            {"change": {"normalizer": {"type": "Lowercase"}}},
            ("gguf-merged", "ollama"),
            "llama.cpp does not normalize text as its tokenizer does (Lowercase)",
        ),
    ],
)
def test_check_reads_tokenizer_and_template(chat_adapter, tmp_path, settings, tools, reason):
    pytest.importorskip("xllamacpp")
    adapter = chat_adapter(**settings)
    for tool in ("gguf-merged", "ollama"):
        report = check_export(adapter, tool)
        assert len(report.errors) == (tool in tools)
        if tool in tools:
            assert reason in report.errors[0]
            with pytest.raises(AdapterError) as error:
                EXPORTS[tool](adapter, tmp_path / "out", sets=[], options=ModelOptions())
            assert str(error.value) == f"{adapter.path}: {report.errors[0]}."


def test_check_without_tokenizer_says_so(chat_adapter):
    adapter = chat_adapter()
    (notes,) = ([note for note in check_export(adapter, "ollama").notes if "tokenizer" in note],)
    assert notes == []
    (tmp := adapter.path.parent.parent / "base" / "tokenizer.json").unlink()
    report = check_export(adapter, "ollama")
    assert report.accepted
    assert any("cannot be read without the model, so it was not checked" in note for note in report.notes), tmp


def test_check_of_own_template(chat_adapter):
    adapter = chat_adapter()
    (adapter.path / "chat_template.jinja").write_text(LAST_ONLY)
    assert "cannot be written as a template for Ollama" in check_export(adapter, "ollama").errors[0]
    assert check_export(adapter, "gguf-merged").accepted


def test_check_command_knows_all_targets(chat_adapter, monkeypatch):
    chat_adapter()
    for tool in ("gguf", "gguf-merged", "ollama", "mlx", "llama.cpp", "vllm", "peft"):
        assert run("adapters", "check", "mine", "--for", tool).stdout.startswith(
            f"mine: compatible with {tool}\n"
        )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    note = "- the export needs llama.cpp's library: pip install 'lora_tuner[gguf]' or xllamacpp\n"
    assert note in run("adapters", "check", "mine", "--for", "gguf-merged").stdout


@pytest.mark.slow  # a process of its own
def test_whole_model_check_loads_no_torch(chat_adapter):
    path = chat_adapter(template="{{ messages[-1].content }}").path
    code = (
        "import sys; from pathlib import Path; from lora_tuner.adapters.adapter import load_adapter_folder; "
        "from lora_tuner.convert.model_check import check_export; "
        f"report = check_export(load_adapter_folder(Path({str(path)!r})), 'ollama'); "
        "assert report.errors and 'torch' not in sys.modules, report"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
