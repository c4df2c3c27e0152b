"""The tab that blends two adapters by a slider."""

import contextlib
import shlex
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial

import gradio as gr
from markupsafe import Markup

from ...config import SamplingParams
from ...errors import Interrupted, LoraTunerError
from ...inference.multi_lora import LoadedAdapter, blend_loaded
from ..service import PreparedRequest
from . import html
from .common import PageTab, bare_text, on
from .requests import as_conversation

BLEND_TOKENS = 48  # few, so that the output follows the slider


@dataclass
class SliderState:
    """A visitor's slider: the number of its moves, and the move that is shown."""

    moved: int = 0
    shown: int = 0


class BlendTab(PageTab):
    """Continue a prompt with a blend of two adapters, as the slider moves."""

    def build(self, tab: gr.Tab) -> list[gr.Dropdown]:
        names = self.usable_names()
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
        bare = bare_text()
        output = gr.HTML(apply_default_css=False)
        on(
            [weight.input, first.input, second.input, bare.input, prompt.input, prompt.submit, tab.select],
            self.blend,
            [prompt, first, second, weight, bare, gr.State(SliderState())],
            output,
            trigger_mode="multiple",
        )
        return [first, second]

    async def blend(
        self,
        prompt: str,
        first: str | None,
        second: str | None,
        weight: float,
        bare: bool,
        slider: SliderState,
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
            yield self.failure(error)
            return

        sampling = SamplingParams(greedy=True, max_new_tokens=BLEND_TOKENS)
        # Counted for no model: a slider makes very many blends.
        submits = [(None, partial(self.requests.submit_prepared, prepared, sampling))]
        weights = [f"{name}={part:g}" for part, name in parts]
        command = html.command(shlex.join(["python", "cli.py", "blend", *weights, "--name", "NAME"]))
        async with contextlib.aclosing(self.requests.follow(prompt, submits)) as updates:
            async for outputs in updates:
                yield html.outputs(prompt, [(title, outputs[0])], {title} if is_chat else ()) + command
