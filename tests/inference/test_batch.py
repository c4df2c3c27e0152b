"""Rows that join and leave: what each writes is what it writes alone."""

import gc
import random
import weakref

import pytest
import torch

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.inference import batch as inference_batch
from lora_tuner.inference import speculative
from lora_tuner.inference.cpu_decoder import CpuDecoder, KVCache
from lora_tuner.inference.sequence import Sequence

from .. import tiny_models
from .test_multi_lora import written

PROMPTS = [
    "the actor",
    "so",
    "this film never drags. the story always works. her voice",
    "7: the camera somehow shines",
]
LIMITS = [1, 3, 9, 17, 30]


@pytest.fixture(params=["our own way", "transformers"])
def way(request, monkeypatch):
    if request.param == "transformers":
        monkeypatch.setattr(CpuDecoder, "for_base", lambda base: None)


@pytest.fixture
def generator(model_folder, tmp_path, way):
    targets = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "up_proj"]}[model_folder.name]
    written(model_folder, tmp_path / "adapters" / "one", target_modules=targets)
    written(model_folder, tmp_path / "adapters" / "two", target_modules=targets[:1], r=2)
    written(model_folder, tmp_path / "adapters" / "dora", target_modules=targets, use_dora=True)
    return Generator(options=ModelOptions(base=str(model_folder), device="cpu"))


def row_of(generator, prompt, adapter, limit, seed):
    sampling = SamplingParams(max_new_tokens=limit, greedy=seed is None, repetition_penalty=1.2)
    return Sequence(
        generator.base, generator.encode_prompt(prompt).token_ids, sampling, seed, *generator.get_or_load(adapter)
    )


@pytest.mark.parametrize("order", range(4))
def test_joining_and_leaving_keeps_solo_output(generator, order, monkeypatch):
    draw = random.Random(order)
    if order > 1:  # rows that are alone for a while are guessed
        monkeypatch.setattr(CpuDecoder, "draft_model", property(lambda self: self))
        monkeypatch.setattr(inference_batch, "MIN_DRAFT_TOKENS", 1)
    asked = [
        (draw.choice(PROMPTS), draw.choice(["one", "two", "dora", None]), draw.choice(LIMITS), draw.choice([None, 5]))
        for _ in range(14)
    ]
    writer, rows, left = generator.engine, [], []
    waiting = [row_of(generator, *it) for it in asked]
    most = 0
    while waiting or writer.sequences:
        some = [waiting.pop() for _ in range(min(draw.randint(0, 3), len(waiting)))]
        writer.add(some)
        rows += some
        most = max(most, len(writer.sequences))
        writer.step()
        if draw.random() < 0.1 and writer.sequences:
            left.append(draw.choice(writer.sequences))
            writer.cancel(left[-1])
            assert left[-1] not in [row for row in writer.sequences if not row.done]
    assert most > 3
    for row, it in zip(reversed(rows), asked, strict=True):
        (expected,) = generator._generate_outputs(
            [(it[0], *generator.get_or_load(it[1]))],
            SamplingParams(max_new_tokens=it[2], greedy=it[3] is None, seed=it[3], repetition_penalty=1.2),
        )
        if row in left:
            assert expected.text.startswith(row.settled_text)
        else:
            assert (row.detokenizer.text, len(row.output_ids), row.finished) == (
                expected.text,
                expected.tokens,
                expected.finished,
            )


