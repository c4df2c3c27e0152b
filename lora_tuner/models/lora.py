"""Low-rank updates on a base: choose layers, wrap for training, attach a stored adapter, save, count.

Surprise: PEFT loads an adapter that lacks half of its tensors, or belongs to another model, without a word. So shapes are
compared with the base first, all of them, and one error lists what does not fit. Limit: updates of
linear layers (`nn.Linear`, and GPT-2's transposed `Conv1D`); embeddings and the output head stay as they are.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from ..adapters.adapter import CONFIG_FILE, SCALING_KEYS, WEIGHTS_FILE, Adapter, check_weights_hash
from ..config import ModelOptions, TrainConfig
from ..errors import AdapterError, ConfigError, Notice, WrongBaseError
from . import kernels
from .loading import LoadedBase
from .quantization import Int8Linear
from .resolve import BaseModelFiles, quiet_transformers

if TYPE_CHECKING:  # imported where it is used: writing does without
    from peft import LoraConfig, PeftModel


# Where it is installed PEFT imports it, and it has advice for everybody.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

ADAPTER_NAME = "default"  # Trainer reloads the best checkpoint only into an adapter of this name


def linear_layers(model: Any) -> dict[str, Any]:
    """Full name -> layer, for every linear layer of a plain base that can be adapted: all but the output head."""
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear | Conv1D | Int8Linear) and layer is not head
    }


def resolve_target_modules(model: Any, wanted: str) -> list[str]:
    """The shortest module names for PEFT's `target_modules` that mean just the layers `wanted` asks for.

    Raises ConfigError, with the names that exist, for a name that matches nothing or must not be adapted.
    """
    layers = linear_layers(model)
    if wanted in ("auto", "all-linear"):
        chosen = set(layers)
    elif wanted == "attention":
        chosen = {name for name in layers if any("attn" in part or "attention" in part for part in name.split("."))}
        if not chosen:
            raise ConfigError(f"No layer of this base is called attention; its layers are {_layer_kinds(layers)}.")
    else:
        names = [name.strip() for name in wanted.split(",")]
        wrong = [name for name in names if not any(_matches_target(layer, name) for layer in layers)]
        if wrong:
            raise ConfigError(
                f"target_modules: {', '.join(wrong)} cannot be adapted; auto, attention, all-linear, or any of {_layer_kinds(layers)} can "
                "(embeddings and the output head cannot: where they share weights, an update would not survive a merge)."
            )
        chosen = {layer for layer in layers if any(_matches_target(layer, name) for name in names)}
    return shortest_target_names(model, sorted(chosen))


def _matches_target(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _shortest_ending(layer: str, chosen: set[str], names: list[str]) -> str:
    """The shortest ending of a layer's name that no module outside `chosen` shares."""
    parts = layer.split(".")
    for length in range(1, len(parts)):
        ending = ".".join(parts[-length:])
        if all(other in chosen for other in names if _matches_target(other, ending)):
            return ending
    return layer


def _layer_kinds(layers: dict[str, Any]) -> str:
    last = {layer.rpartition(".")[2] for layer in layers}
    return ", ".join(sorted(last))


def shortest_target_names(model: Any, modules: list[str]) -> list[str]:
    """The shortest module names that mean just these layers."""
    names = [name for name, _ in model.named_modules()]
    return sorted({_shortest_ending(layer, set(modules), names) for layer in modules})


def add_lora(base: LoadedBase, config: TrainConfig, parent: Adapter | None = None) -> PeftModel:
    """The base with a trainable update of float32: a fresh one that does nothing yet, or that of the parent.

    Raises ConfigError for targets that do not exist, AdapterError for a parent that is damaged or does not fit.
    """
    from peft.tuners.lora import LoraLayer

    if parent is not None:
        targets = shortest_target_names(base.model, parent.modules)
        model = load_lora(
            base.model, parent, ADAPTER_NAME, target_modules=targets, lora_dropout=config.dropout, inference_mode=False
        )
    else:
        model = _new_lora(base, config)
    # PEFT has put the folder on this machine there.
    model.peft_config[ADAPTER_NAME].base_model_name_or_path = base.files.repo
    model.peft_config[ADAPTER_NAME].revision = base.files.revision
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            kernels.fuse_lora_add(layer, ADAPTER_NAME)
    return model


def _new_lora(base: LoadedBase, config: TrainConfig) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    targets = resolve_target_modules(base.model, config.target_modules)
    layers = linear_layers(base.model)
    halves = 2 if config.method == "pissa" else 1  # one that learns, and one that stands for the base (`methods`)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=halves * config.rank,
        lora_alpha=halves * config.scaling_alpha,
        use_rslora=config.method == "rslora",
        use_dora=config.method == "dora",
        lora_dropout=config.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    try:
        with quiet_transformers():
            return get_peft_model(base.model, settings, adapter_name=ADAPTER_NAME)
    except ValueError as error:
        raise ConfigError(f"target_modules: {' '.join(str(error).split())}") from error


