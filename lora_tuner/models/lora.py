"""LoRA layers on a base model: add, load, save and check an adapter.

Surprise: PEFT silently loads an adapter that lacks tensors or belongs to another model. So all
shapes are compared with the base first, and one error lists what does not fit. Limit: LoRA on
linear layers (`nn.Linear`, and GPT-2's transposed `Conv1D`) and on experts (`experts`); embeddings
and the output head cannot be adapted.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, check_weights_hash
from ..adapters.expert_names import INNER
from ..adapters.peft_config import SCALING_KEYS
from ..config import ModelOptions, TrainConfig
from ..errors import AdapterError, ConfigError, Notice, WrongBaseError, is_out_of_memory
from ..text import format_names
from . import fsdp, kernels
from .base_files import quiet_transformers
from .layers import Layer, adaptable_layers, has_transposed_layers, layer_sizes, weight_count
from .loading import LoadedBase
from .replacement import peft_rows
from .targets import TargetModules, resolve_target_modules, shortest_target_names
from .tokenizer import TokenizedBase

if TYPE_CHECKING:  # PEFT takes long to import, and inference does without
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER_NAME = "default"  # Trainer reloads the best checkpoint only into an adapter of this name

# bitsandbytes logs advice when PEFT imports it, and at every 8-bit product.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def add_lora(
    base: LoadedBase,
    config: TrainConfig,
    parent: Adapter | None = None,
    targets: TargetModules | None = None,
    token_indices: list[int] | dict[str, list[int]] | None = None,
) -> PeftModel:
    """Add trainable LoRA layers in float32 to a base, and rows of tokens (`added_tokens`).

    Without a parent they are new and change nothing yet. Without `targets` the layers are those
    that the configuration names.

    Raises:
        ConfigError: target modules do not exist.
        AdapterError: the parent is damaged or does not fit.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear as LoraLinear

    if parent is not None:
        linear, experts = shortest_target_names(base.model, parent.modules)
        model = load_lora(
            base.model,
            parent,
            ADAPTER_NAME,
            target_modules=linear,
            target_parameters=experts or None,
            lora_dropout=config.dropout,
            inference_mode=False,
            trainable_token_indices=token_indices,
        )
    else:
        targets = targets or resolve_target_modules(base.model, config.target_modules)
        # PiSSA needs a second half that cancels what the first begins with (`initialization`).
        multiple = 2 if config.method == "pissa" else 1
        settings = LoraConfig(
            task_type="CAUSAL_LM",
            r=multiple * config.rank,
            lora_alpha=multiple * config.scaling_alpha,
            use_rslora=config.method == "rslora",
            use_dora=config.method == "dora",
            lora_dropout=config.dropout,
            target_modules=targets.linear,
            target_parameters=targets.experts or None,
            fan_in_fan_out=has_transposed_layers(base.model),
            trainable_token_indices=token_indices,
        )
        try:
            with quiet_transformers():
                model = get_peft_model(base.model, settings, adapter_name=ADAPTER_NAME)
        except ValueError as error:
            raise ConfigError(f"target_modules: {' '.join(str(error).split())}") from error
        if wrong := _other_layers(model, targets.modules):
            raise ConfigError(f"target_modules: PEFT adapts {wrong}: name other --target-modules.")
    # PEFT stores the local folder of the base here.
    model.peft_config[ADAPTER_NAME].base_model_name_or_path = base.files.repo
    model.peft_config[ADAPTER_NAME].revision = base.files.revision
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            kernels.fuse_lora_add(layer, ADAPTER_NAME)
    return model


def check_experts_supported(config: TrainConfig, targets: TargetModules) -> None:
    """Raise ConfigError if experts are adapted with settings that PEFT does not support on
    parameters (`ParamWrapper` in peft/tuners/lora/layer.py of PEFT 0.21), or with a sharded
    base."""
    if not targets.experts:
        return
    problem = ""
    if config.dropout:
        problem = "there is no dropout for experts in PEFT: leave out --dropout"
    elif config.method == "dora":
        problem = "there is no DoRA for experts in PEFT: choose another --method"
    elif fsdp.shard_count() > 1:
        problem = "a step holds the changed weights of all experts, which FSDP does not shard: train without it"
    if problem:
        advice = ""  # the layers of a parent are its own
        if config.parent is None and targets.linear:
            advice = f", or go on without them: --target-modules {','.join(targets.linear)}"
        raise ConfigError(f"{format_names(targets.experts)} would be adapted, and {problem}{advice}.")


