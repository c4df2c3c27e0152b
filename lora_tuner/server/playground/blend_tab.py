"""The tab that blends two adapters by a slider, beside each of them alone."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import gradio as gr
from gradio.events import Dependency
from markupsafe import Markup
from starlette.datastructures import QueryParams

from ...adapters.adapter import Adapter
from ...config import SamplingParams
from ...errors import AdapterError, ConfigError, Interrupted, LoraTunerError, Notice, Progress
from ...inference.multi_lora import LoadedAdapter, blend_loaded
from ...text import format_gain
from ..scheduler import Request
from ..service import PreparedRequest
from . import html
from .common import PageTab, bare_text, keep_address, on, show_problems
from .html import Output
from .requests import ModelOutput, Question
from .uploads import may_train

if TYPE_CHECKING:
    from ...convert.blend import BlendResult

PROMPT = "The story"
BLEND_TOKENS = 48  # few, so that the output follows the slider
SAMPLING = SamplingParams(greedy=True, max_new_tokens=BLEND_TOKENS)  # so that only the weights change the output
INFOS = {"prompt": "Continued greedily: only the weights change the text.", "left": "", "right": ""}
SAVE_INFOS = {"name": "Name of the new adapter: the exact sum, checked and measured before it is kept."}
# Name of each control in the page's address, and the value that is left out of it.
ADDRESS = {"prompt": None, "left": None, "right": None, "weight": None, "bare": False}


@dataclass
class SliderState:
    """A visitor's slider: the number of its moves, the move that is shown, and the complete outputs
    of the adapters at its ends, which do not change with it."""

    moved: int = 0
    shown: int = 0
    ends: dict[tuple[LoadedAdapter | None, Question], Request] = field(default_factory=dict)


class BlendTab(PageTab):
    """Continue a prompt with a blend of two adapters, as the slider moves."""

    def build(self, tab: gr.Tab) -> tuple[list[gr.Dropdown], Dependency | None]:
        """Add the tab. Returns the choices of adapters, and the event after which there is one more."""
        names = self.usable_names()
        first, second = [*names, None, None][:2]
        prompt = gr.Textbox(PROMPT, label="Prompt", info=INFOS["prompt"], max_lines=12)
        with gr.Row():
            left = gr.Dropdown(names, value=first, label="Left adapter", min_width=140)
            right = gr.Dropdown(names, value=second, label="Right adapter", min_width=140)
        weight = gr.Slider(
            0, 1, 0.5, step=0.05, label="Weight of the right adapter", buttons=[], elem_classes="share"
        )
        output = gr.HTML(apply_default_css=False, elem_classes="output")
        bare = bare_text()
        self.controls: dict[str, gr.Component] = {
            "prompt": prompt,
            "left": left,
            "right": right,
            "weight": weight,
            "bare": bare,
        }
        values = list(self.controls.values())
        on(
            [prompt.input, prompt.submit, left.change, right.change, weight.input, bare.input, tab.select],
            self.blend,
            [*values, gr.State(SliderState())],
            [output, prompt, left, right],
            trigger_mode="multiple",
        )
        keep_address("blend", ADDRESS, values)
        return [left, right], self._build_save([left, right, weight])

    def _build_save(self, parts: list[gr.Dropdown | gr.Slider]) -> Dependency | None:
        if reason := self.why_not_saved():
            gr.HTML(html.note(reason), apply_default_css=False)
            return None
        with gr.Row(equal_height=False):
            name = gr.Textbox(
                label="Save the blend as", info=SAVE_INFOS["name"], max_lines=1, scale=2, min_width=240
            )
            save = gr.Button("Save", scale=0, min_width=120)
        result = gr.HTML(apply_default_css=False, elem_classes="output")
        saved: Dependency = on([save.click, name.submit], self.save, [name, *parts], [result, name])
        return saved

    def why_not_saved(self) -> str:
        """Return why visitors cannot save a blend, or an empty text."""
        if not may_train(self.service.config):
            return "Blends are not saved here: start the server with --allow-training, or use the command blend."
        if self.service.only:
            return "Blends are not saved here: the server has only the adapters that it was started with."
        return ""

    async def blend(
        self,
        prompt: str | None,
        left: str | None,
        right: str | None,
        weight: float,
        bare: bool,
        slider: SliderState,
    ) -> AsyncGenerator[list[object], None]:
        """Stream the output of a blend between those of its adapters, until a later move of the slider
        has something to show.

        Yields updates of the output and of the controls in `INFOS`; none of the slider, which would lose its value.
        """
        slider.moved = move = slider.moved + 1
        prompt = prompt or ""  # Gradio sends None for a field that was not shown yet
        problems = {} if prompt.strip() else {"prompt": "enter a prompt"}
        problems |= {name: "choose an adapter" for name, end in (("left", left), ("right", right)) if not end}
        if left and left == right:
            problems["right"] = "choose another one than on the left"
        if problems or left is None or right is None:
            slider.shown = move
            yield [gr.skip(), *show_problems(INFOS, problems)]
            return
        fields = show_problems(INFOS)
        parts = [(round(1 - weight, 2), left), (round(weight, 2), right)]
        updates = self._blend(prompt, parts, bare, slider, lambda: move < slider.moved)
        async with contextlib.aclosing(updates):
            async for update in updates:
                if move < slider.shown:
                    return
                slider.shown = move
                yield [update, *fields]
                fields = [gr.skip()] * len(fields)

    async def _blend(
        self,
        prompt: str,
        parts: list[tuple[float, str]],
        bare: bool,
        slider: SliderState,
        outdated: Callable[[], bool],
    ) -> AsyncGenerator[Markup, None]:
        """Outdated moves are skipped."""
        title = " + ".join(f"{part:g} {name}" for part, name in parts)
        names = [name for _, name in parts]
        try:
            loaded = [(await self.service.find_adapter(name))[1] for name in names]

            def blend() -> LoadedAdapter:
                if outdated():
                    raise Interrupted
                return blend_loaded([(part, lora) for (part, _), lora in zip(parts, loaded, strict=True) if lora])

            blended = await self.service.run_in_thread("blend", blend)
            questions = {name: Question(prompt) for name in names}
            if not bare:
                questions, _ = await self.requests.ask(prompt, names)
            first, last = (questions[name] for name in names)
            is_chat = not bare and self.requests.is_chat(blended)
            question = first if first == last else Question(prompt, is_chat)
            ids = await self.service.encode_all([question.prompt])
        except Interrupted:
            return
        except LoraTunerError as error:
            yield self.failure(error)
            return

        ends = dict(zip(names, zip(loaded, (first, last), strict=True), strict=True))
        missing = {name: end for name, end in ends.items() if end not in slider.ends}
        prepared = PreparedRequest(title, title, blended, ids)
        # Counted for no model: a slider makes very many blends.
        submits = [(None, partial(self.requests.submit_prepared, prepared, SAMPLING))]
        submits += [
            (None, partial(self.requests.submit, name, asked.prompt, SAMPLING))
            for name, (_, asked) in missing.items()
        ]
        async with contextlib.aclosing(self.requests.follow(prompt, submits)) as updates:
            async for outputs in updates:
                shown: dict[str, ModelOutput] = {
                    name: slider.ends[ends[name]] for name in names if name not in missing
                }
                shown |= dict(zip(missing, outputs[1:], strict=False))
                columns = [Output(name, ends[name][1], shown.get(name)) for name in names]
                columns.insert(1, Output(title, question, next(iter(outputs), None)))
                yield html.ends(*names) + html.outputs(columns)
        complete = {ends[name]: request for name, request in shown.items() if isinstance(request, Request)}
        slider.ends = {
            end: request for end, request in complete.items() if request.complete and not request.error
        }

    async def save(
        self, name: str, left: str | None, right: str | None, weight: float
    ) -> AsyncGenerator[list[object], None]:
        """Save a blend in the library. Yields updates of the result and of the name.

        The base is loaded once more for it, in float32, as by the command blend.
        """
        from ...convert import blend as convert_blend

        latest: Progress | None = None
        notices: list[str] = []

        def notify(event: Notice | Progress) -> None:
            nonlocal latest
            if isinstance(event, Progress):
                latest = event
            else:
                notices.append(event.text)

        parts = [(left, round(1 - weight, 2)), (right, round(weight, 2))]
        generator = self.service.generator
        options = replace(generator.options, dtype="auto", load_in="auto", notify=notify)

        def save_blend() -> "BlendResult":
            if reason := self.why_not_saved():  # the page may be of an earlier start
                raise AdapterError(reason)
            generator.library.check_name_free(name.strip(), advice="choose another name")
            return convert_blend.blend(
                [(self._adapter(part), share) for part, share in parts],
                name.strip(),
                generator.library,
                options=options,
            )

        try:
            if not name.strip():
                raise ConfigError("There is no name.", {"name": "enter a name"})
            if not left or not right or left == right or weight in (0, 1):
                raise AdapterError("This is one adapter alone: choose two, and move the slider between them.")
            task = asyncio.create_task(self.service.run_in_thread("save", save_blend))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            yield [html.progress(None), *show_problems(SAVE_INFOS)]
            while not task.done():
                await asyncio.wait([task], timeout=0.3)
                yield [html.progress(latest), gr.skip()]
            blended = task.result()
        except LoraTunerError as error:
            problems = getattr(error, "problems", None) or {"name": self.service.hide_paths(str(error))}
            yield ["", *show_problems(SAVE_INFOS, problems)]
            return
        yield [self._saved(blended, notices), gr.skip()]

    def _adapter(self, name: str | None) -> Adapter:
        model = next((model for model in self.adapters() if model.id == name), None)
        if model is None or model.adapter is None:
            raise AdapterError(f"{name} cannot be used: choose another adapter.")
        return model.adapter

    def _saved(self, blended: "BlendResult", notices: Sequence[str]) -> Markup:
        """Say what was saved, and its gain as the command shows it, or why it has none."""
        manifest = blended.adapter.manifest
        assert manifest is not None
        text = f"Saved as {blended.adapter.name}, rank {blended.exact_rank}: it is in the Library and in all choices."
        if manifest.result:
            gain = format_gain(manifest.result.gain, manifest.result.standard_error)
            text += f" Gain over {self.service.name}: {gain}, {manifest.result.format_rows()}."
        for name, result in blended.results.items() if len(blended.results) > 1 else ():
            text += f" On {name}: {format_gain(result.gain, result.standard_error)}."
        return html.note(" ".join([text, *(self.service.hide_paths(notice) for notice in notices)]))

    def restore(self, query: QueryParams, names: Sequence[str]) -> dict[object, dict[str, object]]:
        """Return updates with the values in the page's address.

        Args:
            query: the query of the address, which may hold anything.
            names: the adapters that can be used.
        """
        values: dict[str, object] = {"prompt": query.get("prompt", PROMPT), "bare": query.get("bare") == "true"}
        values |= {end: query[end] for end in ("left", "right") if query.get(end) in names}
        with contextlib.suppress(ValueError):
            values["weight"] = min(max(round(float(query.get("weight", "0.5")), 2), 0.0), 1.0)
        return {self.controls[name]: gr.update(value=value) for name, value in values.items()}
