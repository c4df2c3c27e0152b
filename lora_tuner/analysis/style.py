"""Measure how far the texts of an adapter have come from its base to the person who wrote the rows.

Openings of held-out rows are continued by adapter and base, and the rows themselves go on as the
person did; of conversations the answers are compared. All are cut to as many words. The distance
between training rows and held-out rows, both the person's own, is the floor. Sampled with
temperature 1, without top-p, top-k or repetition penalty, and so as the model predicts: other
settings narrow the style of any text, and so hide what was learned.
"""

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..adapters.report import StyleAspect, StyleFigures, StyleWay
from ..config import SamplingParams
from ..errors import DataError, EventHandler, ignore_events
from ..inference.generator import EncodedPrompt, Generator
from ..models.loading import LoadedBase
from ..text import format_count, format_names
from .style_features import Array, Passage, cut_alike, reading_features, split_words, text_features
from .style_openings import MIN_WORDS, OpeningLengths, encode_rows, match_lengths, take_turns
from .subject import ReportSubject, generate_cached
from .two_sample import Comparison

MIN_TEXTS, MIN_GROUPS = 12, 8
SAMPLED_ROWS = 384  # of the training rows: of short or of one-sided ones not all can be used
LEVEL, CONFIDENCE, SEED = 0.05, 0.95, 0
LISTED_WORDS, PRIOR_WORDS, MIN_SCORE = 8, 500, 2.0
EXAMPLES = 2  # of the most and of the least alike


@dataclass(frozen=True)
class StyleTexts:
    """Texts to compare: passage i of each side continues opening i.

    `rows` are the numbers of their rows in the held-out set, `prompts` what was continued. `own`
    are training rows of about the same length; empty where there are too few.
    """

    rows: list[int]
    prompts: list[str]
    you: list[Passage]
    adapter: list[Passage]
    base: list[Passage]
    own: list[Passage]
    notes: list[str]


@dataclass(frozen=True)
class WordUse:
    """A word that the adapter uses more or less than the person: its counts, and the difference of
    its log-odds in standard errors."""

    word: str
    adapter: int
    you: int
    score: float


@dataclass(frozen=True)
class StyleExample:
    """A text of the adapter beside the person's, as they are written: row number `row` of the
    held-out rows."""

    kind: str
    row: int
    prompt: str
    adapter: str
    you: str


@dataclass(frozen=True)
class StyleReport:
    """Figures of style, with the words and texts that show it, which are not published.

    `overused` and `underused` begin with the clearest. `notes` say what limits the figures.
    """

    figures: StyleFigures
    overused: list[WordUse]
    underused: list[WordUse]
    examples: list[StyleExample]
    notes: list[str]

    def to_dict(self) -> dict[str, object]:
        """All figures, words and examples for JSON."""
        return asdict(self) | {"figures": self.figures.model_dump()}

    @property
    def tables(self) -> dict[str, list[list[str]]]:
        """Title of each table -> its rows, of which the first is the head."""
        head = ["", "adapter", "base", "your own text", "of the way", "told apart"]
        rows = [[aspect.name, *_format_way(aspect)] for aspect in self.figures.aspects]
        tables = {"Distance to you": [head, *rows, ["all together", *_format_way(self.figures)]]}
        for more_or_less, words in (("more", self.overused), ("less", self.underused)):
            if words:
                rows = [[each.word, str(each.adapter), str(each.you)] for each in words]
                tables[f"Words it uses {more_or_less}"] = [["", "adapter", "you"], *rows]
        return tables


def write_texts(subject: ReportSubject, generator: Generator) -> StyleTexts:
    """Continue openings of held-out rows with the adapter and with the base. The texts are kept in
    the user's cache.

    Price: 4,600 new tokens of each.

    Raises:
        DataError: there are too few held-out rows, or the chat template cannot write them.
    """
    held_out, name = subject.held_out, subject.adapter.name
    if held_out.missing:
        raise DataError(held_out.missing)
    tokenizer = generator.tokenizer_of(name)
    sample_size = min(len(subject.train_texts), SAMPLED_ROWS)
    train = random.Random(SEED).sample(subject.train_texts, sample_size)
    rows, train_rows = encode_rows(tokenizer, held_out.texts), encode_rows(tokenizer, train)
    # By the training rows: if its length depended on its row, an opening would tell of the rest.
    lengths = OpeningLengths.suiting(train_rows or rows, generator.base.max_context)
    openings = lengths.divide(tokenizer, rows, take_turns(held_out.parts, len(rows)))
    if len(openings) < MIN_TEXTS:
        raise DataError(
            f"{MIN_TEXTS} held-out rows are needed that go on for {MIN_WORDS} words after a question, "
            f"or an opening of {lengths.opening} tokens; it has {len(openings)}"
        )
    plain = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=SEED)
    sampling = plain.model_copy(update={"max_new_tokens": lengths.new})
    prompts = [opening.prompt for opening in openings]
    prompts_of = {name: prompts, None: [_for_base(prompt, generator, name) for prompt in prompts]}
    passages = {}
    for side, prompts in prompts_of.items():
        stage = f"style: texts of {side or 'the base'}"
        outputs = generate_cached(generator, side, prompts, sampling, stage, subject.options.notify)
        passages[side] = [
            Passage(opening.passage.opening, output.text)
            for opening, output in zip(openings, outputs, strict=True)
        ]
    own, notes = lengths.divide(tokenizer, train_rows, range(len(train_rows))), list[str]()
    if len(own) < len(openings):
        reason = subject.train_missing or f"{len(own)} are long enough, of {len(openings)} needed"
        notes.append(f"The distance of your own text is taken as 0, without training rows: {reason}.")
        own = []
    return StyleTexts(
        rows=[opening.row for opening in openings],
        prompts=[opening.prompt.text for opening in openings],
        you=[opening.passage for opening in openings],
        adapter=passages[name],
        base=passages[None],
        own=match_lengths(openings, own[: len(openings)]) if own else [],
        notes=notes,
    )


