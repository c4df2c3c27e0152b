"""Tokenization, packing and collation."""

import numpy as np
import pytest
import torch
from tokenizers import processors

from lora_tuner import ModelOptions
from lora_tuner.data import chat, splitting, tokenization
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
    assert [row.tolist() for row in tokenization.truncate([long, short], 4)] == [[1, 2, 3, 4], [1, 2, 3]]
    chunks = tokenization.truncate([long, short], 4, chunk=True)
    assert [len(chunk) for chunk in chunks] == [4, 4, 2, 3]
    chunks = tokenization.truncate(rows(9), 4, chunk=True)
    assert [len(chunk) for chunk in chunks] == [4, 4]  # one token has no label


SENTENCES = {
    "sentences": (" ".join(f"Sentence {number} is about the actor." for number in range(400)), "Sentence"),
    "lower case": ("the actor never works. the director always fails! her voice shines? " * 90, ("the", "her")),
    "quotes": ('He said: "Stop." Then Mr. Jones left (at last.) ' * 90, ("He", "Then")),
    "lines": (
        "".join(f"{' ' * 4 * (number % 3)}item_{number} = {number}\n" for number in range(400)),
        ("item_", " "),
    ),
    "paragraphs": ("\n\n".join(f"Part {number}\n\nno stop here" for number in range(200)), ("Part", "no stop")),
    "full-width stops": ("我喜欢这部电影。她不喜欢！" * 60, ("我", "她")),
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_chunks_begin_with_sentence_or_line(kind):
    text, beginnings = SENTENCES[kind]
    tokenizer = tiny_models.tokenizer()
    chunks, use = tokenization.encode_rows(tokenizer, [text], 64)
    assert all(len(chunk) <= 64 for chunk in chunks)
    parts = [tokenizer.decode(chunk) for chunk in chunks]
    assert "".join(parts) == text + tiny_models.END
    assert [part.endswith(tiny_models.END) for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(part.removeprefix(" ").startswith(beginnings) for part in parts)
    assert sum(map(len, chunks)) / len(chunks) > 30
    assert (use.share, use.answer_share, use.truncated_rows) == (1, None, 0)


@pytest.mark.parametrize(
    "text", ["word " * 500, "works" * 900, "\U0001f600" * 500, " " * 9000 + "so", "a. " + "b" * 900]
)
def test_chunks_without_sentences_keep_text(text):
    tokenizer = tiny_models.tokenizer()
    chunks, _ = tokenization.encode_rows(tokenizer, [text, "short"], 64)
    parts = [tokenizer.decode(chunk) for chunk in chunks]
    assert "".join(parts) == f"{text}{tiny_models.END}short{tiny_models.END}"
    assert "\ufffd" not in "".join(parts)
    assert all(len(chunk) <= 64 for chunk in chunks)


def test_each_chunk_has_tokenizer_prefix():
    tokenizer = tiny_models.tokenizer()
    begin = ("<s>", tokenizer.add_special_tokens({"bos_token": "<s>"}) and tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[begin]
    )
    chunks, _ = tokenization.encode_rows(tokenizer, ["the actor works. " * 60], 32)
    assert len(chunks) > 2
    assert [chunk.tolist().count(tokenizer.bos_token_id) for chunk in chunks] == [1] * len(chunks)
    assert all(chunk[0] == tokenizer.bos_token_id and len(chunk) <= 32 for chunk in chunks)


def test_long_text_is_tokenized_in_windows(monkeypatch):
    tokenizer, lengths = tiny_models.tokenizer(), []
    call = type(tokenizer).__call__

    def measured(self, text, **options):
        lengths.append(max(map(len, text)) if isinstance(text, list) else len(text))
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", measured)
    chunks, _ = tokenization.encode_rows(tokenizer, ["the actor works. " * 5000], 64)
    assert len(chunks) > 100
    assert max(lengths) <= 64 * 64


def test_truncated_rows_give_used_share():
    tokenizer = tiny_models.tokenizer()
    texts = ["the actor never works. " * 40, "short"]
    (row, short), use = tokenization.encode_rows(tokenizer, texts, 16, "truncate")
    whole = sum(map(len, tokenization.encode_texts(tokenizer, texts)))
    assert (len(row), use.tokens, use.used_tokens, use.truncated_rows) == (16, whole, 16 + len(short), 1)
    _, use = tokenization.encode_rows(tokenizer, ["the actor never works. " * 4000], 16, "truncate")
    whole = len(tokenization.encode_texts(tokenizer, ["the actor never works. " * 4000])[0])
    assert use.tokens == pytest.approx(whole, rel=0.05)  # estimated


@pytest.mark.parametrize(("long_rows", "share"), [("auto", 0.5), ("truncate", 0.5), ("chunk", 1)])
def test_conversation_reports_cut_answers(long_rows, share):
    tokenizer = tiny_models.tokenizer()
    row = chat.encode_pair("so?", "yes " * 60, str)
    (encoded,) = tokenization.encode_texts(tokenizer, [row])
    rows, use = tokenization.encode_rows(tokenizer, [row], len(encoded) // 2, long_rows)
    assert (len(rows) == 1) == (share < 1)
    assert use.share == pytest.approx(share, abs=0.02)
    assert use.answer_share == pytest.approx(share, abs=0.04)
    assert use.truncated_rows == (share < 1)


def test_text_that_goes_on_has_no_end():
    tokenizer = tiny_models.tokenizer()
    for text in ("the actor works. ", "the actor works. " * 90):
        open_rows, _ = tokenization.encode_rows(tokenizer, [text + splitting.GOES_ON], 64)
        ended_rows, _ = tokenization.encode_rows(tokenizer, [text], 64)
        assert "".join(map(tokenizer.decode, open_rows)) == text
        assert "".join(map(tokenizer.decode, ended_rows)) == text + tiny_models.END


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


@pytest.mark.parametrize(("length", "padded"), [(1, 32), (31, 32), (32, 32), (33, 64)])
def test_padded_length_recurs(length, padded):
    batch = collate([rows(length)], pad_id=0, cu_seqlens=True, pad_to_step=True)
    assert batch["input_ids"].shape == (1, padded)
    assert (batch["labels"][0, length:] == IGNORE_INDEX).all()
    assert batch["cu_seq_lens_q"].tolist() == [0, padded]


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
