"""The share of a gain that comes from held-out rows with a near duplicate among the training rows."""

import json
import shutil

import pytest

from lora_tuner import EvalSet, Library, ModelOptions, TrainConfig, train
from lora_tuner.adapters.adapter import load_adapter_folder
from lora_tuner.adapters.manifest import SourceInfo
from lora_tuner.analysis.leak import _compare, measure_leak
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.splitting import is_held_out, row_hash
from lora_tuner.errors import DataError, ignore_events
from lora_tuner.settings_files import config_to_yaml

from .. import adapter_files
from ..cli.test_commands import error, run
from ..data.test_near_duplicates import texts

OPTIONS = ModelOptions(device="cpu")


def copies_to_train_on(text):
    """Two near duplicates that are on the training side."""
    copies = (f"{text} {number}" for number in range(100))
    return [copy for copy in copies if not is_held_out(row_hash(copy, "lora_tuner"))][:2]


@pytest.fixture(scope="module")
def trained(gpt2, tmp_path_factory):
    """An adapter of rows with two near duplicates of 4 rows that are measured."""
    folder = tmp_path_factory.mktemp("trained")
    rows = texts(60, 2)
    held_out = sorted(
        (text for text in rows if is_held_out(row_hash(text, "lora_tuner"))),
        key=lambda text: row_hash(text, "lora_tuner"),
    )
    copied = held_out[1:5]
    rows += [copy for text in copied for copy in copies_to_train_on(text)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_TUNER_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
        settings = {
            "rank": 2,
            "max_steps": 2,
            "max_length": 64,
            "learning_rate": 0.02,
            "batch_size": 4,
            "eval_rows": 8,
        }
        settings |= {"dataset": "rows.jsonl", "base": str(gpt2), "device": "cpu"}
        train(TrainConfig(**settings, near_duplicates="keep", name="kept"))
    return folder


@pytest.fixture
def adapters(trained, tmp_path, monkeypatch):
    """The adapter, and others that say they were trained without near duplicates, or from a stream."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    changes = {
        "clean": ("duplicates: keep", "duplicates: drop"),
        "streamed": ("streaming: false", "streaming: true\nshuffle_buffer: 60"),
    }
    for name, change in changes.items():
        shutil.copytree(tmp_path / "adapters" / "kept", tmp_path / "adapters" / name)
        path = tmp_path / "adapters" / name / "run.yaml"
        path.write_text(path.read_text().replace(*change))
    return {name: Library().get(name) for name in ("kept", *changes)}


def test_leak_is_gain_on_copied_rows(adapters):
    kept, clean, streamed = measure_leak([*adapters.values()], options=OPTIONS)
    for leak in (kept, streamed):
        assert (leak.missing, leak.copies) == (None, 8)
        assert (leak.all_rows.rows, leak.with_copy.rows, leak.without_copy.rows) == (8, 4, 4)
        assert leak.all_rows == adapters[leak.adapter].manifest.result
        parts = [part.gain * part.tokens for part in (leak.with_copy, leak.without_copy)]
        assert sum(parts) == pytest.approx(leak.all_rows.gain * leak.all_rows.tokens)
        assert leak.share == pytest.approx(parts[0] / sum(parts))
    assert kept.training_rows == adapters["kept"].manifest.data.counts["train"] == 51 + 8
    assert streamed.training_rows == kept.training_rows
    assert (clean.copies, clean.with_copy, clean.share) == (0, None, 0.0)
    assert clean.without_copy == clean.all_rows
    (first,) = measure_leak([adapters["kept"]], eval_rows=3, options=OPTIONS)
    assert (first.all_rows.rows, first.with_copy.rows) == (3, 2)


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Compare the rows of a configuration as those of an adapter that was trained with it."""
    monkeypatch.chdir(tmp_path)

    def call(read=(), **settings):
        config = TrainConfig(max_steps=1, **settings)
        dataset = load_dataset(config)
        facts = adapter_files.manifest()
        info = {"source": "a", "weight": None, "hash": "1" * 64}
        sources = [
            SourceInfo(name=source.name, counts={"read": count}, **info)
            for source, count in zip(dataset.sources, read, strict=False)
        ]
        data = facts.data.model_copy(update={"counts": {"read": sum(read)}, "sources": sources[1:] and sources})
        folder = adapter_files.write(tmp_path / "made", facts=facts.model_copy(update={"data": data}))
        (folder / "run.yaml").write_text(config_to_yaml(config))
        rows = EvalSet("made", dataset.held_out[: config.eval_rows])
        return *_compare(load_adapter_folder(folder), rows, ignore_events), dataset

    return call


def test_leak_compares_documents_as_a_whole(compare, tmp_path):
    """A passage in documents on both sides, of which the held-out one is measured in parts."""
    (tmp_path / "notes").mkdir()
    passage = " ".join(f"clause{number} of this licence" for number in range(60))
    documents = [" ".join(f"word{number}x{position}" for position in range(1_000)) for number in range(12)]
    documents = [f"{text}\n\n{passage}." for text in documents[:4]] + documents[4:]
    for number, text in enumerate(documents):
        (tmp_path / "notes" / f"{number}.md").write_text(text, encoding="utf-8")

    def held_out(salt):
        return [text for text in documents if is_held_out(row_hash(text, salt))]

    salt = next(salt for salt in map(str, range(99)) if sum("licence" in text for text in held_out(salt)) == 1)
    settings = {"dataset": "notes", "split_salt": salt, "eval_rows": 1000}
    found, copied, dataset = compare(near_duplicates="drop", **settings)
    assert any("clause7 of" in text for text in dataset.held_out)
    assert (found.copies, copied, found.training_rows) == (0, set(), len(dataset.train))
    (whole,) = (text for text in held_out(salt) if "licence" in text)
    copies = (f"{whole} Copy {number}." for number in range(99))
    copy = next(text for text in copies if not is_held_out(row_hash(text, salt)))
    (tmp_path / "notes" / "copy.md").write_text(copy, encoding="utf-8")
    found, copied, dataset = compare(near_duplicates="keep", **settings)
    assert found.copies == 1
    number = dataset.groups_of(dataset.held_out)[dataset.held_out.index(min(copied))]
    groups = zip(dataset.held_out, dataset.groups_of(dataset.held_out), strict=True)
    assert copied == {text for text, group in groups if group == number}
    assert any("clause7 of" in text for text in copied)


def test_leak_compares_no_blocks_of_text(compare, tmp_path):
    (tmp_path / "novel.txt").write_text(" ".join(texts(100) * 3), encoding="utf-8")
    with pytest.raises(DataError, match="measured rows are blocks of texts, which are compared with nothing"):
        compare(dataset="novel.txt", txt_rows="file", near_duplicates="keep")


def test_leak_of_stream_counts_rows_trained_on(compare, tmp_path):
    for name, seed in (("a", 5), ("b", 6)):
        lines = [json.dumps({"text": text}) + "\n" for text in texts(60, seed)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "eval.jsonl").write_text("".join(lines[:20]))
    settings = {"streaming": True, "shuffle_buffer": 200, "near_duplicates": "keep"}
    found, _, dataset = compare(read=[60], dataset="b.jsonl", eval_dataset="eval.jsonl", **settings)
    assert found.training_rows == len(dataset.train) < 40
    assert found.copies == 0
    found, _, dataset = compare(read=[20, 60], dataset=["a.jsonl", "b.jsonl"], **settings)
    first = {json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()[:20]}
    small, whole = (source.train for source in dataset.sources)
    assert found.training_rows == len(first & {*small}) + len(whole)


def test_run_of_before_kept_its_copies(adapters):
    path = adapters["kept"].path / "run.yaml"
    path.write_text(path.read_text().replace("near_duplicates: keep\n", ""))
    (leak,) = measure_leak([adapters["kept"]], options=OPTIONS)
    assert leak.copies == 8


def test_leak_without_rows_gives_reason(adapters, tmp_path):
    (adapters["kept"].path / "run.yaml").unlink()
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    kept, clean = measure_leak([adapters["kept"], adapters["clean"]], options=OPTIONS)
    assert kept.missing == "it has no run.yaml, so its training rows are unknown"
    assert (
        clean.missing
        == "There is no dataset 'rows.jsonl': give imdb, an existing file or folder, or a Hub id (owner/name)"
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(40, seed=3)))
    (clean,) = measure_leak([adapters["clean"]], options=OPTIONS)
    assert clean.missing == "rows.jsonl no longer holds out the rows that it was measured on"
    path = adapters["streamed"].path / "run.yaml"
    path.write_text(path.read_text().replace("duplicates: keep", "duplicates: drop"))
    (streamed,) = measure_leak([adapters["streamed"]], options=OPTIONS)
    assert streamed.missing == "near duplicates of its measured rows were left out of the stream in training"
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(40, seed=4)))
    path = adapters["clean"].path / "run.yaml"
    path.write_text(path.read_text().replace("dataset: rows.jsonl", "dataset: [rows.jsonl, more.jsonl]", 1))
    (clean,) = measure_leak([adapters["clean"]], options=OPTIONS)
    assert clean.missing == "rows.jsonl + more.jsonl no longer holds out the rows that it was measured on"
    path.write_text(
        path.read_text()
        .replace("streaming: false", "streaming: true")
        .replace("duplicates: drop", "duplicates: keep")
    )
    (clean,) = measure_leak([adapters["clean"]], options=OPTIONS)
    assert clean.missing == "its run.yaml and its manifest name different datasets"


