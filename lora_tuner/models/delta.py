"""LoRA deltas as tensors: load those of an adapter, sum several, truncate their rank.

The delta of a layer is B @ A, with its scale in B; experts have one each, all of one rank.
Surprise: the (out, in) product is never computed. QR factors of both sides leave a core of size
rank, whose singular values are those of the delta. Limit: DoRA also rescales the base's weights, so
its deltas can be loaded, but not summed or truncated."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..adapters.adapter import Adapter
from ..adapters.expert_names import file_names
from ..errors import AdapterError
from .layers import Layer, has_transposed_layers
from .loading import LoadedBase
from .lora import read_checked_tensors
from .targets import shortest_target_names

if TYPE_CHECKING:
    from peft import LoraConfig

_FLOAT32_ROUNDING = 1e-7  # relative


@dataclass(frozen=True)
class LoraDelta:
    """Delta of one layer in float32: A (rank, in), B (out, rank), scale included. Of experts A is
    (experts, rank, in) and B (experts, out, rank).

    `magnitude` (out,) is that of DoRA (Liu et al., 2024, arXiv:2402.09353).
    """

    A: torch.Tensor
    B: torch.Tensor
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as PEFT stores them: of experts A is (experts * rank, in) and B (out, rank * experts)."""
        if self.A.dim() == 2:
            return self.A.contiguous(), self.B.contiguous()
        return self.A.flatten(0, 1).contiguous(), self.B.permute(1, 2, 0).flatten(1, 2).contiguous()

    @property
    def size(self) -> int:
        """Weights of A and B at rank 1."""
        return (self.A.numel() + self.B.numel()) // self.rank


Deltas = dict[str, LoraDelta]  # full name of the layer in the base -> its delta


def load_deltas(adapter: Adapter, layers: Mapping[str, Layer]) -> Deltas:
    """Copy the deltas of a stored adapter into memory.

    Args:
        adapter: the stored adapter.
        layers: the layers of its base.

    Raises:
        AdapterError: the adapter is damaged or does not fit the layers.
    """
    # float32 whatever the dtype of the base: PEFT trains and applies adapters so. Copied: the file
    # is memory-mapped, and tensors would change when somebody writes to it.
    tensors = {
        key: tensor.to(torch.float32, copy=True) for key, tensor in read_checked_tensors(adapter, layers).items()
    }
    deltas = {}
    for module in adapter.modules:
        lora_a, lora_b = (tensors[adapter.tensor_name(module, f"lora_{part}.weight")] for part in "AB")
        lora_b = lora_b * adapter.scale_of(module)
        if not (lora_a.isfinite().all() and lora_b.isfinite().all()):
            raise AdapterError(
                f"{adapter.path} has weights in {module} that are not finite in float32, so it cannot be used."
            )
        if module in adapter.experts:  # the inverse of `LoraDelta.matrices`
            rank = adapter.rank_of(module)
            lora_a = lora_a.unflatten(0, (-1, rank))
            lora_b = lora_b.unflatten(1, (rank, -1)).permute(2, 0, 1)
        magnitude = tensors.get(adapter.tensor_name(module, "lora_magnitude_vector"))
        deltas[module] = LoraDelta(lora_a, lora_b, magnitude)
    return deltas


def check_summable(adapter: Adapter) -> None:
    """Raise AdapterError for what cannot be summed or truncated: replaced weights, and DoRA."""
    if adapter.replaced:
        raise AdapterError(
            f"{adapter.name} replaces weights of the base ({adapter.replaced}), which cannot be "
            "part of a sum or be truncated: merge it instead."
        )
    if adapter.config.get("use_dora"):
        raise AdapterError(
            f"{adapter.name} is a DoRA adapter, which also rescales the base's weights, so it "
            "cannot be part of a sum: merge it instead."
        )


def sum_deltas(parts: Sequence[tuple[float, Deltas]]) -> Deltas:
    """The exact weighted sum of deltas; ranks add up."""
    total = {}
    for module in sorted({module for _, deltas in parts for module in deltas}):
        weighted = [(weight, deltas[module]) for weight, deltas in parts if module in deltas]
        total[module] = LoraDelta(
            torch.cat([delta.A for _, delta in weighted], dim=-2),
            torch.cat([weight * delta.B for weight, delta in weighted], dim=-1),
        )
    return total


