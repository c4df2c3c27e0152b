"""A run from a configuration to an adapter in the library, resumed from where it stopped, or only planned.

A running job lives in `runs/NAME`: `run.yaml`, `manifest.json` (what is known so far) and checkpoints. The adapter appears
in the library when all is done, and the folder goes. Surprise: resuming is refused when anything has changed that would make
the result another one; to go on training with something else, train again.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .. import atomic_io, distributed, evaluation
from ..adapters import model_card, plots
from ..adapters.adapter import (
    CARD_FILE,
    LOSS_PLOT_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RUN_FILE,
    Adapter,
    load_adapter_folder,
    read_manifest,
    validate_name,
    verify_adapter,
)
from ..adapters.library import Library
from ..adapters.manifest import Manifest, utc_timestamp
from ..config import TrainConfig, config_to_yaml, default_adapter_name, resolve_settings
from ..errors import (
    AdapterError,
    ConfigError,
    EventHandler,
    Interrupted,
    Notice,
    TrainingError,
    ignore_events,
    os_error_message,
)
from ..models import fsdp, lora
from . import checkpoints, profiling, trainer
from .checkpoints import save_adapter
from .profiling import RunEstimate
from .setup import PreviewedRow, TrainingSetup, prepare_training, preview

_NAME_TAKEN_ADVICE = "rename or remove that one first (`adapters rename`, `adapters remove`)"
_RETRAIN_ADVICE = "Restore that, or train anew with --overwrite."
_NOT_DECISIVE = {
    "adapters_dir",
    "runs_dir",
    "report_to",
    "overwrite",
    "keep_checkpoints",
}  # do not change what a run becomes

__all__ = ["PreviewedRow", "RunEstimate", "plan", "preview", "resume", "train"]


Prepare = Callable[[TrainConfig, EventHandler], TrainingSetup]


def train(config: TrainConfig, notify: EventHandler = ignore_events, prepare: Prepare = prepare_training) -> Adapter:
    """Train an adapter and put it into the library. What is wrong with the request is said before training starts.

    `prepare` is for who has base and rows in memory. Raises a LoraTunerError, or Interrupted when it was asked to stop and
    left a checkpoint to resume from.
    """
    config = _with_name(config)
    notify = _join_processes(config, notify)
    with _run_lock(config.runs_dir, str(config.name)):
        library = distributed.run_on_rank_zero(partial(check_output_paths, config))
        trainer.check_trackers(config)
        job = prepare(config, notify)
        distributed.run_on_rank_zero(partial(check_disk_space, job))
        return _train_and_write(_fix_steps(profiling.fit_to_memory(job)), library, checkpoint=None)


def resume(
    name: str, runs_dir: Path = Path("runs"), notify: EventHandler = ignore_events, prepare: Prepare = prepare_training
) -> Adapter:
    """Go on with the run in `runs_dir/name` from its newest whole checkpoint, exactly as if it had not stopped.

    Raises TrainingError when there is nothing to resume, or when data, base or threads are not what they were.
    """
    folder = runs_dir / validate_name(name)
    if not (folder / RUN_FILE).is_file():
        raise _nothing_to_resume(folder)
    config = resolve_settings(TrainConfig, {}, folder / RUN_FILE).model_copy(update={"runs_dir": runs_dir})
    notify = _join_processes(config, notify)
    with _run_lock(runs_dir, name):
        config, checkpoint, then = distributed.run_on_rank_zero(partial(_load_stopped_run, config, folder, notify))
        library = distributed.run_on_rank_zero(partial(check_output_paths, config, resuming=True))
        trainer.check_trackers(config)
        job = prepare(_for_world_size(config, then[folder], notify), notify)
        for place, manifest in then.items():
            check_unchanged(*_comparable(manifest, job.manifest), place)
        distributed.run_on_rank_zero(partial(check_disk_space, job))
        return _train_and_write(job, library, checkpoint)


def _load_stopped_run(
    config: TrainConfig, folder: Path, notify: EventHandler
) -> tuple[TrainConfig, Path | None, dict[Path, Manifest]]:
    """The settings of a run that was stopped, the checkpoint to go on from, and what was known of both."""
    if not (folder / RUN_FILE).is_file():  # it has finished meanwhile
        raise _nothing_to_resume(folder)
    if config.name != folder.name or config.max_steps is None:
        raise TrainingError(
            f"{folder / RUN_FILE} is not what the run was started with: its name is {config.name}, its max_steps "
            f"{config.max_steps}. {_RETRAIN_ADVICE}"
        )
    _check_finished(config, folder)
    checkpoint = checkpoints.latest_valid(folder, notify)
    then = {place: _read_run_manifest(place) for place in (folder, checkpoint or folder)}
    if checkpoint is not None:
        there = resolve_settings(TrainConfig, {}, checkpoint / RUN_FILE)
        _check_settings(
            _as_one_process(config, then[folder]), _as_one_process(there, then[checkpoint]), folder, checkpoint
        )
    return config, checkpoint, then


def _as_one_process(config: TrainConfig, manifest: Manifest) -> TrainConfig:
    """The settings with which one process takes the steps that several have taken."""
    processes = manifest.run.processes if manifest.run else 1
    return config.model_copy(update={"gradient_accumulation": config.gradient_accumulation * processes})


def _for_world_size(config: TrainConfig, then: Manifest, notify: EventHandler) -> TrainConfig:
    """The settings with which the processes that there are now take the steps of those that there were."""
    before, now = then.run.processes if then.run else 1, distributed.world_size()
    if before == now:
        return config
    each, rest = divmod(config.gradient_accumulation * before, now)
    if rest:
        batches = config.gradient_accumulation * before
        fit = " or ".join(str(number) for number in range(1, batches + 1) if batches % number == 0)
        error = TrainingError(
            f"A step of {config.name} takes {batches} batches, which {now} processes cannot share alike: go on with {fit}."
        )
        raise distributed.share_error(error)
    notify(
        Notice(
            f"The run was begun by {before} {'processes' if before > 1 else 'process'} and goes on with {now}: --gradient-accumulation is "
            f"{each} in place of {config.gradient_accumulation}, so that each step learns the same sequences. What is rounded, and what "
            "dropout leaves out, is another."
        )
    )
    return config.model_copy(update={"gradient_accumulation": each})


def plan(config: TrainConfig, notify: EventHandler = ignore_events) -> RunEstimate:
    """Measure a few real steps, the longest batch among them, and say what the run would cost. Trains nothing."""
    notify = _join_processes(config, notify)
    return profiling.profile_steps(profiling.fit_to_memory(prepare_training(config, notify)))


def _join_processes(config: TrainConfig, notify: EventHandler) -> EventHandler:
    """Who hears of the run: of several processes, the first."""
    fsdp.read_settings(config.device)
    distributed.init_process_group(config.device)
    return notify if distributed.rank() == 0 else ignore_events


def _with_name(config: TrainConfig) -> TrainConfig:
    name = config.name or default_adapter_name(config.dataset)
    return config.model_copy(update={"name": validate_name(name)})


def _run_folder(config: TrainConfig) -> Path:
    assert config.name is not None
    return config.runs_dir / config.name


@contextlib.contextmanager
def _run_lock(runs_dir: Path, name: str) -> Iterator[None]:
    """One run at a time trains under a name."""
    if distributed.rank() > 0:
        yield
        return
    path = runs_dir / f".{name}.lock{atomic_io.WORK_SUFFIX}"  # swept when its process is no more
    lock = FileLock(path, timeout=0)
    if why := atomic_io.why_not_writable(runs_dir):
        raise TrainingError(f"{why}: choose another --runs-dir.")
    runs_dir.mkdir(parents=True, exist_ok=True)
    atomic_io.remove_abandoned(runs_dir)
    try:
        lock.acquire()
    except Timeout as error:
        raise TrainingError(f"Another process trains '{name}' now: choose another --name, or wait for it.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not delete what is open
            path.unlink()  # before its release: who is let in afterwards makes a new one
        lock.release()


def check_output_paths(config: TrainConfig, *, resuming: bool = False) -> Library:
    assert config.name is not None
    library, folder = Library(config.adapters_dir), _run_folder(config)
    library.check_name_free(config.name, overwrite=config.overwrite, advice=_NAME_TAKEN_ADVICE if resuming else None)
    if resuming or not os.path.lexists(folder):
        return library
    if config.runs_dir.resolve() == config.adapters_dir.resolve() or not checkpoints.is_run(folder):
        raise TrainingError(f"{folder} is no run, so it is not replaced: choose another --runs-dir or --name.")
    if (folder / RUN_FILE).is_file() and not config.overwrite:
        raise TrainingError(
            f"{folder} holds an unfinished run: go on with it by --resume {config.name}, drop it with --overwrite, or choose "
            "another --name."
        )
    if any(folder.iterdir()) and not config.overwrite:
        raise TrainingError(
            f"{folder} holds the checkpoints of a run that has finished: drop them with --overwrite, or choose another --name."
        )
    return library


def _nothing_to_resume(folder: Path) -> TrainingError:
    """The error that says why a folder holds no run that can be resumed."""
    here, why = Library(TrainConfig().adapters_dir), "it has finished (into another --adapters-dir?), or never started"
    if folder.name in here.names():
        why = f"it has finished, as {here.path / folder.name}"
    elif copies := sorted(folder.glob(f"*/{RUN_FILE}")):
        why = f"it has finished, or {folder / RUN_FILE} was removed; {copies[0]} is a copy to go on with"
    return TrainingError(f"There is no unfinished run {folder}: {why}. Train without --resume.")


def _check_finished(config: TrainConfig, folder: Path) -> None:
    """Raise TrainingError when the adapter of this run is there already, and the run was cut off while it cleaned up."""
    place = config.adapters_dir / str(config.name)
    with contextlib.suppress(AdapterError, ConfigError):
        adapter = load_adapter_folder(place)
        then = read_manifest(folder)
        if adapter.manifest is None:
            return
        facts, others = _comparable(adapter.manifest, then)
        if facts != others:
            return
        there = resolve_settings(TrainConfig, {}, place / RUN_FILE)
        same = not _changed_settings(_as_one_process(config, then), _as_one_process(there, adapter.manifest))
        if same and not verify_adapter(adapter):  # else the run is the only whole one
            _remove_run_folder(config, folder)
            raise TrainingError(f"The run {config.name} has finished: its adapter is {place}.")


def _remove_run_folder(config: TrainConfig, folder: Path) -> None:
    """What is done with the folder of a run that has finished."""
    if config.keep_checkpoints:
        (folder / RUN_FILE).unlink()  # without it the folder is no run to be resumed
    else:
        atomic_io.delete_atomically(folder)


def _changed_settings(config: TrainConfig, other: TrainConfig) -> list[str]:
    """The settings that decide what a run becomes and are not the same."""
    return [
        name
        for name in TrainConfig.model_fields
        if name not in _NOT_DECISIVE and getattr(config, name) != getattr(other, name)
    ]


def _read_run_manifest(folder: Path) -> Manifest:
    """What was known when the run was started."""
    try:
        return read_manifest(folder)
    except AdapterError as error:
        raise TrainingError(f"{folder} cannot be resumed exactly: {error} {_RETRAIN_ADVICE}") from error


def _check_settings(now: TrainConfig, then: TrainConfig, folder: Path, checkpoint: Path) -> None:
    """Refuse to go on with other settings than those that the checkpoint was made with."""
    if changed := [
        f"{name} (was {getattr(then, name)}, is {getattr(now, name)})" for name in _changed_settings(now, then)
    ]:
        raise TrainingError(
            f"{folder / RUN_FILE} is not what {checkpoint} was made with: {', '.join(changed)}. {_RETRAIN_ADVICE}"
        )


def check_disk_space(job: TrainingSetup) -> None:
    """Raise TrainingError when the disk cannot hold the checkpoints, or the adapter."""
    size = lora.count_parameters(job.model)[0] * 4
    there = sum(it.stat().st_size for it in _run_folder(job.config).rglob("*") if it.is_file())
    kept = (checkpoints.KEPT_CHECKPOINTS + 1) * 3 * size - there  # AdamW keeps two more
    needs = {job.config.runs_dir: kept, job.config.adapters_dir: size}
    for place, need in needs.items():
        if (free := atomic_io.free_space(place)) < need:
            raise TrainingError(
                f"{place} has {free / 1e6:,.0f} MB free, and the run needs {need / 1e6:,.0f}: free some space, or choose another "
                "--runs-dir and --adapters-dir."
            )


def check_unchanged(before: dict[str, str], after: dict[str, str], folder: Path) -> None:
    """Refuse to resume with anything changed that would make the result another one."""
    changed = [
        f"{what} (was {before.get(what, 'none')[:12]}, is {fact[:12]})"
        for what, fact in after.items()
        if before.get(what) != fact
    ]
    if changed:
        raise TrainingError(
            f"{folder} cannot be resumed exactly: changed since it stopped: {', '.join(changed)}. {_RETRAIN_ADVICE}"
        )


def reproducibility_facts(manifest: Manifest) -> dict[str, str]:
    """What a run's result depends on besides its configuration."""
    facts = {"base weights": manifest.base.fingerprint, "tokenizer": str(manifest.base.tokenizer), **manifest.versions}
    if data := manifest.data:
        facts |= {"data": data.hash, "held-out rows": str(data.held_out_hash)}
    if run := manifest.run:
        facts |= {"device": run.device, "dtype": run.dtype, "threads": str(run.threads)}
    return facts


