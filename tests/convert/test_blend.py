"""Blending: the new adapter is the exact weighted sum, or nothing is kept."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_tuner import (
    EvalSet,
    Generator,
    Library,
    ModelOptions,
    SamplingParams,
    TrainConfig,
    blend,
    compress,
    evaluate,
    train,
)
from lora_tuner.adapters.adapter import CARD_FILE, load_adapter_folder, verify_adapter
from lora_tuner.adapters.manifest import SourceInfo
from lora_tuner.convert import common
from lora_tuner.errors import AdapterError, ConfigError, Notice
from lora_tuner.evaluation import gain_matrix

from .. import adapter_files, tiny_models
from ..cli.test_commands import run
from ..inference.test_multi_lora import save_peft_adapter
from ..parameters import sampled
from .conftest import IDS, VARIANTS, adapter_deltas, file_names, peft_logits


def dense_logits(folder, *parts):
    """Logits of the base with the weighted sum of PEFT's updates in its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    layers = dict(model.named_modules())
    with torch.no_grad():
        for adapter, weight in parts:
            for name, delta in adapter_deltas(folder, adapter).items():
                layers[name].weight += weight * delta
        return model(IDS).logits.float()


@pytest.mark.parametrize("variant", sampled(VARIANTS, 2))
def test_blend_of_one_equals_it(make, library, model_folder, variant):
    one = make("one", variant)
    made = blend([(one, 1.0)], "same", library, options=ModelOptions(base=str(model_folder))).adapter
    torch.testing.assert_close(
        peft_logits(model_folder, made), peft_logits(model_folder, one), atol=1e-5, rtol=1e-5
    )


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
    blended_deltas = adapter_deltas(model_folder, blended.adapter)
    part_deltas = [(adapter_deltas(model_folder, part), weight) for part, weight in parts]
    for name, delta in blended_deltas.items():
        exact = sum(weight * deltas.get(name, torch.zeros(())) for deltas, weight in part_deltas)
        torch.testing.assert_close(delta, exact, atol=1e-5, rtol=1e-5)
    assert blended_deltas.keys() == {name for deltas, _ in part_deltas for name in deltas}
    torch.testing.assert_close(
        peft_logits(model_folder, blended.adapter), dense_logits(model_folder, *parts), atol=1e-4, rtol=1e-4
    )
    assert blended.comparison.max_logit_difference < 1e-4
    assert blended.total_lost_energy < 1e-9


def test_blend_minus_itself_equals_base(make, library, model_folder):
    one = make("one", "patterns")
    made = blend([(one, 1), (one, -1)], "nothing", library, options=ModelOptions(base=str(model_folder))).adapter
    torch.testing.assert_close(
        peft_logits(model_folder, made), peft_logits(model_folder, None), atol=1e-4, rtol=1e-5
    )


def test_truncated_blend_reports_lost_energy(make, library, model_folder):
    one, two = make("one"), make("two", "rslora")
    blended = blend(
        [(one, 0.5), (two, 0.5)], "cut", library, rank=4, options=ModelOptions(base=str(model_folder))
    )
    assert blended.exact_rank == 7
    assert {blended.adapter.rank_of(module) for module in blended.adapter.modules} == {4}
    first, second = adapter_deltas(model_folder, one), adapter_deltas(model_folder, two)
    lost = kept = 0.0
    for name, delta in adapter_deltas(model_folder, blended.adapter).items():
        exact = 0.5 * first[name] + 0.5 * second[name]
        squares = torch.linalg.svdvals(exact).square()
        assert blended.lost_energy[name] == pytest.approx(float(squares[4:].sum() / squares.sum()), abs=1e-6)
        assert float((exact - delta).square().sum()) == pytest.approx(float(squares[4:].sum()), rel=1e-3)
        lost, kept = lost + float(squares[4:].sum()), kept + float(squares.sum())
    assert blended.total_lost_energy == pytest.approx(lost / kept, abs=1e-6)
    assert blended.comparison.max_logit_difference < 1e-4


