"""Streams: their rows, order, resumption, and use by several processes and by runs."""

import dataclasses
import itertools
import json
import os

import datasets
import pytest
from accelerate.data_loader import IterableDatasetShard
from pydantic import ValidationError
from safetensors.torch import load_file

from lora_tuner import TrainConfig, resume, train
from lora_tuner.adapters.adapter import METRICS_FILE, RUN_FILE, WEIGHTS_FILE
from lora_tuner.data import streaming as data_streaming
from lora_tuner.data import tokenization
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.near_duplicates import NearDuplicates
from lora_tuner.data.rows import Source, iter_rows
from lora_tuner.data.splitting import is_held_out, row_hash
from lora_tuner.data.streaming import StreamingDataset, StreamState
from lora_tuner.errors import DataError, HubError, Notice, TrainingError
from lora_tuner.settings_files import resolve_settings
from lora_tuner.training import run

from .. import tiny_models
from ..hub_server import Hub
from ..test_hub import IMDB, cli, repos  # noqa: F401 - fixtures

TEXTS = [f"row {number}: {text}" for number, text in enumerate(tiny_models.reviews(150))]


@pytest.fixture
def rows_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text, "label": index % 2}) + "\n" for index, text in enumerate(TEXTS))
    )
    return path


def make_stream(path, state=None, eval_hashes=frozenset(), compared=(), **options):
    """Make a stream with one row per sequence, so that rows can be recognized."""
    config = TrainConfig.model_validate(
        {"dataset": str(path), "streaming": True, "shuffle_buffer": 20, "packing": False} | options
    )
    sources, states = [Source(config.dataset)], [state or StreamState()]
    return StreamingDataset(config, tiny_models.tokenizer(), eval_hashes, sources, states, compared)


def texts(items):
    tokenizer = tiny_models.tokenizer()
    return [tokenizer.decode(row[:-1]) for item in items for row in item]


def test_pass_yields_each_training_row_once(rows_jsonl):
    config = TrainConfig(dataset=str(rows_jsonl))
    dataset = load_dataset(config)
    streamed = texts(itertools.islice(make_stream(rows_jsonl), len(dataset.train)))
    assert sorted(streamed) == sorted(dataset.train)
    assert streamed != dataset.train
    assert not any(is_held_out(row_hash(text, config.split_salt)) for text in streamed)


def test_next_pass_has_other_order(rows_jsonl):
    count = len(load_dataset(TrainConfig(dataset=str(rows_jsonl))).train)
    both = texts(itertools.islice(make_stream(rows_jsonl), 2 * count))
    first, second = both[:count], both[count:]
    assert sorted(first) == sorted(second)
    assert first != second


def test_stream_reads_one_buffer_ahead(rows_jsonl):
    stream = make_stream(rows_jsonl)
    next(iter(stream))
    assert stream.streams[0].counts.train == 20
    assert (
        stream.streams[0].counts.read == stream.streams[0].counts.train + stream.streams[0].counts.held_out < 60
    )


@pytest.mark.parametrize("taken", [0, 1, 19, 20, 21, 75, 119, 130, 400])
def test_stream_resumes_exactly_from_any_state(rows_jsonl, taken):
    """Also if more sequences were prefetched."""
    whole, cut = make_stream(rows_jsonl), make_stream(rows_jsonl)
    expected = texts(itertools.islice(whole, taken + 50))
    assert texts(itertools.islice(cut, taken + 7))[:taken] == expected[:taken]
    state = StreamState(**json.loads(json.dumps(dataclasses.asdict(cut.streams[0].state_at(taken)))))
    again = make_stream(rows_jsonl, state)
    assert texts(itertools.islice(again, 50)) == expected[taken:]
    assert again.streams[0].counts == whole.streams[0].counts


