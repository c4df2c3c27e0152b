"""The page of the playground: generate, blend two adapters, browse the library, evaluate.

Errors are shown in place of the output, not in a box that vanishes. A visitor's settings live in
their browser: reloading the page resets them.
"""

import asyncio
import contextlib
import copy
import os
import shlex
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import gradio as gr
from gradio.events import Dependency
from markupsafe import Markup

from ... import evaluation
from ...adapters.library import read_consistently
from ...config import SamplingParams, TrainConfig
from ...errors import AdapterError, ConfigError, GenerationError, Interrupted, LoraTunerError, Notice, Progress
from ...inference.multi_lora import LoadedAdapter, blend_loaded
from ...inference.sampling import choose_seed
from ...settings_files import resolve_settings
from ...text import format_names
from ..metrics import Metrics
from ..service import ModelService, PreparedRequest, ServedModel
from . import html
from .requests import PageRequests, as_conversation

BLEND_TOKENS = 48  # few, so that the output follows the slider
SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "greedy")
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "seed")  # without effect in greedy decoding
CLEAR_BUSY = """html => html.replace('aria-busy="true"', 'aria-busy="false"')"""
SELECT_ADAPTER = """element.addEventListener("click", event => {
    const button = event.target.closest("button[data-name]");
    if (button) trigger("select", {name: button.dataset.name});
})"""

on = partial(gr.on, show_progress="hidden", api_visibility="private")


@dataclass
class _SliderState:
    """A visitor's slider: the number of its moves, and the move that is shown."""

    moved: int = 0
    shown: int = 0


