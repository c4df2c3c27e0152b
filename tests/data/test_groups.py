"""All rows of a group or a document are on one side; several datasets are mixed by their weights."""

import csv
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lora_tuner import ModelOptions, evaluate, resume, train
from lora_tuner.adapters.gains import HeldOutLoss, paired_gain
from lora_tuner.cli.display import format_result
from lora_tuner.config import TrainConfig
from lora_tuner.data import folders
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.mixing import mix, mix_lists
from lora_tuner.data.packing import PackedSequences
from lora_tuner.data.row_readers import value_name
from lora_tuner.data.rows import Source, iter_rows
from lora_tuner.data.streaming import StreamingDataset, StreamState
from lora_tuner.data.tokenization import encode_rows
from lora_tuner.errors import ConfigError, DataError
from lora_tuner.evaluation import gain_matrix
from lora_tuner.settings_files import config_to_yaml, resolve_settings
from lora_tuner.training.arguments import EpochOrder

from .. import tiny_models
from ..data_files import jsonl


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "author"])
        writer.writerows(rows)


def write_authors(path, authors=40, rows=5):
    """Write rows of several authors, in turn."""
    texts = tiny_models.reviews(authors * rows)
    write_csv(path, [(text, f"author {number % authors}") for number, text in enumerate(texts)])
    return {text: f"author {number % authors}" for number, text in enumerate(texts)}


@pytest.mark.parametrize("streaming", [False, True])
def test_group_is_on_one_side(streaming):
    authors = write_authors("rows.csv")
    dataset = load_dataset(TrainConfig(dataset="rows.csv", group_by="author", streaming=streaming))
    train, held_out = ({authors[text] for text in texts} for texts in (dataset.train, dataset.held_out))
    assert not train & held_out
    assert len(train | held_out) == 40
    assert 2 <= len(held_out) <= 16
    groups = dataset.groups_of(dataset.held_out)
    assert len(set(zip(groups, (authors[text] for text in dataset.held_out), strict=True))) == len(held_out)


def test_side_of_group_ignores_rest_of_file():
    authors = write_authors("rows.csv")
    before = set(load_dataset(TrainConfig(dataset="rows.csv", group_by="author")).held_out)
    few = {text: author for text, author in authors.items() if author in {"author 1", "author 7", *before}}
    few |= {text: author for text, author in authors.items() if text in before}
    write_csv("few.csv", [*few.items(), ("another text", "author 99"), ("one more text", "somebody")])
    assert before <= set(load_dataset(TrainConfig(dataset="few.csv", group_by="author")).held_out)


def test_row_without_group_is_its_own():
    texts = tiny_models.reviews(60)
    write_csv("rows.csv", [(text, "") for text in texts])
    notices = []
    dataset = load_dataset(TrainConfig(dataset="rows.csv", group_by="author"), notices.append)
    assert set(dataset.held_out) == set(load_dataset(TrainConfig(dataset="rows.csv")).held_out)
    assert "60 rows of rows.csv without author: each is a group of its own." in [note.text for note in notices]


def test_group_by_file_keeps_files_whole(tmp_path):
    (tmp_path / "notes").mkdir()
    files = {}
    for number in range(30):
        texts = tiny_models.reviews(4, seed=number)
        (tmp_path / "notes" / f"{number}.txt").write_text("\n".join(texts), encoding="utf-8")
        files |= dict.fromkeys(texts, number)
    dataset = load_dataset(TrainConfig(dataset="notes", group_by="file", txt_rows="line"))
    assert not {files[text] for text in dataset.train} & {files[text] for text in dataset.held_out}
    assert len(dataset.held_out) % 4 == 0


def test_group_by_file_tells_single_files():
    names = ["a.jsonl", "b.jsonl"]
    for name in names:
        Path(name).write_text(jsonl({"text": text} for text in tiny_models.reviews(3)), encoding="utf-8")
    config = TrainConfig(dataset=names, group_by="file")
    sides = [{row.side for row in iter_rows(config, Source(name))} for name in names]
    assert list(map(len, sides)) == [1, 1]
    assert sides[0] != sides[1]


