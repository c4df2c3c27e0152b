"""New from what is there: merge into a model, blend several adapters, compress one. Each is proven before it is kept.

Surprise: what is written is read back from disk and compared with what it should do on the base, and what does not agree is
removed: PEFT's own merging and adding fail without a word (TIES, a forgotten root of the rank, tied embeddings). Limits:
all of it is computed in float32, and only sums can be added and cut, so DoRA is merged and no more.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import evaluation
from ..adapters import model_card
from ..adapters.adapter import CARD_FILE, MANIFEST_FILE, Adapter, load_adapter_folder, weights_info
from ..adapters.manifest import DatasetInfo, EvalResult, Manifest, utc_timestamp
from ..config import ModelOptions
from ..data import tokenization
from ..data.splitting import content_hash
from ..errors import AdapterError, EventHandler, Notice
from ..evaluation import EvalSet, HeldOutLoss
from ..models import delta, loading, lora
from ..models.delta import Deltas
from ..models.loading import LoadedBase
from . import verify
from .verify import OutputComparison


def format_number(value: float) -> str:
    """As short as it can be without becoming another."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def open_shared_base(adapters: Sequence[Adapter], options: ModelOptions) -> LoadedBase:
    """Load the base that these adapters share, in float32."""
    options.require_default("dtype", "load_in", why="the result is computed in float32")
    base = loading.open_base(adapters[0], replace(options, dtype="float32", load_in="full"))
    for adapter in adapters:
        lora.check_base(adapter, base, options)
    return base


def distinct_eval_sets(
    adapters: Sequence[Adapter], sets: Sequence[EvalSet] | None, eval_rows: int | None, notify: EventHandler
) -> list[EvalSet]:
    """The sets of held-out rows that there are, no row in two of them; a notice for those that are missing."""
    if sets is None:
        sets = [evaluation.cached_rows(adapter) for adapter in adapters]
        evaluation.notify_eval_rows(adapters, notify)
    found: list[EvalSet] = []
    for it in evaluation.select_rows(sets, eval_rows):
        before = {text for other in found for text in other.texts}
        texts = [text for text in it.texts if text not in before]
        if it.missing:
            notify(Notice(f"Not measured on the rows of {it.name}: {it.missing}. --eval-dataset names others."))
        elif len(texts) < 2:
            notify(
                Notice(f"The rows of {it.name} are measured as those of {', '.join(other.name for other in found)}.")
            )
        else:
            found.append(EvalSet(it.name, texts))
    return found


def encode_eval_sets(base: LoadedBase, sets: Sequence[EvalSet]) -> list[tokenization.TokenIds]:
    """The held-out rows of all sets; where there are none, some tokens to compare logits on."""
    rows = [row for it in sets for row in evaluation.encode_held_out(base, it.texts)]
    return rows or list(tokenization.probe_sequences(len(base.tokenizer)))


def write_adapter(base: LoadedBase, kept: Deltas, work: Path) -> Adapter:
    """The adapter as it is on disk."""
    if not all(update.B.isfinite().all() and update.A.isfinite().all() for update in kept.values()):
        raise AdapterError("The result is not finite in float32: try smaller weights.")
    lora.save_adapter_files(delta.to_state_dict(kept), delta.make_lora_config(kept, base), work)
    return load_adapter_folder(work)


def verify_written(
    base: LoadedBase, written: Adapter, kept: Deltas, name: str, sets: Sequence[EvalSet], notify: EventHandler
) -> OutputComparison:
    """What PEFT makes of the files, beside the base with the update in its weights; from then on it is another base."""
    rows = [row[: verify.COMPARED_TOKENS] for row in encode_eval_sets(base, sets)[: verify.COMPARED_ROWS]]
    does = verify.forward_with_peft(base, written, rows, notify)
    verify.add_to_weights(base, kept)
    should = verify.forward_outputs(base.model, rows, notify, "the update in the base's weights")
    found = verify.compare_outputs(should, does, measured=False)
    if wrong := verify.find_mismatch(found, should, exact=True):
        raise AdapterError(f"{name} is not kept: read back, beside its update in the base's weights, it {wrong}.")
    return found


def combined_result(measured: Sequence[tuple[HeldOutLoss, HeldOutLoss] | None]) -> EvalResult | None:
    """One result over the rows of all sets."""
    pairs = [pair for pair in measured if pair]
    if not pairs:
        return None
    before, after = (
        HeldOutLoss([nll for it in side for nll in it.nll], [count for it in side for count in it.predictions])
        for side in zip(*pairs, strict=True)
    )
    return evaluation.paired_gain(before, after)


def write_manifest_and_card(
    written: Adapter,
    name: str,
    base: LoadedBase,
    parents: Sequence[Adapter],
    command: str,
    sets: Sequence[EvalSet],
    own: bool,
    measured: Sequence[tuple[HeldOutLoss, HeldOutLoss] | None],
) -> None:
    """Manifest and card. `own`: the sets are those that the parents were measured on, and have their names."""
    texts = [text for it in sets for text in it.texts]
    manifest = Manifest(
        created=utc_timestamp(),
        base=base.files.base_info(base.tokenizer_hash),
        data=_dataset_info(parents, sets, own),
        made_by=command,
        parents=[it.parent_info() for it in parents],
        result=combined_result(measured),
        weights=weights_info(written),
        versions=lora.library_versions(),
    )
    (written.path / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    (written.path / CARD_FILE).write_text(
        model_card.model_card(load_adapter_folder(written.path), name), encoding="utf-8"
    )
    if texts:
        evaluation.cache_rows(texts)


def _dataset_info(parents: Sequence[Adapter], sets: Sequence[EvalSet], own: bool) -> DatasetInfo | None:
    """Of one parent its own data; of several all that is known of theirs; None when nothing is."""
    known = {it.name: it.manifest.data for it in parents if it.manifest and it.manifest.data}
    if not known:
        return None
    first = next(iter(known.values()))
    if len(parents) == 1 and not sets:  # nothing was measured, and what its rows are stays true
        return first
    texts = [text for it in sets for text in it.texts]
    measured: dict[str, Any] = {
        "held_out_hash": content_hash(texts) if texts else None,
        "held_out_rows": len(texts),
        "eval_dataset": _eval_dataset_name(known, sets, own),
    }
    salts = {it.split_salt for it in known.values()}
    if len(parents) == len(known) and len({it.hash for it in known.values()}) == len(salts) == 1:
        return first.model_copy(update=measured)
    names = [it.name for it in known.values()] + ["unknown"] * (len(known) < len(parents))
    return DatasetInfo(
        name=" + ".join(dict.fromkeys(names)),
        source=" + ".join(dict.fromkeys(it.source for it in known.values())),
        hash=content_hash([it.hash for it in known.values()]),
        where=[f"{name}: {it}" for name, data in known.items() for it in data.where],
        split_salt=salts.pop() if len(salts) == 1 else None,
        counts={},
        format=" + ".join(dict.fromkeys(it.format for it in known.values())),
        **measured,
    )


def _eval_dataset_name(known: dict[str, DatasetInfo], sets: Sequence[EvalSet], own: bool) -> str | None:
    """Where the measured rows come from, when they are not all held out of the parents' own data."""
    if not own:
        return " + ".join(it.name for it in sets) or None
    theirs = {it.name: known[it.name].eval_dataset for it in sets}
    if not any(theirs.values()):
        return None
    return " + ".join(dict.fromkeys(place or f"the held-out rows of {name}" for name, place in theirs.items()))
