"""Adapters as downloads of the page: complete, without paths of this machine, only with the key."""

import io
import json
import zipfile

import httpx
import pytest

from lora_tuner.adapters.adapter import (
    CARD_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    load_adapter_folder,
    verify_adapter,
)

from ...api_server import KEY, serving, write_adapter


@pytest.fixture(scope="module")
def adapters(adapters_dir):
    """Replaces those of conftest.py, which are trained."""
    return adapters_dir


@pytest.fixture(scope="module")
def served(base, adapters_dir):
    with serving(base, adapters_dir, page=True) as served:
        yield served


def unpacked(response, folder):
    """Unpack a download, and return its only adapter."""
    assert response.status_code == 200, response.text
    assert response.headers["content-disposition"].endswith(".zip")
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        archive.extractall(folder)
    (path,) = folder.iterdir()
    return load_adapter_folder(path)


def test_downloaded_adapter_passes_verify(served, adapters_dir, tmp_path):
    adapter = unpacked(served.get("/downloads/adapters/a.zip"), tmp_path)
    assert adapter.name == "a"
    original = load_adapter_folder(adapters_dir / "a")
    assert verify_adapter(adapter) == verify_adapter(original)
    assert not any("hash" in problem for problem in verify_adapter(adapter))
    assert (adapter.path / WEIGHTS_FILE).read_bytes() == (adapters_dir / "a" / WEIGHTS_FILE).read_bytes()
    head = httpx.head(f"{served.url}/downloads/adapters/a.zip")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["x-content-type-options"] == "nosniff"


def test_download_has_no_private_files(served, base, adapters_dir, tmp_path):
    path = write_adapter(adapters_dir, "linked", base, 3)
    (tmp_path / "secret").write_text("mine")
    (path / CARD_FILE).symlink_to(tmp_path / "secret")
    (path / "notes.txt").write_text("mine")
    assert str(base.parent) in (path / MANIFEST_FILE).read_text()
    content = served.get("/downloads/adapters/linked.zip").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        assert not any(name.endswith((CARD_FILE, "notes.txt")) for name in names)
        manifest = json.loads(archive.read(f"linked/{MANIFEST_FILE}"))
    assert manifest["base"]["name"] == base.name
    assert str(base.parent).encode() not in content


@pytest.mark.parametrize("name", ["none", "..%2Fadapters_dir%2Fa", "%2e%2e", "talker", "a%00"])
def test_download_of_other_names_fails(served, name):
    response = httpx.get(f"{served.url}/downloads/adapters/{name}.zip")
    assert response.status_code == 404
    assert str(served.generator.library.path) not in response.text


def test_download_outlives_its_adapter(served, base, adapters_dir, tmp_path):
    from lora_tuner.adapters import archive
    from lora_tuner.adapters.library import Library

    path = write_adapter(adapters_dir, "brief", base, 4)
    weights = (path / WEIGHTS_FILE).read_bytes()
    parts = archive.stream_zip(archive.open_public_files(load_adapter_folder(path)))
    begin = next(parts)
    Library(adapters_dir).remove("brief")
    with zipfile.ZipFile(io.BytesIO(begin + b"".join(parts))) as opened:
        assert opened.read(f"brief/{WEIGHTS_FILE}") == weights
    response = served.get("/downloads/adapters/brief.zip")
    assert (response.status_code, response.json()["error"]["message"]) == (
        404,
        "brief is no longer in the library: it was renamed or removed.",
    )


def test_download_needs_key_and_get(base, adapters_dir):
    with (
        serving(base, adapters_dir, page=True, api_key=KEY) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        path = "/downloads/adapters/a.zip"
        assert client.get(path).status_code == 401
        assert client.post("/login", data={"username": "x", "password": KEY}).status_code == 200
        assert client.get(path).status_code == 200
        assert client.post(path).status_code == 405
