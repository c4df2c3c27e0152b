import json
import zlib

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from lora_tuner import ModelOptions, atomic_io
from lora_tuner.adapters.adapter import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, load_adapter_folder
from lora_tuner.adapters.manifest import WeightsInfo
from lora_tuner.errors import AdapterError, MixedBatchError
from lora_tuner.inference.multi_lora import MultiLora, blend_loaded
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import adapter_files, tiny_models

FLATTENED = "This base flattens the rows of a batch, so all rows of a batch must share one adapter."
IDS = torch.arange(7, 307).reshape(15, 20)  # tests use the first rows
SOME = {"gpt2": ["c_attn", "mlp.c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}
ALL = {
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
ONE = {"gpt2": "transformer.h.0.attn.c_attn", "llama": "model.layers.0.self_attn.q_proj"}
# In the order in which PEFT saves them: the first key that matches applies.
RANKS = {
    "gpt2": {"0.attn.c_attn": 2, "^transformer.h.1.mlp.c_proj": 5, "c_attn": 7, r"h\.1\.attn\.c_proj": 3},
    "llama": {
        "0.self_attn.q_proj": 2,
        "^model.layers.1.mlp.down_proj": 5,
        r"layers\.1\.mlp\.up_proj": 3,
        "q_proj": 7,
    },
}
ALPHAS = {
    "gpt2": {"^transformer.h.0.attn.c_attn$": 1, "h.0.mlp.c_fc": 30, r"mlp\.c_proj": 2.5},
    "llama": {"^model.layers.0.self_attn.q_proj$": 1, "0.mlp.up_proj": 30, r"mlp\.down_proj": 2.5},
}


@pytest.fixture
def kind(model_folder):
    return model_folder.name


@pytest.fixture
def base(model_folder):
    return load(model_folder)


@pytest.fixture
def make(model_folder, kind, tmp_path):
    """Save adapters of plain PEFT with random weights."""

    def save(name, **settings):
        return save_peft_adapter(model_folder, tmp_path / name, **{"target_modules": SOME[kind]} | settings)

    return save


def load(folder, dtype="float32"):
    return load_base(find_base(str(folder)), ModelOptions(device="cpu", dtype=dtype))


def save_peft_adapter(base_folder, folder, dtype=torch.float32, **settings):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    settings = {"r": 4, "lora_alpha": 8, "fan_in_fan_out": model.config.model_type == "gpt2"} | settings
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(zlib.crc32(folder.name.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, save_embedding_layers=False)
    return load_adapter_folder(folder)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


class NamedAdapters(MultiLora):
    """MultiLora with adapters by name; None is the plain base."""

    def __init__(self, base):
        super().__init__(base)
        self.loaded = {None: None}

    def add(self, name, adapter):
        self.loaded[name] = self.load(adapter)

    def apply(self, rows):
        return self.apply_hooks(self.hooks([self.loaded[name] for name in rows]))


def logits_with(base, multi_lora, rows, ids=IDS[:3]):
    with multi_lora.apply(rows):
        return logits(base.model, ids)


def peft_logits(base_folder, adapter, ids):
    """Logits of plain PEFT, or of the plain base for None, on a fresh model."""
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    return logits(PeftModel.from_pretrained(model, adapter.path).eval() if adapter else model, ids)


def assert_logits_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# same logits as plain PEFT


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 9},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "lora_alpha": 3},
        {"lora_alpha": -5},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "use_dora": True},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_logits_match_peft(base, make, model_folder, settings):
    adapter = make("a", **settings)
    assert {dtype for dtype, _ in adapter.tensors.values()} == {
        {torch.float16: "F16", torch.bfloat16: "BF16"}.get(settings.get("dtype"), "F32")
    }
    multi_lora = NamedAdapters(base)
    multi_lora.add("a", adapter)
    actual = logits_with(base, multi_lora, ["a"])
    assert_logits_close(actual, peft_logits(model_folder, adapter, IDS[:3]))
    assert (actual - logits(base.model, IDS[:3])).abs().max() > 0.1


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_rank_and_alpha_patterns_match_peft(base, make, kind, model_folder, settings):
    adapter = make(
        "a", target_modules=ALL[kind], rank_pattern=RANKS[kind], alpha_pattern=ALPHAS[kind], **settings
    )
    assert {adapter.rank_of(module) for module in adapter.modules} == {2, 3, 4, 5, 7}
    over = 2**0.5 if settings == {"use_rslora": True} else 2
    assert adapter.scale_of(ONE[kind]) == 1 / over
    multi_lora = NamedAdapters(base)
    multi_lora.add("a", adapter)
    assert_logits_close(logits_with(base, multi_lora, ["a"]), peft_logits(model_folder, adapter, IDS[:3]))


@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
def test_pattern_keys_match_whole_names(base, make, kind, model_folder):
    part = {"gpt2": "attn", "llama": "proj"}[kind]
    adapter = make("a", rank_pattern={part: 2, ".": 3}, alpha_pattern={part: 99, "_proj": 77})
    assert {adapter.rank_of(module) for module in adapter.modules} == {4}
    multi_lora = NamedAdapters(base)
    multi_lora.add("a", adapter)
    assert_logits_close(logits_with(base, multi_lora, ["a"]), peft_logits(model_folder, adapter, IDS[:3]))


@pytest.mark.parametrize("dora", [False, True])
def test_bfloat16_base_rounds_like_peft(make, model_folder, dora):
    adapter = make("a", use_dora=dora)
    half = load(model_folder, "bfloat16")
    multi_lora = NamedAdapters(half)
    multi_lora.add("a", adapter)
    actual = logits_with(half, multi_lora, ["a"])
    assert actual.dtype == torch.bfloat16
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype="bfloat16"), adapter.path
    )
    peft, exact = logits(model.eval(), IDS[:3]), peft_logits(model_folder, adapter, IDS[:3])
    assert (actual - exact).abs().mean() < 1.2 * (peft - exact).abs().mean()


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_dora_does_not_scale_bias(tmp_path, gpt2, kind):
    folder = save_opt(tmp_path / "opt") if kind == "opt" else gpt2
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():  # zero in a fresh model
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "base")
    tiny_models.tokenizer().save_pretrained(tmp_path / "base")
    target = {"gpt2": "c_attn", "opt": "q_proj"}[kind]
    adapter = save_peft_adapter(tmp_path / "base", tmp_path / "a", target_modules=[target], use_dora=True)
    base = load(tmp_path / "base")
    multi_lora = NamedAdapters(base)
    multi_lora.add("a", adapter)
    expected = peft_logits(tmp_path / "base", adapter, IDS[:3])
    assert_logits_close(logits_with(base, multi_lora, ["a"]), expected)
    assert_logits_close(logits_with(base, multi_lora, ["a", None, "a"])[::2], expected[::2])


