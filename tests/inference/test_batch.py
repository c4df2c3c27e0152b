"""Continuous batching: each sequence generates what it generates alone."""

import gc
import random
import weakref

import pytest

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.inference.cpu_decoder import CpuDecoder
from lora_tuner.inference.sequence import Sequence

from .test_multi_lora import save_peft_adapter

PROMPTS = [
    "the actor",
    "so",
    "this film never drags. the story always works. her voice",
    "7: the camera somehow shines",
]
LIMITS = [1, 3, 9, 17, 30]


@pytest.fixture(params=["cpu_decoder", "transformers"])
def decoder_kind(request, monkeypatch):
    if request.param == "transformers":
        monkeypatch.setattr(CpuDecoder, "for_base", lambda base: None)


@pytest.fixture
def generator(model_folder, tmp_path, decoder_kind):
    targets = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "up_proj"]}[model_folder.name]
    save_peft_adapter(model_folder, tmp_path / "adapters" / "one", target_modules=targets)
    save_peft_adapter(model_folder, tmp_path / "adapters" / "two", target_modules=targets[:1], r=2)
    save_peft_adapter(model_folder, tmp_path / "adapters" / "dora", target_modules=targets, use_dora=True)
    return Generator(options=ModelOptions(base=str(model_folder), device="cpu"))


def make_sequence(generator, prompt, adapter, limit, seed):
    sampling = SamplingParams(max_new_tokens=limit, greedy=seed is None, repetition_penalty=1.2)
    return Sequence(
        generator.base, generator.encode_prompt(prompt).token_ids, sampling, seed, *generator.get_or_load(adapter)
    )


def run_to_end(engine):
    while engine.sequences:
        engine.step()


@pytest.mark.parametrize("order", [0, *(pytest.param(order, marks=pytest.mark.slow) for order in (1, 2, 3))])
def test_joining_and_leaving_keeps_solo_output(generator, order):
    draw = random.Random(order)
    requests = []
    for _ in range(14):
        prompt, adapter = draw.choice(PROMPTS), draw.choice(["one", "two", "dora", None])
        requests.append((prompt, adapter, draw.choice(LIMITS), draw.choice([None, 5])))
    engine, sequences, cancelled = generator.engine, [], []
    waiting = [make_sequence(generator, *request) for request in requests]
    largest = 0
    while waiting or engine.sequences:
        added = [waiting.pop() for _ in range(min(draw.randint(0, 3), len(waiting)))]
        engine.add(added)
        sequences += added
        largest = max(largest, len(engine.sequences))
        engine.step()
        if draw.random() < 0.1 and engine.sequences:
            cancelled.append(draw.choice(engine.sequences))
            engine.cancel(cancelled[-1])
            assert cancelled[-1] not in [sequence for sequence in engine.sequences if not sequence.done]
    assert largest > 3
    for sequence, (prompt, adapter, limit, seed) in zip(reversed(sequences), requests, strict=True):
        sampling = SamplingParams(max_new_tokens=limit, greedy=seed is None, seed=seed, repetition_penalty=1.2)
        (expected,) = generator.generate_batch([(prompt, adapter)], sampling)
        if sequence in cancelled:
            assert expected.text.startswith(sequence.settled_text)
        else:
            assert sequence.detokenizer.text == expected.text
            assert (len(sequence.output_ids), sequence.finished) == (expected.tokens, expected.finished)


