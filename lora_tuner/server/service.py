"""From a model's name and a prompt to a job for the worker, and back to text as it comes.

Reading adapters and tokenising happen in a thread of their own, so that neither the model nor other connections wait.
Surprise: a model's name is looked up in a listing, never made into a path, so that no request reaches the disk. Limit: one
base; adapters of the library that were trained on another are listed with the reason why they do not answer.
"""

import asyncio
import copy
import os
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..adapters.adapter import Adapter
from ..adapters.library import read_consistently
from ..config import SamplingParams, ServerConfig
from ..data.chat import render_prompt
from ..errors import AdapterError, DataError, GenerationError, RequestError, UnknownModelError, ignore_events
from ..inference.generator import Generator, choose_seed, sequence_seed
from ..inference.multi_lora import LoadedAdapter
from ..inference.sequence import Sequence
from ..models import lora
from ..models.memory import free_memory
from ..text import display_name
from .scheduler import Request, Scheduler

T = TypeVar("T")
_FOLDER_PATHS = re.compile(r"""(?<![\w./~-])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?=[^\s/\\])(?:[^\s/\\:;,'"()]+[/\\])*""")


@dataclass(frozen=True)
class ServedModel:
    """What a client may name: the base, or an adapter; `broken` says why it does not answer."""

    id: str
    path: Path | None = None  # of an adapter
    adapter: Adapter | None = None
    broken: str | None = None


