"""Subject of a report: an adapter, its held-out rows, and the rows that it was trained on.

The rows of a run are read again from the dataset that run.yaml names. Data that has changed since,
or a stranger's choice of data, is not used.
"""

import hashlib
import itertools
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .. import atomic_io
from ..adapters.adapter import RUN_FILE, Adapter, load_adapter_folder
from ..config import HELD_OUT_MAX_TOKENS, ModelOptions, SamplingParams, TrainConfig
from ..data import eval_sets, labels, packing, preferences, tokenization
from ..data.dataset import Dataset, load_dataset
from ..data.eval_sets import EvalSet
from ..errors import DataError, EventHandler, LoraTunerError, Progress, ignore_events
from ..evaluation import gain_matrix, held_out_loss
from ..inference.generator import EncodedPrompt, GenerationOutput, Generator
from ..inference.sampling import choose_seed, sequence_seed
from ..inference.sequence import FinishReason
from ..inference.sequence import Sequence as TokenSequence
from ..settings_files import resolve_settings

BATCH = 16  # prompts that are continued at once; an interrupted call loses so many texts at most


@dataclass(frozen=True)
class ReportSubject:
    """An adapter with the rows that a report on it compares.

    `held_out` has the rows that it was measured on in training, in their order, or the reason why
    they are `missing`. `train_texts` are the rows that its steps have seen, in the order of the
    data; `train_missing` is the reason why they are unknown. `config` is that of run.yaml.
    """

    adapter: Adapter
    held_out: EvalSet
    train_texts: list[str]
    train_missing: str | None
    config: TrainConfig | None
    options: ModelOptions


def load_subject(
    adapter: Adapter, generator: Generator | None, options: ModelOptions = ModelOptions()
) -> ReportSubject:
    """Read the rows of an adapter. Price: the training data is read and tokenized as by training.

    Args:
        generator: has the adapter in memory, with its tokenizer; None leaves the training rows out.
    """
    config: TrainConfig | None = None
    (held_out,) = eval_sets.select_rows([gain_matrix.cached_rows(adapter, options.notify)])
    texts, missing = list[str](), "they were not read"
    try:
        config = config_of_run(adapter)
        if generator is not None:
            # Without rows in the cache it was trained elsewhere: the data would be a stranger's choice.
            if held_out.missing:
                raise DataError(held_out.missing)
            tokenizer = generator.tokenizer_of(adapter.name)
            texts = _seen_rows(adapter, config, held_out, tokenizer, options.notify)
    except LoraTunerError as error:
        missing = str(error).rstrip(".")
    return ReportSubject(adapter, held_out, texts, None if texts else missing, config, options)


def config_of_run(adapter: Adapter) -> TrainConfig:
    """Read the settings of the run that made an adapter. Raises DataError where there are none."""
    if not (adapter.path / RUN_FILE).is_file():
        raise DataError(f"it has no {RUN_FILE}, so its training rows are unknown")
    return resolve_settings(TrainConfig, {}, adapter.path / RUN_FILE)


def load_dataset_of_run(config: TrainConfig, measured: Collection[str]) -> Dataset:
    """Load the dataset of a run. Raises DataError if it no longer holds out the measured rows."""
    dataset = load_dataset(config)
    if not {*measured} <= {*dataset.held_out}:
        raise DataError(f"{dataset.name} no longer holds out the rows that it was measured on")
    return dataset


def _seen_rows(
    adapter: Adapter,
    config: TrainConfig,
    held_out: EvalSet,
    tokenizer: PreTrainedTokenizerBase,
    notify: EventHandler,
) -> list[str]:
    """Return the rows of which the steps of a run have seen at least a part.

    A run of less than an epoch sees a part of its rows. Which ones follows from their order, and
    this from the seed and from the tokens of all rows.
    """
    data, run = (adapter.manifest.data, adapter.manifest.run) if adapter.manifest else (None, None)
    if data is None or run is None:
        raise DataError("its manifest does not tell on which rows it was trained")
    if config.streaming:
        raise DataError("its data was streamed, so it is not known which rows were trained on")
    stage = f"training rows of {adapter.name}"
    notify(Progress(stage, 0, 1))
    dataset = load_dataset_of_run(config, held_out.texts)
    measured = preferences.first_rows(dataset.held_out_rows, config.eval_rows_limit)
    sides = [side for row in measured for side in preferences.sides(row)]
    errors: tokenization.InvalidRows = {}
    tokenization.encode_texts(tokenizer, sides, max_tokens=HELD_OUT_MAX_TOKENS, invalid=errors)
    invalid = preferences.invalid_rows(measured, errors)
    rows: list[tokenization.TokenIds] = []
    owners: list[str] = []
    source_rows: list[int] = []
    for trained in labels.training_texts(config, [source.train for source in dataset.sources]):
        if config.learns_preferences:
            pieces, _, kept = preferences.encode_rows(tokenizer, trained, config.max_length, invalid)
            rows += pieces
            owners += [trained[row] for row in kept for _ in range(config.sides_per_row)]
            source_rows.append(len(pieces))
            continue
        pieces, use = tokenization.encode_rows(tokenizer, trained, config.max_length, config.long_rows, invalid)
        texts = itertools.chain.from_iterable(map(itertools.repeat, trained, use.row_pieces))
        is_learned = [tokenization.count_predictions(piece) > 0 for piece in pieces]
        rows += [piece for piece, learned in zip(pieces, is_learned, strict=True) if learned]
        owners += [text for text, learned in zip(texts, is_learned, strict=True) if learned]
        source_rows.append(sum(is_learned))
    dataset.leave_out(invalid, 1.0, ignore_events)
    weights = dataset.weights
    sequences = packing.PackedSequences(
        rows,
        config.max_length,
        packing=config.packing,
        source_rows=source_rows if weights else (),
        unit=config.sides_per_row,
    )
    if dataset.hash() != data.hash or len(sequences) != run.sequences:
        raise DataError(f"{dataset.name} has changed since it was trained")
    per_step = (config.batch_size or 1) * config.gradient_accumulation * run.processes
    seen = sequences.rows_in_steps(run.kept_step, per_step, config.seed, weights)
    notify(Progress(stage, 1, 1))
    return list(dict.fromkeys(preferences.learned_texts(owners[row] for row in seen)))


