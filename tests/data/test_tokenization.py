"""Tokenization, packing and collation."""

import numpy as np
import pytest
import torch

from lora_tuner import ModelOptions
from lora_tuner.data import tokenization
from lora_tuner.data.packing import IGNORE_INDEX, PackedSequences, collate, pack_rows
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import tiny_models


def rows(*lengths):
    return [np.arange(1, length + 1, dtype=np.int32) for length in lengths]


@pytest.fixture
def base(model_folder):
    return load_base(find_base(str(model_folder)), ModelOptions(device="cpu"))


@pytest.mark.parametrize("packing", [True, False])
def test_eos_of_each_row_is_label(gpt2, packing):
    base = load_base(find_base(str(gpt2)), ModelOptions(device="cpu"))
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id  # masking by id would lose it
    encoded = tokenization.encode_texts(base.tokenizer, tiny_models.reviews(9))
    sequences = PackedSequences(encoded, tiny_models.CONTEXT, packing=packing)
    batch = collate([sequences[index] for index in range(len(sequences))], base.tokenizer.pad_token_id)
    labels = batch["labels"]
    assert int((labels == base.tokenizer.eos_token_id).sum()) == 9
    assert int((labels != IGNORE_INDEX).sum()) == sum(len(row) - 1 for row in encoded)
    assert torch.all((labels == batch["input_ids"]) | (labels == IGNORE_INDEX))


def test_text_spelling_eos_is_plain_text(gpt2):
    tokenizer = load_base(find_base(str(gpt2)), ModelOptions(device="cpu")).tokenizer
    (row,) = tokenization.encode_texts(tokenizer, [f"one {tiny_models.END} two"])
    assert row.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(row[:-1]) == f"one {tiny_models.END} two"


def test_truncated_rows_lose_eos_chunks_keep_it():
    long, short = rows(10, 3)
    assert [row.tolist() for row in tokenization.truncate([long, short], 4)[0]] == [[1, 2, 3, 4], [1, 2, 3]]
    chunks, longer = tokenization.truncate([long, short], 4, chunk=True)
    assert [len(chunk) for chunk in chunks] == [4, 4, 2, 3]
    assert longer == 1
    chunks, _ = tokenization.truncate(rows(9), 4, chunk=True)
    assert [len(chunk) for chunk in chunks] == [4, 4]  # one token has no label


def test_packing_keeps_rows_whole():
    lengths = [60, 64, 30, 30, 4, 10, 50, 3]
    groups = pack_rows(rows(*lengths), 64)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in group) <= 64 for group in groups)
    assert len(groups) == 4  # 251 tokens in 4 x 64


def test_collate_pads_to_longest_item():
    batch = collate([[row] for row in rows(3, 5)], pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100], [-100, 2, 3, 4, 5]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_row_has_solo_logits(base, attention):
    base.model.set_attn_implementation(attention)
    encoded = tokenization.encode_texts(base.tokenizer, tiny_models.reviews(12))
    sequences = PackedSequences(encoded, tiny_models.CONTEXT, packing=True)
    items = [sequences[index] for index in range(len(sequences))]
    assert max(len(item) for item in items) > 1
    batch = collate(items, base.tokenizer.pad_token_id)
    batch.pop("labels")
    with torch.inference_mode():
        packed = base.model(**batch, use_cache=False).logits
        for index, item in enumerate(items):
            start = 0
            for row in item:
                alone = base.model(torch.from_numpy(row.astype(np.int64))[None], use_cache=False).logits[0]
                torch.testing.assert_close(packed[index, start : start + len(row)], alone, atol=1e-4, rtol=1e-4)
                start += len(row)
