"""What is on the page of the server, and what it does: write, blend two adapters, look through the library, measure gains.

Surprise: what went wrong is said where the answer would be, not in a box that vanishes. Limit: what a visitor has set lives in
their browser's page, so to load that anew forgets it.
"""

import asyncio
import contextlib
import copy
import os
import shlex
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from typing import Any

import gradio as gr
from markupsafe import Markup

from ... import evaluation
from ...adapters import plots
from ...adapters.adapter import CARD_FILE, METRICS_FILE, Adapter
from ...adapters.library import read_consistently
from ...config import SamplingParams, TrainConfig, resolve_settings
from ...errors import AdapterError, ConfigError, GenerationError, Interrupted, LoraTunerError, Notice, Progress
from ...inference.generator import choose_seed
from ...inference.multi_lora import LoadedAdapter, blend_loaded
from ...models import delta
from ..metrics import Metrics, RequestRecord
from ..scheduler import Request
from ..service import ModelService, ServedModel
from . import html

BLEND_TOKENS = 48  # few, so that the text follows the slider
FRAME_SECONDS = 0.03  # seconds between two looks at what is written
MAX_CARD = 100_000  # characters of a model card
SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "greedy")
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "seed")  # of no meaning to a greedy answer
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
AT_REST = """html => html.replace('aria-busy="true"', 'aria-busy="false"')"""  # of what was stopped half way
CHOOSE = """element.addEventListener("click", event => {
    const button = event.target.closest("button[data-name]");
    if (button) trigger("select", {name: button.dataset.name});
})"""


@dataclass
class _SliderState:
    """A visitor's slider: how often it was moved, and after which move came what is shown."""

    moved: int = 0
    shown: int = 0


