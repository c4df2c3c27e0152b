"""The default learning rate of a run, and the plan of a probe that looks for a better one.

The default follows the base: Adam's first step moves each weight by the learning rate, whatever its
gradient, and what such a step changes in the text differs between bases of the same width. So one
step of that kind is tried at several rates (`benchmarks/rates.py` compares the result with the
best).

A run on preferences takes a share of the rate for text, whose loss is measured here for it too.

The rate that serves a short run best is higher than that of a long one (Bjorck et al., 2024,
arXiv:2409.19913), so a probe of too few steps is refused. SmolLM2-135M on first sentences of
reviews: of 6.3e-4, 2e-3 and 6.3e-3 the highest had the lowest loss after 10 steps, by 0.08 nats,
and 2e-3 after 20 and 40 steps (by 0.15 and 0.12), as after 250, where 6.3e-3 lost 0.27.
"""

import itertools
import math
import time
from dataclasses import dataclass

import torch
from peft import PeftModel

from .. import distributed
from ..config import METHODS, TrainConfig
from ..data.mixing import mix
from ..data.packing import PackedRows
from ..data.tokenization import TokenIds, count_predictions
from ..errors import EventHandler, Notice, Progress, ignore_events
from ..evaluation import held_out_loss
from ..text import format_count, format_duration
from .inputs import TrainingInputs, count_labels
from .profiling import MEASURED_STEPS, StepProfile, tokens_per_step

STEP_SHARE = 0.4  # of the best single step: the rate of a run (benchmarks/RESULTS.md, rates)
FIRST_STEP, MAX_TRIES = 2e-3, 10  # length of the first step tried, and how many lengths are
MIN_TOKENS, MAX_TOKENS = 1_000, 4_000  # of each of two samples: learned at least, in all at most
LOWEST_RATE, HIGHEST_RATE = 1e-5, 4e-3
# Shares of the rate for text (benchmarks/RESULTS.md, preferences and labels); of labels few are in a step.
RATE_SHARES, LABEL_RATE_SHARE = {"dpo": 0.1, "orpo": 0.5, "kto": 0.25}, 0.25
PROBE_SHARE = 1 / 5  # of the steps of the run
MAX_RUNS, MIN_RUNS = 5, 3
MAX_STEPS, MIN_STEPS = 200, 20  # of each
MAX_ROWS, MIN_ROWS = 64, 8  # that choose
RATE_FACTOR = math.sqrt(10)  # between the rates of two runs

Batch = dict[str, torch.Tensor]


def default_learning_rate(
    inputs: TrainingInputs, model: PeftModel, notify: EventHandler = ignore_events
) -> tuple[float, str]:
    """Return the peak learning rate of a run that names none, and its origin, a phrase for notices.

    The weights B make one step against the sign of their gradient on some sequences, as in Adam's
    first step. The rate is a share of the length that lowers the loss of other sequences most. It
    depends on base, data and LoRA settings alone, and is the same in all processes. The model is
    left as it was.

    Args:
        inputs: base, method and data.
        model: the base with LoRA layers before the first step.
    """
    start, method = time.perf_counter(), METHODS[inputs.method]
    share, of_share = 1.0, ""
    if inputs.objective is not None:
        share = RATE_SHARES[inputs.objective.name]
        of_share = f", times {share:g} for {inputs.objective.name}"
    elif inputs.dataset.labels:
        share, of_share = LABEL_RATE_SHARE, f", times {LABEL_RATE_SHARE:g} for labels"
    stepped, others = _two_samples(inputs)
    best = _best_step(inputs, model, stepped, others, notify) if others else None
    if best is None:
        why = "no step on the base lowers its loss" if others else "measuring one takes two sequences"
        return share * method.learning_rate, f"from the method {inputs.method}, as {why}{of_share}"
    measured, lowest, highest = (
        rate * method.rate_share for rate in (STEP_SHARE * best, LOWEST_RATE, HIGHEST_RATE)
    )
    origin = f"measured on the base in {format_duration(time.perf_counter() - start)}"
    if measured > highest:
        origin += f" ({measured:.2g}, but a default is at most {highest:g})"
    if measured < lowest:
        origin += f" ({measured:.2g}, but a default is at least {lowest:g})"
    return float(f"{share * min(max(measured, lowest), highest):.2g}"), origin + of_share


