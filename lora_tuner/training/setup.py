"""Prepare a run: load its inputs, add LoRA, and resolve the configuration.

The same configuration gives the same setup, down to the random initial weights, whatever was
measured or trained in this process before. Nothing is written.
"""

from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property

import torch
from peft import PeftModel
from transformers import set_seed

from .. import distributed
from ..adapters.gains import HeldOutLoss, gain_on
from ..adapters.library import adapter_name
from ..adapters.manifest import (
    SCHEMA_VERSION,
    DatasetInfo,
    EvalResult,
    Manifest,
    RateProbe,
    RunInfo,
    SourceInfo,
    utc_timestamp,
)
from ..config import DEFAULT_BETA, FILE_SETTINGS, PROBE, TrainConfig, is_conversation
from ..data.eval_sets import EvalSet
from ..data.prompts import held_out_prompts
from ..data.splitting import content_hash
from ..data.tokenization import TokenIds
from ..errors import (
    ConfigError,
    EventHandler,
    Notice,
    Progress,
    ignore_events,
)
from ..models import added_tokens, fsdp, fused_blocks, initialization, kernels, lora, replaced, replacement
from ..models.base_files import quiet_transformers
from ..text import describe_coverage, format_bytes, format_count
from . import profiling
from .inputs import TrainingInputs, dtype_name, load_inputs
from .label_result import label_info
from .learning_rate import ProbePlan, default_learning_rate, plan_run_probe
from .profiling import HeldOutCurve, StepProfile


