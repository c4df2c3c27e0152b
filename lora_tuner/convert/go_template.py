"""Derive the Go template of an Ollama model from a chat template in Jinja.

The chat template is rendered with marks for the messages, and the text between the marks becomes
the Go template, so that no table of known templates is needed. The result is compared with the chat
template on other conversations before it is used. Ollama passes `.System`, all system messages
joined, and `.Messages`, where messages in a row of one role are joined and a system message is
listed as well (ollama/ollama, template/template.go of August 2026: Execute, collate). The older
form with `.Prompt` and `.Response` cannot tell a first turn from a later one, so it is only used
for bases without a chat template. Limit: tools and thinking are left out, which a notice says."""

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..data.chat import Message
from ..data.chat_template import FIXED_DATE, TemplateError, apply_template
from ..errors import AdapterError, EventHandler, Notice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "{{ .Prompt }}"  # of a base without a chat template
_MARK = re.compile(r"Qz(\w\d*)zQ")  # no template changes such a text
_SYSTEM_AFTER = "it writes the system message after a user message"
_QUESTION: list[Message] = [{"role": "user", "content": "Why?"}]
_TURNS = 4  # user messages of the longest conversation that is rendered
_CONDITIONS = ("$.System", "$first", "eq (len (slice $.Messages $index)) 1")
_Case = tuple[bool, bool, bool]  # with a system message; of the first user message; of the last message


@dataclass(frozen=True)
class ChatFormat:
    """The text around each message of a conversation that ends with a user's.

    Args:
        before_user: the text before a user message: one string, or two with the system message
            between them.
        after_user: the text after a user message.
        before_answer: the text before an answer in the history.
        after_answer: the text after it.
        generation: the text at the end, after which the model answers.
        adds_bos: the tokenizer adds the beginning-of-text token, and the chat template begins with it.
            It is not in the texts, because llama.cpp adds it.
    """

    before_user: Mapping[_Case, tuple[str, ...]]
    after_user: str
    before_answer: str
    after_answer: str
    generation: str
    adds_bos: bool

    def render(self, messages: Sequence[Message]) -> str:
        """Render a conversation as the Go template does."""
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        turns = [message for message in messages if message["role"] != "system"]
        text = ""
        for number, message in enumerate(turns):
            if message["role"] == "user":
                before = self.before_user[bool(system), number == 0, number == len(turns) - 1]
                text += system.join(before) + message["content"] + self.after_user
            else:
                text += self.before_answer + message["content"] + self.after_answer
        return text + self.generation

    def go_template(self) -> str:
        """The Go template."""
        head, before_user = self._split_head()
        user = _choose({case: _go_text(text) for case, text in before_user.items()}, _CONDITIONS)
        by_index, by_first = "$index" in user, "$first" in user
        parts = [
            _choose({case: _go_text(text) for case, text in head.items()}, _CONDITIONS),
            "{{ $first := true }}" if by_first else "",
            "{{ range $index, $_ := .Messages }}" if by_index else "{{ range .Messages }}",
            '{{ if eq .Role "user" }}',
            user,
            "{{ .Content }}",
            _escape(self.after_user),
            "{{ $first = false }}" if by_first else "",
            '{{ else if eq .Role "assistant" }}',
            _escape(self.before_answer),
            "{{ .Content }}",
            _escape(self.after_answer),
            "{{ end }}{{ end }}",
            _escape(self.generation),
        ]
        return "".join(parts)

    def _split_head(self) -> tuple[dict[tuple[bool], tuple[str, ...]], Mapping[_Case, tuple[str, ...]]]:
        """Split off what is written once, before all messages, where the rest is the same for each
        user message."""
        later = {text for (_, is_first, _), text in self.before_user.items() if not is_first}
        (usual, *others) = later
        head: dict[tuple[bool], tuple[str, ...]] = {}
        for (with_system, is_first, _), text in self.before_user.items():
            if others or len(usual) > 1 or not text[-1].endswith(usual[0]):
                return {(False,): ("",)}, self.before_user
            start = (*text[:-1], text[-1].removesuffix(usual[0]))
            if is_first and head.setdefault((with_system,), start) != start:
                return {(False,): ("",)}, self.before_user
        return head, dict.fromkeys(self.before_user, usual)