@pytest.mark.parametrize("taken", [0, 20, 75, 130])
def test_stream_leaves_out_near_duplicates_exactly(rows_jsonl, taken):
    """The same rows as without streaming, also after a resume, and in the next pass."""
    dataset = load_dataset(TrainConfig(dataset=str(rows_jsonl)))
    copied = dataset.train[3:60:8]
    compared = [f"{text} {text.partition(': ')[2]}" for text in copied]
    matches = zip(dataset.train, NearDuplicates(compared).find(dataset.train), strict=True)
    kept = [text for text, match in matches if match is None]
    whole, cut = (make_stream(rows_jsonl, compared=compared) for _ in range(2))
    expected = texts(itertools.islice(whole, taken + len(kept)))
    assert sorted(expected[: len(kept)]) == sorted(kept) != sorted(dataset.train)
    assert whole.streams[0].counts.near_duplicates >= len(dataset.train) - len(kept) >= len(copied)
    list(itertools.islice(cut, taken + 3))
    state = StreamState(**json.loads(json.dumps(dataclasses.asdict(cut.streams[0].state_at(taken)))))
    again = make_stream(rows_jsonl, state, compared=compared)
    assert texts(itertools.islice(again, len(kept))) == expected[taken:]
    assert again.streams[0].counts == whole.streams[0].counts
    state = whole.streams[0].state_at(taken + len(kept))
    assert not make_stream(rows_jsonl, state, compared=compared).has_changed()
    unfiltered = make_stream(rows_jsonl, compared=compared, near_duplicates="keep")
    assert sorted(texts(itertools.islice(unfiltered, len(dataset.train)))) == sorted(dataset.train)


@pytest.mark.parametrize("taken", [1, 20, 75, 130, 400])
@pytest.mark.parametrize("change", ["edited", "removed", "added", "tokenizer"])
def test_changed_rows_that_have_passed_are_seen(rows_jsonl, taken, change):
    """In the first pass, at its end, and in later passes."""
    stream = make_stream(rows_jsonl)
    list(itertools.islice(stream, taken))
    state = StreamState(**json.loads(json.dumps(dataclasses.asdict(stream.streams[0].state_at(taken)))))
    assert not make_stream(rows_jsonl, state).has_changed()
    lines = rows_jsonl.read_text().splitlines(keepends=True)
    first = next(index for index, text in enumerate(TEXTS) if not is_held_out(row_hash(text, "lora_tuner")))
    again = make_stream(rows_jsonl, state)
    if change == "edited":
        lines[first] = lines[first].replace("row ", "now ")
    elif change == "removed":
        del lines[first]
    elif change == "added":
        lines.insert(0, lines[first])
    else:
        again.streams[0].tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    rows_jsonl.write_text("".join(lines))
    assert again.has_changed()


@pytest.mark.parametrize("more", [5, 60, 200])
def test_stream_of_older_version_resumes_twice(rows_jsonl, more):
    stream = make_stream(rows_jsonl)
    list(itertools.islice(stream, 75))
    old = dataclasses.replace(stream.streams[0].state_at(75), encoded_hash="", buffer_hash="", pass_hash="")
    again = make_stream(rows_jsonl, old)
    list(itertools.islice(again, more))
    assert not make_stream(rows_jsonl, again.streams[0].state_at(75 + more)).has_changed()


def test_changed_rows_to_come_are_no_change(rows_jsonl):
    stream = make_stream(rows_jsonl)
    list(itertools.islice(stream, 15))
    state = stream.streams[0].state_at(15)
    rows_jsonl.write_text("".join(rows_jsonl.read_text().splitlines(keepends=True)[:100]))
    assert not make_stream(rows_jsonl, state).has_changed()
    assert not make_stream(rows_jsonl, StreamState(first=0, taken=15)).has_changed()  # of an older version


def test_processes_share_stream_without_overlap(rows_jsonl):
    """Each process of accelerate takes its share of each step."""
    alone = texts(itertools.islice(make_stream(rows_jsonl), 60))
    shares = [
        IterableDatasetShard(make_stream(rows_jsonl), 5, num_processes=3, process_index=index)
        for index in range(3)
    ]
    parts = [texts(itertools.islice(share, 20)) for share in shares]
    assert [text for step in range(4) for part in parts for text in part[5 * step : 5 * step + 5]] == alone


def test_stream_skips_eval_rows(rows_jsonl):
    config = TrainConfig(dataset=str(rows_jsonl))
    dataset = load_dataset(config)
    eval_hashes = frozenset(row_hash(text, config.split_salt) for text in dataset.train[:40])
    streamed = texts(itertools.islice(make_stream(rows_jsonl, eval_hashes=eval_hashes), len(dataset.train) - 40))
    assert sorted(streamed) == sorted(dataset.train[40:])


