"""Push adapters to the Hugging Face Hub and pull them from it.

Local paths are removed before an upload: only their last part is kept. A download fetches only the
files of an adapter, and checks them like any other adapter.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .. import atomic_io, hub
from ..errors import AdapterError, ConfigError, EventHandler, HubError, Notice, ignore_events
from ..settings_files import read_settings
from ..text import default_adapter_name, display_name, split_weight
from . import model_card
from .adapter import (
    CARD_FILE,
    CONFIG_FILE,
    CONFUSION_FILE,
    LOSS_PLOT_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RUN_FILE,
    SPECTRUM_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    Adapter,
    check_weights_hash,
    load_adapter_folder,
    validate_name,
    verify_adapter,
)
from .library import Library, copy_files
from .manifest import Manifest
from .report import REPORT_FILE
from .samples import SAMPLES_FILE

SYNCED_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    MANIFEST_FILE,
    RUN_FILE,
    METRICS_FILE,
    LOSS_PLOT_FILE,
    CONFUSION_FILE,
    SPECTRUM_FILE,
    SAMPLES_FILE,
    REPORT_FILE,
    CARD_FILE,
    *TOKENIZER_FILES,
)
# May be local paths.
_PATH_SETTINGS = ("dataset", "eval_dataset", "base", "parent", "adapters_dir", "runs_dir")
_TOKENIZER_PATHS = ("name_or_path", "tokenizer_file", "vocab_file")
MAX_SIDE_FILE_BYTES = 10_000_000  # of each file except the weights
MAX_TOKENIZER_BYTES = 64_000_000


@dataclass(frozen=True)
class TransferResult:
    """Result of a push or pull.

    Args:
        repo: the repo on the Hub.
        files: name -> bytes.
        url: of the commit that was pushed.
        checks: of a push that sends nothing: the account, its right to write, the repo.
        adapter: the adapter that was pulled.
    """

    repo: str
    files: dict[str, int]
    url: str | None = None
    checks: dict[str, str] = field(default_factory=dict)
    adapter: Adapter | None = None


def push(adapter: Adapter, repo: str, *, private: bool = False, dry_run: bool = False) -> TransferResult:
    """Upload an adapter with its model card to a repo on the Hub (`owner/name`), as one commit.

    With `dry_run`, list the files and check token, owner and repo, as far as the Hub is reachable,
    without sending anything. Raises AdapterError if the adapter is damaged or has no manifest,
    HubError if the Hub refuses, or would refuse.
    """
    if adapter.manifest is None:
        raise AdapterError(f"{adapter.path} has no manifest: run `adapters adopt` first.")
    if problems := verify_adapter(adapter):
        raise AdapterError(f"{adapter.path} is not pushed: {'; '.join(problems[:3])}.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / adapter.name
        folder.mkdir()
        copy_public(adapter, folder)
        if not (folder / CARD_FILE).is_file():
            (folder / CARD_FILE).write_text(
                model_card.model_card(load_adapter_folder(folder), adapter.name), encoding="utf-8"
            )
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        if dry_run:
            return TransferResult(repo, sizes, checks=_check_push(repo, private=private))
        url = hub.upload_files(folder, repo, SYNCED_FILES, private=private, message=adapter.name)
        return TransferResult(repo, sizes, url)


def _check_push(repo: str, *, private: bool) -> dict[str, str]:
    """Ask the Hub whose the token is, and whether it may write to a repo; change nothing.

    Raises:
        HubError: a push would be refused.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if why := hub.why_unreachable():
        return {"not checked": f"the Hub is out of reach: {why}"}
    api, existing = HfApi(), None
    with hub.hub_request(repo, writing=True), contextlib.suppress(RepositoryNotFoundError):
        existing = api.model_info(repo)
    if get_token() is None:
        raise HubError(f"{repo} cannot be written without a token: run `hf auth login`, or set HF_TOKEN.")
    with hub.hub_request(repo, writing=True):
        account = api.whoami()
        if existing:
            api.auth_check(repo, write=True)
    owner = repo.partition("/")[0] if "/" in repo else account["name"]
    token = (account.get("auth") or {}).get("accessToken") or {}
    role, shown = token.get("role", "unknown"), f"token {token.get('displayName', '')}".strip()
    if (right := _right_to_write(account, owner, token)) is None:
        raise HubError(
            f"{repo} cannot be written: the {shown} of {account['name']} ({role}) has no right to write for {owner}. "
            "Run `hf auth login` with one that has, or choose another owner."
        )
    if existing and private and not existing.private:
        raise HubError(f"{repo} is public: make it private on its Hub page first, or push to it as it is.")
    visibility = "private" if (existing.private if existing else private) else "public"
    return {
        "account": f"{account['name']}, {shown} ({role})",
        "owner": f"{owner}: {right}",
        "repo": f"exists, {visibility}" if existing else f"new, {visibility}",
    }


def _right_to_write(account: dict[str, Any], owner: str, token: dict[str, Any]) -> str | None:
    """Return why an account may write for an owner, in words; None if it may not."""
    organizations = {each["name"]: each.get("roleInOrg", "member") for each in account.get("orgs") or []}
    if token.get("role") == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or []
        names = {
            scope["entity"]["name"].partition("/")[0] for scope in scopes if "repo.write" in scope["permissions"]
        }
        return "the token may write for it" if owner in names else None
    if token.get("role") == "read" or organizations.get(owner) == "read":
        return None
    if owner == account["name"]:
        return "the account itself"
    return f"an organization of the account ({organizations[owner]})" if owner in organizations else None


