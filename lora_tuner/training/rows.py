"""Tokenize the rows of a run: those to train on, packed into sequences, and those that are measured."""

from collections.abc import Collection
from dataclasses import dataclass

from .. import distributed, evaluation
from ..config import HELD_OUT_MAX_TOKENS, TrainConfig
from ..data import chat_template, packing, tokenization
from ..data.dataset import Dataset, describe_data
from ..errors import EventHandler, Notice, Progress, TrainingError
from ..models import added_tokens
from ..models.added_tokens import AddedTokens
from ..models.loading import LoadedBase
from ..text import format_count, format_rows


@dataclass(frozen=True)
class EncodedRows:
    """The rows of a run. With streaming, `dataset` and `sequences` hold the first rows of the stream."""

    dataset: Dataset
    sequences: packing.PackedSequences
    held_out: list[tokenization.TokenIds]
    held_out_texts: list[str]
    measured_texts: list[str]  # text of each row in `held_out`
    text_use: tokenization.TextUse

    @property
    def rows_hash(self) -> str:
        """Hash of all rows as token ids with their labels; of a stream, of the first ones."""
        return tokenization.encoded_hash([*self.sequences.rows, *self.held_out])


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
    invalid: tokenization.InvalidRows = {}
    held_out_texts = dataset.held_out[: requested.eval_rows]
    held_out = evaluation.encode_measured(base, held_out_texts, invalid)
    measured_texts = [held_out_texts[index] for index in held_out]
    rows, text_use = _tokenize(requested, dataset, base, max_length, invalid, notify)
    added_tokens.check_used(added, rows, notify, streaming=requested.streaming)
    held_out_texts = [text for text in held_out_texts if text not in invalid]
    _check_held_out(held_out, held_out_texts, notify)
    sequences = packing.PackedSequences(
        [row for source_rows in rows for row in source_rows],
        max_length,
        packing=use_packing,
        source_rows=[*map(len, rows)] if dataset.weights else (),
    )
    return EncodedRows(dataset, sequences, [*held_out.values()], held_out_texts, measured_texts, text_use)


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
