"""The tab that measures: the gain of each adapter over the base, on its own held-out rows and the others'."""

import asyncio
import copy
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import cached_property

import gradio as gr

from ...config import TrainConfig
from ...errors import ConfigError, GenerationError, Interrupted, LoraTunerError, Notice, Progress
from ...evaluation import gain_matrix
from ...models.loading import LoadedBase
from ...settings_files import resolve_settings
from ...text import as_typed, format_names
from . import html
from .common import PageTab, buttons, connect_stop, on
from .gain_matrix import show_gains

NO_ADAPTERS = as_typed("There are no adapters yet. Train one first: python cli.py train --dataset DATA")


class GainsTab(PageTab):
    """Measure the gain matrix on the resident base, between the steps of the scheduler."""

    @cached_property
    def evaluation_base(self) -> LoadedBase:
        """The base with a tokenizer of its own: evaluation tokenizes in its thread, and tokenizers are not thread-safe."""
        return replace(self.service.base, tokenizer=copy.deepcopy(self.service.base.tokenizer))

    def build(self) -> gr.Dropdown:
        with gr.Row():
            names = self.adapters_dropdown("Each is evaluated on the held-out rows of all.", scale=3)
            rows = gr.Textbox(
                label="Rows", info="Rows per adapter (blank: all).", placeholder="all", min_width=220
            )
        with gr.Row():
            start, stop = buttons("Evaluate")
        output = gr.HTML(
            html.note(
                "Press Evaluate to measure the gain of each adapter over the base, on its own "
                "held-out rows and on those of the others. Earlier results are cached, and other "
                "requests are served meanwhile."
            ),
            apply_default_css=False,
        )
        connect_stop(on(start.click, self.evaluate, [names, rows], output), stop, output)
        return names

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

        models = await self.service.run_in_thread("list", self.adapters)
        adapters = [model.adapter for model in models if model.id in names and model.adapter]
        gone = sorted(set(names) - {model.id for model in models if model.adapter})

        def run_evaluation() -> str:
            if gone:
                raise GenerationError(
                    f"{format_names(gone)}: no longer in the library, or damaged. Choose again."
                )
            if not any(model.adapter for model in models):
                raise GenerationError(NO_ADAPTERS)
            if not adapters:
                raise GenerationError("Choose at least one adapter to evaluate.")
            eval_rows = resolve_settings(TrainConfig, {"eval_rows": rows}).eval_rows if rows else None
            return show_gains(
                gain_matrix.evaluate_on(
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
            problems = error.problems if isinstance(error, ConfigError) else {}
            named = f"Rows: {problems['eval_rows']}" if "eval_rows" in problems else str(error)  # as the control
            yield html.failure(self.service.hide_paths(named))
        finally:
            stopped = True
            task.cancel()  # if it has not begun
