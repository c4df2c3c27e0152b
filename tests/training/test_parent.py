"""`train --from`: continue training from another adapter."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_tuner import (
    Interrupted,
    Library,
    ModelOptions,
    Notice,
    TrainConfig,
    atomic_io,
    plan,
    resume,
    train,
)
from lora_tuner.adapters.adapter import (
    CARD_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
    load_adapter_folder,
    verify_adapter,
)
from lora_tuner.adapters.library import Ancestor
from lora_tuner.adapters.manifest import ParentInfo
from lora_tuner.cli.options import eval_sets_from
from lora_tuner.errors import AdapterError, ConfigError, WrongBaseError
from lora_tuner.evaluation import held_out_loss
from lora_tuner.models import lora
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.settings_files import resolve_settings
from lora_tuner.training.inputs import load_rows
from lora_tuner.training.preview import preview
from lora_tuner.training.setup import prepare_training

from .. import tiny_models
from .test_run import StopAt, weights

QUICK = {
    "max_steps": 3,
    "max_length": 64,
    "batch_size": 4,
    "learning_rate": 0.02,
    "eval_rows": 6,
    "device": "cpu",
}
PARENT = {
    "rank": 3,
    "alpha": 5,
    "target_modules": "attention",
    "split_salt": "pepper",
}  # nothing that is so by default


@pytest.fixture(scope="module")
def family(gpt2, tmp_path_factory):
    """The parent, trained once; each test gets a copy."""
    place = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_TUNER_CACHE", str(place / "cache"))
        patch.chdir(place)
        for name, seed in (("noir", 0), ("verse", 1)):
            (place / f"{name}.json").write_text(json.dumps(tiny_models.reviews(60, seed)))
        train(TrainConfig(**QUICK, **PARENT, dataset="noir.json", base=str(gpt2)))
    return place


@pytest.fixture
def parent(family, tmp_path):
    shutil.copytree(family, tmp_path, dirs_exist_ok=True)
    return Library().get("noir")


def child(**changes):
    """A configuration that goes on from the parent with other text."""
    return TrainConfig.model_validate(QUICK | {"parent": "noir", "dataset": "verse.json"} | changes)


def refusal(kind, config):
    with pytest.raises(kind) as error:
        train(config)
    assert not (Library().path / "verse").exists()
    return str(error.value)


def tensors(adapter):
    return load_file(adapter.path / WEIGHTS_FILE)


def logits(base, folder):
    with torch.no_grad():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)(
            torch.arange(40)[None]
        ).logits


# Where it starts


def test_child_starts_with_parent_weights(parent):
    setup = prepare_training(child())
    started = lora.adapter_state_dict(setup.model)
    assert started.keys() == tensors(parent).keys()
    for name, tensor in tensors(parent).items():
        assert torch.equal(started[name], tensor), name
    assert lora.count_parameters(setup.model)[0] == parent.parameters


def test_child_starts_with_parent_loss(parent):
    setup = prepare_training(child(dataset="noir.json", name="on"))
    result = parent.manifest.result
    assert held_out_loss.measure_loss(setup.model, setup.base, setup.held_out).loss == pytest.approx(
        result.loss, abs=1e-6
    )
    with setup.model.disable_adapter():
        plain = held_out_loss.measure_loss(setup.model, setup.base, setup.held_out).loss
    assert plain == pytest.approx(result.base_loss, abs=1e-6)
    assert abs(result.gain) > 0.01


def test_small_step_stays_near_parent(parent):
    small = train(child(max_steps=1, learning_rate=1e-6))
    moved = {name: (tensor - tensors(parent)[name]).abs().max() for name, tensor in tensors(small).items()}
    assert 0 < max(moved.values()) < 2e-6  # Adam's first step is as long as the learning rate
    assert all(tensor.abs().max() > 1e-3 for name, tensor in tensors(parent).items() if "lora_B" in name)


def test_child_improves_on_parent(parent, gpt2):
    grown = train(child(dataset="noir.json", name="grown", max_steps=8))
    assert grown.manifest.result.gain > parent.manifest.result.gain
    assert grown.manifest.result.base_loss == parent.manifest.result.base_loss  # the gain is over the plain base
    assert grown.manifest.run.steps == 8


# What it shares with its parent


def scaling(adapter):
    layers = {module: (adapter.rank_of(module), adapter.scale_of(module)) for module in adapter.modules}
    return layers, [adapter.config[key] for key in ("r", "lora_alpha", "use_rslora", "use_dora")]


def test_child_keeps_parent_settings(parent, gpt2):
    found = train(child(dropout=0.1))
    assert scaling(found) == scaling(parent)
    assert (found.rank, found.config["lora_alpha"], found.modules) == (3, 5, parent.modules)
    assert found.config["target_modules"] == ["attn.c_proj", "c_attn"]
    assert found.config["lora_dropout"] == 0.1
    assert found.config["base_model_name_or_path"] == str(gpt2)
    assert found.manifest.base == parent.manifest.base
    assert found.manifest.data.split_salt == "pepper"
    saved = yaml.safe_load((found.path / RUN_FILE).read_text())
    assert (saved["parent"], saved["rank"], saved["split_salt"], saved["target_modules"], saved["base"]) == (
        *("noir", 3, "pepper", "attn.c_proj,c_attn", str(gpt2)),
    )


def test_parent_held_out_rows_are_not_trained(parent):
    alone = TrainConfig(**QUICK, **PARENT, dataset="noir.json", base=parent.base)
    first, second = prepare_training(alone), prepare_training(child(dataset="noir.json"))
    assert second.dataset.held_out == first.dataset.held_out
    assert not set(second.dataset.train) & set(first.dataset.held_out)


def test_repeated_parent_settings_are_accepted(parent, gpt2):
    silent = train(child())
    said = train(child(**PARENT, base=str(gpt2), name="said"))
    assert weights(said) == weights(silent)
    assert weights(train(child(target_modules="c_attn, attn.c_proj", name="other-words"))) == weights(silent)


def test_conflicting_parent_settings_are_refused(parent):
    keeps = "with --from these come from the parent, so leave them out."
    assert refusal(ConfigError, child(rank=8, alpha=16, split_salt="salt", target_modules="attention")) == (
        f"rank is 8, but noir has 3; alpha is 16, but noir has 5; split_salt is salt, but noir has pepper: {keeps}"
    )
    assert refusal(ConfigError, child(split_salt="lora_tuner")) == (
        f"split_salt is lora_tuner, but noir has pepper: {keeps}"
    )
    assert refusal(ConfigError, child(target_modules="auto")) == (
        f"target_modules is auto, but noir has attn.c_proj, c_attn: {keeps}"
    )
    assert refusal(ConfigError, child(target_modules="nonsense")).startswith(
        "target_modules: nonsense cannot be adapted; "
    )
    with pytest.raises(ConfigError, match=r"^rank is 8, but noir has 3: with --from"):
        preview(child(rank=8), 1)


def test_groups_of_parent_hold_on_its_dataset(parent):
    rows = [{"text": text, "author": f"a{number % 12}"} for number, text in enumerate(tiny_models.reviews(60))]
    for name in ("forum.jsonl", "other.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = child(dataset="forum.jsonl")
    facts = parent.manifest.data.model_copy(update={"name": "forum.jsonl", "group_by": "author"})
    manifest = parent.manifest.model_copy(update={"data": facts})
    (parent.path / "manifest.json").write_text(manifest.to_json())
    setup = prepare_training(config)
    assert setup.config.group_by == setup.manifest.data.group_by == "author"
    assert len(set(setup.dataset.groups_of(setup.dataset.held_out))) < len(setup.dataset.held_out)
    notices = []
    load_rows(child(dataset="other.jsonl"), load_adapter_folder(parent.path), notices.append)
    assert notices[0].text.startswith(
        "noir holds out by author, and this run by row: rows that noir was trained on"
    )
    assert "group_by is size, but noir has author" in refusal(
        ConfigError, child(dataset="forum.jsonl", group_by="size")
    )


# Which adapters can be a parent


FOREIGN = {
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["c_attn"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["c_attn", "c_fc"],
        "rank_pattern": {"h.0.attn.c_attn": 2, "c_fc": 3},
        "alpha_pattern": {"c_fc": 9},
    },
    "dora": {"r": 2, "lora_alpha": 6, "use_dora": True, "target_modules": ["c_attn"]},
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "rslora" else pytest.param(kind, marks=pytest.mark.slow) for kind in FOREIGN]
)
def test_foreign_parent_keeps_its_scaling(family, gpt2, tmp_path, kind):
    shutil.copy(family / "verse.json", tmp_path)
    torch.manual_seed(3)
    settings = LoraConfig(
        task_type="CAUSAL_LM", fan_in_fan_out=True, init_lora_weights="gaussian", **FOREIGN[kind]
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(gpt2), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained("foreign")
    theirs = load_adapter_folder(tmp_path / "foreign")
    told = []
    near = train(child(parent="foreign", name="near", max_steps=1, learning_rate=1e-8), told.append)
    assert Notice(f"foreign has no manifest, so only its shapes can be compared with {gpt2}.") in told
    assert scaling(near) == scaling(theirs)
    assert near.tensors == theirs.tensors
    assert near.config["init_lora_weights"] is True
    torch.testing.assert_close(logits(gpt2, near.path), logits(gpt2, theirs.path), atol=1e-5, rtol=0)
    sha256 = atomic_io.sha256_file(theirs.path / WEIGHTS_FILE)
    assert near.manifest.parents == [ParentInfo(name="foreign", sha256=sha256)]
    assert verify_adapter(near) == []
    far = train(child(parent="foreign", name="far", max_steps=5))
    assert far.manifest.result.gain > near.manifest.result.gain + 0.01


def test_parent_given_by_path(parent, tmp_path):
    by_name = train(child())
    shutil.move(parent.path, tmp_path / "elsewhere")
    by_path = train(child(parent="elsewhere", name="b"))
    assert weights(by_path) == weights(by_name)
    assert by_path.manifest.parents == [ParentInfo(name="elsewhere", sha256=parent.sha256)]


def test_missing_or_damaged_parent_is_refused(parent):
    assert refusal(AdapterError, child(parent="nobody")) == (
        "There is no adapter 'nobody', neither in adapters (noir) nor as a path."
    )
    data = bytearray(weights(parent))
    data[-3] ^= 1
    (parent.path / WEIGHTS_FILE).write_bytes(data)
    assert refusal(AdapterError, child()) == (
        "adapters/noir is damaged: adapter_model.safetensors does not match its hash in manifest.json."
    )
    assert list((parent.path.parent.parent / "runs").iterdir()) == []


def test_other_base_needs_force(parent, gpt2, tmp_path):
    other = tiny_models.save_model(tmp_path / "other", "gpt2", seed=7)
    prints = [find_base(str(folder)).fingerprint[:12] for folder in (gpt2, other)]
    what = (
        f"noir was trained on {gpt2} (fingerprint {prints[0]}, a local folder), not on {other} (fingerprint {prints[1]}, "
        "a local folder)"
    )
    assert refusal(WrongBaseError, child(base=str(other))) == (
        f"{what}. Name the right base with --base, or use --force to try it anyway."
    )
    told = []
    forced = train(child(base=str(other), force=True), told.append)
    assert Notice(f"FORCED: {what}. Its output may be meaningless.") in told
    assert forced.manifest.base.fingerprint == find_base(str(other)).fingerprint
    base = load_base(find_base(str(other)), ModelOptions(device="cpu"))
    assert lora.check_base(forced, base) is None
    wider = tiny_models.save_model(tmp_path / "wider", "gpt2", width=48)
    with pytest.raises(
        AdapterError, match=r"^adapters/noir does not fit the base: transformer\.h\.0\.attn\.c_attn is 48"
    ):
        train(child(base=str(wider), force=True, name="b"))


def test_force_needs_parent():
    with pytest.raises(ConfigError) as error:
        resolve_settings(TrainConfig, {"force": True})
    assert str(error.value) == "force needs an adapter to continue from: give --from"
    assert resolve_settings(TrainConfig, {"force": True, "parent": "noir"}).force
    assert not resolve_settings(TrainConfig, {"force": False}).force


# What is known of it


def test_manifest_lists_ancestors(parent):
    first, second = train(child()), train(child(parent="verse", name="second"))
    noir = ParentInfo(name="noir", sha256=atomic_io.sha256_file(parent.path / WEIGHTS_FILE))
    verse = ParentInfo(name="verse", sha256=atomic_io.sha256_file(first.path / WEIGHTS_FILE), parents=[noir])
    assert parent.manifest.parents == []
    assert first.manifest.parents == [noir]
    assert second.manifest.parents == [verse]
    assert f"| Parents | verse ({verse.sha256[:12]}) |" in (second.path / CARD_FILE).read_text()
    Library().rename("noir", "old")
    shutil.rmtree(first.path)
    assert Library().ancestors(second) == [
        Ancestor("verse", verse.sha256, generation=1, here=None),
        Ancestor("noir", noir.sha256, generation=2, here="old"),
    ]


def test_run_yaml_repeats_child_bitwise(parent):
    first = train(child(dropout=0.1, seed=5, gradient_accumulation=2))
    again = train(resolve_settings(TrainConfig, {"name": "again"}, first.path / RUN_FILE))
    assert weights(again) == weights(first)
    assert again.manifest.parents == first.manifest.parents
    assert weights(train(child(dropout=0.1, gradient_accumulation=2, name="other"))) != weights(first)


def test_child_can_overwrite_its_parent(parent):
    with pytest.raises(
        AdapterError, match="adapters/noir exists: choose another --name, or replace it with --overwrite"
    ):
        train(child(name="noir"))
    told = []
    found = train(child(name="noir", overwrite=True, max_steps=4, save_every=2), told.append)
    assert Library().names() == [path.name for path in Library().path.iterdir()] == ["noir"]
    assert found.manifest.parents == [ParentInfo(name="noir", sha256=parent.sha256)]
    assert found.manifest.run.steps == 4
    assert verify_adapter(found) == []
    assert weights(found) == weights(Library().get("noir"))
    assert Library().ancestors(found) == [Ancestor("noir", parent.sha256, generation=1, here=None)]


# Resuming


HARD = {"max_steps": 6, "dropout": 0.1, "save_every": 3, "schedule": "cosine"}


@pytest.fixture
def interrupted(parent):
    """A child whose run stopped at step 4, and the weights that it would have had."""
    whole = train(child(**HARD, name="whole"))
    with pytest.raises(
        Interrupted, match=r"Stopped at step 4 of 6, saved\. Resume with: python cli\.py train --resume v"
    ):
        train(child(**HARD), StopAt(4))
    return whole


def test_resumed_child_is_bitwise_equal(interrupted):
    resumed = resume("verse")
    assert weights(resumed) == weights(interrupted)
    assert resumed.manifest.parents == interrupted.manifest.parents
    assert resumed.manifest.result == interrupted.manifest.result


def test_resume_needs_the_unchanged_parent(interrupted, parent, tmp_path):
    parent.path.rename(tmp_path / "away")
    with pytest.raises(AdapterError) as error:
        resume("verse")
    assert str(error.value) == "There is no adapter 'noir', neither in adapters (whole) nor as a path."
    new = train(TrainConfig(**QUICK, **PARENT, dataset="verse.json", name="noir", base=parent.base))
    with pytest.raises(ConfigError) as error:
        resume("verse")
    assert str(error.value) == (
        f"adapters/noir has weights with sha256 {new.sha256[:12]}, but {parent.sha256[:12]} is expected: restore them, or leave "
        "out --from-sha256 to continue from these."
    )
    shutil.rmtree(new.path)
    (tmp_path / "away").rename(parent.path)
    assert weights(resume("verse")) == weights(interrupted)


def test_cleaning_is_that_of_the_parent(parent):
    code = [f"def f{number}(a):\n    return a\n" for number in range(12)]
    Path("code.json").write_text(json.dumps(code))
    assert "\n" not in "".join(prepare_training(child(dataset="code.json")).dataset.train)
    assert set(prepare_training(child(dataset="code.json", clean="none")).dataset.train) < set(code)
    for chosen, expected in (({}, " ".join(code[0].split())), ({"clean": "none"}, code[0])):
        (eval_set,) = eval_sets_from({"eval_dataset": "code.json"} | chosen, None, [parent])
        assert expected in eval_set.texts


# Looking first


def test_preview_uses_the_parent_split(parent):
    told = []
    rows = preview(child(), 3, told.append)
    corpus = prepare_training(child()).dataset
    assert [row.after for row in rows] == corpus.train[:3]
    assert told == [Notice(f"Data: {corpus.layout} (--clean full); {corpus.counts}.")]
    assert all(len(row.tokens) <= 64 for row in rows)


def test_plan_of_child_writes_nothing(parent, tmp_path):
    before = weights(parent)
    cost = plan(child(max_steps=None, epochs=2))
    assert cost.steps == 2 * cost.steps_per_epoch
    assert cost.trained_parameters == parent.parameters
    assert Library().names() == ["noir"]
    assert weights(parent) == before
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_profiling_does_not_change_child(parent):
    measured = train(child(max_steps=None, minutes=0.002))
    counted = train(child(max_steps=measured.manifest.run.steps, name="counted"))
    assert weights(measured) == weights(counted)


def test_repeat_needs_the_unchanged_parent(parent):
    first = train(child(name="first"))
    again = yaml.safe_load((first.path / RUN_FILE).read_text())
    assert again["parent_sha256"] == parent.sha256
    other = train(child(parent=None, base=parent.base, name="noir", overwrite=True, seed=9))
    with pytest.raises(ConfigError) as error:
        train(TrainConfig.model_validate(again | {"name": "second"}))
    assert str(error.value) == (
        f"{other.path} has weights with sha256 {other.sha256[:12]}, but {parent.sha256[:12]} is expected: restore them, or leave "
        "out --from-sha256 to continue from these."
    )
