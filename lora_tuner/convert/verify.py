"""Compare what a saved model or adapter computes with what it should compute: logits, top tokens
and loss.

The comparison covers the given rows only; models that agree on them may differ elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from ..adapters.adapter import Adapter
from ..adapters.gains import HeldOutLoss
from ..data import tokenization
from ..errors import AdapterError, EventHandler, Progress
from ..inference.multi_lora import MultiLora
from ..models import lora
from ..models.delta import Deltas
from ..models.experts import ExpertWeights
from ..models.layers import adaptable_layers
from ..models.loading import LoadedBase

# Of logits in float32, relative to the largest where that is over 1. SmolLM2 differs by 1e-6; without
# one layer's update, of an adapter of two steps, by 2e-4.
TOLERANCE = 5e-5
# A few positions amplify rounding: SmolLM2's second token by 160, in float32 against float64.
OUTLIERS, OUTLIER_TOLERANCE = 0.1, 2e-3
LOSS_TOLERANCE = 0.02  # nats per token, for lower precisions
MIN_AGREEMENT = 0.9  # share of positions with the same top token, for lower precisions
COMPARED_ROWS, COMPARED_TOKENS = 4, 64  # rows and tokens of which all logits are compared


@dataclass(frozen=True)
class OutputComparison:
    """Differences between expected and actual outputs.

    Args:
        max_logit_difference: over the first `COMPARED_TOKENS` tokens of the first `COMPARED_ROWS`
            rows.
        top1_agreement: share of all positions with the same most likely token.
        losses: expected and actual loss in nats per token; None without held-out rows.
        rows: number of rows.
    """

    max_logit_difference: float
    top1_agreement: float
    losses: tuple[float, float] | None
    rows: int


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of a model for some rows.

    Args:
        logits: (positions, vocabulary) of the first rows.
        top_tokens: (positions,) of all rows.
        losses: summed loss of each row.
    """

    logits: torch.Tensor
    top_tokens: torch.Tensor
    losses: HeldOutLoss


def compared_part(rows: Sequence[tokenization.TokenIds]) -> list[tokenization.TokenIds]:
    """The part of the rows whose logits `forward_outputs` keeps."""
    return [row[:COMPARED_TOKENS] for row in rows[:COMPARED_ROWS]]


def forward_outputs(
    model: Any, rows: Sequence[tokenization.TokenIds], notify: EventHandler, stage: str
) -> ModelOutputs:
    """Run a model on each row alone. `stage` names the progress events."""
    compared_logits, top_tokens, row_losses = [], [], []
    for number, row in enumerate(rows):
        ids = torch.from_numpy(tokenization.token_ids(row).astype("int64"))[None].to(model.device)
        predicted = torch.from_numpy(row[1:] >= 0).to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
            row_losses.append(float(losses[predicted].cpu().double().sum()))
        top_tokens.append(logits.argmax(-1).cpu())
        if number < COMPARED_ROWS:
            compared_logits.append(logits[:COMPARED_TOKENS].cpu().clone())
        notify(Progress(stage, number + 1, len(rows)))
    predictions = [tokenization.count_predictions(row) for row in rows]
    return ModelOutputs(torch.cat(compared_logits), torch.cat(top_tokens), HeldOutLoss(row_losses, predictions))


def forward_with_peft(
    base: LoadedBase, adapter: Adapter, rows: Sequence[tokenization.TokenIds], notify: EventHandler
) -> ModelOutputs:
    """Run the base with the adapter as loaded by PEFT."""
    model = lora.load_lora(base.model, adapter, "verify")
    try:
        return forward_outputs(model, rows, notify, "running the saved adapter")
    finally:
        model.unload()


def forward_with_adapter(
    base: LoadedBase, adapter: Adapter, rows: Sequence[tokenization.TokenIds], notify: EventHandler
) -> ModelOutputs:
    """Run the base with the adapter as in inference. Raises AdapterError for non-finite logits."""
    multi_lora = MultiLora(base)
    with multi_lora.apply_hooks(multi_lora.hooks([multi_lora.load(adapter)])):
        outputs = forward_outputs(base.model, rows, notify, "running base and adapter")
    if not outputs.logits.isfinite().all():
        raise AdapterError(
            f"{adapter.path} gives logits that are not finite: its weights are too large for this base."
        )
    return outputs


def add_to_weights(base: LoadedBase, deltas: Deltas) -> None:
    """Add LoRA updates to the base's weights, in place."""
    layers = adaptable_layers(base.model)
    for module, update in deltas.items():
        layer = layers[module]
        if isinstance(layer, ExpertWeights):
            delta = layer.delta(update.A.double(), update.B.double())
        else:
            delta = update.B.double() @ update.A.double()
        delta = delta.float().to(base.device)
        layer.weight.data += delta.T if isinstance(layer, Conv1D) else delta


def compare_outputs(expected: ModelOutputs, actual: ModelOutputs, *, with_loss: bool) -> OutputComparison:
    return OutputComparison(
        max_logit_difference=float((expected.logits - actual.logits).abs().max()),
        top1_agreement=float((expected.top_tokens == actual.top_tokens).double().mean()),
        losses=(expected.losses.loss, actual.losses.loss) if with_loss else None,
        rows=len(expected.losses.nll),
    )


def exact_mismatch(expected: torch.Tensor, actual: torch.Tensor) -> str | None:
    """Describe a difference of logits in float32 that is not rounding; None if there is none.

    It is told by the positions that differ least, but for a few: a wrong update of one layer
    changes all of them.

    Args:
        expected: (positions, vocabulary).
        actual: the same shape.
    """
    scale = max(1.0, float(expected.abs().max()))
    differences = (expected - actual).abs().amax(-1)
    for share, tolerance in ((1 - OUTLIERS, TOLERANCE * scale), (1.0, OUTLIER_TOLERANCE * scale)):
        difference = float(differences.quantile(share))
        if not difference <= tolerance:  # NaN fails too
            return f"logits differ by {difference:.2g} (tolerance {tolerance:.2g})"
    return None


def rounded_mismatch(comparison: OutputComparison) -> str | None:
    """Describe a difference of top tokens or loss that is more than rounding to a lower precision."""
    if comparison.top1_agreement < MIN_AGREEMENT:
        return f"top tokens agree at {comparison.top1_agreement:.0%} of positions (required: {MIN_AGREEMENT:.0%})"
    if comparison.losses and not abs(comparison.losses[1] - comparison.losses[0]) <= LOSS_TOLERANCE:
        return f"held-out loss is {comparison.losses[1]:.3f} (expected: {comparison.losses[0]:.3f})"
    return None
