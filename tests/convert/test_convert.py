import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import (
    Generator,
    Library,
    ModelOptions,
    SamplingParams,
    TrainConfig,
    blend,
    compress,
    evaluate,
    evaluation,
    merge,
    train,
)
from lora_tuner.adapters.adapter import CARD_FILE, WEIGHTS_FILE, load_adapter_folder, verify_adapter
from lora_tuner.convert import common
from lora_tuner.errors import AdapterError, ConfigError, Notice, WrongBaseError
from lora_tuner.evaluation import EvalSet
from lora_tuner.models import lora
from lora_tuner.models.resolve import find_base

from .. import tiny_models
from ..cli.test_commands import run
from ..inference.test_multi_lora import ALL, ALPHAS, RANKS, SOME, written

IDS = torch.arange(7, 307).reshape(15, 20)
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": RANKS, "alpha_pattern": ALPHAS, "target_modules": ALL},
    "few layers": {"target_modules": SOME, "r": 7, "lora_alpha": 3},
}


@pytest.fixture
def kind(model_folder):
    return model_folder.name


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path / "adapters")


@pytest.fixture
def make(model_folder, kind, library):
    """An adapter that real PEFT has written, with random weights throughout."""

    def write(name, variant="plain", **settings):
        chosen = {"target_modules": ALL} | VARIANTS[variant] | settings
        chosen = {key: it[kind] if isinstance(it, dict) else it for key, it in chosen.items()}
        return written(model_folder, library.path / name, **chosen)

    return write


@pytest.fixture
def rows():
    return [EvalSet("some reviews", tiny_models.reviews(12, seed=7))]


def peft_logits(folder, adapter):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter.path).eval()
    with torch.no_grad():
        return model(IDS).logits


def deltas(folder, adapter):
    """What PEFT itself adds to each weight."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter.path)
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and layer.lora_A:
            found[name] = layer.get_delta_weight("default").detach().double()
    return found


def dense_logits(folder, *parts):
    """The base with the weighted sum of PEFT's deltas added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    layers = dict(model.named_modules())
    with torch.no_grad():
        for adapter, weight in parts:
            for name, delta in deltas(folder, adapter).items():
                layers[name].weight += weight * delta
        return model(IDS).logits.float()


def left_over(library):
    return sorted(path.name for path in library.path.iterdir())


# Merge


