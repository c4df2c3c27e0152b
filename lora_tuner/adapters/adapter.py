"""The adapter folder: what is in it, read with suspicion. Never imports torch.

An adapter is a plain PEFT folder plus `manifest.json`, which says what it was made from. Surprise: a PEFT config is
instructions to a library, some of which change the base model on load; so keys and values are checked against a list of
harmless ones, and layers are taken from the tensors' names instead of from the config's patterns.
"""

import json
import math
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import atomic_io, safetensors_header
from ..config import MAX_ALPHA, MAX_RANK, NAME_PATTERN
from ..errors import AdapterError
from .manifest import Manifest, ParentInfo, WeightsInfo

WEIGHTS_FILE, CONFIG_FILE, MANIFEST_FILE, RUN_FILE, METRICS_FILE, LOSS_PLOT_FILE, SPECTRUM_FILE, CARD_FILE = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "manifest.json",
    "run.yaml",
    "metrics.jsonl",
    "loss.png",
    "spectrum.png",
    "README.md",
)
SCALING_KEYS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
)  # decide what the tensors do
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>(?=.{1,260}$)\w+(?:\.\w+){0,19})\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)",
    re.ASCII,
)
_PATTERN_KEY = re.compile(r"[\^A-Za-z0-9_.\\$]{1,200}")
_DTYPES = ("F16", "BF16", "F32", "F64")
MAX_PATTERNS = 1_000
_CHECKED_PATTERNS = 500_000  # keys times layers: each key is tried on each layer
_JSON = 1_000_000  # bytes of a config or a manifest; in memory it can become thirty times as much
_repr = reprlib.Repr()  # of values that can be long, and deeper than repr can go
_repr.maxstring, _repr.maxother, _repr.maxlong = 200, 200, 420


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that passed `read`: well-formed, harmless, all of one piece. Its tensors are not in memory."""

    path: Path
    config: dict[str, Any]
    manifest: Manifest | None
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)
    bytes: int = 0  # of weights and config

    @property
    def name(self) -> str:
        return Path(os.path.abspath(self.path)).name  # of a link its own, and not that of what it points to

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors.values())

    @cached_property
    def modules(self) -> list[str]:
        """Full names of the adapted layers in the base, such as `transformer.h.0.attn.c_attn`."""
        return sorted({match["module"] for name in self.tensors if (match := _TENSOR.fullmatch(name))})

    @property
    def targets(self) -> list[str]:
        """The layers' last names."""
        return sorted({module.rpartition(".")[2] for module in self.modules})

    @property
    def base(self) -> str:
        """What the base is called: by this tool where there is a manifest, else by the tool that made the adapter."""
        return self.manifest.base.name if self.manifest else str(self.config.get("base_model_name_or_path") or "")

    @property
    def revision(self) -> str | None:
        """The base's commit on the Hub, or what the tool that made the adapter says of it."""
        return self.manifest.base.revision if self.manifest else self.config.get("revision")

    @cached_property
    def sha256(self) -> str:
        """Of the weights: as the manifest knows it or, without one, of the file."""
        known = self.manifest.weights if self.manifest else None
        return known.sha256 if known else atomic_io.sha256_file(self.path / WEIGHTS_FILE)

    def parent_info(self) -> ParentInfo:
        """What an adapter that is made from this one remembers of it."""
        return ParentInfo(name=self.name, sha256=self.sha256, parents=self.manifest.parents if self.manifest else [])

    def rank_of(self, module: str) -> int:
        """The rank of one layer's update, by `rank_pattern` where that names it."""
        return int(self._by_pattern("rank_pattern", module) or self.rank)

    def scale_of(self, module: str) -> float:
        """What one layer's B x A is multiplied by: alpha over the rank or, with rsLoRA, over its root."""
        alpha = self._by_pattern("alpha_pattern", module)
        rank = self.rank_of(module)
        over = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return float(self.config["lora_alpha"] if alpha is None else alpha) / over

    def _by_pattern(self, name: str, module: str) -> Any:
        """The value of the first key that means this layer, as PEFT reads it: an ending of its name, as a pattern."""
        if (name, module) not in self._found:
            expression, values = self._patterns[name]
            match = expression.match(module)
            self._found[name, module] = values[int(str(match.lastgroup)[1:])] if match else None
        return self._found[name, module]

    @cached_property
    def _found(self) -> dict[tuple[str, str], Any]:
        """What `_by_pattern` has found: a thousand keys take their time."""
        return {}

    @cached_property
    def _patterns(self) -> dict[str, tuple[re.Pattern[str], list[Any]]]:
        """The keys of each pattern as one expression, which takes the first that matches, and their values."""
        found = {}
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = self.config.get(name) or {}
            keys = (rf"(?:.*\.)?(?P<k{index}>{key})$" for index, key in enumerate(pattern))
            found[name] = re.compile("|".join(keys) or "(?!)"), list(pattern.values())
        return found

    def layer_size(self, module: str) -> tuple[int, int]:
        """(in, out) of the layer that the update of `module` was made for."""
        down, up = (self.tensors[f"base_model.model.{module}.lora_{part}.weight"][1] for part in "AB")
        return down[1], up[0]

    def check_shapes(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise AdapterError unless a base with these layers, name -> (in, out), can carry the update."""
        problems = []
        for module in self.modules:
            if module not in sizes:
                problems.append(f"{module} is no linear layer of the base")
            elif (ours := self.layer_size(module)) != (theirs := sizes[module]):
                problems.append(
                    f"{module} is {theirs[0]} -> {theirs[1]} in the base, {ours[0]} -> {ours[1]} in the adapter"
                )
        if problems:
            more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise AdapterError(f"{self.path} does not fit the base: {'; '.join(problems[:3])}{more}.")

    def to_dict(self) -> dict[str, Any]:
        """Everything known, as JSON can hold it."""
        manifest = self.manifest.model_dump() if self.manifest else {"base": {"name": self.base}}
        return {
            "name": self.name,
            "path": str(self.path),
            "rank": self.rank,
            "alpha": self.config["lora_alpha"],
            "targets": self.targets,
            "parameters": self.parameters,
            "bytes": self.bytes,
            **manifest,
        }


def validate_name(name: str) -> str:
    """The name, or AdapterError: it becomes a folder, a PEFT adapter and a model name, so it must be plain."""
    if not NAME_PATTERN.fullmatch(name):
        raise AdapterError(
            f"'{name}' is no adapter name: a letter, then up to 63 letters, digits, '-' or '_', and no device of Windows."
        )
    return name


def load_adapter_folder(path: Path) -> Adapter:
    """Read and check an adapter folder: config, manifest and the weights' header, not the weights.

    Raises AdapterError with the folder, what is wrong in it, and what to do.
    """
    if not path.is_dir():
        raise AdapterError(f"There is no adapter folder {path}.")
    config = _read_json(path / CONFIG_FILE)
    if problems := _config_problems(config):
        raise AdapterError(f"{path / CONFIG_FILE}: {_joined(problems, 10)}.")
    try:
        header, _ = safetensors_header.read_safetensors_header(path / WEIGHTS_FILE)
        size = sum((path / name).stat().st_size for name in (WEIGHTS_FILE, CONFIG_FILE))
    except FileNotFoundError as error:
        raise AdapterError(
            f"{path} has no {WEIGHTS_FILE}: it is incomplete, or no adapter (pickled weights are not read)."
        ) from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path / WEIGHTS_FILE}: {error}. Restore it from where it came from.") from error
    tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape, _, _) in header.items()}
    manifest = read_manifest(path) if os.path.lexists(path / MANIFEST_FILE) else None
    adapter = Adapter(path, config, manifest, tensors, size)
    if problems := _tensor_problems(adapter):
        raise AdapterError(f"{path / WEIGHTS_FILE}: {_joined(problems, 5)}.")
    return adapter


def _joined(problems: Sequence[str], most: int) -> str:
    """The first of them, in a line that somebody can read."""
    text = "; ".join(problems[:most])
    return text if len(text) <= 1500 else f"{text[:1500]}..."


def read_manifest(path: Path) -> Manifest:
    """`manifest.json` of a folder. Raises AdapterError for one that says too much, too little, or nothing."""
    try:
        return Manifest.model_validate(_read_json(path / MANIFEST_FILE))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, it['loc'])) or 'it'}: {it['msg']}" for it in error.errors()]
        raise AdapterError(f"{path / MANIFEST_FILE}: {_joined(problems, 10)}.") from error


def weights_info(adapter: Adapter) -> WeightsInfo:
    """What a manifest says of the two files that PEFT reads."""
    weights = adapter.path / WEIGHTS_FILE
    return WeightsInfo(
        sha256=atomic_io.sha256_file(weights),
        bytes=weights.stat().st_size,
        parameters=adapter.parameters,
        config=atomic_io.sha256_file(adapter.path / CONFIG_FILE),
    )


def verify_adapter(adapter: Adapter) -> list[str]:
    """What is wrong with the content of an adapter that `read` found well-formed; nothing, if the list is empty.

    Every tensor is looked at, and the weights are hashed: the price is reading the file twice. This proves that the
    adapter is whole and is the one that was trained, not that it is any good.
    """
    problems = verify_weights(adapter)
    if adapter.manifest is not None and adapter.manifest.run is not None:
        problems += [
            f"{name} is missing"
            for name in (RUN_FILE, METRICS_FILE, LOSS_PLOT_FILE, CARD_FILE)
            if not (adapter.path / name).is_file()
        ]
    return problems


def check_weights_hash(adapter: Adapter) -> None:
    """Raise AdapterError unless the numbers are finite and those that the manifest knows."""
    if problems := verify_weights(adapter):
        raise AdapterError(f"{adapter.path} is damaged: {'; '.join(problems[:3])}.")


def verify_weights(adapter: Adapter) -> list[str]:
    """What is wrong with the numbers alone: not finite, or not those that the manifest knows."""
    path, problems = adapter.path / WEIGHTS_FILE, []
    try:
        header, start = safetensors_header.read_safetensors_header(path)
        with path.open("rb") as file:
            for name, (dtype, _, begin, end) in header.items():
                file.seek(start + begin)
                if not _finite(file.read(end - begin), dtype):
                    problems.append(f"{name} holds numbers that are not finite")
    except (OSError, ValueError) as error:  # it is another file by now
        return [f"{WEIGHTS_FILE} cannot be read: {error}"]
    if adapter.manifest is not None:
        weights = adapter.manifest.weights
        if weights is None or weights.sha256 != atomic_io.sha256_file(path):
            problems.append(f"{WEIGHTS_FILE} is not the file that {MANIFEST_FILE} was written for")
        if weights and weights.config not in (None, atomic_io.sha256_file(adapter.path / CONFIG_FILE)):
            problems.append(f"{CONFIG_FILE} is not the file that {MANIFEST_FILE} was written for")
    return problems


def _finite(data: bytes, dtype: str) -> bool:
    """Whether all numbers are finite. A float is not when all bits of its exponent are set."""
    import numpy as np

    if dtype == "BF16":  # numpy has no such type
        return not bool((np.frombuffer(data, np.uint16) & 0x7F80 == 0x7F80).any())
    kinds = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return bool(np.isfinite(np.frombuffer(data, kinds[dtype])).all())


def _read_json(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise AdapterError(f"{path} is no file.")
        if path.stat().st_size > _JSON:
            raise AdapterError(f"{path} is too large to be what it is called.")
        data = path.read_bytes()
        if data.startswith(safetensors_header.LFS_POINTER):
            raise AdapterError(f"{path} is a pointer of Git LFS: `git lfs pull` fetches the file.")
        found = json.loads(data.decode("utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # half a character cannot be written again
        return found
    except FileNotFoundError as error:
        raise AdapterError(f"{path.parent} has no {path.name}: it is incomplete, or no adapter.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not readable as JSON: {error}.") from error


def _config_problems(config: Any) -> list[str]:
    """What in an adapter_config.json is wrong, or would do more than add low-rank updates to named layers."""
    if not isinstance(config, dict):
        return ["it holds no settings"]
    truth = (bool,)
    expected: dict[str, tuple[type, ...]] = {
        "r": (int,),
        "lora_alpha": (int, float),
        "lora_dropout": (int, float),
        "use_rslora": truth,
        "use_dora": truth,
        "fan_in_fan_out": truth,
        "inference_mode": truth,
        "rank_pattern": (dict,),
        "alpha_pattern": (dict,),
        "target_modules": (list, str),
        "base_model_name_or_path": (str,),
        "revision": (str,),
        "peft_version": (str,),
    }
    values: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "task_type": ("CAUSAL_LM",),
        "bias": ("none",),
        "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
        "megatron_core": ("megatron.core",),
        "qalora_group_size": (16,),
    }
    problems = [f"{key} is missing" for key in ("peft_type", "r", "lora_alpha") if config.get(key) is None]
    for key, value in config.items():
        if value is None or (value in ({}, [], False) and key not in expected):
            continue  # says nothing, which is always harmless
        if key in values:
            if value not in values[key]:
                problems.append(
                    f"{key} is {_repr.repr(value)}, and only {' or '.join(map(repr, values[key]))} is accepted"
                )
        elif key not in expected:
            problems.append(f"{key} is set, which is not supported")
        elif not isinstance(value, expected[key]) or (isinstance(value, bool) and bool not in expected[key]):
            problems.append(f"{key} is {_repr.repr(value)}, a {type(value).__name__}")
    for key in ("rank_pattern", "alpha_pattern"):
        if len(_pattern(config, key)) > MAX_PATTERNS:  # each is tried on each layer
            problems.append(f"{key} has {len(_pattern(config, key)):,} keys, and {MAX_PATTERNS:,} are accepted")
            return problems
    ranks = {"r": config.get("r")} | _pattern(config, "rank_pattern")
    problems += [
        f"{key} is {_repr.repr(rank)}, not a rank from 1 to {MAX_RANK}"
        for key, rank in ranks.items()
        if not _is_rank(rank)
    ]
    alphas = {"lora_alpha": config.get("lora_alpha")} | _pattern(config, "alpha_pattern")
    problems += [
        f"{key} is {_repr.repr(alpha)}, which is no scale" for key, alpha in alphas.items() if not _is_alpha(alpha)
    ]
    for key in ranks | alphas:
        pattern, dot, name = key.partition(".")
        if dot and not _is_pattern(name):
            problems.append(f"{pattern} has the key {_repr.repr(name)}, which is no layer name")
    return problems


def _is_pattern(name: str) -> bool:
    """Whether a layer name may go to PEFT, which takes it for a regular expression: nothing in it may repeat."""
    if not _PATTERN_KEY.fullmatch(name):
        return False
    try:
        re.compile(name)
    except re.error:
        return False
    return True


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_ALPHA <= value <= MAX_ALPHA


def _pattern(config: dict[str, Any], key: str) -> dict[str, Any]:
    pattern = config.get(key)
    return {f"{key}.{name}": value for name, value in pattern.items()} if isinstance(pattern, dict) else {}


def _tensor_problems(adapter: Adapter) -> list[str]:
    """Tensors that are no part of a low-rank update, whose partner is missing, or of another rank than the config says."""
    problems = [f"{name} is no part of a LoRA update" for name in adapter.tensors if not _TENSOR.fullmatch(name)]
    problems += [f"{name} holds {dtype}" for name, (dtype, _) in adapter.tensors.items() if dtype not in _DTYPES]
    if not adapter.modules:
        problems.append("it holds no LoRA update")
    keys = max(len(adapter.config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern"))
    if keys * len(adapter.modules) > _CHECKED_PATTERNS:
        return [f"{len(adapter.modules):,} layers are too many for the {keys:,} keys of a pattern in {CONFIG_FILE}"]
    dora = bool(adapter.config.get("use_dora"))
    for module in adapter.modules:
        prefix = f"base_model.model.{module}.lora_"
        a, b, magnitude = (
            shape and shape[1]
            for shape in map(
                adapter.tensors.get, (f"{prefix}A.weight", f"{prefix}B.weight", f"{prefix}magnitude_vector")
            )
        )
        if a is None or b is None:
            problems.append(f"{module} lacks lora_{'A' if a is None else 'B'}")
        elif len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            problems.append(f"{module} has shapes {a} and {b}, which share no rank")
        elif a[0] != adapter.rank_of(module):
            problems.append(f"{module} has rank {a[0]}, and {CONFIG_FILE} says {adapter.rank_of(module)}")
        elif magnitude != ((b[0],) if dora else None):
            problems.append(
                f"{module} has a magnitude of {magnitude}, and {CONFIG_FILE} says use_dora: {str(dora).lower()}"
            )
    return problems
