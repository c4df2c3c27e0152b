"""Shard a base model over several GPUs with PyTorch's FSDP2, as `accelerate launch` configures it.

The decoder blocks of the frozen base, nearly all of it, are sharded: each block is gathered for its
computation and released again. LoRA weights, embeddings and head are whole in every process, so
loss, checkpoints and resuming work as for an unsharded base.

Surprise: Trainer and accelerate would shard the adapter too, and on a CPU would silently ignore the
settings. So they are taken out of the environment before Trainer sees them. Price: gathering is
collective, so all processes must run equally many forward passes, also on held-out rows. Limit: not
for quantized bases; each process first reads the whole base into main memory, which is not counted.
"""

from __future__ import annotations

import os
import warnings

import torch
from accelerate import FullyShardedDataParallelPlugin
from transformers import PreTrainedModel

from .. import distributed
from ..errors import TrainingError

DEVICES = ("cuda",)
_ENABLED = "ACCELERATE_USE_FSDP"
_UNSUPPORTED_LAUNCHES = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
_UNSUPPORTED_SETTINGS = {  # name -> advice
    "FSDP_OFFLOAD_PARAMS": "set it to false",
    "FSDP_ACTIVATION_CHECKPOINTING": "set it to false, and use --gradient-checkpointing on",
    "FSDP_IGNORED_MODULES": "remove it",
}
_WRAP_POLICY, _BY_BLOCK = "FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"
_plugin: FullyShardedDataParallelPlugin | None = None


def read_settings(device: str) -> None:
    """Read accelerate's FSDP settings from the environment, and disable FSDP in Trainer.

    Args:
        device: the setting `device` of this run.

    Raises:
        TrainingError: settings that are not supported.
    """
    global _plugin
    if launches := [name for name in _UNSUPPORTED_LAUNCHES if _is_true(name)]:
        raise TrainingError(
            f"{launches[0]} is set, but only FSDP2 can shard a base here: use FSDP2, or unset it."
        )
    if _plugin is not None or not _is_true(_ENABLED):
        return
    if distributed.expected_world_size() == 1:
        raise TrainingError(f"{_ENABLED} shards the base over processes, but there is only one: unset it.")
    device_type = "cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda"
    if device_type not in DEVICES:
        raise TrainingError(
            f"{_ENABLED} shards the base over GPUs, but these processes run on the CPU: unset it, "
            "and each process holds the whole base."
        )
    if os.environ.setdefault(_WRAP_POLICY, _BY_BLOCK).upper() != _BY_BLOCK:
        raise TrainingError(f"A base is sharded by decoder block: set {_WRAP_POLICY.lower()} to {_BY_BLOCK}.")
    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, KeyError, ImportError) as error:
        raise TrainingError(f"accelerate cannot read its FSDP settings: {error}") from error
    if plugin.fsdp_version != 2:
        raise TrainingError("accelerate's FSDP settings are of version 1: set fsdp_version to 2.")
    if not plugin.reshard_after_forward:
        raise TrainingError(
            "Without fsdp_reshard_after_forward each GPU would gather the whole base: set it to true."
        )
    for name, advice in _UNSUPPORTED_SETTINGS.items():
        if _is_true(name):
            raise TrainingError(f"accelerate's FSDP settings have {name.lower()}: {advice}.")
    del os.environ[_ENABLED]
    _plugin = plugin


def shard_count() -> int:
    """Number of processes that a base is sharded over; 1 where each holds all of it."""
    return 1 if _plugin is None else distributed.world_size()


def place_or_shard(model: PreTrainedModel, device: torch.device) -> None:
    """Move a base from main memory to its device: all of it, or this process's shard of each block.

    Raises:
        TrainingError: the base lacks the configured blocks, or its blocks share weights.
    """
    if _plugin is None or shard_count() == 1:
        model.to(device)  # type: ignore[arg-type]
        return
    # Harmless: head and loss, which follow the decoder, never write into their inputs.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = _decoder_blocks(model, _plugin.transformer_cls_names_to_wrap)
    block_parameters = [parameter for block in blocks for parameter in block.parameters()]
    if len(set(block_parameters)) < len(block_parameters):
        raise TrainingError("The blocks of this base share weights, so it cannot be sharded: train without FSDP.")
    unsharded = set(model.parameters()) - set(block_parameters)
    mesh = init_device_mesh(device.type, (shard_count(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    model.to(device)  # type: ignore[arg-type]
    fully_shard(model.base_model, mesh=mesh, ignored_params=unsharded)  # prefetches the next block


def gathered_bytes(model: torch.nn.Module) -> int:
    """Bytes of gathered blocks that are in memory at the same time.

    These are the current block, the next one, and the buffer that it is copied from.
    """
    from torch.distributed.fsdp import FSDPModule

    sizes = [_frozen_bytes(module) for module in model.modules() if isinstance(module, FSDPModule)]
    return 3 * max(sizes[1:], default=0)  # the first is the root, which contains all blocks


def full_tensor(weight: torch.Tensor) -> torch.Tensor:
    """Gather a weight that may be sharded. Collective: all processes must call it."""
    from torch.distributed.tensor import DTensor

    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _decoder_blocks(model: PreTrainedModel, configured: list[str] | None) -> list[torch.nn.Module]:
    """Blocks of the classes that settings or model name; of nested blocks the outermost."""
    names = {name.strip() for name in configured or ()} - {""} or set(model._no_split_modules or ())
    if missing := names - {type(module).__name__ for module in model.modules()}:
        raise TrainingError(f"This base has no blocks of class {sorted(missing)[0]} to shard it by.")
    blocks = {path: module for path, module in model.named_modules() if type(module).__name__ in names}
    if not blocks:
        raise TrainingError("This base does not name its blocks: set fsdp_transformer_layer_cls_to_wrap.")
    nested = {path for path in blocks for outer in blocks if path.startswith(f"{outer}.")}
    return [block for path, block in blocks.items() if path not in nested]


def _frozen_bytes(module: torch.nn.Module) -> int:
    return sum(
        parameter.numel() * parameter.itemsize for parameter in module.parameters() if not parameter.requires_grad
    )


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "f", "false", "n", "no", "off", "none")