def test_stream_without_labels_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization, "count_predictions", lambda row: 0)
    path = tmp_path / "rows.txt"
    path.write_text("\n".join(TEXTS))
    with pytest.raises(TrainingError, match=r"No row of .*rows\.txt has a token to learn\."):
        next(iter(make_stream(path)))


# Files

FILES = {
    "a.csv": 'text,n\n"one, two",1.50\r\n\n"three\nfour",NA\n',
    "a.tsv": "text\tn\none\t1\ntwo\t2\n",
    "a.jsonl": '{"text": "one", "n": 1.50}\n\n"two"\n{"n": 2}\n',
    "lines.txt": "\ufeffone\r\ntwo\n\n",
    "paragraphs.txt": "one\nand more\n\n\ntwo\n \nthree",
    "indented.txt": "\n\n  one\n  more\n\n  two\n",
    "blank-at-1000.txt": "one\n" * 999 + "\nother\n",  # no text follows within the first 1,000 lines
    "blank-at-999.txt": "one\n" * 998 + "\nother\nmore\n\n",
    "late-blank.txt": "one\ntwo\n" * 600 + "\nthree\n",
    "blank-ends.txt": "\n" * 2000 + "one\ntwo\n" + "\n" * 2000,
}


@pytest.mark.parametrize("name", FILES)
def test_streamed_rows_equal_loaded_rows(tmp_path, name):
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8", newline="")
    config = TrainConfig(dataset=str(path), clean="lines")
    notices = []
    whole = list(iter_rows(config, Source(config.dataset), notices.append))
    expected = notices.copy()
    streamed = list(
        iter_rows(config.model_copy(update={"streaming": True}), Source(config.dataset), notices.append)
    )
    assert streamed == whole
    assert len(whole) > 1
    assert notices == expected * 2


@pytest.mark.parametrize(
    ("name", "count"),
    [("paragraphs.txt", 3), ("blank-at-1000.txt", 1000), ("blank-at-999.txt", 2), ("late-blank.txt", 1201)],
)
def test_txt_auto_uses_first_thousand_lines(tmp_path, name, count):
    (tmp_path / name).write_text(FILES[name])
    for streaming in (False, True):
        config = TrainConfig(dataset=str(tmp_path / name), streaming=streaming)
        assert len(list(iter_rows(config, Source(config.dataset)))) == count


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.parquet"])
def test_file_changed_during_pass_fails(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        datasets.Dataset.from_dict({"text": TEXTS * 10}).to_parquet(str(path))
    else:
        path.write_text("text\n" + "".join(json.dumps(f"row {number}") + "\n" for number in range(2000)))
    if name == "a.jsonl":
        path.write_text(path.read_text().removeprefix("text\n"))
    rows = iter_rows(TrainConfig(dataset=str(path), streaming=True), Source(str(path)))
    next(rows)
    os.utime(path, (1e9, 1e9))
    with pytest.raises(DataError, match="it changed while it was read: try again when it is complete"):
        list(rows)


def test_streamed_parquet_keeps_class_labels(tmp_path):
    features = datasets.Features(
        {"review": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    data = datasets.Dataset.from_dict({"review": TEXTS, "label": [i % 2 for i in range(150)]}, features=features)
    data.to_parquet(str(tmp_path / "rows.parquet"))
    options = {"dataset": str(tmp_path / "rows.parquet"), "where": ["label=pos"], "streaming": True}
    streamed = [row.text for row in iter_rows(TrainConfig.model_validate(options), Source(options["dataset"]))]
    assert streamed == TEXTS[1::2]


def test_folder_streams_file_by_file(tmp_path):
    (tmp_path / "many").mkdir()
    for number in range(3):
        (tmp_path / "many" / f"{number}.txt").write_text("\n".join(TEXTS[50 * number : 50 * number + 50]))
    (tmp_path / "many" / "empty.jsonl").write_text("")
    notices = []
    config = TrainConfig(dataset=str(tmp_path / "many"), streaming=True)
    assert [row.text for row in iter_rows(config, Source(config.dataset), notices.append)] == TEXTS
    assert [row.text for row in iter_rows(config, Source(config.dataset), skip=120)] == TEXTS[120:]
    assert "Skipped 1 file without rows" in notices[0].text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'["one", "two"]', "it is a JSON array, which cannot be streamed: write one object per line"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not a JSON object: Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n7\n', "line 2 is neither a JSON object nor a string"),
        ("a.csv", b"text,n\na,1\nb\n", "its header has 2 fields, line 3 has 1"),
        ("a.jsonl", b'\n ["one",\n"two"]', "it is a JSON array"),
        ("a.csv", b"a, b;c\nx, 1;5\n", "its first lines do not tell its delimiter"),
        (
            "a.jsonl",
            b'{"title": "a"}\n' * 100 + b'{"body": "b"}',
            "a row has text in 'body', and the first rows in 'title'",
        ),
        ("a.csv", b"text,text\na,1\n", "its header names a column twice: text, text"),
        ("a.csv", b'text\n"a" b\n', "',' expected after '\"'"),
        ("a.txt", b"one\n\0\n", "byte 4 is null"),
        ("a.txt", b"one\n\x81\n", "byte 4 is not UTF-8: name its encoding with --encoding"),
        ("a.parquet", b"no parquet", "cannot be read"),
    ],
)
def test_streaming_invalid_file_fails(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_dataset(TrainConfig(dataset=str(tmp_path / name), streaming=True))
    assert str(error.value).startswith(f"{tmp_path / name}")
    assert reason in str(error.value)


def test_streaming_pipe_fails(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="it is not a regular file"):
        load_dataset(TrainConfig(dataset=str(tmp_path / "a.txt"), streaming=True))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_rows": 5}, "streaming cannot sample max_rows from all rows"),
        ({"txt_rows": "file"}, "streaming reads line by line"),
        ({"epochs": 2}, "epochs is not possible with streaming"),
        ({"streaming": False, "shuffle_buffer": 5}, "shuffle_buffer needs streaming"),
    ],
)
def test_settings_contradicting_streaming_fail(options, reason):
    with pytest.raises(ValidationError, match=reason):
        TrainConfig.model_validate({"streaming": True} | options)


