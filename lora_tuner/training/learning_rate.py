"""The default learning rate of a run, and the plan of a probe that looks for a better one.

The rate that serves a short run best is higher than that of a long one (Bjorck et al., 2024,
arXiv:2409.19913), so a probe of too few steps is refused. SmolLM2-135M on first sentences of
reviews: of 6.3e-4, 2e-3 and 6.3e-3 the highest had the lowest loss after 10 steps, by 0.08 nats,
and 2e-3 after 20 and 40 steps (by 0.15 and 0.12), as after 250, where 6.3e-3 lost 0.27.
"""

import itertools
import math
from dataclasses import dataclass

from peft import PeftModel

from .. import evaluation
from ..config import METHODS
from ..data.tokenization import TokenIds
from ..text import format_duration
from .inputs import TrainingInputs
from .profiling import MEASURED_STEPS, StepProfile

PROBE_SHARE = 1 / 5  # of the steps of the run
MAX_RUNS, MIN_RUNS = 5, 3
MAX_STEPS, MIN_STEPS = 200, 20  # of each
MAX_ROWS, MIN_ROWS = 64, 8  # that choose
RATE_FACTOR = math.sqrt(10)  # between the rates of two runs


def default_learning_rate(inputs: TrainingInputs, model: PeftModel) -> tuple[float, str]:
    """Return the peak learning rate of a run that names none, and its origin, as notices name it.

    It depends on the arguments alone and is the same in all processes; they are left as they are.

    Args:
        inputs: base, method and data.
        model: the base with LoRA layers before the first step.
    """
    return METHODS[inputs.method].learning_rate, f"from the method {inputs.method}"


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
            f"Learning rates around {rate:g} are tried first (--learning-rate probe): at most {self.runs} runs of "
            f"{self.steps} steps on the same data, each measured on {len(self.rows)} held-out rows. All cost at "
            f"most as much as {self.cost:,} steps, beside the {max_steps:,} of the run: about "
            f"{format_duration(self.seconds)}."
        )
        if self.reported:
            text += (
                " Too few rows are held out beyond those of the gain, so these choose the rate too: the gain will "
                "be slightly too good."
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
        return f"{len(rows)} held-out rows are too few to choose a learning rate by ({MIN_ROWS} at least)"
    tokens = sum(map(len, inputs.sequences.rows))
    tokens_per_step = inputs.sequences_per_step * tokens / len(inputs.sequences)
    ends = [*itertools.accumulate(len(row) / tokens_per_step for row in rows)]  # in steps
    least = MIN_STEPS + ends[MIN_ROWS - 1]  # of a run
    budget = int(max_steps * share) - MEASURED_STEPS
    runs = min(MAX_RUNS, int(budget / least))
    if runs < MIN_RUNS:
        needed = math.ceil((math.ceil(MIN_RUNS * least) + MEASURED_STEPS) / share)
        return (
            f"{PROBE_SHARE:.0%} of {max_steps:,} steps is too little to try learning rates ({needed:,} would do)"
        )
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
    encoded = evaluation.encode_measured(inputs.base, texts, {})
    if len(encoded) < MIN_ROWS:
        return inputs.held_out[:MAX_ROWS], inputs.measured_texts[:MAX_ROWS], True
    return [*encoded.values()], [texts[index] for index in encoded], False
