"""Load what a run trains on: the base model, the data as token sequences, and the parent adapter.

None of it depends on rank, learning rate or number of steps, so the trials of a sweep share it.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch

from .. import distributed, evaluation
from ..adapters.adapter import Adapter
from ..adapters.library import Library
from ..config import (
    BATCH_SIZE_CPU,
    BATCH_SIZE_GPU,
    HELD_OUT,
    HELD_OUT_MAX_TOKENS,
    MethodName,
    ModelOptions,
    TrainConfig,
    is_conversation,
)
from ..data import chat_template, eval_sets, packing, tokenization
from ..data.dataset import Dataset, describe_data, load_dataset
from ..errors import ConfigError, EventHandler, Notice, Progress, TrainingError, ignore_events
from ..models import added_tokens, loading, lora, packing_checks
from ..models.added_tokens import AddedTokens
from ..models.loading import LoadedBase
from ..models.targets import TargetModules, describe_targets, resolve_target_modules
from ..models.tokenizer import load_adapter_tokenizer
from ..text import format_count, format_rows


@dataclass(frozen=True)
class TrainingInputs:
    """Base model and data of a run, with the settings that follow from them.

    With streaming, `dataset` and `sequences` hold the first rows of the stream.
    """

    base: LoadedBase
    parent: Adapter | None
    dataset: Dataset
    sequences: packing.PackedSequences
    held_out: list[tokenization.TokenIds]
    held_out_texts: list[str]
    measured_texts: list[str]  # text of each row in `held_out`
    text_use: tokenization.TextUse
    varlen_attention: bool  # packed rows are told apart by `cu_seq_lens_q`
    kernels: str | None  # build of the C kernels, if decoder blocks are fused
    streaming: bool
    batch_size: int
    gradient_accumulation: int
    max_length: int
    packing: bool
    method: MethodName
    target_modules: str
    targets: TargetModules
    split_salt: str
    added: AddedTokens | None  # tokens that the base does not have

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step of all processes together."""
        return self.batch_size * self.gradient_accumulation * distributed.world_size()

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one pass over the rows; None for a stream, whose length is unknown."""
        return None if self.streaming else math.ceil(len(self.sequences) / self.sequences_per_step)

    def collate(self, items: Sequence[Sequence[tokenization.TokenIds]]) -> dict[str, torch.Tensor]:
        """Make a batch of sequences, each a list of rows."""
        self.base.check_token_ids(row for rows in items for row in rows)
        return packing.collate(items, self.base.tokenizer.pad_token_id, cu_seqlens=self.varlen_attention)

    def forward(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run the model in front of its LM head: returns what `lm_head.nll` takes as logits."""
        inputs = {name: tensor.to(self.base.device) for name, tensor in batch.items() if name != "labels"}
        with self.base.lm_head.skip_lm_head():
            return cast("torch.Tensor", model(**inputs, use_cache=False).logits)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], predictions: torch.Tensor | int
    ) -> torch.Tensor:
        """Compute the loss of a batch: mean negative log-likelihood per prediction, in nats.

        Args:
            predictions: labels in all batches of the optimizer step, of which this is one.
        """
        labels = batch["labels"].to(self.base.device)
        return self.base.lm_head.nll(self.forward(model, batch), labels).sum() / predictions


