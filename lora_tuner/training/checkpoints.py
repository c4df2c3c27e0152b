"""The files of an unfinished run: its checkpoints, and what must be unchanged to resume from them.

Trainer accepts a checkpoint that was interrupted while it was written. Here each checkpoint lists
the hash of every file in `whole.json`, written last, and is valid only with it.
"""

import json
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import atomic_io, distributed
from ..adapters import adapter
from ..adapters.manifest import Manifest
from ..adapters.samples import SAMPLES_FILE
from ..atomic_io import HASHES_FILE
from ..config import TrainConfig
from ..errors import AdapterError, ConfigError, EventHandler, Notice, TrainingError
from ..models.base_files import quiet_transformers
from ..settings_files import config_to_yaml
from ..text import PROGRAM, as_typed

if TYPE_CHECKING:
    import torch

    from ..data.rows import Source
    from ..data.streaming import StreamingDataset
    from .setup import TrainingSetup

KEPT_CHECKPOINTS = 2
PREFIX, STREAM_FILE = "checkpoint-", "stream.json"
RNG_PREFIX = "rng_state"  # each process has a file of its own
LIVE_FILES = (adapter.METRICS_FILE, SAMPLES_FILE)  # losses and samples so far
REQUIRED_FILES = {
    adapter.WEIGHTS_FILE, adapter.CONFIG_FILE, adapter.MANIFEST_FILE, adapter.RUN_FILE,
    "optimizer.pt", "scheduler.pt", "trainer_state.json",
}  # fmt: skip
RETRAIN_ADVICE = "Restore it, or train again with --overwrite."
# Settings that do not change the result.
NOT_DECISIVE = {
    "adapters_dir", "runs_dir", "report_to", "overwrite", "keep_checkpoints", "threads", "sample_prompt",
}  # fmt: skip


def resume_command(config: TrainConfig) -> str:
    """Return the command line that resumes a run."""
    option = (
        f" --runs-dir {shlex.quote(str(config.runs_dir))}" if config.runs_dir != TrainConfig().runs_dir else ""
    )
    return as_typed(f"{PROGRAM} train --resume {config.name}{option}")


def more_steps_advice(adapter_folder: Path, steps: str = "--max-steps N") -> str:
    """Return the sentence that says how to train further than the steps of a run."""
    name, file = adapter_folder.name, shlex.quote(str(adapter_folder / adapter.RUN_FILE))
    parent = name if adapter_folder.parent == TrainConfig().adapters_dir else shlex.quote(str(adapter_folder))
    return as_typed(
        "A run keeps its number of steps; a new adapter continues from the finished one: "
        f"{PROGRAM} train --config {file} --from {parent} --name {name}-2 {steps}"
    )


def is_run(folder: Path) -> bool:
    """Return whether a folder holds only files of a run, unfinished or with kept checkpoints."""
    names = {path.name for path in list_checkpoints(folder)} | {
        adapter.MANIFEST_FILE,
        adapter.RUN_FILE,
        *LIVE_FILES,
        "last-good",
    }
    return holds_only(names, folder)