# rows of a batch


@pytest.fixture
def mixed(base, make, kind):
    """Loaded adapters of every kind, and the adapters by name; None is the plain base."""
    adapters = {
        "plain": make("plain"),
        "wide": make("wide", r=11, use_rslora=True, target_modules=ALL[kind]),
        "single": make("single", r=1, target_modules=[ONE[kind]]),
        "patterns": make(
            "patterns", target_modules=ALL[kind], rank_pattern=RANKS[kind], alpha_pattern=ALPHAS[kind]
        ),
        "dora": make("dora", use_dora=True, r=6),
        "half": make("half", dtype=torch.bfloat16, r=3),
        None: None,
    }
    multi_lora = NamedAdapters(base)
    for name, adapter in adapters.items():
        if adapter:
            multi_lora.add(name, adapter)
    return multi_lora, adapters


def test_mixed_batch_rows_match_peft(base, mixed, model_folder):
    multi_lora, adapters = mixed
    names = [*adapters, "dora", None, "single"]
    expected = [peft_logits(model_folder, adapters[name], IDS[row : row + 1]) for row, name in enumerate(names)]
    assert_logits_close(logits_with(base, multi_lora, names, IDS[: len(names)]), torch.cat(expected))
    assert min((a - b).abs().max() for a in expected for b in expected if a is not b) > 0.1


def test_all_adapter_pairs_match_peft(base, mixed, model_folder):
    multi_lora, adapters = mixed
    expected = {name: peft_logits(model_folder, adapter, IDS[:2]) for name, adapter in adapters.items()}
    for first in adapters:
        for second in adapters:
            actual = logits_with(base, multi_lora, [first, second], IDS[:2])
            assert_logits_close(actual, torch.stack([expected[first][0], expected[second][1]]))


