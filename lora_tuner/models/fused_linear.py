"""Linear layers that share their input as one product, with their LoRA, forward and backward.

Rows of W, A and columns of B are one matrix [[W, sB], [A, 0]], so that x W' + s (x A') B' = [x, x
A'] [W, sB]', and the gradient of x is [g, s g B] [W; A]. The frozen weights are views of it:
nothing is in memory twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .native import DTYPES, NativeKernels

RANK_MULTIPLE = 32  # columns of A and B are padded to it, for the matrix unit
WIDE = 2048  # products that sum over more are twice as fast in two halves


def is_plain(module: Any) -> bool:
    """Return whether a layer is a float linear layer on a CPU, with plain LoRA or none."""
    try:
        _plain_lora(module)
    except _NotPlainLoraError:
        return False
    linear = _base_layer(module)
    return (
        type(linear) in (nn.Linear, Conv1D)
        and linear.weight.dtype in DTYPES
        and linear.weight.device.type == "cpu"
    )


class LinearGroup:
    """Linear layers that share their input, with their LoRA, as one matrix [[W, sB], [A, 0]].

    Inputs and gradients have `padding` more columns than the layers, for x A' and s g B.
    """

    def __init__(self, modules: Sequence[Any], kernels: NativeKernels) -> None:
        self.bases, self.kernels = [_base_layer(module) for module in modules], kernels
        bases = self.bases
        self.transposed = isinstance(bases[0], Conv1D)
        self.outs = [base.weight.shape[1 if self.transposed else 0] for base in bases]
        self.size_in, self.size_out = bases[0].weight.shape[0 if self.transposed else 1], sum(self.outs)
        self.dtype = bases[0].weight.dtype
        self.bias = None if bases[0].bias is None else torch.cat([base.bias.detach() for base in bases])
        self.lora: list[Lora | None] = []
        self._allocate(0)

    def _allocate(self, ranks: int) -> None:
        self.padding = -(-ranks // RANK_MULTIPLE) * RANK_MULTIPLE
        size_in, size_out = self.size_in, self.size_out
        self.matrix = torch.zeros(size_out + self.padding, size_in + self.padding, dtype=self.dtype)
        weights = self.matrix[:size_out, :size_in]
        for base, view in zip(self.bases, weights.split(self.outs), strict=True):
            view.copy_(base.weight.data.T if self.transposed else base.weight.data)
            base.weight.data = view.T if self.transposed else view
        self.a, self.b = self.matrix[size_out:, :size_in], self.matrix[:size_out, size_in:]

    def update(self, modules: Sequence[Any]) -> bool:
        """Take over the present LoRA weights. Returns False where there is more than plain LoRA."""
        try:
            lora = [_plain_lora(module) for module in modules]
        except _NotPlainLoraError:
            return False
        ranks = sum(len(part.a) for part in lora if part)
        if ranks > self.padding or (self.padding and not ranks):  # a plain base computes the same again
            self._allocate(ranks)
        if lora != self.lora:
            self.a.zero_()
            self.b.zero_()
            self.lora = lora
        first_rank = first_out = 0
        for part, size in zip(lora, self.outs, strict=True):
            if part:
                self.kernels.call(
                    "write_lora", self.dtype,
                    self.a[first_rank:], self.b[first_out:, first_rank:], part.a, part.b,
                    len(part.a), self.size_in, size, self.size_in + self.padding, part.scale,
                )  # fmt: skip
                first_rank += len(part.a)
            first_out += size
        return True

    def parameters(self) -> list[torch.Tensor]:
        return [tensor for part in self.lora if part for tensor in (part.a, part.b)]

    def new_input(self, tokens: int) -> torch.Tensor:
        return torch.empty(tokens, self.size_in + self.padding, dtype=self.dtype)

    def new_gradient(self, tokens: int) -> torch.Tensor:
        return torch.empty(tokens, self.size_out + self.padding, dtype=self.dtype)

    def fill_padding(self, x: torch.Tensor) -> None:
        """Compute x A' into the last columns of x."""
        if self.padding:
            torch.mm(x[:, : self.size_in], self.a.T, out=x[:, self.size_in :])

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(tokens, in + padding), of which x A' is filled in here -> (tokens, out) + residual."""
        self.fill_padding(x)
        weight = self.matrix[: self.size_out].T
        if residual is None:
            return torch.mm(x, weight) if self.bias is None else torch.addmm(self.bias, x, weight)
        out = torch.addmm(residual, x, weight)
        return out if self.bias is None else out.add_(self.bias)

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, *, needs_x: bool = True
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """(tokens, out + padding), of which s g B is filled in here -> gradients of x, and of A and B."""
        size_in, size_out = self.size_in, self.size_out
        gradients: list[torch.Tensor] = []
        if self.parameters():
            grad_out, grad_inner = grad[:, :size_out], grad[:, size_out:]
            torch.mm(grad_out, self.b, out=grad_inner)
            grad_a, grad_b = grad_inner.T @ x[:, :size_in], x[:, size_in:].T @ grad_out
            first_rank = first_out = 0
            for part, size in zip(self.lora, self.outs, strict=True):
                if part:
                    gradients += [torch.empty_like(part.a), torch.empty_like(part.b)]
                    self.kernels.call(
                        "read_lora_gradient", self.dtype,
                        grad_a[first_rank:], grad_b[first_rank:, first_out:], *gradients[-2:],
                        len(part.a), size_in, size, size_in, size_out, part.scale,
                    )  # fmt: skip
                    first_rank += len(part.a)
                first_out += size
        elif self.padding:
            grad[:, size_out:] = 0
        if not needs_x:
            return None, gradients
        weight = self.matrix[:, :size_in]
        if len(weight) <= WIDE:
            return torch.mm(grad, weight), gradients
        half = size_out // 2
        return torch.mm(grad[:, :half], weight[:half]).addmm_(grad[:, half:], weight[half:]), gradients