def singular_values(delta: LoraDelta) -> torch.Tensor:
    """Singular values of the delta in float64, largest first: (min(rank, in, out),).

    Of experts, whose rank is one, the energies of all of them add up: the root of the sum of
    squares at each position. Values within float32 rounding of A and B are 0, as when an adapter is
    subtracted from itself."""
    values = _svd(delta)[1]
    if values.dim() > 1:
        values = values.square().sum(0).sqrt()
    # float64: squares of large float32 numbers overflow.
    threshold = _FLOAT32_ROUNDING * delta.B.double().norm() * delta.A.double().norm()
    return torch.where(values > threshold, values, 0.0)


def squared_norm(delta: LoraDelta) -> float:
    """Squared Frobenius norm of the delta, its energy: the sum of its squared singular values.

    A norm within float32 rounding of A and B is 0.
    """
    lora_a, lora_b = delta.A.double(), delta.B.double()
    energy = float(((lora_b.mT @ lora_b) * (lora_a @ lora_a.mT)).sum())
    return energy if energy > float(_FLOAT32_ROUNDING * lora_b.norm() * lora_a.norm()) ** 2 else 0.0


def truncate_rank(delta: LoraDelta, rank: int) -> LoraDelta:
    """The nearest delta of that rank (Eckart and Young, 1936)."""
    if rank >= delta.rank:
        return delta
    left, values, right = _svd(delta)
    root = values[..., :rank].sqrt()
    return LoraDelta(
        (root[..., None] * right[..., :rank, :]).float().contiguous(),
        (left[..., :rank] * root[..., None, :]).float().contiguous(),
    )


def lost_energy(exact: Deltas, kept: Deltas) -> dict[str, float]:
    """Share of each layer's energy that `kept` lacks.

    It is the energy of the difference over that of the exact delta. Layers that `kept` does not
    have count as zero deltas.
    """
    shares = {}
    difference = sum_deltas([(1.0, exact), (-1.0, kept)])
    for module, delta in exact.items():
        energy = squared_norm(delta)
        shares[module] = squared_norm(difference[module]) / energy if energy else 0.0
    return shares


def total_lost_energy(exact: Deltas, shares: Mapping[str, float]) -> float:
    """Share of the energy of all layers together, from the share of each layer."""
    energies = {module: squared_norm(delta) for module, delta in exact.items()}
    total = sum(energies.values())
    return sum(shares[module] * energy for module, energy in energies.items()) / total if total else 0.0


def to_state_dict(deltas: Deltas) -> dict[str, torch.Tensor]:
    """The tensors by the names that PEFT gives them on disk."""
    tensors = {}
    names = file_names(module for module, delta in deltas.items() if delta.A.dim() == 3)
    for module, delta in sorted(deltas.items()):
        prefix = f"base_model.model.{names.get(module, module)}.lora_"
        tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"] = delta.matrices
    return tensors


def make_lora_config(deltas: Deltas, base: LoadedBase) -> "LoraConfig":
    """PEFT config for the tensors of `to_state_dict`: scale 1, patterns for ranks that differ."""
    from peft import LoraConfig

    linear, experts = shortest_target_names(base.model, list(deltas))
    ranks = {module: delta.rank for module, delta in deltas.items()}
    common_rank = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
    other_ranks = {module: rank for module, rank in ranks.items() if rank != common_rank}
    return LoraConfig(
        base_model_name_or_path=base.files.repo,
        revision=base.files.revision,
        task_type="CAUSAL_LM",
        r=common_rank,
        lora_alpha=common_rank,
        rank_pattern=dict(other_ranks),
        alpha_pattern=dict(other_ranks),
        target_modules=linear,
        target_parameters=experts or None,
        fan_in_fan_out=has_transposed_layers(base.model),
        inference_mode=True,
    )


def _svd(delta: LoraDelta) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin SVD of B @ A in float64: (out, k), (k,), (k, in), k at most the rank; for each expert."""
    left, upper = torch.linalg.qr(delta.B.double())
    right, lower = torch.linalg.qr(delta.A.double().mT)
    core_left, values, core_right = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return left @ core_left, values, core_right @ right.mT
