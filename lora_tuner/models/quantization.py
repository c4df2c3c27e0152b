"""Linear layers with int8 and int4 weights for inference on a CPU, which is memory-bound.

int8: one scale per output channel. int4: a scale and a zero point per group of 32 weights, as in
llama.cpp's Q4_1; the LM head stays in int8. What they change in the held-out loss is in
docs/methods.md. For many rows, or without a C compiler, int8 weights are dequantized on the fly.
"""

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .native import few_rows_product

GROUP_SIZE = 32  # weights that share a scale in int4
INT4_BLOCK = 64  # rows of a weight that torch's int4 product packs together
# Attribute of the layers that transformers replaced by bitsandbytes' ones.
_REPLACED_CLASS = "source_cls"


class Int8Linear(nn.Module):
    """A linear layer, or GPT-2's Conv1D, with `int8_weight` (out, in) and `scale` (out,)."""

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        super().__init__()
        weight = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach()
        self.out_features, self.in_features = weight.shape
        int8_weight, scale = pack_int8(weight)
        self.int8_weight, self.scale = nn.Buffer(int8_weight), nn.Buffer(scale)
        self.bias = layer.bias

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized weight: (out, in) in float32."""
        return self.int8_weight.float().mul_(self.scale[:, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = int8_linear(x.reshape(-1, self.in_features), self.int8_weight, self.scale, self.bias)
        return flat.to(x.dtype).view(*x.shape[:-1], self.out_features)


class Int4Linear(nn.Module):
    """A linear layer, or GPT-2's Conv1D, with `packed` weights and their `scales` (`pack_int4`)."""

    def __init__(
        self, layer: nn.Linear | Conv1D, packed: torch.Tensor, scales: torch.Tensor, in_features: int
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, scales.shape[1]
        self.packed, self.scales = nn.Buffer(packed), nn.Buffer(scales)
        self.bias = layer.bias

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized weight: (out, in) in float32."""
        return dense_int4(self.packed, self.scales, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = int4_linear(x.reshape(-1, self.in_features), self.packed, self.scales, self.bias)
        return flat.to(x.dtype).view(*x.shape[:-1], self.out_features)


def is_quantized(layer: nn.Module) -> bool:
    """True for a linear layer with weights in 8 or 4 bits, of this module or of bitsandbytes."""
    return isinstance(layer, Int8Linear | Int4Linear) or hasattr(layer, _REPLACED_CLASS)


def dense_weight(layer: Any) -> torch.Tensor:
    """Weight of a linear layer as (out, in); dequantized, also from bitsandbytes' 8 or 4 bits."""
    if type(layer.weight).__name__ == "Int8Params":  # PEFT's function breaks layers that have run on a CPU
        scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        dense: torch.Tensor = layer.weight.data * (scale / 127)[:, None]
        return dense
    if type(layer.weight).__name__ == "Params4bit":
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(layer)
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def cast_unquantized(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what bitsandbytes has not quantized. transformers leaves some of it as it was saved."""
    for module in model.modules():
        if not hasattr(module, _REPLACED_CLASS):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def dequantize_bitsandbytes(model: PreTrainedModel) -> None:
    """Replace all 8- and 4-bit layers of bitsandbytes by plain ones with weights in float32."""
    dequantize_layers(model, [name for name, _ in model.named_modules()], torch.float32)
    mark_dequantized(model)


def dequantize_layers(model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype) -> None:
    """Replace those of the modules that are 8- and 4-bit layers of bitsandbytes by plain ones."""
    for name in names:
        module = model.get_submodule(name)
        if hasattr(module, _REPLACED_CLASS):
            model.set_submodule(name, _plain_layer(module, dtype))


def flatten_inputs(model: PreTrainedModel) -> None:
    """Let the 8-bit layers of bitsandbytes take inputs of any rank. Theirs take two or three."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.forward = partial(_forward_rows, module)


def _forward_rows(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = type(layer).forward(layer, x.reshape(-1, x.shape[-1]))
    return output.view(*x.shape[:-1], output.shape[-1])


def _plain_layer(module: Any, dtype: torch.dtype) -> nn.Linear | Conv1D:
    """The nn.Linear, or GPT-2's Conv1D, with the dequantized weight of a bitsandbytes layer."""
    weight = dense_weight(module).detach().to(dtype)
    out_features, in_features = weight.shape
    layer: nn.Linear | Conv1D
    with torch.device("meta"):
        if issubclass(getattr(module, _REPLACED_CLASS), Conv1D):
            layer, weight = Conv1D(out_features, in_features), weight.T.contiguous()
        else:
            layer = nn.Linear(in_features, out_features, bias=module.bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = module.bias
    return layer


def quantize(model: PreTrainedModel, load_in: str, keep: Collection[str] = ()) -> None:
    """Replace all linear layers of a model but some, its head included, but not its embeddings.

    Args:
        load_in: 8bit or 4bit; with 4bit the head and layers of sizes without a product get 8.
    """
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if name in keep or type(module) not in (nn.Linear, Conv1D):
            continue
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        packed = pack_int4(weight.detach()) if load_in == "4bit" and module is not head else None
        model.set_submodule(name, Int4Linear(module, *packed, weight.shape[1]) if packed else Int8Linear(module))


def pack_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight (out, in) to int8.

    Returns:
        int8 weight (out, in), and scale (out,) in float32.
    """
    weight = weight.float().contiguous()
    scale = (weight.abs().amax(1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round_().clamp_(-128, 127).to(torch.int8), scale


def int8_linear(
    x: torch.Tensor, int8_weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Linear layer for x (rows, in): (rows, out) in float32, the same for few rows as for many."""
    output = few_rows_product(x, int8_weight, scale)
    if output is None:
        output = F.linear(x.float(), int8_weight * scale[:, None])
    return output if bias is None else output.add_(bias)


def pack_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Quantize a weight (out, in) to int4.

    Returns:
        The packed weight, and scales with zero points (in / GROUP_SIZE, out, 2) in bfloat16; None
        for sizes that torch does not support.
    """
    out_features, in_features = weight.shape
    if out_features % 16 or in_features % GROUP_SIZE:
        return None
    groups = weight.float().reshape(out_features, -1, GROUP_SIZE)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).clamp_(min=torch.finfo(torch.float32).tiny).bfloat16()
    zero_point = (low + 8 * scale).bfloat16()  # torch counts from the middle of the range
    codes = ((groups - zero_point) / scale).round_().add_(8).clamp_(0, 15).to(torch.int32)
    scales = torch.cat([scale, zero_point], 2).transpose(0, 1).contiguous()
    return torch._convert_weight_to_int4pack_for_cpu(codes.view(out_features, in_features), 1), scales


def int4_linear(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Linear layer for x (rows, in): (rows, out) in bfloat16."""
    x = x.bfloat16().contiguous()
    output = torch._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, scales.contiguous())
    return output if bias is None else output.add_(bias)


def dense_int4(packed: torch.Tensor, scales: torch.Tensor, in_features: int) -> torch.Tensor:
    """The weight (out, in) in float32 of packed int4 weights."""
    identity = torch.eye(in_features, dtype=torch.bfloat16)
    return torch._weight_int4pack_mm_for_cpu(identity, packed, GROUP_SIZE, scales.contiguous()).T.float()


def mark_dequantized(model: Any) -> None:
    """Remove the marks of quantization, with which transformers would not save a float model."""
    for attribute in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(attribute, None)
    model.is_quantized = False
    del model.config.quantization_config
    # Saving would undo those of the quantizer.
    if conversions := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))
        ]
