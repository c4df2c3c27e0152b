"""Train at several ranks, learning rates or numbers of rows or steps, one after another, and recommend an adapter.

The base is loaded once, and the data once for each number of rows; all trials are measured on the
same rows. A sweep is stopped and resumed like one run: `runs/NAME.sweep` lists its trials, and those
that have finished are not trained again. Which ones have is not written there, so that a crash
cannot make it wrong: their adapters have the sweep's id in their manifests. Without a number of
steps or epochs all trials take the same steps, so a time limit is that of the first, which has the most rows."""

import contextlib
import os
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import atomic_io, distributed
from ..adapters.adapter import RUN_FILE, Adapter, validate_name, verify_adapter
from ..adapters.library import Library, adapter_name
from ..config import PROBE, STOP_RULES, SWEEPABLE, TrainConfig
from ..data.sources import resolve_eval_dataset
from ..errors import (
    AdapterError,
    ConfigError,
    DivergedError,
    EventHandler,
    Interrupted,
    Notice,
    Progress,
    TrainingError,
    ignore_events,
    os_error_message,
)
from ..evaluation import gain_matrix
from ..settings_files import resolve_settings
from ..text import format_number, format_rows
from . import arguments, checkpoints, paths, profiling, run
from .inputs import TrainingInputs, reload_rows
from .progress import closing, display
from .setup import TrainingSetup, prepare_training
from .sweep_result import SweepResult, measure_trials, write_result
from .unfinished import SweepState, read_sweep, sweep_of, write_sweep

ROW_FACTS = ("data", "rows as tokens")  # in which trials on different numbers of rows differ
InputsBySize = dict[int | None, TrainingInputs]  # by `max_rows`


def run_sweep(configs: Sequence[TrainConfig], notify: EventHandler | None = display) -> SweepResult:
    """Train one adapter for each configuration; they differ only in the settings of `SWEEPABLE`.

    Examples:
        >>> config = TrainConfig(dataset="reviews.csv", name="ranks", max_steps=20)
        >>> result = run_sweep([config.model_copy(update={"rank": rank}) for rank in (2, 8)], notify=None)
        >>> [trial.name for trial in result.trials]
        ['ranks-r2', 'ranks-r8']

    Raises:
        LoraTunerError: a request is wrong, before anything is trained.
        Interrupted: the sweep was stopped, with all finished trials saved.
    """
    _refuse_several_processes()
    notify = notify or ignore_events
    first = configs[0]
    if first.parent is not None and len({config.rank for config in configs}) > 1:
        raise ConfigError("--from keeps the rank of the parent: give several learning rates, not ranks.")
    configs = _with_shared_held_out_rows(configs)
    name = adapter_name(first)
    folder = paths.sweep_folder(first.runs_dir, name)
    trials = [config.model_copy(update={"name": _trial_name(name, config, configs)}) for config in configs]
    if len({trial.name for trial in trials}) < len(trials):
        raise ConfigError("Two trials have the same settings: give each once.")
    for trial in trials:
        paths.check_places(trial, sweep=folder)
    with closing(notify), paths.run_lock(first.runs_dir, folder.name):
        _check_name_free(name, first)
        for trial in trials:
            paths.check_output_paths(trial)
        measured = resolve_eval_dataset(first, notify, "a sweep selects a trial")
        changes = {"eval_dataset": measured.eval_dataset, "eval_split": measured.eval_split}
        trials = [trial.model_copy(update=changes) for trial in trials]
        arguments.check_trackers(first)
        widest = max(trials, key=lambda trial: (trial.rank, trial.max_rows or 0))
        setup = prepare_training(_with_max_steps(widest, 1, learning_rate=1.0), notify)  # what fits it fits all
        paths.check_disk_space(setup)
        checkpoints.check_can_be_saved(setup)
        inputs = _load_sizes(trials, setup)
        if len({trial.epochs for trial in trials}) > 1:  # in the run.yaml of its adapter a trial has steps
            epochs = [inputs[trial.max_rows].steps_per_epoch for trial in trials]
            steps = map(
                partial(profiling.steps_for_stop_rule, seconds_per_step=None, notify=notify), trials, epochs
            )
            trials = [*map(_with_max_steps, trials, steps)]
        facts = _facts(setup, trials) | _facts_of_sizes(inputs)
        state = SweepState(id=secrets.token_hex(16), trials=trials, facts=facts, diverged=[])
        with _resumable(name, first):
            write_sweep(state, folder)
            return _run_trials(name, state, {}, inputs, setup, notify)


