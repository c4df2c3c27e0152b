"""Held-out figures of preferences, a part of `manifest.json`."""

from typing import Literal

from pydantic import BaseModel

from ..text import format_count, format_gain


class _Figures(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Refuses unknown fields and numbers that are not finite."""


class PairedFigure(_Figures):
    """A figure of base and adapter on the same held-out rows; `change` is the paired difference.

    Errors are standard errors, None where nothing is known about them.
    """

    base: float
    base_error: float | None
    adapter: float
    error: float | None
    change: float
    change_error: float | None

    def format_change(self, note: str = "") -> str:
        change = format_gain(self.change, self.change_error, "+.3f")
        return f"{self.base:.3f} -> {self.adapter:.3f}  ({change}{note})"


class PairsByLength(_Figures):
    """Accuracy on the held-out pairs of which the chosen answer is the shorter one, or the longer one."""

    pairs: int
    accuracy: PairedFigure


class PreferenceInfo(_Figures):
    """Figures of a run on preferences, on held-out pairs or, of KTO, held-out answers.

    `accuracy` is the share of pairs of which the chosen answer has the higher mean log-probability per
    token, `margin` the mean difference of the two in nats per token; of KTO each desired answer is
    compared with each undesired one. `reward_accuracy` compares sums of log-probabilities less those of
    the reference, as DPO and KTO do, and is None of ORPO. Pairs, of KTO answers, with one prompt
    count as a group in errors.
    """

    objective: Literal["dpo", "orpo", "kto"]
    beta: float
    reference: Literal["base", "parent"] | None
    weights: tuple[float, float] | None = None  # KTO: of a desired and of an undesired answer
    rows: int  # pairs; of KTO desired answers
    undesired: int | None = None  # KTO: undesired answers
    groups: int | None = None  # prompts, if fewer than pairs, or of KTO answers
    accuracy: PairedFigure
    margin: PairedFigure
    reward_accuracy: float | None = None
    reward_error: float | None = None
    shorter: PairsByLength | None = None
    longer: PairsByLength | None = None

    def describe_rows(self) -> str:
        groups = f" of {format_count(self.groups, 'prompt')}" if self.groups else ""
        if self.undesired is not None:
            kinds = f"{self.rows:,} desired and {self.undesired:,} undesired"
            return f"{kinds} held-out answers{groups}"
        return f"{format_count(self.rows, 'held-out pair')}{groups}"

    def describe_settings(self) -> str:
        text = f"{self.objective}, beta {self.beta:g}"
        if self.reference:
            text += f", reference: the {self.reference}"
        if self.weights and max(self.weights) > 1:
            text += f", weights {self.weights[0]:.3g} (desired) and {self.weights[1]:.3g} (undesired)"
        return text

    def lines(self) -> list[tuple[str, str]]:
        """Name and text of each figure, from base to adapter."""
        rows = [
            ("preference accuracy", self.accuracy.format_change(f", {self.describe_rows()}")),
            ("preference margin", self.margin.format_change(" nats per token")),
        ]
        by_length = [
            f"{part.accuracy.base:.3f} -> {part.accuracy.adapter:.3f} chosen {name} ({part.pairs:,})"
            for name, part in (("shorter", self.shorter), ("longer", self.longer))
            if part is not None
        ]
        return [*rows, *([("accuracy by length", ", ".join(by_length))] if by_length else [])]

    def card_rows(self) -> list[tuple[str, str]]:
        """Name and text of each row in a model card."""
        rows = [("Objective", f"{self.describe_settings()}; the held-out loss is that of the chosen answers")]
        rows += [(name.capitalize(), text) for name, text in self.lines()]
        if self.reward_accuracy is not None:
            accuracy = format_gain(self.reward_accuracy, self.reward_error)
            rows.append(
                ("Reward accuracy", f"{accuracy}, by the change of log-probabilities since the {self.reference}")
            )
        return rows

    def limitation(self, base: str) -> str:
        """Say what the accuracy promises beside that of a base of this name."""
        change, error = self.accuracy.change, self.accuracy.change_error or 0.0
        if change < -2 * error:
            return f"On held-out preferences it is less accurate than {base}."
        if change <= 2 * error:
            return f"On held-out preferences it is not measurably more accurate than {base}."
        return f"It prefers chosen answers of its data more often than {base} does; other preferences were not measured."
