"""Export to mlx-lm: by shapes against its documented layout, and slowly in mlx-lm itself.

The slow tests need mlx and mlx-lm, which run on a CPU under Linux (`pip install mlx[cpu] mlx-lm`,
checked with 0.32); they are skipped without.
"""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer

from lora_tuner import ModelOptions
from lora_tuner.adapters import mlx_lm
from lora_tuner.adapters.adapter import WEIGHTS_FILE, load_adapter_folder
from lora_tuner.adapters.compatibility import check_compatibility
from lora_tuner.convert import export_mlx
from lora_tuner.convert.export_mlx import to_mlx
from lora_tuner.errors import AdapterError

from .. import adapter_files, gguf_models, model_families, tiny_models
from ..adapter_files import on_base
from ..adapters.test_compatibility import GPT2, LLAMA, MERGE, QUERY
from ..cli.test_commands import run
from ..models.test_wrappers import WRAPPERS

MIDDLE = {
    f"model.layers.0.{name}": LLAMA[f"model.layers.0.{name}"] for name in ("self_attn.q_proj", "mlp.up_proj")
}


@pytest.fixture
def write(tmp_path, llama, gpt2):
    """Write an adapter with random weights for a tiny base into the library."""

    def written(modules=LLAMA, **config):
        base = gpt2 if modules is GPT2 else llama
        return adapter_files.write_random(
            tmp_path / "adapters" / "mine", config.pop("base", base), modules, **config
        )

    return written


def exported(adapter, tmp_path, **options):
    out = to_mlx(adapter, tmp_path / "mlx", options=ModelOptions(**options)).path
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    return json.loads((out / "adapter_config.json").read_text()), load_file(out / "adapters.safetensors")


def test_mlx_folder_has_documented_layout(write, tmp_path):
    adapter = write(use_rslora=True, lora_dropout=0.1)
    config, tensors = exported(adapter, tmp_path)
    assert config == {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {
            "rank": 4,
            "scale": 8 / 2,
            "dropout": 0.1,
            "keys": ["mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj"],
        },
    }
    original = load_file(adapter.path / WEIGHTS_FILE)
    assert len(tensors) == len(original) == 12
    for module, (size_in, size_out) in LLAMA.items():
        lora_a, lora_b = (tensors[f"{module}.lora_{part}"] for part in "ab")
        assert (lora_a.shape, lora_b.shape) == ((size_in, 4), (4, size_out))
        assert torch.equal(lora_a.T, original[f"base_model.model.{module}.lora_A.weight"])
        assert torch.equal(lora_b.T, original[f"base_model.model.{module}.lora_B.weight"])


def test_mlx_names_of_gpt2_are_mlxs(write, tmp_path):
    config, tensors = exported(write(GPT2, fan_in_fan_out=True), tmp_path)
    assert sorted(tensors) == [
        f"model.h.{layer}.lora_{part}" for layer in ("0.attn.c_attn", "1.mlp.c_proj") for part in "ab"
    ]
    assert tensors["model.h.1.mlp.c_proj.lora_a"].shape == (128, 4)
    assert config["lora_parameters"]["keys"] == ["model.h.0.attn.c_attn", "model.h.1.mlp.c_proj"]


def test_mlx_last_blocks_are_counted(write, tmp_path):
    last = {module.replace("layers.0", "layers.1"): size for module, size in MIDDLE.items()}
    config, _ = exported(write(last), tmp_path)
    assert config["num_layers"] == 1
    assert config["lora_parameters"]["keys"] == ["mlp.up_proj", "self_attn.q_proj"]


