"""Settings of a PEFT config: which are understood, which change nothing, which are refused.

An adapter is its tensors and their scale. Settings that choose layers, initialize weights or direct
training change nothing once the tensors are there, so they are ignored. Those that change the base
or the forward pass are refused, and so are unknown ones that are set. Surprise: pattern keys are
regular expressions of strangers, which may take years to match; `regex` stops them by CPU time.
"""

import re
import reprlib
import time
from collections.abc import Iterable, Mapping

import regex

from ..config import MAX_ALPHA, MAX_RANK

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
SCALING_KEYS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
PATTERN_SETTINGS = ("rank_pattern", "alpha_pattern")
MAX_PATTERNS = 1_000
# CPU time for all keys of a pattern on all layers; usual ones take milliseconds.
_MATCH_SECONDS = 2.0
_PATTERN_KEY = re.compile(r"[ -~]{1,500}")
# `regex` would copy what is repeated.
_LARGE_COUNT = re.compile(r"\{(?!\d{1,2}(,\d{0,2})?\})|\{.*\{.*\{")
_TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "target_modules": (list, str),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), (int, float)),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"), (bool,)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version"), (str,)),
}
_VALUES: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    # Others, such as pissa, change the weights of the base on load.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}
_WITHOUT_EFFECT = frozenset(
    (
        *("auto_mapping", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"),
        *("ensure_weight_tying", "megatron_config", "merge_weights", "runtime_config"),
        *("lora_dtype", "lorap_emb_lr", "lorap_lr_ratio"),  # of ms-swift
        # Where they had an effect, the file has tensors that are not LoRA, and is refused for these.
        *("bias", "lora_bias", "target_parameters", "trainable_token_indices"),
    )
)
_short_repr = reprlib.Repr()  # for values that may be long or deeply nested
_short_repr.maxstring, _short_repr.maxother, _short_repr.maxlong = 200, 200, 420


def ignored_settings(config: Mapping[str, object]) -> list[str]:
    """Names of settings that are set and change nothing once the tensors are there."""
    unset: tuple[object, ...] = (None, {}, [], "", "none")
    return [
        key
        for key, value in sorted(config.items())
        if key in _WITHOUT_EFFECT and value not in unset and value is not False
    ]


def config_problems(config: Mapping[str, object]) -> list[str]:
    """Settings that are invalid, or that do more than add low-rank updates to linear layers."""
    problems = [f"{key} is missing" for key in ("peft_type", "r", "lora_alpha") if config.get(key) is None]
    for key, value in config.items():
        if key in _WITHOUT_EFFECT or value is None or (_is_unset(value) and key not in _TYPES):
            continue
        if key in _VALUES:
            if value not in _VALUES[key]:
                accepted = " or ".join(map(repr, _VALUES[key]))
                problems.append(f"{key} is {_short_repr.repr(value)}, and only {accepted} is accepted")
        elif key not in _TYPES:
            problems.append(f"{key} is set, which is not supported")
        elif not isinstance(value, _TYPES[key]) or (isinstance(value, bool) and bool not in _TYPES[key]):
            problems.append(
                f"{key} is {_short_repr.repr(value)}, which has the wrong type {type(value).__name__}"
            )
    rank_pattern, alpha_pattern = (
        _pattern_entries(config, "rank_pattern"),
        _pattern_entries(config, "alpha_pattern"),
    )
    for key, entries in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        if len(entries) > MAX_PATTERNS:  # each is tried on each layer
            return [*problems, f"{key} has {len(entries):,} keys, and at most {MAX_PATTERNS:,} are accepted"]
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        problems.append(f"target_parameters is {_short_repr.repr(parameters)}, and not a list of names")
    elif len(parameters) > MAX_PATTERNS:
        problems.append(
            f"target_parameters has {len(parameters):,} names, and at most {MAX_PATTERNS:,} are accepted"
        )
    ranks = {"r": config.get("r")} | rank_pattern
    problems += [
        f"{key} is {_short_repr.repr(rank)}, and a rank is a whole number from 1 to {MAX_RANK}"
        for key, rank in ranks.items()
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK
    ]
    alphas = {"lora_alpha": config.get("lora_alpha")} | alpha_pattern
    problems += [
        f"{key} is {_short_repr.repr(alpha)}, and an alpha is a number up to {MAX_ALPHA}"
        for key, alpha in alphas.items()
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -MAX_ALPHA <= alpha <= MAX_ALPHA
    ]
    for key in ranks | alphas:
        pattern, dot, name = key.partition(".")
        if dot and not is_pattern(name):
            problems.append(
                f"{pattern} has the key {_short_repr.repr(name)}, which is neither a layer name nor a usable pattern"
            )
    return problems


def is_pattern(name: str) -> bool:
    """Check a key that PEFT matches as a regular expression."""
    if not _PATTERN_KEY.fullmatch(name) or _LARGE_COUNT.search(name):
        return False
    try:
        re.compile(layer_expression(name))
        regex.compile(layer_expression(name))
    except (re.error, regex.error, OverflowError, RecursionError):
        return False
    return True


class PatternMatcher:
    """Matches a stranger's regular expressions, with a limit on the CPU time of all matches."""

    def __init__(self, expressions: Iterable[str]) -> None:
        self._expressions = [regex.compile(expression) for expression in expressions]
        self._seconds_left = _MATCH_SECONDS

    def first_match(self, name: str) -> int | None:
        """Index of the first expression that matches. Raises TimeoutError beyond the limit."""
        start = time.process_time()
        try:
            for index, expression in enumerate(self._expressions):
                if expression.match(name, timeout=max(self._seconds_left, 0.0)):
                    return index
        finally:
            self._seconds_left -= time.process_time() - start
        return None


class LayerPatterns:
    """Values of `rank_pattern` and `alpha_pattern` for layers.

    It is that of the first key that matches the end of a name, and kept: matching is slow.

    Args:
        patterns: value of each key, for each of PATTERN_SETTINGS.
    """

    def __init__(self, patterns: Mapping[str, Mapping[str, float]]) -> None:
        self._of_keys = {setting: [*pattern.values()] for setting, pattern in patterns.items()}
        self._matchers = {
            setting: PatternMatcher(map(layer_expression, pattern)) for setting, pattern in patterns.items()
        }
        self._of_layers: dict[tuple[str, str], float | None] = {}

    def value(self, setting: str, layer: str) -> float | None:
        """Return the value of a layer, None without one. Raises TimeoutError beyond the limit."""
        if (setting, layer) not in self._of_layers:
            index = self._matchers[setting].first_match(layer)
            self._of_layers[setting, layer] = None if index is None else self._of_keys[setting][index]
        return self._of_layers[setting, layer]

    def by_layer(self, layers: Iterable[str]) -> dict[str, dict[str, float]]:
        """Return both settings with the names of layers as keys: PEFT would match a stranger's
        expressions without a limit of time."""
        names = sorted(layers, key=len, reverse=True)  # the first key that matches an end counts
        by_layer: dict[str, dict[str, float]] = {}
        for setting in PATTERN_SETTINGS:
            values = {name: self.value(setting, name) for name in names}
            by_layer[setting] = {name: value for name, value in values.items() if value is not None}
        return by_layer


def layer_expression(key: str) -> str:
    """The expression by which PEFT matches a pattern key with the end of a layer's name."""
    return f"(.*\\.)?({key})$"


def _is_unset(value: object) -> bool:
    return value in (None, {}, [], "", False)  # 0 is False


def _pattern_entries(config: Mapping[str, object], key: str) -> dict[str, object]:
    pattern = config.get(key)
    return {f"{key}.{name}": value for name, value in pattern.items()} if isinstance(pattern, dict) else {}