def held_out_by(table, tmp_path):
    """Held-out texts by the column `key`, of a table written as csv, jsonl, parquet and Excel."""
    import pandas

    frame = pandas.DataFrame({"text": [f"row number {number} of these" for number in range(60)], **table})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True, date_format="iso")
    frame.to_excel(tmp_path / "rows.xlsx", index=False)
    for name in ("rows.csv", "rows.parquet", "rows.jsonl", "rows.xlsx"):
        yield load_dataset(TrainConfig(dataset=name, group_by="key", near_duplicates="keep")).held_out


def test_group_is_same_in_each_file_type(tmp_path):
    import pandas

    numbers = [number % 12 for number in range(60)]
    days = pandas.Timestamp("2024-01-01") + pandas.to_timedelta(numbers, unit="D")
    sides = [*held_out_by({"key": numbers}, tmp_path), *held_out_by({"key": map(float, numbers)}, tmp_path)]
    assert len(set(map(tuple, sides))) == 1
    for values in ([number or None for number in numbers], days, [number % 3 == 1 for number in numbers]):
        assert len(set(map(tuple, held_out_by({"key": values}, tmp_path)))) == 1


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (float("nan"), ""),
        (1.0, "1"),
        ("1.0", "1"),
        ("1.0.0", "1.0.0"),
        (" a\n b ", "a b"),
        (True, "true"),
        ("TRUE", "true"),
        ("2024-01-01T00:00:00.000", "2024-01-01"),
        ([1, None], "[1, null]"),
        ([], ""),
    ],
)
def test_group_name_is_plain(value, name):
    assert value_name(value, []) == name


def test_class_label_groups_by_name():
    assert [value_name(value, ["ann", "bob"]) for value in (1, -1, None)] == ["bob", "", ""]


def test_group_of_eval_dataset_is_not_trained():
    authors = write_authors("rows.csv", authors=10)
    write_csv("eval.csv", [("a new text", "author 3"), ("one more text", "nobody")])
    config = TrainConfig(dataset="rows.csv", eval_dataset="eval.csv", group_by="author")
    dataset = load_dataset(config)
    assert "author 3" not in {authors[text] for text in dataset.train}
    assert dataset.counts.in_eval_dataset == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"group_by": "writer"},
            "rows.csv has no column 'writer' to group rows by: its columns are text, author",
        ),
        ({"group_by": "author", "where": ["author=author 1"]}, "5 usable rows in 1 group of 200 .* add groups"),
    ],
)
def test_wrong_group_is_refused(settings, message):
    write_authors("rows.csv")
    with pytest.raises(DataError, match=message):
        load_dataset(TrainConfig(dataset="rows.csv", **settings))


# Several datasets


@pytest.fixture
def tickets_and_notes():
    """Write a table whose columns must be named, and a folder of notes."""
    rows = [f"{number},subject {number},{text}" for number, text in enumerate(tiny_models.reviews(30))]
    Path("tickets.csv").write_text("\n".join(["id,subject,body", *rows]), encoding="utf-8")
    Path("notes").mkdir()
    for number in range(8):
        Path("notes", f"{number}.md").write_text(f"note {number} is short", encoding="utf-8")
    return ["tickets.csv=0.7", "notes=0.3"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({"text_column": "body"}, "column 'body'"),
        ({"template": "{subject}: {body}"}, "template of 'subject', 'body'"),
    ],
)
def test_named_columns_leave_documents_as_text(tickets_and_notes, settings, layout, streaming):
    dataset = load_dataset(TrainConfig(dataset=tickets_and_notes, streaming=streaming, **settings))
    assert [source.layout for source in dataset.sources] == [layout, "plain text"]
    assert "note 1 is short" in dataset.train + dataset.held_out
    with pytest.raises(DataError, match=r"leave --text-column out|no column 'subject'"):
        load_dataset(TrainConfig(dataset=["notes", "notes/1.md"], **settings))


def test_folder_mixes_template_and_documents(tickets_and_notes):
    Path("tickets.csv").rename("notes/tickets.csv")
    dataset = load_dataset(TrainConfig(dataset="notes", template="{subject}: {body}"))
    assert (dataset.format, dataset.counts.read) == ("text + template", 38)


def test_document_beside_groups_is_its_own(tickets_and_notes):
    notices = []
    config = TrainConfig(dataset=tickets_and_notes, text_column="body", group_by="id")
    dataset = load_dataset(config, notices.append)
    assert "8 rows of notes without id: each is a group of its own." in [notice.text for notice in notices]
    assert len(set(dataset.groups_of(dataset.held_out))) == len(dataset.held_out)
    with pytest.raises(DataError, match="no column 'id' to group rows by: its columns are text, file"):
        load_dataset(TrainConfig(dataset="notes", group_by="id"))


