"""Write valid adapter folders with numpy, for tests that then damage one part."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_tuner import atomic_io
from lora_tuner.adapters import adapter
from lora_tuner.adapters.adapter import Adapter
from lora_tuner.adapters.label_info import LabelInfo
from lora_tuner.adapters.manifest import Manifest, WeightsInfo

MODULES = ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn")
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "distilbert/distilgpt2",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["c_attn"],
    "bias": "none",
    "init_lora_weights": True,
    "modules_to_save": None,
}


PREFERENCE: dict[str, Any] = {
    "objective": "dpo",
    "beta": 0.1,
    "reference": "base",
    "rows": 250,
    "groups": 90,
    "accuracy": {
        "base": 0.6,
        "base_error": 0.03,
        "adapter": 0.8,
        "error": 0.025,
        "change": 0.2,
        "change_error": 0.03,
    },
    "margin": {
        "base": 0.1,
        "base_error": 0.04,
        "adapter": 0.4,
        "error": 0.04,
        "change": 0.3,
        "change_error": 0.04,
    },
    "reward_accuracy": 0.85,
    "reward_error": 0.02,
    "shorter": {
        "pairs": 120,
        "accuracy": {
            "base": 0.5,
            "base_error": 0.05,
            "adapter": 0.75,
            "error": 0.05,
            "change": 0.25,
            "change_error": 0.05,
        },
    },
}


def tensors(rank: int = 4, modules: Sequence[str] = MODULES, value: float = 1.0) -> dict[str, Any]:
    return {
        f"base_model.model.{module}.lora_{part}.weight": np.full(shape, value, np.float32)
        for module in modules
        for part, shape in (("A", (rank, 6)), ("B", (18, rank)))
    }


def manifest(**changes: Any) -> Manifest:
    return Manifest.model_validate(
        {
            "created": "2025-01-02T03:04:05+00:00",
            "base": {
                "name": "distilgpt2",
                "repo": "distilbert/distilgpt2",
                "revision": "2290a62682d06624634c1f46a6ad5be0f47f38aa",
                "weights": "distilbert/distilgpt2 on the Hub",
                "fingerprint": "ab" * 32,
                "tokenizer": "cd" * 32,
            },
            "data": {
                "name": "imdb",
                "source": "stanfordnlp/imdb",
                "hash": "ef" * 32,
                "where": [],
                "split_salt": "lora_tuner",
                "counts": {
                    "read": 25_000,
                    "filtered": 12_500,
                    "empty": 0,
                    "duplicates": 98,
                    "not_drawn": 0,
                    "train": 10_000,
                    "held_out": 2_402,
                },
                "held_out_hash": "01" * 32,
                "held_out_rows": 200,
            },
            "run": {
                "steps": 40,
                "kept_step": 30,
                "tokens": 20_480,
                "seconds": 90.5,
                "sequences": 500,
                "truncated_rows": 3,
                "device": "cpu",
                "dtype": "float32",
                "threads": 2,
            },
            "result": {
                "base_loss": 3.75,
                "loss": 3.5,
                "gain": 0.25,
                "standard_error": 0.0125,
                "rows": 200,
                "tokens": 40_000,
            },
            "versions": {"torch": "2.13.0"},
        }
        | changes
    )


def labels(**changes: Any) -> LabelInfo:
    return LabelInfo.model_validate(
        {
            "column": "label",
            "names": ["bad", "good"],
            "counts": [40, 60],
            "template": "{text}\n\nLabel: {label}",
            "max_length": 64,
            "clean": "full",
        }
        | changes
    )


def write(
    folder: Path,
    config: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
    facts: Manifest | None = None,
) -> Path:
    """Write an adapter folder; `config` overrides CONFIG. `facts` becomes the manifest, completed by the weights' hash."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / adapter.CONFIG_FILE).write_text(json.dumps(CONFIG | (config or {})))
    save_file(tensors() if weights is None else weights, folder / adapter.WEIGHTS_FILE)
    if facts is not None:
        size, digest = (
            (folder / adapter.WEIGHTS_FILE).stat().st_size,
            atomic_io.sha256_file(folder / adapter.WEIGHTS_FILE),
        )
        facts = facts.model_copy(
            update={"weights": facts.weights or WeightsInfo(sha256=digest, bytes=size, parameters=192)}
        )
        (folder / adapter.MANIFEST_FILE).write_text(facts.to_json())
    return folder


def write_random(folder: Path, base: Path, modules: Mapping[str, tuple[int, int]], **config: Any) -> Adapter:
    """Write an adapter with random weights. `modules`: layer -> (in, out); a rank of its own has its full
    name in `rank_pattern`."""
    draw, weights = np.random.default_rng(0), {}
    for module, (into, out) in modules.items():
        rank = config.get("rank_pattern", {}).get(module, config.get("r", 4))
        for part, size in (("A", (rank, into)), ("B", (out, rank))):
            weights[f"base_model.model.{module}.lora_{part}.weight"] = draw.normal(size=size).astype(np.float32)
        if config.get("use_dora"):
            weights[f"base_model.model.{module}.lora_magnitude_vector"] = np.ones(out, np.float32)
    targets = sorted({module.rpartition(".")[2] for module in modules})
    settings = {"base_model_name_or_path": str(base), "target_modules": targets} | config
    return adapter.load_adapter_folder(write(folder, settings, weights))


def on_base(adapter_on_other: Adapter, folder: Path, **config: Any) -> Adapter:
    """The adapter with another base, of which only config.json is there."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    path = adapter_on_other.path
    settings = json.loads((path / adapter.CONFIG_FILE).read_text()) | {"base_model_name_or_path": str(folder)}
    (path / adapter.CONFIG_FILE).write_text(json.dumps(settings))
    return adapter.load_adapter_folder(path)


def write_base(folder: Path, *shards: dict[str, tuple[int, ...]]) -> Path:
    """Write a base without a model: one weights file per shard, with tensors of these names and shapes."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    files = {f"model-{number}.safetensors": shard for number, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        save_file({name: np.zeros(shape, np.float32) for name, shape in shard.items()}, folder / file)
    index = {"weight_map": {name: file for file, shard in files.items() for name in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
