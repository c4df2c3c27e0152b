"""Low-rank updates on a base: choose layers, wrap for training, attach a stored adapter, save, count.

Surprise: PEFT loads an adapter that lacks half of its tensors, or belongs to another model, without a word. So shapes are
compared with the base first, all of them, and one error lists what does not fit. Limit: one kind of update, LoRA on
linear layers (`nn.Linear`, and GPT-2's transposed `Conv1D`); embeddings and the output head stay as they are.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from . import store
from .base_model import Base, find_base, load_base, quiet
from .config import TrainConfig
from .errors import AdapterError, ConfigError, Listener, Notice, WrongBaseError, ignore
from .store import Adapter

TRAINED = "default"  # Trainer reloads the best checkpoint only into an adapter of this name

_PART = re.compile(r"\.base_layer$|\.lora_")  # inside a layer that PEFT has wrapped


def linear_layers(model: Any) -> dict[str, Any]:
    """Full name -> layer, for every linear layer that can be adapted. The output head is not among them.

    On a model that carries adapters already, the layers are those below them.
    """
    head = model.get_output_embeddings()
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            layers[name] = layer.get_base_layer()
        elif isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head and not _PART.search(name):
            layers[name] = layer
    return layers


def resolve_targets(model: Any, wanted: str) -> list[str]:
    """The shortest module names for PEFT's `target_modules` that mean just the layers `wanted` asks for.

    Raises ConfigError, with the names that exist, for a name that matches nothing or must not be adapted.
    """
    layers = linear_layers(model)
    if wanted in ("auto", "all-linear"):
        chosen = set(layers)
    elif wanted == "attention":
        chosen = {name for name in layers if any("attn" in part or "attention" in part for part in name.split("."))}
        if not chosen:
            raise ConfigError(f"No layer of this base is called attention; its layers are {_names(layers)}.")
    else:
        names = [name.strip() for name in wanted.split(",")]
        wrong = [name for name in names if not any(_matches(layer, name) for layer in layers)]
        if wrong:
            raise ConfigError(
                f"targets: {', '.join(wrong)} cannot be adapted; auto, attention, all-linear, or any of {_names(layers)} can "
                "(embeddings and the output head cannot: where they share weights, an update would not survive a merge)."
            )
        chosen = {layer for layer in layers if any(_matches(layer, name) for name in names)}
    names = [name for name, _ in model.named_modules()]
    return sorted({_short(layer, chosen, names) for layer in chosen})


def _matches(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _short(layer: str, chosen: set[str], names: list[str]) -> str:
    """The shortest ending of a layer's name that no module outside `chosen` shares."""
    parts = layer.split(".")
    for length in range(1, len(parts)):
        ending = ".".join(parts[-length:])
        if all(other in chosen for other in names if _matches(other, ending)):
            return ending
    return layer


def _names(layers: dict[str, Any]) -> str:
    last = {layer.rpartition(".")[2] for layer in layers}
    return ", ".join(sorted(last))


def wrap(base: Base, config: TrainConfig) -> PeftModel:
    """The base with a fresh, trainable update of float32 that does nothing yet."""
    targets = resolve_targets(base.model, config.targets)
    layers = linear_layers(base.model)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.scaling_alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    try:
        with quiet():
            model = get_peft_model(base.model, settings, adapter_name=TRAINED)
    except ValueError as error:
        raise ConfigError(f"targets: {' '.join(str(error).split())}") from error
    # PEFT has put the folder on this machine there.
    model.peft_config[TRAINED].base_model_name_or_path = base.source.repo
    model.peft_config[TRAINED].revision = base.source.revision
    return model


