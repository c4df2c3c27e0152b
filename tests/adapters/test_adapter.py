import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tuner import atomic_io
from lora_tuner.adapters import peft_config
from lora_tuner.adapters.adapter import (
    CARD_FILE,
    CONFIG_FILE,
    LOSS_PLOT_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
    Adapter,
    _all_finite,
    check_weights_hash,
    load_adapter_folder,
    validate_name,
    verify_adapter,
)
from lora_tuner.adapters.manifest import Manifest, ParentInfo, WeightsInfo, utc_timestamp
from lora_tuner.adapters.peft_config import is_pattern
from lora_tuner.errors import AdapterError

from .. import adapter_files

MODULE = adapter_files.MODULES[0]
A, B = (f"base_model.model.{MODULE}.lora_{part}.weight" for part in "AB")


def refusal(folder):
    """The message of the error, without the folder of the test."""
    with pytest.raises(AdapterError) as error:
        load_adapter_folder(folder)
    return str(error.value).replace(f"{folder.parent}/", "")


# Reading


def test_load_adapter_with_manifest(tmp_path):
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "imdb", facts=adapter_files.manifest()))
    assert (adapter.name, adapter.base, adapter.rank) == ("imdb", "distilgpt2", 4)
    assert adapter.modules == list(adapter_files.MODULES)
    assert adapter.targets == ["c_attn"]
    assert adapter.parameters == 2 * (4 * 6 + 18 * 4)
    assert adapter.bytes == sum((tmp_path / "imdb" / name).stat().st_size for name in (WEIGHTS_FILE, CONFIG_FILE))
    assert adapter.tensors[A] == ("F32", (4, 6))
    facts = json.loads(json.dumps(adapter.to_dict()))
    assert {key: facts[key] for key in ("name", "path", "rank", "alpha", "targets", "parameters", "bytes")} == {
        "name": "imdb",
        "path": str(tmp_path / "imdb"),
        "rank": 4,
        "alpha": 8,
        "targets": ["c_attn"],
        "parameters": 192,
        "bytes": adapter.bytes,
    }
    assert facts["result"]["gain"] == 0.25
    assert facts["weights"]["sha256"] == atomic_io.sha256_file(tmp_path / "imdb" / WEIGHTS_FILE)


def test_name_of_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(adapter_files.write(tmp_path / "imdb"))
    assert load_adapter_folder(Path(".")).name == "imdb"


def test_load_adapter_without_manifest(tmp_path):
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "theirs"))
    assert adapter.manifest is None
    assert adapter.base == "distilbert/distilgpt2"
    assert adapter.to_dict()["base"] == {"name": "distilbert/distilgpt2"}


def test_manifest_round_trip(tmp_path):
    manifest = adapter_files.manifest()
    assert Manifest.model_validate_json(manifest.to_json()) == manifest
    assert load_adapter_folder(
        adapter_files.write(tmp_path / "a", facts=manifest)
    ).manifest == manifest.model_copy(
        update={
            "weights": WeightsInfo(
                sha256=atomic_io.sha256_file(tmp_path / "a" / WEIGHTS_FILE),
                bytes=(tmp_path / "a" / WEIGHTS_FILE).stat().st_size,
                parameters=192,
            )
        }
    )


def test_utc_timestamp_format():
    assert len(utc_timestamp()) == len("2025-01-02T03:04:05+00:00")
    assert utc_timestamp().endswith("+00:00")


def test_load_incomplete_folder_fails(tmp_path):
    assert refusal(tmp_path / "none") == "There is no adapter folder none."
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty") == "empty has no adapter_config.json: it is incomplete or not an adapter."
    folder = adapter_files.write(tmp_path / "half")
    (folder / WEIGHTS_FILE).unlink()
    assert refusal(folder) == "half has no adapter_model.safetensors: it is incomplete or not an adapter."


# Untrusted configs

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


# Weights