@dataclass(frozen=True)
class TrainingSetup(TrainingInputs):
    """A prepared run: its inputs, the model with LoRA, and the resolved configuration.

    `learning_rate_origin` is a phrase for notices. `probe_plan` is that of the short runs which are
    to choose the learning rate, and `probe` their result; both are None if there are none.
    `profile` holds the measurement from which the number of steps follows, if one was needed;
    `curve` that of the held-out loss on a few rows, where `eval_every` is not given; `sweep` is the
    id of the sweep whose trial it is; `inexact` names facts that a resume has accepted as changed.
    """

    config: TrainConfig
    learning_rate: float
    learning_rate_origin: str
    max_steps: int
    model: PeftModel
    profile: StepProfile | None
    notify: EventHandler
    curve: HeldOutCurve | None
    sweep: str | None = None
    inexact: tuple[str, ...] = ()
    probe_plan: ProbePlan | None = None
    probe: RateProbe | None = None

    def remove_lora(self) -> None:
        """Remove the LoRA layers, so that the base can be used for another setup."""
        with quiet_transformers():
            self.model.gradient_checkpointing_disable()
            self.model.unload()
        for module in replaced.vocabulary_modules(self.base.model):
            replacement.remove_hooks(self.base.model.get_submodule(module))
        fused_blocks.update_fused_blocks(self.base.model)  # which then computes as after loading

    @property
    def eval_every(self) -> int | None:
        """Steps between two measurements of held-out rows; None without any."""
        return self.curve.every if self.curve else self.config.eval_every

    @property
    def measures_all_rows(self) -> bool:
        """True if all held-out rows are measured, even if fewer show the gain.

        They are where their number is given (as in a sweep), where more than the gain is measured on
        them, and where some have nothing to predict, so that the first rows are not the first texts.
        """
        is_asked = self.config.eval_rows is not None or self.config.eval_every is not None
        has_more = self.objective is not None or bool(self.dataset.labels)
        has_more = has_more or len(self.dataset.sources) > 1
        return is_asked or has_more or len(self.held_out) < len(self.held_out_texts)

    @property
    def parent_result(self) -> EvalResult | None:
        """Result of the parent, if it is of the same held-out set."""
        before = self.parent.manifest if self.parent else None
        if before is None or before.data is None or before.result is None or self.manifest.data is None:
            return None
        return before.result if before.data.held_out_hash == self.manifest.data.held_out_hash else None

    @property
    def parent_loss(self) -> float | None:
        """Held-out loss of the parent, if it was measured on the same rows."""
        before = self.parent_result
        return None if before is None or (before.of_rows and self.measures_all_rows) else before.loss

    @property
    def sample_prompts(self) -> list[str]:
        """Prompts that base and adapter continue in the run: those given, else from held-out rows."""
        return self.config.sample_prompt or held_out_prompts(
            self.measured_texts, conversations=self.manifest.is_chat
        )

    @property
    def curve_rows(self) -> list[TokenIds]:
        """Held-out rows that are measured while the run trains: those of the curve, else all."""
        return [self.held_out[row] for row in self.curve.rows] if self.curve else self.held_out

    def curve_metrics(self, loss: float) -> dict[str, float]:
        """Return the log entry of a held-out loss while the run trains."""
        if self.curve is None:
            return {"eval_loss": loss}
        return {"eval_subset_loss": loss, "eval_subset_rows": len(self.curve.rows)}

    def source_infos(self) -> list[SourceInfo]:
        """Return what the manifest has of each of several datasets."""
        sources, total = self.dataset.sources, sum(self.dataset.weights)
        return [
            SourceInfo(
                name=source.name,
                source=source.description,
                weight=source.weight / total if source.weight else None,
                hash=content_hash(source.train),
                counts=asdict(source.counts),
            )
            for source in (sources if len(sources) > 1 else [])
        ]

    def eval_set(self, name: str) -> EvalSet:
        """Return the held-out rows."""
        texts = self.held_out_texts
        return EvalSet(name, texts, groups=self.dataset.groups_of(texts))

    def paired_gain_on(self, number: int, base: HeldOutLoss, adapter: HeldOutLoss) -> EvalResult | None:
        """Return the gain on the measured rows of a source, where there are several and it has any."""
        sources = self.dataset.held_out_sources
        rows = [row for row, text in enumerate(self.measured_texts) if sources.get(text) == number]
        return gain_on(rows, base, adapter)

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest of the run before its first step."""
        config, dataset = self.config, self.dataset
        return Manifest(
            created=utc_timestamp(),
            base=self.base.info(with_template=is_conversation(dataset.format)),
            data=DatasetInfo(
                name=dataset.name,
                source=dataset.description,
                hash=dataset.hash(),
                where=config.where,
                split_salt=config.split_salt,
                counts=asdict(dataset.counts),
                format=dataset.format,
                template=config.template,
                answer_column=config.answer_column,
                text_column=config.text_column,
                **{name: value for name in FILE_SETTINGS if (value := getattr(config, name)) != "auto"},
                clean=dataset.clean,
                near_duplicates=config.near_duplicates,
                eval_dataset=config.other_eval_dataset,
                eval_split=config.eval_split,
                group_by=config.group_by,
                sources=self.source_infos(),
                held_out_hash=self.eval_set(dataset.name).hash(),
                held_out_rows=len(self.held_out_texts),
                encoded_hash=self.rows_hash,
            ),
            parents=[self.parent.parent_info()] if self.parent else [],
            run=RunInfo(
                method=config.method,
                steps=0,
                kept_step=0,
                tokens=0,
                seconds=0.0,
                sequences=len(self.sequences),
                truncated_rows=self.text_use.truncated_rows,
                used_share=self.text_use.share,
                used_answer_share=self.text_use.answer_share,
                device=_device_name(self.base.device),
                dtype=dtype_name(self.base.dtype),
                load_in=self.base.load_in,
                threads=torch.get_num_threads(),
                processes=distributed.world_size(),
                kernels=self.kernels,
                coverage=self.targets.coverage,
                not_adapted=self.targets.not_adapted,
                added_tokens=self.added.all if self.added else {},
                sweep=self.sweep,
                inexact=[*self.inexact],
                curve_rows=len(self.curve.rows) if self.curve else 0,
                probe=self.probe,
            ),
            labels=label_info(config, dataset),
            versions=lora.library_versions(),
        )

    def manifest_of_schema(self, schema_version: int) -> Manifest:
        """Return the manifest with the facts that one of an older schema has, to compare the two."""
        if schema_version == SCHEMA_VERSION:
            return self.manifest
        assert self.manifest.data is not None
        return self.manifest.model_copy(
            update={
                "schema_version": schema_version,
                "base": self.base.info(with_template=False, schema_version=schema_version),
                "data": self.manifest.data.model_copy(update={"encoded_hash": None}),
            }
        )


def prepare_training(
    requested: TrainConfig,
    notify: EventHandler = ignore_events,
    inputs: TrainingInputs | None = None,
    sweep: str | None = None,
) -> TrainingSetup:
    """Prepare a run: everything in memory, and every setting resolved.

    Args:
        requested: the settings as the user gave them.
        inputs: base and data of an earlier trial of the same sweep, without LoRA layers; None to load them.
        sweep: id of the sweep whose trial it is.

    Raises:
        LoraTunerError: the settings do not fit the data, the base or the memory.
    """
    kernels.tune_malloc()
    inputs = inputs or load_inputs(requested, notify)
    if inputs.objective is not None:  # trials of a sweep share the rows, not beta
        objective = replace(inputs.objective, beta=requested.beta or DEFAULT_BETA)
        inputs = replace(inputs, objective=objective)
    model = _add_lora(requested, inputs, notify)
    checkpointing = profiling.fit_to_memory(inputs, model, requested.gradient_checkpointing, notify)
    if isinstance(requested.learning_rate, int | float):
        learning_rate, origin = float(requested.learning_rate), "as given"
    else:
        learning_rate, origin = default_learning_rate(inputs, model, notify)
        notify(Notice(f"Learning rate {learning_rate:g} (--learning-rate), {origin}."))
    profile, probe_plan, probes = None, None, requested.learning_rate == PROBE
    if probes or (requested.max_steps is None and requested.epochs is None):
        profile = profiling.profile_steps(inputs, model, learning_rate, requested.max_grad_norm, notify)
    seconds_per_step = profile.seconds_per_step if profile else None
    max_steps = profiling.steps_for_stop_rule(requested, inputs.steps_per_epoch, seconds_per_step, notify)
    if probes and profile is not None:
        probe_plan, max_steps = plan_run_probe(requested, inputs, profile, learning_rate, max_steps, notify)
    # With these settings the run can be repeated step for step. Nothing changes them afterwards.
    base, parent = inputs.base, inputs.parent
    config = requested.model_copy(
        update={
            "name": adapter_name(requested),
            "base": base.files.as_setting,
            "revision": base.files.revision,
            "dtype": dtype_name(base.dtype),
            "load_in": base.load_in,
            "parent_sha256": parent.sha256 if parent else None,
            "method": inputs.method,
            "rank": parent.rank if parent else requested.rank,
            "target_modules": inputs.target_modules,
            "split_salt": inputs.split_salt,
            "group_by": inputs.dataset.group_by,
            "clean": inputs.dataset.clean or requested.clean,
            "eval_dataset": inputs.dataset.eval_dataset,
            "eval_split": inputs.dataset.eval_split,
            "max_length": inputs.max_length,
            "packing": inputs.packing,
            "batch_size": inputs.batch_size,
            "beta": inputs.objective.beta if inputs.objective else None,
            "learning_rate": learning_rate,
            "gradient_checkpointing": "on" if checkpointing else "off",
            "epochs": None,
            "minutes": None,
            "max_steps": max_steps,
        }
    )
    shared = {field.name: getattr(inputs, field.name) for field in fields(TrainingInputs)}
    return TrainingSetup(
        **shared,
        config=config,
        learning_rate=learning_rate,
        learning_rate_origin=origin,
        max_steps=max_steps,
        model=model,
        profile=profile,
        notify=notify,
        curve=None if requested.eval_every else profiling.plan_curve(inputs, max_steps),
        sweep=sweep,
        probe_plan=probe_plan,
    )


def _add_lora(requested: TrainConfig, inputs: TrainingInputs, notify: EventHandler) -> PeftModel:
    """Add LoRA layers to the base, with seeded weights or those of the parent."""
    if inputs.method in ("dora", "eva") and fsdp.shard_count() > 1:
        raise distributed.share_error(
            ConfigError(
                f"{inputs.method} needs the whole base to initialize, but the base is sharded: choose another --method."
            )
        )
    set_seed(requested.seed)
    indices = added_tokens.token_indices(inputs.base, inputs.added)
    model = lora.add_lora(inputs.base, requested, inputs.parent, inputs.targets, indices)
    if inputs.added is not None:
        added_tokens.train_rows(model, inputs.base, inputs.added)
        notify(added_tokens.input_notice(inputs.added))
    if inputs.method == "eva":
        notify(Progress("computing activations for EVA", 0, 1))
        if inputs.targets.experts:
            notify(Notice("EVA is for linear layers: the experts start as with --method lora."))
    with added_tokens.unwrapped(inputs.base.model):
        initialization.initialize(inputs.base, model, requested, inputs.sequences)
    coverage = describe_coverage(inputs.targets.coverage, inputs.targets.not_adapted)
    notify(
        Notice(
            f"LoRA is added to {format_count(len(inputs.targets.modules), 'layer')}: the adapter covers {coverage}."
        )
    )
    if inputs.targets.warning:
        notify(Notice(inputs.targets.warning))
    trained, frozen = lora.count_parameters(model)
    notify(
        Notice(
            f"{trained:,} of {trained + frozen:,} parameters are trained "
            f"({trained / (trained + frozen):.2%}); the adapter will take {format_bytes(trained * 4)}."
        )
    )
    return model


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
