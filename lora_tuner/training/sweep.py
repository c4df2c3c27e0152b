"""Train at several ranks or learning rates, one after another, and recommend an adapter.

Base and data are loaded once. A sweep is stopped and resumed like one run: `runs/NAME.sweep` lists
its trials, and those that have finished are not trained again. All trials take the same number of
steps, so a time limit is that of the first.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .. import atomic_io, distributed, evaluation
from ..adapters import plots
from ..adapters.adapter import RUN_FILE, Adapter, validate_name
from ..adapters.library import Library
from ..config import STOP_RULES, SWEEPABLE, ModelOptions, TrainConfig, read_settings, resolve_settings
from ..data.sources import resolve_eval_dataset
from ..errors import ConfigError, DivergedError, EventHandler, Interrupted, Notice, TrainingError, ignore_events
from ..evaluation import EvalSet, HeldOutLoss
from ..models import loading
from . import arguments, checkpoints, run, trainer
from .setup import TrainingSetup, adapter_name, prepare_training

STATE_FILE, RESULT_FILE, PLOT_FILE = "sweep.yaml", "sweep.json", "sweep.png"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    `loss` is None if it diverged; `gap` is how much lower the best loss is, paired by row.
    """

    name: str
    rank: int
    learning_rate: float
    loss: float | None = None
    bytes: int = 0
    seconds: float = 0.0
    gap: float = 0.0
    standard_error: float | None = 0.0  # None for a single held-out row


@dataclass(frozen=True)
class SweepResult:
    """All trials, and the recommended one: the smallest whose gap is within one standard error."""

    name: str
    base_loss: float
    trials: list[Trial]
    recommended: str
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}


@dataclass
class _SweepState:
    """The state of an unfinished sweep.

    `trials` holds the requested settings, `facts` what the results depend on besides, `done` the
    sha256 of each finished adapter (None if it diverged), `started` the trial in progress.
    """

    trials: list[dict[str, Any]]
    facts: dict[str, str]
    done: dict[str, str | None] = field(default_factory=dict)
    started: str | None = None


def run_sweep(configs: Sequence[TrainConfig], notify: EventHandler = ignore_events) -> SweepResult:
    """Train one adapter for each configuration; they differ only in rank and learning rate.

    Raises:
        LoraTunerError: a request is wrong, before anything is trained.
        Interrupted: the sweep was stopped, with all finished trials saved.
    """
    _refuse_several_processes()
    first = configs[0]
    if first.parent is not None and len({config.rank for config in configs}) > 1:
        raise ConfigError("--from keeps the rank of the parent: give several learning rates, not ranks.")
    name = adapter_name(first)
    measured = resolve_eval_dataset(first, notify, "a sweep selects a rank or a learning rate")
    changes = {"eval_dataset": measured.eval_dataset, "eval_split": measured.eval_split}
    trials = [
        config.model_copy(update=changes | {"name": _trial_name(name, config, configs)}) for config in configs
    ]
    folder = _sweep_folder(first.runs_dir, name)
    if not first.overwrite and is_unfinished(name, first.runs_dir):
        raise TrainingError(
            f"{folder} holds an unfinished sweep: resume it ({_resume_command(name, first)}), discard it with "
            "--overwrite, or choose another --name."
        )
    if why := atomic_io.why_not_writable(first.runs_dir):
        raise TrainingError(f"{why}: choose another --runs-dir.")
    for trial in trials:
        run.check_output_paths(trial)
    arguments.check_trackers(first)
    widest = max(trials, key=lambda trial: trial.rank)
    setup = prepare_training(_with_max_steps(widest, 1), notify)  # what fits the widest fits all
    run.check_disk_space(setup)
    first.runs_dir.mkdir(parents=True, exist_ok=True)
    settings = [trial.model_dump(mode="json", exclude_none=True, exclude_unset=True) for trial in trials]
    state = _SweepState(settings, checkpoints.reproducibility_facts(setup.manifest))
    _write_state(state, folder)
    return _run_trials(name, folder, state, setup, notify)