def test_truncated_weights_are_rejected(tmp_path):
    folder = adapter_files.write(tmp_path / "a")
    whole = (folder / WEIGHTS_FILE).read_bytes()
    for data in (b"", whole[:5], whole[:300], b"\x80\x04pickle" * 10):
        (folder / WEIGHTS_FILE).write_bytes(data)
        assert refusal(folder) == (
            f"a/{WEIGHTS_FILE}: it is cut off, or no safetensors file. Copy it again from its source."
        )
    (folder / WEIGHTS_FILE).write_bytes(whole[:-1])
    assert refusal(folder) == (
        f"a/{WEIGHTS_FILE}: it is cut off: base_model.model.{adapter_files.MODULES[1]}.lora_B.weight ends beyond the file. "
        "Copy it again from its source."
    )


def test_header_with_false_sizes_is_rejected(tmp_path):
    folder = adapter_files.write(tmp_path / "a")
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 8_000_000_000) + whole[8:])
    assert refusal(folder) == (
        f"a/{WEIGHTS_FILE}: it is cut off, or no safetensors file. Copy it again from its source."
    )
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    header[A]["shape"] = [4, 6_000_000_000]
    head = json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(head)) + head + whole[8 + size :])
    assert refusal(folder) == (f"a/{WEIGHTS_FILE}: its header is wrong about {A}. Copy it again from its source.")


def test_tensor_without_counterpart_is_rejected(tmp_path):
    for missing, letter in ((A, "A"), (B, "B")):
        weights = {name: tensor for name, tensor in adapter_files.tensors().items() if name != missing}
        assert (
            refusal(adapter_files.write(tmp_path / "a", weights=weights))
            == f"a/{WEIGHTS_FILE}: {MODULE} has no lora_{letter}."
        )


def test_tensors_with_different_ranks_are_rejected(tmp_path):
    weights = adapter_files.tensors() | {B: np.ones((18, 5), np.float32)}
    assert refusal(adapter_files.write(tmp_path / "a", weights=weights)) == (
        f"a/{WEIGHTS_FILE}: {MODULE} has shapes (4, 6) and (18, 5), which do not share a rank."
    )
    weights = adapter_files.tensors() | {B: np.ones(18, np.float32)}
    assert refusal(adapter_files.write(tmp_path / "a", weights=weights)) == (
        f"a/{WEIGHTS_FILE}: {MODULE} has shapes (4, 6) and (18,), which do not share a rank."
    )


def test_tensor_rank_must_match_config(tmp_path):
    assert refusal(adapter_files.write(tmp_path / "a", {"r": 8})) == (
        f"a/{WEIGHTS_FILE}: {MODULE} has rank 4, but {CONFIG_FILE} says 8; "
        f"{adapter_files.MODULES[1]} has rank 4, but {CONFIG_FILE} says 8."
    )
    assert (
        load_adapter_folder(adapter_files.write(tmp_path / "a", {"r": 8, "rank_pattern": {"c_attn": 4}})).rank
        == 8
    )


