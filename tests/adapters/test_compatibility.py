"""Compatibility reports: checked against PEFT itself; for vLLM and llama.cpp against the rules in their sources."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_tuner.adapters import compatibility, llama_cpp, model_card
from lora_tuner.adapters.adapter import WEIGHTS_FILE

from .. import adapter_files
from ..adapter_files import on_base
from ..cli.test_commands import run

SIZES = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (32, 16), "mlp.up_proj": (32, 64)}
LLAMA = {f"model.layers.{block}.{name}": size for block in (0, 1) for name, size in SIZES.items()}
GPT2 = {"transformer.h.0.attn.c_attn": (32, 96), "transformer.h.1.mlp.c_proj": (128, 32)}
QUERY = {"model.layers.0.self_attn.q_proj": (32, 32)}
NAMES = ["q_proj", "v_proj", "up_proj"]
MERGE = "merge it (`python cli.py merge mine --out merged/mine`)"
EXPORT = "llama.cpp loads a GGUF file (`python cli.py export mine --to gguf --out mine.gguf`)"
EXPORTED = ", ".join(llama_cpp.ARCHITECTURES)
CONVERTER_NOTE = "llama.cpp's own converter silently gets this adapter wrong: use `export`"
LAYERS_DIFFER = "its layers differ in rank or scale: vLLM 0.33 supports that, older versions may ignore it"
REWRITE = "rewrite it (`python cli.py blend mine=1 --name NEW`)"
NOT_NAMED = f"which target_modules does not name: {REWRITE}"

pytestmark = pytest.mark.filterwarnings(
    *("ignore:fan_in_fan_out is set", "ignore:Found missing adapter keys"),
    *("ignore:`init_lora_weights` is 'eva'", "ignore:Model has .tie_word_embeddings"),
)


@pytest.fixture
def write(tmp_path, llama, gpt2):
    """Write an adapter with random weights for a tiny base into the library."""

    def written(modules=LLAMA, **config):
        base, targets = (gpt2, ["c_attn", "mlp.c_proj"]) if modules is GPT2 else (llama, NAMES)
        settings = {"target_modules": targets} | config
        return adapter_files.write_random(tmp_path / "adapters" / "mine", base, modules, **settings)

    return written


def check(adapter, tool):
    report = compatibility.check_compatibility(adapter, tool)
    assert (report.tool, report.accepted) == (tool, report.errors == [])
    return report.errors, report.notes


def load_in_peft(adapter):
    """The tensors that PEFT skips, and the largest update that it adds to a layer without tensors."""
    base = AutoModelForCausalLM.from_pretrained(adapter.base)
    model = PeftModel.from_pretrained(base, adapter.path)
    state = {name.replace(".default", ""): it for name, it in model.state_dict().items() if ".lora_" in name}
    tensors = load_file(adapter.path / WEIGHTS_FILE)
    skipped = [
        name
        for name, values in tensors.items()
        if not torch.equal(state.get(name, state.get(f"{name}.weight", torch.empty(0))), values)
    ]
    others = [name for name in state if ".lora_A." in name and name not in tensors]
    added = [float((state[name.replace("lora_A", "lora_B")] @ state[name]).abs().max()) for name in others]
    return skipped, max(added, default=0.0)


ACCEPTED_BY_PEFT = {
    "last names": (LLAMA, {}),
    "names in full": (LLAMA, {"target_modules": list(LLAMA)}),
    "names of more layers": (QUERY, {}),
    "all-linear": (LLAMA, {"target_modules": "all-linear"}),
    "the output head, by its name": (QUERY | {"lm_head": (32, 320)}, {"target_modules": ["q_proj", "lm_head"]}),
    "patterns": (
        LLAMA,
        {"rank_pattern": dict.fromkeys(QUERY, 2), "alpha_pattern": {"up_proj": 3}, "use_rslora": True},
    ),
    "DoRA": (LLAMA, {"use_dora": True}),
    "gaussian": (QUERY, {"init_lora_weights": "gaussian"}),
    "eva": (QUERY, {"init_lora_weights": "eva"}),
    "orthogonal": (QUERY, {"init_lora_weights": "orthogonal"}),
    "GPT-2": (GPT2, {}),
    "GPT-2, fan_in_fan_out": (GPT2, {"fan_in_fan_out": True}),
}


@pytest.mark.parametrize("way", ACCEPTED_BY_PEFT)
def test_accepted_adapter_loads_fully_in_peft(write, way):
    modules, config = ACCEPTED_BY_PEFT[way]
    adapter = write(modules, **config)
    assert check(adapter, "peft") == ([], [])
    skipped, added = load_in_peft(adapter)
    assert skipped == []
    assert added < 1e-6


def test_peft_check_reports_skipped_layers(write, recwarn):
    for targets, first in (
        (["q_proj", "up_proj"], "model.layers.0.self_attn.v_proj"),
        (
            [*(name for name in LLAMA if name.startswith("model.layers.0.")), "q_proj"],
            "model.layers.1.mlp.up_proj",
        ),
        (None, "model.layers.0.mlp.up_proj"),  # of Llama's layers PEFT then takes q_proj and v_proj
    ):
        adapter = write(target_modules=targets)
        skipped, _ = load_in_peft(adapter)
        assert f"base_model.model.{first}.lora_B.weight" in skipped
        assert len(skipped) < len(adapter.tensors)
        obstacle = f"PEFT would skip {first}, {NOT_NAMED}"
        assert check(adapter, "peft") == ([obstacle], [])
    assert not [it for it in recwarn if "adapter" in str(it.message)]


def test_peft_check_reports_skipped_lm_head(write):
    adapter = write(QUERY | {"lm_head": (32, 320)}, target_modules="all-linear")
    obstacle = "PEFT would skip lm_head, which all-linear does not include: list the layers by name in adapter_config.json"
    assert check(adapter, "peft") == ([obstacle], [])
    assert load_in_peft(adapter)[0] == [f"base_model.model.lm_head.lora_{part}.weight" for part in "AB"]


@pytest.mark.parametrize("targets", [NAMES, "all-linear"])
@pytest.mark.parametrize("start", [False, None])
def test_peft_check_reports_random_initialization(write, start, targets):
    adapter = write(QUERY, init_lora_weights=start, target_modules=targets)
    obstacle = f"init_lora_weights is {json.dumps(start)}, so PEFT would give layers without tensors random weights: {REWRITE}"
    assert check(adapter, "peft") == ([obstacle], [])
    assert load_in_peft(adapter)[1] > 0.1


def test_peft_check_reports_odd_orthogonal_rank(write):
    adapter = write(init_lora_weights="orthogonal", rank_pattern=dict.fromkeys(QUERY, 3))
    assert check(adapter, "peft") == (
        [f"init_lora_weights is orthogonal, which PEFT does not support for odd ranks: {REWRITE}"],
        [],
    )
    with pytest.raises(ValueError, match="even"):
        load_in_peft(adapter)


@pytest.mark.parametrize(
    ("config", "first", "setting"),
    [
        ({"target_modules": r".*\.(q|v)_proj"}, "model.layers.0.mlp.up_proj", "target_modules does not name"),
        ({"exclude_modules": ["mlp.up_proj"]}, "model.layers.0.mlp.up_proj", "exclude_modules names"),
        ({"exclude_modules": r".*\.1\..*"}, "model.layers.1.mlp.up_proj", "exclude_modules names"),
        ({"layers_to_transform": [0]}, "model.layers.1.mlp.up_proj", "layers_to_transform does not name"),
        (
            {"layers_to_transform": 1, "layers_pattern": "layers"},
            "model.layers.0.mlp.up_proj",
            "layers_to_transform does not name",
        ),
    ],
)
def test_peft_check_reads_layer_selection(write, config, first, setting):
    adapter = write(**config)
    assert check(adapter, "peft") == ([f"PEFT would skip {first}, which {setting}: {REWRITE}"], [])
    assert f"base_model.model.{first}.lora_A.weight" in load_in_peft(adapter)[0]


def test_peft_check_accepts_target_pattern(write):
    adapter = write(target_modules=r".*\.[01]\..*_proj")
    assert check(adapter, "peft") == ([], [])
    assert load_in_peft(adapter)[0] == []
    assert check(write(target_modules="((a|aa"), "peft") == (
        [],
        ["target_modules is the pattern '((a|aa', which was not checked"],
    )


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "phi3", "gpt2", "mixtral", "opt", "llama"])
def test_check_and_export_agree_on_architecture(write, tmp_path, kind):
    adapter = on_base(write(), tmp_path / "base", model_type=kind)
    obstacle = (
        f"its base is of type {kind}, and only adapters of {EXPORTED} can be exported: {MERGE}, then convert the result "
        "with llama.cpp's script"
    )
    if kind in llama_cpp.ARCHITECTURES:  # without layers of these names
        obstacle = f"layers such as model.layers.0.mlp.up_proj cannot be converted for llama.cpp: {MERGE}"
    accepted = kind in ("qwen3", "gemma2", "llama")
    assert check(adapter, "llama.cpp") == (([], [EXPORT]) if accepted else ([obstacle], []))
    if not accepted:
        assert obstacle in run("export", "mine", "--out", "mine.gguf", exit_code=1).stderr.replace("\n", " ")
    assert ("llama-completion" in model_card._usage_section(adapter, "mine", "base", "Once")) == accepted


def test_layers_of_unknown_type_are_not_named(write, tmp_path):
    adapter = on_base(write({"backbone.layers.0.mixer.in_proj": (32, 64)}), tmp_path / "base", model_type="mamba")
    (obstacle,), _ = check(adapter, "llama.cpp")
    assert obstacle.startswith("its base is of type mamba, and only adapters of ")


WRAPPED = {"text_config": {"hidden_size": 32}}
MOUNTED = (
    "vLLM mounts the text model of {0} under language_model, so it would load model.layers.0.mlp.up_proj and apply "
    f"nothing, without an error: {MERGE}"
)
RENAME = "rename its layers (`python cli.py export mine --to vllm --out mine-vllm`), or merge it"


@pytest.mark.parametrize(
    ("config", "obstacle"),
    [
        ({"model_type": "qwen3_5", **WRAPPED}, MOUNTED.format("qwen3_5").replace("merge it", RENAME)),
        ({"model_type": "gemma3", **WRAPPED}, MOUNTED.format("gemma3").replace("merge it", RENAME)),
        ({"model_type": "llava", **WRAPPED}, MOUNTED.format("llava").replace("merge it", RENAME)),
        ({"model_type": "mistral3", **WRAPPED}, MOUNTED.format("mistral3").replace("merge it", RENAME)),
        ({"model_type": "internvl_chat", "llm_config": {}}, MOUNTED.format("internvl_chat")),
        ({"model_type": "qwen2_5_vl", **WRAPPED}, None),  # vLLM renames these itself
        ({"model_type": "gemma3_text"}, None),
        ({"model_type": "qwen3"}, None),
        ({"model_type": "gpt_neox"}, f"vLLM does not support LoRA on gpt_neox models: {MERGE}"),
        ({"model_type": "mamba2"}, f"vLLM does not support LoRA on mamba2 models: {MERGE}"),
        (
            {"model_type": "xglm"},
            "vLLM does not run xglm models, merged or not: use `python cli.py serve` or another base",
        ),
        (
            {"model_type": "codegen"},
            "vLLM does not run codegen models, merged or not: use `python cli.py serve` or another base",
        ),
        ({"model_type": "kimi_linear"}, f"vLLM does not support LoRA on kimi_linear models: {MERGE}"),
    ],
)
def test_vllm_check_reads_base_config(write, tmp_path, config, obstacle):
    adapter = on_base(write(), tmp_path / "base", **config)
    assert check(adapter, "vllm") == ([obstacle] if obstacle else [], [])


@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_vllm_check_takes_text_model_alone(write, tmp_path, kind):
    """vLLM registers these since 0.28, with their layers under `model.` (vllm#50210)."""
    adapter = on_base(write(), tmp_path / "base", model_type=kind)
    assert check(adapter, "vllm") == ([], [f"vLLM loads {kind} models since version 0.28"])


def test_vllm_check_tells_gpt_neo_from_gpt2(write, tmp_path):
    """Their layers have the same names."""
    (obstacle,), _ = check(on_base(write(GPT2), tmp_path / "base", model_type="gpt_neo"), "vllm")
    assert obstacle.startswith("vLLM does not run gpt_neo models, merged or not: ")
    assert check(on_base(write(GPT2), tmp_path / "other", model_type="gpt_bigcode"), "vllm") == ([], [])


@pytest.mark.parametrize("kind", ["ctrl", "modernbert-decoder", "type-of-next-year"])
def test_vllm_check_names_what_transformers_runs(write, tmp_path, kind):
    adapter = on_base(write(), tmp_path / "base", model_type=kind)
    note = f"vLLM has no {kind} of its own, and runs it by transformers' code if at all: not examined"
    assert check(adapter, "vllm") == ([], [note])


def test_vllm_check_accepts_names_of_wrapper(write, tmp_path):
    modules = {f"model.language_model.{name.removeprefix('model.')}": size for name, size in LLAMA.items()}
    adapter = on_base(write(modules), tmp_path / "base", model_type="gemma3", **WRAPPED)
    assert check(adapter, "vllm") == ([], [])
    vision = {"model.vision_tower.layers.0.q_proj": (32, 32)}
    (obstacle,), _ = check(
        on_base(write(modules | vision), tmp_path / "other", model_type="gemma3", **WRAPPED), "vllm"
    )
    assert "it would load model.vision_tower.layers.0.q_proj and apply nothing" in obstacle


@pytest.mark.parametrize("setting", [{"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}])
def test_vllm_check_rejects_other_weights(write, setting):
    (obstacle,), _ = check(write(**setting), "vllm")
    assert obstacle == f"vLLM refuses {next(iter(setting))}, of which the file has no tensors: {REWRITE}"


def test_vllm_check_rejects_lm_head(write):
    assert check(write(QUERY | {"lm_head": (32, 320)}), "vllm") == (
        ["vLLM applies LoRA to lm_head in few models only, and this tool in none: train without it"],
        [],
    )


def test_check_says_when_base_is_unknown(write, tmp_path):
    adapter = write(base_model_name_or_path="some/model")
    unknown = "some/model is not on this machine, so its architecture was not checked"
    assert check(adapter, "vllm") == ([], [unknown])
    assert check(adapter, "llama.cpp") == ([], [unknown, f"{EXPORT}, on a base of {EXPORTED}"])
    stdout = run("adapters", "check", "mine", "--for", "vllm").stdout
    assert stdout == f"mine: no obstacle found for vllm\n- {unknown}\n"


@pytest.mark.parametrize(
    ("rank", "least"),
    [
        *((1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (65, 128), (129, 256)),
        *((257, 320), (512, 512), (513, None)),
    ],
)
def test_vllm_rank_is_smallest_sufficient(write, rank, least):
    for adapter in (write(QUERY, r=rank), write(LLAMA, r=1, rank_pattern=dict.fromkeys(QUERY, rank))):
        assert compatibility.vllm_rank(adapter) == least
        obstacles, notes = check(adapter, "vllm")
        cut = "vLLM supports ranks up to 512: reduce it (`python cli.py blend mine=1 --rank 512 --name NEW`)"
        assert obstacles == ([cut] if least is None else [])
        told = f"start vLLM with --max-lora-rank {least}: the default is 16"
        differ = [LAYERS_DIFFER] if adapter.config.get("rank_pattern") else []
        assert notes == ([told] if least and least > 16 else []) + differ


def test_vllm_check_rejects_gpt2_and_dora(write):
    assert check(write(), "vllm") == ([], [])
    assert check(write(alpha_pattern={"q_proj": 3}), "vllm") == ([], [LAYERS_DIFFER])
    assert check(write(GPT2), "vllm") == ([f"vLLM does not support LoRA on GPT-2: {MERGE}"], [])
    assert check(write(use_dora=True), "vllm") == ([f"vLLM does not support DoRA: {MERGE}"], [])


def test_llama_cpp_check_by_layers(write):
    for config in ({}, {"target_modules": "all-linear"}, {"rank_pattern": dict.fromkeys(QUERY, 2)}):
        assert check(write(**config), "llama.cpp") == ([], [EXPORT])
    for config in ({"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}):
        assert check(write(**config), "llama.cpp") == ([], [EXPORT, CONVERTER_NOTE])
    assert check(write(GPT2), "llama.cpp") == ([], [EXPORT, CONVERTER_NOTE])
    assert check(write(use_dora=True), "llama.cpp") == ([f"llama.cpp does not support DoRA: {MERGE}"], [])
    for layer in (
        "lm_head",
        "model.layers.0.mlp.c_proj",
        "transformer.h.0.mlp",
        "gpt_neox.layers.0.attention.dense",
    ):
        unknown = f"layers such as {layer} cannot be converted for llama.cpp: {MERGE}"
        assert check(write(QUERY | {layer: (32, 32)}), "llama.cpp") == ([unknown], [])


def test_check_uses_given_name(write):
    assert compatibility.check_compatibility(write(), "llama.cpp", "other").notes == [
        EXPORT.replace("mine", "other")
    ]
    assert compatibility.check_compatibility(write(use_dora=True), "vllm", "other").errors == [
        f"vLLM does not support DoRA: {MERGE.replace('mine', 'other')}"
    ]


def test_check_reads_no_weights(write):
    adapter = write()
    (adapter.path / WEIGHTS_FILE).unlink()
    for tool in ("vllm", "llama.cpp", "peft"):
        assert compatibility.check_compatibility(adapter, tool).accepted


def test_advised_commands_work(write, tmp_path):
    for dora, made in ((False, "mine.gguf"), (True, "merged/mine/model.safetensors")):
        verdict = compatibility.check_compatibility(write(use_dora=dora), "llama.cpp")
        command = re.search("`python cli.py (.*)`", [*verdict.errors, *verdict.notes][0])
        run(*command[1].split())
        assert (tmp_path / made).is_file()


def test_check_command_output_and_status(write):
    write(target_modules=["q_proj"])
    assert run("adapters", "check", "mine", "--for", "vllm").stdout == "mine: compatible with vllm\n"
    assert (
        run("adapters", "check", "mine", "--for", "llama.cpp").stdout
        == f"mine: compatible with llama.cpp\n- {EXPORT}\n"
    )
    obstacle = f"PEFT would skip model.layers.0.mlp.up_proj, {NOT_NAMED}"
    told = run("adapters", "check", "mine", "--for", "peft", exit_code=1).stdout
    assert told == f"mine: not compatible with peft\n- {obstacle}\n"
    for tool, obstacles in (("vllm", []), ("peft", [obstacle])):
        answer = run("adapters", "check", "mine", "--for", tool, "--json", exit_code=len(obstacles)).stdout
        assert json.loads(answer) == {
            "tool": tool,
            "obstacles": obstacles,
            "notes": [],
            "accepted": not obstacles,
            "base_examined": True,
        }
    run("adapters", "check", "mine", exit_code=1)  # neither --for nor --url
    run("adapters", "check", "mine", "--for", "mlc", exit_code=2)