def load_lora(model: PreTrainedModel, adapter: Adapter, adapter_name: str, **overrides: Any) -> PeftModel:
    """Wrap a plain base with a stored adapter.

    Args:
        model: a plain base. It is left unchanged on errors.
        adapter: the stored adapter.
        adapter_name: its name inside the PEFT model.
        **overrides: fields of LoraConfig that replace those of the adapter.

    Raises:
        AdapterError: the adapter is damaged or does not fit.
    """
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    tensors = read_checked_tensors(adapter, adaptable_layers(model))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in adapter.replaced.tensors}
    settings = {
        "task_type": "CAUSAL_LM",
        "target_modules": [name for name in adapter.modules if name not in adapter.experts],
        "target_parameters": adapter.experts or None,
        "inference_mode": True,
        **{
            key: adapter.config[key]
            for key in (*SCALING_KEYS, *(["fan_in_fan_out"] if has_transposed_layers(model) else []))
            if adapter.config.get(key) is not None
        },
        **adapter.layer_patterns(),
        **overrides,
    }
    with quiet_transformers(), torch.random.fork_rng():
        wrapped = PeftModel(model, LoraConfig(**settings), adapter_name=adapter_name)
        if wrong := _other_layers(wrapped, adapter.modules):
            raise AdapterError(f"{adapter.path} does not fit the base as PEFT reads it: it adapts {wrong}.")
        tensors |= peft_rows(wrapped)  # which the caller sets
        result: Any = set_peft_model_state_dict(wrapped, tensors, adapter_name=adapter_name)
    if lost := result.unexpected_keys:
        wrapped.unload()
        raise AdapterError(f"{adapter.path} does not fit the base: PEFT reads {lost[0]}, which it does not have.")
    return wrapped.eval()


def load_checkpoint_weights(model: PeftModel, folder: Path) -> None:
    """Load the LoRA weights of a checkpoint into the adapter that is being trained."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, load_file(folder / WEIGHTS_FILE), adapter_name=ADAPTER_NAME)


def adapted_layers(model: PeftModel) -> set[str]:
    """Full names of the layers with LoRA, as in the plain base."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    names = set()
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            parameter = f".{layer.parameter_name}" if isinstance(layer, ParamWrapper) else ""
            names.add(name.removeprefix("base_model.model.").replace(INNER, "") + parameter)
    return names


def adapter_state_dict(model: PeftModel) -> dict[str, torch.Tensor]:
    """Tensors of the adapter in training, on the CPU, by the names that PEFT uses on disk."""
    from peft import get_peft_model_state_dict

    # Trained parameters only: FSDP would gather a whole state dict. "auto" would ask the Hub for
    # the vocabulary size.
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = get_peft_model_state_dict(model, trained, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}


