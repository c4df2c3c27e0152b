"""Texts of base and adapter for a few prompts: at the start of a run, at points of its curve and at its end."""

import math
import time
from collections.abc import Sequence
from statistics import median

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import distributed
from ..adapters.samples import Sample
from ..errors import ConfigError, Notice, first_line
from ..inference.samples import PromptSampler
from ..models import fsdp
from .arguments import log_samples
from .live import LogEntry
from .profiling import CURVE_PARTS
from .progress import fit_width
from .setup import TrainingSetup

TIME_SHARE = 0.028  # of a run; one of less than SHORT_RUN seconds may take as much as one of that length
SHORT_RUN = 300
SHOWN_WIDTHS = 18, 29, 29  # of prompt, base and adapter, so that a line fits a terminal
MAX_POINTS = 100  # of a run


class RunSamples(TrainerCallback):
    """Samples of a run, in the log of Trainer's state: with each checkpoint, so that a resumed run has all of them.

    An error costs the samples, with a notice, not the run.

    Raises:
        LoraTunerError: a prompt that was given cannot be used.
    """

    def __init__(self, setup: TrainingSetup) -> None:
        self.setup, self.prompts, self.is_chat = setup, setup.sample_prompts, setup.manifest.is_chat
        self.trackers: Sequence[TrainerCallback] = ()
        self.base_texts: list[str] = []
        self.base_cut: list[bool] = []
        self.sampler: PromptSampler | None = None
        self.seconds = self.last_seconds = 0.0  # of generating: not in the log yet; of the last time
        self.has_skipped = False
        if fsdp.shard_count() > 1:
            self._give_up("the base is divided among processes")
            if setup.config.sample_prompt:
                raise distributed.share_error(
                    ConfigError("sample_prompt: FSDP divides the base, so it cannot generate: leave it out.")
                )
        elif not self.prompts:
            self._give_up("no held-out row has a beginning that can be a prompt")
        else:
            try:
                self.sampler = PromptSampler(setup.base, self.prompts, chat=self.is_chat)
            except Exception as error:  # tokenizers and templates raise errors of any type
                if setup.config.sample_prompt:
                    raise ConfigError(f"sample_prompt: {first_line(error).rstrip('.')}.") from error
                self._give_up(first_line(error))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            self._generate_base(state)
            if not state.global_step:
                self._take(state, 0, is_base=self.setup.parent is None and self.setup.added is None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        step = state.global_step
        every = self.setup.eval_every or math.ceil(state.max_steps / CURVE_PARTS)
        if "loss" not in (logs or {}) or not state.is_world_process_zero:
            return
        if step == state.max_steps:  # the end of the run shows them
            self._take(state, step, is_shown=False)
        elif step % every == 0 and self.sampler:
            if self._is_affordable(state):
                self._take(state, step)
            elif not self.has_skipped:
                self.has_skipped = True
                self.setup.notify(
                    Notice(
                        f"Step {step} and some later ones have no samples: these may take at most 3% of the run."
                    )
                )

    def finish(self, state: TrainerState, step: int) -> list[Sample]:
        """Return all samples, in order. Those of the step whose weights the model has are among them."""
        if all(entry["step"] != step for entry in _entries(state)):
            self._generate_base(state)
            self._take(state, step, is_shown=False)
        samples = [Sample(**sample) for entry in _entries(state) for sample in entry["samples"]]
        return sorted(samples, key=lambda sample: sample.step)

    def _generate_base(self, state: TrainerState) -> None:
        """Generate the texts of the base, unless they are in the log."""
        last = _entries(state)[-1]["samples"] if _entries(state) else []
        if [sample["prompt"] for sample in last] == self.prompts:
            self.base_texts = [sample["base"] for sample in last]
            self.base_cut = [sample.get("base_cut", False) for sample in last]
        elif not self.base_texts:
            with self.setup.model.disable_adapter():
                self.base_texts = self._generate(state)
            self.base_cut = self.sampler.are_cut if self.sampler else []

    def _take(self, state: TrainerState, step: int, *, is_base: bool = False, is_shown: bool = True) -> None:
        """Put the texts of the adapter into log and trackers; `is_base`: they are those of the base."""
        texts = self.base_texts if is_base else self._generate(state)
        if self.sampler is None:
            return
        cut = self.base_cut if is_base else self.sampler.are_cut
        facts = zip(self.prompts, self.base_texts, texts, self.base_cut, cut, strict=True)
        samples = [
            Sample(
                step=step,
                prompt=prompt,
                base=base,
                adapter=text,
                chat=self.is_chat,
                base_cut=base_cut,
                adapter_cut=adapter_cut,
            )
            for prompt, base, text, base_cut, adapter_cut in facts
        ]
        entry = {"samples": [sample.model_dump() for sample in samples], "sample_seconds": self.seconds}
        log: list[LogEntry] = state.log_history
        log.append({"step": step, **entry})
        self.seconds = 0.0
        log_samples(self.trackers, samples)
        if is_shown:
            rows = [(f"Step {step} samples", "base", "" if is_base else "adapter")]
            rows += [(*sample.shown[:2], "" if is_base else sample.shown[2]) for sample in samples]
            for row in rows:
                self.setup.notify(Notice("  ".join(map(fit_width, row, SHOWN_WIDTHS)).rstrip()))

    def _generate(self, state: TrainerState) -> list[str]:
        """Return a text for each prompt. What is not ready after a quarter of the budget is cut off."""
        if self.sampler is None:
            return []
        start, texts = time.perf_counter(), list[str]()
        try:
            texts = self.sampler.generate(_budget(state) / 4)
        except Exception as error:  # models raise errors of any type
            self._give_up(first_line(error))
        self.last_seconds = time.perf_counter() - start
        self.seconds += self.last_seconds
        return texts

    def _is_affordable(self, state: TrainerState) -> bool:
        """Return whether samples between start and end, with half of the budget, have one left for this step."""
        between = [entry["sample_seconds"] for entry in _entries(state) if entry["step"]]
        spent, most = sum(between), _budget(state) / 2
        last = max((entry["step"] for entry in _entries(state)), default=0)
        is_far = state.global_step - last >= state.max_steps / MAX_POINTS
        is_its_turn = spent <= most * state.global_step / state.max_steps
        return is_far and is_its_turn and spent + self.last_seconds <= most

    def _give_up(self, why: str) -> None:
        more = "more " if self.base_texts else ""
        self.setup.notify(Notice(f"No {more}samples of the adapter were generated: {why.rstrip('.')}."))
        self.sampler = None


def _entries(state: TrainerState) -> list[LogEntry]:
    return [entry for entry in state.log_history if "samples" in entry]


def _budget(state: TrainerState) -> float:
    """Return the seconds that all samples of a run may take, from the time of its steps so far."""
    seconds = [entry["seconds"] for entry in state.log_history if "loss" in entry]
    return TIME_SHARE * max(median(seconds or [0.0]) * state.max_steps, SHORT_RUN)
