"""Parts that several tabs of the page use: adapters, controls, errors."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

import gradio as gr
from gradio.components import Component
from gradio.events import Dependency
from markupsafe import Markup

from ...config import SamplingParams
from ...data.row_template import unescape
from ...errors import ConfigError
from ...inference.sampling import choose_seed
from ...settings_files import resolve_settings
from ..protocol import MAX_STOPS
from ..service import ModelService, ServedModel
from . import html
from .requests import ModelOutput, PageRequests

SETTINGS = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "seed",
    "greedy",
)
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "seed")  # without effect in greedy decoding
LABELS = {name: name.replace("_", " ").capitalize() for name in SETTINGS} | {"stop": "Stop sequences"}
SETTINGS_INFOS = {
    name: str(SamplingParams.model_fields[name].description).replace("--", "") for name in SETTINGS
} | {"stop": r"The output ends before one of these. One per line; \n is a line break."}
TOP_LOGPROBS = 5  # likeliest tokens that are shown for each one
CLEAR_BUSY = """html => html.replace('aria-busy="true"', 'aria-busy="false"')"""

GONE = "{} is no longer in the library: it was renamed or removed."

on = partial(gr.on, show_progress="hidden", api_visibility="private")


@dataclass
class PageTab:
    """A tab of the page, for all visitors. Nothing in it blocks the server's event loop.

    `build` adds its controls; a visitor's settings live in their browser.
    """

    service: ModelService
    requests: PageRequests

    def adapters(self) -> list[ServedModel]:
        """Read the adapters, broken ones included."""
        return [
            replace(model, broken=self.service.hide_paths(model.broken) if model.broken else None)
            for model in self.service.list_models()
            if model.path
        ]

    def usable_names(self) -> list[str]:
        """Return the names of the adapters that can be used, the newest first."""
        usable = [model for model in self.adapters() if model.broken is None]
        return [model.id for model in sorted(usable, key=_created, reverse=True)]

    def failure(self, error: Exception) -> Markup:
        return html.failure(self.service.hide_paths(str(error)))

    def adapters_dropdown(self, info: str, scale: int) -> gr.Dropdown:
        """Create a choice of adapters, the two newest at first."""
        names = self.usable_names()
        return gr.Dropdown(names, value=names[:2], multiselect=True, label="Adapters", info=info, scale=scale)

    async def token_probabilities(self, output: ModelOutput) -> tuple[Markup, Markup] | None:
        """Show the probabilities of an output's tokens; None for an error in its place."""
        if isinstance(output, str):
            return None
        (sequence,) = output.sequences
        return await self.service.run_in_thread("format", partial(html.token_probabilities, sequence))

    def sampling_params(self, settings: Sequence[float | str | None]) -> SamplingParams:
        """Read the values of `sampling_controls`; the seed is chosen unless one is given.

        Raises:
            ConfigError: a value is out of its bounds, or above the limit of this server.
        """
        given: dict[str, object] = dict(zip(SETTINGS, settings, strict=True))
        given["stop"] = [unescape(line) for line in str(given["stop"] or "").split("\n") if line]
        ignored = SAMPLING_SETTINGS if given["greedy"] else ()
        values = {  # without defaults: that of the repetition penalty is another one in greedy decoding
            name: value
            for name, value in given.items()
            if value not in (None, "", SamplingParams.model_fields[name].default) and name not in ignored
        }
        sampling = resolve_settings(SamplingParams, values)
        problems = {}
        if sampling.max_new_tokens > self.service.config.max_tokens:
            problems["max_new_tokens"] = f"the limit of this server is {self.service.config.max_tokens:,}"
        if len(sampling.stop) > MAX_STOPS:
            problems["stop"] = f"at most {MAX_STOPS} lines"
        if problems:
            raise ConfigError("; ".join(f"{name}: {text}" for name, text in problems.items()), problems)
        return sampling.model_copy(update={"seed": choose_seed(sampling)})


def _created(model: ServedModel) -> tuple[datetime, int]:
    """Return when an adapter was made, as its manifest says, and when its folder was last changed."""
    created = datetime.min
    if model.adapter and model.adapter.manifest:
        with contextlib.suppress(ValueError):  # the manifest of an unknown adapter may hold anything
            created = datetime.fromisoformat(model.adapter.manifest.created).replace(tzinfo=None)
    try:
        changed = model.path.stat().st_mtime_ns if model.path else 0
    except OSError:  # removed meanwhile
        changed = 0
    return created, changed


