"""Texts of base and adapter at the end of a run, for prompts of held-out rows."""

from ..adapters.manifest import Manifest
from ..adapters.samples import Sample
from ..errors import Notice, Progress, first_line
from ..inference.samples import PromptSampler
from ..models import fsdp
from .setup import TrainingSetup


def make_samples(setup: TrainingSetup, prompts: list[str], manifest: Manifest) -> list[Sample]:
    """Continue prompts with base and adapter. An error costs the samples, with a notice, not the adapter."""
    why = "" if prompts else "no held-out row has a beginning that can be a prompt"
    if fsdp.shard_count() > 1:
        why = "the base is divided among processes"
    assert manifest.run is not None
    seconds = max(5.0, manifest.run.seconds / 100)
    texts: list[list[str]] = []
    try:
        if not why:
            setup.notify(Progress("generating samples", 0, 2))
            sampler = PromptSampler(setup.base, prompts, chat=manifest.is_chat)
            with setup.model.disable_adapter():
                texts.append(sampler.generate(seconds))
            setup.notify(Progress("generating samples", 1, 2))
            texts.append(sampler.generate(seconds))
            setup.notify(Progress("generating samples", 2, 2))
    except Exception as error:  # models raise errors of any type
        why = first_line(error).rstrip(".")
    if why:
        setup.notify(Notice(f"No samples of the adapter were generated: {why}."))
        return []
    return [
        Sample(step=manifest.run.kept_step, prompt=prompt, base=base, adapter=adapter, chat=manifest.is_chat)
        for prompt, base, adapter in zip(prompts, *texts, strict=True)
    ]
