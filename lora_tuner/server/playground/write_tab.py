"""The tab that writes: one prompt on the base and several adapters, side by side."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import partial

import gradio as gr
from starlette.datastructures import QueryParams

from ...config import SamplingParams
from ...errors import ConfigError, LoraTunerError
from ...settings_files import resolve_settings
from . import html
from .common import (
    LABELS,
    SETTINGS,
    SETTINGS_INFOS,
    TOP_LOGPROBS,
    PageTab,
    bare_text,
    buttons,
    connect_stop,
    keep_address,
    on,
    sampling_controls,
    show_problems,
    token_probabilities,
)
from .html import Output
from .requests import Question

PROMPT = "The story"
INFOS = {"prompt": "Enter generates, Shift+Enter starts a new line.", **SETTINGS_INFOS}
# Name of each control in the page's address, and the value that is left out of it.
ADDRESS = {"prompt": None, "adapter": None, "bare": False, "probabilities": False} | {
    name: SamplingParams.model_fields[name].default for name in SETTINGS
}


class WriteTab(PageTab):
    """Continue a prompt, or ask it, with the base and adapters."""

    def build(self, page: gr.Blocks) -> gr.Dropdown:
        """Add the tab, and return the choice of adapters."""
        with gr.Row(elem_classes="workspace"):
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    prompt = gr.Textbox(
                        PROMPT,
                        label="Prompt",
                        info=INFOS["prompt"],
                        lines=1,
                        max_lines=12,
                        scale=3,
                        min_width=320,
                    )
                    info = "Compared with the base. auto: the one that fits the prompt."
                    names = self.adapters_dropdown(info, scale=2)
                with gr.Row():
                    start, stop = buttons("Generate")
                    again = gr.Button(
                        "Regenerate", scale=0, min_width=100, size="md", elem_classes="with-answers"
                    )
                output = gr.HTML(
                    html.note("Press Generate to run the prompt on the base and each adapter, side by side."),
                    apply_default_css=False,
                    elem_classes="output",
                )
            with gr.Column(scale=1, min_width=260):
                settings = sampling_controls()
                bare, probabilities = bare_text(), token_probabilities()
                earlier = gr.Dropdown(
                    label="Earlier prompts",
                    info="Kept in this browser alone.",
                    visible=False,
                    elem_classes="earlier",
                )
                forget = gr.Button("Forget earlier prompts", size="sm", visible=False)
        self.controls: dict[str, gr.Component] = {
            "prompt": prompt,
            "adapter": names,
            "bare": bare,
            "probabilities": probabilities,
            **dict(zip(SETTINGS, settings, strict=True)),
        }
        self.output = output
        values, fields = list(self.controls.values()), [self.controls[name] for name in INFOS]
        prompts = [earlier, forget]
        on(again.click, None, None, self.controls["seed"], js="() => ['']")  # before the next event
        generation = on([start.click, prompt.submit, again.click], self.generate, values, [output, *fields])
        connect_stop(generation, stop, output)
        keep_address("write", ADDRESS, values, generation)
        on([start.click, prompt.submit], None, prompt, prompts, js="prompt => lora_tuner.rememberPrompt(prompt)")
        on(page.load, None, None, prompts, js="() => lora_tuner.earlierPrompts()")
        on(page.load, None, output, output, js="value => lora_tuner.takeAnswers(value)")
        on(earlier.input, None, earlier, [prompt, earlier], js="prompt => [prompt, null]")
        on(forget.click, None, None, prompts, js="() => lora_tuner.forgetPrompts()")
        return names

    async def generate(
        self,
        prompt: str,
        names: Sequence[str],
        bare: bool,
        probabilities: bool,
        *settings: float | str | None,
    ) -> AsyncGenerator[list[object], None]:
        """Stream the outputs of the base and the adapters, side by side and with one seed.

        Each is asked in the form that it has learned, unless `bare`. Yields updates of the output and
        of the controls in `INFOS`; a problem with one of these leaves the output as it is.
        """
        try:
            if not prompt.strip():
                raise ConfigError("The prompt is empty.", {"prompt": "enter a prompt"})
            sampling = self.sampling_params(settings)
            await self.service.encode_all([prompt])  # an error of it is shown once
            names, why = await self._choose(prompt, names, bare)
        except LoraTunerError as error:
            problems = getattr(error, "problems", None) or {"prompt": self.service.hide_paths(str(error))}
            yield [gr.skip(), *show_problems(INFOS, problems)]
            return
        note = (
            "Greedy decoding: the output is always the same."
            if sampling.seed is None
            else f"Seed {sampling.seed}: set it to get the same output again."
        )
        note += why
        show = partial(html.outputs, tab="write", seed=sampling.seed)
        questions = {name: Question(prompt) for name in (self.service.name, *names)}
        columns = [Output(name, question, None) for name, question in questions.items()]
        yield [show(columns, note), *show_problems(INFOS)]
        if not bare:
            questions, form = await self.requests.ask(prompt, names)
            note += form
        top = TOP_LOGPROBS if probabilities else None
        submits = [
            (name, partial(self.requests.submit, name, question.prompt, sampling, top))
            for name, question in questions.items()
        ]
        unchanged = [gr.skip()] * len(INFOS)
        async with contextlib.aclosing(self.requests.follow(prompt, submits)) as updates:
            async for outputs in updates:
                columns = [
                    Output(name, questions[name], output) for name, output in zip(questions, outputs, strict=True)
                ]
                yield [show(columns, note), *unchanged]
        if probabilities:
            columns = [
                replace(column, tokens=await self.token_probabilities(output))
                for column, output in zip(columns, outputs, strict=True)
            ]
            yield [show(columns, note), *unchanged]

    def choices(self) -> list[str]:
        """Return what the adapters are chosen from: their names, the newest first, and auto."""
        return [*self.usable_names(), *self.requests.auto_choice()]

    async def _choose(self, prompt: str, names: Sequence[str], bare: bool) -> tuple[list[str], str]:
        """Put the model that fits the prompt in the place of auto; the second value says which, and why."""
        if not any(map(self.requests.auto.is_asked, names)):
            return [*names], ""
        chosen, why = await self.requests.choose(prompt, bare=bare)
        models = dict.fromkeys(chosen if self.requests.auto.is_asked(name) else name for name in names)
        return [name for name in models if name != self.service.name], f" {why}"

    def restore(self, query: QueryParams, names: Sequence[str]) -> dict[object, dict[str, object]]:
        """Return updates with the values in the page's address; a line says which are not used.

        Args:
            query: the query of the address, which may hold anything. An empty adapter is none.
            names: the adapters that can be used.
        """
        adapters = [name for name in dict.fromkeys(query.getlist("adapter")) if name]
        ignored = [f"adapter {name}: not in the library" for name in adapters if name not in names]
        values: dict[str, object] = {"bare": query.get("bare") == "true"}
        if "adapter" in query:
            values["adapter"] = [name for name in adapters if name in names]
        values["probabilities"] = query.get("probabilities") == "true"
        values["prompt"] = query.get("prompt", PROMPT)
        for name in SETTINGS:
            if name not in query:
                continue
            try:
                value = query[name].split("\n") if name == "stop" else query[name]
                read = resolve_settings(SamplingParams, {name: value})
            except ConfigError as error:
                ignored.append(f"{LABELS[name]}: {error.problems[name]}")
            else:
                values[name] = query[name] if name in ("stop", "seed") else getattr(read, name)
        updates: dict[object, dict[str, object]] = {
            self.controls[name]: gr.update(value=value) for name, value in values.items()
        }
        if ignored:
            updates[self.output] = gr.update(value=html.note(f"Not used of this address: {'; '.join(ignored)}."))
        return updates