def test_evaluate_leak_shows_share(adapters, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    shown = run("evaluate", "kept", "clean", "--leak").stdout.splitlines()
    leaks = json.loads(run("evaluate", "kept", "clean", "--leak", "--json").stdout)["adapters"]
    assert [leak["name"] for leak in leaks] == ["kept", "clean"]
    parts = [
        f"{leaks[0][part]['gain']:+.3f} ± {leaks[0][part]['standard_error']:.3f}" for part in ("all", "with_copy")
    ]
    assert [" ".join(line.split()) for line in shown[3:5]] == [
        f"kept all 8 rows {parts[0]}",
        f"kept with a near duplicate 4 rows {parts[1]}",
    ]
    among = "held-out rows among the training rows"
    share = leaks[0]["share"]
    assert shown[-2:] == [
        f"kept: near duplicates of 4 of 8 {among}: 8 of 59; {share:.1%} of the gain comes from these",
        f"clean: near duplicates of 0 of 8 {among}: 0 of 51; 0.0% of the gain comes from these",
    ]
    (adapters["kept"].path / "run.yaml").unlink()
    assert (
        "kept has no figures: it has no run.yaml, so its training rows are unknown."
        in run("evaluate", "kept", "--leak").stderr
    )
    assert error("evaluate", "kept", "--leak", "--plot", "a.png") == (
        "Error: plot: --leak measures the rows held out in training, so leave it out."
    )
