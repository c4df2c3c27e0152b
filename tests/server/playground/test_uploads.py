"""Files that visitors upload: limits, refusals, and the removal of old ones."""

import asyncio
import os

import httpx
import pytest

from lora_tuner.config import ServerConfig, TrainConfig
from lora_tuner.server.middleware import SecurityMiddleware
from lora_tuner.server.playground import uploads
from lora_tuner.settings_files import config_to_yaml
from lora_tuner.training.jobs import LOG_FILE, SETTINGS_FILE
from lora_tuner.training.paths import job_folder

from ...api_server import KEY, serving
from .browser import run_async

ID = "0123456789abcdef" * 2


@pytest.fixture
def store(tmp_path):
    return uploads.Uploads(ServerConfig(runs_dir=tmp_path / "runs"))


def put(store, name, content=b"text\nso\n", *, upload=ID, method="PUT"):
    """Send a file through the middleware of the server."""

    async def app(scope, receive, send):
        response = await store.respond(scope, receive)
        await response(scope, receive, send)

    async def request():
        transport = httpx.ASGITransport(SecurityMiddleware(app, store.settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, f"/uploads/{upload}/{name}", content=content)

    return run_async(request())


def message_of(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]["message"]


def test_file_is_stored_in_its_folder(store, monkeypatch):
    content = b"text\n" + b"so it goes\n" * 50_000  # more than the page takes otherwise

    async def parts():
        for begin in range(0, len(content), 100_000):
            yield content[begin : begin + 100_000]

    assert put(store, "my%20films.csv", parts()).json() == {"name": "my films.csv", "bytes": len(content)}
    dataset = store.dataset(ID)
    assert dataset == store.folder / ID / "upload" / "my films.csv"
    assert dataset.read_bytes() == content
    assert put(store, "b.txt").status_code == 201
    assert store.dataset(ID) == dataset.parent
    assert store.dataset("f" * 32) is None
    assert store.dataset(f"../uploads/{ID}") is None


def test_names_become_no_paths(store):
    for name, stored in {
        "..%5C..%5Cx.csv": "_.._x.csv",
        ".hidden.csv": "hidden.csv",
        "a=0.5.csv": "a_0.5.csv",
        f"{'x' * 300}.jsonl": f"{'x' * 94}.jsonl",
        "%F0%9F%8E%AC%0A.txt": "__.txt",
    }.items():
        if "%0A" in name:
            assert put(store, name).status_code == 404
        else:
            assert put(store, name).json()["name"] == stored
    assert put(store, "..%2F..%2Fx.csv").status_code in (400, 404, 415)
    assert {path.name for path in store.folder.iterdir()} == {ID}
    assert put(store, "a.csv", upload="..").status_code == 404
    assert not (store.settings.runs_dir / "upload").exists()


def test_uploads_are_refused_with_reason(store, monkeypatch):
    assert "a.exe cannot be trained on: choose csv, tsv, json" in message_of(put(store, "a.exe"), 415)
    assert put(store, "a.csv", upload="not-an-id").status_code == 404
    message_of(put(store, "a.csv", method="POST"), 405)
    assert put(store, "a.csv").status_code == 201
    assert message_of(put(store, "a.csv"), 409) == "There are two files a.csv: rename one."
    monkeypatch.setattr(uploads, "MAX_FILES", 1)
    assert message_of(put(store, "b.csv"), 413) == "At most 1 files are taken at once."
    monkeypatch.setattr(uploads, "MAX_FILES", 10)
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 10)

    async def parts():
        for _ in range(3):
            yield b"12345"

    for content in (b"12345678901", parts()):
        assert message_of(put(store, "c.csv", content), 413) == "c.csv is too large: at most 10 bytes are taken."
    monkeypatch.setattr(uploads, "MAX_TOTAL_BYTES", 10)
    assert "There is no room for more uploads" in message_of(put(store, "d.csv"), 507)
    assert [path.name for path in store.dataset(ID).parent.iterdir()] == ["a.csv"]


def test_slow_upload_times_out(store, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_SECONDS", 0.05)

    async def parts():
        yield b"12345"
        await asyncio.sleep(5)

    assert "No more bytes came in 0.05 seconds." in message_of(put(store, "a.csv", parts()), 408)
    assert [*store.folder.rglob("*.csv")] == []


def test_old_uploads_are_removed(store):
    """An unfinished run keeps its own, also one that has not begun."""
    other, queued = ID[::-1], "e" * 32
    for upload in (ID, other, queued):
        assert put(store, "a.csv", upload=upload).status_code == 201
    for upload in (ID, other, queued):
        os.utime(store.folder / upload, (1e9, 1e9))
    run = store.settings.runs_dir / "mine"
    run.mkdir()
    config = TrainConfig(dataset=str(store.dataset(other)), name="mine", max_steps=3)
    (run / "run.yaml").write_text(config_to_yaml(config))
    job = job_folder(store.settings.runs_dir, "next")
    job.mkdir(parents=True)
    (job / LOG_FILE).touch()
    (job / SETTINGS_FILE).write_text(config_to_yaml(TrainConfig(dataset=str(store.dataset(queued)), name="next")))
    assert put(store, "b.csv", upload="f" * 32).status_code == 201
    assert {path.name for path in store.folder.iterdir()} == {other, queued, "f" * 32}


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, True),
        ({"host": "localhost"}, True),
        ({"host": "0.0.0.0", "api_key": KEY}, False),
        ({"host": "0.0.0.0", "api_key": KEY, "allow_training": True}, True),
    ],
)
def test_training_needs_loopback_or_option(tmp_path, settings, allowed):
    store = uploads.Uploads(ServerConfig(runs_dir=tmp_path, **settings))
    response = put(store, "a.csv")
    assert response.status_code == (201 if allowed else 403)
    if not allowed:
        assert response.json()["error"]["message"] == uploads.OFF


def test_upload_needs_key(gpt2, adapters, tmp_path):
    settings = {"api_key": KEY, "runs_dir": tmp_path / "runs"}
    with serving(gpt2, adapters, page=True, **settings) as served, httpx.Client(base_url=served.url) as client:
        path = f"/uploads/{ID}/a.csv"
        assert client.put(path, content=b"x").status_code == 401
        assert client.post("/login", data={"username": "x", "password": KEY}).status_code == 200
        assert client.put(path, content=b"x" * 300_000).status_code == 201
        assert client.options(path, headers={"Origin": "http://elsewhere.example"}).status_code == 405
    assert (tmp_path / "runs/.uploads" / ID / "upload/a.csv").stat().st_size == 300_000


def test_adapters_have_files_of_their_own(store):
    upload = f"adapter/{ID}"
    assert put(store, "a.zip", upload=upload).status_code == 201
    assert put(store, "adapter_model.safetensors", upload=upload).status_code == 201
    assert [path.name for path in store.files(ID)] == ["a.zip", "adapter_model.safetensors"]
    for name in ("a.csv", "a.py", "model.safetensors", "run.yaml"):
        assert "is no file of an adapter" in message_of(put(store, name, upload=upload), 415)
    assert message_of(put(store, "a.zip"), 415).startswith("a.zip cannot be trained on")
    store.remove("../..")
    store.remove(ID)
    assert store.files(ID) == []