class ModelService:
    """The one place that knows which models there are, and hands work to the worker.

    `only` are the adapters that are served, by path; with none all of the library are, as they come and go.
    """

    def __init__(self, generator: Generator, settings: ServerConfig, only: Iterable[Path] = ()) -> None:
        self.generator = generator
        self.config = settings
        self.base = generator.base
        self.name = display_name(self.base.files.name)  # it may be a path
        self.only = {path.name: path for path in only}
        self.began = int(time.time())
        # A quarter: a cache that grows is there twice for a moment, with room to spare, and what is read has its own.
        room = free_memory(self.base.device) // 4 // generator.engine.kv_bytes_per_token
        self.scheduler = Scheduler(
            generator.engine, max_batch=settings.max_batch, max_waiting=settings.max_waiting, room=room
        )
        self._sizes = lora.layer_sizes(generator.engine.multi_lora.layers)
        self._tokenizer = copy.deepcopy(self.base.tokenizer)  # one is not for two threads
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lora_tuner-desk")

    async def run_in_thread(self, work: Callable[[], T]) -> T:
        """Done in the desk's own thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def list_models(self) -> list[ServedModel]:
        """The base first, then adapters by name. Reads the library as it is now."""
        return [ServedModel(self.name), *(self._model(name, path) for name, path in sorted(self._places().items()))]

    def get_model(self, id: str) -> ServedModel:
        """One of them, read alone. Raises UnknownModelError."""
        return ServedModel(self.name) if id == self.name else self._model(id, self._place(id))

    def _place(self, name: str) -> Path:
        path = self._places().get(name)
        if path is None:
            raise UnknownModelError(f"There is no model '{name}': GET /v1/models lists what there is.")
        return path

    def _places(self) -> dict[str, Path]:
        library = self.generator.library
        return self.only or {name: library.path / name for name in library.names()}

    def _model(self, name: str, path: Path) -> ServedModel:
        if name == self.name:
            return ServedModel(name, path, broken="It has the name of the base: rename it.")
        try:
            adapter = read_consistently(path, lambda adapter: adapter)
            lora.check_base(adapter, self.base, replace(self.generator.options, notify=ignore_events))
            adapter.check_shapes(self._sizes)
        except AdapterError as error:
            return ServedModel(name, path, broken=str(error))
        return ServedModel(name, path, adapter)

    def find_adapter(self, model: str) -> tuple[str | None, LoadedAdapter | None]:
        """The adapter of that name in memory; None and None for the base. Raises UnknownModelError, or AdapterError with the
        reason for one that is broken."""
        if model == self.name:
            return None, None
        known = self.generator.get_loaded(model)  # it came from the listing, so no request names another
        return (model, known) if known is not None else self.generator.get_or_load(self._place(model))

    def encode_prompt(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a prompt. Raises GenerationError when there is no room behind them, or they are no tokens."""
        if isinstance(prompt, str):
            return self.generator.encode_prompt(prompt, self._tokenizer).token_ids
        vocabulary = self.base.vocab_size
        if not prompt or not all(0 <= token < vocabulary for token in prompt):
            raise GenerationError(f"A prompt of tokens has at least one, each from 0 to {vocabulary - 1:,}.")
        return self.generator.check_fits_context(list(prompt))

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the answer begins. Raises GenerationError where there is no template, and
        for special tokens in messages: those of the template mean something, and theirs would be taken for these."""
        if not self._tokenizer.chat_template:
            raise GenerationError(f"{self.name} has no chat template: ask for a completion instead.")
        self.generator.check_prompt_length("".join(message["content"] for message in messages))
        try:
            whole = render_prompt(self._tokenizer, messages, ask=True)
        except DataError as error:
            raise RequestError(str(error).replace("this base", self.name), "messages") from error
        ids = self._tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        return self.encode_prompt(ids)

    def hide_paths(self, text: str) -> str:
        """The same without where things lie on this machine."""
        for folder in (self.generator.library.path, *(path.parent for path in self.only.values())):
            text = text.replace(f"{folder}{os.sep}", "")
        return _FOLDER_PATHS.sub("", text.replace(self.base.files.name, self.name))

    async def generate(
        self, model: str, prompts: list[list[int]], sampling: SamplingParams, *, loaded: LoadedAdapter | None = None
    ) -> Request:
        """A job with an answer to each prompt; with `loaded`, by an adapter that has no folder. Raises what `find` and
        `Worker.submit` raise."""
        begun = time.monotonic()
        found: tuple[str | None, LoadedAdapter | None] = model, loaded
        if loaded is None:
            with self.scheduler.reserve(len(prompts)):
                found = await self.run_in_thread(lambda: self.find_adapter(model))
        return self.submit(model, found, prompts, sampling, begun=begun)

    def submit(
        self,
        model: str,
        found: tuple[str | None, LoadedAdapter | None],
        prompts: list[list[int]],
        sampling: SamplingParams,
        *,
        begun: float,
        answers: int = 1,
        likeliest: int | None = None,
    ) -> Request:
        """A job with so many answers to each prompt, in this order, by what `find` has found. It has been under way since
        `begun`. Raises what `Worker.submit` raises."""
        name, loaded = found
        seed = choose_seed(sampling)
        rows = [
            Sequence(self.base, prompt, sampling, sequence_seed(seed, number), name, loaded, top_logprobs=likeliest)
            for prompt in prompts
            for number in range(answers)
        ]
        job = Request(model, rows, self.config.timeout, started=begun)
        self.scheduler.submit(job)
        return job

    async def watch(self, *jobs: Request) -> AsyncGenerator[None, None]:
        """Comes back whenever there is more of any of them, the last time when all are complete. Who leaves, cancels them."""
        news, loop = asyncio.Event(), asyncio.get_running_loop()
        for job in jobs:
            job.wake = partial(loop.call_soon_threadsafe, news.set)
        try:
            while True:
                news.clear()
                complete = all(job.complete for job in jobs)
                yield
                if complete:
                    return
                await news.wait()
        finally:
            for job in jobs:
                job.wake = lambda: None  # the loop may be gone when the worker comes to it
                self.scheduler.cancel(job)

    def start(self) -> None:
        self.scheduler.start()

    def stop(self) -> None:
        self.scheduler.stop()
        self._thread.shutdown(wait=False, cancel_futures=True)
