"""Text from one resident base and many adapters.

`Generator` holds the base once; adapters are loaded beside it, and choosing another one moves no weights. Each row of a
batch is drawn by itself, with random numbers of its own: what else is in the batch does not change it. Surprise:
transformers is not safe for two threads on one model, so calls take turns. Limit: a call returns when its last row is
done; rows that come and go are the server's (`batch`).
"""

import os
import secrets
import threading
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.adapter import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, Adapter
from ..adapters.library import Library, read_consistently
from ..config import ModelOptions, SamplingParams
from ..data import chat, tokenization
from ..errors import ContextLengthError, GenerationError
from ..models import loading, lora
from .batch import GenerationEngine
from .multi_lora import LoadedAdapter
from .sequence import Sequence


@dataclass(frozen=True)
class EncodedPrompt:
    """A tokenized prompt. `text` is what outputs show as the prompt: of a conversation the last message."""

    text: str
    token_ids: list[int]


Prompt = str | abc.Sequence[chat.Message] | EncodedPrompt  # text to continue, or a conversation to answer


@dataclass(frozen=True)
class GenerationOutput:
    """A prompt with its continuation; of a conversation the last message. `finished`: the model ended the text, or a stop string
    did; else it was cut off.

    `seed` alone gives this answer again; it is None for a greedy one.
    """

    prompt: str
    text: str  # the continuation alone
    adapter: str | None
    tokens: int
    finished: bool
    seed: int | None


@dataclass(frozen=True)
class _ResidentAdapter:
    """An adapter in memory, and what its files were when it was read."""

    folder: Path
    identity: Any
    loaded: LoadedAdapter


