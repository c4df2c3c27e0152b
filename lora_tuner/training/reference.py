"""Log-probabilities that losses of preferences compare with: those of the model before its first step.

It is the base, or the adapter that the run continues. What it says of the rows that the run will see
is measured once and kept in the user's cache, so there is no second model in memory.
"""

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from .. import distributed
from ..adapters.gains import HeldOutLoss
from ..data.tokenization import TokenIds
from ..errors import BaseModelError, Notice
from ..evaluation import held_out_loss
from ..models import lora
from ..models.native import native_kernels
from ..text import format_count
from .setup import TrainingSetup


def with_reference(setup: TrainingSetup) -> TrainingSetup:
    """Return the setup with the reference of the rows that its run sees.

    It is measured on the model as it is, before its first step, and before a checkpoint is loaded.
    Price: a forward pass over these rows, if the user's cache does not have it.
    """
    objective, kinds = setup.objective, rows_to_measure(setup)
    if objective is None or not kinds:
        return setup
    count = format_count(len(kinds[0]) // objective.unit, "pair" if objective.name == "dpo" else "row")
    of = setup.parent.name if setup.parent else "the base"
    setup.notify(Notice(f"The reference is {of}: its log-probabilities of {count} are measured once."))
    numbers = torch.tensor([*itertools.chain.from_iterable(kinds)])
    kind = torch.arange(len(kinds)).repeat_interleave(len(kinds[0]))
    loss = measure_reference(setup, _rows(setup, kinds))
    reference = torch.full((len(kinds), len(objective.rows)), torch.nan, dtype=torch.float64)
    reference[kind, numbers] = -torch.tensor(loss.nll, dtype=torch.float64)
    return replace(setup, objective=replace(objective, reference=reference))


def rows_to_measure(setup: TrainingSetup) -> list[list[int]]:
    """Return the numbers of the rows that the run sees, with KTO also of the mismatched rows; none
    where nothing is compared with a reference."""
    objective = setup.objective
    if objective is None or objective.name == "orpo":
        return []
    seen = setup.sequences.rows_in_steps(
        setup.max_steps, setup.sequences_per_step, setup.config.seed, setup.dataset.weights
    )
    return [seen] * (2 if objective.name == "kto" else 1)


def count_tokens(setup: TrainingSetup) -> int:
    """Count the tokens that the reference is measured on."""
    return sum(map(len, _rows(setup, rows_to_measure(setup))))


def _rows(setup: TrainingSetup, kinds: list[list[int]]) -> list[TokenIds]:
    objective = setup.objective
    sources = (objective.rows, objective.mismatched) if objective else ()
    return [rows[number] for rows, numbers in zip(sources, kinds, strict=False) for number in numbers]


def measure_reference(setup: TrainingSetup, rows: Sequence[TokenIds]) -> HeldOutLoss:
    """Measure the model before its first step; kept in the user's cache.

    The trained weights follow from it to the last bit, so all that changes one is in its key.

    Raises:
        BaseModelError: a log-probability is not finite.
    """
    parent, kernels = setup.parent, native_kernels()
    key: list[object] = ["reference", held_out_loss.weights_key(parent) if parent else None]
    key += [torch.get_num_threads(), distributed.world_size(), kernels and kernels.build]
    key += sorted(lora.library_versions().items())
    stage = "reference log-probabilities"
    measure = partial(held_out_loss.measure_loss, setup.model, setup.base, rows, setup.notify, stage=stage)
    with contextlib.nullcontext() if parent else setup.model.disable_adapter():
        loss = held_out_loss.measure_cached(setup.base, rows, key, measure, setup.notify)
    if not all(map(math.isfinite, loss.nll)):
        name = parent.name if parent else setup.base.files.name
        raise BaseModelError(f"{name} gives a row no finite probability: try --dtype float32.")
    return loss
