"""The tab that trains: choose data, see what the model will see, plan, start a run, and follow all runs."""

from collections.abc import AsyncGenerator, Sequence
from functools import cached_property, partial
from pathlib import Path

import gradio as gr

from ...config import TrainConfig
from ...errors import ConfigError, LoraTunerError, os_error_message
from ...training import jobs
from ...training.jobs import Job
from . import html, train_form, train_html
from .commands import CommandRunner, temporary_folder
from .common import PageTab, on
from .train_runs import RunsView, TrainParts, TrainRuns
from .uploads import MAX_FILE_BYTES, OFF, Uploads, may_train

PREVIEWED_ROWS = 5
NOT_SERVED = (
    "What is trained here comes into the library. The other tabs keep the adapters of the start (--adapter)."
)


class TrainTab(PageTab):
    """Start runs and follow them."""

    @cached_property
    def uploads(self) -> Uploads:
        return Uploads(self.service.config)

    @cached_property
    def commands(self) -> CommandRunner:
        return CommandRunner()

    @cached_property
    def runs(self) -> TrainRuns:
        return TrainRuns(self.service, self.requests)

    def build(self, tabs: gr.Tabs, page: gr.Blocks) -> TrainParts:
        """Add the tab."""
        write, chat = (
            gr.Button(name, scale=0, min_width=140, visible=False, render=False)
            for name in ("Write with it", "Chat with it")
        )
        parts = TrainParts(gr.State(RunsView()), gr.State(0), write, chat)
        if not may_train(self.service.config):
            gr.HTML(html.note(OFF), apply_default_css=False)
            write.render()  # others refer to them
            chat.render()
            return parts
        if self.service.only:
            gr.HTML(html.note(NOT_SERVED), apply_default_css=False)
        view = parts.view
        with gr.Accordion("New run", open=True) as new:
            upload, *controls = self._build_settings()
            with gr.Row():
                look = gr.Button("Preview", scale=0, min_width=120)
                plan = gr.Button("Plan", scale=0, min_width=120)
                train = gr.Button("Train", variant="primary", scale=0, min_width=120)
                stop = gr.Button("Stop", scale=0, min_width=120, visible=False)
            status = gr.HTML(apply_default_css=False)
            shown = {
                name: gr.HTML(apply_default_css=False, elem_classes="train-output")
                for name in ("plan", "preview", "report")
            }
        runs = self.runs.build(parts)
        inputs = [view, upload, *controls]
        for button, command in ((look, self.preview), (plan, self.plan)):
            event = on(button.click, command, inputs, [status, stop, *shown.values(), *controls])
            stop.click(
                lambda: ("", gr.update(visible=False)),
                None,
                [status, stop],
                cancels=[event],
                show_progress="hidden",
                api_visibility="private",
            )
        parent = controls[train_form.FIELDS.index("parent")]
        on([page.load, parts.ended.change], self.offer_parents, parent, parent)
        on(train.click, self.train, inputs, [new, status, *controls, *runs])
        on(page.load, self.load, view, [new, *runs])
        on(tabs.select, self.select_tab, view, runs)
        return parts

    def _build_settings(self) -> list[gr.components.Component]:
        """Add data and settings. Returns the upload, and the controls of `train_form.FIELDS`."""
        names = self.usable_names()
        drop = gr.HTML(
            train_html.drop_zone(MAX_FILE_BYTES), apply_default_css=False, js_on_load=train_html.UPLOAD_SCRIPT
        )
        upload = gr.State("")
        controls: dict[str, train_form.Control] = {"dataset": train_form.hub_control()}
        with gr.Row(elem_classes=["form-grid", "few"]):
            for name in train_form.FIRST:
                controls[name] = train_form.control(name)
        with gr.Accordion("All settings", open=False):
            for panel, settings in train_form.panels().items():
                gr.HTML(train_html.heading(panel), apply_default_css=False)
                with gr.Row(elem_classes="form-grid"):
                    for name in settings:
                        controls[name] = train_form.control(name, names)
        drop.upload(
            self.receive,
            upload,
            [drop, upload, controls["name"]],
            show_progress="hidden",
            api_visibility="private",
        )
        return [upload, *(controls[name] for name in train_form.FIELDS)]

    # Data and settings

    async def receive(self, upload: str, event: gr.EventData) -> list[object]:
        """Show the files that were uploaded, or why they were not; suggest a name."""
        return await self.service.run_in_thread("train", lambda: self._receive(upload, event))

    def _receive(self, upload: str, event: gr.EventData) -> list[object]:
        new = str(getattr(event, "id", ""))
        dataset = self.uploads.dataset(new)
        if dataset is None:
            before = self.uploads.dataset(upload)
            problem = str(getattr(event, "problem", "")) or "No file was uploaded."
            return [train_html.drop_zone(MAX_FILE_BYTES, _file_names(before), problem), gr.skip(), gr.skip()]
        names = _file_names(dataset)
        taken = [
            *self.service.generator.library.names(),
            *(job.name for job in jobs.list_jobs(self.runs.runs_dir)),
        ]
        name = train_form.free_name(names[0], taken)
        return [train_html.drop_zone(MAX_FILE_BYTES, names), new, name]

    def _read(self, upload: str, values: Sequence[object]) -> TrainConfig:
        """Return the configuration of the form. Raises ConfigError with `problems`."""
        typed = dict(zip(train_form.FIELDS, values, strict=True))
        uploaded, hub = self.uploads.dataset(upload), str(typed.pop("dataset") or "").strip()
        dataset = str(uploaded) if uploaded and not hub else train_form.hub_dataset(hub)
        files, generator = self.service.base.files, self.service.generator
        names = self.usable_names() if typed["parent"] else []
        if typed["parent"] and typed["parent"] not in names:
            raise ConfigError("It is not in the library.", {"parent": "it is not in the library any more"})
        server = {
            "dataset": dataset,
            "base": files.as_setting,
            "adapters_dir": generator.library.path,
            "runs_dir": self.runs.runs_dir,
            "device": generator.options.device,
        }
        if files.revision:
            server["revision"] = files.revision
        config = train_form.read_settings(typed, server)
        if not config.name or config.name not in generator.library.names():
            return config
        raise ConfigError(
            "The name is taken.", {"name": f"there is an adapter {config.name}: choose another name"}
        )

    async def preview(self, view: RunsView, upload: str, *values: object) -> AsyncGenerator[list[object], None]:
        """Show rows as the model sees them, then the data report."""
        commands = (
            ("preview", ["train", "--preview", str(PREVIEWED_ROWS)]),
            ("report", ["data"]),
        )
        async for update in self._run_commands(commands, view, upload, values):
            yield update

    async def plan(self, view: RunsView, upload: str, *values: object) -> AsyncGenerator[list[object], None]:
        """Measure a few steps, and show what the run will cost."""
        async for update in self._run_commands([("plan", ["train", "--plan"])], view, upload, values):
            yield update

    async def _run_commands(
        self, commands: Sequence[tuple[str, list[str]]], view: RunsView, upload: str, values: Sequence[object]
    ) -> AsyncGenerator[list[object], None]:
        """Run commands with the settings of the form, and yield status, Stop, outputs and controls.

        What was shown before stays where a command fails.
        """
        outputs = {name: gr.skip() for name in ("plan", "preview", "report")}
        try:
            config = await self.service.run_in_thread("train", partial(self._read, upload, values))
        except LoraTunerError as error:
            yield [self._form_problem(error), gr.update(visible=False), *outputs.values(), *_errors(error, view)]
            return
        controls = train_form.error_updates({}, view.invalid)
        try:
            with temporary_folder() as folder:
                for name, arguments in commands:
                    page = Path(folder, "report.html")
                    if name == "report":
                        arguments = [*arguments, "--html", str(page)]
                    async for result in self.commands.run(*arguments, config=config, folder=Path(folder)):
                        if isinstance(result, str):
                            status = train_html.busy(f"{name.capitalize()}: {self.runs.in_words(result)}")
                            yield [status, gr.update(visible=True), *outputs.values(), *controls]
                            outputs, controls = dict.fromkeys(outputs, gr.skip()), [gr.skip()] * len(controls)
                            continue
                        if name == "report":
                            outputs[name] = train_html.data_report(page.read_text(encoding="utf-8"))
                        elif name == "preview":
                            outputs[name] = train_html.preview(result, config)
                        else:
                            outputs[name] = train_html.plan(result)
            yield ["", gr.update(visible=False), *outputs.values(), *controls]
        except (LoraTunerError, OSError) as error:
            yield [self._form_problem(error), gr.update(visible=False), *outputs.values(), *controls]

    def _form_problem(self, error: Exception) -> str:
        problems = getattr(error, "problems", {})
        if problems:
            labels = ", ".join(train_form.label_of(name) for name in problems)
            return html.failure(f"Not started: see {labels}.")
        text = os_error_message(error) if isinstance(error, OSError) else str(error)
        return html.failure(self.runs.in_words(text))

    async def train(self, view: RunsView, upload: str, *values: object) -> list[object]:
        """Start a run, and show it."""

        def start() -> Job:
            self.uploads.remove_old()
            return jobs.start_job(self._read(upload, values))

        try:
            job = await self.service.run_in_thread("train", start)
        except (LoraTunerError, OSError) as error:
            updates = await self.runs.look(view)
            return [gr.skip(), self._form_problem(error), *_errors(error, view), *updates]
        view.chosen, view.problem, view.asks = job.name, "", False
        controls = train_form.error_updates({}, view.invalid)
        return [gr.update(open=False), "", *controls, *await self.runs.look(view)]

    async def offer_parents(self, selected: str) -> dict[str, object]:
        """Offer the current adapters to continue from."""
        names = await self.service.run_in_thread("list", self.usable_names)
        return gr.update(choices=[train_form.FRESH, *names], value=selected if selected in names else "")

    async def load(self, view: RunsView, request: gr.Request) -> list[object]:
        """Show all runs at the start, with the form closed if one lives.

        The tab is open if the address names it; if that names none, with an empty library.
        """
        tab = request.query_params.get("tab")
        names = await self.service.run_in_thread("list", self.usable_names)
        view.is_open = tab == "train" or (tab is None and not names)
        updates = await self.runs.look(view)
        return [gr.update(open=False) if view.alive else gr.skip(), *updates]

    async def select_tab(self, view: RunsView, event: gr.SelectData) -> list[object]:
        """Follow the runs while the tab is open."""
        view.is_open = event.value == "Train"
        return await self.runs.look(view)


def _errors(error: Exception, view: RunsView) -> list[object]:
    return train_form.error_updates(getattr(error, "problems", {}), view.invalid)


def _file_names(dataset: Path | None) -> list[str]:
    if dataset is None:
        return []
    return sorted(path.name for path in (dataset.iterdir() if dataset.is_dir() else [dataset]))
