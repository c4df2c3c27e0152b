"""Check single texts: their language, and trouble with their encoding."""

import contextlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

UNKNOWN = "unknown"
_MIN_LETTERS = 20  # a language is guessed from so many letters
_MIN_CHINESE_LETTERS = 6  # or so many, in scripts with a sign for each syllable or word
_MIN_CONFIDENCE = 0.5
_READ_CHARS = 1_000  # of a text
_SYLLABLES = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
LANGUAGES = {
    "af": "Afrikaans", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali",
    "bs": "Bosnian", "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "eo": "Esperanto", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish",
    "fr": "French", "ga": "Irish", "gl": "Galician", "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian",
    "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "kn": "Kannada", "ko": "Korean", "la": "Latin", "lo": "Lao",
    "lt": "Lithuanian", "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi",
    "ms": "Malay", "my": "Burmese", "ne": "Nepali", "nl": "Dutch", "nn": "Norwegian Nynorsk", "no": "Norwegian",
    "pa": "Punjabi", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak",
    "sl": "Slovenian", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu",
    "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese",
    "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip
_NO_LANGUAGE = ("zxx", "und")


@lru_cache(maxsize=1)
def language_guesser() -> Callable[[str], tuple[str, float]] | None:
    """Return a function from a text to its language and a confidence; None without its library."""
    with contextlib.suppress(ImportError):
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        return lambda text: identifier.classify(text)
    return None


def detect_language(text: str) -> str:
    """Return the code of the language of a text; `UNKNOWN` for a short or mixed text, or for code."""
    guess = language_guesser()
    text = text[:_READ_CHARS]
    letters = sum(map(str.isalpha, text))
    if guess is None or (letters < _MIN_LETTERS and len(_SYLLABLES.findall(text)) < _MIN_CHINESE_LETTERS):
        return UNKNOWN
    code, confidence = guess(text)
    return UNKNOWN if confidence < _MIN_CONFIDENCE or code in _NO_LANGUAGE else code


@dataclass(frozen=True)
class Trouble:
    """A kind of trouble with the encoding of a text.

    Attributes:
        find: Returns start and end of the first place in a text that has it, or None.
        removed: Texts are cleaned of it in training, by `--clean full` or `lines`.
    """

    name: str
    advice: str
    find: Callable[[str], tuple[int, int] | None]
    removed: bool = False


def _search(pattern: re.Pattern[str], text: str) -> tuple[int, int] | None:
    match = pattern.search(text)
    return match.span() if match else None


def _kind(name: str, pattern: str, advice: str, *, removed: bool = False) -> Trouble:
    return Trouble(name, advice, partial(_search, re.compile(pattern)), removed)


# Joiners and tags belong to the scripts of India and Persia, and to emoji; not beside Latin letters.
_JOINER_IN_LATIN = "(?<=[ -~\u00a0-\u024f])[\u200c\u200d]+(?=[ -~\u00a0-\u024f])"
_TAGS = "(?<!\U0001f3f4)(?<![\U000e0020-\U000e007f])[\U000e0000-\U000e007f]+"
_INVISIBLE = f"[\u00ad\u200b\u2060-\u2064\u180e\ufeff]+|{_JOINER_IN_LATIN}|{_TAGS}"
_CHARACTER_TROUBLES = (
    _kind("replacement characters", "\ufffd+", "The text was damaged before: decode its source again."),
    _kind("lone surrogates", "[\ud800-\udfff]+", "Half of a character: it is trained on as '?'.", removed=True),
    _kind(
        "control characters",
        "[\x00-\x08\x0b\x0e-\x1f\x7f]+",
        "Often of a terminal, a PDF or a binary file.",
        removed=True,
    ),
    _kind(
        "Windows-1252 characters",
        "(?<![\xc2-\xf4\x80-\x9f])[\x80-\x9f]+",
        "Dashes, quotes and the like that were read as Latin-1: decode the source as cp1252.",
        removed=True,
    ),
    _kind("invisible characters", _INVISIBLE, "Zero-width spaces, soft hyphens, joiners or tags."),
    _kind(
        "direction controls",
        "[\u202a-\u202e\u2066-\u2069]+",
        "They reorder what is shown: make sure that the text says what it seems to.",
    ),
)


_WINDOWS = re.compile("[\x80-\x9f]+")


def find_mojibake(text: str) -> tuple[int, int] | None:
    """Return the first place where UTF-8 was read in another encoding; None without the library."""
    pattern = _mojibake_pattern()
    for match in () if pattern is None or text.isascii() else pattern.finditer(text):
        if not _WINDOWS.fullmatch(match[0]) or "\xc2" <= text[match.start() - 1 : match.start()] <= "\xf4":
            return match.span()
    return None


@lru_cache(maxsize=1)
def _mojibake_pattern() -> re.Pattern[str] | None:
    with contextlib.suppress(ImportError):
        from ftfy.badness import BADNESS_RE

        return BADNESS_RE
    return None


def finds_mojibake() -> bool:
    """Return whether the library for mojibake is installed."""
    return _mojibake_pattern() is not None


_COMPOSED = re.compile("[\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]")
_ACCENT = re.compile("[A-Za-z][\u0300-\u036f]")


def find_decomposed(text: str) -> tuple[int, int] | None:
    """Return the first letter with an accent as a character of its own (NFD) that one character has."""
    for match in () if text.isascii() else _ACCENT.finditer(text):
        if len(unicodedata.normalize("NFC", match[0])) == 1:
            return match.span()
    return None


def has_composed(text: str) -> bool:
    """Return whether a letter and its accent are one character (NFC)."""
    return not text.isascii() and _COMPOSED.search(text) is not None


MOJIBAKE = Trouble("mojibake", "UTF-8 that was read in another encoding: `ftfy` repairs it.", find_mojibake)
DECOMPOSED = Trouble(
    "decomposed accents (NFD)", "Letters and their accents are two characters.", find_decomposed, removed=True
)
TROUBLES = (MOJIBAKE, *_CHARACTER_TROUBLES, DECOMPOSED)


_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufffd\ud800-\udfff\U000e0000-\U000e007f]"
)


def reveal(text: str) -> str:
    """Replace characters that cannot be seen by their number, such as ‹U+200B›."""
    return _UNSEEN.sub(lambda match: f"‹U+{ord(match[0]):04X}›", text)
