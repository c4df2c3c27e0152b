"""New from what is there: merge into a model, blend several adapters, slim one. Each is proven before it is kept.

Surprise: what is written is read back from disk and compared with what it should do on the base, and what does not agree is
removed: PEFT's own merging and adding fail without a word (TIES, a forgotten root of the rank, tied embeddings). Limits:
all of it is computed in float32, and only sums can be added and cut, so DoRA is merged and no more.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import evaluation, files, lora, proof, report, store, tokens, updates
from .base_model import Base, choose_dtype, quiet
from .config import MAX_RANK
from .data import content_hash
from .errors import AdapterError, ConfigError, Listener, Notice, ignore
from .evaluation import HeldOut, RowSet
from .library import Library, check_distinct
from .manifest import DataFacts, Manifest, Result, now
from .proof import Proof
from .store import Adapter
from .updates import Updates

ENERGY = 0.99  # of a layer that slim keeps


@dataclass(frozen=True)
class Merged:
    path: Path
    proof: Proof


@dataclass(frozen=True)
class Blended:
    """A blend. `lost` is the share of the energy (the squared norm of the exact sum) that a cut rank cost, for each layer;
    `sets` the gains on the held-out rows of each part."""

    adapter: Adapter
    full_rank: int  # of the exact sum, in the layer where it is largest
    lost: dict[str, float]
    lost_in_all: float
    proof: Proof
    sets: dict[str, Result]


@dataclass(frozen=True)
class Slimmed:
    """A slimmed adapter. Before and after: the ranks of its layers, its bytes, and the results on the same held-out rows, None
    where there are none. `lost` is the share of each layer's energy that is gone."""

    adapter: Adapter
    ranks: dict[str, tuple[int, int]]
    bytes: tuple[int, int]
    lost: dict[str, float]
    lost_in_all: float
    proof: Proof
    results: tuple[Result, Result] | None


def merge(
    adapter: Adapter,
    out: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    shard_size: str = "5GB",
    sets: Sequence[RowSet] | None = None,
    eval_rows: int | None = 50,
    overwrite: bool = False,
    force: bool = False,
    notify: Listener = ignore,
) -> Merged:
    """Write base and adapter as one plain model folder, tokenizer included, that transformers loads without PEFT.

    Merged in float32 and cast at the end; then it is read back, and must say what base and adapter say. The folder appears
    whole or not at all. Raises AdapterError when it exists, the adapter does not fit the base, or the two disagree.
    """
    check_model_folder(out, overwrite=overwrite)
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]i?B", shard_size):
        raise ConfigError(f"'{shard_size}' is no size of a file, such as 5GB or 500MB.")
    opened = _open([adapter], base, revision, "cpu", force, notify)
    kind = choose_dtype(dtype, opened.device)
    weights = sum(parameter.numel() for parameter in opened.model.parameters()) * kind.itemsize
    if (free := files.free_space(out.parent)) < weights:
        raise AdapterError(f"{out} needs {weights / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there.")
    sets = _sets([adapter], sets, eval_rows, notify)
    rows = _encoded(opened, sets)
    should = proof.look_with(opened, adapter, rows, notify)
    with quiet(), files.new_folder(out) as work:
        # PEFT merges in place, and taking a merge back changes the base's last bits: this base is used no more.
        model = lora.attach(opened.model, adapter, "merged").merge_and_unload(safe_merge=True)
        model.to(kind).save_pretrained(work, max_shard_size=shard_size)
        model.to("meta")  # gives its memory back
        # The tokenizer as it came: in memory its pad token has been set.
        AutoTokenizer.from_pretrained(opened.source.folder, trust_remote_code=False).save_pretrained(work)
        written: Any = AutoModelForCausalLM.from_pretrained(work, dtype=torch.float32, use_safetensors=True)
        does = proof.look(written.eval(), rows, notify, "merged, read back")
        found = proof.compare(should, does, measured=bool(sets))
        if wrong := proof.problem(found, should, exact=kind == torch.float32):
            raise AdapterError(f"{out} is not kept: read back, the merged model {wrong}.")
    return Merged(out, found)


def check_model_folder(out: Path, *, overwrite: bool) -> None:
    """Raise AdapterError unless a model may be written there."""
    if out.exists() and not overwrite:
        raise AdapterError(f"{out} exists: choose another --out, or replace it with --overwrite.")
    if out.exists() and not (out / "config.json").is_file():
        raise AdapterError(f"{out} is no model folder, so it is not replaced: choose another --out.")
    if why := files.unwritable(out.parent):
        raise AdapterError(f"{why}: choose another --out.")


