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

from . import files, hub, report, store
from .config import settings_in
from .data import default_name
from .errors import AdapterError, ConfigError, HubError, Listener, Notice, ignore
from .files import shown
from .library import Library
from .manifest import Manifest
from .store import Adapter

FILES = (
    store.CONFIG,
    store.WEIGHTS,
    store.MANIFEST,
    store.RUN,
    store.METRICS,
    store.PLOT,
    store.SPECTRUM,
    store.CARD,
)
_PATHS = ("dataset", "eval_dataset", "base", "parent", "adapters_dir", "runs_dir")  # settings that may be paths
MOST_BESIDE = 10_000_000  # bytes of a file that is not the weights


@dataclass(frozen=True)
class Parcel:
    """What goes to or comes from a repo: bytes of each file; where the commit is, and the adapter it became."""

    repo: str
    files: dict[str, int]
    url: str | None = None
    adapter: Adapter | None = None


def push(adapter: Adapter, repo: str, *, private: bool = False, dry_run: bool = False) -> Parcel:
    """Put an adapter with its model card into a repo on the Hub (`owner/name`), as one commit.

    With `dry_run` nobody is asked, and nothing leaves. Raises AdapterError unless it is whole and has a manifest, HubError
    when the Hub refuses.
    """
    if adapter.manifest is None:
        raise AdapterError(f"{adapter.path} has no manifest: `adapters adopt` gives it one, and with it a base.")
    if problems := store.verify(adapter):
        raise AdapterError(f"{adapter.path} is not pushed: {'; '.join(problems[:3])}.")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / adapter.name
        folder.mkdir()
        for name in FILES:
            file = adapter.path / name
            hidden = file.is_symlink() and name not in (store.CONFIG, store.WEIGHTS)  # not looked into: it might be any
            if file.is_file() and not hidden:
                shutil.copyfile(file, folder / name)
        _without_paths(folder, adapter.manifest)
        if not (folder / store.CARD).is_file():
            (folder / store.CARD).write_text(report.model_card(store.read(folder), adapter.name), encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        if dry_run:
            return Parcel(repo, sizes)
        return Parcel(repo, sizes, url=hub.upload(folder, repo, FILES, private=private, message=adapter.name))


def _without_paths(folder: Path, manifest: Manifest) -> None:
    """Of paths on this machine leave the last part, in all files that hold some."""
    config = json.loads((folder / store.CONFIG).read_text(encoding="utf-8"))
    if base_name := config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = shown(base_name)
    (folder / store.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    base = manifest.base.model_copy(update={"name": shown(manifest.base.name), "repo": shown(manifest.base.repo)})
    data, weights = manifest.data, manifest.weights
    if data is not None:
        measured = shown(data.eval_dataset) if data.eval_dataset else None
        data = data.model_copy(
            update={"name": shown(data.name), "source": shown(data.source), "eval_dataset": measured}
        )
    if weights is not None:
        weights = weights.model_copy(update={"config": files.sha256_file(folder / store.CONFIG)})
    public = manifest.model_copy(update={"base": base, "data": data, "weights": weights})
    (folder / store.MANIFEST).write_text(public.to_json(), encoding="utf-8")
    if (folder / store.RUN).is_file():
        try:
            settings = settings_in(folder / store.RUN)
        except ConfigError as error:
            raise AdapterError(f"{folder.name} is not pushed: its {store.RUN} holds no settings.") from error
        plain = {key: shown(it) if key in _PATHS and isinstance(it, str) else it for key, it in settings.items()}
        (folder / store.RUN).write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def pull(
    repo: str,
    library: Library,
    name: str | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    notify: Listener = ignore,
) -> Parcel:
    """Take an adapter from a repo on the Hub into the library, under `name` or the repo's.

    With `dry_run` it is only listed. Raises HubError when the Hub refuses or the repo holds no adapter, AdapterError when
    the adapter is damaged, or would do more than add low-rank updates.
    """
    name = store.valid_name(name) if name else default_name(repo)
    library.check_free(name, overwrite=overwrite)
    commit, there = hub.files_of(repo, revision)
    if missing := [it for it in (store.CONFIG, store.WEIGHTS) if it not in there]:
        raise HubError(f"{repo} holds no adapter that is read here: it has no {missing[0]}.")
    if large := [it for it in (store.CONFIG, store.MANIFEST) if there.get(it, 0) > MOST_BESIDE]:
        raise HubError(f"{repo} holds no adapter that is read here: its {large[0]} has {there[large[0]]:,} bytes.")
    wanted = {it: there[it] for it in FILES if it in there and (it == store.WEIGHTS or there[it] <= MOST_BESIDE)}
    if dry_run:
        return Parcel(repo, wanted)
    fetched = hub.fetch_files(repo, commit, wanted)
    try:
        store.check_weights(store.read(fetched))
    except AdapterError as error:
        raise AdapterError(str(error).replace(str(fetched), repo)) from error
    with library.writing(name, overwrite=overwrite) as work:
        for file in wanted:
            shutil.copyfile(fetched / file, work / file)
    adapter = library.get(name)
    if adapter.manifest is None:
        notify(Notice(f"{name} was made by another tool: `adapters adopt {name}` holds it to its base from now on."))
    return Parcel(repo, wanted, adapter=adapter)
