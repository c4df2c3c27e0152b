"""Tokens come as often as they are likely, whatever is asked twice."""

import itertools
import math
from collections import Counter

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from lora_tuner import SamplingParams
from lora_tuner.inference import sampling as inference_sampling

LOGITS = [2.0, -1.0, 0.5, 1.9, -3.0, 1.0, 0.4]


def likely(temperature, top_k, top_p, repetition_penalty):
    """The share of each token, by hand: 0 and 1 have been written before."""
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


def surprise(seen, shares):
    """Pearson's chi-square; with 12 degrees of freedom it is above 40 once in 15,000 times, with fewer more rarely."""
    total = sum(seen.values())
    assert set(seen) <= set(shares)
    return sum((seen[token] - total * share) ** 2 / (total * share) for token, share in shares.items())


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, 7),
        ({"temperature": 0.5}, 7),
        ({"temperature": 2.5}, 7),
        ({"top_k": 3}, 3),
        ({"top_p": 0.7}, 3),
        ({"top_p": 0.05}, 1),
        ({"temperature": 1.5, "top_k": 5, "top_p": 0.85}, 4),
        ({"repetition_penalty": 2.0}, 7),
        ({"temperature": 1.2, "top_k": 4, "top_p": 0.85, "repetition_penalty": 1.5}, 3),
    ],
    ids=str,
)
def test_sampled_frequencies_match_probabilities(settings, tokens):
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0} | settings
    sampling, written, logits = SamplingParams(**settings), torch.tensor([[0, 1, 0]]), torch.tensor([LOGITS])
    seen = Counter(
        inference_sampling.make_logits_processors(sampling, seed)(written, logits.clone()).argmax().item()
        for seed in range(4000)
    )
    shares = likely(**settings)
    assert len(shares) == tokens
    assert surprise(seen, shares) < 40


def test_successive_samples_are_independent():
    logits = torch.tensor([[1.0, 0.0, 0.5]])
    chain = inference_sampling.make_logits_processors(
        SamplingParams(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0), 3
    )
    texts = [torch.zeros(1, length, dtype=torch.int64) for length in range(1, 4001)]
    drawn = [chain(text, logits.clone()).argmax().item() for text in texts]
    share = torch.softmax(logits[0].double(), 0).tolist()
    pairs = {(a, b): share[a] * share[b] for a in range(3) for b in range(3)}
    assert surprise(Counter(itertools.pairwise(drawn)), pairs) < 40
    neighbours = [
        inference_sampling.make_logits_processors(SamplingParams(seed=0), seed)(torch.tensor([[0]]), logits)
        .argmax()
        .item()
        for seed in range(4000)
    ]
    assert surprise(Counter(itertools.pairwise(neighbours)), _of_pairs(neighbours)) < 40


def _of_pairs(drawn):
    """How often each pair would come if neighbours had nothing to do with each other."""
    share = {token: count / len(drawn) for token, count in Counter(drawn).items()}
    return {(a, b): share[a] * share[b] for a in share for b in share}


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
    torch.testing.assert_close(inference_sampling.TopKTopPWarper(top_k, top_p)(None, scores), expected, atol=0, rtol=0)


def test_repeated_position_reuses_noise():
    """And the places after it have the luck that they would have had."""
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    texts = [torch.zeros(1, length, dtype=torch.int64) for length in range(5, 15)]
    once, again = (inference_sampling.make_logits_processors(SamplingParams(), 7) for _ in range(2))
    expected = [once(text, logits).argmax().item() for text in texts]
    found = []
    for place in range(0, 10, 2):
        pair = texts[place : place + 2]
        guesses = [again(text, logits).argmax().item() for text in pair]
        found += [again(text, logits).argmax().item() for text in pair]
        assert found[-2:] == guesses
    assert found == expected
