"""Text from one resident base and many adapters.

`Generator` holds the base once; adapters are loaded beside it, and choosing another one moves no weights. Each row of a
batch is drawn by itself, with random numbers of its own: what else is in the batch does not change it. Surprise:
transformers is not safe for two threads on one model, so calls take turns. Limit: rows of different lengths are padded to
the longest, and a batch ends with its last row.
"""

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from . import drawing, lora, tokens
from .bank import AdapterBank
from .base_model import quiet
from .config import Sampling
from .decoder import Cache, Decoder
from .errors import GenerationError, Listener, MixedBatchError, Notice, ignore
from .library import Library
from .store import CONFIG, MANIFEST, WEIGHTS, Adapter

WORTH_GUESSING = 24  # tokens; for fewer, the draft is not worth making


@dataclass(frozen=True)
class Answer:
    """A prompt with its continuation. `finished`: the model ended the text, or a stop string did; else it was cut off.

    `seed` alone gives this answer again; it is None for a greedy one.
    """

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
        self._bank = AdapterBank(self.base)
        self._decoder = Decoder.of(self.base)
        self._loaded: dict[str, tuple[Path, Any]] = {}  # adapter name -> (its folder, what its file was)
        self._lock = threading.RLock()
        names = [self._load(adapter) for adapter in found]
        self.current = names[0] if names else None

    @property
    def loaded(self) -> list[str]:
        """The names of the adapters in memory."""
        return sorted(self._loaded)

    def use(self, adapter: str | Path | None) -> str | None:
        """Choose an adapter by name or path, loading it when it is not in memory yet, or the plain base with None.

        Raises AdapterError, and leaves things as they are, when it does not fit this base.
        """
        with self._lock:
            self.current = self._resident(adapter)
            return self.current

    def _resident(self, adapter: str | Path | None) -> str | None:
        """The name of an adapter that is in memory by now, as it is on disk by now."""
        if adapter is None:
            return None
        name = str(adapter)
        if name in self._loaded and _identity(self._loaded[name][0]) == self._loaded[name][1]:
            return name
        return self._load(self.library.get(self._loaded[name][0] if name in self._loaded else adapter))

    def _load(self, adapter: Adapter) -> str:
        folder = adapter.path.resolve()
        identity = _identity(folder)
        known = self._loaded.get(adapter.name)
        if known is not None and known[0] != folder:
            raise GenerationError(
                f"An adapter named {adapter.name} is loaded already, from {known[0]}: unload it first."
            )
        if known is None or known[1] != identity:
            lora.check_base(adapter, self.base, force=self.force, notify=self.notify)
            self._bank.add(adapter.name, adapter)
            self._loaded[adapter.name] = folder, identity
        return adapter.name

    def unload(self, name: str) -> None:
        """Take an adapter out of memory."""
        with self._lock:
            if name not in self._loaded:
                raise GenerationError(
                    f"No adapter named {name} is loaded: there are {', '.join(self.loaded) or 'none'}."
                )
            self._bank.remove(name)
            del self._loaded[name]
            if self._decoder is not None:
                self._decoder.rest(self._bank)
            if self.current == name:
                self.current = None

    def check(self, prompt: str) -> list[int]:
        """The tokens of a prompt. Raises GenerationError when it leaves no room in the model's context."""
        tokenizer = self.base.tokenizer
        (encoded,) = tokens.encode(tokenizer, [prompt], end=False)
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids: list[int] = encoded.tolist() or [start]
        if len(ids) >= self.base.context:
            raise GenerationError(
                f"The prompt has {len(ids):,} tokens, and {self.base.source.name} looks back on {self.base.context:,}: cut it."
            )
        return ids

    def generate(
        self, prompt: str, sampling: Sampling | None = None, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """One continuation of the prompt. `on_text` gets each new piece of it as soon as it is certain."""
        with self._lock:
            one = (sampling or Sampling()).model_copy(update={"answers": 1})
            return self._answer([(prompt, self.current)], one, on_text)[0]

    def generate_all(self, prompt: str, sampling: Sampling | None = None) -> list[Answer]:
        """`sampling.answers` continuations of the prompt, drawn as one batch.

        Raises GenerationError when the prompt leaves no room in the model's context.
        """
        with self._lock:
            return self._answer([(prompt, self.current)], sampling or Sampling())

    def generate_batch(
        self, asked: Sequence[tuple[str, str | Path | None]], sampling: Sampling | None = None
    ) -> list[Answer]:
        """Prompts, each with the adapter that answers it (None: the plain base), in one batch; answers in that order.

        Adapters that are not in memory are loaded; the one in use stays the one in use. Every answer is the one that its
        prompt and adapter get alone with the seed, which all share: asked twice, the same is answered twice. Raises
        AdapterError or GenerationError, and gives no answer, when one is wrong.
        """
        with self._lock:
            loaded, updates = dict(self._loaded), dict(self._bank.updates)
            try:
                rows = [(prompt, self._resident(adapter)) for prompt, adapter in asked]
                return self._answer(rows, sampling or Sampling())
            except BaseException:
                self._loaded, self._bank.updates = loaded, updates
                raise

    def _answer(
        self,
        asked: Sequence[tuple[str, str | None]],
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """`sampling.answers` for each, in order; all share a seed."""
        seed = None
        if not (sampling.greedy or sampling.temperature == 0):
            seed = sampling.seed if sampling.seed is not None else secrets.randbits(48)
        rows = [
            self._row(prompt, adapter, sampling, None if seed is None else (seed + number) % 2**63, on_text)
            for prompt, adapter in asked
            for number in range(sampling.answers)
        ]
        batches: dict[int, list[_Row]] = {}
        for row in rows:
            batches.setdefault(row.limit, []).append(row)
        with quiet(), torch.inference_mode():
            for batch in batches.values():
                try:
                    self._write(batch)
                except MixedBatchError as error:
                    self.notify(Notice(f"{error} The answers are made one adapter after another."))
                    for adapter in dict.fromkeys(row.adapter for row in batch):
                        self._write([row for row in batch if row.adapter == adapter])
        return [row.answer() for row in rows]

    def _row(
        self,
        prompt: str,
        adapter: str | None,
        sampling: Sampling,
        seed: int | None,
        on_text: Callable[[str], None] | None,
    ) -> "_Row":
        ids = self.check(prompt)
        text = _Text(self.base.tokenizer, ids, sampling.stop, on_text)
        limit = min(sampling.max_new_tokens, self.base.context - len(ids))
        return _Row(prompt, adapter, text, limit, seed, drawing.steps(sampling, seed))

    def _write(self, rows: list["_Row"]) -> None:
        """Continue these rows, which have one limit, as one batch."""
        tokenizer, device = self.base.tokenizer, self.base.device
        longest = max(len(row.text.prompt) for row in rows)
        inputs = torch.full((len(rows), longest), tokenizer.pad_token_id, device=device)
        mask = torch.zeros_like(inputs)
        for line, row in enumerate(rows):  # what is padding stands on the left, and is masked
            inputs[line, longest - len(row.text.prompt) :] = torch.tensor(row.text.prompt, device=device)
            mask[line, longest - len(row.text.prompt) :] = 1
        streamed = rows[0].text if len(rows) == 1 and rows[0].text.on_text else None
        if self._decoder is not None and self._decode(self._decoder, rows, inputs, streamed):
            return
        with self._bank.applied([row.adapter for row in rows]):
            output = self.base.model.generate(
                input_ids=inputs,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    do_sample=False,  # each row draws for itself, in _EachRow
                    max_new_tokens=rows[0].limit,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                ),
                logits_processor=LogitsProcessorList([_EachRow(rows, longest)]),
                stopping_criteria=StoppingCriteriaList([_Stop(rows, longest)]),
                streamer=streamed,
            )
        for row, line in zip(rows, output.tolist(), strict=True):
            row.new, row.ended = line[longest:], tokenizer.eos_token_id in line[longest:]
            if row.ended:
                row.new = row.new[: row.new.index(tokenizer.eos_token_id)]

    def _decode(self, decoder: Decoder, rows: list["_Row"], inputs: torch.Tensor, streamed: "_Text | None") -> bool:
        """The same by our own way through the base; False, and nothing done, for adapters that it does not take."""
        try:
            decoder.use(self._bank, [row.adapter for row in rows])
        except MixedBatchError:
            return False
        eos, width, limit = self.base.tokenizer.eos_token_id, inputs.shape[1], rows[0].limit
        written = torch.cat([inputs, inputs.new_full((len(rows), limit), self.base.tokenizer.pad_token_id)], 1)
        cache = Cache(decoder, len(rows), width + limit, [width - len(row.text.prompt) for row in rows])
        guesser = _Guesser(decoder, self._bank, rows[0], cache) if len(rows) == 1 and limit >= WORTH_GUESSING else None
        for row in rows:
            row.new = []
        if streamed:
            streamed.put(inputs[0])
        end, guessed = width, 0
        logits = decoder.step(inputs, cache, last=True)
        while True:
            for number in range(guessed + 1):
                guess = int(written[0, end])
                for line, row in enumerate(rows):
                    if row.done:
                        continue
                    best = row.best(written[line : line + 1, width - len(row.text.prompt) : end], logits[line, number])
                    written[line, end] = best
                    row.check(logits[line, number, best])
                    row.take(best, eos)
                    if streamed:
                        streamed.put(written[line, end])
                end += 1
                if end == width + limit or all(row.done for row in rows):
                    if streamed:
                        streamed.end()
                    return True
                if number < guessed and written[0, end - 1] != guess:
                    break
            cache.used = end - 1
            guessed = guesser.guess(written, end, number + 1) if guesser else 0
            logits = decoder.step(written[:, end - 1 : end + guessed], cache)


class _Guesser:
    """Writes ahead with the draft of a decoder, for one row. The decoder has the last word on every token, so the text is its
    own; it only reads its weights once for several tokens. Stops for good where it guesses badly."""

    def __init__(self, decoder: Decoder, bank: AdapterBank, row: "_Row", cache: Cache) -> None:
        self.decoder = decoder
        self.bank = bank
        self.row = row
        self.cache = cache
        self.rounds, self.taken = 0, 0

    def guess(self, written: torch.Tensor, end: int, taken: int) -> int:
        """Put guesses into `written` from `end` on, and say how many. `taken` tokens came of the last ones."""
        draft = self.decoder.draft  # made when it is first asked for, so after the first token
        if draft is None or (self.rounds > 8 and self.taken < 2 * self.rounds):
            return 0
        if self.rounds == 0:
            draft.use(self.bank, [self.row.adapter])
        self.rounds, self.taken = self.rounds + 1, self.taken + taken
        count = min(self.decoder.guesses, written.shape[1] - end - 1)
        for place in range(end, end + count):
            logits = draft.step(written[:, place - 1 : place], self.cache)[0, -1]
            written[0, place] = self.row.best(written[:, :place], logits)
        self.cache.used = end - 1
        return count


def _identity(folder: Path) -> Any:
    """What tells one version of an adapter from the next; None when it is gone."""
    try:
        names = [WEIGHTS, CONFIG, *([MANIFEST] if (folder / MANIFEST).exists() else [])]
        found = [(folder / name).stat() for name in names]
    except OSError:
        return None
    # The time of change too: a file that takes another's place may have its number, size and age.
    return [(facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns) for facts in found]


@dataclass
class _Row:
    """One continuation in the making."""

    prompt: str
    adapter: str | None
    text: "_Text"
    limit: int  # tokens to write at the most
    seed: int | None
    drawing: LogitsProcessorList
    new: list[int] | None = None
    ended: bool = False  # by an end of text
    stopped: bool = False  # by a stop string

    @property
    def done(self) -> bool:
        return self.ended or self.stopped

    def best(self, seen: Any, logits: torch.Tensor) -> int:
        """The token that follows `seen` (1, tokens), given its logits (vocabulary,)."""
        return int(self.drawing(seen, logits[None]).argmax())

    def check(self, logit: torch.Tensor) -> None:
        """Of the token that is taken: of logits that are no numbers the first would be, without a word."""
        if not logit.isfinite():
            raise GenerationError(
                f"{self.adapter or 'The base'} gives logits that are not finite, and writes nothing: its numbers are too large, "
                "or it needs --dtype float32."
            )

    def take(self, token: int, eos: int) -> None:
        assert self.new is not None
        if token == eos:
            self.ended = True
        else:
            self.new.append(token)
            self.stopped = bool(self.text.stop) and self.text.cut(self.new)[1]

    def answer(self) -> Answer:
        assert self.new is not None
        written, stopped = self.text.cut(self.new)
        return Answer(self.prompt, written, self.adapter, len(self.new), self.ended or stopped, self.seed)


class _EachRow(LogitsProcessor):
    """Each row by its own settings, and without its padding, which a repetition penalty would count."""

    def __init__(self, rows: Sequence[_Row], width: int) -> None:
        self.rows = rows
        self.width = width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        lines = []
        for line, row in enumerate(self.rows):
            start = self.width - len(row.text.prompt)
            lines.append(row.drawing(input_ids[line : line + 1, start:], scores[line : line + 1]))
            row.check(scores[line, lines[-1].argmax()])
        return torch.cat(lines)


class _Stop(StoppingCriteria):
    """Ends each answer that holds a stop string. transformers' own would find one that begins in the prompt."""

    def __init__(self, rows: Sequence[_Row], width: int) -> None:
        self.rows = rows
        self.width = width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        lines = input_ids[:, self.width :].tolist()
        stopped = [bool(row.text.stop) and row.text.cut(line)[1] for row, line in zip(self.rows, lines, strict=True)]
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