def test_files_beside_table_are_listed_once(tickets_and_notes, monkeypatch):
    """However many documents there are."""
    listed = []

    def list_files(folder):
        listed.append(folder)
        return find(folder)

    find = folders._find_data_files
    monkeypatch.setattr(folders, "_find_data_files", list_files)
    load_dataset(TrainConfig(dataset=tickets_and_notes, text_column="body", group_by="id"))
    assert 0 < len(listed) < 8


def test_previews_show_each_dataset(tickets_and_notes):
    dataset = load_dataset(TrainConfig(dataset=tickets_and_notes, text_column="body"))
    assert [text.startswith("note") for _, text in dataset.previews[:4]] == [False, True, False, True]


def test_unread_splits_of_datasets_are_named(tmp_path):
    write_sources()
    (tmp_path / "split").mkdir()
    for name in ("train", "test"):
        Path(f"{'ab'[name == 'test']}.jsonl").rename(f"split/{name}.jsonl")
    dataset = load_dataset(TrainConfig(dataset=["split", "c.jsonl"]))
    assert dataset.splits == "split: train, not read: test"


def test_same_file_twice_is_refused_with_counts():
    write_sources()
    with pytest.raises(DataError, match=r"a.jsonl has no row to train on \(60 read, 60 duplicates\)"):
        load_dataset(TrainConfig(dataset=["a.jsonl", "./a.jsonl"]))


def write_sources(sizes=(60, 40, 30)):
    """Write a file of rows for each size, each row with its file's name."""
    for name, size in zip("abc", sizes, strict=False):
        rows = [f"{name} {text}" for text in tiny_models.reviews(size, seed=ord(name))]
        with open(f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": row}) + "\n" for row in rows)


def test_mix_keeps_shares_at_every_length():
    weights = [0.5, 0.3, 0.2]
    counts = Counter()
    for length, number in enumerate(islice(mix(weights), 10_000), 1):
        counts[number] += 1
        assert all(abs(counts[source] - weight * length) <= 1 for source, weight in enumerate(weights))


def test_mixed_lists_keep_order_and_all():
    mixed = mix_lists(["aaaa", "bb", ""], [1, 1, 5])
    assert "".join(mixed) == "ababaa"


def test_several_datasets_are_one():
    write_sources()
    dataset = load_dataset(TrainConfig(dataset=["a.jsonl", "b.jsonl"]))
    assert dataset.name == "a.jsonl + b.jsonl"
    assert [source.counts.read for source in dataset.sources] == [60, 40]
    assert dataset.counts.read == 100
    assert {text[0] for text in dataset.sources[1].train} == {"b"}
    alone = [load_dataset(TrainConfig(dataset=f"{name}.jsonl")).held_out for name in "ab"]
    assert set(dataset.held_out) == {text for texts in alone for text in texts}
    assert dataset.held_out_sources == {text: number for number, texts in enumerate(alone) for text in texts}


def test_copy_counts_as_duplicate_across_datasets():
    write_sources()
    with open("b.jsonl", "a", encoding="utf-8") as file, open("a.jsonl", encoding="utf-8") as other:
        file.writelines(islice(other, 7))
    dataset = load_dataset(TrainConfig(dataset=["a.jsonl", "b.jsonl"]))
    assert [source.counts.duplicates for source in dataset.sources] == [0, 7]


def test_measured_rows_have_shares_of_weights():
    write_sources((300, 300, 300))
    dataset = load_dataset(TrainConfig(dataset=["a.jsonl=6", "b.jsonl=3", "c.jsonl=1"]))
    assert Counter(text[0] for text in dataset.held_out[:30]) == {"a": 18, "b": 9, "c": 3}


@pytest.mark.parametrize(
    ("datasets", "expected"),
    [
        (["a.jsonl"], [("a.jsonl", None)]),
        ("a.jsonl", [("a.jsonl", None)]),
        (["a.jsonl=0.7", "b.jsonl=3e-1"], [("a.jsonl", 0.7), ("b.jsonl", 0.3)]),
        (["lang=en/a.jsonl", "owner/name"], [("lang=en/a.jsonl", None), ("owner/name", None)]),
        (["x=1", "b.jsonl"], [("x=1", None), ("b.jsonl", None)]),
    ],
)
def test_weights_are_read(tmp_path, datasets, expected):
    (tmp_path / "x=1").mkdir()
    config = TrainConfig(dataset=datasets)
    assert config.weighted_datasets == expected
    (tmp_path / "run.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert resolve_settings(TrainConfig, {}, tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        (["a.jsonl=0.5", "b.jsonl"], "b.jsonl has no weight: give all a weight, or none"),
        (["a.jsonl=0", "b.jsonl=1"], "a weight is a number above 0"),
        (["a.jsonl=-1", "b.jsonl=1"], "a weight is a number above 0"),
        (["a.jsonl=nan", "b.jsonl=1"], "a weight is a number above 0"),
        (["a.jsonl", "a.jsonl"], "a dataset is named twice"),
        (["=1", "a.jsonl=2"], "a dataset is named twice, or has no name"),
        (["a.jsonl=1"], "a weight needs several datasets"),
        ([], "no dataset is named"),
    ],
)
def test_wrong_weights_are_refused(datasets, message):
    with pytest.raises(ConfigError, match=message):
        resolve_settings(TrainConfig, {"dataset": datasets})


