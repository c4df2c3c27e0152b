"""Probe of a base on a few tokens: modules called, their inputs and outputs, weights read.

A layer is what a base does with it, not its class: some are never called, take or give more than
one tensor, or have their weights used by others. LoRA would have no effect there, and quantized
weights would be taken for numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..errors import BaseModelError, is_out_of_memory
from .base_files import quiet_transformers
from .experts import ExpertWeights


@dataclass(frozen=True)
class Probe:
    """Modules in a run of a base on a few tokens.

    Args:
        called: modules that were called. Here and in `plain` a name stands for all experts of its
            layer (`expert_group`): few tokens reach few of them.
        plain: those of them that map one tensor to one tensor in every call.
        read: linear layers and experts, each by its own name, whose weights were used outside of
            their own call, by the module around them or by a layer that shares them.
        error: the reason for which the base did not run to its end.
    """

    called: set[str]
    plain: set[str]
    read: set[str]
    error: Exception | None

    def check(self, purpose: str, advice: str = "") -> None:
        """Raise BaseModelError if the base did not run for this purpose."""
        if self.error is not None:
            reason = " ".join(str(self.error).split())
            raise BaseModelError(f"This base does not run {purpose}: {reason}{advice}") from self.error


def probe_layers(model: PreTrainedModel, layers: Mapping[str, nn.Module | ExpertWeights]) -> Probe:
    """Run a base with these linear layers and experts on a few tokens, in evaluation and in training mode."""
    called: set[str] = set()
    unusual: set[str] = set()
    reads = _WeightReads(layers)

    def begin(name: str) -> None:
        reads.running.append(name)
        reads.note_weights(name)

    def end(name: str, inputs: tuple[object, ...], named_inputs: Mapping[str, object], output: object) -> None:
        reads.running.pop()
        called.add(expert_group(name))
        if not (
            len(inputs) == 1
            and not named_inputs
            and isinstance(inputs[0], torch.Tensor)
            and isinstance(output, torch.Tensor)
            and inputs[0].shape[:-1] == output.shape[:-1]
        ):
            unusual.add(expert_group(name))

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: begin(name)))
        handles.append(
            module.register_forward_hook(
                lambda _, inputs, named_inputs, output, name=name: end(name, inputs, named_inputs, output),
                with_kwargs=True,
            )
        )
    embeddings = model.get_input_embeddings().get_parameter("weight")
    token_ids = torch.arange(6, device=embeddings.device)[None] + len(embeddings) // 2
    training = model.training
    random_devices = [embeddings.device] if embeddings.device.type == "cuda" else []
    error = None
    try:
        # FSDP could not train after inference mode.
        with quiet_transformers(), torch.no_grad(), torch.random.fork_rng(random_devices), reads:
            for mode in (False, True):
                model.train(mode)
                model(input_ids=token_ids, use_cache=False)
    except Exception as reason:  # models raise errors of any type
        if is_out_of_memory(reason):
            raise
        error = reason
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return Probe(called, called - unusual, reads.found, error)


class _WeightReads(TorchFunctionMode):
    """Layers whose weight a torch function takes while the layer is not running.

    Asking for the dtype counts for a quantized weight: inputs would be cast to it.
    """

    def __init__(self, layers: Mapping[str, nn.Module | ExpertWeights]) -> None:
        super().__init__()
        self.running: list[str] = []
        self.found: set[str] = set()
        self._weights: dict[int, set[str]] = {}  # layers by the id of their weight, which they may share
        self._owners: dict[str, str] = {}  # the module that uses the weight of a layer
        # Layers and experts by the modules around them.
        self._inside: dict[str, dict[str, nn.Module | ExpertWeights]] = {}
        for name, layer in layers.items():
            if isinstance(layer, ExpertWeights) or "weight" in dict(layer.named_parameters(recurse=False)):
                self._owners[name] = name.rpartition(".")[0] if isinstance(layer, ExpertWeights) else name
                parts = name.split(".")
                for end in range(len(parts) + 1):
                    self._inside.setdefault(".".join(parts[:end]), {})[name] = layer

    def note_weights(self, module: str) -> None:
        """Note the weights of the layers in a module that begins to run: FSDP puts others in place then."""
        for name, layer in self._inside.get(module, {}).items():
            self._weights.setdefault(id(layer.weight), set()).add(name)

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        values = (*args, *kwargs.values())
        weights = [each for each in values if id(each) in self._weights and isinstance(each, torch.Tensor)]
        result = None
        try:
            result = function(*args, **kwargs)
        finally:
            for weight in weights:
                is_dtype = isinstance(result, torch.dtype) and not weight.is_floating_point()
                if is_dtype or result is None or isinstance(result, torch.Tensor):
                    names = self._weights[id(weight)]
                    self.found |= {name for name in names if self._owners[name] not in self.running}
        return result


def expert_group(name: str) -> str:
    """Name with all numbers but the first, that of the block, replaced: it stands for all experts."""
    parts = name.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    for index in numbered[1:]:
        parts[index] = "*"
    return ".".join(parts)
