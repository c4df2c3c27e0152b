"""The C kernels: built once, whole or not at all, and never hiding what is not finite."""

import re
from functools import partial

import pytest
import torch

from lora_tuner.models import native


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Build or load kernels as a new process would, in a cache of its own."""
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "FLAGS", ("-O0", *native.FLAGS[1:]))  # three times as fast to build
    native.load_kernels.cache_clear()
    yield native.load_kernels
    native.load_kernels.cache_clear()


def test_kernels_are_built_once(build, monkeypatch, tmp_path):
    kernels, problem = build()
    assert (kernels is not None, problem) == (True, "")
    monkeypatch.setattr(native, "_compile", None)
    native.load_kernels.cache_clear()
    assert build()[0].build == kernels.build
    assert list((tmp_path / "cache" / "kernels").iterdir()) == [native._cache_folder(kernels.build)]


def test_damaged_kernels_are_built_again(build):
    """A library that is cut short would load, and end the process at its first use."""
    kernels, _ = build()
    file = native._cache_folder(kernels.build) / native.LIBRARY
    whole = file.read_bytes()
    file.unlink()  # written in place, the library of this process would change
    file.write_bytes(whole[: len(whole) // 2])
    native.load_kernels.cache_clear()
    assert build()[0] is not None
    assert file.read_bytes() == whole


def test_compiler_arguments_change_build(build, monkeypatch):
    """With -ffast-math they hide what is not finite: such kernels are for those who ask for them."""
    monkeypatch.setenv("CC", "cc")
    plain, _ = build()
    monkeypatch.setenv("CC", "cc -DOTHER")
    native.load_kernels.cache_clear()
    assert build()[0].build != plain.build


def test_kernels_are_built_without_cache(build, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "file"))
    assert build()[0] is not None


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/nowhere/cc", "No such file"), ("false", "false failed: no output"), ("cc 'x", "CC is no command")],
)
def test_failing_compiler_gives_reason(build, monkeypatch, tmp_path, compiler, reason):
    monkeypatch.setenv("CC", compiler)
    kernels, problem = build()
    assert kernels is None
    assert reason in problem
    assert not list((tmp_path / "cache").glob("kernels/*"))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "cannot open shared object"),
        ("echo garbage > native.so", "too short|invalid"),
        ("echo 'int x;' | cc -xc -shared -o native.so -", "without the kernels"),
        ("echo 'In file included from x' >&2; echo 'x: error: no y' >&2; false", "failed: x: error: no y$"),
    ],
)
def test_broken_compiler_gives_reason(build, monkeypatch, tmp_path, answer, reason):
    compiler = tmp_path / "broken cc"
    compiler.write_text(f"""#!/bin/sh
