"""Incremental text, log-probabilities and the end of a sequence."""

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


def encode(text):
    return BYTES(text)["input_ids"]


def decode_all(tokenizer, prompt, new):
    """Decode all tokens at once, without the text of the prompt."""

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode(prompt + new)[len(decode(prompt)) :]


@pytest.mark.parametrize("prompt", ["the actor", "", "☕", "the actor "])
@pytest.mark.parametrize("text", [" never works. 👩‍👩‍👧 ☕☕ ü\n\n x", "  ", "\ufffd a \ufffd"])
def test_incremental_text_equals_full_decode(prompt, text):
    new = encode(text)
    detokenizer = IncrementalDetokenizer(BYTES, encode(prompt))
    for token in new:
        before = detokenizer.stable_text
        detokenizer.append(token)
        assert detokenizer.stable_text.startswith(before)
        assert "\ufffd" in text or "\ufffd" not in detokenizer.stable_text
    detokenizer.finish()
    assert detokenizer.text == decode_all(BYTES, encode(prompt), new) == text


def test_incomplete_characters_are_flushed():
    half = encode("☕")[:-1]
    detokenizer = IncrementalDetokenizer(BYTES, encode("so"))
    for token in half:
        detokenizer.append(token)
    assert detokenizer.stable_text == ""
    detokenizer.finish()
    assert detokenizer.text == decode_all(BYTES, encode("so"), half)
    assert set(detokenizer.text) == {"\ufffd"}
    detokenizer = IncrementalDetokenizer(BYTES, encode("so"))
    for token in [*half, *encode("abc")]:
        detokenizer.append(token)
    assert detokenizer.stable_text == decode_all(BYTES, encode("so"), half + encode("abc"))


def test_spaces_between_tokens_are_kept():
    """As in Llama 1: a word's space is part of its token, and the decoder drops the first one."""
    words = {"<unk>": 0, "▁the": 1, "▁actor": 2, "s": 3, "▁never": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    detokenizer = IncrementalDetokenizer(tokenizer, [1])
    for token in (2, 3, 4, 4, 1, 2, 1, 2, 3):
        detokenizer.append(token)
    detokenizer.finish()
    assert detokenizer.text == " actors never never the actor the actors"


@pytest.mark.parametrize("prompt", ["", "so ", "😂😂", "a😂😂😂"])
def test_byte_tokens_form_whole_characters(prompt):
    """As in Llama 2 and Mistral: adjacent byte tokens become text together or not at all."""
    words = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    backend = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    text = "😂😂😂! ☕👩‍👩‍👧ü x"
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer(prompt)["input_ids"])
    for token in tokenizer(text)["input_ids"]:
        detokenizer.append(token)
        assert text.startswith(detokenizer.stable_text)
    detokenizer.finish()
    assert detokenizer.text == text


