"""The command `data`: look at a dataset before training."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import atomic_io
from ..config import TrainConfig
from ..errors import ConfigError
from ..settings_files import resolve_settings
from ..text import default_adapter_name, format_counts, format_rows, format_share, format_share_of, one_line
from ..training.progress import display
from .display import print_table, print_wrapped, show_json
from .options import JsonOption, Overrides, OverwriteOption, settings_options

if TYPE_CHECKING:
    from ..analysis.data_report import DataReport, NearDuplicates
    from ..analysis.lengths import Lengths
    from ..analysis.redact import RedactResult
    from ..analysis.sample import Example

DEFAULT_LOSS_ROWS = 200
_LOSS_SETTINGS = ("device", "dtype", "load_in")
# Settings of the panel Data that change nothing in a report.
_NOT_HERE = ("dataset", "streaming", "shuffle_buffer", "packing", "eval_rows", "balance")
_SETTINGS = [
    name
    for name, field in TrainConfig.model_fields.items()
    if isinstance(field.json_schema_extra, dict)
    and field.json_schema_extra["panel"] == "Data"
    and name not in _NOT_HERE
]
_BAR_CHARS, _TERMINAL_BARS = 40, 12
_LANGUAGES = 6


@settings_options(TrainConfig, *_SETTINGS, "objective", "base", "revision", *_LOSS_SETTINGS)
def data(
    overrides: Overrides,
    datasets: Annotated[
        list[str] | None,
        typer.Argument(help="Dataset, as for train --dataset.", show_default="that of --config"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of settings, as for train: a report on the data of that run. Options override it.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write the page to this file.", show_default="NAME.data.html in this folder; none with --json"
        ),
    ] = None,
    redact: Annotated[
        Path | None,
        typer.Option(
            help="Write a copy of all rows with personal data replaced, as .jsonl, .json, .csv, .tsv, .txt or .parquet; "
            "not complete.",
            show_default=False,
        ),
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(
            help="Find all national phone numbers of this region, such as DE or US. Others are found with their country code, "
            "in the writing of North America, or after a word such as 'phone'.",
            show_default=False,
        ),
    ] = None,
    loss_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --base: measure its loss on so many rows, to show the hardest and easiest.",
            show_default=str(DEFAULT_LOSS_ROWS),
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Report on a dataset before training: lengths, near duplicates, languages, personal data, encoding.

    python cli.py data poems.txt

    Docs: docs/tour.md
    """
    if not datasets and config is None:
        raise ConfigError("No dataset is named: give one, or --config with the settings of a run.")
    named = {"dataset": datasets[0] if len(datasets) == 1 else datasets} if datasets else {}
    settings = resolve_settings(TrainConfig, overrides | named, config).model_copy(update={"streaming": False})
    _check_base_is_needed(overrides, loss_rows)
    page = html or (None if as_json else Path(f"{default_adapter_name(*settings.dataset_names)}.data.html"))
    from ..analysis import data_page, data_report, phones
    from ..analysis import redact as redaction

    if region is not None:
        region = region.upper()
        if not phones.finds_phones():
            raise ConfigError(
                "--region needs the package phonenumbers: pip install 'lora_tuner[report]' or phonenumbers."
            )
        if not phones.is_phone_region(region):
            raise ConfigError(f"--region {region} is unknown: give two letters such as DE, GB or US.")
    if page is not None:
        check_page(page, overwrite, data_page.is_page)
    copy = redaction.check_target(redact, settings, overwrite) if redact else None
    report = data_report.make_report(
        settings,
        display,
        region=region,
        loss_rows=(loss_rows or DEFAULT_LOSS_ROWS) if "base" in overrides else 0,  # else its tokenizer is used
    )
    if page is not None:
        atomic_io.atomic_write_text(page, data_page.render_page(report))
    redacted = None
    if copy is not None:
        redacted = redaction.redact(settings, copy, display, region=region, overwrite=overwrite)
    if as_json:
        written = {"page": str(page)} if page else {}
        show_json(report.to_dict() | written | ({"redacted": redacted.to_dict()} if redacted else {}))
        return
    _show_report(report)
    if redacted:
        _show_redacted(redacted)
    if page is not None:
        print(f"\npage: {page}")


