"""Text from one resident base and many adapters.

`Generator` holds the base once; adapters are loaded beside it, and choosing another one moves no weights. Surprise:
neither transformers nor PEFT is safe for two threads on one model, so calls take turns. Limit: answers to one prompt are
drawn as one batch; different prompts come one after another.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from . import lora, tokens
from .base_model import quiet
from .config import Sampling
from .errors import GenerationError, Listener, ignore
from .store import Adapter, Library


@dataclass(frozen=True)
class Answer:
    """A prompt with its continuation. `finished`: the model ended the text, or a stop string did; else it was cut off."""

    prompt: str
    text: str  # the continuation alone
    adapter: str | None
    tokens: int
    finished: bool
    seed: int | None


class Generator:
    """One base in memory, and adapters beside it.

    >>> generator = Generator("adapters/imdb")
    >>> generator.generate("Acting").text

    Without an adapter the base is the default one. The adapter given first is the one in use until `use` says otherwise.
    """

    def __init__(
        self,
        *adapters: str | Path,
        base: str | None = None,
        revision: str | None = None,
        adapters_dir: Path | str = "adapters",
        device: str = "auto",
        dtype: str = "auto",
        force: bool = False,
        notify: Listener = ignore,
    ) -> None:
        self.library = Library(Path(adapters_dir))
        self.force = force
        self.notify = notify
        self.current: str | None = None
        found = [self.library.get(adapter) for adapter in adapters]
        self.base = lora.open_base(
            found[0] if found else None, base, revision, device=device, dtype=dtype, notify=notify
        )
        self.base.model.generation_config = GenerationConfig()  # a base's own would fill in what we leave open
        self._model: Any = self.base.model  # a PeftModel from the first adapter on
        self._slots: dict[str, tuple[Path, str]] = {}  # adapter name -> (its folder, its name inside PEFT)
        self._made = 0
        self._lock = threading.RLock()
        for adapter in reversed(found):
            self._load(adapter)

    @property
    def loaded(self) -> list[str]:
        """The names of the adapters in memory."""
        return sorted(self._slots)

    def use(self, adapter: str | Path | None) -> str | None:
        """Choose an adapter by name or path, loading it when it is not in memory yet, or the plain base with None.

        Raises AdapterError, and leaves things as they are, when it does not fit this base.
        """
        with self._lock:
            if adapter is None:
                self.current = None
            elif str(adapter) in self._slots:
                self.current = str(adapter)
            else:
                self._load(self.library.get(adapter))
            return self.current

    def _load(self, adapter: Adapter) -> None:
        known = self._slots.get(adapter.name)
        if known is not None and known[0] != adapter.path.resolve():
            raise GenerationError(
                f"An adapter named {adapter.name} is loaded already, from {known[0]}: unload it first."
            )
        if known is None:
            lora.check_base(adapter, self.base, force=self.force, notify=self.notify)
            # A name of our own: inside PEFT some names lose tensors or clash with modules (peft#3584).
            slot = f"slot{self._made}"
            self._model = lora.attach(self._model, adapter, slot)
            self._made += 1
            self._slots[adapter.name] = adapter.path.resolve(), slot
        self.current = adapter.name

    def unload(self, name: str) -> None:
        """Take an adapter out of memory."""
        with self._lock:
            if name not in self._slots:
                raise GenerationError(
                    f"No adapter named {name} is loaded: there are {', '.join(self.loaded) or 'none'}."
                )
            _, slot = self._slots.pop(name)
            if self.current == name:
                self.current = None
            with quiet():
                if self._slots:
                    self._model.delete_adapter(slot)
                else:
                    self._model = self._model.unload()

    def generate(
        self, prompt: str, sampling: Sampling | None = None, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """One continuation of the prompt. `on_text` gets each new piece of it as soon as it is certain."""
        return self._locked(prompt, (sampling or Sampling()).model_copy(update={"answers": 1}), on_text)[0]

    def generate_all(self, prompt: str, sampling: Sampling | None = None) -> list[Answer]:
        """`sampling.answers` continuations of the prompt, drawn as one batch.

        Raises GenerationError when the prompt leaves no room in the model's context.
        """
        return self._locked(prompt, sampling or Sampling(), None)

    def _locked(self, prompt: str, sampling: Sampling, on_text: Callable[[str], None] | None) -> list[Answer]:
        """One call at a time, and the caller's random numbers as they were."""
        with self._lock, quiet(), torch.random.fork_rng(devices=_devices(self.base.device)):
            seed = None
            if not (sampling.greedy or sampling.temperature == 0):
                seed = sampling.seed if sampling.seed is not None else torch.seed() % 2**63
                torch.manual_seed(seed)
            return self._generate(prompt, sampling, seed, on_text)

    def _generate(
        self, prompt: str, sampling: Sampling, seed: int | None, on_text: Callable[[str], None] | None
    ) -> list[Answer]:
        tokenizer = self.base.tokenizer
        (encoded,) = tokens.encode(tokenizer, [prompt], end=False)
        ids = encoded.tolist() or [
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ]
        room = self.base.context - len(ids)
        if room < 1:
            raise GenerationError(
                f"The prompt has {len(ids):,} tokens, and {self.base.source.name} looks back on {self.base.context:,}: cut it."
            )
        text = _Text(tokenizer, ids, sampling.stop, on_text)
        inputs = torch.tensor([ids], device=self.base.device)
        model, adapter = self._activate()
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=_generation_config(tokenizer, sampling, min(sampling.max_new_tokens, room)),
                stopping_criteria=StoppingCriteriaList([_Stop(text)] if sampling.stop else []),
                streamer=text if on_text else None,
            )
        answers = []
        for line in output.tolist():
            new = line[len(ids) :]
            ended = tokenizer.eos_token_id in new
            if ended:
                new = new[: new.index(tokenizer.eos_token_id)]
            written, stopped = text.cut(new)
            answers.append(Answer(prompt, written, adapter, len(new), ended or stopped, seed))
        return answers

    def _activate(self) -> tuple[Any, str | None]:
        """The model to call, with the adapter in use switched on and all others off."""
        if self.current is None:
            if self._slots:
                self._model.base_model.disable_adapter_layers()
                return self._model.get_base_model(), None
            return self._model, None
        self._model.base_model.enable_adapter_layers()
        self._model.set_adapter(self._slots[self.current][1], inference_mode=True)
        return self._model, self.current


