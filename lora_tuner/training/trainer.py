"""Hugging Face's Trainer with the loss, the held-out measure, the checkpoints and the Ctrl-C of this package.

Surprise: Trainer hides what goes wrong. A loss that is not a number is logged as 0, a checkpoint cut off half-way is taken
for a whole one, and Ctrl-C saves nothing. Here the first stops the run, each checkpoint names the hash of every file in it
and counts only then (`whole.json`), and the last ends the step and saves.

Of several processes (`distributed`) each takes its batches of the order that one alone would have, and the first alone writes.
"""

import contextlib
import json
import math
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import TensorBoardCallback, get_available_reporting_integrations

from .. import atomic_io, distributed, evaluation
from ..config import TrainConfig
from ..data.splitting import row_hash
from ..data.streaming import StreamingDataset, StreamState
from ..errors import (
    ConfigError,
    DataError,
    DivergedError,
    HubError,
    Interrupted,
    Notice,
    ProcessLostError,
    Progress,
    RaisedOnRankZero,
    TrainingError,
    os_error_message,
)
from ..models import initialization, lora
from . import checkpoints
from .checkpoints import save_adapter
from .setup import TrainingSetup


def resume_command(config: TrainConfig) -> str:
    """The command line that resumes a run."""
    place = "" if config.runs_dir == TrainConfig().runs_dir else f" --runs-dir {shlex.quote(str(config.runs_dir))}"
    return f"python cli.py train --resume {config.name}{place}"


def run_trainer(
    job: TrainingSetup, folder: Path, checkpoint: Path | None
) -> tuple[TrainerState, list[dict[str, Any]], evaluation.HeldOutLoss]:
    """Train `job.model`, from its start or from a checkpoint, and measure it. Gives Trainer's state, the log of all steps,
    and the held-out loss.

    Raises Interrupted, with a checkpoint saved, after Ctrl-C or SIGTERM; DivergedError when a figure is not finite.
    """
    trainer = _LoraTrainer(job, folder, checkpoint)
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    if checkpoint and state and _is_finished(job, state):  # Trainer would take one step more
        kept = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else checkpoint.name
        lora.load_checkpoint_weights(job.model, folder / kept)
        if trainer.stream:
            trainer.stream.restore_counts()
        trainer.step_seen = state.global_step - 1
    else:
        distributed.run_on_rank_zero(partial(checkpoints.remove_newer_than, checkpoint, folder))
        set_seed(job.config.seed + distributed.rank())  # dropout; the order has a seed of its own
        with _stop_on_signal() as stop:
            trainer.add_callback(_StopOnSignal(stop))
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except (DataError, HubError) as error:  # the stream has broken off
                raise trainer.save_and_raise(str(error)) from error
            except (RuntimeError, ProcessLostError) as error:
                if not isinstance(error, ProcessLostError) and not distributed.is_process_loss(error):
                    raise
                raise trainer.save_and_raise("Another process of this run has ended.") from error
        state = trainer.state
        if not all(bool(torch.isfinite(tensor).all()) for tensor in lora.adapter_state_dict(job.model).values()):
            raise trainer.diverged_error("A weight is not finite")
        if distributed.all_reduce_max(stop.is_set()):
            done = f"Stopped at step {state.global_step} of {state.max_steps}, saved."
            raise distributed.share_error(Interrupted(f"{done} Go on with: {resume_command(job.config)}"))
    held_out = evaluation.measure_loss(job.model, job.base, job.held_out, job.notify)
    if not math.isfinite(held_out.loss):
        raise trainer.diverged_error(f"The held-out loss is {held_out.loss}")
    return state, [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry], held_out


def _is_finished(job: TrainingSetup, state: TrainerState) -> bool:
    """Whether the checkpoint with this state is the last of its run: all steps are done, or patience is at its end."""
    callbacks: Any = state.stateful_callbacks
    early = callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    worse = early.get("early_stopping_patience_counter", 0)
    return state.global_step >= state.max_steps or (job.config.patience is not None and worse >= job.config.patience)