def load_inputs(requested: TrainConfig, notify: EventHandler) -> TrainingInputs:
    """Load parent, data and base model, and tokenize.

    Raises:
        LoraTunerError: a setting contradicts the parent, the base or the data.
    """
    parent = load_parent(requested)
    # Before the base: errors in the data are found sooner than a base is downloaded.
    dataset = distributed.run_on_rank_zero(partial(load_rows, requested, parent, notify))
    if parent is not None and dataset.eval_dataset not in (None, HELD_OUT):
        notify(eval_sets.eval_dataset_notice(str(dataset.eval_dataset)))
    base = _load_base_on_all_ranks(requested, parent, notify)
    if parent is not None:
        lora.check_base(parent, base, model_options(requested, notify))
        own_tokenizer = load_adapter_tokenizer(parent, base, ModelOptions(force=requested.force))
        own_template = own_tokenizer and own_tokenizer.chat_template
        if own_template not in (None, base.tokenizer.chat_template) and is_conversation(dataset.format):
            notify(
                Notice(
                    f"{parent.name} has its own chat template; training uses that of the base, as does its result."
                )
            )
    added = added_tokens.add_tokens(base, requested.add_tokens, parent)
    targets = _choose_targets(requested, parent, base)
    lora.check_experts_supported(requested, targets)
    max_length = _choose_max_length(requested, base, notify)
    paths = packing_checks.enable_fast_paths(base)
    use_packing = requested.packing and paths.isolated
    if requested.packing and not paths.isolated:
        if "packing" in requested.model_fields_set:
            raise TrainingError(f"{base.files.name} does not isolate packed rows: leave out --packing.")
        notify(Notice(f"Rows are padded, not packed: {base.files.name} does not isolate packed rows."))
    invalid: tokenization.InvalidRows = {}
    held_out_texts = dataset.held_out[: requested.eval_rows]
    held_out = evaluation.encode_measured(base, held_out_texts, invalid)
    measured_texts = [held_out_texts[index] for index in held_out]
    rows, text_use = _tokenize(requested, dataset, base, max_length, invalid, notify)
    added_tokens.check_used(added, rows, notify, streaming=requested.streaming)
    held_out_texts = [text for text in held_out_texts if text not in invalid]
    _check_held_out(held_out, held_out_texts, notify)
    return TrainingInputs(
        base=base,
        parent=parent,
        dataset=dataset,
        sequences=packing.PackedSequences(
            [row for source_rows in rows for row in source_rows],
            max_length,
            packing=use_packing,
            source_rows=[*map(len, rows)] if dataset.weights else (),
        ),
        held_out=[*held_out.values()],
        held_out_texts=held_out_texts,
        measured_texts=measured_texts,
        text_use=text_use,
        varlen_attention=paths.varlen_attention,
        kernels=paths.kernels,
        streaming=requested.streaming,
        batch_size=requested.batch_size or (BATCH_SIZE_CPU if base.device.type == "cpu" else BATCH_SIZE_GPU),
        gradient_accumulation=requested.gradient_accumulation,
        max_length=max_length,
        packing=use_packing,
        method=_choose_method(requested, parent),
        target_modules=",".join(targets.names) if parent else requested.target_modules,
        targets=targets,
        split_salt=str(_choose_split(requested, parent)["split_salt"]),
        added=added,
    )


def model_options(requested: TrainConfig, notify: EventHandler) -> ModelOptions:
    """Return the settings that select the base model."""
    return ModelOptions(
        base=requested.base,
        revision=requested.revision,
        device=requested.device,
        dtype=requested.dtype,
        load_in=requested.load_in,
        threads=requested.threads,
        force=requested.force,
        notify=notify,
    )


def load_rows(requested: TrainConfig, parent: Adapter | None, notify: EventHandler) -> Dataset:
    """Load the rows, split as the parent's were: else rows it was trained on would be held out."""
    changes = _choose_split(requested, parent)
    data = parent.manifest.data if parent and parent.manifest else None
    if parent and data and data.group_by != changes["group_by"] and requested.other_eval_dataset is None:
        units = [name or "row" for name in (data.group_by, changes["group_by"])]
        notify(
            Notice(
                f"{parent.name} holds out by {units[0]}, and this run by {units[1]}: rows that "
                f"{parent.name} was trained on, if they are here, may count as held out."
            )
        )
    if requested.clean == "auto" and data is not None and data.clean is not None:
        changes["clean"] = data.clean
    return load_dataset(requested.model_copy(update=changes), notify)


