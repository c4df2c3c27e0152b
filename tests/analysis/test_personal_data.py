"""Personal data is found in the forms that people write it in, and not in what only looks like it."""

import pytest

from lora_tuner.analysis import phones
from lora_tuner.analysis.personal_data import find_personal_data, replace_personal_data

# A text with [[what is personal]] in it.
FOUND = {
    "email": [
        "Write to [[john.smith+news@example.com]].",
        "<[[a.b@sub.example.co.uk]]>",
        "[[müller@bücher.de]]",
        "[[john@example.com]].Thanks",
        "mailto:[[jane_doe99@gmail.com]]?subject=x",
        "[[john (at) example (dot) com]]",
        "[[jo\u200bhn@example.com]] [[john&#64;example.com]]",
        "o'Brien: [[o'brien@mail.ie]]; [[a@b.co]]",
    ],
    "phone": [
        "call [[+1 650-253-0000]] now",
        "[[+49 30 901820]], tel:[[+44 20 7946 0958]]",
        "Tel. [[030 901820]]",
        "Phone: [[6502530000]]",
        "[[(650) 253-0000]] or [[650-253-0000]]",
        "my phone number is [[020 7946 0958]]",
        "Téléphone : [[01 42 68 53 00]]",
        "手机：[[138 0013 8000]]",
        "[[+919876543210]]",
    ],
    "card": [
        "[[4111 1111 1111 1111]]",
        "[[5555555555554444]],",
        "card [[4111-1111-1111-1111]] 12/26 123",
        "[[3782 822463 10005]], [[30569309025904]]",
        "visa [[4222222222222]]",
        "order 12, card number [[6011111111111117]]",
    ],
    "iban": [
        "IBAN: [[GB29 NWBK 6016 1331 9268 19]] BIC COBADEFF",
        "[[DE89370400440532013000]].",
        "[[fr1420041010050500013M02606]]",
    ],
    "key": [
        "[[AKIAIOSFODNN7EXAMPLE]]",
        "aws_secret_access_key = [[wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY]]",
        "[[ghp_16C7e42F292c6912E7710c838347Ae178B4a]]",
        "[[glpat-xK9mQ2vL8nR4tY7wZ3bD]]",
        "OPENAI=[[sk-proj-abc123DEF456ghi789JKL012mno345PQR678]]",
        "[[sk-ant-api03-R2D2c3poabcdefGHIJKL1234567890-mnopqrstuvAA]]",
        "[[hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh]]",
        "[[xoxb-123456789012-1234567890123-AbCdEfGhIjKlMnOpQrStUvWx]]",
        "[[AIzaSyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY]]",
        "[[sk_live_4eC39HqLyjWDarjtT1zdp7dc]]",
        "[[-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7abc==\n-----END RSA PRIVATE KEY-----]] after",
        "[[-----BEGIN PRIVATE KEY-----\\nMIIEpAIBAAKCAQEA7abc]]",
        "[[eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U]]",
        'password = "[[S3cr3t!xK9#mQ2v]]"',
        "my password is [[tR7$kkP02q]]",
        "DB_PASSWORD=[[tr0ub4dor&3xZ]]",
        "?token=[[aB3dE5fG7hI9jK1l]]&page=2",
        '{\\"client_secret\\": \\"[[aB3dE5fG7hI9jK1l]]\\"}',
        "Authorization: Bearer [[abcDEF123456ghiJKL789mno]]",
        "postgres://admin:[[xK9mQ2vL8]]@db.example.com:5432/app",
    ],
}
CLEAN = [
    *("version 2.10.1234567", "v1.2.3-rc.4+build.5678901", "react@^18.2.0 lodash@4.17.21", "3.14159265358979323846"),
    *("ISBN 978-3-16-148410-0", "ISBN-10 0-306-40615-2", "978 0 306 40615 7", "EAN 4006381333931", "4006381333931"),
    *("2024-01-15 10:23:45.123456", "1700000000", "1700000000123", "10/10/2003 1999", "1999-2004", "phone 2007-2009"),
    *("order 4929123456", "order number 4111111111111111", "ORD-4111111111111111", "Order #12345678901234"),
    *("tracking 9400111899223197428490", "serial 35-209900-176148-1", "1 000 000 000", "$1,234,567.89"),
    *("d41d8cd98f00b204e9800998ecf8427e", "commit 4b825dc642cb6eb9a060e54bf8d69288fbee4904"),
    *("550e8400-e29b-41d4-a716-446655440000", "192.168.100.200", "2001:0db8:85a3:0000:0000:8a2e:0370:7334"),
    *("@john.doe and @jane", "@user@mastodon.social", '@app.route("/users/<int:id>")', "A@B.T, x@w.mean()"),
    *("icon@2x.png", "git clone git@github.com:owner/repo.git", "https://example.com/@me?id=123456789012"),
    *('password = os.environ["DB_PASSWORD2"]', "token = tokenizer.encode(text2)", "password: str = Field(None)"),
    *('api_key="YOUR_API_KEY_1"', "api_key=<your-key-2>", "password: changeme123", "secret = config.secret_key2"),
    *("sk-folding-cube-container-large", "sk-learn-a-new-thing-every-day-2024", 'token_type = "Bearer"', "token: abc"),
    *("bearer of good news everyone", "password must be at least 8 characters", "hf_hub_download_something_long_enough"),
    *("1234 5678 9012 3456", "4111 1111 1111 1112", "0000 0000 0000 0000", "GB82 WEST 1234 5698 7654 33", "call 911"),
]  # fmt: skip