WHOLE = " (whole weights, which PEFT saves for modules_to_save and resized or adapted embeddings; not supported)"


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("head.weight", ""),
        ("base_model.model.lm_head.weight", WHOLE),
        ("base_model.model.score.modules_to_save.weight", WHOLE),
        (f"base_model.model.{MODULE}.weight", ""),
        (f"base_model.model.{MODULE}.bias", " (a trained bias, which is not supported)"),
        (f"base_model.model.{MODULE}.lora_embedding_A", " (LoRA on embeddings, which is not supported)"),
        (
            "base_model.model.wte.token_adapter.trainable_tokens_delta",
            " (of trainable_token_indices, which is not supported)",
        ),
        (
            f"base_model.model.{MODULE}.lora_A.default.weight",
            " (it holds the name of an adapter: save it with PEFT's save_pretrained)",
        ),
        (f"base_model.model.{MODULE}.lora_B.bias", " (of lora_bias, which is not supported)"),
        ("model.layers.0.self_attn.q_proj.lora_a", " (of an adapter of MLX)"),
        ("lora_unet_down_blocks_0.lora_down.weight", " (of a LoRA for image models)"),
        ("lora_unet_down_blocks_0.hada_w1_a", " (of LyCORIS)"),
        ("base_model.model.a/b.lora_A.weight", ""),
        (f"base_model.model.{MODULE}.lora_A.weight\n", ""),
    ],
)
def test_non_lora_tensor_is_rejected(tmp_path, name, origin):
    weights = adapter_files.tensors() | {name: np.ones((4, 6), np.float32)}
    assert (
        refusal(adapter_files.write(tmp_path / "a", weights=weights))
        == f"a/{WEIGHTS_FILE}: {name} is not a LoRA tensor{origin}."
    )


def test_integer_tensors_are_rejected(tmp_path):
    weights = adapter_files.tensors() | {A: np.ones((4, 6), np.int64)}
    assert (
        refusal(adapter_files.write(tmp_path / "a", weights=weights)) == f"a/{WEIGHTS_FILE}: {A} has dtype I64."
    )


def test_error_lists_five_tensors(tmp_path):
    weights = {f"x{number}": np.ones(2, np.float32) for number in range(9)}
    said = "; ".join(f"x{number} is not a LoRA tensor" for number in range(5))
    assert (
        refusal(adapter_files.write(tmp_path / "a", weights=adapter_files.tensors() | weights))
        == f"a/{WEIGHTS_FILE}: {said}."
    )


def test_weights_folder_is_rejected(tmp_path):
    folder = adapter_files.write(tmp_path / "a")
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).mkdir()
    assert refusal(folder) == f"a/{WEIGHTS_FILE}: it is not a file. Copy it again from its source."


def dora(magnitude):
    """Tensors with a magnitude of this shape in each layer."""
    return adapter_files.tensors() | {
        f"base_model.model.{module}.lora_magnitude_vector": np.ones(magnitude, np.float32)
        for module in adapter_files.MODULES
    }


def test_dora_adapter_is_accepted(tmp_path):
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "a", {"use_dora": True}, dora(18)))
    assert adapter.parameters == 2 * (4 * 6 + 18 * 4 + 18)
    assert adapter.modules == list(adapter_files.MODULES)


@pytest.mark.parametrize("use_dora", [False, None])
def test_magnitude_without_dora_is_rejected(tmp_path, use_dora):
    assert refusal(adapter_files.write(tmp_path / "a", {"use_dora": use_dora}, dora(18))) == (
        f"a/{WEIGHTS_FILE}: {MODULE} has a magnitude of shape (18,), but {CONFIG_FILE} says use_dora: false; "
        f"{adapter_files.MODULES[1]} has a magnitude of shape (18,), but {CONFIG_FILE} says use_dora: false."
    )


@pytest.mark.parametrize(
    ("weights", "has"),
    [(adapter_files.tensors(), "None"), (dora(17), "(17,)"), (dora((18, 1)), "(18, 1)"), (dora(6), "(6,)")],
)
def test_dora_wrong_magnitude_is_rejected(tmp_path, weights, has):
    assert refusal(adapter_files.write(tmp_path / "a", {"use_dora": True}, weights)) == (
        f"a/{WEIGHTS_FILE}: {MODULE} has a magnitude of shape {has}, but {CONFIG_FILE} says use_dora: true; "
        f"{adapter_files.MODULES[1]} has a magnitude of shape {has}, but {CONFIG_FILE} says use_dora: true."
    )


def test_magnitude_without_matrices_is_rejected(tmp_path):
    weights = {f"base_model.model.{MODULE}.lora_magnitude_vector": np.ones(18, np.float32)}
    assert (
        refusal(adapter_files.write(tmp_path / "a", {"use_dora": True}, weights))
        == f"a/{WEIGHTS_FILE}: {MODULE} has no lora_A."
    )


