"""Documents: a row each, as plain text with its paragraphs; broken and hostile ones are counted."""

import gzip
import sys
import zipfile

import docx
import pytest
from docx.oxml import parse_xml

from lora_tuner.config import TrainConfig
from lora_tuner.data import opening
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.markup import html_text
from lora_tuner.data.readers import read_file

from ..data_files import TEXTS, rows, table
from ..document_files import docx_file, epub_parts, zip_file

PAGE = "<html><head><title>x</title><meta charset={0}><style>p {{}}</style></head><body><p>{1}</p></body></html>"


def write_all(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def text_of(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    table = read_file(path)
    streamed = read_file(path, streaming=True)
    assert list(table.rows) == list(streamed.rows) == list(streamed.rows)
    (row,) = table.rows
    assert row["file"] == path.name
    assert table.is_document
    return row["text"]


# HTML


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        (
            "<h1>A &amp; B</h1><p>one\n two <b>th</b>ree</p>loose<p>br<br>eak",
            "A & B\n\none two three\n\nloose\n\nbr\neak",
        ),
        ("<ul><li>a<ul><li>a1<li>a2</ul><li><p>b</p></ul><p>c", "a\na1\na2\nb\n\nc"),
        ("<p>a</p><ol><li>b</ol><ol><li>c</ol>", "a\n\nb\n\nc"),
        ("<table><tr><th>a<th>b<tr><td><p>c</p><td>d<br>e</table>", "a\tb\nc\td e"),
        ("<table><tr><td>side<td><h2>h</h2><p>p</p></table>q", "side\n\nh\n\np\n\nq"),
        ("<table><tr><td>a<td><table><tr><td>b<td>c<tr><td>d</table></table>", "a\n\nb\tc\nd"),
        (
            "<script>if (a<b) 'x'</script><nav><a>menu</a></nav><p>a<script/>b</p><!-- c --><noscript>d</noscript>",
            "ab",
        ),
        ("<pre>def f():\n    return 1\n</pre><p>a", "def f():\n    return 1\n\na"),
        ("<dl><dt>t<dd>d</dl>", "t\nd"),
        ("&eacute;&nbsp;&#8212; &lt;b&gt; &bogus; e\u0301\u200b", "é — <b> &bogus; é"),
        ('<!DOCTYPE html [<!ENTITY a "b"><!ENTITY c SYSTEM "/etc/passwd">]><p>x &a;&c;', "x &a;&c;"),
        ("<title/><p>a</p><td>b", "a\n\nb"),
        ("no markup,\n\n one paragraph", "no markup, one paragraph"),
        ("<head><p>a", "a"),
        ("<div hidden></div><p> </p>", ""),
        ("", ""),
    ],
)
def test_html_text_has_paragraphs_and_lines(markup, text):
    assert html_text(markup) == text


@pytest.mark.parametrize(
    ("charset", "encoding"),
    [
        ("utf-8", "utf-8"),
        ("utf-8", "utf-16"),
        ("utf-8", "utf-8-sig"),
        ("windows-1252", "cp1252"),
        ("ISO-8859-1", "cp1252"),
        ("'none of these'", "utf-8"),
        ("''", "cp1252"),
        ("koi8-r", "koi8-r"),
        ("UTF-16", "utf-16-le"),
    ],
)
def test_html_encoding_is_found(tmp_path, charset, encoding):
    text = "привет" if charset == "koi8-r" else "“café” 5"
    assert text_of(tmp_path / "a.html", PAGE.format(charset, text).encode(encoding)) == text


def test_undecodable_characters_are_counted(load, tmp_path):
    page = PAGE.format("utf-8", "caf\u00e9 " * 300 + "end").encode() + b"<p>\xff\xfe"
    load("a.html", page, clean="full")
    assert f"{tmp_path / 'a.html'}: 2 characters that are not of their encoding are not read." in load.notices


@pytest.mark.parametrize("unit", ["<table><tr><td>", "<ul><li>", "<div>", "<b>"])
def test_deep_html_takes_linear_time(unit):
    assert "end" in html_text(unit * 20_000 + "end")


# docx


