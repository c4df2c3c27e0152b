"""Requests of the page: how a prompt is asked, queued, followed and counted."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...config import AUTO_MODEL, SamplingParams
from ...data.row_template import Template, fill_question, fill_questions, question_form
from ...errors import LoraTunerError
from ...inference.multi_lora import LoadedAdapter
from ...text import format_names
from ..auto import AutoModel
from ..metrics import Metrics, RequestRecord
from ..prompts import Prompt
from ..scheduler import Request
from ..service import ModelService, PreparedRequest

FRAME_SECONDS = 0.03  # between two updates of the page
ModelOutput = Request | str  # a request, or why there is none
Submit = Callable[[], Awaitable[Request]]


@dataclass(frozen=True)
class Question:
    """A prompt in the form that a model has learned. `text` is shown before the output, as what is
    continued or, with `is_chat`, as a question."""

    text: str
    is_chat: bool = False

    @property
    def prompt(self) -> Prompt:
        return as_conversation(self.text) if self.is_chat else self.text


@dataclass(frozen=True)
class PageRequests:
    """The requests of one page."""

    service: ModelService
    metrics: Metrics

    def is_chat(self, lora: LoadedAdapter | None) -> bool:
        """Return True for an adapter that learned conversations and has a chat template."""
        tokenizer = (lora and lora.tokenizer) or self.service.base.tokenizer
        return lora is not None and lora.is_chat and bool(tokenizer.chat_template)

    async def chats(self, names: Sequence[str]) -> set[str]:
        """Return which of the adapters, and the base, are asked through a chat template by default:
        the base if all of the adapters are, as in `compare`; none that cannot be used.
        """
        chats = set()
        for name in names:
            try:
                if self.is_chat((await self.service.find_adapter(name))[1]):
                    chats.add(name)
            except LoraTunerError:
                continue  # `submit` gives the reason
        if chats and chats.issuperset(names) and self.service.base.tokenizer.chat_template:
            chats.add(self.service.name)
        return chats

    async def ask(self, prompt: str, names: Sequence[str]) -> tuple[dict[str, Question], str]:
        """Return the prompt as the base and each of the adapters is asked it, and a sentence on that.

        An adapter that learned conversations is asked through its chat template; one that learned
        texts of a template has the prompt filled into it. The base is asked like the adapters if
        these are asked alike.
        """
        chats = await self.chats(names)
        models = await self.service.run_in_thread("list", self.service.list_models)
        manifests = {model.id: model.adapter.manifest for model in models if model.adapter}
        templates: dict[str, Template | None] = {}
        for name in names:
            manifest = manifests.get(name)
            templates[name] = manifest.template if manifest and name not in chats else None
        texts = fill_questions(prompt, templates)
        questions = {self.service.name: Question(texts[None], self.service.name in chats)}
        questions |= {name: Question(texts[name], name in chats) for name in names}
        filled, unfilled = [name for name in names if texts[name] != prompt], ""
        for name, template in templates.items():
            if template and fill_question(*template, prompt) is None:
                form = question_form(*template).replace("\n", r"\n")
                unfilled += f" {name} has learned texts of the form “{form}”: write the prompt so."
        asked = format_names([name for name in questions if name in chats])
        note = f" Asked through the chat template: {asked}." if chats else ""
        note += f" Filled into the template that was learned: {format_names(filled)}." if filled else ""
        return questions, note + unfilled

    @cached_property
    def auto(self) -> AutoModel:
        return AutoModel(self.service, self.metrics)

    def auto_choice(self) -> list[str]:
        """Return auto as a choice beside adapters, if there is one that it may choose."""
        return [AUTO_MODEL] if self.auto.is_asked(AUTO_MODEL) and self.auto.names() else []

    async def choose(self, prompt: Prompt, *, bare: bool = True) -> tuple[str, str]:
        """Choose the model that fits a prompt, and return its name and a sentence on that.

        A text is read as each adapter has learned texts, unless `bare`. Raises what `AutoModel.choose` raises.
        """

        def ask(lora: LoadedAdapter) -> Prompt:
            if isinstance(prompt, str) and self.is_chat(lora):
                return as_conversation(prompt)
            filled = fill_question(*lora.template, prompt) if isinstance(prompt, str) and lora.template else None
            return prompt if filled is None else filled

        choice = await self.auto.choose(prompt, None if bare else ask)
        return self.auto.model_of(choice), choice.describe()

    async def submit(
        self, model: str, prompt: Prompt, sampling: SamplingParams, top_logprobs: int | None = None
    ) -> Request:
        started = time.monotonic()
        prepared = await self.service.prepare_request(model, [prompt])
        return self.service.submit(prepared, sampling, started=started, top_logprobs=top_logprobs)

    async def submit_prepared(self, prepared: PreparedRequest, sampling: SamplingParams) -> Request:
        return self.service.submit(prepared, sampling, started=time.monotonic())

    async def follow(
        self, prompt: str, submits: Sequence[tuple[str | None, Submit]]
    ) -> AsyncGenerator[list[ModelOutput], None]:
        """Submit requests, and yield all of them whenever one has new output.

        Each is counted for the model named beside it. Closing the generator cancels them.
        """
        outputs: list[ModelOutput] = []
        open_requests: dict[Request, str | None] = {}
        try:
            for model, submit in submits:
                try:
                    request = await submit()
                    outputs.append(request)
                    open_requests[request] = model
                except LoraTunerError as error:
                    outputs.append(self.service.hide_paths(str(error)))
            async for _ in self.service.watch(*open_requests):
                for request in [request for request in open_requests if request.complete]:
                    self._record(prompt, request, open_requests.pop(request))
                yield outputs
                await asyncio.sleep(FRAME_SECONDS)
        finally:
            for request, model in open_requests.items():
                self.service.scheduler.cancel(request)
                self._record(prompt, request, model)

    def _record(self, prompt: str, request: Request, model: str | None) -> None:
        code = type(request.error).__name__ if request.error else None
        self.metrics.record(
            "page",
            RequestRecord(
                started=request.started,
                status=200,
                code=code,
                model=model,
                stream=True,
                request=request,
                prompts=prompt,
            ),
            "page",
        )


def as_conversation(prompt: str) -> Prompt:
    """Return the messages that ask a prompt."""
    return ({"role": "user", "content": prompt},)
