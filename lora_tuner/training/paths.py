"""Paths that runs and sweeps write: the folder of each, locks, conflicts, disk space, removal."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from .. import atomic_io, distributed
from ..adapters.adapter import RUN_FILE
from ..adapters.library import Library, adapter_name
from ..config import TrainConfig
from ..errors import EventHandler, Notice, TrainingError, os_error_message
from . import checkpoints, tickets

if TYPE_CHECKING:
    from .setup import TrainingSetup

SWEEP_STATE_FILE, SWEEP_RESULT_FILE, SWEEP_PLOT_FILE = "sweep.yaml", "sweep.json", "sweep.png"
JOBS_DIR = ".jobs"
JOB_VARIABLE = "LORA_TUNER_JOB"  # name of the run that this process is the job of
NAME_TAKEN_ADVICE = "rename or remove that one first (`adapters rename`, `adapters remove`)"


def run_folder(config: TrainConfig) -> Path:
    return config.runs_dir / adapter_name(config)


def sweep_folder(runs_dir: Path, name: str) -> Path:
    return runs_dir / f"{name}.sweep"  # names of adapters have no dot


def job_folder(runs_dir: Path, name: str) -> Path:
    """Return the folder with settings, messages and result of a run that was started as a job."""
    return runs_dir / JOBS_DIR / name


def forget_job(runs_dir: Path, name: str) -> None:
    atomic_io.delete(job_folder(runs_dir, name))
    with contextlib.suppress(OSError):  # others are in it, or there is none
        (runs_dir / JOBS_DIR).rmdir()


def _lock_path(runs_dir: Path, name: str) -> Path:
    return runs_dir / f".{name}.lock{atomic_io.WORK_SUFFIX}"  # an abandoned one is removed


def is_running(runs_dir: Path, name: str) -> bool:
    """Return whether a process holds the lock of a run or sweep."""
    path = _lock_path(runs_dir, name)
    try:
        with FileLock(path, timeout=0) if path.exists() else contextlib.nullcontext():
            return False
    except Timeout:
        return True


@contextlib.contextmanager
def run_lock(runs_dir: Path, name: str) -> Iterator[None]:
    """Hold the lock of a run or sweep: only one of a name trains at a time."""
    if distributed.rank() > 0:
        yield
        return
    path = _lock_path(runs_dir, name)
    lock = FileLock(path, timeout=0.1)  # a look holds it for a moment
    if why := atomic_io.why_not_writable(runs_dir):
        raise TrainingError(f"{why}: choose another --runs-dir.")
    runs_dir.mkdir(parents=True, exist_ok=True)
    atomic_io.remove_abandoned(runs_dir)
    try:
        lock.acquire()
    except Timeout as error:
        raise TrainingError(
            f"Another process is training '{name}': choose another --name, or wait for it."
        ) from error
    try:
        live = tickets.live_tickets(runs_dir)
        if any(ticket.name == name and ticket.pid != os.getpid() for ticket in live):
            raise tickets.already_there(name, runs_dir)
        if os.environ.get(JOB_VARIABLE) != name:
            forget_job(runs_dir, name)  # of a run of this name before
        with tickets.ticket(runs_dir, name):
            yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not delete an open file
            path.unlink()  # before the release: the next process creates a new one
        lock.release()


def check_places(config: TrainConfig, *, resuming: bool = False, sweep: Path | None = None) -> None:
    """Raise TrainingError when adapter, run, sweep, cache and inputs would be written over each other.

    Links and the rules of the disk for names are followed: a temporary file tries them, nothing is
    loaded.

    Args:
        sweep: the folder of the sweep that the run is a trial of.
    """
    name = adapter_name(config)
    adapter, folder, cache = config.adapters_dir / name, run_folder(config), atomic_io.cache_dir()
    choose = "train again with" if resuming else "choose"
    if name.casefold() == "tensorboard":
        raise TrainingError(f"{folder} is for the logs of --report-to tensorboard: {choose} another --name.")
    outputs = [(folder, "--runs-dir")] if sweep is None else [(folder, "--runs-dir"), (sweep, "--runs-dir")]
    for path, option in outputs:
        if atomic_io.contains(adapter, path) or atomic_io.contains(path, adapter):
            advice = (
                f"move {path} elsewhere, and add its new {option}" if resuming else f"choose another {option}"
            )
            raise TrainingError(
                f"The adapter {adapter} and its {'sweep' if path is sweep else 'run'} {path} would "
                f"be one folder, or one in the other: {advice}."
            )
    inputs = [*config.dataset_names, config.base, config.other_eval_dataset, config.parent]
    sources = [Path(os.path.expanduser(name)) for name in inputs if name is not None]
    if config.parent is not None and os.path.isdir(config.adapters_dir / config.parent):
        sources[-1] = config.adapters_dir / config.parent
    for path, option in ((adapter, "--adapters-dir"), *outputs):
        if atomic_io.contains(path, cache) or atomic_io.contains(cache, path):
            advice = "set LORA_TUNER_CACHE to another folder" if resuming else f"choose another {option}"
            raise TrainingError(f"{path} would be in the cache ({cache}), or hold it: {advice}.")
        for source in filter(os.path.exists, sources):
            # An adapter may replace its parent, which is in memory then.
            is_parent = path is adapter and config.parent is not None and source is sources[-1]
            if atomic_io.contains(path, source) and not (is_parent and atomic_io.contains(source, path)):
                raise TrainingError(
                    f"{path} would replace {source}, which it is made from: {choose} another --name."
                )


def check_output_paths(config: TrainConfig, *, resuming: bool = False) -> Library:
    """Return the library, or raise when the name or the folder of the run is taken."""
    name = adapter_name(config)
    library, folder = Library(config.adapters_dir), run_folder(config)
    library.check_name_free(name, overwrite=config.overwrite, advice=NAME_TAKEN_ADVICE if resuming else None)
    if resuming:
        return library
    if (sweep_folder(config.runs_dir, name) / SWEEP_STATE_FILE).is_file():  # --resume would find the sweep
        raise TrainingError(
            f"{sweep_folder(config.runs_dir, name)} is an unfinished sweep of this name: finish or "
            f"remove it (`runs remove {name}`), or choose another --name."
        )
    if not os.path.lexists(folder):
        return library
    if config.runs_dir.resolve() == config.adapters_dir.resolve() or not checkpoints.is_run(folder):
        raise TrainingError(f"{folder} is not a run, so it is not replaced: choose another --runs-dir or --name.")
    if (folder / RUN_FILE).is_file() and not config.overwrite:
        raise TrainingError(
            f"{folder} holds an unfinished run: resume it with --resume {name}, discard it with "
            "--overwrite, or choose another --name."
        )
    if any(folder.iterdir()) and not config.overwrite:
        raise TrainingError(
            f"{folder} holds the checkpoints of a finished run: discard them with --overwrite, or "
            "choose another --name."
        )
    return library


def check_sweep_folder(folder: Path, advice: str) -> None:
    """Raise TrainingError when the folder of a sweep holds files that replacing it would delete."""
    files = {SWEEP_STATE_FILE, SWEEP_RESULT_FILE, SWEEP_PLOT_FILE}
    if os.path.lexists(folder) and not checkpoints.holds_only(files, folder):
        raise TrainingError(f"{folder} holds files that are not of a sweep, so it is not replaced: {advice}")


def remove_run_folder(config: TrainConfig, folder: Path, notify: EventHandler) -> None:
    """Remove the folder of a finished run, or with `keep_checkpoints` all but these."""
    try:
        if config.keep_checkpoints:
            for name in (*checkpoints.LIVE_FILES, RUN_FILE):
                (folder / name).unlink(missing_ok=name != RUN_FILE)
        else:
            atomic_io.delete_atomically(folder)
    except OSError as error:
        notify(Notice(f"The adapter is written, but {folder} could not be removed. {os_error_message(error)}"))


def check_disk_space(setup: "TrainingSetup") -> None:
    """Raise TrainingError when the disk cannot hold the checkpoints, or the adapter."""
    from ..models import lora

    config = setup.config
    size = lora.count_parameters(setup.model)[0] * 4
    used = sum(path.stat().st_size for path in run_folder(config).rglob("*") if path.is_file())
    kept = (checkpoints.KEPT_CHECKPOINTS + 1) * 3 * size - used  # AdamW has two states per weight
    for folder, need in {config.runs_dir: kept, config.adapters_dir: size}.items():
        if (free := atomic_io.free_space(folder)) < need:
            raise TrainingError(
                f"{folder} has {free / 1e6:,.0f} MB free, and the run needs {need / 1e6:,.0f} MB: "
                "free some space, or choose another --runs-dir and --adapters-dir."
            )