class Page:
    """One for all visitors. Nothing of it keeps the loop of the server waiting."""

    def __init__(self, desk: ModelService, metrics: Metrics) -> None:
        self.desk = desk
        self.metrics = metrics
        # Gains are measured in a thread of their own, and a tokenizer is not for two.
        self.measured = replace(desk.base, tokenizer=copy.deepcopy(desk.base.tokenizer))

    def blocks(self) -> gr.Blocks:
        # Gradio would go through the last 10,000 events after each, for figures that nobody sees.
        os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(sys.maxsize)
        page: gr.Blocks
        with gr.Blocks(title="lora_tuner", analytics_enabled=False) as page:
            gr.HTML(html.head(self.desk.name), apply_default_css=False)
            with gr.Tabs():
                with gr.Tab("Write"):
                    chosen = [self._write_tab()]
                with gr.Tab("Blend") as tab:
                    chosen += self._blend_tab(tab)
                with gr.Tab("Library") as tab:
                    fresh = self._library_tab(tab)
                with gr.Tab("Gains"):
                    chosen += [self._gains_tab()]
            gr.on([page.load, *fresh], self.choices, chosen, chosen, **QUIET)
        page.queue(default_concurrency_limit=None, api_open=False)  # how many may write at once, the worker knows
        return page

    def _write_tab(self) -> gr.Dropdown:
        with gr.Row():
            prompt = gr.Textbox(
                "The story", label="Prompt", info="Enter writes, Shift+Enter begins a line.", max_lines=12, scale=3
            )
            names = self._several("They answer beside the base.", scale=2)
        with gr.Accordion("How the text is drawn", open=False), gr.Row(elem_classes="settings"):
            settings = [self._setting(name) for name in SETTINGS]
        with gr.Row():
            write, stop = _buttons("Write")
        out = gr.HTML(
            html.note("Press Write: the base and each adapter go on from the prompt, side by side."),
            apply_default_css=False,
        )
        writing = gr.on([write.click, prompt.submit], self.write, [prompt, names, *settings], out, **QUIET)
        _stoppable(writing, stop, out)
        drawn = [setting for name, setting in zip(SETTINGS, settings, strict=True) if name in SAMPLING_SETTINGS]
        greedy = settings[SETTINGS.index("greedy")]
        greedy.input(lambda greedy: [gr.update(interactive=not greedy)] * len(drawn), greedy, drawn, **QUIET)
        return names

    def _blend_tab(self, tab: gr.Tab) -> list[gr.Dropdown]:
        names = self._names()
        with gr.Row():
            prompt = gr.Textbox("The story", label="Prompt", max_lines=12, scale=2)
            first = gr.Dropdown(names, value=names[0] if names else None, label="First adapter")
            second = gr.Dropdown(names, value=names[1] if len(names) > 1 else None, label="Second adapter")
        share = gr.Slider(
            0,
            1,
            0.5,
            step=0.05,
            label="Share of the second adapter",
            info="The first has the rest.",
            buttons=[],
            elem_classes="share",
        )
        out = gr.HTML(apply_default_css=False)
        events = [share.input, first.input, second.input, prompt.input, prompt.submit, tab.select]
        inputs = [prompt, first, second, share, gr.State(_SliderState())]
        gr.on(events, self.blend, inputs, out, trigger_mode="multiple", **QUIET)
        return [first, second]

    def _library_tab(self, tab: gr.Tab) -> list[Any]:
        """What asks for the library as it is now."""
        refresh = gr.Button("Refresh", size="sm", scale=0)
        table = gr.HTML(apply_default_css=False, js_on_load=CHOOSE)
        card = gr.HTML(html.note("Choose an adapter to see its card."), apply_default_css=False)
        fresh = [tab.select, refresh.click]
        gr.on(fresh, self.library, None, table, **QUIET)
        table.select(
            self.card, None, card, scroll_to_output=True, concurrency_limit=1, **QUIET | {"show_progress": "minimal"}
        )  # one at a time: matplotlib is not for two threads
        return fresh

    def _gains_tab(self) -> gr.Dropdown:
        with gr.Row():
            names = self._several("Each is measured on the held-out rows of each.", scale=3)
            rows = gr.Textbox(label="Rows", info="So many of each, the first.", placeholder="all")
        with gr.Row():
            measure, stop = _buttons("Measure")
        out = gr.HTML(
            html.note(
                "Press Measure: what each adapter gains over the base, on its own held-out rows and on those of the others. "
                "What was measured before is there at once; the rest takes its time, and others may write meanwhile."
            ),
            apply_default_css=False,
        )
        _stoppable(measure.click(self.gains, [names, rows], out, **QUIET), stop, out)
        return names

    def _several(self, info: str, scale: int) -> gr.Dropdown:
        names = self._names()
        return gr.Dropdown(names, value=names[:2], multiselect=True, label="Adapters", info=info, scale=scale)

    def _setting(self, name: str) -> Any:
        """A field of `Sampling` as a control: its default and its help. Bounds are the field's: Gradio's would end in a box."""
        field = SamplingParams.model_fields[name]
        more: Any = field.json_schema_extra
        label, info = name.replace("_", " ").capitalize(), str(field.description).replace("--", "")
        if field.annotation is bool:
            return gr.Checkbox(field.default, label=label, info=info)
        if field.default is None:  # a number of Gradio's would begin at 0
            return gr.Textbox(label=label, info=info, placeholder=more["shown"])
        return gr.Number(field.default, label=label, info=info, step=0.05 if field.annotation is float else 1)

    def _models(self) -> list[ServedModel]:
        """The adapters as they are now, broken ones too."""
        said = self.desk.hide_paths
        return [
            replace(model, broken=model.broken and said(model.broken))
            for model in self.desk.list_models()
            if model.path
        ]

    def _names(self) -> list[str]:
        return [model.id for model in self._models() if model.broken is None]

    def choices(self, *chosen: Any) -> list[Any]:
        """For each control that chooses adapters, those there are by now. What is chosen stays, unless it is gone."""
        names = self._names()
        kept = [
            [name for name in value if name in names] if isinstance(value, list) else value if value in names else None
            for value in chosen
        ]
        return [gr.update(choices=names, value=value) for value in kept]

    async def write(self, prompt: str, names: Sequence[str], *settings: Any) -> AsyncGenerator[str, None]:
        """The base's answer and the adapters' as they come, side by side, all with one seed."""
        given = {name: value for name, value in zip(SETTINGS, settings, strict=True) if value not in (None, "")}
        if given["greedy"]:
            given = {name: value for name, value in given.items() if name not in SAMPLING_SETTINGS}
        try:
            sampling = resolve_settings(SamplingParams, given)
            if sampling.max_new_tokens > self.desk.config.max_tokens:
                raise ConfigError(f"max_new_tokens: this server writes {self.desk.config.max_tokens:,} at the most.")
            ids = await self.desk.run_in_thread(lambda: self.desk.encode_prompt(prompt))
        except LoraTunerError as error:
            yield self._failure(error)
            return
        seed = choose_seed(sampling)
        sampling = sampling.model_copy(update={"seed": seed})
        more = "Greedy: the same every time." if seed is None else f"Seed {seed}: with it, the same is written again."
        models = [self.desk.name, *names]
        questions = [(name, partial(self.desk.generate, name, [ids], sampling)) for name in models]
        async with contextlib.aclosing(self._written(prompt, questions)) as frames:
            async for jobs in frames:
                yield html.answers(prompt, list(zip(models, jobs, strict=True)), more)

    async def blend(
        self, prompt: str, first: str | None, second: str | None, share: float, slide: _SliderState
    ) -> AsyncGenerator[str, None]:
        """What two adapters write together, until there is something to show for a later move of the same slider."""
        slide.moved = move = slide.moved + 1
        async with contextlib.aclosing(self._blend(prompt, first, second, share, lambda: move < slide.moved)) as frames:
            async for frame in frames:
                if move < slide.shown:
                    return
                slide.shown = move
                yield frame

    async def _blend(
        self, prompt: str, first: str | None, second: str | None, share: float, late: Callable[[], bool]
    ) -> AsyncGenerator[Markup, None]:
        """The likeliest tokens, so that nothing but the shares changes them. Moves that are `late` already are left out."""
        if not first or not second:
            yield html.note("Choose two adapters to see what they write together.")
            return
        parts = [(round(1 - share, 2), first), (round(share, 2), second)]
        title = " + ".join(f"{weight:g} {name}" for weight, name in parts)

        def prepare() -> tuple[list[int], LoadedAdapter] | None:
            if late():
                return None
            found = [(weight, self.desk.find_adapter(name)[1]) for weight, name in parts]
            return self.desk.encode_prompt(prompt), blend_loaded(
                [(weight, loaded) for weight, loaded in found if loaded]
            )

        try:
            prepared = await self.desk.run_in_thread(prepare)
        except LoraTunerError as error:
            yield self._failure(error)
            return
        if prepared is None:
            return
        ids, loaded = prepared
        sampling = SamplingParams(greedy=True, max_new_tokens=BLEND_TOKENS)
        # It is counted for no model: a slider makes very many.
        question = partial(self.desk.generate, title, [ids], sampling, loaded=loaded)
        async with contextlib.aclosing(self._written(prompt, [(None, question)])) as frames:
            async for jobs in frames:
                yield html.answers(prompt, [(title, jobs[0])]) + html.command(_command(parts))

    async def _written(
        self, prompt: str, questions: Sequence[tuple[str | None, Callable[[], Awaitable[Request]]]]
    ) -> AsyncGenerator[list[Request | str], None]:
        """The jobs, or why there is none, whenever there is more of them. Each is counted for the model that is named beside its
        question. Who leaves, cancels them."""
        jobs: list[Request | str] = []
        left: dict[Request, str | None] = {}
        try:
            for model, ask in questions:
                try:
                    jobs.append(job := await ask())
                    left[job] = model
                except LoraTunerError as error:
                    jobs.append(self.desk.hide_paths(str(error)))
            async for _ in self.desk.watch(*left):
                for job in [job for job in left if job.complete]:
                    self._count(prompt, job, left.pop(job))
                yield jobs
                await asyncio.sleep(FRAME_SECONDS)
        finally:
            for job, model in left.items():
                self.desk.scheduler.cancel(job)
                self._count(prompt, job, model)

    def _count(self, prompt: str, job: Request, model: str | None) -> None:
        code = type(job.error).__name__ if job.error else None
        record = RequestRecord(
            started=job.started, status=200, code=code, model=model, stream=True, request=job, prompts=prompt
        )
        self.metrics.record("page", record, "page")

    def _failure(self, error: Exception) -> Markup:
        return html.failure(self.desk.hide_paths(str(error)))

    def library(self) -> str:
        return html.library(self._models())

    def card(self, event: gr.EventData) -> str:
        """Of the adapter whose name was pressed."""
        try:
            model = next((model for model in self._models() if model.id == event.name), None)
            if model is None or model.path is None:
                raise AdapterError("It is not there any more: refresh the list.")
            if model.adapter is None:
                raise AdapterError(f"{model.id} does not answer. {model.broken}")
            return read_consistently(model.path, self._card)
        except (LoraTunerError, OSError) as error:
            return self._failure(error)

    def _card(self, adapter: Adapter) -> str:
        pictures = [self._picture(partial(draw, adapter)) for draw in (_curve, self._spectrum)]
        return html.card(adapter, pictures, _readme(adapter))

    def _picture(self, draw: Callable[[BytesIO], tuple[str, str]]) -> Markup:
        """What `draw` draws, with what it says of it; or why there is no picture."""
        to = BytesIO()
        try:
            said = draw(to)
        except LoraTunerError as error:
            return html.no_picture(self.desk.hide_paths(str(error)))
        except Exception as error:  # a stranger's figures can be such that nobody can draw them
            return html.no_picture(f"It cannot be drawn: {self.desk.hide_paths(str(error))}")
        return html.picture(to.getvalue(), *said)

    def _spectrum(self, adapter: Adapter, to: BytesIO) -> tuple[str, str]:
        delta.check_summable(adapter)
        found = delta.load_deltas(adapter, self.desk.generator.engine.multi_lora.layers)
        squares = {module: delta.singular_values(update).square() for module, update in found.items()}
        squares = {module: each for module, each in squares.items() if float(each.sum()) > 0}
        if not squares:
            raise AdapterError("No spectrum: all its updates are zero.")
        plots.plot_spectra({module: each.tolist() for module, each in squares.items()}, {}, to)
        first = sorted(float(each[0] / each.sum()) for each in squares.values())[len(squares) // 2]
        said = f"{len(squares)} layers; in the middle one the largest singular value has {first:.0%} of the energy."
        return "Spectrum: what share of its layer's update each singular value has", said

    async def gains(self, names: Sequence[str], rows: str) -> AsyncGenerator[str, None]:
        """The gain matrix, with the base that is in memory: a batch of rows at a time, between the tokens of others."""
        seen: Progress | None = None
        left = False

        def notify(event: Notice | Progress) -> None:
            nonlocal seen
            if left:
                raise Interrupted
            if isinstance(event, Progress):
                seen = event

        def measure() -> str:
            adapters = [model.adapter for model in self._models() if model.id in names and model.adapter]
            if not adapters:
                raise GenerationError("Choose adapters: there is nothing to measure yet.")
            most = resolve_settings(TrainConfig, {"eval_rows": rows}).eval_rows if rows else None
            matrix = evaluation.evaluate_on(
                self.measured,
                adapters,
                eval_rows=most,
                options=replace(self.desk.generator.options, notify=notify),
                turn=self.desk.scheduler.run_between_steps,
            )
            return html.gains(matrix)

        work = asyncio.create_task(asyncio.to_thread(measure))
        work.add_done_callback(lambda done: done.cancelled() or done.exception())  # who has left does not ask for it
        try:
            while not work.done():
                yield html.progress(seen)
                await asyncio.wait([work], timeout=0.2)
            yield work.result()
        except LoraTunerError as error:
            yield self._failure(error)
        finally:
            left = True


def _buttons(name: str) -> tuple[gr.Button, gr.Button]:
    """One that begins, one that ends."""
    return gr.Button(name, variant="primary", scale=0, min_width=140), gr.Button("Stop", scale=0, min_width=140)


def _stoppable(event: Any, stop: gr.Button, out: gr.HTML) -> None:
    stop.click(None, cancels=[event])
    event.then(None, out, out, js=AT_REST, **QUIET)


def _command(parts: Sequence[tuple[float, str]]) -> str:
    """What makes a blend an adapter of the library."""
    return shlex.join(
        ["python", "cli.py", "blend", *(f"{name}={weight:g}" for weight, name in parts), "--name", "NAME"]
    )


def _curve(adapter: Adapter, to: BytesIO) -> tuple[str, str]:
    manifest = adapter.manifest
    if manifest is None or manifest.run is None or manifest.data is None:
        raise AdapterError("No loss curve: it comes from no training run of this tool.")
    plots.plot_loss(plots.read_metrics(adapter.path / METRICS_FILE), manifest, to)
    return "Loss over the steps of training", f"{manifest.run.steps:,} steps; less is better."


def _readme(adapter: Adapter) -> str:
    path = adapter.path / CARD_FILE
    if not path.is_file() or path.is_symlink():  # it is a stranger's, and a link might lead to any file
        return "It has none."
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(MAX_CARD)
