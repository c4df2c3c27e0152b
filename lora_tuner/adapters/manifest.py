"""`manifest.json`: what an adapter was made from, on what, and what it was worth. The schema, and nothing else.

Limit: `schema_version` 1 is the only one; a manifest that says more, or less, is refused as a whole.
"""

import datetime
import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # a sha256; one of them names a file in the cache


class _ManifestModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BaseInfo(_ManifestModel):
    """The base it was trained on. `fingerprint` and `tokenizer` are the sha256 of base_model.py; the tokenizer with which
    another tool has trained is not known."""

    name: str
    repo: str
    revision: str | None
    weights: str
    fingerprint: Digest
    tokenizer: Digest | None


class DatasetInfo(_ManifestModel):
    """The rows it was trained on, and those it was measured on. A blend of adapters with different salts has none."""

    name: str
    source: str
    hash: Digest
    where: list[str]
    split_salt: str | None
    counts: dict[str, int]
    format: str = "text"  # or messages, or prompt and completion, of which the answers alone are learnt
    eval_dataset: str | None = None  # where those it was measured on come from, when they are not its own held-out rows
    held_out_hash: Digest | None  # None when there were no rows to measure
    held_out_rows: int


class EvalResult(_ManifestModel):
    """Held-out loss in nats a token, with the base and with the adapter; `gain` is the fall and its standard error."""

    base_loss: float
    loss: float
    gain: float
    standard_error: float
    rows: int
    tokens: int

    @property
    def perplexities(self) -> tuple[float, float]:
        """Of the base, and with the adapter."""
        before, after = (math.exp(min(loss, 700.0)) for loss in (self.base_loss, self.loss))  # exp(710) overflows
        return before, after


class RunInfo(_ManifestModel):
    """The training run. Seconds are those of its steps alone; tokens are those that were predicted, without padding."""

    method: str = "lora"  # as config.METHODS calls it
    steps: int
    kept_step: int  # the step whose weights were kept: the last, or the best one with `patience`
    tokens: int
    seconds: float
    sequences: int
    truncated_rows: int
    device: str
    dtype: str
    load_in: str = "full"  # or the bits that the base's weights were in
    threads: int
    processes: int = 1  # each with these threads


class WeightsInfo(_ManifestModel):
    """Of the tensors' file. `config` is the sha256 of adapter_config.json, which decides what the tensors do."""

    sha256: Digest
    bytes: int
    parameters: int
    config: Digest | None = None


class ParentInfo(_ManifestModel):
    """An adapter that this one was made from: what it was called, and the sha256 of its weights; its own parents too, for
    they may be gone by now."""

    name: str
    sha256: Digest
    parents: list["ParentInfo"] = []


class Manifest(_ManifestModel):
    """`manifest.json`. What a run does not know yet is None, and so is what is not known of an adapter of another tool.

    `made_by` is the command that made an adapter out of its parents without a run, such as `blend a=0.7 b=0.3`.
    """

    schema_version: int = Field(default=1, ge=1, le=1)
    created: str
    base: BaseInfo
    data: DatasetInfo | None = None
    run: RunInfo | None = None
    made_by: str | None = None
    parents: list[ParentInfo] = []
    result: EvalResult | None = None
    weights: WeightsInfo | None = None
    versions: dict[str, str] = {}

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def utc_timestamp() -> str:
    """The time as manifests hold it: ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
