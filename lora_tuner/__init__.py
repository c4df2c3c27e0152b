"""Train small LoRA adapters on your own text, and generate text with many of them on one base model.

Public names are imported on first use, so that `import lora_tuner` is fast.
"""

import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapters.adapter import Adapter
    from .adapters.hub_sync import pull, push
    from .adapters.library import Library
    from .adapters.manifest import Manifest
    from .analysis.report import Report, make_report
    from .config import ModelOptions, SamplingParams, TrainConfig
    from .convert.blend import BlendResult, blend
    from .convert.compress import CompressResult, compress
    from .convert.export_gguf import to_gguf
    from .convert.export_mlx import to_mlx
    from .convert.export_model import ModelExport, export_model
    from .convert.export_ollama import OllamaExport, export_ollama
    from .convert.merge import MergeResult, merge
    from .data.eval_sets import EvalSet
    from .errors import Interrupted, LoraTunerError, Notice, Progress
    from .evaluation.gain_matrix import GainMatrix, evaluate
    from .inference.classification import Classification, classify
    from .inference.generator import GenerationOutput, Generator
    from .training.profiling import RunEstimate
    from .training.run import plan, resume, train
    from .training.sweep import run_sweep
    from .training.sweep_result import SweepResult

try:
    __version__ = version("lora_tuner")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0"

# Advice of tqdm where a notebook has no ipywidgets, which nothing here needs.
warnings.filterwarnings("ignore", "IProgress not found")

_HOMES = {  # public name -> module that defines it
    "Adapter": "adapters.adapter",
    "BlendResult": "convert.blend",
    "Classification": "inference.classification",
    "CompressResult": "convert.compress",
    "EvalSet": "data.eval_sets",
    "GainMatrix": "evaluation.gain_matrix",
    "GenerationOutput": "inference.generator",
    "Generator": "inference.generator",
    "Interrupted": "errors",
    "Library": "adapters.library",
    "LoraTunerError": "errors",
    "Manifest": "adapters.manifest",
    "MergeResult": "convert.merge",
    "ModelExport": "convert.export_model",
    "ModelOptions": "config",
    "Notice": "errors",
    "OllamaExport": "convert.export_ollama",
    "Progress": "errors",
    "Report": "analysis.report",
    "RunEstimate": "training.profiling",
    "SamplingParams": "config",
    "SweepResult": "training.sweep_result",
    "TrainConfig": "config",
    "blend": "convert.blend",
    "classify": "inference.classification",
    "compress": "convert.compress",
    "evaluate": "evaluation.gain_matrix",
    "export_model": "convert.export_model",
    "export_ollama": "convert.export_ollama",
    "make_report": "analysis.report",
    "merge": "convert.merge",
    "plan": "training.run",
    "pull": "adapters.hub_sync",
    "push": "adapters.hub_sync",
    "resume": "training.run",
    "run_sweep": "training.sweep",
    "to_gguf": "convert.export_gguf",
    "to_mlx": "convert.export_mlx",
    "train": "training.run",
}

__all__ = [
    "Adapter",
    "BlendResult",
    "Classification",
    "CompressResult",
    "EvalSet",
    "GainMatrix",
    "GenerationOutput",
    "Generator",
    "Interrupted",
    "Library",
    "LoraTunerError",
    "Manifest",
    "MergeResult",
    "ModelExport",
    "ModelOptions",
    "Notice",
    "OllamaExport",
    "Progress",
    "Report",
    "RunEstimate",
    "SamplingParams",
    "SweepResult",
    "TrainConfig",
    "blend",
    "classify",
    "compress",
    "evaluate",
    "export_model",
    "export_ollama",
    "make_report",
    "merge",
    "plan",
    "pull",
    "push",
    "resume",
    "run_sweep",
    "to_gguf",
    "to_mlx",
    "train",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