def counts(model: PeftModel) -> tuple[int, int]:
    """(parameters that are trained, parameters of the base)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters()) - trained


def weights(model: PeftModel, slot: str = TRAINED) -> dict[str, torch.Tensor]:
    """The tensors of one adapter as PEFT names them on disk, on the CPU."""
    # "auto" would ask the Hub whether the vocabulary has grown.
    state = get_peft_model_state_dict(model, adapter_name=slot, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}


def save(tensors: dict[str, torch.Tensor], config: LoraConfig, folder: Path) -> None:
    """Write the two files of a PEFT adapter. What is written says `init_lora_weights: true`, which touches no base."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / store.WEIGHTS, metadata={"format": "pt"})
    settings = config.to_dict() | {"inference_mode": True, "init_lora_weights": True}
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    (folder / store.CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def open_base(
    adapter: Adapter | None,
    base: str | None = None,
    revision: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    notify: Listener = ignore,
) -> Base:
    """The base in memory: the one named or, with `base` None, the one that the adapter names, or the default one."""
    if base is None and adapter is not None:
        base = adapter.base or None
        if revision is None:
            revision = adapter.manifest.base.revision if adapter.manifest else adapter.config.get("revision")
    return load_base(find_base(base, revision, notify), device, dtype)


def check_base(adapter: Adapter, base: Base, *, force: bool = False, notify: Listener = ignore) -> None:
    """Raise WrongBaseError unless the adapter was trained on this base; one without a manifest is taken with a notice."""
    if adapter.manifest is None:
        notify(Notice(f"{adapter.name} has no manifest, so only its shapes can be compared with {base.source.name}."))
        return
    facts = adapter.manifest.base
    if facts.fingerprint != base.source.fingerprint:
        what = (
            f"{adapter.name} was trained on {facts.name} (fingerprint {facts.fingerprint[:12]}, {facts.weights}), not on "
            f"{base.source.name} (fingerprint {base.source.fingerprint[:12]}, {base.source.weights})"
        )
    elif facts.tokenizer != base.tokenizer_hash:
        what = f"{adapter.name} was trained with another tokenizer than that of {base.source.name}"
    else:
        return
    if not force:
        raise WrongBaseError(f"{what}. Give the right one with --base, or try all the same with --force.")
    notify(Notice(f"FORCED: {what}. What it writes may mean nothing."))


def load(model: PeftModel, folder: Path) -> None:
    """Put the weights of a checkpoint into the update that is being trained."""
    set_peft_model_state_dict(model, load_file(folder / store.WEIGHTS), adapter_name=TRAINED)


def misfits(model: Any, adapter: Adapter) -> list[str]:
    """Each layer of the adapter that this base lacks or has in another shape, from names and shapes alone."""
    layers = linear_layers(model)
    problems = []
    for module in adapter.modules:
        layer = layers.get(module)
        if layer is None:
            problems.append(f"{module} is not in the base")
            continue
        out_features, in_features = layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape
        down, up = (adapter.tensors[f"base_model.model.{module}.lora_{part}.weight"][1] for part in "AB")
        if down[1] != in_features or up[0] != out_features:
            problems.append(
                f"{module} is {in_features} -> {out_features} in the base, {down[1]} -> {up[0]} in the adapter"
            )
    return problems


def attach(model: Any, adapter: Adapter, slot: str) -> PeftModel:
    """Put a stored adapter on a base, under the name `slot`, without making it the active one.

    `model` is the plain base, or the PeftModel that an earlier call gave back. Raises AdapterError, and leaves the model
    as it was, when the adapter does not fit.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    if problems := misfits(plain, adapter):
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise AdapterError(f"{adapter.path} does not fit the base: {'; '.join(problems[:3])}{more}.")
    settings = {
        key: adapter.config[key]
        for key in ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
        if adapter.config.get(key) is not None
    }
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=adapter.modules, inference_mode=True, **settings)
    if problems := store.verify_weights(adapter):
        raise AdapterError(f"{adapter.path} is damaged: {'; '.join(problems[:3])}.")
    tensors = load_file(adapter.path / store.WEIGHTS)
    wrapped = None
    try:
        with quiet(), torch.random.fork_rng():
            if isinstance(model, PeftModel):
                model.add_adapter(slot, config)
                wrapped = model
            else:
                wrapped = PeftModel(model, config, adapter_name=slot)
        expected = {name: tuple(tensor.shape) for name, tensor in weights(wrapped, slot).items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise AdapterError(f"{adapter.path}: config and weights disagree about {', '.join(different[:3])}.")
        set_peft_model_state_dict(wrapped, tensors, adapter_name=slot)
    except BaseException:
        if isinstance(model, PeftModel):
            if slot in model.peft_config:
                model.delete_adapter(slot)
        elif wrapped is not None:
            wrapped.unload()
        raise
    return wrapped.eval()
