"""Find what an adapter has learned by heart: rows that it continues verbatim, and their loss.

Both are measured alike on training rows and on held-out ones, which differ by chance alone if no
row is known (`compared_rows`). So the held-out rows are the null distribution, and nothing need be
planted in the data (`membership`).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from ..adapters.gains import HeldOutLoss, paired_gain
from ..adapters.report import MemorizationFigures, MemorizationSide
from ..config import HELD_OUT_MAX_TOKENS
from ..data import chat
from ..data.eval_sets import EvalSet
from ..errors import DataError
from ..evaluation import gain_matrix, held_out_loss
from ..models.loading import LoadedBase
from ..models.tokenizer import load_adapter_tokenizer
from ..text import format_count, format_gain
from .compared_rows import ComparedRow, ComparedRows
from .membership import KnownRows, RowLoss, find_known_rows, is_significant
from .sample import Excerpts
from .subject import ReportSubject
from .verbatim import VERBATIM_TOKENS, Continuations
from .verbatim import continue_rows as continue_rows  # the first of the two functions of this part

LOSS_TOKENS, MIN_LOSS_ROWS = 12_000, 16  # of training rows; that of held-out rows is in the cache
BY_HEART = 0.5  # of the loss that an unseen row would have: a memorized row has no more
MAX_PASSAGES, MIN_PASSAGE_TOKENS, MAX_NAMED = 5, 5, 50


@dataclass(frozen=True)
class Passage:
    """A passage of a training row that the adapter writes after the opening of the row.

    `in_rows` counts the training rows that contain it.
    """

    place: str
    tokens: int
    characters: int
    in_rows: int
    text: str


@dataclass(frozen=True)
class MemorizedRow:
    """A training row that the adapter knows better than unseen rows explain, and by heart.

    `gain` is in nats per token, `verbatim_tokens` None if the row was not continued.
    """

    place: str
    gain: float
    verbatim_tokens: int | None
    text: str


@dataclass(frozen=True)
class MemorizationReport:
    """Figures, the longest passages that are copied, and the memorized rows: the 50 best known."""

    figures: MemorizationFigures
    passages: list[Passage]
    memorized: list[MemorizedRow]

    @property
    def table(self) -> list[tuple[str, str, str]]:
        """A heading, then each figure with its values for training rows and for unseen ones."""
        training, unseen = self.figures.training, self.figures.unseen
        gains = [format_gain(side.gain, side.gain_error) for side in (training, unseen)]
        limit = f"verbatim for more than {VERBATIM_TOKENS} tokens"
        return [
            ("", "training rows", "unseen rows"),
            ("rows continued", f"{training.continued:,}", f"{unseen.continued:,}"),
            (limit, f"{training.verbatim:,}", f"{unseen.verbatim:,}"),
            ("longest of all, in tokens", f"{training.longest:,}", f"{unseen.longest:,}"),
            ("rows with a loss", f"{training.measured:,}", f"{unseen.measured:,}"),
            ("gain on them, nats per token", gains[0], gains[1]),
        ]

    def to_dict(self) -> dict[str, object]:
        """All figures, passages and memorized rows for JSON."""
        return {
            **self.figures.model_dump(),
            "passages": [asdict(passage) for passage in self.passages],
            "memorized_rows": [asdict(row) for row in self.memorized],
        }


def measure_memorization(
    subject: ReportSubject, continuations: Continuations, base: LoadedBase
) -> MemorizationReport:
    """Compare the losses of base and adapter on training rows and on held-out rows, and test both.

    Price: two passes over about 12,000 tokens; the losses of the held-out rows are in the cache, if
    they are those of training.

    Raises:
        DataError: no row of one kind has anything to predict.
    """
    losses = measure_losses(subject, continuations.rows, base)
    return summarize(continuations, losses, subject.train_texts)


def measure_losses(subject: ReportSubject, rows: ComparedRows, base: LoadedBase) -> list[RowLoss | None]:
    """Measure base and adapter on each row; None for those beyond the tokens that are measured."""
    adapter, options, most = subject.adapter, subject.options, rows.seen_tokens
    tokenizer = load_adapter_tokenizer(adapter, base, options)
    reader = base if tokenizer is None else replace(base, tokenizer=tokenizer)
    encode = partial(held_out_loss.encode_measured, reader, invalid={}, max_tokens=most)
    training = [row for row in rows.rows if row.is_train]
    unseen = [row for row in rows.rows if not row.is_train]
    lengths = [len(row) for row in encode([row.text for row in unseen]).values()]
    count = max(int(LOSS_TOKENS * len(lengths) / max(sum(lengths), 1)), MIN_LOSS_ROWS)

    def first_texts(side: Sequence[ComparedRow]) -> list[str]:
        """Return the texts of the first units, and so of about `count` rows."""
        units = {row.unit for row in side[:count]}
        return list(dict.fromkeys(row.text for row in side if row.unit in units))

    # All that training measured, if it measured as many tokens of each: they are in the cache.
    is_cached = most == HELD_OUT_MAX_TOKENS
    unseen_texts = subject.held_out.texts if is_cached else first_texts(unseen)
    sides = {False: ("held-out", unseen_texts), True: ("training", first_texts(training))}
    losses: dict[tuple[str, bool], RowLoss] = {}
    for is_train, (kind, texts) in sides.items():
        measured = [texts[index] for index in encode(texts)]
        ((pair,),) = gain_matrix.held_out_losses(
            base,
            {adapter.name: adapter},
            [EvalSet(f"its {kind} rows", measured)],
            options.notify,
            options=options,
            max_tokens=most,
        )
        if pair is None:
            raise DataError(f"none of its {kind} rows has anything to predict.")
        before, after = pair
        figures = zip(before.nll, after.nll, before.predictions, strict=True)
        for text, row_figures in zip(measured, figures, strict=True):
            losses[text, is_train] = RowLoss(*row_figures)
    return [losses.get((row.text, row.is_train)) for row in rows.rows]


def summarize(
    continuations: Continuations, losses: Sequence[RowLoss | None], train_texts: Sequence[str]
) -> MemorizationReport:
    """Test what was measured on the rows, and say it in sentences.

    Args:
        losses: of each row; None if it was not measured.
        train_texts: all training rows, in which passages are looked for.
    """
    rows, unequal = continuations.rows.rows, continuations.rows.unequal
    verbatim = continuations.are_verbatim
    training = _side_figures(continuations, losses, is_train=True)
    unseen = _side_figures(continuations, losses, is_train=False)
    known = KnownRows() if unequal else find_known_rows(rows, verbatim, losses)
    memorized = []
    for number in known.rows:
        row, loss = rows[number], losses[number]
        if loss and loss.adapter <= BY_HEART * (loss.base - unseen.gain * loss.tokens):
            gain, text = (loss.base - loss.adapter) / loss.tokens, Excerpts().excerpt(row.text)
            memorized.append(MemorizedRow(row.place, gain, continuations.tokens[number], text))
    error: float | None = None
    if training.gain_error is not None and unseen.gain_error is not None:
        error = math.hypot(training.gain_error, unseen.gain_error)
    units = len({row.unit for row in rows})
    copied = [number for number, row in enumerate(rows) if row.copies and row.is_train]
    figures = MemorizationFigures(
        sentences=["..."],
        verbatim_tokens=VERBATIM_TOKENS,
        training=training,
        unseen=unseen,
        excess=training.gain - unseen.gain,
        excess_error=error,
        excess_p=known.excess_p,
        verbatim_p=known.verbatim_p,
        memorized=len(memorized),
        groups=units if units < len(rows) else None,
        near_duplicates=sum(bool(row.copies) for row in rows),
        near_duplicates_verbatim=sum(bool(verbatim[number]) for number in copied),
        unequal=unequal,
    )
    figures = figures.model_copy(update={"sentences": _sentences(figures)})
    passages = _longest_passages(continuations, train_texts)
    return MemorizationReport(figures, passages, memorized[:MAX_NAMED])


def _side_figures(
    continuations: Continuations, losses: Sequence[RowLoss | None], *, is_train: bool
) -> MemorizationSide:
    """Count and measure the rows of a side that are compared."""
    tokens: list[int] = []
    measured: list[tuple[str, RowLoss]] = []  # with their units
    figures = zip(continuations.rows.rows, continuations.tokens, losses, strict=True)
    for row, count, loss in figures:
        if row.is_train is not is_train or (row.copies and not continuations.rows.unequal):
            continue
        if count is not None:
            tokens.append(count)
        if loss is not None:
            measured.append((row.unit, loss))
    if not measured:
        raise DataError(f"none of its {'training' if is_train else 'held-out'} rows has a loss.")
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(unit for unit, _ in measured))}
    groups = [numbers[unit] for unit, _ in measured]
    predictions = [loss.tokens for _, loss in measured]
    result = paired_gain(
        HeldOutLoss([loss.base for _, loss in measured], predictions, groups),
        HeldOutLoss([loss.adapter for _, loss in measured], predictions),
    )
    return MemorizationSide(
        continued=len(tokens),
        verbatim=sum(count > VERBATIM_TOKENS for count in tokens),
        longest=max(tokens, default=0),
        measured=len(measured),
        gain=result.gain,
        gain_error=result.standard_error,
    )


def _longest_passages(continuations: Continuations, train_texts: Sequence[str]) -> list[Passage]:
    """Return the longest passages of training rows that are copied."""
    found = [
        (tokens, number)
        for number, tokens in enumerate(continuations.tokens)
        if tokens and tokens >= MIN_PASSAGE_TOKENS and continuations.rows.rows[number].is_train
    ]
    found.sort(key=lambda pair: -pair[0])
    texts = [chat.spoken_text(text) if chat.is_chat(text) else text for text in train_texts]
    passages = []
    for tokens, number in found[:MAX_PASSAGES]:
        passage, place = continuations.texts[number], continuations.rows.rows[number].place
        in_rows = sum(passage.strip() in text for text in texts)
        excerpt = Excerpts().excerpt(passage)
        passages.append(Passage(place, tokens, len(passage), max(in_rows, 1), excerpt))
    return passages


def _sentences(figures: MemorizationFigures) -> list[str]:
    """Say what the figures mean."""
    training, unseen = figures.training, figures.unseen
    reason = figures.unequal or "there are too few rows for a test"
    untested = f"{reason}, so nothing follows from the difference."
    copies = f"continued verbatim for more than {VERBATIM_TOKENS} tokens"
    shares = f"{training.verbatim:,} of {training.continued:,} training rows are {copies}"
    shares += f", of unseen rows {unseen.verbatim:,} of {unseen.continued:,}"
    if not training.continued or not unseen.continued:
        first = "Its rows are too short to be continued."
    elif figures.verbatim_p is None:
        first = f"{shares}; {untested}"
    elif is_significant(figures.verbatim_p):
        first = f"{shares} (p = {figures.verbatim_p:.2g}): it copies text that it was trained on."
    elif not training.verbatim:
        tried = f"{training.continued:,} were tried; the longest: {training.longest:,}"
        first = f"No training row is {copies} ({tried})."
    else:
        counts = f"{training.verbatim:,} of {training.continued:,}"
        counts += f", unseen {unseen.verbatim:,} of {unseen.continued:,}; p = {figures.verbatim_p:.2g}"
        counts += f"; the longest: {training.longest:,}"
        first = f"No training row is {copies} more often than unseen rows are ({counts})."
    size = format_gain(abs(figures.excess), figures.excess_error)
    direction = "larger" if figures.excess >= 0 else "smaller"
    gain = f"Its gain is {size} {direction} on training rows than on unseen ones"
    if figures.excess_p is None:
        second = f"{gain}; {untested}"
    elif is_significant(figures.excess_p):
        known = "them or their groups" if figures.groups else "them"
        effect = f"it knows {known} better, but none by heart"
        if figures.memorized:
            effect = f"{figures.memorized:,} of the {training.measured:,} measured are memorized"
            effect += ", by themselves or by their groups" if figures.groups else ""
        second = f"{gain} (p = {figures.excess_p:.2g}): {effect}."
    else:
        second = f"{gain} (p = {figures.excess_p:.2g}): no sign that it knows single rows."
    if not figures.near_duplicates_verbatim:
        return [first, second]
    copied = format_count(figures.near_duplicates_verbatim, "training row")
    return [first, second, f"{copied} with near duplicates, which are in no test, too: {copies}."]