def library_versions() -> dict[str, str]:
    """Of the libraries that decide what an adapter becomes."""
    import accelerate
    import datasets
    import peft
    import transformers

    return {it.__name__: it.__version__ for it in (torch, transformers, peft, datasets, accelerate)}


def count_parameters(model: PeftModel) -> tuple[int, int]:
    """(parameters that are trained, parameters of the base)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Of 4 bits two share a byte, and the byte is what torch counts.
    every = sum(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in model.parameters())
    return trained, every - trained


def adapter_state_dict(model: PeftModel) -> dict[str, torch.Tensor]:
    """The tensors of the adapter that is trained, as PEFT names them on disk, on the CPU."""
    from peft import get_peft_model_state_dict

    # Not of the whole state: a split base would let go of what others hold. "auto" would ask the Hub for the vocabulary.
    learnt = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    state = get_peft_model_state_dict(model, learnt, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}


def save_adapter_files(tensors: dict[str, torch.Tensor], config: LoraConfig, folder: Path) -> None:
    """Write the two files of a PEFT adapter. What is written says `init_lora_weights: true`, which touches no base."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    settings = config.to_dict() | {"inference_mode": True, "init_lora_weights": True}
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    # Sorted here and not by json: of a pattern's keys the first that matches counts.
    (folder / CONFIG_FILE).write_text(json.dumps(dict(sorted(settings.items())), indent=2) + "\n", encoding="utf-8")


def check_base(adapter: Adapter, base: LoadedBase, options: ModelOptions = ModelOptions()) -> None:
    """Raise WrongBaseError unless the adapter was trained on this base; one without a manifest is taken with a notice."""
    check_base_files(adapter, base.files, base.tokenizer_hash, options)


def check_base_files(
    adapter: Adapter,
    source: BaseModelFiles,
    tokenizer: str | None,
    options: ModelOptions = ModelOptions(),
) -> None:
    """The same of a base that is not in memory; `tokenizer` is the hash of its tokenizer, None where that does not matter."""
    if adapter.manifest is None:
        options.notify(
            Notice(f"{adapter.name} has no manifest, so only its shapes can be compared with {source.name}.")
        )
        return
    facts = adapter.manifest.base
    if facts.fingerprint != source.fingerprint:
        what = (
            f"{adapter.name} was trained on {facts.name} (fingerprint {facts.fingerprint[:12]}, {facts.weights}), not on "
            f"{source.name} (fingerprint {source.fingerprint[:12]}, {source.weights_source})"
        )
    elif tokenizer is not None and facts.tokenizer not in (None, tokenizer):
        what = f"{adapter.name} was trained with another tokenizer than that of {source.name}"
    else:
        return
    if not options.force:
        raise WrongBaseError(f"{what}. Give the right one with --base, or try all the same with --force.")
    options.notify(Notice(f"FORCED: {what}. What it writes may mean nothing."))


def load_checkpoint_weights(model: PeftModel, folder: Path) -> None:
    """Put the weights of a checkpoint into the update that is being trained."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, load_file(folder / WEIGHTS_FILE), adapter_name=ADAPTER_NAME)


def layer_sizes(layers: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of each layer."""
    return {
        name: (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
        for name, layer in layers.items()
    }


def read_checked_tensors(adapter: Adapter, layers: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The adapter's tensors, by their names in the file. Raises AdapterError unless they are whole and fit these layers."""
    adapter.check_shapes(layer_sizes(layers))
    path = adapter.path / WEIGHTS_FILE
    before = _file_identity(path)
    check_weights_hash(adapter)
    tensors = read_weights_file(adapter)
    if _file_identity(path) != before or {name: tuple(tensor.shape) for name, tensor in tensors.items()} != {
        name: shape for name, (_, shape) in adapter.tensors.items()
    }:
        raise AdapterError(f"{adapter.path} has changed since it was read: read it again.")
    return tensors


def _file_identity(path: Path) -> tuple[int, ...]:
    try:
        facts = path.stat()
    except OSError:
        return ()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def read_weights_file(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The tensors of an adapter as they are in its file. Raises AdapterError where safetensors does not take it."""
    try:
        return load_file(adapter.path / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{adapter.path / WEIGHTS_FILE} is not readable as safetensors: {error}.") from error


def load_lora(model: Any, adapter: Adapter, slot: str, **settings: Any) -> PeftModel:
    """Wrap a plain base with a stored adapter under the name `slot`; `settings` are laid over those of its config.

    Raises AdapterError, and leaves the base as it was, when the adapter does not fit.
    """
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    tensors = read_checked_tensors(adapter, linear_layers(model))
    own: dict[str, Any] = {
        key: adapter.config[key] for key in (*SCALING_KEYS, "fan_in_fan_out") if adapter.config.get(key) is not None
    }
    plain: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": adapter.modules, "inference_mode": True}
    with quiet_transformers(), torch.random.fork_rng():
        wrapped = PeftModel(model, LoraConfig(**plain | own | settings), adapter_name=slot)
        set_peft_model_state_dict(wrapped, tensors, adapter_name=slot)
    return wrapped.eval()
