"""Positions of a base: explicit ids count from 0, and end where its table of positions does."""

import inspect
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .base_files import quiet_transformers

NO_LIMIT = 2**31  # context length of a base without one
# Names of the context length in configs. `max_length` and windows of attention are other things.
_CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "max_seq_length",
    "seq_length", "seq_len",
)  # fmt: skip


def set_positions(model: PreTrainedModel) -> int:
    """Make explicit position ids count from 0, and return the longest sequence in tokens.

    RoBERTa counts from 1 or more, but takes position ids as rows of its table.
    """
    config = model.config.get_text_config()
    stated = [getattr(config, name, None) for name in _CONTEXT_NAMES]
    limit = next((value for value in stated if isinstance(value, int) and value > 0), NO_LIMIT)
    if sum(isinstance(module, torch.nn.Embedding) for module in model.modules()) < 2:
        return limit
    tables = _look_up_positions(model)
    if not tables:
        return limit
    first = min(first for first, _ in tables)
    if first and "position_ids" in inspect.signature(model.forward).parameters:
        explicit = _look_up_positions(model, position_ids=torch.arange(3, device=model.device)[None])
        if shift := first - min((row for row, _ in explicit), default=first):
            model.register_forward_pre_hook(partial(_shift_positions, shift), with_kwargs=True)
    return min(rows - first for first, rows in tables)


def _shift_positions(
    shift: int, model: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Forward hook that adds to the position ids, where they are given."""
    positions = kwargs.get("position_ids")
    if isinstance(positions, torch.Tensor):
        kwargs = kwargs | {"position_ids": positions + shift}
    return args, kwargs


def _look_up_positions(model: PreTrainedModel, **inputs: torch.Tensor) -> list[tuple[int, int]]:
    """First row and number of rows of the tables that a model looks up three positions in."""
    vocabulary = model.get_input_embeddings().get_parameter("weight")
    # Ids that do not ascend, as positions do.
    token_ids = torch.tensor([[3, 1, 2]], device=vocabulary.device) + len(vocabulary) // 2
    tables = _PositionTables()
    with quiet_transformers(), torch.no_grad(), tables:
        model(input_ids=token_ids, use_cache=False, **inputs)
    return tables.found


class _PositionTables(TorchFunctionMode):
    """First row and number of rows of each embedding that is looked up at ascending positions.

    OPT, BART and RoBERTa begin at a row other than 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[torch.Tensor, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if function is F.embedding:
            rows, weight = args[0].flatten().tolist(), args[1]
            if rows == [rows[0], rows[0] + 1, rows[0] + 2]:
                self.found.append((rows[0], len(weight)))
        return function(*args, **(kwargs or {}))