class _NotPlainLoraError(Exception):
    pass


@dataclass(frozen=True, eq=False)
class Lora:
    """LoRA of a linear layer: A (rank, in) and B (out, rank), and their scale.

    As a forward hook of the layer it adds its delta to the output.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lora) and self.a is other.a and self.b is other.b

    def __call__(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        delta = F.linear(F.linear(inputs[0].to(self.a.dtype), self.a), self.b)
        return (output + self.scale * delta).to(output.dtype)


def _plain_lora(module: Any) -> Lora | None:
    """The LoRA of a layer, in PEFT's layer or as a hook; None without one.

    Raises:
        _NotPlainLoraError: it is a variant of LoRA, or there are other hooks.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    lora = hooks[0] if hooks else _peft_lora(module)
    if lora is None:
        return None
    if (
        len(hooks) > 1
        or not isinstance(lora, Lora)
        or not all(part.dtype == torch.float32 and part.is_contiguous() for part in (lora.a, lora.b))
        or (hooks and hasattr(module, "lora_A"))
    ):
        raise _NotPlainLoraError
    return lora


def _peft_lora(module: Any) -> Lora | None:
    """The active LoRA of PEFT's layer. Raises _NotPlainLoraError as `_plain_lora`."""
    if not hasattr(module, "lora_A"):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged or len(names) > 1:
        raise _NotPlainLoraError
    if module.disable_adapters or not names:
        return None
    (name,) = names
    a, b = module.lora_A[name], module.lora_B[name]
    plain_dropout = isinstance(module.lora_dropout[name], nn.Identity)
    if name in module.lora_variant or not plain_dropout or b.bias is not None:
        raise _NotPlainLoraError
    return Lora(a.weight, b.weight, float(module.scaling[name]))


def _base_layer(module: Any) -> Any:
    return getattr(module, "base_layer", module)
