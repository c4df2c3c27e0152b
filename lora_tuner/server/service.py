"""The served models: find an adapter, tokenize prompts, submit sequences, follow their output.

Work that takes time has a thread for its kind (`Work`), so that neither the model nor the
connections wait, and dear work delays no cheap work. An adapter is read again only when its files
have changed. A model name is looked up in a listing and never made into a path. All adapters share
one base; those trained on another are listed with the reason why they cannot be used.
"""

import asyncio
import copy
import os
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, get_args
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..adapters.adapter import Adapter
from ..adapters.library import FolderIdentity, folder_identity, read_consistently
from ..config import AUTO_MODEL, RESERVED_NAME, SamplingParams, ServerConfig
from ..data.call_format import CallFormat, learn_call_format
from ..data.chat import iter_texts
from ..errors import (
    AdapterError,
    ContextLengthError,
    DataError,
    RequestError,
    UnknownModelError,
    ignore_events,
)
from ..inference import sequence
from ..inference.constraints import Constraint, Grammar, GrammarCompiler
from ..inference.generator import Generator
from ..inference.multi_lora import LoadedAdapter
from ..inference.sampling import choose_seed, sequence_seed
from ..models import lora
from ..models.layers import layer_sizes
from ..models.memory import free_memory
from ..text import as_typed, display_name
from .prompts import Prompt, PromptEncoder, prompt_size
from .scheduler import Request, Scheduler
from .tools import ToolUse

T = TypeVar("T")
_FOLDER_PATHS = re.compile(
    r"""(?<![\w./~-])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?=[^\s/\\])(?:[^\s/\\:;,'"()]+[/\\])*"""
)


# One thread for each. "encode" has prompts of at most `SHORT_PROMPT` characters or tokens; "find"
# looks adapters up that are in memory, "load" reads them from disk; "compile" compiles grammars;
# "library" shows and renames the folders of adapters, "library-long" reads all of their bytes.
Work = Literal[
    "list",
    "find",
    "load",
    "encode",
    "encode-long",
    "choose",
    "classify",
    "compile",
    "format",
    "metrics",
    "blend",
    "draw",
    "measure",
    "feedback",
    "train",
    "library",
    "library-long",
    "push",
    "save",
]
SHORT_PROMPT = 16_384
SETTLED_SECONDS = 2.0  # file systems may give two changes within a tick of their clock one time


@dataclass(frozen=True, eq=False)
class ServedModel:
    """The base, or an adapter; `broken` is the reason why it cannot be used."""

    id: str
    path: Path | None = None  # of an adapter
    adapter: Adapter | None = None
    broken: str | None = None


@dataclass(frozen=True)
class PreparedRequest:
    """An adapter's weights and the token ids of the prompts, ready to be queued."""

    model: str
    adapter: str | None  # None: the base
    lora: LoadedAdapter | None
    prompts: list[list[int]]
    constraint: Constraint | None = None  # at its beginning; each sequence gets a copy
    call_format: CallFormat | None = None  # with tools that the outputs may call