def order_of(sizes, weights, epoch):
    """Return the sources of the sequences of an epoch, and their numbers within them."""
    rows = [np.array([1, 2])] * sum(sizes)
    setup = SimpleNamespace(
        sequences=PackedSequences(rows, 8, packing=False, source_rows=sizes),
        dataset=SimpleNamespace(weights=weights),
        config=SimpleNamespace(seed=0),
    )
    starts = np.cumsum([0, *sizes])
    order = np.array([*EpochOrder(setup, 1, lambda: epoch)])
    sources = np.searchsorted(starts, order, side="right") - 1
    return sources, order - starts[sources]


def test_epochs_have_shares_of_weights():
    sources, _ = order_of([9_000, 500, 500], [0.5, 0.3, 0.2], 3)
    shares = np.bincount(sources) / 10_000
    assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 0.02


def test_source_goes_on_in_next_epoch():
    """Sequences of a source that are not taken in an epoch come in the next; then a new order begins."""
    taken = [order_of([30, 10], [1, 3], epoch) for epoch in range(3)]
    large = np.concatenate([numbers[sources == 0] for sources, numbers in taken])
    assert sorted(large) == [*range(30)]
    small = np.concatenate([numbers[sources == 1] for sources, numbers in taken])
    passes = small.reshape(9, 10)
    assert all(sorted(numbers) == [*range(10)] for numbers in passes)
    assert len({tuple(numbers) for numbers in passes}) > 1


def test_sequence_has_rows_of_one_source():
    rows = [np.array([source] * 3) for source in (1, 1, 1, 2, 2)]
    packed = PackedSequences(rows, 8, packing=True, source_rows=[3, 2])
    assert packed.source_sizes == [2, 1]
    assert all(len({row[0] for row in packed[index]}) == 1 for index in range(3))


def make_stream(states=(), weights=(0.7, 0.3)):
    config = TrainConfig(dataset=["a.jsonl", "b.jsonl"], streaming=True, shuffle_buffer=7, packing=False)
    sources = [Source(f"{name}.jsonl", weight=weight) for name, weight in zip("ab", weights, strict=True)]
    return StreamingDataset(config, tiny_models.tokenizer(), frozenset(), sources, states)


def test_stream_mixes_sources_and_resumes():
    write_sources()
    tokenizer = tiny_models.tokenizer()
    whole = [tokenizer.decode(item[0][:-1]) for item in islice(make_stream(), 200)]
    shares = Counter(text[0] for text in whole)
    assert shares == {"a": 140, "b": 60}
    for taken in (1, 33, 150):
        stream = make_stream()
        list(islice(stream, taken + 5))
        states = [StreamState(**state) for state in json.loads(stream.position(taken))]
        again = [tokenizer.decode(item[0][:-1]) for item in islice(make_stream(states), 200 - taken)]
        assert again == whole[taken:]


