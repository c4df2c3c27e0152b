"""Find phone numbers that are valid by the library `phonenumbers`.

International numbers are found anywhere. A national number may be any number, so these are found:
those in the writing of North America, (650) 253-0000 or 650-253-0000; those after a word such as
"phone", if they are valid in one of `PHONE_REGIONS`; and those of a region that is named.
"""

import contextlib
import importlib
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

Phone = tuple[int, int, str]
# Words before a number that is no phone number.
NUMBER_WORDS = re.compile(
    r"\b(?:order|invoice|tracking|ticket|ref(?:erence)?|isbn|issn|ean|upc|gtin|sku|serial|imei|imsi|barcode|id|parcel|shipment"
    r"|article|product|item|case|bestell\w*|rechnung\w*|auftrag\w*|sendung\w*|artikel\w*|commande|facture|pedido|factura"
    r"|timestamp|version|build)\b[^.!?\n]{0,25}$",
    re.IGNORECASE,
)
BEFORE = 40  # characters before a number that tell its kind
_HAS_DIGITS = re.compile(r"(?:\d\D{0,3}){6}\d")
# Regions of which a national number is tried after a word such as "phone".
_REGIONS = (
    "US GB DE FR ES IT NL BE CH AT PL PT SE NO DK FI IE CZ HU RO GR TR RU UA IN PK BD CN JP KR TW "
    "HK SG MY ID PH TH VN AU NZ ZA NG KE EG IL AE SA BR MX AR CL CO PE"
)
PHONE_REGIONS = tuple(_REGIONS.split())
_PHONE_WORDS = re.compile(
    r"(?:\b(?:tel|ph|fon|fone|mob|cell|fax|handy|gsm|whats ?app|signal|sms|hotline|telefon\w*|telefoon\w*|t[ée]l[ée]phone"
    r"|phone|telephone|mobile|cellphone|mobil\w*|mobiel|portable|m[óo]vil|celular|tel[ée]fono|telefono|cellulare|telefone|puhelin"
    r"|telem[óo]vel|(?:call|ring|text|reach|dial|phone)(?: (?:me|us|him|her|them))?(?: back)?(?: (?:at|on|under))?"
    r"|(?:ruf|rufen sie|anrufen|erreichbar)\b[^.!?\n\d]{0,30}unter)\b"
    r"|电话|電話|手机|手機|携帯|тел(?:ефон)?\b|전화|연락처)"
    r"[_ ]?(?:numbers?|no|nr|num|#|is|ist|es|número|nummer|number is|number was)?\s?[._\"':=#)：]{0,3}\s{0,2}[\"']?"
    r"(?P<number>[+＋(]?\d[\d ()\u00a0\u202f./\u2010-\u2013-]{4,22}\d)",
    re.IGNORECASE,
)
_NORTH_AMERICAN = re.compile(
    r"(?<![\w.+/#-])(?<!\d[ ,])(?:1[ .-]?)?(?:\([2-9]\d\d\)[ -]?[2-9]\d\d[ .-]\d{4}"
    r"|[2-9]\d\d(?P<gap>[.-])[2-9]\d\d(?P=gap)\d{4})(?![\w/-]|\.\d)"
)
_INTERNATIONAL = re.compile(r"(?<![\w)\]}.])[+＋][\s(]{0,2}[1-9]")
_YEARS = re.compile(
    r"(?:19|20)\d\d[ /.\u2010-\u2013-]{1,3}(?:(?:19|20)\d\d|\d\d[./-]\d\d)|\d\d[./-]\d\d[./-](?:19|20)\d\d"
)


@lru_cache(maxsize=1)
def _phonenumbers() -> "ModuleType | None":
    with contextlib.suppress(ImportError):
        return importlib.import_module("phonenumbers")
    return None


def finds_phones() -> bool:
    """Return whether the library for phone numbers is installed."""
    return _phonenumbers() is not None


def is_phone_region(region: str) -> bool:
    library = _phonenumbers()
    return library is not None and region in library.SUPPORTED_REGIONS


def find_phones(text: str, region: str | None = None) -> Iterator[Phone]:
    """Yield start, end and masked text of each valid phone number; some may overlap.

    Args:
        region: Also find its national numbers, in any writing.
    """
    if _phonenumbers() is None or not _HAS_DIGITS.search(text):
        return
    if region is not None or _INTERNATIONAL.search(text):
        yield from _match_phones(text, region)
    for match in _NORTH_AMERICAN.finditer(text):
        yield from _match_phones(match[0], "US", match.start())
    for match in _PHONE_WORDS.finditer(text):
        number = match["number"]
        if _YEARS.fullmatch(number):
            continue
        for candidate_region in PHONE_REGIONS:
            found = list(_match_phones(number, candidate_region, match.start("number")))
            if found:
                yield from found
                break


def _match_phones(text: str, region: str | None, offset: int = 0) -> Iterator[Phone]:
    """Yield the valid numbers that the library finds, with their places moved by `offset`.

    A national number without any separator is one only where the whole text is a candidate: as part
    of a text it may be any number.
    """
    library = _phonenumbers()
    assert library is not None
    for match in library.PhoneNumberMatcher(text, region):
        raw, start = match.raw_string, match.start
        is_international = raw.lstrip("(")[:1] in ("+", "＋")
        before = text[max(start - BEFORE, 0) : start]
        if before and (before[-1].isalnum() or before[-1] in "#_=)]"):
            continue
        is_part = not is_international and len(raw) < len(text.strip())
        if is_part and (raw.isdigit() or NUMBER_WORDS.search(before)):
            continue
        country = f"+{match.number.country_code} " if is_international else ""
        masked = f"{country}*** *** **{re.sub(r'[^0-9]', '', raw)[-2:]}"
        yield start + offset, match.end + offset, masked
