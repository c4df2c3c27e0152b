"""Training on several processes, started by torchrun or accelerate launch.

Surprise: without a GPU, Trainer runs each process that torchrun has started as a separate run in
the same folder. So the process group is formed first, and its size is compared with WORLD_SIZE.
With a single process these functions do nothing. Each process holds the whole base, unless it is
sharded (models/fsdp.py)."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

from .errors import LoraTunerError, ProcessLostError, RaisedOnRankZero, TrainingError, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_TIMEOUT = timedelta(days=7)  # rank 0 downloads and prepares data while the others wait
_LAUNCH = "start all of them with torchrun or accelerate launch"
_group: torch.distributed.ProcessGroup | None = None  # gloo, also where NCCL carries the gradients


def expected_world_size() -> int:
    """Return the number of processes that the launcher announces in WORLD_SIZE."""
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise TrainingError(f"WORLD_SIZE is '{os.environ['WORLD_SIZE']}', and should be a number.") from error


def world_size() -> int:
    return 1 if _group is None else _group.size()


def rank() -> int:
    return 0 if _group is None else _group.rank()


def local_world_size() -> int:
    """Return the number of processes on this machine, this one included."""
    return 1 if _group is None else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def init_process_group(device: str) -> None:
    """Form the process group that the launcher has announced, if any.

    Args:
        device: the `device` setting; with "auto" each process uses its own GPU.

    Raises:
        TrainingError: the group is not the announced one, its processes would share a GPU, or its
            environment asks for what several processes cannot do.
    """
    global _group
    if _group is not None or expected_world_size() == 1:
        return
    import torch

    if device.startswith("cuda:"):
        raise TrainingError(
            f"--device {device} is one GPU for all processes: leave it out, and each process uses its own."
        )
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if on_cpu and device != "cpu" and torch.backends.mps.is_available():
        raise TrainingError("MPS supports one process: start without torchrun, or train with --device cpu.")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_cpu and local_size > torch.cuda.device_count():
        raise TrainingError(
            f"{local_size} processes would share {torch.cuda.device_count()} GPUs on this machine: start one per GPU."
        )
    if (compiler := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO")).upper() != "NO":
        raise TrainingError(
            f"ACCELERATE_DYNAMO_BACKEND={compiler} is not supported with several processes: set it to no."
        )
    if missing := [
        name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]:
        raise TrainingError(
            f"WORLD_SIZE announces {expected_world_size()} processes, but {missing[0]} is not "
            f"set, so they cannot connect: {_LAUNCH}, or unset WORLD_SIZE to train with one."
        )
    from accelerate import PartialState

    try:
        state = PartialState(cpu=on_cpu)
        group = torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT) if state.num_processes > 1 else None
    except (ValueError, RuntimeError) as error:
        raise TrainingError(f"The processes cannot connect: {first_line(error)}") from error
    if state.num_processes != expected_world_size():
        raise TrainingError(
            f"WORLD_SIZE announces {expected_world_size()} processes, but this one finds "
            f"{state.num_processes}, so each would train alone: {_LAUNCH}."
        )
    _group = group


def destroy_process_group() -> None:
    """Dissolve the group after all processes have finished.

    Not called after an error: there it would wait for the others.
    """
    if _group is not None:
        import torch

        drop_process_group()
        torch.distributed.destroy_process_group()


def drop_process_group() -> None:
    """Continue alone after another process has ended."""
    global _group
    _group = None


def run_on_rank_zero(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 while the others wait, and return its result on all processes.

    Raises:
        RaisedOnRankZero: on the other processes, when `work` raises on rank 0.
    """
    if _group is None:
        return work()
    import torch

    message: list[object] = [None, None]  # result, text of the error
    failure: Exception | None = None
    if rank() == 0:
        try:
            message[0] = work()
        except (LoraTunerError, OSError) as error:
            failure, message[1] = error, str(error)
    try:
        with _detect_process_loss():
            torch.distributed.broadcast_object_list(message, src=0, group=_group)
    finally:
        if failure is not None:
            raise failure
    if message[1] is not None:
        raise RaisedOnRankZero(message[1])
    return cast("T", message[0])


_PROCESS_LOSS = "[Cc]onnection (closed|reset|refused)|Broken pipe|ncclRemoteError|communicator was aborted"


def is_process_loss(error: Exception) -> bool:
    """Return True if an error of a collective operation means that another process has ended."""
    return world_size() > 1 and re.search(_PROCESS_LOSS, str(error)) is not None


@contextlib.contextmanager
def _detect_process_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise share_error(ProcessLostError("Another process of this run has ended.")) from error


def with_rank_prefix(text: str) -> str:
    """Prefix the message of a launched process with its rank, except for rank 0.

    Empty on other ranks before the group is formed, because rank 0 reports the same.
    """
    env_rank = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"
    if env_rank == "0":
        return text
    return f"Process {env_rank}: {text}" if _group is not None else ""


def share_error(error: Exception) -> Exception:
    """Choose the exception for an error that all processes detect: only rank 0 reports it."""
    return error if rank() == 0 else RaisedOnRankZero(str(error))


def all_gather(value: T) -> list[T]:
    """Return the values of all processes, by rank, on all processes."""
    if _group is None:
        return [value]
    import torch

    values = [value] * world_size()
    with _detect_process_loss():
        torch.distributed.all_gather_object(values, value, group=_group)
    return values


def all_reduce_max(value: float) -> float:
    """Return the largest value of all processes."""
    if _group is None:
        return value
    import torch

    largest = torch.tensor(float(value), dtype=torch.float64)
    with _detect_process_loss():
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=_group)
    return largest.item()


def wrap_ddp(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Wrap a model so that gradients are averaged over all processes.

    Frozen weights and buffers are not synchronized: all processes have them, and accelerate refuses
    sharded ones.
    """
    from torch.nn.parallel import DistributedDataParallel

    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])


def all_reduce_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients of all processes in place, as a training step does."""
    if _group is not None:
        import torch

        for parameter in parameters:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
