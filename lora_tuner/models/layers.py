"""Layers of a base that LoRA may adapt: linear ones, and parameters with the weights of experts."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .experts import ExpertWeights, expert_weights
from .quantization import Int4Linear, Int8Linear

LinearLayer = nn.Linear | Conv1D | Int8Linear | Int4Linear
Layer = LinearLayer | ExpertWeights


def linear_layers(model: PreTrainedModel) -> dict[str, LinearLayer]:
    """Full name -> layer, for every linear layer of a plain base except the output head."""
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LinearLayer) and layer is not head
    }


def adaptable_layers(model: PreTrainedModel) -> dict[str, Layer]:
    """Full name -> layer, for every linear layer and all experts of a plain base."""
    return {**linear_layers(model), **expert_weights(model)}


def layer_sizes(layers: Mapping[str, Layer]) -> dict[str, tuple[int, ...]]:
    """(in_features, out_features) of each linear layer, (experts, in, out) of experts."""
    sizes: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        if isinstance(layer, ExpertWeights):
            sizes[name] = layer.size
        else:
            sizes[name] = (
                (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
            )
    return sizes


def has_transposed_layers(model: PreTrainedModel) -> bool:
    """True for GPT-2, whose linear layers store their weights as (in, out)."""
    return any(isinstance(layer, Conv1D) for layer in linear_layers(model).values())


def weight_count(parameter: torch.Tensor) -> int:
    """Number of weights, of which two in 4 bits share a byte."""
    return parameter.numel() * (2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else 1)
