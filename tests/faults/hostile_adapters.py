"""Adapters of strangers: one that is good, and what can be wrong with it, by hand and by chance."""

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
    """A good one on a tiny GPT-2, with all that a trained one has beside it."""
    return write_on(folder, base)


def write_on(
    folder: Path, base: Path, tokenizer: str | None = None, module: str = "transformer.h.{}.attn.c_attn", out: int = 96
) -> Path:
    """One that was trained on the base, its manifest says, on one layer of the first two blocks: 32 -> `out`."""
    draw = np.random.default_rng(0)
    blocks = min(2, json.loads((base / "config.json").read_text()).get("n_layer", 2))
    width = 64 if "wide" in base.name else 32
    tensors = {
        f"base_model.model.{module.format(block)}.lora_{part}.weight": draw.normal(0, 0.1, shape).astype(np.float32)
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
class Stranger:
    """What is done to a good one, and who refuses it then: `all` who open it; `numbers`, who look at its numbers; `base`, who
    put it on one; `push`; or nobody. `why` is found in the line that they say."""

    spoil: Spoil
    refused_by: str
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
    """The same, with nothing that says what its files were."""

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
    """`a__b` is b in a."""

    def spoil(folder: Path) -> None:
        facts = json.loads((folder / MANIFEST_FILE).read_text())
        for key, value in changes.items():
            *above, last = key.split("__")
            place = facts
            for part in above:
                place = place[part]
            place[last] = value
        (folder / MANIFEST_FILE).write_text(json.dumps(facts))

    return spoil


def tensors(change: Callable[[dict[str, Any]], Any], known: bool = False) -> Spoil:
    """Other tensors; `known`: and a manifest that says that they are the right ones."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS_FILE)
        found = change(found) or found
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in found.items()}, folder / WEIGHTS_FILE)
        if known:
            vouch(folder)
        else:
            (folder / MANIFEST_FILE).unlink()

    return spoil


def vouch(folder: Path) -> None:
    """Let the manifest say that these are its files."""
    facts = Manifest.model_validate_json((folder / MANIFEST_FILE).read_text())
    weights = WeightsInfo(
        sha256=atomic_io.sha256_file(folder / WEIGHTS_FILE), bytes=(folder / WEIGHTS_FILE).stat().st_size, parameters=1
    )
    (folder / MANIFEST_FILE).write_text(facts.model_copy(update={"weights": weights}).to_json())


def header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Another header before the same data."""

    def spoil(folder: Path) -> None:
        data = (folder / WEIGHTS_FILE).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        found = json.loads(data[8 : 8 + size])
        new = change(found) or found
        head = new if isinstance(new, bytes) else json.dumps(new).encode()
        (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(head)) + head + data[8 + size :])

    return bare(spoil)


