"""Figures of a report on an adapter (report.json in its folder), without any text of the rows.

The file is optional. It counts only for the weights that it was measured on, and it may be a stranger's.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from ..errors import AdapterError
from ..text import one_line
from .manifest import Digest, EvalResult
from .safetensors_header import read_json

REPORT_FILE = "report.json"
TITLES = {"style": "Style", "memorization": "Memorization", "forgetting": "Forgetting", "growth": "More data"}
_OLD_KEYS = {  # of reports that exist
    "memory": "memorization",
    "near_copies": "near_duplicates",
    "near_copies_verbatim": "near_duplicates_verbatim",
}
CARD_HEADING = "## What it learned"
Sentences = Annotated[list[Annotated[str, Field(max_length=1_000)]], Field(min_length=1, max_length=10)]
PValue = Annotated[float, Field(ge=0, le=1)]
TextName = Annotated[str, Field(max_length=200)]

Figure = Literal["loss", "accuracy"]
Quantity = Literal["rows", "steps", "rank", "rows and steps"]


class _Model(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Refuses unknown fields and numbers that are not finite."""

    @model_validator(mode="before")
    @classmethod
    def _rename_old_keys(cls, values: object) -> object:
        return (
            {_OLD_KEYS.get(key, key): value for key, value in values.items()}
            if isinstance(values, dict)
            else values
        )


class _Figures(_Model):
    """Figures of a part. `sentences` say in plain words what they mean."""

    sentences: Sentences


class StyleWay(_Model):
    """Distances to the held-out text, and the share of the way from the base to it.

    A distance is the square root of an energy distance, in units of the spread of the distances
    between texts; `own_distance` is that of training text, None where there is too little. `share` and its
    95% `interval` are None where the base is no farther away than that. `p_value` and
    `base_p_value`: text of adapter and base is told apart from the held-out text.
    """

    distance: Annotated[float, Field(ge=0)]
    base_distance: Annotated[float, Field(ge=0)]
    own_distance: Annotated[float, Field(ge=0)] | None
    share: Annotated[float, Field(le=1)] | None
    interval: tuple[float, float] | None
    p_value: PValue
    base_p_value: PValue


class StyleAspect(StyleWay):
    """The same in an aspect of style, such as punctuation."""

    name: Annotated[str, Field(max_length=100)]


class StyleFigures(_Figures, StyleWay):
    """Figures of the style of generated texts (analysis/style.py), in all aspects together and in each.

    `texts` openings were compared, of which each side has `words` words.
    """

    texts: Annotated[int, Field(ge=1)]
    words: Annotated[int, Field(ge=1)]
    aspects: Annotated[list[StyleAspect], Field(max_length=20)]


class MemorizationSide(_Model):
    """Training rows, or unseen ones: those that were continued, those of them that were continued verbatim
    for more tokens than the threshold, and the longest such text in tokens; those with a loss, and their
    gain in nats per token, whose error is None for one row or group."""

    continued: int
    verbatim: int
    longest: int
    measured: int
    gain: float
    gain_error: float | None


class MemorizationFigures(_Figures):
    """Figures of what is learned by heart (analysis/memorization.py).

    `excess` is the gain on training rows minus that on unseen ones. The p-values are one-sided, and None
    where nothing follows from a difference: rows are too few, or `unequal` says what else differs.
    `memorized` counts the training rows that are known by heart. `near_duplicates` rows
    are in no test; of these so many of training are continued verbatim. `groups` is the number of groups,
    if rows are grouped.
    """

    verbatim_tokens: int
    training: MemorizationSide
    unseen: MemorizationSide
    verbatim_p: float | None
    excess: float
    excess_error: float | None
    excess_p: float | None
    memorized: int
    groups: int | None
    near_duplicates: int
    near_duplicates_verbatim: int
    unequal: Annotated[str, Field(max_length=300)] | None


class ForgettingFigures(_Figures):
    """Loss on text of other kinds than the data (analysis/forgetting.py).

    `general` is that of all `kinds`; `guards` are texts of the user's own.
    """

    general: EvalResult
    kinds: dict[TextName, EvalResult]
    guards: dict[TextName, EvalResult] = {}


class Doubling(_Model):
    """Gain of the trials of a sweep by the number of rows, steps or ranks, in nats per token or in
    accuracy, and what twice the last of these `values` would add to it, with its standard error and
    80% interval.
    """

    quantity: Quantity
    values: Annotated[list[int], Field(min_length=2, max_length=1_000)]
    gains: list[float]
    gain: float
    standard_error: float
    low: float
    high: float


class GrowthFigures(_Figures):
    """Gain by rows, steps and rank, and what doubling each would bring (adapters/growth.py).

    It is that of the held-out loss, of preferences and labels that of the accuracy.
    """

    figure: Figure = "loss"
    doublings: Annotated[list[Doubling], Field(min_length=1, max_length=4)]


class AdapterReport(_Model):
    """`report.json`. A part that was skipped, or could not be measured, is None.

    `weights` is the sha256 of the weights that were measured.
    """

    created: str
    weights: Digest
    style: StyleFigures | None = None
    memorization: MemorizationFigures | None = None
    forgetting: ForgettingFigures | None = None
    growth: GrowthFigures | None = None

    def parts(self) -> Iterator[tuple[str, _Figures]]:
        """Name and figures of each part that it has."""
        for name in TITLES:
            if figures := getattr(self, name):
                yield name, figures

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def read_report(path: Path, weights: str) -> AdapterReport | None:
    """Read a report on weights of this sha256; None if there is none, or one on others.

    Raises:
        AdapterError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        report = AdapterReport.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        problem = " ".join([*map(str, first["loc"]), first["msg"]])
        raise AdapterError(f"{path} is no report: {problem}. Make it again with `report`.") from error
    return report if report.weights == weights else None


def card_section(report: AdapterReport | None) -> str:
    """Return the section of the model card that says in sentences what was learned; empty without any."""
    if report is None or not any(report.parts()):
        return ""
    lines = [
        f"- {TITLES[name]}: {' '.join(_escape_markdown(sentence) for sentence in figures.sentences)}\n"
        for name, figures in report.parts()
    ]
    measured = "Measured by `lora_tuner report`, which docs/measuring.md explains; `report.json` has the figures."
    return f"\n{CARD_HEADING}\n\n{measured}\n\n{''.join(lines)}"


def update_card(card: str, report: AdapterReport) -> str:
    """Return a model card that tells what a report has measured; all else of it stays."""
    if report.forgetting is not None:
        card = card.replace(describe_other_text(None), describe_other_text(report.forgetting.general))
    section = card_section(report)
    head, found, rest = card.partition(f"\n{CARD_HEADING}\n")
    if found:
        _, next_heading, tail = rest.partition("\n## ")
        return head + section + next_heading + tail
    head, next_heading, tail = card.partition("\n## Limitations\n")
    return head + section + next_heading + tail


def describe_other_text(general: EvalResult | None) -> str:
    """Say for the limitations in a model card how other text is predicted; None: it was not measured."""
    if general is None:
        return "other text was not measured, and may be predicted worse"
    return f"on general text its loss changed by {general.format_change()} nats per token"


def _escape_markdown(text: str) -> str:
    """Write a sentence on one line, without HTML: a report may be a stranger's."""
    return " ".join(one_line(text).split()).replace("<", "&lt;")