def _load_base_on_all_ranks(requested: TrainConfig, parent: Adapter | None, notify: EventHandler) -> LoadedBase:
    """Load the base model. Rank zero downloads it and chooses its precision first."""
    bases: list[LoadedBase] = []

    def load_on_rank_zero() -> ModelOptions:
        base = loading.open_base(parent, model_options(requested, notify), training=True)
        bases.append(base)
        return replace(
            model_options(requested, ignore_events),
            base=base.files.name,
            revision=base.files.revision,
            dtype=dtype_name(base.dtype),
            load_in=base.load_in,
        )

    chosen = distributed.run_on_rank_zero(load_on_rank_zero)
    base = bases[0] if bases else loading.open_base(None, chosen, training=True)
    if distributed.world_size() > 1 and len(set(distributed.all_gather(base.files.fingerprint))) > 1:
        raise distributed.share_error(
            TrainingError(
                f"The processes loaded different weights for {base.files.name}: use the same base in all of them."
            )
        )
    return base


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Settings shared with the parent


def load_parent(requested: TrainConfig) -> Adapter | None:
    """Load the adapter to continue from, if there is one.

    Raises:
        ConfigError: it has other weights than the expected ones, or other settings than requested.
    """
    if requested.parent is None:
        return None
    parent = Library(requested.adapters_dir).get(requested.parent)
    if requested.parent_sha256 not in (None, parent.sha256):
        raise ConfigError(
            f"{parent.path} has weights with sha256 {parent.sha256[:12]}, but {str(requested.parent_sha256)[:12]} is "
            "expected: restore them, or leave out --from-sha256 to continue from these."
        )
    _refuse_conflicts(
        requested,
        parent,
        {
            "rank": parent.rank,
            "alpha": parent.config["lora_alpha"],
            "method": _choose_method(requested, parent),
            **_choose_split(requested, parent),
        },
    )
    data = parent.manifest.data if parent.manifest else None
    if data is not None and data.split_salt is None and requested.other_eval_dataset is None:
        raise ConfigError(
            f"{parent.name} was blended from adapters with different --split-salt, so no rows are held out for all of "
            "them: give --eval-dataset."
        )
    return parent


def _refuse_conflicts(requested: TrainConfig, parent: Adapter, settings: dict[str, object]) -> None:
    """Raise ConfigError when a requested setting differs from the parent's."""
    conflicts = [
        f"{name} is {getattr(requested, name)}, but {parent.name} has {value}"
        for name, value in settings.items()
        if name in requested.model_fields_set and getattr(requested, name) not in (None, value)
    ]
    if conflicts:
        raise ConfigError(f"{'; '.join(conflicts)}: with --from these come from the parent, so leave them out.")


def _choose_method(requested: TrainConfig, parent: Adapter | None) -> MethodName:
    if parent is None:
        return requested.method
    if parent.config.get("use_dora"):
        return "dora"
    if parent.config.get("use_rslora"):
        return "rslora"
    return "lora+" if requested.method == "lora+" else "lora"


def _choose_split(requested: TrainConfig, parent: Adapter | None) -> dict[str, str | None]:
    """Return the settings of the split: those of the parent, its groups only on the same dataset."""
    data = parent.manifest.data if parent and parent.manifest else None
    salt = requested.split_salt if data is None or data.split_salt is None else data.split_salt
    name = " + ".join(requested.dataset_names)
    group_by = data.group_by if data is not None and data.name == name else requested.group_by
    return {"split_salt": salt, "group_by": group_by}


def _choose_targets(requested: TrainConfig, parent: Adapter | None, base: LoadedBase) -> TargetModules:
    """Return the layers of the parent, or the requested ones."""
    if parent is None:
        return resolve_target_modules(base.model, requested.target_modules)
    targets = describe_targets(base.model, parent.modules)
    chosen = "target_modules" in requested.model_fields_set
    if chosen and resolve_target_modules(base.model, requested.target_modules).modules != targets.modules:
        _refuse_conflicts(requested, parent, {"target_modules": ", ".join(targets.names)})
    return targets