def max_bytes(file: str) -> int:
    """Return the limit for a file of a stranger's adapter, but for its weights."""
    return MAX_TOKENIZER_BYTES if file in TOKENIZER_FILES else MAX_SIDE_FILE_BYTES


def copy_public(adapter: Adapter, folder: Path, names: Sequence[str] = SYNCED_FILES) -> None:
    """Copy files of an adapter into an empty folder, each local path in them replaced by its last part.

    Raises AdapterError for a file that cannot be read for that.
    """
    copy_files(adapter, folder, names)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if base_name := config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = display_name(base_name)
    before = atomic_io.sha256_file(folder / CONFIG_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if adapter.manifest is not None:
        public = _public_manifest(adapter.manifest)
        if public.weights is not None and public.weights.config in (
            None,
            before,
        ):  # else it is damaged, and stays so
            hashes = {"config": atomic_io.sha256_file(folder / CONFIG_FILE)}
            public = public.model_copy(update={"weights": public.weights.model_copy(update=hashes)})
        (folder / MANIFEST_FILE).write_text(public.to_json(), encoding="utf-8")
    tokenizer_config = folder / "tokenizer_config.json"
    if tokenizer_config.is_file():
        try:
            settings = dict(json.loads(tokenizer_config.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise AdapterError(
                f"{adapter.name} is not shared: its {tokenizer_config.name} is no JSON object."
            ) from error
        paths = {
            key: display_name(settings[key]) for key in _TOKENIZER_PATHS if isinstance(settings.get(key), str)
        }
        tokenizer_config.write_text(json.dumps(settings | paths, indent=2) + "\n", encoding="utf-8")
    if (folder / RUN_FILE).is_file():
        try:
            settings = read_settings(folder / RUN_FILE)
        except ConfigError as error:
            raise AdapterError(f"{adapter.name} is not shared: its {RUN_FILE} has no valid settings.") from error
        settings |= {key: _without_folders(settings[key]) for key in _PATH_SETTINGS if key in settings}
        (folder / RUN_FILE).write_text(
            yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )


def _public_manifest(manifest: Manifest) -> Manifest:
    """Replace local paths in a manifest by their last part."""
    base, data = manifest.base, manifest.data
    base = base.model_copy(update={"name": display_name(base.name), "repo": display_name(base.repo)})
    if data is not None:
        sources = [
            source.model_copy(update={"name": display_name(source.name), "source": display_name(source.source)})
            for source in data.sources
        ]
        names = {"name": data.name, "source": data.source, "eval_dataset": data.eval_dataset}
        shown = {key: display_name(name) for key, name in names.items() if name is not None}
        data = data.model_copy(update={**shown, "sources": sources})
    return manifest.model_copy(update={"base": base, "data": data})


def _without_folders(setting: object) -> object:
    """Return a setting with the last part of each path alone; datasets keep their weights."""
    if isinstance(setting, list):
        return [_without_folders(entry) for entry in setting]
    if not isinstance(setting, str):
        return setting
    name, _ = split_weight(setting)
    return display_name(name) + setting.removeprefix(name)


def pull(
    repo: str,
    library: Library,
    name: str | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    notify: EventHandler = ignore_events,
) -> TransferResult:
    """Download an adapter from a repo on the Hub into the library, under `name` or the repo's name.

    With `dry_run`, only list its files. Raises HubError if the Hub refuses or the repo holds no
    adapter, AdapterError if the adapter is damaged or unsafe.
    """
    name = validate_name(name) if name else default_adapter_name(repo)
    library.check_name_free(name, overwrite=overwrite)
    commit, sizes = hub.list_repo_files(repo, revision)
    for required in (CONFIG_FILE, WEIGHTS_FILE):
        if required not in sizes:
            raise HubError(f"{repo} holds no adapter in PEFT's format: it has no {required}.")
    for small in (CONFIG_FILE, MANIFEST_FILE):
        if sizes.get(small, 0) > MAX_SIDE_FILE_BYTES:
            raise HubError(f"{repo} holds no valid adapter: its {small} has {sizes[small]:,} bytes.")
    files = {
        file: sizes[file]
        for file in SYNCED_FILES
        if file in sizes and (file == WEIGHTS_FILE or sizes[file] <= max_bytes(file))
    }
    if dry_run:
        return TransferResult(repo, files)
    downloaded = hub.download_files(repo, commit, files)
    try:
        check_weights_hash(load_adapter_folder(downloaded))
    except AdapterError as error:
        raise AdapterError(str(error).replace(str(downloaded), repo)) from error
    with library.create(name, overwrite=overwrite) as folder:
        for file in files:
            shutil.copyfile(downloaded / file, folder / file)
    adapter = library.get(name)
    if adapter.manifest is None:
        notify(Notice(f"{name} was made by another tool: run `adapters adopt {name}` to tie it to its base."))
    return TransferResult(repo, files, adapter=adapter)
