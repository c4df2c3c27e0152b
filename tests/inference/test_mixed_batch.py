"""Sequences of several adapters in one batch: each as it is alone."""

import itertools
import random

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_tuner import Generator, ModelOptions, SamplingParams

from .. import tiny_models
from .conftest import save_random_adapter
from .test_generator import PROMPTS, SHORT, patch_logits, prompt_of_length
from .test_multi_lora import save_opt


def peft_greedy_text(model, tokenizer, prompt, sampling):
    """Generate with plain PEFT up to the first near tie of the two best tokens.

    At a tie rounding decides, which depends on the batch shape. Returns the text, and True if there was no tie.
    """
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.bos_token_id]
    output = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(output.scores).topk(2).values
    close = ((best[:, 0] - best[:, 1]) < 1e-3).nonzero().flatten().tolist()
    end = len(ids) + (close[0] if close else len(best))
    before = tokenizer.decode(ids, skip_special_tokens=True)
    text = tokenizer.decode(output.sequences[0, :end], skip_special_tokens=True)[len(before) :]
    return (text.rstrip("\ufffd"), False) if close else (text, True)


@pytest.mark.parametrize("penalty", [pytest.param(1.0, marks=pytest.mark.slow), 1.3])
def test_mixed_batch_matches_solo_and_peft(model_folder, eight_adapters, penalty, decoder_kind):
    sampling = SamplingParams(greedy=True, max_new_tokens=10, repetition_penalty=penalty)
    requests = list(itertools.product(PROMPTS, eight_adapters))
    random.Random(0).shuffle(requests)
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    batched = dict(zip(requests, generator.generate_batch(requests, sampling), strict=True))
    without_tie, checked = 0, eight_adapters if penalty == 1.0 else eight_adapters[1::2]
    for name in checked:
        fresh = Generator(name, options=ModelOptions(device="cpu"))
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), f"adapters/{name}")
        for prompt in PROMPTS:
            solo = fresh.generate(prompt, sampling)
            text, complete = peft_greedy_text(peft.eval(), fresh.base.tokenizer, prompt, sampling)
            if complete:
                assert (solo.text, batched[prompt, name]) == (text, solo)
            assert solo.text.startswith(text)
            assert batched[prompt, name].text.startswith(text)
            without_tie += complete
    assert without_tie >= 6 * len(checked)
    for prompt in PROMPTS:
        assert not prompt or len({batched[prompt, name].text for name in eight_adapters}) >= 6


def test_padding_gets_no_repetition_penalty(model_folder, monkeypatch, decoder_kind):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    eos = generator.base.tokenizer.eos_token_id  # also the padding token

    def slightly_prefer_eos(logits):
        logits[:] = 0
        logits[..., 5], logits[..., eos] = 1, 1.15
        return logits

    patch_logits(generator, slightly_prefer_eos, monkeypatch)
    sampling = SamplingParams(greedy=True, max_new_tokens=3, repetition_penalty=1.3)
    outputs = generator.generate_batch([(PROMPTS[6], None), ("so", None), ("", None)], sampling)
    # An empty prompt is one end-of-text token, so here it is repeated.
    assert [output.tokens for output in outputs] == [0, 0, 1]


def test_sequences_at_context_limit_match_solo(model_folder, eight_adapters):
    generator = Generator(*eight_adapters[:3], options=ModelOptions(device="cpu"))
    sampling = SamplingParams(greedy=True, max_new_tokens=12, repetition_penalty=1.0)
    lengths = [3, *(tiny_models.CONTEXT - room for room in (13, 12, 11, 4, 1))]
    prompts = [prompt_of_length(generator.base.tokenizer, length) for length in lengths]
    requests = list(itertools.product(prompts, [*eight_adapters[:3], None]))
    outputs = dict(zip(requests, generator.generate_batch(requests, sampling), strict=True))
    for name in (*eight_adapters[:3], None):
        fresh = Generator(*[name] if name else [], options=ModelOptions(base=str(model_folder), device="cpu"))
        for prompt in prompts:
            assert outputs[prompt, name] == fresh.generate(prompt, sampling)
    assert {output.tokens for output in outputs.values() if not output.finished} == {12, 11, 4, 1}


def test_sampling_is_independent_of_batch(model_folder, eight_adapters):
    sampling = SamplingParams(seed=11, max_new_tokens=10)
    requests = [
        ("so", "one"),
        (PROMPTS[5], "six"),
        ("the actor", None),
        ("so", "nine"),
        ("so", None),
        ("", "two"),
    ]
    solo = {}
    for pair in requests:
        (solo[pair],) = Generator(options=ModelOptions(base=str(model_folder), device="cpu")).generate_batch(
            [pair], sampling
        )
    assert len({output.text for output in solo.values()}) == 6
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    draw = random.Random(0)
    for size in (1, 2, 3, 6, 6, 9):
        batch = draw.sample(requests, min(size, 6)) + draw.choices(requests, k=max(size - 6, 0))
        assert generator.generate_batch(batch, sampling) == [solo[pair] for pair in batch]


SEPARATE_BATCHES = "This base flattens the rows of a batch, so each adapter runs in its own batch."


def test_dora_in_mixed_batch(model_folder, eight_adapters):
    notices = []
    generator = Generator(
        options=ModelOptions(
            base=str(model_folder), device="cpu", notify=lambda notice: notices.append(notice.text)
        )
    )
    outputs = generator.generate_batch([("the actor", name) for name in ("six", "two", None, "six")], SHORT)
    assert notices == [
        f"{name} has no manifest, so only its shapes can be compared with {model_folder}."
        for name in ("six", "two")
    ]
    for output in outputs:
        generator.set_adapter(output.adapter)
        assert generator.generate("the actor", SHORT) == output


@pytest.mark.parametrize(
    "sampling", [SHORT, SamplingParams(seed=3, max_new_tokens=6, n=2)], ids=["greedy", "sampled"]
)
def test_flattened_base_runs_adapters_separately(tmp_path, sampling):
    opt = save_opt(tmp_path / "opt")
    save_random_adapter(opt, "a", 3, seed=1)
    save_random_adapter(opt, "b", 2, "fc1,fc2", seed=2, dora=True)
    notices = []
    generator = Generator(
        options=ModelOptions(base=str(opt), device="cpu", notify=lambda notice: notices.append(notice.text))
    )
    requests = [(prompt, name) for name in ("a", None, "b", "a") for prompt in ("the actor", "so")]
    outputs = generator.generate_batch(requests, sampling)
    assert [text for text in notices if "no manifest" not in text] == [SEPARATE_BATCHES]
    assert (generator.current_adapter, generator.loaded_adapters) == (None, ["a", "b"])
    expected = []
    for prompt, name in requests:
        fresh = Generator(*[name] if name else [], options=ModelOptions(base=str(opt), device="cpu"))
        expected += fresh.generate_all(prompt, sampling)
    assert outputs == expected
    assert len({output.text for output in outputs}) >= 5
    notices.clear()
    generator.generate_batch([("so", "a"), ("the actor", "b")], sampling)
    assert notices == []  # sent once only
