"""Samples at the end of a run: texts of base and adapter for prompts of held-out rows."""

import json
from pathlib import Path

import pytest
import torch

from lora_tuner import Generator, Library, ModelOptions, SamplingParams, train
from lora_tuner.adapters.samples import SAMPLES_FILE, Sample, read_samples
from lora_tuner.errors import AdapterError, GenerationError, Notice
from lora_tuner.inference import samples
from lora_tuner.models import fsdp, kernels
from lora_tuner.training import run
from lora_tuner.training.setup import prepare_training

from .. import tiny_models
from ..data.test_chat import conversation, save_chat_base


@pytest.fixture
def texts_csv(tmp_path):
    """Reviews without their numbers, which are unfit for prompts."""
    path = tmp_path / "texts.csv"
    rows = [text.partition(": ")[2] for text in tiny_models.reviews(120)]
    path.write_text("text\n" + "\n".join(dict.fromkeys(rows)) + "\n")
    return str(path)


def generated(adapter, prompt):
    """Texts of base and adapter, as `generate` gives them."""
    generator = Generator(adapter.path, options=ModelOptions(device="cpu"))
    sampling = SamplingParams(seed=samples.SEED, max_new_tokens=samples.MAX_NEW_TOKENS)
    requests = [(prompt, None), (prompt, adapter.path)]
    return [output.text for output in generator.generate_batch(requests, sampling, chat=adapter.is_chat)]


def test_samples_are_those_of_generate(settings, texts_csv, model_folder, monkeypatch):
    monkeypatch.setattr(samples, "MAX_NEW_TOKENS", 12)
    adapter = train(settings(base=str(model_folder), dataset=texts_csv, max_steps=10))
    assert len(adapter.samples) == 3
    assert [sample.step for sample in adapter.samples] == [10] * 3
    for sample in adapter.samples:
        assert [sample.base, sample.adapter] == generated(adapter, sample.prompt)
    assert any(sample.base != sample.adapter for sample in adapter.samples)


def test_samples_are_kept_with_adapter(settings, texts_csv):
    adapter = train(settings(dataset=texts_csv, max_steps=2))
    lines = [json.loads(line) for line in (adapter.path / SAMPLES_FILE).read_text().splitlines()]
    assert lines == [sample.model_dump() for sample in adapter.samples]
    rows = Path(texts_csv).read_text().splitlines()
    assert all(any(row.startswith(line["prompt"]) for row in rows) for line in lines)
    section = (adapter.path / "README.md").read_text().split("## Samples\n")[1].split("## Limitations")[0]
    assert section.count("\n| ") == 2 + len(lines)
    assert all(f"\n| {line['prompt']} | " in section for line in lines)
    assert Library(adapter.path.parent).rename("texts", "films").samples == adapter.samples


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sampling_changes_nothing(settings, model_folder, precision):
    setup = prepare_training(settings(base=str(model_folder), dtype=precision, dropout=0.1))
    batch = setup.collate([setup.sequences[0], setup.sequences[1]])

    def step():
        torch.manual_seed(1)
        setup.model.train()
        setup.model.zero_grad()
        loss = setup.loss(setup.model, batch, 10)
        loss.backward()
        return [loss.detach(), *(each.grad for each in setup.model.parameters() if each.requires_grad)]

    before, weights = step(), [each.clone() for each in setup.model.parameters()]
    state = torch.get_rng_state()
    attention = setup.base.model.config._attn_implementation
    with setup.model.disable_adapter():
        sampler = samples.PromptSampler(setup.base, ["The plot", "A"], chat=False)
        sampler.generate(9)
    sampler.generate(9)
    assert torch.equal(state, torch.get_rng_state())
    assert setup.model.training
    assert setup.base.model.config._attn_implementation == attention == kernels.VARLEN_ATTENTION
    assert all(map(torch.equal, weights, setup.model.parameters()))
    assert all(map(torch.equal, before, step()))


def test_chat_samples_use_template(settings, tmp_path):
    rows = [conversation(f"Is {text[6:20]} so?", text) for text in tiny_models.reviews(60)]
    talks = tmp_path / "talks.jsonl"
    talks.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    adapter = train(settings(base=str(save_chat_base(tmp_path / "talker")), dataset=str(talks), max_steps=2))
    assert adapter.samples[0].chat
    for sample in adapter.samples:
        assert [sample.base, sample.adapter] == generated(adapter, sample.prompt)
    assert (
        "with the same seed when training\nhad ended, through the chat template"
        in (adapter.path / "README.md").read_text()
    )


def test_time_limit_cuts_samples(settings, monkeypatch):
    setup = prepare_training(settings())
    monkeypatch.setattr(samples, "MAX_NEW_TOKENS", 50)
    sampler = samples.PromptSampler(setup.base, ["The plot"], chat=False)
    assert sampler.generate(0) == [""]
    assert len(sampler.generate(60)[0]) > 0


@pytest.mark.parametrize(
    ("cause", "why"),
    [
        ("prompts", "no held-out row has a beginning that can be a prompt"),
        ("shards", "the base is divided among processes"),
        ("error", "logits are not finite"),
    ],
)
def test_samples_that_fail_are_left_out(settings, texts_csv, monkeypatch, cause, why):
    """The run goes on without them, and says why."""

    def fail(*arguments):
        raise GenerationError("logits are not finite.")

    if cause == "prompts":
        monkeypatch.setattr(run, "held_out_prompts", lambda rows, conversations: [])
    elif cause == "shards":
        monkeypatch.setattr(fsdp, "shard_count", lambda: 2)
    else:
        monkeypatch.setattr(samples.PromptSampler, "generate", fail)
    notices = []
    setup = prepare_training(settings(dataset=texts_csv, max_steps=2), notices.append)
    library = Library(setup.config.adapters_dir)
    adapter = run._train_and_write(setup, library, None)
    assert adapter.samples == []
    assert not (adapter.path / SAMPLES_FILE).exists()
    assert "## Samples" not in (adapter.path / "README.md").read_text()
    texts = [event.text for event in notices if isinstance(event, Notice)]
    assert texts.count(f"No samples of the adapter were generated: {why}.") == 1


@pytest.mark.parametrize("line", [b"{", b"\xff", b'{"step": 1}', b'{"step": 1, "prompt": "a", "x": 2}', b"[]"])
def test_damaged_samples_are_named(tmp_path, line):
    (tmp_path / SAMPLES_FILE).write_bytes(
        Sample(step=1, prompt="a", base="b", adapter="c").model_dump_json().encode() + b"\n" + line
    )
    with pytest.raises(AdapterError, match=r"samples\.jsonl"):
        read_samples(tmp_path / SAMPLES_FILE)