def is_unfinished(name: str, runs_dir: Path) -> bool:
    """Return whether there is a sweep to resume. Raises TrainingError for an old one."""
    if (paths.sweep_folder(runs_dir, name) / paths.SWEEP_STATE_FILE).is_file():
        return True
    old = runs_dir / f"{name}.ladder"
    if (old / "ladder.yaml").is_file():
        raise TrainingError(
            f"{old} is an unfinished sweep of an earlier version and cannot be resumed: remove it and start the sweep again."
        )
    return False


def resume_sweep(
    name: str,
    runs_dir: Path = Path("runs"),
    notify: EventHandler | None = display,
    *,
    threads: int | None = None,
    accept: Collection[str] = (),
) -> SweepResult:
    """Continue the sweep in `runs_dir/NAME.sweep`.

    Args:
        threads: number of threads from now on, in place of the saved setting.
        accept: as that of `run.resume`.

    Raises:
        TrainingError: data, base or library versions changed, the state is unreadable, or the place
            of a trial was taken.
    """
    _refuse_several_processes()
    checkpoints.check_acceptable(accept)
    notify = notify or ignore_events
    folder = paths.sweep_folder(runs_dir, name)
    with closing(notify), paths.run_lock(runs_dir, folder.name):
        state = read_sweep(folder)
        if threads is not None:
            state.trials = [trial.model_copy(update={"threads": threads}) for trial in state.trials]
        paths.check_sweep_folder(folder, "move them elsewhere.")
        adapters: dict[str, Adapter] = {}
        for trial in state.trials:
            paths.check_places(trial, resuming=True, sweep=folder)
            if adapter := _finished_adapter(trial, state.id):
                adapters[adapter.name] = adapter
            elif trial.name not in state.diverged:
                _check_place(trial, name, state.id)
        with _resumable(name, state.trials[0]):
            return _run_trials(name, state, adapters, {}, None, notify, accept)


def _refuse_several_processes() -> None:
    if distributed.expected_world_size() > 1:
        raise ConfigError("A sweep runs in one process: leave out torchrun, or give one value of each setting.")


def _check_name_free(name: str, config: TrainConfig) -> None:
    """Raise TrainingError when a sweep or run of this name would be lost, or not be found by --resume."""
    folder = paths.sweep_folder(config.runs_dir, name)
    paths.check_sweep_folder(folder, "choose another --runs-dir or --name.")
    if not config.overwrite and is_unfinished(name, config.runs_dir):
        raise TrainingError(
            f"{folder} holds an unfinished sweep: resume it ({_resume_command(name, config)}), "
            "discard it with --overwrite, or choose another --name."
        )
    if not config.overwrite and (folder / paths.SWEEP_RESULT_FILE).is_file():
        raise TrainingError(
            f"{folder} holds the result of a sweep: replace it with --overwrite, or choose another --name."
        )
    if (config.runs_dir / name / RUN_FILE).is_file():
        raise TrainingError(
            f"{config.runs_dir / name} is an unfinished run of this name: finish it, "
            f"remove it (`runs remove {name}`), or choose another --name."
        )


@contextlib.contextmanager
def _resumable(name: str, config: TrainConfig) -> Iterator[None]:
    """Make interrupts and errors in the block name the command that resumes the sweep, not a trial."""
    command = _resume_command(name, config)
    try:
        yield
    except (Interrupted, TrainingError) as error:
        text = str(error).replace(checkpoints.resume_command(config), command)
        if text == str(error):
            raise
        raise type(error)(text) from error
    except (KeyboardInterrupt, OSError) as error:
        if not is_unfinished(name, config.runs_dir):
            raise
        if isinstance(error, OSError):
            raise TrainingError(f"{os_error_message(error)} Then resume with: {command}") from error
        raise Interrupted(f"Stopped immediately. Resume with: {command}") from error


def _resume_command(name: str, config: TrainConfig) -> str:
    return checkpoints.resume_command(config.model_copy(update={"name": name}))


def _trial_name(name: str, config: TrainConfig, configs: Sequence[TrainConfig]) -> str:
    """Make the name of a trial: that of the sweep, and the settings in which the trials differ."""
    for setting, letters in zip(SWEEPABLE, ("r", "lr", "n", "s", "e", "b"), strict=True):
        if len({getattr(other, setting) for other in configs}) > 1:
            value = format_number(getattr(config, setting))
            name += f"-{letters}{value}".replace(".", "p").replace("+", "")
    return validate_name(name)


