"""Hostile adapters: an intact one, and ways to damage it, listed by hand or random."""

import contextlib
import json
import math
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lora_tuner import atomic_io
from lora_tuner.adapters.adapter import (
    CARD_FILE,
    CONFIG_FILE,
    LOSS_PLOT_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
)
from lora_tuner.adapters.manifest import Manifest, WeightsInfo
from lora_tuner.models.resolve import find_base

from .. import adapter_files

NAME = "x"
MODULE, OTHER = adapter_files.MODULES
A, B = (f"base_model.model.{MODULE}.lora_{part}.weight" for part in "AB")
ESCAPE = "\x1b[2J\x1b]0;taken\x07\x9b31m"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 12345\n"
HTML = "<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>"


def write_good(folder: Path, base: Path) -> Path:
    """Write an intact adapter for a tiny GPT-2, with all files of a trained one."""
    return write_on(folder, base)


def write_on(
    folder: Path,
    base: Path,
    tokenizer: str | None = None,
    module: str = "transformer.h.{}.attn.c_attn",
    out: int = 96,
) -> Path:
    """Write an adapter whose manifest names the base, on one layer (32 -> `out`) of two blocks."""
    draw = np.random.default_rng(0)
    blocks = min(2, json.loads((base / "config.json").read_text()).get("n_layer", 2))
    width = 64 if "wide" in base.name else 32
    tensors = {
        f"base_model.model.{module.format(block)}.lora_{part}.weight": draw.normal(0, 0.1, shape).astype(
            np.float32
        )
        for block in range(blocks)
        for part, shape in (("A", (4, width)), ("B", (out * width // 32, 4)))
    }
    facts = adapter_files.manifest(base=find_base(str(base)).base_info(tokenizer))
    adapter_files.write(folder, {"base_model_name_or_path": str(base)}, tensors, facts)
    (folder / RUN_FILE).write_text("base: gpt2\nrank: 4\n")
    for name in (METRICS_FILE, LOSS_PLOT_FILE, CARD_FILE):
        (folder / name).write_text("nothing to see\n")
    return folder


Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class HostileAdapter:
    """A way to damage an adapter.

    Args:
        spoil: damages the folder.
        rejected_by: `all` commands; those that read `weights`; those that load it on a `base`; `push`; or `none`.
        why: part of the error message.
    """

    spoil: Spoil
    rejected_by: str
    why: str = ""


def replace(name: str, content: bytes | str, folder: Path) -> None:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def delete(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def link(name: str, to: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return spoil


def pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def bare(spoil: Spoil) -> Spoil:
    """The same without a manifest, which would detect any change."""

    def both(folder: Path) -> None:
        (folder / MANIFEST_FILE).unlink()
        spoil(folder)

    return both


def config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        old = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(old | changes))

    return bare(spoil)


def raw_config(text: str) -> Spoil:
    return bare(partial(replace, CONFIG_FILE, text))


def manifest(**changes: Any) -> Spoil:
    """Change fields of the manifest; `a__b` is field b of a."""

    def spoil(folder: Path) -> None:
        facts = json.loads((folder / MANIFEST_FILE).read_text())
        for key, value in changes.items():
            *above, last = key.split("__")
            section = facts
            for part in above:
                section = section[part]
            section[last] = value
        (folder / MANIFEST_FILE).write_text(json.dumps(facts))

    return spoil


def tensors(change: Callable[[dict[str, Any]], Any], known: bool = False) -> Spoil:
    """Change the tensors; with `known`, update the manifest to match."""

    def spoil(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS_FILE)
        weights = change(weights) or weights
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
        if known:
            vouch(folder)
        else:
            (folder / MANIFEST_FILE).unlink()

    return spoil


def vouch(folder: Path) -> None:
    """Update the hashes in the manifest."""
    facts = Manifest.model_validate_json((folder / MANIFEST_FILE).read_text())
    weights = WeightsInfo(
        sha256=atomic_io.sha256_file(folder / WEIGHTS_FILE),
        bytes=(folder / WEIGHTS_FILE).stat().st_size,
        parameters=1,
    )
    (folder / MANIFEST_FILE).write_text(facts.model_copy(update={"weights": weights}).to_json())


def header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Change the header and keep the data."""

    def spoil(folder: Path) -> None:
        data = (folder / WEIGHTS_FILE).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        entries = json.loads(data[8 : 8 + size])
        new = change(entries) or entries
        head = new if isinstance(new, bytes) else json.dumps(new).encode()
        (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(head)) + head + data[8 + size :])

    return bare(spoil)


def put(**entry: Any) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights[A].update(entry)


def sparse(size: int, head: int) -> Spoil:
    """A sparse file of this size whose header has `head` zero bytes."""

    def spoil(folder: Path) -> None:
        with (folder / WEIGHTS_FILE).open("wb") as file:
            file.write(struct.pack("<Q", head))
            file.truncate(size)

    return bare(spoil)


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.__setitem__(new, weights.pop(old))


def cast(kind: Any, factor: float = 1.0) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda weights: {
        name: (tensor.astype(np.float64) * factor).astype(kind) for name, tensor in weights.items()
    }


def one_number(value: float) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights[A].__setitem__((0, 0), value)


class _Bomb:
    """Creates a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("it-ran",)


def pickled(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS_FILE).unlink()
        (folder / name).write_bytes(pickle.dumps(_Bomb()))

    return bare(spoil)


def nest(depth: int) -> str:
    return "[" * depth + "]" * depth


def ancestry(depth: int) -> list[dict[str, Any]]:
    parents: list[dict[str, Any]] = []
    for _ in range(depth):
        parents = [{"name": "p", "sha256": "ab" * 32, "parents": parents}]
    return parents


def many_layers(count: int, keys: int, length: int) -> Spoil:
    """Many layers with long names, and many pattern keys."""

    def spoil(folder: Path) -> None:
        modules = [f"{'a.' * length}h.{number}.attn.c_attn" for number in range(count)]
        small = {
            f"base_model.model.{module}.lora_{part}.weight": np.zeros((1, 1), np.float32)
            for module in modules
            for part in "AB"
        }
        pattern = {"." * (length + 6) + f"{number}": 1 for number in range(keys)}
        adapter_files.write(folder, {"r": 1, "rank_pattern": pattern, "alpha_pattern": pattern}, small)

    return bare(spoil)


def slow_pattern(setting: str, key: str) -> Spoil:
    """A pattern that takes years on the name of the only layer."""
    tensors = adapter_files.tensors(4, ["a" * 200 + "_"])
    return bare(lambda folder: adapter_files.write(folder, {setting: {key: 4}}, tensors))


def huge_json(unit: str, size: int) -> str:
    return '{"r": [' + ",".join([unit] * (size // (len(unit) + 1))) + "]}"


def growing_yaml() -> str:
    """YAML in which each line contains the previous one nine times."""
    lines = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9)]
    return "\n".join(["a0: &a0 {x: 1}", *lines])


NO_PATTERN = "neither a layer name nor a usable pattern"
NO_LORA = "is not a LoRA tensor"
CUT_OFF = "it is cut off, or no safetensors file"
NOT_JSON = "is not readable as JSON"
HEADER = "its header"
LARGE = "not finite|no finite loss|The loss is nan|out of the range"

BY_HAND: dict[str, HostileAdapter] = {
    # Files
    "empty weights": HostileAdapter(partial(replace, WEIGHTS_FILE, b""), "all", CUT_OFF),
    "weights cut off": HostileAdapter(lambda it: os.truncate(it / WEIGHTS_FILE, 2000), "all", "cut off"),
    "HTML as weights": HostileAdapter(partial(replace, WEIGHTS_FILE, HTML), "all", CUT_OFF),
    "LFS pointer as weights": HostileAdapter(partial(replace, WEIGHTS_FILE, LFS), "all", "git lfs pull"),
    "empty config": HostileAdapter(partial(replace, CONFIG_FILE, b""), "all", NOT_JSON),
    "HTML as a config": HostileAdapter(partial(replace, CONFIG_FILE, HTML), "all", NOT_JSON),
    "LFS pointer as a config": HostileAdapter(partial(replace, CONFIG_FILE, LFS), "all", "git lfs pull"),
    "LFS pointer as a manifest": HostileAdapter(partial(replace, MANIFEST_FILE, LFS), "all", "git lfs pull"),
    "no weights": HostileAdapter(delete(WEIGHTS_FILE), "all", f"has no {WEIGHTS_FILE}"),
    "no config": HostileAdapter(delete(CONFIG_FILE), "all", f"has no {CONFIG_FILE}"),
    "an empty folder": HostileAdapter(
        delete(CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE, RUN_FILE, METRICS_FILE, LOSS_PLOT_FILE, CARD_FILE), "all", "has no"
    ),
    # Pickles
    "pickled": HostileAdapter(pickled("adapter_model.bin"), "all", "pickled weights"),
    "pickle named safetensors": HostileAdapter(pickled(WEIGHTS_FILE), "all", CUT_OFF),
    # Tensors
    "a tensor renamed": HostileAdapter(tensors(rename(A, "base_model.model.lora_A")), "all", NO_LORA),
    "a tensor missing": HostileAdapter(
        tensors(lambda weights: {n: it for n, it in weights.items() if n != A}), "all", "has no lora_A"
    ),
    "half of the tensors": HostileAdapter(
        tensors(lambda weights: {name: it for name, it in weights.items() if MODULE in name}, known=True), "none"
    ),
    "extra tensor": HostileAdapter(tensors(lambda weights: {**weights, "lm_head.weight": weights[A]}), "all", NO_LORA),
    "an embedding": HostileAdapter(
        tensors(rename(A, "base_model.model.transformer.wte.lora_embedding_A")), "all", NO_LORA
    ),
    "the head": HostileAdapter(
        tensors(lambda weights: {name.replace(MODULE, "lm_head"): it for name, it in weights.items()}), "base", "lm_head"
    ),
    "tensor name with ..": HostileAdapter(tensors(rename(A, f"../../{A}")), "all", NO_LORA),
    "a tensor with a path": HostileAdapter(tensors(rename(A, "/etc/passwd")), "all", NO_LORA),
    "control characters in tensor name": HostileAdapter(tensors(rename(A, ESCAPE)), "all", NO_LORA),
    "nan": HostileAdapter(tensors(one_number(math.nan), known=True), "weights", "not finite"),
    "infinity": HostileAdapter(tensors(one_number(-math.inf)), "weights", "not finite"),
    "another shape": HostileAdapter(tensors(lambda weights: {n: it[:, :-1] for n, it in weights.items()}), "all", "share a rank"),
    "other layer sizes": HostileAdapter(
        tensors(lambda weights: {n: it[:, :-1] if n[-8] == "A" else it for n, it in weights.items()}), "base", "31 -> 96"
    ),
    "transposed tensors": HostileAdapter(
        tensors(lambda weights: {n: it.T for n, it in weights.items()}), "all", "share a rank"
    ),
    "integer tensors": HostileAdapter(tensors(cast(np.int32)), "all", "has dtype I32"),
    "nothing": HostileAdapter(tensors(lambda weights: {"empty": np.zeros(0, np.float32)}), "all", NO_LORA),
    "large numbers": HostileAdapter(tensors(cast(np.float32, 1e37)), "base", LARGE),
    "float64 overflow": HostileAdapter(tensors(cast(np.float64, 1e300)), "base", LARGE),
    # Headers
    "gigabyte header": HostileAdapter(header(lambda _: None) and sparse(100, 1 << 40), "all", CUT_OFF),
    "huge header size": HostileAdapter(sparse(100, (1 << 64) - 1), "all", CUT_OFF),
    "a header of zeros": HostileAdapter(sparse(95_000_000, 94_000_000), "all", "its header has 94,000,000 bytes"),
    "a header of dictionaries": HostileAdapter(
        header(lambda _: huge_json('{"":0}', 30_000_000).encode()), "all", "its header has"
    ),
    "a deep header": HostileAdapter(header(lambda _: nest(1_000_000).encode()), "all", HEADER),
    "gigabyte shape": HostileAdapter(header(put(shape=[4, 10**10])), "all", "wrong about"),
    "huge shape": HostileAdapter(header(put(shape=[4, 10**4000])), "all", HEADER),
    "a negative shape": HostileAdapter(header(put(shape=[-4, -32])), "all", HEADER),
    "fractional shape": HostileAdapter(header(put(shape=[4.0, 32.0])), "all", HEADER),
    "offsets that overlap": HostileAdapter(header(put(data_offsets=[512, 1024])), "all", "wrong about"),
    "offsets beyond": HostileAdapter(header(put(data_offsets=[0, 10**15])), "all", "beyond the file"),
    "unknown dtype": HostileAdapter(header(put(dtype="F4096")), "all", "has dtype F4096"),
    "control characters in dtype": HostileAdapter(header(put(dtype=ESCAPE)), "all", "has dtype"),
    "numeric metadata": HostileAdapter(header(lambda entries: {"__metadata__": {"a": 1}, **entries}), "all", HEADER),
    "NaN metadata": HostileAdapter(header(lambda entries: {"__metadata__": {"a": math.nan}, **entries}), "all", HEADER),
    "a header in utf-16": HostileAdapter(header(lambda it: json.dumps(it).encode("utf-16")), "all", HEADER),
    "a header after a space": HostileAdapter(header(lambda it: b" " + json.dumps(it).encode()), "all", HEADER),
    "a tensor twice": HostileAdapter(
        header(lambda it: json.dumps(it).replace("}}", f'}}, "{A}": {json.dumps(it[A])}}}').encode()), "all", HEADER
    ),
    # Configs
    "a config of a list": HostileAdapter(raw_config("[]"), "all", "not a JSON object"),
    "a deep config": HostileAdapter(raw_config('{"r": ' + nest(100_000) + "}"), "all", NOT_JSON),
    "a large config": HostileAdapter(raw_config(" " * 20_000_000), "all", "too large"),
    "a config of dictionaries": HostileAdapter(raw_config(huge_json('{"":0}', 9_000_000)), "all", "too large"),
    "a config of bytes": HostileAdapter(partial(replace, CONFIG_FILE, bytes(range(256))), "all", NOT_JSON),
    **{
        f"a config {depth} deep": HostileAdapter(raw_config('{"r": ' + nest(depth) + "}"), "all", CONFIG_FILE)
        for depth in (300, 500, 700, 800, 900, 950)
    },
    "control characters in config": HostileAdapter(config(**{ESCAPE: ESCAPE, "r": ESCAPE}), "all", "is set"),
    "lone surrogate": HostileAdapter(config(**{"\ud800": 1}), "all", NOT_JSON),
    "a long config": HostileAdapter(config(task_type="b" * 900_000), "all", "task_type is"),
    "many unknown settings": HostileAdapter(config(**{f"k{n}": n for n in range(50_000)}), "all", "is set"),
    "rank as text": HostileAdapter(config(r="four"), "all", "r is"),
    "rank of millions": HostileAdapter(config(r=4_000_000), "all", "a rank is"),
    "rank of 4000 digits": HostileAdapter(config(r=10**4000), "all", "a rank is"),
    "another rank": HostileAdapter(config(r=4096), "all", "says 4096"),
    "huge alpha": HostileAdapter(config(lora_alpha=1e300), "all", "an alpha is"),
    "NaN alpha": HostileAdapter(config(lora_alpha=math.nan), "all", "an alpha is"),
    "pissa": HostileAdapter(config(init_lora_weights="pissa"), "all", "init_lora_weights"),
    "pissa_niter_4": HostileAdapter(config(init_lora_weights="pissa_niter_4"), "all", "init_lora_weights"),
    "olora": HostileAdapter(config(init_lora_weights="olora"), "all", "init_lora_weights"),
    "corda": HostileAdapter(config(init_lora_weights="corda"), "all", "init_lora_weights"),
    "loftq": HostileAdapter(config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "all", "init_lora_weights"),
    "modules_to_save": HostileAdapter(config(modules_to_save=["lm_head"]), "none"),
    "layer replication": HostileAdapter(config(layer_replication=[[0, 2], [0, 2]]), "all", "layer_replication"),
    "settings without tensors": HostileAdapter(config(bias="all", trainable_token_indices=[0]), "none"),
    "code": HostileAdapter(config(auto_mapping={"base_model_class": "X", "parent_library": "os"}), "none"),
    "custom modules": HostileAdapter(config(_custom_modules={"a": "b"}), "all", "_custom_modules"),
    "another library": HostileAdapter(config(megatron_core="os.system"), "all", "megatron_core"),
    "another kind": HostileAdapter(config(peft_type="ADALORA"), "all", "peft_type"),
    "another task": HostileAdapter(config(task_type="SEQ_CLS"), "all", "task_type"),
    "catastrophic rank pattern": HostileAdapter(slow_pattern("rank_pattern", "((a|aa)+)$"), "all", "too long to match"),
    "catastrophic alpha pattern": HostileAdapter(slow_pattern("alpha_pattern", "(a?){60}(a|a)+$"), "all", "too long to match"),
    "repetition without match": HostileAdapter(config(rank_pattern={"(a+)+b$": 4}), "none"),
    "huge repetition": HostileAdapter(config(rank_pattern={"((a{99999}){99999}){99999}": 4}), "all", NO_PATTERN),
    "invalid alpha pattern": HostileAdapter(config(alpha_pattern={"(": 4}), "all", NO_PATTERN),
    "a long pattern": HostileAdapter(config(rank_pattern={"." * 500_000: 4}), "all", NO_PATTERN),
    "many patterns": HostileAdapter(config(alpha_pattern={f"h.{n}": 1 for n in range(2_000)}), "all", "2,000 keys"),
    "catastrophic target pattern": HostileAdapter(config(target_modules="(.*.*)*(a+)+$"), "none"),
    "other targets": HostileAdapter(config(target_modules=["../x", ESCAPE, "lm_head"]), "none"),
    "many layers": HostileAdapter(many_layers(2_000, 1_000, 1), "all", "too many for the 1,000 pattern keys"),
    "100 layers": HostileAdapter(many_layers(100, 1_000, 1), "base", "a.h.0.attn.c_attn"),
    "long names": HostileAdapter(many_layers(40, 0, 200), "all", NO_LORA),
    # Manifests
    "manifest as list": HostileAdapter(partial(replace, MANIFEST_FILE, "[]"), "all", MANIFEST_FILE),
    "a deep manifest": HostileAdapter(partial(replace, MANIFEST_FILE, nest(100_000)), "all", NOT_JSON),
    "a large manifest": HostileAdapter(partial(replace, MANIFEST_FILE, huge_json("[]", 9_000_000)), "all", "too large"),
    "newer manifest schema": HostileAdapter(manifest(schema_version=99), "all", "schema_version"),
    "lone surrogate in a manifest": HostileAdapter(manifest(**{"\ud800": "\ud800"}), "all", MANIFEST_FILE),
    "lone surrogate in a name": HostileAdapter(manifest(base__name="\ud800"), "all", MANIFEST_FILE),
    "many unknown manifest fields": HostileAdapter(manifest(**{f"k{n}": n for n in range(30_000)}), "all", MANIFEST_FILE),
    "held-out hash with ..": HostileAdapter(manifest(data__held_out_hash="../../../etc/passwd"), "all", "held_out_hash"),
    "NaN in result": HostileAdapter(manifest(result__loss=math.nan), "all", "finite"),
    "other weights": HostileAdapter(manifest(weights__sha256="ab" * 32), "weights", "does not match its hash"),
    "another config": HostileAdapter(manifest(weights__config="ab" * 32), "weights", "does not match its hash"),
    "300 generations of parents": HostileAdapter(manifest(parents=ancestry(300)), "all", MANIFEST_FILE),
    **{f"{depth} ancestors": HostileAdapter(manifest(parents=ancestry(depth)), "some") for depth in (100, 200, 240, 250, 252)},
    "control characters in manifest": HostileAdapter(
        manifest(
            created=ESCAPE,
            made_by=ESCAPE,
            base__name=f"{ESCAPE}\nError: gone",
            base__weights=ESCAPE,
            base__revision=ESCAPE,
            data__name=ESCAPE,
            data__source=ESCAPE,
            data__where=[ESCAPE],
            data__eval_dataset=ESCAPE,
            data__counts={ESCAPE: 1},
            versions={ESCAPE: ESCAPE},
            parents=[{"name": ESCAPE, "sha256": "ab" * 32}],
        ),
        "none",
    ),
    "long manifest values": HostileAdapter(manifest(data__name="n" * 300_000, base__weights="w " * 150_000), "none"),
    "many counts": HostileAdapter(manifest(data__counts={f"c{n}": n for n in range(30_000)}), "none"),
    "huge numbers in manifest": HostileAdapter(
        manifest(result__loss=1e308, result__base_loss=-1e308, run__steps=10**4000), "none"
    ),
    "manifest with ..": HostileAdapter(
        manifest(data__name="../../x", data__source="/etc/passwd", parents=[{"name": "../../x", "sha256": "ab" * 32}]),
        "none",
    ),
    # Special files
    **{
        f"{name} is {what}": HostileAdapter(spoil, "all", f"{name}")
        for name in (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE)
        for what, spoil in (
            ("endless", link(name, "/dev/zero")),
            ("a pipe", pipe(name)),
            ("a link to a pipe", lambda it, name=name: os.mkfifo(it / "p") or link(name, "p")(it)),
            ("a loop", link(name, name)),
            ("a link to nothing", link(name, "nowhere")),
            ("a folder", lambda it, name=name: (it / name).unlink() or (it / name).mkdir()),
            ("a link to a folder", link(name, "/etc")),
            ("a link to /etc/passwd", link(name, "/etc/passwd")),
        )
    },
    **{
        f"{name} is a pipe": HostileAdapter(pipe(name), "push", name)
        for name in (METRICS_FILE, LOSS_PLOT_FILE, RUN_FILE, CARD_FILE)
    },
    # Files that push reads
    "yaml with code": HostileAdapter(partial(replace, RUN_FILE, "!!python/object/apply:os.mkdir [it-ran]"), "push", RUN_FILE),
    "yaml that grows": HostileAdapter(partial(replace, RUN_FILE, growing_yaml()), "push", RUN_FILE),
    "deep yaml": HostileAdapter(partial(replace, RUN_FILE, nest(5_000)), "push", RUN_FILE),
}  # fmt: skip


# Random damage

_STRINGS = [
    "",
    "../x",
    "/etc/passwd",
    ESCAPE,
    "\ud800",
    "\0",
    "x" * 5_000,
    "nan",
    "__import__('os')",
    "(a+)+$",
    "pissa",
]
_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    4,
    2**31,
    2**63,
    10**30,
    0.5,
    -1e300,
    math.nan,
    math.inf,
    [],
    {},
    [[]],
]


def _random_value(draw: random.Random) -> Any:
    kind = draw.randrange(5)
    if kind < 2:
        return draw.choice(_VALUES)
    if kind == 2:
        return draw.choice(_STRINGS)
    return (
        [_random_value(draw) for _ in range(draw.randrange(3))]
        if kind == 3
        else {draw.choice(_STRINGS): _random_value(draw)}
    )


def _spoil_json(draw: random.Random, data: Any) -> Any:
    """Change one random value, key or entry."""
    if isinstance(data, dict | list) and data and draw.random() < 0.8:
        key = draw.choice(list(data) if isinstance(data, dict) else range(len(data)))
        choice = draw.random()
        if choice < 0.15:
            del data[key]
        elif choice < 0.3 and isinstance(data, dict):
            data[draw.choice(_STRINGS)] = data.pop(key)
        elif choice < 0.4 and isinstance(data, dict):
            data[draw.choice([*_STRINGS, "some_day"])] = _random_value(draw)
        else:
            data[key] = _spoil_json(draw, data[key])
        return data
    return _random_value(draw)


def _spoil_bytes(draw: random.Random, data: bytes) -> bytes:
    position, length = draw.randrange(len(data)), draw.choice([1, 1, 1, 8, 64, 512])
    junk = draw.choice([draw.randbytes(length), bytes(length), b"\xff" * length, data[:length]])
    change = draw.randrange(4)
    if change == 0:
        return data[:position]
    if change == 1:
        return data[:position] + junk + data[position:]
    return data[:position] + junk[: len(data) - position] + data[position + length :]


def _spoil_header(draw: random.Random, data: bytes) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    if draw.random() < 0.5:
        head = json.dumps(_spoil_json(draw, json.loads(data[8 : 8 + size]))).encode()
    else:
        head = _spoil_bytes(draw, data[8 : 8 + size])
    return struct.pack("<Q", len(head)) + head + data[8 + size :]


def _spoil_tensors(draw: random.Random, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    name = draw.choice(sorted(tensors))
    change = draw.randrange(6)
    if change == 0:
        tensors[name] = tensors[name].astype(draw.choice([np.float16, np.float64, np.int8, np.uint8, bool]))
    elif change == 1:
        tensors[name] = np.resize(
            tensors[name], draw.choice([(4, 4), (96,), (1, 4, 32), (8, 32), (4, 31), (0, 4)])
        )
    elif change == 2:
        tensors[name].flat[draw.randrange(tensors[name].size)] = draw.choice([math.nan, math.inf, 3e38, 1e-45])
    elif change == 3:
        del tensors[name]
    elif change == 4:
        tensors[name.replace("h.0", draw.choice(["h.7", "h.-1", "..", "g.0"]))] = tensors.pop(name)
    else:
        tensors[name + draw.choice(["", ".x", "\n", "/../x"])] = tensors.pop(name) * np.float32(
            draw.choice([0, -1, 1e20])
        )
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)


def spoil_randomly(folder: Path, seed: int) -> None:
    """Make one or two random changes."""
    draw = random.Random(seed)
    if draw.random() < 0.5:
        (folder / MANIFEST_FILE).unlink()
    _spoil_once(draw, folder)
    if draw.random() < 0.3:
        with contextlib.suppress(Exception):  # the first change may leave nothing to change
            _spoil_once(draw, folder)
    if (folder / MANIFEST_FILE).exists() and draw.random() < 0.5:
        with contextlib.suppress(Exception):
            vouch(folder)


def _spoil_once(draw: random.Random, folder: Path) -> None:
    change = draw.randrange(6)
    name = draw.choice(
        [CONFIG_FILE, WEIGHTS_FILE, WEIGHTS_FILE, *([MANIFEST_FILE] if (folder / MANIFEST_FILE).exists() else [])]
    )
    path = folder / name
    if change < 2 and (data := path.read_bytes()):
        path.write_bytes(_spoil_bytes(draw, data))
    elif change == 2:
        path.write_bytes(
            _spoil_header(draw, (folder / WEIGHTS_FILE).read_bytes())
        ) if name == WEIGHTS_FILE else None
    elif change < 5 and name != WEIGHTS_FILE:
        path.write_text(json.dumps(_spoil_json(draw, json.loads(path.read_text()))))
    else:
        _spoil_tensors(draw, folder)


def copy(original: Path, folder: Path) -> Path:
    return Path(shutil.copytree(original, folder))