def test_mlx_other_blocks_have_full_names(write, tmp_path):
    config, _ = exported(write(MIDDLE, layers_to_transform=[0]), tmp_path)
    assert config["num_layers"] == 2
    assert config["lora_parameters"]["keys"] == sorted(MIDDLE)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_mlx_experts_are_divided(write, tmp_path, kind):
    """Of four experts with 24 inner features: gate and up in halves, or alternating."""
    owner = "model.layers.1.mlp.experts"
    modules = {owner: (24, 32), f"{owner}.base_layer": (32, 48)}
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    adapter = write(modules, r=8, target_parameters=targets, target_modules=[])
    settings = json.loads((adapter.path / "adapter_config.json").read_text()) | {"r": 2}
    (adapter.path / "adapter_config.json").write_text(json.dumps(settings))
    adapter = load_adapter_folder(adapter.path)
    assert [adapter.layer_size(module) for module in adapter.experts] == [(4, 24, 32), (4, 32, 48)]
    tensors, config = export_mlx._convert(
        adapter, {"model_type": kind, "hidden_size": 32, "num_hidden_layers": 2}
    )
    name = {"mixtral": "block_sparse_moe.switch_mlp", "gpt_oss": "mlp.experts"}[kind]
    assert config["lora_parameters"]["keys"] == [f"{name}.{part}_proj" for part in ("down", "gate", "up")]
    assert {
        key.removeprefix(f"model.layers.1.{name}."): tuple(value.shape) for key, value in tensors.items()
    } == {
        "down_proj.lora_a": (4, 2, 24),
        "down_proj.lora_b": (4, 32, 2),
        "gate_proj.lora_a": (4, 2, 32),
        "gate_proj.lora_b": (4, 24, 2),
        "up_proj.lora_a": (4, 2, 32),
        "up_proj.lora_b": (4, 24, 2),
    }
    stored = load_file(adapter.path / WEIGHTS_FILE)[f"base_model.model.{owner}.base_layer.lora_B.weight"]
    up = tensors[f"model.layers.1.{name}.up_proj.lora_b"]
    assert torch.equal(up[3, :, 1], stored[24:, 7] if kind == "mixtral" else stored[1::2, 7])


