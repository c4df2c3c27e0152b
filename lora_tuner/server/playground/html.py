"""HTML of the playground: outputs, library, details of an adapter, progress.

Any text may come from a model or from an unknown adapter, so every value is escaped by its template
(`Markup.format`). Nothing here depends on Gradio; its colours are CSS variables (playground.css).
"""

import base64
import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import jinja2
from markupsafe import Markup

from ...adapters import plots
from ...adapters.adapter import CARD_FILE, METRICS_FILE, Adapter
from ...adapters.model_card import summary_rows
from ...errors import AdapterError, LoraTunerError, Progress
from ...inference.sequence import Sequence as TokenSequence
from ...inference.sequence import TokenLogprobs
from ...models import delta
from ...models.layers import Layer
from ...text import display_name, format_bytes, format_count, format_gain, format_share
from ..responses import OutputReader, token_text
from ..scheduler import Request
from ..service import ServedModel

MAX_CARD = 100_000  # characters of a model card
_NONE = Markup('<span class="faint">–</span>')
_LIBRARY_HEADER = Markup("").join(
    Markup('<th scope="col">{}</th>').format(name)
    for name in ("name", "gain", "held-out loss", "rank", "size", "data", "rows", "created")
)


@cache
def template(name: str) -> jinja2.Template:
    """Return a template of this folder, which escapes all values."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(autoescape=True, loader=loader).get_template(name)


def head(base: str) -> Markup:
    return Markup("<h1>lora_tuner</h1><p>Base model <b>{}</b> and its LoRA adapters, side by side.</p>").format(
        display_name(base)
    )


def note(text: str) -> Markup:
    return Markup('<p class="note">{}</p>').format(text)


def failure(text: str) -> Markup:
    """Show an error on one line."""
    return Markup('<p class="failure" role="alert">{}</p>').format(" ".join(text.split()))


def outputs(
    prompt: str,
    columns: Sequence[tuple[str, Request | str]],
    chats: Collection[str] = (),
    below: str = "",
) -> Markup:
    """Show the current outputs side by side, each after the prompt and below its title.

    Each request has one sequence; a str is an error. Of the titles in `chats` the prompt is a
    question, which is parted from the answer.
    """
    busy = any(isinstance(output, Request) and not output.complete for _, output in columns)
    articles = Markup("").join(_output(title, prompt, output, title in chats) for title, output in columns)
    return Markup('<div class="answers" aria-live="polite" aria-busy="{}">{}</div>{}').format(
        str(busy).lower(), articles, note(below) if below else ""
    )


def _output(title: str, prompt: str, output: Request | str, is_chat: bool) -> Markup:
    text, error, style, tokens = "", "", Markup(""), Markup("")
    if isinstance(output, str):
        error = output
    else:
        (sequence,) = output.sequences
        text, count, error = (
            sequence.settled_text,
            len(sequence.output_ids),
            str(output.error or ""),
        )
        plural, end = "" if count == 1 else "s", ""
        if sequence.complete and not error:
            end = ", finished" if sequence.finished else ", cut off"
        tokens = Markup('<p class="facts">{} token{}{}</p>').format(count, plural, end)
        style = Markup("") if output.complete else Markup(' class="writing"')
    return Markup('<article{}><h2>{}</h2><p class="text"><span class="{}">{}</span>{}</p>{}{}</article>').format(
        style,
        title,
        "prompt question" if is_chat else "prompt",
        prompt,
        text,
        failure(error) if error else "",
        tokens,
    )


def token_probabilities(sequence: TokenSequence) -> tuple[Markup, Markup]:
    """Show the text of a sequence that has log-probabilities, each token with its own on hover.

    Tokens that make one character together are shown as one. Takes milliseconds for each 100 tokens.

    Returns:
        The text, and a list of the tokens for the keyboard, phones and screen readers.
    """
    spell = cache(partial(token_text, sequence.detokenizer.tokenizer))
    delta = OutputReader(sequence).next_delta()
    if delta is None or delta.logprobs is None:
        return Markup(""), Markup("")
    groups = [list(group) for _, group in itertools.groupby(delta.logprobs, lambda token: token.text_offset)]
    ends = [*(group[0].text_offset for group in groups[1:]), len(delta.text)]
    spans, lines = [], []
    for group, end in zip(groups, ends, strict=True):
        described = [_describe_token(token, lambda number: spell(number)[0]) for token in group]
        share = math.exp(min(sum(token.logprob for token in group), 0.0))
        title = "\n".join("\n".join(parts) for parts in described)
        text = delta.text[group[0].text_offset : end]
        spans.append(
            Markup('<span class="likely" style="--doubt: {}%" title="{}">{}</span>').format(
                round((1 - share) ** 2 * 40), title, text
            )
        )
        lines += [
            Markup("<li><b>{}</b> <span>{}</span></li>").format(chosen, ", ".join(others))
            for chosen, *others in described
        ]
    listed = Markup(
        '<details class="probabilities"><summary>Token probabilities</summary><ol tabindex="0">{}</ol></details>'
    )
    return Markup("").join(spans), listed.format(Markup("").join(lines))


def _describe_token(token: TokenLogprobs, spell: Callable[[int], str]) -> list[str]:
    """Return the token and the likeliest others at its place, each with its probability."""
    others = [(other, logprob) for other, logprob in token.top if other != token.token]
    return [
        f"{json.dumps(spell(number), ensure_ascii=False)} {format_probability(logprob)}"
        for number, logprob in [(token.token, token.logprob), *others]
    ]


def format_probability(logprob: float) -> str:
    share = math.exp(min(logprob, 0.0))
    return format_share(share) if share >= 0.001 else "under 0.1%"


def library(models: Sequence[ServedModel]) -> Markup:
    """Show a table of adapters: name, then facts or the reason why one cannot be used."""
    if not models:
        return note("No adapters yet. Train one with python cli.py train; it appears here once it is saved.")
    lines = Markup("").join(
        Markup('<tr><th scope="row"><button type="button" data-name="{}">{}</button></th>{}</tr>').format(
            model.id, model.id, _cells(model)
        )
        for model in models
    )
    return Markup(
        '<div class="wide" tabindex="0"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(_LIBRARY_HEADER, lines)


def _cells(model: ServedModel) -> Markup:
    adapter = model.adapter
    if adapter is None:
        return Markup('<td colspan="7" class="broken">{}</td>').format(model.broken or "")
    manifest = adapter.manifest
    data, result = (manifest.data, manifest.result) if manifest else (None, None)
    facts = (
        format_gain(result.gain, result.standard_error, ".3f") if result else _NONE,
        f"{result.loss:.3f}" if result else _NONE,
        str(adapter.rank),
        format_bytes(adapter.bytes),
        ", ".join([display_name(data.name), *data.where]) if data else _NONE,
        f"{data.counts['train']:,}" if data and "train" in data.counts else _NONE,
        manifest.created[:10] if manifest else _NONE,
    )
    return Markup("").join(Markup("<td>{}</td>").format(fact) for fact in facts)


def card(adapter: Adapter, layers: Mapping[str, Layer], hide_paths: Callable[[str], str]) -> Markup:
    """Show the details of an adapter: facts, loss curve, spectrum, model card.

    The model card is not rendered: Markdown may load images of other hosts.
    """
    lines = Markup("").join(
        Markup("<dt>{}</dt><dd>{}</dd>").format(key, value) for key, value in summary_rows(adapter)
    )
    pictures = [
        _picture(plot, hide_paths)
        for plot in (partial(_plot_loss, adapter), partial(_plot_spectrum, adapter, layers))
    ]
    return Markup(
        '<section class="card"><h2>{}</h2><dl>{}</dl><div class="pictures">{}</div>'
        '<details><summary>Model card</summary><pre tabindex="0">{}</pre></details></section>'
    ).format(adapter.name, lines, Markup("").join(pictures), _readme(adapter))


def _picture(plot: Callable[[BytesIO], tuple[str, str]], hide_paths: Callable[[str], str]) -> Markup:
    """Embed a plot with its alternative text and caption, or the reason why there is none."""
    png = BytesIO()
    try:
        alt, caption = plot(png)
    except LoraTunerError as error:
        reason = hide_paths(str(error))
    except Exception as error:  # the files of an unknown adapter may hold anything
        reason = f"Cannot plot this: {hide_paths(str(error))}"
    else:
        data = base64.b64encode(png.getvalue()).decode()
        return Markup(
            '<figure><img src="data:image/png;base64,{}" alt="{}"><figcaption>{}</figcaption></figure>'
        ).format(data, alt, caption)
    return Markup('<figure class="none"><figcaption>{}</figcaption></figure>').format(reason)


def _plot_loss(adapter: Adapter, png: BytesIO) -> tuple[str, str]:
    manifest = adapter.manifest
    if manifest is None or manifest.run is None or manifest.data is None:
        raise AdapterError("No loss curve: this adapter was not trained by lora_tuner.")
    plots.plot_loss(plots.read_metrics(adapter.path / METRICS_FILE), manifest, png)
    return "Loss by training step", f"{format_count(manifest.run.steps, 'step')}; lower is better."


def _plot_spectrum(adapter: Adapter, layers: Mapping[str, Layer], png: BytesIO) -> tuple[str, str]:
    delta.check_summable(adapter)
    energies = {
        module: delta.singular_values(update).square()
        for module, update in delta.load_deltas(adapter, layers).items()
    }
    energies = {module: energy for module, energy in energies.items() if float(energy.sum()) > 0}
    if not energies:
        raise AdapterError("No spectrum: the update of every layer is zero.")
    plots.plot_spectra({module: energy.tolist() for module, energy in energies.items()}, {}, png)
    shares = sorted(float(energy[0] / energy.sum()) for energy in energies.values())
    return (
        "Spectrum: share of each singular value in the energy of its layer's update",
        f"{format_count(len(shares), 'layer')}; median share of the largest singular value: {shares[len(shares) // 2]:.0%}.",
    )


def _readme(adapter: Adapter) -> str:
    path = adapter.path / CARD_FILE
    if not path.is_file() or path.is_symlink():  # a link may lead to any file
        return "This adapter has no model card."
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(MAX_CARD)


def progress(event: Progress | None) -> Markup:
    if event is None:
        return note("Waiting for earlier evaluations, or loading rows ...")
    return Markup(
        '<div aria-busy="true"><p class="note">{}: {} of {} rows</p>'
        '<progress value="{}" max="{}" aria-label="Rows evaluated"></progress></div>'
    ).format(event.stage, event.done, event.total, event.done, max(event.total, 1))


def command(text: str) -> Markup:
    """Show a command to copy."""
    return Markup(
        '<p class="note">Save this blend in the library:</p><pre class="command" tabindex="0">{}</pre>'
    ).format(text)
