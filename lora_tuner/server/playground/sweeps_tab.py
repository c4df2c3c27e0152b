"""The tab of sweeps: those that have finished as charts, with their adapters, and those that have not."""

import contextlib
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
from markupsafe import Markup
from pydantic import TypeAdapter, ValidationError

from ...errors import TrainingError
from ...text import NAME_PATTERN, PROGRAM, as_typed, format_bytes, format_count, format_duration, format_gain
from ...training.paths import SWEEP_RESULT_FILE
from ...training.unfinished import UnfinishedRun, unfinished_runs
from . import charts, html
from .charts import Point, Series
from .common import PageTab, on

if TYPE_CHECKING:
    from ...training.sweep_result import SweepResult, Trial

MAX_RESULT_BYTES = 10_000_000
NO_SWEEPS = as_typed(
    "No sweeps yet. A sweep trains an adapter for each rank, learning rate or number of rows and recommends one: "
    "python cli.py train --dataset DATA --name NAME --rank 4,16,64"
)
_AXES = {
    "rows": "training rows",
    "steps": "steps",
    "learning_rate": "learning rate",
    "beta": "beta",
    "rank": "rank",
}
SELECT_TRIAL = """element.addEventListener("click", event => {
    const button = event.target.closest("button[data-name]");
    if (button) trigger("select", {name: button.dataset.name});
})"""


class SweepsTab(PageTab):
    """Compare the trials of a sweep in the folder of runs. A sweep is looked up in a listing."""

    def build(self, tab: gr.Tab) -> gr.HTML:
        """Add the tab, and return its output, whose `select` event has the name of an adapter to open."""
        with gr.Row():
            names = gr.Dropdown([], label="Sweep", info="The newest first.", scale=3)
            refresh = gr.Button("Refresh", size="sm", scale=0)
        output = gr.HTML(html.note("Loading ..."), apply_default_css=False, js_on_load=SELECT_TRIAL)
        unfinished = gr.HTML(apply_default_css=False)
        on([tab.select, refresh.click], self.update, names, [names, output, unfinished])
        on(names.input, self.show, names, output)
        return output

    async def update(self, name: str | None) -> tuple[dict[str, object], str, str]:
        """Return the finished sweeps as choices, the chosen or newest of them, and the unfinished ones."""
        folders = await self.service.run_in_thread("list", self.folders)
        chosen = name if name in folders else next(iter(folders), None)
        unfinished = await self.service.run_in_thread("list", self.unfinished)
        shown = await self.show(chosen) if chosen or not unfinished else ""
        return gr.update(choices=list(folders), value=chosen), shown, unfinished

    async def show(self, name: str | None) -> str:
        """Show a finished sweep, or the reason why it cannot be."""
        return await self.service.run_in_thread("list", lambda: self._show(name))

    def _show(self, name: str | None) -> Markup:
        try:
            folders = self.folders()
            if not folders:
                return html.note(NO_SWEEPS)
            if name not in folders:
                raise TrainingError("This sweep no longer exists: choose another.")
            return show_sweep(read_result(folders[name]), self.usable_names())
        except (TrainingError, OSError) as error:
            return self.failure(error)

    def folders(self) -> dict[str, Path]:
        """Return the folders of the finished sweeps by name, the newest first."""
        found = []
        for file in self.service.config.runs_dir.glob(f"*.sweep/{SWEEP_RESULT_FILE}"):
            name = file.parent.name.removesuffix(".sweep")
            with contextlib.suppress(OSError):  # it is being replaced
                if NAME_PATTERN.fullmatch(name):
                    found.append((file.stat().st_mtime, name, file.parent))
        return {name: folder for _, name, folder in sorted(found, reverse=True)}

    def unfinished(self) -> str:
        sweeps = [run for run in unfinished_runs(self.service.config.runs_dir) if run.kind == "sweep"]
        return Markup("").join(self._unfinished(sweep) for sweep in sweeps)

    def _unfinished(self, sweep: UnfinishedRun) -> Markup:
        if sweep.problem:
            return html.failure(f"{sweep.name}: {self.service.hide_paths(sweep.problem)}")
        state = (
            "running" if sweep.running else as_typed(f"stopped; {PROGRAM} train --resume {sweep.name} resumes it")
        )
        return html.note(
            f"{sweep.name}: {sweep.done} of {format_count(sweep.total or 0, 'trial')} done, {state}."
        )