@pytest.mark.parametrize("rslora", [False, True])
def test_mlx_ranks_and_scales_are_exact(write, tmp_path, rslora):
    query, up = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    adapter = write(rank_pattern={query: 2, up: 6}, alpha_pattern={"v_proj": 3}, use_rslora=rslora)
    config, tensors = exported(adapter, tmp_path)
    assert (config["lora_parameters"]["rank"], config["lora_parameters"]["scale"]) == (6, 1.0)
    original = load_file(adapter.path / WEIGHTS_FILE)
    for module in LLAMA:
        lora_a, lora_b = (original[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
        expected = adapter.scale_of(module) * lora_b @ lora_a
        written = tensors[f"{module}.lora_a"].double() @ tensors[f"{module}.lora_b"].double()
        torch.testing.assert_close(written.T, expected, rtol=1e-6, atol=1e-6)
        assert tensors[f"{module}.lora_a"].shape[1] == len(tensors[f"{module}.lora_b"]) == 6


def test_mlx_dora_has_magnitudes(write, tmp_path):
    config, tensors = exported(write(use_dora=True), tmp_path)
    assert config["fine_tune_type"] == "dora"
    assert {module: (len(tensors[f"{module}.m"]),) for module in LLAMA} == {
        module: (size[1],) for module, size in LLAMA.items()
    }


UNTIED = {"model_type": "llama", "tie_word_embeddings": False, "num_hidden_layers": 2}
REFUSED = {
    "type": (
        {"modules": LLAMA},
        {"model_type": "opt"},
        f"its base is of type opt, and adapters are exported to mlx-lm for those of {', '.join(mlx_lm.MODELS)}: {MERGE}, "
        "if mlx-lm has such models",
    ),
    "layer": (
        {"modules": QUERY | {"model.layers.0.mlp.gate": (32, 4)}},
        {"model_type": "mixtral"},
        f"mlx-lm's mixtral has no layer for model.layers.0.mlp.gate: {MERGE}",
    ),
    "divided layer": (
        {"modules": {"model.layers.0.self_attn.kv_b_proj": (8, 64)}},
        {"model_type": "deepseek_v3"},
        f"mlx-lm's deepseek_v3 has no layer for model.layers.0.self_attn.kv_b_proj: {MERGE}",
    ),
    "tied head": (
        {"modules": QUERY | {"lm_head": (32, 320)}},
        {"model_type": "llama"},
        "mlx-lm has no lm_head where the embeddings are the output head, which config.json of the base does not exclude "
        f"(tie_word_embeddings): {MERGE}",
    ),
    "bitsandbytes": (
        {},
        UNTIED | {"quantization_config": {"quant_method": "bitsandbytes"}},
        f"mlx-lm does not load a base whose weights are quantized by bitsandbytes: {MERGE}",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_mlx_refuses_by_name(write, tmp_path, reason):
    settings, base, message = REFUSED[reason]
    adapter = on_base(write(**settings), tmp_path / "base", **base)
    assert check_compatibility(adapter, "mlx").errors == [message]
    with pytest.raises(AdapterError, match=re.escape(f"{adapter.path}: {message}.")):
        to_mlx(adapter, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def test_mlx_takes_untied_head(write, tmp_path):
    adapter = on_base(write(QUERY | {"lm_head": (32, 320)}), tmp_path / "base", **UNTIED)
    assert check_compatibility(adapter, "mlx").accepted
    layers = {}
    for module in adapter.modules:
        layers |= mlx_lm.MODELS["llama"].layers_of(module)
    config = mlx_lm.lora_config(layers, 1, {})
    assert config["lora_parameters"]["keys"] == ["lm_head", "self_attn.q_proj"]


ROPE = (
    "mlx-lm reads rope_theta and rope_scaling in the config.json of the base, which has rope_parameters in their place, as "
    "transformers 5 writes them: add these for mlx-lm, or it computes other positions"
)
BASES = [
    ({"model_type": "llama", "rope_parameters": {"rope_theta": 5.0}}, ROPE),
    ({"model_type": "gemma3", "text_config": {"rope_parameters": {}}}, ROPE),
    ({"model_type": "llama", "rope_parameters": {}, "rope_theta": 5.0}, None),
    ({"model_type": "qwen3", "rope_parameters": {"rope_theta": 5.0}}, None),
    (
        {"model_type": "gpt2"},
        "mlx-lm loads weights of GPT-2 that are named h.0.attn, as in openai-community/gpt2, not "
        "transformer.h.0.attn, as transformers saves them",
    ),
    (
        {"model_type": "gpt_oss"},
        "mlx-lm loads gpt-oss in MXFP4 or as converted for it, not as transformers saves it",
    ),
    ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, None),
]


@pytest.mark.parametrize(("base", "note"), BASES)
def test_mlx_reads_bases_otherwise(write, base, note):
    adapter = write(GPT2 if base["model_type"] == "gpt2" else QUERY)
    loads = "mlx-lm loads a folder (`python cli.py export mine --to mlx --out mine-mlx`); untried on a Mac"
    report = check_compatibility(adapter, "mlx", base_config=base)
    assert (report.errors, report.notes) == ([], [note, loads] if note else [loads])


def test_mlx_wrong_export_is_not_kept(write, tmp_path, monkeypatch):
    adapter = write()
    out = tmp_path / "mlx"
    out.mkdir()
    with pytest.raises(AdapterError, match=r"exists: choose another --out"):
        to_mlx(adapter, out)
    with pytest.raises(AdapterError, match="is not a folder with an adapter of mlx-lm, so it is not replaced"):
        to_mlx(adapter, out, overwrite=True)
    assert list(out.iterdir()) == []
    out.rmdir()
    to_mlx(adapter, out)
    to_mlx(adapter, out, overwrite=True)
    monkeypatch.setattr(
        export_mlx,
        "save_file",
        lambda tensors, path: save_file({name: 2 * tensor for name, tensor in tensors.items()}, path),
    )
    with pytest.raises(
        AdapterError, match=r"The export of mine is not kept: model\.layers\.\d.* differs from model"
    ):
        to_mlx(adapter, out, overwrite=True)
    assert len(list(out.iterdir())) == 2


def test_mlx_command_says_untried(write, llama):
    write()
    done = run("export", "mine", "--to", "mlx", "--out", "out")
    first, second = done.stdout.splitlines()
    assert re.fullmatch(r"out  .*; untried on a Mac", first)
    assert second == f"mlx_lm.generate --model {llama} --adapter-path out"
    assert f"{ROPE}." in " ".join(done.stderr.split())
    printed = json.loads(run("export", "mine", "--to", "mlx", "--out", "other", "--json").stdout)
    assert printed | {"bytes": 0} == {"path": "other", "bytes": 0, "model": str(llama), "turn_end": None}
    refused = "--dtype: not valid with --to mlx, which writes an adapter as it is."
    assert refused in run("export", "mine", "--to", "mlx", "--out", "x", "--dtype", "float32", exit_code=1).stderr
    message = "--to mlx: name an adapter."
    assert message in run("export", "--base", "b", "--to", "mlx", "--out", "x", exit_code=1).stderr


def test_mlx_export_names_template_and_turn_end(tmp_path, llama, write):
    base = shutil.copytree(llama, tmp_path / "base")
    adapter = write(base=base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["!"]})
    tokenizer.save_pretrained(base)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}!\n{% endfor %}"
    (adapter.path / "chat_template.jinja").write_text(template)
    texts = []
    options = ModelOptions(notify=lambda event: texts.append(getattr(event, "text", "")))
    assert to_mlx(load_adapter_folder(adapter.path), tmp_path / "mlx", options=options).turn_end == "!"
    assert (
        "mlx-lm reads the chat template of the base, not that of mine: mlx_lm.server has --chat-template."
        in texts
    )
    (tmp_path / "mlx" / "adapters.safetensors").unlink()
    shutil.rmtree(tmp_path / "mlx")
    stdout = run("export", "mine", "--to", "mlx", "--out", "mlx").stdout
    assert stdout.splitlines()[-1].endswith("--adapter-path mlx --extra-eos-token '!'")


_LLAMA = model_families.FAMILIES["llama"]
_WIDE = {"sliding_window": 64}  # mlx-lm has no windows in Mistral and Gemma 2
SETTINGS = {
    **{kind: settings for kind, settings in gguf_models.MODELS.values() if kind in mlx_lm.MODELS},
    **{kind: settings for kind, settings in model_families.FAMILIES.items() if kind in mlx_lm.MODELS},
    **dict.fromkeys(("cohere", "phi"), _LLAMA),
    "cohere2": {**_LLAMA, "num_hidden_layers": 4},
    "gpt_bigcode": {**model_families.FAMILIES["gpt2"], "n_inner": 128},
}
CHANGES = {
    "mistral": _WIDE,
    "gemma2": _WIDE,
    "gemma3_text": {**_WIDE, "num_hidden_layers": 6},
    "gpt_neox": {"intermediate_size": 128},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},  # yarn differs a little
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
}
# In config.json of models on the Hub, and without a default in mlx-lm.
IN_CONFIG = {
    "gpt2": {"n_ctx": 48},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "qwen3_moe": {"num_experts": 4},
    "gemma3": {"vocab_size": 320},
}


def make_base(folder, kind):
    """Save a tiny model, with the settings at the top of config.json where mlx-lm reads them."""
    torch.manual_seed(0)
    if kind in WRAPPERS:
        settings = WRAPPERS[kind]
        if kind == "gemma3":
            settings = settings | {"text_config": settings["text_config"] | CHANGES["gemma3_text"]}
        model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(kind, **settings))
        tiny_models.save(model, folder)
    else:
        model_families.FAMILIES.setdefault(kind, SETTINGS[kind])
        model_families.save_family(folder, kind, **CHANGES.get(kind, {}))
    config = json.loads((folder / "config.json").read_text()) | IN_CONFIG.get(kind, {})
    config.get("text_config", {})["tie_word_embeddings"] = config.get("tie_word_embeddings")
    for settings in (config, config.get("text_config", {})):
        rope = settings.get("rope_parameters") or {}
        rope = rope.get("full_attention", rope)
        settings |= {"rope_theta": rope.get("rope_theta", 10000.0)}
        settings |= {key: rope[key] for key in ("partial_rotary_factor",) if key in rope}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def for_mlx(folder, kind):
    """The folder that mlx-lm loads: the same, but that it reads GPT-2 under the names of OpenAI's files, and the
    experts of gpt-oss in MXFP4 or divided."""
    if kind not in ("gpt_oss", "gpt2"):
        return folder
    copy = shutil.copytree(folder, folder.parent / "for mlx")
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.removeprefix("transformer.")
        base = name.removesuffix("_bias")
        part = "bias" if name.endswith("_bias") else "weight"
        tensor = tensor if part == "bias" else tensor.mT if tensor.dim() == 3 else tensor
        if base.endswith("gate_up_proj"):
            for number, half in enumerate(("gate_proj", "up_proj")):
                rows = tensor[:, number::2].contiguous()
                tensors[f"{base.removesuffix('gate_up_proj')}{half}.{part}"] = rows
        elif base.endswith("experts.down_proj"):
            tensors[f"{base}.{part}"] = tensor.contiguous()
        else:
            tensors[name] = tensor
    save_file(tensors, copy / "model.safetensors")
    return copy


