"""Draft tokens change the speed of the output, not its text."""

import pytest
import torch

from lora_tuner import Generator, ModelOptions, SamplingParams

from .test_generator import GREEDY


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParams(greedy=True, max_new_tokens=20, repetition_penalty=1.3),
        SamplingParams(seed=5, max_new_tokens=20),
        SamplingParams(seed=6, max_new_tokens=20, top_k=0, top_p=1.0, temperature=1.5),
    ],
)
@pytest.mark.parametrize("accurate", [True, False])
def test_speculative_decoding_keeps_text(
    model_folder, eight_adapters, draft_counts, monkeypatch, sampling, accurate
):
    """Accurate and wrong draft tokens, on the base and with an adapter."""
    without_draft = Generator(eight_adapters[0], options=ModelOptions(device="cpu"))
    monkeypatch.setattr(without_draft.engine.cpu_decoder, "draft_model", None)
    expected = {
        name: without_draft.generate_batch([("the actor", name)], sampling)[0]
        for name in (None, eight_adapters[0])
    }
    assert not any(draft_counts)
    draft_counts.clear()
    generator = Generator(eight_adapters[0], options=ModelOptions(device="cpu"))
    if not accurate:
        draft = generator.engine.cpu_decoder.draft_model
        monkeypatch.setattr(draft, "embed", torch.nn.Embedding.from_pretrained(draft.embed.weight.flip(0)))
    pieces = []
    for name, output in expected.items():
        generator.set_adapter(name)
        assert generator.generate("the actor", sampling, pieces.append) == output
        assert "".join(pieces) == output.text
        pieces.clear()
    assert any(draft_counts)
    assert not accurate or len(draft_counts) < 2 * 19


def test_speculative_decoding_respects_limits(model_folder, draft_counts):
    generator = Generator(options=ModelOptions(base=str(model_folder), device="cpu"))
    full_text = generator.generate("the actor", GREEDY).text
    for length in range(1, 8):
        output = generator.generate("the actor", GREEDY.model_copy(update={"max_new_tokens": length}))
        assert (output.tokens, output.finished) == (length, False)
        assert full_text.startswith(output.text.removesuffix("\ufffd"))
    stop = full_text[len(full_text) // 2 :][:2]
    assert (
        generator.generate("the actor", GREEDY.model_copy(update={"stop": [stop]})).text
        == full_text[: full_text.find(stop)]
    )