def put(**entry: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found[A].update(entry)


def sparse(size: int, head: int) -> Spoil:
    """A file that is long and takes no room, of a header of `head` zeros."""

    def spoil(folder: Path) -> None:
        with (folder / WEIGHTS_FILE).open("wb") as file:
            file.write(struct.pack("<Q", head))
            file.truncate(size)

    return bare(spoil)


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda found: found.__setitem__(new, found.pop(old))


def cast(kind: Any, factor: float = 1.0) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda found: {name: (tensor.astype(np.float64) * factor).astype(kind) for name, tensor in found.items()}


def one_number(value: float) -> Callable[[dict[str, Any]], None]:
    return lambda found: found[A].__setitem__((0, 0), value)


class _Bomb:
    """Unpickled, it makes a folder."""

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
    """As many layers as fit, with long names, and as many patterns as are taken."""

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


def huge_json(unit: str, size: int) -> str:
    return '{"r": [' + ",".join([unit] * (size // (len(unit) + 1))) + "]}"


def growing_yaml() -> str:
    """Each line holds the one before it nine times."""
    lines = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9)]
    return "\n".join(["a0: &a0 {x: 1}", *lines])


NO_LORA = "is not a LoRA tensor"
CUT_OFF = "it is cut off, or no safetensors file"
NOT_JSON = "is not readable as JSON"
HEADER = "its header"
LARGE = "not finite|no finite loss|The loss is nan|out of the range"

BY_HAND: dict[str, Stranger] = {
    # Files
    "empty weights": Stranger(partial(replace, WEIGHTS_FILE, b""), "all", CUT_OFF),
    "weights cut off": Stranger(lambda it: os.truncate(it / WEIGHTS_FILE, 2000), "all", "cut off"),
    "a web page for weights": Stranger(partial(replace, WEIGHTS_FILE, HTML), "all", CUT_OFF),
    "a pointer for weights": Stranger(partial(replace, WEIGHTS_FILE, LFS), "all", "git lfs pull"),
    "empty config": Stranger(partial(replace, CONFIG_FILE, b""), "all", NOT_JSON),
    "a web page for a config": Stranger(partial(replace, CONFIG_FILE, HTML), "all", NOT_JSON),
    "a pointer for a config": Stranger(partial(replace, CONFIG_FILE, LFS), "all", "git lfs pull"),
    "a pointer for a manifest": Stranger(partial(replace, MANIFEST_FILE, LFS), "all", "git lfs pull"),
    "no weights": Stranger(delete(WEIGHTS_FILE), "all", f"has no {WEIGHTS_FILE}"),
    "no config": Stranger(delete(CONFIG_FILE), "all", f"has no {CONFIG_FILE}"),
    "an empty folder": Stranger(delete(CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE, RUN_FILE, METRICS_FILE, LOSS_PLOT_FILE, CARD_FILE), "all", "has no"),
    # Pickles
    "pickled": Stranger(pickled("adapter_model.bin"), "all", "pickled weights are not read"),
    "a pickle in disguise": Stranger(pickled(WEIGHTS_FILE), "all", CUT_OFF),
    # Tensors
    "a tensor renamed": Stranger(tensors(rename(A, "base_model.model.lora_A")), "all", NO_LORA),
    "a tensor missing": Stranger(tensors(lambda found: {n: it for n, it in found.items() if n != A}), "all", "has no lora_A"),
    "half an adapter": Stranger(
        tensors(lambda found: {name: it for name, it in found.items() if MODULE in name}, known=True), "nobody"
    ),
    "a tensor more": Stranger(tensors(lambda found: {**found, "lm_head.weight": found[A]}), "all", NO_LORA),
    "an embedding": Stranger(
        tensors(rename(A, "base_model.model.transformer.wte.lora_embedding_A")), "all", NO_LORA
    ),
    "the head": Stranger(
        tensors(lambda found: {name.replace(MODULE, "lm_head"): it for name, it in found.items()}), "base", "lm_head"
    ),
    "a tensor that climbs": Stranger(tensors(rename(A, f"../../{A}")), "all", NO_LORA),
    "a tensor with a path": Stranger(tensors(rename(A, "/etc/passwd")), "all", NO_LORA),
    "a tensor that writes": Stranger(tensors(rename(A, ESCAPE)), "all", NO_LORA),
    "nan": Stranger(tensors(one_number(math.nan), known=True), "numbers", "not finite"),
    "infinity": Stranger(tensors(one_number(-math.inf)), "numbers", "not finite"),
    "another shape": Stranger(tensors(lambda found: {n: it[:, :-1] for n, it in found.items()}), "all", "share a rank"),
    "other sizes": Stranger(
        tensors(lambda found: {n: it[:, :-1] if n[-8] == "A" else it for n, it in found.items()}), "base", "31 -> 96"
    ),
    "the other way round": Stranger(
        tensors(lambda found: {n: it.T for n, it in found.items()}), "all", "share a rank"
    ),
    "whole numbers": Stranger(tensors(cast(np.int32)), "all", "has dtype I32"),
    "nothing": Stranger(tensors(lambda found: {"empty": np.zeros(0, np.float32)}), "all", NO_LORA),
    "large numbers": Stranger(tensors(cast(np.float32, 1e37)), "base", LARGE),
    "numbers beyond float32": Stranger(tensors(cast(np.float64, 1e300)), "base", LARGE),
    # Headers
    "a header of gigabytes": Stranger(header(lambda _: None) and sparse(100, 1 << 40), "all", CUT_OFF),
    "a header beyond all numbers": Stranger(sparse(100, (1 << 64) - 1), "all", CUT_OFF),
    "a header of zeros": Stranger(sparse(95_000_000, 94_000_000), "all", "its header has 94,000,000 bytes"),
    "a header of dictionaries": Stranger(
        header(lambda _: huge_json('{"":0}', 30_000_000).encode()), "all", "its header has"
    ),
    "a deep header": Stranger(header(lambda _: nest(1_000_000).encode()), "all", HEADER),
    "a shape of gigabytes": Stranger(header(put(shape=[4, 10**10])), "all", "wrong about"),
    "a shape beyond all numbers": Stranger(header(put(shape=[4, 10**4000])), "all", HEADER),
    "a negative shape": Stranger(header(put(shape=[-4, -32])), "all", HEADER),
    "a shape in fractions": Stranger(header(put(shape=[4.0, 32.0])), "all", HEADER),
    "offsets that overlap": Stranger(header(put(data_offsets=[512, 1024])), "all", "wrong about"),
    "offsets beyond": Stranger(header(put(data_offsets=[0, 10**15])), "all", "beyond the file"),
    "no such numbers": Stranger(header(put(dtype="F4096")), "all", "has dtype F4096"),
    "a dtype that writes": Stranger(header(put(dtype=ESCAPE)), "all", "has dtype"),
    "metadata that is no text": Stranger(header(lambda it: {"__metadata__": {"a": 1}, **it}), "all", HEADER),
    "metadata that is no number": Stranger(header(lambda it: {"__metadata__": {"a": math.nan}, **it}), "all", HEADER),
    "a header in utf-16": Stranger(header(lambda it: json.dumps(it).encode("utf-16")), "all", HEADER),
    "a header after a space": Stranger(header(lambda it: b" " + json.dumps(it).encode()), "all", HEADER),
    "a tensor twice": Stranger(
        header(lambda it: json.dumps(it).replace("}}", f'}}, "{A}": {json.dumps(it[A])}}}').encode()), "all", HEADER
    ),
    # Configs
    "a config of a list": Stranger(raw_config("[]"), "all", "not a JSON object"),
    "a deep config": Stranger(raw_config('{"r": ' + nest(100_000) + "}"), "all", NOT_JSON),
    "a large config": Stranger(raw_config(" " * 20_000_000), "all", "too large"),
    "a config of dictionaries": Stranger(raw_config(huge_json('{"":0}', 9_000_000)), "all", "too large"),
    "a config of bytes": Stranger(partial(replace, CONFIG_FILE, bytes(range(256))), "all", NOT_JSON),
    **{
        f"a config {depth} deep": Stranger(raw_config('{"r": ' + nest(depth) + "}"), "all", CONFIG_FILE)
        for depth in (300, 500, 700, 800, 900, 950)
    },
    "a config that writes": Stranger(config(**{ESCAPE: ESCAPE, "r": ESCAPE}), "all", "is set"),
    "half a character": Stranger(config(**{"\ud800": 1}), "all", NOT_JSON),
    "a long config": Stranger(config(bias="b" * 900_000), "all", "bias is"),
    "many unknown settings": Stranger(config(**{f"k{n}": n for n in range(50_000)}), "all", "is set"),
    "a rank in words": Stranger(config(r="four"), "all", "r is"),
    "a rank of millions": Stranger(config(r=4_000_000), "all", "a rank is"),
    "a rank of digits": Stranger(config(r=10**4000), "all", "a rank is"),
    "another rank": Stranger(config(r=4096), "all", "says 4096"),
    "a scale beyond all": Stranger(config(lora_alpha=1e300), "all", "an alpha is"),
    "a scale that is none": Stranger(config(lora_alpha=math.nan), "all", "an alpha is"),
    "pissa": Stranger(config(init_lora_weights="pissa"), "all", "init_lora_weights"),
    "pissa, quickly": Stranger(config(init_lora_weights="pissa_niter_4"), "all", "init_lora_weights"),
    "olora": Stranger(config(init_lora_weights="olora"), "all", "init_lora_weights"),
    "corda": Stranger(config(init_lora_weights="corda"), "all", "init_lora_weights"),
    "loftq": Stranger(config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "all", "init_lora_weights"),
    "modules of its own": Stranger(config(modules_to_save=["lm_head"]), "all", "modules_to_save"),
    "biases": Stranger(config(bias="all"), "all", "bias"),
    "layers again": Stranger(config(layer_replication=[[0, 2], [0, 2]]), "all", "layer_replication"),
    "parameters": Stranger(config(target_parameters=["mlp"]), "all", "target_parameters"),
    "tokens of its own": Stranger(config(trainable_token_indices=[0]), "all", "trainable_token_indices"),
    "code": Stranger(config(auto_mapping={"base_model_class": "X", "parent_library": "os"}), "all", "auto_mapping"),
    "code of its own": Stranger(config(_custom_modules={"a": "b"}), "all", "_custom_modules"),
    "another library": Stranger(config(megatron_core="os.system"), "all", "megatron_core"),
    "another kind": Stranger(config(peft_type="ADALORA"), "all", "peft_type"),
    "another task": Stranger(config(task_type="SEQ_CLS"), "all", "task_type"),
    "a pattern that hangs": Stranger(config(rank_pattern={"(a+)+b$": 4}), "all", "no layer name"),
    "a pattern that is none": Stranger(config(alpha_pattern={"(": 4}), "all", "no layer name"),
    "a long pattern": Stranger(config(rank_pattern={"." * 500_000: 4}), "all", "no layer name"),
    "many patterns": Stranger(config(alpha_pattern={f"h.{n}": 1 for n in range(2_000)}), "all", "2,000 keys"),
    "targets that hang": Stranger(config(target_modules="(.*.*)*(a+)+$"), "nobody"),
    "other targets": Stranger(config(target_modules=["../x", ESCAPE, "lm_head"]), "nobody"),
    "many layers": Stranger(many_layers(2_000, 1_000, 1), "all", "too many for the 1,000 keys"),
    "layers enough": Stranger(many_layers(100, 1_000, 1), "base", "a.h.0.attn.c_attn"),
    "long names": Stranger(many_layers(40, 0, 200), "all", NO_LORA),
    # Manifests
    "a manifest that is none": Stranger(partial(replace, MANIFEST_FILE, "[]"), "all", MANIFEST_FILE),
    "a deep manifest": Stranger(partial(replace, MANIFEST_FILE, nest(100_000)), "all", NOT_JSON),
    "a large manifest": Stranger(partial(replace, MANIFEST_FILE, huge_json("[]", 9_000_000)), "all", "too large"),
    "a manifest of tomorrow": Stranger(manifest(schema_version=99), "all", "schema_version"),
    "half a character in a manifest": Stranger(manifest(**{"\ud800": "\ud800"}), "all", MANIFEST_FILE),
    "half a character in a name": Stranger(manifest(base__name="\ud800"), "all", MANIFEST_FILE),
    "many unknown facts": Stranger(manifest(**{f"k{n}": n for n in range(30_000)}), "all", MANIFEST_FILE),
    "rows that climb": Stranger(manifest(data__held_out_hash="../../../etc/passwd"), "all", "held_out_hash"),
    "no numbers": Stranger(manifest(result__loss=math.nan), "all", "finite"),
    "other weights": Stranger(manifest(weights__sha256="ab" * 32), "numbers", "is not the file"),
    "another config": Stranger(manifest(weights__config="ab" * 32), "numbers", "is not the file"),
    "ancestors for ever": Stranger(manifest(parents=ancestry(300)), "all", MANIFEST_FILE),
    **{f"{depth} ancestors": Stranger(manifest(parents=ancestry(depth)), "some") for depth in (100, 200, 240, 250, 252)},
    "a manifest that writes": Stranger(
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
        "nobody",
    ),
    "long facts": Stranger(manifest(data__name="n" * 300_000, base__weights="w " * 150_000), "nobody"),
    "many facts": Stranger(manifest(data__counts={f"c{n}": n for n in range(30_000)}), "nobody"),
    "large facts": Stranger(manifest(result__loss=1e308, result__base_loss=-1e308, run__steps=10**4000), "nobody"),
    "facts that climb": Stranger(
        manifest(data__name="../../x", data__source="/etc/passwd", parents=[{"name": "../../x", "sha256": "ab" * 32}]),
        "nobody",
    ),
    # What is no file
    **{
        f"{name} is {what}": Stranger(spoil, "all", f"{name}")
        for name in (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE)
        for what, spoil in (
            ("endless", link(name, "/dev/zero")),
            ("a pipe", pipe(name)),
            ("a link to a pipe", lambda it, name=name: os.mkfifo(it / "p") or link(name, "p")(it)),
            ("a loop", link(name, name)),
            ("a link to nothing", link(name, "nowhere")),
            ("a folder", lambda it, name=name: (it / name).unlink() or (it / name).mkdir()),
            ("a link to a folder", link(name, "/etc")),
            ("a file of the system", link(name, "/etc/passwd")),
        )
    },
    **{f"{name} is a pipe": Stranger(pipe(name), "push", name) for name in (METRICS_FILE, LOSS_PLOT_FILE, RUN_FILE, CARD_FILE)},
    # What push reads as well
    "yaml with code": Stranger(partial(replace, RUN_FILE, "!!python/object/apply:os.mkdir [it-ran]"), "push", RUN_FILE),
    "yaml that grows": Stranger(partial(replace, RUN_FILE, growing_yaml()), "push", RUN_FILE),
    "deep yaml": Stranger(partial(replace, RUN_FILE, nest(5_000)), "push", RUN_FILE),
}  # fmt: skip


# By chance

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


def _any(draw: random.Random) -> Any:
    kind = draw.randrange(5)
    if kind < 2:
        return draw.choice(_VALUES)
    if kind == 2:
        return draw.choice(_STRINGS)
    return [_any(draw) for _ in range(draw.randrange(3))] if kind == 3 else {draw.choice(_STRINGS): _any(draw)}


def _spoil_json(draw: random.Random, data: Any) -> Any:
    """One change somewhere in it."""
    if isinstance(data, dict | list) and data and draw.random() < 0.8:
        key = draw.choice(list(data) if isinstance(data, dict) else range(len(data)))
        choice = draw.random()
        if choice < 0.15:
            del data[key]
        elif choice < 0.3 and isinstance(data, dict):
            data[draw.choice(_STRINGS)] = data.pop(key)
        elif choice < 0.4 and isinstance(data, dict):
            data[draw.choice([*_STRINGS, "some_day"])] = _any(draw)
        else:
            data[key] = _spoil_json(draw, data[key])
        return data
    return _any(draw)


def _spoil_bytes(draw: random.Random, data: bytes) -> bytes:
    place, length = draw.randrange(len(data)), draw.choice([1, 1, 1, 8, 64, 512])
    junk = draw.choice([draw.randbytes(length), bytes(length), b"\xff" * length, data[:length]])
    change = draw.randrange(4)
    if change == 0:
        return data[:place]
    if change == 1:
        return data[:place] + junk + data[place:]
    return data[:place] + junk[: len(data) - place] + data[place + length :]


def _spoil_header(draw: random.Random, data: bytes) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    if draw.random() < 0.5:
        head = json.dumps(_spoil_json(draw, json.loads(data[8 : 8 + size]))).encode()
    else:
        head = _spoil_bytes(draw, data[8 : 8 + size])
    return struct.pack("<Q", len(head)) + head + data[8 + size :]


def _spoil_tensors(draw: random.Random, folder: Path) -> None:
    found = load_file(folder / WEIGHTS_FILE)
    name = draw.choice(sorted(found))
    change = draw.randrange(6)
    if change == 0:
        found[name] = found[name].astype(draw.choice([np.float16, np.float64, np.int8, np.uint8, bool]))
    elif change == 1:
        found[name] = np.resize(found[name], draw.choice([(4, 4), (96,), (1, 4, 32), (8, 32), (4, 31), (0, 4)]))
    elif change == 2:
        found[name].flat[draw.randrange(found[name].size)] = draw.choice([math.nan, math.inf, 3e38, 1e-45])
    elif change == 3:
        del found[name]
    elif change == 4:
        found[name.replace("h.0", draw.choice(["h.7", "h.-1", "..", "g.0"]))] = found.pop(name)
    else:
        found[name + draw.choice(["", ".x", "\n", "/../x"])] = found.pop(name) * np.float32(draw.choice([0, -1, 1e20]))
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in found.items()}, folder / WEIGHTS_FILE)


def spoil_by_chance(folder: Path, seed: int) -> None:
    """One change, or two, that the seed decides."""
    draw = random.Random(seed)
    if draw.random() < 0.5:
        (folder / MANIFEST_FILE).unlink()
    _spoil_once(draw, folder)
    if draw.random() < 0.3:
        with contextlib.suppress(Exception):  # the first has left nothing that could be spoilt further
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
        path.write_bytes(_spoil_header(draw, (folder / WEIGHTS_FILE).read_bytes())) if name == WEIGHTS_FILE else None
    elif change < 5 and name != WEIGHTS_FILE:
        path.write_text(json.dumps(_spoil_json(draw, json.loads(path.read_text()))))
    else:
        _spoil_tensors(draw, folder)


def copy(good: Path, folder: Path) -> Path:
    return Path(shutil.copytree(good, folder))
