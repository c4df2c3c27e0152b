"""The choice of an adapter from scores."""

import pytest

from lora_tuner.adapters.manifest import RoutingInfo
from lora_tuner.inference import routing
from lora_tuner.inference.routing import Score


def score(adapter, gain, needed=0.2, data=None):
    return Score(adapter, gain, needed, 2 * needed, 40, data)


def test_highest_gain_is_chosen():
    choice = routing.choose([score("a", 0.1), score("b", 0.5), score("c", -1.0)])
    assert (choice.adapter, choice.margin) == ("b", pytest.approx(0.4))
    assert [each.adapter for each in choice.scores] == ["b", "a", "c"]


def test_margin_counts_the_base():
    assert routing.choose([score("a", 0.3), score("b", -1.0)]).margin == pytest.approx(0.3)


def test_base_is_chosen_without_lead():
    choice = routing.choose([score("a", 0.1), score("b", -0.3)])
    assert (choice.adapter, choice.margin) == (None, pytest.approx(0.1))
    assert routing.choose([score("a", 0.6), score("b", 0.5)]).adapter is None, "any text gains with both"
    assert routing.choose([]).adapter is None


def test_adapter_of_same_data_is_no_rival():
    assert routing.choose([score("a", 0.6, data="poems"), score("b", 0.5, data="poems")]).adapter == "a"


def test_expected_gain_is_interpolated():
    info = RoutingInfo(tokens=[8, 32], gain=[1.0, 0.5], deviation=[0.2, 0.1])
    expected = [routing.expected_gain(info, tokens) for tokens in (2, 8, 16, 32, 500)]
    assert expected == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.5])
