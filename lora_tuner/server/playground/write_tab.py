"""The tab that writes: one prompt on the base and several adapters, side by side."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from functools import partial

import gradio as gr

from ...config import SamplingParams
from ...errors import ConfigError, LoraTunerError
from ...inference.sampling import choose_seed
from ...settings_files import resolve_settings
from ...text import format_names
from . import html
from .common import PageTab, bare_text, buttons, connect_stop, on
from .requests import as_conversation

SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "greedy")
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "seed")  # without effect in greedy decoding


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
        with gr.Accordion("Sampling settings", open=False), gr.Row(elem_classes="settings"):
            settings = {name: sampling_control(name) for name in SETTINGS}
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
            yield self.failure(error)
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


def sampling_control(name: str) -> gr.Checkbox | gr.Number | gr.Textbox:
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
