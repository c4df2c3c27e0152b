"""Archives of strangers: nothing is written outside of the folder, nothing grows without a limit."""

import contextlib
import os
import random
import stat
import struct
import zipfile

import pytest

from lora_tuner.adapters import archive
from lora_tuner.adapters.adapter import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    load_adapter_folder,
    verify_adapter,
)
from lora_tuner.errors import AdapterError

from .. import adapter_files


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "unpacked"
    folder.mkdir()
    return folder


@pytest.fixture
def pack(tmp_path):
    """Return a function that writes an archive with these entries; a ZipInfo may stand for a name."""

    def pack(entries, compression=zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "a.zip", "w", compression) as opened:
            for name, content in entries:
                opened.writestr(name, content)
        return tmp_path / "a.zip"

    return pack


@pytest.fixture
def good(tmp_path):
    """Entries of a valid adapter."""
    path = adapter_files.write(tmp_path / "poems", facts=adapter_files.manifest(run=None))
    return [(f"poems/{file.name}", file.read_bytes()) for file in sorted(path.iterdir())]


def entry(name, mode=stat.S_IFREG | 0o644, **fields):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def refusal(path, folder):
    before = {each for each in folder.parent.rglob("*") if each not in folder.rglob("*")}
    with pytest.raises(AdapterError) as error:
        archive.unpack(path, folder)
    assert {each for each in folder.parent.rglob("*") if each not in folder.rglob("*")} == before
    return str(error.value)


def test_streamed_archive_unpacks_to_same_adapter(tmp_path, folder):
    path = adapter_files.write(tmp_path / "poems", facts=adapter_files.manifest(run=None))
    (path / "notes.txt").write_text("not of an adapter")
    (tmp_path / "poems.zip").write_bytes(
        b"".join(archive.stream_zip(archive.open_public_files(load_adapter_folder(path))))
    )
    assert archive.unpack(tmp_path / "poems.zip", folder) == []
    assert verify_adapter(load_adapter_folder(folder)) == []
    assert (folder / WEIGHTS_FILE).read_bytes() == (path / WEIGHTS_FILE).read_bytes()


def test_other_files_are_named_and_left_out(good, pack, folder):
    path = pack([*good, ("poems/run.yaml", "x"), ("poems/evil.py", "x"), ("__MACOSX/poems/._a", "x"), ("b/", "")])
    assert archive.unpack(path, folder) == ["__MACOSX/poems/._a", "poems/evil.py", "poems/run.yaml"]
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE]


@pytest.mark.parametrize(
    "name",
    ["../evil", "poems/../../evil", "/etc/evil", "poems\\..\\evil", "C:/evil", "poems/../README.md", "a\0../b"],
)
def test_paths_out_of_folder_are_refused(good, pack, folder, name):
    bad = entry("placeholder")
    bad.filename = bad.orig_filename = name
    assert "leads out of its folder" in refusal(pack([*good, (bad, "x")]), folder)


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices_are_refused(good, pack, folder, mode):
    path = pack([*good, (entry("poems/README.md", mode | 0o777), "/etc/passwd")])
    assert "is a link, or no regular file" in refusal(path, folder)
    assert list(folder.iterdir()) == []


def test_zip_bombs_are_refused(good, pack, folder, monkeypatch):
    monkeypatch.setattr(archive, "MAX_WEIGHTS_BYTES", 1_000_000)
    bomb = [(name, content) for name, content in good if not name.endswith(WEIGHTS_FILE)]
    path = pack([*bomb, (f"poems/{WEIGHTS_FILE}", bytes(3_000_000))])
    assert path.stat().st_size < 100_000
    assert "adapter_model.safetensors would have more than 1.0 MB" in refusal(path, folder)
    path = pack([*good, ("poems/README.md", bytes(10_000_001))])
    assert "README.md would have more than 10.0 MB" in refusal(path, folder)


def test_announced_size_is_a_limit(good, pack, folder):
    """The list of files says one byte; the data has more."""
    path = pack([*good, ("poems/README.md", b"x" * 5_000_000)])
    data = path.read_bytes()
    size = struct.pack("<I", 5_000_000)
    path.write_bytes(data.replace(size, struct.pack("<I", 1)))
    assert "is no zip archive, or damaged" in refusal(path, folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000


def test_long_list_of_files_is_not_read(good, pack, folder, tmp_path):
    path = pack([*good, *((f"{number}", "") for number in range(1100))])
    assert "has 1,103 files: an adapter has at most 1,000." in refusal(path, folder)
    path = tmp_path / "list.zip"
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 400_000_000, 0, 0)
    with path.open("wb") as file:
        file.truncate(400_000_000)  # a sparse file
        file.seek(0, os.SEEK_END)
        file.write(end)
    assert "is no zip archive, or damaged" in refusal(path, folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda good: [], "holds no adapter"),
        (lambda good: good[1:], "holds no adapter"),
        (lambda good: [*good, *((f"b/{name}", content) for name, content in good)], "holds 2 adapters"),
        (lambda good: [*good, (entry(f"poems/{CONFIG_FILE}"), "{}")], "twice"),
        (lambda good: [*good, (entry("poems/README.md", compress_type=zipfile.ZIP_LZMA), "x")], "unusual way"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_without_one_adapter_are_refused(good, pack, folder, change, why):
    assert why in refusal(pack(change(good)), folder)


def test_damaged_archives_are_refused_in_words(good, pack, folder):
    data = pack(good).read_bytes()
    draw = random.Random(0)
    path = folder.parent / "fuzzed.zip"
    for _ in range(300):
        changed = bytearray(data[: draw.randrange(len(data)) if draw.random() < 0.2 else None])
        for _ in range(draw.randrange(1, 4)):
            if changed:
                changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(changed)
        for file in folder.iterdir():
            file.unlink()
        with contextlib.suppress(AdapterError):
            archive.unpack(path, folder)
    path.write_bytes(b"no zip")
    assert refusal(path, folder) == "fuzzed.zip is no zip archive, or damaged."


def test_encrypted_archive_is_refused(good, pack, folder):
    path = pack(good, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    at = -1
    while (at := data.find(b"PK\1\2", at + 1)) >= 0:
        data[at + 8] |= 1
    path.write_bytes(data)
    assert "it is encrypted" in refusal(path, folder)
