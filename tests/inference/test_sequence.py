"""Text from tokens, as they come."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_tuner import ModelOptions, SamplingParams
from lora_tuner.inference.detokenizer import IncrementalDetokenizer
from lora_tuner.inference.sequence import Sequence
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import tiny_models

BYTES = tiny_models.tokenizer()


def ids_of(text):
    return BYTES(text)["input_ids"]


def whole(tokenizer, prompt, new):
    """The text of all tokens at once, without that of the prompt."""

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode(prompt + new)[len(decode(prompt)) :]


@pytest.mark.parametrize("prompt", ["the actor", "", "☕", "the actor "])
@pytest.mark.parametrize("text", [" never works. 👩‍👩‍👧 ☕☕ ü\n\n x", "  ", "\ufffd a \ufffd"])
def test_incremental_text_equals_full_decode(prompt, text):
    new = ids_of(text)
    made = IncrementalDetokenizer(BYTES, ids_of(prompt))
    for token in new:
        before = made.stable_text
        made.append(token)
        assert made.stable_text.startswith(before)
        assert "\ufffd" in text or "\ufffd" not in made.stable_text
    made.finish()
    assert made.text == whole(BYTES, ids_of(prompt), new) == text


def test_incomplete_characters_are_flushed():
    half = ids_of("☕")[:-1]
    made = IncrementalDetokenizer(BYTES, ids_of("so"))
    for token in half:
        made.append(token)
    assert made.stable_text == ""
    made.finish()
    assert made.text == whole(BYTES, ids_of("so"), half)
    assert set(made.text) == {"\ufffd"}
    made = IncrementalDetokenizer(BYTES, ids_of("so"))
    for token in [*half, *ids_of("abc")]:
        made.append(token)
    assert made.stable_text == whole(BYTES, ids_of("so"), half + ids_of("abc"))


def test_spaces_between_tokens_are_kept():
    """As Llama's first: a word's space is part of its token, and the decoder drops the first one."""
    words = {"<unk>": 0, "▁the": 1, "▁actor": 2, "s": 3, "▁never": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    made = IncrementalDetokenizer(tokenizer, [1])
    for token in (2, 3, 4, 4, 1, 2, 1, 2, 3):
        made.append(token)
    made.finish()
    assert made.text == " actors never never the actor the actors"


@pytest.mark.parametrize("prompt", ["", "so ", "😂😂", "a😂😂😂"])
def test_byte_tokens_form_whole_characters(prompt):
    """As in Llama 2 and Mistral: bytes beside each other become text together, or none of them does."""
    words = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    backend = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    text = "😂😂😂! ☕👩‍👩‍👧ü x"
    made = IncrementalDetokenizer(tokenizer, tokenizer(prompt)["input_ids"])
    for token in tokenizer(text)["input_ids"]:
        made.append(token)
        assert text.startswith(made.stable_text)
    made.finish()
    assert made.text == text


def test_special_tokens_keep_following_space():
    words = {"<unk>": 0, "▁the": 1, "▁actor": 2, "</s>": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    made = IncrementalDetokenizer(tokenizer, [1] + [3] * 8)
    for token in [2] + [3] * 8 + [1]:
        made.append(token)
    made.finish()
    assert made.text == " actor the"


@pytest.mark.parametrize("stop", [["actor"], ["ctor w", "zzz"], ["or", "actor"], ["☕ b"], [" "], ["a" * 50]])
def test_stop_string_at_any_token_boundary(stop):
    text = " one actor ☕ but actor works"
    expected = text[: min([text.find(it) for it in stop if it in text], default=len(text))]
    made = IncrementalDetokenizer(BYTES, ids_of("actor"), stop)
    for token in ids_of(text):
        made.append(token)
        assert expected.startswith(made.stable_text)
        if made.stopped:
            break
    made.finish()
    assert made.text == expected
    assert made.stopped == any(it in text for it in stop)


def test_stop_string_in_flushed_text():
    made = IncrementalDetokenizer(BYTES, ids_of("so"), ["\ufffd"])
    for token in ids_of("ab") + ids_of("☕")[:-1]:
        made.append(token)
    assert not made.stopped
    made.finish()
    assert (made.text, made.stopped) == ("ab", True)


@pytest.fixture
def base(gpt2):
    return load_base(find_base(str(gpt2)), ModelOptions(device="cpu"))


def spread(seed):
    return torch.randn(320, generator=torch.Generator().manual_seed(seed))


def test_logprobs_are_log_softmax(base):
    row = Sequence(base, ids_of("the"), SamplingParams(max_new_tokens=3, temperature=0.7), seed=4, top_logprobs=3)
    taken = [row.append_token(spread(number)) for number in range(3)]
    for number, (token, chance) in enumerate(zip(taken, row.logprobs, strict=True)):
        found = spread(number).log_softmax(-1)
        assert chance.token == token
        assert chance.logprob == pytest.approx(float(found[token]))
        assert [place for place, _ in chance.top] == found.topk(3).indices.tolist()
        assert [value for _, value in chance.top] == pytest.approx(found.topk(3).values.tolist())


def test_logprobs_are_optional(base):
    row = Sequence(base, ids_of("the"), SamplingParams(max_new_tokens=3, greedy=True))
    row.append_token(spread(0))
    assert row.logprobs == []
    none = Sequence(base, ids_of("the"), SamplingParams(max_new_tokens=3, greedy=True), top_logprobs=0)
    none.append_token(spread(0))
    assert none.logprobs[0].top == []


def test_sequence_ends_at_limit_eos_nan(base):
    row = Sequence(base, ids_of("the"), SamplingParams(max_new_tokens=2, greedy=True))
    for number in range(2):
        assert not row.done
        row.append_token(spread(number))
    assert (row.done, row.complete, row.finished) == (True, True, False)
    row = Sequence(base, ids_of("the"), SamplingParams(max_new_tokens=9, greedy=True))
    row.append_token(torch.nn.functional.one_hot(torch.tensor(0), 320).float())
    assert (row.done, row.complete, row.finished, row.output_ids) == (True, True, True, [])
    row = Sequence(base, ids_of("the"), SamplingParams(max_new_tokens=9, greedy=True), adapter="loud")
    row.append_token(torch.full((320,), float("nan")))
    assert (row.done, row.complete, row.finished) == (True, True, False)
    assert str(row.error).startswith("loud produces logits that are not finite")


def test_generation_config_eos_ends_sequence(gpt2):
    """The end of a turn is not always the tokenizer's end of a text."""
    base = load_base(find_base(str(gpt2)), ModelOptions(device="cpu"))
    base.model.generation_config.eos_token_id = [0, 7]
    row = Sequence(base, ids_of("the"), SamplingParams(max_new_tokens=9, greedy=True))
    row.append_token(torch.nn.functional.one_hot(torch.tensor(7), 320).float())
    assert (row.finished, row.output_ids) == (True, [])


def test_token_buffer_grows_on_demand(base):
    row = Sequence(base, ids_of("the"), SamplingParams(max_new_tokens=10**9, greedy=True, repetition_penalty=2.0))
    assert row.max_new_tokens == tiny_models.CONTEXT - len(row.prompt_ids)
    assert row.token_ids.numel() == len(row.prompt_ids)
    taken = [row.append_token(spread(number)) for number in range(30)]
    assert row.token_ids[0, : row.length].tolist() == row.prompt_ids + row.output_ids == ids_of("the") + taken