def test_special_tokens_keep_following_space():
    words = {"<unk>": 0, "▁the": 1, "▁actor": 2, "</s>": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    detokenizer = IncrementalDetokenizer(tokenizer, [1] + [3] * 8)
    for token in [2] + [3] * 8 + [1]:
        detokenizer.append(token)
    detokenizer.finish()
    assert detokenizer.text == " actor the"


@pytest.mark.parametrize("stop", [["actor"], ["ctor w", "zzz"], ["or", "actor"], ["☕ b"], [" "], ["a" * 50]])
def test_stop_string_at_any_token_boundary(stop):
    text = " one actor ☕ but actor works"
    expected = text[: min([text.find(string) for string in stop if string in text], default=len(text))]
    detokenizer = IncrementalDetokenizer(BYTES, encode("actor"), stop)
    for token in encode(text):
        detokenizer.append(token)
        assert expected.startswith(detokenizer.stable_text)
        if detokenizer.stopped:
            break
    detokenizer.finish()
    assert detokenizer.text == expected
    assert detokenizer.stopped == any(string in text for string in stop)


def test_stop_string_in_flushed_text():
    detokenizer = IncrementalDetokenizer(BYTES, encode("so"), ["\ufffd"])
    for token in encode("ab") + encode("☕")[:-1]:
        detokenizer.append(token)
    assert not detokenizer.stopped
    detokenizer.finish()
    assert (detokenizer.text, detokenizer.stopped) == ("ab", True)


def test_stop_string_is_kept_on_request():
    for stop, expected in ((["act", "actor"], " one act"), (["or w"], " one actor w")):
        detokenizer = IncrementalDetokenizer(BYTES, encode("so"), stop, include_stop=True)
        for token in encode(" one actor works"):
            detokenizer.append(token)
            assert expected.startswith(detokenizer.stable_text)
            if detokenizer.stopped:
                break
        assert (detokenizer.stopped, detokenizer.text) == (True, expected)


def test_early_stop_string_ends_nothing():
    tokens = encode(" one actor never an actor")
    first = next(count for count in range(len(tokens)) if "actor" in BYTES.decode(tokens[:count]))
    for min_tokens, expected in ((first - 1, " one "), (first, " one actor never an ")):
        detokenizer = IncrementalDetokenizer(BYTES, encode("so"), ["actor"], min_tokens=min_tokens)
        for token in tokens:
            if not detokenizer.stopped:
                detokenizer.append(token)
                assert expected.startswith(detokenizer.stable_text)
        assert (detokenizer.stopped, detokenizer.text) == (True, expected)


@pytest.fixture
def base(gpt2):
    return load_base(find_base(str(gpt2)), ModelOptions(device="cpu"))


def random_logits(seed):
    return torch.randn(320, generator=torch.Generator().manual_seed(seed))


def test_logprobs_are_log_softmax(base):
    sequence = Sequence(
        base, encode("the"), SamplingParams(max_new_tokens=3, temperature=0.7), seed=4, top_logprobs=3
    )
    tokens = [sequence.append_token(random_logits(number)) for number in range(3)]
    for number, (token, recorded) in enumerate(zip(tokens, sequence.logprobs, strict=True)):
        logprobs = random_logits(number).log_softmax(-1)
        assert recorded.token == token
        assert recorded.logprob == pytest.approx(float(logprobs[token]))
        assert [token for token, _ in recorded.top] == logprobs.topk(3).indices.tolist()
        assert [value for _, value in recorded.top] == pytest.approx(logprobs.topk(3).values.tolist())


def test_logprobs_are_optional(base):
    sequence = Sequence(base, encode("the"), SamplingParams(max_new_tokens=3, greedy=True))
    sequence.append_token(random_logits(0))
    assert sequence.logprobs == []
    none = Sequence(base, encode("the"), SamplingParams(max_new_tokens=3, greedy=True), top_logprobs=0)
    none.append_token(random_logits(0))
    assert none.logprobs[0].top == []


def test_sequence_ends_at_limit_eos_nan(base):
    sequence = Sequence(base, encode("the"), SamplingParams(max_new_tokens=2, greedy=True))
    for number in range(2):
        assert not sequence.done
        sequence.append_token(random_logits(number))
    assert (sequence.done, sequence.complete, sequence.finished) == (True, True, False)
    sequence = Sequence(base, encode("the"), SamplingParams(max_new_tokens=9, greedy=True))
    sequence.append_token(torch.nn.functional.one_hot(torch.tensor(0), 320).float())
    assert (sequence.done, sequence.complete, sequence.finished, sequence.output_ids) == (True, True, True, [])
    sequence = Sequence(base, encode("the"), SamplingParams(max_new_tokens=9, greedy=True), adapter="loud")
    sequence.append_token(torch.full((320,), float("nan")))
    assert (sequence.done, sequence.complete, sequence.finished) == (True, True, False)
    assert str(sequence.error).startswith("loud produces logits that are not finite")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ([5, 9], True)),
        ({"ignore_eos": True}, ([5, 9, 0, 7], False)),
        ({"stop_token_ids": [9]}, ([5], True)),
        ({"stop_token_ids": [7], "ignore_eos": True}, ([5, 9, 0], True)),
        ({"min_new_tokens": 3}, ([5, 9, 1, 7], False)),
        ({"min_new_tokens": 4, "stop_token_ids": [7]}, ([5, 9, 1, 1], False)),
    ],
)
def test_stop_tokens_end_sequence(base, settings, expected):
    """The likeliest tokens are 5, 9, 0 (the end of text) and 7; the second likeliest is always 1."""
    sequence = Sequence(base, encode("the"), SamplingParams(max_new_tokens=4, greedy=True, **settings))
    for token in (5, 9, 0, 7):
        if not sequence.done:
            logits = torch.zeros(320)
            logits[[1, token]] = torch.tensor([1.0, 2.0])
            sequence.append_token(logits)
    assert (sequence.output_ids, sequence.finished) == expected


def test_generation_config_eos_ends_sequence(gpt2):
    """The end of a turn may differ from the end-of-text token of the tokenizer."""
    base = load_base(find_base(str(gpt2)), ModelOptions(device="cpu"))
    base.model.generation_config.eos_token_id = [0, 7]
    sequence = Sequence(base, encode("the"), SamplingParams(max_new_tokens=9, greedy=True))
    sequence.append_token(torch.nn.functional.one_hot(torch.tensor(7), 320).float())
    assert (sequence.finished, sequence.output_ids) == (True, [])


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", True),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", False),
        ("{{ raise_exception('no') }}", False),
        (None, False),
    ],
)
def test_turn_end_of_template_ends_sequence(gpt2, template, ends):
    """ChatML on a base whose end of text is another token."""
    base = load_base(find_base(str(gpt2)), ModelOptions(device="cpu"))
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    base.tokenizer.chat_template = template
    turn_end = base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    sequence = Sequence(base, encode("the"), SamplingParams(max_new_tokens=9, greedy=True))
    sequence.append_token(torch.nn.functional.one_hot(torch.tensor(turn_end), 400).float())
    assert (sequence.finished, sequence.output_ids) == (ends, [] if ends else [turn_end])


def test_token_buffer_grows_on_demand(base):
    sequence = Sequence(
        base, encode("the"), SamplingParams(max_new_tokens=10**9, greedy=True, repetition_penalty=2.0)
    )
    assert sequence.max_new_tokens == tiny_models.CONTEXT - len(sequence.prompt_ids)
    assert sequence.token_ids.numel() == len(sequence.prompt_ids)
    tokens = [sequence.append_token(random_logits(number)) for number in range(30)]
    assert (
        sequence.token_ids[0, : sequence.length].tolist()
        == sequence.prompt_ids + sequence.output_ids
        == encode("the") + tokens
    )