def test_single_entry_applies_to_all_rows(base, mixed, model_folder):
    multi_lora, adapters = mixed
    for name in ("plain", "dora", None):
        with multi_lora.apply([name]):
            for rows in (1, 5, 2):
                assert_logits_close(
                    logits(base.model, IDS[:rows]), peft_logits(model_folder, adapters[name], IDS[:rows])
                )


def test_wrong_batch_size_is_rejected(base, mixed):
    multi_lora, _ = mixed
    for rows in (1, 3):
        with pytest.raises(MixedBatchError) as error:
            logits_with(base, multi_lora, ["plain", "dora"], IDS[:rows])
        assert str(error.value) == FLATTENED


# the base


def test_base_is_never_modified(base, mixed):
    multi_lora, _ = mixed
    fresh = load(base.files.folder).model
    expected, names = logits(fresh, IDS[:2]), [name for name, _ in fresh.named_modules()]
    for rows in (["plain"], ["dora"], ["plain", "dora"], [None, "wide"], [None], [None, None]):
        logits_with(base, multi_lora, rows, IDS[:2])
        assert count_hooks(base.model) == 0
        assert torch.equal(logits(base.model, IDS[:2]), expected)
    assert [name for name, _ in base.model.named_modules()] == names
    assert not any("lora" in name for name in names)
    assert [name for name, _ in base.model.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    weights = base.model.state_dict()
    assert list(weights) == list(fresh.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("rows", [["plain"], ["plain", "dora"]])
def test_hooks_are_removed_after_error(base, mixed, rows):
    multi_lora, _ = mixed
    before = logits(base.model, IDS[:2])

    def interrupted():
        with multi_lora.apply(rows):
            assert not torch.equal(logits(base.model, IDS[:2]), before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert count_hooks(base.model) == 0
    assert torch.equal(logits(base.model, IDS[:2]), before)


def test_zero_weights_change_no_bit(base, make):
    multi_lora = NamedAdapters(base)
    adapter = make("a")
    weights = load_file(adapter.path / WEIGHTS_FILE)
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in weights.items()},
        adapter.path / WEIGHTS_FILE,
    )
    multi_lora.add("a", adapter)
    assert torch.equal(logits_with(base, multi_lora, ["a"]), logits(base.model, IDS[:3]))
    assert torch.equal(logits_with(base, multi_lora, ["a", None, None]), logits(base.model, IDS[:3]))


# loading


def damage(adapter, change):
    path = adapter.path / WEIGHTS_FILE
    weights = load_file(path)
    change(weights[sorted(weights)[0]])
    save_file(weights, path)
    return f"{adapter.path} is damaged: "


def test_reload_keeps_earlier_weights(base, make, model_folder):
    multi_lora = NamedAdapters(base)
    first, second = make("one"), make("another", r=2, use_rslora=True)
    multi_lora.add("a", first)
    before = multi_lora.loaded["a"]
    multi_lora.add("a", second)
    assert_logits_close(logits_with(base, multi_lora, ["a"]), peft_logits(model_folder, second, IDS[:3]))
    multi_lora.loaded["before"] = before
    assert_logits_close(logits_with(base, multi_lora, ["before"]), peft_logits(model_folder, first, IDS[:3]))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nonfinite_weights_are_rejected(base, make, number, dtype):
    multi_lora = NamedAdapters(base)
    multi_lora.add("a", make("good"))
    before = logits_with(base, multi_lora, ["a"])
    bad = make("bad", dtype=dtype)
    start = damage(bad, lambda tensor: tensor[-1, -1].fill_(number))
    with pytest.raises(AdapterError) as error:
        multi_lora.add("a", bad)
    assert str(error.value) == f"{start}{sorted(bad.tensors)[0]} has values that are not finite."
    assert torch.equal(logits_with(base, multi_lora, ["a"]), before)


def test_weights_not_matching_manifest_are_rejected(base, make):
    multi_lora = NamedAdapters(base)
    adapter = make("a")
    path = adapter.path / WEIGHTS_FILE
    facts = WeightsInfo(
        sha256=atomic_io.sha256_file(path), bytes=path.stat().st_size, parameters=adapter.parameters
    )
    (adapter.path / MANIFEST_FILE).write_text(adapter_files.manifest(weights=facts).to_json())
    multi_lora.add("a", load_adapter_folder(adapter.path))
    before = logits_with(base, multi_lora, ["a"])
    start = damage(adapter, lambda tensor: tensor[0, 0].add_(1e-6))
    with pytest.raises(AdapterError) as error:
        multi_lora.add("a", load_adapter_folder(adapter.path))
    assert str(error.value) == f"{start}{WEIGHTS_FILE} does not match its hash in {MANIFEST_FILE}."
    assert torch.equal(logits_with(base, multi_lora, ["a"]), before)


def test_adapter_of_wider_base_is_rejected(base, make, kind, tmp_path):
    multi_lora = NamedAdapters(base)
    multi_lora.add("a", make("good"))
    before = logits_with(base, multi_lora, ["a"])
    wider = save_peft_adapter(
        tiny_models.save_model(tmp_path / "wider", kind, width=48), tmp_path / "wide", target_modules=[ONE[kind]]
    )
    sizes = {"gpt2": "32 -> 96 in the base, 48 -> 144", "llama": "32 -> 32 in the base, 48 -> 48"}[kind]
    with pytest.raises(AdapterError) as error:
        multi_lora.add("a", wider)
    assert str(error.value) == f"{wider.path} does not fit the base: {ONE[kind]} is {sizes} in the adapter."
    assert torch.equal(logits_with(base, multi_lora, ["a"]), before)


def test_adapter_of_deeper_base_is_rejected(base, make, kind, tmp_path):
    multi_lora = NamedAdapters(base)
    multi_lora.add("a", make("good"))
    before = logits_with(base, multi_lora, ["a"])
    target = ONE[kind].rpartition(".")[2]
    deeper = save_peft_adapter(
        tiny_models.save_model(tmp_path / "deeper", kind, layers=6), tmp_path / "deep", target_modules=[target]
    )
    problems = [f"the base has no linear layer {ONE[kind].replace('0', str(layer))}" for layer in (2, 3, 4)]
    with pytest.raises(AdapterError) as error:
        multi_lora.add("a", deeper)
    assert str(error.value) == f"{deeper.path} does not fit the base: {'; '.join(problems)}, and 1 more."
    assert torch.equal(logits_with(base, multi_lora, ["a"]), before)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")
def test_lm_head_adapter_is_rejected(base, make, kind):
    adapter = make("a", target_modules=[ONE[kind], "lm_head"])
    with pytest.raises(AdapterError) as error:
        NamedAdapters(base).add("a", adapter)
    assert str(error.value).startswith(
        f"{adapter.path} does not fit the base: the base has no linear layer lm_head (the output head, which is not "
    )


def test_loading_adds_no_modules(base, make):
    multi_lora = NamedAdapters(base)
    adapter = make("a")
    modules, parameters = list(base.model.modules()), list(base.model.parameters())
    counts = set()
    for number in range(10):
        multi_lora.add(f"a{number}", adapter)
        with multi_lora.apply(["a0"]):
            counts.add(count_hooks(base.model))
        assert count_hooks(base.model) == 0
    assert counts == {len(adapter.modules)}
    assert [id(module) for module in base.model.modules()] == [id(module) for module in modules]
    assert [id(parameter) for parameter in base.model.parameters()] == [id(parameter) for parameter in parameters]


def test_target_modules_come_from_weights(base, make, model_folder):
    adapter = make("a")
    config = json.loads((adapter.path / CONFIG_FILE).read_text())
    (adapter.path / CONFIG_FILE).write_text(
        json.dumps(config | {"lora_alpha": 16, "target_modules": ["nothing"]})
    )
    multi_lora = NamedAdapters(base)
    multi_lora.add("as_written", adapter)
    multi_lora.add("doubled", load_adapter_folder(adapter.path))
    (adapter.path / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 16}))
    expected = peft_logits(model_folder, adapter, IDS[:3])
    assert_logits_close(logits_with(base, multi_lora, ["doubled"]), expected)
    assert (logits_with(base, multi_lora, ["as_written"]) - expected).abs().max() > 0.1


