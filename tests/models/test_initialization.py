"""Each method does what its paper says, and saves a plain PEFT adapter."""

import json
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_tuner import Library, ModelOptions, TrainConfig, resume, train
from lora_tuner.adapters.adapter import CONFIG_FILE, RUN_FILE
from lora_tuner.config import METHODS, MethodName
from lora_tuner.errors import ConfigError
from lora_tuner.evaluation import gain_matrix
from lora_tuner.evaluation.held_out_loss import measure_loss
from lora_tuner.models import initialization, lora
from lora_tuner.settings_files import resolve_settings
from lora_tuner.training.setup import prepare_training
from lora_tuner.training.trainer import LoraTrainer

from ..model_families import save_family

OTHERS = [name for name in METHODS if name != "lora"]


def quick(*names, among):
    """Return parameters of which all but the named ones are slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in among]


def test_methods_table_is_complete():
    assert set(METHODS) == set(get_args(MethodName))
    assert next(iter(METHODS)) == TrainConfig().method == "lora"


@pytest.fixture(params=["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def model_folder(request):
    """One base per kind of linear layer."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def config_for(model_folder, settings):
    """Make a configuration of a method on this base. Its rate is given: to measure it takes as long as a run."""

    def make(method, **changes):
        return settings(base=str(model_folder), method=method, **changes)

    return make


def loss(setup):
    return measure_loss(setup.model, setup.base, setup.held_out).loss


@pytest.mark.parametrize("method", quick("dora", "pissa", "eva", among=METHODS))
def test_training_lowers_loss_and_keeps_base(config_for, method):
    config = config_for(method, max_steps=12, learning_rate=None)
    before = prepare_training(config)
    weights = {name: p.clone() for name, p in before.model.named_parameters() if not p.requires_grad}
    with before.model.disable_adapter():
        plain = loss(before)
    assert loss(before) == pytest.approx(plain, abs=2e-5)
    adapter = train(config)
    result = adapter.manifest.result
    assert result.base_loss == pytest.approx(plain, abs=1e-5)
    assert result.loss < plain - 0.01
    assert adapter.manifest.run.method == method
    for name, weight in before.model.named_parameters():
        if not weight.requires_grad:
            assert torch.equal(weight, weights[name])


@pytest.mark.parametrize("method", quick("rslora", "dora", "pissa", "eva", among=METHODS))
def test_saved_adapter_loads_in_plain_peft(config_for, model_folder, method):
    """PEFT alone computes the measured loss from the files, which name no initializer."""
    adapter = train(config_for(method))
    config = json.loads((adapter.path / CONFIG_FILE).read_text())
    assert config["init_lora_weights"] is True
    assert config["eva_config"] is None
    stock = AutoModelForCausalLM.from_pretrained(model_folder)
    before = {name: p.clone() for name, p in stock.named_parameters()}
    wrapped = PeftModel.from_pretrained(stock, adapter.path)
    setup = prepare_training(config_for("lora"))
    nll, count = 0.0, 0
    with torch.inference_mode():
        for row in setup.held_out:
            ids = torch.from_numpy(row).long()
            nll += F.cross_entropy(wrapped(ids[None]).logits[0, :-1], ids[1:], reduction="sum").item()
            count += len(ids) - 1
    assert nll / count == pytest.approx(adapter.manifest.result.loss, abs=1e-4)
    state = stock.state_dict()
    for name, parameter in before.items():
        wrapped_name = name.replace(".weight", ".base_layer.weight")
        assert torch.equal(state.get(name, state.get(wrapped_name, parameter)), parameter)


@pytest.mark.parametrize("method", quick("pissa", among=OTHERS))
def test_resumed_method_equals_uninterrupted_run(config_for, method, stop_at):
    whole = train(config_for(method, name="whole", save_every=2))

    with stop_at(3):
        train(config_for(method, name="half", save_every=2))
    half = resume("half")
    assert half.sha256 == whole.sha256
    again = train(resolve_settings(TrainConfig, {"name": "again"}, whole.path / RUN_FILE))
    assert again.sha256 == whole.sha256


@pytest.mark.parametrize("method", quick("dora", "eva", among=OTHERS))
def test_child_adapter_keeps_method(config_for, method):
    parent = train(config_for(method, name="parent"))
    again = {"dataset": "reviews.csv", "max_length": 64, "eval_rows": 8}
    child = train(TrainConfig(parent="parent", name="child", max_steps=3, batch_size=2, **again))
    assert child.rank == parent.rank
    for key in ("use_dora", "use_rslora"):
        assert child.config[key] == parent.config[key]
    kind = method if method in ("dora", "rslora") else "lora"
    assert child.manifest.run.method == kind


