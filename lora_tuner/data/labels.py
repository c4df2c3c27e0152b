"""Labels of texts: of a closed set each text has one, which is learned as the answer in a template.

Such a row is one of `chat.encode_answer` whose end is kept: of a long text the middle is left out.
"""

import shlex
from collections import Counter
from collections.abc import Sequence

from ..config import MAX_LABELS, TrainConfig
from ..errors import DataError, EventHandler, Notice
from ..text import format_count, format_names, format_rows
from . import chat
from .columns import fold_name

IMBALANCE = 3  # times the rows of the rarest label that the most frequent one has
_SHOWN_LABELS = 12
_LIKE_NOTHING = ("nan", "none", "null", "n/a", "na")  # as tools write no value


def split_label(row: str) -> tuple[str, str]:
    """Return the text of a row up to its label, and the label."""
    answer = chat.read_answer(row)
    if answer is None:
        raise ValueError("a row without a label")
    text, (start, end) = answer
    return text[:start], text[start:end]


def count_labels(rows: Sequence[str]) -> Counter[str]:
    return Counter(split_label(row)[1] for row in rows)


def choose_labels(
    config: TrainConfig,
    source: str,
    train: Sequence[str],
    held_out: Sequence[str],
    notify: EventHandler,
) -> dict[str, int]:
    """Return the labels that are learned, in their order, with the number of training rows of each.

    Args:
        source: The data, for errors.
        train: Rows to train on; of a stream the first ones.
        held_out: Rows to measure.

    Raises:
        DataError: There are not two, or too many, or two that differ by case or spaces alone, or one
            has no row to train on.
    """
    counts = count_labels(train)
    found = {*counts} | {*count_labels(held_out)}
    names = config.labels or sorted(found, key=lambda label: (not label.isdecimal(), label.zfill(20), label))
    where = f"{source}: --label-column {config.label_column}"
    if len(names) > MAX_LABELS:
        raise DataError(
            f"{where} has {len(names):,} different labels, such as {format_names(names[:3])}: at most {MAX_LABELS} "
            "are learned. Name another column, or choose some with --labels."
        )
    folded = Counter(map(fold_name, names))
    if alike := [name for name in names if folded[fold_name(name)] > 1]:
        raise DataError(
            f"{where}: the labels {format_names([repr(name) for name in alike])} differ by case or spaces alone: "
            "correct the data, or choose labels with --labels."
        )
    if len(names) < 2:
        raise DataError(f"{where}: all rows have the label {names[0]!r}: two labels or more are needed.")
    given = {name: value for value, name in config.label_name_of.items()}
    missing = [name for name in names if not counts[name]] + [name for name in given if name not in names]
    if missing and not (config.streaming and {*missing} <= {*config.labels}):
        label = missing[0]
        value = f" (--label-names {given[label]}={label})" if label in given else ""
        held = sum(split_label(row)[1] == label for row in held_out)
        rest = f", only {format_count(held, 'held-out row')}" if held else ""
        raise DataError(
            f"{where}: the label {label!r}{value} has no row to train on{rest}: add rows of it, or choose other labels "
            "with --labels."
        )
    ordered = {name: counts[name] for name in names}
    for text in _describe(config, ordered):
        notify(Notice(text))
    return ordered


def _describe(config: TrainConfig, counts: dict[str, int]) -> list[str]:
    """Describe how many training rows each label has, and an imbalance with what to do about it."""
    stream = " of the first rows of the stream" if config.streaming else ""
    shown = [f"{label} {count:,}" for label, count in [*counts.items()][:_SHOWN_LABELS]]
    rest = f" and {len(counts) - _SHOWN_LABELS} other labels" if len(counts) > _SHOWN_LABELS else ""
    lines = [f"Labels{stream}: {', '.join(shown)}{rest}."]
    for label in counts if len(counts) > 2 else ():  # without it two are left
        if label not in config.labels and fold_name(label) in _LIKE_NOTHING:
            others = ",".join(name for name in counts if name != label)
            advice = (
                f"--labels {shlex.quote(others)}" if len(counts) <= _SHOWN_LABELS else "--labels with the others"
            )
            means = f"If {label} means that a row has no label"
            lines.append(f"{means}, {advice} leaves out such rows.")
    rarest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if config.balance:
        lines.append(f"--balance repeats rows until each label has {format_rows(counts[most])} to train on.")
    elif config.streaming and not counts[rarest]:
        lines.append(f"The first rows of the stream have no label {rarest}: shuffle the data before.")
    elif counts[most] >= IMBALANCE * counts[rarest]:
        times = counts[most] / counts[rarest]
        lines.append(
            f"{most} has {times:.0f} times as many rows as {rarest}: --balance trains on all labels equally often; "
            "the macro F1 counts them alike."
        )
    return lines


def balance_rows(sources: Sequence[Sequence[str]]) -> list[list[str]]:
    """Repeat rows of each source until all labels have equally many in all of them together.

    The copies are spread over the rows of a label, and follow all rows that there are.
    """
    counts = count_labels([row for rows in sources for row in rows])
    most, seen = max(counts.values(), default=0), Counter[str]()
    balanced: list[list[str]] = []
    for rows in sources:
        copies: list[int] = []
        for row in rows:
            label = split_label(row)[1]
            before, seen[label] = seen[label], seen[label] + 1
            copies.append(most * seen[label] // counts[label] - most * before // counts[label])
        rounds = range(max(copies, default=0))
        balanced.append(
            [row for number in rounds for row, count in zip(rows, copies, strict=True) if count > number]
        )
    return balanced


def training_texts(config: TrainConfig, sources: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the texts of each source as often as they are trained on in an epoch."""
    return balance_rows(sources) if config.balance else [[*rows] for rows in sources]
