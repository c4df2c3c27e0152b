"""Sampled tokens follow their probabilities; a position uses the same noise twice."""

import itertools
import math
from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lora_tuner import SamplingParams
from lora_tuner.inference import sampling as inference_sampling
from lora_tuner.inference.generator import choose_seed

LOGITS = [2.0, -1.0, 0.5, 1.9, -3.0, 1.0, 0.4]


def token_probabilities(temperature, top_k, top_p, repetition_penalty):
    """Probability of each token, computed in plain Python; tokens 0 and 1 are in the prompt."""
    logits = [
        (logit / repetition_penalty if logit > 0 else logit * repetition_penalty) if token < 2 else logit
        for token, logit in enumerate(LOGITS)
    ]
    weights = [math.exp(logit / temperature) for logit in logits]
    kept, mass = [], 0.0
    best = sorted(range(len(weights)), key=lambda token: -weights[token])[: top_k or None]
    total = sum(weights[token] for token in best)
    for token in best:
        if mass < top_p:
            kept.append(token)
        mass += weights[token] / total
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


def chi_square(counts, probabilities):
    """Pearson's chi-square; with at most 12 degrees of freedom above 40 once in 15,000 times."""
    total = sum(counts.values())
    assert set(counts) <= set(probabilities)
    return sum(
        (counts[token] - total * probability) ** 2 / (total * probability)
        for token, probability in probabilities.items()
    )


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, 7),
        pytest.param({"temperature": 0.5}, 7, marks=pytest.mark.slow),
        pytest.param({"temperature": 2.5}, 7, marks=pytest.mark.slow),
        ({"top_k": 3}, 3),
        pytest.param({"top_p": 0.7}, 3, marks=pytest.mark.slow),
        ({"top_p": 0.05}, 1),
        pytest.param({"temperature": 1.5, "top_k": 5, "top_p": 0.85}, 4, marks=pytest.mark.slow),
        ({"repetition_penalty": 2.0}, 7),
        ({"temperature": 1.2, "top_k": 4, "top_p": 0.85, "repetition_penalty": 1.5}, 3),
    ],
    ids=str,
)
def test_sampled_frequencies_match_probabilities(settings, tokens):
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0} | settings
    sampling, prompt, logits = SamplingParams(**settings), torch.tensor([[0, 1, 0]]), torch.tensor([LOGITS])
    counts = Counter(
        inference_sampling.make_logits_processors(sampling, seed)(prompt, logits.clone()).argmax().item()
        for seed in range(4000)
    )
    probabilities = token_probabilities(**settings)
    assert len(probabilities) == tokens
    assert chi_square(counts, probabilities) < 40


def test_successive_samples_are_independent():
    logits = torch.tensor([[1.0, 0.0, 0.5]])
    processors = inference_sampling.make_logits_processors(
        SamplingParams(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0), 3
    )
    texts = [torch.zeros(1, length, dtype=torch.int64) for length in range(1, 4001)]
    samples = [processors(text, logits.clone()).argmax().item() for text in texts]
    probability = torch.softmax(logits[0].double(), 0).tolist()
    pairs = {(a, b): probability[a] * probability[b] for a in range(3) for b in range(3)}
    assert chi_square(Counter(itertools.pairwise(samples)), pairs) < 40
    first_samples = [
        inference_sampling.make_logits_processors(SamplingParams(seed=0), seed)(torch.tensor([[0]]), logits)
        .argmax()
        .item()
        for seed in range(4000)
    ]
    assert chi_square(Counter(itertools.pairwise(first_samples)), _pair_probabilities(first_samples)) < 40