def test_blend_rejects_bad_input(make, library, model_folder, tmp_path):
    one, dora = make("one"), make("dora", use_dora=True)
    base = str(model_folder)
    before = file_names(library)
    with pytest.raises(AdapterError) as error:
        blend([(one, 1), (dora, 1)], "mixed", library, options=ModelOptions(base=base))
    assert str(error.value) == (
        "dora is a DoRA adapter, which also rescales the base's weights, so it cannot be part of a sum: merge it instead."
    )
    for weight in (0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="a weight must be a number other than 0"):
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
    assert file_names(library) == before


@pytest.fixture
def full_disk(monkeypatch):
    """Let the last step of writing an adapter fail."""

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device", "README.md")

    monkeypatch.setattr(common.model_card, "model_card", fail)


def test_failed_write_leaves_nothing(make, library, model_folder, full_disk):
    one = make("one")
    for attempt in (
        lambda: blend([(one, 0.5)], "mixed", library, options=ModelOptions(base=str(model_folder))),
        lambda: compress(one, "less", library, options=ModelOptions(base=str(model_folder))),
    ):
        with pytest.raises(OSError, match="No space left"):
            attempt()
    assert file_names(library) == ["one"]


def test_wrong_blend_is_not_kept(make, library, model_folder, monkeypatch):
    one, settings = make("one"), common.delta.make_lora_config

    def without_scales(*arguments):
        config = settings(*arguments)
        config.lora_alpha *= 2
        return config

    monkeypatch.setattr(common.delta, "make_lora_config", without_scales)
    with pytest.raises(
        AdapterError, match="mixed is not kept: the saved adapter differs from the exact result: "
    ):
        blend([(one, 1.0)], "mixed", library, options=ModelOptions(base=str(model_folder)))
    assert file_names(library) == ["one"]


def test_blend_with_sufficient_rank_is_exact(make, library, model_folder):
    one = make("one")
    blended = blend(
        [(one, 0.5), (one, 0.5)], "whole", library, rank=64, options=ModelOptions(base=str(model_folder))
    )
    assert blended.adapter.rank == blended.exact_rank == 8
    assert set(blended.lost_energy.values()) == {0.0}
    assert blended.adapter.manifest.made_by == "blend one=0.5 one=0.5"


def test_blend_of_canceling_weights(make, library, model_folder):
    one = make("one")
    blended = blend(
        [(one, 0.1), (one, 0.2), (one, -0.3)],
        "nothing",
        library,
        rank=8,
        options=ModelOptions(base=str(model_folder)),
    )
    assert blended.total_lost_energy == 0.0
    assert blended.adapter.manifest.made_by == "blend one=0.1 one=0.2 one=-0.3 --rank 8"


def test_blend_records_exact_weights(make, library, model_folder):
    one = make("one")
    made = blend(
        [(one, 1 / 3), (one, 2.0)], "thirds", library, options=ModelOptions(base=str(model_folder))
    ).adapter
    assert made.manifest.made_by == f"blend one={1 / 3!r} one=2"


def test_blend_treats_symlink_as_target(make, library, model_folder):
    one = make("one")
    (library.path / "link").symlink_to(one.path)
    made = blend(
        [(library.get("link"), 0.5), (one, 0.5)], "both", library, options=ModelOptions(base=str(model_folder))
    ).adapter
    assert len(made.manifest.parents) == 1
    torch.testing.assert_close(
        peft_logits(model_folder, made), peft_logits(model_folder, one), atol=1e-5, rtol=1e-5
    )


# Manifest, model card and held-out rows