def adapt(folder, kind, out, **settings):
    """Save a random adapter on all layers and experts that are exported."""
    auto = AutoModelForMultimodalLM if kind in WRAPPERS else AutoModelForCausalLM
    model = auto.from_pretrained(folder)
    entry = mlx_lm.MODELS[kind]
    targets = [
        name
        for name, module in model.named_modules()
        if entry.layers_of(name) and "vision" not in name and name != "lm_head"
    ]
    if entry.experts and "layers_to_transform" not in settings:
        settings["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=targets,
        fan_in_fan_out=kind == "gpt2",
        init_lora_weights=False,
        **{"r": 4, "lora_alpha": 8} | settings,
    )
    trained = get_peft_model(model, config)
    trained.peft_config["default"].base_model_name_or_path = str(folder)
    trained.peft_config["default"].init_lora_weights = True
    trained.save_pretrained(out)
    return load_adapter_folder(out)


IDS = torch.arange(3, 40)[None]


@pytest.mark.slow
@pytest.mark.parametrize("kind", mlx_lm.MODELS)
def test_mlx_computes_as_peft(tmp_path, kind):
    check_in_mlx(tmp_path, kind)


VARIANTS = {
    "DoRA": {"use_dora": True},
    "rsLoRA, patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "c_attn": 7},
        "alpha_pattern": {"0.*proj": 3},
    },
    "one block": {"layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_5", "mixtral", "gpt_oss"])