def is_unfinished(name: str, runs_dir: Path) -> bool:
    """Return whether there is a sweep to resume. Raises TrainingError for an old one."""
    if (_sweep_folder(runs_dir, name) / STATE_FILE).is_file():
        return True
    old = runs_dir / f"{name}.ladder"
    if (old / "ladder.yaml").is_file():
        raise TrainingError(
            f"{old} is an unfinished sweep of an earlier version and cannot be resumed: remove it and start the sweep again."
        )
    return False


def resume_sweep(name: str, runs_dir: Path = Path("runs"), notify: EventHandler = ignore_events) -> SweepResult:
    """Continue the sweep in `runs_dir/NAME.sweep`.

    Raises:
        TrainingError: data, base or library versions changed, or the state is unreadable.
    """
    _refuse_several_processes()
    folder = _sweep_folder(runs_dir, name)
    try:
        state = _SweepState(**read_settings(folder / STATE_FILE))
        state.trials = [dict(settings) | {"runs_dir": str(runs_dir)} for settings in state.trials]
        state.facts, state.done = dict(state.facts), dict(state.done)
        for settings in state.trials:
            TrainConfig.model_validate(settings)
    except (TypeError, ValueError) as error:
        raise TrainingError(
            f"{folder / STATE_FILE} cannot be read: start the sweep again with --overwrite."
        ) from error
    return _run_trials(name, folder, state, None, notify)


def _refuse_several_processes() -> None:
    if distributed.expected_world_size() > 1:
        raise ConfigError(
            "A sweep runs in one process: leave out torchrun, or give one rank and one learning rate."
        )


def _write_state(state: _SweepState, folder: Path) -> None:
    atomic_io.atomic_write_text(
        folder / STATE_FILE, yaml.safe_dump(asdict(state), sort_keys=False, allow_unicode=True)
    )


def _sweep_folder(runs_dir: Path, name: str) -> Path:
    return runs_dir / f"{name}.sweep"  # names of adapters have no dot


def _resume_command(name: str, config: TrainConfig) -> str:
    return trainer.resume_command(config.model_copy(update={"name": name}))


def _trial_name(name: str, config: TrainConfig, configs: Sequence[TrainConfig]) -> str:
    """Make the name of a trial: that of the sweep, and the settings in which the trials differ."""
    for setting, letters in zip(SWEEPABLE, ("r", "lr"), strict=True):
        if len({getattr(other, setting) for other in configs}) > 1:
            name += f"-{letters}{getattr(config, setting):g}".replace(".", "p").replace("+", "")
    return validate_name(name)


def _run_trials(
    name: str, folder: Path, state: _SweepState, setup: TrainingSetup | None, notify: EventHandler
) -> SweepResult:
    """Train the remaining trials, compare all, and replace the state by the result."""

    def prepare_trial(requested: TrainConfig, notify: EventHandler) -> TrainingSetup:
        nonlocal setup
        if setup is not None:
            setup.remove_lora()
        setup = prepare_training(requested, notify, inputs=setup)
        checkpoints.check_unchanged(state.facts, checkpoints.reproducibility_facts(setup.manifest), folder)
        return setup

    trials = [TrainConfig.model_validate(settings) for settings in state.trials]
    adapters: dict[str, Adapter] = {}
    for number, trial in enumerate(trials, 1):
        trial_name = str(trial.name)
        if trial_name in state.done:
            if state.done[trial_name] is not None:
                adapters[trial_name] = _finished_adapter(trial, state.done[trial_name])
            continue
        notify(Notice(f"Trial {number} of {len(trials)}: {trial_name}."))
        run_folder = trial.runs_dir / trial_name
        started = state.started == trial_name and (run_folder / RUN_FILE).is_file()
        if not started:
            if run_folder.is_dir():
                atomic_io.delete_atomically(run_folder)  # of an earlier run
            state.started = trial_name
            _write_state(state, folder)
        try:
            if started:
                adapter = run.resume(trial_name, trial.runs_dir, notify, prepare_trial)
            else:
                adapter = run.train(_with_same_steps(trial, list(adapters.values())), notify, prepare_trial)
            adapters[trial_name], state.done[trial_name] = adapter, adapter.sha256
        except Interrupted as error:
            text = str(error).partition(" Resume with")[0]
            raise Interrupted(f"{text} Resume with: {_resume_command(name, trial)}") from error
        except DivergedError as error:
            notify(Notice(str(error)))
            state.done[trial_name] = None
        _write_state(state, folder)
    if not adapters:
        raise DivergedError(f"All trials of {name} diverged: try lower learning rates.")
    result = _measure_trials(name, folder, trials, adapters, setup, notify)
    with atomic_io.atomic_folder(folder) as work:
        (work / RESULT_FILE).write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        points = [
            (trial.name, trial.bytes, trial.seconds, trial.loss)
            for trial in result.trials
            if trial.loss is not None
        ]
        plots.plot_sweep(points, result.base_loss, result.recommended, work / PLOT_FILE)
    return result


