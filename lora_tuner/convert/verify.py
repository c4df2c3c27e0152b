"""What a model says, beside what it should say: the logits of a few rows, the best tokens and the loss of all.

Limit: it compares what it is given. On rows of another kind two models that agree here might differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from ..adapters.adapter import Adapter
from ..data import tokenization
from ..errors import AdapterError, EventHandler, Progress
from ..evaluation import HeldOutLoss
from ..inference.multi_lora import MultiLora
from ..models import lora
from ..models.delta import Deltas
from ..models.loading import LoadedBase

TOLERANCE = 1e-4  # of logits in float32, beside the largest of them where that is over 1
LOSS_TOLERANCE, AGREEMENT = 0.02, 0.9  # of a merged model in fewer bits: nats a token, share of equal best tokens
COMPARED_ROWS, COMPARED_TOKENS = 4, 64  # whose logits are compared one by one


@dataclass(frozen=True)
class OutputComparison:
    """What was written, read back, beside what it should do: the largest difference of the logits of the first few rows, the
    share of positions of all rows with the same best token, and their losses in nats a token (should, does); None where there
    are no held-out rows."""

    max_logit_difference: float
    top1_agreement: float
    losses: tuple[float, float] | None
    rows: int


@dataclass(frozen=True)
class ModelOutputs:
    """What a model says to rows: logits of a few positions, (positions, words), the best word of each, the loss of all."""

    logits: torch.Tensor
    top_tokens: torch.Tensor
    losses: HeldOutLoss


def forward_outputs(
    model: Any, rows: Sequence[tokenization.TokenIds], notify: EventHandler, stage: str
) -> ModelOutputs:
    logits, best, nll = [], [], []
    for number, row in enumerate(rows):
        ids = torch.from_numpy(tokenization.token_ids(row).astype("int64"))[None].to(model.device)
        learnt = torch.from_numpy(row[1:] >= 0).to(model.device)
        with torch.inference_mode():
            said = model(input_ids=ids, use_cache=False).logits[0].float()
            each = F.cross_entropy(said[:-1], ids[0, 1:], reduction="none")
            nll.append(float(each[learnt].cpu().double().sum()))
        best.append(said.argmax(-1).cpu())
        if number < COMPARED_ROWS:
            logits.append(said[:COMPARED_TOKENS].cpu().clone())
        notify(Progress(stage, number + 1, len(rows)))
    return ModelOutputs(
        torch.cat(logits), torch.cat(best), HeldOutLoss(nll, [tokenization.count_predictions(row) for row in rows])
    )


def forward_with_peft(
    base: LoadedBase, adapter: Adapter, rows: Sequence[tokenization.TokenIds], notify: EventHandler
) -> ModelOutputs:
    """As PEFT reads the adapter, by its own way with names, ranks and scales."""
    wrapped = lora.load_lora(base.model, adapter, "proof")
    try:
        return forward_outputs(wrapped, rows, notify, "read back, by PEFT")
    finally:
        wrapped.unload()


def forward_with_adapter(
    base: LoadedBase, adapter: Adapter, rows: Sequence[tokenization.TokenIds], notify: EventHandler
) -> ModelOutputs:
    bank = MultiLora(base)
    with bank.apply_hooks(bank.hooks([bank.load(adapter)])):
        found = forward_outputs(base.model, rows, notify, "the adapter beside its base")
    if not found.logits.isfinite().all():
        raise AdapterError(f"{adapter.path} gives logits that are not finite: its numbers are too large for this base.")
    return found


def add_to_weights(base: LoadedBase, sums: Deltas) -> None:
    layers = lora.linear_layers(base.model)
    for module, update in sums.items():
        delta = (update.B.double() @ update.A.double()).float().to(base.device)
        layer = layers[module]
        layer.weight.data += delta.T if isinstance(layer, Conv1D) else delta


def compare_outputs(should: ModelOutputs, does: ModelOutputs, *, measured: bool) -> OutputComparison:
    return OutputComparison(
        max_logit_difference=float((should.logits - does.logits).abs().max()),
        top1_agreement=float((should.top_tokens == does.top_tokens).double().mean()),
        losses=(should.losses.loss, does.losses.loss) if measured else None,
        rows=len(should.losses.nll),
    )


def find_mismatch(proof: OutputComparison, should: ModelOutputs, *, exact: bool) -> str | None:
    """What is wrong with it, if anything. In fewer bits than float32 logits differ, and what it is worth is compared."""
    accepted = TOLERANCE * max(1.0, float(should.logits.abs().max()))
    if exact and not proof.max_logit_difference <= accepted:  # NaN is none
        return f"has logits that differ by {proof.max_logit_difference:.2g}, and {accepted:.2g} is accepted"
    if not exact and proof.top1_agreement < AGREEMENT:
        return f"has the same best token at {proof.top1_agreement:.0%} of positions, and {AGREEMENT:.0%} are asked for"
    if proof.losses and not abs(proof.losses[1] - proof.losses[0]) <= LOSS_TOLERANCE:
        return f"has a held-out loss of {proof.losses[1]:.4f}, and {proof.losses[0]:.4f} is right"
    return None