def holds_only(names: set[str], folder: Path) -> bool:
    """Return whether a folder, not a link, has no other files than these and those of a killed process."""
    return (
        folder.is_dir()
        and not folder.is_symlink()
        and all(path.name in names or path.name.endswith(atomic_io.WORK_SUFFIX) for path in folder.iterdir())
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first."""
    named = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(named, key=step_of, reverse=True)


def prune_checkpoints(folder: Path) -> None:
    """Remove all but the newest checkpoints and those that hold their best step."""
    kept = list_checkpoints(folder)[:KEPT_CHECKPOINTS]
    needed = {path.name for path in kept} | {_best_checkpoint_name(path) for path in kept}
    for old in list_checkpoints(folder)[KEPT_CHECKPOINTS:]:
        if old.name not in needed:
            atomic_io.delete(old)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def latest_valid(folder: Path, notify: EventHandler) -> Path | None:
    """Return the newest checkpoint whose files are complete and unchanged, or None."""
    for path in list_checkpoints(folder):
        if not (why := _why_invalid(path)):
            return path
        notify(Notice(f"{path} is skipped: {why}."))
    notify(Notice(f"{folder} holds no valid checkpoint: the run starts from its first step."))
    return None


def _why_invalid(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint or with the one that holds its best step, or None."""
    if why := _why_damaged(checkpoint):
        return why
    best = _best_checkpoint_name(checkpoint)
    why = _why_damaged(checkpoint.with_name(best)) if best else None
    return f"its best step is in {best}, where {why}" if why else None


def _best_checkpoint_name(checkpoint: Path) -> str | None:
    """Return the name of the checkpoint with the best step, or None if there is none."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return Path(state["best_model_checkpoint"]).name if state["best_model_checkpoint"] else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _why_damaged(checkpoint: Path) -> str | None:
    """Return which file of a checkpoint is missing or changed, or None."""
    try:
        hashes = json.loads((checkpoint / HASHES_FILE).read_text(encoding="utf-8"))
        if missing := sorted(REQUIRED_FILES - hashes.keys()):
            return f"{missing[0]} is missing"
        if not any(name.startswith(RNG_PREFIX) for name in hashes):
            return f"{RNG_PREFIX}.pth is missing"
        for name, digest in hashes.items():
            if atomic_io.sha256_file(checkpoint / name) != digest:
                return f"{name} does not match its hash"
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return None if state["global_step"] == step_of(checkpoint) else f"it is of step {state['global_step']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        return f"it cannot be read ({error})"


def remove_newer_than(checkpoint: Path | None, folder: Path) -> None:
    """Remove the invalid checkpoints that are newer than the one to resume from."""
    for newer in list_checkpoints(folder):
        if checkpoint is None or step_of(newer) > step_of(checkpoint):
            atomic_io.delete(newer)


def finalize(checkpoint: Path) -> None:
    """Write the hash of each file, which makes the checkpoint valid."""
    for path in checkpoint.iterdir():
        atomic_io.fsync_path(path)
    atomic_io.write_hashes(checkpoint)
    atomic_io.fsync_path(checkpoint.parent)


def save_adapter(
    setup: "TrainingSetup", tensors: "dict[str, torch.Tensor]", manifest: Manifest, folder: Path
) -> None:
    """Write weights, config, manifest and run.yaml into a work folder."""
    from ..models import lora

    lora.save_adapter_files(tensors, setup.model.peft_config[lora.ADAPTER_NAME], folder)
    if setup.added is not None:
        with quiet_transformers():
            setup.added.tokenizer.save_pretrained(folder)
    manifest = manifest.model_copy(update={"weights": adapter.weights_info(adapter.load_adapter_folder(folder))})
    (folder / adapter.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    # A repeated run must not silently replace the adapter that it repeats.
    config = setup.config.model_copy(update={"overwrite": False})
    (folder / adapter.RUN_FILE).write_text(config_to_yaml(config), encoding="utf-8")


def check_can_be_saved(setup: "TrainingSetup") -> None:
    """Write the adapter before its first step, read it back, load it with PEFT, and compare.

    Takes the time of one save; the base is not copied.

    Raises:
        TrainingError: it would not come back as it is.
    """
    from ..models import lora

    tensors = lora.adapter_state_dict(setup.model)
    with atomic_io.temporary_folder(setup.config.runs_dir) as folder:
        try:
            save_adapter(setup, tensors, setup.manifest, folder)
            saved = adapter.load_adapter_folder(folder)
            if saved.tensors != {name: ("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}:
                raise AdapterError("its tensors have other names, shapes or dtypes in the file")
            if set(saved.modules) != lora.adapted_layers(setup.model):
                raise AdapterError("its layers have other names in the file")
            adapter.check_weights_hash(saved)
            lora.check_reload(setup.model, tensors, folder)
        except AdapterError as error:
            why = str(error).replace(f"{folder}/", "").replace(str(folder), "it").rstrip(".")
            raise TrainingError(
                f"An adapter of {setup.base.files.name} could not be saved, so nothing is trained: "
                f"{why}. Choose other --target-modules, or another --base."
            ) from error


# What a resumed run must have in common with the stopped one

Run = tuple[TrainConfig, Manifest]


def read_run_manifest(folder: Path) -> Manifest:
    """Read the manifest of a run or a checkpoint. Raises TrainingError when it is unreadable."""
    try:
        return adapter.read_manifest(folder)
    except AdapterError as error:
        raise TrainingError(f"{folder} cannot be resumed exactly: {error} {RETRAIN_ADVICE}") from error


def reproducibility_facts(manifest: Manifest) -> dict[str, str]:
    """Return what the result of a run depends on besides its configuration."""
    facts = {
        "base": manifest.base.fingerprint,
        "tokenizer": str(manifest.base.tokenizer),
        **manifest.versions,
    }
    if manifest.base.chat_template:
        facts["chat template"] = manifest.base.chat_template
    if data := manifest.data:
        facts |= {"data": data.hash, "held-out rows": str(data.held_out_hash)}
        if data.encoded_hash:
            facts["rows as tokens"] = data.encoded_hash
    if run := manifest.run:
        facts |= {
            "device": run.device,
            "dtype": run.dtype,
            "threads": str(run.threads),
            "kernels": str(run.kernels),
        }
    return facts


def comparable_facts(before: Manifest, after: Manifest) -> tuple[dict[str, str], dict[str, str]]:
    """Return the facts of both; with another number of processes threads and kernels may differ.

    Hashes of two schemas cannot be compared, and facts that were accepted as changed are not.
    """
    facts_before, facts_after = reproducibility_facts(before), reproducibility_facts(after)
    for name in inexact_facts(before, after):
        del facts_before[name], facts_after[name]
    if before.schema_version != after.schema_version:
        for name in ("base", "tokenizer", "chat template", "rows as tokens"):
            facts_before.pop(name, None)
            facts_after.pop(name, None)
    if before.run and after.run and before.run.processes != after.run.processes:
        for name in ("threads", "kernels"):
            facts_before.pop(name, None)
            facts_after.pop(name, None)
    return facts_before, facts_after


def check_acceptable(accept: Collection[str]) -> None:
    """Raise ConfigError for a fact that a resume needs unchanged."""
    if unknown := set(accept) - {"threads"}:
        raise ConfigError(f"accept: '{min(unknown)}' is no change that a resume accepts: give threads.")


def inexact_facts(*manifests: Manifest) -> list[str]:
    """Return the facts that may differ from those of the first step, as a resume has accepted (--accept)."""
    return sorted({name for manifest in manifests if manifest.run for name in manifest.run.inexact})


def check_unchanged(before: dict[str, str], after: dict[str, str], folder: Path) -> None:
    """Raise TrainingError when a fact has changed that would change the result."""
    changed = {
        name: f"{name} (was {before.get(name, 'none')[:12]}, is {fact[:12]})"
        for name, fact in after.items()
        if before.get(name) != fact
    }
    if changed:
        advice = RETRAIN_ADVICE
        if set(changed) == {"threads"}:
            advice = (
                f"Resume with --threads {before['threads']}; or with --accept threads, and the manifest says that the "
                "result is no longer exact."
            )
        raise TrainingError(
            f"{folder} cannot be resumed exactly: changed since it stopped: {', '.join(changed.values())}. {advice}"
        )


def for_world_size(saved: TrainConfig, manifest: Manifest, notify: EventHandler) -> TrainConfig:
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
            f"The run was started with {before} {'processes' if before > 1 else 'process'} and "
            f"resumes with {now}: --gradient-accumulation is {accumulation} instead of "
            f"{saved.gradient_accumulation}, so that each step has the same sequences. Rounding "
            "and dropout differ."
        )
    )
    return saved.model_copy(update={"gradient_accumulation": accumulation})


def check_stream(setup: "TrainingSetup", checkpoint: Path) -> None:
    """Raise TrainingError when rows have changed that the stream of a checkpoint has passed."""
    from ..data.rows import Source

    stream = open_stream(
        setup, checkpoint, [Source(source.name, weight=source.weight) for source in setup.dataset.sources]
    )
    if not stream.knows_passed_rows():
        setup.notify(
            Notice(f"{checkpoint} is of an older version: the rows that its stream has passed are not compared.")
        )
        return
    setup.notify(Notice("The rows that the stream has passed are read again: they must be unchanged."))
    if stream.has_changed():
        raise TrainingError(
            f"{checkpoint} cannot be resumed exactly: rows of {setup.dataset.name} that it was "
            f"trained on have changed since it stopped. {RETRAIN_ADVICE}"
        )


def open_stream(
    setup: "TrainingSetup", checkpoint: Path | None, sources: "Sequence[Source]"
) -> "StreamingDataset":
    """Open the stream at its beginning, or where it was when the checkpoint was written.

    Args:
        sources: their counts are updated as rows are read.
    """
    from ..data.streaming import StreamingDataset, StreamState

    saved = json.loads((checkpoint / STREAM_FILE).read_text(encoding="utf-8")) if checkpoint else []
    states = [StreamState(**state) for state in ([saved] if isinstance(saved, dict) else saved)]
    hashes, compared = setup.dataset.eval_hashes, [row.text for row in setup.dataset.compared]
    return StreamingDataset(setup.config, setup.base.tokenizer, hashes, sources, states, compared)


def check_settings(now: Run, before: Run, folder: Path, checkpoint: Path) -> None:
    """Raise TrainingError when the checkpoint was made with other settings than the run."""
    if changed := _changed_settings(now, before):
        text = ", ".join(f"{name} (was {old}, is {new})" for name, (old, new) in changed.items())
        advice = RETRAIN_ADVICE
        if "max_steps" in changed:
            config = now[0]
            advice += f" {more_steps_advice(config.adapters_dir / str(config.name))}"
        raise TrainingError(f"{folder / adapter.RUN_FILE} differs from that of {checkpoint}: {text}. {advice}")


def same_run(one: Run, other: Run) -> bool:
    """Return whether two runs must have the same result, as trials of the same sweep if of any."""
    facts, other_facts = comparable_facts(one[1], other[1])
    return sweep_id(one[1]) == sweep_id(other[1]) and facts == other_facts and not _changed_settings(one, other)


def sweep_id(manifest: Manifest) -> str | None:
    """Return the id of the sweep whose trial a run or an adapter is."""
    return manifest.run.sweep if manifest.run else None


def _changed_settings(now: Run, before: Run) -> dict[str, tuple[object, object]]:
    """Return the settings that change the result and differ: name -> (before, now)."""
    settings, old_settings = _decisive_settings(*now), _decisive_settings(*before)
    return {name: (old_settings[name], value) for name, value in settings.items() if old_settings[name] != value}


def _decisive_settings(config: TrainConfig, manifest: Manifest) -> dict[str, object]:
    """Return the settings that change the result, as one process needs them."""
    settings = {name: getattr(config, name) for name in TrainConfig.model_fields if name not in NOT_DECISIVE}
    settings["gradient_accumulation"] *= manifest.run.processes if manifest.run else 1
    return settings