def _comparable(one: Manifest, other: Manifest) -> tuple[dict[str, str], dict[str, str]]:
    """What is decisive of both; threads count where there are as many processes, which is said elsewhere."""
    facts, others = reproducibility_facts(one), reproducibility_facts(other)
    if one.run and other.run and one.run.processes != other.run.processes:
        del facts["threads"], others["threads"]
    return facts, others


def _fix_steps(job: TrainingSetup) -> TrainingSetup:
    """The job with `max_steps` as its only stop rule, so that the run can be repeated step for step."""
    config = job.config
    timed = config.max_steps is None and config.epochs is None
    steps = profiling.profile_steps(job).steps if timed else profiling.steps_for_stop_rule(job, 0.0)
    epoch = job.steps_per_epoch
    job.notify(Notice(f"The run takes {steps:,} steps{f'; one epoch is {epoch:,}' if epoch else ''}."))
    return replace(job, config=config.model_copy(update={"epochs": None, "minutes": None, "max_steps": steps}))


def _train_and_write(job: TrainingSetup, library: Library, checkpoint: Path | None) -> Adapter:
    """Measure, train, measure, write. `checkpoint` is the one to go on from."""
    config, folder = job.config, _run_folder(job.config)
    data, started = job.manifest.data, job.manifest.run
    assert data is not None
    assert started is not None
    with job.model.disable_adapter():
        base_held_out = evaluation.measure_base_loss(job.base, job.held_out, job.notify)
    distributed.run_on_rank_zero(partial(evaluation.cache_rows, job.held_out_texts))
    if checkpoint is None:
        distributed.run_on_rank_zero(partial(_create_run_folder, job, folder))
    try:
        state, history, held_out = trainer.run_trainer(job, folder, checkpoint)
        steps = [entry for entry in history if "loss" in entry]
        run = started.model_copy(
            update={
                "steps": state.global_step,
                "kept_step": state.best_global_step or state.global_step,
                "tokens": sum(entry["tokens"] for entry in steps),
                "seconds": round(sum(entry["seconds"] for entry in steps), 3),
            }
        )
        if config.streaming:
            run = run.model_copy(update={"sequences": state.global_step * job.sequences_per_step})
            data = data.model_copy(update={"counts": asdict(job.dataset.counts)})
        result = evaluation.paired_gain(base_held_out, held_out)
        manifest = job.manifest.model_copy(
            update={"created": utc_timestamp(), "data": data, "run": run, "result": result}
        )
        adapter = distributed.run_on_rank_zero(partial(_write_adapter, job, library, manifest, history))
        evaluation.cache_adapter_loss(job.base, job.held_out, adapter, held_out)
        distributed.run_on_rank_zero(partial(_remove_run_folder, config, folder))
    except KeyboardInterrupt as error:
        raise Interrupted(f"Stopped at once. Go on with: {trainer.resume_command(config)}") from error
    if result.gain < -2 * result.standard_error:
        job.notify(
            Notice(
                f"{config.name} is worse than its base: held-out loss {result.base_loss:.4f} -> {result.loss:.4f}. Try a lower "
                f"learning rate than {job.learning_rate:g} (--learning-rate), or fewer steps."
            )
        )
    return adapter


def _create_run_folder(job: TrainingSetup, folder: Path) -> None:
    with atomic_io.atomic_folder(folder) as work:
        (work / MANIFEST_FILE).write_text(job.manifest.to_json(), encoding="utf-8")
        (work / RUN_FILE).write_text(config_to_yaml(job.config), encoding="utf-8")


def _write_adapter(job: TrainingSetup, library: Library, manifest: Manifest, history: list[dict[str, Any]]) -> Adapter:
    name = job.config.name
    assert name is not None
    try:
        with library.create(name, overwrite=job.config.overwrite, advice=_NAME_TAKEN_ADVICE) as work:
            save_adapter(job, lora.adapter_state_dict(job.model), manifest, work)
            plots.write_metrics(history, work / METRICS_FILE)
            plots.plot_loss(history, manifest, work / LOSS_PLOT_FILE)
            (work / CARD_FILE).write_text(model_card.model_card(load_adapter_folder(work), name), encoding="utf-8")
    except (OSError, AdapterError) as error:
        why = os_error_message(error) if isinstance(error, OSError) else error
        raise TrainingError(
            f"The adapter could not be written, and the run is kept. {why} Then: {trainer.resume_command(job.config)}"
        ) from error
    return library.get(name)