def test_stream_without_weights_takes_turns():
    write_sources()
    tokenizer = tiny_models.tokenizer()
    items = islice(make_stream(weights=(None, None)), 50)
    assert [tokenizer.decode(item[0])[0] for item in items] == ["a", "b"] * 25


@pytest.mark.parametrize(
    "streaming",
    [
        pytest.param({}, id="", marks=pytest.mark.slow),
        pytest.param({"streaming": True, "shuffle_buffer": 10}, id="stream"),
    ],
)
def test_weighted_run_resumes_bitwise(settings, stop_at, streaming):
    write_sources()
    changes = {"dataset": ["a.jsonl=0.7", "b.jsonl=0.3"], "max_steps": 12, **streaming}
    whole = train(settings(name="whole", **changes))
    with stop_at(5):
        train(settings(name="cut", **changes))
    assert resume("cut").sha256 == whole.sha256
    sources = whole.manifest.data.sources
    assert [(source.name, source.weight) for source in sources] == [("a.jsonl", 0.7), ("b.jsonl", 0.3)]
    assert sum(source.result.rows for source in sources) == whole.manifest.result.rows
    assert sum(source.counts["read"] for source in sources) == whole.manifest.data.counts["read"]
    card, shown = (whole.path / "README.md").read_text(), "\n".join(format_result(whole.manifest.result, sources))
    for source in sources:
        assert f"{source.result.loss:.3f} (base: {source.result.base_loss:.3f})" in card
        assert f"{source.name}: held-out loss {source.result.base_loss:.3f} -> {source.result.loss:.3f}" in shown
    assert "| From a.jsonl | 70% of the sequences; " in card
    unmeasured = [source.model_copy(update={"result": None}) for source in sources]
    assert format_result(whole.manifest.result, unmeasured) == format_result(whole.manifest.result)


def test_error_of_gain_is_by_group(settings):
    write_authors("rows.csv", authors=20, rows=8)
    adapter = train(settings(dataset="rows.csv", group_by="author", eval_rows=40))
    result = adapter.manifest.result
    assert adapter.manifest.data.group_by == "author"
    assert 2 <= result.groups < result.rows
    (row,) = evaluate([adapter]).cells  # from the cache of held-out rows
    assert row == [result]
    base = gain_matrix.open_base(adapter, ModelOptions(device="cpu"))
    ((base_loss, loss),) = gain_matrix.held_out_losses(
        base, {"rows": adapter}, [gain_matrix.cached_rows(adapter)]
    )[0]
    assert loss.groups == base_loss.groups  # also to compare two adapters
    assert gain_matrix.cached_rows(adapter).format_rows() == f"{result.rows} rows in {result.groups} groups"
    assert f"{result.rows} rows in {result.groups} groups" in (adapter.path / "README.md").read_text()


def test_error_by_group_counts_groups_once():
    base, adapter = HeldOutLoss([10.0, 12, 9, 11], [4, 4, 4, 4]), HeldOutLoss([8.0, 11, 8.5, 10], [4, 4, 4, 4])
    alone = paired_gain(base, adapter)
    doubled = HeldOutLoss(base.nll * 2, base.predictions * 2, [0, 1, 2, 3] * 2)
    twice = paired_gain(doubled, HeldOutLoss(adapter.nll * 2, adapter.predictions * 2))
    assert twice.standard_error == pytest.approx(alone.standard_error)
    assert (twice.groups, twice.rows) == (4, 8)
    assert (
        paired_gain(HeldOutLoss([1.0, 2], [3, 3], [0, 0]), HeldOutLoss([1.0, 1], [3, 3])).standard_error is None
    )


# Documents


def test_part_of_two_documents_is_measured_once():
    Path("notes").mkdir()
    shared = "the same long paragraph. " * 100
    for number in range(30):
        Path("notes", f"{number}.md").write_text(f"{f'note {number}. ' * 250}\n\n{shared}", encoding="utf-8")
    dataset = load_dataset(TrainConfig(dataset="notes", near_duplicates="keep"))
    assert dataset.counts.held_out > 1
    assert len(set(dataset.held_out)) == len(dataset.held_out)


