"""Train small LoRA adapters on your own text, keep many beside one base model, and write with them.

The names below are loaded when they are first used, so that importing this package costs nothing.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .combine import Blended, Merged, Slimmed, blend, merge, slim
    from .config import Sampling, TrainConfig
    from .cost import Plan
    from .errors import Interrupted, LoraTunerError, Notice, Progress
    from .evaluation import GainMatrix, RowSet, evaluate
    from .export import to_gguf
    from .generation import Answer, Generator
    from .ladder import Ladder, climb
    from .library import Library
    from .manifest import Manifest
    from .share import pull, push
    from .store import Adapter
    from .training import plan, resume, train

try:
    __version__ = version("lora_tuner")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0"

_HOMES = {
    "Adapter": "store",
    "Answer": "generation",
    "Blended": "combine",
    "GainMatrix": "evaluation",
    "Generator": "generation",
    "Interrupted": "errors",
    "Ladder": "ladder",
    "Library": "library",
    "LoraTunerError": "errors",
    "Manifest": "manifest",
    "Merged": "combine",
    "Notice": "errors",
    "Plan": "cost",
    "Progress": "errors",
    "RowSet": "evaluation",
    "Sampling": "config",
    "Slimmed": "combine",
    "TrainConfig": "config",
    "blend": "combine",
    "climb": "ladder",
    "evaluate": "evaluation",
    "merge": "combine",
    "plan": "training",
    "pull": "share",
    "push": "share",
    "resume": "training",
    "slim": "combine",
    "to_gguf": "export",
    "train": "training",
}

__all__ = [
    "Adapter",
    "Answer",
    "Blended",
    "GainMatrix",
    "Generator",
    "Interrupted",
    "Ladder",
    "Library",
    "LoraTunerError",
    "Manifest",
    "Merged",
    "Notice",
    "Plan",
    "Progress",
    "RowSet",
    "Sampling",
    "Slimmed",
    "TrainConfig",
    "blend",
    "climb",
    "evaluate",
    "merge",
    "plan",
    "pull",
    "push",
    "resume",
    "slim",
    "to_gguf",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