# Rows


def _choose_max_length(requested: TrainConfig, base: LoadedBase, notify: EventHandler) -> int:
    """Return the length in tokens at which rows are cut: at most the context of the base."""
    name, context = base.files.name, base.max_context
    if requested.max_length <= context:
        return requested.max_length
    if "max_length" in requested.model_fields_set:
        raise TrainingError(
            f"max_length is {requested.max_length}, but the context length of {name} is {context} tokens: lower --max-length."
        )
    notify(Notice(f"Rows have at most {context} tokens, the context length of {name}."))
    return context


def _tokenize(
    requested: TrainConfig,
    dataset: Dataset,
    base: LoadedBase,
    max_length: int,
    invalid: tokenization.InvalidRows,
    notify: EventHandler,
) -> tuple[list[list[tokenization.TokenIds]], tokenization.TextUse]:
    """Tokenize the training rows. Returns those of each source with predictions, and the share of
    the text in them.

    Args:
        invalid: Held-out rows that the chat template cannot write; such training rows are added,
            and all of them are left out of the dataset.
    """

    def encode() -> tuple[list[list[tokenization.TokenIds]], tokenization.TextUse, tokenization.InvalidRows]:
        use, rows = tokenization.TextUse(), list[list[tokenization.TokenIds]]()
        for source in dataset.sources:
            encoded, source_use = tokenization.encode_rows(
                base.tokenizer, source.train, max_length, requested.long_rows, invalid
            )
            rows.append(encoded)
            use += source_use
        return rows, use, invalid

    notify(Progress("tokenizing", 0, 1))
    rows, use, all_invalid = distributed.run_on_rank_zero(encode)
    invalid.update(all_invalid)
    base.check_token_ids(row for source_rows in rows for row in source_rows)
    notify(Progress("tokenizing", 1, 1))
    dataset.leave_out(invalid, requested.max_invalid, notify)
    _notify_rendered(base, dataset, notify)
    kept = [[row for row in source_rows if tokenization.count_predictions(row)] for source_rows in rows]
    for notice in describe_data(dataset, requested, use):
        notify(Notice(notice))
    if use.skipped_rows:
        rows_text = format_rows(use.skipped_rows)
        notify(Notice(f"Skipped {rows_text} with nothing to learn in the first {max_length} tokens."))
    for source, source_rows in zip(dataset.sources, kept, strict=True):
        if not source_rows:
            name = f" of {source.name}" if len(kept) > 1 else ""
            raise TrainingError(f"No row{name} has anything to learn: raise --max-length, or use other data.")
    return kept, use


def _notify_rendered(base: LoadedBase, dataset: Dataset, notify: EventHandler) -> None:
    """Report texts that a chat template has rendered, of this base or another."""
    texts = [text for text in dataset.train if chat_template.looks_rendered(text)]
    own = sum(chat_template.is_rendered(base.tokenizer, text) for text in texts)
    if own:
        notify(
            Notice(
                f"A chat template has rendered {own:,} of {len(dataset.train):,} texts: their special tokens are read as such. "
                "All of the text is learned; rows with `messages` would train on the answers alone."
            )
        )
    if len(texts) > own:
        notify(
            Notice(
                f"A chat template of another base has rendered {len(texts) - own:,} of {len(dataset.train):,} texts: its marks "
                f"are plain text for {base.files.name}. Give rows with `messages` to use the template of this base."
            )
        )


def _check_held_out(held_out: Collection[int], texts: list[str], notify: EventHandler) -> None:
    """Report held-out rows without predictions. Raises TrainingError when there is nothing to predict."""
    if len(held_out) < len(texts):
        notify(
            Notice(
                f"Skipped {format_count(len(texts) - len(held_out), 'held-out row')} with nothing to predict in the "
                f"first {HELD_OUT_MAX_TOKENS} tokens."
            )
        )
    if not held_out:
        raise TrainingError("No held-out row has anything to predict: give --eval-dataset.")
