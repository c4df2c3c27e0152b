"""Tell which weights another server uses, from the next tokens that it gives after probes.

Any server of OpenAI's API that gives log-probabilities is asked for one token after each probe of
an adapter's manifest. Distances are Kullback-Leibler divergences in nats per probe, over the tokens
that the server names and the rest. Limit: only next tokens of short prompts are compared. No torch.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from ..adapters.adapter import Adapter
from ..adapters.manifest import SCALES, Probe
from ..errors import AdapterError, EventHandler, Progress, ignore_events
from .openai_client import TOP_LOGPROBS, NoAnswerError, Server, Tokens, endpoint

ADAPTER, BASE, OTHER_ADAPTER = "the adapter", "the base", "another adapter"
WRONG_SCALE, WRONG_TEMPLATE, UNKNOWN = "a wrong scale", "a wrong template", "unknown"

# Answers of the same weights are within NOISE in float32, bfloat16 and 8 bits: 0.038 was the most.
# Beyond LIMIT, or this share of the distance between base and adapter, they are of other weights.
NOISE, LIMIT, LIMIT_SHARE = 0.05, 0.1, 0.1
HIGHEST_OF_BASE, SCALES_OF_ADAPTER = 0.2, (0.75, 1.35)  # between the two it is a wrong scale
SCALE_STEP, LARGEST_SCALE = 0.05, 2.0
MIN_REST = 1e-3  # of probability: tokens that are not named


@dataclass(frozen=True)
class Comparison:
    """Answers to the probes of an adapter, beside what base and adapter give there.

    `distances` are those of the answers from each table of `Probe`, by its name; `scale` is that of
    the adapter that is closest, at `distance`. `span` is the distance of the base from the adapter.
    """

    probes: int
    distances: dict[str, float]
    scale: float
    distance: float
    span: float

    @property
    def verdict(self) -> str | None:
        """Verdict by these probes alone; None where base and adapter hardly differ."""
        if self.span < 2 * NOISE:
            return None
        lowest, highest = SCALES_OF_ADAPTER
        is_near = lowest <= self.scale <= highest and self.distance <= LIMIT
        if is_near or self.distances["adapter"] <= NOISE:
            return ADAPTER
        if self.scale <= HIGHEST_OF_BASE:
            return BASE if self.distance <= LIMIT else UNKNOWN
        is_match = self.distance <= max(LIMIT, LIMIT_SHARE * self.span)
        return WRONG_SCALE if is_match and not lowest <= self.scale <= highest else UNKNOWN


@dataclass(frozen=True)
class ServerCheck:
    """Verdict on a server, and the reason in a sentence.

    `other` is the adapter of the library that answers in place of the one that was named, `scale`
    the estimate of a wrong one. `text` and `chat` compare the answers of the two endpoints; None
    where there are none.
    """

    adapter: str
    url: str
    model: str
    verdict: str
    reason: str
    other: str | None = None
    scale: float | None = None
    text: Comparison | None = None
    chat: Comparison | None = None

    @property
    def distance(self) -> float:
        """Distance from the closest scale, of the endpoint that is farther."""
        return max(each.distance for each in (self.text, self.chat) if each)

    def to_dict(self) -> dict[str, object]:
        """Verdict, figures and thresholds for JSON."""
        thresholds = {"noise": NOISE, "limit": LIMIT, "limit_share": LIMIT_SHARE}
        return asdict(self) | {"thresholds": thresholds}


def check_server(
    adapter: Adapter,
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    others: Sequence[Adapter] = (),
    notify: EventHandler = ignore_events,
) -> ServerCheck:
    """Ask a server, and compare its answers with the probes of an adapter.

    Price: a request for one token for each probe; for those of `others` too, if the adapter does
    not answer.

    Args:
        adapter: the adapter that the server is said to use.
        url: address of the API, such as http://localhost:8000/v1.
        model: the adapter's name there; by default its name here.
        api_key: sent to the server.
        others: adapters that may answer in its place; those of another base are left out.
        notify: receives progress events.

    Raises:
        AdapterError: the adapter has no probes.
        ConfigError: no server answers, it refuses the key, or does not know the model.
    """
    own_probes(adapter)
    server = Server(url, model or adapter.name, api_key)
    check = _check(server, adapter, notify)
    if check.verdict in (ADAPTER, WRONG_TEMPLATE):
        return check
    matches: list[tuple[float, str]] = []
    for other in others:
        if other.name == adapter.name or not _share_base(adapter, other):
            continue
        found = _check(server, other, notify)
        if found.verdict in (ADAPTER, WRONG_TEMPLATE):
            matches.append((found.distance, other.name))
    # An adapter that was trained alike may fit as well as this one at another scale.
    if matches and (check.verdict != WRONG_SCALE or min(matches)[0] < check.distance):
        _, name = min(matches)
        reason = f"Its answers are those of {name}."
        return replace(check, verdict=OTHER_ADAPTER, reason=reason, other=name, scale=None)
    return check


def own_probes(adapter: Adapter) -> list[Probe]:
    """Return the probes of an adapter. Raises AdapterError where it has none."""
    if adapter.manifest is None or not adapter.manifest.probes:
        advice = f"measure them with `evaluate {adapter.name} --probes`"
        raise AdapterError(f"{adapter.name} has no probes: {advice}.")
    return adapter.manifest.probes


def span_of(probes: Sequence[Probe]) -> float:
    """Distance of the base from the adapter on some probes, in nats per probe."""
    answers = [dict([*probe.base.items()][:TOP_LOGPROBS]) for probe in probes]
    return _mean_divergence(probes, answers, SCALES["adapter"])


def compare(probes: Sequence[Probe], answers: Sequence[Tokens]) -> Comparison:
    """Compare the answers to some probes with what their tables say."""
    pairs = zip(answers, probes, strict=True)
    answers = [_with_known_texts(answer, probe) for answer, probe in pairs]
    distances = {name: _mean_divergence(probes, answers, scale) for name, scale in SCALES.items()}
    steps = [SCALE_STEP * step for step in range(round(LARGEST_SCALE / SCALE_STEP) + 1)]
    distance, scale = min((_mean_divergence(probes, answers, scale), scale) for scale in steps)
    return Comparison(len(probes), distances, round(scale, 2), distance, span_of(probes))


def _mean_divergence(probes: Sequence[Probe], answers: Sequence[Tokens], scale: float) -> float:
    """Distance of answers from the adapter at a scale."""
    divergences = []
    for probe, answer in zip(probes, answers, strict=True):
        divergences.append(_divergence(answer, _table_at(probe, scale)))
    return math.fsum(divergences) / len(divergences)


def _table_at(probe: Probe, scale: float) -> Tokens:
    """Table of a probe with the adapter at a scale, between the nearest that were measured."""
    scales, tables = [*SCALES.values()], [getattr(probe, name) for name in SCALES]
    number = bisect_left(scales, scale)
    if scales[number] == scale:
        table: Tokens = tables[number]
        return table
    before, after = tables[number - 1 : number + 1]
    share = (scale - scales[number - 1]) / (scales[number] - scales[number - 1])
    texts = {*before, *after}
    mixed = {}
    for text in texts:
        mixed[text] = (1 - share) * _at_most(before, text) + share * _at_most(after, text)
    rest_before, rest_after = (_rest(_at_most(table, text) for text in texts) for table in (before, after))
    rest = rest_before ** (1 - share) * rest_after**share
    total = math.log(rest + math.fsum(map(math.exp, mixed.values())))
    return {text: logprob - total for text, logprob in mixed.items()}


def _at_most(table: Tokens, text: str) -> float:
    """Log-probability of a token; of one that is not in the table, the most that it can be."""
    return table.get(text, min(table.values()))


def _rest(logprobs: Iterable[float]) -> float:
    """Probability of all other tokens."""
    return max(1 - math.fsum(map(math.exp, logprobs)), MIN_REST)


def _divergence(answer: Tokens, expected: Tokens) -> float:
    """Kullback-Leibler divergence of an answer from what is expected."""
    others = {text: _at_most(expected, text) for text in answer}
    rest, expected_rest = _rest(answer.values()), _rest(others.values())
    parts = [math.exp(logprob) * (logprob - others[text]) for text, logprob in answer.items()]
    return max(0.0, math.fsum(parts) + rest * math.log(rest / expected_rest))


def _with_known_texts(answer: Tokens, probe: Probe) -> Tokens:
    """Spell tokens as in the tables: some servers leave out the space before a word."""
    known = {*probe.base, *probe.half, *probe.adapter, *probe.double}
    spelled: dict[str, float] = {}
    for text, logprob in answer.items():
        same = [each for each in known if each.strip() == text.strip() != ""]
        name = same[0] if text not in known and len(same) == 1 else text
        spelled[name] = max(logprob, spelled.get(name, -math.inf))
    return spelled


def _share_base(adapter: Adapter, other: Adapter) -> bool:
    """Return whether another adapter has probes, on the same base."""
    if adapter.manifest is None or other.manifest is None or not other.manifest.probes:
        return False
    return adapter.manifest.base.fingerprint == other.manifest.base.fingerprint


def _check(server: Server, adapter: Adapter, notify: EventHandler) -> ServerCheck:
    """Ask a server for the probes of an adapter, and judge by them alone."""
    probes = own_probes(adapter)
    found: dict[bool, Comparison] = {}
    failures: list[str] = []
    done = 0
    for chat in dict.fromkeys(probe.chat for probe in probes):
        asked = [probe for probe in probes if probe.chat == chat]
        answers: list[Tokens] = []
        try:
            for probe in asked:
                answers.append(server.next_tokens(probe.prompt, chat=chat))
                done += 1
                notify(Progress(f"probes of {adapter.name}", done, len(probes)))
        except NoAnswerError as error:
            failures.append(str(error))
            continue
        answered = [number for number, answer in enumerate(answers) if answer]
        if not answered:
            failures.append(f"/{endpoint(chat=chat)} gives no log-probabilities")
            continue
        asked = [asked[number] for number in answered]
        found[chat] = compare(asked, [answers[number] for number in answered])
    text, messages = found.get(False), found.get(True)
    check = ServerCheck(adapter.name, server.url, server.model, UNKNOWN, "", text=text, chat=messages)
    return _judge(check, failures)


def _judge(check: ServerCheck, failures: Sequence[str]) -> ServerCheck:
    """Return the verdict of both endpoints, given those that have not answered.

    Text tells the weights, and messages the template; the weights too where text does not.
    """
    comparisons = [each for each in (check.text, check.chat) if each]
    failed = "; ".join(failures)
    if not comparisons:
        return replace(check, reason=f"It cannot be told: {failed}.")
    text, chat = (each and each.verdict for each in (check.text, check.chat))
    decisive = check.chat if text in (None, UNKNOWN) and chat else check.text
    verdict = decisive and decisive.verdict
    if text == ADAPTER and chat not in (ADAPTER, None):
        reason = "Text is continued by the adapter, messages are not: its chat template is another."
        return replace(check, verdict=WRONG_TEMPLATE, reason=reason)
    if text == ADAPTER and failures:
        return replace(check, reason=f"Text is continued by the adapter, but {failed}.")
    if verdict == ADAPTER:
        return replace(check, verdict=ADAPTER, reason="Its answers are those of the adapter.")
    if verdict == BASE:
        reason = "Its answers are those of the base: the adapter is not loaded, or the model's name ignored."
        return replace(check, verdict=BASE, reason=reason)
    if verdict == WRONG_SCALE and decisive:
        more = " or more" if decisive.scale >= LARGEST_SCALE else ""
        reason = (
            f"It applies the adapter at about {decisive.scale:g} times its scale{more}: compare "
            "lora_alpha, r and use_rslora there, and the scale that the server is given."
        )
        return replace(check, verdict=WRONG_SCALE, reason=reason, scale=decisive.scale)
    if verdict is None:
        return replace(check, reason="Base and adapter are too alike on the probes to be told apart.")
    reason = (
        "Its answers are neither those of the adapter at any scale nor those of the base: it has "
        "another base, or damaged weights."
    )
    return replace(check, reason=reason)
