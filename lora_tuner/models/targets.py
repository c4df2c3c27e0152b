"""Target modules: the layers that LoRA adapts, and the share of the base that they hold.

A layer is linear, or it is one parameter with the weights of all experts of a mixture (`experts`).
Surprise: not every one takes LoRA. Vision towers are never run on text, routers give tuples, and
PEFT refuses some layers of some models or adapts experts in their place. So a base is run on a few
tokens and PEFT is tried on a stand-in of each kind of layer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapters.expert_names import file_names
from ..errors import ConfigError
from ..text import format_coverage, format_names
from .base_files import quiet_transformers
from .experts import ExpertWeights, expert_counts, expert_weights, why_not_adaptable
from .layers import Layer, LinearLayer, layer_sizes, linear_layers, weight_count
from .probe import Probe, expert_group, probe_layers

NEVER_RUN, NOT_LINEAR = "never run on text", "not linear layers"
ROUTER = "chooses the experts"
_ROUTER_NAME = re.compile(r"(\.|_)(router|gate)(\.|$)")
HALF = 0.5  # an adapter of less of the block weights is warned about


@dataclass(frozen=True)
class TargetModules:
    """The layers to adapt.

    Args:
        modules: their full names.
        linear: the shortest names by which PEFT matches the linear ones and no other modules.
        experts: the same for parameters with the weights of experts.
        coverage: their share of the weights of all blocks, embeddings and output head left out.
        not_adapted: all other weights of the blocks, with their share and, where there is one, the
            reason.
        reachable: the coverage that `auto` would have.
    """

    modules: list[str]
    linear: list[str]
    experts: list[str]
    coverage: float
    not_adapted: list[str]
    reachable: float

    @property
    def names(self) -> list[str]:
        """Names for the setting `target_modules`."""
        return [*self.linear, *self.experts]

    @property
    def warning(self) -> str | None:
        """Advice if less than half of the block weights are adapted."""
        if self.coverage >= HALF:
            return None
        advice = "the rest takes no LoRA, so expect a smaller gain, or choose another --base"
        if self.reachable > self.coverage:
            advice = f"a new adapter with --target-modules auto covers {format_coverage(self.reachable)}"
        return f"WARNING: less than half of the block weights are adapted: {advice}."


@dataclass(frozen=True)
class _Examined:
    """A base as LoRA sees it: its layers, the modules that run on text, and the reason for each
    layer that cannot be adapted. `routers` can be, by their name."""

    linear: dict[str, LinearLayer]
    experts: dict[str, ExpertWeights]
    called: set[str]
    reasons: dict[str, str]
    routers: set[str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Examined:
        """Run a plain base twice on a few tokens. Raises BaseModelError if it does not run on text."""
        linear, experts = linear_layers(model), expert_weights(model)
        probe = probe_layers(model, {**linear, **experts})
        probe.check("on text alone")
        reasons = _why_not_adaptable(model, linear, experts, probe)
        return cls(linear, experts, probe.called, reasons, _routers(model, linear) - set(reasons))

    @property
    def layers(self) -> dict[str, Layer]:
        return {**self.linear, **self.experts}

    @property
    def adaptable(self) -> set[str]:
        return set(self.layers) - set(self.reasons)


def resolve_target_modules(model: PreTrainedModel, target_modules: str) -> TargetModules:
    """Translate the setting `target_modules` into layers.

    Args:
        model: a plain base. It is run twice on a few tokens.
        target_modules: auto (all-linear without the routers of a mixture), attention, all-linear
            (experts too), or names of layers separated by commas.

    Raises:
        ConfigError: a name matches no layer that can be adapted; the message lists the names that
            can. Or all experts are asked for, and PEFT cannot adapt them.
        BaseModelError: the base does not run on text.
    """
    base = _Examined.of(model)
    if target_modules == "auto":
        requested = set(base.layers) - base.routers
    elif target_modules == "all-linear":
        requested = set(base.layers)
    elif target_modules == "attention":
        requested = {
            name for name in base.layers if any("attn" in part or "attention" in part for part in name.split("."))
        }
        if requested.isdisjoint(base.adaptable):
            raise ConfigError(
                f"This base has no layer named attention; its layers are {_last_names(base.adaptable)}."
            )
    else:
        requested = _layers_by_name(target_modules, base)
    selected = requested & base.adaptable
    if target_modules in ("auto", "all-linear"):
        _refuse_unadaptable_experts(model, base, selected)
    if not selected:
        raise ConfigError(
            f"No layer of this base can be adapted: {'; '.join(sorted(set(base.reasons.values())))}."
        )
    return _describe(model, base, selected)


def describe_targets(model: PreTrainedModel, modules: Collection[str]) -> TargetModules:
    """Names and coverage of layers of a plain base, by their full names. The base is run twice on a
    few tokens."""
    return _describe(model, _Examined.of(model), modules)


def _describe(model: PreTrainedModel, base: _Examined, modules: Collection[str]) -> TargetModules:
    modules = set(modules)
    counts: dict[str, Counter[str]] = {}  # weights by reason and kind
    numbers_of_experts = expert_counts(model)
    chosen_by_auto = base.adaptable - base.routers
    covered = reachable = total = 0
    for name, kind, parameter in _block_weights(model, base):
        count = weight_count(parameter)
        total += count
        covered += count * (name in modules)
        reachable += count * (name in chosen_by_auto)
        if name in modules:
            continue
        reason = base.reasons.get(name, ROUTER if name in base.routers else "")
        if name not in base.layers:
            is_bias = kind.endswith("bias")
            is_router = parameter.dim() == 2 and len(parameter) in numbers_of_experts and not is_bias
            kind, reason = ("router", ROUTER) if is_router else (kind, "biases" if is_bias else NOT_LINEAR)
        counts.setdefault(reason, Counter())[kind] += count
    not_adapted = [
        f"{', '.join(sorted(kinds))} ({format_coverage(kinds.total() / total)}{f', {reason}' if reason else ''})"
        for reason, kinds in sorted(counts.items(), key=lambda item: -item[1].total())
        if reason != NEVER_RUN
    ]
    run = {
        ".".join(parts[:end])
        for parts in (name.split(".") for name in base.called)
        for end in range(len(parts) + 1)
    }
    never_run = {_never_run_part(name, run) for name, reason in base.reasons.items() if reason == NEVER_RUN}
    if never_run:
        not_adapted.append(f"{', '.join(sorted(never_run))} ({NEVER_RUN})")
    linear, experts = shortest_target_names(model, modules)
    return TargetModules(
        modules=sorted(modules),
        linear=linear,
        experts=experts,
        coverage=covered / max(total, 1),
        not_adapted=not_adapted,
        reachable=reachable / max(total, 1),
    )


def shortest_target_names(model: PreTrainedModel, modules: Collection[str]) -> tuple[list[str], list[str]]:
    """The shortest names for PEFT's `target_modules` and `target_parameters` that match these
    layers and no others."""
    all_modules = {name for name, _ in model.named_modules()}
    all_parameters = {name for name, _ in model.named_parameters()}
    linear, experts = set(modules) & all_modules, set(modules) - all_modules
    taken = {suffix for name in all_modules - linear for suffix in _suffixes(name)}
    names = sorted({_shortest_suffix(module, taken) for module in linear})
    # With the name of the module, as a bare parameter name says little.
    taken = {suffix for name in all_parameters - experts for suffix in _suffixes(name)}
    taken |= {_last_name(name) for name in experts}
    return names, sorted({_shortest_suffix(name, taken) for name in experts})


def _refuse_unadaptable_experts(model: PreTrainedModel, base: _Examined, selected: Collection[str]) -> None:
    """Raise ConfigError, with the setting that leaves them out, for experts that PEFT cannot adapt."""
    refused = {
        name: base.reasons[name] for name in base.experts if base.reasons.get(name, NEVER_RUN) != NEVER_RUN
    }
    if refused:
        kinds = sorted(
            {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in refused}
        )
        linear, experts = shortest_target_names(model, selected)
        rest = ",".join([*linear, *experts])
        raise ConfigError(
            f"target_modules: experts of this base cannot be adapted: {format_names(kinds)} "
            f"({', '.join(sorted(set(refused.values())))}): "
            + (f"go on without them with --target-modules {rest}." if rest else "choose another --base.")
        )


def _why_not_adaptable(
    model: PreTrainedModel,
    layers: Mapping[str, LinearLayer],
    experts: Mapping[str, ExpertWeights],
    probe: Probe,
) -> dict[str, str]:
    """Reason for each layer that cannot be adapted."""
    refused = {name for name in set(map(_last_name, layers)) if not _peft_adapts(model, name)}
    renamed = _renamed_by_peft(model, {name: name for name in layers} | file_names(experts))
    renamed |= {name for name in experts if any(_owner(name) == _owner(other) for other in renamed)}
    forms = why_not_adaptable(experts)
    reasons = {}
    for name in (*layers, *experts):
        group = expert_group(_owner(name) if name in experts else name)
        if not _takes_part(group, probe.called):
            reasons[name] = NEVER_RUN
        elif group not in probe.called:
            reasons[name] = "not called as a layer"
        elif name in probe.read:
            reasons[name] = "its weights are used elsewhere too"
        elif name in forms:
            reasons[name] = forms[name]
        elif name in layers and group not in probe.plain:
            reasons[name] = "takes or gives more than one tensor"
        elif _last_name(name) in refused and name in layers:
            reasons[name] = f"not supported by PEFT in {model.config.model_type}"
        elif name in renamed:
            reasons[name] = f"not loaded again by PEFT in {model.config.model_type}"
    return reasons


def _peft_adapts(model: PreTrainedModel, name: str) -> bool:
    """True if PEFT puts LoRA on a linear layer of this last name in this type of model.

    Tried on a stand-in: PEFT refuses some names by type, and takes others for the experts that
    transformers 4 named so.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear as LoraLinear

    stand_in: Any = nn.Module()
    stand_in.config = model.config
    stand_in.block = nn.Module()
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        stand_in.block.add_module(name, nn.Linear(1, 1))
        try:
            inject_adapter_in_model(LoraConfig(r=1, target_modules=[name]), stand_in)
        except ValueError:
            return False
    return isinstance(stand_in.block.get_submodule(name), LoraLinear)


