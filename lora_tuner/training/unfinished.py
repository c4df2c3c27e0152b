"""Unfinished runs and sweeps: what is resumed of them, a list of all, removal. No torch."""

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, Field

from .. import atomic_io
from ..adapters.adapter import CONFIG_FILE, RUN_FILE, load_adapter_folder, read_manifest, verify_adapter
from ..adapters.library import Library
from ..adapters.manifest import Manifest
from ..config import TrainConfig
from ..errors import AdapterError, ConfigError, EventHandler, TrainingError, ignore_events
from ..settings_files import read_settings, resolve_settings
from ..text import NAME_PATTERN, format_names
from . import checkpoints, paths, tickets
from .checkpoints import RETRAIN_ADVICE
from .paths import SWEEP_STATE_FILE

_Progress = tuple[int, int | None, list[str]]  # done, total, datasets


class SweepState(BaseModel, extra="forbid"):
    """An unfinished sweep, as in `sweep.yaml`.

    `id` is in the manifest of each run and adapter of the sweep; `trials` holds the requested
    settings, `facts` what the results depend on besides, `diverged` names of trials.
    """

    id: str = Field(min_length=1)
    trials: list[TrainConfig] = Field(min_length=1)
    facts: dict[str, str]
    diverged: list[str]


def read_sweep(folder: Path) -> SweepState:
    """Read the state of an unfinished sweep. Raises TrainingError if there is none, or it is damaged."""
    file = folder / SWEEP_STATE_FILE
    if not file.is_file():  # it finished before this process got the lock
        raise TrainingError(f"There is no unfinished sweep {file.parent}: it has finished, or never started.")
    try:
        state = SweepState.model_validate(read_settings(file))
    except (ConfigError, ValueError) as error:
        raise TrainingError(
            f"{file} is damaged, or of another version: start the sweep again with --overwrite."
        ) from error
    trials = [trial.model_copy(update={"runs_dir": folder.parent}) for trial in state.trials]
    return state.model_copy(update={"trials": trials})


def write_sweep(state: SweepState, folder: Path) -> None:
    values = state.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    atomic_io.atomic_write_text(
        folder / SWEEP_STATE_FILE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    )


def load_stopped_run(
    saved: TrainConfig, folder: Path, notify: EventHandler
) -> tuple[Path | None, dict[Path, Manifest]]:
    """Find the checkpoint to resume from, and check that it belongs to the run with these settings.

    Returns:
        The checkpoint, or None to start from the first step; the manifests of the run and the
        checkpoint by folder.
    """
    if not (folder / RUN_FILE).is_file():  # the run finished before this process got the lock
        raise nothing_to_resume(folder)
    if saved.name != folder.name or saved.max_steps is None:
        raise TrainingError(
            f"{folder / RUN_FILE} was changed: its name is {saved.name}, its max_steps "
            f"{saved.max_steps}. {RETRAIN_ADVICE}"
        )
    _check_not_finished(saved, folder)
    checkpoint = checkpoints.latest_valid(folder, notify)
    manifests = {path: checkpoints.read_run_manifest(path) for path in (folder, checkpoint or folder)}
    if checkpoint is not None:
        settings = resolve_settings(TrainConfig, {}, checkpoint / RUN_FILE)
        checkpoints.check_settings(
            (saved, manifests[folder]), (settings, manifests[checkpoint]), folder, checkpoint
        )
    return checkpoint, manifests


def _check_not_finished(saved: TrainConfig, folder: Path) -> None:
    """Raise TrainingError when the run has written its adapter but not removed its folder."""
    with contextlib.suppress(AdapterError, ConfigError):
        adapter = load_adapter_folder(saved.adapters_dir / str(saved.name))
        if adapter.manifest is None:
            return
        finished = resolve_settings(TrainConfig, {}, adapter.path / RUN_FILE), adapter.manifest
        # A damaged adapter is trained again.
        if checkpoints.same_run((saved, read_manifest(folder)), finished) and not verify_adapter(adapter):
            paths.remove_run_folder(saved, folder, ignore_events)
            raise TrainingError(f"The run {saved.name} has finished: its adapter is {adapter.path}.")


def nothing_to_resume(folder: Path) -> TrainingError:
    """Make the error that says why a folder holds no run that can be resumed."""
    library = Library(TrainConfig().adapters_dir)
    why = "it has finished (into another --adapters-dir?), or never started"
    if folder.name in library.names():
        why = f"it has finished, as {library.path / folder.name}"
    elif (sweep_result := paths.sweep_folder(folder.parent, folder.name) / paths.SWEEP_RESULT_FILE).is_file():
        why = f"its sweep has finished, with the result {sweep_result}"
    elif copies := sorted(folder.glob(f"*/{RUN_FILE}")):
        why = f"it has finished, or {folder / RUN_FILE} was removed; {copies[0]} is a copy of it"
    advice = "Train without --resume"
    if others := [run.name for run in unfinished_runs(folder.parent)]:
        advice += f", or resume one of these (`runs` shows them): {format_names(others)}"
    text = f"There is no unfinished run {folder}: {why}. {advice}."
    if folder.name in library.names():
        text += f" {checkpoints.more_steps_advice(library.path / folder.name)}"
    return TrainingError(text)


def sweep_of(run_folder: Path) -> str | None:
    """Return the id of the sweep that a run belongs to."""
    try:
        return checkpoints.sweep_id(read_manifest(run_folder))
    except AdapterError:
        return None