def test_blend_manifest_and_card(two, caches):
    events = []
    blended = blend(
        [(two[0], 0.7), (two[1], 0.3)],
        "mixed",
        Library(),
        options=ModelOptions(device="cpu", notify=events.append),
    )
    adapter = blended.adapter
    manifest = adapter.manifest
    assert manifest.made_by == "blend praise=0.7 pan=0.3"
    assert [parent.sha256 for parent in manifest.parents] == [adapter.sha256 for adapter in two]
    assert manifest.data.held_out_rows == manifest.result.rows == 16
    assert list(blended.results) == ["praise", "pan"]
    assert verify_adapter(adapter) == []
    matrix = evaluate([adapter, *two], options=ModelOptions(device="cpu"))
    assert matrix.cells[0][0].gain == pytest.approx(manifest.result.gain, abs=1e-6)
    assert [cell.gain for cell in matrix.cells[0][1:]] == pytest.approx(
        [result.gain for result in blended.results.values()], abs=1e-6
    )
    card = (adapter.path / CARD_FILE).read_text()
    assert "| Command | `blend praise=0.7 pan=0.3` |" in card
    assert f"praise ({two[0].sha256[:12]})" in card
    assert "label=1" in card
    assert "run.yaml" not in card
    assert "The prompt comes from a held-out row, which was not trained on: its beginning." in card
    assert not [event for event in events if isinstance(event, Notice)]
    text = run("adapters", "show", "mixed").stdout
    assert "blend praise=0.7 pan=0.3" in text
    answer = Generator("mixed", options=ModelOptions(device="cpu")).generate(
        "the actor", SamplingParams(greedy=True, max_new_tokens=5)
    )
    assert answer.adapter == "mixed"


def test_train_from_blended_and_compressed(two, reviews_csv):
    blended = blend(
        [(adapter, 0.5) for adapter in two], "mixed", Library(), options=ModelOptions(device="cpu")
    ).adapter
    for parent in (
        blended,
        compress(two[0], "less", Library(), energy=0.5, options=ModelOptions(device="cpu")).adapter,
    ):
        config = TrainConfig(parent=parent.name, dataset=str(reviews_csv), name="on", max_steps=2, overwrite=True)
        child = train(config.model_copy(update={"device": "cpu", "max_length": 64, "eval_rows": 8}))
        assert child.manifest.parents[0].name == parent.name
        assert {module: child.rank_of(module) for module in child.modules} == {
            module: parent.rank_of(module) for module in parent.modules
        }


@pytest.mark.parametrize(
    ("other", "group", "sources"),
    [({}, "author", 1), ({"group_by": None}, None, 1), ({"hash": "77" * 32}, "author", 0)],
)
def test_blend_claims_no_results_of_sources(tmp_path, other, group, sources):
    facts = adapter_files.manifest()
    source = {"name": "a.csv", "source": "a.csv", "weight": 0.5, "hash": "1" * 64, "counts": {}}
    measured = SourceInfo.model_validate(source | {"result": facts.result})
    parents = []
    for name, changes in {"one": {}, "two": other}.items():
        data = facts.data.model_copy(update={"group_by": "author", "sources": [measured], **changes})
        folder = adapter_files.write(tmp_path / name, facts=facts.model_copy(update={"data": data}))
        parents.append(load_adapter_folder(folder))
    for chosen in (parents, parents[:1]):
        info = common._dataset_info(chosen, [], True)
        assert not [source for source in info.sources if source.result]
    info = common._dataset_info(parents, [], True)
    assert (info.group_by, len(info.sources)) == (group, sources)


