"""The runs below the form: the list of all, losses, samples and log of one, and what can be done with it.

Runs are processes of their own (`training/jobs`), so the page only reads what they write. A visitor
is sent what has changed since the last look, as long as the tab is open and a run lives.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import gradio as gr

from ...adapters.adapter import METRICS_FILE
from ...adapters.samples import SAMPLES_FILE
from ...errors import LoraTunerError, os_error_message
from ...training import jobs
from ...training.jobs import Job, JobState
from . import html, train_form, train_html
from .common import PageTab, on

POLL_SECONDS = 2.0
REST = 50  # times as long as a look at the files of a run took, until the next: 2% of a core for a visitor
LOG_LINES = 40
_LOG_BYTES = 20_000
_ENDED = (JobState.STOPPED, JobState.FAILED, JobState.FINISHED)


@dataclass
class RunsView:
    """State of a visitor's page: all that it shows, so that only changes are sent."""

    chosen: str | None = None  # run
    is_open: bool = True  # the tab
    problem: str = ""  # of the last action on a run
    asks: bool = False  # whether to remove the chosen run
    alive: frozenset[str] = frozenset()
    ended: int = 0  # runs, since the page was opened
    invalid: set[str] = field(default_factory=set)  # settings that show a problem
    files: tuple[object, ...] = ()  # identity of those that the pictures were made of
    rests_until: float = 0.0  # before that, they are not made again for new steps alone
    shown: dict[str, object] = field(default_factory=dict)

    def change(self, key: str, value: object) -> object:
        """Return a value if it is another one than before, else no update."""
        if key in self.shown and self.shown[key] == value:
            return gr.skip()
        self.shown[key] = value
        return value


@dataclass(frozen=True)
class TrainParts:
    """Parts of the tab that others act on: `ended` changes when a run has ended; the buttons open its adapter."""

    view: gr.State
    ended: gr.State
    write: gr.Button
    chat: gr.Button