def test_merged_model_reloads_with_equal_logits(settings, model_folder, tmp_path):
    adapter = train(settings(base=str(model_folder)))
    merged = merge(adapter, tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(merged.path)
    with torch.no_grad():
        logits = found(IDS).logits
    torch.testing.assert_close(logits, peft_logits(model_folder, adapter), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, peft_logits(model_folder, None), atol=1e-2)


def test_merge_reports_comparison(settings, model_folder, tmp_path):
    adapter = train(settings(base=str(model_folder)))
    found = merge(adapter, tmp_path / "merged").comparison
    assert 0 < found.max_logit_difference < 1e-4
    assert found.top1_agreement == 1
    assert found.rows == 8
    assert found.losses == pytest.approx((adapter.manifest.result.loss,) * 2, abs=1e-5)
    rounded = merge(adapter, tmp_path / "rounded", dtype="bfloat16").comparison
    assert rounded.max_logit_difference > 1e-3
    assert rounded.losses[1] == pytest.approx(rounded.losses[0], abs=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dora", [False, True])
def test_merge_every_lora_variant(make, model_folder, tmp_path, variant, dora):
    adapter = make("one", variant, use_dora=dora)
    merged = merge(adapter, tmp_path / "merged", options=ModelOptions(base=str(model_folder)))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(merged.path)(IDS).logits
    torch.testing.assert_close(logits, peft_logits(model_folder, adapter), atol=1e-4, rtol=1e-4)
    assert merged.comparison.losses is None


def test_merged_model_generates_same_text(adapter, tmp_path):
    out = merge(adapter, tmp_path / "merged").path
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("the actor", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(out)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=20, pad_token_id=0)
    sampling = SamplingParams(greedy=True, max_new_tokens=20, repetition_penalty=1.0)
    answer = Generator(adapter.path, options=ModelOptions(device="cpu")).generate("the actor", sampling)
    assert tokenizer.decode(output[0], skip_special_tokens=True) == "the actor" + answer.text


def test_merge_keeps_base_files(adapter, gpt2, tmp_path):
    before = {path.name: path.read_bytes() for path in gpt2.iterdir()}
    merge(adapter, tmp_path / "merged", dtype="bfloat16")
    assert {path.name: path.read_bytes() for path in gpt2.iterdir()} == before
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_merge_shards_weights(adapter, tmp_path):
    found = merge(adapter, tmp_path / "merged", shard_size="40KB")
    assert len(list(found.path.glob("*.safetensors"))) > 1
    assert found.comparison.max_logit_difference < 1e-4


def test_merge_rejects_bad_targets(adapter, tmp_path):
    merge(adapter, tmp_path / "merged")
    with pytest.raises(AdapterError) as error:
        merge(adapter, tmp_path / "merged")
    assert str(error.value) == f"{tmp_path}/merged exists: choose another --out, or replace it with --overwrite."
    (tmp_path / "notes").mkdir()
    with pytest.raises(AdapterError) as error:
        merge(adapter, tmp_path / "notes", overwrite=True)
    assert str(error.value) == f"{tmp_path}/notes is no model folder, so it is not replaced: choose another --out."
    merge(adapter, tmp_path / "merged", overwrite=True)
    other = tiny_models.save_model(tmp_path / "other", "gpt2", seed=5)
    with pytest.raises(WrongBaseError) as error:
        merge(adapter, tmp_path / "wrong", options=ModelOptions(base=str(other)))
    theirs, ours = adapter.manifest.base.fingerprint[:12], find_base(str(other)).fingerprint[:12]
    assert str(error.value) == (
        f"reviews was trained on {adapter.base} (fingerprint {theirs}, a local folder), not on {other} (fingerprint {ours}, a "
        "local folder). Name the right base with --base, or use --force to try it anyway."
    )
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(ConfigError, match="'5XB' is no size of a file, such as 5GB or 500MB"):
        merge(adapter, tmp_path / "deep" / "er", shard_size="5XB")
    assert not (tmp_path / "deep").exists()


@pytest.fixture
def wrong_merge(monkeypatch):
    """A merge that forgets a part of the update, as PEFT's has done."""
    attach = lora.load_lora

    def half(model, adapter, slot, **settings):
        return attach(model, adapter, slot, lora_alpha=1)

    monkeypatch.setattr(lora, "load_lora", half)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_merge_is_not_kept(make, model_folder, tmp_path, wrong_merge, dtype):
    adapter, before = make("one", lora_alpha=64), sorted(tmp_path.iterdir())
    with pytest.raises(AdapterError, match="merged is not kept: read back, the merged model has"):
        merge(adapter, tmp_path / "merged", dtype=dtype, options=ModelOptions(base=str(model_folder)))
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_merge_keeps_old_model(make, model_folder, tmp_path, request):
    adapter = make("one")
    merge(adapter, tmp_path / "merged", options=ModelOptions(base=str(model_folder)))
    before = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    request.getfixturevalue("wrong_merge")
    with pytest.raises(AdapterError):
        merge(adapter, tmp_path / "merged", overwrite=True, options=ModelOptions(base=str(model_folder)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == before


# Blend


@pytest.mark.parametrize("variant", VARIANTS)
def test_blend_of_one_equals_it(make, library, model_folder, variant):
    one = make("one", variant)
    made = blend([(one, 1.0)], "same", library, options=ModelOptions(base=str(model_folder))).adapter
    torch.testing.assert_close(peft_logits(model_folder, made), peft_logits(model_folder, one), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "weights"),
    [
        ("plain", "rslora", (1, 1)),
        ("patterns", "few layers", (0.7, -0.3)),
        ("rslora", "patterns", (0.7, -0.3)),
        pytest.param("plain", "rslora", (0.7, -0.3), marks=pytest.mark.slow),
        pytest.param("patterns", "few layers", (1, 1), marks=pytest.mark.slow),
        pytest.param("rslora", "patterns", (1, 1), marks=pytest.mark.slow),
    ],
)
def test_blend_is_weighted_sum(make, library, model_folder, first, second, weights):
    parts = list(zip((make("one", first), make("two", second)), weights, strict=True))
    blended = blend(parts, "mixed", library, options=ModelOptions(base=str(model_folder)))
    found = deltas(model_folder, blended.adapter)
    for name, delta in found.items():
        whole = sum(weight * deltas(model_folder, it).get(name, torch.zeros(())) for it, weight in parts)
        torch.testing.assert_close(delta, whole, atol=1e-5, rtol=1e-5)
    assert found.keys() == {name for it, _ in parts for name in deltas(model_folder, it)}
    torch.testing.assert_close(
        peft_logits(model_folder, blended.adapter), dense_logits(model_folder, *parts), atol=1e-4, rtol=1e-4
    )
    assert blended.comparison.max_logit_difference < 1e-4
    assert blended.total_lost_energy < 1e-9


def test_blend_minus_itself_equals_base(make, library, model_folder):
    one = make("one", "patterns")
    made = blend([(one, 1), (one, -1)], "nothing", library, options=ModelOptions(base=str(model_folder))).adapter
    torch.testing.assert_close(peft_logits(model_folder, made), peft_logits(model_folder, None), atol=1e-4, rtol=1e-5)


def test_truncated_blend_reports_lost_energy(make, library, model_folder):
    one, two = make("one"), make("two", "rslora")
    blended = blend([(one, 0.5), (two, 0.5)], "cut", library, rank=4, options=ModelOptions(base=str(model_folder)))
    assert blended.exact_rank == 7
    assert {blended.adapter.rank_of(module) for module in blended.adapter.modules} == {4}
    ours, theirs = deltas(model_folder, one), deltas(model_folder, two)
    lost = kept = 0.0
    for name, delta in deltas(model_folder, blended.adapter).items():
        whole = 0.5 * ours[name] + 0.5 * theirs[name]
        squares = torch.linalg.svdvals(whole).square()
        assert blended.lost_energy[name] == pytest.approx(float(squares[4:].sum() / squares.sum()), abs=1e-6)
        assert float((whole - delta).square().sum()) == pytest.approx(float(squares[4:].sum()), rel=1e-3)
        lost, kept = lost + float(squares[4:].sum()), kept + float(squares.sum())
    assert blended.total_lost_energy == pytest.approx(lost / kept, abs=1e-6)
    assert blended.comparison.max_logit_difference < 1e-4


def test_blend_rejects_bad_input(make, library, model_folder, tmp_path):
    one, dora = make("one"), make("dora", use_dora=True)
    base = str(model_folder)
    before = left_over(library)
    with pytest.raises(AdapterError) as error:
        blend([(one, 1), (dora, 1)], "mixed", library, options=ModelOptions(base=base))
    assert str(error.value) == (
        "dora is a DoRA adapter, which also rescales the base's weights, so it cannot be part of a sum: merge it instead."
    )
    for weight in (0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="a weight is a number other than 0"):
            blend([(one, weight)], "mixed", library, options=ModelOptions(base=base))
    with pytest.raises(AdapterError, match="not finite"):
        blend([(one, 1e39)], "mixed", library, options=ModelOptions(base=base))
    with pytest.raises(AdapterError, match="one exists: choose another --name"):
        blend([(one, 1)], "one", library, options=ModelOptions(base=base))
    twin = shutil.copytree(one.path, tmp_path / "elsewhere" / "one")
    with pytest.raises(AdapterError, match="Two of these adapters have the name one"):
        blend([(one, 1), (load_adapter_folder(twin), 1)], "mixed", library, options=ModelOptions(base=base))
    deeper = tiny_models.save_model(tmp_path / "deeper", model_folder.name, layers=1)
    with pytest.raises(AdapterError, match="does not fit the base"):
        blend([(one, 1)], "mixed", library, options=ModelOptions(base=str(deeper)))
    assert left_over(library) == before


@pytest.fixture
def half_way(monkeypatch):
    """The last step fails."""

    def fail(*anything, **more):
        raise OSError(28, "No space left on device", "README.md")

    monkeypatch.setattr(common.model_card, "model_card", fail)


def test_failed_write_leaves_nothing(make, library, model_folder, half_way):
    one = make("one")
    for attempt in (
        lambda: blend([(one, 0.5)], "mixed", library, options=ModelOptions(base=str(model_folder))),
        lambda: compress(one, "less", library, options=ModelOptions(base=str(model_folder))),
    ):
        with pytest.raises(OSError, match="No space left"):
            attempt()
    assert left_over(library) == ["one"]


def test_wrong_blend_is_not_kept(make, library, model_folder, monkeypatch):
    one, settings = make("one"), common.delta.make_lora_config

    def without_scales(*arguments):
        config = settings(*arguments)
        config.lora_alpha *= 2
        return config

    monkeypatch.setattr(common.delta, "make_lora_config", without_scales)
    with pytest.raises(AdapterError, match="mixed is not kept: read back, beside its update in the base's weights, it"):
        blend([(one, 1.0)], "mixed", library, options=ModelOptions(base=str(model_folder)))
    assert left_over(library) == ["one"]


def test_blend_with_sufficient_rank_is_exact(make, library, model_folder):
    one = make("one")
    blended = blend([(one, 0.5), (one, 0.5)], "whole", library, rank=64, options=ModelOptions(base=str(model_folder)))
    assert blended.adapter.rank == blended.exact_rank == 8
    assert set(blended.lost_energy.values()) == {0.0}
    assert blended.adapter.manifest.made_by == "blend one=0.5 one=0.5"


def test_blend_of_canceling_weights(make, library, model_folder):
    one = make("one")
    blended = blend(
        [(one, 0.1), (one, 0.2), (one, -0.3)], "nothing", library, rank=8, options=ModelOptions(base=str(model_folder))
    )
    assert blended.total_lost_energy == 0.0
    assert blended.adapter.manifest.made_by == "blend one=0.1 one=0.2 one=-0.3 --rank 8"


def test_blend_records_exact_weights(make, library, model_folder):
    one = make("one")
    made = blend([(one, 1 / 3), (one, 2.0)], "thirds", library, options=ModelOptions(base=str(model_folder))).adapter
    assert made.manifest.made_by == f"blend one={1 / 3!r} one=2"


def test_blend_treats_symlink_as_target(make, library, model_folder):
    one = make("one")
    (library.path / "link").symlink_to(one.path)
    made = blend(
        [(library.get("link"), 0.5), (one, 0.5)], "both", library, options=ModelOptions(base=str(model_folder))
    ).adapter
    assert len(made.manifest.parents) == 1
    torch.testing.assert_close(peft_logits(model_folder, made), peft_logits(model_folder, one), atol=1e-5, rtol=1e-5)


# Slim


def test_compress_full_energy_is_lossless(make, library, model_folder):
    one = make("one", "patterns")
    twice = blend([(one, 0.5), (one, 0.5)], "twice", library, options=ModelOptions(base=str(model_folder))).adapter
    compressed = compress(twice, "less", library, energy=1.0, options=ModelOptions(base=str(model_folder)))
    torch.testing.assert_close(
        peft_logits(model_folder, compressed.adapter), peft_logits(model_folder, one), atol=1e-5, rtol=1e-5
    )
    assert {module: after for module, (_, after) in compressed.ranks.items()} == {
        module: one.rank_of(module) for module in one.modules
    }
    assert compressed.adapter.bytes < twice.bytes
    assert compressed.total_lost_energy < 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
def test_compress_keeps_smallest_sufficient_rank(make, library, model_folder, variant, rows):
    one = make("one", variant)
    compressed = compress(one, "less", library, energy=0.8, sets=rows, options=ModelOptions(base=str(model_folder)))
    after = deltas(model_folder, compressed.adapter)
    for module, delta in deltas(model_folder, one).items():
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
    nothing = blend([(one, 1), (one, -1)], "nothing", library, options=ModelOptions(base=str(model_folder))).adapter
    with pytest.raises(AdapterError, match="nothing does nothing: there is nothing to keep of it"):
        compress(nothing, "less", library, options=ModelOptions(base=str(model_folder)))
    for energy in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="it is a share, from 0 to 1"):
            compress(one, "less", library, energy=energy, options=ModelOptions(base=str(model_folder)))
    assert left_over(library) == ["dora", "nothing", "one"]


# What comes out is an adapter like any other


@pytest.fixture
def two(settings, tmp_path, reviews_csv):
    """Two adapters trained on different rows of the same file."""
    praise = train(settings(name="praise", where=["label=1"]))
    return praise, train(settings(name="pan", where=["label=0"], rank=2, target_modules="attention"))


def test_blend_manifest_and_card(two, caches):
    heard = []
    blended = blend(
        [(two[0], 0.7), (two[1], 0.3)], "mixed", Library(), options=ModelOptions(device="cpu", notify=heard.append)
    )
    adapter = blended.adapter
    manifest = adapter.manifest
    assert manifest.made_by == "blend praise=0.7 pan=0.3"
    assert [it.sha256 for it in manifest.parents] == [it.sha256 for it in two]
    assert manifest.data.held_out_rows == manifest.result.rows == 16
    assert list(blended.results) == ["praise", "pan"]
    assert verify_adapter(adapter) == []
    matrix = evaluate([adapter, *two], options=ModelOptions(device="cpu"))
    assert matrix.cells[0][0].gain == pytest.approx(manifest.result.gain, abs=1e-6)
    assert [it.gain for it in matrix.cells[0][1:]] == pytest.approx(
        [it.gain for it in blended.results.values()], abs=1e-6
    )
    card = (adapter.path / CARD_FILE).read_text()
    assert "| Command | `blend praise=0.7 pan=0.3` |" in card
    assert f"praise ({two[0].sha256[:12]})" in card
    assert "label=1" in card
    assert "run.yaml" not in card
    assert not [event for event in heard if isinstance(event, Notice)]
    text = run("adapters", "show", "mixed").stdout
    assert "blend praise=0.7 pan=0.3" in text
    answer = Generator("mixed", options=ModelOptions(device="cpu")).generate(
        "the actor", SamplingParams(greedy=True, max_new_tokens=5)
    )
    assert answer.adapter == "mixed"


def test_compress_keeps_dataset_info(two):
    compressed = compress(two[0], "less", Library(), energy=0.5, options=ModelOptions(device="cpu"))
    before, after = compressed.results
    assert before.loss == pytest.approx(two[0].manifest.result.loss, abs=1e-6)
    assert compressed.adapter.manifest.data == two[0].manifest.data
    assert compressed.adapter.manifest.result == after
    assert compressed.adapter.manifest.parents[0].name == "praise"
    assert verify_adapter(compressed.adapter) == []


def test_train_from_blended_and_compressed(two, reviews_csv):
    blended = blend([(it, 0.5) for it in two], "mixed", Library(), options=ModelOptions(device="cpu")).adapter
    for parent in (
        blended,
        compress(two[0], "less", Library(), energy=0.5, options=ModelOptions(device="cpu")).adapter,
    ):
        config = TrainConfig(parent=parent.name, dataset=str(reviews_csv), name="on", max_steps=2, overwrite=True)
        on = train(config.model_copy(update={"device": "cpu", "max_length": 64, "eval_rows": 8}))
        assert on.manifest.parents[0].name == parent.name
        assert {module: on.rank_of(module) for module in on.modules} == {
            module: parent.rank_of(module) for module in parent.modules
        }


def test_blend_of_different_split_salts(settings, reviews_csv):
    parts = [train(settings(name=name, split_salt=name)) for name in ("one", "two")]
    heard = []
    made = blend(
        [(it, 0.5) for it in parts], "mixed", Library(), options=ModelOptions(device="cpu", notify=heard.append)
    ).adapter
    assert made.manifest.data.split_salt is None
    assert any("differ in --split-salt" in event.text for event in heard if isinstance(event, Notice))
    config = TrainConfig(parent="mixed", dataset=str(reviews_csv), name="on", max_steps=2, device="cpu")
    with pytest.raises(
        ConfigError, match="no rows are held out for all of it: name others to measure on with --eval-dat"
    ):
        train(config)


def test_missing_held_out_rows_stay_recorded(two, caches, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(caches / "another"))
    for made in (
        compress(two[0], "less", Library(), energy=0.5, options=ModelOptions(device="cpu")).adapter,
        blend([(two[0], 1.0)], "same", Library(), options=ModelOptions(device="cpu")).adapter,
    ):
        assert made.manifest.result is None
        assert made.manifest.data == two[0].manifest.data
    made = blend([(it, 1.0) for it in two], "mixed", Library(), options=ModelOptions(device="cpu")).adapter
    assert (made.manifest.data.held_out_hash, made.manifest.data.held_out_rows) == (None, 0)
    reason = evaluation.cached_rows(made).missing
    assert reason == "it was made from adapters whose held-out rows were missing"


def test_equal_held_out_rows_evaluated_once(two, settings):
    heard = []
    again = train(settings(name="again", where=["label=1"], seed=5))
    blended = blend(
        [(two[0], 0.5), (again, 0.5)], "mixed", Library(), options=ModelOptions(device="cpu", notify=heard.append)
    )
    assert list(blended.results) == ["praise"]
    assert "The rows of again are measured as those of praise." in [it.text for it in heard if isinstance(it, Notice)]
    assert blended.adapter.manifest.data == two[0].manifest.data


def test_blend_without_held_out_rows_notifies(make, library, model_folder, rows):
    heard = []
    one = make("one")
    made = blend(
        [(one, 1.0)], "same", library, options=ModelOptions(base=str(model_folder), notify=heard.append)
    ).adapter
    assert made.manifest.result is None
    assert made.manifest.data is None
    texts = [event.text for event in heard if isinstance(event, Notice)]
    assert any(text.startswith("Not measured on the rows of one: it was trained by another tool") for text in texts)
    measured = blend([(one, 1.0)], "measured", library, sets=rows, options=ModelOptions(base=str(model_folder)))
    assert measured.adapter.manifest.result.rows == 12
    assert list(measured.results) == ["some reviews"]


def test_blend_with_unknown_dataset(two, gpt2, tmp_path, rows):
    foreign = written(gpt2, tmp_path / "foreign", target_modules=["c_attn"])
    made = blend([(two[0], 0.5), (foreign, 0.5)], "mixed", Library(), options=ModelOptions(device="cpu")).adapter
    assert made.manifest.data.name.endswith("reviews.csv + unknown")
    assert made.manifest.data.held_out_rows == made.manifest.result.rows == 8
    assert evaluation.cached_rows(made).missing is None
    other = blend([(two[0], 0.5)], "other", Library(), sets=rows, options=ModelOptions(device="cpu")).adapter
    assert other.manifest.data.eval_dataset == "some reviews"


# The commands


def test_blend_compress_merge_commands(two, tmp_path):
    text = run("blend", "praise=0.7", "pan=-0.3", "--name", "mixed", "--device", "cpu").stdout
    assert text.startswith("adapters/mixed  ")
    assert "rank 4 to 6: blend praise=0.7 pan=-0.3" in text
    assert "held-out loss" in text
    assert "  on pan: gain" in text
    cut = json.loads(
        run("blend", "praise=1", "pan=1", "--name", "cut", "--rank", 2, "--json", "--device", "cpu").stdout
    )
    assert 0 < cut["blend"]["lost_in_all"] < 1
    assert set(cut["blend"]["lost"]) == set(two[0].modules)
    assert "of the energy is lost; most in" in run("compress", "mixed", "--energy", 0.5, "--device", "cpu").stdout
    assert Library().names() == ["cut", "mixed", "mixed-compressed", "pan", "praise"]
    facts = json.loads(run("compress", "cut", "--max-bytes", 8000, "--json", "--device", "cpu").stdout)
    assert facts["compress"]["results"][0]["loss"] == pytest.approx(cut["result"]["loss"], abs=1e-6)
    refused = run("compress", "cut", "--energy", 0.9, "--max-bytes", 9, exit_code=1).stderr
    assert refused == "Error: energy and max_bytes are two rules: give one.\n"
    refused = run("compress", "cut", "--where", "a=1", exit_code=1).stderr
    assert refused == "Error: where: only --eval-dataset is read with that.\n"
    several = run("merge", "praise", "mixed", "--out", "merged", "--eval-rows", 4).stdout.splitlines()
    assert several[0] == "merged/praise"
    assert several[3] == "merged/mixed"
    assert several[1].startswith("read back, beside base and adapter: logits differ by ")
    assert several[2].endswith("(4 held-out rows)")
    (alone,) = json.loads(run("merge", "cut", "--out", "alone", "--json").stdout)
    assert alone["comparison"]["agreement"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("blend", "praise", "--name", "mixed"), "Error: 'praise' is not NAME=WEIGHT, such as imdb=0.7."),
        (("blend", "praise=much", "--name", "mixed"), "Error: 'praise=much' is not NAME=WEIGHT, such as imdb=0.7."),
        (("blend", "nobody=1", "--name", "mixed"), "Error: There is no adapter 'nobody', neither in adapters"),
    ],
)
def test_blend_command_errors(arguments, message):
    stderr = run(*arguments, exit_code=1).stderr
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1