def test_pissa_with_parent_is_refused(settings, adapter):
    with pytest.raises(ConfigError) as error:
        train(TrainConfig(dataset="reviews.csv", name="child", method="pissa", parent="reviews", max_steps=2))
    assert str(error.value) == (
        "method is pissa, but reviews has lora: with --from these come from the parent, so leave them out."
    )


def test_lora_plus_continues_from_plain_lora(settings, adapter):
    child = train(settings(name="child", method="lora+", parent="reviews", max_steps=2))
    assert child.manifest.run.method == "lora+"


def test_pissa_trains_only_first_half(config_for):
    setup = prepare_training(config_for("pissa", rank=3))
    layer = next(module for module in setup.model.modules() if hasattr(module, "lora_A"))
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = layer.base_layer.weight.T if layer.fan_in_fan_out else layer.base_layer.weight
    values = torch.linalg.svdvals(weight)
    half = layer.scaling["default"] * lora_b[:, :3] @ lora_a[:3]
    torch.testing.assert_close(torch.linalg.svdvals(half.detach())[:3], values[:3], atol=1e-3, rtol=1e-3)
    adapter = train(config_for("pissa", rank=3))
    tensors = lora.read_weights_file(adapter)
    assert adapter.rank == 6
    start = lora.adapter_state_dict(setup.model)
    for key, tensor in tensors.items():
        if "lora_B" in key:
            assert torch.equal(tensor[:, 3:], start[key][:, 3:])
            assert not torch.equal(tensor[:, :3], start[key][:, :3])
        else:
            assert torch.equal(tensor[3:], start[key][3:])


def test_pissa_matches_peft(config_for, model_folder):
    """The trained half starts as in PEFT's own, which changes the base."""
    from peft import LoraConfig, get_peft_model

    setup = prepare_training(config_for("pissa", rank=2))
    layers = {name: module for name, module in setup.model.named_modules() if hasattr(module, "lora_A")}
    stock = AutoModelForCausalLM.from_pretrained(model_folder)
    settings = LoraConfig(
        r=2,
        lora_alpha=4,
        init_lora_weights="pissa",
        target_modules=setup.model.peft_config["default"].target_modules,
    )
    peft_model = get_peft_model(stock, settings)
    for name, layer in layers.items():
        peft_layer = peft_model.get_submodule(name)
        expected = peft_layer.lora_B["default"].weight @ peft_layer.lora_A["default"].weight
        product = layer.lora_B["default"].weight[:, :2] @ layer.lora_A["default"].weight[:2]
        torch.testing.assert_close(product, expected, atol=2e-3, rtol=0)


def test_eva_redistributes_ranks(config_for):
    adapter = train(config_for("eva", rank=4))
    ranks = {adapter.rank_of(module) for module in adapter.modules}
    assert len(ranks) > 1
    plain = train(config_for("lora", rank=4, name="plain"))
    assert sum(map(adapter.rank_of, adapter.modules)) == sum(map(plain.rank_of, plain.modules))
    assert {adapter.scale_of(module) for module in adapter.modules} == {2.0}


def test_eva_starts_with_orthonormal_directions(config_for):
    setup = prepare_training(config_for("eva", rank=4))
    for name, tensor in lora.adapter_state_dict(setup.model).items():
        if "lora_A" in name:
            torch.testing.assert_close(tensor @ tensor.T, torch.eye(len(tensor)), atol=1e-4, rtol=0)
        else:
            assert not tensor.any()


@pytest.mark.parametrize("method", ["pissa", "eva"])
def test_rank_above_layer_size_is_refused(config_for, model_folder, method):
    max_rank = 16 if method == "pissa" and model_folder.name == "llama" else 32  # Llama's keys and values
    with pytest.raises(ConfigError) as error:
        train(config_for(method, rank=33))
    assert str(error.value) == f"rank is 33, but {method} allows at most {max_rank} here: lower --rank."
    assert not Library().names()


def test_eva_without_convergence_stops(config_for, monkeypatch):
    monkeypatch.setattr(initialization, "EVA_CONVERGED", 1.0)
    setup = prepare_training(config_for("eva", rank=4))
    for layer in initialization._lora_layers(setup.model):
        (lora_a,) = layer.lora_A.values()
        assert torch.linalg.matrix_rank(lora_a.weight) == len(lora_a.weight)