# a base that flattens the rows of a batch


def save_opt(folder):
    """Save a random OPT: it flattens rows and tokens into one dimension before its MLP layers."""
    torch.manual_seed(0)
    width = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4}
    size = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    model = OPTForCausalLM(
        OPTConfig(
            num_hidden_layers=2, max_position_embeddings=tiny_models.CONTEXT, init_std=0.08, **width, **size
        )
    )
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def opt(tmp_path):
    return save_opt(tmp_path / "opt")


def test_flattened_batch_allows_one_adapter(opt, tmp_path):
    base = load(opt)
    shapes = {}

    def record(name):
        return lambda layer, inputs: shapes.update({name: inputs[0].shape})

    layers = base.model.model.decoder.layers[0]
    handles = [getattr(layers, name).register_forward_pre_hook(record(name)) for name in ("fc1", "fc2")]
    plain = logits(base.model, IDS[:2])
    for handle in handles:
        handle.remove()
    assert shapes == {"fc1": (40, 32), "fc2": (40, 64)}  # 2 rows of 20 tokens; otherwise OPT is no example

    adapters = {
        "one": save_peft_adapter(opt, tmp_path / "one", target_modules=["q_proj", "fc1"]),
        "two": save_peft_adapter(opt, tmp_path / "other", target_modules=["fc2"], use_dora=True),
    }
    multi_lora = NamedAdapters(base)
    for name, adapter in adapters.items():
        multi_lora.add(name, adapter)
    for rows in (["one", "two"], ["one", None], [None, "two"]):
        with pytest.raises(MixedBatchError) as error:
            logits_with(base, multi_lora, rows, IDS[:2])
        assert str(error.value) == FLATTENED
        assert count_hooks(base.model) == 0
        assert torch.equal(logits(base.model, IDS[:2]), plain)
    for name, adapter in adapters.items():
        expected = peft_logits(opt, adapter, IDS[:2])
        assert_logits_close(logits_with(base, multi_lora, [name], IDS[:2]), expected)
        assert_logits_close(logits_with(base, multi_lora, [name, name], IDS[:2]), expected)
        assert (expected - plain).abs().max() > 0.01


