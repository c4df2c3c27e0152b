"""The command `classify`."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import atomic_io
from ..adapters.library import Library
from ..config import ModelOptions
from ..errors import ConfigError, DataError, InvalidRowError, Notice
from ..text import format_rows, one_line, shorten
from ..training.progress import display
from .display import print_table, show_json
from .generate import read_prompts
from .options import (
    DEFAULT_ADAPTERS_DIR,
    AdaptersDirOption,
    JsonOption,
    OverwriteOption,
    complete_adapter_names,
    model_options,
)

if TYPE_CHECKING:
    from ..data.readers import Table
    from ..inference.classification import Classification

LABEL_COLUMN, PROBABILITY = "predicted_label", "probability_"  # of a written table; the latter before a label
FORMATS = (".csv", ".jsonl")
_SHOWN_LABELS, _SHOWN_CHARS = 10, 60


@model_options()
def classify(
    adapter: Annotated[
        str,
        typer.Option(
            help="Adapter that was trained with --label-column, by name or path.",
            show_default=False,
            autocompletion=complete_adapter_names,
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Text. - reads texts from stdin, one per line.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Table of texts, such as a csv or jsonl file, or a txt file with one text per line; - for stdin.",
            show_default=False,
        ),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(help="Column of --file that contains the text.", show_default="as in training"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write the rows of --file with label and probabilities to this csv or jsonl file.",
            show_default=False,
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    adapters_dir: AdaptersDirOption = DEFAULT_ADAPTERS_DIR,
    *,
    options: ModelOptions,
) -> None:
    """Tell the label of a text, with probabilities, by an adapter that has learned labels.

    python cli.py classify "A film to remember." --adapter sentiment
    python cli.py classify --file new.csv --output told.csv --adapter sentiment

    Docs: docs/objectives.md
    """
    _check_options(prompt, file, text_column, output, overwrite=overwrite)
    loaded = Library(adapters_dir).get(adapter)
    from ..inference import classification
    from ..inference.generator import Generator

    info = classification.labels_of(loaded)
    table = _read_table(file) if file is not None and file != Path("-") else None
    if table is not None:
        rows = _text_rows(table, classification.text_columns(info), text_column)
    else:
        texts = read_prompts("-" if file else prompt, None) or []
        rows = [classification.text_values(adapter, info, text) for text in texts]
    present = [number for number, row in enumerate(rows) if not classification.is_empty(info, row)]
    if not present:
        raise DataError(f"{file}: no row has a text.")
    if len(present) < len(rows):
        display(Notice(f"{format_rows(len(rows) - len(present))} without a text: these get no label."))
    if output and table and (taken := {LABEL_COLUMN, *_columns(info.names)} & {*table.columns}):
        raise ConfigError(f"--output: {file} has a column '{min(taken)}' already: rename it.")
    generator = Generator(loaded.path, options=options, adapters_dir=adapters_dir)
    told = classification.classify(generator, [rows[number] for number in present], display)
    results = dict(zip(present, told, strict=True))
    if not info.fitted_rows:
        display(
            Notice(f"The probabilities of {adapter} are not calibrated: too few rows were held out for that.")
        )
    if output and table:
        atomic_io.atomic_write_text(output, _format_rows(table, results, info.names, output.suffix.lower()))
        _show_written(output, results, as_json=as_json)
        return
    if as_json:
        facts = []
        for number, row in enumerate(rows):
            result = results.get(number)
            label, probabilities = (result.label, result.probabilities) if result else (None, None)
            facts.append({"text": " ".join(row.values()), "label": label, "probabilities": probabilities})
        show_json(facts)
    else:
        _show(["  ".join(rows[number].values()) for number in results], told)


def _check_options(
    text: str | None,
    file: Path | None,
    text_column: str | None,
    output: Path | None,
    *,
    overwrite: bool,
) -> None:
    """Raise ConfigError for options that contradict each other, or a result that cannot be written."""
    if (text is None) == (file is None):
        raise ConfigError(
            "A text and --file exclude each other: give one."
            if file
            else "There is no text: give one, or --file."
        )
    if text is not None and not text.strip():
        raise ConfigError("prompt: a text is empty: give one with a word in it.")
    if file == Path("-") or file is None:
        for name, value in (("--output", output), ("--text-column", text_column)):
            if value is not None:
                raise ConfigError(f"{name} is for a table: give one with --file.")
    if overwrite and output is None:
        raise ConfigError("--overwrite is for --output: give both.")
    if file not in (None, Path("-")) and not Path(str(file)).is_file():
        raise ConfigError(f"--file {file}: there is no such file.")
    if output is None:
        return
    if output.suffix.lower() not in FORMATS:
        raise ConfigError(f"--output {output}: choose a name that ends in {' or '.join(FORMATS)}.")
    if why := atomic_io.why_no_file(output):
        raise ConfigError(f"--output {output}: {why}.")
    if os.path.lexists(output) and (
        not overwrite or (file and output.exists() and os.path.samefile(file, output))
    ):
        advice = "choose another name" + ("" if overwrite else ", or use --overwrite")
        raise ConfigError(f"--output {output} exists{', and is --file' if overwrite else ''}: {advice}.")


def _read_table(file: Path) -> "Table":
    from ..data.readers import read_file

    return read_file(file, txt_rows="line")


def _text_rows(table: "Table", columns: Sequence[str], text_column: str | None) -> list[dict[str, str]]:
    """Return the text of each column of the template in each row."""
    from ..data.columns import match_column
    from ..data.row_readers import read_value

    if text_column is not None and len(columns) > 1:
        raise ConfigError(
            f"--text-column: the adapter reads several columns, {', '.join(columns)}: leave it out."
        )
    found: dict[str, str] = {}
    for column in columns:
        name = text_column or ("text" if table.is_plain_text else column)
        if text_column is None and match_column(name, table.columns) is None and len(columns) == 1:
            raise ConfigError(
                f"{table.source} has no column '{column}', of which the adapter has learned: name the text with "
                f"--text-column: {', '.join(table.columns)}."
            )
        found[column] = table.find_column(name, ", a text of the adapter")
    rows = []
    for number, row in enumerate(table.rows, 1):
        try:
            rows.append({column: read_value(table, row, name) for column, name in found.items()})
        except InvalidRowError as error:
            raise DataError(f"{table.place(number, row)}: {error.reason}.") from error
    return rows


def _columns(names: Sequence[str]) -> list[str]:
    return [PROBABILITY + name for name in names]


def _format_rows(table: "Table", results: "dict[int, Classification]", names: Sequence[str], suffix: str) -> str:
    """Return the rows of a table with label and probabilities, as csv or as lines of JSON."""
    from ..data.chat import json_value

    text = io.StringIO(newline="")
    added = [LABEL_COLUMN, *_columns(names)]
    writer = csv.DictWriter(text, [*table.columns, *added], lineterminator="\n")
    if suffix == ".csv":
        writer.writeheader()
    for number, row in enumerate(table.rows):
        result = results.get(number)
        values: dict[str, object] = dict.fromkeys(added, None)
        if result is not None:
            rounded = [round(probability, 6) for probability in result.probabilities.values()]
            values = dict(zip(added, [result.label, *rounded], strict=True))
        if suffix == ".csv":
            writer.writerow({name: _csv_cell(value) for name, value in row.items()} | values)
        else:
            text.write(json.dumps(json_value(dict(row)) | values, ensure_ascii=False) + "\n")
    return text.getvalue()


def _csv_cell(value: object) -> object:
    from ..data.chat import json_value

    return json.dumps(json_value(value), ensure_ascii=False) if isinstance(value, dict | list) else value


def _show_written(output: Path, results: "dict[int, Classification]", *, as_json: bool) -> None:
    counts = Counter(result.label for result in results.values())
    if as_json:
        show_json({"output": str(output), "rows": len(results), "labels": counts})
    else:
        shown = ", ".join(f"{label} {count:,}" for label, count in counts.most_common(_SHOWN_LABELS))
        print(one_line(f"{output}  {format_rows(len(results))}: {shown}"))


def _show(texts: Sequence[str], results: "Sequence[Classification]") -> None:
    """Print all labels of one text, or the likeliest of each of several."""
    if len(results) == 1:
        (labels,) = results[0].summary()
        print_table(labels.rows[:_SHOWN_LABELS])
        return
    rows = [
        (
            result.label,
            f"{result.probabilities[result.label]:.3f}",
            shorten(one_line(text), _SHOWN_CHARS),
        )
        for text, result in zip(texts, results, strict=True)
    ]
    print_table(rows, ("label", "probability", "text"))
