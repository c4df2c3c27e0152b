"""Check whether an adapter, or base and adapter as one model, can be exported to GGUF.

The rules come from llama.cpp's sources of November 2026 (`llama_cpp`). A tokenizer and a chat
template are checked by `convert/model_check.py`.
"""

import hashlib
import importlib.util

from . import llama_cpp
from .adapter import WEIGHTS_FILE, Adapter
from .base_config import BaseConfig, text_settings
from .compatibility_report import (
    CompatibilityReport,
    advise_merge,
    is_gpt2,
    note_unknown_base,
    replaced_error,
)
from .safetensors_header import read_safetensors_header

_LIBRARY = "xllamacpp"


def check_llama_cpp(
    adapter: Adapter, name: str, base_config: BaseConfig | None, report: CompatibilityReport
) -> None:
    """Add what llama.cpp has no place for."""
    supported = ", ".join(llama_cpp.ARCHITECTURES)
    architectures = list(llama_cpp.ARCHITECTURES.values())
    if base_config is None:
        note_unknown_base(adapter, report)
    elif architecture := llama_cpp.find_architecture(base_config):
        architectures = [architecture]
    else:
        architectures = []
        report.errors.append(
            f"its base is of type {base_config.get('model_type')}, and only adapters of {supported} can be exported: "
            f"{advise_merge(name)}, then convert the result with llama.cpp's script"
        )
    if adapter.config.get("use_dora"):
        report.errors.append(f"llama.cpp does not support DoRA: {advise_merge(name)}")
    if adapter.replaced:
        report.errors.append(replaced_error(adapter, "llama.cpp", name))
    unknown = [
        [module for module in adapter.modules if not architecture.has_layer(module)]
        for architecture in architectures
    ]
    if unknown and all(unknown):
        report.errors.append(
            f"layers such as {min(unknown, key=len)[0]} cannot be converted for llama.cpp: {advise_merge(name)}"
        )
    if report.errors:
        return
    bases = f", on a base of {supported}" if base_config is None else ""
    report.notes.append(
        f"llama.cpp loads a GGUF file (`python cli.py export {name} --to gguf --out {name}.gguf`){bases}"
    )
    if is_gpt2(adapter) or adapter.config.get("use_rslora") or adapter.config.get("alpha_pattern"):
        report.notes.append("llama.cpp's own converter silently gets this adapter wrong: use `export`")


def check_merged(
    adapter: Adapter, name: str, base_config: BaseConfig | None, report: CompatibilityReport
) -> None:
    """Add what llama.cpp does not compute of base and adapter as one model."""
    if base_config is None:
        note_unknown_base(adapter, report)
        report.notes.append(f"models of {', '.join(llama_cpp.ARCHITECTURES)} are exported")
    else:
        changes = {"tie_word_embeddings": False} if _is_untied(adapter) else {}
        for problem in find_model_problems(base_config, changes):
            report.errors.append(f"{problem}: {advise_merge(name)}, for llama.cpp's own script or other tools")
    if importlib.util.find_spec(_LIBRARY) is None:
        report.notes.append("the export needs llama.cpp's library: pip install 'lora_tuner[gguf]' or xllamacpp")


def check_ollama(
    adapter: Adapter, name: str, base_config: BaseConfig | None, report: CompatibilityReport
) -> None:
    """Add what a folder for Ollama is refused for: the reasons for the model in it, and in a note
    those for adapter and base as two files."""
    check_merged(adapter, name, base_config, report)
    if reasons := two_file_errors(adapter, name, base_config):
        report.notes.append(f"only as one model, not with --no-merged: {'; '.join(reasons)}")


def two_file_errors(adapter: Adapter, name: str, base_config: BaseConfig | None) -> list[str]:
    """Reasons why an adapter cannot be exported beside its base for Ollama."""
    report = CompatibilityReport("llama.cpp", [], [], base_config is not None)
    check_llama_cpp(adapter, name, base_config, report)
    if (base_config or {}).get("quantization_config"):
        report.errors.append("the weights of its base are quantized, and only a merged model is without")
    return report.errors


def find_model_problems(base_config: BaseConfig, changes: BaseConfig) -> list[str]:
    """Reasons why a model cannot be written as GGUF, from its config.json as it stands.

    Args:
        base_config: the config.json.
        changes: settings that a merged model has otherwise.
    """
    architecture = llama_cpp.find_architecture(base_config)
    if architecture is None:
        return [llama_cpp.unknown_type(base_config)]
    config = {**architecture.defaults, **text_settings(base_config), **changes}
    scaling = config.get("rope_scaling")
    if "rope_parameters" not in config and isinstance(scaling, dict):  # before transformers 5
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if architecture.name == "phi3" and kind in ("su", "yarn"):
            kind = "longrope"
        config["rope_parameters"] = {"full_attention": {**scaling, "rope_type": kind}}
    return llama_cpp.model_problems(architecture, config)


def _is_untied(adapter: Adapter) -> bool:
    """True where merging unties the output head: PEFT has trained a copy of it or of the embeddings
    alone, or two that differ."""
    copies = sorted(adapter.replaced.copies & adapter.replaced.sizes.keys())
    if len(copies) < 2:
        return bool(copies)
    path = adapter.path / WEIGHTS_FILE
    entries, start = read_safetensors_header(path)
    with path.open("rb") as file:
        hashes = set()
        for module in copies:
            _, _, begin, end = entries[adapter.replaced.modules[module]["weight"]]
            file.seek(start + begin)
            hashes.add(hashlib.sha256(file.read(end - begin)).hexdigest())
    return len(hashes) > 1
