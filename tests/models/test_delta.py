import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tuner.models import delta
from lora_tuner.models.delta import LoraDelta

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))


def random_delta(rank, in_features, out_features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lora_a = torch.randn(rank, in_features, generator=generator)
    return LoraDelta(lora_a, torch.randn(out_features, rank, generator=generator))


def product(layer_delta):
    return layer_delta.B.double() @ layer_delta.A.double()


@given(SIZES)
@settings(max_examples=60, deadline=None)
def test_singular_values_match_full_svd(sizes):
    layer_delta = random_delta(*sizes)
    values = torch.linalg.svdvals(product(layer_delta))
    computed = delta.singular_values(layer_delta)
    torch.testing.assert_close(computed, values[: len(computed)], atol=1e-9, rtol=1e-9)
    assert float(values[len(computed) :].sum()) == pytest.approx(0, abs=1e-9)
    assert delta.squared_norm(layer_delta) == pytest.approx(float(product(layer_delta).square().sum()))


@given(SIZES, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_truncated_delta_is_nearest_of_rank(sizes, rank):
    layer_delta = random_delta(*sizes)
    left, values, right = torch.linalg.svd(product(layer_delta), full_matrices=False)
    nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
    kept = delta.truncate_rank(layer_delta, rank)
    assert kept.rank <= rank
    assert kept.B.dtype == kept.A.dtype == torch.float32
    torch.testing.assert_close(product(kept), nearest, atol=1e-5, rtol=1e-5)
    lost = delta.lost_energy({"layer": layer_delta}, {"layer": kept})["layer"]
    assert lost == pytest.approx(float(values[rank:].square().sum() / values.square().sum()), abs=1e-9)


def test_sum_with_different_ranks_is_exact():
    first = {"a": random_delta(3, 8, 6, 1), "b": random_delta(2, 5, 7, 2)}
    second = {"b": random_delta(4, 5, 7, 3), "c": random_delta(1, 4, 4, 4)}
    total = delta.sum_deltas([(0.7, first), (-0.3, second)])
    assert {module: layer_delta.rank for module, layer_delta in total.items()} == {"a": 3, "b": 6, "c": 1}
    torch.testing.assert_close(product(total["a"]), 0.7 * product(first["a"]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        product(total["b"]), 0.7 * product(first["b"]) - 0.3 * product(second["b"]), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(product(total["c"]), -0.3 * product(second["c"]), atol=1e-6, rtol=1e-6)


def test_lost_energy_is_weighted_by_layer():
    large, small = random_delta(2, 6, 6, 1), random_delta(2, 6, 6, 2)
    exact = {"large": LoraDelta(large.A, large.B * 10), "small": small, "none": LoraDelta(small.A, small.B * 0)}
    shares = delta.lost_energy(exact, {"large": exact["large"]})
    assert shares == {"large": 0.0, "small": pytest.approx(1.0), "none": 0.0}
    share = delta.squared_norm(small) / (delta.squared_norm(small) + delta.squared_norm(exact["large"]))
    assert delta.total_lost_energy(exact, shares) == pytest.approx(share)
    assert delta.total_lost_energy({"none": exact["none"]}, {"none": 0.0}) == 0.0


def test_deltas_of_experts_are_those_of_each():
    """Of all experts together the energy at each rank is the sum of theirs."""
    torch.manual_seed(0)
    stacked = LoraDelta(torch.randn(3, 5, 8), torch.randn(3, 6, 5))
    each = [LoraDelta(a, b) for a, b in zip(stacked.A, stacked.B, strict=True)]
    energies = sum(delta.singular_values(one).square() for one in each)
    torch.testing.assert_close(delta.singular_values(stacked).square(), energies)
    assert delta.squared_norm(stacked) == pytest.approx(float(energies.sum()))
    cut = delta.truncate_rank(stacked, 2)
    for number, one in enumerate(each):
        expected = delta.truncate_rank(one, 2)
        torch.testing.assert_close(cut.B[number] @ cut.A[number], expected.B @ expected.A)
    lost = delta.lost_energy({"x": stacked}, {"x": cut})["x"]
    assert lost == pytest.approx(float(energies[2:].sum() / energies.sum()), rel=1e-4)
    total = delta.sum_deltas([(2.0, {"x": stacked}), (-1.0, {"x": cut})])["x"]
    torch.testing.assert_close(total.B @ total.A, 2 * stacked.B @ stacked.A - cut.B @ cut.A)
    lora_a, lora_b = stacked.matrices  # as PEFT's get_delta_weight takes them apart
    parts = lora_b.reshape(6, 5, 3), lora_a.reshape(3, 5, 8)
    torch.testing.assert_close(torch.einsum("o r e, e r i -> e o i", *parts), stacked.B @ stacked.A)
    assert stacked.size * stacked.rank == lora_a.numel() + lora_b.numel()
