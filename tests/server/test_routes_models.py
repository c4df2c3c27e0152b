"""Routes: models, health, OpenAPI."""

import concurrent.futures
import json
import os
import shutil
from pathlib import Path

import openai
import pytest

from lora_tuner import Library
from lora_tuner.adapters import adapter, library
from lora_tuner.server import service

from .. import adapter_files, api_server
from ..api_server import (
    GREEDY,
    error_of,
    greedy,
    write_adapter,
)

ROOT = Path(__file__).parents[2]


def test_models_lists_base_and_adapters(client, served, adapters_dir):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["talker", "a", "b"]
    assert [model.parent for model in listed] == [None, "talker", "talker"]
    info = listed[1].lora_tuner
    assert (info["rank"], info["dataset"], info["rows"]["train"]) == (4, "imdb", 10_000)
    assert (info["result"]["gain"], info["result"]["loss"]) == (0.25, 3.5)
    assert info["bytes"] == adapter.load_adapter_folder(adapters_dir / "a").bytes
    assert listed[1].created == 1735787045  # 2025-01-02T03:04:05Z
    assert client.models.retrieve("b").id == "b"
    with pytest.raises(openai.NotFoundError, match="There is no model 'c'"):
        client.models.retrieve("c")
    assert str(adapters_dir) not in served.get("/v1/models").text


@pytest.mark.parametrize(
    "name", ["../a", "..%2Fa", "%2Fetc%2Fpasswd", "a/", "A", "/", "a\0b", "a" * 300, "adapters/a"]
)
def test_model_name_is_never_a_path(served, name):
    assert served.get(f"/v1/models/{name}" if "\0" not in name else "/v1/models/a%00b").status_code == 404
    response = served.post("/v1/completions", model=name, prompt="x")
    assert response.status_code == (400 if "\0" in name or len(name) > 256 else 404)


def test_library_changes_are_served_at_once(start_server, base):
    with start_server() as served:
        client = served.client()
        write_adapter(start_server.adapters_dir, "new", base, 7)
        assert [model.id for model in client.models.list()] == ["talker", "a", "b", "new"]
        assert (
            client.completions.create(model="new", **GREEDY).choices[0].text
            == greedy(base, start_server.adapters_dir, "new").text
        )
        shutil.rmtree(start_server.adapters_dir / "new")
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="new", **GREEDY)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        (start_server.adapters_dir / "b" / adapter.WEIGHTS_FILE).write_bytes(b"nothing")
        broken = client.models.retrieve("b").broken
        assert (
            broken
            == f"b/{adapter.WEIGHTS_FILE}: it is cut off, or no safetensors file. Copy it again from its source."
        )
        with pytest.raises(openai.NotFoundError, match="it is cut off") as error:
            client.completions.create(model="b", **GREEDY)
        assert error.value.code == "model_broken"
        assert str(start_server.adapters_dir) not in str(error.value)
        assert client.models.retrieve("a").broken is None


def test_models_reports_incompatible_adapters(start_server, gpt2, tmp_path):
    base_info = {
        "name": "/home/someone/models/other",
        "repo": "other",
        "revision": None,
        "weights": "a local folder",
    }
    base_info |= {"fingerprint": "ab" * 32, "tokenizer": None}
    with start_server() as served:
        write_adapter(start_server.adapters_dir, "foreign", gpt2, 1, base_info)
        config = json.loads((start_server.adapters_dir / "a" / adapter.CONFIG_FILE).read_text())
        adapter_files.write(start_server.adapters_dir / "misfit", config, adapter_files.tensors())
        listed = {model["id"]: model["broken"] for model in served.get("/v1/models").json()["data"]}
        assert listed["foreign"].startswith("foreign was trained on other (fingerprint abababababab")
        assert "/home" not in listed["foreign"]
        assert (
            "misfit does not fit the base: transformer.h.0.attn.c_attn is 32 -> 96 in the base"
            in listed["misfit"]
        )
        assert (
            error_of(served.post("/v1/completions", model="foreign", prompt="x"), 404)["code"] == "model_broken"
        )


def test_replaced_adapter_keeps_running_requests(start_server, base, expected_texts):
    with start_server() as served:
        client = served.client()
        with served.held_steps() as release:
            release(5)
            stream = client.completions.create(model="a", stream=True, **GREEDY)
            first = next(iter(stream)).choices[0].text
            write_adapter(start_server.adapters_dir, "a", base, 99)
            renewed = greedy(base, start_server.adapters_dir, "a").text
            assert renewed != expected_texts["a"]
            with concurrent.futures.ThreadPoolExecutor() as pool:
                new = pool.submit(client.completions.create, model="a", **GREEDY)
                served.wait(lambda: served.scheduler.waiting + served.scheduler.running == 2)
                release(100)
                assert first + "".join(chunk.choices[0].text for chunk in stream) == expected_texts["a"]
                assert new.result().choices[0].text == renewed


def test_changed_symlink_replaces_adapter(start_server, base):
    for seed, name in ((1, "one"), (2, "two")):
        write_adapter(start_server.adapters_dir / "versions", name, base, seed)
    os.symlink("versions/one", start_server.adapters_dir / "live")
    with start_server() as served:
        client = served.client()
        texts = [client.completions.create(model="live", **GREEDY).choices[0].text]
        os.symlink("versions/two", start_server.adapters_dir / "next")
        os.rename(start_server.adapters_dir / "next", start_server.adapters_dir / "live")
        texts.append(client.completions.create(model="live", **GREEDY).choices[0].text)
        assert texts == [
            greedy(base, start_server.adapters_dir / "versions", name).text for name in ("one", "two")
        ]


def test_least_recently_used_adapter_is_unloaded(start_server, expected_texts):
    with start_server(max_resident=1) as served:
        client = served.client()
        for name in ("a", "b", "a"):
            assert client.completions.create(model=name, **GREEDY).choices[0].text == expected_texts[name]
            assert served.generator.loaded_adapters == [name]


def test_only_named_adapters_are_served(base, start_server, expected_texts):
    with api_server.serving(base, start_server.adapters_dir, only=[start_server.adapters_dir / "a"]) as served:
        assert [model.id for model in served.client().models.list()] == ["talker", "a"]
        assert error_of(served.post("/v1/completions", model="b", **GREEDY), 404)["code"] == "model_not_found"
        assert (
            served.post("/v1/completions", model="a", **GREEDY).json()["choices"][0]["text"]
            == expected_texts["a"]
        )


def test_resident_adapter_is_not_read_again(served, expected_texts, monkeypatch):
    client = served.client()
    responses = [client.completions.create(model="a", **GREEDY)]
    monkeypatch.setattr(Library, "names", None)
    monkeypatch.setattr(library, "load_adapter_folder", None)
    responses.append(client.completions.create(model="a", **GREEDY))
    texts = [response.choices[0].text for response in responses]
    assert texts == [expected_texts["a"]] * 2


def test_get_model_reads_one_adapter(served, monkeypatch):
    names = []
    monkeypatch.setattr(
        service,
        "read_consistently",
        lambda path, read: names.append(path.name) or library.read_consistently(path, read),
    )
    assert served.get("/v1/models/b").json()["id"] == "b"
    assert served.get("/v1/models/talker").json()["parent"] is None
    assert names == ["b"]
