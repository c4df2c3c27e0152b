import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tuner.models import delta
from lora_tuner.models.delta import LoraDelta

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))


def made(rank, into, out, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return LoraDelta(torch.randn(rank, into, generator=draw), torch.randn(out, rank, generator=draw))


def wide(update):
    return update.B.double() @ update.A.double()


@given(SIZES)
@settings(max_examples=60, deadline=None)
def test_singular_values_match_full_svd(sizes):
    update = made(*sizes)
    values = torch.linalg.svdvals(wide(update))
    found = delta.singular_values(update)
    torch.testing.assert_close(found, values[: len(found)], atol=1e-9, rtol=1e-9)
    assert float(values[len(found) :].sum()) == pytest.approx(0, abs=1e-9)
    assert delta.squared_norm(update) == pytest.approx(float(wide(update).square().sum()))


@given(SIZES, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_truncated_delta_is_nearest_of_rank(sizes, rank):
    update = made(*sizes)
    left, values, right = torch.linalg.svd(wide(update), full_matrices=False)
    nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
    kept = delta.truncate_rank(update, rank)
    assert kept.rank <= rank
    assert kept.B.dtype == kept.A.dtype == torch.float32
    torch.testing.assert_close(wide(kept), nearest, atol=1e-5, rtol=1e-5)
    lost = delta.lost_energy({"layer": update}, {"layer": kept})["layer"]
    assert lost == pytest.approx(float(values[rank:].square().sum() / values.square().sum()), abs=1e-9)


def test_sum_with_different_ranks_is_exact():
    first = {"a": made(3, 8, 6, 1), "b": made(2, 5, 7, 2)}
    second = {"b": made(4, 5, 7, 3), "c": made(1, 4, 4, 4)}
    total = delta.sum_deltas([(0.7, first), (-0.3, second)])
    assert {module: update.rank for module, update in total.items()} == {"a": 3, "b": 6, "c": 1}
    torch.testing.assert_close(wide(total["a"]), 0.7 * wide(first["a"]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(wide(total["b"]), 0.7 * wide(first["b"]) - 0.3 * wide(second["b"]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(wide(total["c"]), -0.3 * wide(second["c"]), atol=1e-6, rtol=1e-6)


def test_lost_energy_is_weighted_by_layer():
    large, small = made(2, 6, 6, 1), made(2, 6, 6, 2)
    exact = {"large": LoraDelta(large.A, large.B * 10), "small": small, "none": LoraDelta(small.A, small.B * 0)}
    shares = delta.lost_energy(exact, {"large": exact["large"]})
    assert shares == {"large": 0.0, "small": pytest.approx(1.0), "none": 0.0}
    share = delta.squared_norm(small) / (delta.squared_norm(small) + delta.squared_norm(exact["large"]))
    assert delta.total_lost_energy(exact, shares) == pytest.approx(share)
    assert delta.total_lost_energy({"none": exact["none"]}, {"none": 0.0}) == 0.0
