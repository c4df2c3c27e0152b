"""Write an adapter under the names by which vLLM finds the layers of a multimodal wrapper.

An adapter that was trained on the text model alone has that model's names. vLLM loads it on the
wrapper without an error, and applies nothing (vllm#48019). Its tensors stay as they are, bit by
bit."""

import json
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from .. import atomic_io
from ..adapters import base_config, compatibility
from ..adapters.adapter import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    Adapter,
    check_weights_hash,
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
            adapter is damaged, or does not fit the base.
    """
    options.require_default("device", "dtype", "load_in", why="the base is not loaded for an export")
    check_output_path(out, "adapter folder", valid=(out / CONFIG_FILE).is_file(), overwrite=overwrite)
    if options.base is None:  # before anything is downloaded
        _require_loadable(adapter, base_config.find_base_config(adapter))
    check_weights_hash(adapter)
    files = loading.base_for_adapter(adapter, options)
    check_keeps_base(out, files, [adapter])
    lora.check_base(adapter, TokenizedBase(files, load_tokenizer(files)), options)
    config = files.config()
    _require_loadable(adapter, config)
    names = _wrapper_names(adapter, config)
    if not names:
        raise AdapterError(f"{adapter.name} has the names that vLLM expects on {files.name}: give it as it is.")
    with atomic_io.atomic_folder(out, overwrite=overwrite) as folder:
        copy_files(adapter, folder, TOKENIZER_FILES)
        tensors = {_rename(key, names): tensor for key, tensor in lora.read_weights_file(adapter).items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        settings = _with_names(adapter, names).config
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        report = compatibility.check_compatibility(load_adapter_folder(folder), "vllm", adapter.name, config)
        compatibility.raise_errors(adapter, report)
    return load_adapter_folder(out)


def _require_loadable(adapter: Adapter, config: base_config.BaseConfig | None) -> None:
    """Raise AdapterError if vLLM does not load the adapter under the names of the wrapper either."""
    renamed = _with_names(adapter, _wrapper_names(adapter, config or {}))
    compatibility.raise_errors(adapter, compatibility.check_compatibility(renamed, "vllm", base_config=config))


def _with_names(adapter: Adapter, names: dict[str, str]) -> Adapter:
    """The adapter as it is under other names of its layers, without its tensors."""
    if not names:
        return adapter
    patterns = {
        setting: {names[module]: value for module, value in values.items()}
        for setting, values in adapter.layer_patterns().items()
    }
    settings = adapter.config | patterns | {"target_modules": sorted(names.values())}
    tensors = {_rename(key, names): entry for key, entry in adapter.tensors.items()}
    return replace(adapter, config=settings, tensors=tensors)


def _wrapper_names(adapter: Adapter, config: base_config.BaseConfig) -> dict[str, str]:
    """Name of each layer in the text model -> in the wrapper; empty where vLLM needs no others."""
    if not base_config.is_wrapper(config) or all(map(base_config.is_in_wrapper, adapter.modules)):
        return {}
    text_model = _TEXT_MODELS.get(str(config.get("model_type")), _TEXT_MODEL)
    return {module: f"{text_model}.{module.removeprefix('model.')}" for module in adapter.modules}


def _rename(key: str, names: dict[str, str]) -> str:
    """The key of a tensor, with the new name of its layer."""
    module = next(module for module in names if f".{module}." in key)
    return key.replace(f".{module}.", f".{names[module]}.", 1)
