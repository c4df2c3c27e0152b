"""Whether other tools take an adapter, judged by its config and by the header of its weights alone.

What is said of vLLM and llama.cpp was read in their sources of November 2026 (vLLM 0.33). Limit: the base is not looked at,
nor is the version of the tool that somebody has.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .adapter import Adapter

Tool = Literal["vllm", "llama.cpp", "peft"]
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be; 1 as well, for which 8 does
_LLAMA = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_GPT2 = re.compile(r"transformer\.h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))")


@dataclass(frozen=True)
class CompatibilityReport:
    """`obstacles` say what is not taken and what to change; `notes` what to know where it is taken."""

    tool: Tool
    errors: list[str]
    notes: list[str]

    @property
    def accepted(self) -> bool:
        return not self.errors


def check_compatibility(adapter: Adapter, tool: Tool, name: str | None = None) -> CompatibilityReport:
    """`name` is what the advice calls it, where that is not its folder's name."""
    found = CompatibilityReport(tool, [], [])
    judges: dict[str, Callable[[Adapter, str, CompatibilityReport], None]] = {
        "vllm": _vllm,
        "llama.cpp": _llama_cpp,
        "peft": _peft,
    }
    judges[tool](adapter, name or adapter.name, found)
    return found


def is_gpt2(adapter: Adapter) -> bool:
    """Whether its layers are GPT-2's, which are stored transposed."""
    return any(_GPT2.fullmatch(module) for module in adapter.modules)


def vllm_rank(adapter: Adapter) -> int | None:
    """The least --max-lora-rank with which vLLM takes it; None where there is none."""
    most = max(adapter.rank_of(module) for module in adapter.modules)
    return next((rank for rank in VLLM_RANKS if rank >= most), None)


def _advise_merge(name: str) -> str:
    return f"merge it (`python cli.py merge {name} --out merged/{name}`)"


def _advise_retrain(name: str) -> str:
    return f"write it anew (`python cli.py blend {name}=1 --name NEW`)"


def _vllm(adapter: Adapter, name: str, found: CompatibilityReport) -> None:
    if is_gpt2(adapter):
        found.errors.append(f"vLLM has no LoRA for GPT-2: {_advise_merge(name)}")
    if adapter.config.get("use_dora"):
        found.errors.append(f"vLLM has no DoRA: {_advise_merge(name)}")
    if (rank := vllm_rank(adapter)) is None:
        most = VLLM_RANKS[-1]
        found.errors.append(
            f"vLLM takes ranks up to {most}: cut it (`python cli.py blend {name}=1 --rank {most} --name NEW`)"
        )
    elif rank > 16:
        found.notes.append(f"start vLLM with --max-lora-rank {rank}: by itself it takes 16")
    if adapter.config.get("rank_pattern") or adapter.config.get("alpha_pattern"):
        found.notes.append("its layers differ in rank or scale, which vLLM 0.33 reads; older ones may ignore it")


def _llama_cpp(adapter: Adapter, name: str, found: CompatibilityReport) -> None:
    if adapter.config.get("use_dora"):
        found.errors.append(f"llama.cpp has no DoRA: {_advise_merge(name)}")
    unknown = [it for it in adapter.modules if not _LLAMA.fullmatch(it) and not _GPT2.fullmatch(it)]
    if unknown:
        found.errors.append(
            f"how llama.cpp calls and turns layers such as {unknown[0]} is not known here: {_advise_merge(name)}"
        )
    found.notes.append(
        f"it takes a GGUF file (`python cli.py export {name} --to gguf --out {name}.gguf`), over a base of the kind of GPT-2, "
        "Llama, Mistral or Qwen2"
    )
    if is_gpt2(adapter) or adapter.config.get("use_rslora") or adapter.config.get("alpha_pattern"):
        found.notes.append("llama.cpp's own converter would get this one wrong without a word: use `export`")


def _peft(adapter: Adapter, name: str, found: CompatibilityReport) -> None:
    """PEFT adapts the layers that `target_modules` names, and drops the tensors of others without a word."""
    targets = adapter.config.get("target_modules")
    if targets == "all-linear":
        if left_out := [it for it in adapter.modules if it.rpartition(".")[2] == "lm_head"]:
            found.errors.append(
                f"PEFT would leave out {left_out[0]}, which is not in all-linear: name each layer in adapter_config.json"
            )
    elif isinstance(targets, str):
        found.notes.append(f"target_modules is the pattern {targets!r}, which was not tried")
    else:
        named = [str(target) for target in targets or []]
        left_out = [it for it in adapter.modules if not any(f".{it}".endswith(f".{last}") for last in named)]
        if left_out:
            found.errors.append(
                f"PEFT would leave out {left_out[0]}, which target_modules does not name: {_advise_retrain(name)}"
            )
    start = adapter.config.get("init_lora_weights", True)
    if not start:  # null as well
        found.errors.append(
            f"init_lora_weights is {json.dumps(start)}, and PEFT would fill layers without tensors at random: {_advise_retrain(name)}"
        )
    if start == "orthogonal" and any(adapter.rank_of(it) % 2 for it in adapter.modules):
        found.errors.append(
            f"init_lora_weights is orthogonal, which PEFT has not for an odd rank: {_advise_retrain(name)}"
        )