def _for_base(prompt: EncodedPrompt, generator: Generator, adapter: str) -> EncodedPrompt:
    """Return the prompt for the base: the same tokens, or their text if some of them are the
    adapter's own."""
    if max(prompt.token_ids) < generator.base.vocab_size:
        return prompt
    tokenizer = generator.tokenizer_of(adapter)
    text = str(tokenizer.decode(prompt.token_ids, clean_up_tokenization_spaces=False))
    return generator.encode_prompt(text, generator.tokenizer_of(None), 0)


def measure_style(subject: ReportSubject, texts: StyleTexts, base: LoadedBase) -> StyleReport:
    """Compare texts of adapter and base with the person's. Price: the base reads about 40,000
    tokens.

    Raises:
        DataError: too few texts are long enough.
    """
    sides = {"your texts": texts.you, "texts of the adapter": texts.adapter}
    sides["texts of the base"] = texts.base
    sides |= {"training texts": texts.own} if texts.own else {}
    kept, cut = cut_alike([*sides.values()], MIN_WORDS)
    if len(kept) < MIN_TEXTS:
        raise DataError(
            f"{MIN_TEXTS} openings are needed that the rows, the adapter and the base continue for "
            f"{MIN_WORDS} words; of {len(texts.rows)} there are {len(kept)}"
        )
    notes, groups = [*texts.notes], subject.held_out.groups
    groups = [groups[texts.rows[index]] for index in kept] if groups else []
    if groups and len({*groups}) < MIN_GROUPS:
        notes.append(
            f"The rows are of {format_count(len({*groups}), 'group')}, of {MIN_GROUPS} needed: p-values and "
            "intervals hold for these groups alone."
        )
        groups = []
    comparison = compare(dict(zip(sides, cut, strict=True)), base, groups, subject.options.notify)
    you, adapter = ([split_words(passage.text) for passage in cut[side]] for side in (0, 1))
    overused, underused = compare_words(adapter, you)
    order = np.argsort(comparison.witness(1, 0), kind="stable")
    chosen = {"most like you": order[:EXAMPLES], "least like you": order[::-1][:EXAMPLES]}
    return StyleReport(
        _make_figures(comparison, sum(map(len, you)), has_own=bool(texts.own)),
        overused,
        underused,
        [
            StyleExample(
                kind,
                texts.rows[kept[index]] + 1,
                texts.prompts[kept[index]],
                cut[1][index].text.strip(),
                cut[0][index].text.strip(),
            )
            for kind, indices in chosen.items()
            for index in indices
        ],
        notes,
    )


def compare(
    sides: Mapping[str, Sequence[Passage]],
    base: LoadedBase | None = None,
    groups: Sequence[int] = (),
    notify: EventHandler = ignore_events,
) -> Comparison:
    """Compare passages of several sides in all aspects; without a base, in those that the texts
    alone show.

    Args:
        sides: as `cut_alike` cuts them.
        groups: group of each row; empty if each is one.
    """
    passages = itertools.chain(*sides.values())
    features = text_features([passage.text.strip() for passage in passages])
    if base is not None:
        features |= reading_features(sides, base, notify)
    return Comparison(features, len(sides), groups)


def _make_figures(comparison: Comparison, words: int, *, has_own: bool) -> StyleFigures:
    """Distances of adapter, base and training rows to held-out rows, in each aspect and in all."""
    contrasts = [comparison.contrast(side, 0) for side in (1, 2, 3)[: 2 + has_own]]
    tests = [comparison.test(contrast) for contrast in contrasts[:2]]
    weights = np.vstack([np.ones(len(comparison.groups)), comparison.resample()])
    energies = [comparison.energy(contrast, weights) for contrast in contrasts]
    energies += [np.zeros_like(energies[0])] * (not has_own)
    energies = [np.hstack([energy, energy.mean(1, keepdims=True)]) for energy in energies]
    ways = []
    for column, name in enumerate([*comparison.aspects, None]):
        adapter, base, own = (energy[:, column] for energy in energies)
        share, interval = estimate_share(adapter, base, own)
        p_values = [test.aspects[name] if name else test.p_value for test in tests]
        ways.append(
            StyleWay(
                distance=_distance(adapter[0]),
                base_distance=_distance(base[0]),
                own_distance=_distance(own[0]) if has_own else None,
                share=share,
                interval=interval,
                p_value=p_values[0],
                base_p_value=p_values[1],
            )
        )
    *of_aspects, whole = ways
    named = zip(comparison.aspects, of_aspects, strict=True)
    aspects = [StyleAspect(name=name, **dict(way)) for name, way in named]
    texts = len(comparison.groups)
    sentences = _describe(whole, aspects, f"{texts} openings continued for {words / texts:.0f} words")
    return StyleFigures(sentences=sentences, texts=texts, words=words, aspects=aspects, **dict(whole))


