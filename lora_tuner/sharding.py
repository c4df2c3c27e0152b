"""A base that several GPUs hold together: PyTorch's FSDP2, as `accelerate launch` configures it.

Split are the blocks of the base, nearly all of it and frozen: a block is gathered when its turn comes, and let go again.
Adapter, embeddings and head are whole in each process, so that loss, checkpoints and resuming are those of whole bases.

Surprise: Trainer and accelerate would split the adapter as well, and without a GPU drop the plan without a word. So it is
taken out of the environment before they look. Price: a block is read by all at once or by none, so that all must read alike,
the held-out rows too. Limit: bases in full numbers, and methods that begin without looking at them.
"""

import os
import warnings
from typing import Any

from . import distributed
from .errors import TrainingError

DEVICES = ("cuda",)
_ASKED = "ACCELERATE_USE_FSDP"
_OTHERS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")
_UNKNOWN = {  # what accelerate's plan can ask for and is not done here, and what to do
    "FSDP_OFFLOAD_PARAMS": "leave it out",
    "FSDP_ACTIVATION_CHECKPOINTING": "give --checkpointing on in its place",
    "FSDP_IGNORED_MODULES": "leave it out",
}
_POLICY, _BY_BLOCK = "FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"
_plan: Any = None  # accelerate's FullyShardedDataParallelPlugin


def join(device: str) -> None:
    """Take the plan that the launcher hands on, if it does, for processes that train on `device`.

    Raises TrainingError for a plan that cannot be kept.
    """
    global _plan
    if asked := [name for name in _OTHERS if _is_on(name)]:
        raise TrainingError(f"{asked[0]} is set, and a base is split by FSDP2 alone here: use that, or leave it out.")
    if _plan is not None or not _is_on(_ASKED):
        return
    import torch
    from accelerate import FullyShardedDataParallelPlugin

    if distributed.announced() == 1:
        raise TrainingError(f"{_ASKED} splits the base over processes, and there is one: leave it out.")
    kind = "cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda"
    if kind not in DEVICES:
        raise TrainingError(
            f"{_ASKED} splits the base over GPUs, and these processes run on the CPU: leave it out, and each holds the whole "
            "base."
        )
    if os.environ.setdefault(_POLICY, _BY_BLOCK).upper() != _BY_BLOCK:
        raise TrainingError(f"A base is split by its blocks: set {_POLICY.lower()} to {_BY_BLOCK}.")
    try:
        plan = FullyShardedDataParallelPlugin()
    except (ValueError, ImportError) as error:
        raise TrainingError(f"accelerate cannot read its FSDP settings: {error}") from error
    if plan.fsdp_version != 2:
        raise TrainingError("accelerate's FSDP settings are of version 1: set fsdp_version to 2.")
    for name, advice in _UNKNOWN.items():
        if _is_on(name):
            raise TrainingError(f"accelerate's FSDP settings have {name.lower()}: {advice}.")
    del os.environ[_ASKED]
    _plan = plan


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off", "none")


def parts() -> int:
    """Over how many processes a base is split; 1 where each holds it whole."""
    return 1 if _plan is None else distributed.size()


def settle(model: Any, place: Any) -> None:
    """Bring a base in the main memory to its device: whole, or this process's part of it, block by block.

    Raises TrainingError for a base without the blocks that the plan names.
    """
    if parts() == 1:
        model.to(place)
        return
    # What follows a decoder is its head, or the loss, and neither writes into what it is given.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = _plan.transformer_cls_names_to_wrap or model._no_split_modules or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise TrainingError(f"This base has no blocks called {', '.join(names) or 'so'}, by which it could be split.")
    mesh = init_device_mesh(place.type, (parts(),))
    others = set(model.parameters()) - {parameter for block in blocks for parameter in block.parameters()}
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=_plan.reshard_after_forward)
    model.to(place)
    fully_shard(model.base_model, mesh=mesh, ignored_params=others)  # it fetches a block while the one before computes


def whole(weight: Any) -> Any:
    """All of a weight of which this process may hold a part; the others must ask for it too."""
    return weight if parts() == 1 or not hasattr(weight, "full_tensor") else weight.full_tensor()