def test_text_without_some_parts_is_one_row():
    """Rows beside a book quote its first pages."""
    book = " ".join(f"word{number}" for number in range(20_000))
    Path("book.txt").write_text(book, encoding="utf-8")
    quotes = [book[start : start + 300] for start in range(0, 9000, 300)]
    Path("rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in quotes), encoding="utf-8")
    parts = {}
    for rule in ("drop", "keep"):
        settings = {"dataset": ["book.txt", "rows.jsonl"], "txt_rows": "file", "near_duplicates": rule}
        (source, _) = load_dataset(TrainConfig(**settings)).sources
        assert (source.counts.read, source.counts.train, source.counts.near_duplicates) == (1, 1, 0)
        parts[rule] = len(source.train)
    assert 0 < parts["drop"] < parts["keep"]


def write_documents(count, paragraphs=12):
    """Write documents of paragraphs of one sentence, each of which names its document."""
    Path("notes").mkdir()
    for number in range(count):
        reviews = iter(tiny_models.reviews(paragraphs, seed=number))
        text = "\n\n".join(f"Note{number} {review} {'and so on ' * 25}." for review in reviews)
        Path("notes", f"{number}.md").write_text(text, encoding="utf-8")


def notes_of(texts):
    return {word for text in texts for word in text.split() if word.startswith("Note")}


def test_document_is_on_one_side_and_measured_whole():
    write_documents(20)
    notices = []
    dataset = load_dataset(TrainConfig(dataset="notes"), notices.append)
    assert not notes_of(dataset.train) & notes_of(dataset.held_out)
    assert dataset.counts.held_out < len(dataset.held_out) <= dataset.counts.held_out * 3
    whole = {path.read_text() for path in Path("notes").iterdir()} - set(dataset.train)
    assert sum(map(len, dataset.held_out)) >= 0.99 * sum(map(len, whole))
    assert all(text.startswith("Note") for text in dataset.held_out)
    groups = dataset.groups_of(dataset.held_out)
    assert len(set(groups)) == dataset.counts.held_out == len(notes_of(dataset.held_out))
    count = (
        f"Held-out documents are measured in parts: {dataset.counts.held_out} as {len(dataset.held_out)} rows."
    )
    assert count in [notice.text for notice in notices]


def test_few_documents_hold_out_blocks():
    write_documents(3, paragraphs=40)
    notices = []
    dataset = load_dataset(TrainConfig(dataset="notes", near_duplicates="keep"), notices.append)
    assert all({"Note0", "Note1", "Note2"} <= notes_of(texts) for texts in (dataset.train, dataset.held_out))
    whole = sum(len(path.read_text()) for path in Path("notes").iterdir())
    assert sum(map(len, dataset.held_out)) / whole == pytest.approx(0.2, abs=0.02)
    assert sum(map(len, dataset.train)) / whole < 0.79  # with a gap
    assert (dataset.counts.train, dataset.counts.held_out) == (3, 0)
    assert any("notes is 3 documents, so blocks of them, a fifth in all" in notice.text for notice in notices)


def test_chunk_ends_at_paragraph_in_its_second_half():
    paragraphs = [" ".join(f"word{number}" for number in range(start, start + 20)) for start in range(0, 200, 20)]
    sentences = "\n\n".join(f"{paragraph}. And more." for paragraph in paragraphs)
    tokenizer = tiny_models.tokenizer()
    rows, _ = encode_rows(tokenizer, [sentences], 150)
    texts = [tokenizer.decode(row) for row in rows]
    assert len(texts) > 3
    assert all(text.strip().endswith("And more.") for text in texts[:-1])


def test_shared_passage_makes_no_document_a_copy():
    """A licence in several documents, of which a held-out one is measured in parts."""
    write_documents(8, paragraphs=20)
    licence = " ".join(f"clause{number} of this licence" for number in range(150))
    for path in sorted(Path("notes").iterdir())[:7]:
        path.write_text(f"{path.read_text()}\n\n{licence}.", encoding="utf-8")
    dataset = load_dataset(TrainConfig(dataset="notes", split_salt="x"))
    assert dataset.counts.held_out > 0
    assert dataset.counts.near_duplicates == 0


def test_blocks_of_one_text_are_not_compared_with_it():
    reviews = tiny_models.reviews(200)
    Path("novel.txt").write_text(" ".join(reviews * 3), encoding="utf-8")
    dataset = load_dataset(TrainConfig(dataset="novel.txt", txt_rows="file"))
    assert (dataset.counts.train, dataset.counts.near_duplicates) == (1, 0)
