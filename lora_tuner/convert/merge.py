"""Merge an adapter into its base: a plain model folder that transformers loads without PEFT."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import atomic_io
from ..adapters.adapter import Adapter
from ..config import ModelOptions
from ..errors import AdapterError, ConfigError
from ..evaluation import EvalSet
from ..models import lora
from ..models.memory import choose_dtype
from ..models.resolve import quiet_transformers
from . import verify
from .common import distinct_eval_sets, encode_eval_sets, open_shared_base
from .verify import OutputComparison


@dataclass(frozen=True)
class MergeResult:
    path: Path
    comparison: OutputComparison


def merge(
    adapter: Adapter,
    out: Path,
    *,
    dtype: str = "float32",
    shard_size: str = "5GB",
    sets: Sequence[EvalSet] | None = None,
    eval_rows: int | None = 50,
    overwrite: bool = False,
    options: ModelOptions = ModelOptions(),
) -> MergeResult:
    """Write base and adapter as one plain model folder, tokenizer included, that transformers loads without PEFT.

    Merged in float32 and cast at the end; then it is read back, and must say what base and adapter say. The folder appears
    whole or not at all. Raises AdapterError when it exists, the adapter does not fit the base, or the two disagree.
    """
    options.require_default("device", why="an adapter is merged on the CPU")
    check_model_folder(out, overwrite=overwrite)
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]i?B", shard_size):
        raise ConfigError(f"'{shard_size}' is no size of a file, such as 5GB or 500MB.")
    opened = open_shared_base([adapter], replace(options, device="cpu"))
    kind = choose_dtype(dtype, opened.device)
    weights = sum(parameter.numel() for parameter in opened.model.parameters()) * kind.itemsize
    if (free := atomic_io.free_space(out.parent)) < weights:
        raise AdapterError(f"{out} needs {weights / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there.")
    sets = distinct_eval_sets([adapter], sets, eval_rows, options.notify)
    rows = encode_eval_sets(opened, sets)
    should = verify.forward_with_adapter(opened, adapter, rows, options.notify)
    with quiet_transformers(), atomic_io.atomic_folder(out) as work:
        # PEFT merges in place, and taking a merge back changes the base's last bits: this base is used no more.
        model = lora.load_lora(opened.model, adapter, "merged").merge_and_unload(safe_merge=True)
        model.to(kind).save_pretrained(work, max_shard_size=shard_size)
        model.to("meta")  # gives its memory back
        # The tokenizer as it came: in memory its pad token has been set.
        AutoTokenizer.from_pretrained(opened.files.folder, trust_remote_code=False).save_pretrained(work)
        written: Any = AutoModelForCausalLM.from_pretrained(work, dtype=torch.float32, use_safetensors=True)
        does = verify.forward_outputs(written.eval(), rows, options.notify, "merged, read back")
        found = verify.compare_outputs(should, does, measured=bool(sets))
        if wrong := verify.find_mismatch(found, should, exact=kind == torch.float32):
            raise AdapterError(f"{out} is not kept: read back, the merged model {wrong}.")
    return MergeResult(out, found)


def check_model_folder(out: Path, *, overwrite: bool) -> None:
    """Raise AdapterError unless a model may be written there."""
    if out.exists() and not overwrite:
        raise AdapterError(f"{out} exists: choose another --out, or replace it with --overwrite.")
    if out.exists() and not (out / "config.json").is_file():
        raise AdapterError(f"{out} is no model folder, so it is not replaced: choose another --out.")
    if why := atomic_io.why_not_writable(out.parent):
        raise AdapterError(f"{why}: choose another --out.")
