"""Everything that a run needs, in memory: base, data, update. And what is known of it, as a manifest.

Surprise: preparing is part of what is repeated. The same configuration gives the same job, down to the random numbers of
the fresh update, whatever was measured or trained in this process before.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from . import chat, distributed, evaluation, fast, lora, methods, sharding, store, tokens
from .base_model import Base, load_tokenizer, quiet
from .config import BATCH_SIZE_CPU, BATCH_SIZE_GPU, HELD_OUT_LENGTH, METHODS, TrainConfig, to_yaml
from .data import Corpus, content_hash, load_corpus
from .errors import BaseModelError, ConfigError, Listener, Notice, Progress, TrainingError, ignore
from .library import Library
from .manifest import DataFacts, Manifest, RunFacts, now
from .store import Adapter


@dataclass
class Job:
    """A prepared run. `config` is resolved but for its steps until training fixes them. Of a stream, corpus and sequences are
    those of its first rows."""

    config: TrainConfig
    base: Base
    corpus: Corpus
    model: Any  # a PeftModel
    sequences: tokens.Sequences
    held_out: list[tokens.Row]
    held_out_texts: list[str]
    truncated_rows: int
    parent: Adapter | None
    by_row: bool  # packed rows attend by themselves, told where they begin
    notify: Listener

    @property
    def batch_size(self) -> int:
        assert self.config.batch_size is not None
        return self.config.batch_size

    @property
    def learning_rate(self) -> float:
        assert self.config.learning_rate is not None
        return self.config.learning_rate

    def collate(self, items: Sequence[Sequence[tokens.Row]]) -> dict[str, torch.Tensor]:
        return tokens.collate(items, self.base.tokenizer.pad_token_id, bounds=self.by_row)

    def compute_again(self) -> None:
        """From now on keep what goes into each block alone, and compute the rest again on the way back (Chen et al., 2016,
        arXiv:1604.06174). The gradients are the same. Raises TrainingError for a model that cannot."""
        try:
            with quiet():
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise TrainingError(f"{self.base.source.name} cannot compute its activations again: {error}") from error

    def release(self) -> None:
        """Take the update off the base, which is then as it came."""
        with quiet():
            self.model.gradient_checkpointing_disable()
            self.model.unload()

    @property
    def sequences_per_step(self) -> int:
        """Of all processes together."""
        return self.batch_size * self.config.accumulation * distributed.size()

    @property
    def steps_per_epoch(self) -> int | None:
        """None of a stream: nobody knows how many rows it has."""
        if self.config.streaming:
            return None
        return math.ceil(len(self.sequences) / self.sequences_per_step)

    @cached_property
    def manifest(self) -> Manifest:
        """What is known before the first step."""
        config, corpus = self.config, self.corpus
        return Manifest(
            created=now(),
            base=self.base.source.facts(self.base.tokenizer_hash),
            data=DataFacts(
                name=corpus.name,
                source=corpus.source,
                hash=corpus.hash(),
                where=config.where,
                split_salt=config.split_salt,
                counts=asdict(corpus.counts),
                format=corpus.format,
                eval_dataset=config.eval_dataset,
                held_out_hash=content_hash(self.held_out_texts),
                held_out_rows=len(self.held_out_texts),
            ),
            parents=[self.parent.as_parent()] if self.parent else [],
            run=RunFacts(
                method=config.method,
                steps=0,
                kept_step=0,
                tokens=0,
                seconds=0.0,
                sequences=len(self.sequences),
                truncated_rows=self.truncated_rows,
                device=_device_name(self.base.device),
                dtype=str(self.base.dtype).removeprefix("torch."),
                load_in=self.base.load_in,
                threads=torch.get_num_threads(),
                processes=distributed.size(),
            ),
            versions=lora.versions(),
        )


def prepare(config: TrainConfig, notify: Listener = ignore) -> Job:
    """Base, data and update in memory, seeded: the same configuration gives the same job."""
    config, parent = _with_parent(config)
    if parent is not None and config.eval_dataset:
        notify(evaluation.as_held_out(config.eval_dataset))
    # Before the base: it may be wrong, and the base may be long in coming.
    corpus = distributed.once(lambda: load_corpus(config, notify))
    base = _open_base(config, parent, notify)
    source = base.source
    found = {"base": source.name, "revision": source.revision, "load_in": base.load_in}
    config = config.model_copy(update=found | {"dtype": str(base.dtype).removeprefix("torch.")})
    if parent is not None:
        lora.check_base(parent, base, force=config.force, notify=notify)
        config = _with_targets(config, parent, base)
    if config.batch_size is None:
        size = BATCH_SIZE_CPU if base.device.type == "cpu" else BATCH_SIZE_GPU
        config = config.model_copy(update={"batch_size": size})
    if config.max_length > base.context and "max_length" not in config.model_fields_set:
        notify(Notice(f"Rows are cut at {base.context} tokens: {source.name} looks back on no more."))
        config = config.model_copy(update={"max_length": base.context})
    if config.max_length > base.context:
        raise TrainingError(
            f"max_length is {config.max_length}, and {source.name} looks back on {base.context} tokens at the most."
        )
    isolated = _rows_are_isolated(base)
    by_row = base.device.type == "cpu" and isolated and _attends_by_row(base)
    if config.packing and not isolated:
        if "packing" in config.model_fields_set:
            raise TrainingError(f"{source.name} cannot tell packed rows apart: leave --packing out.")
        notify(Notice(f"Rows are padded, not packed: {source.name} cannot tell packed rows apart."))
        config = config.model_copy(update={"packing": False})
    notify(Progress("tokenising", 0, 1))
    chunk = config.long_rows == "chunk"
    most = None if chunk else config.max_length
    rows, truncated = distributed.once(
        lambda: tokens.cut(tokens.encode(base.tokenizer, corpus.train, most=most), config.max_length, chunk=chunk)
    )
    notify(Progress("tokenising", 1, 1))
    if without := sum(not tokens.predictions(row) for row in rows):
        notify(
            Notice(
                f"{without:,} rows are left out: within {config.max_length} tokens there is nothing to learn in them."
            )
        )
        rows = [row for row in rows if tokens.predictions(row)]
    if not rows:
        raise TrainingError("No row has anything to learn in it: raise --max-length, or give other data.")
    held_out_texts = corpus.held_out[: config.eval_rows]
    held_out = evaluation.encode_held_out(base, held_out_texts)
    if lost := len(held_out_texts) - len(held_out):
        notify(
            Notice(
                f"{lost:,} held-out rows are not measured: within {HELD_OUT_LENGTH} tokens nothing is learnt in them."
            )
        )
    if not held_out:
        raise TrainingError("No held-out row can be measured: give others with --eval-dataset.")
    return _begin(
        Job(
            config=config,
            base=base,
            corpus=corpus,
            model=None,
            sequences=tokens.Sequences(rows, config.max_length, packing=config.packing),
            held_out=held_out,
            held_out_texts=held_out_texts,
            truncated_rows=truncated,
            parent=parent,
            by_row=by_row,
            notify=notify,
        )
    )


def _open_base(config: TrainConfig, parent: Adapter | None, notify: Listener) -> Base:
    """The base in memory. The first process finds it, fetches it where it must, and decides on its numbers; the others follow."""
    bases: list[Base] = []

    def decide() -> dict[str, Any]:
        how = {"device": config.device, "dtype": config.dtype, "load_in": config.load_in}
        bases.append(lora.open_base(parent, config.base, config.revision, **how, notify=notify))
        source, dtype = bases[0].source, str(bases[0].dtype).removeprefix("torch.")
        return {"base": source.name, "revision": source.revision, "dtype": dtype, "load_in": bases[0].load_in}

    decided = distributed.once(decide)
    base = bases[0] if bases else lora.open_base(None, **decided, device=config.device)
    if distributed.size() > 1 and len(set(distributed.gather(base.source.fingerprint))) > 1:
        error = TrainingError(
            f"The processes have different weights under the name {base.source.name}: give all the same."
        )
        raise distributed.shared(error)
    return base


def renew(job: Job, config: TrainConfig) -> Job:
    """The job of another configuration on the same base and rows: it may differ in rank, alpha, learning rate, steps, name.

    The update of `job` is taken off the base, so that job is of no more use.
    """
    job.release()
    kept = ("base", "revision", "dtype", "load_in", "batch_size", "max_length", "packing", "method", "targets")
    of_parent = ("rank", "split_salt", "parent_sha256") if job.parent is not None else ()
    settings = {name: getattr(job.config, name) for name in (*kept, *of_parent)}
    return _begin(replace(job, config=config.model_copy(update=settings)))


def _begin(job: Job) -> Job:
    """The job with a fresh update, seeded."""
    base, config = job.base, job.config
    if config.learning_rate is None:
        config = config.model_copy(update={"learning_rate": METHODS[config.method].learning_rate})
    if config.method in ("dora", "eva") and sharding.parts() > 1:
        error = ConfigError(
            f"{config.method} looks at all of the base before it begins, and no process has that: choose another --method."
        )
        raise distributed.shared(error)
    set_seed(config.seed)
    model = lora.wrap(base, config, job.parent)
    if config.method == "eva":
        job.notify(Progress("looking at how the text excites each layer", 0, 1))
    methods.start(base, model, config, job.sequences)
    trained, frozen = lora.counts(model)
    job.notify(
        Notice(
            f"{trained:,} of {trained + frozen:,} parameters are trained ({trained / (trained + frozen):.2%}); "
            f"the adapter will take {trained * 4 / 1e6:.1f} MB."
        )
    )
    job = replace(job, config=config, model=model)
    if config.checkpointing == "on":
        job.compute_again()
    return job


def _with_parent(config: TrainConfig) -> tuple[TrainConfig, Adapter | None]:
    """The adapter to go on from, where there is one, and the configuration with what the new one shares with it.

    Its split salt too: with another, rows that the parent was trained on would be held out.
    """
    if config.parent is None:
        return config, None
    parent = Library(config.adapters_dir).get(config.parent)
    if config.parent_sha256 not in (None, parent.sha256):
        raise ConfigError(
            f"{parent.path} has other weights (sha256 {parent.sha256[:12]}) than those to go on from "
            f"({str(config.parent_sha256)[:12]}): restore those, or leave --from-sha256 out to go on from these."
        )
    data = parent.manifest.data if parent.manifest else None
    given = config.model_fields_set
    shared: list[tuple[str, Any, Any, bool]] = [("rank", config.rank, parent.rank, "rank" in given)]
    shared += [("alpha", config.alpha, parent.config["lora_alpha"], config.alpha is not None)]
    theirs = "dora" if parent.config.get("use_dora") else "rslora" if parent.config.get("use_rslora") else "lora"
    method = "lora+" if config.method == "lora+" and theirs == "lora" else theirs
    shared += [("method", config.method, method, "method" in given)]
    if data is not None and data.split_salt is not None:
        shared += [("split_salt", config.split_salt, data.split_salt, "split_salt" in given)]
    _refuse_other(parent, [(name, ours, theirs) for name, ours, theirs, chosen in shared if chosen and ours != theirs])
    if data is not None and data.split_salt is None and config.eval_dataset is None:
        raise ConfigError(
            f"{parent.name} was blended from adapters with different --split-salt, so no rows are held out for all of it: name "
            "others to measure on with --eval-dataset."
        )
    salt = (data and data.split_salt) or config.split_salt
    same = {"method": method, "rank": parent.rank, "split_salt": salt, "parent_sha256": parent.sha256}
    return config.model_copy(update=same), parent


def _with_targets(config: TrainConfig, parent: Adapter, base: Base) -> TrainConfig:
    """The configuration with the targets of the parent, as this base calls them."""
    theirs = lora.short_targets(base.model, parent.modules)
    if "targets" in config.model_fields_set and lora.resolve_targets(base.model, config.targets) != theirs:
        _refuse_other(parent, [("targets", config.targets, ", ".join(theirs))])
    return config.model_copy(update={"targets": ",".join(theirs)})


def _refuse_other(parent: Adapter, different: list[tuple[str, Any, Any]]) -> None:
    if different:
        text = "; ".join(f"{name} is {ours}, and that of {parent.name} {theirs}" for name, ours, theirs in different)
        raise ConfigError(f"{text}: an adapter that goes on from another keeps these, so leave them out.")


@dataclass(frozen=True)
class PreviewedRow:
    """A training row as the model will see it. `tokens` are texts; `labels` says which of them are learnt."""

    before: str
    after: str
    tokens: list[str]
    labels: list[bool]


def preview(config: TrainConfig, count: int, notify: Listener = ignore) -> list[PreviewedRow]:
    """The first `count` training rows, cleaned, tokenised and cut as a run would. Loads no weights."""
    config, parent = _with_parent(config)
    tokenizer = load_tokenizer(lora.base_of(parent, config.base, config.revision, notify))
    chunk = config.long_rows == "chunk"
    rows = []
    for before, after in load_corpus(config, notify).previews[:count]:
        encoded = tokens.encode(tokenizer, [after], most=None if chunk else config.max_length)
        pieces, _ = tokens.cut(encoded, config.max_length, chunk=chunk)
        batches = [tokens.collate([[piece]], tokenizer.pad_token_id) for piece in pieces]
        ids = [token for batch in batches for token in batch["input_ids"][0].tolist()]
        labels = [label != tokens.NO_LABEL for batch in batches for label in batch["labels"][0].tolist()]
        rows.append(
            PreviewedRow(before, after.removeprefix(chat.MARK), [tokenizer.decode([token]) for token in ids], labels)
        )
    return rows


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _logits(base: Base, *rows: tokens.Row, bounds: bool = False) -> torch.Tensor:
    """(tokens, vocabulary) of rows in one sequence."""
    batch = tokens.collate([rows], base.tokenizer.pad_token_id, bounds=bounds)
    batch.pop("labels")
    with torch.no_grad():
        found = base.model(**{name: tensor.to(base.device) for name, tensor in batch.items()}, use_cache=False).logits
    alone: torch.Tensor = found[0].float().cpu()
    return alone


def _differ(base: Base, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    tolerance = (1e-3 if base.dtype == torch.float32 else 5e-2) * float(theirs.abs().max())
    return bool((ours - theirs).abs().max() > tolerance)


def _rows_are_isolated(base: Base) -> bool:
    """Whether packed rows have the logits that they have alone: asked of the model itself, for some kinds never look at
    position ids. Raises BaseModelError for a model that looks ahead, of which no loss would mean anything."""
    first, second = tokens.probe(len(base.tokenizer))
    alone = _logits(base, second)
    changed = second.copy()
    changed[-1] = first[-1]
    if _differ(base, _logits(base, changed)[:-1], alone[:-1]):
        raise BaseModelError(f"{base.source.name} looks at the text ahead: it is no causal language model.")
    return not _differ(base, _logits(base, first, second)[len(first) :], alone)


def _attends_by_row(base: Base) -> bool:
    """Have packed rows attend by themselves, told where they begin, if that gives this model the logits it had."""
    rows = tokens.probe(len(base.tokenizer))
    before = _logits(base, *rows)
    if not fast.attend_by_row(base.model):
        return False
    with contextlib.suppress(TypeError):  # a model that cannot be told
        if not _differ(base, _logits(base, *rows, bounds=True), before):
            return True
    fast.attend_by_row(base.model, on=False)
    return False


def save_adapter(job: Job, tensors: dict[str, torch.Tensor], manifest: Manifest, folder: Path) -> None:
    """Weights, config, manifest and run.yaml into a folder that nobody reads yet."""
    lora.save(tensors, job.model.peft_config[lora.TRAINED], folder)
    (folder / store.MANIFEST).write_text(
        manifest.model_copy(update={"weights": store.weights_of(store.read(folder))}).to_json(), encoding="utf-8"
    )
    # Repeating a run must not silently replace what it repeats.
    (folder / store.RUN).write_text(to_yaml(job.config.model_copy(update={"overwrite": False})), encoding="utf-8")
