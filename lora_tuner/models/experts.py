"""Experts of a mixture whose weights are one parameter: PEFT adapts them by `target_parameters`.

Each expert has an A and a B of its own; those of all experts lie stacked in one matrix. PEFT adds
the update to the weights of all experts whenever their module runs (`ParamWrapper` in
peft/tuners/lora/layer.py of PEFT 0.21), and so does this tool. Price: each pass takes the time of
one product over all experts, however few tokens it has. Limit: no dropout and no variant of LoRA
but rsLoRA, as there is no input of a single layer to work on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapters.expert_names import DECLARED_ORDER

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """Weights of all experts: one parameter of a module."""

    module: nn.Module
    parameter: str

    @property
    def weight(self) -> nn.Parameter:
        return self.module.get_parameter(self.parameter)

    @property
    def is_transposed(self) -> bool:
        """True if PEFT takes it for (experts, in, out), else it is (experts, out, in)."""
        return bool(getattr(self.module, "is_transposed", False))

    @property
    def size(self) -> tuple[int, int, int]:
        """(experts, in, out), as PEFT takes it."""
        experts, first, second = self.weight.shape
        return (experts, first, second) if self.is_transposed else (experts, second, first)

    def delta(self, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
        """B A of each expert in the shape of the weights.

        Args:
            lora_a: (experts, rank, in).
            lora_b: (experts, out, rank), with the scale.
        """
        product = lora_b @ lora_a
        return product.transpose(1, 2) if self.is_transposed else product


@dataclass(frozen=True, eq=False)
class ExpertDelta:
    """LoRA weights for all experts: A (experts, rank, in), B (experts, out, rank) with the scale."""

    weights: ExpertWeights
    A: torch.Tensor
    B: torch.Tensor

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the module run with updated weights inside the block.

        They are made when it begins to run, and gone when it has run: at any time one layer has
        them."""
        module, parameter = self.weights.module, self.weights.parameter
        attributes = vars(module)  # found before parameters, and no part of the state

        def begin(*_: object) -> None:
            weight = self.weights.weight.detach()
            a, b = self.A.to(weight.dtype), self.B.to(weight.dtype)
            left, right = (a.mT, b.mT) if self.weights.is_transposed else (b, a)
            attributes[parameter] = torch.baddbmm(weight, left, right)

        def end(*_: object) -> None:
            attributes.pop(parameter, None)

        handles = (
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end, always_call=True),
        )
        try:
            yield
        finally:
            end()
            for handle in handles:
                handle.remove()


def expert_counts(model: PreTrainedModel) -> set[int]:
    """Numbers of experts that the config names."""
    config = model.config.get_text_config()
    counts = {getattr(config, name, None) for name in _EXPERT_COUNTS}
    return {count for count in counts if isinstance(count, int) and count > 1}


def expert_weights(model: PreTrainedModel) -> dict[str, ExpertWeights]:
    """Full name -> weights, for each parameter of a plain base that holds those of several experts.

    Not all of them can be adapted (`why_not_adaptable`).
    """
    counts = expert_counts(model)
    found = {}
    for owner, module in model.named_modules():
        is_experts = "expert" in type(module).__name__.lower()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            stacked = parameter.dim() == 3 and len(parameter) in counts
            if stacked or (is_experts and parameter.dim() > 1 and not name.endswith("bias")):
                found[f"{owner}.{name}"] = ExpertWeights(module, name)
    return found


def why_not_adaptable(experts: Mapping[str, ExpertWeights]) -> dict[str, str]:
    """Reason for each parameter that PEFT cannot adapt, from its form."""
    reasons = {}
    names: dict[str, list[str]] = {}
    for name, weights in experts.items():
        if weights.weight.dtype not in _DTYPES:
            reasons[name] = f"packed as {str(weights.weight.dtype).removeprefix('torch.')}"
        elif weights.weight.dim() != 3:
            reasons[name] = "not three-dimensional"
        else:
            names.setdefault(name.rpartition(".")[0], []).append(weights.parameter)
    for owner, parameters in names.items():
        if len(parameters) > 1 and [name for name in DECLARED_ORDER if name in parameters] != parameters:
            reasons |= dict.fromkeys(
                (f"{owner}.{name}" for name in parameters), "in an order that files do not tell"
            )
    return reasons
