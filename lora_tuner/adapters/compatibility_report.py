"""Result of a compatibility check, and sentences that the checks of several tools share."""

from dataclasses import dataclass
from typing import Literal

from ..text import display_name
from . import llama_cpp
from .adapter import Adapter

# The names of `export --to` and of `adapters check --for`; `gguf` is an adapter for llama.cpp,
# `gguf-merged` base and adapter as one model.
Tool = Literal["vllm", "llama.cpp", "gguf", "gguf-merged", "ollama", "mlx", "peft"]


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


def is_gpt2(adapter: Adapter) -> bool:
    """Check for layers of GPT-2, whose weights are stored transposed."""
    return any(llama_cpp.ARCHITECTURES["gpt2"].has_layer(module) for module in adapter.modules)


def advise_merge(name: str) -> str:
    """Advice to use the adapter as a part of a whole model."""
    return f"merge it (`python cli.py merge {name} --out merged/{name}`)"


def replaced_error(adapter: Adapter, tool: str, name: str) -> str:
    """Error of a tool that takes LoRA pairs alone, for an adapter with other weights beside them."""
    return f"{tool} does not load what replaces weights of the base ({adapter.replaced}): {advise_merge(name)}"


def note_unknown_base(adapter: Adapter, report: CompatibilityReport) -> None:
    """Say that the base could not be examined."""
    base = display_name(adapter.base) or "its base"
    report.notes.append(f"{base} is not on this machine, so its architecture was not checked")
