"""What a report measures: rows that a run has seen, and texts that are generated once."""

import dataclasses
import itertools
import json

import pytest

from lora_tuner import Generator, ModelOptions, SamplingParams, train
from lora_tuner.adapters.adapter import CONFIG_FILE, MANIFEST_FILE, RUN_FILE
from lora_tuner.analysis import subject as subjects
from lora_tuner.analysis.subject import generate_cached, load_subject
from lora_tuner.data import tokenization
from lora_tuner.errors import Progress, ignore_events
from lora_tuner.inference.batch import GenerationEngine
from lora_tuner.training.trainer import LoraTrainer

from .. import tiny_models

OPTIONS = ModelOptions(device="cpu")
SAMPLING = SamplingParams(temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=5, seed=7)


def read_subject(adapter, options=OPTIONS):
    generator = Generator(adapter.path, options=options)
    return load_subject(adapter, generator, options)


# Rows that were trained on


@pytest.mark.parametrize("weights", [False, True])
def test_training_rows_are_those_of_the_steps(settings, tmp_path, monkeypatch, weights):
    """In a part of an epoch; rows in chunks, packed; of one source or two with weights."""
    trained, take_step = [], LoraTrainer.training_step

    def recorded(trainer, model, inputs, *arguments):
        for ids, positions in zip(inputs["input_ids"], inputs["position_ids"], strict=True):
            starts = [*(positions == 0).nonzero()[:, 0], len(ids)]
            trained.extend(ids[start:end].tolist() for start, end in itertools.pairwise(starts))
        return take_step(trainer, model, inputs, *arguments)

    monkeypatch.setattr(LoraTrainer, "training_step", recorded)
    changes = {}
    if weights:
        for number in range(2):
            texts = tiny_models.reviews(40, seed=number + 1)
            (tmp_path / f"{number}.jsonl").write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in texts)
            )
        changes["dataset"] = ["0.jsonl=0.8", "1.jsonl=0.2"]
    adapter = train(settings(max_length=32, max_steps=4, **changes), None)
    tokenizer = Generator(adapter.path, options=OPTIONS).tokenizer_of(adapter.name)
    found = read_subject(adapter)
    assert found.train_missing is None
    owners = {}
    for text in found.train_texts:
        for piece in tokenization.encode_rows(tokenizer, [text], 32)[0]:
            owners[tuple(piece.tolist())] = text
    # The last row of a sequence has its padding.
    seen = {next(text for piece, text in owners.items() if tuple(row[: len(piece)]) == piece) for row in trained}
    assert seen == {*found.train_texts}
    assert len(found.train_texts) < adapter.manifest.data.counts["train"]
    assert not {*found.train_texts} & {*found.held_out.texts}


def test_missing_training_rows_have_a_reason(adapter, tmp_path):
    assert len(read_subject(adapter).train_texts) > 10
    (tmp_path / "reviews.csv").open("a").write("another row of text,0\n")
    changed = read_subject(adapter)
    assert changed.train_texts == []
    assert changed.train_missing == f"{tmp_path}/reviews.csv has changed since it was trained"
    (tmp_path / "reviews.csv").unlink()
    assert "There is no dataset" in read_subject(adapter).train_missing
    settings_file = adapter.path / RUN_FILE
    settings_file.write_text(settings_file.read_text().replace("streaming: false", "streaming: true"))
    assert "streamed" in read_subject(adapter).train_missing
    settings_file.unlink()
    assert read_subject(adapter).train_missing == "it has no run.yaml, so its training rows are unknown"


def test_rows_of_a_stranger_are_not_loaded(adapter, monkeypatch, tmp_path):
    """Without its held-out rows in the cache an adapter was trained elsewhere."""
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "empty"))
    found = read_subject(adapter)
    assert "not in the cache" in found.held_out.missing
    assert found.train_missing == found.held_out.missing


# Texts


@pytest.fixture
def generator(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    return Generator(adapter.path, options=OPTIONS)


def prompts(generator, count=3):
    return [generator.encode_prompt(text) for text in tiny_models.reviews(count, seed=3)]


def test_cached_texts_are_generated_texts(generator):
    encoded = prompts(generator)
    for name in (generator.current_adapter, None):
        for _ in range(2):
            outputs = generate_cached(generator, name, encoded, SAMPLING, "texts")
            for number, (prompt, output) in enumerate(zip(encoded, outputs, strict=True)):
                sampling = SAMPLING.model_copy(update={"seed": 7 + number})
                (alone,) = generator.generate_batch([(prompt, name)], sampling, chat=False)
                assert output == dataclasses.replace(alone, prompt=prompt.text)


def test_interrupted_texts_go_on(generator, monkeypatch):
    """Whole batches are kept; what is kept is generated no more."""
    monkeypatch.setattr(subjects, "BATCH", 2)
    encoded, steps, step = prompts(generator, 5), [], GenerationEngine.step

    def interrupt(engine):
        steps.append(len(engine.sequences))
        if len(steps) == 8:  # in the second batch
            raise KeyboardInterrupt
        step(engine)

    monkeypatch.setattr(GenerationEngine, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate_cached(generator, "reviews", encoded, SAMPLING, "texts")
    assert generator.engine.sequences == []
    events = []
    outputs = generate_cached(generator, "reviews", encoded, SAMPLING, "texts", events.append)
    total = 5 * SAMPLING.max_new_tokens
    assert [event for event in events if event.done < 2 * SAMPLING.max_new_tokens] == []
    assert events[-1] == Progress("texts", total, total)
    monkeypatch.setattr(GenerationEngine, "step", None)  # all is kept
    assert generate_cached(generator, "reviews", encoded, SAMPLING, "texts", ignore_events) == outputs


def test_texts_are_of_these_weights(generator, adapter, monkeypatch):
    encoded = prompts(generator)
    first = generate_cached(generator, "reviews", encoded, SAMPLING, "texts")
    config = json.loads((adapter.path / CONFIG_FILE).read_text())
    (adapter.path / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 50 * config["lora_alpha"]}))
    manifest = json.loads((adapter.path / MANIFEST_FILE).read_text())
    manifest["weights"]["config"] = None
    (adapter.path / MANIFEST_FILE).write_text(json.dumps(manifest))
    again = Generator(adapter.path, options=OPTIONS)
    assert [output.text for output in generate_cached(again, "reviews", encoded, SAMPLING, "texts")] != [
        output.text for output in first
    ]
