"""What visitors may do with adapters of the library, and the sentences that refuse it."""

import asyncio
import contextlib
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from lora_tuner.adapters.adapter import MANIFEST_FILE, WEIGHTS_FILE, load_adapter_folder, verify_adapter
from lora_tuner.errors import LoraTunerError
from lora_tuner.server.playground.commands import CommandRunner
from lora_tuner.server.playground.exports import FORMATS, Exports
from lora_tuner.server.playground.library_actions import FIXED, NO_TOKEN, OFF, LibraryActions

from ... import adapter_files
from ...api_server import GREEDY, KEY, serving, write_adapter
from ...hub_server import Hub
from .browser import run_async

ID = "0123456789abcdef" * 2

GONE = "{} is no longer in the library: it was renamed or removed."


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Replaces those of conftest.py, which are trained."""
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="module")
def served(base, adapters):
    runs_dir = adapters.with_name("runs-of-library")
    with serving(base, adapters, max_tokens=200, runs_dir=runs_dir, page=True) as served:
        yield served


@pytest.fixture
def library(served, base, adapters):
    """The folder with the adapters a and b; served, with what a visitor may do."""
    for path in [*adapters.iterdir()]:
        shutil.rmtree(path)
    for seed, name in enumerate(("a", "b")):
        write_adapter(adapters, name, base, seed)
    return adapters


@pytest.fixture
def actions(served, library):
    return LibraryActions(served.service)


def refusal(function, *arguments):
    with pytest.raises(LoraTunerError) as error:
        function(*arguments)
    return str(error.value)


def test_rename_changes_listing(actions, library):
    assert actions.rename("a", "c") == "a is now c. Requests that use it are answered to their end."
    assert sorted(path.name for path in library.iterdir()) == ["b", "c"]
    assert refusal(actions.rename, "a", "d") == GONE.format("a")


@pytest.mark.parametrize(
    ("new", "why"),
    [
        ("b", "There is an adapter b: choose another name."),
        ("a", "There is an adapter a: choose another name."),
        ("talker", "talker is the name of the base: choose another one."),
        ("../c", "'../c' is not a valid adapter name"),
        ("", "'' is not a valid adapter name"),
        ("c/d", "'c/d' is not a valid adapter name"),
    ],
)
def test_rename_to_other_names_is_refused(actions, library, new, why):
    assert refusal(actions.rename, "a", new).startswith(why)
    assert sorted(path.name for path in library.iterdir()) == ["a", "b"]


def test_names_of_visitors_are_looked_up(actions, library, tmp_path):
    outside = shutil.copytree(library / "a", tmp_path / "outside")
    names = ["", "none", "talker", str(outside), f"../{outside.name}", "../library/a", "a/", "./a"]
    for name in names:
        for action in (partial(actions.rename, new="c"), actions.remove, actions.verify, actions.describe_loss):
            assert refusal(action, name) in (GONE.format(name), "Choose an adapter first.")
    assert outside.is_dir()
    assert (library / "a").is_dir()


def test_removal_names_files_and_children(actions, library, base):
    parent = load_adapter_folder(library / "a")
    assert actions.describe_loss("a") == f"This deletes a for ever: 3 files, {_size(library / 'a')}."
    manifest = load_adapter_folder(library / "b").manifest
    child = manifest.model_copy(update={"parents": [parent.parent_info()]})
    (library / "b" / MANIFEST_FILE).write_text(child.to_json())
    assert actions.describe_loss("a").endswith(" b names it as a parent, and will show that it is gone.")
    (library / "link").symlink_to(library / "a")
    assert actions.describe_loss("link") == "link is a link to a folder elsewhere: only the link is removed."
    actions.remove("link")
    assert actions.remove("a") == "a was removed."
    assert [path.name for path in library.iterdir()] == ["b"]


def _size(folder):
    from lora_tuner.text import format_bytes

    return format_bytes(sum(path.stat().st_size for path in folder.iterdir()))


def test_second_removal_gets_a_sentence(actions, library, monkeypatch):
    """The second visitor has found the adapter before the first one removes it."""
    find = LibraryActions.find

    def find_then_lose(self, name):
        model = find(self, name)
        shutil.rmtree(library / name)
        return model

    monkeypatch.setattr(LibraryActions, "find", find_then_lose)
    assert refusal(actions.remove, "a") == GONE.format("a")


def test_broken_adapter_can_be_removed(actions, library):
    (library / "a" / WEIGHTS_FILE).write_bytes(b"nothing")
    assert "it is cut off" in refusal(actions.verify, "a")
    assert actions.remove("a") == "a was removed."


def test_verify_finds_changed_bytes(actions, library, base):
    write_adapter(library, "whole", base, 5)
    problem = refusal(actions.verify, "whole")
    assert problem.startswith("whole is damaged: run.yaml is missing")
    manifest = load_adapter_folder(library / "whole").manifest.model_copy(update={"run": None})
    (library / "whole" / MANIFEST_FILE).write_text(manifest.to_json())
    assert actions.verify("whole").startswith("whole is intact: weights and settings match the hashes")
    weights = bytearray((library / "whole" / WEIGHTS_FILE).read_bytes())
    weights[-1] ^= 1
    (library / "whole" / WEIGHTS_FILE).write_bytes(weights)
    assert "does not match its hash in manifest.json" in refusal(actions.verify, "whole")
    (library / "whole" / MANIFEST_FILE).unlink()
    assert "has no manifest, so there is no hash" in actions.verify("whole")


@pytest.mark.parametrize("change", ["remove", "rename"])
def test_running_request_outlives_its_adapter(served, actions, library, change):
    expected = served.post("/v1/completions", model="a", **GREEDY).json()["choices"][0]["text"]
    with served.held_steps() as release:
        release(3)
        client = served.client()
        stream = client.completions.create(model="a", stream=True, **GREEDY)
        text = next(iter(stream)).choices[0].text
        actions.remove("a") if change == "remove" else actions.rename("a", "c")
        release(100)
        text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == expected
    assert "a" not in served.generator.loaded_adapters
    assert served.post("/v1/completions", model="a", **GREEDY).status_code == 404
    if change == "rename":
        renamed = served.post("/v1/completions", model="c", **GREEDY).json()
        assert renamed["choices"][0]["text"] == expected


def test_changes_are_off_for_other_machines(base, library):
    settings = {"host": "0.0.0.0", "api_key": KEY}
    for more, only, why in (
        ({}, [], OFF),
        ({"allow_training": True}, [library / "a"], FIXED),
    ):
        with serving(base, library, only, **settings, **more) as served:
            actions = LibraryActions(served.service)
            assert refusal(actions.rename, "a", "c") == why
            assert refusal(actions.remove, "a") == why
            assert refusal(actions.verify, "a").startswith("a is damaged: run.yaml is missing")
            if why == OFF:
                assert refusal(actions.push, "a", "owner/a", True) == OFF


# Push


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "writer")
    with Hub({}) as hub, hub.for_this_process(tmp_path, monkeypatch):
        yield hub


@pytest.fixture
def whole(library, base):
    """An adapter that can be pushed."""
    write_adapter(library, "whole", base, 5)
    manifest = load_adapter_folder(library / "whole").manifest.model_copy(update={"run": None})
    (library / "whole" / MANIFEST_FILE).write_text(manifest.to_json())
    return "whole"


def test_push_checks_before_it_sends(hub, actions, whole, base):
    checked = actions.check_push(whole, "owner/whole", True)
    assert checked.startswith(
        "Account: user, token laptop (write). Owner: owner: an organization of the account (write). "
        "Repo: new, private. To be sent: 4 files,"
    )
    assert not hub.repos
    pushed = actions.push(whole, "owner/whole", True)
    repo = hub.repos["models/owner/whole"]
    assert pushed == f"whole was pushed: {hub.url}/owner/whole/commit/{repo.sha}"
    assert repo.private
    assert str(base.parent).encode() not in b"".join(path.read_bytes() for path in repo.files.values())


@pytest.mark.parametrize(
    ("repo", "why"),
    [
        ("stranger/whole", "has no right to write for stranger."),
        ("../whole", "Give the repo as OWNER/NAME"),
        ("a/b/c", "Give the repo as OWNER/NAME"),
        ("", "Give the repo as OWNER/NAME"),
        ("owner/open", "owner/open is public: make it private on its Hub page first"),
    ],
)
def test_push_elsewhere_is_refused(hub, actions, whole, repo, why):
    hub.commit("models/owner/open", {})
    commits = len(hub.commits)
    assert why in refusal(actions.check_push, whole, repo, True)
    assert why in refusal(actions.push, whole, repo, True)
    assert len(hub.commits) == commits


def test_push_needs_token_of_server(actions, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert actions.why_no_push() == NO_TOKEN
    assert refusal(actions.check_push, "a", "owner/a", True) == NO_TOKEN


# Uploads


@pytest.fixture
def upload(actions):
    """Return a function that stores files as if they were uploaded, and returns the number of the upload."""

    def upload(**files):
        folder = actions.uploads.folder / ID / "upload"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        return ID

    return upload


def files_of(folder):
    return {path.name.replace(".", "__"): path.read_bytes() for path in folder.iterdir()}


def test_downloaded_adapter_is_uploaded_again(served, actions, library, upload):
    content = served.get("/downloads/adapters/a.zip").content
    added = actions.adopt(upload(**{"my poems__zip": content}), "")
    assert added.startswith("my-poems is in the library. my-poems fits")
    adapter = load_adapter_folder(library / "my-poems")
    assert verify_adapter(adapter) == []
    original = load_adapter_folder(library / "a")
    assert adapter.manifest.base == served.service.base.info(with_template=False)
    assert (adapter.manifest.data, adapter.manifest.run) == (None, None)  # of a stranger
    assert adapter.sha256 == original.sha256
    assert not (actions.uploads.folder / ID).exists()
    texts = [
        served.post("/v1/completions", model=name, **GREEDY).json()["choices"][0]["text"]
        for name in ("a", "my-poems")
    ]
    assert texts[0] == texts[1]


def test_uploaded_files_of_stranger_are_adopted(actions, library, upload):
    files = files_of(library / "a")
    del files["manifest__json"]
    config = json.loads(files["adapter_config__json"]) | {"base_model_name_or_path": "/etc"}
    files |= {"adapter_config__json": json.dumps(config).encode(), "README__md": b"# mine", "notes__txt": b"x"}
    assert refusal(actions.adopt, upload(**files), "") == "Give the adapter a name."
    added = actions.adopt(upload(**files), "foreign")
    assert added.endswith("Left out: notes.txt.")
    assert load_adapter_folder(library / "foreign").manifest.base.name == actions.service.base.files.name
    assert sorted(files_of(library / "foreign")) == [
        "README__md", "adapter_config__json", "adapter_model__safetensors", "manifest__json",
    ]  # fmt: skip


def test_messages_name_the_called_program(actions, monkeypatch):
    message = "merge it (`python cli.py merge c`)"
    assert actions.service.hide_paths(message) == message
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lora-tuner", "serve"])
    assert actions.service.hide_paths(message) == "merge it (`lora-tuner merge c`)"


def test_uploads_that_are_no_adapter_are_refused(actions, library, upload, gpt2, tmp_path):
    good = files_of(library / "a")
    assert "Choose a zip file" in refusal(actions.adopt, "f" * 32, "c")
    assert "Choose a zip file" in refusal(actions.adopt, "../uploads", "c")
    assert "There is an adapter b" in refusal(actions.adopt, upload(**good), "b")
    assert "not a valid adapter name" in refusal(actions.adopt, upload(**good), "../c")
    assert "is no zip archive" in refusal(actions.adopt, upload(a__zip=b"PK"), "c")
    assert "one zip file alone" in refusal(actions.adopt, upload(a__zip=b"PK", **good), "c")
    empty = good | {"adapter_model__safetensors": b""}
    assert "it is cut off, or no safetensors file" in refusal(actions.adopt, upload(**empty), "c")
    other = json.loads(good["manifest__json"])
    other["base"] |= {"name": "/home/me/other", "fingerprint": "ab" * 32}
    wrong = good | {"manifest__json": json.dumps(other).encode()}
    assert refusal(actions.adopt, upload(**wrong), "c").startswith(
        "c was trained on other, or with another tokenizer"
    )
    misfit = files_of(adapter_files.write(tmp_path / "misfit"))
    message = refusal(actions.adopt, upload(**misfit), "c")
    assert actions.service.hide_paths(message).startswith("c does not fit the base")
    assert sorted(path.name for path in library.iterdir()) == ["a", "b"]
    assert [path.name for path in actions.uploads.folder.iterdir()] == [ID]


# Exports


class Command:
    """Stands for the process: reports, and writes a file; `waits` at the end."""

    def __init__(self, waits=False):
        self.arguments, self.waits = [], waits

    async def run(self, *arguments):
        self.arguments.append(arguments)
        yield "halfway"
        Path(arguments[arguments.index("--out") + 1]).write_bytes(b"GGUF")
        if self.waits:
            await asyncio.sleep(60)
        yield {"path": "x"}


def export(actions, label, command, precision="float16", most=10):
    """Return what an export yields."""

    async def collect():
        updates = []
        async with contextlib.aclosing(Exports(actions, command).export("a", label, precision)) as exporting:
            async for update in exporting:
                updates.append(update)
                if len(updates) == most:
                    break
        return updates

    return run_async(collect())


def label_of(tool):
    return next(label for label, (name, _) in FORMATS.items() if name == tool)


def test_export_becomes_download(served, actions, library):
    command = Command()
    *progress, made = export(actions, label_of("gguf"), command)
    assert progress == ["Checking ...", "halfway"]
    assert made.title == "a.gguf, 4 bytes"
    (arguments,) = command.arguments
    assert arguments[:4] == ("export", str(library / "a"), "--to", "gguf")
    response = served.get(f"/{made.href}")
    assert (response.status_code, response.content) == (200, b"GGUF")
    assert 'filename="a.gguf"' in response.headers["content-disposition"]
    for name in ("f" * 32, "..", "x"):
        assert served.get(f"/downloads/exports/{name}").status_code == 404


def test_whole_model_is_quantized(actions, library):
    command = Command()
    export(actions, label_of("ollama"), command, "q8_0")
    export(actions, label_of("gguf-merged"), command)
    assert command.arguments[0][-2:] == ("--quantize", "q8_0")
    assert command.arguments[1][-1] == "--merged"
    assert "--quantize" not in command.arguments[1]


def test_verdict_names_no_export_command(actions, library):
    errors, notes = Exports(actions, Command()).verdict("a", label_of("mlx"))
    assert errors == []
    assert notes
    assert not any("cli.py export" in note for note in notes)
    assert "mlx-lm loads a folder; untried on a Mac" in notes


def test_adapter_as_it_is_needs_no_process(actions, library):
    command = Command()
    *_, made = export(actions, label_of("peft"), command)
    assert (made.href, command.arguments) == ("downloads/adapters/a.zip", [])


def test_export_refusal_is_that_of_check(actions, library, base):
    shutil.rmtree(library / "a")
    modules = {"transformer.h.0.attn.c_attn": (32, 96)}
    adapter_files.write_random(library / "a", base, modules, use_dora=True, fan_in_fan_out=True)
    errors, _ = Exports(actions, Command()).verdict("a", label_of("gguf"))
    assert errors
    command = Command()
    with pytest.raises(LoraTunerError, match="DoRA"):
        export(actions, label_of("gguf"), command)
    with pytest.raises(LoraTunerError, match="format of the list"):
        export(actions, "--to=gguf", command)
    assert command.arguments == []


def test_stopped_export_leaves_nothing(actions, library):
    shutil.rmtree(actions.service.config.runs_dir / ".exports", ignore_errors=True)
    export(actions, label_of("gguf"), Command(waits=True), most=2)
    assert list((actions.service.config.runs_dir / ".exports").iterdir()) == []


def test_old_exports_are_removed(actions, library):
    folder = actions.service.config.runs_dir / ".exports"
    export(actions, label_of("gguf"), Command())
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    *_, made = export(actions, label_of("gguf"), Command())
    assert [path.name for path in folder.iterdir()] == [made.href.rpartition("/")[2]]


@pytest.mark.slow
def test_exported_adapter_loads(actions, library):
    *_, made = export(actions, label_of("gguf"), CommandRunner())
    path = Exports(actions, CommandRunner()).find(made.href.rpartition("/")[2])
    assert path.read_bytes()[:4] == b"GGUF"