def _training_arguments(job: TrainingSetup, folder: Path) -> TrainingArguments:
    config = job.config
    assert config.max_steps is not None
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # the numbers are those of the base, whatever the launcher says
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.max_steps,
        ignore_data_skip=config.streaming,  # a stream knows its place
        accelerator_config={"dispatch_batches": False},  # each process reads for itself
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=job.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every,
        # The best can only be kept where it was saved.
        save_steps=config.eval_every if config.patience and config.eval_every else config.save_every,
        load_best_model_at_end=config.patience is not None,
        metric_for_best_model="eval_loss" if config.patience else None,
        greater_is_better=False if config.patience else None,
        restore_callback_states_from_checkpoint=config.patience is not None,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it logs a loss that is not a number as 0
        average_tokens_across_devices=True,  # else each process divides by its own predictions
        ddp_find_unused_parameters=False,  # each step uses them all
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=job.base.device.type == "cuda",
        use_cpu=job.base.device.type == "cpu",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        report_to=[tracker for tracker in config.report_to if tracker != "tensorboard"],
        run_name=config.name,
    )
    # Left to itself, Trainer takes the first GPU, or splits batches over all of them by DataParallel; and of several processes on
    # a CPU each copies the base to a device of its own.
    arguments._n_gpu = min(1, arguments.n_gpu)
    arguments.__dict__["_setup_devices"] = job.base.device
    if job.base.device.type == "cuda":
        torch.cuda.set_device(job.base.device)
    if arguments.world_size != distributed.world_size():
        raise TrainingError(
            f"Trainer finds {arguments.world_size} processes, and there are {distributed.world_size()}."
        )
    return arguments


def check_trackers(config: TrainConfig) -> None:
    """Raise ConfigError for a tracker that is not installed."""
    if missing := sorted(set(config.report_to) - set(get_available_reporting_integrations())):
        raise ConfigError(f"report_to: {missing[0]} is not installed: pip install {missing[0]}.")


def _tensorboard_callback(config: TrainConfig) -> TensorBoardCallback:
    """It writes beside the runs, for the folder of a run goes when that has finished."""
    callback = TensorBoardCallback()
    callback.logging_dir = str(config.runs_dir / "tensorboard" / str(config.name))
    return callback


