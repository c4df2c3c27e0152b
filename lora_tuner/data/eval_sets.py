"""Sets of held-out rows to measure losses on, and their cache, for when the dataset is gone."""

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import atomic_io
from ..config import TrainConfig
from ..errors import EventHandler, LoraTunerError, Notice, ignore_events
from ..settings_files import resolve_settings
from ..text import format_rows
from .dataset import Dataset, load_dataset, load_eval_dataset
from .splitting import content_hash


@dataclass(frozen=True)
class EvalSet:
    """Held-out rows of an adapter or dataset, by its name; `missing` is the reason for no rows.

    `groups` has the number of the group of each row; empty if each row is one. `parts` has the
    number of the part of a blend that each row is held out for; empty if they are of one.
    """

    name: str
    texts: list[str] = field(repr=False)
    missing: str | None = None
    groups: list[int] = field(default_factory=list, repr=False)
    parts: list[int] = field(default_factory=list, repr=False)

    def format_rows(self) -> str:
        """Number of its rows and, where there are some, groups, in words."""
        return format_rows(len(self.texts), len(set(self.groups)) or None)

    def hash(self) -> str:
        """Hash of the texts and, where there are some, of the groups and parts."""
        digest = content_hash(self.texts)
        if self.groups:
            digest = content_hash([digest, *map(str, self.groups)])
        return content_hash([digest, "parts", *map(str, self.parts)]) if self.parts else digest

    def select(self, rows: Sequence[int]) -> "EvalSet":
        """The set with some of its rows."""
        texts, groups = [self.texts[row] for row in rows], [self.groups[row] for row in rows if self.groups]
        return replace(self, texts=texts, groups=groups, parts=[self.parts[row] for row in rows if self.parts])

    def first_rows(self, count: int | None) -> "EvalSet":
        """The set with at most the first `count` rows of each part; None for all."""
        taken = Counter[int]()
        chosen = []
        for row, part in enumerate(self.parts or [0] * len(self.texts)):
            taken[part] += 1
            if count is None or taken[part] <= count:
                chosen.append(row)
        return self.select(chosen)


def cache_rows(rows: EvalSet) -> None:
    """Keep rows in the user's cache under their hash, for when the dataset is gone."""
    content = {"texts": rows.texts, "groups": rows.groups, "parts": rows.parts}
    with contextlib.suppress(OSError):  # a full cache must not end a run
        text = json.dumps(content if rows.groups or rows.parts else rows.texts, ensure_ascii=False)
        atomic_io.atomic_write_text(_rows_path(rows.hash()), text)


def read_rows(name: str, rows_hash: str, run_file: Path, notify: EventHandler = ignore_events) -> EvalSet:
    """Rows from the user's cache by their hash.

    If they are damaged, they are loaded again from the dataset that `run_file`, a run.yaml, names.
    If they are not there, that dataset may be a stranger's choice.
    """
    path = _rows_path(rows_hash)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content if isinstance(content, dict) else {"texts": content, "groups": []}
        texts, groups, parts = content["texts"], content["groups"], content.get("parts", [])
        rows = EvalSet(name, texts, groups=groups, parts=parts)
        # The first version with groups recorded the hash of the texts alone.
        is_known = rows_hash in (rows.hash(), content_hash(texts))
        if is_known and {len(groups), len(parts)} <= {0, len(texts)}:
            return rows
        reason = "its held-out rows in the cache have changed"
    except FileNotFoundError:
        reason = "its held-out rows are not in the cache: it was trained elsewhere, or the cache was emptied"
        return EvalSet(name, [], reason)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = f"its held-out rows in the cache cannot be read ({error})"
    with contextlib.suppress(LoraTunerError):
        config = resolve_settings(TrainConfig, {}, run_file)
        dataset = load_dataset(config)
        texts = dataset.held_out[: config.eval_rows_limit]
        rows = EvalSet(name, texts, groups=dataset.groups_of(texts))
        if rows.hash() == rows_hash:
            notify(Notice(f"{path} is damaged: the held-out rows of {name} are loaded again."))
            cache_rows(rows)
            return rows
    return EvalSet(name, [], reason)


def load_eval_set(config: TrainConfig, notify: EventHandler = ignore_events) -> EvalSet:
    """Load the first `config.eval_rows_limit` rows, in hash order, of `config.eval_dataset`, as training
    measures them: documents in parts."""
    dataset = Dataset([])
    dataset.set_held_out([[*load_eval_dataset(config, notify).values()]], config, notify)
    notify(eval_dataset_notice(str(config.eval_dataset)))
    texts = dataset.held_out[: config.eval_rows_limit]
    return EvalSet(str(config.eval_dataset), texts, groups=dataset.groups_of(texts))


def select_rows(sets: Sequence[EvalSet], eval_rows: int | None = None) -> list[EvalSet]:
    """The first `eval_rows` rows of each set, and of each part of a blend in it.

    A set of fewer than two rows loses them, with the reason. One group or document of more rows is
    measured, without a standard error.
    """
    selected = []
    for rows in sets:
        rows = rows.first_rows(eval_rows)
        if len(rows.texts) < 2 and not rows.missing:
            rows = replace(rows.select([]), missing="a standard error needs two rows")
        selected.append(rows)
    return selected


def eval_dataset_notice(name: str) -> Notice:
    """Warn about a dataset evaluated as a whole: adapters do not record their training rows."""
    return Notice(f"Rows of {name} that an adapter was trained on count as held out here.")


def join_sets(name: str, sets: Sequence[EvalSet]) -> EvalSet:
    """The rows of all sets as one set, of which each is a part, or several."""
    groups = join_groups([(rows.groups, len(rows.texts)) for rows in sets])
    parts = join_groups([(rows.parts or [0] * len(rows.texts), len(rows.texts)) for rows in sets])
    texts = [text for rows in sets for text in rows.texts]
    return EvalSet(name, texts, groups=groups, parts=parts if len(set(parts)) > 1 else [])


def join_groups(parts: Sequence[tuple[Sequence[int], int]]) -> list[int]:
    """Number the groups of several lists of rows on; empty if none has groups.

    Args:
        parts: groups and number of rows of each list.
    """
    joined: list[int] = []
    for groups, rows in parts:
        first = max(joined, default=-1) + 1
        joined += [first + group for group in groups or range(rows)]
    return joined if any(groups for groups, _ in parts) else []


def _rows_path(rows_hash: str) -> Path:
    return atomic_io.cache_dir() / "held-out" / f"{rows_hash}.json"
