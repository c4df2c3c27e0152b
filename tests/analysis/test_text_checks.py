"""Languages and encoding trouble are told, and ordinary text in any script has none."""

import pytest

from lora_tuner.analysis import text_checks

TROUBLED = {
    "mojibake": ["This isnâ€™t good", "cafÃ© is nice", "it\xe2\x80\x99s"],
    "replacement characters": ["caf\ufffd"],
    "lone surrogates": ["half \ud83d of it"],
    "control characters": ["a bell \x07", "\x1b[31mred", "null \x00"],
    "Windows-1252 characters": ["a dash \x96 here"],
    "invisible characters": [
        "zero\u200bwidth",
        "\ufeffmark",
        "soft\u00adhyphen",
        "join\u200der",
        "a\U000e0041\U000e0042",
    ],
    "direction controls": ["user\u202etxt.exe"],
    "decomposed accents (NFD)": ["cafe\u0301"],
}
ORDINARY = [
    "Plain text.\n\twith tabs\r\n", "voilà «très bien» £5, naïve café Ørsted", "Größe: 5 µm, ±3 °C – “quoted” …",
    "Привет, как дела?", "你好，世界", "これは映画です", "안녕하세요", "שלום עולם", "مرحبا بالعالم", "می\u200cخواهم", "क्\u200dष",
    "👩‍👩‍👧 👍🏽 ❤️ 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f 🇩🇪", "x̄ and q̃",
]  # fmt: skip


@pytest.mark.parametrize("name", TROUBLED)
def test_encoding_trouble_is_named(name):
    for text in TROUBLED[name]:
        assert [trouble.name for trouble in text_checks.TROUBLES if trouble.find(text)] == [name], text


def test_ordinary_text_has_no_trouble():
    found = [(text, trouble.name) for text in ORDINARY for trouble in text_checks.TROUBLES if trouble.find(text)]
    assert found == []


def test_unseen_characters_are_revealed():
    assert text_checks.reveal("a\u200bb\x1bc\ud800\u202e") == "a‹U+200B›b‹U+001B›c‹U+D800›‹U+202E›"
    assert text_checks.reveal("Größe\n你好 👍🏽") == "Größe\n你好 👍🏽"


def test_language_is_detected_or_unknown():
    texts = {
        "This film is really great and I liked it.": "en",
        "Das ist ein guter Film, den ich gern gesehen habe.": "de",
        "Le film était très mauvais, vraiment.": "fr",
        "これは映画です": "ja",
        "ok": "unknown",
        "1234 5678": "unknown",
        "def f(x):\n    return [y ** 2 for y in x if y]": "unknown",
        "": "unknown",
    }
    assert {text: text_checks.detect_language(text) for text in texts} == texts
