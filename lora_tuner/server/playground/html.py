"""What the playground shows, as HTML: answers side by side, the library, an adapter's card, the gains as a heat map.

Surprise: every word may be a stranger's, a model's as well as an adapter's, so all that is put into a template is escaped by
it (`Markup.format`). Limit: nothing here knows Gradio, its colours come as CSS variables (playground.css).
"""

import base64
from collections.abc import Sequence

from markupsafe import Markup

from ...adapters.adapter import Adapter
from ...adapters.model_card import summary_rows
from ...errors import Progress
from ...evaluation import GainMatrix
from ...text import display_name, format_bytes
from ..scheduler import Request
from ..service import ServedModel

_NONE = Markup('<span class="faint">–</span>')


def head(base: str) -> Markup:
    return Markup(
        "<h1>lora_tuner</h1><p>One base, <b>{}</b>, and adapters beside it that write in other ways.</p>"
    ).format(display_name(base))


def note(text: str) -> Markup:
    return Markup('<p class="note">{}</p>').format(text)


def failure(text: str) -> Markup:
    """An error as one line."""
    return Markup('<p class="failure" role="alert">{}</p>').format(" ".join(text.split()))


def answers(prompt: str, asked: Sequence[tuple[str, Request | str]], more: str = "") -> Markup:
    """What the first row of each job says by now, side by side, the prompt in front; `more` is said below."""
    busy = any(isinstance(job, Request) and not job.complete for _, job in asked)
    columns = Markup("").join(_answer(name, prompt, job) for name, job in asked)
    return Markup('<div class="answers" aria-live="polite" aria-busy="{}">{}</div>{}').format(
        str(busy).lower(), columns, note(more) if more else ""
    )


def _answer(name: str, prompt: str, job: Request | str) -> Markup:
    if isinstance(job, str):
        text, below, error = "", Markup(""), job
    else:
        (row,) = job.sequences
        text, count, error = row.settled_text, len(row.output_ids), str(job.error or "")
        end = "" if not row.complete or error else ", the end" if row.finished else ", cut off"
        below = Markup('<p class="facts">{} token{}{}</p>').format(count, "" if count == 1 else "s", end)
    writing = isinstance(job, Request) and not job.complete
    return Markup('<article{}><h2>{}</h2><p class="text"><span class="prompt">{}</span>{}</p>{}{}</article>').format(
        Markup(' class="writing"') if writing else "", name, prompt, text, failure(error) if error else "", below
    )


def library(models: Sequence[ServedModel]) -> Markup:
    """A row for each adapter: a button with its name, and its figures or the reason why it does not answer."""
    if not models:
        return note("There are no adapters yet. python cli.py train makes one; it appears here as soon as it is there.")
    header = ("name", "gain", "held-out loss", "rank", "size", "data", "rows", "made")
    cells = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in header)
    lines = Markup("").join(
        Markup('<tr><th scope="row"><button type="button" data-name="{}">{}</button></th>{}</tr>').format(
            model.id, model.id, _figures(model)
        )
        for model in models
    )
    return Markup(
        '<div class="wide" tabindex="0"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(cells, lines)


def _figures(model: ServedModel) -> Markup:
    adapter = model.adapter
    if adapter is None:
        return Markup('<td colspan="7" class="broken">{}</td>').format(model.broken or "")
    manifest = adapter.manifest
    data, result = (manifest.data, manifest.result) if manifest else (None, None)
    figures = (
        f"{result.gain:.3f} ± {result.standard_error:.3f}" if result else _NONE,
        f"{result.loss:.3f}" if result else _NONE,
        str(adapter.rank),
        format_bytes(adapter.bytes),
        ", ".join([display_name(data.name), *data.where]) if data else _NONE,
        f"{data.counts['train']:,}" if data and "train" in data.counts else _NONE,
        manifest.created[:10] if manifest else _NONE,
    )
    return Markup("").join(Markup("<td>{}</td>").format(it) for it in figures)


def card(adapter: Adapter, pictures: Sequence[Markup], readme: str) -> Markup:
    """All that is known of an adapter. Its own words are shown as they are, never as Markdown: they may name pictures of other
    hosts."""
    lines = Markup("").join(Markup("<dt>{}</dt><dd>{}</dd>").format(key, value) for key, value in summary_rows(adapter))
    return Markup(
        '<section class="card"><h2>{}</h2><dl>{}</dl><div class="pictures">{}</div>'
        '<details><summary>Model card</summary><pre tabindex="0">{}</pre></details></section>'
    ).format(adapter.name, lines, Markup("").join(pictures), readme)


def picture(png: bytes, alt: str, caption: str) -> Markup:
    """A picture within the page, so that no file needs an address."""
    return Markup('<figure><img src="data:image/png;base64,{}" alt="{}"><figcaption>{}</figcaption></figure>').format(
        base64.b64encode(png).decode(), alt, caption
    )


def no_picture(why: str) -> Markup:
    return Markup('<figure class="none"><figcaption>{}</figcaption></figure>').format(why)


def progress(event: Progress | None) -> Markup:
    if event is None:
        return note("Reading the rows ...")
    return Markup(
        '<div aria-busy="true"><p class="note">{}: {} of {} rows</p>'
        '<progress value="{}" max="{}" aria-label="Rows measured"></progress></div>'
    ).format(event.stage, event.done, event.total, event.done, max(event.total, 1))


def gains(matrix: GainMatrix) -> Markup:
    """The gain matrix as a heat map: a colour where an adapter helps, another where it has forgotten, and the figures."""
    most = max((abs(cell.gain) for line in matrix.cells for cell in line if cell), default=0.0) or 1.0
    columns = Markup("").join(
        Markup('<th scope="col">{}<small>{} rows</small></th>').format(it.name, len(it.texts)) for it in matrix.sets
    )
    lines = []
    for name, line in zip(matrix.adapters, matrix.cells, strict=True):
        cells = Markup("").join(
            Markup('<td class="missing">missing</td>')
            if cell is None
            else Markup('<td class="{}" style="--share: {}%"><b>{}</b><small>± {}</small></td>').format(
                "helps" if cell.gain >= 0 else "forgot",
                f"{abs(cell.gain) / most * 100:.0f}",
                f"{cell.gain:+.3f}",
                f"{cell.standard_error:.3f}",
            )
            for cell in line
        )
        lines.append(Markup('<tr><th scope="row">{}</th>{}</tr>').format(name, cells))
    missing = Markup("").join(
        note(f"{it.name} has no column of figures: {it.missing}.") for it in matrix.sets if it.missing
    )
    return Markup(
        '<div class="wide" tabindex="0"><table class="heat"><caption>Gain over {} in nats a token: adapters down, the held-out '
        "rows they are measured on across</caption><thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table></div>"
        "{}{}"
    ).format(
        display_name(matrix.base),
        columns,
        Markup("").join(lines),
        missing,
        note(
            "Above zero an adapter foretells these rows better than the base; below zero it has forgotten how they are written."
        ),
    )


def command(text: str) -> Markup:
    """What to type to keep a blend."""
    return Markup(
        '<p class="note">To keep this blend in the library:</p><pre class="command" tabindex="0">{}</pre>'
    ).format(text)