def _two_samples(inputs: TrainingInputs) -> tuple[list[Batch], list[Batch]]:
    """Return batches of different sequences, each list of the size of an optimizer step or more.

    Datasets with weights have their shares of each list, as in the run: a small one is repeated,
    and one of a single sequence is in both lists. Empty lists if there are fewer than two sequences.
    """
    sequences, weights = inputs.sequences, inputs.dataset.weights or [1.0]
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0)).tolist()
    pairs: list[list[tuple[int, int]]] = []
    ends = itertools.accumulate(sequences.source_sizes, initial=0)
    for start, end in itertools.pairwise(ends):
        own = [index for index in order if start <= index < end]
        single = [(own[0], own[0])] if len(weights) > 1 else []
        pairs.append([*zip(own[::2], own[1::2], strict=False)] or single)
    draws = [itertools.cycle(own) for own in pairs]
    halves: tuple[list[PackedRows], list[PackedRows]] = ([], [])
    most = len(pairs) * max(map(len, pairs))  # without a repeated one if there is one source
    for number in itertools.islice(mix(weights), most):
        for half, index in zip(halves, next(draws[number]), strict=True):
            half.append(sequences[index])
        if len(halves[0]) >= inputs.sequences_per_step and all(map(_is_enough, halves)):
            break
    return _batches(inputs, halves[0]), _batches(inputs, halves[1])


def _batches(inputs: TrainingInputs, items: list[PackedRows]) -> list[Batch]:
    size = inputs.batch_size
    return [inputs.collate(items[start : start + size]) for start in range(0, len(items), size)]


def _is_enough(items: list[PackedRows]) -> bool:
    """Return whether sequences have enough tokens that are learned, or very many others."""
    rows = [row for item in items for row in item]
    return sum(map(count_predictions, rows)) >= MIN_TOKENS or sum(map(len, rows)) >= MAX_TOKENS


def _best_step(
    inputs: TrainingInputs, model: PeftModel, stepped: list[Batch], others: list[Batch], notify: EventHandler
) -> float | None:
    """Return the length of the sign step that lowers the loss of `others` most; None if none does."""
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_B." in name]
    before = [parameter.detach().clone() for parameter in parameters]
    notify(Progress("choosing the learning rate", 0, MAX_TRIES))
    model.train()
    device = inputs.base.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in stepped:
            inputs.text_loss(model, batch, count_labels(stepped)).backward()
    signs = [p.grad.sign() if p.grad is not None else torch.zeros_like(p) for p in parameters]
    model.zero_grad(set_to_none=True)
    losses: dict[float, float] = {}

    @torch.no_grad()
    def loss_after(length: float) -> float:
        if length not in losses:
            for parameter, start, sign in zip(parameters, before, signs, strict=True):
                parameter.copy_(start - length * sign)
            loss = sum(inputs.text_loss(model, batch, count_labels(others)).item() for batch in others)
            losses[length] = distributed.all_reduce_max(loss if math.isfinite(loss) else math.inf)
            notify(Progress("choosing the learning rate", min(len(losses), MAX_TRIES), MAX_TRIES))
        return losses[length]

    model.eval()
    try:
        best = FIRST_STEP
        factor = 2.0 if loss_after(2 * best) < loss_after(best) else 0.5
        while len(losses) < MAX_TRIES and loss_after(factor * best) < loss_after(best):
            best *= factor
        if loss_after(best) >= loss_after(0.0):
            return None
        return best * _lowest_point(*(loss_after(best * factor) for factor in (0.5, 1.0, 2.0)))
    finally:
        if len(losses) < MAX_TRIES:  # found with fewer
            notify(Progress("choosing the learning rate", MAX_TRIES, MAX_TRIES))
        with torch.no_grad():
            for parameter, start in zip(parameters, before, strict=True):
                parameter.copy_(start)


def _lowest_point(half: float, once: float, twice: float) -> float:
    """Return where between 0.5 and 2 a parabola is lowest, from its values at 0.5, 1 and 2."""
    slope_before, slope_after = (once - half) / 0.5, twice - once
    bend = (slope_after - slope_before) / 1.5
    if not (math.isfinite(bend) and bend > 0):
        return 1.0
    return min(max((1.5 - slope_before / bend) / 2, 0.5), 2.0)


