"""What a run will cost, found by doing a little of it: a few real steps and one held-out batch against the clock.

Surprise: minutes are never a stop rule while training runs. They become a number of steps here, and `run.yaml` holds that
number, so that every run can be repeated step for step. Price: some seconds before training, and nothing it changes.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import distributed, evaluation
from ..config import DEFAULT_MAX_MINUTES
from ..data import packing, tokenization
from ..errors import Notice, Progress, TrainingError
from ..models import fsdp, lora
from ..models.memory import free_memory
from .setup import TrainingSetup

MEMORY_SLACK = 1.15  # what a process takes for each byte that a step keeps; 1.2 to 1.6 were measured (SmolLM2: 1.35)
MEASURED_STEPS = 4  # the first warms up and is not counted


@dataclass(frozen=True)
class RunEstimate:
    """What a run will cost, from a few real steps. Seconds, bytes, counts."""

    steps: int
    steps_per_epoch: int | None  # of a stream
    seconds_per_step: float
    training_seconds: float
    held_out_seconds: float
    peak_memory_bytes: int
    tokens_per_second: float
    truncated_share: float
    trained_parameters: int
    base_parameters: int
    adapter_bytes: int
    dtype: str
    load_in: str
    gradient_checkpointing: bool


def fit_to_memory(job: TrainingSetup) -> TrainingSetup:
    """The job as a step of it fits into the free memory: where `checkpointing` is left open, with it if that is what it takes.

    Raises TrainingError when a step will not fit, before it is tried.
    """
    config = job.config
    many, needed = step_memory(job)
    distributed.all_reduce_max(needed)  # by now all have their base in memory
    free = free_memory(job.base.device) // (distributed.local_world_size() if job.base.device.type == "cpu" else 1)
    if config.gradient_checkpointing == "auto":
        again = bool(distributed.all_reduce_max(needed > free))
        if again:
            job.enable_gradient_checkpointing()
            _, less = step_memory(job)
            job.notify(
                Notice(
                    f"A step takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free, so activations are "
                    f"computed again, which takes {less / 1e9:.1f} GB and longer (--gradient-checkpointing)."
                )
            )
            needed = less
        job = replace(job, config=config.model_copy(update={"gradient_checkpointing": "on" if again else "off"}))
    if distributed.all_reduce_max(needed > free):
        error = TrainingError(
            f"A step with {many:,} tokens takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free: lower "
            "--batch-size (--gradient-accumulation makes up for it) or --max-length"
            f"{', or choose --dtype bfloat16' if job.base.dtype == torch.float32 else ''}."
        )
        raise distributed.share_error(error)
    return job


def step_memory(job: TrainingSetup) -> tuple[int, int]:
    """Tokens of the longest batch, and bytes that its step takes at least beyond what is in memory.

    What a step keeps for its way back grows with its tokens, so it is counted on a few; the rest (the optimizer's two
    copies, the gradients, blocks of a split base) is known. With checkpointing, it is what goes into each block, and all of
    one block.
    """
    rows = tokenization.probe_sequences(len(job.base.tokenizer))
    blocks = [block for block in job.model.modules() if getattr(block, "gradient_checkpointing", None) is True]
    for block in blocks:
        block.gradient_checkpointing = False
    once, twice = _activation_bytes(job, rows[:1]), _activation_bytes(job, rows)
    growing = max(twice - once, 0) / len(rows[1])  # bytes a token; weights and masks are there once
    for block in blocks:
        block.gradient_checkpointing = True
    if blocks:
        growing = growing / len(blocks) + len(blocks) * job.model.config.hidden_size * job.base.dtype.itemsize
    longest = max(sum(map(len, job.sequences[index])) for index in range(len(job.sequences)))
    count = len(job.sequences)
    if job.config.streaming:  # of which these are the first
        longest, count = job.config.max_length, job.batch_size
    many = min(job.batch_size, count) * longest
    return many, int(MEMORY_SLACK * growing * many) + 3 * 4 * lora.count_parameters(job.model)[0] + fsdp.gathered_bytes(
        job.model
    )


def _activation_bytes(job: TrainingSetup, rows: Sequence[tokenization.TokenIds]) -> int:
    """Bytes that a step on one sequence of these rows keeps for its way back, weights that it needs there included."""
    model, base = job.model, job.base
    batch = job.collate([rows])
    kept: dict[int, tuple[Any, int]] = {}

    def keep(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        # Not by address: a split base gathers its blocks in the same place. Not the tensor: one that its own way back
        # holds is never let go.
        kept[storage._cdata] = storage, storage.nbytes()

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing), base.lm_head.skip_lm_head():
        inputs = {name: tensor.to(base.device) for name, tensor in batch.items() if name != "labels"}
        output = model(**inputs, use_cache=False)
    del output
    return sum(size for _, size in kept.values())


def profile_steps(job: TrainingSetup) -> RunEstimate:
    """A few real steps and one held-out batch against the clock, then everything as it was before. Of several processes the
    slowest counts, and the memory is that of one."""
    config, model, base = job.config, job.model, job.base
    batch_size = job.batch_size
    per_step = batch_size * config.gradient_accumulation
    longest = job.sequences.longest_first()
    spread = [longest[i * len(longest) // (per_step * MEASURED_STEPS)] for i in range(per_step * MEASURED_STEPS)]
    items = [longest[i % len(longest)] for i in range(per_step)] + spread[per_step:]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=job.learning_rate)
    seconds, predictions = [], []
    model.train()
    for step in range(MEASURED_STEPS):
        start, count = time.perf_counter(), 0
        for micro in range(config.gradient_accumulation):
            first = step * per_step + micro * batch_size
            batch = {
                name: tensor.to(base.device) for name, tensor in job.collate(items[first : first + batch_size]).items()
            }
            labels = batch.pop("labels")
            found = int((labels != packing.IGNORE_INDEX).sum())
            with base.lm_head.skip_lm_head():
                output = model(**batch, use_cache=False)
            (base.lm_head.nll(output.logits, labels).sum() / max(found, 1)).backward()
            count += found
        distributed.all_reduce_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(base.device)
        seconds.append(time.perf_counter() - start)
        predictions.append(max(count, 1))
        job.notify(Progress("measuring the speed", step + 1, MEASURED_STEPS))
    model.load_state_dict(before, strict=False)
    model.zero_grad(set_to_none=True)
    paces = (taken / count for taken, count in zip(seconds[1:], predictions[1:], strict=True))
    pace = distributed.all_reduce_max(statistics.median(paces))  # one slow moment of the machine does not count
    per_step_seconds = pace * statistics.fmean(predictions[1:])
    start = time.perf_counter()
    sample = sorted(job.held_out, key=len)[-4:]
    evaluation.measure_loss(model, base, sample)
    held_out_rate = distributed.all_reduce_max(time.perf_counter() - start) / sum(map(len, sample))
    trained, frozen = lora.count_parameters(model)
    steps = steps_for_stop_rule(job, per_step_seconds)
    return RunEstimate(
        steps=steps,
        steps_per_epoch=job.steps_per_epoch,
        seconds_per_step=per_step_seconds,
        training_seconds=steps * per_step_seconds,
        held_out_seconds=held_out_rate * sum(map(len, job.held_out)) * (2 + steps // (config.eval_every or steps + 1)),
        peak_memory_bytes=_peak_memory(base.device),
        tokens_per_second=distributed.world_size() / pace,
        truncated_share=job.truncated_rows / len(job.dataset.train),
        trained_parameters=trained,
        base_parameters=frozen,
        adapter_bytes=trained * 4,
        dtype=str(base.dtype).removeprefix("torch."),
        load_in=base.load_in,
        gradient_checkpointing=config.gradient_checkpointing == "on",
    )


def steps_for_stop_rule(job: TrainingSetup, seconds_per_step: float) -> int:
    """The steps that the stop rule of the configuration means at this speed."""
    config, epoch = job.config, job.steps_per_epoch
    if config.max_steps is not None:
        return config.max_steps
    if config.epochs is not None:
        assert epoch is not None  # the configuration sees to it
        return math.ceil(config.epochs * epoch)
    minutes = config.minutes if config.minutes is not None else DEFAULT_MAX_MINUTES
    steps = max(1, int(minutes * 60 / seconds_per_step))
    if config.minutes is None and epoch is None:
        job.notify(
            Notice(
                f"A stream has no end, so {DEFAULT_MAX_MINUTES} minutes of it are trained. Choose with --minutes or --max-steps."
            )
        )
    elif config.minutes is None and epoch is not None:
        if steps >= epoch:
            return epoch
        hours = epoch * seconds_per_step / 3600
        job.notify(
            Notice(
                f"One epoch would take {hours:.1f} hours, so {DEFAULT_MAX_MINUTES} minutes' worth of it is trained. Choose with "
                "--minutes, --epochs or --max-steps."
            )
        )
    return steps


def _synchronize(device: torch.device) -> None:
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