def read_result(folder: Path) -> "SweepResult":
    """Read the result of a sweep. Raises TrainingError if it is damaged."""
    from ...training.sweep_result import SweepResult  # with all that trains

    file = folder / SWEEP_RESULT_FILE
    try:
        if file.stat().st_size > MAX_RESULT_BYTES:
            raise TrainingError(f"{file} is too large for the result of a sweep.")
        return TypeAdapter(SweepResult).validate_json(file.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise TrainingError(f"{file} is damaged: {place}: {problem['msg']}".replace(" : ", " ")) from error


def show_sweep(result: "SweepResult", opened: Collection[str]) -> Markup:
    """Show the trials of a sweep as a chart and a table.

    Args:
        opened: adapters that the Library can show.
    """
    axis, by_accuracy = _choose_axis(result.trials), result.base_accuracy is not None
    lines: dict[str, list[Point]] = {}
    for trial in sorted(result.trials, key=lambda trial: (trial.rank, trial.rows or 0, trial.steps or 0)):
        x = getattr(trial, axis)
        if x is not None:
            figure = trial.accuracy if by_accuracy else trial.loss
            name = "trials" if axis == "rank" else f"rank {trial.rank}"
            point = Point(x, math.nan if figure is None else figure, trial.standard_error, trial.name)
            lines.setdefault(name, []).append(point)
    why = f"the smallest within a standard error of the best{' accuracy' if by_accuracy else ''}"
    if any(trial.standard_error is None for trial in result.trials):
        why = "the best; a single held-out row, group or document gives no standard error"
    chart = charts.line_chart(
        [Series(name, points) for name, points in lines.items()],
        title=f"Held-out {'accuracy' if by_accuracy else 'loss'} of the trials of {result.name}",
        x=_AXES[axis],
        y="held-out accuracy" if by_accuracy else "held-out loss (nats per token)",
        reference=("base", result.base_loss if result.base_accuracy is None else result.base_accuracy),
        log_x=True,
        file=f"sweep-{result.name}",
    )
    rows = [(trial.name, _cells(trial, result)) for trial in result.trials]
    return Markup(
        charts.template("sweep.html.jinja").render(result=result, why=why, chart=chart, rows=rows, opened=opened)
    )


def _choose_axis(trials: Sequence["Trial"]) -> str:
    """Return the setting that the chart has as its x axis: the first in which trials differ, else the rank."""
    trained = [trial for trial in trials if trial.loss is not None]
    for axis in _AXES:
        compared = trials if axis == "learning_rate" else trained  # one that diverged has no rows and steps
        if len({getattr(trial, axis) for trial in compared}) > 1:
            return axis
    return "rank"


def _cells(trial: "Trial", result: "SweepResult") -> list[str]:
    """Return the cells of a trial; one that diverged has no figures."""
    loss, gap, gain = "diverged", "", ""
    if trial.loss is not None:
        loss, gap = f"{trial.loss:.3f}", format_gain(trial.gap, trial.standard_error)
        gain = f"{result.base_loss - trial.loss:+.3f}"
    accuracy = []
    if result.base_accuracy is not None:
        accuracy = ["" if trial.accuracy is None else f"{trial.accuracy:.3f}"]
        gain = "" if trial.accuracy is None else f"{trial.accuracy - result.base_accuracy:+.3f}"
    rate = "" if trial.learning_rate is None else f"{trial.learning_rate:g}"
    size, seconds = (format_bytes(trial.bytes), format_duration(trial.seconds)) if trial.bytes else ("", "")
    rows, steps = ("" if count is None else f"{count:,}" for count in (trial.rows, trial.steps))
    return [str(trial.rank), rate, rows, steps, loss, *accuracy, gap, gain, size, seconds]
