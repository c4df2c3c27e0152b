"""A report on reviews with seeded faults, made once."""

import csv

import pytest

from lora_tuner.analysis import data_report
from lora_tuner.config import TrainConfig

from .. import tiny_models

SECRETS = {
    "email": ("john.smith@example.com", "j***@e***.com"),
    "phone": ("+1 650-253-0000", "+1 *** *** **00"),
    "card": ("4111 1111 1111 1111", "**** **** **** 1111"),
    "iban": ("DE89 3704 0044 0532 0130 00", "DE** **** **** 3000"),
    "key": ("ghp_16C7e42F292c6912E7710c838347Ae178B4a", "ghp_****"),
}
HOSTILE = "<script>alert(1)</script> \u202e <img src=//x.example/a.png> {{ 7 * 7 }} \x1b[31mred"


def write_dirty(path):
    """Write 60 rows: personal data in row 3, a near duplicate, markup, an empty row and a duplicate."""
    texts = tiny_models.reviews(60)
    texts[2] = f"I am {'; '.join(secret for secret, _ in SECRETS.values())}."
    texts[10] = "The story works well and the camera never fails in this long film about the sea and the wind."
    texts[11] = "The story works well and the camera never fails in this long film about the sea and the winds."
    texts[12], texts[20], texts[21] = HOSTILE, "", texts[22]
    texts[30] = "the actor works well. " * 60
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("text", "label"), *((text, number % 2) for number, text in enumerate(texts))]
        )
    return path


@pytest.fixture(scope="session")
def dirty(tmp_path_factory):
    return write_dirty(tmp_path_factory.mktemp("dirty") / "dirty.csv")


@pytest.fixture(scope="session")
def report(dirty, gpt2):
    config = TrainConfig(
        dataset=str(dirty), base=str(gpt2), max_length=64, device="cpu", clean="none", near_duplicates="keep"
    )
    return data_report.make_report(config, loss_rows=8)