def _with_same_steps(trial: TrainConfig, done: list[Adapter]) -> TrainConfig:
    """Give a trial with a time limit the steps of the trials before it."""
    if not done or trial.max_steps is not None or trial.epochs is not None:
        return trial
    return _with_max_steps(trial, resolve_settings(TrainConfig, {}, done[0].path / RUN_FILE).max_steps)


def _with_max_steps(trial: TrainConfig, steps: int | None) -> TrainConfig:
    return trial.model_copy(update=dict.fromkeys(STOP_RULES) | {"max_steps": steps})


def _finished_adapter(trial: TrainConfig, sha256: str | None) -> Adapter:
    """Return the adapter of a finished trial. Raises TrainingError if it was replaced."""
    adapter = Library(trial.adapters_dir).get(str(trial.name))
    if adapter.sha256 != sha256:
        raise TrainingError(
            f"{adapter.path} is not the adapter that the sweep trained: restore it, or start the sweep again."
        )
    return adapter


def _measure_trials(
    name: str,
    folder: Path,
    trials: list[TrainConfig],
    adapters: dict[str, Adapter],
    setup: TrainingSetup | None,
    notify: EventHandler,
) -> SweepResult:
    """Compare the trials on the same held-out rows, each paired with the best.

    Args:
        setup: that of the last trial, or None when all trials had finished before.
    """
    first_adapter = next(iter(adapters.values()))
    first = resolve_settings(TrainConfig, {}, first_adapter.path / RUN_FILE)
    if setup is not None:
        setup.remove_lora()
        base, rows = setup.base, EvalSet(name, setup.held_out_texts)
    else:
        options = ModelOptions(device=first.device, dtype=first.dtype, load_in=first.load_in, notify=notify)
        base, rows = loading.open_base(first_adapter, options), evaluation.cached_rows(first_adapter)
    losses = evaluation.held_out_losses(base, adapters, [rows], notify)
    held_out: dict[str, HeldOutLoss] = {}
    for trial_name, (pair,) in zip(adapters, losses, strict=True):
        if pair is None:
            raise TrainingError(f"{name}: {rows.missing}, so the trials cannot be compared.")
        base_held_out, held_out[trial_name] = pair
    best = min(held_out.values(), key=lambda loss: loss.loss)
    results = []
    for trial in trials:
        trial_name = str(trial.name)
        if trial_name not in adapters:
            results.append(Trial(trial_name, trial.rank, trial.learning_rate or first.learning_rate or 0.0))
        else:
            adapter, loss = adapters[trial_name], held_out[trial_name]
            config = resolve_settings(TrainConfig, {}, adapter.path / RUN_FILE)
            gap = evaluation.paired_gain(loss, best)
            results.append(
                Trial(
                    name=trial_name,
                    rank=config.rank,
                    learning_rate=float(config.learning_rate or 0),
                    loss=loss.loss,
                    bytes=adapter.bytes,
                    seconds=adapter.manifest.run.seconds if adapter.manifest and adapter.manifest.run else 0.0,
                    gap=gap.gain,
                    standard_error=gap.standard_error,
                )
            )
    good = [trial for trial in results if trial.loss is not None and trial.gap <= (trial.standard_error or 0.0)]
    recommended = min(good, key=lambda trial: (trial.bytes, trial.loss))
    return SweepResult(name, base_held_out.loss, results, recommended.name, folder)