def test_blend_keeps_groups_of_its_rows(two):
    rows = gain_matrix.cached_rows(two[0])
    groups = [number // 2 for number in range(len(rows.texts))]
    sets = [EvalSet("by group", rows.texts[:4], groups=groups[:4]), EvalSet("by row", rows.texts[4:])]
    parts, options = [(two[0], 1.0)], ModelOptions(device="cpu")
    made = [blend(parts, name, Library(), sets=chosen, options=options).adapter for name, chosen in (
        ("grouped", sets), ("alone", [EvalSet("by row", rows.texts)])
    )]  # fmt: skip
    grouped, alone = map(gain_matrix.cached_rows, made)
    assert (grouped.texts, alone.texts) == (rows.texts, rows.texts)
    assert (grouped.groups, alone.groups) == ([0, 0, 1, 1, *range(2, len(rows.texts) - 2)], [])
    assert (grouped.parts, alone.parts) == ([0] * 4 + [1] * (len(rows.texts) - 4), [])
    assert made[0].manifest.result.groups == len(rows.texts) - 2


def test_blend_of_different_split_salts(settings, reviews_csv):
    parts = [train(settings(name=name, split_salt=name)) for name in ("one", "two")]
    events = []
    made = blend(
        [(part, 0.5) for part in parts],
        "mixed",
        Library(),
        options=ModelOptions(device="cpu", notify=events.append),
    ).adapter
    assert made.manifest.data.split_salt is None
    assert any("differ in --split-salt" in event.text for event in events if isinstance(event, Notice))
    config = TrainConfig(parent="mixed", dataset=str(reviews_csv), name="on", max_steps=2, device="cpu")
    with pytest.raises(ConfigError, match="no rows are held out for all of them: give --eval-dat"):
        train(config)


def test_missing_held_out_rows_stay_recorded(two, caches, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(caches / "another"))
    for made in (
        compress(two[0], "less", Library(), energy=0.5, options=ModelOptions(device="cpu")).adapter,
        blend([(two[0], 1.0)], "same", Library(), options=ModelOptions(device="cpu")).adapter,
    ):
        assert made.manifest.result is None
        assert made.manifest.data == two[0].manifest.data
    made = blend(
        [(adapter, 1.0) for adapter in two], "mixed", Library(), options=ModelOptions(device="cpu")
    ).adapter
    assert (made.manifest.data.held_out_hash, made.manifest.data.held_out_rows) == (None, 0)
    reason = gain_matrix.cached_rows(made).missing
    assert reason == "it was made from adapters whose held-out rows were missing"


def test_equal_held_out_rows_evaluated_once(two, settings):
    events = []
    again = train(settings(name="again", where=["label=1"], seed=5))
    blended = blend(
        [(two[0], 0.5), (again, 0.5)],
        "mixed",
        Library(),
        options=ModelOptions(device="cpu", notify=events.append),
    )
    assert list(blended.results) == ["praise"]
    assert "Not evaluated on again: its held-out rows are among those of praise." in [
        event.text for event in events if isinstance(event, Notice)
    ]
    assert blended.adapter.manifest.data == two[0].manifest.data


def test_blend_without_held_out_rows_notifies(make, library, model_folder, rows):
    events = []
    one = make("one")
    made = blend(
        [(one, 1.0)], "same", library, options=ModelOptions(base=str(model_folder), notify=events.append)
    ).adapter
    assert made.manifest.result is None
    assert made.manifest.data is None
    texts = [event.text for event in events if isinstance(event, Notice)]
    assert any(text.startswith("Not evaluated on one: ") for text in texts)
    measured = blend([(one, 1.0)], "measured", library, sets=rows, options=ModelOptions(base=str(model_folder)))
    assert measured.adapter.manifest.result.rows == 12
    assert list(measured.results) == ["some reviews"]


def test_blend_with_unknown_dataset(two, gpt2, tmp_path, rows):
    foreign = save_peft_adapter(gpt2, tmp_path / "foreign", target_modules=["c_attn"])
    made = blend([(two[0], 0.5), (foreign, 0.5)], "mixed", Library(), options=ModelOptions(device="cpu")).adapter
    assert made.manifest.data.name.endswith("reviews.csv + unknown")
    assert made.manifest.data.held_out_rows == made.manifest.result.rows == 8
    assert gain_matrix.cached_rows(made).missing is None
    other = blend([(two[0], 0.5)], "other", Library(), sets=rows, options=ModelOptions(device="cpu")).adapter
    assert other.manifest.data.eval_dataset == "some reviews"


# The commands


def test_blend_compress_merge_commands(two, tmp_path):
    text = run("blend", "praise=0.7", "pan=-0.3", "--name", "mixed", "--device", "cpu").stdout
    assert text.startswith("adapters/mixed  ")
    assert "ranks 4 to 6: blend praise=0.7 pan=-0.3" in text
    assert "held-out loss" in text
    assert "  on pan: gain" in text
    cut = json.loads(
        run("blend", "praise=1", "pan=1", "--name", "cut", "--rank", 2, "--json", "--device", "cpu").stdout
    )
    assert 0 < cut["blend"]["lost_in_all"] < 1
    assert set(cut["blend"]["lost"]) == set(two[0].modules)
    assert "of the energy is lost, most in" in run("compress", "mixed", "--energy", 0.5, "--device", "cpu").stdout
    assert Library().names() == ["cut", "mixed", "mixed-compressed", "pan", "praise"]
    compressed = json.loads(run("compress", "cut", "--max-bytes", 8000, "--json", "--device", "cpu").stdout)
    assert compressed["picture"] == "adapters/cut-compressed/spectrum.png"
    assert compressed["compress"]["results"][0]["loss"] == pytest.approx(cut["result"]["loss"], abs=1e-6)
    refused = run("compress", "cut", "--energy", 0.9, "--max-bytes", 9, exit_code=1).stderr
    assert refused == "Error: energy and max_bytes exclude each other: give one.\n"
    refused = run("compress", "cut", "--where", "a=1", exit_code=1).stderr
    assert refused == "Error: where: only valid with --eval-dataset.\n"
    several = run("merge", "praise", "mixed", "--out", "merged", "--eval-rows", 4).stdout.splitlines()
    assert several[0] == "merged/praise"
    assert several[3] == "merged/mixed"
    assert several[1].startswith("verified against base and adapter: largest logit difference ")
    assert several[2].endswith("(4 held-out rows)")
    (alone,) = json.loads(run("merge", "cut", "--out", "alone", "--json").stdout)
    assert alone["comparison"]["agreement"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("blend", "praise", "pan=0.5", "--name", "mixed"),
            "Error: 'praise' has no weight, and others have: give each one, such as praise=0.5, or none for equal parts.",
        ),
        (
            ("blend", "praise=much", "--name", "mixed"),
            "Error: 'praise=much' is not of the form NAME=WEIGHT, such as imdb=0.7.",
        ),
        (("blend", "nobody=1", "--name", "mixed"), "Error: There is no adapter 'nobody', neither in adapters"),
    ],
)
def test_blend_command_errors(arguments, message):
    stderr = run(*arguments, exit_code=1).stderr
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1


