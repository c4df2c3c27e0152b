"""Load what an adapter has in place of weights of the base, and write it into a base that is merged.

`adapters/replaced.py` finds the tensors, `replacement` applies them while a batch runs. What PEFT
would compute otherwise, or leave undefined, is refused.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapters.adapter import WEIGHTS_FILE
from ..adapters.replaced import rows_tensor
from ..errors import AdapterError
from .base_files import quiet_transformers
from .quantization import Int4Linear, Int8Linear, is_quantized
from .replacement import Replacement, Replacements, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..adapters.adapter import Adapter
    from .loading import LoadedBase

Tensors = dict[str, torch.Tensor]


def vocabulary_modules(model: PreTrainedModel) -> dict[str, str]:
    """Full name of the input embedding and of the output head -> embedding, head."""
    parts = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: kind for kind, module in parts.items() if module in names}


def other_token_tables(model: PreTrainedModel) -> list[str]:
    """Names of other embeddings with a row for each token, as Gemma 3n and 4 have for their layers."""
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module.weight is not embedding.weight
        and (len(module.weight) == len(embedding.weight) or "per_layer" in name)
    ]


def is_tied(model: PreTrainedModel) -> bool:
    """True where the output head has the weights of the input embedding."""
    head = model.get_output_embeddings()
    if isinstance(head, Int8Linear | Int4Linear):  # a copy, as quantized
        return bool(getattr(model.config, "tie_word_embeddings", False))
    return head is not None and head.get_parameter("weight") is model.get_input_embeddings().get_parameter(
        "weight"
    )


def load_replaced(adapter: Adapter, base: LoadedBase) -> Replacements:
    """Load what an adapter replaces in a base, which stays as it is.

    Raises:
        AdapterError: the base lacks a module, or has another one there.
    """
    names = adapter.replaced
    if not names:
        return {}
    try:
        tensors = load_file(adapter.path / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{adapter.path / WEIGHTS_FILE} is not readable as safetensors: {error}.") from error
    if any(
        name not in tensors or tuple(tensors[name].shape) != adapter.tensors[name][1] for name in names.tensors
    ):
        raise AdapterError(f"{adapter.path} has changed since it was opened: open it again.")
    model, device = base.model, base.device
    kinds, tied = vocabulary_modules(model), is_tied(model)
    vocab_size = names.vocab_size(base.vocab_size)
    rows: dict[str, Rows] = {}
    for module, ids in names.rows.items():
        if module not in kinds:
            raise _misfit(adapter, f"{module} is not the input embedding or the output head of the base")
        values = tensors[rows_tensor(module)].to(torch.float32, copy=True)
        order = sorted(range(len(ids)), key=ids.__getitem__)
        rows[module] = torch.tensor(ids)[order].to(device), values[order].to(device)
    copies: dict[str, nn.Module] = {}
    for module, parameters in names.modules.items():
        if module not in kinds and module in names.sizes and module not in names.copies:
            raise _misfit(adapter, f"{module} is not the input embedding or the output head of the base")
        copies[module] = _copy_module(
            adapter, base, module, {name: tensors[tensor] for name, tensor in parameters.items()}
        )
    if tied:
        _follow_ties(adapter, model, rows, copies)
    replaced = {}
    is_resized = vocab_size != base.vocab_size
    if vocab_size > base.vocab_size and (others := other_token_tables(model)):
        raise _misfit(
            adapter,
            f"it has more tokens than the base, and no rows of {others[0]}, which has one for each token too",
        )
    for module in {**rows, **copies, **(kinds if is_resized else {})}:
        kind = kinds.get(module, "other")
        size = vocab_size if kind != "other" else 0
        replaced[module] = Replacement(kind, size, copies.get(module), rows.get(module))
        if kind != "other":
            _check_rows(adapter, base, module, replaced[module])
    return replaced


def _misfit(adapter: Adapter, problem: str) -> AdapterError:
    return AdapterError(f"{adapter.path} does not fit the base: {problem}.")


def _copy_module(adapter: Adapter, base: LoadedBase, module: str, tensors: Tensors) -> nn.Module:
    """A copy of a module of the base, or a plain one of a quantized layer, with other weights."""
    try:
        layer = base.model.get_submodule(module)
    except AttributeError as error:
        hint = " (a classifier, and this base writes text)" if re.search("score|classif", module) else ""
        raise _misfit(adapter, f"the base has no module {module}{hint}") from error
    is_linear = type(layer) in (nn.Linear, Conv1D) or is_quantized(layer)
    if not (is_linear or isinstance(layer, nn.Embedding) or "Norm" in type(layer).__name__):
        raise _misfit(
            adapter,
            f"{module} is replaced as a whole, and of a {type(layer).__name__} the base may use "
            "weights without running it: merge the adapter with PEFT (merge_and_unload), and give "
            "the result as --base",
        )
    expected = {name: parameter.shape for name, parameter in layer.named_parameters(recurse=False)}
    if isinstance(layer, nn.Linear | Int8Linear | Int4Linear):  # quantized ones too
        expected["weight"] = torch.Size((layer.out_features, layer.in_features))
        is_head = module in vocabulary_modules(base.model)
        if is_quantized(layer) and adapter.config.get("fan_in_fan_out") and not is_head:
            # GPT-2's layers are transposed, quantized ones are not.
            tensors = {name: tensor.T if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    parameters = {}
    for name, tensor in tensors.items():
        if name not in expected:
            raise _misfit(adapter, f"{module} has no {name} in the base")
        is_resizable = module in adapter.replaced.sizes and name == "weight"
        if tensor.shape[1:] != expected[name][1:] or not (is_resizable or tensor.shape == expected[name]):
            sizes = " and ".join(" x ".join(map(str, shape)) for shape in (expected[name], tensor.shape))
            raise _misfit(adapter, f"{module}.{name} has sizes {sizes} in base and adapter")
        value = tensor.to(base.device, base.dtype, copy=True)
        parameters[name] = nn.Parameter(value, requires_grad=False)
    return _with_parameters(layer, parameters)


def _with_parameters(layer: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """A module that computes as another one, without its hooks, with some parameters of its own."""
    if type(layer) is nn.Linear or is_quantized(layer):
        plain: nn.Module = nn.Linear(1, 1, bias=False, device="meta")
        if layer.bias is not None:
            plain.bias = layer.bias
    else:
        plain = copy.copy(layer)
        plain._parameters = dict(layer._parameters)
        plain._forward_hooks, plain._forward_pre_hooks = OrderedDict(), OrderedDict()
        if isinstance(plain, nn.Embedding):
            plain.padding_idx = None  # without effect on outputs
    for name, parameter in parameters.items():
        setattr(plain, name, parameter)
    return plain.eval()


def _follow_ties(
    adapter: Adapter, model: PreTrainedModel, rows: dict[str, Rows], copies: dict[str, nn.Module]
) -> None:
    """Give tied modules what PEFT gives them: rows, and resized weights, but no trained copy."""
    embedding, head = sorted(kinds := vocabulary_modules(model), key=kinds.__getitem__)
    if embedding in rows:
        rows.setdefault(head, rows[embedding])
    resized = [module for module in (embedding, head) if module in copies.keys() - adapter.replaced.copies]
    if len(resized) == 1 and not adapter.replaced.copies & {embedding, head}:
        weight = copies[resized[0]].get_parameter("weight")
        other = head if resized[0] == embedding else embedding
        copies[other] = _with_parameters(model.get_submodule(other), {"weight": weight})
    elif len(resized) == 2:
        one, two = (copies[module].get_parameter("weight") for module in resized)
        if one.shape != two.shape or not torch.equal(one, two):
            raise _misfit(adapter, f"{embedding} and {head} are tied in the base and differ in the adapter")


def _check_rows(adapter: Adapter, base: LoadedBase, module: str, replacement: Replacement) -> None:
    """Raise AdapterError where tokens lack a row, or PEFT computes something else."""
    layer = base.model.get_submodule(module)
    if replacement.rows is not None and replacement.kind == "head" and getattr(layer, "bias", None) is not None:
        raise _misfit(
            adapter, f"PEFT leaves out the bias of {module} where single rows are replaced, so both would differ"
        )
    whole = replacement.module.get_parameter("weight") if replacement.module is not None else None
    size = base.vocab_size if whole is None else len(whole)
    own = set(replacement.rows[0].tolist()) if replacement.rows else set()
    if lacking := [number for number in range(size, replacement.vocab_size) if number not in own]:
        raise _misfit(
            adapter,
            f"its embeddings were resized to {replacement.vocab_size:,} rows, and it lacks row {lacking[0]:,} of {module}",
        )


def untrained_rows(base: LoadedBase, vocab_size: int) -> Replacements:
    """Rows for token ids beyond those of the base: the mean of its own, as before training."""
    added = vocab_size - base.vocab_size
    if added <= 0:
        return {}
    ids = torch.arange(base.vocab_size, vocab_size, device=base.device)
    replaced = {}
    for module, kind in vocabulary_modules(base.model).items():
        values = mean_row(base.model.get_submodule(module)).expand(added, -1)
        replaced[module] = Replacement(kind, vocab_size, None, (ids, values))
    return replaced


def mean_row(layer: nn.Module) -> torch.Tensor:
    """Mean of the rows of an embedding or head in float32, with which new tokens begin.

    So they change the probabilities of others least (Hewitt, 2021,
    nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    mean: torch.Tensor = cast(nn.Embedding | nn.Linear, layer).weight.detach().mean(0, dtype=torch.float32)
    return mean


def write_replaced(model: PreTrainedModel, replaced: Replacements) -> None:
    """Write replacements into the weights of a plain float base, resized and untied where needed."""
    kinds = {replacement.kind: replacement for replacement in replaced.values()}
    embedding, head = kinds.get("embedding"), kinds.get("head")
    size = next((each.vocab_size for each in (embedding, head) if each), 0)
    if size and size != len(model.get_input_embeddings().get_parameter("weight")):
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(size, mean_resizing=False)
    if is_tied(model) and not _same(embedding, head):
        output = cast(nn.Linear, model.get_output_embeddings())
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
        for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    for name, replacement in replaced.items():
        layer = model.get_submodule(name)
        if replacement.module is not None:
            for parameter, value in replacement.module.named_parameters(recurse=False):
                layer.get_parameter(parameter).data.copy_(value.data)
        if replacement.rows is not None:
            ids, values = replacement.rows
            weight = layer.get_parameter("weight").data
            weight[ids] = values.to(weight)


def _same(embedding: Replacement | None, head: Replacement | None) -> bool:
    """True where tied modules stay tied."""
    if embedding is None or head is None:
        return embedding is head
    weights = [each.module.get_parameter("weight") for each in (embedding, head) if each.module is not None]
    same_weights = not weights or (len(weights) == 2 and torch.equal(*weights))
    return embedding.rows is head.rows and same_weights
