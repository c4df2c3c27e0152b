"""Load what a run trains on: the base model, the data as token sequences, and the parent adapter.

None of it depends on rank, learning rate or number of steps, so the trials of a sweep share it; those
that train on other numbers of rows share the base.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import cast

import torch

from .. import distributed
from ..adapters.adapter import Adapter
from ..adapters.library import Library
from ..config import (
    BATCH_SIZE_CPU,
    BATCH_SIZE_GPU,
    HELD_OUT,
    MethodName,
    ModelOptions,
    TrainConfig,
    is_conversation,
)
from ..data import eval_sets, packing
from ..data.dataset import Dataset, load_dataset
from ..data.packing import PackedRows
from ..errors import ConfigError, EventHandler, Notice, TrainingError, ignore_events
from ..models import added_tokens, loading, lora, packing_checks
from ..models.added_tokens import AddedTokens
from ..models.loading import LoadedBase
from ..models.targets import TargetModules, describe_targets, resolve_target_modules
from ..models.tokenizer import load_adapter_tokenizer
from .objectives import PreferenceObjective, disable_dropout, make_objective
from .rows import EncodedRows, encode_rows

_MODEL_FIELDS = ("input_ids", "position_ids", "cu_seq_lens_q")  # of a batch


@dataclass(frozen=True)
class TrainingInputs(EncodedRows):
    """Base model and rows of a run, with the settings that follow from them."""

    base: LoadedBase
    parent: Adapter | None
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
    objective: PreferenceObjective | None  # of preferences; None for the loss on text

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step of all processes together."""
        return self.batch_size * self.gradient_accumulation * distributed.world_size()

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one pass over the rows; None for a stream, whose length is unknown."""
        return None if self.streaming else math.ceil(len(self.sequences) / self.sequences_per_step)

    def collate(self, items: Sequence[PackedRows]) -> dict[str, torch.Tensor]:
        """Make a batch of sequences, each a list of rows."""
        self.base.check_token_ids(row for rows in items for row in rows)
        collate = partial(
            packing.collate,
            pad_id=self.base.tokenizer.pad_token_id,
            cu_seqlens=self.varlen_attention,
            pad_to_step=self.kernels is not None,
        )
        batch = collate(items)
        if self.objective is not None:
            self.objective.add_fields(batch, items, collate)
        return batch

    def forward(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run the model in front of its LM head: returns what `lm_head.nll` takes as logits."""
        inputs = {name: batch[name].to(self.base.device) for name in _MODEL_FIELDS if name in batch}
        with self.base.lm_head.skip_lm_head():
            return cast("torch.Tensor", model(**inputs, use_cache=False).logits)

    def nll(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute the negative log-likelihood of each next token that is a label, in nats: (items, length)."""
        return self.base.lm_head.nll(self.forward(model, batch), batch["labels"].to(self.base.device))

    def loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], count: torch.Tensor | int
    ) -> torch.Tensor:
        """Compute the loss of a batch: that of the objective, or on text.

        Args:
            count: `count` of all batches of the optimizer step, of which this is one.
        """
        if self.objective is None:
            return self.text_loss(model, batch, count)
        device = self.base.device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        return self.objective.loss(partial(self.nll, model), batch, torch.as_tensor(count, device=device))

    def text_loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], predictions: torch.Tensor | int
    ) -> torch.Tensor:
        """Compute the mean negative log-likelihood per prediction of a batch, in nats.

        Args:
            predictions: labels in all batches of the optimizer step, of which this is one.
        """
        return self.nll(model, batch).sum() / predictions

    def count(self, batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor | int:
        """Count what the loss of an optimizer step is divided by: labels, or as the objective counts."""
        if self.objective is None:
            return count_labels(batches)
        return self.objective.count(batches)


def count_labels(batches: Sequence[dict[str, torch.Tensor]]) -> int:
    """Count the labels in batches, and one where there is none."""
    return max(sum(int((batch["labels"] != packing.IGNORE_INDEX).sum()) for batch in batches), 1)


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
    encoded = encode_rows(requested, dataset, base, max_length, added, notify, use_packing=use_packing)
    objective = make_objective(requested, encoded, max_length)
    if objective is not None:
        notify(Notice(objective.describe()))
        disable_dropout(base.model)
    return TrainingInputs(
        base=base,
        parent=parent,
        **vars(encoded),
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
        objective=objective,
    )


def reload_rows(inputs: TrainingInputs, requested: TrainConfig, notify: EventHandler) -> TrainingInputs:
    """Load the rows of another trial of a sweep, with the base and all settings of `inputs`."""
    dataset = load_rows(requested, inputs.parent, notify)
    encoded = encode_rows(
        requested, dataset, inputs.base, inputs.max_length, inputs.added, notify, use_packing=inputs.packing
    )
    shared = {field.name: getattr(inputs, field.name) for field in fields(TrainingInputs)}
    objective = make_objective(requested, encoded, inputs.max_length)
    return TrainingInputs(**shared | vars(encoded) | {"objective": objective})


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
