"""HTML of the playground that several tabs share: notes, errors, outputs, progress.

Any text may come from a model or from an unknown adapter, so every value is escaped by its template
(`Markup.format`). Nothing here depends on Gradio; its colours are CSS variables (playground.css).
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import jinja2
from markupsafe import Markup

from ...errors import Progress
from ...inference.sequence import Sequence as TokenSequence
from ...inference.sequence import TokenLogprobs
from ...text import display_name, format_count, format_share
from ..responses import OutputReader, token_text
from ..scheduler import Request
from .requests import Question


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


def status(text: str) -> Markup:
    """Show the result of an action, which screen readers read aloud."""
    return Markup('<p class="note" role="status">{}</p>').format(text)


def failure(text: str) -> Markup:
    """Show an error on one line."""
    return Markup('<p class="failure" role="alert">{}</p>').format(" ".join(text.split()))


@dataclass(frozen=True)
class Output:
    """An output, or the error in its place; None before it begins. `tokens` is what
    `token_probabilities` makes of it."""

    title: str
    question: Question
    output: Request | str | None
    tokens: tuple[Markup, Markup] | None = None


def outputs(columns: Sequence[Output], below: str = "", *, tab: str = "", seed: int | None = None) -> Markup:
    """Show the current outputs side by side, each after its prompt and below its title.

    Each request has one sequence. In a chat the prompt is a question, which is parted from the
    answer. `tab` and `seed` are for playground.js.
    """
    busy = any(not isinstance(column.output, str) and not is_complete(column.output) for column in columns)
    return Markup(
        '<div class="answers" data-tab="{}" data-seed="{}" aria-live="polite" aria-busy="{}">{}</div>{}'
    ).format(
        tab,
        "" if seed is None else seed,
        str(busy).lower(),
        Markup("").join(map(_output, columns)),
        note(below) if below else "",
    )


def ends(left: str, right: str) -> Markup:
    """Name the ends of the slider above."""
    return Markup('<p class="ends"><span>← {}</span><span>{} →</span></p>').format(left, right)


def is_complete(output: Request | None) -> bool:
    return output is not None and output.complete


def _output(column: Output) -> Markup:
    text: str
    text, error, style, tokens = "", "", Markup(""), "Waiting ..."
    output, listed = column.output, Markup("")
    if isinstance(output, str):
        error, tokens = output, ""
    elif output is not None:
        (sequence,) = output.sequences
        text, count, error = (
            sequence.settled_text,
            len(sequence.output_ids),
            str(output.error or ""),
        )
        end = ""
        if sequence.complete and not error:
            end = ", finished" if sequence.finished else ", cut off"
        tokens = format_count(count, "token") + end
    if column.tokens:
        spans, listed = column.tokens
        text = Markup("<span>{}</span>").format(spans)
    if not isinstance(output, str) and not is_complete(output):
        style = Markup(' class="writing"')
    return Markup(
        '<article{}><h2>{}</h2><p class="text"><span class="{}">{}</span>{}</p>{}<p class="facts">{}{}</p>{}</article>'
    ).format(
        style,
        column.title,
        "prompt question" if column.question.is_chat else "prompt",
        column.question.text,
        text,
        failure(error) if error else "",
        tokens,
        Markup('<button type="button" class="copy" aria-label="Copy the text of {}">Copy</button>').format(
            column.title
        )
        if text
        else "",
        listed,
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


def progress(event: Progress | None) -> Markup:
    if event is None:
        return note("Waiting for earlier evaluations, or loading rows ...")
    return Markup(
        '<div aria-busy="true"><p class="note">{}: {} of {} rows</p>'
        '<progress value="{}" max="{}" aria-label="Rows evaluated"></progress></div>'
    ).format(event.stage, event.done, event.total, event.done, max(event.total, 1))
