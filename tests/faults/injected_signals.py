"""What a command does to itself at an exact moment of its run: for `before`, so by name, and without pytest."""

import importlib
import os
from typing import Any


def signalled(*moments: tuple[str, int, int]) -> None:
    """The process sends itself a signal each time that one of the moments has come: a function, such as
    "lora_tuner.tokens:encode", is about to be called, for the so-manieth time, from 1."""
    for function, nth, number in moments:
        owner, name = _found(function)
        setattr(owner, name, _signalling(getattr(owner, name), nth, number))


def replaced(thing: str, value: Any) -> None:
    """Something, such as "peft:__version__", is another."""
    owner, name = _found(thing)
    setattr(owner, name, value)


def threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _found(thing: str) -> tuple[Any, str]:
    module, _, path = thing.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for it in owners:
        owner = getattr(owner, it)
    return owner, name


def _signalling(real: Any, nth: int, number: int) -> Any:
    calls = 0

    def wrapped(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), number)
        return real(*arguments, **more)

    return wrapped
