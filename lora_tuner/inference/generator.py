"""Generate text with one base in memory and many adapters beside it.

`Generator` loads the base once; switching adapters moves no weights. The output of a request does
not depend on what else is in its batch. Calls from several threads take turns, because transformers
models are not thread-safe. A call returns when its last sequence ends; the server uses
GenerationEngine directly.
"""

import os
import threading
import time
from collections import abc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..adapters import summaries
from ..adapters.adapter import Adapter
from ..adapters.library import FolderIdentity, Library, folder_identity, read_consistently
from ..config import ModelOptions, SamplingParams
from ..data import chat, chat_template, tokenization
from ..data.row_template import Template
from ..data.tool_calls import Tools
from ..errors import ContextLengthError, GenerationError
from ..models import loading, lora
from ..models.tokenizer import load_adapter_tokenizer
from ..text import format_names
from .batch import GenerationEngine
from .multi_lora import LoadedAdapter
from .sampling import choose_seed, sequence_seed
from .sequence import FinishReason, Sequence


@dataclass(frozen=True)
class EncodedPrompt:
    """A tokenized prompt. `text` is what outputs show as the prompt: of a conversation the last
    message. `chat`: it is a conversation, rendered through the chat template."""

    text: str
    token_ids: list[int]
    chat: bool = False


Prompt = str | abc.Sequence[chat.Message] | EncodedPrompt  # text, or a conversation


@dataclass(frozen=True)
class GenerationOutput:
    """Continuation of a prompt. Generating with `seed` repeats it; None for greedy decoding."""

    prompt: str  #: of a conversation the last message
    text: str  #: the continuation alone
    adapter: str | None  #: its name; None for the base
    tokens: int  #: number of generated tokens
    finish_reason: FinishReason  #: stop: an end-of-text token or a stop string; length: cut off
    seed: int | None
    chat: bool  #: through the chat template

    @property
    def finished(self) -> bool:
        """True if an end-of-text token or a stop string ended it; otherwise it is cut off."""
        return self.finish_reason == "stop"

    def to_dict(self) -> dict[str, object]:
        """The output as `--json` prints it."""
        return asdict(self) | {"finished": self.finished}

    def _repr_html_(self) -> str:
        return summaries.to_html(
            [summaries.Table([(self.adapter or summaries.BASE_LABEL, self.prompt, self.text)])]
        )


@dataclass
class _ResidentAdapter:
    """Adapter in memory, the identity of its files when they were read, and when it was last used."""

    folder: Path
    identity: FolderIdentity
    loaded: LoadedAdapter
    last_used: int  # nanoseconds of a clock that never goes back