def _check_base_is_needed(overrides: Overrides, loss_rows: int | None) -> None:
    """Raise ConfigError for an option of the loss without the base whose loss it is."""
    given = [name for name in _LOSS_SETTINGS if name in overrides]
    if loss_rows is not None:
        given.append("loss_rows")
    if given and "base" not in overrides:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} is for the loss of a base: give --base, or leave it out."
        )


def check_page(page: Path, overwrite: bool, is_page: Callable[[Path], bool]) -> None:
    """Raise ConfigError if the page cannot be written; a page of before is replaced."""
    if reason := atomic_io.why_no_file(page):
        raise ConfigError(f"The page cannot be written: {reason}. Choose another place with --html.")
    if page.exists() and not overwrite and not (page.is_file() and is_page(page)):
        raise ConfigError(f"{page} exists and is no report: choose another name with --html, or use --overwrite.")


# Terminal


def _show_report(report: "DataReport") -> None:
    total = report.sampled_rows
    print_wrapped(one_line(f"{report.dataset}: {report.layout} (--clean {report.clean})"))
    _show_counts(report)
    if report.is_sample:
        print_wrapped(f"All that follows is of a sample of {format_rows(total)}.")
    for hint in report.hints:
        print_wrapped(one_line(hint))
    show_lengths(report.lengths, total)
    _show_examples(f"{format_rows(report.long_rows)} far longer than the others", report.long)
    _show_examples(f"{format_rows(report.short_rows)} far shorter than the others", report.short)
    _show_near_duplicates(report.near_duplicates, total)
    if report.languages is not None:
        _print_heading("languages")
        shown = [
            f"{language.name} {format_share_of(language.rows, total)}"
            for language in report.languages[:_LANGUAGES]
        ]
        if len(report.languages) > _LANGUAGES:
            shown.append(f"{len(report.languages) - _LANGUAGES} more")
        print_wrapped(", ".join(shown))
    _show_personal_data(report)
    _print_heading("encoding")
    if not report.encoding:
        print("no trouble found")
    for trouble in report.encoding:
        mended = " Training cleans texts of it." if trouble.removed else ""
        print_wrapped(f"{trouble.kind}: {_rows(trouble.rows, total)}. {one_line(trouble.advice)}{mended}")
        _show_examples("", trouble.examples[:2])
    if report.losses is not None:
        _print_heading(f"loss of {one_line(report.losses.base)} per token")
        print_wrapped(f"{report.losses.loss:.3f} on {format_rows(report.losses.rows)}")
        _show_examples("hardest", report.losses.hardest)
        _show_examples("easiest", report.losses.easiest)


def _show_near_duplicates(copies: "NearDuplicates", total: int) -> None:
    _print_heading("near duplicates")
    if copies.clusters:
        print_wrapped(
            f"{_rows(copies.rows, total)} nearly copy one another, in {copies.clusters:,} "
            f"cluster{'s' * (copies.clusters > 1)}; the largest has {copies.largest:,}. With one "
            f"row of each, {format_rows(copies.spare_rows)} would go."
        )
        for cluster in copies.examples:
            _show_examples("", cluster)
    else:
        print("none")


def _show_counts(report: "DataReport") -> None:
    print_wrapped(format_counts(report.counts))
    for name, counts in report.sources.items():
        print_wrapped(one_line(f"{name}: {format_counts(counts)}"), "  ")
    for name, counts in report.contents.items():
        shown = ", ".join(f"{key} {count:,}" for key, count in counts.items())
        print_wrapped(one_line(f"{name}: {shown}"))
    for invalid in report.invalid:
        print_wrapped(one_line(f"{invalid.rows:,} with {invalid.reason} (first: {invalid.first})"), "  ")
    for copy in report.dropped:
        print_wrapped(f"{one_line(copy.description)}: {one_line(copy.text)}", "  ")
    if report.stops_training:
        print_wrapped("Training would stop: more rows than --max-invalid allows cannot be read.")


