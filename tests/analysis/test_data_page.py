"""The page is complete by itself, and nothing in the data becomes a part of it."""

import base64
import hashlib
import re
from html.parser import HTMLParser

from lora_tuner.analysis.data_page import is_page, render_page

from .conftest import SECRETS


class Elements(HTMLParser):
    """Names and attributes of the elements of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.texts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def test_page_loads_nothing(report):
    page = render_page(report)
    elements = Elements(page)
    assert not {"script", "img", "link", "iframe", "object", "base", "form"} & set(elements.names)
    for name, value in elements.attributes:
        assert name not in ("src", "style", "srcset", "action")
        assert not name.startswith("on")
        assert name != "href" or value.startswith("#")
    (style,) = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}';" in page


def test_text_of_rows_is_escaped(report):
    page = render_page(report)
    assert not [part for part in ("<script", "<img", "\x1b", "\u202e") if part in page]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in page


def test_page_has_all_parts_and_no_personal_data(report):
    page = render_page(report)
    for heading in ("Rows", "Lengths", "Near duplicates", "Languages", "Personal data and keys", "Encoding"):
        assert f"<h2>{heading}</h2>" in page
    assert "Hardest" in page
    assert "<h3>Left out as copies, such as</h3>" in page
    for secret, masked in SECRETS.values():
        assert secret not in page
        assert masked in page


def test_page_is_recognized(report, tmp_path):
    (tmp_path / "page.html").write_text(render_page(report), encoding="utf-8")
    (tmp_path / "other.html").write_text("<html>mine</html>")
    assert is_page(tmp_path / "page.html")
    assert not is_page(tmp_path / "other.html")
