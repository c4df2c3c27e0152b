"""Measure memory and time of training steps before a run, and estimate what the run costs.

A time limit is never a stop rule while training runs: it becomes a number of steps here, and
`run.yaml` holds that number, so that a run can be repeated step for step. Measuring takes some
seconds and leaves the weights as they were.
"""

import itertools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel

from .. import distributed
from ..adapters.summaries import Summary, Table, to_html
from ..config import DEFAULT_MAX_MINUTES, TrainConfig
from ..data import tokenization
from ..data.packing import PackedRows
from ..errors import EventHandler, Notice, Progress, TrainingError
from ..evaluation import held_out_loss
from ..models import fsdp, lora
from ..models.base_files import quiet_transformers
from ..models.memory import free_memory
from ..text import describe_coverage, format_bytes, format_duration, format_rows, format_share
from .inputs import TrainingInputs, count_labels

MEMORY_SLACK = 1.15  # process memory per byte that a step keeps; 1.2 to 1.6 were measured
MEASURED_STEPS = 4  # the first one warms up and is not counted
CURVE_PARTS, FEWEST_PARTS = 8, 5  # of a run, between which the held-out curve has a point
CURVE_SHARE = 0.03  # of the time of the run, at most; of a short run more:
SHORT_CURVE_SHARE, SHORT_CURVE_TOKENS = 0.2, 5_120  # the smaller of both; seconds on two CPU cores
CURVE_ROWS = 2, 64  # at least and at most
HELD_OUT_COST = 0.5  # time of a held-out token, in trained tokens; 0.42 to 0.45 were measured
GENERAL_SHARE = 0.03  # of the time of the run, measurements included, that general text may take


@dataclass(frozen=True)
class StepProfile:
    """Measured cost of a step and of held-out tokens, in the slowest of several processes."""

    seconds_per_step: float
    tokens_per_second: float  # of all processes
    seconds_per_held_out_token: float
    peak_memory_bytes: int  # of this process


@dataclass(frozen=True)
class RunEstimate:
    """Costs of a run, estimated from a few real steps: seconds, bytes, counts.

    `probe_steps` are those that a probe of the learning rate costs at most, before the run, and
    `reference_seconds` what the reference log-probabilities of preferences cost.
    """

    steps: int
    steps_per_epoch: int | None  #: None for a stream
    advice: str | None  #: on so many passes over the same rows
    seconds_per_step: float
    training_seconds: float
    learning_rate: float
    learning_rate_origin: str  #: its reason, in words
    probe_steps: int
    probe_seconds: float
    reference_seconds: float
    held_out_seconds: float  #: for all measurements of the held-out loss, at most
    peak_memory_bytes: int
    tokens_per_second: float
    used_share: float  #: of the tokens of the training rows
    truncated_rows: int  #: rows that lose their end
    coverage: float  #: share of the block weights in adapted layers
    not_adapted: list[str]  #: other weights of the blocks, with their share
    trained_parameters: int
    base_parameters: int
    adapter_bytes: int
    dtype: str
    load_in: str
    gradient_checkpointing: bool

    def summary(self) -> Summary:
        """A table of the costs, and the advice."""
        total = self.base_parameters + self.trained_parameters
        epoch = f" (one epoch: {self.steps_per_epoch:,})" if self.steps_per_epoch else ""
        precision = self.dtype if self.load_in == "full" else self.load_in
        checkpointing = ", gradient checkpointing" if self.gradient_checkpointing else ""
        probe = f"at most {self.probe_steps:,} steps, {format_duration(self.probe_seconds)}"
        cut = f"; {format_rows(self.truncated_rows)} cut" if self.truncated_rows else ""
        trained = f"{self.trained_parameters:,} of {total:,} ({self.trained_parameters / total:.2%})"
        rows = [
            ("steps", f"{self.steps:,}{epoch}"),
            ("seconds per step", f"{self.seconds_per_step:.2f} ({self.tokens_per_second:,.0f} tokens/s)"),
            ("training", format_duration(self.training_seconds)),
            ("learning rate", f"{self.learning_rate:g}, {self.learning_rate_origin}"),
            *([("probe of it", probe)] if self.probe_steps else []),
            *([("reference", format_duration(reference))] if (reference := self.reference_seconds) else []),
            ("evaluation", f"at most {format_duration(self.held_out_seconds)}"),
            ("peak memory", format_bytes(self.peak_memory_bytes)),
            ("base", precision + checkpointing),
            ("text used", format_share(self.used_share) + cut),
            ("coverage", describe_coverage(self.coverage, self.not_adapted)),
            ("trained parameters", trained),
            ("adapter", format_bytes(self.adapter_bytes)),
        ]
        return [Table(rows), *([self.advice] if self.advice else [])]

    def _repr_html_(self) -> str:
        return to_html(self.summary())


@dataclass(frozen=True)
class HeldOutCurve:
    """Held-out rows, by their indices, that are measured every `every` steps of a run."""

    every: int
    rows: list[int]


