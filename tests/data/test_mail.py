"""Mail: a row for each message, with its headers and its thread."""

import email.policy
import gzip
import mailbox

import pytest

from lora_tuner.data.readers import read_file

from ..data_files import TEXTS, rows
from ..document_files import message


def mbox_file(path, messages):
    box = mailbox.mbox(path)
    for each in messages:
        box.add(each)
    box.close()
    return path


def read_rows(path):
    table = read_file(path)
    streamed = read_file(path, streaming=True)
    assert list(table.rows) == list(streamed.rows) == list(streamed.rows)
    assert table.is_document
    assert not table.is_plain_text
    return list(table.rows)


def test_eml_gives_text_and_headers(tmp_path):
    mail = message("Über all\n\nFrom here\n", subject="Re: Grüße aus Köln", sender="Änn <ann@example.org>")
    (tmp_path / "a.eml").write_bytes(mail.as_bytes(policy=email.policy.SMTP))
    assert read_rows(tmp_path / "a.eml") == [
        {
            "text": "Über all\n\nFrom here",
            "subject": "Re: Grüße aus Köln",
            "from": "Änn <ann@example.org>",
            "to": "bob@example.org",
            "date": "2020-01-02T10:00:00+01:00",
            "thread": "grüße aus köln",
            "file": "a.eml",
        }
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_mbox_gives_row_per_message(tmp_path, packed):
    body = "text\n\nFrom here on\n>quoted\nFrom the end\n"
    path = mbox_file(tmp_path / "a.mbox", [message(f"{text}\n{body}", n) for n, text in enumerate(TEXTS)])
    if packed:
        (tmp_path / "b.mbox.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "b.mbox.gz"
    texts = [row["text"] for row in read_rows(path)]
    assert texts == [f"{text}\n{body.strip()}" for text in TEXTS]


def test_line_that_begins_with_from_ends_no_message(tmp_path):
    content = "From - Thu Jan  2 10:00:00 2020\nSubject: a\n\none\n\n"
    content += "From Monday on, by 10:00\n\nFrom x@y Fri Jan  3 10:00:00 2020\nSubject: b\n\ntwo\n"
    (tmp_path / "a.mbox").write_text(content)
    assert [row["text"] for row in read_rows(tmp_path / "a.mbox")] == ["one\n\nFrom Monday on, by 10:00", "two"]
    (tmp_path / "b.mbox").write_text("From a\nSubject: a\n\none\n\nFrom b\nSubject: b\n\ntwo\n")
    assert [row["text"] for row in read_rows(tmp_path / "b.mbox")] == ["one", "two"]


THREADS = {
    "first": (message("a", 1), "1@example.org"),
    "reply": (message("a", 2, subject="Re: Lunch", reply_to=1), "1@example.org"),
    "reply under a new subject": (message("a", 3, subject="Dinner", reply_to=1), "1@example.org"),
    "reply that names no message": (message("a", 4, subject="AW: Re[2]: Fwd:  LUNCH  today"), "lunch today"),
    "other": (message("a", 5), "5@example.org"),
}


@pytest.mark.parametrize("case", THREADS)
def test_thread_is_that_of_first_message(tmp_path, case):
    mail, thread = THREADS[case]
    (tmp_path / "a.eml").write_bytes(mail.as_bytes())
    assert read_rows(tmp_path / "a.eml")[0]["thread"] == thread


@pytest.mark.parametrize(
    ("headers", "thread"),
    [
        ("References: <a@x>\n <b@x>\nIn-Reply-To: <b@x>\n", "a@x"),
        ("In-Reply-To: Your message of Monday <b@x>\n", "b@x"),
        ("X-GM-THRID: 17\nReferences: <a@x>\n", "17"),
        ("Subject: [Fwd: Hello [1]]\n", "hello [1]"),
        ("Subject: Hello\n", "hello"),
        ("X: y\n", ""),
    ],
)
def test_thread_by_headers(tmp_path, headers, thread):
    (tmp_path / "a.eml").write_text(f"{headers}\ntext")
    assert read_rows(tmp_path / "a.eml")[0]["thread"] == thread


def test_html_is_read_without_plain_text(tmp_path):
    html = "<p>one</p><style>p {}</style><p>caf&eacute;</p>"
    mails = [message("plain", html=html), message(None, html=html), message(" \n", html=html)]
    path = mbox_file(tmp_path / "a.mbox", mails)
    assert [row["text"] for row in read_rows(path)] == ["plain", "one\n\ncafé", "one\n\ncafé"]


def test_attachments_are_counted(load, tmp_path):
    mails = [message(text, n, attachment=b"%PDF") for n, text in enumerate(TEXTS)]
    mails[0].add_attachment("attached text", filename="notes.txt")
    mails[1].add_attachment(message("forwarded"))
    dataset = load(mbox_file(tmp_path / "a.mbox", mails))
    assert rows(dataset) == sorted(TEXTS)
    assert load.notices == [f"{tmp_path / 'a.mbox'}: 32 attachments are not read."]


@pytest.mark.parametrize(
    ("charset", "content"),
    [
        ("utf-8", "café".encode()),
        ("iso-8859-1", "café".encode("cp1252")),
        ("us-ascii", "café".encode()),
        ("us-ascii", "café".encode("cp1252")),
        ("unknown-8bit", "café".encode("cp1252")),
        ("x-none", "café".encode()),
        ("gb2312", "café".encode("gb18030")),
    ],
)
def test_mail_encoding_is_found(tmp_path, charset, content):
    header = f"Subject: x\nContent-Type: text/plain; charset={charset}\nContent-Transfer-Encoding: 8bit\n\n"
    (tmp_path / "a.eml").write_bytes(header.encode() + content)
    assert read_rows(tmp_path / "a.eml")[0]["text"] == "café"


def test_columns_of_mail_choose_rows_and_text(load, tmp_path):
    mails = [message(text, n, subject=f"Subject of {n}" if n % 2 else "x") for n, text in enumerate(TEXTS)]
    path = mbox_file(tmp_path / "a.mbox", mails)
    assert rows(load(path, where=["subject=x"])) == sorted(TEXTS[::2])
    assert load(path, text_column="subject").counts.duplicates == 14


def deep_message():
    parts = "".join(f"Content-Type: multipart/mixed; boundary={n}\n\n--{n}\n" for n in range(3000))
    return f"Subject: deep\n{parts}\ntext"


def wide_message():
    return "Subject: wide\nContent-Type: multipart/mixed; boundary=b\n\n" + "--b\n\npart\n" * 1001 + "--b--\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (deep_message(), "a damaged message (RecursionError)"),
        ("no header\n\ntext", "a message without headers"),
        ("\n\ntext", "a message without headers"),
        (wide_message(), "a message of too many parts"),
    ],
)
def test_damaged_message_is_counted(load, refusal, tmp_path, content, reason):
    path = mbox_file(tmp_path / "a.mbox", [message(text, n) for n, text in enumerate(TEXTS)])
    with path.open("a") as file:
        file.write(f"\nFrom - Thu Jan  2 10:00:00 2020\n{content}\n")
    assert load(path).counts.invalid == 1
    assert load.notices[-1] == (
        f"Left out 1 of 31 rows that cannot be read: 1 with {reason} (first: {path} row 31)."
    )
    (tmp_path / "b.eml").write_text(content)
    assert f"1 with {reason}" in refusal("b.eml")


def test_file_that_is_no_mbox_fails(refusal):
    assert refusal("a.mbox", "Subject: x\n\ntext") == (
        "a.mbox cannot be read: its first line does not begin with 'From ', as in an mbox file."
    )
    assert refusal("b.mbox", "") == "b.mbox has no rows."
