"""Figures of an adapter that tells labels, on held-out rows, beside those of its base.

The probabilities are calibrated by one temperature, fitted on held-out rows that are not measured.
Price: base and adapter read each measured row once more, and a few tokens for each label.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from peft import PeftModel

from .. import distributed
from ..adapters.label_info import LabelFigures, LabelInfo
from ..config import TrainConfig
from ..data import labels
from ..data.dataset import Dataset
from ..data.row_template import read_template
from ..errors import AdapterError, EventHandler, GenerationError, LoraTunerError, Notice, Progress, TrainingError
from ..evaluation import held_out_loss
from ..inference import classification
from ..inference.classification import LabelPrompts
from ..inference.hf_decoder import HFDecoder
from ..inference.multi_lora import MultiLora
from ..inference.samples import generating
from ..models import fsdp
from ..models.loading import LoadedBase

_BINS = 10  # of the calibration error
MIN_FIT_ROWS = 10  # of fewer no temperature is fitted
FIT_ROWS = 50  # that fit it, if there are so many beside those that are measured
FIT_SHARE = 3  # of the measured rows one in so many fits the temperature, if there are no others
_Z = 1.959964  # of 95%


def label_info(config: TrainConfig, dataset: Dataset) -> LabelInfo | None:
    """Return the labels of a run before it is measured; None if it learns none."""
    if config.label_column is None:
        return None
    template = dataset.label_template
    return LabelInfo(
        column=read_template(template, "").columns[-1],
        names=[*dataset.labels],
        counts=[*dataset.labels.values()],
        template=template,
        max_length=config.max_length,
        clean=dataset.clean or "none",
        balanced=config.balance,
    )


def check_labels(base: LoadedBase, config: TrainConfig, dataset: Dataset) -> None:
    """Raise TrainingError if a label does not fit into the half of a long row that is kept."""
    info = label_info(config, dataset)
    if info is None:
        return
    try:
        prompts = LabelPrompts("the run", info, base.tokenizer, base.max_context)
    except AdapterError as error:
        raise TrainingError(f"{error} Raise --max-length.") from error
    needed = 2 * prompts.least_tokens
    if needed > config.max_length:
        raise TrainingError(
            f"The longest label takes {needed // 2} tokens with its template, more than half of --max-length "
            f"{config.max_length}: raise it to {needed}."
        )


def measure_labels(
    model: PeftModel,
    base: LoadedBase,
    config: TrainConfig,
    dataset: Dataset,
    notify: EventHandler,
) -> LabelInfo | None:
    """Measure the adapter in training and its base on held-out rows, and fit the temperature.

    All processes measure a share of the rows, and return the same.

    Returns:
        The labels, without figures where that is not possible; None if the run learns none.
    """
    info = label_info(config, dataset)
    if info is None:
        return None
    try:
        return _measure(model, base, info, dataset.held_out, config.eval_rows_limit, notify)
    except LoraTunerError as error:  # no reason to lose the run
        notify(Notice(f"The labels were not measured: {error}"))
        return info


def _measure(
    model: PeftModel,
    base: LoadedBase,
    info: LabelInfo,
    held_out: Sequence[str],
    eval_rows: int,
    notify: EventHandler,
) -> LabelInfo:
    measured, fitted = choose_rows(held_out, eval_rows)
    pairs = [labels.split_label(row) for row in [*measured, *fitted]]
    prompts = LabelPrompts("the adapter", info, base.tokenizer, base.max_context)
    prefixes = [prompts.encode_filled(text) for text, _ in pairs]
    with model.disable_adapter():
        before = _score(model, base, prompts, prefixes[: len(measured)], notify, "labels of the base")
    after = _score(model, base, prompts, prefixes, notify, "labels of the adapter")
    truth = [info.names.index(label) for _, label in pairs]
    own, own_truth = after[: len(measured)], truth[: len(measured)]
    temperature = 1.0
    if fitted:
        temperature = classification.fit_temperature(after[len(measured) :], truth[len(measured) :])
    else:
        notify(Notice("There are too few held-out rows to calibrate the probabilities of the labels."))
    return info.model_copy(
        update={
            "temperature": temperature,
            "fitted_rows": len(fitted),
            "figures": label_figures(own / temperature, own_truth),
            "uncalibrated_error": calibration_error(own.softmax(-1), own_truth) if fitted else None,
            "base": label_figures(before, own_truth),
        }
    )


def choose_rows(held_out: Sequence[str], eval_rows: int) -> tuple[list[str], list[str]]:
    """Return the held-out rows that are measured, and others to fit the temperature on.

    These are rows beyond those that are measured or, if there are few, every third one.
    """
    count = max(eval_rows // 2, FIT_ROWS)
    measured, others = [*held_out[:eval_rows]], [*held_out[eval_rows : eval_rows + count]]
    if len(others) < max(MIN_FIT_ROWS, len(measured) // 4):
        others = measured[::FIT_SHARE]
        if len(others) < MIN_FIT_ROWS:
            return measured, []
        del measured[::FIT_SHARE]
    return measured, others


def _score(
    model: PeftModel,
    base: LoadedBase,
    prompts: LabelPrompts,
    prefixes: Sequence[list[int]],
    notify: EventHandler,
    stage: str,
) -> torch.Tensor:
    """Return the log-probabilities of the labels, (rows, labels), with the LoRA layers of the base.

    Price: if the base is sharded, a text is read once for each label, as its passes are collective.

    Raises GenerationError in all processes if they are not finite in one.
    """
    if fsdp.shard_count() > 1:
        rows = [
            np.array([*(~token for token in prefix), *ending], np.int32)
            for prefix in prefixes
            for ending in prompts.endings
        ]
        nll = held_out_loss.measure_loss(model, base, rows, notify, stage=stage).nll
        return _finite(-torch.tensor(nll, dtype=torch.float64).view(len(prefixes), -1))
    own = [*range(distributed.rank(), len(prefixes), distributed.world_size())]
    scores = torch.zeros(len(prefixes), len(prompts.endings), dtype=torch.float64)
    done = 0
    with generating(base), torch.inference_mode():
        decoder = HFDecoder(base, MultiLora(base))
        for batch in classification.batches([prefixes[number] for number in own]):
            numbers = [own[index] for index in batch]
            texts = [prefixes[number] for number in numbers]
            try:
                logprobs = classification.label_logprobs(base, decoder, None, texts, prompts.endings)
            except GenerationError:
                logprobs = torch.full((len(texts), len(prompts.endings)), torch.nan).double()
            scores[numbers] = logprobs
            done += len(numbers)
            notify(Progress(stage, done, len(own)))
    return _finite(torch.tensor(distributed.all_gather(scores.tolist()), dtype=torch.float64).sum(0))


def _finite(scores: torch.Tensor) -> torch.Tensor:
    if not scores.isfinite().all():
        raise GenerationError("their log-probabilities are not finite.")
    return scores


def label_figures(logprobs: torch.Tensor, truth: Sequence[int]) -> LabelFigures:
    """Return the figures for log-probabilities (rows, labels) and the label of each row."""
    classes = logprobs.shape[1]
    confusion = [[0] * classes for _ in range(classes)]
    given = logprobs.argmax(-1).tolist()
    for label, chosen in zip(truth, given, strict=True):
        confusion[label][chosen] += 1
    right = "".join("01"[chosen == label] for chosen, label in zip(given, truth, strict=True))
    return LabelFigures(
        accuracy=right.count("1") / len(truth),
        interval=wilson_interval(right.count("1"), len(truth)),
        macro_f1=macro_f1(confusion),
        calibration_error=calibration_error(logprobs.softmax(-1), truth),
        confusion=confusion,
        right=right,
    )


def wilson_interval(right: int, rows: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson, 1927)."""
    share, square = right / rows, _Z**2 / rows
    middle = share + square / 2
    half = _Z * math.sqrt(share * (1 - share) / rows + square / (4 * rows))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def macro_f1(confusion: Sequence[Sequence[int]]) -> float:
    """Return the mean F1 of the labels that a row has or is given, as in scikit-learn."""
    scores = []
    for label, row in enumerate(confusion):
        given = sum(other[label] for other in confusion)
        if sum(row) + given:
            scores.append(2 * row[label] / (sum(row) + given))
    return sum(scores) / len(scores)


def calibration_error(probabilities: torch.Tensor, truth: Sequence[int]) -> float:
    """Return the expected calibration error of probabilities (rows, labels): the mean gap between the
    probability of the chosen label and the share that is right, in ten bins of equal width."""
    highest, chosen = probabilities.max(-1)
    gaps = [0.0] * _BINS
    for probability, label, right in zip(highest.tolist(), chosen.tolist(), truth, strict=True):
        gaps[min(int(probability * _BINS), _BINS - 1)] += probability - (label == right)
    return sum(map(abs, gaps)) / len(truth)
