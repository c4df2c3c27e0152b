"""Compressed files: read by their first bytes, within limits, and errors that name the file."""

import bz2
import gzip
import io
import lzma

import pyarrow
import pytest

from lora_tuner.config import TrainConfig
from lora_tuner.data import opening
from lora_tuner.data.dataset import load_dataset
from lora_tuner.data.readers import read_file
from lora_tuner.data.sources import local_splits
from lora_tuner.text import default_adapter_name

from ..data_files import TEXTS, jsonl, rows, table


def zstd(content):
    buffer = io.BytesIO()
    sink = pyarrow.CompressedOutputStream(pyarrow.PythonFile(buffer, "w"), "zstd")
    sink.write(content)
    sink.flush()
    buffer.close = lambda: None
    sink.close()
    return buffer.getvalue()


COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
CONTENTS = {
    "a.csv": table(),
    "a.TSV": table(separator="\t"),
    "a.jsonl": jsonl({"text": text} for text in TEXTS),
    "a.json": "[" + ",\n".join(jsonl([text]).strip() for text in TEXTS) + "]",
    "a.txt": "\n".join(TEXTS),
}


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_compressed_files_give_same_rows(load, tmp_path, ending):
    for name, content in CONTENTS.items():
        dataset = load(name + ending, COMPRESSIONS[ending](content.encode()))
        assert rows(dataset) == sorted(TEXTS)
        if not name.endswith("json"):
            plain = read_file(tmp_path / (name + ending), streaming=True)
            assert list(plain.rows) == list(plain.rows) != []


def test_first_bytes_tell_compression(load):
    assert rows(load("packed.csv", gzip.compress(table().encode()))) == sorted(TEXTS)
    assert rows(load("unpacked.csv.gz", table())) == sorted(TEXTS)
    texts = ["BZh9 is a word", "PAR1", "PK is a park", *TEXTS]
    assert rows(load("a.txt", "\n".join(texts))) == sorted(texts)
    assert rows(load("b.txt", "\n".join(texts[1:]))) == sorted(texts[1:])


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_several_streams_in_file_are_read(load, ending):
    compress, half = COMPRESSIONS[ending], len(table()) // 2
    content = table().encode()
    padding = b"\0" * 8 if ending == ".xz" else b""
    assert rows(
        load("a.csv" + ending, compress(content[:half]) + padding + compress(content[half:]) + padding)
    ) == sorted(TEXTS)


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_damaged_compressed_file_fails(refusal, ending):
    content = COMPRESSIONS[ending](table().encode() * 20)
    for damaged in (content[:-4], content[: len(content) // 2], content + b"garbage" * 9 * (ending == ".zst")):
        if damaged != content:
            message = refusal("a.csv" + ending, damaged)
            assert message.startswith(
                f"a.csv{ending} cannot be read: its compressed data is damaged or cut short ("
            )


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_decompression_bomb_fails(refusal, monkeypatch, ending):
    monkeypatch.setattr(opening, "MAX_UNPACKED", 10**5)
    lines = b"text\n" + b"the same line again\n" * 20_000
    for settings in ({}, {"streaming": True, "shuffle_buffer": 10**6}):
        message = refusal("a.csv" + ending, COMPRESSIONS[ending](lines), **settings)
        assert "unpack to more than 0.1 MB and 200 times its size, as of a decompression bomb" in message


def test_claimed_memory_is_refused(refusal, tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**30}]
    assert refusal("a.csv.xz", lzma.compress(table().encode(), filters=filters)) == (
        "a.csv.xz cannot be read: it needs too much memory to be unpacked: unpack it first."
    )


def test_error_in_compressed_file_names_place(refusal):
    for ending, compress in COMPRESSIONS.items():
        broken = table().encode() + b"a,b,c\n"
        assert "its header has 2 fields, line 32 has 3:" in refusal("a.csv" + ending, compress(broken))
        broken = table().encode() + b"caf\x81\n"
        assert f"byte {len(table()) + 3} is not UTF-8" in refusal("a.csv" + ending, compress(broken))


def test_compressed_splits_are_kept_apart(tmp_path):
    for name in ("train.jsonl.gz", "test.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(jsonl({"text": text} for text in TEXTS).encode()))
    assert [*local_splits(str(tmp_path))] == ["test", "train"]
    assert load_dataset(TrainConfig(dataset=str(tmp_path), eval_dataset="held-out")).counts.read == 30


def test_adapter_name_leaves_out_compression():
    assert [default_adapter_name(name) for name in ("x/a.csv.gz", "b.JSONL.ZST", "c.py", "d.tar.gz")] == [
        *("a", "b", "c", "d-tar-gz")
    ]