def test_docx_text_has_paragraphs_and_lines(tmp_path):
    document = docx.Document()
    document.add_heading("Title", 0)
    document.add_paragraph("one  two\nbreak\ttab")
    for style in ("List Bullet", "List Bullet", "List Number"):
        document.add_paragraph(style, style=style)
    cells = document.add_table(2, 2)
    for number in range(4):
        cells.cell(number // 2, number % 2).text = f"cell {number}"
    document.add_paragraph("end")
    document.sections[0].header.paragraphs[0].text = "header"
    document.save(tmp_path / "x.docx")
    assert text_of(tmp_path / "a.docx", (tmp_path / "x.docx").read_bytes()) == (
        "Title\n\none two\nbreak tab\n\nList Bullet\nList Bullet\nList Number\n\ncell 0\tcell 1\ncell 2\tcell 3\n\nend"
    )


def test_docx_changes_and_controls_are_read(tmp_path):
    """Text in content controls and tracked insertions is text; what was deleted or is there twice is not."""
    document = docx.Document()
    body, name = document.element.body, 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    runs = "<w:r><w:t>kept </w:t></w:r><w:ins><w:r><w:t>new</w:t></w:r></w:ins>"
    runs += "<w:del><w:r><w:delText>old</w:delText></w:r></w:del>"
    runs += "<w:moveFrom><w:r><w:t>moved</w:t></w:r></w:moveFrom>"
    copies = '<mc:AlternateContent xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006">'
    copies += '<mc:Choice Requires="x">'
    copies += "<w:r><w:t> box</w:t></w:r></mc:Choice><mc:Fallback><w:r><w:t> box</w:t></w:r></mc:Fallback></mc:AlternateContent>"
    body.insert(0, parse_xml(f"<w:p {name}>{runs}{copies}</w:p>"))
    body.insert(
        0,
        parse_xml(f"<w:sdt {name}><w:sdtContent><w:p><w:r><w:t>control</w:t></w:r></w:p></w:sdtContent></w:sdt>"),
    )
    document.save(tmp_path / "x.docx")
    assert text_of(tmp_path / "a.docx", (tmp_path / "x.docx").read_bytes()) == "control\n\nkept new box"


# epub and Markdown


def test_epub_follows_its_spine(tmp_path):
    content = zip_file(epub_parts("one", "two"))
    assert text_of(tmp_path / "a.epub", content) == "chapter 1\n\ntwo —\n\nchapter 0\n\none —"


def test_markdown_is_kept_as_written(load, tmp_path):
    content = "---\ntitle: x\n---\n\n# Title\n\n<b>text</b>  \n\n\n- item\n"
    assert text_of(tmp_path / "a.md", content) == content
    assert text_of(tmp_path / "b.markdown", "\ufeff" + content.replace("\n", "\r\n")) == content
    folder = write_all(tmp_path / "notes", {f"{n}.md": f"# {text}\n\nmore\n" for n, text in enumerate(TEXTS)})
    write_all(tmp_path / "code", {f"{n}.rst": f"# {text}\n\nmore\n" for n, text in enumerate(TEXTS)})
    notes, code = load(folder), load(tmp_path / "code")
    assert (notes.train, notes.held_out, notes.clean) == (code.train, code.held_out, "none")


def test_compressed_documents_are_read(tmp_path):
    assert text_of(tmp_path / "a.html.gz", gzip.compress(b"<p>text")) == "text"
    assert text_of(tmp_path / "a.md.gz", gzip.compress(b"text")) == "text"


# Folders


def test_mixed_folder_keeps_paragraphs_of_documents(load, tmp_path):
    files = {
        "a.csv": table([f"<p>{text}</p>" for text in TEXTS]),
        "b.html": "<h1>Head</h1><p>text",
        "c.docx": docx_file("one", "two"),
        "deep/d.epub": zip_file(epub_parts("one")),
        "e.md": "# Head\n\ntext",
        "README.md": "about",
        "CHANGELOG.md": "about",
        "p.png": "",
        "q.PNG": "",
        "r.pdf": "%PDF",
    }
    write_all(tmp_path / "mixed", files)
    documents = {"Head\n\ntext", "one\n\ntwo", "chapter 0\n\none —", "# Head\n\ntext"}
    dataset = load("mixed")
    assert set(rows(dataset)) == documents | set(TEXTS)
    assert dataset.clean is None
    assert load.notices[0].endswith("mixed: 1 .csv, 1 .html, 1 .docx, 1 .epub, 1 .md.")
    assert load.notices[1].endswith("mixed, such as CHANGELOG.md: 2 about the data, 2 .png, 1 .pdf.")
    assert set(load("mixed", clean="full").train) & {"Head text", "one two"}
    streamed = TrainConfig(dataset=str(tmp_path / "mixed"), streaming=True, max_steps=1)
    assert set(rows(load_dataset(streamed))) == documents | set(TEXTS)


def test_pages_beside_code_are_read_if_more(load, tmp_path):
    code = {f"{n}.py": f"x = {n}\n" for n in range(3)}
    write_all(tmp_path / "code", code | {"a.html": "<p>page", "README.md": "# About\n"})
    assert sorted(rows(load("code"))) == sorted([*code.values(), "# About\n"])
    write_all(
        tmp_path / "site", {f"{n}.html": f"<p>page {n}" for n in range(4)} | {"a.js": "x", "README.md": "x"}
    )
    assert rows(load("site")) == [f"page {n}" for n in range(4)]


def test_names_of_documents_are_no_splits(load, tmp_path):
    pages = {f"{name} {n}.html": f"<p>{name} {n}" for name in ("test", "train", "plan") for n in range(5)}
    write_all(tmp_path / "pages", pages)
    assert load("pages").counts.read == 15
    write_all(tmp_path / "split", {f"{name[:4]}/{name}": content for name, content in pages.items()})
    assert load("split").splits == "test, measured: test" or load("split").eval_split == "test"


# Broken and hostile documents


def docx_of(document, **parts):
    rels = (
        '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r" '
        'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/>'
        "</Relationships>"
    )
    return zip_file({"_rels/.rels": rels, "word/document.xml": document} | parts)


LAUGHS = (
    '<!DOCTYPE x [<!ENTITY a0 "lol">' + "".join(f'<!ENTITY a{n + 1} "{f"&a{n};" * 10}">' for n in range(9)) + "]>"
)
EXTERNAL = '<!DOCTYPE x [<!ENTITY a9 SYSTEM "file:///etc/passwd">]>'
BROKEN = {
    "no zip": ("x.docx", "text", "it is no zip file, as documents and workbooks of this type are"),
    "old or encrypted": (
        "x.docx",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 99,
        "it is an Office file that is encrypted or of an",
    ),
    "cut short": ("x.docx", docx_file("a")[:-500], "File is not a zip file"),
    "a part is damaged": (
        "x.docx",
        docx_file("a").replace(b"PK\3\4", b"PK\3\5"),
        "is damaged (",
    ),
    "a workbook": ("x.docx", docx_of("<workbook/>"), "it is no Word document: its main part is a workbook"),
    "no part": ("x.docx", zip_file({"a": "b"}), "it has no part '_rels/.rels'"),
    "bad xml": ("x.docx", docx_of("<document><p>"), "its part 'word/document.xml' is damaged ("),
    "entities": ("x.docx", docx_of(LAUGHS + "<document>&a9;</document>"), "it declares a document type"),
    "an outer entity": ("x.docx", docx_of(EXTERNAL + "<document>&a9;</document>"), "it declares a document type"),
    "entities in an index": (
        "x.epub",
        zip_file(epub_parts("a") | {"META-INF/container.xml": LAUGHS + "<x>&a9;</x>"}),
        "Maximum entity amplification factor exceeded",
    ),
    "a path out of it": (
        "x.epub",
        zip_file(epub_parts("a") | {"../../x": "a"}),
        "its part '../../x' lies outside of it",
    ),
    "no chapter": (
        "x.epub",
        zip_file(epub_parts("a") | {"OEBPS/content.opf": "<package/>"}),
        "its part 'OEBPS/content.opf' names no chapter",
    ),
    "a missing chapter": (
        "x.epub",
        zip_file({name: part for name, part in epub_parts("a").items() if "chapter" not in name}),
        "it has no part 'OEBPS/text/chapter 0.xhtml'",
    ),
    "encrypted chapters": (
        "x.epub",
        zip_file(
            epub_parts("a")
            | {"META-INF/encryption.xml": '<e><CipherReference URI="OEBPS/text/chapter%200.xhtml"/></e>'}
        ),
        "its chapters are encrypted",
    ),
    "another method": (
        "x.epub",
        zip_file(epub_parts("a"), zipfile.ZIP_LZMA),
        "is compressed by a method that such files do not have",
    ),
    "gzip cut short": ("x.html", gzip.compress(b"<p>text")[:-9], "its compressed data is damaged or cut short ("),
    "a PDF": ("x.html", "%PDF-1.4", "it is a PDF file: extract its text, as with `pdftotext`"),
    "a binary Markdown": ("x.md", b"a\0b", "byte 1 is null, as in UTF-16 or a binary file"),
    "a link to itself": ("x.docx", None, "it is a link to nothing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_document_is_one_line(load, refusal, tmp_path, case):
    """It is an error alone, and counted in a folder, where others are read."""
    name, content, reason = BROKEN[case]
    write_all(tmp_path / "some", {f"{n}.html": f"<p>{text}" for n, text in enumerate(TEXTS)})
    if content is None:
        (tmp_path / "some" / name).symlink_to(name)
    else:
        write_all(tmp_path / "some", {name: content})
    message = refusal(f"some/{name}")
    assert message.startswith(f"some/{name} cannot be read: ")
    assert reason in message
    assert "\n" not in message
    dataset = load("some")
    assert (dataset.counts.read, dataset.counts.invalid) == (31, 1)
    assert load.notices[-1].startswith(
        "Left out 1 of 31 rows that cannot be read: 1 with a document that cannot be read: "
    )
    assert reason in load.notices[-1]
    assert load.notices[-1].endswith(f"(first: {tmp_path / 'some' / name} row 1).")
    assert "31 rows cannot be read, and --max-invalid 0 allows" in refusal("some", max_invalid=0)


def test_encrypted_zip_entry_is_refused(refusal):
    content = bytearray(docx_file("a"))
    entry = content.index(b"PK\1\2")
    content[entry + 8] |= 1
    assert "' is encrypted: save it without a password." in refusal("a.docx", bytes(content))


def test_zip_bomb_is_refused(refusal, monkeypatch):
    monkeypatch.setattr(opening, "MAX_UNPACKED", 10**5)
    bomb = docx_of("<document>" + " " * 10**7 + "</document>")
    assert "and 200 times its size, as of a decompression bomb" in refusal("a.docx", bomb)
    chapters = epub_parts(*[" " * 10**6] * 10)
    assert "and 200 times its size, as of a decompression bomb" in refusal("a.epub", zip_file(chapters))


def test_large_document_is_refused(refusal, monkeypatch):
    monkeypatch.setattr(opening, "MAX_DOCUMENT", 10**4)
    for name, content in (
        ("a.html", b"<p>text</p>" * 1000),
        ("a.docx", docx_of("<document>" + "<p/>" * 5000 + "</document>")),
    ):
        assert (
            refusal(name, content)
            == f"{name} cannot be read: it has more than 500 MB, the most of one document: divide it."
        )


def test_missing_package_is_named(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "lxml.etree", None)
    monkeypatch.setitem(sys.modules, "lxml", None)
    assert refusal("a.html", "<p>x") == (
        "Reading html, docx and epub needs the package lxml: pip install 'lora_tuner[documents]' or lxml."
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.pdf", "extract its text"),
        ("a.doc", "save it as .docx"),
        ("a.xls", "save it as"),
        ("a.rtf", "save it as .docx"),
        ("a.docx.gz", "unpack it first"),
        ("a.zip", "unpack it first"),
        ("a.odt", "save it as .docx"),
        ("a.pages", "save it"),
    ],
)
def test_unread_type_says_how_to_convert(refusal, tmp_path, name, advice):
    assert refusal(name, "x").startswith(f"{name} has an unsupported file type: {advice}")
    write_all(tmp_path / "some", {name: "x"})
    assert f"nor program code. Of {name[name.rindex('.') :]} files: {advice}" in refusal("some")


def test_documents_have_no_text_column_to_name(load, tmp_path):
    write_all(tmp_path / "some", {"a.csv": table(header=("body", "n")), "b.html": "<p>text"})
    assert "text" in rows(load("some", text_column="body"))
    with pytest.raises(Exception, match="has no column 'n' to choose rows by: its columns are text, file"):
        load("some", text_column="body", where=["n=1"])
