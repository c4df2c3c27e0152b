"""The general text that ships with the package."""

import json
from collections import Counter
from pathlib import Path

import pytest

from lora_tuner.data import general_text
from lora_tuner.data.general_text import SUBSET_ROWS, general_texts
from lora_tuner.data.near_duplicates import clusters
from lora_tuner.data.splitting import content_hash

# With other texts the figures of adapters that exist, and the scores of `auto`, mean something else.
KNOWN = "0f79fb99727ea1ba31783038ab5970b62e4f315e17f29a62002f4fd11a6118dd"


def file_rows():
    file = Path(general_text.__file__).with_suffix(".jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_general_text_is_unchanged():
    assert content_hash([text for kind in general_texts() for text in kind.texts]) == KNOWN


def test_rows_name_kind_and_source():
    rows = file_rows()
    assert all(row.keys() == {"kind", "source", "text"} and all(row.values()) for row in rows)
    assert set(Counter(row["kind"] for row in rows).values()) == {40}
    assert [kind.name for kind in general_texts()] == list(dict.fromkeys(row["kind"] for row in rows))
    assert sum(len(kind.texts) for kind in general_texts()) == len(rows) == 320


def test_rows_are_short_and_different():
    texts = [text for kind in general_texts() for text in kind.texts]
    lengths = [len(text) for text in texts]
    assert min(lengths) > 120
    assert max(lengths) < 800
    assert clusters(texts) == []


@pytest.mark.parametrize("number", range(8))
def test_subset_is_first_rows(number):
    all_rows, some = general_texts()[number], general_texts(subset=True)[number]
    assert some.name == all_rows.name
    assert some.texts == all_rows.texts[:SUBSET_ROWS]
    assert sum(map(len, some.texts)) / SUBSET_ROWS < sum(map(len, all_rows.texts)) / len(all_rows.texts)
