"""Merge an adapter into its base: a plain model folder that transformers loads without PEFT."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from .. import atomic_io
from ..adapters.adapter import Adapter
from ..adapters.gains import HeldOutLoss
from ..config import ModelOptions
from ..data.chat_template import turn_end_ids
from ..data.eval_sets import EvalSet
from ..data.tokenization import TokenIds
from ..errors import AdapterError, ConfigError, first_line
from ..models import loading, lora, replaced
from ..models.base_files import quiet_transformers
from ..models.memory import choose_dtype
from ..models.tokenizer import load_adapter_tokenizer
from . import verify
from .common import check_output_path, distinct_eval_sets, encode_eval_sets, open_shared_base
from .verify import OutputComparison

_RUNNING = "running the merged model"  # a stage, for progress events
# Of a multimodal base: without them other tools do not load the merged model.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class MergeResult:
    """A merged model.

    Args:
        path: its folder.
        comparison: its outputs compared with those of base and adapter.
        sets: the held-out sets of the comparison.
        rows: their rows as tokens; without held-out rows, some probe sequences.
        row_losses: loss of the merged model on each row.
    """

    path: Path
    comparison: OutputComparison
    sets: list[EvalSet]
    rows: list[TokenIds] = field(repr=False)
    row_losses: HeldOutLoss = field(repr=False)


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
    """Save base and adapter as one model folder, with the tokenizer of the adapter or of the base.

    The weights are merged in float32, compared with base and adapter, and then cast. The saved
    model is reloaded and compared again; the folder appears complete or not at all.

    Examples:
        >>> merged = merge(Library().get("noir"), Path("merged/noir"))
        >>> merged.path.is_dir()
        True

    Args:
        adapter: the adapter.
        out: the model folder to write.
        dtype: dtype of the merged model.
        shard_size: largest weights file, such as 5GB.
        sets: held-out sets for the comparison; None means those of the adapter.
        eval_rows: largest number of rows per set.
        overwrite: replace an existing model folder.
        options: the base model; the device is always the CPU.

    Raises:
        AdapterError: the folder exists, or is that of the base; the adapter does not fit the base, or the outputs differ.
        ConfigError: an option is invalid.
    """
    options.require_default("device", why="an adapter is merged on the CPU")
    check_model_folder(out, overwrite=overwrite)
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]i?B", shard_size):
        raise ConfigError(f"'{shard_size}' is not a valid shard size: use a size such as 5GB or 500MB.")
    base = open_shared_base([adapter], replace(options, device="cpu"), out, is_adapter=False)
    merged_dtype = choose_dtype(dtype, base.device)
    needed = sum(parameter.numel() for parameter in base.model.parameters()) * merged_dtype.itemsize
    if (free := atomic_io.free_space(out.parent)) < needed:
        raise AdapterError(
            f"{out} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: free some space, or choose another --out."
        )
    sets = distinct_eval_sets([adapter], sets, eval_rows, options.notify)
    own_tokenizer = load_adapter_tokenizer(adapter, base, options)
    vocab_size = adapter.replaced.vocab_size(base.vocab_size)
    rows = encode_eval_sets(replace(base, tokenizer=own_tokenizer or base.tokenizer), sets, vocab_size)
    # The tokens whose rows are the adapter's are compared too; the complement of an id has no loss.
    replaced_ids = sorted({number for ids in adapter.replaced.rows.values() for number in ids})
    token_rows = [~np.array(replaced_ids[: verify.COMPARED_TOKENS], dtype=np.int32)] if replaced_ids else []
    compared = [*token_rows, *rows]
    expected = verify.forward_with_adapter(base, adapter, compared, options.notify)
    with quiet_transformers(), atomic_io.atomic_folder(out, overwrite=overwrite) as folder:
        # PEFT merges in place, and unmerging is not bitwise exact: this base is not used again.
        weights = replaced.load_replaced(adapter, base)
        model = lora.load_lora(base.model, adapter, "merged").merge_and_unload(safe_merge=True)
        replaced.write_replaced(model, weights)
        if merged_dtype != torch.float32:  # rounding would hide a small mistake
            exact = verify.forward_outputs(model, verify.compared_part(compared), options.notify, _RUNNING)
            _check_merged(out, verify.exact_mismatch(expected.logits, exact.logits))
        tokenizer = own_tokenizer or base.tokenizer
        eos_token_ids = base.eos_token_ids | {tokenizer.eos_token_id} | turn_end_ids(tokenizer)
        if eos_token_ids != base.eos_token_ids and model.generation_config is not None:
            model.generation_config.eos_token_id = sorted(eos_token_ids)
        model.to(merged_dtype).save_pretrained(folder, max_shard_size=shard_size)
        model.to("meta")  # frees its memory
        # Without one of the adapter the original: the one in memory has another pad token.
        original = AutoTokenizer.from_pretrained(base.files.folder, trust_remote_code=False)
        (own_tokenizer or original).save_pretrained(folder)
        for name in _PROCESSOR_FILES:
            if (base.files.folder / name).is_file():
                shutil.copyfile(base.files.folder / name, folder / name)
        try:
            reloaded = loading.auto_class(model.config).from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True
            )
        except ValueError as error:  # the text part of Mllama is no model of its own
            raise AdapterError(
                f"{out} is not kept: transformers does not load the merged model: {first_line(error)}"
            ) from error
        actual = verify.forward_outputs(reloaded.eval(), compared, options.notify, _RUNNING)
        comparison = verify.compare_outputs(expected, actual, with_loss=bool(sets))
        comparison = replace(comparison, rows=len(rows))
        if merged_dtype == torch.float32:
            _check_merged(out, verify.exact_mismatch(expected.logits, actual.logits))
        _check_merged(out, verify.rounded_mismatch(comparison))
    losses = actual.losses.select(range(len(token_rows), len(compared)))
    return MergeResult(out, comparison, sets, rows, losses)


def _check_merged(out: Path, mismatch: str | None) -> None:
    if mismatch:
        raise AdapterError(f"{out} is not kept: the merged model differs from base and adapter: {mismatch}.")


def check_model_folder(out: Path, *, overwrite: bool) -> None:
    """Raise AdapterError unless a model may be written to `out`."""
    check_output_path(out, "model folder", valid=(out / "config.json").is_file(), overwrite=overwrite)
