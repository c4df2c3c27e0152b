"""What visitors may do with adapters of the library, and the sentences that refuse it."""

import shutil
from functools import partial

import pytest

from lora_tuner.adapters.adapter import MANIFEST_FILE, WEIGHTS_FILE, load_adapter_folder
from lora_tuner.errors import LoraTunerError
from lora_tuner.server.playground.library_actions import FIXED, NO_TOKEN, OFF, LibraryActions

from ...api_server import GREEDY, KEY, serving, write_adapter
from ...hub_server import Hub

GONE = "{} is no longer in the library: it was renamed or removed."


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Replaces those of conftest.py, which are trained."""
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="module")
def served(base, adapters):
    with serving(base, adapters, max_tokens=200) as served:
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