@pytest.mark.parametrize("options", [{"text_column": "body"}, {"where": ["body=x"]}])
def test_streaming_unknown_column_fails(rows_jsonl, options):
    with pytest.raises(DataError, match="has no column 'body' in its first 100 rows"):
        load_dataset(TrainConfig.model_validate({"dataset": str(rows_jsonl), "streaming": True} | options))


# Training


@pytest.fixture
def config(settings, rows_jsonl):
    return lambda **options: settings(dataset=str(rows_jsonl), streaming=True, shuffle_buffer=30, **options)


def settings_of(adapter):
    return resolve_settings(TrainConfig, {}, adapter.path / RUN_FILE)


def losses(adapter):
    lines = (adapter.path / METRICS_FILE).read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.slow  # a resumed stream equals an uninterrupted one, which is quick
@pytest.mark.parametrize("method", ["lora", "eva"])
def test_streamed_run_is_reproducible(config, method):
    notices = []
    adapter = train(config(name="one", max_steps=20, method=method), notices.append)
    facts = adapter.manifest
    assert facts.result.gain > 0
    assert facts.data.counts["read"] == sum(count for name, count in facts.data.counts.items() if name != "read")
    assert facts.run.sequences == 20 * settings_of(adapter).batch_size
    assert Notice("The run takes 20 steps.") in notices
    assert any("; first rows of the stream: " in notice.text for notice in notices if isinstance(notice, Notice))
    again = train(config(name="two", max_steps=20, method=method))
    assert again.sha256 == adapter.sha256


def test_changed_passed_rows_stop_resume(config, stop_at, tmp_path):
    """The first rows of a stream are in the manifest, those after them only in its state."""
    with stop_at(18):
        train(config(name="cut", max_steps=20))
    path = tmp_path / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    changed = next(index for index in range(70, 150) if not is_held_out(row_hash(TEXTS[index], "lora_tuner")))
    lines[changed] = lines[changed].replace("row ", "now ")
    path.write_text("".join(lines))
    with pytest.raises(
        TrainingError, match=r"^runs/cut/checkpoint-18 cannot be resumed exactly: rows of .* have changed"
    ):
        resume("cut")


