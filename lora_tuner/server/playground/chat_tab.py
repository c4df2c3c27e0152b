"""The tab that chats: a conversation with one adapter at a time, or the base.

The HTML is ours, not Gradio's chat component: that one has no hover for each token, and sends the
whole conversation back with each event, past the limit of a request.
"""

import contextlib
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from functools import partial

import gradio as gr
from markupsafe import Markup

from ...config import INVALID_TEXT
from ...errors import ConfigError, LoraTunerError
from ...models.tokenizer import has_chat_template
from . import feedback, html
from .common import (
    SETTINGS_INFOS,
    TOP_LOGPROBS,
    PageTab,
    buttons,
    connect_stop,
    on,
    sampling_controls,
    show_problems,
    token_probabilities,
)
from .conversation import Conversation, Turn
from .uploads import may_train

INFOS = {"message": "Enter sends, Shift+Enter starts a new line.", **SETTINGS_INFOS}
EMPTY = "Ask a question. Each answer names the model that gave it."
# Also follows the answer as it grows, and gives the focus back to a button that is drawn anew.
SCRIPT = """let last = null, follow = true;
const box = element.closest(".conversation");
box?.addEventListener("scroll", () => { follow = box.scrollHeight - box.scrollTop - box.clientHeight < 40; });
element.addEventListener("click", event => {
    const button = event.target.closest("button[data-action]");
    if (!button) return;
    const {action, turn} = button.dataset;
    last = button.getAttribute("aria-label");
    if (action == "edit" || action == "cancel") document.querySelector("#message textarea").focus();
    trigger(action == "regenerate" ? "retry" : "select", {action, turn: Number(turn)});
});
watch("value", () => {
    if (box && follow) box.scrollTop = box.scrollHeight;
    if (last && document.activeElement == document.body) element.querySelector(`[aria-label="${last}"]`)?.focus();
});"""
EDITING = Markup(
    '<p class="note" role="status">Editing question {0}: it is asked anew, and what follows it is dropped. '
    '<button type="button" data-action="cancel" data-turn="{0}">Cancel</button></p>'
)
KEY = re.compile("[0-9a-f]{32}")  # of a conversation; the browser makes it, and sends it after a reload
MAX_KEPT = 200  # conversations that a reloaded page finds again
Update = object  # of a component