def _with_shared_held_out_rows(trials: Sequence[TrainConfig]) -> Sequence[TrainConfig]:
    """Let trials be measured on the same held-out rows: those of the largest number of rows."""
    trials = [trial.model_copy(update={"eval_rows": trial.eval_rows_limit}) for trial in trials]
    if len({trial.max_rows for trial in trials}) == 1:
        return trials
    sizes = [trial.max_rows for trial in trials if trial.max_rows is not None]
    if len(sizes) < len(trials):
        raise ConfigError("One trial has no max_rows, which the others have: give it a number too.")
    return [trial.model_copy(update={"eval_max_rows": max(sizes)}) for trial in trials]


def _load_sizes(trials: Sequence[TrainConfig], setup: TrainingSetup) -> InputsBySize:
    """Load the rows of each number of rows. Raises ConfigError if two numbers train on the same ones."""
    inputs: InputsBySize = {setup.config.max_rows: setup}
    for trial in trials:
        if trial.max_rows not in inputs:
            inputs[trial.max_rows] = reload_rows(setup, trial, ignore_events)
    sizes: dict[str, int | None] = {}
    for size, loaded in sorted(inputs.items(), key=lambda item: item[0] or 0):
        if (other := sizes.setdefault(loaded.dataset.hash(), size)) != size:
            raise ConfigError(
                f"--max-rows {other} and {size} train on the same {format_rows(len(loaded.dataset.train))}: "
                "the data has no more, so give smaller numbers."
            )
    return inputs


def _facts(setup: TrainingSetup, trials: Sequence[TrainConfig]) -> dict[str, str]:
    """Return what the result of a trial depends on besides its settings."""
    facts = checkpoints.reproducibility_facts(setup.manifest)
    if len({trial.max_rows for trial in trials}) == 1:
        return facts
    own = {name: facts.pop(name) for name in ROW_FACTS}
    return facts | {_fact_of_size(name, setup.config.max_rows): fact for name, fact in own.items()}


def _facts_of_sizes(inputs: InputsBySize) -> dict[str, str]:
    """Return the facts in which trials on different numbers of rows differ; none for a single number."""
    facts: dict[str, str] = {}
    for size, loaded in inputs.items() if len(inputs) > 1 else ():
        hashes = loaded.dataset.hash(), loaded.rows_hash
        facts |= {_fact_of_size(name, size): fact for name, fact in zip(ROW_FACTS, hashes, strict=True)}
    return facts


def _fact_of_size(name: str, size: int | None) -> str:
    return f"{name} of --max-rows {size}"