def derive_chat_format(tokenizer: "PreTrainedTokenizerBase", name: str, notify: EventHandler) -> ChatFormat:
    """Derive the text around each message from the chat template of a tokenizer.

    Notices say where the chat template does more than a template of Ollama can.

    Args:
        tokenizer: a tokenizer with a chat template.
        name: the model, for messages.
        notify: receives notices.

    Raises:
        AdapterError: the chat template writes conversations in a way that a Go template for Ollama
            cannot.
    """
    try:
        found = _Gaps(tokenizer)
        chat_format = found.chat_format()
        _compare(tokenizer, chat_format, takes_system=found.takes_system)
    except (_NotExpressibleError, TemplateError) as error:
        raise AdapterError(
            f"The chat template of {name} cannot be written as a template for Ollama: {error}. "
            "Use --to gguf --merged: the GGUF file has the chat template itself, which llama.cpp "
            "and Ollama read where a Modelfile has no TEMPLATE."
        ) from error
    if not found.takes_system:
        notify(Notice(f"The chat template of {name} takes no system message: in Ollama, SYSTEM has no effect."))
    if found.strips_messages:
        notify(
            Notice(f"The chat template of {name} strips white space around messages: Ollama's template does not.")
        )
    if left_out := found.left_out:
        notify(Notice(f"The chat template of {name} has {left_out}, which the template for Ollama leaves out."))
    if date := found.written_date:
        notify(
            Notice(
                f"The chat template of {name} writes the date of today: the template for Ollama always has {date}."
            )
        )
    return chat_format


class _NotExpressibleError(Exception):
    """A chat template does what a Go template cannot."""


@dataclass
class _Gaps:
    """The texts that a chat template writes between the messages of conversations of marks."""

    tokenizer: "PreTrainedTokenizerBase"
    users: dict[_Case, tuple[str, ...]] = field(default_factory=dict)
    answers: set[str] = field(default_factory=set)
    ends: set[str] = field(default_factory=set)
    takes_system: bool = True

    def __post_init__(self) -> None:
        try:
            self.takes_system = "QzszQ" in _render(self.tokenizer, _marked(1, with_system=True))
        except TemplateError:
            self.takes_system = False
        for with_system in (False, True) if self.takes_system else (False,):
            for turns in range(1, _TURNS + 1):
                self._add_conversation(turns, with_system=with_system)

    @property
    def written_date(self) -> str | None:
        """The date that the template writes; None if it writes none."""
        if self._depends_on("date_string", "1 January 1970"):
            return f"{FIXED_DATE}, as in training"
        today = datetime.date.today()
        asks = "strftime_now" in str(self.tokenizer.chat_template)
        return f"{today}" if asks and str(today.year) in _render(self.tokenizer, _QUESTION) else None

    @property
    def strips_messages(self) -> bool:
        """The template writes a message without the white space around it."""
        return " QzszQ " not in _render(self.tokenizer, [{"role": "user", "content": " QzszQ "}])

    @property
    def left_out(self) -> str:
        """Abilities of the template that conversations of texts do not use."""
        tool = {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}
        abilities = {
            "tools": self._depends_on("tools", [{"type": "function", "function": tool}]),
            "a switch for thinking": self._depends_on("enable_thinking", False)
            or self._depends_on("enable_thinking", True),
        }
        return " and ".join(ability for ability, is_there in abilities.items() if is_there)

    def _depends_on(self, variable: str, value: object) -> bool:
        """A question is rendered differently with this value of a variable."""
        try:
            return _render(self.tokenizer, _QUESTION, **{variable: value}) != _render(self.tokenizer, _QUESTION)
        except TemplateError:
            return False

    def _add_conversation(self, turns: int, *, with_system: bool) -> None:
        messages = _marked(turns, with_system=with_system)
        texts = _MARK.split(_render(self.tokenizer, messages))
        gaps, names = texts[::2], texts[1::2]
        expected = [_MARK.sub(r"\1", message["content"]) for message in messages]
        if sorted(names) != sorted(expected):
            wrong = next(name for name in {*names, *expected} if names.count(name) != expected.count(name))
            role = {"s": "system", "u": "user", "a": "assistant"}[wrong[0]]
            if wrong not in names:
                raise _NotExpressibleError(f"it leaves out {role} messages")
            raise _NotExpressibleError(f"it writes {role} messages {names.count(wrong)} times")
        if [name for name in names if name != "s"] != [name for name in expected if name != "s"]:
            raise _NotExpressibleError("it changes the order of the messages")
        before: list[str] = []
        for gap, name in zip(gaps, names, strict=False):
            before.append(gap)
            if name == "s":
                continue
            if name[0] == "u":
                case = (with_system, name == "u0", name == f"u{turns - 1}")
                if self.users.setdefault(case, tuple(before)) != tuple(before):
                    raise _NotExpressibleError("what it writes before a user message depends on earlier turns")
            elif len(before) > 1:
                raise _NotExpressibleError(_SYSTEM_AFTER)
            else:
                self.answers.add(gap)
            before = []
        if before:
            raise _NotExpressibleError(_SYSTEM_AFTER)
        self.ends.add(gaps[-1])

    def chat_format(self) -> ChatFormat:
        if not self.takes_system:  # a system message changes nothing then
            self.users |= {(True, *case[1:]): text for case, text in self.users.items()}
        if len(self.answers) > 1 or len(self.ends) > 1:
            raise _NotExpressibleError("what it writes before an answer depends on earlier turns")
        (answer,), (end,) = self.answers, self.ends
        later = [text[0] for (_, is_first, _), text in self.users.items() if not is_first]
        after_user = self._closing(_marked(1, with_system=False), [answer, end])
        after_answer = self._closing(_marked(2, with_system=False)[:2], later)
        bos = str(self.tokenizer.bos_token)
        first = [text[0] for (_, is_first, _), text in self.users.items() if is_first]
        by_tokenizer = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        adds_bos = by_tokenizer and all(text.startswith(bos) for text in first)
        before_user = {}
        for case, text in self.users.items():
            start = bos if case[1] and adds_bos else ""
            before_user[case] = (text[0].removeprefix(start if case[1] else after_answer), *text[1:])
        return ChatFormat(
            before_user,
            after_user,
            answer.removeprefix(after_user),
            after_answer,
            end.removeprefix(after_user),
            adds_bos,
        )

    def _closing(self, messages: Sequence[Message], following: Sequence[str]) -> str:
        """The text that ends the last message, where all that may follow it begins with it."""
        try:
            closing = _MARK.split(_render(self.tokenizer, messages, add_generation_prompt=False))[-1]
        except TemplateError:
            return ""
        return closing if all(text.startswith(closing) for text in following) else ""


