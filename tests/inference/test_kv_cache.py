"""Blocks of keys and values: each row has its own, and prompts that begin alike share them."""

import random

import pytest
import torch

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.inference.kv_cache import BLOCK_TOKENS, KVCache, PrefixCache
from lora_tuner.inference.sequence import Sequence

from .. import tiny_models
from .conftest import save_random_adapter

pytestmark = pytest.mark.usefixtures("kernels")
SHAPE = (1, 2, 1, BLOCK_TOKENS, 2)
OPENING = list(range(1, 3 * BLOCK_TOKENS + 1))  # of prompts, three blocks
GREEDY = SamplingParams(greedy=True, max_new_tokens=10, repetition_penalty=1.0)


@pytest.fixture
def generator(model_folder):
    return Generator(options=ModelOptions(base=str(model_folder), device="cpu", dtype="float32"))


@pytest.fixture
def decoder(generator):
    return generator.engine.cpu_decoder


def test_rows_match_solo_logits(decoder):
    draw = random.Random(0)
    texts = torch.randint(1, 300, (12, 100), generator=torch.Generator().manual_seed(0))

    def solo_logits(text, count):
        return decoder.forward(texts[text : text + 1, :count], decoder.new_cache([0]))[0, -1]

    with torch.inference_mode():
        rows, counts, cache, remaining = [], [], None, iter(range(12))  # rows: the text in each row
        for turn in range(60):
            if (turn % 5 == 0 or not rows) and (text := next(remaining, None)) is not None:
                count = draw.choice([1, 2, 30])
                added = decoder.new_cache([0])
                decoder.forward(texts[text : text + 1, :count], added)
                if cache is None:
                    cache = added
                else:
                    cache.append_rows(added)
                rows, counts = [*rows, text], [*counts, count]
            if not rows:
                break
            inputs = torch.stack([texts[text, [count]] for text, count in zip(rows, counts, strict=True)])
            logits = decoder.forward(inputs, cache)
            counts = [count + 1 for count in counts]
            for row, (text, count) in enumerate(zip(rows, counts, strict=True)):
                torch.testing.assert_close(logits[row, 0], solo_logits(text, count), atol=1e-4, rtol=1e-4)
            kept = [row for row, count in enumerate(counts) if count <= 40]
            if len(kept) < len(rows):
                rows, counts = [rows[row] for row in kept], [counts[row] for row in kept]
                if kept:
                    cache.keep_rows(kept)
                else:
                    cache = None
    assert tiny_models.CONTEXT > 41


@pytest.mark.parametrize("chunk", [1, 5, BLOCK_TOKENS, 30])
def test_padded_chunks_match_solo_logits(decoder, chunk):
    """One row has a prefix, another is padded over whole chunks."""
    texts = torch.randint(1, 300, (3, 60), generator=torch.Generator().manual_seed(0))
    lengths, cached = [60, 25, 50], [2 * BLOCK_TOKENS, 0, 0]
    with torch.inference_mode():
        whole = decoder.new_cache([0])
        decoder.forward(texts[:1], whole)
        padding = [50 - length + done for length, done in zip(lengths, cached, strict=True)]
        cache = decoder.new_cache(padding, [whole.blocks[0][:2], [], []])
        columns = torch.zeros(3, 50, dtype=torch.int64)
        for row, (length, done) in enumerate(zip(lengths, cached, strict=True)):
            columns[row, padding[row] :] = texts[row, done:length]
        for part in columns.split(chunk, 1):
            found = decoder.forward(part, cache, last_only=True)[:, 0]
        assert cache.lengths == lengths
        for row, length in enumerate(lengths):
            expected = decoder.forward(texts[row : row + 1, :length], decoder.new_cache([0]))[0, -1]
            torch.testing.assert_close(found[row], expected, atol=2e-5, rtol=1e-4)


def test_long_row_costs_others_nothing():
    cache = KVCache(SHAPE, [0])
    cache.extend(2_000)
    for _ in range(31):
        short = KVCache(SHAPE, [0])
        short.extend(20)
        blocks = short.blocks[0]
        cache.append_rows(short)
        assert cache.blocks[-1] is blocks  # not copied
    cache.extend(1)
    assert cache.lengths == [2_001] + [21] * 31
    blocks = [block for row in cache.blocks for block in row]
    assert len(blocks) * BLOCK_TOKENS <= 2_001 + 31 * 21 + 32 * BLOCK_TOKENS
    long = cache.blocks[0]
    cache.keep_rows([*range(1, 32)])
    assert not any(block is other for row in cache.blocks for block in row for other in long)


def run(engine, prompt_ids, lora=None, **settings):
    sequence = Sequence(engine.base, prompt_ids, GREEDY, lora=lora, top_logprobs=0, **settings)
    engine.add([sequence])
    while engine.sequences:
        engine.step()
    return sequence


