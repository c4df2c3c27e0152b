"""Push and pull through huggingface_hub, against a local server with the Hub's protocol."""

import json
import shutil

import pytest
import yaml

from lora_tuner import Library, atomic_io
from lora_tuner.adapters import hub_sync
from lora_tuner.adapters.adapter import (
    CARD_FILE,
    CONFIG_FILE,
    LOSS_PLOT_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
    load_adapter_folder,
    verify_adapter,
)
from lora_tuner.errors import AdapterError, HubError

from .. import adapter_files
from ..cli.test_commands import run
from ..hub_server import Hub, fail

REPO, KEY = "owner/reviews", "models/owner/reviews"
OTHER = "does not match its hash in manifest.json"
REFUSED = "no permission to write to owner/reviews: run `hf auth login` with a token that allows it."


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty local Hub that replaces the real one, and a token with write access."""
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", "writer")
    with Hub({}) as server, server.for_this_process(tmp_path / "home", monkeypatch):
        yield server


@pytest.fixture
def small(tmp_path):
    """An adapter in the library without the files of a run."""
    return load_adapter_folder(
        adapter_files.write(tmp_path / "adapters" / "small", facts=adapter_files.manifest(run=None))
    )


def config(**changes):
    return json.dumps(adapter_files.CONFIG | changes).encode()


def put(hub, folder, **more):
    """Commit the files of a folder, as another tool would push them."""
    return hub.commit(KEY, {path.name: path.read_bytes() for path in folder.iterdir()} | more)


def push(adapter, **options):
    return hub_sync.push(adapter, REPO, **options)


def pull(*arguments, **options):
    return hub_sync.pull(REPO, Library(), *arguments, **options)


def refusal(kind, call, *arguments, **options):
    with pytest.raises(kind) as error:
        call(*arguments, **options)
    return str(error.value)


def sizes(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def served(hub, name):
    return hub.repos[KEY].files[name].read_bytes()


def test_push_pull_round_trip(hub, adapter):
    sent = push(adapter)
    assert sent.url == f"{hub.url}/{REPO}/commit/{hub.repos[KEY].sha}"
    assert list(sent.files) == sorted(path.name for path in adapter.path.iterdir())
    pulled = pull("again")
    again = pulled.adapter
    assert again.path == Library().path / "again"
    assert pulled.files == sent.files == sizes(again.path)
    assert verify_adapter(again) == []
    for name in (
        WEIGHTS_FILE,
        CARD_FILE,
        METRICS_FILE,
        LOSS_PLOT_FILE,
    ):
        assert (again.path / name).read_bytes() == (adapter.path / name).read_bytes()
    assert again.manifest.result == adapter.manifest.result


def test_push_strips_local_paths(hub, adapter, gpt2, tmp_path_factory):
    (adapter.path / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": str(gpt2), "chat_template": "x"})
    )
    push(adapter)
    assert json.loads(served(hub, "tokenizer_config.json")) == {"name_or_path": "gpt2", "chat_template": "x"}
    manifest = json.loads(served(hub, MANIFEST_FILE))
    assert (manifest["base"]["name"], manifest["base"]["repo"]) == ("gpt2", "gpt2")
    assert manifest["data"]["source"] == "reviews.csv"
    assert json.loads(served(hub, CONFIG_FILE))["base_model_name_or_path"] == "gpt2"
    settings = yaml.safe_load(served(hub, RUN_FILE))
    assert (settings["base"], settings["dataset"], settings["rank"]) == ("gpt2", "reviews.csv", 4)
    root = str(tmp_path_factory.getbasetemp()).encode()
    assert root in (adapter.path / MANIFEST_FILE).read_bytes()
    assert not [name for name in hub.repos[KEY].files if root in served(hub, name)]


def test_push_strips_paths_of_several_datasets(hub, adapter, tmp_path):
    names = [f"{tmp_path}/mine/a.csv", "notes/b.csv"]
    manifest = json.loads((adapter.path / MANIFEST_FILE).read_text())
    source = {"weight": 0.5, "hash": "0" * 64, "counts": {}}
    manifest["data"]["sources"] = [source | {"name": name, "source": name} for name in names]
    (adapter.path / MANIFEST_FILE).write_text(json.dumps(manifest))
    settings = yaml.safe_load((adapter.path / RUN_FILE).read_text())
    settings["dataset"] = [f"{name}=0.5" for name in names]
    (adapter.path / RUN_FILE).write_text(yaml.safe_dump(settings))
    push(load_adapter_folder(adapter.path))
    sources = json.loads(served(hub, MANIFEST_FILE))["data"]["sources"]
    assert [(each["name"], each["source"]) for each in sources] == [("a.csv", "a.csv"), ("b.csv", "b.csv")]
    assert yaml.safe_load(served(hub, RUN_FILE))["dataset"] == ["a.csv=0.5", "b.csv=0.5"]


def test_push_config_without_base(hub, tmp_path):
    folder = adapter_files.write(tmp_path / "adapters" / "nameless", facts=adapter_files.manifest(run=None))
    nameless = {key: value for key, value in adapter_files.CONFIG.items() if key != "base_model_name_or_path"}
    for bare in (nameless, nameless | {"base_model_name_or_path": None}):
        (folder / CONFIG_FILE).write_text(json.dumps(bare))
        push(load_adapter_folder(folder))
        assert json.loads(served(hub, CONFIG_FILE)) == bare
    assert verify_adapter(pull().adapter) == []


def test_push_ignores_symlinked_card(hub, small, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (small.path / CARD_FILE).symlink_to(tmp_path / "secret")
    push(small)
    assert served(hub, CARD_FILE).startswith(b"---\nbase_model: ")


def test_push_invalid_run_settings_fails(hub, small):
    for text in ("base: [", "- base\n"):
        (small.path / RUN_FILE).write_text(text)
        assert refusal(AdapterError, push, small) == "small is not shared: its run.yaml has no valid settings."
    assert not hub.repos


def test_push_private_creates_private_repo(hub, small):
    push(small, private=True)
    hub_sync.push(small, "owner/open")
    assert (hub.repos[KEY].private, hub.repos["models/owner/open"].private) == (True, False)


def test_push_existing_repo_keeps_visibility(hub, small):
    hub.commit(KEY, {"notes.txt": b"kept", CARD_FILE: b"old"})
    assert refusal(HubError, push, small, private=True) == (
        f"{REPO} is public: make it private on its Hub page first, or push to it as it is."
    )
    url = push(small).url
    assert url == f"{hub.url}/{REPO}/commit/{hub.repos[KEY].sha}"
    assert not hub.repos[KEY].private
    assert set(hub.repos[KEY].files) == {
        "notes.txt",
        CARD_FILE,
        CONFIG_FILE,
        MANIFEST_FILE,
        WEIGHTS_FILE,
    }
    assert push(small).url == url  # nothing has changed
    assert len(hub.commits) == 2


def test_push_deletes_stale_files(hub, small):
    hub.commit(KEY, {RUN_FILE: b"base: old\n", LOSS_PLOT_FILE: b"old", "notes.txt": b"kept"})
    push(small)
    assert set(hub.repos[KEY].files) == {
        "notes.txt",
        CARD_FILE,
        CONFIG_FILE,
        MANIFEST_FILE,
        WEIGHTS_FILE,
    }


def test_push_dry_run_sends_nothing(hub, small):
    transfer = push(small, dry_run=True)
    assert (transfer.url, hub.repos, hub.blobs) == (None, {}, {})
    assert {request.partition(" ")[0] for request in hub.requests} == {"HEAD", "GET"}
    assert transfer.files == push(small).files == {name: len(served(hub, name)) for name in hub.repos[KEY].files}


@pytest.mark.parametrize("token", ["writer", "fine-owner"])
def test_push_dry_run_says_rights(hub, small, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    checks = push(small, dry_run=True).checks
    right = "an organization of the account (write)" if token == "writer" else "the token may write for it"
    role = "write" if token == "writer" else "fineGrained"
    assert checks == {
        "account": f"user, token laptop ({role})",
        "owner": f"owner: {right}",
        "repo": "new, public",
    }
    assert push(small, dry_run=True, private=True).checks["repo"] == "new, private"
    push(small, private=True)
    assert push(small, dry_run=True).checks["repo"] == "exists, private"
    if token == "writer":
        mine = hub_sync.push(small, "user/mine", dry_run=True).checks
        assert mine["owner"] == "user: the account itself"
        assert hub_sync.push(small, "mine", dry_run=True).checks["owner"] == "user: the account itself"


@pytest.mark.parametrize(
    ("token", "repo", "why"),
    [
        ("", REPO, "owner/reviews cannot be written without a token: run `hf auth login`, or set HF_TOKEN."),
        ("read-only", REPO, "token laptop of user (read) has no right to write for owner. Run `hf auth login`"),
        ("fine-other", REPO, "token laptop of user (fineGrained) has no right to write for owner."),
        ("writer", "stranger/reviews", "token laptop of user (write) has no right to write for stranger."),
        ("writer", "museum/reviews", "token laptop of user (write) has no right to write for museum."),
        ("writer", "a/b/c", "'a/b/c' is neither a local folder nor a Hub id"),
    ],
)
def test_push_dry_run_refuses_like_push(hub, small, monkeypatch, token, repo, why):
    monkeypatch.setenv("HF_TOKEN", token)
    assert why in refusal(HubError, hub_sync.push, small, repo, dry_run=True)
    assert not hub.repos


def test_push_dry_run_refuses_public_repo(hub, small):
    push(small)
    message = "owner/reviews is public: make it private on its Hub page first, or push to it as it is."
    assert refusal(HubError, push, small, private=True, dry_run=True) == message


def test_pull_dry_run_downloads_nothing(hub, small, tmp_path):
    put(hub, small.path, **{"evil.py": b"1"})
    shutil.rmtree(small.path.parent)
    transfer = pull(dry_run=True)
    assert transfer.files == {name: len(served(hub, name)) for name in (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE)}
    assert (transfer.adapter, hub.requests) == (None, ["HEAD /", f"GET /api/{KEY}"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["", "read-only"])
@pytest.mark.parametrize("there", [False, True])
def test_push_without_write_access_fails(hub, small, monkeypatch, value, there):
    if there:
        hub.commit(KEY, {})
    monkeypatch.setenv("HF_TOKEN", value)
    assert refusal(HubError, push, small) == REFUSED
    assert len(hub.commits) == there


def test_pull_private_repo_fails(hub, small, monkeypatch):
    push(small, private=True)
    monkeypatch.setenv("HF_TOKEN", "")
    assert refusal(HubError, pull) == (
        "the Hub has no repo owner/reviews, or you have no access: check the name, or run `hf auth login` if it is private."
    )


def test_hub_error_message_is_shown(hub, small):
    hub.fault = lambda handler: bool("/commit/" in handler.path and not fail(handler, 400, "", "too many files"))
    message = "could not be written to the Hub: Bad request for commit endpoint: too many files"
    assert refusal(HubError, push, small) == f"owner/reviews {message}"
    hub.fault = lambda handler: bool("/api/" in handler.path and not fail(handler, 403, "", "policy"))
    message = "could not be fetched from the Hub: 403 Forbidden: policy."
    assert refusal(HubError, pull) == f"owner/reviews {message}"


def test_push_pull_offline_fails(small):
    message = "the Hub is out of reach: HF_HUB_OFFLINE is set."
    assert refusal(HubError, push, small) == f"owner/reviews cannot be written, and {message}"
    assert refusal(HubError, pull) == f"owner/reviews cannot be fetched, and {message}"
    offline = push(small, dry_run=True)
    assert offline.files
    assert offline.checks == {"not checked": "the Hub is out of reach: HF_HUB_OFFLINE is set"}


@pytest.mark.parametrize("missing", [WEIGHTS_FILE, CONFIG_FILE])
def test_pull_incomplete_repo_fails(hub, small, missing):
    hub.commit(KEY, {path.name: path.read_bytes() for path in small.path.iterdir() if path.name != missing})
    message = f"owner/reviews holds no adapter in PEFT's format: it has no {missing}."
    assert refusal(HubError, pull) == refusal(HubError, pull, dry_run=True) == message


def flipped(weights):
    return weights[:-1] + bytes([weights[-1] ^ 1])


@pytest.mark.parametrize(
    ("name", "spoil", "why"),
    [
        (
            CONFIG_FILE,
            lambda _: config(init_lora_weights="pissa"),
            "init_lora_weights is 'pissa', and only True",
        ),
        (CONFIG_FILE, lambda _: config(lora_alpha=9), f"adapter_config.json {OTHER}"),
        (WEIGHTS_FILE, lambda weights: weights[:-8], "it is cut off"),
        (WEIGHTS_FILE, flipped, f"adapter_model.safetensors {OTHER}"),
    ],
)
def test_pull_invalid_adapter_changes_nothing(hub, small, name, spoil, why):
    push(small)
    hub.commit(KEY, {name: spoil((small.path / name).read_bytes())})
    before = {path: path.read_bytes() for path in small.path.iterdir()}
    assert why in refusal(AdapterError, pull)
    assert why in refusal(AdapterError, pull, "small", overwrite=True)
    assert [path.name for path in small.path.parent.iterdir()] == ["small"]
    assert {path: path.read_bytes() for path in small.path.iterdir()} == before


def test_pull_overwrite_and_revision(hub, small, tmp_path):
    first = put(hub, small.path)
    other = adapter_files.write(
        tmp_path / "other", weights=adapter_files.tensors(value=2.0), facts=adapter_files.manifest(run=None)
    )
    second = put(hub, other)
    digests = [atomic_io.sha256_file(commit.files[WEIGHTS_FILE]) for commit in (first, second)]
    hub.requests.clear()
    message = "adapters/small exists: choose another --name, or replace it with --overwrite."
    assert refusal(AdapterError, pull, "small") == message
    assert hub.requests == []
    assert pull("small", overwrite=True).adapter.sha256 == digests[1]
    assert pull("old", revision=first.sha).adapter.sha256 == digests[0]
    assert pull(revision="main").adapter.path.name == "reviews"
    assert "has no such revision: leave --revision out" in refusal(HubError, pull, "new", revision="v9")
    assert "'v1.0' is not a valid adapter name" in refusal(AdapterError, pull, "v1.0")


def test_pull_during_commit_is_consistent(hub, small):
    first = put(hub, small.path)
    hub.fault = lambda _: len(hub.requests) == 3 and not hub.commit(KEY, {CARD_FILE: b"x", CONFIG_FILE: b"{}"})
    pulled = pull()
    assert (
        pulled.files
        == sizes(pulled.adapter.path)
        == {name: path.stat().st_size for name, path in first.files.items()}
    )


def test_pull_without_manifest_notifies(hub, tmp_path):
    put(hub, adapter_files.write(tmp_path / "peft"))
    notices = []
    adapter = pull(notify=notices.append).adapter
    assert [notice.text for notice in notices] == [
        "reviews was made by another tool: run `adapters adopt reviews` to tie it to its base."
    ]
    assert refusal(AdapterError, push, adapter) == (
        "adapters/reviews has no manifest: run `adapters adopt` first."
    )


def test_push_damaged_adapter_fails(hub, small):
    (small.path / WEIGHTS_FILE).write_bytes(flipped((small.path / WEIGHTS_FILE).read_bytes()))
    assert refusal(AdapterError, push, small) == f"{small.path} is not pushed: adapter_model.safetensors {OTHER}."
    assert hub.requests == []


def test_pull_downloads_only_adapter_files(hub, small, monkeypatch):
    monkeypatch.setattr(hub_sync, "MAX_SIDE_FILE_BYTES", 5_000)
    other_files = {
        "evil.py": b"1",
        "adapter_model.bin": b"2",
        "sub/manifest.json": b"3",
        CARD_FILE: b"x" * 5_001,
    }
    put(hub, small.path, **other_files)
    pulled = pull()
    wanted = {CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE}
    assert {path.name for path in pulled.adapter.path.iterdir()} == set(pulled.files) == wanted
    assert {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request} == wanted


def test_push_pull_commands(hub, small, monkeypatch):
    tried = run("push", "small", REPO, "--dry-run")
    assert [line.split()[0] for line in tried.stdout.splitlines()] == [
        CARD_FILE,
        CONFIG_FILE,
        WEIGHTS_FILE,
        MANIFEST_FILE,
        "in",
        "account",
        "owner",
        "repo",
    ]
    assert (tried.stderr, hub.repos) == ("Dry run: nothing was uploaded.\n", {})
    assert json.loads(run("push", "small", REPO, "--dry-run", "--json").stdout)["checks"]["repo"] == "new, public"
    sent = json.loads(run("push", "small", REPO, "--private", "--json").stdout)
    sha = hub.repos[KEY].sha
    assert sent == {"repo": REPO, "files": sent["files"], "url": f"{hub.url}/{REPO}/commit/{sha}"}
    assert hub.repos[KEY].private
    assert run("push", "small", REPO).stdout.splitlines()[-1] == sent["url"]
    tried = run("pull", REPO, "--dry-run", "--json")
    assert json.loads(tried.stdout) == {"repo": REPO, "files": sent["files"]}
    assert tried.stderr == "Dry run: nothing was downloaded.\n"
    assert run("pull", REPO).stdout.splitlines()[-1] == "adapters/reviews"
    assert run("pull", REPO, exit_code=1).stderr == (
        "Error: adapters/reviews exists: choose another --name, or replace it with --overwrite.\n"
    )
    facts = json.loads(run("pull", REPO, "--name", "reviews", "--revision", sha, "--overwrite", "--json").stdout)
    assert (facts["name"], facts["rank"], facts["files"]) == ("reviews", 4, sent["files"])
    assert run("push", "small", "a/b/c", exit_code=1).stderr.startswith("Error: 'a/b/c' is ")
    monkeypatch.setenv("HF_TOKEN", "")
    assert run("push", "small", REPO, exit_code=1).stderr.splitlines()[-1] == f"Error: {REFUSED}"
