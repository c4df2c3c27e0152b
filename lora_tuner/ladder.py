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

from . import cost, distributed, evaluation, files, lora, report, store, trainer, training
from .config import LADDER, STOPS, TrainConfig, resolve, settings_in
from .data import default_name
from .errors import ConfigError, DivergedError, Interrupted, Listener, Notice, TrainingError, ignore
from .evaluation import HeldOut, RowSet
from .job import Job, prepare, renew
from .library import Library
from .store import Adapter

STATE, FACTS, PICTURE = "ladder.yaml", "ladder.json", "ladder.png"


@dataclass(frozen=True)
class Rung:
    """One run of a ladder. `loss` is None where it has diverged; `worse` is by how much the best is better, with the standard
    error of that, row by row."""

    name: str
    rank: int
    learning_rate: float
    loss: float | None
    bytes: int
    seconds: float
    worse: float = 0.0
    standard_error: float = 0.0


@dataclass(frozen=True)
class Ladder:
    """All rungs, and the name of the one to keep: the smallest that the best does not beat by more than a standard error."""

    name: str
    base_loss: float
    rungs: list[Rung]
    keep: str
    folder: Path

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}


def climb(configs: Sequence[TrainConfig], notify: Listener = ignore) -> Ladder:
    """Train one adapter for each configuration; they differ in rank and learning rate alone.

    Raises a LoraTunerError before anything is trained, or Interrupted, with all that is done saved.
    """
    _refuse_many()
    first = configs[0]
    if first.parent is not None and len({config.rank for config in configs}) > 1:
        raise ConfigError("--from keeps the rank of its parent: give it several learning rates, not ranks.")
    name = store.valid_name(first.name or default_name(first.dataset))
    named = [config.model_copy(update={"name": _name(name, config, configs)}) for config in configs]
    folder = _folder(first.runs_dir, name)
    if waits(name, first.runs_dir) and not first.overwrite:
        go_on = trainer.go_on(first.model_copy(update={"name": name}))
        raise TrainingError(
            f"{folder} holds an unfinished ladder: go on with it ({go_on}), drop it with --overwrite, or choose another --name."
        )
    if why := files.unwritable(first.runs_dir):
        raise TrainingError(f"{why}: choose another --runs-dir.")
    for config in named:
        training.check_places(config)
    trainer.check_trackers(first)
    job = prepare(named[0], notify)
    widest = max(named, key=lambda it: it.rank)
    if widest is not named[0]:
        job = renew(job, widest)
    training.check_room(cost.fit_memory(job))  # what fits the widest fits them all
    first.runs_dir.mkdir(parents=True, exist_ok=True)
    state = _State([_asked(config) for config in named], training.decisive(job.manifest))
    _keep(state, folder)
    return _climb(name, folder, state, job, notify)


def waits(name: str, runs_dir: Path) -> bool:
    """Whether a ladder of this name was stopped on its way."""
    return (_folder(runs_dir, name) / STATE).is_file()


def resume(name: str, runs_dir: Path = Path("runs"), notify: Listener = ignore) -> Ladder:
    """Go on with the ladder in `runs_dir/name.ladder`. Raises TrainingError where data, base or versions are not what they were,
    and where what is known of it is not readable."""
    _refuse_many()
    folder = _folder(runs_dir, name)
    try:
        known = settings_in(folder / STATE)
        state = _State(known["rungs"], dict(known["facts"]), dict(known["done"]), known["begun"])
        for rung in state.rungs:
            TrainConfig.model_validate(rung)
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{folder / STATE} is not what the ladder was started with: start anew.") from error
    state.rungs = [rung | {"runs_dir": str(runs_dir)} for rung in state.rungs]
    return _climb(name, folder, state, None, notify)


def _refuse_many() -> None:
    if distributed.announced() > 1:
        raise ConfigError(
            "Several ranks or learning rates are trained by one process: leave torchrun out, or give one of each."
        )


@dataclass
class _State:
    """What is known of a ladder that is not finished: its rungs as they were asked for, what their results depend on besides,
    the sha256 of those that are adapters (None of one that has diverged), and the one that was begun."""

    rungs: list[dict[str, Any]]
    facts: dict[str, str]
    done: dict[str, str | None] = field(default_factory=dict)
    begun: str | None = None


def _asked(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True, exclude_unset=True)


def _keep(state: _State, folder: Path) -> None:
    files.write_text(folder / STATE, yaml.safe_dump(asdict(state), sort_keys=False, allow_unicode=True))


def _folder(runs_dir: Path, name: str) -> Path:
    return runs_dir / f"{name}.ladder"  # no adapter's name has a dot


def _name(name: str, config: TrainConfig, all_of_them: Sequence[TrainConfig]) -> str:
    """The name of a rung: what it has of its own, after that of the ladder."""
    for setting, letters in zip(LADDER, ("r", "lr"), strict=True):
        if len({getattr(it, setting) for it in all_of_them}) > 1:
            name += f"-{letters}{getattr(config, setting):g}".replace(".", "p").replace("+", "")
    return store.valid_name(name)


