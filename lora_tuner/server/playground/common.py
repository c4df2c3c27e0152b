"""Parts that several tabs of the page use: adapters, controls, errors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import gradio as gr
from gradio.events import Dependency
from markupsafe import Markup

from ...config import SamplingParams
from ...errors import ConfigError
from ...inference.sampling import choose_seed
from ...settings_files import resolve_settings
from ..service import ModelService, ServedModel
from . import html
from .requests import PageRequests

SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "greedy")
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "seed")  # without effect in greedy decoding
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
        return [model.id for model in self.adapters() if model.broken is None]

    def failure(self, error: Exception) -> Markup:
        return html.failure(self.service.hide_paths(str(error)))

    def adapters_dropdown(self, info: str, scale: int) -> gr.Dropdown:
        names = self.usable_names()
        return gr.Dropdown(names, value=names[:2], multiselect=True, label="Adapters", info=info, scale=scale)

    def sampling_params(self, settings: Sequence[float | str | None]) -> SamplingParams:
        """Read the values of `sampling_controls`; the seed is chosen unless one is given.

        Raises:
            ConfigError: a value is out of its bounds, or above the limit of this server.
        """
        ignored = SAMPLING_SETTINGS if settings[SETTINGS.index("greedy")] else ()
        values = {  # without defaults: that of the repetition penalty is another one in greedy decoding
            name: value
            for name, value in zip(SETTINGS, settings, strict=True)
            if value not in (None, "", SamplingParams.model_fields[name].default) and name not in ignored
        }
        sampling = resolve_settings(SamplingParams, values)
        if sampling.max_new_tokens > self.service.config.max_tokens:
            raise ConfigError(f"max_new_tokens: the limit of this server is {self.service.config.max_tokens:,}.")
        return sampling.model_copy(update={"seed": choose_seed(sampling)})


def sampling_controls() -> list[gr.Component]:
    """Create the controls of `SETTINGS`, closed at first."""
    with gr.Accordion("Sampling settings", open=False), gr.Row(elem_classes="settings"):
        settings = {name: _sampling_control(name) for name in SETTINGS}
    sampling = [settings[name] for name in SAMPLING_SETTINGS]
    on(
        settings["greedy"].input,
        lambda greedy: [gr.update(interactive=not greedy)] * len(sampling),
        settings["greedy"],
        sampling,
    )
    return list(settings.values())


def _sampling_control(name: str) -> gr.Checkbox | gr.Number | gr.Textbox:
    """Create the control of a field of `SamplingParams`.

    The field checks the bounds: Gradio would report them in a box.
    """
    field = SamplingParams.model_fields[name]
    label, info = name.replace("_", " ").capitalize(), str(field.description).replace("--", "")
    if field.annotation is bool:
        return gr.Checkbox(field.default, label=label, info=info)
    if field.default is None:  # a gr.Number would begin at 0
        assert isinstance(field.json_schema_extra, dict)
        return gr.Textbox(label=label, info=info, placeholder=str(field.json_schema_extra["shown"]))
    return gr.Number(field.default, label=label, info=info, step=0.05 if field.annotation is float else 1)


def buttons(name: str) -> tuple[gr.Button, gr.Button]:
    """Create a start button of that name and a stop button."""
    return gr.Button(name, variant="primary", scale=0, min_width=140), gr.Button("Stop", scale=0, min_width=140)


def bare_text() -> gr.Checkbox:
    return gr.Checkbox(
        label="Bare text",
        info="Continue the prompt as it stands, also with adapters that have learned conversations.",
        container=False,
    )


def connect_stop(event: Dependency, stop: gr.Button, output: gr.HTML) -> None:
    stop.click(None, cancels=[event])
    event.then(None, output, output, js=CLEAR_BUSY, show_progress="hidden", api_visibility="private")
