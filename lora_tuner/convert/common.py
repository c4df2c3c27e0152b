"""Shared steps of merge, blend, compress and export: load the base, save and verify an adapter."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .. import atomic_io
from ..adapters import compatibility, model_card
from ..adapters.adapter import (
    CARD_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILES,
    Adapter,
    check_weights_hash,
    load_adapter_folder,
    weights_info,
)
from ..adapters.compatibility_report import Tool
from ..adapters.gains import HeldOutLoss
from ..adapters.label_info import LabelInfo
from ..adapters.library import copy_files
from ..adapters.manifest import DatasetInfo, Manifest, utc_timestamp
from ..config import FILE_SETTINGS, ModelOptions, is_conversation
from ..data import eval_sets, tokenization
from ..data.eval_sets import EvalSet
from ..data.prompts import held_out_prompts
from ..data.splitting import content_hash
from ..errors import AdapterError, EventHandler, Notice
from ..evaluation import gain_matrix, held_out_loss
from ..inference import probes
from ..models import delta, loading, lora
from ..models.base_files import BaseModelFiles
from ..models.delta import Deltas
from ..models.layers_in_files import layer_sizes_in_files
from ..models.loading import LoadedBase
from ..models.tokenizer import TokenizedBase, load_tokenizer
from ..text import format_names
from . import verify
from .verify import OutputComparison


def check_output_path(out: Path, kind: str, *, valid: bool, overwrite: bool) -> None:
    """Raise AdapterError unless a result may be written to `out`.

    Args:
        out: the file or folder to write.
        kind: what it is, such as "GGUF file".
        valid: what exists there is one, so it may be replaced.
        overwrite: replace it.
    """
    if why := atomic_io.why_not_replaceable(out):
        raise AdapterError(f"{why}: choose another --out.")
    if os.path.lexists(out) and not overwrite:
        raise AdapterError(f"{out} exists: choose another --out, or replace it with --overwrite.")
    if os.path.lexists(out) and not valid:
        raise AdapterError(f"{out} is not a {kind}, so it is not replaced: choose another --out.")


def is_gguf(path: Path) -> bool:
    """A GGUF file is there."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def check_keeps_base(
    out: Path, files: BaseModelFiles, adapters: Sequence[Adapter], *, is_adapter: bool = False
) -> None:
    """Raise AdapterError if writing to `out` would change the base of its result, or remove an input.

    Args:
        out: the file or folder to write.
        files: the base in use.
        adapters: the adapters in use; the base they name is kept too, where `files` is a copy of it.
        is_adapter: the result is an adapter, which may lie in the folder of its base.
    """
    advice = "--name" if is_adapter else "--out"
    named = [Path(os.path.expanduser(adapter.base)) for adapter in adapters if adapter.base]
    for location in [*files.locations, *(path for path in named if path.is_dir())]:
        if atomic_io.contains(out, location) or (not is_adapter and atomic_io.contains(location, out)):
            raise AdapterError(f"{out} would replace or change its base, {location}: choose another {advice}.")
    for adapter in adapters:
        # The result may replace one of the adapters that it is made from, as these are in memory.
        if atomic_io.contains(out, adapter.path) and not (is_adapter and atomic_io.contains(adapter.path, out)):
            raise AdapterError(f"{out} would replace {adapter.path}, which lies in it: choose another {advice}.")


def open_shared_base(
    adapters: Sequence[Adapter], options: ModelOptions, out: Path, *, is_adapter: bool = True
) -> LoadedBase:
    """Load the base in float32; weights saved in 8 or 4 bits are dequantized, with a notice.

    Args:
        adapters: the adapters that are to fit it; without any, the options name the base.
        options: the base model.
        out: the file or folder to write.
        is_adapter: the result is an adapter.

    Raises AdapterError if an adapter was trained on another, or if the result, written to `out`,
    would replace the base.
    """
    options.require_default("dtype", "load_in", why="the result is computed in float32")
    files = loading.base_for_adapter(adapters[0] if adapters else None, options)
    check_keeps_base(out, files, adapters, is_adapter=is_adapter)
    options_of_base = replace(options, dtype="float32", load_in=files.quantization or "full")
    base = loading.load_base(files, options_of_base, layers=adapters[0].modules if adapters else ())
    if base.load_in != "full":
        options.notify(
            Notice(f"The weights of {files.name} are saved in {base.load_in}: dequantized to float32.")
        )
        loading.dequantize(base)
    for adapter in adapters:
        lora.check_base(adapter, base, options)
    return base


def base_for_export(adapter: Adapter, out: Path, tool: Tool, options: ModelOptions) -> TokenizedBase:
    """Check that an adapter fits its base and a tool, and return the base, without its weights.

    Args:
        adapter: the adapter.
        out: the file or folder to write.
        tool: the tool that reads the export.
        options: the base model.

    Raises:
        AdapterError: the tool has no place for a part of the adapter, the adapter does not fit the
            base, or `out` would replace one of them.
    """
    if options.base is None:  # before anything is downloaded
        compatibility.require_compatible(adapter, tool)
    check_weights_hash(adapter)
    files = loading.base_for_adapter(adapter, options)
    check_keeps_base(out, files, [adapter])
    base = TokenizedBase(files, load_tokenizer(files))
    lora.check_base(adapter, base, options)
    adapter.check_shapes(layer_sizes_in_files(files, adapter))
    compatibility.require_compatible(adapter, tool, files.config())
    return base


