"""Changes that a command makes to its own process before it runs, given by name, without pytest."""

import importlib
import os
import signal
import sys
import types
from typing import Any


def signalled(*moments: tuple[str, int, int]) -> None:
    """Send the process a signal before the nth call, counted from 1, of a function such as
    "lora_tuner.data.tokenization:encode_texts"."""
    for function, nth, number in moments:
        owner, name = _resolve(function)
        setattr(owner, name, _signalling(getattr(owner, name), nth, number))


def replaced(target: str, value: Any) -> None:
    """Replace an attribute such as "peft:__version__"."""
    owner, name = _resolve(target)
    setattr(owner, name, value)


def dropped(kind: str, *descriptors: int) -> None:
    """Make streams unusable: a pipe without a reader, a terminal that was closed, a full disk, or closed."""
    if kind == "full disk":
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, target = os.openpty() if kind == "closed terminal" else os.pipe()
        os.close(reader)
    for descriptor in descriptors:
        if kind == "closed":
            name = ("stdin", "stdout", "stderr")[descriptor]
            getattr(sys, name).close()
            setattr(sys, name, None)
        else:
            os.dup2(target, descriptor)


def ignored(number: int, *moments: tuple[str, int, int]) -> None:
    """Ignore a signal, as `nohup` does, and send signals."""
    signal.signal(number, signal.SIG_IGN)
    signalled(*moments)


def best_at(step: int, *moments: tuple[str, int, int]) -> None:
    """Make the held-out loss lowest at a step, on any CPU, and send signals as `signalled` does."""
    from lora_tuner.training import loss_result
    from lora_tuner.training.trainer import LoraTrainer

    evaluate, measure = LoraTrainer.evaluate, loss_result.measure_adapter

    def shifted(trainer: Any, *arguments: Any, **options: Any) -> dict[str, float]:
        loss = measure(trainer.setup).loss + abs(trainer.state.global_step - step)
        setattr(loss_result, "measure_adapter", lambda setup: types.SimpleNamespace(loss=loss))  # noqa: B010
        return evaluate(trainer, *arguments, **options)

    setattr(LoraTrainer, "evaluate", shifted)  # noqa: B010
    signalled(*moments)


def threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _resolve(target: str) -> tuple[Any, str]:
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, name


def _signalling(real: Any, nth: int, number: int) -> Any:
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    return wrapped