def plan_curve(inputs: TrainingInputs, max_steps: int, *, is_short_allowed: bool = True) -> HeldOutCurve | None:
    """Choose the rows of the held-out curve of a run that names no `eval_every`.

    They are the first rows, in hash order, that fit into a share of the run, or into a few thousand
    tokens of a short one, by counts of tokens alone: the same ones when it is repeated or resumed.

    Args:
        is_short_allowed: short runs have one too; before they had none.

    Returns:
        The curve, or None where even two rows would take more.
    """
    trained = max_steps * tokens_per_step(inputs)
    tokens = CURVE_SHARE * trained / HELD_OUT_COST
    short = min(SHORT_CURVE_SHARE * trained / HELD_OUT_COST, SHORT_CURVE_TOKENS)
    if not is_short_allowed or short <= tokens or max_steps <= CURVE_PARTS:
        return _fit_curve(inputs, max_steps, CURVE_PARTS, tokens)
    curves = (_fit_curve(inputs, max_steps, parts, short, 0.5) for parts in (CURVE_PARTS, FEWEST_PARTS))
    return next(filter(None, curves), None)


def _fit_curve(
    inputs: TrainingInputs, max_steps: int, parts: int, tokens: float, longest: float = 1.0
) -> HeldOutCurve | None:
    """Return a curve of at most so many held-out tokens; `longest`: share of the first row in a point."""
    every = math.ceil(max_steps / parts)
    points = math.ceil(max_steps / every)  # Trainer measures after the last step too
    least, most = CURVE_ROWS
    left, rows = tokens / points, list[int]()
    for index, row in enumerate(inputs.held_out):
        if len(row) <= left * (1.0 if rows else longest) and len(rows) < most:
            rows.append(index)
            left -= len(row)
    return HeldOutCurve(every, rows) if points > 1 and len(rows) >= least else None


def general_budget(inputs: TrainingInputs, trained_tokens: int) -> int:
    """Return how many tokens of general text a run may measure, by counts of tokens alone."""
    held_out_tokens = sum(map(len, inputs.held_out))  # measured before and after
    return int(GENERAL_SHARE * (trained_tokens / HELD_OUT_COST + 2 * held_out_tokens))


def tokens_per_step(inputs: TrainingInputs) -> float:
    """Return the mean number of tokens in an optimizer step, with the weights of the datasets."""
    sequences, sizes = inputs.sequences, inputs.sequences.source_sizes
    lengths = (sum(map(len, sequences[index])) for index in range(len(sequences)))
    means = [statistics.fmean(itertools.islice(lengths, size)) for size in sizes]
    mean = statistics.fmean(means, weights=inputs.dataset.weights or sizes)
    return inputs.sequences_per_step * mean


# Memory


def fit_to_memory(
    inputs: TrainingInputs, model: PeftModel, mode: Literal["auto", "on", "off"], notify: EventHandler
) -> bool:
    """Enable gradient checkpointing on the model if `mode` or the free memory requires it.

    Returns:
        Whether it is enabled.

    Raises:
        TrainingError: a step does not fit into the free memory.
    """
    base, enabled = inputs.base, mode == "on"
    if enabled:
        enable_gradient_checkpointing(inputs, model)
    tokens, needed = step_memory(inputs, model)
    distributed.all_reduce_max(needed)  # now all processes have loaded their base
    free = free_memory(base.device) // (distributed.local_world_size() if base.device.type == "cpu" else 1)
    if mode == "auto" and distributed.all_reduce_max(needed > free):
        enabled = True
        enable_gradient_checkpointing(inputs, model)
        required, needed = needed, step_memory(inputs, model)[1]
        notify(
            Notice(
                f"A step needs {required / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are "
                f"free, so gradient checkpointing is on: it needs {needed / 1e9:.1f} GB and is "
                "slower (--gradient-checkpointing)."
            )
        )
    if distributed.all_reduce_max(needed > free):
        raise distributed.share_error(
            TrainingError(
                f"A step with {tokens:,} tokens needs {needed / 1e9:.1f} GB of memory, and "
                f"{free / 1e9:.1f} GB are free: lower --batch-size (and raise "
                "--gradient-accumulation) or --max-length"
                f"{', or use --dtype bfloat16' if base.dtype == torch.float32 else ''}."
            )
        )
    return enabled


def enable_gradient_checkpointing(inputs: TrainingInputs, model: PeftModel) -> None:
    """Keep only the input of each block, and recompute the rest in the backward pass.

    The gradients are the same (Chen et al., 2016, arXiv:1604.06174).

    Raises:
        TrainingError: the model does not support it.
    """
    try:
        with quiet_transformers():
            model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise TrainingError(
            f"{inputs.base.files.name} does not support gradient checkpointing: {error}"
        ) from error


