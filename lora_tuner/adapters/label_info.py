"""Part of `manifest.json`: the labels that an adapter tells, and how well."""

import math
from statistics import fmean, stdev
from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from ..config import MAX_LABEL_CHARS, MAX_LABELS, CleanMode
from ..text import format_rows

_Name = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARS)]


class _LabelModel(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Refuses unknown fields and numbers that are not finite."""


class LabelFigures(_LabelModel):
    """Figures of the labels of held-out rows: `interval` is that of the accuracy, 95%, by Wilson.

    `macro_f1` counts all labels alike. `calibration_error` is the expected one (Guo et al., 2017,
    arXiv:1706.04599, ten bins): how far the probability of the chosen label is from the share that is
    right. `confusion[i][j]` counts rows with label i that are given label j. `right` has a 1 for each
    row, in order, that is given its label, and a 0 for others; it is empty in older manifests.
    """

    accuracy: float
    interval: tuple[float, float]
    macro_f1: float
    calibration_error: float
    confusion: list[list[int]]
    right: Annotated[str, Field(pattern="^[01]*$")] = ""

    @property
    def rows(self) -> int:
        return sum(map(sum, self.confusion))

    def describe(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%} ({low:.1%} to {high:.1%}), macro F1 {self.macro_f1:.2f}"


class LabelInfo(_LabelModel):
    """The labels that an adapter tells: their names in order, with the training rows of each.

    `template` has the columns of the text, cleaned as `clean` says, and at its end `column`, that of
    the label. Of a text over `max_length` tokens, label included, the first and last ones are read.
    `temperature` divides the log-probabilities: it was fitted on `fitted_rows` held-out rows, on
    none of which the figures are measured. `base` are the figures of the base, `uncalibrated_error`
    the calibration error at temperature 1.
    """

    column: str
    names: Annotated[list[_Name], Field(min_length=2, max_length=MAX_LABELS)]
    counts: list[int]
    template: str
    max_length: int = Field(ge=2)
    clean: CleanMode
    balanced: bool = False
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    fitted_rows: int = 0
    figures: LabelFigures | None = None
    uncalibrated_error: float | None = None
    base: LabelFigures | None = None

    @model_validator(mode="after")
    def _check_names(self) -> "LabelInfo":
        if len({*self.names}) < len(self.names) or len(self.counts) != len(self.names):
            raise ValueError("names are different, and each has a count")
        if self.figures and self.base and len(self.figures.right) != len(self.base.right):
            raise ValueError("figures of adapter and base are of the same rows")
        return self

    def accuracy_change(self) -> tuple[float, float | None] | None:
        """Return the change of the accuracy from the base and its paired standard error; None where
        it was not measured row by row."""
        if self.figures is None or self.base is None or not self.figures.right:
            return None
        rights = zip(self.figures.right, self.base.right, strict=True)
        changes = [int(adapter) - int(base) for adapter, base in rights]
        error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None
        return fmean(changes), error

    def lines(self) -> list[tuple[str, str]]:
        """Return names and texts of the figures, of adapter and base; none where nothing was measured."""
        if self.figures is None:
            return []
        lines = [("accuracy", f"{self.figures.describe()} on {format_rows(self.figures.rows)}")]
        if self.base is not None:
            lines.append(("base accuracy", self.base.describe()))
        if self.uncalibrated_error is not None:
            error = f"{self.uncalibrated_error:.3f} -> {self.figures.calibration_error:.3f}"
            fit = f"temperature {self.temperature:.2f}, fitted on {self.fitted_rows:,} other rows"
            lines.append(("calibration", f"error {error} ({fit})"))
        return lines

    def card_rows(self) -> list[tuple[str, str]]:
        """Return names and texts of the rows in the card and in `adapters show`."""
        counts = [f"{name} ({count:,})" for name, count in zip(self.names, self.counts, strict=True)]
        balanced = ", drawn evenly" if self.balanced else ""
        rows = [("Labels", f"{', '.join(counts)}: training rows of {self.column}{balanced}")]
        rows.append(("Long texts", f"first and last tokens, {self.max_length} with the label"))
        return [
            *rows,
            *((name[:1].upper() + name[1:], text) for name, text in self.lines()),
        ]