def test_shared_opening_is_prefilled_once(generator, decoder, monkeypatch):
    """With and without the cache, outputs are within the rounding of a prefill in chunks."""
    engine = generator.engine
    prompts = [[*OPENING, 50 + number, 7] for number in range(3)]
    expected = [run(engine, prompt) for prompt in prompts]
    assert [sequence.cached_tokens for sequence in expected] == [0, 0, 0]
    engine.keep_prefixes(1_000)
    forward, columns = decoder.forward, []
    monkeypatch.setattr(
        decoder, "forward", lambda ids, *args, **kw: columns.append(ids.shape[1]) or forward(ids, *args, **kw)
    )
    found = [run(engine, prompt) for prompt in prompts]
    assert [sequence.cached_tokens for sequence in found] == [0, len(OPENING), len(OPENING)]
    assert [count for count in columns if count > 1] == [len(OPENING) + 2, 2, 2]
    for sequence, other in zip(found, expected, strict=True):
        assert sequence.output_ids == other.output_ids
        logprobs = torch.tensor([[token.logprob for token in row.logprobs] for row in (sequence, other)])
        torch.testing.assert_close(*logprobs, atol=1e-4, rtol=0)


def test_last_prompt_token_is_computed(generator):
    generator.engine.keep_prefixes(1_000)
    first, again = run(generator.engine, OPENING), run(generator.engine, OPENING)
    assert (again.cached_tokens, again.output_ids) == (len(OPENING) - BLOCK_TOKENS, first.output_ids)


def test_scored_prompt_is_computed_whole(generator):
    generator.engine.keep_prefixes(1_000)
    run(generator.engine, OPENING)
    scored = run(generator.engine, OPENING, score_prompt=True)
    assert (scored.cached_tokens, len(scored.prompt_logprobs)) == (0, len(OPENING) - 1)


def test_shared_rows_may_run_together(generator):
    """Rows that share blocks go on separately, also with other adapters in the batch."""
    engine, prompts = generator.engine, [OPENING + [number] * number for number in (1, 5, 20)]
    expected = [run(engine, prompt).output_ids for prompt in prompts]
    engine.keep_prefixes(1_000)
    run(engine, [*OPENING, 9])
    sequences = [Sequence(engine.base, prompt, GREEDY) for prompt in prompts]
    engine.add(sequences)
    while engine.sequences:
        engine.step()
    assert [sequence.cached_tokens for sequence in sequences] == [len(OPENING)] * 3
    assert [sequence.output_ids for sequence in sequences] == expected


def test_adapter_versions_share_no_blocks(generator, model_folder):
    engine = generator.engine
    for name in ("one", "two"):
        save_random_adapter(model_folder, name, seed=len(name))
    one, two = (generator.get_or_load(name)[1] for name in ("one", "two"))
    generator.unload("one")
    again = generator.get_or_load("one")[1]
    expected = [run(engine, OPENING, lora).output_ids for lora in (None, one, two, again)]
    engine.keep_prefixes(1_000)
    found = [run(engine, OPENING, lora) for lora in (None, one, two, again)]
    assert [sequence.cached_tokens for sequence in found] == [0, 0, 0, 0]
    assert [sequence.output_ids for sequence in found] == expected
    assert run(engine, OPENING, two).cached_tokens == 2 * BLOCK_TOKENS


def test_least_recently_used_blocks_go():
    cache = PrefixCache(4 * BLOCK_TOKENS)

    def add(first):
        row = KVCache(SHAPE, [0])
        row.extend(2 * BLOCK_TOKENS)
        cache.add(None, [first] * 2 * BLOCK_TOKENS, row.blocks[0])

    def find(first):
        return len(cache.find(None, [first] * 2 * BLOCK_TOKENS + [0]))

    add(1)
    add(2)
    assert (find(2), find(1)) == (2, 2)
    add(3)
    assert (find(1), find(2), find(3)) == (2, 0, 2)
    empty = PrefixCache()
    empty.add(None, [1] * BLOCK_TOKENS, KVCache(SHAPE, [0]).blocks[0])
    assert empty.find(None, [1] * 2 * BLOCK_TOKENS) == []


def test_cache_tokens_are_sum_of_lengths(generator, model_folder):
    """A cache of transformers has rows as long as the longest."""
    save_random_adapter(model_folder, "dora", dora=True)
    dora = generator.get_or_load("dora")[1]
    sequences = [Sequence(generator.base, [5] * count, GREEDY) for count in (100, 3, 4)]
    assert generator.engine.cache_tokens(sequences) == 137
    sequences += [Sequence(generator.base, [5] * count, GREEDY, lora=dora) for count in (50, 3)]
    assert generator.engine.cache_tokens(sequences) == 137 + 2 * 60


def test_fork_continues_copies_of_rows(decoder):
    texts = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        cache = decoder.new_cache([0, 0])
        decoder.forward(texts[:, :37], cache)
        blocks = [[block.kv.clone() for block in row] for row in cache.blocks]
        fork = cache.fork([1, 0, 1])
        new = torch.tensor([[5, 6], [7, 8], [9, 10]])
        logits = decoder.forward(new, fork)
        for row, text in enumerate((1, 0, 1)):
            whole = torch.cat([texts[text, :37], new[row]])[None]
            expected = decoder.forward(whole, decoder.new_cache([0]))[0, -2:]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)
    assert fork.lengths == [39] * 3
    assert cache.lengths == [37, 37]
    for row, before in zip(cache.blocks, blocks, strict=True):
        assert all(torch.equal(block.kv, kv) for block, kv in zip(row, before, strict=True))
    assert fork.blocks[0][0] is fork.blocks[2][0], "full blocks are shared"