def show_lengths(lengths: "Lengths", total: int) -> None:
    """Print a histogram of lengths, and what `--max-length` cuts."""
    from ..analysis.lengths import describe_span

    of = f" of {lengths.tokenizer}" if lengths.tokenizer else ""
    _print_heading(f"lengths in {lengths.unit}{one_line(of)}")
    print_wrapped(
        f"shortest {lengths.shortest:,}, median {lengths.median:,}, mean {lengths.mean:,}, 95% up "
        f"to {lengths.percentile_95:,}, longest {lengths.longest:,}; {lengths.total:,} in all"
    )
    size = math.ceil(len(lengths.histogram) / _TERMINAL_BARS)
    bars = [lengths.histogram[begin : begin + size] for begin in range(0, len(lengths.histogram), size)]
    counts = [sum(bar.rows for bar in group) for group in bars]
    table = []
    for group, rows in zip(bars, counts, strict=True):
        span = describe_span(group[0].start, group[-1].end)
        table.append((span, f"{rows:,}", "\u2588" * math.ceil(_BAR_CHARS * rows / max(counts))))
    print_table(table)
    if not lengths.cuts:
        return
    limit = f"--max-length {lengths.max_length}"
    if lengths.truncated_rows:
        text = f"{limit} cuts {_rows(lengths.truncated_rows, total)}"
    elif lengths.chunked_rows:
        text = f"{_rows(lengths.chunked_rows, total)} of more than {limit} tokens, which are divided into several"
    else:
        text = f"no row is longer than {limit}"
    print_wrapped(f"{text}; {format_share(lengths.used_share or 0)} of the tokens are used")
    print_table(
        [
            (f"{cut.length:,}", _rows(cut.longer_rows, total), format_share(cut.share_beyond))
            for cut in lengths.cuts
        ],
        ("--max-length", "longer", "tokens beyond it"),
    )


def _show_personal_data(report: "DataReport") -> None:
    from ..analysis.personal_data import KIND_LABELS

    _print_heading("personal data and keys (names, addresses and more are not searched)")
    found = [kind for kind in report.personal_data if kind.rows]
    if not found:
        print("none found")
    for kind in found:
        details = ", ".join(f"{count:,} {detail}" for detail, count in kind.details.items())
        print_wrapped(
            f"{KIND_LABELS[kind.kind]}: {kind.count:,} in {_rows(kind.rows, report.sampled_rows)}{details and f': {details}'}"
        )
        print_table([(f"  {_place(example)}", one_line(example.note)) for example in kind.examples])


def _show_redacted(result: "RedactResult") -> None:
    _print_heading("redacted copy")
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in result.replaced.most_common()) or "nothing"
    keys = ", ".join(f"{count:,} {detail}" for detail, count in result.keys.most_common())
    changed = f"replaced {kinds}, in {format_rows(result.changed_rows)}"
    print_wrapped(f"{result.path}: {format_rows(result.rows)}; {changed}{keys and f' ({keys})'}")
    if result.unreadable:
        print_wrapped(f"{format_rows(result.unreadable)} could not be read, and are empty in the copy.")
    if result.clean:
        print_wrapped(f"Train on it with --clean {result.clean}, as the original is cleaned.")
    print_wrapped(result.note)


def _show_examples(heading: str, examples: Sequence["Example"]) -> None:
    if examples and heading:
        print_wrapped(f"{heading}:")
    for example in examples:
        place = f"{_place(example)}, {example.note}" if example.note else _place(example)
        print_wrapped(f"{one_line(place)}: {one_line(example.text)}", "  ")


def _place(example: "Example") -> str:
    return f"row {example.row:,} of {example.source}" if example.source else f"row {example.row:,}"


def _print_heading(text: str) -> None:
    print(f"\n{text}")


def _rows(rows: int, total: int) -> str:
    return f"{format_rows(rows)} ({format_share_of(rows, total)})"
