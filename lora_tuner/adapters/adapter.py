"""The adapter folder: reading it and checking it. Never imports torch.

An adapter is a PEFT folder plus `manifest.json`, its origin. The adapted layers are those of the
tensor names, not of the config's patterns; `peft_config` checks the other settings.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import atomic_io
from ..errors import AdapterError
from ..text import NAME_PATTERN, format_bytes, format_names
from . import expert_names, other_formats, peft_config, safetensors_header
from .manifest import Manifest, ParentInfo, WeightsInfo
from .peft_config import CONFIG_FILE as CONFIG_FILE
from .peft_config import WEIGHTS_FILE as WEIGHTS_FILE
from .replaced import ReplacedNames, find_replaced
from .report import REPORT_FILE, TITLES, AdapterReport, read_report
from .safetensors_header import read_json
from .samples import COLUMNS, SAMPLES_FILE, Sample, read_samples
from .summaries import Table, adapter_rows, format_method, format_ranks, to_html

MANIFEST_FILE, RUN_FILE, CARD_FILE = "manifest.json", "run.yaml", "README.md"
METRICS_FILE, LOSS_PLOT_FILE, SPECTRUM_FILE = "metrics.jsonl", "loss.png", "spectrum.png"
CONFUSION_FILE = "labels.png"  # of an adapter that tells labels
TOKENIZER_FILES = (  # that other tools save beside an adapter
    *("chat_template.jinja", "chat_template.json", "tokenizer_config.json", "tokenizer.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
_MAX_PATTERN_MATCHES = 300_000  # pattern keys times layers: every key is tried on every layer
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>(?=.{1,260}$)\w+(?:\.\w+){0,19})\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)",
    re.ASCII,
)
_DTYPES = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that passed `load_adapter_folder`. Its tensors are not in memory."""

    path: Path  #: its folder
    config: dict[str, Any] = field(repr=False)  #: adapter_config.json
    manifest: Manifest | None = field(repr=False)  #: None for one of another tool
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(repr=False)  #: name -> (dtype, shape)
    bytes: int = 0  #: of weights and config

    @property
    def name(self) -> str:
        return Path(os.path.abspath(self.path)).name  # of a symlink its own name, not its target's

    @property
    def is_chat(self) -> bool:
        return self.manifest is not None and self.manifest.is_chat

    @cached_property
    def samples(self) -> list[Sample]:
        """Texts of base and adapter for the same prompts, from start to end of its training."""
        return read_samples(self.path / SAMPLES_FILE)

    @property
    def final_samples(self) -> list[Sample]:
        """Those of the step whose weights it has."""
        run = self.manifest.run if self.manifest else None
        return [sample for sample in self.samples if run and sample.step == run.kept_step]

    @cached_property
    def report(self) -> AdapterReport | None:
        """Report on these weights, if there is one. Raises AdapterError for a damaged one."""
        return read_report(self.path / REPORT_FILE, self.sha256)

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors.values())

    @cached_property
    def modules(self) -> list[str]:
        """Full names of the adapted layers in the base, such as `transformer.h.0.attn.c_attn`, and of
        the parameters with the weights of experts (`model.layers.0.mlp.experts.down_proj`)."""
        return sorted(self._file_names)

    @cached_property
    def experts(self) -> list[str]:
        """Those of the adapted layers that are parameters with the weights of experts."""
        return sorted(name for name, file_name in self._file_names.items() if name != file_name)

    @cached_property
    def _file_names(self) -> dict[str, str]:
        """Adapted layer -> its name in the file."""
        modules = {match["module"] for name in self.tensors if (match := _TENSOR.fullmatch(name))}
        parameters = expert_names.parameter_names(modules, self.config.get("target_parameters") or [])
        return {parameters.get(module, module): module for module in modules}

    def tensor_name(self, module: str, part: str) -> str:
        """Name in the file of `lora_A.weight` or another part of an adapted layer."""
        return f"base_model.model.{self._file_names[module]}.{part}"

    @cached_property
    def replaced(self) -> ReplacedNames:
        """Rows of tokens and whole modules that it has in place of the base's."""
        return find_replaced(self.tensors, self.config)

    @property
    def added_tokens(self) -> dict[str, int]:
        """Tokens that training has added to the tokenizer of the base, with their ids."""
        return self.manifest.run.added_tokens if self.manifest and self.manifest.run else {}

    @property
    def ignored_note(self) -> str:
        """A sentence, after a space, about settings without effect once the tensors are there."""
        replaced = self.replaced
        used = {
            "target_parameters": self.experts,
            "trainable_token_indices": replaced.rows,
            "modules_to_save": replaced.copies,
        }
        ignored = [key for key in peft_config.ignored_settings(self.config) if not used.get(key)]
        return f" Ignored, as its tensors say it all: {format_names(ignored)}." if ignored else ""

    @property
    def targets(self) -> list[str]:
        """Last parts of the adapted layers' names, such as `c_attn`."""
        return sorted({module.rpartition(".")[2] for module in self.modules})

    @property
    def base(self) -> str:
        """Name of the base model: from the manifest or, without one, from the PEFT config."""
        return self.manifest.base.name if self.manifest else str(self.config.get("base_model_name_or_path") or "")

    @property
    def revision(self) -> str | None:
        """Commit of the base on the Hub, from the manifest or else from the PEFT config."""
        return self.manifest.base.revision if self.manifest else self.config.get("revision")

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights: from the manifest or, without one, of the file."""
        weights = self.manifest.weights if self.manifest else None
        return weights.sha256 if weights else atomic_io.sha256_file(self.path / WEIGHTS_FILE)

    def parent_info(self) -> ParentInfo:
        """Describe this adapter as a parent, for the manifest of an adapter made from it."""
        return ParentInfo(
            name=self.name, sha256=self.sha256, parents=self.manifest.parents if self.manifest else []
        )

    def rank_of(self, module: str) -> int:
        """Rank of one layer, `rank_pattern` included."""
        return int(self._patterns.value("rank_pattern", module) or self.rank)

    def scale_of(self, module: str) -> float:
        """Factor of one layer's B x A: alpha / rank or, with rsLoRA, alpha / sqrt(rank)."""
        alpha = self._patterns.value("alpha_pattern", module)
        rank = self.rank_of(module)
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return float(self.config["lora_alpha"] if alpha is None else alpha) / divisor

    def layer_patterns(self) -> dict[str, dict[str, float]]:
        """`rank_pattern` and `alpha_pattern` with the names of the adapted layers as keys."""
        return self._patterns.by_layer(self.modules)

    @cached_property
    def _patterns(self) -> peft_config.LayerPatterns:
        settings = peft_config.PATTERN_SETTINGS
        return peft_config.LayerPatterns({setting: self.config.get(setting) or {} for setting in settings})

    def layer_size(self, module: str) -> tuple[int, ...]:
        """(in, out) of the base's layer that `module` adapts; (experts, in, out) of experts."""
        lora_a, lora_b = (self.tensors[self.tensor_name(module, f"lora_{part}.weight")][1] for part in "AB")
        size = lora_a[1], lora_b[0]
        return (lora_a[0] // self.rank_of(module), *size) if module in self.experts else size

    def check_shapes(self, base_sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise AdapterError unless the base has these layers: (in, out), or (experts, in, out)."""
        problems = []
        for module in self.modules:
            size, base_size = self.layer_size(module), base_sizes.get(module)
            if base_size is None:
                kind = "experts" if module in self.experts else "linear layer"
                problems.append(
                    f"the base has no {kind} {module}{other_formats.describe_missing_layer(module, base_sizes)}"
                )
            elif size != base_size:
                problems.append(
                    f"{module} is {_format_size(base_size)} in the base, {_format_size(size)} in the adapter"
                )
        if problems:
            rest = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise AdapterError(f"{self.path} does not fit the base: {'; '.join(problems[:3])}{rest}.")

    def to_dict(self) -> dict[str, object]:
        """All metadata, ready for JSON."""
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

    def summary_rows(self) -> list[tuple[str, str]]:
        """Name and text of each row of a summary. Texts may come from an untrusted manifest."""
        alpha = "alpha per layer" if self.config.get("alpha_pattern") else f"alpha {self.config['lora_alpha']}"
        kind = f"{format_method(self.config)}, {format_ranks(map(self.rank_of, self.modules))}, {alpha}"
        weights = [
            ("Adapter", f"{kind}, on {', '.join(self.targets)}"),
            ("In place of the base's", str(self.replaced)),
            ("Size", f"{self.parameters:,} parameters, {format_bytes(self.bytes)}"),
            ("Added tokens", ", ".join(f"{token} ({number})" for token, number in self.added_tokens.items())),
        ]
        return adapter_rows(self.base, weights, self.manifest)

    def _repr_html_(self) -> str:
        """Summary, texts and report for notebooks; a message where the folder is damaged."""
        return to_html(self._summary())

    def _summary(self) -> Iterator[Table]:
        yield Table(self.summary_rows(), title=self.name)
        if samples := self.final_samples:
            yield Table([sample.shown for sample in samples], COLUMNS)
        if report := self.report:
            yield Table([(TITLES[name], " ".join(part.sentences)) for name, part in report.parts()])
        load_adapter_folder(self.path)  # it may have been damaged since it was read


def _format_size(size: tuple[int, ...]) -> str:
    count = f"{size[0]} times " if len(size) == 3 else ""
    return f"{count}{size[-2]} -> {size[-1]}"


def validate_name(name: str) -> str:
    """Return a name that is valid as a folder and as a model; else raise AdapterError."""
    if not NAME_PATTERN.fullmatch(name):
        raise AdapterError(
            f"'{name}' is not a valid adapter name: use a letter, then up to 63 letters, digits, "
            "'-' or '_'; names of Windows devices are reserved."
        )
    return name


def load_adapter_folder(path: Path) -> Adapter:
    """Read and check an adapter folder: config, manifest and the header of the weights.

    Raises AdapterError with the file, its problems and the remedy.
    """
    if not path.is_dir():
        raise AdapterError(f"There is no adapter folder {path}.")
    complete = all(os.path.lexists(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    if not complete and (reason := other_formats.explain_folder(path)):
        raise AdapterError(f"{path} {reason}.")
    config = read_json(path / CONFIG_FILE)
    if not isinstance(config, dict):
        raise AdapterError(f"{path / CONFIG_FILE}: it is not a JSON object.")
    if problems := peft_config.config_problems(config):
        raise AdapterError(f"{path / CONFIG_FILE}: {_join_problems(problems, 10)}.")
    try:
        header, _ = safetensors_header.read_safetensors_header(path / WEIGHTS_FILE)
        size = sum((path / name).stat().st_size for name in (WEIGHTS_FILE, CONFIG_FILE))
    except FileNotFoundError as error:
        raise AdapterError(f"{path} has no {WEIGHTS_FILE}: it is incomplete or not an adapter.") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path / WEIGHTS_FILE}: {error}. Copy it again from its source.") from error
    tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape, _, _) in header.items()}
    manifest = read_manifest(path) if os.path.lexists(path / MANIFEST_FILE) else None
    adapter = Adapter(path, config, manifest, tensors, size)
    if problems := _tensor_problems(adapter):
        raise AdapterError(f"{path / WEIGHTS_FILE}: {_join_problems(problems, 5)}.")
    return adapter


def _join_problems(problems: Sequence[str], limit: int) -> str:
    """The first `limit` problems on one line of readable length."""
    text = "; ".join(problems[:limit])
    return text if len(text) <= 1500 else f"{text[:1500]}..."


def read_manifest(path: Path) -> Manifest:
    """Read `manifest.json` of a folder. Raises AdapterError with all invalid fields."""
    try:
        return Manifest.model_validate(read_json(path / MANIFEST_FILE))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc'])) or 'manifest'}: {each['msg']}" for each in error.errors()]
        raise AdapterError(f"{path / MANIFEST_FILE}: {_join_problems(problems, 10)}.") from error


def weights_info(adapter: Adapter) -> WeightsInfo:
    """Sizes and hashes of weights and config, for the manifest."""
    weights = adapter.path / WEIGHTS_FILE
    return WeightsInfo(
        sha256=atomic_io.sha256_file(weights),
        bytes=weights.stat().st_size,
        parameters=adapter.parameters,
        config=atomic_io.sha256_file(adapter.path / CONFIG_FILE),
    )


def verify_adapter(adapter: Adapter) -> list[str]:
    """Check every byte of an adapter; return its problems. Without any it is intact, maybe not good.

    Reads the weights twice: for non-finite values and for the hash.
    """
    problems = verify_weights(adapter)
    if adapter.manifest is not None and adapter.manifest.run is not None:
        problems += [
            f"{name} is missing"
            for name in (RUN_FILE, METRICS_FILE, LOSS_PLOT_FILE, CARD_FILE)
            if not (adapter.path / name).is_file()
        ]
    if adapter.added_tokens and not any((adapter.path / name).is_file() for name in TOKENIZER_FILES):
        problems.append("the tokenizer with its added tokens is missing")
    try:
        read_report(adapter.path / REPORT_FILE, adapter.sha256)
    except AdapterError as error:
        problems.append(str(error).rstrip("."))
    return problems


def check_weights_hash(adapter: Adapter) -> None:
    """Raise AdapterError unless the weights are finite and match the manifest."""
    if problems := verify_weights(adapter):
        raise AdapterError(f"{adapter.path} is damaged: {'; '.join(problems[:3])}.")


def verify_weights(adapter: Adapter) -> list[str]:
    """Problems of the weights: values that are not finite, hashes unlike the manifest's."""
    path, problems = adapter.path / WEIGHTS_FILE, list[str]()
    try:
        problems += [f"{name} has values that are not finite" for name in safetensors_header.not_finite(path)]
    except (OSError, ValueError) as error:  # the file was replaced since the adapter was loaded
        return [f"{WEIGHTS_FILE} cannot be read: {error}"]
    if adapter.manifest is not None:
        weights = adapter.manifest.weights
        if weights is None or weights.sha256 != atomic_io.sha256_file(path):
            problems.append(f"{WEIGHTS_FILE} does not match its hash in {MANIFEST_FILE}")
        if weights and weights.config not in (None, atomic_io.sha256_file(adapter.path / CONFIG_FILE)):
            problems.append(f"{CONFIG_FILE} does not match its hash in {MANIFEST_FILE}")
    return problems


def _tensor_problems(adapter: Adapter) -> list[str]:
    """Tensors that are not LoRA weights, are incomplete, or contradict the config."""
    replaced = adapter.replaced
    problems = [
        f"{name} is not a LoRA tensor{other_formats.describe_tensor(name)}"
        for name in adapter.tensors
        if not _TENSOR.fullmatch(name) and name not in replaced.tensors | replaced.problems.keys()
    ]
    problems += [f"{name} {problem}" for name, problem in replaced.problems.items()]
    problems += [f"{module} has LoRA and is replaced" for module in replaced.modules if module in adapter.modules]
    problems += [
        f"{name} has dtype {dtype}" for name, (dtype, _) in adapter.tensors.items() if dtype not in _DTYPES
    ]
    if not adapter.modules:
        problems.append("it has no LoRA tensors")
    problems += expert_names.unnamed_parameters(adapter.modules)
    keys = max(len(adapter.config.get(key) or {}) for key in peft_config.PATTERN_SETTINGS)
    if keys * len(adapter.modules) > _MAX_PATTERN_MATCHES:
        return [f"{len(adapter.modules):,} layers are too many for the {keys:,} pattern keys in {CONFIG_FILE}"]
    try:
        for module in adapter.modules:
            adapter.scale_of(module)
    except TimeoutError:
        return [f"the patterns in {CONFIG_FILE} take too long to match: name the layers instead"]
    dora = bool(adapter.config.get("use_dora"))
    for module in adapter.modules:
        names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        parts = [adapter.tensors.get(adapter.tensor_name(module, name)) for name in names]
        lora_a, lora_b, magnitude = (part and part[1] for part in parts)
        rank = adapter.rank_of(module)
        if lora_a is None or lora_b is None:
            problems.append(f"{module} has no lora_{'A' if lora_a is None else 'B'}")
        elif len(lora_a) != 2 or len(lora_b) != 2 or lora_a[0] != lora_b[1]:
            problems.append(f"{module} has shapes {lora_a} and {lora_b}, which do not share a rank")
        elif module in adapter.experts and (lora_a[0] % rank or not lora_a[0]):
            problems.append(
                f"{module} has {lora_a[0]} ranks of all experts, no multiple of {rank} in {CONFIG_FILE}"
            )
        elif module not in adapter.experts and lora_a[0] != rank:
            problems.append(f"{module} has rank {lora_a[0]}, but {CONFIG_FILE} says {rank}")
        elif magnitude != ((lora_b[0],) if dora else None):
            setting = f"use_dora: {str(dora).lower()}"
            problems.append(f"{module} has a magnitude of shape {magnitude}, but {CONFIG_FILE} says {setting}")
    return problems
