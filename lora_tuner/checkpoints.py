"""The checkpoints of a run, in its folder: which are whole, which is the newest, which go.

Surprise: Trainer takes a checkpoint that was cut off half-way for a whole one. Here each names the hash of every file in it
(`whole.json`), written last, and counts only then.
"""

import json
from pathlib import Path

from . import files, store
from .errors import Listener, Notice

WHOLE, KEPT = "whole.json", 2  # what marks a checkpoint, and how many of them stay
PREFIX, STREAM = "checkpoint-", "stream.json"
RANDOM = "rng_state"  # how the files begin: of several processes each has random numbers of its own
PIECES = {
    store.WEIGHTS, store.CONFIG, store.MANIFEST, store.RUN,
    "optimizer.pt", "scheduler.pt", "trainer_state.json",
}  # fmt: skip


def is_run(folder: Path) -> bool:
    """Whether all that is in a folder is of a run, unfinished or with its checkpoints kept."""
    own = {store.MANIFEST, store.RUN, "last-good"} | {it.name for it in found(folder)}
    return folder.is_dir() and not folder.is_symlink() and all(it.name in own for it in folder.iterdir())


def found(folder: Path) -> list[Path]:
    """Newest first."""
    named = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(named, key=step_of, reverse=True)


def prune(folder: Path) -> None:
    """Remove all but the newest checkpoints, and those that hold the best step of these."""
    kept = found(folder)[:KEPT]
    needed = {it.name for it in kept} | {_best(it) for it in kept}
    for old in found(folder)[KEPT:]:
        if old.name not in needed:
            files.remove(old)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def newest_whole(folder: Path, notify: Listener) -> Path | None:
    """The newest checkpoint of which every file is there and unchanged; None where there is none, to start over."""
    for path in found(folder):
        if not (why := _broken(path)):
            return path
        notify(Notice(f"{path} is passed over: {why}."))
    notify(Notice(f"{folder} holds no whole checkpoint: the run starts at its first step."))
    return None


def _broken(checkpoint: Path) -> str | None:
    """Why a checkpoint is not taken, in words."""
    if why := _torn(checkpoint):
        return why
    best = _best(checkpoint)
    why = _torn(checkpoint.with_name(best)) if best else None
    return f"its best step is that of {best}, where {why}" if why else None


def _best(checkpoint: Path) -> str | None:
    """The name of the checkpoint whose weights were the best until this one; None without `patience`, or if it is broken."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return Path(state["best_model_checkpoint"]).name if state["best_model_checkpoint"] else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _torn(checkpoint: Path) -> str | None:
    """What of a checkpoint is missing, or is not what was written."""
    try:
        hashes = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
        if missing := sorted(PIECES - hashes.keys()):
            return f"{missing[0]} is missing"
        if not any(name.startswith(RANDOM) for name in hashes):
            return f"{RANDOM}.pth is missing"
        for name, digest in hashes.items():
            if files.sha256_file(checkpoint / name) != digest:
                return f"{name} is not the one that was written"
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return None if state["global_step"] == step_of(checkpoint) else f"it is of step {state['global_step']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        return f"it cannot be read ({error})"


def remove_after(checkpoint: Path | None, folder: Path) -> None:
    """What is newer than the checkpoint to go on from was not whole."""
    for broken in found(folder):
        if checkpoint is None or step_of(broken) > step_of(checkpoint):
            files.remove(broken)


def mark(checkpoint: Path) -> None:
    """Name each file with its hash, by which a checkpoint is known to be whole."""
    hashes = {path.name: files.sha256_file(path) for path in sorted(checkpoint.iterdir())}
    for path in checkpoint.iterdir():
        files.sync(path)
    files.write_text(checkpoint / WHOLE, json.dumps(hashes, indent=2))
    files.sync(checkpoint.parent)