def test_chunked_prefill_does_not_delay_decoding(generator, monkeypatch):
    long, shared = "this film never drags. " * 4, SamplingParams(greedy=True, max_new_tokens=20, repetition_penalty=1.2)
    expected = {prompt: generator.generate(prompt, shared).text for prompt in ("so", long)}
    monkeypatch.setattr("lora_tuner.inference.batch.PREFILL_CHUNK", 8)
    short, slow = (row_of(generator, prompt, None, 20, None) for prompt in ("so", long))
    writer = generator.engine
    writer.add([short])
    writer.step()
    writer.add([slow])
    steps = 0
    while not slow.output_ids:
        before = len(short.output_ids)
        writer.step()
        steps += 1
        assert len(short.output_ids) == before + 1  # it does not wait
    assert steps == -(-len(slow.prompt_ids) // 8) == 3
    while writer.sequences:
        writer.step()
    assert (short.detokenizer.text, slow.detokenizer.text) == (expected["so"], expected[long])


def test_nonfinite_adapter_fails_only_its_sequence(generator):
    """What it leaves in the cache must not reach the rows that come after."""
    writer = generator.engine
    loud = generator.get_or_load("one")[1]
    broken = type(loud)({name: type(update)(update.A, update.B * float("nan")) for name, update in loud.layers.items()})
    bad, good, plain = (row_of(generator, PROMPTS[2], name, 20, None) for name in ("one", "two", None))
    bad.adapter, bad.lora = "loud", broken
    writer.add([bad, good, plain])
    writer.step()
    assert str(bad.error).startswith("loud produces logits that are not finite")
    assert (good.error, plain.error) == (None, None)
    late = [row_of(generator, "so", "two", 20, None) for _ in range(3)]
    writer.add(late)
    while writer.sequences:
        writer.step()
    for row in (good, plain, *late):
        again = row_of(generator, "so" if row in late else PROMPTS[2], row.adapter, 20, None)
        writer.add([again])
        while writer.sequences:
            writer.step()
        assert (row.error, row.output_ids) == (None, again.output_ids)


def test_short_prompt_overtakes_long_prefill(generator, monkeypatch):
    monkeypatch.setattr("lora_tuner.inference.batch.PREFILL_CHUNK", 4)
    monkeypatch.setattr("lora_tuner.inference.batch.PREFILL_TOKENS", 4)
    long, short = (
        row_of(generator, "this film never drags. " * 4, None, 5, None),
        row_of(generator, "so", None, 5, None),
    )
    writer = generator.engine
    writer.add([long])
    writer.step()
    writer.add([short])
    while not short.complete:
        writer.step()
    assert not long.output_ids
    while writer.sequences:
        writer.step()
    for row in (long, short):
        again = Sequence(generator.base, row.prompt_ids, row.sampling)
        writer.add([again])
        while writer.sequences:
            writer.step()
        assert row.output_ids == again.output_ids


def test_cancel_during_prefill_stops_it(generator, monkeypatch):
    monkeypatch.setattr("lora_tuner.inference.batch.PREFILL_TOKENS", 4)
    row, writer = row_of(generator, "this film never drags. " * 4, "one", 5, None), generator.engine
    writer.add([row])
    writer.step()
    writer.cancel(row)
    assert not writer.sequences
    assert not row.output_ids


def test_decoder_error_fails_only_its_batch(generator, monkeypatch):
    """DoRA has a batch of its own beside our decoder, and by transformers all rows share one."""
    writer = generator.engine
    rows = {name: row_of(generator, "so", name, 5, None) for name in ("one", "dora")}
    writer.add(list(rows.values()))
    writer.step()
    (failing,) = [batch for batch in writer._batches.values() if rows["dora"] in batch.sequences]
    monkeypatch.setattr(failing.decoder, "forward", lambda *args, **more: 1 / 0)
    while writer.sequences:
        writer.step()
    assert isinstance(rows["dora"].error, ZeroDivisionError)
    assert rows["dora"].complete
    if writer.cpu_decoder is not None:
        assert (rows["one"].error, len(rows["one"].output_ids)) == (None, 5)


def test_complete_sequence_releases_adapter(generator):
    """It is kept until its reader has it, who may be slow."""
    row = row_of(generator, "the actor", "one", 5, 5)
    adapter, luck = weakref.ref(row.lora), weakref.ref(row.logits_processors)
    generator.engine.add([row])
    while generator.engine.sequences:
        generator.engine.step()
    generator.unload("one")
    gc.collect()
    assert (len(row.output_ids), adapter(), luck()) == (5, None, None)


def test_unloaded_adapter_finishes_running_sequences(generator):
    row, expected = (row_of(generator, "the actor", "one", 20, None) for _ in range(2))
    generator.engine.add([row])
    generator.engine.step()
    generator.unload("one")
    while generator.engine.sequences:
        generator.engine.step()
    generator.engine.add([expected])
    while generator.engine.sequences:
        generator.engine.step()
    assert row.output_ids == expected.output_ids


def test_max_resident_drops_least_recently_used(model_folder, tmp_path):
    target = {"gpt2": ["c_attn"], "llama": ["q_proj"]}[model_folder.name]
    for name in "abcd":
        written(model_folder, tmp_path / "adapters" / name, target_modules=target)
    generator = Generator(max_resident=2, options=ModelOptions(base=str(model_folder), device="cpu"))
    generator.set_adapter("a")
    generator.get_or_load("b")
    generator.get_or_load("c")
    assert generator.loaded_adapters == ["a", "c"]  # a is in use
    assert Generator(
        "a", "b", "c", max_resident=2, options=ModelOptions(base=str(model_folder), device="cpu")
    ).loaded_adapters == ["a", "c"]
    generator.set_adapter(None)
    generator.get_or_load("a")
    generator.get_or_load("d")
    assert generator.loaded_adapters == ["a", "d"]
    names, shared = list("abcd"), SamplingParams(greedy=True, max_new_tokens=20)
    answers = generator.generate_batch([("so", name) for name in names], shared)
    assert len(generator.loaded_adapters) == 2
    for name, answer in zip(names, answers, strict=True):
        generator.set_adapter(name)
        assert generator.generate("so", shared) == answer


@pytest.fixture
def decoder(model_folder):
    return Generator(options=ModelOptions(base=str(model_folder), device="cpu")).engine.cpu_decoder


def test_kv_cache_rows_match_solo_logits(decoder):
    draw, ids = random.Random(0), torch.randint(1, 300, (12, 100), generator=torch.Generator().manual_seed(0))

    def alone(line, count):
        return decoder.forward(ids[line : line + 1, :count], KVCache(decoder, 1, count, [0]))[0, -1]

    with torch.inference_mode():
        lines, counts, cache, joins = [], [], None, iter(range(12))
        for turn in range(60):
            if (turn % 5 == 0 or not lines) and (line := next(joins, None)) is not None:
                count = draw.choice([1, 2, 30])
                new = KVCache(decoder, 1, count, [0])
                decoder.forward(ids[line : line + 1, :count], new)
                cache = new if cache is None else cache.append_rows(new) or cache
                lines, counts = [*lines, line], [*counts, count]
            if not lines:
                break
            logits = decoder.forward(
                torch.stack([ids[line, [count]] for line, count in zip(lines, counts, strict=True)]), cache
            )
            counts = [count + 1 for count in counts]
            for place, (line, count) in enumerate(zip(lines, counts, strict=True)):
                torch.testing.assert_close(logits[place, 0], alone(line, count), atol=1e-4, rtol=1e-4)
            gone = [place for place, count in enumerate(counts) if count > 40]
            if gone:
                kept = [place for place in range(len(lines)) if place not in gone]
                lines, counts = [lines[place] for place in kept], [counts[place] for place in kept]
                cache.keep_rows(kept) if kept else None
                cache = cache if kept else None
    assert tiny_models.CONTEXT > 41


def test_kv_cache_shrinks_after_long_rows(decoder):
    """However long the rows were that have gone."""
    with torch.inference_mode():
        cache = KVCache(decoder, 1, 100, [0])
        decoder.forward(torch.ones(1, 100, dtype=torch.int64), cache)
        for _ in range(9):
            new = KVCache(decoder, 1, 4, [0])
            decoder.forward(torch.ones(1, 4, dtype=torch.int64), new)
            cache.append_rows(new)
        cache.keep_rows(range(1, 10))
        for _ in range(9):
            new = KVCache(decoder, 1, 4, [0])
            decoder.forward(torch.ones(1, 4, dtype=torch.int64), new)
            cache.append_rows(new)
    rows, length = cache.kv.shape[2], cache.kv.shape[4]
    assert rows * length <= 1.25**2 * 18 * 4


def test_no_draft_model_for_last_tokens(model_folder, monkeypatch):
    monkeypatch.setattr(CpuDecoder, "draft_model", property(lambda self: pytest.fail("a draft was made")))
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    rows = [row_of(generator, "so", None, limit, None) for limit in (20, 40)]
    generator.engine.add(rows)
    while len(rows[1].output_ids) < 19:
        generator.engine.step()
    while generator.engine.sequences:
        generator.engine.step()


@pytest.mark.parametrize("left", [2, 3, 4])
def test_draft_with_full_cache_is_right(model_folder, monkeypatch, left):
    """The draft is then the first to need room, and making it moves what is there to the left."""
    monkeypatch.setattr(
        CpuDecoder, "draft_model", property(lambda self: self)
    )  # its guesses are right, so it goes on to guess
    monkeypatch.setattr(inference_batch, "MIN_DRAFT_TOKENS", 1)
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    expected = generator.generate("so", SamplingParams(greedy=True, max_new_tokens=30, repetition_penalty=1.2)).text
    writer, moved, guess = generator.engine, [], speculative.DraftDecoder.propose

    def seen(guesser, cache):
        before = cache.used
        count = guess(guesser, cache)
        moved.append(cache.used < before)
        return count

    monkeypatch.setattr(speculative.DraftDecoder, "propose", seen)
    first, late = row_of(generator, PROMPTS[2], None, 12, None), row_of(generator, "so", None, 30, None)
    writer.add([first])
    while len(first.output_ids) < 12 - left:
        writer.step()
    writer.add([late])
    while writer.sequences:
        writer.step()
    assert late.detokenizer.text == expected
    assert any(moved)
