"""Compressing: each layer keeps the smallest rank with enough energy."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_tuner import (
    Library,
    ModelOptions,
    blend,
    compress,
    evaluate,
)
from lora_tuner.adapters.adapter import WEIGHTS_FILE, verify_adapter
from lora_tuner.errors import AdapterError, ConfigError
from lora_tuner.evaluation import gain_matrix

from ..parameters import sampled
from .conftest import VARIANTS, adapter_deltas, file_names, peft_logits


def test_compress_full_energy_is_lossless(make, library, model_folder):
    one = make("one", "patterns")
    twice = blend(
        [(one, 0.5), (one, 0.5)], "twice", library, options=ModelOptions(base=str(model_folder))
    ).adapter
    compressed = compress(twice, "less", library, energy=1.0, options=ModelOptions(base=str(model_folder)))
    torch.testing.assert_close(
        peft_logits(model_folder, compressed.adapter), peft_logits(model_folder, one), atol=1e-5, rtol=1e-5
    )
    assert {module: after for module, (_, after) in compressed.ranks.items()} == {
        module: one.rank_of(module) for module in one.modules
    }
    assert compressed.adapter.bytes < twice.bytes
    assert compressed.total_lost_energy < 1e-9


@pytest.mark.parametrize("variant", sampled(VARIANTS, 2))
def test_compress_keeps_smallest_sufficient_rank(make, library, model_folder, variant, rows):
    one = make("one", variant)
    compressed = compress(
        one, "less", library, energy=0.8, sets=rows, options=ModelOptions(base=str(model_folder))
    )
    after = adapter_deltas(model_folder, compressed.adapter)
    for module, delta in adapter_deltas(model_folder, one).items():
        squares = torch.linalg.svdvals(delta).square()
        shares = squares.cumsum(0) / squares.sum()
        rank = compressed.ranks[module][1]
        assert shares[rank - 1] >= 0.8
        assert rank == 1 or shares[rank - 2] < 0.8
        assert compressed.lost_energy[module] == pytest.approx(1 - float(shares[rank - 1]), abs=1e-6)
        assert float((delta - after[module]).square().sum() / squares.sum()) == pytest.approx(
            compressed.lost_energy[module], rel=1e-2
        )
    before, since = compressed.results
    assert before.loss != since.loss
    assert before.base_loss == since.base_loss
    assert since.loss == compressed.adapter.manifest.result.loss
    assert (compressed.adapter.path / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_compress_respects_max_bytes(make, library, model_folder):
    one = make("one")
    full = (one.path / WEIGHTS_FILE).stat().st_size
    sizes = []
    for most in (full // 2, int(full * 0.8), full * 2):
        compressed = compress(
            one, "less", library, max_bytes=most, overwrite=True, options=ModelOptions(base=str(model_folder))
        )
        sizes.append((compressed.adapter.path / WEIGHTS_FILE).stat().st_size)
        assert sizes[-1] <= most
        assert compressed.adapter.manifest.made_by == f"compress one --max-bytes {most}"
    assert sizes == sorted(sizes)
    assert sizes[1] > full * 0.6
    assert compressed.total_lost_energy < 1e-9
    with pytest.raises(
        AdapterError, match=r"Rank 1 in every layer takes about [\d,]+ bytes, more than --max-bytes 100\."
    ):
        compress(one, "least", library, max_bytes=100, options=ModelOptions(base=str(model_folder)))


def test_compress_drops_zero_layers(make, library, model_folder):
    one = make("one")
    tensors = load_file(one.path / WEIGHTS_FILE)
    idle = one.modules[0]
    tensors[f"base_model.model.{idle}.lora_B.weight"].zero_()
    save_file(tensors, one.path / WEIGHTS_FILE, metadata={"format": "pt"})
    compressed = compress(one, "less", library, energy=1.0, options=ModelOptions(base=str(model_folder)))
    assert compressed.ranks[idle] == (4, 0)
    assert compressed.adapter.modules == one.modules[1:]
    torch.testing.assert_close(
        peft_logits(model_folder, compressed.adapter), peft_logits(model_folder, one), atol=1e-5, rtol=1e-5
    )


def test_compress_rejects_bad_input(make, library, model_folder):
    with pytest.raises(AdapterError, match="dora is a DoRA adapter"):
        compress(make("dora", use_dora=True), "less", library, options=ModelOptions(base=str(model_folder)))
    one = make("one")
    nothing = blend(
        [(one, 1), (one, -1)], "nothing", library, options=ModelOptions(base=str(model_folder))
    ).adapter
    with pytest.raises(AdapterError, match="nothing cannot be compressed: all its updates are zero"):
        compress(nothing, "less", library, options=ModelOptions(base=str(model_folder)))
    for energy in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="it must be a share from 0 to 1"):
            compress(one, "less", library, energy=energy, options=ModelOptions(base=str(model_folder)))
    assert file_names(library) == ["dora", "nothing", "one"]


def test_compressed_blend_is_measured_like_blend(two):
    """Whatever --eval-rows, on the rows of all parts; so is what is compressed or blended from it."""
    options, library = ModelOptions(device="cpu"), Library()
    texts = [gain_matrix.cached_rows(adapter).texts for adapter in two]
    parts = [(adapter, 0.5) for adapter in two]
    blended = blend(parts, "mixed", library, options=options).adapter
    few = blend(parts, "few", library, eval_rows=2, options=options).adapter
    half = compress(blended, "half", library, energy=0.5, eval_rows=2, options=options)
    assert gain_matrix.cached_rows(half.adapter).texts == [*texts[0][:2], *texts[1][:2]]
    again = compress(half.adapter, "again", library, energy=0.5, eval_rows=2, options=options)
    whole = compress(few, "whole", library, energy=0.5, options=options)
    for compressed in (half, whole, again):
        before, after = compressed.results
        assert before.rows == 4
        assert before.base_loss == pytest.approx(few.manifest.result.base_loss, abs=1e-6)
        assert after == compressed.adapter.manifest.result
    assert half.results[0].loss == pytest.approx(few.manifest.result.loss, abs=1e-6)
    nested = blend([(half.adapter, 1.0), (two[0], 1.0)], "nested", library, eval_rows=2, options=options)
    assert nested.adapter.manifest.result.rows == 6  # two more of praise
    (rows,) = evaluate([blended], eval_rows=3, options=options).sets
    assert (rows.texts, rows.parts) == ([*texts[0][:3], *texts[1][:3]], [0] * 3 + [1] * 3)


def test_compress_keeps_dataset_info(two):
    compressed = compress(two[0], "less", Library(), energy=0.5, options=ModelOptions(device="cpu"))
    before, after = compressed.results
    assert before.loss == pytest.approx(two[0].manifest.result.loss, abs=1e-6)
    assert compressed.adapter.manifest.data == two[0].manifest.data
    assert compressed.adapter.manifest.result == after
    assert compressed.adapter.manifest.parents[0].name == "praise"
    assert verify_adapter(compressed.adapter) == []
