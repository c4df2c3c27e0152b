"""Layers of a base as the headers of its weight files tell them. Never imports torch.

Names in files may lack the first parts of a layer's name, weights may be transposed (GPT-2's are),
and each expert may have tensors of its own.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ..adapters.adapter import Adapter
from ..adapters.base_config import find_base_folder
from ..adapters.safetensors_header import bare_name, bare_shapes, find_shape, read_json
from ..text import describe_coverage
from . import stored_weights

# Projections of one expert that a parameter of transformers 5 holds, by their names in files.
_PROJECTIONS = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "down_proj": ("down_proj", "w2"),
    "up_proj": ("up_proj", "w1"),
}


class _Files(Protocol):
    """Files of a base (`base_files.BaseModelFiles`)."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    @property
    def vocab_size(self) -> int | None: ...


def layer_sizes_in_files(files: _Files, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """(in_features, out_features) of the base layers that an adapter names, (experts, in, out) of
    experts.

    Layers that the file headers do not tell are left out.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    shapes, vocab_size = bare_shapes(files.shapes), files.vocab_size
    for module in adapter.modules:
        size = adapter.layer_size(module)
        if module in adapter.experts:
            if found := _expert_size(shapes, module, size):
                sizes[module] = found
            continue
        shape = find_shape(f"{module}.weight", shapes) or ()
        if len(shape) != 2 or vocab_size in shape:  # embeddings and head
            continue
        stored = shape if adapter.config.get("fan_in_fan_out") else shape[::-1]
        sizes[module] = size if size in (shape, shape[::-1]) else stored
    return sizes


def coverage_in_folder(folder: Path, adapter: Adapter) -> float | None:
    """Share of the block weights of a base in the layers that an adapter names; None where its
    files do not tell, as where they are packed."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        return None
    if stored_weights.configured_quantization(config) not in (None, "8bit", "4bit"):
        return None
    try:
        shapes = bare_shapes(stored_weights.read_stored_tensors(stored_weights.weight_files(folder)).shapes)
    except (OSError, ValueError, KeyError):
        return None
    totals = {_blocks(bare_name(module)): 0 for module in adapter.modules}
    for name, shape in shapes.items():
        stored = _blocks(name)
        for block in totals if stored and len(shape) > 1 else ():
            if f".{block}".endswith(f".{stored}"):
                totals[block] += math.prod(shape)
    covered = sum(math.prod(adapter.layer_size(module)) for module in adapter.modules)
    total = sum(totals.values())
    return covered / total if all(totals.values()) and covered <= total else None


def known_coverage(adapter: Adapter) -> str:
    """Share of the block weights that an adapter covers, in words; "" where neither its manifest
    nor a base on this machine tells. Sends no request."""
    run = adapter.manifest.run if adapter.manifest else None
    if run is not None and run.coverage is not None:
        return describe_coverage(run.coverage, run.not_adapted)
    folder = find_base_folder(adapter)
    coverage = coverage_in_folder(folder, adapter) if folder is not None else None
    return "" if coverage is None else describe_coverage(coverage, [])


def _blocks(name: str) -> str:
    """The part of a name in front of the number of its block, "" outside of blocks."""
    match = re.match(r"(.*?)\.\d+\.", name)
    return match[1] if match else ""


def _expert_size(
    shapes: Mapping[str, tuple[int, ...]], name: str, expected: tuple[int, ...]
) -> tuple[int, ...] | None:
    """(experts, in, out) of the weights of all experts, from the shapes in files; None if unknown.

    Files have them as one tensor, whose sides may be in either order, or each expert and each of
    its projections alone (w1 and w3, or gate_proj and up_proj, are gate_up_proj in transformers 5).

    Args:
        shapes: those of the tensors in the files (`bare_shapes`).
        name: the parameter, such as `model.layers.0.mlp.experts.gate_up_proj`.
        expected: the size that decides between the two orders.
    """
    if len(shape := find_shape(name, shapes) or ()) == 3:
        count, first, second = shape
        return expected if (count, second, first) == expected or shape == expected else (count, second, first)
    parts = name.split(".")
    block = next((part for part in parts if part.isdigit()), "")
    parameter = parts[-1]
    projections = _PROJECTIONS.get(parameter, (parameter,))
    single = re.compile(rf"(?:.*\.)?layers\.{block}\.(?:\w+\.)*experts\.(\d+)\.({'|'.join(projections)})\.weight")
    found = {match.group(1, 2): shape for each, shape in shapes.items() if (match := single.fullmatch(each))}
    sides = set(found.values())
    if not found or len(sides) != 1 or len(min(sides)) != 2:
        return None
    experts, kinds = ({key[index] for key in found} for index in (0, 1))
    size_out, size_in = min(sides)
    return (len(experts), size_in, size_out * len(kinds)) if len(found) == len(experts) * len(kinds) else None
