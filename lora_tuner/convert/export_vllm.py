"""Write an adapter under the names by which vLLM finds the layers of a multimodal wrapper.

An adapter that was trained on the text model alone has that model's names. vLLM loads it on the
wrapper without an error, and applies nothing (vllm#48019). Its tensors stay as they are, bit by
bit."""

import json
from pathlib import Path

from safetensors.torch import save_file

from .. import atomic_io
from ..adapters import compatibility
from ..adapters.adapter import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    Adapter,
    load_adapter_folder,
)
from ..adapters.library import copy_files
from ..config import ModelOptions
from ..errors import AdapterError
from ..models import loading, lora
from ..models.tokenizer import TokenizedBase, load_tokenizer
from .common import check_keeps_base, check_output_path

# Model type of a wrapper -> its text model, as transformers names it and vLLM maps it
# (`hf_to_vllm_mapper` in vllm/model_executor/models); most have the last of these.
_TEXT_MODELS = {
    "llama4": "language_model.model",
    "idefics3": "model.text_model",
    "smolvlm": "model.text_model",
}
_TEXT_MODEL = "model.language_model"


def to_vllm(
    adapter: Adapter, out: Path, *, overwrite: bool = False, options: ModelOptions = ModelOptions()
) -> Adapter:
    """Write a copy of an adapter with the names of the wrapper that its base is.

    Raises:
        AdapterError: vLLM loads it as it is, or does not load it under other names either; the
            adapter does not fit the base.
    """
    options.require_default("device", "dtype", "load_in", why="the base is not loaded for an export")
    check_output_path(out, "adapter folder", valid=(out / CONFIG_FILE).is_file(), overwrite=overwrite)
    if adapter.replaced:
        raise AdapterError(f"{adapter.path}: {compatibility.replaced_error(adapter, 'vLLM', adapter.name)}.")
    files = loading.base_for_adapter(adapter, options)
    check_keeps_base(out, files, [adapter])
    lora.check_base(adapter, TokenizedBase(files, load_tokenizer(files)), options)
    config = files.config()
    names = _wrapper_names(adapter, config)
    if not names:
        raise AdapterError(f"{adapter.name} has the names that vLLM expects on {files.name}: give it as it is.")
    with atomic_io.atomic_folder(out, overwrite=overwrite) as folder:
        copy_files(adapter, folder, TOKENIZER_FILES)
        tensors = {_rename(key, names): tensor for key, tensor in lora.read_weights_file(adapter).items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        patterns = {
            setting: {names[module]: value for module, value in values.items()}
            for setting, values in adapter.layer_patterns().items()
        }
        settings = adapter.config | patterns | {"target_modules": sorted(names.values())}
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        report = compatibility.check_compatibility(load_adapter_folder(folder), "vllm", adapter.name, config)
        if report.errors:
            raise AdapterError(f"{adapter.path}: {'; '.join(report.errors)}.")
    return load_adapter_folder(out)


def _wrapper_names(adapter: Adapter, config: compatibility.BaseConfig) -> dict[str, str]:
    """Name of each layer in the text model -> in the wrapper; empty where vLLM needs no others."""
    if not compatibility.is_wrapper(config) or all(map(compatibility.is_in_wrapper, adapter.modules)):
        return {}
    text_model = _TEXT_MODELS.get(str(config.get("model_type")), _TEXT_MODEL)
    return {module: f"{text_model}.{module.removeprefix('model.')}" for module in adapter.modules}


def _rename(key: str, names: dict[str, str]) -> str:
    """The key of a tensor, with the new name of its layer."""
    module = next(module for module in names if f".{module}." in key)
    return key.replace(f".{module}.", f".{names[module]}.", 1)