def test_blend_of_one_adapter_is_refused(two):
    stderr = run("blend", "praise", "--name", "mixed", exit_code=1).stderr
    assert stderr == (
        "Error: 'praise' is one adapter alone: name two or more, or give a weight "
        "(1 rewrites it, others scale it).\n"
    )


def test_advice_to_rewrite_an_adapter_works(two):
    config = Path("adapters/praise/adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bias": "all"}))
    Path("adapters/praise/manifest.json").unlink()  # as one of another tool
    refused = run("adapters", "check", "praise", "--for", "vllm", exit_code=1).stdout
    assert "`python cli.py blend praise=1 --name NEW`" in " ".join(refused.split())
    run("blend", "praise=1", "--name", "mixed", "--device", "cpu")
    assert json.loads(Path("adapters/mixed/adapter_config.json").read_text())["bias"] == "none"
    refused = run("adapters", "check", "mixed", "--for", "vllm", exit_code=1).stdout  # GPT-2
    assert "rewrite it" not in refused


def test_blend_without_weights_is_equal_parts(two):
    for again in ("praise", "adapters/praise"):
        refused = run("blend", "praise", again, "--name", "mixed", exit_code=1).stderr
        assert refused == "Error: 'praise' is given twice: give each adapter once, or weights.\n"
    equal = json.loads(run("blend", "praise", "pan", "--name", "equal", "--json", "--device", "cpu").stdout)
    half = json.loads(run("blend", "praise=0.5", "pan=0.5", "--name", "half", "--json", "--device", "cpu").stdout)
    assert equal["made_by"] == half["made_by"] == "blend praise=0.5 pan=0.5"
    assert equal["weights"]["sha256"] == half["weights"]["sha256"]