def blend(
    parts: Sequence[tuple[Adapter, float]],
    name: str,
    library: Library,
    *,
    rank: int | None = None,
    base: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    sets: Sequence[RowSet] | None = None,
    eval_rows: int | None = None,
    overwrite: bool = False,
    force: bool = False,
    notify: Listener = ignore,
) -> Blended:
    """An adapter whose update is the weighted sum of others' updates; a negative weight takes away.

    The sum is exact, its rank in each layer the sum of theirs; `rank` cuts that to the nearest update of the rank. Read
    back by PEFT, it must say what the base says with the update added to its weights. Raises AdapterError when the adapters
    do not share a base, one is DoRA, or the two disagree.
    """
    if not parts:
        raise ConfigError("There is nothing to blend: name adapters with their weights.")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"rank is {rank}: it is a whole number from 1 to {MAX_RANK}.")
    library.check_free(name, overwrite=overwrite)
    if wrong := [f"{it.name}={weight:g}" for it, weight in parts if not weight or not math.isfinite(weight)]:
        raise ConfigError(f"{', '.join(wrong)}: a weight is a number other than 0.")
    adapters = list({it.path.resolve(): it for it, _ in parts}.values())
    check_distinct(adapters)
    for it in adapters:
        updates.check_sum(it)
    opened = _open(adapters, base, revision, device, force, notify)
    layers = lora.linear_layers(opened.model)
    read = {it.path.resolve(): updates.read(it, layers) for it in adapters}
    exact = updates.add([(weight, read[it.path.resolve()]) for it, weight in parts])
    full = max(update.rank for update in exact.values())
    if rank is None and full > MAX_RANK:
        raise AdapterError(f"The exact sum has rank {full}, and {MAX_RANK} is accepted: cut it with --rank.")
    is_cut = rank is not None and rank < full
    kept = {module: updates.cut(update, rank or full) for module, update in exact.items()}
    command = " ".join(["blend", *(f"{it.name}={_number(weight)}" for it, weight in parts)])
    command += f" --rank {rank}" if is_cut else ""
    own, sets = sets is None, _sets(adapters, sets, eval_rows, notify)
    with library.writing(name, overwrite=overwrite) as work:
        written = _write(opened, kept, work)
        lost = updates.lost(exact, updates.read(written, layers)) if is_cut else dict.fromkeys(exact, 0.0)
        measured = evaluation.losses(opened, {name: written}, sets, notify)[0]
        found = _prove(opened, written, kept, name, sets, notify)
        _finish(written, name, opened, adapters, command, sets, own, measured)
    each = {it.name: evaluation.compare(*pair) for it, pair in zip(sets, measured, strict=True) if pair}
    return Blended(library.get(name), full, lost, updates.lost_in_all(exact, lost), found, each)


