"""One training run, from a configuration to an adapter in the library, or resumed from where it stopped.

Surprise: minutes are never a stop rule while training runs. A few real steps are measured first, minutes become a number
of steps, and `run.yaml` holds that number, so that every run can be repeated step for step. Limit: one process.

A running job lives in `runs/NAME`: `run.yaml`, `manifest.json` (what is known so far) and checkpoints, each of which is an
adapter folder with the trainer's state beside it, and counts only once `whole.json` in it names every file's hash.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from . import evaluation, files, lora, report, store, tokens
from .base_model import Base, find_base, load_base, load_tokenizer
from .config import BATCH_SIZE_CPU, BATCH_SIZE_GPU, PATIENCE_MINUTES, TrainConfig, resolve, to_yaml
from .data import Corpus, content_hash, default_name, load_corpus
from .errors import DivergedError, Interrupted, Listener, Notice, Progress, TrainingError, ignore
from .store import Adapter, Library, Manifest

WHOLE = "whole.json"
_PIECES = {store.WEIGHTS, store.CONFIG, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
MEASURED_STEPS = 4  # the first warms up and is not counted


@dataclass(frozen=True)
class Plan:
    """What a run will cost, from a few real steps. Seconds, bytes, counts."""

    steps: int
    steps_per_epoch: int
    seconds_per_step: float
    training_seconds: float
    held_out_seconds: float
    peak_memory_bytes: int
    tokens_per_second: float
    truncated_share: float
    trained_parameters: int
    base_parameters: int
    adapter_bytes: int


@dataclass
class _Job:
    """Everything in memory that a run needs. `config` is resolved but for its steps until `_fix_steps`."""

    config: TrainConfig
    library: Library
    base: Base
    corpus: Corpus
    model: Any  # PeftModel
    sequences: tokens.Sequences
    held_out: list[tokens.Row]
    held_out_texts: list[str]
    truncated_rows: int
    notify: Listener

    @property
    def run_folder(self) -> Path:
        return _run_folder(self.config)

    @property
    def batch_size(self) -> int:
        assert self.config.batch_size is not None
        return self.config.batch_size

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.sequences) / (self.batch_size * self.config.accumulation))


def train(config: TrainConfig, notify: Listener = ignore) -> Adapter:
    """Train an adapter and put it into the library. What is wrong with the request is said before training starts.

    Raises a LoraTunerError, or Interrupted when it was asked to stop and left a checkpoint to resume from.
    """
    config = _named(config)
    with _locked(config):
        library = _check_places(config)
        job = _prepare(config, library, notify)
        config = _fix_steps(job)
        return _run(replace(job, config=config), checkpoint=None)


def resume(name: str, runs_dir: Path = Path("runs"), notify: Listener = ignore) -> Adapter:
    """Go on with the run in `runs_dir/name` from its newest whole checkpoint, exactly as if it had not stopped.

    Raises TrainingError when there is nothing to resume, or when data, base or threads are not what they were.
    """
    folder = runs_dir / store.valid_name(name)
    if not (folder / store.RUN).is_file():
        raise TrainingError(
            f"There is no unfinished run {folder}: it has finished, or never started. Train without --resume."
        )
    config = resolve(TrainConfig, {}, folder / store.RUN).model_copy(update={"runs_dir": runs_dir})
    with _locked(config):
        library = _check_places(config, resuming=True)
        checkpoint = _newest_whole(folder, notify)
        job = _prepare(config, library, notify)
        _check_same(Manifest.model_validate_json((folder / store.MANIFEST).read_text()), _manifest(job), folder)
        return _run(job, checkpoint)


def plan(config: TrainConfig, notify: Listener = ignore) -> Plan:
    """Measure a few real steps, the longest batch among them, and say what the run would cost. Trains nothing."""
    config = _named(config)
    job = _prepare(config, Library(config.adapters_dir), notify)
    return _measure(job)


@dataclass(frozen=True)
class PreviewedRow:
    """A training row as the model will see it. `tokens` are texts; `labels` says which of them are learnt."""

    before: str
    after: str
    tokens: list[str]
    labels: list[bool]


def preview(config: TrainConfig, count: int, notify: Listener = ignore) -> list[PreviewedRow]:
    """The first `count` training rows, cleaned, tokenised and cut as a run would. Loads no weights."""
    tokenizer = load_tokenizer(find_base(config.base, config.revision, notify))
    rows = []
    for before, after in load_corpus(config, notify).previews[:count]:
        pieces, _ = tokens.cut(tokens.encode(tokenizer, [after]), config.max_length, chunk=config.long_rows == "chunk")
        batches = [tokens.collate([[piece]], tokenizer.pad_token_id) for piece in pieces]
        ids = [token for batch in batches for token in batch["input_ids"][0].tolist()]
        labels = [label != tokens.NO_LABEL for batch in batches for label in batch["labels"][0].tolist()]
        rows.append(PreviewedRow(before, after, [tokenizer.decode([token]) for token in ids], labels))
    return rows


def _named(config: TrainConfig) -> TrainConfig:
    name = config.name or default_name(config.dataset)
    return config.model_copy(update={"name": store.valid_name(name)})


def _run_folder(config: TrainConfig) -> Path:
    assert config.name is not None
    return config.runs_dir / config.name


@contextlib.contextmanager
def _locked(config: TrainConfig) -> Iterator[None]:
    """One process at a time trains under a name."""
    path = config.runs_dir / f".{config.name}.lock"
    lock = FileLock(path, timeout=0)
    try:
        config.runs_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise TrainingError(
            f"Another process trains '{config.name}' now: choose another --name, or wait for it."
        ) from error
    except OSError as error:
        raise TrainingError(
            f"{config.runs_dir} cannot be written to ({error.strerror}): choose another --runs-dir."
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _check_places(config: TrainConfig, *, resuming: bool = False) -> Library:
    assert config.name is not None
    library, folder = Library(config.adapters_dir), _run_folder(config)
    library.check_free(config.name, overwrite=config.overwrite)
    try:
        library.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"{library.path} cannot be written to ({error.strerror}): choose another --adapters-dir."
        ) from error
    if not os.access(library.path, os.W_OK):
        raise TrainingError(f"{library.path} cannot be written to: choose another --adapters-dir.")
    if folder.exists() and not resuming and not config.overwrite:
        raise TrainingError(
            f"{folder} holds an unfinished run: go on with it by --resume {config.name}, drop it with --overwrite, or choose "
            "another --name."
        )
    return library


def _prepare(config: TrainConfig, library: Library, notify: Listener) -> _Job:
    """Base, data and update in memory, seeded: the same configuration gives the same job."""
    source = find_base(config.base, config.revision, notify)
    config = config.model_copy(update={"base": source.name, "revision": source.revision})
    corpus = load_corpus(config, notify)
    base = load_base(source, config.device, config.dtype)
    if config.batch_size is None:
        size = BATCH_SIZE_CPU if base.device.type == "cpu" else BATCH_SIZE_GPU
        config = config.model_copy(update={"batch_size": size})
    if config.max_length > base.context:
        raise TrainingError(
            f"max_length is {config.max_length}, and {source.name} looks back on {base.context} tokens at the most."
        )
    notify(Progress("tokenising", 0, 1))
    encoded = tokens.encode(base.tokenizer, corpus.train)
    rows, truncated = tokens.cut(encoded, config.max_length, chunk=config.long_rows == "chunk")
    notify(Progress("tokenising", 1, 1))
    held_out_texts = corpus.held_out[: config.eval_rows]
    set_seed(config.seed)
    model = lora.wrap(base, config)
    return _Job(
        config=config,
        library=library,
        base=base,
        corpus=corpus,
        model=model,
        sequences=tokens.Sequences(rows, config.max_length, packing=config.packing),
        held_out=evaluation.encode_held_out(base, held_out_texts),
        held_out_texts=held_out_texts,
        truncated_rows=truncated,
        notify=notify,
    )


def _manifest(job: _Job) -> Manifest:
    """What is known before the first step."""
    import accelerate
    import datasets
    import peft
    import transformers

    source, config, corpus = job.base.source, job.config, job.corpus
    return Manifest(
        created=store.now(),
        base=store.BaseFacts(
            name=source.name,
            repo=source.repo,
            revision=source.revision,
            weights=source.weights,
            fingerprint=source.fingerprint,
            tokenizer=job.base.tokenizer_hash,
        ),
        data=store.DataFacts(
            name=corpus.name,
            source=corpus.source,
            hash=corpus.hash(),
            where=config.where,
            split_salt=config.split_salt,
            counts=asdict(corpus.counts),
            held_out_hash=content_hash(job.held_out_texts),
            held_out_rows=len(job.held_out_texts),
        ),
        run=store.RunFacts(
            steps=0,
            kept_step=0,
            tokens=0,
            seconds=0.0,
            sequences=len(job.sequences),
            truncated_rows=job.truncated_rows,
            device=job.base.device.type,
            dtype=str(job.base.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        ),
        versions={module.__name__: module.__version__ for module in (torch, transformers, peft, datasets, accelerate)},
    )


def _check_same(then: Manifest, now: Manifest, folder: Path) -> None:
    """Refuse to resume with anything changed that would make the result another one."""
    pairs = [
        ("base weights", then.base.fingerprint, now.base.fingerprint),
        ("tokenizer", then.base.tokenizer, now.base.tokenizer),
        ("data", then.data.hash, now.data.hash),
        ("device", then.run.device, now.run.device),
        ("dtype", then.run.dtype, now.run.dtype),
        ("threads", then.run.threads, now.run.threads),
    ]
    if changed := [f"{what} (was {str(a)[:12]}, is {str(b)[:12]})" for what, a, b in pairs if a != b]:
        raise TrainingError(
            f"{folder} cannot be resumed exactly: changed since it stopped: {', '.join(changed)}. Restore that, or train anew "
            "with --overwrite."
        )


def _fix_steps(job: _Job) -> TrainConfig:
    """The configuration with `max_steps` as its only stop rule, so that the run can be repeated step for step."""
    config = job.config
    timed = config.max_steps is None and config.epochs is None
    steps = _measure(job).steps if timed else _steps_for(job, 0.0)
    job.notify(Notice(f"The run takes {steps:,} steps; one epoch is {job.steps_per_epoch:,}."))
    return config.model_copy(update={"epochs": None, "minutes": None, "max_steps": steps})


def _steps_for(job: _Job, seconds_per_step: float) -> int:
    """The steps that the stop rule of the configuration means at this speed."""
    config = job.config
    if config.max_steps is not None:
        return config.max_steps
    if config.epochs is not None:
        return math.ceil(config.epochs * job.steps_per_epoch)
    minutes = config.minutes if config.minutes is not None else PATIENCE_MINUTES
    steps = max(1, int(minutes * 60 / seconds_per_step))
    if config.minutes is None:
        if steps >= job.steps_per_epoch:
            return job.steps_per_epoch
        hours = job.steps_per_epoch * seconds_per_step / 3600
        job.notify(
            Notice(
                f"One epoch would take {hours:.1f} hours, so {PATIENCE_MINUTES} minutes' worth of it is trained. Choose with "
                "--minutes, --epochs or --max-steps."
            )
        )
    return steps


def _measure(job: _Job) -> Plan:
    """A few real steps and one held-out batch against the clock, then everything as it was before."""
    config, model, base = job.config, job.model, job.base
    batch_size = job.batch_size
    per_step = batch_size * config.accumulation
    longest = job.sequences.longest_first()
    spread = [longest[int(i * len(longest) / (per_step * MEASURED_STEPS))] for i in range(per_step * MEASURED_STEPS)]
    items = longest[:per_step] + spread[per_step:]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=config.learning_rate)
    seconds, predictions = [], []
    model.train()
    for step in range(MEASURED_STEPS):
        start, count = time.perf_counter(), 0
        for micro in range(config.accumulation):
            first = step * per_step + micro * batch_size
            batch = tokens.collate(items[first : first + batch_size], base.tokenizer.pad_token_id)
            labels = batch.pop("labels").to(base.device)
            output = model(**{name: tensor.to(base.device) for name, tensor in batch.items()}, use_cache=False)
            found = int((labels != tokens.NO_LABEL).sum())
            _loss(output, labels, max(found, 1)).backward()
            count += found
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        _wait_for(base.device)
        seconds.append(time.perf_counter() - start)
        predictions.append(count)
        job.notify(Progress("measuring the speed", step + 1, MEASURED_STEPS))
    model.load_state_dict(before, strict=False)
    model.zero_grad(set_to_none=True)
    per_step_seconds = statistics.fmean(seconds[1:])
    start = time.perf_counter()
    sample = sorted(job.held_out, key=len)[-max(1, evaluation.BATCH_TOKENS // 512) :]
    evaluation.measure(model, base, sample)
    held_out_rate = (time.perf_counter() - start) / sum(map(len, sample))
    trained, frozen = lora.counts(model)
    steps = _steps_for(job, per_step_seconds)
    return Plan(
        steps=steps,
        steps_per_epoch=job.steps_per_epoch,
        seconds_per_step=per_step_seconds,
        training_seconds=steps * per_step_seconds,
        held_out_seconds=held_out_rate * sum(map(len, job.held_out)) * (2 + steps // (config.eval_every or steps + 1)),
        peak_memory_bytes=_peak_memory(base.device),
        tokens_per_second=sum(predictions[1:]) / sum(seconds[1:]),
        truncated_share=job.truncated_rows / len(job.corpus.train),
        trained_parameters=trained,
        base_parameters=frozen,
        adapter_bytes=trained * 4,
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on a GPU by torch there, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    info: Any = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """Mean negative log-likelihood over the predictions of the whole step, of which this may be one micro-batch."""
    loss: torch.Tensor = evaluation.causal_nll(outputs.logits, labels).sum() / num_items_in_batch
    return loss


def _run(job: _Job, checkpoint: Path | None) -> Adapter:
    """Measure, train, measure, write. `checkpoint` is the one to go on from."""
    config, folder = job.config, job.run_folder
    assert config.name is not None
    assert config.max_steps is not None
    with job.model.disable_adapter():
        base_held_out = evaluation.measure_base(job.base, job.held_out, job.notify)
    if checkpoint is None:
        shutil.rmtree(folder, ignore_errors=True)
        files.write_text(folder / store.RUN, to_yaml(config))
        files.write_text(folder / store.MANIFEST, _manifest(job).to_json())
    evaluation.keep_rows(job.held_out_texts, content_hash(job.held_out_texts))
    trainer = _trainer(job)
    set_seed(config.seed)
    with _stopping() as stop:
        trainer.add_callback(_StopWhenAsked(stop))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.is_set():
        raise Interrupted(
            f"Stopped at step {trainer.state.global_step} of {config.max_steps}, saved. Go on with: train --resume {config.name}"
        )
    try:
        held_out = evaluation.measure(job.model, job.base, job.held_out, job.notify)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"Trained, but not measured and not finished. Go on with: train --resume {config.name}"
        ) from error
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    trained_steps = [entry for entry in history if "loss" in entry]
    manifest = _manifest(job).model_copy(update={"result": evaluation.compare(base_held_out, held_out)})
    run = manifest.run.model_copy(
        update={
            "steps": trainer.state.global_step,
            "kept_step": trainer.state.best_global_step or trainer.state.global_step,
            "tokens": sum(entry["tokens"] for entry in trained_steps),
            "seconds": round(sum(entry["seconds"] for entry in trained_steps), 3),
        }
    )
    adapter = _write(job, manifest.model_copy(update={"run": run}), history)
    if not config.keep_checkpoints:
        shutil.rmtree(folder, ignore_errors=True)
    return adapter


def _write(job: _Job, manifest: Manifest, history: list[dict[str, Any]]) -> Adapter:
    config = job.config
    assert config.name is not None
    tensors = lora.weights(job.model)
    with job.library.writing(config.name, overwrite=config.overwrite) as work:
        _save_adapter(job, tensors, manifest, work)
        report.write_metrics(history, work / store.METRICS)
        report.plot_loss(history, manifest, work / store.PLOT)
        (work / store.CARD).write_text(report.model_card(store.read(work), config.name), encoding="utf-8")
    return job.library.get(config.name)


def _save_adapter(job: _Job, tensors: dict[str, torch.Tensor], manifest: Manifest, folder: Path) -> None:
    """Weights, config, manifest and run.yaml into a folder that nobody reads yet."""
    lora.save(tensors, job.model.peft_config[lora.TRAINED], folder)
    weights = folder / store.WEIGHTS
    facts = store.Weights(
        sha256=files.sha256_file(weights),
        bytes=weights.stat().st_size,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
    )
    (folder / store.MANIFEST).write_text(manifest.model_copy(update={"weights": facts}).to_json(), encoding="utf-8")
    # Repeating a run must not silently replace what it repeats.
    (folder / store.RUN).write_text(to_yaml(job.config.model_copy(update={"overwrite": False})), encoding="utf-8")


def _trainer(job: _Job) -> "_LoraTrainer":
    config = job.config
    assert config.max_steps is not None
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(job.base.device)  # Trainer would take the first GPU
    arguments = TrainingArguments(
        output_dir=str(job.run_folder),
        max_steps=config.max_steps,
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(config.warmup * config.max_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        seed=config.seed,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every,
        # The best can only be kept where it was saved.
        save_steps=config.eval_every if config.patience and config.eval_every else config.save_every,
        save_total_limit=2,
        load_best_model_at_end=config.patience is not None,
        metric_for_best_model="eval_loss" if config.patience else None,
        greater_is_better=False if config.patience else None,
        restore_callback_states_from_checkpoint=config.patience is not None,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it logs a loss that is not a number as 0
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=job.base.device.type == "cuda",
        use_cpu=job.base.device.type == "cpu",
        disable_tqdm=True,
        log_level="error",
        report_to=[],
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs in one process would be split by DataParallel
    return _LoraTrainer(job, arguments)


class _LoraTrainer(Trainer):
    """Trainer with the loss, the held-out measure and the checkpoints of this package."""

    def __init__(self, job: _Job, arguments: TrainingArguments) -> None:
        callbacks: list[TrainerCallback] = [_CheckGradients(self), _MarkWhole(job.run_folder)]
        if job.config.patience:
            callbacks.append(EarlyStoppingCallback(job.config.patience))
        super().__init__(
            model=job.model,
            args=arguments,
            train_dataset=job.sequences,
            eval_dataset=job.held_out,
            data_collator=partial(tokens.collate, pad_id=job.base.tokenizer.pad_token_id),
            compute_loss_func=_loss,
            callbacks=callbacks,
        )
        from transformers import PrinterCallback

        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is computed here, so the model is not told the count
        self.job = job
        self.predictions = 0
        self.step_start = 0.0
        self.step_seen = -1
        self.last_good: dict[str, torch.Tensor] = {}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        first = self.state.global_step != self.step_seen
        if first:
            self.step_seen, self.step_start = self.state.global_step, time.perf_counter()
            self.predictions = int(num_items_in_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self.diverged(f"The loss is {loss.item()}")
        if first:  # these weights have just given a finite loss
            self.last_good = {name: tensor.clone() for name, tensor in lora.weights(self.job.model).items()}
        return loss

    def diverged(self, what: str) -> DivergedError:
        folder = self.job.run_folder / "last-good"
        kept = "There is no good adapter to keep."
        if self.last_good:
            with files.new_folder(folder) as work:
                _save_adapter(self.job, self.last_good, _manifest(self.job), work)
            kept = f"The last good adapter is in {folder}."
        return DivergedError(
            f"{what} at step {self.state.global_step + 1}, so the run has stopped. {kept} Try a lower learning rate than "
            f"{self.job.config.learning_rate:g} (--learning-rate), or a lower --clip."
        )

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
        held_out = evaluation.measure(self.job.model, self.job.base, self.job.held_out, self.job.notify)
        metrics = {"eval_loss": held_out.loss}
        self.log(metrics)
        self.job.notify(Notice(f"Step {self.state.global_step}: held-out loss {held_out.loss:.4f}."))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        assert output_dir is not None
        _save_adapter(self.job, lora.weights(self.job.model), _manifest(self.job), Path(output_dir))


class _CheckGradients(TrainerCallback):
    """Stops before the optimizer takes a step that would ruin the weights. Price: one look at the adapter's gradients."""

    def __init__(self, trainer: _LoraTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.trainer.job.model.parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise self.trainer.diverged("A gradient is not finite")


class _MarkWhole(TrainerCallback):
    """Names every file of a checkpoint with its hash once all are written: one cut off half-way lacks it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        hashes = {path.name: files.sha256_file(path) for path in sorted(checkpoint.iterdir()) if path.name != WHOLE}
        files.write_text(checkpoint / WHOLE, json.dumps(hashes, indent=2))


class _StopWhenAsked(TrainerCallback):
    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop.is_set():
            control.should_save = control.should_training_stop = True


@contextlib.contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, once; Ctrl-C again stops at once. Only the main thread can listen."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _newest_whole(folder: Path, notify: Listener) -> Path | None:
    """The newest checkpoint of which every file is there and unchanged; None where there is none, to start over."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(checkpoints, key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            hashes = json.loads((path / WHOLE).read_text(encoding="utf-8"))
            if hashes.keys() >= _PIECES and all(
                files.sha256_file(path / name) == digest for name, digest in hashes.items()
            ):
                return path
        except (OSError, ValueError, AttributeError):
            pass
        notify(Notice(f"{path} is not whole and is passed over."))
    notify(Notice(f"{folder} holds no whole checkpoint: the run starts at its first step."))
    return None
