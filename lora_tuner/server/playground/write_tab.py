"""The tab that writes: one prompt on the base and several adapters, side by side."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from functools import partial

import gradio as gr

from ...errors import LoraTunerError
from ...text import format_names
from . import html
from .common import PageTab, bare_text, buttons, connect_stop, on, sampling_controls
from .requests import as_conversation


class WriteTab(PageTab):
    """Continue a prompt, or ask it, with the base and adapters. Returns the choice of adapters."""

    def build(self) -> gr.Dropdown:
        with gr.Row():
            prompt = gr.Textbox(
                "The story",
                label="Prompt",
                info="Enter generates, Shift+Enter starts a new line.",
                max_lines=12,
                scale=3,
            )
            names = self.adapters_dropdown("Compared with the base.", scale=2)
        settings = sampling_controls()
        with gr.Row():
            start, stop = buttons("Generate")
            bare = bare_text()
        output = gr.HTML(
            html.note("Press Generate to run the prompt on the base and each adapter, side by side."),
            apply_default_css=False,
        )
        connect_stop(
            on(
                [start.click, prompt.submit],
                self.generate,
                [prompt, names, bare, *settings],
                output,
            ),
            stop,
            output,
        )
        return names

    async def generate(
        self, prompt: str, names: Sequence[str], bare: bool, *settings: float | str | None
    ) -> AsyncGenerator[str, None]:
        """Stream the outputs of the base and the adapters, side by side and with one seed.

        Adapters that have learned conversations are asked through the chat template, unless `bare`.
        """
        try:
            sampling = self.sampling_params(settings)
            await self.service.encode_all([prompt])  # an error of it is shown once
        except LoraTunerError as error:
            yield self.failure(error)
            return
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
