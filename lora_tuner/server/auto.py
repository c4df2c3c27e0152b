"""Model "auto": the server chooses the adapter for a prompt, and remembers it for the conversation."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from ..adapters.manifest import why_never_chosen
from ..config import AUTO_MODEL, NO_ADAPTER_TO_CHOOSE
from ..data.chat import Message
from ..errors import LoraTunerError, RequestError
from ..inference.multi_lora import LoadedAdapter
from ..inference.routing import Candidate, Choice, choose, score_prompt
from .metrics import Metrics
from .prompts import Prompt
from .service import ModelService

MAX_CONVERSATIONS = 10_000  # whose model is remembered


class AutoModel:
    """Chooses among the adapters of a server."""

    def __init__(self, service: ModelService, metrics: Metrics) -> None:
        self.service = service
        self.metrics = metrics
        self._conversations: OrderedDict[str, str] = OrderedDict()  # opening -> model; the last used is the last

    def is_asked(self, model: str) -> bool:
        """Return True for the name that leaves the choice to the server."""
        return model == AUTO_MODEL != self.service.name

    def names(self) -> list[str]:
        """Return the adapters to choose from: at most as many as stay in memory, and those first that are there."""
        adapters = [model.adapter for model in self.service.list_models() if model.adapter is not None]
        names = [adapter.name for adapter in adapters if why_never_chosen(adapter.manifest) is None]
        loaded = self.service.generator.loaded_adapters
        return sorted(names, key=lambda name: name not in loaded)[: self.service.config.max_resident]

    async def choose(self, prompt: Prompt, ask: Callable[[LoadedAdapter], Prompt] | None = None) -> Choice:
        """Choose the adapter that fits a prompt, or the base. A conversation keeps its adapter.

        Args:
            prompt: the prompt.
            ask: returns the form in which an adapter is asked it; by default all are asked alike.

        Raises:
            RequestError: there is no adapter to choose.
            GenerationError: no adapter can be asked this prompt.
            QueueFullError: too many sequences wait.
        """
        with self.service.scheduler.reserve(1):
            choice = await self._choose(prompt, ask)
        self.metrics.chosen.labels(self.model_of(choice)).inc()
        return choice

    def model_of(self, choice: Choice) -> str:
        """Return the name of the model that was chosen."""
        return choice.adapter or self.service.name

    async def _choose(self, prompt: Prompt, ask: Callable[[LoadedAdapter], Prompt] | None) -> Choice:
        service, opening = self.service, _opening(prompt) if isinstance(prompt, tuple) else None
        names = await service.run_in_thread("list", self.names)
        if isinstance(prompt, tuple) and any(message["role"] == "assistant" for message in prompt):
            kept = self._conversations.get(opening or "")
            if kept in names or kept == service.name:
                self._conversations.move_to_end(str(opening))
                return Choice(None if kept == service.name else kept, kept=True)
        candidates: list[Candidate] = []
        problem: LoraTunerError = RequestError(f"model {AUTO_MODEL}: {NO_ADAPTER_TO_CHOOSE}", "model")
        for name in names:
            try:
                _, lora = await service.find_adapter(name)
                if lora is not None and lora.routing is not None and lora.routing.general is not None:
                    (token_ids,) = await service.encode_all([ask(lora) if ask else prompt], lora)
                    candidates.append(Candidate(name, lora, token_ids))
            except LoraTunerError as error:  # such as one without a chat template
                problem = error
        if not candidates:
            raise problem
        score = partial(score_prompt, service.generator.engine, candidates)
        choice = choose(
            await service.run_in_thread("choose", partial(service.scheduler.run_between_steps, score))
        )
        if opening is not None:
            self._conversations[opening] = self.model_of(choice)
            if len(self._conversations) > MAX_CONVERSATIONS:
                self._conversations.popitem(last=False)
        return choice


def _opening(messages: tuple[Message, ...]) -> str:
    """Return a hash of a conversation up to its first question."""
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), len(messages))
    return hashlib.sha256(json.dumps(messages[: first + 1], sort_keys=True).encode()).hexdigest()