def slim(
    adapter: Adapter,
    name: str,
    library: Library,
    *,
    energy: float | None = None,
    max_bytes: int | None = None,
    base: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    sets: Sequence[RowSet] | None = None,
    eval_rows: int | None = None,
    overwrite: bool = False,
    force: bool = False,
    notify: Listener = ignore,
) -> Slimmed:
    """The same adapter with the smallest rank in each layer that keeps `energy` (0.99 unless said), a share of that layer's
    squared norm.

    With `max_bytes`, the largest share whose weights fit into so many bytes. The held-out loss is measured before and
    after. Raises AdapterError for DoRA, for an adapter that does nothing, and when rank 1 everywhere is too large.
    """
    if energy is not None and max_bytes is not None:
        raise ConfigError("energy and max_bytes are two rules: give one.")
    energy = ENERGY if energy is None else energy
    if not 0 <= energy <= 1:
        raise ConfigError(f"energy is {energy}: it is a share, from 0 to 1.")
    library.check_free(name, overwrite=overwrite)
    updates.check_sum(adapter)
    opened = _open([adapter], base, revision, device, force, notify)
    layers = lora.linear_layers(opened.model)
    exact = updates.read(adapter, layers)
    spectra = {module: updates.spectrum(update).square() for module, update in exact.items()}
    spectra = {module: squares for module, squares in spectra.items() if float(squares.sum()) > 0}
    if not spectra:
        raise AdapterError(f"{adapter.name} does nothing: there is nothing to keep of it.")
    command = f"slim {adapter.name} --energy {_number(energy)}"
    if max_bytes is not None:
        command = f"slim {adapter.name} --max-bytes {max_bytes}"
        energy = _largest_share(exact, spectra, max_bytes)
    ranks = _ranks(spectra, energy)
    kept = {module: updates.cut(exact[module], rank) for module, rank in ranks.items()}
    own, sets = sets is None, _sets([adapter], sets, eval_rows, notify)
    before = evaluation.losses(opened, {adapter.name: adapter}, sets, notify)[0]
    was = adapter.bytes
    with library.writing(name, overwrite=overwrite) as work:
        written = _write(opened, kept, work)
        lost = updates.lost(exact, updates.read(written, layers))
        after = evaluation.losses(opened, {name: written}, sets, notify)[0]
        found = _prove(opened, written, kept, name, sets, notify)
        report.plot_spectra(spectra, ranks, work / store.SPECTRUM)
        _finish(written, name, opened, [adapter], command, sets, own, after)
    slimmed, once, since = library.get(name), _in_all(before), _in_all(after)
    return Slimmed(
        slimmed,
        {module: (update.rank, ranks.get(module, 0)) for module, update in exact.items()},
        (was, slimmed.bytes),
        lost,
        updates.lost_in_all(exact, lost),
        found,
        (once, since) if once and since else None,
    )


def _number(value: float) -> str:
    """As short as it can be without becoming another."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _ranks(spectra: dict[str, torch.Tensor], energy: float) -> dict[str, int]:
    """The smallest rank of each layer whose squared singular values make that share of their sum."""
    ranks = {}
    for module, squares in spectra.items():
        shares = squares.cumsum(0) / squares.sum()
        # What float32 has rounded is none of it, so that all of the energy can be had by the true rank.
        ranks[module] = min(int((shares < energy * (1 - 1e-12)).sum()) + 1, len(squares))
    return ranks


def _bytes(exact: Updates, ranks: dict[str, int]) -> int:
    """What the weights take on disk at the most: each tensor's numbers, and its entry in the header."""
    sizes = {module: update.down.shape[1] + len(update.up) for module, update in exact.items()}
    return sum(4 * rank * sizes[module] + 2 * (len(module) + 140) for module, rank in ranks.items())


def _largest_share(exact: Updates, spectra: dict[str, torch.Tensor], most: int) -> float:
    """The largest share of energy whose ranks fit into so many bytes."""
    if (least := _bytes(exact, _ranks(spectra, 0.0))) > most:
        raise AdapterError(f"Rank 1 in every layer takes about {least:,} bytes, more than --max-bytes {most:,}.")
    shares = torch.cat([squares.cumsum(0) / squares.sum() for squares in spectra.values()]).unique().tolist()
    low, high = 0, len(shares)  # the answer is the last that fits: more energy never takes fewer bytes
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _bytes(exact, _ranks(spectra, shares[middle])) <= most else (low, middle)
    return float(shares[low]) if _bytes(exact, _ranks(spectra, shares[low])) <= most else 0.0


def _open(
    adapters: Sequence[Adapter], base: str | None, revision: str | None, device: str, force: bool, notify: Listener
) -> Base:
    """The base that these adapters share, in float32."""
    opened = lora.open_base(adapters[0], base, revision, device=device, dtype="float32", load_in="full", notify=notify)
    for adapter in adapters:
        lora.check_base(adapter, opened, force=force, notify=notify)
    return opened


def _sets(
    adapters: Sequence[Adapter], sets: Sequence[RowSet] | None, eval_rows: int | None, notify: Listener
) -> list[RowSet]:
    """The sets of held-out rows that there are, no row in two of them; a notice for those that are missing."""
    if sets is None:
        sets = [evaluation.kept_rows(adapter) for adapter in adapters]
        evaluation.say_what_counts(adapters, notify)
    found: list[RowSet] = []
    for it in evaluation.ready(sets, eval_rows):
        before = {text for other in found for text in other.texts}
        texts = [text for text in it.texts if text not in before]
        if it.missing:
            notify(Notice(f"Not measured on the rows of {it.name}: {it.missing}. --eval-dataset names others."))
        elif len(texts) < 2:
            notify(
                Notice(f"The rows of {it.name} are measured as those of {', '.join(other.name for other in found)}.")
            )
        else:
            found.append(RowSet(it.name, texts))
    return found