def test_eva_with_too_little_text_is_refused(config_for):
    with pytest.raises(ConfigError) as error:
        prepare_training(
            config_for("eva", rank=32, max_rows=2, dataset=_short(), eval_dataset=_short("held"), eval_rows=2)
        )
    assert str(error.value) == "eva needs 32 tokens of text for this rank: provide more text, or lower --rank."


def _short(name="short"):
    from pathlib import Path

    path = Path(f"{name}.csv").resolve()
    path.write_text("text\n" + "\n".join(f"{name} {number}" for number in range(4)) + "\n", encoding="utf-8")
    return str(path)


def test_lora_plus_uses_two_learning_rates(config_for, tmp_path):
    setup = prepare_training(config_for("lora+", weight_decay=0.1))
    trainer = LoraTrainer(setup, tmp_path)
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in setup.model.named_parameters()}
    rates = {
        ("lora_B" in names[id(p)], group["lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    rate = setup.learning_rate
    assert rates == {(False, rate, 0.1), (True, 4 * rate, 0.1)}
    assert sum(len(group["params"]) for group in groups) == len(lora.adapter_state_dict(setup.model))


def test_rslora_scales_by_root_of_rank(config_for):
    small, large = (
        prepare_training(config_for("rslora", rank=rank)).model.peft_config["default"] for rank in (8, 32)
    )
    assert small.lora_alpha == large.lora_alpha == 6
    adapter = train(config_for("rslora", rank=4))
    assert {adapter.scale_of(module) for module in adapter.modules} == {3.0}


def test_method_sets_default_learning_rate(config_for, monkeypatch):
    monkeypatch.setattr("lora_tuner.training.learning_rate._best_step", lambda *of: None)
    for method, facts in METHODS.items():
        assert (
            prepare_training(config_for(method, learning_rate=None)).config.learning_rate == facts.learning_rate
        )
    assert (
        prepare_training(config_for("dora").model_copy(update={"learning_rate": 0.5})).config.learning_rate == 0.5
    )


def test_pissa_with_weight_decay_is_refused():
    with pytest.raises(ConfigError) as error:
        resolve_settings(TrainConfig, {"method": "pissa", "weight_decay": 0.1})
    assert str(error.value) == (
        "weight_decay is not possible with pissa: it would decay the part of its weights that belongs to the base"
    )


@pytest.mark.slow
def test_evaluate_matches_training_for_every_method(config_for):
    for method in METHODS:
        adapter = train(config_for(method, name=method.replace("+", "plus")))
        cell = gain_matrix.evaluate([adapter], options=ModelOptions(device="cpu")).cells[0][0]
        assert cell.loss == pytest.approx(adapter.manifest.result.loss, abs=1e-4)


@pytest.mark.parametrize(
    "family", quick("opt", "qwen2_moe", among=["opt", "qwen2_moe", "gemma3", "jamba", "bart"])
)
def test_eva_starts_at_base_in_family(tmp_path, settings, family):
    """Rows that are flattened, experts, towers and other parts that no text reaches."""
    base = save_family(tmp_path / family, family)
    config = settings(base=str(base), method="eva", max_steps=1, max_length=32, batch_size=1, eval_rows=2)
    before = prepare_training(config)
    with before.model.disable_adapter():
        plain = loss(before)
    assert loss(before) == pytest.approx(plain, abs=2e-5)


def test_eva_leaves_padding_out():
    positions = torch.tensor([[0, 0], [1, 0], [1, 1], [1, 2]])  # lengths 1 and 3
    inputs = torch.arange(12.0).view(2, 3, 2)
    expected = inputs.view(6, 2)[[0, 3, 4, 5]]
    for given in (inputs, inputs.view(6, 2)):  # OPT flattens rows
        assert torch.equal(initialization._unpadded_inputs((given,), positions, "layer"), expected)
    experts = torch.arange(8.0).view(4, 2).T  # other tokens: all of them
    assert torch.equal(initialization._unpadded_inputs((experts,), positions, "layer"), experts)


def test_eva_without_tokens_for_a_layer_is_refused(gpt2, settings, monkeypatch):
    monkeypatch.setattr(
        initialization, "_unpadded_inputs", lambda inputs, positions, name: inputs[0].flatten(0, 1)[:2]
    )
    with pytest.raises(ConfigError) as error:
        prepare_training(settings(method="eva", rank=4, max_steps=1))
    assert str(error.value) == "eva reaches some layers with too few tokens: provide more text, or lower --rank."