@pytest.mark.parametrize("kind", FOUND)
def test_personal_data_is_found(kind):
    for example in FOUND[kind]:
        text = example.replace("[[", "").replace("]]", "")
        expected = [part.partition("]]")[0] for part in example.split("[[")[1:]]
        findings = find_personal_data(text)
        assert [text[found.start : found.end] for found in findings] == expected, example
        assert {found.kind for found in findings} == {kind}


@pytest.mark.parametrize("region", [None, "US", "DE"])
def test_numbers_code_and_mentions_are_no_personal_data(region):
    assert [text for text in CLEAN if find_personal_data(text, region)] == []


def test_masked_examples_show_their_form_alone():
    masked = {
        "john@example.com": "j***@e***.com",
        "a@b.co": "***@***.co",
        "4111 1111 1111 1234 is no card, 4111111111111111": "**** **** **** 1111",
        "DE89 3704 0044 0532 0130 00": "DE** **** **** 3000",
        "+49 30 901820": "+49 *** *** **20",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a": "ghp_****",
        'password = "S3cr3t!xK9#mQ2v"': "password=****",
        "postgres://admin:xK9mQ2vL8@db.example.com/app": "postgres://****",
    }
    assert {text: find_personal_data(text)[0].masked for text in masked} == masked


def test_replaced_text_keeps_the_rest():
    text, findings = replace_personal_data(
        '{"mail": "a.b@c.de", "url": "pg://u:aB3dE5fG7@h", "n": "+49 30 901820"}'
    )
    assert text == '{"mail": "[EMAIL]", "url": "pg://u:[KEY]@h", "n": "[PHONE]"}'
    assert [found.kind for found in findings] == ["email", "key", "phone"]
    assert replace_personal_data(text) == (text, [])


def test_region_finds_its_national_numbers():
    assert replace_personal_data("Ruf 030 901820 an", "DE")[0] == "Ruf [PHONE] an"
    assert not find_personal_data("Ruf 030 901820 an")
    assert not find_personal_data("Ruf 030 901820 an", "US")


def test_field_name_tells_a_password_or_phone():
    assert replace_personal_data("tR7$kkP02q", field="password")[0] == "[KEY]"
    assert replace_personal_data("030 901820", field="phone")[0] == "[PHONE]"
    assert not find_personal_data("tR7$kkP02q", field="comment")
    assert not find_personal_data("changeme", field="password")


def test_long_runs_take_no_time():
    for part in ("a.", "1 ", "-----BEGIN PRIVATE KEY-----", "password=", "a@", "+1", "eyJ.", "x://a:"):
        find_personal_data(part * (20_000 // len(part)))


def test_phones_without_library_are_not_searched(monkeypatch):
    monkeypatch.setattr(phones, "_phonenumbers", lambda: None)
    assert not phones.finds_phones()
    assert [found.kind for found in find_personal_data("+49 30 901820, a@b.de")] == ["email"]