class ModelService:
    """The base and its adapters behind one scheduler.

    Args:
        generator: holds the base and the resident adapters.
        settings: limits of the server.
        only: folders of the adapters to serve; empty means all of the library.
    """

    def __init__(self, generator: Generator, settings: ServerConfig, only: Iterable[Path] = ()) -> None:
        self.generator = generator
        self.config = settings
        self.base = generator.base
        self.name = display_name(self.base.files.name)  # it may be a path
        self.only = {path.name: path for path in only}
        self.created = int(time.time())
        cache_tokens = free_memory(self.base.device) // generator.engine.kv_bytes_per_token
        self.scheduler = Scheduler(
            generator.engine,
            max_batch=settings.max_batch,
            max_waiting=settings.max_waiting,
            # A quarter: a growing cache of transformers is copied, and prefill has a cache of its own.
            max_cache_tokens=cache_tokens // 4,
        )
        self.prompts = PromptEncoder(generator, self.name)
        self._grammars = GrammarCompiler(self.base)
        generator.engine.keep_prefixes(cache_tokens // 16)
        self._layer_sizes = layer_sizes(generator.engine.multi_lora.layers)
        self._base_model = ServedModel(self.name)
        self._models: dict[Path, tuple[FolderIdentity, ServedModel]] = {}  # as they were last read
        self._tokenizers: dict[Work, WeakKeyDictionary[object, PreTrainedTokenizerBase]] = {
            "encode": WeakKeyDictionary(),
            "encode-long": WeakKeyDictionary(),
        }
        for copies in self._tokenizers.values():
            copies[generator] = copy.deepcopy(self.base.tokenizer)
        self._threads: dict[Work, ThreadPoolExecutor] = {
            work: ThreadPoolExecutor(1, thread_name_prefix=f"lora_tuner-{work}") for work in get_args(Work)
        }

    def start(self) -> None:
        self.scheduler.start()

    def stop(self) -> None:
        self.scheduler.stop()
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)

    async def run_in_thread(self, work: Work, function: Callable[[], T]) -> T:
        """Call a blocking function in the thread for its kind of work, after those that wait there.

        One that still waits is dropped when the caller is cancelled.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads[work], function)

    def list_models(self) -> tuple[ServedModel, ...]:
        """Return the base, then the adapters of the library by name.

        A model is the same object as long as its files have not changed.
        """
        paths = self._paths()
        models = [self._read_model(name, path) for name, path in sorted(paths.items())]
        for removed in self._models.keys() - set(paths.values()):
            self._models.pop(removed, None)
        return self._base_model, *models

    def get_model(self, id: str) -> ServedModel:
        """Return one model. Raises UnknownModelError."""
        return self._base_model if id == self.name else self._read_model(id, self._path(id))

    def _path(self, name: str) -> Path:
        path = self._paths().get(name)
        if path is None:
            raise UnknownModelError(f"There is no model '{name}': GET /v1/models lists the models.")
        return path

    def _paths(self) -> dict[str, Path]:
        return self.only or {name: self.generator.library.path / name for name in self.generator.library.names()}

    def _read_model(self, name: str, path: Path) -> ServedModel:
        """Return an adapter, read again only if its files have changed."""
        identity = folder_identity(path)
        known_identity, model = self._models.get(path, (None, None))
        if model is None or identity != known_identity:
            model = self._check_model(name, path)
            changed = max((file[-1] for file in identity if file is not None), default=0)
            if time.time_ns() - changed > SETTLED_SECONDS * 1e9:
                self._models[path] = identity, model
        return model

    def _check_model(self, name: str, path: Path) -> ServedModel:
        if name == self.name:
            return ServedModel(name, path, broken="The base model has the same name: rename this adapter.")
        if name == AUTO_MODEL:
            return ServedModel(name, path, broken=f"auto: {RESERVED_NAME}")
        try:
            adapter = read_consistently(path, lambda adapter: adapter)
            lora.check_base(adapter, self.base, replace(self.generator.options, notify=ignore_events))
            adapter.check_shapes(self._layer_sizes)
        except AdapterError as error:
            return ServedModel(name, path, broken=str(error))
        return ServedModel(name, path, adapter)

    async def find_adapter(self, model: str) -> tuple[str | None, LoadedAdapter | None]:
        """Return the name and weights of an adapter, loaded where needed; (None, None) for the base.

        Raises UnknownModelError, or AdapterError with the reason for one that is broken.
        """
        if model == self.name:
            return None, None
        # Resident under a name that came from the listing.
        resident = await self.run_in_thread("find", partial(self.generator.get_loaded, model))
        if resident is not None:
            return model, resident
        path = await self.run_in_thread("list", partial(self._path, model))
        return await self.run_in_thread("load", partial(self.generator.get_or_load, path))

    async def encode_all(
        self, prompts: Sequence[Prompt], lora: LoadedAdapter | None = None, tools: ToolUse | None = None
    ) -> list[list[int]]:
        """Return the token ids of prompts; those of a conversation end where the answer begins.

        An adapter with a tokenizer of its own has its chat template applied. Raises what
        `PromptEncoder.encode` raises.
        """
        size = sum(map(prompt_size, prompts)) + sum(map(len, iter_texts(tools.for_template() if tools else [])))

        def encode_prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
            vocab_size = lora.vocab_size if lora else 0
            return [self.prompts.encode(prompt, tokenizer, vocab_size, tools) for prompt in prompts]

        return await self.run_with_tokenizer(size, lora, encode_prompts)

    async def run_with_tokenizer(
        self, size: int, lora: LoadedAdapter | None, function: Callable[[PreTrainedTokenizerBase], T]
    ) -> T:
        """Call a function with an adapter's tokenizer, in the thread for so many characters or tokens."""
        work: Work = "encode" if size <= SHORT_PROMPT else "encode-long"
        return await self.run_in_thread(work, lambda: function(self._tokenizer_copy(work, lora)))

    def _tokenizer_copy(self, work: Work, lora: LoadedAdapter | None) -> PreTrainedTokenizerBase:
        """Return the tokenizer for a thread alone, as tokenizers are not thread-safe."""
        copies = self._tokenizers[work]
        if lora is None or lora.tokenizer is None:
            return copies[self.generator]
        if lora not in copies:
            copies[lora] = copy.deepcopy(lora.tokenizer)
        return copies[lora]

    def hide_paths(self, text: str) -> str:
        """Remove the folders of this machine from a message, whose commands begin as typed."""
        text = as_typed(text)
        for folder in (self.generator.library.path, *(path.parent for path in self.only.values())):
            text = text.replace(f"{folder}{os.sep}", "")
        return _FOLDER_PATHS.sub("", text.replace(self.base.files.name, self.name))

    async def prepare_request(
        self,
        model: str,
        prompts: Sequence[Prompt],
        n: int = 1,
        grammar: Grammar | None = None,
        tools: ToolUse | None = None,
    ) -> PreparedRequest:
        """Find the adapter, tokenize the prompts and compile the grammar of the outputs; meanwhile
        `n` queue slots for each prompt are reserved.

        Raises what `find_adapter`, `PromptEncoder.encode`, `GrammarCompiler.compile` and `Scheduler.reserve` raise.
        """
        with self.scheduler.reserve(n * len(prompts)):
            adapter, lora = await self.find_adapter(model)
            call_format = constraint = None
            if tools is not None and tools.choice != "none":
                learn = partial(self._learn_calls, tools, lora, grammar)
                call_format, grammar = await self.run_in_thread("encode", learn)
            token_ids = await self.encode_all(prompts, lora, tools)
            if grammar is not None:
                tokenizer = (lora and lora.tokenizer) or self.base.tokenizer
                compile_grammar = partial(self._grammars.compile, grammar, tokenizer)
                constraint = await self.run_in_thread("compile", compile_grammar)
            return PreparedRequest(model, adapter, lora, token_ids, constraint, call_format)

    def _learn_calls(
        self, tools: ToolUse, lora: LoadedAdapter | None, answer: Grammar | None
    ) -> tuple[CallFormat, Grammar]:
        """Return how the chat template writes calls, and the grammar of an answer with them."""
        tokenizer = self._tokenizer_copy("encode", lora)
        try:
            call_format = learn_call_format(tokenizer)
        except DataError as error:
            raise RequestError(f"tools: {str(error).replace('this base', self.name)}", "tools") from error
        return call_format, tools.grammar(call_format, tokenizer, answer)

    def max_new_tokens(self, prompts: list[list[int]], max_tokens: int | None) -> int:
        """Check and return `max_tokens`; the default is what fits after the longest prompt.

        Raises RequestError and ContextLengthError.
        """
        limit, context = self.config.max_tokens, self.base.max_context
        longest = max(map(len, prompts))
        if max_tokens is None:
            return min(context - longest, limit)
        if max_tokens > limit:
            raise RequestError(
                f"max_tokens is {max_tokens:,}: the limit of this server is {limit:,}.",
                "max_tokens",
            )
        if longest + max_tokens > context:
            raise ContextLengthError(
                f"The prompt has {longest:,} tokens and max_tokens is {max_tokens:,}, but the "
                f"context length of {self.name} is {context:,} tokens."
            )
        return max_tokens

    def submit(
        self,
        prepared: PreparedRequest,
        sampling: SamplingParams,
        *,
        started: float,
        n: int = 1,
        top_logprobs: int | None = None,
        score_prompt: bool = False,
        prompt_only: bool = False,
        ranked: bool = False,
    ) -> Request:
        """Queue `n` sequences for each prompt, in the order of the prompts.

        `started` is when the request arrived, for its timeout; what follows `n` are fields of the
        sequences. Raises what `Scheduler.submit` raises.
        """
        seed = choose_seed(sampling)
        sequences = [
            sequence.Sequence(
                self.base,
                ids,
                sampling,
                sequence_seed(seed, number),
                prepared.adapter,
                prepared.lora,
                top_logprobs=top_logprobs,
                constraint=prepared.constraint and prepared.constraint.copy(),
                score_prompt=score_prompt,
                prompt_only=prompt_only,
                ranked=ranked,
            )
            for ids in prepared.prompts
            for number in range(n)
        ]
        request = Request(prepared.model, sequences, self.config.timeout, started=started)
        self.scheduler.submit(request)
        return request

    async def watch(self, *requests: Request) -> AsyncGenerator[None, None]:
        """Yield at each new output of a request, for the last time when all are complete.

        Closing the generator cancels them.
        """
        new_output, loop = asyncio.Event(), asyncio.get_running_loop()
        for request in requests:
            request.wake = partial(loop.call_soon_threadsafe, new_output.set)
        try:
            while True:
                new_output.clear()
                complete = all(request.complete for request in requests)
                yield
                if complete:
                    return
                await new_output.wait()
        finally:
            for request in requests:
                request.wake = lambda: None  # the loop may be closed by the time it is called
                self.scheduler.cancel(request)
