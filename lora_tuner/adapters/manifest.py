"""Schema of `manifest.json`: the base, the data, the run and the evaluation of an adapter.

A manifest with unknown or missing fields is rejected. Schema 2 is written. Schema 1 is read for
ever: its fingerprint and tokenizer hash are of an older rule (models/identity.py).
"""

import datetime
import math
from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from ..config import CleanMode, NearDuplicatesRule, is_conversation
from ..text import format_count, format_gain, format_rows
from .label_info import LabelInfo
from .preference_info import PreferenceInfo

SCHEMA_VERSION = 2
MAX_PROBES = 64  # a stranger's manifest decides how many requests a check sends
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # strict: one becomes a file name
# Table of a probe -> scale of the adapter.
SCALES = {"base": 0.0, "half": 0.5, "adapter": 1.0, "double": 2.0}
NextTokens = Annotated[dict[str, Annotated[float, Field(le=0)]], Field(min_length=1)]


class _ManifestModel(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Refuses unknown fields and numbers that are not finite."""


class BaseInfo(_ManifestModel):
    """The base model. `fingerprint`, `tokenizer` and `chat_template` are hashes
    (models/identity.py).

    `tokenizer` is None for an adopted adapter; `chat_template` is for those trained on
    conversations.
    """

    name: str
    repo: str
    revision: str | None
    weights: str
    fingerprint: Digest
    tokenizer: Digest | None
    chat_template: Digest | None = None


class EvalResult(_ManifestModel):
    """Held-out loss of base and adapter in nats per token; `gain` is the paired difference.

    `standard_error` is None for a single row or group, where nothing is known about it. Older
    manifests say 0. `groups` is the number of groups, if rows are grouped. `of_rows` is the number
    of the rows of which these are the first, where not all were measured.
    """

    base_loss: float
    loss: float
    gain: float
    standard_error: float | None
    rows: int
    tokens: int
    groups: int | None = None
    of_rows: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_error_of_one_row(cls, values: object) -> object:
        return (
            values | {"standard_error": None} if isinstance(values, dict) and values.get("rows") == 1 else values
        )

    def format_rows(self) -> str:
        text = format_rows(self.rows, self.groups)
        if self.of_rows is None:
            return text
        return "the first " + text.replace(" row", f" of {self.of_rows:,} row", 1)

    def format_change(self) -> str:
        """Change of the loss from base to adapter with its standard error; above zero is worse."""
        return format_gain(0.0 - self.gain, self.standard_error, "+.3f")  # no negative zero

    def describe_change(self) -> str:
        return f"{self.format_change()} (change of loss on {self.format_rows()}; above zero is worse)"

    def to_dict(self) -> dict[str, object]:
        """All figures for JSON, with the perplexity of the adapter."""
        return self.model_dump() | {"perplexity": self.perplexities[1]}

    @property
    def perplexities(self) -> tuple[float, float]:
        """Perplexity of the base and of the adapter."""
        # exp(710) overflows.
        before, after = (math.exp(min(loss, 700.0)) for loss in (self.base_loss, self.loss))
        return before, after


class SourceInfo(_ManifestModel):
    """One of several datasets of a run; `weight` is its share of the training sequences, if given.

    `result` is measured on the held-out rows that are of this dataset.
    """

    name: str
    source: str
    weight: float | None
    hash: Digest
    counts: dict[str, int]
    result: EvalResult | None = None


class DatasetInfo(_ManifestModel):
    """The training rows and the held-out rows. `split_salt` is None if a blend's parents differ.

    `near_duplicates` says what became of training rows that nearly copy a held-out row; None in
    older manifests, for which they were not looked for, and if a blend's parents differ.
    `encoded_hash` is that of all rows as token ids with their labels, of a stream of the first
    ones; None in older manifests.
    """

    name: str
    source: str
    hash: Digest
    where: list[str]
    split_salt: str | None
    counts: dict[str, int]
    format: str = "text"  # or template, or conversations, of which the answers alone are trained on
    template: str | None = None  # of the text of a row; None too if a blend's parents differ
    answer_column: str | None = None  # of which alone the text is learned
    text_column: str | None = None
    # Settings of files, if they were given.
    delimiter: str | None = None
    encoding: str | None = None
    txt_rows: str | None = None
    clean: CleanMode | None = None  # None in older manifests, and if a blend's parents differ
    near_duplicates: NearDuplicatesRule | None = None
    # Dataset of the held-out rows, if they are not held out of the training rows.
    eval_dataset: str | None = None
    eval_split: str | None = None  # its split, if it has splits
    group_by: str | None = None  # column whose values are held out as a whole; None if a blend's parents differ
    sources: list[SourceInfo] = []  # of several datasets; of a blend, if its parents have the same
    held_out_hash: Digest | None  # of texts and groups; None without held-out rows
    held_out_rows: int
    encoded_hash: Digest | None = None


class RateTrial(_ManifestModel):
    """A short run of a probe. `loss` is None if it diverged; `gap` is how much lower the best loss is."""

    learning_rate: float
    loss: float | None = None
    gap: float = 0.0
    standard_error: float | None = None  # of the gap, paired by row or group


class RateProbe(_ManifestModel):
    """The short runs that chose the learning rate: `steps` of each, and the held-out rows that chose.

    `reported_rows` says that the gain of the adapter is measured on these rows too.
    """

    learning_rate: float
    steps: int
    rows: int
    reported_rows: bool
    seconds: float
    trials: list[RateTrial]

    def describe(self) -> str:
        losses = [
            f"{trial.learning_rate:g} {'diverged' if trial.loss is None else f'{trial.loss:.3f}'}"
            for trial in self.trials
        ]
        return (
            f"{self.learning_rate:g}, the best of {len(losses)} runs of {format_count(self.steps, 'step')} by the "
            f"loss on {format_count(self.rows, 'held-out row')}"
            f"{' (also those of the gain)' if self.reported_rows else ''}: {', '.join(losses)}"
        )


class RunInfo(_ManifestModel):
    """The training run. `seconds` are of the steps alone; `tokens` are predicted, not padding.

    `coverage` is the share of the block weights that are in adapted layers, unknown in older
    manifests; `not_adapted` names others that the target modules leave out. `sweep` is the id of
    the sweep whose trial it is. `inexact` are facts, such as threads, that a resume has accepted as
    changed: the result is not bitwise that of an uninterrupted run. `curve_rows` are the rows of the
    held-out curve, if it is on a subset; 0 in older manifests. `probe` tells how the learning
    rate was chosen, if by short runs, and `advice` names the one to try if this one did not fit."""

    method: str = "lora"  # a key of config.METHODS
    steps: int
    kept_step: int  # step of the saved weights: the last one, or the best one with `patience`
    tokens: int
    seconds: float
    sequences: int
    truncated_rows: int
    used_share: float | None = None  # of the tokens of the training rows; None in older manifests
    used_answer_share: float | None = None  # of their answer tokens; None without conversations
    device: str
    dtype: str
    load_in: str = "full"  # or 8bit, 4bit
    threads: int  # per process
    processes: int = 1
    kernels: str | None = None  # build of the C kernels, if decoder blocks are fused
    coverage: float | None = None
    not_adapted: list[str] = []
    added_tokens: dict[str, int] = {}  # to the tokenizer of the base, with their ids
    sweep: str | None = None
    inexact: list[str] = []
    curve_rows: int = 0
    probe: RateProbe | None = None
    advice: str | None = None


class OpeningGains(_ManifestModel):
    """Gain of the adapter on the first tokens of some rows, in nats per token.

    `gain` is the mean over the rows after so many `tokens`, `deviation` its standard deviation.
    """

    tokens: list[int] = Field(min_length=1)
    gain: list[float]
    deviation: list[float]

    @model_validator(mode="after")
    def _check_lengths(self) -> "OpeningGains":
        if not len(self.tokens) == len(self.gain) == len(self.deviation) or sorted(self.tokens) != self.tokens:
            raise ValueError("tokens are ascending, and each has a gain and a deviation")
        return self


class RoutingInfo(OpeningGains):
    """Gain of the adapter on beginnings of its own held-out rows, for model `auto`.

    Of conversations these are the questions. `general` is its gain on general text in the same form (data/general_text.py);
    None in older manifests.
    """

    general: OpeningGains | None = None


class WeightsInfo(_ManifestModel):
    """The weights file. `config` is the hash of adapter_config.json."""

    sha256: Digest
    bytes: int
    parameters: int
    config: Digest | None = None


class ParentInfo(_ManifestModel):
    """An adapter that this one was made from: its name, the hash of its weights, and its own
    parents, in case it is removed."""

    name: str
    sha256: Digest
    parents: list["ParentInfo"] = []


class Probe(_ManifestModel):
    """A short prompt, and its likeliest next tokens with their log-probabilities in nats: of the
    base, of the adapter, and of the adapter at half and at double its scale.

    `chat`: the prompt is a user's message, asked through the chat template.
    """

    prompt: str
    chat: bool = False
    base: NextTokens  # fields of SCALES
    half: NextTokens
    adapter: NextTokens
    double: NextTokens


class Manifest(_ManifestModel):
    """`manifest.json`. Fields are None before a run has ended, and for an adopted adapter.

    `made_by` is the command that made the adapter without training, such as `blend a=0.7 b=0.3`;
    of preferences `result` is the loss on the chosen answers, and `preference` has what they taught;
    `general` is measured on the fixed general text (data/general_text.py) of a run that has the time
    for it; `probes` are what `adapters check --url` compares with a server, None in older manifests;
    `labels` are those of an adapter that was trained with --label-column.
    """

    schema_version: int = Field(default=SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION)
    created: str
    base: BaseInfo
    data: DatasetInfo | None = None
    run: RunInfo | None = None
    made_by: str | None = None
    parents: list[ParentInfo] = []
    result: EvalResult | None = None
    preference: PreferenceInfo | None = None
    general: EvalResult | None = None
    probes: Annotated[list[Probe], Field(min_length=1, max_length=MAX_PROBES)] | None = None
    routing: RoutingInfo | None = None
    labels: LabelInfo | None = None
    weights: WeightsInfo | None = None
    versions: dict[str, str] = {}

    @property
    def is_chat(self) -> bool:
        """True if conversations were learned, be they some of the rows."""
        is_learned = self.data is not None and is_conversation(self.data.format)
        return is_learned or self.base.chat_template is not None

    @property
    def template(self) -> tuple[str, str | None] | None:
        """The template that made the texts, and the column of which alone was learned."""
        if self.labels is not None:
            return self.labels.template, self.labels.column
        data = self.data
        return (data.template, data.answer_column) if data and data.template else None

    def to_json(self) -> str:
        """The text of the file."""
        return self.model_dump_json(indent=2) + "\n"


def why_never_chosen(manifest: Manifest | None) -> str | None:
    """Return the reason why model `auto` never chooses an adapter; None for one that it may choose."""
    if manifest is None or manifest.routing is None:
        return "its scores on held-out rows are unknown (`evaluate NAME --probes` measures them, if it has such rows)"
    if manifest.routing.general is None:
        return "its scores on general text are unknown (`evaluate NAME --probes` measures them)"
    if max(manifest.routing.gain) <= 0:
        return "it gains nothing on the beginnings of its own held-out rows"
    return None


def utc_timestamp() -> str:
    """Current time as in manifests: ISO 8601, UTC, in seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
