"""Adapters to and from the Hugging Face Hub.

Surprise: what is pushed is not quite what lies in the library: of paths on this machine only the last part goes along. What
is pulled comes from strangers, so nothing but the files of an adapter is fetched, and they are checked as any adapter is.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from .. import atomic_io, hub
from ..config import default_adapter_name, read_settings
from ..errors import AdapterError, ConfigError, EventHandler, HubError, Notice, ignore_events
from ..text import display_name
from . import model_card
from .adapter import (
    CARD_FILE,
    CONFIG_FILE,
    LOSS_PLOT_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RUN_FILE,
    SPECTRUM_FILE,
    WEIGHTS_FILE,
    Adapter,
    check_weights_hash,
    load_adapter_folder,
    validate_name,
    verify_adapter,
)
from .library import Library
from .manifest import Manifest

SYNCED_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    MANIFEST_FILE,
    RUN_FILE,
    METRICS_FILE,
    LOSS_PLOT_FILE,
    SPECTRUM_FILE,
    CARD_FILE,
)
_PATH_SETTINGS = ("dataset", "eval_dataset", "base", "parent", "adapters_dir", "runs_dir")  # settings that may be paths
MAX_SIDE_FILE_BYTES = 10_000_000  # bytes of a file that is not the weights


@dataclass(frozen=True)
class TransferResult:
    """What goes to or comes from a repo: bytes of each file; where the commit is, and the adapter it became."""

    repo: str
    files: dict[str, int]
    url: str | None = None
    adapter: Adapter | None = None


def push(adapter: Adapter, repo: str, *, private: bool = False, dry_run: bool = False) -> TransferResult:
    """Put an adapter with its model card into a repo on the Hub (`owner/name`), as one commit.

    With `dry_run` nobody is asked, and nothing leaves. Raises AdapterError unless it is whole and has a manifest, HubError
    when the Hub refuses.
    """
    if adapter.manifest is None:
        raise AdapterError(f"{adapter.path} has no manifest: `adapters adopt` gives it one, and with it a base.")
    if problems := verify_adapter(adapter):
        raise AdapterError(f"{adapter.path} is not pushed: {'; '.join(problems[:3])}.")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / adapter.name
        folder.mkdir()
        for name in SYNCED_FILES:
            file = adapter.path / name
            hidden = file.is_symlink() and name not in (
                CONFIG_FILE,
                WEIGHTS_FILE,
            )  # not looked into: it might be any
            if file.is_file() and not hidden:
                shutil.copyfile(file, folder / name)
        _without_paths(folder, adapter.manifest)
        if not (folder / CARD_FILE).is_file():
            (folder / CARD_FILE).write_text(
                model_card.model_card(load_adapter_folder(folder), adapter.name), encoding="utf-8"
            )
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        if dry_run:
            return TransferResult(repo, sizes)
        return TransferResult(
            repo, sizes, url=hub.upload_files(folder, repo, SYNCED_FILES, private=private, message=adapter.name)
        )


def _without_paths(folder: Path, manifest: Manifest) -> None:
    """Of paths on this machine leave the last part, in all files that hold some."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if base_name := config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = display_name(base_name)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    base = manifest.base.model_copy(
        update={"name": display_name(manifest.base.name), "repo": display_name(manifest.base.repo)}
    )
    data, weights = manifest.data, manifest.weights
    if data is not None:
        measured = display_name(data.eval_dataset) if data.eval_dataset else None
        data = data.model_copy(
            update={"name": display_name(data.name), "source": display_name(data.source), "eval_dataset": measured}
        )
    if weights is not None:
        weights = weights.model_copy(update={"config": atomic_io.sha256_file(folder / CONFIG_FILE)})
    public = manifest.model_copy(update={"base": base, "data": data, "weights": weights})
    (folder / MANIFEST_FILE).write_text(public.to_json(), encoding="utf-8")
    if (folder / RUN_FILE).is_file():
        try:
            settings = read_settings(folder / RUN_FILE)
        except ConfigError as error:
            raise AdapterError(f"{folder.name} is not pushed: its {RUN_FILE} holds no settings.") from error
        plain = {
            key: display_name(it) if key in _PATH_SETTINGS and isinstance(it, str) else it
            for key, it in settings.items()
        }
        (folder / RUN_FILE).write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


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
    """Take an adapter from a repo on the Hub into the library, under `name` or the repo's.

    With `dry_run` it is only listed. Raises HubError when the Hub refuses or the repo holds no adapter, AdapterError when
    the adapter is damaged, or would do more than add low-rank updates.
    """
    name = validate_name(name) if name else default_adapter_name(repo)
    library.check_name_free(name, overwrite=overwrite)
    commit, there = hub.list_repo_files(repo, revision)
    if missing := [it for it in (CONFIG_FILE, WEIGHTS_FILE) if it not in there]:
        raise HubError(f"{repo} holds no adapter that is read here: it has no {missing[0]}.")
    if large := [it for it in (CONFIG_FILE, MANIFEST_FILE) if there.get(it, 0) > MAX_SIDE_FILE_BYTES]:
        raise HubError(f"{repo} holds no adapter that is read here: its {large[0]} has {there[large[0]]:,} bytes.")
    wanted = {
        it: there[it] for it in SYNCED_FILES if it in there and (it == WEIGHTS_FILE or there[it] <= MAX_SIDE_FILE_BYTES)
    }
    if dry_run:
        return TransferResult(repo, wanted)
    fetched = hub.download_files(repo, commit, wanted)
    try:
        check_weights_hash(load_adapter_folder(fetched))
    except AdapterError as error:
        raise AdapterError(str(error).replace(str(fetched), repo)) from error
    with library.create(name, overwrite=overwrite) as work:
        for file in wanted:
            shutil.copyfile(fetched / file, work / file)
    adapter = library.get(name)
    if adapter.manifest is None:
        notify(Notice(f"{name} was made by another tool: `adapters adopt {name}` holds it to its base from now on."))
    return TransferResult(repo, wanted, adapter=adapter)
