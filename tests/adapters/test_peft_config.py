"""Settings of PEFT in an untrusted adapter_config.json, and the ranks and scales that they give."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tuner.adapters import peft_config
from lora_tuner.adapters.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    load_adapter_folder,
)
from lora_tuner.adapters.peft_config import is_pattern

from .. import adapter_files
from .test_adapter import refusal

NO_PATTERN = "which is neither a layer name nor a usable pattern"


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "gaussian", "use_rslora": True, "use_dora": False, "lora_dropout": 0.1},
        {"rank_pattern": {"h.1.attn.c_attn": 4, r"^transformer\.h\.0": 4}, "alpha_pattern": {"c_attn": 16.5}},
        {"target_modules": "all-linear", "task_type": None, "revision": None, "inference_mode": True},
        {"layers_to_transform": None, "loftq_config": {}, "trainable_token_indices": None, "lora_bias": False},
        {
            "megatron_core": "megatron.core",
            "qalora_group_size": 16,
            "peft_version": "0.21.2",
            "fan_in_fan_out": True,
        },
        {"r": 4, "lora_alpha": 0.5},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}},
        {"layers_to_transform": [0, 1], "layers_pattern": "h", "exclude_modules": ["c_proj"]},
        {
            "eva_config": {"rho": 2.0},
            "loftq_config": {"loftq_bits": 4},
            "runtime_config": {"ephemeral_gpu_offload": True},
        },
        {
            "megatron_config": {"tp": 1},
            "merge_weights": True,
            "lorap_emb_lr": 1e-6,
            "modules_to_save": ["lm_head"],
        },
        {"bias": "lora_only", "lora_bias": True, "target_parameters": ["mlp"], "trainable_token_indices": [0]},
        {"some_day": None, "other_day": False, "list_day": [], "text_day": "", "number_day": 0},
    ],
)
def test_safe_config_is_accepted(tmp_path, config):
    assert load_adapter_folder(adapter_files.write(tmp_path / "a", config)).rank == 4


def test_config_written_by_peft_is_accepted(tmp_path):
    from peft import LoraConfig

    LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["c_attn"]).save_pretrained(
        tmp_path / "own"
    )
    assert (
        load_adapter_folder(
            adapter_files.write(tmp_path / "a", json.loads((tmp_path / "own" / CONFIG_FILE).read_text()))
        ).rank
        == 4
    )


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights is 'pissa', and only True or False or 'gaussian' or 'orthogonal' or 'eva' or 'mica' is accepted",
        ),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "init_lora_weights is 'pissa_niter_16', and only True or False or 'gaussian' or 'orthogonal' or 'eva' or "
            "'mica' is accepted",
        ),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is set, which is not supported"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config is set, which is not supported"),
        ({"use_qalora": True}, "use_qalora is set, which is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set, which is not supported"),
        ({"some_day": 1}, "some_day is set, which is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only 'LORA' is accepted"),
        ({"peft_type": None}, "peft_type is missing"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', and only 'CAUSAL_LM' is accepted"),
        ({"r": 0}, "r is 0, and a rank is a whole number from 1 to 4096"),
        ({"r": 4_000_000}, "r is 4000000, and a rank is a whole number from 1 to 4096"),
        (
            {"r": True},
            "r is True, which has the wrong type bool; r is True, and a rank is a whole number from 1 to 4096",
        ),
        (
            {"r": 4.0},
            "r is 4.0, which has the wrong type float; r is 4.0, and a rank is a whole number from 1 to 4096",
        ),
        ({"r": None}, "r is missing; r is None, and a rank is a whole number from 1 to 4096"),
        (
            {"lora_alpha": None},
            "lora_alpha is missing; lora_alpha is None, and an alpha is a number up to 1000000",
        ),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, and an alpha is a number up to 1000000"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, and an alpha is a number up to 1000000"),
        ({"lora_alpha": 10**400}, f"lora_alpha is {10**400}, and an alpha is a number up to 1000000"),
        (
            {"lora_alpha": True},
            "lora_alpha is True, which has the wrong type bool; lora_alpha is True, and an alpha is a number up to 1000000",
        ),
        ({"use_rslora": 1}, "use_rslora is 1, which has the wrong type int"),
        ({"target_modules": {"c_attn": 1}}, "target_modules is {'c_attn': 1}, which has the wrong type dict"),
        ({"rank_pattern": [4]}, "rank_pattern is [4], which has the wrong type list"),
        ({"rank_pattern": {"h.0": 0}}, "rank_pattern.h.0 is 0, and a rank is a whole number from 1 to 4096"),
        (
            {"rank_pattern": {"h.0": 9_999_999}},
            "rank_pattern.h.0 is 9999999, and a rank is a whole number from 1 to 4096",
        ),
        ({"alpha_pattern": {"h.0": "8"}}, "alpha_pattern.h.0 is '8', and an alpha is a number up to 1000000"),
        ({"rank_pattern": {"h[0": 4}}, f"rank_pattern has the key 'h[0', {NO_PATTERN}"),
        ({"alpha_pattern": {"": 4}}, f"alpha_pattern has the key '', {NO_PATTERN}"),
        ({"alpha_pattern": {"(a{900}){900}": 4}}, f"alpha_pattern has the key '(a{{900}}){{900}}', {NO_PATTERN}"),
        (
            {"peft_type": "ADALORA", "r": 0, "x": 1},
            "peft_type is 'ADALORA', and only 'LORA' is accepted; x is set, which is not supported; "
            "r is 0, and a rank is a whole number from 1 to 4096",
        ),
    ],
)
def test_unsafe_config_is_rejected(tmp_path, config, why):
    assert refusal(adapter_files.write(tmp_path / "a", config)) == f"a/{CONFIG_FILE}: {why}."


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha"])
def test_config_missing_key_is_rejected(tmp_path, key):
    folder = adapter_files.write(tmp_path / "a")
    (folder / CONFIG_FILE).write_text(
        json.dumps({name: value for name, value in adapter_files.CONFIG.items() if name != key})
    )
    more = {
        "r": "; r is None, and a rank is a whole number from 1 to 4096",
        "lora_alpha": "; lora_alpha is None, and an alpha is a number up to 1000000",
    }
    assert refusal(folder) == f"a/{CONFIG_FILE}: {key} is missing{more.get(key, '')}."


@pytest.mark.parametrize("text", ["", "{", "nonsense", "[" * 100_000, '{"r": \ud83d}', "9" * 5000])
def test_config_invalid_json_is_rejected(tmp_path, text):
    folder = adapter_files.write(tmp_path / "a")
    (folder / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert refusal(folder).startswith(f"a/{CONFIG_FILE} is not readable as JSON: ")


def test_config_wrong_type_or_too_large(tmp_path):
    folder = adapter_files.write(tmp_path / "a")
    (folder / CONFIG_FILE).write_text("[]")
    assert refusal(folder) == f"a/{CONFIG_FILE}: it is not a JSON object."
    (folder / CONFIG_FILE).write_text("")
    assert (
        refusal(folder) == f"a/{CONFIG_FILE} is not readable as JSON: Expecting value: line 1 column 1 (char 0)."
    )
    (folder / CONFIG_FILE).write_text(" " * 10_000_001)
    assert refusal(folder) == f"a/{CONFIG_FILE} is too large: at most 1,000,000 bytes are read."


def adapter_of(**config):
    """An adapter that consists of its config alone."""
    return Adapter(Path("a"), adapter_files.CONFIG | config, None, {})


PARTS = [
    "transformer",
    "model",
    "layers",
    "h",
    "0",
    "1",
    "10",
    "attn",
    "self_attn",
    "c_attn",
    "q_proj",
    "proj",
    "p",
]
LAYERS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map(".".join)
PIECES = [
    *PARTS,
    ".",
    "..",
    r"\.",
    r"\d",
    r"\w",
    r"\b",
    "^",
    "$",
    r"\A",
    r"\Z",
    r"\x2e",
    "attn.c_attn",
    "h.1",
    "_",
    ".*",
    r"\d+",
    "(0|1)",
    "(?:h|attn)?",
    "[a-z_]+",
]
KEYS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join).filter(is_pattern)


@settings(deadline=None)
@given(LAYERS, st.lists(KEYS | LAYERS, min_size=1, max_size=4, unique=True), st.booleans())
def test_patterns_match_as_in_peft(layer, keys, rslora):
    from peft.utils.other import get_pattern_key

    ranks = {key: number for number, key in enumerate(keys, 5)}
    alphas = {key: number for number, key in enumerate(reversed(keys))}  # an alpha of 0 among them
    rank = ranks.get(get_pattern_key(ranks, layer), 4)
    alpha = alphas.get(get_pattern_key(alphas, layer), 8)
    adapter = adapter_of(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    assert adapter.rank_of(layer) == rank
    assert adapter.scale_of(layer) == alpha / (rank**0.5 if rslora else rank)


@pytest.mark.parametrize(
    ("pattern", "rank"),
    [
        ({}, 4),
        ({"c_attn": 2}, 2),
        ({"attn": 2}, 4),  # a part of a name is no ending of it
        ({"_attn": 2}, 4),
        ({"attn.c_attn": 2}, 2),
        ({"0.attn.c_attn": 2}, 2),
        ({"10.attn.c_attn": 2}, 4),
        ({"transformer.h.0.attn.c_attn": 2}, 2),
        ({"x.transformer.h.0.attn.c_attn": 2}, 4),
        ({"c_attn": 2, "0.attn.c_attn": 3}, 2),  # the first that matches, not the longest
        ({"0.attn.c_attn": 3, "c_attn": 2}, 3),
        ({"c_proj": 2, "c_attn": 3}, 3),
        ({r"^transformer\.h\.\d\.attn\.c_attn": 2}, 2),
        ({r"^h\.0\.attn\.c_attn": 2}, 4),
        ({r"h.\d.attn.c_attn$": 2}, 2),
        ({"h.0": 2}, 4),
        ({".*attn": 2}, 2),
        ({r".*\.(c_attn|c_proj)": 2}, 2),
        ({r"h\.(?:[1-9]|1\d)\..*": 2, r"(\w+\.){2,4}c_attn": 3}, 3),
    ],
)
def test_rank_of_layer_by_pattern(pattern, rank):
    assert adapter_of(rank_pattern=pattern).rank_of("transformer.h.0.attn.c_attn") == rank


def test_scale_of_layer():
    layer = adapter_files.MODULES[0]
    assert adapter_of().scale_of(layer) == 2.0
    assert adapter_of(use_rslora=True).scale_of(layer) == 4.0
    assert adapter_of(alpha_pattern={"c_attn": 6.5}).scale_of(layer) == 1.625
    assert adapter_of(alpha_pattern={"c_attn": 0}).scale_of(layer) == 0.0
    assert adapter_of(rank_pattern={"c_attn": 16}).scale_of(layer) == 0.5
    assert adapter_of(rank_pattern={"c_attn": 16}, use_rslora=True).scale_of(layer) == 2.0
    assert adapter_of(rank_pattern=None, alpha_pattern=None, lora_alpha=-1).scale_of(layer) == -0.25


def test_rank_must_match_pattern(tmp_path):
    assert refusal(adapter_files.write(tmp_path / "a", {"rank_pattern": {"h.1.attn.c_attn": 3}})) == (
        f"a/{WEIGHTS_FILE}: {adapter_files.MODULES[1]} has rank 4, but {CONFIG_FILE} says 3."
    )
    mixed = adapter_files.tensors(4, adapter_files.MODULES[:1]) | adapter_files.tensors(
        3, adapter_files.MODULES[1:]
    )
    adapter = load_adapter_folder(
        adapter_files.write(tmp_path / "b", {"rank_pattern": {"h.1.attn.c_attn": 3}}, mixed)
    )
    assert [adapter.rank_of(module) for module in adapter.modules] == [4, 3]
    assert refusal(adapter_files.write(tmp_path / "c", weights=mixed)) == (
        f"c/{WEIGHTS_FILE}: {adapter_files.MODULES[1]} has rank 3, but {CONFIG_FILE} says 4."
    )


def test_too_many_pattern_keys_are_rejected(tmp_path):
    keys = {f"h.{number}": 4 for number in range(1001)}
    assert refusal(adapter_files.write(tmp_path / "a", {"alpha_pattern": keys})) == (
        f"a/{CONFIG_FILE}: alpha_pattern has 1,001 keys, and at most 1,000 are accepted."
    )


def test_thousand_pattern_keys_are_fast(tmp_path):
    modules = [f"transformer.h.{number}.attn.c_attn" for number in range(20)]
    keys = {f"model.layers.{number}.self_attn.q_proj": 4 for number in range(999)} | {"19.attn.c_attn": 4}
    folder = adapter_files.write(
        tmp_path / "a", {"rank_pattern": keys, "alpha_pattern": keys}, adapter_files.tensors(4, modules)
    )
    start = time.process_time()
    adapter = load_adapter_folder(folder)
    assert [adapter.scale_of(module) for module in modules] == [2.0] * 19 + [1.0]
    assert time.process_time() - start < 3  # 0.5 s; with the function of PEFT it is 5 s


@pytest.mark.parametrize("key", ["\\", "\\8", "(?R)", "(a", "["])
def test_invalid_pattern_key_is_rejected(tmp_path, key):
    assert refusal(adapter_files.write(tmp_path / "a", {"rank_pattern": {key: 4}})) == (
        f"a/{CONFIG_FILE}: rank_pattern has the key {key!r}, {NO_PATTERN}."
    )


def test_slow_pattern_key_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(peft_config, "_MATCH_SECONDS", 0.05)
    weights = adapter_files.tensors(4, ["a" * 200 + "_b"])
    folder = adapter_files.write(tmp_path / "a", {"alpha_pattern": {"((a|aa)+)$": 4}}, weights)
    assert refusal(folder) == (
        f"a/{WEIGHTS_FILE}: the patterns in {CONFIG_FILE} take too long to match: name the layers instead."
    )
