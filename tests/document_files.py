"""Files of documents and mail for tests, as their usual tools write them."""

import io
import zipfile
from email.message import EmailMessage

import docx

CONTAINER = """<?xml version="1.0"?><container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="OEBPS/content.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""
OPF = """<?xml version="1.0" encoding="utf-8"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>A book</dc:title></metadata><manifest>
<item id="css" href="style.css" media-type="text/css"/>
<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>
{items}</manifest><spine>{spine}</spine></package>"""
CHAPTER = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.1//EN" "http://www.w3.org/TR/xhtml11/DTD/xhtml11.dtd">
<html xmlns="http://www.w3.org/1999/xhtml"><head><title/><script src="a.js"/></head><body>
<h1>{title}</h1><p><a id="p1"/>{text}&nbsp;&mdash;</p></body></html>"""


def zip_file(parts, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def docx_file(*paragraphs):
    document, buffer = docx.Document(), io.BytesIO()
    for paragraph in paragraphs:
        document.add_paragraph(paragraph)
    document.save(buffer)
    return buffer.getvalue()


def epub_parts(*texts):
    """Return the parts of a book whose spine has the chapters in the reverse order of their names."""
    names = [f"chapter {number}" for number in range(len(texts))]
    items = "".join(
        f'<item id="c{number}" href="text/chapter%20{number}.xhtml" media-type="application/xhtml+xml"/>'
        for number, _ in enumerate(texts)
    )
    spine = '<itemref idref="nav" linear="no"/>' + "".join(
        f'<itemref idref="c{n}"/>' for n in reversed(range(len(texts)))
    )
    return {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": CONTAINER,
        "OEBPS/content.opf": OPF.format(items=items, spine=spine),
        "OEBPS/nav.xhtml": "<html><body><nav><ol><li>Contents</li></ol></nav></body></html>",
        "OEBPS/style.css": "p {}",
        **{
            f"OEBPS/text/{name}.xhtml": CHAPTER.format(title=name, text=text)
            for name, text in zip(names, texts, strict=True)
        },
    }


def message(text, number=0, **headers):
    """Return a mail; `html`, `reply_to` and `attachment` add what they say."""
    mail = EmailMessage()
    mail["From"] = headers.get("sender", "Ann <ann@example.org>")
    mail["To"] = "bob@example.org"
    mail["Date"] = "Thu, 02 Jan 2020 10:00:00 +0100"
    mail["Message-ID"] = f"<{number}@example.org>"
    mail["Subject"] = headers.get("subject", "Lunch")
    if "reply_to" in headers:
        mail["References"] = mail["In-Reply-To"] = f"<{headers['reply_to']}@example.org>"
    if text is not None:
        mail.set_content(text)
    if "html" in headers and text is None:
        mail.set_content(headers["html"], subtype="html")
    elif "html" in headers:
        mail.add_alternative(headers["html"], subtype="html")
    if "attachment" in headers:
        mail.add_attachment(headers["attachment"], maintype="application", subtype="pdf", filename="a.pdf")
    return mail
