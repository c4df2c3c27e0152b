"""HTML of the library: table of adapters, card of one with curves, samples and lineage.

Any text may come from an unknown adapter: the templates escape it.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO

from markupsafe import Markup

from ...adapters import plots
from ...adapters.adapter import CARD_FILE, METRICS_FILE, Adapter
from ...adapters.library import current_name
from ...adapters.manifest import ParentInfo
from ...errors import AdapterError, LoraTunerError
from ...models import delta
from ...models.layers import Layer
from ...text import display_name, format_bytes, format_count, format_gain
from ..service import ServedModel
from . import charts, html, train_html

MAX_CARD = 100_000  # characters of a model card
MAX_RELATIVES = 100  # adapters in a lineage: a stranger's manifest may name any number
COLUMNS = ("name", "gain", "held-out loss", "rank", "size", "data", "rows", "created")
EMPTY = "No adapters yet. Train one: it appears here once it is saved."


@dataclass
class Relative:
    """An adapter in a lineage; `here` is its name in the library, None if it is not there."""

    name: str
    here: str | None
    note: str = ""
    nodes: list["Relative"] = field(default_factory=list)


def library(models: Sequence[ServedModel]) -> Markup:
    """Show a table of adapters: name, then facts or the reason why one cannot be used."""
    if not models:
        return html.note(EMPTY)
    rows = [
        {
            "name": model.id,
            "broken": (model.broken or "") if model.adapter is None else None,
            "cells": _cells(model.adapter) if model.adapter else (),
            "text": " ".join(
                [model.id, model.broken or "", *(_searched(model.adapter) if model.adapter else ())]
            ),
        }
        for model in models
    ]
    return Markup(html.template("library.html.jinja").render(columns=COLUMNS, rows=rows))


def _searched(adapter: Adapter) -> list[str]:
    """Return the texts that the filter looks at, beside the name."""
    data = adapter.manifest.data if adapter.manifest else None
    return [display_name(adapter.base), *([display_name(data.name), *data.where] if data else ())]


def _cells(adapter: Adapter) -> list[tuple[str, float | str]]:
    """Return text of each fact, and the value to sort it by; both are empty where it is unknown."""
    manifest = adapter.manifest
    data, result = (manifest.data, manifest.result) if manifest else (None, None)
    source = ", ".join([display_name(data.name), *data.where]) if data else ""
    rows = data.counts.get("train", "") if data else ""
    created = manifest.created if manifest else ""
    return [
        (format_gain(result.gain, result.standard_error, ".3f"), result.gain) if result else ("", ""),
        (f"{result.loss:.3f}", result.loss) if result else ("", ""),
        (str(adapter.rank), adapter.rank),
        (format_bytes(adapter.bytes), adapter.bytes),
        (source, source),
        (f"{rows:,}" if rows != "" else "", rows),
        (created[:10], created),
    ]


def card(
    model: ServedModel,
    adapter: Adapter | None,
    models: Sequence[ServedModel],
    hide_paths: Callable[[str], str],
) -> Markup:
    """Show an adapter: facts, lineage, loss curve, samples, model card; if broken, the reason.

    The model card is not rendered: Markdown may load images of other hosts.

    Args:
        model: as it is listed.
        adapter: its folder; None if it cannot be read.
        models: the listing, for its relatives.
        hide_paths: removes folders from a text.
    """
    broken = f"{model.id} cannot be used. {model.broken}" if model.broken else None
    shown: dict[str, object] = {"name": model.id, "broken": broken, "readme": None}
    if adapter is not None:
        shown |= {
            "facts": [(key, hide_paths(text.strip("`"))) for key, text in adapter.summary_rows()],
            "parents": _parents(adapter, models),
            "children": _children(adapter, models),
            "loss": or_reason(lambda: _loss_chart(adapter), hide_paths),
            "samples": or_reason(lambda: train_html.samples(adapter.samples), hide_paths),
            "readme": _readme(adapter),
        }
    return Markup(html.template("card.html.jinja").render(shown))


def or_reason(draw: Callable[[], Markup], hide_paths: Callable[[str], str]) -> Markup:
    """Return what is drawn, or the reason why it cannot be."""
    try:
        return draw()
    except LoraTunerError as error:
        reason = hide_paths(str(error))
    except Exception as error:  # the files of an unknown adapter may hold anything
        reason = f"Cannot show this: {hide_paths(str(error))}"
    return html.note(reason)


def _weights_hash(adapter: Adapter) -> str | None:
    weights = adapter.manifest.weights if adapter.manifest else None
    return weights.sha256 if weights else None


def _parents(adapter: Adapter, models: Sequence[ServedModel]) -> list[Relative]:
    """Return parents with their own parents; each is looked for by the hash of its weights."""
    hashes = [
        (model.id, sha256) for model in models if model.adapter and (sha256 := _weights_hash(model.adapter))
    ]
    left = MAX_RELATIVES

    def walk(parents: Sequence[ParentInfo]) -> list[Relative]:
        nonlocal left
        relatives = []
        for parent in parents[:left]:
            left -= 1
            here = current_name(parent, hashes)
            note = "not in this library" if here is None else "" if here == parent.name else f"was {parent.name}"
            relatives.append(Relative(parent.name, here, note, walk(parent.parents)))
        return relatives

    return walk(adapter.manifest.parents) if adapter.manifest else []


def _children(adapter: Adapter, models: Sequence[ServedModel]) -> list[Relative]:
    """Return the adapters that name this one as a parent, with their own children; each one once."""
    seen = {_weights_hash(adapter)}

    def walk(sha256: str | None) -> list[Relative]:
        relatives = []
        for model in models:
            manifest = model.adapter.manifest if model.adapter else None
            if manifest is None or model.adapter is None or sha256 is None or len(seen) > MAX_RELATIVES:
                continue
            own = _weights_hash(model.adapter)
            if own not in seen and any(parent.sha256 == sha256 for parent in manifest.parents):
                seen.add(own)
                relatives.append(Relative(model.id, model.id, "", walk(own)))
        return relatives

    return walk(_weights_hash(adapter))


def _loss_chart(adapter: Adapter) -> Markup:
    manifest = adapter.manifest
    if manifest is None or manifest.run is None:
        origin = (
            f"was made by `{manifest.made_by}`"
            if manifest and manifest.made_by
            else "was not trained by lora_tuner"
        )
        raise AdapterError(f"No loss curve: this adapter {origin}.")
    run, result = manifest.run, manifest.result
    metrics = plots.read_metrics(adapter.path / METRICS_FILE)
    if result and not any(entry["step"] == run.kept_step and "eval_loss" in entry for entry in metrics):
        metrics.append({"step": run.kept_step, "eval_loss": result.loss})
    objective = manifest.preference.objective if manifest.preference else "sft"
    base_loss = result.base_loss if result else None
    return charts.loss_chart(metrics, run.steps, base_loss, f"{adapter.name}-loss", objective)


def spectrum(adapter: Adapter, layers: Mapping[str, Layer]) -> Markup:
    """Show the singular values of each layer's update. Price: most of a second."""
    delta.check_summable(adapter)
    energies = {
        module: delta.singular_values(update).square()
        for module, update in delta.load_deltas(adapter, layers).items()
    }
    energies = {module: energy for module, energy in energies.items() if float(energy.sum()) > 0}
    if not energies:
        raise AdapterError("No spectrum: the update of every layer is zero.")
    png = BytesIO()
    plots.plot_spectra({module: energy.tolist() for module, energy in energies.items()}, {}, png)
    shares = sorted(float(energy[0] / energy.sum()) for energy in energies.values())
    share = f"{shares[len(shares) // 2]:.0%}"
    alt = "Spectrum: share of each singular value in the energy of its layer's update"
    image = Markup('<img src="data:image/png;base64,{}" alt="{}">').format(
        base64.b64encode(png.getvalue()).decode(), alt
    )
    return Markup(
        '<figure class="spectrum">{}<figcaption>{}; median share of the largest singular value: {}.</figcaption></figure>'
    ).format(image, format_count(len(shares), "layer"), share)


def _readme(adapter: Adapter) -> str:
    path = adapter.path / CARD_FILE
    if not path.is_file() or path.is_symlink():  # a link may lead to any file
        return "This adapter has no model card."
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(MAX_CARD)


def bullets(texts: Sequence[str]) -> Markup:
    """Show notes as a list; nothing without any."""
    items = Markup("").join(Markup("<li>{}</li>").format(text) for text in texts)
    return Markup('<ul class="note">{}</ul>').format(items) if texts else items


def download(href: str, title: str) -> Markup:
    """Show the link to a file of this server."""
    return Markup('<p class="note" role="status">Ready: <a href="{}" download>Download {}</a></p>').format(
        href, title
    )
