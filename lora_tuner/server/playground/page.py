"""The page of the playground: its tabs, and the choices of adapters in them.

Errors are shown in place of the output, not in a box that vanishes. A visitor's settings live in
their browser: reloading the page resets them.
"""

import contextlib
import os
import sys
from collections.abc import AsyncGenerator

import gradio as gr

from ..metrics import Metrics
from ..service import ModelService
from . import html
from .blend_tab import BlendTab
from .chat_tab import ChatTab
from .common import on
from .gains_tab import GainsTab
from .library_tab import LibraryTab, ShownAdapter
from .requests import PageRequests
from .sweeps_tab import SweepsTab
from .train_runs import RunsView
from .train_tab import TrainTab
from .uploads import may_train
from .write_tab import WriteTab

# Again when the list above the details has come.
SCROLL_TO_DETAILS = """() => {
    const watch = new ResizeObserver(() => document.querySelector(".card")?.scrollIntoView());
    watch.observe(document.body);
    setTimeout(() => watch.disconnect(), 2000);
}"""
# Between two looks of Gradio for new events, as on Windows. Elsewhere it looks 1,000 times a second, which slows a run.
IDLE_SECONDS = 0.05
TABS = ("train", "write", "chat", "blend", "library", "gains", "sweeps")


class Page:
    """One page for all visitors."""

    def __init__(self, service: ModelService, metrics: Metrics) -> None:
        self.service = service
        self.requests = requests = PageRequests(service, metrics)
        self.train = TrainTab(service, requests)
        self.write = WriteTab(service, requests)
        self.chat = ChatTab(service, requests)
        self.blend = BlendTab(service, requests)
        self.library = LibraryTab(service, requests)
        self.gains = GainsTab(service, requests)
        self.sweeps = SweepsTab(service, requests)

    def blocks(self) -> gr.Blocks:
        # Else Gradio computes statistics over its last 10,000 events after each event.
        os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(sys.maxsize)
        page: gr.Blocks
        with gr.Blocks(title="lora_tuner", analytics_enabled=False) as page:
            gr.HTML(html.head(self.service.name), apply_default_css=False)
            with gr.Tabs(selected="write") as self.tabs:
                with gr.Tab("Train", id="train"):
                    training = self.train.build(self.tabs, page)
                with gr.Tab("Write", id="write"):
                    dropdowns = [self.write.build(page)]
                with gr.Tab("Chat", id="chat") as tab:
                    chat_model = self.chat.build(tab, page)
                with gr.Tab("Blend", id="blend") as tab:
                    blend_dropdowns, saved = self.blend.build(tab)
                    dropdowns += blend_dropdowns
                with gr.Tab("Library", id="library") as tab:
                    refresh_events = self.library.build(tab)
                with gr.Tab("Gains", id="gains"):
                    dropdowns += [self.gains.build()]
                with gr.Tab("Sweeps", id="sweeps") as tab:
                    sweep = self.sweeps.build(tab)
            opened = on(
                sweep.select, self.open_in_library, self.library.adapter, [self.tabs, *self.library.details]
            )
            opened.then(None, js=SCROLL_TO_DETAILS, api_visibility="private")
            refresh_events.append(training.ended.change)
            on(training.write.click, self.open_in_write, training.view, [self.tabs, dropdowns[0]])
            on(training.chat.click, self.open_in_chat, training.view, [self.tabs, chat_model])
            on(refresh_events, self.update_choices, dropdowns, dropdowns)
            if saved is not None:
                saved.then(
                    self.update_choices, dropdowns, dropdowns, show_progress="hidden", api_visibility="private"
                )
            self.dropdowns = dropdowns
            controls = [*dropdowns, *self.write.controls.values(), *self.blend.controls.values()]
            on(page.load, self.load, None, [self.tabs, self.write.output, *dict.fromkeys(controls)])
        page.queue(default_concurrency_limit=None, api_open=False)  # the scheduler has the limit
        page._queue.sleep_when_free = page._queue.progress_update_sleep_when_free = IDLE_SECONDS
        return page

    async def load(self, request: gr.Request) -> dict[object, dict[str, object]]:
        """Choose the newest adapters, and open the tab with the values that the address names; an empty
        library where it is filled.
        """
        names = await self.service.run_in_thread("list", self.write.usable_names)
        auto = await self.service.run_in_thread("list", self.requests.auto_choice)
        newest = iter([*names[:2], None, None])
        updates: dict[object, dict[str, object]] = {}
        for dropdown in self.dropdowns:
            updates[dropdown] = gr.update(
                choices=[*names, *auto] if dropdown is self.dropdowns[0] else names,
                value=names[:2] if dropdown.multiselect else next(newest),
            )
        assert request.request is not None
        query = request.request.query_params
        tab = query.get("tab", "train" if not names and may_train(self.service.config) else "")
        if tab in TABS:
            updates[self.tabs] = gr.update(selected=tab)
        restored = {"write": self.write.restore, "blend": self.blend.restore}.get(tab)
        offered = [*names, *auto] if tab == "write" else names
        for control, update in restored(query, offered).items() if restored else ():
            updates[control] = updates.get(control, {}) | update
        return updates

    async def open_in_library(
        self, shown: ShownAdapter, event: gr.EventData
    ) -> AsyncGenerator[tuple[object, ...], None]:
        """Show the details of the adapter whose name was clicked in another tab."""
        async with contextlib.aclosing(self.library.open(shown, event)) as updates:
            async for details in updates:
                yield gr.Tabs(selected="library"), *details

    async def open_in_write(self, view: RunsView) -> list[dict[str, object]]:
        """Open the tab Write with the adapter of the chosen run."""
        names = await self.service.run_in_thread("list", self.write.choices)
        chosen = [view.chosen] if view.chosen in names else []
        return [gr.update(selected="write"), gr.update(choices=names, value=chosen)]

    async def open_in_chat(self, view: RunsView) -> list[dict[str, object]]:
        """Open the tab Chat with the adapter of the chosen run, if it has a chat template."""
        names = await self.service.run_in_thread("list", self.chat.model_names)
        choice = gr.update(choices=names, value=view.chosen) if view.chosen in names else gr.skip()
        return [gr.update(selected="chat"), choice]

    async def update_choices(self, *selections: str | list[str] | None) -> list[dict[str, object]]:
        """Offer the current adapters in each dropdown, and keep the selected ones that still exist."""
        offered = [await self.service.run_in_thread("list", self.write.choices)]  # in the tab Write
        offered += [[name for name in offered[0] if not self.requests.auto.is_asked(name)]] * len(selections)
        updates = []
        for names, selected in zip(offered, selections, strict=False):
            kept: str | list[str] | None = selected if selected in names else None
            if isinstance(selected, list):
                kept = [name for name in selected if name in names]
            updates.append(gr.update(choices=names, value=kept))
        return updates
