"""Check on the loaded base that rows in one sequence do not see each other.

A few tokens are run alone, and packed with others: the logits must be the same.
"""

import contextlib
from typing import cast

import numpy as np
import torch

from ..data import packing, tokenization
from ..errors import BaseModelError
from ..models import kernels
from ..models.loading import LoadedBase


def _packed_logits(base: LoadedBase, *rows: tokenization.TokenIds, cu_seqlens: bool = False) -> torch.Tensor:
    """Return the logits of rows in one sequence: (tokens, vocabulary), float32, on the CPU."""
    batch = packing.collate([rows], base.tokenizer.pad_token_id, cu_seqlens=cu_seqlens)
    inputs = {name: tensor.to(base.device) for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        return cast("torch.Tensor", base.model(**inputs, use_cache=False).logits[0].float().cpu())


def _logits_differ(base: LoadedBase, logits: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = (1e-3 if base.dtype == torch.float32 else 5e-2) * float(expected.abs().max())
    return bool((logits - expected).abs().max() > tolerance)


def packing_is_isolated(base: LoadedBase) -> bool:
    """Return whether packed rows have the logits they have alone. Some models ignore position ids.

    Raises:
        BaseModelError: the model sees tokens that come later, so a loss would be meaningless.
    """
    first, second = base.probe_sequences()
    alone = _packed_logits(base, second)
    changed = np.append(second[:-1], first[-1])
    if _logits_differ(base, _packed_logits(base, changed)[:-1], alone[:-1]):
        raise BaseModelError(f"{base.files.name} sees tokens that come later: it is not a causal language model.")
    return not _logits_differ(base, _packed_logits(base, first, second)[len(first) :], alone)


def try_varlen_attention(base: LoadedBase) -> bool:
    """Compute the attention of packed rows row by row, if the logits stay the same."""
    rows = base.probe_sequences()
    before = _packed_logits(base, *rows)
    if not kernels.enable_varlen_attention(base.model):
        return False
    with contextlib.suppress(TypeError):  # a model without `cu_seq_lens_q`
        if not _logits_differ(base, _packed_logits(base, *rows, cu_seqlens=True), before):
            return True
    kernels.enable_varlen_attention(base.model, on=False)
    return False