def _devices(device: torch.device) -> list[torch.device]:
    """The GPUs whose random state a call must leave as it was."""
    return [device] if device.type == "cuda" else []


def _generation_config(tokenizer: Any, sampling: Sampling, max_new_tokens: int) -> GenerationConfig:
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "num_return_sequences": sampling.answers,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if sampling.greedy or sampling.temperature == 0:
        return GenerationConfig(do_sample=False, **settings)
    return GenerationConfig(
        do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, **settings
    )


class _Stop(StoppingCriteria):
    """Ends each answer that holds a stop string. transformers' own would find one that begins in the prompt."""

    def __init__(self, text: "_Text") -> None:
        self.text = text

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        start = len(self.text.prompt)
        stopped = [self.text.cut(line[start:])[1] for line in input_ids.tolist()]
        return torch.tensor(stopped, device=input_ids.device)


class _Text(BaseStreamer):
    """Token ids to text, as a whole or while they come. Decoded with the prompt: some tokenizers drop a leading space."""

    def __init__(
        self, tokenizer: Any, prompt: list[int], stop: list[str], on_text: Callable[[str], None] | None
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.stop = stop
        self.on_text = on_text
        self.new: list[int] | None = None  # None until the prompt, which comes first, has passed
        self.shown = 0
        self.before = self._decode(prompt)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def cut(self, new: list[int]) -> tuple[str, bool]:
        """The text of new tokens up to the first stop string, and whether there was one."""
        text = self._decode(self.prompt + new)[len(self.before) :]
        ends = [text.find(stop) for stop in self.stop if stop in text]
        return (text[: min(ends)], True) if ends else (text, False)

    def put(self, value: torch.Tensor) -> None:
        if self.new is None:
            self.new = []
            return
        self.new += value.flatten().tolist()
        self._show(final=False)

    def end(self) -> None:
        self._show(final=True)

    def _show(self, *, final: bool) -> None:
        text, stopped = self.cut(self.new or [])
        if not (final or stopped):
            # A stop string may have begun, and the last character may still lack bytes.
            text = text[: len(text) - max((len(stop) - 1 for stop in self.stop), default=0)].removesuffix("\ufffd")
        if self.on_text and len(text) > self.shown:
            self.on_text(text[self.shown :])
            self.shown = len(text)