def distinct_eval_sets(
    adapters: Sequence[Adapter], sets: Sequence[EvalSet] | None, eval_rows: int | None, notify: EventHandler
) -> list[EvalSet]:
    """The given sets, or else the cached held-out rows of each adapter; no row is in two sets.

    Of each set, and of each part of a blend in it, at most the first `eval_rows` rows are taken.
    Missing and repeated sets are left out, with a notice.
    """
    if sets is None:
        sets = [gain_matrix.cached_rows(adapter, notify) for adapter in adapters]
        gain_matrix.notify_eval_rows(adapters, notify)
    distinct: list[EvalSet] = []
    seen: set[str] = set()
    for eval_set in eval_sets.select_rows(sets):
        distinct_rows = [row for row, text in enumerate(eval_set.texts) if text not in seen]
        if not eval_set.missing and len(distinct_rows) < 2:
            names = format_names([previous.name for previous in distinct])
            notify(Notice(f"Not evaluated on {eval_set.name}: its held-out rows are among those of {names}."))
            continue
        # Counted among the distinct rows, so that a blend and what is made of it later have the same ones.
        (selected,) = eval_sets.select_rows([eval_set.select(distinct_rows)], eval_rows)
        if selected.missing:
            text = f"Not evaluated on {selected.name}: {selected.missing}. Name other data with --eval-dataset."
            notify(Notice(text))
            continue
        seen.update(eval_set.texts)
        distinct.append(selected)
    return distinct


def encode_eval_sets(
    base: LoadedBase, sets: Sequence[EvalSet], vocab_size: int = 0
) -> list[tokenization.TokenIds]:
    """Token ids of the rows of all sets; without any, some probe sequences to compare logits on.

    `vocab_size` is that of an adapter with others than the base, 0 for the base's.
    """
    rows = [
        row for eval_set in sets for row in held_out_loss.encode_held_out(base, eval_set.texts, {}, vocab_size)
    ]
    return rows or list(base.probe_sequences())


def verify_written(
    base: LoadedBase, written: Adapter, deltas: Deltas, name: str, sets: Sequence[EvalSet], notify: EventHandler
) -> OutputComparison:
    """Compare the saved adapter, loaded by PEFT, with the base plus its updates.

    Adds the updates to the base's weights. Raises AdapterError if the logits differ.
    """
    rows = verify.compared_part(encode_eval_sets(base, sets))
    actual = verify.forward_with_peft(base, written, rows, notify)
    verify.add_to_weights(base, deltas)
    expected = verify.forward_outputs(base.model, rows, notify, "running the exact result")
    if mismatch := verify.exact_mismatch(expected.logits, actual.logits):
        raise AdapterError(f"{name} is not kept: the saved adapter differs from the exact result: {mismatch}.")
    return verify.compare_outputs(expected, actual, with_loss=False)


def write_adapter(
    folder: Path,
    name: str,
    base: LoadedBase,
    deltas: Deltas,
    parents: Sequence[Adapter],
    command: str,
    sets: Sequence[EvalSet],
    parents_sets: bool,
    notify: EventHandler,
) -> tuple[Adapter, list[tuple[HeldOutLoss, HeldOutLoss] | None], OutputComparison]:
    """Save LoRA updates as an adapter, verify and evaluate it, and write manifest and model card.

    Adds the updates to the base's weights, and caches the held-out rows.

    Args:
        folder: the adapter folder to fill.
        name: its name in the library.
        base: the base model.
        deltas: the LoRA updates.
        parents: the adapters it was made from.
        command: recorded as `made_by`.
        sets: the held-out sets.
        parents_sets: the sets are the parents' own, under their names.
        notify: receives progress events.

    Returns:
        The saved adapter without its manifest, the loss of base and adapter on each set, and the
        adapter compared with the base plus the updates.
    """
    if not all(update.B.isfinite().all() and update.A.isfinite().all() for update in deltas.values()):
        raise AdapterError("The result is not finite in float32: use smaller weights.")
    lora.save_adapter_files(delta.to_state_dict(deltas), delta.make_lora_config(deltas, base), folder)
    _copy_tokenizer(parents, folder, notify)
    written = load_adapter_folder(folder)
    losses = gain_matrix.held_out_losses(base, {name: written}, sets, notify)[0]
    data = _dataset_info(parents, sets, parents_sets)
    manifest = Manifest(
        created=utc_timestamp(),
        base=base.info(with_template=data is not None and is_conversation(data.format)),
        data=data,
        made_by=command,
        parents=[parent.parent_info() for parent in parents],
        result=gain_matrix.pooled_gain(losses),
        labels=_shared_labels(parents),
        weights=weights_info(written),
        versions=lora.library_versions(),
    )
    texts = [text for eval_set in sets for text in eval_set.texts]
    measured = probes.measure_stored(base, written, manifest, texts, ModelOptions(notify=notify))
    comparison = verify_written(base, written, deltas, name, sets, notify)
    manifest = manifest.model_copy(update=measured)
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    prompts = held_out_prompts(texts, conversations=manifest.is_chat)
    card = model_card.model_card(load_adapter_folder(folder), name, prompts)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    if sets:
        eval_sets.cache_rows(eval_sets.join_sets(name, sets))
    return written, losses, comparison


