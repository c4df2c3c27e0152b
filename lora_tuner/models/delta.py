"""Low-rank updates as numbers: read those of an adapter, add several, find and cut their rank.

An update of a layer is up @ down, its scale in `up`. Surprise: the wide matrix is never made. The QR factors of both sides
leave a small core, and the singular values of that are those of the update. Limit: DoRA's updates are no sums, so they
are read, and refused for the rest.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from ..adapters.adapter import Adapter
from ..errors import AdapterError
from .loading import LoadedBase
from .lora import linear_layers, read_checked_tensors, shortest_target_names

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class LoraDelta:
    """The update of one layer in float32: `down` (rank, in), `up` (out, rank). With DoRA (Liu et al., 2024,
    arXiv:2402.09353) a `magnitude` (out,) as well."""

    A: torch.Tensor
    B: torch.Tensor
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.A)


_ROUNDING = 1e-7  # of float32
Deltas = dict[str, LoraDelta]  # full name of the layer in the base -> its update


def load_deltas(adapter: Adapter, layers: dict[str, Any]) -> Deltas:
    """The updates of a stored adapter, copied out of its file. Raises AdapterError if it is damaged or does not fit these
    layers of a base."""
    # In float32, whatever the base is: so they were trained, and so PEFT applies them. A copy: what was read is mapped, and
    # whoever writes into the file would change it here.
    tensors = {
        key: tensor.to(torch.float32, copy=True) for key, tensor in read_checked_tensors(adapter, layers).items()
    }
    updates = {}
    for module in adapter.modules:
        prefix = f"base_model.model.{module}.lora_"
        down, up = tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"] * adapter.scale_of(module)
        updates[module] = LoraDelta(down, up, tensors.get(f"{prefix}magnitude_vector"))
        if not all(part.isfinite().all() for part in (down, up)):
            raise AdapterError(
                f"{adapter.path} has numbers in {module} that are not finite in float32: it is of no use."
            )
    return updates


def check_summable(adapter: Adapter) -> None:
    """Raise AdapterError for DoRA, whose updates cannot be added or cut."""
    if adapter.config.get("use_dora"):
        raise AdapterError(
            f"{adapter.name} is a DoRA adapter, which also rescales the base's weights, so its updates are no sums: merge it "
            "instead."
        )


def sum_deltas(parts: Sequence[tuple[float, Deltas]]) -> Deltas:
    """The weighted sum of updates, exactly: the ranks add up."""
    total = {}
    for module in sorted({module for _, updates in parts for module in updates}):
        own = [(weight, updates[module]) for weight, updates in parts if module in updates]
        down = torch.cat([update.A for _, update in own])
        total[module] = LoraDelta(down, torch.cat([weight * update.B for weight, update in own], dim=1))
    return total


def _thin_factors(update: LoraDelta) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular vectors and values of up @ down in float64: (out, k), (k,), (k, in), k at most the rank."""
    left, upper = torch.linalg.qr(update.B.double())
    right, lower = torch.linalg.qr(update.A.double().T)
    inner_left, values, inner_right = torch.linalg.svd(upper @ lower.T)
    count = len(values)
    return left @ inner_left[:, :count], values, inner_right[:count] @ right.T


def singular_values(update: LoraDelta) -> torch.Tensor:
    """The singular values of the update, largest first, in float64: (min(rank, in, out),). What is within float32's rounding
    of its two sides, as where an adapter is taken from itself, is 0."""
    values = _thin_factors(update)[1]
    # In float32 the squares of large numbers are not finite.
    return torch.where(values > _ROUNDING * update.B.double().norm() * update.A.double().norm(), values, 0.0)


def squared_norm(update: LoraDelta) -> float:
    """The squared Frobenius norm of the update: the sum of its squared singular values; 0 within float32's rounding."""
    up, down = update.B.double(), update.A.double()
    found = float(((up.T @ up) * (down @ down.T)).sum())
    return found if found > float(_ROUNDING * up.norm() * down.norm()) ** 2 else 0.0


def truncate_rank(update: LoraDelta, rank: int) -> LoraDelta:
    """The nearest update of that rank (Eckart and Young, 1936), its weight shared between both sides."""
    if rank >= update.rank:
        return update
    left, values, right = _thin_factors(update)
    root = values[:rank].sqrt()
    return LoraDelta((root[:, None] * right[:rank]).float().contiguous(), (left[:, :rank] * root).float().contiguous())


def lost_energy(exact: Deltas, kept: Deltas) -> dict[str, float]:
    """Share of each layer's energy that is not in `kept`, which may lack layers: the energy of the difference."""
    shares = {}
    for module, update in exact.items():
        whole = squared_norm(update)
        parts = [(1.0, {module: update})] + ([(-1.0, {module: kept[module]})] if module in kept else [])
        shares[module] = squared_norm(sum_deltas(parts)[module]) / whole if whole else 0.0
    return shares


def total_lost_energy(exact: Deltas, shares: dict[str, float]) -> float:
    """Share of the energy of all layers together."""
    each = {module: squared_norm(update) for module, update in exact.items()}
    whole = sum(each.values())
    return sum(shares[module] * each[module] for module in each) / whole if whole else 0.0


def to_state_dict(updates: Deltas) -> dict[str, torch.Tensor]:
    """As PEFT names them on disk."""
    named = {}
    for module, update in sorted(updates.items()):
        named[f"base_model.model.{module}.lora_A.weight"] = update.A.contiguous()
        named[f"base_model.model.{module}.lora_B.weight"] = update.B.contiguous()
    return named


def lora_settings(updates: Deltas, base: LoadedBase) -> "LoraConfig":
    """The config with which PEFT reads `tensors`: scale 1 everywhere, the commonest rank, patterns for other layers."""
    from peft import LoraConfig

    ranks = {module: update.rank for module, update in updates.items()}
    common = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
    others = {module: rank for module, rank in ranks.items() if rank != common}
    transposed = any(isinstance(layer, Conv1D) for layer in linear_layers(base.model).values())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=common,
        lora_alpha=common,
        rank_pattern=dict(others),
        alpha_pattern=dict(others),
        target_modules=shortest_target_names(base.model, list(updates)),
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    config.base_model_name_or_path = base.files.repo
    config.revision = base.files.revision
    return config
