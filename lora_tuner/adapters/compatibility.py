"""Check whether other tools can load an adapter, from its config and the header of its weights.

The rules for vLLM and llama.cpp come from their sources of November 2026 (vLLM 0.33). The base is
not examined, nor is the installed version of the tool.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .adapter import Adapter

Tool = Literal["vllm", "llama.cpp", "peft"]
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank; 8 also serves rank 1
_LLAMA_LAYER = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_GPT2_LAYER = re.compile(r"transformer\.h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))")


@dataclass(frozen=True)
class CompatibilityReport:
    """Result of a check.

    Args:
        tool: the tool that is to load the adapter.
        errors: reasons why it cannot, each with a remedy.
        notes: advice for loading it.
    """

    tool: Tool
    errors: list[str]
    notes: list[str]

    @property
    def accepted(self) -> bool:
        return not self.errors


def check_compatibility(adapter: Adapter, tool: Tool, name: str | None = None) -> CompatibilityReport:
    """Check an adapter against a tool. `name` is used in the advice in place of the folder's name."""
    report = CompatibilityReport(tool, [], [])
    checks: dict[str, Callable[[Adapter, str, CompatibilityReport], None]] = {
        "vllm": _check_vllm,
        "llama.cpp": _check_llama_cpp,
        "peft": _check_peft,
    }
    checks[tool](adapter, name or adapter.name, report)
    return report


def is_gpt2(adapter: Adapter) -> bool:
    """Check for layers of GPT-2, whose weights are stored transposed."""
    return any(_GPT2_LAYER.fullmatch(module) for module in adapter.modules)


def vllm_rank(adapter: Adapter) -> int | None:
    """The smallest --max-lora-rank for this adapter in vLLM; None if its rank is too large."""
    largest = max(adapter.rank_of(module) for module in adapter.modules)
    return next((rank for rank in VLLM_RANKS if rank >= largest), None)


def _advise_merge(name: str) -> str:
    return f"merge it (`python cli.py merge {name} --out merged/{name}`)"


def _check_vllm(adapter: Adapter, name: str, report: CompatibilityReport) -> None:
    if is_gpt2(adapter):
        report.errors.append(f"vLLM does not support LoRA on GPT-2: {_advise_merge(name)}")
    if adapter.config.get("use_dora"):
        report.errors.append(f"vLLM does not support DoRA: {_advise_merge(name)}")
    if (rank := vllm_rank(adapter)) is None:
        limit = VLLM_RANKS[-1]
        report.errors.append(
            f"vLLM supports ranks up to {limit}: reduce it (`python cli.py blend {name}=1 --rank {limit} --name NEW`)"
        )
    elif rank > 16:
        report.notes.append(f"start vLLM with --max-lora-rank {rank}: the default is 16")
    if adapter.config.get("rank_pattern") or adapter.config.get("alpha_pattern"):
        report.notes.append(
            "its layers differ in rank or scale: vLLM 0.33 supports that, older versions may ignore it"
        )


def _check_llama_cpp(adapter: Adapter, name: str, report: CompatibilityReport) -> None:
    if adapter.config.get("use_dora"):
        report.errors.append(f"llama.cpp does not support DoRA: {_advise_merge(name)}")
    if unknown := [
        module
        for module in adapter.modules
        if not _LLAMA_LAYER.fullmatch(module) and not _GPT2_LAYER.fullmatch(module)
    ]:
        report.errors.append(
            f"layers such as {unknown[0]} cannot be converted for llama.cpp: {_advise_merge(name)}"
        )
    report.notes.append(
        f"llama.cpp loads a GGUF file (`python cli.py export {name} --to gguf --out {name}.gguf`), on a GPT-2, Llama, "
        "Mistral or Qwen2 base"
    )
    if is_gpt2(adapter) or adapter.config.get("use_rslora") or adapter.config.get("alpha_pattern"):
        report.notes.append("llama.cpp's own converter silently gets this adapter wrong: use `export`")


def _check_peft(adapter: Adapter, name: str, report: CompatibilityReport) -> None:
    """PEFT adapts the layers that `target_modules` names, and silently drops the tensors of others."""
    rewrite = f"rewrite it (`python cli.py blend {name}=1 --name NEW`)"
    targets = adapter.config.get("target_modules")
    if targets == "all-linear":
        if "lm_head" in {module.rpartition(".")[2] for module in adapter.modules}:
            report.errors.append(
                "PEFT would skip lm_head, which all-linear does not include: list the layers by name in "
                "adapter_config.json"
            )
    elif isinstance(targets, str):
        report.notes.append(f"target_modules is the pattern {targets!r}, which was not checked")
    else:
        endings = tuple(f".{target}" for target in targets or [])
        if skipped := [module for module in adapter.modules if not f".{module}".endswith(endings)]:
            report.errors.append(f"PEFT would skip {skipped[0]}, which target_modules does not name: {rewrite}")
    initialization = adapter.config.get("init_lora_weights", True)
    if not initialization:  # null as well
        report.errors.append(
            f"init_lora_weights is {json.dumps(initialization)}, so PEFT would give layers without tensors random "
            f"weights: {rewrite}"
        )
    if initialization == "orthogonal" and any(adapter.rank_of(module) % 2 for module in adapter.modules):
        report.errors.append(
            f"init_lora_weights is orthogonal, which PEFT does not support for odd ranks: {rewrite}"
        )