def _marked(turns: int, *, with_system: bool) -> list[Message]:
    """A conversation whose messages are marks, up to the last question."""
    messages: list[Message] = [{"role": "system", "content": "QzszQ"}] if with_system else []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"Qzu{turn}zQ"},
            {"role": "assistant", "content": f"Qza{turn}zQ"},
        ]
    return messages[:-1]


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], **variables: object) -> str:
    """Render a conversation up to an answer, with a fixed date where the template has a variable for
    it; `variables` change this."""
    usual: dict[str, object] = {"add_generation_prompt": True, "date_string": FIXED_DATE}
    return apply_template(tokenizer, messages, **usual | variables)


def _compare(tokenizer: "PreTrainedTokenizerBase", chat_format: ChatFormat, *, takes_system: bool) -> None:
    """Raise _NotExpressibleError if the two templates differ on conversations of ordinary texts."""
    for messages in example_conversations(takes_system=takes_system):
        bos = str(tokenizer.bos_token) if chat_format.adds_bos else ""
        if _render(tokenizer, messages) != bos + chat_format.render(messages):
            raise _NotExpressibleError("it changes messages, or treats some texts differently")


def example_conversations(*, takes_system: bool) -> list[list[Message]]:
    """Conversations of one to five questions, with and without a system message."""
    questions = ["Name a film.", 'Is "it" {good}?\n\nYes or no.', "Why?", "什么 😀 <b>?", "{{ .Prompt }} % 5"]
    answers = ["1. Alien\n2. Brazil", "Yes.", "Its \\n `code`: {}.", "Ja, für 3 €."]
    conversations = []
    for system in ["", "Answer briefly.\nBe kind."] if takes_system else [""]:
        for count in range(1, len(questions) + 1):
            messages: list[Message] = [{"role": "system", "content": system}] if system else []
            for number in range(count):
                messages.append({"role": "user", "content": questions[number]})
                if number < count - 1:
                    messages.append({"role": "assistant", "content": answers[number]})
            conversations.append(messages)
    return conversations


def _choose(cases: Mapping[tuple[bool, ...], str], conditions: Sequence[str]) -> str:
    """A Go template that writes the text of the case that applies, with as few conditions as it
    takes."""
    if len(set(cases.values())) == 1:
        return next(iter(cases.values()))
    yes, no = (
        _choose({case[1:]: text for case, text in cases.items() if case[0] is applies}, conditions[1:])
        for applies in (True, False)
    )
    if yes == no:
        return yes
    otherwise = f"{{{{ else }}}}{no}" if no else ""
    return f"{{{{ if {conditions[0]} }}}}{yes}{otherwise}{{{{ end }}}}"


def _go_text(texts: tuple[str, ...]) -> str:
    return "{{ $.System }}".join(_escape(text) for text in texts)


def _escape(text: str) -> str:
    """A text as a part of a Go template within a Modelfile, which drops characters that are not
    printable and ends at three quotation marks (ollama/ollama, parser/parser.go: ParseFile,
    unquote)."""
    escaped = re.sub(r'\{(?=\{|$)|"""|[^\n\t\r -~]', lambda match: _constant(match.group()), text)
    return escaped


def _constant(text: str) -> str:
    if text.isprintable() and text not in ("{", '"""'):
        return text
    codes = "".join(f"\\U{ord(character):08x}" for character in text)
    return f'{{{{ "{codes}" }}}}'