def generate_cached(
    generator: Generator,
    adapter: str | None,
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingParams,
    stage: str,
    notify: EventHandler = ignore_events,
) -> list[GenerationOutput]:
    """Continue prompts with an adapter or, for None, the base; keep the texts in the user's cache.

    Each prompt has a seed of its own, as one for all would draw them with the same noise; base and
    adapter have the same ones. Price: an interrupted call loses the texts of a batch at most.

    Args:
        stage: name of the progress that `notify` receives, in tokens.

    Raises:
        GenerationError: the logits are not finite.
    """
    seed, context = choose_seed(sampling), generator.base.max_context
    count = len(prompts)
    batches = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    identity = [*generator_identity(generator, adapter), sampling.model_dump()]
    paths: dict[range, Path] = {}
    texts: dict[range, list[tuple[str, int, FinishReason]]] = {}  # with tokens, reason for the end
    for batch in batches:
        key = [
            *identity,
            sequence_seed(seed, batch.start),
            [prompts[number].token_ids for number in batch],
        ]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        paths[batch] = atomic_io.cache_dir() / "texts" / f"{digest}.json"
        if (cached := atomic_io.read_cache(paths[batch], notify)) is not None:
            texts[batch] = cached
    lengths = [min(sampling.max_new_tokens, context - len(prompt.token_ids)) for prompt in prompts]
    done, total = sum(lengths[number] for batch in texts for number in batch), sum(lengths)
    for batch in batches:
        if batch in texts:
            continue
        _, lora = generator.get_or_load(adapter)
        sequences = [
            TokenSequence(
                generator.base,
                prompts[number].token_ids,
                sampling,
                sequence_seed(seed, number),
                adapter,
                lora,
            )
            for number in batch
        ]
        for tokens in generate_steps(generator, sequences):
            notify(Progress(stage, done + tokens, total))
        done += sum(lengths[number] for number in batch)
        texts[batch] = [
            (sequence.detokenizer.text, len(sequence.output_ids), sequence.finish_reason)
            for sequence in sequences
        ]
        atomic_io.write_cache(paths[batch], texts[batch])
    notify(Progress(stage, total, total))
    outputs = []
    for number, (text, tokens, reason) in enumerate(text for batch in batches for text in texts[batch]):
        prompt, own_seed = prompts[number], sequence_seed(seed, number)
        outputs.append(GenerationOutput(prompt.text, text, adapter, tokens, reason, own_seed, prompt.chat))
    return outputs


def generator_identity(generator: Generator, adapter: str | None) -> list[object]:
    """Return what texts of an adapter, or of the base, depend on beside prompts and settings."""
    base = generator.base
    weights: list[object] = []
    if adapter is not None:
        generator.get_or_load(adapter)
        weights = held_out_loss.weights_key(load_adapter_folder(generator.folder_of(adapter)))
    return [base.files.fingerprint, str(base.dtype), base.load_in, base.device.type, weights]


def generate_steps(generator: Generator, sequences: list[TokenSequence]) -> Iterator[int]:
    """Generate until all sequences are complete. Yields the tokens that are done or not needed."""
    engine = generator.engine
    try:
        engine.add(sequences)
        while engine.sequences:
            engine.step()
            for sequence in sequences:
                if sequence.error:
                    raise sequence.error
            yield sum(each.max_new_tokens if each.done else len(each.output_ids) for each in sequences)
    except BaseException:
        engine.clear()
        raise
