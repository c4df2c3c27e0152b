"""Train an adapter from a configuration into the library, resume a stopped run, or estimate one.

A run in progress lives in `runs/NAME`: `run.yaml`, `manifest.json` and checkpoints. The adapter
appears in the library when the run has finished, and the folder is removed. A run is resumed only
if nothing has changed that would change its result.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

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
from ..config import TrainConfig, config_to_yaml, resolve_settings
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
from . import arguments, checkpoints, profiling, trainer
from .checkpoints import RETRAIN_ADVICE, save_adapter
from .inputs import dtype_name
from .profiling import RunEstimate
from .setup import TrainingSetup, adapter_name, prepare_training

SWEEP_RESULT_FILE = "sweep.json"
_NAME_TAKEN_ADVICE = "rename or remove that one first (`adapters rename`, `adapters remove`)"

Prepare = Callable[[TrainConfig, EventHandler], TrainingSetup]


def train(
    requested: TrainConfig, notify: EventHandler = ignore_events, prepare: Prepare = prepare_training
) -> Adapter:
    """Train an adapter and store it in the library.

    Args:
        prepare: a sweep passes its own, which reuses the base and the data.

    Raises:
        LoraTunerError: the request is wrong (before training starts), or training failed.
        Interrupted: the run was stopped by a signal, with a checkpoint to resume from.
    """
    name = adapter_name(requested)
    notify = _join_processes(requested, notify)
    distributed.run_on_rank_zero(partial(check_places, requested))
    with run_lock(requested.runs_dir, name):
        library = distributed.run_on_rank_zero(partial(check_output_paths, requested))
        arguments.check_trackers(requested)
        setup = prepare(requested, notify)
        distributed.run_on_rank_zero(partial(check_disk_space, setup))
        epoch = f"; one epoch is {setup.steps_per_epoch:,}" if setup.steps_per_epoch else ""
        notify(Notice(f"The run takes {setup.config.max_steps:,} steps{epoch}."))
        return _train_and_write(setup, library, checkpoint=None)


def resume(
    name: str,
    runs_dir: Path = Path("runs"),
    notify: EventHandler = ignore_events,
    prepare: Prepare = prepare_training,
) -> Adapter:
    """Continue the run in `runs_dir/name` from its latest valid checkpoint, bitwise.

    Raises:
        TrainingError: there is nothing to resume, or data, base, threads or library versions changed.
    """
    folder = runs_dir / validate_name(name)
    if not (folder / RUN_FILE).is_file():
        raise _nothing_to_resume(folder)
    saved = resolve_settings(TrainConfig, {"runs_dir": runs_dir}, folder / RUN_FILE)
    notify = _join_processes(saved, notify)
    distributed.run_on_rank_zero(partial(check_places, saved, resuming=True))
    with run_lock(runs_dir, name):
        checkpoint, manifests = distributed.run_on_rank_zero(partial(_load_stopped_run, saved, folder, notify))
        library = distributed.run_on_rank_zero(partial(check_output_paths, saved, resuming=True))
        arguments.check_trackers(saved)
        setup = prepare(_for_world_size(saved, manifests[folder], notify), notify)
        setup = replace(setup, sweep=checkpoints.sweep_id(manifests[folder]))
        for path, manifest in manifests.items():
            now = setup.manifest_of_schema(manifest.schema_version)
            checkpoints.check_unchanged(*checkpoints.comparable_facts(manifest, now), path)
        if manifests[folder].schema_version == 1:
            notify(
                Notice(
                    f"{folder} was begun by an older version, which recorded less: of its base the weights, some settings "
                    "and the vocabulary were compared, and its rows as text."
                )
            )
        if checkpoint is not None and setup.config.streaming:
            distributed.run_on_rank_zero(partial(checkpoints.check_stream, setup, checkpoint))
        distributed.run_on_rank_zero(partial(check_disk_space, setup))
        return _train_and_write(setup, library, checkpoint)


def plan(requested: TrainConfig, notify: EventHandler = ignore_events) -> RunEstimate:
    """Estimate the cost of a run from a few real steps. Writes nothing."""
    notify = _join_processes(requested, notify)
    setup = prepare_training(requested, notify)
    config, steps = setup.config, setup.max_steps
    profile = setup.profile or profiling.profile_steps(
        setup, setup.model, setup.learning_rate, config.max_grad_norm, notify
    )
    trained, frozen = lora.count_parameters(setup.model)
    measurements = 2 + steps // (config.eval_every or steps + 1)
    return RunEstimate(
        steps=steps,
        steps_per_epoch=setup.steps_per_epoch,
        seconds_per_step=profile.seconds_per_step,
        training_seconds=steps * profile.seconds_per_step,
        held_out_seconds=profile.seconds_per_held_out_token * sum(map(len, setup.held_out)) * measurements,
        peak_memory_bytes=profile.peak_memory_bytes,
        tokens_per_second=profile.tokens_per_second,
        used_share=setup.text_use.share,
        trained_parameters=trained,
        base_parameters=frozen,
        adapter_bytes=trained * 4,
        dtype=dtype_name(setup.base.dtype),
        load_in=setup.base.load_in,
        gradient_checkpointing=config.gradient_checkpointing == "on",
    )


def _load_stopped_run(
    saved: TrainConfig, folder: Path, notify: EventHandler
) -> tuple[Path | None, dict[Path, Manifest]]:
    """Find the checkpoint to resume from, and check that it belongs to the run with these settings.

    Returns:
        The checkpoint, or None to start from the first step; the manifests of the run and the
        checkpoint by folder.
    """
    if not (folder / RUN_FILE).is_file():  # the run finished before this process got the lock
        raise _nothing_to_resume(folder)
    if saved.name != folder.name or saved.max_steps is None:
        raise TrainingError(
            f"{folder / RUN_FILE} was changed: its name is {saved.name}, its max_steps {saved.max_steps}. "
            f" {RETRAIN_ADVICE}"
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


def _for_world_size(saved: TrainConfig, manifest: Manifest, notify: EventHandler) -> TrainConfig:
    """Return the settings with which this number of processes takes the same steps."""
    before, now = manifest.run.processes if manifest.run else 1, distributed.world_size()
    if before == now:
        return saved
    batches = saved.gradient_accumulation * before
    accumulation, rest = divmod(batches, now)
    if rest:
        fit = " or ".join(str(number) for number in range(1, batches + 1) if batches % number == 0)
        raise distributed.share_error(
            TrainingError(
                f"A step of {saved.name} has {batches} batches, which {now} processes cannot share "
                f"evenly: resume with {fit}."
            )
        )
    notify(
        Notice(
            f"The run was started with {before} {'processes' if before > 1 else 'process'} and resumes with {now}: "
            f"--gradient-accumulation is {accumulation} instead of {saved.gradient_accumulation}, so that each step has the "
            "same sequences. Rounding and dropout differ."
        )
    )
    return saved.model_copy(update={"gradient_accumulation": accumulation})


def _join_processes(requested: TrainConfig, notify: EventHandler) -> EventHandler:
    """Form the process group that was launched, if any. Returns `notify` for rank zero only."""
    fsdp.read_settings(requested.device)
    distributed.init_process_group(requested.device)
    return notify if distributed.rank() == 0 else ignore_events


def run_folder(config: TrainConfig) -> Path:
    return config.runs_dir / adapter_name(config)


def sweep_folder(runs_dir: Path, name: str) -> Path:
    return runs_dir / f"{name}.sweep"  # names of adapters have no dot


@contextlib.contextmanager
def run_lock(runs_dir: Path, name: str) -> Iterator[None]:
    """Hold the lock of a run or sweep: only one of a name trains at a time."""
    if distributed.rank() > 0:
        yield
        return
    path = runs_dir / f".{name}.lock{atomic_io.WORK_SUFFIX}"  # an abandoned one is removed
    lock = FileLock(path, timeout=0)
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
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not delete an open file
            path.unlink()  # before the release: the next process creates a new one
        lock.release()


def check_places(config: TrainConfig, *, resuming: bool = False) -> None:
    """Raise TrainingError when adapter, run, cache and inputs would be written over each other.

    Nothing is loaded or written, and links and the rules of the disk for names are followed.
    """
    name = adapter_name(config)
    adapter, folder, cache = config.adapters_dir / name, run_folder(config), atomic_io.cache_dir()
    if name.casefold() == "tensorboard":
        raise TrainingError(f"{folder} is for the logs of --report-to tensorboard: choose another --name.")
    if atomic_io.contains(adapter, folder) or atomic_io.contains(folder, adapter):
        advice = (
            f"move {folder} elsewhere, and add its new --runs-dir" if resuming else "choose another --runs-dir"
        )
        raise TrainingError(
            f"The adapter {adapter} and its run {folder} would be one folder, or one in the other: {advice}."
        )
    inputs = [config.dataset, config.base, config.other_eval_dataset, config.parent]
    sources = [Path(os.path.expanduser(name)) for name in inputs if name is not None]
    if config.parent is not None and os.path.isdir(config.adapters_dir / config.parent):
        sources[-1] = config.adapters_dir / config.parent
    for path, option in ((adapter, "--adapters-dir"), (folder, "--runs-dir")):
        if atomic_io.contains(path, cache) or atomic_io.contains(cache, path):
            raise TrainingError(f"{path} would be in the cache ({cache}), or hold it: choose another {option}.")
        for source in filter(os.path.exists, sources):
            # An adapter may replace its parent, which is in memory then.
            is_parent = path is adapter and config.parent is not None and source is sources[-1]
            if atomic_io.contains(path, source) and not (is_parent and atomic_io.contains(source, path)):
                raise TrainingError(
                    f"{path} would replace {source}, which it is made from: choose another --name."
                )


def check_output_paths(config: TrainConfig, *, resuming: bool = False) -> Library:
    """Return the library, or raise when the name or the folder of the run is taken."""
    check_places(config, resuming=resuming)
    name = adapter_name(config)
    library, folder = Library(config.adapters_dir), run_folder(config)
    library.check_name_free(name, overwrite=config.overwrite, advice=_NAME_TAKEN_ADVICE if resuming else None)
    if resuming or not os.path.lexists(folder):
        return library
    if config.runs_dir.resolve() == config.adapters_dir.resolve() or not checkpoints.is_run(folder):
        raise TrainingError(f"{folder} is not a run, so it is not replaced: choose another --runs-dir or --name.")
    if (folder / RUN_FILE).is_file() and not config.overwrite:
        raise TrainingError(
            f"{folder} holds an unfinished run: resume it with --resume {name}, discard it with --overwrite, or "
            "choose another --name."
        )
    if any(folder.iterdir()) and not config.overwrite:
        raise TrainingError(
            f"{folder} holds the checkpoints of a finished run: discard them with --overwrite, or choose another --name."
        )
    return library


def _nothing_to_resume(folder: Path) -> TrainingError:
    """Make the error that says why a folder holds no run that can be resumed."""
    library = Library(TrainConfig().adapters_dir)
    why = "it has finished (into another --adapters-dir?), or never started"
    if folder.name in library.names():
        why = f"it has finished, as {library.path / folder.name}"
    elif (sweep_result := sweep_folder(folder.parent, folder.name) / SWEEP_RESULT_FILE).is_file():
        why = f"its sweep has finished, with the result {sweep_result}"
    elif copies := sorted(folder.glob(f"*/{RUN_FILE}")):
        why = f"it has finished, or {folder / RUN_FILE} was removed; {copies[0]} is a copy of it"
    return TrainingError(f"There is no unfinished run {folder}: {why}. Train without --resume.")


def _check_not_finished(saved: TrainConfig, folder: Path) -> None:
    """Raise TrainingError when the run has written its adapter but not removed its folder."""
    with contextlib.suppress(AdapterError, ConfigError):
        adapter = load_adapter_folder(saved.adapters_dir / str(saved.name))
        if adapter.manifest is None:
            return
        finished = resolve_settings(TrainConfig, {}, adapter.path / RUN_FILE), adapter.manifest
        # A damaged adapter is trained again.
        if checkpoints.same_run((saved, read_manifest(folder)), finished) and not verify_adapter(adapter):
            remove_run_folder(saved, folder, ignore_events)
            raise TrainingError(f"The run {saved.name} has finished: its adapter is {adapter.path}.")


def remove_run_folder(config: TrainConfig, folder: Path, notify: EventHandler) -> None:
    """Remove the folder of a finished run, or with `keep_checkpoints` its run.yaml."""
    try:
        if config.keep_checkpoints:
            (folder / RUN_FILE).unlink()
        else:
            atomic_io.delete_atomically(folder)
    except OSError as error:
        notify(Notice(f"The adapter is written, but {folder} could not be removed. {os_error_message(error)}"))


def check_disk_space(setup: TrainingSetup) -> None:
    """Raise TrainingError when the disk cannot hold the checkpoints, or the adapter."""
    config = setup.config
    size = lora.count_parameters(setup.model)[0] * 4
    used = sum(path.stat().st_size for path in run_folder(config).rglob("*") if path.is_file())
    kept = (checkpoints.KEPT_CHECKPOINTS + 1) * 3 * size - used  # AdamW has two states per weight
    for folder, need in {config.runs_dir: kept, config.adapters_dir: size}.items():
        if (free := atomic_io.free_space(folder)) < need:
            raise TrainingError(
                f"{folder} has {free / 1e6:,.0f} MB free, and the run needs {need / 1e6:,.0f} MB: free some space, or "
                "choose another --runs-dir and --adapters-dir."
            )


def _train_and_write(setup: TrainingSetup, library: Library, checkpoint: Path | None) -> Adapter:
    """Measure the base, train, measure again, and write the adapter."""
    config, folder = setup.config, run_folder(setup.config)
    data, run = setup.manifest.data, setup.manifest.run
    assert data is not None
    assert run is not None
    distributed.run_on_rank_zero(partial(checkpoints.check_can_be_saved, setup))
    with setup.model.disable_adapter():
        base_held_out = evaluation.measure_base_loss(setup.base, setup.held_out, setup.notify)
    distributed.run_on_rank_zero(partial(evaluation.cache_rows, setup.held_out_texts))
    if checkpoint is None:
        distributed.run_on_rank_zero(partial(_create_run_folder, setup, folder))
    try:
        with trainer.explain_how_to_finish(setup, folder):
            state, history, held_out = trainer.run_trainer(setup, folder, checkpoint)
            steps = [entry for entry in history if "loss" in entry]
            trained = {
                "steps": state.global_step,
                "kept_step": state.best_global_step or state.global_step,
                "tokens": sum(entry["tokens"] for entry in steps),
                "seconds": round(sum(entry["seconds"] for entry in steps), 3),
            }
            if config.streaming:
                trained["sequences"] = state.global_step * setup.sequences_per_step
                data = data.model_copy(update={"counts": asdict(setup.dataset.counts)})
            result = evaluation.paired_gain(base_held_out, held_out)
            manifest = setup.manifest.model_copy(
                update={
                    "created": utc_timestamp(),
                    "data": data,
                    "run": run.model_copy(update=trained),
                    "result": result,
                }
            )
            adapter = distributed.run_on_rank_zero(partial(_write_adapter, setup, library, manifest, history))
            evaluation.cache_adapter_loss(setup.base, setup.held_out, adapter, held_out)
            distributed.run_on_rank_zero(partial(remove_run_folder, config, folder, setup.notify))
    except KeyboardInterrupt as error:
        raise Interrupted(f"Stopped immediately. Resume with: {trainer.resume_command(config)}") from error
    if result.gain < -2 * (result.standard_error or 0.0):
        setup.notify(
            Notice(
                f"{config.name} is worse than its base: held-out loss {result.base_loss:.4f} -> {result.loss:.4f}. Try a lower "
                f"learning rate than {setup.learning_rate:g} (--learning-rate), or fewer steps."
            )
        )
    return adapter


def _create_run_folder(setup: TrainingSetup, folder: Path) -> None:
    with atomic_io.atomic_folder(folder) as work:
        (work / MANIFEST_FILE).write_text(setup.manifest.to_json(), encoding="utf-8")
        (work / RUN_FILE).write_text(config_to_yaml(setup.config), encoding="utf-8")


def _write_adapter(
    setup: TrainingSetup, library: Library, manifest: Manifest, history: list[dict[str, float]]
) -> Adapter:
    """Write the adapter with its curve, plot and model card into the library."""
    name = adapter_name(setup.config)
    with library.create(name, overwrite=setup.config.overwrite, advice=_NAME_TAKEN_ADVICE) as work:
        save_adapter(setup, lora.adapter_state_dict(setup.model), manifest, work)
        plots.write_metrics(history, work / METRICS_FILE)
        plots.plot_loss(history, manifest, work / LOSS_PLOT_FILE)
        (work / CARD_FILE).write_text(model_card.model_card(load_adapter_folder(work), name), encoding="utf-8")
    return library.get(name)
