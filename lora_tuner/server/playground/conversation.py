"""A visitor's conversation: questions, answers, thumbs. Kept in memory, also for a page that is reloaded."""

import itertools
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from markupsafe import Markup

from ...data.chat import Message
from ...inference.sequence import Sequence
from ...text import format_count
from . import html
from .requests import ModelOutput

Row = dict[str, object]  # of feedback


@dataclass(eq=False)
class Answer:
    """An answer of a model to these messages. `text` is what has been written of it so far; `spans`
    is that text with the probabilities of its tokens, which `probabilities` lists; `chosen` says why auto has chosen
    the model."""

    model: str
    messages: tuple[Message, ...]
    text: str = ""
    spans: Markup | str = ""
    probabilities: Markup | str = ""
    facts: str = ""
    chosen: str = ""
    error: str = ""
    writing: bool = True
    thumb: bool | None = None  # True: up
    sequence: Sequence | None = None  # while it is written

    def read(self, output: ModelOutput) -> None:
        """Take over what a request has given so far; a str is the reason why there is none."""
        if isinstance(output, str):
            self.error = output
            return
        complete = output.complete  # before the text: another thread writes it
        (self.sequence,) = output.sequences
        self.text, self.error = self.sequence.settled_text, str(output.error or "")
        self.facts = format_count(len(self.sequence.output_ids), "token")
        if complete and not self.error:
            self.facts += ", finished" if self.sequence.finished else ", cut off"

    def end(self) -> None:
        """End the answer, also in the middle. Takes long with probabilities."""
        sequence, self.sequence = self.sequence, None
        if sequence is not None:
            if sequence.logprobs:
                self.spans, self.probabilities = html.token_probabilities(sequence)
            if not sequence.complete:
                self.facts += ", stopped"
        self.writing = False


@dataclass(eq=False)
class Turn:
    """A question and its answers, of which one is shown, and goes on in the conversation."""

    question: str
    answers: list[Answer] = field(default_factory=list)
    shown: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def answer(self) -> Answer:
        return self.answers[self.shown]

    def add(self, answer: Answer) -> None:
        """Show another answer, in place of those without text."""
        self.answers = [*(kept for kept in self.answers if kept.text), answer]
        self.shown = len(self.answers) - 1

    def rate(self, thumb: bool | None) -> None:
        """Set the thumb of the answer that is shown, and of others that are the same."""
        for answer in self.answers:
            if (answer.messages, answer.text) == (self.answer.messages, self.answer.text):
                answer.thumb = thumb

    def feedback(self, base: str) -> list[Row]:
        """Return the rows of the thumbs, as TRL reads preferences of conversations: each pair of a
        chosen and a rejected answer to the same messages. Of a lone thumb the other side is null.
        """
        rows: list[Row] = []
        rated = [answer for answer in self.answers if answer.thumb is not None]
        for first in {str(answer.messages): answer for answer in rated}.values():
            alike = {answer.text: answer for answer in rated if answer.messages == first.messages}.values()
            up: list[Answer | None] = [answer for answer in alike if answer.thumb]
            down: list[Answer | None] = [answer for answer in alike if not answer.thumb]
            for chosen, rejected in itertools.product(up or [None], down or [None]):
                rows.append(
                    {
                        "prompt": list(first.messages),
                        "chosen": _message(chosen),
                        "rejected": _message(rejected),
                        "chosen_by": chosen and chosen.model,
                        "rejected_by": rejected and rejected.model,
                        "base": base,
                        "id": self.id,
                        "created": datetime.now(UTC).isoformat(timespec="seconds"),
                    }
                )
        return rows


def _message(answer: Answer | None) -> list[Message] | None:
    return [{"role": "assistant", "content": answer.text}] if answer else None


@dataclass(eq=False)
class Conversation:
    """The turns so far, and the number of the one whose question is being edited."""

    turns: list[Turn] = field(default_factory=list)
    edited: int | None = None

    @property
    def writing(self) -> bool:
        return bool(self.turns) and self.turns[-1].answer.writing

    def ask(self, question: str, model: str, system: str) -> Answer:
        """Begin a turn, in place of the one that is being edited and of those after it."""
        if self.edited is not None:
            del self.turns[self.edited :]
        self.turns = [turn for turn in self.turns if turn.answer.text]  # others were no part of it
        self.turns.append(Turn(question))
        return self.answer(model, system)

    def answer(self, model: str, system: str) -> Answer:
        """Begin an answer to the last question, beside those that it has."""
        self.edited = None
        answer = Answer(model, tuple(self._messages(system)))
        self.turns[-1].add(answer)
        return answer

    def _messages(self, system: str) -> Iterator[Message]:
        if system.strip():
            yield {"role": "system", "content": system}
        for turn in self.turns[:-1]:
            yield {"role": "user", "content": turn.question}
            yield {"role": "assistant", "content": turn.answer.text}
        yield {"role": "user", "content": self.turns[-1].question}
