"""Everything that a run needs, in memory: base, data, update. And what is known of it, as a manifest.

Surprise: preparing is part of what is repeated. The same configuration gives the same job, down to the random numbers of
the fresh update, whatever was measured or trained in this process before.
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from . import evaluation, files, lora, store, tokens
from .base_model import Base, find_base, load_base, load_tokenizer
from .config import BATCH_SIZE_CPU, BATCH_SIZE_GPU, TrainConfig, to_yaml
from .data import Corpus, content_hash, load_corpus
from .errors import BaseModelError, Listener, Notice, Progress, TrainingError, ignore
from .manifest import BaseFacts, DataFacts, Manifest, RunFacts, Weights, now


@dataclass
class Job:
    """A prepared run. `config` is resolved but for its steps until training fixes them."""

    config: TrainConfig
    base: Base
    corpus: Corpus
    model: Any  # a PeftModel
    sequences: tokens.Sequences
    held_out: list[tokens.Row]
    held_out_texts: list[str]
    truncated_rows: int
    notify: Listener

    @property
    def batch_size(self) -> int:
        assert self.config.batch_size is not None
        return self.config.batch_size

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.sequences) / (self.batch_size * self.config.accumulation))

    @cached_property
    def manifest(self) -> Manifest:
        """What is known before the first step."""
        import accelerate
        import datasets
        import peft
        import transformers

        source, config, corpus = self.base.source, self.config, self.corpus
        return Manifest(
            created=now(),
            base=BaseFacts(
                name=source.name,
                repo=source.repo,
                revision=source.revision,
                weights=source.weights,
                fingerprint=source.fingerprint,
                tokenizer=self.base.tokenizer_hash,
            ),
            data=DataFacts(
                name=corpus.name,
                source=corpus.source,
                hash=corpus.hash(),
                where=config.where,
                split_salt=config.split_salt,
                counts=asdict(corpus.counts),
                held_out_hash=content_hash(self.held_out_texts),
                held_out_rows=len(self.held_out_texts),
            ),
            run=RunFacts(
                steps=0,
                kept_step=0,
                tokens=0,
                seconds=0.0,
                sequences=len(self.sequences),
                truncated_rows=self.truncated_rows,
                device=_device_name(self.base.device),
                dtype=str(self.base.dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
            ),
            versions={
                module.__name__: module.__version__ for module in (torch, transformers, peft, datasets, accelerate)
            },
        )


def prepare(config: TrainConfig, notify: Listener = ignore) -> Job:
    """Base, data and update in memory, seeded: the same configuration gives the same job."""
    corpus = load_corpus(config, notify)  # first: it may be wrong, and the base may be long in coming
    source = find_base(config.base, config.revision, notify)
    config = config.model_copy(update={"base": source.name, "revision": source.revision})
    base = load_base(source, config.device, config.dtype)
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
    if config.packing and not isolated:
        if "packing" in config.model_fields_set:
            raise TrainingError(f"{source.name} cannot tell packed rows apart: leave --packing out.")
        notify(Notice(f"Rows are padded, not packed: {source.name} cannot tell packed rows apart."))
        config = config.model_copy(update={"packing": False})
    notify(Progress("tokenising", 0, 1))
    encoded = tokens.encode(base.tokenizer, corpus.train)
    rows, truncated = tokens.cut(encoded, config.max_length, chunk=config.long_rows == "chunk")
    notify(Progress("tokenising", 1, 1))
    held_out_texts = corpus.held_out[: config.eval_rows]
    set_seed(config.seed)
    model = lora.wrap(base, config)
    trained, frozen = lora.counts(model)
    notify(
        Notice(
            f"{trained:,} of {trained + frozen:,} parameters are trained ({trained / (trained + frozen):.2%}); "
            f"the adapter will take {trained * 4 / 1e6:.1f} MB."
        )
    )
    return Job(
        config=config,
        base=base,
        corpus=corpus,
        model=model,
        sequences=tokens.Sequences(rows, config.max_length, packing=config.packing),
        held_out=evaluation.encode_held_out(base, held_out_texts),
        held_out_texts=held_out_texts,
        truncated_rows=truncated,
        notify=notify,
    )


@dataclass(frozen=True)
class PreviewedRow:
    """A training row as the model will see it. `tokens` are texts; `labels` says which of them are learnt."""

    before: str
    after: str
    tokens: list[str]
    labels: list[bool]


def preview(config: TrainConfig, count: int, notify: Listener = ignore) -> list[PreviewedRow]:
    """The first `count` training rows, cleaned, tokenised and cut as a run would. Loads no weights."""
    tokenizer = load_tokenizer(find_base(config.base, config.revision, notify))
    rows = []
    for before, after in load_corpus(config, notify).previews[:count]:
        pieces, _ = tokens.cut(tokens.encode(tokenizer, [after]), config.max_length, chunk=config.long_rows == "chunk")
        batches = [tokens.collate([[piece]], tokenizer.pad_token_id) for piece in pieces]
        ids = [token for batch in batches for token in batch["input_ids"][0].tolist()]
        labels = [label != tokens.NO_LABEL for batch in batches for label in batch["labels"][0].tolist()]
        rows.append(PreviewedRow(before, after, [tokenizer.decode([token]) for token in ids], labels))
    return rows


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _rows_are_isolated(base: Base) -> bool:
    """Whether packed rows have the logits that they have alone: asked of the model itself, for some kinds never look at
    position ids. Raises BaseModelError for a model that looks ahead, of which no loss would mean anything."""
    ids = [token for token in range(40) if token not in base.tokenizer.all_special_ids][:16]
    first, second = np.array(ids, dtype=np.int32), np.array(ids[::-1], dtype=np.int32)

    def logits(*rows: tokens.Row) -> torch.Tensor:
        batch = tokens.collate([rows], base.tokenizer.pad_token_id)
        batch.pop("labels")
        with torch.inference_mode():
            found = base.model(
                **{name: tensor.to(base.device) for name, tensor in batch.items()}, use_cache=False
            ).logits
        alone: torch.Tensor = found[0].float().cpu()
        return alone

    alone = logits(second)
    tolerance = (1e-3 if base.dtype == torch.float32 else 5e-2) * float(alone.abs().max())
    changed = second.copy()
    changed[-1] = first[-1]
    if (logits(changed)[:-1] - alone[:-1]).abs().max() > tolerance:
        raise BaseModelError(f"{base.source.name} looks at the text ahead: it is no causal language model.")
    return bool((logits(first, second)[len(first) :] - alone).abs().max() <= tolerance)


def save_adapter(job: Job, tensors: dict[str, torch.Tensor], manifest: Manifest, folder: Path) -> None:
    """Weights, config, manifest and run.yaml into a folder that nobody reads yet."""
    lora.save(tensors, job.model.peft_config[lora.TRAINED], folder)
    weights = folder / store.WEIGHTS
    facts = Weights(
        sha256=files.sha256_file(weights),
        bytes=weights.stat().st_size,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
    )
    (folder / store.MANIFEST).write_text(manifest.model_copy(update={"weights": facts}).to_json(), encoding="utf-8")
    # Repeating a run must not silently replace what it repeats.
    (folder / store.RUN).write_text(to_yaml(job.config.model_copy(update={"overwrite": False})), encoding="utf-8")