def test_empty_weights_are_rejected(tmp_path):
    assert (
        refusal(adapter_files.write(tmp_path / "a", weights={})) == f"a/{WEIGHTS_FILE}: it has no LoRA tensors."
    )


# Ranks and scales


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


def test_verify_detects_edited_config(tmp_path):
    folder = adapter_files.write(tmp_path / "a", facts=adapter_files.manifest(run=None))
    assert verify_adapter(load_adapter_folder(folder)) == []
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["weights"]["config"] = atomic_io.sha256_file(folder / CONFIG_FILE)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert verify_adapter(load_adapter_folder(folder)) == []
    (folder / CONFIG_FILE).write_text(
        (folder / CONFIG_FILE).read_text().replace('"lora_alpha": 8', '"lora_alpha": 800')
    )
    assert verify_adapter(load_adapter_folder(folder)) == [
        f"{CONFIG_FILE} does not match its hash in {MANIFEST_FILE}"
    ]


@pytest.mark.parametrize("digest", ["../../secret", "/etc/passwd", "AB" * 32, "ab" * 31])
def test_manifest_invalid_hash_is_rejected(tmp_path, digest):
    """The hash becomes a file name in the cache."""
    folder = adapter_files.write(tmp_path / "a", facts=adapter_files.manifest())
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["data"]["held_out_hash"] = digest
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert refusal(folder).startswith(f"a/{MANIFEST_FILE}: data.held_out_hash: String should match pattern")


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_manifest_non_finite_number_is_rejected(tmp_path, figure):
    folder = adapter_files.write(tmp_path / "a", facts=adapter_files.manifest())
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["result"]["gain"] = figure
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert refusal(folder) == f"a/{MANIFEST_FILE}: result.gain: Input should be a finite number."


def test_name_of_symlink(tmp_path):
    (tmp_path / "noir").symlink_to(adapter_files.write(tmp_path / "v3"))
    assert load_adapter_folder(tmp_path / "noir").name == "noir"


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


# Shapes of the base


def test_check_shapes_accepts_matching_base(tmp_path):
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "a"))
    assert adapter.layer_size(MODULE) == (6, 18)
    adapter.check_shapes(dict.fromkeys(adapter_files.MODULES, (6, 18)) | {"another": (1, 1)})


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({adapter_files.MODULES[0]: (6, 18)}, f"the base has no linear layer {adapter_files.MODULES[1]}"),
        (
            {adapter_files.MODULES[0]: (6, 18), adapter_files.MODULES[1]: (18, 6)},
            f"{adapter_files.MODULES[1]} is 18 -> 6 in the base, 6 -> 18 in the adapter",
        ),
        (
            {adapter_files.MODULES[1]: (768, 2304)},
            f"the base has no linear layer {adapter_files.MODULES[0]}; "
            f"{adapter_files.MODULES[1]} is 768 -> 2304 in the base, 6 -> 18 in the adapter",
        ),
    ],
)
def test_check_shapes_rejects_other_base(tmp_path, sizes, why):
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "a"))
    with pytest.raises(AdapterError) as error:
        adapter.check_shapes(sizes)
    assert str(error.value) == f"{adapter.path} does not fit the base: {why}."


@pytest.mark.parametrize(("count", "more"), [(3, ""), (4, ", and 1 more"), (9, ", and 6 more")])
def test_check_shapes_lists_three_layers(tmp_path, count, more):
    modules = [f"h.{number}.c_attn" for number in range(count)]
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "a", weights=adapter_files.tensors(4, modules)))
    with pytest.raises(AdapterError) as error:
        adapter.check_shapes({})
    first = "; ".join(f"the base has no linear layer {module}" for module in modules[:3])
    assert str(error.value) == f"{adapter.path} does not fit the base: {first}{more}."


