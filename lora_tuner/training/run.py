"""Train an adapter from a configuration into the library, resume a stopped run, or estimate one.

A run in progress lives in `runs/NAME`: `run.yaml`, `manifest.json` and checkpoints. The adapter
appears in the library when the run has finished, and the folder is removed. A run is resumed only
if nothing has changed that would change its result.
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from .. import atomic_io, distributed
from ..adapters import model_card, plots
from ..adapters.adapter import (
    CARD_FILE,
    CONFUSION_FILE,
    LOSS_PLOT_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RUN_FILE,
    Adapter,
    load_adapter_folder,
    validate_name,
)
from ..adapters.gains import paired_gain
from ..adapters.library import Library, adapter_name
from ..adapters.manifest import Manifest, utc_timestamp
from ..adapters.samples import SAMPLES_FILE, Sample, write_samples
from ..config import TrainConfig
from ..data import eval_sets
from ..data.prompts import held_out_prompts
from ..errors import (
    EventHandler,
    Interrupted,
    Notice,
    TrainingError,
    ignore_events,
)
from ..evaluation import held_out_loss
from ..models import fsdp, lora
from ..settings_files import config_to_yaml, resolve_settings
from . import (
    arguments,
    checkpoints,
    loss_result,
    paths,
    preference_result,
    profiling,
    rate_probe,
    reference,
    trainer,
)
from .advice import describe_length, passes_advice, rate_advice
from .checkpoints import save_adapter
from .inputs import dtype_name
from .profiling import RunEstimate
from .progress import closing, display
from .samples import RunSamples
from .setup import TrainingSetup, prepare_training
from .unfinished import load_stopped_run, nothing_to_resume

History = list[dict[str, float]]
Prepare = Callable[[TrainConfig, EventHandler], TrainingSetup]


def train(
    requested: TrainConfig, notify: EventHandler | None = display, prepare: Prepare = prepare_training
) -> Adapter:
    """Train an adapter and store it in the library.

    Examples:
        >>> train(TrainConfig(dataset="reviews.csv", name="noir", max_steps=20), notify=None).name
        'noir'

    Args:
        notify: receives Notice and Progress events, which are shown on stderr by default; None ignores them.
        prepare: a sweep passes its own, which reuses the base and the data.

    Raises:
        LoraTunerError: the request is wrong (before training starts), or training failed.
        Interrupted: the run was stopped by a signal, with a checkpoint to resume from.
    """
    name = adapter_name(requested)
    notify = _join_processes(requested, notify)
    distributed.run_on_rank_zero(partial(paths.check_places, requested))
    with closing(notify), paths.run_lock(requested.runs_dir, name):
        library = distributed.run_on_rank_zero(partial(paths.check_output_paths, requested))
        arguments.check_trackers(requested)
        setup = prepare(requested, notify)
        distributed.run_on_rank_zero(partial(paths.check_disk_space, setup))
        notify(Notice(describe_length(requested, setup.max_steps, setup.steps_per_epoch)))
        return _train_and_write(setup, library, checkpoint=None)


def resume(
    name: str,
    runs_dir: Path = Path("runs"),
    notify: EventHandler | None = display,
    prepare: Prepare = prepare_training,
    *,
    threads: int | None = None,
    accept: Collection[str] = (),
) -> Adapter:
    """Continue the run in `runs_dir/name` from its latest valid checkpoint, bitwise.

    Args:
        threads: number of threads from now on, in place of the saved setting.
        accept: `threads` accepts that their number has changed. The manifest then lists it as
            `inexact`: rounding differs from that of an uninterrupted run.

    Raises:
        TrainingError: there is nothing to resume, or data, base, threads or library versions changed.
    """
    checkpoints.check_acceptable(accept)
    folder = runs_dir / validate_name(name)
    if not (folder / RUN_FILE).is_file():
        raise nothing_to_resume(folder)
    changes: dict[str, object] = {"runs_dir": runs_dir}
    if threads is not None:
        changes["threads"] = threads
    saved = resolve_settings(TrainConfig, changes, folder / RUN_FILE)
    notify = _join_processes(saved, notify)
    distributed.run_on_rank_zero(partial(paths.check_places, saved, resuming=True))
    with closing(notify), paths.run_lock(runs_dir, name):
        checkpoint, manifests = distributed.run_on_rank_zero(partial(load_stopped_run, saved, folder, notify))
        library = distributed.run_on_rank_zero(partial(paths.check_output_paths, saved, resuming=True))
        arguments.check_trackers(saved)
        setup = prepare(checkpoints.for_world_size(saved, manifests[folder], notify), notify)
        begun = manifests[folder].run
        if begun and not begun.curve_rows and setup.curve:  # as an older version began it
            older = profiling.plan_curve(setup, setup.max_steps, is_short_allowed=False)
            setup = replace(setup, curve=older)
        setup = replace(
            setup,
            sweep=begun.sweep if begun else None,
            probe=begun.probe if begun else None,
            inexact=_inexact_facts(manifests.values(), setup, accept),
        )
        for path, manifest in manifests.items():
            now = setup.manifest_of_schema(manifest.schema_version)
            checkpoints.check_unchanged(*checkpoints.comparable_facts(manifest, now), path)
        if manifests[folder].schema_version == 1:
            notify(
                Notice(
                    f"{folder} was begun by an older version, which recorded less: of its base the "
                    "weights, some settings and the vocabulary were compared, and its rows as "
                    "text."
                )
            )
        if checkpoint and set(load_adapter_folder(checkpoint).modules) != lora.adapted_layers(setup.model):
            raise TrainingError(
                f"{checkpoint} adapts other layers than this version does for target_modules "
                f"{setup.config.target_modules}: train again with --overwrite."
            )
        if checkpoint is not None and setup.config.streaming:
            distributed.run_on_rank_zero(partial(checkpoints.check_stream, setup, checkpoint))
        distributed.run_on_rank_zero(partial(paths.check_disk_space, setup))
        if threads is not None:  # the next resume has them too
            text = config_to_yaml(saved)
            distributed.run_on_rank_zero(partial(atomic_io.atomic_write_text, folder / RUN_FILE, text))
        return _train_and_write(setup, library, checkpoint)


def plan(requested: TrainConfig, notify: EventHandler | None = display) -> RunEstimate:
    """Estimate the cost of a run from a few real steps. Writes nothing.

    Examples:
        >>> plan(TrainConfig(dataset="reviews.csv", max_steps=20), notify=None).steps
        20
    """
    notify = _join_processes(requested, notify)
    with closing(notify):
        setup = prepare_training(requested, notify)
        config, steps = setup.config, setup.max_steps
        profile = setup.profile or profiling.profile_steps(
            setup, setup.model, setup.learning_rate, config.max_grad_norm, notify
        )
    trained, frozen = lora.count_parameters(setup.model)
    lengths = [len(row) for row in setup.held_out]
    held_out_tokens = sum(lengths) * (2 + steps // (config.eval_every or steps + 1))
    held_out_tokens += 2 * sum(map(len, setup.rejected))
    if setup.dataset.labels:  # base and adapter read the rows for their labels, and some to calibrate these
        held_out_tokens += 5 * sum(lengths) // 2
    reference_tokens = reference.count_tokens(setup)
    if curve := setup.curve:
        held_out_tokens += sum(lengths[row] for row in curve.rows) * math.ceil(steps / curve.every)
    return RunEstimate(
        steps=steps,
        steps_per_epoch=setup.steps_per_epoch,
        advice=passes_advice(requested, steps, setup.steps_per_epoch),
        seconds_per_step=profile.seconds_per_step,
        training_seconds=steps * profile.seconds_per_step,
        learning_rate=setup.learning_rate,
        learning_rate_origin=setup.learning_rate_origin,
        probe_steps=setup.probe_plan.cost if setup.probe_plan else 0,
        probe_seconds=setup.probe_plan.seconds if setup.probe_plan else 0.0,
        reference_seconds=profile.seconds_per_held_out_token * reference_tokens,
        held_out_seconds=profile.seconds_per_held_out_token * held_out_tokens,
        peak_memory_bytes=profile.peak_memory_bytes,
        tokens_per_second=profile.tokens_per_second,
        used_share=setup.text_use.share,
        truncated_rows=setup.text_use.truncated_rows,
        coverage=setup.targets.coverage,
        not_adapted=setup.targets.not_adapted,
        trained_parameters=trained,
        base_parameters=frozen,
        adapter_bytes=trained * 4,
        dtype=dtype_name(setup.base.dtype),
        load_in=setup.base.load_in,
        gradient_checkpointing=config.gradient_checkpointing == "on",
    )


def _inexact_facts(before: Iterable[Manifest], setup: TrainingSetup, accept: Collection[str]) -> tuple[str, ...]:
    """Return the facts that differ from those of the first step, as this resume or one before accepts."""
    manifests = [*before]
    facts = set(checkpoints.inexact_facts(*manifests))
    now = checkpoints.reproducibility_facts(setup.manifest)
    for name in accept:
        if any(checkpoints.reproducibility_facts(manifest).get(name) != now[name] for manifest in manifests):
            facts.add(name)
    return tuple(sorted(facts))


def _join_processes(requested: TrainConfig, notify: EventHandler | None) -> EventHandler:
    """Form the process group that was launched, if any. Returns `notify` for rank zero only."""
    fsdp.read_settings(requested.device)
    distributed.init_process_group(requested.device)
    return notify if notify and distributed.rank() == 0 else ignore_events


def _train_and_write(setup: TrainingSetup, library: Library, checkpoint: Path | None) -> Adapter:
    """Train, measure base and adapter, and write the adapter."""
    samples = RunSamples(setup)
    loss_result.check_base(setup)
    distributed.run_on_rank_zero(partial(checkpoints.check_can_be_saved, setup))
    setup = reference.with_reference(setup)  # before a checkpoint is loaded
    before = preference_result.measure_before(setup)
    if setup.probe_plan is not None:
        try:
            setup = rate_probe.choose_learning_rate(setup, setup.probe_plan)
        except KeyboardInterrupt as error:
            raise Interrupted(
                "Stopped while learning rates were tried: nothing is saved, so start the run again."
            ) from error
    config, folder = setup.config, paths.run_folder(setup.config)
    data, run = setup.manifest.data, setup.manifest.run
    assert data is not None
    assert run is not None
    distributed.run_on_rank_zero(partial(eval_sets.cache_rows, setup.eval_set(str(config.name))))
    if checkpoint is None:
        distributed.run_on_rank_zero(partial(_create_run_folder, setup, folder))
        if curve := setup.curve:
            rows = f"{len(curve.rows)} of {len(setup.held_out):,} rows"
            setup.notify(Notice(f"Every {curve.every:,} steps: held-out loss on a fixed subset, {rows}."))
    else:
        setup.notify(Notice(f"Resuming after {checkpoint.name.replace('checkpoint-', 'step ')}."))
    try:
        with trainer.explain_how_to_finish(setup, folder):
            live = arguments.LiveLog(folder, setup.notify)
            state, history, losses = trainer.run_trainer(setup, folder, checkpoint, samples, live)
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
            result = paired_gain(*losses)
            if result.rows < len(setup.held_out):
                result = result.model_copy(update={"of_rows": len(setup.held_out)})
            preference, rejected = None, None
            if setup.objective is not None:
                after = preference_result.measure_after(setup, before, losses)
                preference, change, rejected = after
                advice = preference_result.preference_advice(preference, change, setup.learning_rate)
            else:
                advice = rate_advice(
                    history, result, setup.learning_rate, setup.method, setup.steps_per_epoch, setup.parent_loss
                )
            sources = [
                source.model_copy(update={"result": setup.paired_gain_on(number, *losses)})
                for number, source in enumerate(setup.source_infos())
            ]
            manifest = setup.manifest.model_copy(
                update={
                    "created": utc_timestamp(),
                    "data": data.model_copy(update={"sources": sources}),
                    "run": run.model_copy(update={**trained, "advice": advice}),
                    "result": result,
                    "preference": preference,
                    **loss_result.measured_fields(setup, int(trained["tokens"]), losses),
                }
            )
            texts = distributed.run_on_rank_zero(partial(samples.finish, state, int(trained["kept_step"])))
            write = partial(_write_adapter, setup, library, manifest, history, texts)
            adapter = distributed.run_on_rank_zero(write)
            measured = setup.held_out[: result.rows]
            held_out_loss.cache_adapter_loss(setup.base, measured, adapter, losses[1])
            if rejected is not None:
                held_out_loss.cache_adapter_loss(setup.base, setup.rejected, adapter, rejected)
            distributed.run_on_rank_zero(partial(paths.remove_run_folder, config, folder, setup.notify))
    except KeyboardInterrupt as error:
        raise Interrupted(f"Stopped immediately. Resume with: {checkpoints.resume_command(config)}") from error
    if advice:
        setup.notify(Notice(advice))
    return adapter


def _create_run_folder(setup: TrainingSetup, folder: Path) -> None:
    with atomic_io.atomic_folder(folder) as work:
        (work / MANIFEST_FILE).write_text(setup.manifest.to_json(), encoding="utf-8")
        (work / RUN_FILE).write_text(config_to_yaml(setup.config), encoding="utf-8")


def _write_adapter(
    setup: TrainingSetup, library: Library, manifest: Manifest, history: History, samples: list[Sample]
) -> Adapter:
    """Write the adapter with its curve, plot, samples and model card into the library."""
    name = adapter_name(setup.config)
    prompts = held_out_prompts(setup.measured_texts, conversations=manifest.is_chat)
    with library.create(name, overwrite=setup.config.overwrite, advice=paths.NAME_TAKEN_ADVICE) as work:
        save_adapter(setup, lora.adapter_state_dict(setup.model), manifest, work)
        plots.write_metrics(history, work / METRICS_FILE)
        plots.plot_loss(history, manifest, work / LOSS_PLOT_FILE)
        plots.plot_labels(manifest, work / CONFUSION_FILE)
        if samples:
            write_samples(samples, work / SAMPLES_FILE)
        card = model_card.model_card(load_adapter_folder(work), name, prompts)
        (work / CARD_FILE).write_text(card, encoding="utf-8")
    return library.get(name)
