"""The tab of the library: all adapters, the details of one, and what can be done with it."""

import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import gradio as gr
from gradio.events import Dependency

from ...adapters.library import read_consistently
from ...errors import LoraTunerError, os_error_message
from ..service import ServedModel, Work
from . import html, library_html, train_html
from .commands import CommandRunner
from .common import GONE, PageTab, buttons, connect_stop, on
from .exports import FORMATS, PRECISIONS, Export, Exports
from .library_actions import OFF, LibraryActions
from .uploads import MAX_FILE_BYTES, may_train

TABLE_SCRIPT = Path(__file__).with_name("library.js").read_text(encoding="utf-8")
CARD_SCRIPT = Path(__file__).with_name("card.js").read_text(encoding="utf-8")
on_slow = partial(on, show_progress="minimal")  # shows that it works
CHOOSE = "Choose an adapter to see its details."


@dataclass(eq=False)
class ShownAdapter:
    """The adapter whose card a visitor sees; no name without a card. Changed in place, so that an
    event which ends late does not bring an earlier one back."""

    name: str = ""


class LibraryTab(PageTab):
    """Browse the adapters of the library, and manage them."""

    @cached_property
    def actions(self) -> LibraryActions:
        return LibraryActions(self.service)

    @cached_property
    def exports(self) -> Exports:
        return Exports(self.actions, CommandRunner())

    @cached_property
    def cleared(self) -> dict[gr.components.Component, dict[str, object]]:
        """Results of what was done, and how each is cleared when another adapter is shown."""
        return {}

    def build(self, tab: gr.Tab) -> list[Callable[..., Dependency]]:
        """Add the tab, and return the events on which the library is read anew."""
        refresh = gr.Button("Refresh", size="sm", scale=0)
        table = gr.HTML(apply_default_css=False, js_on_load=TABLE_SCRIPT)
        if may_train(self.service.config):
            self._build_upload(table)
        card = gr.HTML(html.note(CHOOSE), apply_default_css=False, js_on_load=CARD_SCRIPT)
        adapter = gr.State(ShownAdapter())
        spectrum = gr.HTML(apply_default_css=False, render=False)  # it comes last, so that nothing moves
        with gr.Column(visible=False) as actions:
            self._build_verify(adapter)
            if may_train(self.service.config):
                self._build_export(adapter)
                self._build_push(adapter)
                self._build_rename(adapter, [table, card, actions, spectrum])
                self._build_remove(adapter, [table, card, actions, spectrum])
            else:
                gr.HTML(html.note(OFF), apply_default_css=False)
        spectrum.render()
        shown = [card, actions, spectrum]
        self.adapter, self.details = adapter, [*shown, *self.cleared]
        on([tab.select, refresh.click], self.library, None, table)
        for list_of_names in (table, card):
            list_of_names.select(
                self.open,
                adapter,
                self.details,
                scroll_to_output=True,
                show_progress="minimal",
                api_visibility="private",
            )
        return [tab.select, table.change]

    def _result(self) -> gr.HTML:
        """Add the place for the result of an action."""
        result = gr.HTML(apply_default_css=False)
        self.cleared[result] = gr.update(value="")
        return result

    def _build_upload(self, table: gr.HTML) -> None:
        with gr.Accordion("Upload an adapter", open=False):
            drop = gr.HTML(drop_zone(), apply_default_css=False, js_on_load=train_html.UPLOAD_SCRIPT)
            upload = gr.State("")
            with gr.Row():
                new = gr.Textbox(label="Name", info="Left blank: that of the zip file.", max_lines=1)
            add = gr.Button("Add to the library", scale=0, min_width=140)
            result = gr.HTML(apply_default_css=False)
        drop.upload(
            self.receive, upload, [drop, upload, result], show_progress="hidden", api_visibility="private"
        )
        on_slow([add.click, new.submit], self.adopt, [upload, new], [result, drop, upload, new, table])

    def _build_export(self, adapter: gr.State) -> None:
        with gr.Accordion("Export", open=False):
            with gr.Row():
                formats = gr.Dropdown([*FORMATS], value=next(iter(FORMATS)), label="Format", scale=2)
                precision = gr.Dropdown(
                    [*PRECISIONS],
                    value=PRECISIONS[0],
                    label="Precision",
                    info="Of a whole model. A quantized one is measured.",
                    scale=1,
                )
            with gr.Row():
                check = gr.Button("Check", scale=0, min_width=140)
                start, stop = buttons("Export")
            result = self._result()
        on_slow([check.click, formats.input], self.check_export, [adapter, formats], result)
        connect_stop(on(start.click, self.export, [adapter, formats, precision], result), stop, result)

    def _build_verify(self, adapter: gr.State) -> None:
        verify = gr.Button("Verify", scale=0, min_width=140)
        on_slow(verify.click, self.verify, adapter, self._result())

    def _build_rename(self, adapter: gr.State, shown: Sequence[gr.HTML | gr.Column]) -> None:
        with gr.Accordion("Rename", open=False):
            new = gr.Textbox(label="New name", max_lines=1)
            button = gr.Button("Rename", scale=0, min_width=140)
            result = self._result()
        on([button.click, new.submit], self.rename, [adapter, new], [result, new, *shown])

    def _build_remove(self, adapter: gr.State, shown: Sequence[gr.HTML | gr.Column]) -> None:
        with gr.Accordion("Remove", open=False):
            ask = gr.Button("Remove ...", scale=0, min_width=140)
            question = self._result()
            with gr.Row():
                confirm = gr.Button("Remove for ever", variant="stop", scale=0, min_width=140, visible=False)
                keep = gr.Button("Keep it", scale=0, min_width=140, visible=False)
        self.cleared |= {confirm: gr.update(visible=False), keep: gr.update(visible=False)}
        answers = [question, confirm, keep]
        on(ask.click, self.ask_removal, adapter, answers)
        on(keep.click, lambda: _question(""), None, answers)
        on(confirm.click, self.remove, adapter, [*answers, *shown])

    def _build_push(self, adapter: gr.State) -> None:
        with gr.Accordion("Push to the Hugging Face Hub", open=False):
            if why := self.actions.why_no_push():
                gr.HTML(html.note(why), apply_default_css=False)
                return
            with gr.Row():
                repo = gr.Textbox(label="Repo", placeholder="owner/name", max_lines=1, scale=2)
                private = gr.Checkbox(True, label="Private", info="If the repo is new.", scale=1)
            with gr.Row():
                check = gr.Button("Check", scale=0, min_width=140)
                push = gr.Button("Push", variant="primary", scale=0, min_width=140, interactive=False)
            result = self._result()
        self.cleared[push] = gr.update(interactive=False)
        on_slow([check.click, repo.submit], self.check_push, [adapter, repo, private], [result, push])
        on([repo.input, private.input], lambda: ("", gr.update(interactive=False)), None, [result, push])
        on_slow(push.click, self.push, [adapter, repo, private], [result, push])

    # What is shown

    async def library(self) -> str:
        """Show all adapters."""
        try:
            return await self.service.run_in_thread("list", lambda: library_html.library(self.adapters()))
        except (LoraTunerError, OSError) as error:
            return self.failure(error)

    async def open(self, shown: ShownAdapter, event: gr.EventData) -> AsyncGenerator[tuple[object, ...], None]:
        """Show the adapter whose name was clicked, without results of what was done with another."""
        cleared = [*self.cleared.values()]
        async for updates in self.show(shown, str(event.name)):
            yield *updates, *cleared
            cleared = [gr.skip()] * len(cleared)

    async def show(self, shown: ShownAdapter, name: str) -> AsyncGenerator[tuple[object, ...], None]:
        """Show an adapter: its card at once, then its spectrum, if no other one is shown by then."""
        shown.name = ""
        try:
            models = await self.service.run_in_thread("list", self.adapters)
        except (LoraTunerError, OSError) as error:
            yield self.failure(error), gr.update(visible=False), ""
            return
        model = next((model for model in models if model.id == name), None)
        if model is None or model.path is None:
            yield html.failure(GONE.format(name)), gr.update(visible=False), ""
            return
        card = await self.service.run_in_thread("library", partial(self.card, model, models))
        shown.name = name
        yield card, gr.update(visible=True), ""
        if model.broken is None:
            # One thread: matplotlib is not thread-safe.
            spectrum = await self.service.run_in_thread("draw", partial(self.spectrum, model.path))
            if shown.name == name:
                yield gr.skip(), gr.skip(), spectrum

    def card(self, model: ServedModel, models: Sequence[ServedModel]) -> str:
        """Show what is in the folder of an adapter."""
        assert model.path is not None
        draw = partial(library_html.card, model, models=models, hide_paths=self.service.hide_paths)
        try:
            return read_consistently(model.path, draw)
        except (LoraTunerError, OSError) as error:
            return draw(None) if model.broken else self.failure(error)

    def spectrum(self, folder: Path) -> str:
        """Show the spectrum of an adapter, or the reason why there is none."""
        layers = self.service.generator.engine.multi_lora.layers
        draw = partial(read_consistently, folder, partial(library_html.spectrum, layers=layers))
        return library_html.or_reason(draw, self.service.hide_paths)

    # What is done

    async def _attempt(self, action: Callable[[], str], work: Work = "library") -> tuple[bool, str]:
        """Return whether an action succeeded, and its result or the reason against it."""
        try:
            return True, html.status(self.service.hide_paths(await self.service.run_in_thread(work, action)))
        except LoraTunerError as error:
            return False, self.failure(error)
        except OSError as error:
            return False, self.failure(LoraTunerError(os_error_message(error)))

    async def receive(self, upload: str, event: gr.EventData) -> tuple[object, ...]:
        """Show the files that were uploaded, or why they were not."""
        new = str(getattr(event, "id", ""))
        files = [
            path.name
            for path in await self.service.run_in_thread("library", partial(self.actions.uploads.files, new))
        ]
        if not files:
            problem = str(getattr(event, "problem", "")) or "No file was uploaded."
            return drop_zone(problem=problem), upload, ""
        return drop_zone(files), new, ""

    async def adopt(self, upload: str, name: str) -> tuple[object, ...]:
        """Add what was uploaded to the library."""
        adopt = partial(self.actions.adopt, upload, str(name or "").strip())
        added, result = await self._attempt(adopt, "library-long")
        return (result, drop_zone(), "", "", await self.library()) if added else (result, *[gr.skip()] * 4)

    async def check_export(self, shown: ShownAdapter, label: str) -> str:
        """Show whether an adapter can be exported to a format, and notes on it."""
        try:
            problems, notes = await self.service.run_in_thread(
                "library-long", lambda: self.exports.verdict(shown.name, label)
            )
        except (LoraTunerError, OSError) as error:
            return self.failure(error)
        hide = self.service.hide_paths
        verdict = html.status(f"Nothing stands against {label}.")
        if problems:
            verdict = html.failure(hide(f"Not possible: {'; '.join(problems)}."))
        return verdict + library_html.bullets([hide(note) for note in notes])

    async def export(self, shown: ShownAdapter, label: str, precision: str) -> AsyncGenerator[str, None]:
        """Export an adapter, and offer the result as a download."""
        try:
            async with contextlib.aclosing(self.exports.export(shown.name, label, precision)) as updates:
                async for update in updates:
                    if isinstance(update, Export):
                        yield library_html.download(update.href, update.title)
                    else:
                        yield train_html.busy(self.service.hide_paths(update))
        except (LoraTunerError, OSError) as error:
            yield self.failure(error)

    async def verify(self, shown: ShownAdapter) -> str:
        """Compare an adapter with its manifest."""
        return (await self._attempt(partial(self.actions.verify, shown.name), "library-long"))[1]

    async def rename(self, shown: ShownAdapter, new: str) -> AsyncGenerator[tuple[object, ...], None]:
        """Rename an adapter, and show it under its new name."""
        new = str(new or "").strip()
        renamed, result = await self._attempt(partial(self.actions.rename, shown.name, new))
        if not renamed:
            yield result, *[gr.skip()] * 5
            return
        table = await self.library()
        async for updates in self.show(shown, new):  # in one event: Gradio may lose one that follows another
            yield result, "", table, *updates

    async def ask_removal(self, shown: ShownAdapter) -> tuple[object, ...]:
        """Name what is lost, and ask."""
        asked, question = await self._attempt(partial(self.actions.describe_loss, shown.name))
        return _question(question, asked)

    async def remove(self, shown: ShownAdapter) -> tuple[object, ...]:
        """Remove an adapter, and show that in place of its card."""
        removed, result = await self._attempt(partial(self.actions.remove, shown.name))
        if not removed:
            return *_question(result), *[gr.skip()] * 4
        shown.name = ""
        return *_question(""), await self.library(), result, gr.update(visible=False), ""

    async def check_push(self, shown: ShownAdapter, repo: str, private: bool) -> tuple[object, ...]:
        """Ask the Hub for the right to write, and allow pushing if it is given."""
        check = partial(self.actions.check_push, shown.name, str(repo or "").strip(), bool(private))
        allowed, result = await self._attempt(check, "push")
        return result, gr.update(interactive=allowed)

    async def push(self, shown: ShownAdapter, repo: str, private: bool) -> tuple[object, ...]:
        """Push an adapter to the Hub."""
        push = partial(self.actions.push, shown.name, str(repo or "").strip(), bool(private))
        return (await self._attempt(push, "push"))[1], gr.update(interactive=False)


def drop_zone(files: Sequence[str] = (), problem: str = "") -> str:
    """Show where the files of an adapter are dropped."""
    return train_html.drop_zone(
        MAX_FILE_BYTES,
        files,
        problem,
        label="Files of an adapter",
        hint="A zip file, or adapter_config.json, adapter_model.safetensors and what is beside them.",
        path="uploads/adapter",
    )


def _question(text: str, asked: bool = False) -> tuple[object, ...]:
    """Return what the question of a removal shows; without one there are no buttons."""
    return text, gr.update(visible=asked), gr.update(visible=asked)
