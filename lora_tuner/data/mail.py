"""Read mail, one row per message: its text, the headers that tell what it is, and its thread.

The text is that of the parts that are shown as plain text; of a message that has only HTML, the
text of that. Attachments are counted and not read.
"""

import email.message
import email.parser
import email.policy
import io
import re
from collections import Counter
from collections.abc import Iterator
from email.header import decode_header
from email.utils import parsedate_to_datetime
from pathlib import Path

from ..errors import DataError, InvalidRowError
from ..text import data_extension
from .cleaning import clean_message
from .documents import UnreadableRow
from .markup import decode, html_text
from .opening import MAX_DOCUMENT, TOO_LARGE, open_file, read_document, unpack

COLUMNS = ["text", "subject", "from", "to", "date", "thread", "file"]
_ATTACHMENTS = "attachments"
# As mail programs write the first line of a message; other lines may begin with "From " too.
_FROM_LINE = re.compile(rb"From .*\b(Mon|Tue|Wed|Thu|Fri|Sat|Sun),? .*\d\d:\d\d")
_REPLY = re.compile(r"\s*(?:(?:re|aw|sv|antw|vs|fwd?|wg|tr|rv)\s*(?:\[\d+\])?\s*:|\[fwd?:)\s*", re.IGNORECASE)
_ID = re.compile(r"<([^<>\s]+)>")
_MAX_PARTS = 1000  # of one message


def read_mail(path: Path, name: str, unread: Counter[str]) -> Iterator[dict[str, object]]:
    """Yield a row for each message of an eml or mbox file. One that cannot be read is an `UnreadableRow`.

    Args:
        name: Value of the column `file`.
        unread: Counts what is in the messages and not read.
    """
    with open_file(path) as file:
        messages = _split_mbox(file) if data_extension(path) == ".mbox" else iter([read_document(file)])
        for content in messages:
            if not content.strip():
                continue
            try:
                yield _read_message(content, unread) | {"file": name}
            except InvalidRowError as error:
                yield UnreadableRow(error.reason)
            except DataError:
                raise
            except Exception as error:  # the parser raises errors of many types for damaged messages
                yield UnreadableRow(f"a damaged message ({type(error).__name__})")


def _split_mbox(file: io.FileIO) -> Iterator[bytes]:
    """Yield the messages of an mbox file, without its own lines."""
    lines: list[bytes] = []
    size, after_blank, is_dated = 0, True, True
    for number, line in enumerate(io.BufferedReader(unpack(file), 2**16)):
        if number == 0:
            if not line.startswith(b"From "):
                raise ValueError("its first line does not begin with 'From ', as in an mbox file")
            is_dated = bool(_FROM_LINE.match(line))
        if after_blank and line.startswith(b"From ") and (not is_dated or _FROM_LINE.match(line)):
            yield b"".join(lines)
            lines, size = [], 0
        else:
            lines.append(line[1:] if re.match(rb">+From ", line) else line)
            size += len(line)
            if size > MAX_DOCUMENT:
                raise ValueError(TOO_LARGE)
        after_blank = not line.strip()
    yield b"".join(lines)


def _read_message(content: bytes, unread: Counter[str]) -> dict[str, object]:
    message = email.parser.BytesParser(policy=email.policy.compat32).parsebytes(content)
    if not message.keys():
        raise InvalidRowError("a message without headers")
    subject, references = _header(message, "subject"), _header(message, "references")
    ids = _ID.findall(references) or _ID.findall(_header(message, "in-reply-to"))
    is_reply = bool(_REPLY.match(subject))
    own = [] if is_reply else _ID.findall(_header(message, "message-id"))
    found = [_header(message, "x-gm-thrid"), *ids[:1], *own[:1], _normalize(subject)]
    return {
        "text": _read_body(message, unread),
        "subject": subject,
        "from": _header(message, "from"),
        "to": _header(message, "to"),
        "date": _read_date(_header(message, "date")),
        "thread": next(filter(None, found), ""),
    }


def _normalize(subject: str) -> str:
    """Return a subject without marks of replies, in lower case."""
    while match := _REPLY.match(subject):
        subject = subject[match.end() :].removesuffix("]" if match[0].lstrip().startswith("[") else "")
    return " ".join(subject.lower().split())


def _header(message: email.message.Message, name: str) -> str:
    """Return a header as one line of text; "" without it."""
    value = message.get(name)
    parts = decode_header(value) if value is not None else []
    ignored = Counter[str]()
    return " ".join(
        "".join(
            part if isinstance(part, str) else decode(part, ignored, charset) for part, charset in parts
        ).split()
    )


def _read_date(text: str) -> str:
    """Return a date in ISO format; as written if it is none."""
    try:
        return parsedate_to_datetime(text).isoformat()
    except (ValueError, TypeError, IndexError, OverflowError):
        return text


def _read_body(message: email.message.Message, unread: Counter[str]) -> str:
    """Return the texts of the parts that are shown. Of alternatives the plain text is taken, else HTML."""
    texts, waiting, parts = list[str](), [message], 0
    while waiting:
        part, parts = waiting.pop(), parts + 1
        if parts > _MAX_PARTS:
            raise InvalidRowError("a message of too many parts")
        kind = part.get_content_type()
        if part.get_content_maintype() == "multipart" and part.is_multipart():
            waiting += reversed(_choose_parts(part))
        elif kind in ("text/plain", "text/html") and part.get_content_disposition() != "attachment":
            content = part.get_payload(decode=True)
            text = decode(content if isinstance(content, bytes) else b"", unread, part.get_content_charset())
            if kind == "text/plain":
                text = "\n".join(line.rstrip() for line in clean_message(text, "none").split("\n")).strip("\n")
            texts.append(html_text(text) if kind == "text/html" else text)
        else:
            unread[_ATTACHMENTS] += 1
    return "\n\n".join(filter(str.strip, texts))


def _choose_parts(part: email.message.Message) -> list[email.message.Message]:
    """Return the parts of a multipart; of alternatives that with plain text, else with HTML, else the last."""
    parts = [child for child in part.get_payload() if isinstance(child, email.message.Message)]
    if part.get_content_type() != "multipart/alternative":
        return parts
    for kind in ("text/plain", "text/html"):
        for choice in parts:
            if any(
                child.get_content_type() == kind and str(child.get_payload()).strip() for child in choice.walk()
            ):
                return [choice]
    return parts[-1:]