def test_resumed_stream_equals_uninterrupted_run(config, stop_at):
    options = {"max_steps": 30, "dropout": 0.1, "gradient_accumulation": 2}
    whole = train(config(name="whole", **options))
    with stop_at(11):
        train(config(name="cut", save_every=4, **options))
    cut = resume("cut")
    assert losses(cut) == losses(whole)
    resumed, expected = (load_file(adapter.path / WEIGHTS_FILE) for adapter in (cut, whole))
    assert all(bool((resumed[name] == expected[name]).all()) for name in resumed)
    assert cut.manifest.data == whole.manifest.data


def test_failing_stream_leaves_resumable_checkpoint(config, monkeypatch):
    whole = train(config(name="whole", max_steps=25))
    real, rows_read = data_streaming.iter_rows, []

    def breaking(*args, **kwargs):
        for row in real(*args, **kwargs):
            rows_read.append(row)
            if len(rows_read) == 70:
                raise HubError("The line is dead.")
            yield row

    with monkeypatch.context() as patched:
        patched.setattr(data_streaming, "iter_rows", breaking)
        with pytest.raises(
            TrainingError, match=r"The line is dead\. The last step was \d+ of 25\. Resume with: .* --resume cut"
        ):
            train(config(name="cut", max_steps=25))
    assert resume("cut").sha256 == whole.sha256


def test_resume_after_failed_save_keeps_counts(config, monkeypatch):
    whole = train(config(name="whole", max_steps=8, save_every=8))

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run.plots, "plot_loss", fail)
        with pytest.raises(TrainingError, match="the run is kept"):
            train(config(name="cut", max_steps=8, save_every=8))
    assert resume("cut").manifest.data == whole.manifest.data


def test_stream_holds_out_its_first_rows(config, rows_jsonl):
    job = run.prepare_training(config(eval_rows=8))
    everything = load_dataset(TrainConfig(dataset=str(rows_jsonl)))
    assert len(job.held_out_texts) == 8
    assert set(job.held_out_texts) <= set(everything.held_out)


def test_stream_plan_by_minutes_or_default(config):
    plan = run.plan(config(max_steps=None, minutes=0.05))
    assert plan.steps_per_epoch is None
    assert plan.steps > 0
    notices = []
    assert run.plan(config(max_steps=None), notices.append).steps > plan.steps
    assert any(
        "A stream has no end, so training is limited to 10 minutes." in getattr(notice, "text", "")
        for notice in notices
    )


def test_conversations_can_be_streamed(tmp_path, config):
    path = tmp_path / "talks.jsonl"
    pairs = ({"prompt": f"Is {number} good?", "completion": text} for number, text in enumerate(TEXTS))
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    adapter = train(config().model_copy(update={"dataset": str(path)}))
    assert adapter.manifest.data.format == "prompt and completion"


@pytest.mark.slow
def test_hub_dataset_streams(repos, cli):  # noqa: F811
    short = {
        "rank": 2,
        "max-steps": 4,
        "max-length": 64,
        "eval-rows": 5,
        "shuffle-buffer": 40,
        "where": "label=pos",
    }
    with Hub(repos) as hub:
        cli(hub, "train", "--streaming", *(f"--{name}={value}" for name, value in short.items()))
        facts = json.loads(cli(hub, "adapters", "show", "imdb", "--json").stdout)
    assert facts["data"]["source"] == "stanfordnlp/imdb"
    assert facts["run"]["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--streaming", "--shuffle-buffer=40"]], ids=["whole", "stream"])
def test_hub_datasets_mix_with_files(repos, cli, tmp_path, extra):  # noqa: F811
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"My note: {text}"}) + "\n" for text in TEXTS))
    datasets = ("--dataset", "stanfordnlp/imdb=0.7", "--dataset", f"{own}=0.3")
    short = ("--rank=2", "--max-steps=4", "--max-length=64", "--eval-rows=8", "--name=mixed")
    with Hub(repos) as hub:
        cli(hub, "train", *datasets, *short, *extra)
        facts = json.loads(cli(hub, "adapters", "show", "mixed", "--json").stdout)
    sources = facts["data"]["sources"]
    assert [(source["name"], source["weight"]) for source in sources] == [
        ("stanfordnlp/imdb", 0.7),
        (str(own), 0.3),
    ]
    assert [source["counts"]["read"] > 0 for source in sources] == [True, True]
    assert [source["result"]["gain"] > 0 for source in sources] == [True, True]
