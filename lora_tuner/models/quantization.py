"""Weights of few bits, for writing on a CPU, where a token takes as long as its weights take to read.

int8 is for the answer: a scale for each output, inputs in bfloat16. Its price is in the third decimal of the held-out loss
(benchmarks/RESULTS.md). int4, a scale and a zero for each 32 weights, is for guesses alone, which float32 or int8 has the
last word on. Limit: torch's products of these kinds are for few rows; for more, int8 is turned back on the way.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

MAX_INT8_ROWS = 16  # rows; above, torch's product takes longer than to turn the weights back
GROUP_SIZE = 32  # weights that share a scale in int4


class Int8Linear(nn.Module):
    """A linear layer, or GPT-2's Conv1D, with `rounded` (out, in) int8 and `scale` (out,) in place of its weight."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        weight = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach()
        self.out_features: int = weight.shape[0]
        self.in_features: int = weight.shape[1]
        rounded, scale = pack_int8(weight)
        self.register_buffer("rounded", rounded)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    @property
    def weight(self) -> torch.Tensor:
        """What stands for the weight: (out, in), float32."""
        return self.rounded.float().mul_(self.scale[:, None])  # type: ignore[operator, index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = int8_linear(x.reshape(-1, self.in_features), self.rounded, self.scale, self.bias)  # type: ignore[arg-type]
        return flat.to(x.dtype).view(*x.shape[:-1], self.out_features)


def quantize_int8(model: Any) -> None:
    """Turn all linear layers of a model, its head too, into Int8Linear. The embeddings stay."""
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, Conv1D):
            model.set_submodule(name, Int8Linear(module))


def pack_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) -> int8 (out, in), and scale (out,) in bfloat16, as torch's product wants it."""
    weight = weight.float().contiguous()
    scale = (weight.abs().amax(1) / 127).clamp_(min=torch.finfo(torch.float32).tiny).bfloat16()
    return (weight / scale[:, None]).round_().clamp_(-128, 127).to(torch.int8), scale


def int8_linear(x: torch.Tensor, rounded: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(rows, in) -> (rows, out) in bfloat16, alike for few rows and for many."""
    x = x.bfloat16()
    if len(x) > MAX_INT8_ROWS:
        output = F.linear(x.float(), rounded.float().mul_(scale[:, None])).bfloat16()
    else:
        output = torch._weight_int8pack_mm(x, rounded, scale)
    return output if bias is None else output.add_(bias)


def pack_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(out, in) -> packed, and scales with zeros (in / GROUP, out, 2) in bfloat16. None for sizes that torch does not take."""
    outs, into = weight.shape
    if outs % 16 or into % GROUP_SIZE:
        return None
    groups = weight.float().reshape(outs, -1, GROUP_SIZE)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).clamp_(min=torch.finfo(torch.float32).tiny)
    codes = ((groups - low) / scale).round_().clamp_(0, 15).to(torch.int32).view(outs, into)
    zero = low + 8 * scale  # torch counts from the middle
    both = torch.cat([scale, zero], 2).transpose(0, 1).contiguous().bfloat16()
    return torch._convert_weight_to_int4pack_for_cpu(codes, 1), both


def int4_linear(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(rows, in) -> (rows, out), bfloat16."""
    output = torch._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP_SIZE, scales)
    return output if bias is None else output.add_(bias)