@dataclass(frozen=True)
class UnfinishedRun:
    """A run or sweep that `--resume NAME` continues.

    Args:
        kind: run or sweep.
        done: steps of its newest checkpoint; of a sweep, trials that have ended.
        total: all steps, or trials; None if `problem` is set.
        data: the datasets.
        created: time at which it was begun, ISO 8601.
        running: a process holds its lock.
        problem: the reason why its settings cannot be read, or None.
    """

    name: str
    kind: str
    folder: Path
    done: int
    total: int | None
    data: list[str]
    created: str
    running: bool
    problem: str | None = None

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"folder": str(self.folder)}


def unfinished_runs(runs_dir: Path) -> list[UnfinishedRun]:
    """Return the unfinished runs and sweeps of a folder, by name."""
    return sorted(_find_unfinished(runs_dir), key=lambda run: run.name) if runs_dir.is_dir() else []


def _find_unfinished(runs_dir: Path) -> Iterator[UnfinishedRun]:
    for folder in runs_dir.iterdir():
        is_sweep = (folder / SWEEP_STATE_FILE).is_file()
        name = folder.name.removesuffix(".sweep") if is_sweep else folder.name
        # An adapter has a run.yaml too.
        is_run = (folder / RUN_FILE).is_file() and not (folder / CONFIG_FILE).exists()
        if not NAME_PATTERN.fullmatch(name) or not (is_run or (is_sweep and folder.name != name)):
            continue
        progress: _Progress = (0, None, [])
        problem = None
        try:
            progress = _sweep_progress(folder) if is_sweep else _run_progress(folder)
        except (ConfigError, TrainingError) as error:
            problem = str(error)
        try:
            begun = (folder / (SWEEP_STATE_FILE if is_sweep else RUN_FILE)).stat().st_mtime
        except FileNotFoundError:  # it has ended in this moment
            continue
        yield UnfinishedRun(
            name=name,
            kind="sweep" if is_sweep else "run",
            folder=folder,
            done=progress[0],
            total=progress[1],
            data=progress[2],
            created=datetime.datetime.fromtimestamp(begun, datetime.UTC).isoformat(timespec="seconds"),
            running=paths.is_running(runs_dir, folder.name),
            problem=problem,
        )


def _run_progress(folder: Path) -> _Progress:
    """Return steps of the newest checkpoint, which is not verified, all steps, and the datasets."""
    config = resolve_settings(TrainConfig, {}, folder / RUN_FILE)
    complete = [path for path in checkpoints.list_checkpoints(folder) if (path / atomic_io.HASHES_FILE).is_file()]
    return checkpoints.step_of(complete[0]) if complete else 0, config.max_steps, config.dataset_names


def _sweep_progress(folder: Path) -> _Progress:
    """Return the number of trials that have ended, of all trials, and the datasets."""
    state = read_sweep(folder)
    ended = set(state.diverged)
    for trial in state.trials:
        try:
            manifest = load_adapter_folder(trial.adapters_dir / str(trial.name)).manifest
        except AdapterError:
            continue
        if manifest and checkpoints.sweep_id(manifest) == state.id:
            ended.add(str(trial.name))
    return len(ended), len(state.trials), state.trials[0].dataset_names


def find_removable(name: str, runs_dir: Path) -> UnfinishedRun:
    """Return the unfinished run or sweep of this name.

    Raises:
        TrainingError: there is none, a process is training it, or its folder holds other files.
    """
    runs = unfinished_runs(runs_dir)
    if not (named := [run for run in runs if run.name == name]):
        existing = format_names([run.name for run in runs]) or "none"
        raise TrainingError(f"There is no unfinished run '{name}' in {runs_dir} ({existing}).")
    found = max(named, key=lambda run: run.kind)  # of both, that which --resume takes: the sweep
    waiting = {ticket.name for ticket in tickets.live_tickets(runs_dir)}
    for folder in (found.folder, *_trial_folders(found)):
        is_running = paths.is_running(runs_dir, folder.name)
        if is_running or folder.name in waiting:
            state = "running" if is_running else "waiting"
            raise TrainingError(
                f"{folder} is {state}: stop its process (Ctrl-C), or wait for it, then remove it."
            )
    if found.kind == "sweep":
        paths.check_sweep_folder(found.folder, "move them elsewhere.")
    for folder in (*([found.folder] if found.kind == "run" else []), *_trial_folders(found)):
        if not checkpoints.is_run(folder):
            raise TrainingError(
                f"{folder} is a link, or holds files that are not of a run, so it is not removed: move them elsewhere."
            )
    return found


def remove_unfinished(found: UnfinishedRun) -> None:
    """Delete a run, or a sweep with the unfinished runs of its trials; adapters are kept."""
    runs_dir = found.folder.parent
    with paths.run_lock(runs_dir, found.folder.name):
        for folder in _trial_folders(found):
            with paths.run_lock(runs_dir, folder.name):
                atomic_io.delete_atomically(folder)
        atomic_io.delete_atomically(found.folder)


def _trial_folders(found: UnfinishedRun) -> list[Path]:
    """Return the folders of the unfinished runs that are trials of a sweep."""
    if found.kind == "run" or found.problem:
        return []
    state = read_sweep(found.folder)
    folders = [paths.run_folder(trial) for trial in state.trials]
    return [folder for folder in folders if folder.is_dir() and sweep_of(folder) == state.id]