[ "$1" = --version ] && exit
for word; do case "$word" in */native.so) cd "$(dirname "$word")"; esac; done
{answer}
""")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"'{compiler}'")
    kernels, problem = build()
    assert kernels is None
    assert re.search(reason, problem)
    assert not list((tmp_path / "cache").glob("kernels/*"))


def test_missing_compiler_gives_reason(build, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert build() == (None, "no C compiler is installed")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_stays_so(dtype, bad):
    kernels = native.native_kernels()
    logits = torch.randn(3, 50).to(dtype)
    logits[1, 7] = bad
    nll = torch.empty(3)
    kernels.call("cross_entropy", dtype, logits, torch.tensor([4, 4, -1]), nll, 3, 50, 1)
    assert nll.isfinite().tolist() == [True, False, True]
    assert logits.isfinite().all(1).tolist() == [True, False, True]
    scores = torch.randn(1, 4, 4).to(dtype)
    scores[0, 2, 1] = bad
    kernels.call("causal_softmax", dtype, scores, 1, 4)
    assert scores.isfinite().all(2).tolist() == [[True, True, False, True]]
    x, out = torch.randn(3, 40).to(dtype), torch.empty(3, 20, dtype=dtype)
    x[1, 3] = bad
    kernels.call("swiglu", dtype, x, out, 3, 20, 20)
    assert out.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overflow_in_norm_is_not_hidden(dtype):
    """The variance of a row is infinite: dividing by it would give zeros, where torch gives NaN in float32."""
    x, out, stats = torch.randn(3, 40).to(dtype), torch.empty(3, 40, dtype=dtype), torch.empty(3, 2)
    x[1] *= 1e25
    weight, bias = torch.ones(40, dtype=dtype), torch.zeros(40, dtype=dtype)
    native.native_kernels().call("layer_norm", dtype, x, weight, bias, out, stats, 3, 40, 40, 1e-5)
    assert out.isfinite().all(1).tolist() == [True, False, True]
    if dtype == torch.float32:
        expected = torch.nn.functional.layer_norm(x, (40,), weight, bias)
        assert expected.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_at_limits_match_torch(dtype):
    powers = torch.cat([torch.linspace(-30, 30, 401), 10 ** torch.linspace(-38, 38, 153)])
    x = torch.cat([powers, -powers]).to(dtype)
    gate_and_up, gate_out, gelu_out = (
        torch.stack([x, torch.ones_like(x)], 1),
        *torch.empty(2, len(x), dtype=dtype),
    )
    d_gate_and_up, d_gelu, ones = torch.empty_like(gate_and_up), torch.empty_like(x), torch.ones_like(x)
    kernels = native.native_kernels()
    kernels.call("swiglu", dtype, gate_and_up, gate_out, len(x), 1, 1)
    kernels.call("swiglu_backward", dtype, ones, gate_and_up, d_gate_and_up, len(x), 1, 2)
    kernels.call("gelu", dtype, x, gelu_out, len(x), 1, 1)
    kernels.call("gelu_backward", dtype, ones, x, d_gelu, len(x), 1, 1)
    tolerance = {"atol": 3e-6, "rtol": 3e-6} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 1e-2}
    for out, gradient, function, limit in (
        (gate_out, d_gate_and_up[:, 0], torch.nn.functional.silu, torch.inf),
        (gelu_out, d_gelu, partial(torch.nn.functional.gelu, approximate="tanh"), 1e18),  # torch's is NaN beyond
    ):
        within = x.abs().float() < limit
        exact = x.detach().float().clone().requires_grad_()
        expected = function(exact)
        expected.sum().backward()
        torch.testing.assert_close(out.float(), expected.detach(), **tolerance)
        torch.testing.assert_close(gradient[within].float(), exact.grad[within], **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_matches_torch(dtype):
    logits = (30 * torch.randn(20, 333, generator=torch.Generator().manual_seed(0))).to(dtype)
    labels = torch.arange(20) * 7
    labels[3] = -100
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    expected.sum().backward()
    nll = torch.empty(20)
    native.native_kernels().call("cross_entropy", dtype, logits, labels, nll, 20, 333, 1)
    assert torch.allclose(nll.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert (logits.double() - exact.grad).abs().max() < (1e-6 if dtype == torch.float32 else 4e-3)


def test_results_are_independent_of_threads():
    kernels, threads = native.native_kernels(), torch.get_num_threads()
    x, results = torch.randn(1, 37, 37), []
    for count in (1, 2):
        torch.set_num_threads(count)
        scores = x.clone()
        kernels.call("causal_softmax", torch.float32, scores, 1, 37)
        results.append(scores)
    torch.set_num_threads(threads)
    assert torch.equal(*results)
    assert torch.allclose(
        results[0], x.masked_fill(~torch.ones(37, 37).tril().bool(), -torch.inf).softmax(-1), atol=1e-6
    )


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("sizes", [(64, 48), (150, 33), (7, 2)])
@pytest.mark.parametrize("dtype", list(native.PRODUCT_ROWS))
def test_product_of_few_rows_matches_torch(dtype, sizes, rows):
    size_in, size_out = sizes
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(size, generator=generator) for size in ((rows, size_in), (size_out, size_in)))
    scale = torch.rand(size_out, generator=generator) if dtype == torch.int8 else None
    weight = (40 * weight if scale is not None else weight).to(dtype)
    found = native.few_rows_product(x, weight, scale)
    if rows > native.PRODUCT_ROWS[dtype]:
        assert found is None
        return
    rounded = x.bfloat16() if dtype == torch.bfloat16 else x
    expected = rounded.double() @ weight.double().T * (1 if scale is None else scale.double())
    tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-6
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    x[0, -1] = float("nan")
    assert native.few_rows_product(x, weight, scale).isnan().all(1).tolist() == [True] + [False] * (rows - 1)
