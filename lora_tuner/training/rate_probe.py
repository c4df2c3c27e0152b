"""`--learning-rate probe`: short runs at different rates before a run, which then takes the best.

Not a sweep, whose trials are whole runs with an adapter each: these keep nothing but their losses,
begin at the same weights, and are measured on rows whose loss is not reported. A run that is
resumed has its rate in run.yaml and probes no more.
"""

import gc
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from transformers import set_seed

from .. import atomic_io, distributed
from ..adapters.gains import HeldOutLoss, paired_gain
from ..adapters.manifest import RateProbe, RateTrial
from ..errors import DivergedError, Notice, ProcessLostError, Progress, TrainingError
from .learning_rate import RATE_FACTOR, ProbePlan
from .loss_result import measure_adapter
from .setup import TrainingSetup
from .trainer import LoraTrainer

Losses = dict[float, HeldOutLoss | None]  # of each rate; None if its run diverged


def choose_learning_rate(setup: TrainingSetup, plan: ProbePlan) -> TrainingSetup:
    """Run the probe, and return the setup with the best rate; weights and gradients are as before.

    The default and both rates beside it are tried, then further ones while the best is the lowest
    or the highest of all.

    Raises:
        DivergedError: all runs diverged.
        TrainingError: another process has ended.
    """
    start, default = time.perf_counter(), setup.learning_rate
    losses: Losses = {}
    rate: float | None = default
    try:
        while rate is not None:
            losses[rate] = _held_out_loss(setup, plan, rate, f"learning rate {rate:g}")
            rate = next_rate(default, losses) if len(losses) < plan.runs else None
    except (RuntimeError, ProcessLostError) as error:
        if not isinstance(error, ProcessLostError) and not distributed.is_process_loss(error):
            raise
        text = "Another process of this run has ended while learning rates were tried: start the run again."
        raise distributed.share_error(TrainingError(text)) from error
    best = best_rate(losses)
    if losses[best] is None:
        lowest = min(losses)
        raise distributed.share_error(
            DivergedError(
                f"The runs diverged at all learning rates tried, {lowest:g} the lowest: give a lower one."
            )
        )
    probe = RateProbe(
        learning_rate=best,
        steps=plan.steps,
        rows=len(plan.rows),
        reported_rows=plan.reported,
        seconds=round(time.perf_counter() - start, 3),
        trials=_trials(losses, best),
    )
    tried = ", ".join(
        f"{trial.learning_rate:g} {'diverged' if trial.loss is None else f'{trial.loss:.3f}'}"
        for trial in probe.trials
    )
    setup.notify(
        Notice(f"Learning rate {best:g} (--learning-rate), from the probe. Held-out losses after it: {tried}.")
    )
    config = setup.config.model_copy(update={"learning_rate": best})
    return replace(setup, config=config, learning_rate=best, probe_plan=None, probe=probe)


def next_rate(default: float, losses: Losses) -> float | None:
    """Return the next rate to try; None if the best one has a worse one on each side."""
    for factor in (1 / RATE_FACTOR, RATE_FACTOR):
        if (beside := _rounded(default * factor)) not in losses:
            return beside
    best = best_rate(losses)
    if best == min(losses):
        return _rounded(best / RATE_FACTOR)
    return _rounded(best * RATE_FACTOR) if best == max(losses) else None


def best_rate(losses: Losses) -> float:
    """Return the rate with the lowest loss, of equal ones the lowest rate."""
    return min(sorted(losses), key=lambda rate: math.inf if (loss := losses[rate]) is None else loss.loss)


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def _trials(losses: Losses, best: float) -> list[RateTrial]:
    trials = []
    for rate, loss in sorted(losses.items()):
        best_loss = losses[best]
        if loss is None or best_loss is None:
            trials.append(RateTrial(learning_rate=rate))
        else:
            gap = paired_gain(loss, best_loss)
            error = gap.standard_error
            trials.append(RateTrial(learning_rate=rate, loss=loss.loss, gap=gap.gain, standard_error=error))
    return trials


def _held_out_loss(setup: TrainingSetup, plan: ProbePlan, rate: float, stage: str) -> HeldOutLoss | None:
    """Train for a few steps, and return the loss on the rows that choose; None if the run diverges.

    A stream is not opened: the first rows of it are in memory.
    """

    def notify(event: Notice | Progress) -> None:
        if isinstance(event, Progress):
            setup.notify(replace(event, stage=f"{stage}: {event.stage}"))

    changes: dict[str, object] = {
        "learning_rate": rate,
        "max_steps": plan.steps,
        "eval_every": None,
        "patience": None,
        "report_to": [],
        "streaming": False,
    }
    trial = replace(
        setup,
        config=setup.config.model_copy(update=changes),
        learning_rate=rate,
        max_steps=plan.steps,
        held_out=plan.rows,
        streaming=False,
        curve=None,
        notify=notify,
    )
    trained = [parameter for parameter in setup.model.parameters() if parameter.requires_grad]
    weights = [parameter.detach().clone() for parameter in trained]
    set_seed(setup.config.seed + distributed.rank())
    try:
        with atomic_io.temporary_folder(setup.config.runs_dir) as folder:
            return replace(_train_and_measure(trial, folder), groups=plan.groups)
    except DivergedError:
        return None
    finally:
        for parameter, before in zip(trained, weights, strict=True):
            parameter.data.copy_(before)
        setup.model.zero_grad(set_to_none=True)
        gc.collect()  # the optimizer, and what averages gradients over processes


def _train_and_measure(trial: TrainingSetup, folder: Path) -> HeldOutLoss:
    trainer = _TrialTrainer(trial, folder)
    trainer.train()
    return trainer.check_finite(measure_adapter(trial))


class _TrialTrainer(LoraTrainer):
    """A trainer that saves nothing."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        """Do nothing: the weights are not kept."""

    def save_last_good_and_raise(self, problem: str) -> NoReturn:
        raise DivergedError(problem)  # in all processes alike
