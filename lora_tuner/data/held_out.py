"""Choose the held-out rows, order them, and divide documents into rows to measure."""

import itertools
from collections import Counter
from collections.abc import Collection, Sequence

from ..config import TrainConfig
from ..errors import EventHandler, Notice
from ..text import format_rows
from . import chat
from .mixing import mix_lists
from .rows import Source, TextRow
from .splitting import (
    GOES_ON,
    MIN_DOCUMENTS,
    MIN_TEXT_CHARS,
    is_held_out,
    row_hash,
    split_document,
    split_text,
)


def choose_held_out(
    sides: list[bytes], eval_hashes: Collection[bytes], config: TrainConfig, notify: EventHandler
) -> set[bytes]:
    """Return the hashes of the rows, or groups of rows, that are held out.

    If the hash leaves one side without a row, the nearest one changes sides. A stream does not do
    that: its other rows are unknown.
    """
    unit = "group" if config.group_by is not None else "prompt" if config.learns_preferences else "row"
    held_out = {side for side in sides if is_held_out(side)}
    usable = sorted(set(sides).difference(eval_hashes))
    if config.streaming or len(usable) < (1 if eval_hashes else 2):
        return held_out
    if held_out.issuperset(usable):
        notify(Notice(f"The hash of every {unit} holds it out, so the one with the highest hash is trained on."))
        return held_out - {usable[-1]}
    if not held_out and not eval_hashes:
        notify(
            Notice(
                f"The hash holds out none of {len(usable)} {unit}s, so the one with the lowest "
                f"hash is held out. More {unit}s, or --eval-dataset, give a better measure."
            )
        )
        return {usable[0]}
    return held_out


def hold_out_blocks(
    sources: Sequence[Source], rows: dict[bytes, TextRow], config: TrainConfig, notify: EventHandler
) -> list[list[TextRow]]:
    """Hold out blocks of long texts in each source that is one text, or a few documents.

    The rows of these sources are removed from `rows`.

    Returns:
        The held-out rows of each source.
    """
    blocks: list[list[TextRow]] = [[] for _ in sources]
    if config.streaming or config.other_eval_dataset:
        return blocks
    sizes = Counter(row.source for row in rows.values())
    for number, count in sizes.items():
        source = sources[number]
        texts = [row for row in rows.values() if row.source == number] if count < MIN_DOCUMENTS else []
        documents = config.group_by is None and all(row.is_document for row in texts)
        is_long = {row.digest: len(row.text) >= MIN_TEXT_CHARS and not chat.is_chat(row.text) for row in texts}
        if not any(is_long.values()) or not (documents or count == 1):
            continue
        for row in texts:
            train, held_out = split_text(row.text) if is_long[row.digest] else ([row.text], [])
            source.train += train
            hashes = [row_hash(text, config.split_salt) for text in held_out]
            blocks[number] += [TextRow(*pair, "", pair[0], number) for pair in zip(hashes, held_out, strict=True)]
            del rows[row.digest]
        source.previews += [(text.removesuffix(GOES_ON), text) for text in source.train]
        source.counts.train = count
        subject = "one text, so blocks of it" if count == 1 else f"{count} documents, so blocks of them"
        notify(
            Notice(
                f"{source.description} is {subject}, a fifth in all, are held out as "
                f"{format_rows(len(blocks[number]))}, and the text beside them is not used. --eval-dataset "
                "measures on other text."
            )
        )
    return blocks


def order_held_out(
    held_out: Sequence[Sequence[TextRow]], weights: Sequence[float], salt: str, notify: EventHandler
) -> list[TextRow]:
    """Return held-out rows in the order of their hashes; of several sources mixed by the weights.

    Documents become rows, of which a text that several of them have is measured once.
    """
    first: dict[str, TextRow] = {}
    measured: list[list[TextRow]] = []
    for rows in held_out:
        parts = itertools.chain.from_iterable(measured_rows(row, salt) for row in rows)
        unique = [part for part in parts if first.setdefault(part.text, part) is part]
        measured.append(sorted(unique, key=lambda part: part.digest))
    documents = sum(row.is_document for rows in held_out for row in rows)
    parts_of_documents = sum(part.is_document for parts in measured for part in parts)
    if parts_of_documents > documents:
        notify(Notice(f"Held-out documents are measured in parts: {documents:,} as {parts_of_documents:,} rows."))
    if len(measured) == len(weights):
        return mix_lists(measured, weights)
    return sorted(itertools.chain.from_iterable(measured), key=lambda part: part.digest)


def measured_rows(row: TextRow, salt: str) -> list[TextRow]:
    """Return the rows as which a held-out row is measured; their side is that of the whole."""
    if not row.is_document:
        return [row]
    return [row._replace(digest=row_hash(text, salt), text=text) for text in split_document(row.text)]