def test_chunked_prefill_does_not_delay_decoding(generator, monkeypatch):
    long, sampling = (
        "this film never drags. " * 4,
        SamplingParams(greedy=True, max_new_tokens=20, repetition_penalty=1.2),
    )
    expected = {prompt: generator.generate(prompt, sampling).text for prompt in ("so", long)}
    monkeypatch.setattr("lora_tuner.inference.batch.PREFILL_CHUNK", 8)
    short, slow = (make_sequence(generator, prompt, None, 20, None) for prompt in ("so", long))
    engine = generator.engine
    engine.add([short])
    engine.step()
    engine.add([slow])
    steps = 0
    while not slow.output_ids:
        before = len(short.output_ids)
        engine.step()
        steps += 1
        assert len(short.output_ids) == before + 1
    assert steps == -(-len(slow.prompt_ids) // 8) == 3
    run_to_end(engine)
    assert (short.detokenizer.text, slow.detokenizer.text) == (expected["so"], expected[long])


def test_sampling_settings_change_their_row_alone(generator):
    """Tokens and log-probabilities of the row beside it are the same, bit for bit."""

    def neighbour(**settings):
        sampling = SamplingParams(max_new_tokens=12, greedy=True, ignore_eos=True, **settings)
        rows = [
            Sequence(
                generator.base, generator.encode_prompt("the actor").token_ids, each, 5, *lora, top_logprobs=3
            )
            for each, lora in (
                (SamplingParams(max_new_tokens=12, ignore_eos=True), generator.get_or_load("one")),
                (sampling, generator.get_or_load("two")),
            )
        ]
        generator.engine.add(rows)
        run_to_end(generator.engine)
        return rows

    plain, other = neighbour()
    for settings in (
        {"presence_penalty": -2.0, "frequency_penalty": -2.0},
        {"logit_bias": {other.output_ids[0]: -100.0}},
        {"min_new_tokens": 12, "repetition_penalty": 0.1},
    ):
        beside, changed = neighbour(**settings)
        assert changed.output_ids != other.output_ids
        assert (beside.output_ids, beside.logprobs) == (plain.output_ids, plain.logprobs)


def test_nonfinite_adapter_fails_only_its_sequence(generator):
    """Its NaN values in the cache must not reach later sequences."""
    engine = generator.engine
    loaded = generator.get_or_load("one")[1]
    layers = {}
    for name, layer_lora in loaded.layers.items():
        layers[name] = type(layer_lora)(layer_lora.A, layer_lora.B * float("nan"))
    bad, good, plain = (make_sequence(generator, PROMPTS[2], name, 20, None) for name in ("one", "two", None))
    bad.adapter, bad.lora = "loud", type(loaded)(layers)
    engine.add([bad, good, plain])
    engine.step()
    assert str(bad.error).startswith("loud produces logits that are not finite")
    assert (good.error, plain.error) == (None, None)
    late = [make_sequence(generator, "so", "two", 20, None) for _ in range(3)]
    engine.add(late)
    run_to_end(engine)
    for sequence in (good, plain, *late):
        again = make_sequence(generator, "so" if sequence in late else PROMPTS[2], sequence.adapter, 20, None)
        engine.add([again])
        run_to_end(engine)
        assert (sequence.error, sequence.output_ids) == (None, again.output_ids)


def test_short_prompt_overtakes_long_prefill(generator, monkeypatch):
    monkeypatch.setattr("lora_tuner.inference.batch.PREFILL_CHUNK", 4)
    monkeypatch.setattr("lora_tuner.inference.batch.PREFILL_TOKENS", 4)
    long, short = (
        make_sequence(generator, "this film never drags. " * 4, None, 5, None),
        make_sequence(generator, "so", None, 5, None),
    )
    engine = generator.engine
    engine.add([long])
    engine.step()
    engine.add([short])
    while not short.complete:
        engine.step()
    assert not long.output_ids
    run_to_end(engine)
    for sequence in (long, short):
        again = Sequence(generator.base, sequence.prompt_ids, sequence.sampling)
        engine.add([again])
        run_to_end(engine)
        assert sequence.output_ids == again.output_ids


def test_cancel_during_prefill_stops_it(generator, monkeypatch):
    monkeypatch.setattr("lora_tuner.inference.batch.PREFILL_TOKENS", 4)
    sequence, engine = make_sequence(generator, "this film never drags. " * 4, "one", 5, None), generator.engine
    engine.add([sequence])
    engine.step()
    engine.cancel(sequence)
    assert not engine.sequences
    assert not sequence.output_ids


def test_decoder_error_fails_only_its_batch(generator, monkeypatch):
    """DoRA runs in its own batch beside CpuDecoder; with transformers all sequences share one."""
    engine = generator.engine
    sequences = {name: make_sequence(generator, "so", name, 5, None) for name in ("one", "dora")}
    engine.add(list(sequences.values()))
    engine.step()
    (failing,) = [batch for batch in engine._batches.values() if sequences["dora"] in batch.sequences]
    monkeypatch.setattr(failing.decoder, "forward", lambda *args, **options: 1 / 0)
    run_to_end(engine)
    assert isinstance(sequences["dora"].error, ZeroDivisionError)
    assert sequences["dora"].complete
    if engine.cpu_decoder is not None:
        assert (sequences["one"].error, len(sequences["one"].output_ids)) == (None, 5)


def test_complete_sequence_releases_adapter(generator):
    """A sequence may be kept for a slow reader."""
    sequence = make_sequence(generator, "the actor", "one", 5, 5)
    adapter, processors = weakref.ref(sequence.lora), weakref.ref(sequence.logits_processors)
    generator.engine.add([sequence])
    run_to_end(generator.engine)
    generator.unload("one")
    gc.collect()
    assert (len(sequence.output_ids), adapter(), processors()) == (5, None, None)


def test_unloaded_adapter_finishes_running_sequences(generator):
    sequence, expected = (make_sequence(generator, "the actor", "one", 20, None) for _ in range(2))
    generator.engine.add([sequence])
    generator.engine.step()
    generator.unload("one")
    run_to_end(generator.engine)
    generator.engine.add([expected])
    run_to_end(generator.engine)
    assert sequence.output_ids == expected.output_ids


def test_max_resident_drops_least_recently_used(model_folder, tmp_path):
    target = {"gpt2": ["c_attn"], "llama": ["q_proj"]}[model_folder.name]
    for name in "abcd":
        save_peft_adapter(model_folder, tmp_path / "adapters" / name, target_modules=target)
    generator = Generator(max_resident=2, options=ModelOptions(base=str(model_folder), device="cpu"))
    generator.set_adapter("a")
    generator.get_or_load("b")
    generator.get_or_load("c")
    assert generator.loaded_adapters == ["a", "c"]  # a is current
    assert Generator(
        "a", "b", "c", max_resident=2, options=ModelOptions(base=str(model_folder), device="cpu")
    ).loaded_adapters == ["a", "c"]
    generator.set_adapter(None)
    generator.get_or_load("a")
    generator.get_or_load("d")
    assert generator.loaded_adapters == ["a", "d"]
    names, sampling = list("abcd"), SamplingParams(greedy=True, max_new_tokens=20)
    outputs = generator.generate_batch([("so", name) for name in names], sampling)
    assert len(generator.loaded_adapters) == 2
    for name, output in zip(names, outputs, strict=True):
        generator.set_adapter(name)
        assert generator.generate("so", sampling) == output