class Page:
    """One page for all visitors. Nothing here blocks the server's event loop."""

    def __init__(self, service: ModelService, metrics: Metrics) -> None:
        self.service = service
        self.requests = PageRequests(service, metrics)
        # Evaluation tokenizes in its thread, and tokenizers are not thread-safe.
        self.evaluation_base = replace(service.base, tokenizer=copy.deepcopy(service.base.tokenizer))

    def blocks(self) -> gr.Blocks:
        # Else Gradio computes statistics over its last 10,000 events after each event.
        os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(sys.maxsize)
        page: gr.Blocks
        with gr.Blocks(title="lora_tuner", analytics_enabled=False) as page:
            gr.HTML(html.head(self.service.name), apply_default_css=False)
            with gr.Tabs():
                with gr.Tab("Generate"):
                    dropdowns = [self._generate_tab()]
                with gr.Tab("Blend") as tab:
                    dropdowns += self._blend_tab(tab)
                with gr.Tab("Library") as tab:
                    refresh_events = self._library_tab(tab)
                with gr.Tab("Evaluate"):
                    dropdowns += [self._evaluate_tab()]
            on([page.load, *refresh_events], self.update_choices, dropdowns, dropdowns)
        page.queue(default_concurrency_limit=None, api_open=False)  # the scheduler has the limit
        return page

    def _generate_tab(self) -> gr.Dropdown:
        with gr.Row():
            prompt = gr.Textbox(
                "The story",
                label="Prompt",
                info="Enter generates, Shift+Enter starts a new line.",
                max_lines=12,
                scale=3,
            )
            names = self._adapters_dropdown("Compared with the base.", scale=2)
        with gr.Accordion("Sampling settings", open=False), gr.Row(elem_classes="settings"):
            settings = {name: self._setting(name) for name in SETTINGS}
        with gr.Row():
            start, stop = _buttons("Generate")
            bare = _bare_text()
        output = gr.HTML(
            html.note("Press Generate to run the prompt on the base and each adapter, side by side."),
            apply_default_css=False,
        )
        _connect_stop(
            on(
                [start.click, prompt.submit],
                self.generate,
                [prompt, names, bare, *settings.values()],
                output,
            ),
            stop,
            output,
        )
        sampling = [settings[name] for name in SAMPLING_SETTINGS]
        on(
            settings["greedy"].input,
            lambda greedy: [gr.update(interactive=not greedy)] * len(sampling),
            settings["greedy"],
            sampling,
        )
        return names

    def _blend_tab(self, tab: gr.Tab) -> list[gr.Dropdown]:
        names = self._usable_names()
        with gr.Row():
            prompt = gr.Textbox("The story", label="Prompt", max_lines=12, scale=2)
            first = gr.Dropdown(names, value=names[0] if names else None, label="First adapter")
            second = gr.Dropdown(names, value=names[1] if len(names) > 1 else None, label="Second adapter")
        weight = gr.Slider(
            0,
            1,
            0.5,
            step=0.05,
            label="Weight of the second adapter",
            info="The first adapter has the rest.",
            buttons=[],
            elem_classes="share",
        )
        bare = _bare_text()
        output = gr.HTML(apply_default_css=False)
        on(
            [weight.input, first.input, second.input, bare.input, prompt.input, prompt.submit, tab.select],
            self.blend,
            [prompt, first, second, weight, bare, gr.State(_SliderState())],
            output,
            trigger_mode="multiple",
        )
        return [first, second]

    def _library_tab(self, tab: gr.Tab) -> list[Callable[..., Dependency]]:
        """Add the tab, and return the events on which the library is read anew."""
        refresh = gr.Button("Refresh", size="sm", scale=0)
        table = gr.HTML(apply_default_css=False, js_on_load=SELECT_ADAPTER)
        card = gr.HTML(html.note("Choose an adapter to see its details."), apply_default_css=False)
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

    def _evaluate_tab(self) -> gr.Dropdown:
        with gr.Row():
            names = self._adapters_dropdown("Each is evaluated on the held-out rows of all.", scale=3)
            rows = gr.Textbox(label="Rows", info="Rows per adapter (blank: all).", placeholder="all")
        with gr.Row():
            start, stop = _buttons("Evaluate")
        output = gr.HTML(
            html.note(
                "Press Evaluate to measure the gain of each adapter over the base, on its own "
                "held-out rows and on those of the others. Earlier results are cached, and other "
                "requests are served meanwhile."
            ),
            apply_default_css=False,
        )
        _connect_stop(on(start.click, self.evaluate, [names, rows], output), stop, output)
        return names

    def _adapters_dropdown(self, info: str, scale: int) -> gr.Dropdown:
        names = self._usable_names()
        return gr.Dropdown(names, value=names[:2], multiselect=True, label="Adapters", info=info, scale=scale)

    def _setting(self, name: str) -> gr.Checkbox | gr.Number | gr.Textbox:
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

    def _adapters(self) -> list[ServedModel]:
        """Read the adapters, broken ones included."""
        return [
            replace(model, broken=self.service.hide_paths(model.broken) if model.broken else None)
            for model in self.service.list_models()
            if model.path
        ]

    def _usable_names(self) -> list[str]:
        return [model.id for model in self._adapters() if model.broken is None]

    async def library(self) -> str:
        """Show all adapters."""
        return await self.service.run_in_thread("list", lambda: html.library(self._adapters()))

    async def update_choices(self, *selections: str | list[str] | None) -> list[dict[str, object]]:
        """Offer the current adapters in each dropdown, and keep the selected ones that still exist."""
        names = await self.service.run_in_thread("list", self._usable_names)
        updates = []
        for selected in selections:
            kept: str | list[str] | None = selected if selected in names else None
            if isinstance(selected, list):
                kept = [name for name in selected if name in names]
            updates.append(gr.update(choices=names, value=kept))
        return updates

    async def generate(
        self, prompt: str, names: Sequence[str], bare: bool, *settings: float | str | None
    ) -> AsyncGenerator[str, None]:
        """Stream the outputs of the base and the adapters, side by side and with one seed.

        Adapters that have learned conversations are asked through the chat template, unless `bare`.
        """
        ignored = SAMPLING_SETTINGS if settings[SETTINGS.index("greedy")] else ()
        values = {  # without defaults: that of the repetition penalty is another one in greedy decoding
            name: value
            for name, value in zip(SETTINGS, settings, strict=True)
            if value not in (None, "", SamplingParams.model_fields[name].default) and name not in ignored
        }
        try:
            sampling = resolve_settings(SamplingParams, values)
            if sampling.max_new_tokens > self.service.config.max_tokens:
                raise ConfigError(
                    f"max_new_tokens: the limit of this server is {self.service.config.max_tokens:,}."
                )
            await self.service.encode_all([prompt])  # an error of it is shown once
        except LoraTunerError as error:
            yield self._failure(error)
            return
        sampling = sampling.model_copy(update={"seed": choose_seed(sampling)})
        note = (
            "Greedy decoding: the output is always the same."
            if sampling.seed is None
            else f"Seed {sampling.seed}: set it to get the same output again."
        )
        models = [self.service.name, *names]
        chats = set() if bare else await self.requests.chats(names)
        if chats:
            asked = format_names([name for name in models if name in chats])
            note += f" Asked through the chat template: {asked}."
        submits = []
        for name in models:
            text = as_conversation(prompt) if name in chats else prompt
            submits.append((name, partial(self.requests.submit, name, text, sampling)))
        async with contextlib.aclosing(self.requests.follow(prompt, submits)) as updates:
            async for outputs in updates:
                yield html.outputs(prompt, list(zip(models, outputs, strict=True)), chats, note)

    async def blend(
        self,
        prompt: str,
        first: str | None,
        second: str | None,
        weight: float,
        bare: bool,
        slider: _SliderState,
    ) -> AsyncGenerator[str, None]:
        """Stream the output of a blend, until a later move of the slider has something to show."""
        slider.moved = move = slider.moved + 1
        parts = [(round(part, 2), name) for part, name in ((1 - weight, first), (weight, second)) if name]
        async with contextlib.aclosing(self._blend(prompt, parts, bare, lambda: move < slider.moved)) as updates:
            async for update in updates:
                if move < slider.shown:
                    return
                slider.shown = move
                yield update

    async def _blend(
        self,
        prompt: str,
        parts: list[tuple[float, str]],
        bare: bool,
        outdated: Callable[[], bool],
    ) -> AsyncGenerator[Markup, None]:
        """Decode greedily, so that only the weights change the output. Outdated moves are skipped."""
        if len(parts) < 2:
            yield html.note("Choose two adapters to blend.")
            return
        title = " + ".join(f"{part:g} {name}" for part, name in parts)

        try:
            adapters = [(part, (await self.service.find_adapter(name))[1]) for part, name in parts]

            def blend() -> LoadedAdapter:
                if outdated():
                    raise Interrupted
                return blend_loaded([(part, lora) for part, lora in adapters if lora is not None])

            blended = await self.service.run_in_thread("blend", blend)
            is_chat = not bare and self.requests.is_chat(blended)
            ids = await self.service.encode_all([as_conversation(prompt) if is_chat else prompt])
            prepared = PreparedRequest(title, title, blended, ids)
        except Interrupted:
            return
        except LoraTunerError as error:
            yield self._failure(error)
            return

        sampling = SamplingParams(greedy=True, max_new_tokens=BLEND_TOKENS)
        # Counted for no model: a slider makes very many blends.
        submits = [(None, partial(self.requests.submit_prepared, prepared, sampling))]
        weights = [f"{name}={part:g}" for part, name in parts]
        command = html.command(shlex.join(["python", "cli.py", "blend", *weights, "--name", "NAME"]))
        async with contextlib.aclosing(self.requests.follow(prompt, submits)) as updates:
            async for outputs in updates:
                yield html.outputs(prompt, [(title, outputs[0])], {title} if is_chat else ()) + command

    def _failure(self, error: Exception) -> Markup:
        return html.failure(self.service.hide_paths(str(error)))

    async def card(self, event: gr.EventData) -> str:
        """Show the adapter whose name was clicked."""
        adapters = await self.service.run_in_thread("list", self._adapters)
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
            return self._failure(error)

    async def evaluate(self, names: Sequence[str], rows: str) -> AsyncGenerator[str, None]:
        """Measure the gain matrix on the resident base, between the steps of the scheduler."""
        latest: Progress | None = None
        stopped = False

        def notify(event: Notice | Progress) -> None:
            nonlocal latest
            if stopped:
                raise Interrupted
            if isinstance(event, Progress):
                latest = event

        models = await self.service.run_in_thread("list", self._adapters)
        adapters = [model.adapter for model in models if model.id in names and model.adapter]

        def run_evaluation() -> str:
            if not adapters:
                raise GenerationError("Choose at least one adapter to evaluate.")
            eval_rows = resolve_settings(TrainConfig, {"eval_rows": rows}).eval_rows if rows else None
            return html.gains(
                evaluation.evaluate_on(
                    self.evaluation_base,
                    adapters,
                    eval_rows=eval_rows,
                    options=replace(self.service.generator.options, notify=notify),
                    access=self.service.scheduler.run_between_steps,
                )
            )

        # One after another, as each uses what the ones before it have cached.
        task = asyncio.create_task(self.service.run_in_thread("measure", run_evaluation))
        # Retrieve the exception, which asyncio logs otherwise when the visitor has left.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            while not task.done():
                yield html.progress(latest)
                await asyncio.wait([task], timeout=0.2)
            yield task.result()
        except LoraTunerError as error:
            yield self._failure(error)
        finally:
            stopped = True
            task.cancel()  # if it has not begun


def _buttons(name: str) -> tuple[gr.Button, gr.Button]:
    """Create a start button of that name and a stop button."""
    return gr.Button(name, variant="primary", scale=0, min_width=140), gr.Button("Stop", scale=0, min_width=140)


def _bare_text() -> gr.Checkbox:
    return gr.Checkbox(
        label="Bare text",
        info="Continue the prompt as it stands, also with adapters that have learned conversations.",
        container=False,
    )


def _connect_stop(event: Dependency, stop: gr.Button, output: gr.HTML) -> None:
    stop.click(None, cancels=[event])
    event.then(None, output, output, js=CLEAR_BUSY, show_progress="hidden", api_visibility="private")
