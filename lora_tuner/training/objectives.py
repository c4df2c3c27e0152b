"""Losses of preferences: DPO, ORPO and KTO, from the log-probabilities of whole answers.

Both answers of a pair are rows of one sequence, so that one forward pass measures them. DPO and KTO
compare with a reference (training/reference.py). Price: with KTO a second forward pass in each step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from ..config import DEFAULT_BETA, TrainConfig
from ..data.packing import IGNORE_INDEX, PackedRows
from ..data.tokenization import TokenIds, token_ids
from ..errors import TrainingError
from ..text import format_count
from .rows import EncodedRows

Batch = dict[str, torch.Tensor]
_OTHER = "mismatched_"  # prefix of a batch's fields of mismatched rows


@dataclass(frozen=True)
class PreferenceObjective:
    """The loss of a run on preferences.

    Attributes:
        rows: All training rows. Of a pair the chosen answer comes first, the rejected one next.
        unit: 2 rows with pairs, 1 with KTO.
        desired: KTO: of each row, True if its answer is desired.
        weights: KTO: weight of a desired answer, and of an undesired one.
        mismatched: KTO: of each row, its prompt with the answer to another one.
        reference: Log-probability of each row in nats, and below that of each mismatched row:
            (1 or 2, rows); NaN for rows that the run does not see, None before it is measured.
    """

    name: Literal["dpo", "orpo", "kto"]
    beta: float
    rows: Sequence[TokenIds]
    unit: int
    desired: Sequence[bool] = ()
    weights: tuple[float, float] = (1.0, 1.0)
    mismatched: Sequence[TokenIds] = ()
    reference: torch.Tensor | None = None

    def describe(self) -> str:
        """Describe the objective and its rows for a notice."""
        start = f"Objective {self.name}, beta {self.beta:g}, on"
        if self.name != "kto":
            return f"{start} {format_count(len(self.rows) // 2, 'pair')}."
        desired = sum(self.desired)
        text = f"{start} {desired:,} desired and {len(self.desired) - desired:,} undesired answers"
        if (weight := max(self.weights)) == 1:
            return f"{text}."
        kind = "desired" if self.weights[0] > 1 else "undesired"
        return f"{text}: each {kind} one weighs {weight:.3g} times as much, so that both kinds count alike."

    def add_fields(
        self,
        batch: Batch,
        items: Sequence[PackedRows],
        collate: Callable[[Sequence[Sequence[TokenIds]]], Batch],
    ) -> None:
        """Add what the loss needs to a batch of sequences: `rows`, the numbers of all its rows; with
        ORPO `text_labels`, with KTO the batch of the mismatched rows."""
        batch["rows"] = torch.tensor([number for item in items for number in item.numbers])
        if self.name == "orpo":  # its loss on text includes the prompts of chosen answers
            texts = [[row if side % 2 else token_ids(row) for side, row in enumerate(item)] for item in items]
            batch["text_labels"] = collate(texts)["labels"]
        if self.name == "kto":
            others = [
                [
                    row if number < 0 else self.mismatched[number]
                    for row, number in zip(item, item.numbers, strict=True)
                ]
                for item in items
            ]
            fields = collate(others)
            batch |= {_OTHER + name: tensor for name, tensor in fields.items()}

    def count(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Count what the losses of an optimizer step are divided by.

        Returns:
            Pairs (with KTO rows), labels of all rows, and labels of `text_labels`' chosen answers: (3,).
        """
        units = sum(int((batch["rows"] >= 0).sum()) for batch in batches) // self.unit
        labels = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
        texts = 0
        if self.name == "orpo":
            texts = sum(int(_sum_rows(_has_label(batch["text_labels"]), batch)[::2].sum()) for batch in batches)
        return torch.tensor([units, labels, texts])

    def loss(self, nll: Callable[[Batch], torch.Tensor], batch: Batch, count: torch.Tensor) -> torch.Tensor:
        """Compute the loss of a batch: mean over pairs (with KTO rows) of the optimizer step.

        Args:
            nll: Negative log-likelihood of each label of a batch, 0 elsewhere, at the token before it: (items, length).
            batch: With the fields of `add_fields`, on one device with `count`.
            count: That of all batches of the step, from `count`.
        """
        numbers = batch["rows"]
        kl = torch.zeros((), device=numbers.device)
        is_real = numbers >= 0
        if self.name == "kto":
            other = {name.removeprefix(_OTHER): batch[name] for name in batch if name.startswith(_OTHER)}
            other["rows"] = numbers
            with torch.no_grad():
                changes = -_sum_rows(nll(other), other) - self._reference(1, numbers)
            kl = changes[is_real].mean().clamp(min=0)  # of no rows NaN, which then meets no row
        labels = batch.get("text_labels", batch["labels"])
        token_nll = nll(batch | {"labels": labels})
        is_label = _has_label(batch["labels"]).roll(-1, 1)
        logps = -_sum_rows(token_nll * is_label, batch)
        if self.name == "kto":
            ratios = (logps - self._reference(0, numbers))[is_real]
            desired = torch.tensor(self.desired, device=numbers.device)[numbers[is_real]]
            losses = kto_losses(ratios, desired, kl, self.beta, self.weights)
            return (losses.sum() / count[0]).float()
        is_pair = is_real[::2]
        if self.name == "orpo":
            logps = logps / _sum_rows(_has_label(batch["labels"]), batch).clamp(min=1)
            losses = orpo_losses(logps[::2][is_pair], logps[1::2][is_pair], self.beta)
            text_nll = _sum_rows(token_nll, batch)[::2][is_pair]
            return (text_nll.sum() / count[2].clamp(min=1) + losses.sum() / count[0]).float()
        ratios = logps - self._reference(0, numbers)
        losses = dpo_losses(ratios[::2][is_pair], ratios[1::2][is_pair], self.beta)
        return (losses.sum() / count[0]).float()

    def _reference(self, kind: int, numbers: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of rows, by their numbers; 0 of rows to measure the speed with."""
        if self.reference is None:
            return torch.zeros(len(numbers), device=numbers.device)
        reference = self.reference[kind].to(numbers.device, _sum_type(numbers.device))
        return torch.where(numbers >= 0, reference[numbers], 0)


def make_objective(config: TrainConfig, encoded: EncodedRows, max_length: int) -> PreferenceObjective | None:
    """Make the objective of a run from its rows; None for the loss on text.

    Raises:
        TrainingError: KTO has answers of one kind only.
    """
    if config.objective == "sft":
        return None
    rows = encoded.sequences.rows
    objective = PreferenceObjective(config.objective, config.beta or DEFAULT_BETA, rows, encoded.sequences.unit)
    if config.objective != "kto":
        return objective
    counts = sum(encoded.desired), len(encoded.desired) - sum(encoded.desired)
    if 0 in counts:
        kind, missing = ("desired", "undesired") if counts[0] else ("undesired", "desired")
        raise TrainingError(
            f"All {len(rows):,} training rows are {kind}: kto needs {missing} ones too, with another `label`."
        )
    # Both kinds count alike (KTO, arXiv:2402.01306, equation 8).
    weights = max(1.0, counts[1] / counts[0]), max(1.0, counts[0] / counts[1])
    mismatched = mismatch_rows(rows, max_length)
    return replace(objective, desired=encoded.desired, weights=weights, mismatched=mismatched)


def disable_dropout(model: torch.nn.Module) -> None:
    """Disable the dropout of a base, as in TRL: the reference is measured without."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def mismatch_rows(rows: Sequence[TokenIds], max_length: int) -> list[TokenIds]:
    """Return each prompt with the answer of the last row before it that has another prompt.

    As in TRL, whose batches rotate their answers by one; but a prompt does not meet its own answers,
    as it would where rows of one prompt are neighbours.
    """
    starts = [int((row >= 0).argmax()) for row in rows]
    prompts = [row[:start].tobytes() for row, start in zip(rows, starts, strict=True)]
    others = (index for index in range(len(rows) - 1, 0, -1) if prompts[index] != prompts[0])
    other = next(others, len(rows) - 1)
    mismatched = []
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        if index and prompts[index - 1] != prompts[index]:
            other = index - 1
        mismatched.append(np.concatenate([row[:start], rows[other][starts[other] :]])[:max_length])
    return mismatched


def dpo_losses(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """DPO's loss of each pair (Rafailov et al., 2023, arXiv:2305.18290, equation 7).

    Args:
        chosen: log-probabilities of the chosen answers, less those of the reference; (pairs,).
        rejected: the same of the rejected answers.
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def orpo_losses(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """ORPO's loss of each pair beside that on text (Hong et al., 2024, arXiv:2403.07691, equation 7).

    Args:
        chosen: mean log-probabilities per token of the chosen answers, (pairs,).
        rejected: the same of the rejected answers.
    """
    log_odds = (chosen - _log_one_minus_exp(chosen)) - (rejected - _log_one_minus_exp(rejected))
    return -beta * F.logsigmoid(log_odds)


def kto_losses(
    ratios: torch.Tensor, desired: torch.Tensor, kl: torch.Tensor, beta: float, weights: tuple[float, float]
) -> torch.Tensor:
    """KTO's loss of each answer (Ethayarajh et al., 2024, arXiv:2402.01306, equation 7).

    Args:
        ratios: log-probabilities of answers, less those of the reference; (rows,).
        desired: True for desired answers.
        kl: estimate of the KL divergence from the reference, which is no part of the gradient.
        weights: of a desired answer, and of an undesired one.
    """
    gains = torch.where(desired, ratios - kl, kl - ratios)
    return torch.where(desired, *weights) * (1 - torch.sigmoid(beta * gains))


def _log_one_minus_exp(logp: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of x < 0, without cancellation; a certain answer counts as nearly certain."""
    logp = logp.clamp(max=-1e-7)
    return torch.where(logp > -0.6931, torch.log(-torch.expm1(logp)), torch.log1p(-torch.exp(logp)))


def _has_label(labels: torch.Tensor) -> torch.Tensor:
    return labels != IGNORE_INDEX


def _sum_rows(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum values of positions over each row of a packed batch: (items, length) -> (rows,).

    Padding belongs to the row before it.
    """
    numbers = (batch["position_ids"] == 0).flatten().cumsum(0) - 1
    values = values.flatten().to(_sum_type(values.device))  # a sum of float32 is off by 1e-3 nats
    return values.new_zeros(len(batch["rows"])).index_add(0, numbers, values)


def _sum_type(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
