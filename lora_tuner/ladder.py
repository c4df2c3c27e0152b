"""The same run at several ranks or learning rates, one after another, and which of the adapters to keep.

Base and rows are read once. Surprise: it is stopped and resumed as one run: `runs/NAME.ladder` knows its rungs, and those that
have become adapters are not trained again. Limit: all rungs take the same steps, so a time limit is that of the first.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from . import evaluation, files, lora, report, store, training
from .config import LADDER, STOPS, TrainConfig, resolve, settings_in
from .data import default_name
from .errors import AdapterError, ConfigError, DivergedError, Interrupted, Listener, Notice, TrainingError, ignore
from .evaluation import HeldOut
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
    first = configs[0]
    if first.parent is not None and len({config.rank for config in configs}) > 1:
        raise ConfigError("--from keeps the rank of its parent: give it several learning rates, not ranks.")
    name = store.valid_name(first.name or default_name(first.dataset))
    folder = _folder(first.runs_dir, name)
    library = Library(first.adapters_dir)
    named = [config.model_copy(update={"name": _name(name, config, configs)}) for config in configs]
    for config in named:
        library.check_free(str(config.name), overwrite=config.overwrite)
    if folder.exists() and not first.overwrite:
        raise TrainingError(
            f"{folder} is there already: go on with it by --resume {name}, drop it with --overwrite, or choose another --name."
        )
    if why := files.unwritable(first.runs_dir):
        raise TrainingError(f"{why}: choose another --runs-dir.")
    first.runs_dir.mkdir(parents=True, exist_ok=True)
    with files.new_folder(folder) as work:
        rungs = [config.model_dump(mode="json", exclude_none=True, exclude_unset=True) for config in named]
        (work / STATE).write_text(yaml.safe_dump({"rungs": rungs}, sort_keys=False, allow_unicode=True), "utf-8")
    return _climb(name, folder, named, notify)


def waits(name: str, runs_dir: Path) -> bool:
    """Whether a ladder of this name was stopped on its way."""
    return (_folder(runs_dir, name) / STATE).is_file()


def resume(name: str, runs_dir: Path = Path("runs"), notify: Listener = ignore) -> Ladder:
    """Go on with the ladder in `runs_dir/name.ladder`. Raises TrainingError where what is known of it is not readable."""
    folder = _folder(runs_dir, name)
    try:
        rungs = [TrainConfig.model_validate(rung) for rung in settings_in(folder / STATE)["rungs"]]
    except (KeyError, TypeError, ValidationError) as error:
        raise TrainingError(f"{folder / STATE} is not what the ladder was started with: start anew.") from error
    return _climb(name, folder, [rung.model_copy(update={"runs_dir": runs_dir}) for rung in rungs], notify)


def _folder(runs_dir: Path, name: str) -> Path:
    return runs_dir / f"{name}.ladder"  # no adapter's name has a dot


def _name(name: str, config: TrainConfig, all_of_them: Sequence[TrainConfig]) -> str:
    """The name of a rung: what it has of its own, after that of the ladder."""
    for setting, letters in zip(LADDER, ("r", "lr"), strict=True):
        if len({getattr(it, setting) for it in all_of_them}) > 1:
            name += f"-{letters}{getattr(config, setting):g}".replace(".", "p").replace("+", "")
    return store.valid_name(name)


def _climb(name: str, folder: Path, configs: list[TrainConfig], notify: Listener) -> Ladder:
    job: Job | None = None

    def next_job(config: TrainConfig, notify: Listener) -> Job:
        nonlocal job
        job = prepare(config, notify) if job is None else renew(job, config)
        return job

    adapters: dict[str, Adapter | None] = {}
    for number, config in enumerate(configs, 1):
        rung = str(config.name)
        config = _with_steps(config, [it for it in adapters.values() if it is not None])
        notify(Notice(f"Rung {number} of {len(configs)}: {rung}."))
        try:
            adapters[rung] = _trained(config) or _train(config, notify, next_job)
        except Interrupted as stopped:
            raise Interrupted(
                f"{str(stopped).partition(' Go on with')[0]} Go on with: python cli.py train --resume {name}"
            ) from stopped
        except DivergedError as error:
            notify(Notice(str(error)))
            adapters[rung] = None
    found = {rung: adapter for rung, adapter in adapters.items() if adapter is not None}
    if not found:
        raise DivergedError(f"No rung of {name} has ended well: try lower learning rates.")
    ladder = _measured(name, folder, configs, found, job, notify)
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


def _trained(config: TrainConfig) -> Adapter | None:
    """The adapter of a rung that was trained before the ladder was stopped."""
    try:
        adapter = Library(config.adapters_dir).get(str(config.name))
        then = resolve(TrainConfig, {}, adapter.path / store.RUN)
    except (AdapterError, ConfigError):
        return None
    same = all(getattr(then, name) == getattr(config, name) for name in config.model_fields_set - {"overwrite", *STOPS})
    return adapter if same else None


def _train(config: TrainConfig, notify: Listener, next_job: training.Prepare) -> Adapter:
    if (config.runs_dir / str(config.name) / store.RUN).is_file() and not config.overwrite:
        return training.resume(str(config.name), config.runs_dir, notify, next_job)
    return training.train(config, notify, next_job)


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
    losses = evaluation.losses(base, found, [evaluation.kept_rows(some)], notify)
    pairs = {rung: line[0] for rung, line in zip(found, losses, strict=True)}
    if any(pair is None for pair in pairs.values()):
        raise TrainingError(f"{name}: {evaluation.kept_rows(some).missing}, so the rungs cannot be compared.")
    held: dict[str, HeldOut] = {rung: pair[1] for rung, pair in pairs.items() if pair is not None}
    base_loss = next(pair[0].loss for pair in pairs.values() if pair is not None)
    best = min(held, key=lambda rung: held[rung].loss)
    rungs = []
    for config in configs:
        rung = str(config.name)
        rate = config.learning_rate if config.learning_rate is not None else first.learning_rate
        assert rate is not None
        if rung not in found:
            rungs.append(Rung(rung, config.rank, rate, None, 0, 0.0))
            continue
        beside, manifest = evaluation.compare(held[rung], held[best]), found[rung].manifest
        seconds = manifest.run.seconds if manifest and manifest.run else 0.0
        facts = found[rung].bytes, seconds, beside.gain, beside.standard_error
        rungs.append(Rung(rung, config.rank, rate, held[rung].loss, *facts))
    good = [it for it in rungs if it.loss is not None and it.worse <= it.standard_error]
    keep = min(good, key=lambda it: (it.bytes, it.loss))
    return Ladder(name, base_loss, rungs, keep.name, folder)
