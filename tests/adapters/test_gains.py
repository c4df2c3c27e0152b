import dataclasses
import math

import pytest

from lora_tuner.adapters.gains import HeldOutLoss, gain_covariance, paired_gain
from lora_tuner.adapters.manifest import EvalResult


def test_gain_covariance_has_paired_errors():
    """The variance of a difference of gains is that of the paired gain, by row and by group."""
    one, other = (HeldOutLoss(nll, [3, 4, 2, 5]) for nll in ([9.0, 8, 7, 9], [8.0, 8, 5, 9.5]))
    for groups in ([], [0, 0, 1, 2]):
        base = HeldOutLoss([10.0, 9, 8, 12], [3, 4, 2, 5], groups)
        covariance = gain_covariance(base, [one, other])
        assert covariance[0][1] == covariance[1][0]
        for number, adapter in enumerate((one, other)):
            error = paired_gain(base, adapter).standard_error
            assert covariance[number][number] == pytest.approx(error**2)
        gap = paired_gain(dataclasses.replace(one, groups=groups), other)
        difference = covariance[0][0] + covariance[1][1] - 2 * covariance[0][1]
        assert difference == pytest.approx(gap.standard_error**2)
    single = HeldOutLoss([10.0], [3])
    assert gain_covariance(single, [single]) is None


def test_paired_gain_and_standard_error():
    base = HeldOutLoss([10.0, 40.0, 30.0], [5, 10, 10])
    adapter = HeldOutLoss([8.0, 37.0, 25.0], [5, 10, 10])
    result = paired_gain(base, adapter)
    assert result.base_loss == pytest.approx(80 / 25)
    assert result.loss == pytest.approx(70 / 25)
    assert result.gain == pytest.approx(10 / 25)
    # differences 2, 3, 5 against 0.4 x tokens = 2, 4, 4: residuals 0, -1, 1
    assert result.standard_error == pytest.approx(math.sqrt(2 * 3 / 2) / 25)
    assert (result.rows, result.tokens) == (3, 25)


def test_one_row_gives_no_error():
    one = paired_gain(HeldOutLoss([10.0], [5]), HeldOutLoss([8.0], [5]))
    assert (one.gain, one.standard_error) == (pytest.approx(0.4), None)
    older = one.model_dump() | {"standard_error": 0.0}
    assert EvalResult.model_validate(older) == one


def test_perplexity_does_not_overflow():
    result = paired_gain(HeldOutLoss([1e6], [1]), HeldOutLoss([0.0], [1]))
    assert result.perplexities == (math.exp(700), 1.0)
