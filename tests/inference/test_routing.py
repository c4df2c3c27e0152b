"""The choice of an adapter from scores."""

import pytest

from lora_tuner.adapters.manifest import OpeningGains
from lora_tuner.inference import routing
from lora_tuner.inference.routing import Score


def score(adapter, gain, data=None, needed=0.2, left_out=False):
    return Score(adapter, gain, needed, expected=0.5, general=0.0, tokens=40, data=data, left_out=left_out)


def test_highest_gain_is_chosen():
    choice = routing.choose([score("a", 0.1), score("b", 0.5), score("c", -1.0)])
    assert (choice.adapter, choice.margin) == ("b", pytest.approx(0.3))
    assert [each.adapter for each in choice.scores] == ["b", "a", "c"]


def test_base_is_chosen_below_needed_gain():
    choice = routing.choose([score("a", 0.15), score("b", -0.3)])
    assert (choice.adapter, choice.margin) == (None, pytest.approx(0.05))
    assert routing.choose([score("a", -0.1, needed=-0.5)]).adapter is None, "the base is better"
    assert routing.choose([]).adapter is None


def test_text_that_several_gain_on_goes_to_base():
    choice = routing.choose([score("a", 0.6), score("b", 0.59)])
    assert choice.adapter is None
    assert choice.margin == pytest.approx(choice.scores[0].needed - 0.6)
    assert routing.choose([score("a", 0.6), score("b", 0.3)]).adapter == "a"


def test_adapter_of_same_data_is_no_rival():
    assert routing.choose([score("a", 0.6, data="poems"), score("b", 0.59, data="poems")]).adapter == "a"


def test_adapter_left_out_is_no_rival():
    choice = routing.choose([score("a", 0.4), score("b", 0.1), score("c", 0.6, left_out=True)])
    assert (choice.adapter, choice.margin) == ("a", pytest.approx(0.2))
    assert [each.adapter for each in choice.scores] == ["a", "b", "c"]
    assert routing.choose([score("c", 0.6, left_out=True)]).adapter is None


def gains(mean, deviation, tokens=(8, 32)):
    return OpeningGains(tokens=[*tokens], gain=[mean] * len(tokens), deviation=[deviation] * len(tokens))


def test_needed_gain_lies_between_own_and_general_text():
    own = gains(0.8, 0.2)
    needed = [routing.needed_gain(own, gains(mean, 0.2), 16) for mean in (-0.2, 0.2, 0.6)]
    assert needed[0] < needed[1] < needed[2]
    assert 0.2 < needed[1] < 0.8
    assert needed[1] < routing.needed_gain(own, gains(0.2, 0.4), 16), "general text gains more by chance"
    assert routing.needed_gain(own, gains(0.9, 0.2), 16) > 0.9, "an adapter of no text of its own"


def test_needed_gain_of_rows_that_begin_alike():
    assert -0.5 < routing.needed_gain(gains(3.0, 0.0), gains(-0.5, 0.0), 16) < 3.0


def test_gains_are_interpolated():
    measured = OpeningGains(tokens=[8, 32], gain=[1.0, 0.5], deviation=[0.2, 0.1])
    found = [routing.gain_after(measured, tokens) for tokens in (2, 8, 16, 32, 128)]
    expected = [(1.0, 0.2), (1.0, 0.2), (0.75, 0.15), (0.5, 0.1), (0.5, 0.05)]
    assert found == [pytest.approx(each) for each in expected]
