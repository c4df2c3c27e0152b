"""Samples of a run: texts of base and adapter for the same prompts, from its start to its end."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.cells import cell_len

from lora_tuner import Generator, Library, ModelOptions, SamplingParams, resume, train
from lora_tuner.adapters.samples import SAMPLES_FILE, Sample, read_samples
from lora_tuner.errors import AdapterError, ConfigError, GenerationError, Notice
from lora_tuner.inference import samples
from lora_tuner.models import fsdp, kernels
from lora_tuner.training import run
from lora_tuner.training import samples as run_samples
from lora_tuner.training.preview import make_preview
from lora_tuner.training.setup import prepare_training

from .. import tiny_models
from ..cli.test_commands import run as run_command
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
    assert [sample.step for sample in adapter.final_samples] == [10] * 3
    for sample in adapter.final_samples:
        assert [sample.base, sample.adapter] == generated(adapter, sample.prompt)
    assert any(sample.base != sample.adapter for sample in adapter.final_samples)


def test_samples_are_kept_with_adapter(settings, texts_csv):
    adapter = train(settings(dataset=texts_csv, max_steps=2))
    lines = [json.loads(line) for line in (adapter.path / SAMPLES_FILE).read_text().splitlines()]
    assert lines == [sample.model_dump() for sample in adapter.samples]
    rows = Path(texts_csv).read_text().splitlines()
    assert all(any(row.startswith(line["prompt"]) for row in rows) for line in lines)
    section = (adapter.path / "README.md").read_text().split("## Samples\n")[1].split("## Limitations")[0]
    assert [line["step"] for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert section.count("\n| ") == 2 + len(adapter.final_samples)
    assert all(f"\n| {sample.prompt} | " in section for sample in adapter.final_samples)
    assert Library(adapter.path.parent).rename("texts", "films").samples == adapter.samples


def test_preview_shows_sample_prompts(settings, texts_csv):
    config = settings(dataset=texts_csv, eval_rows=100)
    previewed = make_preview(config, 1).sample_prompts
    assert previewed == prepare_training(config).sample_prompts
    assert len(previewed) == 3
    shown = run_command("train", "--base", config.base, "--dataset", texts_csv, "--preview", 1).stdout
    assert all(f"\n  {prompt}\n" in shown.partition("(--sample-prompt):")[2] for prompt in previewed)
    assert make_preview(settings(sample_prompt=PROMPTS), 1).sample_prompts == PROMPTS


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
    for sample in adapter.final_samples:
        assert [sample.base, sample.adapter] == generated(adapter, sample.prompt)
    assert (
        "with the same seed when training\nhad ended, through the chat template"
        in (adapter.path / "README.md").read_text()
    )


def weights(adapter):
    return (adapter.path / "adapter_model.safetensors").read_bytes()


PROMPTS = ["Acting", "The plot"]


def test_samples_follow_the_evaluations(settings):
    notices = []
    adapter = train(settings(max_steps=5, eval_every=2, sample_prompt=PROMPTS, dropout=0.1), notices.append)
    assert [(sample.step, sample.prompt) for sample in adapter.samples] == [
        (step, prompt) for step in (0, 2, 4, 5) for prompt in PROMPTS
    ]
    first = {sample.prompt: sample.base for sample in adapter.samples}
    assert all(sample.base == first[sample.prompt] for sample in adapter.samples)
    assert all(sample.adapter == sample.base for sample in adapter.samples[:2])
    assert [sample.step for sample in adapter.final_samples] == [5, 5]
    assert "\n| Acting | " in (adapter.path / "README.md").read_text()
    lines = [event.text for event in notices if isinstance(event, Notice)]
    shown = [line for line in lines if line.startswith(("Acting ", "The plot "))]
    assert len(shown) == 3 * len(PROMPTS)
    assert all(cell_len(line) <= 80 for line in shown)


@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_samples_change_no_weight(settings, monkeypatch, checkpointing):
    """Nor any random state, of which dropout, numpy and Python take numbers."""
    changes = {"max_steps": 5, "eval_every": 2, "dropout": 0.2, "gradient_checkpointing": checkpointing}
    states = []

    def watch(self, state, step, **options):
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        take(self, state, step, **options)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
        states.append(step)

    take = run_samples.RunSamples._take
    with monkeypatch.context() as patched:
        patched.setattr(run_samples.RunSamples, "_take", watch)
        sampled = train(settings(name="with", sample_prompt=PROMPTS, **changes))
    assert states == [0, 2, 4, 5]
    for name in ("on_train_begin", "on_log"):
        monkeypatch.setattr(run_samples.RunSamples, name, lambda *arguments, **options: None)
    monkeypatch.setattr(run_samples.RunSamples, "finish", lambda *arguments: [])
    plain = train(settings(name="without", **changes))
    assert weights(sampled) == weights(plain)
    assert sampled.manifest.result == plain.manifest.result


@pytest.mark.parametrize("step", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_resumed_run_has_all_samples(settings, stop_at, step):
    changes = {"max_steps": 6, "eval_every": 2, "sample_prompt": PROMPTS}
    whole = train(settings(name="whole", **changes))
    with stop_at(step):
        train(settings(name="stopped", **changes))
    resumed = resume("stopped")
    assert resumed.samples == whole.samples
    assert weights(resumed) == weights(whole)


def test_samples_of_parent_begin_with_it(settings):
    first = train(settings(name="first", max_steps=5, learning_rate=0.1, sample_prompt=PROMPTS))
    second = train(settings(name="second", parent="first", max_steps=1, sample_prompt=PROMPTS))
    start = [sample for sample in second.samples if sample.step == 0]
    assert [sample.adapter for sample in start] == [sample.adapter for sample in first.final_samples]
    assert any(sample.adapter != sample.base for sample in start)


def test_kept_step_has_the_final_samples(settings):
    """With patience it is not the last one."""
    changes = {"eval_every": 2, "patience": 1, "learning_rate": 0.2, "schedule": "constant", "max_rows": 40}
    adapter = train(settings(max_steps=60, sample_prompt=PROMPTS, **changes))
    kept, last = adapter.manifest.run.kept_step, adapter.manifest.run.steps
    assert kept < last
    assert {sample.step for sample in adapter.final_samples} == {kept}
    assert {sample.step for sample in adapter.samples} == set(range(0, last + 1, 2))


def test_samples_stay_within_budget(settings, monkeypatch):
    """Two of the points have half of it; that the others are left out is said once."""
    monkeypatch.setattr(run_samples, "TIME_SHARE", 1.0)
    monkeypatch.setattr(run_samples, "SHORT_RUN", 40.0)
    clock = [0.0]
    monkeypatch.setattr(run_samples, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    generate, limits = samples.PromptSampler.generate, []

    def take_time(self, seconds):
        limits.append(seconds)
        clock[0] += 9.0
        return generate(self, seconds)

    monkeypatch.setattr(samples.PromptSampler, "generate", take_time)
    notices = []
    adapter = train(settings(max_steps=8, eval_every=1, sample_prompt=PROMPTS), notices.append)
    assert limits == [10.0] * 4
    assert [sample.step for sample in adapter.samples[:: len(PROMPTS)]] == [0, 1, 4, 8]
    said = [event.text for event in notices if isinstance(event, Notice) and "no samples" in event.text]
    assert said == ["Step 2 and some later ones have no samples: these may take at most 3% of the run."]


def test_error_ends_samples_not_run(settings, monkeypatch):
    calls = []

    def fail_later(self, seconds):
        calls.append(self)
        if len(calls) == 3:
            raise GenerationError("logits are not finite.")
        return ["text"] * len(PROMPTS)

    monkeypatch.setattr(samples.PromptSampler, "generate", fail_later)
    notices = []
    adapter = train(settings(max_steps=5, eval_every=1, sample_prompt=PROMPTS), notices.append)
    assert [sample.step for sample in adapter.samples] == [0, 0, 1, 1]
    assert len(calls) == 3
    texts = [event.text for event in notices if isinstance(event, Notice)]
    assert texts.count("No more samples of the adapter were generated: logits are not finite.") == 1


@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        (["A", "A"], "given twice"),
        (["  "], "blank"),
        (["a" * 1001], "at most 1,000 characters"),
        ([str(number) for number in range(11)], "at most 10"),
    ],
)
def test_bad_sample_prompts_are_refused(settings, prompts, why):
    with pytest.raises(ValueError, match=why):
        settings(sample_prompt=prompts)


def test_unusable_prompt_stops_before_training(settings, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="sample_prompt: a prompt fills the context"):
        train(settings(sample_prompt=["many " * 190]))
    monkeypatch.setattr(fsdp, "shard_count", lambda: 2)
    with pytest.raises(ConfigError, match="sample_prompt: FSDP divides the base"):
        run_samples.RunSamples(prepare_training(settings(sample_prompt=PROMPTS)))
    assert not (tmp_path / "runs" / "reviews").exists()


def test_time_limit_cuts_samples(settings, monkeypatch):
    setup = prepare_training(settings())
    monkeypatch.setattr(samples, "MAX_NEW_TOKENS", 50)
    sampler = samples.PromptSampler(setup.base, ["The plot"], chat=False)
    assert sampler.generate(0) == [""]
    assert sampler.are_cut == [True]
    assert len(sampler.generate(60)[0]) > 0


def test_cut_samples_end_in_mark(settings):
    adapter = train(settings(max_steps=1, sample_prompt=PROMPTS))
    (sample, *_) = adapter.final_samples
    assert sample.adapter_cut  # after three tokens
    assert sample.shown[2] == f"{sample.adapter}\u2026"
    assert sample.shown[2].strip() in (adapter.path / "README.md").read_text().replace("\\", "")


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
        monkeypatch.setattr("lora_tuner.training.setup.held_out_prompts", lambda rows, conversations: [])
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
