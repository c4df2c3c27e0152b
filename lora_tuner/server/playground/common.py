"""Parts that several tabs of the page use: adapters, controls, errors."""

from dataclasses import dataclass, replace
from functools import partial

import gradio as gr
from gradio.events import Dependency
from markupsafe import Markup

from ..service import ModelService, ServedModel
from . import html
from .requests import PageRequests

CLEAR_BUSY = """html => html.replace('aria-busy="true"', 'aria-busy="false"')"""

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
