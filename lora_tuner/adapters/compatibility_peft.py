"""Check whether PEFT loads every tensor of an adapter (peft 0.21.2)."""

import json
import re

from . import peft_config
from .adapter import Adapter
from .base_config import BaseConfig, is_in_wrapper, is_wrapper
from .compatibility_report import CompatibilityReport, advise_merge


def check_peft(adapter: Adapter, name: str, base_config: BaseConfig | None, report: CompatibilityReport) -> None:
    """PEFT adapts the layers that its settings select, and silently drops the tensors of others."""
    rewrite = (
        advise_merge(name) if adapter.replaced else f"rewrite it (`python cli.py blend {name}=1 --name NEW`)"
    )
    _check_replaced_in_peft(adapter, base_config, report, rewrite)
    if base_config is not None and is_wrapper(base_config):
        whole = any(map(is_in_wrapper, adapter.modules))
        classes = ("AutoModelForMultimodalLM", "AutoModelForCausalLM")
        right, wrong = classes if whole else classes[::-1]
        model = "the whole model" if whole else "the text model alone"
        report.notes.append(
            f"its layers are named as in {model}: load the base with {right}. On that of {wrong}, where it is another, PEFT "
            "would apply nothing, without an error"
        )
    targets, excluded = adapter.config.get("target_modules"), adapter.config.get("exclude_modules")
    if targets == "all-linear" and "lm_head" in adapter.targets:
        report.errors.append(
            "PEFT would skip lm_head, which all-linear does not include: list the layers by name "
            "in adapter_config.json"
        )
    for setting, wanted, pattern in (("target_modules", True, targets), ("exclude_modules", False, excluded)):
        if pattern == "all-linear" or (setting == "exclude_modules" and not pattern):
            continue
        # Parameters are chosen by target_parameters alone, whose names the file follows.
        modules = [module for module in adapter.modules if module not in adapter.experts]
        matched = _matched_by_peft(pattern, modules)
        if matched is None:
            report.notes.append(f"{setting} is the pattern {pattern!r}, which was not checked")
        elif skipped := [module for module in modules if (module in matched) != wanted]:
            reason = "does not name" if wanted else "names"
            report.errors.append(f"PEFT would skip {skipped[0]}, which {setting} {reason}: {rewrite}")
    lists = adapter.config.get("layers_pattern") or []
    lists = lists if isinstance(lists, list) else [lists]
    if not all(re.fullmatch(r"\w+", str(name)) for name in lists):
        report.notes.append(f"layers_pattern is {lists}, which was not checked")
    elif isinstance(targets, list) and (skipped := _outside_transformed_layers(adapter, targets, lists)):
        report.errors.append(f"PEFT would skip {skipped[0]}, which layers_to_transform does not name: {rewrite}")
    initialization = adapter.config.get("init_lora_weights", True)
    if not initialization:  # null as well
        report.errors.append(
            f"init_lora_weights is {json.dumps(initialization)}, so PEFT would give layers without "
            f"tensors random weights: {rewrite}"
        )
    if adapter.experts and (conflicts := _not_for_parameters(adapter)):
        report.errors.append(f"PEFT refuses target_parameters with {', '.join(conflicts)}: {rewrite}")
    if initialization == "orthogonal" and any(adapter.rank_of(module) % 2 for module in adapter.modules):
        report.errors.append(
            f"init_lora_weights is orthogonal, which PEFT does not support for odd ranks: {rewrite}"
        )


def _not_for_parameters(adapter: Adapter) -> list[str]:
    """Settings that are set, and with which PEFT adapts no parameters (`ParamWrapper` in its
    tuners/lora/layer.py)."""
    names = ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora", "velora_config", "kasa_config")
    return [name for name in names if adapter.config.get(name)]


def _check_replaced_in_peft(
    adapter: Adapter, base_config: BaseConfig | None, report: CompatibilityReport, rewrite: str
) -> None:
    """PEFT loads such weights into a base that has been resized, and fails for those that are missing."""
    if adapter.config.get("trainable_token_indices") and not adapter.replaced.rows:
        report.errors.append(
            f"PEFT would fail: the file has no rows for trainable_token_indices in adapter_config.json: {rewrite}"
        )
    saved = adapter.config.get("modules_to_save")
    if lacking := [
        each
        for each in (saved if isinstance(saved, list) else [])
        if not any(str(each) in module for module in adapter.replaced.copies)
    ]:
        report.notes.append(
            f"modules_to_save names {lacking[0]}, which the file lacks: if the base has such a module, PEFT fails"
        )
    rows = ((base_config or {}).get("text_config") or base_config or {}).get("vocab_size")
    size = adapter.replaced.vocab_size(0)
    if size and (rows is None or adapter.replaced.vocab_size(rows) != rows):
        condition = "" if rows is not None else f", if it has fewer than {size:,} embeddings"
        report.notes.append(f"first resize the base{condition}: base.resize_token_embeddings({size})")


def _matched_by_peft(pattern: object, modules: list[str]) -> set[str] | None:
    """Layers that a list of names or a regular expression selects; None if that cannot be told."""
    if not isinstance(pattern, str):
        names = [str(name) for name in pattern] if isinstance(pattern, list) else []
        endings = tuple(f".{name}" for name in names)
        return {module for module in modules if f".{module}".endswith(endings)}
    if not peft_config.is_pattern(pattern):
        return None
    matcher = peft_config.PatternMatcher([rf"(?:{pattern})\Z"])
    try:
        return {module for module in modules if matcher.first_match(module) is not None}
    except TimeoutError:
        return None


def _outside_transformed_layers(adapter: Adapter, targets: list[str], lists: list[str]) -> list[str]:
    """Layers with tensors that `layers_to_transform` leaves out. Names in full are always taken."""
    selected = adapter.config.get("layers_to_transform")
    if selected is None or selected == []:
        return []
    indexes = selected if isinstance(selected, list) else [selected]
    outside = []
    for module in adapter.modules:
        if module in adapter.experts:
            continue
        matches = (re.match(rf".*\.{name}\.(\d+)\.", module) for name in lists or ("[^.]*",))
        found = next((int(match[1]) for match in matches if match), None)
        if module not in targets and found not in indexes:
            outside.append(module)
    return outside