def sampling_controls() -> list[gr.Component]:
    """Create the controls of `SETTINGS`, closed at first."""
    with gr.Accordion("Sampling settings", open=False), gr.Row(elem_classes="settings"):
        settings = {name: _sampling_control(name) for name in SETTINGS}
    sampling = [settings[name] for name in SAMPLING_SETTINGS]
    on(
        settings["greedy"].change,
        lambda greedy: [gr.update(interactive=not greedy)] * len(sampling),
        settings["greedy"],
        sampling,
    )
    return list(settings.values())


def _sampling_control(name: str) -> gr.Checkbox | gr.Number | gr.Textbox:
    """Create the control of a field of `SamplingParams`.

    The field checks the bounds: Gradio would report them in a box.
    """
    field, info = SamplingParams.model_fields[name], SETTINGS_INFOS[name]
    label = LABELS[name]
    if name == "stop":
        return gr.Textbox(label=label, info=info, placeholder="none", lines=2, max_lines=4)
    if field.annotation is bool:
        return gr.Checkbox(field.default, label=label, info=info)
    if field.default is None:  # a gr.Number would begin at 0
        assert isinstance(field.json_schema_extra, dict)
        return gr.Textbox(label=label, info=info, placeholder=str(field.json_schema_extra["shown"]))
    return gr.Number(field.default, label=label, info=info, step=0.05 if field.annotation is float else 1)


def show_problems(infos: Mapping[str, str], problems: Mapping[str, str] = {}) -> list[dict[str, object]]:
    """Return an update of each control: its problem in place of its help text, else that text.

    Both stand in the control's label. playground.js marks an invalid control for screen readers, and
    moves the focus to it.

    Args:
        infos: help text of each control by name, in the order of the outputs of the event.
        problems: what is wrong, by name; of other names at the first control.
    """
    others = [text for name, text in problems.items() if name not in infos]
    updates = []
    for number, (name, info) in enumerate(infos.items()):
        texts = [problems[name]] if name in problems else []
        texts += others if number == 0 else []
        problem = "; ".join(texts)
        if problem and not problem.endswith("."):  # no sentence, so it does not begin with a name
            problem = problem[0].upper() + problem[1:]
        updates.append(gr.update(info=problem or info, elem_classes=["invalid"] if problem else []))
    return updates


def keep_address(
    tab: str, defaults: Mapping[str, object], controls: list[Component], answered: Dependency | None = None
) -> None:
    """Keep the values of these controls of a tab in the page's address, so that a link shows the same.

    Args:
        tab: its name in lower case.
        defaults: name of each control in the address, and the value that is left out of it.
        controls: the controls, in that order.
        answered: an event, after which the seed of the answers is kept as well.
    """
    arguments = f"{json.dumps(tab)}, {json.dumps(defaults)}, values"
    changes = [control.change for control in controls]  # type: ignore[attr-defined]
    on(changes, None, controls, None, js=f"(...values) => lora_tuner.keepAddress({arguments})")
    if answered is not None:
        script = f"(...values) => lora_tuner.keepAddress({arguments}, lora_tuner.newSeed({json.dumps(tab)}))"
        answered.then(None, controls, None, js=script, show_progress="hidden", api_visibility="private")


def buttons(name: str) -> tuple[gr.Button, gr.Button]:
    """Create a start button of that name and a stop button.

    playground.js enables the stop button while a part of its tab has aria-busy="true"."""
    start = gr.Button(name, variant="primary", scale=0, min_width=100, size="md")
    return start, gr.Button("Stop", scale=0, min_width=70, size="md", elem_classes="while-busy")


def token_probabilities() -> gr.Checkbox:
    return gr.Checkbox(
        label="Token probabilities",
        info="Of the next outputs: on hover, and as a list.",
        container=False,
    )


def bare_text() -> gr.Checkbox:
    return gr.Checkbox(
        label="Bare text",
        info="Continue the prompt as it stands: without the template that an adapter has learned.",
        container=False,
    )


def connect_stop(event: Dependency, stop: gr.Button, output: gr.HTML) -> None:
    stop.click(None, cancels=[event])
    event.then(None, output, output, js=CLEAR_BUSY, show_progress="hidden", api_visibility="private")