def _encoded(base: Base, sets: Sequence[RowSet]) -> list[tokens.Row]:
    """The held-out rows of all sets; where there are none, some tokens to compare logits on."""
    rows = [row for it in sets for row in evaluation.encode_held_out(base, it.texts)]
    return rows or list(tokens.probe(len(base.tokenizer)))


def _write(base: Base, kept: Updates, work: Path) -> Adapter:
    """The adapter as it is on disk."""
    if not all(update.up.isfinite().all() and update.down.isfinite().all() for update in kept.values()):
        raise AdapterError("The result is not finite in float32: try smaller weights.")
    lora.save(updates.tensors(kept), updates.settings(kept, base), work)
    return store.read(work)


def _prove(base: Base, written: Adapter, kept: Updates, name: str, sets: Sequence[RowSet], notify: Listener) -> Proof:
    """What PEFT makes of the files, beside the base with the update in its weights; from then on it is another base."""
    rows = [row[: proof.PROOF_TOKENS] for row in _encoded(base, sets)[: proof.PROOF_ROWS]]
    does = proof.look_with_peft(base, written, rows, notify)
    proof.add_to_weights(base, kept)
    should = proof.look(base.model, rows, notify, "the update in the base's weights")
    found = proof.compare(should, does, measured=False)
    if wrong := proof.problem(found, should, exact=True):
        raise AdapterError(f"{name} is not kept: read back, beside its update in the base's weights, it {wrong}.")
    return found


def _in_all(measured: Sequence[tuple[HeldOut, HeldOut] | None]) -> Result | None:
    """One result over the rows of all sets."""
    pairs = [pair for pair in measured if pair]
    if not pairs:
        return None
    before, after = (
        HeldOut([nll for it in side for nll in it.nll], [count for it in side for count in it.predictions])
        for side in zip(*pairs, strict=True)
    )
    return evaluation.compare(before, after)


def _finish(
    written: Adapter,
    name: str,
    base: Base,
    parents: Sequence[Adapter],
    command: str,
    sets: Sequence[RowSet],
    own: bool,
    measured: Sequence[tuple[HeldOut, HeldOut] | None],
) -> None:
    """Manifest and card. `own`: the sets are those that the parents were measured on, and have their names."""
    texts = [text for it in sets for text in it.texts]
    manifest = Manifest(
        created=now(),
        base=base.source.facts(base.tokenizer_hash),
        data=_data(parents, sets, own),
        made_by=command,
        parents=[it.as_parent() for it in parents],
        result=_in_all(measured),
        weights=store.weights_of(written),
        versions=lora.versions(),
    )
    (written.path / store.MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    (written.path / store.CARD).write_text(report.model_card(store.read(written.path), name), encoding="utf-8")
    if texts:
        evaluation.keep_rows(texts)


def _data(parents: Sequence[Adapter], sets: Sequence[RowSet], own: bool) -> DataFacts | None:
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
        "eval_dataset": _measured_on(known, sets, own),
    }
    salts = {it.split_salt for it in known.values()}
    if len(parents) == len(known) and len({it.hash for it in known.values()}) == len(salts) == 1:
        return first.model_copy(update=measured)
    names = [it.name for it in known.values()] + ["unknown"] * (len(known) < len(parents))
    return DataFacts(
        name=" + ".join(dict.fromkeys(names)),
        source=" + ".join(dict.fromkeys(it.source for it in known.values())),
        hash=content_hash([it.hash for it in known.values()]),
        where=[f"{name}: {it}" for name, data in known.items() for it in data.where],
        split_salt=salts.pop() if len(salts) == 1 else None,
        counts={},
        format=" + ".join(dict.fromkeys(it.format for it in known.values())),
        **measured,
    )


def _measured_on(known: dict[str, DataFacts], sets: Sequence[RowSet], own: bool) -> str | None:
    """Where the measured rows come from, when they are not all held out of the parents' own data."""
    if not own:
        return " + ".join(it.name for it in sets) or None
    theirs = {it.name: known[it.name].eval_dataset for it in sets}
    if not any(theirs.values()):
        return None
    return " + ".join(dict.fromkeys(place or f"the held-out rows of {name}" for name, place in theirs.items()))
