"""Tokenize the rows of a run: those to train on, packed into sequences, and those that are measured."""

from dataclasses import dataclass
from typing import NamedTuple

from .. import distributed
from ..config import HELD_OUT_MAX_TOKENS, TrainConfig
from ..data import chat_template, labels, packing, preferences, tokenization
from ..data.dataset import Dataset, describe_data
from ..errors import EventHandler, Notice, Progress, TrainingError
from ..evaluation import held_out_loss
from ..models import added_tokens
from ..models.added_tokens import AddedTokens
from ..models.loading import LoadedBase
from ..text import format_count, format_rows
from . import label_result


@dataclass(frozen=True)
class EncodedRows:
    """The rows of a run. With streaming, `dataset` and `sequences` hold the first rows of the stream.

    Of preferences each side is a row: a pair is two neighbouring ones, and `held_out` and its texts
    are the chosen or desired sides.
    """

    dataset: Dataset
    sequences: packing.PackedSequences
    held_out: list[tokenization.TokenIds]
    held_out_texts: list[str]
    measured_texts: list[str]  # text of each row in `held_out`
    rejected: list[tokenization.TokenIds]  # held-out rejected sides, of pairs in the order of `held_out`
    rejected_texts: list[str]
    desired: list[bool]  # of answers with labels whether each row of `sequences` is desired
    text_use: tokenization.TextUse

    @property
    def rows_hash(self) -> str:
        """Hash of all rows as token ids with their labels; of a stream, of the first ones."""
        return tokenization.encoded_hash([*self.sequences.rows, *self.held_out, *self.rejected])


def encode_rows(
    requested: TrainConfig,
    dataset: Dataset,
    base: LoadedBase,
    max_length: int,
    added: AddedTokens | None,
    notify: EventHandler,
    *,
    use_packing: bool,
) -> EncodedRows:
    """Tokenize the rows that are measured, then those to train on, and pack the latter."""
    measured = _encode_held_out(requested, dataset, base)
    rows, desired, text_use = _tokenize(requested, dataset, base, max_length, measured.invalid, notify)
    label_result.check_labels(base, requested.model_copy(update={"max_length": max_length}), dataset)
    added_tokens.check_used(added, rows, notify, streaming=requested.streaming)
    _check_held_out(requested, measured, notify)
    sequences = packing.PackedSequences(
        [row for source_rows in rows for row in source_rows],
        max_length,
        packing=use_packing,
        source_rows=[*map(len, rows)] if dataset.weights else (),
        unit=requested.sides_per_row,
    )
    return EncodedRows(
        dataset=dataset,
        sequences=sequences,
        held_out=measured.rows,
        held_out_texts=measured.texts,
        measured_texts=measured.texts_of_rows,
        rejected=measured.rejected,
        rejected_texts=measured.rejected_texts,
        desired=desired,
        text_use=text_use,
    )


class _HeldOut(NamedTuple):
    """Held-out rows as they are measured, and rejected sides, with the text of each.

    `texts` are also of `skipped` rows with nothing to predict; `invalid` are rows that the chat template cannot write.
    """

    rows: list[tokenization.TokenIds]
    texts_of_rows: list[str]
    rejected: list[tokenization.TokenIds]
    rejected_texts: list[str]
    texts: list[str]
    skipped: int
    invalid: tokenization.InvalidRows


def _encode_held_out(requested: TrainConfig, dataset: Dataset, base: LoadedBase) -> _HeldOut:
    """Tokenize the held-out rows that are measured. A pair is if both sides have something to predict, and differ."""
    errors: tokenization.InvalidRows = {}
    all_rows = preferences.first_rows(dataset.held_out_rows, requested.eval_rows_limit)
    texts, others = preferences.learned_texts(all_rows), preferences.unlearned_texts(all_rows)
    rows = held_out_loss.encode_measured(base, texts, errors)
    rejected = held_out_loss.encode_measured(base, others, errors)
    kept = rows
    if requested.sides_per_row == 2:
        pairs = {index: (rows[index], rejected[index]) for index in rows if index in rejected}
        kept = {index: rows[index] for index, pair in pairs.items() if preferences.is_comparable(pair)}
        rejected = {index: rejected[index] for index in kept}
    writable = {index: text for index, text in enumerate(texts) if text not in errors}
    return _HeldOut(
        rows=[*kept.values()],
        texts_of_rows=[texts[index] for index in kept],
        rejected=[*rejected.values()],
        rejected_texts=[others[index] for index in rejected],
        # Of a pair that is not measured neither side is, now or later.
        texts=[text for index, text in writable.items() if index in kept or index not in rows],
        skipped=len(writable) - len(kept),
        invalid=preferences.invalid_rows(all_rows, errors),
    )


def _check_held_out(requested: TrainConfig, measured: _HeldOut, notify: EventHandler) -> None:
    """Report held-out rows without predictions. Raises TrainingError when there is nothing to predict."""
    if measured.skipped:
        rows_text = format_count(measured.skipped, "held-out row")
        notify(Notice(f"Skipped {rows_text} with nothing to predict in the first {HELD_OUT_MAX_TOKENS} tokens."))
    if not measured.rows:
        raise TrainingError("No held-out row has anything to predict: give --eval-dataset.")
    if requested.objective == "kto" and not measured.rejected:
        raise TrainingError("No held-out answer is undesired: add such rows, or give --eval-dataset.")


def _tokenize(
    requested: TrainConfig,
    dataset: Dataset,
    base: LoadedBase,
    max_length: int,
    invalid: tokenization.InvalidRows,
    notify: EventHandler,
) -> tuple[list[list[tokenization.TokenIds]], list[bool], tokenization.TextUse]:
    """Tokenize the training rows. Returns those of each source with predictions; of answers with
    labels whether each is desired; and the share of the text in them.

    Args:
        invalid: Held-out rows that the chat template cannot write; such training rows are added,
            and all of them are left out of the dataset.
    """

    def encode() -> tuple[
        list[list[tokenization.TokenIds]], list[bool], tokenization.TextUse, tokenization.InvalidRows
    ]:
        use, rows, desired = tokenization.TextUse(), list[list[tokenization.TokenIds]](), list[bool]()
        for texts in labels.training_texts(requested, [source.train for source in dataset.sources]):
            if requested.learns_preferences:
                encoded, source_use, kept = preferences.encode_rows(base.tokenizer, texts, max_length, invalid)
                if requested.objective == "kto":
                    desired += [preferences.is_desired(texts[index]) for index in kept]
            else:
                encoded, source_use = tokenization.encode_rows(
                    base.tokenizer, texts, max_length, requested.long_rows, invalid
                )
            rows.append(encoded)
            use += source_use
        return rows, desired, use, invalid

    notify(Progress("tokenizing", 0, 1))
    rows, desired, use, all_invalid = distributed.run_on_rank_zero(encode)
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
        why = "with nothing to learn"
        if requested.sides_per_row == 2:
            why = "of which an answer has nothing to learn, or both are alike,"
        notify(Notice(f"Skipped {rows_text} {why} in the first {max_length} tokens."))
    for source, source_rows in zip(dataset.sources, kept, strict=True):
        if not source_rows:
            name = f" of {source.name}" if len(kept) > 1 else ""
            raise TrainingError(f"No row{name} has anything to learn: raise --max-length, or use other data.")
    return kept, desired, use


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
