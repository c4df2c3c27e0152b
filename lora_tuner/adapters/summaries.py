"""Summaries of adapters and results: tables for the terminal, and HTML for notebooks.

Any text may come from an unknown adapter, so the HTML escapes all. It has no colours: those of the
notebook's theme, light or dark, are used.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..config import is_conversation
from ..errors import first_line
from ..text import (
    GAIN_SCALE,
    describe_coverage,
    describe_gain,
    display_name,
    escape_control,
    format_count,
    format_counts,
    format_duration,
    format_gain,
    format_rows,
    format_share,
    one_line,
    shorten,
)
from .manifest import DatasetInfo, EvalResult, Manifest, RunInfo, SourceInfo

BASE_LABEL = "(base)"  # not a valid adapter name
# Without these Jupyter takes what is between two "$" for a formula.
_CLASSES = "tex2jax_ignore mathjax_ignore"


@dataclass(frozen=True)
class Table:
    """Rows of texts. The first text names the row; a narrow terminal has no `droppable` columns."""

    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()
    title: str = ""
    droppable: Sequence[str] = ()


Summary = list[Table | str]  # tables and sentences


def to_html(parts: Iterable[Table | str]) -> str:
    """Return tables and sentences for a notebook; from an error on, its message in their place."""
    shown = []
    try:
        for part in parts:
            shown.append(_paragraph(part) if isinstance(part, str) else _table_html(part))
    except Exception as error:  # the files of an unknown adapter may hold anything
        shown.append(_paragraph(first_line(error)))
    return str(Markup("").join(shown))


def _table_html(table: Table) -> Markup:
    rows = [_cells("th", table.header)] if table.header else []
    rows += [_cells("th", row[:1]) + _cells("td", row[1:]) for row in table.rows]
    html = Markup('<table class="{}">{}</table>').format(
        _CLASSES, Markup("").join(Markup("<tr>{}</tr>").format(row) for row in rows)
    )
    return _paragraph(table.title) + html if table.title else html


def _cells(tag: str, texts: Iterable[str]) -> Markup:
    cell = Markup(f'<{tag} style="text-align: left">{{}}</{tag}>')
    return Markup("").join(cell.format(_lines(text)) for text in texts)


def _paragraph(text: str) -> Markup:
    return Markup('<p class="{}">{}</p>').format(_CLASSES, _lines(text))


def _lines(text: str) -> Markup:
    return Markup("<br>").join(escape_control(text).split("\n"))


def gain_tables(
    base: str, adapters: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[EvalResult | None]]
) -> list[Table]:
    """Return losses and gains: a row for each adapter, a column for each measured set.

    Args:
        columns: name and number of rows of each held-out set, on two lines.
        cells: `cells[adapter][set]`.
    """
    base_losses, measured = [], []
    for number, column in enumerate(zip(*cells, strict=True)):
        if (cell := next(filter(None, column), None)) is not None:
            base_losses.append(f"{cell.base_loss:.2f} ({cell.perplexities[0]:.2f})")
            measured.append(number)
    losses, gains = [[BASE_LABEL, *base_losses]], []
    for name, row in zip(adapters, cells, strict=True):
        results = [row[number] for number in measured]
        losses.append(
            [name, *(f"{cell.loss:.2f} ({cell.perplexities[1]:.2f})" if cell else "" for cell in results)]
        )
        gains.append(
            [name, *(format_gain(cell.gain, cell.standard_error, "+.2f") if cell else "" for cell in results)]
        )
    header = ("", *(columns[number] for number in measured))
    name = shorten(one_line(display_name(base)), 40)
    gain_title = f"gain over {name} (loss, ± standard error)\nbelow zero: worse than the base; {GAIN_SCALE}"
    return [
        Table(losses, header, "held-out loss (perplexity) on each held-out set"),
        Table(gains, header, gain_title),
    ]


def adapter_rows(
    base: str, weights: Sequence[tuple[str, str]], manifest: Manifest | None
) -> list[tuple[str, str]]:
    """Return name and text of each row of a summary, maybe from an untrusted manifest.

    Args:
        base: its name, for an adapter without a manifest.
        weights: rows about the weights and their config.
    """
    if manifest is None:
        rows = [("Base", base or "unknown"), *weights, ("Origin", "another tool (no manifest)")]
        return [(name, text) for name, text in rows if text]
    data, run, result = manifest.data, manifest.run, manifest.result
    rows = [
        ("Base", f"{display_name(manifest.base.name)} ({manifest.base.weights})"),
        *weights,
        ("Parents", ", ".join(f"{parent.name} ({parent.sha256[:12]})" for parent in manifest.parents)),
        ("Command", f"`{manifest.made_by}`" if manifest.made_by else ""),
        *(_dataset_rows(data) if data else []),
        ("Text used", _format_use(run) if run else ""),
        ("Run", _format_run(run) if run else ""),
        ("Learning rate", run.probe.describe() if run and run.probe else ""),
        ("Coverage", _format_coverage(run) if run else ""),
    ]
    if result:
        before, after = result.perplexities
        rows += [
            ("Held-out loss", f"{result.loss:.3f} (base: {result.base_loss:.3f})"),
            (
                "Gain",
                f"{format_gain(result.gain, result.standard_error)}"
                f"{f' (standard error, {result.format_rows()}, paired)' if result.standard_error is not None else ''}: "
                f"{describe_gain(result.gain)}",
            ),
            ("Perplexity", f"{after:.2f} (base: {before:.2f})"),
            *(manifest.preference.card_rows() if manifest.preference else []),
            *(manifest.labels.card_rows() if manifest.labels else []),
            ("General text", manifest.general.describe_change() if manifest.general else ""),
            ("Advice", (run.advice if run else None) or ""),
        ]
    return [(name, text) for name, text in rows if text]


def format_method(config: Mapping[str, object]) -> str:
    """Return the name of the method in a PEFT config."""
    if config.get("use_dora"):
        return "DoRA"
    return "rsLoRA" if config.get("use_rslora") else "LoRA"


def format_ranks(ranks: Iterable[int]) -> str:
    """Format the ranks of layers, as in "rank 8" or "ranks 2 to 8"."""
    ranks = {*ranks}
    return f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"


def _dataset_rows(data: DatasetInfo) -> list[tuple[str, str]]:
    split = f" ({data.eval_split})" if data.eval_split else ""
    return [
        ("Data", display_name(data.source)),
        ("Format", _format_layout(data)),
        ("Filter", ", ".join(data.where)),
        ("Rows", format_counts(data.counts)),
        *((f"From {display_name(source.name)}", _format_source(source)) for source in data.sources),
        ("Held out by", data.group_by or ""),
        ("Evaluated on", f"{display_name(data.eval_dataset)}{split}" if data.eval_dataset else ""),
    ]


def _format_source(source: SourceInfo) -> str:
    parts = [f"{format_share(source.weight)} of the sequences"] if source.weight else []
    parts.append(format_counts(source.counts))
    if result := source.result:
        loss = f"held-out loss {result.loss:.3f} (base: {result.base_loss:.3f})"
        parts.append(f"{loss}, gain {format_gain(result.gain, result.standard_error)}, {result.format_rows()}")
    return "; ".join(parts)


def _format_layout(data: DatasetInfo) -> str:
    if data.format.startswith("preferences"):
        return "preferences, of which the answers count"
    formats = data.format.split(" + ")
    if conversations := [name for name in formats if is_conversation(name)]:
        rest = "; other rows as text" if len(conversations) < len(formats) else ""
        return f"conversations ({' + '.join(conversations)}), trained on the answers alone{rest}"
    if data.template is None:
        return ""
    template = data.template.replace("\n", "\\n")
    return f"template {template}" + (f", trained on {data.answer_column} alone" if data.answer_column else "")


def _format_use(run: RunInfo) -> str:
    if run.used_answer_share is not None:
        tokens, answers = format_share(run.used_share or 0), format_share(run.used_answer_share)
        return (
            f"{tokens} of the tokens, {answers} of those of answers; {format_rows(run.truncated_rows)} truncated"
        )
    return format_share(run.used_share) if run.used_share is not None else ""


def _format_run(run: RunInfo) -> str:
    return (
        f"{run.method}, {format_count(run.steps, 'step')}, {format_count(run.tokens, 'token')}, "
        f"{format_duration(run.seconds)} on {run.device} in {run.dtype}"
    )


def _format_coverage(run: RunInfo) -> str:
    """Share of the blocks that is adapted; empty for older manifests, which do not tell it."""
    return "" if run.coverage is None else describe_coverage(run.coverage, run.not_adapted)
