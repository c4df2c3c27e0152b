"""The context length of a base, whatever its config calls it, is where positions end."""

import pytest
import torch

from lora_tuner import ModelOptions, SamplingParams, train
from lora_tuner.errors import ContextLengthError, TrainingError
from lora_tuner.evaluation import held_out_loss
from lora_tuner.inference.generator import EncodedPrompt, Generator
from lora_tuner.models.loading import load_base
from lora_tuner.models.positions import NO_LIMIT
from lora_tuner.models.resolve import find_base

from ..model_families import CONTEXT, save_family


def load(folder):
    return load_base(find_base(str(folder)), ModelOptions(device="cpu"))


@pytest.mark.parametrize(
    ("family", "length"),
    [
        ("mpt", CONTEXT),
        ("gpt2", CONTEXT),
        ("opt", CONTEXT),
        ("bart", CONTEXT),
        ("gemma3", CONTEXT),
        ("roberta", CONTEXT - 1),  # it begins after the row of the padding token
        ("mistral", CONTEXT),  # its window is smaller
        ("bloom", NO_LIMIT),
        ("mamba", NO_LIMIT),
    ],
)
def test_context_length_of_family(tmp_path, family, length):
    assert load(save_family(tmp_path, family)).max_context == length


@pytest.mark.parametrize("name", ["max_sequence_length", "max_seq_length", "seq_length", "seq_len", "n_ctx"])
def test_context_length_by_other_names(tmp_path, name):
    assert load(save_family(tmp_path, "mamba", **{name: 24, "max_length": 7})).max_context == 24


def test_position_table_rules_over_config(tmp_path):
    folder = save_family(tmp_path, "roberta", pad_token_id=5)
    assert load(folder).max_context == CONTEXT - 6


def test_values_that_are_no_length_are_ignored(tmp_path):
    assert load(save_family(tmp_path, "mamba", max_seq_len=-1, seq_length=0)).max_context == NO_LIMIT


@pytest.mark.parametrize("family", ["gpt2", "opt", "roberta"])
def test_position_ids_count_from_zero(tmp_path, family):
    """RoBERTa takes them as rows of its table, in which the first is for padding."""
    model = load(save_family(tmp_path, family)).model
    ids, positions = torch.arange(100, 120)[None], torch.arange(20)[None]
    expected = model(ids).logits
    torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["mpt", "opt", "roberta"])
def test_generation_stops_at_context(tmp_path, family):
    generator = Generator(options=ModelOptions(base=str(save_family(tmp_path, family)), device="cpu"))
    context = generator.base.max_context
    sampling = SamplingParams(max_new_tokens=9, greedy=True)
    last = generator.generate(EncodedPrompt("", list(range(10, 9 + context))), sampling)
    assert last.tokens == 1 or last.finished
    with pytest.raises(ContextLengthError, match=f"has {context} tokens.* has a context of {context}: shorten"):
        generator.check_fits_context([7] * context)


@pytest.mark.parametrize("family", ["mpt", "opt", "roberta"])
def test_training_and_evaluation_stop_at_context(tmp_path, settings, family):
    folder = save_family(tmp_path / family, family)
    base = load(folder)
    config = settings(base=str(folder), max_length=base.max_context, max_steps=1, eval_rows=4)
    rows = held_out_loss.encode_held_out(base, ["the camera always works " * 40])
    assert [len(row) for row in rows] == [base.max_context]
    assert held_out_loss.measure_loss(base.model, base, rows).loss > 0
    assert train(config).manifest.run.steps == 1
    with pytest.raises(TrainingError, match=f"the context length of .* is {base.max_context} tokens"):
        train(config.model_copy(update={"max_length": base.max_context + 1, "overwrite": True}))


def test_wrapped_base_trains_with_gradient_checkpointing(tmp_path, settings):
    """Sizes and context of a multimodal base are those of its text config."""
    folder = save_family(tmp_path / "gemma3", "gemma3")
    config = settings(base=str(folder), max_steps=1, max_length=CONTEXT, gradient_checkpointing="on")
    assert train(config).manifest.run.steps == 1