def _run_trials(
    name: str,
    state: SweepState,
    adapters: dict[str, Adapter],
    inputs: InputsBySize,
    setup: TrainingSetup | None,
    notify: EventHandler,
    accept: Collection[str] = (),
) -> SweepResult:
    """Train the trials that have no adapter yet, compare all, and replace the state by the result.

    Args:
        inputs: base and rows for each number of rows; those that are missing are loaded.
        setup: an earlier one on the same base.
    """
    trials = state.trials
    folder = paths.sweep_folder(trials[0].runs_dir, name)

    def prepare_trial(requested: TrainConfig, notify: EventHandler) -> TrainingSetup:
        nonlocal setup
        size = requested.max_rows
        if setup is not None:
            setup.remove_lora()
            if size not in inputs:
                inputs[size] = reload_rows(setup, requested, ignore_events)
        setup = prepare_training(requested, notify, inputs=inputs.get(size), sweep=state.id)
        inputs.setdefault(size, setup)
        facts = _facts(setup, trials)
        if changed := {name: facts[name] for name in accept if facts[name] != state.facts[name]}:
            state.facts.update(changed)
            write_sweep(state, folder)
        checkpoints.check_unchanged(state.facts, facts, folder)
        return setup

    order = sorted(trials, key=lambda trial: -(trial.max_rows or 0))  # the first one decides on the steps
    for number, trial in enumerate(order, 1):
        trial_name, run_folder = str(trial.name), paths.run_folder(trial)
        begun = (run_folder / RUN_FILE).is_file() and sweep_of(run_folder) == state.id
        if begun and trial_name in adapters:
            paths.remove_run_folder(trial, run_folder, notify)  # the process ended before it did
        if trial_name in adapters or trial_name in state.diverged:
            continue
        notify(Notice(f"Trial {number} of {len(trials)}: {trial_name}."))
        notify_trial = partial(_notify_of_trial, notify, f"trial {number} of {len(trials)}")
        try:
            with _resumable(name, trial):
                if begun:
                    options: Any = {"threads": trial.threads, "accept": accept}
                    adapter = run.resume(trial_name, trial.runs_dir, notify_trial, prepare_trial, **options)
                else:
                    requested = _with_same_steps(trial, list(adapters.values()))
                    adapter = run.train(requested, notify_trial, prepare_trial)
            adapters[trial_name] = adapter
        except DivergedError as error:
            notify(Notice(str(error)))
            state.diverged.append(trial_name)
            write_sweep(state, folder)
    if not adapters:
        raise DivergedError(
            f"All trials of {name} diverged: start it again with lower learning rates and --overwrite."
        )
    is_text = not trials[0].learns_preferences and trials[0].label_column is None
    first_adapter = next(iter(adapters.values()))
    if setup is None and (not is_text or gain_matrix.cached_rows(first_adapter).missing):
        prepare_trial(_with_max_steps(trials[0], 1, learning_rate=1.0), notify)  # the rows that are measured
    result = measure_trials(name, state.id, folder, trials, adapters, setup, notify)
    with atomic_io.atomic_folder(folder) as work:
        write_result(result, work)
        paths.check_sweep_folder(folder, f"move them, and resume with: {_resume_command(name, trials[0])}")
    return result


def _notify_of_trial(notify: EventHandler, label: str, event: Notice | Progress) -> None:
    """Name the trial in each stage: the time left is that of the trial."""
    notify(replace(event, stage=f"{label}: {event.stage}") if isinstance(event, Progress) else event)


def _with_same_steps(trial: TrainConfig, done: list[Adapter]) -> TrainConfig:
    """Give a trial with a time limit the steps of the trials before it."""
    if not done or trial.max_steps is not None or trial.epochs is not None:
        return trial
    return _with_max_steps(trial, resolve_settings(TrainConfig, {}, done[0].path / RUN_FILE).max_steps)


def _with_max_steps(trial: TrainConfig, steps: int | None, **changes: float) -> TrainConfig:
    return trial.model_copy(update=dict.fromkeys(STOP_RULES) | {"max_steps": steps, **changes})


def _finished_adapter(trial: TrainConfig, sweep: str) -> Adapter | None:
    """Return the adapter of a trial, or None while the library has none of this sweep."""
    with contextlib.suppress(AdapterError, ConfigError):
        adapter = Library(trial.adapters_dir).get(str(trial.name))
        is_of_sweep = adapter.manifest and checkpoints.sweep_id(adapter.manifest) == sweep
        config = resolve_settings(TrainConfig, {}, adapter.path / RUN_FILE)  # its name may be another trial's
        is_trial = (config.rank, config.max_rows) == (trial.rank, trial.max_rows)
        is_trial = is_trial and trial.learning_rate in (None, PROBE, config.learning_rate)
        is_trial = is_trial and trial.max_steps in (None, config.max_steps)
        is_trial = is_trial and trial.beta in (None, config.beta)
        if is_of_sweep and is_trial and not verify_adapter(adapter):
            return adapter
    return None


def _check_place(trial: TrainConfig, name: str, sweep: str) -> None:
    """Raise TrainingError when others have taken the place of a trial that has not finished."""
    adapter, run_folder = trial.adapters_dir / str(trial.name), paths.run_folder(trial)
    if not trial.overwrite and os.path.lexists(adapter):
        raise TrainingError(
            f"{adapter} is not the adapter that the sweep trained: restore it, or rename or "
            "remove it (`adapters rename`, `adapters remove`), and it is trained again."
        )
    if not trial.overwrite and os.path.lexists(run_folder) and sweep_of(run_folder) != sweep:
        raise TrainingError(f"{run_folder} is not of the sweep {name}: rename or remove it.")
    if not trial.overwrite and os.path.lexists(run_folder) and not (run_folder / RUN_FILE).is_file():
        raise TrainingError(
            f"{run_folder} holds the checkpoints of a finished run, whose adapter is gone: rename or remove that folder."
        )
