"""Train small LoRA adapters on your own text, keep many beside one base model, and write with them.

The names below are loaded when they are first used, so that importing this package costs nothing.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .combine import merge
    from .config import Sampling, TrainConfig
    from .cost import Plan
    from .errors import Interrupted, LoraTunerError, Notice, Progress
    from .evaluation import GainMatrix, RowSet, evaluate
    from .generation import Answer, Generator
    from .library import Library
    from .manifest import Manifest
    from .store import Adapter
    from .training import plan, resume, train

try:
    __version__ = version("lora_tuner")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0"

_HOMES = {
    "Adapter": "store",
    "Answer": "generation",
    "GainMatrix": "evaluation",
    "Generator": "generation",
    "Interrupted": "errors",
    "Library": "library",
    "LoraTunerError": "errors",
    "Manifest": "manifest",
    "Notice": "errors",
    "Plan": "cost",
    "Progress": "errors",
    "RowSet": "evaluation",
    "Sampling": "config",
    "TrainConfig": "config",
    "evaluate": "evaluation",
    "merge": "combine",
    "plan": "training",
    "resume": "training",
    "train": "training",
}

__all__ = [
    "Adapter",
    "Answer",
    "GainMatrix",
    "Generator",
    "Interrupted",
    "Library",
    "LoraTunerError",
    "Manifest",
    "Notice",
    "Plan",
    "Progress",
    "RowSet",
    "Sampling",
    "TrainConfig",
    "evaluate",
    "merge",
    "plan",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
