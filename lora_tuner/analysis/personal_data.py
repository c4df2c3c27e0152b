"""Find, mask and replace personal data: mail addresses, phone and card numbers, IBANs, keys.

What has a checksum is checked: cards with Luhn's, IBANs with mod 97; phone numbers are those that
the library `phonenumbers` takes for valid. Limits: names, postal addresses and the like are not
found, nor is anything in another form than these.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .credentials import find_secrets
from .phones import BEFORE, NUMBER_WORDS, find_phones

_MAX_FIELD_CHARS = 200  # of a text whose field tells its kind
KIND_LABELS = {
    "email": "Mail addresses",
    "phone": "Phone numbers",
    "card": "Card numbers",
    "iban": "Bank accounts (IBAN)",
    "key": "Keys, tokens and passwords",
}
KINDS = tuple(KIND_LABELS)
_CONTEXT_CHARS = 40  # before and after what is shown
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
REPLACEMENTS = {kind: f"[{kind.upper()}]" for kind in KINDS}


@dataclass(frozen=True)
class Finding:
    """Personal data in a text, from character `start` to `end`.

    `kind` is one of `KINDS`. `detail` says more about a key, such as "AWS key". `masked` shows its
    form alone.
    """

    kind: str
    start: int
    end: int
    masked: str
    detail: str = ""


def find_personal_data(text: str, region: str | None = None, field: str = "") -> list[Finding]:
    """Find personal data in a text, in order and without overlaps.

    Args:
        region: Also find national phone numbers of this region, such as DE (`phones`).
        field: Name of the field that holds the text: in `password` a random text is a key, and in
            `phone` a number is a phone number.
    """
    prefix = f"{field.replace('_', ' ')}: " if field and len(text) <= _MAX_FIELD_CHARS else ""
    whole = prefix + text
    if _INVISIBLE.search(whole):
        return _find_despite_invisible(text, region, field)
    finders = (
        _find_keys(whole),
        _find_emails(whole),
        _find_ibans(whole),
        _find_cards(whole),
        _find_phones(whole, region),
    )
    is_taken = bytearray(len(whole))
    is_taken[: len(prefix)] = b"\1" * len(prefix)
    findings = []
    for found in itertools.chain.from_iterable(finders):
        if is_taken.find(1, found.start, found.end) < 0:
            is_taken[found.start : found.end] = b"\1" * (found.end - found.start)
            start, end = found.start - len(prefix), found.end - len(prefix)
            findings.append(replace(found, start=start, end=end))
    return sorted(findings, key=lambda found: found.start)


def _find_despite_invisible(text: str, region: str | None, field: str) -> list[Finding]:
    """Find personal data that invisible characters divide, which cleaning joins again."""
    places = [place for place, char in enumerate(text) if not _INVISIBLE.match(char)]
    findings = find_personal_data(_INVISIBLE.sub("", text), region, _INVISIBLE.sub("", field))
    return [replace(found, start=places[found.start], end=places[found.end - 1] + 1) for found in findings]


def in_context(text: str, findings: list[Finding], shown: Finding) -> str:
    """Return a finding with the text around it, all personal data masked or replaced."""
    parts, end = ["", ""], 0
    for found in findings:
        side = 0 if found.start <= shown.start else 1
        if found is shown:
            parts[0] += text[end : found.start]
        else:
            parts[side] += text[end : found.start] + REPLACEMENTS[found.kind]
        end = found.end
    parts[1] += text[end:]
    before, after = parts[0][-_CONTEXT_CHARS:], parts[1][:_CONTEXT_CHARS]
    starts, ends = len(before) < len(parts[0]), len(after) < len(parts[1])
    return f"{'… ' * starts}{before}{shown.masked}{after}{' …' * ends}"


def replace_personal_data(text: str, region: str | None = None, field: str = "") -> tuple[str, list[Finding]]:
    """Return a text with its personal data replaced by [EMAIL] and the like, and the findings."""
    findings = find_personal_data(text, region, field)
    parts, end = [], 0
    for found in findings:
        parts += [text[end : found.start], REPLACEMENTS[found.kind]]
        end = found.end
    return "".join([*parts, text[end:]]), findings


def _find_keys(text: str) -> Iterator[Finding]:
    for start, end, kind, masked in find_secrets(text):
        yield Finding("key", start, end, masked, kind)


def _find_phones(text: str, region: str | None) -> Iterator[Finding]:
    for start, end, masked in find_phones(text, region):
        yield Finding("phone", start, end, masked)


# Mail addresses

_EMAIL = re.compile(
    r"(?<![\w.+%@$-])(?P<local>\w[\w.+%'&=-]{0,63})"
    r"(?:(?:@|&#0*64;|&#x0*40;|&commat;)(?=[^\W_])|\s?(?:\[at\]|\(at\)|\{at\})\s?)"
    r"(?P<domain>[^\W_][\w-]{0,62}(?:(?:\.|\s?(?:\[dot\]|\(dot\)|\{dot\}|\[\.\]|\(\.\))\s?)[^\W_][\w-]{0,62}){1,8})(?P<next>\(|:(?!\s|$))?",
    re.IGNORECASE,
)
_AT = re.compile(r"@|&#0*64;|&#x0*40;|&commat;|[\[({]at[\])}]", re.IGNORECASE)
_DOT = re.compile(r"\s?(?:\[dot\]|\(dot\)|\{dot\}|\[\.\]|\(\.\))\s?", re.IGNORECASE)
# Frequent top-level domains, and those reserved for examples. Two letters are a country's, but for those of files.
_TOP_LEVEL_NAMES = (
    "com org net edu gov mil int info biz name pro mobi jobs travel museum aero coop cat tel asia "
    "post arpa app dev page online site website web shop store tech xyz club blog cloud email "
    "mail live news life world today agency company solutions digital media studio design academy "
    "consulting global group network systems services software support team works zone berlin "
    "hamburg koeln cologne bayern nrw saarland ruhr wien tirol london paris nyc tokyo swiss "
    "google amazon microsoft apple bank finance money capital fund legal law doctor health clinic "
    "care dental hospital church school university college education foundation ong ngo gmbh ltd "
    "llc inc art music film video photo photos gallery games game play top vip win work fun space "
    "rocks ninja guru expert link click icu best one plus social community center house property "
    "realty estate restaurant cafe bar pub pizza hotel tours holiday eco green energy solar bio "
    "farm garden sport fitness run yoga fashion style beauty moda kiwi scot wales eus gal bzh "
    "corsica quebec moscow istanbul africa joburg lat krd example test invalid"
)
_TOP_LEVEL = frozenset(_TOP_LEVEL_NAMES.split())
_FILE_ENDINGS = ("js", "ts", "gz", "xz", "db", "vb", "hs", "ex")


def _find_emails(text: str) -> Iterator[Finding]:
    if not _AT.search(text):
        return
    for match in _EMAIL.finditer(text):
        local, domain = match["local"], match["domain"]
        if match["next"] == "(" or local.lower() in ("git", "hg", "svn"):  # a call; a repository
            continue
        end = match.end("domain")
        while (label := _last_label(domain)) and not _is_top_level(label):
            cut = max(domain.rfind("."), 0)
            end, domain = end - (len(domain) - cut), domain[:cut]
        if label and domain:
            yield Finding("email", match.start(), end, _mask_email(local, _DOT.sub(".", domain)))


def _last_label(domain: str) -> str:
    """Return the last part of a domain; "" if it is the only one."""
    labels = _DOT.sub(".", domain).split(".")
    return labels[-1] if len(labels) > 1 else ""


def _is_top_level(label: str) -> bool:
    label = label.lower()
    if not label.isascii():
        return label.isalpha() and len(label) > 1
    return (
        label in _TOP_LEVEL
        or label.startswith("xn--")
        or (label.isalpha() and len(label) == 2 and label not in _FILE_ENDINGS)
    )


def _mask_email(local: str, domain: str) -> str:
    name, _, rest = domain.rpartition(".")
    return f"{_first(local)}***@{_first(name)}***.{rest}"


def _first(text: str) -> str:
    """Return the first character of a text that has several: else it would be all of it."""
    return text[0] if len(text) > 1 else ""


# Cards and bank accounts

_GAP = r"[ \u00a0\u202f.-]"
_CARD = re.compile(
    rf"(?<![\w])(?<!\w[-/#_])(?<!\d[.,])(?<!\d{{4}}{_GAP})(?:\d{{13,19}}"
    rf"|\d{{4}}(?P<a>{_GAP})\d{{4}}(?P=a)\d{{4}}(?P=a)\d{{4}}(?P<more>(?P=a)\d{{1,3}}(?!\d))?(?!(?P=a)\d{{4}})"
    rf"|\d{{4}}(?P<b>{_GAP})\d{{6}}(?P=b)\d{{4,5}}(?!(?P=b)\d{{3}}))(?![\w]|[.,]\d|-\w)"
)
_NETWORKS = re.compile(
    r"4(?:\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|(?:6011|64[4-9]\d|65\d\d)\d{12,15}|35(?:2[89]|[3-8]\d)\d{12,15}|3(?:0[0-5]|[689]\d)\d{11}|62\d{14,17}|220[0-4]\d{12,15}"
    r"|(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{12,15}|(?:60|81|82|508)\d{13,14}"
)
_OLD_NETWORKS = re.compile(r"4\d{12}|(?:50|5[6-9]|6\d)\d{11,17}")  # with a word that says it is a card
_CARD_WORDS = re.compile(
    r"\b(?:card|visa|master ?card|amex|american express|debit|credit|cc|pan|karte\w*|kreditkarte\w*|carte|tarjeta|carta)\b",
    re.IGNORECASE,
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])([A-Z]{2})(\d{2})(?=[ \u00a0-]?[A-Z0-9])", re.IGNORECASE)
_IBAN_LENGTHS = {  # of the registry of SWIFT, and of countries that use IBANs without being in it
    code: length
    for length, codes in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ DZ ES MD PK RO SA SE SK TN VG",
        25: "AO CV GW LY MZ PT ST", 26: "IR IS TR", 29: "BR PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
        27: "BF BI BJ CF CG CI CM DJ EG FR GA GF GP GQ IT MC MG MQ MR NC PF PM RE SM TF WF YT",
        28: "AL AZ BY CY DO GT HN HU KM LB MA ML NE NI PL SN SV TD TG",
    }.items()
    for code in codes.split()
}  # fmt: skip


def passes_luhn(digits: str) -> bool:
    """Return whether the last digit is the checksum of Luhn, as on cards (ISO/IEC 7812-1)."""
    numbers = [int(digit) for digit in reversed(digits)]
    doubled = [number * 2 - 9 * (number > 4) for number in numbers[1::2]]
    return (sum(numbers[::2]) + sum(doubled)) % 10 == 0


def passes_mod_97(iban: str) -> bool:
    """Return whether the two check digits of an IBAN are right (ISO 13616)."""
    return int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97 == 1


def _find_cards(text: str) -> Iterator[Finding]:
    for match in _CARD.finditer(text):
        before = text[max(match.start() - BEFORE, 0) : match.start()]
        says_card = bool(_CARD_WORDS.search(before))
        if match[0].isdigit() and not says_card and NUMBER_WORDS.search(before):
            continue
        # What follows the fourth group may be a date.
        for end in [match.end(), *([match.start("more")] if match["more"] else [])]:
            digits = re.sub(r"\D", "", text[match.start() : end])
            if _is_card(digits, says_card):
                yield Finding("card", match.start(), end, f"**** **** **** {digits[-4:]}")
                break


def _is_card(digits: str, says_card: bool) -> bool:
    is_network = _NETWORKS.fullmatch(digits) or (says_card and _OLD_NETWORKS.fullmatch(digits))
    return bool(is_network) and passes_luhn(digits)


def _find_ibans(text: str) -> Iterator[Finding]:
    for match in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(match[1].upper())
        if length is None:
            continue
        iban, end = match[0], match.end()
        while len(iban) < length and (char := _IBAN_CHARACTER.match(text, end)):
            iban, end = iban + char[1], char.end()
        followed = _IBAN_REST.match(text, end)
        if len(iban) == length and not followed and passes_mod_97(iban):
            yield Finding("iban", match.start(), end, f"{iban[:2].upper()}** **** **** {iban[-4:]}")


_IBAN_CHARACTER = re.compile(r"[ \u00a0-]?([A-Za-z0-9])", re.ASCII)
_IBAN_REST = re.compile(r"[A-Za-z0-9]")