def _renamed_by_peft(model: PreTrainedModel, layers: Mapping[str, str]) -> set[str]:
    """Layers, of name -> name in the file, whose LoRA weights PEFT would look for under other names
    when it loads them.

    Its table for checkpoints of transformers 4 is applied to adapters too, to names of today as
    well."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    keys = {f"base_model.model.{file_name}.lora_A.weight": name for name, file_name in layers.items()}
    tensors = dict.fromkeys(keys, torch.zeros(1, 1))
    with quiet_transformers():
        loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), tensors)
    return {name for key, name in keys.items() if key not in loaded}


def _routers(model: PreTrainedModel, layers: Mapping[str, LinearLayer]) -> set[str]:
    """Linear layers of a mixture with one output for each expert, or one for the shared expert.

    They are told by their names too: in Qwen3-Next, keys and values have as many outputs as there
    are experts."""
    counts = expert_counts(model)
    sizes = layer_sizes({name: layer for name, layer in layers.items() if _ROUTER_NAME.search(name)})
    return {name for name, (_, size_out) in sizes.items() if counts and size_out in {1, *counts}}


def _layers_by_name(target_modules: str, base: _Examined) -> set[str]:
    """Layers that the setting names; the name of their module stands for all parameters of experts.
    The last name of a parameter counts where no linear layer has it.

    Raises ConfigError for names without any that can be adapted.
    """
    layers, reasons = base.layers, base.reasons
    names = [name.strip() for name in target_modules.split(",")]
    suffixes = {layer: {*_suffixes(layer)} for layer in layers}
    for expert in base.experts:
        suffixes[expert].update(_suffixes(_owner(expert)))
    matches = {}
    for name in names:  # the same name of a linear layer comes first
        linear, experts = (
            {layer for layer in kind if name in suffixes[layer]} for kind in (base.linear, base.experts)
        )
        matches[name] = linear or experts
    problems = []
    if unmatched := [name for name in names if not matches[name]]:
        problems.append(f"{format_names(unmatched)} cannot be adapted")
    for name in names:
        if matches[name] and matches[name] <= set(reasons):
            problems.append(f"{name} cannot be adapted ({reasons[min(matches[name])]})")
    if problems:
        raise ConfigError(
            f"target_modules: {'; '.join(problems)}; choose auto, attention, all-linear, or any of "
            f"{_last_names(set(layers) - set(reasons))} (embeddings and the output head cannot be "
            "adapted: where they share weights, an update would not survive a merge)."
        )
    return set().union(*matches.values())


def _block_weights(model: PreTrainedModel, base: _Examined) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Layer, kind and parameter for every matrix that runs on text, outside embeddings and output head."""
    head = model.get_output_embeddings()
    for owner, module in model.named_modules():
        if module is head or isinstance(module, nn.Embedding) or not _takes_part(owner, base.called):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                layer = f"{owner}.{name}"
                is_bias = name.endswith("bias")
                yield layer if layer in base.experts else owner, name if is_bias else _last_word(owner), parameter


def _takes_part(name: str, called: Collection[str]) -> bool:
    """True if a module was called, or in a block the one around it: some use weights without a call."""
    group = expert_group(name)
    return group in called or (any(map(str.isdigit, group.split("."))) and group.rpartition(".")[0] in called)


def _never_run_part(name: str, run: Collection[str]) -> str:
    """Outermost module around a layer that is not among those run or above them: its last word, and
    the number of a block."""
    parts = expert_group(name).split(".")
    end = next(end for end in range(1, len(parts) + 1) if ".".join(parts[:end]) not in run)
    return ".".join(parts[end - 2 if parts[end - 1].isdigit() else end - 1 : end])


def _shortest_suffix(module: str, taken: set[str]) -> str:
    return next((suffix for suffix in _suffixes(module) if suffix not in taken), module)


def _suffixes(module: str) -> list[str]:
    """The names by which PEFT finds a module, from its last part to its full name."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _last_name(module: str) -> str:
    return module.rpartition(".")[2]


def _last_names(layers: Collection[str]) -> str:
    return format_names(sorted({_last_name(layer) for layer in layers}))


def _last_word(name: str) -> str:
    """Last part of a name that is not a number."""
    return next((part for part in reversed(name.split(".")) if part.isidentifier()), name)
