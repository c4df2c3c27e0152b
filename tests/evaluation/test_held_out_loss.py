"""Held-out loss: each row alone, whatever the batch, and its cache."""

import pytest
import torch

from lora_tuner import ModelOptions, Notice
from lora_tuner.config import HELD_OUT_MAX_TOKENS
from lora_tuner.data.packing import IGNORE_INDEX, PackedSequences, collate
from lora_tuner.evaluation import held_out_loss
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import tiny_models


@pytest.fixture
def base(model_folder):
    return load_base(find_base(str(model_folder)), ModelOptions(device="cpu"))


def test_loss_matches_rows_alone(base):
    rows = held_out_loss.encode_held_out(base, tiny_models.reviews(7))
    held_out = held_out_loss.measure_loss(base.model, base, rows)
    total = count = 0.0
    for row in rows:
        ids = torch.tensor([row.tolist()])
        with torch.no_grad():
            log = torch.log_softmax(base.model(ids).logits[0, :-1].double(), -1)
        total -= log.gather(1, ids[0, 1:, None]).sum().item()
        count += len(row) - 1
    assert held_out.loss == pytest.approx(total / count, abs=1e-5)


def test_loss_is_independent_of_batch_size(base):
    rows = held_out_loss.encode_held_out(base, tiny_models.reviews(20))
    losses = [
        held_out_loss.measure_loss(base.model, base, rows, batch_tokens=size).loss
        for size in (1, 100, 512, 100_000)
    ]
    assert max(losses) - min(losses) < 1e-4


def test_loss_is_independent_of_packing(base):
    rows = held_out_loss.encode_held_out(base, tiny_models.reviews(20))
    expected = held_out_loss.measure_loss(base.model, base, rows).loss
    for packing in (True, False):
        sequences = PackedSequences(rows, tiny_models.CONTEXT, packing=packing)
        batch = collate([sequences[i] for i in range(len(sequences))], 0)
        labels = batch.pop("labels")
        with torch.no_grad(), base.lm_head.skip_lm_head():
            nll = base.lm_head.nll(base.model(**batch, use_cache=False).logits, labels)
        assert (nll.sum() / (labels != IGNORE_INDEX).sum()).item() == pytest.approx(expected, abs=1e-4)


def test_long_rows_are_truncated(base):
    (row,) = held_out_loss.encode_held_out(base, ["word " * 3000])
    assert len(row) == min(HELD_OUT_MAX_TOKENS, tiny_models.CONTEXT)


def test_measure_loss_restores_training_mode(base):
    rows = held_out_loss.encode_held_out(base, tiny_models.reviews(2))
    for training in (True, False):
        base.model.train(training)
        held_out_loss.measure_loss(base.model, base, rows)
        assert base.model.training is training


def test_base_loss_is_cached(base, monkeypatch):
    rows = held_out_loss.encode_held_out(base, tiny_models.reviews(5, seed=5))
    first = held_out_loss.measure_base_loss(base, rows)
    monkeypatch.setattr(held_out_loss, "measure_loss", lambda *_, **__: pytest.fail("measured again"))
    assert held_out_loss.measure_base_loss(base, rows) == first


@pytest.mark.parametrize("damage", [
    lambda text: text[:-9], lambda text: text.replace("1", "2"), lambda text: "", lambda text: '{"nll": [1], "predictions": [1]}',
])  # fmt: skip
def test_damaged_loss_cache_is_made_again(base, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    rows, notices = held_out_loss.encode_held_out(base, tiny_models.reviews(5, seed=6)), []
    first = held_out_loss.measure_base_loss(base, rows)
    (file,) = (tmp_path / "cache" / "losses").iterdir()
    file.write_text(damage(file.read_text()))
    for _ in range(2):
        assert held_out_loss.measure_base_loss(base, rows, notices.append) == first
    assert [notice.text for notice in notices if isinstance(notice, Notice)] == [
        f"{file} is damaged: what it held is made again."
    ]