# Manifests


def test_old_manifest_without_parents_loads(tmp_path):
    folder = adapter_files.write(tmp_path / "a", facts=adapter_files.manifest())
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    del manifest["parents"], manifest["data"]["eval_dataset"]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    adapter = load_adapter_folder(folder)
    assert adapter.manifest.parents == []
    assert adapter.manifest.data.eval_dataset is None
    assert adapter.manifest.result.gain == 0.25
    assert adapter.parent_info() == ParentInfo(name="a", sha256=atomic_io.sha256_file(folder / WEIGHTS_FILE))


def test_sha256_comes_from_manifest(tmp_path):
    known = WeightsInfo(sha256="ab" * 32, bytes=1, parameters=1)
    assert (
        load_adapter_folder(
            adapter_files.write(tmp_path / "a", facts=adapter_files.manifest(weights=known))
        ).sha256
        == "ab" * 32
    )
    bare = adapter_files.write(tmp_path / "b")
    assert load_adapter_folder(bare).sha256 == atomic_io.sha256_file(bare / WEIGHTS_FILE)


def test_parent_info_includes_ancestors(tmp_path):
    bare = load_adapter_folder(adapter_files.write(tmp_path / "bare"))
    assert bare.parent_info() == ParentInfo(
        name="bare", sha256=atomic_io.sha256_file(tmp_path / "bare" / WEIGHTS_FILE)
    )
    child = load_adapter_folder(
        adapter_files.write(tmp_path / "child", facts=adapter_files.manifest(parents=[bare.parent_info()]))
    )
    assert child.parent_info().parents == [bare.parent_info()]
    assert json.loads(json.dumps(child.to_dict()))["parents"] == [
        {"name": "bare", "sha256": bare.sha256, "parents": []}
    ]


@pytest.mark.parametrize(
    "parent", [{"name": "a"}, {"name": "a", "sha256": 1}, {"name": "a", "sha256": "b" * 64, "age": 3}]
)
def test_manifest_invalid_parents_are_rejected(tmp_path, parent):
    folder = adapter_files.write(tmp_path / "a", facts=adapter_files.manifest())
    manifest = json.loads((folder / MANIFEST_FILE).read_text()) | {
        "parents": [{"name": "x", "sha256": "c" * 64, "parents": [parent]}]
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert refusal(folder).startswith(f"a/{MANIFEST_FILE}: parents.0.parents.0.")


def test_manifest_error_lists_all_problems(tmp_path):
    folder = adapter_files.write(tmp_path / "a", facts=adapter_files.manifest())
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    del manifest["base"]["fingerprint"]
    manifest |= {"schema_version": 3, "extra": 1}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert refusal(folder) == (
        f"a/{MANIFEST_FILE}: schema_version: Input should be less than or equal to 2; base.fingerprint: Field required; "
        "extra: Extra inputs are not permitted."
    )
    (folder / MANIFEST_FILE).write_text("[]")
    assert (
        refusal(folder)
        == f"a/{MANIFEST_FILE}: manifest: Input should be a valid dictionary or instance of Manifest."
    )
    (folder / MANIFEST_FILE).write_text("")
    assert (
        refusal(folder)
        == f"a/{MANIFEST_FILE} is not readable as JSON: Expecting value: line 1 column 1 (char 0)."
    )
    (folder / MANIFEST_FILE).write_text(" " * 10_000_001)
    assert refusal(folder) == f"a/{MANIFEST_FILE} is too large: at most 1,000,000 bytes are read."


@pytest.mark.parametrize("name", ["a", "Imdb-2_x", "a" * 64])
def test_validate_name_accepts_valid_names(name):
    assert validate_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "2x",
        "-a",
        "_a",
        ".a",
        "..",
        "a.b",
        "a/b",
        "../a",
        "/tmp/a",
        "a\\b",
        "a b",
        "a\n",
        "a\0",
        "é",
        "a" * 65,
    ],
)
def test_validate_name_rejects_invalid_names(name):
    with pytest.raises(AdapterError) as error:
        validate_name(name)
    assert str(error.value) == (
        f"'{name}' is not a valid adapter name: use a letter, then up to 63 letters, digits, '-' or '_'; names of "
        "Windows devices are reserved."
    )