class TrainRuns(PageTab):
    """Follow all runs of a folder."""

    @property
    def runs_dir(self) -> Path:
        return self.service.config.runs_dir

    def build(self, parts: TrainParts) -> list[object]:
        """Add the list of runs and what is shown of one. Returns the outputs of `look`."""
        view, timer = parts.view, gr.Timer(POLL_SECONDS, active=False)
        with gr.Row():
            gr.HTML(train_html.heading("Runs"), apply_default_css=False)
            refresh = gr.Button("Refresh", size="sm", scale=0)
        chosen = gr.Radio(label="Runs", show_label=False, container=False, visible=False)
        details = gr.HTML(apply_default_css=False)
        with gr.Row():
            toggle = gr.Button("Pause", scale=0, min_width=120, visible=False)
            stop = gr.Button("Stop and save", scale=0, min_width=180, visible=False)
            resume = gr.Button("Resume", scale=0, min_width=120, visible=False)
            remove = gr.Button("Remove", scale=0, min_width=120, visible=False)
            parts.write.render()
            parts.chat.render()
        with gr.Row(visible=False) as question:
            confirm = gr.Button("Remove permanently", variant="stop", scale=0, min_width=180)
            keep = gr.Button("Keep it", scale=0, min_width=120)
        samples = gr.HTML(apply_default_css=False)
        with gr.Accordion("Log", open=False, visible=False) as log_box:
            log = gr.HTML(apply_default_css=False)
        opened = [question, samples, log_box, log]
        outputs = [
            chosen, details, toggle, stop, resume, remove, parts.write, parts.chat, *opened, timer, parts.ended
        ]  # fmt: skip
        on([timer.tick, refresh.click], self.look, view, outputs)
        on(chosen.input, self.choose, [view, chosen], outputs)
        for button, action in (
            (toggle, _pause_or_continue),
            (stop, jobs.stop_job),
            (resume, _resume),
            (confirm, jobs.dismiss_job),
        ):
            on(button.click, partial(self.act, action), view, outputs)
        for button, asks in ((remove, True), (keep, False)):
            on(button.click, partial(self.ask, asks), view, outputs)
        return outputs

    async def choose(self, view: RunsView, name: str) -> list[object]:
        view.chosen, view.problem, view.asks = name, "", False
        return await self.look(view)

    async def ask(self, asks: bool, view: RunsView) -> list[object]:
        view.asks = asks
        return await self.look(view)

    async def act(self, action: Callable[[Job], object], view: RunsView) -> list[object]:
        """Act on the chosen run, and show what became of it."""

        def act() -> None:
            action(jobs.find_job(str(view.chosen), self.runs_dir))

        view.problem, view.asks = "", False
        try:
            await self.service.run_in_thread("train", act)
        except (LoraTunerError, OSError) as error:
            text = os_error_message(error) if isinstance(error, OSError) else str(error)
            view.problem = self.in_words(text)
        return await self.look(view)

    async def look(self, view: RunsView) -> list[object]:
        """Return what has changed in the outputs of `build`."""
        return await self.service.run_in_thread("train", partial(self._look, view))

    def in_words(self, text: str) -> str:
        """Return a message in the words of the page."""
        return train_form.in_labels(self.service.hide_paths(text))

    def _look(self, view: RunsView) -> list[object]:
        found = jobs.list_jobs(self.runs_dir)
        names = [job.name for job in found]
        if view.chosen not in names:
            view.chosen, view.asks = names[0] if names else None, False
        job = next((job for job in found if job.name == view.chosen), None)
        alive = frozenset(job.name for job in found if job.state.is_alive)
        view.ended += len(view.alive - alive)
        view.alive = alive
        state = job.state if job else None
        choices = [(train_html.job_label(job), job.name) for job in found]
        is_waiting = state == JobState.WAITING
        can_resume = job is not None and state in (JobState.STOPPED, JobState.FAILED) and job.folder.is_dir()
        is_served = state == JobState.FINISHED and not self.service.only
        details, samples, log = self._pictures(view, job)
        return [
            view.change("runs", gr.update(choices=choices, value=view.chosen, visible=bool(found))),
            details,
            view.change(
                "toggle",
                gr.update(
                    value="Continue" if state == JobState.PAUSED else "Pause",
                    visible=state in (JobState.RUNNING, JobState.PAUSED),
                ),
            ),
            view.change("stop", gr.update(visible=bool(state and state.is_alive and not is_waiting))),
            view.change("resume", gr.update(visible=can_resume)),
            view.change("remove", gr.update(visible=is_waiting or state in _ENDED)),
            view.change("write", gr.update(visible=is_served)),
            view.change("chat", gr.update(visible=is_served)),
            view.change("question", gr.update(visible=view.asks)),
            samples,
            view.change("log_box", gr.update(visible=job is not None and job.log is not None)),
            log,
            view.change("timer", gr.update(active=bool(alive) and view.is_open)),
            view.change("ended", view.ended),
        ]

    def _pictures(self, view: RunsView, job: Job | None) -> list[object]:
        """Return figures, samples and log of a job, if its files have changed."""
        if job is None:
            empty = html.note(
                "No runs yet: choose data above, and press Train. Runs of a terminal appear here too."
            )
            return [view.change("details", empty), view.change("samples", ""), view.change("log", "")]
        folder = job.folder
        if job.state == JobState.FINISHED:
            folder = self.service.generator.library.path / job.name
        files = [folder / METRICS_FILE, folder / SAMPLES_FILE, *([job.log] if job.log else [])]
        identity = (job.name, job.state, view.problem, job.step, *map(_file_identity, files))
        has_only_grown = identity[:3] == view.files[:3]
        start = time.monotonic()
        if identity == view.files or (has_only_grown and start < view.rests_until):
            return [gr.skip()] * 3
        view.files = identity
        live, log = jobs.read_live(folder), self.service.hide_paths(_last_lines(job.log)) if job.log else ""
        problem = view.problem or (self.in_words(job.problem) if job.problem else "")
        updates = [
            view.change("details", train_html.run(job, live, problem, log.rpartition("\n")[2])),
            view.change("samples", train_html.samples(live.samples)),
            view.change("log", train_html.log(log)),
        ]
        now = time.monotonic()
        view.rests_until = now + REST * (now - start)
        return updates


def _pause_or_continue(job: Job) -> None:
    jobs.continue_job(job) if job.state == JobState.PAUSED else jobs.pause_job(job)


def _resume(job: Job) -> None:
    jobs.resume_job(job.name, job.folder.parent)


def _file_identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _last_lines(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-LOG_LINES:])
