"""What a run trains and measures on."""

import pytest
import torch
import yaml

from lora_tuner import Interrupted, Library, Notice, resume, train
from lora_tuner.adapters import adapter as adapters_adapter
from lora_tuner.config import TrainConfig
from lora_tuner.data import chat, eval_sets
from lora_tuner.data.splitting import content_hash
from lora_tuner.errors import BaseModelError, DataError, TrainingError, ignore_events
from lora_tuner.evaluation import gain_matrix, held_out_loss
from lora_tuner.settings_files import resolve_settings
from lora_tuner.training.inputs import load_inputs
from lora_tuner.training.preview import preview
from lora_tuner.training.setup import prepare_training

from .. import tiny_models
from ..data_files import jsonl
from .test_run import StopAt, weights


def test_held_out_rows_are_not_trained(settings, monkeypatch):
    config = settings()
    setup = prepare_training(config)
    trained = {setup.base.tokenizer.decode(row[:-1]) for row in setup.sequences.rows}
    held_out = {setup.base.tokenizer.decode(row[:-1]) for row in setup.held_out}
    assert trained
    assert held_out
    assert not trained & held_out


def write_pairs(path, count=60):
    texts = tiny_models.reviews(count)
    rows = [
        {"prompt": f"the {n} film", "chosen": text, "rejected": f"a plot {n}"} for n, text in enumerate(texts)
    ]
    path.write_text(jsonl(rows))
    return rows


@pytest.mark.parametrize("use_packing", [True, False])
def test_pairs_lie_in_one_sequence(settings, tmp_path, use_packing):
    rows = {row["prompt"]: row for row in write_pairs(tmp_path / "pairs.jsonl")}
    config = settings(dataset="pairs.jsonl", objective="dpo", max_length=32, packing=use_packing)
    inputs = load_inputs(config, ignore_events)
    assert len(inputs.sequences.rows) == 2 * len(inputs.dataset.train)
    for group in inputs.sequences.groups:
        assert all(
            second == first + 1 and first % 2 == 0 for first, second in zip(group[::2], group[1::2], strict=True)
        )
        assert sum(len(inputs.sequences.rows[row]) for row in group) <= 64
    decode = inputs.base.tokenizer.decode
    for text, chosen, rejected in zip(inputs.measured_texts, inputs.held_out, inputs.rejected, strict=True):
        row = rows[chat.decode_row(text)["prompt"]]
        assert decode(chosen[chosen >= 0]).strip().startswith(row["chosen"][:10])
        assert decode(rejected[rejected >= 0]).strip().startswith(row["rejected"])
    assert inputs.held_out_texts == inputs.measured_texts == inputs.dataset.held_out[: config.eval_rows]
    assert inputs.desired == []


