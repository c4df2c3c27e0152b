"""The checkpoints of a run, in its folder: which are whole, which is the newest, which go.

Surprise: Trainer takes a checkpoint that was cut off half-way for a whole one. Here each names the hash of every file in it
(`whole.json`), written last, and counts only then.
"""

import json
from pathlib import Path

import torch

from .. import atomic_io
from ..adapters import adapter
from ..adapters.manifest import Manifest
from ..config import config_to_yaml
from ..errors import EventHandler, Notice
from ..models import lora
from .setup import TrainingSetup

HASHES_FILE, KEPT_CHECKPOINTS = "whole.json", 2  # what marks a checkpoint, and how many of them stay
PREFIX, STREAM_FILE = "checkpoint-", "stream.json"
RNG_PREFIX = "rng_state"  # how the files begin: of several processes each has random numbers of its own
REQUIRED_FILES = {
    adapter.WEIGHTS_FILE, adapter.CONFIG_FILE, adapter.MANIFEST_FILE, adapter.RUN_FILE,
    "optimizer.pt", "scheduler.pt", "trainer_state.json",
}  # fmt: skip


def is_run(folder: Path) -> bool:
    """Whether all that is in a folder is of a run, unfinished or with its checkpoints kept."""
    own = {adapter.MANIFEST_FILE, adapter.RUN_FILE, "last-good"} | {it.name for it in list_checkpoints(folder)}
    return folder.is_dir() and not folder.is_symlink() and all(it.name in own for it in folder.iterdir())


def list_checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    named = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(named, key=step_of, reverse=True)


def prune_checkpoints(folder: Path) -> None:
    """Remove all but the newest checkpoints, and those that hold the best step of these."""
    kept = list_checkpoints(folder)[:KEPT_CHECKPOINTS]
    needed = {it.name for it in kept} | {_best_checkpoint_name(it) for it in kept}
    for old in list_checkpoints(folder)[KEPT_CHECKPOINTS:]:
        if old.name not in needed:
            atomic_io.delete(old)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def latest_valid(folder: Path, notify: EventHandler) -> Path | None:
    """The newest checkpoint of which every file is there and unchanged; None where there is none, to start over."""
    for path in list_checkpoints(folder):
        if not (why := _why_invalid(path)):
            return path
        notify(Notice(f"{path} is passed over: {why}."))
    notify(Notice(f"{folder} holds no whole checkpoint: the run starts at its first step."))
    return None


def _why_invalid(checkpoint: Path) -> str | None:
    """Why a checkpoint is not taken, in words."""
    if why := _why_damaged(checkpoint):
        return why
    best = _best_checkpoint_name(checkpoint)
    why = _why_damaged(checkpoint.with_name(best)) if best else None
    return f"its best step is that of {best}, where {why}" if why else None


def _best_checkpoint_name(checkpoint: Path) -> str | None:
    """The name of the checkpoint whose weights were the best until this one; None without `patience`, or if it is broken."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return Path(state["best_model_checkpoint"]).name if state["best_model_checkpoint"] else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _why_damaged(checkpoint: Path) -> str | None:
    """What of a checkpoint is missing, or is not what was written."""
    try:
        hashes = json.loads((checkpoint / HASHES_FILE).read_text(encoding="utf-8"))
        if missing := sorted(REQUIRED_FILES - hashes.keys()):
            return f"{missing[0]} is missing"
        if not any(name.startswith(RNG_PREFIX) for name in hashes):
            return f"{RNG_PREFIX}.pth is missing"
        for name, digest in hashes.items():
            if atomic_io.sha256_file(checkpoint / name) != digest:
                return f"{name} is not the one that was written"
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return None if state["global_step"] == step_of(checkpoint) else f"it is of step {state['global_step']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        return f"it cannot be read ({error})"


def remove_newer_than(checkpoint: Path | None, folder: Path) -> None:
    """What is newer than the checkpoint to go on from was not whole."""
    for broken in list_checkpoints(folder):
        if checkpoint is None or step_of(broken) > step_of(checkpoint):
            atomic_io.delete(broken)


def finalize(checkpoint: Path) -> None:
    """Name each file with its hash, by which a checkpoint is known to be whole."""
    hashes = {path.name: atomic_io.sha256_file(path) for path in sorted(checkpoint.iterdir())}
    for path in checkpoint.iterdir():
        atomic_io.fsync_path(path)
    atomic_io.atomic_write_text(checkpoint / HASHES_FILE, json.dumps(hashes, indent=2))
    atomic_io.fsync_path(checkpoint.parent)


def save_adapter(job: TrainingSetup, tensors: dict[str, torch.Tensor], manifest: Manifest, folder: Path) -> None:
    """Weights, config, manifest and run.yaml into a folder that nobody reads yet."""
    lora.save_adapter_files(tensors, job.model.peft_config[lora.ADAPTER_NAME], folder)
    (folder / adapter.MANIFEST_FILE).write_text(
        manifest.model_copy(update={"weights": adapter.weights_info(adapter.load_adapter_folder(folder))}).to_json(),
        encoding="utf-8",
    )
    # Repeating a run must not silently replace what it repeats.
    (folder / adapter.RUN_FILE).write_text(
        config_to_yaml(job.config.model_copy(update={"overwrite": False})), encoding="utf-8"
    )