def step_memory(inputs: TrainingInputs, model: PeftModel) -> tuple[int, int]:
    """Return the tokens of the longest batch, and the bytes that its step takes at least.

    Activations grow with the tokens, so they are counted on a few and scaled. The optimizer states,
    the gradients and the gathered blocks of a sharded base are known. With gradient checkpointing
    the activations are the inputs of all blocks and everything inside one block.
    """
    base = inputs.base
    row = np.concatenate(base.probe_sequences())[: max(base.max_context // 2, 1)]
    blocks: list[Any] = [
        block for block in model.modules() if getattr(block, "gradient_checkpointing", None) is True
    ]
    for block in blocks:
        block.gradient_checkpointing = False
    one_row, two_rows = (_activation_bytes(inputs, model, [row] * count) for count in (1, 2))
    per_token = max(two_rows - one_row, 0) / len(row)  # without weights and masks
    for block in blocks:
        block.gradient_checkpointing = True
    if blocks:
        hidden_size = base.model.config.get_text_config().hidden_size
        per_token = per_token / len(blocks) + len(blocks) * hidden_size * base.dtype.itemsize
    count = len(inputs.sequences)
    longest = max(sum(map(len, inputs.sequences[index])) for index in range(count))
    tokens = min(inputs.batch_size, count) * longest
    if inputs.streaming:  # the rest of the stream is unknown
        tokens = inputs.batch_size * inputs.max_length
    return tokens, (
        int(MEMORY_SLACK * per_token * tokens)
        + 3 * 4 * lora.count_parameters(model)[0]
        + fsdp.gathered_bytes(model)
    )


def _activation_bytes(inputs: TrainingInputs, model: PeftModel, rows: Sequence[tokenization.TokenIds]) -> int:
    """Return the bytes kept for the backward pass of one packed sequence, with weights."""
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def keep(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        # Not by address, which the gathered blocks of a sharded base share; not the tensor itself,
        # which would keep its own graph alive.
        kept[storage._cdata] = storage, storage.nbytes()

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        inputs.forward(model, inputs.collate([PackedRows(rows)]))
    return sum(size for _, size in kept.values())


# Time


def profile_steps(
    inputs: TrainingInputs, model: PeftModel, learning_rate: float, max_grad_norm: float, notify: EventHandler
) -> StepProfile:
    """Time a few training steps and a held-out batch, then restore the weights.

    The longest batch is among them.
    """
    batch_size, accumulation, device = inputs.batch_size, inputs.gradient_accumulation, inputs.base.device
    per_step = batch_size * accumulation
    longest = inputs.sequences.longest_first()
    spread = [longest[i * len(longest) // (per_step * MEASURED_STEPS)] for i in range(per_step * MEASURED_STEPS)]
    items = [longest[i % len(longest)] for i in range(per_step)] + spread[per_step:]
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trained = (p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, fused=True)  # as Trainer's
    seconds, predictions = [], []
    model.train()
    for step in range(MEASURED_STEPS):
        start = time.perf_counter()
        firsts = range(step * per_step, (step + 1) * per_step, batch_size)
        batches = [inputs.collate(items[first : first + batch_size]) for first in firsts]
        count = inputs.count(batches)
        for batch in batches:
            inputs.loss(model, batch, count).backward()
        distributed.all_reduce_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
        predictions.append(count_labels(batches))
        notify(Progress("measuring speed", step + 1, MEASURED_STEPS))
    model.load_state_dict(weights, strict=False)
    model.zero_grad(set_to_none=True)
    paces = [taken / count for taken, count in zip(seconds[1:], predictions[1:], strict=True)]
    pace = distributed.all_reduce_max(statistics.median(paces))  # a median ignores one slow step
    start = time.perf_counter()
    sample = sorted(inputs.held_out, key=len)[-4:]
    held_out_loss.measure_loss(model, inputs.base, sample)
    held_out_seconds = distributed.all_reduce_max(time.perf_counter() - start)
    return StepProfile(
        seconds_per_step=pace * statistics.fmean(predictions[1:]),
        tokens_per_second=distributed.world_size() / pace,
        seconds_per_held_out_token=held_out_seconds / sum(map(len, sample)),
        peak_memory_bytes=peak_memory(device),
    )


def steps_for_stop_rule(
    requested: TrainConfig, steps_per_epoch: int | None, seconds_per_step: float | None, notify: EventHandler
) -> int:
    """Return the number of steps that the stop rule means.

    Args:
        steps_per_epoch: None for a stream.
        seconds_per_step: needed when neither `max_steps` nor `epochs` is set.
    """
    if requested.max_steps is not None:
        return requested.max_steps
    if requested.epochs is not None:
        assert steps_per_epoch is not None  # TrainConfig refuses epochs with streaming
        return math.ceil(requested.epochs * steps_per_epoch)
    assert seconds_per_step is not None
    if requested.minutes is not None:
        return max(1, int(requested.minutes * 60 / seconds_per_step))
    steps = max(1, int(DEFAULT_MAX_MINUTES * 60 / seconds_per_step))
    if steps_per_epoch is None:
        notify(
            Notice(
                f"A stream has no end, so training is limited to {DEFAULT_MAX_MINUTES} minutes. "
                "Change this with --minutes or --max-steps."
            )
        )
    elif steps < steps_per_epoch:
        notify(
            Notice(
                f"One epoch would take {steps_per_epoch * seconds_per_step / 3600:.1f} hours, so "
                f"training is limited to {DEFAULT_MAX_MINUTES} minutes. Change this with "
                "--minutes, --epochs or --max-steps."
            )
        )
    return min(steps, steps_per_epoch or steps)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: on CUDA by torch, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
