"""The same run at several ranks or learning rates, one after another, and which of the adapters to keep.

Base and rows are read once. Surprise: it is stopped and resumed as one run: `runs/NAME.ladder` knows its rungs, and those that
have become adapters are not trained again. Limit: all rungs take the same steps, so a time limit is that of the first.
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
from ..config import (
    STOP_RULES,
    SWEEPABLE,
    ModelOptions,
    TrainConfig,
    default_adapter_name,
    read_settings,
    rename_old_keys,
    resolve_settings,
)
from ..errors import ConfigError, DivergedError, EventHandler, Interrupted, Notice, TrainingError, ignore_events
from ..evaluation import EvalSet, HeldOutLoss
from ..models import loading
from . import profiling, run, trainer
from .setup import TrainingSetup, prepare_training, reconfigure

STATE_FILE, RESULT_FILE, PLOT_FILE = "ladder.yaml", "ladder.json", "ladder.png"


@dataclass(frozen=True)
class Trial:
    """One run of a ladder. `loss` is None where it has diverged; `worse` is by how much the best is better, with the standard
    error of that, row by row."""

    name: str
    rank: int
    learning_rate: float
    loss: float | None
    bytes: int
    seconds: float
    gap: float = 0.0
    standard_error: float = 0.0


@dataclass(frozen=True)
class SweepResult:
    """All rungs, and the name of the one to keep: the smallest that the best does not beat by more than a standard error."""

    name: str
    base_loss: float
    trials: list[Trial]
    recommended: str
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}


def run_sweep(configs: Sequence[TrainConfig], notify: EventHandler = ignore_events) -> SweepResult:
    """Train one adapter for each configuration; they differ in rank and learning rate alone.

    Raises a LoraTunerError before anything is trained, or Interrupted, with all that is done saved.
    """
    _refuse_several_processes()
    first = configs[0]
    if first.parent is not None and len({config.rank for config in configs}) > 1:
        raise ConfigError("--from keeps the rank of its parent: give it several learning rates, not ranks.")
    name = validate_name(first.name or default_adapter_name(first.dataset))
    named = [config.model_copy(update={"name": _trial_name(name, config, configs)}) for config in configs]
    folder = _sweep_folder(first.runs_dir, name)
    if is_unfinished(name, first.runs_dir) and not first.overwrite:
        go_on = trainer.resume_command(first.model_copy(update={"name": name}))
        raise TrainingError(
            f"{folder} holds an unfinished ladder: go on with it ({go_on}), drop it with --overwrite, or choose another --name."
        )
    if why := atomic_io.why_not_writable(first.runs_dir):
        raise TrainingError(f"{why}: choose another --runs-dir.")
    for config in named:
        run.check_output_paths(config)
    trainer.check_trackers(first)
    job = prepare_training(named[0], notify)
    widest = max(named, key=lambda it: it.rank)
    if widest is not named[0]:
        job = reconfigure(job, widest)
    run.check_disk_space(profiling.fit_to_memory(job))  # what fits the widest fits them all
    first.runs_dir.mkdir(parents=True, exist_ok=True)
    state = _SweepState([_requested_settings(config) for config in named], run.reproducibility_facts(job.manifest))
    _write_state(state, folder)
    return _run_trials(name, folder, state, job, notify)


def is_unfinished(name: str, runs_dir: Path) -> bool:
    """Whether a ladder of this name was stopped on its way."""
    return (_sweep_folder(runs_dir, name) / STATE_FILE).is_file()


def resume_sweep(name: str, runs_dir: Path = Path("runs"), notify: EventHandler = ignore_events) -> SweepResult:
    """Go on with the ladder in `runs_dir/name.ladder`. Raises TrainingError where data, base or versions are not what they were,
    and where what is known of it is not readable."""
    _refuse_several_processes()
    folder = _sweep_folder(runs_dir, name)
    try:
        known = read_settings(folder / STATE_FILE)
        rungs = [rename_old_keys(dict(rung)) for rung in known["rungs"]]
        state = _SweepState(rungs, dict(known["facts"]), dict(known["done"]), known["begun"])
        for rung in state.rungs:
            TrainConfig.model_validate(rung)
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{folder / STATE_FILE} is not what the ladder was started with: start anew.") from error
    state.rungs = [rung | {"runs_dir": str(runs_dir)} for rung in state.rungs]
    return _run_trials(name, folder, state, None, notify)


def _refuse_several_processes() -> None:
    if distributed.expected_world_size() > 1:
        raise ConfigError(
            "Several ranks or learning rates are trained by one process: leave torchrun out, or give one of each."
        )


@dataclass
class _SweepState:
    """What is known of a ladder that is not finished: its rungs as they were asked for, what their results depend on besides,
    the sha256 of those that are adapters (None of one that has diverged), and the one that was begun."""

    rungs: list[dict[str, Any]]
    facts: dict[str, str]
    done: dict[str, str | None] = field(default_factory=dict)
    begun: str | None = None


def _requested_settings(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True, exclude_unset=True)


def _write_state(state: _SweepState, folder: Path) -> None:
    atomic_io.atomic_write_text(folder / STATE_FILE, yaml.safe_dump(asdict(state), sort_keys=False, allow_unicode=True))


def _sweep_folder(runs_dir: Path, name: str) -> Path:
    return runs_dir / f"{name}.ladder"  # no adapter's name has a dot


def _trial_name(name: str, config: TrainConfig, all_of_them: Sequence[TrainConfig]) -> str:
    """The name of a rung: what it has of its own, after that of the ladder."""
    for setting, letters in zip(SWEEPABLE, ("r", "lr"), strict=True):
        if len({getattr(it, setting) for it in all_of_them}) > 1:
            name += f"-{letters}{getattr(config, setting):g}".replace(".", "p").replace("+", "")
    return validate_name(name)


def _run_trials(
    name: str, folder: Path, state: _SweepState, job: TrainingSetup | None, notify: EventHandler
) -> SweepResult:
    def next_job(config: TrainConfig, notify: EventHandler) -> TrainingSetup:
        nonlocal job
        if job is None:
            job = prepare_training(config, notify)
            run.check_unchanged(state.facts, run.reproducibility_facts(job.manifest), folder)
        else:
            job = reconfigure(job, config)
        return job

    configs = [TrainConfig.model_validate(rung) for rung in state.rungs]
    adapters: dict[str, Adapter] = {}
    for number, config in enumerate(configs, 1):
        rung = str(config.name)
        if rung in state.done:
            if state.done[rung] is not None:
                adapters[rung] = _finished_adapter(config, state.done[rung])
            continue
        notify(Notice(f"Rung {number} of {len(configs)}: {rung}."))
        begun = state.begun == rung and (config.runs_dir / rung / RUN_FILE).is_file()
        if not begun:
            if (config.runs_dir / rung).is_dir():
                atomic_io.delete_atomically(config.runs_dir / rung)  # an earlier run's: it must not be gone on with
            state.begun = rung
            _write_state(state, folder)
        try:
            if begun:
                adapter = run.resume(rung, config.runs_dir, notify, next_job)
            else:
                adapter = run.train(_with_steps(config, list(adapters.values())), notify, next_job)
            adapters[rung], state.done[rung] = adapter, adapter.sha256
        except Interrupted as stopped:
            go_on = trainer.resume_command(config.model_copy(update={"name": name}))
            raise Interrupted(f"{str(stopped).partition(' Go on with')[0]} Go on with: {go_on}") from stopped
        except DivergedError as error:
            notify(Notice(str(error)))
            state.done[rung] = None
        _write_state(state, folder)
    if not adapters:
        raise DivergedError(f"No rung of {name} has ended well: try lower learning rates.")
    ladder = _measure_trials(name, folder, configs, adapters, job, notify)
    with atomic_io.atomic_folder(folder) as work:
        (work / RESULT_FILE).write_text(json.dumps(ladder.to_dict(), indent=2) + "\n", encoding="utf-8")
        plots.plot_sweep(
            [(it.name, it.bytes, it.seconds, it.loss) for it in ladder.trials if it.loss is not None],
            ladder.base_loss,
            ladder.recommended,
            work / PLOT_FILE,
        )
    return ladder


def _with_steps(config: TrainConfig, done: list[Adapter]) -> TrainConfig:
    """The configuration with the steps of the rungs before it: what minutes mean was found for the first."""
    if not done or config.max_steps is not None or config.epochs is not None:
        return config
    steps = resolve_settings(TrainConfig, {}, done[0].path / RUN_FILE).max_steps
    return config.model_copy(update=dict.fromkeys(STOP_RULES) | {"max_steps": steps})


def _finished_adapter(config: TrainConfig, digest: str | None) -> Adapter:
    """The adapter of a rung that was trained before the ladder was stopped. Raises TrainingError for another one."""
    adapter = Library(config.adapters_dir).get(str(config.name))
    if adapter.sha256 != digest:
        raise TrainingError(
            f"{adapter.path} is not the adapter that its ladder has trained: restore that, or start anew."
        )
    return adapter


def _measure_trials(
    name: str,
    folder: Path,
    configs: list[TrainConfig],
    found: dict[str, Adapter],
    job: TrainingSetup | None,
    notify: EventHandler,
) -> SweepResult:
    """What the rungs are worth, beside the best of them, on the rows that all were measured on."""
    if job is not None:
        job.remove_lora()
    some = next(iter(found.values()))
    first = resolve_settings(TrainConfig, {}, some.path / RUN_FILE)
    options = ModelOptions(device=first.device, dtype=first.dtype, load_in=first.load_in, notify=notify)
    base = job.base if job is not None else loading.open_base(some, options)
    rows = EvalSet(name, job.held_out_texts) if job is not None else evaluation.cached_rows(some)
    losses = evaluation.held_out_losses(base, found, [rows], notify)
    pairs = {rung: line[0] for rung, line in zip(found, losses, strict=True)}
    if any(pair is None for pair in pairs.values()):
        raise TrainingError(f"{name}: {rows.missing}, so the rungs cannot be compared.")
    held: dict[str, HeldOutLoss] = {rung: pair[1] for rung, pair in pairs.items() if pair is not None}
    base_loss = next(pair[0].loss for pair in pairs.values() if pair is not None)
    best = min(held, key=lambda rung: held[rung].loss)
    rungs = []
    for config in configs:
        rung = str(config.name)
        if rung not in found:
            rate = config.learning_rate if config.learning_rate is not None else first.learning_rate
            rungs.append(Trial(rung, config.rank, float(rate or 0), None, 0, 0.0))
            continue
        trained, manifest = (
            resolve_settings(TrainConfig, {}, found[rung].path / RUN_FILE),
            found[rung].manifest,
        )
        beside = evaluation.paired_gain(held[rung], held[best])
        seconds = manifest.run.seconds if manifest and manifest.run else 0.0
        facts = found[rung].bytes, seconds, beside.gain, beside.standard_error
        rungs.append(Trial(rung, trained.rank, float(trained.learning_rate or 0), held[rung].loss, *facts))
    good = [it for it in rungs if it.loss is not None and it.gap <= it.standard_error]
    keep = min(good, key=lambda it: (it.bytes, it.loss))
    return SweepResult(name, base_loss, rungs, keep.name, folder)