class Generator:
    """One base in memory, and adapters beside it.

    >>> generator = Generator("adapters/imdb")
    >>> generator.generate("Acting").text

    Without an adapter the base is the default one. The adapter given first is the one in use until `use` says otherwise. Of
    more than `max_resident` adapters those that were not used for longest leave memory, and are read again when they are.
    """

    def __init__(
        self,
        *adapters: str | Path,
        options: ModelOptions = ModelOptions(),
        adapters_dir: Path | str = "adapters",
        max_resident: int | None = None,
    ) -> None:
        self.library = Library(Path(adapters_dir))
        self.options = options
        self.current_adapter: str | None = None
        found = [self.library.get(adapter) for adapter in adapters]
        self.base = loading.open_base(found[0] if found else None, options)
        self.engine = GenerationEngine(self.base, options.notify)
        self.max_resident = max_resident
        self._loaded: dict[str, _ResidentAdapter] = {}  # by name, the one used last at the end
        self._lock = threading.RLock()
        for adapter in found:
            name = self._load(adapter)
            self.current_adapter = self.current_adapter or name

    @property
    def loaded_adapters(self) -> list[str]:
        """The names of the adapters in memory."""
        return sorted(self._loaded)

    def set_adapter(self, adapter: str | Path | None) -> str | None:
        """Choose an adapter by name or path, loading it when it is not in memory yet, or the plain base with None.

        Raises AdapterError, and leaves things as they are, when it does not fit this base.
        """
        with self._lock:
            self.current_adapter = self._resident(adapter)
            return self.current_adapter

    def _resident(self, adapter: str | Path | None) -> str | None:
        """The name of an adapter that is in memory by now, as it is on disk by now."""
        if adapter is None:
            return None
        name = str(adapter)
        if self.get_loaded(name) is not None:
            return name
        return self._load(self.library.get(self._loaded[name].folder if name in self._loaded else adapter))

    def get_loaded(self, name: str) -> LoadedAdapter | None:
        """The adapter of that name, where it is in memory and its files are as they were when it was read."""
        with self._lock:
            known = self._loaded.get(name)
            if known is None or _folder_identity(known.folder) != known.identity:
                return None
            self._loaded[name] = self._loaded.pop(name)
            return known.loaded

    def get_or_load(self, adapter: str | Path | None) -> tuple[str | None, LoadedAdapter | None]:
        """An adapter as it is on disk by now, with its name; it is loaded where it is not in memory. Raises AdapterError."""
        with self._lock:
            name = self._resident(adapter)
            return name, self._loaded[name].loaded if name is not None else None

    def _load(self, adapter: Adapter) -> str:
        folder, name = (
            Path(os.path.abspath(adapter.path)),
            adapter.name,
        )  # not resolved: a link may lead elsewhere later
        known = self._loaded.get(name)
        if known is not None and known.folder != folder:
            raise GenerationError(f"An adapter named {name} is loaded already, from {known.folder}: unload it first.")
        if known is None or known.identity != _folder_identity(folder):

            def look(adapter: Adapter) -> _ResidentAdapter:
                lora.check_base(adapter, self.base, self.options)
                return _ResidentAdapter(folder, _folder_identity(folder), self.engine.multi_lora.load(adapter))

            known = read_consistently(adapter.path, look)
        self._loaded.pop(name, None)
        self._loaded[name] = known
        others = [it for it in self._loaded if it not in (name, self.current_adapter)]
        for longest_ago in others[: max(len(self._loaded) - (self.max_resident or len(self._loaded)), 0)]:
            del self._loaded[longest_ago]
        return name

    def unload(self, name: str) -> None:
        """Take an adapter out of memory."""
        with self._lock:
            if name not in self._loaded:
                raise GenerationError(
                    f"No adapter named {name} is loaded: there are {', '.join(self.loaded_adapters) or 'none'}."
                )
            del self._loaded[name]
            if self.current_adapter == name:
                self.current_adapter = None

    def encode_prompt(self, prompt: Prompt, tokenizer: Any = None) -> EncodedPrompt:
        """Tokenize a prompt; a conversation up to the start of the next assistant message.

        Args:
            prompt: text or messages; an encoded prompt is returned as it is.
            tokenizer: another copy of the base's tokenizer. One copy must not be shared by two threads.

        Raises:
            ContextLengthError: the prompt leaves no room in the context.
            DataError: the chat template does not accept the conversation.
        """
        if isinstance(prompt, EncodedPrompt):
            return prompt
        tokenizer = tokenizer or self.base.tokenizer
        if isinstance(prompt, str):
            self.check_prompt_length(prompt)
            (encoded,) = tokenization.encode_texts(tokenizer, [prompt], end=False)
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            return EncodedPrompt(prompt, self.check_fits_context(encoded.tolist() or [start]))
        self.check_prompt_length("".join(message["content"] for message in prompt))
        rendered = chat.render_prompt(tokenizer, prompt, ask=True)
        token_ids = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        return EncodedPrompt(prompt[-1]["content"], self.check_fits_context(token_ids))

    def check_prompt_length(self, text: str) -> None:
        """Raise ContextLengthError for text that cannot fit, whatever its tokens are, before it is tokenized."""
        if len(text) > self.base.max_context * tokenization.MAX_TOKEN_CHARS:
            raise ContextLengthError(
                f"The prompt has {len(text):,} characters, and {self.base.files.name} looks back on {self.base.max_context:,} "
                "tokens: cut it."
            )

    def check_fits_context(self, token_ids: list[int]) -> list[int]:
        """Return the tokens of a prompt. Raises ContextLengthError when they leave no room in the context."""
        if len(token_ids) >= self.base.max_context:
            raise ContextLengthError(
                f"The prompt has {len(token_ids):,} tokens, and {self.base.files.name} looks back on "
                f"{self.base.max_context:,}: cut it."
            )
        return token_ids

    def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, on_text: Callable[[str], None] | None = None
    ) -> GenerationOutput:
        """Generate one continuation with the current adapter. `on_text` receives each new piece of text once it is final."""
        with self._lock:
            single = (sampling or SamplingParams()).model_copy(update={"n": 1})
            return self._generate_outputs([(prompt, *self._current())], single, on_text)[0]

    def generate_all(self, prompt: Prompt, sampling: SamplingParams | None = None) -> list[GenerationOutput]:
        """Generate `sampling.n` continuations in one batch.

        Raises ContextLengthError when the prompt leaves no room in the context.
        """
        with self._lock:
            return self._generate_outputs([(prompt, *self._current())], sampling or SamplingParams())

    def generate_batch(
        self, requests: abc.Sequence[tuple[Prompt, str | Path | None]], sampling: SamplingParams | None = None
    ) -> list[GenerationOutput]:
        """Generate for pairs of prompt and adapter (None: the plain base) in one batch; outputs keep the order of requests.

        Missing adapters are loaded; the current adapter stays current. All requests share one seed, and each output equals
        that of the request run alone with this seed. Raises AdapterError or GenerationError, and generates nothing, when any
        request is invalid.
        """
        with self._lock:
            loaded = dict(self._loaded)
            try:
                resolved = [(prompt, *self.get_or_load(adapter)) for prompt, adapter in requests]
                return self._generate_outputs(resolved, sampling or SamplingParams())
            except BaseException:
                self._loaded = loaded
                raise

    def _generate_outputs(
        self,
        requests: abc.Sequence[tuple[Prompt, str | None, LoadedAdapter | None]],
        sampling: SamplingParams,
        on_text: Callable[[str], None] | None = None,
    ) -> list[GenerationOutput]:
        """Generate `sampling.n` outputs per request, in order, all from one seed."""
        seed = choose_seed(sampling)
        prompts: list[str] = []
        sequences: list[Sequence] = []
        for prompt, name, loaded in requests:
            encoded = self.encode_prompt(prompt)
            for number in range(sampling.n):
                sequence = Sequence(
                    self.base, encoded.token_ids, sampling, sequence_seed(seed, number), name, loaded, on_text
                )
                prompts.append(encoded.text)
                sequences.append(sequence)
        self._run_to_end(sequences)
        return [
            GenerationOutput(
                prompt,
                sequence.detokenizer.text,
                sequence.adapter,
                len(sequence.output_ids),
                sequence.finished,
                sequence.seed,
            )
            for prompt, sequence in zip(prompts, sequences, strict=True)
        ]

    def _run_to_end(self, sequences: list[Sequence]) -> None:
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

    def _current(self) -> tuple[str | None, LoadedAdapter | None]:
        if self.current_adapter is None:
            return None, None
        return self.current_adapter, self._loaded[self.current_adapter].loaded


def choose_seed(sampling: SamplingParams) -> int | None:
    """The seed of what is drawn with these settings, by chance where they name none; None where nothing is drawn."""
    if sampling.greedy or sampling.temperature == 0:
        return None
    return sampling.seed if sampling.seed is not None else secrets.randbits(48)


def sequence_seed(seed: int | None, number: int) -> int | None:
    """The seed of the answer of that number, where the first has `seed`."""
    return None if seed is None else (seed + number) % 2**63


def _folder_identity(folder: Path) -> Any:
    """What tells one version of an adapter from the next; None when it is gone."""
    try:
        names = [WEIGHTS_FILE, CONFIG_FILE, *([MANIFEST_FILE] if (folder / MANIFEST_FILE).exists() else [])]
        found = [(folder / name).stat() for name in names]
    except OSError:
        return None
    # The time of change too: a file that takes another's place may have its number, size and age.
    return [(facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns) for facts in found]
