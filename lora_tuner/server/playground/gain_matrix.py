"""The gain matrix as a heat map: a headline, a table with figures on hover, and downloads."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from markupsafe import Markup

from ...adapters.manifest import EvalResult
from ...evaluation.gain_matrix import GainMatrix
from ...text import GAIN_SCALE, describe_gain, display_name, format_count, format_gain, format_names, shorten
from . import charts, html

_COLUMNS = ("adapter", "held-out rows of", "gain", "standard error", "loss", "loss of the base", "rows", "tokens")
_LETTER, _CELL_HEIGHT = 8, 52  # pixels in the picture file


class _Cell(NamedTuple):
    """A cell in words; `share` is its part of the largest gain or loss, from 0 to 1."""

    kind: str  # its class in the style sheet
    gain: str
    error: str
    share: float
    title: str


def show_gains(matrix: GainMatrix) -> Markup:
    """Show the matrix as a heat map, one colour for gains and one for losses."""
    title = f"Gain over {display_name(matrix.base)} in nats per token, ± standard error"
    largest = max((abs(cell.gain) for *_, cell in _results(matrix)), default=0.0) or 1.0
    drawn = _merge_columns(matrix)
    sets = [eval_set.name for eval_set in drawn.sets]
    rows = []
    for name, line in zip(drawn.adapters, drawn.cells, strict=True):
        rows.append((name, [_cell(cell, name, on, largest) for on, cell in zip(sets, line, strict=True)]))
    columns = [(eval_set.name, eval_set.format_rows()) for eval_set in drawn.sets]
    table = charts.template("gains.html.jinja").render(title=title, columns=columns, rows=rows)
    missing = [
        html.note(f"{each.name} cannot be evaluated: {each.missing}.") for each in matrix.sets if each.missing
    ]
    help_text = html.note(
        f"Blue: predicts these rows better than the base. Red: worse. A gain of {GAIN_SCALE}. "
        "Rest the pointer on a cell for all of its figures."
    )
    picture = _picture(title, sets, rows)
    figures = [
        (name, on, cell.gain, cell.standard_error, cell.loss, cell.base_loss, cell.rows, cell.tokens)
        for name, on, cell in _results(matrix)
    ]
    links = charts.downloads("gains", picture, [_COLUMNS, *figures])
    return Markup("").join([_headline(matrix), Markup(table), *missing, help_text, links])


def _merge_columns(matrix: GainMatrix) -> GainMatrix:
    """Merge the columns of adapters with the same held-out rows, as the trials of a sweep have."""
    columns: dict[str, list[int]] = {}
    for index, eval_set in enumerate(matrix.sets):
        columns.setdefault(eval_set.hash() if eval_set.texts else eval_set.name, []).append(index)
    sets = []
    for first, *others in columns.values():
        names = [matrix.sets[index].name for index in (first, *others)]
        sets.append(replace(matrix.sets[first], name=format_names(names, 1)))
    cells = [[line[first] for first, *_ in columns.values()] for line in matrix.cells]
    return GainMatrix(matrix.base, matrix.adapters, sets, cells)


def _results(matrix: GainMatrix) -> Iterator[tuple[str, str, EvalResult]]:
    """Yield adapter, held-out set and result of the cells that were measured."""
    for name, line in zip(matrix.adapters, matrix.cells, strict=True):
        for eval_set, cell in zip(matrix.sets, line, strict=True):
            if cell is not None:
                yield name, eval_set.name, cell


def _cell(result: EvalResult | None, adapter: str, on: str, largest: float) -> _Cell:
    if result is None:
        return _Cell("missing", "missing", "", 0.0, f"{adapter} on the held-out rows of {on}: not measured.")
    gain, _, error = format_gain(result.gain, result.standard_error, "+.3f").partition(" ")
    title = (
        f"{adapter} on the held-out rows of {on}: gain {gain} {error} nats per token, so that "
        f"{describe_gain(result.gain)} as with the base.\n"
        f"Loss {result.loss:.3f}, of the base {result.base_loss:.3f}, over {result.format_rows()} of "
        f"{format_count(result.tokens, 'token')}."
    )
    return _Cell("helps" if result.gain >= 0 else "forgot", gain, error, abs(result.gain) / largest, title)


def _headline(matrix: GainMatrix) -> Markup:
    """Say which adapter gains most on its own rows, and which has forgotten most, beyond 2 standard errors."""
    results = list(_results(matrix))
    own = [(name, cell) for name, on, cell in results if name == on]
    if not own:
        return Markup("")
    name, best = max(own, key=lambda entry: entry[1].gain)
    text = "No adapter is clearly better than the base on its own held-out rows."
    if best.gain > 2 * (best.standard_error or 0.0):
        text = (
            f"{name} gains most on its own held-out rows: {describe_gain(best.gain)} as with "
            f"{display_name(matrix.base)}."
        )
    name, on, worst = min(results, key=lambda entry: entry[2].gain)
    if worst.gain < -2 * (worst.standard_error or 0.0):
        text += f" {name} is worse than the base on the rows of {on}: {describe_gain(worst.gain)}."
    return Markup('<p class="headline">{}</p>').format(text)


def _picture(title: str, columns: list[str], rows: list[tuple[str, list[_Cell]]]) -> Markup:
    names = [shorten(name, 35) for name, _ in rows]
    columns = [shorten(name, 35) for name in columns]
    errors = [cell.error for _, cells in rows for cell in cells]
    left, cell = (24 + _LETTER * max(map(len, texts)) for texts in (["adapter", *names], columns + errors))
    inside = charts.template("gains.svg.jinja").render(
        title=title,
        left=left,
        cell=cell,
        columns=columns,
        rows=list(zip(names, (cells for _, cells in rows), strict=True)),
    )
    width = max(left + cell * len(columns) + 8, 16 + 7 * len(title))
    return charts.svg_file(title, Markup(inside), width, 92 + _CELL_HEIGHT * len(rows))
