"""Hugging Face's Trainer with this package's loss, held-out loss, checkpoints and signals.

Trainer hides errors: a NaN loss is logged as 0, a half-written checkpoint is accepted, and Ctrl-C
saves nothing. Here a NaN stops the run, a checkpoint is valid only with the hashes of its files,
and a signal ends the step and saves. Of several processes only rank zero writes.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from .. import atomic_io, distributed
from ..adapters.gains import HeldOutLoss, LossPair
from ..adapters.plots import AverageLoss
from ..errors import (
    DataError,
    DivergedError,
    HubError,
    Interrupted,
    LoraTunerError,
    Notice,
    ProcessLostError,
    Progress,
    RaisedOnRankZero,
    TrainingError,
    is_out_of_memory,
    os_error_message,
)
from ..evaluation import held_out_loss
from ..models import initialization, lora
from ..text import format_bytes
from . import checkpoints, loss_result
from .advice import lower_rate
from .arguments import (
    LOSSES,
    EpochOrder,
    LiveLog,
    StopOnSignal,
    WatchThreads,
    learning_rate_factor,
    tensorboard_callback,
    training_arguments,
)
from .checkpoints import resume_command, save_adapter
from .profiling import peak_memory
from .samples import RunSamples
from .setup import TrainingSetup
from .signals import stop_on_signal


def run_trainer(
    setup: TrainingSetup, folder: Path, checkpoint: Path | None, samples: RunSamples, live: LiveLog
) -> tuple[TrainerState, list[dict[str, float]], LossPair]:
    """Train `setup.model` from its start or from a checkpoint, and measure its held-out loss.

    Returns:
        Trainer's state, the log entries of all steps, and the held-out loss of base and adapter.

    Raises:
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP, with a checkpoint saved.
        DivergedError: a loss, gradient or weight is not finite.
    """
    trainer = LoraTrainer(setup, folder, checkpoint)
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    if checkpoint and state and _all_steps_done(setup, state):  # Trainer would take one more step
        best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else checkpoint.name
        lora.load_checkpoint_weights(setup.model, folder / best)
        if trainer.stream:
            trainer.stream.restore_counts()
        trainer.current_step = state.global_step - 1
    else:
        distributed.run_on_rank_zero(partial(checkpoints.remove_newer_than, checkpoint, folder))
        set_seed(setup.config.seed + distributed.rank())  # for dropout alone
        with stop_on_signal() as stop:
            trainer.add_callback(StopOnSignal(stop))
            samples.trackers = trainer.callback_handler.callbacks
            trainer.add_callback(samples)  # after the trackers have begun
            trainer.add_callback(live)  # after the samples are in the log
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except (DataError, HubError) as error:  # the stream has ended early
                trainer.save_and_raise(str(error), error)
            except OSError as error:  # of a tracker, or the stream
                trainer.save_and_raise(os_error_message(error), error)
            except (RuntimeError, ProcessLostError) as error:
                if not isinstance(error, ProcessLostError) and not distributed.is_process_loss(error):
                    raise
                trainer.save_and_raise("Another process of this run has ended.", error)
        state = trainer.state
        if not _weights_are_finite(setup):
            trainer.save_last_good_and_raise("A weight is not finite")
        if distributed.all_reduce_max(stop.is_set()):
            raise distributed.share_error(
                Interrupted(
                    f"Stopped at step {state.global_step} of {state.max_steps}, saved. Resume with: "
                    f"{resume_command(setup.config)}"
                )
            )
    loss_result.complete_curve(setup, state.log_history)
    history = [entry for entry in state.log_history if LOSSES & entry.keys()]
    of_base, of_adapter = loss_result.measure_result(setup)
    return state, history, (of_base, trainer.check_finite(of_adapter))


@contextlib.contextmanager
def explain_how_to_finish(setup: TrainingSetup, folder: Path) -> Iterator[None]:
    """Turn an error after the last step into one that says how to finish without training again."""
    try:
        yield
    except (Interrupted, RaisedOnRankZero):
        raise
    except Exception as error:
        resuming = resume_command(setup.config)
        if is_out_of_memory(error) or (isinstance(error, TrainingError) and resuming in str(error)):
            raise
        if not (checkpoint := next(iter(checkpoints.list_checkpoints(folder)), None)):
            raise
        file = checkpoint / "trainer_state.json"
        is_whole = (checkpoint / atomic_io.HASHES_FILE).is_file()
        if not is_whole or not _all_steps_done(setup, TrainerState.load_from_json(str(file))):
            raise
        if isinstance(error, DivergedError):
            if setup.sweep is not None or not _weights_are_finite(setup):  # a sweep goes on to its next trial
                raise
            raise DivergedError(
                f"{error} All steps are kept: measure again with {resuming}, or discard them with --overwrite."
            ) from error
        why = os_error_message(error) if isinstance(error, OSError) else " ".join(str(error).split())
        if not isinstance(error, (LoraTunerError, OSError)):
            why = f"{type(error).__name__}: {why.rstrip('.')}."
        raise TrainingError(
            f"The adapter could not be written, but the run is kept, with all its steps. {why} Then resume with: {resuming}"
        ) from error


def _weights_are_finite(setup: TrainingSetup) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in lora.adapter_state_dict(setup.model).values())


def _all_steps_done(setup: TrainingSetup, state: TrainerState) -> bool:
    """Return whether all steps are done in this checkpoint, or patience has ended."""
    callbacks: Any = state.stateful_callbacks  # a dict, typed as a list
    early_stopping = callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    worse, patience = early_stopping.get("early_stopping_patience_counter", 0), setup.config.patience
    return state.global_step >= state.max_steps or (patience is not None and worse >= patience)


class LoraTrainer(Trainer):
    """Trainer with the loss, the held-out loss and the checkpoints of this package."""

    def __init__(self, setup: TrainingSetup, folder: Path, checkpoint: Path | None = None) -> None:
        config = setup.config
        self.stream = (
            checkpoints.open_stream(setup, checkpoint, setup.dataset.sources) if config.streaming else None
        )
        callbacks: list[TrainerCallback] = [_CheckGradients(self), WatchThreads(setup)]
        if config.patience:
            callbacks.append(EarlyStoppingCallback(config.patience))
        if "tensorboard" in config.report_to:
            callbacks.append(tensorboard_callback(config))
        super().__init__(
            model=setup.model,
            args=training_arguments(setup, folder),
            train_dataset=self.stream or setup.sequences,
            eval_dataset=setup.held_out,
            data_collator=setup.collate,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # `num_items_in_batch`
        self.setup, self.folder = setup, folder
        self.per_step = setup.sequences_per_step  # kept, as other processes may end before this one
        self.current_step, self.step_start, self.predictions = -1, 0.0, 0
        self.trained = [tensor for tensor in setup.model.parameters() if tensor.requires_grad]
        self.last_good: list[torch.Tensor] = []  # their values
        self.average: AverageLoss | None = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = super().get_train_dataloader()
        if self.stream:  # else it draws a random number at its start, wherever the stream is
            getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return loader

    def _get_train_sampler(self, train_dataset: object = None) -> EpochOrder:
        multiple = self.setup.batch_size * distributed.world_size() if distributed.world_size() > 1 else 1
        setup, per_epoch = self.setup, self.setup.steps_per_epoch or 1
        return EpochOrder(setup, multiple, lambda: self.state.global_step // per_epoch)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if distributed.world_size() > 1 and training:
            return distributed.wrap_ddp(model, self.setup.base.device)
        return super()._wrap_model(model, training, dataloader)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        # DDP averages gradients.
        return self.setup.loss(model, inputs, kwargs["num_items_in_batch"]) * distributed.world_size()

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor | int | None:
        if self.setup.objective is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.as_tensor(self.setup.count(batch_samples), device=device)
        of_processes: torch.Tensor = self.accelerator.gather(count)
        return of_processes.view(-1, len(count)).sum(0)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if self.state.global_step != self.current_step:
            assert num_items_in_batch is not None
            self.current_step, self.step_start = self.state.global_step, time.perf_counter()
            count = torch.as_tensor(num_items_in_batch)
            self.predictions = int(count if self.setup.objective is None else count[1])
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss) and distributed.world_size() == 1:  # else: by gradients
            self.save_last_good_and_raise(f"The loss is {loss.item()}")
        return loss

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.setup.config.method == "lora+":
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args)
            del settings["lr"]
            self.optimizer = initialization.lora_plus_optimizer(
                self.setup.model, self.setup.learning_rate, self.args.weight_decay, optimizer_class, **settings
            )
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        config, optimizer = self.setup.config, optimizer or self.create_optimizer()
        factor = partial(
            learning_rate_factor, schedule=config.schedule, warmup=config.warmup, steps=num_training_steps
        )
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def save_last_good_and_raise(self, problem: str) -> NoReturn:
        """Save the last adapter whose loss and gradients were finite, and raise DivergedError.

        Raises BaseModelError in the first step if the base itself is damaged.
        """
        setup = self.setup
        if self.state.global_step == 0 and distributed.world_size() == 1:
            with setup.model.disable_adapter():
                loss = held_out_loss.measure_loss(setup.base.model, setup.base, setup.held_out, setup.notify)
            held_out_loss.check_base_loss(setup.base, loss)
        folder = self.folder / "last-good"
        if self.last_good and distributed.rank() == 0:
            self._swap_last_good()
            with contextlib.suppress(OSError), atomic_io.atomic_folder(folder) as work:
                save_adapter(self.setup, lora.adapter_state_dict(self.setup.model), self.setup.manifest, work)
            self._swap_last_good()
        kept = (
            f"The last good adapter is in {folder}." if folder.is_dir() else "There is no good adapter to keep."
        )
        lower = lower_rate(self.setup.learning_rate, 10, self.setup.method)
        raise distributed.share_error(
            DivergedError(
                f"{problem} in step {self.current_step + 1}, so the run has stopped. {kept} Try a lower learning rate than "
                f"{self.setup.learning_rate:g}, such as {lower:g} (--learning-rate), or a lower --max-grad-norm."
            )
        )

    def _swap_last_good(self) -> None:
        for good, now in zip(self.last_good, self.trained, strict=True):
            good.data, now.data = now.data, good.data

    def save_and_raise(self, reason: str, cause: Exception) -> NoReturn:
        """Save a checkpoint of the last complete step on rank zero, and raise TrainingError."""
        error = distributed.share_error(
            TrainingError(
                f"{reason} The last step was {self.state.global_step} of {self.state.max_steps}. Resume with: "
                f"{resume_command(self.setup.config)}"
            )
        )
        distributed.drop_process_group()
        if not isinstance(error, RaisedOnRankZero) and self._can_save():
            self._save_checkpoint(self.setup.model, None)
        raise error from cause

    def _can_save(self) -> bool:
        """Return whether the last step is fully logged and not saved yet.

        With patience Trainer would wait for the other processes, and each measurement is saved
        anyway."""
        step, every, patience = self.state.global_step, self.setup.eval_every, self.setup.config.patience
        entries = [entry.keys() & LOSSES for entry in self.state.log_history if entry["step"] == step]
        expected = 2 if every and step % every == 0 else 1  # of training, and of held-out rows
        saved = (self.folder / f"{checkpoints.PREFIX}{step}").exists()
        return bool(step) and not saved and patience is None and len(set().union(*entries)) >= expected

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            seconds, memory = time.perf_counter() - self.step_start, peak_memory(self.setup.base.device)
            logs |= {"tokens": self.predictions, "seconds": round(seconds, 4), "peak_memory_bytes": memory}
            self._show_step(logs["loss"], f"{self.predictions / seconds:,.0f} tokens/s  {format_bytes(memory)}")
        super().log(logs, start_time)

    def _show_step(self, loss: float, pace: str) -> None:
        if self.average is None:  # a resumed run has a log
            losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            self.average = AverageLoss(self.state.max_steps, losses)
        text = f"loss {loss:.3f}, avg {self.average.update(loss):.3f}  {pace}"
        self.setup.notify(Progress("training", self.state.global_step, self.state.max_steps, text))

    def check_finite(self, held_out: HeldOutLoss) -> HeldOutLoss:
        """Return a held-out loss. Raises DivergedError for one that is not finite."""
        if not math.isfinite(held_out.loss):
            self.save_last_good_and_raise(f"The held-out loss is {held_out.loss}")
        return held_out

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        text = loss_result.begin_curve(self.setup, self.state.log_history)
        loss = self.check_finite(loss_result.measure_adapter(self.setup)).loss
        metrics = self.setup.curve_metrics(loss)
        self.log(metrics)
        self.setup.notify(Notice(f"Step {self.state.global_step}: held-out loss {loss:.3f}{text}."))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def store_flos(self) -> None:
        """Do nothing: it would wait for processes that may have ended."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            save_adapter(
                self.setup,
                lora.adapter_state_dict(self.setup.model),
                self.setup.manifest,
                Path(output_dir or self.folder),
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        """Save a checkpoint, make it valid, and only then remove older ones."""
        step = self.state.global_step
        checkpoint = self.folder / f"{checkpoints.PREFIX}{step}"
        try:
            distributed.run_on_rank_zero(partial(atomic_io.delete, checkpoint))  # unfinished
            super()._save_checkpoint(model, trial)
            distributed.all_gather(None)  # wait until all processes have written their RNG states
            if self.stream:
                text = self.stream.position(step * self.per_step)
                distributed.run_on_rank_zero(
                    partial(atomic_io.atomic_write_text, checkpoint / checkpoints.STREAM_FILE, text)
                )
            distributed.run_on_rank_zero(partial(checkpoints.finalize, checkpoint))
        except (OSError, RuntimeError, SafetensorError) as error:
            if distributed.is_process_loss(error):
                raise
            atomic_io.delete(checkpoint)
            problem = error if isinstance(error, OSError) else atomic_io.as_os_error(error, checkpoint)
            raise TrainingError(
                f"The checkpoint of step {step} could not be written. {os_error_message(problem)} Then resume with: "
                f"{resume_command(self.setup.config)}"
            ) from error
        distributed.run_on_rank_zero(partial(checkpoints.prune_checkpoints, self.folder))


class _CheckGradients(TrainerCallback):
    """Stop at a gradient that is not finite, else remember the weights as good.

    Costs a look at the gradients and a copy of the adapter's weights per step.
    """

    def __init__(self, trainer: LoraTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        trained = self.trainer.trained
        if not torch.nn.utils.get_total_norm([it.grad for it in trained if it.grad is not None]).isfinite():
            self.trainer.save_last_good_and_raise("A gradient is not finite")
        self.trainer.last_good = [tensor.detach().clone() for tensor in trained]