def _climb(name: str, folder: Path, state: _State, job: Job | None, notify: Listener) -> Ladder:
    def next_job(config: TrainConfig, notify: Listener) -> Job:
        nonlocal job
        if job is None:
            job = prepare(config, notify)
            training.check_same(state.facts, training.decisive(job.manifest), folder)
        else:
            job = renew(job, config)
        return job

    configs = [TrainConfig.model_validate(rung) for rung in state.rungs]
    adapters: dict[str, Adapter] = {}
    for number, config in enumerate(configs, 1):
        rung = str(config.name)
        if rung in state.done:
            if state.done[rung] is not None:
                adapters[rung] = _done(config, state.done[rung])
            continue
        notify(Notice(f"Rung {number} of {len(configs)}: {rung}."))
        begun = state.begun == rung and (config.runs_dir / rung / store.RUN).is_file()
        if not begun:
            if (config.runs_dir / rung).is_dir():
                files.take_away(config.runs_dir / rung)  # an earlier run's: it must not be gone on with
            state.begun = rung
            _keep(state, folder)
        try:
            if begun:
                adapter = training.resume(rung, config.runs_dir, notify, next_job)
            else:
                adapter = training.train(_with_steps(config, list(adapters.values())), notify, next_job)
            adapters[rung], state.done[rung] = adapter, adapter.sha256
        except Interrupted as stopped:
            go_on = trainer.go_on(config.model_copy(update={"name": name}))
            raise Interrupted(f"{str(stopped).partition(' Go on with')[0]} Go on with: {go_on}") from stopped
        except DivergedError as error:
            notify(Notice(str(error)))
            state.done[rung] = None
        _keep(state, folder)
    if not adapters:
        raise DivergedError(f"No rung of {name} has ended well: try lower learning rates.")
    ladder = _measured(name, folder, configs, adapters, job, notify)
    with files.new_folder(folder) as work:
        (work / FACTS).write_text(json.dumps(ladder.facts(), indent=2) + "\n", encoding="utf-8")
        report.plot_ladder(
            [(it.name, it.bytes, it.seconds, it.loss) for it in ladder.rungs if it.loss is not None],
            ladder.base_loss,
            ladder.keep,
            work / PICTURE,
        )
    return ladder


def _with_steps(config: TrainConfig, done: list[Adapter]) -> TrainConfig:
    """The configuration with the steps of the rungs before it: what minutes mean was found for the first."""
    if not done or config.max_steps is not None or config.epochs is not None:
        return config
    steps = resolve(TrainConfig, {}, done[0].path / store.RUN).max_steps
    return config.model_copy(update=dict.fromkeys(STOPS) | {"max_steps": steps})


def _done(config: TrainConfig, digest: str | None) -> Adapter:
    """The adapter of a rung that was trained before the ladder was stopped. Raises TrainingError for another one."""
    adapter = Library(config.adapters_dir).get(str(config.name))
    if adapter.sha256 != digest:
        raise TrainingError(
            f"{adapter.path} is not the adapter that its ladder has trained: restore that, or start anew."
        )
    return adapter


def _measured(
    name: str, folder: Path, configs: list[TrainConfig], found: dict[str, Adapter], job: Job | None, notify: Listener
) -> Ladder:
    """What the rungs are worth, beside the best of them, on the rows that all were measured on."""
    if job is not None:
        job.release()
    some = next(iter(found.values()))
    first = resolve(TrainConfig, {}, some.path / store.RUN)
    how = {"device": first.device, "dtype": first.dtype, "load_in": first.load_in}
    base = job.base if job is not None else lora.open_base(some, **how, notify=notify)
    rows = RowSet(name, job.held_out_texts) if job is not None else evaluation.kept_rows(some)
    losses = evaluation.losses(base, found, [rows], notify)
    pairs = {rung: line[0] for rung, line in zip(found, losses, strict=True)}
    if any(pair is None for pair in pairs.values()):
        raise TrainingError(f"{name}: {rows.missing}, so the rungs cannot be compared.")
    held: dict[str, HeldOut] = {rung: pair[1] for rung, pair in pairs.items() if pair is not None}
    base_loss = next(pair[0].loss for pair in pairs.values() if pair is not None)
    best = min(held, key=lambda rung: held[rung].loss)
    rungs = []
    for config in configs:
        rung = str(config.name)
        if rung not in found:
            rate = config.learning_rate if config.learning_rate is not None else first.learning_rate
            rungs.append(Rung(rung, config.rank, float(rate or 0), None, 0, 0.0))
            continue
        trained, manifest = resolve(TrainConfig, {}, found[rung].path / store.RUN), found[rung].manifest
        beside = evaluation.compare(held[rung], held[best])
        seconds = manifest.run.seconds if manifest and manifest.run else 0.0
        facts = found[rung].bytes, seconds, beside.gain, beside.standard_error
        rungs.append(Rung(rung, trained.rank, float(trained.learning_rate or 0), held[rung].loss, *facts))
    good = [it for it in rungs if it.loss is not None and it.worse <= it.standard_error]
    keep = min(good, key=lambda it: (it.bytes, it.loss))
    return Ladder(name, base_loss, rungs, keep.name, folder)
