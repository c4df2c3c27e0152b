"""Check whether other tools can load an adapter, from its config and the header of its weights.

The rules for vLLM and llama.cpp come from their sources and documentation of November 2026 (vLLM
0.33). Of the base only its config.json is read, where it is on this machine; the installed version
of the tool is not examined.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import atomic_io, hub
from ..config import EMBEDDED_BASE
from ..errors import LoraTunerError
from ..text import display_name
from . import llama_cpp, peft_config
from .adapter import Adapter, read_json

Tool = Literal["vllm", "llama.cpp", "peft"]
BaseConfig = llama_cpp.Config
_VLLM_WITHOUT_LORA = frozenset(
    (
        *("arctic", "bloom", "dbrx", "falcon", "falcon_mamba", "flex_olmo", "gemma3n", "gemma3n_text", "gpt2"),
        *("gpt_neox", "gptj", "jais2", "longcat_flash", "mamba", "mamba2", "mpt", "olmoe", "stablelm", "zamba2"),
    )
)
# Where config.json of a wrapper has the settings of its text model, and text models that vLLM
# mounts in their wrapper all the same (vllm#34186, #39369, #48019).
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
_MOUNTED_TEXT_MODELS = ("qwen3_5_text", "qwen3_5_moe_text")
# Models that vLLM gives the stacked weights of all experts (`is_3d_moe_weight` in its
# model_executor/models); for others it wants an option, and the layout by name.
_VLLM_STACKED_EXPERTS = frozenset(
    (
        "gpt_oss",
        "glm4_moe_lite",
        "interns1_pro",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_vl_moe",
        "qwen3_vl_moe_text",
    )
)
_VLLM_EXPERTS = ("down_proj", "gate_up_proj")  # parameters of which it needs both
_RENAMED_BY_VLLM = ("qwen2_vl", "qwen2_5_vl")  # it moves `model.` under language_model itself
_TEXT_PARTS = {"language_model", "text_model"}  # names of the text model in a wrapper
_GGUF_SOURCE = re.compile(r"\(sha256 ([0-9a-f]{12})\)$")  # of a base that was converted from a GGUF file
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank; 8 also serves rank 1


@dataclass(frozen=True)
class CompatibilityReport:
    """Result of a check.

    Args:
        tool: the tool that is to load the adapter.
        errors: reasons why it cannot, each with a remedy.
        notes: advice for loading it.
        base_examined: False if config.json of the base was not there to be read.
    """

    tool: Tool
    errors: list[str]
    notes: list[str]
    base_examined: bool

    @property
    def accepted(self) -> bool:
        return not self.errors


def check_compatibility(
    adapter: Adapter, tool: Tool, name: str | None = None, base_config: BaseConfig | None = None
) -> CompatibilityReport:
    """Check an adapter against a tool.

    Args:
        adapter: the adapter.
        tool: the tool.
        name: used in the advice in place of the folder's name.
        base_config: config.json of its base; by default that of the base that it names, if it is on
            this machine.
    """
    base_config = base_config or find_base_config(adapter)
    report = CompatibilityReport(tool, [], [], base_config is not None)
    checks: dict[str, Callable[[Adapter, str, BaseConfig | None, CompatibilityReport], None]] = {
        "vllm": _check_vllm,
        "llama.cpp": _check_llama_cpp,
        "peft": _check_peft,
    }
    checks[tool](adapter, name or adapter.name, base_config, report)
    return report


def find_base_config(adapter: Adapter) -> BaseConfig | None:
    """config.json of the base that an adapter names; None if it is not on this machine. Sends no
    request."""
    if folder := find_base_folder(adapter):
        with contextlib.suppress(LoraTunerError):
            config = read_json(folder / "config.json")
            return config if isinstance(config, dict) else None
    return None


def find_base_folder(adapter: Adapter) -> Path | None:
    """Folder on this machine of the base that an adapter names, if there is one. Sends no request."""
    repo = adapter.manifest.base.repo if adapter.manifest else adapter.base
    folders: list[Path | None] = [Path(os.path.expanduser(adapter.base))] if adapter.base else []
    if adapter.base == EMBEDDED_BASE:
        folders += (atomic_io.cache_dir() / "bases").glob(f"{EMBEDDED_BASE}-*")
    if adapter.manifest and (source := _GGUF_SOURCE.search(adapter.manifest.base.weights)):
        folders.append(atomic_io.cache_dir() / "bases" / f"gguf-{source[1]}")
    with contextlib.suppress(LoraTunerError, ValueError):  # no valid name, such as a path
        folders.append(hub.cached_snapshot(repo, adapter.revision) if repo else None)
    return next((folder for folder in folders if folder and os.path.isfile(folder / "config.json")), None)


def is_gpt2(adapter: Adapter) -> bool:
    """Check for layers of GPT-2, whose weights are stored transposed."""
    return any(llama_cpp.ARCHITECTURES["gpt2"].has_layer(module) for module in adapter.modules)


def is_in_wrapper(module: str) -> bool:
    """True for a layer of the text model in a multimodal wrapper, by its full name."""
    return not _TEXT_PARTS.isdisjoint(module.split("."))


def is_wrapper(base_config: BaseConfig) -> bool:
    """True for the config of a checkpoint in which a text model is one part."""
    return any(isinstance(base_config.get(key), dict) for key in _TEXT_CONFIGS)


def vllm_rank(adapter: Adapter) -> int | None:
    """The smallest --max-lora-rank for this adapter in vLLM; None if its rank is too large."""
    largest = max(adapter.rank_of(module) for module in adapter.modules)
    return next((rank for rank in VLLM_RANKS if rank >= largest), None)


def _advise_merge(name: str) -> str:
    return f"merge it (`python cli.py merge {name} --out merged/{name}`)"


def replaced_error(adapter: Adapter, tool: str, name: str) -> str:
    """Error of a tool that takes LoRA pairs alone, for an adapter with other weights beside them."""
    return f"{tool} does not load what replaces weights of the base ({adapter.replaced}): {_advise_merge(name)}"


def _note_unknown_base(adapter: Adapter, report: CompatibilityReport) -> None:
    base = display_name(adapter.base) or "its base"
    report.notes.append(f"{base} is not on this machine, so its architecture was not checked")


def _check_vllm(adapter: Adapter, name: str, base_config: BaseConfig | None, report: CompatibilityReport) -> None:
    model_type = (base_config or {}).get("model_type")
    if is_gpt2(adapter):
        report.errors.append(f"vLLM does not support LoRA on GPT-2: {_advise_merge(name)}")
    elif base_config is None:
        _note_unknown_base(adapter, report)
    elif model_type in _VLLM_WITHOUT_LORA:
        report.errors.append(f"vLLM does not support LoRA on {model_type} models: {_advise_merge(name)}")
    elif outside := _outside_language_model(adapter, base_config):
        rename = ""
        if "text_config" in base_config and not any(map(is_in_wrapper, adapter.modules)):
            rename = f"rename its layers (`python cli.py export {name} --to vllm --out {name}-vllm`), or "
        report.errors.append(
            f"vLLM mounts the text model of {model_type} under language_model, so it would load "
            f"{outside[0]} and apply nothing, without an error: {rename}{_advise_merge(name)}"
        )
    if adapter.experts:
        _check_vllm_experts(adapter, name, base_config, report)
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
        report.errors.append(f"vLLM does not support DoRA: {_advise_merge(name)}")
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


def _check_vllm_experts(
    adapter: Adapter, name: str, base_config: BaseConfig | None, report: CompatibilityReport
) -> None:
    """vLLM reads the experts of a block as one pair of tensors for each of two parameters, and
    takes sides and scale as given (`_stack_moe_lora_weights` in its lora/model_manager.py)."""
    parameters = {module.rpartition(".")[2] for module in adapter.experts}
    owners = {module.rpartition(".")[0] for module in adapter.experts}
    if parameters != set(_VLLM_EXPERTS) or len(adapter.experts) != 2 * len(owners):
        report.errors.append(
            f"vLLM needs gate_up_proj and down_proj of all experts that are adapted, and it adapts "
            f"{', '.join(sorted(parameters))} of some: {_advise_merge(name)}"
        )
        return
    settings = base_config or {}
    text = next((settings[key] for key in _TEXT_CONFIGS if isinstance(settings.get(key), dict)), settings)
    hidden = text.get("hidden_size")
    for module in adapter.experts:
        sides = adapter.layer_size(module)[1:]
        if hidden is not None and hidden != sides[module.endswith("down_proj")]:
            report.errors.append(
                f"PEFT stores A and B of {module} for weights with sides in the other order, and vLLM would swap "
                f"them: {_advise_merge(name)}"
            )
            break
    scale = adapter.config["lora_alpha"] / (
        adapter.rank**0.5 if adapter.config.get("use_rslora") else adapter.rank
    )
    if other := [module for module in adapter.experts if adapter.scale_of(module) != scale]:
        report.errors.append(
            f"{other[0]} has another scale than {adapter.name} as a whole, which vLLM would ignore, as it knows experts "
            f"by other names than rank_pattern and alpha_pattern: {_advise_merge(name)}"
        )
    if settings.get("model_type") not in _VLLM_STACKED_EXPERTS:
        report.notes.append(
            "start vLLM with --enable-mixed-moe-lora-format and say that the experts are stacked, else it loads them "
            f'wrongly or not at all: --lora-modules \'{{"name": "{name}", "path": "...", '
            '"is_3d_lora_weight": true}\''
        )


def _outside_language_model(adapter: Adapter, base_config: BaseConfig) -> list[str]:
    """Layers that vLLM would not find, where the text model of the base is a part of another."""
    model_type = base_config.get("model_type")
    if model_type in _RENAMED_BY_VLLM or not (is_wrapper(base_config) or model_type in _MOUNTED_TEXT_MODELS):
        return []
    return [module for module in adapter.modules if not is_in_wrapper(module)]


def _check_llama_cpp(
    adapter: Adapter, name: str, base_config: BaseConfig | None, report: CompatibilityReport
) -> None:
    supported = ", ".join(llama_cpp.ARCHITECTURES)
    architectures = list(llama_cpp.ARCHITECTURES.values())
    if base_config is None:
        _note_unknown_base(adapter, report)
    elif architecture := llama_cpp.find_architecture(base_config):
        architectures = [architecture]
    else:
        report.errors.append(
            f"its base is a {base_config.get('model_type')} model, and only adapters of {supported} can be exported: "
            f"{_advise_merge(name)}, then convert the result with llama.cpp's script"
        )
    if adapter.config.get("use_dora"):
        report.errors.append(f"llama.cpp does not support DoRA: {_advise_merge(name)}")
    if adapter.replaced:
        report.errors.append(replaced_error(adapter, "llama.cpp", name))
    unknown = [
        [module for module in adapter.modules if not architecture.has_layer(module)]
        for architecture in architectures
    ]
    if all(unknown):
        report.errors.append(
            f"layers such as {min(unknown, key=len)[0]} cannot be converted for llama.cpp: {_advise_merge(name)}"
        )
    if report.errors:
        return
    bases = f", on a base of {supported}" if base_config is None else ""
    report.notes.append(
        f"llama.cpp loads a GGUF file (`python cli.py export {name} --to gguf --out {name}.gguf`){bases}"
    )
    if is_gpt2(adapter) or adapter.config.get("use_rslora") or adapter.config.get("alpha_pattern"):
        report.notes.append("llama.cpp's own converter silently gets this adapter wrong: use `export`")


def _check_peft(adapter: Adapter, name: str, base_config: BaseConfig | None, report: CompatibilityReport) -> None:
    """PEFT adapts the layers that its settings select, and silently drops the tensors of others."""
    rewrite = (
        _advise_merge(name) if adapter.replaced else f"rewrite it (`python cli.py blend {name}=1 --name NEW`)"
    )
    _check_replaced_in_peft(adapter, base_config, report, rewrite)
    if base_config is not None and is_wrapper(base_config):
        whole = any(map(is_in_wrapper, adapter.modules))
        classes = ("AutoModelForMultimodalLM", "AutoModelForCausalLM")
        right, wrong = classes if whole else classes[::-1]
        model = "the whole model" if whole else "the text model alone"
        report.notes.append(
            f"its layers are named as in {model}: load the base with {right}. On that of {wrong}, where it is another, PEFT "
            "would apply nothing, without an error"
        )
    targets, excluded = adapter.config.get("target_modules"), adapter.config.get("exclude_modules")
    if targets == "all-linear" and "lm_head" in adapter.targets:
        report.errors.append(
            "PEFT would skip lm_head, which all-linear does not include: list the layers by name "
            "in adapter_config.json"
        )
    for setting, wanted, pattern in (("target_modules", True, targets), ("exclude_modules", False, excluded)):
        if pattern == "all-linear" or (setting == "exclude_modules" and not pattern):
            continue
        # Parameters are chosen by target_parameters alone, whose names the file follows.
        modules = [module for module in adapter.modules if module not in adapter.experts]
        matched = _matched_by_peft(pattern, modules)
        if matched is None:
            report.notes.append(f"{setting} is the pattern {pattern!r}, which was not checked")
        elif skipped := [module for module in modules if (module in matched) != wanted]:
            reason = "does not name" if wanted else "names"
            report.errors.append(f"PEFT would skip {skipped[0]}, which {setting} {reason}: {rewrite}")
    lists = adapter.config.get("layers_pattern") or []
    lists = lists if isinstance(lists, list) else [lists]
    if not all(re.fullmatch(r"\w+", str(name)) for name in lists):
        report.notes.append(f"layers_pattern is {lists}, which was not checked")
    elif isinstance(targets, list) and (skipped := _outside_transformed_layers(adapter, targets, lists)):
        report.errors.append(f"PEFT would skip {skipped[0]}, which layers_to_transform does not name: {rewrite}")
    initialization = adapter.config.get("init_lora_weights", True)
    if not initialization:  # null as well
        report.errors.append(
            f"init_lora_weights is {json.dumps(initialization)}, so PEFT would give layers without "
            f"tensors random weights: {rewrite}"
        )
    if adapter.experts and (conflicts := _not_for_parameters(adapter)):
        report.errors.append(f"PEFT refuses target_parameters with {', '.join(conflicts)}: {rewrite}")
    if initialization == "orthogonal" and any(adapter.rank_of(module) % 2 for module in adapter.modules):
        report.errors.append(
            f"init_lora_weights is orthogonal, which PEFT does not support for odd ranks: {rewrite}"
        )


def _not_for_parameters(adapter: Adapter) -> list[str]:
    """Settings that are set, and with which PEFT adapts no parameters (`ParamWrapper` in its
    tuners/lora/layer.py)."""
    names = ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora", "velora_config", "kasa_config")
    return [name for name in names if adapter.config.get(name)]


def _check_replaced_in_peft(
    adapter: Adapter, base_config: BaseConfig | None, report: CompatibilityReport, rewrite: str
) -> None:
    """PEFT loads such weights into a base that has been resized, and fails for those that are missing."""
    if adapter.config.get("trainable_token_indices") and not adapter.replaced.rows:
        report.errors.append(
            f"PEFT would fail: the file has no rows for trainable_token_indices in adapter_config.json: {rewrite}"
        )
    saved = adapter.config.get("modules_to_save")
    if lacking := [
        each
        for each in (saved if isinstance(saved, list) else [])
        if not any(str(each) in module for module in adapter.replaced.copies)
    ]:
        report.notes.append(
            f"modules_to_save names {lacking[0]}, which the file lacks: if the base has such a module, PEFT fails"
        )
    rows = ((base_config or {}).get("text_config") or base_config or {}).get("vocab_size")
    size = adapter.replaced.vocab_size(0)
    if size and (rows is None or adapter.replaced.vocab_size(rows) != rows):
        condition = "" if rows is not None else f", if it has fewer than {size:,} embeddings"
        report.notes.append(f"first resize the base{condition}: base.resize_token_embeddings({size})")


def _matched_by_peft(pattern: object, modules: list[str]) -> set[str] | None:
    """Layers that a list of names or a regular expression selects; None if that cannot be told."""
    if not isinstance(pattern, str):
        names = [str(name) for name in pattern] if isinstance(pattern, list) else []
        endings = tuple(f".{name}" for name in names)
        return {module for module in modules if f".{module}".endswith(endings)}
    if not peft_config.is_pattern(pattern):
        return None
    matcher = peft_config.PatternMatcher([rf"(?:{pattern})\Z"])
    try:
        return {module for module in modules if matcher.first_match(module) is not None}
    except TimeoutError:
        return None


def _outside_transformed_layers(adapter: Adapter, targets: list[str], lists: list[str]) -> list[str]:
    """Layers with tensors that `layers_to_transform` leaves out. Names in full are always taken."""
    selected = adapter.config.get("layers_to_transform")
    if selected is None or selected == []:
        return []
    indexes = selected if isinstance(selected, list) else [selected]
    outside = []
    for module in adapter.modules:
        if module in adapter.experts:
            continue
        matches = (re.match(rf".*\.{name}\.(\d+)\.", module) for name in lists or ("[^.]*",))
        found = next((int(match[1]) for match in matches if match), None)
        if module not in targets and found not in indexes:
            outside.append(module)
    return outside
