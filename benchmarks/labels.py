"""IMDb sentiment as labels, beside a bag of words on the same rows, and the base without training.

Embedded base. A bag of words is tf-idf of words and pairs of words with a logistic regression, whose strength is chosen by
cross-validation (scikit-learn, in the extra `bench`). All are measured on the same held-out reviews, beyond those of the run.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lora_tuner import Generator, ModelOptions, TrainConfig, classify, train
from lora_tuner.adapters.label_info import LabelInfo
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.data.dataset import Dataset, load_dataset
from lora_tuner.data.labels import split_label
from lora_tuner.data.row_template import read_template
from lora_tuner.errors import ignore_events
from lora_tuner.inference import classification
from lora_tuner.inference.classification import LabelPrompts
from lora_tuner.training.label_result import wilson_interval

from .measure import Figure, figure

MINUTES = 6.0  # of training steps; with all measurements of the run at most ten on two cores
ROWS = 2_000  # reviews, of which a fifth is held out
LENGTH = 128  # tokens of one, the first and the last
MEASURED = 600  # held-out reviews beyond those of the run, for all candidates
TEMPLATE = "{text}\n\nSentiment: {label}"


def run(rounds: int) -> list[Figure]:
    """Takes about twelve minutes per round on two cores; each round has its own seed."""
    figures = []
    config = TrainConfig(
        dataset="imdb",
        label_column="label",
        label_names=["0=negative", "1=positive"],
        template=TEMPLATE,
        base=EMBEDDED_BASE,
        max_length=LENGTH,
        max_rows=ROWS,
        eval_rows=100,
        minutes=MINUTES,
        batch_size=4,
        name="sentiment",
    )
    # Of all reviews those that the sample has not; a held-out one is so in any sample.
    others = load_dataset(config.model_copy(update={"max_rows": None}), ignore_events).held_out
    rows = load_dataset(config, ignore_events)
    excluded = {*rows.held_out}
    measured = [split_label(row) for row in others if row not in excluded][:MEASURED]
    figures.append(
        _figure(
            "bag of words",
            _bag_of_words(rows, measured),
            measured,
            f"{len(rows.train):,} reviews",
        )
    )
    for seed in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            places = {"adapters_dir": Path(folder, "adapters"), "runs_dir": Path(folder, "runs"), "seed": seed}
            start = time.perf_counter()
            adapter = train(config.model_copy(update=places), ignore_events)
            seconds = time.perf_counter() - start
            assert adapter.manifest is not None
            assert adapter.manifest.run is not None
            assert adapter.manifest.labels is not None
            info, trained = adapter.manifest.labels, adapter.manifest.run
            generator = Generator(adapter.path, options=ModelOptions(device="cpu"))
            if not seed:
                figures.append(
                    _figure(
                        "base without training",
                        _zero_shot(generator, info, measured),
                        measured,
                        "",
                    )
                )
            texts = [_text_of(info, text) for text, _ in measured]
            told = [result.label for result in classify(generator, texts)]
            note = (
                f"{trained.steps} steps in {trained.seconds:.0f} s, {seconds:.0f} s in all; {dict(info.lines())}"
            )
            figures.append(_figure(f"adapter, seed {seed}", told, measured, note))
    return figures


def _figure(name: str, told: Sequence[str], rows: Sequence[tuple[str, str]], note: str) -> Figure:
    right = sum(label == other for label, (_, other) in zip(told, rows, strict=True))
    low, high = wilson_interval(right, len(rows))
    return figure(
        name,
        right / len(rows),
        "accuracy",
        f"{low:.3f} to {high:.3f} on {len(rows)} reviews; {note}",
    )


def _text_of(info: LabelInfo, filled: str) -> str:
    """Return the review in a template that is filled up to the label."""
    return filled.removesuffix(read_template(info.template, info.column).pieces[-2][0])


def _bag_of_words(rows: Dataset, measured: Sequence[tuple[str, str]]) -> list[str]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline

    texts, labels = zip(*map(split_label, rows.train), strict=True)
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegressionCV(max_iter=1000, l1_ratios=(0,), scoring="accuracy", use_legacy_attributes=False),
    )
    model.fit(texts, labels)
    return [str(label) for label in model.predict([text for text, _ in measured])]


def _zero_shot(generator: Generator, info: LabelInfo, measured: Sequence[tuple[str, str]]) -> list[str]:
    """Return the labels that the base tells in the same template."""
    base, decoder = (
        generator.base,
        generator.engine.cpu_decoder or generator.engine.hf_decoder,
    )
    prompts = LabelPrompts("base", info, base.tokenizer, base.max_context)
    prefixes, told = [prompts.encode_filled(text) for text, _ in measured], dict[int, str]()
    for batch in classification.batches(prefixes):
        texts = [prefixes[number] for number in batch]
        scores = classification.label_logprobs(base, decoder, None, texts, prompts.endings)
        told |= {number: info.names[int(row.argmax())] for number, row in zip(batch, scores, strict=True)}
    return [told[number] for number in range(len(measured))]
