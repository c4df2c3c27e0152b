"""The tab of the library: all adapters, and the details of one."""

from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path

import gradio as gr
from gradio.events import Dependency

from ...adapters.library import read_consistently
from ...errors import LoraTunerError
from ..service import ServedModel
from . import html, library_html
from .common import GONE, PageTab, on

TABLE_SCRIPT = Path(__file__).with_name("library.js").read_text(encoding="utf-8")
CARD_SCRIPT = Path(__file__).with_name("card.js").read_text(encoding="utf-8")


class LibraryTab(PageTab):
    """Browse the adapters of the library."""

    def build(self, tab: gr.Tab) -> list[Callable[..., Dependency]]:
        """Add the tab, and return the events on which the library is read anew."""
        refresh = gr.Button("Refresh", size="sm", scale=0)
        table = gr.HTML(apply_default_css=False, js_on_load=TABLE_SCRIPT)
        card = gr.HTML(
            html.note("Choose an adapter to see its details."),
            apply_default_css=False,
            js_on_load=CARD_SCRIPT,
        )
        spectrum = gr.HTML(apply_default_css=False)
        self.details = [card, spectrum]
        refresh_events = [tab.select, refresh.click]
        on(refresh_events, self.library, None, table)
        for shown in (table, card):
            shown.select(
                self.open,
                None,
                self.details,
                scroll_to_output=True,
                show_progress="minimal",
                api_visibility="private",
            )
        return refresh_events

    async def library(self) -> str:
        """Show all adapters."""
        return await self.service.run_in_thread("list", lambda: library_html.library(self.adapters()))

    async def open(self, event: gr.EventData) -> AsyncGenerator[tuple[str, str], None]:
        """Show the adapter whose name was clicked: its card at once, then its spectrum."""
        models = await self.service.run_in_thread("list", self.adapters)
        model = next((model for model in models if model.id == event.name), None)
        if model is None or model.path is None:
            yield html.failure(GONE.format(event.name)), ""
            return
        card = await self.service.run_in_thread("library", partial(self.card, model, models))
        yield card, ""
        if model.broken is None:
            # One thread: matplotlib is not thread-safe.
            yield card, await self.service.run_in_thread("draw", partial(self.spectrum, model.path))

    def card(self, model: ServedModel, models: Sequence[ServedModel]) -> str:
        """Show what is in the folder of an adapter."""
        assert model.path is not None
        draw = partial(library_html.card, model, models=models, hide_paths=self.service.hide_paths)
        try:
            return read_consistently(model.path, draw)
        except (LoraTunerError, OSError) as error:
            return draw(None) if model.broken else self.failure(error)

    def spectrum(self, folder: Path) -> str:
        """Show the spectrum of an adapter, or the reason why there is none."""
        layers = self.service.generator.engine.multi_lora.layers
        draw = partial(read_consistently, folder, partial(library_html.spectrum, layers=layers))
        return library_html.or_reason(draw, self.service.hide_paths)