def _learning_rate_factor(step: int, schedule: str, warmup: float, steps: int) -> float:
    """The share of the peak learning rate that a step has, counted from 0."""
    rising = int(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    left = (steps - step) / (steps - rising)
    return left if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def _training_stream(job: TrainingSetup, checkpoint: Path | None) -> StreamingDataset:
    """The stream from its beginning, or from where it was when the checkpoint was written."""
    place = StreamState()
    if checkpoint is not None:
        place = StreamState(**json.loads((checkpoint / checkpoints.STREAM_FILE).read_text(encoding="utf-8")))
    held_out = job.dataset.held_out if job.config.eval_dataset else []  # others are known by their hash alone
    measured = frozenset(row_hash(text, job.config.split_salt) for text in held_out)
    return StreamingDataset(job.config, job.base.tokenizer, measured, job.dataset.counts, place)


class _EpochOrder(torch.utils.data.Sampler[int]):
    """The sequences of an epoch, shuffled as one process would have them; then empty ones (their index is the count of the
    sequences) up to a number that all processes can share, for each must have a batch when the others have one."""

    def __init__(self, count: int, multiple: int, seed: int, epoch: Callable[[], int]) -> None:
        self.count, self.seed, self.epoch = count, seed, epoch  # asked each time: launchers wrap what would be told
        self.empty = -count % multiple

    def __len__(self) -> int:
        return self.count + self.empty

    def __iter__(self) -> Iterator[int]:
        shuffle = torch.Generator().manual_seed(self.seed + self.epoch())
        yield from torch.randperm(self.count, generator=shuffle).tolist()
        yield from [self.count] * self.empty


class _LoraTrainer(Trainer):
    """Trainer with the loss, the held-out measure and the checkpoints of this package."""

    def __init__(self, job: TrainingSetup, folder: Path, checkpoint: Path | None = None) -> None:
        self.stream = _training_stream(job, checkpoint) if job.config.streaming else None
        callbacks: list[TrainerCallback] = [_CheckGradients(self)]
        if job.config.patience:
            callbacks.append(EarlyStoppingCallback(job.config.patience))
        if "tensorboard" in job.config.report_to:
            callbacks.append(_tensorboard_callback(job.config))
        super().__init__(
            model=job.model,
            args=_training_arguments(job, folder),
            train_dataset=self.stream or job.sequences,
            eval_dataset=job.held_out,
            data_collator=job.collate,
            compute_loss_func=self._loss,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is computed here, so the model is not told the count
        self.job = job
        self.per_step = job.sequences_per_step  # kept: others may end before this process
        self.folder = folder
        self.predictions = 0
        self.step_start = 0.0
        self.step_seen = -1
        self.last_good: dict[str, torch.Tensor] = {}

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if self.stream:  # it would draw a number when it begins, wherever in the stream that is
            getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        multiple = self.job.batch_size * distributed.world_size() if distributed.world_size() > 1 else 1
        count, in_epoch = len(self.job.sequences), self.job.steps_per_epoch or 1
        return _EpochOrder(count, multiple, self.job.config.seed, lambda: self.state.global_step // in_epoch)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if distributed.world_size() > 1 and training:
            return distributed.wrap_ddp(model, self.job.base.device)
        return super()._wrap_model(model, training, dataloader)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self.job.base.lm_head.skip_lm_head():
            return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def _loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        """Mean negative log-likelihood over the predictions of the whole step, of which this may be one micro-batch."""
        loss: torch.Tensor = self.job.base.lm_head.nll(outputs.logits, labels).sum() / num_items_in_batch
        return loss

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        first = self.state.global_step != self.step_seen
        if first:
            self.step_seen, self.step_start = self.state.global_step, time.perf_counter()
            self.predictions = int(num_items_in_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss) and distributed.world_size() == 1:  # of several, all see it in the gradients
            raise self.diverged_error(f"The loss is {loss.item()}")
        return loss

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.job.config.method == "lora+":
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            del settings["lr"]
            decay = self.job.config.weight_decay
            self.optimizer = initialization.lora_plus_optimizer(
                self.job.model, self.job.learning_rate, decay, kind, **settings
            )
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As transformers' own, but for the first step, which there has a learning rate of 0 and is lost."""
        factor = partial(
            _learning_rate_factor,
            schedule=self.job.config.schedule,
            warmup=self.job.config.warmup,
            steps=num_training_steps,
        )
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)  # type: ignore[arg-type]
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def diverged_error(self, what: str) -> Exception:
        folder = self.folder / "last-good"
        if self.last_good and distributed.rank() == 0:
            with (
                contextlib.suppress(OSError),
                atomic_io.atomic_folder(folder) as work,
            ):  # a full disk is not what is wrong
                save_adapter(self.job, self.last_good, self.job.manifest, work)
        kept = f"The last good adapter is in {folder}." if folder.is_dir() else "There is no good adapter to keep."
        error = DivergedError(
            f"{what} in step {self.step_seen + 1}, so the run has stopped. {kept} Try a lower learning rate than "
            f"{self.job.learning_rate:g} (--learning-rate), or a lower --max-grad-norm."
        )
        return distributed.share_error(error)

    def save_and_raise(self, why: str) -> Exception:
        """The error of a run that cannot take its next step. The first process saves what all have learnt up to then."""
        done = f"It was after step {self.state.global_step} of {self.state.max_steps}."
        error: Exception = TrainingError(f"{why} {done} Go on with: {resume_command(self.job.config)}")
        error = distributed.share_error(error)
        distributed.drop_process_group()
        if not isinstance(error, RaisedOnRankZero) and self._can_save():
            self._save_checkpoint(self.job.model, None)
        return error

    def _can_save(self) -> bool:
        """Whether the last step is known with all its figures, and not saved yet. With patience Trainer would ask the others, and
        each measurement is saved anyway."""
        step, config = self.state.global_step, self.job.config
        logged = {
            kind: entry["step"] for entry in self.state.log_history for kind in entry.keys() & {"loss", "eval_loss"}
        }
        due = {"loss"} | ({"eval_loss"} if config.eval_every and step % config.eval_every == 0 else set())
        saved = (self.folder / f"{checkpoints.PREFIX}{step}").exists()
        return bool(step) and not saved and config.patience is None and all(logged.get(kind) == step for kind in due)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            seconds = time.perf_counter() - self.step_start
            logs |= {"tokens": self.predictions, "seconds": round(seconds, 4)}
            self._report(logs["loss"], self.predictions / seconds)
        super().log(logs, start_time)

    def _report(self, loss: float, speed: float) -> None:
        done, total = self.state.global_step, self.state.max_steps
        self.job.notify(Progress("training", done, total, f"loss {loss:.3f}  {speed:,.0f} tokens/s"))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        held_out = evaluation.measure_loss(self.job.model, self.job.base, self.job.held_out, self.job.notify)
        if not math.isfinite(held_out.loss):
            raise self.diverged_error(f"The held-out loss is {held_out.loss}")
        metrics = {"eval_loss": held_out.loss}
        self.log(metrics)
        self.job.notify(Notice(f"Step {self.state.global_step}: held-out loss {held_out.loss:.4f}."))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def store_flos(self) -> None:
        """Nobody reads the figure, and it takes a word with all processes, of which one may be no more."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        assert output_dir is not None
        if not self.args.should_save:
            return
        save_adapter(self.job, lora.adapter_state_dict(self.job.model), self.job.manifest, Path(output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that names each of its files with its hash, and only then the older ones go."""
        checkpoint = self.folder / f"{checkpoints.PREFIX}{self.state.global_step}"
        try:
            distributed.run_on_rank_zero(partial(atomic_io.delete, checkpoint))  # one that was cut off here before
            super()._save_checkpoint(model, trial)
            distributed.all_gather(None)  # each has written its random numbers
            if self.stream:
                place = self.stream.state_at(self.state.global_step * self.per_step)
                distributed.run_on_rank_zero(
                    partial(
                        atomic_io.atomic_write_text, checkpoint / checkpoints.STREAM_FILE, json.dumps(asdict(place))
                    )
                )
            distributed.run_on_rank_zero(partial(checkpoints.finalize, checkpoint))
        except (OSError, RuntimeError, SafetensorError) as error:
            if distributed.is_process_loss(error):
                raise
            atomic_io.delete(checkpoint)
            problem = error if isinstance(error, OSError) else atomic_io.as_os_error(error, checkpoint)
            raise TrainingError(
                f"The checkpoint of step {self.state.global_step} could not be written. {os_error_message(problem)} Then go on with: "
                f"{resume_command(self.job.config)}"
            ) from error
        distributed.run_on_rank_zero(partial(checkpoints.prune_checkpoints, self.folder))


class _CheckGradients(TrainerCallback):
    """Stops before the optimizer takes a step that would ruin the weights, and remembers those that have just given a finite
    loss and gradient. Price: one look at the adapter's gradients, one copy of its weights."""

    def __init__(self, trainer: _LoraTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.trainer.job.model.parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise self.trainer.diverged_error("A gradient is not finite")
        if distributed.rank() == 0:
            self.trainer.last_good = {
                name: it.clone() for name, it in lora.adapter_state_dict(self.trainer.job.model).items()
            }


class _StopOnSignal(TrainerCallback):
    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if distributed.all_reduce_max(self.stop.is_set()):
            self.stop.set()
            control.should_save = control.should_training_stop = True


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, once; Ctrl-C again stops at once. Only the main thread can listen."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(signum: int, frame: Any) -> None:
        if stop.is_set() and distributed.world_size() == 1:  # a launcher passes on what they have all had already
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