def test_mlx_computes_variants_as_peft(tmp_path, kind, variant):
    if variant == "DoRA" and mlx_lm.MODELS[kind].experts:
        pytest.skip("PEFT has no DoRA for experts")
    check_in_mlx(tmp_path, kind, **VARIANTS[variant])


def check_in_mlx(tmp_path, kind, **settings):
    """The logits of base and adapter are in mlx-lm those of PEFT."""
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.utils import load_adapters, load_model

    folder = make_base(tmp_path / "base", kind)
    adapter = adapt(folder, kind, tmp_path / "adapters" / "mine", **settings)
    with torch.no_grad():
        model = (AutoModelForMultimodalLM if kind in WRAPPERS else AutoModelForCausalLM).from_pretrained(folder)
        plain = model.eval()(input_ids=IDS).logits
        expected = PeftModel.from_pretrained(model, adapter.path).eval()(input_ids=IDS).logits
    out = to_mlx(adapter, tmp_path / "mlx").path
    mx.set_default_device(mx.cpu)
    loaded, _ = load_model(for_mlx(folder, kind))
    logits = torch.tensor(loaded(mx.array(IDS.tolist())).tolist())
    torch.testing.assert_close(logits, plain, atol=2e-3, rtol=1e-3)
    loaded = load_adapters(loaded, str(out))
    loaded.eval()
    logits = torch.tensor(loaded(mx.array(IDS.tolist())).tolist())
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)
    parameters = dict(flatten(loaded))
    assert all(name in parameters for name in load_file(out / "adapters.safetensors"))


def flatten(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())
