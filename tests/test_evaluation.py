import math

import pytest
import torch

from lora_tuner import evaluation, tokens
from lora_tuner.base_model import find_base, load_base
from lora_tuner.config import HELD_OUT_LENGTH

from . import tiny


@pytest.fixture
def base(model_folder):
    return load_base(find_base(str(model_folder)), "cpu")


def test_the_loss_is_that_of_each_row_alone(base):
    rows = evaluation.encode_held_out(base, tiny.reviews(7))
    held_out = evaluation.measure(base.model, base, rows)
    total = count = 0.0
    for row in rows:
        ids = torch.tensor([row.tolist()])
        with torch.no_grad():
            log = torch.log_softmax(base.model(ids).logits[0, :-1].double(), -1)
        total -= log.gather(1, ids[0, 1:, None]).sum().item()
        count += len(row) - 1
    assert held_out.loss == pytest.approx(total / count, abs=1e-5)


def test_the_loss_does_not_change_with_the_batch_size(base):
    rows = evaluation.encode_held_out(base, tiny.reviews(20))
    losses = [evaluation.measure(base.model, base, rows, batch_tokens=size).loss for size in (1, 100, 512, 100_000)]
    assert max(losses) - min(losses) < 1e-4


def test_packing_and_padding_do_not_change_it_either(base):
    rows = evaluation.encode_held_out(base, tiny.reviews(20))
    expected = evaluation.measure(base.model, base, rows).loss
    for packing in (True, False):
        sequences = tokens.Sequences(rows, tiny.CONTEXT, packing=packing)
        batch = tokens.collate([sequences[i] for i in range(len(sequences))], 0)
        labels = batch.pop("labels")
        with torch.no_grad():
            nll = evaluation.causal_nll(base.model(**batch, use_cache=False).logits, labels)
        assert (nll.sum() / (labels != tokens.NO_LABEL).sum()).item() == pytest.approx(expected, abs=1e-4)


def test_long_rows_are_cut_at_512_or_the_models_context(base):
    (row,) = evaluation.encode_held_out(base, ["word " * 3000])
    assert len(row) == min(HELD_OUT_LENGTH, tiny.CONTEXT)


def test_measuring_leaves_the_mode_of_the_model(base):
    rows = evaluation.encode_held_out(base, tiny.reviews(2))
    for training in (True, False):
        base.model.train(training)
        evaluation.measure(base.model, base, rows)
        assert base.model.training is training


def test_the_base_is_measured_once(base, monkeypatch):
    rows = evaluation.encode_held_out(base, tiny.reviews(5, seed=5))
    first = evaluation.measure_base(base, rows)
    monkeypatch.setattr(evaluation, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert evaluation.measure_base(base, rows) == first


def test_a_broken_cache_of_losses_is_measured_again(base, caches):
    rows = evaluation.encode_held_out(base, tiny.reviews(5, seed=6))
    first = evaluation.measure_base(base, rows)
    for file in (caches / "own" / "losses").iterdir():
        file.write_text("{broken")
    assert evaluation.measure_base(base, rows) == first


def test_the_gain_and_its_standard_error():
    base = evaluation.HeldOut([10.0, 40.0, 30.0], [5, 10, 10])
    adapter = evaluation.HeldOut([8.0, 37.0, 25.0], [5, 10, 10])
    result = evaluation.compare(base, adapter)
    assert result.base_loss == pytest.approx(80 / 25)
    assert result.loss == pytest.approx(70 / 25)
    assert result.gain == pytest.approx(10 / 25)
    # differences 2, 3, 5 against 0.4 x tokens = 2, 4, 4: residuals 0, -1, 1
    assert result.standard_error == pytest.approx(math.sqrt(2 * 3 / 2) / 25)
    assert (result.rows, result.tokens) == (3, 25)


def test_perplexity_does_not_overflow():
    result = evaluation.compare(evaluation.HeldOut([1e6], [1]), evaluation.HeldOut([0.0], [1]))
    assert result.perplexities == (math.exp(700), 1.0)
