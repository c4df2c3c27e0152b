"""Show training rows as the model sees them: text, tokens, and which of them are learned."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..config import HELD_OUT_MAX_TOKENS, TrainConfig, is_conversation
from ..data import chat, packing, preferences, splitting, tokenization
from ..data.dataset import describe_data
from ..data.dropped import DroppedCopy, find_dropped
from ..data.prompts import held_out_prompts
from ..errors import EventHandler, Notice, ignore_events
from ..models import loading
from ..models.added_tokens import extend_tokenizer
from ..models.tokenizer import TokenizedBase, load_tokenizer
from .inputs import load_parent, load_rows, model_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MEASURED_ROWS = 2_000  # of which the lengths are shown
_LONGEST = 20  # of them by characters, which are measured in any case


@dataclass(frozen=True)
class RowPart:
    """A part of a row: a turn of a conversation, with its role, or a text, of which all or nothing is learned."""

    role: str
    text: str
    is_learned: bool


@dataclass(frozen=True)
class PreviewedRow:
    """A training row as the model sees it. `labels` marks the tokens that are learned.

    Of a preference each side is such a row: `side` is chosen, rejected, desired or undesired, and
    `number` the same of both. `parts` are its turns, or its text; `pieces` the rows into which `max_length` divides it;
    `cut_tokens` those that are lost at its end.
    """

    before: str
    after: str
    tokens: list[str]
    labels: list[bool]
    parts: list[RowPart] = field(default_factory=list)
    pieces: int = 1
    cut_tokens: int = 0
    number: int = 1
    side: str = ""


@dataclass(frozen=True)
class Preview:
    """Rows as the model sees them, and figures of all training rows.

    Attributes:
        train_rows: All of them; of preferences, their sides.
        use: Of the rows that were measured, at most `_MEASURED_ROWS`: their lengths, and what is cut.
        longest: The longest of all by characters of which that is known, and its place.
        dropped: Examples of rows that are left out as copies.
        sample_prompts: Those that base and adapter continue in the run.
    """

    base: str
    rows: list[PreviewedRow]
    train_rows: int
    use: tokenization.TextUse
    longest: tuple[str, str]
    duplicates: int
    near_duplicates: int
    dropped: list[DroppedCopy]
    sample_prompts: list[str]


def preview(requested: TrainConfig, count: int, notify: EventHandler = ignore_events) -> list[PreviewedRow]:
    """Return the first `count` training rows as the model sees them, both sides of a pair. Loads no weights."""
    return make_preview(requested, count, notify).rows


def make_preview(requested: TrainConfig, count: int, notify: EventHandler = ignore_events) -> Preview:
    """Return the first `count` training rows as the model sees them, with figures of all. Loads no weights."""
    parent = load_parent(requested)
    files = loading.base_for_adapter(parent, model_options(requested, notify))
    base = TokenizedBase(files, tokenizer := load_tokenizer(files))
    if requested.add_tokens or (parent is not None and parent.replaced.rows):
        extend_tokenizer(base, requested.add_tokens, parent)
    dataset = load_rows(requested, parent, notify)
    for line in describe_data(dataset, requested):
        notify(Notice(line))
    previews: list[PreviewedRow] = []
    errors: tokenization.InvalidRows = {}
    if requested.learns_preferences:
        requested = requested.model_copy(update={"long_rows": "truncate"})
    for before, after in dataset.previews:
        number = previews[-1].number + 1 if previews else 1
        if number > count:
            break
        previews += _preview_sides(tokenizer, before, after, requested, errors, number)
    sides = [side for row in dataset.train for side in preferences.sides(row)]
    texts, longest = _choose_measured(sides)
    use = tokenization.TextUse()
    if texts:
        _, use = tokenization.encode_rows(tokenizer, texts, requested.max_length, requested.long_rows, errors)
        longest = max(zip(use.row_tokens, texts, strict=True), key=lambda pair: pair[0])[1]
    counts = dataset.counts
    dataset.leave_out(preferences.invalid_rows(dataset.train, errors), requested.max_invalid, notify)
    cleaned = requested.model_copy(update={"clean": dataset.clean or requested.clean})
    longest_row = next((row for row in dataset.train if longest in preferences.sides(row)), longest)
    dropped, places = find_dropped(cleaned, dataset, [longest_row])
    return Preview(
        base=files.name,
        rows=previews,
        train_rows=len(dataset.train) * requested.sides_per_row,
        use=use,
        longest=(_readable(longest), places.get(longest_row, "")),
        duplicates=counts.duplicates,
        near_duplicates=counts.near_duplicates,
        dropped=[
            replace(
                copy,
                text=_readable(preferences.first_side(copy.text)),
                kept_text=_readable(preferences.first_side(copy.kept_text)),
            )
            for copy in dropped
        ],
        sample_prompts=requested.sample_prompt
        or _held_out_prompts(tokenizer, dataset.held_out[: requested.eval_rows_limit], dataset.format),
    )


def _held_out_prompts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], data_format: str) -> list[str]:
    """Return the prompts that a run takes from the held-out rows which it measures."""
    most = HELD_OUT_MAX_TOKENS
    pairs = zip(texts, tokenization.encode_truncated(tokenizer, texts, most, {}), strict=True)
    measured = [text for text, row in pairs if tokenization.count_predictions(row)]
    return held_out_prompts(measured, conversations=is_conversation(data_format))


def _choose_measured(texts: Sequence[str]) -> tuple[list[str], str]:
    """Return the rows to measure, spread over all, with the longest by characters; and the longest."""
    by_length = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    step = -(-len(texts) // _MEASURED_ROWS) or 1
    chosen = sorted({*by_length[:_LONGEST], *range(0, len(texts), step)} if step > 1 else range(len(texts)))
    return [texts[index] for index in chosen], texts[by_length[0]] if texts else ""


def _preview_sides(
    tokenizer: "PreTrainedTokenizerBase",
    before: str,
    after: str,
    requested: TrainConfig,
    errors: tokenization.InvalidRows,
    number: int,
) -> list[PreviewedRow]:
    """Return the sides of a row as the model sees them; none if the chat template cannot write one."""
    names = [*preferences.answer_texts(after)] if preferences.is_preference(after) else [""]
    rows = [_preview_row(tokenizer, before, side, requested, errors) for side in preferences.sides(after)]
    return [
        replace(row, number=number, side=name)
        for name, row in zip(names, rows, strict=True)
        if row is not None and None not in rows
    ]


def _preview_row(
    tokenizer: "PreTrainedTokenizerBase",
    before: str,
    after: str,
    requested: TrainConfig,
    invalid: tokenization.InvalidRows,
) -> PreviewedRow | None:
    """Return a row as the model sees it; None if the chat template cannot write it."""
    tokens: list[str] = []
    labels: list[bool] = []
    pieces, use = tokenization.encode_rows(tokenizer, [after], requested.max_length, requested.long_rows, invalid)
    if after in invalid:
        return None
    for piece in pieces:
        batch = packing.collate([[piece]], tokenizer.pad_token_id)
        tokens += tokenizer.batch_decode(batch["input_ids"][0, :, None])
        labels += (batch["labels"][0] != packing.IGNORE_INDEX).tolist()
    cut = use.tokens - len(tokens) if use.truncated_rows else 0
    return PreviewedRow(before, _plain(after), tokens, labels, list(_parts(after)), len(pieces), cut)


def _plain(row: str) -> str:
    return chat.plain_text(row).removeprefix(chat.CHAT_MARK).removesuffix(splitting.GOES_ON)


def _readable(row: str) -> str:
    """Return a row as an excerpt shows it: of a conversation its turns."""
    return " ".join(f"{part.role}: {part.text}" if part.role else part.text for part in _parts(row))


def _parts(row: str) -> Iterator[RowPart]:
    """Yield the turns of a conversation; of a text with an answer what is before it, it, and what is behind it."""
    answer = chat.read_answer(row)
    if answer is not None:
        text, (start, end) = answer
        pieces = [(text[:start], False), (text[start:end], True), (text[end:], False)]
        yield from (RowPart("", piece, is_learned) for piece, is_learned in pieces if piece)
        return
    if not chat.is_chat(row):
        yield RowPart("", _plain(row), True)
        return
    value = chat.decode_row(row)
    if tools := value.get("tools"):
        yield RowPart("tools", json.dumps(tools, ensure_ascii=False), False)
    if system := value.get("system"):
        yield RowPart("system", system, False)
    if "messages" not in value:
        yield RowPart("prompt", value["prompt"], False)
        if reasoning := value.get("reasoning_content"):
            yield RowPart("reasoning", reasoning, True)
        yield RowPart("completion", value["completion"], True)
        return
    for message in value["messages"]:
        is_learned = chat.is_learned(message)
        if reasoning := message.get("reasoning_content"):
            yield RowPart("reasoning", reasoning, is_learned)
        calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", [])]
        yield RowPart(message["role"], "\n".join(filter(None, [message["content"], *calls])), is_learned)