@dataclass(frozen=True)
class ProbePlan:
    """Short runs at different learning rates, before the run itself.

    `rows` choose the rate, as token ids, `groups` has the number of the group of each, if rows are
    grouped; `reported` says that the gain is measured on them too. `cost` is that of all runs, in
    steps of the run.
    """

    runs: int  # at most
    steps: int  # of each
    rows: list[TokenIds]
    groups: list[int]
    reported: bool
    cost: int
    seconds: float

    def describe(self, rate: float, max_steps: int) -> str:
        """Describe the runs and their cost for a notice."""
        text = (
            f"Learning rates around {rate:g} are tried first (--learning-rate probe): at most "
            f"{self.runs} runs of {format_count(self.steps, 'step')} on the same data, each measured on "
            f"{len(self.rows)} held-out rows. All cost at most as much as {self.cost:,} steps, "
            f"beside the {max_steps:,} of the run: about {format_duration(self.seconds)}."
        )
        if self.reported:
            text += (
                " Too few rows are held out beyond those of the gain, so these choose the rate "
                "too: the gain will be slightly too good."
            )
        return text


def plan_probe(
    inputs: TrainingInputs, profile: StepProfile, max_steps: int, share: float = PROBE_SHARE
) -> ProbePlan | str:
    """Plan the runs that choose the learning rate, from counts of tokens alone: the same every time.

    A held-out token counts like a trained one, although it takes less time.

    Args:
        max_steps: steps of the run.
        share: of its cost that the probe may take.

    Returns:
        The plan, or the reason why a probe is not possible.
    """
    rows, texts, reported = _choosing_rows(inputs)
    if len(rows) < MIN_ROWS:
        return f"{format_count(len(rows), 'held-out row')} cannot choose a learning rate ({MIN_ROWS} at least)"
    trained_tokens = tokens_per_step(inputs)
    ends = [*itertools.accumulate(len(row) / trained_tokens for row in rows)]  # in steps
    least = MIN_STEPS + ends[MIN_ROWS - 1]  # of a run
    budget = int(max_steps * share) - MEASURED_STEPS
    runs = min(MAX_RUNS, int(budget / least))
    if runs < MIN_RUNS:
        needed = math.ceil((math.ceil(MIN_RUNS * least) + MEASURED_STEPS) / share)
        return f"{PROBE_SHARE:.0%} of {format_count(max_steps, 'step')} is too little to try learning rates ({needed:,} would do)"
    each = budget / runs
    count = max(MIN_ROWS, sum(end <= min(each / 3, each - MIN_STEPS) for end in ends))
    steps = min(MAX_STEPS, int(each - ends[count - 1] + 1e-9))
    measured_tokens = runs * sum(map(len, rows[:count]))
    return ProbePlan(
        runs=runs,
        steps=steps,
        rows=rows[:count],
        groups=inputs.dataset.groups_of(texts[:count]),
        reported=reported,
        cost=math.ceil(runs * (steps + ends[count - 1])) + MEASURED_STEPS,
        seconds=(runs * steps + MEASURED_STEPS) * profile.seconds_per_step
        + measured_tokens * profile.seconds_per_held_out_token,
    )


def plan_run_probe(
    requested: TrainConfig,
    inputs: TrainingInputs,
    profile: StepProfile,
    learning_rate: float,
    max_steps: int,
    notify: EventHandler,
) -> tuple[ProbePlan | None, int]:
    """Return the plan of a probe, if one is possible, and the steps of the run after it.

    Within --minutes the run has fewer steps, of which the probe takes a fifth.
    """
    is_within = requested.minutes is not None
    plan = plan_probe(inputs, profile, max_steps, PROBE_SHARE / (1 + PROBE_SHARE) if is_within else PROBE_SHARE)
    if isinstance(plan, str):
        notify(Notice(f"No probe of the learning rate: {plan}. The run takes {learning_rate:g}."))
        return None, max_steps
    max_steps -= plan.cost if is_within else 0
    ending = f" Both together take --minutes {requested.minutes:g}." if is_within else ""
    notify(Notice(plan.describe(learning_rate, max_steps) + ending))
    return plan, max_steps


def _choosing_rows(inputs: TrainingInputs) -> tuple[list[TokenIds], list[str], bool]:
    """Return the first held-out rows whose loss is not reported, without the groups of those whose is.

    Where they are too few: those that are reported.

    Returns:
        The rows, their texts, and whether they are reported.
    """
    dataset, reported = inputs.dataset, set(inputs.held_out_texts)
    groups = dataset.held_out_groups
    reported_groups = {groups[text] for text in reported if text in groups}
    others = (
        text for text in dataset.held_out if text not in reported and groups.get(text) not in reported_groups
    )
    texts = [*itertools.islice(others, MAX_ROWS)]
    encoded = held_out_loss.encode_measured(inputs.base, texts, {})
    if len(encoded) < MIN_ROWS:
        return inputs.held_out[:MAX_ROWS], inputs.measured_texts[:MAX_ROWS], True
    return [*encoded.values()], [texts[index] for index in encoded], False
