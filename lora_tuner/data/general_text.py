"""General text of several kinds that ships with the package, to measure what an adapter has forgotten.

Each line of general_text.jsonl is a row: its kind, its source, its text. Rows were made for this
package, or are of works in the public domain, which `source` names. Figures of different adapters
can be compared only while the texts stay as they are.
"""

import functools
import json
from pathlib import Path

from .eval_sets import EvalSet

SUBSET_ROWS = 5  # of each kind, the first and shortest: measured after training runs


def general_texts(subset: bool = False) -> list[EvalSet]:
    """Return the rows of each kind of general text, as a set that is named by the kind.

    Args:
        subset: the first `SUBSET_ROWS` of each kind alone.
    """
    rows = SUBSET_ROWS if subset else None
    return [EvalSet(kind, texts).first_rows(rows) for kind, texts in _read().items()]


@functools.cache
def _read() -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    file = Path(__file__).with_suffix(".jsonl")
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.setdefault(row["kind"], []).append(row["text"])
    return texts