class Generator:
    """Generates text with a base and any number of adapters.

    Examples:
        >>> generator = Generator("noir")
        >>> generator.generate("Acting", SamplingParams(max_new_tokens=20, seed=1)).adapter
        'noir'

    Args:
        adapters: names or paths; the first becomes the current one. Without any, the base of
            `options` is loaded.
        options: base, device, dtype and the like.
        adapters_dir: folder in which names are looked up.
        max_resident: adapters kept in memory; those unused for longest are dropped, and reloaded
            when needed.
    """

    def __init__(
        self,
        *adapters: str | Path,
        options: ModelOptions = ModelOptions(),
        adapters_dir: Path | str = "adapters",
        max_resident: int | None = None,
    ) -> None:
        self.library: Library = Library(Path(adapters_dir))
        self.options = options
        self.current_adapter: str | None = None
        opened = [self.library.get(adapter) for adapter in adapters]
        self.base: loading.LoadedBase = loading.open_base(opened[0] if opened else None, options)
        self.engine: GenerationEngine = GenerationEngine(self.base, options.notify)
        self.max_resident = max_resident
        self._resident: dict[str, _ResidentAdapter] = {}  # by name; changed only under the lock
        self._lock = threading.RLock()
        for adapter in opened:
            name = self._load_adapter(adapter)
            self.current_adapter = self.current_adapter or name

    @property
    def loaded_adapters(self) -> list[str]:
        """Names of the adapters in memory."""
        return sorted(self._resident)

    def set_adapter(self, adapter: str | Path | None) -> str | None:
        """Make an adapter current, by name or path; None for the plain base. Loads it if needed.
        Returns its name.

        Raises AdapterError, and changes nothing, if it does not fit this base.
        """
        with self._lock:
            self.current_adapter = self._ensure_loaded(adapter)
            return self.current_adapter

    def _ensure_loaded(self, adapter: str | Path | None) -> str | None:
        """Load the present version of an adapter from disk, unless it is in memory. Returns its
        name."""
        if adapter is None:
            return None
        name = str(adapter)
        if self.get_loaded(name) is not None:
            return name
        return self._load_adapter(
            self.library.get(self._resident[name].folder if name in self._resident else adapter)
        )

    def get_loaded(self, name: str) -> LoadedAdapter | None:
        """Return an adapter if it is in memory and its files have not changed since.

        Takes no lock, so it never waits for another adapter that is being loaded.
        """
        resident = self._resident.get(name)
        if resident is None or folder_identity(resident.folder) != resident.identity:
            return None
        resident.last_used = time.monotonic_ns()
        return resident.loaded

    def get_or_load(self, adapter: str | Path | None) -> tuple[str | None, LoadedAdapter | None]:
        """Return name and weights of an adapter, as it is on disk now. Raises AdapterError."""
        with self._lock:
            return self._name_and_weights(self._ensure_loaded(adapter))

    def _name_and_weights(self, name: str | None) -> tuple[str | None, LoadedAdapter | None]:
        return name, None if name is None else self._resident[name].loaded

    def _load_adapter(self, adapter: Adapter) -> str:
        folder, name = Path(os.path.abspath(adapter.path)), adapter.name  # not resolved
        resident = self._resident.get(name)
        if resident is not None and resident.folder != folder:
            raise GenerationError(
                f"An adapter named {name} is already loaded from {resident.folder}: unload it first."
            )
        if resident is None or resident.identity != folder_identity(folder):

            def load_resident(adapter: Adapter) -> _ResidentAdapter:
                lora.check_base(adapter, self.base, self.options)
                loaded = self.engine.multi_lora.load(adapter)
                tokenizer = load_adapter_tokenizer(adapter, self.base, self.options)
                return _ResidentAdapter(
                    folder,
                    folder_identity(folder),
                    replace(loaded, tokenizer=tokenizer),
                    time.monotonic_ns(),
                )

            self._resident[name] = read_consistently(adapter.path, load_resident)
        self._resident[name].last_used = time.monotonic_ns()
        droppable = [other for other in self._resident if other not in (name, self.current_adapter)]
        droppable.sort(key=lambda other: self._resident[other].last_used)
        excess = len(self._resident) - (self.max_resident or len(self._resident))
        for other in droppable[: max(excess, 0)]:
            del self._resident[other]
        return name

    def tokenizer_of(self, name: str | None) -> PreTrainedTokenizerBase:
        """The tokenizer of an adapter in memory or, where it has none of its own, of the base."""
        loaded = self._resident[name].loaded if name is not None and name in self._resident else None
        return (loaded and loaded.tokenizer) or self.base.tokenizer

    def folder_of(self, name: str) -> Path:
        """The folder of an adapter in memory."""
        return self._resident[name].folder

    def is_chat(self, name: str | None) -> bool:
        """True for an adapter in memory that has learned conversations, with a chat template to ask
        it through."""
        learned = name is not None and name in self._resident and self._resident[name].loaded.is_chat
        return learned and bool(self.tokenizer_of(name).chat_template)

    def template_of(self, name: str | None) -> Template | None:
        """The template of the texts that an adapter in memory has learned."""
        return self._resident[name].loaded.template if name is not None and name in self._resident else None

    def unload(self, name: str) -> None:
        """Drop an adapter from memory."""
        with self._lock:
            if name not in self._resident:
                loaded = format_names(self.loaded_adapters) or "none"
                raise GenerationError(f"No adapter named {name} is loaded. Loaded: {loaded}.")
            del self._resident[name]
            if self.current_adapter == name:
                self.current_adapter = None

    def vocab_size_of(self, name: str | None) -> int:
        """The number of token ids of an adapter in memory that has others than the base, else 0."""
        return self._resident[name].loaded.vocab_size if name is not None and name in self._resident else 0

    def encode_prompt(
        self,
        prompt: Prompt,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vocab_size: int | None = None,
        tools: Tools = None,
    ) -> EncodedPrompt:
        """Tokenize a prompt; a conversation up to the start of the next assistant message.

        Args:
            prompt: text to continue, or messages; an encoded prompt is returned as it is.
            tokenizer: by default that of the current adapter. One copy must not be shared by two
                threads.
            vocab_size: of the adapter, where it has other token ids than the base; by default that
                of the current adapter.
            tools: for the chat template.

        Raises:
            ContextLengthError: the prompt leaves no room in the context.
            DataError: the chat template does not accept the conversation.
        """
        if isinstance(prompt, EncodedPrompt):
            return prompt
        tokenizer = tokenizer or self.tokenizer_of(self.current_adapter)
        if vocab_size is None:
            vocab_size = self.vocab_size_of(self.current_adapter)
        if isinstance(prompt, str):
            self.check_prompt_length(prompt)
            (encoded,) = tokenization.encode_texts(tokenizer, [prompt], add_eos=False)
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            return EncodedPrompt(prompt, self.check_fits_context(encoded.tolist() or [start], vocab_size))
        self.check_prompt_length("".join(message["content"] for message in prompt))
        token_ids = tokenizer(
            chat_template.render_prompt(tokenizer, prompt, tools),
            add_special_tokens=False,
            verbose=False,
        )["input_ids"]
        return EncodedPrompt(prompt[-1]["content"], self.check_fits_context(token_ids, vocab_size), chat=True)

    def check_prompt_length(self, text: str) -> None:
        """Raise ContextLengthError for text that cannot fit, whatever its tokens are, before it is
        tokenized."""
        if len(text) > self.base.max_context * tokenization.MAX_TOKEN_CHARS:
            raise ContextLengthError(
                f"The prompt has {len(text):,} characters, but {self.base.files.name} has a "
                f"context of {self.base.max_context:,} tokens: shorten it."
            )

    def check_fits_context(self, token_ids: list[int], vocab_size: int = 0) -> list[int]:
        """Return the tokens of a prompt; `vocab_size` is that of the adapter, 0 for the base's.

        Raises:
            ContextLengthError: they leave no room in the context.
            BaseModelError: the embeddings of the base have no row for one of them.
        """
        self.base.check_token_ids([np.array(token_ids)], vocab_size)
        if len(token_ids) >= self.base.max_context:
            raise ContextLengthError(
                f"The prompt has {len(token_ids):,} tokens, but {self.base.files.name} has a "
                f"context of {self.base.max_context:,}: shorten it."
            )
        return token_ids

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        on_text: Callable[[str], None] | None = None,
        *,
        chat: bool | None = None,
    ) -> GenerationOutput:
        """Generate one continuation with the current adapter.

        Args:
            prompt: text, or messages of a conversation.
            sampling: settings; `n` is taken as 1.
            on_text: receives each new piece of text once it is final.
            chat: True asks a text as the first message of a chat, False continues it as it stands;
                None asks adapters that have learned conversations (`is_chat`).

        Raises:
            ContextLengthError: the prompt leaves no room in the context.
            DataError: there is no chat template, or it does not accept the conversation.
        """
        with self._lock:
            single = (sampling or SamplingParams()).model_copy(update={"n": 1})
            current = self._name_and_weights(self.current_adapter)
            return self._generate_outputs([(prompt, *current)], single, on_text, chat=chat)[0]

    def generate_all(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, chat: bool | None = None
    ) -> list[GenerationOutput]:
        """Generate `sampling.n` continuations in one batch. Arguments and errors are those of
        `generate`."""
        with self._lock:
            current = self._name_and_weights(self.current_adapter)
            return self._generate_outputs([(prompt, *current)], sampling or SamplingParams(), chat=chat)

    def generate_batch(
        self,
        requests: abc.Sequence[tuple[Prompt, str | Path | None]],
        sampling: SamplingParams | None = None,
        *,
        chat: bool | None = None,
    ) -> list[GenerationOutput]:
        """Generate for pairs of prompt and adapter (None: the plain base) in one batch; outputs
        keep the order of requests.

        Missing adapters are loaded; the current adapter stays current. All requests share one seed,
        and each output equals that of the request run alone with this seed. `chat` is that of
        `generate`. Raises AdapterError or GenerationError, and generates nothing, when any request
        is invalid.
        """
        with self._lock:
            resident = self._resident.copy()
            try:
                resolved = [(prompt, *self.get_or_load(adapter)) for prompt, adapter in requests]
                return self._generate_outputs(resolved, sampling or SamplingParams(), chat=chat)
            except BaseException:
                self._resident = resident
                raise

    def _generate_outputs(
        self,
        requests: abc.Sequence[tuple[Prompt, str | None, LoadedAdapter | None]],
        sampling: SamplingParams,
        on_text: Callable[[str], None] | None = None,
        *,
        chat: bool | None,
    ) -> list[GenerationOutput]:
        """Generate `sampling.n` outputs per request, in order, all from one seed. Raises the first
        error of a sequence."""
        seed = choose_seed(sampling)
        prompts: list[EncodedPrompt] = []
        sequences: list[Sequence] = []
        for prompt, name, loaded in requests:
            if isinstance(prompt, str) and (self.is_chat(name) if chat is None else chat):
                prompt = [{"role": "user", "content": prompt}]
            encoded = self.encode_prompt(prompt, self.tokenizer_of(name), self.vocab_size_of(name))
            prompts += [encoded] * sampling.n
            sequences += [
                Sequence(
                    self.base, encoded.token_ids, sampling, sequence_seed(seed, number), name, loaded, on_text
                )
                for number in range(sampling.n)
            ]
        try:
            self.engine.add(sequences)
            while self.engine.sequences:
                self.engine.step()
                for sequence in sequences:
                    if sequence.error:
                        raise sequence.error
        except BaseException:
            self.engine.clear()
            raise
        return [
            GenerationOutput(
                prompt.text,
                sequence.detokenizer.text,
                sequence.adapter,
                len(sequence.output_ids),
                sequence.finish_reason,
                sequence.seed,
                prompt.chat,
            )
            for prompt, sequence in zip(prompts, sequences, strict=True)
        ]