def _shared_labels(parents: Sequence[Adapter]) -> LabelInfo | None:
    """Return the labels of all parents, without what was measured; None unless they are the same."""
    measured = ("temperature", "fitted_rows", "figures", "uncalibrated_error", "base")
    unmeasured = {name: LabelInfo.model_fields[name].default for name in measured}
    infos = [parent.manifest.labels if parent.manifest else None for parent in parents]
    own = [info.model_copy(update=unmeasured) for info in infos if info]
    return own[0] if own and len(own) == len(infos) and all(info == own[0] for info in own) else None


def _copy_tokenizer(parents: Sequence[Adapter], folder: Path, notify: EventHandler) -> None:
    """Give an adapter the chat template and tokenizer files of its parents, where these agree."""
    hashes = []
    for parent in parents:
        files = [parent.path / name for name in TOKENIZER_FILES]
        hashes.append([atomic_io.sha256_file(file) if file.is_file() else None for file in files])
    if all(each == hashes[0] for each in hashes):
        copy_files(parents[0], folder, TOKENIZER_FILES)
    else:
        notify(
            Notice(
                "The parents differ in their chat template or tokenizer files: the result has "
                "none, and uses those of the base."
            )
        )


# Facts of a dataset that a blend has if its parents agree.
_RULES = (
    "split_salt",
    "clean",
    "near_duplicates",
    "group_by",
    "template",
    "answer_column",
    "text_column",
    *FILE_SETTINGS,
)


def _dataset_info(parents: Sequence[Adapter], sets: Sequence[EvalSet], parents_sets: bool) -> DatasetInfo | None:
    """Dataset of one parent, or the combined datasets of several; None if none is known."""
    datasets = {
        parent.name: parent.manifest.data for parent in parents if parent.manifest and parent.manifest.data
    }
    if not datasets:
        return None
    first, *others = datasets.values()
    # Results of the sources were measured on the parent.
    unmeasured = [source.model_copy(update={"result": None}) for source in first.sources]
    first = first.model_copy(update={"sources": unmeasured})
    if len(parents) == 1 and not sets:  # not evaluated: the parent's held-out rows stay recorded
        return first
    rows = eval_sets.join_sets(first.name, sets)
    eval_splits = {data.eval_split for data in datasets.values()}
    held_out_hash = rows.hash() if sets else None
    encoded = {data.encoded_hash for data in datasets.values()}
    complete = len(datasets) == len(parents)
    same_encoded_rows = complete and len(encoded) == 1 and held_out_hash == first.held_out_hash
    shared = {name: {getattr(data, name) for data in datasets.values()} for name in _RULES}
    update: dict[str, object] = {
        "held_out_hash": held_out_hash,
        "held_out_rows": len(rows.texts),
        "encoded_hash": first.encoded_hash if same_encoded_rows else None,
        "eval_dataset": _eval_dataset_name(datasets, sets, parents_sets),
        "eval_split": first.eval_split if parents_sets and len(eval_splits) == 1 else None,
        **{name: getattr(first, name) if len(values) == 1 else None for name, values in shared.items()},
    }
    same_rows = all((data.hash, data.split_salt) == (first.hash, first.split_salt) for data in others)
    if not complete or not same_rows:
        names = [data.name for data in datasets.values()] + ["unknown"] * (not complete)
        update |= {
            "name": " + ".join(dict.fromkeys(names)),
            "source": " + ".join(dict.fromkeys(data.source for data in datasets.values())),
            "hash": content_hash([data.hash for data in datasets.values()]),
            "where": [f"{name}: {condition}" for name, data in datasets.items() for condition in data.where],
            "sources": [],
            "counts": {},
            "format": " + ".join(dict.fromkeys(data.format for data in datasets.values())),
        }
    return first.model_copy(update=update)


def _eval_dataset_name(
    datasets: dict[str, DatasetInfo], sets: Sequence[EvalSet], parents_sets: bool
) -> str | None:
    """Source of the held-out rows; None if all are held out of the parents' own training data."""
    if not parents_sets:
        return " + ".join(eval_set.name for eval_set in sets) or None
    sources = {eval_set.name: datasets[eval_set.name].eval_dataset for eval_set in sets}
    if not any(sources.values()):
        return None
    return " + ".join(dict.fromkeys(source or f"the held-out rows of {name}" for name, source in sources.items()))