def test_answers_with_labels_are_rows(settings, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl")
    inputs = load_inputs(settings(dataset="pairs.jsonl", objective="kto"), ignore_events)
    assert len(inputs.desired) == len(inputs.sequences.rows) == len(inputs.dataset.train)
    assert sum(inputs.desired) == len(inputs.desired) / 2
    for row, desired in zip(inputs.sequences.rows, inputs.desired, strict=True):
        answer = inputs.base.tokenizer.decode(row[row >= 0]).strip()
        assert answer.startswith("a plot") is not desired
    assert len(inputs.held_out) == len(inputs.rejected) == 8


def test_pair_without_room_is_left_out(settings, tmp_path):
    rows = write_pairs(tmp_path / "pairs.jsonl")
    long = [row | {"prompt": f"{row['prompt']} of {'film ' * 90}"} for row in rows[:9]]
    (tmp_path / "pairs.jsonl").write_text(jsonl([*rows, *long]))
    told = []
    config = settings(dataset="pairs.jsonl", objective="dpo", near_duplicates="keep")
    inputs = load_inputs(config, told.append)
    trained = sum("of film" in row for row in inputs.dataset.train)
    assert len(inputs.sequences.rows) == 2 * (len(inputs.dataset.train) - trained)
    skipped = f"Skipped {trained} rows of which an answer has nothing to learn, or both are alike,"
    assert any(getattr(event, "text", "").startswith(skipped) for event in told)


def test_long_rows_are_chunked(settings, tmp_path):
    (tmp_path / "long.csv").write_text("text\n" + "\n".join(f"{i} " + "word " * 60 for i in range(40)))
    run = {"dataset": "long.csv", "max_length": 32, "packing": False, "max_steps": 1}
    cut = train(settings(**run, name="cut", long_rows="truncate")).manifest
    chunked = train(settings(**run, name="chunked")).manifest
    assert cut.run.truncated_rows == cut.data.counts["train"] == cut.run.sequences
    assert chunked.run.sequences > 2 * cut.run.sequences
    assert (chunked.run.truncated_rows, chunked.run.used_share) == (0, 1)
    assert cut.run.used_share < 0.5


def test_default_max_length_fits_the_context(settings):
    config = settings()
    told = []
    adapter = train(TrainConfig(**config.model_dump(exclude_unset=True, exclude={"max_length"})), told.append)
    assert f"max_length: {tiny_models.CONTEXT}" in (adapter.path / adapters_adapter.RUN_FILE).read_text()
    assert any(
        f"Rows have at most {tiny_models.CONTEXT} tokens" in event.text
        for event in told
        if isinstance(event, Notice)
    )


def test_max_length_beyond_context_is_refused(settings):
    with pytest.raises(
        TrainingError, match=f"max_length is 512, but the context length of .* is {tiny_models.CONTEXT} tokens"
    ):
        train(settings(max_length=512))


def test_preview_shows_learned_tokens(settings):
    (row,) = preview(settings(max_length=tiny_models.CONTEXT), 1)
    assert row.tokens[-1] == tiny_models.END
    assert row.labels == [False] + [True] * (len(row.tokens) - 1)
    assert "".join(row.tokens[:-1]) == row.after == row.before


def other_model(folder, kind):
    from transformers import OPTConfig, OPTForCausalLM, RobertaConfig, RobertaForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 320, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    if kind == "opt":
        extra = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
        model = OPTForCausalLM(OPTConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1, **size, **extra))
    else:
        model = RobertaForCausalLM(RobertaConfig(intermediate_size=64, max_position_embeddings=130, **size))
    return tiny_models.save(model, folder)


def test_base_without_position_ids_is_padded(settings, tmp_path):
    base = other_model(tmp_path / "opt", "opt")
    told = []
    adapter = train(settings(base=str(base), long_rows="truncate"), told.append)
    assert any("Rows are padded, not packed" in event.text for event in told if isinstance(event, Notice))
    assert "packing: false" in (adapter.path / adapters_adapter.RUN_FILE).read_text()
    assert adapter.manifest.run.sequences == adapter.manifest.data.counts["train"]
    with pytest.raises(TrainingError, match="does not isolate packed rows: leave out --packing"):
        train(settings(base=str(base), packing=True, name="b"))


def test_bidirectional_model_is_refused(settings, tmp_path):
    base = other_model(tmp_path / "roberta", "roberta")
    with pytest.raises(BaseModelError, match="without is_decoder in config"):
        train(settings(base=str(base)))


@pytest.fixture
def films(tmp_path):
    """Twenty rows to measure on; four of them are rows of the training data too."""
    texts = [*tiny_models.reviews(120)[:4], *tiny_models.reviews(16, seed=3)]
    (tmp_path / "films.csv").write_text("text,label\n" + "".join(f"{text},1\n" for text in texts))
    return texts


