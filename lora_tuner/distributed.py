"""One run on several processes, as torchrun or accelerate starts them: who is the first of them, and what all agree on.

Surprise: without a GPU, Trainer takes what torchrun has started for so many single runs, each alone in the same folder. So the
group is formed before anything else is done, and its size is compared with the one that was announced. Alone, all of this does
nothing. Each process holds the whole base, unless it is split (`sharding`).
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from .errors import LoraTunerError, ProcessLostError, RaisedOnRankZero, TrainingError

T = TypeVar("T")

_TIMEOUT = timedelta(days=7)  # for the first process, which downloads and prepares while the others wait
_LAUNCH = "start all of them with torchrun or accelerate launch"
_group: Any = None  # over gloo, whatever carries the gradients


def expected_world_size() -> int:
    """How many processes the launcher says there are."""
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise TrainingError(f"WORLD_SIZE is '{os.environ['WORLD_SIZE']}', and should be a number.") from error


def world_size() -> int:
    return 1 if _group is None else int(_group.size())


def rank() -> int:
    return 0 if _group is None else int(_group.rank())


def local_world_size() -> int:
    """How many of the processes are on this machine, this one included."""
    return 1 if _group is None else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def init_process_group(device: str) -> None:
    """Form the group that the launcher has announced, if it has, for training on `device` ("auto" is each process's own GPU).

    Raises TrainingError when the group is not the announced one, or is to share one GPU, or one model.
    """
    global _group
    if _group is not None or expected_world_size() == 1:
        return
    import torch

    if device.startswith("cuda:"):
        raise TrainingError(f"--device {device} is one GPU for all processes: leave it out, and each takes its own.")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if on_cpu and device != "cpu" and torch.backends.mps.is_available():
        raise TrainingError("Apple's GPU is for one process: leave torchrun out, or train with --device cpu.")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_cpu and here > torch.cuda.device_count():
        raise TrainingError(f"{here} processes would share {torch.cuda.device_count()} GPUs here: start one for each.")
    if (compiled := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO")).upper() != "NO":
        raise TrainingError(
            f"ACCELERATE_DYNAMO_BACKEND={compiled} would not be kept by several processes: set it to no."
        )
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise TrainingError(
            f"WORLD_SIZE announces {expected_world_size()} processes, and {missing[0]} is not set, so they would not find each other: "
            f"{_LAUNCH}, or unset WORLD_SIZE to train with one."
        )
    from accelerate import PartialState

    try:
        state = PartialState(cpu=on_cpu)
        group = torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT) if state.num_processes > 1 else None
    except (ValueError, RuntimeError) as error:
        raise TrainingError(f"The processes cannot find each other: {str(error).splitlines()[0]}") from error
    if state.num_processes != expected_world_size():
        raise TrainingError(
            f"WORLD_SIZE announces {expected_world_size()} processes, and this one finds {state.num_processes}, so each would train alone: "
            f"{_LAUNCH}."
        )
    _group = group


def destroy_process_group() -> None:
    """Dissolve the group when all have done their work; one that fails just ends, for here it would wait for the others."""
    global _group
    if _group is not None:
        import torch

        _group = None
        torch.distributed.destroy_process_group()


def drop_process_group() -> None:
    """Go on without the others, of which one is no more."""
    global _group
    _group = None


def run_on_rank_zero(work: Callable[[], T]) -> T:
    """What the first process makes of `work`, in all of them; the others wait. Its error is raised as Elsewhere in those."""
    if _group is None:
        return work()
    import torch

    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = work()
        except (LoraTunerError, OSError) as error:
            found[1] = error
    told = [found[0], str(found[1]) if found[1] is not None else None]
    try:
        with _detect_process_loss():
            torch.distributed.broadcast_object_list(told, src=0, group=_group)
    finally:
        if found[1] is not None:
            raise found[1]
    if told[1] is not None:
        raise RaisedOnRankZero(told[1])
    result: T = told[0]
    return result


_PROCESS_LOSS = "[Cc]onnection (closed|reset|refused)|Broken pipe|ncclRemoteError|communicator was aborted"


def is_process_loss(error: Exception) -> bool:
    """Whether it says that another process is no more."""
    return world_size() > 1 and re.search(_PROCESS_LOSS, str(error)) is not None


@contextlib.contextmanager
def _detect_process_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise share_error(ProcessLostError("Another process of this run has ended.")) from error


def with_rank_prefix(text: str) -> str:
    """What a process that was launched has to say, with its number unless it is the first; nothing before they are together, for
    the first says the same."""
    number = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"
    return text if number == "0" else f"Process {number}: {text}" if _group is not None else ""


def share_error(error: Exception) -> Exception:
    """An error that all processes have found: the first says so, and the others end."""
    return error if rank() == 0 else RaisedOnRankZero(str(error))


def all_gather(value: T) -> list[T]:
    """The value of each process, in all of them."""
    if _group is None:
        return [value]
    import torch

    found: list[Any] = [None] * world_size()
    with _detect_process_loss():
        torch.distributed.all_gather_object(found, value, group=_group)
    return found


def all_reduce_max(value: float) -> float:
    """The largest value of all processes."""
    if _group is None:
        return value
    import torch

    found = torch.tensor(float(value), dtype=torch.float64)
    with _detect_process_loss():
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=_group)
    return found.item()


def wrap_ddp(model: Any, place: Any) -> Any:
    """A model whose gradients are averaged over all processes. What is frozen is left alone: all have it, and where it is split
    accelerate would refuse it."""
    from torch.nn.parallel import DistributedDataParallel

    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return DistributedDataParallel(model, device_ids=None if place.type == "cpu" else [place])


def all_reduce_gradients(parameters: Any) -> None:
    """Add up the gradients of all processes, as a step of training does."""
    if _group is not None:
        import torch

        for parameter in parameters:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
