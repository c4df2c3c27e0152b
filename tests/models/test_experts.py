"""Experts of a mixture: adapted through PEFT's parameters, the same wherever the adapter goes."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_tuner import Library, ModelOptions, SamplingParams, TrainConfig, resume, train
from lora_tuner.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter_folder
from lora_tuner.adapters.compatibility import check_compatibility
from lora_tuner.convert.adopt import adopt
from lora_tuner.convert.blend import blend
from lora_tuner.convert.compress import compress
from lora_tuner.convert.merge import merge
from lora_tuner.errors import AdapterError, ConfigError, MixedBatchError
from lora_tuner.inference.generator import EncodedPrompt, Generator
from lora_tuner.inference.multi_lora import MultiLora, blend_loaded
from lora_tuner.models import experts, lora
from lora_tuner.models.layers import adaptable_layers
from lora_tuner.models.layers_in_files import known_coverage
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.models.targets import describe_targets, resolve_target_modules
from lora_tuner.text import format_coverage

from ..cli.test_commands import run
from ..model_families import make_family, save_family

KINDS = ("qwen3_moe", "gpt_oss", "mixtral")  # sides in both orders, biases
ONE_QUICK = [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "gpt_oss")) for kind in KINDS]
IDS = torch.arange(40)[None] + 100
CPU = ModelOptions(device="cpu")
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")


def load(folder):
    return load_base(find_base(str(folder)), CPU)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_family(folder / kind, kind) for kind in KINDS}


@pytest.fixture
def make(bases, tmp_path):
    """Save an adapter of plain PEFT on attention and experts, with random weights."""

    def save(kind, name="one", **settings):
        settings = {
            "r": 3,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        } | settings
        model = AutoModelForCausalLM.from_pretrained(bases[kind])
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        torch.manual_seed(len(name))
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.15)
        folder = tmp_path / "adapters" / name
        model.save_pretrained(folder, save_embedding_layers=False)
        return load_adapter_folder(folder)

    return save


def peft_logits(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        return (PeftModel.from_pretrained(model, adapter.path) if adapter else model).eval()(IDS).logits


def logits_with(base, rows, ids=IDS):
    multi_lora = MultiLora(base)
    with torch.no_grad(), multi_lora.apply_hooks(multi_lora.hooks(rows)):
        return base.model(ids).logits


# Targets


@pytest.mark.parametrize(
    ("family", "names", "coverage"),
    [
        ("qwen3_moe", ["experts.down_proj", "experts.gate_up_proj"], 0.98),
        ("gpt_oss", ["experts.down_proj", "experts.gate_up_proj"], 0.96),
        ("mixtral", ["experts.down_proj", "experts.gate_up_proj"], 0.98),
        ("llama4_text", ["experts.down_proj", "experts.gate_up_proj"], 0.98),
        ("deepseek_v3", ["experts.down_proj", "experts.gate_up_proj"], 0.6),
        *(
            pytest.param(family, ["experts.down_proj", "experts.gate_up_proj"], 0.8, marks=pytest.mark.slow)
            for family in ("qwen2_moe", "olmoe", "granitemoe", "phimoe", "qwen3_next", "jamba", "laguna", "hy_v4")
        ),
    ],
)
def test_auto_adapts_experts_of_family(family, names, coverage):
    for setting in ("auto", "all-linear"):
        targets = resolve_target_modules(make_family(family), setting)
        assert targets.experts == names
        assert coverage < targets.coverage < 1
        assert any("router" in text for text in targets.not_adapted)
        assert not any("experts (" in text for text in targets.not_adapted)


@pytest.mark.parametrize(
    ("setting", "linear", "names"),
    [
        ("experts", [], ["experts.down_proj", "experts.gate_up_proj"]),
        ("q_proj,gate_up_proj", ["q_proj"], ["experts.gate_up_proj"]),
        ("1.mlp.experts", [], ["1.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj"]),
        ("model.layers.0.mlp.experts.down_proj", [], ["0.mlp.experts.down_proj"]),
        ("attention", ["k_proj", "o_proj", "q_proj", "v_proj"], []),
    ],
)
def test_experts_are_chosen_by_name(setting, linear, names):
    targets = resolve_target_modules(make_family("mixtral"), setting)
    assert (targets.linear, targets.experts) == (linear, names)
    assert resolve_target_modules(make_family("mixtral"), ",".join(targets.names)) == targets


def test_name_of_linear_layer_leaves_experts_out():
    model = make_family("llama4_text")
    targets = resolve_target_modules(model, "down_proj")
    assert (targets.linear, targets.experts) == (["down_proj"], [])
    both = resolve_target_modules(model, "down_proj,experts.down_proj")
    assert (both.linear, both.experts) == (["down_proj"], ["experts.down_proj"])
    assert resolve_target_modules(model, "gate_up_proj").experts == ["experts.gate_up_proj"]


def reversed_order(block):
    for name in ("gate_up_proj", "down_proj"):
        weight = block.experts.get_parameter(name)
        delattr(block.experts, name)
        setattr(block.experts, name, weight)
    weight = block.experts.gate_up_proj
    del block.experts.gate_up_proj
    block.experts.gate_up_proj = weight


def read_outside(block):
    forward = block.forward
    block.forward = lambda x: forward(x) + block.experts.down_proj.sum() * 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (reversed_order, "in an order that files do not tell"),
        (read_outside, "its weights are used elsewhere too"),
        (lambda block: setattr(experts, "_DTYPES", ()), "packed as float32"),
    ],
)
def test_unadaptable_experts_stop_with_setting(change, reason, monkeypatch):
    monkeypatch.setattr(experts, "_DTYPES", experts._DTYPES)
    model = make_family("mixtral")
    for layer in model.model.layers:
        change(layer.mlp)
    kinds = ["down_proj"] if change is read_outside else ["down_proj", "gate_up_proj"]
    rest = ["k_proj", "o_proj", "q_proj", "v_proj", *(["experts.gate_up_proj"] if change is read_outside else [])]
    for setting in ("auto", "all-linear"):
        with pytest.raises(ConfigError) as error:
            resolve_target_modules(model, setting)
        named = ", ".join(f"model.layers.*.mlp.experts.{name}" for name in kinds)
        assert str(error.value) == (
            f"target_modules: experts of this base cannot be adapted: {named} ({reason}): go on without them with "
            f"--target-modules {','.join(rest)}."
        )
    assert resolve_target_modules(model, ",".join(rest)).names == rest


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"dropout": 0.1}, "there is no dropout for experts in PEFT: leave out --dropout"),
        ({"method": "dora"}, "there is no DoRA for experts in PEFT: choose another --method"),
    ],
)
def test_settings_without_experts_are_refused(bases, settings, problem):
    targets = resolve_target_modules(make_family("mixtral"), "auto")
    with pytest.raises(ConfigError) as error:
        lora.check_experts_supported(TrainConfig(**settings), targets)
    assert str(error.value) == (
        f"experts.down_proj, experts.gate_up_proj would be adapted, and {problem}, or go on without them: "
        "--target-modules k_proj,o_proj,q_proj,v_proj."
    )
    lora.check_experts_supported(
        TrainConfig(**settings), resolve_target_modules(make_family("mixtral"), "q_proj")
    )


# Saved, loaded, merged


@pytest.mark.parametrize("kind", ONE_QUICK)
def test_saved_experts_match_plain_peft(bases, kind, tmp_path):
    base = load(bases[kind])
    model = lora.add_lora(base, TrainConfig(rank=2))
    tensors = {name: torch.randn_like(tensor) * 0.2 for name, tensor in lora.adapter_state_dict(model).items()}
    lora.save_adapter_files(tensors, model.peft_config["default"], tmp_path / "saved")
    lora.check_reload(model, tensors, tmp_path / "saved")
    names = lora.adapted_layers(model)
    model.unload()
    saved = load_adapter_folder(tmp_path / "saved")
    assert set(saved.modules) == names == set(resolve_target_modules(base.model, "auto").modules)
    assert saved.targets == ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    expected = peft_logits(bases[kind], saved)
    assert (expected - peft_logits(bases[kind], None)).abs().max() > 0.05
    loaded = lora.load_lora(base.model, saved, "slot")
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-4, rtol=0)
    loaded.unload()
    torch.testing.assert_close(logits_with(base, [MultiLora(base).load(saved)]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ONE_QUICK)
def test_merged_experts_equal_adapter(bases, kind, make, tmp_path):
    adapter = make(kind, use_rslora=kind == "mixtral")
    merge(adapter, tmp_path / "merged", options=ModelOptions(base=str(bases[kind])))
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(IDS).logits
    torch.testing.assert_close(merged, peft_logits(bases[kind], adapter), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_blended_and_compressed_experts_are_exact(bases, kind, make):
    """The commands compare the saved result with the base plus the exact sum."""
    one, three = make(kind), make(kind, "three", r=2, target_modules=["o_proj"], rank_pattern={"down_proj": 4})
    library, options = Library(Path("adapters")), ModelOptions(base=str(bases[kind]))
    blended = blend([(one, 0.5), (three, -2.0)], "mixed", library, sets=[], options=options)
    assert blended.exact_rank == 7
    base = load(bases[kind])
    multi_lora = MultiLora(base)
    mixed = blend_loaded([(0.5, multi_lora.load(one)), (-2.0, multi_lora.load(three))])
    expected = peft_logits(bases[kind], blended.adapter)
    torch.testing.assert_close(logits_with(base, [mixed]), expected, atol=1e-4, rtol=0)
    small = compress(blended.adapter, "small", library, energy=0.9, sets=[], options=options)
    assert 0 < small.total_lost_energy <= 0.1
    assert all(after <= before for before, after in small.ranks.values())
    assert small.ranks["model.layers.0.mlp.experts.down_proj"][0] == 7
    whole = compress(blended.adapter, "whole", library, energy=1.0, sets=[], options=options)
    torch.testing.assert_close(peft_logits(bases[kind], whole.adapter), expected, atol=1e-4, rtol=0)
    truncated = blend([(one, 1.0)], "rank", library, rank=1, sets=[], options=options)
    assert {truncated.adapter.rank_of(module) for module in truncated.adapter.modules} == {1}
    assert 0 < truncated.total_lost_energy < 1


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        {"target_parameters": ["1.mlp.experts.gate_up_proj"], "rank_pattern": {"gate_up_proj": 5}},
        {"target_parameters": ["gate_up_proj", "down_proj"], "alpha_pattern": {".*0.mlp.experts.down_proj": 1}},
        {"target_modules": ["q_proj", "w1", "w2", "w3"], "target_parameters": None},  # as PEFT converts them
    ],
)
def test_adapter_of_plain_peft_is_read(bases, make, settings):
    adapter = make("mixtral", **settings)
    base = load(bases["mixtral"])
    assert adapter.experts
    assert set(adapter.modules) <= adaptable_layers(base.model).keys()
    loaded = MultiLora(base).load(adapter)
    expected = peft_logits(bases["mixtral"], adapter)
    torch.testing.assert_close(logits_with(base, [loaded]), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        lora.load_lora(base.model, adapter, "slot")(IDS).logits, expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_parameters": None}, "experts.base_layer is of a parameter of model.layers.0.mlp.experts, and "),
        (
            {"target_parameters": ["experts.down_proj"]},
            "target_parameters does not name as many parameters of it",
        ),
        ({"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "experts.x"]}, "as many parameters"),
        ({"target_parameters": "experts"}, "target_parameters is 'experts', and not a list of names"),
        ({"target_parameters": [3]}, "target_parameters is [3], and not a list of names"),
        (
            {"target_parameters": ["a"] * 1001},
            "target_parameters has 1,001 names, and at most 1,000 are accepted",
        ),
        ({"r": 5}, "has 12 ranks of all experts, no multiple of 5 in adapter_config.json"),
    ],
)
def test_unclear_expert_tensors_are_refused(make, change, message):
    adapter = make("mixtral")
    config = json.loads((adapter.path / CONFIG_FILE).read_text()) | change
    (adapter.path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(AdapterError) as error:
        load_adapter_folder(adapter.path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_experts_of_other_size_are_refused(bases, make):
    adapter = make("mixtral")
    with pytest.raises(AdapterError) as error:
        lora.load_lora(load(bases["qwen3_moe"]).model, adapter, "slot")
    assert "model.layers.0.mlp.experts.down_proj is 4 times 24 -> 32 in the base, 4 times 48 -> 32" in str(
        error.value
    )
    tensors = {name: tensor[:6] if "lora_A" in name and "experts" in name else tensor[:, :6] if "experts" in name else tensor
               for name, tensor in load_file(adapter.path / WEIGHTS_FILE).items()}  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, adapter.path / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match="is 4 times 48 -> 32 in the base, 2 times 48 -> 32 in the adapter"):
        lora.load_lora(load(bases["mixtral"]).model, load_adapter_folder(adapter.path), "slot")
    dense = save_family(Path("dense"), "llama")
    with pytest.raises(AdapterError, match=r"the base has no experts model\.layers\.0\.mlp\.experts\.down_proj"):
        lora.load_lora(load(dense).model, adapter, "slot")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": "all-linear", "target_parameters": None},
            "the base has no experts model.layers.0.mlp.gate.weight (of a router or a linear layer in target_parameters, and "
            "not adapted here: merge it with PEFT's merge_and_unload, and give the result as --base)",
        ),
        (
            {"target_modules": ["lm_head"]},
            "the base has no linear layer lm_head (the output head, which is not adapted here: merge it with PEFT's "
            "merge_and_unload, and give the result as --base)",
        ),
    ],
)
def test_layers_of_plain_peft_not_adapted_are_named(bases, make, settings, message):
    with pytest.raises(AdapterError) as error:
        MultiLora(load(bases["mixtral"])).load(make("mixtral", **settings))
    assert message in str(error.value)


# Generation


def test_mixed_rows_with_experts_are_refused(bases, make):
    base = load(bases["mixtral"])
    multi_lora = MultiLora(base)
    one, other = (multi_lora.load(make("mixtral", name)) for name in ("one", "other"))
    attention = multi_lora.load(make("mixtral", "attention", target_parameters=None))
    plain = logits_with(base, [None])
    for rows in ([one, other], [one, None], [attention, one]):
        with pytest.raises(MixedBatchError) as error:
            multi_lora.hooks(rows)
        assert str(error.value) == (
            "model.layers.0.mlp.experts.gate_up_proj gets the tokens of all rows of a batch at once, so rows whose adapter "
            "changes these experts must share it."
        )
    multi_lora.hooks([attention, None])
    ids = torch.cat([IDS, IDS + 7])
    with torch.no_grad():
        torch.testing.assert_close(
            logits_with(base, [one, one], ids)[:1], logits_with(base, [one]), atol=1e-4, rtol=0
        )
    assert torch.equal(logits_with(base, [None]), plain)


def test_failed_forward_leaves_experts_unchanged(bases, make):
    base = load(bases["mixtral"])
    multi_lora = MultiLora(base)
    hooks = multi_lora.hooks([multi_lora.load(make("mixtral"))])
    block = base.model.model.layers[0].mlp.experts
    block.act_fn.forward = lambda gate: 1 / 0
    with pytest.raises(ZeroDivisionError), multi_lora.apply_hooks(hooks):
        base.model(IDS)
    assert "gate_up_proj" not in vars(block)
    assert block.gate_up_proj is block.get_parameter("gate_up_proj")


@pytest.mark.parametrize("kind", ONE_QUICK)
def test_generation_with_experts_equals_peft(bases, kind, make):
    adapters = [make(kind), make(kind, "three"), make(kind, "attention", target_parameters=None)]
    notices = []
    options = ModelOptions(base=str(bases[kind]), device="cpu", notify=lambda event: notices.append(str(event)))
    generator = Generator(options=options)
    prompt = EncodedPrompt("", list(range(10, 22)))
    greedy = SamplingParams(max_new_tokens=6, greedy=True, repetition_penalty=1.0)
    names = [None, *(str(adapter.path) for adapter in adapters)]
    solo = []
    for name in names:
        generator.set_adapter(name)
        solo.append(generator.generate(prompt, greedy).text)
    together = generator.generate_batch([(prompt, name) for name in names], greedy)
    assert [output.text for output in together] == solo
    assert sum("so each adapter runs in its own batch" in notice for notice in notices) == 1
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[kind]), adapters[0].path).eval()
    tokens = model.generate(input_ids=torch.tensor([prompt.token_ids]), max_new_tokens=6, do_sample=False)[0, 12:]
    assert len(set(solo)) > 2
    assert solo[1] == generator.base.tokenizer.decode(tokens, skip_special_tokens=True)


# Training


@pytest.mark.slow
def test_experts_train_resume_and_continue(bases, settings, stop_at):
    def configure(**changes):
        return settings(base=str(bases["qwen3_moe"]), max_length=32, eval_rows=4, **({"max_steps": 3} | changes))

    whole = train(configure(name="whole"))
    assert whole.manifest.run.coverage > 0.98
    tensors = load_file(whole.path / WEIGHTS_FILE)
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    with stop_at(2):
        train(configure(name="parts", save_every=2))
    parts = resume("parts")
    assert all(
        torch.equal(load_file(parts.path / WEIGHTS_FILE)[name], tensor) for name, tensor in tensors.items()
    )
    further = train(configure(name="further", parent="whole", max_steps=1))
    assert further.modules == whole.modules
    assert further.manifest.result.gain != whole.manifest.result.gain
    with pytest.raises(ConfigError) as error:
        train(configure(name="never", parent="whole", dropout=0.1))
    assert str(error.value).endswith("there is no dropout for experts in PEFT: leave out --dropout.")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora+", "pissa", "eva", "rslora"])
def test_method_trains_experts(bases, settings, method):
    notices = []
    config = settings(base=str(bases["gpt_oss"]), method=method, max_length=32, eval_rows=4, max_steps=1)
    adapter = train(config, lambda event: notices.append(getattr(event, "text", "")))
    assert any(name.endswith("experts.gate_up_proj") for name in adapter.modules)
    assert ("EVA is for linear layers: the experts start as with --method lora." in notices) == (method == "eva")
    expected = peft_logits(bases["gpt_oss"], adapter)
    base = load(bases["gpt_oss"])
    torch.testing.assert_close(logits_with(base, [MultiLora(base).load(adapter)]), expected, atol=1e-4, rtol=0)


# Other tools


STACKED = (
    "start vLLM with --enable-mixed-moe-lora-format and say that the experts are stacked, else it loads them wrongly or "
    'not at all: --lora-modules \'{"name": "one", "path": "...", "is_3d_lora_weight": true}\''
)
MERGE = "merge it (`python cli.py merge one --out merged/one`)"
BOTH = "vLLM needs gate_up_proj and down_proj of all experts that are adapted, and it adapts {} of some: " + MERGE


@pytest.mark.parametrize(
    ("config", "settings", "errors", "notes"),
    [
        ({"model_type": "mixtral", "hidden_size": 32}, {}, [], [STACKED]),
        ({"model_type": "gpt_oss", "hidden_size": 32}, {}, [], []),
        ({"model_type": "qwen3_5_moe", "text_config": {"hidden_size": 32}}, {}, ["under language_model"], []),
        ({"model_type": "gpt_oss"}, {"target_parameters": ["experts.down_proj"]}, [BOTH.format("down_proj")], []),
        (
            {"model_type": "gpt_oss"},
            {"target_parameters": ["experts.down_proj", "0.mlp.experts.gate_up_proj"]},
            [BOTH.format("down_proj, gate_up_proj")],
            [],
        ),
        ({"model_type": "gpt_oss", "hidden_size": 96}, {}, ["for weights with sides in the other order"], []),
        (
            {"model_type": "gpt_oss", "hidden_size": 32},
            {"alpha_pattern": {"down_proj": 1}},
            ["has another scale than one as a whole, which vLLM would ignore"],
            ["its layers differ in rank or scale: vLLM 0.33 supports that, older versions may ignore it"],
        ),
    ],
)
def test_vllm_check_of_experts(make, config, settings, errors, notes):
    report = check_compatibility(make("mixtral", **settings), "vllm", base_config=config)
    assert len(report.errors) == len(errors)
    assert all(text in error for text, error in zip(errors, report.errors, strict=True))
    assert report.notes == notes


def test_peft_check_of_experts(make):
    adapter = make("mixtral")
    assert check_compatibility(adapter, "peft").accepted
    config = json.loads((adapter.path / CONFIG_FILE).read_text()) | {"lora_dropout": 0.1, "lora_bias": True}
    (adapter.path / CONFIG_FILE).write_text(json.dumps(config))
    report = check_compatibility(load_adapter_folder(adapter.path), "peft")
    assert report.errors[0].startswith("PEFT refuses target_parameters with lora_dropout, lora_bias: rewrite it")


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral"])  # all experts in one tensor, or each in its own
def test_adopted_experts_say_their_coverage(bases, kind, make):
    adapter = make(kind)
    targets = describe_targets(load(bases[kind]).model, adapter.modules)
    text = f"{format_coverage(targets.coverage)} of the block weights"
    assert known_coverage(adapter) == text
    result = run("adapters", "adopt", str(adapter.path), "--base", str(bases[kind]))
    assert f"The adapter covers {text}." in result.stderr
    assert text in run("adapters", "show", "one").stdout
    assert json.loads(run("adapters", "show", "one", "--json").stdout)["covers"] == text


def test_coverage_without_base_is_unknown(make):
    adapter = make("mixtral")
    config = json.loads((adapter.path / CONFIG_FILE).read_text()) | {"base_model_name_or_path": "some/base"}
    (adapter.path / CONFIG_FILE).write_text(json.dumps(config))
    assert known_coverage(load_adapter_folder(adapter.path)) == ""


def test_adopted_experts_of_other_size_are_refused(bases, make):
    with pytest.raises(AdapterError, match="is 4 times 24 -> 32 in the base, 4 times 48 -> 32 in the adapter"):
        adopt(Library(Path("library")), make("mixtral").path, "mine", base=str(bases["qwen3_moe"]))