def test_eval_dataset_is_not_trained_on(settings, films, tmp_path):
    alone, setup = prepare_training(settings()), prepare_training(settings(eval_dataset="films.csv"))
    assert alone.manifest.data.eval_dataset is None
    assert alone.manifest.data.near_duplicates == "drop"
    measured, held_out = set(films), set(alone.dataset.held_out)
    trained = {setup.base.tokenizer.decode(row[:-1]) for row in setup.sequences.rows}
    assert set(alone.dataset.train) & measured
    assert set(setup.dataset.train) == set(alone.dataset.train) - measured
    assert not set(setup.dataset.train) & (measured | held_out)
    assert not trained & measured
    assert set(setup.dataset.held_out) == measured
    assert setup.held_out_texts == setup.dataset.held_out[:8]
    adapter = train(settings(eval_dataset="films.csv"))
    facts, result = adapter.manifest.data, adapter.manifest.result
    assert facts.eval_dataset == "films.csv"
    assert facts.held_out_hash == content_hash(setup.held_out_texts) != alone.manifest.data.held_out_hash
    assert facts.held_out_rows == result.rows == 8
    assert facts.counts["in_eval_dataset"] == len(set(alone.dataset.train) & measured)
    assert facts.counts["held_out"] == len(held_out)
    assert facts.counts["read"] == sum(facts.counts.values()) - facts.counts["read"]
    assert gain_matrix.cached_rows(adapter) == eval_sets.EvalSet("reviews", setup.held_out_texts)
    assert result.base_loss == pytest.approx(
        held_out_loss.measure_loss(setup.base.model, setup.base, setup.held_out).loss, abs=1e-6
    )
    assert "\neval_dataset: films.csv\n" in (adapter.path / adapters_adapter.RUN_FILE).read_text()
    assert "| Evaluated on | films.csv |" in (adapter.path / adapters_adapter.CARD_FILE).read_text()
    again = train(resolve_settings(TrainConfig, {"name": "again"}, adapter.path / adapters_adapter.RUN_FILE))
    assert weights(again) == weights(adapter)


def test_measured_split_file_is_recorded_and_repeated(settings, tmp_path):
    texts = tiny_models.reviews(80)
    (tmp_path / "data").mkdir()
    for name, rows in (("train", texts[49::-1]), ("dev", texts[45:70]), ("test", texts[70:])):
        (tmp_path / "data" / f"{name}.csv").write_text("text\n" + "".join(f"{text}\n" for text in rows))
    adapter = train(settings(dataset="data", eval_rows=100))
    facts = adapter.manifest.data
    assert (facts.eval_dataset, facts.eval_split, facts.held_out_rows) == ("data", "validation", 25)
    assert set(gain_matrix.cached_rows(adapter).texts) == set(texts[45:70])
    assert facts.counts["read"] == 50
    assert "| Evaluated on | data (validation) |" in (adapter.path / adapters_adapter.CARD_FILE).read_text()
    again = train(resolve_settings(TrainConfig, {"name": "again"}, adapter.path / adapters_adapter.RUN_FILE))
    assert (weights(again), again.manifest.data) == (weights(adapter), facts)
    stream = train(settings(dataset="data", streaming=True, shuffle_buffer=20, name="stream"))
    assert (stream.manifest.data.eval_split, stream.manifest.data.held_out_rows) == ("validation", 8)
    assert stream.manifest.data.counts["in_eval_dataset"] > 0


def test_run_of_local_file_repeats_with_explicit_defaults(settings):
    adapter = train(settings())
    written = yaml.safe_load((adapter.path / adapters_adapter.RUN_FILE).read_text())
    assert not {"split", "eval_split", "shuffle_buffer"} & written.keys()
    old = adapter.path / "old.yaml"
    old.write_text(yaml.safe_dump(written | {"split": "train", "shuffle_buffer": 10_000, "name": "old"}))
    assert weights(train(resolve_settings(TrainConfig, {}, old))) == weights(adapter)


def test_resume_with_changed_eval_dataset_is_refused(settings, films, tmp_path):
    text = (tmp_path / "films.csv").read_text()
    with pytest.raises(Interrupted):
        train(settings(eval_dataset="films.csv", eval_rows=100), StopAt(2))
    (tmp_path / "films.csv").write_text(text + "one more row,1\n")
    with pytest.raises(TrainingError, match=r"changed since it stopped: data \(was .*\), held-out rows \(was "):
        resume("reviews")
    (tmp_path / "films.csv").write_text(text)
    assert resume("reviews").manifest.result.rows == 20


def test_wrong_eval_dataset_leaves_no_run(settings, tmp_path):
    (tmp_path / "empty.csv").write_text("text,label\n")
    for name, why in (
        ("empty.csv", r"^empty\.csv has no rows\.$"),
        ("none.csv", r"^There is no dataset 'none\.csv'"),
    ):
        with pytest.raises(DataError, match=why):
            train(settings(eval_dataset=name))
    assert list((tmp_path / "runs").iterdir()) == []
    assert Library().names() == []
