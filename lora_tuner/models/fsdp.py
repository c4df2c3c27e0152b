"""A base that several GPUs hold together: PyTorch's FSDP2, as `accelerate launch` configures it.

Split are the blocks of the base, nearly all of it and frozen: a block is gathered when its turn comes, and let go again.
Adapter, embeddings and head are whole in each process, so that loss, checkpoints and resuming are those of whole bases.

Surprise: Trainer and accelerate would split the adapter as well, and without a GPU drop the plan without a word. So it is
taken out of the environment before they look. Price: a block is read by all at once or by none, so that all must read alike,
the held-out rows too. Limit: bases in full numbers; main memory is not counted, into which each process reads its base before
it keeps its part.
"""

import os
import warnings
from typing import Any

from .. import distributed
from ..errors import TrainingError

DEVICES = ("cuda",)
_ASKED = "ACCELERATE_USE_FSDP"
_OTHERS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")
_UNKNOWN = {  # what accelerate's plan can ask for and is not done here, and what to do
    "FSDP_OFFLOAD_PARAMS": "set it to false",
    "FSDP_ACTIVATION_CHECKPOINTING": "set it to false, and give --gradient-checkpointing on",
    "FSDP_IGNORED_MODULES": "leave it out",
}
_POLICY, _BY_BLOCK = "FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"
_plan: Any = None  # accelerate's FullyShardedDataParallelPlugin


def read_plan(device: str) -> None:
    """Take the plan that the launcher hands on, if it does, for processes that train on `device`.

    Raises TrainingError for a plan that cannot be kept.
    """
    global _plan
    if asked := [name for name in _OTHERS if _is_true(name)]:
        raise TrainingError(f"{asked[0]} is set, and a base is split by FSDP2 alone here: use that, or leave it out.")
    if _plan is not None or not _is_true(_ASKED):
        return
    import torch
    from accelerate import FullyShardedDataParallelPlugin

    if distributed.expected_world_size() == 1:
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
    except (ValueError, KeyError, ImportError) as error:
        raise TrainingError(f"accelerate cannot read its FSDP settings: {error}") from error
    if plan.fsdp_version != 2:
        raise TrainingError("accelerate's FSDP settings are of version 1: set fsdp_version to 2.")
    if not plan.reshard_after_forward:
        raise TrainingError("Without fsdp_reshard_after_forward each GPU would gather the whole base: set it to true.")
    for name, advice in _UNKNOWN.items():
        if _is_true(name):
            raise TrainingError(f"accelerate's FSDP settings have {name.lower()}: {advice}.")
    del os.environ[_ASKED]
    _plan = plan


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "f", "false", "n", "no", "off", "none")


def shard_count() -> int:
    """Over how many processes a base is split; 1 where each holds it whole."""
    return 1 if _plan is None else distributed.world_size()


def place_or_shard(model: Any, place: Any) -> None:
    """Bring a base in the main memory to its device: whole, or this process's part of it, block by block.

    Raises TrainingError for a base without the blocks that the plan names, or with some that share weights.
    """
    if shard_count() == 1:
        model.to(place)
        return
    # What follows a decoder is its head, or the loss, and neither writes into what it is given.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = _decoder_blocks(model)
    held = [parameter for block in blocks for parameter in block.parameters()]
    if len(set(held)) < len(held):
        raise TrainingError("The blocks of this base share weights, so it cannot be split: leave FSDP out.")
    others = set(model.parameters()) - set(held)
    mesh = init_device_mesh(place.type, (shard_count(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    model.to(place)
    fully_shard(model.base_model, mesh=mesh, ignored_params=others)  # it fetches a block while the one before computes


def _decoder_blocks(model: Any) -> list[Any]:
    """The blocks that the plan names, or else the model; of those within each other the outermost."""
    named = [name.strip() for name in _plan.transformer_cls_names_to_wrap or () if name.strip()]
    names = named or model._no_split_modules or ()
    if missing := set(named) - {type(module).__name__ for module in model.modules()}:
        raise TrainingError(f"This base has no blocks called {sorted(missing)[0]}, by which it could be split.")
    blocks = {path: module for path, module in model.named_modules() if type(module).__name__ in names}
    inner = {path for path in blocks for outer in blocks if path.startswith(f"{outer}.")}
    if not blocks:
        raise TrainingError("This base does not name its blocks: set fsdp_transformer_layer_cls_to_wrap.")
    return [block for path, block in blocks.items() if path not in inner]


def gathered_bytes(model: Any) -> int:
    """Bytes of the blocks that a step of a split base has whole at a time: one that computes, the next, which arrives, and what
    that one is copied from."""
    if shard_count() == 1:
        return 0
    from torch.distributed.fsdp import FSDPModule

    blocks: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    sizes = [sum(it.numel() * it.itemsize for it in block.parameters() if not it.requires_grad) for block in blocks]
    return 3 * int(max(sizes[1:]))  # the first holds them all


def full_tensor(weight: Any) -> Any:
    """All of a weight of which this process may hold a part; the others must ask for it too."""
    return weight if shard_count() == 1 or not hasattr(weight, "full_tensor") else weight.full_tensor()