def _pair_probabilities(samples):
    """Probability of each pair if successive samples are independent."""
    probability = {token: count / len(samples) for token, count in Counter(samples).items()}
    return {(a, b): probability[a] * probability[b] for a in probability for b in probability}


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(50, 0.95), (5, 0.5), (0, 0.9), (0, 0.2), (0, 1e-20), (3, 1.0), (1, 0.01), (1000, 0.3), (0, 1.0)],
)
@pytest.mark.parametrize("first", [256, 4])
def test_top_k_top_p_match_transformers(top_k, top_p, first, monkeypatch):
    monkeypatch.setattr(inference_sampling, "_SORTED_FIRST", first)
    scores = torch.randn(4, 300, generator=torch.Generator().manual_seed(top_k)) * 3
    expected = scores
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(
        inference_sampling.TopKTopPWarper(top_k, top_p)(None, scores), expected, atol=0, rtol=0
    )


@pytest.mark.parametrize("min_p", [1e-6, 0.05, 0.5, 1.0])
def test_min_p_matches_transformers(min_p):
    scores = torch.randn(4, 300, generator=torch.Generator().manual_seed(3)) * 3
    expected = MinPLogitsWarper(min_p)(None, scores)
    torch.testing.assert_close(inference_sampling.MinPWarper(min_p)(None, scores), expected, atol=0, rtol=0)


def processed(settings, token_ids, prompt_length=0, end_token_ids=()):
    """Return what greedy decoding makes of `LOGITS`."""
    sampling = SamplingParams(greedy=True, **settings)
    processors = inference_sampling.make_logits_processors(sampling, None, prompt_length, end_token_ids)
    return processors(torch.tensor([token_ids]), torch.tensor([LOGITS]))[0].tolist()


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"presence_penalty": 0.5}, {3: -0.5, 5: -0.5}),
        ({"frequency_penalty": -0.5}, {3: 1.0, 5: 0.5}),
        ({"presence_penalty": 1.0, "frequency_penalty": 0.25}, {3: -1.5, 5: -1.25}),
        ({"logit_bias": {0: -100.0, 6: 2.5}}, {0: -100.0, 6: 2.5}),
        # As in vLLM the bias comes before the penalties: (1.9 + 2.1) / 2 - 0.5.
        (
            {"logit_bias": {3: 2.1}, "repetition_penalty": 2.0, "presence_penalty": 0.5},
            {3: -0.4, 5: -1.0, 0: -1.0},
        ),
    ],
)
def test_bias_and_penalties_of_output(settings, changes):
    """Of the tokens 0, 0 | 3, 5, 3 the first two are the prompt."""
    expected = [logit + changes.get(token, 0) for token, logit in enumerate(LOGITS)]
    assert processed(settings, [0, 0, 3, 5, 3], 2) == pytest.approx(expected)
    only_prompt = processed({"presence_penalty": 1.0, "frequency_penalty": 1.0}, [0, 0], 2)
    assert only_prompt == pytest.approx(LOGITS)


def test_min_new_tokens_holds_back_ends():
    settings = {"min_new_tokens": 2, "logit_bias": {4: 100.0}}
    held = processed(settings, [0, 0, 3], 2, [0, 4])
    assert [token for token, logit in enumerate(held) if logit == -math.inf] == [0, 4]
    assert processed(settings, [0, 0, 3, 3], 2, [0, 4]).index(97.0) == 4


@pytest.mark.parametrize("temperature", [9e-6, 1e-40, 5e-324])
def test_tiny_temperature_is_greedy(temperature):
    sampling = SamplingParams(temperature=temperature, repetition_penalty=1e-9)
    assert choose_seed(sampling) is None
    with pytest.raises(ValidationError, match="greedy does not sample: leave seed out"):
        SamplingParams(temperature=temperature, seed=1)


def test_extreme_sampling_settings_stay_finite():
    sampling = SamplingParams(temperature=1e-5, repetition_penalty=1e-9)
    processors = inference_sampling.make_logits_processors(sampling, 0)
    logits = torch.tensor([[30.0, -1e4, 1e4, 0.0]])
    scores = processors(torch.tensor([[0, 1]]), logits)
    assert not scores.isnan().any()
    assert scores.argmax() == 0
