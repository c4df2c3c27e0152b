"""The choice of an adapter from scores."""

import pytest

from lora_tuner.adapters.manifest import OpeningGains
from lora_tuner.inference import routing
from lora_tuner.inference.routing import Score


def score(adapter, gain, data=None, general=0.0, spread=0.1):
    return Score(adapter, gain, expected=0.5, general=general, spread=spread, tokens=40, data=data)


def test_highest_gain_is_chosen():
    choice = routing.choose([score("a", 0.1), score("b", 0.5), score("c", -1.0)])
    assert choice.adapter == "b"
    assert [each.adapter for each in choice.scores] == ["b", "a", "c"]
    assert choice.margin == pytest.approx(0.5 - choice.scores[0].needed)
    assert choice.margin > 0


def test_gain_is_compared_with_general_text():
    """An adapter that gains on text of any kind needs more."""
    (alone,) = routing.choose([score("a", 0.4)]).scores
    assert routing.choose([score("a", 0.4)]).adapter == "a"
    choice = routing.choose([score("a", 0.4, general=0.4)])
    assert choice.adapter is None
    assert choice.margin == pytest.approx(choice.scores[0].needed - 0.4)
    assert choice.scores[0].needed == pytest.approx(alone.needed + 0.4)
    assert routing.choose([score("a", 0.4, spread=0.5)]).adapter is None
    assert routing.choose([]).adapter is None


def test_gain_is_compared_with_other_adapters():
    """Text that several adapters gain on is of none of them."""
    choice = routing.choose([score("a", 0.4), score("b", 0.39)])
    assert choice.adapter is None
    assert routing.choose([score("a", 0.4), score("b", -0.3)]).adapter == "a"


def test_adapter_of_same_data_is_no_rival():
    assert routing.choose([score("a", 0.4, data="poems"), score("b", 0.39, data="poems")]).adapter == "a"


def test_gain_below_that_of_base_is_not_chosen():
    assert routing.choose([score("a", -0.1, general=-0.9)]).adapter is None


def test_gains_are_interpolated():
    gains = OpeningGains(tokens=[8, 32], gain=[1.0, 0.5], deviation=[0.2, 0.1])
    found = [routing.gain_after(gains, tokens) for tokens in (2, 8, 16, 32, 128)]
    expected = [(1.0, 0.2), (1.0, 0.2), (0.75, 0.15), (0.5, 0.1), (0.5, 0.05)]
    assert found == [pytest.approx(each) for each in expected]
