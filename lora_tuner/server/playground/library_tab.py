"""The tab of the library: all adapters, and the details of one."""

from collections.abc import Callable
from functools import partial

import gradio as gr
from gradio.events import Dependency

from ...adapters.library import read_consistently
from ...errors import AdapterError, LoraTunerError
from ..service import ServedModel
from . import html
from .common import PageTab, on

SELECT_ADAPTER = """element.addEventListener("click", event => {
    const button = event.target.closest("button[data-name]");
    if (button) trigger("select", {name: button.dataset.name});
})"""


class LibraryTab(PageTab):
    """Browse the adapters of the library."""

    def build(self, tab: gr.Tab) -> list[Callable[..., Dependency]]:
        """Add the tab, and return the events on which the library is read anew."""
        refresh = gr.Button("Refresh", size="sm", scale=0)
        table = gr.HTML(apply_default_css=False, js_on_load=SELECT_ADAPTER)
        self.details = card = gr.HTML(html.note("Choose an adapter to see its details."), apply_default_css=False)
        refresh_events = [tab.select, refresh.click]
        on(refresh_events, self.library, None, table)
        table.select(
            self.card,
            None,
            card,
            scroll_to_output=True,
            show_progress="minimal",
            api_visibility="private",
        )
        return refresh_events

    async def library(self) -> str:
        """Show all adapters."""
        return await self.service.run_in_thread("list", lambda: html.library(self.adapters()))

    async def card(self, event: gr.EventData) -> str:
        """Show the adapter whose name was clicked."""
        adapters = await self.service.run_in_thread("list", self.adapters)
        model = next((model for model in adapters if model.id == event.name), None)
        # One thread: matplotlib is not thread-safe.
        return await self.service.run_in_thread("draw", partial(self._draw_card, model))

    def _draw_card(self, model: ServedModel | None) -> str:
        try:
            if model is None or model.path is None:
                raise AdapterError("This adapter no longer exists: refresh the list.")
            if model.adapter is None:
                raise AdapterError(f"{model.id} cannot be used. {model.broken}")
            layers = self.service.generator.engine.multi_lora.layers
            return read_consistently(
                model.path,
                partial(html.card, layers=layers, hide_paths=self.service.hide_paths),
            )
        except (LoraTunerError, OSError) as error:
            return self.failure(error)