def save_adapter_files(tensors: dict[str, torch.Tensor], config: PeftConfig, folder: Path) -> None:
    """Write the two files of a PEFT adapter.

    `init_lora_weights` is saved as true, which leaves the base unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    settings = config.to_dict() | {"inference_mode": True, "init_lora_weights": True}
    # Only the top level is sorted: in a pattern the first key that matches counts. Sets become lists.
    (folder / CONFIG_FILE).write_text(
        json.dumps(dict(sorted(settings.items())), indent=2, default=sorted) + "\n", encoding="utf-8"
    )


def check_reload(model: PeftModel, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Load a saved adapter as PEFT does, into a base without weights, and compare it.

    Args:
        model: the model whose adapter was saved.
        tensors: the tensors that were saved.
        folder: the files of the adapter.

    Raises:
        AdapterError: PEFT cannot load it, or other tensors come back.
    """
    from peft import (
        PeftConfig,
        PeftModel,
        get_peft_model_state_dict,
        load_peft_weights,
        set_peft_model_state_dict,
    )
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    base: Any = model.get_base_model()
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                plain = type(base)._from_config(copy.deepcopy(base.config), attn_implementation="eager")
            config = PeftConfig.from_pretrained(str(folder))
            loaded = PeftModel(plain, config, ADAPTER_NAME, low_cpu_mem_usage=True)
            for layer in loaded.modules():
                if isinstance(layer, TrainableTokensLayer):
                    delta = layer.trainable_tokens_delta
                    delta[ADAPTER_NAME] = torch.nn.Parameter(torch.full(delta[ADAPTER_NAME].shape, torch.nan))
                if isinstance(layer, LoraLayer):
                    for name in layer.adapter_layer_names:
                        for parameter in getattr(layer, name).to_empty(device="cpu").parameters():
                            parameter.detach().fill_(torch.nan)
            set_peft_model_state_dict(loaded, load_peft_weights(str(folder), device="cpu"), ADAPTER_NAME)
        state = get_peft_model_state_dict(loaded, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    except Exception as error:  # of any type, as each layer has its own checks
        if is_out_of_memory(error):
            raise
        raise AdapterError(f"PEFT does not load it: {' '.join(str(error).split())}") from error
    if different := sorted(
        name
        for name in tensors.keys() | state.keys()
        if name not in tensors or name not in state or not _is_identical(tensors[name], state[name])
    ):
        raise AdapterError(
            f"PEFT loads {len(different)} of {len(tensors)} tensors otherwise, such as {different[0]}"
        )


def _is_identical(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.dtype == other.dtype and torch.equal(tensor, other)


def count_parameters(model: PeftModel) -> tuple[int, int]:
    """(trained parameters, parameters of the base)."""
    trained, total = 0, 0
    for parameter in model.parameters():
        total += weight_count(parameter)
        trained += parameter.numel() if parameter.requires_grad else 0
    return trained, total - trained


def check_base(adapter: Adapter, base: TokenizedBase, options: ModelOptions = ModelOptions()) -> None:
    """Check that an adapter was trained on this base, tokenizer and, if on conversations, template.

    Without a manifest that is unknown: a notice says so. `options.force` turns the error into a
    notice.

    Raises:
        WrongBaseError: the adapter was trained on another base, tokenizer or chat template.
    """
    files = base.files
    if adapter.manifest is None:
        options.notify(
            Notice(
                f"{adapter.name} has no manifest, so only its shapes can be compared with "
                f"{files.name}.{adapter.ignored_note}"
            )
        )
        return
    trained_on, schema_version = adapter.manifest.base, adapter.manifest.schema_version
    given = base.info(with_template=True, schema_version=schema_version)
    if trained_on.fingerprint != given.fingerprint:
        problem = (
            f"{adapter.name} was trained on {trained_on.name} (fingerprint "
            f"{trained_on.fingerprint[:12]}, {trained_on.weights}), not on {files.name} "
            f"(fingerprint {given.fingerprint[:12]}, {files.weights_source})"
        )
    elif _differ(trained_on.tokenizer, given.tokenizer):
        problem = f"{adapter.name} was trained with another tokenizer than that of {files.name}"
    elif _differ(trained_on.chat_template, given.chat_template):
        problem = f"{adapter.name} was trained with another chat template than that of {files.name}"
    else:
        if schema_version == 1:
            options.notify(
                Notice(
                    f"{adapter.name} is of an older version, whose manifest says less about the "
                    f"base: of {files.name} the weights, some settings and the vocabulary were "
                    "compared."
                )
            )
        return
    if not options.force:
        raise WrongBaseError(f"{problem}. Name the right base with --base, or use --force to try it anyway.")
    options.notify(Notice(f"FORCED: {problem}. Its output may be meaningless."))


def _differ(recorded: str | None, given: str | None) -> bool:
    """True for two hashes that are known and not the same."""
    return recorded is not None and given is not None and recorded != given


def read_checked_tensors(adapter: Adapter, layers: Mapping[str, Layer]) -> dict[str, torch.Tensor]:
    """Tensors of an adapter, by their names in the file.

    Raises:
        AdapterError: they are damaged, do not fit these layers, or the file has changed since the
            adapter was opened.
    """
    adapter.check_shapes(layer_sizes(layers))
    path = adapter.path / WEIGHTS_FILE
    before = _file_identity(path)
    check_weights_hash(adapter)
    tensors = read_weights_file(adapter)
    expected_shapes = {name: shape for name, (_, shape) in adapter.tensors.items()}
    if (
        _file_identity(path) != before
        or {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected_shapes
    ):
        raise AdapterError(f"{adapter.path} has changed since it was opened: open it again.")
    return tensors


def read_weights_file(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Tensors of an adapter as in its file. Raises AdapterError for an unreadable file."""
    try:
        return load_file(adapter.path / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{adapter.path / WEIGHTS_FILE} is not readable as safetensors: {error}.") from error


def library_versions() -> dict[str, str]:
    """Versions of the libraries that determine the weights of an adapter."""
    import accelerate
    import datasets
    import peft
    import transformers

    return {
        library.__name__: library.__version__ for library in (torch, transformers, peft, datasets, accelerate)
    }


def _other_layers(model: PeftModel, modules: Sequence[str]) -> str | None:
    """Describe what PEFT adapts other than the layers that were chosen, and remove it then.

    PEFT puts names of experts in transformers 4 in place of the names that it is given.
    """
    different = adapted_layers(model) ^ set(modules)
    if not different:
        return None
    model.unload()
    return f"other layers ({', '.join(sorted(different)[:3])})"


def _file_identity(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