@dataclass
class ChatTab(PageTab):
    """Ask the base or an adapter, go on with the conversation, and rate the answers."""

    kept: OrderedDict[str, Conversation] = field(default_factory=OrderedDict)  # the last used is the last

    def build(self, tab: gr.Tab, page: gr.Blocks) -> gr.Dropdown:
        """Add the tab, and return the choice of the model."""
        names = self.model_names()
        missing = gr.HTML(self._missing(), visible=not names, apply_default_css=False)
        with gr.Column(visible=bool(names)) as controls:
            model = gr.Dropdown(names, label="Answered by", info="Choose another one at any time.")
            with gr.Column(elem_classes="conversation"):
                history = gr.HTML(apply_default_css=False, js_on_load=SCRIPT)
                current = gr.HTML(html.note(EMPTY), apply_default_css=False, js_on_load=SCRIPT)
            said = gr.HTML(apply_default_css=False, js_on_load=SCRIPT, elem_classes="output")
            message = gr.Textbox(
                "",
                label="Message",
                info=INFOS["message"],
                max_lines=12,
                elem_id="message",
            )
            with gr.Row():
                start, stop = buttons("Send")
                new = gr.Button("New conversation", scale=0, min_width=220)
            probabilities = token_probabilities()
            with gr.Accordion("System message", open=False):
                system = gr.Textbox(
                    "", label="System message", info="Stands before the conversation. Empty: none.", max_lines=12
                )
            settings = sampling_controls()
        conversation, key = gr.State(Conversation()), gr.Textbox(visible=False)
        shown = [message, history, current, said]
        fields = [*shown, *settings]
        inputs = [message, conversation, model, system, probabilities, *settings]
        answer = on([start.click, message.submit, current.retry], self.answer, inputs, fields)
        connect_stop(answer, stop, current)
        answer.then(self.show, conversation, shown, show_progress="hidden", api_visibility="private")
        on([history.select, current.select, said.select], self.act, conversation, shown, trigger_mode="multiple")
        on(new.click, self.restart, conversation, shown, cancels=[answer])
        restored = [conversation, history, current]
        on(page.load, self.restore, key, restored, js="() => lora_tuner.conversationKey()")
        on(tab.select, self.refresh, model, [model, missing, controls])
        return model

    def model_names(self) -> list[str]:
        """Return the adapters with a chat template, the base if it has one, then auto where it has a choice."""
        names = self.usable_names()
        if self.service.base.tokenizer.chat_template:
            names.append(self.service.name)
        else:
            folders = {model.id: model.adapter.path for model in self.adapters() if model.adapter is not None}
            names = [name for name in names if has_chat_template(folders[name])]
        return [*names, *(self.requests.auto_choice() if len(names) > 1 else [])]

    def _missing(self) -> Markup:
        return html.note(
            f"{self.service.name} has no chat template, so it cannot be asked: the tab Write continues texts with it. "
            "An adapter that brings a template of its own can be asked here."
        )

    async def refresh(self, selected: str | None) -> list[Update]:
        """Offer the models that there are now; the newest adapter unless one is selected."""
        names = await self.service.run_in_thread("list", self.model_names)
        value = selected if selected in names else next(iter(names), None)
        return [
            gr.update(choices=names, value=value),
            gr.update(visible=not names),
            gr.update(visible=bool(names)),
        ]

    async def answer(
        self,
        event: gr.EventData,
        question: str,
        conversation: Conversation,
        model: str | None,
        system: str,
        probabilities: bool,
        *settings: float | str | None,
    ) -> AsyncGenerator[list[Update], None]:
        """Ask a question, or the last one again, and stream the answer. An error in what was typed
        leaves the question where it is."""
        again = _event_value(event, "action") == "regenerate"
        if conversation.writing or (again and not conversation.turns):
            return
        name = model or self.service.name
        try:
            if not again and not question.strip():
                raise ConfigError("The question is empty.", {"message": "enter a question"})
            if INVALID_TEXT.search(question + system):
                problem = "a null byte or lone surrogate cannot be sent"
                raise ConfigError(problem, {"message": problem})
            sampling = self.sampling_params(settings)
        except ConfigError as error:
            field, *fields = show_problems(INFOS, error.problems or {"message": str(error)})
            yield [field, *[gr.skip()] * 3, *fields]
            return
        await self._end(conversation)
        answer = conversation.answer(name, system) if again else conversation.ask(question, name, system)
        field, *fields = show_problems(INFOS)
        draft = {} if again else {"value": ""}
        yield [field | draft, self._history(conversation), self._current(conversation), "", *fields]
        try:
            if self.requests.auto.is_asked(name):
                name, answer.chosen = await self.requests.choose(answer.messages)
                answer.model = name
            top = TOP_LOGPROBS if probabilities else None
            submit = partial(self.requests.submit, name, answer.messages, sampling, top)
            asked = answer.messages[-1]["content"]
            async with contextlib.aclosing(self.requests.follow(asked, [(name, submit)])) as updates:
                async for (output,) in updates:
                    answer.read(output)
                    yield [gr.skip(), gr.skip(), self._current(conversation), *[gr.skip()] * len(INFOS)]
            await self._end(conversation)
            yield [gr.skip(), gr.skip(), self._current(conversation), *[gr.skip()] * len(INFOS)]
        except LoraTunerError as error:
            answer.error = self.service.hide_paths(str(error))
        finally:
            answer.writing = False  # also when it is stopped: `show` follows

    async def restore(self, key: str) -> tuple[Conversation, Markup, Markup]:
        """Find the conversation of a page that was reloaded, and show it."""
        if not KEY.fullmatch(key or ""):
            return (conversation := Conversation()), Markup(""), self._current(conversation)
        conversation = self.kept.setdefault(key, Conversation())
        self.kept.move_to_end(key)
        if len(self.kept) > MAX_KEPT:
            self.kept.popitem(last=False)
        conversation.edited = None  # what was typed in its place is gone
        await self._end(conversation)
        return conversation, self._history(conversation), self._current(conversation)

    async def _end(self, conversation: Conversation) -> None:
        """Complete the facts and probabilities of the last answer."""
        if conversation.turns:
            await self.service.run_in_thread("format", conversation.turns[-1].answer.end)

    async def show(self, conversation: Conversation) -> list[Update]:
        """Show the conversation after an answer, complete or stopped."""
        await self._end(conversation)
        return [gr.skip(), gr.skip(), self._current(conversation), gr.skip()]

    async def act(self, conversation: Conversation, event: gr.EventData) -> list[Update]:
        """Do what a button in the conversation says: edit a question, rate an answer, show another one."""
        action, number = _event_value(event, "action"), _event_value(event, "turn")
        if conversation.writing or not isinstance(number, int) or not 0 < number <= len(conversation.turns):
            return [gr.skip()] * 4
        turn, message, said = conversation.turns[number - 1], gr.skip(), Markup("")
        if action == "edit":
            conversation.edited, message = number - 1, turn.question
            said = EDITING.format(number)
        elif action == "cancel":
            conversation.edited, message = None, ""
        elif action in ("previous", "next") and turn is conversation.turns[-1]:
            turn.shown = (turn.shown + (1 if action == "next" else -1)) % len(turn.answers)
        elif action in ("up", "down") and turn.answer.text and may_train(self.service.config):
            said = await self._rate(turn, action == "up")
        return [message, self._history(conversation), self._current(conversation), said]

    async def _rate(self, turn: Turn, thumb: bool) -> Markup:
        """Store a thumb on the answer that is shown, or remove the same one. Return what to say about it."""
        before = turn.answer.thumb
        turn.rate(None if before is thumb else thumb)
        rows = turn.feedback(self.service.name)
        save = partial(feedback.save, self.service.config.runs_dir, turn.id, rows)
        try:
            await self.service.run_in_thread("feedback", save)
        except LoraTunerError as error:
            turn.rate(before)
            return self.failure(error)
        done = "Removed from" if before is thumb else "Saved to"
        return html.note(f"{done} {feedback.FILE} in the folder of runs.")

    async def restart(self, conversation: Conversation) -> list[Update]:
        """Forget the conversation, but not a question that is being written."""
        message = gr.skip() if conversation.edited is None else ""
        conversation.turns, conversation.edited = [], None
        return [message, "", self._current(conversation), ""]

    def _history(self, conversation: Conversation) -> Markup:
        return (
            self._turns(conversation, range(len(conversation.turns) - 1))
            if conversation.turns[1:]
            else Markup("")
        )

    def _current(self, conversation: Conversation) -> Markup:
        """Show the last turn, which changes while it is answered."""
        if not conversation.turns:
            return html.note(EMPTY)
        return self._turns(conversation, [len(conversation.turns) - 1])

    def _turns(self, conversation: Conversation, indices: Iterable[int]) -> Markup:
        turns = [(index + 1, conversation.turns[index]) for index in indices]
        return Markup(
            html.template("chat.html.jinja").render(
                turns=turns,
                last=len(conversation.turns),
                thumbs=may_train(self.service.config),
                writing=any(turn.answer.writing for _, turn in turns),
                failure=html.failure,
            )
        )


def _event_value(event: gr.EventData, name: str) -> object:
    """Return a value that a button has sent; None if there is none."""
    return event._data.get(name) if isinstance(event._data, dict) else None