def _describe(whole: StyleWay, aspects: Sequence[StyleAspect], texts: str) -> list[str]:
    """Say in two sentences how far the adapter has come, and in which aspects it is told apart from
    the person."""
    if whole.share is None or whole.interval is None:
        way = "The base is too near to you to measure a way from it"
    elif whole.share <= 0:
        way = f"No nearer to you than the base ({_format_interval(whole)}% of the way)"
    else:
        way = f"{round(100 * whole.share)}% of the way from the base to you ({_format_interval(whole)})"
    told, others = list[str](), list[str]()
    for aspect in aspects:
        (told if aspect.p_value <= LEVEL else others).append(aspect.name)
    if whole.p_value > LEVEL:
        test = f"Its texts are not told apart from yours ({format_p(whole.p_value)})."
    else:
        by = f"by {format_names(told)}" if told else "by all aspects together"
        rest = f", not by {format_names(others)}" if told and others else ""
        test = f"Its texts are told apart from yours {by}{rest} ({format_p(whole.p_value)})."
    return [f"{way}, by {texts}.", test]


def format_p(p_value: float) -> str:
    """Format a p-value with two digits, "p < 0.001" for a smaller one."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def _format_interval(way: StyleWay) -> str:
    """Format an interval of shares in percent; below 0 the adapter is farther away than the base."""
    low, high = way.interval or (0.0, 0.0)
    return f"{round(100 * low)} to {round(100 * high)}"  # no negative zero


def _format_way(way: StyleWay) -> list[str]:
    share = "" if way.share is None else f"{round(100 * way.share)}% ({_format_interval(way)})"
    own = "" if way.own_distance is None else f"{way.own_distance:.2f}"
    return [f"{way.distance:.2f}", f"{way.base_distance:.2f}", own, share, format_p(way.p_value)]


def estimate_share(adapter: Array, base: Array, own: Array) -> tuple[float | None, tuple[float, float] | None]:
    """Estimate which share of the way from the base to the person an adapter has come, with its
    interval.

    An energy distance is squared, and a way is not. None where the base is no farther away than the
    person's own text, but for chance.

    Args:
        adapter, base, own: energy distances to the held-out texts: the estimate, then those of
            bootstrap samples.
    """
    tail, way = (1 - CONFIDENCE) / 2, base - own
    if way[0] <= 0 or np.quantile(way[1:], tail) <= 0:
        return None, None
    is_way = way > 0
    shares = 1 - np.sqrt(np.maximum(adapter - own, 0.0)[is_way] / way[is_way])
    low, high = np.quantile(shares[1:], [tail, 1 - tail])
    return round(float(shares[0]), 4), (round(float(low), 4), round(float(high), 4))


def _distance(energy: float) -> float:
    return round(float(np.sqrt(max(energy, 0.0))), 4)


def compare_words(
    adapter: Sequence[Sequence[str]], you: Sequence[Sequence[str]]
) -> tuple[list[WordUse], list[WordUse]]:
    """Find the words that an adapter uses more, and less, than a person, the clearest first.

    By their log-odds with a prior of the words of both (Monroe et al., Fightin' Words, Political
    Analysis 16, 2008), which keeps rare words from the front. A word of a single text does not
    count.

    Args:
        adapter, you: words of each text.
    """
    counts = [Counter(word for text in side for word in text) for side in (adapter, you)]
    texts = Counter(word for text in [*adapter, *you] for word in {*text})
    total = max(sum(sum(count.values()) for count in counts), 1)
    uses = []
    for word, in_texts in texts.items():
        if in_texts < 2:
            continue
        prior = PRIOR_WORDS * (counts[0][word] + counts[1][word]) / total
        odds, variance = [], 0.0
        for count in counts:
            used = count[word] + prior
            odds.append(np.log(used / max(sum(count.values()) + PRIOR_WORDS - used, 1e-9)))
            variance += 1 / used
        score = float((odds[0] - odds[1]) / np.sqrt(variance))
        uses.append(WordUse(word, counts[0][word], counts[1][word], round(score, 2)))
    uses.sort(key=lambda use: (-use.score, use.word))
    over = [use for use in uses if use.score >= MIN_SCORE][:LISTED_WORDS]
    under = [use for use in reversed(uses) if use.score <= -MIN_SCORE][:LISTED_WORDS]
    return over, under
