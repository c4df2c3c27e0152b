"""Trainer's arguments, learning-rate schedule, data order, trackers, live log, and watch of threads and signals."""

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_available_reporting_integrations,
)

from .. import atomic_io, distributed
from ..adapters.samples import COLUMNS, Sample, samples_table
from ..config import TrainConfig
from ..errors import ConfigError, EventHandler, Notice, TrainingError, os_error_message
from ..models import threads
from .checkpoints import LIVE_FILES, resume_command
from .live import LogEntry
from .setup import TrainingSetup

LOSSES = {"loss", "eval_loss", "eval_subset_loss"}
LOOK_SECONDS = 60.0  # between two looks at how busy the machine is


def training_arguments(setup: TrainingSetup, folder: Path) -> TrainingArguments:
    """Make the arguments for a run with its checkpoints in `folder`."""
    config, device = setup.config, setup.base.device
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # the base decides on the dtype
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=setup.max_steps,
        ignore_data_skip=config.streaming,  # a stream resumes by itself
        accelerator_config={"dispatch_batches": False},  # each process reads its own batches
        per_device_train_batch_size=setup.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=setup.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        eval_strategy="steps" if setup.eval_every else "no",
        eval_steps=setup.eval_every,
        # The best step can be kept only where a checkpoint was saved.
        save_steps=config.eval_every if config.patience and config.eval_every else config.save_every,
        load_best_model_at_end=config.patience is not None,
        metric_for_best_model="eval_loss" if config.patience else None,
        greater_is_better=False if config.patience else None,
        restore_callback_states_from_checkpoint=config.patience is not None,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it logs a NaN loss as 0
        average_tokens_across_devices=True,  # else each process divides by its own predictions
        ddp_find_unused_parameters=False,  # each step uses all of them
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        report_to=[tracker for tracker in config.report_to if tracker != "tensorboard"],
        run_name=config.name,
    )
    # By itself Trainer takes the first GPU, or all of them by DataParallel; and with several
    # processes on a CPU each copies the base to a device of its own.
    arguments._n_gpu = min(1, arguments.n_gpu)
    arguments.__dict__["_setup_devices"] = device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if arguments.world_size != distributed.world_size():
        raise TrainingError(
            f"Trainer finds {arguments.world_size} processes, and there are {distributed.world_size()}."
        )
    return arguments


def check_trackers(config: TrainConfig) -> None:
    """Raise ConfigError for a tracker that is not installed."""
    if missing := sorted(set(config.report_to) - set(get_available_reporting_integrations())):
        raise ConfigError(f"report_to: {missing[0]} is not installed: pip install {missing[0]}.")


def tensorboard_callback(config: TrainConfig) -> TensorBoardCallback:
    """Make a callback that writes beside the folder of the run, which is removed at its end."""
    callback = TensorBoardCallback()
    callback.logging_dir = str(config.runs_dir / "tensorboard" / str(config.name))
    return callback


def log_samples(trackers: Sequence[TrainerCallback], samples: Sequence[Sample]) -> None:
    """Write samples of a step as a table to those of the callbacks that are trackers."""
    step, rows = samples[0].step, [[sample.prompt, sample.base, sample.adapter] for sample in samples]
    for tracker in trackers:
        if isinstance(tracker, TensorBoardCallback) and tracker.tb_writer:
            tracker.tb_writer.add_text("samples", samples_table(samples), step)
        elif isinstance(tracker, MLflowCallback):
            tracker._ml_flow.log_text(samples_table(samples), f"samples/step-{step}.md")
        elif isinstance(tracker, WandbCallback):
            table = tracker._wandb.Table(columns=COLUMNS, data=rows)
            tracker._wandb.log({"samples": table, "train/global_step": step})
        elif isinstance(tracker, TrackioCallback):
            table = tracker._trackio.Markdown(samples_table(samples))
            tracker._trackio.log({"samples": table, "train/global_step": step})


class LiveLog(TrainerCallback):
    """Losses and samples so far, in the folder of a run, as the adapter will have them.

    Each line is appended as it comes. All is written again when the loss of the base, which is
    measured later, has become the first entry, and after a full disk, which is told once: the log
    itself is in the checkpoints.
    """

    def __init__(self, folder: Path, notify: EventHandler) -> None:
        self.folder, self.notify = folder, notify
        self.written = 0  # entries of the log
        self.first: LogEntry | None = None  # of the log, when it was written
        self.has_failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._update(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._update(state)

    def _update(self, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        log: list[LogEntry] = state.log_history
        if log and log[0] is not self.first:
            self.written, self.first = 0, log[0]
        new = log[self.written :]
        losses = [entry for entry in new if LOSSES & entry.keys()]
        samples = [sample for entry in new for sample in entry.get("samples", [])]
        try:
            for name, entries in zip(LIVE_FILES, (losses, samples), strict=True):
                text = "".join(f"{json.dumps(entry)}\n" for entry in entries)
                if not self.written:
                    atomic_io.atomic_write_text(self.folder / name, text)
                elif text:
                    with (self.folder / name).open("a", encoding="utf-8") as file:
                        file.write(text)
            self.written = len(log)
        except OSError as error:
            self.written = 0
            if not self.has_failed:
                self.has_failed = True
                why = f"its curve cannot be followed. {os_error_message(error)}"
                self.notify(Notice(f"The run goes on, but {why}"))


def learning_rate_factor(step: int, schedule: str, warmup: float, steps: int) -> float:
    """Return the share of the peak learning rate at a step, counted from 0.

    The first step already learns; with transformers' own schedules it has a learning rate of 0.
    """
    warmup_steps = int(warmup * steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    left = (steps - step) / (steps - warmup_steps)
    return left if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


class WatchThreads(TrainerCallback):
    """Warn once if the machine becomes too busy for several threads. Looks once a minute."""

    def __init__(self, setup: TrainingSetup) -> None:
        self.setup, self.next_look = setup, time.monotonic() + LOOK_SECONDS

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.setup.base.device.type != "cpu" or time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + LOOK_SECONDS
        if warning := threads.busy_warning():
            self.next_look = math.inf
            command = f"{resume_command(self.setup.config)} --threads 1 --accept threads"
            advice = "" if self.setup.sweep else f" Press Ctrl-C, then: {command}"
            self.setup.notify(Notice(warning + advice))


class StopOnSignal(TrainerCallback):
    """Save and stop after the step in which the event was set, in any process."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if distributed.all_reduce_max(self.stop.is_set()):
            self.stop.set()
            control.should_save = control.should_training_stop = True


class EpochOrder(torch.utils.data.Sampler[int]):
    """The sequences of an epoch (`PackedSequences.epoch_order`), the same for any number of processes.

    Indices beyond the last sequence follow, up to a multiple that all processes can share: each must
    have a batch when the others have one.

    Args:
        epoch: returns the current epoch; launchers wrap the sampler, so it cannot be set from outside.
    """

    def __init__(self, setup: TrainingSetup, multiple: int, epoch: Callable[[], int]) -> None:
        self.sequences, self.weights = setup.sequences, setup.dataset.weights
        self.seed, self.epoch = setup.config.seed, epoch
        self.padding = -len(self.sequences) % multiple

    def __len__(self) -> int:
        return len(self.sequences) + self.padding

    def __iter__(self) -> Iterator[int]:
        yield from self.sequences.epoch_order(self.epoch(), self.seed, self.weights)
        yield from [len(self.sequences)] * self.padding
