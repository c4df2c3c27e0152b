"""Everything that a run needs, in memory: base, data, update. And what is known of it, as a manifest.

Surprise: preparing is part of what is repeated. The same configuration gives the same job, down to the random numbers of
the fresh update, whatever was measured or trained in this process before.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import set_seed

from .. import distributed, evaluation
from ..adapters.adapter import Adapter
from ..adapters.library import Library
from ..adapters.manifest import DatasetInfo, Manifest, RunInfo, utc_timestamp
from ..config import BATCH_SIZE_CPU, BATCH_SIZE_GPU, HELD_OUT_MAX_TOKENS, METHODS, ModelOptions, TrainConfig
from ..data import chat, packing, tokenization
from ..data.dataset import Dataset, load_dataset
from ..data.splitting import content_hash
from ..errors import BaseModelError, ConfigError, EventHandler, Notice, Progress, TrainingError, ignore_events
from ..models import fsdp, initialization, kernels, loading, lora
from ..models.loading import LoadedBase, load_tokenizer
from ..models.resolve import quiet_transformers


@dataclass
class TrainingSetup:
    """A prepared run. `config` is resolved but for its steps until training fixes them. Of a stream, corpus and sequences are
    those of its first rows."""

    config: TrainConfig
    base: LoadedBase
    dataset: Dataset
    model: Any  # a PeftModel
    sequences: packing.PackedSequences
    held_out: list[tokenization.TokenIds]
    held_out_texts: list[str]
    truncated_rows: int
    parent: Adapter | None
    varlen_attention: bool  # packed rows attend by themselves, told where they begin
    notify: EventHandler

    @property
    def batch_size(self) -> int:
        assert self.config.batch_size is not None
        return self.config.batch_size

    @property
    def learning_rate(self) -> float:
        assert self.config.learning_rate is not None
        return self.config.learning_rate

    def collate(self, items: Sequence[Sequence[tokenization.TokenIds]]) -> dict[str, torch.Tensor]:
        return packing.collate(items, self.base.tokenizer.pad_token_id, cu_seqlens=self.varlen_attention)

    def enable_gradient_checkpointing(self) -> None:
        """From now on keep what goes into each block alone, and compute the rest again on the way back (Chen et al., 2016,
        arXiv:1604.06174). The gradients are the same. Raises TrainingError for a model that cannot."""
        try:
            with quiet_transformers():
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise TrainingError(f"{self.base.files.name} cannot compute its activations again: {error}") from error

    def remove_lora(self) -> None:
        """Take the update off the base, which is then as it came."""
        with quiet_transformers():
            self.model.gradient_checkpointing_disable()
            self.model.unload()

    @property
    def sequences_per_step(self) -> int:
        """Of all processes together."""
        return self.batch_size * self.config.gradient_accumulation * distributed.world_size()

    @property
    def steps_per_epoch(self) -> int | None:
        """None of a stream: nobody knows how many rows it has."""
        if self.config.streaming:
            return None
        return math.ceil(len(self.sequences) / self.sequences_per_step)

    @cached_property
    def manifest(self) -> Manifest:
        """What is known before the first step."""
        config, corpus = self.config, self.dataset
        return Manifest(
            created=utc_timestamp(),
            base=self.base.files.base_info(self.base.tokenizer_hash),
            data=DatasetInfo(
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
            parents=[self.parent.parent_info()] if self.parent else [],
            run=RunInfo(
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
                processes=distributed.world_size(),
            ),
            versions=lora.library_versions(),
        )


def prepare_training(config: TrainConfig, notify: EventHandler = ignore_events) -> TrainingSetup:
    """Base, data and update in memory, seeded: the same configuration gives the same job."""
    config, parent = _with_parent(config)
    if parent is not None and config.eval_dataset:
        notify(evaluation.eval_dataset_notice(config.eval_dataset))
    # Before the base: it may be wrong, and the base may be long in coming.
    corpus = distributed.run_on_rank_zero(lambda: load_dataset(config, notify))
    base = _load_base_everywhere(config, parent, notify)
    source = base.files
    found = {"base": source.name, "revision": source.revision, "load_in": base.load_in}
    config = config.model_copy(update=found | {"dtype": str(base.dtype).removeprefix("torch.")})
    if parent is not None:
        lora.check_base(parent, base, _model_options(config, notify))
        config = _with_targets(config, parent, base)
    if config.batch_size is None:
        size = BATCH_SIZE_CPU if base.device.type == "cpu" else BATCH_SIZE_GPU
        config = config.model_copy(update={"batch_size": size})
    if config.max_length > base.max_context and "max_length" not in config.model_fields_set:
        notify(Notice(f"Rows are cut at {base.max_context} tokens: {source.name} looks back on no more."))
        config = config.model_copy(update={"max_length": base.max_context})
    if config.max_length > base.max_context:
        raise TrainingError(
            f"max_length is {config.max_length}, and {source.name} looks back on {base.max_context} tokens at the most."
        )
    isolated = _packing_is_isolated(base)
    by_row = base.device.type == "cpu" and isolated and _try_varlen_attention(base)
    if config.packing and not isolated:
        if "packing" in config.model_fields_set:
            raise TrainingError(f"{source.name} cannot tell packed rows apart: leave --packing out.")
        notify(Notice(f"Rows are padded, not packed: {source.name} cannot tell packed rows apart."))
        config = config.model_copy(update={"packing": False})
    notify(Progress("tokenising", 0, 1))
    chunk = config.long_rows == "chunk"
    most = None if chunk else config.max_length
    rows, truncated = distributed.run_on_rank_zero(
        lambda: tokenization.truncate(
            tokenization.encode_texts(base.tokenizer, corpus.train, max_tokens=most), config.max_length, chunk=chunk
        )
    )
    notify(Progress("tokenising", 1, 1))
    if without := sum(not tokenization.count_predictions(row) for row in rows):
        notify(
            Notice(
                f"{without:,} rows are left out: within {config.max_length} tokens there is nothing to learn in them."
            )
        )
        rows = [row for row in rows if tokenization.count_predictions(row)]
    if not rows:
        raise TrainingError("No row has anything to learn in it: raise --max-length, or give other data.")
    held_out_texts = corpus.held_out[: config.eval_rows]
    held_out = evaluation.encode_held_out(base, held_out_texts)
    if lost := len(held_out_texts) - len(held_out):
        notify(
            Notice(
                f"{lost:,} held-out rows are not measured: within {HELD_OUT_MAX_TOKENS} tokens nothing is learnt in them."
            )
        )
    if not held_out:
        raise TrainingError("No held-out row can be measured: give others with --eval-dataset.")
    return _with_fresh_lora(
        TrainingSetup(
            config=config,
            base=base,
            dataset=corpus,
            model=None,
            sequences=packing.PackedSequences(rows, config.max_length, packing=config.packing),
            held_out=held_out,
            held_out_texts=held_out_texts,
            truncated_rows=truncated,
            parent=parent,
            varlen_attention=by_row,
            notify=notify,
        )
    )


def _model_options(config: TrainConfig, notify: EventHandler) -> ModelOptions:
    names = ("base", "revision", "device", "dtype", "load_in", "force")
    return ModelOptions(**{name: getattr(config, name) for name in names}, notify=notify)


def _load_base_everywhere(config: TrainConfig, parent: Adapter | None, notify: EventHandler) -> LoadedBase:
    """The base in memory. The first process finds it, fetches it where it must, and decides on its numbers; the others follow."""
    bases: list[LoadedBase] = []

    def decide() -> dict[str, Any]:
        bases.append(loading.open_base(parent, _model_options(config, notify)))
        source, dtype = bases[0].files, str(bases[0].dtype).removeprefix("torch.")
        return {"base": source.name, "revision": source.revision, "dtype": dtype, "load_in": bases[0].load_in}

    decided = distributed.run_on_rank_zero(decide)
    base = bases[0] if bases else loading.open_base(None, ModelOptions(**decided, device=config.device))
    if distributed.world_size() > 1 and len(set(distributed.all_gather(base.files.fingerprint))) > 1:
        error = TrainingError(
            f"The processes have different weights under the name {base.files.name}: give all the same."
        )
        raise distributed.share_error(error)
    return base


def reconfigure(job: TrainingSetup, config: TrainConfig) -> TrainingSetup:
    """The job of another configuration on the same base and rows: it may differ in rank, alpha, learning rate, steps, name.

    The update of `job` is taken off the base, so that job is of no more use.
    """
    job.remove_lora()
    kept = ("base", "revision", "dtype", "load_in", "batch_size", "max_length", "packing", "method", "target_modules")
    of_parent = ("rank", "split_salt", "parent_sha256") if job.parent is not None else ()
    settings = {name: getattr(job.config, name) for name in (*kept, *of_parent)}
    return _with_fresh_lora(replace(job, config=config.model_copy(update=settings)))


def _with_fresh_lora(job: TrainingSetup) -> TrainingSetup:
    """The job with a fresh update, seeded."""
    base, config = job.base, job.config
    if config.learning_rate is None:
        config = config.model_copy(update={"learning_rate": METHODS[config.method].learning_rate})
    if config.method in ("dora", "eva") and fsdp.shard_count() > 1:
        error = ConfigError(
            f"{config.method} looks at all of the base before it begins, and no process has that: choose another --method."
        )
        raise distributed.share_error(error)
    set_seed(config.seed)
    model = lora.add_lora(base, config, job.parent)
    if config.method == "eva":
        job.notify(Progress("looking at how the text excites each layer", 0, 1))
    initialization.initialize(base, model, config, job.sequences)
    trained, frozen = lora.count_parameters(model)
    job.notify(
        Notice(
            f"{trained:,} of {trained + frozen:,} parameters are trained ({trained / (trained + frozen):.2%}); "
            f"the adapter will take {trained * 4 / 1e6:.1f} MB."
        )
    )
    job = replace(job, config=config, model=model)
    if config.gradient_checkpointing == "on":
        job.enable_gradient_checkpointing()
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
    _refuse_conflicts(
        parent, [(name, ours, theirs) for name, ours, theirs, chosen in shared if chosen and ours != theirs]
    )
    if data is not None and data.split_salt is None and config.eval_dataset is None:
        raise ConfigError(
            f"{parent.name} was blended from adapters with different --split-salt, so no rows are held out for all of it: name "
            "others to measure on with --eval-dataset."
        )
    salt = (data and data.split_salt) or config.split_salt
    same = {"method": method, "rank": parent.rank, "split_salt": salt, "parent_sha256": parent.sha256}
    return config.model_copy(update=same), parent


def _with_targets(config: TrainConfig, parent: Adapter, base: LoadedBase) -> TrainConfig:
    """The configuration with the targets of the parent, as this base calls them."""
    theirs = lora.shortest_target_names(base.model, parent.modules)
    if (
        "target_modules" in config.model_fields_set
        and lora.resolve_target_modules(base.model, config.target_modules) != theirs
    ):
        _refuse_conflicts(parent, [("target_modules", config.target_modules, ", ".join(theirs))])
    return config.model_copy(update={"target_modules": ",".join(theirs)})


def _refuse_conflicts(parent: Adapter, different: list[tuple[str, Any, Any]]) -> None:
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


def preview(config: TrainConfig, count: int, notify: EventHandler = ignore_events) -> list[PreviewedRow]:
    """The first `count` training rows, cleaned, tokenised and cut as a run would. Loads no weights."""
    config, parent = _with_parent(config)
    tokenizer = load_tokenizer(loading.base_for_adapter(parent, _model_options(config, notify)))
    chunk = config.long_rows == "chunk"
    rows = []
    for before, after in load_dataset(config, notify).previews[:count]:
        encoded = tokenization.encode_texts(tokenizer, [after], max_tokens=None if chunk else config.max_length)
        pieces, _ = tokenization.truncate(encoded, config.max_length, chunk=chunk)
        batches = [packing.collate([[piece]], tokenizer.pad_token_id) for piece in pieces]
        ids = [token for batch in batches for token in batch["input_ids"][0].tolist()]
        labels = [label != packing.IGNORE_INDEX for batch in batches for label in batch["labels"][0].tolist()]
        rows.append(
            PreviewedRow(
                before, after.removeprefix(chat.CHAT_MARK), tokenizer.batch_decode([[token] for token in ids]), labels
            )
        )
    return rows


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _packed_logits(base: LoadedBase, *rows: tokenization.TokenIds, bounds: bool = False) -> torch.Tensor:
    """(tokens, vocabulary) of rows in one sequence."""
    batch = packing.collate([rows], base.tokenizer.pad_token_id, cu_seqlens=bounds)
    batch.pop("labels")
    with torch.no_grad():
        found = base.model(**{name: tensor.to(base.device) for name, tensor in batch.items()}, use_cache=False).logits
    alone: torch.Tensor = found[0].float().cpu()
    return alone


def _logits_differ(base: LoadedBase, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    tolerance = (1e-3 if base.dtype == torch.float32 else 5e-2) * float(theirs.abs().max())
    return bool((ours - theirs).abs().max() > tolerance)


def _packing_is_isolated(base: LoadedBase) -> bool:
    """Whether packed rows have the logits that they have alone: asked of the model itself, for some kinds never look at
    position ids. Raises BaseModelError for a model that looks ahead, of which no loss would mean anything."""
    first, second = tokenization.probe_sequences(len(base.tokenizer))
    alone = _packed_logits(base, second)
    changed = second.copy()
    changed[-1] = first[-1]
    if _logits_differ(base, _packed_logits(base, changed)[:-1], alone[:-1]):
        raise BaseModelError(f"{base.files.name} looks at the text ahead: it is no causal language model.")
    return not _logits_differ(base, _packed_logits(base, first, second)[len(first) :], alone)


def _try_varlen_attention(base: LoadedBase) -> bool:
    """Have packed rows attend by themselves, told where they begin, if that gives this model the logits it had."""
    rows = tokenization.probe_sequences(len(base.tokenizer))
    before = _packed_logits(base, *rows)
    if not kernels.enable_varlen_attention(base.model):
        return False
    with contextlib.suppress(TypeError):  # a model that cannot be told
        if not _logits_differ(base, _packed_logits(base, *rows, bounds=True), before):
            return True
    kernels.enable_varlen_attention(base.model, on=False)
    return False
