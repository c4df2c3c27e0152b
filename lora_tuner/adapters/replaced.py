"""Weights of the base that an adapter replaces, beside its LoRA pairs. Never imports torch.

- Rows of single tokens (`trainable_token_indices`): `MODULE.token_adapter.trainable_tokens_delta`,
  in the order of the ids in the config; for tied embeddings once, and the head follows.
- Whole modules (`modules_to_save`): under the names that their parameters have in the base. PEFT
  trains a copy, so a module that is tied to one of them keeps its own weights.
- Embeddings and head that were resized (`save_embedding_layers`): under the same names, but not in
  `modules_to_save`. PEFT loads them into the base itself, so what is tied to them follows.

Source: peft 0.21.2, utils/save_and_load.py and utils/other.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..text import format_names, format_rows
from .safetensors_header import Shape, bare_shapes, find_shape

Tensors = Mapping[str, tuple[str, Shape]]  # name -> (dtype, shape)
PREFIX = "base_model.model."
_ROWS, _RESIZED = ".token_adapter.trainable_tokens_delta", ".token_adapter.base_layer.weight"
_MODULE = re.compile(r"(?=.{1,260}$)\w+(?:\.\w+){0,19}", re.ASCII)
# Parts that PEFT puts into the names of its own tensors: under them there is no module of the base.
_OWN_PART = re.compile(r"(?:^|\.)(?:lora_\w+|modules_to_save|original_module|base_layer|token_adapter)(?:\.|$)")
_EMBEDDINGS = re.compile(r"(?:^|\.)(?:embed\w*|\w+_embeddings?|wte|(?:lm_)?head|output)$")
_MAX_ID = 2**31 - 1


@dataclass(frozen=True)
class ReplacedNames:
    """Names of what an adapter replaces.

    Args:
        rows: module -> ids of the tokens whose rows it has.
        modules: module -> parameter -> tensor in the file.
        copies: modules that are in `modules_to_save`, which others are not tied to.
        sizes: embedding or head -> rows of its whole weight.
        problems: tensor that is invalid or contradicts the config -> the reason.
    """

    rows: dict[str, tuple[int, ...]]
    modules: dict[str, dict[str, str]]
    copies: frozenset[str]
    sizes: dict[str, int]
    problems: dict[str, str]

    def __bool__(self) -> bool:
        return bool(self.rows or self.modules)

    def __str__(self) -> str:
        """Description for a reader, such as "2 rows of embed_tokens; whole norm"."""
        rows = [f"{format_rows(len(ids))} of {_last(module)}" for module, ids in sorted(self.rows.items())]
        whole = sorted({_last(module) for module in self.modules})
        return "; ".join([*rows, *([f"whole {format_names(whole)}"] if whole else [])])

    @cached_property
    def tensors(self) -> set[str]:
        """Names of the tensors in the file."""
        whole = {tensor for parameters in self.modules.values() for tensor in parameters.values()}
        return whole | set(map(rows_tensor, self.rows))

    def vocab_size(self, base_rows: int) -> int:
        """Number of token ids that base and adapter have rows for; `base_rows` are the base's."""
        largest = max((max(ids) + 1 for ids in self.rows.values()), default=0)
        return max(largest, max(self.sizes.values(), default=base_rows))

    def misfit(self, tensors: Tensors, shapes: Mapping[str, Shape]) -> str | None:
        """The first difference in size from the weights of a base; embeddings may have other rows.

        Args:
            tensors: those of the adapter.
            shapes: those of the base, by their names in its files; unknown ones are passed over.
        """
        bare = bare_shapes(shapes)
        found = [(module, "weight", rows_tensor(module)) for module in self.rows]
        found += [
            (module, name, tensor) for module, part in self.modules.items() for name, tensor in part.items()
        ]
        for module, parameter, tensor in sorted(found):
            base, own = find_shape(f"{module}.{parameter}", bare), tensors[tensor][1]
            is_resizable = module in self.rows or module in self.sizes
            if base is not None and (base[1:] != own[1:] if is_resizable else base != own):
                return f"{tensor} has shape {own}, and {base} in the base"
        return None


def rows_tensor(module: str) -> str:
    """Name of the tensor with the rows of a module's tokens."""
    return f"{PREFIX}{module}{_ROWS}"


def find_replaced(tensors: Tensors, config: Mapping[str, object]) -> ReplacedNames:
    """Find what the tensors of an adapter replace in the base."""
    rows: dict[str, tuple[int, ...]] = {}
    modules: dict[str, dict[str, str]] = {}
    sizes: dict[str, int] = {}
    problems: dict[str, str] = {}
    copies = set()
    for name, (_, shape) in tensors.items():
        path = name.removeprefix(PREFIX)
        module, _, parameter = path.rpartition(".")
        if path == name or not _MODULE.fullmatch(path):
            continue
        if path.endswith(_ROWS):
            module = path.removesuffix(_ROWS)
            ids = _token_ids(module, config.get("trainable_token_indices"))
            if problem := _rows_problem(ids, shape):
                problems[name] = problem
            elif ids is not None:
                rows[module] = ids
            continue
        is_copy = False
        if path.endswith(_RESIZED):
            module = path.removesuffix(_RESIZED)
        elif _OWN_PART.search(path):
            continue
        else:
            is_copy = _in_modules_to_save(module, config.get("modules_to_save"))
            if not is_copy and not (parameter == "weight" and len(shape) == 2 and _EMBEDDINGS.search(module)):
                continue
        modules.setdefault(module, {})[parameter] = name
        if is_copy:
            copies.add(module)
        if _EMBEDDINGS.search(module) and parameter == "weight" and len(shape) == 2:
            sizes[module] = shape[0]
    return ReplacedNames(rows, modules, frozenset(copies), sizes, problems)


def _token_ids(module: str, indices: object) -> tuple[int, ...] | None:
    """Ids in the config of the rows of a module; None without valid ones."""
    if isinstance(indices, dict):
        indices = next((ids for name, ids in indices.items() if module.endswith(str(name))), None)
    if not isinstance(indices, list) or not all(type(each) is int and 0 <= each <= _MAX_ID for each in indices):
        return None
    return tuple(indices)


def _rows_problem(ids: tuple[int, ...] | None, shape: Shape) -> str | None:
    if ids is None:
        return "has rows of tokens, of which trainable_token_indices does not tell the ids"
    if len(set(ids)) < len(ids) or not ids:
        return "has rows of tokens, of which trainable_token_indices names none, or one twice"
    if len(shape) != 2 or shape[0] != len(ids):
        return f"has shape {shape}, but trainable_token_indices has {len(ids):,} ids"
    return None


def _in_modules_to_save(module: str, setting: object) -> bool:
    """True where PEFT trains a copy of a module or of one around it: by the end of its name."""
    if not isinstance(setting, list):
        return False
    parts = module.split(".")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(name.endswith(str(each)) for each in setting if each for name in around)


def _last(module: str) -> str:
    return module.rpartition(".")[2]