# Start-up


def test_adapter_never_imports_torch(tmp_path):
    adapter_files.write(tmp_path / "imdb", facts=adapter_files.manifest())
    program = """
import sys
from pathlib import Path
from lora_tuner.adapters.adapter import load_adapter_folder
adapter = load_adapter_folder(Path(sys.argv[1]))
adapter.to_dict(), adapter.modules, adapter.scale_of(adapter.modules[0]), adapter.parent_info(), adapter.sha256
print(*sorted({module.partition(".")[0] for module in sys.modules}))
"""
    command = [sys.executable, "-c", program, tmp_path / "imdb"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "pydantic" in loaded
    assert not loaded & {"torch", "transformers", "peft", "datasets", "numpy", "safetensors", "accelerate"}


# Verification


@pytest.fixture
def complete(tmp_path):
    folder = adapter_files.write(tmp_path / "imdb", facts=adapter_files.manifest())
    for name in (
        RUN_FILE,
        METRICS_FILE,
        LOSS_PLOT_FILE,
        CARD_FILE,
    ):
        (folder / name).write_text("")
    return folder


def test_verify_intact_adapter(complete):
    assert verify_adapter(load_adapter_folder(complete)) == []


def test_verify_detects_changed_weights(complete):
    data = bytearray((complete / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (complete / WEIGHTS_FILE).write_bytes(data)
    assert verify_adapter(load_adapter_folder(complete)) == [
        f"{WEIGHTS_FILE} does not match its hash in {MANIFEST_FILE}"
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_verify_detects_non_finite_values(tmp_path, value, kind):
    weights = {name: tensor.astype(kind) for name, tensor in adapter_files.tensors().items()}
    name = sorted(weights)[1]
    weights[name][0, 0] = value
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "a", weights=weights))
    assert verify_adapter(adapter) == [f"{name} has values that are not finite"]


@pytest.mark.parametrize(
    ("bits", "finite"), [(0x7F80, False), (0xFF80, False), (0x7FC0, False), (0x7F7F, True), (0, True)]
)
def test_verify_checks_bfloat16(bits, finite):
    assert _all_finite(np.array([0, bits], np.uint16).tobytes(), "BF16") is finite


@pytest.mark.parametrize(("end", "why"), [(-1, "it is cut off: "), (20, "it is cut off, or no safetensors file")])
def test_verify_detects_truncated_weights(complete, end, why):
    adapter = load_adapter_folder(complete)
    (complete / WEIGHTS_FILE).write_bytes((complete / WEIGHTS_FILE).read_bytes()[:end])
    assert verify_adapter(adapter)[0].startswith(f"{WEIGHTS_FILE} cannot be read: {why}")


def test_verify_detects_deleted_weights(complete):
    adapter = load_adapter_folder(complete)
    (complete / WEIGHTS_FILE).unlink()
    with pytest.raises(
        AdapterError, match=f"{complete} is damaged: {WEIGHTS_FILE} cannot be read: .*No such file"
    ):
        check_weights_hash(adapter)


def test_verify_lists_missing_files(complete):
    (complete / RUN_FILE).unlink()
    assert verify_adapter(load_adapter_folder(complete)) == ["run.yaml is missing"]
    for name in (METRICS_FILE, LOSS_PLOT_FILE, CARD_FILE):
        (complete / name).unlink()
    assert verify_adapter(load_adapter_folder(complete)) == [
        f"{name} is missing" for name in ("run.yaml", "metrics.jsonl", "loss.png", "README.md")
    ]


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