def test_flattened_base_mixes_attention_adapters(opt, tmp_path):
    one = save_peft_adapter(opt, tmp_path / "one", target_modules=["q_proj", "v_proj"])
    two = save_peft_adapter(opt, tmp_path / "other", target_modules=["out_proj"], use_dora=True)
    base = load(opt)
    multi_lora = NamedAdapters(base)
    multi_lora.add("one", one)
    multi_lora.add("two", two)
    expected = [peft_logits(opt, adapter, IDS[row : row + 1]) for row, adapter in enumerate((one, two, None))]
    assert_logits_close(logits_with(base, multi_lora, ["one", "two", None]), torch.cat(expected))


def test_loaded_weights_do_not_follow_file(kind, model_folder, tmp_path):
    """safetensors maps files: without a copy, overwriting changes the adapter, truncating ends the process."""
    one, two = (save_peft_adapter(model_folder, tmp_path / name) for name in ("one", "two"))
    base = load(model_folder)
    multi_lora = NamedAdapters(base)
    multi_lora.add("one", one)
    before = logits_with(base, multi_lora, ["one"])
    other = (two.path / WEIGHTS_FILE).read_bytes()
    with (one.path / WEIGHTS_FILE).open("r+b") as file:
        file.write(other)
    assert torch.equal(logits_with(base, multi_lora, ["one"]), before)
    with (one.path / WEIGHTS_FILE).open("r+b") as file:
        file.truncate(100)
    assert torch.equal(logits_with(base, multi_lora, ["one"]), before)


# weighted sums


def test_blend_loaded_is_weighted_sum(base, make, kind):
    multi_lora = NamedAdapters(base)
    multi_lora.add("one", make("one", target_modules=ALL[kind]))
    multi_lora.add("two", make("two", r=2, target_modules=[ONE[kind]]))
    one, two = multi_lora.loaded["one"], multi_lora.loaded["two"]
    both = blend_loaded([(0.25, one), (-2.0, two)])
    for module, update in one.layers.items():
        expected = 0.25 * (update.B @ update.A)
        if module in two.layers:
            expected = expected - 2 * (two.layers[module].B @ two.layers[module].A)
        torch.testing.assert_close(both.layers[module].B @ both.layers[module].A, expected)
    assert both.layers.keys() == one.layers.keys() | two.layers.keys()
    multi_lora.loaded["both"] = both
    with multi_lora.apply(["both"]):
        assert count_hooks(base.model) == len(both.layers)


def test_blend_loaded_rejects_dora(base, make):
    multi_lora = NamedAdapters(base)
    multi_lora.add("dora", make("dora", use_dora=True))
    assert not multi_lora.loaded["dora"].is_additive
    with pytest.raises(AdapterError, match="also rescales the base's weights"):
        blend_loaded([(1.0, multi_lora.loaded["dora"])])
